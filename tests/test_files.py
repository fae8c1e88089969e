"""Replaced files: the old one or the new one, never half of one, and nothing else beside it."""

from __future__ import annotations

import errno
import os
import signal
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

from dyt_compile import files
from dyt_compile.errors import ExportError
from dyt_compile.files import (
    LOCK,
    PREFIX,
    check_writable,
    replaced,
    work_folder,
    write_arrays,
)

pytestmark = pytest.mark.core

locks = pytest.mark.skipif(sys.platform == "win32", reason="there are no such locks")


def _contents(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.iterdir()}


def _names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def _write(target: Path, text: str, data: str, error: type[BaseException] | None = None) -> None:
    """Replace a file and its companion; or fail when both are written."""
    with replaced(target) as temporary:
        temporary.write_text(text)
        temporary.with_name(f"{target.name}.data").write_text(data)
        if error is not None:
            raise error


@pytest.mark.parametrize("old", [None, "old"])
def test_file_takes_its_name_when_the_block_ends(tmp_path: Path, old: str | None) -> None:
    target = tmp_path / "model.onnx"
    if old is not None:
        target.write_text(old)
    with replaced(target) as temporary:
        temporary.write_text("new")
        assert not target.exists() if old is None else target.read_text() == old
    assert _contents(tmp_path) == {"model.onnx": "new"}


def test_temporary_file_has_the_name_and_the_disk_of_its_target(tmp_path: Path) -> None:
    with replaced(tmp_path / "model.onnx") as temporary:
        assert temporary.name == "model.onnx"
        assert temporary.parent.parent == tmp_path
        temporary.touch()


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_old_files_stay_when_the_block_fails(tmp_path: Path, error: type[BaseException]) -> None:
    target = tmp_path / "model.onnx"
    target.write_text("old")
    (tmp_path / "model.onnx.data").write_text("old data")
    with pytest.raises(error):
        _write(target, "new", "new data", error)
    assert _contents(tmp_path) == {"model.onnx": "old", "model.onnx.data": "old data"}


def test_nothing_appears_when_the_block_fails(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError):
        _write(tmp_path / "model.onnx", "new", "new data", RuntimeError)
    assert not list(tmp_path.iterdir())


def test_nothing_appears_when_the_block_writes_nothing(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_text("old")
    with pytest.raises(ExportError), replaced(tmp_path / "model.onnx"):
        pass
    assert _contents(tmp_path) == {"model.onnx": "old"}


def test_companions_go_with_their_file(tmp_path: Path) -> None:
    target = tmp_path / "model.onnx"
    target.write_text("old")
    (tmp_path / "model.onnx.data").write_text("old data")
    (tmp_path / "other.onnx").write_text("other")
    with replaced(target) as temporary:
        temporary.write_text("new")
        temporary.with_name("model.onnx.data").write_text("new data")
        assert {"model.onnx", "model.onnx.data"} < _contents(temporary.parent).keys()
        assert (tmp_path / "model.onnx.data").read_text() == "old data"
    assert _contents(tmp_path) == {
        "model.onnx": "new", "model.onnx.data": "new data", "other.onnx": "other"
    }  # fmt: skip


def test_target_without_a_folder_is_one_in_the_working_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with replaced(Path("model.onnx")) as temporary:
        temporary.write_text("new")
    assert _contents(tmp_path) == {"model.onnx": "new"}


@pytest.mark.parametrize("mask", [0o022, 0o002, 0o077])
def test_files_have_the_permissions_of_the_umask(tmp_path: Path, mask: int) -> None:
    before = os.umask(mask)
    try:
        with replaced(tmp_path / "model") as temporary:
            temporary.touch(mode=0o600)
            temporary.with_name("model.data").touch(mode=0o600)
    finally:
        os.umask(before)
    assert {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()} == {0o666 & ~mask}


def test_folder_as_target_is_refused(tmp_path: Path) -> None:
    target = tmp_path / "model.onnx"
    target.mkdir()
    with pytest.raises(ExportError, match=r"model\.onnx': it is a folder$"), replaced(target):
        pytest.fail("the block must not run")
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]


def test_missing_folder_is_refused_and_not_made(tmp_path: Path) -> None:
    target = tmp_path / "missing" / "model.onnx"
    with pytest.raises(ExportError, match=r"its folder does not exist$"), replaced(target):
        pytest.fail("the block must not run")
    assert not list(tmp_path.iterdir())


