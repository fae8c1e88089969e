"""Small ONNX models of every form that is read, from which bad ones are made."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

__all__ = ["CHANNELS", "SEEDS", "archive", "calibration", "program", "seed"]

CHANNELS, TOKENS = 16, 4

Node = tuple[str, Sequence[str], Sequence[str], dict[str, Any]]

FLOAT, HALF, INT64 = TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.INT64


def _model(
    nodes: Sequence[Node | onnx.NodeProto],
    weights: dict[str, np.ndarray[Any, Any]],
    *,
    opset: int = 20,
    kind: int = FLOAT,
    shape: Sequence[int | str] = ("batch", TOKENS, CHANNELS),
    microsoft: bool = False,
    functions: Sequence[onnx.FunctionProto] = (),
    more: Sequence[onnx.ValueInfoProto] = (),
) -> onnx.ModelProto:
    made = [
        node
        if isinstance(node, onnx.NodeProto)
        else helper.make_node(node[0], node[1], node[2], name=f"node{place}", **node[3])
        for place, node in enumerate(nodes)
    ]
    for node in made:
        if microsoft and node.op_type.startswith("Skip"):
            node.domain = "com.microsoft"
    ends = [helper.make_tensor_value_info(name, kind, shape) for name in "xy"]
    graph = helper.make_graph(
        made, "seed", [ends[0], *more], ends[1:],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )  # fmt: skip
    opsets = [helper.make_opsetid("", opset)]
    opsets += [helper.make_opsetid("com.microsoft", 1)] if microsoft else []
    opsets += [helper.make_opsetid(function.domain, 1) for function in functions[:1]]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10, functions=functions)


def _weights(dtype: Any = np.float32, **shapes: Sequence[int]) -> dict[str, np.ndarray[Any, Any]]:
    random = np.random.default_rng(0)
    return {
        name.replace("__", "."): random.uniform(0.2, 1.0, shape).astype(dtype)
        for name, shape in shapes.items()
    }


def _layer() -> onnx.ModelProto:
    nodes: list[Node] = [
        ("LayerNormalization", ["x", "norm.weight", "norm.bias"], ["n"], {"epsilon": 1e-5}),
        ("MatMul", ["n", "fc.weight"], ["m"], {}),
        ("Add", ["x", "m"], ["y"], {}),
    ]
    c = CHANNELS
    return _model(nodes, _weights(norm__weight=(c,), norm__bias=(c,), fc__weight=(c, c)))


def _rms(opset: int = 17, kind: int = FLOAT) -> onnx.ModelProto:
    axes: list[str] = ["axes"] if opset >= 18 else []
    attributes = {} if axes else {"axes": [-1]}
    nodes: list[Node] = [
        ("Pow", ["x", "two"], ["square"], {}),
        ("ReduceMean", ["square", *axes], ["mean"], attributes | {"keepdims": 1}),
        ("Add", ["mean", "eps"], ["moved"], {}),
        ("Sqrt", ["moved"], ["root"], {}),
        ("Div", ["x", "root"], ["d"], {}),
        ("Mul", ["d", "layers.0.norm.weight"], ["n"], {}),
        ("MatMul", ["n", "fc.weight"], ["y"], {}),
    ]
    c = CHANNELS
    dtype = helper.tensor_dtype_to_np_dtype(kind)
    weights = _weights(dtype, layers__0__norm__weight=(c,), fc__weight=(c, c))
    weights |= {"two": np.array(2, dtype), "eps": np.array(1e-5, dtype)}
    weights |= {"axes": np.array([-1], np.int64)} if axes else {}
    return _model(nodes, weights, opset=opset, kind=kind)


def _spelled() -> onnx.ModelProto:
    nodes: list[Node] = [
        ("ReduceMean", ["x", "axes"], ["mean"], {"keepdims": 1}),
        ("Sub", ["x", "mean"], ["centred"], {}),
        ("Mul", ["centred", "centred"], ["square"], {}),
        ("ReduceMean", ["square", "axes"], ["variance"], {"keepdims": 1}),
        ("Add", ["variance", "eps"], ["moved"], {}),
        ("Sqrt", ["moved"], ["root"], {}),
        ("Reciprocal", ["root"], ["inverse"], {}),
        ("Mul", ["centred", "inverse"], ["n"], {}),
        ("Mul", ["n", "norm.weight"], ["scaled"], {}),
        ("Add", ["scaled", "norm.bias"], ["h"], {}),
        ("Gemm", ["flat", "fc.weight"], ["g"], {"transB": 1, "alpha": 1.0}),
        ("Reshape", ["h", "rows"], ["flat"], {}),
        ("Shape", ["x"], ["shape"], {}),
        ("Gather", ["shape", "zero"], ["first"], {"axis": 0}),
        ("Unsqueeze", ["first", "zeros"], ["length"], {}),
        ("Concat", ["length", "rest"], ["back"], {"axis": 0}),
        ("Reshape", ["g", "back"], ["y"], {}),
    ]
    order = [*range(10), 11, 10, *range(12, 17)]
    c = CHANNELS
    weights = _weights(norm__weight=(c,), norm__bias=(c,), fc__weight=(c, c))
    weights |= {"axes": np.array([-1]), "eps": np.array(1e-6, np.float32)}
    weights |= {"rows": np.array([-1, c]), "zero": np.array(0), "zeros": np.array([0])}
    weights |= {"rest": np.array([TOKENS, c])}
    return _model([nodes[place] for place in order], weights, opset=18)


def _tanh() -> onnx.ModelProto:
    nodes: list[Node] = [
        ("Mul", ["x", "norm.alpha"], ["scaled"], {}),
        ("Tanh", ["scaled"], ["t"], {}),
        ("Mul", ["t", "norm.weight"], ["g"], {}),
        ("Add", ["g", "norm.bias"], ["n"], {}),
        ("MatMul", ["n", "fc.weight"], ["y"], {}),
    ]
    c = CHANNELS
    return _model(
        nodes, _weights(norm__alpha=(1,), norm__weight=(c,), norm__bias=(c,), fc__weight=(c, c))
    )


def _skipping() -> onnx.ModelProto:
    inputs = ["x", "m", "layers.0.norm.weight"]
    nodes: list[Node] = [
        ("MatMul", ["x", "fc.weight"], ["m"], {}),
        ("SkipSimplifiedLayerNormalization", inputs, ["n", "", "", "sum"], {"epsilon": 1e-5}),
        ("MatMul", ["n", "fc.weight"], ["k"], {}),
        ("Add", ["k", "sum"], ["y"], {}),
    ]
    c = CHANNELS
    weights = _weights(layers__0__norm__weight=(c,), fc__weight=(c, c))
    return _model(nodes, weights, microsoft=True)


def _branches() -> onnx.ModelProto:
    """A norm within an If, and one within a Loop."""
    norm = helper.make_node("LayerNormalization", ["x", "norm.weight"], ["inner"], axis=-1)
    same = helper.make_node("Identity", ["x"], ["other"])
    value = helper.make_tensor_value_info
    shape = ["batch", TOKENS, CHANNELS]
    then = helper.make_graph([norm], "then", [], [value("inner", FLOAT, shape)])
    orelse = helper.make_graph([same], "else", [], [value("other", FLOAT, shape)])
    body = helper.make_graph(
        [
            helper.make_node("Identity", ["go"], ["on"]),
            helper.make_node("LayerNormalization", ["state", "norm.weight"], ["next"]),
        ],
        "body",
        [value("i", INT64, []), value("go", TensorProto.BOOL, []), value("state", FLOAT, shape)],
        [value("on", TensorProto.BOOL, []), value("next", FLOAT, shape)],
    )
    nodes = [
        helper.make_node("If", ["yes"], ["chosen"], then_branch=then, else_branch=orelse),
        helper.make_node("Loop", ["trips", "yes", "chosen"], ["y"], body=body),
    ]
    weights = _weights(norm__weight=(CHANNELS,))
    weights |= {"yes": np.array(True), "trips": np.array(2)}
    return _model(nodes, weights)


def _functions() -> onnx.ModelProto:
    """Nested functions of a model's own."""
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("own", 1)]
    inner = helper.make_function(
        "own", "Norm", ["a", "w"], ["b"],
        [helper.make_node("LayerNormalization", ["a", "w"], ["b"])],
        opsets,
    )  # fmt: skip
    outer = helper.make_function(
        "own", "Block", ["a", "w", "m"], ["c"],
        [
            helper.make_node("Norm", ["a", "w"], ["b"], domain="own"),
            helper.make_node("MatMul", ["b", "m"], ["c"]),
        ],
        opsets,
    )  # fmt: skip
    call = helper.make_node("Block", ["x", "norm.weight", "fc.weight"], ["y"], domain="own")
    weights = _weights(norm__weight=(CHANNELS,), fc__weight=(CHANNELS, CHANNELS))
    return _model([call], weights, functions=[outer, inner])


