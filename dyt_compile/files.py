"""Writing files: beside their target first, then renamed, so that a target is old or new."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from .errors import ExportError

__all__ = ["Arrays", "replaced", "write_arrays"]

Arrays = Mapping[str, npt.NDArray[Any]]

KINDS = {"f": "F", "i": "I", "u": "U"}
"""Of dtypes: the letters of NumPy, and those of safetensors."""


def write_arrays(
    path: Path, groups: Mapping[str, Callable[[], Arrays]], metadata: Mapping[str, str]
) -> None:
    """Write a safetensors file of arrays called "group/name", one group in memory at a time.

    safetensors itself takes all arrays at once. groups: each gives its arrays, the same whenever
    it is called. The format: github.com/safetensors/safetensors, "Format".
    """
    head: dict[str, Any] = {"__metadata__": dict(metadata)}
    sizes = sorted({a.itemsize for group in groups.values() for a in group().values()})[::-1]
    end = 0
    for name, array in _by_size(groups, sizes):
        start, end = end, end + array.nbytes
        dtype = f"{KINDS[array.dtype.kind]}{8 * array.itemsize}"
        head[name] = {"dtype": dtype, "shape": array.shape, "data_offsets": [start, end]}
    told = json.dumps(head).encode()
    told += b" " * (-len(told) % 8)
    with path.open("wb") as file:
        file.write(len(told).to_bytes(8, "little") + told)
        for _, array in _by_size(groups, sizes):
            file.write(np.ascontiguousarray(array).data)


def _by_size(
    groups: Mapping[str, Callable[[], Arrays]], sizes: Iterable[int]
) -> Iterator[tuple[str, npt.NDArray[Any]]]:
    """The arrays, those of the widest numbers first: so each lies where its numbers may."""
    for size in sizes:
        for group, arrays in groups.items():
            for name, array in arrays().items():
                if array.itemsize == size:
                    yield f"{group}/{name}", array


@contextmanager
def replaced(target: Path) -> Iterator[Path]:
    """A temporary path beside `target`, which it replaces when the block ends without error.

    Whatever else the block writes beside the temporary file (its name and more) goes with it.
    Raises ExportError where the target's folder cannot be written or the target is a folder.
    """
    if target.is_dir():
        raise ExportError(f"cannot write {str(target)!r}: it is a folder")
    if not target.parent.is_dir():
        raise ExportError(f"cannot write {str(target)!r}: its folder does not exist")
    try:
        folder = tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent)
    except OSError as error:
        raise ExportError(f"cannot write {str(target)!r}: {error.strerror}") from error
    with folder as name:
        temporary = Path(name) / target.name
        yield temporary
        try:
            for companion in sorted(Path(name).iterdir()):
                if companion != temporary:
                    companion.replace(target.parent / companion.name)
            temporary.replace(target)
        except OSError as error:
            raise ExportError(
                f"cannot write {str(target)!r}: {error.filename2 or error.filename}: "
                f"{error.strerror}"
            ) from error
