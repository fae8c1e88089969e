"""How operators of torch (aten) are said in the vocabulary."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from ..dyt import DOMAIN, FORMS
from ..terms import Alias, Op, Said, moved_units
from .contractions import einsum, row_by_column, row_sum
from .fx_constants import Arguments, arguments, filled

__all__ = ["say"]


def say(node: torch.fx.Node) -> Said | Alias | None:
    """The node in the vocabulary, None where it has no place there."""
    if node.target is operator.getitem:
        return _item(node)
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return None
    namespace, _, name = target._schema.name.partition("::")
    given = arguments(node, target)
    if namespace == DOMAIN and name in FORMS:
        form = FORMS[name]
        operands = tuple(given[p] for p in ("x", *form.parameters))
        return Said(Op.DYT, operands, {"form": form})
    known = namespace in ("aten", "prims")
    # Dynamo's graphs write in place; what reads the tensor then reads the node that wrote.
    saying = _SAYINGS.get(name) or _SAYINGS.get(name.removesuffix("_")) if known else None
    return None if saying is None else saying(given, node)


Saying = Callable[[Arguments, torch.fx.Node], "Said | Alias | None"]


def _unary(op: Op) -> Saying:
    return lambda a, node: Said(op, (a["self"],))


def _binary(op: Op) -> Saying:
    def saying(a: Arguments, node: torch.fx.Node) -> Said | None:
        if a.get("rounding_mode") is not None:
            return None
        return Said(op, (a["self"], _times(a["other"], a.get("alpha", 1))))

    return saying


def _times(operand: Any, factor: Any) -> Any:
    return operand if factor == 1 else Said(Op.MUL, (operand, factor))


def _reversed_difference(a: Arguments, node: torch.fx.Node) -> Said:
    return Said(Op.SUB, (a["other"], _times(a["self"], a["alpha"])))


def _with_term(op: Op) -> Saying:
    """self + value * (tensor1 op tensor2)."""

    def saying(a: Arguments, node: torch.fx.Node) -> Said:
        term = _times(Said(op, (a["tensor1"], a["tensor2"])), a["value"])
        return Said(Op.ADD, (a["self"], term))

    return saying


def _squared_error(a: Arguments, node: torch.fx.Node) -> Said | None:
    """The squares of a difference; `reduction` 0 leaves them as they are."""
    difference = Said(Op.SUB, (a["self"], a["target"]))
    return Said(Op.SQUARE, (difference,)) if a["reduction"] == 0 else None


def _hypotenuse(a: Arguments, node: torch.fx.Node) -> Said:
    squares = tuple(Said(Op.SQUARE, (a[name],)) for name in ("self", "other"))
    return Said(Op.SQRT, (Said(Op.ADD, squares),))


def _einsum(a: Arguments, node: torch.fx.Node) -> Said | None:
    return einsum(a["equation"], a["tensors"])


def _dot(a: Arguments, node: torch.fx.Node) -> Said:
    product = Said(Op.MUL, (a["x"], a["y"]))
    return Said(Op.SUM, (product,), {"axes": (a["dim"],), "keepdims": False})


def _group_norm(a: Arguments, node: torch.fx.Node) -> Said:
    """A LayerNorm where one group has all channels, and the channels are all that there is."""
    x = a["input"]
    groups = a.get("num_groups", a.get("group"))
    if groups == 1 and len(_shape(x) or ()) == 2:
        operands = (x, a.get("weight"), a.get("bias"))
        return Said(Op.LAYER_NORM, operands, {"axes": (-1,), "eps": float(a["eps"])})
    return Said(Op.GROUP_NORM, (x,))


def _reduction(op: Op) -> Saying:
    def saying(a: Arguments, node: torch.fx.Node) -> Said | None:
        return Said(op, (a["self"],), _over(a)) if _over(a)["axes"] else None

    return saying


def _over(a: Arguments) -> dict[str, Any]:
    """Attributes of a reduction; without axes it runs over all."""
    axes = a.get("dim")
    axes = (axes,) if isinstance(axes, int) else tuple(axes or ())
    axes = axes or tuple(range(-len(_shape(a["self"]) or ()), 0))
    return {"axes": axes, "keepdims": bool(a.get("keepdim", False))}


def _variance(a: Arguments, node: torch.fx.Node) -> Said | None:
    if not _over(a)["axes"]:
        return None
    return Said(Op.VARIANCE, (a["self"],), {**_over(a), "correction": _correction(a)})


def _deviation(a: Arguments, node: torch.fx.Node) -> Said | None:
    variance = _variance(a, node)
    return None if variance is None else replace(variance, op=Op.DEVIATION)


def _reshape(a: Arguments, node: torch.fx.Node) -> Said | Alias | None:
    before, after = _shape(a["self"]), _shape(node)
    if before is None or after is None:
        return None
    sources = moved_units(before, after)
    if sources is None:
        return Said(Op.VIEW, (a["self"],), {"shape": after})
    if before == after and len(node.all_input_nodes) == 1:
        return Alias(a["self"])  # where it reads lengths, a cut must know of them
    return Said(Op.RESHAPE, (a["self"],), {"sources": sources})


def _transpose(a: Arguments, node: torch.fx.Node) -> Said | Alias | None:
    shape = _shape(node)
    if shape is None:
        return None
    order = [axis % len(shape) for axis in a.get("dims", range(len(shape)))]
    if "dims" not in a and order:
        first, second = a.get("dim0", 0), a.get("dim1", -1)
        order[first], order[second] = order[second], order[first]
    if order == sorted(order):
        return Alias(a["self"])
    return Said(Op.TRANSPOSE, (a["self"],), {"order": tuple(order)})


def _slice(a: Arguments, node: torch.fx.Node) -> Said:
    bounds = (a["start"], a["end"], a["step"])
    known = all(bound is None or isinstance(bound, int) for bound in bounds)
    return Said(Op.SLICE, (a["self"],), {"slices": {a["dim"]: slice(*bounds) if known else None}})


def _flip(a: Arguments, node: torch.fx.Node) -> Said:
    slices = {axis: slice(None, None, -1) for axis in a["dims"]}
    return Said(Op.SLICE, (a["self"],), {"slices": slices})


def _roll(a: Arguments, node: torch.fx.Node) -> Said | None:
    return Said(Op.ROLL, (a["self"],), {"axes": tuple(a["dims"])}) if a["dims"] else None


def _select(a: Arguments, node: torch.fx.Node) -> Said:
    place = a["index"] if isinstance(a["index"], (int, torch.fx.Node)) else None
    return Said(Op.GATHER, (a["self"], place), {"axis": a["dim"], "consumed": 1})


def _index(a: Arguments, node: torch.fx.Node) -> Said | None:
    """x[:, indices]: one tensor of places, or a mask over several axes."""
    given = [(axis, index) for axis, index in enumerate(a["indices"]) if index is not None]
    if len(given) != 1:
        return None
    ((axis, index),) = given
    mask = _dtype(index) in (torch.bool, torch.uint8)
    consumed = len(_shape(index) or ()) if mask else 1
    return Said(Op.GATHER, (a["self"], index), {"axis": axis, "consumed": consumed})


def _concat(a: Arguments, node: torch.fx.Node) -> Said:
    return Said(Op.CONCAT, tuple(a["tensors"]), {"axis": a["dim"]})


def _pad(a: Arguments, node: torch.fx.Node) -> Said | None:
    if a.get("mode", "constant") != "constant" or a.get("value") not in (None, 0):
        return None
    pairs = [a["pad"][place : place + 2] for place in range(0, len(a["pad"]), 2)]
    axes = tuple(-1 - place for place, pair in enumerate(pairs) if any(x != 0 for x in pair))
    return Said(Op.PAD, (a["self"],), {"axes": axes})


def _linear(a: Arguments, node: torch.fx.Node) -> Said:
    number = filled(a["weight"])
    if number is not None and a.get("bias") is None:
        return row_sum(a["input"], number)
    return Said(Op.MATMUL, (a["input"], a["weight"], a.get("bias")), {"transposed": True})


def _matmul(a: Arguments, node: torch.fx.Node) -> Said:
    other = a["other"] if "other" in a else a["mat2"]
    dots = row_by_column(a["self"], other, _shape(a["self"]), _shape(other))
    if dots is not None:
        return dots
    number = filled(other)
    if number is not None and len(_shape(other) or ()) == 2:
        return row_sum(a["self"], number)
    return Said(Op.MATMUL, (a["self"], other, None), {"transposed": False})


def _addmm(a: Arguments, node: torch.fx.Node) -> Said | None:
    if a.get("alpha", 1) != 1 or a.get("beta", 1) != 1:
        return None
    return Said(Op.MATMUL, (a["mat1"], a["mat2"], a["self"]), {"transposed": False})


def _convolution(a: Arguments, node: torch.fx.Node) -> Said | None:
    if a.get("transposed", False):
        return None
    padding = a["padding"]
    padded = padding == "same" if isinstance(padding, str) else any(x != 0 for x in padding)
    operands = (a["input"], a["weight"], a.get("bias"))
    return Said(Op.CONVOLUTION, operands, {"groups": a["groups"], "padded": padded})


def _average_pooled(a: Arguments, node: torch.fx.Node) -> Said | None:
    """Pooling over all of an axis, and over one place of each other, is the mean over it."""
    before, after, sizes = _shape(a["self"]), _shape(node), a["kernel_size"]
    if before is None or after is None or a.get("divisor_override") is not None:
        return None
    whole = tuple(axis for axis in range(-len(sizes), 0) if sizes[axis] != 1)
    pooled = all(sizes[axis] == before[axis] and after[axis] == 1 for axis in whole)
    padded = any(a["padding"]) if isinstance(a["padding"], (list, tuple)) else a["padding"] != 0
    if not whole or not pooled or padded or len(before) != len(after):
        return None
    if any(before[axis] != after[axis] for axis in range(-len(sizes), 0) if axis not in whole):
        return None
    return Said(Op.MEAN, (a["self"],), {"axes": whole, "keepdims": True})


def _pooled(a: Arguments, node: torch.fx.Node) -> Said | None:
    """Adaptive pooling to one place is the mean over space."""
    if any(size != 1 for size in a["output_size"]):
        return None
    axes = tuple(range(-len(a["output_size"]), 0))
    return Said(Op.MEAN, (a["self"],), {"axes": axes, "keepdims": True})


def _parts(a: Arguments, node: torch.fx.Node) -> Said:
    return Said(Op.PARTS, (a["self"] if "self" in a else a["input"],))


def _part(a: Arguments, place: int, source: torch.fx.Node) -> Said:
    """One result of a split: a slice of what was split."""
    axis = a["dim"]
    sizes = [part.shape[axis] for part in source.meta.get("val", ())][: place + 1]
    known = len(sizes) == place + 1 and all(isinstance(size, int) for size in sizes)
    piece = slice(sum(sizes[:place]), sum(sizes)) if known else None
    return Said(Op.SLICE, (a["self"],), {"slices": {axis: piece}})


def _unbound(a: Arguments, place: int, source: torch.fx.Node) -> Said:
    return Said(Op.GATHER, (a["self"], place), {"axis": a["dim"], "consumed": 1})


_SPLITS: dict[str, Callable[[Arguments, int, torch.fx.Node], Said]] = {
    "split": _part,
    "split_with_sizes": _part,
    "chunk": _part,
    "unbind": _unbound,
}
"""Operators whose results are parts of their operand."""


def _shape(node: Any) -> tuple[int | None, ...] | None:
    value = node.meta.get("val") if isinstance(node, torch.fx.Node) else None
    if not isinstance(value, torch.Tensor):
        return None
    sizes: tuple[Any, ...] = tuple(value.shape)
    return tuple(size if isinstance(size, int) else None for size in sizes)


def _repeat_each(a: Arguments, node: torch.fx.Node) -> Said | None:
    """An expansion where an axis of length 1 is repeated."""
    shape, axis = _shape(a["self"]), a.get("dim")
    grown = shape is not None and axis is not None and shape[axis] == 1
    return Said(Op.EXPAND, (a["self"],)) if grown else None


def _repeat(a: Arguments, node: torch.fx.Node) -> Said | None:
    """An expansion where only axes of length 1 are repeated."""
    before, repeats = _shape(a["self"]), a.get("repeats") or a["dims"]
    if before is None or len(before) != len(repeats):
        return None
    grown = all(count == 1 or size == 1 for size, count in zip(before, repeats, strict=True))
    return Said(Op.EXPAND, (a["self"],)) if grown else None


def _correction(a: Arguments) -> float:
    if "unbiased" in a:
        return 1.0 if a["unbiased"] else 0.0
    return 1.0 if a.get("correction") is None else float(a["correction"])


def _length(a: Arguments, node: torch.fx.Node) -> Said | None:
    order = a.get("ord", a.get("p", 2))
    if (2 if order is None else order) != 2 or not _over(a)["axes"]:
        return None
    return Said(Op.LENGTH, (a["self"],), _over(a))


def _power(a: Arguments, node: torch.fx.Node) -> Said:
    exponent = a["exponent"]
    if exponent == 2:
        return Said(Op.SQUARE, (a["self"],))
    if exponent == 0.5:
        return Said(Op.SQRT, (a["self"],))
    if exponent == -0.5:
        return Said(Op.RSQRT, (a["self"],))
    if exponent == -1:
        return Said(Op.RECIPROCAL, (a["self"],))
    return Said(Op.POW, (a["self"], exponent))


def _clamp_min(a: Arguments, node: torch.fx.Node) -> Said | None:
    if a.get("max") is not None or a.get("min") is None:
        return None
    return Said(Op.MAXIMUM, (a["self"], a["min"]))


def _cast(a: Arguments, node: torch.fx.Node) -> Said | Alias:
    source = a.get("self", a.get("a"))
    if _dtype(source) is not None and _dtype(source) == _dtype(node):
        return Alias(source)
    return Said(Op.CAST, (source,))


def _dtype(node: Any) -> torch.dtype | None:
    value = node.meta.get("val") if isinstance(node, torch.fx.Node) else None
    return value.dtype if isinstance(value, torch.Tensor) else None


def _alias(a: Arguments, node: torch.fx.Node) -> Alias:
    return Alias(a["self"] if "self" in a else a["input"])


def _dropout(a: Arguments, node: torch.fx.Node) -> Alias | None:
    return Alias(a["input"]) if not a["train"] or a["p"] == 0 else None


def _layer_norm(a: Arguments, node: torch.fx.Node) -> Said:
    axes = tuple(range(-len(a["normalized_shape"]), 0))
    operands = (a["input"], a.get("weight"), a.get("bias"))
    return Said(Op.LAYER_NORM, operands, {"axes": axes, "eps": float(a["eps"])})


def _rms_norm(a: Arguments, node: torch.fx.Node) -> Said:
    axes = tuple(range(-len(a["normalized_shape"]), 0))
    # The default is the eps of the dtype that torch computes in, which is float32 at least.
    wide = torch.promote_types(_dtype(a["input"]) or torch.float32, torch.float32)
    eps = torch.finfo(wide).eps if a.get("eps") is None else float(a["eps"])
    return Said(Op.RMS_NORM, (a["input"], a.get("weight")), {"axes": axes, "eps": eps})


def _refused(op: Op) -> Saying:
    return lambda a, node: Said(op, (a.get("input", a.get("self")),))


_MULTIPLE: dict[str, dict[int, Saying]] = {
    "native_layer_norm": {0: _layer_norm},
    "_fused_rms_norm": {0: _rms_norm},
    "var_mean": {0: _variance, 1: _reduction(Op.MEAN)},
    "std_mean": {0: _deviation, 1: _reduction(Op.MEAN)},
    "native_group_norm": {0: _group_norm},
    "_native_batch_norm_legit": {0: _refused(Op.BATCH_NORM)},
    "_native_batch_norm_legit_no_training": {0: _refused(Op.BATCH_NORM)},
    "_native_batch_norm_legit_functional": {0: _refused(Op.BATCH_NORM)},
    "_batch_norm_with_update": {0: _refused(Op.BATCH_NORM)},
    "_batch_norm_with_update_functional": {0: _refused(Op.BATCH_NORM)},
    "_batch_norm_no_update": {0: _refused(Op.BATCH_NORM)},
    "native_batch_norm": {0: _refused(Op.BATCH_NORM)},
    "cudnn_batch_norm": {0: _refused(Op.BATCH_NORM)},
}
"""Operators with several results, by result."""


def _item(node: torch.fx.Node) -> Said | Alias | None:
    source, place = node.args
    target = getattr(source, "target", None)
    if not isinstance(source, torch.fx.Node) or not isinstance(target, torch._ops.OpOverload):
        return None
    name = target._schema.name.partition("::")[2]
    if name == "_native_batch_norm_legit" and target._overloadname == "no_stats":
        return Said(Op.INSTANCE_NORM, (source.args[0],)) if place == 0 else None
    if name == "broadcast_tensors" and isinstance(place, int):
        return Said(Op.EXPAND, (source.all_input_nodes[place],))
    if name in _SPLITS and isinstance(place, int):
        return _SPLITS[name](arguments(source, target), place, source)
    saying = _MULTIPLE.get(name, {}).get(place) if isinstance(place, int) else None
    return None if saying is None else saying(arguments(source, target), node)


_SAYINGS: dict[str, Saying] = {
    "add": _binary(Op.ADD),
    "sub": _binary(Op.SUB),
    "subtract": _binary(Op.SUB),
    "rsub": _reversed_difference,
    "addcmul": _with_term(Op.MUL),
    "addcdiv": _with_term(Op.DIV),
    "mse_loss": _squared_error,
    "hypot": _hypotenuse,
    "einsum": _einsum,
    "mul": _binary(Op.MUL),
    "multiply": _binary(Op.MUL),
    "div": _binary(Op.DIV),
    "divide": _binary(Op.DIV),
    "true_divide": _binary(Op.DIV),
    "maximum": _binary(Op.MAXIMUM),
    "neg": _unary(Op.NEG),
    "negative": _unary(Op.NEG),
    "abs": _unary(Op.ABS),
    "absolute": _unary(Op.ABS),
    "relu": lambda a, node: Said(Op.MAXIMUM, (a["self"], 0.0)),
    "square": _unary(Op.SQUARE),
    "sqrt": _unary(Op.SQRT),
    "rsqrt": _unary(Op.RSQRT),
    "reciprocal": _unary(Op.RECIPROCAL),
    "exp": _unary(Op.EXP),
    "log": _unary(Op.LOG),
    "tanh": _unary(Op.TANH),
    "erf": _unary(Op.ERF),
    "pow": _power,
    "float_power": _power,
    "mean": _reduction(Op.MEAN),
    "sum": _reduction(Op.SUM),
    "var": _variance,
    "std": _deviation,
    "view": _reshape,
    "reshape": _reshape,
    "_unsafe_view": _reshape,
    "flatten": _reshape,
    "unflatten": _reshape,
    "squeeze": _reshape,
    "transpose": _transpose,
    "permute": _transpose,
    "t": _transpose,
    "slice": _slice,
    "flip": _flip,
    "roll": _roll,
    "select": _select,
    "index": _index,
    "cat": _concat,
    "pad": _pad,
    "constant_pad_nd": _pad,
    **dict.fromkeys((*_SPLITS, *_MULTIPLE), _parts),
    "linear": _linear,
    "matmul": _matmul,
    "mm": _matmul,
    "bmm": _matmul,
    "repeat": _repeat,
    "tile": _repeat,
    "repeat_interleave": _repeat_each,
    "linalg_vecdot": _dot,
    **dict.fromkeys(("avg_pool1d", "avg_pool2d", "avg_pool3d"), _average_pooled),
    "linalg_norm": _length,
    "addmm": _addmm,
    **dict.fromkeys(("conv1d", "conv2d", "conv3d", "convolution"), _convolution),
    **dict.fromkeys(("adaptive_avg_pool1d", "adaptive_avg_pool2d"), _pooled),
    "linalg_vector_norm": _length,
    "norm": _length,
    "clamp_min": _clamp_min,
    "clamp": _clamp_min,
    "clip": _clamp_min,
    "to": _cast,
    "_to_copy": _cast,
    "type_as": _cast,
    "convert_element_type": _cast,
    "expand": lambda a, node: Said(Op.EXPAND, (a["self"],)),
    "broadcast_to": lambda a, node: Said(Op.EXPAND, (a["self"],)),
    "expand_as": lambda a, node: Said(Op.EXPAND, (a["self"],)),
    "unsqueeze": lambda a, node: Said(Op.UNSQUEEZE, (a["self"],), {"axes": (a["dim"],)}),
    "alias": _alias,
    "clone": _alias,
    "contiguous": _alias,
    "detach": _alias,
    "detach_": _alias,
    "lift_fresh_copy": _alias,
    "dropout": _dropout,
    "layer_norm": _layer_norm,
    "rms_norm": _rms_norm,
    "batch_norm": _refused(Op.BATCH_NORM),
    "group_norm": _group_norm,
    "instance_norm": _refused(Op.INSTANCE_NORM),
}
