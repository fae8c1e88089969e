"""What two processes do in the time of one: `python -m benchmarks.ranks`.

Starts itself under torchrun, with one thread a process. In each round the first process does a work
by itself, then both do it together, then each does it by itself at once: what the machine gives two
that never speak. Every second round in reverse. The works: a calibration of ViT-Ti (random
weights), and steps of recovery, at two sizes of images, of alpha, gamma and beta alone, and of a
LLaMA over windows of text. Start and capture do not count, nor do the data, which lie in memory.
Writes benchmarks/results/ranks.json.
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
WORDS = 512

Work = Callable[[], object]


def calibration(count: int) -> Work:
    """A whole calibration on converted activations, with diagonal fits."""
    graph = captured(SMALL)
    found = match(graph)
    names = [site.name for site in found.sites]
    samples = whole(graph, list(Images(count // 16, 16)))
    return lambda: calibrate(graph, found, samples, convert=names, seed=0)


def recovery(name: str, pixels: int, steps: int, train: str = "all") -> Work:
    """Steps of recovery, of 4 images each; 51 images to learn from."""
    images = list(Images(4, 16, (3, pixels, pixels)))
    converted = dyt_compile.convert(model(name), images, mode="all", fit="diagonal")
    return lambda: dyt_compile.recover(converted, images, steps=steps, train=train)


def of_text(tokens: int, steps: int) -> Work:
    """The same of a LLaMA of 5 million weights (random), 4 windows of so many tokens a step."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=WORDS, hidden_size=256, intermediate_size=688, num_hidden_layers=6,
        num_attention_heads=4, use_cache=False, tie_word_embeddings=True,
        max_position_embeddings=tokens,
    )  # fmt: skip
    windows = [(torch.randint(WORDS, (8, tokens)),) for _ in range(8)]
    converted = dyt_compile.convert(
        LlamaForCausalLM(config).eval(), windows, mode="all", fit="diagonal"
    )
    return lambda: dyt_compile.recover(converted, windows, steps=steps)


def works(asked: argparse.Namespace) -> dict[str, Callable[[], Work]]:
    """What is timed, by name; made when its turn comes."""
    large = "vit_tiny_patch16_384"
    return {
        "calibrate": lambda: calibration(asked.images),
        "calibrate, 512 images": lambda: calibration(512),
        "recover": lambda: recovery(SMALL, 224, asked.steps),
        "recover, 384 pixels": lambda: recovery(large, 384, 2 * asked.steps),
        "recover, 1,024 tokens": lambda: of_text(1024, asked.steps // 2),
        "recover --train dyt": lambda: recovery(SMALL, 224, asked.steps, "dyt"),
    }


def measured(work: Work, rounds: int, ranks: Ranks) -> dict[str, Any]:
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
    times = interleaved({"one": one, "two": together, "apart": apart}, rounds, warm_ups=1)
    return {
        "two": asdict(ratio(times["one"], times["two"])),
        "apart": asdict(ratio([SIZE * t for t in times["one"]], times["apart"])),
        "times_ms": times,
        "load_before": load,
    }


def table(told: dict[str, Any]) -> Table:
    """The figures as they are printed."""
    made = Table("work", "one, s", "two together (95 %)", "two that never speak", "rounds")
    for name, found in told.items():
        one = statistics.median(found["times_ms"]["one"]) / 1000
        ratios = (
            f"{each['median']:.2f} × ({each['low']:.2f} to {each['high']:.2f})"
            for each in (found["two"], found["apart"])
        )
        made.add_row(name, f"{one:.1f}", *ratios, str(len(found["times_ms"]["one"])))
    return made


def rank(asked: argparse.Namespace) -> None:
    """What each process does."""
    torch.set_num_threads(1)
    with joined() as ranks:
        told = {
            name: measured(make(), asked.rounds, ranks)
            for name, make in works(asked).items()
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
    parser.add_argument(
        "--steps",
        type=int,
        default=48,
        help="of recovery, twice as many at 384 pixels, half as many of text",
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="+", metavar="WORK")
    asked = parser.parse_args()
    asked.only = asked.only or list(works(asked))
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
