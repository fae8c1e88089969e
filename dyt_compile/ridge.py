"""The full fit: a matrix over the channels of tanh, in closed form from sums of products.

For one site of C channels it holds the sums, 8 (2 C^2 + 2 C) bytes in float64, as many again while
it solves for them, and the sample of rows that alpha and the ridge are chosen on; never the data.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from .dyt import DytParameters, Mix, Refit
from .fits import HELD_OUT

__all__ = ["ROWS_PER_CHANNEL", "FullFit", "GramSums", "RefitSums", "fit_full"]

Array = npt.NDArray[np.float32]
Sums = npt.NDArray[np.float64]
Rows = Iterable[tuple[Array, Array]]

ALPHAS, LOWEST, HIGHEST = 9, 0.05, 6.0
"""Log-spaced values of alpha times the typical standard deviation of a channel: with a matrix
behind it, tanh wants a place between linear and bent, and the optimum is flat."""

ROWS_PER_CHANNEL = 8
"""Rows of the sample for each channel; with fewer the matrix follows the sample's noise."""

RIDGES = (1e-4, 1e-3, 1e-2)
"""Parts of a channel's own sum of squares that are added to it."""

REFIT_RIDGES = (1e-2, 1e-1, 1.0)
"""The same for a projection, which is drawn towards the weight that it has."""

FLOOR = 1e-6
"""Part of the mean sum of squares that is added, too: for channels that do not vary."""


@dataclass(frozen=True, eq=False)
class FullFit:
    """A bare DyT, what its readers take up, and the relative error of both on held-out rows."""

    parameters: DytParameters
    mix: Mix
    error: float


class GramSums:
    """Sums of products of rows t and y in float64, about fixed centres so that no digits are lost.

    t, y: [rows, channels]. The sums do not depend on how the rows are split into calls, up to the
    rounding of float64.
    """

    def __init__(
        self, centre_t: Array | Sums, centre_y: Array | Sums, like: GramSums | None = None
    ) -> None:
        """like: complete sums of the same rows of t, whose squares are taken over."""
        self._centres = centre_t.astype(np.float64), centre_y.astype(np.float64)
        channels, outputs = len(centre_t), len(centre_y)
        self._rows = 0
        self._sums = np.zeros(channels), np.zeros(outputs)
        self._shared = like is not None
        self._squares: Sums = np.zeros((channels, channels)) if like is None else like._squares
        self._products = np.zeros((channels, outputs))
        self._length = 0.0

    def add(self, t: Array, y: Array) -> None:
        """Count rows in."""
        centred_t, centred_y = t - self._centres[0], y - self._centres[1]
        self._rows += len(t)
        self._sums[0][:] += centred_t.sum(axis=0)
        self._sums[1][:] += centred_y.sum(axis=0)
        if not self._shared:
            self._squares += centred_t.T @ centred_t
        self._products += centred_t.T @ centred_y
        self._length += float(np.einsum("ro,ro->", centred_y, centred_y))

    @property
    def total(self) -> float:
        """Sum over all rows of y^2."""
        centre = self._centres[1]
        return float(self._length + 2 * centre @ self._sums[1] + self._rows * centre @ centre)

    def __add__(self, other: GramSums) -> GramSums:
        """The sums over the rows of both, which have the same centres."""
        both = GramSums(*self._centres)
        for part in (self, other):
            both._rows += part._rows
            both._sums[0][:] += part._sums[0]
            both._sums[1][:] += part._sums[1]
            both._squares += part._squares
            both._products += part._products
            both._length += part._length
        return both

    def squared_error(self, mix: Mix) -> float:
        """Sum over all rows of (t matrix + offset - y)^2."""
        matrix = mix.matrix.astype(np.float64)
        shift = mix.offset + self._centres[0] @ matrix - self._centres[1]
        bent = np.einsum("io,io->", matrix, self._squares @ matrix - 2 * self._products)
        left = self._sums[1] - self._sums[0] @ matrix
        return float(self._length + bent - 2 * shift @ left + self._rows * shift @ shift)

    def solve(self, ridge: float) -> Mix:
        """The matrix and the offset of the least squared error plus the ridge, on centred rows."""
        means = [total / max(self._rows, 1) for total in self._sums]
        gram = self._squares - self._rows * np.outer(means[0], means[0])
        products = self._products - self._rows * np.outer(means[0], means[1])
        diagonal = np.diag(gram).copy()
        gram[np.diag_indices_from(gram)] += ridge * diagonal + FLOOR * diagonal.mean()
        matrix = np.linalg.solve(gram, products)
        offset = self._centres[1] + means[1] - (self._centres[0] + means[0]) @ matrix
        return Mix(matrix.astype(np.float32), offset.astype(np.float32))


