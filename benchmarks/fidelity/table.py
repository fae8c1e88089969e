"""docs/fidelity.md from the results, and from nothing else."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.table import Table

from .subjects import SUBJECTS, Figure

__all__ = ["render", "terminal"]

HEAD = """\
# Fidelity: what all norms cost, and what comes back

Written by `make fidelity` (`SEEDS=3 make fidelity` for three seeds). Not edited by hand:
`tests/test_fidelity.py` holds it to the results, `benchmarks/results/fidelity.json`.

Every norm of a trained model is converted, whatever that costs: first without training, by the fits
of `convert(mode="all")`; then `recover` lets the result learn from the original, on inputs without
labels. All figures are of samples that took part in no fit, no training and no choice: 500 test
images; 300 sentences; a tenth of the text. A seed decides on that split and on every random choice.
The digits ViT and the GPT of seed 0 are those of the examples, and others are trained from the seed
by the same scripts; MiniLM is a third party's and the same for all seeds, fitted on 3,500 sentences
and taught by those and 9,500 more (Python's help topics and docstrings). So is the forecaster, if
it is here (`--only forecast`): it has no floor, and no choice was made with a look at it.

A cell is the mean, with the range where there are several seeds. **Floor**: what a first attempt
reached, and whether it is held, or by how many seeds; **goal**: what is aimed at. Relative error:
‖f − g‖ / ‖f‖ of the outputs, f the original's. Agreement: the share of images with the same class.
"""

STAGES = {"training_free": "training-free", "recovered": "recovered"}

PICTURE = """\
## While it recovers

![held-out error over the minutes of recovery](fidelity.svg)

The error on the held-out samples by which `recover` chooses its weights (others than those above).
"""

Row = Mapping[str, Any]


def render(results: Mapping[str, Mapping[str, Row]]) -> str:
    """The page. results: as benchmarks/results/fidelity.json holds them: by model, by seed."""
    parts = [HEAD.rstrip()]
    for name, rows in results.items():
        lines = [" | ".join(cells) for cells in _cells(name, list(rows.values()))]
        header = " | ".join(_columns())
        rule = " | ".join(["---", *("--:" for _ in _columns()[1:])])
        table = "\n".join(f"| {line} |" for line in (header, rule, *lines))
        parts += [f"## {SUBJECTS[name].title}", _told(name, rows), table]
    parts += [PICTURE.rstrip(), _runs(results)]
    return "\n\n".join(parts) + "\n"


def terminal(results: Mapping[str, Mapping[str, Row]]) -> Table:
    """The same figures, as a table of 100 columns."""
    table = Table("model", *_columns(), pad_edge=False)
    for name, rows in results.items():
        for number, cells in enumerate(_cells(name, list(rows.values()))):
            table.add_row("" if number else name, *cells)
    return table


def _columns() -> list[str]:
    return ["", *(column for stage in STAGES.values() for column in (stage, "floor", "goal"))]


def _cells(name: str, rows: Sequence[Row]) -> Iterator[list[str]]:
    """The lines of one model's table."""
    for figure in SUBJECTS[name].figures:
        cells = [figure.title]
        for stage in STAGES:
            values = [figure.value(row[stage]) for row in rows]
            cells += [_mean(figure, values), _floor(figure, stage, values), _goal(figure, stage)]
        yield cells


def _mean(figure: Figure, values: Sequence[float]) -> str:
    mean = format(sum(values) / len(values), figure.form)
    if len(values) == 1:
        return mean
    return f"{mean} ({min(values):{figure.form}} to {max(values):{figure.form}})"


def _floor(figure: Figure, stage: str, values: Sequence[float]) -> str:
    if stage not in figure.bars:
        return ""
    floor = figure.bars[stage].floor
    held = sum(figure.holds(value, floor) for value in values)
    if len(values) == 1:
        return f"{_limit(figure, floor)} {'✓' if held else '✗'}"
    return f"{_limit(figure, floor)}, {held} of {len(values)}"


def _goal(figure: Figure, stage: str) -> str:
    goal = figure.bars[stage].goal if stage in figure.bars else None
    return "" if goal is None else _limit(figure, goal)


def _limit(figure: Figure, limit: float) -> str:
    """What a figure should reach, with as few digits as it has."""
    told = f"{100 * limit:g}%" if figure.form.endswith("%") else f"{limit:g}"
    return f"{'≥' if figure.higher else '≤'} {told}"


def _told(name: str, rows: Mapping[str, Row]) -> str:
    """What stands above a model's table: the original's quality, fits and times by seed."""
    return "\n".join(f"- Seed {seed}: {_seed(name, row)}" for seed, row in rows.items())


def _seed(name: str, row: Row) -> str:
    found = row["training_free"]
    originals = {
        "digits": "accuracy {accuracy_before:.1%}",
        "characters": "loss {loss_before:.3f} nats a character",
        "forecast": "pinball loss {pinball_before:.1f} (seasonal naive {pinball_naive:.1f})",
    }
    told = [f"the original's {originals[name].format(**found)}"] if name in originals else []
    told.append(" and ".join(f"{count} {fit}" for fit, count in row["fits"].items()) + " fits")
    told.append(f"fitted in {row['seconds']['fit']:.0f} s")
    told.append(f"{row['steps']} steps in {row['seconds']['recover'] / 60:.2g} minutes")
    return ", ".join(told) + "."


def _runs(results: Mapping[str, Mapping[str, Row]]) -> str:
    """Under which circumstances the rows were made, usually all under the same, and how long."""
    alike: dict[str, list[str]] = {}
    minutes: dict[str, float] = {}
    for name, rows in results.items():
        for seed, row in rows.items():
            alike.setdefault(_circumstances(row["run"]), []).append(f"{name} {seed}")
            minutes[seed] = minutes.get(seed, 0.0) + row["seconds"]["whole"] / 60
    lines = [f"- {', '.join(rows)}: {told}." for told, rows in alike.items()]
    took = ", ".join(f"seed {seed} {took:.1f}" for seed, took in minutes.items())
    lines.append(f"- Minutes in all, of wall time: {took}.")
    return "\n".join(["## How it was run", "", "Model and seed, and with what:", "", *lines])


def _circumstances(run: Mapping[str, Any]) -> str:
    kept = {key: value for key, value in run.items() if key not in ("threads", "minutes")}
    versions = ", ".join(f"{name} {version}" for name, version in kept.items())
    return f"at most {run['minutes']:g} minutes of recovery on {run['threads']} threads; {versions}"
