"""Converts every norm of the digits ViT, then lets the result learn from the original.

Prints the relative error and the agreement with the original on the test images, which took part
in nothing, before and after.
"""

from __future__ import annotations

import argparse

from model import calibration, compared, load
from torch import nn

import dyt_compile


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=2.0)
    parser.add_argument("--steps", type=int, help="steps instead of minutes: a run to repeat")
    parser.add_argument("--train", choices=["all", "dyt"], default="all")
    return parser.parse_args()


def told(original: nn.Module, model: nn.Module) -> str:
    found = compared(original, model)
    return (
        f"relative error {found['relative_error']:.3f}, agreement {found['agreement']:.1%}, "
        f"accuracy {found['accuracy_after']:.1%}"
    )


def main() -> None:
    options = arguments()
    model, _ = load()
    batches = list(calibration())
    converted = dyt_compile.convert(model, batches, mode="all")
    print(f"converted: {told(model, converted.model)}", flush=True)
    recovered = dyt_compile.recover(
        converted, batches, minutes=options.minutes, steps=options.steps, train=options.train
    )
    print(f"recovered: {told(model, recovered.model)}")
    recovery = recovered.report.recovery
    if recovery is not None:
        print(f"{recovery.steps} steps in {recovery.seconds:.0f} s, train {recovery.train!r}")


if __name__ == "__main__":
    main()
