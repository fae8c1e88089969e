"""How far one output is from another, with the standard error over samples.

Every metric is a ratio of sums over samples, so it pools over batches of any size:
relative  ||f - g|| / ||f||          cosine  1 - mean cosine of the last axis, a position
kl        KL(softmax f, softmax g)   top1    share of positions whose argmax differs
`f` is the original. Positions that an attention mask excludes do not count. Where the converted
output holds NaN or infinity and the original does not, the error is infinite in every metric.

A metric may also be the user's own function, `Score`; its error is the mean over samples of the
original's score minus the converted model's, in the score's own units; below 0 where it gained.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from .errors import DataError, OptionError, first_line
from .ranks import Ranks

__all__ = [
    "METRICS", "Measurement", "Metric", "Score", "Tally", "check_metric", "described", "named",
]  # fmt: skip

Array = npt.NDArray[np.float64]
Score = Callable[
    [npt.NDArray[Any], Mapping[str, npt.NDArray[Any]], npt.NDArray[np.int64]], npt.ArrayLike
]
"""score(output, inputs, places) -> [samples]: one number a sample, higher is better.

output: of the model for some samples, [samples, ...], float32 or wider. inputs: what it was given,
by input name. places: of these samples among all of the data, counted from 0 in the
order of the batches, to look up their labels by. It is called with the original's and with the
converted model's output for the same samples, in batches of any size.
"""
Metric = str | Score


@dataclass(frozen=True)
class Measurement:
    """An error over `samples` samples, and the standard error of it (delta method).

    growth: the power of the error with which its standard error grows: 1 where samples differ by
    a factor (relative, cosine, kl), 1/2 for shares (top1), 0 where neither is known. least: a
    standard error below which no budget is held against it.
    """

    error: float
    standard_error: float
    samples: int
    growth: float = field(default=0.0, compare=False)
    least: float = field(default=0.0, compare=False)

    def keeps(self, budget: float, deviations: float) -> bool:
        """Whether the error, plus so many standard errors, is within the budget.

        The standard error is that of an error as large as the budget (a score test, as Wilson's
        interval of a share): samples that happen to miss the few bad ones show too small an error
        and too small a standard error. NaN keeps none.
        """
        return self.upper(budget, deviations) <= budget

    def upper(self, budget: float, deviations: float) -> float:
        """The error plus so many of the standard errors that `keeps` counts."""
        return self.error + deviations * self._standard_error_at(budget)

    def _standard_error_at(self, budget: float) -> float:
        if self.growth == 0.5 and self.error == 0:  # of 0 in n, a share's own tells nothing
            return math.sqrt(budget / max(self.samples, 1))
        if self.growth == 0 or not 0 < self.error < budget:
            return max(self.standard_error, self.least)
        return float(self.standard_error * (budget / self.error) ** self.growth)


class Tally:
    """Sums of one metric over samples."""

    def __init__(self, metric: Metric) -> None:
        check_metric(metric, own=True)
        self._metric = metric
        self._numerators: list[Array] = []
        self._denominators: list[Array] = []
        self._scores: list[Array] = []

    def add(
        self,
        original: npt.NDArray[np.generic],
        converted: npt.NDArray[np.generic],
        mask: npt.NDArray[np.bool_] | None = None,
        inputs: Mapping[str, npt.NDArray[Any]] | None = None,
        places: npt.NDArray[np.int64] | None = None,
    ) -> None:
        """Count one batch. Shapes [samples, ...], equal; mask [samples, positions], True counts.

        An output of rank 1 is one number a sample; one without a sample axis counts as one sample.
        inputs, places: for a `Score`, which no mask keeps from any position.
        Raises DataError where the shapes differ, OptionError where a `Score` fails.
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
        if not isinstance(self._metric, str):
            given = (inputs or {}, np.arange(len(f)) if places is None else places)
            scores, loss = _loss(self._metric, original, converted, given)
            self._scores.append(scores)
            lost = np.where(counts, _spoilt(f, g, np.zeros(f.shape[:2])), 0.0).sum(axis=1)
            self._numerators.append(loss + (lost if len(lost) == len(loss) else lost.sum()))
            self._denominators.append(np.ones(len(loss)))
            return
        with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
            numerators, denominators = METRICS[self._metric](f, g)
        numerators = _spoilt(f, g, numerators)
        # Not a product: what is masked may be NaN.
        self._numerators.append(np.where(counts, numerators, 0.0).sum(axis=1))
        self._denominators.append(np.where(counts, denominators, 0.0).sum(axis=1))

    def join(self, ranks: Ranks) -> None:
        """Count in what the other ranks have counted."""
        for sums in (self._numerators, self._denominators, self._scores):
            sums[:] = [part for parts in ranks.gathered(sums) for part in parts]

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
        growth = GROWTH.get(self._metric, 0.0) if isinstance(self._metric, str) else 0.0
        residues = numerators - ratio * denominators
        spread = 0.0
        if samples > 1:
            spread = math.sqrt(samples / (samples - 1) * float(residues @ residues)) / total
        least = 0.0
        if self._scores:  # the next sample may lose all that scores differ by
            least = float(np.ptp(np.concatenate(self._scores))) / samples
        if self._metric != "relative":
            return Measurement(ratio, spread, samples, growth, least)
        root = math.sqrt(ratio)
        return Measurement(root, spread / (2 * root) if root else 0.0, samples, growth)


