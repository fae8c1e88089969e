"""The README's examples run as they stand."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("sklearn")

ROOT = Path(__file__).parent.parent


def blocks(language: str) -> list[str]:
    """Code blocks of the README in one language."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A working folder that has the examples, as a clone has."""
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    return tmp_path


def run(command: list[str], folder: Path) -> str:
    scripts = Path(sys.executable).parent
    environment = {**os.environ, "PATH": f"{scripts}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_bash_examples_run_and_write_their_files(folder: Path) -> None:
    printed = run(["bash", "-e", "-c", "\n".join(blocks("bash"))], folder)
    assert "within 0.05" in printed
    assert "before recovery" in printed
    written = ("sites.json", "digits.onnx", "report.html", "report.json", "fits.safetensors")
    for name in (*written, "recovered.onnx"):
        assert (folder / name).stat().st_size > 0


def test_python_examples_run_and_write_their_files(folder: Path) -> None:
    (example,) = blocks("python")
    assert "blocks.0.norm1" in run([sys.executable, "-c", example], folder)
    assert (folder / "model.onnx").stat().st_size > 0


def test_make_targets_of_the_readme_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    named = set(re.findall(r"make ([a-z][a-z-]+)", "\n".join(blocks("sh"))))
    assert named == {"demo", "test"}
    assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in named)
