"""Learning rates of recovery, relative to what is learned, and their course over a run."""

from __future__ import annotations

import math

from torch import Tensor

__all__ = ["highest_rate", "rate_factor"]

WARM_UP_STEPS = 20
RATE, LEAST_RATE = 1e-2, 1e-3
"""The highest learning rate of a run, for narrow and for wide matrices, relative to a parameter's
root mean square: a small alpha makes gamma huge, and no absolute rate suits both."""

RATE_WIDTH = 128
"""Wider matrices learn more slowly, like one over the square of their width: what Adam changes adds
up over the channels. Of models of 64, 128 and 384 channels the first two want the full rate, the
last a ninth of it (docs/recovery.md); the least rate is that of usual fine-tuning."""

LEAST_SIZE = {"alpha": 1e-4, "gamma": 1e-4, "beta": 0.3, "shift": 0.3, "": 0.02}
"""What a parameter's root mean square counts at least: a beta, or a bias, may begin at zero."""


def highest_rate(path: str, master: Tensor) -> float:
    """The learning rate of a parameter, relative to its root mean square."""
    least = LEAST_SIZE.get(path.rpartition(".")[2], LEAST_SIZE[""])
    size = float(master.detach().square().mean().sqrt())
    width = max(master.shape[1:], default=1)
    rate = min(RATE, max(LEAST_RATE, RATE * (RATE_WIDTH / width) ** 2))
    return rate * max(size, least)


def rate_factor(steps: int, done: float) -> float:
    """What the rates are multiplied by after so many steps: they rise, then fall like a cosine.

    done: the share of the stage that is over.
    """
    return min(1.0, (steps + 1) / WARM_UP_STEPS) * (0.5 + 0.5 * math.cos(math.pi * done))
