"""The vocabulary in which every graph shows itself to the matcher, and its meaning in NumPy.

A graph of torch or of ONNX gives each of its nodes as a `Term` of one small set of operators.
Casts that change nothing, dropout in evaluation and other identities do not appear: their result
is the same `Value` as their operand. What has no place in the vocabulary is `Op.OPAQUE`.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = [
    "ELEMENTWISE",
    "SHAPE_READERS",
    "Alias",
    "Op",
    "Said",
    "Term",
    "Value",
    "has_meaning",
    "interpret",
    "moved_units",
    "speak",
]

Array = npt.NDArray[np.float64]

SHAPE_READERS = {
    "Shape", "Size", "sym_size", "empty_like", "full_like", "new_empty", "new_full", "new_ones",
    "new_zeros", "ones_like", "zeros_like",
}  # fmt: skip
"""Operators that read the shape and the dtype of a value alone."""


class Op(enum.Enum):
    """An operator of the vocabulary; the comment gives the attributes that its terms carry."""

    ADD = enum.auto()
    SUB = enum.auto()
    MUL = enum.auto()
    DIV = enum.auto()
    NEG = enum.auto()
    ABS = enum.auto()
    MAXIMUM = enum.auto()
    SQUARE = enum.auto()
    POW = enum.auto()
    SQRT = enum.auto()
    RSQRT = enum.auto()
    RECIPROCAL = enum.auto()
    EXP = enum.auto()
    LOG = enum.auto()
    TANH = enum.auto()
    ERF = enum.auto()
    MEAN = enum.auto()  # axes, keepdims
    SUM = enum.auto()  # axes, keepdims
    VARIANCE = enum.auto()  # axes, keepdims, correction
    DEVIATION = enum.auto()  # the root of VARIANCE; axes, keepdims, correction
    LENGTH = enum.auto()  # the Euclidean norm; axes, keepdims
    CAST = enum.auto()
    EXPAND = enum.auto()
    UNSQUEEZE = enum.auto()  # axes
    SQUEEZE = enum.auto()  # axes
    RESHAPE = enum.auto()  # moves axes of length 1 alone; sources: for each axis, its old place
    VIEW = enum.auto()  # any other reshaping, in row-major order; shape: as far as it is known
    TRANSPOSE = enum.auto()  # order: for each axis, its old place
    SLICE = enum.auto()  # slices: by axis
    GATHER = enum.auto()  # inputs x and indices; axis, consumed: axes that the indices replace
    CONCAT = enum.auto()  # axis
    PAD = enum.auto()  # with zeros; axes
    ROLL = enum.auto()  # axes
    MATMUL = enum.auto()  # inputs a, b, bias or None; transposed: b is (out, in)
    CONVOLUTION = enum.auto()  # inputs x, weight, bias or None; groups, padded: with zeros
    PARTS = enum.auto()  # a node of several results, each of which is said by itself
    LAYER_NORM = enum.auto()  # inputs x, gamma or None, beta or None; axes, eps
    RMS_NORM = enum.auto()  # inputs x, gamma or None; axes, eps
    DYT = enum.auto()  # inputs x and those of the form; form
    BATCH_NORM = enum.auto()
    GROUP_NORM = enum.auto()
    INSTANCE_NORM = enum.auto()
    FUSED_NORM = enum.auto()  # a norm inside an operator that does more; reason
    OPAQUE = enum.auto()


ELEMENTWISE = {
    Op.ADD, Op.SUB, Op.MUL, Op.DIV, Op.NEG, Op.ABS, Op.MAXIMUM, Op.SQUARE, Op.POW, Op.SQRT,
    Op.RSQRT, Op.RECIPROCAL, Op.EXP, Op.LOG, Op.TANH, Op.ERF, Op.CAST,
}  # fmt: skip
"""Operators that compute each element from the same element of their operands."""


class Value:
    """One tensor of a graph.

    shape: None when unknown; an entry is None where the axis is dynamic.
    dtype: NumPy's name of the dtype ("float32", "bfloat16"), None when unknown.
    constant: computed from parameters and literals alone; parameter: a learned tensor itself.
    fixed: the same, but for lengths of the model's inputs: a parameter, repeated for each sample.
    scalar: the value of a constant of one element, where it is known without loading weights.
    native: the object that the graph knows it by; None where the value lies inside one node.
    """

    __slots__ = (
        "constant",
        "consumers",
        "dtype",
        "fixed",
        "name",
        "native",
        "parameter",
        "producer",
        "scalar",
        "shape",
    )

    def __init__(
        self,
        native: Any,
        name: str,
        shape: tuple[int | None, ...] | None,
        dtype: str | None,
        *,
        constant: bool = False,
        parameter: bool = False,
        scalar: float | None = None,
    ) -> None:
        self.native = native
        self.name = name
        self.shape = shape
        self.dtype = dtype
        self.constant = self.fixed = constant
        self.parameter = parameter
        self.scalar = scalar
        self.producer: Term | None = None
        self.consumers: list[Term] = []

    def learned(self) -> Value | None:
        """The one tensor that this constant is computed from, itself if none computes it.

        None where it is computed from several, or from none.
        """
        if self.producer is None:
            return self
        sources = {v.learned() for v in self.producer.operands if v.scalar is None}
        return sources.pop() if len(sources) == 1 else None

    def __repr__(self) -> str:
        return f"Value({self.name!r}, shape={self.shape}, dtype={self.dtype})"


class Term:
    """One node of a graph in the vocabulary, with exactly one output.

    inputs: values, Python floats for literals, or None for an absent optional operand.
    also: values that its node reads besides, such as the shape to expand to.
    index: its place in execution order, a whole number for what is a node; scope: the path of the
    module that it belongs to;
    label: the operator's name in its own world; within: the control flow that it stands in ("If").
    """

    __slots__ = (
        "also", "attributes", "index", "inputs", "label", "op", "output", "scope", "within",
    )  # fmt: skip

    def __init__(
        self,
        op: Op,
        inputs: Sequence[Value | float | None],
        output: Value,
        attributes: Mapping[str, Any],
        *,
        index: float,
        scope: str,
        label: str,
        within: str = "",
        also: Sequence[Value] = (),
    ) -> None:
        self.op = op
        self.also = tuple(also)
        self.inputs = tuple(inputs)
        self.output = output
        self.attributes = attributes
        self.index = index
        self.scope = scope
        self.label = label
        self.within = within
        output.producer = self
        for value in self.operands:
            value.consumers.append(self)
        if op is not Op.OPAQUE or self.operands:
            output.constant = all(value.constant for value in (*self.operands, *self.also))
            output.fixed = all(value.fixed for value in self.operands)
        if output.constant and op in ELEMENTWISE:
            output.scalar = self._number()

    @property
    def operands(self) -> tuple[Value, ...]:
        """The inputs that are values."""
        return tuple(value for value in self.inputs if isinstance(value, Value))

    def _number(self) -> float | None:
        """The result, where all inputs are known numbers."""
        numbers = [value.scalar if isinstance(value, Value) else value for value in self.inputs]
        if None in numbers:
            return None
        with np.errstate(all="ignore"):
            return float(interpret(self, [np.float64(x) for x in numbers]))

    def __repr__(self) -> str:
        return f"Term({self.op.name}, {self.inputs} -> {self.output.name})"


@dataclass(frozen=True)
class Said:
    """A node said in the vocabulary, before its operands are known as values.

    operands: the world's own nodes or values, Python numbers for literals, None for absent ones,
    or what is said of a part of the node: addcmul adds a product.
    """

    op: Op
    operands: tuple[Any, ...]
    attributes: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Alias:
    """A node whose value is its operand's value."""

    operand: Any


