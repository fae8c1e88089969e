"""Narrow and wide types inside an ONNX model: fp16 and bf16, and float32 where it must stay."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir

from ..changes import in_parts
from ..dyt import DOMAIN, FORMS
from .onnx_constants import Source
from .onnx_derived import derived
from .onnx_names import Names

__all__ = ["NARROW", "holds", "narrow", "surface", "widen"]

NARROW = {"fp16": ir.DataType.FLOAT16, "bf16": ir.DataType.BFLOAT16}

WIDE = ir.DataType.FLOAT

LARGEST = {ir.DataType.FLOAT16: 65504.0, ir.DataType.BFLOAT16: 2.0**127 * (2 - 2.0**-7)}

ANGLE_STEPS = 32
"""Nodes between positions and the sine; rotary embeddings take about eight."""

UNTYPED = {"Cast", "CastLike", "Constant", "If", "Loop", "Scan"}
"""Operators that do not compute in the type of their inputs, or hold others that do."""


def holds(model: ir.Model, dtype: ir.DataType) -> bool:
    """Whether any value of the model has the type."""
    return any(
        value.dtype is dtype
        for graph in _graphs(model)
        for value in (*graph.inputs, *graph.initializers.values(), *_made(graph))
    )


def narrow(model: ir.Model, dtype: ir.DataType, wide: Collection[ir.Node] = ()) -> None:
    """Let the model compute in `dtype`, in place; its inputs and outputs keep their types.

    wide: nodes that go on computing in float32, together: nothing is rounded between them. So do
    operators that ONNX does not define for `dtype`, and the angles of positional encodings. The
    alpha and shift of DyT stay float32.
    """
    wide = {*wide, *(node for node in model.graph.all_nodes() if not _takes(node, model, dtype))}
    wide |= set(_angles(model))
    kept = set(_read_in_float32(model, wide))
    kept |= {value for value in model.graph.outputs if value.is_initializer()}
    surface(model, dtype, outside=WIDE)
    for value in (v for graph in model.graph.subgraphs() for v in graph.inputs):
        if value.dtype is WIDE:
            value.type = ir.TensorType(dtype)
    for graph in _graphs(model):
        for value in graph.initializers.values():
            if value.dtype is WIDE and value not in kept and value.const_value is not None:
                value.const_value = _cast_tensor(value.const_value, dtype)
                value.type = ir.TensorType(dtype)
        for node in graph:
            if _is_border(node) or node in wide or any(value in kept for value in node.outputs):
                continue
            _retype(node, dtype)
            for value in node.outputs:
                if value.dtype is WIDE:
                    value.type = ir.TensorType(dtype)
    widen(model, dtype, wide, rounded=False)


def widen(
    model: ir.Model,
    dtype: ir.DataType,
    nodes: Collection[ir.Node] | None = None,
    *,
    rounded: bool = True,
) -> None:
    """Let nodes (by default all) compute in float32 what they are given in `dtype`, in place.

    rounded: each result is rounded to `dtype`, as if the node had computed in it with a float32
    accumulator; else the nodes' results are float32, and only what leaves the set is rounded.
    """
    chosen = None if nodes is None else set(nodes)
    names = Names.of_values(model)
    for graph in _graphs(model):
        wide_of: dict[ir.Value, ir.Value] = {}
        for node in list(graph):
            within = chosen is None or node in chosen
            if not within or node.domain == DOMAIN or (rounded and node.op_type in UNTYPED):
                continue
            if chosen is None and not any(v is not None and v.dtype is dtype for v in node.inputs):
                continue  # it makes a value of the type, and computes with none
            for place, value in enumerate(node.inputs):
                if value is None or value.dtype is not dtype or node.op_type in UNTYPED:
                    continue
                if value not in wide_of:
                    wide_of[value] = _widened(graph, node, value, names)
                node.replace_input_with(place, wide_of[value])
            for value in node.outputs:
                computed = value.dtype is dtype and node.op_type not in UNTYPED
                if computed or (value.dtype is WIDE and not rounded):
                    result = _narrowed(graph, node, value, dtype, names)
                    if not rounded:
                        wide_of[result] = value
        if not rounded:
            _remove_unread(graph, wide_of)


def _remove_unread(graph: ir.Graph, rounded: Iterable[ir.Value]) -> None:
    """Remove the casts of results that only wide nodes read."""
    for value in rounded:
        node = value.producer()
        added = node is not None and node.op_type == "Cast" and node.graph is graph
        if node is not None and added and not value.uses() and not value.is_graph_output():
            graph.remove(node, safe=True)


def _narrowed(
    graph: ir.Graph, node: ir.Node, value: ir.Value, dtype: ir.DataType, names: Names
) -> ir.Value:
    """Let the readers of a node's output read it rounded; the output itself becomes float32."""
    cast = ir.Node("", "Cast", [value], [ir.AttrInt64("to", dtype.value)], num_outputs=1)
    result = cast.outputs[0]
    name = value.name
    value.replace_all_uses_with(result, replace_graph_outputs=True)
    cast.replace_input_with(0, value)
    value.name, result.name = names.free(f"{name}_wide"), name
    value.type, result.type = ir.TensorType(WIDE), ir.TensorType(dtype)
    result.shape = value.shape
    graph.insert_after(node, cast)
    return result