def test_file_as_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ExportError, match="its folder"), replaced(tmp_path / "file" / "model"):
        pytest.fail("the block must not run")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write")
def test_read_only_folder_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(ExportError, match="Permission denied"), replaced(tmp_path / "model"):
            pytest.fail("the block must not run")
    finally:
        tmp_path.chmod(0o700)


def test_name_that_the_disk_does_not_take_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="cannot write"), replaced(tmp_path / ("m" * 256)):
        pytest.fail("the block must not run")


def test_companion_that_cannot_be_placed_leaves_the_old_file(tmp_path: Path) -> None:
    target = tmp_path / "model.onnx"
    target.write_text("old")
    (tmp_path / "model.onnx.data").mkdir()
    with pytest.raises((ExportError, OSError)):
        _write(target, "new", "new data")
    assert target.read_text() == "old"
    assert {path.name for path in tmp_path.iterdir()} == {"model.onnx", "model.onnx.data"}


# Killed processes.

KILLED = """
import os, signal, sys
from pathlib import Path
from dyt_compile.files import replaced, work_folder
with replaced(Path(sys.argv[1])) as temporary:
    temporary.write_text("new")
    with work_folder(Path(sys.argv[2])) as folder:
        (folder / "inner").mkdir()
        (folder / "inner" / "file").write_text("spilled")
        os.kill(os.getpid(), signal.SIGKILL)
"""


def _killed(target: Path, place: Path) -> None:
    """A process that is killed while it writes."""
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(target), str(place)],
        env={**os.environ, "PYTHONPATH": str(Path(files.__file__).parents[1])}, check=False,
    )  # fmt: skip
    assert done.returncode == -signal.SIGKILL


@locks
def test_what_a_killed_process_left_is_removed_by_the_next(tmp_path: Path) -> None:
    target, place = tmp_path / "model.onnx", tmp_path / "place"
    target.write_text("old")
    place.mkdir()
    for _ in range(2):
        _killed(target, place)
    assert target.read_text() == "old"
    left = [path.name for path in tmp_path.glob(f"{PREFIX}*")]
    assert len(left) == 1  # the second run removed what the first one left
    with replaced(tmp_path / "other") as temporary, work_folder(place) as folder:
        assert list(place.iterdir()) == [folder]
        assert list(tmp_path.glob(f"{PREFIX}*")) == [temporary.parent]
        temporary.write_text("other")
    assert _names(tmp_path) == {"model.onnx", "other", "place"}
    assert not list(place.iterdir())


def test_work_folder_of_a_relative_place_is_known_to_other_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with work_folder(Path()) as folder, replaced(Path("target")) as temporary:
        assert folder.is_absolute()
        assert temporary.is_absolute()
        temporary.write_text("new")
    assert (tmp_path / "target").read_text() == "new"


@locks
def test_what_is_in_use_is_left_alone(tmp_path: Path) -> None:
    with work_folder(tmp_path) as first:
        (first / "file").write_text("in use")
        with work_folder(tmp_path) as second:
            assert second != first
        assert (first / "file").read_text() == "in use"
    assert not list(tmp_path.iterdir())


