"""ONNX Runtime in a process of its own, where a foreign file is loaded first: if that ends the
process, it is not the user's.

One such process serves all files; it is started with the first and ends with ours.
"""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

from .errors import CaptureError

__all__ = ["try_out"]

WORKER = """
import json, sys
import onnxruntime
for line in sys.stdin:
    path, providers = json.loads(line)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    try:
        onnxruntime.InferenceSession(path, options, providers=providers)
    except Exception:
        pass
    print(flush=True)
"""
"""What ONNX Runtime refuses is told where it is loaded again, in our own process."""


@lru_cache(maxsize=1)
def _worker(process: int) -> subprocess.Popen[str]:
    """process: that it belongs to; one that forks gets another."""
    return subprocess.Popen(
        [sys.executable, "-c", WORKER],
        cwd=Path(__file__).parents[1],  # Python imports from there first: never beside a model
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
    )  # fmt: skip


def try_out(path: Path, providers: Sequence[str], outline: Path | None = None) -> None:
    """Load an ONNX file in ONNX Runtime, in the other process.

    outline: what is loaded in its place, the same graph without its weights. Raises CaptureError
    where that process ends. An error of ONNX Runtime is none here.
    """
    if importlib.util.find_spec("onnxruntime") is None:
        return  # which is told where it is needed
    worker = _worker(os.getpid())
    if worker.stdin is None or worker.stdout is None:
        raise CaptureError("the process of ONNX Runtime has no pipes")
    try:
        worker.stdin.write(json.dumps([str((outline or path).absolute()), list(providers)]) + "\n")
        worker.stdin.flush()
        answered = bool(worker.stdout.readline())
    except BrokenPipeError:
        answered = False
    if not answered:
        _worker.cache_clear()
        raise CaptureError(f"{str(path)!r} ends ONNX Runtime when it is loaded: {_ended(worker)}")


def _ended(worker: subprocess.Popen[str]) -> str:
    status = worker.wait()
    return signal.Signals(-status).name if status < 0 else f"status {status}"
