"""What quantises a conversion, and measures what that costs.

Where the error of converting and quantising together does not keep the budget, products stay in
float: each is measured alone, and those are quantised first that add least to the error for the
size of their weight. The search is that of `passes/plan.py`, its looks at the samples those of
`trials.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

from .clock import Clock
from .data import FIRST, Part, Splits
from .errors import BudgetError
from .graphs.base import Graph
from .graphs.onnx_quantize import FORMATS
from .metrics import Measurement, Metric, described
from .passes.match import match
from .passes.plan import Choice, Step, largest
from .passes.quantize import Quantization, quantize
from .passes.verify import Reference
from .progress import track
from .report.assembly import quantization_report
from .shelf import Shelf
from .trials import DEVIATIONS, tightened

if TYPE_CHECKING:
    from .compiler import Conversion

__all__ = ["EightBits"]

PLANS = 2
"""How often products are chosen, before none is quantised."""

LEFT = "left: the budget"
"""Why a product stays in float that could be quantised."""


@dataclass(frozen=True)
class EightBits:
    """Quantises a conversion to `dtype` for `runtime`.

    budget: of the error of converting and quantising together, in modes "budget" and "exact".
    """

    dtype: str
    runtime: str
    metric: Metric
    budget: float
    clock: Clock

    def __call__(
        self, result: Conversion, samples: Part | None, apart: Callable[[], Splits]
    ) -> Conversion:
        """The conversion with its model over eight bits, as much of it as keeps the budget.

        samples: to measure the whole on, None without data; apart: those to choose products by, and
        to measure the chosen on, where the whole does not keep the budget. Raises BudgetError where
        the model in float does not keep it, either.
        """
        from .exporters.onnx import onnx_graph

        with self.clock("quantize"), Shelf(result.original) as shelf:
            graph = onnx_graph(result.graph, FORMATS[self.dtype].opset)
            make = partial(quantize, graph, match(graph), self.dtype, self.runtime)
            made = make()
            told = quantization_report(made, None, None, {})
            if samples is not None:
                trials = _Trials(self, result, shelf, make, made)
                limited = result.report.mode in ("budget", "exact")
                found = trials.within(samples, apart) if limited else trials.whole(samples)
                made = found.made
                told = quantization_report(made, found.own, found.measurement, trials.alone)
        report = replace(result.report, quantized=told, seconds=self.clock.seconds)
        return replace(result, quantized=made, report=report)


@dataclass(frozen=True)
class _Tried:
    """Products over eight bits, with the error against the original.

    own: that against the converted model, None where it was not measured.
    """

    choice: Choice
    made: Quantization
    measurement: Measurement
    own: Measurement | None = None


class _Trials:
    """Models with some of their products over eight bits, measured."""

    def __init__(
        self,
        wanted: EightBits,
        result: Conversion,
        shelf: Shelf,
        make: Callable[..., Quantization],
        everything: Quantization,
    ) -> None:
        """make: quantises all but `kept`; everything: with nothing kept."""
        self._budget = wanted.budget
        self._metric = wanted.metric
        self._result = result
        self._shelf = shelf
        self._make = make
        self._everything = everything
        self.alone: dict[str, float] = {}

    def whole(self, samples: Part) -> _Tried:
        """Every product quantised, whatever that costs."""
        return self._verify(samples)(Choice(frozenset(self._everything.weights)))

    def within(self, samples: Part, apart: Callable[[], Splits]) -> _Tried:
        """As many products as keep the budget, on samples that took no part in the choice, too.

        As with sites, a later choice counts unless its error is above the budget with it, and not
        with an earlier one. Raises BudgetError where it is with nothing quantised.
        """
        found = [self.whole(samples)]
        if self._keeps(found[0]):
            return found[0]
        parts, budget = apart(), self._budget
        choose, verify = self._choose(parts.plan), self._verify(parts.report)
        for _ in range(PLANS):
            found.append(verify(choose(budget)))
            if self._keeps(found[-1]):
                return found[-1]
            budget = tightened(self._budget, found[-1].measurement.upper(self._budget, DEVIATIONS))
        nothing = verify(Choice())
        for tried in (*reversed(found), nothing):
            if tried.measurement.error <= self._budget:  # NaN keeps none
                return tried
        raise BudgetError(
            f"the {described(self._result.report.metric)} of the model without eight bits is "
            f"{nothing.measurement.error:.3g}, not within the budget of {self._budget:g}"
        )

    def _keeps(self, tried: _Tried) -> bool:
        return tried.measurement.keeps(self._budget, DEVIATIONS)

    def _choose(self, samples: Part) -> Callable[[float], Choice]:
        """What chooses products for a budget, by these samples."""
        steps = self._steps(samples)
        attempt = partial(self._attempt, self._reference(samples))
        spent = max(self._result.report.error or 0.0, 0.0)

        def choose(budget: float) -> Choice:
            best, _ = largest(steps, attempt, budget, spent)
            return Choice() if best is None else best.choice

        return choose

    def _steps(self, samples: Part) -> list[Step]:
        """Every product, those first that add least to the error for the size of their weight.

        Measured on few samples: that decides on their order alone.
        """
        converted = self._reference(samples.first(FIRST), self._result.graph)
        sizes = self._everything.weights
        steps = []
        for name in track(sizes, "measuring products", len(sizes)):
            error = self._attempt(converted, Choice(frozenset({name}))).measurement.error
            steps.append(Step(name, False, error, sizes[name], error / sizes[name] ** 0.5))
            self.alone[name] = error
        return sorted(steps, key=lambda s: (math.inf if math.isnan(s.rank) else s.rank, -s.gain))

    def _verify(self, samples: Part) -> Callable[[Choice], _Tried]:
        """What measures a choice on these samples, against the original and the converted model."""
        original = self._reference(samples)
        converted = self._reference(samples, self._result.graph)

        def verify(choice: Choice) -> _Tried:
            tried = self._attempt(original, choice)
            return replace(tried, own=converted.measure(tried.made.graph))

        return verify

    def _attempt(self, reference: Reference, choice: Choice) -> _Tried:
        made = self._made(choice.names)
        return _Tried(choice, made, reference.measure(made.graph))

    def _made(self, names: Collection[str]) -> Quantization:
        """The model with these products over eight bits."""
        kept = {name: LEFT for name in self._everything.weights if name not in names}
        return self._make(kept=kept) if kept else self._everything

    def _reference(self, samples: Part, graph: Graph | None = None) -> Reference:
        """What errors are measured against, by default the original."""
        return Reference(
            graph or self._result.original,
            samples,
            self._shelf,
            output=self._result.report.output,
            metric=self._metric,
        )
