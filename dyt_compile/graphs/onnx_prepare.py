"""What an ONNX model goes through before it is looked at: its functions inlined, the operators that
ONNX Runtime fused taken apart again where they swallow an Add, shapes and dtypes inferred.

ONNX Runtime fuses the same operators again when it loads a file.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

from ..dyt import DOMAIN
from ..errors import CaptureError

__all__ = ["prepare"]

MICROSOFT = "com.microsoft"

OLDEST_OPSET = 13
"""Older files have axes as attributes of operators that were given inputs for them since."""

STAND_INS = {
    "SimplifiedLayerNormalization": "LayerNormalization",
    **dict.fromkeys(
        ("Attention", "BiasGelu", "FastGelu", "Gelu", "MultiHeadAttention", "QuickGelu"), "Identity"
    ),
}
"""Operators of ONNX Runtime, and the standard ones whose first output has the same shape."""


def prepare(model: ir.Model) -> None:
    """Make a model ready to be seen as terms, in place. Raises CaptureError for old opsets."""
    opset = model.opset_imports.get("", OLDEST_OPSET)
    if opset < OLDEST_OPSET:
        raise CaptureError(
            f"the model has opset {opset}; allowed: {OLDEST_OPSET} and newer "
            "(onnx.version_converter.convert_version makes it newer)"
        )
    if any(function.domain != DOMAIN for function in model.functions.values()):
        common.InlinePass(lambda function: function.domain != DOMAIN)(model)
    for node in list(model.graph):
        taking_apart = _APART.get(node.op_type) if node.domain in ("", MICROSOFT) else None
        if taking_apart is not None:
            taking_apart(model.graph, node)
    model.graph.sort()
    _infer_shapes(model)


def _infer_shapes(model: ir.Model) -> None:
    """Shapes and dtypes by onnx's inference, which stops at operators that it does not know."""
    stood_in = []
    for node in model.graph:
        stand_in = STAND_INS.get(node.op_type)
        if stand_in is not None and node.domain in ("", MICROSOFT):
            stood_in.append((node, node.domain, node.op_type, list(node.inputs)))
            node.domain, node.op_type = "", stand_in
            if stand_in == "Identity":
                node.resize_inputs(1)
    try:
        common.ShapeInferencePass(check_type=False, strict_mode=False)(model)
    finally:
        for node, domain, name, inputs in stood_in:
            node.domain, node.op_type = domain, name
            node.resize_inputs(len(inputs))
            for place, value in enumerate(inputs):
                node.replace_input_with(place, value)


class _Builder:
    """Standard nodes in place of a fused one, under names made from its own."""

    def __init__(self, graph: ir.Graph, fused: ir.Node) -> None:
        self._graph = graph
        self._fused = fused
        self._count = 0

    def add(
        self, operator: str, *inputs: ir.Value | None, domain: str = "", **attributes: int | float
    ) -> ir.Value:
        """A node before the fused one; its first output, of the fused one's dtype."""
        node = ir.node(
            operator, inputs, attributes, domain=domain, name=f"{self._fused.name}_{self._count}"
        )
        self._count += 1
        node.outputs[0].name = f"{self._fused.outputs[0].name}_part{self._count}"
        node.metadata_props.update(self._fused.metadata_props)
        self._graph.insert_before(self._fused, node)
        return node.outputs[0]

    def constant(self, array: np.ndarray) -> ir.Value:
        """An initializer."""
        self._count += 1
        name = f"{self._fused.outputs[0].name}_constant{self._count}"
        tensor = ir.tensor(array, name=name)
        value = ir.Value(
            name=name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype),
            const_value=tensor,
        )  # fmt: skip
        self._graph.register_initializer(value)
        return value

    def give(self, place: int, value: ir.Value) -> None:
        """Let the readers of an output of the fused node read `value`, which takes its name."""
        if len(self._fused.outputs) <= place or not self._fused.outputs[place].name:
            return
        old = self._fused.outputs[place]
        name = old.name
        if value.shape is None:
            value.shape, value.type = old.shape, old.type
        old.replace_all_uses_with(value, replace_graph_outputs=True)
        old.name, value.name = f"{name}_fused", name

    def done(self) -> None:
        """Remove the fused node. Raises CaptureError where one of its outputs is still read."""
        for output in self._fused.outputs:
            if output.uses() or output.is_graph_output():
                raise CaptureError(
                    f"node {self._fused.name!r} ({self._fused.op_type}): its output "
                    f"{output.name!r} is read, which cannot be kept when it is taken apart"
                )
        self._graph.remove(self._fused)


def _skip_layer_norm(graph: ir.Graph, node: ir.Node) -> None:
    """(input, skip, gamma, beta, bias) -> (y, mean, deviation, sum)."""
    source, skip, gamma, beta, bias = _inputs(node, 5)
    _skip_norm(graph, node, (source, skip, bias), "LayerNormalization", (gamma, beta))


def _skip_simplified_layer_norm(graph: ir.Graph, node: ir.Node) -> None:
    """(input, skip, gamma, bias) -> (y, mean, deviation, sum)."""
    source, skip, gamma, bias = _inputs(node, 4)
    _skip_norm(graph, node, (source, skip, bias), "SimplifiedLayerNormalization", (gamma,))


def _skip_norm(
    graph: ir.Graph,
    node: ir.Node,
    summands: tuple[ir.Value | None, ...],
    norm: str,
    affine: tuple[ir.Value | None, ...],
) -> None:
    builder = _Builder(graph, node)
    total = summands[0]
    for summand in summands[1:]:
        if summand is not None:
            total = builder.add("Add", total, summand)
    eps = node.attributes.get_float("epsilon", 1e-5)
    y = builder.add(norm, total, *affine, axis=-1, epsilon=eps, stash_type=1)
    if total is not None:
        builder.give(3, total)
    builder.give(0, y)
    builder.done()


def _embed_layer_norm(graph: ir.Graph, node: ir.Node) -> None:
    """(ids, segments, word, position, segment tables, gamma, beta, mask, position ids)
    -> (y, mask index, sum)."""
    ids, segments, words, positions, kinds, gamma, beta, mask, places = _inputs(node, 9)
    builder = _Builder(graph, node)
    total = builder.add("Gather", words, ids)
    if places is None:
        length = builder.add("Shape", ids, start=1, end=2)
        zero = builder.constant(np.array(0, np.int64))
        one = builder.constant(np.array(1, np.int64))
        first = builder.constant(np.array([0], np.int64))
        places = builder.add("Range", zero, builder.add("Squeeze", length, first), one)
    total = builder.add("Add", total, builder.add("Gather", positions, places))
    if segments is not None:
        total = builder.add("Add", total, builder.add("Gather", kinds, segments))
    eps = node.attributes.get_float("epsilon", 1e-12)
    y = builder.add("LayerNormalization", total, gamma, beta, axis=-1, epsilon=eps)
    if mask is not None:
        axis = builder.constant(np.array([1], np.int64))
        builder.give(1, builder.add("ReduceSum", mask, axis, keepdims=0))
    builder.give(2, total)
    builder.give(0, y)
    builder.done()


def _inputs(node: ir.Node, count: int) -> tuple[ir.Value | None, ...]:
    given = list(node.inputs)[:count]
    return tuple(given + [None] * (count - len(given)))


_APART: dict[str, Callable[[ir.Graph, ir.Node], None]] = {
    "SkipLayerNormalization": _skip_layer_norm,
    "SkipSimplifiedLayerNormalization": _skip_simplified_layer_norm,
    "EmbedLayerNormalization": _embed_layer_norm,
}
