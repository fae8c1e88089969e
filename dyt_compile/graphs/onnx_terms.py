"""How operators of ONNX are said in the vocabulary."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

import onnx_ir as ir

from ..dyt import DOMAIN, FORMS
from ..terms import Alias, Op, Said, moved_units
from .contractions import einsum, row_by_column, row_sum
from .onnx_constants import integers, is_parameter, known_shape, scalar, stored

__all__ = ["filled", "say"]

MICROSOFT = "com.microsoft"

LARGEST = 1 << 22
"""Elements; larger tensors are weights, which stay in their files."""

MOST_AXES = 64
"""Of an array of NumPy."""

QUANTIZED = "it is fused with the quantization of its input"
IN_ATTENTION = "the norms of queries and keys are fused into the attention behind them"
STATISTICS_READ = "its mean or its inverse deviation is read by another part of the model, too"


Saying = Callable[[ir.Node], "Said | Alias | None"]


def say(node: ir.Node, place: int = 0) -> Said | Alias | None:
    """One output of the node in the vocabulary, None where it has no place there."""
    if node.op_type == "Split" and node.domain == "":
        return _part(node, place)
    if place > 0:
        return None
    if node.domain == DOMAIN and node.op_type in FORMS:
        return Said(Op.DYT, tuple(node.inputs), {"form": FORMS[node.op_type]})
    sayings = {"": _SAYINGS, "ai.onnx": _SAYINGS, MICROSOFT: _MICROSOFTS}.get(node.domain, {})
    saying = sayings.get(node.op_type)
    return None if saying is None else saying(node)


def _first(node: ir.Node) -> ir.Value:
    value = node.inputs[0]
    if value is None:
        raise ValueError(f"node {node.name!r} has no first input")
    return value


def _same(op: Op) -> Saying:
    return lambda node: Said(op, tuple(node.inputs))


def _alias(node: ir.Node) -> Alias:
    return Alias(_first(node))


def _dropout(node: ir.Node) -> Alias | None:
    training = node.inputs[2] if len(node.inputs) > 2 else None
    return Alias(_first(node)) if training is None or scalar(training) == 0 else None


def _cast(node: ir.Node) -> Said | Alias:
    source = _first(node)
    wanted = node.attributes["to"].as_int()
    if source.dtype is not None and source.dtype.value == wanted:
        return Alias(source)
    return Said(Op.CAST, (source,))


def _cast_like(node: ir.Node) -> Said | Alias:
    source, like = node.inputs
    if source is not None and like is not None and source.dtype is like.dtype is not None:
        return Alias(source)
    return Said(Op.CAST, (source,))


def _power(node: ir.Node) -> Said:
    exponent = scalar(node.inputs[1])
    direct = {2.0: Op.SQUARE, 0.5: Op.SQRT, -0.5: Op.RSQRT}.get(exponent or 0.0)
    if direct is not None:
        return Said(direct, (_first(node),))
    return Said(Op.POW, (_first(node), node.inputs[1] if exponent is None else exponent))


def _reduction(op: Op) -> Saying:
    def saying(node: ir.Node) -> Said | None:
        attributes = _reduced(node)
        return None if attributes is None else Said(op, (_first(node),), attributes)

    return saying


def _reduced(node: ir.Node) -> dict[str, object] | None:
    """Attributes of a reduction; None where its axes are not known, and where it has none."""
    axes = integers(node, "axes", 1)
    keep = node.attributes.get_int("keepdims", 1)
    return {"axes": axes, "keepdims": bool(keep)} if axes else None


def _sum_of_squares(node: ir.Node) -> Said | None:
    attributes = _reduced(node)
    squares = Said(Op.SQUARE, (_first(node),))
    return None if attributes is None else Said(Op.SUM, (squares,), attributes)


def _sum(node: ir.Node) -> Said | Alias:
    """An Add of any number of operands."""
    first, *others = node.inputs
    said: Said | Alias = Alias(first)
    for place, other in enumerate(others):
        said = Said(Op.ADD, (said if place else first, other))
    return said


def _over_length(node: ir.Node) -> Said | None:
    """x / |x|, or x / sum(|x|)."""
    x = _first(node)
    attributes = {"axes": (node.attributes.get_int("axis", -1),), "keepdims": True}
    if node.attributes.get_int("p", 2) == 2:
        return Said(Op.DIV, (x, Said(Op.LENGTH, (x,), attributes)))
    return Said(Op.DIV, (x, Said(Op.SUM, (Said(Op.ABS, (x,)),), attributes)))


def _mean_variance(node: ir.Node) -> Said:
    """(x - mean) / (deviation + 1e-9): a LayerNorm without eps, whatever the axes."""
    axes = integers(node, "axes", 1) or (0, 2, 3)
    return Said(Op.LAYER_NORM, (_first(node), None), {"axes": axes, "eps": 0.0})


def _axes(op: Op) -> Saying:
    def saying(node: ir.Node) -> Said | None:
        axes = integers(node, "axes", 1)
        return Said(op, (_first(node),), {"axes": axes}) if axes else None

    return saying


def _reshape(node: ir.Node) -> Said | Alias | None:
    source = _first(node)
    if source.shape is None or len(node.inputs) < 2:
        return None
    lengths = _Lengths()
    before = [lengths(size) for size in source.shape]
    after = _target(node, before, lengths)
    sources = None if after is None else moved_units(before, after)
    if sources is None:
        return _view(node, after)
    if before == after and stored(node.inputs[1]) is not None:
        return Alias(source)  # where it reads lengths, a cut must know of them
    return Said(Op.RESHAPE, (source,), {"sources": sources})


def _view(node: ir.Node, lengths: Sequence[int] | None = None) -> Said:
    """Any reshaping; lengths: negative where unknown, None for those of the node's output."""
    known = None if lengths is None else tuple(n if n >= 0 else None for n in lengths)
    return Said(Op.VIEW, (_first(node),), {"shape": known or _sizes(node.outputs[0])})


