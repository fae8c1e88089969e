"""ONNX files, written with their weights linked, copied or embedded, and never held in memory.

    link   a tensor in a file beside the new one stays there, and the new file refers to it
    copy   the weights are streamed into `<name>.<digest>.data` beside the new file
    embed  the weights are streamed into the new file itself, up to protobuf's 2 GB

Tensors that are new, and those that changed, are written wherever the rest stays linked.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import numpy as np
import onnx
import onnx_ir as ir

from ..errors import ExportError, OptionError
from ..progress import track
from .onnx_data import Digested, data_name
from .onnx_derived import Derived
from .onnx_files import (
    GRAPH,
    INITIALIZER,
    LARGE_BYTES,
    RAW_DATA,
    externals,
    head,
    weights_as_inputs,
)

__all__ = [
    "EMBEDDED_BYTES", "LONG_BYTES", "WEIGHTS", "Saved", "chunks", "outline", "save", "weight_bytes"
]  # fmt: skip

WEIGHTS = ("link", "copy", "embed")

EMBEDDED_BYTES = 1_800_000_000
"""Weights above this lie in a file of their own: protobuf ends at 2 GB."""

CHUNK_BYTES = 1 << 24

ALIGNED_BYTES = 1 << 16
"""Large tensors begin at multiples of this, so that every system can map them (ExternalData.md)."""

ALIGN_FROM_BYTES = 1 << 20

REFRESH_SECONDS = 2.0

LONG_BYTES = 1 << 28
"""From here on it is said how far the writing is, and how fast it was."""

Chunk = bytes | memoryview


@dataclass(frozen=True)
class Saved:
    """What was written: bytes of the files, and the bytes and files that are only referred to."""

    bytes: int
    linked_bytes: int = 0
    linked: tuple[str, ...] = ()


@dataclass
class _Plan:
    """Where every large initializer goes."""

    linked: dict[ir.Value, ir.ExternalTensor] = field(default_factory=dict)
    copied: dict[ir.Value, ir.ExternalTensor] = field(default_factory=dict)
    embedded: dict[ir.Value, ir.ExternalTensor] = field(default_factory=dict)

    def stand_ins(self) -> dict[ir.Value, ir.ExternalTensor]:
        """What the graph holds instead of the tensors while it is written."""
        return self.linked | self.copied | self.embedded


def weight_bytes(model: ir.Model) -> int:
    """Bytes of all initializers of the main graph."""
    held = (value.const_value for value in model.graph.initializers.values())
    return sum(tensor.nbytes for tensor in held if tensor is not None)


def outline(model: ir.Model) -> onnx.ModelProto:
    """The proto of a model, with its large initializers as inputs."""
    large = [value for value in model.graph.initializers.values() if _is_large(value)]
    with _standing_in({value: _referred(_held(value), "", 0) for value in large}):
        proto = ir.serde.serialize_model(model)
    weights_as_inputs(proto)
    return proto


def _is_large(value: ir.Value) -> bool:
    tensor = value.const_value
    return tensor is not None and _to_place(tensor)


def save(
    model: ir.Model, path: Path, weights: str | None = None, folder: Path | None = None
) -> Saved:
    """Write a model; nothing of its weights is held in memory but what was there before.

    weights: "link", "copy" or "embed" (see above). By default a model's weights in other files are
    linked where it is written into its own folder; the rest is embedded up to 1.8 GB, and copied
    above. folder: where the file will lie, if `path` is temporary. The model stays as it is.

    Raises OptionError for other `weights`, and ExportError where the weights cannot be linked or
    embedded.
    """
    home = (path.parent if folder is None else folder).resolve()
    _embed_apart(model)
    plan = _planned(model, home, weights)
    held = {value: _held(value) for value in plan.stand_ins()}
    data = None
    if plan.copied:
        data = _write_data(path, [(held[value], place) for value, place in plan.copied.items()])
        plan.copied = _laid_out(plan.copied, data.name)
    with _standing_in(plan.stand_ins()):
        proto = ir.serde.serialize_model(model)
    _write_model(path, proto, {str(value.name): held[value] for value in plan.embedded})
    files = tuple(sorted({os.fspath(tensor.location) for tensor in plan.linked.values()}))
    written = path.stat().st_size + (0 if data is None else data.stat().st_size)
    return Saved(written, sum(tensor.nbytes for tensor in plan.linked.values()), files)


def _embed_apart(model: ir.Model) -> None:
    """Load external tensors that are no initializers of the main graph, into the model."""
    own = {id(value.const_value) for value in model.graph.initializers.values()}
    if any(id(tensor) not in own for tensor in externals(model)):
        kept = {value: value.const_value for value in model.graph.initializers.values()}
        ir.external_data.load_to_model(model)
        for value, tensor in kept.items():
            value.const_value = tensor


def _planned(model: ir.Model, home: Path, weights: str | None) -> _Plan:
    if weights is not None and weights not in WEIGHTS:
        raise OptionError(f"weights is {weights!r}; allowed: {', '.join(WEIGHTS)}")
    plan = _Plan()
    rest: list[ir.Value] = []
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if isinstance(tensor, ir.ExternalTensor) and weights in (None, "link"):
            location = _within(tensor, home)
            if location is not None and (weights == "link" or _is_home(tensor, home)):
                plan.linked[value] = _referred(tensor, location, tensor.offset or 0)
                continue
            if weights == "link":
                raise ExportError(
                    f"weights is 'link', but {tensor.name!r} lies in {tensor.path!r}, outside "
                    f"{str(home)!r}, where the file is written; allowed: copy, embed"
                )
        if _is_large(value):
            rest.append(value)
    if weights == "link" and not plan.linked:
        raise ExportError("weights is 'link', but the model has none in other files")
    total = sum(_held(value).nbytes for value in rest)
    if weights == "embed" and total > EMBEDDED_BYTES:
        raise ExportError(
            f"weights is 'embed', but they take {total / 1e9:.1f} GB; allowed: up to "
            f"{EMBEDDED_BYTES / 1e9:.1f} GB, as protobuf ends at 2 GB"
        )
    if weights == "copy" or total > EMBEDDED_BYTES:
        plan.copied = _laid_out(rest, "")  # the file has its name once it is written
    else:
        plan.embedded = {value: _referred(_held(value), "", 0) for value in rest}
    return plan


def _to_place(tensor: ir.TensorProtocol) -> bool:
    """Whether it is more than a part of the graph: large, or in another file until now."""
    large = tensor.nbytes >= LARGE_BYTES and tensor.dtype is not ir.DataType.STRING
    return large or isinstance(tensor, ir.ExternalTensor)


def _held(value: ir.Value) -> ir.TensorProtocol:
    if value.const_value is None:
        raise ExportError(f"the weights {value.name!r} are not loaded")
    return value.const_value


def _within(tensor: ir.ExternalTensor, home: Path) -> str | None:
    """The path of a tensor's file as a file in `home` may give it, None where it may not."""
    try:
        return Path(os.path.realpath(tensor.path)).relative_to(home).as_posix()
    except ValueError:
        return None


