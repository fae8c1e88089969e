"""Regions of torch graphs: the subgraphs that a higher-order operator runs.

What runs its one subgraph exactly once (autocast, no_grad, checkpoints, marked regions) is laid
open, so that the norms in it are found and replaced like any other. The subgraphs of control flow
stay; `subgraphs` tells what they compute, so that norms in them are seen and refused.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch._ops import HigherOrderOperator
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.traceback import preserve_node_meta
from torch.utils import _pytree as pytree

from ..errors import CaptureError, first_line

__all__ = ["CHECKPOINTS", "RUN_ONCE", "is_functional", "is_write", "lay_open", "subgraphs"]

Node = torch.fx.Node

CHECKPOINTS = {"tag_activation_checkpoint", "wrap_activation_checkpoint"}
RUN_ONCE = {
    *CHECKPOINTS, "hints_wrapper", "invoke_subgraph", "wrap", "wrap_with_autocast",
    "wrap_with_set_grad_enabled",
}  # fmt: skip
"""Operators that run their one subgraph exactly once, and return what it returns."""

CONTROL_FLOW = {"cond", "map_impl", "scan", "while_loop"}
"""Operators whose subgraphs get the operands that follow them, in that order."""


def subgraphs(module: torch.nn.Module, node: Node) -> tuple[list[torch.fx.GraphModule], list[Any]]:
    """The GraphModules that a node runs, and the operands that each of them gets.

    Both are empty for everything but regions and control flow.
    """
    if _name(node) not in RUN_ONCE | CONTROL_FLOW:
        return [], []
    places = [place for place, held in enumerate(node.args) if _held(module, held) is not None]
    if not places:
        return [], []
    rest = node.args[places[-1] + 1 :]
    if _name(node) == "invoke_subgraph":
        rest = rest[1:]  # the name by which equal ones are known
    found = [_held(module, node.args[place]) for place in places]
    return [held for held in found if held is not None], pytree.tree_leaves(rest)


def is_write(node: Node) -> bool:
    """Whether a node writes to one of its operands."""
    return bool(getattr(getattr(node.target, "_schema", None), "is_mutable", False))


def is_functional(module: torch.fx.GraphModule) -> bool:
    """Whether every node, those of subgraphs too, does nothing but compute a result.

    None writes to an operand, and none stands between the calls that begin and end a vmap.
    """
    graphs = (part.graph for part in module.modules() if isinstance(part, torch.fx.GraphModule))
    return not any(is_write(node) or _is_vmap(node) for graph in graphs for node in graph.nodes)


def _is_vmap(node: Node) -> bool:
    return str(getattr(node.target, "__module__", "")).startswith("torch._functorch")


def lay_open(module: torch.fx.GraphModule, names: Collection[str] = frozenset(RUN_ONCE)) -> None:
    """Put the nodes of regions in the place of the operators that run them, in the module itself.

    names: the operators that are laid open, of `RUN_ONCE`. Raises CaptureError where a region
    cannot be traced.
    """
    for node in list(module.graph.nodes):
        if _name(node) not in names:
            continue
        bodies, operands = subgraphs(module, node)
        if len(bodies) != 1:
            continue
        body = _explicit(bodies[0], node, operands)
        lay_open(body, names)
        _put(module, node, body, operands)
    module.recompile()


def _held(module: torch.nn.Module, argument: Any) -> torch.fx.GraphModule | None:
    """The GraphModule that an argument names."""
    if not isinstance(argument, Node) or argument.op != "get_attr":
        return None
    held: Any = module
    for name in str(argument.target).split("."):
        held = getattr(held, name)
    return held if isinstance(held, torch.fx.GraphModule) else None


def _explicit(
    body: torch.fx.GraphModule, node: Node, operands: Sequence[Any]
) -> torch.fx.GraphModule:
    """A copy of a region that computes the same outside its operator: its casts as nodes."""
    if _name(node) != "wrap_with_autocast" or not node.args[2]:
        return torch.fx.GraphModule(body, _copied(body.graph))
    values = [o.meta["val"] if isinstance(o, Node) else o for o in operands]
    fake = next((v.fake_mode for v in values if isinstance(v, FakeTensor)), nullcontext())
    try:
        with fake, torch.no_grad(), preserve_node_meta(), _autocast(node):
            return make_fx(lambda *given: _Region(body).run(*given))(*values)
    except Exception as error:
        raise CaptureError(f"{node.name} cannot be traced to aten: {first_line(error)}") from error


class _Region(torch.fx.Interpreter):
    """Runs a region node by node, those within it too, so that their nodes keep their scopes."""

    def run_node(self, n: Node) -> Any:
        name = _name(n)
        if name not in ("wrap_with_autocast", "wrap_with_set_grad_enabled"):
            return super().run_node(n)
        bodies, operands = subgraphs(self.module, n)
        given = torch.fx.node.map_arg(tuple(operands), self.env.__getitem__)
        with _autocast(n) if name == "wrap_with_autocast" else nullcontext():
            result = _Region(bodies[0]).run(*given)
        if name == "wrap_with_autocast" or n.args[0]:
            return result
        return pytree.tree_map_only(torch.Tensor, torch.Tensor.detach, result)


def _autocast(node: Node) -> AbstractContextManager[Any]:
    told: Any = node.args[:4]
    device, dtype, enabled, cached = told
    context: AbstractContextManager[Any] = torch.autocast(
        device, dtype=dtype, enabled=enabled, cache_enabled=cached
    )
    return context


def _copied(graph: torch.fx.Graph) -> torch.fx.Graph:
    copied = torch.fx.Graph()
    copied.output(copied.graph_copy(graph, {}))
    return copied


def _name(node: Node) -> str:
    return node.target.name() if isinstance(node.target, HigherOrderOperator) else ""


def _put(
    module: torch.fx.GraphModule,
    node: Node,
    body: torch.fx.GraphModule,
    operands: Sequence[Any],
) -> None:
    """Copy the nodes of `body` before `node`, and let what reads `node` read their results."""
    inputs = iter(operands)
    copies: dict[Node, Any] = {}
    with module.graph.inserting_before(node):
        for inner in body.graph.nodes:
            if inner.op == "placeholder":
                copies[inner] = next(inputs)
            elif inner.op == "output":
                result = torch.fx.node.map_arg(inner.args[0], copies.__getitem__)
            else:
                copy = copies[inner] = module.graph.node_copy(inner, copies.__getitem__)
                if inner.op in ("get_attr", "call_module"):
                    copy.target = _taken_over(module, body, str(inner.target))
                if _name(node) == "invoke_subgraph":  # traced once for calls of several modules
                    copy.meta.pop("nn_module_stack", None)
        if _name(node) == "wrap_with_set_grad_enabled" and not node.args[0]:
            result = torch.fx.node.map_arg(result, _detached(module.graph))
    _read_instead(module.graph, node, result)


def _taken_over(module: torch.nn.Module, body: torch.nn.Module, path: str) -> str:
    """The name under which `module` holds what `body` holds under a path."""
    held: Any = body
    for name in path.split("."):
        held = getattr(held, name)
    name, number = path.replace(".", "_"), 0
    while hasattr(module, name):
        number += 1
        name = f"{path.replace('.', '_')}_{number}"
    if isinstance(held, torch.Tensor) and not isinstance(held, torch.nn.Parameter):
        module.register_buffer(name, held)
    else:
        setattr(module, name, held)
    return name


def _detached(graph: torch.fx.Graph) -> Callable[[Node], Node]:
    def detached(node: Node) -> Node:
        made = graph.call_function(torch.ops.aten.detach.default, (node,))
        made.meta = dict(node.meta)
        return made

    return detached


def _read_instead(graph: torch.fx.Graph, node: Node, result: Any) -> None:
    """Let every reader of `node` read `result`, or its part where it takes one."""
    for user in list(node.users):
        if user.target is operator.getitem and isinstance(result, (tuple, list)):
            place: Any = user.args[1]
            part = result[place]
            if isinstance(part, Node):
                user.replace_all_uses_with(part)
                graph.erase_node(user)
                continue
        user.args = _swapped(user.args, node, result)
        user.kwargs = _swapped(user.kwargs, node, result)
    graph.erase_node(node)
    for operand in node.args:
        if isinstance(operand, Node) and operand.op == "get_attr" and not operand.users:
            graph.erase_node(operand)


def _swapped(arguments: Any, node: Node, result: Any) -> Any:
    swapped: Mapping[str, Any] | tuple[Any, ...] = torch.fx.node.map_arg(
        arguments, lambda n: result if n is node else n
    )
    return swapped
