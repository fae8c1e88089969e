"""Small architectures for the tests: every spelling of a norm, what only looks like one, and DyT.

A `Branch` is a layer, something under test called `norm`, and another layer; a `Gallery` is many
branches side by side, so that one export covers them all.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dyt_compile.dyt import DytParameters

CHANNELS = 12
HEADS = 3
TOKENS = 5
SEED = 20250314

Array = npt.NDArray[Any]
Module = TypeVar("Module", bound=nn.Module)
Formula = Callable[[Any, Tensor], Tensor]


class Spelled(nn.Module):
    """A norm written out: `formula(self, x)`, with parameters `weight` and `bias`."""

    weight: Tensor
    bias: Tensor

    def __init__(
        self,
        formula: Formula,
        shape: tuple[int, ...] | None = (CHANNELS,),
        *,
        bias: bool = True,
        eps: float = 1e-5,
    ) -> None:
        super().__init__()
        self.formula = formula
        self.eps = eps
        weight = None if shape is None else nn.Parameter(torch.ones(shape))
        self.register_parameter("weight", weight)
        shift = None if shape is None or not bias else nn.Parameter(torch.zeros(shape))
        self.register_parameter("bias", shift)

    def forward(self, x: Tensor) -> Tensor:
        return self.formula(self, x)


class Branch(nn.Module):
    """last(norm(first(x))), in one of the layouts of LAYOUTS."""

    def __init__(self, norm: nn.Module, layout: str = "tokens") -> None:
        super().__init__()
        if layout == "image":
            self.first: nn.Module = nn.Conv2d(CHANNELS, CHANNELS, 1)
            self.last: nn.Module = nn.Conv2d(CHANNELS, CHANNELS, 1)
        elif layout == "heads":
            split = nn.Unflatten(-1, (HEADS, CHANNELS // HEADS))
            self.first = nn.Sequential(nn.Linear(CHANNELS, CHANNELS), split)
            self.last = nn.Sequential(nn.Flatten(-2), nn.Linear(CHANNELS, CHANNELS))
        else:
            self.first = nn.Linear(CHANNELS, CHANNELS)
            self.last = nn.Linear(CHANNELS, CHANNELS)
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.last(self.norm(self.first(x)))
        return y


class Modulated(Branch):
    """A norm without affine, scaled and shifted by a condition (adaLN of DiT, PixArt, SD3)."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__(norm)
        self.condition = nn.Linear(CHANNELS, 2 * CHANNELS)

    def forward(self, x: Tensor) -> Tensor:
        scale, shift = self.condition(x.mean(dim=1, keepdim=True)).chunk(2, dim=-1)
        y: Tensor = self.last(self.norm(self.first(x)) * (1 + scale) + shift)
        return y


