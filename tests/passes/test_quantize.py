"""Eight bits behind DyT: scales that follow from the graph, integer kernels, a reason for the rest.

The models are ONNX text: `y = alpha * x ...` is DyT as files hold it, C channels.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import numpy_helper, parser

import dyt_compile
from dyt_compile.compiler import Conversion
from dyt_compile.errors import BudgetError, OptionError
from dyt_compile.graphs.onnx_quantize import FORMATS
from dyt_compile.passes.quantize import RUNTIMES
from dyt_compile.runtime import Session

ort = pytest.importorskip("onnxruntime")

pytestmark = pytest.mark.core

Array = npt.NDArray[Any]

C, N = 16, 24
DYT = "s = Mul(x, alpha) t = Tanh(s) m = Mul(t, gamma) d = Add(m, beta) "
INTEGER = {"MatMulIntegerToFloat", "QGemm"}
PRODUCTS = {"MatMul", "Gemm", "FusedGemm", "Conv"}


def random(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


WEIGHTS = {
    "alpha": np.array([0.7], np.float32), "gamma": random(C, seed=1), "beta": random(C, seed=2),
    "w": random(C, N, seed=3), "b": random(N, seed=4), "wt": random(N, C, seed=5),
    "v": random(C, N, seed=6), "square": random(C, C, seed=7), "experts": random(3, C, N, seed=8),
    "kernel": random(N, C, 1, 1, seed=9), "depth": random(C, 1, 3, 3, seed=10),
    "place": np.array([0], np.int64),
    "bias2": random(C, seed=11), "channels": random(C, 1, 1, seed=12),
}  # fmt: skip


def model(body: str, shape: str, out: str, opset: int = 20, dyt: str = DYT) -> ir.Model:
    """x of the shape, then DyT as `d`, then the body, whose result is `y`."""
    text = f'<ir_version: 9, opset_import: ["": {opset}]> g (float[{shape}] x) => (float[{out}] y)'
    made = parser.parse_model(f"{text} {{ {dyt}{body} }}")
    read = {name for node in made.graph.node for name in node.input}
    made.graph.initializer.extend(
        numpy_helper.from_array(array, name) for name, array in WEIGHTS.items() if name in read
    )
    onnx.checker.check_model(made)
    loaded: ir.Model = ir.from_proto(made)
    return loaded


def quantized(made: ir.Model, dtype: str = "int8", fold: bool = True, **options: Any) -> Conversion:
    return dyt_compile.convert(made, mode="exact", fold=fold, quantize=dtype, **options)


def run(made: ir.Model, x: Array) -> Array:
    return np.asarray(Session(made).run([x])[0])


def optimized(made: ir.Model, folder: Path) -> Counter[str]:
    """The operators that ONNX Runtime's optimizer leaves."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    ir.save(made, folder / "model.onnx")
    ort.InferenceSession(str(folder / "model.onnx"), options, providers=["CPUExecutionProvider"])
    return Counter(node.op_type for node in ir.load(folder / "optimized.onnx").graph)


def constant(node: ir.Node, place: int) -> Array:
    value = node.inputs[place]
    assert value is not None and value.const_value is not None  # noqa: PT018
    return np.asarray(value.const_value.numpy())


def quantizers(made: ir.Model) -> list[ir.Node]:
    return [node for node in made.graph if node.op_type == "QuantizeLinear"]


