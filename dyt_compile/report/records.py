"""The report of a conversion: frozen records, and as JSON."""

from __future__ import annotations

import importlib.util
import json
import math
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from ..files import replaced
from ..scatter import Scatter

__all__ = [
    "FrontierPoint", "QuantizationReport", "Recovery", "RefitReport", "Report", "SiteReport",
    "environment",
]  # fmt: skip


@dataclass(frozen=True)
class SiteReport:
    """One site: what became of it, why, and at what cost.

    fit_error: relative error of its fit on held-out rows; sensitivity: error at the model's
    output with this site alone converted. Neither is measured in mode "exact". alpha: what the
    converted model computes with, the mean where the model gave each channel its own.
    fit: "full", "diagonal", or None without one; unmixed: why not a full one.
    scatter: some inputs and outputs with the fit, used or not; drawn, and not part of the JSON.
    affine: whether nothing is left of it, since its readers took up an affine map in its place;
    affine_alone: the sensitivity of that; unaffine: why it is none, where that was asked for.
    hard: why the site was known to be hard to convert before it was fitted; empty where it was not.
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
    hard: tuple[str, ...] = ()
    affine: bool = False
    affine_alone: float | None = None
    unaffine: str | None = None

    @property
    def now(self) -> str:
        """What computes there: "DyT", "affine", "norm"."""
        if not self.converted:
            return "norm"
        return "affine" if self.affine else "DyT"


@dataclass(frozen=True)
class FrontierPoint:
    """The model with so many sites converted, the least sensitive ones.

    added: those that the point before has not, or not as affine maps; affine: how many of the sites
    are affine maps; error, standard_error: at the output, in the report's metric, on the plan
    samples. kernels_saved, traffic_bytes_saved (for each sample): an estimate from shapes, not
    measured, and an upper bound; `savings` says how it is counted.
    """

    sites: int
    added: tuple[str, ...]
    error: float
    standard_error: float
    kernels_saved: int
    traffic_bytes_saved: float
    affine: int = 0


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
    it; curve: (share of the run, error on held-out samples, by which the weights were chosen);
    stages: (place in the curve where it begins, sites that are DyT), several in a staged run.
    """

    train: str
    before: float
    steps: int
    seconds: float
    curve: tuple[tuple[float, float], ...]
    stages: tuple[tuple[int, int], ...] = ()

    @property
    def chosen(self) -> int:
        """Where in the curve the weights are from: the least error of the last stage."""
        first = self.stages[-1][0] if self.stages else 0
        errors = [math.inf if math.isnan(error) else error for _, error in self.curve]
        return min(range(first, len(errors)), key=errors.__getitem__)

    def times(self) -> list[float]:
        """Seconds at the places of the curve, if all of them took the same time."""
        return [self.seconds * share / (self.curve[-1][0] or 1.0) for share, _ in self.curve]

    def told(self) -> str:
        """The run in words."""
        weights = "all weights" if self.train == "all" else "α, γ and β"
        stages = f" in {len(self.stages)} stages" if len(self.stages) > 1 else ""
        return f"{self.steps} steps{stages}, {self.seconds:.0f} s, {weights} trained"


@dataclass(frozen=True)
class QuantizationReport:
    """What computes over eight bits, and what that costs.

    dtype: "int8" or "fp8"; runtime: who the file is for; products: how many matrix products and
    convolutions; over_budget: how many more the budget leaves in float. sites: name, largest
    absolute value, and the products that read it; left: name, why what reads it stayed in float,
    and which product that is, if it could be quantised. alone: the error of quantising one product
    alone, by its name, measured where some had to be chosen.
    error, standard_error: of the quantised against the converted model, in the report's metric;
    total, total_standard_error: of the quantised against the original one, on `samples` samples.
    Without data there is none of these.
    """

    dtype: str
    runtime: str
    products: int
    sites: tuple[tuple[str, float, tuple[str, ...]], ...]
    left: tuple[tuple[str, str, str | None], ...]
    error: float | None = None
    standard_error: float | None = None
    total: float | None = None
    total_standard_error: float | None = None
    samples: int = 0
    over_budget: int = 0
    alone: Mapping[str, float] = field(default_factory=dict)

    def told(self) -> str:
        """How many products, in words."""
        if not self.over_budget:
            return f"{self.products} products in {self.dtype}"
        able = self.products + self.over_budget
        left = f"{self.over_budget} left: the budget"
        return f"{self.products} of {able} products in {self.dtype}, {left}"


@dataclass(frozen=True)
class Report:
    """What was converted, what it cost, what was kept and why.

    error: of the converted against the original model at `output`, in `metric`, on `samples`
    samples that took part in neither fit nor plan (None in mode "exact"). What an exported file
    differs by from the converted model is no part of it: the exporter says that.
    attempts: (sites converted, error on the plan samples) of every set that was tried.
    metric: "relative", "cosine", "kl", "top1", or the name of the user's own function, whose error
    is what the original scores more than the converted model.
    recovery: None where `recover` took no part. frontier: empty where it was not asked for.
    refits: linear layers whose weights the conversion moved, by the name of the weight.
    quantized: None where that was not asked for; its error is its own, `error` is without it.
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
    frontier: tuple[FrontierPoint, ...] = ()
    refits: tuple[RefitReport, ...] = ()
    quantized: QuantizationReport | None = None

    @property
    def converted(self) -> int:
        """How many sites were converted."""
        return sum(site.converted for site in self.sites)

    @property
    def affine(self) -> int:
        """How many of those are affine maps, of which nothing is left."""
        return sum(site.affine for site in self.sites)

    def to_dict(self) -> dict[str, Any]:
        """The report's figures as plain JSON data."""
        data: dict[str, Any] = asdict(self)
        for site in data["sites"]:
            del site["scatter"]
        data["converted"], data["affine"] = self.converted, self.affine
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
            found[name] = _version(name)
    return found


def _version(name: str) -> str:
    """Of a package, or of one that holds a module of that name: onnxruntime-gpu of onnxruntime."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        others = metadata.packages_distributions().get(name.replace("-", "_"), [])
        return metadata.version(others[0]) if others else "not installed"  # run from its sources
