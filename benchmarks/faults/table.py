"""docs/reliability.md from the results, and from nothing else."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from dyt_compile.files import replaced

__all__ = ["PAGE", "lost", "render", "write_page"]

PAGE = Path(__file__).parents[2] / "docs" / "reliability.md"

HEAD = """\
# Reliability: what was tried, and what was lost

Written by `.venv/bin/python -m benchmarks.faults` from `benchmarks/results/faults.json`, which has
the versions and the machine. Not edited by hand. Every fault was caused on purpose, on small
models, with a target that was there already; what stands below is what was found afterwards.

{summary}

## What holds

- A file is written in a folder `.dyt-compile-*` beside its target and renamed when it is whole. A
  target is the old file or the new one.
- That folder has a lock, which ends with the process that holds it. What a killed process left
  (activations in the system's folder for temporary files, too) is removed by the next one that
  works in the same place. One that is in use is left alone. Where there are no locks (some network
  file systems, Windows), it stays until it is deleted by hand.
- The weights of an ONNX file that lie beside it have a name of their own, from what they hold
  (`model.onnx.6ccba36779bfeaae.data`). They are there before the new graph takes its name; the old
  ones go after that, unless another `.onnx` file in the folder refers to them.
- `<name>.json`, beside an engine, cannot have a name of its own. The old one goes before the engine
  is replaced, the new one comes after it: a process killed between the two leaves an engine without
  it, never with that of another.
- A target that is a symbolic link is replaced itself: what it led to stays as it was. A folder, or
  a link to one, is refused. Both are seen before any work is done.
- Two processes with one target: both write whole files, and the last one to end has its own there.
- `recover` goes on from its last checkpoint, written ten times in a run.
- Nothing is forced to the disk before it is renamed: a power failure was not tried.
"""

KILLS = """\
## Killed while they write

By SIGKILL before one of the steps in which they make, open, rename, remove or lock a file (all of
them, or evenly spread), and at random times; and by the kernel within a write, at a random byte of
a file (SIGXFSZ; where that write is TensorRT's, in its own process, the run tells of it). In
between nothing is cleaned up by hand. *Left over*: what one more run, which
was not disturbed, left there beside what such a run leaves where none was killed.
"""

RECOVER = """\
`recover` was killed up to four times in a row and then left in peace. The weights of those {runs}
runs, killed {killed} times, differ from those of a run that never was by {difference} at most
(relative to the largest weight of a tensor). {went_on} of the starts went on from a checkpoint.
"""

BUILD = """\
Of the killed builds, {bare} left an engine without its `.json`.
"""

DISK = """\
## Full disks

Disks in memory of several sizes, from no room at all to enough, and one without room for another
file. What is refused says `cannot write` and why, and leaves the old file, and nothing else.
"""

TARGETS = """\
## Odd targets

*Tried*: with how many of the commands above, once each. What is refused is refused before the
model is read.
"""

PAIRS = """\
## Two processes with one target

In two versions, begun at once. Afterwards the target is that of one of them, whole, and nothing
else is there.
"""

INPUT = """\
## Input that is cut short

To six lengths each, from nothing to almost all of it.
"""

MEMORY = """\
## Too little memory

A limit on the address space, from 8 to 3200 MB above what an idle process has. One batch holds all
samples, 51 MB an activation.
"""

PACKAGES = """\
## Missing packages and devices
"""

WAYS = ("before a step", "at a random time", "within a write")

Rows = Sequence[Mapping[str, Any]]


def render(results: Mapping[str, Any]) -> str:
    """The page. results: as benchmarks/results/faults.json holds them."""
    parts = [HEAD.format(summary=_summary(results)).rstrip()]
    if "kills" in results:
        parts += [KILLS.rstrip(), _kills(results)]
        bare = sum(tally.get("without_json", 0) for tally in results["kills"].values())
        parts.append(BUILD.format(bare=bare).rstrip())
    if "recover" in results:
        parts += [_recover(tally).rstrip() for tally in results["recover"].values()]
    for name, text, rows in (
        ("disk", DISK, _endings), ("targets", TARGETS, _endings), ("pairs", PAIRS, _endings),
        ("input", INPUT, _lines), ("memory", MEMORY, _endings), ("packages", PACKAGES, _lines),
    ):  # fmt: skip
        if name in results:
            parts += [text.rstrip(), rows(list(results[name].values()))]
    return "\n\n".join(parts) + "\n"


def write_page(results: Mapping[str, Any]) -> None:
    """Replace docs/reliability.md."""
    with replaced(PAGE) as path:
        path.write_text(render(results), encoding="utf-8")


def lost(results: Mapping[str, Any]) -> list[str]:
    """All that is not as it should be: half a file, a file left over, an end that nobody told."""
    found = []
    for name, tally in _tallies(results):
        found += [f"{name}: {what}" for what in tally["found"] if "half" in what]
        found += [f"{name}: left {file}" for file in tally["left"]]
    for part in ("disk", "targets", "pairs", "input", "memory", "packages"):
        for row in results.get(part, {}).values():
            found += [f"{row['what']}: {end}" for end in row["ended"] if not _is_good(part, end)]
    return found


GOOD = {
    "disk": ("written", "refused, old file kept"),
    "targets": (
        "refused, nothing changed", "refused, the folder is as it was", "the link replaced",
        "the link replaced, its file kept",
    ),
    "pairs": ("that of one",),
    "input": ("refused, nothing written",),
    "memory": ("done", "told in one line"),
    "packages": ("told in one line, with the fix",),
}  # fmt: skip
"""The ends that are as they should be."""


def _is_good(part: str, end: str) -> bool:
    return end in GOOD[part]


def _tallies(results: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    yield from results.get("kills", {}).items()
    yield from results.get("recover", {}).items()


def _summary(results: Mapping[str, Any]) -> str:
    count = [sum(t["killed"].get(way, 0) for _, t in _tallies(results)) for way in WAYS]
    others = sum(row["tried"] for part in GOOD for row in results.get(part, {}).values())
    found = lost(results)
    return (
        f"**{count[0] + count[1]} runs ended by SIGKILL, {count[2]} within a write, {others} other "
        f"faults. Lost: {'; '.join(found) or 'nothing'}.**"
    )


def _kills(results: Mapping[str, Any]) -> str:
    rows = []
    for name, tally in _tallies(results):
        killed, found = tally["killed"], tally["found"]
        rows.append([
            name, str(sum(tally["steps"].values())),
            *(str(killed.get(way, 0)) for way in WAYS),
            str(found.get("old", 0)), str(found.get("new", 0)),
            str(sum(n for what, n in found.items() if "half" in what)),
            str(len(tally["left"])),
        ])  # fmt: skip
    return _table(
        ["", "steps", *WAYS, "then old", "then new", "half", "left over"], rows,
    )  # fmt: skip


def _recover(tally: Mapping[str, Any]) -> str:
    return RECOVER.format(
        runs=tally["runs"], killed=sum(tally["killed"].values()), went_on=tally["went_on"],
        difference=f"{tally['worst_difference']:.2g}",
    )  # fmt: skip


def _endings(rows: Rows) -> str:
    return _table(
        ["", "tried", "ended"],
        [
            [row["what"], str(row["tried"]), ", ".join(f"{n} {e}" for e, n in row["ended"].items())]
            for row in rows
        ],
    )


def _lines(rows: Rows) -> str:
    """The same, with the line in which the last one was told."""
    return _table(
        ["", "tried", "ended", "told"],
        [
            [
                row["what"], str(row["tried"]),
                ", ".join(f"{n} {e}" for e, n in row["ended"].items()),
                f"`{row['told'][0]}`" if row["told"] and row["told"][0] else "",
            ]
            for row in rows
        ],
    )  # fmt: skip


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---", *("--:" if _is_number(cell) else "---" for cell in rows[0][1:])], *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _is_number(cell: str) -> bool:
    return cell.isdigit()
