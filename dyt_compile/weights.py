"""Weights that stay in safetensors files until they are asked for, one tensor at a time."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import RawIOBase
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

from .errors import CaptureError, OptionError, first_line

if TYPE_CHECKING:
    import torch

__all__ = ["SMALL_BYTES", "Weights", "open_weights"]

SMALL_BYTES = 1 << 16
"""Smaller tensors are read with the graph: gammas, biases, scalars."""

INDEX = ".safetensors.index.json"
WHOLE, SHARDED = "model.safetensors", f"model{INDEX}"
"""How files of weights are called in a folder of transformers."""


DTYPES = {
    "BOOL": ("bool", 1), "U8": ("uint8", 1), "U16": ("uint16", 2), "U32": ("uint32", 4),
    "U64": ("uint64", 8), "I8": ("int8", 1), "I16": ("int16", 2), "I32": ("int32", 4),
    "I64": ("int64", 8), "F8_E4M3": ("float8_e4m3fn", 1), "F8_E5M2": ("float8_e5m2", 1),
    "F16": ("float16", 2), "BF16": ("bfloat16", 2), "F32": ("float32", 4), "F64": ("float64", 8),
}  # fmt: skip
"""What safetensors and torch call the same numbers, and their bytes.
The format: github.com/safetensors/safetensors, "Format"."""

HEAD_BYTES = 100_000_000
"""The longest head that safetensors allows."""


@dataclass(frozen=True)
class _Place:
    """Where a tensor lies: so many bytes of a file."""

    file: Path
    start: int
    size: int
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Weights:
    """Where tensors lie, by name.

    Files are read, not mapped: a mapped page counts as memory of the process, and is never given
    back while another tensor of the file is in use.
    """

    places: Mapping[str, _Place]

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, which stays where it is."""
        return self.places[name].shape

    def dtype(self, name: str) -> torch.dtype:
        """The dtype of a tensor, which stays where it is."""
        import torch

        dtype: torch.dtype = getattr(torch, self.places[name].dtype)
        return dtype

    def read(self, name: str) -> torch.Tensor:
        """A tensor. Raises CaptureError where the file is not what it was."""
        (found,) = self._read(name, [0], self.places[name].size)
        tensor: torch.Tensor = found.view(self.dtype(name)).reshape(self.shape(name))
        return tensor

    def rows(self, name: str, places: torch.Tensor) -> torch.Tensor:
        """Rows of a matrix: [*places.shape, columns]. Raises IndexError as torch does."""
        wanted, order = places.unique(return_inverse=True)
        count, columns = self.shape(name)
        if len(wanted) and not 0 <= int(wanted[0]) <= int(wanted[-1]) < count:
            raise IndexError("index out of range in self")
        found = self._read(name, wanted.tolist(), self.places[name].size // max(count, 1))
        return found.view(self.dtype(name)).reshape(-1, columns)[order]

    def renamed(self, names: Mapping[str, str]) -> Weights:
        """The same tensors under other names: `names` gives the present one of each."""
        return Weights({new: self.places[old] for new, old in names.items()})

    def _read(self, name: str, rows: Sequence[int], size: int) -> torch.Tensor:
        """Some rows of a tensor of so many bytes each, as bytes."""
        import torch

        place = self.places[name]
        found = torch.empty(len(rows), size, dtype=torch.uint8)
        try:
            with place.file.open("rb", buffering=0) as file:
                for row, held in zip(rows, found.numpy(), strict=True):
                    file.seek(place.start + row * size)
                    if _fill(file, held.data) < size:
                        raise EOFError("it ends too early")
        except (OSError, EOFError) as error:
            raise CaptureError(
                f"the weight {name!r} cannot be read from {str(place.file)!r}: {first_line(error)}"
            ) from error
        return found


def _fill(file: RawIOBase, held: memoryview) -> int:
    """Read as many bytes as there is room for, or up to the end; how many. One call may give less
    than is asked for: 2 GB at most on Linux."""
    done = 0
    while done < len(held) and (got := file.readinto(held[done:])):
        done += got
    return done


def open_weights(path: Path) -> Weights:
    """The weights of a .safetensors file, of a .safetensors.index.json, or of a folder of either.

    Only the files' heads are read. Raises OptionError for other paths, and CaptureError for files
    that are damaged, for shards outside the folder of their index, and for names in none of them.
    """
    path = _file(path)
    try:
        if path.name.endswith(INDEX):
            return _sharded(path)
        return Weights(_held(path))
    except CaptureError:
        raise
    except Exception as error:
        raise CaptureError(f"{str(path)!r} holds no weights: {first_line(error)}") from error


def _file(path: Path) -> Path:
    inside = [path / name for name in (SHARDED, WHOLE)] if path.is_dir() else [path]
    for found in inside:
        if found.is_file() and found.name.endswith((INDEX, ".safetensors")):
            return found
    raise OptionError(
        f"weights are {str(path)!r}; allowed: a .safetensors file, a {INDEX[1:]} file, or a folder "
        f"that holds {WHOLE} or {SHARDED}"
    )


def _sharded(index: Path) -> Weights:
    """The tensors that an index tells of; a shard is a file beside the index."""
    told: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    for shard in set(told.values()):
        if Path(shard).name != shard:
            raise CaptureError(
                f"{str(index)!r} tells of the file {shard!r}; allowed: names of files beside it"
            )
    held = {shard: _held(index.with_name(shard)) for shard in set(told.values())}
    for name, shard in told.items():
        if name not in held[shard]:
            raise CaptureError(f"{str(index)!r} tells of {name!r} in {shard!r}, which lacks it")
    return Weights({name: held[shard][name] for name, shard in told.items()})


def _held(path: Path) -> dict[str, _Place]:
    """The tensors of one file, by its head; safetensors itself maps the whole file to read it."""
    end = path.stat().st_size
    with path.open("rb") as file:
        start = 8 + int.from_bytes(file.read(8), "little")
        if not 8 < start <= min(end, HEAD_BYTES):
            raise ValueError(f"it has {end} bytes, and its head would end at {start}")
        head = json.loads(file.read(start - 8))
    head.pop("__metadata__", None)
    return {name: _placed(path, start, end, **told) for name, told in head.items()}


def _placed(
    path: Path, start: int, end: int, dtype: str, shape: list[int], data_offsets: tuple[int, int]
) -> _Place:
    """A tensor of a file whose data begins and ends there. Raises ValueError for another place."""
    if dtype not in DTYPES:
        raise ValueError(f"it holds tensors of {dtype}; allowed: {', '.join(DTYPES)}")
    first, last = data_offsets
    size = prod(shape) * int(DTYPES[dtype][1])
    if min(shape, default=0) < 0 or not 0 <= first <= first + size == last <= end - start:
        raise ValueError(
            f"a tensor of {dtype} {shape} should lie at {first} to {last} of {end - start} bytes"
        )
    return _Place(path, start + first, size, DTYPES[dtype][0], tuple(shape))
