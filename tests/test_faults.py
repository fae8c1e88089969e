"""Faults: the smallest runs of the benchmark, and the page that its results render to."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from benchmarks.faults.kills import placed
from benchmarks.faults.subjects import CASES, TORCH, prepare
from benchmarks.faults.table import PAGE, lost, render
from dyt_compile.errors import (
    CaptureError,
    MemoryExhaustedError,
    OutdatedDependencyError,
    out_of_memory,
)
from dyt_compile.requirements import check_version

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "faults.json"

measured = pytest.mark.skipif(not RESULTS.exists(), reason="benchmarks.faults has not been run")

KILLS = 12

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="faults are caused as Linux does")


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A short run, of what needs no root."""
    path = tmp_path_factory.mktemp("faults") / "found.json"
    done = subprocess.run(
        [
            sys.executable, "-m", "benchmarks.faults",
            "kills", "recover", "pairs", "input", "packages",
            "--only", "weights copied$", "--kills", str(KILLS), "--rounds", "2", "-o", str(path),
        ],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    results: dict[str, Any] = json.loads(path.read_text())
    return results


def test_nothing_is_lost(found: dict[str, Any]) -> None:
    assert lost(found) == []


def test_commands_are_killed_as_often_as_told(found: dict[str, Any]) -> None:
    shares = {case.name: case.share for case in CASES}
    assert len(found["kills"]) == 3
    for name, tally in found["kills"].items():
        # Some steps may be struck once for two tries, where there are few.
        assert sum(tally["killed"].values()) >= round(KILLS * shares[name]) - 2
        assert sum(tally["found"].values()) == sum(tally["killed"].values())


def test_killed_recoveries_end_where_an_undisturbed_one_does(found: dict[str, Any]) -> None:
    row = found["recover"]["recover"]
    assert row["went_on"] > 0
    assert row["worst_difference"] < 1e-6


def test_what_is_lost_is_told() -> None:
    tally = {"found": {"old": 3, "half": 1}, "left": ["home/.dyt-compile-x"]}
    row = {"what": "too small a disk", "ended": {"written": 2, "refused, old file lost": 1}}
    assert lost({"kills": {"convert": tally}, "disk": {row["what"]: row}}) == [
        "convert: half", "convert: left home/.dyt-compile-x",
        "too small a disk: refused, old file lost",
    ]  # fmt: skip


def test_blows_fall_before_every_step_and_at_other_times() -> None:
    blows = placed(30, 10, 2.0, 1000)
    assert [blow.step for blow in blows if blow.step is not None] == list(range(10))
    assert all(0 <= blow.after < 2 for blow in blows if blow.after is not None)
    assert all(1 <= blow.cut < 1000 for blow in blows if blow.cut is not None)


@measured
def test_results_lost_nothing_and_killed_two_hundred() -> None:
    results = json.loads(RESULTS.read_text())
    assert lost(results) == []
    tallies = [*results["kills"].values(), *results["recover"].values()]
    kills = [sum(n for way, n in t["killed"].items() if way != "within a write") for t in tallies]
    assert sum(kills) >= 200
    assert {tally["verb"] for tally in tallies} == {
        "convert", "export", "build", "calibrate", "recover"
    }  # fmt: skip
    assert results["recover"]["recover"]["worst_difference"] <= 1e-6
    spilled = [t["steps"] for name, t in results["kills"].items() if "activations in" in name]
    assert spilled
    assert all(steps["open"] >= 20 for steps in spilled)
    for part in ("disk", "targets", "pairs", "input", "memory", "packages"):
        assert len(results[part]) >= 4


@measured
def test_page_is_what_the_results_render_to() -> None:
    assert PAGE.read_text(encoding="utf-8") == render(json.loads(RESULTS.read_text()))


LIMITED = """
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
from dyt_compile.cli import main
main(sys.argv[1:])
"""


ONNX = ("model.onnx", "--data", "data.npz")


@pytest.mark.parametrize(
    ("verb", "source", "name"),
    [
        ("convert", ONNX, "out.onnx"), ("calibrate", ONNX, "out.safetensors"),
        ("convert", TORCH, "out.pt2"),  # of which torch itself ends the process
    ],
)  # fmt: skip
def test_file_that_becomes_too_long_is_told_and_the_old_one_kept(
    verb: str, source: tuple[str, ...], name: str, tmp_path: Path
) -> None:
    folder = tmp_path / "home"
    prepare(folder)
    (folder / name).write_text("old")
    before = {path.name for path in folder.iterdir()}
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, verb, *source, "-o", name],
        cwd=folder, capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == f"ExportError: cannot write '{name}': File too large"
    assert (folder / name).read_text() == "old"
    assert {path.name for path in folder.iterdir()} == before


# How shortages are told.


@pytest.mark.parametrize(
    "foreign",
    [
        MemoryError(),
        MemoryError("Unable to allocate 1.2 GiB for an array"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."),
        RuntimeError("Failed to allocate memory for requested buffer of size 9"),
        RuntimeError("std::bad_alloc"),
        OSError(12, "Cannot allocate memory"),
    ],
)
def test_exhausted_memory_is_seen_behind_other_errors(foreign: Exception) -> None:
    outer = CaptureError("the model cannot be read")
    outer.__cause__ = foreign
    assert out_of_memory(foreign) is foreign
    assert out_of_memory(outer) is foreign
    assert str(MemoryExhaustedError(foreign)).startswith("not enough memory (")


def test_other_errors_are_not_of_memory() -> None:
    assert out_of_memory(CaptureError("the model has no memory of its own")) is None


@pytest.mark.parametrize("version", ["2.4.1", "1.13.0+cu117", "2.12.9"])
def test_package_that_is_too_old_is_named_with_the_fix(
    version: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metadata, "version", lambda _: version)
    with pytest.raises(OutdatedDependencyError, match=r"pip install --upgrade 'torch>=2\.13'$"):
        check_version("torch")


@pytest.mark.parametrize("version", ["2.13.0", "2.13.0+cu130", "2.14.0a0", "3.0"])
def test_package_that_is_new_enough_passes(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metadata, "version", lambda _: version)
    check_version("torch")
    check_version("no-such-package")
