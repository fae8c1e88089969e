"""The held-out error over the minutes of recovery, a panel a model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .subjects import SUBJECTS, Subject

__all__ = ["draw"]

METRICS = {
    "relative": ("relative error", "relative error"),
    "cosine": ("1 − cosine", "cosine"),
    "kl": ("KL, nats a character", "KL, nats a character"),
}
"""What stands at the axis, and the title of the figure whose bars are drawn."""

BARS = {"floor": "--", "goal": ":"}


def draw(results: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """Write an SVG. results: as benchmarks/results/fidelity.json holds them."""
    import matplotlib as mpl

    mpl.use("Agg")
    mpl.rcParams["svg.hashsalt"] = "fidelity"
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(
        1, len(results), figsize=(3.6 * len(results), 3.2), layout="constrained", squeeze=False
    )
    for (name, rows), panel in zip(results.items(), panels[0], strict=True):
        for seed, row in rows.items():
            minutes = row["seconds"]["recover"] / 60
            ended = row["curve"][-1][0]
            times = [share / ended * minutes for share, _ in row["curve"]]
            errors = [error for _, error in row["curve"]]
            panel.plot(times, errors, marker=".", label=f"seed {seed}")
        panel.set(title=SUBJECTS[name].title, xlabel="minutes", yscale="log")
        for bar, height in _bars(SUBJECTS[name]).items():
            panel.axhline(height, color="gray", linestyle=BARS[bar], label=bar)
        panel.set_ylabel(METRICS[SUBJECTS[name].metric][0])
        panel.title.set_fontsize("medium")
        panel.grid(which="both", alpha=0.3)
        panel.legend()
    figure.savefig(path, format="svg", metadata={"Date": None})
    plt.close(figure)


def _bars(subject: Subject) -> dict[str, float]:
    """Floor and goal of the recovered model, as errors; none where it has none."""
    title = METRICS[subject.metric][1]
    figure = next(figure for figure in subject.figures if figure.title == title)
    if "recovered" not in figure.bars:
        return {}
    limits = {bar: getattr(figure.bars["recovered"], bar) for bar in BARS}
    return {bar: 1 - limit if figure.higher else limit for bar, limit in limits.items()}
