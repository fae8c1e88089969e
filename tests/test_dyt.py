"""The formulas, their forms, and the operators of torch that carry them."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
import torch

from dyt_compile import nn as dyt_nn
from dyt_compile.dyt import DOMAIN, FORMS, PARAMETERS, DytParameters, evaluate

pytestmark = pytest.mark.core

CHANNELS = 5
ALPHA = np.array([0.7], np.float32)
SHIFT = np.array([-0.2], np.float32)
GAMMA = np.linspace(0.5, 2, CHANNELS, dtype=np.float32)
BETA = np.linspace(-1, 1, CHANNELS, dtype=np.float32)


def _parameters(form: str) -> DytParameters:
    values: dict[str, npt.NDArray[np.float32]] = {
        "alpha": ALPHA, "shift": SHIFT, "gamma": GAMMA, "beta": BETA
    }  # fmt: skip
    own = {name: values[name] for name in FORMS[form].parameters}
    return DytParameters(squash=FORMS[form].squash, **own)


def _expected(form: str, x: torch.Tensor) -> torch.Tensor:
    """In float64, by torch."""
    wide = x.double()
    if form == "Derf":
        y = torch.special.erf(float(ALPHA[0]) * wide + float(SHIFT[0]))
    else:
        y = torch.tanh(float(ALPHA[0]) * wide)
    if form != "DyTBare":
        y = y * torch.from_numpy(GAMMA).double()
    return y + torch.from_numpy(BETA).double() if form in ("DyT", "Derf") else y


@pytest.mark.parametrize("form", FORMS)
def test_form_is_the_smallest_that_holds_the_values(form: str) -> None:
    parameters = _parameters(form)
    assert parameters.form() is FORMS[form]
    assert list(parameters.named()) == list(FORMS[form].parameters)


def test_forms_follow_the_order_of_the_parameters() -> None:
    for form in FORMS.values():
        assert list(form.parameters) == [p for p in PARAMETERS if p in form.parameters]


def test_absent_values_are_filled_with_neutral_ones() -> None:
    x = np.random.default_rng(0).standard_normal((4, CHANNELS)).astype(np.float32)
    for parameters in (
        DytParameters(ALPHA, beta=BETA),
        DytParameters(ALPHA, squash="erf"),
        DytParameters(ALPHA, gamma=GAMMA, squash="erf"),
    ):
        filled = DytParameters(squash=parameters.squash, **parameters.named())
        np.testing.assert_array_equal(evaluate(parameters, x), evaluate(filled, x))
        if parameters.beta is not None:
            assert parameters.named()["gamma"].shape == parameters.beta.shape


@pytest.mark.parametrize("form", FORMS)
def test_evaluate_equals_the_formula(form: str) -> None:
    x = torch.randn(6, CHANNELS, generator=torch.Generator().manual_seed(0)) * 3
    found = evaluate(_parameters(form), x.numpy())
    np.testing.assert_allclose(found, _expected(form, x).numpy(), atol=1e-6)
    assert found.dtype == np.float32


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, 1e-7), (torch.float32, 1e-6), (torch.float16, 2e-3), (torch.bfloat16, 2e-2)],
    ids=str,
)
def test_operator_equals_the_formula(form: str, dtype: torch.dtype, tolerance: float) -> None:
    x = (torch.randn(6, CHANNELS, generator=torch.Generator().manual_seed(0)) * 3).to(dtype)
    held = [
        dyt_nn.parameter(value, name, dtype, x.device)
        for name, value in _parameters(form).named().items()
    ]
    found = dyt_nn.operator(FORMS[form])(x, *held)
    assert found.dtype is dtype
    torch.testing.assert_close(found.double(), _expected(form, x), atol=tolerance, rtol=tolerance)


def test_operator_computes_narrow_types_in_float32() -> None:
    x = torch.full((1,), 100.0, dtype=torch.bfloat16)
    alpha = torch.tensor([0.001953], dtype=torch.float32)
    found = dyt_nn.operator(FORMS["DyTBare"])(x, alpha)
    assert found == torch.tanh(alpha * 100).to(torch.bfloat16)


@pytest.mark.parametrize("form", FORMS)
def test_operator_gives_gradients_to_every_parameter(form: str) -> None:
    x = torch.randn(6, CHANNELS, dtype=torch.float64, requires_grad=True)
    held = [
        torch.from_numpy(value).double().requires_grad_()
        for value in _parameters(form).named().values()
    ]
    assert torch.autograd.gradcheck(dyt_nn.operator(FORMS[form]), (x, *held))


@pytest.mark.parametrize("form", FORMS)
def test_operator_lives_in_its_domain(form: str) -> None:
    assert dyt_nn.operator(FORMS[form])._schema.name == f"{DOMAIN}::{form}"


def test_operator_runs_on_meta_tensors() -> None:
    x = torch.empty(3, CHANNELS, device="meta")
    assert dyt_nn.operator(FORMS["DyTBare"])(x, torch.empty(1, device="meta")).shape == x.shape


def _ulps(y: torch.Tensor, x: torch.Tensor) -> float:
    """The greatest error of y as tanh(x), in units in the last place."""
    t = np.tanh(x.numpy().astype(np.float64))
    unit = np.spacing(np.abs(t).astype(np.float32)).astype(np.float64)
    return float((np.abs(y.numpy() - t) / unit).max())


def _bare(x: torch.Tensor) -> torch.Tensor:
    y: torch.Tensor = dyt_nn.operator(FORMS["DyTBare"])(x, torch.ones(1))
    return y


def test_eager_tanh_is_within_two_units_in_the_last_place() -> None:
    bits = torch.arange(0, 0x7F800001, 2003, dtype=torch.int32)
    x = bits.view(torch.float32)
    before = x.clone()
    for sign in (1, -1):
        assert _ulps(_bare(sign * x), sign * x) < 2
    assert torch.equal(x, before)
    assert _ulps(torch.tanh(x) * (1 + 2**-21), x) > 2
    special = torch.tensor([0.0, -0.0, float("inf"), -float("inf"), float("nan")])
    torch.testing.assert_close(_bare(special), torch.tanh(special), rtol=0, atol=0, equal_nan=True)
    assert torch.equal(torch.signbit(_bare(special[:2])), torch.tensor([False, True]))


def test_eager_tanh_is_that_of_torch_where_it_is_faster_or_watched(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    x = torch.linspace(-3, 3, dyt_nn.FASTER * dyt_nn.GRAIN + 1)
    assert not torch.equal(_bare(x), torch.tanh(x))
    assert torch.equal(_bare(x.clone().requires_grad_()), torch.tanh(x))
    monkeypatch.setattr(torch, "get_num_threads", lambda: dyt_nn.FASTER + 1)
    assert torch.equal(_bare(x), torch.tanh(x))
    assert not torch.equal(_bare(x[1:]), torch.tanh(x[1:]))


def test_operator_is_differentiated_forwards_too() -> None:
    x, alpha = torch.linspace(-2, 2, 9), torch.tensor([0.7])
    bare = dyt_nn.operator(FORMS["DyTBare"])
    _, tangent = torch.func.jvp(lambda x: bare(x, alpha), (x,), (torch.ones_like(x),))
    torch.testing.assert_close(tangent, alpha * (1 - torch.tanh(alpha * x) ** 2))
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        _, found = torch.autograd.forward_ad.unpack_dual(bare(dual, alpha))
    torch.testing.assert_close(found, tangent)


def test_parameter_is_a_copy() -> None:
    value = GAMMA.copy()
    made = dyt_nn.parameter(value, "gamma", torch.float32, torch.device("cpu"))
    with torch.no_grad():
        made.zero_()
    np.testing.assert_array_equal(value, GAMMA)


@pytest.mark.parametrize(("name", "dtype"), [("alpha", torch.float32), ("gamma", torch.bfloat16)])
def test_parameter_of_a_narrow_model_keeps_alpha_wide(name: str, dtype: torch.dtype) -> None:
    made = dyt_nn.parameter(GAMMA, name, torch.bfloat16, torch.device("cpu"))
    assert made.dtype is dtype
    assert made.requires_grad