LINEARS = {
    "matmul": ("p = MatMul(d, w) y = Add(p, b)", "{}{}", ""),
    "bias first": ("p = MatMul(d, w) y = Add(b, p)", "{}{}", ""),
    "no bias": ("y = MatMul(d, w)", "{}{}", ""),
    "transposed": ("u = Transpose<perm=[1,0]>(wt) p = MatMul(d, u) y = Add(p, b)", "{}{}", ""),
    "gelu": ('p = MatMul(d, w) a = Add(p, b) y = Gelu<approximate="none">(a)', "{}{}", ""),
    "gemm": ("y = Gemm(d, w, b)", "{}", "2"),
    "gemm, transposed": ("y = Gemm<transB=1>(d, wt, b)", "{}", "2"),
    "gemm, no bias": ("y = Gemm(d, w)", "{}", "2"),
    "residual behind": ("p = MatMul(d, square) y = Add(p, x)", "{}{}", ""),
    "views before": (
        "e = Unsqueeze(d, place) f = Squeeze(e, place) p = MatMul(f, w) y = Add(p, b)", "{}{}", ""
    ),
    "mean before": ("e = ReduceMean<keepdims=0>(d, one) p = MatMul(e, w) y = Add(p, b)", "", "3"),
}  # fmt: skip
LEADING = {"2 static": "4, ", "2 dynamic": "batch, ", "3 static": "2, 5, ", "3 dynamic": "b, 5, ",
           "4 static": "2, 3, 5, "}  # fmt: skip
WEIGHTS["shift"] = np.array([0.3], np.float32)
WEIGHTS["one"] = np.array([1], np.int64)

CASES = [
    pytest.param(body, leading, id=f"{name}, {rank}")
    for name, (body, _, only) in LINEARS.items()
    for rank, leading in LEADING.items()
    if rank.startswith(only or rank[0])
]


def case(body: str, leading: str, opset: int = 20) -> tuple[ir.Model, Array]:
    """The model, and an input for it."""
    sizes = [4 if not size.isdigit() else int(size) for size in leading.split(", ")[:-1]]
    last = C if "square" in body else N
    out = leading.split(", ", 1)[0] + ", " if "ReduceMean" in body else leading
    return model(body, f"{leading}{C}", f"{out}{last}", opset), random(*sizes, C, seed=20)


@pytest.mark.parametrize(("body", "leading"), CASES)
def test_products_run_as_integers_in_onnx_runtime(body: str, leading: str, tmp_path: Path) -> None:
    made, x = case(body, leading)
    result = quantized(made)
    assert result.quantized is not None
    assert result.quantized.products == 1
    found = optimized(result.quantized.model, tmp_path)
    assert sum(found[name] for name in INTEGER) == 1
    assert not any(found[name] for name in (*PRODUCTS, "DequantizeLinear")), found
    expected = run(made, x)
    error = np.linalg.norm(run(result.quantized.model, x) - expected) / np.linalg.norm(expected)
    assert 1e-4 < error < 0.02  # eight bits, and not none


def test_a_bias_left_as_it_was_is_multiplied_in_float(tmp_path: Path) -> None:
    """What the layout is for: if ONNX Runtime came to do without it, it could go."""
    made, _ = case(*CASES[2].values)  # type: ignore[arg-type]
    result = quantized(made).quantized
    assert result is not None
    plain = result.model.clone()
    for node in plain.graph:
        if node.op_type == "Add":
            row = next(v for v in node.inputs if v is not None and v.const_value is not None)
            array = row.const_value.numpy()
            row.shape, row.const_value = ir.Shape([N]), ir.tensor(array.reshape(N), name=row.name)
    found = optimized(plain, tmp_path)
    assert (found["Gemm"], found["DequantizeLinear"]) == (1, 2)


@pytest.mark.parametrize("opset", [15, 17, 20, 21, 23])
@pytest.mark.parametrize("dtype", FORMATS)
def test_every_opset_that_has_the_type(opset: int, dtype: str) -> None:
    made, x = case("p = MatMul(d, w) y = Add(p, b)", "b, 5, ", opset)
    result = quantized(made, dtype).quantized
    assert result is not None
    assert result.graph.opset == (20 if dtype == "fp8" and opset < 19 else opset)
    expected = run(made, x)
    error = np.linalg.norm(run(result.model, x) - expected) / np.linalg.norm(expected)
    assert error < {"int8": 0.01, "fp8": 0.05}[dtype]


