"""What a piece of a graph computes, found by running it: one prover for every world and spelling.

The piece is interpreted in float64 on random rows, some of them as small as eps, with random
parameters. Beta is what the results for x and -x have in common. With it taken off and gamma
divided out, the piece is a norm if (x / y)^2 is a straight line in the row's mean of squares,

    (x / y)^2 = slope * mean(x^2) + intercept,

with slope 1 and intercept eps; x is first centred for LayerNorm. Any other slope, a bend, or an
element-wise part is named as what it is: unbiased variance, eps outside the root, row lengths.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from . import dyt
from .terms import Op, Term, Value, interpret

__all__ = ["Miss", "NormalForm", "Piece", "Proof", "Prover"]

Array = npt.NDArray[np.float64]

ROWS = 12
TOLERANCE = 1e-7
"""Relative; float64 leaves about 1e-9 after E[x^2] - E[x]^2 on the rows used here."""

LARGEST_CLAMP = 0.008
"""Some norms divide by max(rms, clamp) in place of an eps. The largest known clamp is bfloat16's
machine epsilon, 0.0078; activations that matter are not smaller."""

LARGEST_PROBE = 1 << 19
"""Elements; views of larger values are not followed, so that no proof takes long."""

LARGEST_PIECE, LARGEST_AXIS = 1 << 24, 1 << 18
"""Elements that a piece is run on, and those of the axis that it normalizes: a file may say that
there are more, and a proof would take as long."""

NO_NORM = "its result is not its input divided by one number a row"

ROW_SIZES = (4, 3, 5, 2, 7)
"""Lengths that probes give to axes other than the normalized one: all different, so that a
statistic along one of them is not taken for a statistic along another."""


@dataclass(frozen=True)
class NormalForm:
    """(x - mean(x) if centred else x) / sqrt(mean(square of that) + eps), over `axes`."""

    centred: bool
    axes: tuple[int, ...]
    eps: float


@dataclass(frozen=True)
class Miss:
    """Why a piece is no norm, in one sentence; `near` if it is a normalization of some kind."""

    reason: str
    near: bool = True


@dataclass(frozen=True)
class Proof:
    """A piece equals gamma * form(x) + beta; places of gamma and beta among its constants.

    What they name may also divide, be subtracted, or be added before gamma multiplies.
    """

    form: NormalForm
    gamma: int | None
    beta: int | None


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
        return found.pop() if len(found) == 1 and not self.moves() else None

    def moves(self) -> bool:
        """Whether an axis may have several places in it."""
        return any(term.op in (Op.TRANSPOSE, Op.VIEW) for term in self.terms)

    def constants(self) -> tuple[Value, ...]:
        """The constants that it reads, known scalars left out, in the order of their first use."""
        own = {self.input, *(term.output for term in self.terms)}
        read = dict.fromkeys(value for term in self.terms for value in term.operands)
        return tuple(v for v in read if v.constant and v.scalar is None and v not in own)

    def signature(self) -> tuple[object, ...]:
        """Equal for pieces that compute the same function of their input and constants."""
        numbers: dict[Value, int] = {self.input: 0}
        lines: list[object] = [self.input.shape, self.output.shape]
        for value in self.constants():
            numbers[value] = len(numbers)
            lines.append(value.shape)
        for term in self.terms:
            operands = tuple(
                ("value", numbers[v])
                if isinstance(v, Value) and v in numbers
                else ("number", v.scalar if isinstance(v, Value) else v)
                for v in term.inputs
            )
            numbers[term.output] = len(numbers)
            lines.append((term.op, operands, tuple(sorted(map(str, term.attributes.items())))))
        return tuple(lines)


class Prover:
    """Identifies pieces; equal structures share one proof."""

    def __init__(self) -> None:
        self._known: dict[tuple[object, ...], Proof | Miss] = {}

    def identify(self, piece: Piece) -> Proof | Miss:
        """What norm the piece is, with which of its constants as gamma and beta, or why none."""
        key = piece.signature()
        if key not in self._known:
            self._known[key] = _identify(piece)
        return self._known[key]

    def holds_dyt(self, piece: Piece, parameters: Mapping[str, Value], squash: str) -> bool:
        """Whether the piece equals DyT or Derf of its input, on random input and parameters."""
        axes = (-1,)
        read = dict.fromkeys((*piece.constants(), *parameters.values()))
        if _too_large(piece, axes, tuple(read)):
            return False
        x = _probe(piece, axes, tuple(read))
        constants = {v: _random(v, seed, _most(piece, x)) for seed, v in enumerate(read)}
        values = {name: constants[value] for name, value in parameters.items()}
        y = _run(piece, x, constants)
        return y is not None and _close(
            y, dyt.evaluate(dyt.DytParameters(squash=squash, **values), x)
        )


def _identify(piece: Piece) -> Proof | Miss:
    axes = piece.axes()
    if axes is not None:
        return _identify_over(piece, axes)
    missed = Miss("its reductions run over different or unknown axes", near=False)
    if piece.moves():
        for axis in range(-len(piece.input.shape or ()), 0):
            found = _identify_over(piece, (axis,))
            if isinstance(found, Proof):
                return found
    return missed


def _identify_over(piece: Piece, axes: tuple[int, ...]) -> Proof | Miss:
    constants = piece.constants()
    if len(axes) != 1:
        return Miss(f"it normalizes over {len(axes)} axes together, DyT has one per channel")
    rank = None if piece.input.shape is None else len(piece.input.shape)
    if rank is not None and rank > 1 and axes[0] == -rank:
        return Miss("it normalizes over the first axis, which counts the samples", near=False)
    if not _same_shape(piece.input, piece.output):
        return Miss("its result has another shape than its input", near=False)
    if _too_large(piece, axes, constants):
        return Miss(f"it is over more than {LARGEST_AXIS} elements, which is too much to prove")
    x = _probe(piece, axes, constants)
    values = {v: _random(v, seed, _most(piece, x)) for seed, v in enumerate(constants)}
    y = _run(piece, x, values)
    if y is None or y.shape != x.shape:
        return Miss("its result has another shape than its input", near=False)
    if not np.all(np.isfinite(y)):
        return Miss("it is not finite on ordinary input", near=False)
    mirrored = _run(piece, -x, values)
    if mirrored is None:
        return Miss("its result has another shape than its input", near=False)
    scaled, shift = (y - mirrored) / 2, (y + mirrored) / 2  # norms are odd: beta is what is even
    best = Miss(NO_NORM, near=False)
    for gamma, beta in _roles(constants):
        given = None if beta is None else values[constants[beta]]
        for factor in _factors(None if gamma is None else values[constants[gamma]]):
            bare = scaled / factor
            found = _normal_form(x, bare, axes) if bare.shape == x.shape else best
            if isinstance(found, NormalForm) and _shifts(given, factor, shift, y):
                return Proof(found, gamma, beta)
            if isinstance(found, Miss) and found.near and not best.near:
                best = found
    return best


def _roles(constants: Sequence[Value]) -> Iterator[tuple[int | None, int | None]]:
    """Every way in which all constants are gamma or beta: none may be left without a role."""
    places = range(len(constants))
    if not constants:
        yield None, None
    elif len(constants) == 1:
        yield 0, None
        yield None, 0
    elif len(constants) == 2:
        yield from ((gamma, 1 - gamma) for gamma in places)


def _factors(gamma: Array | None) -> tuple[Array, ...]:
    """What a norm may be multiplied by: gamma, or one over it."""
    return (np.ones(()),) if gamma is None else (gamma, 1 / gamma)


def _shifts(beta: Array | None, factor: Array, shift: Array, y: Array) -> bool:
    """Whether `shift` is beta, added or subtracted, before gamma or behind it; or zero."""
    allowed = TOLERANCE * np.abs(y).max()
    if beta is None:
        return bool(np.all(np.abs(shift) <= allowed))
    return any(
        bool(np.all(np.abs(shift - added) <= allowed))
        for added in (beta, -beta, beta * factor, -beta * factor)
    )


def _normal_form(x: Array, y: Array, axes: tuple[int, ...]) -> NormalForm | Miss:
    centred = x - x.mean(axis=axes, keepdims=True)
    for base, other in ((centred, x), (x, centred)):
        inverse = _inverse_square(base, y, axes)
        if inverse is not None:
            return _read(inverse, base, other, axes, is_centred=base is centred)
    return Miss(NO_NORM, near=False)


def _inverse_square(base: Array, y: Array, axes: tuple[int, ...]) -> Array | None:
    """(base / y)^2 of each row, None where y is not base times one positive number a row."""
    ratio = np.sum(y * base, axis=axes) / np.sum(base * base, axis=axes)
    residue = np.abs(y - np.expand_dims(ratio, axes) * base)
    if np.any(ratio <= 0) or np.any(residue > TOLERANCE * np.abs(y).max(axis=axes, keepdims=True)):
        return None
    return np.asarray(1.0 / ratio.ravel() ** 2)


def _read(
    inverse: Array, base: Array, other: Array, axes: tuple[int, ...], *, is_centred: bool
) -> NormalForm | Miss:
    squares = (base * base).mean(axis=axes).ravel()
    line = _line(squares, inverse)
    if line is not None:
        return _judge(*line, is_centred, axes, base.shape[axes[0]])
    clamp = _clamp(squares, inverse)
    if clamp is not None:
        slope, least = clamp
        if least > LARGEST_CLAMP:
            return Miss(f"it divides by {least:.3g} at least: smaller rows keep their size")
        return _judge(slope, 0.0, is_centred, axes, base.shape[axes[0]])
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


def _clamp(squares: Array, inverse: Array) -> tuple[float, float] | None:
    """Slope, and the least root mean square, of rows that are divided by at least so much."""
    largest = int(squares.argmax())
    slope, floor = inverse[largest] / squares[largest], inverse.min()
    if np.any(np.abs(np.maximum(slope * squares, floor) - inverse) > TOLERANCE * inverse):
        return None
    return float(slope), float((floor / slope) ** 0.5)


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


def _run(piece: Piece, x: Array, constants: Mapping[Value, Array]) -> Array | None:
    """The value of a piece, None where its shapes do not fit together on this input."""
    values: dict[Value, Array] = {**constants, piece.input: x}
    try:
        with np.errstate(all="ignore"):
            for term in piece.terms:
                values[term.output] = interpret(term, [_given(v, values) for v in term.inputs])
    except (ValueError, IndexError, OverflowError, MemoryError):
        return None  # NumPy's, for operands that do not broadcast, and for axes out of all bounds
    return np.asarray(values[piece.output], np.float64)


def _given(value: Value | float | None, values: Mapping[Value, Array]) -> Array | float | None:
    if not isinstance(value, Value):
        return value
    if value in values or value.scalar is None:
        return values[value]
    return np.asarray(value.scalar, np.float64)


def _most(piece: Piece, x: Array) -> tuple[int, ...]:
    """How long a constant is taken along each axis: as a probe, where every axis has one place."""
    return () if piece.moves() else x.shape


def _random(value: Value, seed: int, most: Sequence[int]) -> Array:
    """A random constant of the value's shape, cut to `most`; a dynamic axis has length 1."""
    shape = [size or 1 for size in value.shape or ()]
    for place in range(-min(len(shape), len(most)), 0):
        shape[place] = min(shape[place], most[place])
    return np.random.default_rng(seed).uniform(0.5, 1.5, shape)


