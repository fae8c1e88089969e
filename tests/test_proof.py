"""The prover: what it identifies is what was written, for any eps and size; and it can fail."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dyt_compile.proof import Miss, NormalForm, Piece, Proof, Prover
from dyt_compile.terms import Op, Term, Value, interpret

pytestmark = pytest.mark.core

CHANNELS = 10
EPS = 1e-5


class Writer:
    """Writes a piece term by term, over an input of shape (2, 3, channels)."""

    def __init__(self, channels: int = CHANNELS, shape: tuple[int | None, ...] | None = None):
        self.shape = shape or (2, 3, channels)
        self.channels = channels
        self.x = Value("x", "x", self.shape, "float32")
        self.terms: list[Term] = []

    def __call__(self, op: Op, *inputs: Value | float, **attributes: object) -> Value:
        narrow = op in (Op.MEAN, Op.SUM, Op.VARIANCE, Op.LENGTH)
        shape = (*self.shape[:-1], 1) if narrow else self.shape
        value = Value(len(self.terms), f"value_{len(self.terms)}", shape, "float32")
        if narrow:
            attributes = {"axes": (-1,), "keepdims": True, **attributes}
        place = len(self.terms)
        term = Term(op, inputs, value, attributes, index=place, scope="", label=op.name)
        self.terms.append(term)
        return value

    def parameter(self, name: str, shape: tuple[int, ...] | None = None) -> Value:
        shape = (self.channels,) if shape is None else shape
        return Value(name, name, shape, "float32", constant=True, parameter=True)

    def piece(self, output: Value) -> Piece:
        return Piece(self.x, output, tuple(self.terms))


def rms(write: Writer, x: Value, eps: float) -> Value:
    squares = write(Op.MEAN, write(Op.SQUARE, x))
    return write(Op.MUL, x, write(Op.RSQRT, write(Op.ADD, squares, eps)))


def centred(write: Writer) -> Value:
    return write(Op.SUB, write.x, write(Op.MEAN, write.x))


def layer(write: Writer, eps: float, correction: float = 0.0) -> Value:
    variance = write(Op.VARIANCE, write.x, correction=correction)
    return write(Op.DIV, centred(write), write(Op.SQRT, write(Op.ADD, variance, eps)))


def two_moments(write: Writer, eps: float) -> Value:
    mean = write(Op.MEAN, write.x)
    squares = write(Op.MEAN, write(Op.MUL, write.x, write.x))
    variance = write(Op.SUB, squares, write(Op.MUL, mean, mean))
    inverse = write(Op.RSQRT, write(Op.ADD, variance, eps))
    return write(Op.MUL, write(Op.SUB, write.x, mean), inverse)


def summed(write: Writer, eps: float) -> Value:
    squares = write(Op.SUM, write(Op.SQUARE, write.x))
    mean = write(Op.DIV, squares, float(write.channels))
    return write(Op.MUL, write.x, write(Op.POW, write(Op.ADD, mean, eps), -0.5))


def identified(piece: Piece) -> NormalForm | Miss:
    """The normal form alone; what is gamma and what is beta has tests of its own."""
    found = Prover().identify(piece)
    return found.form if isinstance(found, Proof) else found


SPELLINGS: dict[str, tuple[Callable[[Writer, float], Value], bool]] = {
    "rms": (lambda write, eps: rms(write, write.x, eps), False),
    "rms_of_centred": (lambda write, eps: rms(write, centred(write), eps), True),
    "variance": (layer, True),
    "two_moments": (two_moments, True),
    "summed": (summed, False),
    "whole_layer_norm": (
        lambda write, eps: write(Op.LAYER_NORM, write.x, axes=(-1,), eps=eps),
        True,
    ),
    "whole_rms_norm": (
        lambda write, eps: write(Op.RMS_NORM, write.x, axes=(-1,), eps=eps),
        False,
    ),
}

any_eps = st.floats(min_value=1e-12, max_value=1.0)
any_channels = st.integers(min_value=2, max_value=300)


@pytest.mark.parametrize("name", SPELLINGS)
@given(eps=any_eps, channels=any_channels)
@settings(max_examples=30, deadline=None, derandomize=True)
def test_any_eps_and_size_are_read_back(name: str, eps: float, channels: int) -> None:
    spell, is_centred = SPELLINGS[name]
    write = Writer(channels)
    form = identified(write.piece(spell(write, eps)))
    assert isinstance(form, NormalForm), form
    assert form.centred is is_centred
    assert form.axes == (-1,)
    assert form.eps == pytest.approx(eps, rel=1e-4)


@pytest.mark.parametrize("name", SPELLINGS)
def test_no_eps_is_read_as_zero(name: str) -> None:
    spell, _ = SPELLINGS[name]
    write = Writer()
    form = identified(write.piece(spell(write, 0.0)))
    assert isinstance(form, NormalForm)
    assert form.eps == 0.0


@pytest.mark.parametrize("shape", [(2, 3, CHANNELS), (None, None, CHANNELS), (CHANNELS,)])
def test_dynamic_axes_and_lone_rows_are_probed(shape: tuple[int | None, ...]) -> None:
    write = Writer(shape=shape)
    form = identified(write.piece(layer(write, EPS)))
    assert form == NormalForm(centred=True, axes=(-1,), eps=EPS)


def scaled(write: Writer, factor: float) -> Value:
    return write(Op.MUL, rms(write, write.x, EPS), factor)


@given(factor=st.floats(min_value=0.01, max_value=100.0).filter(lambda f: abs(f - 1) > 1e-6))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_any_other_scale_is_a_miss(factor: float) -> None:
    write = Writer()
    assert isinstance(identified(write.piece(scaled(write, factor))), Miss)


@given(scale=st.floats(min_value=0.05, max_value=20.0), eps=st.floats(1e-8, 1e-3))
@settings(max_examples=40, deadline=None, derandomize=True)
def test_scale_before_the_norm_is_read_as_another_eps(scale: float, eps: float) -> None:
    write = Writer()
    form = identified(write.piece(rms(write, write(Op.MUL, write.x, scale), eps)))
    assert isinstance(form, NormalForm)
    assert form.eps == pytest.approx(eps / scale**2, rel=1e-4)


@given(eps=any_eps, channels=any_channels, correction=st.sampled_from([1.0, -1.0, 0.5]))
@settings(max_examples=40, deadline=None, derandomize=True)
def test_any_corrected_variance_is_a_miss(eps: float, channels: int, correction: float) -> None:
    write = Writer(channels)
    form = identified(write.piece(layer(write, eps, correction)))
    assert isinstance(form, Miss)
    assert ("unbiased" in form.reason) == (correction == 1.0)


def outside(write: Writer) -> Value:
    root = write(Op.SQRT, write(Op.MEAN, write(Op.SQUARE, write.x)))
    return write(Op.DIV, write.x, write(Op.ADD, root, 1e-3))


def by_length(write: Writer) -> Value:
    return write(Op.DIV, write.x, write(Op.LENGTH, write.x))


def mean_alone(write: Writer) -> Value:
    root = write(Op.SQRT, write(Op.MEAN, write(Op.SQUARE, write.x)))
    return write(Op.DIV, centred(write), root)


def deviation_alone(write: Writer) -> Value:
    return write(Op.DIV, write.x, write(Op.SQRT, write(Op.VARIANCE, write.x, correction=0.0)))


def bent(write: Writer) -> Value:
    squares = write(Op.ADD, write(Op.MEAN, write(Op.SQUARE, write.x)), EPS)
    return write(Op.MUL, write.x, write(Op.POW, squares, -0.4))


def elementwise(write: Writer) -> Value:
    return write(Op.TANH, rms(write, write.x, EPS))


def clamped(write: Writer) -> Value:
    squares = write(Op.MAXIMUM, write(Op.MEAN, write(Op.SQUARE, write.x)), 1e-4)
    return write(Op.MUL, write.x, write(Op.RSQRT, squares))


def shifted(write: Writer) -> Value:
    return write(Op.ADD, rms(write, write.x, EPS), 1e-3)


def two_axes(write: Writer) -> Value:
    return write(Op.LAYER_NORM, write.x, axes=(-2, -1), eps=EPS)


def mixed_axes(write: Writer) -> Value:
    mean = write(Op.MEAN, write.x, axes=(-2,))
    squares = write(Op.MEAN, write(Op.SQUARE, write.x))
    return write(Op.MUL, write(Op.SUB, write.x, mean), write(Op.RSQRT, squares))


MISSES: dict[str, tuple[Callable[[Writer], Value], str]] = {
    "outside": (outside, "outside"),
    "by_length": (by_length, "length"),
    "mean_alone": (mean_alone, "without it"),
    "deviation_alone": (deviation_alone, "does not subtract"),
    "bent": (bent, "not the root"),
    "elementwise": (elementwise, "one number a row"),
    "clamped": (clamped, "smaller rows keep their size"),
    "shifted": (shifted, "one number a row"),
    "two_axes": (two_axes, "2 axes"),
    "mixed_axes": (mixed_axes, "different"),
}


@pytest.mark.parametrize("name", MISSES)
def test_near_miss_is_named_as_what_it_is(name: str) -> None:
    spell, reason = MISSES[name]
    write = Writer()
    form = identified(write.piece(spell(write)))
    assert isinstance(form, Miss)
    assert reason in form.reason


FORM = NormalForm(centred=True, axes=(-1,), eps=EPS)


def test_gamma_and_beta_are_told_apart_whatever_their_order() -> None:
    write = Writer()
    gamma, beta = write.parameter("gamma"), write.parameter("beta")
    piece = write.piece(write(Op.ADD, beta, write(Op.MUL, gamma, layer(write, EPS))))
    found = Prover().identify(piece)
    assert isinstance(found, Proof)
    assert found.form == FORM
    assert found.gamma is not None
    assert found.beta is not None
    assert piece.constants()[found.gamma] is gamma
    assert piece.constants()[found.beta] is beta


@pytest.mark.parametrize("alone", ["gamma", "beta"])
def test_one_constant_is_gamma_or_beta(alone: str) -> None:
    write = Writer()
    operation = Op.MUL if alone == "gamma" else Op.ADD
    end = write(operation, layer(write, EPS), write.parameter(alone))
    found = Prover().identify(write.piece(end))
    assert isinstance(found, Proof)
    assert (found.gamma, found.beta) == ((0, None) if alone == "gamma" else (None, 0))


def test_gamma_inside_the_norm_is_found() -> None:
    write = Writer()
    weighted = write(Op.MUL, centred(write), write.parameter("gamma"))
    variance = write(Op.VARIANCE, write.x, correction=0.0)
    piece = write.piece(write(Op.DIV, weighted, write(Op.SQRT, write(Op.ADD, variance, EPS))))
    found = Prover().identify(piece)
    assert isinstance(found, Proof)
    assert (found.form, found.gamma, found.beta) == (FORM, 0, None)


def beta_before_gamma(write: Writer, gamma: Value, beta: Value) -> Value:
    return write(Op.MUL, write(Op.ADD, layer(write, EPS), beta), gamma)


def beta_subtracted(write: Writer, gamma: Value, beta: Value) -> Value:
    return write(Op.SUB, write(Op.MUL, layer(write, EPS), gamma), beta)


def divided(write: Writer, gamma: Value, beta: Value) -> Value:
    return write(Op.ADD, write(Op.DIV, layer(write, EPS), gamma), beta)


def subtracted_and_divided(write: Writer, gamma: Value, beta: Value) -> Value:
    return write(Op.DIV, write(Op.SUB, layer(write, EPS), beta), gamma)


@pytest.mark.parametrize(
    "spell", [beta_before_gamma, beta_subtracted, divided, subtracted_and_divided]
)
def test_gamma_may_divide_and_beta_be_subtracted_or_come_first(
    spell: Callable[[Writer, Value, Value], Value],
) -> None:
    write = Writer()
    gamma, beta = write.parameter("gamma"), write.parameter("beta")
    piece = write.piece(spell(write, gamma, beta))
    found = Prover().identify(piece)
    assert isinstance(found, Proof)
    assert found.form == FORM
    assert found.gamma is not None
    assert found.beta is not None
    assert [piece.constants()[place] for place in (found.gamma, found.beta)] == [gamma, beta]


def third_constant(write: Writer) -> Value:
    end = write(Op.MUL, layer(write, EPS), write.parameter("gamma"))
    end = write(Op.ADD, end, write.parameter("beta"))
    return write(Op.MUL, end, write.parameter("scale"))


def learned_eps(write: Writer) -> Value:
    squares = write(Op.MEAN, write(Op.SQUARE, write.x))
    shifted = write(Op.ADD, squares, write.parameter("eps", (1,)))
    return write(Op.MUL, write.x, write(Op.RSQRT, shifted))


def gamma_for_beta(write: Writer) -> Value:
    gamma = write.parameter("gamma")
    return write(Op.ADD, write(Op.MUL, layer(write, EPS), gamma), gamma)


def even_part(write: Writer) -> Value:
    size = write(Op.MEAN, write(Op.ABS, write.x))
    return write(Op.ADD, write(Op.MUL, layer(write, EPS), write.parameter("gamma")), size)


def negated(write: Writer) -> Value:
    return write(Op.NEG, layer(write, EPS))


@pytest.mark.parametrize("spell", [third_constant, learned_eps, negated, gamma_for_beta, even_part])
def test_proof_fails_for_what_gamma_and_beta_do_not_explain(
    spell: Callable[[Writer], Value],
) -> None:
    write = Writer()
    assert isinstance(Prover().identify(write.piece(spell(write))), Miss)


@pytest.mark.parametrize("squash", [Op.TANH, Op.ERF])
def test_dyt_holds_only_for_its_own_squash(squash: Op) -> None:
    write = Writer()
    parameters = {
        "alpha": write.parameter("alpha", (1,)),
        "gamma": write.parameter("gamma"),
        "beta": write.parameter("beta"),
    }
    squashed = write(squash, write(Op.MUL, write.x, parameters["alpha"]))
    end = write(Op.ADD, write(Op.MUL, squashed, parameters["gamma"]), parameters["beta"])
    piece = write.piece(end)
    assert Prover().holds_dyt(piece, parameters, squash.name.lower())
    assert not Prover().holds_dyt(piece, parameters, "erf" if squash is Op.TANH else "tanh")
    without = {name: value for name, value in parameters.items() if name != "beta"}
    assert not Prover().holds_dyt(piece, without, squash.name.lower())


def test_equal_structures_share_a_signature_and_others_do_not() -> None:
    def signature(eps: float, channels: int = CHANNELS) -> tuple[object, ...]:
        write = Writer(channels)
        return write.piece(layer(write, eps)).signature()

    assert signature(EPS) == signature(EPS)
    assert signature(EPS) != signature(1e-6)
    assert signature(EPS) != signature(EPS, channels=12)


def test_cached_proof_does_not_leak_to_another_eps() -> None:
    prover = Prover()
    found = []
    for eps in (1e-5, 1e-6, 1e-5):
        write = Writer()
        proof = prover.identify(write.piece(layer(write, eps)))
        assert isinstance(proof, Proof)
        found.append(proof.form.eps)
    assert found == [1e-5, 1e-6, 1e-5]


@given(
    x=st.lists(st.floats(-1e3, 1e3), min_size=4, max_size=4).filter(lambda x: np.ptp(x) > 1e-3),
    eps=st.floats(1e-8, 1e-2),
)
@settings(max_examples=50, deadline=None, derandomize=True)
def test_interpreted_layer_norm_equals_the_formula(x: list[float], eps: float) -> None:
    write = Writer(4)
    output = layer(write, eps)
    rows = np.asarray(x).reshape(1, 1, 4)

    values = {write.x: rows}
    for term in write.terms:
        inputs = [values[v] if isinstance(v, Value) else v for v in term.inputs]
        values[term.output] = interpret(term, inputs)
    y = values[output]
    deviation = np.sqrt(np.mean((rows - rows.mean()) ** 2) + eps)
    np.testing.assert_allclose(y, (rows - rows.mean()) / deviation, rtol=1e-9, atol=1e-12)


def test_opaque_terms_have_no_meaning() -> None:
    write = Writer()
    write(Op.OPAQUE, write.x)
    with pytest.raises(KeyError):
        interpret(write.terms[0], [np.ones(3)])
