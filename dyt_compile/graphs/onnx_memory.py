"""What parts of an ONNX model take in memory: worked out from the shapes of their values."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import prod

import onnx_ir as ir

from ..errors import RewriteError
from .onnx_shapes import infer_shapes

__all__ = ["most_bytes", "sizes", "weight_load"]

OUTSIDE, INSIDE = 3, 9
"""Copies of weights while ONNX Runtime makes a session, in address space, of those in files beside
the model and those in it: mapped, serialised, handed over, parsed, packed for its kernels. Measured
on products of 3072 x 3072 in float32, float16 and bfloat16, ONNX Runtime 1.32: 3.4 and 8.6, and
held in memory 1.9 and 4."""

RUNTIME_BYTES = 128 << 20
"""Address space of ONNX Runtime's own threads, and of what they allocate from."""

WIDTH = 4
"""Bytes of the numbers that ONNX Runtime computes with on CPUs, where it has none of 16 bits."""

ARENA = 2
"""How far ONNX Runtime's arena, which grows by powers of two, is beyond the values in it."""

Sizes = Callable[[ir.Value], int]


def sizes(model: ir.Model, shapes: Mapping[str, tuple[int, ...]]) -> Sizes:
    """The bytes of each value of a model, once its inputs have these shapes; it keeps its own.

    Raises RewriteError, when it is asked for one, where data alone tells its shape.
    """
    fixed = model.clone()
    for value in fixed.graph.inputs:
        if value.name in shapes:
            value.shape = ir.Shape(shapes[str(value.name)])
    infer_shapes(fixed)
    made = (value for node in fixed.graph for value in node.outputs)
    known = {str(value.name): value for value in (*fixed.graph.inputs, *made)}

    def size(value: ir.Value) -> int:
        found = known[str(value.name)]
        if found.shape is None or not found.shape.is_static():
            raise RewriteError(f"without data the shape of {value.name!r} is not known")
        width = 0 if found.dtype is None else found.dtype.bitwidth // 8
        return prod(found.shape.numpy()) * max(WIDTH, width)

    return size


def most_bytes(
    nodes: Sequence[ir.Node], start: Sequence[ir.Value], stop: Sequence[ir.Value], size: Sizes
) -> int:
    """Bytes of the values that live at most while nodes run in order, what they are given included.

    Raises RewriteError for nodes with branches, whose values have no shapes.
    """
    own = set(nodes)
    last = {value: node for node in nodes for value in node.inputs if value is not None}
    live = sum(map(size, start))
    most = live
    for node in nodes:
        if any(attribute.type is ir.AttributeType.GRAPH for attribute in node.attributes.values()):
            raise RewriteError(f"the values inside of {node.op_type} {node.name!r} have no shapes")
        live += sum(size(v) for v in node.outputs if v in last or v in stop)
        most = max(most, live)
        ended = {v for v in node.inputs if v is not None and last[v] is node}
        live -= sum(size(v) for v in ended if v.producer() in own and v not in stop)
    return RUNTIME_BYTES + ARENA * most


def weight_load(nodes: Sequence[ir.Node]) -> int:
    """Bytes that the weights of nodes take in a session."""
    read = {value for node in nodes for value in node.inputs if value is not None}
    held = (value.const_value for value in read if value.is_initializer())
    return sum(
        (OUTSIDE if isinstance(tensor, ir.ExternalTensor) else INSIDE)
        * tensor.size * max(WIDTH, tensor.dtype.bitwidth // 8)
        for tensor in held
        if tensor is not None
    )  # fmt: skip
