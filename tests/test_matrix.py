"""docs/matrix.md says what runs: it is written from results, and some rows are run again here."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("diffusers")
pytest.importorskip("onnxruntime")
pytest.importorskip("timm")
pytest.importorskip("transformers")

from benchmarks.matrix import routes
from benchmarks.matrix.__main__ import RESULTS, TABLE, merged
from benchmarks.matrix.hyena import HyenaDNA
from benchmarks.matrix.routes import QUICK, ROUTES, Cell, State, Subject, facts, take
from benchmarks.matrix.system import Inputs, System
from benchmarks.matrix.systems import SYSTEMS
from benchmarks.matrix.table import render
from benchmarks.matrix.truth import WrongError, truth

AGAIN = ("ViT-B", "LLaMA 7B", "wav2vec 2.0 Base", "HyenaDNA", "ResNet-50", "σReparam")
"""Rows that are run again: each kind of answer, in seconds."""


@pytest.fixture(scope="module")
def results() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(RESULTS.read_text())
    return found


def test_page_is_what_the_results_render_to(results: dict[str, Any]) -> None:
    assert TABLE.read_text() == render(results)


def test_every_system_has_its_row(results: dict[str, Any]) -> None:
    assert list(results["rows"]) == list(SYSTEMS)
    for name, row in results["rows"].items():
        assert (row["group"], row["source"]) == (SYSTEMS[name].group, SYSTEMS[name].source)


def test_no_route_ends_wrong(results: dict[str, Any]) -> None:
    wrong = [
        (name, route, cell["reason"])
        for name, row in results["rows"].items()
        for route, cell in row["cells"].items()
        if cell["state"] in (State.WRONG, State.ENDED)
    ]
    assert wrong == []


def test_every_row_has_been_every_way(results: dict[str, Any]) -> None:
    assert all(list(row["cells"]) == list(ROUTES) for row in results["rows"].values())


@pytest.mark.parametrize("name", AGAIN)
def test_row_is_what_runs(results: dict[str, Any], name: str, tmp_path: Path) -> None:
    row = results["rows"][name]
    subject = Subject(SYSTEMS[name], tmp_path)
    assert facts(subject) == {key: row[key] for key in ("group", "source", "sites", "kinds")}
    for route in QUICK:
        assert take(subject, route, {}) == Cell(**row["cells"][route]), route


class Two(nn.Module):
    """A norm of each kind, and a layer behind each."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.LayerNorm(8), nn.RMSNorm(8)
        self.layer = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.layer(self.second(self.layer(self.first(x))))
        return y


def numbers(_: nn.Module, samples: int, seed: int) -> Inputs:
    return Inputs((torch.randn(samples, 3, 8, generator=torch.Generator().manual_seed(seed)),))


TWO = System("two", "tests", "here", Two, numbers, Two)


@pytest.mark.parametrize("route", [*QUICK, "full"])
def test_row_of_the_truth_passes(route: str, tmp_path: Path) -> None:
    assert take(Subject(TWO, tmp_path), route, {}).state == State.PASS


@pytest.mark.parametrize("route", ["export", "fx", "decomposed", "full"])
@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"is_norm": lambda m: isinstance(m, nn.LayerNorm)}, "found and not called: second"),
        ({"is_norm": lambda m: isinstance(m, (nn.LayerNorm, nn.Linear))}, "not found: layer"),
        ({"is_refused": lambda m: isinstance(m, nn.Linear)}, "not refused: layer"),
    ],
    ids=["one too few", "one too many", "a refusal"],
)
def test_row_of_a_wrong_truth_fails(
    route: str, wrong: dict[str, Callable[[nn.Module], bool]], told: str, tmp_path: Path
) -> None:
    cell = take(Subject(replace(TWO, **wrong), tmp_path), route, {})
    assert cell.state == State.WRONG
    assert told in cell.reason


def test_refusal_without_cause_fails(tmp_path: Path) -> None:
    system = replace(SYSTEMS["ResNet-50"], is_refused=lambda _: False)
    cell = take(Subject(system, tmp_path), "export", {})
    assert cell.state == State.WRONG
    assert "refused without cause" in cell.reason


