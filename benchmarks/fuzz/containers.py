"""Archives and safetensors that are well-formed and bad: .npz, .pt2, calibrations."""

from __future__ import annotations

import io
import json
import pickle
import struct
import zipfile
from random import Random
from typing import Any

import numpy as np

from .bytes import damaged

__all__ = ["bad_archive", "bad_calibration", "bad_program"]

Entries = dict[str, bytes]

SHAPES = (
    "(0,)", "()", "(12,)", "(12, 4)", "(12, 4, 17)", "(12, 4, 16, 1)", "(10**12, 4, 16)",
    "(-1, 4, 16)", "(4611686018427387904, 4)", "(12, 4, 16.0)", "'x'", "(" * 500,
)  # fmt: skip

DTYPES = (
    "'<f4'", "'<f8'", "'<f2'", "'>f4'", "'|O'", "'<i8'", "'|b1'", "'<U4'", "'|S0'", "'|V3'",
    "[('a', '<f4')]", "'<c8'", "'<M8[s]'", "'x'", "'<f4000'", "None",
)  # fmt: skip

NAMES = (
    "x.npy", "y.npy", "x", "", "../x.npy", "/x.npy", "a/../../x.npy", "C:\\x.npy", "x.npy/",
    "\x1b[2J.npy", "x\0.npy", "</script>.npy", "n" * 3000,
)  # fmt: skip


class _Pickled:
    """A pickle that would write a file if something opened it."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (open, ("HACKED", "w"))


def bad_archive(data: bytes, random: Random) -> bytes:
    """The bytes of a bad .npz file."""
    entries = _unpacked(data)
    choice = random.randrange(9)
    name = next(iter(entries))
    if choice == 0:
        entries[name] = damaged(entries[name], random)
    elif choice == 1:
        entries = {random.choice(NAMES): entries[name]}
    elif choice == 2:
        entries[random.choice(NAMES)] = random.choice((b"", b"text", entries[name]))
    elif choice == 3:
        entries[name] = _headed(random.choice(SHAPES), random.choice(DTYPES), entries[name])
    elif choice == 4:
        entries[name] = _array(_values(random))
    elif choice == 5:
        entries[name] = _array(np.array([_Pickled()] * 12, object), allow_pickle=True)
    elif choice == 6:
        return random.choice((pickle.dumps(_Pickled()), _array(np.zeros(3)), b"", b"PK"))
    elif choice == 7:
        entries = {}
    else:
        return _renumbered(data, random)
    return _packed(entries, random)


def _values(random: Random) -> np.ndarray[Any, Any]:
    """Samples of other shapes, types and values than the model takes."""
    shape = random.choice(
        ((12, 4, 16), (1, 4, 16), (3, 4, 16), (0, 4, 16), (12, 16), (12, 5, 16), (12, 4, 15), ())
    )
    value = random.choice((0.0, 1.0, np.nan, np.inf, -np.inf, 1e38, 1e-45, 65504.0))
    made = np.full(shape, value)
    if random.random() < 0.5:
        made = made + np.random.default_rng(random.randrange(99)).normal(size=shape)
    kinds = (np.float32, np.float64, np.float16, np.int64, np.bool_, np.complex64, "U8", "S4")
    with np.errstate(all="ignore"):
        return made.astype(random.choice(kinds))


def _array(array: np.ndarray[Any, Any], *, allow_pickle: bool = False) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=allow_pickle)
    return buffer.getvalue()


def _headed(shape: str, dtype: str, data: bytes) -> bytes:
    """An array's bytes under another header."""
    text = f"{{'descr': {dtype}, 'fortran_order': False, 'shape': {shape}, }}".encode()
    text += b" " * (63 - (len(text) + 10) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + data[128:]


def _unpacked(data: bytes) -> Entries:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def _packed(entries: Entries, random: Random | None = None) -> bytes:
    """An archive; with `random`, sometimes compressed, and with an entry of a name twice."""
    buffer = io.BytesIO()
    method = random.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)) if random else 0
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for name, data in entries.items():
            archive.writestr(zipfile.ZipInfo(name), data, method)
    return buffer.getvalue()


