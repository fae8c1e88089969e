"""Functions written out: the same model as onnx_ir's inliner gives, in time that grows with it."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import FunctionProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper
from onnx_ir.passes import common

import dyt_compile
from dyt_compile.errors import CaptureError
from dyt_compile.graphs.onnx_inlining import inline

pytestmark = pytest.mark.core

OPSETS = [helper.make_opsetid("", 20), helper.make_opsetid("own", 1)]
WIDTH = 8

LIMIT_SECONDS = 10.0
"""Of processor time, for what takes 0.5 s here and took 54 s."""


def _function(name: str, nodes: list[NodeProto], inputs: str = "a") -> FunctionProto:
    return helper.make_function("own", name, inputs.split(), ["y"], nodes, OPSETS)


def _chain(calls: int, name: str, functions: list[FunctionProto]) -> ModelProto:
    """A model in which a function is called so many times, one behind the other."""
    weights = [numpy_helper.from_array(np.ones(WIDTH, np.float32), "weight")]
    more = ["weight"] * (len(next(f for f in functions if f.name == name).input) - 1)
    nodes = [
        helper.make_node(name, [f"x{place}", *more], [f"x{place + 1}"], domain="own")
        for place in range(calls)
    ]
    ends = [
        helper.make_tensor_value_info(value, TensorProto.FLOAT, ["batch", WIDTH])
        for value in ("x0", f"x{calls}")
    ]
    graph = helper.make_graph(nodes, "model", ends[:1], ends[1:], weights)
    return helper.make_model(graph, opset_imports=OPSETS, functions=functions, ir_version=10)


def _doubled(depth: int) -> list[FunctionProto]:
    """Functions each of which calls the next twice."""
    called = [*(f"F{place}" for place in range(1, depth)), "Tanh"]
    return [
        _function(f"F{place}", [
            helper.make_node(name, ["a"], ["b"], domain="" if name == "Tanh" else "own"),
            helper.make_node(name, ["b"], ["y"], domain="" if name == "Tanh" else "own"),
        ])
        for place, name in enumerate(called)
    ]  # fmt: skip


def _long(nodes: int) -> FunctionProto:
    names = ["a", *(f"b{place}" for place in range(nodes - 1)), "y"]
    return _function("Long", [helper.make_node("Tanh", [names[i]], [names[i + 1]])
                              for i in range(nodes)])  # fmt: skip


def _branch() -> FunctionProto:
    """A function with a graph within it, and a node of two outputs of which one has no name."""
    body = helper.make_graph(
        [helper.make_node("Neg", ["b"], ["inner"], name="within")], "body", [],
        [helper.make_tensor_value_info("inner", TensorProto.FLOAT, None)],
    )  # fmt: skip
    nodes = [
        helper.make_node("Dropout", ["a"], ["b", ""]),
        helper.make_node("Constant", [], ["yes"], value_ints=[1]),
        helper.make_node("Cast", ["yes"], ["truth"], to=TensorProto.BOOL),
        helper.make_node("If", ["truth"], ["y"], then_branch=body, else_branch=body),
    ]
    return _function("Branch", nodes)


@pytest.mark.parametrize(
    ("name", "functions"),
    [("F0", _doubled(4)), ("Long", [_long(3)]), ("Branch", [_branch()])],
    ids=["nested", "long", "branch"],
)
def test_functions_are_written_out_as_onnx_ir_writes_them(
    name: str, functions: list[FunctionProto]
) -> None:
    proto = _chain(5, name, functions)
    expected, found = ir.from_proto(proto), ir.from_proto(proto)
    common.InlinePass()(expected)
    assert inline(found, lambda _: True)
    assert not found.functions
    assert ir.to_proto(found) == ir.to_proto(expected)


def test_functions_that_are_not_chosen_stay() -> None:
    model = ir.from_proto(_chain(2, "F0", _doubled(2)))
    assert not inline(model, lambda _: False)
    assert len(model.functions) == 2
    assert inline(model, lambda function: function.name == "F1")
    assert [function.name for function in model.functions.values()] == ["F0"]


def test_functions_that_nothing_calls_are_removed_first() -> None:
    model = ir.from_proto(_chain(3, "Long", [_long(2), *_doubled(60)]))
    assert inline(model, lambda _: True)
    assert not model.functions
    assert len(model.graph) == 6


def test_thousands_of_calls_take_time_in_proportion() -> None:
    model = ir.from_proto(_chain(2000, "Long", [_long(10)]))
    start = time.process_time()
    assert inline(model, lambda _: True)
    assert time.process_time() - start < LIMIT_SECONDS
    assert len(model.graph) == 20_000
    names = [value.name for node in model.graph for value in node.outputs]
    assert len({*names, *(node.name for node in model.graph)}) == 40_000


def test_norms_are_found_in_hundreds_of_calls(tmp_path: Path) -> None:
    spelled = _function("Norm", [
        helper.make_node("Constant", [], ["axes"], value_ints=[-1]),
        helper.make_node("Constant", [], ["eps"], value_float=1e-5),
        helper.make_node("Mul", ["a", "a"], ["square"]),
        helper.make_node("ReduceMean", ["square", "axes"], ["mean"]),
        helper.make_node("Add", ["mean", "eps"], ["more"]),
        helper.make_node("Sqrt", ["more"], ["root"]),
        helper.make_node("Div", ["a", "root"], ["normed"]),
        helper.make_node("Mul", ["normed", "weight"], ["y"]),
    ], "a weight")  # fmt: skip
    path = tmp_path / "model.onnx"
    onnx.save(_chain(200, "Norm", [spelled]), path)
    assert len(dyt_compile.inspect(path).sites) == 200


def test_functions_that_come_to_a_million_nodes_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    onnx.save(_chain(1, "F0", _doubled(20)), path)
    with pytest.raises(CaptureError, match=r"come to 2097151 nodes; allowed: 100000"):
        dyt_compile.inspect(path)
