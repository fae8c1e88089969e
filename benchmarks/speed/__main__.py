"""Times the forms of three models and of one site in every runtime, and writes docs/performance.md.

Forms take turns with the original, so what counts is a ratio. The results are written again after
each set of turns, and a run that was killed goes on where it was; a change to the code, the
versions, the threads or the pairs begins anew.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import json
import os
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from dyt_compile.cli.progress import TerminalReporter, console
from dyt_compile.files import replaced
from dyt_compile.progress import reporting
from dyt_compile.report.records import environment

from ..digest import digest
from .bench import Bench, Turn
from .picture import draw
from .runtimes import RUNTIMES, hold_memory
from .subjects import SUBJECTS
from .table import PAIRS, render, terminal

__all__ = ["PAGE", "RESULTS", "ROOT", "main"]

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks/results/speed.json"
PAGE = ROOT / "docs/performance.md"
APART = ROOT / "build/speed"
"""Where a quick run writes, so that its figures are not taken for the real ones."""

THREADS = 2
QUICK_PAIRS = 5
QUICK = ("vit-b", "site-768-fp32", "site-768-bf16")
PACKAGES = ("openvino", "timm", "transformers")
"""Versions that are told besides those of `environment`."""

SOURCES = (
    "dyt_compile/**/*.py",
    "benchmarks/matrix/drawn.py",
    *(f"benchmarks/speed/{name}.py" for name in ("bench", "forms", "pairs", "peer", "runtimes")),
    "benchmarks/speed/subjects.py",
)


def sources() -> str:
    """A digest of the code that the figures depend on."""
    return digest(ROOT, SOURCES)


def circumstances(threads: int, pairs: int) -> dict[str, Any]:
    """What a figure depends on besides the case: the machine, versions, code and settings."""
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": threads,
        "pairs": pairs,
        **environment(),
        **{name: _version(name) for name in PACKAGES},
        "sources": sources(),
    }


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"


def _processor() -> str:
    told = Path("/proc/cpuinfo")
    lines = told.read_text().splitlines() if told.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else "unknown"


def turns(only: str, quick: bool, done: Mapping[str, Any], run: str) -> list[Turn]:
    """What is left to do: the sets of turns that match and were not done in the same way."""
    return [
        Turn(subject, runtime, name)
        for subject in (QUICK if quick else SUBJECTS)
        for name in SUBJECTS[subject].rounds()
        for runtime, found in RUNTIMES.items()
        if found.installed
        and re.search(only, f"{subject}/{runtime}/{name}")
        and done.get(subject, {}).get(runtime, {}).get(name, {}).get("run") != run
    ]


def cells(todo: Iterable[Turn], pairs: int, threads: int) -> Iterator[tuple[Turn, dict[str, Any]]]:
    """Every set of turns with what it gave, subject by subject."""
    shown = console(stderr=True)
    todo = list(todo)
    for subject in dict.fromkeys(turn.subject for turn in todo):
        shown.rule(SUBJECTS[subject].title)
        own = [turn for turn in todo if turn.subject == subject]
        with (
            tempfile.TemporaryDirectory(prefix="speed-") as folder,
            reporting(TerminalReporter(shown)),
        ):
            bench = Bench(SUBJECTS[subject], Path(folder), threads, pairs)
            yield from bench.cells(own)
        del bench
        torch._dynamo.reset()
        gc.collect()


def put(results: dict[str, Any], turn: Turn, cell: dict[str, Any]) -> None:
    """A cell in its place, all in the order of the tables."""
    subjects = results["subjects"]
    subjects.setdefault(turn.subject, {}).setdefault(turn.runtime, {})[turn.name] = cell
    results["subjects"] = {
        subject: {
            runtime: {n: told[n] for n in SUBJECTS[subject].rounds() if n in told}
            for runtime in RUNTIMES
            if (told := subjects[subject].get(runtime))
        }
        for subject in SUBJECTS
        if subject in subjects
    }
    used = {
        cell["run"]
        for runtimes in results["subjects"].values()
        for told in runtimes.values()
        for cell in told.values()
    }
    results["runs"] = {name: run for name, run in results["runs"].items() if name in used}


def write(results: dict[str, Any], path: Path, page: Path) -> None:
    """The results, the page that is made of them, and its picture beside it."""
    # One line for the times of a form: there are hundreds of lists.
    text = re.sub(
        r"\[[^\[\]{}]*\]",
        lambda numbers: re.sub(r"\s+", " ", numbers[0]),
        json.dumps(results, indent=1),
    )
    for target, told in ((path, text + "\n"), (page, render(results))):
        with replaced(target) as temporary:
            temporary.write_text(told, encoding="utf-8")
    with replaced(page.with_suffix(".svg")) as temporary:
        draw(results, temporary)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speed", description=__doc__)
    parser.add_argument(
        "--only", metavar="REGEX", default="", help="what matches, of subject/runtime/form"
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help=f"{QUICK_PAIRS} pairs of {', '.join(QUICK)} alone, into {APART.relative_to(ROOT)}",
    )
    parser.add_argument("--pairs", type=int, help=f"of each form with the original ({PAIRS})")
    parser.add_argument("--threads", type=int, default=THREADS)
    parser.add_argument("--results", type=Path)
    parser.add_argument("--page", type=Path)
    asked = parser.parse_args()
    asked.pairs = asked.pairs or (QUICK_PAIRS if asked.quick else PAIRS)
    asked.results = asked.results or (APART / RESULTS.name if asked.quick else RESULTS)
    asked.page = asked.page or (APART / PAGE.name if asked.quick else PAGE)
    return asked


def main() -> None:
    """Run what was asked for."""
    asked = arguments()
    if asked.quick:
        APART.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(asked.threads)
    hold_memory()
    path: Path = asked.results
    results = json.loads(path.read_text()) if path.exists() else {"runs": {}, "subjects": {}}
    told = circumstances(asked.threads, asked.pairs)
    run = hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:8]
    results["runs"][run] = told
    todo = turns(asked.only, asked.quick, results["subjects"], run)
    for turn, cell in cells(todo, asked.pairs, asked.threads):
        put(results, turn, {**cell, "run": run})
        write(results, path, asked.page)
    for table in terminal(results):
        console().print(table)
    print(f"{len(todo)} sets of turns done; see {asked.page} and {path}")


if __name__ == "__main__":
    main()
