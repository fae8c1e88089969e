"""What an ONNX model goes through before it is looked at: its functions inlined, the norms that
ONNX Runtime fused with an Add taken apart, shapes and dtypes inferred."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import onnx_ir as ir
from onnx_ir.passes import common

from ..dyt import DOMAIN
from ..errors import CaptureError
from .onnx_constants import stored
from .onnx_fused import MICROSOFT, fuse_again, take_apart
from .onnx_fusion import unfuse

__all__ = ["prepare", "restore"]

OLDEST_OPSET = 13
"""Older files have axes as attributes of operators that were given inputs for them since."""

STAND_INS = {
    "SimplifiedLayerNormalization": "LayerNormalization",
    **dict.fromkeys(
        ("Attention", "BiasGelu", "FastGelu", "Gelu", "MultiHeadAttention", "QuickGelu"), "Identity"
    ),
}
"""Operators of ONNX Runtime, and the standard ones whose first output has the same shape."""


DECLARED = "dyt_compile.declared"
"""Where a value keeps the shape that the file gave it, None included."""


def restore(model: ir.Model) -> None:
    """Undo, in place, what `prepare` changed for the sake of matching and is still there.

    ONNX Runtime fuses other nodes where it knows more shapes, and then rounds differently.
    """
    fuse_again(model)
    for node in model.graph:
        for value in node.outputs:
            if DECLARED in value.meta:
                value.shape = value.meta.pop(DECLARED)


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
    unfuse(model)
    take_apart(model)
    model.graph.sort()
    _correct_constants(model)
    _infer_shapes(model)


def _correct_constants(model: ir.Model) -> None:
    """Shapes of Constant nodes as they are: ONNX Runtime's GenAI tools note scalars for vectors."""
    for node in model.graph.all_nodes():
        tensor = stored(node.outputs[0]) if node.op_type == "Constant" else None
        if tensor is not None:
            node.outputs[0].shape = ir.Shape(tensor.shape.numpy())
            node.outputs[0].type = ir.TensorType(tensor.dtype)


def _infer_shapes(model: ir.Model) -> None:
    """Shapes and dtypes by onnx's inference, which stops at operators that it does not know.

    Branches and loops keep what they have: there nothing is replaced, and two branches may have
    values of one name.
    """
    outer = {value for node in model.graph for value in node.outputs}
    before = [
        (value, value.shape, value.type) for node in model.graph.all_nodes()
        for value in node.outputs
    ]  # fmt: skip
    with _stand_ins(model.graph):
        common.ShapeInferencePass(check_type=False, strict_mode=False)(model)
    for value, shape, kind in before:
        if value not in outer:
            value.shape, value.type = shape, kind
        elif value.shape != shape:
            value.meta[DECLARED] = shape


@contextmanager
def _stand_ins(graph: ir.Graph) -> Iterator[None]:
    stood_in = []
    for node in graph:
        stand_in = STAND_INS.get(node.op_type)
        if stand_in is not None and node.domain in ("", MICROSOFT):
            stood_in.append((node, node.domain, node.op_type, list(node.inputs)))
            node.domain, node.op_type = "", stand_in
            if stand_in == "Identity":
                node.resize_inputs(1)
    try:
        yield
    finally:
        for node, domain, name, inputs in stood_in:
            node.domain, node.op_type = domain, name
            node.resize_inputs(len(inputs))
            for place, value in enumerate(inputs):
                node.replace_input_with(place, value)
