"""Times of runs that take turns, and their ratios with the spread that they have.

What else a machine does slows all that runs on it for a while, so times of different minutes say
nothing about each other. Runs that take turns meet the same minutes, and each round gives a ratio.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dyt_compile.progress import track

__all__ = ["Others", "Ratio", "interleaved", "others", "ratio"]

WARM_UPS = 3
DRAWS = 4000
"""Samples of the bootstrap: its bounds then move by about a thousandth of their distance."""


@dataclass(frozen=True)
class Ratio:
    """The median of the ratios of all pairs, and the bounds of its 95 % interval."""

    median: float
    low: float
    high: float


def interleaved(
    runs: Mapping[str, Callable[[], object]],
    rounds: int,
    doing: str = "",
    clock: Callable[[], float] = time.perf_counter,
    warm_ups: int = WARM_UPS,
) -> dict[str, list[float]]:
    """Milliseconds of each run by round. Every second round runs them in reverse: A B, B A, A B.

    Before, each runs a few times that do not count.
    """
    for run in runs.values():
        for _ in range(warm_ups):
            run()
    names = list(runs)
    times: dict[str, list[float]] = {name: [] for name in names}
    for _ in track(range(rounds), doing, rounds):
        for name in names:
            began = clock()
            runs[name]()
            times[name].append(1000 * (clock() - began))
        names.reverse()
    return times


def ratio(times: Sequence[float], base: Sequence[float]) -> Ratio:
    """The ratio of two runs of the same rounds: percentile bootstrap over the pairs."""
    pairs = np.asarray(times) / np.asarray(base)
    drawn = np.random.default_rng(0).choice(pairs, (DRAWS, len(pairs)))
    low, high = np.quantile(np.median(drawn, axis=1), (0.025, 0.975))
    return Ratio(float(np.median(pairs)), float(low), float(high))


@dataclass
class Others:
    """Cores that other processes kept busy meanwhile, on average; None where nothing tells it."""

    cores: float | None = None


@contextmanager
def others() -> Iterator[Others]:
    """Watches what else the machine does while the block runs."""
    found = Others()
    began, before = time.perf_counter(), _others_s()
    yield found
    after = _others_s()
    if before is not None and after is not None:
        found.cores = max(0.0, after - before) / (time.perf_counter() - began)


def _others_s() -> float | None:
    """CPU seconds of all processes but this one since the machine started; Linux tells them."""
    stat = Path("/proc/stat")
    if not stat.exists():
        return None
    user, nice, system, _, _, irq, soft, steal = map(int, stat.read_text().split()[1:9])
    busy = (user + nice + system + irq + soft + steal) / os.sysconf("SC_CLK_TCK")
    return busy - sum(os.times()[:4])
