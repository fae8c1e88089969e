"""What batches are, and what a batch is: the arguments of one call of the model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from .errors import DataError

__all__ = ["as_arguments", "as_batches"]


def as_batches(batches: Any) -> Iterable[Any]:
    """The batches, if they are several and can be gone through again; else raises DataError."""
    kind = type(batches).__name__
    allowed = "allowed: a list of batches, or an object whose __iter__ starts anew"
    if isinstance(batches, (Mapping, str, bytes)) or hasattr(batches, "shape"):
        raise DataError(f"batches is a {kind}, not several batches; {allowed}")
    try:
        first = iter(batches)
    except TypeError as error:
        raise DataError(f"batches is {batches!r}; {allowed}") from error
    if first is batches:
        raise DataError(
            f"batches is a one-shot iterator ({kind}) and is gone through several times; {allowed}"
        )
    found: Iterable[Any] = batches
    return found


def as_arguments(batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments of a batch.

    batch: a tuple of positional arguments, a dict of keyword arguments, or (args, kwargs).
    Raises DataError for everything else.
    """
    if isinstance(batch, Mapping):
        return (), dict(batch)
    if not isinstance(batch, (tuple, list)):
        raise DataError(
            f"a batch is a {type(batch).__name__}; allowed: a tuple of arguments or a dict"
        )
    if len(batch) == 2 and isinstance(batch[0], tuple) and isinstance(batch[1], Mapping):
        return batch[0], dict(batch[1])
    return tuple(batch), {}