class Residual(Branch):
    """Pre-norm with its residual add, as in every transformer block."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        y: Tensor = x + self.last(self.norm(x))
        return y


class Gallery(nn.Module):
    """Branches side by side, each with layers of its own; one output a branch, in order."""

    def __init__(self, branches: Mapping[str, Branch], layouts: Mapping[str, str]) -> None:
        super().__init__()
        self.names = tuple(branches)
        self.layouts = dict(layouts)
        for name, branch in branches.items():
            self.add_module(name, branch)

    def forward(self, tokens: Tensor, image: Tensor) -> tuple[Tensor, ...]:
        inputs = {name: image if self.layouts[name] == "image" else tokens for name in self.names}
        return tuple(self.get_submodule(name)(inputs[name]) for name in self.names)


@dataclass(frozen=True)
class Spelling:
    """A norm, and what matching must say of it.

    gamma: what its weight is multiplied by, and what is added to it, before x is scaled.
    """

    name: str
    build: Callable[[], nn.Module]
    kind: str
    eps: float
    affine: tuple[str, ...]
    axes: tuple[int, ...] = (-1,)
    layout: str = "tokens"
    offset: float = 0.0
    modulated: bool = False

    @property
    def channels(self) -> int:
        return CHANNELS // HEADS if self.layout == "heads" else CHANNELS

    def branch(self) -> Branch:
        """The spelling in its layout, with random weights, the same ones each time."""
        norm = self.build()
        branch = Modulated(norm) if self.modulated else Branch(norm, self.layout)
        return randomized(branch, self.name)

    def gamma(self, norm: nn.Module) -> Array | None:
        """The value that scales the normalized x, flat."""
        return self._flat(norm, "weight", self.offset)

    def beta(self, norm: nn.Module) -> Array | None:
        """The value that is added last, flat."""
        return self._flat(norm, "bias", 0.0)

    def _flat(self, norm: nn.Module, name: str, offset: float) -> Array | None:
        parameter = getattr(norm, name, None)
        if not isinstance(parameter, Tensor):
            return None
        return (parameter.detach().float() + offset).flatten().numpy()


@dataclass(frozen=True)
class NearMiss:
    """What only looks like a norm or a DyT. kind: of the refusal that is due, None if none is."""

    name: str
    build: Callable[[], nn.Module]
    kind: str | None = None
    reason: str = ""
    layout: str = "tokens"

    def branch(self) -> Branch:
        return randomized(Branch(self.build(), self.layout), self.name)


class HandDyT(nn.Module):
    """DyT written straight from its formula, computed in float32 between casts."""

    def __init__(self, parameters: DytParameters) -> None:
        super().__init__()
        self.parameters_by_hand = parameters

    def forward(self, x: Tensor) -> Tensor:
        p = self.parameters_by_hand
        y = torch.tanh(torch.from_numpy(p.alpha) * x.float())
        if p.gamma is not None:
            y = y * torch.from_numpy(p.gamma)
        if p.beta is not None:
            y = y + torch.from_numpy(p.beta)
        return y.to(x.dtype)


def randomized(module: Module, name: str) -> Module:
    """The module in evaluation mode with weights that tell its channels apart."""
    generator = torch.Generator().manual_seed(SEED + zlib.crc32(name.encode()))
    with torch.no_grad():
        for path, parameter in module.named_parameters():
            if path.startswith("norm"):
                parameter.uniform_(0.5, 1.5, generator=generator)
            else:
                parameter.normal_(0, 0.4, generator=generator)
    return module.eval()


def example(layout: str = "tokens", dtype: torch.dtype = torch.float32, rows: int = 2) -> Tensor:
    """An input of the layout."""
    generator = torch.Generator().manual_seed(SEED)
    shape = (rows, CHANNELS, 4, 6) if layout == "image" else (rows, TOKENS, CHANNELS)
    return torch.randn(shape, generator=generator).to(dtype)


def gallery(entries: Iterable[Spelling | NearMiss | Trained]) -> Gallery:
    """All entries in one model; each entry's norm is at `<name>.norm`."""
    entries = tuple(entries)
    return Gallery(
        {entry.name: entry.branch() for entry in entries},
        {entry.name: entry.layout for entry in entries},
    ).eval()


def examples() -> tuple[Tensor, Tensor]:
    """The inputs of a gallery."""
    return example("tokens"), example("image")


def dyt_parameters(
    shape: tuple[int, ...], affine: Iterable[str] = ("gamma", "beta"), seed: int = 0
) -> DytParameters:
    """Known parameters, none of them neutral."""
    random = np.random.default_rng(seed)
    named: dict[str, Any] = {
        name: random.uniform(0.5, 1.5, shape).astype(np.float32) for name in affine
    }
    return DytParameters(np.array([0.6], np.float32), **named)


def by_hand(branch: Branch, parameters: DytParameters, spelling: Spelling | None = None) -> Branch:
    """The branch with DyT in the place of its norm; shares the other layers.

    A spelling whose channels lie first, but which normalizes the last axis, permutes around it.
    """
    if spelling is not None and spelling.layout == "image" and spelling.axes == (-1,):
        parameters = replace(
            parameters,
            gamma=None if parameters.gamma is None else parameters.gamma.reshape(IMAGE_SHAPE),
            beta=None if parameters.beta is None else parameters.beta.reshape(IMAGE_SHAPE),
        )
    twin = type(branch).__new__(type(branch))
    nn.Module.__init__(twin)
    for name, child in branch.named_children():
        twin.add_module(name, HandDyT(parameters) if name == "norm" else child)
    return twin.eval()


# Norms as they are written.


def llama(self: Spelled, x: Tensor) -> Tensor:
    dtype = x.dtype
    x = x.to(torch.float32)
    variance = x.pow(2).mean(-1, keepdim=True)
    x = x * torch.rsqrt(variance + self.eps)
    return self.weight * x.to(dtype)


def olmo(self: Spelled, x: Tensor) -> Tensor:
    dtype = x.dtype
    x = x.to(torch.float32)
    x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)
    return (self.weight * x).to(dtype)


def gemma(self: Spelled, x: Tensor) -> Tensor:
    y = x.float()
    y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + self.eps)
    y = y * (1.0 + self.weight.float())
    return y.type_as(x)


