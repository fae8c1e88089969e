"""Edits of exact algebra in an ONNX model."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import onnx_ir as ir

from ..errors import RewriteError
from . import onnx_functions
from .base import Edit, Stored

__all__ = ["make_edits"]

Hold = Callable[[Stored], ir.Value]
"""Makes an initializer."""


def make_edits(
    graph: ir.Graph, copies: dict[ir.Value, ir.Value], edits: Iterable[Edit], hold: Hold
) -> None:
    """Change the graph, in place; `copies` leads from the values of the terms to its own."""
    for edit in edits:
        native = edit.term.output.native
        copies[native] = _edited(graph, copies[native], edit, hold)


def _edited(graph: ir.Graph, output: ir.Value, edit: Edit, hold: Hold) -> ir.Value:
    """The value that the readers of an edited term read."""
    node = output.producer()
    if node is None:
        raise RewriteError(f"{output.name!r} has no node that makes it")
    for place, stored in edit.operands.items():
        if place >= len(node.inputs):
            node.resize_inputs(place + 1)
        node.replace_input_with(place, hold(stored))
    if edit.result is not None:
        return _instead(output, hold(edit.result))
    if edit.passed is not None:
        operand = node.inputs[edit.passed]
        if operand is None:
            raise RewriteError(f"node {node.name!r} has no input {edit.passed}")
        return _instead(output, operand)
    if edit.form is not None:
        kept = dict(zip(("x", *_parameters(edit)), node.inputs, strict=True))
        inputs = [kept[name] for name in ("x", *edit.form.parameters)]
        call = onnx_functions.call(edit.form, inputs, f"{output.name}_{edit.form.name}")  # type: ignore[arg-type]
        return _behind(graph, output, call)
    if edit.added is not None:
        add = ir.node("Add", [output, hold(edit.added)], name=f"{output.name}_bias")
        add.outputs[0].name = f"{output.name}_biased"
        return _behind(graph, output, add)
    return output


def _parameters(edit: Edit) -> tuple[str, ...]:
    form = edit.term.attributes["form"]
    return tuple(form.parameters)


def _behind(graph: ir.Graph, output: ir.Value, added: ir.Node) -> ir.Value:
    """Let the readers of a value read a node put behind it."""
    producer = output.producer()
    if producer is None:
        raise RewriteError(f"{output.name!r} has no node that makes it")
    result = added.outputs[0]
    result.shape, result.type = output.shape, output.type
    added.metadata_props.update(producer.metadata_props)
    graph.insert_after(producer, added)
    return _instead(output, result)


def _instead(output: ir.Value, other: ir.Value) -> ir.Value:
    """Let the readers of a value, and the model where it is an output, read another one."""
    for use in list(output.uses()):
        if use.node is not other.producer():
            use.node.replace_input_with(use.idx, other)
    return _renamed(output, other)


def _renamed(output: ir.Value, other: ir.Value) -> ir.Value:
    """An output of the model keeps its name; so do its inputs, weights and other outputs."""
    if not output.is_graph_output():
        return other
    if other.is_graph_input() or other.is_initializer() or other.is_graph_output():
        other = _copied(output, other)
    name = output.name
    output.name, other.name = f"{name}_unfolded", name
    outputs = output.graph.outputs if output.graph is not None else []
    for place, value in enumerate(outputs):
        if value is output:
            outputs[place] = other
    return other


def _copied(output: ir.Value, other: ir.Value) -> ir.Value:
    """A value of its own that is the same as another one, where `output` is made."""
    producer = output.producer()
    if producer is None or not isinstance(producer.graph, ir.Graph):
        raise RewriteError(f"{output.name!r} has no node that makes it")
    copy = ir.node("Identity", [other], name=f"{output.name}_copy")
    copy.outputs[0].shape, copy.outputs[0].type = output.shape, output.type
    copy.metadata_props.update(producer.metadata_props)
    producer.graph.insert_after(producer, copy)
    return copy.outputs[0]
