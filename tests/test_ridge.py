"""The full fit in closed form: sums of products, and what they are solved for."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt
import pytest

from dyt_compile.fits import fit_diagonal
from dyt_compile.ridge import FullFit, GramSums, fit_full

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


def test_mix_maps_the_channels_along_any_axis() -> None:
    x, y, *_ = _data(20)
    mix = _fitted(x, y, 20).mix
    turned = mix(x.reshape(4, 5, CHANNELS).transpose(0, 2, 1), axis=-2)
    np.testing.assert_allclose(turned.transpose(0, 2, 1).reshape(20, CHANNELS), mix(x), rtol=1e-5)
