"""Norms in the styles of well-known code bases, and what those have beside them, by every route.

Each formula follows the code that its name tells; all stand side by side in one model a route.
"""

from __future__ import annotations

import functools
import math
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from dyt_compile.graphs.base import Graph
from dyt_compile.graphs.dynamo import Frame
from dyt_compile.passes.capture import capture
from dyt_compile.passes.match import match
from dyt_compile.sites import Match, NormKind
from tests.models import (
    CHANNELS,
    HEADS,
    IMAGE_SHAPE,
    LAYER,
    RMS,
    NearMiss,
    Spelled,
    Spelling,
    examples,
    gallery,
)

pytestmark = pytest.mark.core

D = CHANNELS


def mamba_gate_before(self: Spelled, x: Tensor) -> Tensor:
    y = x.float() * F.silu(x.flip(-1).float())
    y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + self.eps)
    return self.weight * y.to(x.dtype)


def mamba_gate_behind(self: Spelled, x: Tensor) -> Tensor:
    factor = 1 / torch.sqrt(x.square().mean(dim=-1, keepdim=True) + self.eps)
    return (x * factor * self.weight) * F.silu(x.flip(-1))


def mamba_groups(self: Spelled, x: Tensor) -> Tensor:
    heads = x.view(*x.shape[:-1], HEADS, D // HEADS)
    factor = 1 / torch.sqrt(heads.square().mean(-1, keepdim=True) + self.eps)
    return (heads * factor).view(x.shape) * self.weight


def timm_exponent_2d(self: Spelled, x: Tensor) -> Tensor:
    variance, mean = torch.var_mean(x, dim=1, unbiased=False, keepdim=True)
    x = (x - mean) * torch.rsqrt(variance + self.eps)
    return x * self.weight.view(1, -1, 1, 1) + self.bias.view(1, -1, 1, 1)


def timm_rms_2d(self: Spelled, x: Tensor) -> Tensor:
    variance = x.float().square().mean(dim=1, keepdim=True)
    y = (x.float() * torch.rsqrt(variance + self.eps)).to(x.dtype)
    return y * self.weight.view(1, -1, 1, 1)


def restormer(self: Spelled, x: Tensor) -> Tensor:
    y = x.flatten(2).transpose(1, 2)
    deviation = torch.sqrt(y.var(-1, keepdim=True, unbiased=False) + self.eps)
    y = (y - y.mean(-1, keepdim=True)) / deviation * self.weight + self.bias
    return y.transpose(1, 2).reshape(x.shape)


class NafNetFunction(torch.autograd.Function):
    """A norm with a gradient of its own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        mean = x.mean(1, keepdim=True)
        y = (x - mean) / ((x - mean).pow(2).mean(1, keepdim=True) + eps).sqrt()
        return weight.view(1, -1, 1, 1) * y + bias.view(1, -1, 1, 1)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        raise NotImplementedError


def nafnet(self: Spelled, x: Tensor) -> Tensor:
    y: Tensor = NafNetFunction.apply(x, self.weight, self.bias, self.eps)
    return y


def keras(self: Spelled, x: Tensor) -> Tensor:
    mean = x.mean(-1, keepdim=True)
    variance = torch.square(x).mean(-1, keepdim=True) - torch.square(mean)
    inverse = torch.rsqrt(variance + self.eps) * self.weight
    return x * inverse + (self.bias - mean * inverse)


def flax(self: Spelled, x: Tensor) -> Tensor:
    mean = x.mean(-1, keepdim=True)
    variance = torch.clamp((x * x).mean(-1, keepdim=True) - mean * mean, min=0.0)
    return (x - mean) * (torch.rsqrt(variance + self.eps) * self.weight) + self.bias


def nemo_one_plus(self: Spelled, x: Tensor) -> Tensor:
    return F.layer_norm(x, (D,), self.weight + 1, self.bias, self.eps)


def fairseq_fp32(self: Spelled, x: Tensor) -> Tensor:
    y = F.layer_norm(x.float(), (D,), self.weight.float(), self.bias.float(), self.eps)
    return y.type_as(x)


def checkpointed(self: Spelled, x: Tensor) -> Tensor:
    def norm(y: Tensor) -> Tensor:
        deviation = torch.sqrt(y.var(-1, keepdim=True, unbiased=False) + self.eps)
        return (y - y.mean(-1, keepdim=True)) / deviation * self.weight + self.bias

    y: Tensor = checkpoint(norm, x, use_reentrant=False)
    return y


def eps_as_tensor(self: Spelled, x: Tensor) -> Tensor:
    return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + torch.tensor(self.eps))


def lucid_channels(self: Spelled, x: Tensor) -> Tensor:
    variance = torch.var(x, dim=1, unbiased=False, keepdim=True)
    return (x - x.mean(1, keepdim=True)) / (variance + self.eps).sqrt() * self.weight + self.bias


def wan_video(self: Spelled, x: Tensor) -> Tensor:
    return F.normalize(x, dim=1) * math.sqrt(D) * self.weight + 0.0


def pixel_norm(self: Spelled, x: Tensor) -> Tensor:
    return x / torch.sqrt(torch.mean(x**2, dim=1, keepdim=True) + self.eps)


def corrected_unbiased(self: Spelled, x: Tensor) -> Tensor:
    variance = x.var(-1, keepdim=True) * (D - 1) / D
    return (x - x.mean(-1, keepdim=True)) * torch.rsqrt(variance + self.eps) * self.weight


def conv_tasnet_channels(self: Spelled, x: Tensor) -> Tensor:
    y = x.transpose(1, 2)
    y = y - y.mean(1, keepdim=True)
    y = y / torch.pow(y.square().mean(1, keepdim=True) + self.eps, 0.5)
    return (self.weight.view(1, -1, 1) * y + self.bias.view(1, -1, 1)).transpose(1, 2)


def _of(
    formula: Callable[[Spelled, Tensor], Tensor],
    kind: str,
    affine: tuple[str, ...],
    *,
    shape: tuple[int, ...] | None = (D,),
    eps: float = 1e-5,
    **others: Any,
) -> Spelling:
    return Spelling(
        formula.__name__,
        lambda: Spelled(formula, shape, bias="beta" in affine, eps=eps or 1e-5),
        kind, eps, affine, **others,
    )  # fmt: skip


IMAGE: dict[str, Any] = {"axes": (-3,), "layout": "image"}

NORMS = (
    _of(mamba_gate_before, "rms_norm", RMS),
    _of(mamba_gate_behind, "rms_norm", RMS),
    _of(timm_exponent_2d, "layer_norm", LAYER, **IMAGE),
    _of(timm_rms_2d, "rms_norm", RMS, **IMAGE),
    _of(restormer, "layer_norm", LAYER, layout="image"),
    _of(nafnet, "layer_norm", LAYER, **IMAGE),
    _of(keras, "layer_norm", LAYER),
    _of(flax, "layer_norm", LAYER),
    _of(nemo_one_plus, "layer_norm", LAYER, offset=1.0),
    _of(fairseq_fp32, "layer_norm", LAYER),
    _of(checkpointed, "layer_norm", LAYER),
    _of(eps_as_tensor, "rms_norm", RMS),
    _of(lucid_channels, "layer_norm", LAYER, shape=IMAGE_SHAPE, **IMAGE),
    _of(wan_video, "rms_norm", RMS, shape=IMAGE_SHAPE, eps=0.0, **IMAGE),
    _of(pixel_norm, "rms_norm", (), shape=None, **IMAGE),
    _of(corrected_unbiased, "layer_norm", RMS),
    _of(conv_tasnet_channels, "layer_norm", LAYER, axes=(-2,)),
    _of(mamba_groups, "rms_norm", (), layout="tokens"),
)


def group_norm_over_a_view(self: Spelled, x: Tensor) -> Tensor:
    groups = x.reshape(x.shape[0], HEADS, -1)
    deviation = torch.sqrt(groups.var(-1, keepdim=True, unbiased=False) + self.eps)
    groups = (groups - groups.mean(-1, keepdim=True)) / deviation
    return groups.reshape(x.shape) * self.weight + self.bias


def flat_layer_norm(self: Spelled, x: Tensor) -> Tensor:
    flat = x.reshape(x.shape[0], -1)
    return F.layer_norm(flat, flat.shape[1:]).reshape(x.shape) * self.weight + self.bias


def instance_norm_over_a_view(self: Spelled, x: Tensor) -> Tensor:
    y = x.flatten(2)
    y = (y - y.mean(-1, keepdim=True)) * torch.rsqrt(y.var(-1, correction=0)[..., None] + self.eps)
    return y.reshape(x.shape) * self.weight + self.bias


def restormer_without_bias(self: Spelled, x: Tensor) -> Tensor:
    y = x.flatten(2).transpose(1, 2)
    y = y / torch.sqrt(y.var(-1, keepdim=True, unbiased=False) + self.eps) * self.weight
    return y.transpose(1, 2).reshape(x.shape)


def adaptive_instance(self: Spelled, x: Tensor) -> Tensor:
    style = x.flip(-1)
    y = F.instance_norm(x) * style.std((2, 3), keepdim=True)
    return y + style.mean((2, 3), keepdim=True)


def scale_norm(self: Spelled, x: Tensor) -> Tensor:
    return self.weight * x / torch.norm(x, dim=-1, keepdim=True).clamp(min=1e-5)


def cosine_attention(self: Spelled, x: Tensor) -> Tensor:
    q, k = F.normalize(x, dim=-1), F.normalize(x.flip(-1), dim=-1)
    return torch.softmax(q @ k.transpose(-1, -2) * 10, -1) @ x


def partial_rms(self: Spelled, x: Tensor) -> Tensor:
    return x * torch.rsqrt(x[..., : D // 2].square().mean(-1, keepdim=True) + self.eps)


def compressed_rms(self: Spelled, x: Tensor) -> Tensor:
    """CRMSNorm: the last channel is minus the sum of the others, and left out."""
    squares = x.square().sum(-1, keepdim=True) + x.sum(-1, keepdim=True) ** 2
    return x * torch.rsqrt(squares / (D + 1) + self.eps) * self.weight


def capsule_squash(self: Spelled, x: Tensor) -> Tensor:
    squares = x.square().sum(-1, keepdim=True)
    return squares / (1 + squares) * x / torch.sqrt(squares + 1e-8)


def eps_twice(self: Spelled, x: Tensor) -> Tensor:
    deviation = torch.sqrt(x.square().mean(-1, keepdim=True) + self.eps)
    return x / (deviation + 1e-4) * self.weight


def filter_response(self: Spelled, x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean((2, 3), keepdim=True) + self.eps) * self.weight


def cumulative(self: Spelled, x: Tensor) -> Tensor:
    count = torch.arange(1, x.shape[1] + 1).view(1, -1, 1) * D
    mean = x.sum(-1, keepdim=True).cumsum(1) / count
    variance = x.square().sum(-1, keepdim=True).cumsum(1) / count - mean * mean
    return (x - mean) / torch.sqrt(variance + self.eps) * self.weight + self.bias


def running(self: Spelled, x: Tensor) -> Tensor:
    return (x - self.bias) / torch.sqrt(self.weight + self.eps)


def largest(self: Spelled, x: Tensor) -> Tensor:
    return x / torch.sqrt(x.square().amax(-1, keepdim=True) + self.eps)


@dataclass(frozen=True)
class Bait:
    """A formula that is no site; reason: of the refusal, "" where there is none."""

    formula: Callable[[Spelled, Tensor], Tensor]
    reason: str = ""
    layout: str = "tokens"
    shape: tuple[int, ...] = (D,)

    @property
    def name(self) -> str:
        return self.formula.__name__

    def entry(self) -> NearMiss:
        return NearMiss(self.name, lambda: Spelled(self.formula, self.shape), layout=self.layout)


BAIT = (
    Bait(group_norm_over_a_view, "several axes", "image", IMAGE_SHAPE),
    Bait(flat_layer_norm, "several axes", "image", IMAGE_SHAPE),
    Bait(instance_norm_over_a_view, "several axes", "image", IMAGE_SHAPE),
    Bait(restormer_without_bias, "does not subtract the mean", "image"),
    Bait(adaptive_instance, "space or time", "image"),
    Bait(filter_response, "2 axes", "image", IMAGE_SHAPE),
    Bait(scale_norm, "length of the row"),
    Bait(cosine_attention, "length of the row"),
    Bait(compressed_rms, "not the root"),
    Bait(capsule_squash, "not the root"),
    Bait(eps_twice, "not the root"),
    Bait(partial_rms),
    Bait(cumulative),
    Bait(running),
    Bait(largest),
)

ROUTES = ("export", "decomposed", "compile", "onnx18", "onnx17")


@functools.cache
def found(route: str) -> tuple[Graph, Match]:
    """All norms and all bait in one model, as a route shows it."""
    model = gallery((*NORMS, *(bait.entry() for bait in BAIT)))
    graph = _captured(model, route)
    return graph, match(graph)


def _captured(model: torch.nn.Module, route: str) -> Graph:
    if route == "export":
        return capture(model, examples())
    if route == "decomposed":
        return capture(torch.export.export(model, examples()).run_decompositions())
    if route == "compile":
        return _compiled(model)
    with warnings.catch_warnings(), tempfile.TemporaryDirectory() as folder:
        warnings.simplefilter("ignore")
        path = Path(folder) / "model.onnx"
        torch.onnx.export(
            model, examples(), path, dynamo=route == "onnx18", verbose=False,
            opset_version=int(route[-2:]),
        )  # fmt: skip
        return capture(path)


def _compiled(model: torch.nn.Module) -> Graph:
    """The graph that Dynamo hands to a backend."""
    frames: list[Frame] = []

    def keep(module: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        frames.append(Frame(module))
        return module.forward

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(model, backend=keep, fullgraph=True)(*examples())
    (frame,) = frames
    return frame.graph


def _named(entries: Any) -> list[Any]:
    return [pytest.param(entry, id=entry.name) for entry in entries]


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("norm", _named(NORMS))
def test_norm_of_a_known_style_is_found(norm: Spelling, route: str) -> None:
    _, matched = found(route)
    (site,) = (site for site in matched.sites if site.name.split(".")[0] == norm.name)
    assert site.name == f"{norm.name}.norm"
    assert (site.kind, site.axes, site.affine) == (NormKind(norm.kind), norm.axes, norm.affine)
    assert site.eps == pytest.approx(norm.eps, rel=1e-4)


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("bait", _named(BAIT))
def test_bait_beside_it_is_no_site(bait: Bait, route: str) -> None:
    _, matched = found(route)
    assert [s.name for s in matched.sites if s.name.split(".")[0] == bait.name] == []
    reasons = [r.reason for r in matched.refusals if r.name.split(".")[0] == bait.name]
    assert all(bait.reason in reason for reason in reasons)
    assert bool(reasons) == bool(bait.reason)
