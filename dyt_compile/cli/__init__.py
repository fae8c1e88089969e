"""dyt-compile: one thin command a verb, over the public API."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Sequence

import click
import typer

from ..errors import DytCompileError
from . import convert, inspect, verify

__all__ = ["app", "main"]

app = typer.Typer(
    help="Find the norms of a transformer, replace them by Dynamic Tanh, and say what that costs.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command("inspect")(inspect.inspect)
app.command("convert")(convert.convert)
app.command("verify")(verify.verify)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command; every error is one line `Name: message` and exit status 1."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        status = app(given, standalone_mode=False)
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        sys.exit(0)
    except (DytCompileError, click.ClickException) as error:
        message = error.format_message() if isinstance(error, click.ClickException) else str(error)
        _fail(type(error).__name__, message, verbose="--verbose" in given)
    except (KeyboardInterrupt, click.Abort):
        sys.exit(130)
    except Exception as error:  # noqa: BLE001 - a user sees one line; --verbose shows the rest
        _fail(type(error).__name__, str(error), verbose="--verbose" in given)
    else:
        sys.exit(status if isinstance(status, int) else 0)


def _fail(name: str, message: str, *, verbose: bool) -> None:
    if verbose:
        traceback.print_exc()
    line = " ".join(message.split())
    sys.stderr.write(f"{name}: {line}\n")
    sys.exit(1)
