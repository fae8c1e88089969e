"""Archives that would unpack to far more than they are, or to somewhere else, are refused."""

from __future__ import annotations

import io
import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dyt_compile import data
from dyt_compile.archives import entries
from dyt_compile.errors import DataError

pytestmark = pytest.mark.core


class Pickled:
    """Writes a file where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (open, (str(self.path), "w"))


def _archive(path: Path, *names: str, method: int = zipfile.ZIP_STORED, size: int = 8) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        for name in names:
            archive.writestr(zipfile.ZipInfo(name), bytes(size), method)
    return path


def test_entries_of_a_plain_archive_are_given(tmp_path: Path) -> None:
    found = entries(_archive(tmp_path / "a.zip", "a.npy", "folder/b.npy", "c..npy"))
    assert [entry.filename for entry in found] == ["a.npy", "folder/b.npy", "c..npy"]


@pytest.mark.parametrize(
    "name", ["../x.npy", "a/../../x.npy", "/x.npy", "\\x.npy", "..\\x.npy", "C:\\x.npy", "C:x.npy"]
)
def test_entry_that_leads_out_is_refused_by_name(tmp_path: Path, name: str) -> None:
    path = _archive(tmp_path / "a.npz", "first.npy", name)
    with pytest.raises(ValueError, match="leads out of the archive"):
        entries(path)
    with pytest.raises(DataError, match=r"a\.npz.*leads out of the archive"):
        list(data.load(path, 1))


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_two_entries_of_a_name_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"two entries 'a\.npy'"):
        entries(_archive(tmp_path / "a.npz", "a.npy", "a.npy"))


def test_compressed_entry_is_refused_where_none_may_be(tmp_path: Path) -> None:
    path = _archive(tmp_path / "a.zip", "a", method=zipfile.ZIP_DEFLATED)
    assert len(entries(path)) == 1
    with pytest.raises(ValueError, match="'a' is compressed"):
        entries(path, stored=True)


def _claiming(path: Path, size: int) -> Path:
    """An archive whose directory says that its last entry unpacks to so many bytes."""
    content = bytearray(_archive(path, "a.npy", method=zipfile.ZIP_DEFLATED).read_bytes())
    at = content.rfind(b"PK\x01\x02")
    content[at + 24 : at + 28] = size.to_bytes(4, "little")
    path.write_bytes(content)
    return path


def test_bomb_is_refused_before_it_is_unpacked(tmp_path: Path) -> None:
    assert entries(_claiming(tmp_path / "large.npz", 1 << 30))
    bomb = _claiming(tmp_path / "bomb.npz", (1 << 30) + 1)
    with pytest.raises(DataError, match=r"bomb\.npz.* would unpack to 1073741825; allowed"):
        list(data.load(bomb, 1))


def test_entries_over_the_same_bytes_are_refused(tmp_path: Path) -> None:
    content = bytearray(_archive(tmp_path / "a.zip", "a", "b", size=1000).read_bytes())
    directory = content.rfind(b"PK\x05\x06")
    first = content.find(b"PK\x01\x02")
    entry = content[first : content.find(b"PK\x01\x02", first + 4)]
    many = b"".join(entry.replace(b"a", bytes([65 + n])) for n in range(5))
    end = content[directory:]
    end[8:12] = (5).to_bytes(2, "little") * 2
    end[12:16] = len(many).to_bytes(4, "little")
    (tmp_path / "a.zip").write_bytes(content[:first] + many + end)
    with pytest.raises(ValueError, match="they overlap"):
        entries(tmp_path / "a.zip")


def test_encrypted_entry_is_refused(tmp_path: Path) -> None:
    content = bytearray(_archive(tmp_path / "a.zip", "a").read_bytes())
    content[content.rfind(b"PK\x01\x02") + 8] |= 1
    (tmp_path / "a.zip").write_bytes(content)
    with pytest.raises(ValueError, match="encrypted"):
        entries(tmp_path / "a.zip")


@pytest.mark.parametrize("form", ["array", "file", "entry"])
def test_pickle_in_place_of_arrays_is_refused_and_not_run(tmp_path: Path, form: str) -> None:
    trap = Pickled(tmp_path / "hacked")
    path = tmp_path / "data.npz"
    if form == "array":
        np.savez(path, x=np.array([trap], object), allow_pickle=True)
    elif form == "file":
        path.write_bytes(pickle.dumps(trap))
    else:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("x.npy", pickle.dumps(trap))
    with pytest.raises(DataError, match=r"data\.npz") as caught:
        list(data.load(path, 1))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "hacked").exists()


def test_entry_that_is_no_array_is_refused(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    np.save(buffer, np.zeros(3))
    with zipfile.ZipFile(tmp_path / "data.npz", "w") as archive:
        archive.writestr("x.npy", buffer.getvalue())
        archive.writestr("notes.txt", "text")
    with pytest.raises(DataError, match=r"holds 'notes\.txt', which is no array"):
        list(data.load(tmp_path / "data.npz", 1))
