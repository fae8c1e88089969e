"""How long an engine takes on this machine's GPU."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from pathlib import Path

from .tensorrt_process import call, installed

__all__ = ["PASSES", "Timing", "time_engine"]

PASSES = 100
"""As in Table 7 of the DyT paper (arXiv 2503.10622)."""


@dataclass(frozen=True)
class Timing:
    """device: the GPU's name; milliseconds: of each pass, in order."""

    device: str
    milliseconds: tuple[float, ...]

    @property
    def median_ms(self) -> float:
        """The median of all passes, milliseconds."""
        return statistics.median(self.milliseconds)


def time_engine(
    engine_path: str | Path,
    *,
    runtime: str = "tensorrt",
    plugin_library: str | Path | None = None,
    passes: int = PASSES,
) -> Timing:
    """Time `passes` runs of an engine at its usual shapes, on this machine's GPU.

    By CUDA events, after ten runs that are not counted. Raises ExportError without a GPU.
    """
    request = {
        "verb": "time",
        "engine": str(Path(engine_path).absolute()),
        "plugin_library": None if plugin_library is None else str(Path(plugin_library).absolute()),
        "passes": passes,
    }
    answer = call(installed(runtime), "timing an engine", request)
    return Timing(answer["device"], tuple(answer["milliseconds"]))
