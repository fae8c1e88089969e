"""Quantized files for the tests, as quantizers write them: QuantizeLinear and DequantizeLinear
around the products that read a DyT, and integer or FP8 weights."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx_ir as ir

from dyt_compile.dyt import DOMAIN

__all__ = ["LARGEST", "quantize"]

LARGEST = {ir.DataType.INT8: 127.0, ir.DataType.FLOAT8E4M3FN: 448.0}


def quantize(model: ir.Model, dtype: ir.DataType) -> int:
    """Quantize, in place, what reads a DyT and a weight; how many products it was.

    The scale of a DyT needs no data: |y| is at most |gamma| + |beta|.
    """
    done = 0
    for node in list(model.graph):
        y = node.outputs[0]
        products = [use.node for use in y.uses() if _is_product(use.node, y)]
        if node.domain != DOMAIN or not products:
            continue
        scale = sum(
            float(np.abs(v.const_value.numpy()).max())
            for v in node.inputs[2:]
            if v and v.const_value
        )
        narrow = _dequantized(model.graph, node, y, (scale or 1.0) / LARGEST[dtype], dtype)
        for product in products:
            product.replace_input_with(0, narrow)
            weight = product.inputs[1]
            if weight is not None:
                product.replace_input_with(1, _weight(model.graph, product, weight, dtype))
        done += len(products)
    return done


def _is_product(node: ir.Node, y: ir.Value) -> bool:
    return (
        node.op_type in ("MatMul", "Gemm")
        and node.inputs[0] is y
        and node.inputs[1] is not None
        and node.inputs[1].is_initializer()
    )


def _dequantized(
    graph: ir.Graph, node: ir.Node, y: ir.Value, scale: float, dtype: ir.DataType
) -> ir.Value:
    constants = _scale_and_zero(graph, str(y.name), scale, y.dtype or ir.DataType.FLOAT, dtype)
    quantizer = ir.node("QuantizeLinear", [y, *constants], name=f"{y.name}_quantize")
    quantizer.outputs[0].name = f"{y.name}_quantized"
    quantizer.outputs[0].type, quantizer.outputs[0].shape = ir.TensorType(dtype), y.shape
    dequantizer = ir.node(
        "DequantizeLinear", [quantizer.outputs[0], *constants], name=f"{y.name}_dequantize"
    )
    dequantizer.outputs[0].name = f"{y.name}_dequantized"
    dequantizer.outputs[0].type, dequantizer.outputs[0].shape = y.type, y.shape
    graph.insert_after(node, [quantizer, dequantizer])
    return dequantizer.outputs[0]


def _weight(graph: ir.Graph, product: ir.Node, weight: ir.Value, dtype: ir.DataType) -> ir.Value:
    assert weight.const_value is not None
    array = weight.const_value.numpy().astype(np.float32)
    scale = float(np.abs(array).max()) / LARGEST[dtype]
    held = _held(graph, f"{weight.name}_quantized", _rounded(array / scale, dtype), dtype)
    constants = _scale_and_zero(
        graph, str(weight.name), scale, weight.dtype or ir.DataType.FLOAT, dtype
    )
    node = ir.node("DequantizeLinear", [held, *constants], name=f"{weight.name}_dequantize")
    node.outputs[0].name = f"{weight.name}_dequantized"
    node.outputs[0].type, node.outputs[0].shape = weight.type, weight.shape
    graph.insert_before(product, node)
    return node.outputs[0]


def _rounded(array: np.ndarray, dtype: ir.DataType) -> np.ndarray:
    if dtype is ir.DataType.INT8:
        return np.clip(np.rint(array), -128, 127).astype(np.int8)
    return array.astype(ml_dtypes.float8_e4m3fn)


def _scale_and_zero(
    graph: ir.Graph, name: str, scale: float, wide: ir.DataType, dtype: ir.DataType
) -> tuple[ir.Value, ir.Value]:
    return (
        _held(graph, f"{name}_scale", np.array(scale).astype(wide.numpy()), wide),
        _held(graph, f"{name}_zero", np.zeros((), dtype.numpy()), dtype),
    )


def _held(graph: ir.Graph, name: str, array: np.ndarray, dtype: ir.DataType) -> ir.Value:
    value = ir.Value(
        name=name,
        type=ir.TensorType(dtype),
        shape=ir.Shape(array.shape),
        const_value=ir.tensor(array, dtype=dtype, name=name),
    )
    graph.register_initializer(value)
    return value
