"""HyenaDNA: a decoder whose mixer is a long convolution with an implicit filter.

Follows standalone_hyenadna.py of github.com/HazyResearch/hyena-dna (arXiv 2306.15794): module
names, order 2, pre-norm with LayerNorm. Written anew.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["HyenaDNA"]

BANDS = 2
"""Of the positional features: a line, and as many cosines and sines."""

FASTEST, SLOWEST, TARGET = 0.3, 1.5, 1e-2
"""Share of the sequence over which a channel's filter decays to TARGET."""


class HyenaDNA(nn.Module):
    """Token logits, [batch, tokens, vocabulary].

    length: the longest sequence. direct: convolve without Fourier transforms, which TensorRT and
    torch's older exporter lack; the same function, in time that grows with the length's square.
    """

    def __init__(
        self, width: int, layers: int, length: int, vocabulary: int = 16, *, direct: bool = False
    ) -> None:
        super().__init__()
        self.embeddings = nn.Embedding(vocabulary, width)
        self.layers = nn.ModuleList(Block(width, length, direct) for _ in range(layers))
        self.ln_f = nn.LayerNorm(width)
        self.lm_head = nn.Linear(width, vocabulary, bias=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embeddings(input_ids)
        for layer in self.layers:
            x = layer(x)
        logits: Tensor = self.lm_head(self.ln_f(x))
        return logits


class Block(nn.Module):
    def __init__(self, width: int, length: int, direct: bool) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.mixer = Hyena(width, length, direct)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(approximate="tanh"), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mixer(self.norm1(x))
        y: Tensor = x + self.mlp(self.norm2(x))
        return y


class Hyena(nn.Module):
    """Two gates around a long convolution."""

    def __init__(self, width: int, length: int, direct: bool) -> None:
        super().__init__()
        self.in_proj = nn.Linear(width, 3 * width)
        self.short_filter = nn.Conv1d(3 * width, 3 * width, 3, padding=2, groups=3 * width)
        self.filter_fn = Filter(width, length, direct)
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.shape[1]
        mixed = self.short_filter(self.in_proj(x).transpose(1, 2))[..., :tokens]
        gate, inner, value = mixed.chunk(3, dim=1)
        y = self.filter_fn(value * inner) * gate
        out: Tensor = self.out_proj(y.transpose(1, 2))
        return out


class Filter(nn.Module):
    """A causal convolution as long as the sequence; an MLP of the position gives its filter."""

    def __init__(self, width: int, length: int, direct: bool, order: int = 16) -> None:
        super().__init__()
        self.direct = direct
        self.bias = nn.Parameter(torch.randn(width))
        t = torch.linspace(0, 1, length)[:, None]
        angles = 2 * math.pi * torch.arange(length)[:, None] / length
        bands = torch.linspace(1e-4, BANDS - 1, BANDS)[None] * angles
        self.register_buffer("z", torch.cat([t, bands.cos(), -bands.sin()], dim=-1))
        self.register_buffer("t", t)
        decays = torch.linspace(math.log(TARGET) / SLOWEST, math.log(TARGET) / FASTEST, width)
        self.register_buffer("deltas", decays.abs())
        self.implicit_filter = nn.Sequential(
            nn.Linear(1 + 2 * BANDS, order),
            Sine(order),
            nn.Linear(order, order),
            Sine(order),
            nn.Linear(order, width, bias=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.shape[-1]
        decay = torch.exp(-self.t[:tokens] * self.deltas)
        kernel = (self.implicit_filter(self.z[:tokens]) * decay).T
        return (_convolved if self.direct else _transformed)(x, kernel) + x * self.bias[:, None]


def _transformed(x: Tensor, kernel: Tensor) -> Tensor:
    """The causal convolution by Fourier transforms."""
    tokens = x.shape[-1]
    spectrum = torch.fft.rfft(x, n=2 * tokens) * torch.fft.rfft(kernel, n=2 * tokens)
    y: Tensor = torch.fft.irfft(spectrum, n=2 * tokens)[..., :tokens]
    return y


def _convolved(x: Tensor, kernel: Tensor) -> Tensor:
    """The causal convolution by its definition."""
    before = x.shape[-1] - 1
    return functional.conv1d(
        functional.pad(x, (before, 0)), kernel.flip(-1)[:, None], groups=kernel.shape[0]
    )


class Sine(nn.Module):
    """sin(frequency * x), a learned frequency a channel."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.freq = nn.Parameter(10.0 * torch.ones(1, width))

    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(self.freq * x)
