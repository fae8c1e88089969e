"""TensorRT-RTX in a process of its own: a failure inside it may end the interpreter.

As a script (`rtx.py FILE [CAPABILITY]`) it parses the file, builds an engine if a compute
capability such as SM89 is named, and prints what it found as JSON.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

LIBRARY = "libtensorrt_rtx.so"
SHORTEST, LONGEST = 1, 16
"""Lengths of a dynamic axis that an engine is built for."""


@dataclass(frozen=True)
class Network:
    """What TensorRT-RTX made of a file.

    layers: how many of each type; functions: how many of each activation and unary function;
    engine_bytes: 0 where none was built; errors: of the parser and the builder.
    """

    parsed: bool
    inputs: dict[str, tuple[str, list[int]]] = field(default_factory=dict)
    outputs: dict[str, tuple[str, list[int]]] = field(default_factory=dict)
    layers: dict[str, int] = field(default_factory=dict)
    functions: dict[str, int] = field(default_factory=dict)
    engine_bytes: int = 0
    errors: list[str] = field(default_factory=list)


def network(path: Path, libraries: Path, capability: str | None = None) -> Network:
    """Parse a file in a new process, and build it for a compute capability if one is given.

    libraries: a folder for the library under the name that the parser opens; see below.
    """
    command = [sys.executable, __file__, str(path), *filter(None, [capability])]
    environment = {**os.environ, "LD_LIBRARY_PATH": _search_path(libraries, os.environ)}
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, check=False, timeout=300
    )
    if done.returncode != 0:
        raise RuntimeError(f"TensorRT-RTX ended with {done.returncode}: {done.stderr[-2000:]}")
    return Network(**json.loads(done.stdout.splitlines()[-1]))


def _search_path(folder: Path, environment: Mapping[str, str]) -> str:
    """LD_LIBRARY_PATH with `folder`, which gets the library under its name without version.

    The parser opens it so at the first node of a plugin, and ends the process if it is missing.
    """
    spec = importlib.util.find_spec("tensorrt_rtx_libs")
    if spec is None or spec.origin is None:
        raise RuntimeError("the libraries of TensorRT-RTX are not installed")
    link = folder / LIBRARY
    if not link.is_symlink():
        link.symlink_to(Path(spec.origin).with_name(f"{LIBRARY}.1"))
    return os.pathsep.join(filter(None, [str(folder), environment.get("LD_LIBRARY_PATH")]))


def _read(path: Path, capability: str | None) -> Network:
    import tensorrt_rtx as trt

    class Log(trt.ILogger):  # type: ignore[misc]
        errors: list[str]

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.ERROR:
                self.errors.append(message)

    log = Log()
    log.errors = []
    builder = trt.Builder(log)
    made = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(made, log)
    if not parser.parse_from_file(str(path)):
        errors = [str(parser.get_error(place).desc()) for place in range(parser.num_errors)]
        return Network(parsed=False, errors=[*errors, *log.errors])
    inputs = [made.get_input(place) for place in range(made.num_inputs)]
    outputs = [made.get_output(place) for place in range(made.num_outputs)]
    layers = [made.get_layer(place) for place in range(made.num_layers)]
    functions: dict[str, int] = {}
    for layer in layers:
        for kind in ("Activation", "Unary"):
            if layer.type == getattr(trt.LayerType, kind.upper()):
                layer.__class__ = getattr(trt, f"I{kind}Layer")
                name = (layer.type if kind == "Activation" else layer.op).name
                functions[name] = functions.get(name, 0) + 1
                layer.__class__ = trt.ILayer
    kinds: dict[str, int] = {}
    for layer in layers:
        kinds[layer.type.name] = kinds.get(layer.type.name, 0) + 1
    engine_bytes = 0
    if capability is not None:
        engine_bytes = _built(trt, builder, made, inputs, capability)
    return Network(
        parsed=True,
        inputs={x.name: (x.dtype.name, list(x.shape)) for x in inputs},
        outputs={y.name: (y.dtype.name, list(y.shape)) for y in outputs},
        layers=kinds,
        functions=functions,
        engine_bytes=engine_bytes,
        errors=log.errors,
    )


def _built(trt: Any, builder: Any, made: Any, inputs: list[Any], capability: str) -> int:
    """Bytes of the engine; 0 where the builder made none."""
    config = builder.create_builder_config()
    config.num_compute_capabilities = 1
    config.set_compute_capability(getattr(trt.ComputeCapability, capability), 0)
    profile = builder.create_optimization_profile()
    for x in inputs:
        least, usual, most = (
            [length if size < 0 else size for size in x.shape]
            for length in (SHORTEST, LONGEST // 2, LONGEST)
        )
        profile.set_shape(x.name, least, usual, most)
    config.add_optimization_profile(profile)
    engine = builder.build_serialized_network(made, config)
    return 0 if engine is None else int(engine.nbytes)


def main() -> None:
    """Print what was found."""
    path, *rest = sys.argv[1:]
    found = _read(Path(path), rest[0] if rest else None)
    sys.stdout.write(json.dumps(dataclasses.asdict(found)) + "\n")


if __name__ == "__main__":
    main()
