"""tanh of DyT and erf of Derf as Inductor computes them on a CPU, through the compiled kernel."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from torch._inductor.utils import run_and_get_code

import dyt_compile.nn as dyt_nn
from benchmarks import rational_fit

pytestmark = pytest.mark.core

DYT = torch.ops.dyt.DyT
ONE = torch.ones(1)
FLOAT32_BOUND = 5e-7
ZERO = torch.zeros(1)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
LIMITS = {
    ("tanh", torch.bfloat16): 4.1, ("tanh", torch.float16): 5.2, ("tanh", torch.float32): 8.6,
    ("erf", torch.bfloat16): 2.5, ("erf", torch.float16): 2.85, ("erf", torch.float32): 3.7,
}  # fmt: skip
EXACT = {"tanh": torch.tanh, "erf": torch.erf}
SIMD_BITS = [("tanh", None), ("tanh", 256), ("tanh", 1), ("erf", None), ("erf", 1)]


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    """A kernel of another run would be found in the cache, whatever this one computes."""
    torch.compiler.reset()
    with torch._inductor.config.patch(force_disable_caches=True):
        yield


def bare(x: torch.Tensor) -> torch.Tensor:
    return torch.ops.dyt.DyTBare(x, ONE)


def bare_derf(x: torch.Tensor) -> torch.Tensor:
    return torch.ops.dyt.Derf(x, ONE, ZERO, ONE.to(x.dtype), ZERO.to(x.dtype))


BARE = {"tanh": bare, "erf": bare_derf}


def compiled(x: torch.Tensor, simd_bits: int | None = None, squash: str = "tanh") -> torch.Tensor:
    """squash(x) by the kernel that Inductor writes; simd_bits 1: one value at a time."""
    with torch.no_grad(), torch._inductor.config.patch({"cpp.simdlen": simd_bits}):
        return torch.compile(BARE[squash])(x)


def every_16_bits(dtype: torch.dtype) -> torch.Tensor:
    return torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)


def dense_32_bits() -> torch.Tensor:
    """Positive float32 of every binade, each 509th; each third of those where tanh bends."""
    coarse = torch.arange(0, 0x7F800001, 509, dtype=torch.int32)
    first, last = (int(np.float32(value).view(np.int32)) for value in (0.25, 9.0))
    return torch.cat([coarse, torch.arange(first, last, 3, dtype=torch.int32)]).view(torch.float32)


def ulp(t: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The distance of neighbours of `dtype` at t, in float64."""
    details = torch.finfo(dtype)
    _, exponent = torch.frexp(t.abs().clamp(min=details.smallest_normal))
    return details.eps * torch.ldexp(torch.ones_like(t), exponent - 1)


def excess(y: torch.Tensor, x: torch.Tensor, squash: str = "tanh") -> float:
    """The greatest error beyond what is allowed, in what is allowed; below 1 where it is kept."""
    t = EXACT[squash](x.double())
    if x.dtype is torch.float32:
        return float(((y.double() - t).abs() / FLOAT32_BOUND).max())
    return float(((y.double() - t).abs() / ulp(t, x.dtype)).max())


def falls(y: torch.Tensor) -> float:
    """How far y, over growing x, ever lies below what it reached."""
    return float((torch.cummax(y.double(), 0).values - y.double()).max())