def speak(
    said: Said,
    output: Value,
    known: Callable[[Any], Value | float | None],
    *,
    index: int,
    scope: str,
    label: str,
    within: str = "",
    reads: Iterable[Value] = (),
) -> list[Term]:
    """The terms of a node, those of its parts first.

    known: the value of one of its operands; reads: all values that the node reads.
    """
    terms: list[Term] = []

    def operand(meant: Any) -> Value | float | None:
        if not isinstance(meant, Said):
            return known(meant)
        part = Value(None, f"{output.name}/{meant.op.name.lower()}", None, output.dtype)
        operands = [operand(x) for x in meant.operands]
        between = index - 1 + (len(terms) + 1) / MOST_PARTS
        terms.append(
            Term(
                meant.op, operands, part, meant.attributes,
                index=between, scope=scope, label=label, within=within,
            )
        )  # fmt: skip
        return part

    operands = [operand(x) for x in said.operands]
    named = {*operands, *(value for part in terms for value in part.inputs)}
    also = [value for value in reads if not value.constant and value not in named]
    terms.append(
        Term(
            said.op, operands, output, said.attributes,
            index=index, scope=scope, label=label, within=within, also=also,
        )
    )  # fmt: skip
    return terms


MOST_PARTS = 64
"""More parts than any node has: each has a place between the node before it and its own."""


def moved_units(
    before: Sequence[int | None], after: Sequence[int | None]
) -> tuple[int | None, ...] | None:
    """`sources` of a RESHAPE between two shapes, None where more than axes of length 1 move."""
    kept = [place for place, size in enumerate(before) if size != 1]
    grown = [size for size in after if size != 1]
    if [before[place] for place in kept] != grown:
        return None
    places = iter(kept)
    return tuple(None if size == 1 else next(places) for size in after)


