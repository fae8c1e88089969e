"""TensorRT in a process of its own: an abort inside it ends this process and no other.

As a script (`python -m dyt_compile.exporters.tensorrt_worker REQUEST RESULT`) it does what the one
JSON file asks and writes the other: parse a file, build an engine, or time one. Errors of TensorRT
go to stderr as they come, so that the last of them is known whatever follows.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ..files import DISK_FULL

__all__ = ["capability", "fused_layers", "main", "network_flags", "watch_parent"]

LAYERS = "Layers:"
LAYER = re.compile(
    r"Name: (?P<name>.*?), LayerType: (?P<type>\w+), Inputs: (?P<inputs>\[.*?\]), "
    r"Constants: .*?, Outputs: (?P<outputs>\[.*\]), TacticName: .*?"
    r"Metadata: (?P<metadata>.*)$"
)
TENSOR = re.compile(r"Name: (.*?), Dimensions: \[(.*?)\].*?Datatype: (\w+)")
SOURCE = re.compile(r"\[ONNX Layer: (.*?)\]")

NO_DRIVER = "cudaError 35"
"""Part of a message that every error has on a machine without a GPU."""

WARM_UP = 10


class FailedError(Exception):
    """What TensorRT refuses, in one line."""


def main() -> None:
    """Do what the request asks, and write the result; exits with the error of a full disk."""
    watch_parent()
    try:
        _answer()
    except OSError as error:
        if error.errno in DISK_FULL:
            sys.exit(error.errno)
        raise


def _answer() -> None:
    request = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    work = {"read": _read, "build": _build, "time": _time}[request["verb"]]
    trt = _module(request["runtime"])
    log = _logger(trt)
    try:
        with_plugins(trt, log, request.get("plugin_library"))
        result = {"version": trt.__version__, "gpu": capability(), **work(trt, log, request)}
    except FailedError as error:
        result = {"error": str(error)}
    Path(sys.argv[2]).write_text(json.dumps(result), encoding="utf-8")


def watch_parent() -> None:
    """From now on, end this process when its standard input does: the parent holds that open."""

    def wait() -> None:
        os.read(sys.stdin.fileno(), 1)
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def _module(runtime: str) -> Any:
    if runtime == "tensorrt-rtx":
        import tensorrt_rtx

        return tensorrt_rtx
    import tensorrt

    return tensorrt


def _logger(trt: Any) -> Any:
    class Log(trt.ILogger):  # type: ignore[misc]
        """Keeps the errors and the list of fused layers."""

        def __init__(self) -> None:
            super().__init__()
            self.errors: list[str] = []
            self.layers: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.ERROR:
                self.errors.append(message)
                sys.stderr.write(f"{_line(message)}\n")
                sys.stderr.flush()
            elif message.startswith(LAYERS):
                self.layers.append(message)

    return Log()


def _line(message: str) -> str:
    """A message of several lines in one, without what only says that there is no GPU."""
    lines = (line.strip() for line in message.splitlines())
    return " ".join(line for line in lines if line and NO_DRIVER not in line)


def capability() -> str | None:
    """The compute capability of the first GPU, such as "sm89"; None without one."""
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    device, found = ctypes.c_int(), []
    if cuda.cuInit(0) or cuda.cuDeviceGet(ctypes.byref(device), 0):
        return None
    for attribute in (75, 76):  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR
        value = ctypes.c_int()
        cuda.cuDeviceGetAttribute(ctypes.byref(value), attribute, device)
        found.append(str(value.value))
    return f"sm{''.join(found)}"


def with_plugins(trt: Any, log: Any, library: str | None) -> None:
    """Load a library of plugins into the registry, by `getCreators` of the library."""
    if library is None:
        return
    if trt.get_plugin_registry().load_library(library) is None:
        told = f": {_line(log.errors[-1])}" if log.errors else ""
        raise FailedError(f"cannot load the plugin library {library!r}{told}")


def network_flags(flags: Any) -> int:
    """The flags of a network whose types are those of the file.

    TensorRT 10 is told so by a flag; TensorRT 11 knows nothing else and may lack the flag.
    """
    strongly_typed = getattr(flags, "STRONGLY_TYPED", None)
    return 0 if strongly_typed is None else 1 << int(strongly_typed)


def _parsed(trt: Any, log: Any, request: Mapping[str, Any]) -> tuple[Any, Any, Any]:
    """Builder, network and parser, which holds the network's weights."""
    builder = trt.Builder(log)
    if builder is None:
        raise FailedError("TensorRT has no builder")
    network = builder.create_network(network_flags(trt.NetworkDefinitionCreationFlag))
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(request["onnx"]):
        errors = [parser.get_error(place) for place in range(parser.num_errors)]
        told = [f"node {e.node_name()!r} ({e.node_operator()}): {_line(e.desc())}" for e in errors]
        raise FailedError(f"cannot parse the model: {(told or log.errors or ['no reason'])[0]}")
    return builder, network, parser


