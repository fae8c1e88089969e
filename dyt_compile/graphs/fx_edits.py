"""Edits of exact algebra in a graph of torch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch

from ..dyt import DOMAIN
from ..nn import operator
from .base import Edit, Stored

__all__ = ["make_edits", "targets"]

Node = torch.fx.Node
Hold = Callable[[Node, Stored], Node]
"""Makes a node before another one that yields a constant."""

PLACES = {
    "linear": ("input", "weight", "bias"),
    "addmm": ("mat1", "mat2", "self"),
    "mm": ("self", "mat2"),
    "bmm": ("self", "mat2"),
    **dict.fromkeys(("conv1d", "conv2d", "conv3d", "convolution"), ("input", "weight", "bias")),
}
"""Arguments by their place among a term's inputs; others have "self" and "other"."""


def make_edits(
    graph: torch.fx.Graph, copies: dict[Node, Node], edits: Iterable[Edit]
) -> dict[Node, Stored]:
    """Change the graph, in place; the nodes that yield new constants, still without a target."""
    held: dict[Node, Stored] = {}

    def hold(before: Node, stored: Stored) -> Node:
        with graph.inserting_before(before):
            node = graph.create_node("get_attr", f"_stored_{len(held)}")
        held[node] = stored
        return node

    for edit in edits:
        native = edit.term.output.native
        copies[native] = _edited(graph, copies[native], edit, hold)
    return held


def _edited(graph: torch.fx.Graph, node: Node, edit: Edit, hold: Hold) -> Node:
    """The node whose result the readers of an edited term read."""
    for place, stored in edit.operands.items():
        _set(node, _names(node)[place], hold(node, stored))
    if edit.result is not None:
        return _instead(node, hold(node, edit.result))
    if edit.passed is not None:
        return _instead(node, _like(graph, _given(node, _names(node)[edit.passed]), node))
    if edit.form is not None:
        arguments = [_given(node, name) for name in ("x", *edit.form.parameters)]
        with graph.inserting_after(node):
            call = graph.call_function(operator(edit.form), tuple(arguments))
        call.meta = dict(node.meta)
        return _instead(node, call)
    if edit.added is not None:
        with graph.inserting_after(node):
            added = graph.call_function(torch.ops.aten.add.Tensor, (node, node))
        added.meta = dict(node.meta)
        node.replace_all_uses_with(added, delete_user_cb=lambda user: user is not added)
        added.args = (node, hold(added, edit.added))
        return added
    return node


def _names(node: Node) -> tuple[str, ...]:
    schema = node.target._schema  # type: ignore[union-attr]
    namespace, _, name = schema.name.partition("::")
    if namespace == DOMAIN:
        return tuple(argument.name for argument in schema.arguments)
    return PLACES.get(name, ("self", "other"))


def _place(node: Node, name: str) -> int:
    arguments = node.target._schema.arguments  # type: ignore[union-attr]
    return [argument.name for argument in arguments].index(name)


def _given(node: Node, name: str) -> Node:
    place = _place(node, name)
    found = node.args[place] if place < len(node.args) else node.kwargs[name]
    if not isinstance(found, Node):
        raise TypeError(f"{node.name}: its {name} is {found!r}, no value of the graph")
    return found


def _set(node: Node, name: str, value: Node) -> None:
    place = _place(node, name)
    if place < len(node.args):
        node.update_arg(place, value)
    else:
        node.update_kwarg(name, value)


def _instead(node: Node, other: Node) -> Node:
    node.replace_all_uses_with(other)
    return other


def _like(graph: torch.fx.Graph, source: Node, node: Node) -> Node:
    """The source in the layout of the node that it stands for: what follows may view it."""
    before, after = source.meta.get("val"), node.meta.get("val")
    if before is None or after is None or before.is_contiguous() or not after.is_contiguous():
        return source
    with graph.inserting_after(source):
        contiguous = graph.call_function(torch.ops.aten.contiguous.default, (source,))
    contiguous.meta = dict(node.meta)
    return contiguous


def targets(held: Mapping[Node, Stored], taken: Iterable[str]) -> dict[Node, str]:
    """A free path for each new constant: its name, or one like it."""
    paths = set(taken)
    chosen = {}
    for node, stored in held.items():
        path = stored.name.replace("#", "_call")
        while any(f"{p}.".startswith(f"{path}.") or f"{path}.".startswith(f"{p}.") for p in paths):
            path += "_folded"
        paths.add(path)
        chosen[node] = path
    return chosen
