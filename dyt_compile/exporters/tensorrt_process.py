"""The parent's side of TensorRT: which one, its libraries, and a process for every call of it."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..dyt import DOMAIN
from ..errors import ExportError, MissingDependencyError, OptionError
from ..files import DISK_FULL, work_folder

__all__ = ["RUNTIMES", "Runtime", "call", "installed"]

WORKER = "dyt_compile.exporters.tensorrt_worker"


@dataclass(frozen=True)
class Runtime:
    """One of NVIDIA's two: its name, its package, that of its libraries, and how it is told of.

    library: what an engine needs at run time, without its version; program: what loads one on the
    command line; extra: of this package; portable: the compute capabilities that it builds for if
    it is told none, "" where it builds for this machine's GPU alone.
    """

    name: str
    title: str
    module: str
    library: str
    program: str
    extra: str
    portable: str

    @property
    def libraries(self) -> Path | None:
        """The folder of the libraries that the package brought, None where they lie elsewhere."""
        spec = importlib.util.find_spec(f"{self.module}_libs")
        return None if spec is None or spec.origin is None else Path(spec.origin).parent


RUNTIMES = {
    runtime.name: runtime
    for runtime in (
        Runtime("tensorrt", "TensorRT", "tensorrt", "libnvinfer.so", "trtexec", "gpu", ""),
        Runtime(
            "tensorrt-rtx", "TensorRT-RTX", "tensorrt_rtx", "libtensorrt_rtx.so", "tensorrt_rtx",
            "rtx", "sm80+",
        ),
    )
}  # fmt: skip


def installed(name: str) -> Runtime:
    """The runtime of that name. Raises OptionError, MissingDependencyError."""
    if name not in RUNTIMES:
        raise OptionError(f"runtime is {name!r}; allowed: {', '.join(RUNTIMES)}")
    runtime = RUNTIMES[name]
    if importlib.util.find_spec(runtime.module) is None:
        raise MissingDependencyError(runtime.module, runtime.extra)
    return runtime


def call(runtime: Runtime, what: str, request: Mapping[str, Any]) -> dict[str, Any]:
    """What the worker answers to a request, whose paths are absolute; `what` names the work.

    Raises ExportError with what TensorRT refused, or how its process ended.
    """
    with work_folder() as folder, _held_pipe() as pipe:
        asked, answered = folder / "request.json", folder / "result.json"
        asked.write_text(json.dumps({**request, "runtime": runtime.name}), encoding="utf-8")
        done = subprocess.run(
            [sys.executable, "-m", WORKER, str(asked), str(answered)],
            cwd=folder,  # Python imports from there first: never from where a model lies
            env=_environment(runtime, folder, os.environ),
            stdin=pipe, capture_output=True, text=True, errors="replace", check=False,
        )  # fmt: skip
        if done.returncode in DISK_FULL:
            raise ExportError(f"cannot write, while {what}: {os.strerror(done.returncode)}")
        if not answered.exists():
            raise ExportError(f"{runtime.title} ended while {what}: {_last_words(done)}")
        result: dict[str, Any] = json.loads(answered.read_text(encoding="utf-8"))
    if "error" in result:
        # Our plugins say there what TensorRT only knows as a return code.
        told = [line for line in done.stderr.splitlines() if line.startswith(f"{DOMAIN}::")]
        raise ExportError("; ".join([f"{runtime.title}, {what}: {result['error']}", *told]))
    return result


@contextmanager
def _held_pipe() -> Iterator[int]:
    """A pipe to read from, which ends when this process does."""
    reading, writing = os.pipe()
    try:
        yield reading
    finally:
        os.close(reading)
        os.close(writing)


def _environment(runtime: Runtime, folder: Path, environment: Mapping[str, str]) -> dict[str, str]:
    """The environment of the worker, in which libraries are found without their version too.

    At the first plugin node the parser opens its library so, and ends the process if it is missing.
    """
    libraries = runtime.libraries
    for library in () if libraries is None else sorted(libraries.glob("lib*.so.*")):
        link = folder / f"{library.name.partition('.so.')[0]}.so"
        if not link.is_symlink():
            link.symlink_to(library)
    package = Path(__file__).parents[2]
    return {
        **environment,
        "LD_LIBRARY_PATH": _joined(folder, environment.get("LD_LIBRARY_PATH")),
        "PYTHONPATH": _joined(package, environment.get("PYTHONPATH")),
    }


def _joined(first: Path, rest: str | None) -> str:
    return os.pathsep.join(filter(None, [str(first), rest]))


def _last_words(done: subprocess.CompletedProcess[str]) -> str:
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    ended = f"signal {-done.returncode}" if done.returncode < 0 else f"status {done.returncode}"
    return f"{ended}, {lines[-1].strip()}" if lines else ended
