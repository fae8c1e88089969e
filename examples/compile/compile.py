"""Compiles a transformer with its norms, and with Dynamic Tanh in their place, and times both.

The weights are random: the times are those of a trained model of this size, the error is not.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import dyt_compile


class Block(nn.Module):
    """Pre-norm attention and MLP."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width)
        self.projections = nn.Linear(width, 3 * width)
        self.output = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        projected = self.projections(self.norm1(x))
        q, k, v = projected.view(batch, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v)
        x = x + self.output(mixed.transpose(1, 2).reshape(batch, tokens, width))
        return x + self.mlp(self.norm2(x))


class Transformer(nn.Module):
    def __init__(self, width: int, blocks: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(width, width // 64) for _ in range(blocks))
        self.norm = nn.LayerNorm(width)
        for norm in (m for m in self.modules() if isinstance(m, nn.LayerNorm)):
            nn.init.normal_(norm.weight, 1.0, 0.1)  # a block is known by its gamma

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--blocks", type=int, default=6)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--runs", type=int, default=30)
    parser.add_argument("--output-folder", type=Path, default=Path("build/compile"))
    return parser.parse_args()


def whole(model: nn.Module, backend: str, options: dict[str, str] | None) -> Callable[..., Tensor]:
    """The model as one graph."""
    return torch.compile(model, backend=backend, options=options)


def regional(
    model: nn.Module, backend: str, options: dict[str, str] | None
) -> Callable[..., Tensor]:
    """Each block alone: all of them share one graph, so it compiles in a fraction of the time."""
    for part in (*model.blocks, model.norm):
        part.compile(backend=backend, options=options)
    return model


def timed(run: Callable[[], Tensor], device: torch.device) -> float:
    """Milliseconds of one run."""
    started = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return 1000 * (time.perf_counter() - started)


def main() -> None:
    options = arguments()
    folder: Path = options.output_folder
    folder.mkdir(parents=True, exist_ok=True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    model = Transformer(options.width, options.blocks).eval().to(device)
    shape = (options.batch, options.tokens, options.width)
    x = torch.randn(shape, device=device)

    batches = [(torch.randn(shape, device=device),) for _ in range(4)]
    result = dyt_compile.convert(model, batches, mode="all", fit="diagonal")
    calibration = folder / "calibration.safetensors"
    result.calibration.save(calibration)

    figures: dict[str, dict[str, float]] = {}
    runs: dict[str, Callable[[], Tensor]] = {}
    chosen = {"inductor": None, "dyt": {"calibration": str(calibration)}}
    with torch.inference_mode():
        torch.compile(nn.LayerNorm(8).to(device))(
            torch.ones(2, 8, device=device)
        )  # starts Inductor
        for compiler in (whole, regional):
            for told, backend in (("norms", "inductor"), ("DyT", "dyt")):
                name = f"{compiler.__name__}, {told}"
                compiled = compiler(copy.deepcopy(model), backend, chosen[backend])
                runs[name] = partial(compiled, x)
                seconds = timed(runs[name], device) / 1000
                expected = result.model(x) if told == "DyT" else model(x)
                difference = (runs[name]() - expected).norm() / expected.norm()
                figures[name] = {"first_call_s": seconds, "difference": float(difference)}
        times: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(options.runs):  # in turns, so that what else runs here slows all alike
            for name, run in runs.items():
                times[name].append(timed(run, device))
    for name in runs:
        figures[name]["median_ms"] = median(times[name])

    (folder / "figures.json").write_text(json.dumps(figures, indent=2) + "\n")
    table = Table("compiled", "first call", "median", "differs from eager by")
    for name, found in figures.items():
        table.add_row(
            name,
            f"{found['first_call_s']:.1f} s",
            f"{found['median_ms']:.2f} ms",
            f"{found['difference']:.1e}",
        )
    console = Console()
    console.print(
        f"{options.blocks} blocks of width {options.width}, input {shape} on {device}, "
        f"{torch.get_num_threads()} threads; {len(result.report.sites)} norms, all converted"
    )
    console.print(table)


if __name__ == "__main__":
    main()
