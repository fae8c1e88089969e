"""Trials: sites calibrated, converted and measured together, over one model and one split."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from types import MappingProxyType

from .calibration import Calibration
from .data import Splits
from .errors import BudgetError
from .graphs.base import Graph
from .metrics import Measurement, Metric, described, named
from .passes.calibrate import calibrate, survey
from .passes.plan import Attempt, Choice, Plan, Step, frontier_sizes, in_order, plan
from .passes.rewrite import rewrite
from .passes.verify import Reference
from .progress import track
from .projections import projections
from .report.records import FrontierPoint
from .savings import savings
from .shelf import Shelf
from .sites import Match
from .survey import Look

__all__ = ["DEVIATIONS", "Outcome", "Trials", "tightened"]

DEVIATIONS = 1.64
"""Standard errors by which the report samples must keep the budget at once: 95 %, one-sided."""


@dataclass(frozen=True)
class Outcome:
    """A plan, the graph that it makes, and that graph's error on the report samples."""

    planned: Plan
    graph: Graph
    measured: Measurement


class Trials:
    """The stages that need samples, over one model and one split."""

    def __init__(
        self,
        graph: Graph,
        found: Match,
        samples: Splits,
        shelf: Shelf,
        output: str,
        metric: Metric,
        seed: int,
        fit: str,
        *,
        affine: bool = False,
    ) -> None:
        """affine: sites may become affine maps."""
        self._graph = graph
        self._match = found
        self._samples = samples
        self._seed = seed
        self._fit = fit
        self._output = output
        self._metric = metric
        self._shelf = shelf
        self._looks: Mapping[str, Look] | None = None
        self.isolated: Calibration | None = None
        self._sensitivities: dict[str, float] = {}
        self._affine = affine
        self._affine_sensitivities: dict[str, float] = {}
        self._attempts: dict[Choice, Attempt] = {}
        self.unaffine: dict[str, str] = {}

    def attempt(self, choice: Choice) -> Attempt:
        """Calibrate with the chosen sites converted, and measure them on the plan samples."""
        if choice not in self._attempts:
            self._attempts[choice] = self._attempt(choice)
        return self._attempts[choice]

    def all(self, candidates: Sequence[str]) -> Outcome:
        """Every candidate converted, whatever that costs.

        One that may be an affine map is one where that fits its held-out rows no worse than DyT.
        """
        tried = dict.fromkeys(candidates if self._affine else (), ("identity", "tanh"))
        fitted = self._calibrated(candidates, tried, refit=True)
        rewritten = self._rewritten(fitted)
        measured = self.verify(rewritten)
        chosen = Attempt(_choice(fitted, candidates), fitted, measured)
        return Outcome(self._plan(chosen), rewritten, measured)

    def within(self, candidates: Sequence[str], budget: float) -> Outcome:
        """As many candidates as keep the budget, on the report samples too.

        A plan looks at its samples many times and takes the luckiest set; the report samples look
        once. Where they leave a doubt, the sites are planned once more, for a smaller budget. The
        later plan counts unless the report's error is above the budget with it, and not with the
        earlier one. Raises BudgetError where it is with both.
        """
        first = self._outcome(self.plan(candidates, budget))
        if first.measured.keeps(budget, DEVIATIONS):
            return first
        again = self.plan(candidates, tightened(budget, first.measured.upper(budget, DEVIATIONS)))
        attempts = first.planned.attempts + again.attempts
        second = self._outcome(again)
        for found in (second, first):
            if found.measured.error <= budget:  # NaN keeps none
                return replace(found, planned=replace(found.planned, attempts=attempts))
        raise BudgetError(_broken(self._metric, second, budget))

    def plan(self, candidates: Sequence[str], budget: float) -> Plan:
        """Sensitivities from each site alone, then the search for the largest affordable set."""
        self._measure_alone(candidates)
        return plan(self._sensitivities, self.attempt, budget, self._affine_sensitivities)

    def _measure_alone(self, candidates: Sequence[str]) -> None:
        """The error of each candidate that has a fit, converted alone; as an affine map, too."""
        if self.isolated is not None:
            return
        self.isolated = self._calibrated(())
        fitted = [n for n in candidates if self.isolated.fits[n].parameters is not None]
        self._sensitivities.update(self._alone(self.isolated, fitted))
        if self._affine:
            affine = self._calibrated((), dict.fromkeys(fitted, ("identity",)))
            able = [name for name in fitted if affine.fits[name].affine]
            self._affine_sensitivities.update(self._alone(affine, able))
            told = ((name, affine.fits[name].unaffine) for name in fitted)
            self.unaffine.update((name, reason) for name, reason in told if reason)

    def survey(self) -> Mapping[str, Look]:
        """A first look at every site, before anything is fitted."""
        if self._looks is None:
            self._looks = survey(self._graph, self._match, self._samples.first)
        return self._looks

    def frontier(self, candidates: Sequence[str]) -> tuple[FrontierPoint, ...]:
        """The error against the number of sites, the least sensitive first, as `plan` takes them.

        Every point is calibrated and measured like a plan of just these sites.
        """
        self._measure_alone(candidates)
        steps = in_order(self._sensitivities, self._affine_sensitivities)
        order = [step for step in steps if step.gain]
        sizes = frontier_sizes(len(order))
        points, taken = [], 0
        for size in track(sizes, "measuring the frontier", len(sizes)):
            choice = Choice().after(order[:size])
            # Not kept: a calibration for each point is more than a large model's memory holds.
            found = self._refitted(self._attempts.get(choice) or self._attempt(choice))
            points.append(self._point(found, order[taken:size]))
            taken = size
        return tuple(points)

    def _point(self, found: Attempt, added: Sequence[Step]) -> FrontierPoint:
        calls, affine = self._tied(found.names), self._tied(found.choice.affine)
        saved = savings(
            [site for site in self._match.sites if site.name in calls],
            self.survey(),
            tuple(self._graph.outputs.values()),
            affine,
        )
        return FrontierPoint(
            sites=len(calls),
            added=tuple(f"{step.name} (affine)" if step.affine else step.name for step in added),
            affine=len(affine),
            error=found.measurement.error,
            standard_error=found.measurement.standard_error,
            kernels_saved=saved.kernels,
            traffic_bytes_saved=saved.traffic_bytes,
        )

    def _outcome(self, planned: Plan) -> Outcome:
        if planned.chosen is not None:
            chosen = self._refitted(planned.chosen)
            last = (len(chosen.names), chosen.measurement.error)
            more = () if chosen is planned.chosen else (last,)
            planned = replace(planned, chosen=chosen, attempts=(*planned.attempts, *more))
        rewritten = self.rewrite(planned)
        return Outcome(planned, rewritten, self.verify(rewritten))

    def rewrite(self, planned: Plan) -> Graph:
        """The graph with the plan's sites converted."""
        if planned.chosen is None:
            return rewrite(self._graph, self._match, None, ())
        return self._rewritten(planned.chosen.calibration)

    def verify(self, rewritten: Graph) -> Measurement:
        """The error on samples that took part in nothing else."""
        return self._reference("report").measure(rewritten)

    @cached_property
    def _planning(self) -> Reference:
        return self._reference("plan")

    def _refitted(self, tried: Attempt) -> Attempt:
        """The attempt with linear layers refitted, where that lowers its error.

        They are left alone while a plan is sought: refits take most of a calibration's time.
        """
        calls = self._tied(tried.names)
        converted = [site for site in self._match.sites if site.name in calls]
        if self._fit != "auto" or not projections(self._graph, converted):
            return tried
        again = self._attempt(tried.choice, refit=True)
        return again if again.measurement.error < tried.measurement.error else tried

    def _attempt(self, choice: Choice, *, refit: bool = False) -> Attempt:
        fitted = self._calibrated(
            choice.names, dict.fromkeys(choice.affine, ("identity",)), refit=refit
        )
        measured = self._planning.measure(self._rewritten(fitted))
        return Attempt(_choice(fitted, choice.names), fitted, measured)

    def _calibrated(
        self,
        names: Collection[str],
        squashes: Mapping[str, Sequence[str]] = MappingProxyType({}),
        *,
        refit: bool = False,
    ) -> Calibration:
        return calibrate(
            self._graph,
            self._match,
            self._samples.fit,
            convert=self._tied(names),
            seed=self._seed,
            fit=self._fit,
            refits=refit and self._fit == "auto",
            squashes=squashes,
        )

    def _plan(self, chosen: Attempt) -> Plan:
        """A plan that nothing was searched for."""
        return Plan(chosen, self._sensitivities, affine=self._affine_sensitivities)

    def _rewritten(self, fitted: Calibration) -> Graph:
        return rewrite(self._graph, self._match, fitted, fitted.converted)

    def _alone(self, fitted: Calibration, names: Sequence[str]) -> Iterator[tuple[str, float]]:
        for name in track(names, "measuring sites", len(names)):
            alone = rewrite(self._graph, self._match, fitted, self._tied({name}))
            yield name, self._planning.measure(alone).error

    def _tied(self, names: Collection[str]) -> frozenset[str]:
        """The sites together with later calls of the same modules."""
        followers = (site.name for site in self._match.sites if site.tied_to in names)
        return frozenset((*names, *followers))

    def _reference(self, part: str) -> Reference:
        samples = getattr(self._samples, part)
        return Reference(
            self._graph, samples, self._shelf, output=self._output, metric=self._metric
        )


def _choice(fitted: Calibration, names: Iterable[str]) -> Choice:
    """Those of the named sites that a calibration converts, and how."""
    done = fitted.converted.intersection(names)
    return Choice(done, frozenset(name for name in done if fitted.fits[name].affine))


def tightened(budget: float, upper: float) -> float:
    """The budget to plan for once the report samples reached that far, by as much as they differ.

    Nothing where that is infinite or NaN: then only sites without any error are converted.
    """
    return budget * (budget / upper) if math.isfinite(upper) else 0.0


def _broken(metric: Metric, found: Outcome, budget: float) -> str:
    measured = found.measured
    told = (
        f"the {described(named(metric))} on the report samples is {measured.error:.4g} with "
        f"{len(found.planned.converted)} sites converted, not within the budget of {budget:g} "
        "after planning twice; "
    )
    if math.isfinite(measured.error):
        return f"{told}give more samples than {measured.samples * 4}, or a larger budget"
    return f"{told}its outputs, or the original's, hold NaN or infinity on some of the samples"
