"""docs/files.md from the results, and from nothing else."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from dyt_compile.files import replaced

__all__ = ["PAGE", "render", "write_page"]

PAGE = Path(__file__).parents[2] / "docs" / "files.md"

HEAD = """\
# ONNX files: finding and rewriting

Written by `.venv/bin/python -m benchmarks.files` from `benchmarks/results/files.json`, which holds
the versions and the machine. Not edited by hand. What takes turns with what was timed in one
process, {rounds} rounds, one thread; a figure is the median over the rounds, with its quartiles.
Other work ran on the machine, so a ratio is given of seconds of CPU, and of wall time behind it.
"""

WAYS = {
    "inspect": "`inspect`",
    "convert": "`convert --mode exact`, file to file",
    "convert and compare": "the same, and the written file compared with its source",
    "unfolded": "`convert --mode exact --no-fold`, file to file",
    "unfolded and compare": "the same, and the written file compared with its source",
    "floor": "onnx_ir, load and save (the floor)",
    "onnxscript": "onnxscript's rules for LayerNorm and RMSNorm",
    "onnxslim": "onnxslim",
    "onnxruntime": "ONNX Runtime's optimizer (extended)",
}

FILES = """\
## File to file, against loading and saving

In process. The files have their weights inside. Ours maps them and streams them into the new file;
peers parse and serialise them. Peers check nothing of what they write.
"""

MATCHING = """\
## Matching alone

Models in memory, weights not read; copying them is not timed. Ours infers the shapes, matches, and
proves every match by running it; onnxscript's rules (`rewrite` with its LayerNorm and RMSNorm
fusions) replace, after shape inference too. Truth is what the model was built from.
"""

MEMORY = """\
## Peak memory

Every way once, as a process of its own (imports count in neither column): seconds of CPU, the most
memory that the process held, mapped pages of files among it, and how many norms (or DyT) it knows
as such afterwards. The LLaMA files have 2.5 GB of weights beside them.
"""

LARGE = """\
## A model of 13.5 GB

The commands, each as a process of its own, on files of LLaMA-7B's shape from torch's exporter. The
new file refers to the same data, and `verify` without data compares node by node. Folding DyT reads
the weights that take up γ and β, one at a time, and writes them beside the new file; the others
stay where they are. (Weights are holes in a sparse file: to read them takes no disk.)
"""


def render(results: Mapping[str, Any]) -> str:
    """The page. results: as benchmarks/results/files.json holds them."""
    rounds = {r["rounds"] for part in ("files", "matching") for r in results.get(part, {}).values()}
    parts = [HEAD.format(rounds=" or ".join(map(str, sorted(rounds))) or "no").rstrip()]
    for name, text, rows in (
        ("files", FILES, _files), ("matching", MATCHING, _matching), ("memory", MEMORY, _memory),
        ("large", LARGE, _large),
    ):  # fmt: skip
        if name in results:
            parts += [text.rstrip(), *rows(results[name])]
    return "\n\n".join(parts) + "\n"


def write_page(results: Mapping[str, Any]) -> None:
    """Replace docs/files.md."""
    with replaced(PAGE) as path:
        path.write_text(render(results), encoding="utf-8")


def _files(found: Mapping[str, Any]) -> Iterator[str]:
    for subject in found.values():
        rows = [
            (WAYS[way], _ratio(ratio), f"{subject['seconds'][way]['cpu']['median']:.2f}")
            for way, ratio in subject["ratio_to_floor"].items()
        ]
        yield f"{subject['what']}:"
        yield _table(("", "times the floor", "seconds of CPU"), rows)


def _matching(found: Mapping[str, Any]) -> Iterator[str]:
    rows = []
    for subject in found.values():
        cost = {way: f"{taken['cpu']['median']:.0f}" for way, taken in subject["us_a_node"].items()}
        rows.append((
            subject["what"], str(subject["nodes"]), str(subject["norms"]),
            f"{subject['found']['ours']}, {cost['ours']} µs",
            f"{subject['found']['onnxscript']}, {cost['onnxscript']} µs",
            _ratio(subject["ratio_to_onnxscript"]),
        ))  # fmt: skip
    heads = (
        "", "nodes", "norms", "found by us, CPU a node", "by onnxscript", "ours / theirs",
    )  # fmt: skip
    yield _table(heads, rows)


def _memory(found: Mapping[str, Any]) -> Iterator[str]:
    for subject in found.values():
        rows = [(WAYS[way], *_measured(taken)) for way, taken in subject["ways"].items()]
        yield f"{subject['what']}, {subject['norms']} norms:"
        yield _table(("", "seconds of CPU", "peak memory", "known"), rows)


def _large(found: Mapping[str, Any]) -> Iterator[str]:
    rows = [
        (subject["what"], f"`{command}`", *_measured(taken)[:2], _wall(taken), *_output(taken))
        for subject in found.values()
        for command, taken in subject["commands"].items()
    ]
    heads = ("", "", "seconds of CPU", "peak memory", "seconds", "written", "a second")
    yield _table(heads, rows)


def _measured(taken: Mapping[str, Any]) -> tuple[str, str, str]:
    if "failed" in taken:
        return "failed", taken["failed"][:60], ""
    known = "" if taken["norms"] is None else str(taken["norms"])
    return f"{taken['cpu_seconds']:.1f}", f"{taken['peak_bytes'] / 1e9:.2f} GB", known


def _wall(taken: Mapping[str, Any]) -> str:
    return f"{taken['seconds']:.1f}" if "seconds" in taken else ""


def _output(taken: Mapping[str, Any]) -> tuple[str, str]:
    """Bytes written, and of many how many a second, from the start of the command to its end."""
    size = taken.get("written_bytes")
    if size is None:
        return "", ""
    if size < 1e9:
        return f"{size / 1e6:.1f} MB", ""
    return f"{size / 1e9:.2f} GB", f"{size / taken['seconds'] / 1e6:.0f} MB"


def _ratio(ratio: Mapping[str, Mapping[str, float]]) -> str:
    cpu, wall = ratio["cpu"], ratio["wall"]
    return f"{cpu['median']:.2f} ({cpu['low']:.2f} to {cpu['high']:.2f}; wall {wall['median']:.2f})"


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    rule = ["---", *("--:" for _ in heads[1:])]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (heads, rule, *rows))
