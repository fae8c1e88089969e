"""The report of a conversion, put together from the records of its stages."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import numpy as np

from ..calibration import Calibration
from ..graphs.base import Graph
from ..metrics import Measurement
from ..passes.plan import Plan
from ..passes.quantize import Quantization
from ..sites import Match, NormSite
from .records import (
    FrontierPoint,
    QuantizationReport,
    RefitReport,
    Report,
    SiteReport,
    environment,
)

__all__ = ["assemble", "quantization_report"]


def assemble(
    graph: Graph,
    found: Match,
    mode: str,
    metric: str,
    output: str,
    *,
    seconds: Mapping[str, float],
    budget: float | None = None,
    measured: Measurement | None = None,
    planned: Plan | None = None,
    isolated: Calibration | None = None,
    hard: Mapping[str, tuple[str, ...]] = MappingProxyType({}),
    unaffine: Mapping[str, str] = MappingProxyType({}),
    frontier: tuple[FrontierPoint, ...] = (),
) -> Report:
    """The report; `planned`, `measured` and `isolated` are None in mode "exact".

    Mode "calibration" applies one: it has no `isolated`, and `measured` only where there was data.
    """
    return Report(
        model=found.model,
        mode=mode,
        metric=metric,
        output=output,
        budget=budget,
        error=None if measured is None else measured.error,
        standard_error=None if measured is None else measured.standard_error,
        samples=0 if measured is None else measured.samples,
        sites=tuple(
            _site_report(graph, site, mode, planned, isolated, hard, unaffine)
            for site in found.sites
        ),
        refusals=tuple(refusal.to_dict() for refusal in found.refusals),
        attempts=() if planned is None else planned.attempts,
        refits=_refits(planned),
        seconds=seconds,
        environment=environment(),
        frontier=frontier,
    )


def quantization_report(
    made: Quantization,
    own: Measurement | None,
    total: Measurement | None,
    alone: Mapping[str, float],
) -> QuantizationReport:
    """own, total: the error against the converted and the original model, None without data.

    alone: that of products that were measured so.
    """
    return QuantizationReport(
        made.dtype,
        made.runtime,
        made.products,
        tuple((site.name, site.bound, site.into) for site in made.sites),
        tuple((left.name, left.reason, left.product) for left in made.left),
        None if own is None else own.error,
        None if own is None else own.standard_error,
        None if total is None else total.error,
        None if total is None else total.standard_error,
        0 if total is None else total.samples,
        len(made.kept),
        dict(alone),
    )


def _refits(planned: Plan | None) -> tuple[RefitReport, ...]:
    if planned is None or planned.chosen is None:
        return ()
    return tuple(
        RefitReport(name, refit.before, refit.after)
        for name, refit in planned.chosen.calibration.refits.items()
    )


def _site_report(
    graph: Graph,
    site: NormSite,
    mode: str,
    planned: Plan | None,
    isolated: Calibration | None,
    hard: Mapping[str, tuple[str, ...]],
    unaffine: Mapping[str, str],
) -> SiteReport:
    chosen = None if planned is None else planned.chosen
    calibration = isolated if chosen is None else chosen.calibration
    fit = None if calibration is None else calibration.fits.get(site.name)
    stands_for = site.tied_to or site.name
    converted = site.kind.lossless or (planned is not None and stands_for in planned.converted)
    sensitivity = None if planned is None else planned.sensitivities.get(stands_for)
    alpha = None if site.alpha is None else graph.constant(site.alpha)
    if fit is not None and fit.parameters is not None and converted:
        alpha = None if fit.affine else fit.parameters.alpha
    return SiteReport(
        name=site.name,
        kind=site.kind.value,
        channels=site.channels,
        consumers=site.consumers,
        converted=converted,
        reason=None if converted else _why_kept(mode, fit, sensitivity),
        alpha=None if alpha is None else float(np.mean(alpha, dtype=np.float64)),
        fit_error=None if fit is None else fit.fit_error,
        sensitivity=sensitivity,
        sigma_median=None if fit is None else fit.sigma_median,
        sigma_peak=None if fit is None else fit.sigma_peak,
        scatter=None if fit is None else fit.scatter,
        fit=None if fit is None else fit.method,
        unmixed=None if fit is None else fit.unmixed,
        hard=hard.get(site.name, ()),
        affine=converted and fit is not None and fit.affine,
        affine_alone=None if planned is None else planned.affine.get(stands_for),
        unaffine=unaffine.get(stands_for, None if fit is None else fit.unaffine),
    )


def _why_kept(mode: str, fit: Any, sensitivity: float | None) -> str:
    if mode == "exact":
        return "mode exact"
    if fit is not None and fit.reason is not None:
        return str(fit.reason)
    if mode == "calibration":
        return "excluded, or kept by the calibration"
    return "excluded" if sensitivity is None else "over budget"
