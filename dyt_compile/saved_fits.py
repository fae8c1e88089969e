"""A saved calibration, applied: its fits by the names of the model that they are applied to."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

from .calibration import Calibration, SiteFit
from .data import whole
from .dyt import Refit
from .errors import CalibrationError
from .exclusion import excluded
from .graphs.base import Graph
from .metrics import Measurement, Metric
from .mixing import obstacle, scaling_obstacle
from .passes.calibrate import fingerprint
from .passes.plan import Attempt, Choice, Plan
from .passes.rewrite import rewrite
from .passes.verify import Reference
from .projections import projections
from .shelf import Shelf
from .sites import Match, NormSite
from .trials import Outcome

__all__ = ["apply", "of_model"]


def of_model(
    calibration: Calibration | str | Path, graph: Graph, found: Match, exclude: Sequence[str]
) -> Calibration:
    """The calibration with the model's own names of its sites, less what is excluded."""
    held = calibration if isinstance(calibration, Calibration) else Calibration.load(calibration)
    difference = held.difference(fingerprint(graph, found))
    if difference is not None:
        raise CalibrationError(f"the calibration is of another model: {difference}")
    lossy = {site.name: site for site in found.sites if not site.kind.lossless}
    names = dict(zip(held.sketches(), lossy, strict=True))
    fits = {names[name]: fit for name, fit in held.fits.items()}
    unknown = {n for n in held.converted if n not in names or fits[names[n]].parameters is None}
    if unknown:
        raise CalibrationError(
            f"the calibration converts {min(unknown)!r}, for which it has no fit"
        )
    converted = {names[n] for n in held.converted if not excluded(names[n], exclude)}
    for name in converted:
        reason = _obstacle(fits[name], lossy[name], graph)
        if reason is not None:
            what = "affine" if fits[name].affine else "full"
            raise CalibrationError(f"site {name!r} cannot take up its {what} fit: {reason}")
    refits = _moved(held, graph, [lossy[name] for name in lossy if name in converted])
    return replace(held, fits=fits, converted=frozenset(converted), refits=refits)


def _obstacle(fit: SiteFit, site: NormSite, graph: Graph) -> str | None:
    """Why the readers of a site cannot take up what its fit leaves to them."""
    if fit.mix is not None:
        return obstacle(site, graph.outputs)
    return scaling_obstacle(site) if fit.affine else None


def _moved(held: Calibration, graph: Graph, converted: Sequence[NormSite]) -> dict[str, Refit]:
    """The refits of a calibration by the model's own names of its weights."""
    if not held.refits:
        return {}
    if len(converted) != len(held.converted):
        raise CalibrationError(
            "exclude leaves sites out that the calibration's refits of linear layers rest on; "
            "calibrate anew with that exclude"
        )
    behind = projections(graph, converted)
    found = {behind[r.place]: r for r in held.refits.values() if r.place < len(behind)}
    for projection, refit in found.items():
        wanted, held_shape = projection.shape, refit.mix.matrix.shape
        if wanted != held_shape:
            raise CalibrationError(
                f"the refit of {projection.name!r} is of shape {held_shape}, not {wanted}"
            )
    if len(found) != len(held.refits):
        raise CalibrationError("the calibration refits linear layers that the model does not have")
    return {projection.name: refit for projection, refit in found.items()}


def apply(
    fits: Calibration,
    graph: Graph,
    found: Match,
    batches: Iterable[Any] | None,
    metric: Metric,
    output: str,
    clock: Callable[[str], AbstractContextManager[None]],
) -> Outcome:
    """The conversion that a calibration says; measured where there are batches, else NaN.

    clock: times a stage.
    """
    with clock("rewrite"):
        rewritten = rewrite(graph, found, fits, fits.converted)
    measured = Measurement(math.nan, math.nan, 0)
    if batches is not None:
        with clock("verify"), Shelf(graph) as shelf:
            samples = whole(graph, batches)
            reference = Reference(graph, samples, shelf, output=output, metric=metric)
            measured = reference.measure(rewritten)
    return Outcome(Plan(Attempt(Choice(fits.converted), fits, measured), {}), rewritten, measured)