def t5(self: Spelled, x: Tensor) -> Tensor:
    variance = x.to(torch.float32).pow(2).mean(-1, keepdim=True)
    x = x * torch.rsqrt(variance + self.eps)
    if self.weight.dtype in (torch.float16, torch.bfloat16):
        x = x.to(self.weight.dtype)
    return self.weight * x


def caduceus(self: Spelled, x: Tensor) -> Tensor:
    inverse = torch.reciprocal(torch.sqrt(x.square().mean(-1, keepdim=True) + self.eps))
    return x * inverse * self.weight


def image_gpt(self: Spelled, x: Tensor) -> Tensor:
    return (
        x / torch.sqrt(torch.mean(torch.square(x), dim=-1, keepdim=True) + self.eps) * self.weight
    )


def deepseek(self: Spelled, x: Tensor) -> Tensor:
    factor = torch.rsqrt(x.float().square().mean(-1, keepdim=True) + self.eps).to(x.dtype)
    return x * factor * self.weight


def rms_sum(self: Spelled, x: Tensor) -> Tensor:
    return x * torch.rsqrt((x * x).sum(-1, keepdim=True) / x.shape[-1] + self.eps) * self.weight


def rms_power(self: Spelled, x: Tensor) -> Tensor:
    return self.weight * ((x**2).mean(-1, keepdim=True) + self.eps) ** -0.5 * x


def normalize_gamma(self: Spelled, x: Tensor) -> Tensor:
    return F.normalize(x, dim=-1) * math.sqrt(x.shape[-1]) * self.weight


def normalize_image(self: Spelled, x: Tensor) -> Tensor:
    return F.normalize(x, dim=1) * self.weight * math.sqrt(x.shape[1])


def x_transformers_rms(self: Spelled, x: Tensor) -> Tensor:
    return F.normalize(x, dim=-1) * math.sqrt(CHANNELS) * (self.weight + 1.0)


def bert_by_hand(self: Spelled, x: Tensor) -> Tensor:
    u = x.mean(-1, keepdim=True)
    s = (x - u).pow(2).mean(-1, keepdim=True)
    x = (x - u) / torch.sqrt(s + self.eps)
    return self.weight * x + self.bias


def cohere(self: Spelled, x: Tensor) -> Tensor:
    dtype = x.dtype
    x = x.to(torch.float32)
    mean = x.mean(-1, keepdim=True)
    variance = (x - mean).pow(2).mean(-1, keepdim=True)
    x = (x - mean) * torch.rsqrt(variance + self.eps)
    x = self.weight.to(torch.float32) * x
    return x.to(dtype)


def deberta(self: Spelled, x: Tensor) -> Tensor:
    dtype = x.dtype
    x = x.float()
    mean = x.mean(-1, keepdim=True)
    variance = (x - mean).pow(2).mean(-1, keepdim=True)
    x = (x - mean) / torch.sqrt(variance + self.eps)
    return self.weight * x.to(dtype) + self.bias


def layer_var(self: Spelled, x: Tensor) -> Tensor:
    variance = x.var(-1, unbiased=False, keepdim=True)
    return (x - x.mean(-1, keepdim=True)) * torch.rsqrt(
        variance + self.eps
    ) * self.weight + self.bias


def layer_var_mean(self: Spelled, x: Tensor) -> Tensor:
    variance, mean = torch.var_mean(x, dim=-1, correction=0, keepdim=True)
    return (x - mean) * (variance + self.eps).pow(-0.5) * self.weight + self.bias


def layer_two_moments(self: Spelled, x: Tensor) -> Tensor:
    mean = x.mean(-1, keepdim=True)
    variance = (x * x).mean(-1, keepdim=True) - mean * mean
    return (x - mean) / torch.sqrt(variance + self.eps) * self.weight + self.bias


