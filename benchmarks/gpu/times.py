"""Rows of the table: one model one way, timed on the GPU."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from dyt_compile.exporters.benchmark import time_model

__all__ = ["Row", "Way", "engine_rows", "quarters", "torch_rows"]

WARM_UP = 3

Way = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Row:
    """what: "layer" or "model"; way: how it ran; median_ms, quarters_ms: of a pass; kernels: of an
    engine."""

    what: str
    norm: str
    way: str
    median_ms: float
    quarters_ms: tuple[float, float] | None = None
    kernels: int | None = None


@torch.no_grad()
def torch_rows(what: str, ways: Mapping[tuple[str, str], Way], x: Tensor, passes: int) -> list[Row]:
    """A row for every (norm, way), one pass of each in turn."""
    times: dict[tuple[str, str], list[float]] = {name: [] for name in ways}
    for number in range(WARM_UP + passes):
        for name, run in ways.items():
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            run(x)
            end.record()
            end.synchronize()
            if number >= WARM_UP:
                times[name].append(begin.elapsed_time(end))
    return [
        Row(what, *name, statistics.median(each), quarters(each)) for name, each in times.items()
    ]


def quarters(values: Sequence[float]) -> tuple[float, float]:
    """The first and the third."""
    first, _, third = statistics.quantiles(values, n=4)
    return first, third


def engine_rows(
    what: str,
    norm: str,
    files: Mapping[str, Path],
    shape: tuple[int, ...],
    folder: Path,
    runtime: str,
    plugin_library: Path | None,
    passes: int,
) -> list[Row]:
    """TensorRT engines of every file, native and with the plugin where it has a node for it."""
    return [
        Row(what, norm, f"{name} {timing.lowering}", timing.median_ms, kernels=timing.kernels)
        for name, path in files.items()
        for timing in time_model(
            path, folder, runtime=runtime, shapes={"x": shape}, plugin_library=plugin_library,
            passes=passes,
        )
    ]  # fmt: skip
