"""Graphs of torch while they learn: what is learned in them, and values on the way."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.fx.passes.split_module import split_module
from torch.utils._pytree import tree_map_only

from ..dyt import DOMAIN
from ..terms import Value
from .fx import FxGraph
from .fx_constants import attribute

__all__ = ["Weight", "dyt_paths", "learned", "learning", "parted", "watching"]

Node = torch.fx.Node

PRODUCTS = (
    torch.ops.aten.linear.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten.mm.default,
)
"""Where most of the time goes. Attention is left: its gradient in bfloat16 is slower on a CPU."""

WEIGHT = "learned_weight_"
"""What the names of weights begin with in a module that learns."""

SHARED = 0
"""The number of the part whose weights several others read."""


def learned(graph: FxGraph) -> dict[str, torch.nn.Parameter]:
    """Every floating-point parameter that the graph reads, by path; shared ones at each path."""
    module = graph.model
    held = {
        str(node.target): attribute(module, str(node.target))
        for node in module.graph.find_nodes(op="get_attr")
    }
    return {
        path: tensor
        for path, tensor in held.items()
        if isinstance(tensor, torch.nn.Parameter) and tensor.is_floating_point()
    }


def dyt_paths(graph: FxGraph) -> frozenset[str]:
    """The paths of the parameters of DyT and Derf: alpha, shift, gamma and beta."""
    return frozenset(
        str(operand.target)
        for node in graph.model.graph.nodes
        if getattr(node.target, "namespace", "") == DOMAIN
        for operand in node.all_input_nodes
        if operand.op == "get_attr"
    )


def watching(graph: FxGraph, values: Sequence[Value]) -> torch.fx.GraphModule:
    """A module that computes `values` from the graph's inputs, in the order of `graph.inputs`.

    Its weights are the graph's own.
    """
    copied, results = _computing(graph, values)
    copied.output(tuple(results))
    copied.eliminate_dead_code()
    return torch.fx.GraphModule(graph.model, copied)


class Weight(torch.nn.Module):
    """A parameter as the model reads it, of one that is learned in float32 (float64 of float64)."""

    def __init__(self, given: torch.nn.Parameter) -> None:
        super().__init__()
        self._dtype, self._shape = given.dtype, given.shape
        wide = given.detach().to(torch.promote_types(given.dtype, torch.float32), copy=True)
        self.master = torch.nn.Parameter(torch.atleast_1d(wide))  # numbers alone are not sharded

    def forward(self) -> torch.Tensor:
        """In the dtype and the shape that it was given in."""
        return self.master.to(self._dtype).reshape(self._shape)


def learning(
    graph: FxGraph, values: Sequence[Value], weights: Mapping[str, Weight], *, bfloat16: bool
) -> torch.fx.GraphModule:
    """As `watching`, with weights in place of the parameters at their paths; the others stand.

    It is called with the inputs and a bool: cut, where what reads one of the values gets it without
    its history, so that each part of the model between two of them learns by itself. bfloat16:
    products with weights are computed in it; what they read and make has the dtypes that it had.
    """
    copied, results = _computing(graph, values)
    last = copied.find_nodes(op="placeholder")[-1]
    with copied.inserting_after(last):
        cut = copied.placeholder("cut")
    for node in results:
        if node.op == "call_function":
            _pass(copied, node, cut)
    for node in copied.nodes if bfloat16 else ():
        if node.target in PRODUCTS:
            node.args, node.target = (node.target, *node.args), _rounded
    copied.output(tuple(results))
    copied.eliminate_dead_code()
    names = {id(weight): f"{WEIGHT}{n}" for n, weight in enumerate(weights.values())}
    held: dict[str, Any] = {names[id(weight)]: weight for weight in weights.values()}
    for node in copied.nodes:
        if node.op == "get_attr" and node.target in weights:
            node.op, node.target = "call_module", names[id(weights[node.target])]
        elif node.op in ("get_attr", "call_module"):
            own = attribute(graph.model, str(node.target))
            held[str(node.target)] = own.detach() if isinstance(own, torch.Tensor) else own
    return torch.fx.GraphModule(held, copied)


def parted(student: torch.fx.GraphModule) -> tuple[torch.fx.GraphModule, list[torch.nn.Module]]:
    """The same as a chain of modules, cut at the values; and those, each with its own weights.

    Weights that several of them read are in none.
    """
    nodes = list(student.graph.nodes)
    ends = [place for place, node in enumerate(nodes) if node.target is _passed]
    numbers = {node: 1 + bisect_left(ends, place) for place, node in enumerate(nodes)}
    calls = [n for n in nodes if n.op == "call_module" and n.target.startswith(WEIGHT)]
    readers: dict[str, set[int]] = {}
    for call in calls:
        readers.setdefault(call.target, set()).update(map(numbers.__getitem__, call.users))
    for call in calls:
        own = readers[call.target]
        numbers[call] = max(own) if len(own) == 1 else SHARED
    chain = split_module(student, student, numbers.__getitem__)
    parts = [module for name, module in chain.named_children() if name != f"submod_{SHARED}"]
    return chain, [module for module in parts if next(module.parameters(), None) is not None]


def _computing(graph: FxGraph, values: Sequence[Value]) -> tuple[torch.fx.Graph, list[Node]]:
    """A copy of the graph, still without an output, and the values in it."""
    copied = torch.fx.Graph()
    copies: dict[Node, Node] = {}
    copied.graph_copy(graph.model.graph, copies)
    return copied, [copies[value.native] for value in values]


def _pass(graph: torch.fx.Graph, node: Node, cut: Node) -> None:
    with graph.inserting_after(node):
        passed = graph.call_function(_passed, (node, cut))
    node.replace_all_uses_with(passed, delete_user_cb=lambda user: user is not passed)


def _passed(value: torch.Tensor, cut: bool) -> torch.Tensor:
    """A value without its history, as a leaf: so that a part knows when its gradients are done."""
    return value.detach().requires_grad_(value.requires_grad) if cut else value


def _rounded(product: Callable[..., torch.Tensor], *args: Any, **kwargs: Any) -> torch.Tensor:
    """A product of float32 matrices, computed in bfloat16."""
    args, kwargs = tree_map_only(torch.Tensor, torch.Tensor.bfloat16, (args, kwargs))
    return product(*args, **kwargs).float()