def layer_power(self: Spelled, x: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return (
        centred * ((centred**2).mean(-1, keepdim=True) + self.eps) ** -0.5 * self.weight + self.bias
    )


def layer_rsqrt(self: Spelled, x: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    factor = torch.rsqrt(centred.pow(2).mean(-1, keepdim=True) + self.eps)
    return centred * factor * self.weight + self.bias


def layer_reciprocal(self: Spelled, x: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    deviation = torch.sqrt(centred.square().mean(-1, keepdim=True) + self.eps)
    return torch.reciprocal(deviation) * centred * self.weight + self.bias


def layer_sum(self: Spelled, x: Tensor) -> Tensor:
    count = x.shape[-1]
    centred = x - x.sum(-1, keepdim=True) / count
    variance = (centred * centred).sum(-1, keepdim=True) / count
    return centred / (variance + self.eps).sqrt() * self.weight + self.bias


def layer_commuted(self: Spelled, x: Tensor) -> Tensor:
    centred = -(x.mean(-1, keepdim=True) - x)
    factor = torch.rsqrt(self.eps + torch.mean(centred * centred, -1, keepdim=True))
    return self.bias + factor * (self.weight * centred)


def layer_scale_first(self: Spelled, x: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    factor = torch.rsqrt((centred * centred).mean(-1, keepdim=True) + self.eps)
    return centred * (factor * self.weight) + self.bias


def layer_gamma_first(self: Spelled, x: Tensor) -> Tensor:
    mean = x.mean(-1, keepdim=True)
    variance = (x - mean).pow(2).mean(-1, keepdim=True)
    return self.weight * (x - mean) / torch.sqrt(variance + self.eps) + self.bias


def layer_folded(self: Spelled, x: Tensor) -> Tensor:
    mean = x.mean(-1, keepdim=True)
    variance = (x - mean).square().mean(-1, keepdim=True)
    factor = torch.rsqrt(variance + self.eps) * self.weight
    return x * factor + (self.bias - mean * factor)


def layer_no_keepdim(self: Spelled, x: Tensor) -> Tensor:
    mean = x.mean(-1).unsqueeze(-1)
    factor = (x.var(-1, correction=0) + self.eps).rsqrt()
    return (x - mean) * factor[..., None] * self.weight + self.bias


def layer_bare(self: Spelled, x: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / torch.sqrt(centred.pow(2).mean(-1, keepdim=True) + self.eps)


def rms_bare(self: Spelled, x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)


def convnext(self: Spelled, x: Tensor) -> Tensor:
    u = x.mean(1, keepdim=True)
    s = (x - u).pow(2).mean(1, keepdim=True)
    x = (x - u) / torch.sqrt(s + self.eps)
    return self.weight[:, None, None] * x + self.bias[:, None, None]


def rms_image(self: Spelled, x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(1, keepdim=True) + self.eps) * self.weight


def timm_image(self: Spelled, x: Tensor) -> Tensor:
    x = x.permute(0, 2, 3, 1)
    x = F.layer_norm(x, (CHANNELS,), self.weight, self.bias, self.eps)
    return x.permute(0, 3, 1, 2)


LAYER = ("gamma", "beta")
RMS = ("gamma",)
IMAGE_SHAPE = (CHANNELS, 1, 1)


def _layer(name: str, formula: Formula) -> Spelling:
    return Spelling(name, lambda: Spelled(formula), "layer_norm", 1e-5, LAYER)


def _rms(name: str, formula: Formula, **others: Any) -> Spelling:
    return Spelling(
        name, lambda: Spelled(formula, bias=False, eps=1e-6), "rms_norm", 1e-6, RMS, **others
    )


WHOLE = (
    Spelling("layer_norm", lambda: nn.LayerNorm(CHANNELS), "layer_norm", 1e-5, LAYER),
    Spelling(
        "layer_norm_bert", lambda: nn.LayerNorm(CHANNELS, eps=1e-12), "layer_norm", 1e-12, LAYER
    ),
    Spelling(
        "layer_norm_without_bias", lambda: nn.LayerNorm(CHANNELS, bias=False),
        "layer_norm", 1e-5, RMS,
    ),
    Spelling(
        "layer_norm_without_affine", lambda: nn.LayerNorm(CHANNELS, elementwise_affine=False),
        "layer_norm", 1e-5, (),
    ),
    Spelling("rms_norm", lambda: nn.RMSNorm(CHANNELS, eps=1e-6), "rms_norm", 1e-6, RMS),
    Spelling(
        "rms_norm_default_eps", lambda: nn.RMSNorm(CHANNELS), "rms_norm",
        torch.finfo(torch.float32).eps, RMS,
    ),
    Spelling(
        "rms_norm_without_affine",
        lambda: nn.RMSNorm(CHANNELS, eps=1e-6, elementwise_affine=False), "rms_norm", 1e-6, (),
    ),
    Spelling(
        "ada_ln", lambda: nn.LayerNorm(CHANNELS, eps=1e-6, elementwise_affine=False),
        "layer_norm", 1e-6, (), modulated=True,
    ),
    Spelling(
        "layer_norm_2d_permuted", lambda: Spelled(timm_image), "layer_norm", 1e-5, LAYER,
        layout="image",
    ),
)  # fmt: skip
"""Norms that are one operator; the site of a permuted one lies between its permutes."""

WRITTEN = (
    _rms("llama", llama),
    _rms("olmo", olmo),
    _rms("gemma", gemma, offset=1.0),
    _rms("t5", t5),
    _rms("caduceus", caduceus),
    _rms("image_gpt", image_gpt),
    _rms("deepseek", deepseek),
    _rms("rms_sum", rms_sum),
    _rms("rms_power", rms_power),
    Spelling(
        "normalize_gamma", lambda: Spelled(normalize_gamma, bias=False), "rms_norm", 0.0, RMS
    ),
    Spelling(
        "normalize_unit_offset", lambda: Spelled(x_transformers_rms, bias=False), "rms_norm", 0.0,
        RMS, offset=1.0,
    ),
    Spelling(
        "normalize_image", lambda: Spelled(normalize_image, IMAGE_SHAPE, bias=False),
        "rms_norm", 0.0, RMS, axes=(-3,), layout="image",
    ),
    Spelling("rms_bare", lambda: Spelled(rms_bare, None), "rms_norm", 1e-5, ()),
    Spelling(
        "rms_image", lambda: Spelled(rms_image, IMAGE_SHAPE, bias=False), "rms_norm", 1e-5, RMS,
        axes=(-3,), layout="image",
    ),
    _layer("bert_by_hand", bert_by_hand),
    _layer("deberta", deberta),
    _layer("layer_var", layer_var),
    _layer("layer_var_mean", layer_var_mean),
    _layer("layer_two_moments", layer_two_moments),
    _layer("layer_power", layer_power),
    _layer("layer_rsqrt", layer_rsqrt),
    _layer("layer_reciprocal", layer_reciprocal),
    _layer("layer_sum", layer_sum),
    _layer("layer_commuted", layer_commuted),
    _layer("layer_scale_first", layer_scale_first),
    _layer("layer_gamma_first", layer_gamma_first),
    _layer("layer_folded", layer_folded),
    _layer("layer_no_keepdim", layer_no_keepdim),
    Spelling("layer_bare", lambda: Spelled(layer_bare, None), "layer_norm", 1e-5, ()),
    Spelling(
        "cohere",
        lambda: Spelled(cohere, (HEADS, CHANNELS // HEADS), bias=False),
        "layer_norm", 1e-5, RMS, layout="heads",
    ),
    Spelling(
        "convnext", lambda: Spelled(convnext), "layer_norm", 1e-5, LAYER, axes=(-3,), layout="image"
    ),
)  # fmt: skip
"""Norms written out in smaller operators."""

SPELLINGS = WHOLE + WRITTEN


# What only looks like a norm.


def unbiased(self: Spelled, x: Tensor) -> Tensor:
    variance = x.var(-1, unbiased=True, keepdim=True)
    return (x - x.mean(-1, keepdim=True)) / torch.sqrt(
        variance + self.eps
    ) * self.weight + self.bias


def eps_outside(self: Spelled, x: Tensor) -> Tensor:
    deviation = x.var(-1, unbiased=False, keepdim=True).sqrt()
    return self.weight * (x - x.mean(-1, keepdim=True)) / (deviation + self.eps) + self.bias


def annotated_transformer(self: Spelled, x: Tensor) -> Tensor:
    mean, deviation = x.mean(-1, keepdim=True), x.std(-1, keepdim=True)
    return self.weight * (x - mean) / (deviation + self.eps) + self.bias


def rms_eps_outside(self: Spelled, x: Tensor) -> Tensor:
    return self.weight * x / (torch.sqrt(x.pow(2).mean(-1, keepdim=True)) + self.eps)


def length(self: Spelled, x: Tensor) -> Tensor:
    return x * torch.rsqrt((x * x).sum(-1, keepdim=True) + self.eps)


def normalize(self: Spelled, x: Tensor) -> Tensor:
    return F.normalize(x, dim=-1)


def grn(self: Spelled, x: Tensor) -> Tensor:
    x = x.permute(0, 2, 3, 1)
    spread: Tensor = x.norm(p=2, dim=(1, 2), keepdim=True)
    scaled = spread / (spread.mean(dim=-1, keepdim=True) + self.eps)
    y: Tensor = x + self.bias + self.weight * x * scaled
    return y.permute(0, 3, 1, 2)


def simple_norm(self: Spelled, x: Tensor) -> Tensor:
    return x * torch.rsqrt(torch.var(x, dim=-1, keepdim=True) + self.eps) * self.weight


def centred_by_rms(self: Spelled, x: Tensor) -> Tensor:
    factor = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)
    return (x - x.mean(-1, keepdim=True)) * factor * self.weight


def uncentred_by_deviation(self: Spelled, x: Tensor) -> Tensor:
    return x / torch.sqrt(x.var(-1, unbiased=False, keepdim=True) + self.eps) * self.weight


def two_axes_by_hand(self: Spelled, x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean((-2, -1), keepdim=True) + self.eps)


def wrong_axis(self: Spelled, x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) / x.var(-2, keepdim=True)


def centred_only(self: Spelled, x: Tensor) -> Tensor:
    return (x - x.mean(-1, keepdim=True)) * self.weight + self.bias


def softmax_by_hand(self: Spelled, x: Tensor) -> Tensor:
    powers = torch.exp(x - x.amax(-1, keepdim=True))
    return powers / powers.sum(-1, keepdim=True)


def clip_logits(self: Spelled, x: Tensor) -> Tensor:
    image = x / torch.pow(torch.sum(torch.pow(x, 2), dim=-1, keepdim=True), 0.5)
    text: Tensor = self.weight / self.weight.norm(p=2, dim=-1, keepdim=True)
    return image * (image @ text.unsqueeze(-1))


def attention_scale(self: Spelled, x: Tensor) -> Tensor:
    scores = torch.softmax(x @ x.transpose(-2, -1) / torch.sqrt(torch.tensor(float(CHANNELS))), -1)
    return scores @ x


def reweighted(self: Spelled, x: Tensor) -> Tensor:
    weight = self.weight / torch.sqrt(self.weight.pow(2).mean() + self.eps)
    return x * weight


def l1(self: Spelled, x: Tensor) -> Tensor:
    return x / (x.abs().mean(-1, keepdim=True) + self.eps)


def cubed(self: Spelled, x: Tensor) -> Tensor:
    return x * (x.pow(2).mean(-1, keepdim=True) + self.eps).pow(-0.3)


class ReadVariance(nn.Module):
    """A LayerNorm whose variance someone else reads, too."""

    def forward(self, x: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        variance = centred.pow(2).mean(-1, keepdim=True)
        return torch.cat([centred * torch.rsqrt(variance + 1e-5), variance], dim=-1)[..., :CHANNELS]


NEAR_MISSES = (
    NearMiss("unbiased", lambda: Spelled(unbiased), "other", "unbiased"),
    NearMiss("eps_outside", lambda: Spelled(eps_outside), "other", "outside"),
    NearMiss("annotated_transformer", lambda: Spelled(annotated_transformer), "other", "outside"),
    NearMiss("rms_eps_outside", lambda: Spelled(rms_eps_outside), "other", "outside"),
    NearMiss("two_axes", lambda: nn.LayerNorm([TOKENS, CHANNELS]), "other", "2 axes"),
    NearMiss("two_axes_by_hand", lambda: Spelled(two_axes_by_hand), "other", "2 axes"),
    NearMiss("length", lambda: Spelled(length)),
    NearMiss("normalize", lambda: Spelled(normalize)),
    NearMiss("grn", lambda: Spelled(grn), layout="image"),
    NearMiss("weight_norm", lambda: nn.utils.parametrizations.weight_norm(
        nn.Conv2d(CHANNELS, CHANNELS, 1)), layout="image"),
    NearMiss("simple_norm", lambda: Spelled(simple_norm), "other", "mean"),
    NearMiss("centred_by_rms", lambda: Spelled(centred_by_rms), "other", "mean"),
    NearMiss("uncentred_by_deviation", lambda: Spelled(uncentred_by_deviation), "other", "mean"),
    NearMiss("centred_only", lambda: Spelled(centred_only)),
    NearMiss("softmax", lambda: nn.Softmax(-1)),
    NearMiss("softmax_by_hand", lambda: Spelled(softmax_by_hand)),
    NearMiss("clip_logits", lambda: Spelled(clip_logits)),
    NearMiss("attention_scale", lambda: Spelled(attention_scale)),
    NearMiss("reweighted", lambda: Spelled(reweighted)),
    NearMiss("l1", lambda: Spelled(l1)),
    NearMiss("cubed", lambda: Spelled(cubed)),
    NearMiss("group_norm", lambda: nn.GroupNorm(3, CHANNELS), "group_norm", layout="image"),
    NearMiss(
        "instance_norm", lambda: nn.InstanceNorm2d(CHANNELS, affine=True), "instance_norm",
        layout="image",
    ),
)  # fmt: skip

BATCH_NORM = NearMiss("batch_norm", lambda: nn.BatchNorm2d(CHANNELS), "batch_norm", layout="image")
"""Folded into the convolution before it in ONNX, so only torch graphs show it."""


# Models that were trained with DyT.


class OfficialDyT(nn.Module):
    """DynamicTanh of the paper's repository: alpha [1], weight, bias."""

    def __init__(self, channels_last: bool = True) -> None:
        super().__init__()
        self.channels_last = channels_last
        self.alpha = nn.Parameter(torch.ones(1) * 0.5)
        self.weight = nn.Parameter(torch.ones(CHANNELS))
        self.bias = nn.Parameter(torch.zeros(CHANNELS))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.alpha * x)
        if self.channels_last:
            return x * self.weight + self.bias
        return x * self.weight[:, None, None] + self.bias[:, None, None]


class LigerDyT(nn.Module):
    """Liger's DyT, its reference formula; beta is optional."""

    def __init__(self, beta: bool = True) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.ones(1) * 0.5)
        self.gamma = nn.Parameter(torch.ones(CHANNELS))
        self.beta = nn.Parameter(torch.zeros(CHANNELS)) if beta else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.gamma * torch.tanh((x * self.alpha).float()).to(x.dtype)
        return y if self.beta is None else y + self.beta


class XTransformersDyT(nn.Module):
    """DynamicTanh of x-transformers, with its unit offsets."""

    def __init__(self, unit_offset: bool = True) -> None:
        super().__init__()
        self.pre_tanh_scale = nn.Parameter(torch.tensor(0.5))
        self.gamma = nn.Parameter(torch.ones(CHANNELS))
        self.beta = nn.Parameter(torch.zeros(CHANNELS))
        self.offset = 1.0 if unit_offset else 0.0

    def forward(self, x: Tensor) -> Tensor:
        scale = self.pre_tanh_scale + self.offset
        return (x * scale).tanh() * (self.gamma + self.offset) + self.beta


class LlamaDyT(nn.Module):
    """DyT in the paper's LLaMA: gamma alone."""

    def __init__(self) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.ones(1) * 0.5)
        self.gamma = nn.Parameter(torch.ones(CHANNELS))

    def forward(self, x: Tensor) -> Tensor:
        return self.gamma * torch.tanh(self.alpha * x)


class Derf(nn.Module):
    """Derf: erf(alpha * x + shift) * weight + bias."""

    def __init__(self) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.ones(1) * 0.5)
        self.shift = nn.Parameter(torch.zeros(1))
        self.weight = nn.Parameter(torch.ones(CHANNELS))
        self.bias = nn.Parameter(torch.zeros(CHANNELS))

    def forward(self, x: Tensor) -> Tensor:
        return torch.erf(self.alpha * x + self.shift) * self.weight + self.bias


@dataclass(frozen=True)
class Trained:
    """A layer that already is DyT or Derf, and where its parameters are."""

    name: str
    build: Callable[[], nn.Module]
    kind: str
    affine: tuple[str, ...]
    parameters: tuple[str, ...]
    offset: float = 0.0
    layout: str = "tokens"

    def branch(self) -> Branch:
        return randomized(Branch(self.build(), self.layout), self.name)


DYT_PARAMETERS = ("alpha", "weight", "bias")

TRAINED = (
    Trained("official", OfficialDyT, "dyt", LAYER, DYT_PARAMETERS),
    Trained("official_image", lambda: OfficialDyT(False), "dyt", LAYER, DYT_PARAMETERS,
            layout="image"),
    Trained("liger", LigerDyT, "dyt", LAYER, ("alpha", "gamma", "beta")),
    Trained("liger_without_beta", lambda: LigerDyT(beta=False), "dyt", RMS, ("alpha", "gamma")),
    Trained("x_transformers", lambda: XTransformersDyT(False), "dyt", LAYER,
            ("pre_tanh_scale", "gamma", "beta")),
    Trained("x_transformers_offset", XTransformersDyT, "dyt", LAYER,
            ("pre_tanh_scale", "gamma", "beta"), offset=1.0),
    Trained("llama_fork", LlamaDyT, "dyt", RMS, ("alpha", "gamma")),
    Trained("derf", Derf, "derf", LAYER, ("alpha", "weight", "bias", "shift")),
)  # fmt: skip


class SoftCap(nn.Module):
    """Gemma-2's cap on logits."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x / 30.0) * 30.0


class NewGelu(nn.Module):
    """GELU by its tanh approximation, written out."""

    def forward(self, x: Tensor) -> Tensor:
        inner = math.sqrt(2.0 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0))
        return 0.5 * x * (1.0 + torch.tanh(inner))


class ErfGelu(nn.Module):
    """GELU by its definition, written out."""

    def forward(self, x: Tensor) -> Tensor:
        return x * 0.5 * (1.0 + torch.erf(x / math.sqrt(2.0)))


class Pooler(nn.Module):
    """BERT's pooler on every token."""

    def __init__(self) -> None:
        super().__init__()
        self.dense = nn.Linear(CHANNELS, CHANNELS)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.dense(x))


class ScaledPooler(Pooler):
    """A tanh layer whose output is scaled per channel: LayerScale behind tanh(Linear)."""

    def __init__(self) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(CHANNELS))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.dense(x)) * self.gamma


