"""build_engine and its command: what they refuse, what they write, what an abort leaves."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest

import dyt_compile
from dyt_compile import build_engine
from dyt_compile.errors import CaptureError, ExportError, MissingDependencyError, OptionError
from dyt_compile.exporters import tensorrt, tensorrt_process, tensorrt_worker
from dyt_compile.exporters.engine_shapes import combine, parse_shapes, profile, spelled
from dyt_compile.exporters.engine_timing import time_engine
from dyt_compile.exporters.tensorrt_process import RUNTIMES

from ..cli.test_commands import failure, run

RTX = "tensorrt-rtx"
WIDTH = 16
SHAPES = {"x": ((1, WIDTH), (8, WIDTH), (16, WIDTH))}

has_rtx = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None, reason="tensorrt-rtx is not installed"
)

MODEL = f"""
<ir_version: 9, opset_import: ["" : 20, "dyt" : 1]>
one (float[batch,{WIDTH}] x) => (float[batch,{WIDTH}] y) {{
    y = dyt.DyTBare<plugin_namespace = "dyt", plugin_version = "1">(x, alpha)
}}
<domain: "dyt", opset_import: ["" : 20]>
DyTBare<plugin_namespace, plugin_version>(x, alpha) => (y) {{
    scaled = Mul(x, alpha)
    y = Tanh(scaled)
}}
"""


def _write(path: Path, text: str = MODEL) -> Path:
    model = onnx.parser.parse_model(text)
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.ones(1, np.float32), "alpha"))
    onnx.save(model, path)
    return path


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A file with one DyT."""
    return _write(tmp_path / "model.onnx")


# Shapes.


def test_shapes_are_spelled_as_trtexec_spells_them() -> None:
    parsed = parse_shapes("input:1x3x224x224,a:b:7", "--minShapes")
    assert parsed == {"input": (1, 3, 224, 224), "a:b": (7,)}
    assert spelled(parsed) == "input:1x3x224x224,a:b:7"
    assert parse_shapes("", "--minShapes") == {}


@pytest.mark.parametrize("text", ["input", "input:", ":1x2", "input:1xtwo", "input:-1x2", "x:1,y"])
def test_shapes_of_another_spelling_are_refused(text: str) -> None:
    with pytest.raises(OptionError, match=r"^--optShapes has .*; allowed: name:1x3x224x224"):
        parse_shapes(text, "--optShapes")


def test_shapes_that_are_left_out_are_those_that_are_given() -> None:
    one, two, three = {"x": (1,)}, {"x": (2,)}, {"x": (3,)}
    assert combine(one, two, three) == {"x": ((1,), (2,), (3,))}
    assert combine({}, two, {}) == {"x": ((2,), (2,), (2,))}
    assert combine(one, {}, three) == {"x": ((1,), (3,), (3,))}
    assert combine(one, two, {}) == {"x": ((1,), (2,), (2,))}
    assert combine({}, {}, {}) == {}


def test_profile_holds_dynamic_inputs_and_what_is_given() -> None:
    inputs: dict[str, Any] = {"x": ("batch", 3), "fixed": (2, 2)}
    assert profile(inputs, {"x": (4, 3)}) == {"x": ((4, 3), (4, 3), (4, 3))}
    shapes = {"x": [[1, 3], [2, 3], [4, 3]]}
    assert profile(inputs, shapes) == {"x": ((1, 3), (2, 3), (4, 3))}


@pytest.mark.parametrize(
    ("shapes", "expected"),
    [
        ({}, r"^input 'x' is dynamic in axis 0 \(batch\), 2 and has no shapes; .* x:1x3x1$"),
        ({"z": (1, 3, 1)}, r"^shapes are given for 'z'; the inputs: x$"),
        ({"x": (1, 4, 1)}, r"^shape x:1x4x1 does not fit the input's batchx3x\?$"),
        ({"x": (1, 3)}, r"^shape x:1x3 does not fit"),
        ({"x": ((2, 3, 1), (1, 3, 1), (4, 3, 1))}, r"must not shrink .*x:2x3x1 > x:1x3x1$"),
        ({"x": ((1, 3, 1), (4, 3, 1))}, r"allowed: one shape, or least, usual and largest$"),
    ],
)
def test_profile_that_does_not_fit_is_named(shapes: Any, expected: str) -> None:
    with pytest.raises(OptionError, match=expected):
        profile({"x": ("batch", 3, None)}, shapes)


