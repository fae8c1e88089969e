"""What two processes do in the time of one: `python -m benchmarks.ranks`.

Starts itself under torchrun, with one thread a process. In each round the first process calibrates
ViT-Ti (random weights) by itself, then both do so together, then each does it by itself at once:
what the machine gives two that never speak. So with some steps of recovery, but for the last. Every
second round in reverse. Start and capture do not count. Writes benchmarks/results/ranks.json.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import dyt_compile
from dyt_compile.data import whole
from dyt_compile.files import replaced
from dyt_compile.passes.calibrate import calibrate
from dyt_compile.passes.match import match
from dyt_compile.ranks import ALONE, Ranks, among, joined

from .observing import SMALL, Images, captured, model
from .speed.pairs import interleaved, ratio

RESULTS = Path(__file__).parent / "results/ranks.json"
SIZE = 2


def works(images: Images, steps: int) -> dict[str, Callable[[], object]]:
    """What is timed: a whole calibration on converted activations, and some steps of recovery."""
    graph = captured(SMALL)
    found = match(graph)
    names = [site.name for site in found.sites]
    samples = whole(graph, images)
    few = Images(4, 16)  # 51 to learn from, 4 a step
    converted = dyt_compile.convert(model(SMALL), few, mode="all", fit="diagonal")
    return {
        "calibrate": lambda: calibrate(graph, found, samples, convert=names, seed=0),
        "recover": lambda: dyt_compile.recover(converted, few, steps=steps),
    }


def measured(
    work: Callable[[], object], rounds: int, ranks: Ranks, *, ceiling: bool
) -> dict[str, Any]:
    """Milliseconds of each round, and what they say of the throughputs."""

    def one() -> None:
        if not ranks.number:
            with among(ALONE):
                work()
        ranks.gathered(None)

    def apart() -> None:
        with among(ALONE):
            work()
        ranks.gathered(None)

    def together() -> None:
        work()
        ranks.gathered(None)

    load = os.getloadavg()[0]
    runs = {"one": one, "two": together, **({"apart": apart} if ceiling else {})}
    times = interleaved(runs, rounds, warm_ups=1)
    found = {"two": asdict(ratio(times["one"], times["two"]))}
    if ceiling:
        found["apart"] = asdict(ratio([SIZE * t for t in times["one"]], times["apart"]))
    return {**found, "times_ms": times, "load_before": load}


def table(told: dict[str, Any]) -> Table:
    """The figures as they are printed."""
    made = Table("work", "one, s", "two together (95 %)", "two that never speak", "rounds")
    for name, found in told.items():
        one = statistics.median(found["times_ms"]["one"]) / 1000
        ratios = (
            f"{each['median']:.2f} × ({each['low']:.2f} to {each['high']:.2f})" if each else ""
            for each in (found["two"], found.get("apart"))
        )
        made.add_row(name, f"{one:.1f}", *ratios, str(len(found["times_ms"]["one"])))
    return made


def rank(asked: argparse.Namespace) -> None:
    """What each process does."""
    torch.set_num_threads(1)
    with joined() as ranks:
        images = Images(asked.images // 16, 16)
        told = {
            name: measured(work, asked.rounds, ranks, ceiling=name == "calibrate")
            for name, work in works(images, asked.steps).items()
            if name in asked.only
        }
        ranks.first(lambda: tell(told))


def tell(told: dict[str, Any]) -> None:
    """Print, and write beside what was measured of other works before."""
    known = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    Console(width=100).print(table(told))
    with replaced(RESULTS) as temporary:
        temporary.write_text(json.dumps(known | told, indent=1) + "\n")


def main() -> None:
    """Start the processes, or be one."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ranks", description=__doc__)
    parser.add_argument("--images", type=int, default=128, help="to calibrate on")
    parser.add_argument("--steps", type=int, default=32, help="of recovery")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--only", nargs="+", default=["calibrate", "recover"])
    asked = parser.parse_args()
    if "WORLD_SIZE" in os.environ:
        rank(asked)
        return
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone",
        "--nproc-per-node", str(SIZE), "-m", "benchmarks.ranks", *sys.argv[1:],
    ]  # fmt: skip
    sys.exit(subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}).returncode)


if __name__ == "__main__":
    main()
