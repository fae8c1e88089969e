"""ONNX models in which a node waits for itself are refused, also where we would take it apart."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import dyt_compile
from dyt_compile.errors import CaptureError

pytestmark = pytest.mark.core


@pytest.mark.parametrize("gamma", ["gamma", "sum"])
def test_fused_norm_that_reads_its_own_sum_is_refused(gamma: str, tmp_path: Path) -> None:
    norm = helper.make_node(
        "SkipSimplifiedLayerNormalization", ["x", "x", gamma], ["n", "", "", "sum"],
        domain="com.microsoft", epsilon=1e-5,
    )  # fmt: skip
    graph = helper.make_graph(
        [norm, helper.make_node("Add", ["n", "sum"], ["y"])],
        "graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows", 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["rows", 8])],
        [numpy_helper.from_array(np.ones(8, np.float32), "gamma")],
    )
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("com.microsoft", 1)]
    path = tmp_path / "model.onnx"
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=9), path)
    if gamma == "gamma":
        assert len(dyt_compile.inspect(path).sites) == 1
        return
    with pytest.raises(CaptureError, match="cycle"):
        dyt_compile.inspect(path)
