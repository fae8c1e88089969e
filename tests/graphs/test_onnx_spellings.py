"""Norms as ONNX files spell them beyond what torch's exporters write, and what only looks alike."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import pytest

from dyt_compile.dyt import DytParameters, evaluate
from dyt_compile.errors import CaptureError
from dyt_compile.graphs.onnx import OnnxGraph
from dyt_compile.graphs.onnx_prepare import restore
from dyt_compile.passes.match import match
from dyt_compile.sites import NormKind

pytestmark = pytest.mark.core

Array = np.ndarray[Any, Any]

GAMMA = "float[8] g = {1, 2, 3, 4, 5, 6, 7, 8}"
BETA = "float[8] b = {8, 7, 6, 5, 4, 3, 2, 1}"
EPS = "e = Constant<value_float=0.00001>()"
LAST = "ax = Constant<value_ints=[-1]>()"
ROOT_MEAN = f"{EPS} v = Add(s, e) r = Sqrt(v) z = Div(x, r) y = Mul(g, z)"
"""A norm of x behind `s`, the mean of its squares."""

NORM_FUNCTION = f"""
<domain: "f", opset_import: ["": 18]>
norm <eps: float = 0.02> (x, g) => (y) {{
  q = Mul(x, x) {LAST} s = ReduceMean(q, ax)
  e = Constant<value_float: float = @eps>() v = Add(s, e) r = Sqrt(v) z = Div(x, r) y = Mul(g, z)
}}
"""


def model(
    body: str,
    *,
    x: str = "float[N,6,8] x",
    y: str = "float[N,6,8] y",
    more: str = "",
    opset: int = 18,
    functions: str = "",
) -> ir.Model:
    """A model of the nodes in ONNX's text format, with g and b as gamma and beta."""
    held = ", ".join(filter(None, (GAMMA, BETA, more)))
    text = (
        f'<ir_version: 8, opset_import: ["": {opset}, "com.microsoft": 1, "f": 1]>\n'
        f"m ({x}) => ({y}) <{held}> {{ {body} }}\n{functions}"
    )
    return ir.from_proto(onnx.parser.parse_model(text))


def graph(source: ir.Model) -> OnnxGraph:
    return OnnxGraph.from_model("m", source)


def run(of: OnnxGraph, *inputs: Array) -> list[Array]:
    segment = of.segment(list(of.inputs.values()), list(of.outputs.values()))
    return [np.asarray(value) for value in segment(list(inputs))]


def normal(*shape: int) -> Array:
    return np.random.default_rng(3).normal(size=shape).astype(np.float32)


@dataclass(frozen=True)
class Norm:
    """A spelling, and the site that it is."""

    name: str
    body: str
    kind: NormKind = NormKind.RMS_NORM
    eps: float = 1e-5
    affine: tuple[str, ...] = ("gamma",)
    x: str = "float[N,6,8] x"
    y: str = "float[N,6,8] y"
    more: str = ""
    opset: int = 18
    functions: str = ""

    def graph(self) -> OnnxGraph:
        return graph(
            model(
                self.body, x=self.x, y=self.y, more=self.more, opset=self.opset,
                functions=self.functions,
            )
        )  # fmt: skip


LAYER = NormKind.LAYER_NORM
BOTH = ("gamma", "beta")
ONES = ", ".join(["1"] * 12)
ZEROS = ", ".join(["0"] * 12)

