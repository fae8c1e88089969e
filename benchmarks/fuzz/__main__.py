"""python -m benchmarks.fuzz --cases 100000: bad input of every kind, and what came out."""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from .cases import KINDS, case
from .corpus import Corpus, load
from .runs import HANG_SECONDS, Result, run

RESULTS = Path(__file__).parents[1] / "results" / "fuzz.json"

PROGRESS_SECONDS = 30.0

PARTS = 10
"""Of the cases, of all kinds each: results are written behind every part."""


@dataclass
class Tally:
    """Of one kind: how often each came out, what was wrong, and the longest case."""

    outcomes: Counter[str] = field(default_factory=Counter)
    wrong: list[tuple[int, str, str]] = field(default_factory=list)
    longest: tuple[float, int] = (0.0, -1)

    def add(self, result: Result) -> None:
        """Count one case."""
        self.outcomes[result.outcome] += 1
        self.longest = max(self.longest, (result.seconds, result.number))
        if result.wrong:
            self.wrong.append((result.number, result.outcome, result.message))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fuzz", description=__doc__)
    parser.add_argument("--cases", type=int, default=100_000, help="of all kinds together")
    parser.add_argument("--first", type=int, default=0, help="the number of the first of each kind")
    parser.add_argument("--only", choices=KINDS, action="append", help="these kinds alone")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--keep", type=Path, help="add a case of every message, as JSON")
    parser.add_argument("--replay", type=Path, help="run the cases of such a file instead")
    given = parser.parse_args()
    if given.replay is not None:
        raise SystemExit(_replayed(given.replay))
    shares, corpus = _shares(given.only or list(KINDS)), Corpus(given.keep)
    tallies = {kind: Tally() for kind in shares}
    for part in range(PARTS):
        for kind, share in shares.items():
            own = range(given.first, given.first + max(PARTS, round(given.cases * share)))
            _tally(tallies[kind], kind, own[part::PARTS], corpus)
        given.out.write_text(json.dumps(_told(tallies), indent=1) + "\n", encoding="utf-8")
        if given.keep is not None:
            corpus.save(given.keep)
        print(_table(tallies), flush=True)
    raise SystemExit(any(tally.wrong for tally in tallies.values()))


def _replayed(path: Path) -> bool:
    """Run kept cases; whether one went wrong."""
    cases = load(path)
    tally = Tally()
    for result in run(cases.__getitem__, range(len(cases))):
        tally.add(result)
    for wrong in tally.wrong:
        print(*wrong)
    print(_table({path.name: tally}))
    return bool(tally.wrong)


def _shares(kinds: Sequence[str]) -> dict[str, float]:
    total = sum(KINDS[kind].share for kind in kinds)
    return {kind: KINDS[kind].share / total for kind in kinds}


def _tally(tally: Tally, kind: str, numbers: range, corpus: Corpus) -> None:
    for result in _shown(kind, run(partial(case, kind), numbers), len(numbers)):
        tally.add(result)
        name, message = f"{kind}/{result.number}", result.message
        if result.wrong:
            message = f"{result.outcome}: {message}"
            print(f"{name}: {message}", flush=True)
        if message and result.outcome != "endless" and corpus.lacks(message):
            corpus.add(name, message, case(kind, result.number))


def _shown(kind: str, results: Iterator[Result], total: int) -> Iterator[Result]:
    """The results, while it is told now and then how many there were."""
    told = time.monotonic()
    for done, result in enumerate(results, 1):
        yield result
        if time.monotonic() - told > PROGRESS_SECONDS:
            told = time.monotonic()
            print(f"{kind}: {done} of {total}", flush=True)


def _told(tallies: dict[str, Tally]) -> dict[str, object]:
    return {
        "hang_seconds": HANG_SECONDS,
        "cases": sum(tally.outcomes.total() for tally in tallies.values()),
        "wrong": sum(len(tally.wrong) for tally in tallies.values()),
        "kinds": {
            kind: {
                "about": KINDS[kind].about,
                "cases": tally.outcomes.total(),
                "outcomes": dict(tally.outcomes.most_common()),
                "longest_s": round(tally.longest[0], 2),
                "wrong": tally.wrong,
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
