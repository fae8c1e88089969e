"""Folders in which commands are disturbed, and what is found there afterwards."""

from __future__ import annotations

import getpass
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from .killing import Blow, End, Started, run, started
from .subjects import prepare, state

__all__ = ["Place", "found_at", "one_line"]

WORKER = "tensorrt_worker"
WORKER_SECONDS = 20.0
"""So long after its parent's death a process of TensorRT may still be there."""

FOREIGN = {"__pycache__", ".ses", f"torchinductor_{getpass.getuser()}"}
"""What Python, ONNX Runtime and torch leave among temporary files for their next run."""

ERROR = re.compile(r"[A-Z]\w*Error: \S.*")


class Place:
    """A working folder, and one for temporary files, in which a command is run."""

    def __init__(self, folder: Path) -> None:
        self.home, self.temporary, self.kept = (folder / name for name in ("home", "tmp", "kept"))
        prepare(self.home)
        self.temporary.mkdir()

    def run(self, work: Callable[[], object], blow: Blow | None = None) -> End:
        """Do the work there, in a process that the blow may end."""

        return run(self._inside(work), (self.home, self.temporary), blow)

    def started(self, work: Callable[[], object]) -> Started:
        """Begin the work there."""
        return started(self._inside(work))

    def _inside(self, work: Callable[[], object]) -> Callable[[], object]:
        def inside() -> None:
            os.chdir(self.home)
            tempfile.tempdir = os.environ["TMPDIR"] = str(self.temporary)
            work()

        return inside

    def keep(self) -> None:
        """Remember all files as they are now."""
        shutil.copytree(self.home, self.kept)

    def restore(self) -> None:
        """Write those files again; others stay."""
        for path in self.home.iterdir():
            if path.is_symlink():
                path.unlink()
        shutil.copytree(self.kept, self.home, dirs_exist_ok=True)

    def done(self, work: Callable[[], object]) -> End:
        """Do the work undisturbed."""
        end = self.run(work)
        if end.status:
            raise RuntimeError(
                f"the undisturbed run ended with {end.status}: {end.printed[-2000:]}"
            )
        return end

    def names(self) -> set[str]:
        """All files and folders that are there."""
        return {
            str(path.relative_to(folder.parent))
            for folder in (self.home, self.temporary)
            for path in folder.rglob("*")
            if not FOREIGN.intersection(path.relative_to(folder).parts)
        }

    def orphans(self) -> list[str]:
        """Commands of TensorRT's processes that work here, once they had time to end."""
        until = time.monotonic() + WORKER_SECONDS
        while True:
            found = [text for text in map(_command, _pids()) if self._ours(text)]
            if not found or time.monotonic() > until:
                return found
            time.sleep(0.1)

    def _ours(self, text: str) -> bool:
        return WORKER in text and str(self.temporary) in text


def _pids() -> list[str]:
    return [path.name for path in Path("/proc").iterdir() if path.name.isdigit()]


def _command(pid: str) -> str:
    try:
        return Path("/proc", pid, "cmdline").read_text(errors="replace")
    except OSError:
        return ""


def one_line(end: End) -> str | None:
    """The line in which a failed command says why; None where it says it in any other way."""
    lines = end.printed.splitlines()
    found = [line for line in lines if ERROR.fullmatch(line)]
    clear = end.status == 1 and len(found) == 1 and lines[-1:] == found
    return found[0] if clear and "Traceback" not in end.printed else None


def found_at(target: Path, known: Mapping[str, str]) -> str:
    """What a target is; what it should never be is told as it is."""
    try:
        return known.get(state(target), "half")
    except Exception as error:  # noqa: BLE001 - whatever it is, it is what is to be found
        return f"half: {type(error).__name__}: {error}"
