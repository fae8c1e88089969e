"""tanh and erf within Inductor: arithmetic that C++ kernels vectorise; on GPUs the hardware's tanh.

On a CPU Inductor computes both by an accurate call, which costs more than the whole norm. While it
traces a model, the operators of `nn` call `dyt::tanh` and `dyt::erf` instead, whose lowering is
below; eager torch, `torch.export` and ONNX never meet them. Gradients are those of tanh,
g (1 - y²), and of erf, g 2/√π exp(-z²).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from torch._inductor import config, virtualized
from torch._inductor.lowering import make_pointwise, register_lowering

from .dyt import DOMAIN

__all__ = ["RATIONALS", "Rational", "squashed", "wide"]

ops: Any = virtualized.ops


KNOWN_INSIDE = ("2.13", "2.14")
"""Releases of torch that `_teach` was tested with.

Others compute the same formula in more instructions (bfloat16 1.3 times as long), and without fused
products float32 may fall by 6e-7, not 5e-7, where it should grow.
"""

INSTRUCTIONS = {
    "dyt_clip": ("at::vec::clamp({}, {}, {})", "std::min(std::max({}, {}), {})"),
    "dyt_fma": ("at::vec::fmadd({}, {}, {})", "std::fma({}, {}, {})"),
}
"""What Inductor's C++ kernels are taught, for vectors and for single values: clip(z, low, high) and
fma(a, b, c). Its minimum and maximum look for NaN, four instructions each; a clip is two, and keeps
NaN by the order of its operands. Its products and sums are never fused.
"""


def _teach() -> bool:
    """Teach Inductor the operations above; whether this torch is one that takes them."""
    if ".".join(torch.__version__.split(".")[:2]) not in KNOWN_INSIDE:
        return False
    from torch._inductor.codegen.cpp import CppOverrides, CppVecOverrides
    from torch._inductor.dtype_propagation import DtypePropagationOpsHandler
    from torch._inductor.ops_handler import DefaultHandler

    for name, codes in INSTRUCTIONS.items():
        for kind, code in zip((CppVecOverrides, CppOverrides), codes, strict=True):
            written = _written(code)
            written.__name__ = name  # CppVecOverrides finds that of single values by it
            setattr(kind, name, staticmethod(written))
        setattr(DtypePropagationOpsHandler, name, staticmethod(lambda *values: torch.float32))
        setattr(DefaultHandler, name, _handed_on(name))
    return True


def _written(code: str) -> Callable[..., str]:
    return lambda *values: code.format(*values)


def _handed_on(name: str) -> Callable[..., Any]:
    return lambda self, *values: self._default(name, values, {})


TAUGHT = _teach()


def _clip(z: Any, lowest: float, highest: float) -> Any:
    low, high = _constant(lowest), _constant(highest)
    return ops.dyt_clip(z, low, high) if TAUGHT else ops.maximum(ops.minimum(z, high), low)


def _fma(a: Any, b: Any, c: Any) -> Any:
    return ops.dyt_fma(a, b, c) if TAUGHT else a * b + c


def _constant(value: float) -> Any:
    return ops.constant(value, torch.float32)


def _polynomial(coefficients: tuple[float, ...], s: Any) -> Any:
    """By Horner's rule; a highest coefficient of 1 costs nothing."""
    *lower, second, highest = map(_constant, coefficients)
    start = s + second if coefficients[-1] == 1 else _fma(highest, s, second)
    return reduce(lambda total, coefficient: _fma(total, s, coefficient), reversed(lower), start)


@dataclass(frozen=True)
class Rational:
    """z P(z²) / Q(z²) for |z| up to `limit`, where it is 1, and ±1 beyond.

    above, below: coefficients of P and Q, lowest power first; the highest of P is 1. capped:
    whether a result that rounding lifts above 1 is cut, as the step to 16 bits does by itself.
    """

    limit: float
    above: tuple[float, ...]
    below: tuple[float, ...]
    capped: bool = False

    def __call__(self, z: Any) -> Any:
        """The value for a float32 z of Inductor. NaN stays NaN, and the sign of 0 what it is."""
        z = _clip(z, -self.limit, self.limit)
        square = z * z
        t = z * _polynomial(self.above, square) / _polynomial(self.below, square)
        return _clip(t, -1.0, 1.0) if self.capped else t


