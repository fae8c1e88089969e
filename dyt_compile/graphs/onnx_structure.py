"""Whether two ONNX models are the same function, found without running them.

Every value gets a digest of what computes it: its node's operator and attributes, and the digests
of what that node reads. Where a model spells DyT out, the matcher has proved that the nodes compute
it, and the digest is that of DyT with its parameters. Models whose outputs have equal digests
differ in spelling alone. Weights are compared by name, shape and dtype while nobody reads them:
those that both models read from the same bytes of a file are equal, the others are named.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import dropwhile

import numpy as np
import onnx_ir as ir

from ..errors import VerificationError
from ..progress import track
from ..sites import NormSite
from ..terms import Op, Value
from .onnx import OnnxGraph, read_by
from .onnx_constants import stored
from .onnx_functions import LEAST_OPSET
from .onnx_weights import chunks

__all__ = ["SMALL_BYTES", "Structure", "compare"]

SMALL_BYTES = 1 << 16
"""Constants up to this size are compared by value: literals, gamma, beta."""

Digest = bytes


@dataclass(frozen=True)
class Structure:
    """What two models have in common.

    nodes: of the second that compute what a node of the first does; proved: sites where DyT stands
    for nodes that were proved to compute it; shared_bytes: of weights that both read from the same
    place; compared_bytes: of those that were read and are equal; unread_bytes: of those that only
    have the same names, shapes and dtypes.
    """

    nodes: int
    proved: int
    shared_bytes: int
    compared_bytes: int
    unread_bytes: int

    def told(self) -> str:
        """One sentence for people."""
        parts = [f"{self.nodes} nodes equal", f"{self.proved} DyT proved"]
        for size, what in (
            (self.shared_bytes, "of weights shared"),
            (self.compared_bytes, "of weights equal"),
            (self.unread_bytes, "of weights not read"),
        ):
            if size:
                parts.append(f"{_size(size)} {what}")
        return ", ".join(parts)


def _size(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


def compare(
    first: OnnxGraph,
    first_sites: Iterable[NormSite],
    second: OnnxGraph,
    second_sites: Iterable[NormSite],
    *,
    read: bool = False,
) -> Structure:
    """What two models have in common, if they are the same function.

    Sites are those that the matcher found. read: compare the bytes of weights that lie in
    different places, too, a few megabytes at a time. Raises VerificationError that names the first
    node, output or weight in which the second model differs.
    """
    _check_surface(first, second)
    one, other = _Digests(first, first_sites), _Digests(second, second_sites)
    for name, value in second.outputs.items():
        if one(first.outputs[name].native) != other(value.native):
            raise VerificationError(_difference(name, one, other))
    shared, pairs = 0, []
    for name, tensor in other.weights.items():
        if _same_place(one.weights[name], tensor):
            shared += tensor.nbytes
        else:
            pairs.append((one.weights[name], tensor))
    size = sum(tensor.nbytes for _, tensor in pairs)
    if read:
        _check_bytes(pairs)
    return Structure(
        nodes=len(other.nodes),
        proved=len(one.proved),
        shared_bytes=shared,
        compared_bytes=size if read else 0,
        unread_bytes=0 if read else size,
    )


def _check_surface(first: OnnxGraph, second: OnnxGraph) -> None:
    """Raise VerificationError where inputs, outputs or the version of ONNX differ."""
    for what, a, b in (
        ("inputs", list(first.inputs), list(second.inputs)),
        ("outputs", list(first.outputs), list(second.outputs)),
    ):
        if a != b:
            raise VerificationError(
                f"the models have different {what}: {', '.join(a)} and {', '.join(b)}"
            )
    if max(first.opset, LEAST_OPSET) != max(second.opset, LEAST_OPSET):
        raise VerificationError(
            f"the models have opset {first.opset} and {second.opset}: their structures cannot be "
            "compared; run both on data"
        )


class _Digests:
    """Digests of the values of one model, as far as somebody asked for them."""

    def __init__(self, graph: OnnxGraph, sites: Iterable[NormSite]) -> None:
        self.weights: dict[str, ir.TensorProtocol] = {}
        self.nodes: set[ir.Node] = set()
        self.proved: set[ir.Value] = set()
        self.known: dict[ir.Value, Digest] = {}
        self._graph = graph
        self._depth = 0
        self._sites = {site.output.native: site for site in sites if site.kind.lossless}
        for name, value in graph.inputs.items():
            self.known[value.native] = _digest("input", name)

    def __call__(self, value: ir.Value) -> Digest:
        """The digest of a value; what it is computed from comes first."""
        pending = [value]
        while pending:
            missing = [v for v in self._read(pending[-1]) if v not in self.known]
            if missing:
                pending += missing
                continue
            found = pending.pop()
            if found not in self.known:
                self.known[found] = self._of(found)
        return self.known[value]

    def _read(self, value: ir.Value) -> list[ir.Value]:
        """The values whose digests that of `value` is made from."""
        site = self._sites.get(value)
        if site is not None:
            return [site.input.native]
        node = value.producer()
        return [] if node is None or stored(value) is not None else read_by(node)

    def _of(self, value: ir.Value) -> Digest:
        site = self._sites.get(value)
        if site is not None:
            return self._of_site(value, site)
        tensor = stored(value)
        if tensor is not None:
            return self._of_constant(value, tensor)
        node = value.producer()
        if node is None:
            raise VerificationError(f"{value.name!r} is made by no node and is no input")
        self.nodes.add(node)
        operands = [b"" if operand is None else self.known[operand] for operand in node.inputs]
        while operands and not operands[-1]:
            operands.pop()  # inputs that are left out at the end may be written or not
        attributes = [self._of_attribute(each) for _, each in sorted(node.attributes.items())]
        return _of_node(node.domain, node.op_type, attributes, operands, value.index() or 0)

    def _of_site(self, value: ir.Value, site: NormSite) -> Digest:
        """DyT with its parameters, rounded as a rewritten file holds them."""
        dtype = site.input.dtype or "float32"
        named = {"alpha": site.alpha, "shift": site.shift, "gamma": site.gamma, "beta": site.beta}
        held = {name: self._graph.constant(v) for name, v in named.items() if v is not None}
        parts: list[object] = [site.kind.value, self.known[site.input.native]]
        for name, array in held.items():
            stored_as = "float32" if name in ("alpha", "shift") else dtype
            like = Value(None, name, None, stored_as)
            whole = self._graph.from_array(np.asarray(array), like).astype(np.float32)
            parts += [name, _without_leading_ones(whole.shape), whole.tobytes()]
        digest = _digest("dyt", *parts)
        producer = value.producer()
        if producer is not None:
            self.nodes.add(producer)
        if site.output.producer is not None and site.output.producer.op is Op.DYT:
            return digest
        self.proved.add(value)
        if value.dtype is None or site.output.dtype == site.input.dtype:
            return digest
        to = self._of_attribute(ir.AttrInt64("to", value.dtype.value))
        return _of_node("", "Cast", [to], [digest], 0)

    def _of_constant(self, value: ir.Value, tensor: ir.TensorProtocol) -> Digest:
        shape, name = tuple(tensor.shape.numpy()), str(value.name)
        small = tensor.nbytes <= SMALL_BYTES
        if small or not value.is_initializer() or self.weights.get(name, tensor) is not tensor:
            return _digest("constant", tensor.dtype.name, shape, _of_bytes(tensor))
        self.weights[name] = tensor
        return _digest("weight", name, tensor.dtype.name, shape)

    def _of_attribute(self, attribute: ir.Attr) -> Digest:
        value: object = attribute.value
        if attribute.type in (ir.AttributeType.FLOAT, ir.AttributeType.FLOATS):
            value = np.asarray(value, np.float32).tolist()  # as a file holds it: no 1e-5 is one
        elif attribute.type is ir.AttributeType.TENSOR:
            tensor = attribute.as_tensor()
            value = (tensor.dtype.name, tuple(tensor.shape.numpy()), _of_bytes(tensor))
        elif attribute.type is ir.AttributeType.GRAPH:
            value = self._of_body(attribute.as_graph())
        elif attribute.type is ir.AttributeType.GRAPHS:
            value = [self._of_body(graph) for graph in attribute.as_graphs()]
        return _digest(attribute.name, attribute.type.name, value)

    def _of_body(self, graph: ir.Graph) -> list[Digest]:
        """The outputs of a branch or a loop, of its inputs and of what it reads outside."""
        self._depth += 1
        for place, value in enumerate(graph.inputs):
            self.known[value] = _digest("formal", self._depth, place)
        found = [self(value) for value in graph.outputs]
        self._depth -= 1
        return found


def _of_node(
    domain: str, name: str, attributes: Iterable[Digest], operands: Iterable[Digest], place: int
) -> Digest:
    return _digest("node", domain, name, list(attributes), list(operands), place)


def _without_leading_ones(shape: Sequence[int]) -> tuple[int, ...]:
    """The axes that tell how an array is broadcast."""
    return tuple(dropwhile(lambda size: size == 1, shape))


def _of_bytes(tensor: ir.TensorProtocol) -> Digest:
    if tensor.dtype is ir.DataType.STRING:
        return _digest(tensor.numpy().tolist())
    found = hashlib.blake2b(digest_size=16)
    for chunk in chunks(tensor):
        found.update(chunk)
    return found.digest()


def _digest(*parts: object) -> Digest:
    return hashlib.blake2b(repr(parts).encode(), digest_size=16).digest()


def _same_place(a: ir.TensorProtocol, b: ir.TensorProtocol) -> bool:
    if not isinstance(a, ir.ExternalTensor) or not isinstance(b, ir.ExternalTensor):
        return a is b
    same_file = os.path.realpath(a.path) == os.path.realpath(b.path)
    return same_file and (a.offset or 0) == (b.offset or 0)


def _check_bytes(pairs: Sequence[tuple[ir.TensorProtocol, ir.TensorProtocol]]) -> None:
    for a, b in track(pairs, "comparing weights", len(pairs)):
        for one, other in zip(chunks(a), chunks(b), strict=True):
            if not np.array_equal(np.frombuffer(one, np.uint8), np.frombuffer(other, np.uint8)):
                raise VerificationError(f"the weights {a.name!r} have other values")


def _difference(output: str, one: _Digests, other: _Digests) -> str:
    """Where the models part: the first value of the second that the first does not compute."""
    same = set(one.known.values())
    for value, digest in other.known.items():
        node = value.producer()
        if digest not in same:
            made = "" if node is None else f", made by {node.op_type},"
            return (
                f"the models are not the same function as far as their structure tells: "
                f"{value.name!r}{made} has no equal in the first"
            )
    return f"the models compute {output!r} from equal values in different ways"
