"""Numbers of every form, dtype, layout and size, against float64; the kernel runs on the CPU."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import pytest

from dyt_compile.dyt import Form

from .host import BF16, FP8, INT8, OUTPUT_DTYPES, Array, Host, aligned
from .reference import (
    HARDWARE_TANH,
    OPERATORS,
    ROUNDING,
    SMALLEST,
    added,
    outside,
    quantized,
    samples,
)

DTYPES = [np.dtype(np.float32), np.dtype(np.float16), BF16]
NARROW = DTYPES[1:]
QUANTIZED = [INT8, FP8]
ERRORS = [0.0, HARDWARE_TANH * 0.9999, -HARDWARE_TANH * 0.9999]
"""Of the hardware's tanh, in whose place the host puts one with such a relative error."""

CASES = [
    pytest.param(operator, dtype, out, id=f"{operator.name}-{dtype}-{out}")
    for operator in OPERATORS
    for dtype in DTYPES
    for out in (QUANTIZED if operator.quantized else [dtype])
]
DYT, ADD_DYT, ADD_DERF = (
    next(o for o in OPERATORS if o.name == name) for name in ("DyT", "AddDyT", "AddDerf")
)
ADD_DYT_QUANTIZE = next(o for o in OPERATORS if o.name == "AddDyTQuantize")
BARE = next(o for o in OPERATORS if o.name == "DyTBare")
BARE_QUANTIZE = next(o for o in OPERATORS if o.name == "DyTBareQuantize")


def computed(
    host: Host,
    operator: Form,
    inputs: dict[str, Array],
    out: np.dtype[Any] | None = None,
    offset: int = 0,
) -> list[Array]:
    """The outputs of the plugin: y, and the sum where there is a residual."""
    x = inputs["x"]
    out = out or x.dtype
    outputs = [aligned(x.shape, out, offset and max(offset, out.itemsize))]
    if operator.residual:
        outputs.append(aligned(x.shape, x.dtype, offset and max(offset, x.dtype.itemsize)))
    for output in outputs:
        output.view(np.uint8)[...] = 0xA5 if output.size else 0
    host.run(
        operator.name,
        [inputs[name] for name in operator.inputs],
        outputs,
        OUTPUT_DTYPES[out] if operator.quantized else 0,
    )
    return outputs


def check(
    host: Host,
    operator: Form,
    inputs: dict[str, Array],
    out: np.dtype[Any] | None = None,
    offset: int = 0,
) -> None:
    y, *sums = computed(host, operator, inputs, out, offset)
    wrong = outside(operator, inputs, y)
    assert not wrong.any(), f"{wrong.sum()} of {wrong.size} are wrong, first {np.argmax(wrong)}"
    for total in sums:
        np.testing.assert_array_equal(total.view(np.uint8), added(inputs).view(np.uint8))


@pytest.mark.parametrize(("operator", "dtype", "out"), CASES)
@pytest.mark.parametrize("error", ERRORS)
def test_every_form_and_dtype_matches_float64(
    host: Host, operator: Form, dtype: np.dtype[Any], out: np.dtype[Any], error: float
) -> None:
    with host.setting("tanh_error", error, 0):
        for per_channel in (False, True):
            inputs = samples(operator, (3, 5, 64), dtype, per_channel=per_channel)
            check(host, operator, inputs, out)


@pytest.mark.parametrize(("operator", "dtype", "out"), CASES)
@pytest.mark.parametrize("shape", [(2, 6, 4, 8), (2, 5, 3, 7)], ids=str)
def test_channels_first_matches_float64(
    host: Host,
    operator: Form,
    dtype: np.dtype[Any],
    out: np.dtype[Any],
    shape: tuple[int, ...],
) -> None:
    for per_channel in (False, True):
        inputs = samples(operator, shape, dtype, axis=-3, per_channel=per_channel)
        check(host, operator, inputs, out)


SHAPES = [
    (1,), (7,), (16,), (1, 1), (3, 1), (1, 17), (2, 48), (2, 3, 1000), (5, 4096), (2, 4104),
    (300, 16), (257, 2, 3), (1, 2, 3, 4, 5, 6, 32),
]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_odd_sizes_match_float64(host: Host, dtype: np.dtype[Any], shape: tuple[int, ...]) -> None:
    for operator in (ADD_DYT, BARE, ADD_DERF):
        check(host, operator, samples(operator, shape, dtype))
    check(host, ADD_DYT_QUANTIZE, samples(ADD_DYT_QUANTIZE, shape, dtype), INT8)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("offset", [1, 4, 8])
