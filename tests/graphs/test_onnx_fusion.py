"""An Add before a DyT and a QuantizeLinear behind it become part of its node, and nothing else."""

from __future__ import annotations

import functools
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import pytest
from onnx_ir.passes import common

from dyt_compile.dyt import DOMAIN, FORMS, FUSED, fused_name
from dyt_compile.graphs import onnx_functions
from dyt_compile.graphs.onnx_fusion import forms, fuse, unfuse
from dyt_compile.graphs.onnx_prepare import prepare
from dyt_compile.graphs.onnx_shapes import infer_shapes
from dyt_compile.runtime import Session

ort = pytest.importorskip("onnxruntime")

pytestmark = pytest.mark.core

CHANNELS = 6
SCALE = 0.02
TYPES = {"fp32": ir.DataType.FLOAT, "fp16": ir.DataType.FLOAT16}
QUANTIZED = {"int8": (ir.DataType.INT8, 15), "fp8": (ir.DataType.FLOAT8E4M3FN, 19)}
"""Types, and the first opset whose QuantizeLinear writes them from all floating types we have."""

Array = npt.NDArray[Any]


class Network:
    """y = DyT(x + r) between the nodes that the tests want around it."""

    def __init__(self, form: str = "DyT", dtype: str = "fp32", opset: int = 20) -> None:
        self.dtype = TYPES[dtype]
        self.opset = opset
        self.x, self.residual = (self._input(name) for name in ("x", "r"))
        graph = ir.Graph(
            [self.x, self.residual], [], nodes=[], opset_imports={"": opset}, name="one"
        )
        self.model = ir.Model(graph, ir_version=10)
        self.form = FORMS[form]

    def _input(self, name: str) -> ir.Value:
        shape = ir.Shape(["batch", 3, CHANNELS])
        return ir.Value(name=name, type=ir.TensorType(self.dtype), shape=shape)

    def held(self, name: str, array: npt.ArrayLike, dtype: ir.DataType | None = None) -> ir.Value:
        dtype = dtype or self.dtype
        tensor = ir.tensor(np.asarray(array).astype(dtype.numpy()), dtype=dtype, name=name)
        value = ir.Value(
            name=name, type=ir.TensorType(dtype), shape=ir.Shape(tensor.shape), const_value=tensor
        )
        self.model.graph.register_initializer(value)
        return value

    def add(self, operator: str, *inputs: ir.Value, **attributes: Any) -> ir.Value:
        node = ir.node(operator, inputs, attributes)
        node.outputs[0].name = f"{operator}_{len(self.model.graph)}"
        self.model.graph.append(node)
        return node.outputs[0]

    def dyt(self, x: ir.Value, **instead: ir.Value) -> ir.Value:
        random = np.random.default_rng(1)
        place = len(self.model.graph)
        values = dict(instead)
        for name in self.form.parameters:
            if name not in values:
                scalar = name in ("alpha", "shift")
                array = random.uniform(0.2, 1.2, 1 if scalar else CHANNELS)
                kind = ir.DataType.FLOAT if scalar else self.dtype
                values[name] = self.held(f"{name}_{place}", array, kind)
        node = onnx_functions.call(
            self.form, [x, *(values[name] for name in self.form.parameters)], f"dyt_{place}"
        )
        self.model.graph.append(node)
        return node.outputs[0]

    def quantized(self, y: ir.Value, kind: str = "int8", scale: float = SCALE) -> ir.Value:
        """A QuantizeLinear whose zero point tells the type."""
        place = len(self.model.graph)
        zero = self.held(f"zero_{place}", np.zeros(()), QUANTIZED[kind][0])
        return self.add("QuantizeLinear", y, self.held(f"scale_{place}", scale), zero)

    def dequantized(self, q: ir.Value) -> ir.Value:
        place = len(self.model.graph)
        zero = self.held(f"zero_{place}", np.zeros(()), q.producer().inputs[2].dtype)  # type: ignore[union-attr]
        return self.add("DequantizeLinear", q, self.held(f"scale_{place}", SCALE), zero)

    def ended(self, *outputs: ir.Value) -> ir.Model:
        for place, value in enumerate(outputs):
            value.name = f"out_{place}"
            self.model.graph.outputs.append(value)
        onnx_functions.declare(self.model)
        common.ShapeInferencePass()(self.model)
        for value in outputs:
            value.type = value.type or ir.TensorType(self.dtype)
            value.shape = value.shape or self.x.shape
        return self.model


