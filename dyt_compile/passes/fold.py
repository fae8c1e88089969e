"""Fold: exact algebra that makes a graph smaller and leaves the function that it computes.

What is computed from parameters alone is computed once. A constant that scales or shifts channels
goes into the weights that made them, or into the weights of all that read them, until no more can;
so do gamma and beta of DyT. Arithmetic is in float64, rounded once to the dtype of the weight.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..changes import Change
from ..channels import (
    Kind,
    Stop,
    Uptake,
    cannot,
    carried,
    narrowed,
)
from ..constants import is_fixed, leaves
from ..dyt import FORMS, Form
from ..graphs.base import Edit, Graph
from ..producers import changes, holds_bias, pulled
from ..progress import track
from ..revision import Revision, name_of
from ..sites import Match, NormSite
from ..terms import Op, Term, Value

__all__ = ["Fold", "Folded", "Left", "fold"]

VIEWS = {
    Op.CAST, Op.CONCAT, Op.EXPAND, Op.GATHER, Op.RESHAPE, Op.SLICE, Op.SQUEEZE, Op.TRANSPOSE,
    Op.UNSQUEEZE, Op.VIEW,
}  # fmt: skip
"""What makes no new numbers: to store its result would only store the same weight again."""

RANDOM = ("rand", "Random", "bernoulli", "Bernoulli", "dropout", "Dropout", "normal", "multinomial")
"""Parts of names of operators whose result differs from call to call."""


@dataclass(frozen=True)
class Fold:
    """What went into weights. name: of the site or the constant; what: "gamma", "beta", "scale",
    "shift", or "computed" for a constant; into: the operators that took it."""

    name: str
    what: str
    into: tuple[str, ...]


@dataclass(frozen=True)
class Left:
    """What stayed, and why, in one sentence; fields as of `Fold`."""

    name: str
    what: str
    reason: str


@dataclass(frozen=True, eq=False)
class Folded:
    """What `fold` returns: the folded model, and what went where in it."""

    graph: Graph = field(repr=False)
    folded: tuple[Fold, ...]
    left: tuple[Left, ...]

    @property
    def model(self) -> Any:
        """The folded model, an `nn.Module` or an `onnx_ir.Model`."""
        return self.graph.model

    def to_dict(self) -> dict[str, Any]:
        """What was folded and what was left, as plain JSON data."""
        return {
            "folded": [{**vars(entry), "into": list(entry.into)} for entry in self.folded],
            "left": [vars(entry) for entry in self.left],
        }


def fold(graph: Graph, found: Match) -> Folded:
    """The graph with constants, scales and shifts folded into weights.

    found: the norms and DyT of `graph`; norms that it keeps stay as they are. The graph itself
    stays as it is, the result shares the weights that do not change. Of a weight in an ONNX model's
    data file only what comes of it is noted: it is computed when it is read. Raises RewriteError
    where weights are not loaded (meta tensors), or would leave the range of their dtype.
    """
    folder = _Folder(graph, _inside(found.sites))
    for value in _computed(graph):
        folder.store(value)
    while folder.sweep():
        pass
    # Sites last: they take no operator away that kept another one.
    for site in track(found.sites, "folding", len(found.sites)):
        folder.fold_site(site)
    edits = list(folder.edits())
    made = graph.revise(edits) if edits else graph
    return Folded(made, tuple(folder.folded), tuple(folder.left))


def _inside(sites: Iterable[NormSite]) -> set[Term]:
    """The terms of the norms that stay."""
    inside: set[Term] = set()
    for site in sites:
        pending = [] if site.kind.lossless else [site.output]
        while pending:
            value = pending.pop()
            if value is site.input or value.constant or value.producer in inside:
                continue
            if value.producer is not None:
                inside.add(value.producer)
                pending.extend(value.producer.operands)
    return inside


def _computed(graph: Graph) -> Iterator[Value]:
    """Constants that the graph computes from parameters on every call."""
    seen: set[Value] = set()
    for term in graph.terms:
        if term.output.constant or term.within:
            continue
        for value in term.operands:
            if value.constant and value not in seen and value.producer is not None:
                seen.add(value)
                if _worth_storing(value):
                    yield value


def _worth_storing(value: Value) -> bool:
    """Whether a constant is made of parameters by arithmetic that is the same on every call."""
    terms, pending = set[Term](), [value]
    if not (value.dtype or "").startswith(("float", "bfloat")) or not is_fixed(value):
        return False
    while pending:
        term = pending.pop().producer
        if term is not None and term not in terms:
            terms.add(term)
            pending.extend(term.operands)
    for term in terms:
        in_place = term.label.endswith("_") and not term.label.endswith("__")
        if in_place or any(part in term.label for part in RANDOM) or "quant" in term.label.lower():
            return False
    makes = any(term.op not in VIEWS for term in terms)
    return makes and any(leaf.parameter for leaf in leaves(value))


class _Folder:
    """What is folded so far, over a graph that itself stays as it is."""

    def __init__(self, graph: Graph, inside: Collection[Term]) -> None:
        self.folded: list[Fold] = []
        self.left: list[Left] = []
        self._graph = graph
        self._inside = inside
        self._weights = Revision(graph)
        self._removed: dict[Term, int] = {}
        self._forms: dict[Term, Form] = {}

    def store(self, value: Value) -> None:
        """Compute a constant once."""
        if value.producer is not None:
            self._weights.stored[value.producer] = self._weights.constant(value)
            self.folded.append(Fold(name_of(value), "computed", _names(value.consumers)))

    def sweep(self) -> bool:
        """Fold products and sums with constants, from first to last; whether there was one.

        What stays may go in a later sweep: the scale of gamma x + beta, once the shift is gone.
        """
        before = len(self._removed)
        self.left.clear()
        for term in self._graph.terms:
            if term not in self._removed:
                self._fold_term(term)
        return len(self._removed) > before

    def _fold_term(self, term: Term) -> None:
        """Fold a product or a sum with a constant into what makes its operand, or what reads it."""
        place = self._affine_place(term)
        if place is None:
            return
        kind = Kind.SCALE if term.op in (Op.MUL, Op.DIV) else Kind.SHIFT
        array = narrowed(self._weights.value(term, place))
        with np.errstate(divide="ignore"):
            array = 1 / array if term.op is Op.DIV else -array if term.op is Op.SUB else array
        source = term.inputs[1 - place]
        if not np.isfinite(array).all() or not isinstance(source, Value):
            return
        outputs = self._graph.outputs
        back = pulled(source, array, kind, outputs, self._removed)
        if not isinstance(back, str):
            self._take(term, place, kind, back)
            return
        ahead = carried(term.output, array, kind, outputs, self._weights, self._removed)
        if not isinstance(ahead, Stop):
            self._take(term, place, kind, self._changed(ahead, kind))
            return
        operand = term.inputs[place]
        if isinstance(operand, Value) and any(map(_is_learned, leaves(operand))):
            reason = f"{back}, and in its readers it {cannot(ahead)}"
            self.left.append(Left(name_of(operand), kind.name.lower(), reason))

    def fold_site(self, site: NormSite) -> None:
        """Fold beta, then gamma, of a DyT; there is no form with beta alone."""
        term = site.output.producer
        if term is None or term.op is not Op.DYT or term.within:
            return
        form: Form = term.attributes["form"]
        for what, kind in (("beta", Kind.SHIFT), ("gamma", Kind.SCALE)):
            if what not in form.parameters:
                continue
            smaller = _without(form, what)
            if smaller is None:
                self.left.append(Left(site.name, what, _formless(form, what)))
                continue
            array = self._weights.value(term, 1 + form.parameters.index(what))
            outputs = self._graph.outputs
            ahead = carried(site.output, array, kind, outputs, self._weights, self._removed)
            if isinstance(ahead, Stop):
                self.left.append(Left(site.name, what, f"it {cannot(ahead)}"))
                continue
            self._weights.add(self._changed(ahead, kind))
            self._forms[term] = form = smaller
            self.folded.append(Fold(site.name, what, _names(u.term for u in ahead)))

    def _affine_place(self, term: Term) -> int | None:
        """The place of the constant of a foldable product or sum, None for all other terms."""
        if term.op not in (Op.MUL, Op.DIV, Op.ADD, Op.SUB) or term.within or term in self._inside:
            return None
        constant = [p for p, v in enumerate(term.inputs) if not isinstance(v, Value) or v.constant]
        if len(constant) != 1 or (term.op in (Op.DIV, Op.SUB) and constant != [1]):
            return None
        (place,) = constant
        source, operand = term.inputs[1 - place], term.inputs[place]
        if not isinstance(source, Value) or not _same_type(source, term.output):
            return None
        if operand is None or not is_fixed(operand):
            return None
        if isinstance(operand, Value) and sum(s != 1 for s in operand.shape or ()) > 1:
            return None
        return None if self._is_bias(term, source) else place

    def _is_bias(self, term: Term, source: Value) -> bool:
        """Whether an Add is all the bias that a product has: ONNX's MatMul has no place for one."""
        made = source.producer
        while made is not None and made in self._removed:
            operand = made.inputs[self._removed[made]]
            made = operand.producer if isinstance(operand, Value) else None
        is_product = made is not None and made.op is Op.MATMUL
        return term.op is Op.ADD and made is not None and is_product and not holds_bias(made)

    def _changed(self, uptakes: Sequence[Uptake], kind: Kind) -> tuple[Change, ...]:
        return tuple(made for uptake in uptakes for made in changes(uptake, kind, self._weights))

    def _take(self, term: Term, place: int, kind: Kind, made: Sequence[Change]) -> None:
        """Make the changes, after which a term changes nothing."""
        self._weights.add(made)
        self._removed[term] = 1 - place
        operand = term.inputs[place]
        name = name_of(operand) if isinstance(operand, Value) else term.output.name
        self.folded.append(Fold(name, kind.name.lower(), _names(c.term for c in made)))

    def edits(self) -> Iterator[Edit]:
        """One edit a term, in the order of the terms."""
        touched, stored = self._weights.touched(), self._weights.stored
        for term in self._graph.terms:
            if term in stored:
                yield Edit(term, result=self._weights.kept(term.output))
            elif term in self._removed:
                yield Edit(term, passed=self._removed[term])
            elif term in touched or term in self._forms:
                yield self._weights.edit(term, self._forms.get(term))


def _is_learned(leaf: Value) -> bool:
    """Whether a user would know it: exporters store literals of one element, too, without paths."""
    return leaf.parameter and (leaf.scalar is None or "." in leaf.name)


def _same_type(source: Value, output: Value) -> bool:
    return (
        source.dtype == output.dtype
        and source.shape == output.shape
        and (source.dtype or "").startswith(("float", "bfloat"))
    )


def _without(form: Form, what: str) -> Form | None:
    """The form that lacks one parameter, None where there is none."""
    wanted = tuple(name for name in form.parameters if name != what)
    return next(
        (f for f in FORMS.values() if (f.parameters, f.squash) == (wanted, form.squash)), None
    )


def _formless(form: Form, what: str) -> str:
    if form.squash == "tanh" and what == "gamma":
        return "its beta stays, and there is no form of DyT with beta alone"
    return f"{form.name} has no form without {what}"


def _names(terms: Iterable[Term]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(term.output.name for term in terms))
