"""Seconds to find and to rewrite the norms of LLaMA-70B-shaped models, against torch.export's own.

The weights are meta tensors, so nothing is loaded. All times are of this one process, in turn.
Usage: python benchmarks/matching.py [LAYERS ...]
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import TypeVar

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from dyt_compile.calibration import Calibration, SiteFit
from dyt_compile.dyt import DytParameters
from dyt_compile.passes.capture import capture
from dyt_compile.passes.match import match
from dyt_compile.passes.rewrite import rewrite

T = TypeVar("T")

WIDTH = 8192


def timed(work: Callable[[], T]) -> tuple[T, float]:
    start = time.perf_counter()
    return work(), time.perf_counter() - start


def measure(layers: int) -> str:
    config = LlamaConfig(
        hidden_size=WIDTH,
        intermediate_size=28672,
        num_hidden_layers=layers,
        num_attention_heads=64,
        num_key_value_heads=8,
        use_cache=False,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(torch.bfloat16).eval()
        tokens = torch.zeros(2, 16, dtype=torch.long)
    program, exporting = timed(lambda: torch.export.export(model, (tokens,), strict=False))
    graph = capture(program)
    found, matching = timed(lambda: match(graph))
    channels = np.ones(WIDTH, np.float32)
    fit = SiteFit(DytParameters(np.array([0.5], np.float32), channels, channels))
    fits = Calibration({site.name: fit for site in found.sites}, ())
    _, rewriting = timed(lambda: rewrite(graph, found, fits, list(fits.fits)))
    shares = [f"{seconds:8.3f} ({seconds / exporting:5.1%})" for seconds in (matching, rewriting)]
    counts = f"{layers:6} {len(graph.terms):7} {len(found.sites):6}"
    return f"{counts} {exporting:9.2f} {'  '.join(shares)}"


def main() -> None:
    print("layers   nodes  norms  export s  match s  (share)  rewrite s (share)")
    for layers in [int(text) for text in sys.argv[1:]] or [8, 32, 80]:
        print(measure(layers), flush=True)


if __name__ == "__main__":
    main()
