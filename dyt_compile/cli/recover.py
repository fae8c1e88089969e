"""dyt-compile recover: convert every norm, and let the model learn back what that cost."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import typer

from .. import compiler
from ..compiler import Conversion
from ..errors import OptionError
from ..files import check_writable
from ..progress import reporting
from ..ranks import current
from ..recovery import recover as recover_conversion
from ..report.terminal import report_table
from ..report.writing import check_target, write_report
from .options import BatchSize, Exclude, Fit, Model, OutputName, Reports, Trust, Verbose
from .progress import TerminalReporter, console, tell_written
from .sources import load_data, load_model
from .writing import check_out, write_model

__all__ = ["recover"]


Target = Annotated[
    Path,
    typer.Option("-o", "--out", help="Write .onnx, .pt2 or .safetensors.", show_default=False),
]
DATA_HELP = "Inputs without labels: .npz, a folder of them, or file.py:function."


def recover(
    model: Model,
    out: Target,
    data: Annotated[str, typer.Option(help=DATA_HELP, show_default=False)],
    minutes: Annotated[float, typer.Option(help="Of training, in wall time.")] = 10.0,
    steps: Annotated[
        int | None, typer.Option(help="Steps instead of minutes: a run to repeat.")
    ] = None,
    train: Annotated[
        Literal["all", "dyt"], typer.Option(help="All weights, or alpha, gamma, beta.")
    ] = "all",
    staged: Annotated[
        bool, typer.Option("--staged", help="Convert a few sites at a time, easy ones first.")
    ] = False,
    metric: Annotated[
        Literal["relative", "cosine", "kl", "top1"], typer.Option(help="What the error counts.")
    ] = "relative",
    output: OutputName = None,
    exclude: Exclude = None,
    fit: Fit = "auto",
    batch_size: BatchSize = 32,
    seed: Annotated[int, typer.Option(help="Of the split of the data and its order.")] = 0,
    checkpoint: Annotated[
        Path | None,
        typer.Option(help="Goes on from it; default: OUT.checkpoint, removed at the end."),
    ] = None,
    sharded: Annotated[
        bool,
        typer.Option("--sharded", help="Under torchrun: each process holds a part of the weights."),
    ] = False,
    report: Reports = None,
    trust: Trust = False,
    verbose: Verbose = False,
) -> None:
    """Replace every norm of MODEL by Dynamic Tanh, then train the result to agree with MODEL.

    A killed run goes on from its last checkpoint when the command is given again. Under torchrun
    the processes share the work: torchrun --nproc-per-node 2 -m dyt_compile recover …
    """
    check_out(out)
    for path in report or ():
        check_target(path)
    source = load_model(model)
    if isinstance(source.model, Path) and source.model.suffix == ".onnx":
        raise OptionError(
            f"MODEL is {model!r}, an ONNX file, which has no gradients: recover needs the torch "
            "model; for ONNX files there are the closed-form fits of dyt-compile convert"
        )
    kept = out.with_name(f"{out.name}.checkpoint") if checkpoint is None else checkpoint
    check_writable(kept)
    batches = load_data(data, batch_size)
    with reporting(TerminalReporter(console(stderr=True))):
        converted = compiler.convert(
            source.model,
            batches,
            mode="all",
            metric=metric,
            output=output,
            example=source.example,
            exclude=tuple(exclude or ()),
            fit=fit,
            seed=seed,
            trust=trust,
        )
        result = recover_conversion(
            converted,
            batches,
            minutes=minutes,
            steps=steps,
            train=train,
            staged=staged,
            checkpoint=kept,
            seed=seed,
            sharded=sharded,
        )
        passing = kept if checkpoint is None else None
        current().first(partial(_write, result, out, report or (), passing))


def _write(result: Conversion, out: Path, reports: Sequence[Path], checkpoint: Path | None) -> None:
    """Write and tell everything; checkpoint: one that goes then."""
    exported, told = write_model(result, out)
    if checkpoint is not None:
        checkpoint.unlink(missing_ok=True)
    console().print(report_table(result.report))
    console().print(told, soft_wrap=True, highlight=False)
    for path in reports:
        tell_written(write_report(result.report, path, exported=exported))
