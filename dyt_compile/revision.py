"""Changes of a graph's constants, collected first and made at once."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator

import numpy as np

from .changes import Change, after, in_parts
from .channels import Array, Uptake, product
from .constants import leaves
from .dyt import Form
from .graphs.base import Edit, Graph, Stored
from .producers import holds_bias
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
        operand, changes = term.inputs[place], self._changes.get((term, place), ())
        if isinstance(operand, Value):
            return after(self._given(operand), changes)
        return after(np.asarray(operand or 0.0), changes)

    def product(self, uptake: Uptake) -> Array:
        """What a weight makes of a summand: of a matrix, for a few output channels at a time.

        Raises RewriteError where its weights are not loaded.
        """
        term, place = uptake.term, 1 - uptake.place
        weight, changes = term.inputs[place], self._changes.get((term, place), ())
        if not isinstance(weight, Value) or term.op is not Op.MATMUL:
            return product(uptake, self.value(term, place))
        first = bool(term.attributes["transposed"]) == (uptake.place == 0)
        parts = in_parts(self._given(weight), changes, -2 if first else -1)
        made = [product(uptake, part) for _, part in parts]
        return made[0] if len(made) == 1 else np.concatenate(made, -1 - uptake.place)

    def constant(self, value: Value) -> Array:
        """A constant in float64; raises RewriteError where its weights are not loaded."""
        return after(self._given(value), ())

    def _given(self, value: Value) -> Array:
        return self.kept(value).given(self._graph.constant)

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
            operand = term.inputs[place]
            if isinstance(operand, Value):
                operands[place] = self.kept(operand, self._changes[term, place])
                continue
            array = self.value(term, place)
            if operand is None and not array.any():
                continue  # a bias that is not there, scaled
            if holds_bias(term):
                operands[place] = _bias(term, np.broadcast_to(array, _bias_shape(term)))
            else:
                added = _bias(term, array)
        return Edit(term, operands, added, form=form)

    def kept(self, old: Value, changes: Iterable[Change] = ()) -> Stored:
        """What comes in the place of a constant: itself, after changes."""
        producer = old.producer
        computed = None if producer is None else self.stored.get(producer)
        base = old if computed is None else computed
        return Stored(name_of(old), base, old.dtype or "float32", tuple(changes))


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
