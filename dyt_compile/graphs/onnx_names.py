"""Names that nothing in an ONNX model has yet."""

from __future__ import annotations

from collections.abc import Iterable

import onnx_ir as ir

__all__ = ["Names"]


class Names:
    """Names that are free, found in no more time where thousands wish for the same one."""

    def __init__(self, taken: Iterable[str | None]) -> None:
        self._taken = set(taken)
        self._numbers: dict[str, int] = {}

    @classmethod
    def of_values(cls, model: ir.Model) -> Names:
        """Those that no value of the main graph, or of a graph within it, has."""
        graphs = (model.graph, *model.graph.subgraphs())
        ends = (v.name for graph in graphs for v in (*graph.inputs, *graph.initializers.values()))
        made = (value.name for node in model.graph.all_nodes() for value in node.outputs)
        return cls((*ends, *made))

    @classmethod
    def of_nodes(cls, model: ir.Model) -> Names:
        """Those that no node of the main graph, or of a graph within it, has."""
        return cls(node.name for node in model.graph.all_nodes())

    def free(self, wish: str) -> str:
        """`wish`, or `wish` with a number behind it."""
        name, number = wish, self._numbers.get(wish, 1)
        while name in self._taken:
            number += 1
            name = f"{wish}_{number}"
        self._numbers[wish] = number
        self._taken.add(name)
        return name
