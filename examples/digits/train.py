"""Trains the digits ViT from scratch and saves its weights beside this file."""

import math
import time

import torch
import torch.nn.functional as F
from model import BATCH_SIZE, WEIGHTS, DigitsViT, images
from safetensors.torch import save_model
from torch import Tensor, nn

EPOCHS = 80


def distorted(batch: Tensor) -> Tensor:
    """The images of a batch, each rotated, scaled, sheared and moved a little at random."""
    count = len(batch)
    maps = torch.eye(2, 3) + 0.1 * torch.randn(count, 2, 3)
    grid = F.affine_grid(maps, [count, 1, 8, 8], align_corners=False)
    return F.grid_sample(batch.unsqueeze(1), grid, align_corners=False).squeeze(1)


def train(model: nn.Module, pixels: Tensor, labels: Tensor) -> None:
    steps = EPOCHS * math.ceil(len(pixels) / BATCH_SIZE)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=2e-3, total_steps=steps, pct_start=0.15
    )
    for _ in range(EPOCHS):
        for rows in torch.randperm(len(pixels)).split(BATCH_SIZE):
            logits = model(distorted(pixels[rows]))
            loss = F.cross_entropy(logits, labels[rows], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()


def main() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(2)  # the sums, and so the weights, depend on it
    train_x, train_y, test_x, test_y = images()
    model = DigitsViT()
    started = time.perf_counter()
    train(model, train_x, train_y)
    seconds = time.perf_counter() - started
    with torch.inference_mode():
        accuracy = (model.eval()(test_x).argmax(1) == test_y).float().mean().item()
    save_model(model, str(WEIGHTS))
    print(f"test accuracy {accuracy:.1%} after {seconds:.0f} s; saved {WEIGHTS.name}")


if __name__ == "__main__":
    main()
