"""Closed-form fits of DyT to a norm's inputs and outputs, in NumPy: one fit for every world."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import sqrt
from typing import Any

import ml_dtypes  # noqa: F401 - NumPy knows bfloat16 by it
import numpy as np
import numpy.typing as npt

from .dyt import SQUASHES, DytParameters, evaluate
from .ranks import ALONE, Ranks

__all__ = [
    "BLOCK", "CHUNK", "NOT_FINITE", "ROWS", "Fit", "Keys", "RowSample", "blocks", "fit_diagonal",
    "held_as", "inverse", "parts", "relative_error", "typical", "unfit", "widened",
]  # fmt: skip

Array = npt.NDArray[np.float32]
Rows = npt.NDArray[Any]
"""[rows, channels] in float32, bfloat16 or float16: who computes widens some of it at a time."""

Statistics = npt.NDArray[np.float64]
Keys = npt.NDArray[np.uint64]
Places = npt.NDArray[np.int64]

ROWS = 6144
"""Rows that a fit uses; more change the output error by less than its spread over seeds."""

SEARCH_ROWS = 2048
"""Rows on which alpha is searched; gamma and beta take all rows of the sample."""

HELD_OUT = 4
"""Every fourth row of the sample is held out to measure the fit error."""

COARSE, LOWEST, HIGHEST = 28, 0.02, 20.0
"""Log-spaced values of alpha times the typical standard deviation of a channel."""

NOT_FINITE = "its activations hold NaN or infinity"
"""Why a site has no fit."""

LARGEST, SMALLEST = 1e12, 1e-30
"""Of activations, and of the deviation of a typical channel: so that no sum of squares
over a sample leaves float32, nor alpha. Those of models end at 1e5."""

SATURATED = 0.98
"""Beyond, the inverse of tanh says little: its slope is under 0.04."""

BLOCK, CHUNK = 64, 256
"""Channels, and rows, that are worked on at once; CHUNK is a multiple of HELD_OUT."""

FINE = 11
"""Values of alpha between the neighbours of the best coarse one."""


@dataclass(frozen=True, eq=False)
class Fit:
    """Fitted values and their relative error on held-out rows: ||y' - y|| / ||y||."""

    parameters: DytParameters
    error: float


class RowSample:
    """A uniform sample of at most `limit` rows of a stream: those of the lowest ranks.

    A row's rank depends on its key and the seed alone, so that neither the batches nor their order
    have a part in the sample, and the sample of several streams is that of their samples. It holds
    x and y in `dtype` and 8 bytes a row besides, and is filled in place.
    """

    def __init__(self, seed: int, limit: int = ROWS, dtype: npt.DTypeLike = np.float32) -> None:
        """dtype: as of `held_as`, which loses nothing of what will be offered."""
        self._seed = seed
        self._limit = limit
        self._ranks = np.empty(0, np.uint64)
        self._x, self._y = np.empty((0, 0), dtype), np.empty((0, 0), dtype)
        self.seen = 0

    def add(self, x: Rows, y: Rows, keys: Keys | None = None) -> None:
        """Offer rows: x and y of shape [rows, channels].

        keys: what each row is known by, [rows]; by default its place in the stream.
        """
        if keys is None:
            keys = np.arange(self.seen, self.seen + len(x), dtype=np.uint64)
        self._offer(x, y, _ranks(keys, self._seed))
        self.seen += len(x)

    def united(self, *others: RowSample) -> RowSample:
        """The sample of this stream and others together: that of their rows in one stream."""
        limits = (sample._limit for sample in (self, *others))
        dtypes = (sample._x.dtype for sample in (self, *others))
        union = RowSample(self._seed, min(limits), held_as(*dtypes))
        for sample in (self, *others):
            union._offer(*sample.rows(), sample._ranks)
            union.seen += sample.seen
        return union

    def join(self, ranks: Ranks) -> None:
        """Let it be, on the first rank, the sample of all ranks' streams; the others' are empty.

        A row travels only if it is in that sample.
        """
        seen, parts = zip(*ranks.gathered((self.seen, self._ranks)), strict=True)
        self.seen, every = sum(seen), np.concatenate(parts)

        def wanted() -> list[npt.NDArray[Any]]:
            last = every[_smallest(every, self._limit)].max(initial=0)
            kept = np.flatnonzero(self._ranks <= last)
            return [self._x[kept], self._y[kept], self._ranks[kept]]

        for x, y, others in ranks.collected(wanted):
            if len(others):
                self._offer(x, y, others)
        if ranks.number:
            self._ranks = self._ranks[:0]
            self._x, self._y = self._x[:0].copy(), self._y[:0].copy()

    def rows(self) -> tuple[Rows, Rows]:
        """The sampled x and y by rank: views of what the sample holds, until more is offered."""
        count = len(self._ranks)
        x, y = self._x[:count], self._y[:count]
        if not (self._ranks[:-1] <= self._ranks[1:]).all():
            order = np.argsort(self._ranks, kind="stable")
            _reorder(x, order)
            _reorder(y, order)
            self._ranks = self._ranks[order]
        return x, y

    def arrays(self) -> dict[str, npt.NDArray[Any]]:
        """What the sample holds, by name, in float32; `of_arrays` makes the sample again."""
        x, y = map(widened, self.rows())
        counts = np.array([self.seen, self._limit], np.int64)
        return {"counts": counts, "ranks": self._ranks, "x": x, "y": y}

    @classmethod
    def of_arrays(cls, counts: npt.NDArray[np.int64], ranks: Keys, x: Rows, y: Rows) -> RowSample:
        """The sample that `arrays` told of; its seed is known no more, as only `add` needs it."""
        sample = cls(0, int(counts[1]))
        sample.seen = int(counts[0])
        sample._x, sample._y, sample._ranks = x, y, ranks
        return sample

    def _offer(self, x: Rows, y: Rows, ranks: Keys) -> None:
        held = len(self._ranks)
        if not held:  # memory that is not written to yet takes none
            dtype = self._x.dtype
            self._x, self._y = (np.empty((self._limit, a.shape[1]), dtype) for a in (x, y))
        chosen = _smallest(np.concatenate([self._ranks, ranks]), self._limit)
        kept, new = chosen[chosen < held], chosen[chosen >= held] - held
        free = np.setdiff1d(np.arange(len(chosen)), kept, assume_unique=True)
        self._ranks = np.resize(self._ranks, len(chosen))
        self._ranks[free], self._x[free], self._y[free] = ranks[new], x[new], y[new]


