"""Changes of constants by exact algebra: of the whole of one, or of one part after another."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from .channels import Array, Kind, ranked
from .terms import Term

__all__ = ["Change", "after", "in_parts", "is_brief", "shape_after"]

PART_BYTES = 1 << 22
"""Of a part in float64."""

BRIEF = 16
"""Changes are brief where they hold this many times fewer numbers than what they make."""


@dataclass(frozen=True, eq=False)
class Change:
    """A constant operand of a term, multiplied by or added to; place 2 of a product: its bias.

    axis: of the operand, along which a matrix [old, new] is multiplied.
    """

    term: Term
    place: int
    kind: Kind
    array: Array
    axis: int = 0

    def applied(self, operand: Array) -> Array:
        """The operand after the change."""
        if self.kind is Kind.SCALE:
            return operand * self.array
        if self.kind is Kind.SHIFT:
            return operand + self.array
        return np.moveaxis(np.tensordot(self.array, operand, (1, self.axis)), 0, self.axis)

    def shape_after(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of an operand of that shape after the change."""
        if self.kind is not Kind.MATRIX:
            return np.broadcast_shapes(shape, self.array.shape)
        axis = self.axis % len(shape)
        return (*shape[:axis], len(self.array), *shape[axis + 1 :])

    def at(self, places: slice, axis: int, rank: int) -> Change:
        """The change of what lies at some places along an axis of an operand that keeps its shape;
        of scales and shifts alone."""
        array = ranked(self.array, rank)
        if array.shape[axis] == 1:
            return self
        return replace(self, array=array[_along(places, axis, rank)])


def after(operand: Array, changes: Sequence[Change]) -> Array:
    """An operand after changes, in float64."""
    array = np.asarray(operand, np.float64)
    for change in changes:
        array = np.asarray(change.applied(array))
    return array


def shape_after(shape: tuple[int, ...], changes: Sequence[Change]) -> tuple[int, ...]:
    """The shape of an operand of that shape after changes."""
    for change in changes:
        shape = change.shape_after(shape)
    return shape


def is_brief(shape: tuple[int, ...], changes: Sequence[Change]) -> bool:
    """Whether changes take little room beside an operand of that shape, and little time: then they
    need not be made before somebody asks for the result."""
    numbers = sum(change.array.size for change in changes)
    return _in_place(shape, changes) and numbers * BRIEF <= int(np.prod(shape, dtype=np.int64))


def in_parts(
    operand: Array, changes: Sequence[Change], axis: int = 0
) -> Iterator[tuple[Array, Array]]:
    """Parts of an operand along an axis, in order, each with what it is after changes, in float64.

    Where a change does not leave the shape, or sums over an axis, there is one part.
    """
    rank = operand.ndim
    if not operand.size or not rank or not _in_place(operand.shape, changes):
        yield operand, after(operand, changes)
        return
    axis %= rank
    length = operand.shape[axis]
    step = max(1, PART_BYTES * length // (8 * operand.size))
    for start in range(0, length, step):
        places = slice(start, start + step)
        part = operand[_along(places, axis, rank)]
        yield part, after(part, [change.at(places, axis, rank) for change in changes])


def _in_place(shape: tuple[int, ...], changes: Sequence[Change]) -> bool:
    """Whether each number of an operand changes by itself."""
    own = all(change.kind is not Kind.MATRIX for change in changes)
    return own and shape_after(shape, changes) == shape


def _along(places: slice, axis: int, rank: int) -> tuple[slice, ...]:
    return tuple(places if each == axis else slice(None) for each in range(rank))
