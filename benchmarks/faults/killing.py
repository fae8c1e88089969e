"""Processes that are killed where they write: before one of their steps, at a time, within a write.

A step is what Python's audit hooks see of files below some folders: one is made, opened to be
written, renamed, removed or locked. Processes are forks of this one, which has imported everything
and started no thread, so that a run takes no longer than its work.
"""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch

__all__ = ["Blow", "End", "run", "started"]

STEPS = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "fcntl.flock"}
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
UNFORESEEN = 70
"""Exit status of a run that ended by an exception which the command line does not tell."""


@dataclass(frozen=True)
class Blow:
    """When a run ends: before a step, after some seconds (both by SIGKILL), or by the kernel within
    a write (SIGXFSZ), at a byte of whatever file becomes so long."""

    step: int | None = None
    after: float | None = None
    cut: int | None = None


@dataclass(frozen=True)
class End:
    """How a run ended. status: as it exits, or a signal below 0; steps: what it did to files."""

    status: int
    seconds: float
    printed: str
    steps: tuple[str, ...]


@dataclass(frozen=True)
class Started:
    """A run that goes on."""

    pid: int
    since: float
    printed: BinaryIO
    noted: BinaryIO

    def end(self) -> End:
        """Wait for it."""
        _, status = os.waitpid(self.pid, 0)
        seconds = time.perf_counter() - self.since
        texts = []
        for file in (self.printed, self.noted):
            file.seek(0)
            texts.append(file.read().decode(errors="replace"))
            file.close()
        return End(
            os.waitstatus_to_exitcode(status), seconds, texts[0], tuple(texts[1].splitlines())
        )


def run(work: Callable[[], object], watched: Sequence[Path], blow: Blow | None = None) -> End:
    """Do the work in a process of its own, which the blow may end before it is done."""
    running = started(work, watched, blow)
    if blow is not None and blow.after is not None:
        time.sleep(blow.after)
        os.kill(running.pid, signal.SIGKILL)  # it is not yet waited for, so the number is its own
    return running.end()


def started(
    work: Callable[[], object], watched: Sequence[Path] = (), blow: Blow | None = None
) -> Started:
    """Begin the work in a process of its own."""
    printed, noted = tempfile.TemporaryFile(), tempfile.TemporaryFile()  # noqa: SIM115 - `end`
    sys.stdout.flush()
    sys.stderr.flush()
    since = time.perf_counter()
    pid = os.fork()
    if pid:
        return Started(pid, since, printed, noted)
    status = UNFORESEEN
    try:
        for descriptor in (1, 2):
            os.dup2(printed.fileno(), descriptor)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        torch.set_num_threads(1)  # the parent's pool is gone, which ends threads of autograd
        sys.addaudithook(_Steps(watched, noted.fileno(), blow))
        work()
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:  # noqa: BLE001 - the parent tells of it
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)


class _Steps:
    """Counts the steps of this process, and kills it before one of them."""

    def __init__(self, watched: Sequence[Path], noted: int, blow: Blow | None) -> None:
        self._watched = tuple(map(os.path.realpath, watched))
        self._noted = noted
        self._left = None if blow is None else blow.step
        if blow is not None and blow.cut is not None:
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
            resource.setrlimit(resource.RLIMIT_FSIZE, (blow.cut, blow.cut))

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event not in STEPS or not self._counts(event, arguments):
            return
        os.write(self._noted, f"{event}\n".encode())
        if self._left is not None:
            self._left -= 1
            if self._left < 0:
                os.kill(os.getpid(), signal.SIGKILL)

    def _counts(self, event: str, arguments: tuple[Any, ...]) -> bool:
        if event == "fcntl.flock":
            return True
        if event == "open" and not arguments[2] & WRITING:
            return False
        path = arguments[0]
        if not isinstance(path, (str, os.PathLike)):
            return False
        return os.path.realpath(path).startswith(self._watched)
