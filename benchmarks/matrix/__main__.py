"""Every architecture by every route: writes docs/matrix.md, from benchmarks/results/matrix.json.

Each system runs in a process of its own: what crashes or hangs there costs its own row alone.
"""

from __future__ import annotations

import argparse
import json
import re
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from dyt_compile.files import replaced

from .routes import QUICK, ROUTES, Cell, State
from .systems import SYSTEMS
from .table import render

__all__ = ["RESULTS", "TABLE", "main", "row"]

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks/results/matrix.json"
TABLE = ROOT / "docs/matrix.md"

PACKAGES = ("torch", "transformers", "timm", "diffusers", "onnx", "onnxruntime", "tensorrt-rtx")

TIMEOUT_S = 1200


def versions() -> dict[str, str]:
    """Of the packages that the figures depend on, without the build (+cpu, +cu130)."""
    return {name: version(name).partition("+")[0] for name in PACKAGES}


def row(name: str, quick: bool, begun: Callable[[str], None]) -> dict[str, Any]:
    """The row of one system, from a new process. begun: told each route as it begins."""
    command = [sys.executable, "-m", f"{__package__}.routes", name, *(["--quick"] if quick else [])]
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=errors, text=True
        )
        timer = threading.Timer(TIMEOUT_S, process.kill)
        timer.start()
        try:
            facts, cells, last = _followed(process.stdout, begun)
            status = process.wait()
        finally:
            timer.cancel()
        if status != 0:
            told = _end(status, errors)
            for route in QUICK if quick else ROUTES:
                reason = told if route == last or not last else f"not reached: {last} {told}"
                cells.setdefault(route, Cell(State.ENDED, reason=reason).to_dict())
    return {**_unbuilt(name), **facts, "cells": cells}


def _unbuilt(name: str) -> dict[str, Any]:
    """What is known of a system that could not even be built."""
    system = SYSTEMS[name]
    return {"group": system.group, "source": system.source, "sites": 0, "kinds": {}}


def _followed(
    lines: IO[str] | None, begun: Callable[[str], None]
) -> tuple[dict[str, Any], dict[str, Any], str]:
    """Facts and cells that a process tells, and the route that it began last."""
    facts: dict[str, Any] = {}
    cells: dict[str, Any] = {}
    last = ""
    for line in lines or ():
        told = json.loads(line)
        if "facts" in told:
            facts.update(told["facts"])
        elif "begun" in told:
            last = told["begun"]
            begun(last)
        else:
            cells[told["route"]] = told["cell"]
    return facts, cells, last


def _end(status: int, errors: IO[str]) -> str:
    """How a process ended: its status, and the last line that it wrote."""
    if status == -signal.SIGKILL:
        return f"killed: out of memory, or not done after {TIMEOUT_S} s"
    errors.seek(0)
    written = [line.strip() for line in errors if line.strip()]
    return f"ended with {status}: {written[-1][:120] if written else 'nothing said'}"


def merged(before: Mapping[str, Any], made: Mapping[str, Any]) -> dict[str, Any]:
    """Rows in the order of SYSTEMS; a quick run leaves the cells of the other routes."""
    rows = {}
    for name in SYSTEMS:
        old = before.get(name, {})
        new = made.get(name, {})
        if old or new:
            cells = {**old.get("cells", {}), **new.get("cells", {})}
            rows[name] = {**old, **new, "cells": {r: cells[r] for r in ROUTES if r in cells}}
    return rows


def run(names: list[str], quick: bool, jobs: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Systems and their rows as they are done, several at a time."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    routes = list(QUICK if quick else ROUTES)
    with Progress(*columns) as progress, ThreadPoolExecutor(jobs) as pool:
        whole = progress.add_task("systems", total=len(names))

        def one(name: str) -> tuple[str, dict[str, Any]]:
            task = progress.add_task(name, total=len(routes))

            def begun(route: str) -> None:
                done = routes.index(route)
                progress.update(task, completed=done, description=f"{name}: {route}")

            made = row(name, quick, begun)
            progress.remove_task(task)
            progress.advance(whole)
            return name, made

        for done in as_completed([pool.submit(one, name) for name in names]):
            yield done.result()


def write(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    path.parent.mkdir(exist_ok=True)
    with replaced(path) as temporary:
        temporary.write_text(text)


def main() -> None:
    """Run what was asked for; the results and the page are written again after each row."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.matrix", description=__doc__)
    parser.add_argument("--only", metavar="REGEX", default="", help="systems whose name matches")
    parser.add_argument("--quick", action="store_true", help=f"only the routes {', '.join(QUICK)}")
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time")
    parser.add_argument("--output", type=Path, default=TABLE, help="the page to write")
    asked = parser.parse_args()
    names = [name for name in SYSTEMS if re.search(asked.only, name)]
    before = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"rows": {}}
    stay = set(before["rows"]) if asked.quick else set(before["rows"]) - set(names)
    if stay & set(SYSTEMS) and before["versions"] != versions():
        parser.error(f"rows that stay were made with other versions: {before['versions']}")
    results = {"versions": versions(), "rows": before["rows"]}
    for name, made in run(names, asked.quick, asked.jobs):
        results["rows"] = merged(results["rows"], {name: made})
        write(RESULTS, json.dumps(results, indent=1, ensure_ascii=False) + "\n")
        write(asked.output, render(results))
    print(f"{len(names)} rows done; {asked.output} has {len(results['rows'])}")


if __name__ == "__main__":
    main()
