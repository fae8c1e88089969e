"""Embeddings in files beside an ONNX model, of which the rows that a batch looks up are read."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from ..errors import DataError
from .onnx_files import LARGE_BYTES, numbers

__all__ = ["Lookup", "lookup"]

Array = npt.NDArray[Any]


@dataclass(frozen=True, eq=False)
class Lookup:
    """A Gather of rows of a matrix in another file. places, output: values of the model."""

    tensor: ir.ExternalTensor
    places: ir.Value
    output: ir.Value

    def __call__(self, places: Array) -> Array:
        """What the Gather gives: [*places.shape, columns]. Raises DataError for rows not there."""
        count, columns = self.tensor.shape.numpy()
        if places.size and not -count <= places.min() <= places.max() < count:
            raise DataError(
                f"the model cannot run on a batch: {self.tensor.name!r} has {count} rows, and "
                f"{places.min()} to {places.max()} are looked up"
            )
        wanted, order = np.unique(places % count, return_inverse=True)
        found = np.empty((len(wanted), columns), self.tensor.dtype.numpy())
        for row, place in zip(found, wanted.tolist(), strict=True):
            row[:] = self._row(place, columns)
        return found[order.reshape(-1)].reshape(*places.shape, columns)

    def _row(self, place: int, columns: int) -> Array:
        size = self.tensor.nbytes // self.tensor.shape.numpy()[0]
        row = ir.ExternalTensor(
            self.tensor.location, (self.tensor.offset or 0) + place * size, size, self.tensor.dtype,
            shape=ir.Shape([columns]), name=str(self.tensor.name), base_dir=self.tensor.base_dir,
        )  # fmt: skip
        return numbers(row)


def lookup(node: ir.Node, known: Collection[ir.Value]) -> Lookup | None:
    """The look-up that a node is, where its places are known before anything is computed."""
    axis = node.attributes.get("axis")
    if (node.domain, node.op_type) != ("", "Gather") or (axis is not None and axis.as_int()):
        return None
    matrix, places = node.inputs
    tensor = None if matrix is None or matrix in known else matrix.const_value
    if not isinstance(tensor, ir.ExternalTensor) or places is None or places not in known:
        return None
    whole = tensor.dtype.bitwidth >= 8 and len(tensor.shape) == 2
    if not whole or tensor.nbytes < LARGE_BYTES:
        return None
    return Lookup(tensor, places, node.outputs[0])
