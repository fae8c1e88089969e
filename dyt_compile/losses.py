"""Errors that a model can learn from: differentiable, in float32, over the positions that count.

The counterparts of `metrics.METRICS`; `f` is the original. Shapes [samples, ..., channels].
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["LOSSES", "WEIGHTS", "positions", "relative"]

Loss = Callable[[Tensor, Tensor, Tensor | None], Tensor]


def relative(f: Tensor, g: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean over positions of ||f - g||^2 / ||f||^2, a scalar.

    By position, as a norm sees it: a few massive tokens do not outweigh all others. Positions
    where f is nearly zero are weighted as if they had a thousandth of the mean energy.
    mask: [samples, positions], True counts; ignored where the values have other axes.
    """
    f, g = _counted(f, g, mask)
    energies = f.square().sum(-1)
    floor = 1e-3 * energies.mean() + torch.finfo(torch.float32).tiny
    return ((f - g).square().sum(-1) / energies.clamp_min(floor)).mean()


def pooled(f: Tensor, g: Tensor, mask: Tensor | None = None) -> Tensor:
    """||f - g||^2 / ||f||^2 over all positions, a scalar: the square of the metric "relative"."""
    f, g = _counted(f, g, mask)
    return (f - g).square().sum() / f.square().sum().clamp_min(torch.finfo(torch.float32).tiny)


def cosine(f: Tensor, g: Tensor, mask: Tensor | None = None) -> Tensor:
    """1 - mean cosine of the last axis, a scalar."""
    return 1 - F.cosine_similarity(*_counted(f, g, mask), dim=-1).mean()


def kl(f: Tensor, g: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean KL(softmax f, softmax g) of the positions, in nats, a scalar."""
    f, g = _counted(f, g, mask)
    return F.kl_div(g.log_softmax(-1), f.log_softmax(-1), reduction="batchmean", log_target=True)


LOSSES: dict[str, Loss] = {"relative": pooled, "cosine": cosine, "kl": kl, "top1": kl}
"""What to learn by, for each metric; the place of a maximum has no gradient: "top1" takes KL."""


def positions(f: Tensor, mask: Tensor | None = None) -> Tensor:
    """How many positions count, a scalar: what a mean over them is divided by."""
    if mask is not None and _is_masked(f, mask):
        return mask.sum().double() * math.prod(f.shape[2:-1])
    count = f.numel() // f.shape[-1] if f.dim() > 1 else f.numel()
    return torch.tensor(count, dtype=torch.float64, device=f.device)


def energy(f: Tensor, mask: Tensor | None = None) -> Tensor:
    """||f||^2 over all positions, a scalar: what `pooled` divides by."""
    return _counted(f, f, mask)[0].square().sum(dtype=torch.float64)


WEIGHTS: dict[str, Callable[[Tensor, Tensor | None], Tensor]] = {
    "relative": energy, "cosine": positions, "kl": positions, "top1": positions,
}  # fmt: skip
"""By which the losses of parts of a batch add up to that of the whole."""


def _counted(f: Tensor, g: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Both as [positions, channels] in float32 or wider, only what counts."""
    wide = torch.promote_types(f.dtype, torch.float32)
    f, g = f.to(wide), g.to(wide)
    if mask is not None and _is_masked(f, mask):
        return f[mask].reshape(-1, f.shape[-1]), g[mask].reshape(-1, g.shape[-1])
    if f.dim() < 2:
        return f.reshape(-1, 1), g.reshape(-1, 1)
    return f.reshape(-1, f.shape[-1]), g.reshape(-1, g.shape[-1])


def _is_masked(f: Tensor, mask: Tensor) -> bool:
    return f.dim() > 2 and f.shape[:2] == mask.shape
