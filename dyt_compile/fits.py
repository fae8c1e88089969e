"""Closed-form fits of DyT to a norm's inputs and outputs, in NumPy: one fit for every world."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from .dyt import DytParameters, evaluate

__all__ = ["ROWS", "Fit", "RowSample", "fit_diagonal", "inverse", "relative_error"]

Array = npt.NDArray[np.float32]
Statistics = npt.NDArray[np.float64]

ROWS = 6144
"""Rows that a fit uses; more change the output error by less than its spread over seeds."""

SEARCH_ROWS = 2048
"""Rows on which alpha is searched; gamma and beta take all rows of the sample."""

HELD_OUT = 4
"""Every fourth row of the sample is held out to measure the fit error."""

COARSE, LOWEST, HIGHEST = 28, 0.02, 20.0
"""Log-spaced values of alpha times the typical standard deviation of a channel."""

SATURATED = 0.98
"""Beyond, the inverse of tanh says little: its slope is under 0.04."""

FINE = 11
"""Values of alpha between the neighbours of the best coarse one."""


@dataclass(frozen=True, eq=False)
class Fit:
    """Fitted values and their relative error on held-out rows: ||y' - y|| / ||y||."""

    parameters: DytParameters
    error: float


class RowSample:
    """A uniform sample of at most `limit` rows of a stream, whatever its batches.

    A row's rank depends on its place in the stream and the seed alone.
    """

    def __init__(self, seed: int, limit: int = ROWS) -> None:
        self._seed = seed
        self._limit = limit
        self._seen = 0
        self._ranks = np.empty(0, np.uint64)
        self._x: list[Array] = []
        self._y: list[Array] = []

    def add(self, x: Array, y: Array) -> None:
        """Offer rows: x and y of shape [rows, channels]."""
        ranks = _ranks(np.arange(self._seen, self._seen + len(x), dtype=np.uint64), self._seed)
        self._seen += len(x)
        chosen = _smallest(np.concatenate([self._ranks, ranks]), self._limit)
        old, new = chosen[chosen < len(self._ranks)], chosen[chosen >= len(self._ranks)]
        new = new - len(self._ranks)
        self._x = [*(a[old] for a in self._x), x[new]]
        self._y = [*(a[old] for a in self._y), y[new]]
        self._x, self._y = [np.concatenate(self._x)], [np.concatenate(self._y)]
        self._ranks = np.concatenate([self._ranks[old], ranks[new]])

    def rows(self) -> tuple[Array, Array]:
        """The sampled x and y, in an order that the batches have no part in."""
        order = np.argsort(self._ranks, kind="stable")
        return self._x[0][order], self._y[0][order]


def fit_diagonal(x: Array, y: Array) -> Fit | str:
    """gamma * tanh(alpha * x) + beta closest to y in squares, alpha one number for all channels.

    x, y: float32 [rows, channels]. For each alpha, gamma and beta are the regression of y on
    tanh(alpha x), channel by channel. Returns the reason where there is nothing to fit.
    """
    if len(x) < 2 * HELD_OUT:
        return f"{len(x)} rows of activations are too few to fit; at least {2 * HELD_OUT}"
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        return "its activations hold NaN or infinity"
    deviations = x.std(axis=0, dtype=np.float64)
    varying = deviations[deviations > 0]  # constant channels, dead or padded, say nothing of alpha
    if not len(varying):
        return "its input does not vary over the data"
    alpha = _best_alpha(x[:SEARCH_ROWS], y[:SEARCH_ROWS], float(np.median(varying)))
    held = np.arange(len(x)) % HELD_OUT == 0
    trial = _regress(x[~held], y[~held], alpha)
    error = relative_error(_parameters(alpha, trial), x[held], y[held])
    return Fit(_parameters(alpha, _regress(x, y, alpha)), error)


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


def relative_error(parameters: DytParameters, x: Array, y: Array) -> float:
    """||y' - y|| / ||y|| for the values on rows of x and y; 0 where y is 0."""
    shaped = replace(
        parameters,
        gamma=None if parameters.gamma is None else parameters.gamma.ravel(),
        beta=None if parameters.beta is None else parameters.beta.ravel(),
    )
    length = float(np.linalg.norm(y))
    return float(np.linalg.norm(evaluate(shaped, x) - y)) / length if length else 0.0


@dataclass(frozen=True, eq=False)
class _Regression:
    gamma: Statistics
    beta: Statistics
    residue: float


def _parameters(alpha: float, regression: _Regression) -> DytParameters:
    return DytParameters(
        alpha=np.array([alpha], np.float32),
        gamma=regression.gamma.astype(np.float32),
        beta=regression.beta.astype(np.float32),
    )


def _best_alpha(x: Array, y: Array, scale: float) -> float:
    grid = np.geomspace(LOWEST, HIGHEST, COARSE) / scale
    for count in (FINE, 0):
        residues = [_regress(x, y, float(alpha)).residue for alpha in grid]
        best = int(np.argmin(residues))
        if not count:
            break
        grid = np.geomspace(grid[max(best - 1, 0)], grid[min(best + 1, len(grid) - 1)], count)
    return float(grid[best])


def _regress(x: Array, y: Array, alpha: float) -> _Regression:
    t = np.tanh(np.float32(alpha) * x)
    mean_t, mean_y = t.mean(axis=0, dtype=np.float64), y.mean(axis=0, dtype=np.float64)
    t -= mean_t.astype(np.float32)  # moments of centred values lose no digits
    centred = y - mean_y.astype(np.float32)
    variance = np.einsum("rc,rc->c", t, t).astype(np.float64) / len(x)
    covariance = np.einsum("rc,rc->c", t, centred).astype(np.float64) / len(x)
    total = np.einsum("rc,rc->c", centred, centred).astype(np.float64) / len(x)
    gamma = covariance / (variance + 1e-10)
    return _Regression(gamma, mean_y - gamma * mean_t, float((total - gamma * covariance).sum()))


def _ranks(places: npt.NDArray[np.uint64], seed: int) -> npt.NDArray[np.uint64]:
    """Pseudo-random numbers of places, from a start that the seed is hashed to.

    Hashed, since from the seed itself the next seed would give the same numbers a place later.
    """
    return _mixed(places + _mixed(np.array([seed % 2**64], np.uint64)))


def _mixed(numbers: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """SplitMix64 (Steele, Lea, Flood 2014), one step from each number."""
    with np.errstate(over="ignore"):
        z = (numbers + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray(z ^ (z >> np.uint64(31)))


def _smallest(ranks: npt.NDArray[np.uint64], count: int) -> npt.NDArray[np.int64]:
    if len(ranks) <= count:
        return np.arange(len(ranks))
    return np.sort(np.argpartition(ranks, count)[:count])
