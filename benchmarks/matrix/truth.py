"""What a forward pass of a system shows about its norms, and how a match is held to it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from dyt_compile import Match, NormKind

from .system import Inputs, System, calls

__all__ = ["Truth", "WrongError", "disagreement", "miscounted", "some", "truth"]

BY_CLASS = {NormKind.BATCH_NORM, NormKind.GROUP_NORM, NormKind.INSTANCE_NORM}
"""Refusals that only a module of that class explains; others may be near misses of any code."""

CENTRED, SCALED, ELEMENTWISE = "layer_norm", "rms_norm", "dyt"


class WrongError(Exception):
    """A route ran to its end, and its result is not what it should be."""


@dataclass(frozen=True)
class Truth:
    """norms: the calls of norms by name, in order; refused: of modules that must be refused.

    kinds: how many calls of each kind, by what their outputs do; None where nothing was computed.
    """

    norms: tuple[str, ...]
    refused: tuple[str, ...]
    kinds: Counter[str] | None = None


def truth(system: System, model: nn.Module, inputs: Inputs, *, kinds: bool = False) -> Truth:
    """The truth about a model of a system. kinds: probe them too, which needs real weights."""
    norms = [c for c in calls(model, inputs, system.is_norm) if c.name not in system.idle]
    return Truth(
        tuple(call.name for call in norms),
        tuple(call.name for call in calls(model, inputs, system.is_refused)),
        _kinds(model, inputs, [call.module for call in norms]) if kinds else None,
    )


def disagreement(found: Match, true: Truth) -> str:
    """What a match says otherwise than the truth, in one line; empty where they agree."""
    named = _difference((site.name for site in found.sites), true.norms)
    refused = [(r.name.partition("#")[0], r.kind in BY_CLASS) for r in found.refusals]
    wanted = {name.partition("#")[0] for name in true.refused}
    unexplained = sorted({name for name, by_class in refused if by_class} - wanted)
    kept = sorted(wanted - {name for name, _ in refused})
    parts = [
        *named,
        *([f"not refused: {some(kept)}"] if kept else []),
        *([f"refused without cause: {some(unexplained)}"] if unexplained else []),
        *miscounted(found, true),
    ]
    return "; ".join(parts)


def miscounted(found: Match, true: Truth) -> list[str]:
    """How the numbers of sites differ, in all and of each kind."""
    if len(found.sites) != len(true.norms):
        return [f"{len(found.sites)} sites instead of {len(true.norms)}"]
    if true.kinds is None:
        return []
    counted = Counter(_kind(site.kind) for site in found.sites)
    return [] if counted == true.kinds else [f"{dict(counted)} instead of {dict(true.kinds)}"]


def _kind(kind: NormKind) -> str:
    """The kind as a probe tells it: Derf and DyT look alike."""
    return ELEMENTWISE if kind.lossless else kind.value


def _difference(found: Iterable[str], wanted: Iterable[str]) -> list[str]:
    found_names, wanted_names = Counter(found), Counter(wanted)
    missing = sorted((wanted_names - found_names).elements())
    more = sorted((found_names - wanted_names).elements())
    return [
        *([f"not found: {some(missing)}"] if missing else []),
        *([f"found and not called: {some(more)}"] if more else []),
    ]


def some(names: list[str]) -> str:
    """The first names of a list, and how many more there are."""
    told = ", ".join(names[:2])
    return told if len(names) <= 2 else f"{told} and {len(names) - 2} more"


def _kinds(model: nn.Module, inputs: Inputs, norms: Iterable[nn.Module]) -> Counter[str]:
    """How many calls of each kind a forward pass makes of these modules."""
    kinds: Counter[str] = Counter()

    def called(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        kinds[_probed(module, args, kwargs, output)] += 1

    with _hooked(set(norms), called), torch.no_grad():
        model(*inputs.args, **inputs.kwargs)
    return kinds


@contextmanager
def _hooked(modules: Iterable[nn.Module], called: Callable[..., None]) -> Iterator[None]:
    handles = [m.register_forward_hook(called, with_kwargs=True) for m in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _probed(module: nn.Module, args: Any, kwargs: Any, output: Any) -> str:
    """A kind by its nature: adding a constant leaves LayerNorm as it is, one value stays alone."""
    x = next(leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor))
    before = _first_tensor(output)

    def after(changed: Tensor) -> Tensor:
        swap = tree_map_only(Tensor, lambda t: changed if t is x else t, (args, kwargs))
        return _first_tensor(module.forward(*swap[0], **swap[1]))

    # A step past the root of any eps: below it, a norm looks linear.
    scale, step = float(before.abs().max()), max(float(x.std()), 1.0)
    one = x.clone(memory_format=torch.contiguous_format)
    one.view(-1)[0] += step
    if int(((after(one) - before).abs() > 1e-5 * scale).sum()) <= 1:
        return ELEMENTWISE
    return CENTRED if float((after(x + step) - before).abs().max()) < 1e-2 * scale else SCALED


def _first_tensor(tree: Any) -> Tensor:
    found: Tensor = next(leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))
    return found
