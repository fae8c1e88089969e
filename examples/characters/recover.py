"""Converts every norm of the character GPT, then lets the result learn from the original.

Prints KL and loss on the held-out text, which took part in nothing, before and after.
"""

from __future__ import annotations

import argparse

from model import batches, compared, load
from torch import nn

import dyt_compile


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--steps", type=int, help="steps instead of minutes: a run to repeat")
    parser.add_argument("--train", choices=["all", "dyt"], default="all")
    return parser.parse_args()


def told(original: nn.Module, model: nn.Module) -> str:
    found = compared(original, model)
    return (
        f"KL {found['kl']:.4f} nats a character, loss {found['loss_after']:.3f} "
        f"(the original's {found['loss_before']:.3f}), agreement {found['agreement']:.1%}"
    )


def main() -> None:
    options = arguments()
    model, _ = load()
    text = batches()
    converted = dyt_compile.convert(model, text, mode="all", metric="kl")
    print(f"converted: {told(model, converted.model)}", flush=True)
    recovered = dyt_compile.recover(
        converted, text, minutes=options.minutes, steps=options.steps, train=options.train
    )
    print(f"recovered: {told(model, recovered.model)}")
    recovery = recovered.report.recovery
    if recovery is not None:
        print(f"{recovery.steps} steps in {recovery.seconds:.0f} s, train {recovery.train!r}")


if __name__ == "__main__":
    main()