def _quantized() -> onnx.ModelProto:
    nodes: list[Node] = [
        ("LayerNormalization", ["x", "norm.weight"], ["n"], {}),
        ("QuantizeLinear", ["n", "scale", "point"], ["q"], {}),
        ("DequantizeLinear", ["q", "scale", "point"], ["d"], {}),
        ("DequantizeLinear", ["fc.weight", "scales", "points"], ["w"], {"axis": 1}),
        ("MatMul", ["d", "w"], ["y"], {}),
    ]
    c = CHANNELS
    weights = _weights(norm__weight=(c,), scales=(c,))
    weights |= {"scale": np.array(0.1, np.float32), "point": np.array(0, np.int8)}
    weights |= {"points": np.zeros(c, np.int8), "fc.weight": np.ones((c, c), np.int8)}
    return _model(nodes, weights)


def _embedding() -> onnx.ModelProto:
    """Tokens in, a final norm without affine, and a batch of fixed length."""
    tokens = helper.make_tensor_value_info("ids", INT64, ["batch", TOKENS])
    nodes: list[Node] = [
        ("Gather", ["embed.weight", "ids"], ["e"], {}),
        ("Add", ["e", "x"], ["h"], {}),
        ("Cast", ["h"], ["wide"], {"to": FLOAT}),
        ("LayerNormalization", ["wide", "ones"], ["n"], {}),
        ("Softmax", ["n"], ["s"], {"axis": -1}),
        ("Transpose", ["s"], ["t"], {"perm": [0, 2, 1]}),
        ("Transpose", ["t"], ["y"], {"perm": [0, 2, 1]}),
    ]
    weights = _weights(embed__weight=(32, CHANNELS)) | {"ones": np.ones(CHANNELS, np.float32)}
    return _model(nodes, weights, more=[tokens])


