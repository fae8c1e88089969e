"""The GPU benchmark as far as it goes without a GPU: its files, its engines, its plot."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

pytest.importorskip("transformers")

from dyt_compile import build_engine
from dyt_compile.exporters.tensorrt_worker import capability

from .cli.test_commands import failure
from .exporters.engines import norm_kernels

ROOT = Path(__file__).parents[1]

needs_no_gpu = pytest.mark.skipif(capability() is not None, reason="this machine has a GPU")


@needs_no_gpu
def test_bench_gpu_without_a_gpu_says_so_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    line = failure(capsys, "bench-gpu", "model.onnx")
    assert line == (
        "ExportError: no NVIDIA GPU was found: nothing can be timed here; "
        "run it on a machine that has one"
    )


@needs_no_gpu
def test_table_7_without_a_gpu_says_so_in_one_line(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.gpu", "-o", tmp_path / "gpu.json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == "no NVIDIA GPU was found: nothing can be measured on this machine\n"
    assert not done.stdout
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("norm", ["RMSNorm", "LayerNorm", "DyT"])
def test_files_of_table_7_become_engines(tmp_path: Path, norm: str) -> None:
    pytest.importorskip("tensorrt_rtx")
    from benchmarks.gpu.models import SMALL, embeddings, layer, model, onnx_files

    shape = tuple(embeddings(SMALL, SMALL.tokens).shape)
    for what, made in (("layer", layer), ("model", model)):
        files = onnx_files(made(SMALL, norm), SMALL, tmp_path, what)
        more = ["folded", "fp8"] if (norm, what) == ("DyT", "model") else []
        assert list(files) == ["exact", *more]
        for path in files.values():
            report = build_engine(
                path, tmp_path / "p", runtime="tensorrt-rtx", shapes={"x": shape}, target="sm89"
            )
            assert bool(norm_kernels(report)) == (norm != "DyT")
            assert report.network.operators.get("TANH", 0) == (
                0 if norm != "DyT" else 1 if what == "layer" else 2 * SMALL.layers + 1
            )
    if norm == "DyT":
        kinds = {node.op_type for node in onnx.load(files["fp8"]).graph.node}
        assert "QuantizeLinear" in kinds
        bare = [n for n in onnx.load(files["folded"]).graph.node if n.op_type == "DyTBare"]
        assert bare


def test_plot_names_the_device_and_every_row(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from benchmarks.gpu.plot import draw

    rows = [
        {"what": what, "norm": norm, "way": way, "median_ms": 1.5}
        for what in ("layer", "model")
        for norm in ("RMSNorm", "DyT")
        for way in ("eager", "exact native")
    ]
    found = {"device": "Some GPU", "passes": 100, "size": {"tokens": 4096}, "rows": rows}
    draw(json.loads(json.dumps(found)), tmp_path / "gpu.svg")
    text = (tmp_path / "gpu.svg").read_text()
    assert "Some GPU" in text
    assert text.count("RMSNorm, eager") == 2


@pytest.mark.gpu
def test_small_table_7_is_measured(tmp_path: Path) -> None:
    pytest.importorskip("tensorrt")
    command = [sys.executable, "-m", "benchmarks.gpu", "--small", "-o", tmp_path / "gpu.json"]
    subprocess.run(command, cwd=ROOT, check=True)
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert found["device"] == torch.cuda.get_device_name()
    assert np.all([row["median_ms"] > 0 for row in found["rows"]])
    assert (tmp_path / "gpu.svg").exists()
