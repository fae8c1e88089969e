"""Writing files: beside their target first, then renamed, so that a target is old or new.

Whatever is not finished lies in a work folder, whose lock ends with the process that holds it. A
killed process leaves a folder that nobody holds; the next one that works in the same place removes
it, and leaves those alone that are in use.
"""

from __future__ import annotations

import errno
import filecmp
import json
import os
import shutil
import stat
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from .errors import DytCompileError, ExportError

if sys.platform != "win32":
    import fcntl

__all__ = ["DISK_FULL", "Arrays", "check_writable", "replaced", "work_folder", "write_arrays"]

PREFIX = ".dyt-compile-"

LOCK = f"{PREFIX}lock"
"""In a work folder: somebody needs it. Beside a target: somebody renames there."""

DISK_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
"""Numbers of the errors by which a disk says that it takes no more."""

PROBE_BYTES = 1 << 20


def check_writable(target: Path) -> None:
    """Raise what `replaced` raises before anything is written; for checks before long work."""
    with _beside(target):
        pass


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
def replaced(target: Path, unused: Callable[[], Iterable[Path]] = lambda: ()) -> Iterator[Path]:
    """A temporary path beside `target`, which it replaces when the block ends without error.

    A symbolic link is replaced itself; what it led to stays. Whatever else the block writes beside
    the temporary file goes with it: before it, where the name is free or belongs to the same bytes;
    else an old file of that name is removed first and the new one comes last, so that a process may
    be killed at any time and no file stands beside the companion of another. unused: the files to
    remove once the target is in place.

    Raises ExportError where the target's folder cannot be written, the target is a folder, or the
    disk is full.
    """
    with _beside(target) as folder:
        temporary = folder / target.name
        try:
            yield temporary
        except DytCompileError:
            raise
        except Exception as error:
            number = _full(error, folder)
            if number is None:
                raise
            raise ExportError(f"cannot write {str(target)!r}: {os.strerror(number)}") from error
        try:
            with _alone(target.parent):
                _take_names(temporary, target)
                for path in unused():
                    path.unlink(missing_ok=True)
        except OSError as error:
            raise ExportError(
                f"cannot write {str(target)!r}: {error.filename2 or error.filename}: "
                f"{error.strerror}"
            ) from error


@contextmanager
def work_folder(parent: Path | None = None) -> Iterator[Path]:
    """A folder of one's own in `parent`, by default in the system's for temporary files.

    It is removed at the end; those that killed processes left beside it go first. Raises
    ExportError where it cannot be made.
    """
    where = "the folder for temporary files (TMPDIR)" if parent is None else repr(str(parent))
    with _held_folder(parent, f"into {where}") as folder:
        yield folder


@contextmanager
def _held_folder(parent: Path | None, what: str) -> Iterator[Path]:
    """A work folder; `what`: of what an error says that it cannot be written."""
    try:
        place = Path(tempfile.gettempdir()) if parent is None else parent
        _sweep(place)
        folder, lock = _new(place)
    except OSError as error:
        raise ExportError(f"cannot write {what}: {error.strerror}") from error
    with _closing(lock):
        try:
            yield folder
        finally:
            _remove(folder)


@contextmanager
def _beside(target: Path) -> Iterator[Path]:
    """A work folder beside a target that can be written."""
    try:
        if target.is_dir():
            raise ExportError(f"cannot write {str(target)!r}: it is a folder")
        if not target.parent.is_dir():
            raise ExportError(f"cannot write {str(target)!r}: its folder does not exist")
        with suppress(FileNotFoundError):
            target.lstat()  # whether the disk takes such a name
    except OSError as error:
        raise ExportError(f"cannot write {str(target)!r}: {error.strerror}") from error
    with _held_folder(target.parent, repr(str(target))) as folder:
        yield folder