def held_as(*dtypes: npt.DTypeLike) -> np.dtype[Any]:
    """The dtype in which rows of some dtypes are held: of 16 bits where all are the same one."""
    first, *others = (np.dtype(dtype) for dtype in dtypes)
    narrow = first.itemsize == 2 and first.name in ("bfloat16", "float16")
    return first if narrow and all(other == first for other in others) else np.dtype(np.float32)


def widened(rows: Rows) -> Array:
    """Rows in float32: themselves, or a copy in which they lose nothing."""
    return rows.astype(np.float32, copy=False)


def parts(*arrays: Rows) -> Iterator[tuple[Array, ...]]:
    """Some rows of all after the others, in float32."""
    for start in range(0, len(arrays[0]), CHUNK):
        yield tuple(widened(array[start : start + CHUNK]) for array in arrays)


def _reorder(array: Rows, order: Places) -> None:
    """Sort rows in place, some channels at a time: a whole copy would double what a fit takes."""
    for own in blocks(array):
        array[:, own] = array[order, own]


def fit_diagonal(x: Rows, y: Rows, squash: str = "tanh", ranks: Ranks = ALONE) -> Fit | str:
    """gamma * squash(alpha * x) + beta closest to y in squares, alpha one number for all channels.

    x, y: [rows, channels]. squash: "tanh", or "identity", where alpha is 1. For each alpha,
    gamma and beta are the regression of y on the squashed x, channel by channel. Returns the reason
    where there is nothing to fit. ranks: they share the search of alpha; x and y are the first's.
    """
    searched = ranks.first(lambda: _searched(x, y))
    if isinstance(searched, str):
        return searched
    alpha = 1.0 if squash == "identity" else _best_alpha(*searched, squash, ranks)
    return ranks.first(lambda: _fitted(x, y, alpha, squash))


def _searched(x: Rows, y: Rows) -> tuple[Array, Array, float] | str:
    """The rows on which alpha is searched, and its scale; or why there is nothing to fit."""
    if len(x) < 2 * HELD_OUT:
        return f"{len(x)} rows of activations are too few to fit; at least {2 * HELD_OUT}"
    if reason := unfit(x, y):
        return reason
    scale = typical(x)
    if scale is None or scale < SMALLEST:
        return "its input does not vary over the data"
    return widened(x[:SEARCH_ROWS]), widened(y[:SEARCH_ROWS]), scale


def _fitted(x: Rows, y: Rows, alpha: float, squash: str) -> Fit:
    held = np.arange(len(x)) % HELD_OUT == 0
    trial = _parameters(_regress(x, y, alpha, squash, ~held), alpha, squash)
    error = relative_error(trial, x[::HELD_OUT], y[::HELD_OUT])
    return Fit(_parameters(_regress(x, y, alpha, squash), alpha, squash), error)


def unfit(x: Rows, y: Rows) -> str | None:
    """Why nothing can be fitted to such numbers, None where it can."""
    largest = float(np.max([[-a.min(), a.max()] for part in parts(x, y) for a in part]))
    if not np.isfinite(largest):
        return NOT_FINITE
    if largest > LARGEST:
        return f"its activations reach {largest:.1g}; up to {LARGEST:g} are fitted"
    return None


def typical(x: Rows) -> float | None:
    """The standard deviation of a typical channel, of its middle half; None where none varies.

    Where a tenth of the tokens is massive (a thousand times the others: the first one, separators),
    plain standard deviations are theirs, and no alpha near them is one for the others.
    """
    found = (widened(x[:, own]).std(axis=0, dtype=np.float64) for own in blocks(x))
    deviations = np.concatenate([np.empty(0), *found])
    varying = deviations > 0  # constant channels, dead or padded, say nothing of alpha
    if not varying.any():
        return None
    low, high = np.percentile(widened(x[:SEARCH_ROWS, varying]), (25, 75), axis=0)
    middle = float(np.median(high - low)) / 1.349  # of a normal distribution
    return middle if middle > 0 else float(np.median(deviations[varying]))