# What is refused before TensorRT begins.


@has_rtx
@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"runtime": "trt"}, r"^runtime is 'trt'; allowed: tensorrt, tensorrt-rtx$"),
        ({"lowering": "fast"}, r"^lowering is 'fast'; allowed: native, plugin, auto$"),
        ({"lowering": "plugin"}, r"^lowering 'plugin' needs a plugin library; make one with: dyt-"),
        ({"plugin_library": "x.so"}, r"^lowering 'native' binds no plugin"),
        (
            {"lowering": "auto", "plugin_library": "x.so"},
            r"^plugin library '.*x.so' does not exist",
        ),
        ({"timing_cache": "t.cache"}, r"^TensorRT-RTX has no timing cache"),
        ({"shapes": {}}, r"^input 'x' is dynamic in axis 0 \(batch\)"),
    ],
)
def test_option_that_is_not_allowed_is_named(
    model: Path, tmp_path: Path, options: dict[str, Any], expected: str
) -> None:
    given = {"runtime": RTX, "shapes": SHAPES, **options}
    with pytest.raises(OptionError, match=expected):
        build_engine(model, tmp_path / "model.plan", **given)
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]


@has_rtx
def test_plugin_lowering_needs_a_dyt(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    text = f'<ir_version: 9, opset_import: ["" : 20]> g (float[{WIDTH}] x) => (float[{WIDTH}] y)'
    onnx.save(onnx.parser.parse_model(text + "{ y = Tanh(x) }"), path)
    library = tmp_path / "lib.so"
    library.touch()
    with pytest.raises(OptionError, match=r"has no node of dyt .* dyt-compile convert$"):
        build_engine(path, tmp_path / "p", runtime=RTX, lowering="plugin", plugin_library=library)


@has_rtx
def test_file_that_is_no_model_is_named(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"no model")
    with pytest.raises(CaptureError, match=r"model.onnx' is no ONNX model"):
        build_engine(tmp_path / "model.onnx", tmp_path / "model.plan", runtime=RTX)


@pytest.mark.parametrize(
    ("runtime", "expected"),
    [
        ("tensorrt", r"^'tensorrt' is not installed.*dyt-compile\[gpu\]"),
        (RTX, r"^'tensorrt_rtx' is not installed.*dyt-compile\[rtx\]"),
    ],
)
def test_runtime_that_is_not_installed_is_named(
    model: Path, monkeypatch: pytest.MonkeyPatch, runtime: str, expected: str
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match=expected):
        build_engine(model, model.with_name("model.plan"), runtime=runtime, shapes=SHAPES)


def test_target_is_of_tensorrt_rtx_alone(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensorrt, "installed", RUNTIMES.__getitem__)
    with pytest.raises(OptionError, match=r"^TensorRT builds for this machine's GPU"):
        build_engine(model, model.with_name("model.plan"), shapes=SHAPES, target="sm90")


# What TensorRT refuses.


@has_rtx
def test_target_that_does_not_exist_is_named(model: Path, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"target is 'sm90'; allowed: sm120, sm121, sm75, sm80"):
        build_engine(model, tmp_path / "p", runtime=RTX, shapes=SHAPES, target="SM90")
    assert not (tmp_path / "p").exists()


FP8 = f"""
<ir_version: 10, opset_import: ["" : 21]>
g (float16[{WIDTH},{WIDTH}] x) => (float16[{WIDTH},{WIDTH}] y) {{
    scale = Constant<value = float16 {{1}}>()
    q = QuantizeLinear<output_dtype = 17>(x, scale)
    d = DequantizeLinear(q, scale)
    y = MatMul(d, d)
}}
"""


@has_rtx
def test_fp8_is_refused_for_ampere_and_built_for_ada(tmp_path: Path) -> None:
    model = onnx.parser.parse_model(FP8)
    onnx.save(model, tmp_path / "model.onnx")
    with pytest.raises(ExportError, match=r"(?i)cannot build the engine: .*fp8"):
        build_engine(tmp_path / "model.onnx", tmp_path / "p", runtime=RTX, target="sm80")
    assert build_engine(tmp_path / "model.onnx", tmp_path / "p", runtime=RTX, target="sm89").layers


@has_rtx
def test_profile_that_the_network_refuses_is_named(tmp_path: Path) -> None:
    text = MODEL.replace("(float[batch,16] y)", "(float[any,other] y)").replace(
        "y = dyt.DyTBare", "rows = Constant<value_ints = [4, 16]>()\n z = Reshape(x, rows)\n"
        " y = dyt.DyTBare"
    ).replace("(x, alpha)\n}", "(z, alpha)\n}", 1)  # fmt: skip
    path = _write(tmp_path / "model.onnx", text)
    with pytest.raises(ExportError, match=r"(?i)cannot (build|parse).*reshape"):
        build_engine(path, tmp_path / "p", runtime=RTX, shapes={"x": (5, WIDTH)}, target="sm89")
    assert not (tmp_path / "p").exists()


@has_rtx
def test_abort_inside_tensorrt_is_one_error(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = "import os, sys\nsys.stderr.write('last words\\n'); sys.stderr.flush(); os.abort()"
    (tmp_path / "ending.py").write_text(code)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(tensorrt_process, "WORKER", "ending")
    expected = r"^TensorRT-RTX ended while building 'model.onnx' \(native\): signal 6, last words$"
    with pytest.raises(ExportError, match=expected):
        build_engine(model, tmp_path / "p", runtime=RTX, shapes=SHAPES, target="sm89")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ending.py", "model.onnx"]


def test_worker_ends_when_its_parent_does() -> None:
    code = (
        "import time; from dyt_compile.exporters.tensorrt_worker import watch_parent; "
        "watch_parent(); print('works', flush=True); time.sleep(60)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as worker:
        assert worker.stdin is not None
        assert worker.stdout is not None
        assert worker.stdout.readline() == b"works\n"
        assert worker.poll() is None
        worker.stdin.close()
        assert worker.wait(timeout=30) == 1


# What is written.


@has_rtx
def test_engine_stands_with_what_it_needs(model: Path, tmp_path: Path) -> None:
    report = build_engine(
        model, tmp_path / "model.plan", runtime=RTX, shapes=SHAPES, target=["sm89", "sm120"],
        layer_info=tmp_path / "layers.json", builder_optimization_level=2,
    )  # fmt: skip
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["layers.json", "model.onnx", "model.plan", "model.plan.json"]
    needs = json.loads((tmp_path / "model.plan.json").read_text())
    version = report.version
    assert needs == {
        "engine": "model.plan",
        "bytes": (tmp_path / "model.plan").stat().st_size,
        "runtime": RTX,
        "library": f"libtensorrt_rtx.so.{version[0]}",
        "version": version,
        "compute_capabilities": ["8.9", "12.0"],
        "lowering": "native",
        "plugin_library": None,
        "plugins": {},
        "inputs": [{"name": "x", "dtype": "float", "shape": [-1, WIDTH]}],
        "outputs": [{"name": "y", "dtype": "float", "shape": [-1, WIDTH]}],
        "shapes": {"x": {"min": [1, WIDTH], "opt": [8, WIDTH], "max": [16, WIDTH]}},
        "load": f"tensorrt_rtx --loadEngine=model.plan --shapes=x:8x{WIDTH}",
    }
    layers = json.loads((tmp_path / "layers.json").read_text())["Layers"]
    assert [layer["name"] for layer in layers] == [layer.name for layer in report.layers]
    (kernel,) = [layer for layer in report.layers if layer.is_kernel]
    assert "Tanh" in kernel.name
    assert (kernel.inputs[0].name, kernel.outputs[0].name) == ("x", "y")
    assert json.loads(json.dumps(report.to_dict()))["kernels"] == report.kernels == 1


@has_rtx
def test_engine_without_a_target_is_portable(model: Path, tmp_path: Path) -> None:
    report = build_engine(model, tmp_path / "p", runtime=RTX, shapes=SHAPES)
    assert report.targets == ("sm80+",)
    assert json.loads((tmp_path / "p.json").read_text())["compute_capabilities"] == ["8.0+"]


@has_rtx
def test_failed_build_leaves_the_old_engine(model: Path, tmp_path: Path) -> None:
    for name in ("p", "p.json"):
        (tmp_path / name).write_text("old")
    with pytest.raises(ExportError):
        build_engine(model, tmp_path / "p", runtime=RTX, shapes=SHAPES, target="sm10")
    assert [(tmp_path / name).read_text() for name in ("p", "p.json")] == ["old", "old"]


@has_rtx
def test_folder_of_the_layers_is_missed_before_the_build(model: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ExportError, match=r"^cannot write '.*nix/layers.json': its folder does not"
    ):
        build_engine(
            model,
            tmp_path / "p",
            runtime=RTX,
            shapes=SHAPES,
            layer_info=tmp_path / "nix/layers.json",
        )
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]


@has_rtx
def test_auto_without_a_library_is_native_and_says_so(model: Path, tmp_path: Path) -> None:
    report = build_engine(
        model, tmp_path / "p", runtime=RTX, shapes=SHAPES, lowering="auto", target="sm89"
    )
    assert (report.lowering, report.latency_ms) == ("native", {})
    assert report.note == "native: no plugin library was given"


@has_rtx
def test_timing_without_a_gpu_is_refused(model: Path, tmp_path: Path) -> None:
    if tensorrt_worker.capability() is not None:
        pytest.skip("this machine has a GPU")
    build_engine(model, tmp_path / "p", runtime=RTX, shapes=SHAPES, target="sm89")
    with pytest.raises(ExportError, match=r"no GPU: an engine cannot be timed$"):
        time_engine(tmp_path / "p", runtime=RTX)


# The command.


@has_rtx
def test_build_writes_an_engine(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--runtime", RTX, "--target", "sm89", "--exportLayerInfo", tmp_path / "l.json"]
    shapes = [f"--minShapes=x:1x{WIDTH}", f"--optShapes=x:4x{WIDTH}", f"--maxShapes=x:8x{WIDTH}"]
    assert run("build", model, "-o", tmp_path / "p", *options, *shapes) == 0
    printed = capsys.readouterr().out
    assert printed.startswith(f"wrote {tmp_path / 'p'}: ")
    assert printed.rstrip().endswith("sm89, native, 1 kernels")
    assert (tmp_path / "l.json").exists()
    needs = json.loads((tmp_path / "p.json").read_text())
    assert needs["shapes"] == {"x": {"min": [1, 16], "opt": [4, 16], "max": [8, 16]}}


@has_rtx
@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ([], "OptionError: input 'x' is dynamic in axis 0 (batch) and has no shapes; give --min"),
        (["--minShapes=x"], "OptionError: --minShapes has 'x'; allowed: "),
        (["--lowering", "plugin"], "OptionError: lowering 'plugin' needs a plugin library"),
        (["--lowering", "fast"], "BadParameter"),
        (["--builderOptimizationLevel", "9"], "BadParameter"),
    ],
)
def test_build_names_what_is_wrong(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str],
    expected: str,
) -> None:  # fmt: skip
    line = failure(capsys, "build", model, "-o", tmp_path / "p", "--runtime", RTX, *options)
    assert line.startswith(expected)
    assert not (tmp_path / "p").exists()


