"""How large a value can become, known from its graph alone: what a DyT puts out is bounded.

|gamma tanh(alpha x) + beta| is at most |gamma| + |beta|, and so is every view, mean and
concatenation of such values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from .sites import NormSite
from .terms import Op, Term, Value
from .views import Array

__all__ = ["Bound", "bounds"]

KEEPING = {
    Op.CAST, Op.CONCAT, Op.EXPAND, Op.GATHER, Op.MEAN, Op.NEG, Op.PAD, Op.RESHAPE, Op.ROLL,
    Op.SLICE, Op.SQUEEZE, Op.TRANSPOSE, Op.UNSQUEEZE, Op.VIEW,
}  # fmt: skip
"""Operators that make no element larger than the largest of their operands."""


@dataclass(frozen=True)
class Bound:
    """The largest absolute value of any element, and the sites that it follows from."""

    largest: float
    sites: tuple[str, ...]


def bounds(
    terms: Iterable[Term],
    sites: Iterable[NormSite],
    constant: Callable[[Value], Array | None],
) -> Mapping[Value, Bound]:
    """Every value that the outputs of DyT bound.

    terms: in execution order; constant: the value of a constant, None where it is not loaded.
    """
    found: dict[Value, Bound] = {}
    named = {site.output.producer: site for site in sites if site.output.producer is not None}
    for term in terms:
        site = named.get(term)
        bound = _kept(term, found) if site is None else _of_site(site, constant)
        if bound is not None and not term.within:
            found[term.output] = bound
    return found


def _of_site(site: NormSite, constant: Callable[[Value], Array | None]) -> Bound | None:
    term = site.output.producer
    if term is None or term.op is not Op.DYT:
        return None
    parameters = dict(zip(term.attributes["form"].parameters, term.inputs[1:], strict=True))
    sizes = []
    for name, neutral in (("gamma", 1.0), ("beta", 0.0)):
        operand = parameters.get(name, neutral)
        array = constant(operand) if isinstance(operand, Value) else operand
        if array is None:
            return None
        sizes.append(np.abs(np.asarray(array, np.float64)))
    return Bound(float((sizes[0] + sizes[1]).max()), (site.name,))


def _kept(term: Term, found: Mapping[Value, Bound]) -> Bound | None:
    if term.op not in KEEPING:
        return None
    read = term.operands if term.op is Op.CONCAT else term.operands[:1]
    held = [found[value] for value in read if value in found]
    if not held or len(held) < len(read):
        return None
    sites = dict.fromkeys(name for bound in held for name in bound.sites)
    return Bound(max(bound.largest for bound in held), tuple(sites))