def test_the_numbers_are_those_of_integer_arithmetic() -> None:
    made, x = case("p = MatMul(d, w) y = Add(p, b)", "b, 5, ")
    result = quantized(made).quantized
    assert result is not None
    bounded = np.rint(np.tanh(WEIGHTS["alpha"] * x) * 127)
    weight = WEIGHTS["w"].astype(np.float64) * WEIGHTS["gamma"][:, None]
    scales = np.abs(weight).max(axis=0) / 127
    bias = WEIGHTS["b"] + WEIGHTS["beta"].astype(np.float64) @ WEIGHTS["w"]
    expected = (bounded @ np.rint(weight / scales)) * (scales / 127) + bias
    np.testing.assert_allclose(run(result.model, x), expected, atol=1e-4)


def test_scale_of_a_folded_site_needs_no_data() -> None:
    made, _ = case("p = MatMul(d, w) y = Add(p, b)", "b, 5, ")
    for dtype, scale in (("int8", 1 / 127), ("fp8", 2.0**-8)):
        (node,) = quantizers(quantized(made, dtype).quantized.model)  # type: ignore[union-attr]
        assert constant(node, 1) == np.float32(scale)
        assert constant(node, 2) == 0


def test_scale_of_an_unfolded_site_follows_from_gamma_and_beta() -> None:
    made, _ = case("p = MatMul(d, square) a = Add(p, bias2) y = Add(a, d)", "b, 5, ")
    result = quantized(made)
    largest = float((np.abs(WEIGHTS["gamma"]) + np.abs(WEIGHTS["beta"])).max())
    assert result.quantized is not None
    (site,) = result.quantized.sites
    assert site.bound == pytest.approx(largest, rel=1e-6)
    (node,) = quantizers(result.quantized.model)
    assert constant(node, 1) == pytest.approx(largest / 127, rel=1e-6)
    y = run(made, 100 * random(4, 5, C))  # saturated: the bound is reached, and never passed
    assert np.isfinite(y).all()


def test_scale_of_derf_follows_from_gamma_and_beta_too() -> None:
    derf = "s = Mul(x, alpha) a = Add(s, shift) t = Erf(a) m = Mul(t, gamma) d = Add(m, beta) "
    result = quantized(model("y = MatMul(d, w)", f"b, 5, {C}", f"b, 5, {N}", dyt=derf)).quantized
    assert result is not None
    (site,) = result.sites
    largest = (np.abs(WEIGHTS["gamma"]) + np.abs(WEIGHTS["beta"])).max()
    assert site.bound == pytest.approx(float(largest), rel=1e-6)


def test_fp8_keeps_small_numbers_out_of_the_subnormals() -> None:
    scale = FORMATS["fp8"].scale(1.0, np.float32)
    numbers = np.geomspace(2.0**-14, 1.0, 4000, dtype=np.float32)
    rounded = (numbers / scale).astype(ml_dtypes.float8_e4m3fn).astype(np.float32) * scale
    assert np.abs(rounded / numbers - 1).max() <= 2.0**-4
    twice = (numbers / (2 * scale)).astype(ml_dtypes.float8_e4m3fn).astype(np.float32) * 2 * scale
    assert np.abs(twice / numbers - 1).max() > 2.0**-4  # no larger scale does
    assert np.isnan((np.float32(1) / (scale / 2)).astype(ml_dtypes.float8_e4m3fn))  # nor a smaller


@given(st.floats(1e-3, 1e3), st.sampled_from(["float32", "float16", "bfloat16"]))
@pytest.mark.parametrize("dtype", FORMATS)
def test_scale_rounds_the_bound_to_the_largest_number_or_below(
    dtype: str, bound: float, wide: str
) -> None:
    kind = np.dtype(ml_dtypes.bfloat16 if wide == "bfloat16" else wide)
    scale = float(FORMATS[dtype].scale(bound, kind).astype(np.float64))
    largest = bound / scale
    assert (np.rint(largest) == 127) if dtype == "int8" else (224 < largest <= 448)


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_products_of_one_value_share_a_quantizer_where_the_runtime_allows_it(
    runtime: str, tmp_path: Path
) -> None:
    made, x = case("p = MatMul(d, w) q = MatMul(d, v) a = MatMul(d, w) e = Sub(p, q) y = Sub(e, a)",
                   "b, 5, ")  # fmt: skip
    result = quantized(made, runtime=runtime).quantized
    assert result is not None
    found = optimized(result.model, tmp_path)
    assert result.products == 3
    if runtime in ("any", "onnxruntime"):
        assert (found["MatMulIntegerToFloat"], found["DequantizeLinear"]) == (3, 0)
    else:
        assert len(quantizers(result.model)) == 1
    np.testing.assert_allclose(run(result.model, x), run(made, x), atol=0.3)