NORMS = (
    Norm(
        "l2_normalization_times_root_of_length",
        "n = LpNormalization<axis=-1, p=2>(x) d = Constant<value_float=2.8284270763>() "
        "m = Mul(n, d) y = Mul(m, g)",
        eps=0.0,
    ),
    Norm(
        "reduce_l2",
        f"{LAST} l = ReduceL2(x, ax) d = Constant<value_float=2.8284270763>() q = Div(l, d) "
        "m = Div(x, q) y = Mul(m, g)",
        eps=0.0,
    ),
    Norm(
        "reduce_sum_square",
        f"{LAST} t = ReduceSumSquare(x, ax) n = Constant<value_float=8.0>() s = Div(t, n) "
        f"{ROOT_MEAN}",
    ),
    Norm(
        "reduce_sum_square_with_axes_as_attribute",
        "t = ReduceSumSquare<axes=[-1]>(x) n = Constant<value_float=8.0>() s = Div(t, n) "
        f"{ROOT_MEAN}",
        opset=13,
    ),
    Norm(
        "sum_over_length_from_shape",
        f"q = Mul(x, x) {LAST} t = ReduceSum(q, ax) l = Shape(x) i = Constant<value_int=2>() "
        f"k = Gather(l, i) d = Cast<to=1>(k) s = Div(t, d) {ROOT_MEAN}",
    ),
    Norm(
        "sums_of_many",
        f"q = Mul(x, x) {LAST} s = ReduceMean(q, ax) {EPS} v = Sum(s, e) r = Sqrt(v) "
        "z = Div(x, r) w = Mul(g, z) y = Sum(w, b)",
        affine=BOTH,
    ),
    Norm(
        "computed_axes",
        "q = Mul(x, x) h = Constant<value_int=2>() o = Constant<value_ints=[0]>() "
        f"ax = Unsqueeze(h, o) s = ReduceMean(q, ax) {ROOT_MEAN}",
    ),
    Norm(
        "computed_eps",
        f"q = Mul(x, x) {LAST} s = ReduceMean(q, ax) a = Constant<value_float=0.00001>() "
        "one = Constant<value_float=1.0>() e = Mul(a, one) v = Add(s, e) r = Sqrt(v) "
        "z = Div(x, r) y = Mul(g, z)",
    ),
    Norm(
        "constants_of_every_kind",
        "p = Constant<value_int=2>() q = Pow(x, p) s = ReduceMean<axes=[-1]>(q) "
        "e = Constant<value_floats=[0.00001]>() v = Add(s, e) h = Constant<value=float {-0.5}>() "
        "r = Pow(v, h) z = Mul(x, r) "
        "w = Constant<value_floats=[1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0]>() y = Mul(w, z)",
        opset=14,
    ),
    Norm(
        "cast_like",
        f"d = Cast<to=11>(x) q = Mul(d, d) {LAST} t = ReduceMean(q, ax) s = CastLike(t, x) "
        f"{ROOT_MEAN}",
    ),
    Norm(
        "mean_variance_normalization",
        "n = MeanVarianceNormalization<axes=[2]>(x) z = Mul(n, g) y = Add(z, b)",
        kind=LAYER,
        eps=0.0,
        affine=BOTH,
    ),
    Norm(
        "instance_normalization_of_the_last_axis",
        "i = InstanceNormalization<epsilon=0.00001>(x, gs, bs) z = Mul(i, g) y = Add(z, b)",
        kind=LAYER,
        affine=BOTH,
        more="float[6] gs = {1, 1, 1, 1, 1, 1}, float[6] bs = {0, 0, 0, 0, 0, 0}",
    ),
    Norm(
        "instance_normalization_of_rows",
        "r = Constant<value_ints=[1, -1, 8]>() h = Reshape(x, r) "
        "i = InstanceNormalization<epsilon=0.00001>(h, gs, bs) l = Shape(x) k = Reshape(i, l) "
        "z = Mul(k, g) y = Add(z, b)",
        kind=LAYER,
        affine=(),
        x="float[2,6,8] x",
        y="float[2,6,8] y",
        more=f"float[12] gs = {{{ONES}}}, float[12] bs = {{{ZEROS}}}",
    ),
    Norm(
        "group_normalization_of_one_group_without_space",
        "y = GroupNormalization<num_groups=1, epsilon=0.00001>(x, g, b)",
        kind=LAYER,
        affine=BOTH,
        x="float[N,8] x",
        y="float[N,8] y",
        opset=21,
    ),
    Norm("positive_axis", "y = LayerNormalization<axis=2>(x, g, b)", kind=LAYER, affine=BOTH),
    Norm(
        "quantized_gamma",
        "gd = DequantizeLinear(gq, sc) "
        "y = SimplifiedLayerNormalization<axis=-1, epsilon=0.00001>(x, gd)",
        more="int8[8] gq = {1, 2, 3, 4, 5, 6, 7, 8}, float sc = {0.1}",
    ),
    Norm(
        "between_quantizations",
        "u = QuantizeLinear(x, sc) xd = DequantizeLinear(u, sc) n = LayerNormalization(xd, g, b) "
        "o = QuantizeLinear(n, sc) y = DequantizeLinear(o, sc)",
        kind=LAYER,
        affine=BOTH,
        more="float sc = {0.1}",
    ),
    Norm(
        "einsum",
        f'{LAST} q = Einsum<equation="abc,abc->ab">(x, x) u = Unsqueeze(q, ax) '
        f"n = Constant<value_float=8.0>() s = Div(u, n) {ROOT_MEAN}",
    ),
    Norm(
        "product_with_itself",
        "rs = Constant<value_ints=[-1, 1, 8]>() h = Reshape(x, rs) "
        "k = Transpose<perm=[0, 2, 1]>(h) t = MatMul(h, k) "
        "bs = Constant<value_ints=[-1, 6, 1]>() u = Reshape(t, bs) "
        f"n = Constant<value_float=8.0>() s = Div(u, n) {ROOT_MEAN}",
    ),
    Norm(
        "mean_as_product", f"q = Mul(x, x) s = MatMul(q, m) {ROOT_MEAN}",
        more="float[8,1] m = {0.125, 0.125, 0.125, 0.125, 0.125, 0.125, 0.125, 0.125}",
    ),
    Norm(
        "mean_by_pooling", f"q = Mul(x, x) s = AveragePool<kernel_shape=[8]>(q) {ROOT_MEAN}",
    ),
    Norm(
        "tiled_statistics",
        f"q = Mul(x, x) {LAST} p = ReduceMean(q, ax) o = Constant<value_ints=[1, 1, 8]>() "
        f"s = Tile(p, o) {ROOT_MEAN}",
    ),
    Norm(
        "variance_that_is_no_less_than_zero",
        f"{LAST} m = ReduceMean(x, ax) c = Sub(x, m) q = Mul(x, x) t = ReduceMean(q, ax) "
        f"w = Mul(m, m) d = Sub(t, w) s = Relu(d) {EPS} v = Add(s, e) r = Sqrt(v) z = Div(c, r) "
        "k = Mul(z, g) y = Sub(k, b)",
        kind=LAYER, affine=BOTH,
    ),
    Norm(
        "divided_by_gamma",
        f"q = Mul(x, x) {LAST} s = ReduceMean(q, ax) {EPS} v = Add(s, e) r = Sqrt(v) z = Div(x, r) "
        "y = Div(z, g)",
    ),
    Norm("function", "y = f.norm(x, g)", eps=0.02, functions=NORM_FUNCTION),
    Norm(
        "function_with_an_attribute", "y = f.norm<eps=0.01>(x, g)", eps=0.01,
        functions=NORM_FUNCTION,
    ),
    Norm(
        "function_in_a_function", "y = f.outer(x, g)", eps=0.02,
        functions='<domain: "f", opset_import: ["": 18, "f": 1]>'
        f"outer (x, g) => (y) {{ n = f.norm(x, g) y = Identity(n) }}{NORM_FUNCTION}",
    ),
)  # fmt: skip