class _Lengths:
    """Lengths of axes as numbers: a dynamic one as a negative number of its own.

    Two axes that are only known as dynamic are not known to be equally long.
    """

    def __init__(self) -> None:
        self._numbers: dict[object, int] = {}

    def __call__(self, size: object) -> int:
        if isinstance(size, int):
            return size
        name = getattr(size, "value", None)
        return self._numbers.setdefault(object() if name is None else name, -2 - len(self._numbers))


def _target(node: ir.Node, before: Sequence[int], lengths: _Lengths) -> list[int] | None:
    """The shape that a Reshape asks for; None where it is not known."""
    sizes = known_shape(node.inputs[1])
    if sizes is None:
        return None
    made = node.outputs[0].shape or (None,) * len(sizes)
    keeps_zero = bool(node.attributes.get_int("allowzero", 0))
    after = [
        before[place]
        if size == 0 and place < len(before) and not keeps_zero
        else lengths(made[place] if size in (None, -1) else size)
        for place, size in enumerate(sizes)
    ]
    # One unknown length is what the others leave over.
    unknown = [place for place, size in enumerate(after) if size < 0 and size not in before]
    rest = Counter(before) - Counter(after)
    del rest[1]
    if len(unknown) == 1 and rest.total() == 1:
        after[unknown[0]] = next(iter(rest.elements()))
    return after


def _transpose(node: ir.Node) -> Said | None:
    source = _first(node)
    if "perm" in node.attributes:
        return Said(Op.TRANSPOSE, (source,), {"order": tuple(node.attributes["perm"].as_ints())})
    if source.shape is None:
        return None
    return Said(Op.TRANSPOSE, (source,), {"order": tuple(reversed(range(len(source.shape))))})


