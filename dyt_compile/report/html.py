"""The report as one HTML page that needs no network: plotly.js, style and data inside it."""

from __future__ import annotations

import html
import importlib.util
import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from typing import Any

import numpy as np

from ..dyt import evaluate
from ..errors import MissingDependencyError
from ..exporters.onnx import OnnxExport
from ..metrics import described
from ..scatter import Scatter
from ..sites import Match
from .records import QuantizationReport, Report, environment

__all__ = ["check_plotly", "page"]

GRID = 65
"""Points of a fitted curve."""

SIGNIFICANT = 4
"""Digits of a number that is only drawn."""


@dataclass(frozen=True)
class Column:
    """One column of a table: the field of the records, its heading, and what it means.

    kind: "text"; "site", text that selects the site; "state", DyT or norm; "count", a whole number;
    "exact", a number as it is; "number", a measured one, rounded for its column.
    """

    field: str
    label: str
    kind: str = "text"
    hint: str = ""


SCRIPTS = ("data.js", "charts.js", "curves.js", "tables.js", "page.js")

SITES = (
    Column("place", "#", "count", "place in execution order"),
    Column("name", "site", "site"),
    Column("kind", "kind"),
    Column("channels", "channels", "count"),
    Column("now", "now", "state", "what computes here after the conversion"),
    Column("alpha", "α", "number", "of the DyT that computes here"),
    Column("fit", "fit", hint="full: a matrix in its readers' weights; drawn is the diagonal fit"),
    Column("fit_error", "fit error", "number", "relative error of the site's fit on held-out rows"),
    Column("sensitivity", "alone", "number", "error at the output, only this site converted"),
    Column("affine_alone", "affine alone", "number", "the same, as an affine map"),
    Column("sigma_median", "σ median", "number", "median over tokens of what the norm divides by"),
    Column("sigma_peak", "σ peak", "number", "largest σ over the median"),
    Column("hard", "known hard", hint="known before it was fitted, from a few samples"),
    Column("reason", "why kept"),
    Column("unmixed", "why no matrix"),
    Column("unaffine", "why not affine"),
    Column("consumers", "read by"),
)
"""The table of sites; a new field of `SiteReport` needs one line here."""

FOUND = (
    *SITES[:4],
    Column("eps", "eps", "exact", "added to the mean of squares"),
    Column("affine", "affine"),
    Column("folds", "folds", hint="what every reader can take up in its weights"),
    Column("unfolded", "why not folded"),
    Column("consumers", "read by"),
)
"""The table of sites before any conversion, as `inspect` finds them."""

REFITS = (
    Column("name", "weight"),
    Column("before", "before", "number", "relative error of its output on held-out rows"),
    Column("after", "after", "number", "the same, with the weight that it has now"),
)

QUANTIZED = (
    Column("site", "site"),
    Column("product", "read by"),
    Column("now", "now", "state", "what the product computes in"),
    Column("largest", "largest", "number", "no output of the site is larger, whatever the data"),
    Column("alone", "alone", "number", "error of quantising this product alone, on a few samples"),
    Column("reason", "why in float"),
)

REFUSALS = (Column("name", "norm"), Column("kind", "kind"), Column("reason", "why refused"))


def page(report: Report | Match, exported: OnnxExport | None = None) -> str:
    """The page as text; of a Match, what there is before a conversion.

    Raises MissingDependencyError without the package plotly.
    """
    check_plotly()
    from plotly.offline import get_plotlyjs

    parts = {
        "title": html.escape(f"{report.model} · dyt-compile"),
        "style": _resource("page.css"),
        "data": _embedded(
            _found(report) if isinstance(report, Match) else _converted(report, exported)
        ),
        "plotly": get_plotlyjs(),
        "script": "\n".join(map(_resource, SCRIPTS)),
    }
    # Split, not replaced: what is put in is never searched for marks.
    first, *pieces = _resource("page.html").split("<!--put ")
    text = [first]
    for piece in pieces:
        name, _, rest = piece.partition("-->")
        text += [parts[name], rest]
    return "".join(text)


def check_plotly() -> None:
    """Raise MissingDependencyError where plotly is not installed; cheap, before long work."""
    if importlib.util.find_spec("plotly") is None:
        raise MissingDependencyError("plotly", "report")


def _resource(name: str) -> str:
    return (resources.files(__package__) / "page" / name).read_text(encoding="utf-8")


