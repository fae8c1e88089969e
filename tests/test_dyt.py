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