def _widened(graph: ir.Graph, before: ir.Node, value: ir.Value, names: Names) -> ir.Value:
    cast = ir.Node("", "Cast", [value], [ir.AttrInt64("to", WIDE.value)], num_outputs=1)
    result = cast.outputs[0]
    result.name = names.free(f"{value.name}_float")
    result.type, result.shape = ir.TensorType(WIDE), value.shape
    graph.insert_before(before, cast)
    return result


BORDER = "dyt_compile.border"


def surface(model: ir.Model, dtype: ir.DataType, *, outside: ir.DataType) -> None:
    """Give inputs and outputs of type `outside` the type float32, cast to `dtype` within."""
    graph = model.graph
    names = Names.of_values(model)
    first = graph[0] if len(graph) else None
    weights = [value for value in graph.outputs if value.is_initializer()]
    for value in (*(v for v in graph.inputs if not v.is_initializer()), *weights):
        if value.dtype is outside and first is not None and value.uses():
            value.type = ir.TensorType(WIDE)  # clones of a model share their types
            readers = list(value.uses())
            result = _border(value, dtype, names.free(f"{value.name}_inner"))
            graph.insert_before(first, _producer(result))
            for reader, place in readers:
                reader.replace_input_with(place, result)
    for place, value in enumerate(graph.outputs):
        if value.dtype is outside and value.producer() is not None:
            name = value.name
            value.name = names.free(f"{name}_inner")
            result = _border(value, WIDE, str(name))
            graph.append(_producer(result))
            graph.outputs[place] = result


def _border(value: ir.Value, dtype: ir.DataType, name: str) -> ir.Value:
    """The output of a new cast of `value`, not yet in the graph, marked as part of the surface."""
    cast = ir.Node("", "Cast", [value], [ir.AttrInt64("to", dtype.value)], num_outputs=1)
    cast.meta[BORDER] = True
    result = cast.outputs[0]
    result.name, result.shape, result.type = name, value.shape, ir.TensorType(dtype)
    return result


def _producer(value: ir.Value) -> ir.Node:
    node = value.producer()
    if node is None:
        raise ValueError(f"{value.name!r} is made by no node")
    return node


def _is_border(node: ir.Node) -> bool:
    return bool(node.meta.get(BORDER, False))


