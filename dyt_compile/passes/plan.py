"""Plan: as many sites as the budget holds, by the error measured at the model's output.

A good fit at a site says little about the model, so every step of the plan is measured on samples
that took no part in the fit. Sites are tried from the least sensitive on; the longest affordable
prefix is found by bisection, then later sites are tried one by one. Where a site may become an
affine map, too, that is a step of its own, ordered by what it adds to the error for what it gains.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Generic, Protocol, TypeVar

import numpy as np

from ..calibration import Calibration
from ..metrics import Measurement
from ..progress import track

__all__ = [
    "Attempt", "Choice", "Plan", "Step", "Tried", "frontier_sizes", "in_order", "largest", "plan",
]  # fmt: skip

DEVIATIONS = 1.64 * 2**0.5
"""The error plus so many standard errors must keep the budget: 95 % one-sided, for the difference
of two measurements, since the report samples are no more than the plan samples are."""

PATIENCE = 3
"""Sites that may fail one after another before the search ends."""

FRONTIER = 16
"""Points of a frontier at most."""


@dataclass(frozen=True)
class Choice:
    """Sites to convert; affine: those of them that become an affine map, the others DyT."""

    names: frozenset[str] = frozenset()
    affine: frozenset[str] = frozenset()

    @property
    def gain(self) -> int:
        """What is gained: of a site with DyT the norm, of an affine one its one operator, too."""
        return len(self.names) + len(self.affine)

    def after(self, steps: Iterable[Step]) -> Choice:
        """The choice with some steps taken."""
        taken = list(steps)
        names = self.names.union(step.name for step in taken)
        return Choice(names, self.affine.union(step.name for step in taken if step.affine))


@dataclass(frozen=True)
class Step:
    """A site becomes DyT, or an affine map. error: at the output, of that site alone so converted.

    gain: what it is worth, of a site as of `Choice`, once the steps before are taken; 0 for DyT in
    place of an affine map that was too much. rank: the root of what it adds to the squared error
    for each unit of gain; errors of several sites add in squares.
    """

    name: str
    affine: bool
    error: float
    gain: int
    rank: float


class Tried(Protocol):
    """A choice, of sites or of what else is named, and the error measured with it."""

    @property
    def choice(self) -> Choice: ...

    @property
    def measurement(self) -> Measurement: ...


Found = TypeVar("Found", bound=Tried)


@dataclass(frozen=True)
class Attempt:
    """Sites converted together: their calibration, and the error on the plan samples."""

    choice: Choice
    calibration: Calibration
    measurement: Measurement

    @property
    def names(self) -> frozenset[str]:
        """The sites that are converted."""
        return self.choice.names


@dataclass(frozen=True)
class Plan:
    """Which sites to convert.

    sensitivities: output error with that site alone converted to DyT; affine: to an affine map, of
    sites that may become one; attempts: (sites, error) of the choices tried, in order.
    """

    chosen: Attempt | None
    sensitivities: Mapping[str, float]
    attempts: tuple[tuple[int, float], ...] = field(default=())
    affine: Mapping[str, float] = field(default_factory=dict)

    @property
    def converted(self) -> frozenset[str]:
        """Names of the sites to convert."""
        return frozenset() if self.chosen is None else self.chosen.names


def plan(
    sensitivities: Mapping[str, float],
    attempt: Callable[[Choice], Attempt],
    budget: float,
    affine: Mapping[str, float] = MappingProxyType({}),
) -> Plan:
    """The choice of most gain found whose error, plus its uncertainty, is within `budget`.

    sensitivities: sites that can be converted; affine: those that can be an affine map, as of
    `Plan`; attempt: calibrates, rewrites and measures a choice.
    """
    best, log = largest(in_order(sensitivities, affine), attempt, budget)
    return Plan(best, sensitivities, log, affine)


def largest(
    order: Sequence[Step],
    attempt: Callable[[Choice], Found],
    budget: float,
    spent: float = 0.0,
) -> tuple[Found | None, tuple[tuple[int, float], ...]]:
    """The most steps found that keep `budget`, None where none do; and the attempts, as of `Plan`.

    order: those first that are to be preferred; attempt: measures a choice; spent: the error
    without any step.
    """
    search = _Search(order, attempt, budget, spent)
    search.longest_prefix()
    search.stragglers()
    return search.best, tuple(search.log)


class _Search(Generic[Found]):
    def __init__(
        self,
        order: Sequence[Step],
        attempt: Callable[[Choice], Found],
        budget: float,
        spent: float,
    ) -> None:
        self._order = order
        self._attempt = attempt
        self._budget = budget
        self._spent = spent
        self._left = order
        self.best: Found | None = None
        self.log: list[tuple[int, float]] = []

    def longest_prefix(self) -> None:
        """Bisect for the longest affordable prefix, from where independent errors would put it."""
        order = [step for step in self._order if step.gain]
        low, high, guess = 0, len(order) + 1, self._predicted(order)
        while high - low > 1:
            middle = min(max(guess, low + 1), high - 1)
            if self._affordable(Choice().after(order[:middle])):
                low, guess = middle, middle + 1
            else:
                high, guess = middle, middle - 1
            if high - low > 4:  # a guess that was far off: halve what is left
                guess = (low + high) // 2
        # The first one behind the prefix is known to fail: that ended the bisection.
        known = order[: low + 1]
        self._left = [step for step in self._order if step not in known]

    def stragglers(self) -> None:
        """Take steps behind the prefix one by one, while some still fit."""
        taken = Choice() if self.best is None else self.best.choice
        failures = 0
        later = [step for step in self._left if step.error <= self._budget]
        for step in track(later, "planning"):
            if failures == PATIENCE:
                return
            more = taken.after([step])
            if more == taken:
                continue
            if self._affordable(more):
                taken, failures = more, 0
            else:
                failures += 1

    def _predicted(self, order: Sequence[Step]) -> int:
        total, count = self._spent**2, 0
        for step in order:
            total += step.gain * step.rank**2
            if not total <= self._budget**2:  # NaN keeps no budget
                break
            count += 1
        return max(count, 1)

    def _affordable(self, choice: Choice) -> bool:
        tried = self._attempt(choice)
        self.log.append((len(choice.names), tried.measurement.error))
        kept = tried.measurement.keeps(self._budget, DEVIATIONS)
        if kept and (self.best is None or choice.gain > self.best.choice.gain):
            self.best = tried
        return kept


def in_order(
    sensitivities: Mapping[str, float], affine: Mapping[str, float] = MappingProxyType({})
) -> list[Step]:
    """Steps as a plan takes them: those first that add least to the error for what they gain."""
    steps = [
        step
        for name, error in sensitivities.items()
        for step in _steps(name, error, affine.get(name, math.inf))
    ]
    return sorted(steps, key=lambda step: math.inf if math.isnan(step.rank) else step.rank)


def _steps(name: str, dyt: float, affine: float) -> list[Step]:
    """DyT, then the affine map in its place; the latter at once where DyT is no better on the way,
    and then DyT for where that was too much.

    dyt, affine: the errors of the two.
    """
    first, whole = Step(name, False, dyt, 1, dyt), Step(name, True, affine, 2, affine / 2**0.5)
    if not math.isfinite(affine):
        return [first]
    if not whole.rank > first.rank:
        return [whole, replace(first, gain=0)]
    return [first, Step(name, True, affine, 1, (affine**2 - dyt**2) ** 0.5)]


def frontier_sizes(sites: int) -> list[int]:
    """Numbers of sites at which to measure a frontier: all up to `FRONTIER`, else as many or less.

    Each is a calibration of its own. Those of many sites lie closer where there are few, since
    that is where budgets end.
    """
    if sites <= FRONTIER:
        return list(range(1, sites + 1))
    return sorted({round(size) for size in np.geomspace(1, sites, FRONTIER)})
