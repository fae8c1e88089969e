"""How a scale or a shift per channel moves through a graph, and which weights take it up.

Where every reader of a value is linear in it, gamma need not be multiplied nor beta added: the
weights behind can hold them, exactly. What is carried along is an array that broadcasts against
the value: reshaping, slicing and joining act on it as they act on the value, until a product with
a constant weight takes it up, or a reader stops it, whose name is the answer to a user's why.
"""

from __future__ import annotations

import enum
import heapq
import math
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from .constants import QUANTISED, is_fixed, is_quantised, readers
from .sites import NormSite
from .terms import SHAPE_READERS, Op, Term, Value
from .views import LARGEST, Array, Shape, viewed

__all__ = [
    "Array",
    "Kind",
    "Stop",
    "Uptake",
    "Weights",
    "against_weight",
    "cannot",
    "carried",
    "narrowed",
    "product",
    "ranked",
    "spoken",
    "takes_value",
    "with_folds",
]


OUTPUT = "the model's output"

SPOKEN = {
    "attention": ("attention", "Attention"),
    "activation": (
        "gelu", "silu", "relu", "sigmoid", "softmax", "tanh", "erf", "softplus", "Gelu", "Relu",
        "Sigmoid", "Softmax", "Tanh", "Erf", "Elu", "Swish", "Softplus", "glu",
    ),
    "transposed convolution": ("conv_transpose", "ConvTranspose"),
    "product with a weight for each expert": ("grouped_mm", "MoE"),
    "recurrence": ("lstm", "gru", "LSTM", "GRU", "RNN"),
}  # fmt: skip
"""What operators outside the vocabulary are called, by a part of their name."""

NORMS = {
    Op.LAYER_NORM: "LayerNorm", Op.RMS_NORM: "RMSNorm", Op.BATCH_NORM: "BatchNorm",
    Op.GROUP_NORM: "GroupNorm", Op.INSTANCE_NORM: "InstanceNorm", Op.DYT: "DyT",
}  # fmt: skip


class Kind(enum.Enum):
    """What is carried: a factor or a summand of the value, or a matrix over its channels.

    The value is what users know it by. Of a matrix, the array carried holds one number for each
    channel, all different: where they arrive whole and in order, the matrix can be multiplied.
    """

    SCALE = "γ"
    SHIFT = "β"
    MATRIX = "M"

    @property
    def neutral(self) -> float:
        """What leaves a value as it is."""
        return 0.0 if self is Kind.SHIFT else 1.0


class Weights(Protocol):
    """What is known of the constants of a graph."""

    def value(self, term: Term, place: int) -> Array:
        """A constant operand, by its place among the inputs of a term."""
        ...

    def product(self, uptake: Uptake) -> Array:
        """What a product with a weight makes of a summand that reaches it."""
        ...


@dataclass(frozen=True, eq=False)
class Uptake:
    """A term that takes up what was carried to the operand at `place`; array: there."""

    term: Term
    place: int
    array: Array


@dataclass(frozen=True)
class Stop:
    """What stops a scale or a shift.

    cause: a noun phrase with the reader's name; direct: whether it reads the value itself;
    tied: whether all that is wrong is the weight of a reader, which something else reads, too.
    """

    cause: str
    direct: bool = False
    tied: bool = False


def carried(
    value: Value,
    array: Array,
    kind: Kind,
    outputs: Mapping[str, Value],
    weights: Weights | None = None,
    removed: Container[Term] = frozenset(),
) -> tuple[Uptake, ...] | Stop:
    """Every term that takes up what `value` is multiplied by or added to, or what stops it.

    array: broadcasts against `value`. weights: without them numbers stand in, so that the answer
    needs none. removed: terms that have become identities.
    """
    walk = _Walk(kind, outputs, weights or _StandIns(), removed)
    return walk.run(value, array)


