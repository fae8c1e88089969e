"""tanh within Inductor: in C++ kernels as arithmetic that they vectorise, on GPUs the hardware's.

Inductor computes tanh on a CPU by one accurate call a lane, which costs more than the whole norm.
While it traces a model, the operators of `nn` call `dyt::tanh` instead, whose lowering is below;
eager torch, `torch.export` and ONNX never meet it. Gradients are those of tanh: g (1 - y²).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from torch._inductor import config, virtualized
from torch._inductor.lowering import make_pointwise, register_lowering

from .dyt import DOMAIN

__all__ = ["RATIONALS", "Rational", "tanh", "wide"]

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
    torch.bfloat16: Rational(
        4.1,
        (12.6223078, 1.0),
        (12.6305065, 5.16687965, 0.074977003),
    ),
    torch.float16: Rational(
        5.2,
        (1544.12061, 156.933441, 1.0),
        (1544.21545, 671.02887, 19.4330902),
    ),
    torch.float32: Rational(
        8.6,
        (4.9436287e10, 6.39845837e9, 145659088.0, 469994.969, -668.539246, 1.0),
        (4.94362911e10, 2.28771983e10, 1.17991654e9, 11453460.0),
        capped=True,
    ),
}  # fmt: skip
"""By the dtype of the result, printed by `python -m benchmarks.tanh_fit`.

The error is below 5e-7 for float32; for bfloat16 and float16 below half an ulp of tanh, so that the
rounded result is off by less than one.
"""

HARDWARE = "tanh.approx.f32 $0, $1;"
"""PTX, from compute capability 7.5 on: relative error 2^-11, so enough for bfloat16 alone."""


def tanh(z: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """tanh of a float32 z, exact enough for a result that is rounded to `dtype`."""
    if not _has_a_form(z.device, dtype):
        return torch.tanh(z)
    found: torch.Tensor = torch.ops.dyt.tanh(z, dtype)
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


def _has_a_form(device: torch.device, dtype: torch.dtype) -> bool:
    if device.type == "cpu":
        return config.cpu_backend == "cpp" and dtype in RATIONALS
    hardware = device.type == "cuda" and config.cuda_backend == "triton" and not torch.version.hip
    return (
        hardware and dtype is torch.bfloat16 and torch.cuda.get_device_capability(device) >= (7, 5)
    )


_library = torch.library.Library(DOMAIN, "FRAGMENT")
_library.define("tanh(Tensor z, ScalarType dtype) -> Tensor", tags=(torch.Tag.pointwise,))
_library.impl("tanh", lambda z, dtype: torch.tanh(z), "CompositeExplicitAutograd")
_library.define("held(Tensor x) -> Tensor", tags=(torch.Tag.pointwise,))
_library.impl("held", lambda x: x.to(torch.float32, copy=True), "CompositeExplicitAutograd")


def _keep_result(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    ctx.save_for_backward(output)


def _tanh_backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
    (y,) = ctx.saved_tensors
    return gradient * (1 - y * y), None


def _keep_dtype(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    ctx.dtype = inputs[0].dtype


def _held_backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
    return gradient.to(ctx.dtype)


torch.library.register_autograd(
    f"{DOMAIN}::tanh", _tanh_backward, setup_context=_keep_result, lib=_library
)
torch.library.register_autograd(
    f"{DOMAIN}::held", _held_backward, setup_context=_keep_dtype, lib=_library
)


def _hardware(z: Any) -> Any:
    return ops.inline_asm_elementwise(z, asm=HARDWARE, constraints="=f,f", dtype=torch.float32)


@register_lowering(torch.ops.dyt.tanh.default, type_promotion_kind=None)
def _lower_tanh(z: Any, dtype: torch.dtype) -> Any:
    return make_pointwise(RATIONALS[dtype] if z.get_device().type == "cpu" else _hardware)(z)


@register_lowering(torch.ops.dyt.held.default, type_promotion_kind=None)
def _lower_held(x: Any) -> Any:
    widened = make_pointwise(
        lambda value: ops.to_dtype(value, torch.float32), override_return_dtype=torch.float32
    )(x)
    widened.realize()
    return widened
