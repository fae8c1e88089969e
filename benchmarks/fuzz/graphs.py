"""ONNX models that are well-formed messages and bad models: one to three changes to a good one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from random import Random
from typing import Any

import numpy as np
import onnx
from onnx import AttributeProto, TensorProto, helper, numpy_helper

from dyt_compile.graphs.onnx_files import delimited

__all__ = ["CHANGES", "changed"]

LENGTHS = (0, 1, 2, 3, 15, 17, -1, -2, 2**20, 2**31 - 1, 2**31, 2**40, 2**62, -(2**63), 2**63 - 1)
"""Of axes, and numbers that stand for axes."""

NUMBERS = (0.0, -0.0, -1.0, 1e-45, 1e38, float("inf"), float("-inf"), float("nan"))

NAMES = (
    "", "x", "y", "no.such", "a" * 5000, "../../etc/passwd", "</script><script>alert(1)</script>",
    "[/red]", "[bold]x", "\x1b[2Jgone", "line\nline", "0", "-1", "\u202e\u0000", "norm.weight",
)  # fmt: skip

DOMAINS = ("", "ai.onnx", "ai.onnx.ml", "com.microsoft", "dyt", "trt.plugins", "no.such", "own")

OPSETS = (0, -1, 1, 6, 11, 12, 13, 17, 18, 19, 22, 23, 24, 26, 99, 2**31, 2**62)

DTYPES = (0, 1, 2, 3, 6, 7, 8, 9, 10, 11, 12, 14, 16, 17, 21, 22, 23, 25, 26, 99, -1)

LOCATIONS = (
    "../outside.bin", "/etc/passwd", "no.such.bin", "", ".", "weights\0.bin", "a/../../outside.bin",
    "/dev/zero", "model.onnx", "C:\\windows\\win.ini", "file:///etc/passwd", "http://x.invalid/w",
)  # fmt: skip

DEEP = (1, 2, 4, 8, 20)

SCOPES = "pkg.torch.onnx.name_scopes"


def changed(data: bytes, random: Random) -> bytes:
    """The bytes of a bad model."""
    model = onnx.ModelProto.FromString(data)
    for _ in range(random.choice((1, 1, 2, 3))):
        random.choice(CHANGES)(model, random)
    if random.random() < 0.02:
        return _deep(model.graph, random.choice((30, 40, 200, 5000)))
    return model.SerializeToString()


def _deep(graph: onnx.GraphProto, depth: int) -> bytes:
    """A model with a branch within a branch and so on, deeper than protobuf itself writes it."""
    body = graph.SerializeToString()
    for _ in range(depth):  # fields of onnx.proto, as they are numbered there
        kind = b"\xa0\x01" + bytes([AttributeProto.GRAPH])
        branch = delimited(1, b"then_branch") + delimited(6, body) + kind
        node = delimited(1, b"yes") + delimited(2, b"y") + delimited(4, b"If")
        body = delimited(1, node + delimited(5, branch))
    model = helper.make_model(onnx.GraphProto(), opset_imports=[helper.make_opsetid("", 20)])
    return model.SerializeToString() + delimited(7, body)


def _graphs(model: onnx.ModelProto) -> list[Any]:
    """The main graph, those within nodes, and functions."""

    def below(nodes: Any) -> Iterator[Any]:
        for node in nodes:
            for attribute in node.attribute:
                if attribute.type == AttributeProto.GRAPH:
                    yield attribute.g
                    yield from below(attribute.g.node)

    return [model.graph, *below(model.graph.node), *model.functions]


def _node(model: onnx.ModelProto, random: Random) -> onnx.NodeProto | None:
    nodes = [node for graph in _graphs(model) for node in graph.node]
    return random.choice(nodes) if nodes else None


def _tensor(model: onnx.ModelProto, random: Random) -> TensorProto | None:
    held = list(model.graph.initializer)
    return random.choice(held) if held else None


def _known(model: onnx.ModelProto, random: Random) -> str:
    """A name that something has."""
    names = [name for node in model.graph.node for name in (*node.input, *node.output)]
    return random.choice([*names, *NAMES])


def _drop_node(model: onnx.ModelProto, random: Random) -> None:
    graph = random.choice(_graphs(model))
    if graph.node:
        del graph.node[random.randrange(len(graph.node))]


def _repeat_node(model: onnx.ModelProto, random: Random) -> None:
    graph = random.choice(_graphs(model))
    if graph.node:
        graph.node.append(random.choice(graph.node))


def _turn_nodes(model: onnx.ModelProto, random: Random) -> None:
    nodes = list(model.graph.node)
    random.shuffle(nodes)
    del model.graph.node[:]
    model.graph.node.extend(nodes)


def _rewire(model: onnx.ModelProto, random: Random) -> None:
    """An input becomes another value: missing, later (a cycle), of another type."""
    node = _node(model, random)
    if node is not None and node.input:
        node.input[random.randrange(len(node.input))] = _known(model, random)


def _cycle(model: onnx.ModelProto, random: Random) -> None:
    node = _node(model, random)
    if node is not None and node.input and node.output:
        node.input[random.randrange(len(node.input))] = random.choice(node.output)


def _rename_output(model: onnx.ModelProto, random: Random) -> None:
    node = _node(model, random)
    if node is not None and node.output:
        node.output[random.randrange(len(node.output))] = _known(model, random)


def _count_operands(model: onnx.ModelProto, random: Random) -> None:
    node = _node(model, random)
    if node is None:
        return
    operands = random.choice((node.input, node.output))
    if operands and random.random() < 0.5:
        del operands[random.randrange(len(operands)) :]
    else:
        operands.extend(_known(model, random) for _ in range(random.choice((1, 2, 40))))


def _rename_node(model: onnx.ModelProto, random: Random) -> None:
    node = _node(model, random)
    if node is not None:
        node.name = random.choice((*NAMES, "/model/layers.0/norm/Mul", "/" * 300, "/a.0/a_1/Add"))


def _change_operator(model: onnx.ModelProto, random: Random) -> None:
    node = _node(model, random)
    if node is None:
        return
    if random.random() < 0.3:
        node.domain = random.choice(DOMAINS)
    else:
        node.op_type = random.choice((*_operators(), "NoSuch", "", "DyT", "Norm", "Block"))


def _operators() -> list[str]:
    if not _OPERATORS:
        _OPERATORS.extend(
            sorted({schema.name for schema in onnx.defs.get_all_schemas() if schema.domain == ""})
        )
    return _OPERATORS


_OPERATORS: list[str] = []


def _change_opset(model: onnx.ModelProto, random: Random) -> None:
    if model.opset_import and random.random() < 0.2:
        del model.opset_import[random.randrange(len(model.opset_import))]
    elif model.opset_import and random.random() < 0.7:
        random.choice(model.opset_import).version = random.choice(OPSETS)
    else:
        model.opset_import.add(domain=random.choice(DOMAINS), version=random.choice(OPSETS))


def _change_header(model: onnx.ModelProto, random: Random) -> None:
    choice = random.randrange(4)
    if choice == 0:
        model.ir_version = random.choice((0, 1, 3, 4, 8, 13, 14, 99, 2**62))
    elif choice == 1:
        model.graph.name = random.choice(NAMES)
    elif choice == 2:
        model.producer_name = random.choice(NAMES)
    else:
        model.ClearField("graph")


def _attribute(model: onnx.ModelProto, random: Random) -> AttributeProto | None:
    held = [a for graph in _graphs(model) for node in graph.node for a in node.attribute]
    return random.choice(held) if held else None


def _change_attribute(model: onnx.ModelProto, random: Random) -> None:
    attribute = _attribute(model, random)
    if attribute is None:
        return
    choice = random.randrange(6)
    if choice == 0:
        attribute.i = random.choice(LENGTHS)
    elif choice == 1:
        attribute.f = random.choice(NUMBERS)
    elif choice == 2:
        attribute.type = random.choice([*range(15), 99])
    elif choice == 3:
        attribute.ref_attr_name = random.choice(NAMES)
    elif choice == 4:
        attribute.name = random.choice(("axis", "epsilon", "axes", "to", "perm", *NAMES))
    else:
        attribute.ints.extend(random.choice(LENGTHS) for _ in range(random.choice((1, 3, 100))))


def _add_attribute(model: onnx.ModelProto, random: Random) -> None:
    node = _node(model, random)
    if node is None:
        return
    name = random.choice(
        ("axis", "epsilon", "axes", "keepdims", "to", "value", "body", "then_branch", "stash_type",
         "plugin_version", "transB", "alpha", "perm", "start", "end", "sparse_value", "")
    )  # fmt: skip
    values: tuple[Any, ...] = (
        random.choice(LENGTHS), random.choice(NUMBERS), "text", b"\xff\xfe", [1, 2, 3],
        [0.5, 1.5], ["a", "b"], numpy_helper.from_array(np.zeros((2, 0, 3), np.float32), "t"),
        onnx.GraphProto(), helper.make_tensor_type_proto(1, [2]),
    )  # fmt: skip
    made = helper.make_attribute(name, random.choice(values))
    node.attribute.append(made)


def _drop_attribute(model: onnx.ModelProto, random: Random) -> None:
    node = _node(model, random)
    if node is not None and node.attribute:
        del node.attribute[random.randrange(len(node.attribute))]


def _change_tensor(model: onnx.ModelProto, random: Random) -> None:
    tensor = _tensor(model, random)
    if tensor is None:
        return
    choice = random.randrange(6)
    if choice == 0 and tensor.dims:
        tensor.dims[random.randrange(len(tensor.dims))] = random.choice(LENGTHS)
    elif choice == 1:
        tensor.dims.extend(random.choice(LENGTHS) for _ in range(random.choice((1, 2, 70))))
    elif choice == 2:
        tensor.data_type = random.choice(DTYPES)
    elif choice == 3:
        tensor.raw_data = tensor.raw_data[: random.randrange(len(tensor.raw_data) + 1)]
    elif choice == 4:
        tensor.name = _known(model, random)
    else:
        tensor.float_data.extend(random.choice(NUMBERS) for _ in range(5))


def _fill_tensor(model: onnx.ModelProto, random: Random) -> None:
    """Weights of NaN, infinity, zero, huge, or axes out of range."""
    tensor = _tensor(model, random)
    if tensor is None or tensor.data_location or tensor.data_type not in (1, 7, 10):
        return
    array = numpy_helper.to_array(tensor).copy()
    with np.errstate(all="ignore"):
        number = random.choice(LENGTHS if tensor.data_type == 7 else NUMBERS)
        array[...] = np.array(number).astype(array.dtype)
    tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))


def _repeat_tensor(model: onnx.ModelProto, random: Random) -> None:
    tensor = _tensor(model, random)
    if tensor is not None:
        model.graph.initializer.append(tensor)


def _move_tensor(model: onnx.ModelProto, random: Random) -> None:
    """A tensor lies in another file, it says."""
    tensor = _tensor(model, random)
    if tensor is None:
        return
    tensor.data_location = TensorProto.EXTERNAL
    if random.random() < 0.7:
        tensor.ClearField("raw_data")
    told = {"location": random.choice(LOCATIONS), "offset": str(random.choice(LENGTHS))}
    told |= {"length": random.choice((str(random.choice(LENGTHS)), "many", ""))}
    for key in random.sample(sorted(told), random.randrange(1, 4)):
        tensor.external_data.add(key=key, value=told[key])


def _change_type(model: onnx.ModelProto, random: Random) -> None:
    graph = random.choice([g for g in _graphs(model) if isinstance(g, onnx.GraphProto)])
    values = [*graph.input, *graph.output, *graph.value_info]
    if not values:
        return
    value = random.choice(values)
    tensor = value.type.tensor_type
    choice = random.randrange(6)
    if choice == 0:
        tensor.elem_type = random.choice(DTYPES)
    elif choice == 1 and tensor.shape.dim:
        random.choice(tensor.shape.dim).dim_value = random.choice(LENGTHS)
    elif choice == 2 and tensor.shape.dim:
        random.choice(tensor.shape.dim).dim_param = random.choice(NAMES)
    elif choice == 3:
        tensor.shape.dim.add(dim_value=random.choice(LENGTHS))
    elif choice == 4:
        value.ClearField("type")
    else:
        value.name = _known(model, random)


def _note_type(model: onnx.ModelProto, random: Random) -> None:
    """A shape noted for a value within, which need not be true."""
    shape = [random.choice(LENGTHS) for _ in range(random.choice((0, 1, 3, 4)))]
    kind = random.choice(DTYPES)
    model.graph.value_info.append(
        helper.make_tensor_value_info(_known(model, random), kind if kind >= 0 else 1, shape)
    )


def _drop_end(model: onnx.ModelProto, random: Random) -> None:
    values = random.choice((model.graph.input, model.graph.output))
    if values:
        del values[random.randrange(len(values))]


def _repeat_end(model: onnx.ModelProto, random: Random) -> None:
    values = random.choice((model.graph.input, model.graph.output))
    if values:
        values.append(random.choice(values))


def _nest(model: onnx.ModelProto, random: Random) -> None:
    """Branches within branches."""
    graph = onnx.GraphProto()
    graph.CopyFrom(model.graph)
    del graph.input[:]
    for depth in range(random.choice(DEEP)):
        other = graph if depth < 4 else onnx.GraphProto()
        node = helper.make_node("If", ["yes"], [f"y{depth}"], then_branch=graph, else_branch=other)
        outputs = [helper.make_tensor_value_info(f"y{depth}", 1, None)]
        graph = helper.make_graph([node], "nested", [], outputs)
    del model.graph.node[:]
    model.graph.node.extend(graph.node)
    model.graph.initializer.append(numpy_helper.from_array(np.array(True), "yes"))


def _recurse(model: onnx.ModelProto, random: Random) -> None:
    """Functions that call themselves, each other, or are called by nobody."""
    names = random.choice((("Own",), ("Own", "Other")))
    for place, name in enumerate(names):
        called = names[(place + 1) % len(names)]
        node = helper.make_node(called, ["a"], ["b"], domain="own")
        opsets = [helper.make_opsetid("", 20), helper.make_opsetid("own", 1)]
        model.functions.append(helper.make_function("own", name, ["a"], ["b"], [node], opsets))
    node = _node(model, random)
    if node is not None and random.random() < 0.8:
        node.op_type, node.domain = "Own", "own"
        del node.input[1:], node.output[1:], node.attribute[:]
    model.opset_import.add(domain="own", version=1)


def _double(model: onnx.ModelProto, random: Random) -> None:
    """Functions each of which calls the next twice."""
    depth = random.choice((4, 10, 24, 40))
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("own", 1)]
    for place in range(depth):
        name = f"F{place + 1}" if place + 1 < depth else "Tanh"
        domain = "own" if place + 1 < depth else ""
        nodes = [
            helper.make_node(name, ["a"], ["b"], domain=domain),
            helper.make_node(name, ["b"], ["c"], domain=domain),
        ]
        made = helper.make_function("own", f"F{place}", ["a"], ["c"], nodes, opsets)
        model.functions.append(made)
    node = _node(model, random)
    if node is not None:
        node.op_type, node.domain = "F0", "own"
        del node.input[1:], node.output[1:], node.attribute[:]
    model.opset_import.add(domain="own", version=1)


def _scope(model: onnx.ModelProto, random: Random) -> None:
    """What torch's exporter notes of modules, and others may forge."""
    node = _node(model, random)
    if node is None:
        return
    depth = random.choice((10, 100, 1000, 20000))
    values = (
        "[" * depth + "]" * depth, "['', 'a', 'b']", "[1, 2]", "{'a': 1}", "__import__('os')",
        "['" + "x" * 5000 + "', '<b>', '']", "-" * depth + "1", "", "['\\x1b[2J', '\\n', 'n']",
    )  # fmt: skip
    node.metadata_props.add(key=SCOPES, value=random.choice(values))


def _lengthen(model: onnx.ModelProto, random: Random) -> None:
    """A chain of many nodes."""
    value = "x"
    for place in range(random.choice((20, 100, 1000))):
        following = f"long{place}"
        model.graph.node.append(helper.make_node("Identity", [value], [following]))
        value = following


CHANGES: tuple[Callable[[onnx.ModelProto, Random], None], ...] = (
    _drop_node, _repeat_node, _turn_nodes, _rewire, _rewire, _cycle, _rename_output,
    _count_operands, _rename_node, _change_operator, _change_operator, _change_opset,
    _change_header, _change_attribute, _change_attribute, _add_attribute, _drop_attribute,
    _change_tensor, _change_tensor, _fill_tensor, _repeat_tensor, _move_tensor, _move_tensor,
    _change_type, _change_type, _note_type, _drop_end, _repeat_end, _nest, _recurse, _double,
    _scope, _lengthen,
)  # fmt: skip
