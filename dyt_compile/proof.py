"""What a piece of a graph computes, found by running it: one prover for every world and spelling.

The piece is interpreted in float64 on random rows, some of them as small as eps, with random
parameters. If it is a norm, (x / y)^2 is a straight line in the row's mean of squares,

    (x / y)^2 = slope * mean(x^2) + intercept,

with slope 1 and intercept eps; x is first centred for LayerNorm. Any other slope, a bend, or an
element-wise part is named as what it is: unbiased variance, eps outside the root, row lengths.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from . import dyt
from .terms import Op, Term, Value, has_meaning, interpret

__all__ = ["Miss", "NormalForm", "Piece", "Prover"]

Array = npt.NDArray[np.float64]

ROWS = 12
TOLERANCE = 1e-7
"""Relative; float64 leaves about 1e-9 after E[x^2] - E[x]^2 on the rows used here."""


@dataclass(frozen=True)
class NormalForm:
    """(x - mean(x) if centred else x) / sqrt(mean(square of that) + eps), over `axes`."""

    centred: bool
    axes: tuple[int, ...]
    eps: float


@dataclass(frozen=True)
class Miss:
    """Why a piece that looks like a norm is none, in one sentence."""

    reason: str


@dataclass(frozen=True, eq=False)
class Piece:
    """Terms in execution order that compute `output` from `input` and constants alone."""

    input: Value
    output: Value
    terms: tuple[Term, ...]

    def axes(self) -> tuple[int, ...] | None:
        """The axes that its reductions share, from the end; None if they differ."""
        found: set[tuple[int, ...] | None] = set()
        for term in self.terms:
            if "axes" in term.attributes and term.op not in (Op.UNSQUEEZE, Op.SQUEEZE):
                found.add(_from_the_end(term))
        return found.pop() if len(found) == 1 else None

    def signature(self) -> tuple[object, ...]:
        """Equal for pieces that compute the same function of their input and parameters."""
        numbers: dict[Value, object] = {self.input: ("x", self.input.shape)}
        lines: list[object] = [self.input.shape]
        for term in self.terms:
            operands = tuple(
                numbers.setdefault(operand, _leaf(operand, len(numbers)))
                if isinstance(operand, Value)
                else operand
                for operand in term.inputs
            )
            numbers[term.output] = len(numbers)
            lines.append((term.op, operands, tuple(sorted(map(str, term.attributes.items())))))
        return tuple(lines)


class Prover:
    """Identifies pieces; equal structures share one proof."""

    def __init__(self) -> None:
        self._known: dict[tuple[object, ...], NormalForm | Miss] = {}
        self._proved: dict[tuple[object, ...], bool] = {}

    def identify(self, piece: Piece) -> NormalForm | Miss:
        """The normal form of a piece, its own affine part left out, or why it has none."""
        key = piece.signature()
        if key not in self._known:
            self._known[key] = _identify(piece)
        return self._known[key]

    def holds(
        self, piece: Piece, form: NormalForm, gamma: Value | None, beta: Value | None
    ) -> bool:
        """Whether the piece equals `gamma * form(x) + beta` on random input and parameters."""
        key = (*piece.signature(), form)
        if key not in self._proved:
            random = _Leaves(seed=1)
            x = _probe(piece.input, form.axes, like=gamma or beta)
            with np.errstate(all="ignore"):
                y = run(piece, x, random)
                expected = _apply(form, x)
                expected = _affine(expected, gamma, beta, random)
            self._proved[key] = _close(y, expected)
        return self._proved[key]

    def holds_dyt(self, piece: Piece, parameters: Mapping[str, Value], squash: str) -> bool:
        """Whether the piece equals DyT or Derf of its input, on random input and parameters."""
        random = _Leaves(seed=2)
        x = _probe(piece.input, (-1,), like=parameters.get("gamma"))
        values = {name: random.value(value) for name, value in parameters.items()}
        y = run(piece, x, random)
        return _close(y, dyt.evaluate(dyt.DytParameters(squash=squash, **values), x))


def run(piece: Piece, x: Array, leaves: _Leaves, *, bare: bool = False) -> Array:
    """The value of a piece for an input and the values of its constants.

    bare: leave out the affine part that whole norm operators bring along.
    """
    values: dict[Value, Array] = {piece.input: x}
    for term in piece.terms:
        inputs = [
            (values[v] if v in values else leaves.value(v)) if isinstance(v, Value) else v
            for v in term.inputs
        ]
        whole = term.op in (Op.LAYER_NORM, Op.RMS_NORM)
        values[term.output] = interpret(term, inputs[:1] if bare and whole else inputs)
    return np.asarray(values[piece.output], np.float64)


class _Leaves:
    """Random values for parameters, true ones for scalars; what derives from them follows."""

    def __init__(self, seed: int) -> None:
        self._random = np.random.default_rng(seed)
        self._values: dict[Value, Array] = {}

    def value(self, value: Value) -> Array:
        if value not in self._values:
            self._values[value] = self._make(value)
        return self._values[value]

    def _make(self, value: Value) -> Array:
        if value.scalar is not None:
            return np.asarray(value.scalar, np.float64)
        term = value.producer
        if term is not None and has_meaning(term.op):
            inputs = [self.value(v) if isinstance(v, Value) else v for v in term.inputs]
            return interpret(term, inputs)
        return self._random.uniform(0.5, 1.5, [size or 1 for size in value.shape or ()])


def _identify(piece: Piece) -> NormalForm | Miss:
    axes = piece.axes()
    if axes is None:
        return Miss("its reductions run over different or unknown axes")
    if len(axes) != 1:
        return Miss(f"it normalizes over {len(axes)} axes together, DyT has one per channel")
    x = _probe(piece.input, axes)
    with np.errstate(all="ignore"):
        y = run(piece, x, _Leaves(seed=0), bare=True)
    if y.shape != x.shape:
        return Miss("its result has another shape than its input")
    if not np.all(np.isfinite(y)):
        return Miss("it is not finite on ordinary input")
    centred = x - x.mean(axis=axes, keepdims=True)
    for base, other in ((centred, x), (x, centred)):
        inverse = _inverse_square(base, y, axes)
        if inverse is not None:
            return _read(inverse, base, other, axes, is_centred=base is centred)
    return Miss("its result is not its input (centred or not) divided by one number a row")


def _inverse_square(base: Array, y: Array, axes: tuple[int, ...]) -> Array | None:
    """(base / y)^2 of each row, None where y is not base times one number a row."""
    ratio = np.sum(y * base, axis=axes) / np.sum(base * base, axis=axes)
    residue = np.abs(y - np.expand_dims(ratio, axes) * base)
    if np.any(residue > TOLERANCE * np.abs(y).max(axis=axes, keepdims=True)):
        return None
    return np.asarray(1.0 / ratio.ravel() ** 2)


def _read(
    inverse: Array, base: Array, other: Array, axes: tuple[int, ...], *, is_centred: bool
) -> NormalForm | Miss:
    squares = (base * base).mean(axis=axes).ravel()
    line = _line(squares, inverse)
    if line is not None:
        return _judge(*line, is_centred, axes, base.shape[axes[0]])
    if _line((other * other).mean(axis=axes).ravel(), inverse) is not None:
        if is_centred:
            return Miss("it subtracts the mean, but divides by the root mean square without it")
        return Miss("it divides by the standard deviation, but does not subtract the mean")
    if _line(np.sqrt(squares), np.sqrt(inverse)) is not None:
        return Miss("eps stands outside the square root")
    return Miss("what it divides by is not the root of the mean of squares plus eps")


def _line(squares: Array, inverse: Array) -> tuple[float, float] | None:
    """Slope and intercept of `inverse` over `squares`, None where they are no straight line."""
    largest, smallest = int(squares.argmax()), int(squares.argmin())
    if squares[largest] == squares[smallest]:
        return None
    slope = (inverse[largest] - inverse[smallest]) / (squares[largest] - squares[smallest])
    intercept = inverse[smallest] - slope * squares[smallest]
    if np.any(np.abs(slope * squares + intercept - inverse) > TOLERANCE * np.abs(inverse)):
        return None
    return float(slope), float(intercept) if intercept > 1e-6 * squares[smallest] else 0.0


def _judge(
    slope: float, eps: float, centred: bool, axes: tuple[int, ...], channels: int
) -> NormalForm | Miss:
    if abs(slope - 1) < TOLERANCE:
        return NormalForm(centred, axes, float(f"{eps:.6g}"))
    if abs(slope * (channels - 1) / channels - 1) < TOLERANCE:
        return Miss("it divides by the unbiased variance (D - 1 instead of D)")
    if abs(slope / channels - 1) < TOLERANCE:
        return Miss("it divides by the length of the row, not by its root mean square")
    return Miss(f"it divides by {slope**0.5:.4g} times the root mean square")


def _probe(value: Value, axes: tuple[int, ...], like: Value | None = None) -> Array:
    """Random rows along the normalized axes, with mean squares from 1e-14 to 1e4.

    like: a gamma whose shape tells the number of channels where the value's own is unknown.
    """
    shape = value.shape or (None if like is None else like.shape) or (None,)
    static = {axis % len(shape) for axis in axes if -axis <= len(shape)}
    sizes = [size or 8 if place in static else 1 for place, size in enumerate(shape)]
    rows = next((place for place in range(len(sizes)) if place not in static), None)
    if rows is None:  # one row alone: its scales go to a leading axis
        sizes = [ROWS, *sizes]
        rows = 0
    else:
        sizes[rows] = ROWS
    random = np.random.default_rng(7)
    scales = np.logspace(-7, 2, ROWS).reshape([ROWS if p == rows else 1 for p in range(len(sizes))])
    return np.asarray((random.normal(size=sizes) + 0.3) * scales, np.float64)


def _apply(form: NormalForm, x: Array) -> Array:
    base = x - x.mean(axis=form.axes, keepdims=True) if form.centred else x
    return np.asarray(base / np.sqrt((base * base).mean(axis=form.axes, keepdims=True) + form.eps))


def _affine(y: Array, gamma: Value | None, beta: Value | None, leaves: _Leaves) -> Array:
    if gamma is not None:
        y = y * leaves.value(gamma)
    return y if beta is None else y + leaves.value(beta)


def _close(a: Array, b: Array) -> bool:
    if a.shape != b.shape or not np.all(np.isfinite(a)):
        return False
    scale = np.abs(b).max(axis=-1, keepdims=True)
    return bool(np.all(np.abs(a - b) <= 1e-5 * scale))


def _from_the_end(term: Term) -> tuple[int, ...] | None:
    axes: Sequence[int] = term.attributes["axes"]
    if all(axis < 0 for axis in axes):
        return tuple(axes)
    shape = next((v.shape for v in term.operands if v.shape is not None), None)
    if shape is None:
        return None
    return tuple(sorted(axis % len(shape) - len(shape) for axis in axes))


def _leaf(value: Value, number: int) -> object:
    if value.scalar is not None:
        return ("scalar", value.scalar)
    return ("leaf", number, value.shape)
