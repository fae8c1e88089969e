"""Shapes and dtypes of an ONNX model's values: onnx's inference, helped where it stops.

It knows no operators of ONNX Runtime, and follows a shape that is computed from other shapes
through few operators; older exporters write the bounds of each slice so.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
from onnx.shape_inference import infer_node_outputs

from ..memory import bounded
from .onnx_constants import LARGEST, known, stored
from .onnx_fused import MICROSOFT
from .onnx_weights import outline

__all__ = ["infer_shapes", "restore_shapes"]

STAND_INS = {
    "SimplifiedLayerNormalization": "LayerNormalization",
    **dict.fromkeys(
        ("Attention", "BiasGelu", "FastGelu", "Gelu", "MultiHeadAttention", "QuickGelu"), "Identity"
    ),
}
"""Operators of ONNX Runtime, and the standard ones whose first output has the same shape."""

SHAPING: dict[str, tuple[int, ...]] = {
    **dict.fromkeys(
        ("CenterCropPad", "Expand", "OneHot", "Pad", "Reshape", "Split", "Squeeze", "Tile", "TopK",
         "Unsqueeze", "Upsample"), (1,)
    ),
    "ConstantOfShape": (0,),
    "Range": (0, 1, 2),
    "Resize": (2, 3),
    "Slice": (1, 2, 3, 4),
}  # fmt: skip
"""Operators, and the places of the inputs whose values lay down the shape of the output."""

MOST_BYTES = 1 << 30
"""Of memory for onnx's inference, which makes a list as long as the length of a vector; it takes a
hundredth of that for a large model."""

DECLARED = "dyt_compile.declared"
"""Where a value keeps the shape that the file gave it, None included."""


def infer_shapes(model: ir.Model) -> None:
    """Give the values of the main graph their shapes and dtypes, as far as they are known.

    Branches and loops keep what they have: there nothing is replaced, and two branches may have
    values of one name.
    """
    outer = {value for node in model.graph for value in node.outputs}
    before = [
        (value, value.shape, value.type) for node in model.graph.all_nodes()
        for value in node.outputs
    ]  # fmt: skip
    with _stand_ins(model.graph):
        _infer(model)
        _follow_numbers(model)
    for value, shape, kind in before:
        if value not in outer:
            value.shape, value.type = shape, kind
        elif value.shape != shape:
            value.meta[DECLARED] = shape


def _infer(model: ir.Model) -> None:
    """Onnx's own inference over the main graph; where it fails, the shapes stay as they are.

    onnx_ir's pass for that reads the whole inferred model again, as slowly as the file.
    """
    try:
        with bounded(MOST_BYTES):
            inferred = onnx.shape_inference.infer_shapes(outline(model), data_prop=True)
    except Exception:  # noqa: BLE001 - as onnx_ir's pass does; what is not known is refused later
        return
    found = {info.name: info.type for info in inferred.graph.value_info}
    found |= {info.name: info.type for info in inferred.graph.output}
    for value in (value for node in model.graph for value in node.outputs):
        if value.name in found:
            _take(value, found[value.name])


def _take(value: ir.Value, kind: onnx.TypeProto) -> None:
    """Give a value what was inferred of it."""
    tensor = kind.tensor_type
    if not kind.HasField("tensor_type"):
        value.type = ir.serde.deserialize_type_proto_for_type(kind)
        return
    if tensor.elem_type and (value.dtype is None or value.dtype.value != tensor.elem_type):
        value.dtype = ir.DataType(tensor.elem_type)
    if tensor.HasField("shape"):
        shape = ir.Shape([_size(axis) for axis in tensor.shape.dim])
        if shape != value.shape:
            value.shape = shape


def restore_shapes(model: ir.Model) -> None:
    """Give the values the shapes again that the file gave them, in place."""
    for node in model.graph:
        for value in node.outputs:
            if DECLARED in value.meta:
                value.shape = value.meta.pop(DECLARED)


def _follow_numbers(model: ir.Model) -> None:
    """Infer once more, node by node, with the numbers that chains of nodes compute from shapes."""
    changed: set[ir.Value | None] = set()
    for node in model.graph:
        if node.domain != "" or all(_is_fixed(value) for value in node.outputs):
            continue
        numbers = _numbers(node)
        if not numbers and changed.isdisjoint(node.inputs):
            continue
        for value, inferred in _inferred(node, numbers, model):
            shape = _named(inferred, value.shape)
            if shape != value.shape:
                value.shape = shape
                changed.add(value)


def _named(shape: ir.Shape, before: ir.Shape | None) -> ir.Shape:
    """The shape, with the names that lengths had before where it has none for them."""
    if before is None or before.rank() != shape.rank():
        return shape
    return ir.Shape(
        [
            new if isinstance(new, int) or new.value is not None else old
            for new, old in zip(shape, before, strict=True)
        ]
    )


def _is_fixed(value: ir.Value) -> bool:
    return value.shape is not None and value.shape.is_static()


def _numbers(node: ir.Node) -> dict[str, npt.NDArray[np.int64]]:
    """Operands by name that lay down the node's shape, and are computed from known shapes."""
    found = {}
    for place in SHAPING.get(node.op_type, ()):
        value = node.inputs[place] if place < len(node.inputs) else None
        if value is not None and value.name and stored(value) is None:
            array = known(value)
            if array is not None:
                found[value.name] = array.astype(np.int64)
    return found


def _inferred(
    node: ir.Node, numbers: dict[str, npt.NDArray[np.int64]], model: ir.Model
) -> Iterator[tuple[ir.Value, ir.Shape]]:
    """The outputs of a node with the shapes that onnx infers from its inputs' shapes."""
    version = model.opset_imports[""]
    operands = {value.name: value for value in node.inputs if value is not None and value.name}
    if any(value.type is None for value in operands.values()):
        return
    types = {name: ir.to_proto(value).type for name, value in operands.items()}
    numbers = numbers | {
        name: tensor.numpy()
        for name, tensor in ((name, stored(value)) for name, value in operands.items())
        if tensor is not None and tensor.size <= LARGEST
    }
    try:
        inferred = infer_node_outputs(
            onnx.defs.get_schema(node.op_type, version),
            ir.to_proto(node),
            types,
            {name: onnx.numpy_helper.from_array(array, name) for name, array in numbers.items()},
            opset_imports=[onnx.helper.make_opsetid("", version)],
            ir_version=model.ir_version,
        )
    except (onnx.defs.SchemaError, onnx.shape_inference.InferenceError):
        return  # then the shapes stay unknown, as they were
    for value in node.outputs:
        kind = inferred.get(value.name or "")
        if kind is not None and kind.tensor_type.HasField("shape"):
            yield value, ir.Shape([_size(axis) for axis in kind.tensor_type.shape.dim])


def _size(axis: onnx.TensorShapeProto.Dimension) -> int | str | None:
    return axis.dim_value if axis.HasField("dim_value") else axis.dim_param or None


@contextmanager
def _stand_ins(graph: ir.Graph) -> Iterator[None]:
    stood_in = []
    for node in graph:
        stand_in = STAND_INS.get(node.op_type)
        if stand_in is not None and node.domain in ("", MICROSOFT):
            stood_in.append((node, node.domain, node.op_type, list(node.inputs)))
            node.domain, node.op_type = "", stand_in
            if stand_in == "Identity":
                node.resize_inputs(1)
    try:
        yield
    finally:
        for node, domain, name, inputs in stood_in:
            node.domain, node.op_type = domain, name
            node.resize_inputs(len(inputs))
            for place, value in enumerate(inputs):
                node.replace_input_with(place, value)