@locks
def test_folder_that_was_taken_for_a_dead_ones_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process may come between a folder and its lock."""
    with work_folder(tmp_path) as held:
        gone = tmp_path / f"{PREFIX}gonegone"
        real, names = tempfile.mkdtemp, iter([str(held), str(gone)])
        monkeypatch.setattr(tempfile, "mkdtemp", lambda **at: next(names, None) or real(**at))
        with work_folder(tmp_path) as found:
            assert found not in (held, gone)


def test_only_folders_of_ours_are_removed(tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "file").write_text("kept")
    (tmp_path / f"{PREFIX}linklink").symlink_to("outside")
    (tmp_path / f"{PREFIX}filefile").write_text("kept")
    (tmp_path / f"{PREFIX}of-the-user").mkdir()
    before = _names(tmp_path)
    with work_folder(tmp_path):
        pass
    assert _names(tmp_path) == before
    assert (tmp_path / "outside" / "file").read_text() == "kept"


def test_without_locks_files_are_written_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path, *, wait: bool) -> int | None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(files, "_locked", refuse)
    (tmp_path / f"{PREFIX}deaddead").mkdir()
    _write(tmp_path / "model.onnx", "new", "new data")
    assert _names(tmp_path) == {"model.onnx", "model.onnx.data", f"{PREFIX}deaddead"}


class DeadError(BaseException):
    """Stands for the end of a process."""


def test_no_death_leaves_a_file_with_the_companion_of_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, companion = tmp_path / "model.onnx", tmp_path / "model.onnx.data"
    found = []
    for step in range(4):
        target.write_text("old")
        companion.write_text("old")
        left = iter(range(step))

        def dying_before(real: Any, left: Iterator[int] = left) -> Any:
            def dying(*arguments: Any, **more: Any) -> Any:
                if next(left, None) is None:
                    raise DeadError
                return real(*arguments, **more)

            return dying

        with monkeypatch.context() as patch, suppress(DeadError), replaced(target) as temporary:
            temporary.write_text("new")
            temporary.with_name(companion.name).write_text("new")
            for name in ("replace", "unlink"):
                patch.setattr(Path, name, dying_before(getattr(Path, name)))
        state = tuple(p.read_text() if p.exists() else None for p in (target, companion))
        found.append(state)
    assert found == [("old", "old"), ("old", None), ("new", None), ("new", "new")]


def test_companion_with_a_name_of_its_own_is_there_before_its_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "model.onnx"
    for name in ("model.onnx", "old.data", "same.data"):
        (tmp_path / name).write_text(name)
    seen = []

    def looking(path: Path, place: Path) -> None:
        seen.append((place.name, _names(tmp_path) - {path.parent.name}))
        path.rename(place)

    with monkeypatch.context() as patch, replaced(target, lambda: [tmp_path / "old.data"]) as new:
        for name in ("model.onnx", "new.data", "same.data"):
            new.with_name(name).write_text(name)
        patch.setattr(Path, "replace", looking)
    old = {LOCK, "model.onnx", "old.data", "same.data"}
    assert seen == [
        ("new.data", old), ("same.data", old | {"new.data"}), ("model.onnx", old | {"new.data"})
    ]  # fmt: skip
    assert _names(tmp_path) == {"model.onnx", "new.data", "same.data"}


# Links, and disks that are full.


def test_link_is_replaced_and_what_it_led_to_stays(tmp_path: Path) -> None:
    (tmp_path / "store").write_text("stored")
    (tmp_path / "model.onnx").symlink_to("store")
    with replaced(tmp_path / "model.onnx") as temporary:
        temporary.write_text("new")
    assert not (tmp_path / "model.onnx").is_symlink()
    assert _contents(tmp_path) == {"model.onnx": "new", "store": "stored"}


def test_link_to_a_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "model.onnx").symlink_to("folder")
    with pytest.raises(ExportError, match="it is a folder"):
        check_writable(tmp_path / "model.onnx")


def test_full_disk_is_told_whatever_the_library_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, data: bytes) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    target = tmp_path / "model.onnx"
    target.write_text("old")
    with pytest.raises(RuntimeError, match="enforce fail"), replaced(target):
        raise RuntimeError("enforce fail")
    told = r"^cannot write '.*model\.onnx': No space left on device$"
    with pytest.raises(ExportError, match=told), replaced(target):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(ExportError, match=told), replaced(target):
        raise RuntimeError("enforce fail")
    assert _contents(tmp_path) == {"model.onnx": "old"}


def test_arrays_are_written_as_safetensors_reads_them(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    groups = {
        "first": {"x": random.normal(size=(3, 5)).astype(np.float32), "seen": np.arange(3)},
        "second/call": {"y": random.normal(size=7).T, "few": np.array([1, 2, 3], np.uint8)},
    }
    path = tmp_path / "arrays.safetensors"
    write_arrays(path, {name: dict(held).copy for name, held in groups.items()}, {"about": "it"})
    found = load_file(path)
    expected = {f"{g}/{name}": a for g, held in groups.items() for name, a in held.items()}
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert found[name].dtype == array.dtype
        np.testing.assert_array_equal(found[name], array)
    with safe_open(path, framework="numpy") as file:
        assert file.metadata() == {"about": "it"}
