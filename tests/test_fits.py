"""Fits: the closed form against a brute-force search, and the sample that it sees."""

from __future__ import annotations

import itertools

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dyt_compile.dyt import DytParameters, evaluate
from dyt_compile.fits import (
    HELD_OUT,
    ROWS,
    Fit,
    RowSample,
    fit_diagonal,
    held_as,
    typical,
    widened,
)
from dyt_compile.ridge import FullFit, fit_full

pytestmark = pytest.mark.core

Array = npt.NDArray[np.float32]


def _layer_norm(x: Array) -> Array:
    centred = x - x.mean(axis=1, keepdims=True)
    return np.asarray(centred / np.sqrt((centred**2).mean(axis=1, keepdims=True) + 1e-6))


def _normal(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def _fitted(x: Array, y: Array) -> Fit:
    fit = fit_diagonal(x, y)
    assert isinstance(fit, Fit)
    return fit


def _residue(x: Array, y: Array, alpha: float) -> float:
    """Sum of squares left by the best gamma and beta for one alpha, all in float64."""
    t, wanted = np.tanh(alpha * x.astype(np.float64)), y.astype(np.float64)
    left = 0.0
    for channel in range(x.shape[1]):
        design = np.stack([t[:, channel], np.ones(len(x))], axis=1)
        solution = np.linalg.lstsq(design, wanted[:, channel], rcond=None)[0]
        left += float(((design @ solution - wanted[:, channel]) ** 2).sum())
    return left


@pytest.mark.parametrize("alpha", [0.3, 1.0, 3.0])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_fit_of_dyt_recovers_its_parameters(alpha: float, scale: float) -> None:
    x = _normal(3000, 6) * np.float32(scale)
    gamma, beta = 1 + 0.3 * _normal(6, seed=1), _normal(6, seed=2)
    y = evaluate(DytParameters(np.array([alpha / scale], np.float32), gamma, beta), x)
    fit = _fitted(x, y)
    found = fit.parameters
    assert found.gamma is not None
    assert found.beta is not None
    assert found.alpha.shape == (1,)
    np.testing.assert_allclose(found.alpha * scale, alpha, rtol=0.03)  # the grid's own step
    np.testing.assert_allclose(found.gamma, gamma, rtol=0.03)
    np.testing.assert_allclose(found.beta, beta, atol=2e-3)
    assert fit.error < 0.01


def test_fit_without_exact_answer_equals_brute_force() -> None:
    x = _normal(1600, 5) * np.linspace(0.5, 2.0, 5, dtype=np.float32)
    x *= np.exp(0.4 * _normal(1600, 1, seed=3))
    y = _layer_norm(x) * np.float32(1.3) + np.float32(0.2)
    found = _fitted(x, y).parameters
    assert found.gamma is not None
    assert found.beta is not None
    least = min(_residue(x, y, float(alpha)) for alpha in np.geomspace(0.05, 20, 600))
    alpha = float(found.alpha[0])
    assert _residue(x, y, alpha) <= least * 1.001
    t = np.tanh(alpha * x.astype(np.float64))
    for channel in range(5):
        design = np.stack([t[:, channel], np.ones(len(x))], axis=1)
        gamma, beta = np.linalg.lstsq(design, y[:, channel].astype(np.float64), rcond=None)[0]
        assert found.gamma[channel] == pytest.approx(gamma, rel=1e-4)
        assert found.beta[channel] == pytest.approx(beta, abs=1e-4)


def test_fit_error_is_that_of_rows_held_out() -> None:
    x = _normal(1200, 4)
    y = _layer_norm(x)
    fit = _fitted(x, y)
    alpha = fit.parameters.alpha
    held = np.arange(len(x)) % HELD_OUT == 0
    t = np.tanh(alpha * x.astype(np.float64))
    missed = 0.0
    for channel in range(4):
        design = np.stack([t[:, channel], np.ones(len(x))], axis=1)
        solution = np.linalg.lstsq(design[~held], y[~held, channel], rcond=None)[0]
        missed += float(((design[held] @ solution - y[held, channel]) ** 2).sum())
    assert fit.error == pytest.approx(np.sqrt(missed) / np.linalg.norm(y[held]), rel=1e-3)


def test_fit_of_channels_with_large_means_keeps_its_digits() -> None:
    x, offset = _normal(2000, 3), np.float32(100)
    fit = _fitted(x, np.tanh(x) + offset)
    assert fit.parameters.beta is not None
    assert fit.parameters.gamma is not None
    np.testing.assert_allclose(fit.parameters.gamma, 1, rtol=0.02)
    np.testing.assert_allclose(fit.parameters.beta, 100, rtol=1e-4)


def test_fit_with_constant_channels_is_finite() -> None:
    x = _normal(500, 5)
    x[:, 0] = 3.0
    fit = _fitted(x, _layer_norm(x))
    for array in fit.parameters.named().values():
        assert np.isfinite(array).all()
        assert array.dtype == np.float32


def test_fit_where_most_channels_are_constant_still_fits_the_rest() -> None:
    x = np.zeros((500, 5), np.float32)
    x[:, :2] = _normal(500, 2)
    assert isinstance(fit_diagonal(x, _layer_norm(x)), Fit)


def test_fit_of_constant_output_is_that_constant() -> None:
    fit = _fitted(_normal(100, 3), np.full((100, 3), 2.5, np.float32))
    x = _normal(10, 3, seed=4)
    np.testing.assert_allclose(evaluate(fit.parameters, x), 2.5, atol=1e-4)


def test_fit_of_zeros_has_no_error() -> None:
    assert _fitted(_normal(100, 3), np.zeros((100, 3), np.float32)).error == 0.0


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("side", ["x", "y"])
def test_fit_of_values_that_are_not_finite_gives_the_reason(bad: float, side: str) -> None:
    arrays = {"x": _normal(100, 3), "y": _normal(100, 3, seed=1)}
    arrays[side][17, 1] = bad
    assert fit_diagonal(arrays["x"], arrays["y"]) == "its activations hold NaN or infinity"


def test_fit_of_constant_input_gives_the_reason() -> None:
    x = np.full((100, 3), 1.5, np.float32)
    assert fit_diagonal(x, _normal(100, 3)) == "its input does not vary over the data"


@pytest.mark.parametrize("rows", [0, 1, 2 * HELD_OUT - 1])
def test_fit_of_too_few_rows_gives_the_reason(rows: int) -> None:
    reason = fit_diagonal(_normal(rows, 3), _normal(rows, 3))
    assert isinstance(reason, str)
    assert str(rows) in reason
    assert str(2 * HELD_OUT) in reason


def test_fit_twice_gives_the_same_bits() -> None:
    x = _normal(700, 4)
    first, second = _fitted(x, _layer_norm(x)), _fitted(x.copy(), _layer_norm(x))
    assert first.error == second.error
    for a, b in zip(
        first.parameters.named().values(), second.parameters.named().values(), strict=True
    ):
        np.testing.assert_array_equal(a, b)


def test_fit_leaves_its_arguments_alone() -> None:
    x, y = _normal(300, 4), _normal(300, 4, seed=5)
    before = x.copy(), y.copy()
    fit_diagonal(x, y)
    np.testing.assert_array_equal(x, before[0])
    np.testing.assert_array_equal(y, before[1])


def _with_massive(factor: float) -> tuple[Array, npt.NDArray[np.bool_]]:
    """Tokens, of which a tenth points in one direction, `factor` times as far as the others."""
    x = _normal(4000, 32)
    massive = np.arange(4000) % 10 == 0
    x[massive] += np.float32(factor) * _normal(32, seed=1)
    return x, massive


@pytest.mark.parametrize("factor", [10.0, 1e3, 1e4])
def test_massive_tokens_leave_the_others_their_fit(factor: float) -> None:
    x, massive = _with_massive(factor)
    y = _layer_norm(x)
    parameters = _fitted(x, y).parameters
    left = evaluate(parameters, x[~massive]) - y[~massive]
    assert 0.1 < np.linalg.norm(left) / np.linalg.norm(y[~massive]) < 0.42
    full = fit_full(x, y, lambda: [(x, y)])
    assert isinstance(full, FullFit)
    left = full.mix(np.tanh(full.parameters.alpha * x[~massive])) - y[~massive]
    assert np.linalg.norm(left) / np.linalg.norm(y[~massive]) < 0.25


def test_typical_deviation_is_that_of_the_middle_half() -> None:
    x, _ = _with_massive(1e4)
    assert typical(x) == pytest.approx(1.1, rel=0.1)  # a tenth of the tails are the massive ones
    assert typical(_normal(4000, 32) * np.float32(3)) == pytest.approx(3, rel=0.02)
    assert typical(np.full((10, 3), 2, np.float32)) is None
    rare = np.zeros((100, 3), np.float32)
    rare[:5] = 1
    assert typical(rare) == pytest.approx(rare.std())  # no middle half that varies


def _numbered(rows: int) -> tuple[Array, Array]:
    x = np.arange(rows, dtype=np.float32)[:, None]
    return x, -x


def _sampled(rows: int, cuts: list[int], seed: int, limit: int) -> tuple[Array, Array]:
    x, y = _numbered(rows)
    sample = RowSample(seed, limit)
    places = [0, *sorted(cut % (rows + 1) for cut in cuts), rows]
    for start, stop in itertools.pairwise(places):
        sample.add(x[start:stop], y[start:stop])
    return sample.rows()


@settings(deadline=None, max_examples=60)
@given(
    rows=st.integers(1, 300),
    cuts=st.lists(st.integers(0, 300), max_size=12),
    seed=st.integers(0, 2**31),
    limit=st.integers(1, 120),
)
def test_sample_is_the_same_whatever_the_batches(
    rows: int, cuts: list[int], seed: int, limit: int
) -> None:
    x, y = _sampled(rows, cuts, seed, limit)
    whole, _ = _sampled(rows, [], seed, limit)
    np.testing.assert_array_equal(x, whole)
    np.testing.assert_array_equal(x, -y)  # pairs stay together
    assert len(x) == min(rows, limit)
    assert len(np.unique(x)) == len(x)


def test_sample_is_uniform_over_the_stream() -> None:
    counts = np.zeros(10)
    for seed in range(200):
        x, _ = _sampled(1000, [137, 520], seed * 1_000_003, 50)
        counts += np.histogram(x, bins=10, range=(0, 1000))[0]
    expected = counts.sum() / 10
    squares = float(((counts - expected) ** 2 / expected).sum())
    assert squares < 27.9  # the 99.9 % point of chi-squared with 9 degrees of freedom


def test_sample_order_is_not_that_of_the_stream() -> None:
    x, _ = _sampled(2000, [], 0, 2000)
    correlation = np.corrcoef(x[:, 0], np.arange(2000))[0, 1]
    assert abs(correlation) < 0.1


def test_sample_of_another_seed_is_another() -> None:
    first, second = _sampled(1000, [], 0, 100)[0], _sampled(1000, [], 1, 100)[0]
    assert not np.array_equal(np.sort(first), np.sort(second))


def test_sample_of_neighbouring_seeds_are_not_neighbouring_rows() -> None:
    first, second = _sampled(2000, [], 0, 200)[0], _sampled(2000, [], 1, 200)[0]
    assert len(np.intersect1d(first - 1, second)) < 50  # 20 by chance


def test_sample_by_default_holds_the_rows_of_a_fit() -> None:
    sample = RowSample(0)
    for _ in range(4):
        sample.add(_normal(2000, 2), _normal(2000, 2))
    x, y = sample.rows()
    assert x.shape == y.shape == (ROWS, 2)


@settings(deadline=None, max_examples=60)
@given(
    parts=st.lists(st.integers(0, 60), min_size=1, max_size=6),
    seed=st.integers(0, 2**31),
    limit=st.integers(1, 120),
)
def test_samples_of_several_streams_united_are_that_of_one_stream(
    parts: list[int], seed: int, limit: int
) -> None:
    keys = np.random.default_rng(seed).integers(0, 2**63, sum(parts)).astype(np.uint64)
    x = np.arange(len(keys), dtype=np.float32)[:, None]
    places = np.cumsum([0, *parts])
    samples = []
    for start, stop in itertools.pairwise(places):
        samples.append(RowSample(seed, limit))
        samples[-1].add(x[start:stop], -x[start:stop], keys[start:stop])
    whole = RowSample(seed, limit)
    whole.add(x, -x, keys)
    first, *others = (RowSample.of_arrays(**sample.arrays()) for sample in samples)
    united = first.united(*others)
    assert united.seen == whole.seen == len(x)
    for array, expected in zip(united.rows(), whole.rows(), strict=True):
        np.testing.assert_array_equal(array, expected)


def test_sample_of_keyed_rows_does_not_depend_on_their_order() -> None:
    x, _ = _numbered(500)
    keys = np.random.default_rng(0).permutation(500).astype(np.uint64)
    first, second = RowSample(0, 50), RowSample(0, 50)
    first.add(x, x, keys)
    second.add(x[::-1], x[::-1], keys[::-1])
    np.testing.assert_array_equal(first.rows()[0], second.rows()[0])


def _narrow(dtype: str) -> tuple[npt.NDArray[np.generic], npt.NDArray[np.generic]]:
    x = _normal(900, 70) * np.exp(_normal(70, seed=2))
    return x.astype(dtype), _layer_norm(x).astype(dtype)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_rows_of_16_bits_are_held_so_and_fitted_as_in_float32(dtype: str) -> None:
    x, y = _narrow(dtype)
    samples = [RowSample(0, 800, kind) for kind in (dtype, "float32")]
    for sample, wide in zip(samples, (False, True), strict=True):
        sample.add(*((widened(x), widened(y)) if wide else (x, y)))
    (own, _), (wide_x, _) = rows = [sample.rows() for sample in samples]
    assert own.dtype == dtype
    assert 2 * own.nbytes == wide_x.nbytes
    np.testing.assert_array_equal(widened(own), wide_x)
    first, second = (_fitted(*each) for each in rows)
    fulls = [fit_full(*each, lambda each=each: [each]) for each in rows]
    assert first.error == second.error
    for one, other in ((first, second), fulls):
        for name, array in vars(one.parameters).items():
            np.testing.assert_array_equal(array, getattr(other.parameters, name))
    np.testing.assert_array_equal(fulls[0].mix.matrix, fulls[1].mix.matrix)  # type: ignore[union-attr]


def test_sample_of_16_bits_is_written_and_united_in_what_loses_nothing() -> None:
    x, y = _narrow("bfloat16")
    samples = RowSample(0, 2000, "bfloat16"), RowSample(1, 2000, "bfloat16")
    for sample in samples:
        sample.add(x, y)
    assert samples[0].united(samples[1]).rows()[0].dtype == "bfloat16"
    again = RowSample.of_arrays(**samples[0].arrays())
    assert again.rows()[0].dtype == np.float32  # safetensors has no bfloat16 of NumPy
    np.testing.assert_array_equal(again.rows()[0], widened(samples[0].rows()[0]))
    wide = RowSample(0, 2000)
    wide.add(np.full((1, 70), 1 / 3, np.float32), np.full((1, 70), 1 / 3, np.float32))
    united = samples[0].united(wide).rows()[0]
    assert united.dtype == np.float32
    assert (united == np.float32(1 / 3)).all(axis=1).any()


@pytest.mark.parametrize(
    ("dtypes", "held"),
    [
        (["bfloat16"], "bfloat16"), (["float16", "float16"], "float16"),
        (["bfloat16", "float16"], "float32"), (["float16", "float32"], "float32"),
        (["int16"], "float32"), (["float64"], "float32"),
    ],
)  # fmt: skip
def test_rows_are_held_in_what_loses_nothing(dtypes: list[str], held: str) -> None:
    assert held_as(*dtypes) == held
