"""Metrics: against formulas written another way, pooled over batches, and their uncertainty."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from dyt_compile.errors import DataError, OptionError
from dyt_compile.metrics import METRICS, Measurement, Tally, check_metric, described, named

pytestmark = pytest.mark.core

Array = npt.NDArray[np.float64]
NAMES = ["relative", "cosine", "kl", "top1"]


def _pair(*shape: int, seed: int = 0, noise: float = 0.3) -> tuple[Array, Array]:
    generator = np.random.default_rng(seed)
    f = generator.standard_normal(shape)
    return f, f + noise * generator.standard_normal(shape)


def _measured(metric: str, f: Array, g: Array, mask: npt.NDArray[np.bool_] | None = None) -> float:
    tally = Tally(metric)
    tally.add(f, g, mask)
    return tally.measurement().error


def _direct(metric: str, f: Array, g: Array) -> float:
    """The same over positions [n, channels], by torch's own functions."""
    a, b = torch.from_numpy(f), torch.from_numpy(g)
    if metric == "relative":
        return float((a - b).norm() / a.norm())
    if metric == "cosine":
        return float(1 - F.cosine_similarity(a, b, dim=-1).mean())
    if metric == "kl":
        return float(
            F.kl_div(b.log_softmax(-1), a.log_softmax(-1), log_target=True, reduction="batchmean")
        )
    return float((a.argmax(-1) != b.argmax(-1)).double().mean())


def test_metrics_are_these_four() -> None:
    assert list(METRICS) == NAMES


@pytest.mark.parametrize("metric", NAMES)
@pytest.mark.parametrize("shape", [(7, 5), (7, 3, 5), (7, 2, 3, 5)])
def test_metric_equals_the_direct_formula(metric: str, shape: tuple[int, ...]) -> None:
    f, g = _pair(*shape, noise=1.0)
    error = _measured(metric, f, g)
    assert error == pytest.approx(_direct(metric, f.reshape(-1, 5), g.reshape(-1, 5)), rel=1e-9)
    assert error > 0


@pytest.mark.parametrize("metric", NAMES)
def test_metric_of_equal_outputs_is_zero(metric: str) -> None:
    f, _ = _pair(6, 3, 5)
    tally = Tally(metric)
    tally.add(f, f.copy())
    found = tally.measurement()
    assert found.error == pytest.approx(0, abs=1e-12)
    assert found.standard_error == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("metric", NAMES)
def test_metric_of_masked_positions_equals_that_of_the_others(metric: str) -> None:
    f, g = _pair(6, 4, 5)
    mask = np.random.default_rng(1).random((6, 4)) > 0.4
    spoilt = np.where(mask[..., None], g, 1e6 * np.arange(5))
    expected = _direct(metric, f[mask], g[mask])
    assert _measured(metric, f, spoilt, mask) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("metric", NAMES)
def test_metric_of_all_masked_is_zero_over_its_samples(metric: str) -> None:
    f, g = _pair(3, 4, 5)
    tally = Tally(metric)
    tally.add(f, g, np.zeros((3, 4), bool))
    assert tally.measurement() == Measurement(0.0, 0.0, 3)


def test_metric_with_a_mask_of_other_positions_counts_all() -> None:
    f, g = _pair(6, 5)  # pooled: no positions left to mask
    mask = np.zeros((6, 4), bool)
    assert _measured("relative", f, g, mask) == _measured("relative", f, g)


@pytest.mark.parametrize("metric", NAMES)
def test_metric_ignores_masked_positions_that_hold_nan(metric: str) -> None:
    f, g = _pair(6, 4, 5)
    mask = np.ones((6, 4), bool)
    mask[2, 1] = False
    f[2, 1] = g[2, 1] = np.nan
    assert _measured(metric, f, g, mask) == pytest.approx(_direct(metric, f[mask], g[mask]))


