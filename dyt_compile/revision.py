"""Changes of a graph's constants, collected first and made at once."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator

import numpy as np

from .channels import Array, Uptake, product
from .constants import leaves
from .dyt import Form
from .errors import RewriteError
from .graphs.base import Edit, Graph, Stored
from .producers import Change, holds_bias
from .terms import Op, Term, Value

__all__ = ["Revision", "name_of"]


class Revision:
    """The constants of a graph after changes, while the graph itself stays as it is.

    They are the weights that `channels.carried` asks for: those after the changes, in float64.
    """

    def __init__(self, graph: Graph) -> None:
        self._graph = graph
        self.stored: dict[Term, Array] = {}
        self._changes: dict[tuple[Term, int], list[Change]] = defaultdict(list)

    def value(self, term: Term, place: int) -> Array:
        """A constant operand after the changes, in float64; an absent bias is 0."""
        operand = term.inputs[place]
        array = self.constant(operand) if isinstance(operand, Value) else np.asarray(operand or 0.0)
        for change in self._changes.get((term, place), ()):
            array = change.applied(array)
        return np.asarray(array, np.float64)

    def product(self, uptake: Uptake) -> Array:
        """What a weight makes of a summand."""
        return product(uptake, self.value(uptake.term, 1 - uptake.place))

    def constant(self, value: Value) -> Array:
        """A constant in float64; raises RewriteError where its weights are not loaded."""
        producer = value.producer
        if producer is not None and producer in self.stored:
            return self.stored[producer]
        array = self._graph.constant(value)
        if array is None:
            raise RewriteError(f"{value.name!r}: its weights are not loaded (meta tensors)")
        return array.astype(np.float64)

    def add(self, made: Iterable[Change]) -> None:
        """Make changes after those made before."""
        for change in made:
            self._changes[change.term, change.place].append(change)

    def touched(self) -> set[Term]:
        """The terms whose operands change."""
        return {term for term, _ in self._changes}

    def edits(self) -> Iterator[Edit]:
        """One edit for each touched term, in the order of the terms."""
        touched = self.touched()
        return (self.edit(term) for term in self._graph.terms if term in touched)

    def edit(self, term: Term, form: Form | None = None) -> Edit:
        """The changes of one term; form: of DyT, what it becomes."""
        operands: dict[int, Stored] = {}
        added = None
        for place in range(len(term.inputs)):
            if (term, place) not in self._changes:
                continue
            operand, array = term.inputs[place], self.value(term, place)
            if operand is None and not array.any():
                continue  # a bias that is not there, scaled
            if isinstance(operand, Value):
                operands[place] = self.kept(operand, array)
            elif holds_bias(term):
                operands[place] = _bias(term, np.broadcast_to(array, _bias_shape(term)))
            else:
                added = _bias(term, array)
        return Edit(term, operands, added, form=form)

    def kept(self, old: Value, array: Array) -> Stored:
        """An array in the place of a constant."""
        return Stored(name_of(old), array, old.dtype or "float32")


def name_of(value: Value) -> str:
    """The path of the parameter that a constant is made of; of several, that of its own shape."""
    found = sorted(leaves(value), key=lambda leaf: (leaf.shape != value.shape, leaf.name))
    learned = [leaf for leaf in found if leaf.parameter]
    return (learned or found)[0].name if found else value.name


def _bias(term: Term, array: Array) -> Stored:
    weight = next(v for v in term.inputs[:2] if isinstance(v, Value) and v.constant)
    scope = name_of(weight).rpartition(".")[0] or term.output.name
    return Stored(f"{scope}.bias", array, weight.dtype or "float32")


def _bias_shape(term: Term) -> tuple[int, ...]:
    """One value for each output channel."""
    weight = term.inputs[1]
    shape = weight.shape if isinstance(weight, Value) and weight.shape else ()
    first = term.op is Op.CONVOLUTION or term.attributes["transposed"]
    return (shape[0 if first else -1] or 1,)
