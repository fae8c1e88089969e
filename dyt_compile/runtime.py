"""ONNX Runtime: sessions over models in memory or in files, in any of its dtypes."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from .errors import CaptureError, MissingDependencyError, OptionError
from .graphs.onnx_precision import holds, widen

__all__ = ["PROVIDERS", "Session"]

Array = npt.NDArray[Any]
BFLOAT16 = ir.DataType.BFLOAT16

PROVIDERS = {
    "cpu": ["CPUExecutionProvider"],
    "cuda": ["CUDAExecutionProvider", "CPUExecutionProvider"],
    "tensorrt": [
        "TensorrtExecutionProvider",
        "CUDAExecutionProvider",
        "CPUExecutionProvider",
    ],
}


class Session:
    """A model that runs. Arrays go in and come out in the order of its inputs and outputs.

    ONNX Runtime has almost no bfloat16 kernels for CPUs. There such nodes run in float32, and
    their results are rounded to bfloat16.

    Raises OptionError for an unknown or unavailable provider, CaptureError where ONNX Runtime
    does not take the model, MissingDependencyError without ONNX Runtime.
    """

    def __init__(self, model: ir.Model | Path, provider: str = "cpu") -> None:
        if importlib.util.find_spec("onnxruntime") is None:
            raise MissingDependencyError("onnxruntime", "cpu")
        import onnxruntime

        wanted = _available(provider, onnxruntime.get_available_providers())
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3  # warnings about its own fusions say nothing to our users
        source: str | bytes = str(model)
        if isinstance(model, ir.Model) or _lacks_bfloat16(model, wanted):
            runnable = ir.load(model) if isinstance(model, Path) else model
            if wanted[0] == "CPUExecutionProvider" and holds(runnable, BFLOAT16):
                widen(runnable, BFLOAT16)
            source = ir.serde.serialize_model(runnable).SerializeToString()
        try:
            self._session = onnxruntime.InferenceSession(source, options, providers=wanted)
        except Exception as error:
            raise CaptureError(f"ONNX Runtime does not take the model: {error}") from error
        self.inputs = [value.name for value in self._session.get_inputs()]
        self.outputs = [value.name for value in self._session.get_outputs()]

    def run(self, arrays: Sequence[Array]) -> list[Array]:
        """All outputs for all inputs."""
        feeds = dict(zip(self.inputs, map(_to_native, arrays), strict=True))
        results = self._session.run_with_ort_values(self.outputs, feeds)
        return [_to_array(result) for result in results]


def _lacks_bfloat16(path: Path, providers: Sequence[str]) -> bool:
    return providers[0] == "CPUExecutionProvider" and holds(ir.load(path), BFLOAT16)


def _available(provider: str, available: Sequence[str]) -> list[str]:
    if provider not in PROVIDERS:
        raise OptionError(f"provider is {provider!r}; allowed: {', '.join(PROVIDERS)}")
    wanted = PROVIDERS[provider]
    if wanted[0] not in available:
        raise OptionError(
            f"provider {provider!r} is not in this ONNX Runtime, which has: "
            f"{', '.join(available)}; install it with: pip install 'dyt-compile[gpu]'"
        )
    return [name for name in wanted if name in available]


def _to_native(array: Array) -> Any:
    from onnxruntime import OrtValue

    plain = np.ascontiguousarray(array)
    if plain.dtype == ml_dtypes.bfloat16:
        bits = plain.view(np.uint16)
        return OrtValue.ortvalue_from_numpy_with_onnx_type(bits, BFLOAT16.value)
    return OrtValue.ortvalue_from_numpy(plain)


def _to_array(value: Any) -> Array:
    if value.element_type() == BFLOAT16.value:
        import torch  # ONNX Runtime gives bfloat16 to NumPy in no other way

        tensor = torch.utils.dlpack.from_dlpack(value._ortvalue.to_dlpack())
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return np.asarray(value.numpy())
