"""The points of a site that are kept for drawing."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from dyt_compile.dyt import DytParameters, evaluate
from dyt_compile.scatter import CHANNELS, TOKENS, Scatter, scatter

pytestmark = pytest.mark.core

Array = npt.NDArray[np.float32]
ROWS, WIDTH = 200, 48


def _norm(x: Array, gamma: Array, beta: Array) -> tuple[Array, Array]:
    sigma = np.sqrt((x * x).mean(axis=1, keepdims=True))
    return x / sigma * gamma + beta, sigma.ravel()


def _site(seed: int = 0, rows: int = ROWS, width: int = WIDTH) -> tuple[Array, Array, Array]:
    random = np.random.default_rng(seed)
    x = random.normal(size=(rows, width)) * random.uniform(0.5, 2, (rows, 1))
    affine = random.uniform(0.5, 1.5, (2, width))
    return x.astype(np.float32), affine[0].astype(np.float32), affine[1].astype(np.float32)


def _drawn(x: Array, gamma: Array, beta: Array, fit: DytParameters | None = None) -> Scatter:
    y, sigma = _norm(x, gamma, beta)
    found = scatter(x, y, sigma, fit, (gamma, beta))
    assert found is not None
    return found


def test_points_are_inputs_and_outputs_before_the_affine_part() -> None:
    x, gamma, beta = _site()
    found = _drawn(x, gamma, beta)
    assert found.x.shape == found.y.shape == (TOKENS, CHANNELS)
    np.testing.assert_allclose(found.y, found.x / found.sigma[:, None], rtol=1e-4, atol=1e-5)
    for token, row in enumerate(found.x):
        source = np.flatnonzero((x[:, found.channels] == row).all(axis=1))
        assert len(source) == 1, token


def test_tokens_and_channels_reach_from_the_smallest_to_the_largest() -> None:
    x, gamma, beta = _site()
    found = _drawn(x, gamma, beta)
    _, sigma = _norm(x, gamma, beta)
    assert (found.sigma[0], found.sigma[-1]) == (sigma.min(), sigma.max())
    assert (np.diff(found.sigma) >= 0).all()
    sizes = (x * x).mean(axis=0)
    assert (found.channels[0], found.channels[-1]) == (sizes.argmin(), sizes.argmax())
    assert (np.diff(sizes[found.channels]) >= 0).all()


def test_points_do_not_depend_on_the_order_of_rows() -> None:
    x, gamma, beta = _site()
    order = np.random.default_rng(5).permutation(ROWS)
    first, second = _drawn(x, gamma, beta), _drawn(x[order], gamma, beta)
    np.testing.assert_array_equal(first.x, second.x)
    np.testing.assert_array_equal(first.y, second.y)


def test_few_rows_and_channels_are_all_drawn() -> None:
    x, gamma, beta = _site(rows=5, width=3)
    found = _drawn(x, gamma, beta)
    assert found.x.shape == (5, 3)
    assert sorted(found.channels) == [0, 1, 2]


def test_fit_is_told_in_the_units_of_the_points() -> None:
    x, gamma, beta = _site()
    fit = DytParameters(np.array([0.7], np.float32), 1.7 * gamma, beta + 0.25 * gamma)
    found = _drawn(x, gamma, beta, fit)
    assert found.fitted is not None
    expected = 1.7 * np.tanh(np.float32(0.7) * found.x) + 0.25
    np.testing.assert_allclose(evaluate(found.fitted, found.x), expected, rtol=1e-4, atol=1e-5)


def test_fit_without_gamma_and_beta_is_told_too() -> None:
    x, gamma, beta = _site()
    found = _drawn(x, gamma, beta, DytParameters(np.array([0.7], np.float32)))
    assert found.fitted is not None
    picked = gamma[found.channels], beta[found.channels]
    expected = (np.tanh(np.float32(0.7) * found.x) - picked[1]) / picked[0]
    np.testing.assert_allclose(evaluate(found.fitted, found.x), expected, rtol=1e-4, atol=1e-5)


def test_channel_that_gamma_hides_is_left_out() -> None:
    x, gamma, beta = _site(width=8)
    gamma[3] = 0
    assert sorted(_drawn(x, gamma, beta).channels) == [0, 1, 2, 4, 5, 6, 7]


@pytest.mark.parametrize("spoilt", ["no rows", "no gamma", "nan"])
def test_site_without_anything_to_draw_has_no_points(spoilt: str) -> None:
    x, gamma, beta = _site()
    if spoilt == "no rows":
        x = x[:0]
    if spoilt == "no gamma":
        gamma[:] = 0
    y, sigma = _norm(x, gamma, beta)
    if spoilt == "nan":
        y[7, 7] = np.nan
    assert scatter(x, y, sigma, None, (gamma, beta)) is None
