"""Some inputs and outputs of a site, to draw: output against input, with the fitted curve."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from .dyt import DytParameters
from .fits import blocks, widened

__all__ = ["CHANNELS", "TOKENS", "Scatter", "scatter"]

Array = npt.NDArray[np.float32]
Rows = npt.NDArray[Any]

TOKENS = CHANNELS = 32
"""At most so many of each: two float32 arrays of 32 × 32, about 9 KiB a site with their edges."""


@dataclass(frozen=True, eq=False)
class Scatter:
    """Inputs and outputs of a site before its affine part, as in arXiv 2503.10622, figures 2 and 4.

    x: float32 [tokens, channels], what the site reads; y: the same shape, what the original's norm
    gave, gamma and beta taken off: (norm(x) - beta) / gamma.
    sigma: float32 [tokens], what the norm divides each token by, rising.
    channels: int64 [channels], their places along the (flattened) channel axes, from the channel of
    smallest to that of largest root mean square.
    fitted: the fit in the units of y, with a gamma and a beta of [channels]; None without a fit.
    """

    x: Array
    y: Array
    sigma: Array
    channels: npt.NDArray[np.int64]
    fitted: DytParameters | None = None


def scatter(
    x: Rows,
    y: Rows,
    sigma: npt.NDArray[np.floating],
    parameters: DytParameters | None,
    affine: tuple[Array, Array],
) -> Scatter | None:
    """Tokens and channels evenly over their ranks by size, the smallest and the largest included.

    x, y: [rows, channels]; sigma: [rows]; affine: gamma and beta of the norm, [channels].
    A gamma of 0 hides its channel. None where nothing is left, or not all is finite. Which tokens
    and channels are taken does not depend on the order of the rows.
    """
    gamma, beta = affine
    seen = np.flatnonzero(gamma)
    if not len(x) or not len(seen):
        return None
    sizes, others = map(_sizes, (x, y))
    if not (np.isfinite(sizes).all() and np.isfinite(others).all()):
        return None
    channels = seen[_spread(sizes[seen], CHANNELS)]
    tokens = _spread(sigma, TOKENS)
    gamma, beta = gamma[channels], beta[channels]
    place = np.ix_(tokens, channels)
    return Scatter(
        x=widened(x[place]),
        y=(widened(y[place]) - beta) / gamma,
        sigma=sigma[tokens].astype(np.float32),
        channels=channels,
        fitted=None if parameters is None else _before(parameters, channels, gamma, beta),
    )


def _before(
    parameters: DytParameters, channels: npt.NDArray[np.int64], gamma: Array, beta: Array
) -> DytParameters:
    """The fit at some channels, with the norm's own gamma and beta taken off."""

    def at(value: Array | None, neutral: float) -> Array:
        array = np.full(1, neutral, np.float32) if value is None else value.ravel()
        return array[channels] if len(array) > 1 else array

    return replace(
        parameters,
        gamma=at(parameters.gamma, 1.0) / gamma,
        beta=(at(parameters.beta, 0.0) - beta) / gamma,
    )


def _sizes(rows: Rows) -> npt.NDArray[np.float64]:
    """The length of each channel, not finite where one of its numbers is not."""
    found = (np.square(widened(rows[:, own]), dtype=np.float64) for own in blocks(rows))
    return np.asarray(np.sqrt(np.concatenate([squares.sum(axis=0) for squares in found])))


def _spread(sizes: npt.NDArray[np.floating], count: int) -> npt.NDArray[np.int64]:
    """Places of `count` sizes at even distances in their order, both ends among them."""
    order = np.argsort(sizes, kind="stable")
    places = np.linspace(0, len(order) - 1, min(count, len(order))).round().astype(np.int64)
    return np.asarray(order[places])
