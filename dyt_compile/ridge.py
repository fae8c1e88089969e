"""The full fit: a matrix over the channels of tanh, in closed form from sums of products.

For one site of C channels it takes the sums, 16 C (C + 1) bytes in float64, 4 C^2 for the solution,
and the sample of rows that alpha and the ridge are chosen on; never the data.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from math import ceil, floor, log2
from typing import Any

import numpy as np
import numpy.typing as npt

from .dyt import SQUASHES, DytParameters, Mix
from .fits import CHUNK, HELD_OUT, NOT_FINITE, ROWS, parts, typical, unfit, widened
from .ranks import ALONE, Ranks

__all__ = ["ROWS_PER_CHANNEL", "TRIED", "FullFit", "GramSums", "fit_full", "refit_full"]

Array = npt.NDArray[np.float32]
Floats = npt.NDArray[np.floating[Any]]
Rows = npt.NDArray[Any]
Stream = Iterable[tuple[Rows, Rows]]

LOWEST, HIGHEST = 0.05, 6.0
"""Range of alpha times the typical standard deviation of a channel: with a matrix behind it, tanh
wants a place between linear and bent, and the optimum is flat. The powers of two around it are
tried: values that no data set moves, so that the sums of two runs can be added. (Four times as
many gave the digits ViT an output error of .143 in place of .137, the mean of three seeds.)"""

SLACK = 0.1
"""By which an error may be above the least one for the sake of a larger alpha. The least error of a
site is not that of the model: with 0, .05, .1 and .2 the digits ViT's error at the output was .146,
.121, .121, .117 (mean of three splits), the character GPT's KL .092, .070, .070, .070 (of two)."""

ROWS_PER_CHANNEL = 8
"""Rows of the sample for each channel; with fewer the matrix follows the sample's noise."""

TRIED = 512
"""Channels of y, evenly spaced, on which alpha and the ridge are chosen."""

RIDGES = (1e-4, 1e-3, 1e-2)
"""Parts of a channel's own sum of squares that are added to it."""

FLOOR = 1e-6
"""Part of the mean sum of squares that is added, too: for channels that do not vary."""

BLOCK = 128
"""Unknowns that are solved for at once."""


@dataclass(frozen=True, eq=False)
class FullFit:
    """A bare DyT, what its readers take up, and the relative error of both on held-out rows.

    least: the least error over all alphas, which may be another's. sums: over all rows, of this
    alpha and maybe others.
    """

    parameters: DytParameters
    mix: Mix
    error: float
    least: float
    sums: tuple[GramSums, ...]