def _slice(node: ir.Node) -> Said | None:
    starts, ends = integers(node, "starts", 1), integers(node, "ends", 2)
    given = len(node.inputs) > 3 and node.inputs[3] is not None
    axes = integers(node, "axes", 3) if given else tuple(range(len(starts or ())))
    stepped = len(node.inputs) > 4 and node.inputs[4] is not None
    steps = integers(node, "steps", 4) if stepped else (1,) * len(axes or ())
    if axes is None:
        return None
    slices: dict[int, slice | None] = dict.fromkeys(axes)
    if starts is not None and ends is not None and steps is not None:
        for axis, start, end, step in zip(axes, starts, ends, steps, strict=True):
            # A backward slice ends before the first element, which Python spells None.
            slices[axis] = slice(start, None if step < 0 and end < -(2**31) + 2 else end, step)
    return Said(Op.SLICE, (_first(node),), {"slices": slices})


def _part(node: ir.Node, place: int) -> Said:
    """One output of a Split: a slice of what was split."""
    axis = node.attributes.get_int("axis", 0)
    shapes = [output.shape for output in node.outputs[: place + 1]]
    sizes = [None if shape is None else shape[axis] for shape in shapes]
    known = [size for size in sizes if isinstance(size, int)]
    piece = slice(sum(known[:place]), sum(known)) if len(known) == place + 1 else None
    return Said(Op.SLICE, (_first(node),), {"slices": {axis: piece}})


def _gather(node: ir.Node) -> Said:
    index = node.inputs[1]
    tensor = None if index is None else ir.convenience.get_const_tensor(index)
    one = tensor is not None and len(tensor.shape) == 0
    operands = (_first(node), scalar(index) if one else index)
    return Said(Op.GATHER, operands, {"axis": node.attributes.get_int("axis", 0), "consumed": 1})


def _gather_nd(node: ir.Node) -> Said | None:
    index = node.inputs[1]
    consumed = None if index is None or index.shape is None else index.shape[-1]
    if node.attributes.get_int("batch_dims", 0) != 0 or not isinstance(consumed, int):
        return None
    return Said(Op.GATHER, (_first(node), index), {"axis": 0, "consumed": consumed})


def _concat(node: ir.Node) -> Said:
    return Said(Op.CONCAT, tuple(node.inputs), {"axis": node.attributes["axis"].as_int()})


def _pad(node: ir.Node) -> Said | None:
    pads, rank = integers(node, "pads", 1), _first(node).shape
    value = node.inputs[2] if len(node.inputs) > 2 else None
    if node.attributes.get_string("mode", "constant") != "constant":
        return None
    if pads is None or rank is None or (value is not None and scalar(value) != 0):
        return None
    given = len(node.inputs) > 3 and node.inputs[3] is not None
    axes = integers(node, "axes", 3) if given else tuple(range(len(rank)))
    if axes is None:
        return None
    padded = tuple(
        axis for axis, *pair in zip(axes, pads, pads[len(axes) :], strict=False) if any(pair)
    )
    return Said(Op.PAD, (_first(node),), {"axes": padded})


def _matmul(node: ir.Node) -> Said:
    left, right = node.inputs
    dots = row_by_column(left, right, _sizes(left), _sizes(right))
    if dots is not None:
        return dots
    number = _everywhere(right) if _may_sum(_sizes(right)) else None
    if number is not None:
        return row_sum(left, number)
    return Said(Op.MATMUL, (*node.inputs, None), {"transposed": False})


def _sizes(value: ir.Value | None) -> tuple[int | None, ...] | None:
    if value is None or value.shape is None:
        return None
    return tuple(size if isinstance(size, int) else None for size in value.shape)


def _may_sum(shape: tuple[int | None, ...] | None) -> bool:
    """Whether a product with a matrix may be the sum of each row, once or for all of its places.

    To look into every weight takes as long as all the rest.
    """
    return shape is not None and len(shape) == 2 and shape[1] in (1, shape[0])