def check_metric(metric: Any, *, own: bool = False) -> None:
    """Raise OptionError unless the metric is known, or a function where `own` ones are allowed."""
    if own and callable(metric):
        return
    if metric not in tuple(METRICS):  # a tuple takes what cannot be hashed too
        more = ", or a function" if own else ""
        raise OptionError(f"metric is {metric!r}; allowed: {', '.join(METRICS)}{more}")


def named(metric: Metric) -> str:
    """What a report calls the metric: a function by its name."""
    return metric if isinstance(metric, str) else getattr(metric, "__name__", repr(metric))


def described(name: str) -> str:
    """What an error in the metric of that name is called in a sentence."""
    return f"{name} error" if name in METRICS else f"loss of {name}"


def _loss(
    score: Score,
    original: npt.NDArray[Any],
    converted: npt.NDArray[Any],
    given: tuple[Mapping[str, npt.NDArray[Any]], npt.NDArray[np.int64]],
) -> tuple[Array, Array]:
    """The original's scores, and how much each falls: infinitely where none is left."""
    before, after = (_scores(score, output, given) for output in (original, converted))
    if not np.isfinite(before).all():
        place = int(given[1][~np.isfinite(before)][0])
        raise OptionError(
            f"metric {named(score)} of the original is {before[~np.isfinite(before)][0]} for "
            f"sample {place}; allowed: finite numbers"
        )
    return before, np.where(np.isfinite(after), before - after, math.inf)


def _scores(score: Score, output: npt.NDArray[Any], given: tuple[Any, Any]) -> Array:
    """The scores of one output, [samples]."""
    samples = len(given[1])
    wide = output.astype(np.float32) if output.dtype.itemsize < 4 else output
    try:
        found = score(wide, *given)
    except Exception as error:
        raise OptionError(
            f"metric {named(score)} raised {type(error).__name__}: {first_line(error)}"
        ) from error
    try:
        scores = np.asarray(found, np.float64)
    except (TypeError, ValueError):
        scores = np.empty(0)
    if scores.shape != (samples,):
        shape = getattr(found, "shape", None)
        told = f"a {type(found).__name__}" + ("" if shape is None else f" of shape {tuple(shape)}")
        raise OptionError(
            f"metric {named(score)} returned {told}; allowed: one number for each sample, here "
            f"shape ({samples},)"
        )
    return scores


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


GROWTH = {"relative": 1.0, "cosine": 1.0, "kl": 1.0, "top1": 0.5}
"""How the standard errors grow with the errors, as in `Measurement`."""

METRICS: dict[str, Callable[[Array, Array], tuple[Array, Array]]] = {
    "relative": _relative,
    "cosine": _cosine,
    "kl": _kl,
    "top1": _top1,
}
"""Numerators and denominators by sample and position; inputs [samples, positions, channels]."""