def _probe(piece: Piece, axes: tuple[int, ...], constants: Sequence[Value]) -> Array:
    """Random rows along the normalized axis, with mean squares from 1e-14 to 1e4.

    Other axes have small lengths: no longer than a constant that varies along them, their own where
    a view puts them together with others, and as long as the constant where axes change places.
    """
    shape = piece.input.shape or max(
        (value.shape for value in constants if value.shape), key=len, default=(None,)
    )
    viewed = any(term.op is Op.VIEW for term in piece.terms) and _size(shape) <= LARGEST_PROBE
    sizes: list[int] = []
    for place in range(-len(shape), 0):
        held = next((n for n in (_length(v, place) for v in constants) if n > 1), None)
        if place in axes:
            sizes.append(shape[place] or held or 8)
        elif shape[place] == 1:
            sizes.append(1)
        elif viewed and (size := shape[place]) is not None:
            sizes.append(size)
        else:
            short = ROW_SIZES[-1 - place] if -place <= len(ROW_SIZES) else 2
            sizes.append(min(held, short) if held and not piece.moves() else held or short)
    places = range(-len(sizes), 0)
    if all(place in axes or sizes[place] == 1 for place in places):
        # One row alone is no line: its scales go to the first axis, or to one before it.
        sizes = [ROWS, *sizes] if len(sizes) == len(axes) else [ROWS, *sizes[1:]]
    random = np.random.default_rng(7)
    per_row = [1 if place in axes else sizes[place] for place in range(-len(sizes), 0)]
    scales = random.permutation(np.logspace(-7, 2, int(np.prod(per_row)))).reshape(per_row)
    return np.asarray((random.normal(size=sizes) + 0.3) * scales, np.float64)