def _everywhere(value: ir.Value | None) -> float | None:
    """The number that a constant holds everywhere, None where it holds several, or is learned."""
    tensor = stored(value)
    if value is None or tensor is None or is_parameter(value) or not 1 < tensor.size <= LARGEST:
        return None
    array = tensor.numpy().ravel()
    return float(array[0]) if bool((array == array[0]).all()) else None


def _einsum(node: ir.Node) -> Said | None:
    return einsum(node.attributes["equation"].as_string(), node.inputs)


def _tile(node: ir.Node) -> Said | None:
    """An expansion where only axes of length 1 are repeated."""
    before, repeats = _sizes(_first(node)), known_shape(node.inputs[1])
    if before is None or repeats is None or len(before) != len(repeats):
        return None
    grown = all(1 in pair for pair in zip(before, repeats, strict=True))
    return Said(Op.EXPAND, (_first(node),)) if grown else None


def _gemm(node: ir.Node) -> Said | None:
    read = node.attributes
    if read.get_int("transA", 0) or read.get_float("alpha", 1.0) != 1.0:
        return None
    if read.get_float("beta", 1.0) != 1.0:
        return None
    operands = (*node.inputs, None)[:3]
    return Said(Op.MATMUL, operands, {"transposed": bool(read.get_int("transB", 0))})


def _convolution(node: ir.Node) -> Said:
    read = node.attributes
    automatic = read.get_string("auto_pad", "NOTSET")
    pads = read["pads"].as_ints() if "pads" in read else ()
    padded = any(pads) if automatic == "NOTSET" else automatic != "VALID"
    operands = (*node.inputs, None)[:3]
    return Said(Op.CONVOLUTION, operands, {"groups": read.get_int("group", 1), "padded": padded})


def _average_pooled(node: ir.Node) -> Said | None:
    """Pooling over all of an axis, and over one place of each other, is the mean over it."""
    before, after = _sizes(_first(node)), _sizes(node.outputs[0])
    sizes, steps = node.attributes["kernel_shape"].as_ints(), node.attributes.get("strides")
    whole = tuple(axis for axis in range(-len(sizes), 0) if sizes[axis] != 1)
    others = [axis for axis in range(-len(sizes), 0) if axis not in whole]
    if before is None or after is None or not whole or any(integers(node, "pads", 1) or ()):
        return None
    if any(sizes[axis] != before[axis] or after[axis] != 1 for axis in whole):
        return None
    if steps is not None and any(steps.as_ints()[axis] != 1 for axis in others):
        return None
    return Said(Op.MEAN, (_first(node),), {"axes": whole, "keepdims": True})


def _pooled(node: ir.Node) -> Said | None:
    source = _first(node)
    if source.shape is None:
        return None
    axes = tuple(range(2 - len(source.shape), 0))
    return Said(Op.MEAN, (source,), {"axes": axes, "keepdims": True})


def filled(node: ir.Node) -> float | None:
    """The number that a node fills a tensor of any shape with, None for other nodes."""
    if node.op_type == "ConstantOfShape" and node.domain == "":
        value = node.attributes.get("value")
        return 0.0 if value is None else float(value.as_tensor().numpy().ravel()[0])
    if node.op_type == "Expand" and node.domain == "":
        return scalar(node.inputs[0])
    return None


def _learned(node: ir.Node, place: int, neutral: float) -> ir.Value | None:
    """A norm's gamma or beta; None where it is what ONNX asks for and torch does not have.

    neutral: what such a tensor is filled with, ones for gamma.
    """
    value = node.inputs[place] if len(node.inputs) > place else None
    if value is None or is_parameter(value):
        return value
    producer = value.producer()
    if producer is not None and producer.op_type != "Constant":
        return None if filled(producer) == neutral else value
    return None if _all(value, neutral) else value