def test_every_output_channel_has_a_scale() -> None:
    made, _ = case("y = MatMul(d, w)", "b, 5, ")
    result = quantized(made, fold=False).quantized
    assert result is not None
    (scales,) = (
        constant(node, 1) for node in result.model.graph
        if node.op_type == "DequantizeLinear" and constant_weight(node)
    )  # fmt: skip
    np.testing.assert_allclose(scales, np.abs(WEIGHTS["w"]).max(axis=0) / 127, rtol=1e-6)


def constant_weight(node: ir.Node) -> bool:
    return node.inputs[0] is not None and node.inputs[0].is_initializer()


def test_a_weight_that_something_else_reads_stays_for_it() -> None:
    made, x = case("p = MatMul(d, square) q = MatMul(x, square) y = Add(p, q)", "b, 5, ")
    result = quantized(made, fold=False).quantized
    assert result is not None
    assert result.products == 1
    squares = [v for v in result.model.graph.initializers.values() if v.name == "square"]
    np.testing.assert_array_equal(squares[0].const_value.numpy(), WEIGHTS["square"])  # type: ignore[union-attr]
    np.testing.assert_allclose(run(result.model, x), run(made, x), atol=0.2)


def test_a_channel_of_zeros_stays_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    dead = WEIGHTS["w"].copy()
    dead[:, 3] = 0
    monkeypatch.setitem(WEIGHTS, "w", dead)
    made, x = case("p = MatMul(d, w) y = Add(p, b)", "b, 5, ")
    result = quantized(made, fold=False).quantized
    assert result is not None
    np.testing.assert_array_equal(run(result.model, x)[..., 3], run(made, x)[..., 3])


NORM = "d = LayerNormalization<axis=-1>(x, gamma, beta) "
LEFT = {
    "norm": ("y = MatMul(d, w)", f"b, 5, {C}", f"b, 5, {N}", NORM, "its norm stays"),
    "activations": (
        "u = Transpose<perm=[0,2,1]>(d) y = MatMul(d, u)", f"b, 5, {C}", "b, 5, 5", DYT,
        "the product with another activation",
    ),
    "experts": ("y = MatMul(d, experts)", f"3, 5, {C}", f"3, 5, {N}", DYT, "is no matrix"),
    "einsum": (
        'y = Einsum<equation="bsd,df->bsf">(d, w)', f"b, 5, {C}", f"b, 5, {N}", DYT, "(Einsum)",
    ),
    "weight first": (
        "u = Transpose<perm=[1,0]>(d) y = MatMul(wt, u)", f"b, {C}", f"{N}, b", DYT,
        "whose weight stands before it",
    ),
    "activation": ("y = Relu(d)", f"b, 5, {C}", f"b, 5, {C}", DYT, "the activation"),
    "output": ("y = Identity(d)", f"b, 5, {C}", f"b, 5, {C}", DYT, "the model's output"),
}  # fmt: skip


@pytest.mark.parametrize("name", LEFT)
def test_what_stays_in_float_says_why(name: str) -> None:
    body, shape, out, dyt, reason = LEFT[name]
    result = quantized(model(body, shape, out, dyt=dyt)).quantized
    assert result is not None
    (left,) = result.left
    assert reason in left.reason
    assert (result.products, result.sites, quantizers(result.model)) == (0, (), [])


MAPS = "s = Mul(x, alpha) t = Tanh(s) d = Mul(t, channels) "
KERNELS = {"kernel": f"b, {N}, 6, 6", "depth": f"b, {C}, 4, 4"}


