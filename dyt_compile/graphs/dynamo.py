"""Graphs of Dynamo: what `torch.compile` hands to a backend, looked at in aten, changed in place.

Dynamo's graph holds whatever the model called (functions, methods, operators), gradient and
autocast regions among it, and its weights come in as placeholders. It is traced to aten only to be
matched; what is replaced is replaced in Dynamo's own graph, which otherwise stays as it is.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from ..dyt import Form
from ..sites import NormSite
from ..terms import Value
from .fx import FxGraph

__all__ = ["Frame", "Replacement"]

Node = torch.fx.Node


@dataclass(frozen=True, eq=False)
class Replacement:
    """A site that becomes one operator of `form`.

    operands: what follows x, by name of the form's parameters: values of the frame's graph, or
    tensors, which become inputs that are appended to the frame's.
    """

    site: NormSite
    form: Form
    operands: Mapping[str, Value | torch.Tensor]


class Frame:
    """One GraphModule of Dynamo, and the aten graph in which it is matched.

    graph: parameters and buffers that Dynamo lifted to inputs count as constants there.
    Raises CaptureError if the module cannot be traced.
    """

    def __init__(self, module: torch.fx.GraphModule) -> None:
        # Inner backends own and change the module that they are given; the frame keeps its own.
        self._module, _ = _copied(module)
        trace = _Trace(self._module)
        self._made_by = trace.made_by
        self._inputs = list(self._module.graph.find_nodes(op="placeholder"))
        weights = {
            trace.placeholders[node]: (_path(node), _is_parameter(node))
            for node in self._inputs
            if node in trace.placeholders and _is_weight(node)
        }
        self.graph = FxGraph("frame", trace.module, (), {}, weights)
        self._nodes: dict[Value, Node] = {}
        for traced, node in trace.results.items():
            value = self.graph.value_of(traced)
            if value is not None:
                self._nodes.setdefault(value, node)

    def input_of(self, value: Value) -> int | None:
        """Which input of the frame a value is, None if it is none."""
        node = self._nodes.get(value)
        return None if node is None or node.op != "placeholder" else self._inputs.index(node)

    def has_symbols(self) -> bool:
        """Whether Dynamo passes sizes as inputs: some of the frame's axes are dynamic."""
        return any(
            isinstance(node.meta.get("example_value"), torch.SymInt) for node in self._inputs
        )

    def obstacle(self, site: NormSite) -> str | None:
        """Why a site cannot be replaced in this frame, None if it can."""
        if site.input not in self._nodes or site.output not in self._nodes:
            return "it lies inside an operator of torch that is called as one"
        between = self._between(site)
        first, last = (place(n.index for n in between) for place in (min, max))
        for node in self._order()[first : last + 1]:
            if _mutates(node):
                return f"{node.name} writes to a tensor while the norm is computed"
        return None

    def replaced(
        self, replacements: Sequence[Replacement], names: Iterable[str]
    ) -> torch.fx.GraphModule:
        """A copy of the module with the replacements made.

        names: those of the new inputs, in the order of the tensors in the replacements.
        """
        module, copies = _copied(self._module)
        self.replace_in(module.graph, copies, replacements, _Appended(module.graph, names))
        module.recompile()
        return module

    def nodes_in(self, graph: torch.fx.Graph) -> dict[Node, Node]:
        """The nodes of `graph`, of which this frame was made, by the frame's own nodes."""
        return dict(zip(self._module.graph.nodes, graph.nodes, strict=True))
