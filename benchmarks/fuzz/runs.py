"""Many cases in a process of their own, which is started anew where one ends it or hangs."""

from __future__ import annotations

import json
import os
import resource
import select
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .cases import case
from .judge import FaultError, judged

__all__ = ["HANG_SECONDS", "Tally", "run"]

HANG_SECONDS = 10.0
"""Of processor time: other work on the machine has no part in it."""

MEMORY_BYTES = 6 << 30
"""Of address space, for a worker."""

TICKS = os.sysconf("SC_CLK_TCK")


@dataclass
class Tally:
    """Of one kind: how often each came out, what was wrong, and the longest case."""

    outcomes: Counter[str] = field(default_factory=Counter)
    faults: list[tuple[int, str]] = field(default_factory=list)
    longest: tuple[float, int] = (0.0, -1)

    def add(self, number: int, outcome: str, fault: str | None, seconds: float) -> None:
        """Count one case."""
        self.outcomes[outcome] += 1
        self.longest = max(self.longest, (seconds, number))
        if fault is not None:
            self.faults.append((number, fault))


def run(kind: str, numbers: Iterable[int]) -> Iterator[tuple[int, str, str | None, float]]:
    """Number, outcome, fault and seconds of processor time of each case, in order."""
    left = list(numbers)
    while left:
        before = len(left)
        for result in _worked(kind, left):
            left.remove(result[0])
            yield result
        if len(left) == before:
            raise RuntimeError(f"a worker ended before case {left[0]} of {kind!r} began")


def _worked(kind: str, numbers: list[int]) -> Iterator[tuple[int, str, str | None, float]]:
    """The cases that one worker gets through, and the one that ends it."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read)
        try:
            _work(kind, numbers, write)
        finally:
            os._exit(0)
    os.close(write)
    try:
        yield from _watched(child, read)
    finally:
        os.close(read)
        _end(child)


def _watched(child: int, read: int) -> Iterator[tuple[int, str, str | None, float]]:
    busy, since = None, 0.0
    for line in _lines(read):
        if line is None:
            if busy is not None and _seconds(child) - since > HANG_SECONDS:
                yield busy, "hang", f"no end after {HANG_SECONDS:g} s", HANG_SECONDS
                return
            continue
        told = json.loads(line)
        if told["what"] == "start":
            busy, since = told["number"], _seconds(child)
        else:
            yield told["number"], told["outcome"], told["fault"], told["seconds"]
            busy = None
    if busy is not None:
        yield busy, "crash", f"the process ended: {_ended(child)}", 0.0


def _lines(read: int) -> Iterator[bytes | None]:
    """What a worker says, to its end; None for every second in which it says nothing."""
    rest = b""
    while True:
        if not select.select([read], [], [], 1.0)[0]:
            yield None
            continue
        piece = os.read(read, 1 << 16)
        if not piece:
            return
        *whole, rest = (rest + piece).split(b"\n")
        yield from whole


def _work(kind: str, numbers: list[int], write: int) -> None:
    """The worker: a line before and a line behind every case."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
    with tempfile.TemporaryDirectory(prefix="fuzz-") as name, open(write, "w") as lines:

        def tell(**told: Any) -> None:
            lines.write(json.dumps(told) + "\n")
            lines.flush()

        case(kind, 0)  # what is made once is made before any clock runs
        for number in numbers:
            made = case(kind, number)
            tell(what="start", number=number)
            start, fault = time.process_time(), None
            try:
                outcome = judged(made, Path(name) / "case")
            except FaultError as error:
                outcome, fault = "fault", str(error)
            tell(
                what="done", number=number, outcome=outcome, fault=fault,
                seconds=time.process_time() - start,
            )  # fmt: skip


def _seconds(child: int) -> float:
    """Processor time that a process has taken."""
    fields = Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


def _ended(child: int) -> str:
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return f"signal {signal.Signals(-status).name}" if status < 0 else f"status {status}"


def _end(child: int) -> None:
    try:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    except (ProcessLookupError, ChildProcessError):
        return  # it has ended, and was waited for
