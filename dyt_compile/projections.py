"""Linear projections behind converted sites, and what they change when they are refitted.

What a projection gets differs once norms before it are converted. Its own weight, moved a little
towards what the original has there, takes much of that back, at no cost when the model runs.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from .changes import Change
from .channels import Kind, takes_value
from .constants import is_fixed, is_quantised, readers
from .dyt import Mix
from .graphs.base import Graph
from .graphs.cuts import place, read_between
from .mixing import obstacle
from .producers import holds_bias
from .revision import name_of
from .sites import NormSite
from .terms import Op, Term, Value

__all__ = ["Projection", "changes_of", "projections"]

Array = npt.NDArray[np.float32]
AnyArray = npt.NDArray[Any]

LARGEST = 1 << 26
"""Entries of the largest weight that is refitted: 4096 x 16384. Heads over large vocabularies,
whose sums would take gigabytes, are left."""

VIEWS = (Op.RESHAPE, Op.VIEW, Op.UNSQUEEZE, Op.SQUEEZE)


@dataclass(frozen=True, eq=False)
class Projection:
    """A product with a weight that nothing else reads.

    name: of the weight; input: what is multiplied, channels last; output: the product, without a
    bias that is added behind it. residuals: what its output is added to, and known before it;
    moves: the views and transposes that lead there. site: a converted one that alone reads the
    sum; what it puts out is all that the sum is for. lengths: what the way to its output reads
    besides, such as the length of an axis to view as.
    """

    name: str
    term: Term
    input: Value
    output: Value
    moves: tuple[Term, ...]
    residuals: tuple[Value, ...]
    site: NormSite | None = None
    lengths: tuple[Value, ...] = ()

    @property
    def known(self) -> tuple[Value, ...]:
        """What a walk has to know at the projection, besides its input."""
        return (*self.residuals, *self.lengths)

    @property
    def shape(self) -> tuple[int | None, ...]:
        """(in, out) of the weight."""
        weight = self.term.operands[1].shape or ()
        return weight[::-1] if self.term.attributes["transposed"] else weight

    @property
    def beside(self) -> Value:
        """What has the shape of the sum, in which samples and tokens are told apart."""
        return self.residuals[0] if self.residuals else self.output

    def target(self, output: Array, differences: Iterable[Array]) -> Array:
        """What the output has to be for the sums behind it to be those of the original.

        output: the original's; differences: of the residuals, the original's less the converted.
        """
        return sum(map(self.back, differences), output)

    def back(self, array: AnyArray) -> AnyArray:
        """What lies where the sum does, as it lies in the output."""
        for move in reversed(self.moves):
            array = _back(move, array)
        return array


def projections(graph: Graph, sites: Collection[NormSite]) -> list[Projection]:
    """The projections that a refit pays for, once `sites` are converted; in execution order.

    Those that read a site whose readers cannot take up a matrix, since others read it, too: each
    of them can, for itself. And those that write what one site alone reads: what the norm made of
    it is all that it is for. Writers of a residual that goes on beside the norms are left: drawn
    to the original's residual they brought each later site nearer to its norm, and the outputs of
    two pre-norm models no nearer (a GPT's KL .079 without, .086 with them; digits .142, .142).
    """
    inside, outputs = _inside(sites), set(graph.outputs.values())
    behind = _behind({site.output for site in sites})
    alone = {site.input: site for site in sites if _is_private(site, outputs)}
    unmixed = {site.output for site in sites if obstacle(site, graph.outputs) is not None}
    found = []
    for term in graph.terms:
        if term.op is Op.MATMUL and term.output in behind and term.output not in inside:
            value, weight = term.inputs[:2]
            if isinstance(value, Value) and isinstance(weight, Value) and _is_free(weight, term):
                moves, residuals, end = _way_to_residuals(term, outputs)
                if end in alone or _source(value) in unmixed:
                    name, way = name_of(weight), (moves, residuals)
                    made = Projection(name, term, value, term.output, *way)
                    found.append(_before(alone.get(end), made))
    return found


def _before(site: NormSite | None, projection: Projection) -> Projection:
    """The projection with the site that alone reads its sum, as far as it can see to there."""
    if site is None:
        return projection
    lengths = read_between([projection.output, *projection.residuals], site.output)
    if any(place(length) > projection.term.index for length in lengths):
        return projection
    return replace(projection, site=site, lengths=lengths)


def changes_of(projection: Projection, refit: Mix) -> tuple[Change, ...]:
    """What a refit changes: the weight and the bias."""
    term = projection.term
    matrix = refit.matrix.astype(np.float64)
    weight = Change(term, 1, Kind.SHIFT, matrix.T if term.attributes["transposed"] else matrix)
    return weight, Change(*_bias(term), Kind.SHIFT, refit.offset.astype(np.float64))


def _is_free(weight: Value, term: Term) -> bool:
    """Whether a product has a plain weight that nothing else reads, and of a size to solve for."""
    if term.within or weight.shape is None or len(weight.shape) != 2 or not is_fixed(weight):
        return False
    if not (weight.dtype or "").startswith(("float", "bfloat")) or is_quantised(weight):
        return False
    inputs, outputs = weight.shape
    return (inputs or 0) * (outputs or 0) <= LARGEST and readers(weight) <= {term}


def _behind(answers: set[Value]) -> set[Value]:
    """The values that depend on `answers`, those themselves included."""
    pending, found = list(answers), set(answers)
    while pending:
        for term in pending.pop().consumers:
            if term.output not in found:
                found.add(term.output)
                pending.append(term.output)
    return found


def _inside(sites: Iterable[NormSite]) -> set[Value]:
    """What the sites compute on the way to their outputs."""
    found: set[Value] = set()
    for site in sites:
        pending = [site.output]
        while pending:
            value = pending.pop()
            if value not in found and value is not site.input and value.producer is not None:
                found.add(value)
                pending.extend(value.producer.operands)
    return found


def _source(value: Value) -> Value:
    """The value that another one is a view of."""
    while value.producer is not None and value.producer.op in (*VIEWS, Op.TRANSPOSE, Op.CAST):
        value = value.producer.operands[0]
    return value


def _is_private(site: NormSite, outputs: Collection[Value]) -> bool:
    """Whether a site of one axis, the last, and of one call alone reads its input."""
    if site.axes != (-1,) or site.parameter_shape != (site.channels,) or site.tied_to is not None:
        return False
    taken = {term.output for term in site.input.consumers if takes_value(term)}
    return site.input not in outputs and taken <= _inside([site])


def _way_to_residuals(
    term: Term, outputs: Collection[Value]
) -> tuple[tuple[Term, ...], tuple[Value, ...], Value]:
    """Views up to the sums that a product ends in, the other operands of those, and the last."""
    moves: list[Term] = []
    residuals: list[Value] = []
    value = term.output
    width = value.shape[-1] if value.shape else None
    while value not in outputs and (reader := _only_reader(value)) is not None:
        if reader.op is Op.ADD:
            other = reader.inputs[0 if reader.inputs[1] is value else 1]
            if isinstance(other, Value) and not other.constant:
                if place(other) > term.index or other.shape != value.shape:
                    break
                if other is value or other.shape is None or other.shape[-1] != width:
                    break
                residuals.append(other)
        elif reader.op not in (*VIEWS, Op.TRANSPOSE) or residuals or not _goes_back(reader):
            break
        else:
            moves.append(reader)
        value = reader.output
    return (tuple(moves), tuple(residuals), value) if residuals else ((), (), term.output)


def _only_reader(value: Value) -> Term | None:
    """The one term that takes a value, where there is one."""
    found = [term for term in value.consumers if takes_value(term)]
    return found[0] if len(found) == 1 else None


def _goes_back(move: Term) -> bool:
    """Whether the shape before a view is known once that behind it is."""
    shape = move.operands[0].shape
    return move.op is Op.TRANSPOSE or (shape is not None and shape.count(None) <= 1)


def _back(move: Term, array: AnyArray) -> AnyArray:
    if move.op is Op.TRANSPOSE:
        return np.transpose(array, np.argsort(move.attributes["order"]))
    return array.reshape([-1 if size is None else size for size in move.operands[0].shape or ()])


def _bias(term: Term) -> tuple[Term, int]:
    """Where a product takes up an offset: in its bias, or in that which is added behind it."""
    add = _only_reader(term.output)
    if not holds_bias(term) and add is not None and add.op is Op.ADD:
        other = 0 if add.inputs[1] is term.output else 1
        operand = add.inputs[other]
        width = (term.output.shape or (None,))[-1]
        if isinstance(operand, Value) and operand.shape == (width,) and is_fixed(operand):
            return add, other
    return term, 2
