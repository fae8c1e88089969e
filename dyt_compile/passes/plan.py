"""Plan: as many sites as the budget holds, by the error measured at the model's output.

A good fit at a site says little about the model, so every step of the plan is measured on samples
that took no part in the fit. Sites are tried from the least sensitive on; the longest affordable
prefix is found by bisection, then later sites are tried one by one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

from ..calibration import Calibration
from ..metrics import Measurement
from ..progress import track

__all__ = ["Attempt", "Plan", "frontier_sizes", "in_order", "plan"]

DEVIATIONS = 1.64 * 2**0.5
"""The error plus so many standard errors must keep the budget: 95 % one-sided, for the difference
of two measurements, since the report samples are no more than the plan samples are."""

PATIENCE = 3
"""Sites that may fail one after another before the search ends."""

FRONTIER = 16
"""Points of a frontier at most."""


@dataclass(frozen=True)
class Attempt:
    """A set of sites converted together: its calibration and its error on the plan samples."""

    names: frozenset[str]
    calibration: Calibration
    measurement: Measurement


@dataclass(frozen=True)
class Plan:
    """Which sites to convert.

    sensitivities: output error with that site alone converted; attempts: sets tried, in order.
    """

    chosen: Attempt | None
    sensitivities: Mapping[str, float]
    attempts: tuple[tuple[int, float], ...] = field(default=())

    @property
    def converted(self) -> frozenset[str]:
        """Names of the sites to convert."""
        return frozenset() if self.chosen is None else self.chosen.names


def plan(
    sensitivities: Mapping[str, float], attempt: Callable[[frozenset[str]], Attempt], budget: float
) -> Plan:
    """The largest set found whose error, plus its uncertainty, is within `budget`.

    sensitivities: sites that can be converted; attempt: calibrates, rewrites and measures a set.
    """
    search = _Search(sensitivities, attempt, budget)
    search.longest_prefix()
    search.stragglers()
    return Plan(search.best, sensitivities, tuple(search.log))


class _Search:
    def __init__(
        self,
        sensitivities: Mapping[str, float],
        attempt: Callable[[frozenset[str]], Attempt],
        budget: float,
    ) -> None:
        self._order = in_order(sensitivities)
        self._sensitivities = sensitivities
        self._attempt = attempt
        self._budget = budget
        self.best: Attempt | None = None
        self.log: list[tuple[int, float]] = []

    def longest_prefix(self) -> None:
        """Bisect for the longest affordable prefix, from where independent errors would put it."""
        low, high, guess = 0, len(self._order) + 1, self._predicted()
        while high - low > 1:
            middle = min(max(guess, low + 1), high - 1)
            if self._affordable(frozenset(self._order[:middle])):
                low, guess = middle, middle + 1
            else:
                high, guess = middle, middle - 1
            if high - low > 4:  # a guess that was far off: halve what is left
                guess = (low + high) // 2

    def stragglers(self) -> None:
        """Add sites behind the prefix one by one, while some still fit."""
        taken = frozenset() if self.best is None else self.best.names
        failures = 0
        # The first one behind the prefix is known to fail: that ended the bisection.
        for name in track(self._order[len(taken) + 1 :], "planning"):
            if failures == PATIENCE or not self._sensitivities[name] <= self._budget:
                return
            if self._affordable(taken | {name}):
                taken, failures = taken | {name}, 0
            else:
                failures += 1

    def _predicted(self) -> int:
        total, count = 0.0, 0
        for name in self._order:
            total += self._sensitivities[name] ** 2
            if not total <= self._budget**2:  # NaN keeps no budget
                break
            count += 1
        return max(count, 1)

    def _affordable(self, names: frozenset[str]) -> bool:
        tried = self._attempt(names)
        self.log.append((len(names), tried.measurement.error))
        kept = tried.measurement.keeps(self._budget, DEVIATIONS)
        if kept and (self.best is None or len(names) > len(self.best.names)):
            self.best = tried
        return kept


def in_order(sensitivities: Mapping[str, float]) -> list[str]:
    """Sites as a plan takes them: the least sensitive first."""
    return sorted(sensitivities, key=lambda name: _rank(sensitivities[name]))


def frontier_sizes(sites: int) -> list[int]:
    """Numbers of sites at which to measure a frontier: all up to `FRONTIER`, else as many or less.

    Each is a calibration of its own. Those of many sites lie closer where there are few, since
    that is where budgets end.
    """
    if sites <= FRONTIER:
        return list(range(1, sites + 1))
    return sorted({round(size) for size in np.geomspace(1, sites, FRONTIER)})


def _rank(sensitivity: float) -> float:
    """What sites are sorted by: NaN, which has no order, comes last."""
    return math.inf if math.isnan(sensitivity) else sensitivity
