"""What a first look at a model tells before anything is fitted: its hard sites, and their sizes."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from .errors import printable
from .sites import NormSite

__all__ = ["Look", "hardships", "warning"]

PEAK = 4.0
"""Largest over median sigma of a token, above which tanh follows a norm badly: one alpha serves
all tokens, and those of a large sigma (attention sinks, class tokens) fill its range."""

NAMED = 8
"""Sites that a warning names; the report has them all."""


@dataclass(frozen=True)
class Look:
    """A site on the original's activations of a few samples.

    sigma_peak: largest over median of what the norm divides a token by; None where nothing was
    seen. elements: of its input, for each sample.
    """

    sigma_peak: float | None
    elements: float


def hardships(
    sites: Sequence[NormSite], looks: Mapping[str, Look]
) -> Mapping[str, tuple[str, ...]]:
    """Why sites are known to be hard to convert, by name; sites in execution order.

    The first norm, behind the embeddings; the final norm; tokens of very different sigma.
    """
    norms = [site.name for site in sites if not site.kind.lossless]
    ends = {norms[0]: ["first norm"]} if norms else {}
    if norms:
        ends.setdefault(norms[-1], []).append("final norm")
    told = {name: [*ends.get(name, ()), *_peaked(looks.get(name))] for name in norms}
    return {name: tuple(reasons) for name, reasons in told.items() if reasons}


def _peaked(look: Look | None) -> list[str]:
    peak = None if look is None else look.sigma_peak
    return [] if peak is None or not peak > PEAK else [f"σ of a token {peak:.3g} × the median"]


def warning(hard: Mapping[str, Sequence[str]], sites: Collection[str]) -> str | None:
    """One line on those of the sites that are hard; None where none is."""
    told = [f"{name} ({', '.join(hard[name])})" for name in hard if name in sites]
    if not told:
        return None
    more = f" and {len(told) - NAMED} more" if len(told) > NAMED else ""
    return printable(f"known to be hard to convert: {', '.join(told[:NAMED])}{more}")
