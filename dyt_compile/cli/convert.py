"""dyt-compile convert: replace norms by DyT and write the model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from .. import compiler
from ..errors import OptionError
from ..files import check_writable
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
    Fit,
    MetricName,
    Model,
    OutputName,
    ProviderName,
    Reports,
    Trust,
    Verbose,
)
from .progress import TerminalReporter, console, tell_written
from .sources import load_data, load_metric, load_model
from .writing import check_out, write_model

__all__ = ["convert"]


OF_ONNX = (None, None, None, "fp32", False, "auto", "any")
"""What the options are that only .onnx files have, where they were not given."""

Target = Annotated[
    Path, typer.Option("-o", "--out", help="Write .onnx, .pt2 or .safetensors.", show_default=False)
]


def convert(
    model: Model,
    out: Target,
    data: Data = None,
    mode: Annotated[
        Literal["exact", "budget", "all"] | None,
        typer.Option(help="Default: budget with --data, exact without."),
    ] = None,
    max_error: Annotated[float, typer.Option(help="The budget of mode budget.")] = 0.05,
    metric: MetricName = "relative",
    output: OutputName = None,
    exclude: Exclude = None,
    fit: Fit = "auto",
    batch_size: BatchSize = 32,
    opset: Annotated[
        int | None, typer.Option(help="18 to 23; default: 20, or the ONNX file's own.")
    ] = None,
    dtype: Annotated[
        Literal["fp32", "fp16", "bf16"],
        typer.Option(help="Inside the exported model; its inputs and outputs stay."),
    ] = "fp32",
    weights: Annotated[
        Literal["link", "copy", "embed"] | None,
        typer.Option(
            help="Link to the ONNX model's data files, copy the weights beside the new file, or "
            "embed them. Default: link within one folder; else embed up to 1.8 GB, copy above.",
            show_default=False,
        ),
    ] = None,
    check: Annotated[
        Literal["auto", "structure", "run"],
        typer.Option(
            help="Of the written file: compare its structure with the ONNX model's, or also run "
            "it; auto runs exact conversions up to 1.8 GB."
        ),
    ] = "auto",
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
        Literal["int8", "fp8"] | None,
        typer.Option(
            help="Eight bits for what reads a DyT; --max-error covers it.", show_default=False
        ),
    ] = None,
    runtime: Annotated[
        Literal["any", "onnxruntime", "openvino", "tensorrt"],
        typer.Option("--for", help="Who the .onnx file is for."),
    ] = "any",
    frontier: Annotated[
        bool, typer.Option("--frontier", help="Also measure the error against converted sites.")
    ] = False,
    trust: Trust = False,
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
    if calibration is not None and (data is None or mode == "exact"):
        raise OptionError("--calibration needs --data: mode exact fits nothing")
    if calibration is not None:
        check_writable(calibration)
    for path in report or ():
        check_target(path)
    counted = load_metric(metric)
    source = load_model(model)
    with reporting(TerminalReporter(console(stderr=True))):
        result = compiler.convert(
            source.model,
            None if data is None else load_data(data, batch_size),
            mode=mode,
            budget=max_error,
            metric=counted,
            output=output,
            example=source.example,
            exclude=tuple(exclude or ()),
            seed=seed,
            provider=provider,
            fold=fold,
            fit=fit,
            affine=affine,
            frontier=frontier,
            calibration=fits,
            quantize=quantize,
            runtime=runtime,
            trust=trust,
        )
        written, told = write_model(
            result,
            out,
            opset=opset,
            dtype=dtype,
            fuse=fuse,
            provider=provider,
            weights=weights,
            check=check,
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