@pytest.mark.parametrize(
    ("kernel", "runtime", "count"),
    [
        ("kernel", "any", 1), ("kernel", "openvino", 1), ("kernel", "onnxruntime", 0),
        ("depth", "any", 0), ("depth", "tensorrt", 1), ("depth", "onnxruntime", 0),
    ],
)  # fmt: skip
def test_convolutions_are_quantised_for_who_has_them(kernel: str, runtime: str, count: int) -> None:
    groups = C if kernel == "depth" else 1
    body = f"y = Conv<group={groups}>(d, {kernel})"
    made = model(body, f"b, {C}, 6, 6", KERNELS[kernel], dyt=MAPS)
    result = quantized(made, runtime=runtime).quantized
    assert result is not None
    assert result.products == count
    assert len(result.left) == 1 - count
    assert count or "convolution" in result.left[0].reason
    x = random(2, C, 6, 6)
    expected = run(made, x)
    error = np.linalg.norm(run(result.model, x) - expected) / np.linalg.norm(expected)
    assert (error > 1e-5) == bool(count)
    assert error < 0.01


def batches(made: ir.Model) -> list[tuple[Array, ...]]:
    return [(random(8, 5, C, seed=seed),) for seed in range(4)]


def test_the_error_of_quantising_is_its_own_and_within_the_budget() -> None:
    made, _ = case("p = MatMul(d, w) y = Add(p, b)", "b, 5, ")
    result = dyt_compile.convert(made, batches(made), mode="exact", fold=True, quantize="int8")
    told = result.report.quantized
    assert told is not None
    assert (told.products, told.samples) == (1, 32)
    whole = [
        np.concatenate([run(m, x) for (x,) in batches(made)])
        for m in (made, result.quantized.model)
    ]  # type: ignore[union-attr]
    expected = np.linalg.norm(whole[1] - whole[0]) / np.linalg.norm(whole[0])
    assert told.error == pytest.approx(expected, rel=1e-3)
    assert told.total == pytest.approx(expected, rel=1e-3)
    assert result.report.error is None  # of fitting: nothing was fitted


PAIR = "p = MatMul(d, w) q = MatMul(d, v) r = Mul(q, small) y = Add(p, r)"
WEIGHTS["small"] = np.array(0.01, np.float32)


def pair() -> ir.Model:
    """Two products of one value, of which the first makes a hundred times the error."""
    return model(PAIR, f"b, 5, {C}", f"b, 5, {N}")


def test_products_stay_in_float_that_the_budget_does_not_hold() -> None:
    made = pair()
    whole = dyt_compile.convert(made, batches(made), mode="exact", quantize="int8")
    assert whole.report.quantized is not None
    assert whole.report.quantized.products == 2
    result = dyt_compile.convert(made, batches(made), mode="exact", budget=2e-3, quantize="int8")
    told = result.report.quantized
    assert told is not None
    assert result.quantized is not None
    assert tuple(result.quantized.weights) == ("q",)
    assert (told.products, told.over_budget) == (1, 1)
    assert told.sites[0][2] == ("q",)
    assert told.left == ((told.sites[0][0], "read by `p`, left: the budget", "p"),)
    assert told.alone["p"] > 20 * told.alone["q"] > 0
    assert told.samples == 16  # the other half chose
    x = np.concatenate([x for (x,) in batches(made)])
    error = np.linalg.norm(run(result.quantized.model, x) - run(made, x))
    assert 0 < error / np.linalg.norm(run(made, x)) <= 2e-3
    assert told.total is not None
    assert 0 < told.total <= 2e-3 < whole.report.quantized.total  # type: ignore[operator]


@pytest.mark.parametrize("opset", [18, 20, 23])
def test_a_file_of_any_opset_has_the_products_that_were_chosen(opset: int, tmp_path: Path) -> None:
    made = pair()
    result = dyt_compile.convert(made, batches(made), mode="exact", budget=2e-3, quantize="int8")
    path = dyt_compile.export_onnx(result, tmp_path / "model.onnx", opset=opset).path
    assert len(quantizers(ir.load(path))) == 1


