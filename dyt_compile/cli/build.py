"""dyt-compile build: a TensorRT engine from an ONNX file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from ..exporters.engine_shapes import combine, parse_shapes
from ..exporters.tensorrt import build_engine
from .options import Verbose
from .progress import console

__all__ = ["build"]

RuntimeName = Literal["tensorrt", "tensorrt-rtx"]

SHAPES_HELP = "For dynamic axes, as trtexec spells them: input:1x3x224x224,mask:1x224."


def build(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="An .onnx file.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="The engine to write.")],
    runtime: Annotated[RuntimeName, typer.Option(help="What builds the engine.")] = "tensorrt",
    min_shapes: Annotated[
        str, typer.Option("--minShapes", help=SHAPES_HELP, show_default=False)
    ] = "",
    opt_shapes: Annotated[
        str, typer.Option("--optShapes", help="The usual ones.", show_default=False)
    ] = "",
    max_shapes: Annotated[
        str, typer.Option("--maxShapes", help="The largest ones.", show_default=False)
    ] = "",
    lowering: Annotated[
        Literal["native", "plugin", "auto"],
        typer.Option(help="DyT as native operators, as our plugin, or the faster."),
    ] = "native",
    target: Annotated[
        list[str] | None,
        typer.Option(help="Compute capability (sm89) for tensorrt-rtx; may be repeated."),
    ] = None,
    timing_cache: Annotated[
        Path | None, typer.Option("--timingCacheFile", help="Read and written; tensorrt only.")
    ] = None,
    level: Annotated[
        int | None, typer.Option("--builderOptimizationLevel", min=0, max=5, help="0 to 5.")
    ] = None,
    layer_info: Annotated[
        Path | None, typer.Option("--exportLayerInfo", help="Write the fused layers as JSON.")
    ] = None,
    plugin_library: Annotated[
        Path | None, typer.Option(help="The library of `dyt-compile plugin build`.")
    ] = None,
    verbose: Verbose = False,
) -> None:
    """Build a TensorRT engine of MODEL, and write beside it what it needs to run."""
    shapes = combine(
        parse_shapes(min_shapes, "--minShapes"),
        parse_shapes(opt_shapes, "--optShapes"),
        parse_shapes(max_shapes, "--maxShapes"),
    )
    report = build_engine(
        model,
        out,
        runtime=runtime,
        shapes=shapes,
        lowering=lowering,
        target=[name for text in target or () for name in text.split(",")],
        plugin_library=plugin_library,
        timing_cache=timing_cache,
        builder_optimization_level=level,
        layer_info=layer_info,
    )
    wrote = (
        f"wrote {report.path}: {report.bytes / 1e6:.1f} MB in {report.seconds:.1f} s, "
        f"{report.runtime} {report.version}, {' '.join(report.targets)}, {report.lowering}, "
        f"{report.kernels} kernels"
    )
    timed = [f"{name}: {ms:.3f} ms" for name, ms in report.latency_ms.items()]
    told = "\n".join(filter(None, [wrote, *timed, report.note]))
    console().print(told, soft_wrap=True, highlight=False)