# TensorRT 10 and 11, whose builders need a GPU: what is chosen by version.


def test_networks_are_strongly_typed_in_tensorrt_10_and_11() -> None:
    ten = SimpleNamespace(EXPLICIT_BATCH=0, STRONGLY_TYPED=1)
    eleven = SimpleNamespace()
    assert tensorrt_worker.network_flags(ten) == 1 << 1
    assert tensorrt_worker.network_flags(eleven) == 0


@pytest.mark.parametrize("runtime", RUNTIMES.values(), ids=RUNTIMES)
def test_library_is_that_of_the_major_version(runtime: tensorrt_process.Runtime) -> None:
    from dyt_compile.exporters.engine_report import EngineReport, Network, needs

    for version, number in (("10.14.1.48", "10"), ("11.4.0", "11")):
        report = EngineReport(
            Path("m.plan"), runtime.name, version, ("sm90",), "plugin", {"DyT": 2},
            Network((), (), {}), (), 5, 1.0,
        )  # fmt: skip
        told = needs(
            report, runtime, Path("/somewhere/libdyt_plugin.so"), {"x": ((1,), (2,), (3,))}
        )
        assert told["library"] == f"{runtime.library}.{number}"
        assert told["compute_capabilities"] == ["9.0"]
        assert told["plugin_library"] == "libdyt_plugin.so"
        assert told["load"] == (
            f"{runtime.program} --loadEngine=m.plan --shapes=x:2 --dynamicPlugins=libdyt_plugin.so"
        )


