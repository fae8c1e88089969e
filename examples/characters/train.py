"""Trains the character GPT from scratch and saves its weights beside this file."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from model import CONTEXT, PIECE, WEIGHTS, CharacterGPT, compared, load, save, text
from rich.progress import track
from torch import Tensor, nn

BATCH_SIZE = 16
RATE = 3e-3


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0, help="of weights, batches and split")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--threads", type=int, default=1, help="the sums, and so the weights, vary")
    parser.add_argument("--output", type=Path, default=WEIGHTS)
    return parser.parse_args()


def drawn(pieces: Tensor) -> Tensor:
    """A batch of windows, each from anywhere within a piece: (16, 129)."""
    rows = torch.randint(len(pieces), (BATCH_SIZE, 1))
    starts = torch.randint(PIECE - CONTEXT, (BATCH_SIZE, 1))
    return pieces[rows, starts + torch.arange(CONTEXT + 1)]


def train(model: nn.Module, pieces: Tensor, steps: int) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=RATE, total_steps=steps, pct_start=0.1
    )
    for _ in track(range(steps), "training"):
        batch = drawn(pieces)
        loss = F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()


def main() -> None:
    options = arguments()
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    model = CharacterGPT()
    started = time.perf_counter()
    train(model, text(options.seed)[0], options.steps)
    seconds = time.perf_counter() - started
    save(model.eval(), options.output)
    saved, _ = load(options.output)
    found = compared(model, saved, options.seed)
    print(
        f"held-out loss {found['loss_before']:.4f} nats a character, as saved in int8 "
        f"{found['loss_after']:.4f}, after {seconds:.0f} s; wrote {options.output}, "
        f"{options.output.stat().st_size / 1e3:.0f} kB"
    )


if __name__ == "__main__":
    main()
