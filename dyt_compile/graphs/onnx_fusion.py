"""What stands around a DyT becomes part of its node: the Add before it, the QuantizeLinear behind.

    y = DyT(x + residual)                  dyt::AddDyT, with the sum as second output
    y = QuantizeLinear(DyT(x), y_scale)    dyt::DyTQuantize
    both                                   dyt::AddDyTQuantize

Exact: the functions' bodies are the nodes that stood there. One kernel of a plugin then reads x and
the residual once and writes what the next matrix product reads.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from ..dyt import DOMAIN, FORMS, FUSED, fused_name
from .onnx_constants import stored
from .onnx_functions import OUTPUT_DTYPE, call, declare
from .onnx_inlining import inline
from .onnx_names import Names

__all__ = ["forms", "fuse", "unfuse"]

QUANTIZED = (ir.DataType.INT8, ir.DataType.FLOAT8E4M3FN)
"""What a plugin writes."""

USUAL = {"saturate": 1, "block_size": 0, "precision": 0}
"""Attributes of QuantizeLinear, and what a plugin does."""


def forms(model: ir.Model) -> Mapping[str, int]:
    """How many nodes of each form the model holds."""
    known_forms = FORMS | FUSED
    nodes = (node for node in model.graph.all_nodes() if node.domain == DOMAIN)
    return Counter(node.op_type for node in nodes if node.op_type in known_forms)


def fuse(model: ir.Model) -> Mapping[str, int]:
    """Fuse what stands around every DyT of the main graph, in place; the forms it then holds.

    An Add is fused where both of its operands are known to have the shape of the sum: what is
    broadcast is no residual. A QuantizeLinear is fused where it has one scale, zero point 0 and
    writes INT8 or FP8 E4M3; several of one scale become one; a DyT that something else reads too
    keeps them. α, γ, β and the scale must be constants. The shapes are those that the model's
    values have.
    """
    names = Names.of_values(model)
    for node in list(model.graph):
        if node.domain == DOMAIN and node.op_type in FORMS:
            _fuse(model.graph, node, names)
    model.graph.sort()
    declare(model)
    return forms(model)


def unfuse(model: ir.Model) -> bool:
    """Write every fused form out as the nodes that it stands for, in place; whether any was."""
    if not any(domain == DOMAIN and name in FUSED for domain, name, _ in model.functions):
        return False
    return inline(model, lambda body: body.domain == DOMAIN and body.name in FUSED)


@dataclass(frozen=True)
class _Quantization:
    """What a QuantizeLinear does that a plugin can do: y / scale in the dtype, zero point 0."""

    scale: float
    dtype: ir.DataType


def _fuse(graph: ir.Graph, node: ir.Node, names: Names) -> None:
    add, readers = _residual(node), _quantizers(node)
    if not (add or readers):
        return
    form = FUSED[fused_name(node.op_type, residual=add is not None, quantized=bool(readers))]
    inputs = [*(add.inputs if add else node.inputs[:1]), *node.inputs[1:]]
    y = node.outputs[0]
    dtype = None
    if readers and (quantization := _quantization(readers[0])):
        dtype = quantization.dtype
        inputs.append(_scale(graph, quantization.scale, names.free(f"{y.name}_scale")))
    fused = call(form, inputs, names.free(f"{y.name}_{form.name}"), dtype=dtype)  # type: ignore[arg-type]
    fused.metadata_props.update(node.metadata_props)
    old = [reader.outputs[0] for reader in readers] or [y]
    new = [fused.outputs[0]] * len(old)
    if add is not None:
        old, new = [*old, add.outputs[0]], [*new, fused.outputs[1]]
    gone = [*readers, node, *([add] if add else [])]
    read = [value for reader in readers for value in reader.inputs[1:]]
    node.replace_input_with(0, None)  # the sum's readers are about to read the fused node
    ir.convenience.replace_nodes_and_values(graph, node, gone, [fused], old, new)
    _drop(graph, read)


def _residual(node: ir.Node) -> ir.Node | None:
    """The Add of a residual before a DyT."""
    source = node.inputs[0]
    add = None if source is None else source.producer()
    if add is None or (add.domain, add.op_type) != ("", "Add") or add.graph is not node.graph:
        return None
    constants = all(stored(value) is not None for value in node.inputs[1:])
    shapes = [_shape(value) for value in (*add.inputs, source)]
    same = shapes[0] is not None and all(shape == shapes[0] for shape in shapes)
    return add if constants and same else None


def _shape(value: ir.Value | None) -> tuple[object, ...] | None:
    """The shape, with names for lengths that are not known; None where one has no name."""
    if value is None or value.shape is None:
        return None
    sizes = [size if isinstance(size, int) else size.value for size in value.shape]
    return None if None in sizes else tuple(sizes)


def _quantizers(node: ir.Node) -> list[ir.Node]:
    """All readers of a DyT, where they are quantizers that a plugin can be."""
    y = node.outputs[0]
    readers = list(dict.fromkeys(use.node for use in y.uses()))
    if not readers or y.is_graph_output():
        return []
    first = _quantization(readers[0])
    same = first is not None and all(_quantization(reader) == first for reader in readers)
    return readers if same else []


def _quantization(node: ir.Node) -> _Quantization | None:
    if (node.domain, node.op_type) != ("", "QuantizeLinear") or node.outputs[0].is_graph_output():
        return None
    if any(node.attributes.get_int(name, usual) != usual for name, usual in USUAL.items()):
        return None
    scale, zero = stored(node.inputs[1]), _zero_point(node)
    if scale is None or scale.size != 1 or not isinstance(node.graph, ir.Graph):
        return None
    if zero is not None:
        tensor = stored(zero)
        if tensor is None or np.any(tensor.numpy().astype(np.float32)):
            return None
        dtype = tensor.dtype
    else:
        dtype = ir.DataType(node.attributes.get_int(OUTPUT_DTYPE, 0) or ir.DataType.UINT8)
    if dtype not in QUANTIZED:
        return None
    return _Quantization(float(scale.numpy().astype(np.float32).reshape(())), dtype)


def _zero_point(node: ir.Node) -> ir.Value | None:
    return node.inputs[2] if len(node.inputs) > 2 else None


def _scale(graph: ir.Graph, scale: float, name: str) -> ir.Value:
    """The scale in float32, as the forms read it."""
    array = np.array(scale, np.float32)
    value = ir.Value(
        name=name,
        type=ir.TensorType(ir.DataType.FLOAT),
        shape=ir.Shape(()),
        const_value=ir.tensor(array, name=name),
    )
    graph.register_initializer(value)
    return value


def _drop(graph: ir.Graph, values: Iterable[ir.Value | None]) -> None:
    """Remove initializers that nothing reads any more."""
    for value in values:
        if value is not None and value.is_initializer() and not value.uses():
            graph.initializers.pop(str(value.name), None)