def _clip(node: ir.Node) -> Said | None:
    lowest = scalar(node.inputs[1]) if len(node.inputs) > 1 else None
    if lowest is None or (len(node.inputs) > 2 and node.inputs[2] is not None):
        return None
    return Said(Op.MAXIMUM, (_first(node), lowest))


def _maximum(node: ir.Node) -> Said | None:
    return Said(Op.MAXIMUM, tuple(node.inputs)) if len(node.inputs) == 2 else None


def _layer_norm(node: ir.Node) -> Said | None:
    axes = _trailing(node)
    if axes is None:
        return None
    eps = node.attributes.get_float("epsilon", 1e-5)
    operands = (_first(node), _learned(node, 1, 1.0), _learned(node, 2, 0.0))
    return Said(Op.LAYER_NORM, operands, {"axes": axes, "eps": _decimal(eps)})


def _rms_norm(node: ir.Node) -> Said | None:
    axes = _trailing(node)
    if axes is None:
        return None
    eps = node.attributes.get_float("epsilon", 1e-5)
    operands = (_first(node), _learned(node, 1, 1.0))
    return Said(Op.RMS_NORM, operands, {"axes": axes, "eps": _decimal(eps)})


def _trailing(node: ir.Node) -> tuple[int, ...] | None:
    """The axes from `axis` on, counted from the end; None where there is no such axis."""
    axis = node.attributes.get_int("axis", -1)
    shape = _first(node).shape
    if shape is None:
        return tuple(range(axis, 0)) if -MOST_AXES <= axis < 0 else None
    rank = len(shape)
    return tuple(range(axis % rank - rank, 0)) if -rank <= axis < rank else None


def _decimal(eps: float) -> float:
    """1e-06 for 9.99999997e-07: attributes are stored in float32."""
    return float(f"{eps:.6g}")


def _instance_norm(node: ir.Node) -> Said:
    """InstanceNorm; LayerNorm where the one axis of its statistics holds the channels.

    That is so where a gamma along that axis follows, where none stands before, and where the axis
    is the input's own: a GroupNorm is written with an axis into which channels and space were put
    together, and one with a channel a group (wav2vec 2.0) has its gamma along another axis.
    """
    x = _first(node)
    own = x.shape is not None and len(x.shape) == 3 and _keeps_last(x) and _scaled_along_last(node)
    if not own or not _all(node.inputs[1], 1.0) or not _all(node.inputs[2], 0.0):
        return Said(Op.INSTANCE_NORM, (x,))
    eps = node.attributes.get_float("epsilon", 1e-5)
    return Said(Op.LAYER_NORM, (x, None), {"axes": (-1,), "eps": _decimal(eps)})


def _scaled_along_last(node: ir.Node) -> bool:
    """Whether a constant along its last axis multiplies the result, or a Reshape of it."""
    following = [use.node for use in node.outputs[0].uses()]
    if len(following) == 1 and following[0].op_type == "Reshape":
        following = [use.node for use in following[0].outputs[0].uses()]
    if len(following) != 1 or following[0].op_type != "Mul":
        return False
    shapes = [tensor.shape for tensor in map(stored, following[0].inputs) if tensor is not None]
    return any(len(shape) > 0 and shape[-1] not in (0, 1) for shape in shapes)


def _keeps_last(value: ir.Value) -> bool:
    """Whether a value is no Reshape of another one, or one that leaves the last axis alone."""
    node = value.producer()
    if node is None or node.op_type != "Reshape":
        return True
    before = _first(node).shape
    if before is None or value.shape is None or not isinstance(before[-1], int):
        return False
    return before[-1] == value.shape[-1]


def _all(value: ir.Value | None, number: float) -> bool:
    """Whether a constant holds one number everywhere."""
    tensor = stored(value)
    return tensor is not None and bool((tensor.numpy() == number).all())


