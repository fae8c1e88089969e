"""Zip archives, looked at before anything in them is unpacked."""

from __future__ import annotations

import zipfile
from pathlib import Path, PurePosixPath
from typing import BinaryIO

__all__ = ["entries"]

EXPANSION = 100
"""How many times its own size an archive may unpack to; masks and padding reach a few dozen."""

HARMLESS_BYTES = 1 << 30
"""What every archive may unpack to, however small it is."""

ENCRYPTED = 1


def entries(source: Path | BinaryIO, *, stored: bool = False) -> list[zipfile.ZipInfo]:
    """The entries of a zip archive, all of which may be read.

    stored: none may be compressed. Raises ValueError, with the name and what is allowed, for an
    archive that would unpack to far more than its size (a zip bomb), for two entries of one name or
    over the same bytes, for encrypted ones, and for names that lead out of it; and what `zipfile`
    raises where it is none.
    """
    with zipfile.ZipFile(source) as archive:
        found = archive.infolist()
        file = archive.fp
        size = 0 if file is None else file.seek(0, 2)
    seen: set[str] = set()
    for entry in found:
        _check_name(entry.filename)
        if entry.filename in seen:
            raise ValueError(f"it has two entries {entry.filename!r}; allowed: one of a name")
        seen.add(entry.filename)
        if entry.flag_bits & ENCRYPTED:
            raise ValueError(f"its entry {entry.filename!r} is encrypted; allowed: plain ones")
        if stored and entry.compress_type != zipfile.ZIP_STORED:
            raise ValueError(f"its entry {entry.filename!r} is compressed; allowed: stored ones")
    packed = sum(entry.compress_size for entry in found)
    if packed > size:
        raise ValueError(f"its entries take {packed} bytes of the file's {size}: they overlap")
    _check_expansion(sum(entry.file_size for entry in found), size)
    return found


def _check_name(name: str) -> None:
    path = PurePosixPath(name.replace("\\", "/"))
    if path.is_absolute() or ".." in path.parts or ":" in name or "\0" in name:
        raise ValueError(f"its entry {name!r} leads out of the archive; allowed: names within it")


def _check_expansion(unpacked: int, size: int) -> None:
    allowed = max(HARMLESS_BYTES, EXPANSION * size)
    if unpacked > allowed:
        raise ValueError(
            f"its {size} bytes would unpack to {unpacked}; allowed: {allowed} "
            f"({EXPANSION} times its size, 1 GiB at least)"
        )
