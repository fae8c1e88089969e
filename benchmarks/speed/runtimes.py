"""What runs a form: torch, eager and compiled by Inductor, ONNX Runtime, OpenVINO; all on CPUs."""

from __future__ import annotations

import ctypes
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import torch
from torch import Tensor, nn

from dyt_compile.errors import first_line

__all__ = ["RUNTIMES", "ClosedError", "Run", "Runtime", "hold_memory"]

Run = Callable[[], Any]
"""Runs a form once, and gives its outputs as the runtime holds them."""

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
"""Parameters of glibc's mallopt, from its malloc.h."""


class ClosedError(Exception):
    """A form that a runtime does not take; the text says why."""


@dataclass(frozen=True)
class Runtime:
    """load: what runs a form on its inputs, by so many threads; raises ClosedError.

    package: what has to be installed; reads_files: whether it takes ONNX files, else modules.
    """

    title: str
    package: str
    load: Callable[[Any, tuple[Tensor, ...], int], Run]
    reads_files: bool

    @property
    def installed(self) -> bool:
        """Whether it is here."""
        return importlib.util.find_spec(self.package) is not None


def hold_memory() -> None:
    """Keep what is freed for the next tensors, where the C library is glibc.

    It gives blocks above 32 MB back at once, and new ones cost a page fault for each 4 kB: an add
    of 4096 x 4096 took 38 ms instead of 8.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def eager(module: nn.Module, args: tuple[Tensor, ...], threads: int) -> Run:
    """The module as it is."""
    return lambda: module(*args)


def inductor(module: nn.Module, args: tuple[Tensor, ...], threads: int) -> Run:
    """The whole module as one graph, in torch.compile's default mode."""
    compiled = torch.compile(module, fullgraph=True, dynamic=False)
    compiled(*args)  # compiles, in processes of its own
    return lambda: compiled(*args)


def onnx_runtime(path: Path, args: tuple[Tensor, ...], threads: int) -> Run:
    """The file in a session of its own, its inputs and outputs where they are."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = threads
    # Else the threads of one session spin on while the other one runs.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    try:
        session = onnxruntime.InferenceSession(path, options, ["CPUExecutionProvider"])
    except Exception as error:
        raise ClosedError(first_line(error)) from error
    binding = session.io_binding()
    for value, tensor in zip(session.get_inputs(), args, strict=True):
        binding.bind_ortvalue_input(value.name, _ort_value(tensor))
    for value in session.get_outputs():
        binding.bind_output(value.name)
    session.run_with_iobinding(binding)
    outputs = binding.get_outputs()
    for value, found in zip(session.get_outputs(), outputs, strict=True):
        binding.bind_ortvalue_output(value.name, found)

    def run() -> list[Any]:
        session.run_with_iobinding(binding)
        return outputs

    return run


def _ort_value(tensor: Tensor) -> Any:
    from onnxruntime import OrtValue

    if tensor.dtype == torch.bfloat16:
        bits = tensor.view(torch.uint16).numpy()
        return OrtValue.ortvalue_from_numpy_with_onnx_type(bits, 16)
    return OrtValue.ortvalue_from_numpy(tensor.numpy())


def openvino(path: Path, args: tuple[Tensor, ...], threads: int) -> Run:
    """The file compiled for low latency, in its own precision: no bfloat16 where it has float32."""
    import openvino as ov

    narrow = any(tensor.dtype == torch.bfloat16 for tensor in args)
    settings = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": threads,
        "INFERENCE_PRECISION_HINT": "bf16" if narrow else "f32",
    }
    try:
        request = ov.Core().compile_model(path, "CPU", settings).create_infer_request()
        for place, tensor in enumerate(args):
            request.set_input_tensor(place, _ov_tensor(tensor))
        request.infer()
    except RuntimeError as error:
        raise ClosedError(first_line(error)) from error
    return request.infer


def _ov_tensor(tensor: Tensor) -> Any:
    import openvino as ov

    if tensor.dtype == torch.bfloat16:
        bits = tensor.view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
        return ov.Tensor(bits, tensor.shape, ov.Type.bf16)
    return ov.Tensor(tensor.numpy())


RUNTIMES = {
    "eager": Runtime("torch eager", "torch", eager, reads_files=False),
    "inductor": Runtime("Inductor", "torch", inductor, reads_files=False),
    "onnxruntime": Runtime("ONNX Runtime", "onnxruntime", onnx_runtime, reads_files=True),
    "openvino": Runtime("OpenVINO", "openvino", openvino, reads_files=True),
}
