"""One case: what dyt-compile made of it, and whether that is as it should be."""

from __future__ import annotations

import contextlib
import io
import os
import re
import shutil
from pathlib import Path

import typer

from dyt_compile import cli, errors

from .cases import Case

__all__ = ["FaultError", "judged"]


def _below(kind: type) -> set[str]:
    """Names of a class and all that derive from it."""
    return {kind.__name__}.union(*map(_below, kind.__subclasses__()))


USAGE = next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException")

OWN = _below(errors.DytCompileError) | _below(USAGE)
"""Names of the errors that a user may meet."""

cli.app = typer.main.get_command(cli.app)  # type: ignore[assignment] # once, not for every case

LINE = re.compile(r"(\w+): \S[^\n]*\n\Z")


class FaultError(Exception):
    """What must not be."""


def judged(case: Case, folder: Path) -> tuple[str, str]:
    """ "taken", or the name of the error with which the case was refused; and its message.

    folder: is emptied, and gets the case's files. Raises FaultError.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for name, data in case.files.items():
        (folder / name).write_bytes(data)
    told, said = io.StringIO(), io.StringIO()
    before = Path.cwd()
    os.chdir(folder)
    try:
        with contextlib.redirect_stdout(told), contextlib.redirect_stderr(said):
            status = _status(case)
    finally:
        os.chdir(before)
    left = {path.name for path in folder.iterdir()} - set(case.files)
    if "HACKED" in left:
        raise FaultError("code of the file was run")
    if "Traceback" in said.getvalue():
        raise FaultError("a traceback")
    if status == 0:
        return "taken", ""
    line = LINE.search(said.getvalue())
    if status != 1 or line is None:
        raise FaultError(f"status {status}, and said {said.getvalue()[-200:]!r}")
    if line[1] not in OWN:
        raise FaultError(f"said {line[0].strip()[:300]!r}, which is none of our errors")
    if left:
        raise FaultError(f"refused with {line[1]}, and left {sorted(left)}")
    return line[1], line[0].partition(": ")[2].strip()


def _status(case: Case) -> int:
    try:
        cli.main(list(case.arguments))
    except SystemExit as ended:
        return ended.code if isinstance(ended.code, int) else 1
    return 0