def named(entries: Any) -> list[Any]:
    return [pytest.param(entry, id=entry.name) for entry in entries]


def shape(declared: str) -> list[int]:
    sizes = declared[declared.index("[") + 1 : declared.index("]")].split(",")
    return [int(size) if size.isdigit() else 3 for size in sizes]


@pytest.mark.parametrize("norm", named(NORMS))
def test_norm_is_found_and_replaced(norm: Norm) -> None:
    of = norm.graph()
    found = match(of)
    assert found.refusals == ()
    (site,) = found.sites
    assert (site.kind, site.eps, site.affine) == (norm.kind, norm.eps, norm.affine)
    assert (site.axes, site.channels, site.dtype) == ((-1,), 8, "float32")
    parameters = DytParameters(np.array([0.7]), np.linspace(0.5, 2, 8), np.linspace(-1, 1, 8))
    x = normal(*shape(norm.x))
    (source, expected) = of.segment(list(of.inputs.values()), [site.input, site.output])([x])
    assert not np.allclose(expected, evaluate(parameters, source), atol=1e-2)
    replaced = of.replace([(site, parameters)])
    (result,) = run(replaced, x)
    given = evaluate(parameters, source)
    if "quantizations" in norm.name:
        given = np.clip(np.round(given / 0.1), 0, 255) * 0.1
    if norm.affine == ():  # what follows in the file stays
        given = given.reshape(x.shape) * np.arange(1, 9) + np.arange(8, 0, -1)
    np.testing.assert_allclose(result, given, rtol=1e-5, atol=1e-5)


