"""Narrow and wide types in ONNX models: what is narrowed, what stays float32, what still runs."""

from __future__ import annotations

from collections.abc import Collection

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx
import onnx.reference
import onnx_ir as ir
import pytest

from dyt_compile.dyt import FORMS
from dyt_compile.graphs import onnx_functions
from dyt_compile.graphs.onnx_precision import NARROW, holds, narrow, surface, widen
from dyt_compile.runtime import Session

pytest.importorskip("onnxruntime")

pytestmark = pytest.mark.core

Array = npt.NDArray[np.float32]

FLOAT, FLOAT16, BFLOAT16 = ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16
UNITS = {FLOAT: 2.0**-23, FLOAT16: 2.0**-10, BFLOAT16: 2.0**-7}

BOTH = pytest.mark.parametrize("dtype", [FLOAT16, BFLOAT16], ids=["fp16", "bf16"])

NORM = """
norm (float[n,8] x) => (float[n,8] y)
<float[8] gamma = {1, 2, 3, 4, 5, 6, 7, 8}, float eps = {1e-12}, int64[1] last = {-1}>
{
    doubled = Add(x, x)
    square = Mul(doubled, doubled)
    mean = ReduceMean(square, last)
    sum = Add(mean, eps)
    root = Sqrt(sum)
    normalized = Div(doubled, root)
    scaled = Mul(normalized, gamma)
    y = Add(scaled, scaled)
}
"""

CONVOLUTION = """
convolution (float[n,2,4,4] x) => (float[n,3,4,4] y)
<float[3,2,1,1] w = {1, 2, 3, 4, 5, 6}, float[3] b = {0.1, 0.2, 0.3}>
{
    doubled = Add(x, x)
    convolved = Conv(doubled, w, b)
    y = Tanh(convolved)
}
"""


def _model(text: str, opset: int = 20) -> ir.Model:
    """A model from ONNX's text form, with the types of all its values."""
    header = f'<ir_version: 9, opset_import: ["" : {opset}, "dyt" : 1]>'
    proto = onnx.shape_inference.infer_shapes(onnx.parser.parse_model(header + text))
    return ir.serde.deserialize_model(proto)


def _check(model: ir.Model) -> None:
    onnx.checker.check_model(ir.serde.serialize_model(model), full_check=True)


def _run(model: ir.Model, *arrays: npt.NDArray[np.generic]) -> list[Array]:
    _check(model)
    return Session(model.clone(deep_copy=True)).run(list(arrays))


def _run_by_reference(model: ir.Model, *arrays: npt.NDArray[np.generic]) -> list[Array]:
    """What ONNX's own evaluator computes: ONNX Runtime keeps float32 between nodes on CPUs."""
    evaluator = onnx.reference.ReferenceEvaluator(ir.serde.serialize_model(model))
    names = [str(value.name) for value in model.graph.inputs]
    return [np.asarray(y) for y in evaluator.run(None, dict(zip(names, arrays, strict=True)))]


def _types(model: ir.Model) -> dict[str, ir.DataType | None]:
    return {
        str(value.name): value.dtype
        for graph in (model.graph, *model.graph.subgraphs())
        for value in (
            *graph.inputs,
            *graph.initializers.values(),
            *(output for node in graph for output in node.outputs),
        )
    }


def _named(model: ir.Model, *outputs: str) -> list[ir.Node]:
    return [node for node in model.graph if node.outputs[0].name in outputs]


