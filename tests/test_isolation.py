"""Foreign files are loaded in a process of their own first: where that ends, ours goes on."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest

from dyt_compile import convert, inspect, isolation
from dyt_compile.errors import CaptureError
from dyt_compile.graphs import onnx as graphs

from .report.models import WIDTH, norms

pytestmark = pytest.mark.core

DEADLY = isolation.WORKER.replace(
    "    options = ", "    if 'deadly' in path: import os; os.abort()\n    options = "
)


@pytest.fixture
def worker(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A worker that some files end."""
    monkeypatch.setattr(isolation, "WORKER", DEADLY)
    isolation._worker.cache_clear()
    yield
    isolation._worker(os.getpid()).kill()
    isolation._worker.cache_clear()


def _model(path: Path) -> Path:
    path.write_bytes(norms(("first",)).SerializeToString())
    return path


def _data() -> list[tuple[np.ndarray[tuple[int, int, int], np.dtype[np.float32]]]]:
    return [(np.random.default_rng(0).normal(size=(16, 4, WIDTH)).astype(np.float32),)]


def test_file_that_ends_onnx_runtime_is_refused_and_the_next_is_not(
    worker: None, tmp_path: Path
) -> None:
    with pytest.raises(CaptureError, match=r"deadly\.onnx' ends ONNX Runtime .*: SIGABRT$"):
        convert(_model(tmp_path / "deadly.onnx"), _data(), mode="all")
    assert convert(_model(tmp_path / "good.onnx"), _data(), mode="all").report.converted == 1


def test_worker_that_was_ended_from_outside_is_told_and_started_anew(
    worker: None, tmp_path: Path
) -> None:
    path = _model(tmp_path / "good.onnx")
    isolation.try_out(path, ["CPUExecutionProvider"])
    os.kill(isolation._worker(os.getpid()).pid, signal.SIGKILL)
    isolation._worker(os.getpid()).wait()
    with pytest.raises(CaptureError, match="SIGKILL"):
        isolation.try_out(path, ["CPUExecutionProvider"])
    isolation.try_out(path, ["CPUExecutionProvider"])


def test_what_onnx_runtime_refuses_is_no_end(tmp_path: Path) -> None:
    (tmp_path / "broken.onnx").write_bytes(b"no model")
    isolation.try_out(tmp_path / "broken.onnx", ["CPUExecutionProvider"])


def test_inspection_loads_nothing_in_onnx_runtime(worker: None, tmp_path: Path) -> None:
    assert len(inspect(_model(tmp_path / "deadly.onnx")).sites) == 1


def test_modules_beside_a_model_are_not_imported(
    worker: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "onnxruntime.py").write_text("open('hacked', 'w')")
    monkeypatch.chdir(tmp_path)
    isolation.try_out(_model(tmp_path / "good.onnx"), ["CPUExecutionProvider"])
    assert not (tmp_path / "hacked").exists()


def test_large_file_is_tried_without_the_weights_beside_it(
    worker: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[Path] = []

    def noted(path: Path, providers: Sequence[str], outline: Path | None = None) -> None:
        tried.append(outline or path)
        if outline is not None:
            assert outline.stat().st_size < large.stat().st_size + 4000
            assert not onnx.load(outline).graph.initializer
        isolation.try_out(path, providers, outline)

    monkeypatch.setattr(graphs, "try_out", noted)
    large = tmp_path / "large.onnx"
    onnx.save(norms(("first",)), large, save_as_external_data=True, size_threshold=0)
    assert convert(large, _data(), mode="all").report.converted == 1
    monkeypatch.setattr(graphs, "TRIED_BYTES", 0)
    assert convert(large, _data(), mode="all").report.converted == 1
    assert tried[0] == large
    assert tried[1] != large
    deadly = tmp_path / "deadly.onnx"
    onnx.save(norms(("first",)), deadly, save_as_external_data=True, size_threshold=0)
    with pytest.raises(CaptureError, match=r"deadly\.onnx' ends ONNX Runtime .*: SIGABRT$"):
        convert(deadly, _data(), mode="all")