def _take_names(temporary: Path, target: Path) -> None:
    """Rename a file and its companions; where that fails, those that came first go again."""
    if not temporary.exists():
        raise FileNotFoundError(errno.ENOENT, "nothing was written", str(temporary))
    _give_modes(temporary.parent)
    others = (path for path in sorted(temporary.parent.iterdir()) if path.name != LOCK)
    places = {path: target.parent / path.name for path in others if path != temporary}
    for place in places.values():
        if place.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(place))
    first = {path: place for path, place in places.items() if _is_free(place, path)}
    added = [place for place in first.values() if not place.exists()]
    try:
        for path, place in first.items():
            path.replace(place)
        for path in places.keys() - first.keys():
            places[path].unlink()
        temporary.replace(target)
    except OSError:
        for place in added:
            place.unlink(missing_ok=True)
        raise
    for path in places.keys() - first.keys():
        path.replace(places[path])


def _give_modes(folder: Path) -> None:
    """Files as the user's umask made the lock; safetensors has a mode of its own."""
    if (folder / LOCK).exists():
        for path in folder.iterdir():
            path.chmod((folder / LOCK).stat().st_mode)


def _is_free(place: Path, path: Path) -> bool:
    """Whether a file may take a place before its target does: nothing is lost there."""
    return not os.path.lexists(place) or filecmp.cmp(place, path, shallow=False)


def _full(error: Exception, folder: Path) -> int | None:
    """The number of the error if the disk was full, whatever the library that met it made of it."""
    number = getattr(error, "errno", None)
    if number in DISK_FULL:
        return int(number)
    try:
        (folder / "probe").write_bytes(bytes(PROBE_BYTES))
    except OSError as found:
        return found.errno if found.errno in DISK_FULL else None
    return None


def _sweep(place: Path) -> None:
    """Remove the work folders that killed processes of this user left in a place."""
    if sys.platform == "win32":
        return
    for folder in place.glob(f"{PREFIX}????????"):
        with suppress(OSError):  # it is gone, or has no lock that could be had
            about = folder.lstat()
            if not stat.S_ISDIR(about.st_mode) or about.st_uid != os.getuid():
                continue
            lock = _locked(folder / LOCK, wait=False)
            if lock is not None:
                with _closing(lock):
                    _remove(folder)


def _new(place: Path) -> tuple[Path, int | None]:
    """A work folder with its lock; None where the file system has no locks."""
    while True:
        # Absolute, as from Python 3.12 on: other processes, which work elsewhere, write there too.
        folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=place)).absolute()
        try:
            lock = _locked(folder / LOCK, wait=False)
        except OSError:
            return folder, None  # it can be written all the same, but nobody will remove it
        if lock is not None:
            return folder, lock  # else another process came first and took it for a dead one's


def _remove(folder: Path) -> None:
    """Remove a work folder, its lock last, so that nobody else removes it meanwhile."""
    for path in folder.iterdir():
        if path.name != LOCK:
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    (folder / LOCK).unlink(missing_ok=True)
    with suppress(OSError):  # another process looks whether it is a dead one's, and removes it
        folder.rmdir()


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Let one process at a time rename in a folder; without locks they are not kept apart."""
    path = folder / LOCK
    lock = None
    with suppress(OSError):
        while lock is None:  # the process before removed it
            lock = _locked(path, wait=True)
    with _closing(lock):
        try:
            yield
        finally:
            if lock is not None:
                path.unlink(missing_ok=True)


@contextmanager
def _closing(lock: int | None) -> Iterator[None]:
    try:
        yield
    finally:
        if lock is not None:
            os.close(lock)


def _locked(path: Path, *, wait: bool) -> int | None:
    """A descriptor that holds the lock of a file, until it is closed or the process ends.

    None where another process has it, or has just removed the file. Raises OSError where there are
    no locks.
    """
    if sys.platform == "win32":
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    with suppress(FileNotFoundError):
        lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            if os.path.samestat(os.fstat(lock), path.stat()):
                return lock
        except BlockingIOError:
            pass
        except OSError:
            os.close(lock)
            raise
        os.close(lock)
    return None
