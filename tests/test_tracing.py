"""Who looks at the operators that run: each observer, and a torch that tells nothing of it."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

from dyt_compile import tracing

pytestmark = pytest.mark.core


def test_torch_that_keeps_its_state_elsewhere_is_no_inductor(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from torch._inductor.virtualized import V

    assert not tracing.within_inductor()
    with V.set_fake_mode(FakeTensorMode()):
        assert tracing.within_inductor()
        modules = {"torch._inductor.virtualized": SimpleNamespace(V=SimpleNamespace())}
        monkeypatch.setattr(tracing, "sys", SimpleNamespace(modules=modules))
        assert not tracing.within_inductor()


def test_missing_function_of_torch_counts_as_an_observer(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.ones(3)
    assert tracing.unobserved(x)
    for name, path, otherwise in (
        ("_transform", "_functorch.peek_interpreter_stack_", "unknown"),
        ("_script", "_get_tracing_state_", "unknown"),
        ("_modes", "_len_torch_dispatch_stack_", 1),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(tracing, name, tracing._private(path, otherwise))
            assert not tracing.unobserved(x)


def _with_gradient(run: Callable[[Tensor], Tensor], x: Tensor) -> None:
    run(x.clone().requires_grad_())


def _forward_mode(run: Callable[[Tensor], Tensor], x: Tensor) -> None:
    with torch.autograd.forward_ad.dual_level():
        run(torch.autograd.forward_ad.make_dual(x, torch.ones_like(x)))


def _counted(run: Callable[[Tensor], Tensor], x: Tensor) -> None:
    with FlopCounterMode(display=False):
        run(x)


OBSERVERS: dict[str, Callable[[Callable[[Tensor], Tensor], Tensor], object]] = {
    "autograd": _with_gradient,
    "forward mode": _forward_mode,
    "vmap": lambda run, x: torch.vmap(run)(x),
    "torch.func.grad": lambda run, x: torch.func.grad(lambda row: run(row).sum())(x),
    "functionalize": lambda run, x: torch.func.functionalize(run)(x),
    "make_fx": lambda run, x: make_fx(run)(x),
    "make_fx, fake": lambda run, x: make_fx(run, tracing_mode="fake")(x),
    "jit.trace": lambda run, x: torch.jit.trace(run, (x,), check_trace=False),
    "mode": _counted,
    "subclass": lambda run, x: run(torch.nn.Parameter(x, requires_grad=False)),
}


@pytest.mark.parametrize("observer", OBSERVERS)
def test_every_observer_is_seen(observer: str) -> None:
    seen: list[bool] = []

    def run(x: Tensor) -> Tensor:
        seen.append(tracing.unobserved(x))
        return x * 2

    x = torch.linspace(-1, 1, 6).view(2, 3)
    OBSERVERS[observer](run, x)
    assert seen
    assert not any(seen)
    assert tracing.unobserved(x)  # nothing of it stays behind
