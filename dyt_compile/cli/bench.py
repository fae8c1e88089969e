"""dyt-compile bench-gpu: how long models take as TensorRT engines on this machine's GPU."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from ..errors import ExportError
from ..exporters.benchmark import EngineTiming, time_model
from ..exporters.engine_shapes import combine, parse_shapes
from ..exporters.engine_timing import PASSES
from ..exporters.tensorrt_worker import capability
from ..files import replaced, work_folder
from .build import SHAPES_HELP, RuntimeName
from .options import JsonPath, Verbose
from .progress import console

__all__ = ["bench_gpu"]


def bench_gpu(
    models: Annotated[list[Path], typer.Argument(metavar="MODEL...", help=".onnx files.")],
    shapes: Annotated[str, typer.Option(help=SHAPES_HELP, show_default=False)] = "",
    runtime: Annotated[RuntimeName, typer.Option(help="What builds the engines.")] = "tensorrt",
    plugin_library: Annotated[
        Path | None, typer.Option(help="Time the models that hold DyT with our plugin too.")
    ] = None,
    passes: Annotated[int, typer.Option(min=1, help="Runs, after ten more.")] = PASSES,
    json_path: JsonPath = None,
    verbose: Verbose = False,
) -> None:
    """Build every MODEL, run it on the GPU, and print the median milliseconds of a pass.

    Give the original and the converted model. `python -m benchmarks.gpu` of the repository
    measures Table 7 of the DyT paper.
    """
    if capability() is None:
        raise ExportError(
            "no NVIDIA GPU was found: nothing can be timed here; run it on a machine that has one"
        )
    given = parse_shapes(shapes, "--shapes")
    timings: list[EngineTiming] = []
    with work_folder() as folder:
        for model in models:
            timings += time_model(
                model,
                folder,
                runtime=runtime,
                shapes=combine(given, given, given),
                plugin_library=plugin_library,
                passes=passes,
            )
    if json_path is not None:
        with replaced(json_path) as temporary:
            text = json.dumps([asdict(timing) for timing in timings], indent=2)
            temporary.write_text(text + "\n", encoding="utf-8")
    for timing in timings:
        console().print(
            f"{timing.median_ms:9.3f} ms  {timing.kernels:5d} kernels  {timing.lowering:6}  "
            f"{timing.name} ({timing.device})",
            soft_wrap=True, highlight=False,
        )  # fmt: skip
