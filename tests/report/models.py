"""ONNX models of norms with chosen names, written without torch, and reports of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

import dyt_compile
from dyt_compile.report.records import Recovery

__all__ = ["HOSTILE", "converted", "norms", "recovered"]

WIDTH = 16
HOSTILE = "</script><script>window.hacked=1</script><b>&amp;\u2028${name}"
"""A name that ends a script element, opens one, and marks text up."""


def norms(names: Sequence[str]) -> onnx.ModelProto:
    """x + W norm(x), once a name: LayerNorms of known names, the later ones of less weight."""
    random = np.random.default_rng(0)
    nodes, initializers, value = [], [], "x"
    for place, name in enumerate(names):
        arrays = {
            f"{name}.weight": random.uniform(0.5, 1.5, WIDTH),
            f"{name}.bias": random.normal(0, 0.1, WIDTH),
            f"matrix.{place}": random.normal(0, 0.5 / (1 + place) * WIDTH**-0.5, (WIDTH, WIDTH)),
        }
        initializers += [
            numpy_helper.from_array(array.astype(np.float32), key) for key, array in arrays.items()
        ]
        scale, shift, matrix = arrays
        following = "y" if place == len(names) - 1 else f"value.{place}"
        nodes += [
            helper.make_node("LayerNormalization", [value, scale, shift], [f"normed.{place}"]),
            helper.make_node("MatMul", [f"normed.{place}", matrix], [f"product.{place}"]),
            helper.make_node("Add", [value, f"product.{place}"], [following]),
        ]
        value = following
    if not names:
        nodes.append(helper.make_node("Tanh", ["x"], ["y"]))
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["batch", 4, WIDTH]) for n in "xy"]
    graph = helper.make_graph(nodes, "norms", ends[:1], ends[1:], initializers)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


@cache
def converted(
    names: tuple[str, ...], mode: str = "budget", budget: float = 0.1, frontier: bool = False
) -> dyt_compile.Conversion:
    """A conversion of `norms` on random samples of unequal sizes; not to be written to."""
    random = np.random.default_rng(1)
    sizes = random.uniform(0.5, 2.0, (64, 4, 1))
    x = (sizes * random.normal(size=(64, 4, WIDTH))).astype(np.float32)
    with TemporaryDirectory() as folder:
        path = Path(folder) / "norms.onnx"
        onnx.save(norms(names), path)
        return dyt_compile.convert(path, [(x,)], mode=mode, budget=budget, frontier=frontier)


def recovered(report: dyt_compile.Report) -> dyt_compile.Report:
    """The report as if a run in two stages had followed; an ONNX model cannot learn."""
    curve = ((0.0, 0.1), (0.25, 0.05), (0.5, 0.04), (0.5, 0.3), (0.75, 0.2), (1.0, float("nan")))
    return replace(report, recovery=Recovery("all", 0.5, 80, 120.0, curve, ((0, 2), (3, 4))))