def _embedded(data: Any) -> str:
    """JSON that can stand in a script element: no `<`, so neither `</script>` nor `<!--`."""
    text = json.dumps(_strict(data), allow_nan=False, separators=(",", ":"), ensure_ascii=True)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _strict(data: Any) -> Any:
    """JSON knows no NaN and no infinity: they become text that JavaScript's Number reads."""
    if isinstance(data, float) and not math.isfinite(data):
        return "NaN" if math.isnan(data) else "Infinity" if data > 0 else "-Infinity"
    if isinstance(data, Mapping):
        return {key: _strict(value) for key, value in data.items()}
    return [_strict(value) for value in data] if isinstance(data, (list, tuple)) else data


def _converted(report: Report, exported: OnnxExport | None) -> dict[str, Any]:
    """What the page of a conversion shows."""
    figures = report.to_dict()
    cost = ("frontier", "budget", "attempts", "converted", "error", "standard_error")
    for site, told in zip(figures["sites"], report.sites, strict=True):
        site["now"] = told.now
        site["hard"] = ", ".join(site["hard"])
    return {
        "model": report.model,
        "headline": _headline(report),
        "cards": _cards(report, exported),
        "sites": _site_table(SITES, figures["sites"]),
        "refits": _table(REFITS, figures["refits"]),
        "quantized": _table(QUANTIZED, _quantized(report.quantized)),
        "refusals": _table(REFUSALS, figures["refusals"]),
        "cost": {"measure": described(report.metric)} | {name: figures[name] for name in cost},
        "recovery": _recovery(report),
        "scatters": [_drawn(site.scatter) for site in report.sites],
        "seconds": [[name, f"{spent:.1f} s"] for name, spent in report.seconds.items()],
        "environment": list(map(list, report.environment.items())),
    }


def _found(match: Match) -> dict[str, Any]:
    """What the page of an inspection shows: no figures, there are none yet."""
    figures = match.to_dict()
    for site in figures["sites"]:
        site.update({key: _symbols(site[key]) for key in ("affine", "folds")})
    counts = f"{len(match.sites)} sites, {len(match.refusals)} refused."
    return {
        "model": match.model,
        "headline": f"{counts} Nothing was converted or measured: this is what inspect found.",
        "cards": [],
        "sites": _site_table(FOUND, figures["sites"]),
        "refits": _table(REFITS, []),
        "quantized": _table(QUANTIZED, []),
        "refusals": _table(REFUSALS, figures["refusals"]),
        "cost": None,
        "recovery": None,
        "scatters": [None] * len(match.sites),
        "seconds": [],
        "environment": list(map(list, environment().items())),
    }


def _recovery(report: Report) -> dict[str, Any] | None:
    """The run of `recover`: its curve over seconds, and what it came to."""
    found = report.recovery
    if found is None:
        return None
    times = found.times()
    return {
        "about": f"{found.told()}.",
        "metric": report.metric,
        "times": times,
        "errors": [error for _, error in found.curve],
        "stages": [[times[place], sites] for place, sites in found.stages],
        "chosen": found.chosen,
        "before": found.before,
        "after": report.error,
    }


def _site_table(columns: Sequence[Column], rows: list[dict[str, Any]]) -> dict[str, Any]:
    for place, row in enumerate(rows, 1):
        row.update(place=place, consumers=_counted(row["consumers"]))
    return _table(columns, rows)