class GramSums:
    """Sums of products of squashed alpha x and y in float64, about centres that lose no digits.

    x, y: [rows, channels]. The sums do not depend on how the rows are split into calls, up to the
    rounding of float64.
    """

    def __init__(
        self,
        alpha: float,
        centre_t: npt.ArrayLike,
        centre_y: npt.ArrayLike,
        *,
        squares: Floats | None = None,
        squash: str = "tanh",
    ) -> None:
        """squares: those of other sums, of the same rows of x about the same centre.

        squash: "tanh", or "identity" for sums of x itself, whose alpha is 1.
        """
        self.alpha = alpha
        self.squash = squash
        self.rows = 0
        self._centres = tuple(np.array(c, np.float64) for c in (centre_t, centre_y))
        channels, outputs = map(len, self._centres)
        self._totals = np.zeros(channels), np.zeros(outputs)
        self._known = squares is not None
        self._squares = np.zeros((channels, channels)) if squares is None else squares
        self._products = np.zeros((channels, outputs))

    def add(self, x: Rows, y: Rows) -> None:
        """Count rows in."""
        for x_part, y_part in parts(x, y):
            t = self.values(x_part) - self._centres[0]
            centred = y_part - self._centres[1]
            self.rows += len(t)
            self._totals[0][:] += t.sum(axis=0)
            self._totals[1][:] += centred.sum(axis=0)
            for own in _blocks(len(self._squares)):  # a product of all would be one matrix more
                self._products[own] += t[:, own].T @ centred
                if not self._known:
                    self._add_squares(own, t)

    def _add_squares(self, own: slice, t: Floats) -> None:
        """Those of some channels with the ones before them, on both sides of the diagonal."""
        made = t[:, own].T @ t[:, : own.stop]
        self._squares[own, : own.stop] += made
        self._squares[: own.start, own] += made[:, : own.start].T

    def join(self, ranks: Ranks) -> None:
        """Let the first rank's be the sums of all ranks, which are about the same centres."""
        rows = np.array([self.rows], np.int64)
        ranks.add([rows, *self._totals, self._products, *([] if self._known else [self._squares])])
        self.rows = int(rows[0])

    def values(self, x: Array) -> Array:
        """What stands for x in the products."""
        return _squashed(x, self.alpha, self.squash)

    @property
    def finite(self) -> bool:
        """Whether all rows were."""
        return all(bool(np.isfinite(total).all()) for total in self._totals)

    def united(self, other: GramSums) -> GramSums:
        """The sums over the rows of both, which are of one alpha."""
        total = GramSums(self.alpha, *self._centres, squash=self.squash)
        for part in (self, other):
            apart = [a - b for a, b in zip(part._centres, self._centres, strict=True)]
            (t, y), n = part._totals, part.rows
            total.rows += n
            total._totals[0][:] += t + n * apart[0]
            total._totals[1][:] += y + n * apart[1]
            total._squares += part._squares
            total._products += part._products
            if apart[0].any() or apart[1].any():
                total._squares += np.outer(t, apart[0]) + np.outer(apart[0], t + n * apart[0])
                total._products += np.outer(t, apart[1]) + np.outer(apart[0], y + n * apart[1])
        return total

    def solve(self, ridge: float, *, spent: bool = False) -> Mix:
        """The matrix and the offset of the least squared error plus the ridge, on centred rows.

        spent: in place of the sums, which nobody needs any more.
        """
        means = [total / max(self.rows, 1) for total in self._totals]
        gram = self._squares if spent else self._squares.copy()
        for own in _blocks(len(gram)):
            gram[own] -= np.outer(means[0][own], self._totals[0])
        diagonal = np.diag(gram).copy()
        least = max(FLOOR * diagonal.mean(), np.finfo(np.float64).tiny)
        gram[np.diag_indices_from(gram)] += ridge * diagonal + least
        _factorize(gram)
        matrix = np.empty(self._products.shape, np.float32)
        offset = self._centres[1] + means[1]
        for own in _blocks(matrix.shape[1]):
            columns = self._products[:, own] - np.outer(means[0], self._totals[1][own])
            _solve_lower(gram, columns)
            _solve_upper(gram, columns)
            matrix[:, own] = columns
            offset[own] -= (self._centres[0] + means[0]) @ columns
        return Mix(matrix, offset.astype(np.float32))

    def arrays(self) -> dict[str, npt.NDArray[Any]]:
        """All that it holds, by name; `of_arrays` makes the sums again."""
        return {
            "alpha": np.array([self.alpha]),
            "rows": np.array([self.rows], np.int64),
            "centre_t": self._centres[0],
            "centre_y": self._centres[1],
            "total_t": self._totals[0],
            "total_y": self._totals[1],
            "squares": self._squares,
            "products": self._products,
        }

    @classmethod
    def of_arrays(cls, **held: npt.NDArray[Any]) -> GramSums:
        """The sums that `arrays` told of."""
        sums = cls(float(held["alpha"][0]), held["centre_t"], held["centre_y"])
        sums.rows = int(held["rows"][0])
        sums._totals = held["total_t"], held["total_y"]
        sums._squares, sums._products = held["squares"], held["products"]
        return sums