def test_unaligned_pointers_match_float64(host: Host, dtype: np.dtype[Any], offset: int) -> None:
    offset = max(offset, dtype.itemsize)
    for operator, out in ((DYT, dtype), (ADD_DYT, dtype), (ADD_DYT_QUANTIZE, FP8)):
        inputs = samples(operator, (3, 64), dtype, offset=offset)
        check(host, operator, inputs, out, offset)


@pytest.mark.parametrize("only", ["x", "residual", "gamma", "beta", "alpha"])
def test_one_unaligned_pointer_is_enough_for_the_narrow_path(host: Host, only: str) -> None:
    inputs = samples(ADD_DYT, (4, 512), BF16, per_channel=True)
    check(host, ADD_DYT, inputs)
    assert host.shape[3] == 64  # eight elements a thread
    moved = aligned(inputs[only].shape, inputs[only].dtype, 4)
    moved[...] = inputs[only]
    check(host, ADD_DYT, {**inputs, only: moved})
    assert host.shape[0] * host.shape[3] == 512  # one


@pytest.mark.parametrize("name", ["gamma", "beta", "shift", "alpha"])
def test_one_value_for_all_channels_matches_float64(host: Host, name: str) -> None:
    inputs = samples(ADD_DERF, (3, 64), BF16, per_channel=True)
    inputs[name] = inputs[name][:1].copy()
    check(host, ADD_DERF, inputs)


@pytest.mark.parametrize("shape", [(0, 8), (3, 0), (2, 0, 8)], ids=str)
def test_nothing_is_launched_for_no_elements(host: Host, shape: tuple[int, ...]) -> None:
    before = host.launches
    inputs = samples(DYT, shape, BF16)
    check(host, DYT, inputs)
    assert host.launches == before


def test_scale_of_the_quantizer_may_be_a_scalar(host: Host) -> None:
    inputs = samples(ADD_DYT_QUANTIZE, (3, 64), BF16)
    inputs["y_scale"] = inputs["y_scale"].reshape(())
    check(host, ADD_DYT_QUANTIZE, inputs, INT8)


def every(dtype: np.dtype[Any]) -> Array:
    """All 65,536 numbers of a dtype of two bytes."""
    return np.arange(65536, dtype=np.uint16).view(dtype).reshape(256, 256)


@pytest.mark.parametrize("dtype", NARROW, ids=str)
@pytest.mark.parametrize("error", ERRORS)
def test_all_narrow_inputs_keep_the_bound(host: Host, dtype: np.dtype[Any], error: float) -> None:
    """tanh of each of the 65,536 numbers: 2^-11 of the hardware and one rounding, relative."""
    x = every(dtype)
    inputs = {"x": x, "alpha": np.ones(1, np.float32)}
    with host.setting("tanh_error", error, 0):
        (y,) = computed(host, BARE, inputs)
    with np.errstate(invalid="ignore"):
        exact, found = np.tanh(x.astype(np.float64)), y.astype(np.float64)
    np.testing.assert_array_equal(np.isnan(found), np.isnan(exact))
    defined = ~np.isnan(exact)
    bound = (
        np.abs(exact) * (HARDWARE_TANH + ROUNDING[dtype] * (1 + HARDWARE_TANH)) + SMALLEST[dtype]
    )
    assert (np.abs(found - exact) <= bound)[defined].all()


@pytest.mark.parametrize("dtype", NARROW, ids=str)
@pytest.mark.parametrize("operator", [DYT, ADD_DERF], ids=lambda operator: operator.name)
@pytest.mark.parametrize("error", ERRORS)
def test_all_narrow_inputs_keep_the_bound_with_parameters(
    host: Host, dtype: np.dtype[Any], operator: Form, error: float
) -> None:
    inputs = samples(operator, (256, 256), dtype)
    x = every(dtype)
    with np.errstate(invalid="ignore"):
        inputs["x"] = np.where(np.isfinite(x), x, dtype.type(0))
    if "residual" in inputs:
        inputs["residual"] = np.zeros_like(inputs["x"])
    with host.setting("tanh_error", error, 0), np.errstate(over="ignore"):
        check(host, operator, inputs)


@pytest.mark.parametrize("out", QUANTIZED, ids=str)
def test_quantizer_rounds_ties_to_even_and_saturates(host: Host, out: np.dtype[Any]) -> None:
    """tanh is 1 here, so that beta + gamma is the value: every half, and far beyond the range."""
    operator = next(o for o in OPERATORS if o.name == "DyTQuantize")
    halves = np.arange(-1200, 1200, dtype=np.float32) / 2
    for scale in (1.0, 0.125, 3.0):
        inputs = {
            "x": np.full((1, 2400), 50, np.float32),
            "alpha": np.ones(1, np.float32),
            "gamma": np.ones(2400, np.float32),
            "beta": (halves * np.float32(scale) - 1).astype(np.float32),
            "y_scale": np.array([scale], np.float32),
        }
        (y,) = computed(host, operator, inputs, out)
        exact = (inputs["beta"] + np.float32(1)) / np.float32(scale)
        np.testing.assert_array_equal(y.astype(np.float64)[0], quantized(exact, np.ones(1), out))


