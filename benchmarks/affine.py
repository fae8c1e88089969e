"""How many sites become affine maps within a budget: `python -m benchmarks.affine`.

The digits ViT, the GPT of characters and MiniLM, in mode "budget" with the relative error at the
output, without affine maps and with them: what `convert` plans, on one split. Errors are those of
the report samples, which neither fit nor plan has seen. Writes benchmarks/results/affine.json.

Usage: python -m benchmarks.affine [--only digits] [--budgets 0.02 0.05 0.1]
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from dyt_compile.data import split
from dyt_compile.errors import BudgetError
from dyt_compile.exclusion import candidates
from dyt_compile.files import replaced
from dyt_compile.passes.capture import capture
from dyt_compile.passes.match import match
from dyt_compile.passes.plan import Choice
from dyt_compile.passes.verify import chosen_output
from dyt_compile.report import environment
from dyt_compile.savings import savings
from dyt_compile.shelf import Shelf
from dyt_compile.sites import Match
from dyt_compile.trials import Trials
from examples.characters import model as characters
from examples.digits import model as digits
from examples.minilm import model as minilm

RESULTS = Path(__file__).parent / "results/affine.json"
SUBJECTS: dict[str, Callable[[], tuple[Any, Iterable[Any]]]] = {
    "digits": lambda: (digits.load()[0], list(digits.calibration())),
    "characters": lambda: (characters.load()[0], list(characters.calibration())),
    "minilm": lambda: (minilm.load()[0], list(minilm.calibration())),
}


def plans(name: str, budgets: Sequence[float]) -> Iterator[dict[str, Any]]:
    """One plan a budget, without affine maps and with them."""
    model, batches = SUBJECTS[name]()
    first = next(iter(batches))
    args, kwargs = ((), first) if isinstance(first, dict) else (first, {})
    graph = capture(model, args, kwargs, batches=batches)
    found = match(graph)
    able = candidates(found, ())
    with Shelf(graph) as shelf:
        samples = split(graph, batches, 0)
        output = chosen_output(graph, None)
        for affine in (False, True):
            trials = Trials(
                graph, found, samples, shelf, output, "relative", 0, "auto", affine=affine
            )
            for budget in budgets:
                about = {"model": name, "sites": len(found.sites), "affine": affine}
                yield {**about, "budget": budget, **planned(trials, found, able, budget)}


def planned(trials: Trials, found: Match, able: Sequence[str], budget: float) -> dict[str, Any]:
    """What a plan converts, its error on the report samples, and what it could save."""
    try:
        outcome = trials.within(able, budget)
    except BudgetError as error:
        return {"error": str(error)}
    choice = Choice() if outcome.planned.chosen is None else outcome.planned.chosen.choice
    sites = [site for site in found.sites if site.name in choice.names]
    saved = savings(sites, trials.survey(), (), choice.affine)
    return {
        "dyt": len(choice.names) - len(choice.affine),
        "maps": len(choice.affine),
        "may": len(outcome.planned.affine),
        "reported": outcome.measured.error,
        "kernels": saved.kernels,
        "traffic_bytes": saved.traffic_bytes,
    }


def table(rows: Iterable[dict[str, Any]]) -> Table:
    made = Table("model", "budget", "affine maps", "DyT", "affine", "of sites", "error", "traffic")
    for row in rows:
        figures = ("", "", "", row["error"], "") if "error" in row else (
            str(row["dyt"]), str(row["maps"]), str(row["sites"]),
            f"{row['reported']:.4f}", f"-{row['traffic_bytes'] / 1000:.1f} kB",
        )  # fmt: skip
        wanted = f"{row.get('may', 0)} may be" if row["affine"] else "off"
        made.add_row(row["model"], f"{row['budget']:g}", wanted, *figures)
    return made


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.affine", description=__doc__)
    parser.add_argument("--only", choices=list(SUBJECTS), action="append")
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.02, 0.05, 0.1])
    asked = parser.parse_args()
    known = json.loads(RESULTS.read_text())["plans"] if RESULTS.exists() else []
    for name in asked.only or SUBJECTS:
        rows = [row for row in known if row["model"] != name]
        for row in plans(name, asked.budgets):
            rows.append(row)
            Console().print(table([row]))
            with replaced(RESULTS) as temporary:
                told = {"environment": environment(), "plans": rows}
                temporary.write_text(json.dumps(told, indent=1) + "\n")
        known = rows
    Console().print(table(known))


if __name__ == "__main__":
    main()
