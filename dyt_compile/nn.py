"""Dynamic Tanh for torch: the operators `torch.ops.dyt.*`, their parameters, and a module.

The operators decompose by themselves: autograd, fake tensors, `torch.export` and Inductor all see
through them, so Inductor fuses them with their neighbours, while an exported graph keeps the name.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from .dyt import ALPHA, DOMAIN, FORMS, PARAMETERS, Form
from .errors import OptionError
from .requirements import check_version
from .tracing import exporting, unobserved, within_inductor

check_version("torch")  # here, since all that works on torch models imports this module

__all__ = ["SQUASHES", "DynamicTanh", "decompositions", "operator", "parameter"]


SQUASHES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "tanh": torch.tanh,
    "erf": torch.erf,
    "hardtanh": torch.nn.functional.hardtanh,
    "sigmoid": torch.sigmoid,
}
"""What may squash: DyT's tanh, Derf's erf, and two that the paper compares (Table 8)."""


def _wide(x: torch.Tensor) -> torch.Tensor:
    """x in the dtype that DyT computes in: float32, or float64 for float64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _tanh(z: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """tanh of a z that is needed no more, exact enough for `dtype`."""
    if not within_inductor() and _numpy_is_faster(z):
        return _tanh_of_numpy(z)
    return _squashed("tanh", z, dtype)


def _squashed(name: str, z: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """tanh or erf of z; within Inductor in a faster form that is exact enough for `dtype`."""
    if not within_inductor():
        return SQUASHES[name](z)
    from . import inductor

    return inductor.squashed(name, z, dtype)


GRAIN = 32768
"""The least number of values that torch gives a thread."""

FASTER = 6
"""How many times as fast NumPy's tanh is as that of torch, on one thread: 6.7 on an AMD EPYC with
AVX-512 (151,296 float32 values: 57 against 382 µs)."""


def _numpy_is_faster(z: torch.Tensor) -> bool:
    """Whether NumPy computes tanh of z in less time than torch with all its threads, and may."""
    if not unobserved(z) or z.device.type != "cpu":
        return False  # first: to ask for the size of what is traced would lay that down
    return z.numel() <= FASTER * GRAIN or torch.get_num_threads() <= FASTER


def _tanh_of_numpy(z: torch.Tensor) -> torch.Tensor:
    """tanh in the place of z, within two units in the last place."""
    values = z.numpy()
    with np.errstate(all="ignore"):
        np.tanh(values, out=values)
    return z


def _wide_parameter(value: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """gamma or beta in the dtype that DyT computes in."""
    if not within_inductor():
        return _wide(value)
    from . import inductor

    return inductor.wide(value, x)


def _scaled_and_shifted(t: torch.Tensor, gamma: torch.Tensor, beta: torch.Tensor) -> torch.Tensor:
    """t * gamma + beta, in one pass where no graph of it is made."""
    return torch.addcmul(beta, t, gamma) if unobserved(t) else t * gamma + beta


def dyt(
    x: torch.Tensor, alpha: torch.Tensor, gamma: torch.Tensor, beta: torch.Tensor
) -> torch.Tensor:
    """gamma * tanh(alpha * x) + beta, computed in float32 at least, in the dtype of x."""
    t = _tanh(alpha * _wide(x), x.dtype)
    y = _scaled_and_shifted(t, _wide_parameter(gamma, x), _wide_parameter(beta, x))
    return y.to(x.dtype)


def dyt_scale(x: torch.Tensor, alpha: torch.Tensor, gamma: torch.Tensor) -> torch.Tensor:
    """gamma * tanh(alpha * x), computed in float32 at least, in the dtype of x."""
    t = _tanh(alpha * _wide(x), x.dtype)
    return (t * _wide_parameter(gamma, x)).to(x.dtype)


def dyt_bare(x: torch.Tensor, alpha: torch.Tensor) -> torch.Tensor:
    """tanh(alpha * x), computed in float32 at least, in the dtype of x."""
    return _tanh(alpha * _wide(x), x.dtype).to(x.dtype)


def derf(
    x: torch.Tensor,
    alpha: torch.Tensor,
    shift: torch.Tensor,
    gamma: torch.Tensor,
    beta: torch.Tensor,
) -> torch.Tensor:
    """gamma * erf(alpha * x + shift) + beta, computed in float32 at least, in the dtype of x."""
    t = _squashed("erf", alpha * _wide(x) + shift, x.dtype)
    y = _scaled_and_shifted(t, _wide_parameter(gamma, x), _wide_parameter(beta, x))
    return y.to(x.dtype)


_library = torch.library.Library(DOMAIN, "DEF")
_FUNCTIONS: dict[str, Callable[..., torch.Tensor]] = {
    "DyT": dyt,
    "DyTScale": dyt_scale,
    "DyTBare": dyt_bare,
    "Derf": derf,
}
for _name, _function in _FUNCTIONS.items():
    _inputs = ", ".join(f"Tensor {name}" for name in ("x", *FORMS[_name].parameters))
    _library.define(f"{_name}({_inputs}) -> Tensor")
    _library.impl(_name, _function, "CompositeImplicitAutograd")


def operator(form: Form) -> torch._ops.OpOverload:
    """The torch operator of a form, `torch.ops.dyt.<form>.default`."""
    packet = getattr(getattr(torch.ops, DOMAIN), form.name)
    overload: torch._ops.OpOverload = packet.default
    return overload


def decompositions() -> dict[torch._ops.OpOverload, Callable[..., torch.Tensor]]:
    """Each operator with its formula in operators of torch, for `run_decompositions`."""
    return {operator(FORMS[name]): function for name, function in _FUNCTIONS.items()}


_WHOLE: dict[tuple[str, ...], Callable[..., torch.Tensor]] = {
    (form.squash, *form.parameters): operator(form) for form in FORMS.values()
}
"""The operators by what they squash with and which parameters they take."""


def parameter(
    value: npt.NDArray[Any], name: str, dtype: torch.dtype, device: torch.device
) -> torch.nn.Parameter:
    """A trainable copy of one value: alpha and shift in float32, gamma and beta in `dtype`."""
    if name in ("alpha", "shift"):
        dtype = torch.float32
    tensor = torch.from_numpy(np.array(value, np.float32, copy=True))
    return torch.nn.Parameter(tensor.to(dtype=dtype, device=device))


class DynamicTanh(torch.nn.Module):
    """gamma * squash(alpha * x + shift) + beta, to stand where a norm would, in training too.

    width: channels of x, along its last axis, or along the axis before `spatial_axes` others (2
    for images, channels first); gamma and beta have one value each, of shape [width, 1, ...].
    alpha: where its one learned value starts; None leaves it out (Table 9). squash: "tanh", "erf"
    (Derf, arXiv 2512.10938, whose shift is one learned value that starts at 0), "hardtanh" or
    "sigmoid". affine: whether there is a gamma, which starts at 1; bias: and a beta, from 0.

    x of any shape and floating dtype; computed in float32 at least, returned in the dtype of x.
    alpha and shift are float32, or float64 where `dtype` is. Raises OptionError.
    """

    alpha: torch.nn.Parameter | None
    shift: torch.nn.Parameter | None
    gamma: torch.nn.Parameter | None
    beta: torch.nn.Parameter | None

    def __init__(
        self,
        width: int,
        alpha: float | None = ALPHA,
        *,
        squash: str = "tanh",
        affine: bool = True,
        bias: bool = True,
        spatial_axes: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _check(width, alpha, squash)
        self.width, self.squash = width, squash
        own = torch.get_default_dtype() if dtype is None else dtype
        wide = torch.promote_types(own, torch.float32)
        shape = (width, *(1 for _ in range(spatial_axes)))

        def learned(start: float, size: tuple[int, ...], kind: torch.dtype) -> torch.nn.Parameter:
            return torch.nn.Parameter(torch.full(size, start, device=device, dtype=kind))

        self.register_parameter("alpha", None if alpha is None else learned(alpha, (1,), wide))
        self.register_parameter("shift", learned(0.0, (1,), wide) if squash == "erf" else None)
        self.register_parameter("gamma", learned(1.0, shape, own) if affine else None)
        self.register_parameter("beta", learned(0.0, shape, own) if affine and bias else None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The squashed x, of the same shape and dtype.

        Exported it is in operators of torch alone, so that a program runs without this package.
        """
        held = {name: value for name in PARAMETERS if (value := getattr(self, name)) is not None}
        whole = _WHOLE.get((self.squash, *held))
        if whole is None or exporting():
            return self._spelled_out(x)
        return whole(x, *held.values())

    def _spelled_out(self, x: torch.Tensor) -> torch.Tensor:
        y = _wide(x)
        if self.alpha is not None:
            y = self.alpha * y
        if self.shift is not None:
            y = y + self.shift
        y = SQUASHES[self.squash](y)
        if self.gamma is not None:
            y = y * _wide(self.gamma)
        if self.beta is not None:
            y = y + _wide(self.beta)
        return y.to(x.dtype)

    def extra_repr(self) -> str:
        """Width and function, as torch prints them."""
        return f"{self.width}, squash={self.squash!r}"


def _check(width: Any, alpha: Any, squash: Any) -> None:
    """Raise OptionError for what DynamicTanh does not take."""
    if squash not in tuple(SQUASHES):
        raise OptionError(f"squash is {squash!r}; allowed: {', '.join(SQUASHES)}")
    if not isinstance(width, int) or width < 1:
        raise OptionError(f"width is {width!r}; allowed: a whole number, 1 or above")
    if alpha is not None and not float(alpha) > 0:
        raise OptionError(f"alpha is {alpha!r}; allowed: a number above 0, or None")
