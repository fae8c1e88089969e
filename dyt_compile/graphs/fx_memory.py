"""What parts of a torch model take in memory: found by runs over tensors without numbers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any
from weakref import finalize

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from ..weights import Weights
from .base import Load
from .fx_constants import attribute
from .fx_weights import Holder

__all__ = ["Tally"]


class Tally(Holder):
    """Dry runs of segments of one module.

    Weights that are read from files are counted; the others are in memory already.
    """

    def __init__(self, module: torch.nn.Module, stored: Weights | None) -> None:
        super().__init__(module, stored)
        self._mode = FakeTensorMode(allow_non_fake_inputs=True)

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """A tensor of no numbers."""
        with self._mode:
            return torch.empty(shape, dtype=dtype)

    def whole(self, path: str) -> Any:
        """What stands for all of what lies under a path."""
        held, files = attribute(self._module, path), self.stored(path)
        if not isinstance(held, torch.Tensor):
            return held
        if files is None:
            with _disable_current_modes(), self._mode:
                return torch.empty_strided(held.shape, held.stride(), dtype=held.dtype)
        with self._mode:
            return torch.empty(held.shape, dtype=files.dtype(path)).to(held.dtype)

    def rows(self, path: str, places: torch.Tensor) -> torch.Tensor:
        """What stands for rows of a matrix: as many for the places as if none were named twice."""
        held = attribute(self._module, path)
        with self._mode:
            table = torch.empty(places.numel(), held.shape[1], dtype=held.dtype)
            return torch.cat([table]).reshape(*places.shape, held.shape[1])

    def run(
        self, segment: Callable[[Sequence[Any]], list[Any]], values: Sequence[Any]
    ) -> tuple[Load, list[Any]]:
        """What a segment takes, its values included, and its results."""
        with self._mode, _Counter() as counter:
            for value in values:
                counter.count(value)
            results = segment(values)
        made = tuple(x.nbytes if isinstance(x, torch.Tensor) else 0 for x in results)
        return Load(counter.most, made), results


class _Counter(TorchDispatchMode):
    """Counts the bytes of all tensors that live, those inside of composite operators too."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.most = self._live = 0
        self._known: set[int] = set()

    def __torch_dispatch__(
        self,
        function: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        made = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(made):
            self.count(leaf)
        return made

    def count(self, value: Any) -> None:
        """Count a tensor, unless it shares its memory with one that is counted."""
        if not isinstance(value, torch.Tensor):
            return
        storage = value.untyped_storage()
        if storage._cdata not in self._known:
            self._known.add(storage._cdata)
            self._live += storage.nbytes()
            self.most = max(self.most, self._live)
            finalize(storage, self._drop, storage._cdata, storage.nbytes())

    def _drop(self, key: int, size: int) -> None:
        self._known.discard(key)
        self._live -= size