@pytest.mark.parametrize(("squash", "simd_bits"), SIMD_BITS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_value_of_16_bits_is_within_an_ulp(
    dtype: torch.dtype, squash: str, simd_bits: int | None
) -> None:
    x = every_16_bits(dtype)
    y = compiled(x, simd_bits, squash)
    known = ~x.isnan()
    assert bool((y.isnan() == x.isnan()).all())
    assert excess(y[known], x[known], squash) <= 1
    assert falls(y[known][x[known].double().argsort(stable=True)]) == 0
    assert torch.equal(compiled(-x, simd_bits, squash)[known], -y[known])
    assert bool((y[x.double() >= LIMITS[squash, dtype]] == 1).all())


@pytest.mark.slow
@pytest.mark.parametrize(("squash", "simd_bits"), SIMD_BITS)
def test_float32_is_within_its_bound(squash: str, simd_bits: int | None) -> None:
    x = dense_32_bits().sort().values
    y = compiled(x, simd_bits, squash)
    assert excess(y, x, squash) <= 1
    assert falls(y) <= FLOAT32_BOUND
    assert torch.equal(compiled(-x, simd_bits, squash), -y)
    assert bool((y[x >= LIMITS[squash, torch.float32]] == 1).all())
    assert float(y.max()) == 1


@pytest.mark.parametrize(("squash", "dtype"), LIMITS)
@pytest.mark.parametrize("simd_bits", [None, 1])
def test_special_values_are_those_of_the_function(
    squash: str, dtype: torch.dtype, simd_bits: int | None
) -> None:
    infinity, largest = float("inf"), torch.finfo(dtype).max
    x = torch.tensor([0.0, -0.0, infinity, -infinity, largest, -largest, float("nan")] * 9).to(
        dtype
    )
    y = compiled(x, simd_bits, squash)
    assert torch.equal(y[:-1:1].nan_to_num(7), EXACT[squash](x)[:-1].nan_to_num(7))
    if squash == "tanh":  # Derf's shift and beta, of 0, lose the sign
        assert torch.equal(torch.signbit(y[:2]), torch.tensor([False, True]))


def test_measure_of_the_error_sees_one() -> None:
    x = every_16_bits(torch.bfloat16)
    x = x[x.isfinite()]
    t = torch.tanh(x.double())
    assert excess(t.to(x.dtype), x) <= 0.5
    assert excess((t * (1 + 2**-7)).to(x.dtype), x) > 1
    assert excess((t + 2 * FLOAT32_BOUND).float(), x.float()) > 1
    assert falls(torch.tensor([0.0, 0.5, 0.25, 0.75])) == 0.25


@pytest.mark.parametrize(("squash", "dtype"), LIMITS)
def test_torch_with_an_unknown_inside_computes_the_same(
    squash: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled(torch.ones(1))
    monkeypatch.setattr("dyt_compile.inductor.TAUGHT", False)
    x = torch.linspace(-10, 10, 200_001).to(dtype)
    with torch.no_grad():
        y, codes = run_and_get_code(torch.compile(BARE[squash]), x)
    assert "fmadd" not in "".join(codes)
    assert excess(y, x, squash) <= 1
    assert torch.equal(compiled(-x, None, squash), -y)
    assert float(y.max()) == 1


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("squash", EXACT)
def test_site_is_one_vectorised_kernel(squash: str, dtype: torch.dtype) -> None:
    x, residual = torch.randn(2, 6, 64).to(dtype)
    gamma, beta = torch.randn(2, 64).to(dtype)
    operator, values = (DYT, (ONE,)) if squash == "tanh" else (torch.ops.dyt.Derf, (ONE, ZERO))
    with torch.no_grad():
        y, codes = run_and_get_code(
            torch.compile(lambda *given: operator(given[0] + given[1], *given[2:])),
            x, residual, *values, gamma, beta,
        )  # fmt: skip
    kernels = re.findall(r"r'{3}(.*?)'{3}", "".join(codes), re.S)
    assert len(kernels) == 1
    assert squash not in kernels[0]
    assert "at::vec::clamp(" in kernels[0]
    assert "at::vec::fmadd(" in kernels[0]
    exact = operator(*(value.double() for value in (x + residual, *values, gamma, beta)))
    allowed = 2 * torch.finfo(dtype).eps * (gamma.abs() + exact.abs() + x.abs() + residual.abs())
    assert bool(((y.double() - exact).abs() <= allowed + FLOAT32_BOUND).all())


def _gradients(
    run: Callable[..., torch.Tensor], given: tuple[torch.Tensor, ...]
) -> tuple[torch.Tensor, ...]:
    leaves = tuple(value.detach().clone().requires_grad_() for value in given)
    y = run(*leaves)
    weights = torch.linspace(0.5, 1.5, y.numel(), dtype=torch.float64).view_as(y)
    return torch.autograd.grad((y.double() * weights).sum(), leaves)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", ["DyT", "DyTScale", "DyTBare", "Derf"])
def test_gradients_are_those_of_the_exact_formula(dtype: torch.dtype, form: str) -> None:
    operator = getattr(torch.ops.dyt, form)
    parameters = dyt_nn.FORMS[form].parameters
    torch.manual_seed(0)
    single = {"alpha": torch.tensor([0.8]), "shift": torch.tensor([0.1])}
    # all positive: no gradient is a small difference of large terms
    given = tuple(single.get(name, torch.rand(16).to(dtype)) for name in parameters)
    given = (torch.rand(12, 16).mul(6).to(dtype), *given)
    found = _gradients(torch.compile(lambda *values: operator(*values)), given)
    exact = _gradients(operator, tuple(value.double() for value in given))
    for name, gradient, true in zip(("x", *parameters), found, exact, strict=True):
        error = (gradient.double() - true).norm() / true.norm()
        assert float(error) < 4 * max(torch.finfo(dtype).eps, FLOAT32_BOUND), name


def test_only_inductor_meets_the_arithmetic() -> None:
    x = torch.linspace(-9, 9, 5001)
    compiled(x)  # what it registers is there from now on
    torch.testing.assert_close(bare(x), torch.tanh(x), rtol=3e-7, atol=0)
    with torch.no_grad():
        assert torch.equal(torch.compile(bare, backend="aot_eager")(x), torch.tanh(x))

    class Site(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return bare(x)

    program = torch.export.export(Site(), (x,))
    for table in (None, dyt_nn.decompositions()):
        code = program.run_decompositions(table).graph_module.code
        assert "aten.tanh" in code
        assert "dyt" not in code.replace("dyt_", "")


def test_float64_keeps_the_exact_tanh() -> None:
    x = torch.linspace(-9, 9, 5001, dtype=torch.float64)
    assert float((compiled(x) - torch.tanh(x)).abs().max()) < 1e-15


def test_transforms_of_torch_func_compile() -> None:
    x = torch.linspace(-3, 3, 48)

    def slope(x: torch.Tensor) -> torch.Tensor:
        return torch.func.grad(lambda row: bare(row).sum())(x)

    assert float((torch.compile(slope)(x) - (1 - torch.tanh(x) ** 2)).abs().max()) < 1e-6


@pytest.mark.parametrize(("squash", "dtype"), LIMITS)
def test_coefficients_are_those_that_the_script_fits(squash: str, dtype: torch.dtype) -> None:
    from dyt_compile.inductor import RATIONALS

    form = RATIONALS[squash, dtype]
    limit, above, below, bits = rational_fit.FORMS[squash, str(dtype).removeprefix("torch.")]
    error, p, q = rational_fit.fit(squash, limit, above, below, bits)
    assert error < 0.5
    assert form.limit == limit == LIMITS[squash, dtype]
    np.testing.assert_allclose((*form.above, *form.below), (*p, *q), rtol=1e-5)
