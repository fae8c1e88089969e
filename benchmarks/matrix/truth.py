"""What a forward pass of a system shows about its norms, and how a match is held to it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from dyt_compile import Match, NormKind, NormSite

from .system import Inputs, System, calls

__all__ = ["Truth", "WrongError", "counted", "disagreement", "miscounted", "some", "truth"]

BY_CLASS = {NormKind.BATCH_NORM, NormKind.GROUP_NORM, NormKind.INSTANCE_NORM}
"""Refusals that only a module of that class explains; others may be near misses of any code."""

CENTRED, SCALED, ELEMENTWISE = "layer_norm", "rms_norm", "dyt"


class WrongError(Exception):
    """A route ran to its end, and its result is not what it should be."""


@dataclass(frozen=True)
class Truth:
    """norms: the calls of norms by name, in order; refused: of modules that must be refused.

    idle: calls of norms that need not be named, see `System`. kinds: how many calls of each kind,
    by what their outputs do; None where nothing was computed.
    """

    norms: tuple[str, ...]
    refused: tuple[str, ...]
    idle: frozenset[str] = frozenset()
    kinds: Counter[str] | None = None


def truth(system: System, model: nn.Module, inputs: Inputs, *, kinds: bool = False) -> Truth:
    """The truth about a model of a system. kinds: probe them too, which needs real weights."""
    norms = calls(model, inputs, system.is_norm, _probed if kinds else None)
    norms = [call for call in norms if call.name not in system.idle]
    return Truth(
        tuple(call.name for call in norms),
        tuple(call.name for call in calls(model, inputs, system.is_refused)),
        system.idle,
        Counter(call.kind for call in norms) if kinds else None,
    )


def disagreement(found: Match, true: Truth) -> str:
    """What a match says otherwise than the truth, in one line; empty where they agree."""
    named = _difference((site.name for site in counted(found, true)), true.norms)
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
    sites = counted(found, true)
    if len(sites) != len(true.norms):
        return [f"{len(sites)} sites instead of {len(true.norms)}"]
    if true.kinds is None:
        return []
    kinds = Counter(_kind(site.kind) for site in sites)
    return [] if kinds == true.kinds else [f"{dict(kinds)} instead of {dict(true.kinds)}"]


def counted(found: Match, true: Truth) -> list[NormSite]:
    """The sites but for idle ones; files may have put a name before their paths."""
    idle = tuple(true.idle)
    return [site for site in found.sites if not site.name.endswith(idle)]


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
