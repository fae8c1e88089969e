"""What recovery holds on each rank: all that is learned, or a part of it.

Usage: python -m benchmarks.sharding. Starts itself under torchrun, with one thread a process: some
steps of recovery of a LLaMA of 38 million weights (random, float32; 8 samples of 8 tokens, so that
activations hardly count) by one process, and by several under DistributedDataParallel and sharded
(FSDP2). Bytes are the peak of resident memory over the run
(VmHWM, of the rank that has the most) above what the process held before it: the original and the
converted model, which every rank has anyway. Writes benchmarks/results/sharding.json.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import dyt_compile
from dyt_compile.files import replaced
from dyt_compile.ranks import joined
from dyt_compile.report import environment

from .files.one import peak_bytes

RESULTS = Path(__file__).parent / "results/sharding.json"
STEPS, WORDS = 3, 256


def model() -> torch.nn.Module:
    """The same weights on every rank."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=WORDS, hidden_size=512, intermediate_size=1376, num_hidden_layers=12,
        num_attention_heads=8, use_cache=False, tie_word_embeddings=True,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def rank(*, sharded: bool) -> None:
    """What each process does; the first prints."""
    torch.set_num_threads(1)
    with joined() as ranks:
        words = [(torch.randint(WORDS, (4, 8), generator=torch.Generator().manual_seed(0)),)] * 4
        converted = dyt_compile.convert(model(), words, mode="all", fit="diagonal")
        parameters = sum(p.numel() for p in converted.model.parameters())
        before = _reset()
        found = dyt_compile.recover(converted, words, steps=STEPS, sharded=sharded)
        held = max(ranks.gathered(peak_bytes() - before))
        told = {"bytes": held, "parameters": parameters, "error": found.report.error}
        ranks.first(lambda: print(json.dumps(told)))


def _reset() -> int:
    """Let the peak be what is held now, in bytes; Linux does so."""
    Path("/proc/self/clear_refs").write_text("5")
    return peak_bytes()


def measured(size: int, *, sharded: bool) -> dict[str, Any]:
    """What a job of so many processes tells."""
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone",
        "--nproc-per-node", str(size), "-m", "benchmarks.sharding",
        "--rank", "sharded" if sharded else "whole",
    ]  # fmt: skip
    done = subprocess.run(
        command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, check=True
    )
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return {"ranks": size, "sharded": sharded, **found}


def table(rows: list[dict[str, Any]]) -> Table:
    """The figures as they are printed."""
    made = Table("ranks", "what is learned", "GB on a rank", "bytes a parameter", "error")
    for row in rows:
        made.add_row(
            str(row["ranks"]),
            "split" if row["sharded"] else "on each",
            f"{row['bytes'] / 1e9:.2f}",
            f"{row['bytes'] / row['parameters']:.1f}",
            f"{row['error']:.4f}",
        )
    return made


def main() -> None:
    """Start the processes, or be one."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sharding", description=__doc__)
    parser.add_argument("--rank", choices=["whole", "sharded"], help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.rank:
        rank(sharded=asked.rank == "sharded")
        return
    jobs = [(1, False), (2, False), (2, True), (4, False), (4, True)]
    rows = [measured(size, sharded=sharded) for size, sharded in jobs]
    Console(width=100).print(table(rows))
    with replaced(RESULTS) as temporary:
        told = {"environment": environment(), "runs": rows}
        temporary.write_text(json.dumps(told, indent=1) + "\n")


if __name__ == "__main__":
    main()
