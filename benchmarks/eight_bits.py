"""How many products a budget leaves in float: `python -m benchmarks.eight_bits`.

The digits ViT and the GPT of characters, in mode "budget" with the relative error at the output,
the products behind DyT over INT8 and FP8: what `convert` chooses. Errors are those of the report
samples, which neither fit nor plan nor the choice of products has seen. Writes
benchmarks/results/eight_bits.json.

Usage: python -m benchmarks.eight_bits [--only digits] [--budgets 0.05 0.1]
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

import dyt_compile
from dyt_compile.errors import BudgetError
from dyt_compile.files import replaced
from dyt_compile.report import environment
from examples.characters import model as characters
from examples.digits import model as digits

RESULTS = Path(__file__).parent / "results/eight_bits.json"
SUBJECTS: dict[str, Callable[[], tuple[Any, Iterable[Any]]]] = {
    "digits": lambda: (digits.load()[0], list(digits.calibration())),
    "characters": lambda: (characters.load()[0], list(characters.calibration())),
}


def chosen(name: str, dtype: str, budget: float) -> dict[str, Any]:
    """What one conversion makes of it."""
    model, batches = SUBJECTS[name]()
    about = {"model": name, "dtype": dtype, "budget": budget}
    try:
        report = dyt_compile.convert(
            model, batches, mode="budget", budget=budget, quantize=dtype
        ).report
    except BudgetError as error:
        return {**about, "refused": str(error)}
    told = report.quantized
    if told is None:
        raise ValueError(f"{name} was not quantised")
    return {
        **about,
        "sites": len(report.sites),
        "converted": report.converted,
        "products": told.products,
        "over_budget": told.over_budget,
        "converting": report.error,
        "quantising": told.error,
        "both": told.total,
        "seconds": report.seconds,
    }


def table(rows: Iterable[dict[str, Any]]) -> Table:
    made = Table("model", "budget", "sites", "type", "products", "left", "converting", "quantising",
                 "both")  # fmt: skip
    for row in rows:
        figures = (row["refused"],) if "refused" in row else (
            f"{row['converted']} of {row['sites']}", row["dtype"], str(row["products"]),
            str(row["over_budget"]),
            *(f"{row[part]:.4f}" for part in ("converting", "quantising", "both")),
        )  # fmt: skip
        made.add_row(row["model"], f"{row['budget']:g}", *figures)
    return made


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.eight_bits", description=__doc__)
    parser.add_argument("--only", choices=list(SUBJECTS), action="append")
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.05, 0.1])
    asked = parser.parse_args()
    known = json.loads(RESULTS.read_text())["choices"] if RESULTS.exists() else []
    for name in asked.only or SUBJECTS:
        for budget in asked.budgets:
            for dtype in ("int8", "fp8"):
                row = chosen(name, dtype, budget)
                same = {key: row[key] for key in ("model", "dtype", "budget")}
                known = [one for one in known if not same.items() <= one.items()] + [row]
                Console().print(table([row]))
                with replaced(RESULTS) as temporary:
                    told = {"environment": environment(), "choices": known}
                    temporary.write_text(json.dumps(told, indent=1) + "\n")
    Console().print(table(known))


if __name__ == "__main__":
    main()
