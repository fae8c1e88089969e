"""Writing files: beside their target first, then renamed, so that a target is old or new."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import ExportError

__all__ = ["replaced"]


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
        temporary.touch()
        mode = temporary.stat().st_mode  # by the user's umask; safetensors makes files of its own
        temporary.unlink()
        yield temporary
        try:
            for companion in sorted(Path(name).iterdir()):
                companion.chmod(mode)
                if companion != temporary:
                    companion.replace(target.parent / companion.name)
            temporary.replace(target)
        except OSError as error:
            raise ExportError(
                f"cannot write {str(target)!r}: {error.filename2 or error.filename}: "
                f"{error.strerror}"
            ) from error
