"""Finding and rewriting the norms of ONNX files: seconds, peak memory and counts, against peers.

`files`: from file to file in one process, taking turns, as ratios to onnx_ir's own load and save.
Ours is what converts and writes; the comparison of what was written with its source, which peers
do not have, is timed apart. `matching`: models in memory, against onnxscript's rules. `memory`:
every way once, in a process of its own. `large`: the commands on a LLaMA-7B-shaped file.

Usage: python -m benchmarks.files [files matching memory large] [--rounds 30] [--folder FOLDER];
what it measures replaces the same part of benchmarks/results/files.json, and is drawn in
docs/files.md. The files take 4 GB in FOLDER (by default a temporary one).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from rich.progress import track

import dyt_compile
from dyt_compile.files import replaced
from dyt_compile.report import environment

from .peers import PEERS, match_ours, match_theirs
from .subjects import SUBJECTS
from .table import write_page

RESULTS = Path(__file__).parents[1] / "results" / "files.json"
PARTS = ("files", "matching", "memory", "large")
TIMED = ("vit-b-dyt", "vit-b")
MATCHED = ("vit-b-14", "vit-b-hand", "llama-1b")
REMEMBERED = ("vit-b-dyt", "vit-b-14", "vit-b-hand", "llama-1b", "llama-1b-dyt")
LARGE = ("llama-7b", "llama-7b-dyt")
COMMANDS = ("inspect", "convert --mode exact --no-fold", "verify", "convert --mode exact")
"""Of a large file, in this order: `verify` compares what the command before it wrote."""

LIMIT_SECONDS = 1800
MATCHERS = {"ours": match_ours, "onnxscript": match_theirs}

Seconds = tuple[float, float]
"""Of CPU, and of wall time."""

Times = dict[str, list[Seconds]]


def spread(values: Sequence[float]) -> dict[str, float]:
    """The median, and the quartiles around it."""
    low, middle, high = np.quantile(np.asarray(values), [0.25, 0.5, 0.75])
    return {"low": float(low), "median": float(middle), "high": float(high)}


def ratios(times: Times, base: str) -> dict[str, Any]:
    """Each way's time over that of `base` in the same round."""
    own = np.asarray(times[base])
    return {name: _both(np.asarray(taken) / own) for name, taken in times.items()}


def _both(values: Any) -> dict[str, dict[str, float]]:
    return {"cpu": spread(values[:, 0]), "wall": spread(values[:, 1])}


def take_turns(runs: Mapping[str, Callable[[], Mapping[str, Seconds]]], rounds: int) -> Times:
    """Seconds of every run by round, after one that does not count; order alternates."""
    times: Times = {}
    names = list(runs)
    for place in track(range(rounds + 1), "taking turns"):
        for name in names if place % 2 else reversed(names):
            for part, seconds in runs[name]().items():
                if place:
                    times.setdefault(part, []).append(seconds)
    return times


def now() -> Seconds:
    """The clocks: what else the machine does counts less in seconds of CPU than in wall time."""
    return time.process_time(), time.perf_counter()


def timed(name: str, work: Callable[[], object]) -> dict[str, Seconds]:
    """Seconds of a piece of work."""
    start = now()
    work()
    return {name: since(start)}


def since(start: Seconds) -> Seconds:
    """Seconds that have passed."""
    cpu, wall = now()
    return cpu - start[0], wall - start[1]


def measure_files(folder: Path, rounds: int) -> dict[str, Any]:
    """Ratios to the floor of ours and ONNX Runtime's optimizer, from file to file."""
    found = {}
    for name in TIMED:
        source, target = file_of(name, folder), folder / name / "out.onnx"
        runs: dict[str, Callable[[], Mapping[str, Seconds]]] = {
            way: lambda s=source, t=target, w=way: _converted(s, t, w)  # type: ignore[misc]
            for way in ("convert", "unfolded")
        }
        for peer in ("floor", "onnxruntime", "onnxslim", "onnxscript"):
            if PEERS[peer].is_here:
                run = PEERS[peer].run
                runs[peer] = lambda p=peer, r=run, s=source, t=target: timed(  # type: ignore[misc]
                    p, lambda: r(s, t)
                )
        times = take_turns(runs, rounds)
        found[name] = {
            "what": SUBJECTS[name].what,
            "rounds": rounds,
            "seconds": {way: _both(np.asarray(taken)) for way, taken in times.items()},
            "ratio_to_floor": ratios(times, "floor"),
        }
    return found


