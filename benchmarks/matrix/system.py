"""One architecture of the matrix, and the truth about its norms: what a forward pass calls."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

__all__ = ["Call", "Inputs", "System", "calls", "is_norm", "is_refused"]


@dataclass(frozen=True)
class Inputs:
    """The arguments of one forward pass."""

    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Call:
    """One call of a norm: the module's path, with "#2" behind it at the second call.

    kind: what a probe told of it, empty without one.
    """

    name: str
    module: nn.Module
    kind: str = ""


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a LayerNorm or an RMSNorm over one axis, by its class."""
    if isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
        return len(module.normalized_shape) == 1
    if next(module.children(), None) is not None:
        return False  # an encoder layer: Wav2Vec2EncoderLayerStableLayerNorm
    name = type(module).__name__
    return name.endswith(("LayerNorm", "RMSNorm", "LayerNorm2d", "RmsNorm", "RMSNormGated"))


def is_refused(module: nn.Module) -> bool:
    """Whether a module is a normalization that DyT cannot stand for, by its class."""
    batch = nn.modules.batchnorm._BatchNorm
    instance = nn.modules.instancenorm._InstanceNorm
    return isinstance(module, (batch, instance, nn.GroupNorm))


@dataclass(frozen=True)
class System:
    """An architecture, small for the whole way and large for matching alone.

    name: as its users call it; group: the heading that it stands under; source: its class, or for
    a module of ours the public code that it follows.
    small: the architecture with random weights, a few layers of it. inputs: of the given number
    of samples, for a model of either size; each call with another seed gives other values.
    full: at its real width and depth; called on the meta device, so that it holds no weights.
    is_norm, is_refused: which modules the matcher must name, and which it must refuse. idle: calls
    of norms that are none of the graph's: of a weight alone, or with a result that nothing reads.
    """

    name: str
    group: str
    source: str
    small: Callable[[], nn.Module]
    inputs: Callable[[nn.Module, int, int], Inputs]  # model, samples, seed
    full: Callable[[], nn.Module] | None = None
    is_norm: Callable[[nn.Module], bool] = is_norm
    is_refused: Callable[[nn.Module], bool] = is_refused
    idle: frozenset[str] = frozenset()


Probe = Callable[[nn.Module, Any, Any, Any], str]
"""A kind from a module, its arguments by place and by name, and its output."""


def calls(
    model: nn.Module,
    inputs: Inputs,
    wanted: Callable[[nn.Module], bool] = is_norm,
    probe: Probe | None = None,
) -> list[Call]:
    """The calls of the wanted modules in one forward pass, in order; meta tensors will do."""
    seen: list[Call] = []
    with _hooked(model, wanted, probe, seen), torch.no_grad():
        model(*inputs.args, **inputs.kwargs)
    return seen


@contextmanager
def _hooked(
    model: nn.Module,
    wanted: Callable[[nn.Module], bool],
    probe: Probe | None,
    seen: list[Call],
) -> Iterator[None]:
    count: Counter[str] = Counter()

    def hook(path: str) -> Callable[..., None]:
        def called(module: nn.Module, *call: Any) -> None:
            count[path] += 1
            name = path if count[path] == 1 else f"{path}#{count[path]}"
            seen.append(Call(name, module, "" if probe is None else probe(module, *call)))

        return called

    handles = [
        module.register_forward_hook(hook(path), with_kwargs=True)
        for path, module in model.named_modules()
        if wanted(module)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
