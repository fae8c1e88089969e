"""Converts every norm of the digits ViT, then lets the result learn from the original.

Prints the relative error and the agreement with the original on the test images, which took part
in nothing, before and after.
"""

from __future__ import annotations

import argparse

import torch
from model import calibration, images, load
from torch import Tensor, nn

import dyt_compile


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=2.0)
    parser.add_argument("--steps", type=int, help="steps instead of minutes: a run to repeat")
    parser.add_argument("--train", choices=["all", "dyt"], default="all")
    return parser.parse_args()


@torch.inference_mode()
def told(original: nn.Module, model: nn.Module, pixels: Tensor, labels: Tensor) -> str:
    f, g = original(pixels), model(pixels)
    error = ((f - g).norm() / f.norm()).item()
    agreement = (f.argmax(dim=1) == g.argmax(dim=1)).float().mean().item()
    accuracy = (g.argmax(dim=1) == labels).float().mean().item()
    return f"relative error {error:.3f}, agreement {agreement:.1%}, accuracy {accuracy:.1%}"


def main() -> None:
    options = arguments()
    _, _, pixels, labels = images()
    model, _ = load()
    batches = list(calibration())
    converted = dyt_compile.convert(model, batches, mode="all")
    print(f"converted: {told(model, converted.model, pixels, labels)}", flush=True)
    recovered = dyt_compile.recover(
        converted, batches, minutes=options.minutes, steps=options.steps, train=options.train
    )
    print(f"recovered: {told(model, recovered.model, pixels, labels)}")
    recovery = recovered.report.recovery
    if recovery is not None:
        print(f"{recovery.steps} steps in {recovery.seconds:.0f} s, train {recovery.train!r}")


if __name__ == "__main__":
    main()