def run(model: ir.Model) -> list[Array]:
    """Outputs for random inputs, of a model that is valid."""
    proto = ir.serde.serialize_model(model)
    onnx.checker.check_model(proto, full_check=True)
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL  # keeps casts
    session = ort.InferenceSession(proto.SerializeToString(), options)
    random = np.random.default_rng(0)
    feeds = {
        value.name: (3 * random.standard_normal((2, 3, CHANNELS))).astype(value.dtype.numpy())
        for value in model.graph.inputs
        if value.dtype is not None
    }
    return [np.asarray(found) for found in session.run(None, feeds)]


@functools.cache
def rounds_fp16() -> bool:
    """Whether this ONNX Runtime rounds what it quantizes from fp16 to INT8; 1.24 cuts it off."""
    steps = []
    for dtype in TYPES:
        network = Network(dtype=dtype)
        value = network.held("value", np.full((1, 3, CHANNELS), 0.9 * SCALE))
        (found,) = run(network.ended(network.dequantized(network.quantized(value))))
        steps.append(np.rint(found / SCALE))
    return bool(np.array_equal(*steps))


def skip_unless_rounded(kind: str | None, dtype: str) -> None:
    if (kind, dtype) == ("int8", "fp16") and not rounds_fp16():
        pytest.skip("this ONNX Runtime does not round what it quantizes from fp16 to INT8")


def same(before: list[Array], after: list[Array]) -> bool:
    return len(before) == len(after) and all(map(np.array_equal, before, after))


def around(form: str, dtype: str, kind: str | None, opset: int, *, residual: bool) -> ir.Model:
    """A DyT with an Add before it, whose sum is read again, and a quantizer behind it."""
    network = Network(form, dtype, opset)
    total = network.add("Add", network.x, network.residual) if residual else network.x
    y = network.dyt(total)
    if kind is not None:
        y = network.dequantized(network.quantized(y, kind))
    return network.ended(network.add("Add", y, total))


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("kind", [None, *QUANTIZED])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_fused_forms_compute_what_stood_apart(
    form: str, residual: bool, kind: str | None, dtype: str
) -> None:
    skip_unless_rounded(kind, dtype)
    opset = 20 if kind is None or dtype == "fp16" else QUANTIZED[kind][1]
    model = around(form, dtype, kind, opset, residual=residual)
    before = run(model)
    assert np.std(before[0].astype(np.float32)) > 0.1
    assert not residual or not same(before, run(around(form, dtype, kind, opset, residual=False)))
    made = fuse(model)
    name = fused_name(form, residual=residual, quantized=kind is not None)
    assert made == {name: 1}
    assert same(before, run(model))


@pytest.mark.parametrize("opset", [15, 18, 20, 21, 23])
@pytest.mark.parametrize("kind", QUANTIZED)
def test_fused_forms_are_valid_in_every_opset_of_their_type(kind: str, opset: int) -> None:
    if opset < QUANTIZED[kind][1]:
        pytest.skip("QuantizeLinear of this opset does not write this type")
    model = around("DyT", "fp32", kind, opset, residual=True)
    before = run(model)
    fuse(model)
    assert model.opset_imports[""] == opset
    assert same(before, run(model))


def test_fused_forms_run_in_bfloat16() -> None:
    models = []
    for fused in (False, True):
        network = Network()
        network.dtype = ir.DataType.BFLOAT16
        given = [
            network.add("Cast", v, to=network.dtype.value) for v in (network.x, network.residual)
        ]
        total = network.add("Add", *given)
        ends = [network.dyt(total), total]
        model = network.ended(*(network.add("Cast", end, to=1) for end in ends))
        assert fuse(model) == {"AddDyT": 1} if fused else forms(model) == {"DyT": 1}
        onnx.checker.check_model(ir.serde.serialize_model(model), full_check=True)
        models.append(model)
    random = np.random.default_rng(0)
    feeds = [(3 * random.standard_normal((2, 3, CHANNELS))).astype(np.float32) for _ in "xr"]
    before, after = (Session(model).run(feeds) for model in models)
    x, r = (array.astype(ml_dtypes.bfloat16) for array in feeds)
    np.testing.assert_array_equal(after[1], (x + r).astype(np.float32))
    assert same(before, after)


