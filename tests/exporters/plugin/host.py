"""The plugin on the CPU: its life from creator to enqueue, with NumPy arrays for tensors."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

BF16 = np.dtype(ml_dtypes.bfloat16)
FP8 = np.dtype(ml_dtypes.float8_e4m3fn)
INT8 = np.dtype(np.int8)

TYPES = {
    np.dtype(np.float32): 0,
    np.dtype(np.float16): 1,
    INT8: 2,
    np.dtype(np.int32): 3,
    FP8: 6,
    BF16: 7,
}
"""Values of TensorRT's DataType."""

OUTPUT_DTYPES = {INT8: 3, FP8: 17}
"""Values of ONNX's TensorProto.DataType, for the attribute output_dtype."""


class StepError(Exception):
    """A step of the life failed; .step names it, the message is what the plugin logged."""

    def __init__(self, step: str, message: str) -> None:
        super().__init__(f"{step}: {message}")
        self.step = step


class Tensor(ctypes.Structure):
    """As in driver.cpp."""

    _fields_ = (
        ("type", ctypes.c_int32),
        ("format", ctypes.c_int32),
        ("rank", ctypes.c_int32),
        ("dims", ctypes.c_int64 * 8),
        ("build_dims", ctypes.c_int64 * 8),
        ("data", ctypes.c_void_p),
    )


def aligned(shape: Sequence[int], dtype: np.dtype[Any], offset: int = 0) -> Array:
    """An uninitialised array that begins `offset` bytes behind a multiple of 16."""
    count = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    raw = np.empty(count + 32 + offset, np.uint8)
    start = -raw.ctypes.data % 16 + offset
    return raw[start : start + count].view(dtype).reshape(shape)


class Host:
    """The library that the host compiler made."""

    def __init__(self, path: Path) -> None:
        self._library = ctypes.CDLL(str(path))
        self._library.live.restype = ctypes.c_char_p
        self._library.logged.restype = ctypes.c_char_p

    def run(
        self,
        name: str,
        inputs: Sequence[Array],
        outputs: Sequence[Array],
        output_dtype: int = 0,
        linear: bool = True,
    ) -> None:
        """Lead a plugin from its creator to enqueue; fills `outputs`. Raises StepError.

        Axis 0 of x, residual and the outputs is dynamic while the plugin is built.
        """
        dynamic = (2 if name.startswith("Add") else 1, len(outputs))
        found = [
            (Tensor * len(arrays))(
                *(_tensor(array, place < count, linear) for place, array in enumerate(arrays))
            )
            for arrays, count in zip((inputs, outputs), dynamic, strict=True)
        ]
        step = self._library.live(
            name.encode(), output_dtype, len(inputs), found[0], len(outputs), found[1]
        )
        if step is not None:
            raise StepError(step.decode(), self._library.logged().decode())

    def set(self, variable: str, value: float, kind: Any = ctypes.c_float) -> None:
        """Set a variable of the stub."""
        kind.in_dll(self._library, variable).value = value

    @contextmanager
    def setting(self, variable: str, value: float, usual: float, kind: Any = ctypes.c_float) -> Any:
        """A variable of the stub for a while."""
        self.set(variable, value, kind)
        try:
            yield
        finally:
            self.set(variable, usual, kind)

    @property
    def launches(self) -> int:
        """Kernels that were launched so far."""
        return int(ctypes.c_longlong.in_dll(self._library, "launches").value)

    @property
    def shape(self) -> tuple[int, ...]:
        """Grid x, y, z and block x, y, z of the last launch."""
        return tuple((ctypes.c_uint * 6).in_dll(self._library, "launch_shape"))


def _tensor(array: Array, dynamic: bool, linear: bool) -> Tensor:
    dims = (ctypes.c_int64 * 8)(*array.shape)
    build = (ctypes.c_int64 * 8)(*array.shape)
    if dynamic and array.ndim:
        build[0] = -1
    return Tensor(
        TYPES[array.dtype], 0 if linear else 1, array.ndim, dims, build, array.ctypes.data
    )
