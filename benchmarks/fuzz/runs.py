"""Many cases in a process of their own, which is started anew where one ends it or hangs."""

from __future__ import annotations

import faulthandler
import json
import os
import re
import resource
import select
import signal
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from .cases import Case
from .judge import FaultError, judged

__all__ = ["HANG_SECONDS", "Result", "run"]

HANG_SECONDS = 10.0
"""Of processor time: other work on the machine has no part in it."""

MEMORY_BYTES = 6 << 30
"""Of address space, for a worker."""

STACK = "stack.txt"
RUNNING = re.compile(r'dyt_compile/runtime\.py", line \d+ in run$')

TICKS = os.sysconf("SC_CLK_TCK")

Make = Callable[[int], Case]


@dataclass(frozen=True)
class Result:
    """What became of one case: "taken", the name of the error that refused it, or what is wrong.

    outcome: "crash", "hang" and "fault" are wrong; "endless" is a model whose own loop goes on, in
    ONNX Runtime. message: of the error. seconds: of processor time.
    """

    number: int
    outcome: str
    message: str = ""
    seconds: float = 0.0

    @property
    def wrong(self) -> bool:
        """Whether this must not be."""
        return self.outcome in ("crash", "fault", "hang")


def run(make: Make, numbers: Iterable[int]) -> Iterator[Result]:
    """The result of each case, in order; make: gives the case of a number."""
    left = list(numbers)
    while left:
        before = len(left)
        for result in _worked(make, left):
            left.remove(result.number)
            yield result
        if len(left) == before:
            raise RuntimeError(f"a worker ended before case {left[0]} began")


def _worked(make: Make, numbers: list[int]) -> Iterator[Result]:
    """The cases that one worker gets through, and the one that ends it."""
    with tempfile.TemporaryDirectory(prefix="fuzz-") as name:
        folder = Path(name)
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(read)
            try:
                _work(make, numbers, folder, write)
            finally:
                os._exit(0)
        os.close(write)
        try:
            yield from _watched(child, read, folder / STACK)
        finally:
            os.close(read)
            _end(child)


def _watched(child: int, read: int, stack: Path) -> Iterator[Result]:
    busy, since = None, 0.0
    for line in _lines(read):
        if line is None:
            if busy is not None and _seconds(child) - since > HANG_SECONDS:
                yield _hung(busy, _stack(child, stack))
                return
            continue
        told = json.loads(line)
        if isinstance(told, int):
            busy, since = told, _seconds(child)
        else:
            yield Result(**told)
            busy = None
    if busy is not None:
        yield Result(busy, "crash", f"the process ended: {_ended(child)}")


def _hung(number: int, stack: str) -> Result:
    """A case without an end; within ONNX Runtime's run, it is the model that has none.

    stack: as faulthandler writes it, the innermost call first.
    """
    calls = stack.splitlines()[1:]
    inside = next((call for call in calls if "onnxruntime" not in call), "")
    outcome = "endless" if RUNNING.search(inside) and inside != calls[0] else "hang"
    where = re.sub(r'File "[^"]*/', 'File "', inside.strip())
    return Result(number, outcome, f"no end after {HANG_SECONDS:g} s: {where}", HANG_SECONDS)


def _stack(child: int, path: Path) -> str:
    """The calls in which a worker is, whatever it does."""
    os.kill(child, signal.SIGUSR1)
    time.sleep(1.0)
    return path.read_text(encoding="utf-8")


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


def _work(make: Make, numbers: list[int], folder: Path, write: int) -> None:
    """The worker: a line with its number before every case, and its result behind it."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
    with (folder / STACK).open("w") as stack, open(write, "w") as lines:
        faulthandler.register(signal.SIGUSR1, file=stack, all_threads=False)
        make(numbers[0])  # what is made once is made before any clock runs
        for number in numbers:
            case = make(number)
            lines.write(f"{number}\n")
            lines.flush()
            start = time.process_time()
            try:
                told = judged(case, folder / "case")
            except FaultError as error:
                told = "fault", str(error)
            result = Result(number, *told, time.process_time() - start)
            lines.write(json.dumps(asdict(result)) + "\n")
            lines.flush()


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
