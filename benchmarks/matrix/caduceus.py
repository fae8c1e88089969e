"""Caduceus-PS: Mamba over DNA, in both directions and both strands with the same weights.

Follows modeling_caduceus.py and modeling_rcps.py of github.com/kuleshov-group/caduceus
(arXiv 2403.03234) and mamba_simple.py of github.com/state-spaces/mamba (arXiv 2312.00752): module
names, norms with a fused residual add, one norm for both strands. Written anew; the selective scan
is a plain loop over the tokens, so sequences must be short.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["Caduceus"]

STATES = 8
"""Of the state space, a channel."""


class Caduceus(nn.Module):
    """Token logits, [batch, tokens, vocabulary].

    complement: the token of the opposite strand, for each token.
    """

    complement: Tensor

    def __init__(self, width: int, layers: int, complement: tuple[int, ...]) -> None:
        super().__init__()
        self.register_buffer("complement", torch.tensor(complement))
        self.embeddings = nn.Embedding(len(complement), width)
        self.layers = nn.ModuleList(Block(width) for _ in range(layers))
        self.norm_f = AddNorm(RMSNorm(width))
        self.lm_head = nn.Linear(width, len(complement), bias=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        strand = self.embeddings(input_ids)
        opposite = self.embeddings(self.complement[input_ids].flip(-1))
        x = torch.cat([strand, _reversed(opposite)], dim=-1)
        residual = None
        for layer in self.layers:
            x, residual = layer(x, residual)
        strand, opposite = self.norm_f(x, residual)[0].chunk(2, dim=-1)
        opposite_weights = self.lm_head.weight[self.complement]
        logits: Tensor = self.lm_head(strand) + F.linear(opposite.flip(-1), opposite_weights)
        return logits


def _reversed(x: Tensor) -> Tensor:
    """A strand read the other way: tokens and channels in reverse."""
    return x.flip(-2, -1)


class RMSNorm(nn.Module):
    """The norm of x plus the residual, and that sum."""

    def __init__(self, width: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if residual is not None:
            x = x + residual
        scale = 1 / torch.sqrt(x.square().mean(dim=-1, keepdim=True) + self.eps)
        return x * scale * self.weight, x


class AddNorm(nn.Module):
    """One norm for both strands: it is called twice."""

    def __init__(self, submodule: RMSNorm) -> None:
        super().__init__()
        self.submodule = submodule

    def forward(self, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        strands = x.chunk(2, dim=-1)
        sums = (None, None) if residual is None else residual.chunk(2, dim=-1)
        y, z = self.submodule(strands[0], sums[0])
        last = None if sums[1] is None else _reversed(sums[1])
        y_opposite, z_opposite = self.submodule(_reversed(strands[1]), last)
        joined = torch.cat([y, _reversed(y_opposite)], dim=-1)
        return joined, torch.cat([z, _reversed(z_opposite)], dim=-1)


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = AddNorm(RMSNorm(width))
        self.mixer = BothStrands(BothDirections(width))

    def forward(self, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        y, residual = self.norm(x, residual)
        return self.mixer(y), residual


class BothStrands(nn.Module):
    """A module that treats both strands alike."""

    def __init__(self, submodule: nn.Module) -> None:
        super().__init__()
        self.submodule = submodule

    def forward(self, x: Tensor) -> Tensor:
        strand, opposite = x.chunk(2, dim=-1)
        y, y_opposite = self.submodule(strand), self.submodule(_reversed(opposite))
        return torch.cat([y, _reversed(y_opposite)], dim=-1)


class BothDirections(nn.Module):
    """A Mamba forwards and one backwards, which share their two projections."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mamba_fwd = Mamba(width)
        self.mamba_rev = Mamba(width)
        self.mamba_rev.in_proj.weight = self.mamba_fwd.in_proj.weight
        self.mamba_rev.out_proj.weight = self.mamba_fwd.out_proj.weight

    def forward(self, x: Tensor) -> Tensor:
        backwards: Tensor = self.mamba_rev(x.flip(1)).flip(1)
        y: Tensor = self.mamba_fwd(x) + backwards
        return y


class Mamba(nn.Module):
    """The selective state space of Mamba."""

    def __init__(self, width: int) -> None:
        super().__init__()
        inner, self.rank = 2 * width, max(1, width // 16)
        self.in_proj = nn.Linear(width, 2 * inner, bias=False)
        self.conv1d = nn.Conv1d(inner, inner, 4, padding=3, groups=inner)
        self.x_proj = nn.Linear(inner, self.rank + 2 * STATES, bias=False)
        self.dt_proj = nn.Linear(self.rank, inner)
        self.A_log = nn.Parameter(torch.arange(1.0, STATES + 1).log().repeat(inner, 1))
        self.D = nn.Parameter(torch.ones(inner))
        self.out_proj = nn.Linear(inner, width, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        x, gate = self.in_proj(hidden).chunk(2, dim=-1)
        x = F.silu(self.conv1d(x.transpose(1, 2))[..., : hidden.shape[1]]).transpose(1, 2)
        y = self.scan(x) + x * self.D
        out: Tensor = self.out_proj(y * F.silu(gate))
        return out

    def scan(self, x: Tensor) -> Tensor:
        """state = exp(dt A) state + dt B x; y = C state: token after token."""
        dt, b, c = self.x_proj(x).split([self.rank, STATES, STATES], dim=-1)
        dt = F.softplus(self.dt_proj(dt))[..., None]  # [batch, tokens, inner, 1]
        decay = torch.exp(dt * -torch.exp(self.A_log))
        inflow = dt * b[:, :, None] * x[..., None]
        state = torch.zeros_like(inflow[:, 0])
        outflow = []
        for token in range(x.shape[1]):
            state = decay[:, token] * state + inflow[:, token]
            outflow.append((state * c[:, token, None]).sum(dim=-1))
        return torch.stack(outflow, dim=1)