@dataclass(frozen=True)
class Other:
    """What is no site, and why."""

    name: str
    body: str
    kind: NormKind
    reason: str
    x: str = "float[N,6,8] x"
    y: str = "float[N,6,8] y"
    more: str = ""
    opset: int = 18


NONE = NormKind.OTHER
OTHERS = (
    Other("l2_normalization", "y = LpNormalization<axis=-1, p=2>(x)", NONE, "length of the row"),
    Other(
        "mean_variance_over_two_axes", "y = MeanVarianceNormalization<axes=[1, 2]>(x)", NONE,
        "2 axes",
    ),
    Other(
        "layer_norm_over_two_axes", "y = LayerNormalization<axis=1>(x, gg)", NONE, "2 axes",
        x="float[N,2,2] x", y="float[N,2,2] y", more="float[2,2] gg = {1, 2, 3, 4}",
    ),
    Other(
        "instance_norm_with_gamma", "y = InstanceNormalization(x, gs, gs)",
        NormKind.INSTANCE_NORM, "space or time", more="float[6] gs = {1, 2, 3, 4, 5, 6}",
    ),
    Other(
        "group_norm_spelled_as_instance_norm",
        "r = Constant<value_ints=[0, 2, -1]>() h = Reshape(x, r) "
        "i = InstanceNormalization(h, gs, bs) l = Shape(x) y = Reshape(i, l)",
        NormKind.INSTANCE_NORM, "space or time",
        more="float[2] gs = {1, 1}, float[2] bs = {0, 0}",
    ),
    Other(  # as in wav2vec 2.0: x holds channels, then time
        "group_norm_of_a_channel_a_group",
        "r = Constant<value_ints=[0, 6, -1]>() h = Reshape(x, r) "
        "i = InstanceNormalization(h, gs, bs) l = Shape(x) k = Reshape(i, l) "
        "z = Mul(k, gc) y = Add(z, gc)",
        NormKind.INSTANCE_NORM, "space or time",
        more="float[6] gs = {1, 1, 1, 1, 1, 1}, float[6] bs = {0, 0, 0, 0, 0, 0}, "
        "float[6,1] gc = {1, 2, 3, 4, 5, 6}",
    ),
    Other(
        "instance_norm_alone", "y = InstanceNormalization(x, gs, bs)", NormKind.INSTANCE_NORM,
        "space or time",
        more="float[6] gs = {1, 1, 1, 1, 1, 1}, float[6] bs = {0, 0, 0, 0, 0, 0}",
    ),
    Other(
        "group_norm_of_two_groups", "y = GroupNormalization<num_groups=2>(x, g, b)",
        NormKind.GROUP_NORM, "groups", x="float[N,8] x", y="float[N,8] y", opset=21,
    ),
    Other(
        "group_norm_of_onnx_runtime",
        "y = com.microsoft.GroupNorm<groups=2, activation=0, channels_last=1>(x, g, b)",
        NormKind.GROUP_NORM, "groups", x="float[N,4,4,8] x", y="float[N,4,4,8] y",
    ),
    Other(
        "batch_norm_over_tokens", "y = BatchNormalization(x, t, t, t, t)", NormKind.BATCH_NORM,
        "BatchNorm", more="float[6] t = {1, 1, 1, 1, 1, 1}",
    ),
    Other(
        "fused_gate", "y = com.microsoft.GatedRMSNorm<activation=\"silu\">(x, g, x)", NONE, "gate",
    ),
    Other(
        "fused_norm_whose_mean_is_read",
        "y, m, i, s = com.microsoft.SkipLayerNormalization(x, x, g, b) ", NONE, "mean",
        y="float[N,6,8] y, float[N,6,1] m",
    ),
)  # fmt: skip


