"""What `benchmarks.files` does to models of gigabytes, on the same model with tiny layers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch

import dyt_compile
from benchmarks.files.subjects import Llama, write_llama

WIDTH, INNER, WORDS, LAYERS = 64, 96, 128, 2
TINY = Llama(WIDTH, INNER, LAYERS, 4, 4, WORDS, torch.bfloat16)


@pytest.mark.slow
def test_llama_with_dyt_folds_into_all_that_reads_a_norm(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    write_llama(path, TINY, dyt=True, sparse=False)
    result = dyt_compile.convert(path, mode="exact")
    assert result.folded is not None
    assert not result.folded.left
    written = dyt_compile.export_onnx(result, tmp_path / "new.onnx", check="structure")
    changed = LAYERS * WIDTH * (3 * WIDTH + 2 * INNER) + WIDTH * WORDS
    kept = LAYERS * WIDTH * (WIDTH + INNER) + WIDTH * WORDS
    assert written.structure is not None
    assert kept * 2 <= written.linked_bytes < kept * 2 + 10_000
    assert written.bytes > changed * 2
    tokens = np.zeros((2, 16), np.int64)
    ends = [
        graph.segment(list(graph.inputs.values()), list(graph.outputs.values()))([tokens])[0]
        for graph in (result.original, dyt_compile.convert(written.path, fold=False).graph)
    ]
    before, after = (end.astype(np.float64) for end in ends)
    assert np.abs(after - before).max() < 0.02 * np.abs(before).max()
    assert not any(node.op_type == "DyT" for node in ir.load(written.path).graph)
