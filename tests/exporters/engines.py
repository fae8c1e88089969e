"""Engines for tests and benchmarks: lengths for the dynamic axes of any file, kernels of norms."""

from __future__ import annotations

import re
from pathlib import Path

import onnx

from dyt_compile import EngineReport
from dyt_compile.exporters.engine_shapes import Profile

__all__ = ["LONGEST", "SHORTEST", "USUAL", "norm_kernels", "profiles"]

SHORTEST, USUAL, LONGEST = 1, 8, 16
"""Lengths of a dynamic axis that an engine is built for."""

NORM = re.compile(r"Sqrt|Rsq|Norm")
"""In the name of a fused kernel: the root of a norm, which nothing else in our models takes."""


def profiles(path: Path) -> dict[str, Profile]:
    """Shapes for every input of a file."""
    graph = onnx.load(path, load_external_data=False).graph
    found = {}
    for value in graph.input:
        axes = value.type.tensor_type.shape.dim
        least, usual, most = (
            tuple(axis.dim_value if axis.HasField("dim_value") else length for axis in axes)
            for length in (SHORTEST, USUAL, LONGEST)
        )
        found[value.name] = (least, usual, most)
    return found


def norm_kernels(report: EngineReport) -> list[str]:
    """The kernels of an engine that normalize."""
    return [layer.name for layer in report.layers if NORM.search(layer.name)]
