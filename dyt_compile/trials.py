"""Trials: sites calibrated, converted and measured together, over one model and one split."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from .calibration import Calibration
from .data import Splits
from .graphs.base import Graph
from .metrics import Measurement
from .passes.calibrate import calibrate
from .passes.plan import Attempt, Plan, plan
from .passes.rewrite import rewrite
from .passes.verify import Reference
from .progress import track
from .shelf import Shelf
from .sites import Match

__all__ = ["Trials"]


class Trials:
    """The stages that need samples, over one model and one split."""

    def __init__(
        self,
        graph: Graph,
        found: Match,
        samples: Splits,
        shelf: Shelf,
        output: str,
        metric: str,
        seed: int,
        fit: str,
    ) -> None:
        self._graph = graph
        self._match = found
        self._samples = samples
        self._seed = seed
        self._fit = fit
        self._output = output
        self._metric = metric
        self._shelf = shelf
        self._planning = self._reference("plan")
        self.isolated: Calibration | None = None
        self._attempts: dict[frozenset[str], Attempt] = {}

    def attempt(self, names: frozenset[str]) -> Attempt:
        """Calibrate with the named sites converted, and measure them on the plan samples."""
        if names not in self._attempts:
            self._attempts[names] = self._attempt(names)
        return self._attempts[names]

    def plan(self, candidates: Sequence[str], budget: float) -> Plan:
        """Sensitivities from each site alone, then the search for the largest affordable set."""
        if self.isolated is None:
            self.isolated = self._calibrated(())
            self._sensitivities = {
                name: self._alone(self.isolated, name)
                for name in track(candidates, "measuring sites", len(candidates))
                if self.isolated.fits[name].parameters is not None
            }
        return plan(self._sensitivities, self.attempt, budget)

    def rewrite(self, planned: Plan) -> Graph:
        """The graph with the plan's sites converted."""
        if planned.chosen is None:
            return rewrite(self._graph, self._match, None, ())
        return self._rewritten(planned.chosen.calibration)

    def verify(self, rewritten: Graph) -> Measurement:
        """The error on samples that took part in nothing else."""
        return self._reference("report").measure(rewritten)

    def _attempt(self, names: frozenset[str]) -> Attempt:
        fitted = self._calibrated(self._tied(names))
        measured = self._planning.measure(self._rewritten(fitted))
        return Attempt(names & fitted.converted, fitted, measured)

    def _calibrated(self, names: Collection[str]) -> Calibration:
        return calibrate(
            self._graph,
            self._match,
            self._samples.fit,
            convert=names,
            seed=self._seed,
            fit=self._fit,
        )

    def _rewritten(self, fitted: Calibration) -> Graph:
        return rewrite(self._graph, self._match, fitted, fitted.converted)

    def _alone(self, fitted: Calibration, name: str) -> float:
        alone = rewrite(self._graph, self._match, fitted, self._tied({name}))
        return self._planning.measure(alone).error

    def _tied(self, names: Collection[str]) -> frozenset[str]:
        """The sites together with later calls of the same modules."""
        followers = (site.name for site in self._match.sites if site.tied_to in names)
        return frozenset((*names, *followers))

    def _reference(self, part: str) -> Reference:
        samples = getattr(self._samples, part)
        return Reference(
            self._graph, samples, self._shelf, output=self._output, metric=self._metric
        )
