"""Graphs of torch while they learn: what is learned in them, and values on the way."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils._pytree import tree_map_only

from ..dyt import DOMAIN
from ..terms import Value
from .fx import FxGraph
from .fx_constants import attribute

__all__ = ["dyt_paths", "learned", "watching"]

Node = torch.fx.Node

PRODUCTS = (
    torch.ops.aten.linear.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten.mm.default,
)
"""Where most of the time goes. Attention is left: its gradient in bfloat16 is slower on a CPU."""


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


def watching(
    graph: FxGraph, values: Sequence[Value], *, cut: bool, bfloat16: bool = False
) -> torch.fx.GraphModule:
    """A module that computes `values` from the graph's inputs, in the order of `graph.inputs`.

    Its weights are the graph's own. cut: what reads one of the values gets it without its
    history, so that each part of the model between two of them learns by itself. bfloat16: products
    with weights are computed in it; what they read and make has the dtypes that it had.
    """
    copied = torch.fx.Graph()
    copies: dict[Node, Node] = {}
    copied.graph_copy(graph.model.graph, copies)
    results = [copies[value.native] for value in values]
    for node in results if cut else ():
        if node.op == "call_function":
            _cut(copied, node)
    for node in copied.nodes if bfloat16 else ():
        if node.target in PRODUCTS:
            node.args, node.target = (node.target, *node.args), _rounded
    copied.output(tuple(results))
    copied.eliminate_dead_code()
    return torch.fx.GraphModule(graph.model, copied)


def _cut(graph: torch.fx.Graph, node: Node) -> None:
    with graph.inserting_after(node):
        detached = graph.call_function(torch.ops.aten.detach.default, (node,))
    node.replace_all_uses_with(detached, delete_user_cb=lambda user: user is not detached)


def _rounded(product: Callable[..., torch.Tensor], *args: Any, **kwargs: Any) -> torch.Tensor:
    """A product of float32 matrices, computed in bfloat16."""
    args, kwargs = tree_map_only(torch.Tensor, torch.Tensor.bfloat16, (args, kwargs))
    return product(*args, **kwargs).float()