class _Walk:
    """One walk from a value to all of its readers, in execution order."""

    def __init__(
        self,
        kind: Kind,
        outputs: Mapping[str, Value],
        weights: Weights,
        removed: Container[Term],
    ) -> None:
        self.kind = kind
        self.weights = weights
        self.modulated = False
        self._outputs = {value: name for name, value in outputs.items()}
        self._removed = removed
        self.arrays: dict[Value, Array] = {}
        self._pending: list[tuple[float, int, Term]] = []
        self._seen: set[Term] = set()

    def run(self, value: Value, array: Array) -> tuple[Uptake, ...] | Stop:
        stop = self._carry(value, array)
        uptakes: list[Uptake] = []
        while self._pending and stop is None:
            term = heapq.heappop(self._pending)[2]
            found = self._pass(term)
            if isinstance(found, Uptake):
                uptakes.append(found)
            elif isinstance(found, np.ndarray):
                stop = self._carry(term.output, found)
            else:
                stop = Stop(found, direct=value in term.operands)
        if stop is None and self.kind is Kind.SCALE:  # a matrix gives the reader its own weight
            stop = _tied(uptakes)
        return tuple(uptakes) if stop is None else stop

    def _carry(self, value: Value, array: Array) -> Stop | None:
        """Take a value in, and its readers."""
        if value in self._outputs:
            return Stop(f"{OUTPUT} `{self._outputs[value]}`", direct=not self.arrays)
        if value.shape is None:
            return Stop(f"`{value.name}`, whose shape is unknown")
        if math.prod(array.shape[: max(0, array.ndim - len(value.shape))]) != 1:
            return Stop(f"`{value.name}`, which is said to have fewer axes than what is in it")
        self.arrays[value] = narrowed(ranked(array, len(value.shape)))
        for term in value.consumers:
            if term not in self._seen and takes_value(term):
                self._seen.add(term)
                heapq.heappush(self._pending, (term.index, len(self._seen), term))
        return None

    def _pass(self, term: Term) -> Array | Uptake | str:
        if term in self._removed:
            return self.arrays[next(v for v in term.operands if v in self.arrays)]
        if term.within:
            return f"{_named(term)} inside {term.within}"
        rule = _RULES.get(term.op)
        return spoken(term) if rule is None else rule(self, term)


Rule = Callable[[_Walk, Term], "Array | Uptake | str"]


def takes_value(term: Term) -> bool:
    """Whether a term reads more than the shape of its operands, and does so itself."""
    parts = term.op is Op.PARTS and not term.output.consumers
    return not parts and term.label not in SHAPE_READERS


# Moving along: what reshaping does to a value, it does to what is carried.


def _source(walk: _Walk, term: Term) -> Array | None:
    """What is carried to the first operand, None where another operand carries something."""
    first, *others = term.inputs
    if not isinstance(first, Value) or any(v in walk.arrays for v in others):
        return None
    return walk.arrays.get(first)


def _moving(move: Callable[[Array, Term], Array | None]) -> Rule:
    """A rule from what a term does to an array that broadcasts against its operand."""

    def rule(walk: _Walk, term: Term) -> Array | str:
        array = _source(walk, term)
        moved = None if array is None or term.output.shape is None else move(array, term)
        return spoken(term) if moved is None else moved

    return rule


def _cast(array: Array, term: Term) -> Array | None:
    return array if (term.output.dtype or "").startswith(("float", "bfloat")) else None


def _unsqueezed(array: Array, term: Term) -> Array:
    return np.expand_dims(array, term.attributes["axes"])


def _squeezed(array: Array, term: Term) -> Array:
    return np.squeeze(array, term.attributes["axes"])


def _reshaped(array: Array, term: Term) -> Array:
    sources: Shape = term.attributes["sources"]
    return array.reshape([1 if source is None else array.shape[source] for source in sources])


def _viewed(array: Array, term: Term) -> Array | None:
    before, after = term.operands[0].shape, term.output.shape
    return None if before is None or after is None else viewed(array, before, after)


def _transposed(array: Array, term: Term) -> Array:
    return np.transpose(array, term.attributes["order"])


def _sliced(array: Array, term: Term) -> Array | None:
    for axis, piece in term.attributes["slices"].items():
        if array.shape[axis] == 1:
            continue
        if piece is None:
            return None
        array = np.moveaxis(np.moveaxis(array, axis, 0)[piece], 0, axis)
    return array


