"""Sessions of ONNX Runtime: every dtype, from memory and from files, and errors in one line."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import tempfile
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import pytest

from dyt_compile import runtime
from dyt_compile.dyt import FORMS
from dyt_compile.errors import CaptureError, DataError, MissingDependencyError, OptionError
from dyt_compile.graphs import onnx_functions
from dyt_compile.runtime import Session

pytest.importorskip("onnxruntime")

pytestmark = pytest.mark.core

BFLOAT16 = ml_dtypes.bfloat16
WIDTH = 8

LINEAR = """
<ir_version: 9, opset_import: ["" : 20]>
linear ({dtype}[n,8] x, int64[n] places) => ({dtype}[n,8] y, int64[n] after) {{
    product = MatMul(x, w)
    y = Tanh(product)
    after = Add(places, places)
}}
"""


def _weights() -> npt.NDArray[np.float32]:
    values = np.random.default_rng(0).standard_normal((WIDTH, WIDTH)) / 3
    return values.astype(BFLOAT16).astype(np.float32)


def _linear(dtype: str) -> ir.Model:
    proto = onnx.parser.parse_model(LINEAR.format(dtype=dtype))
    values = _weights().astype(onnx.helper.tensor_dtype_to_np_dtype(_kind(dtype)))
    proto.graph.initializer.append(onnx.numpy_helper.from_array(values, "w"))
    return ir.serde.deserialize_model(onnx.shape_inference.infer_shapes(proto))


def _kind(dtype: str) -> int:
    names = {"float": "FLOAT", "float16": "FLOAT16", "bfloat16": "BFLOAT16"}
    return int(getattr(onnx.TensorProto, names[dtype]))


def _input() -> npt.NDArray[np.generic]:
    return np.random.default_rng(1).standard_normal((5, WIDTH)).astype(BFLOAT16)


PLACES = np.arange(5)


def test_arrays_go_in_and_out_in_the_order_of_the_model() -> None:
    session = Session(_linear("float"))
    assert session.inputs == ["x", "places"]
    assert session.outputs == ["y", "after"]
    x = np.ones((5, WIDTH), np.float32)
    y, after = session.run([x, PLACES])
    np.testing.assert_allclose(y, np.tanh(x @ _weights()), rtol=1e-5)
    np.testing.assert_array_equal(after, 2 * PLACES)
    assert after.dtype == np.int64


@pytest.mark.parametrize("place", ["memory", "file"])
def test_bfloat16_goes_in_and_out(tmp_path: Path, place: str) -> None:
    model = _linear("bfloat16")
    if place == "file":
        ir.save(model, tmp_path / "model.onnx")
    session = Session(model if place == "memory" else tmp_path / "model.onnx")
    x = _input()
    y, after = session.run([x, PLACES])
    product = (x.astype(np.float32) @ _weights()).astype(BFLOAT16)
    assert y.dtype == BFLOAT16
    np.testing.assert_array_equal(y, np.tanh(product.astype(np.float32)).astype(BFLOAT16))
    np.testing.assert_array_equal(after, 2 * PLACES)


def test_bfloat16_keeps_values_beyond_float16() -> None:
    proto = onnx.parser.parse_model(
        '<ir_version: 9, opset_import: ["" : 20]>'
        "far (bfloat16[n] x) => (bfloat16[n] y) { y = Mul(x, x) }"
    )
    x = np.array([1e18, -3.0, 1e-18], BFLOAT16)
    (y,) = Session(ir.serde.deserialize_model(proto)).run([x])
    np.testing.assert_allclose(y.astype(np.float64), x.astype(np.float64) ** 2, rtol=2**-8)


def test_bfloat16_needs_no_torch(tmp_path: Path) -> None:
    ir.save(_linear("bfloat16"), tmp_path / "model.onnx")
    code = (
        "import sys, pathlib, ml_dtypes, numpy as np\n"
        "from dyt_compile.runtime import Session\n"
        f"session = Session(pathlib.Path({str(tmp_path / 'model.onnx')!r}))\n"
        "x = np.ones((2, 8), ml_dtypes.bfloat16)\n"
        "y, _ = session.run([x, np.arange(2)])\n"
        "assert y.dtype == ml_dtypes.bfloat16\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_float16_goes_in_and_out() -> None:
    x = _input()
    y, _ = Session(_linear("float16")).run([x.astype(np.float16), PLACES])
    assert y.dtype == np.float16
    expected = np.tanh(x.astype(np.float32) @ _weights())
    np.testing.assert_allclose(y.astype(np.float32), expected, atol=2e-3)


@pytest.mark.parametrize("dtype", ["float", "bfloat16"])
def test_session_leaves_the_model_alone(dtype: str) -> None:
    model = _linear(dtype)
    before = ir.serde.serialize_model(model.clone(deep_copy=True)).SerializeToString()
    Session(model.clone()).run([_input().astype(_numpy(dtype)), PLACES])
    assert ir.serde.serialize_model(model).SerializeToString() == before


def _numpy(dtype: str) -> npt.DTypeLike:
    return np.float32 if dtype == "float" else BFLOAT16


@pytest.mark.parametrize("dtype", ["float", "bfloat16"])
def test_weights_may_lie_in_another_file(tmp_path: Path, dtype: str) -> None:
    ir.save(
        _linear(dtype), tmp_path / "model.onnx", external_data="model.data",
        size_threshold_bytes=0,
    )  # fmt: skip
    assert (tmp_path / "model.data").exists()
    x = _input()
    y, _ = Session(tmp_path / "model.onnx").run([x.astype(_numpy(dtype)), PLACES])
    expected = np.tanh(x.astype(np.float32) @ _weights())
    np.testing.assert_allclose(y.astype(np.float32), expected, atol=2e-2)


@pytest.mark.parametrize("dtype", ["float", "bfloat16"])
def test_loaded_model_may_have_its_weights_in_another_file(tmp_path: Path, dtype: str) -> None:
    ir.save(
        _linear(dtype), tmp_path / "model.onnx", external_data="model.data",
        size_threshold_bytes=0,
    )  # fmt: skip
    x = _input()
    y, _ = Session(ir.load(tmp_path / "model.onnx")).run([x.astype(_numpy(dtype)), PLACES])
    expected = np.tanh(x.astype(np.float32) @ _weights())
    np.testing.assert_allclose(y.astype(np.float32), expected, atol=2e-2)


@pytest.mark.parametrize("dtype", ["float", "bfloat16"])
def test_model_too_large_for_protobuf_runs_from_a_file_that_vanishes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    monkeypatch.setattr(runtime, "EMBEDDED_BYTES", 10)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    x = _input()
    y, _ = Session(_linear(dtype)).run([x.astype(_numpy(dtype)), PLACES])
    assert not list(tmp_path.iterdir())
    expected = np.tanh(x.astype(np.float32) @ _weights())
    np.testing.assert_allclose(y.astype(np.float32), expected, atol=2e-2)


def test_bfloat16_inside_a_branch_runs() -> None:
    proto = onnx.parser.parse_model(
        """
        <ir_version: 9, opset_import: ["" : 20]>
        branches (float[n] x, bool flag) => (float[n] y) {
            y = If(flag) <
                then_branch = one () => (float[n] a) {
                    narrow = Cast<to = 16>(x)
                    root = Sqrt(narrow)
                    a = Cast<to = 1>(root)
                },
                else_branch = other () => (float[n] b) { b = Identity(x) }
            >
        }
        """
    )
    model = ir.serde.deserialize_model(onnx.shape_inference.infer_shapes(proto))
    x = np.array([1.0, 4.0, 9.0], np.float32)
    (y,) = Session(model).run([x, np.array(True)])
    np.testing.assert_allclose(y, [1, 2, 3])


def test_unknown_provider_is_refused() -> None:
    with pytest.raises(OptionError, match=r"^provider is 'tpu'; allowed: cpu, cuda, tensorrt$"):
        Session(_linear("float"), "tpu")


def test_provider_that_is_not_installed_is_named() -> None:
    import onnxruntime

    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this ONNX Runtime has CUDA")
    with pytest.raises(OptionError, match=r"'cuda' is not in this ONNX Runtime.*dyt-compile\[gpu"):
        Session(_linear("float"), "cuda")


def test_missing_onnxruntime_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match=r"'onnxruntime'.*dyt-compile\[cpu\]"):
        Session(_linear("float"))


def test_model_that_onnxruntime_does_not_take_is_refused() -> None:
    model = _linear("float")
    model.graph[0].op_type = "NoSuchOperator"
    with pytest.raises(CaptureError, match="NoSuchOperator") as raised:
        Session(model)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "x",
    [
        np.ones((5, WIDTH + 1), np.float32),
        np.ones((5, WIDTH), np.float64),
        np.ones((WIDTH,), np.float32),
    ],
    ids=["width", "dtype", "rank"],
)
def test_batch_that_does_not_fit_is_refused(x: npt.NDArray[np.float32]) -> None:
    session = Session(_linear("float"))
    with pytest.raises(DataError, match="the model cannot run on a batch: ") as raised:
        session.run([x, PLACES])
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("provider", "expected"),
    [
        ("tpu", r"^provider is 'tpu'; allowed: cpu, cuda, tensorrt$"),
        ("cpu:lib.so", r"^provider is 'cpu:lib.so'; a library follows 'tensorrt:' alone$"),
        ("tensorrt:nix.so", r"^provider is 'tensorrt:nix.so'; its plugin library does not exist$"),
    ],
)
def test_provider_that_is_none_is_named(provider: str, expected: str) -> None:
    with pytest.raises(OptionError, match=expected):
        runtime.parse_provider(provider)


def test_provider_options_hold_the_plugin_library_for_tensorrt_alone(tmp_path: Path) -> None:
    library = tmp_path / "libdyt_plugin.so"
    library.touch()
    assert runtime.parse_provider(f"tensorrt:{library}") == ("tensorrt", library)
    assert runtime.parse_provider("cuda") == ("cuda", None)
    names = runtime.PROVIDERS["tensorrt"]
    options = [runtime.provider_options(name, library) for name in names]
    assert options == [{"trt_extra_plugin_lib_paths": str(library)}, {"use_tf32": "0"}, {}]
    assert runtime.provider_options(names[0], None) == {}


def test_session_options_are_taken_by_a_provider_that_is_there() -> None:
    import onnxruntime

    session = Session(_linear("float"))._session
    assert isinstance(session, onnxruntime.InferenceSession)
    assert session.get_providers() == ["CPUExecutionProvider"]


@pytest.mark.parametrize("taken", [True, False])
def test_library_is_put_into_tensorrts_registry(
    taken: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[str] = []

    def load_library(path: str) -> object | None:
        loaded.append(path)
        return object() if taken else None

    stub = ModuleType("tensorrt")
    stub.__spec__ = ModuleSpec("tensorrt", None)
    stub.get_plugin_registry = lambda: SimpleNamespace(load_library=load_library)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "tensorrt", stub)
    library = tmp_path / "lib.so"
    if taken:
        runtime.register(library)
    else:
        with pytest.raises(CaptureError, match=r"does not take '.*lib\.so' as a library"):
            runtime.register(library)
    assert loaded == [str(library)]


def test_dyt_becomes_a_plugin_of_the_tensorrt_provider() -> None:
    x = ir.Value(name="x", shape=ir.Shape([2, 3]), type=ir.TensorType(ir.DataType.FLOAT))
    alpha = ir.Value(name="alpha", const_value=ir.tensor(np.ones(1, np.float32), name="alpha"))
    node = onnx_functions.call(FORMS["DyTBare"], [x, alpha], "y")
    graph = ir.Graph(
        [x], node.outputs, nodes=[node], initializers=[alpha], opset_imports={"": 20}, name="one"
    )
    model = ir.Model(graph, ir_version=9)
    onnx_functions.declare(model)
    runtime.as_plugins(model)
    (called,) = model.graph
    assert (called.domain, called.op_type) == ("trt.plugins", "DyTBare")
    assert called.attributes["plugin_namespace"].as_string() == "dyt"
    assert not model.functions
    assert model.opset_imports == {"": 20, "trt.plugins": 1}


@pytest.mark.gpu
@pytest.mark.parametrize("provider", ["cuda", "tensorrt"])
def test_provider_on_a_gpu_computes_what_the_cpu_computes(provider: str) -> None:
    import onnxruntime

    if runtime.PROVIDERS[provider][0] not in onnxruntime.get_available_providers():
        pytest.skip(f"this ONNX Runtime has no {provider} provider")
    expected, _ = Session(_linear("float")).run([_input(), PLACES])
    found, _ = Session(_linear("float"), provider).run([_input(), PLACES])
    np.testing.assert_allclose(found, expected, atol=1e-5)
