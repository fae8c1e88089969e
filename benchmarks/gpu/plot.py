"""The measured medians as bars: one panel for a norm, one for the whole model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

__all__ = ["draw"]

COLOURS = {"RMSNorm": "#4c72b0", "LayerNorm": "#8c8c8c", "DyT": "#dd8452", "DynamicTanh": "#c44e52"}


def draw(found: Mapping[str, Any], path: Path) -> None:
    """Write a plot of what `benchmarks.gpu` measured; the device's name stands above it."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    parts = ("layer", "model")
    figure, panels = plt.subplots(1, len(parts), figsize=(11, 4.5), layout="constrained")
    for part, panel in zip(parts, panels, strict=True):
        rows = [row for row in found["rows"] if row["what"] == part][::-1]
        panel.barh(
            [f"{row['norm']}, {row['way']}" for row in rows],
            [row["median_ms"] for row in rows],
            color=[COLOURS[row["norm"]] for row in rows],
        )
        panel.set_title(f"{part}, median of {found['passes']} passes")
        panel.set_xlabel("ms")
    figure.suptitle(f"{found['device']}, bfloat16, 1 × {found['size']['tokens']} tokens")
    figure.savefig(path)
    plt.close(figure)