def fit_full(
    x: Rows,
    y: Rows,
    stream: Callable[[], Stream],
    *,
    beside: bool = False,
    squash: str = "tanh",
    ranks: Ranks = ALONE,
) -> FullFit | str:
    """squash(alpha x) matrix + offset closest to y in squares, alpha one number for all channels.

    x, y: [rows, channels], a sample in random order that `fit_diagonal` has taken; stream:
    all rows, in parts. Alpha and the ridge are chosen on every fourth row of the sample, after a
    fit to the others; matrix and offset are fitted to all rows. beside: sum for the alphas on both
    sides, too, since another run may choose one of them; without it, no sums are kept. squash:
    "tanh", or "identity", where alpha is 1. Returns the reason where some row is not finite. ranks:
    each has a stream of its own; x and y are the first's, and so are the sums.
    """
    start = ranks.first(lambda: _start(x, y, squash, beside))
    if isinstance(start, str):
        return start
    (error, alpha, ridge, least), centres = start
    sums = [GramSums(own, *about, squash=squash) for own, about in centres.items()]
    for x_part, y_part in stream():
        for each in sums:
            each.add(x_part, y_part)
    for each in sums:
        each.join(ranks)
    mix = ranks.first(lambda: sums[0].solve(ridge, spent=not beside) if sums[0].finite else None)
    if mix is None:
        return NOT_FINITE
    return FullFit(_bare(alpha, squash), mix, error, least, tuple(sums) if beside else ())


def refit_full(x: Rows, y: Rows, runs: Sequence[Sequence[GramSums]]) -> FullFit:
    """The full fit to the rows behind the sums of several runs, x and y a sample of all of them.

    Sums of one alpha are added: the fit is that of one run, where that would choose an alpha which
    all have sums for. Where they share none, the run with the most rows stands alone.
    """
    shared = set.intersection(*({part.alpha for part in run} for run in runs))
    if not shared:
        runs = [max(runs, key=lambda run: run[0].rows)]
        shared = {runs[0][0].alpha}
    totals: dict[float, GramSums] = {}
    for part in (part for run in runs for part in run if part.alpha in shared):
        held = totals.get(part.alpha)
        totals[part.alpha] = part if held is None else held.united(part)
    error, alpha, ridge, least = _chosen(x, y, sorted(totals))
    return FullFit(_bare(alpha), totals[alpha].solve(ridge), error, least, tuple(totals.values()))


def _start(
    x: Rows, y: Rows, squash: str, beside: bool
) -> tuple[tuple[float, float, float, float], dict[float, tuple[Array, Array]]] | str:
    """What is chosen on the sample, and the centres of the sums for each alpha, its own first."""
    if reason := unfit(x, y):
        return reason
    alphas = [1.0] if squash == "identity" else _alphas(x)
    chosen = _chosen(x, y, alphas, squash)
    factors = (1.0, 0.5, 2.0) if beside and len(alphas) > 1 else (1.0,)
    return chosen, {f * chosen[1]: _centres(f * chosen[1], x, y, squash) for f in factors}


def _chosen(
    x: Rows, y: Rows, alphas: Sequence[float], squash: str = "tanh"
) -> tuple[float, float, float, float]:
    """The error on held-out rows, the alpha and the ridge that are taken, and the least error.

    From the middle of the alphas downhill, where the error has one valley over them, and up again
    as far as the error stays near the least: a larger alpha bounds what the next sites get.
    """
    channels = y.shape[1]
    tried = np.arange(channels)[:: max(1, ceil(channels / TRIED))]

    @cache
    def best(place: int) -> tuple[float, float, float]:
        alpha = alphas[place]
        sums = _trained(alpha, x, y, tried, squash)
        errors = ((_error(sums.solve(r), alpha, x, y, tried, squash), r) for r in RIDGES)
        error, ridge = min(errors)
        return error, alpha, ridge

    lowest = _valley(lambda place: best(place)[0], len(alphas))
    least, place = best(lowest)[0], lowest
    while place + 1 < len(alphas) and best(place + 1)[0] <= (1 + SLACK) * least:
        place += 1
    error, alpha, ridge = best(place)
    if len(tried) < channels:
        every = np.arange(channels)
        mix = _trained(alpha, x, y, every, squash).solve(ridge, spent=True)
        error = _error(mix, alpha, x, y, every, squash)
    return error, alpha, ridge, least