def _too_large(piece: Piece, axes: tuple[int, ...], constants: Sequence[Value]) -> bool:
    """Whether the piece takes too much memory to be run."""
    rank = max(len(value.shape or ()) for value in (*constants, piece.input))
    largest = (
        max(_length(v, place) for v in (*constants, *[piece.input] * (place in axes)))
        for place in range(-rank, 0)
        if constants or place in axes
    )
    lengths = [_length(value, axis) for value in (*constants, piece.input) for axis in axes]
    return math.prod(largest) > LARGEST_PIECE or max(lengths) > LARGEST_AXIS


def _size(shape: Sequence[int | None]) -> int:
    return math.prod(size or 1 for size in shape)


def _length(value: Value, place: int) -> int:
    shape = value.shape or ()
    return (shape[place] or 1) if -place <= len(shape) else 1


def _same_shape(a: Value, b: Value) -> bool:
    return a.shape is None or b.shape is None or a.shape == b.shape


def _close(a: Array, b: Array) -> bool:
    if a.shape != b.shape or not np.all(np.isfinite(a)):
        return False
    scale = np.abs(b).max(axis=-1, keepdims=True)
    return bool(np.all(np.abs(a - b) <= 1e-9 * scale))


def _from_the_end(term: Term) -> tuple[int, ...] | None:
    """The axes of a reduction counted from the end, without those of length 1."""
    axes: Sequence[int] = term.attributes["axes"]
    shape = term.operands[0].shape
    if shape is None:
        return tuple(axes) if all(axis < 0 for axis in axes) else None
    places = sorted(axis % len(shape) - len(shape) for axis in axes)
    return tuple(place for place in places if shape[place] != 1) or tuple(places)
