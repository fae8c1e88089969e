"""Dynamic Tanh and Derf, the formulas: one table of forms, and their values in NumPy.

DyT(x) = gamma * tanh(alpha * x) + beta            (arXiv 2503.10622, equation 2)
Derf(x) = gamma * erf(alpha * x + shift) + beta    (arXiv 2512.10938)

Torch operators, ONNX functions and TensorRT plugins share the names and the signatures below.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = [
    "DOMAIN",
    "FORMS",
    "FUSED",
    "PARAMETERS",
    "SQUASHES",
    "VERSION",
    "DytParameters",
    "Form",
    "Mix",
    "Refit",
    "evaluate",
    "fused_name",
    "initial_alpha",
]

DOMAIN = "dyt"
VERSION = 1

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Form:
    """One operator: which parameters follow x, which function squashes, what is fused with it.

    All inputs are required. alpha and shift are float32 of shape [1] or [C]; gamma and beta have
    the dtype of x and any shape that broadcasts against it.

    residual: x + residual, of one shape and dtype, takes the place of x, and is a second output.
    quantized: y is rounded to INT8 or FP8 E4M3 as y / y_scale, with zero point 0; y_scale is
    float32 of shape [] or [1]. base: the form without the two.
    """

    name: str
    parameters: tuple[str, ...]
    squash: str  # "tanh" or "erf"
    residual: bool = False
    quantized: bool = False
    base: str = ""

    @property
    def inputs(self) -> tuple[str, ...]:
        """The names of all inputs, in order."""
        residual = ("residual",) if self.residual else ()
        scale = ("y_scale",) if self.quantized else ()
        return ("x", *residual, *self.parameters, *scale)

    @property
    def outputs(self) -> tuple[str, ...]:
        """The names of all outputs, in order."""
        return ("y", "sum") if self.residual else ("y",)


FORMS = {
    form.name: form
    for form in (
        Form("DyT", ("alpha", "gamma", "beta"), "tanh"),
        Form("DyTScale", ("alpha", "gamma"), "tanh"),
        Form("DyTBare", ("alpha",), "tanh"),
        Form("Derf", ("alpha", "shift", "gamma", "beta"), "erf"),
    )
}


def fused_name(base: str, *, residual: bool, quantized: bool) -> str:
    """The name of a form together with the Add before it and the QuantizeLinear behind it."""
    return f"{'Add' if residual else ''}{base}{'Quantize' if quantized else ''}"


FUSED = {
    name: replace(form, name=name, residual=residual, quantized=quantized, base=form.name)
    for form in FORMS.values()
    for residual, quantized in ((True, False), (False, True), (True, True))
    for name in (fused_name(form.name, residual=residual, quantized=quantized),)
}
"""Forms of ONNX files alone, where a plugin computes in one kernel what stands around a DyT."""

PARAMETERS = ("alpha", "shift", "gamma", "beta")

AFFINE, IDENTITY = (
    Form("Affine", ("gamma", "beta"), "identity"), Form("Identity", (), "identity")
)  # fmt: skip
"""Forms of no operator: weights take up such a site, and its readers read what it read."""


@dataclass(frozen=True, eq=False)
class DytParameters:
    """The values of one operator.

    alpha: float32, shape [1] or one that broadcasts against x; shift: the same, Derf only.
    gamma, beta: float32, broadcast against x, or None where the operator has none.
    squash: a key of `SQUASHES`; with "identity", alpha is 1 and no parameter.
    """

    alpha: Array = field(default_factory=lambda: np.ones(1, np.float32))
    gamma: Array | None = None
    beta: Array | None = None
    shift: Array | None = None
    squash: str = "tanh"

    @property
    def affine(self) -> bool:
        """Whether the values are those of gamma * x + beta, without any tanh."""
        return self.squash == "identity"

    def form(self) -> Form:
        """The smallest form that holds these values."""
        if self.affine:
            return IDENTITY if self.gamma is None and self.beta is None else AFFINE
        if self.squash == "erf":
            return FORMS["Derf"]
        if self.beta is not None:
            return FORMS["DyT"]
        return FORMS["DyTBare"] if self.gamma is None else FORMS["DyTScale"]

    def named(self) -> dict[str, Array]:
        """Every parameter of the form by name, absent ones filled with their neutral value."""
        neutral = {"shift": 0.0, "gamma": 1.0, "beta": 0.0}
        channels = next((p.shape for p in (self.gamma, self.beta) if p is not None), (1,))
        filled: dict[str, Array] = {}
        for name in self.form().parameters:
            value: Array | None = getattr(self, name)
            if value is None:
                shape = (1,) if name == "shift" else channels
                value = np.full(shape, neutral[name], np.float32)
            filled[name] = value
        return filled


@dataclass(frozen=True, eq=False)
class Mix:
    """An affine map over channels, y = x matrix + offset, that weights take up.

    Behind a bare DyT its readers do: x is tanh(alpha ...); or what the site reads, itself. matrix:
    float32 [channels of x, channels of y]; offset: float32 [channels of y]. They are 4 C (C + 1)
    bytes for C channels of both.
    """

    matrix: Array
    offset: Array

    def __call__(self, x: Array, axis: int = -1) -> Array:
        """y of x, whose channels lie along `axis`."""
        mixed = np.moveaxis(x, axis, -1) @ self.matrix + self.offset
        return np.moveaxis(mixed, -1, axis)

    def named(self) -> dict[str, Array]:
        """Both, by name."""
        return {"matrix": self.matrix, "offset": self.offset}


@dataclass(frozen=True, eq=False)
class Refit:
    """What a linear projection gains: x W + b becomes x W + b + mix(x).

    mix: matrix float32 [in, out], offset float32 [out]. before, after: the error on held-out rows
    without it and with it, relative to the output wanted. place: among the projections that could
    be refitted; files of one model in different forms name its weights differently.
    """

    mix: Mix
    before: float
    after: float
    place: int = 0


def evaluate(parameters: DytParameters, x: Array) -> Array:
    """gamma * squash(alpha * x + shift) + beta, in the dtype that NumPy's promotion gives."""
    argument = parameters.alpha * x
    if parameters.shift is not None:
        argument = argument + parameters.shift
    y = SQUASHES[parameters.squash](argument)
    if parameters.gamma is not None:
        y = y * parameters.gamma
    return y if parameters.beta is None else y + parameters.beta


