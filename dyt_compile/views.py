"""What a view does to an array that broadcasts against the viewed value."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

__all__ = ["LARGEST", "Array", "Shape", "viewed"]

Array = npt.NDArray[np.float64]
Shape = Sequence["int | None"]

LARGEST = 1 << 22
"""Elements of a carried array; a scale that differs at more places is no scale per channel."""


def viewed(array: Array, before: Shape, after: Shape) -> Array | None:
    """`array`, which broadcasts against shape `before`, where its value is viewed as `after`.

    None where channels would be mixed with an axis of unknown length.
    """
    full: list[int] = list(array.shape)
    shape = [1] * len(after)
    for ours, theirs in _blocks(before, after):
        if all(array.shape[axis] == 1 for axis in ours):
            continue
        for axis in ours:
            size = before[axis]
            if size is None:
                return None
            full[axis] = size
        for axis in theirs:
            shape[axis] = after[axis] or 0
    if math.prod(full) > LARGEST or math.prod(full) != math.prod(shape):
        return None
    return np.broadcast_to(array, full).reshape(shape)


def _blocks(before: Shape, after: Shape) -> Iterator[tuple[range, range]]:
    """The smallest groups of axes that a view turns into each other; the unknown rest is one."""
    end, end_after = len(before), len(after)
    for ours, theirs in _matched(before[::-1], after[::-1]):
        yield (
            range(len(before) - ours.stop, end),
            range(len(after) - theirs.stop, end_after),
        )
        end, end_after = len(before) - ours.stop, len(after) - theirs.stop
    start = start_after = 0
    for ours, theirs in _matched(before[:end], after[:end_after]):
        yield ours, theirs
        start, start_after = ours.stop, theirs.stop
    yield range(start, end), range(start_after, end_after)


def _matched(before: Shape, after: Shape) -> Iterator[tuple[range, range]]:
    """Groups of equal, known size from the start on."""
    i = j = 0
    while i < len(before) and j < len(after):
        i_end, j_end = i + 1, j + 1
        size, size_after = before[i], after[j]
        while size is not None and size_after is not None and size != size_after:
            if size < size_after:
                if i_end == len(before):
                    return
                factor = before[i_end]
                size, i_end = None if factor is None else size * factor, i_end + 1
            else:
                if j_end == len(after):
                    return
                factor = after[j_end]
                size_after, j_end = None if factor is None else size_after * factor, j_end + 1
        if size is None or size_after is None:
            return
        yield range(i, i_end), range(j, j_end)
        i, j = i_end, j_end
