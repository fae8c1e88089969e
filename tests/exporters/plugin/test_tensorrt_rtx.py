"""Files whose nodes bind the plugin in TensorRT-RTX: every form is parsed and built, or refused."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

pytest.importorskip("tensorrt_rtx")

from dyt_compile.dyt import Form
from dyt_compile.exporters.plugin.build import PluginInfo

from .reference import OPERATORS
from .runtimes import Engine, engine

WIDTH = 64
DTYPES = {
    "fp32": TensorProto.FLOAT,
    "fp16": TensorProto.FLOAT16,
    "bf16": TensorProto.BFLOAT16,
}
NAMES = {"fp32": "FLOAT", "fp16": "HALF", "bf16": "BF16"}
OUTPUTS = {TensorProto.INT8: "INT8", TensorProto.FLOAT8E4M3FN: "FP8"}

Build = Callable[..., Engine]


@pytest.fixture(scope="module")
def build(plugin: PluginInfo, tmp_path_factory: pytest.TempPathFactory) -> Build:
    """Builds a model; without the plugin if `loaded` is false."""
    folder = tmp_path_factory.mktemp("rtx")

    def build(model: onnx.ModelProto, capability: str = "SM89", *, loaded: bool = True) -> Engine:
        onnx.save(model, folder / "model.onnx")
        library = plugin.path if loaded else None
        return engine(library, folder / "model.onnx", capability, folder)

    return build


def model(
    operators: list[Form],
    dtype: str,
    output_dtype: int = TensorProto.FLOAT8E4M3FN,
    *,
    version: str = "1",
    channels: int = WIDTH,
    gamma: int | None = None,
) -> onnx.ModelProto:
    """Each operator on inputs of its own shape; what is quantized is dequantized at once."""
    kind = DTYPES[dtype]
    shape = ["batch", 8, channels]
    values = {
        "alpha": (TensorProto.FLOAT, [1], 0.7),
        "shift": (TensorProto.FLOAT, [1], 0.1),
        "gamma": (gamma or kind, [WIDTH], 1.1),
        "beta": (kind, [WIDTH], 0.1),
        "y_scale": (TensorProto.FLOAT, [], 0.02),
    }
    initializers = [
        helper.make_tensor(name, kind, size, [value] * int(np.prod(size)))
        for name, (kind, size, value) in values.items()
    ]
    nodes, outputs = [], []
    for operator in operators:
        made = [f"{operator.name}_y", *([f"{operator.name}_sum"] if operator.residual else [])]
        attributes = {"plugin_namespace": "dyt", "plugin_version": version}
        if operator.quantized:
            attributes["output_dtype"] = output_dtype
        nodes.append(
            helper.make_node(
                operator.name, operator.inputs, made, domain="dyt", name=operator.name, **attributes
            )
        )
        outputs += made[1:]
        if operator.quantized:
            y, wide, back = made[0], f"{made[0]}_wide", f"{made[0]}_back"
            nodes.append(helper.make_node("DequantizeLinear", [y, "y_scale"], [wide]))
            nodes.append(helper.make_node("Cast", [wide], [back], to=kind))
            made[0] = back
        outputs.append(made[0])
    graph = helper.make_graph(
        nodes,
        "plugins",
        [helper.make_tensor_value_info(name, kind, shape) for name in ("x", "residual")],
        [helper.make_tensor_value_info(name, kind, None) for name in outputs],
        initializers,
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("dyt", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


@pytest.mark.parametrize("capability", ["SM89", "SM120"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("output_dtype", OUTPUTS, ids=OUTPUTS.values())
def test_every_operator_binds_its_plugin_and_builds(
    build: Build, dtype: str, output_dtype: int, capability: str
) -> None:
    built = build(model(OPERATORS, dtype, output_dtype), capability)
    assert built.engine_bytes > 10_000, built.errors
    assert not built.errors
    name = NAMES[dtype]
    assert built.plugins == [
        [OUTPUTS[output_dtype] if operator.quantized else name, *([name] * operator.residual)]
        for operator in OPERATORS
    ]
    assert built.kernels.count("custom_layer") == len(OPERATORS)


@pytest.mark.parametrize("operator", OPERATORS, ids=lambda operator: operator.name)
def test_one_operator_is_one_kernel(build: Build, operator: Form) -> None:
    built = build(model([operator], "bf16"))
    assert built.kernels.count("custom_layer") == 1
    others = [kind for kind in built.kernels if kind not in ("custom_layer", "shape_call")]
    assert len(others) <= operator.quantized  # the DequantizeLinear behind it


def _only(name: str) -> list[Form]:
    return [operator for operator in OPERATORS if operator.name == name]


def test_unknown_version_is_refused(build: Build) -> None:
    built = build(model(_only("DyT"), "bf16", version="2"))
    assert not built.plugins
    assert "DyT" in " ".join(built.errors)


def test_file_without_its_plugin_is_refused(build: Build) -> None:
    built = build(model(_only("DyT"), "bf16"), loaded=False)
    assert not built.plugins
    assert "DyT" in " ".join(built.errors)


def test_wrong_shape_of_gamma_is_named(build: Build) -> None:
    built = build(model(_only("DyT"), "bf16", channels=48))
    assert not built.engine_bytes
    assert "dyt::DyT: gamma has shape [64] for x of shape [?, 8, 48]" in " ".join(built.errors)


def test_wrong_dtype_of_gamma_has_no_format(build: Build) -> None:
    built = build(model(_only("DyT"), "fp16", gamma=TensorProto.FLOAT))
    assert not built.engine_bytes
    assert "find any supported plugin/custom tactic format" in " ".join(built.errors)


def test_wrong_output_dtype_is_named(build: Build) -> None:
    built = build(model(_only("AddDyTQuantize"), "bf16", TensorProto.FLOAT16))
    assert not built.engine_bytes
    assert "output_dtype is 10; allowed: 3 (INT8) and 17" in " ".join(built.errors)


def test_missing_input_is_named(build: Build) -> None:
    file = model(_only("AddDyT"), "bf16")
    del file.graph.node[0].input[-1]
    built = build(file)
    assert not built.engine_bytes
    assert "4 inputs are given; it takes x, residual, alpha, gamma, beta" in " ".join(built.errors)