def _gathered(array: Array, term: Term) -> Array | None:
    axis, consumed = term.attributes["axis"] % array.ndim, term.attributes["consumed"]
    index = term.inputs[1] if len(term.inputs) > 1 else None
    if isinstance(index, float) and array.shape[axis] > 1:
        return np.asarray(array.take(int(index), axis))
    if any(size != 1 for size in array.shape[axis : axis + consumed]):
        return None
    new = len(term.output.shape or ()) - (array.ndim - consumed)
    return np.reshape(array, (*array.shape[:axis], *(1,) * new, *array.shape[axis + consumed :]))


def _same_along(array: Array, term: Term) -> Array | None:
    """For terms that take elements along `axes` together or past each other."""
    return array if all(array.shape[axis] == 1 for axis in term.attributes["axes"]) else None


def _padded(walk: _Walk, term: Term) -> Array | str:
    array = _source(walk, term)
    if array is None or _same_along(array, term) is None:
        return spoken(term)
    if walk.kind is Kind.SHIFT and term.attributes["axes"]:
        return f"the zero padding of {_named(term)}"
    return array


def _reduced(walk: _Walk, term: Term) -> Array | str:
    array, axes = _source(walk, term), term.attributes["axes"]
    if array is None or (walk.kind is not Kind.SHIFT and _same_along(array, term) is None):
        return f"the {term.op.name.lower()} over channels {_named(term)}"
    shape = term.operands[0].shape or ()
    sizes = [shape[axis] for axis in axes]
    if walk.kind is Kind.SHIFT:
        if term.op is Op.SUM and None in sizes:
            return f"the sum {_named(term)} over an axis of unknown length"
        folded = array.mean(axis=axes, keepdims=True)
        array = folded * math.prod(s or 1 for s in sizes) if term.op is Op.SUM else folded
    return array if term.attributes["keepdims"] else np.squeeze(array, axes)


def _concatenated(walk: _Walk, term: Term) -> Array | str:
    axis, rank = term.attributes["axis"], len(term.output.shape or ())
    neutral = np.full((1,) * rank, walk.kind.neutral)
    parts = [walk.arrays.get(v, neutral) for v in term.operands]
    if all(part.shape[axis] == 1 and np.array_equal(part, parts[0]) for part in parts):
        return parts[0]
    pieces = []
    for value, part in zip(term.operands, parts, strict=True):
        length = None if value.shape is None else value.shape[axis]
        if length is None:
            return f"the concatenation {_named(term)} along an axis of unknown length"
        shape = list(part.shape)
        shape[axis] = length
        pieces.append(np.moveaxis(np.broadcast_to(part, shape), axis, 0))
    others = np.broadcast_shapes(*(piece.shape[1:] for piece in pieces))
    if math.prod(others) * sum(len(piece) for piece in pieces) > LARGEST:
        return spoken(term)
    full = [np.broadcast_to(piece, (len(piece), *others)) for piece in pieces]
    return np.moveaxis(np.concatenate(full), 0, axis)


# Arithmetic: where a factor and a summand part ways.


def _product(walk: _Walk, term: Term) -> Array | str:
    """x * c and x / c; a factor passes whatever c is, a summand becomes a multiple of it."""
    places = [place for place, v in enumerate(term.inputs) if v in walk.arrays]
    if len(places) != 1 or (term.op is Op.DIV and places != [0]):
        return spoken(term)
    (place,) = places
    array = walk.arrays[term.inputs[place]]  # type: ignore[index]
    other = term.inputs[1 - place]
    by_activation = other is not None and not is_fixed(other)
    if walk.kind is Kind.MATRIX and not _one_number(other, array):
        return f"the product for each channel {_named(term)}"
    if walk.kind is not Kind.SHIFT:
        walk.modulated |= by_activation
        return array
    if by_activation:
        return f"the multiplication by another activation {_named(term)}"
    factor = walk.weights.value(term, 1 - place)
    return np.asarray(array * factor if term.op is Op.MUL else array / factor)