def _table(columns: Sequence[Column], rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The columns, and of each row what they show."""
    fields = {column.field for column in columns} | {"place", "now"}
    shown = [{name: value for name, value in row.items() if name in fields} for row in rows]
    return {"columns": [vars(column) for column in columns], "rows": shown}


def _headline(report: Report) -> str:
    if not report.sites:
        return "No norm was found that DyT could stand for. The model is as it was."
    told = f"{report.converted} of {len(report.sites)} sites are "
    told += f"converted, {report.affine} to affine maps." if report.affine else "DyT."
    if report.error is None and report.mode != "exact":
        return f"{told} Their fits are of a calibration; without data, no error was measured."
    if report.error is None:
        return f"{told} Norms are left alone in mode {report.mode}: nothing was approximated."
    cost = (
        f"{told} On {report.samples} samples that took part in neither fit nor plan, "
        f"{report.output!r} differs from the original by a {described(report.metric)} of "
        f"{_error(report.error, report.standard_error)}"
    )
    return f"{cost}." if report.budget is None else f"{cost}, within the budget of {report.budget}."


def _cards(report: Report, exported: OnnxExport | None) -> list[dict[str, str]]:
    """What stands large at the top: label, value, note."""
    kept = Counter(site.reason for site in report.sites if not site.converted)
    reasons = "; ".join(f"{count} {reason}" for reason, count in kept.most_common())
    dyt = report.converted - report.affine
    cards = [("DyT", f"{dyt} of {len(report.sites)}", "sites of the model")]
    if report.affine:
        cards.append(
            ("Affine", str(report.affine), "in the weights behind, and nothing else is left")
        )
    if report.sites:
        cards.append(("Keep their norm", str(kept.total()), reasons or "none"))
    if report.error is not None:
        error = _error(report.error, report.standard_error)
        note = (
            f"{described(report.metric)}, converted against original, on {report.samples} unseen "
            "samples"
        )
        cards.append(("Output error", error, note))
    if report.recovery is not None:
        before = f"{report.recovery.before:.3g}"
        cards.append(("Before recovery", before, report.recovery.told()))
    if report.quantized is not None:
        cards.append(("Error of quantising", *_quantising(report.quantized)))
    if report.budget is not None:
        cards.append(("Budget", f"{report.budget:g}", f"for the {described(report.metric)}"))
    cards.append(("Refused", str(len(report.refusals)), "normalizations that DyT cannot stand for"))
    if exported is not None:
        checked = exported.export_error
        note = (
            f"{exported.path.name} against the converted model; {exported.dtype}, opset "
            f"{exported.opset}, {exported.bytes / 1e6:.1f} MB"
        )
        cards.append(("Export error", "not run" if checked is None else f"{checked:.1g}", note))
    return [dict(zip(("label", "value", "note"), card, strict=True)) for card in cards]


def _quantising(told: QuantizationReport) -> tuple[str, str]:
    """What eight bits cost apart from the conversion, and a note on it."""
    products = told.told()
    if told.error is None or told.total is None:
        return "not measured", f"{products}; there was no data"
    total = _error(told.total, told.total_standard_error)
    against = "against the converted model; against the original the error is"
    return _error(told.error, told.standard_error), f"{products}, {against} {total}"


def _quantized(told: QuantizationReport | None) -> list[dict[str, Any]]:
    """A row for each product over eight bits, and for each that stayed in float."""
    if told is None:
        return []
    rows: list[dict[str, Any]] = [
        {"site": site, "product": product, "now": told.dtype, "largest": largest, "reason": None}
        for site, largest, into in told.sites
        for product in into
    ]
    rows += [
        {"site": site, "product": product, "now": "float", "largest": None, "reason": reason}
        for site, reason, product in told.left
    ]
    return [row | {"alone": told.alone.get(row["product"])} for row in rows]


def _symbols(parameters: Iterable[str]) -> str:
    return " ".join({"gamma": "γ", "beta": "β"}[name] for name in parameters)


def _error(error: float, deviation: float | None) -> str:
    """An error to the digit that its standard error leaves certain."""
    if deviation is None or not math.isfinite(deviation) or deviation <= 0:
        return f"{error:.3g}"
    digits = math.floor(math.log10(deviation))
    if digits < -6:
        return f"{error:.2g}\N{NO-BREAK SPACE}±\N{NO-BREAK SPACE}{deviation:.1g}"
    places = max(0, -digits)
    return f"{error:.{places}f}\N{NO-BREAK SPACE}±\N{NO-BREAK SPACE}{deviation:.{places}f}"


def _counted(names: Iterable[str]) -> str:
    return ", ".join(f"{n} ×{c}" if c > 1 else n for n, c in Counter(names).items())


def _drawn(scatter: Scatter | None) -> dict[str, Any] | None:
    """The points of a site, rounded, and its fitted curve as a table of the squashing function."""
    if scatter is None:
        return None
    drawn = {
        "x": _rounded(scatter.x),
        "y": _rounded(scatter.y),
        "sigma": _rounded(scatter.sigma),
        "channels": scatter.channels.tolist(),
        "fit": None,
    }
    if scatter.fitted is not None and scatter.fitted.gamma is not None:
        grid = np.linspace(scatter.x.min(), scatter.x.max(), GRID, dtype=np.float32)
        drawn["fit"] = {
            "alpha": float(scatter.fitted.alpha.ravel()[0]),
            "x": _rounded(grid),
            "squashed": _rounded(evaluate(replace(scatter.fitted, gamma=None, beta=None), grid)),
            "gamma": _rounded(scatter.fitted.gamma),
            "beta": _rounded(scatter.fitted.beta),
        }
    return drawn


def _rounded(array: Any) -> Any:
    """Nested lists with few digits: a third of the bytes."""
    if np.ndim(array):
        return [_rounded(part) for part in array]
    return float(f"{float(array):.{SIGNIFICANT}g}")
