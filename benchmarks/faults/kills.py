"""Commands that are killed where they write: what is found at their target, and beside it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from .killing import Blow
from .places import Place, found_at, one_line
from .subjects import Case, command, state

__all__ = ["Found", "kill_all", "kill_recover", "placed"]

Found = tuple[str, dict[str, Any]]
"""A name, and what is to be told of it."""

STEPS = 40
IN_A_ROW = 4


@dataclass
class Tally:
    """What became of a command's target. killed: how often, by the way in which; found: "old",
    "new", or what else, after each; left: files that are there when the command was done again."""

    verb: str
    steps: dict[str, int]
    seconds: float
    killed: Counter[str] = field(default_factory=Counter)
    found: Counter[str] = field(default_factory=Counter)
    left: list[str] = field(default_factory=list)
    more: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """As JSON data."""
        return {
            "verb": self.verb, "steps": self.steps, "seconds": round(self.seconds, 2),
            "killed": dict(self.killed), "found": dict(self.found), "left": self.left, **self.more,
        }  # fmt: skip


def kill_all(folder: Path, cases: Sequence[Case], kills: int) -> Iterator[Found]:
    """Kill every command about so many times, less where it takes seconds."""
    for number, case in enumerate(cases):
        tally = _kill(case, folder / f"case{number}", round(kills * case.share))
        yield case.name, tally.to_dict()


def _kill(case: Case, folder: Path, kills: int) -> Tally:
    place = Place(folder)
    target = place.home / case.target
    place.done(case.old)
    old = state(target)
    place.keep()
    end = place.done(case.new)
    new, expected = state(target), place.names()
    if old == new:
        raise RuntimeError(f"{case.name}: both versions are the same")
    tally = Tally(case.verb, dict(Counter(end.steps)), end.seconds)
    for blow in placed(kills, len(end.steps), end.seconds, _longest(target)):
        _struck(place, case.new, blow, tally)
        tally.found[found_at(target, {old: "old", new: "new"})] += 1
        if case.verb == "build":
            tally.left += place.orphans()
            bare = not target.with_name(f"{target.name}.json").exists()
            tally.more["without_json"] = tally.more.get("without_json", 0) + bare
    place.done(case.new)
    if found_at(target, {new: "new"}) != "new":
        tally.left.append(f"{case.target}, which is not the new one")
    tally.left += sorted(place.names() ^ expected)
    return tally


def placed(kills: int, steps: int, seconds: float, longest: int) -> list[Blow]:
    """Blows, of which seven in ten fall before a step, two at a time, one within a write."""
    random = np.random.default_rng(kills)
    stepwise = max(1, kills * 7 // 10)
    at = np.unique(np.linspace(0, steps - 1, stepwise).round().astype(int))
    timed = random.uniform(0.0, seconds, max(1, kills * 2 // 10))
    cut = random.integers(1, longest, max(1, kills - stepwise - len(timed)))
    return [
        *(Blow(step=int(step)) for step in at),
        *(Blow(after=float(after)) for after in timed),
        *(Blow(cut=int(byte)) for byte in cut),
    ]


def _longest(target: Path) -> int:
    """Bytes of the longest of a target's files."""
    beside = target.parent.glob(f"{target.name}*")
    return max(path.stat().st_size for path in beside)


def _struck(place: Place, work: Callable[[], object], blow: Blow, tally: Tally) -> None:
    """A run that the blow ends; where it came too late, or no write was so long, an earlier one."""
    place.restore()
    while not _ended(place, work, blow, tally):
        place.restore()
        blow = _earlier(blow)


def _earlier(blow: Blow) -> Blow:
    """A blow in place of one that came too late."""
    if blow.step is not None:
        return Blow(step=blow.step // 2)
    if blow.after is not None:
        return Blow(after=blow.after / 2)
    return Blow(cut=max(1, (blow.cut or 0) // 2))


def _told(blow: Blow) -> str:
    if blow.step is not None:
        return "before a step"
    return "at a random time" if blow.after is not None else "within a write"


def kill_recover(folder: Path, kills: int) -> Iterator[Found]:
    """Kill `recover`, up to four times in a row, let it go on, and compare what it ends with."""
    place = Place(folder)
    target, checkpoint = place.home / "out.safetensors", place.home / "out.safetensors.checkpoint"
    work = command(
        "recover", "network.py:load", "--data", "network.py:batches", "--steps", str(STEPS),
        "-o", target.name,
    )  # fmt: skip
    end = place.done(work)
    undisturbed, new, expected = _weights(target), state(target), place.names()
    tally = Tally("recover", dict(Counter(end.steps)), end.seconds)
    differences, resumed = [], 0
    blows = placed(kills, len(end.steps), end.seconds, target.stat().st_size)
    np.random.default_rng(0).shuffle(blows)  # type: ignore[arg-type]
    while blows:
        target.write_bytes(b"old")
        row = blows[-IN_A_ROW:]
        while row:
            row.pop()
            blow = blows.pop()
            resumed += checkpoint.exists()
            if not _ended(place, work, blow, tally):
                blows.append(_earlier(blow))  # it was nearly done when it went on
                break
            whole = target.read_bytes() == b"old"
            tally.found["old" if whole else found_at(target, {new: "new"})] += 1
        resumed += checkpoint.exists()
        place.done(work)
        differences.append(_difference(undisturbed, _weights(target)))
        tally.left += sorted(place.names() ^ expected)
    tally.more = {
        "runs": len(differences), "went_on": int(resumed), "worst_difference": max(differences)
    }  # fmt: skip
    yield "recover", tally.to_dict()


def _ended(place: Place, work: Callable[[], object], blow: Blow, tally: Tally) -> bool:
    """Whether the blow came before the run was done, which the one before had begun.

    A write may be that of TensorRT's process, whose end the run tells.
    """
    end = place.run(work, blow)
    told = blow.cut is not None and (one_line(end) or "").startswith("ExportError: cannot write")
    if end.status < 0 or told:
        tally.killed[_told(blow)] += 1
    elif end.status:
        raise RuntimeError(f"{blow} ended with {end.status}: {end.printed[-2000:]}")
    return end.status < 0 or told


def _weights(path: Path) -> dict[str, Any]:
    from safetensors.numpy import load_file

    return load_file(path)


def _difference(first: dict[str, Any], second: dict[str, Any]) -> float:
    """The largest difference of a weight, relative to the largest value of its tensor."""
    if first.keys() != second.keys():
        return float("inf")
    return max(
        float(np.abs(a - second[name]).max() / (np.abs(a).max() or 1.0))
        for name, a in first.items()
    )
