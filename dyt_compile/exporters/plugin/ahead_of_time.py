"""Experimental: the plugins without a library, as PTX inside the engine (TensorRT 10.9 or newer).

TensorRT's `tensorrt.plugin` asks for a kernel and its launch while an engine is built, and keeps
both in the engine, which then needs nothing else to run. The kernel is that of the library. As an
engine it never ran yet.
"""

from __future__ import annotations

import importlib.util
import inspect
import re
import types
from collections.abc import Callable, Sequence
from typing import Any

from ...dyt import DOMAIN, FORMS, FUSED, Form
from ...errors import ExportError, MissingDependencyError, OptionError
from .entry import Entry, Size, ceil_div, entry, layout, ptx

__all__ = ["register"]

LEAST_TENSORRT = (10, 9)
BROKEN_TENSORRT = (10, 14)
"""Ahead-of-time plugins do not work there."""

OUTPUT_DTYPE = "output_dtype"
MULTIPROCESSORS = 132
"""Of an H100: the device is not known here."""
LARGEST_GRID = 65535

NARROW = {3: "INT8", 17: "FP8"}
"""TensorRT's types by ONNX's TensorProto.DataType."""
TYPES = {"FLOAT": "float", "HALF": "Half", "BF16": "BFloat16", "INT8": "Int8", "FP8": "Float8"}
"""Names in core.cuh by TensorRT's."""


def register(*, arch: int = 80) -> list[str]:
    """Register every plugin with `tensorrt.plugin`; returns their names.

    Engines built afterwards in this process hold their kernels; sizes of x are limited to 2^31 - 1
    elements, and its pointers to multiples of 16 bytes. Not together with the plugin library, which
    has the same names. arch: least compute capability that the engines run on; FP8 is converted in
    hardware from 89 on.

    Raises MissingDependencyError without TensorRT, OptionError where its version is not served.
    """
    if importlib.util.find_spec("tensorrt") is None:
        raise MissingDependencyError("tensorrt", "gpu")
    import tensorrt

    _check_version(str(tensorrt.__version__))
    import tensorrt.plugin as quick

    forms = [*FORMS.values(), *FUSED.values()]
    for form in forms:
        name = f"{DOMAIN}::{form.name}"
        quick.register(name)(_described(form, tensorrt, quick))
        quick.aot_impl(name)(_implemented(form, quick, arch))
    return [form.name for form in forms]


def _check_version(version: str) -> None:
    numbers = re.findall(r"\d+", version)
    found = (int(numbers[0]), int(numbers[1]))
    if found < LEAST_TENSORRT or found == BROKEN_TENSORRT:
        raise OptionError(
            f"TensorRT is {version}; plugins ahead of time need 10.9 or newer, but not 10.14"
        )


def _described(form: Form, tensorrt: Any, quick: Any) -> Callable[..., Any]:
    """What `register` takes: descriptions of the inputs to those of the outputs."""

    def described(*inputs: Any, **attributes: int) -> Any:
        y = inputs[0].like()
        if form.quantized:
            y.dtype = getattr(tensorrt.DataType, _narrow(form, attributes[OUTPUT_DTYPE]))
        return (y, inputs[0].like()) if form.residual else y

    one = quick.TensorDesc
    returned = types.GenericAlias(tuple, (one, one)) if form.residual else one
    described.__signature__ = _signature(form, quick, [], returned)  # type: ignore[attr-defined]
    return described


def _implemented(form: Form, quick: Any, arch: int) -> Callable[..., Any]:
    """What `aot_impl` takes: descriptions of inputs and outputs to a kernel and its launch."""

    def implemented(*given: Any) -> Any:
        inputs, outputs = given[: len(form.inputs)], given[-2]
        shapes = {
            name: [_size(each) for each in desc.shape_expr]
            for name, desc in zip(form.inputs, inputs, strict=True)
        }
        laid = layout(form, shapes)
        dims = inputs[0].shape_expr
        dtype, out = (TYPES[desc.dtype.name] for desc in (inputs[0], outputs[0]))
        kernel = entry(form, dtype, out, laid, [shapes["x"][axis] for axis in laid.columns])
        rows, planes, columns = (
            _product(quick, [dims[axis] for axis in axes])
            for axes in (laid.rows, laid.planes, laid.columns)
        )
        extents = quick.SymIntExprs(3)
        for place, size in enumerate((rows, planes, columns)):
            extents[place] = quick.SymInt32(size)
        launch = _launch(quick, kernel, rows, planes, columns)
        return kernel.name, ptx(kernel.source, arch), launch, extents

    returned = tuple[str, bytes, quick.KernelLaunchParams, quick.SymIntExprs]
    implemented.__signature__ = _signature(  # type: ignore[attr-defined]
        form, quick, ["outputs", "tactic"], returned
    )
    return implemented


def _signature(form: Form, quick: Any, more: Sequence[str], returned: Any) -> inspect.Signature:
    """TensorRT reads names and annotations of the functions that it is given."""
    kinds: dict[str, Any] = dict.fromkeys(form.inputs, quick.TensorDesc)
    if form.quantized:
        kinds[OUTPUT_DTYPE] = int
    kinds |= dict.fromkeys(more, inspect.Parameter.empty)
    return inspect.Signature(
        [
            inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=kind)
            for name, kind in kinds.items()
        ],
        return_annotation=returned,
    )


def _narrow(form: Form, output_dtype: int) -> str:
    if output_dtype not in NARROW:
        raise ExportError(
            f"dyt::{form.name}: output_dtype is {output_dtype}; allowed: 3 (INT8) and "
            f"17 (FLOAT8E4M3FN)"
        )
    return NARROW[output_dtype]


def _size(expression: Any) -> Size:
    return int(expression.constant_value()) if expression.is_constant else None


def _product(quick: Any, expressions: Sequence[Any]) -> Any:
    result = quick.ShapeExpr(1)
    for each in expressions:
        result = result * each
    return result


def _launch(quick: Any, kernel: Entry, rows: Any, planes: Any, columns: Any) -> Any:
    """As launch.cuh has it, but for a number of multiprocessors that is not known here."""
    x = quick.cdiv(columns, kernel.width * kernel.across)
    z = quick.min(planes, LARGEST_GRID)
    rows_of_block, most = kernel.down * kernel.rows_at_once, LARGEST_GRID
    if kernel.resident:
        known = (_size(x) or 1) * (_size(z) or 1)
        rows_of_block = kernel.down
        most = min(ceil_div(MULTIPROCESSORS * kernel.resident, known), LARGEST_GRID)
    launch = quick.KernelLaunchParams()
    launch.block_x, launch.block_y = kernel.across, kernel.down
    launch.grid_x, launch.grid_z = x, z
    launch.grid_y = quick.min(quick.cdiv(rows, rows_of_block), most)
    return launch
