"""Values that wait between two parts of a graph: in memory, and in files once they are many."""

from __future__ import annotations

import weakref
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from .errors import ExportError
from .files import work_folder
from .graphs.base import Graph
from .terms import Value

__all__ = ["Kept", "Shelf"]

MEMORY_BYTES = 2 << 30


class Kept:
    """A native value on the shelf; it goes when nobody holds this handle any more."""

    def __init__(self, native: Any) -> None:
        self._native = native
        self.shape = _shape(native)

    def load(self) -> Any:
        """The value."""
        return self._native


class _Spilled(Kept):
    def __init__(self, file: Path, graph: Graph, like: Value, shape: tuple[int, ...]) -> None:
        self.shape = shape
        self._file = file
        self._graph = graph
        self._like = like

    def load(self) -> Any:
        return self._graph.from_array(np.load(self._file, allow_pickle=False), self._like)


class Shelf:
    """Keeps values, at most `memory_bytes` of them in memory; a context manager for its files."""

    def __init__(self, graph: Graph, memory_bytes: int = MEMORY_BYTES) -> None:
        self._graph = graph
        self._memory_bytes = memory_bytes
        self._used_bytes = 0
        self._files = ExitStack()
        self._folder: Path | None = None
        self._spilled = 0

    def __enter__(self) -> Shelf:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._files.close()

    def keep(self, native: Any, like: Value) -> Kept:
        """Keep a native value; `like` tells the dtype in which it comes back from a file."""
        size = int(getattr(native, "nbytes", 0))
        if size and self._used_bytes + size > self._memory_bytes and like.dtype is not None:
            return self._spill(native, like)
        kept = Kept(native)
        self._used_bytes += size
        weakref.finalize(kept, self._release, size)
        return kept

    def _release(self, size: int) -> None:
        self._used_bytes -= size

    def _spill(self, native: Any, like: Value) -> Kept:
        if self._folder is None:
            self._folder = self._files.enter_context(work_folder())
        self._spilled += 1
        file = self._folder / f"{self._spilled}.npy"
        array = self._graph.to_array(native)
        if like.dtype == "bfloat16":  # every bfloat16 is a float32, which .npy files know
            array = array.astype(np.float32)
        try:
            np.save(file, array, allow_pickle=False)
        except OSError as error:
            raise ExportError(
                f"cannot keep {array.nbytes} bytes of activations in {str(self._folder)!r}: "
                f"{error.strerror or error}; TMPDIR chooses another place"
            ) from error
        kept = _Spilled(file, self._graph, like, array.shape)
        weakref.finalize(kept, file.unlink, missing_ok=True)
        return kept


def _shape(native: Any) -> tuple[int, ...]:
    """The shape of a native value; numbers have no axes."""
    return tuple(getattr(native, "shape", ()))
