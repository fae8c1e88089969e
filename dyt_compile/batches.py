"""What a batch is: the arguments of one call of the model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .errors import DataError

__all__ = ["as_arguments"]


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