def _read(trt: Any, log: Any, request: Mapping[str, Any]) -> dict[str, Any]:
    _, network, _parser = _parsed(trt, log, request)
    return {"network": _described(trt, network)}


def _described(trt: Any, network: Any) -> dict[str, Any]:
    """Inputs and outputs of a network, and its operators: how many of each kind."""
    inputs = [network.get_input(place) for place in range(network.num_inputs)]
    outputs = [network.get_output(place) for place in range(network.num_outputs)]
    layers = [network.get_layer(place) for place in range(network.num_layers)]
    return {
        "inputs": [_tensor(x.name, x.dtype.name, x.shape) for x in inputs],
        "outputs": [_tensor(y.name, y.dtype.name, y.shape) for y in outputs],
        "operators": dict(Counter(_operator(trt, layer) for layer in layers)),
    }


def _tensor(name: str, dtype: str, shape: Any) -> dict[str, Any]:
    return {"name": name, "dtype": dtype.lower(), "shape": [int(size) for size in shape]}


def _operator(trt: Any, layer: Any) -> str:
    """The kind of a layer: its function where it has one (TANH, ERF), else its type."""
    for kind, attribute in (("Activation", "type"), ("Unary", "op")):
        if layer.type == getattr(trt.LayerType, kind.upper()):
            layer.__class__ = getattr(trt, f"I{kind}Layer")
            name = getattr(layer, attribute).name
            layer.__class__ = trt.ILayer
            return str(name)
    return str(layer.type.name)


def _build(trt: Any, log: Any, request: Mapping[str, Any]) -> dict[str, Any]:
    builder, network, _parser = _parsed(trt, log, request)
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    if request["level"] is not None:
        config.builder_optimization_level = request["level"]
    _set_targets(trt, config, request["targets"])
    _set_profile(builder, config, request["shapes"])
    cache = _set_timing_cache(config, request["timing_cache"])
    start = time.perf_counter()
    engine = builder.build_serialized_network(network, config)
    seconds = time.perf_counter() - start
    if engine is None:
        told = [_line(message) for message in log.errors]
        raise FailedError(f"cannot build the engine: {next(filter(None, told), 'no reason')}")
    Path(request["engine"]).write_bytes(engine)
    if cache is not None:
        Path(request["new_timing_cache"]).write_bytes(config.get_timing_cache().serialize())
    layers = [layer for message in log.layers for layer in fused_layers(message)]
    return {
        "network": _described(trt, network),
        "layers": layers or _inspected(trt, log, engine),
        "seconds": seconds,
        "bytes": engine.nbytes,
    }


def _set_targets(trt: Any, config: Any, targets: list[str]) -> None:
    """Compute capabilities to build for, of TensorRT-RTX; none: the GPU of this machine."""
    if not targets:
        return
    config.num_compute_capabilities = len(targets)
    for place, target in enumerate(targets):
        member = getattr(trt.ComputeCapability, target.upper(), None)
        if member is None or not config.set_compute_capability(member, place):
            names = (name.lower() for name in dir(trt.ComputeCapability) if name.startswith("SM"))
            raise FailedError(f"target is {target!r}; allowed: {', '.join(sorted(names))}")


def _set_profile(builder: Any, config: Any, shapes: Mapping[str, Any]) -> None:
    if not shapes:
        return
    profile = builder.create_optimization_profile()
    for name, (least, usual, most) in shapes.items():
        profile.set_shape(name, least, usual, most)
    if config.add_optimization_profile(profile) < 0:
        raise FailedError("the shapes make no valid profile")


def _set_timing_cache(config: Any, path: str | None) -> Any:
    if path is None:
        return None
    known = Path(path).read_bytes() if Path(path).exists() else b""
    cache = config.create_timing_cache(known)
    if cache is None or not config.set_timing_cache(cache, False):
        raise FailedError(f"timing cache {path!r} is of another device or TensorRT, or damaged")
    return cache


