"""Replaced files: the old one or the new one, never half of one, and nothing else beside it."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

from dyt_compile.errors import ExportError
from dyt_compile.files import replaced, write_arrays

pytestmark = pytest.mark.core


def _contents(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.iterdir()}


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
        assert _contents(tmp_path / temporary.parent.name).keys() == {
            "model.onnx", "model.onnx.data"
        }  # fmt: skip
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
    with pytest.raises(ExportError, match="cannot write"), replaced(tmp_path / ("m" * 250)):
        pytest.fail("the block must not run")


def test_companion_that_cannot_be_placed_leaves_the_old_file(tmp_path: Path) -> None:
    target = tmp_path / "model.onnx"
    target.write_text("old")
    (tmp_path / "model.onnx.data").mkdir()
    with pytest.raises((ExportError, OSError)):
        _write(target, "new", "new data")
    assert target.read_text() == "old"
    assert {path.name for path in tmp_path.iterdir()} == {"model.onnx", "model.onnx.data"}


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
