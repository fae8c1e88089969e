"""Input that is cut short, too little memory, and packages that are missing or too old."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from .kills import Found
from .places import Place, one_line
from .subjects import WIDTH, command

__all__ = ["cut_input", "lack_memory", "lack_packages"]

Row = dict[str, Any]

SHARES = (0.0, 0.01, 0.3, 0.6, 0.9, 0.999)
"""What is left of an input."""

CUT = (
    ("beside.data", "external data", ("convert", "beside.onnx", "-o", "new.onnx")),
    ("model.onnx", "a model", ("convert", "model.onnx", "-o", "new.onnx")),
    ("data.npz", "samples", ("convert", "model.onnx", "--data", "data.npz", "-o", "new.onnx")),
    (
        "fits.safetensors", "a calibration",
        ("convert", "model.onnx", "--fits", "fits.safetensors", "-o", "new.onnx"),
    ),
    ("out.pt2", "a program", ("convert", "out.pt2", "-o", "new.onnx")),
    (
        "new.onnx.checkpoint", "a checkpoint",
        ("recover", "network.py:load", "--data", "network.py:batches", "--steps", "10",
         "-o", "new.onnx"),
    ),
)  # fmt: skip


def cut_input(folder: Path) -> Iterator[Found]:
    """Commands whose input ends too early, as one that is still being copied does."""
    place = Place(folder / "input")
    place.done(command("calibrate", "model.onnx", "--data", "data.npz", "-o", "fits.safetensors"))
    place.done(
        command("convert", "network.py:load", "--data", "network.py:batches", "-o", "out.pt2")
    )
    (place.home / "new.onnx.checkpoint").write_bytes((place.home / "fits.safetensors").read_bytes())
    for name, what, arguments in CUT:
        row: Row = {"what": f"{what} cut short", "tried": 0, "ended": Counter(), "told": []}
        path = place.home / name
        whole = path.read_bytes()
        for share in SHARES:
            path.write_bytes(whole[: int(len(whole) * share)])
            before = place.names()
            end = place.run(command(*arguments))
            line = one_line(end)
            refused = line is not None and place.names() == before
            row["tried"] += 1
            row["ended"]["refused, nothing written" if refused else f"{end.printed[-300:]}"] += 1
            row["told"] = [line]
        path.write_bytes(whole)
        yield row["what"], {**row, "ended": dict(row["ended"])}


CHECKPOINT = ".checkpoint"
"""What `recover` leaves on purpose: with more memory it goes on from there."""

MANY = 200_000
"""Samples in one batch, whose activations take 51 MB each."""

SOME = (
    ("convert", "model.onnx", "--data", "many.npz", "--mode", "all", "-o", "new.onnx"),
    ("calibrate", "model.onnx", "--data", "many.npz", "-o", "new.safetensors"),
    ("convert", "network.py:load", "--data", "many3.npz", "--mode", "all", "-o", "new.safetensors"),
    ("recover", "network.py:load", "--data", "many3.npz", "--steps", "3", "-o", "new.safetensors"),
)

MEGABYTES = (8, 32, 64, 100, 200, 400, 800, 1600, 3200)
"""Of address space, on top of what a process has that has done nothing yet."""


def lack_memory(folder: Path) -> Iterator[Found]:
    """Commands in less and less memory: done, or one line that says so."""
    place = Place(folder / "memory")
    random = np.random.default_rng(0)
    np.savez(place.home / "many.npz", x=random.normal(size=(MANY, WIDTH)).astype(np.float32))
    many = random.normal(size=(MANY // 3, 3, WIDTH)).astype(np.float32)
    np.savez(place.home / "many3.npz", input=many)
    for arguments in SOME:
        row: Row = {
            "what": f"too little memory: {' '.join(arguments[:2])}", "tried": 0,
            "ended": Counter(), "told": [],
        }  # fmt: skip
        names = place.names()
        for megabytes in MEGABYTES:
            work = command(*arguments, "--batch-size", str(MANY))
            end = place.run(partial(_limited, work, megabytes << 20))
            line = one_line(end)
            row["tried"] += 1
            if end.status == 0:
                row["ended"]["done"] += 1
                (place.home / arguments[-1]).unlink()
            elif line is not None and line.startswith("MemoryExhaustedError"):
                left = {name for name in place.names() - names if not name.endswith(CHECKPOINT)}
                clean = not left and names <= place.names()
                row["ended"]["told in one line" if clean else "files left"] += 1
                row["told"] = [line]
            else:
                row["ended"][f"{end.status} at {megabytes} MB: {end.printed[-300:]}"] += 1
            for path in place.home.glob(f"*{CHECKPOINT}"):
                path.unlink()
        yield row["what"], {**row, "ended": dict(row["ended"])}


def _limited(work: Callable[[], object], more_bytes: int) -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * os.sysconf("SC_PAGE_SIZE") + more_bytes
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    work()


ONNX = ("convert", "model.onnx", "--data", "data.npz", "--mode", "all", "-o", "new.onnx")
TORCH = ("convert", "network.py:load", "--data", "network.py:batches", "-o", "new.onnx")
ENGINE = ("build", "model.onnx", "-o", "new.plan", "--optShapes", f"x:8x{WIDTH}")

LACKING = (
    ("no ONNX Runtime", ["onnxruntime"], ONNX, "pip install 'dyt-compile[cpu]'"),
    ("no ONNX Runtime, a torch model", ["onnxruntime"], TORCH, "pip install 'dyt-compile[cpu]'"),
    ("no TensorRT", ["tensorrt"], ENGINE, "pip install 'dyt-compile[gpu]'"),
    (
        "no TensorRT-RTX", ["tensorrt_rtx"], (*ENGINE, "--runtime", "tensorrt-rtx"),
        "pip install 'dyt-compile[rtx]'",
    ),
    (
        "no plotly", ["plotly"], (*ONNX, "--report", "new.html"),
        "pip install 'dyt-compile[report]'",
    ),
    ("no GPU, for timing", [], ("bench-gpu", "model.onnx"), "NVIDIA GPU"),
    (
        "no GPU, for ONNX Runtime", [], (*ONNX, "--provider", "cuda"),
        "pip install 'dyt-compile[gpu]'",
    ),
)  # fmt: skip

OLD_TORCH = """
import importlib.metadata, sys
known = importlib.metadata.version
importlib.metadata.version = lambda name: "2.4.1" if name == "torch" else known(name)
from dyt_compile.cli import main
main(sys.argv[1:])
"""


def lack_packages(folder: Path) -> Iterator[Found]:
    """Commands without a package or a device: one line that names what to do."""
    place = Place(folder / "packages")
    for what, names, arguments, fix in LACKING:
        before = place.names()
        end = place.run(partial(_without, names, command(*arguments)))
        yield what, _judged(what, end.status, one_line(end), fix, sorted(place.names() ^ before))
    done = subprocess.run(
        [sys.executable, "-c", OLD_TORCH, *TORCH],
        cwd=place.home, capture_output=True, text=True, check=False,
    )  # fmt: skip
    lines = done.stderr.splitlines()
    line = lines[-1] if lines and "Traceback" not in done.stderr else None
    what = "torch 2.4.1"
    yield what, _judged(what, done.returncode, line, "pip install --upgrade", [])


def _judged(what: str, status: int, line: str | None, fix: str, left: list[str]) -> Row:
    good = status == 1 and line is not None and fix in line and not left
    ended = {"told in one line, with the fix" if good else f"told otherwise, {left}: {line}": 1}
    return {"what": what, "tried": 1, "ended": ended, "told": [line]}


class _Without:
    """A finder of modules that does not know some packages."""

    def __init__(self, finder: Any, names: Sequence[str]) -> None:
        self._finder = finder
        self._names = names

    def find_spec(self, name: str, *more: Any) -> Any:
        if name.partition(".")[0] in self._names:
            return None
        return self._finder.find_spec(name, *more)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._finder, name)


def _without(names: Sequence[str], work: Callable[[], object]) -> None:
    """Do the work as if the packages were not installed, in a process of its own."""
    for name in [n for n in sys.modules if n.partition(".")[0] in names]:
        del sys.modules[name]
    sys.meta_path[:] = [_Without(finder, names) for finder in sys.meta_path]
    work()
