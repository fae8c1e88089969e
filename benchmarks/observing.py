"""What calibration costs beside plain forward passes: `python -m benchmarks.observing`.

Observing all norms of ViT-B (random weights) needs one forward pass of the original a sample. Both
take turns on the same batches, in CPU seconds, which other work on the machine does not count in.
Then the peak of resident memory of a process that observes 10, then 100, then 1,000 batches of
eight images, the digits ViT, and keeps at most 8 MB of activations in memory, the rest in files.
Writes benchmarks/results/observing.json.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from dyt_compile.data import whole
from dyt_compile.files import replaced
from dyt_compile.fits import RowSample
from dyt_compile.graphs.base import Graph
from dyt_compile.passes.calibrate import observing
from dyt_compile.passes.capture import capture
from dyt_compile.passes.match import match
from dyt_compile.shelf import Shelf
from dyt_compile.sites import NormSite

from .matrix.drawn import weights
from .speed.pairs import Ratio, interleaved, others, ratio

RESULTS = Path(__file__).parent / "results/observing.json"
LARGE, SMALL = "vit_base_patch16_224", "vit_tiny_patch16_224"
"""Models of timm."""
SHAPE = (3, 224, 224)
"""Of their images."""
KEPT_BYTES = 8 << 20


@dataclass(frozen=True)
class Images:
    """Batches of random images, made anew whenever they are gone through."""

    batches: int
    size: int
    pixels: tuple[int, ...] = SHAPE

    def __iter__(self) -> Iterator[tuple[Tensor]]:
        random = torch.Generator().manual_seed(0)
        for _ in range(self.batches):
            yield (torch.randn(self.size, *self.pixels, generator=random),)


def model(name: str) -> nn.Module:
    """A model of timm with random weights."""
    import timm

    return weights(lambda: timm.create_model(name, pretrained=False))()


def captured(name: str) -> Graph:
    """Its graph, with any number of images a batch."""
    return capture(model(name), (torch.zeros(2, *SHAPE),))


def observe(
    graph: Graph, sites: Sequence[NormSite], images: Iterable[Any], memory_bytes: int = KEPT_BYTES
) -> int:
    """Observe all sites; how many rows their samples hold together."""
    with Shelf(graph, memory_bytes) as shelf:
        seen = observing(graph, sites, shelf, whole(graph, images), lambda _: RowSample(0))
        return sum(len(sample.rows()[0]) for _, _, sample in seen)


def plain(graph: Graph, images: Images) -> None:
    """Run the model over all images, as one part."""
    run = graph.segment(list(graph.inputs.values()), list(graph.outputs.values()))
    for batch in map(graph.bind, images):
        run([batch[name] for name in graph.inputs])


def cost(name: str, images: Images, rounds: int) -> dict[str, Any]:
    """CPU time of observing over that of the plain passes, with all activations in memory."""
    graph = captured(name)
    sites = match(graph).sites
    runs = {
        "plain": lambda: plain(graph, images),
        "observing": lambda: observe(graph, sites, images, memory_bytes=2 << 30),
    }
    with others() as busy:
        times = interleaved(runs, rounds, "observing", time.process_time, 1)
    found: Ratio = ratio(times["observing"], times["plain"])
    return {
        "model": name, "images": images.batches * images.size, "batch": images.size,
        "rounds": rounds, "times_ms": times, "ratio": asdict(found), "other_cores": busy.cores,
    }  # fmt: skip


def peaks(counts: Sequence[int]) -> dict[str, int]:
    """Peak of resident memory after so many batches, rising, the model and all imports included."""
    from examples.digits.model import load

    torch.set_num_threads(1)
    found, example = load()
    graph = capture(found, example)
    sites = match(graph).sites
    peak_bytes = {}
    for count in counts:
        observe(graph, sites, Images(count, 8, tuple(example[0].shape[1:])))
        peak_bytes[str(count)] = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak_bytes


def apart(counts: Sequence[int]) -> dict[str, int]:
    """The peaks, in a process that does nothing else."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(peaks, (counts,))


def table(told: dict[str, Any]) -> Table:
    """The figures as they are printed."""
    made = Table("model", "what", "")
    if cost := told.get("cost"):
        found = Ratio(**cost["ratio"])
        figures = f"{found.median:.3f} (95 %: {found.low:.3f} to {found.high:.3f})"
        made.add_row(cost["model"], f"observing {cost['images']} images / one pass", figures)
    for count, peak in told.get("peak_bytes", {}).items():
        made.add_row("digits ViT", f"peak of memory, {count} batches", f"{peak / 1e6:.0f} MB")
    return made


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.observing", description=__doc__)
    parser.add_argument("--images", type=int, default=8, help="a round, in two batches")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batches", type=int, nargs="*", default=[10, 100, 1000])
    parser.add_argument("--only", choices=["cost", "peak_bytes"], action="append")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    told = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    works: dict[str, Callable[[], dict[str, Any]]] = {
        "cost": lambda: cost(LARGE, Images(2, asked.images // 2), asked.rounds),
        "peak_bytes": lambda: apart(sorted(asked.batches)),
    }
    for name in asked.only or works:
        told[name] = works[name]()
        Console(width=100).print(table({name: told[name]}))
        with replaced(RESULTS) as temporary:
            temporary.write_text(json.dumps(told, indent=1) + "\n")


if __name__ == "__main__":
    main()
