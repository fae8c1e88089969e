"""Matches and reports as tables that fit a terminal of 100 columns."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from ..sites import Match
from .records import Report

__all__ = ["match_table", "report_table"]


def match_table(match: Match) -> RenderableType:
    """The sites and the refusals of a model."""
    sites = _table("site", "kind", "channels", "eps", "affine", "read by")
    for site in match.sites:
        channels = "?" if site.channels is None else str(site.channels)
        eps = "" if site.kind.lossless else f"{site.eps:g}"
        sites.add_row(
            Text(site.name), site.kind.value, channels, eps,
            ", ".join(site.affine), Text(_counted(site.consumers)),
        )  # fmt: skip
    counts = f"{len(match.sites)} sites, {len(match.refusals)} refused"
    parts: list[RenderableType] = [Text(f"{match.model}: {counts}", style="bold")]
    if match.sites:
        parts.append(sites)
    if match.refusals:
        refusals = _table("refused", "kind", "reason")
        for refusal in match.refusals:
            refusals.add_row(Text(refusal.name), refusal.kind.value, Text(refusal.reason))
        parts.append(refusals)
    return Group(*parts)


def report_table(report: Report) -> RenderableType:
    """What was converted, what it cost, what was kept and why."""
    table = _table("site", "kind", "now", "alpha", "fit error", "alone")
    for site in report.sites:
        now = "DyT" if site.converted else f"norm: {site.reason}"
        table.add_row(
            Text(site.name), site.kind, Text(now, style="green" if site.converted else "yellow"),
            _figure(site.alpha), _figure(site.fit_error), _figure(site.sensitivity),
        )  # fmt: skip
    parts: list[RenderableType] = [table] if report.sites else []
    parts.append(Text(headline(report), style="bold"))
    if report.refusals:
        parts.append(Text(f"{len(report.refusals)} refused; dyt-compile inspect says why"))
    return Group(*parts)


def headline(report: Report) -> str:
    """One line: how many sites, at what error, within which budget."""
    converted = f"{report.model}: {report.converted} of {len(report.sites)} sites are DyT"
    if report.error is None:
        return f"{converted}; norms left alone (mode {report.mode})"
    cost = f"{report.metric} error {report.error:.4g} ± {report.standard_error:.1g}"
    budget = "" if report.budget is None else f", budget {report.budget:g}"
    return f"{converted}; {cost} on {report.samples} unseen samples at {report.output!r}{budget}"


def _table(*headers: str) -> Table:
    table = Table(box=box.SIMPLE, header_style="bold", pad_edge=False)
    for place, header in enumerate(headers):
        table.add_column(header, overflow="fold", ratio=None if place else 2)
    return table


def _counted(names: Iterable[str]) -> str:
    """Names in order, repeated ones once with their number."""
    counts = Counter(names)
    return ", ".join(name if count == 1 else f"{name} ×{count}" for name, count in counts.items())


def _figure(number: float | None) -> str:
    return "" if number is None else f"{number:.3g}"
