"""How often mode "budget" keeps its budget on samples that fit, plan and report have not seen.

The digits transformer of the examples. Each seed shuffles its 1,797 images, keeps 500 apart, and
splits the others into fit, plan and report as `convert` does; what `convert` would return is
measured on the 500. A run that ends in BudgetError counts as one that broke its budget.

Usage: python -m benchmarks.budget [--seeds 20] [--metrics relative kl] [-o FILE]; writes JSON and
prints a table.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from dyt_compile.calibration import Calibration
from dyt_compile.data import split, whole
from dyt_compile.errors import BudgetError
from dyt_compile.files import replaced
from dyt_compile.passes.capture import capture
from dyt_compile.passes.match import match
from dyt_compile.passes.verify import Reference, chosen_output
from dyt_compile.report import environment
from dyt_compile.shelf import Shelf
from dyt_compile.trials import Trials

sys.path.insert(0, str(Path(__file__).parent.parent / "examples" / "digits"))

RESULTS = Path(__file__).parent / "results" / "budget.json"
APART = 500
BUDGETS = {
    "relative": (0.02, 0.05, 0.1, 0.2),
    "cosine": (0.0002, 0.001, 0.004, 0.02),
    "kl": (0.0002, 0.001, 0.004, 0.02),
    "top1": (0.01, 0.02, 0.05, 0.1),
}
"""About where none to all of the sites fit in; a cosine error is half a squared relative one."""


@dataclass(frozen=True)
class Run:
    """One conversion: how many sites, and the error on the samples of each part.

    planned: None where no site was converted; unseen: on those kept apart, None after BudgetError.
    looks: sets that were measured on the plan samples.
    """

    seed: int
    metric: str
    budget: float
    converted: int
    planned: float | None
    reported: float | None
    unseen: float | None
    looks: int

    @property
    def kept(self) -> bool:
        """Whether the budget holds on the samples kept apart."""
        return self.unseen is not None and self.unseen <= self.budget


class Fitted(Trials):
    """Trials that share their fits, which no metric and no budget has a part in."""

    fits: dict[str, Calibration]

    def _calibrated(self, names: Collection[str], *others: Any, **options: Any) -> Calibration:
        key = repr((sorted(names), others, options))
        if key not in self.fits:
            self.fits[key] = super()._calibrated(names, *others, **options)
        return self.fits[key]


def runs(seed: int, metrics: Sequence[str]) -> Iterator[Run]:
    """Every metric and budget on one split."""
    from model import BATCH_SIZE, images, load

    model, _ = load()
    pixels = torch.cat(images()[::2])
    order = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(seed))
    apart, given = (
        [(batch,) for batch in pixels[chosen].split(BATCH_SIZE)]
        for chosen in (order[:APART], order[APART:])
    )
    graph = capture(model, given[0], batches=given)
    found, output = match(graph), chosen_output(graph, None)
    sites = [site.name for site in found.sites]
    shared: dict[str, Calibration] = {}
    with Shelf(graph) as shelf:
        for metric in metrics:
            samples = split(graph, given, seed)
            trials = Fitted(graph, found, samples, shelf, output, metric, seed, "auto")
            trials.fits = shared
            unseen = Reference(graph, whole(graph, apart), shelf, output=output, metric=metric)
            for budget in BUDGETS[metric]:
                yield _run(trials, sites, unseen, (seed, metric, budget))


def _run(
    trials: Trials, sites: Sequence[str], unseen: Reference, about: tuple[int, str, float]
) -> Run:
    try:
        outcome = trials.within(sites, about[2])
    except BudgetError:
        return Run(*about, 0, None, None, None, 0)
    planned = outcome.planned
    return Run(
        *about,
        len(planned.converted),
        None if planned.chosen is None else planned.chosen.measurement.error,
        outcome.measured.error,
        unseen.measure(outcome.graph).error,
        len(planned.attempts),
    )


def summary(found: Sequence[Run]) -> list[dict[str, Any]]:
    """For each metric and budget: in how many runs it was kept, and how many sites were DyT."""
    rows = []
    for metric, budget in dict.fromkeys((run.metric, run.budget) for run in found):
        own = [run for run in found if (run.metric, run.budget) == (metric, budget)]
        rows.append(
            {
                "metric": metric,
                "budget": budget,
                "runs": len(own),
                "kept": sum(run.kept for run in own),
                "refused": sum(run.unseen is None for run in own),
                "converted": sum(run.converted for run in own) / len(own),
                "largest": max((run.unseen for run in own if run.unseen is not None), default=None),
            }
        )
    return rows


def table(rows: Sequence[dict[str, Any]]) -> Table:
    shown = Table("metric", "budget", "kept", "refused", "converted, mean of 9", "largest error")
    for row in rows:
        largest = "" if row["largest"] is None else f"{row['largest']:.3g}"
        shown.add_row(
            row["metric"], f"{row['budget']:g}", f"{row['kept']} of {row['runs']}",
            str(row["refused"]), f"{row['converted']:.1f}", largest,
        )  # fmt: skip
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--metrics", nargs="+", choices=tuple(BUDGETS), default=list(BUDGETS))
    parser.add_argument("-o", "--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    console = Console(stderr=True)
    found: list[Run] = []
    for seed in track(range(options.seeds), "seeds", console=console):
        found += runs(seed, options.metrics)
        rows = summary(found)
        data = {"rows": rows, "runs": list(map(asdict, found)), "environment": environment()}
        with replaced(options.out) as temporary:
            temporary.write_text(json.dumps(data, indent=1) + "\n")
    kept = sum(run.kept for run in found)
    Console().print(table(rows))
    Console().print(f"budget kept in {kept} of {len(found)} runs: {kept / len(found):.1%}")


if __name__ == "__main__":
    main()
