"""Torch models without weights in memory: traced over stand-ins, and given where weights lie."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from ..errors import CaptureError
from ..weights import SMALL_BYTES, Weights
from .fx_constants import attribute

__all__ = ["Holder", "absent", "laid", "named_weights", "stood_in"]


def absent(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The parameters and buffers of a module on the meta device, under every name they have."""
    return {name: tensor for name, tensor in _tensors(module) if tensor.is_meta}


@contextmanager
def stood_in(module: torch.nn.Module) -> Iterator[None]:
    """Let tensors that are absent look like ones on the CPU, as long as the module is traced.

    The inputs are there, and so are buffers that no file holds.
    """
    before = absent(module)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    made = {tensor: _stand_in(tensor, mode) for tensor in before.values()}
    _put(module, {name: made[tensor] for name, tensor in before.items()})
    try:
        yield
    finally:
        _put(module, before)


def named_weights(module: torch.nn.Module, weights: Weights) -> Weights:
    """The weights by every name that the module has for them: tied ones lie under one of theirs."""
    names: dict[torch.Tensor, list[str]] = {}
    for name, tensor in absent(module).items():
        names.setdefault(tensor, []).append(name)
    found = {
        name: next((alias for alias in aliases if alias in weights.places), None)
        for aliases in names.values()
        for name in aliases
    }
    return weights.renamed({name: held for name, held in found.items() if held is not None})


def laid(module: torch.fx.GraphModule, weights: Weights) -> None:
    """Put what a traced module needs of its weights into it, in place of stand-ins.

    Small ones are read; large ones stay in their files, and lie on the meta device here. Raises
    CaptureError for a weight that the files lack, or hold in another shape.
    """
    used = {str(node.target) for node in module.graph.find_nodes(op="get_attr")}
    made: dict[str, torch.Tensor] = {}
    for path, tensor in _tensors(module):
        if isinstance(tensor, FakeTensor):
            if path in used:
                _check(path, tensor, weights)
            small = path in used and tensor.numel() * tensor.element_size() < SMALL_BYTES
            held = weights.read(path).to(tensor.dtype) if small else _meta(tensor)
            made[path] = torch.nn.Parameter(held, False) if _learned(tensor) else held
    _put(module, made)


class Holder:
    """What a module holds, and files for it. stored: where the weights lie that are absent."""

    def __init__(self, module: torch.nn.Module, stored: Weights | None) -> None:
        self._module = module
        self._stored = stored

    def stored(self, path: str) -> Weights | None:
        """The files in which a weight lies, None where the module holds it."""
        held = attribute(self._module, path)
        absent = isinstance(held, torch.Tensor) and held.is_meta
        return self._stored if absent else None

    def whole(self, path: str) -> Any:
        """All of what lies under a path."""
        files, held = self.stored(path), attribute(self._module, path)
        return held if files is None else files.read(path).to(held.dtype)

    def rows(self, path: str, places: torch.Tensor) -> torch.Tensor:
        """Rows of a matrix that is stored."""
        files, held = self.stored(path), attribute(self._module, path)
        if files is None:
            raise CaptureError(f"the weight {path!r} is not in a file")
        return files.rows(path, places).to(held.dtype)


def _tensors(module: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """All parameters and buffers, under every name that they have."""
    yield from module.named_parameters(remove_duplicate=False)
    yield from module.named_buffers(remove_duplicate=False)


def _learned(tensor: torch.Tensor) -> bool:
    return isinstance(tensor, torch.nn.Parameter)


def _check(path: str, tensor: torch.Tensor, weights: Weights) -> None:
    if path not in weights.places:
        raise CaptureError(
            f"{path!r} is on the meta device, and none of the files of weights holds it; a buffer "
            "that is computed has to be built with its values"
        )
    if weights.shape(path) != tuple(tensor.shape):
        raise CaptureError(
            f"the weight {path!r} has shape {list(weights.shape(path))} in its file, "
            f"{list(tensor.shape)} in the model"
        )


def _stand_in(tensor: torch.Tensor, mode: FakeTensorMode) -> torch.Tensor:
    with mode:
        made = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")
        return torch.nn.Parameter(made, tensor.requires_grad) if _learned(tensor) else made


def _meta(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")


def _put(module: torch.nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
    for path, tensor in tensors.items():
        home, _, name = path.rpartition(".")
        owner = module.get_submodule(home)
        learned = name in owner._parameters
        place: dict[str, Any] = owner._parameters if learned else owner._buffers
        place[name] = tensor
