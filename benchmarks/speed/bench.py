"""The turns of one subject: forms are made, loaded into runtimes, timed, and released."""

from __future__ import annotations

import gc
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dyt_compile.progress import track

from .forms import Made
from .pairs import interleaved, others
from .runtimes import RUNTIMES, ClosedError, Run
from .subjects import Subject

__all__ = ["Bench", "Cell", "Turn"]

Cell = dict[str, Any]
"""times_ms: by form, a number a round; reasons: why forms have none; others: cores that were busy
with other work."""


@dataclass(frozen=True)
class Turn:
    """Forms that take turns in one runtime. name: of `Subject.rounds`."""

    subject: str
    runtime: str
    name: str


class Bench:
    """One subject. Its first form stays loaded, others are released after their turns.

    Modules come first, and each form's file is written while its module is there; then come the
    runtimes that read files, one after another. So no more than two sets of weights are held.
    """

    def __init__(self, subject: Subject, folder: Path, threads: int, pairs: int) -> None:
        self._subject = subject
        self._folder = folder
        self._threads = threads
        self._pairs = pairs
        self._rounds = subject.rounds()
        self._made: dict[str, Made] = {}
        self._inputs: dict[str, tuple[Tensor, ...]] = {}
        self._loaded: dict[tuple[str, str], Run] = {}

    def cells(self, turns: Sequence[Turn]) -> Iterator[tuple[Turn, Cell]]:
        """Each set of turns with the times of its forms, and why others have none."""
        with torch.no_grad():
            yield from self._of_modules(turns)
            self._made.clear()
            self._loaded.clear()
            yield from self._of_files(turns)

    def _of_modules(self, turns: Sequence[Turn]) -> Iterator[tuple[Turn, Cell]]:
        for name, forms in self._rounds.items():
            own = [turn.runtime for turn in turns if turn.name == name]
            reading = [runtime for runtime in own if RUNTIMES[runtime].reads_files]
            if not own:
                continue
            for form in track(forms, f"making: {name}", len(forms)):
                self._make(form)
            for turn in turns:
                if turn.name == name and not RUNTIMES[turn.runtime].reads_files:
                    yield turn, self._timed(turn, forms)
            if reading:
                for form in track(forms, f"writing: {name}", len(forms)):
                    self._write(form, reading)
            self._release()

    def _of_files(self, turns: Sequence[Turn]) -> Iterator[tuple[Turn, Cell]]:
        for runtime, found in RUNTIMES.items():
            if found.reads_files:
                for turn in turns:
                    if turn.runtime == runtime:
                        yield turn, self._timed(turn, self._rounds[turn.name])
                        self._release()
                self._loaded.clear()

    def _make(self, form: str) -> None:
        if form not in self._made:
            self._made[form] = self._subject.forms[form]()
            self._inputs[form] = self._made[form].args

    def _path(self, form: str, runtime: str) -> Path:
        return self._folder / runtime / f"{form}.onnx"

    def _write(self, form: str, runtimes: Iterable[str]) -> None:
        for runtime in runtimes:
            path = self._path(form, runtime)
            path.parent.mkdir(exist_ok=True)
            if not path.exists():
                self._made[form].write(path, runtime)

    def _release(self) -> None:
        """Let go of all but the base."""
        base = self._subject.base
        self._made = {form: made for form, made in self._made.items() if form == base}
        self._loaded = {key: run for key, run in self._loaded.items() if key[1] == base}
        gc.collect()

    def _timed(self, turn: Turn, forms: Sequence[str]) -> Cell:
        tried = {form: self._run(turn.runtime, form) for form in forms}
        runs = {form: run for form, run in tried.items() if not isinstance(run, str)}
        reasons = {form: reason for form, reason in tried.items() if isinstance(reason, str)}
        if forms[0] in reasons or len(runs) < 2:
            return {"times_ms": {}, "reasons": reasons}
        with others() as found:
            doing = f"{RUNTIMES[turn.runtime].title}: {turn.name}"
            times = interleaved(runs, self._pairs, doing)
        rounded = {form: [round(each, 4) for each in own] for form, own in times.items()}
        cores = None if found.cores is None else round(found.cores, 2)
        return {"times_ms": rounded, "reasons": reasons, "others": cores}

    def _run(self, runtime: str, form: str) -> Run | str:
        """What runs a form, or why nothing does."""
        found, key = RUNTIMES[runtime], (runtime, form)
        source = self._path(form, runtime) if found.reads_files else self._made[form].module
        if source is None:
            return "it is a file alone"
        if key not in self._loaded:
            try:
                self._loaded[key] = found.load(source, self._inputs[form], self._threads)
            except ClosedError as closed:
                return str(closed)
        return self._loaded[key]
