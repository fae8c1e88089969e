"""Every architecture by every route: writes docs/matrix.md, from benchmarks/results/matrix.json.

Each system runs in a process of its own: what crashes or hangs there costs its own row alone.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from dyt_compile.files import replaced

from .routes import QUICK, ROUTES, State
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
    start = time.perf_counter()
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
                cells.setdefault(route, {"state": State.ENDED, "told": "", "reason": reason})
    seconds = {} if quick else {"seconds": round(time.perf_counter() - start, 1)}
    return {**_placeless(name), **facts, "cells": cells, **seconds}


def _placeless(name: str) -> dict[str, Any]:
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
            facts = told["facts"]
        elif "begun" in told:
            last = told["begun"]
            begun(last)
        else:
            cells[told["route"]] = told["cell"]
    return facts, cells, last


def _end(status: int, errors: IO[str]) -> str:
    """How a process ended: its status, and the last line that it wrote."""
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


def run(names: list[str], quick: bool, jobs: int) -> dict[str, Any]:
    """The rows of some systems, several at a time."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    routes = len(QUICK if quick else ROUTES)
    with Progress(*columns) as progress, ThreadPoolExecutor(jobs) as pool:
        whole = progress.add_task("systems", total=len(names))

        def one(name: str) -> dict[str, Any]:
            task = progress.add_task(name, total=routes)

            def begun(route: str) -> None:
                done = list(QUICK if quick else ROUTES).index(route)
                progress.update(task, completed=done, description=f"{name}: {route}")

            made = row(name, quick, begun)
            progress.remove_task(task)
            progress.advance(whole)
            return made

        return dict(zip(names, pool.map(one, names), strict=True))


def main() -> None:
    """Run what was asked for, and write the results and the page."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.matrix", description=__doc__)
    parser.add_argument("--only", metavar="REGEX", default="", help="systems whose name matches")
    parser.add_argument("--quick", action="store_true", help=f"only the routes {', '.join(QUICK)}")
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time")
    parser.add_argument("--output", type=Path, default=TABLE, help="the page to write")
    asked = parser.parse_args()
    before = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"rows": {}}
    names = [name for name in SYSTEMS if re.search(asked.only, name)]
    kept = {name: old for name, old in before["rows"].items() if name not in names or asked.quick}
    if kept and before["versions"] != versions():
        parser.error(f"rows that stay were made with other versions: {before['versions']}")
    made = run(names, asked.quick, asked.jobs)
    results = {"versions": versions(), "rows": merged(kept, made)}
    for path, text in (
        (RESULTS, json.dumps(results, indent=1, ensure_ascii=False) + "\n"),
        (asked.output, render(results)),
    ):
        path.parent.mkdir(exist_ok=True)
        with replaced(path) as temporary:
            temporary.write_text(text)
    print(f"{len(made)} rows done; {asked.output} has {len(results['rows'])}")


if __name__ == "__main__":
    main()