def test_layers_are_read_from_the_inspector_of_tensorrt() -> None:
    tensor = {"Name": "x", "Location": "Device", "Dimensions": [8, 16]}
    layers = [
        {
            "Name": "__myl_MulTanh", "LayerType": "kgen", "Metadata": "[ONNX Layer: node_y]",
            "Inputs": [{**tensor, "Format/Datatype": "Half"}],
            "Outputs": [{**tensor, "Datatype": "Half"}],
        },
        "a name alone, where the verbosity was low",
    ]  # fmt: skip
    inspector = SimpleNamespace(get_engine_information=lambda form: json.dumps({"Layers": layers}))
    engine = SimpleNamespace(create_engine_inspector=lambda: inspector)
    module = SimpleNamespace(
        Runtime=lambda log: SimpleNamespace(deserialize_cuda_engine=lambda plan: engine),
        LayerInformationFormat=SimpleNamespace(JSON=1),
    )
    tensor_read = {"name": "x", "dtype": "half", "shape": [8, 16]}
    assert tensorrt_worker._inspected(module, None, b"") == [
        {
            "name": "__myl_MulTanh", "type": "kgen", "sources": ["node_y"],
            "inputs": [tensor_read], "outputs": [tensor_read],
        }
    ]  # fmt: skip


def test_timing_cache_is_read_and_refused_if_it_is_of_another(tmp_path: Path) -> None:
    given: list[bytes] = []

    class Config:
        fits = True

        def create_timing_cache(self, data: bytes) -> object:
            given.append(data)
            return object()

        def set_timing_cache(self, cache: object, ignore_mismatch: bool) -> bool:
            assert not ignore_mismatch
            return self.fits

    path = tmp_path / "t.cache"
    assert tensorrt_worker._set_timing_cache(Config(), None) is None
    assert tensorrt_worker._set_timing_cache(Config(), str(path)) is not None
    path.write_bytes(b"known")
    assert tensorrt_worker._set_timing_cache(Config(), str(path)) is not None
    assert given == [b"", b"known"]
    Config.fits = False
    with pytest.raises(tensorrt_worker.FailedError, match="of another device or TensorRT"):
        tensorrt_worker._set_timing_cache(Config(), str(path))


@pytest.mark.gpu
@pytest.mark.parametrize("runtime", RUNTIMES)
def test_engine_on_a_gpu_is_built_loaded_and_timed(
    model: Path, tmp_path: Path, runtime: str
) -> None:
    pytest.importorskip(RUNTIMES[runtime].module)
    cache = tmp_path / "t.cache" if runtime == "tensorrt" else None
    report = build_engine(model, tmp_path / "p", runtime=runtime, shapes=SHAPES, timing_cache=cache)
    assert report.layers
    assert cache is None or cache.stat().st_size > 0
    timing = time_engine(tmp_path / "p", runtime=runtime, passes=20)
    assert len(timing.milliseconds) == 20
    assert 0 < min(timing.milliseconds) <= timing.median_ms


def test_public_names_are_there() -> None:
    assert dyt_compile.build_engine is build_engine
    assert sys.modules["dyt_compile.exporters.tensorrt"] is tensorrt
