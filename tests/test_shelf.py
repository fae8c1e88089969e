"""Shelf: what it gives back is what was kept, from memory or from a file."""

from __future__ import annotations

import gc
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dyt_compile.graphs.base import Graph
from dyt_compile.graphs.onnx import OnnxGraph
from dyt_compile.passes.capture import capture
from dyt_compile.shelf import Shelf
from dyt_compile.terms import Value

pytestmark = pytest.mark.core


class Doubled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 2


@pytest.fixture(scope="module")
def torch_graph() -> Graph:
    return capture(Doubled(), (torch.zeros(2, 3),))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where spilled files come to lie."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def _files(folder: Path) -> list[Path]:
    return list(folder.rglob("*.npy"))


def _like(dtype: str | None) -> Value:
    return Value(None, "value", None, dtype)


@pytest.mark.parametrize(
    "dtype",
    ["float32", "float64", "float16", "bfloat16", "int64", "int32", "uint8", "bool"],
)
def test_spilled_tensor_comes_back_equal(torch_graph: Graph, folder: Path, dtype: str) -> None:
    kept = torch.randn(4, 5).mul(3).to(getattr(torch, dtype))
    with Shelf(torch_graph, memory_bytes=0) as shelf:
        handle = shelf.keep(kept, _like(dtype))
        assert len(_files(folder)) == 1
        for _ in range(2):
            found = handle.load()
            assert found.dtype is kept.dtype
            assert torch.equal(found, kept)


def test_spilled_transposed_tensor_comes_back_equal(torch_graph: Graph, folder: Path) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        kept = torch.randn(4, 5).to(dtype).T
        with Shelf(torch_graph, memory_bytes=0) as shelf:
            handle = shelf.keep(kept, _like(str(dtype).removeprefix("torch.")))
            assert torch.equal(handle.load(), kept)


def test_spilled_scalar_keeps_its_shape(torch_graph: Graph, folder: Path) -> None:
    with Shelf(torch_graph, memory_bytes=0) as shelf:
        assert shelf.keep(torch.tensor(3.5), _like("float32")).load().shape == ()


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "int64", "bool"])
def test_spilled_array_comes_back_equal(folder: Path, dtype: str) -> None:
    real = np.dtype(ml_dtypes.bfloat16) if dtype == "bfloat16" else np.dtype(dtype)
    kept = (3 * np.random.default_rng(0).standard_normal((4, 5))).astype(real)
    graph = OnnxGraph.__new__(OnnxGraph)  # only converts values here
    with Shelf(graph, memory_bytes=0) as shelf:
        handle = shelf.keep(kept, _like(dtype))
        assert _files(folder)
        found = handle.load()
        assert found.dtype == kept.dtype
        np.testing.assert_array_equal(found, kept)


@pytest.mark.parametrize("native", [7, 2.5, True, None])
def test_plain_numbers_stay_in_memory(torch_graph: Graph, folder: Path, native: Any) -> None:
    with Shelf(torch_graph, memory_bytes=0) as shelf:
        assert shelf.keep(native, _like(None)).load() is native
        assert not _files(folder)


def test_values_below_the_limit_stay_in_memory(torch_graph: Graph, folder: Path) -> None:
    first, second, third = (torch.randn(10) for _ in range(3))  # 40 bytes each
    with Shelf(torch_graph, memory_bytes=80) as shelf:
        handles = [shelf.keep(x, _like("float32")) for x in (first, second)]
        assert not _files(folder)
        assert handles[0].load() is first
        spilled = shelf.keep(third, _like("float32"))
        assert len(_files(folder)) == 1
        assert torch.equal(spilled.load(), third)


def test_memory_is_free_again_when_a_handle_goes(torch_graph: Graph, folder: Path) -> None:
    with Shelf(torch_graph, memory_bytes=40) as shelf:
        for _ in range(5):
            handle = shelf.keep(torch.randn(10), _like("float32"))
            assert not _files(folder)
            del handle


def test_file_goes_with_its_handle(torch_graph: Graph, folder: Path) -> None:
    with Shelf(torch_graph, memory_bytes=0) as shelf:
        handles = [shelf.keep(torch.randn(10), _like("float32")) for _ in range(3)]
        assert len(_files(folder)) == 3
        handles.pop()
        gc.collect()
        assert len(_files(folder)) == 2
        assert all(handle.load().shape == (10,) for handle in handles)


def test_files_vanish_with_the_shelf(torch_graph: Graph, folder: Path) -> None:
    with Shelf(torch_graph, memory_bytes=0) as shelf:
        handle = shelf.keep(torch.randn(10), _like("float32"))
    assert not list(folder.iterdir())
    del handle  # its own file is gone already
    gc.collect()


def test_files_vanish_after_an_error(torch_graph: Graph, folder: Path) -> None:
    def fail() -> None:
        with Shelf(torch_graph, memory_bytes=0) as shelf:
            handle = shelf.keep(torch.randn(10), _like("float32"))
            raise RuntimeError(f"midway, with {handle}")

    with pytest.raises(RuntimeError, match="midway"):
        fail()
    assert not list(folder.iterdir())


def test_shelf_without_spilled_values_makes_no_folder(torch_graph: Graph, folder: Path) -> None:
    with Shelf(torch_graph) as shelf:
        handle = shelf.keep(torch.randn(10), _like("float32"))
    assert not list(folder.iterdir())
    assert handle.load().shape == (10,)
