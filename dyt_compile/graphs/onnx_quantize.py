"""Products and convolutions of an ONNX model over few bits: QuantizeLinear and DequantizeLinear.

    y = MatMul(x, W) + b    becomes
    y = MatMul(DequantizeLinear(QuantizeLinear(x)), DequantizeLinear(W of 8 bits)) + b

The float bias is kept where ONNX Runtime's optimizer does not make it the bias of a Gemm: it has
integer kernels for a Gemm without a bias, or with one of 32 bits, and for a MatMul; where it finds
others, it dequantizes the weights on every call and multiplies floats. So a product of matrices
becomes a Gemm without a bias, and the bias of any other gets as many axes as the product.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from ..errors import RewriteError
from .onnx_constants import stored
from .onnx_names import Names

__all__ = ["FORMATS", "Format", "Product", "write_products"]

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Format:
    """Eight bits: largest: the largest number; opset: the first whose QuantizeLinear has it.

    powers: whether a scale that is known beforehand is a power of two.
    """

    dtype: ir.DataType
    largest: float
    opset: int
    powers: bool

    def scale(self, bound: float, wide: npt.DTypeLike) -> Array:
        """The scale for numbers of absolute values up to `bound`, in the type that it is kept in.

        INT8 uses its whole range. FP8 E4M3 (arXiv 2209.05433, table 1) has its precision about
        every number that is no subnormal, below 2^-6: the power of two that nearly fills its range
        leaves those numbers furthest behind, and moves no number off the grid.
        """
        exact = bound / self.largest
        if self.powers:
            exact = 2.0 ** np.ceil(np.log2(exact))
        return np.asarray(exact).astype(wide)  # what that loses is less than half a step

    def scales(self, weight: Array, axis: int) -> Array:
        """The scales of a weight, one for each place along `axis`, that of its output channels."""
        others = tuple(place for place in range(weight.ndim) if place != axis)
        largest = np.abs(weight).max(axis=others)
        return np.asarray(np.where(largest > 0, largest, 1.0) / self.largest)

    def rounded(self, array: Array) -> Array:
        """The nearest numbers of the format."""
        if self.dtype is ir.DataType.INT8:
            return np.clip(np.rint(array), -self.largest, self.largest).astype(np.int8)
        return np.clip(array, -self.largest, self.largest).astype(ml_dtypes.float8_e4m3fn)


FORMATS = {
    "int8": Format(ir.DataType.INT8, 127.0, 13, powers=False),
    "fp8": Format(ir.DataType.FLOAT8E4M3FN, 448.0, 19, powers=True),
}


@dataclass(frozen=True, eq=False)
class Product:
    """A MatMul, Gemm or Conv to write over few bits.

    output: what it puts out; weight: its second operand, computed; bound: of the first.
    """

    output: ir.Value
    weight: Array
    bound: float


def write_products(
    model: ir.Model, products: Iterable[Product], form: Format, *, shared: bool
) -> None:
    """Write the products of the main graph over few bits, in place.

    shared: products of one value read one QuantizeLinear. ONNX Runtime has then no integer kernels
    for INT8 on x86, where its optimizer makes UINT8 of a value that a single product reads.
    """
    writer = _Writer(model, form, shared)
    for product in products:
        writer.write(product)
    model.graph.sort()


class _Writer:
    """What is written so far: values that several products read are quantized once."""

    def __init__(self, model: ir.Model, form: Format, shared: bool) -> None:
        self._shared = shared
        self._graph = model.graph
        self._form = form
        self._names = Names.of_values(model)
        self._activations: dict[ir.Value, list[ir.Value]] = {}
        self._readers: Counter[ir.Value] = Counter()
        self._narrow: dict[ir.Value, ir.Value] = {}
        self._weights: dict[tuple[ir.Value, int], ir.Value] = {}
        self._biases: dict[tuple[ir.Value, int], ir.Value] = {}

    def write(self, product: Product) -> None:
        node = product.output.producer()
        x, weight = (None, None) if node is None else node.inputs[:2]
        if node is None or x is None or weight is None:
            raise RewriteError(f"{product.output.name!r} is no product of two values")
        axis = _channels(node)
        if (weight, axis) not in self._weights:
            self._weights[weight, axis] = self._weight(node, weight, product.weight, axis)
        node.replace_input_with(0, self._activation(node, x, product.bound))
        node.replace_input_with(1, self._weights[weight, axis])
        if node.op_type != "Conv" and x.shape is not None:
            self._keep_bias(node, len(x.shape))

    def _activation(self, product: ir.Node, x: ir.Value, bound: float) -> ir.Value:
        """The numbers that one product reads: ONNX Runtime fuses no DequantizeLinear of two."""
        if x not in self._activations:
            self._activations[x] = self._scale_and_zero(x, bound)
        constants = self._activations[x]
        narrow = self._quantized(product, x, constants)
        y = self._added(product, "DequantizeLinear", [narrow, *constants], f"{x.name}_dequantized")
        y.type, y.shape = x.type, x.shape
        return y

    def _quantized(self, before: ir.Node, x: ir.Value, constants: list[ir.Value]) -> ir.Value:
        """x over eight bits.

        What tells the quantizers of several products apart is an axis, without meaning where there
        is one scale: equal ones become one in ONNX Runtime.
        """
        place, rank = self._readers[x], 1 if x.shape is None else len(x.shape)
        self._readers[x] += 1
        if place and self._shared:
            return self._narrow[x]
        attributes = {"axis": place % (2 * rank) - rank} if place else None
        y = self._added(
            before, "QuantizeLinear", [x, *constants], f"{x.name}_quantized", attributes
        )
        y.type, y.shape = ir.TensorType(self._form.dtype), x.shape
        self._narrow[x] = y
        return y

    def _scale_and_zero(self, x: ir.Value, bound: float) -> list[ir.Value]:
        wide = _wide(x)
        return [
            self._held(f"{x.name}_scale", self._form.scale(bound, wide.numpy()), wide),
            self._held(f"{x.name}_zero", np.zeros((), self._form.dtype.numpy()), self._form.dtype),
        ]

    def _weight(self, before: ir.Node, weight: ir.Value, array: Array, axis: int) -> ir.Value:
        wide, form = _wide(weight), self._form
        array = array.astype(np.float32)
        scales = form.scales(array, axis).astype(wide.numpy())
        shape = [-1 if place == axis else 1 for place in range(array.ndim)]
        numbers = form.rounded(array / scales.astype(np.float32).reshape(shape))
        operands = [
            self._held(f"{weight.name}_quantized", numbers, form.dtype),
            self._held(f"{weight.name}_scale", scales, wide),
            self._held(
                f"{weight.name}_zero", np.zeros_like(scales, form.dtype.numpy()), form.dtype
            ),
        ]
        attributes = {"axis": axis}
        y = self._added(
            before, "DequantizeLinear", operands, f"{weight.name}_dequantized", attributes
        )
        y.type, y.shape = ir.TensorType(wide), ir.Shape(array.shape)
        return y

    def _keep_bias(self, node: ir.Node, rank: int) -> None:
        """Add the bias where ONNX Runtime leaves it: see above."""
        if rank == 2 and node.op_type == "MatMul":
            node.op_type = "Gemm"
        if node.op_type == "Gemm":
            self._split_bias(node)
            return
        uses = list(node.outputs[0].uses())
        add = uses[0].node if len(uses) == 1 else None
        if add is None or (add.domain, add.op_type) != ("", "Add"):
            return
        place = 1 - uses[0].idx
        bias, tensor = add.inputs[place], stored(add.inputs[place])
        if bias is None or tensor is None or len(tensor.shape) >= rank:
            return
        if (bias, rank) not in self._biases:
            array = tensor.numpy().reshape(
                *(1,) * (rank - len(tensor.shape)), *tensor.shape.numpy()
            )
            self._biases[bias, rank] = self._held(f"{bias.name}_row", array, tensor.dtype)
        add.replace_input_with(place, self._biases[bias, rank])

    def _split_bias(self, node: ir.Node) -> None:
        bias = node.inputs[2] if len(node.inputs) > 2 else None
        node.resize_inputs(2)
        if bias is None:
            return
        y = node.outputs[0]
        final = str(y.name)
        add = ir.node("Add", [y, bias], name=self._names.free(f"{final}_bias"))
        add.metadata_props.update(node.metadata_props)
        result = add.outputs[0]
        result.type, result.shape = y.type, y.shape
        self._graph.insert_after(node, add)
        y.name, result.name = self._names.free(f"{final}_product"), final
        for use in list(y.uses()):
            if use.node is not add:
                use.node.replace_input_with(use.idx, result)
        for place, output in enumerate(self._graph.outputs):
            if output is y:
                self._graph.outputs[place] = result

    def _added(
        self,
        before: ir.Node,
        operator: str,
        inputs: list[ir.Value],
        name: str,
        attributes: Mapping[str, int] | None = None,
    ) -> ir.Value:
        name = self._names.free(name)
        node = ir.node(operator, inputs, attributes, name=f"node_{name}")
        node.outputs[0].name = name
        node.metadata_props.update(before.metadata_props)
        self._graph.insert_before(before, node)
        return node.outputs[0]

    def _held(self, name: str, array: Array, dtype: ir.DataType) -> ir.Value:
        name = self._names.free(name)
        value = ir.Value(
            name=name, type=ir.TensorType(dtype), shape=ir.Shape(array.shape),
            const_value=ir.tensor(array, dtype=dtype, name=name),
        )  # fmt: skip
        self._graph.register_initializer(value)
        return value


def _channels(node: ir.Node) -> int:
    """The axis of a weight that holds the output channels."""
    transposed = node.attributes.get_int("transB", 0) if node.op_type == "Gemm" else 0
    return 0 if node.op_type == "Conv" or transposed else 1


def _wide(value: ir.Value) -> ir.DataType:
    """The type that scales are kept in: that of what is quantized."""
    return value.dtype or ir.DataType.FLOAT
