"""Rows of the table: one model one way, timed on the GPU."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from dyt_compile.exporters.benchmark import time_model

__all__ = ["Row", "engine_rows", "torch_rows"]

WARM_UP = 10


@dataclass(frozen=True)
class Row:
    """what: "layer" or "model"; way: how it ran; median_ms: of a pass; kernels: of an engine."""

    what: str
    norm: str
    way: str
    median_ms: float
    kernels: int | None = None


def torch_rows(what: str, norm: str, model: nn.Module, x: Tensor, passes: int) -> list[Row]:
    """Eager, and compiled by Inductor."""
    on_gpu, x = model.cuda(), x.cuda()
    ways: dict[str, Callable[[Tensor], Tensor]] = {
        "eager": on_gpu,
        "compiled": torch.compile(on_gpu),
    }
    rows = [Row(what, norm, way, timed(run, x, passes)) for way, run in ways.items()]
    model.cpu()
    return rows


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
        Row(what, norm, f"{name} {timing.lowering}", timing.median_ms, timing.kernels)
        for name, path in files.items()
        for timing in time_model(
            path, folder, runtime=runtime, shapes={"x": shape}, plugin_library=plugin_library,
            passes=passes,
        )
    ]  # fmt: skip


@torch.no_grad()
def timed(run: Callable[[Tensor], Tensor], x: Tensor, passes: int) -> float:
    """The median milliseconds of a pass, by CUDA events."""
    times = []
    for place in range(WARM_UP + passes):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run(x)
        end.record()
        end.synchronize()
        if place >= WARM_UP:
            times.append(begin.elapsed_time(end))
    return statistics.median(times)