def test_onnx_of_other_kinds_fails(tmp_path: Path) -> None:
    subject = Subject(TWO, tmp_path)
    assert take(subject, "onnx20", {}) == Cell()
    assert subject.truth.kinds is not None
    subject.truth.kinds.subtract(rms_norm=1)
    subject.truth.kinds.update(layer_norm=1)
    assert take(subject, "onnx20", {}).state == State.WRONG


class Squash(nn.Module):
    """Element-wise, as DyT is."""

    def __init__(self) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.tensor(0.5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.alpha * x)


@pytest.mark.parametrize(
    ("module", "kind"),
    [
        (nn.LayerNorm(8), "layer_norm"),
        (nn.LayerNorm(8, elementwise_affine=False), "layer_norm"),
        (nn.RMSNorm(8), "rms_norm"),
        (Squash(), "dyt"),
    ],
)
def test_kind_is_what_the_outputs_show(module: nn.Module, kind: str) -> None:
    model = nn.Sequential(nn.Linear(8, 8), module)
    system = replace(TWO, is_norm=lambda m: m is module)
    found = truth(system, model, numbers(model, 2, 0), kinds=True)
    assert found.kinds == {kind: 1}
    assert found.norms == ("1",)


def test_hyena_is_one_function_with_and_without_fourier_transforms() -> None:
    model = HyenaDNA(16, 2, 64).eval()
    direct = HyenaDNA(16, 2, 64, direct=True).eval()
    direct.load_state_dict(model.state_dict())
    ids = torch.arange(24).reshape(2, 12) % 16
    with torch.no_grad():
        assert routes.same([direct(ids)], [model(ids)]) < 1e-5


def test_outputs_that_differ_fail() -> None:
    x = torch.randn(4, 8)
    assert routes.same([x], [x]) == 0.0
    for other in (x * 1.001, x[:2], x.where(x > 0, torch.nan)):
        with pytest.raises(WrongError):
            routes.same([other], [x])


def test_route_that_raises_tells_why(tmp_path: Path) -> None:
    subject = Subject(TWO, tmp_path)
    subject.inputs = Inputs((torch.randn(2, 3, 5),))
    cell = take(subject, "refusals", {})
    assert cell.state == State.WRONG
    assert cell.reason.startswith("CaptureError: ")
    assert take(subject, "decomposed", {}).state == State.CLOSED


def test_route_is_not_taken_without_the_one_before(tmp_path: Path) -> None:
    done = {"convert": Cell(State.WRONG, reason="no")}
    cell = take(Subject(TWO, tmp_path), "compile", done)
    assert cell == Cell(State.SKIPPED, reason="needs convert")


def test_rows_done_again_replace_the_old_ones_and_quick_ones_their_cells_alone() -> None:
    first, second, *_ = SYSTEMS
    old = {"cells": {"fx": {"told": "old"}, "full": {"told": "old"}}}
    before = {second: old, "gone": old}
    after = merged(before, {first: old, second: {"cells": {"fx": {"told": "new"}}}})
    assert list(after) == [first, second]
    assert after[second]["cells"] == {"fx": {"told": "new"}, "full": {"told": "old"}}


def test_page_shows_failures_with_their_reasons(results: dict[str, Any]) -> None:
    name = next(iter(results["rows"]))
    row = json.loads(json.dumps(results["rows"][name]))
    row["cells"]["fx"] = {"state": State.CLOSED, "told": "", "reason": "cannot be traced"}
    row["cells"]["export"] = {"state": State.WRONG, "told": "", "reason": "4 sites instead of 5"}
    row["cells"]["onnx17"] = {"state": State.ENDED, "told": "", "reason": "ended with -11"}
    page = render({"versions": results["versions"], "rows": {name: row}})
    line = next(line for line in page.splitlines() if line.startswith(f"| {name} "))
    marks = {text.partition(": ")[2]: text.partition(":")[0] for text in page.splitlines()}
    assert f"| –{marks['cannot be traced']} | ✗{marks['4 sites instead of 5']} |" in line
    assert f"17 ✗{marks['ended with -11']}" in line