def _one_number(other: Value | float | None, array: Array) -> bool:
    """Whether a factor is the same along every axis on which the array differs."""
    if not isinstance(other, Value):
        return True
    shape = other.shape
    return shape is not None and all(
        size == 1 or axis < -len(shape) or shape[axis] == 1
        for axis, size in enumerate(array.shape, -array.ndim)
    )


def _negated(walk: _Walk, term: Term) -> Array:
    array = walk.arrays[term.operands[0]]
    return -array if walk.kind is Kind.SHIFT else array


def _sum(walk: _Walk, term: Term) -> Array | Uptake | str:
    """a + b and a - b."""
    places = [place for place, v in enumerate(term.inputs) if v in walk.arrays]
    arrays = [walk.arrays[term.inputs[place]] for place in places]  # type: ignore[index]
    if walk.kind is not Kind.SHIFT:
        whole = len(arrays) == 2 and np.array_equal(arrays[0], arrays[1])
        if whole or (len(arrays) == 1 and (arrays[0] == 1).all()):
            return arrays[0]
        return _added(walk, term, arrays)
    signed = [
        -a if term.op is Op.SUB and p == 1 else a for p, a in zip(places, arrays, strict=True)
    ]
    if len(signed) == 2:
        return np.asarray(signed[0] + signed[1])
    other = term.inputs[1 - places[0]]
    if other is not None and not is_fixed(other):
        return _added(walk, term, arrays)
    takes = term.op is Op.ADD and isinstance(other, Value) and readers(other) == {term}
    return Uptake(term, places[0], signed[0]) if takes else signed[0]


def _added(walk: _Walk, term: Term, arrays: Sequence[Array]) -> str:
    if len(arrays) == 2:
        return f"the sum {_named(term)} of parts that differ in it (as in a rotary embedding)"
    if any(not isinstance(v, Value) or v.constant for v in term.inputs):
        return f"the addition of a constant {_named(term)}"
    alike = len({v.shape for v in term.operands}) == 1
    residual = alike and not walk.modulated
    kind = "residual add" if residual else "addition of another activation"
    return f"the {kind} {_named(term)}"


# Weights: where the carried array is taken up.


def _matmul(walk: _Walk, term: Term) -> Array | Uptake | str:
    places = [place for place in (0, 1) if term.inputs[place] in walk.arrays]
    if len(places) != 1 or not _is_weight(term.inputs[1 - places[0]]):
        return f"the product with another activation {_named(term)}"
    (place,) = places
    uptake = Uptake(term, place, walk.arrays[term.inputs[place]])  # type: ignore[index]
    return _taken(walk, uptake)


def _convolution(walk: _Walk, term: Term) -> Array | Uptake | str:
    if term.inputs[0] not in walk.arrays or not _is_weight(term.inputs[1]):
        return f"the product with another activation {_named(term)}"
    if walk.kind is Kind.SHIFT and term.attributes["padded"]:
        return f"the zero padding of {_named(term)}"
    return _taken(walk, Uptake(term, 0, walk.arrays[term.inputs[0]]))


def _taken(walk: _Walk, uptake: Uptake) -> Array | Uptake | str:
    term = uptake.term
    weight, bias = term.inputs[1 - uptake.place], term.inputs[2]
    if not isinstance(weight, Value) or is_quantised(weight):
        return f"the quantised weight of {_named(term)}"
    if weight.shape is None or against_weight(uptake, weight.shape) is None:
        return f"{_named(term)}, whose weight does not tell its channels apart"
    if walk.kind is not Kind.SHIFT or term.op is Op.CONVOLUTION:
        return uptake
    if bias is not None:
        if _is_weight(bias):
            return uptake
        return f"the addition of another activation {_named(term)}"
    return _beyond(walk, uptake)


def _beyond(walk: _Walk, uptake: Uptake) -> Array | Uptake:
    """What a product without bias makes of a summand, if an Add of a constant follows it."""
    term = uptake.term
    follows = term.output.consumers
    if len(follows) != 1 or follows[0].op is not Op.ADD:
        return uptake
    others = [v for v in follows[0].inputs if v is not term.output]
    if not all(isinstance(v, Value) and v.constant and readers(v) == {follows[0]} for v in others):
        return uptake
    return walk.weights.product(uptake)


