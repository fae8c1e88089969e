"""Verify: what the converted model costs, measured at the output against the original."""

from __future__ import annotations

from typing import Any

import numpy.typing as npt

from ..data import Part, attention_mask, dealt
from ..errors import DataError, OptionError
from ..graphs.base import Batch, Graph
from ..metrics import Measurement, Metric, Tally
from ..progress import track
from ..ranks import current
from ..shelf import Kept, Shelf
from ..terms import Value

__all__ = ["Reference", "chosen_output"]


class Reference:
    """Some samples and the original's output on them, kept to measure others against it."""

    def __init__(
        self, graph: Graph, samples: Part, shelf: Shelf, *, output: str | None, metric: Metric
    ) -> None:
        self.output = chosen_output(graph, output)
        self._named = output is not None
        self._graph = graph
        self._ranks = current()
        self._metric = metric
        own = dealt(graph, samples, self._ranks)
        self._places = own.places
        self._kept: list[tuple[dict[str, Kept], Kept]] = []
        run = graph.segment(list(graph.inputs.values()), [graph.outputs[self.output]])
        for batch in track(own, "running the original", own.batches):
            (result,) = run([batch[name] for name in graph.inputs])
            given = {name: shelf.keep(batch[name], like) for name, like in graph.inputs.items()}
            self._kept.append((given, shelf.keep(result, graph.outputs[self.output])))

    def measure(self, converted: Graph) -> Measurement:
        """The error of a graph with the same inputs and outputs.

        Outputs of other names are taken by place, where the user named none.
        """
        tally = Tally(self._metric)
        value = converted.outputs[self._same_output(converted)]
        run = converted.segment(list(converted.inputs.values()), [value])
        for (given, kept), places in zip(self._kept, self._places, strict=True):
            batch = {name: value.load() for name, value in given.items()}
            (result,) = run(self._given(converted, batch))
            original = self._graph.to_array(kept.load())
            mask = attention_mask(batch, self._graph)
            inputs = {} if isinstance(self._metric, str) else self._arrays(batch)
            tally.add(original, converted.to_array(result), mask, inputs, places)
        tally.join(self._ranks)
        return self._ranks.first(tally.measurement)

    def _arrays(self, batch: Batch) -> dict[str, npt.NDArray[Any]]:
        return {name: self._graph.to_array(native) for name, native in batch.items()}

    def _same_output(self, converted: Graph) -> str:
        names, others = list(self._graph.outputs), list(converted.outputs)
        if self._named or self.output in others or len(names) != len(others):
            return chosen_output(converted, self.output)
        return others[names.index(self.output)]

    def _given(self, converted: Graph, batch: Batch) -> list[Any]:
        """The batch as the other graph takes it; the two may be of different worlds."""
        missing = [name for name in converted.inputs if name not in batch]
        if missing:
            raise DataError(
                f"the models take different inputs: {', '.join(self._graph.inputs)} and "
                f"{', '.join(converted.inputs)}"
            )
        if type(converted) is type(self._graph):
            return [batch[name] for name in converted.inputs]
        return [
            converted.from_array(self._graph.to_array(batch[name]), value)
            for name, value in converted.inputs.items()
        ]


def chosen_output(graph: Graph, name: str | None) -> str:
    """The output to measure: the one named, else the first floating-point one.

    Raises OptionError for a name that the model does not have.
    """
    if name is not None:
        if name not in tuple(graph.outputs):
            raise OptionError(f"output is {name!r}; the model's are: {', '.join(graph.outputs)}")
        return name
    for candidate, value in graph.outputs.items():
        if _is_floating(value):
            return candidate
    raise OptionError(f"the model has no floating-point output; it has: {', '.join(graph.outputs)}")


def _is_floating(value: Value) -> bool:
    return value.dtype is None or "float" in value.dtype
