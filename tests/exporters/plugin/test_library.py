"""The library that nvcc makes: what it exports, links and holds, and registries that load it."""

from __future__ import annotations

import importlib.util
import re
import subprocess
from pathlib import Path

import pytest

from dyt_compile import DytCompileError, build_plugin, plugin_info
from dyt_compile.dyt import DOMAIN, VERSION
from dyt_compile.errors import ExportError, OptionError
from dyt_compile.exporters.plugin.build import ARCHITECTURES, SOURCES, PluginInfo

from .reference import OPERATORS
from .registries import LEAN, RTX, registry


def _installed(module: str) -> pytest.MarkDecorator:
    missing = importlib.util.find_spec(module) is None
    return pytest.mark.skipif(missing, reason=f"{module} is not installed")


REGISTRIES = [pytest.param(name, marks=_installed(name)) for name in (LEAN, RTX)]


def test_library_holds_every_operator_with_its_inputs(plugin: PluginInfo) -> None:
    assert plugin.inputs == {operator.name: operator.inputs for operator in OPERATORS}
    assert (plugin.namespace, plugin.version) == (DOMAIN, str(VERSION))


def test_library_says_what_it_was_built_for(plugin: PluginInfo) -> None:
    assert plugin.architectures == ARCHITECTURES
    assert plugin.tensorrt == "10.14"
    assert re.fullmatch(r"1[2-9]\.\d+", plugin.cuda)
    assert plugin.bytes == plugin.path.stat().st_size


def test_library_links_neither_tensorrt_nor_cuda(plugin: PluginInfo) -> None:
    shown = subprocess.run(
        ["readelf", "-d", plugin.path], capture_output=True, text=True, check=True
    ).stdout
    needed = re.findall(r"NEEDED.*\[(.+)\]", shown)
    assert "libc.so.6" in needed
    assert not [name for name in needed if "nvinfer" in name or "cuda" in name]


def test_library_exports_what_tensorrt_asks_for(plugin: PluginInfo) -> None:
    shown = subprocess.run(
        ["nm", "-D", "--defined-only", plugin.path], capture_output=True, text=True, check=True
    ).stdout
    exported = {line.split()[-1] for line in shown.splitlines() if " T " in line}
    assert exported == {"getCreators", "setLoggerFinder", "dyt_plugin_info"}


@pytest.mark.parametrize("module", REGISTRIES)
def test_registry_loads_the_library_and_makes_run_time_plugins(
    plugin: PluginInfo, module: str
) -> None:
    found = registry(module, plugin.path)
    assert found["version"].startswith("11." if module == LEAN else "1.")
    assert found["creators"].keys() == plugin.inputs.keys()
    assert found["others"] == 0
    assert not found["version 2"]
    for operator in OPERATORS:
        creator = found["creators"][operator.name]
        quantize = operator.quantized
        assert creator["version"] == "1"
        assert creator["fields"] == ([["output_dtype", "INT32"]] if quantize else [])
        assert creator["makes"] == {
            "nothing given": not quantize, "1": not quantize, "3": True, "17": True
        }  # fmt: skip
    assert len(found["told"]) == 2 * sum(operator.quantized for operator in OPERATORS)
    refused = "dyt::DerfQuantize: output_dtype is 0; allowed: 3 (INT8) and 17 (FLOAT8E4M3FN)"
    assert any(line.startswith(refused) for line in found["told"])


def test_missing_compiler_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("shutil.which", lambda *_, **__: None)
    with pytest.raises(ExportError, match=r"nvcc is not found on PATH.*install the CUDA toolkit"):
        build_plugin(tmp_path / "x.so", tensorrt_root=tmp_path)


def test_missing_headers_are_named(nvcc: Path, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"NvInferRuntime.h.*set TENSORRT_ROOT to an unpacked"):
        build_plugin(tmp_path / "x.so", tensorrt_root=tmp_path)


def test_headers_are_found_below_tensorrt_root(
    nvcc: Path, headers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "include").symlink_to(headers)
    monkeypatch.setenv("TENSORRT_ROOT", str(tmp_path))
    with pytest.raises(OptionError):  # the headers are there: the next check speaks
        build_plugin(tmp_path / "x.so", arch=[])


