"""DyT in ONNX files: nodes of model-local functions, which TensorRT may replace by a plugin.

A node `dyt::DyT` runs everywhere by its function's body; because it carries `plugin_namespace`
and `plugin_version`, TensorRT binds the plugin of that name where one is registered.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from ..dyt import DOMAIN, FORMS, VERSION, Form

__all__ = ["call", "declare", "function"]

LEAST_OPSET = 15
"""CastLike, with which the bodies adapt to fp16 and bf16, came with opset 15."""

PLUGIN_ATTRIBUTES = {"plugin_namespace": DOMAIN, "plugin_version": str(VERSION)}


def call(form: Form, inputs: Sequence[ir.Value], output: str) -> ir.Node:
    """A node of the form; inputs: x and the form's parameters; output: its result's name."""
    attributes = [ir.AttrString(name, value) for name, value in PLUGIN_ATTRIBUTES.items()]
    node = ir.Node(DOMAIN, form.name, inputs, attributes, num_outputs=1, name=f"node_{output}")
    node.outputs[0].name = output
    return node


def declare(model: ir.Model) -> None:
    """Give the model the functions that its nodes call, and the domain's opset import."""
    opset = model.opset_imports.get("", 0)
    called = {node.op_type for node in model.graph.all_nodes() if node.domain == DOMAIN}
    if called and opset < LEAST_OPSET:
        # Opsets 14 and 15 only widened types and added operators and optional attributes.
        opset = model.opset_imports[""] = LEAST_OPSET
    for name in sorted(called & FORMS.keys()):
        body = function(FORMS[name], opset)
        model.functions[body.identifier()] = body
    if called:
        model.opset_imports[DOMAIN] = VERSION


def function(form: Form, opset: int) -> ir.Function:
    """The form's body, for any floating dtype of x; it computes in the dtype of alpha, float32."""
    x, *parameters = (ir.Value(name=name) for name in ("x", *form.parameters))
    named = dict(zip(form.parameters, parameters, strict=True))
    alpha = named["alpha"]
    nodes: list[ir.Node] = []

    def add(operator: str, name: str, *inputs: ir.Value) -> ir.Value:
        node = ir.Node("", operator, inputs, num_outputs=1, name=f"node_{name}")
        node.outputs[0].name = name
        nodes.append(node)
        return node.outputs[0]

    wide = add("CastLike", "wide", x, alpha)
    argument = add("Mul", "scaled", wide, alpha)
    if "shift" in named:
        argument = add("Add", "shifted", argument, named["shift"])
    y = add(form.squash.capitalize(), "squashed", argument)
    if "gamma" in named:
        y = add("Mul", "stretched", y, add("CastLike", "wide_gamma", named["gamma"], alpha))
    if "beta" in named:
        y = add("Add", "moved", y, add("CastLike", "wide_beta", named["beta"], alpha))
    result = add("CastLike", "y", y, x)
    graph = ir.Graph(
        [x, *parameters], [result], nodes=nodes, opset_imports={"": opset}, name=form.name
    )
    attributes = [ir.Attr(name, ir.AttributeType.UNDEFINED, None) for name in PLUGIN_ATTRIBUTES]
    return ir.Function(DOMAIN, form.name, "", graph=graph, attributes=attributes)
