"""docs/performance.md from the results, and from nothing else."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from statistics import mean, median
from typing import Any

from rich.table import Table

from .forms import FOLDED, INT8, ORIGINAL
from .pairs import Ratio, ratio
from .runtimes import RUNTIMES
from .subjects import SUBJECTS

__all__ = ["BARS", "PAIRS", "Bar", "found", "render", "terminal"]

PAIRS = 30
"""As many as a bar asks for."""

LOADED = 0.1
"""Cores of other work; above, the machine is called loaded."""

HEAD = """\
# Performance on CPUs

Written by `make bench`. Not edited by hand: `tests/test_speed.py` holds it to the results,
`benchmarks/results/speed.json`.

In every cell a form took turns with the original in one process: A B, B A, and so on. A cell is the
median of the ratios of all pairs, with its 95 % interval (bootstrap over the pairs): below 1 is
faster. Medians of single forms, in ms, only say how long such a run is: never compare them between
cells. All weights are random, norms and DyT have gammas and betas, and all is float32 where nothing
else is said. Files are as the package, or torch's exporter, writes them, with a dynamic batch. How
many threads there were is told [at the end](#how-it-was-run). How long it takes to find and rewrite
norms in files, beside other tools: [files.md](files.md).
"""

MODELS = """\
- **The original again**: two copies of the same, the control.
- **DyT as four operators**: multiply, tanh, multiply, add, as a model spells it.
- **Folded DyT**: `convert(fold=True)`, γ and β in the weights behind it. BERT's residual reads
  every norm, too: there they stay.
- **Affine, folded**: γ·x + β in place of every norm, folded in the same way. What is left of it is
  a bias in each layer of the LLaMA, which had none, and all of it in BERT.
- **Bounded INT8**: `convert(quantize="int8")`: the layers that read a DyT, Q/DQ, weights
  per channel, scales that need no data; written for each runtime.
- **No norm**: nothing in place of the norms, the limit.
- **Calibrated INT8**: the peer. The norms stay, and the layers that read one are quantized by ONNX
  Runtime's `quantize_static`, Q/DQ, weights per channel, ranges from eight samples.
"""

SITES = """\
Against the bare add of two tensors, which is the memory's limit: what is "residual + …" reads and
writes as much. DyT is the package's operator; RMSNorm in files is what torch's exporter writes at
opset 20, seven operators, which ONNX Runtime 1.32 leaves as they are.
"""


@dataclass(frozen=True)
class Bar:
    """What a ratio is held to.

    upper: the upper bound of its interval, from 30 pairs on, must hold; else its median.
    """

    subjects: tuple[str, ...]
    runtimes: tuple[str, ...]
    form: str
    base: str
    limit: float
    upper: bool = False

    def holds(self, value: Ratio) -> bool:
        """Whether a ratio keeps within the limit."""
        return (value.high if self.upper else value.median) <= self.limit


BARS = (
    Bar(("vit-b",), ("onnxruntime",), INT8, ORIGINAL, 0.80),
    Bar(("vit-b",), ("openvino",), INT8, ORIGINAL, 0.70),
    Bar(("vit-b", "bert-base"), tuple(RUNTIMES), FOLDED, ORIGINAL, 1.03, upper=True),
    Bar(("site-768-fp32",), ("inductor",), "residual + DyT", "bare add", 1.10),
    Bar(("site-768-fp32",), ("inductor",), "residual + DyT", "residual + LayerNorm", 0.75),
    Bar(("site-768-bf16",), ("inductor",), "residual + DyT", "residual + RMSNorm", 1.0),
)

Results = Mapping[str, Any]


def found(results: Results, subject: str, runtime: str, form: str, base: str) -> Ratio | None:
    """The ratio of two forms that took turns, None where they did not."""
    for cell in results["subjects"].get(subject, {}).get(runtime, {}).values():
        times = cell["times_ms"]
        if form in times and base in times:
            return ratio(times[form], times[base])
    return None


def render(results: Results) -> str:
    """The page. results: as benchmarks/results/speed.json holds them."""
    parts = (_loaded, _bars, _models, _sites, _picture, _runs)
    told = [HEAD.rstrip(), *(part(results) for part in parts)]
    return "\n\n".join(text.rstrip() for text in told if text) + "\n"


def terminal(results: Results) -> Iterator[Table]:
    """The same figures, as tables of 100 columns: the median and the upper bound."""
    for subject in results["subjects"]:
        title = f"{SUBJECTS[subject].title}, against {SUBJECTS[subject].base}"
        table = Table("", *_columns(), title=title, title_justify="left", pad_edge=False)
        for line in _lines(results, subject, lambda r: f"{r.median:.3f} ≤ {r.high:.3f}"):
            table.add_row(*line)
        yield table


def _columns() -> list[str]:
    return [runtime.title for runtime in RUNTIMES.values()]


def _lines(
    results: Results, subject: str, told: Callable[[Ratio], str], mark: Callable[[str], str] = str
) -> Iterator[list[str]]:
    """A table's lines: the base with its medians, then the ratios of each form."""
    runtimes = results["subjects"][subject]
    base, *others = SUBJECTS[subject].forms
    medians = (_base_ms(runtimes.get(name, {}), base) for name in RUNTIMES)
    yield [base, *("" if ms is None else f"{ms:.3g} ms" for ms in medians)]
    for form in others:
        line = [form]
        for runtime in RUNTIMES:
            value = found(results, subject, runtime, form, base)
            reason = _reason(runtimes.get(runtime, {}), form, base)
            line.append(mark(reason) if value is None else told(value))
        yield line


def _base_ms(cells: Mapping[str, Any], base: str) -> float | None:
    times = [each for cell in cells.values() for each in cell["times_ms"].get(base, ())]
    return median(times) if times else None


def _reason(cells: Mapping[str, Any], form: str, base: str) -> str:
    """Why a form has no ratio in a runtime; nothing where it was not tried."""
    reasons = [cell["reasons"] for name, cell in cells.items() if name in (form, "all")]
    return next((told[each] for told in reasons for each in (form, base) if each in told), "")


def _span(value: Ratio) -> str:
    return f"{value.median:.3f} ({value.low:.3f} to {value.high:.3f})"


class _Notes:
    """Footnotes: the same text has one number."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._numbers: dict[str, int] = {}

    def mark(self, text: str) -> str:
        """A dash with the mark of a note; nothing for no text."""
        number = self._numbers.setdefault(text, len(self._numbers) + 1) if text else 0
        return f"–[^{self._name}-{number}]" if text else ""

    def __str__(self) -> str:
        lines = (f"[^{self._name}-{n}]: {_escaped(text)}" for text, n in self._numbers.items())
        return "\n".join(lines)


def _escaped(text: str) -> str:
    """Text that Markdown leaves as it is."""
    for sign in "\\`*_<>[]|":
        text = text.replace(sign, f"\\{sign}")
    return text


def _table(columns: list[str], lines: Iterator[list[str]]) -> str:
    rule = ["---", *("--:" for _ in columns[1:])]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (columns, rule, *lines))


def _tables(results: Results, *, together: bool) -> Iterator[str]:
    for subject in results["subjects"]:
        if SUBJECTS[subject].together is together:
            notes = _Notes(subject)
            lines = list(_lines(results, subject, _span, notes.mark))
            yield f"### {SUBJECTS[subject].title}"
            yield _table(["", *_columns()], iter(lines))
            yield str(notes)


def _section(title: str, text: str, tables: Iterator[str]) -> str:
    told = [table for table in tables if table]
    return "\n\n".join([f"## {title}", text.rstrip(), *told]) if told else ""


def _models(results: Results) -> str:
    return _section("Whole models", MODELS, _tables(results, together=False))


def _sites(results: Results) -> str:
    return _section("One site", SITES, _tables(results, together=True))


def _bars(results: Results) -> str:
    """What is held to a limit, and whether it keeps it."""
    lines = [
        [
            f"{SUBJECTS[subject].title}: {bar.form} / {bar.base}",
            RUNTIMES[runtime].title,
            f"{'upper bound' if bar.upper else 'median'} ≤ {bar.limit:g}",
            _span(value),
            _verdict(results, bar, subject, runtime, value),
        ]
        for bar in BARS
        for subject in bar.subjects
        for runtime in bar.runtimes
        if (value := found(results, subject, runtime, bar.form, bar.base)) is not None
    ]
    head = ["ratio", "runtime", "held to", "found", ""]
    return f"## What is held\n\n{_table(head, iter(lines))}" if lines else ""


def _verdict(results: Results, bar: Bar, subject: str, runtime: str, value: Ratio) -> str:
    cells = results["subjects"][subject][runtime].values()
    rounds = min(
        len(cell["times_ms"][bar.form])
        for cell in cells
        if {bar.form, bar.base} <= cell["times_ms"].keys()
    )
    if bar.upper and rounds < PAIRS:
        return f"{rounds} pairs: too few"
    return "✓" if bar.holds(value) else "✗"


def _picture(results: Results) -> str:
    return "## All of it\n\n![ratios with their intervals](performance.svg)"


def _cells(results: Results) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for subject, runtimes in results["subjects"].items():
        for runtime, cells in runtimes.items():
            for name, cell in cells.items():
                yield f"{subject}/{runtime}/{name}", cell


def _others(results: Results) -> list[float]:
    return [c["others"] for _, c in _cells(results) if c.get("others") is not None]


def _loaded(results: Results) -> str:
    busy = _others(results)
    if not busy or max(busy) <= LOADED:
        return ""
    return (
        f"**The machine was loaded**: other work kept {mean(busy):.2f} of its cores busy on\n"
        f"average, {max(busy):.2f} in the worst case. Take the figures as rough."
    )


def _runs(results: Results) -> str:
    """Under which circumstances the cells were made: what all share, then what differs."""
    names = dict.fromkeys(cell["run"] for _, cell in _cells(results))
    runs = [results["runs"][name] for name in names]
    shared = {k: v for k, v in runs[0].items() if all(run.get(k) == v for run in runs)}
    lines = [f"- All: {_told(shared)}."]
    for name, run in zip(names, runs, strict=True):
        own = _told({key: value for key, value in run.items() if key not in shared})
        if own:
            lines.append(f"- {own}: {'; '.join(_places(results, name))}.")
    busy = _others(results)
    if busy:
        lines.append(f"- Cores busy with other work meanwhile: {mean(busy):.2f} on average.")
    return "\n".join(["## How it was run", "", *lines])


def _told(run: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in run.items())


def _places(results: Results, run: str) -> Iterator[str]:
    """What was made in a run: forms by subject and runtime, or all of them."""
    for subject, runtimes in results["subjects"].items():
        for runtime, cells in runtimes.items():
            own = [name for name, cell in cells.items() if cell["run"] == run]
            if len(own) == len(cells):
                yield f"{subject}/{runtime}"
            elif own:
                yield f"{subject}/{runtime}, {' and '.join(own)}"
