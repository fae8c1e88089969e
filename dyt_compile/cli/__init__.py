"""dyt-compile: one thin command a verb, over the public API."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Sequence

import typer

from ..errors import MemoryExhaustedError, OptionError, out_of_memory, printable
from ..ranks import Ranks, joined
from . import bench, build, calibrate, convert, inspect, plugin, recover, verify

__all__ = ["app", "main"]

app = typer.Typer(
    help="Find the norms of a transformer, replace them by Dynamic Tanh, and say what that costs.",
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command("inspect")(inspect.inspect)
app.command("convert")(convert.convert)
app.command("calibrate")(calibrate.calibrate)
app.command("recover")(recover.recover)
app.command("verify")(verify.verify)
app.command("build")(build.build)
app.command("bench-gpu")(bench.bench_gpu)
app.add_typer(plugin.app, name="plugin")


SIDE_BY_SIDE = ("calibrate", "recover")
"""Commands of which torchrun may start several processes."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command; every error is one line `Name: message` and exit status 1."""
    given = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    try:
        with joined() as ranks:
            _check_alone(given[0], ranks)
            status = app(given, standalone_mode=False)
    except (KeyboardInterrupt, typer.Abort):
        sys.exit(130)
    except Exception as error:  # noqa: BLE001 - a user sees one line, and all of it with --verbose
        if "--verbose" in given:
            traceback.print_exc()
        exhausted = out_of_memory(error)
        if exhausted is not None:
            error = MemoryExhaustedError(exhausted)
        # Errors of the command line know best how to tell what is missing.
        message = error.format_message() if hasattr(error, "format_message") else str(error)
        message = message or "a command is missing; --help tells which there are"
        sys.stderr.write(f"{type(error).__name__}: {printable(' '.join(message.split()))}\n")
        sys.exit(1)
    sys.exit(status if isinstance(status, int) else 0)


def _check_alone(command: str, ranks: Ranks) -> None:
    if ranks.size > 1 and command not in SIDE_BY_SIDE:
        raise OptionError(
            f"{command} under torchrun with {ranks.size} processes; allowed: "
            f"{', '.join(SIDE_BY_SIDE)}; run all else in one"
        )
