"""Progress on the terminal: bars where there is one, plain lines where there is none."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TypeVar

from rich.console import Console, ConsoleOptions, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.segment import Segment

from ..errors import printable
from ..progress import Doing
from ..ranks import current

__all__ = ["TerminalReporter", "console", "tell_written"]

PLAIN_WIDTH = 100
"""Columns where the output is no terminal."""

T = TypeVar("T")


class _PlainConsole(Console):
    """A console that takes all text for text: names are no markup, and cannot move the cursor."""

    def render(
        self, renderable: RenderableType, options: ConsoleOptions | None = None
    ) -> Iterator[Segment]:
        for segment in super().render(renderable, options):
            text = segment.text if segment.control else printable(segment.text)
            yield Segment(text, segment.style, segment.control)


def console(*, stderr: bool = False) -> Console:
    """The terminal, or a file or pipe of 100 columns; of several ranks, the first one's."""
    made = _PlainConsole(stderr=stderr, markup=False, emoji=False, quiet=current().number > 0)
    if not made.is_terminal:
        made.width = PLAIN_WIDTH
    return made


def tell_written(path: Path) -> None:
    """Print one line: which file was written, and how large it is."""
    size = f"{path.stat().st_size / 1e6:.1f} MB"
    console().print(f"wrote {path}: {size}", soft_wrap=True, highlight=False)


class TerminalReporter:
    """Shows each piece of work as it begins and goes on."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._busy = False

    def track(self, items: Iterable[T], doing: Doing, total: int | None) -> Iterator[T]:
        """Yield the items; work inside other work is not shown."""
        if self._busy:
            yield from items
            return
        self._busy = True
        try:
            if self._console.is_terminal:
                yield from self._bar(items, doing, total)
            else:
                yield from self._lines(items, doing, total)
        finally:
            self._busy = False

    def _bar(self, items: Iterable[T], doing: Doing, total: int | None) -> Iterator[T]:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
        )
        with Progress(*columns, console=self._console, transient=True) as progress:
            task = progress.add_task(_told(doing), total=total)
            for item in items:
                yield item
                progress.update(task, advance=1, description=_told(doing))

    def _lines(self, items: Iterable[T], doing: Doing, total: int | None) -> Iterator[T]:
        """A line at the beginning, and one whenever the words change."""
        told = _told(doing)
        self._console.print(f"{told} ({total})" if total else told, highlight=False)
        for done, item in enumerate(items, start=1):
            yield item
            if _told(doing) != told:
                told = _told(doing)
                self._console.print(f"{told} ({done} of {total})", highlight=False)


def _told(doing: Doing) -> str:
    return doing if isinstance(doing, str) else doing()
