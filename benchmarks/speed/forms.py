"""The forms that are timed: a function each, from a model to what runs.

The first form of a table is the one that the others are compared with. A new form is a function
and a line in its table.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

import dyt_compile
from dyt_compile.compiler import Conversion
from dyt_compile.nn import DynamicTanh
from dyt_compile.passes.capture import capture

from .peer import quantize_calibrated

__all__ = [
    "FOLDED",
    "INT8",
    "MODEL_FORMS",
    "ORIGINAL",
    "SITE_FORMS",
    "Form",
    "Made",
    "Model",
    "Site",
    "normal",
    "with_affine",
]

OPSET = 20
"""As `export_onnx` writes by default."""

SAMPLES = 8


@dataclass(frozen=True)
class Made:
    """A form of a model with its inputs.

    module: None where the form is a file alone; write: puts it into an ONNX file for a runtime,
    beside that of the first form.
    """

    args: tuple[Tensor, ...]
    module: nn.Module | None
    write: Callable[[Path, str], object]


Form = Callable[[], Made]


@dataclass(frozen=True)
class Model:
    """build: the same weights each time; inputs: by seed."""

    build: Callable[[], nn.Module]
    inputs: Callable[[int], tuple[Tensor, ...]]

    def example(self) -> tuple[Tensor, ...]:
        """The inputs that every form is timed on."""
        return self.inputs(0)

    def samples(self) -> list[tuple[Tensor, ...]]:
        """Other inputs, to calibrate on."""
        return [self.inputs(seed) for seed in range(1, 1 + SAMPLES)]


def plain(module: nn.Module, args: tuple[Tensor, ...]) -> Made:
    """A module as it stands, and the file that torch's exporter makes of it, its batch dynamic."""

    def write(path: Path, runtime: str) -> None:
        program = capture(module, args).program()
        torch.onnx.export(program, (), path, dynamo=True, opset_version=OPSET, verbose=False,
                          external_data=False)  # fmt: skip

    return Made(args, module, write)


def converted(result: Conversion, args: tuple[Tensor, ...]) -> Made:
    """What the package makes: the converted module, and the file that it exports."""

    def write(path: Path, runtime: str) -> None:
        dyt_compile.export_onnx(replace(result, runtime=runtime), path)

    return Made(args, result.model, write)


def original(model: Model) -> Made:
    return plain(model.build(), model.example())


def original_again(model: Model) -> Made:
    """The control: weights and file of its own, but the same."""

    def write(path: Path, runtime: str) -> None:
        shutil.copyfile(_source(path), path)

    return Made(model.example(), model.build(), write)


def _source(path: Path) -> Path:
    """The file of the first form."""
    return path.with_name(f"{ORIGINAL}.onnx")


def four_operators(model: Model) -> Made:
    """DyT spelled out: mul, tanh, mul, add."""
    return plain(_with_dyt(model), model.example())


def folded(model: Model) -> Made:
    """DyT as the package's operator, gamma and beta in the weights behind it where those can be."""
    args = model.example()
    return converted(dyt_compile.convert(_with_dyt(model), example=(args, {}), fold=True), args)


def affine(model: Model) -> Made:
    """Every site an affine map, folded into the weights behind it where those can take it."""
    args = model.example()
    return converted(dyt_compile.convert(with_affine(model), example=(args, {}), fold=True), args)


def with_affine(model: Model) -> nn.Module:
    """The original with an affine map in place of every norm, spelled out."""
    changed = _with_dyt(model)
    _replace_dyt(changed, _Affine)
    return changed


def bounded_int8(model: Model) -> Made:
    """What reads a DyT over eight bits, with scales that need no data."""
    args, changed = model.example(), _with_dyt(model)

    def write(path: Path, runtime: str) -> None:
        result = dyt_compile.convert(changed, example=(args, {}), quantize="int8", runtime=runtime)
        dyt_compile.export_onnx(result, path)

    return Made(args, None, write)


def no_norm(model: Model) -> Made:
    """Nothing where the norms were: the limit of what any replacement can save."""
    changed = _with_dyt(model)
    _replace_dyt(changed, lambda part: nn.Identity())
    return plain(changed, model.example())


