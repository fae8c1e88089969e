"""Models timed as engines on this machine's GPU: native, and with the plugin."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..graphs.onnx_files import load
from ..graphs.onnx_fusion import forms
from .engine_shapes import Shape
from .engine_timing import PASSES, time_engine
from .tensorrt import build_engine

__all__ = ["EngineTiming", "time_model"]


@dataclass(frozen=True)
class EngineTiming:
    """A model as it was timed: the median of its passes, milliseconds."""

    name: str
    lowering: str
    kernels: int
    device: str
    median_ms: float
    passes: int


def time_model(
    onnx_path: str | Path,
    folder: Path,
    *,
    runtime: str = "tensorrt",
    shapes: Mapping[str, Shape | Sequence[Shape]] | None = None,
    plugin_library: str | Path | None = None,
    passes: int = PASSES,
) -> list[EngineTiming]:
    """Build a model in `folder` and time it: native, and with the plugin where one is given and
    the model has a node for it. Raises what `build_engine` and `time_engine` raise."""
    path = Path(onnx_path)
    lowerings = ["native"]
    if plugin_library is not None and forms(load(path)):
        lowerings.append("plugin")
    timings = []
    for lowering in lowerings:
        library = plugin_library if lowering == "plugin" else None
        report = build_engine(
            path,
            folder / f"{path.stem}.{lowering}.plan",
            runtime=runtime,
            shapes=shapes,
            lowering=lowering,
            plugin_library=library,
        )
        timing = time_engine(report.path, runtime=runtime, plugin_library=library, passes=passes)
        timings.append(
            EngineTiming(
                path.stem, lowering, report.kernels, timing.device, timing.median_ms, passes
            )
        )
    return timings
