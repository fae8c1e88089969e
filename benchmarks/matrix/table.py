"""docs/matrix.md from the results of the matrix, and from nothing else."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from .routes import ONNX, ROUTES, Cell, State

__all__ = ["render"]

HEAD = """\
# The matrix: every architecture by every route

Written by `make matrix`, of {versions}.
`python -m benchmarks.matrix --only REGEX` does some rows again. Not edited by hand:
`tests/test_matrix.py` holds it to what runs.

A row is one architecture with random weights, small for the whole way, and at its full size for
matching alone. It proves the routes, and says nothing of quality.

- **sites**, **kinds**: the calls of norms in one forward pass. Hooks on the modules count them, and
  their outputs show the kind (a constant added to its input does not move a LayerNorm): the
  matcher has no part in it. Left out, by name in the system, are calls that normalize a weight
  (learned queries) and calls whose result nothing reads.
- **refusals**: what `inspect` refuses. Every BatchNorm, GroupNorm and InstanceNorm that is called
  must be among them, and no other module.
- **full size**: sites found at the real width and depth, on the meta device; seconds of
  `torch.export` and of `inspect`.
- **fx**, **export**, **decomposed**: `inspect` of a graph of `torch.fx.symbolic_trace`; of
  `torch.export`, with static shapes and with a dynamic batch; of that after
  `run_decompositions()`. ✓: every name and kind is the true one.
- **all**: `convert(mode="all")` leaves no norm, and the model runs.
- **compile**: `torch.compile` of the original, `fullgraph=True`, with that calibration turns every
  site into DyT, and computes what the converted model computes.
- **ONNX**: the opsets of the original model's files in which `inspect` finds as many sites of each
  kind: 18, 20 and 23 from the exporter over `torch.export`, 14 and 17 from the one over
  TorchScript.
- **ONNX Runtime**: the converted model's file against the converted model; the largest difference,
  relative to the largest output.
- **TensorRT-RTX**: the engine that it builds from that file for SM89.
- **seconds**: of one CPU core, for the row.

{summary} "–" with a note: a tool before or behind this package does not take the model, or the
route before failed. "✗": it ran, and the result is not what it should be.
"""

COLUMNS = (
    "system",
    "source",
    "sites",
    "kinds",
    "refusals",
    "full size",
    "fx",
    "export",
    "decomposed",
    "all",
    "compile",
    "ONNX",
    "ONNX Runtime",
    "TensorRT-RTX",
    "seconds",
)

ALIGNED = {"sites", "seconds"}


class _Notes:
    """Footnotes: the same text has one number."""

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}

    def mark(self, text: str) -> str:
        """The mark of a note; none for no text."""
        return f"[^{self._numbers.setdefault(text, len(self._numbers) + 1)}]" if text else ""

    def __str__(self) -> str:
        return "\n".join(f"[^{number}]: {_escaped(text)}" for text, number in self._numbers.items())


def render(results: Mapping[str, Any]) -> str:
    """The page. results: as benchmarks/results/matrix.json holds them."""
    rows: Mapping[str, Any] = results["rows"]
    notes = _Notes()
    groups: dict[str, list[str]] = {}
    for name, row in rows.items():
        groups.setdefault(row["group"], []).append(_line(name, row, notes))
    rule = ["--:" if column in ALIGNED else "---" for column in COLUMNS]
    tables = [
        "\n".join([f"## {group}", "", _joined(COLUMNS), _joined(rule), *lines])
        for group, lines in groups.items()
    ]
    head = HEAD.format(
        versions=", ".join(f"{name} {version}" for name, version in results["versions"].items()),
        summary=_summary(rows.values()),
    )
    return "\n\n".join([head.rstrip(), *tables, str(notes)]).rstrip() + "\n"


def _line(name: str, row: Mapping[str, Any], notes: _Notes) -> str:
    cells = {route: Cell(**told) for route, told in row["cells"].items()}
    shown = {route: _shown(cells.get(route), notes) for route in ROUTES if route not in _ONNX}
    kinds = ", ".join(f"{count} {kind}" for kind, count in row["kinds"].items())
    return _joined(
        [
            name,
            row["source"],
            str(row["sites"]),
            kinds or "nothing to replace",
            shown["refusals"],
            shown["full"],
            shown["fx"],
            shown["export"],
            shown["decomposed"],
            shown["convert"],
            shown["compile"],
            _opsets(cells, notes),
            shown["parity"],
            shown["engine"],
            f"{row['seconds']:.0f}" if "seconds" in row else "",
        ]
    )


def _shown(cell: Cell | None, notes: _Notes) -> str:
    """The figure, a tick or a sign of failure, and the mark of the note to it."""
    if cell is None:
        return ""
    return (cell.told or "✓" if cell.state == State.PASS else _sign(cell)) + notes.mark(cell.reason)


def _sign(cell: Cell) -> str:
    return "–" if cell.state in (State.CLOSED, State.SKIPPED) else "✗"


_ONNX = {f"onnx{name}": name for name in ONNX}


def _opsets(cells: Mapping[str, Cell], notes: _Notes) -> str:
    """The opsets that match, and those that do not with a sign and a note each."""
    done = {name: cells[route] for route, name in _ONNX.items() if route in cells}
    return ", ".join(
        name if cell.state == State.PASS else f"{name} {_shown(cell, notes)}"
        for name, cell in done.items()
    )


def _summary(rows: Iterable[Mapping[str, Any]]) -> str:
    """How many cells there are of each state."""
    states = Counter(cell["state"] for row in rows for cell in row["cells"].values())
    failed = states[State.WRONG] + states[State.ENDED]
    return (
        f"Of {states.total()} cells, {states[State.PASS]} pass, {failed} are wrong, and "
        f"{states[State.CLOSED] + states[State.SKIPPED]} could not be tried."
    )


def _joined(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _escaped(text: str) -> str:
    """Text that Markdown leaves as it is."""
    for sign in "\\`*_<>[]|":
        text = text.replace(sign, f"\\{sign}")
    return text