def inverse(parameters: DytParameters, x: Array, y: Array) -> Array:
    """What DyT has to read, in place of x, to give y; channels last.

    Where y is beyond what tanh gives well, an x that is far enough stays, and others go to where
    tanh is `SATURATED`.
    """
    gamma, beta = parameters.gamma, parameters.beta
    wanted = (y - (0.0 if beta is None else beta)) / (1.0 if gamma is None else gamma)
    bound = np.clip(wanted, -SATURATED, SATURATED)
    found = np.arctanh(bound) / parameters.alpha
    far = (bound != wanted) & (np.abs(x) > np.abs(found)) & (np.sign(x) == np.sign(found))
    return np.asarray(np.where(far, x, found), np.float32)


def relative_error(parameters: DytParameters, x: Rows, y: Rows) -> float:
    """||y' - y|| / ||y|| for the values on rows of x and y; 0 where y is 0."""
    shaped = replace(
        parameters,
        gamma=None if parameters.gamma is None else parameters.gamma.ravel(),
        beta=None if parameters.beta is None else parameters.beta.ravel(),
    )
    missed = wanted = 0.0
    for x_part, y_part in parts(x, y):
        missed += _squares(evaluate(shaped, x_part) - y_part)
        wanted += _squares(y_part)
    return sqrt(missed / wanted) if wanted else 0.0


def _squares(array: Array) -> float:
    """The sum of squares."""
    return float(np.square(array, dtype=np.float64).sum())


@dataclass(frozen=True, eq=False)
class _Regression:
    gamma: Statistics
    beta: Statistics
    residue: float


def _parameters(regression: _Regression, alpha: float, squash: str) -> DytParameters:
    return DytParameters(
        alpha=np.array([alpha], np.float32),
        gamma=regression.gamma.astype(np.float32),
        beta=regression.beta.astype(np.float32),
        squash=squash,
    )


def _best_alpha(x: Array, y: Array, scale: float, squash: str, ranks: Ranks) -> float:
    def residue(alpha: float) -> float:
        return _regress(x, y, alpha, squash).residue

    grid = np.geomspace(LOWEST, HIGHEST, COARSE) / scale
    for count in (FINE, 0):
        residues = ranks.spread(residue, grid.tolist())
        best = int(np.argmin(residues))
        if not count:
            break
        grid = np.geomspace(grid[max(best - 1, 0)], grid[min(best + 1, len(grid) - 1)], count)
    return float(grid[best])


def _regress(
    x: Rows, y: Rows, alpha: float, squash: str, rows: npt.NDArray[np.bool_] | None = None
) -> _Regression:
    """Some channels at a time: copies of all would double what a fit takes. rows: those to use."""
    own = slice(None) if rows is None else rows
    found = [_regressed(widened(x[own, c]), widened(y[own, c]), alpha, squash) for c in blocks(x)]
    gamma, beta, residues = map(np.concatenate, zip(*found, strict=True))
    return _Regression(gamma, beta, float(residues.sum()))


def _regressed(x: Array, y: Array, alpha: float, squash: str) -> tuple[Statistics, ...]:
    """Gamma, beta and the residue of each channel."""
    t = SQUASHES[squash](np.float32(alpha) * x)
    mean_t, mean_y = t.mean(axis=0, dtype=np.float64), y.mean(axis=0, dtype=np.float64)
    t -= mean_t.astype(np.float32)  # moments of centred values lose no digits
    centred = y - mean_y.astype(np.float32)
    variance = np.einsum("rc,rc->c", t, t).astype(np.float64) / len(x)
    covariance = np.einsum("rc,rc->c", t, centred).astype(np.float64) / len(x)
    total = np.einsum("rc,rc->c", centred, centred).astype(np.float64) / len(x)
    gamma = covariance / (variance + 1e-10)
    return gamma, mean_y - gamma * mean_t, total - gamma * covariance


def blocks(x: Rows) -> Iterator[slice]:
    """Some channels after the others."""
    return (slice(start, start + BLOCK) for start in range(0, x.shape[1], BLOCK))


def _ranks(keys: Keys, seed: int) -> Keys:
    """Pseudo-random numbers of keys, from a start that the seed is hashed to.

    Hashed, since from the seed itself the next seed would give the same numbers a key later.
    """
    return _mixed(keys + _mixed(np.array([seed % 2**64], np.uint64)))


def _mixed(numbers: Keys) -> Keys:
    """SplitMix64 (Steele, Lea, Flood 2014), one step from each number."""
    with np.errstate(over="ignore"):
        z = (numbers + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray(z ^ (z >> np.uint64(31)))


def _smallest(ranks: Keys, count: int) -> Places:
    if len(ranks) <= count:
        return np.arange(len(ranks))
    return np.sort(np.argpartition(ranks, count)[:count])