@settings(deadline=None, max_examples=40)
@given(
    metric=st.sampled_from(NAMES),
    sizes=st.lists(st.integers(1, 6), min_size=1, max_size=6),
    seed=st.integers(0, 1000),
    masked=st.booleans(),
)
def test_metric_pools_over_batches_of_any_size(
    metric: str, sizes: list[int], seed: int, masked: bool
) -> None:
    total = sum(sizes)
    f, g = _pair(total, 3, 4, seed=seed)
    mask = np.random.default_rng(seed).random((total, 3)) > 0.3 if masked else None
    parts, start = Tally(metric), 0
    for size in sizes:
        own = slice(start, start + size)
        parts.add(f[own], g[own], None if mask is None else mask[own])
        start += size
    together = Tally(metric)
    together.add(f, g, mask)
    pooled, whole = parts.measurement(), together.measurement()
    assert pooled.error == pytest.approx(whole.error, rel=1e-12)
    assert pooled.standard_error == pytest.approx(whole.standard_error, rel=1e-9, abs=1e-15)
    assert pooled.samples == whole.samples == total


@pytest.mark.parametrize("metric", NAMES)
def test_standard_error_agrees_with_a_bootstrap(metric: str) -> None:
    generator = np.random.default_rng(0)
    samples = 300
    f = generator.standard_normal((samples, 2, 6)) * generator.uniform(0.5, 2, (samples, 1, 1))
    g = f + generator.standard_normal(f.shape) * generator.uniform(0.1, 0.8, (samples, 1, 1))
    tally = Tally(metric)
    tally.add(f, g)
    errors = []
    for _ in range(400):
        drawn = generator.integers(0, samples, samples)
        errors.append(_measured(metric, f[drawn], g[drawn]))
    assert tally.measurement().standard_error == pytest.approx(np.std(errors), rel=0.15)


@pytest.mark.parametrize("metric", NAMES)
def test_metric_of_one_sample_has_no_standard_error(metric: str) -> None:
    tally = Tally(metric)
    tally.add(*_pair(1, 3, 5))
    assert tally.measurement().standard_error == 0.0


def test_measurement_of_nothing_is_zero() -> None:
    assert Tally("kl").measurement() == Measurement(0.0, 0.0, 0)


def test_measurement_keeps_a_budget_that_its_standard_errors_reach() -> None:
    measured = Measurement(0.1, 0.02, 9)
    assert measured.keeps(0.1301, 1.5)
    assert not measured.keeps(0.1299, 1.5)
    assert not Measurement(math.nan, math.nan, 9).keeps(1e9, 1.5)


def test_standard_error_is_that_of_an_error_as_large_as_the_budget() -> None:
    factor = Measurement(0.1, 0.02, 9, growth=1.0)  # 0.04 at a budget of 0.2
    assert not factor.keeps(0.2, 2.6)
    assert factor.keeps(0.2, 2.4)
    share = Measurement(0.1, 0.02, 9, growth=0.5)  # 0.02 * 2 ** 0.5
    assert not share.keeps(0.2, 3.6)
    assert share.keeps(0.2, 3.5)


def test_no_sample_of_few_that_differs_proves_no_small_share() -> None:
    none_of_300 = Measurement(0.0, 0.0, 300, growth=0.5)
    assert not none_of_300.keeps(0.005, 1.64)  # a share of 1 in 200 shows none in 300 at 22 %
    assert none_of_300.keeps(0.02, 1.64)


@pytest.mark.parametrize("share", [0.005, 0.02, 0.1])
def test_share_at_the_budget_is_kept_by_few_samples(share: float) -> None:
    """Of true shares just above the budget hardly any pass, however few differ."""
    generator = np.random.default_rng(0)
    kept = 0
    for _ in range(500):
        tally = Tally("top1")
        f = np.tile([1.0, 0.0], (300, 1))
        differs = generator.random(300) < 1.01 * share
        tally.add(f, np.where(differs[:, None], f[:, ::-1], f))
        kept += tally.measurement().keeps(share, 1.64)
    assert kept <= 0.05 * 500


def _first(output: Array, inputs: Mapping[str, Any], places: Array) -> Array:
    return output[:, 0]