@pytest.mark.parametrize("other", named(OTHERS))
def test_what_only_looks_alike_is_refused_with_the_reason(other: Other) -> None:
    source = model(other.body, x=other.x, y=other.y, more=other.more, opset=other.opset)
    found = match(graph(source))
    assert found.sites == ()
    (refusal,) = found.refusals
    assert refusal.kind is other.kind
    assert other.reason in refusal.reason


def test_two_dynamic_axes_are_not_taken_for_equal() -> None:
    of = graph(
        model(
            "l = Shape(k) h = Reshape(x, l) y = LayerNormalization(h, g)",
            x="float[N,M,8] x, float[P,Q,8] k", y="float[P,Q,8] y",
        )
    )  # fmt: skip
    (site,) = match(of).sites
    assert site.input.name == "h"
    x = normal(2, 6, 8)
    parameters = DytParameters(np.array([0.5]))
    (result,) = run(of.replace([(site, parameters)]), x, normal(3, 4, 8))
    np.testing.assert_allclose(result, evaluate(parameters, x.reshape(3, 4, 8)), rtol=1e-5)


def test_statistics_that_others_read_stay_served() -> None:
    source = model(
        "y, m = LayerNormalization(x, g, b)", y="float[N,6,8] y, float[N,6,1] m", opset=17
    )
    of = graph(source)
    (site,) = match(of).sites
    x = normal(2, 6, 8)
    parameters = DytParameters(np.array([0.5]))
    y, mean = run(of.replace([(site, parameters)]), x)
    np.testing.assert_allclose(y, evaluate(parameters, x), rtol=1e-5)
    np.testing.assert_allclose(mean[..., 0], x.mean(-1), atol=1e-6)


def test_initializer_that_is_an_input_too_is_a_constant() -> None:
    source = model("y = LayerNormalization(x, g, b)")
    source.graph.inputs.extend(source.graph.initializers.values())
    of = graph(source)
    assert list(of.inputs) == ["x"]
    (site,) = match(of).sites
    assert site.affine == BOTH


