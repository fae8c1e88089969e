"""Weights that are made of others, which lie in files: whenever they are read, and not before.

Folding and narrowing change most bytes of a large model. What they change is read, computed and
written a part at a time, so that no more than one weight is ever held.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from ..terms import Value
from .base import Stored, numpy_dtype
from .onnx_constants import Source, source
from .onnx_files import externals

__all__ = ["Derived", "derived", "kept", "origins"]

Array = npt.NDArray[Any]
Making = Callable[[Array], Iterable[Array]]
"""From what a weight is made of to the weight, in parts along its first axis."""


class Derived(ir.LazyTensor):
    """A weight that is made of one in a file whenever it is read."""

    def __init__(
        self, found: Source, making: Making, dtype: ir.DataType, shape: ir.Shape, name: str | None
    ) -> None:
        super().__init__(self._whole, dtype, shape, name=name)
        self._source = found
        self._making = making

    @property
    def origin(self) -> ir.TensorProtocol:
        """The tensor in the file."""
        tensor = self._source.tensor
        return tensor.origin if isinstance(tensor, Derived) else tensor

    def parts(self) -> Iterator[ir.TensorProtocol]:
        """Its parts along the first axis, in order.

        Raises CaptureError where the file has become too short, and what making it raises.
        """
        for part in self._making(self._source.numbers()):
            yield ir.Tensor(part.astype(self.dtype.numpy()), self.dtype)

    def _whole(self) -> ir.TensorProtocol:
        array = _joined([part.numpy() for part in self.parts()])
        return ir.Tensor(array, self.dtype, shape=self.shape, name=self.name)


def derived(
    found: Source, making: Making, dtype: ir.DataType, shape: ir.Shape, name: str | None
) -> ir.TensorProtocol:
    """A weight made of another one: when it is read, where that lies in a file, else now."""
    if isinstance(found.tensor, (ir.ExternalTensor, Derived)):
        return Derived(found, making, dtype, shape, name)
    array = _joined([part.astype(dtype.numpy()) for part in making(found.numbers())])
    return ir.Tensor(array, dtype, shape=shape, name=name)


def kept(stored: Stored, constant: Callable[[Value], Array | None]) -> ir.TensorProtocol:
    """The tensor of a constant to keep. Raises RewriteError as `Stored` does.

    One that changes by no more than a few numbers for each of its channels may be made later.
    """
    base, dtype = stored.base, ir.DataType.from_numpy(numpy_dtype(stored.dtype))
    if isinstance(base, Value) and stored.is_brief():
        found = source(base.native)
        if found is not None:
            shape = ir.Shape(base.shape or ())
            return derived(found, stored.parts, dtype, shape, stored.name)
    parts = [part.astype(dtype.numpy()) for part in stored.parts(stored.given(constant))]
    return ir.tensor(_joined(parts), dtype, name=stored.name)


def origins(model: ir.Model) -> Iterator[ir.ExternalTensor]:
    """Every tensor in another file that a model holds, or that a weight of it is made of."""
    yield from externals(model)
    for value in model.graph.initializers.values():
        tensor = value.const_value
        origin = tensor.origin if isinstance(tensor, Derived) else None
        if isinstance(origin, ir.ExternalTensor):
            yield origin


def _joined(parts: list[Array]) -> Array:
    return parts[0] if len(parts) == 1 else np.concatenate(parts)
