"""What every graph offers to the passes, whichever world it comes from."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import ml_dtypes
import numpy as np
import numpy.typing as npt

from ..changes import Change, in_parts, is_brief
from ..dyt import DytParameters, Form
from ..errors import RewriteError
from ..sites import NormSite
from ..terms import Term, Value

__all__ = ["Batch", "Edit", "Graph", "Load", "Segment", "Stored", "numpy_dtype"]

Array = npt.NDArray[Any]
Batch = Mapping[str, Any]
"""Input name to native tensor, every input of the graph present."""


@dataclass(frozen=True, eq=False)
class Stored:
    """A constant to keep: under `name`, or one like it that is free; rounded to `dtype` once.

    base: what it is made of, a constant of the graph or numbers; changes: made to that, in order,
    when somebody asks for the result.
    """

    name: str
    base: Value | Array
    dtype: str
    changes: tuple[Change, ...] = ()

    def given(self, constant: Callable[[Value], Array | None]) -> Array:
        """The numbers of the base. Raises RewriteError where its weights are not loaded."""
        if not isinstance(self.base, Value):
            return self.base
        array = constant(self.base)
        if array is None:
            raise RewriteError(f"{self.base.name!r}: its weights are not loaded (meta tensors)")
        return array

    def parts(self, given: Array) -> Iterator[Array]:
        """Its numbers in float64, made of those of the base, in parts along the first axis.

        Raises RewriteError where numbers that were finite are so no longer in `dtype`.
        """
        for before, now in in_parts(given, self.changes):
            _check_range(self, before, now)
            yield now

    def is_brief(self) -> bool:
        """Whether it takes less to say how it is made than to hold it."""
        shape = None if not isinstance(self.base, Value) else self.base.shape
        if shape is None:
            return False
        return is_brief(tuple(size or 0 for size in shape), self.changes)


def numpy_dtype(name: str | None) -> np.dtype[Any]:
    """The dtype of a name, bfloat16 too; float32 where there is none."""
    return np.dtype(ml_dtypes.bfloat16) if name == "bfloat16" else np.dtype(name or "float32")


def _check_range(stored: Stored, before: Array, now: Array) -> None:
    dtype = numpy_dtype(stored.dtype)
    largest = float(ml_dtypes.finfo(dtype).max)  # type: ignore[no-untyped-call]
    if not now.size or (now.max() <= largest and now.min() >= -largest):
        return
    with np.errstate(over="ignore"):
        outside = int((~np.isfinite(now.astype(dtype))).sum())
    if outside and np.isfinite(before).all():
        raise RewriteError(
            f"{stored.name!r}: {outside} numbers would leave the range of {stored.dtype}, up to "
            f"{largest:g}, by what is folded into them; allowed: a model in a wider type, or no "
            "folding (fold=False, --no-fold)"
        )


@dataclass(frozen=True, eq=False)
class Edit:
    """What exact algebra changes at one term.

    operands: new constants by place among the term's inputs; place 2 of a product is its bias,
    which it may not have had. added: what is added to its output. passed: the place of the operand
    that its readers read instead of its output. result: what its output is. form: of DyT, what it
    becomes.
    """

    term: Term
    operands: Mapping[int, Stored] = field(default_factory=dict)
    added: Stored | None = None
    passed: int | None = None
    result: Stored | None = None
    form: Form | None = None


class Segment(Protocol):
    """A part of a graph, ready to run: from the values of a cut to the values of a later one."""

    def __call__(self, values: Sequence[Any]) -> list[Any]:
        """Native values of `stop`, given native values of `start`."""
        ...


@dataclass(frozen=True)
class Load:
    """Bytes that a part of a graph takes while it runs: at most, and of each of its results."""

    most: int
    made: tuple[int, ...]


class Graph(Protocol):
    """A model, seen as terms in execution order.

    Native values are what the world computes with: tensors of torch, arrays of NumPy, integers.
    A graph is never changed: `replace` returns a new one that shares its weights.
    """

    name: str
    terms: list[Term]
    inputs: dict[str, Value]
    outputs: dict[str, Value]

    def bind(self, batch: Any) -> Batch:
        """The user's batch (tuple of args, or dict of kwargs) by input name; raises DataError."""
        ...

    def example(self) -> Batch | None:
        """A batch that fits the model's inputs, None where the graph cannot make one up."""
        ...

    def segment(self, start: Sequence[Value], stop: Sequence[Value]) -> Segment:
        """The part of the graph that computes `stop` from `start` and the graph's constants."""
        ...

    def loads(
        self,
        cuts: Sequence[tuple[Sequence[Value], Sequence[Value]]],
        batch: Batch,
        shapes: Mapping[str, tuple[int, ...]],
    ) -> list[Load]:
        """What segments take, one after the other, weights that they read from files included.

        cuts: start and stop of each. Nothing is computed. batch: an example, for the dtypes;
        shapes: of its tensors. Raises RewriteError where the data alone tells a shape.
        """
        ...

    def constant(self, value: Value) -> Array | None:
        """The value of a constant, None where its weights are not loaded (meta tensors)."""
        ...

    def to_array(self, native: Any) -> Array:
        """A native value as an array; bfloat16 comes as `ml_dtypes.bfloat16`."""
        ...

    def from_array(self, array: Array, like: Value) -> Any:
        """A native value of the dtype of `like`."""
        ...

    def replace(
        self, replacements: Iterable[tuple[NormSite, DytParameters]], edits: Iterable[Edit] = ()
    ) -> Graph:
        """A new graph in which DyT stands at each named site; its terms are matched anew.

        Of an identity nothing is left: what read the site reads what the site read.
        edits: of terms outside the norms of those sites, made as by `revise`.
        """
        ...

    def revise(self, edits: Iterable[Edit]) -> Graph:
        """A new graph with the edits made, in the order of their terms; unchanged weights shared.

        At most one edit a term.
        """
        ...

    @property
    def model(self) -> Any:
        """The graph as its users know it: an `nn.Module` or an `onnx_ir.Model`."""
        ...
