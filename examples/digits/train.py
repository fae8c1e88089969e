"""Trains the digits ViT from scratch and saves its weights beside this file."""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from model import BATCH_SIZE, WEIGHTS, DigitsViT, images
from safetensors.torch import save_model
from torch import Tensor, nn

EPOCHS = 80
RATE = 2e-3


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0, help="of weights, batches and split")
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    parser.add_argument("--threads", type=int, default=2, help="the sums, and so the weights, vary")
    parser.add_argument("--output", type=Path, default=WEIGHTS)
    return parser.parse_args()


def distorted(batch: Tensor) -> Tensor:
    """The images of a batch, each rotated, scaled, sheared and moved a little at random."""
    count = len(batch)
    maps = torch.eye(2, 3) + 0.1 * torch.randn(count, 2, 3)
    grid = F.affine_grid(maps, [count, 1, 8, 8], align_corners=False)
    return F.grid_sample(batch.unsqueeze(1), grid, align_corners=False).squeeze(1)


def train(
    model: nn.Module,
    pixels: Tensor,
    labels: Tensor,
    *,
    epochs: int = EPOCHS,
    rate: float = RATE,
) -> Iterator[float]:
    """Train epoch by epoch, giving each one's mean loss; rate: the highest of the run."""
    steps = epochs * math.ceil(len(pixels) / BATCH_SIZE)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=rate, total_steps=steps, pct_start=0.15
    )
    for _ in range(epochs):
        losses = []
        for rows in torch.randperm(len(pixels)).split(BATCH_SIZE):
            logits = model(distorted(pixels[rows]))
            loss = F.cross_entropy(logits, labels[rows], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
        yield sum(losses) / len(losses)


def accuracy(model: nn.Module, pixels: Tensor, labels: Tensor) -> float:
    with torch.inference_mode():
        return (model.eval()(pixels).argmax(1) == labels).float().mean().item()


def main() -> None:
    options = arguments()
    torch.manual_seed(options.seed)
    torch.set_num_threads(options.threads)
    train_x, train_y, test_x, test_y = images(options.seed)
    model = DigitsViT()
    started = time.perf_counter()
    for _ in train(model, train_x, train_y, epochs=options.epochs):
        pass
    seconds = time.perf_counter() - started
    save_model(model, str(options.output))
    print(
        f"test accuracy {accuracy(model, test_x, test_y):.1%} after {seconds:.0f} s; "
        f"saved {options.output}"
    )


if __name__ == "__main__":
    main()
