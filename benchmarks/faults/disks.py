"""Disks that are full, have no room for one more file, or cannot be written; odd targets; pairs."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .kills import Found
from .places import Place, found_at, one_line
from .subjects import Case, command, state

__all__ = ["fill", "misplace", "pair"]

Row = dict[str, Any]

PAGE_BYTES = 4096
LARGE = "64m"
NOBODY = 65534


def _row(what: str) -> Row:
    """What was tried: how often it ended how, and the lines in which it was told."""
    return {"what": what, "tried": 0, "ended": Counter(), "told": []}


def _note(row: Row, ended: str, line: str | None = None) -> None:
    row["tried"] += 1
    row["ended"][ended] += 1
    if line is not None and len(row["told"]) < 1:
        row["told"].append(line)


@contextmanager
def _disk(folder: Path, options: str) -> Iterator[None]:
    """A small disk in memory, mounted on a folder; its contents are those of the folder."""
    kept = folder.with_name(f"{folder.name}.kept")
    folder.rename(kept)
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], check=True)
    try:
        shutil.copytree(kept, folder, dirs_exist_ok=True)
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)
        folder.rmdir()
        kept.rename(folder)


def _remount(folder: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", str(folder)], check=True)


def fill(folder: Path, cases: Sequence[Case], sizes: int) -> Iterator[Found]:
    """Every command on disks of several sizes that are too small, and on some that suffice."""
    for number, case in enumerate(cases):
        place = Place(folder / f"disk{number}")
        place.done(case.old)
        old = state(place.home / case.target)
        with _disk(place.home, f"size={LARGE},mode=0755"):
            used = shutil.disk_usage(place.home).used
            place.done(case.new)
            new, names = state(place.home / case.target), place.names()
            written = (path.stat().st_size for path in place.home.glob(f"{case.target}*"))
            needed = sum(written) * 5 // 4 + 8 * PAGE_BYTES
        row = _row(f"{case.name}: too small a disk")
        several = max(3, round(sizes * case.share))
        for size in range(several):
            room = needed * size // (several - 1) // PAGE_BYTES * PAGE_BYTES
            with _disk(place.home, f"size={LARGE},mode=0755"):
                _try(place, case, (old, new), names, row, f"size={used + room}")
        with _disk(place.home, f"size={LARGE},mode=0755,nr_inodes=4k"):
            count = os.statvfs(place.home)
            inodes = count.f_files - count.f_ffree
            _try(place, case, (old, new), names, row, f"nr_inodes={inodes}")
        yield _told(row)
        row = _row(f"{case.name}: too small a disk for temporary files")
        place.keep()
        for size in range(1, several if case.verb in ("calibrate", "build") else 1):
            with _disk(place.temporary, f"size={size * PAGE_BYTES},mode=0755"):
                _try(place, case, (old, new), names, row)
            place.restore()
        if row["tried"]:
            yield _told(row)


def _try(
    place: Place, case: Case, versions: tuple[str, str], names: set[str], row: Row,
    options: str | None = None,
) -> None:  # fmt: skip
    """A run on a disk that has become small: done, or the old file and one line."""
    old, new = versions
    before = place.names()
    if options is not None:
        _remount(place.home, options)
    end = place.run(case.new)
    target, line = place.home / case.target, one_line(end)
    if end.status == 0:
        whole = found_at(target, {new: "new"}) == "new" and place.names() <= names | before
        _note(row, "written" if whole else "written, but not whole")
    elif line is not None and line.startswith("ExportError: cannot "):
        kept = found_at(target, {old: "old"}) == "old" and place.names() == before
        _note(row, "refused, old file kept" if kept else "refused, old file lost", line)
    else:
        _note(row, "told otherwise", end.printed[-500:])


def _told(row: Row) -> Found:
    return row["what"], {**row, "ended": dict(row["ended"])}


def misplace(folder: Path, cases: Sequence[Case]) -> Iterator[Found]:
    """Every command whose target is a folder or a link, or lies where nothing may be written."""
    rows: dict[str, Row] = {}
    for number, case in enumerate(cases):
        place = Place(folder / f"target{number}")
        place.done(case.old)
        target = place.home / case.target
        old = state(target)
        place.keep()
        place.done(case.new)
        new = state(target)
        for what, odd, ended in _oddities():
            row = rows.setdefault(what, _row(what))
            place.restore()
            _note(row, *odd(place, case, (old, new), ended))
    yield from map(_told, rows.values())


def _oddities() -> Sequence[tuple[str, Callable[..., Any], str]]:
    return (
        ("the target is a folder", _folder, "refused, the folder is as it was"),
        ("the target is a link to a folder", _link_to_folder, "refused, the folder is as it was"),
        ("the target is a link to a file", _link_to_file, "the link replaced, its file kept"),
        ("the target is a link to nothing", _link_to_nothing, "the link replaced"),
        ("the target's disk is read-only", _read_only, "refused, nothing changed"),
        ("the target's folder is another user's", _foreign, "refused, nothing changed"),
        ("the target's folder does not exist", _missing, "refused, nothing changed"),
    )


Odd = tuple[str, str | None]


def _refused(place: Place, work: Callable[[], object], good: str) -> Odd:
    before = {name: _bytes(place.home.parent / name) for name in place.names()}
    end = place.run(work)
    line = one_line(end)
    after = {name: _bytes(place.home.parent / name) for name in place.names()}
    if line is None or not line.startswith("ExportError: cannot write"):
        return "told otherwise", end.printed[-500:]
    return (good if before == after else "something changed"), line


def _bytes(path: Path) -> bytes:
    return path.read_bytes() if path.is_file() else b""


def _folder(place: Place, case: Case, _: Any, good: str) -> Odd:
    target = place.home / case.target
    target.unlink()
    target.mkdir()
    (target / "inner").write_text("inner")
    try:
        return _refused(place, case.new, good)
    finally:
        shutil.rmtree(target)


def _link_to_folder(place: Place, case: Case, _: Any, good: str) -> Odd:
    target = place.home / case.target
    target.unlink()
    (place.home / "folder").mkdir()
    target.symlink_to("folder")
    try:
        return _refused(place, case.new, good)
    finally:
        target.unlink()
        (place.home / "folder").rmdir()


def _link_to_file(place: Place, case: Case, versions: tuple[str, str], good: str) -> Odd:
    target = place.home / case.target
    kept = place.home / f"kept{target.suffix}"
    target.rename(kept)
    target.symlink_to(kept.name)
    before = kept.read_bytes()
    end = place.run(case.new)
    replaced = end.status == 0 and not target.is_symlink()
    whole = replaced and found_at(target, {versions[1]: "new"}) == "new"
    same = kept.read_bytes() == before
    kept.unlink()
    return (good if whole and same else "not as it should be"), None


def _link_to_nothing(place: Place, case: Case, versions: tuple[str, str], good: str) -> Odd:
    target = place.home / case.target
    if case.name.startswith("convert over"):
        return good, None  # its input would be missing: nothing to try
    target.unlink()
    target.symlink_to("nothing")
    end = place.run(case.new)
    replaced = end.status == 0 and not target.is_symlink()
    whole = replaced and found_at(target, {versions[1]: "new"}) == "new"
    return (
        good if whole and not (place.home / "nothing").exists() else "not as it should be"
    ), None


def _read_only(place: Place, case: Case, _: Any, good: str) -> Odd:
    with _disk(place.home, f"size={LARGE},mode=0755"):
        _remount(place.home, "ro")
        return _refused(place, case.new, good)


def _foreign(place: Place, case: Case, _: Any, good: str) -> Odd:
    def as_nobody() -> None:
        with contextlib.suppress(SystemExit):
            command("inspect", "model.onnx")()  # imports what that user may not read
        os.seteuid(NOBODY)
        case.new()

    return _refused(place, as_nobody, good)


def _missing(place: Place, case: Case, _: Any, good: str) -> Odd:
    work = command("convert", "model.onnx", "-o", f"nowhere/{Path(case.target).stem}.onnx")
    return _refused(place, work, good)


def pair(folder: Path, cases: Sequence[Case], rounds: int) -> Iterator[Found]:
    """Two processes that write one target at once, in different versions."""
    for number, case in enumerate(cases):
        if case.target == "source.onnx":
            continue  # which one of them reads
        place = Place(folder / f"pair{number}")
        target = place.home / case.target
        place.done(case.old)
        old, names = state(target), [place.names()]
        place.keep()
        place.done(case.new)
        new = state(target)
        names.append(place.names())
        row = _row(f"{case.name}: two processes at once")
        for _ in range(max(2, round(rounds * case.share))):
            place.restore()
            ends = [running.end() for running in [place.started(w) for w in (case.old, case.new)]]
            done = all(end.status == 0 for end in ends)
            whole = found_at(target, {old: "that of one", new: "that of one"})
            clean = place.names() in names
            _note(row, whole if done and clean else f"{[end.status for end in ends]}, {whole}")
        yield _told(row)