def _scored(score: Any, f: Array, g: Array, **given: Any) -> Measurement:
    tally = Tally(score)
    tally.add(f, g, **given)
    return tally.measurement()


def test_error_of_a_function_is_the_mean_loss_of_its_score() -> None:
    f, g = _pair(50, 3)
    found = _scored(_first, f, g)
    losses = f[:, 0] - g[:, 0]
    assert found.error == pytest.approx(losses.mean())
    assert found.standard_error == pytest.approx(losses.std(ddof=1) / 50**0.5)
    assert found.samples == 50
    assert _scored(_first, g, f).error == pytest.approx(-losses.mean())  # it may gain


def test_function_gets_the_inputs_and_places_of_its_samples() -> None:
    seen = []

    def score(output: Array, inputs: Mapping[str, Any], places: Array) -> list[float]:
        seen.append((len(output), inputs["x"].tolist(), places.tolist()))
        return [0.0] * len(output)

    f, g = _pair(2, 3)
    _scored(score, f, g, inputs={"x": np.array([5, 6])}, places=np.array([7, 9]))
    assert seen == [(2, [5, 6], [7, 9])] * 2


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_function_gets_narrow_outputs_as_float32(dtype: npt.DTypeLike) -> None:
    kinds = []

    def score(output: Array, inputs: object, places: Array) -> Array:
        kinds.append(output.dtype)
        return np.zeros(len(output))

    _scored(score, np.ones((2, 3), dtype), np.ones((2, 3), dtype))
    assert kinds == [np.float32] * 2


def test_function_may_return_a_tensor_of_bools() -> None:
    f, g = _pair(40, 3, noise=2.0)
    found = _scored(lambda output, *_: torch.from_numpy(output)[:, 0] > 0, f, g)
    assert found.error == pytest.approx((f[:, 0] > 0).mean() - (g[:, 0] > 0).mean())


def test_no_score_that_fell_proves_no_more_than_one_sample_more_could_lose() -> None:
    right = np.ones((40, 2))
    right[3] = 0
    found = _scored(_first, right, right)
    assert (found.error, found.standard_error) == (0.0, 0.0)
    assert not found.keeps(1.9 / 40, 2.0)
    assert found.keeps(2.1 / 40, 2.0)


def test_score_that_the_converted_model_lost_is_infinitely_bad() -> None:
    f, g = _pair(6, 3)
    g[2, 1] = np.nan
    assert _scored(_first, f, g).error == math.inf  # the score itself reads the first column alone
    lost = np.full_like(f, -1.0)
    assert _scored(lambda o, *_: np.where(o[:, 0] == -1, -np.inf, 0.0), f, lost).error == math.inf


def test_masked_positions_that_hold_nan_are_no_loss() -> None:
    f, g = _pair(6, 4, 3)
    g[2, 1] = np.nan
    mask = np.ones((6, 4), bool)
    mask[2, 1] = False
    found = _scored(lambda output, *_: output[:, 0, 0], f, g, mask=mask)
    assert found.error == pytest.approx((f - g)[:, 0, 0].mean())


def _raises(*_: Any) -> Any:
    raise KeyError("labels")


@pytest.mark.parametrize(
    ("score", "told"),
    [
        (_raises, "metric _raises raised KeyError: 'labels'"),
        (lambda *_: 0.5, "returned a float; allowed: one number for each sample, here shape (4,)"),
        (lambda *_: None, "returned a NoneType; allowed: one number for each sample"),
        (lambda *_: ["a"] * 4, "returned a list; allowed: one number for each sample"),
        (lambda output, *_: output, "returned a ndarray of shape (4, 3); allowed: one number"),
        (lambda *_: [0, 0, math.nan, 0], "of the original is nan for sample 2; allowed: finite"),
        (lambda: None, "raised TypeError"),
    ],
)
def test_function_that_gives_no_scores_is_told_in_one_line(score: Any, told: str) -> None:
    with pytest.raises(OptionError) as caught:
        _scored(score, *_pair(4, 3))
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)


def test_metric_is_called_by_its_name() -> None:
    assert (named("kl"), named(_first)) == ("kl", "_first")
    assert described("kl") == "kl error"
    assert described("accuracy") == "loss of accuracy"


