"""Embeddings beside an ONNX model: the rows that a batch looks up, and no others."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes  # noqa: F401 - NumPy knows bfloat16 by it
import numpy as np
import numpy.typing as npt
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from dyt_compile.errors import DataError
from dyt_compile.graphs import onnx_files, onnx_rows
from dyt_compile.graphs.onnx import OnnxGraph

pytestmark = pytest.mark.core

COUNT, COLUMNS = 300, 64
NAMES = {"float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16,
         "bfloat16": TensorProto.BFLOAT16}  # fmt: skip


def _model(path: Path, dtype: str, *, axis: int = 0) -> npt.NDArray[np.float32]:
    """A table that is looked up, and doubled in float32; its numbers."""
    table = np.random.default_rng(0).normal(size=(COUNT, COLUMNS)).astype(np.dtype(dtype))
    nodes = [
        helper.make_node("Gather", ["table", "words"], ["rows"], axis=axis),
        helper.make_node("Cast", ["rows"], ["wide"], to=TensorProto.FLOAT),
        helper.make_node("Add", ["wide", "wide"], ["y"]),
    ]
    held = helper.make_tensor("table", NAMES[dtype], table.shape, table.tobytes(), raw=True)
    words = helper.make_tensor_value_info("words", TensorProto.INT64, ["n", 5])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    graph = helper.make_graph(nodes, "rows", [words], [y], [held])
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.save(proto, path, save_as_external_data=True, location="data", size_threshold=0)
    return table.astype(np.float32)


def _run(path: Path, words: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
    graph = OnnxGraph.from_file(path)
    (y,) = graph.segment(list(graph.inputs.values()), list(graph.outputs.values()))([words])
    return np.asarray(y, np.float32)


@pytest.mark.parametrize("dtype", NAMES)
def test_rows_are_those_of_the_table(
    dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[int] = []

    def noted(tensor: onnx_rows.ir.ExternalTensor) -> npt.NDArray[np.generic]:
        read.append(tensor.nbytes)
        return onnx_files.numbers(tensor)

    monkeypatch.setattr(onnx_rows, "numbers", noted)
    table = _model(tmp_path / "model.onnx", dtype)
    words = np.array([[0, 7, 7, -1, 299], [3, 0, -300, 5, 7]])
    np.testing.assert_array_equal(_run(tmp_path / "model.onnx", words), 2 * table[words])
    assert read == [COLUMNS * np.dtype(dtype).itemsize] * 5  # each of five rows once
    assert _run(tmp_path / "model.onnx", words[:0]).shape == (0, 5, COLUMNS)


@pytest.mark.parametrize("word", [COUNT, -COUNT - 1])
def test_rows_that_are_not_there_are_refused(word: int, tmp_path: Path) -> None:
    _model(tmp_path / "model.onnx", "float32")
    with pytest.raises(DataError, match=r"'table' has 300 rows, and .* are looked up"):
        _run(tmp_path / "model.onnx", np.full((1, 5), word))


def test_other_axes_and_tables_inside_the_model_are_the_runtimes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnx_rows, "numbers", None)
    table = _model(tmp_path / "columns.onnx", "float32", axis=1)
    words = np.array([[0, 7, 7, 2, 60]])
    np.testing.assert_array_equal(_run(tmp_path / "columns.onnx", words), 2 * table[:, words])
    whole = onnx.load(_embedded(tmp_path))
    assert numpy_helper.to_array(whole.graph.initializer[0]).shape == (COUNT, COLUMNS)
    np.testing.assert_array_equal(_run(tmp_path / "embedded.onnx", words), 2 * table[words])


def _embedded(folder: Path) -> Path:
    _model(folder / "model.onnx", "float32")
    onnx.save(onnx.load(folder / "model.onnx"), folder / "embedded.onnx")
    return folder / "embedded.onnx"


def test_table_counts_by_the_rows_that_are_looked_up(tmp_path: Path) -> None:
    _model(tmp_path / "model.onnx", "float32")
    whole = OnnxGraph.from_file(_embedded(tmp_path)), OnnxGraph.from_file(tmp_path / "model.onnx")
    loads = [
        graph.loads(
            [(list(graph.inputs.values()), list(graph.outputs.values()))],
            {"words": np.zeros((1, 5), np.int64)},
            {"words": (1, 5)},
        )[0].most
        for graph in whole
    ]
    assert loads[0] - loads[1] >= COUNT * COLUMNS * 4
