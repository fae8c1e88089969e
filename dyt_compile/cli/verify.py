"""dyt-compile verify: how far one model is from another."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .. import compiler
from ..errors import OptionError, VerificationError
from ..metrics import described, named
from ..progress import reporting
from .options import DATA_HELP, BatchSize, MetricName, Model, ProviderName, Trust, Verbose
from .progress import TerminalReporter, console
from .sources import load_data, load_metric, load_model

__all__ = ["verify"]


def verify(
    a: Model,
    b: Model,
    data: Annotated[
        str | None,
        typer.Option(help=f"{DATA_HELP} Without it two .onnx files are compared by structure."),
    ] = None,
    max_error: Annotated[float, typer.Option(help="The largest error that passes.")] = 1e-4,
    metric: MetricName = "relative",
    output: Annotated[
        str | None, typer.Option(help="The output to compare; default: the first float one.")
    ] = None,
    batch_size: BatchSize = 32,
    provider: ProviderName = "cpu",
    weights: Annotated[
        bool,
        typer.Option(
            "--weights", help="Without --data: also read and compare weights in different files."
        ),
    ] = False,
    trust: Trust = False,
    verbose: Verbose = False,
) -> None:
    """Run A and B on the same data and compare; exit status 1 when the error is too large.

    Without data nothing is run: of two .onnx files B must be A, node by node, but for nodes that
    are proved to compute DyT.
    """
    counted = load_metric(metric)
    first, second = load_model(a), load_model(b)
    if data is None:
        for text, source in ((a, first), (b, second)):
            if not isinstance(source.model, Path) or source.model.suffix != ".onnx":
                raise OptionError(
                    f"{text} is no .onnx file: without --data only those are compared"
                )
    with reporting(TerminalReporter(console(stderr=True))):
        if data is None:
            structure = compiler.compare_structure(first.model, second.model, read=weights)
            console().print(f"same structure: {structure.told()}", highlight=False)
            return
        measured = compiler.compare(
            first.model,
            second.model,
            load_data(data, batch_size),
            metric=counted,
            output=output,
            examples=(first.example, second.example),
            provider=provider,
            trust=trust,
        )
    line = (
        f"{described(named(counted))} {measured.error:.4g} ± {measured.standard_error:.1g} "
        f"on {measured.samples} samples"
    )
    if not measured.error <= max_error:
        raise VerificationError(f"{line}, above {max_error:g}")
    console().print(f"{line}, within {max_error:g}", highlight=False)
