"""Faults: processes killed where they write, full disks, odd targets, missing memory and packages.

Every fault is caused on purpose, as often as docs/reliability.md says, and what was found after it
is written into benchmarks/results/faults.json, from which that page is made. Needs Linux; as root
it also fills small disks of its own.

What is found replaces the same rows of the results.

Usage: python -m benchmarks.faults [kills recover disk targets pairs input memory packages]
[--kills 60] [--sizes 8] [--rounds 10] [--only REGEX] [--folder FOLDER] [-o FILE]
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import re
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from dyt_compile.cli import main as cli
from dyt_compile.files import replaced
from dyt_compile.report import environment

from .disks import fill, misplace, pair
from .kills import Found, kill_all, kill_recover
from .shortages import cut_input, lack_memory, lack_packages
from .subjects import CASES, TORCH, prepare
from .table import lost, write_page

RESULTS = Path(__file__).parents[1] / "results" / "faults.json"


WARM = ["convert", *TORCH, "--mode", "all", "-o", "out.pt2"]


def tell(line: str) -> None:
    """Say how far it is: no bar, whose thread the processes would not have."""
    print(line, flush=True)


def warm(folder: Path) -> None:
    """Do once what the commands do, so that their processes have imported it: all but running ONNX
    Runtime, which would start threads."""
    import onnxruntime  # noqa: F401
    import onnxscript  # noqa: F401
    import torch

    from dyt_compile import recovery  # noqa: F401
    from dyt_compile.exporters import torch_files  # noqa: F401
    from dyt_compile.graphs import fx, onnx  # noqa: F401
    from dyt_compile.passes import recover  # noqa: F401

    torch.set_num_threads(1)
    here = Path.cwd()
    prepare(folder)
    os.chdir(folder)
    example = (torch.zeros(2, 2),)
    torch.onnx.export(torch.nn.Linear(2, 2), example, dynamo=True, verbose=False)
    with contextlib.suppress(SystemExit):
        cli(WARM)
    os.chdir(here)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.faults")
    parser.add_argument("parts", nargs="*", default=[], metavar="PART")
    parser.add_argument("--kills", type=int, default=60, help="of each command, about")
    parser.add_argument("--sizes", type=int, default=8, help="of disks, for each command")
    parser.add_argument("--rounds", type=int, default=10, help="of each pair of processes")
    parser.add_argument("--only", default="", help="commands whose name matches")
    parser.add_argument("--folder", type=Path)
    parser.add_argument("-o", type=Path, default=RESULTS)
    options = parser.parse_args()
    cases = [case for case in CASES if re.search(options.only, case.name) and case.can_run]
    with tempfile.TemporaryDirectory() as temporary:
        Path(temporary).chmod(0o755)  # another user reads there, too
        folder = options.folder or Path(temporary)
        if any(case.share < 1 for case in cases):
            warm(folder / "warm")
        parts: dict[str, Callable[[], Iterable[Found]]] = {
            "kills": lambda: kill_all(folder, cases, options.kills),
            "recover": lambda: kill_recover(folder / "recover", options.kills),
            "disk": lambda: fill(folder, cases, options.sizes),
            "targets": lambda: misplace(folder, cases),
            "pairs": lambda: pair(folder, cases, options.rounds),
            "input": lambda: cut_input(folder),
            "memory": lambda: lack_memory(folder),
            "packages": lambda: lack_packages(folder),
        }
        found = json.loads(options.o.read_text()) if options.o.exists() else {}
        for part in options.parts or parts:
            for name, row in parts[part]():
                tell(f"{part}, {name}: {row}")
                found.setdefault(part, {})[name] = row
                _save(found, options.o)
    tell(f"lost: {'; '.join(lost(found)) or 'nothing'}")


def _save(found: dict[str, Any], path: Path) -> None:
    """Write all that was found so far: a run that is stopped keeps it."""
    found["environment"] = {
        **environment(), "machine": platform.machine(), "cores": os.cpu_count()
    }  # fmt: skip
    with replaced(path) as temporary:
        temporary.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    if path == RESULTS:
        write_page(found)


if __name__ == "__main__":
    main()