def test_nothing_is_quantised_where_no_product_keeps_the_budget() -> None:
    made = pair()
    result = dyt_compile.convert(made, batches(made), mode="exact", budget=1e-5, quantize="int8")
    told = result.report.quantized
    assert told is not None
    assert (told.products, told.over_budget) == (0, 2)
    assert told.total == pytest.approx(0, abs=1e-6)  # folding rounds
    assert {reason for _, reason, _ in told.left} == {
        "read by `p`, left: the budget", "read by `q`, left: the budget",
    }  # fmt: skip
    assert result.quantized is not None
    assert quantizers(result.quantized.model) == []


def test_a_model_whose_float_outputs_keep_no_budget_is_refused() -> None:
    made = pair()
    spoilt = [(np.full_like(x, np.nan),) for (x,) in batches(made)]
    with pytest.raises(BudgetError, match=r"without eight bits is nan, not within the budget of 0"):
        dyt_compile.convert(made, spoilt, mode="exact", quantize="int8")


def test_the_budget_is_of_converting_and_quantising_together(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made = model("p = MatMul(d, w) y = Add(p, b)", f"b, 5, {C}", f"b, 5, {N}", dyt=NORM)
    data = batches(made)
    coarse = replace(FORMATS["int8"], largest=3.0)
    monkeypatch.setitem(FORMATS, "int8", coarse)
    result = dyt_compile.convert(made, data, mode="all", fold=True, quantize="int8")
    told, fitted = result.report.quantized, result.report.error
    assert told is not None
    assert None not in (fitted, told.error, told.total)
    assert result.report.error == dyt_compile.convert(made, data, mode="all").report.error
    assert max(fitted, told.error) < told.total < fitted + told.error  # type: ignore[type-var, operator]
    budget = 0.95 * told.total  # type: ignore[operator]
    assert dyt_compile.convert(made, data, budget=budget).report.converted == 1
    within = dyt_compile.convert(made, data, budget=budget, quantize="int8")
    left = within.report.quantized
    assert left is not None
    assert (within.report.converted, left.products, left.over_budget) == (1, 0, 1)
    assert left.total == pytest.approx(within.report.error)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"quantize": "int4"}, "quantize is 'int4'; allowed: int8, fp8"),
        ({"quantize": "int8", "runtime": "tflite"}, "runtime is 'tflite'; allowed: any, onnx"),
        ({"quantize": "fp8", "runtime": "onnxruntime"}, "no FP8 kernels; allowed with fp8: any"),
    ],
)
def test_options_that_are_not_allowed(options: Mapping[str, Any], told: str) -> None:
    made, _ = case("y = MatMul(d, w)", "b, 5, ")
    with pytest.raises(OptionError, match=told):
        dyt_compile.convert(made, **options)


@pytest.mark.parametrize("opset", [None, 18, 19, 21, 23])
def test_the_file_is_what_was_measured(opset: int | None, tmp_path: Path) -> None:
    made, x = case("p = MatMul(d, w) y = Add(p, b)", "b, 5, ")
    result = quantized(made)
    exported = dyt_compile.export_onnx(result, tmp_path / "model.onnx", opset=opset)
    assert exported.opset == (opset or 20)
    assert exported.export_error is not None
    assert exported.export_error <= 1e-6
    assert result.quantized is not None
    found = Session(exported.path).run([x])[0]
    np.testing.assert_allclose(found, run(result.quantized.model, x), atol=1e-5)
    assert exported.bytes < 6000


def test_fused_files_hold_the_quantizer_in_the_node_of_the_dyt(tmp_path: Path) -> None:
    made, _ = case("p = MatMul(d, w) y = Add(p, b)", "b, 5, ")
    for dtype in FORMATS:
        result = quantized(made, dtype, runtime="tensorrt")
        path = dyt_compile.export_onnx(result, tmp_path / f"{dtype}.onnx", fuse=True).path
        found = Counter(node.op_type for node in ir.load(path).graph)
        assert found["DyTBareQuantize"] == 1
        assert not found["QuantizeLinear"]
