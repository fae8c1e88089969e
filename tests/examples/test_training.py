"""The training scripts of the examples, for an epoch or two, and the weights that they made."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")

EXAMPLES = Path(__file__).parents[2] / "examples"


def run(script: str, *options: str) -> str:
    command = [sys.executable, str(EXAMPLES / script), *options]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_digits_from_scratch_compares_norms_and_carries_dyt_over(tmp_path: Path) -> None:
    run(
        "digits/from_scratch.py",
        "--epochs",
        "3",
        "--threads",
        "1",
        "--output-folder",
        str(tmp_path),
    )
    found = json.loads((tmp_path / "figures.json").read_text())
    exact = found["exact"]
    assert exact["recognised"] == 9
    assert exact["kept"] == exact["tensors"] > 50
    assert exact["difference"] <= 1e-6
    assert exact["export_error"] <= 1e-5
    assert "<svg" in (tmp_path / "training.svg").read_text()
    for norm, runs in found["runs"].items():
        (losses,) = runs["losses"]
        assert len(losses) in (3, 6)
        assert losses[-1] < losses[0], norm


def test_digits_of_a_seed_are_the_same_again(tmp_path: Path) -> None:
    files = [tmp_path / f"{n}.safetensors" for n in range(3)]
    for seed, file in zip((1, 1, 2), files, strict=True):
        options = ("--epochs", "1", "--threads", "1", "--seed", str(seed), "--output", str(file))
        run("digits/train.py", *options)
    first, again, other = (file.read_bytes() for file in files)
    assert first == again != other


def test_characters_learn(tmp_path: Path) -> None:
    file = tmp_path / "gpt.safetensors"
    told = run("characters/train.py", "--steps", "15", "--output", str(file))
    loss = float(told.partition("held-out loss ")[2].split()[0])
    assert loss < 3.6  # a uniform guess among 96 costs 4.56
    assert 0 < file.stat().st_size < 1e6