def product(uptake: Uptake, weight: Array) -> Array:
    """What a product with `weight` makes of the summand that reaches it.

    It broadcasts against the term's output.
    """
    term, array = uptake.term, uptake.array
    if term.op is Op.CONVOLUTION:
        factor = against_weight(uptake, weight.shape)
        scaled = weight if factor is None else weight * factor
        summed = scaled.sum(axis=tuple(range(1, weight.ndim)))
        return np.asarray(summed.reshape(-1, *(1,) * (weight.ndim - 2)))
    if term.attributes["transposed"]:
        weight = weight.swapaxes(-1, -2)
    if uptake.place == 0:
        full = np.broadcast_to(array, (*array.shape[:-1], weight.shape[-2]))
        return np.asarray(full @ weight)
    full = np.broadcast_to(array, (*array.shape[:-2], weight.shape[-1], array.shape[-1]))
    return np.asarray(weight @ full)


def against_weight(uptake: Uptake, shape: Shape) -> Array | None:
    """The carried array as a factor of the weight, of the given shape, that takes it up.

    None where it differs along an axis that the weight does not have.
    """
    term, array = uptake.term, uptake.array
    if term.op is Op.CONVOLUTION:
        return _against_kernel(array, shape, term.attributes["groups"])
    # x @ W adds over the last axis of x, W @ x over the one before.
    transposed = term.attributes["transposed"]
    array = array.reshape(1, -1) if array.ndim == 1 else array
    if len(shape) < 2 or (uptake.place == 1 and transposed):
        return None
    factor = array if transposed else array.swapaxes(-1, -2)
    extra = max(factor.ndim - len(shape), 0)
    if any(size != 1 for size in factor.shape[:extra]):
        return None
    factor = factor.reshape(factor.shape[extra:])
    free = -2 if transposed or uptake.place == 1 else -1
    if factor.shape[free] != 1:
        return None
    fits = np.broadcast_shapes(factor.shape, tuple(size or 0 for size in shape))
    return factor if fits == tuple(shape) else None


