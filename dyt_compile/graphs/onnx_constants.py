"""Small numbers in ONNX models, known without running them: literals, axes, lengths of axes.

Exporters write a length or an axis as a chain of nodes (Shape, Gather, Unsqueeze, Concat) where
torch had an integer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from ..weights import SMALL_BYTES

__all__ = [
    "LARGEST",
    "held",
    "integers",
    "is_parameter",
    "known",
    "known_shape",
    "scalar",
    "stored",
]

Array = npt.NDArray[np.float64]

LARGEST = 64
"""Elements; larger tensors are weights, which stay in their files."""

CAST = {"FLOAT", "FLOAT16", "BFLOAT16", "DOUBLE"}
"""Types between which NumPy casts as ONNX does: to the nearest number, ties to even."""

STEPS = 64
"""Values that are looked at for one number; a Pad takes thirty in torch's older exporter."""


def stored(value: ir.Value | None) -> ir.TensorProtocol | None:
    """The tensor that an initializer or a Constant node holds, not loaded yet."""
    if value is None:
        return None
    tensor, producer = value.const_value, value.producer()
    if tensor is None:
        if (
            producer is None
            or producer.op_type != "Constant"
            or "sparse_value" in producer.attributes
        ):
            return None
        inside = producer.attributes.get("value")
        if inside is not None and inside.type is ir.AttributeType.TENSOR and not inside.is_ref():
            tensor = inside.value  # `as_tensor` asks a protocol each time: as long as a match takes
        else:
            tensor = ir.convenience.get_const_tensor(value)
    return None if tensor is None or tensor.dtype is ir.DataType.STRING else tensor


def held(value: ir.Value) -> npt.NDArray[Any] | None:
    """What a constant holds, behind casts between types of floating-point numbers, too.

    None where more than that computes it.
    """
    tensor, node = stored(value), value.producer()
    if tensor is not None:
        return _numbers(tensor)
    if node is None or node.domain != "" or node.op_type not in ("Cast", "Identity"):
        return None
    source = None if node.inputs[0] is None else held(node.inputs[0])
    if source is None or node.op_type == "Identity":
        return source
    dtype = ir.DataType(node.attributes.get_int("to", 0))
    return source.astype(dtype.numpy()) if {_cast_name(source.dtype), dtype.name} <= CAST else None


def _numbers(tensor: ir.TensorProtocol) -> npt.NDArray[Any]:
    """What a tensor holds. A small one is read: onnx_ir maps all of its file, and keeps that."""
    small = tensor.nbytes < SMALL_BYTES and tensor.dtype.bitwidth >= 8
    if not isinstance(tensor, ir.ExternalTensor) or not small:
        return np.asarray(tensor.numpy())
    raw = np.fromfile(tensor.path, np.uint8, tensor.nbytes, offset=tensor.offset or 0)
    return raw.view(tensor.dtype.numpy()).reshape(tensor.shape.numpy())


def _cast_name(dtype: np.dtype[Any]) -> str:
    return ir.DataType.from_numpy(dtype).name


def is_parameter(value: ir.Value) -> bool:
    """Whether a constant's name is the path of a parameter, and not of the node that made it."""
    name = str(value.name)
    return "." in name and "/" not in name


def scalar(value: ir.Value | None) -> float | None:
    """The number that a value of one element always holds, None for everything else."""
    array = known(value)
    return float(array.reshape(())) if array is not None and array.size == 1 else None


def integers(node: ir.Node, name: str, place: int) -> tuple[int, ...] | None:
    """Axes from an attribute (older opsets) or from an input; None where unknown."""
    if name in node.attributes:
        attribute = node.attributes[name]
        if attribute.type is ir.AttributeType.INT:
            return (attribute.as_int(),)
        return tuple(attribute.as_ints())
    array = known(node.inputs[place]) if len(node.inputs) > place else None
    return None if array is None else tuple(int(axis) for axis in array.ravel())


def known(value: ir.Value | None) -> Array | None:
    """What a small value always holds, None where that is not known."""
    array = _partly_known(value, {})
    return None if array is None or np.isnan(array).any() else array


def known_shape(value: ir.Value | None) -> tuple[int | None, ...] | None:
    """The shape that a value of one axis holds, None for lengths that are not known."""
    array = _partly_known(value, {})
    if array is None or array.ndim != 1:
        return None
    return tuple(None if np.isnan(size) else int(size) for size in array)


def _partly_known(value: ir.Value | None, seen: dict[ir.Value, Array | None]) -> Array | None:
    """The value's elements; NaN stands for those that are not known. seen: what others hold."""
    if value is None:
        return None
    if value not in seen:
        if len(seen) == STEPS:
            return None
        seen[value] = None
        seen[value] = _computed(value, seen)
    return seen[value]


