"""Converts every norm of three trained models, lets them recover, and writes docs/fidelity.md.

All figures come from samples that took part in nothing. The results are written again after each
model, and a run that was killed goes on where it was; a change to the code, the versions or the
minutes begins anew.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

import dyt_compile
from dyt_compile.cli.progress import TerminalReporter, console
from dyt_compile.files import replaced
from dyt_compile.progress import reporting
from dyt_compile.report.records import environment

from ..digest import digest
from .picture import draw
from .subjects import HELD, ROOT, SUBJECTS
from .table import render, terminal

__all__ = ["main", "measured"]

CACHE = ROOT / "build/fidelity"
THREADS = 2
SOURCES = (
    "dyt_compile/**/*.py",
    "examples/digits/*",
    "examples/minilm/*",
    "examples/characters/*",
    "examples/forecast/*",
    "benchmarks/fidelity/subjects.py",
)

Row = dict[str, Any]


def sources() -> str:
    """A digest of the code that the figures depend on."""
    return digest(ROOT, SOURCES)


def measured(name: str, seed: int, minutes: float) -> Row:
    """One model with one seed: its figures without training, and after it."""
    subject = SUBJECTS[name]
    started = time.perf_counter()
    kept = f"{name}-{seed}-{sources()}"
    model = subject.model(seed, CACHE / f"{kept}.safetensors")
    batches = subject.batches(seed)
    began = time.perf_counter()
    converted = dyt_compile.convert(model, batches, mode="all", metric=subject.metric, seed=seed)
    fitted = time.perf_counter()
    checkpoint = CACHE / f"{kept}-{minutes:g}.checkpoint"
    lessons = batches if subject.lessons is None else subject.lessons(seed)
    recovered = dyt_compile.recover(
        converted, lessons, minutes=minutes, seed=seed, checkpoint=checkpoint
    )
    recovery = recovered.report.recovery
    checkpoint.unlink(missing_ok=True)
    found = {
        "training_free": subject.compared(model, converted.model, seed),
        "recovered": subject.compared(model, recovered.model, seed),
        "curve": recovery.curve,
        "steps": recovery.steps,
        "fits": Counter(str(site.fit) for site in converted.report.sites),
    }
    whole = time.perf_counter() - started
    return {
        **found,
        "seconds": {"fit": fitted - began, "recover": recovery.seconds, "whole": whole},
    }


def run(names: Sequence[str], seeds: int, minutes: float, done: dict[str, Any]) -> Iterator[None]:
    """Add each row to `done`, seed by seed; those that are there already stay."""
    circumstances = {
        **environment(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "minutes": minutes,
        "sources": sources(),
    }
    shown = console(stderr=True)
    for seed in range(seeds):
        for name in names:
            rows = done.setdefault(name, {})
            if rows.get(str(seed), {}).get("run") == circumstances:
                continue
            shown.rule(f"{name}, seed {seed}")
            with reporting(TerminalReporter(shown)):
                rows[str(seed)] = {**measured(name, seed, minutes), "run": circumstances}
            yield


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fidelity", description=__doc__)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--minutes", type=float, default=10.0, help="of each recovery")
    parser.add_argument("--only", choices=SUBJECTS, action="append", help="may be repeated")
    parser.add_argument("--threads", type=int, default=THREADS)
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks/results/fidelity.json")
    parser.add_argument("--page", type=Path, default=ROOT / "docs/fidelity.md")
    return parser.parse_args()


def write(results: dict[str, Any], page: Path, path: Path) -> None:
    """The results, the page that is made of them, and its picture beside it."""
    for target, text in ((path, json.dumps(results, indent=1) + "\n"), (page, render(results))):
        with replaced(target) as temporary:
            temporary.write_text(text, encoding="utf-8")
    with replaced(page.with_suffix(".svg")) as temporary:
        draw(results, temporary)


def main() -> None:
    """Run what was asked for."""
    asked = arguments()
    torch.set_num_threads(asked.threads)
    CACHE.mkdir(parents=True, exist_ok=True)
    path: Path = asked.results
    results = json.loads(path.read_text()) if path.exists() else {}
    for _ in run(asked.only or HELD, asked.seeds, asked.minutes, results):
        ordered = {name: results[name] for name in SUBJECTS if name in results}
        write(json.loads(json.dumps(ordered)), asked.page, path)
    console().print(terminal(results))
    print(f"{asked.page} and {path} have {sum(map(len, results.values()))} rows")


if __name__ == "__main__":
    main()