def fused_layers(message: str) -> Iterator[dict[str, Any]]:
    """The layers of an engine from the builder's message, which it gives without a GPU too."""
    for line in message.splitlines():
        found = LAYER.match(line)
        if found:
            yield {
                "name": found["name"],
                "type": found["type"],
                "inputs": _tensors(found["inputs"]),
                "outputs": _tensors(found["outputs"]),
                "sources": SOURCE.findall(found["metadata"]),
            }


def _tensors(text: str) -> list[dict[str, Any]]:
    found = TENSOR.findall(text)
    return [_tensor(name, dtype, filter(None, shape.split(","))) for name, shape, dtype in found]


def _inspected(trt: Any, log: Any, plan: Any) -> list[dict[str, Any]]:
    """The layers of an engine from its inspector, which needs the GPU that it was built for."""
    engine = trt.Runtime(log).deserialize_cuda_engine(plan)
    if engine is None:
        return []
    text = engine.create_engine_inspector().get_engine_information(trt.LayerInformationFormat.JSON)
    layers = json.loads(text)["Layers"]
    return [
        {
            "name": layer["Name"],
            "type": layer["LayerType"],
            "inputs": [_inspected_tensor(x) for x in layer["Inputs"]],
            "outputs": [_inspected_tensor(y) for y in layer["Outputs"]],
            "sources": SOURCE.findall(layer.get("Metadata", "")),
        }
        for layer in layers
        if isinstance(layer, dict)
    ]


def _inspected_tensor(tensor: Mapping[str, Any]) -> dict[str, Any]:
    dtype = tensor.get("Datatype") or tensor.get("Format/Datatype", "")
    return _tensor(tensor["Name"], dtype, tensor["Dimensions"])


def _time(trt: Any, log: Any, request: Mapping[str, Any]) -> dict[str, Any]:
    """Milliseconds of single passes at the usual shapes, by CUDA events; needs a GPU and torch."""
    import torch

    if capability() is None:
        raise FailedError("no GPU: an engine cannot be timed")
    if not torch.cuda.is_available():
        raise FailedError("torch has no CUDA: an engine cannot be timed")
    engine = trt.Runtime(log).deserialize_cuda_engine(Path(request["engine"]).read_bytes())
    if engine is None:
        raise FailedError(f"cannot load the engine: {_line(log.errors[-1])}")
    context = engine.create_execution_context()
    stream = torch.cuda.Stream()
    held = _bound(trt, torch, engine, context)
    times = _passes(torch, stream, request["passes"], lambda: _enqueue(context, stream))
    del held
    return {"device": torch.cuda.get_device_name(), "milliseconds": times}


def _bound(trt: Any, torch: Any, engine: Any, context: Any) -> list[Any]:
    """Tensors for all inputs and outputs, which the context then knows."""
    names = [engine.get_tensor_name(place) for place in range(engine.num_io_tensors)]
    given = [n for n in names if engine.get_tensor_mode(n) == trt.TensorIOMode.INPUT]
    for name in given:
        context.set_input_shape(name, engine.get_tensor_profile_shape(name, 0)[1])
    held = []
    for name in names:
        dtype = _torch_dtype(torch, engine.get_tensor_dtype(name).name)
        shape = tuple(context.get_tensor_shape(name))
        made = torch.zeros(shape, dtype=dtype, device="cuda")
        if name in given and dtype.is_floating_point and dtype.itemsize > 1:
            made.normal_()
        context.set_tensor_address(name, made.data_ptr())
        held.append(made)
    return held


def _torch_dtype(torch: Any, name: str) -> Any:
    names = {
        "FLOAT": "float32", "HALF": "float16", "BF16": "bfloat16", "FP8": "float8_e4m3fn",
    }  # fmt: skip
    return getattr(torch, names.get(name, name.lower()))


def _enqueue(context: Any, stream: Any) -> None:
    if not context.execute_async_v3(stream.cuda_stream):
        raise FailedError("the engine does not run")


def _passes(torch: Any, stream: Any, count: int, enqueue: Callable[[], None]) -> list[float]:
    times = []
    for place in range(WARM_UP + count):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record(stream)
        enqueue()
        end.record(stream)
        end.synchronize()
        if place >= WARM_UP:
            times.append(float(begin.elapsed_time(end)))
    return times


if __name__ == "__main__":
    main()
