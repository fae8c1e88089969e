"""ONNX files, read without their weights: those stay where they are until someone asks for them.

A file's own tensors are mapped into memory, so that only the pages which are read are loaded, and
protobuf parses what is left, as large as the graph. What lies in files beside it stays there.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir

from ..errors import CaptureError, first_line

__all__ = [
    "GRAPH", "INITIALIZER", "LARGE_BYTES", "RAW_DATA", "delimited", "externals",
    "head", "load", "numbers", "parse", "settle",
    "weights_as_inputs",
]  # fmt: skip

LARGE_BYTES = 1024
"""Smaller tensors are read with the graph: shapes, axes, scalars."""

# Fields of onnx.proto.
GRAPH, INITIALIZER = 7, 5
DIMS, DATA_TYPE, NAME, RAW_DATA = 1, 2, 8, 9

VARINT, FIXED64, DELIMITED, FIXED32 = 0, 1, 2, 5
"""Wire types of protobuf: protobuf.dev/programming-guides/encoding."""

LONGEST_VARINT = 10


@dataclass(frozen=True)
class _Field:
    """A field of a message: `data[at:stop]` is all of it, `data[start:stop]` its value."""

    number: int
    wire: int
    at: int
    start: int
    stop: int


@dataclass(frozen=True)
class _Weight:
    """Where the bytes of a tensor stand in its own file."""

    start: int
    stop: int


def load(path: Path, folder: Path | None = None) -> ir.Model:
    """The model of a file, its weights not loaded.

    folder: where external data lies that is not beside it. Raises CaptureError for a file that is
    no ONNX model, and for external data that is cut short or lies outside the folder.
    """
    proto, mapped = parse(path)
    try:
        model = ir.serde.deserialize_model(proto)
        for name, tensor in mapped.items():
            model.graph.initializers[name].const_value = tensor
    except Exception as error:
        raise CaptureError(f"{str(path)!r} is no ONNX model: {first_line(error)}") from error
    home = path.parent.absolute()
    for external in externals(model):
        beside = folder is None or (home / external.location).is_file()
        external.base_dir = str(home if beside or folder is None else folder.absolute())
    settle(model)
    return model


def parse(path: Path) -> tuple[onnx.ModelProto, dict[str, ir.TensorProtocol]]:
    """The proto of a file without the bytes of its large initializers, and those, mapped."""
    try:
        with path.open("rb") as file:
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        kept, weights = _skeleton(data)
        proto = onnx.ModelProto.FromString(kept)
        stubs = {tensor.name: tensor for tensor in proto.graph.initializer}
        return proto, {name: _mapped(stubs[name], data, at) for name, at in weights.items()}
    except Exception as error:
        raise CaptureError(f"{str(path)!r} is no ONNX model: {first_line(error)}") from error


def weights_as_inputs(proto: onnx.ModelProto) -> None:
    """Let initializers whose values are not in the proto be inputs, in place: for onnx's checker
    and its inference, which need none of them."""
    graph = proto.graph
    given = {value.name for value in graph.input}
    for place in range(len(graph.initializer) - 1, -1, -1):
        tensor = graph.initializer[place]
        if not (tensor.HasField("raw_data") or _holds_numbers(tensor)):
            if tensor.name not in given:
                graph.input.append(
                    onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims)
                )
            del graph.initializer[place]


def _holds_numbers(tensor: onnx.TensorProto) -> bool:
    """Whether a tensor has its values in a field for numbers or strings, or has none."""
    fields = ("float_data", "int32_data", "string_data", "int64_data", "double_data", "uint64_data")
    empty = 0 in tensor.dims and tensor.data_location != onnx.TensorProto.EXTERNAL
    return empty or any(len(getattr(tensor, name)) for name in fields)


def externals(model: ir.Model) -> Iterator[ir.ExternalTensor]:
    """Every tensor of a model that lies in another file: of branches and attributes, too."""
    bodies = (function.graph for function in model.functions.values())
    for graph in chain([model.graph], model.graph.subgraphs(), bodies):
        held = (value.const_value for value in graph.initializers.values())
        attributes = (attribute for node in graph for attribute in node.attributes.values())
        for tensor in chain(held, chain.from_iterable(map(_tensors, attributes))):
            if isinstance(tensor, ir.ExternalTensor):
                yield tensor


def settle(model: ir.Model) -> None:
    """Let the graph hold its small tensors itself, in place: ONNX Runtime asks for axes and shapes.

    Raises CaptureError unless all external data lies, whole, within the folder of the model.
    """
    for tensor in externals(model):
        _check_place(tensor, Path(tensor.base_dir).absolute())
    for graph in (model.graph, *model.graph.subgraphs()):
        for value in graph.initializers.values():
            held = value.const_value
            if isinstance(held, ir.ExternalTensor) and held.nbytes < LARGE_BYTES:
                array = numbers(held)  # read: `numpy` maps all of the file, for one of its tensors
                value.const_value = ir.Tensor(array, held.dtype, shape=held.shape, name=held.name)


def numbers(tensor: ir.TensorProtocol) -> npt.NDArray[Any]:
    """The numbers of a tensor; those in another file are read, so that none stay behind.

    Raises CaptureError where that file has become too short, or is there no longer.
    """
    if not isinstance(tensor, ir.ExternalTensor):
        return np.asarray(tensor.numpy())
    try:
        raw = np.fromfile(tensor.path, np.uint8, tensor.nbytes, offset=tensor.offset or 0)
    except OSError as error:
        raise CaptureError(
            f"the weights {tensor.name!r} cannot be read from {tensor.path!r}: {error.strerror}"
        ) from error
    if raw.size != tensor.nbytes:
        raise CaptureError(
            f"{tensor.path!r} ends {tensor.nbytes - raw.size} bytes before {tensor.name!r} does"
        )
    shape = ir.Shape(tensor.shape.numpy())
    return np.asarray(_over(raw, tensor.dtype, shape, tensor.name).numpy())


def _tensors(attribute: ir.Attr) -> Sequence[ir.TensorProtocol]:
    # The values themselves: `as_tensor` asks a protocol each time, which is slow.
    if attribute.type is ir.AttributeType.TENSOR:
        return (attribute.value,)
    return attribute.value or () if attribute.type is ir.AttributeType.TENSORS else ()


def _check_place(tensor: ir.ExternalTensor, folder: Path) -> None:
    """Raise CaptureError unless the bytes of a tensor lie, all of them, within the folder."""
    folder = Path(os.path.normpath(folder))
    told = f"the weights {tensor.name!r} lie in {os.fspath(tensor.location)!r}"
    allowed = f"allowed: relative paths of files within {str(folder)!r}"
    place = Path(os.path.normpath(folder / tensor.location))
    if Path(tensor.location).is_absolute() or folder not in place.parents:
        raise CaptureError(f"{told}, outside the model's folder; {allowed}")
    real = place.resolve()
    if folder.resolve() not in real.parents:
        raise CaptureError(f"{told}, a link to {str(real)!r} outside the model's folder; {allowed}")
    if not real.is_file():
        raise CaptureError(f"{told}, which is no file; {allowed}")
    found = real.stat()
    if found.st_nlink > 1:
        raise CaptureError(f"{told}, which has {found.st_nlink} hard links; allowed: one name")
    start, length = tensor.offset or 0, tensor.nbytes if tensor.length is None else tensor.length
    if length != tensor.nbytes or start < 0 or start + length > found.st_size:
        raise CaptureError(
            f"{told} at bytes {start} to {start + length}, but its shape takes {tensor.nbytes} "
            f"bytes and the file has {found.st_size}"
        )


def _skeleton(data: mmap.mmap) -> tuple[bytes, dict[str, _Weight]]:
    """A model's bytes without those of the large initializers of its main graph, and where
    each of them stands. Raises ValueError where the bytes are no protobuf message."""
    weights: dict[str, _Weight] = {}
    parts = []
    for field in _fields(data, 0, len(data)):
        if field.number == GRAPH and field.wire == DELIMITED:
            body = b"".join(
                _without_bytes(data, inner, weights)
                for inner in _fields(data, field.start, field.stop)
            )
            parts.append(delimited(GRAPH, body))
        else:
            parts.append(data[field.at : field.stop])
    return b"".join(parts), weights


def _without_bytes(data: mmap.mmap, field: _Field, weights: dict[str, _Weight]) -> bytes:
    """A field of a graph; of a large initializer all but its bytes, which are noted."""
    if field.number != INITIALIZER or field.stop - field.start < LARGE_BYTES:
        return data[field.at : field.stop]
    held = list(_fields(data, field.start, field.stop))
    raw = [inner for inner in held if inner.number == RAW_DATA]
    named = [data[inner.start : inner.stop] for inner in held if inner.number == NAME]
    if len(raw) != 1 or len(named) != 1 or raw[0].stop - raw[0].start < LARGE_BYTES:
        return data[field.at : field.stop]
    weights[named[0].decode()] = _Weight(raw[0].start, raw[0].stop)
    rest = (data[inner.at : inner.stop] for inner in held if inner is not raw[0])
    return delimited(INITIALIZER, b"".join(rest))


def _mapped(stub: onnx.TensorProto, data: mmap.mmap, at: _Weight) -> ir.TensorProtocol:
    """A tensor over the file's own bytes. Raises ValueError where they are not as many as its
    shape takes."""
    dtype = ir.DataType(stub.data_type)
    shape = ir.Shape(stub.dims)
    raw = np.frombuffer(data, np.uint8, at.stop - at.start, at.start)
    expected = -(-int(np.prod(stub.dims, dtype=np.int64)) * dtype.bitwidth // 8)
    if raw.size != expected:
        raise ValueError(f"{stub.name!r} holds {raw.size} bytes, its shape takes {expected}")
    return _over(raw, dtype, shape, stub.name)


def _over(
    raw: npt.NDArray[np.uint8], dtype: ir.DataType, shape: ir.Shape, name: str | None
) -> ir.TensorProtocol:
    """A tensor over bytes as files hold them."""
    if dtype.bitwidth < 8:
        return ir.PackedTensor(raw, dtype, shape=shape, name=name)
    array = raw.view(dtype.numpy().newbyteorder("<")).reshape(shape.numpy())
    return ir.Tensor(array, dtype, shape=shape, name=name)


def _fields(data: mmap.mmap, start: int, stop: int) -> Iterator[_Field]:
    position = start
    while position < stop:
        at = position
        key, position = _varint(data, position)
        wire = key & 7
        if wire == DELIMITED:
            length, position = _varint(data, position)
        elif wire == VARINT:
            length = _varint(data, position)[1] - position
        elif wire in (FIXED32, FIXED64):
            length = 4 if wire == FIXED32 else 8
        else:
            raise ValueError(f"byte {at} begins no field of protobuf")
        if position + length > stop:
            raise ValueError(f"a field at byte {at} ends behind the end of its message")
        yield _Field(key >> 3, wire, at, position, position + length)
        position += length


def _varint(data: mmap.mmap, position: int) -> tuple[int, int]:
    """A number of variable length, and the place behind it."""
    value = 0
    for shift in range(LONGEST_VARINT):
        if position >= len(data):
            raise ValueError("the file ends within a number")
        byte = data[position]
        value |= (byte & 0x7F) << (7 * shift)
        position += 1
        if byte < 0x80:
            return value, position
    raise ValueError(f"byte {position} belongs to no number of protobuf")


def delimited(number: int, body: bytes) -> bytes:
    """A field of protobuf that holds bytes."""
    return head(number, len(body)) + body


def head(number: int, length: int) -> bytes:
    """What stands before the bytes of a field that holds `length` of them."""
    return _as_varint(number << 3 | DELIMITED) + _as_varint(length)


def _as_varint(value: int) -> bytes:
    parts = bytearray()
    while value >= 0x80:
        parts.append(value & 0x7F | 0x80)
        value >>= 7
    parts.append(value)
    return bytes(parts)
