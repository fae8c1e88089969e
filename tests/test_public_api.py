"""The public names, and what is imported for them."""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import TensorProto, helper

import dyt_compile

pytestmark = pytest.mark.core

OBJECTS = [name for name in dyt_compile.__all__ if name != "__version__"]


def _type_checked_names() -> set[str]:
    """What `__init__` shows to type checkers."""
    tree = ast.parse(Path(dyt_compile.__file__).read_text(encoding="utf-8"))
    blocks = [node for node in tree.body if isinstance(node, ast.If)]
    imports = [node for block in blocks for node in block.body if isinstance(node, ast.ImportFrom)]
    return {alias.asname or alias.name for node in imports for alias in node.names}


def test_all_is_sorted_and_without_repeats() -> None:
    assert sorted(set(dyt_compile.__all__)) == list(dyt_compile.__all__)


def test_all_is_what_type_checkers_see() -> None:
    assert {*_type_checked_names(), "__version__"} == set(dyt_compile.__all__)


def test_all_is_what_is_loaded_late() -> None:
    assert set(dyt_compile._HOMES) == set(OBJECTS)


@pytest.mark.parametrize("name", OBJECTS)
def test_public_name_is_the_object_of_its_module(name: str) -> None:
    found = getattr(dyt_compile, name)
    assert found.__name__ == name
    assert found.__module__.startswith("dyt_compile.")
    home = sys.modules[found.__module__]
    assert getattr(home, name) is found
    assert name in getattr(home, "__all__", ())


@pytest.mark.parametrize("name", OBJECTS)
def test_public_name_has_a_docstring(name: str) -> None:
    found = getattr(dyt_compile, name)
    text = found.__doc__
    assert text
    assert not text.startswith(f"{name}(")  # what a dataclass writes for itself
    if inspect.isclass(found):
        for member, value in vars(found).items():
            if not member.startswith("_") and (inspect.isfunction(value) or _is_wrapped(value)):
                assert value.__doc__, f"{name}.{member}"


def _is_wrapped(value: Any) -> bool:
    return isinstance(value, (property, classmethod, staticmethod))


def test_package_has_a_docstring() -> None:
    assert dyt_compile.__doc__


def test_all_public_functions_are_annotated() -> None:
    for name in OBJECTS:
        found = getattr(dyt_compile, name)
        if inspect.isfunction(found):
            signature = inspect.signature(found)
            assert signature.return_annotation is not inspect.Signature.empty
            for parameter in signature.parameters.values():
                assert parameter.annotation is not inspect.Parameter.empty, f"{name}({parameter})"


def test_star_import_gives_all() -> None:
    names: dict[str, Any] = {}
    exec("from dyt_compile import *", names)
    assert set(dyt_compile.__all__) <= set(names)


def test_dir_lists_the_public_names() -> None:
    assert dir(dyt_compile) == sorted(dyt_compile.__all__)


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = dyt_compile.nonsense
    assert not hasattr(dyt_compile, "nonsense")


def test_version_is_that_of_the_distribution() -> None:
    assert dyt_compile.__version__ == metadata.version("dyt-compile")


def test_package_is_typed() -> None:
    assert (Path(dyt_compile.__file__).parent / "py.typed").is_file()


def test_every_error_is_a_dyt_compile_error() -> None:
    from dyt_compile import errors

    for name, found in vars(errors).items():
        if not (inspect.isclass(found) and found.__module__ == errors.__name__):
            continue
        assert name in errors.__all__
        assert issubclass(found, dyt_compile.DytCompileError)
        assert found.__doc__
    assert sorted(errors.__all__) == list(errors.__all__)


@pytest.fixture(scope="module")
def onnx_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layers with a LayerNorm between them, written without torch."""
    path = tmp_path_factory.mktemp("api") / "x.onnx"
    width = 8
    rows = [float(number % 7) / 7 - 0.4 for number in range(width * width)]
    initializers = [
        helper.make_tensor("first", TensorProto.FLOAT, [width, width], rows),
        helper.make_tensor("last", TensorProto.FLOAT, [width, width], rows[::-1]),
        helper.make_tensor("gamma", TensorProto.FLOAT, [width], [1.5] * width),
        helper.make_tensor("beta", TensorProto.FLOAT, [width], [0.1] * width),
    ]
    nodes = [
        helper.make_node("MatMul", ["x", "first"], ["hidden"]),
        helper.make_node("LayerNormalization", ["hidden", "gamma", "beta"], ["normed"]),
        helper.make_node("MatMul", ["normed", "last"], ["y"]),
    ]
    ends = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", width]) for name in "xy"
    ]
    graph = helper.make_graph(nodes, "model", ends[:1], ends[1:], initializers)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.save(model, path)
    return path


def _imported(code: str, *arguments: str) -> set[str]:
    """Top-level modules that a fresh interpreter holds after the code."""
    code += "\nimport sys; print(*sorted({name.partition('.')[0] for name in sys.modules}))"
    run = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    return set(run.stdout.splitlines()[-1].split())


def test_import_alone_loads_no_framework() -> None:
    loaded = _imported("import dyt_compile; dir(dyt_compile)")
    assert "dyt_compile" in loaded
    assert not loaded & {"torch", "onnx", "onnx_ir", "onnxruntime", "numpy", "typer", "tensorrt"}


def test_inspecting_an_onnx_file_does_not_import_torch(onnx_file: Path) -> None:
    loaded = _imported(
        "import sys, dyt_compile\n"
        "found = dyt_compile.inspect(sys.argv[1])\n"
        "assert [site.kind.value for site in found.sites] == ['layer_norm'], found",
        str(onnx_file),
    )
    assert not loaded & {"torch", "tensorrt", "onnxscript", "typer"}


def test_converting_an_onnx_file_does_not_import_torch(onnx_file: Path) -> None:
    loaded = _imported(
        "import sys, dyt_compile, numpy\n"
        "x = numpy.random.default_rng(0).standard_normal((64, 8)).astype('float32')\n"
        "result = dyt_compile.convert(sys.argv[1], [(x,)], mode='all')\n"
        "assert result.report.converted == 1\n"
        "dyt_compile.convert(sys.argv[1])\n",
        str(onnx_file),
    )
    assert not loaded & {"torch", "tensorrt", "typer"}


def test_exporting_a_converted_onnx_file_does_not_import_torch(
    onnx_file: Path, tmp_path: Path
) -> None:
    loaded = _imported(
        "import sys, dyt_compile, numpy\n"
        "x = numpy.random.default_rng(0).standard_normal((64, 8)).astype('float32')\n"
        "result = dyt_compile.convert(sys.argv[1], [(x,)], mode='all')\n"
        "dyt_compile.export_onnx(result, sys.argv[2])\n",
        str(onnx_file),
        str(tmp_path / "y.onnx"),
    )
    assert not loaded & {"torch", "tensorrt", "typer"}


def test_commands_start_without_torch(onnx_file: Path) -> None:
    loaded = _imported(
        "import sys\nfrom dyt_compile.cli import main\n"
        "try: main(['inspect', sys.argv[1]])\nexcept SystemExit as end: assert not end.code",
        str(onnx_file),
    )
    assert not loaded & {"torch", "tensorrt"}