def test_division_by_the_scale_is_correctly_rounded(host: Host) -> None:
    """Where one step is an ulp of float32, FP8 shows which side of a tie the quotient lies on."""
    rng = np.random.default_rng(3)
    operator = next(o for o in OPERATORS if o.name == "DyTQuantize")
    for scale in rng.uniform(0.001, 9, 20).astype(np.float32):
        ties = (rng.integers(0, 126, 4096).astype(np.float32) + np.float32(0.5)) * scale
        beta = np.nextafter(ties, rng.choice([-np.inf, np.inf], 4096).astype(np.float32))
        inputs = {
            "x": np.zeros((1, 4096), np.float32),
            "alpha": np.ones(1, np.float32),
            "gamma": np.ones(4096, np.float32),
            "beta": beta,
            "y_scale": np.array([scale], np.float32),
        }
        (y,) = computed(host, operator, inputs, INT8)
        np.testing.assert_array_equal(y[0], np.rint(beta / scale).astype(np.int8))


def test_not_a_number_stays_one_or_is_the_least_integer(host: Host) -> None:
    inputs = samples(BARE_QUANTIZE, (2, 64), BF16)
    inputs["x"][0, :3] = [np.nan, np.inf, -np.inf]
    (y,) = computed(host, BARE_QUANTIZE, inputs, FP8)
    assert np.isnan(y[0, 0].astype(np.float32))
    (y,) = computed(host, BARE_QUANTIZE, inputs, INT8)
    assert y[0, 0] == -128
    assert list(y[0, 1:3]) == [48, -48]  # 1 / 0.021 is 47.6


def test_check_of_the_numbers_can_fail(host: Host) -> None:
    for dtype in NARROW:
        inputs = samples(DYT, (64, 64), dtype)
        inputs["beta"][...] = 0
        with host.setting("tanh_error", 4 * HARDWARE_TANH, 0):
            (y,) = computed(host, DYT, inputs)
        assert outside(DYT, inputs, y).any()
    inputs = samples(ADD_DYT, (64, 64), np.dtype(np.float32))
    y, _ = computed(host, ADD_DYT, inputs)
    assert not outside(ADD_DYT, inputs, y).any()
    assert outside(ADD_DYT, inputs, y * np.float32(1 + 1e-6)).any()
    assert outside(ADD_DYT, inputs, np.roll(y, 1)).any()
    inputs = samples(ADD_DYT_QUANTIZE, (64, 64), BF16)
    y, _ = computed(host, ADD_DYT_QUANTIZE, inputs, INT8)
    assert outside(ADD_DYT_QUANTIZE, inputs, y + np.int8(1)).any()


def test_more_than_65535_channels_first_are_reached(host: Host) -> None:
    check(host, ADD_DYT, samples(ADD_DYT, (1, 70001, 2), BF16, axis=-2, per_channel=True))
    assert host.shape[2] == 65535


@pytest.mark.parametrize(
    ("operator", "shape"),
    [
        # 65,535 blocks of a row: the last block ends with the last row
        pytest.param(DYT, (65535 * 33, 1024), id="rows"),
        pytest.param(BARE, (2**31 + 2**20,), id="one row"),
        pytest.param(BARE, (2**31 + 257,), id="one row of an odd size"),
    ],
)
def test_elements_beyond_two_to_the_31_are_reached(
    host: Host, operator: Form, shape: tuple[int, ...]
) -> None:
    """The last block alone is run, over memory that is reserved but hardly touched."""
    x, y = np.zeros(shape, np.float16), np.zeros(shape, np.float16)
    assert x.size > 2**31
    last = (1, 1024) if len(shape) > 1 else (1,)
    inputs = samples(operator, last, x.dtype, seed=1)
    x.reshape(-1)[-inputs["x"].size :] = inputs["x"].reshape(-1)
    with host.setting("last_blocks", 1, -1, ctypes.c_longlong):
        host.run(operator.name, [x, *(inputs[name] for name in operator.inputs[1:])], [y])
    found = y.reshape(-1)[-inputs["x"].size :].reshape(last)
    assert found.any()
    assert not outside(operator, inputs, found).any()