ALPHA = 0.5
"""Where a DyT starts to learn, but in language models and at small widths (arXiv 2503.10622)."""

LLAMA_ALPHAS = {
    1024: (1.0, 1.0), 2048: (1.0, 0.5), 4096: (0.8, 0.2), 5120: (0.6, 0.15), 8192: (0.2, 0.05)
}  # fmt: skip
"""By width: of norms before attention, and of all others (Table 12; 5120 from Table 11)."""

SMALL_WIDTH, SMALL_ALPHA = 128, 1.0
"""A digits ViT of width 64 from scratch: accuracy 94.0, 97.0 and 97.2 % with 0.5, 1 and 2."""


def initial_alpha(width: int, *, attention: bool = False, llama: bool = False) -> float:
    """The alpha that an untrained DyT starts with.

    width: channels; attention: whether it stands before attention; llama: in a language model with
    RMSNorm. Between the widths of the table, alpha is interpolated on logarithms of both; outside
    of it, it is that of the nearest one.
    """
    if not llama:
        return SMALL_ALPHA if width <= SMALL_WIDTH else ALPHA
    known = {size: pair[0 if attention else 1] for size, pair in LLAMA_ALPHAS.items()}
    if width in known:
        return known[width]
    logarithms = [math.log(size) for size in known], [math.log(alpha) for alpha in known.values()]
    return float(np.exp(np.interp(math.log(width), *logarithms)))


def _erf(x: Array) -> Array:
    # NumPy has no erf; math.erf is exact to double precision and this runs on proofs alone.
    from math import erf

    values = np.fromiter(map(erf, np.ravel(x).tolist()), np.float64, np.size(x))
    return values.reshape(np.shape(x)).astype(np.asarray(x).dtype)


SQUASHES: dict[str, Callable[[Array], Array]] = {
    "tanh": np.tanh, "erf": _erf, "identity": np.asarray
}  # fmt: skip
"""DyT's, Derf's, and that of sites without either, which are affine in what they read."""
