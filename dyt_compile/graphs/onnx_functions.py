"""DyT in ONNX files: nodes of model-local functions, which TensorRT may replace by a plugin.

A node `dyt::DyT` runs everywhere by its function's body; because it carries `plugin_namespace`
and `plugin_version`, TensorRT binds the plugin of that name where one is registered.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from ..dyt import DOMAIN, FORMS, FUSED, VERSION, Form
from .onnx_inlining import inline

__all__ = ["LEAST_OPSET", "call", "declare", "function", "spell_out"]

LEAST_OPSET = 15
"""CastLike, with which the bodies adapt to fp16 and bf16, came with opset 15."""

OUTPUT_DTYPE_OPSET = 21
"""Since then QuantizeLinear is told its type by an attribute; before, by its zero point."""

PLUGIN_ATTRIBUTES = {"plugin_namespace": DOMAIN, "plugin_version": str(VERSION)}
OUTPUT_DTYPE = "output_dtype"

WIDE = ir.DataType.FLOAT
"""The type of alpha, in which bodies compute."""


def call(
    form: Form, inputs: Sequence[ir.Value], output: str, dtype: ir.DataType | None = None
) -> ir.Node:
    """A node of the form; inputs: as the form names them; output: the name of y.

    dtype: of y, where the form is quantized.
    """
    attributes: list[ir.Attr] = [
        ir.AttrString(name, value) for name, value in PLUGIN_ATTRIBUTES.items()
    ]
    if dtype is not None:
        attributes.append(ir.AttrInt64(OUTPUT_DTYPE, dtype.value))
    count = len(form.outputs)
    node = ir.Node(DOMAIN, form.name, inputs, attributes, num_outputs=count, name=f"node_{output}")
    for value, name in zip(node.outputs, (output, f"{output}_sum"), strict=False):
        value.name = name
    return node


def declare(model: ir.Model) -> None:
    """Give the model the functions that its nodes call, and the domain's opset import."""
    opset = model.opset_imports.get("", 0)
    called = {node.op_type for node in model.graph.all_nodes() if node.domain == DOMAIN}
    if called and opset < LEAST_OPSET:
        # Opsets 14 and 15 only widened types and added operators and optional attributes.
        opset = model.opset_imports[""] = LEAST_OPSET
    called |= {FUSED[name].base for name in called & FUSED.keys()}
    for name in sorted(called & (FORMS | FUSED).keys()):
        body = function((FORMS | FUSED)[name], opset)
        model.functions[body.identifier()] = body
    if called:
        model.opset_imports[DOMAIN] = VERSION


def spell_out(model: ir.Model) -> None:
    """Write every form out as the operators of its body, in place; casts to the same type go."""
    known = set(model.graph)
    inline(model, lambda body: body.domain == DOMAIN)
    for node in [node for node in model.graph if node not in known]:
        if node.op_type == "CastLike" and not node.outputs[0].is_graph_output():
            x, like = (value for value in node.inputs if value is not None)
            if (x.dtype or WIDE) == like.dtype:
                node.outputs[0].replace_all_uses_with(x)
                model.graph.remove(node, safe=True)
    model.opset_imports.pop(DOMAIN, None)


def function(form: Form, opset: int) -> ir.Function:
    """The form's body, for any floating dtype of x; it computes in the dtype of alpha, float32."""
    named = {name: ir.Value(name=name) for name in form.inputs}
    body = _Body(form.name)
    outputs = _around(body, form, named, opset) if form.base else [_squashed(body, form, named)]
    imports = {"": opset, DOMAIN: VERSION} if form.base else {"": opset}
    graph = ir.Graph(
        list(named.values()), outputs, nodes=body.nodes, opset_imports=imports, name=form.name
    )
    names = [*PLUGIN_ATTRIBUTES, *([OUTPUT_DTYPE] if form.quantized else [])]
    attributes = [ir.Attr(name, ir.AttributeType.UNDEFINED, None) for name in names]
    return ir.Function(DOMAIN, form.name, "", graph=graph, attributes=attributes)


class _Body:
    """The nodes of a function, in order."""

    def __init__(self, function: str) -> None:
        self._function = function
        self.nodes: list[ir.Node] = []

    def add(
        self, operator: str, name: str, *inputs: ir.Value, attributes: Sequence[ir.Attr] = ()
    ) -> ir.Value:
        # TensorRT names layers after nodes, so nodes of nested functions are told apart.
        label = f"{self._function}_{name}"
        node = ir.Node("", operator, inputs, attributes, num_outputs=1, name=label)
        return self.append(node, name)

    def append(self, node: ir.Node, name: str) -> ir.Value:
        node.outputs[0].name = name
        self.nodes.append(node)
        return node.outputs[0]


def _squashed(body: _Body, form: Form, named: dict[str, ir.Value]) -> ir.Value:
    """gamma * squash(alpha * x + shift) + beta, in the dtype of x."""
    alpha = named["alpha"]
    argument = body.add("Mul", "scaled", body.add("CastLike", "wide", named["x"], alpha), alpha)
    if "shift" in named:
        argument = body.add("Add", "shifted", argument, named["shift"])
    y = body.add(form.squash.capitalize(), "squashed", argument)
    if "gamma" in named:
        gamma = body.add("CastLike", "wide_gamma", named["gamma"], alpha)
        y = body.add("Mul", "stretched", y, gamma)
    if "beta" in named:
        beta = body.add("CastLike", "wide_beta", named["beta"], alpha)
        y = body.add("Add", "moved", y, beta)
    return body.add("CastLike", "y", y, named["x"])


def _around(body: _Body, form: Form, named: dict[str, ir.Value], opset: int) -> list[ir.Value]:
    """The base form with what is fused with it: the same nodes as where they stand apart."""
    x = named["x"]
    if form.residual:
        x = body.add("Add", "sum", x, named["residual"])
    name = "exact" if form.quantized else "y"
    base = call(FORMS[form.base], [x, *(named[p] for p in form.parameters)], name)
    y = body.append(base, name)
    if form.quantized:
        y = _quantized(body, y, named["y_scale"], opset)
    return [y, x] if form.residual else [y]


def _quantized(body: _Body, y: ir.Value, scale: ir.Value, opset: int) -> ir.Value:
    wide = body.add("CastLike", "wide", y, scale)
    if opset >= OUTPUT_DTYPE_OPSET:
        dtype = ir.RefAttr(OUTPUT_DTYPE, OUTPUT_DTYPE, ir.AttributeType.INT)
        return body.add("QuantizeLinear", "y", wide, scale, attributes=[dtype])
    zero = body.add("Constant", "zero", attributes=[ir.AttrFloat32("value_float", 0.0)])
    dtype = ir.RefAttr("to", OUTPUT_DTYPE, ir.AttributeType.INT)
    zero_point = body.add("Cast", "zero_point", zero, attributes=[dtype])
    return body.add("QuantizeLinear", "y", wide, scale, zero_point)