def test_the_sum_that_others_read_is_the_second_output() -> None:
    network = Network()
    total = network.add("Add", network.x, network.residual)
    first = network.add("Neg", total)  # stands before the DyT
    y = network.dyt(total)
    model = network.ended(y, first, total)
    before = run(model)
    assert fuse(model) == {"AddDyT": 1}
    (node,) = (node for node in model.graph if node.domain == DOMAIN)
    assert [value.name for value in node.outputs] == ["out_0", "out_2"]
    assert same(before, run(model))


def test_readers_of_one_scale_share_one_quantized_output() -> None:
    network = Network()
    y = network.dyt(network.x)
    ends = [network.dequantized(network.quantized(y)) for _ in range(3)]
    model = network.ended(*(network.add("Neg", end) for end in ends))
    before = run(model)
    assert fuse(model) == {"DyTQuantize": 1}
    assert not [node for node in model.graph if node.op_type == "QuantizeLinear"]
    assert same(before, run(model))
    read = {value.name for node in model.graph for value in node.inputs if value is not None}
    assert set(model.graph.initializers) <= read


def test_two_dyts_of_one_sum_fuse_it_once() -> None:
    network = Network()
    total = network.add("Add", network.x, network.residual)
    model = network.ended(network.dyt(total), network.dyt(total))
    before = run(model)
    assert fuse(model) == {"AddDyT": 1, "DyT": 1}
    assert same(before, run(model))


def test_output_dtype_tells_the_type_since_opset_21() -> None:
    network = Network(opset=21)
    scale = network.held("scale", SCALE)
    q = network.add("QuantizeLinear", network.dyt(network.x), scale, output_dtype=17)
    model = network.ended(network.add("DequantizeLinear", q, scale))
    before = run(model)
    assert fuse(model) == {"DyTQuantize": 1}
    (node,) = (node for node in model.graph if node.domain == DOMAIN)
    assert node.attributes["output_dtype"].as_int() == onnx.TensorProto.FLOAT8E4M3FN
    assert same(before, run(model))


def _broadcast(network: Network) -> list[ir.Value]:
    bias = network.held("bias", np.ones(CHANNELS))
    return [network.dyt(network.add("Add", network.x, bias))]


def _subtracted(network: Network) -> list[ir.Value]:
    return [network.dyt(network.add("Sub", network.x, network.residual))]


def _unknown_shape(network: Network) -> list[ir.Value]:
    network.residual.shape = ir.Shape([None, 3, CHANNELS])
    return [network.dyt(network.add("Add", network.x, network.residual))]


def _computed_gamma(network: Network) -> list[ir.Value]:
    gamma = network.add("Neg", network.held("negative", np.ones(CHANNELS)))
    return [network.dyt(network.add("Add", network.x, network.residual), gamma=gamma)]


def _read_twice(network: Network) -> list[ir.Value]:
    y = network.dyt(network.x)
    return [network.dequantized(network.quantized(y)), network.add("Neg", y)]


def _two_scales(network: Network) -> list[ir.Value]:
    y = network.dyt(network.x)
    return [network.dequantized(network.quantized(y, scale=s)) for s in (SCALE, 2 * SCALE)]


def _exact_output(network: Network) -> list[ir.Value]:
    y = network.dyt(network.x)
    return [y, network.dequantized(network.quantized(y))]


def _quantized_output(network: Network) -> list[ir.Value]:
    q = network.quantized(network.dyt(network.x))
    q.type, q.shape = ir.TensorType(ir.DataType.INT8), network.x.shape
    return [q]


def _zero_point(network: Network) -> list[ir.Value]:
    q = network.quantized(network.dyt(network.x))
    node = q.producer()
    assert node is not None
    node.replace_input_with(2, network.held("three", np.array(3), ir.DataType.INT8))
    return [network.dequantized(q)]


def _unsigned(network: Network) -> list[ir.Value]:
    scale = network.held("scale", SCALE)
    q = network.add("QuantizeLinear", network.dyt(network.x), scale)
    return [network.add("DequantizeLinear", q, scale)]


