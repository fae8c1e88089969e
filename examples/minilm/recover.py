"""Converts every norm of the sentence encoder, then lets the result learn from the original.

Prints the cosine similarity of the embeddings of both, and for how many sentences the nearest other
one is the same, on held-out sentences, which took part in nothing, before and after.
"""

from __future__ import annotations

import argparse
import random

import torch
from model import batches, calibration, load, sentences
from torch import Tensor, nn

import dyt_compile


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--steps", type=int, help="steps instead of minutes: a run to repeat")
    parser.add_argument("--staged", action="store_true", help="a few sites at a time")
    return parser.parse_args()


def nearest(embedded: Tensor) -> Tensor:
    """For each embedding, the row of the most similar other one."""
    return (embedded @ embedded.T).fill_diagonal_(-1).argmax(dim=1)


@torch.inference_mode()
def told(original: nn.Module, model: nn.Module, held_out: list[dict[str, Tensor]]) -> str:
    f, g = (torch.cat([encode(**batch) for batch in held_out]) for encode in (original, model))
    cosine = (f * g).sum(dim=1).mean().item()
    kept = (nearest(f) == nearest(g)).float().mean().item()
    return f"cosine similarity {cosine:.4f}, nearest neighbour agreement {kept:.1%}"


def main() -> None:
    options = arguments()
    learned, unseen = sentences()
    held_out, by_length = batches(unseen), batches(learned)
    model, *_ = load()
    converted = dyt_compile.convert(model, list(calibration()), mode="all", metric="cosine")
    print(f"converted: {told(model, converted.model, held_out)}", flush=True)
    recovered = dyt_compile.recover(
        converted,
        random.Random(0).sample(by_length, len(by_length)),
        minutes=options.minutes,
        steps=options.steps,
        staged=options.staged,
    )
    print(f"recovered: {told(model, recovered.model, held_out)}")
    recovery = recovered.report.recovery
    if recovery is not None:
        print(recovery.told())


if __name__ == "__main__":
    main()