def _alphas(x: Rows) -> list[float]:
    scale = typical(x[:ROWS]) or 1.0
    first, last = (log2(bound / scale) for bound in (LOWEST, HIGHEST))
    return [2.0**power for power in range(floor(first), ceil(last) + 1)]


def _valley(height: Callable[[int], float], count: int) -> int:
    """The lowest of `count` places, downhill from the one in the middle."""
    place, lowest = -1, count // 2
    while place != lowest:
        place = lowest
        lowest = min((n for n in (place, place - 1, place + 1) if 0 <= n < count), key=height)
    return place


def _trained(
    alpha: float, x: Rows, y: Rows, outputs: npt.NDArray[np.int64], squash: str
) -> GramSums:
    """The sums of some channels of y, over the rows that are not held out."""
    about = _centres(alpha, x, y[:CHUNK, outputs], squash)
    sums = GramSums(alpha, *about, squash=squash)
    for x_part, y_part in parts(x, y):
        kept = np.arange(len(x_part)) % HELD_OUT != 0
        sums.add(x_part[kept], y_part[kept][:, outputs])
    return sums


def _centres(alpha: float, x: Rows, y: Rows, squash: str) -> tuple[Array, Array]:
    """The means of the first rows."""
    first, wanted = widened(x[:CHUNK]), widened(y[:CHUNK])
    return _squashed(first, alpha, squash).mean(axis=0), wanted.mean(axis=0)


def _error(
    mix: Mix, alpha: float, x: Rows, y: Rows, outputs: npt.NDArray[np.int64], squash: str
) -> float:
    """||y' - y|| / ||y|| over some channels of the held-out rows; 0 where y is 0."""
    missed = length = 0.0
    for x_part, y_part in parts(x[::HELD_OUT], y[::HELD_OUT]):
        wanted = y_part[:, outputs]
        missed += float(np.square(mix(_squashed(x_part, alpha, squash)) - wanted).sum())
        length += float(np.square(wanted).sum())
    return float(np.sqrt(missed / length)) if length else 0.0


def _blocks(count: int) -> Iterator[slice]:
    return (slice(start, start + BLOCK) for start in range(0, count, BLOCK))


def _factorize(gram: Floats) -> None:
    """The lower Cholesky factor, in place of the lower half: LAPACK's takes two copies more."""
    for own in _blocks(len(gram)):
        before, after = slice(own.start), slice(own.stop, None)
        gram[own, own] = np.linalg.cholesky(
            gram[own, own] - gram[own, before] @ gram[own, before].T
        )
        below = gram[after, own] - gram[after, before] @ gram[own, before].T
        gram[after, own] = np.linalg.solve(gram[own, own], below.T).T


def _solve_lower(lower: Floats, right: Floats) -> None:
    """lower^-1 right, in place of right."""
    for start in range(0, len(lower), BLOCK):
        own = slice(start, start + BLOCK)
        right[own] -= lower[own, :start] @ right[:start]
        right[own] = np.linalg.solve(lower[own, own], right[own])


def _solve_upper(lower: Floats, right: Floats) -> None:
    """lower^-T right, in place of right."""
    for start in reversed(range(0, len(lower), BLOCK)):
        own, end = slice(start, start + BLOCK), start + BLOCK
        right[own] -= lower[end:, own].T @ right[end:]
        right[own] = np.linalg.solve(lower[own, own].T, right[own])


def _squashed(x: Array, alpha: float, squash: str) -> Array:
    return SQUASHES[squash](np.float32(alpha) * x)


def _bare(alpha: float, squash: str = "tanh") -> DytParameters:
    return DytParameters(np.array([alpha], np.float32), squash=squash)
