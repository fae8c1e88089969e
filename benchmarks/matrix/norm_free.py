"""ViTs without norms, as the paper compares them to DyT: SkipInit, Fixup and sigma-Reparam.

Fixup: arXiv 1901.09321. SkipInit: arXiv 2002.10444. Sigma-Reparam: arXiv 2303.06296. A plain ViT
around them; parameters that start at zero or one are moved off it, as training would.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["STYLES", "VisionTransformer"]


class Style(Protocol):
    """How a norm-free ViT keeps its signal in bounds."""

    def linear(self, inputs: int, outputs: int) -> nn.Module: ...

    def branch(self, inner: nn.Module) -> nn.Module: ...


class SkipInit:
    """A learned scalar, at first zero, before each residual add."""

    def linear(self, inputs: int, outputs: int) -> nn.Module:
        return nn.Linear(inputs, outputs)

    def branch(self, inner: nn.Module) -> nn.Module:
        return Scaled(inner)


class Scaled(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.alpha = nn.Parameter(0.1 * torch.randn(()))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.alpha * self.inner(x)
        return y


class Fixup:
    """A scalar bias before every layer without one of its own, a multiplier a branch."""

    def linear(self, inputs: int, outputs: int) -> nn.Module:
        return Biased(inputs, outputs)

    def branch(self, inner: nn.Module) -> nn.Module:
        return Multiplied(inner)


class Biased(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.before = nn.Parameter(0.1 * torch.randn(()))
        self.linear = nn.Linear(inputs, outputs, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.linear(x + self.before)
        return y


class Multiplied(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.multiplier = nn.Parameter(1 + 0.1 * torch.randn(()))
        self.after = nn.Parameter(0.1 * torch.randn(()))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.inner(x) * self.multiplier + self.after
        return y


class SigmaReparam:
    """Every weight divided by its spectral norm and multiplied by a learned scalar."""

    def linear(self, inputs: int, outputs: int) -> nn.Module:
        return Reparametrised(inputs, outputs)

    def branch(self, inner: nn.Module) -> nn.Module:
        return inner


class Reparametrised(nn.Module):
    """Evaluation only: u and v are what the power iteration of training has arrived at."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs) / inputs**0.5)
        self.bias = nn.Parameter(torch.zeros(outputs))
        self.gamma = nn.Parameter(1 + 0.1 * torch.randn(()))
        self.register_buffer("u", F.normalize(torch.randn(outputs), dim=0))
        self.register_buffer("v", F.normalize(self.weight.detach().T @ self.u, dim=0))

    def forward(self, x: Tensor) -> Tensor:
        sigma = torch.dot(self.u, self.weight @ self.v)
        return F.linear(x, self.gamma / sigma * self.weight, self.bias)


STYLES: dict[str, Style] = {
    "SkipInit": SkipInit(),
    "Fixup": Fixup(),
    "σReparam": SigmaReparam(),
}


class VisionTransformer(nn.Module):
    """Class logits of square images."""

    def __init__(
        self,
        style: Style,
        *,
        width: int = 768,
        layers: int = 12,
        heads: int = 12,
        image: int = 224,
        patch: int = 16,
        classes: int = 1000,
    ) -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(3, width, patch, patch)
        self.pos_embed = nn.Parameter(0.02 * torch.randn(1, (image // patch) ** 2, width))
        self.blocks = nn.Sequential(*(Block(style, width, heads) for _ in range(layers)))
        self.head = style.linear(width, classes)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patch_embed(images).flatten(2).transpose(1, 2) + self.pos_embed
        logits: Tensor = self.head(self.blocks(x).mean(dim=1))
        return logits


class Block(nn.Module):
    def __init__(self, style: Style, width: int, heads: int) -> None:
        super().__init__()
        self.attention = style.branch(Attention(style, width, heads))
        self.mlp = style.branch(
            nn.Sequential(style.linear(width, 4 * width), nn.GELU(), style.linear(4 * width, width))
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(x)
        y: Tensor = x + self.mlp(x)
        return y


class Attention(nn.Module):
    def __init__(self, style: Style, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = style.linear(width, 3 * width)
        self.proj = style.linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        split = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        q, k, v = split.unbind(0)
        y: Tensor = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        out: Tensor = self.proj(y)
        return out
