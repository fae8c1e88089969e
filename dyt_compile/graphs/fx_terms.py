"""How operators of torch (aten) are said in the vocabulary."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from ..dyt import DOMAIN, FORMS
from ..terms import Alias, Op, Said, moved_units

__all__ = ["say", "scalar_of"]

Arguments = dict[str, Any]


def say(node: torch.fx.Node) -> Said | Alias | None:
    """The node in the vocabulary, None where it has no place there."""
    if node.target is operator.getitem:
        return _item(node)
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return None
    namespace, _, name = target._schema.name.partition("::")
    arguments = _arguments(node, target)
    if namespace == DOMAIN and name in FORMS:
        form = FORMS[name]
        operands = tuple(arguments[p] for p in ("x", *form.parameters))
        return Said(Op.DYT, operands, {"form": form})
    saying = _SAYINGS.get(name) if namespace in ("aten", "prims") else None
    return None if saying is None else saying(arguments, node)


Saying = Callable[[Arguments, torch.fx.Node], "Said | Alias | None"]


def _arguments(node: torch.fx.Node, target: torch._ops.OpOverload) -> Arguments:
    """The node's arguments by name, defaults filled in."""
    schema = target._schema.arguments
    named = {a.name: a.default_value for a in schema if a.has_default_value()}
    named.update(zip((a.name for a in schema), node.args, strict=False))
    named.update(node.kwargs)
    return named


def _unary(op: Op) -> Saying:
    return lambda a, node: Said(op, (a["self"],))


def _binary(op: Op) -> Saying:
    def saying(a: Arguments, node: torch.fx.Node) -> Said | None:
        if a.get("alpha", 1) != 1 or a.get("rounding_mode") is not None:
            return None
        return Said(op, (a["self"], a["other"]))

    return saying


def _reduction(op: Op) -> Saying:
    def saying(a: Arguments, node: torch.fx.Node) -> Said | None:
        return Said(op, (a["self"],), _over(a)) if _over(a)["axes"] else None

    return saying


def _over(a: Arguments) -> dict[str, Any]:
    axes = a.get("dim")
    axes = (axes,) if isinstance(axes, int) else tuple(axes or ())
    return {"axes": axes, "keepdims": bool(a.get("keepdim", False))}


def _variance(a: Arguments, node: torch.fx.Node) -> Said | None:
    if a.get("dim") is None:
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
        return Said(Op.VIEW, (a["self"],))
    if before == after:
        return Alias(a["self"])
    return Said(Op.RESHAPE, (a["self"],), {"sources": sources})


def _transpose(a: Arguments, node: torch.fx.Node) -> Said | None:
    shape = _shape(node)
    if shape is None:
        return None
    order = [axis % len(shape) for axis in a.get("dims", range(len(shape)))]
    if "dims" not in a and order:
        first, second = a.get("dim0", 0), a.get("dim1", -1)
        order[first], order[second] = order[second], order[first]
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
    return Said(Op.MATMUL, (a["input"], a["weight"], a.get("bias")), {"transposed": True})


def _matmul(a: Arguments, node: torch.fx.Node) -> Said:
    other = a["other"] if "other" in a else a["mat2"]
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


def _correction(a: Arguments) -> float:
    if "unbiased" in a:
        return 1.0 if a["unbiased"] else 0.0
    return 1.0 if a.get("correction") is None else float(a["correction"])


def _length(a: Arguments, node: torch.fx.Node) -> Said | None:
    order = a.get("ord", a.get("p", 2))
    if (2 if order is None else order) != 2 or a.get("dim") is None:
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
    "native_group_norm": {0: _refused(Op.GROUP_NORM)},
    "_native_batch_norm_legit": {0: _refused(Op.BATCH_NORM)},
    "_native_batch_norm_legit_no_training": {0: _refused(Op.BATCH_NORM)},
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
    if name in _SPLITS and isinstance(place, int):
        return _SPLITS[name](_arguments(source, target), place, source)
    saying = _MULTIPLE.get(name, {}).get(place) if isinstance(place, int) else None
    return None if saying is None else saying(_arguments(source, target), node)


_SAYINGS: dict[str, Saying] = {
    "add": _binary(Op.ADD),
    "sub": _binary(Op.SUB),
    "rsub": lambda a, node: Said(Op.SUB, (a["other"], a["self"])) if a["alpha"] == 1 else None,
    "mul": _binary(Op.MUL),
    "multiply": _binary(Op.MUL),
    "div": _binary(Op.DIV),
    "true_divide": _binary(Op.DIV),
    "maximum": _binary(Op.MAXIMUM),
    "neg": _unary(Op.NEG),
    "abs": _unary(Op.ABS),
    "square": _unary(Op.SQUARE),
    "sqrt": _unary(Op.SQRT),
    "rsqrt": _unary(Op.RSQRT),
    "reciprocal": _unary(Op.RECIPROCAL),
    "tanh": _unary(Op.TANH),
    "erf": _unary(Op.ERF),
    "pow": _power,
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
    "addmm": _addmm,
    **dict.fromkeys(("conv1d", "conv2d", "conv3d", "convolution"), _convolution),
    **dict.fromkeys(("adaptive_avg_pool1d", "adaptive_avg_pool2d"), _pooled),
    "linalg_vector_norm": _length,
    "norm": _length,
    "clamp_min": _clamp_min,
    "clamp": _clamp_min,
    "to": _cast,
    "_to_copy": _cast,
    "type_as": _cast,
    "convert_element_type": _cast,
    "expand": lambda a, node: Said(Op.EXPAND, (a["self"],)),
    "expand_as": lambda a, node: Said(Op.EXPAND, (a["self"],)),
    "unsqueeze": lambda a, node: Said(Op.UNSQUEEZE, (a["self"],), {"axes": (a["dim"],)}),
    "alias": _alias,
    "clone": _alias,
    "contiguous": _alias,
    "detach": _alias,
    "dropout": _dropout,
    "layer_norm": _layer_norm,
    "rms_norm": _rms_norm,
    "batch_norm": _refused(Op.BATCH_NORM),
    "group_norm": _refused(Op.GROUP_NORM),
    "instance_norm": _refused(Op.INSTANCE_NORM),
}


def scalar_of(node: torch.fx.Node) -> float | None:
    """The value of a node that makes a constant of one element from a literal."""
    name = getattr(getattr(node.target, "_schema", None), "name", "")
    if name not in ("aten::scalar_tensor", "aten::full"):
        return None
    value = node.args[-1]
    shape = node.args[0] if name == "aten::full" else ()
    if isinstance(value, (int, float)) and isinstance(shape, (list, tuple)):
        return float(value) if math.prod(shape or (1,)) == 1 else None
    return None