def _against_kernel(array: Array, shape: Shape, groups: int) -> Array | None:
    channel = 1 - len(shape)
    if any(size != 1 for axis, size in enumerate(array.shape, -array.ndim) if axis != channel):
        return None
    if array.size == 1:
        return array.reshape((1,) * len(shape))
    out, inner = shape[:2]
    if out is None or inner is None:
        return None
    by_group = array.reshape(groups, inner)
    return np.repeat(by_group, out // groups, axis=0).reshape(out, inner, *(1,) * (len(shape) - 2))


def _is_weight(operand: Value | float | None) -> bool:
    return isinstance(operand, Value) and is_fixed(operand)


class _StandIns:
    """Numbers all different in place of constants whose values do not matter."""

    def value(self, term: Term, place: int) -> Array:
        operand = term.inputs[place]
        if not isinstance(operand, Value):
            return np.asarray(1.0 if operand is None else operand)
        return self._numbers(1 if size is None else size for size in operand.shape or ())

    def product(self, uptake: Uptake) -> Array:
        weight = uptake.term.inputs[1 - uptake.place]
        rows, columns = (weight.shape or (1, 1))[-2:] if isinstance(weight, Value) else (1, 1)
        if uptake.place == 1:
            return self._numbers((rows or 1, 1))
        return self._numbers((rows if uptake.term.attributes["transposed"] else columns or 1,))

    def _numbers(self, shape: Iterable[int | None]) -> Array:
        sizes = [size or 1 for size in shape]
        return np.random.default_rng(0).uniform(0.5, 1.5, sizes)


def _tied(uptakes: Sequence[Uptake]) -> Stop | None:
    """A stop where a weight that would be scaled is read by something else."""
    terms = {uptake.term for uptake in uptakes}
    for uptake in uptakes:
        weight = uptake.term.inputs[1 - uptake.place]
        others = readers(weight) - terms if isinstance(weight, Value) else set()
        if others:
            other = min(others, key=lambda term: term.index)
            cause = f"the weight of {_named(uptake.term)}, which is tied with {_named(other)}"
            return Stop(cause, tied=True)
    return None


# In words.


def _named(term: Term) -> str:
    return f"`{term.output.name}`"


def spoken(term: Term) -> str:
    """What a term is, in a user's words, and its name in the graph."""
    if term.op in NORMS:
        return f"the {NORMS[term.op]} {_named(term)}"
    if any(part in term.label for part in QUANTISED):
        return f"the quantised operator {_named(term)} ({term.label})"
    for spoken, parts in SPOKEN.items():
        if any(part in term.label for part in parts):
            return f"the {spoken} {_named(term)}"
    return f"{_named(term)} ({term.label})"


def with_folds(site: NormSite, outputs: Mapping[str, Value]) -> NormSite:
    """The site, with what its readers can take up and what stops the rest."""
    if site.channels is None or site.output.shape is None:
        return replace(site, folds=(), unfolded="its number of channels is unknown")
    names = {Kind.SCALE: "gamma", Kind.SHIFT: "beta"}
    kinds = [kind for kind in names if not site.kind.lossless or names[kind] in site.affine]
    # Numbers all different, so that no scale is taken for the same at two places.
    array = np.random.default_rng(0).uniform(0.5, 1.5, site.parameter_shape)
    found = {kind: carried(site.output, array, kind, outputs) for kind in kinds}
    stops = {kind: stop for kind, stop in found.items() if isinstance(stop, Stop)}
    folds = tuple(names[kind] for kind in kinds if kind not in stops)
    return replace(site, folds=folds, unfolded=_told(stops, site.output))


def _told(stops: Mapping[Kind, Stop], value: Value) -> str:
    """Why not, in one sentence; what stops both is said once."""
    gamma, beta = stops.get(Kind.SCALE), stops.get(Kind.SHIFT)
    if gamma is None or gamma != beta:
        return "; ".join(f"{kind.value} {cannot(stop)}" for kind, stop in stops.items())
    if not gamma.direct:
        return f"γ and β {cannot(gamma)}"
    output = gamma.cause.startswith(OUTPUT)
    also = "also " if len(value.consumers) + output > 1 else ""
    return f"it is {also}{gamma.cause}" if output else f"{also}read by {gamma.cause}"


def cannot(stop: Stop) -> str:
    """What a sentence about what was stopped goes on with."""
    if stop.cause.startswith(OUTPUT):
        return f"reaches {stop.cause}"
    return f"cannot {'fold into' if stop.tied else 'pass'} {stop.cause}"


def ranked(array: Array, rank: int) -> Array:
    """The array with as many axes as its value has."""
    extra = array.ndim - rank
    if extra > 0:
        return array.reshape(array.shape[extra:])
    return array.reshape((1,) * -extra + array.shape)


def narrowed(array: Array) -> Array:
    """The array with length 1 along every axis on which it does not differ."""
    for axis, size in enumerate(array.shape):
        if size > 1:
            first = array.take([0], axis)
            array = first if (array == first).all() else array
    return array


_RULES: dict[Op, Rule] = {
    Op.CAST: _moving(_cast),
    Op.EXPAND: _moving(lambda array, term: array),
    Op.UNSQUEEZE: _moving(_unsqueezed),
    Op.SQUEEZE: _moving(_squeezed),
    Op.RESHAPE: _moving(_reshaped),
    Op.VIEW: _moving(_viewed),
    Op.TRANSPOSE: _moving(_transposed),
    Op.SLICE: _moving(_sliced),
    Op.GATHER: _moving(_gathered),
    Op.ROLL: _moving(_same_along),
    Op.PAD: _padded,
    Op.MEAN: _reduced,
    Op.SUM: _reduced,
    Op.CONCAT: _concatenated,
    Op.MUL: _product,
    Op.DIV: _product,
    Op.NEG: _negated,
    Op.ADD: _sum,
    Op.SUB: _sum,
    Op.MATMUL: _matmul,
    Op.CONVOLUTION: _convolution,
}
