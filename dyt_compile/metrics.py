"""How far one output is from another, with the standard error over samples.

Every metric is a ratio of sums over samples, so it pools over batches of any size:
relative  ||f - g|| / ||f||          cosine  1 - mean cosine of the last axis, a position
kl        KL(softmax f, softmax g)   top1    share of positions whose argmax differs
`f` is the original. Positions that an attention mask excludes do not count. Where the converted
output holds NaN or infinity and the original does not, the error is infinite in every metric.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from .errors import DataError, OptionError

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

        An output of rank 1 is one number a sample; one without a sample axis counts as one sample.
        Raises DataError where the shapes differ.
        """
        if original.shape != converted.shape:
            raise DataError(
                f"the outputs differ in shape: the original's is {original.shape}, "
                f"the converted's {converted.shape}"
            )
        f, g = _positions(original), _positions(converted)
        counts = np.ones(f.shape[:2], np.bool_)
        if mask is not None and mask.shape == f.shape[:2]:
            counts = mask
        with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
            numerators, denominators = METRICS[self._metric](f, g)
        numerators = _spoilt(f, g, numerators)
        # Not a product: what is masked may be NaN.
        self._numerators.append(np.where(counts, numerators, 0.0).sum(axis=1))
        self._denominators.append(np.where(counts, denominators, 0.0).sum(axis=1))

    def measurement(self) -> Measurement:
        """The pooled error and its standard error.

        An error of nothing is 0; one that is not finite has a standard error of NaN.
        """
        if not self._numerators:
            return Measurement(0.0, 0.0, 0)
        numerators = np.concatenate(self._numerators)
        denominators = np.concatenate(self._denominators)
        samples = len(numerators)
        missed, total = float(numerators.sum()), float(denominators.sum())
        if total == 0.0:
            missed, total = (math.inf if missed else 0.0), 1.0
        ratio = missed / total
        if not math.isfinite(ratio):
            return Measurement(ratio, math.nan, samples)
        residues = numerators - ratio * denominators
        spread = 0.0
        if samples > 1:
            spread = math.sqrt(samples / (samples - 1) * float(residues @ residues)) / total
        if self._metric != "relative":
            return Measurement(ratio, spread, samples)
        root = math.sqrt(ratio)
        return Measurement(root, spread / (2 * root) if root else 0.0, samples)


def check_metric(metric: str) -> None:
    """Raise OptionError unless the metric is known."""
    if metric not in tuple(METRICS):  # a tuple takes what cannot be hashed too
        raise OptionError(f"metric is {metric!r}; allowed: {', '.join(METRICS)}")


def _positions(output: npt.NDArray[np.generic]) -> Array:
    """An output as [samples, positions, channels]."""
    wide = np.atleast_1d(output).astype(np.float64)
    if wide.ndim == 1:
        wide = wide[:, None]
    return wide.reshape(len(wide), math.prod(wide.shape[1:-1]), wide.shape[-1])


def _spoilt(f: Array, g: Array, numerators: Array) -> Array:
    """The numerators, infinite where only `g` is not finite, NaN where `f` is NaN.

    Not left to the metrics: an argmax takes NaN for a value like any other.
    """
    unknown = np.isnan(f)
    lost = (np.isfinite(f) & ~np.isfinite(g)) | (~unknown & np.isnan(g))
    spoilt = np.where(lost.any(axis=-1), math.inf, numerators)
    return np.where(unknown.any(axis=-1), math.nan, spoilt)


def _relative(f: Array, g: Array) -> tuple[Array, Array]:
    return ((f - g) ** 2).sum(axis=-1), (f * f).sum(axis=-1)


def _cosine(f: Array, g: Array) -> tuple[Array, Array]:
    lengths = np.linalg.norm(f, axis=-1) * np.linalg.norm(g, axis=-1)
    cosine = (f * g).sum(axis=-1) / np.where(lengths == 0, 1.0, lengths)
    both_zero = ~(f.any(axis=-1) | g.any(axis=-1))  # equal, and without a direction
    return np.where(both_zero, 0.0, 1.0 - cosine), np.ones(cosine.shape)


def _kl(f: Array, g: Array) -> tuple[Array, Array]:
    p, q = _log_softmax(f), _log_softmax(g)
    shares = np.exp(p)
    # A class without probability adds nothing, whatever its logits: 0 log 0 is 0.
    return np.where(shares == 0, 0.0, shares * (p - q)).sum(axis=-1), np.ones(f.shape[:-1])


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