@pytest.mark.parametrize(
    ("norm", "kind"),
    [
        ("LayerNormalization(x, w, a)", NormKind.LAYER_NORM),
        ("LayerNormalization(x, w)", NormKind.LAYER_NORM),
        ("SimplifiedLayerNormalization(x, w)", NormKind.RMS_NORM),
    ],
)
def test_modulation_fused_into_a_norm_stays_behind_its_site(norm: str, kind: NormKind) -> None:
    """Exporters fuse a scale that is computed from the model's inputs into the norm before it."""
    source = model(
        f"o = Constant<value_float=1.0>() w = Add(c, o) a = Mul(c, g) y = {norm}",
        x="float[N,6,8] x, float[N,1,8] c",
    )
    of = graph(source)
    found = match(of)
    assert found.refusals == ()
    (site,) = found.sites
    assert (site.kind, site.channels, site.affine) == (kind, 8, ())
    parameters = DytParameters(np.array([0.5]))
    x, c = normal(2, 6, 8), normal(2, 1, 8) + 3
    (result,) = run(of.replace([(site, parameters)]), x, c)
    added = c * np.arange(1, 9) if ", a)" in norm else 0
    np.testing.assert_allclose(result, evaluate(parameters, x) * (1 + c) + added, rtol=1e-5)


def test_gamma_computed_from_an_initializer_that_is_an_input_too_is_no_modulation() -> None:
    source = model("o = Constant<value_float=1.0>() w = Add(g, o) y = LayerNormalization(x, w, b)")
    source.graph.inputs.extend(source.graph.initializers.values())
    of = graph(source)
    assert [node.op_type for node in of.apart().graph] == ["Constant", "Add", "LayerNormalization"]
    (site,) = match(of).sites
    assert site.affine == BOTH


def test_norm_that_stays_is_fused_with_its_modulation_again() -> None:
    before = model(
        "o = Constant<value_float=1.0>() w = Add(c, o) "
        "y = LayerNormalization<epsilon=0.01>(x, w, c)",
        x="float[N,6,8] x, float[N,1,8] c",
    )
    after = graph(before).apart()
    assert "Mul" in [node.op_type for node in after.graph]
    restore(after)
    assert [node.op_type for node in after.graph] == ["Constant", "Add", "LayerNormalization"]
    norm = after.graph[-1]
    assert [value.name for value in norm.inputs if value] == ["x", "w", "c"]
    assert norm.attributes.get_float("epsilon", 0.0) == pytest.approx(0.01)
    assert [value.name for value in after.graph.outputs] == ["y"]


BOUNDS = {
    "slice": "i = Constant<value_int=1>() n = Gather(l, i) p = Mul(t, q) u = Div(n, q) "
    "w = Mul(u, q) h = Slice(x, p, w, t, t)",
    "expand": "m = Mod(f, q) k = Constant<value_ints=[0, 0, 0]>() z = Equal(k, k) "
    "w = Where(z, l, k) h = Expand(x, w)",
    "reshape": "k = Constant<value_ints=[1]>() r = ConstantOfShape(k) "
    "d = Concat<axis=0>(c, r) w = Mul(d, l) h = Reshape(x, w)",
}


@pytest.mark.parametrize("bounds", BOUNDS.values(), ids=BOUNDS)
def test_shape_that_a_chain_of_nodes_computes_is_followed(bounds: str) -> None:
    """What torch's older exporter writes for chunk, unflatten and expand."""
    source = model(
        "l = Shape(x) t = Constant<value_ints=[1]>() q = Constant<value_ints=[2]>() "
        "f = Constant<value_ints=[5]>() c = Constant<value_ints=[1, 1]>() "
        f"{bounds} y = LayerNormalization(h, s)",
        x="float[2,6,8] x", y="float[A,B,C] y", more="float s = {2}",
    )  # fmt: skip
    values = {v.name: v for node in graph(source).apart().graph for v in node.outputs}
    assert values["h"].shape is not None
    assert values["h"].shape.is_static()


def test_value_that_nothing_makes_is_named() -> None:
    source = model("y = Clip(x, other)")
    with pytest.raises(CaptureError, match=r"'other', which the Clip node .* is made by no node"):
        graph(source)


def test_shapes_behind_an_unknown_operator_stay_unknown() -> None:
    source = model("u = f.other(x) l = Shape(x) h = Reshape(u, l) y = LayerNormalization(h, g, b)")
    (site,) = match(graph(source)).sites
    assert (site.input.name, site.channels) == ("h", 8)
