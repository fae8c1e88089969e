"""TensorRT engines from ONNX files, with DyT as native operators or as our plugin."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir

from ..errors import OptionError
from ..files import replaced, work_folder
from ..graphs.onnx_files import load
from ..graphs.onnx_fusion import forms, fuse, unfuse
from ..graphs.onnx_shapes import infer_shapes, restore_shapes
from .engine_report import EngineReport, Network, layers_of, needs, network_of
from .engine_shapes import Profile, Shape, profile
from .engine_timing import time_engine
from .onnx import write
from .tensorrt_process import Runtime, call, installed

__all__ = [
    "LOWERINGS",
    "build_engine",
    "read_network",
]

LOWERINGS = ("native", "plugin", "auto")
TIMING_CACHE = "timing.cache"


@dataclass(frozen=True)
class _Request:
    """What is built, checked."""

    runtime: Runtime
    model: ir.Model
    onnx: Path
    profiles: Mapping[str, Profile]
    targets: tuple[str, ...]
    plugin_library: Path | None
    timing_cache: Path | None
    level: int | None


@dataclass(frozen=True)
class _Built:
    """One lowering, built in a work folder."""

    lowering: str
    engine: Path
    plugins: Mapping[str, int]
    answer: Mapping[str, Any]


def build_engine(
    onnx_path: str | Path,
    engine_path: str | Path,
    *,
    runtime: str = "tensorrt",
    shapes: Mapping[str, Shape | Sequence[Shape]] | None = None,
    lowering: str = "native",
    target: str | Sequence[str] | None = None,
    plugin_library: str | Path | None = None,
    timing_cache: str | Path | None = None,
    builder_optimization_level: int | None = None,
    layer_info: str | Path | None = None,
) -> EngineReport:
    """Build a TensorRT engine in a process of its own, and write it with what it needs to run.

    runtime: "tensorrt" (10 or 11) or "tensorrt-rtx". shapes: for every input with a dynamic axis
    its (least, usual, largest) shape, or one for all three. lowering: "native" leaves DyT to
    TensorRT's own fusion; "plugin" fuses the Add and the QuantizeLinear around every DyT into its
    node and binds our plugins, from `plugin_library`; "auto" builds both and keeps the faster,
    or the native one where there is no GPU to time them. target: compute capabilities such as
    "sm89", of TensorRT-RTX alone, which by default builds one engine for 8.0 and all later ones;
    TensorRT builds for this machine's GPU. timing_cache: read if it exists,
    and written again, of "tensorrt" alone. layer_info: a JSON file for the fused layers.

    The types are those of the file: narrow it with `export_onnx(dtype=…)`, or quantize it by
    QuantizeLinear and DequantizeLinear. Beside the engine stands `<name>.json`: library, version,
    compute capability, plugin library, shapes, and the command that loads it. All files are written
    whole or not at all.

    Raises OptionError, MissingDependencyError, CaptureError, and ExportError with what TensorRT
    refused.
    """
    target_path = Path(engine_path)
    request = _request(
        Path(onnx_path), runtime, shapes or {}, lowering, target, plugin_library, timing_cache,
        builder_optimization_level,
    )  # fmt: skip
    with ExitStack() as stack:
        # All are entered first: what cannot be written is told before the build, not after it.
        temporary = stack.enter_context(replaced(target_path))
        layers = layer_info and stack.enter_context(replaced(Path(layer_info)))
        cache = request.timing_cache and stack.enter_context(replaced(request.timing_cache))
        work = stack.enter_context(work_folder(target_path.parent))
        chosen, latency_ms, note = _choose(request, lowering, work)
        report = _report(request, chosen, target_path, latency_ms, note)
        chosen.engine.replace(temporary)
        library = request.plugin_library if chosen.lowering == "plugin" else None
        _write_json(
            temporary.with_name(f"{temporary.name}.json"),
            needs(report, request.runtime, library, request.profiles),
        )
        if layers:
            _write_json(layers, {"Layers": [asdict(layer) for layer in report.layers]})
        if cache:
            (work / TIMING_CACHE).replace(cache)
    return report


def read_network(
    onnx_path: str | Path, *, runtime: str = "tensorrt", plugin_library: str | Path | None = None
) -> Network:
    """What TensorRT's parser makes of a file, as it is. Raises ExportError where it refuses."""
    library = None if plugin_library is None else str(Path(plugin_library).absolute())
    onnx = str(Path(onnx_path).absolute())
    request = {"verb": "read", "onnx": onnx, "plugin_library": library}
    answer = call(installed(runtime), f"reading {str(onnx_path)!r}", request)
    return network_of(answer["network"])