def _group_norm(node: ir.Node) -> Said:
    """GroupNorm; LayerNorm for one group of channels without space."""
    x = _first(node)
    groups = node.attributes.get_int("num_groups", 0)
    if groups != 1 or x.shape is None or len(x.shape) != 2:
        return Said(Op.GROUP_NORM, (x,))
    eps = node.attributes.get_float("epsilon", 1e-5)
    return Said(Op.LAYER_NORM, tuple(node.inputs), {"axes": (-1,), "eps": _decimal(eps)})


def _refused(op: Op) -> Saying:
    return lambda node: Said(op, (_first(node),))


_SAYINGS: dict[str, Saying] = {
    "Add": _same(Op.ADD),
    "Sub": _same(Op.SUB),
    "Mul": _same(Op.MUL),
    "Div": _same(Op.DIV),
    "Neg": _same(Op.NEG),
    "Abs": _same(Op.ABS),
    "Sqrt": _same(Op.SQRT),
    "Reciprocal": _same(Op.RECIPROCAL),
    "Exp": _same(Op.EXP),
    "Log": _same(Op.LOG),
    "Tanh": _same(Op.TANH),
    "Erf": _same(Op.ERF),
    "Pow": _power,
    "ReduceMean": _reduction(Op.MEAN),
    "ReduceSum": _reduction(Op.SUM),
    "ReduceL2": _reduction(Op.LENGTH),
    "ReduceSumSquare": _sum_of_squares,
    "Sum": _sum,
    "LpNormalization": _over_length,
    "MeanVarianceNormalization": _mean_variance,
    "Clip": _clip,
    "Relu": lambda node: Said(Op.MAXIMUM, (_first(node), 0.0)),
    "Max": _maximum,
    "Cast": _cast,
    "CastLike": _cast_like,
    "Identity": _alias,
    "Dropout": _dropout,
    "Expand": lambda node: Said(Op.EXPAND, (_first(node),)),
    "Reshape": _reshape,
    "Flatten": _view,
    "Transpose": _transpose,
    "Slice": _slice,
    "Gather": _gather,
    "GatherND": _gather_nd,
    "Concat": _concat,
    "Pad": _pad,
    "MatMul": _matmul,
    "Einsum": _einsum,
    "Tile": _tile,
    "AveragePool": _average_pooled,
    "Gemm": _gemm,
    "Conv": _convolution,
    "GlobalAveragePool": _pooled,
    "Unsqueeze": _axes(Op.UNSQUEEZE),
    "Squeeze": _axes(Op.SQUEEZE),
    "LayerNormalization": _layer_norm,
    "RMSNormalization": _rms_norm,
    "SimplifiedLayerNormalization": _rms_norm,
    "BatchNormalization": _refused(Op.BATCH_NORM),
    "GroupNormalization": _group_norm,
    "InstanceNormalization": _instance_norm,
}


def _fused(reason: str) -> Saying:
    return lambda node: Said(Op.FUSED_NORM, tuple(filter(None, node.inputs)), {"reason": reason})


def _attention(node: ir.Node) -> Said | Alias | None:
    """Attention that normalizes its queries and keys itself."""
    normalizes = any(value is not None for value in node.inputs[14:16])
    return _fused(IN_ATTENTION)(node) if normalizes else None


_MICROSOFTS: dict[str, Saying] = {
    "BranchwiseRMSNorm": _fused("each of its branches is normalized alone, inside one operator"),
    "GatedRMSNorm": _fused("it is fused with the gate behind it"),
    "GroupQueryAttention": _attention,
    "QEmbedLayerNormalization": _fused(QUANTIZED),
    "QOrderedLayerNormalization": _fused(QUANTIZED),
    "RMSNormRotary": _fused("it is fused with the rotary embedding behind it"),
    "SkipLayerNormalization": _fused(STATISTICS_READ),
    "SkipSimplifiedLayerNormalization": _fused(STATISTICS_READ),
    "GroupNorm": _refused(Op.GROUP_NORM),
    "SkipGroupNorm": _refused(Op.GROUP_NORM),
}
"""Operators of ONNX Runtime."""