SEEDS: dict[str, Callable[[], onnx.ModelProto]] = {
    "layer": _layer,
    "rms": _rms,
    "rms-half": lambda: _rms(18, HALF),
    "spelled": _spelled,
    "tanh": _tanh,
    "skipping": _skipping,
    "branches": _branches,
    "functions": _functions,
    "quantized": _quantized,
    "embedding": _embedding,
}


@cache
def seed(name: str) -> bytes:
    """One of the models."""
    return SEEDS[name]().SerializeToString()


@cache
def archive() -> bytes:
    """An .npz file of samples for the first model."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "data.npz"
        np.savez(path, x=samples(12))
        return path.read_bytes()


def samples(count: int) -> np.ndarray[Any, Any]:
    """Random ones, [count, tokens, channels]."""
    random = np.random.default_rng(1)
    return random.normal(size=(count, TOKENS, CHANNELS)).astype(np.float32)


@cache
def calibration() -> bytes:
    """A calibration of the first model."""
    from dyt_compile import calibrate

    with tempfile.TemporaryDirectory() as folder:
        model, path = Path(folder) / "model.onnx", Path(folder) / "fits.safetensors"
        model.write_bytes(seed("layer"))
        calibrate(model, [(samples(12),)]).save(path)
        return path.read_bytes()


@cache
def program() -> bytes:
    """A .pt2 file."""
    import torch

    module = torch.nn.Sequential(torch.nn.LayerNorm(CHANNELS), torch.nn.Linear(CHANNELS, 4))
    batch = torch.export.Dim.AUTO
    made = torch.export.export(module, (torch.zeros(3, CHANNELS),), dynamic_shapes=({0: batch},))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.pt2"
        torch.export.save(made, path)
        return path.read_bytes()
