"""What quantises a conversion, and measures what that costs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from .clock import Clock
from .data import Part
from .errors import BudgetError
from .graphs.onnx_quantize import FORMATS
from .metrics import Measurement, Metric, described
from .passes.match import match
from .passes.quantize import Quantization, quantize
from .passes.verify import Reference
from .report import Report
from .report.assembly import quantization_report
from .report.records import QuantizationReport
from .shelf import Shelf

if TYPE_CHECKING:
    from .compiler import Conversion

__all__ = ["EightBits"]


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

    def __call__(self, result: Conversion, samples: Part | None) -> Conversion:
        """The conversion with its model over eight bits; what that costs is measured on samples.

        Raises BudgetError where the budget is not kept.
        """
        from .exporters.onnx import onnx_graph

        with self.clock("quantize"):
            graph = onnx_graph(result.graph, FORMATS[self.dtype].opset)
            made = quantize(graph, match(graph), self.dtype, self.runtime)
            told = quantization_report(made, *self._measured(result, made, samples))
        self._check(result.report, told)
        report = replace(result.report, quantized=told, seconds=self.clock.seconds)
        return replace(result, quantized=made, report=report)

    def _measured(
        self, result: Conversion, made: Quantization, samples: Part | None
    ) -> tuple[Measurement | None, Measurement | None]:
        """The error against the converted model, and that against the original."""
        if samples is None:
            return None, None
        output = result.report.output
        with Shelf(result.original) as shelf:
            own, total = (
                Reference(graph, samples, shelf, output=output, metric=self.metric)
                for graph in (result.graph, result.original)
            )
            return own.measure(made.graph), total.measure(made.graph)

    def _check(self, report: Report, told: QuantizationReport) -> None:
        if told.total is None or report.mode not in ("budget", "exact"):
            return
        if not told.total <= self.budget:
            without = "" if report.error is None else f", that of converting {report.error:.3g}"
            raise BudgetError(
                f"the {described(report.metric)} of the model over eight bits is {told.total:.3g}, "
                f"above the budget of {self.budget:g}; that of quantising is {told.error:.3g}"
                f"{without}"
            )