def fit_full(x: Array, y: Array, stream: Callable[[], Rows]) -> FullFit:
    """tanh(alpha x) matrix + offset closest to y in squares, alpha one number for all channels.

    x, y: float32 [rows, channels], a sample in random order that `fit_diagonal` has taken; stream:
    all rows, in parts. Alpha and the ridge are chosen on every fourth row of the sample, after a
    fit to the others; matrix and offset are fitted to all rows.
    """
    held = np.arange(len(x)) % HELD_OUT == 0
    trials = [
        (_error(mix, _squashed(x[held], alpha), y[held]), alpha, ridge)
        for alpha in _alphas(x)
        for ridge, mix in _mixes(_squashed(x[~held], alpha), y[~held])
    ]
    error, alpha, ridge = min(trials)
    sums = GramSums(_squashed(x, alpha).mean(axis=0), y.mean(axis=0))
    for x_part, y_part in stream():
        sums.add(_squashed(x_part, alpha), y_part)
    return FullFit(DytParameters(np.array([alpha], np.float32)), sums.solve(ridge), error)


class RefitSums:
    """The sums from which a projection is refitted, those of every fourth row apart."""

    def __init__(self, like: RefitSums | None = None) -> None:
        """like: sums of the same rows of x, added in the same parts; their products are shared."""
        self._like = like
        self._parts: tuple[GramSums, GramSums] | None = None
        self._rows = 0
        self._wanted = 0.0

    def add(self, x: Array, y: Array, missing: Array) -> None:
        """Count rows in. x: input; y: output wanted; missing: that, less the output of now."""
        if self._parts is None:
            centres = x.mean(axis=0), missing.mean(axis=0)
            likes = (None, None) if self._like is None else self._like._parts or (None, None)
            self._parts = GramSums(*centres, likes[0]), GramSums(*centres, likes[1])
        held = (self._rows + np.arange(len(x))) % HELD_OUT == 0
        self._rows += len(x)
        self._wanted += float(np.square(y[held], dtype=np.float64).sum())
        for sums, rows in zip(self._parts, (~held, held), strict=True):
            sums.add(x[rows], missing[rows])

    def solve(self) -> Refit | None:
        """The refit with the ridge that does best on held-out rows; None where none helps."""
        if self._parts is None or not self._wanted > 0:
            return None
        fitted, held = self._parts
        before = held.total
        errors = {ridge: held.squared_error(fitted.solve(ridge)) for ridge in REFIT_RIDGES}
        ridge = min(errors, key=errors.__getitem__)
        if not errors[ridge] < before:
            return None
        relative = [(max(error, 0.0) / self._wanted) ** 0.5 for error in (before, errors[ridge])]
        return Refit((fitted + held).solve(ridge), *relative)


def _alphas(x: Array) -> list[float]:
    deviations = x.std(axis=0, dtype=np.float64)
    typical = float(np.median(deviations[deviations > 0]))
    return [float(alpha) for alpha in np.geomspace(LOWEST, HIGHEST, ALPHAS) / typical]


def _mixes(t: Array, y: Array) -> Iterator[tuple[float, Mix]]:
    sums = GramSums(t.mean(axis=0), y.mean(axis=0))
    sums.add(t, y)
    return ((ridge, sums.solve(ridge)) for ridge in RIDGES)


def _squashed(x: Array, alpha: float) -> Array:
    return np.asarray(np.tanh(np.float32(alpha) * x))


def _error(mix: Mix, t: Array, y: Array) -> float:
    length = float(np.linalg.norm(y))
    return float(np.linalg.norm(mix(t) - y)) / length if length else 0.0
