"""python -m benchmarks.fuzz --cases 100000: bad input of every kind, and what came out."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path

from .cases import KINDS
from .runs import HANG_SECONDS, Tally, run

RESULTS = Path(__file__).parents[1] / "results" / "fuzz.json"

PROGRESS_SECONDS = 30.0


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fuzz", description=__doc__)
    parser.add_argument("--cases", type=int, default=100_000, help="of all kinds together")
    parser.add_argument("--first", type=int, default=0, help="the number of the first of each kind")
    parser.add_argument("--only", choices=KINDS, action="append", help="these kinds alone")
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args()
    tallies = {
        kind: _tallied(kind, range(given.first, given.first + max(1, round(given.cases * share))))
        for kind, share in _shares(given.only or list(KINDS)).items()
    }
    given.out.write_text(json.dumps(_told(tallies), indent=1) + "\n", encoding="utf-8")
    print(_table(tallies))
    raise SystemExit(any(tally.faults for tally in tallies.values()))


def _shares(kinds: Sequence[str]) -> dict[str, float]:
    total = sum(KINDS[kind].share for kind in kinds)
    return {kind: KINDS[kind].share / total for kind in kinds}


def _tallied(kind: str, numbers: range) -> Tally:
    tally, told = Tally(), time.monotonic()
    for done, result in enumerate(run(kind, numbers), 1):
        tally.add(*result)
        if result[2] is not None:
            print(f"{kind} {result[0]}: {result[2]}", flush=True)
        if time.monotonic() - told > PROGRESS_SECONDS:
            told = time.monotonic()
            print(f"{kind}: {done} of {len(numbers)}", flush=True)
    return tally


def _told(tallies: dict[str, Tally]) -> dict[str, object]:
    return {
        "hang_seconds": HANG_SECONDS,
        "cases": sum(tally.outcomes.total() for tally in tallies.values()),
        "faults": sum(len(tally.faults) for tally in tallies.values()),
        "kinds": {
            kind: {
                "about": KINDS[kind].about,
                "cases": tally.outcomes.total(),
                "outcomes": dict(tally.outcomes.most_common()),
                "longest_s": round(tally.longest[0], 2),
                "faults": tally.faults,
            }
            for kind, tally in tallies.items()
        },
    }


def _table(tallies: dict[str, Tally]) -> str:
    lines = []
    for kind, tally in tallies.items():
        outcomes = ", ".join(f"{name} {count}" for name, count in tally.outcomes.most_common())
        longest = f"longest {tally.longest[0]:.2f} s (number {tally.longest[1]})"
        lines.append(f"{kind}: {tally.outcomes.total()} cases: {outcomes}; {longest}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
