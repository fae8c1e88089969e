"""One way, once, in this process: prints its seconds, its peak memory and its count as JSON.

Imports no torch, whose pages would be counted in the peak.
"""

from __future__ import annotations

import json
import resource
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from .peers import PEERS

__all__ = ["one", "peak_bytes"]


def one(arguments: Sequence[str]) -> None:
    """Do one thing in this process, and print what it took."""
    start, cpu = time.perf_counter(), time.process_time()
    count = None
    if arguments[0] == "command":
        from dyt_compile.cli import app

        app(list(arguments[1:]), standalone_mode=False)
    else:
        source = Path(arguments[1])
        with tempfile.TemporaryDirectory(dir=source.parent) as folder:
            count = PEERS[arguments[0]].run(source, Path(folder) / "out.onnx")
    measured = {
        "seconds": round(time.perf_counter() - start, 2),
        "cpu_seconds": round(time.process_time() - cpu, 2),
        "peak_bytes": peak_bytes(),
        "norms": count,
    }
    print(json.dumps(measured))


def peak_bytes() -> int:
    """The most memory that this process held, mapped pages of files among it."""
    status = Path("/proc/self/status")
    if status.exists():
        line = next(x for x in status.read_text().splitlines() if x.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    one(sys.argv[1:])
