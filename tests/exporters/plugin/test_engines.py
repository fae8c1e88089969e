"""Engines with the plugin, by TensorRT-RTX: which nodes it takes, and what that does to kernels."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from torch import Tensor, nn

import dyt_compile
from dyt_compile import EngineReport, build_engine, export_onnx
from dyt_compile.dyt import DOMAIN, FORMS, FUSED
from dyt_compile.errors import ExportError
from dyt_compile.exporters import tensorrt_process
from dyt_compile.exporters.onnx import write
from dyt_compile.exporters.plugin.build import PluginInfo
from dyt_compile.exporters.tensorrt import read_network
from dyt_compile.graphs import onnx_functions
from dyt_compile.graphs.onnx_fusion import forms, fuse
from tests.quantize import quantize

from ..engines import (
    EMBEDDINGS,
    IMAGE,
    NARROW,
    RTX,
    TARGET,
    WIDTH,
    Files,
    conversions,
    engine,
    files,
    llama,
    norm_kernels,
    profiles,
    vit_base,
)
from ..test_onnx import DTYPES, Exports, exports

pytest.importorskip("tensorrt_rtx")
pytest.importorskip("transformers")
pytest.importorskip("timm")

__all__ = ["exports"]  # the fixture


@pytest.fixture(scope="module", params=DTYPES)
def llama_files(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Files:
    """Files of two blocks of LLaMA, in each dtype."""
    return files(llama(), EMBEDDINGS, tmp_path_factory.getbasetemp() / "llama", request.param)


def built(path: Path, plugin: PluginInfo | None = None, target: str = TARGET) -> EngineReport:
    return engine(path, None if plugin is None else plugin.path, target)


# Forms.


def _one(form: str, dtype: ir.DataType, narrow: ir.DataType, path: Path) -> Path:
    """A file of one node of a form; quantized ones are read by a DequantizeLinear."""
    fused = (FORMS | FUSED)[form]
    graph = ir.Graph([], [], nodes=[], opset_imports={"": 21}, name="one")
    values = []
    for name in fused.inputs:
        given = name in ("x", "residual")
        single = name in ("alpha", "shift", "y_scale")
        kind = ir.DataType.FLOAT if single else dtype
        shape = ["batch", 3, WIDTH] if given else [1] if single else [WIDTH]
        value = ir.Value(name=name, type=ir.TensorType(kind), shape=ir.Shape(shape))
        if given:
            graph.inputs.append(value)
        else:
            array = np.full(shape, 0.5).astype(kind.numpy())
            value.const_value = ir.tensor(array, dtype=kind, name=name)
            graph.register_initializer(value)
        values.append(value)
    node = onnx_functions.call(fused, values, "made", narrow if fused.quantized else None)
    graph.append(node)
    outputs = list(node.outputs)
    if fused.quantized:
        scale = np.array(0.5).astype(dtype.numpy())
        held = ir.Value(
            name="scale", type=ir.TensorType(dtype), shape=ir.Shape([]),
            const_value=ir.tensor(scale, dtype=dtype, name="scale"),
        )  # fmt: skip
        graph.register_initializer(held)
        read = ir.node("DequantizeLinear", [outputs[0], held])
        graph.append(read)
        outputs[0] = read.outputs[0]
    for place, value in enumerate(outputs):
        value.name, value.type = f"out_{place}", ir.TensorType(dtype)
        value.shape = ir.Shape(["batch", 3, WIDTH])
        graph.outputs.append(value)
    model = ir.Model(graph, ir_version=10)
    onnx_functions.declare(model)
    ir.save(model, path)
    onnx.checker.check_model(str(path), full_check=True)
    return path


@pytest.mark.parametrize(
    ("form", "dtype"),
    [
        *((form, "FLOAT16") for form in (*FORMS, *FUSED)),
        *(("AddDyTQuantize", dtype) for dtype in ("FLOAT", "BFLOAT16")),
    ],
)
def test_every_form_is_taken_by_the_plugin_and_by_its_function(
    plugin: PluginInfo, tmp_path: Path, form: str, dtype: str
) -> None:
    narrow = NARROW["fp8" if dtype == "FLOAT16" else "int8"]
    path = _one(form, ir.DataType[dtype], narrow, tmp_path / "one.onnx")
    with_plugin = read_network(path, runtime=RTX, plugin_library=plugin.path).operators
    assert with_plugin["PLUGIN_V3"] == 1
    assert "TANH" not in with_plugin
    without = read_network(path, runtime=RTX).operators
    assert "PLUGIN_V3" not in without
    assert without["ERF" if "Derf" in form else "TANH"] == 1
    assert without.get("QUANTIZE", 0) == form.endswith("Quantize")


def test_a_second_quantized_call_needs_the_plugin_or_build(
    plugin: PluginInfo, tmp_path: Path
) -> None:
    # The parser gives QuantizeLinear in a function the same name at every call, and refuses it.
    path = _one("DyTQuantize", ir.DataType.FLOAT, NARROW["int8"], tmp_path / "one.onnx")
    model = ir.load(path)
    (node, *_) = (node for node in model.graph if node.domain == DOMAIN)
    inputs = [model.graph.outputs[0], *node.inputs[1:]]
    again = onnx_functions.call(FUSED["DyTQuantize"], inputs, "again", NARROW["int8"])  # type: ignore[arg-type]
    read = ir.node("DequantizeLinear", [again.outputs[0], model.graph.initializers["scale"]])
    model.graph.extend([again, read])
    read.outputs[0].name, read.outputs[0].type = "end", ir.TensorType(ir.DataType.FLOAT)
    read.outputs[0].shape = model.graph.outputs[0].shape
    model.graph.outputs[0] = read.outputs[0]
    ir.save(model, path)
    with pytest.raises(ExportError, match="already in use"):
        read_network(path, runtime=RTX)
    operators = read_network(path, runtime=RTX, plugin_library=plugin.path).operators
    assert operators["PLUGIN_V3"] == 2
    assert built(path).network.operators["QUANTIZE"] == 2  # written out before it is parsed
    report = built(path, plugin)
    assert report.plugins == {"DyTQuantize": 2}
    assert [layer.type for layer in report.layers].count("custom_layer") == 2


# Models.


PLUGINS = {
    # The first sum of the ViT broadcasts positions: no residual.
    "digits": {"AddDyT": 8, "DyT": 1},
    "decoder": {"AddDyT": 2, "DyT": 1},
    "trained": {"DyT": 1, "AddDyTScale": 1, "AddDyTBare": 1, "AddDerf": 1},
    "image": {"DyT": 1},  # channels first
}


@pytest.mark.parametrize(
    ("model", "dtype"), [*((m, "fp16") for m in PLUGINS), ("digits", "fp32"), ("digits", "bf16")]
)
def test_plugin_takes_every_dyt(
    exports: Exports, plugin: PluginInfo, tmp_path: Path, model: str, dtype: str
) -> None:
    path = Path(shutil.copy(exports(model, dtype).path, tmp_path))
    report = built(path, plugin)
    assert report.plugins == PLUGINS[model]
    assert report.network.operators["PLUGIN_V3"] == sum(PLUGINS[model].values())
    assert "TANH" not in report.network.operators
    assert not norm_kernels(report)


def test_native_engine_of_llama_has_no_norm_and_no_more_kernels(llama_files: Files) -> None:
    norms, native = built(llama_files.norms), built(llama_files.dyt)
    assert len(norm_kernels(norms)) >= 5
    assert not norm_kernels(native)
    assert native.kernels <= norms.kernels


@pytest.mark.parametrize("target", [TARGET, "sm120"])
def test_quantized_plugin_feeds_the_products_of_llama(
    llama_files: Files, plugin: PluginInfo, target: str
) -> None:
    for name, path in llama_files.quantized.items():
        report = built(path, plugin, target)
        assert report.plugins == {"AddDyTQuantize": 3, "AddDyT": 1, "DyTQuantize": 1}
        assert not norm_kernels(report)
        assert "QUANTIZE" not in report.network.operators
        written = [x.outputs[0].dtype for x in report.layers if x.type == "custom_layer"]
        assert sorted(written).count(name) == 4
        read = [x for x in report.layers if x.inputs and x.inputs[0].dtype == name]
        assert len(read) >= 4
        assert all(layer.type != "custom_layer" for layer in read)


def test_quantized_plugin_has_fewer_kernels_than_norms_and_than_the_plain_plugin(
    llama_files: Files, plugin: PluginInfo
) -> None:
    norms = built(llama_files.norms).kernels
    plain = built(llama_files.dyt, plugin).kernels
    fp8, int8 = (built(llama_files.quantized[name], plugin).kernels for name in ("fp8", "int8"))
    assert fp8 < norms
    assert int8 <= norms
    assert max(fp8, int8) < plain


def test_auto_without_a_gpu_is_native_and_says_that_it_did_not_measure(
    llama_files: Files, plugin: PluginInfo, tmp_path: Path
) -> None:
    path = llama_files.quantized["fp8"]
    report = build_engine(
        path, tmp_path / "p", runtime=RTX, shapes=profiles(path), target=TARGET, lowering="auto",
        plugin_library=plugin.path,
    )  # fmt: skip
    assert (report.lowering, report.plugins, report.latency_ms) == ("native", {}, {})
    assert report.note == "native, not measured: no GPU"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["p", "p.json"]


def test_sum_that_leaves_the_block_saves_a_kernel(plugin: PluginInfo, tmp_path: Path) -> None:
    kernels = {}
    for name in (None, *NARROW):
        file = ir.load(_residual_block(tmp_path / f"{name}.onnx"))
        if name is not None:
            assert quantize(file, NARROW[name]) == 1
        path = tmp_path / f"{name}.onnx"
        write(file, path)
        kernels[name] = (built(path).kernels, built(path, plugin).kernels)
    assert kernels == dict.fromkeys((None, *NARROW), (4, 3))


def _residual_block(path: Path) -> Path:
    """y = DyT(x + r) · w + bias, and the sum."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.LayerNorm(WIDTH)
            self.linear = nn.Linear(WIDTH, WIDTH)

        def forward(self, x: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
            total = x + r
            return self.linear(self.norm(total)), total

    torch.manual_seed(0)
    batches = [(torch.randn(2, 64, WIDTH), torch.randn(2, 64, WIDTH)) for _ in range(4)]
    result = dyt_compile.convert(Block().eval(), batches, mode="all", fit="diagonal")
    return export_onnx(result, path).path


# What goes wrong.


def _changed(path: Path, **attributes: str) -> Path:
    model = ir.load(path)
    for node in model.graph:
        if node.domain == DOMAIN:
            for name, value in attributes.items():
                node.attributes[name] = ir.AttrString(name, value)
    ir.save(model, path)
    return path


def test_plugin_of_another_version_is_not_taken(plugin: PluginInfo, tmp_path: Path) -> None:
    path = _one("DyT", ir.DataType.FLOAT, NARROW["int8"], tmp_path / "one.onnx")
    _changed(path, plugin_version="2")
    operators = read_network(path, runtime=RTX, plugin_library=plugin.path).operators
    assert "PLUGIN_V3" not in operators
    model = ir.load(path)
    model.functions.clear()
    ir.save(model, path)
    with pytest.raises(ExportError, match=r"DyT"):
        read_network(path, runtime=RTX, plugin_library=plugin.path)


def test_file_that_is_no_plugin_library_is_named(tmp_path: Path) -> None:
    path = _one("DyT", ir.DataType.FLOAT, NARROW["int8"], tmp_path / "one.onnx")
    (tmp_path / "lib.so").write_bytes(b"no library")
    with pytest.raises(ExportError, match=r"cannot load the plugin library '.*lib.so'"):
        build_engine(
            path, tmp_path / "p", runtime=RTX, shapes=profiles(path), lowering="plugin",
            plugin_library=tmp_path / "lib.so",
        )  # fmt: skip


def test_abort_of_the_parser_is_one_error(
    plugin: PluginInfo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Without its library's plain name the parser ends the process at the first plugin node.
    path = _one("DyT", ir.DataType.FLOAT, NARROW["int8"], tmp_path / "one.onnx")
    environment = tensorrt_process._environment

    def without(*given: Any) -> dict[str, str]:
        return {**environment(*given), "LD_LIBRARY_PATH": ""}

    monkeypatch.setattr(tensorrt_process, "_environment", without)
    with pytest.raises(ExportError, match=r"ended while building 'one.onnx' \(plugin\): signal 6"):
        built(path, plugin)
    assert [path.name for path in tmp_path.iterdir()] == ["one.onnx"]


# ViT-B.


@pytest.mark.slow
@pytest.mark.parametrize("target", [TARGET, "sm120"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_engines_of_vit_base(
    plugin: PluginInfo, tmp_path_factory: pytest.TempPathFactory, dtype: str, target: str
) -> None:
    vit = files(vit_base(), IMAGE, tmp_path_factory.getbasetemp() / "vit", dtype)
    norms, native = (built(path, target=target) for path in (vit.norms, vit.dyt))
    assert len(norm_kernels(norms)) >= 25
    assert not norm_kernels(native)
    assert native.kernels <= norms.kernels
    residual = built(vit.dyt, plugin, target)
    assert residual.plugins == {"AddDyT": 24, "DyT": 1}
    assert not norm_kernels(residual)
    for name, path in vit.quantized.items():
        report = built(path, plugin, target)
        assert report.plugins == {"AddDyTQuantize": 23, "AddDyT": 1, "DyTQuantize": 1}
        written_first = [x.outputs[0].dtype for x in report.layers if x.type == "custom_layer"]
        assert written_first.count(name) == 24
        # No kernel fewer than the native engine: TensorRT fuses the Add into the product before
        # it, and DyT with its quantizer; a plugin stands between them.
        assert report.kernels >= built(path, target=target).kernels


def test_convert_fuses_what_the_plugin_computes(tmp_path: Path) -> None:
    _, conversion = conversions(llama(), EMBEDDINGS)
    written = export_onnx(conversion, tmp_path / "fused.onnx", fuse=True)
    assert written.export_error is not None
    assert written.export_error < 1e-5
    assert forms(ir.load(written.path)) == {"AddDyT": 4, "DyT": 1}
    model = ir.load(written.path)
    assert fuse(model) == {"AddDyT": 4, "DyT": 1}
