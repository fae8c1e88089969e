"""What makes a value, and takes up a scale or a shift of it: the way back of `channels`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from .changes import Change
from .channels import (
    Array,
    Kind,
    Uptake,
    Weights,
    against_weight,
    narrowed,
    ranked,
    spoken,
    takes_value,
)
from .constants import is_fixed, is_quantised, readers
from .terms import Op, Term, Value
from .views import viewed

__all__ = ["changes", "holds_bias", "pulled"]


def holds_bias(term: Term) -> bool:
    """Whether a product with a weight has a bias, or its operator has a place for one."""
    return (
        term.op is Op.CONVOLUTION
        or term.inputs[2] is not None
        or bool(term.attributes["transposed"])
    )


def changes(uptake: Uptake, kind: Kind, weights: Weights) -> tuple[Change, ...]:
    """What a reader changes to take up what reaches it."""
    term, place = uptake.term, 1 - uptake.place
    if term.op is Op.ADD:
        return (Change(term, place, Kind.SHIFT, uptake.array),)
    if kind is Kind.SHIFT:
        made = weights.product(uptake)
        return (Change(term, 2, Kind.SHIFT, made.reshape(-1) if holds_bias(term) else made),)
    weight = term.inputs[place]
    shape = weight.shape if isinstance(weight, Value) and weight.shape is not None else ()
    factor = against_weight(uptake, shape)
    if factor is None:
        raise ValueError(f"{term} cannot take up a scale of shape {uptake.array.shape}")
    return (Change(term, place, Kind.SCALE, factor),)


def pulled(
    value: Value,
    array: Array,
    kind: Kind,
    outputs: Mapping[str, Value],
    removed: Mapping[Term, int],
) -> tuple[Change, ...] | str:
    """What makes `value` multiplied by or added to `array` in its place, or why nothing does.

    removed: terms that have become identities, by the place of the operand that is their value.
    """
    made: list[Change] = []
    while True:
        if value in outputs.values() or value.shape is None:
            return f"`{value.name}` is also the model's output"
        if sum(takes_value(term) for term in value.consumers) > 1:
            return f"`{value.name}` has other readers"
        term = value.producer
        if term is None or term.within:
            return f"`{value.name}` is an input of the model"
        array = narrowed(ranked(array, len(value.shape)))
        if term in removed:
            source = term.inputs[removed[term]]
        else:
            rule = _RULES.get(term.op)
            found = None if rule is None else rule(term, array, kind)
            if found is None:
                return f"{spoken(term)} makes it"
            made += found.changes
            source, array = found.source, found.array
        if source is None:
            return tuple(made)
        if not isinstance(source, Value):
            return f"{spoken(term)} makes it"
        value = source


@dataclass(frozen=True, eq=False)
class _Step:
    """One term passed on the way back. source: where it goes on, None at its end."""

    array: Array
    source: Value | float | None = None
    changes: tuple[Change, ...] = ()


Rule = Callable[[Term, Array, Kind], "_Step | None"]


def _moving(move: Callable[[Term, Array], Array | None]) -> Rule:
    def rule(term: Term, array: Array, kind: Kind) -> _Step | None:
        moved = move(term, array)
        return None if moved is None else _Step(moved, term.inputs[0])

    return rule


def _unviewed(term: Term, array: Array) -> Array | None:
    before, after = term.operands[0].shape, term.output.shape
    return None if before is None or after is None else viewed(array, after, before)


def _transposed(term: Term, array: Array) -> Array:
    return np.transpose(array, np.argsort(term.attributes["order"]))


def _cast(term: Term, array: Array) -> Array | None:
    source = term.operands[0].dtype or ""
    return array if source.startswith(("float", "bfloat")) else None


def _constant_place(term: Term) -> int | None:
    """The place of the one operand of two that is a constant."""
    places = [p for p, v in enumerate(term.inputs) if not isinstance(v, Value) or v.constant]
    return places[0] if len(places) == 1 and len(term.inputs) == 2 else None


def _product(term: Term, array: Array, kind: Kind) -> _Step | None:
    place = _constant_place(term)
    if place is None or kind is Kind.SHIFT or (term.op is Op.DIV and place == 0):
        return None
    return _Step(array, term.inputs[1 - place])


def _sum(term: Term, array: Array, kind: Kind) -> _Step | None:
    place = _constant_place(term)
    operand = None if place is None else term.inputs[place]
    if place is None or not isinstance(operand, Value) or not is_fixed(operand):
        return None
    change = Change(term, place, kind, array)
    source = None if kind is Kind.SHIFT else term.inputs[1 - place]
    return _Step(array, source, (change,))


def _dyt(term: Term, array: Array, kind: Kind) -> _Step | None:
    names = term.attributes["form"].parameters
    scaled = [name for name in ("gamma", "beta") if name in names]
    touched = scaled if kind is Kind.SCALE else ["beta"]
    if not scaled or not set(touched) <= set(scaled) or "gamma" not in scaled:
        return None
    return _Step(array, None, tuple(Change(term, 1 + names.index(n), kind, array) for n in touched))


def _weighted(term: Term, array: Array, kind: Kind) -> _Step | None:
    """A product with a constant weight, whose output is scaled or shifted per channel."""
    weight, bias = term.inputs[1], term.inputs[2]
    if not isinstance(weight, Value) or not is_fixed(weight) or weight.shape is None:
        return None
    if bias is not None and not is_fixed(bias):
        return None
    channel = -1 if term.op is Op.MATMUL else 1 - len(weight.shape)
    if any(size > 1 for axis, size in enumerate(array.shape, -array.ndim) if axis != channel):
        return None
    flat = array.reshape(-1)
    if kind is Kind.SHIFT:
        return _Step(array, None, (Change(term, 2, kind, flat),)) if holds_bias(term) else None
    if is_quantised(weight) or not readers(weight) <= {term} or len(weight.shape) < 2:
        return None
    first = term.op is Op.CONVOLUTION or term.attributes["transposed"]
    factor = flat.reshape(-1, *(1,) * (len(weight.shape) - 1)) if first else flat
    return _Step(array, None, (Change(term, 1, kind, factor), Change(term, 2, kind, flat)))


_RULES: dict[Op, Rule] = {
    Op.CAST: _moving(_cast),
    Op.RESHAPE: _moving(_unviewed),
    Op.UNSQUEEZE: _moving(_unviewed),
    Op.SQUEEZE: _moving(_unviewed),
    Op.VIEW: _moving(_unviewed),
    Op.TRANSPOSE: _moving(_transposed),
    Op.MUL: _product,
    Op.DIV: _product,
    Op.ADD: _sum,
    Op.DYT: _dyt,
    Op.MATMUL: _weighted,
    Op.CONVOLUTION: _weighted,
}
