"""The life of a plugin, where it goes wrong: each step that refuses says what, and why."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import pytest

from .host import BF16, Array, Host, StepError
from .reference import OPERATORS, samples

ADD_DYT = next(o for o in OPERATORS if o.name == "AddDyT")
SHAPE = (2, 3, 16)


def led(host: Host, name: str = "AddDyT", output_dtype: int = 0, **changed: Array) -> None:
    """Lead a plugin over bf16 inputs of which some are changed."""
    inputs = {**samples(ADD_DYT, SHAPE, BF16), **changed}
    outputs = [np.empty(SHAPE, inputs["x"].dtype) for _ in range(2)]
    host.run(name, list(inputs.values()), outputs, output_dtype)


def ones(*shape: int, dtype: Any = BF16) -> Array:
    return np.ones(shape, dtype)


def test_life_of_a_sound_plugin_ends_well(host: Host) -> None:
    led(host)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"gamma": ones(15)}, "gamma has shape [15] for x of shape [?, 3, 16]"),
        ({"beta": ones(3, 1)}, "beta has shape [3, 1] for x of shape [?, 3, 16]"),
        ({"gamma": ones(3, 16)}, "gamma has shape [3, 16]"),
        ({"gamma": ones(16, 1, 1, 1)}, "gamma has shape [16, 1, 1, 1]"),
        ({"alpha": ones(17, dtype=np.float32)}, "alpha has shape [17]"),
        ({"residual": ones(2, 3, 8)}, "residual has shape [?, 3, 8]"),
        ({"residual": ones(3, 16)}, "allowed: the shape of x"),
    ],
)
def test_wrong_shape_is_named_when_the_plugin_is_configured(
    host: Host, changed: dict[str, Array], message: str
) -> None:
    with pytest.raises(StepError) as failed:
        led(host, **changed)
    assert failed.value.step == "configure"
    assert f"dyt::AddDyT: {message}" in str(failed.value) or message in str(failed.value)


def test_shapes_with_leading_ones_are_taken(host: Host) -> None:
    led(host, gamma=ones(1, 1, 16), beta=ones(1, 1, 1), alpha=ones(1, 16, dtype=np.float32))


def test_shape_that_differs_at_run_time_only_is_refused_then(host: Host) -> None:
    with pytest.raises(StepError) as failed:
        led(host, residual=ones(5, 3, 16))
    assert failed.value.step == "shape change"
    assert "residual has shape [5, 3, 16] for x of shape [2, 3, 16]" in str(failed.value)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("x", np.int32), ("alpha", np.float16), ("gamma", np.float32), ("residual", np.float16)],
)
def test_wrong_dtype_has_no_format(host: Host, name: str, dtype: Any) -> None:
    inputs = samples(ADD_DYT, SHAPE, BF16)
    with pytest.raises(StepError) as failed:
        led(host, **{name: inputs[name].astype(dtype)})
    assert failed.value.step == "format"


def test_format_that_is_not_linear_is_refused(host: Host) -> None:
    inputs = samples(ADD_DYT, SHAPE, BF16)
    with pytest.raises(StepError) as failed:
        host.run(
            "AddDyT",
            list(inputs.values()),
            [np.empty(SHAPE, BF16), np.empty(SHAPE, BF16)],
            linear=False,
        )
    assert failed.value.step == "format"


def test_wrong_number_of_inputs_is_named(host: Host) -> None:
    inputs = samples(ADD_DYT, SHAPE, BF16)
    del inputs["beta"]
    with pytest.raises(StepError, match="4 inputs are given; it takes x, residual, alpha"):
        host.run("AddDyT", list(inputs.values()), [np.empty(SHAPE, BF16)] * 2)


@pytest.mark.parametrize("output_dtype", [0, 1, 2, 23])
def test_output_dtype_that_is_no_quantized_type_creates_no_plugin(
    host: Host, output_dtype: int
) -> None:
    with pytest.raises(StepError, match=f"output_dtype is {output_dtype}; allowed: 3 .INT8. and"):
        led(host, "AddDyTQuantize", output_dtype)


def test_output_dtype_of_a_plain_form_is_ignored(host: Host) -> None:
    led(host, output_dtype=3)


def test_launch_that_fails_is_named(host: Host) -> None:
    with (
        host.setting("launch_status", 2, 0, ctypes.c_int),
        pytest.raises(StepError, match="the kernel was not launched: the stub was told to fail"),
    ):
        led(host)


def test_unknown_name_has_no_creator(host: Host) -> None:
    with pytest.raises(StepError, match="no creator"):
        led(host, "AddDyTBias")