def _takes(node: ir.Node, model: ir.Model, dtype: ir.DataType) -> bool:
    """Whether ONNX defines the operator for inputs of `dtype` wherever it has float32 now."""
    if not onnx.defs.has(node.op_type, node.domain):
        return True  # functions, and operators of a runtime's own
    opset = model.opset_imports.get(node.domain, 1)
    schema = onnx.defs.get_schema(node.op_type, opset, node.domain)
    wanted = f"tensor({dtype.name.lower()})"
    for place, value in enumerate(node.inputs):
        if value is not None and value.dtype is WIDE:
            # The last parameter of a variadic operator stands for all that follow.
            parameter = schema.inputs[min(place, len(schema.inputs) - 1)]
            if wanted not in parameter.types:
                return False
    return True


def _angles(model: ir.Model) -> Iterator[ir.Node]:
    """Sin and Cos and what computes their angles from positions: fp16 counts no further than 2048.

    Angles that depend on activations are no positions.
    """
    for root in model.graph.all_nodes():
        if root.op_type not in ("Sin", "Cos"):
            continue
        found: dict[ir.Node, None] = {}
        pending: list[ir.Node] = [root]
        while pending and len(found) < ANGLE_STEPS:
            node = pending.pop()
            found[node] = None
            floats = [v for v in node.inputs if v is not None and v.dtype is WIDE]
            if any(value.is_graph_input() and not value.is_initializer() for value in floats):
                found.clear()
                break
            producers = (value.producer() for value in floats)
            pending.extend(p for p in producers if p is not None and p not in found)
        if len(found) < ANGLE_STEPS:
            yield from found


def _read_in_float32(model: ir.Model, wide: Collection[ir.Node]) -> Iterator[ir.Value]:
    """Constants that only wide nodes read, and the alpha and shift of DyT."""
    for graph in _graphs(model):
        constants = [v for node in graph if node.op_type == "Constant" for v in node.outputs]
        for value in (*graph.initializers.values(), *constants):
            if value.uses() and all(
                node in wide or (node.domain == DOMAIN and _is_scale(node, place))
                for node, place in value.uses()
            ):
                yield value


def _is_scale(node: ir.Node, place: int) -> bool:
    form = FORMS.get(node.op_type)
    return form is not None and place > 0 and form.parameters[place - 1] in ("alpha", "shift")


def _retype(node: ir.Node, dtype: ir.DataType) -> None:
    """Attributes that name or hold float32 name or hold the narrow type."""
    for name, attribute in list(node.attributes.items()):
        if attribute.type is ir.AttributeType.TENSOR:
            tensor = attribute.as_tensor()
            if tensor.dtype is WIDE:
                node.attributes[name] = ir.AttrTensor(name, _cast_tensor(tensor, dtype))
        elif name in ("value_float", "value_floats") and node.op_type == "Constant":
            array = np.array(attribute.value, np.float32)
            del node.attributes[name]
            node.attributes["value"] = ir.AttrTensor("value", _cast_tensor(ir.tensor(array), dtype))
        elif (
            name in ("to", "dtype")
            and attribute.type is ir.AttributeType.INT
            and attribute.as_int() == WIDE.value
        ):
            node.attributes[name] = ir.AttrInt64(name, dtype.value)


def _cast_tensor(tensor: ir.TensorProtocol, dtype: ir.DataType) -> ir.TensorProtocol:
    """The tensor in the narrow type; finite values beyond its range become its largest."""
    limit = LARGEST[dtype]

    def clipped(array: npt.NDArray[Any]) -> Iterator[npt.NDArray[Any]]:
        for part, _ in in_parts(array, ()):
            yield np.where(np.isfinite(part), np.clip(part, -limit, limit), part)

    shape = ir.Shape(tensor.shape.numpy())
    return derived(Source(tensor, tensor.dtype), clipped, dtype, shape, tensor.name)


def _graphs(model: ir.Model) -> Iterator[ir.Graph]:
    yield model.graph
    yield from model.graph.subgraphs()


def _made(graph: ir.Graph) -> Iterator[ir.Value]:
    return (output for node in graph for output in node.outputs)
