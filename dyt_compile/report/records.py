"""The report of a conversion: frozen records, and as JSON."""

from __future__ import annotations

import importlib.util
import json
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from ..files import replaced
from ..scatter import Scatter

__all__ = ["Recovery", "RefitReport", "Report", "SiteReport", "environment"]


@dataclass(frozen=True)
class SiteReport:
    """One site: what became of it, why, and at what cost.

    fit_error: relative error of its fit on held-out rows; sensitivity: error at the model's
    output with this site alone converted. Neither is measured in mode "exact". alpha: what the
    converted model computes with, the mean where the model gave each channel its own.
    fit: "full", "diagonal", or None without one; unmixed: why not a full one.
    scatter: some inputs and outputs with the fit, used or not; drawn, and not part of the JSON.
    """

    name: str
    kind: str
    channels: int | None
    consumers: tuple[str, ...]
    converted: bool
    reason: str | None
    alpha: float | None
    fit_error: float | None
    sensitivity: float | None
    sigma_median: float | None
    sigma_peak: float | None
    scatter: Scatter | None = field(default=None, repr=False, compare=False)
    fit: str | None = None
    unmixed: str | None = None


@dataclass(frozen=True)
class RefitReport:
    """A linear layer whose weight moved, to make up for the converted sites before it.

    before, after: error of its output on held-out rows, relative to the output wanted.
    """

    name: str
    before: float
    after: float


@dataclass(frozen=True)
class Recovery:
    """The training that followed a conversion.

    train: "all" weights or those of "dyt" alone; before: the error on the report's samples without
    it; curve: (share of the run, error on held-out samples, by which the weights were chosen).
    """

    train: str
    before: float
    steps: int
    seconds: float
    curve: tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class Report:
    """What was converted, what it cost, what was kept and why.

    error: of the converted against the original model at `output`, in `metric`, on `samples`
    samples that took part in neither fit nor plan (None in mode "exact"). What an exported file
    differs by from the converted model is no part of it: the exporter says that.
    attempts: (sites converted, error on the plan samples) of every set that was tried.
    refits: linear layers whose weights the conversion moved, by the name of the weight.
    recovery: None where `recover` took no part.
    """

    model: str
    mode: str
    metric: str
    output: str
    budget: float | None
    error: float | None
    standard_error: float | None
    samples: int
    sites: tuple[SiteReport, ...]
    refusals: tuple[Mapping[str, str], ...]
    attempts: tuple[tuple[int, float], ...]
    seconds: Mapping[str, float]
    environment: Mapping[str, str]
    recovery: Recovery | None = None
    refits: tuple[RefitReport, ...] = ()

    @property
    def converted(self) -> int:
        """How many sites were converted."""
        return sum(site.converted for site in self.sites)

    def to_dict(self) -> dict[str, Any]:
        """The report's figures as plain JSON data."""
        data: dict[str, Any] = asdict(self)
        for site in data["sites"]:
            del site["scatter"]
        data["converted"] = self.converted
        return data

    def to_json(self) -> str:
        """The report as JSON text."""
        return json.dumps(self.to_dict(), indent=2)

    def save(self, path: str | Path) -> None:
        """Write the report as JSON."""
        with replaced(Path(path)) as temporary:
            temporary.write_text(self.to_json() + "\n", encoding="utf-8")


def environment() -> dict[str, str]:
    """Versions of what the figures depend on."""
    found = {"python": platform.python_version(), "machine": platform.machine()}
    for name in ("dyt-compile", "torch", "numpy", "onnx", "onnx-ir", "onnxruntime"):
        if importlib.util.find_spec(name.replace("-", "_")) is not None:
            found[name] = metadata.version(name)
    return found
