"""Whether an ONNX model is what the rest of the package takes for granted: it may be anyone's."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import onnx
import onnx_ir as ir

from ..dyt import DOMAIN, FORMS
from ..errors import CaptureError, DytCompileError, first_line

__all__ = ["check", "reading"]

MOST_NODES = 100_000
"""Once the functions are inlined: twenty that call the next twice come to a million. So many are
inspected in some eight seconds."""

Opsets = Mapping[str, int]


@contextmanager
def reading(what: str) -> Iterator[None]:
    """While a foreign model is read: whatever fails then, it is the model that is not valid."""
    logger = logging.getLogger("onnx_ir")
    level = logger.level
    logger.setLevel(logging.ERROR)  # its warnings are told in our errors
    try:
        yield
    except DytCompileError:
        raise
    except Exception as error:
        told = f"{type(error).__name__}: {first_line(error)}"
        raise CaptureError(f"{what} is no valid ONNX model: {told}") from error
    finally:
        logger.setLevel(level)


def check(model: ir.Model) -> None:
    """Raise CaptureError, with a name, for what is no valid ONNX.

    Values that nothing makes, or two nodes; operators without the operands and attributes that
    they are declared with; tensors of another size than their shape; functions without end.
    """
    _check_functions(model)
    bodies = [(f.graph, f.opset_imports) for f in model.functions.values()]
    for graph, opsets in [(model.graph, model.opset_imports), *bodies]:
        for each in (graph, *graph.subgraphs()):
            _check_names(each)
            _check_values(each)
            for node in each:
                _check_node(node, opsets)


def _check_functions(model: ir.Model) -> None:
    """Raise CaptureError for functions that call themselves, or come to more than `MOST_NODES`."""
    sizes: dict[ir.OperatorIdentifier, int] = {}

    def size(nodes: Iterable[ir.Node], around: tuple[ir.OperatorIdentifier, ...]) -> int:
        total = 0
        for node in nodes:
            called = node.op_identifier()
            if called in around:
                raise _invalid(f"function {called[1]!r} calls itself")
            if called in model.functions and called not in sizes:
                sizes[called] = size(model.functions[called].graph.all_nodes(), (*around, called))
            total += 1 + sizes.get(called, 0)
        return total

    nodes = size(model.graph.all_nodes(), ())
    if nodes > MOST_NODES:
        raise CaptureError(f"the model's functions come to {nodes} nodes; allowed: {MOST_NODES}")


def _check_values(graph: ir.Graph) -> None:
    made: set[str] = set()
    for node in graph:
        for output in node.outputs:
            if output.name and output.name in made:
                raise _invalid(f"{output.name!r} is made by two nodes")
            made.add(output.name or "")
        for value in node.inputs:
            if value is not None and not _exists(value):
                raise _invalid(
                    f"{value.name!r}, which the {node.op_type} node {node.name!r} reads, is made "
                    "by no node and is no input or initializer"
                )
    for value in graph.outputs:
        if not _exists(value):
            raise _invalid(f"output {value.name!r} is made by no node")
    for value in graph.initializers.values():
        _check_tensor(value.const_value)


def _check_names(graph: ir.Graph) -> None:
    """Protobuf hands on as bytes what is no UTF-8."""
    nodes = (name for node in graph for name in (node.op_type, node.domain, node.name))
    ends = (value.name for value in (*graph.inputs, *graph.outputs, *graph.initializers.values()))
    made = (value.name for node in graph for value in node.outputs)
    for name in (*nodes, *ends, *made):
        if isinstance(name, bytes):
            raise _invalid(f"the name {name!r} is no UTF-8")


def _exists(value: ir.Value) -> bool:
    return value.producer() is not None or value.is_graph_input() or value.is_initializer()


def _check_tensor(tensor: ir.TensorProtocol | None) -> None:
    """Read a tensor that the graph holds itself; those in files were looked at."""
    if isinstance(tensor, ir.serde.TensorProtoTensor) and tensor.dtype is not ir.DataType.STRING:
        try:
            tensor.numpy()
        except Exception as error:
            raise _invalid(f"tensor {tensor.name!r}: {first_line(error)}") from error


def _check_node(node: ir.Node, opsets: Opsets) -> None:
    """Raise CaptureError unless a node is as ONNX declares its operator, or we our own."""
    if node.domain == "" and not opsets.keys() & {"", "ai.onnx"}:
        raise _wrong(node, "is of ONNX's own operators, of which no opset is imported")
    for attribute in node.attributes.values():
        if attribute.type is ir.AttributeType.TENSOR and not attribute.is_ref():
            _check_tensor(attribute.value)
    if node.domain == DOMAIN and node.op_type in FORMS:
        operands = len(FORMS[node.op_type].inputs)
        _check_operands(node, operands, operands)
        return
    domain = "" if node.domain == "ai.onnx" else node.domain
    try:
        schema = onnx.defs.get_schema(node.op_type, opsets.get(domain, 1), domain)
    except (onnx.defs.SchemaError, TypeError):
        return  # an operator of others, or of ONNX Runtime
    _check_operands(node, schema.min_input, schema.max_input)
    if not schema.min_output <= len(node.outputs) <= schema.max_output:
        raise _wrong(node, f"has {len(node.outputs)} outputs")
    for name, declared in schema.attributes.items():
        held = node.attributes.get(name)
        if held is None:
            if declared.required:
                raise _wrong(node, f"has no {name!r}")
        elif held.type.name != str(declared.type).rpartition(".")[2]:
            raise _wrong(node, f"has a {name!r} of type {held.type.name}")


def _check_operands(node: ir.Node, least: int, most: int) -> None:
    given = max((place for place, v in enumerate(node.inputs, 1) if v is not None), default=0)
    if not least <= given <= most or any(value is None for value in node.inputs[:least]):
        allowed = f"{least} or more" if most > least else f"{least}"
        raise _wrong(node, f"has {given} inputs; allowed: {allowed}")


def _wrong(node: ir.Node, fault: str) -> CaptureError:
    return _invalid(f"the {node.op_type} node {node.name!r} {fault}")


def _invalid(fault: str) -> CaptureError:
    return CaptureError(f"the model is not valid ONNX: {fault}")
