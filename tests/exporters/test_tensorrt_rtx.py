"""Exported files in TensorRT-RTX, which takes DyT's function body where it knows no plugin."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest

pytest.importorskip("tensorrt_rtx")

from dyt_compile import EngineReport, build_engine
from dyt_compile.errors import ExportError
from dyt_compile.exporters.engine_report import Network
from dyt_compile.exporters.tensorrt import read_network

from .engines import norm_kernels, profiles
from .test_onnx import ALL, DTYPES, NODES, WIDTH, Exports, exports, our_nodes, shapes

__all__ = ["exports"]  # the fixture

RTX = "tensorrt-rtx"
TARGET = "sm89"

MODELS = [str(getattr(model, "values", [model])[0]) for model in ALL]


def read(path: Path) -> Network:
    return read_network(path, runtime=RTX)


def built(path: Path, folder: Path, target: str | None = TARGET) -> EngineReport:
    """An engine for lengths of 1 to 16 in every dynamic axis."""
    return build_engine(
        path, folder / "model.plan", runtime=RTX, shapes=profiles(path), target=target
    )


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_file_is_parsed_with_every_dyt_as_its_body(
    exports: Exports, model: str, dtype: str
) -> None:
    path = exports(model, dtype).path
    operators = read(path).operators
    assert not any("PLUGIN" in kind for kind in operators)
    nodes = our_nodes(onnx.load(path))
    assert sum(NODES[model].values()) == len(nodes)
    assert operators.get("TANH", 0) == sum(n.op_type != "Derf" for n in nodes)
    # GELU is one too: written with erf.
    assert operators.get("ERF", 0) >= sum(n.op_type == "Derf" for n in nodes)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_names_types_and_dynamic_axes_arrive(exports: Exports, model: str, dtype: str) -> None:
    graph = onnx.load(exports(model, dtype).path).graph
    found = read(exports(model, dtype).path)
    for values, arrived in ((graph.input, found.inputs), (graph.output, found.outputs)):
        fixed = {
            name: tuple(size if isinstance(size, int) else -1 for size in shape)
            for name, shape in shapes(values).items()
        }
        assert {tensor.name: tensor.shape for tensor in arrived} == fixed
    assert {tensor.dtype for tensor in found.outputs} == {"float"}
    assert {x.dtype for x in found.inputs} == {"int64" if model == "decoder" else "float"}


@pytest.mark.parametrize("target", [TARGET, "sm120"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_engine_of_the_digits_transformer_has_no_norm(
    exports: Exports, tmp_path: Path, dtype: str, target: str
) -> None:
    report = built(exports("digits", dtype).path, tmp_path, target)
    assert report.bytes == report.path.stat().st_size > 100_000
    assert (report.targets, report.lowering, report.plugins) == ((target,), "native", {})
    assert report.kernels > 9
    assert not norm_kernels(report)
    sources = {source for layer in report.layers for source in layer.sources}
    assert sum("DyT_squashed" in source for source in sources) == 9
    narrow = {"fp32": "float", "fp16": "half", "bf16": "bfloat16"}[dtype]
    products = [layer for layer in report.layers if layer.type in ("gemm", "runtime_fusion")]
    assert {tensor.dtype for layer in products for tensor in layer.outputs} <= {narrow, "float"}
    assert any(tensor.dtype == narrow for layer in products for tensor in layer.outputs)


@pytest.mark.parametrize("model", [model for model in MODELS if model != "digits"])
def test_engine_of_a_narrow_model_is_built(exports: Exports, tmp_path: Path, model: str) -> None:
    path = exports(model, "bf16").path
    assert built(path, tmp_path).bytes > 1000


def test_engine_is_written_where_a_relative_path_leads(
    exports: Exports, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = exports(MODELS[0], "fp32").path
    monkeypatch.chdir(tmp_path)
    built(path, Path())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.plan", "model.plan.json"]


@pytest.mark.parametrize("opset", [18, 23])
def test_other_opsets_are_parsed(exports: Exports, opset: int) -> None:
    operators = read(exports("partly", "fp16", opset).path).operators
    assert operators["TANH"] == NODES["partly"]["DyT"]


def test_unknown_operator_is_named(exports: Exports, tmp_path: Path) -> None:
    file = onnx.load(exports("trained").path)
    (node, *_) = (node for node in file.graph.node if node.op_type == "MatMul")
    node.op_type = "NoSuchOperator"
    onnx.save(file, tmp_path / "model.onnx")
    with pytest.raises(ExportError, match="NoSuchOperator"):
        read(tmp_path / "model.onnx")


def test_dyt_without_its_function_is_refused(exports: Exports, tmp_path: Path) -> None:
    file = onnx.load(exports("trained").path)
    del file.functions[:]
    onnx.save(file, tmp_path / "model.onnx")
    with pytest.raises(ExportError, match="cannot parse the model"):
        read(tmp_path / "model.onnx")


def test_types_that_do_not_fit_build_no_engine(tmp_path: Path) -> None:
    model = onnx.parser.parse_model(
        f"""
        <ir_version: 9, opset_import: ["" : 20]>
        wrong (float16[n,{WIDTH}] x, float[n,{WIDTH}] z) => (float16[n,{WIDTH}] y) {{
            y = Add(x, z)
        }}
        """
    )
    onnx.save(model, tmp_path / "model.onnx")
    with pytest.raises(ExportError, match=r"(?i)elementwise"):
        built(tmp_path / "model.onnx", tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.onnx"]
