"""Arguments and options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

__all__ = [
    "BatchSize", "Data", "Exclude", "Fit", "MetricName", "Model", "OutputName", "ProviderName",
    "Reports", "Trust", "Verbose",
]  # fmt: skip

MODEL_HELP = (
    "An .onnx file, a .pt2 file, a Hugging Face folder, file.py:function or "
    "package.module:function."
)
DATA_HELP = "An .npz file, a folder of them, or file.py:function yielding tuples or dicts."


Model = Annotated[str, typer.Argument(metavar="MODEL", help=MODEL_HELP, show_default=False)]
Data = Annotated[str | None, typer.Option(help=DATA_HELP, show_default=False)]
OutputName = Annotated[
    str | None, typer.Option(help="The output to measure; default: the first float one.")
]
METRIC_HELP = (
    "What the error counts: relative, cosine, kl, top1, or file.py:function, your own score of "
    "each sample (higher is better)."
)
MetricName = Annotated[str, typer.Option(help=METRIC_HELP)]
Exclude = Annotated[
    list[str] | None, typer.Option(help="Keep sites whose name matches this REGEX.")
]
Fit = Annotated[
    Literal["auto", "diagonal", "full"],
    typer.Option(help="One value a channel, or a matrix that the weights behind take up."),
]
BatchSize = Annotated[int, typer.Option(help="Samples a batch, for an .npz file.")]
ProviderName = Annotated[
    str,
    typer.Option(
        help="Where ONNX Runtime computes: cpu, cuda, tensorrt, or tensorrt:LIBRARY of plugins."
    ),
]
Verbose = Annotated[bool, typer.Option("--verbose", help="Show the traceback of an error.")]
Trust = Annotated[
    bool,
    typer.Option(
        "--trust", help="Open a .pt2 file whatever it may run: you know where it is from."
    ),
]
JsonPath = Annotated[Path | None, typer.Option("--json", help="Write JSON.", show_default=False)]
Reports = Annotated[
    list[Path] | None,
    typer.Option(
        help="Write the report: one page (.html) or JSON (.json); may be repeated.",
        show_default=False,
    ),
]