RATIONALS = {
    ("tanh", torch.bfloat16): Rational(
        4.1,
        (12.6223078, 1.0),
        (12.6305065, 5.16687965, 0.074977003),
    ),
    ("tanh", torch.float16): Rational(
        5.2,
        (1544.12061, 156.933441, 1.0),
        (1544.21545, 671.02887, 19.4330902),
    ),
    ("tanh", torch.float32): Rational(
        8.6,
        (4.9436287e10, 6.39845837e9, 145659088.0, 469994.969, -668.539246, 1.0),
        (4.94362911e10, 2.28771983e10, 1.17991654e9, 11453460.0),
        capped=True,
    ),
    ("erf", torch.bfloat16): Rational(
        2.5,
        (-1781.54321, 77.3458023, -18.996151, 1.0),
        (-1578.17139, -465.903961),
    ),
    ("erf", torch.float16): Rational(
        2.85,
        (37.8423386, 6.54862261, 1.0),
        (33.5387917, 16.9518127, 3.26169014, 0.11393255),
    ),
    ("erf", torch.float32): Rational(
        3.7,
        (44212816.0, 6503533.0, 1810624.38, 92987.8516, 4700.72119, -83.4968109, 1.0),
        (39182588.0, 18824470.0, 3961220.5, 453168.188, 26079.7031),
        capped=True,
    ),
}  # fmt: skip
"""By function and dtype of the result, printed by `python -m benchmarks.rational_fit`.

The error is below 5e-7 for float32; for bfloat16 and float16 below half an ulp of the result, so
that it is off by less than one once it is rounded.
"""

HARDWARE = "tanh.approx.f32 $0, $1;"
"""PTX, from compute capability 7.5 on: relative error 2^-11, so enough for bfloat16 alone."""

EXACT: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {"tanh": torch.tanh, "erf": torch.erf}


def squashed(name: str, z: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """tanh or erf of a float32 z, exact enough for a result that is rounded to `dtype`."""
    if not _has_a_form(name, z.device, dtype):
        return EXACT[name](z)
    found: torch.Tensor = getattr(torch.ops.dyt, name)(z, dtype)
    return found


def wide(value: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """A parameter of fewer axes than x in float32 at least.

    On a CPU as a buffer of its own: else a kernel widens 16 bits anew for every row of x.
    """
    dtype = torch.promote_types(value.dtype, torch.float32)
    if dtype == value.dtype or value.device.type != "cpu" or value.dim() >= x.dim():
        return value.to(dtype)
    found: torch.Tensor = torch.ops.dyt.held(value)
    return found


def _has_a_form(name: str, device: torch.device, dtype: torch.dtype) -> bool:
    if device.type == "cpu":
        return config.cpu_backend == "cpp" and (name, dtype) in RATIONALS
    hardware = device.type == "cuda" and config.cuda_backend == "triton" and not torch.version.hip
    known = name == "tanh" and dtype is torch.bfloat16
    return hardware and known and torch.cuda.get_device_capability(device) >= (7, 5)


def _keep_result(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    ctx.save_for_backward(output)


def _tanh_backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
    (y,) = ctx.saved_tensors
    return gradient * (1 - y * y), None


def _keep_input(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    ctx.save_for_backward(inputs[0])


def _erf_backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
    (z,) = ctx.saved_tensors
    return gradient * (2 / math.sqrt(math.pi)) * torch.exp(-z * z), None


def _keep_dtype(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    ctx.dtype = inputs[0].dtype


def _held_backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
    return gradient.to(ctx.dtype)


def _hardware(z: Any) -> Any:
    return ops.inline_asm_elementwise(z, asm=HARDWARE, constraints="=f,f", dtype=torch.float32)


def _lower_squash(name: str) -> Callable[[Any, torch.dtype], Any]:
    def lower(z: Any, dtype: torch.dtype) -> Any:
        known = RATIONALS[name, dtype] if z.get_device().type == "cpu" else _hardware
        return make_pointwise(known)(z)

    return lower


def _lower_held(x: Any) -> Any:
    widened = make_pointwise(
        lambda value: ops.to_dtype(value, torch.float32), override_return_dtype=torch.float32
    )(x)
    widened.realize()
    return widened


_library = torch.library.Library(DOMAIN, "FRAGMENT")


def _define(
    name: str,
    inputs: str,
    run: Callable[..., torch.Tensor],
    keep: Callable[..., None],
    backward: Callable[..., Any],
    lower: Callable[..., Any],
) -> None:
    """An operator for Inductor alone: what it computes elsewhere, its gradient, its lowering."""
    _library.define(f"{name}({inputs}) -> Tensor", tags=(torch.Tag.pointwise,))
    _library.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_autograd(f"{DOMAIN}::{name}", backward, setup_context=keep, lib=_library)
    overload = getattr(torch.ops.dyt, name).default
    register_lowering(overload, type_promotion_kind=None)(lower)


_define("tanh", "Tensor z, ScalarType dtype", lambda z, dtype: torch.tanh(z),
        _keep_result, _tanh_backward, _lower_squash("tanh"))  # fmt: skip
_define("erf", "Tensor z, ScalarType dtype", lambda z, dtype: torch.erf(z),
        _keep_input, _erf_backward, _lower_squash("erf"))  # fmt: skip
_define("held", "Tensor x", lambda x: x.to(torch.float32, copy=True),
        _keep_dtype, _held_backward, _lower_held)  # fmt: skip