def test_headers_that_are_too_old_are_named(nvcc: Path, tmp_path: Path) -> None:
    (tmp_path / "NvInferRuntime.h").touch()
    (tmp_path / "NvInferVersion.h").write_text(
        "#define NV_TENSORRT_MAJOR 8\n#define NV_TENSORRT_MINOR 6\n"
    )
    with pytest.raises(ExportError, match=r"are of TensorRT 8.6; the plugin needs 10.0 or newer"):
        build_plugin(tmp_path / "x.so", tensorrt_root=tmp_path)


@pytest.mark.parametrize("arch", [[75], [90, 91], []])
def test_unknown_architecture_is_named(
    nvcc: Path, headers: Path, tmp_path: Path, arch: list[int]
) -> None:
    unknown = ", ".join(str(each) for each in arch if each != 90) or "empty"
    with pytest.raises(OptionError, match=f"arch is {unknown}; this nvcc knows: 80, .*120"):
        build_plugin(tmp_path / "x.so", arch=arch, tensorrt_root=headers)


def test_failed_compilation_shows_its_last_lines_and_keeps_the_old_file(
    nvcc: Path, tmp_path: Path
) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "NvInferRuntime.h").write_text("#error this is no TensorRT\n")
    (broken / "NvInferVersion.h").write_text("#define NV_TENSORRT_MAJOR 10\n")
    target = tmp_path / "libdyt_plugin.so"
    target.write_text("old")
    with pytest.raises(ExportError, match=r"nvcc ended with \d+: .*this is no TensorRT"):
        build_plugin(target, arch=[90], tensorrt_root=broken)
    assert target.read_text() == "old"
    assert sorted(tmp_path.iterdir()) == [broken, target]


def test_output_that_cannot_be_written_is_named(nvcc: Path, headers: Path, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="its folder does not exist"):
        build_plugin(tmp_path / "none" / "x.so", tensorrt_root=headers)


def test_file_that_is_no_plugin_is_refused(tmp_path: Path, nvcc: Path) -> None:
    with pytest.raises(ExportError, match="is no file; make one with: dyt-compile plugin build"):
        plugin_info(tmp_path / "none.so")
    (tmp_path / "text.so").write_text("text")
    with pytest.raises(ExportError, match="is no DyT plugin library"):
        plugin_info(tmp_path / "text.so")
    subprocess.run(
        ["gcc", "-shared", "-o", tmp_path / "other.so", "-x", "c", "/dev/null"], check=True
    )
    with pytest.raises(DytCompileError, match=r"is no DyT plugin library.*dyt_plugin_info"):
        plugin_info(tmp_path / "other.so")


def test_sources_are_beside_the_module() -> None:
    assert {path.name for path in SOURCES.glob("*.cu*")} == {
        "core.cuh", "kernel.cuh", "launch.cuh", "plugin.cu"
    }  # fmt: skip
    assert {path.name for path in SOURCES.glob("*.h")} == {"forms.h", "plugin.h"}


def test_wheel_ships_the_sources(tmp_path: Path) -> None:
    builders = pytest.importorskip("hatchling.builders.wheel")
    import zipfile

    root = SOURCES.parents[2]
    if not (root / "pyproject.toml").is_file():
        pytest.skip("not run from the sources")
    (wheel,) = builders.WheelBuilder(str(root)).build(directory=str(tmp_path))
    names = zipfile.ZipFile(wheel).namelist()
    for name in ("core.cuh", "kernel.cuh", "launch.cuh", "forms.h", "plugin.h", "plugin.cu"):
        assert f"dyt_compile/exporters/plugin/{name}" in names


def test_info_prints_every_plugin_with_its_inputs(
    plugin: PluginInfo, capsys: pytest.CaptureFixture[str]
) -> None:
    from dyt_compile.cli import main

    with pytest.raises(SystemExit) as end:
        main(["plugin", "info", str(plugin.path)])
    assert not end.value.code
    first, *lines = capsys.readouterr().out.splitlines()
    assert "headers of TensorRT 10.14, compute capabilities 80, 89, 90, 100, 120" in first
    assert len(lines) == len(OPERATORS)
    assert "  dyt::AddDyT version 1 (x, residual, alpha, gamma, beta)" in lines
