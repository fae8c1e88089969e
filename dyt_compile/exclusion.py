"""Which sites a user lets convert: regular expressions of names that keep their norm."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

from .errors import OptionError
from .sites import Match

__all__ = ["candidates", "excluded", "patterns"]


def patterns(exclude: Any) -> tuple[str, ...]:
    """The regular expressions of `exclude`: a string is one, not an iterable of letters."""
    patterns = (exclude,) if isinstance(exclude, str) else exclude
    if not isinstance(patterns, Iterable):
        raise OptionError(f"exclude is {exclude!r}; allowed: regular expressions, one or a list")
    found = tuple(patterns)
    for pattern in found:
        _check_pattern(pattern)
    return found


def _check_pattern(pattern: Any) -> None:
    if not isinstance(pattern, str):
        raise OptionError(f"exclude has {pattern!r}; allowed: strings, regular expressions")
    try:
        re.compile(pattern)
    except re.error as error:
        raise OptionError(f"exclude has {pattern!r}, no regular expression: {error}") from error


def candidates(found: Match, exclude: Sequence[str]) -> list[str]:
    """The sites that may be converted; a module's first call stands for all of its calls."""
    kept = {site.tied_to or site.name for site in found.sites if excluded(site.name, exclude)}
    return [
        site.name
        for site in found.sites
        if not site.kind.lossless and site.tied_to is None and site.name not in kept
    ]


def excluded(name: str, exclude: Sequence[str]) -> bool:
    """Whether a name matches one of the patterns."""
    return any(re.search(pattern, name) for pattern in exclude)
