"""Samples of every bad kind: refused in one line, or every value of a fit is finite."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

import dyt_compile
from dyt_compile import Calibration, calibrate, convert
from dyt_compile.errors import BudgetError, DataError
from dyt_compile.fits import NOT_FINITE, fit_diagonal

from .report.models import WIDTH, norms

pytestmark = pytest.mark.core

Array = np.ndarray[Any, Any]

NAMES = ("first", "second", "last")

VALUES = (np.nan, np.inf, -np.inf, 0.0, 1e-45, 1e-20, 1e20, 3e38, -3e38, 65504.0, 1e9)
"""Each is put into one place, one channel, one token, one sample, or everywhere."""

WHERE: Mapping[str, Any] = {
    "value": np.s_[3, 1, 2],
    "channel": np.s_[:, :, 2],
    "token": np.s_[:, 0],
    "sample": np.s_[3],
    "most": np.s_[1:],
    "everywhere": np.s_[...],
}


@cache
def model() -> Path:
    path = Path(mkdtemp()) / "model.onnx"
    path.write_bytes(norms(NAMES).SerializeToString())
    return path


def samples(count: int = 16, seed: int = 0) -> Array:
    random = np.random.default_rng(seed)
    sizes = random.uniform(0.5, 2.0, (count, 4, 1))
    return np.asarray(sizes * random.normal(size=(count, 4, WIDTH)), np.float32)


def check_finite(calibration: Calibration) -> None:
    """Every value that a calibration holds is finite, and what has none has a reason."""
    for name, fit in calibration.fits.items():
        assert (fit.parameters is None) == bool(fit.reason), name
        for part, array in fit.arrays().items():
            assert np.isfinite(array).all(), (name, part)
        if fit.parameters is not None:
            assert fit.fit_error is not None
            assert np.isfinite(fit.fit_error), name
    for name, moved in calibration.refits.items():
        assert np.isfinite(moved.mix.matrix).all(), name
        assert np.isfinite(moved.mix.offset).all(), name


def check_message(error: Exception) -> None:
    assert "\n" not in str(error)
    assert len(str(error)) < 400


def check_report(result: dyt_compile.Conversion) -> None:
    for site in result.report.sites:
        assert site.converted or site.reason, site.name


@dataclass(frozen=True)
class Bad:
    """Samples with some values in some places, in some type."""

    changes: tuple[tuple[str, float], ...]
    dtype: str
    count: int

    def array(self) -> Array:
        array = samples(self.count)
        for where, value in self.changes:
            if self.count > 3:
                array[WHERE[where]] = value
        with np.errstate(all="ignore"):
            return array.astype(self.dtype)


bad = st.builds(
    Bad,
    st.lists(st.tuples(st.sampled_from(sorted(WHERE)), st.sampled_from(VALUES)), max_size=3).map(
        tuple
    ),
    st.sampled_from(["f4", "f4", "f4", "f8", "f2", "i8", "u1", "?", "c8"]),
    st.sampled_from([16, 16, 16, 0, 1, 2, 5]),
)


@pytest.mark.parametrize("fit", ["auto", "full"])
@settings(max_examples=25)
@example(Bad((("everywhere", 0.0),), "f4", 16))
@example(Bad((("channel", 3e38),), "f4", 16))
@example(Bad((("token", 1e9),), "f4", 16))
@example(Bad((("value", np.nan),), "f4", 16))
@given(bad)
def test_samples_of_any_kind_are_refused_or_give_finite_fits(fit: str, data: Bad) -> None:
    try:
        check_finite(calibrate(model(), [(data.array(),)], fit=fit))
    except DataError as error:
        check_message(error)


@settings(max_examples=25)
@example(Bad((("sample", np.nan),), "f4", 16), "budget")
@example(Bad((("everywhere", 0.0),), "f4", 16), "all")
@given(bad, st.sampled_from(["all", "budget"]))
def test_conversion_by_samples_of_any_kind_ends(data: Bad, mode: str) -> None:
    try:
        result = convert(model(), [(data.array(),)], mode=mode, budget=0.1)
    except (DataError, BudgetError) as error:
        check_message(error)
        return
    check_report(result)
    assert result.calibration is not None
    check_finite(result.calibration)


numbers = st.floats(width=32, allow_nan=True, allow_infinity=True)
rows = st.integers(0, 40)


@settings(max_examples=100)
@given(st.data(), rows, st.integers(1, 4))
def test_diagonal_fit_of_any_numbers_is_finite_or_says_why(
    data: st.DataObject, count: int, channels: int
) -> None:
    pool = np.array(data.draw(st.lists(numbers, min_size=1, max_size=6)), np.float32)
    random = np.random.default_rng(data.draw(st.integers(0, 9)))
    x, y = (random.choice(pool, (count, channels)) for _ in range(2))
    with np.errstate(all="ignore"):
        fit = fit_diagonal(x, y)
    if isinstance(fit, str):
        assert fit
        return
    for array in fit.parameters.named().values():
        assert np.isfinite(array).all()
    assert np.isfinite(fit.error)


def test_site_that_reads_nan_keeps_its_norm_and_says_so() -> None:
    x = samples()
    x[3, 1, 2] = np.nan
    result = convert(model(), [(x,)], mode="all")
    assert {site.reason for site in result.report.sites} == {NOT_FINITE}
    assert result.report.converted == 0


def test_constant_channels_and_constant_samples_are_told_apart() -> None:
    x = samples()
    x[:, :, :4] = 0.25
    assert convert(model(), [(x,)], mode="all").report.converted == len(NAMES)
    x[...] = np.arange(WIDTH)
    result = convert(model(), [(x,)], mode="all")
    assert result.report.sites[0].reason == "its input does not vary over the data"


def _half() -> onnx.ModelProto:
    """x + the LayerNorm of 300 x, in fp16."""
    half = TensorProto.FLOAT16
    nodes = [
        helper.make_node("Mul", ["x", "much"], ["large"]),
        helper.make_node("LayerNormalization", ["large", "norm.weight"], ["y"]),
    ]
    ends = [helper.make_tensor_value_info(n, half, ["batch", 4, WIDTH]) for n in "xy"]
    weights = [
        onnx.numpy_helper.from_array(np.array(300, np.float16), "much"),
        onnx.numpy_helper.from_array(np.ones(WIDTH, np.float16), "norm.weight"),
    ]
    graph = helper.make_graph(nodes, "half", ends[:1], ends[1:], weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def test_one_sample_is_too_few_to_convert_and_its_rows_to_fit() -> None:
    with pytest.raises(DataError, match="1 samples; at least 4"):
        convert(model(), [(samples(1),)])
    fits = calibrate(model(), [(samples(1),)]).fits
    assert {fit.parameters for fit in fits.values()} == {None}
    assert {fit.reason for fit in fits.values()} == {
        "4 rows of activations are too few to fit; at least 8"
    }


def test_huge_activations_keep_the_norm_and_say_so() -> None:
    x = samples()
    x[3, 1, 2] = 1e13
    result = convert(model(), [(x,)], mode="all")
    assert {site.reason for site in result.report.sites} == {
        "its activations reach 1e+13; up to 1e+12 are fitted"
    }


def test_overflow_of_fp16_keeps_the_norm_and_says_so(tmp_path: Path) -> None:
    (tmp_path / "half.onnx").write_bytes(_half().SerializeToString())
    x = samples()
    result = convert(tmp_path / "half.onnx", [(x.astype(np.float16),)], mode="all")
    assert result.report.converted == 1
    x[0, 0, 0] = 1000
    result = convert(tmp_path / "half.onnx", [(x.astype(np.float16),)], mode="all")
    assert [site.reason for site in result.report.sites] == [NOT_FINITE]


def test_batches_of_unequal_sizes_give_the_fits_of_one() -> None:
    x = samples()
    whole = calibrate(model(), [(x,)])
    ragged = calibrate(model(), [(x[:1],), (x[1:9],), (x[9:],)])
    for name, fit in whole.fits.items():
        for part, array in fit.arrays().items():
            other = ragged.fits[name].arrays()[part]
            np.testing.assert_allclose(other, array, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "batch",
    [
        {"z": samples()}, {"x": samples(), "z": samples()}, {}, (), (samples(), samples()),
        (samples()[:, :, :15],), (samples()[:, :3],), (samples()[..., None],), (samples()[:, 0],),
        (np.array(["a"] * 16),), (samples().astype("c8"),), (np.array([None] * 16),), ("x",), 3,
        (samples()[:0],), ([[1.0, 2.0], [3.0]],), (None,),
    ],
    ids=range(17),
)  # fmt: skip
@pytest.mark.parametrize("call", [calibrate, convert])
def test_batch_of_another_form_is_refused_in_one_line(batch: Any, call: Any) -> None:
    with pytest.raises(DataError) as caught:
        call(model(), [batch])
    check_message(caught.value)
