"""Data files of ONNX models: named by what they hold, so that a graph never finds another's data.

A file of weights and its graph cannot take their names at once. So the new data lies under a name
of its own until the new graph stands in place of the old one, which keeps its data until then.
"""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path
from typing import BinaryIO

import onnx_ir as ir

from ..errors import CaptureError, first_line
from .onnx_derived import origins
from .onnx_files import externals, parse

__all__ = ["Digested", "data_name", "unused_data"]

DIGEST_BYTES = 8


class Digested:
    """A file that is written, and a digest of what is written where."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._hash = hashlib.blake2b(digest_size=DIGEST_BYTES)

    def seek(self, offset: int) -> None:
        """Go on at that byte."""
        self._hash.update(f"{offset}:".encode())
        self._file.seek(offset)

    def write(self, chunk: bytes | memoryview) -> None:
        """Write some bytes."""
        self._hash.update(chunk)
        self._file.write(chunk)

    def digest(self) -> str:
        """Sixteen hexadecimal digits."""
        return self._hash.hexdigest()


def data_name(name: str, digest: str) -> str:
    """The name of the data file of the model file `name`."""
    return f"{name}.{digest}.data"


def unused_data(target: Path, model: ir.Model) -> list[Path]:
    """Data files that were once written for a target, and that no graph in its folder refers to.

    model: what it reads is left where it is, for it may be written again. Where a graph in the
    folder cannot be read, nothing is unused.
    """
    ours = re.compile(rf"{re.escape(target.name)}\.[0-9a-f]{{{2 * DIGEST_BYTES}}}\.data")
    found = [path for path in target.parent.iterdir() if ours.fullmatch(path.name)]
    if not found:
        return []
    needed = {os.path.realpath(tensor.path) for tensor in origins(model)}
    try:
        for path in filter(Path.is_file, target.parent.glob("*.onnx")):
            needed |= _data_of(path)
    except CaptureError:
        return []
    return [path for path in found if os.path.realpath(path) not in needed]


def _data_of(path: Path) -> set[str]:
    """The files that a graph refers to, whether they are there or not."""
    proto, _ = parse(path)
    try:
        found = list(externals(ir.serde.deserialize_model(proto)))
    except Exception as error:
        raise CaptureError(f"{str(path)!r} is no ONNX model: {first_line(error)}") from error
    return {os.path.realpath(path.parent / tensor.location) for tensor in found}
