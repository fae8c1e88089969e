"""One site alone, in torch: `python -m benchmarks.sites [--width N] [--runtime NAME]`.

LayerNorm, RMSNorm, DyT, Derf, each with and without the residual add before it, and the bare add,
which is the memory's limit: 4096 rows, compiled by Inductor and eager. All run in turns, so that
what else runs on the machine slows all alike; a ratio is of two runs of the same turn. (Lower and
upper quartile in brackets.)
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
import torch._inductor.config
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor
from torch.nn.functional import layer_norm, rms_norm

import dyt_compile.nn  # noqa: F401  registers torch.ops.dyt

ROWS, WIDTHS, DTYPES = 4096, (768, 4096), (torch.float32, torch.bfloat16)
ALPHA = 0.7
SHIFT = torch.tensor([0.1])

Site = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]

SITES: dict[str, Site] = {
    "add": lambda x, r, alpha, gamma, beta: x + r,
    "LayerNorm": lambda x, r, alpha, gamma, beta: layer_norm(x, gamma.shape, gamma, beta),
    "RMSNorm": lambda x, r, alpha, gamma, beta: rms_norm(x, gamma.shape, gamma),
    "DyT": lambda x, r, alpha, gamma, beta: torch.ops.dyt.DyT(x, alpha, gamma, beta),
    "Derf": lambda x, r, alpha, gamma, beta: torch.ops.dyt.Derf(x, alpha, SHIFT, gamma, beta),
    "add + LayerNorm": lambda x, r, alpha, gamma, beta: layer_norm(x + r, gamma.shape, gamma, beta),
    "add + RMSNorm": lambda x, r, alpha, gamma, beta: rms_norm(x + r, gamma.shape, gamma),
    "add + DyT": lambda x, r, alpha, gamma, beta: torch.ops.dyt.DyT(x + r, alpha, gamma, beta),
    "add + Derf": lambda x, r, alpha, gamma, beta: torch.ops.dyt.Derf(
        x + r, alpha, SHIFT, gamma, beta
    ),
}
RUNTIMES = ("Inductor", "eager")
AGAINST = ("add", "add + LayerNorm", "add + RMSNorm")


def inputs(width: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """x, residual, alpha, gamma, beta."""
    draw = partial(torch.randn, generator=torch.Generator().manual_seed(0))
    x, residual = (draw(ROWS, width).to(dtype) for _ in range(2))
    gamma, beta = (draw(width).to(dtype) for _ in range(2))
    return x, residual, torch.tensor([ALPHA]), gamma, beta


def milliseconds(run: Callable[[], Tensor]) -> float:
    started = time.perf_counter()
    run()
    return 1000 * (time.perf_counter() - started)


def times(runs: dict[str, Callable[[], Tensor]], pairs: int, told: str) -> dict[str, np.ndarray]:
    """Milliseconds of every run, by turns; the first two turns compile and warm up."""
    turns = [
        [milliseconds(run) for run in runs.values()]
        for _ in track(range(pairs + 2), description=told, transient=True)
    ]
    return dict(zip(runs, np.array(turns[2:]).T, strict=True))


def spread(values: np.ndarray) -> str:
    """Median, and the quartiles."""
    low, middle, high = np.quantile(values, (0.25, 0.5, 0.75))
    return f"{middle:.2f} ({low:.2f}-{high:.2f})"


def table(found: dict[str, np.ndarray], title: str) -> Table:
    shown = Table("site", "ms", *(f"against {name}" for name in AGAINST), title=title)
    for name, taken in found.items():
        shown.add_row(name, spread(taken), *(spread(taken / found[other]) for other in AGAINST))
    return shown


def main() -> None:
    """Print one table a width, dtype and runtime."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=40)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--width", type=int, choices=WIDTHS, action="append")
    parser.add_argument("--runtime", choices=RUNTIMES, action="append")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    console = Console(width=100)
    console.print(f"torch {torch.__version__}, {options.threads} threads, {options.pairs} turns")
    for runtime in options.runtime or RUNTIMES:
        for width in options.width or WIDTHS:
            for dtype in DTYPES:
                given = inputs(width, dtype)
                torch.compiler.reset()
                runs = {
                    name: partial(torch.compile(site) if runtime == "Inductor" else site, *given)
                    for name, site in SITES.items()
                }
                title = f"{runtime}, {ROWS} x {width}, {str(dtype).removeprefix('torch.')}"
                with torch.no_grad(), torch._inductor.config.patch(force_disable_caches=True):
                    console.print(table(times(runs, options.pairs, title), title))


if __name__ == "__main__":
    main()