def interpret(term: Term, inputs: Sequence[Array | float | None]) -> Array:
    """The float64 value of `term` for the values of its inputs, in the order of `term.inputs`.

    Raises KeyError for an operator without a meaning here (normalizations over batches, OPAQUE).
    """
    return _MEANING[term.op](term.attributes, *inputs)


def has_meaning(op: Op) -> bool:
    """Whether `interpret` knows the operator."""
    return op in _MEANING


Meaning = Callable[..., Array]


def _plain(function: Callable[..., Array]) -> Meaning:
    return lambda attributes, *inputs: function(*inputs)


def _reduction(function: Callable[..., Array]) -> Meaning:
    def meaning(attributes: Mapping[str, Any], x: Array) -> Array:
        return function(x, axis=attributes["axes"], keepdims=attributes["keepdims"])

    return meaning


def _variance(attributes: Mapping[str, Any], x: Array) -> Array:
    correction = attributes["correction"]
    return np.asarray(
        np.var(x, axis=attributes["axes"], keepdims=attributes["keepdims"], ddof=correction)
    )


def _length(x: Array, axis: tuple[int, ...], keepdims: bool) -> Array:
    return np.asarray(np.sqrt(np.sum(x * x, axis=axis, keepdims=keepdims)))


def _reshape(attributes: Mapping[str, Any], x: Array) -> Array:
    sources: Sequence[int | None] = attributes["sources"]
    return np.reshape(x, [1 if source is None else x.shape[source] for source in sources])


def _view(attributes: Mapping[str, Any], x: Array) -> Array:
    """Raises ValueError where more than one length is unknown."""
    shape: Sequence[int | None] | None = attributes["shape"]
    if shape is None:
        raise ValueError("its shape is not known")
    return np.reshape(x, [-1 if size is None else size for size in shape])


def _layer_norm(
    attributes: Mapping[str, Any], x: Array, gamma: Array | None = None, beta: Array | None = None
) -> Array:
    axes = attributes["axes"]
    centred = x - x.mean(axis=axes, keepdims=True)
    return _affine(_over_rms(centred, axes, attributes["eps"]), gamma, beta)


def _rms_norm(attributes: Mapping[str, Any], x: Array, gamma: Array | None = None) -> Array:
    return _affine(_over_rms(x, attributes["axes"], attributes["eps"]), gamma, None)


def _over_rms(x: Array, axes: tuple[int, ...], eps: float) -> Array:
    return np.asarray(x / np.sqrt((x * x).mean(axis=axes, keepdims=True) + eps))


def _affine(y: Array, gamma: Array | None, beta: Array | None) -> Array:
    if gamma is not None:
        y = y * gamma
    return y if beta is None else y + beta


def _dyt(attributes: Mapping[str, Any], x: Array, *parameters: Array) -> Array:
    from . import dyt

    form: dyt.Form = attributes["form"]
    named = dict(zip(form.parameters, parameters, strict=True))
    return dyt.evaluate(dyt.DytParameters(squash=form.squash, **named), x)


def _erf(x: Array) -> Array:
    from . import dyt

    return dyt.evaluate(dyt.DytParameters(np.ones(1), squash="erf"), x)


_MEANING: dict[Op, Meaning] = {
    Op.ADD: _plain(np.add),
    Op.SUB: _plain(np.subtract),
    Op.MUL: _plain(np.multiply),
    Op.DIV: _plain(np.divide),
    Op.NEG: _plain(np.negative),
    Op.ABS: _plain(np.abs),
    Op.MAXIMUM: _plain(np.maximum),
    Op.SQUARE: _plain(np.square),
    Op.POW: _plain(np.power),
    Op.SQRT: _plain(np.sqrt),
    Op.RSQRT: _plain(lambda x: 1.0 / np.sqrt(x)),
    Op.RECIPROCAL: _plain(lambda x: 1.0 / x),
    Op.EXP: _plain(np.exp),
    Op.LOG: _plain(np.log),
    Op.TANH: _plain(np.tanh),
    Op.ERF: _plain(_erf),
    Op.MEAN: _reduction(np.mean),
    Op.SUM: _reduction(np.sum),
    Op.LENGTH: _reduction(_length),
    Op.VARIANCE: _variance,
    Op.DEVIATION: lambda attributes, x: np.asarray(np.sqrt(_variance(attributes, x))),
    Op.CAST: _plain(lambda x: x),
    Op.EXPAND: _plain(lambda x: x),  # NumPy broadcasts where the graph expands
    Op.UNSQUEEZE: lambda attributes, x: np.expand_dims(x, attributes["axes"]),
    Op.SQUEEZE: lambda attributes, x: np.squeeze(x, attributes["axes"]),
    Op.TRANSPOSE: lambda attributes, x: np.transpose(x, attributes["order"]),
    Op.RESHAPE: _reshape,
    Op.VIEW: _view,
    Op.LAYER_NORM: _layer_norm,
    Op.RMS_NORM: _rms_norm,
    Op.DYT: _dyt,
}
