"""The full fit in closed form: sums of products, and what they are solved for."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dyt_compile import ridge as ridge_module
from dyt_compile.dyt import Mix
from dyt_compile.fits import fit_diagonal
from dyt_compile.ridge import RIDGES, FullFit, GramSums, fit_full, refit_full

pytestmark = pytest.mark.core

Array = npt.NDArray[np.float32]
CHANNELS = 6


def _data(rows: int = 4000, seed: int = 0) -> tuple[Array, Array, Array, Array]:
    """x, y, and the matrix and offset that make y of tanh(x)."""
    rng = np.random.default_rng(seed)
    x, matrix, offset = (
        rng.normal(size=size).astype(np.float32)
        for size in ((rows, CHANNELS), (CHANNELS, CHANNELS), (CHANNELS,))
    )
    return x, np.tanh(x) @ matrix + offset, matrix, offset


def _parts(x: Array, y: Array, size: int) -> Callable[[], Iterator[tuple[Array, Array]]]:
    return lambda: ((x[i : i + size], y[i : i + size]) for i in range(0, len(x), size))


def _fitted(x: Array, y: Array, size: int) -> FullFit:
    full = fit_full(x, y, _parts(x, y, size))
    assert isinstance(full, FullFit)
    return full


def test_sums_give_back_the_matrix_that_made_the_rows() -> None:
    x, y, matrix, offset = _data()
    sums = GramSums(1.0, np.tanh(x).mean(axis=0), y.mean(axis=0))
    sums.add(x, y)
    found = sums.solve(1e-7)
    np.testing.assert_allclose(found.matrix, matrix, atol=1e-4)
    np.testing.assert_allclose(found.offset, offset, atol=1e-4)


def test_sums_do_not_depend_on_the_split_of_the_rows_or_the_centres() -> None:
    x, y, *_ = _data()
    solved = []
    for size, centre in ((4000, 0.0), (7, 5.0)):
        sums = GramSums(1.0, np.full(CHANNELS, centre), np.zeros(CHANNELS))
        for x_part, y_part in _parts(x, y, size)():
            sums.add(x_part, y_part)
        solved.append(sums.solve(1e-3))
    np.testing.assert_allclose(solved[0].matrix, solved[1].matrix, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(solved[0].offset, solved[1].offset, rtol=1e-5, atol=1e-6)


def test_a_larger_ridge_makes_a_smaller_matrix() -> None:
    x, y, *_ = _data()
    sums = GramSums(1.0, np.tanh(x).mean(axis=0), y.mean(axis=0))
    sums.add(x, y)
    sizes = [float(np.linalg.norm(sums.solve(ridge).matrix)) for ridge in (1e-4, 1e-1, 1e1)]
    assert sizes[0] > sizes[1] > sizes[2]


def test_full_fit_follows_what_mixes_channels_and_a_diagonal_one_does_not() -> None:
    x, y, *_ = _data()
    diagonal = fit_diagonal(x, y)
    assert not isinstance(diagonal, str)
    full = _fitted(x, y, 500)
    assert full.error < 0.05 < 0.3 < diagonal.error
    unseen_x, unseen_y, *_ = _data()
    made = full.mix(np.tanh(full.parameters.alpha * unseen_x))
    assert np.linalg.norm(made - unseen_y) < 0.05 * np.linalg.norm(unseen_y)


def test_full_fit_error_is_of_rows_that_it_was_not_fitted_to() -> None:
    rng = np.random.default_rng(1)
    x, y = (rng.normal(size=(32, 24)).astype(np.float32) for _ in range(2))
    assert _fitted(x, y, 32).error > 0.9  # noise, of which 24 rows tell nothing


def test_full_fit_takes_channels_that_do_not_vary() -> None:
    x, y, *_ = _data()
    x[:, 2] = 3.0
    full = _fitted(x, y, 500)
    assert np.isfinite(full.mix.matrix).all()
    assert np.isfinite(full.mix.offset).all()


def test_alpha_is_the_largest_whose_error_is_near_the_least(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(4000, CHANNELS)).astype(np.float32)
    y = x / np.sqrt(np.square(x).mean(axis=1, keepdims=True))
    fits = {}
    for slack in (0.0, ridge_module.SLACK, 0.5):
        monkeypatch.setattr(ridge_module, "SLACK", slack)
        fits[slack] = _fitted(x, y, 500)
    least = fits[0.0].error
    assert [fit.least for fit in fits.values()] == [least] * 3
    alphas = [float(fit.parameters.alpha[0]) for fit in fits.values()]
    assert alphas[0] < alphas[2]
    assert alphas == sorted(alphas)
    for slack, fit in fits.items():
        assert fit.error <= (1 + slack) * least


def test_mix_maps_the_channels_along_any_axis() -> None:
    x, y, *_ = _data(20)
    mix = _fitted(x, y, 20).mix
    turned = mix(x.reshape(4, 5, CHANNELS).transpose(0, 2, 1), axis=-2)
    np.testing.assert_allclose(turned.transpose(0, 2, 1).reshape(20, CHANNELS), mix(x), rtol=1e-5)


def _sums(x: Array, y: Array, alpha: float = 1.0) -> GramSums:
    sums = GramSums(alpha, np.tanh(x).mean(axis=0), y.mean(axis=0))
    sums.add(x, y)
    return sums


@settings(deadline=None, max_examples=30)
@given(cuts=st.lists(st.integers(1, 999), max_size=5, unique=True))
def test_sums_of_several_runs_united_are_those_of_one(cuts: list[int]) -> None:
    x, y, *_ = _data(1000)
    y[:500] += 3  # the parts have other means, and so other centres
    first, *others = (
        _sums(x[start:stop], y[start:stop])
        for start, stop in itertools.pairwise([0, *sorted(cuts), 1000])
    )
    united = functools.reduce(GramSums.united, others, first)
    whole = _sums(x, y)
    assert united.rows == whole.rows == 1000
    again = GramSums.of_arrays(**united.arrays())
    for ridge in (1e-4, 1e-2):
        expected = whole.solve(ridge)
        for found in (united.solve(ridge), again.solve(ridge)):
            np.testing.assert_allclose(found.matrix, expected.matrix, rtol=1e-5, atol=1e-6)
            np.testing.assert_allclose(found.offset, expected.offset, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("alphas", "chosen", "rows"),
    [
        ([(1.0,), (1.0,), (1.0,)], 1.0, 900),
        ([(1.0, 0.5, 2.0), (0.5, 0.25, 1.0), (1.0, 0.5, 2.0)], 1.0, 900),
        ([(1.0, 0.5), (0.5, 0.25), (0.5, 0.25)], 0.5, 900),
        ([(1.0,), (0.5,), (0.25,)], 0.25, 400),
    ],
)
def test_refit_adds_the_sums_of_an_alpha_that_all_runs_have(
    alphas: list[tuple[float, ...]], chosen: float, rows: int
) -> None:
    x, y, *_ = _data(900)
    parts = [(x[:200], y[:200]), (x[200:500], y[200:500]), (x[500:], y[500:])]
    runs = [[_sums(*part, a) for a in own] for part, own in zip(parts, alphas, strict=True)]
    found = refit_full(x, y, runs)
    assert found.parameters.alpha[0] == chosen
    assert {sums.rows for sums in found.sums} == {rows}
    kept = parts[-1] if rows == 400 else (x, y)
    matrices = [_sums(*kept, chosen).solve(ridge).matrix for ridge in RIDGES]
    assert min(np.abs(matrix - found.mix.matrix).max() for matrix in matrices) < 1e-5


@pytest.mark.parametrize("channels", [5, 256, 300])
def test_solution_is_that_of_the_normal_equations(channels: int) -> None:
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(400, channels)), rng.normal(size=(400, 7))
    sums = _sums(x.astype(np.float32), y.astype(np.float32))
    t = np.tanh(x) - np.tanh(x).mean(axis=0)
    gram = t.T @ t
    own = np.diag(gram)
    ridge = np.diag(1e-2 * own + 1e-6 * own.mean())
    wanted = np.linalg.solve(gram + ridge, t.T @ (y - y.mean(axis=0)))
    np.testing.assert_allclose(sums.solve(1e-2).matrix, wanted, rtol=1e-3, atol=1e-4)


HELD = np.arange(4000) % 4 == 0


def _error(mix: Mix, x: Array, y: Array, alpha: float) -> float:
    made = mix(np.tanh(alpha * x[HELD]))
    return float(np.linalg.norm(made - y[HELD]) / np.linalg.norm(y[HELD]))


def test_alpha_is_the_best_of_all_that_are_allowed() -> None:
    x, y, *_ = _data()
    kept = x[~HELD], y[~HELD]
    errors = {
        alpha: min(_error(_sums(*kept, alpha).solve(r), x, y, alpha) for r in RIDGES)
        for alpha in (2.0**power for power in range(-4, 3))
    }
    found = _fitted(x, y, 500)
    assert found.parameters.alpha[0] == min(errors, key=lambda a: errors[a])
    assert found.error == pytest.approx(min(errors.values()), rel=1e-3)


@pytest.mark.parametrize("where", ["sample", "stream"])
def test_rows_that_are_not_finite_give_the_reason(where: str) -> None:
    x, y, *_ = _data()
    spoilt = y.copy()
    spoilt[3, 1] = np.nan
    sample, stream = (spoilt, y) if where == "sample" else (y, spoilt)
    assert fit_full(x, sample, _parts(x, stream, 500)) == "its activations hold NaN or infinity"


def test_constant_squashed_rows_give_the_mean() -> None:
    y = np.random.default_rng(0).normal(size=(40, 2)).astype(np.float32)
    mix = _sums(np.full((40, 3), 50, np.float32), y).solve(1e-3)
    np.testing.assert_array_equal(mix.matrix, 0)
    np.testing.assert_allclose(mix.offset, y.mean(axis=0), rtol=1e-5)


def test_choice_on_some_channels_still_tells_the_error_of_all(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    x, y, *_ = _data()
    every = _fitted(x, y, 500)
    monkeypatch.setattr("dyt_compile.ridge.TRIED", 2)
    some = _fitted(x, y, 500)
    assert some.error == pytest.approx(every.error)
    assert some.parameters.alpha == every.parameters.alpha