def test_function_is_a_metric_only_where_own_ones_are_allowed() -> None:
    check_metric(_first, own=True)
    with pytest.raises(OptionError, match="metric is <function _first"):
        check_metric(_first)


def test_metric_of_an_output_without_axes_is_one_sample() -> None:
    tally = Tally("relative")
    tally.add(np.array(2.0), np.array(1.0))
    found = tally.measurement()
    assert (found.error, found.samples) == (0.5, 1)


def test_metric_of_one_number_a_sample_counts_samples() -> None:
    f, g = _pair(8)
    tally = Tally("relative")
    tally.add(f, g)
    found = tally.measurement()
    assert found.error == pytest.approx(np.linalg.norm(f - g) / np.linalg.norm(f))
    assert found.samples == 8


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32])
def test_metric_of_narrow_outputs_is_computed_in_float64(dtype: npt.DTypeLike) -> None:
    f = np.full((4, 3), 300, dtype)  # 300 squared overflows float16
    g = np.full((4, 3), 270, dtype)
    expected = float(abs(g[0, 0].astype(np.float64) - 300) / 300)
    assert _measured("relative", f, g) == pytest.approx(expected)


@pytest.mark.parametrize("metric", NAMES)
def test_metric_of_nan_is_no_small_error(metric: str) -> None:
    f, g = _pair(4, 5)
    g[1] = np.nan
    f[1] = [9, 0, 0, 0, 0]  # numpy's argmax of NaN is place 0 too
    error = _measured(metric, f, g)
    assert math.isnan(error) or error > _measured(metric, f[[0, 2, 3]], g[[0, 2, 3]])


def test_relative_error_of_an_original_that_is_zero_is_no_zero() -> None:
    assert _measured("relative", np.zeros((3, 4)), np.ones((3, 4))) > 0


def test_cosine_of_equal_zero_vectors_is_zero() -> None:
    f, _ = _pair(4, 5)
    f[2] = 0
    assert _measured("cosine", f, f.copy()) == pytest.approx(0, abs=1e-12)


def test_kl_of_logits_with_excluded_classes_is_finite() -> None:
    f, g = _pair(4, 5)
    f[:, 0] = g[:, 0] = -np.inf
    assert _measured("kl", f, g) == pytest.approx(_direct("kl", f[:, 1:], g[:, 1:]))


@pytest.mark.parametrize("metric", NAMES)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_metric_of_an_output_that_lost_a_value_is_infinite(metric: str, bad: float) -> None:
    f, g = _pair(4, 5)
    g[1, 2] = bad
    tally = Tally(metric)
    tally.add(f, g)
    found = tally.measurement()
    assert found.error == math.inf
    assert not found.keeps(1e9, 2.0)
    tally.add(np.where(np.isfinite(g), f, np.nan), g)  # the original holds NaN: not to be told
    assert math.isnan(tally.measurement().error)


@pytest.mark.parametrize("metric", ["relative", "cosine"])
def test_metric_of_equal_zeros_is_zero(metric: str) -> None:
    zeros = np.zeros((3, 2, 4))
    assert _measured(metric, zeros, zeros) == 0
    assert _measured(metric, zeros, zeros + 1) >= 1


@pytest.mark.parametrize("metric", NAMES)
@pytest.mark.parametrize("width", [1, 3])
def test_metric_of_outputs_of_other_shapes_is_refused(metric: str, width: int) -> None:
    with pytest.raises(DataError, match=rf"shape.*\(4, 5\).*\(4, {width}\)"):
        Tally(metric).add(np.ones((4, 5)), np.ones((4, width)))


@pytest.mark.parametrize("call", [check_metric, Tally])
def test_unknown_metric_is_one_line_that_names_the_allowed(call: object) -> None:
    assert callable(call)
    with pytest.raises(OptionError) as caught:
        call("mse")
    message = str(caught.value)
    assert "\n" not in message
    assert "'mse'" in message
    assert all(name in message for name in NAMES)
