"""Who looks at the operators of torch that run now: Inductor, another tracer, or nobody.

Torch tells most of it in private only. Where a release has that no longer, the answer is the one
that leads to the plain formula, which is right everywhere.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from operator import attrgetter
from typing import Any

import torch
from torch.autograd import forward_ad

__all__ = ["exporting", "unobserved", "within_inductor"]


def within_inductor() -> bool:
    """Whether Inductor traces what runs now: its own state says so, once it is imported.

    Not where `torch.func` transforms it, which knows the operators of torch alone.
    """
    module: Any = sys.modules.get("torch._inductor.virtualized")
    if module is None or _transformed():
        return False
    try:
        state = module.V
        return bool(state.aot_compilation) or not isinstance(state.fake_mode, module.NullHandler)
    except AttributeError:  # of a release that keeps its state elsewhere
        return False


def exporting() -> bool:
    """Whether `torch.export` or `torch.jit.trace` makes a program of what runs now."""
    return torch.compiler.is_exporting() or _script() is not None


def unobserved(z: torch.Tensor) -> bool:
    """Whether the values of z are all that counts: nothing traces, transforms or derives it."""
    return (
        type(z) is torch.Tensor  # neither a fake nor a functional one
        and not z.requires_grad
        and z.layout is torch.strided
        and _script() is None
        and not _transformed()
        and not _modes()
        and forward_ad.unpack_dual(z).tangent is None
    )


def _transformed() -> bool:
    return _transform() is not None


def _private(path: str, otherwise: Any) -> Callable[[], Any]:
    """A function below torch._C; where there is none, one that gives `otherwise`."""
    try:
        found: Callable[[], Any] = attrgetter(path)(torch._C)
    except AttributeError:
        return lambda: otherwise
    return found


_transform = _private("_functorch.peek_interpreter_stack", otherwise="unknown")
"""The innermost of the running transforms of `torch.func`, or None."""

_script = _private("_get_tracing_state", otherwise="unknown")
"""What `torch.jit.trace` records, or None."""

_modes = _private("_len_torch_dispatch_stack", otherwise=1)
"""How many modes see the operators that run."""
