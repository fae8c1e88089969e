"""Dynamic Tanh for torch: the operators `torch.ops.dyt.*` and their parameters.

The operators decompose by themselves: autograd, fake tensors, `torch.export` and Inductor all see
through them, so Inductor fuses them with their neighbours, while an exported graph keeps the name.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from .dyt import DOMAIN, FORMS, Form

__all__ = ["decompositions", "operator", "parameter"]


def _wide(x: torch.Tensor) -> torch.Tensor:
    """x in the dtype that DyT computes in: float32, or float64 for float64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def dyt(
    x: torch.Tensor, alpha: torch.Tensor, gamma: torch.Tensor, beta: torch.Tensor
) -> torch.Tensor:
    """gamma * tanh(alpha * x) + beta, computed in float32 at least, in the dtype of x."""
    return (torch.tanh(alpha * _wide(x)) * _wide(gamma) + _wide(beta)).to(x.dtype)


def dyt_scale(x: torch.Tensor, alpha: torch.Tensor, gamma: torch.Tensor) -> torch.Tensor:
    """gamma * tanh(alpha * x), computed in float32 at least, in the dtype of x."""
    return (torch.tanh(alpha * _wide(x)) * _wide(gamma)).to(x.dtype)


def dyt_bare(x: torch.Tensor, alpha: torch.Tensor) -> torch.Tensor:
    """tanh(alpha * x), computed in float32 at least, in the dtype of x."""
    return torch.tanh(alpha * _wide(x)).to(x.dtype)


def derf(
    x: torch.Tensor,
    alpha: torch.Tensor,
    shift: torch.Tensor,
    gamma: torch.Tensor,
    beta: torch.Tensor,
) -> torch.Tensor:
    """gamma * erf(alpha * x + shift) + beta, computed in float32 at least, in the dtype of x."""
    return (torch.erf(alpha * _wide(x) + shift) * _wide(gamma) + _wide(beta)).to(x.dtype)


_library = torch.library.Library(DOMAIN, "DEF")
_FUNCTIONS = {"DyT": dyt, "DyTScale": dyt_scale, "DyTBare": dyt_bare, "Derf": derf}
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


def parameter(
    value: npt.NDArray[Any], name: str, dtype: torch.dtype, device: torch.device
) -> torch.nn.Parameter:
    """A trainable copy of one value: alpha and shift in float32, gamma and beta in `dtype`."""
    if name in ("alpha", "shift"):
        dtype = torch.float32
    tensor = torch.from_numpy(np.array(value, np.float32, copy=True))
    return torch.nn.Parameter(tensor.to(dtype=dtype, device=device))
