"""Function bodies of DyT: what ONNX Runtime computes with them is the formula."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import pytest

from dyt_compile.dyt import DOMAIN, FORMS, VERSION, DytParameters, Form, evaluate
from dyt_compile.graphs import onnx_functions

ort = pytest.importorskip("onnxruntime")

pytestmark = pytest.mark.core

Array = npt.NDArray[np.float64]

CHANNELS = 6
OPSETS = [15, 18, 20, 23]
UNITS = {"FLOAT": 2.0**-23, "FLOAT16": 2.0**-10, "BFLOAT16": 2.0**-7}
"""Distance from 1 to the next number of the type."""


def _close(found: npt.NDArray[np.float32], expected: Array, dtype: ir.DataType) -> bool:
    """Within one rounding to the type, and what float32 loses on the way there."""
    allowed = 0.51 * UNITS[dtype.name] * np.abs(expected) + 2e-6
    return found.shape == expected.shape and bool((np.abs(found - expected) <= allowed).all())


def _rounded(array: npt.ArrayLike, dtype: ir.DataType) -> Array:
    return np.asarray(array, np.float32).astype(dtype.numpy()).astype(np.float64)


def _parameters(
    form: Form, dtype: ir.DataType, shape: tuple[int, ...], alpha: tuple[int, ...]
) -> DytParameters:
    """Values that the types of the operator's inputs hold exactly, but in float64."""
    random = np.random.default_rng(1)
    shapes = {"alpha": alpha, "shift": alpha, "gamma": shape, "beta": shape}
    lowest = {"alpha": 0.2, "shift": -0.3, "gamma": -2.0, "beta": -1.0}
    named: dict[str, Any] = {}
    for name in form.parameters:
        values = random.uniform(lowest[name], 1.5, shapes[name])
        kept = ir.DataType.FLOAT if name in ("alpha", "shift") else dtype
        named[name] = _rounded(values, kept)
    return DytParameters(squash=form.squash, **named)


def _model(
    form: Form, dtype: ir.DataType, parameters: DytParameters, opset: int, rank: int = 2
) -> ir.Model:
    """One node of the form between casts, so that float32 goes in and comes out."""

    def cast(value: ir.Value, to: ir.DataType, name: str) -> ir.Node:
        node = ir.Node("", "Cast", [value], [ir.AttrInt64("to", to.value)], num_outputs=1)
        node.outputs[0].name, node.outputs[0].type = name, ir.TensorType(to)
        return node

    axes = ir.Shape([f"axis_{axis}" for axis in range(rank)])
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=axes)
    held = []
    for name, array in parameters.named().items():
        kept = ir.DataType.FLOAT if name in ("alpha", "shift") else dtype
        tensor = ir.tensor(array.astype(kept.numpy()), dtype=kept, name=name)
        held.append(
            ir.Value(
                name=name,
                type=ir.TensorType(kept),
                shape=ir.Shape(array.shape),
                const_value=tensor,
            )
        )
    narrow = cast(x, dtype, "narrow")
    node = onnx_functions.call(form, [narrow.outputs[0], *held], "made")
    wide = cast(node.outputs[0], ir.DataType.FLOAT, "y")
    y = wide.outputs[0]
    y.shape = axes
    graph = ir.Graph(
        [x], [y], nodes=[narrow, node, wide], initializers=held, opset_imports={"": opset},
        name="one",
    )  # fmt: skip
    model = ir.Model(graph, ir_version=9)
    onnx_functions.declare(model)
    return model


def _run(model: ir.Model, x: Array) -> npt.NDArray[np.float32]:
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL  # keeps casts
    data = ir.serde.serialize_model(model).SerializeToString()
    session = ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"x": x.astype(np.float32)})
    return np.asarray(found)


def _inputs(dtype: ir.DataType, *shape: int) -> Array:
    random = np.random.default_rng(0)
    x = random.standard_normal(shape) * 3
    x[0] *= 1000  # far into saturation
    x[1] *= 1e-3
    return _rounded(x, dtype)


@pytest.mark.parametrize("dtype", UNITS)
@pytest.mark.parametrize("form", FORMS)
def test_body_computes_the_formula(form: str, dtype: str) -> None:
    kind = ir.DataType[dtype]
    x = _inputs(kind, 40, CHANNELS)
    parameters = _parameters(FORMS[form], kind, (CHANNELS,), (1,))
    found = _run(_model(FORMS[form], kind, parameters, 20), x)
    assert _close(found, evaluate(parameters, x), kind)