def _computed(value: ir.Value, seen: dict[ir.Value, Array | None]) -> Array | None:
    tensor = stored(value)
    if tensor is not None:
        return tensor.numpy().astype(np.float64) if tensor.size <= LARGEST else None
    node = value.producer()
    if node is None or node.domain != "":
        return None
    if node.op_type in ("Shape", "Size"):
        return _lengths(node)
    computing = _COMPUTED.get(node.op_type)
    if computing is None:
        return None
    operands: list[Array] = []
    for operand in node.inputs:
        array = _partly_known(operand, seen)
        if array is None:
            return None
        operands.append(array)
    try:
        with np.errstate(all="ignore"):
            result = np.asarray(computing(node, *operands), np.float64)
    except (IndexError, ValueError):  # NumPy's, for shapes and places that do not fit
        return None
    return result if result.size <= LARGEST else None


def _lengths(node: ir.Node) -> Array | None:
    source = node.inputs[0]
    if source is None or source.shape is None:
        return None
    sizes = np.array([size if isinstance(size, int) else np.nan for size in source.shape])
    if node.op_type == "Size":
        return np.asarray(sizes.prod())
    end = node.attributes.get_int("end", len(sizes))
    return sizes[node.attributes.get_int("start", 0) : end]


def _cast(node: ir.Node, x: Array, *_: Array) -> Array:
    wanted = node.attributes.get("to")
    whole = wanted is not None and ir.DataType(wanted.as_int()).is_integer()
    return np.trunc(x) if whole else x


def _divide(node: ir.Node, x: Array, y: Array) -> Array:
    dtypes = [value.dtype for value in node.inputs if value is not None]
    whole = any(dtype is not None and dtype.is_integer() for dtype in dtypes)
    return np.asarray(np.floor_divide(x, y) if whole else x / y)


def _gather(node: ir.Node, x: Array, places: Array) -> Array:
    return np.take(x, places.astype(int), axis=node.attributes.get_int("axis", 0))


def _slice(node: ir.Node, x: Array, starts: Array, ends: Array, *rest: Array) -> Array:
    axes = rest[0] if rest else np.arange(starts.size)
    steps = rest[1] if len(rest) > 1 else np.ones(starts.size)
    cut = [slice(None)] * x.ndim
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        cut[int(axis)] = slice(int(start), int(end), int(step))
    return x[tuple(cut)]


def _transpose(node: ir.Node, x: Array) -> Array:
    order = node.attributes.get("perm")
    return np.transpose(x, None if order is None else order.as_ints())


def _compared(function: Callable[..., Any]) -> Callable[..., Any]:
    """A comparison; it stays unknown where an operand is."""
    return lambda node, x, y: np.where(np.isnan(x + y), np.nan, function(x, y))


def _where(node: ir.Node, condition: Array, x: Array, y: Array) -> Array:
    return np.where(np.isnan(condition), np.nan, np.where(condition == 1, x, y))


def _filled(node: ir.Node, shape: Array) -> Array:
    value = node.attributes.get("value")
    filling = 0.0 if value is None else value.as_tensor().numpy().item()
    if shape.size and shape.prod() > LARGEST:
        raise ValueError("larger than what is followed")
    return np.full(shape.astype(int), filling)


def _plain(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda node, *operands: function(*operands)


_COMPUTED: dict[str, Callable[..., Any]] = {
    "Add": _plain(np.add),
    "Sub": _plain(np.subtract),
    "Mul": _plain(np.multiply),
    "Div": _divide,
    "Neg": _plain(np.negative),
    "Pow": _plain(np.power),
    "Sqrt": _plain(np.sqrt),
    "Reciprocal": _plain(np.reciprocal),
    "ReduceProd": _plain(lambda x, *axes: x.prod(keepdims=True) if x.ndim == 1 else x),
    "Ceil": _plain(np.ceil),
    "Floor": _plain(np.floor),
    "Round": _plain(np.rint),
    "Identity": _plain(lambda x: x),
    "Mod": lambda node, x, y: (np.fmod if node.attributes.get_int("fmod", 0) else np.mod)(x, y),
    "Min": _plain(lambda *x: np.minimum.reduce(x)),
    "Max": _plain(lambda *x: np.maximum.reduce(x)),
    "Equal": _compared(np.equal),
    "Less": _compared(np.less),
    "Greater": _compared(np.greater),
    "Where": _where,
    "ConstantOfShape": _filled,
    "Cast": _cast,
    "CastLike": _plain(lambda x, like: x),
    "Gather": _gather,
    "Slice": _slice,
    "Transpose": _transpose,
    "Concat": lambda node, *parts: np.concatenate(parts, node.attributes.get_int("axis", 0)),
    "Squeeze": _plain(lambda x, *axes: x.reshape(()) if x.size == 1 else np.squeeze(x)),
    "Unsqueeze": _plain(lambda x, *axes: x.reshape([1] * (x.ndim + 1)) if x.size == 1 else x[None]),
    "Reshape": _plain(lambda x, shape: x.reshape(shape.astype(int))),
}