def _renumbered(data: bytes, random: Random) -> bytes:
    """Sizes and places of entries in the directory that are not theirs."""
    changed = bytearray(data)
    start = data.rfind(b"PK\x01\x02")
    field = random.choice((8, 10, 16, 20, 24, 28, 30, 32, 42))
    changed[start + field : start + field + 2] = random.randbytes(2)
    return bytes(changed)


def bad_program(data: bytes, random: Random) -> bytes:
    """The bytes of a bad .pt2 file."""
    entries = _unpacked(data)
    choice = random.randrange(10)
    if choice == 0:
        return damaged(data, random)
    if choice == 1:
        name = random.choice(sorted(entries))
        entries[name] = damaged(entries[name], random)
    elif choice == 2:
        del entries[random.choice(sorted(entries))]
    elif choice == 3:
        kind = random.choice(("data/weights/weight_0", "data/sample_inputs/model.pt",
                              "data/constants/custom_obj_0", "data/aotinductor/model/x.so",
                              "extra/x", "../x", "models/other.json"))  # fmt: skip
        entries[f"model/{kind}"] = pickle.dumps(_Pickled())
    else:
        suffixes = ("models/model.json",) * 4 + ("weights_config.json", "constants_config.json")
        wanted = random.choice(suffixes)
        name = next(key for key in entries if key.endswith(wanted))
        told = json.loads(entries[name])
        for _ in range(random.choice((1, 1, 2, 4))):
            _change_json(told, random)
        entries[name] = json.dumps(told).encode()
    return _packed(entries)


STRINGS = (
    "", "x", "no.such", "torch.ops.aten.from_file.default", "torch.ops.aten.tanh.default",
    "torch.os.system", "_operator.call", "x=open('HACKED','w')", "');open('HACKED','w');('",
    "__import__('os').system('touch HACKED')", "Symbol('s31', positive=True, integer=True)",
    "Pow(9, Pow(9, Pow(9, 9)))", "((" * 3000, "s9999999", "[1, {}]", "u999999", "\x1b[2J",
)  # fmt: skip


def _change_json(data: Any, random: Random) -> None:
    """Change a leaf of nested lists and dicts, or take a branch away."""
    while True:
        keys = sorted(data) if isinstance(data, dict) else list(range(len(data)))
        if not keys:
            return
        key = random.choice(keys)
        inner = data[key]
        if isinstance(inner, (dict, list)) and inner and random.random() < 0.93:
            data = inner
            continue
        choice = random.randrange(6)
        if choice == 0:
            del data[key]
        elif choice == 1 and isinstance(data, dict):
            data[random.choice(STRINGS)] = data.pop(key)
        elif choice == 2:
            data[key] = random.choice((None, True, -1, 2**62, 1e400, [], {}, [[]], 0.5))
        elif isinstance(inner, str) or choice == 3:
            data[key] = random.choice(STRINGS)
        else:
            data[key] = random.choice((-1, 0, 1, 2**31, 2**62, None, "x", False))
        return


def bad_calibration(data: bytes, random: Random) -> bytes:
    """The bytes of a bad calibration."""
    length = struct.unpack("<Q", data[:8])[0]
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    choice = random.randrange(5)
    if choice == 0:
        return damaged(data, random)
    if choice == 1:
        _change_json(header, random)
    elif choice == 2:
        values = np.frombuffer(body, np.float32).copy()
        numbers = (np.nan, np.inf, -np.inf, 0.0, 3e38, -1.0)
        values[random.randrange(len(values))] = random.choice(numbers)
        body = values.tobytes()
    else:
        told = json.loads(header["__metadata__"]["dyt_compile"])
        for _ in range(random.choice((1, 1, 3))):
            _change_json(told, random)
        header["__metadata__"]["dyt_compile"] = json.dumps(told)
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body
