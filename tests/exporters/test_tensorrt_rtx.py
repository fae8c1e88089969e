"""Exported files in TensorRT-RTX, which takes DyT's function body where it knows no plugin."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import onnx
import pytest

pytest.importorskip("tensorrt_rtx")

from .rtx import Network, network
from .test_onnx import ALL, DTYPES, NODES, WIDTH, Exports, exports, our_nodes, shapes

__all__ = ["exports"]  # the fixture

CAPABILITY = "SM89"

MODELS = [str(getattr(model, "values", [model])[0]) for model in ALL]

Read = Callable[..., Network]


@pytest.fixture(scope="module")
def read(tmp_path_factory: pytest.TempPathFactory) -> Read:
    """Reads a file, and builds it if a compute capability is given."""
    libraries = tmp_path_factory.mktemp("libraries")

    def read(path: Path, capability: str | None = None) -> Network:
        return network(path, libraries, capability)

    return read


def _squashes(found: Network) -> dict[str, int]:
    return {name: found.functions.get(name, 0) for name in ("TANH", "ERF")}


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_file_is_parsed_with_every_dyt_as_its_body(
    exports: Exports, read: Read, model: str, dtype: str
) -> None:
    path = exports(model, dtype).path
    found = read(path)
    assert found.parsed, found.errors
    assert not found.errors
    assert not any("PLUGIN" in kind for kind in found.layers)
    nodes = our_nodes(onnx.load(path))
    assert sum(NODES[model].values()) == len(nodes)
    assert found.functions.get("TANH", 0) == sum(n.op_type != "Derf" for n in nodes)
    # GELU is one too: written with erf.
    assert found.functions.get("ERF", 0) >= sum(n.op_type == "Derf" for n in nodes)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_names_types_and_dynamic_axes_arrive(
    exports: Exports, read: Read, model: str, dtype: str
) -> None:
    graph = onnx.load(exports(model, dtype).path).graph
    found = read(exports(model, dtype).path)
    for values, arrived in ((graph.input, found.inputs), (graph.output, found.outputs)):
        fixed = {
            name: [size if isinstance(size, int) else -1 for size in shape]
            for name, shape in shapes(values).items()
        }
        assert {name: shape for name, (_, shape) in arrived.items()} == fixed
    assert {kind for kind, _ in found.outputs.values()} == {"FLOAT"}
    assert {kind for kind, _ in found.inputs.values()} == {
        "INT64" if model == "decoder" else "FLOAT"
    }


@pytest.mark.parametrize("dtype", DTYPES)
def test_engine_of_the_digits_transformer_is_built(
    exports: Exports, read: Read, dtype: str
) -> None:
    found = read(exports("digits", dtype).path, CAPABILITY)
    assert found.engine_bytes > 100_000, found.errors
    assert not found.errors


@pytest.mark.parametrize("model", [model for model in MODELS if model != "digits"])
def test_engine_of_a_narrow_model_is_built(exports: Exports, read: Read, model: str) -> None:
    found = read(exports(model, "bf16").path, CAPABILITY)
    assert found.engine_bytes > 1000, found.errors
    assert not found.errors


@pytest.mark.parametrize("opset", [18, 23])
def test_other_opsets_are_parsed(exports: Exports, read: Read, opset: int) -> None:
    found = read(exports("partly", "fp16", opset).path)
    assert found.parsed, found.errors
    assert _squashes(found)["TANH"] == NODES["partly"]["DyT"]


def test_unknown_operator_is_named(exports: Exports, read: Read, tmp_path: Path) -> None:
    file = onnx.load(exports("trained").path)
    (node, *_) = (node for node in file.graph.node if node.op_type == "MatMul")
    node.op_type = "NoSuchOperator"
    onnx.save(file, tmp_path / "model.onnx")
    found = read(tmp_path / "model.onnx")
    assert not found.parsed
    assert "NoSuchOperator" in " ".join(found.errors)


def test_dyt_without_its_function_is_refused(exports: Exports, read: Read, tmp_path: Path) -> None:
    file = onnx.load(exports("trained").path)
    del file.functions[:]
    onnx.save(file, tmp_path / "model.onnx")
    assert not read(tmp_path / "model.onnx").parsed


def test_types_that_do_not_fit_build_no_engine(read: Read, tmp_path: Path) -> None:
    model = onnx.parser.parse_model(
        f"""
        <ir_version: 9, opset_import: ["" : 20]>
        wrong (float16[n,{WIDTH}] x, float[n,{WIDTH}] z) => (float16[n,{WIDTH}] y) {{
            y = Add(x, z)
        }}
        """
    )
    onnx.save(model, tmp_path / "model.onnx")
    found = read(tmp_path / "model.onnx", CAPABILITY)
    assert not found.engine_bytes
    assert found.errors
