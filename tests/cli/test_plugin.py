"""dyt-compile plugin, as a user calls it."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from dyt_compile.cli import main
from dyt_compile.exporters.plugin.build import ARCHITECTURES

pytestmark = pytest.mark.core


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as end:
        main(["plugin", *arguments])
    return int(end.value.code or 0)


def test_help_names_both_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--help") == 0
    shown = capsys.readouterr().out
    assert "build" in shown
    assert "info" in shown


def test_built_options_are_handed_on(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = []

    def build(output: Path, **options: object) -> None:
        asked.append((output, options))
        raise subprocess.SubprocessError

    monkeypatch.setattr("dyt_compile.cli.plugin.build_plugin", build)
    assert run("build") == 1
    assert run("build", "-o", "x.so", "--arch", "90,120", "--tensorrt-root", str(tmp_path)) == 1
    assert asked == [
        (Path("libdyt_plugin.so"), {"arch": list(ARCHITECTURES), "tensorrt_root": None}),
        (Path("x.so"), {"arch": [90, 120], "tensorrt_root": tmp_path}),
    ]


def test_architectures_that_are_no_numbers_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("build", "--arch", "sm_90") == 1
    expected = "OptionError: --arch is 'sm_90'; allowed: numbers with commas, 80,90\n"
    assert capsys.readouterr().err == expected


def test_missing_headers_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dyt_compile.exporters.plugin.build.find_nvcc", lambda: Path("nvcc"))
    assert run("build", "--tensorrt-root", str(tmp_path)) == 1
    shown = capsys.readouterr().err
    assert shown.startswith("ExportError: the headers of TensorRT (NvInferRuntime.h) are not in")
    assert shown.count("\n") == 1


def test_missing_library_says_how_to_make_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("info", str(tmp_path / "none.so")) == 1
    assert "make one with: dyt-compile plugin build" in capsys.readouterr().err
