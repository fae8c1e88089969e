"""Progress of long work: passes say what they do, whoever called decides how it is shown."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Protocol, TypeVar

__all__ = ["Doing", "Reporter", "reporting", "track"]

T = TypeVar("T")
Doing = str | Callable[[], str]
"""What is being done: words, or what gives them anew as the work goes on."""


class Reporter(Protocol):
    """Shows the advance of one piece of work at a time."""

    def track(self, items: Iterable[T], doing: Doing, total: int | None) -> Iterator[T]:
        """Yield the items, showing how many of `total` are done."""
        ...


_reporter: ContextVar[Reporter | None] = ContextVar("reporter", default=None)


def track(items: Iterable[T], doing: Doing, total: int | None = None) -> Iterator[T]:
    """The items, with their advance shown by the current reporter, if there is one."""
    reporter = _reporter.get()
    return iter(items) if reporter is None else reporter.track(items, doing, total)


@contextmanager
def reporting(reporter: Reporter) -> Iterator[None]:
    """Let `reporter` show the work that is done inside."""
    token = _reporter.set(reporter)
    try:
        yield
    finally:
        _reporter.reset(token)