class TanhGate(nn.Module):
    """Flamingo's gate: tanh of a learned scalar, times x."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.gate) * x


class GatedTanh(nn.Module):
    """WaveNet's gated unit."""

    def __init__(self) -> None:
        super().__init__()
        self.filter = nn.Linear(CHANNELS, CHANNELS)
        self.gate = nn.Linear(CHANNELS, CHANNELS)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.filter(x)) * torch.sigmoid(self.gate(x))


class FixedTanh(nn.Module):
    """LeCun's scaled tanh: an activation with fixed numbers."""

    def forward(self, x: Tensor) -> Tensor:
        return 1.7159 * torch.tanh(2.0 / 3.0 * x)


TANH_NEAR_MISSES = (
    NearMiss("soft_cap", SoftCap),
    NearMiss("new_gelu", NewGelu),
    NearMiss("gelu_tanh", lambda: nn.GELU(approximate="tanh")),
    NearMiss("gelu", nn.GELU),
    NearMiss("erf_gelu", ErfGelu),
    NearMiss("tanh", nn.Tanh),
    NearMiss("pooler", Pooler),
    NearMiss("scaled_pooler", ScaledPooler),
    NearMiss("tanh_gate", TanhGate),
    NearMiss("gated_tanh", GatedTanh),
    NearMiss("fixed_tanh", FixedTanh),
)