def peer(model: Model) -> Made:
    """The norms, and ONNX Runtime's calibrated static INT8 for the layers that read them."""

    def write(path: Path, runtime: str) -> None:
        quantize_calibrated(_source(path), path, model.samples())

    return Made(model.example(), None, write)


def _with_dyt(model: Model) -> nn.Module:
    """The original with trained-looking DyT in place of its norms: no gamma is 1, no beta is 0."""
    changed = dyt_compile.convert_for_training(model.build(), embedding_scale=False)
    random = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for part in changed.modules():
            if isinstance(part, DynamicTanh):
                for parameter in part.parameters():
                    noise = torch.randn(parameter.shape, generator=random)
                    parameter.add_(noise.to(parameter.dtype), alpha=0.02)
    return changed.requires_grad_(False)


def _replace_dyt(model: nn.Module, make: Callable[[DynamicTanh], nn.Module]) -> None:
    found = [(path, part) for path, part in model.named_modules() if isinstance(part, DynamicTanh)]
    for path, part in found:
        model.set_submodule(path, make(part))


class _Affine(nn.Module):
    """gamma x + beta; a site has a beta even where the norm had none.

    Gamma is halved: nothing bounds such a model, and with random weights it grew from block to
    block until rounding alone changed its output.
    """

    def __init__(self, dyt: DynamicTanh) -> None:
        super().__init__()
        random = torch.Generator().manual_seed(2)
        self.gamma = nn.Parameter(0.5 * dyt.gamma, requires_grad=False)
        noise = 0.02 * torch.randn(dyt.width, generator=random)
        self.beta = nn.Parameter(noise, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma + self.beta


ORIGINAL = "original norms"
FOLDED = "folded DyT"
INT8 = "DyT, bounded INT8"

MODEL_FORMS: dict[str, Callable[[Model], Made]] = {
    ORIGINAL: original,
    "the original again": original_again,
    "DyT as four operators": four_operators,
    FOLDED: folded,
    "affine, folded": affine,
    INT8: bounded_int8,
    "no norm (the limit)": no_norm,
    "original norms, calibrated INT8": peer,
}
"""The second is the control: how far from 1 the ratio of equal things may be."""


@dataclass(frozen=True)
class Site:
    """Where a norm stands: tokens, channels, dtype."""

    rows: int
    width: int
    dtype: torch.dtype

    def example(self) -> tuple[Tensor, Tensor]:
        """What reaches the norm, and what is added to that before."""
        x, residual = normal(2, self.rows, self.width).to(self.dtype)
        return x, residual


class _Placed(nn.Module):
    """One norm, alone or behind a residual add."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        y: Tensor = self.norm(x if residual is None else x + residual)
        return y


def norm_alone(make: Callable[[int], nn.Module], site: Site) -> Made:
    return _placed(make, site, site.example()[:1])


def norm_of_sum(make: Callable[[int], nn.Module], site: Site) -> Made:
    return _placed(make, site, site.example())


def _placed(make: Callable[[int], nn.Module], site: Site, args: tuple[Tensor, ...]) -> Made:
    """DyT is the package's own operator, as `convert` recognises it."""
    module = _Placed(make(site.width)).to(site.dtype).eval().requires_grad_(False)
    if make is DynamicTanh:
        return converted(dyt_compile.convert(module, example=(args, {})), args)
    return plain(module, args)


def rms_norm(width: int) -> nn.Module:
    return nn.RMSNorm(width, eps=1e-6)


def nothing(width: int) -> nn.Module:
    return nn.Identity()


SITE_FORMS: dict[str, Callable[[Site], Made]] = {
    "bare add": partial(norm_of_sum, nothing),
    "LayerNorm": partial(norm_alone, nn.LayerNorm),
    "RMSNorm": partial(norm_alone, rms_norm),
    "DyT": partial(norm_alone, DynamicTanh),
    "residual + LayerNorm": partial(norm_of_sum, nn.LayerNorm),
    "residual + RMSNorm": partial(norm_of_sum, rms_norm),
    "residual + DyT": partial(norm_of_sum, DynamicTanh),
}


def normal(*shape: int, seed: int = 0) -> Tensor:
    """Standard normal values."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))