def _channels(network: Network) -> list[ir.Value]:
    scale, zero = (
        network.held("scales", np.full(CHANNELS, SCALE)),
        network.held("zeros", np.zeros(CHANNELS), ir.DataType.INT8),
    )
    q = network.add("QuantizeLinear", network.dyt(network.x), scale, zero, axis=2)
    return [network.add("DequantizeLinear", q, scale, zero, axis=2)]


def _unsaturated(network: Network) -> list[ir.Value]:
    q = network.quantized(network.dyt(network.x), "fp8")
    node = q.producer()
    assert node is not None
    node.attributes["saturate"] = ir.AttrInt64("saturate", 0)
    return [network.dequantized(q)]


@pytest.mark.parametrize(
    "miss",
    [
        _broadcast, _subtracted, _unknown_shape, _computed_gamma, _read_twice, _two_scales,
        _exact_output, _quantized_output, _zero_point, _unsigned, _channels, _unsaturated,
    ],
)  # fmt: skip
def test_what_only_looks_like_it_stays(miss: Any) -> None:
    network = Network()
    model = network.ended(*miss(network))
    before = run(model)
    assert fuse(model) == {"DyT": 1}
    assert same(before, run(model))


def test_names_of_lengths_outlast_the_inference_of_shapes() -> None:
    network = Network()
    sizes = [network.held(f"size_{n}", [n], ir.DataType.INT64) for n in (-1, 3, CHANNELS)]
    target = network.add("Concat", *sizes, axis=0)
    residual = network.add("Reshape", network.residual, target)
    # As an exporter declares it; inference alone gives no name.
    residual.shape, residual.type = network.x.shape, network.x.type
    model = network.ended(network.dyt(network.add("Add", network.x, residual)))
    infer_shapes(model)
    assert residual.shape == network.x.shape
    assert fuse(model) == {"AddDyT": 1}


@pytest.mark.parametrize("kind", [None, *QUANTIZED])
def test_unfuse_gives_the_nodes_that_stood_apart(kind: str | None) -> None:
    skip_unless_rounded(kind, "fp16")
    model = around("DyT", "fp16", kind, 20, residual=True)
    before = run(model)
    fuse(model)
    assert unfuse(model)
    assert forms(model) == {"DyT": 1}
    assert same(before, run(model))
    assert not unfuse(model)


def test_a_fused_file_is_read_as_what_stood_apart() -> None:
    model = around("Derf", "fp32", "int8", 20, residual=True)
    fuse(model)
    prepare(model)
    assert forms(model) == {"Derf": 1}


def test_two_calls_of_a_form_share_its_function() -> None:
    network = Network()
    y = network.dyt(network.add("Add", network.x, network.residual))
    model = network.ended(network.dyt(network.add("Add", y, network.x)))
    before = run(model)
    assert fuse(model) == {"AddDyT": 2}
    assert sorted(name for _, name, _ in model.functions) == ["AddDyT", "DyT"]
    assert same(before, run(model))


@pytest.mark.parametrize("form", FUSED)
def test_function_has_the_inputs_and_attributes_of_the_plugin(form: str) -> None:
    fused = FUSED[form]
    function = ir.serde.serialize_function(onnx_functions.function(fused, 20))
    assert (function.domain, function.name) == (DOMAIN, form)
    expected = ["x", *FORMS[fused.base].parameters]
    if form.startswith("Add"):
        expected.insert(1, "residual")
    if form.endswith("Quantize"):
        expected.append("y_scale")
    assert list(function.input) == expected
    assert list(function.output) == (["y", "sum"] if form.startswith("Add") else ["y"])
    attributes = ["plugin_namespace", "plugin_version"]
    attributes += ["output_dtype"] if form.endswith("Quantize") else []
    assert list(function.attribute) == attributes


def test_forms_are_every_base_with_what_stands_around_it() -> None:
    names = {f"{a}{base}{q}" for a in ("", "Add") for base in FORMS for q in ("", "Quantize")}
    assert names == FORMS.keys() | FUSED.keys()
    operators = {schema.name.lower() for schema in onnx.defs.get_all_schemas()}
    assert not {name.lower() for name in names} & operators
