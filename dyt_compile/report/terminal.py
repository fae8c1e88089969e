"""Matches and reports as tables that fit a terminal of 100 columns."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeVar

from rich import box
from rich.bar import Bar
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from ..metrics import described
from ..passes.fold import Folded
from ..sites import Match, NormSite
from .records import QuantizationReport, Report

__all__ = [
    "fold_table", "frontier_table", "match_table", "quantization_line",
    "quantization_table", "report_table",
]  # fmt: skip

BAR = 24
"""Columns of the largest bar."""


def match_table(match: Match) -> RenderableType:
    """The sites and the refusals of a model; repeated layers take one line."""
    counts = f"{len(match.sites)} sites, {len(match.refusals)} refused"
    parts: list[RenderableType] = [Text(f"{match.model}: {counts}", style="bold")]
    if match.sites:
        parts.append(_site_table(match.sites))
    reasons = _grouped(match.sites, lambda site: (_alike(site.unfolded),))
    if any(site.unfolded for site in match.sites):
        unfolded = _table("not folded into the reader", "sites")
        for group in reasons:
            if group[0].unfolded:
                unfolded.add_row(Text(group[0].unfolded), str(len(group)))
        parts.append(unfolded)
    if match.refusals:
        refusals = _table("refused", "kind", "reason")
        for refused in _grouped(match.refusals, lambda r: (_alike(r.name), r.kind, r.reason)):
            reason = Text(refused[0].reason)
            refusals.add_row(Text(_joint([r.name for r in refused])), refused[0].kind.value, reason)
        parts.append(refusals)
    return Group(*parts)


def _site_table(sites: Sequence[NormSite]) -> Table:
    table = _table("site", "kind", "channels", "eps", "affine", "folds", "read by")
    symbols = {"gamma": "γ", "beta": "β"}

    def row(site: NormSite) -> tuple[str, ...]:
        return (
            site.kind.value,
            "?" if site.channels is None else str(site.channels),
            "" if site.kind.lossless else f"{site.eps:g}",
            " ".join(symbols[name] for name in site.affine),
            " ".join(symbols[name] for name in site.folds) or ("no" if site.unfolded else ""),
            _counted(site.consumers),
        )

    for group in _grouped(sites, lambda site: (_alike(site.name), *row(site))):
        table.add_row(Text(_joint([site.name for site in group])), *map(Text, row(group[0])))
    return table


Entry = TypeVar("Entry")


def _grouped(
    entries: Iterable[Entry], key: Callable[[Entry], tuple[object, ...]]
) -> list[list[Entry]]:
    """Entries of equal key together, groups in the order of their first entries."""
    groups: dict[tuple[object, ...], list[Entry]] = {}
    for entry in entries:
        groups.setdefault(key(entry), []).append(entry)
    return list(groups.values())


def _alike(text: str) -> str:
    """A name or a sentence without the numbers of layers and without names of nodes."""
    return re.sub(r"\d+", "0", re.sub("`[^`]*`", "``", text))


def _joint(names: Sequence[str]) -> str:
    """One name for several that differ in numbers: "blocks.{0..11}.norm1 ×12"."""
    if len(names) == 1:
        return names[0]
    numbers = zip(*(map(int, re.findall(r"\d+", name)) for name in names), strict=True)
    spans = iter([(min(found), max(found)) for found in map(tuple, numbers)])

    def span(_: re.Match[str]) -> str:
        first, last = next(spans)
        return str(first) if first == last else f"{{{first}..{last}}}"

    return re.sub(r"\d+", span, names[0]) + f" ×{len(names)}"


def report_table(report: Report) -> RenderableType:
    """What was converted, what it cost, what was kept and why."""
    affine = any(site.affine_alone is not None for site in report.sites)
    more = ("affine alone",) if affine else ()
    table = _table("site", "kind", "now", "fit", "alpha", "fit error", "alone", *more)
    for site in report.sites:
        now = site.now if site.converted else f"norm: {site.reason}"
        table.add_row(
            Text(site.name), site.kind, Text(now, style="green" if site.converted else "yellow"),
            site.fit or "",
            _figure(site.alpha), _figure(site.fit_error), _figure(site.sensitivity),
            *[_figure(site.affine_alone) for _ in more],
        )  # fmt: skip
    parts: list[RenderableType] = [table] if report.sites else []
    parts += _reason_tables(report)
    parts += _refit_tables(report)
    parts.append(Text(headline(report), style="bold"))
    if report.recovery is not None:
        errors = " ".join(_figure(error) for _, error in report.recovery.curve)
        parts.append(Text(f"recovery: {report.recovery.told()}; held-out errors {errors}"))
    if report.refusals:
        parts.append(Text(f"{len(report.refusals)} refused; dyt-compile inspect says why"))
    return Group(*parts)


def _reason_tables(report: Report) -> list[RenderableType]:
    """Why converted sites have no full fit, and why they are no affine map; like reasons once."""
    done = [site for site in report.sites if site.converted]
    unmixed = {site.name: site.unmixed for site in done if site.fit and site.unmixed}
    unaffine = {site.name: site.unaffine for site in report.sites if site.unaffine}
    return [
        *_reason_table("diagonal fit", "why no matrix", unmixed),
        *_reason_table("not affine", "why", unaffine),
    ]


def _reason_table(what: str, why: str, reasons: Mapping[str, str]) -> list[RenderableType]:
    table = _table(what, why)
    for group in _grouped(reasons.items(), lambda told: tuple(map(_alike, told))):
        table.add_row(Text(_joint([name for name, _ in group])), Text(group[0][1]))
    return [table] if reasons else []


def _refit_tables(report: Report) -> list[RenderableType]:
    """Which linear layers were refitted, and how much nearer that brought their outputs."""
    table = _table("refitted", "error before", "after")
    for group in _grouped(report.refits, lambda refit: (_alike(refit.name),)):
        before, after = (_span(getattr(r, part) for r in group) for part in ("before", "after"))
        table.add_row(Text(_joint([refit.name for refit in group])), before, after)
    return [table] if report.refits else []


def _span(numbers: Iterable[float]) -> str:
    """The least and the largest."""
    found = list(numbers)
    ends = [_figure(end) for end in (min(found), max(found))]
    return ends[0] if ends[0] == ends[1] else " to ".join(ends)


def fold_table(folded: Folded) -> RenderableType:
    """How much was folded, and what stayed and why."""
    counts = Counter(entry.what for entry in folded.folded)
    told = ", ".join(f"{count} {what}" for what, count in counts.items())
    parts: list[RenderableType] = [Text(f"folded into weights: {told or 'nothing'}", style="bold")]
    if folded.left:
        table = _table("not folded", "what", "reason")
        for left in _grouped(folded.left, lambda e: (_alike(e.name), e.what, _alike(e.reason))):
            names = _joint([entry.name for entry in left])
            table.add_row(Text(names), left[0].what, Text(left[0].reason))
        parts.append(table)
    return Group(*parts)


def quantization_table(report: Report) -> RenderableType:
    """What computes over eight bits, what stayed in float and why, and what quantising costs."""
    told = report.quantized
    if told is None:
        return Text("")
    parts: list[RenderableType] = []
    table = _table(f"read in {told.dtype}", "largest", "read by")
    for group in _grouped(told.sites, lambda e: (_alike(e[0]), *map(_alike, e[2]))):
        readers = zip(*(names for _, _, names in group), strict=True)
        read_by = ", ".join(map(_joint, readers))
        table.add_row(
            Text(_joint([e[0] for e in group])), _span(e[1] for e in group), Text(read_by)
        )
    if told.sites:
        parts.append(table)
    parts += _left_tables(told)
    parts.append(Text(quantization_line(report), style="bold"))
    return Group(*parts)


def _left_tables(told: QuantizationReport) -> list[RenderableType]:
    """What stayed in float, and why; where the budget had to choose, what each costs alone."""
    more = ("alone",) if told.alone else ()
    table = _table("left in float", "reason", *more)
    for left in _grouped(told.left, lambda e: (_alike(e[0]), _alike(e[1]))):
        alone = [told.alone[name] for *_, name in left if name and name in told.alone]
        costs = [_span(alone) if alone else "" for _ in more]
        table.add_row(Text(_joint([name for name, *_ in left])), Text(left[0][1]), *costs)
    return [table] if told.left else []


def quantization_line(report: Report) -> str:
    """One line: how many products, and the error of quantising apart from that of converting."""
    told = report.quantized
    if told is None:
        return ""
    count = f"{told.told()} (for {told.runtime})"
    if told.error is None or told.total is None:
        return f"{count}; without data the error of quantising was not measured"
    return (
        f"{count}; {described(report.metric)} of quantising {told.error:.3g} "
        f"± {told.standard_error:.1g}, with converting {told.total:.3g} "
        f"± {told.total_standard_error:.1g}, on {told.samples} samples"
    )


def frontier_table(report: Report) -> RenderableType:
    """The error against the number of converted sites, drawn, with what that would save.

    Green: within the budget, its standard errors not counted.
    """
    heading = f"{described(report.metric)} against converted sites, on the plan samples"
    table = _table("site added", "sites", "error", "", "kernels", "traffic")
    known = [point.error for point in report.frontier if math.isfinite(point.error)]
    largest = max([*known, 0.0])
    for point in report.frontier:
        last = point.added[-1] if point.added else ""
        more = f" and {len(point.added) - 1} more" if len(point.added) > 1 else ""
        within = report.budget is None or point.error <= report.budget
        table.add_row(
            Text(last + more), str(point.sites),
            f"{point.error:.3g} ± {point.standard_error:.1g}",
            Bar(largest or 1, 0, max(point.error, 0), width=BAR,
                color="green" if within else "yellow"),
            f"-{point.kernels_saved}", f"-{_bytes(point.traffic_bytes_saved)}",
        )  # fmt: skip
    note = (
        "kernels and memory traffic a sample: an estimate from shapes, the most that it can be, "
        "not measured"
    )
    return Group(Text(heading, style="bold"), table, Text(note, style="dim"))


def _bytes(count: float) -> str:
    """Bytes with a unit of a thousand of the one before."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"


def headline(report: Report) -> str:
    """One line: how many sites, at what error, within which budget."""
    converted = f"{report.model}: {report.converted} of {len(report.sites)} sites are "
    converted += f"converted, {report.affine} to affine maps" if report.affine else "DyT"
    if report.error is None:
        told = "norms left alone" if report.mode == "exact" else "the error was not measured"
        return f"{converted}; {told} (mode {report.mode})"
    cost = f"{described(report.metric)} {report.error:.4g} ± {report.standard_error:.1g}"
    if report.recovery is not None:
        cost += f" (before recovery {report.recovery.before:.4g})"
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
