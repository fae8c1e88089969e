"""What is known of a TensorRT engine: its layers as they were fused, and what it needs to run."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from .engine_shapes import Profile, spelled
from .tensorrt_process import Runtime

__all__ = [
    "EngineLayer",
    "EngineReport",
    "EngineTensor",
    "Network",
    "layers_of",
    "needs",
    "network_of",
]

NO_KERNELS = frozenset({"shape_call", "signal", "wait", "NoOp", "Constant"})
"""Types of layers that run nothing on the GPU."""


@dataclass(frozen=True)
class EngineTensor:
    """name, dtype ("half", "float", "int8", …) and shape, -1 where it is dynamic."""

    name: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class EngineLayer:
    """One fused layer: its type, what it reads and writes, and the ONNX nodes that it came from."""

    name: str
    type: str
    inputs: tuple[EngineTensor, ...]
    outputs: tuple[EngineTensor, ...]
    sources: tuple[str, ...]

    @property
    def is_kernel(self) -> bool:
        """Whether it runs on the GPU."""
        return self.type not in NO_KERNELS


@dataclass(frozen=True)
class Network:
    """What the parser made of a file, before anything is fused.

    operators: how many of each kind: functions (TANH, ERF), else types of layers (PLUGIN_V3).
    """

    inputs: tuple[EngineTensor, ...]
    outputs: tuple[EngineTensor, ...]
    operators: Mapping[str, int]


@dataclass(frozen=True)
class EngineReport:
    """A written engine.

    runtime, version: what built it and must load it; targets: compute capabilities ("sm89");
    lowering: "native" or "plugin", as it was chosen; plugins: nodes that a plugin computes, by
    form; layers: as fused; bytes: of the engine; seconds: that its build took; latency_ms: median
    by lowering, where they were timed; note: what `auto` did and did not do.
    """

    path: Path
    runtime: str
    version: str
    targets: tuple[str, ...]
    lowering: str
    plugins: Mapping[str, int]
    network: Network
    layers: tuple[EngineLayer, ...]
    bytes: int
    seconds: float
    latency_ms: Mapping[str, float] = field(default_factory=dict)
    note: str = ""

    @property
    def kernels(self) -> int:
        """How many layers run on the GPU."""
        return sum(layer.is_kernel for layer in self.layers)

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON data."""
        return {**asdict(self), "path": str(self.path), "kernels": self.kernels}


def network_of(answer: Mapping[str, Any]) -> Network:
    """A network as the worker describes it."""
    return Network(
        _tensors(answer["inputs"]), _tensors(answer["outputs"]), dict(answer["operators"])
    )


def layers_of(answer: Sequence[Mapping[str, Any]]) -> tuple[EngineLayer, ...]:
    """Fused layers as the worker describes them."""
    return tuple(
        EngineLayer(
            name=layer["name"],
            type=layer["type"],
            inputs=_tensors(layer["inputs"]),
            outputs=_tensors(layer["outputs"]),
            sources=tuple(layer["sources"]),
        )
        for layer in answer
    )


def needs(
    report: EngineReport, runtime: Runtime, library: Path | None, profiles: Mapping[str, Profile]
) -> dict[str, Any]:
    """What stands in the JSON file beside an engine: all that a machine needs to load it."""
    load = [runtime.program, f"--loadEngine={report.path.name}"]
    if profiles:
        load.append(
            f"--shapes={spelled({name: usual for name, (_, usual, _) in profiles.items()})}"
        )
    if library is not None:
        load.append(f"--dynamicPlugins={library.name}")
    return {
        "engine": report.path.name,
        "bytes": report.bytes,
        "runtime": report.runtime,
        "library": f"{runtime.library}.{report.version.partition('.')[0]}",
        "version": report.version,
        "compute_capabilities": [_dotted(name) for name in report.targets],
        "lowering": report.lowering,
        "plugin_library": None if library is None else library.name,
        "plugins": dict(report.plugins),
        "inputs": [asdict(x) for x in report.network.inputs],
        "outputs": [asdict(y) for y in report.network.outputs],
        "shapes": {
            name: dict(zip(("min", "opt", "max"), three, strict=True))
            for name, three in profiles.items()
        },
        "load": " ".join(load),
    }


def _tensors(answer: Sequence[Mapping[str, Any]]) -> tuple[EngineTensor, ...]:
    return tuple(EngineTensor(t["name"], t["dtype"], tuple(t["shape"])) for t in answer)


def _dotted(target: str) -> str:
    """ "sm89" as "8.9", "sm80+" as "8.0+"."""
    return re.sub(r"sm(\d+)(\d)", r"\1.\2", target)
