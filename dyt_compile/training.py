"""Models to be trained with Dynamic Tanh from scratch: their norms replaced before training."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from .dyt import initial_alpha
from .errors import OptionError
from .nn import SQUASHES, DynamicTanh

__all__ = ["ScaledEmbedding", "convert_for_training"]

BEFORE_ATTENTION = {
    "attention_norm", "attn_norm", "input_layernorm", "k_norm", "layernorm_before", "ln1", "ln_1",
    "norm1", "norm_1", "pre_attention_norm", "q_norm",
}  # fmt: skip
"""Last names of norms whose output attention reads, in common models."""

TOLERANCE = 1e-3
"""Relative: norms compute in float32, and add an eps that a probe does not know."""

LAYER, RMS = "layer", "rms"


class ScaledEmbedding(torch.nn.Embedding):
    """An embedding times a learned scalar, which starts at the root of its width.

    LLaMA needs it with DyT (arXiv 2503.10622): embeddings start small, and nothing
    enlarges them without a norm. It holds the very weight of the embedding that it stands for, so
    that a tied head stays tied.
    """

    def __init__(self, embedding: torch.nn.Embedding) -> None:
        super().__init__(
            embedding.num_embeddings,
            embedding.embedding_dim,
            padding_idx=embedding.padding_idx,
            _weight=embedding.weight.detach(),
        )
        self.weight = embedding.weight
        start = math.sqrt(embedding.embedding_dim)
        self.scale = torch.nn.Parameter(torch.full((1,), start, device=embedding.weight.device))

    def forward(self, tokens: Tensor) -> Tensor:
        """Scaled rows of the weight, in its dtype."""
        rows: Tensor = super().forward(tokens)
        return (rows * self.scale).to(rows.dtype)


def convert_for_training(
    model: torch.nn.Module,
    alpha: float | str = "auto",
    *,
    squash: str = "tanh",
    embedding_scale: bool | None = None,
) -> torch.nn.Module:
    """A copy of an untrained model with DyT in place of its LayerNorms and RMSNorms.

    Modules whose class is called a norm are run on random numbers: what normalizes each position
    over its channels (the last axis, or axis 1 of images) is replaced, with a gamma and a beta
    where the norm had them; batch, group and instance norms stay. Norms that are written out
    inside another module are not found: for a trained model, which is another matter, there is
    `convert`.

    alpha: a number for all, or "auto": by width as in LLaMA where the norms are RMSNorms behind a
    token embedding (Table 12: norms before attention apart, known by their names), else 0.5, and
    1 where there are at most 128 channels. squash: as for `DynamicTanh`. embedding_scale: whether
    the token embedding gets a learned scale; by default in such language models.

    Raises OptionError where there is no norm, and for values that are not allowed.
    """
    _check_alpha(alpha)
    if squash not in tuple(SQUASHES):
        raise OptionError(f"squash is {squash!r}; allowed: {', '.join(SQUASHES)}")
    changed = copy.deepcopy(model)
    found = dict(_norms(changed))
    if not found:
        raise OptionError(
            f"{type(model).__name__} has no module that is a LayerNorm or an RMSNorm: "
            "nothing to replace"
        )
    embedding = _token_embedding(changed, {norm.width for norm in found.values()})
    made: dict[int, DynamicTanh] = {}
    for path, norm in found.items():
        key = id(norm.module)  # a module that is called in two places stays one
        if key not in made:
            llama = norm.kind == RMS and embedding is not None
            attention = path.rpartition(".")[2] in BEFORE_ATTENTION
            start = initial_alpha(norm.width, attention=attention, llama=llama)
            made[key] = norm.replacement(start if alpha == "auto" else float(alpha), squash)
        _put(changed, path, made[key])
    if embedding_scale is None:
        embedding_scale = all(norm.kind == RMS for norm in found.values())
    if embedding_scale and embedding is not None:
        path, held = embedding
        _put(changed, path, ScaledEmbedding(held))
    return changed


def _check_alpha(alpha: Any) -> None:
    if alpha != "auto" and (not isinstance(alpha, Real) or not float(alpha) > 0):
        raise OptionError(f"alpha is {alpha!r}; allowed: 'auto', or a number above 0")


@dataclass(frozen=True)
class _Norm:
    """A module that normalizes over its channels."""

    module: torch.nn.Module
    kind: str
    width: int
    spatial_axes: int

    def replacement(self, alpha: float, squash: str) -> DynamicTanh:
        """Dynamic Tanh of the same width, with the parameters that the norm had."""
        own = list(self.module.parameters())
        return DynamicTanh(
            self.width,
            alpha,
            squash=squash,
            affine=bool(own),
            bias=len(own) > 1,
            spatial_axes=self.spatial_axes,
            device=own[0].device if own else None,
            dtype=own[0].dtype if own else None,
        ).train(self.module.training)


def _norms(model: torch.nn.Module) -> Iterator[tuple[str, _Norm]]:
    for path, module in model.named_modules(remove_duplicate=False):
        if path and "norm" in type(module).__name__.lower() and not list(module.children()):
            norm = _recognised(module)
            if norm is not None:
                yield path, norm


def _recognised(module: torch.nn.Module) -> _Norm | None:
    """What a module normalizes by, known by what it computes; None where it is something else."""
    own = list(module.parameters())
    shape = own[0].shape if own else tuple(getattr(module, "normalized_shape", ()))
    width = math.prod(shape)
    if not shape or max(shape) != width or len(own) > 2 or width < 2:
        return None
    random = torch.Generator().manual_seed(0)
    probe = copy.deepcopy(module).to_empty(device="cpu").double().eval()
    with torch.no_grad():
        for parameter in probe.parameters():
            parameter.copy_(1 + 0.3 * torch.rand(parameter.shape, generator=random))
    spatial = 5 if width != 5 else 7
    for axes, size in ((0, (3, 6, width)), (2, (2, width, 3, spatial))):
        x = 1 + 3 * torch.randn(size, generator=random, dtype=torch.float64)
        kind = _kind(x, _run(probe, x), -1 if axes == 0 else 1)
        if kind is not None:
            return _Norm(module, kind, width, axes)
    return None


def _run(module: torch.nn.Module, x: Tensor) -> Tensor | None:
    """What a module makes of x; None where it does not take such an x."""
    try:
        with torch.no_grad():
            y: Any = module(x)
    except (RuntimeError, TypeError, ValueError, IndexError):
        return None
    return y if isinstance(y, Tensor) and y.shape == x.shape else None


def _kind(x: Tensor, y: Tensor | None, axis: int) -> str | None:
    """Whether y is, channel by channel, a linear function of the normalized x; of which norm."""
    if y is None:
        return None
    x, y = x.movedim(axis, -1).flatten(0, -2), y.movedim(axis, -1).flatten(0, -2).to(x.dtype)
    centred = x - x.mean(-1, keepdim=True)
    y = y - y.mean(0)
    for kind, rows in ((LAYER, centred), (RMS, x)):
        normed = rows / rows.square().mean(-1, keepdim=True).sqrt()
        normed = normed - normed.mean(0)
        slope = (normed * y).sum(0) / normed.square().sum(0)
        if float((y - slope * normed).norm()) <= TOLERANCE * float(y.norm()):
            return kind
    return None


def _token_embedding(
    model: torch.nn.Module, widths: set[int]
) -> tuple[str, torch.nn.Embedding] | None:
    """The plain embedding of most rows among those as wide as a norm."""
    found = [
        (path, module)
        for path, module in model.named_modules()
        if type(module) is torch.nn.Embedding and module.embedding_dim in widths
    ]
    return max(found, key=lambda entry: entry[1].num_embeddings, default=None)


def _put(model: torch.nn.Module, path: str, module: torch.nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)