def _request(
    path: Path,
    runtime: str,
    shapes: Mapping[str, Shape | Sequence[Shape]],
    lowering: str,
    target: str | Sequence[str] | None,
    plugin_library: str | Path | None,
    timing_cache: str | Path | None,
    level: int | None,
) -> _Request:
    if lowering not in LOWERINGS:
        raise OptionError(f"lowering is {lowering!r}; allowed: {', '.join(LOWERINGS)}")
    if lowering == "plugin" and plugin_library is None:
        raise OptionError(
            "lowering 'plugin' needs a plugin library; make one with: dyt-compile plugin build"
        )
    if lowering == "native" and plugin_library is not None:
        raise OptionError("lowering 'native' binds no plugin: leave the plugin library out")
    library = None if plugin_library is None else Path(plugin_library).absolute()
    if library is not None and not library.is_file():
        raise OptionError(f"plugin library {str(library)!r} does not exist")
    found = installed(runtime)
    targets = (target,) if isinstance(target, str) else tuple(target or ())
    if targets and not found.portable:
        raise OptionError(f"{found.title} builds for this machine's GPU: leave the target out")
    if timing_cache is not None and found.portable:
        raise OptionError(f"{found.title} has no timing cache: leave it out")
    model = load(path)
    if lowering == "plugin" and not forms(model):
        raise OptionError(
            f"{str(path)!r} has no node of dyt for a plugin: make it with dyt-compile convert"
        )
    return _Request(
        runtime=found,
        model=model,
        onnx=path.absolute(),
        profiles=profile(_input_sizes(model), shapes),
        targets=tuple(name.lower() for name in targets),
        plugin_library=library,
        timing_cache=None if timing_cache is None else Path(timing_cache).absolute(),
        level=level,
    )


def _input_sizes(model: ir.Model) -> dict[str, tuple[int | str | None, ...]]:
    given = [x for x in model.graph.inputs if str(x.name) not in model.graph.initializers]
    return {
        str(x.name): tuple(s if isinstance(s, int) else s.value for s in x.shape or ())
        for x in given
    }


def _choose(request: _Request, lowering: str, work: Path) -> tuple[_Built, dict[str, float], str]:
    """The engine to keep, the median latency of each that was timed, and what was not done."""
    if lowering != "auto":
        return _build(request, lowering, work), {}, ""
    native = _build(request, "native", work)
    if request.plugin_library is None:
        return native, {}, "native: no plugin library was given"
    if not forms(request.model):
        return native, {}, "native: the model has no node of dyt"
    plugin = _build(request, "plugin", work)
    gpu = native.answer["gpu"]
    if gpu is None or (request.targets and gpu not in request.targets):
        why = "no GPU" if gpu is None else f"this machine's GPU is {gpu}"
        return native, {}, f"native, not measured: {why}"
    latency_ms = {
        built.lowering: time_engine(
            built.engine, runtime=request.runtime.name, plugin_library=request.plugin_library
        ).median_ms
        for built in (native, plugin)
    }
    faster = min((native, plugin), key=lambda built: latency_ms[built.lowering])
    return faster, latency_ms, f"{faster.lowering}: the faster on {gpu}"


def _build(request: _Request, lowering: str, work: Path) -> _Built:
    model = request.model.clone()
    if lowering == "plugin":
        infer_shapes(model)
        plugins, changed = fuse(model), True
        restore_shapes(model)
    else:
        plugins, changed = {}, unfuse(model)
    path = request.onnx
    if changed:
        path = work / f"{lowering}.onnx"
        write(model, path)
    engine = work / f"{lowering}.plan"
    cache = request.timing_cache
    answer = call(
        request.runtime,
        f"building {request.onnx.name!r} ({lowering})",
        {
            "verb": "build",
            "onnx": str(path),
            "engine": str(engine),
            "shapes": request.profiles,
            "targets": request.targets,
            "plugin_library": str(request.plugin_library) if lowering == "plugin" else None,
            "timing_cache": None if cache is None else str(cache),
            "new_timing_cache": str(work / TIMING_CACHE),
            "level": request.level,
        },
    )
    return _Built(lowering, engine, dict(plugins), answer)


def _report(
    request: _Request, built: _Built, path: Path, latency_ms: Mapping[str, float], note: str
) -> EngineReport:
    answer = built.answer
    return EngineReport(
        path=path,
        runtime=request.runtime.name,
        version=answer["version"],
        targets=request.targets or (request.runtime.portable or answer["gpu"],),
        lowering=built.lowering,
        plugins=built.plugins,
        network=network_of(answer["network"]),
        layers=layers_of(answer["layers"]),
        bytes=answer["bytes"],
        seconds=answer["seconds"],
        latency_ms=latency_ms,
        note=note,
    )


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
