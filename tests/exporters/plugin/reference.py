"""What a plugin must compute, in float64, and how far from it each dtype may be."""

from __future__ import annotations

from collections.abc import Callable
from math import erf
from typing import Any

import numpy as np
import numpy.typing as npt

from dyt_compile.dyt import FORMS, FUSED, Form

from .host import BF16, FP8, INT8, aligned

Array = npt.NDArray[Any]

HARDWARE_TANH = 2.0**-11
"""Largest relative error of tanh.approx.f32 (PTX ISA 9, section tanh)."""
ACCURATE = 2.0**-22
"""2 ulp of float32: tanhf and erff (CUDA C++ Programming Guide, mathematical functions)."""
FLOAT32 = 2.0**-24
"""One rounding of float32, relative."""

ROUNDING = {np.dtype(np.float32): 2.0**-24, np.dtype(np.float16): 2.0**-11, BF16: 2.0**-8}
"""One rounding to a dtype, relative."""
SMALLEST = {np.dtype(np.float32): 2.0**-150, np.dtype(np.float16): 2.0**-25, BF16: 2.0**-134}
"""One rounding among the subnormal numbers."""

LARGEST = {INT8: (-128.0, 127.0), FP8: (-448.0, 448.0)}


OPERATORS = [*FORMS.values(), *FUSED.values()]

exact_erf: Callable[[Array], Array] = np.vectorize(erf, otypes=[np.float64])


def samples(
    operator: Form,
    shape: tuple[int, ...],
    dtype: np.dtype[Any],
    *,
    axis: int = -1,
    per_channel: bool = False,
    offset: int = 0,
    seed: int = 0,
) -> dict[str, Array]:
    """Random inputs. alpha and shift: [1], or along `axis` like gamma and beta if per_channel."""
    rng = np.random.default_rng(seed)
    along = [shape[axis], *[1] * (-axis - 1)]
    made = {}
    for name in operator.inputs:
        size: tuple[int, ...] = tuple(along)
        kind = np.dtype(np.float32)
        if name in ("x", "residual"):
            size, kind = shape, dtype
        elif name in ("gamma", "beta"):
            kind = dtype
        elif name == "y_scale" or not per_channel:
            size = (1,)
        values = rng.standard_normal(size)
        if name == "alpha":
            values = 0.5 + np.abs(values)
        if name == "y_scale":
            values = np.full(size, 0.021)
        made[name] = aligned(size, kind, offset and max(offset, kind.itemsize))
        made[name][...] = values.astype(np.float32).astype(kind)
    return made


def added(inputs: dict[str, Array]) -> Array:
    """x, or x + residual rounded once to their dtype."""
    x = inputs["x"]
    if "residual" not in inputs:
        return x
    return (x.astype(np.float64) + inputs["residual"].astype(np.float64)).astype(x.dtype)


def expected(operator: Form, inputs: dict[str, Array]) -> tuple[Array, Array]:
    """The value before rounding, in float64, and the error allowed: of the squash and of float32.

    The kernel works in float32: one rounding each of alpha * x, and of what gamma and beta make.
    """
    wide = {name: value.astype(np.float64) for name, value in inputs.items()}
    argument = wide["alpha"] * added(inputs).astype(np.float64)
    narrow = inputs["x"].dtype.itemsize < 4
    if operator.squash == "erf":
        argument = argument + wide["shift"]
        squashed = exact_erf(argument)
        relative = ACCURATE
        # erf'(z) <= 2 / sqrt(pi): what a rounding of its argument moves.
        absolute = 1.13 * FLOAT32 * np.abs(argument) * np.exp(-np.square(argument))
    else:
        squashed = np.tanh(argument)
        relative = HARDWARE_TANH if narrow else ACCURATE
        absolute = FLOAT32 * np.abs(argument) / np.square(np.cosh(np.minimum(abs(argument), 300)))
    gamma, beta = wide.get("gamma", np.float64(1)), wide.get("beta", np.float64(0))
    value = gamma * squashed + beta
    error = np.abs(gamma) * (np.abs(squashed) * relative + absolute) * 1.001
    return value, error + 2 * FLOAT32 * np.abs(value) + 2.0**-149


def rounded(value: Array, error: Array, dtype: np.dtype[Any]) -> Array:
    """The error allowed after a rounding to `dtype`."""
    return error + (np.abs(value) + error) * ROUNDING[dtype] + SMALLEST[dtype]


def quantized(value: Array, scale: Array, dtype: np.dtype[Any]) -> Array:
    """value / scale as ONNX's QuantizeLinear stores it, in float64."""
    least, most = LARGEST[dtype]
    steps = np.clip(value / scale.astype(np.float64), least, most)
    return np.rint(steps) if dtype == INT8 else steps.astype(dtype).astype(np.float64)


def outside(
    operator: Form, inputs: dict[str, Array], y: Array, *, slack: float = 1.0
) -> npt.NDArray[np.bool_]:
    """Where y is none of the values that the error bound allows."""
    value, error = expected(operator, inputs)
    found = y.astype(np.float64)
    if not operator.quantized:
        return ~(np.abs(found - value) <= slack * rounded(value, error, y.dtype))
    scale = inputs["y_scale"]
    # One more rounding of float32, that of the division.
    error = slack * (error + FLOAT32 * np.abs(value))
    low, high = (quantized(value + sign * error, scale, y.dtype) for sign in (-1, 1))
    return ~((low <= found) & (found <= high))
