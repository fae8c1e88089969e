"""Real plugin registries, parsers and builders, each in a process of its own: they may abort.

As a script: `runtimes.py registry MODULE LIBRARY` or `runtimes.py build LIBRARY FILE CAPABILITY`;
prints what it found as JSON.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import re
import subprocess
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

RTX = "tensorrt_rtx"
LEAN = "tensorrt_lean_bindings"
"""TensorRT 11's runtime: a registry without a builder."""

DYNAMIC = (1, 4, 16)
"""Least, usual and largest size of a dynamic axis."""


@dataclass(frozen=True)
class Engine:
    """What TensorRT-RTX made of a file.

    plugins: types of the outputs of each plugin layer; kernels: types of the fused layers;
    engine_bytes: 0 where none was built; errors: of the parser, the builder and the plugin.
    """

    plugins: list[list[str]] = field(default_factory=list)
    kernels: list[str] = field(default_factory=list)
    engine_bytes: int = 0
    errors: list[str] = field(default_factory=list)


def registry(module: str, library: Path) -> dict[str, Any]:
    """Creators of a library by name: version, fields, and the run time plugins that they make."""
    return _process(["registry", module, str(library)], os.environ.copy())


def engine(library: Path | None, file: Path, capability: str, folder: Path) -> Engine:
    """Build a file with TensorRT-RTX. folder: for the library's name that the parser opens."""
    spec = importlib.util.find_spec("tensorrt_rtx_libs")
    assert spec is not None
    assert spec.origin is not None
    link = folder / "libtensorrt_rtx.so"
    if not link.is_symlink():
        link.symlink_to(Path(spec.origin).with_name(f"{link.name}.1"))
    search = os.pathsep.join(filter(None, [str(folder), os.environ.get("LD_LIBRARY_PATH")]))
    arguments = ["build", str(library or ""), str(file), capability]
    return Engine(**_process(arguments, {**os.environ, "LD_LIBRARY_PATH": search}))


def _process(arguments: list[str], environment: dict[str, str]) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, __file__, *arguments],
        env=environment, capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    if done.returncode != 0:
        raise RuntimeError(f"TensorRT ended with {done.returncode}: {done.stderr[-2000:]}")
    found = json.loads(done.stdout.splitlines()[-1])
    # Without a logger from TensorRT the plugin speaks there.
    found["errors"] += [line for line in done.stderr.splitlines() if line.startswith("dyt::")]
    return dict(found)


def _log(trt: Any) -> Any:
    class Log(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []
            self.layers = ""

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.ERROR:
                self.errors.append(message)
            if message.startswith("Layers:"):
                self.layers = message

    return Log()


def _registry(module: str, library: str) -> dict[str, Any]:
    import numpy as np

    trt = importlib.import_module(module)
    log = _log(trt)
    found = trt.get_plugin_registry()
    before = len(found.all_creators)
    found.load_library(library)

    def makes(creator: Any, *output_dtype: int) -> bool:
        fields = [
            trt.PluginField("output_dtype", np.array([d], np.int32), trt.PluginFieldType.INT32)
            for d in output_dtype
        ]
        collection = trt.PluginFieldCollection(fields)
        return creator.create_plugin("name", collection, trt.TensorRTPhase.RUNTIME) is not None

    ours = [creator for creator in found.all_creators if creator.plugin_namespace == "dyt"]
    creators = {
        creator.name: {
            "version": creator.plugin_version,
            "fields": [[each.name, each.type.name] for each in creator.field_names],
            "makes": {
                "nothing given": makes(creator),
                **{str(dtype): makes(creator, dtype) for dtype in (1, 3, 17)},
            },
        }
        for creator in ours
    }
    return {
        "version": trt.__version__,
        "others": len(found.all_creators) - len(ours) - before,
        "creators": creators,
        "version 2": found.get_creator("DyT", "2", "dyt") is not None,
        "errors": log.errors,
    }


def _build(library: str, file: str, capability: str) -> Engine:
    trt = importlib.import_module(RTX)
    log = _log(trt)
    if library:
        trt.get_plugin_registry().load_library(library)
    builder = trt.Builder(log)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(file):
        errors = [str(parser.get_error(place).desc()) for place in range(parser.num_errors)]
        return Engine(errors=[*errors, *log.errors])
    layers = [network.get_layer(place) for place in range(network.num_layers)]
    config = builder.create_builder_config()
    config.num_compute_capabilities = 1
    config.set_compute_capability(getattr(trt.ComputeCapability, capability), 0)
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    config.add_optimization_profile(_profile(builder, network))
    made = builder.build_serialized_network(network, config)
    return Engine(
        plugins=[
            [layer.get_output(place).dtype.name for place in range(layer.num_outputs)]
            for layer in layers
            if layer.type == trt.LayerType.PLUGIN_V3
        ],
        kernels=re.findall(r"^Name: .*?, LayerType: (\w+)", log.layers, re.MULTILINE),
        engine_bytes=0 if made is None else int(made.nbytes),
        errors=log.errors,
    )


def _profile(builder: Any, network: Any) -> Any:
    profile = builder.create_optimization_profile()
    for place in range(network.num_inputs):
        value = network.get_input(place)
        sizes = [[each if n < 0 else n for n in value.shape] for each in DYNAMIC]
        profile.set_shape(value.name, *sizes)
    return profile


def main() -> None:
    """Print what was found."""
    what, *rest = sys.argv[1:]
    found: Any = _registry(*rest) if what == "registry" else asdict(_build(*rest))
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