# Whole models for names and cuts.


class Shared(nn.Module):
    """One norm called twice, as in ALBERT."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(CHANNELS, CHANNELS)
        self.norm = nn.LayerNorm(CHANNELS)
        self.second = nn.Linear(CHANNELS, CHANNELS)
        self.last = nn.Linear(CHANNELS, CHANNELS)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.last(self.norm(self.second(self.norm(self.first(x)))))
        return y


class Block(nn.Module):
    """Pre-norm attention and MLP; `norm` makes its two norms."""

    def __init__(self, norm: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.norm1 = norm()
        self.qkv = nn.Linear(CHANNELS, 3 * CHANNELS)
        self.projection = nn.Linear(CHANNELS, CHANNELS)
        self.norm2 = norm()
        self.wide = nn.Linear(CHANNELS, 2 * CHANNELS)
        self.narrow = nn.Linear(2 * CHANNELS, CHANNELS)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        query, key, value = self.qkv(self.norm1(x)).chunk(3, dim=-1)
        scores = query @ key.transpose(-2, -1) / math.sqrt(CHANNELS) + mask
        x = x + self.projection(torch.softmax(scores, dim=-1) @ value)
        y: Tensor = x + self.narrow(F.gelu(self.wide(self.norm2(x))))
        return y


class Transformer(nn.Module):
    """Two blocks, a skip over both, a mask that every block reads, two outputs."""

    def __init__(self, norm: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.embed = nn.Linear(CHANNELS, CHANNELS)
        self.blocks = nn.ModuleList(Block(norm) for _ in range(2))
        self.norm = norm()
        self.head = nn.Linear(CHANNELS, CHANNELS)

    def forward(self, x: Tensor, mask: Tensor) -> dict[str, Tensor]:
        hidden = embedded = self.embed(x)
        bias = (1.0 - mask)[:, None, :] * -1e4
        for block in self.blocks:
            hidden = block(hidden, bias)
        hidden = self.norm(hidden)
        return {"logits": self.head(hidden) + embedded, "hidden": hidden}
