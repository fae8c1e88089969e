"""Verify: what the converted model costs, measured at the output against the original."""

from __future__ import annotations

from ..data import Part, attention_mask
from ..errors import OptionError
from ..graphs.base import Graph
from ..metrics import Measurement, Tally
from ..progress import track
from ..shelf import Kept, Shelf
from ..terms import Value

__all__ = ["Reference", "chosen_output"]


class Reference:
    """The original's output on some samples, kept to measure others against it."""

    def __init__(
        self, graph: Graph, samples: Part, shelf: Shelf, *, output: str | None, metric: str
    ) -> None:
        self.output = chosen_output(graph, output)
        self._graph = graph
        self._samples = samples
        self._metric = metric
        run = graph.segment(list(graph.inputs.values()), [graph.outputs[self.output]])
        self._kept: list[Kept] = []
        for batch in track(samples, "running the original", samples.batches):
            (result,) = run([batch[name] for name in graph.inputs])
            self._kept.append(shelf.keep(result, graph.outputs[self.output]))

    def measure(self, converted: Graph) -> Measurement:
        """The error of a graph with the same inputs and outputs."""
        tally = Tally(self._metric)
        value = converted.outputs[self.output]
        run = converted.segment(list(converted.inputs.values()), [value])
        for batch, kept in zip(self._samples, self._kept, strict=True):
            (result,) = run([batch[name] for name in converted.inputs])
            original = self._graph.to_array(kept.load())
            mask = attention_mask(batch, self._graph)
            tally.add(original, converted.to_array(result), mask)
        return tally.measurement()


def chosen_output(graph: Graph, name: str | None) -> str:
    """The output to measure: the one named, else the first floating-point one.

    Raises OptionError for a name that the model does not have.
    """
    if name is not None:
        if name not in graph.outputs:
            raise OptionError(f"output is {name!r}; the model's are: {', '.join(graph.outputs)}")
        return name
    for candidate, value in graph.outputs.items():
        if _is_floating(value):
            return candidate
    raise OptionError(f"the model has no floating-point output; it has: {', '.join(graph.outputs)}")


def _is_floating(value: Value) -> bool:
    return value.dtype is None or "float" in value.dtype
