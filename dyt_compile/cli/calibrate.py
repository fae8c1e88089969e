"""dyt-compile calibrate: fit every norm and write the fitted values."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import typer

from .. import compiler
from ..calibration import Calibration
from ..files import check_writable
from ..progress import reporting
from ..ranks import current
from .options import BatchSize, Exclude, Fit, Model, ProviderName, Trust, Verbose
from .progress import TerminalReporter, console, tell_written
from .sources import load_data, load_model

__all__ = ["calibrate"]


Target = Annotated[
    Path, typer.Option("-o", "--out", help="Write .safetensors.", show_default=False)
]
DATA_HELP = "Inputs: .npz, a folder of them, or file.py:function."


def calibrate(
    model: Model,
    out: Target,
    data: Annotated[str, typer.Option(help=DATA_HELP, show_default=False)],
    activations: Annotated[
        Literal["converted", "original"],
        typer.Option(help="Of the converted model, or of the original."),
    ] = "converted",
    fit: Fit = "auto",
    keep_sums: Annotated[
        bool, typer.Option("--keep-sums", help="So that other runs can be merged with this one.")
    ] = False,
    merge: Annotated[
        list[Path] | None,
        typer.Option(help="A calibration of other data to merge in; may be repeated."),
    ] = None,
    exclude: Exclude = None,
    batch_size: BatchSize = 32,
    provider: ProviderName = "cpu",
    state: Annotated[
        Path | None,
        typer.Option(
            help="Weights of a MODEL that a function builds on the meta device: .safetensors or "
            ".safetensors.index.json.",
            show_default=False,
        ),
    ] = None,
    memory: Annotated[
        str | None,
        typer.Option(
            help="What the process may hold, as 8GB: kept, or refused beforehand.",
            show_default=False,
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the sample of rows.")] = 0,
    trust: Trust = False,
    verbose: Verbose = False,
) -> None:
    """Fit every norm of MODEL on all data; convert applies the file with --fits.

    Runs over parts of the data give the fits of all of it, where each was made on the original's
    activations with --keep-sums: --merge adds them. Under torchrun each process takes its share of
    the data: torchrun --nproc-per-node 2 -m dyt_compile calibrate …
    """
    check_writable(out)
    ranks = current()  # the first of them has the files to merge, and writes
    others = [] if ranks.number else [Calibration.load(path) for path in merge or ()]
    source = load_model(model)
    with reporting(TerminalReporter(console(stderr=True))):
        made = compiler.calibrate(
            source.model,
            load_data(data, batch_size),
            activations=activations,
            keep_sums=keep_sums or bool(merge),
            fit=fit,
            example=source.example,
            exclude=tuple(exclude or ()),
            seed=seed,
            provider=provider,
            trust=trust,
            state=state,
            memory=memory,
        )
    ranks.first(partial(_write, made, others, keep_sums, out))


def _write(made: Calibration, others: Sequence[Calibration], keep_sums: bool, out: Path) -> None:
    for other in others:
        made = made.merge(other)
    (made if keep_sums else made.without_sums()).save(out)
    able = sum(fit.parameters is not None for fit in made.fits.values())
    console().print(f"{able} of {len(made.fits)} norms have a fit", highlight=False)
    tell_written(out)
