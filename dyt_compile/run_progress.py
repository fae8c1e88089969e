"""A run of recovery: when it ends, and how far it got."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

__all__ = ["Limit", "Progress", "best_place"]


@dataclass(frozen=True)
class Limit:
    """When a run ends: after so many minutes of wall time, or after so many steps."""

    minutes: float
    steps: int | None = None

    def share(self, seconds: float, steps: int) -> float:
        """How much of the run is over, from 0 to 1."""
        if self.steps is not None:
            return min(1.0, steps / self.steps)
        return min(1.0, seconds / (60 * self.minutes))


@dataclass
class Progress:
    """What of a run is no tensor.

    stages: where in the curve each stage begins; began: at which share of the run the last one
    did; rates: its learning rates.
    """

    steps: int = 0
    seconds: float = 0.0
    epoch: int = 0
    taken: int = 0
    scale: float = 65536.0
    began: float = 0.0
    stages: list[int] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)
    curve: list[tuple[float, float]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._since = time.perf_counter()

    @classmethod
    def of(cls, held: Mapping[str, Any]) -> Progress:
        """What `held` gave."""
        found = cls(**held)
        found.curve = [(share, error) for share, error in found.curve]
        return found

    def held(self) -> dict[str, Any]:
        """All of it, as JSON data."""
        return {**{f.name: getattr(self, f.name) for f in fields(self)}, "seconds": self.elapsed()}

    def elapsed(self) -> float:
        """Seconds so far."""
        return self.seconds + time.perf_counter() - self._since

    def errors(self) -> list[float]:
        """Held-out errors of the last stage."""
        return [error for _, error in self.curve[self.stages[-1] :]]


def best_place(errors: Sequence[float]) -> int:
    """Where the least error stands; NaN is none."""
    return min(range(len(errors)), key=lambda n: math.inf if math.isnan(errors[n]) else errors[n])
