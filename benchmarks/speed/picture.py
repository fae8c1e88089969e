"""The ratios with their intervals, a panel a subject, a colour a runtime."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .runtimes import RUNTIMES
from .subjects import SUBJECTS
from .table import found

__all__ = ["draw"]

COLUMNS = 2
APART = 0.17
"""Between the runtimes of a form, whose forms are 1 apart."""


def draw(results: Mapping[str, Any], path: Path) -> None:
    """Write an SVG. results: as benchmarks/results/speed.json holds them."""
    import matplotlib as mpl

    mpl.use("Agg")
    mpl.rcParams["svg.hashsalt"] = "speed"
    from matplotlib import pyplot as plt

    subjects = list(results["subjects"])
    rows = -(-len(subjects) // COLUMNS)
    figure, panels = plt.subplots(
        rows, COLUMNS, figsize=(11, 3.1 * rows), layout="constrained", squeeze=False
    )
    for panel in panels.flat[len(subjects) :]:
        panel.axis("off")
    for subject, panel in zip(subjects, panels.flat, strict=False):
        _panel(panel, results, subject)
    figure.legend(*panels.flat[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    figure.savefig(path, format="svg", metadata={"Date": None})
    plt.close(figure)


def _panel(panel: Any, results: Mapping[str, Any], subject: str) -> None:
    base, *forms = SUBJECTS[subject].forms
    for number, (runtime, about) in enumerate(RUNTIMES.items()):
        places, ratios = [], []
        for place, form in enumerate(forms):
            value = found(results, subject, runtime, form, base)
            if value is not None:
                places.append(place + (number - 1.5) * APART)
                ratios.append(value)
        middle = [value.median for value in ratios]
        below = [value.median - value.low for value in ratios]
        above = [value.high - value.median for value in ratios]
        panel.errorbar(middle, places, xerr=(below, above), fmt="o", ms=4, label=about.title)
    panel.axvline(1, color="gray", linewidth=1)
    panel.set_yticks(range(len(forms)), forms, fontsize="small")
    panel.set_ylim(len(forms) - 0.5, -0.5)
    if SUBJECTS[subject].together:
        panel.set_xscale("log", subs=range(2, 10))
        for label in (panel.xaxis.set_major_formatter, panel.xaxis.set_minor_formatter):
            label("{x:g}")
    panel.set_xlabel(f"time / {base}", fontsize="small")
    panel.set_title(SUBJECTS[subject].title, fontsize="medium")
    panel.grid(axis="x", alpha=0.3)