def _is_home(tensor: ir.ExternalTensor, home: Path) -> bool:
    """Whether the model that a tensor came with lies in the same folder."""
    return Path(os.path.realpath(tensor.base_dir)) == home


def _laid_out(values: Iterable[ir.Value], location: str) -> dict[ir.Value, ir.ExternalTensor]:
    """The places of tensors in one file, large ones aligned."""
    placed, offset = {}, 0
    for value in values:
        tensor = _held(value)
        if tensor.nbytes >= ALIGN_FROM_BYTES:
            offset = -(-offset // ALIGNED_BYTES) * ALIGNED_BYTES
        placed[value] = _referred(tensor, location, offset)
        offset += tensor.nbytes
    return placed


def _referred(tensor: ir.TensorProtocol, location: str, offset: int) -> ir.ExternalTensor:
    return ir.ExternalTensor(
        location, offset, tensor.nbytes, tensor.dtype,
        shape=ir.Shape(tensor.shape.numpy()), name=str(tensor.name),
    )  # fmt: skip


@contextmanager
def _standing_in(stand_ins: Mapping[ir.Value, ir.ExternalTensor]) -> Iterator[None]:
    held = {value: value.const_value for value in stand_ins}
    for value, stand_in in stand_ins.items():
        stand_in.name = str(value.name)
        value.const_value = stand_in
    try:
        yield
    finally:
        for value, tensor in held.items():
            value.const_value = tensor


@dataclass(frozen=True, eq=False)
class _Part:
    """Bytes of a file: what stands before a tensor, and the tensor; `at`: where they begin, by
    default behind the part before."""

    tensor: ir.TensorProtocol
    before: bytes = b""
    at: int | None = None


def _write_data(path: Path, places: Iterable[tuple[ir.TensorProtocol, ir.ExternalTensor]]) -> Path:
    """Write the data file of a model file; it has its name when its contents are known."""
    unnamed = path.with_name(f"{path.name}.data")
    with unnamed.open("wb") as file:
        digested = Digested(file)
        _stream(digested, [_Part(tensor, at=place.offset) for tensor, place in places])
    return unnamed.replace(path.with_name(data_name(path.name, digested.digest())))


def _write_model(
    path: Path, proto: onnx.ModelProto, embedded: Mapping[str, ir.TensorProtocol]
) -> None:
    """Write the proto, with the bytes of the embedded tensors put in as they are read."""
    parts = []
    initializers = proto.graph.initializer
    for place in range(len(initializers) - 1, -1, -1):
        stub = initializers[place]
        if stub.name in embedded:
            parts.append(_as_part(stub, embedded[stub.name]))
            del initializers[place]
    body = proto.graph.SerializeToString()
    proto.ClearField("graph")
    length = len(body) + sum(len(part.before) + part.tensor.nbytes for part in parts)
    with path.open("wb") as file:
        file.write(proto.SerializeToString() + head(GRAPH, length) + body)
        _stream(file, parts[::-1])


def _as_part(stub: onnx.TensorProto, tensor: ir.TensorProtocol) -> _Part:
    """An initializer of a graph, to be written behind the rest of it."""
    stub.ClearField("external_data")
    stub.ClearField("data_location")
    before = stub.SerializeToString() + head(RAW_DATA, tensor.nbytes)
    return _Part(tensor, head(INITIALIZER, len(before) + tensor.nbytes) + before)


def _stream(file: BinaryIO | Digested, parts: Sequence[_Part]) -> None:
    sizes = [part.tensor.nbytes for part in parts]
    speed = _Speed("writing weights")
    pieces: Iterator[Chunk] = (chunk for part in parts for chunk in _placed(file, part))
    if sum(sizes) >= LONG_BYTES:
        pieces = track(pieces, speed.told, sum(-(-size // CHUNK_BYTES) for size in sizes))
    for chunk in pieces:
        file.write(chunk)
        speed.add(len(chunk))


def _placed(file: BinaryIO | Digested, part: _Part) -> Iterator[Chunk]:
    """The chunks of a tensor, with the file where they belong."""
    if part.at is not None:
        file.seek(part.at)
    file.write(part.before)
    yield from chunks(part.tensor)


def chunks(tensor: ir.TensorProtocol) -> Iterator[Chunk]:
    """The bytes of a tensor as a file holds them, a few megabytes at a time.

    What lies in another file is read, not mapped, so that it does not stay in memory; what is made
    of such a tensor is computed a part at a time.
    """
    if isinstance(tensor, ir.ExternalTensor):
        yield from _read(tensor)
        return
    if isinstance(tensor, Derived):
        yield from _even(map(_view, tensor.parts()))
        return
    whole = _view(tensor)
    for start in range(0, len(whole), CHUNK_BYTES):
        yield whole[start : start + CHUNK_BYTES]


def _read(tensor: ir.ExternalTensor) -> Iterator[bytes]:
    left = tensor.nbytes
    with Path(tensor.path).open("rb") as file:
        file.seek(tensor.offset or 0)
        while left:
            chunk = file.read(min(left, CHUNK_BYTES))
            if not chunk:
                raise ExportError(f"{tensor.path!r} ends {left} bytes before {tensor.name!r} does")
            left -= len(chunk)
            yield chunk


def _even(pieces: Iterable[memoryview]) -> Iterator[memoryview]:
    """The same bytes in chunks of one size, but for the last."""
    kept = bytearray()
    for piece in pieces:
        kept += piece
        while len(kept) >= CHUNK_BYTES:
            yield memoryview(kept[:CHUNK_BYTES])
            del kept[:CHUNK_BYTES]
    if kept:
        yield memoryview(kept)


def _view(tensor: ir.TensorProtocol) -> memoryview:
    """The bytes of a tensor in memory; a copy only where it is not stored so already."""
    if tensor.dtype.bitwidth >= 8 and sys.byteorder == "little":
        array = np.ascontiguousarray(tensor.numpy()).reshape(-1).view(np.uint8)
        return array.data
    return memoryview(tensor.tobytes())


class _Speed:
    """What is done, and how fast: words that change every few seconds."""

    def __init__(self, doing: str) -> None:
        self._doing = self._words = doing
        self._done, self._start = 0, time.perf_counter()
        self._refreshed = self._start

    def add(self, size: int) -> None:
        """So many bytes more are done."""
        self._done += size
        now = time.perf_counter()
        if now - self._refreshed >= REFRESH_SECONDS:
            speed = self._done / (now - self._start)
            self._words, self._refreshed = f"{self._doing}, {speed / 1e6:.0f} MB/s", now

    def told(self) -> str:
        """The words."""
        return self._words