@pytest.mark.parametrize("opset", OPSETS)
@pytest.mark.parametrize("form", FORMS)
def test_body_is_valid_in_every_opset(form: str, opset: int) -> None:
    kind = ir.DataType.FLOAT16
    parameters = _parameters(FORMS[form], kind, (CHANNELS,), (1,))
    model = _model(FORMS[form], kind, parameters, opset)
    onnx.checker.check_model(ir.serde.serialize_model(model), full_check=True)
    x = _inputs(kind, 8, CHANNELS)
    assert _close(_run(model, x), evaluate(parameters, x), kind)


@pytest.mark.parametrize(
    ("shape", "alpha"),
    [((CHANNELS,), (CHANNELS,)), ((CHANNELS, 1, 1), (1,)), ((CHANNELS, 1, 1), (CHANNELS, 1, 1))],
)
@pytest.mark.parametrize("form", FORMS)
def test_body_broadcasts(form: str, shape: tuple[int, ...], alpha: tuple[int, ...]) -> None:
    kind = ir.DataType.FLOAT
    x = _inputs(kind, 4, CHANNELS, 3, CHANNELS)
    parameters = _parameters(FORMS[form], kind, shape, alpha)
    found = _run(_model(FORMS[form], kind, parameters, 20, x.ndim), x)
    assert _close(found, evaluate(parameters, x), kind)


@pytest.mark.parametrize("dtype", UNITS)
@pytest.mark.parametrize("wrong", ["alpha", "gamma", "beta"])
def test_tolerance_notices_a_wrong_parameter(dtype: str, wrong: str) -> None:
    kind = ir.DataType[dtype]
    x = _inputs(kind, 40, CHANNELS)
    parameters = _parameters(FORMS["DyT"], kind, (CHANNELS,), (1,))
    found = evaluate(parameters, x)
    assert _close(_rounded(found, kind).astype(np.float32), found, kind)
    named: dict[str, Any] = dict(parameters.named())
    named[wrong] = named[wrong] * (1 + 4 * UNITS[dtype]) + 2e-5
    off = _rounded(evaluate(DytParameters(**named), x), kind).astype(np.float32)
    assert not _close(off, found, kind)


def test_tolerance_notices_values_that_are_not_numbers() -> None:
    found = np.array([np.nan, 1.0], np.float32)
    assert not _close(found, np.ones(2), ir.DataType.FLOAT)
    assert not _close(np.ones(3, np.float32), np.ones(2), ir.DataType.FLOAT)


def test_tolerance_notices_a_body_that_computes_in_the_type_of_x() -> None:
    kind = ir.DataType.BFLOAT16
    x = _inputs(kind, 200, CHANNELS)
    p = _parameters(FORMS["DyT"], kind, (CHANNELS,), (1,))
    assert p.gamma is not None
    assert p.beta is not None
    narrow = ml_dtypes.bfloat16
    squashed = np.tanh((p.alpha.astype(narrow) * x.astype(narrow)).astype(np.float32))
    y = squashed.astype(narrow) * p.gamma.astype(narrow) + p.beta.astype(narrow)
    assert not _close(y.astype(np.float32), evaluate(p, x), kind)


def test_node_names_the_plugin_that_may_replace_it() -> None:
    x = ir.Value(name="x")
    node = onnx_functions.call(FORMS["DyTBare"], [x, ir.Value(name="alpha")], "y")
    assert (node.domain, node.op_type) == ("dyt", "DyTBare")
    assert node.attributes["plugin_namespace"].as_string() == "dyt"
    assert node.attributes["plugin_version"].as_string() == "1"
    assert [value.name for value in node.outputs] == ["y"]


@pytest.mark.parametrize("form", FORMS)
def test_function_declares_the_attributes_of_its_nodes(form: str) -> None:
    function = ir.serde.serialize_function(onnx_functions.function(FORMS[form], 20))
    assert list(function.attribute) == ["plugin_namespace", "plugin_version"]
    assert not function.attribute_proto
    assert list(function.input) == ["x", *FORMS[form].parameters]
    assert list(function.output) == ["y"]
    assert (function.domain, function.name) == (DOMAIN, form)


@pytest.mark.parametrize("form", FORMS)
def test_name_of_a_form_is_no_operator_of_onnx(form: str) -> None:
    # TensorRT looks operators up by name alone, and would take ONNX's own.
    names = {schema.name.lower() for schema in onnx.defs.get_all_schemas()}
    assert form.lower() not in names


def test_declare_adds_what_is_called_and_nothing_else() -> None:
    kind = ir.DataType.FLOAT
    model = _model(FORMS["DyT"], kind, _parameters(FORMS["DyT"], kind, (1,), (1,)), 20)
    assert [name for _, name, _ in model.functions] == ["DyT"]
    assert model.opset_imports[DOMAIN] == VERSION
    empty = ir.Model(ir.Graph([], [], nodes=[], opset_imports={"": 20}, name="none"), ir_version=9)
    onnx_functions.declare(empty)
    assert not empty.functions
    assert DOMAIN not in empty.opset_imports
