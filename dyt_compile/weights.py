"""Weights that stay in safetensors files until they are asked for, one tensor at a time."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import CaptureError, OptionError, first_line

if TYPE_CHECKING:
    import torch

__all__ = ["SMALL_BYTES", "Weights", "open_weights"]

SMALL_BYTES = 1 << 16
"""Smaller tensors are read with the graph: gammas, biases, scalars."""

INDEX = ".safetensors.index.json"
WHOLE, SHARDED = "model.safetensors", f"model{INDEX}"
"""How files of weights are called in a folder of transformers."""


@dataclass(frozen=True, eq=False)
class Weights:
    """Where tensors lie, by name: a file, and what they are called in it."""

    places: Mapping[str, tuple[Path, str]]

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, which stays where it is."""
        with self._opened(name) as file:
            return tuple(file.get_slice(self.places[name][1]).get_shape())

    def dtype(self, name: str) -> torch.dtype:
        """The dtype of a tensor, which stays where it is."""
        if not self.shape(name):
            return self.read(name).dtype
        with self._opened(name) as file:
            dtype: torch.dtype = file.get_slice(self.places[name][1])[:0].dtype
        return dtype

    def read(self, name: str) -> torch.Tensor:
        """A tensor in memory of its own: files are read, not mapped, so that none of them stays.

        Raises CaptureError where the file is not what it was.
        """
        try:
            with self._opened(name) as file:
                tensor: torch.Tensor = file.get_tensor(self.places[name][1])
        except Exception as error:
            raise CaptureError(
                f"the weight {name!r} cannot be read from {str(self.places[name][0])!r}: "
                f"{first_line(error)}"
            ) from error
        return tensor

    def renamed(self, names: Mapping[str, str]) -> Weights:
        """The same tensors under other names: `names` gives the present one of each."""
        return Weights({new: self.places[old] for new, old in names.items()})

    def _opened(self, name: str) -> Any:
        from safetensors import safe_open

        return safe_open(str(self.places[name][0]), framework="pt", backend="pread")


def open_weights(path: Path) -> Weights:
    """The weights of a .safetensors file, of a .safetensors.index.json, or of a folder of either.

    Only the files' heads are read. Raises OptionError for other paths, and CaptureError for files
    that are damaged, for shards outside the folder of their index, and for names in none of them.
    """
    path = _file(path)
    try:
        if path.name.endswith(INDEX):
            return _sharded(path)
        return Weights({key: (path, key) for key in _keys(path)})
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
    held = {shard: _keys(index.with_name(shard)) for shard in set(told.values())}
    for name, shard in told.items():
        if name not in held[shard]:
            raise CaptureError(f"{str(index)!r} tells of {name!r} in {shard!r}, which lacks it")
    return Weights({name: (index.with_name(shard), name) for name, shard in told.items()})


def _keys(path: Path) -> set[str]:
    from safetensors import safe_open

    with safe_open(str(path), framework="pt", backend="pread") as file:
        return set(file.keys())