def _converted(source: Path, target: Path, way: str) -> dict[str, Seconds]:
    """Seconds of converting and writing, and with comparing what was written."""
    start = now()
    result = dyt_compile.convert(source, mode="exact", fold=way == "convert")
    converted = now()
    written = dyt_compile.export_onnx(result, target, check="structure")
    (cpu, wall), (cpu_export, wall_export) = since(start), since(converted)
    share = written.seconds["check"] / sum(written.seconds.values())
    return {
        way: (cpu - share * cpu_export, wall - share * wall_export),
        f"{way} and compare": (cpu, wall),
    }


def measure_matching(folder: Path, rounds: int) -> dict[str, Any]:
    """Microseconds a node, and norms found, in models in memory, against onnxscript's rules."""
    found = {}
    for name in MATCHED:
        model = ir.load(file_of(name, folder))
        count = sum(len(graph) for graph in model.graphs())
        counts: dict[str, int] = {}

        def copied(
            way: str, model: ir.Model = model, counts: dict[str, int] = counts
        ) -> dict[str, Seconds]:
            """Both work in place: each gets a copy, which is not timed."""
            own = model.clone()
            return timed(way, lambda: counts.update({way: MATCHERS[way](own)}))

        times = take_turns({way: partial(copied, way) for way in MATCHERS}, rounds)
        found[name] = {
            "what": SUBJECTS[name].what,
            "rounds": rounds,
            "nodes": count,
            "norms": SUBJECTS[name].norms,
            "found": counts,
            "us_a_node": {
                way: _both(np.asarray(taken) / count * 1e6) for way, taken in times.items()
            },
            "ratio_to_onnxscript": ratios(times, "onnxscript")["ours"],
        }
    return found


def measure_memory(folder: Path) -> dict[str, Any]:
    """Every way once, in a process of its own: seconds, peak memory, norms that it then knows."""
    found: dict[str, Any] = {}
    for name in REMEMBERED:
        source = file_of(name, folder)
        found[name] = {"what": SUBJECTS[name].what, "norms": SUBJECTS[name].norms, "ways": {}}
        for peer in PEERS.values():
            if peer.is_here:
                found[name]["ways"][peer.name] = _apart([peer.name, str(source)])
                print(name, peer.name, found[name]["ways"][peer.name], flush=True)
    return found


def measure_large(folder: Path) -> dict[str, Any]:
    """The commands, each as a process of its own, on sparse LLaMA-7B-shaped files."""
    found: dict[str, Any] = {}
    for name in LARGE:
        source = file_of(name, folder)
        target = source.with_name("out.onnx")
        size = source.with_name(f"{source.name}.data").stat().st_size
        found[name] = {"what": SUBJECTS[name].what, "weight_bytes": size, "commands": {}}
        for told in COMMANDS:
            verb, *options = told.split()
            files = {"inspect": [], "verify": [str(target)], "convert": ["-o", str(target)]}
            measured = _apart(["command", verb, str(source), *options, *files[verb]])
            if verb == "convert" and "failed" not in measured:
                measured["written_bytes"] = sum(p.stat().st_size for p in _written(target))
            found[name]["commands"][told] = measured
            print(name, told, measured, flush=True)
        for path in _written(target):
            path.unlink()
    return found


def _written(target: Path) -> list[Path]:
    """A file and its data."""
    return list(target.parent.glob(f"{target.name}*"))


def _apart(arguments: Sequence[str]) -> dict[str, Any]:
    """What a process prints that does one thing and measures itself."""
    command = [sys.executable, "-m", "benchmarks.files.one", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_SECONDS)
    if done.returncode:
        return {"failed": (done.stderr.strip().splitlines() or ["killed"])[-1]}
    measured: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return measured


def file_of(name: str, folder: Path) -> Path:
    """The file of a subject, made where it is not there yet."""
    path = folder / name / "model.onnx"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        print(f"making {SUBJECTS[name].what}", flush=True)
        SUBJECTS[name].write(path)
    return path


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.files")
    parser.add_argument("parts", nargs="*", default=[], metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("-o", type=Path, default=RESULTS)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        found = json.loads(options.o.read_text()) if options.o.exists() else {}
        measures = {
            "files": lambda: measure_files(folder, options.rounds),
            "matching": lambda: measure_matching(folder, options.rounds),
            "memory": lambda: measure_memory(folder),
            "large": lambda: measure_large(folder),
        }
        for part in options.parts or PARTS:
            found[part] = measures[part]()
            found["environment"] = {
                **environment(), "machine": platform.machine(), "cores": os.cpu_count()
            }  # fmt: skip
            with replaced(options.o) as path:
                path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        write_page(found)


if __name__ == "__main__":
    main()
