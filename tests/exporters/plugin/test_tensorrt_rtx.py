"""Every plugin in engines of TensorRT-RTX, for every dtype; what is refused says why."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

pytest.importorskip("tensorrt_rtx")

from dyt_compile import EngineReport, build_engine
from dyt_compile.dyt import DOMAIN, FORMS, FUSED, Form
from dyt_compile.errors import ExportError
from dyt_compile.exporters.plugin.build import PluginInfo

from ..engines import profiles
from .reference import OPERATORS

WIDTH = 64
DTYPES = {
    "fp32": TensorProto.FLOAT,
    "fp16": TensorProto.FLOAT16,
    "bf16": TensorProto.BFLOAT16,
}
NAMES = {"fp32": "float", "fp16": "half", "bf16": "bfloat16"}
"""Of TensorRT, in its layers."""
OUTPUTS = {TensorProto.INT8: "int8", TensorProto.FLOAT8E4M3FN: "fp8"}

Build = Callable[..., EngineReport]


@pytest.fixture
def build(plugin: PluginInfo, tmp_path: Path) -> Build:
    """Builds a model with the plugin."""

    def build(model: onnx.ModelProto, target: str = "sm89") -> EngineReport:
        path = tmp_path / "model.onnx"
        onnx.save(model, path)
        return build_engine(
            path, tmp_path / "model.plan", runtime="tensorrt-rtx", shapes=profiles(path),
            target=target, lowering="plugin", plugin_library=plugin.path,
        )  # fmt: skip

    return build


def model(
    forms: list[Form],
    dtype: str,
    output_dtype: int = TensorProto.FLOAT8E4M3FN,
    *,
    channels: int = WIDTH,
    gamma: int | None = None,
) -> onnx.ModelProto:
    """Every form on the same inputs, as plugins alone; what is quantized is dequantized at once."""
    kind = DTYPES[dtype]
    values = {
        "alpha": (TensorProto.FLOAT, [1], 0.7),
        "shift": (TensorProto.FLOAT, [1], 0.1),
        "gamma": (gamma or kind, [WIDTH], 1.1),
        "beta": (kind, [WIDTH], 0.1),
        "y_scale": (TensorProto.FLOAT, [], 0.02),
    }
    nodes, outputs = [], []
    for form in forms:
        made = [f"{form.name}_{output}" for output in form.outputs]
        nodes.append(
            helper.make_node(
                form.name, form.inputs, made, domain=DOMAIN, name=form.name,
                plugin_namespace=DOMAIN, plugin_version="1",
                **({"output_dtype": output_dtype} if form.quantized else {}),
            )
        )  # fmt: skip
        if form.quantized:
            y, wide, back = made[0], f"{made[0]}_wide", f"{made[0]}_back"
            nodes.append(helper.make_node("DequantizeLinear", [y, "y_scale"], [wide]))
            nodes.append(helper.make_node("Cast", [wide], [back], to=kind))
            made[0] = back
        outputs += made
    graph = helper.make_graph(
        nodes,
        "plugins",
        [
            helper.make_tensor_value_info(name, kind, ["batch", 8, channels])
            for name in ("x", "residual")
        ],
        [helper.make_tensor_value_info(name, kind, ["batch", 8, channels]) for name in outputs],
        [
            helper.make_tensor(name, kind, size, [value] * int(np.prod(size)))
            for name, (kind, size, value) in values.items()
        ],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid(DOMAIN, 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


@pytest.mark.slow
@pytest.mark.parametrize("target", ["sm89", "sm120"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("output_dtype", OUTPUTS, ids=OUTPUTS.values())
def test_every_plugin_is_one_kernel_of_the_engine(
    build: Build, dtype: str, output_dtype: int, target: str
) -> None:
    report = build(model(OPERATORS, dtype, output_dtype), target)
    assert report.plugins == {form.name: 1 for form in OPERATORS}
    custom = [layer for layer in report.layers if layer.type == "custom_layer"]
    x, narrow = NAMES[dtype], OUTPUTS[output_dtype]
    expected = [[narrow if form.quantized else x, *([x] * form.residual)] for form in OPERATORS]
    found = [[output.dtype for output in layer.outputs] for layer in custom]
    assert sorted(found) == sorted(expected)


def test_wrong_shape_of_gamma_is_named(build: Build) -> None:
    message = r"dyt::DyT: gamma has shape \[64\] for x of shape \[\?, 8, 48\]; allowed: \[1\], or"
    with pytest.raises(ExportError, match=message):
        build(model([FORMS["DyT"]], "bf16", channels=48))


def test_wrong_dtype_of_gamma_has_no_format(build: Build) -> None:
    with pytest.raises(ExportError, match="to find any supported plugin/custom tactic format"):
        build(model([FORMS["DyT"]], "fp16", gamma=TensorProto.FLOAT))


def test_wrong_output_dtype_is_named(build: Build) -> None:
    with pytest.raises(ExportError, match=r"output_dtype is 10; allowed: 3 \(INT8\) and 17"):
        build(model([FUSED["AddDyTQuantize"]], "bf16", TensorProto.FLOAT16))


def test_missing_input_is_named(build: Build) -> None:
    file = model([FUSED["AddDyT"]], "bf16")
    del file.graph.node[0].input[-1]
    message = "4 inputs are given; it takes x, residual, alpha, gamma, beta"
    with pytest.raises(ExportError, match=message):
        build(file)
