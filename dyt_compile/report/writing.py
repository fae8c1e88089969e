"""Write a report: the suffix of the file chooses the form."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from ..errors import OptionError
from ..exporters.onnx import OnnxExport
from ..files import check_writable, replaced
from ..sites import Match
from .html import check_plotly, page
from .records import Report

__all__ = ["check_target", "write_report"]


def write_report(
    report: Report | Match, path: str | Path, *, exported: OnnxExport | None = None
) -> Path:
    """Write a report as one HTML page (.html) or as JSON (.json), and return its path.

    report: that of a conversion, or what `inspect` returned.
    The page needs no network: plotly.js (about 5 MB) lies inside it, and some 15 KB a site.
    exported: what `export_onnx` returned, to tell of the file and its export error too.
    Raises OptionError for another suffix, MissingDependencyError for .html without the package
    plotly, ExportError where the file cannot be written.
    """
    target = Path(path)
    check_target(target)
    text = page(report, exported) if target.suffix == ".html" else _json(report, exported)
    with replaced(target) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return target


def check_target(path: Path) -> None:
    """Raise what `write_report` would raise for the path; for checks before long work."""
    if path.suffix not in (".html", ".json"):
        raise OptionError(f"the report is {str(path)!r}; allowed: a file in .html or .json")
    if path.suffix == ".html":
        check_plotly()
    check_writable(path)


def _json(report: Report | Match, exported: OnnxExport | None) -> str:
    data = report.to_dict()
    if exported is not None:
        data["exported"] = {**asdict(exported), "path": str(exported.path)}
    return json.dumps(data, indent=2) + "\n"