def _operators(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


def _random(*shape: int, scale: float = 1.0) -> Array:
    return (np.random.default_rng(0).standard_normal(shape) * scale).astype(np.float32)


def _narrowed(
    text: str, dtype: ir.DataType, wide: Collection[str] = (), opset: int = 20
) -> ir.Model:
    model = _model(text, opset)
    narrow(model, dtype, set(_named(model, *wide)))
    _check(model)
    return model


INSIDE_NORM = ("square", "mean", "sum", "root", "normalized", "scaled")


@BOTH
def test_inputs_and_outputs_keep_names_types_and_shapes(dtype: ir.DataType) -> None:
    before, after = _model(NORM), _narrowed(NORM, dtype)
    for old, new in zip(
        (*before.graph.inputs, *before.graph.outputs),
        (*after.graph.inputs, *after.graph.outputs),
        strict=True,
    ):
        assert (old.name, old.dtype, old.shape) == (new.name, new.dtype, new.shape)


@BOTH
def test_values_inside_become_narrow_and_integers_stay(dtype: ir.DataType) -> None:
    types = _types(_narrowed(NORM, dtype))
    assert {types[name] for name in ("doubled", "mean", "scaled", "gamma", "eps")} == {dtype}
    assert types["last"] is ir.DataType.INT64
    assert holds(_narrowed(NORM, dtype), dtype)
    assert not holds(_model(NORM), dtype)


@BOTH
def test_narrow_model_computes_the_same_to_its_precision(dtype: ir.DataType) -> None:
    x = _random(6, 8)
    (expected,) = _run(_model(NORM), x)
    for run in (_run, _run_by_reference):
        (found,) = run(_narrowed(NORM, dtype), x)
        assert found.dtype == np.float32
        off = np.abs(found - expected).max() / np.abs(expected).max()
        assert off < 4 * UNITS[dtype]
    assert off > 0


@BOTH
def test_wide_nodes_compute_in_float32_without_rounding_between(dtype: ir.DataType) -> None:
    model = _narrowed(NORM, dtype, INSIDE_NORM)
    inside = [n for n in model.graph if n.op_type in ("Mul", "ReduceMean", "Sqrt", "Div")]
    for node in inside:
        assert {v.dtype for v in (*node.inputs, *node.outputs) if v} <= {FLOAT, ir.DataType.INT64}
    casts = [node for node in model.graph if node.op_type == "Cast"]
    into = [cast for cast in casts if any(n in inside for n, _ in cast.outputs[0].uses())]
    assert len(into) == 1  # shared by its two readers


@BOTH
def test_narrow_leaves_no_node_unread(dtype: ir.DataType) -> None:
    model = _narrowed(NORM, dtype, INSIDE_NORM)
    for node in model.graph:
        assert any(v.uses() or v.is_graph_output() for v in node.outputs), node.outputs[0].name
    # In from the surface and out to it, in to the norm and out of it.
    assert _operators(model).count("Cast") == 4


@BOTH
def test_wide_nodes_are_rounded_once_at_their_end(dtype: ir.DataType) -> None:
    model = _narrowed(NORM, dtype, INSIDE_NORM)
    x = _random(6, 8)
    doubled = (2 * x.astype(dtype.numpy())).astype(np.float32)
    norm = doubled / np.sqrt((doubled * doubled).mean(axis=1, keepdims=True))
    scaled = (norm * np.arange(1, 9, dtype=np.float32)).astype(dtype.numpy())
    (found,) = _run_by_reference(model, x)
    expected = (scaled + scaled).astype(np.float32)
    assert (found == expected).mean() > 0.95  # the sums of float32 may take another order


@BOTH
def test_constants_of_wide_nodes_stay_float32(dtype: ir.DataType) -> None:
    model = _narrowed(NORM, dtype, INSIDE_NORM)
    assert _types(model)["eps"] is FLOAT
    assert _types(model)["gamma"] is FLOAT
    assert model.graph.initializers["eps"].const_value.numpy() == np.float32(1e-12)  # type: ignore[union-attr]


def test_constant_with_another_reader_is_cast_for_the_wide_one() -> None:
    model = _narrowed(NORM.replace("Add(scaled, scaled)", "Add(scaled, gamma)"), FLOAT16, ["mean"])
    assert _types(model)["gamma"] is FLOAT16
    x = _random(3, 8)
    (found,) = _run(model, x)
    assert np.isfinite(found).all()


def test_squares_beyond_fp16_survive_in_wide_nodes_alone() -> None:
    x = _random(4, 8, scale=1000.0)
    (expected,) = _run(_model(NORM), x)
    with np.errstate(over="ignore"):
        (lost,) = _run_by_reference(_narrowed(NORM, FLOAT16), x)
    (kept,) = _run_by_reference(_narrowed(NORM, FLOAT16, INSIDE_NORM), x)
    assert not np.allclose(lost, expected, rtol=0.1)
    np.testing.assert_allclose(kept, expected, rtol=4 * UNITS[FLOAT16], atol=0.02)


@pytest.mark.parametrize(
    ("opset", "expected"), [(20, FLOAT), (22, BFLOAT16)], ids=["opset20", "opset22"]
)
def test_operator_without_bf16_stays_float32(opset: int, expected: ir.DataType) -> None:
    model = _narrowed(CONVOLUTION, BFLOAT16, opset=opset)
    (convolution,) = (node for node in model.graph if node.op_type == "Conv")
    assert {v.dtype for v in (*convolution.inputs, *convolution.outputs) if v} == {expected}
    assert _types(model)["w"] is expected
    assert _types(model)["doubled"] is BFLOAT16
    x = _random(2, 2, 4, 4)
    (wanted,) = _run(_model(CONVOLUTION, opset), x)
    (found,) = _run(model, x)
    np.testing.assert_allclose(found, wanted, atol=0.05)


def test_operator_with_fp16_becomes_narrow() -> None:
    assert _types(_narrowed(CONVOLUTION, FLOAT16))["w"] is FLOAT16


@BOTH
def test_input_that_only_float32_may_take_keeps_its_node_wide(dtype: ir.DataType) -> None:
    model = _narrowed(
        """
        resize (float[1,1,2,2] x) => (float[1,1,4,4] y)
        <float[4] scales = {1, 1, 2, 2}>
        {
            doubled = Add(x, x)
            larger = Resize<mode = "nearest">(doubled, , scales)
            y = Add(larger, larger)
        }
        """,
        dtype,
    )
    assert _types(model)["scales"] is FLOAT
    x = _random(1, 1, 2, 2)
    (found,) = _run(model, x)
    np.testing.assert_allclose(found, 4 * x.repeat(2, 2).repeat(2, 3), rtol=UNITS[dtype])


@BOTH
def test_alpha_and_shift_of_dyt_stay_float32(dtype: ir.DataType) -> None:
    model = _model(
        """
        derf (float[n,4] x) => (float[n,4] y)
        <float[1] alpha = {0.1}, float[1] shift = {0.3}, float[4] gamma = {1, 2, 3, 4},
         float[4] beta = {0.1, 0.2, 0.3, 0.4}>
        { y = Add(x, x) }
        """
    )
    x, y = model.graph.inputs[0], model.graph.outputs[0]
    held = [model.graph.initializers[name] for name in FORMS["Derf"].parameters]
    node = onnx_functions.call(FORMS["Derf"], [x, *held], "squashed")
    node.outputs[0].type, node.outputs[0].shape = ir.TensorType(FLOAT), x.shape
    producer = y.producer()
    assert producer is not None
    model.graph.insert_before(producer, node)
    producer.replace_input_with(0, node.outputs[0])
    onnx_functions.declare(model)
    narrow(model, dtype)
    types = _types(model)
    assert (types["alpha"], types["shift"]) == (FLOAT, FLOAT)
    assert (types["gamma"], types["beta"], types["squashed"]) == (dtype, dtype, dtype)
    (found,) = _run(model, _random(3, 4))
    assert np.isfinite(found).all()


BRANCHES = """
branches (float[n,4] x, bool flag) => (float[n,4] y) <float[4] outer = {1, 2, 3, 4}>
{
    doubled = Add(x, x)
    chosen = If(flag) <
        then_branch = one () => (float[n,4] a) <float[4] inner = {0.5, 0.25, 2, 1}> {
            product = Mul(doubled, inner)
            a = Add(product, outer)
        },
        else_branch = other () => (float[n,4] b) {
            cube = Mul(doubled, outer)
            b = Tanh(cube)
        }
    >
    y = Add(chosen, doubled)
}
"""


@BOTH
@pytest.mark.parametrize("flag", [True, False])
def test_branches_become_narrow_and_run(dtype: ir.DataType, flag: bool) -> None:
    x, condition = _random(3, 4), np.array(flag)
    (expected,) = _run(_model(BRANCHES), x, condition)
    model = _narrowed(BRANCHES, dtype)
    assert {_types(model)[name] for name in ("chosen", "product", "cube", "inner")} == {dtype}
    (found,) = _run(model, x, condition)
    assert np.abs(found - expected).max() < 4 * UNITS[dtype] * np.abs(expected).max()


def test_wide_nodes_in_branches_run() -> None:
    text = BRANCHES.replace("Tanh", "Softplus")  # not for bfloat16 before opset 22
    model = _narrowed(text, BFLOAT16, ["y"])
    (softplus,) = (node for node in model.graph.all_nodes() if node.op_type == "Softplus")
    assert {value.dtype for value in (*softplus.inputs, *softplus.outputs) if value} == {FLOAT}
    x = _random(3, 4)
    for flag in (True, False):
        (expected,) = _run(_model(text), x, np.array(flag))
        (found,) = _run(model, x, np.array(flag))
        assert np.abs(found - expected).max() < 4 * UNITS[BFLOAT16] * np.abs(expected).max()


LOOP = """
loop (float[n,4] x, int64 trips) => (float[n,4] y) <bool go = {1}, float[4] step = {1, 2, 3, 4}>
{
    doubled = Add(x, x)
    last = Loop(trips, go, doubled) <
        body = one (int64 i, bool before, float[n,4] state) => (bool after, float[n,4] next) {
            after = Identity(before)
            next = Add(state, step)
        }
    >
    y = Add(last, last)
}
"""


@BOTH
def test_loop_becomes_narrow_and_runs(dtype: ir.DataType) -> None:
    x, trips = _random(3, 4), np.array(3)
    (expected,) = _run(_model(LOOP), x, trips)
    (found,) = _run(_narrowed(LOOP, dtype), x, trips)
    assert np.abs(found - expected).max() < 8 * UNITS[dtype] * np.abs(expected).max()


CONSTANTS = """
constants (float[4] x) => (float[4] y)
{
    number = Constant<value_float = 0.5>()
    numbers = Constant<value_floats = [1.0, 2.0, 3.0, 4.0]>()
    tensor = Constant<value = float[4] {4, 3, 2, 1}>()
    shape = Shape(x)
    filled = ConstantOfShape<value = float[1] {2}>(shape)
    whole = Cast<to = 1>(shape)
    sum = Sum(number, numbers, tensor, filled, whole, x)
    y = Add(sum, sum)
}
"""


@BOTH
def test_constants_in_attributes_become_narrow(dtype: ir.DataType) -> None:
    model = _narrowed(CONSTANTS, dtype)
    types = _types(model)
    made = ("number", "numbers", "tensor", "filled", "whole", "sum")
    assert {types[name] for name in made} == {dtype}
    x = np.array([1, 2, 3, 4], np.float32)
    (found,) = _run(model, x)
    np.testing.assert_array_equal(found, 2 * (0.5 + 5 + 2 + 4 + x))


MASK = """
mask (float[n,4] scores, float[n,4] open) => (float[n,4] y)
<float one = {1}, float lowest = {-3.4028235e38}>
{
    closed = Sub(one, open)
    bias = Mul(closed, lowest)
    masked = Add(scores, bias)
    y = Softmax(masked)
}
"""


@BOTH
def test_mask_of_the_lowest_float_stays_finite(dtype: ir.DataType) -> None:
    # As transformers writes it: 0 times minus infinity would be no number.
    scores, opened = _random(2, 4), np.array([[1, 1, 0, 0], [1, 1, 1, 1]], np.float32)
    (expected,) = _run(_model(MASK), scores, opened)
    (found,) = _run(_narrowed(MASK, dtype), scores, opened)
    np.testing.assert_allclose(found, expected, atol=UNITS[dtype])


@BOTH
def test_infinities_stay_infinite(dtype: ir.DataType) -> None:
    model = _model("far (float[2] x) => (float[2] y) <float[2] w = {1, 2}> { y = Add(x, w) }")
    w = model.graph.initializers["w"]
    w.const_value = ir.tensor(np.array([np.inf, -np.inf], np.float32), name="w")
    narrow(model, dtype)
    (found,) = _run(model, np.zeros(2, np.float32))
    np.testing.assert_array_equal(found, [np.inf, -np.inf])


@BOTH
def test_output_that_is_read_inside_goes_out_too(dtype: ir.DataType) -> None:
    model = _narrowed(
        "two (float[4] x) => (float[4] hidden, float[4] y) {"
        " hidden = Add(x, x) y = Mul(hidden, hidden) }",
        dtype,
    )
    assert [value.name for value in model.graph.outputs] == ["hidden", "y"]
    x = np.array([1, 2, 3, 4], np.float32)
    hidden, y = _run(model, x)
    np.testing.assert_array_equal(hidden, 2 * x)
    np.testing.assert_array_equal(y, 4 * x * x)


@BOTH
def test_output_that_is_an_input_keeps_its_type(dtype: ir.DataType) -> None:
    model = _narrowed("two (float[4] x) => (float[4] x, float[4] y) { y = Mul(x, x) }", dtype)
    assert [(v.name, v.dtype) for v in model.graph.outputs] == [("x", FLOAT), ("y", FLOAT)]


@BOTH
def test_output_that_is_a_weight_keeps_its_type(dtype: ir.DataType) -> None:
    model = _narrowed(
        "two (float[4] x) => (float[4] scale, float[4] y)"
        " <float[4] scale = {1, 2, 3, 4}> { y = Mul(x, scale) }",
        dtype,
    )
    assert [(v.name, v.dtype) for v in model.graph.outputs] == [("scale", FLOAT), ("y", FLOAT)]


@BOTH
def test_names_that_are_taken_are_left_alone(dtype: ir.DataType) -> None:
    model = _narrowed(
        "taken (float[4] x) => (float[4] y) {"
        " x_inner = Add(x, x) y_inner = Mul(x_inner, x) y = Add(y_inner, x_inner) }",
        dtype,
    )
    names = [v.name for node in model.graph for v in node.outputs]
    assert len(names) == len(set(names))
    x = np.array([1, 2, 3, 4], np.float32)
    (y,) = _run(model, x)
    np.testing.assert_array_equal(y, 2 * x * x + 2 * x)


@BOTH
def test_integer_and_double_values_stay(dtype: ir.DataType) -> None:
    model = _narrowed(
        "other (double[2] x, int64[2] k) => (double[2] y, int64[2] m) {"
        " y = Add(x, x) m = Add(k, k) }",
        dtype,
    )
    assert {v.dtype for v in model.graph.outputs} == {ir.DataType.DOUBLE, ir.DataType.INT64}
    assert not holds(model, dtype)


@BOTH
def test_narrow_leaves_the_model_that_was_cloned_alone(dtype: ir.DataType) -> None:
    model = _model(NORM)
    before = ir.serde.serialize_model(model).SerializeToString()
    narrow(model.clone(), dtype)
    assert ir.serde.serialize_model(model).SerializeToString() == before


def test_narrow_types_are_those_of_the_options() -> None:
    assert NARROW == {"fp16": FLOAT16, "bf16": BFLOAT16}


def _bfloat16_chain() -> ir.Model:
    return _model(
        "chain (bfloat16[n,8] x) => (bfloat16[n,8] y)"
        " <bfloat16[8] w = {1, 2, 3, 4, 5, 6, 7, 8}> {"
        " product = Mul(x, x) sum = Add(product, w) y = Sqrt(sum) }"
    )


def _rounded(array: npt.ArrayLike) -> Array:
    return np.asarray(array, np.float32).astype(ml_dtypes.bfloat16).astype(np.float32)


def _chain_weights(model: ir.Model) -> Array:
    weights = _rounded(np.arange(1, 9))
    tensor = ir.tensor(weights.astype(ml_dtypes.bfloat16), dtype=BFLOAT16, name="w")
    model.graph.initializers["w"].const_value = tensor
    return weights


def test_widened_nodes_round_each_result() -> None:
    model = _bfloat16_chain()
    weights = _chain_weights(model)
    surface(model, BFLOAT16, outside=BFLOAT16)
    widen(model, BFLOAT16)
    assert {value.dtype for value in (*model.graph.inputs, *model.graph.outputs)} == {FLOAT}
    x = _rounded(_random(5, 8))
    (found,) = _run(model, x)
    expected = _rounded(np.sqrt(_rounded(_rounded(x * x) + weights)))
    np.testing.assert_array_equal(found, expected)
    assert not np.array_equal(found, _rounded(np.sqrt(x * x + weights)))


def test_widen_changes_only_the_nodes_that_it_is_given() -> None:
    model = _bfloat16_chain()
    widen(model, BFLOAT16, set(_named(model, "sum")))
    types = {
        node.op_type: {v.dtype for v in (*node.inputs, *node.outputs) if v is not None}
        for node in model.graph
        if node.op_type != "Cast"
    }
    assert types == {"Mul": {BFLOAT16}, "Add": {FLOAT}, "Sqrt": {BFLOAT16}}


def test_widen_without_such_values_changes_nothing() -> None:
    model = _model(NORM)
    widen(model, BFLOAT16)
    assert _operators(model) == _operators(_model(NORM))


def test_surface_changes_only_what_has_the_outer_type() -> None:
    model = _model(
        "mixed (bfloat16[4] x, float[4] z) => (bfloat16[4] y, float[4] w) {"
        " y = Add(x, x) w = Add(z, z) }"
    )
    surface(model, BFLOAT16, outside=BFLOAT16)
    assert _operators(model).count("Cast") == 2
    assert [value.name for value in model.graph.outputs] == ["y", "w"]
    assert {value.dtype for value in (*model.graph.inputs, *model.graph.outputs)} == {FLOAT}
