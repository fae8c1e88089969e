"""Norms fused with what is no part of them: taken apart, and put together again.

ONNX Runtime fuses an Add before a norm, and so hides the sum that its site normalizes; torch's
exporter fuses a modulation behind one, a scale computed from the model's inputs (opset 23). What
stays a norm becomes the fused operator again, so that it computes what it did, to the last bit.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir

__all__ = ["MICROSOFT", "fuse_again", "take_apart"]

MICROSOFT = "com.microsoft"

NORMS = {"LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization"}

FUSED = "dyt_compile.fused"
"""Where the norm of a fused operator that was taken apart keeps how to fuse it again."""


def take_apart(model: ir.Model) -> None:
    """Standard nodes in place of fused norms, in branches and loops too."""
    for node in list(model.graph.all_nodes()):
        taking_apart = _APART.get(node.op_type) if node.domain in ("", MICROSOFT) else None
        if taking_apart is not None and isinstance(node.graph, ir.Graph):
            taking_apart(node.graph, node)
    _take_modulations_apart(model)


def fuse_again(model: ir.Model) -> None:
    """Undo `take_apart` wherever the norm, and what it was fused with, are still there."""
    changed = False
    for norm in list(model.graph.all_nodes()):
        if FUSED in norm.meta and isinstance(norm.graph, ir.Graph):
            fusing, *facts = norm.meta[FUSED] or (None,)
            changed |= fusing is not None and fusing(norm.graph, norm, *facts)
    if changed:
        model.graph.sort()


def _take_modulations_apart(model: ir.Model) -> None:
    """A norm with a gamma or beta that is computed from the model's inputs, and that gamma behind.

    Where the file does not say how many channels there are, the norm stays as it is.
    """
    norms = [
        node for node in model.graph if node.op_type in NORMS
        and any(value is not None and value.producer() for value in node.inputs[1:])
    ]  # fmt: skip
    if not norms:
        return
    varying = {value for value in model.graph.inputs if not value.is_initializer()}
    for node in model.graph:
        if not varying.isdisjoint(node.inputs):
            varying.update(node.outputs)
    for node in norms:
        if not varying.isdisjoint(node.inputs[1:]):
            _modulated_norm(model.graph, node)


def _modulated_norm(graph: ir.Graph, node: ir.Node) -> None:
    source, gamma, beta = _inputs(node, 3)
    sizes = [
        v.shape[-1] for v in (source, gamma) if v is not None and v.shape is not None and v.shape
    ]
    channels = next((size for size in sizes if isinstance(size, int) and size > 1), None)
    dtype = next((v.dtype for v in (gamma, source) if v is not None and v.dtype), None)
    whole = node.attributes.get_int("axis", -1) == -1
    if not whole or channels is None or dtype is None or _is_read(node, 1) or _is_read(node, 2):
        return
    builder = _Builder(graph, node)
    attributes = {key: attribute.value for key, attribute in node.attributes.items()}
    ones = builder.constant(np.ones(channels, dtype.numpy()))
    norm = y = builder.add(node.op_type, source, ones, domain=node.domain, **attributes)
    for operator, modulation in (("Mul", gamma), ("Add", beta)):
        if modulation is not None:
            y = builder.add(operator, y, modulation)
            builder.remember(y)
    builder.remember(norm, _modulate, node.name)
    builder.give(0, y)
    builder.done()


def _modulate(graph: ir.Graph, norm: ir.Node, name: str) -> bool:
    """Give a norm the gamma and beta again that were taken out of it."""
    affine, last, taken = [], norm.outputs[0], []
    while True:
        readers = last.consumers()
        if len(readers) != 1 or FUSED not in readers[0].meta or readers[0].inputs[0] is not last:
            break
        taken.append(readers[0])
        affine.append(readers[0].inputs[1])
        last = readers[0].outputs[0]
    if not taken or taken[0].op_type != "Mul":
        return False
    node = ir.Node(
        norm.domain, norm.op_type, [norm.inputs[0], *affine], norm.attributes.values(), name=name
    )
    graph.insert_after(taken[-1], node)
    node.metadata_props.update(norm.metadata_props)
    _take_over(last, node.outputs[0])
    graph.remove([norm, *taken], safe=True)
    return True


def _fuse(
    graph: ir.Graph, norm: ir.Node, domain: str, operator: str, name: str, bias: bool
) -> bool:
    """Give a norm the Adds again that were taken out of it."""
    total = norm.inputs[0]
    adds = _adds(total, 2 if bias else 1)
    if total is None or adds is None:
        return False
    inner = adds[-1]
    affine = list(norm.inputs[1:])
    if bias:
        affine += [None] * ((2 if operator == "SkipLayerNormalization" else 1) - len(affine))
        affine.append(adds[0].inputs[1])
    others = [use for use in total.uses() if use.node is not norm]
    serves_sum = bool(others) or total.is_graph_output()
    eps = norm.attributes.get_float("epsilon", 1e-5)
    node = ir.Node(
        domain, operator, [*inner.inputs, *affine], [ir.AttrFloat32("epsilon", eps)],
        num_outputs=4 if serves_sum else 1, name=name,
    )  # fmt: skip
    graph.insert_after(norm, node)
    node.metadata_props.update(norm.metadata_props)
    _take_over(norm.outputs[0], node.outputs[0])
    if serves_sum:
        node.outputs[1].name = node.outputs[2].name = ""
        _take_over(total, node.outputs[3])
    for old in (norm, *adds):
        graph.remove(old, safe=True)
    return True


def _adds(total: ir.Value | None, count: int) -> list[ir.Node] | None:
    """The Adds that make a sum, the last first; None where others have come between."""
    found: list[ir.Node] = []
    for _ in range(count):
        node = None if total is None else total.producer()
        if node is None or node.op_type != "Add" or FUSED not in node.meta:
            return None
        found.append(node)
        total = node.inputs[0]
    return found


def _take_over(old: ir.Value, new: ir.Value) -> None:
    """Let the readers of a value read another one, which takes its name."""
    name = old.name
    new.shape, new.type = old.shape, old.type
    new.meta.update(old.meta)
    old.replace_all_uses_with(new, replace_graph_outputs=True)
    old.name, new.name = f"{name}_apart", name


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

    def remember(self, value: ir.Value, *fused: object) -> None:
        """Note on the node that makes a value what it was part of."""
        producer = value.producer()
        if producer is not None:
            producer.meta[FUSED] = fused or None

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
        if not _is_read(self._fused, place):
            return
        _take_over(self._fused.outputs[place], value)

    def done(self) -> None:
        """Remove the fused node, of whose outputs none is read any more."""
        self._graph.remove(self._fused, safe=True)


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
    if _is_read(node, 1) or _is_read(node, 2):
        return  # the statistics of the fused norm, which nothing else gives
    builder = _Builder(graph, node)
    total = summands[0]
    for summand in summands[1:]:
        if summand is not None:
            total = builder.add("Add", total, summand)
            builder.remember(total)
    eps = node.attributes.get_float("epsilon", 1e-5)
    y = builder.add(norm, total, *affine, axis=-1, epsilon=eps, stash_type=1)
    builder.remember(y, _fuse, node.domain, node.op_type, node.name, summands[2] is not None)
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


def _is_read(node: ir.Node, place: int) -> bool:
    """Whether a node has such an output, and anyone reads it."""
    output = node.outputs[place] if place < len(node.outputs) else None
    return output is not None and bool(output.uses() or output.is_graph_output())


def _inputs(node: ir.Node, count: int) -> tuple[ir.Value | None, ...]:
    given = list(node.inputs)[:count]
    return tuple(given + [None] * (count - len(given)))


_APART: dict[str, Callable[[ir.Graph, ir.Node], None]] = {
    "SkipLayerNormalization": _skip_layer_norm,
    "SkipSimplifiedLayerNormalization": _skip_simplified_layer_norm,
    "EmbedLayerNormalization": _embed_layer_norm,
}
