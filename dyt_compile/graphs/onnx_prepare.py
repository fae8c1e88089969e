"""What an ONNX model goes through before it is looked at: its functions inlined, the norms that
ONNX Runtime fused with an Add taken apart, shapes and dtypes inferred."""

from __future__ import annotations

import onnx_ir as ir

from ..dyt import DOMAIN
from ..errors import CaptureError
from .onnx_constants import stored
from .onnx_fused import fuse_again, take_apart
from .onnx_fusion import unfuse
from .onnx_inlining import inline
from .onnx_shapes import infer_shapes, restore_shapes

__all__ = ["OLDEST_OPSET", "prepare", "restore"]

OLDEST_OPSET = 13
"""Older files have axes as attributes of operators that were given inputs for them since."""


def restore(model: ir.Model) -> None:
    """Undo, in place, what `prepare` changed for the sake of matching and is still there.

    ONNX Runtime fuses other nodes where it knows more shapes, and then rounds differently.
    """
    fuse_again(model)
    restore_shapes(model)


def prepare(model: ir.Model) -> None:
    """Make a model ready to be seen as terms, in place. Raises CaptureError for old opsets."""
    opset = model.opset_imports.setdefault("", OLDEST_OPSET)
    if opset < OLDEST_OPSET:
        raise CaptureError(
            f"the model has opset {opset}; allowed: {OLDEST_OPSET} and newer "
            "(onnx.version_converter.convert_version makes it newer)"
        )
    if any(function.domain != DOMAIN for function in model.functions.values()):
        inline(model, lambda function: function.domain != DOMAIN)
    model.graph.sort()  # first: taken apart, a fused node that reads its own output is no cycle
    unfuse(model)
    take_apart(model)
    _correct_constants(model)
    _correct_lengths(model)
    infer_shapes(model)


def _correct_constants(model: ir.Model) -> None:
    """Shapes of Constant nodes as they are: ONNX Runtime's GenAI tools note scalars for vectors."""
    for node in model.graph.all_nodes():
        tensor = stored(node.outputs[0]) if node.op_type == "Constant" else None
        if tensor is not None:
            node.outputs[0].shape = ir.Shape(tensor.shape.numpy())
            node.outputs[0].type = ir.TensorType(tensor.dtype)


def _correct_lengths(model: ir.Model) -> None:
    """Lengths of axes that are below zero are no lengths: some note those that are not known so."""
    values = (value for node in model.graph.all_nodes() for value in node.outputs)
    for value in (*model.graph.inputs, *values):
        if value.shape is not None and any(isinstance(n, int) and n < 0 for n in value.shape):
            value.shape = ir.Shape(
                [None if isinstance(n, int) and n < 0 else n for n in value.shape]
            )
