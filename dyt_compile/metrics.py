"""How far one output is from another, with the standard error over samples.

Every metric is a ratio of sums over samples, so it pools over batches of any size:
relative  ||f - g|| / ||f||          cosine  1 - mean cosine of the last axis, a position
kl        KL(softmax f, softmax g)   top1    share of positions whose argmax differs
`f` is the original. Positions that an attention mask excludes do not count.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from .errors import OptionError

__all__ = ["METRICS", "Measurement", "Tally", "check_metric"]

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Measurement:
    """An error over `samples` samples, and the standard error of it (delta method)."""

    error: float
    standard_error: float
    samples: int

    def upper(self, deviations: float) -> float:
        """The error plus so many standard errors."""
        return self.error + deviations * self.standard_error


class Tally:
    """Sums of one metric over samples."""

    def __init__(self, metric: str) -> None:
        check_metric(metric)
        self._metric = metric
        self._numerators: list[Array] = []
        self._denominators: list[Array] = []

    def add(
        self,
        original: npt.NDArray[np.generic],
        converted: npt.NDArray[np.generic],
        mask: npt.NDArray[np.bool_] | None = None,
    ) -> None:
        """Count one batch. Shapes [samples, ...], equal; mask [samples, positions], True counts.

        An output without a sample axis (rank 0) counts as one sample.
        """
        f = np.atleast_1d(original).astype(np.float64)
        g = np.atleast_1d(converted).astype(np.float64)
        f, g = f.reshape(len(f), -1, f.shape[-1]), g.reshape(len(g), -1, g.shape[-1])
        counts = np.ones(f.shape[:2])
        if mask is not None and mask.shape == f.shape[:2]:
            counts = mask.astype(np.float64)
        numerators, denominators = METRICS[self._metric](f, g)
        self._numerators.append((numerators * counts).sum(axis=1))
        self._denominators.append((denominators * counts).sum(axis=1))

    def measurement(self) -> Measurement:
        """The pooled error and its standard error; an error of nothing is 0."""
        if not self._numerators:
            return Measurement(0.0, 0.0, 0)
        numerators = np.concatenate(self._numerators)
        denominators = np.concatenate(self._denominators)
        total, samples = denominators.sum(), len(numerators)
        ratio = float(numerators.sum() / total) if total else 0.0
        residues = numerators - ratio * denominators
        spread = 0.0
        if samples > 1 and total:
            spread = math.sqrt(samples / (samples - 1) * float(residues @ residues)) / float(total)
        if self._metric != "relative":
            return Measurement(ratio, spread, samples)
        root = math.sqrt(ratio)
        return Measurement(root, spread / (2 * root) if root else 0.0, samples)


def check_metric(metric: str) -> None:
    """Raise OptionError unless the metric is known."""
    if metric not in METRICS:
        raise OptionError(f"metric is {metric!r}; allowed: {', '.join(METRICS)}")


def _relative(f: Array, g: Array) -> tuple[Array, Array]:
    return ((f - g) ** 2).sum(axis=-1), (f * f).sum(axis=-1)


def _cosine(f: Array, g: Array) -> tuple[Array, Array]:
    lengths = np.linalg.norm(f, axis=-1) * np.linalg.norm(g, axis=-1)
    cosine = (f * g).sum(axis=-1) / np.where(lengths == 0, 1.0, lengths)
    return 1.0 - cosine, np.ones(cosine.shape)


def _kl(f: Array, g: Array) -> tuple[Array, Array]:
    p, q = _log_softmax(f), _log_softmax(g)
    return (np.exp(p) * (p - q)).sum(axis=-1), np.ones(f.shape[:-1])


def _top1(f: Array, g: Array) -> tuple[Array, Array]:
    differs = f.argmax(axis=-1) != g.argmax(axis=-1)
    return differs.astype(np.float64), np.ones(differs.shape)


def _log_softmax(x: Array) -> Array:
    shifted = x - x.max(axis=-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True)))


METRICS: dict[str, Callable[[Array, Array], tuple[Array, Array]]] = {
    "relative": _relative,
    "cosine": _cosine,
    "kl": _kl,
    "top1": _top1,
}
"""Numerators and denominators by sample and position; inputs [samples, positions, channels]."""
