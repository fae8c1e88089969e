"""dyt-compile convert: replace norms by DyT and write the model."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from .. import compiler
from ..errors import OptionError
from ..progress import reporting
from ..report.terminal import (
    fold_table,
    frontier_table,
    quantization_table,
    report_table,
)
from ..report.writing import check_target, write_report
from .options import (
    BatchSize,
    Data,
    Exclude,
    MetricName,
    Model,
    OutputName,
    ProviderName,
    Reports,
    Verbose,
)
from .progress import TerminalReporter, console, tell_written
from .sources import load_data, load_metric, load_model
from .writing import check_out, write_model

__all__ = ["convert"]


class Mode(str, Enum):
    """How much of the model may change."""

    exact = "exact"
    budget = "budget"
    all = "all"


class Metric(str, Enum):
    """How the error at the output is measured."""

    relative = "relative"
    cosine = "cosine"
    kl = "kl"
    top1 = "top1"


class FitMethod(str, Enum):
    """What is fitted at a site."""

    auto = "auto"
    diagonal = "diagonal"
    full = "full"


Fit = Annotated[
    FitMethod,
    typer.Option(help="One value a channel, or a matrix that the weights behind take up."),
]


class Dtype(str, Enum):
    """In which type the exported model computes."""

    fp32 = "fp32"
    fp16 = "fp16"
    bf16 = "bf16"


class EightBits(str, Enum):
    """What products of a DyT's output compute in."""

    int8 = "int8"
    fp8 = "fp8"


class Runtime(str, Enum):
    """Who a quantised file is for."""

    any = "any"
    onnxruntime = "onnxruntime"
    openvino = "openvino"
    tensorrt = "tensorrt"


class Weights(str, Enum):
    """Where the weights of an ONNX file go."""

    link = "link"
    copy = "copy"
    embed = "embed"


class Check(str, Enum):
    """How a written ONNX file is checked."""

    auto = "auto"
    structure = "structure"
    run = "run"


OF_ONNX = (None, None, None, Dtype.fp32, False, Check.auto, Runtime.any)
"""What the options are that only .onnx files have, where they were not given."""

Target = Annotated[
    Path, typer.Option("-o", "--out", help="Write .onnx, .pt2 or .safetensors.", show_default=False)
]


def convert(
    model: Model,
    out: Target,
    data: Data = None,
    mode: Annotated[
        Mode | None, typer.Option(help="Default: budget with --data, exact without.")
    ] = None,
    max_error: Annotated[float, typer.Option(help="The budget of mode budget.")] = 0.05,
    metric: MetricName = "relative",
    output: OutputName = None,
    exclude: Exclude = None,
    fit: Fit = FitMethod.auto,
    batch_size: BatchSize = 32,
    opset: Annotated[
        int | None, typer.Option(help="18 to 23; default: 20, or the ONNX file's own.")
    ] = None,
    dtype: Annotated[
        Dtype, typer.Option(help="Inside the exported model; its inputs and outputs stay.")
    ] = Dtype.fp32,
    weights: Annotated[
        Weights | None,
        typer.Option(
            help="Link to the ONNX model's data files, copy the weights beside the new file, or "
            "embed them. Default: link within one folder; else embed up to 1.8 GB, copy above.",
            show_default=False,
        ),
    ] = None,
    check: Annotated[
        Check,
        typer.Option(
            help="Of the written file: compare its structure with the ONNX model's, or also run "
            "it; auto runs exact conversions up to 1.8 GB."
        ),
    ] = Check.auto,
    provider: ProviderName = "cpu",
    seed: Annotated[int, typer.Option(help="Of the split into fit, plan and report.")] = 0,
    report: Reports = None,
    calibration: Annotated[
        Path | None, typer.Option(help="Write the fitted values as safetensors.")
    ] = None,
    fits: Annotated[
        Path | None, typer.Option(help="Apply such a file in place of fitting; needs no data.")
    ] = None,
    fold: Annotated[bool, typer.Option(help="Put gamma, beta and scalars into weights.")] = True,
    affine: Annotated[
        bool, typer.Option("--affine", help="Sites may become affine maps, which weights take up.")
    ] = False,
    fuse: Annotated[
        bool,
        typer.Option("--fuse", help="Add and QuantizeLinear around a DyT into its node (exact)."),
    ] = False,
    quantize: Annotated[
        EightBits | None,
        typer.Option(
            help="Eight bits for what reads a DyT; --max-error covers it.", show_default=False
        ),
    ] = None,
    runtime: Annotated[
        Runtime, typer.Option("--for", help="Who the .onnx file is for.")
    ] = Runtime.any,
    frontier: Annotated[
        bool, typer.Option("--frontier", help="Also measure the error against converted sites.")
    ] = False,
    verbose: Verbose = False,
) -> None:
    """Replace norms of MODEL by Dynamic Tanh and write the result.

    Exact without data: DyT that the model holds is recognised, norms stay. With data, as many
    norms are converted as keep the measured error within --max-error.
    """
    check_out(out)
    given = (opset, weights, quantize, dtype, fuse, check, runtime)
    if out.suffix != ".onnx" and given != OF_ONNX:
        raise OptionError(
            "--opset, --dtype, --fuse, --quantize, --for, --weights and --check are of .onnx "
            f"files; -o is {str(out)!r}"
        )
    if calibration is not None and (data is None or mode is Mode.exact):
        raise OptionError("--calibration needs --data: mode exact fits nothing")
    for path in report or ():
        check_target(path)
    counted = load_metric(metric)
    source = load_model(model)
    with reporting(TerminalReporter(console(stderr=True))):
        result = compiler.convert(
            source.model,
            None if data is None else load_data(data, batch_size),
            mode=None if mode is None else mode.value,
            budget=max_error,
            metric=counted,
            output=output,
            example=source.example,
            exclude=tuple(exclude or ()),
            seed=seed,
            provider=provider,
            fold=fold,
            fit=fit.value,
            affine=affine,
            frontier=frontier,
            calibration=fits,
            quantize=None if quantize is None else quantize.value,
            runtime=runtime.value,
        )
        written, told = write_model(
            result,
            out,
            opset=opset,
            dtype=dtype.value,
            fuse=fuse,
            provider=provider,
            weights=None if weights is None else weights.value,
            check=check.value,
        )
    if calibration is not None and result.calibration is not None:
        result.calibration.save(calibration)
    if result.report.frontier:
        console().print(frontier_table(result.report))
    console().print(report_table(result.report))
    if result.folded is not None:
        console().print(fold_table(result.folded))
    if result.report.quantized is not None:
        console().print(quantization_table(result.report))
    console().print(told, soft_wrap=True, highlight=False)
    for path in report or ():
        tell_written(write_report(result.report, path, exported=written))
