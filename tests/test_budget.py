"""The benchmark of budgets: its smallest run, and that its figures are those of the runs."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

pytest.importorskip("sklearn")

from benchmarks import budget


def test_runs_keep_a_wide_budget_and_count_its_sites(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budget, "BUDGETS", {"relative": (0.1,)})

    (run,) = budget.runs(0, ["relative"])

    assert 1 <= run.converted <= 9
    assert run.planned is not None
    assert 0 < run.planned <= 0.1
    assert run.kept


def test_a_run_above_its_budget_is_not_kept() -> None:
    run = budget.Run(0, "relative", 0.1, 3, 0.09, 0.095, 0.0999, 4)

    assert run.kept
    assert not replace(run, unseen=0.1001).kept
    assert not replace(run, unseen=None).kept  # BudgetError


def test_committed_figures_are_those_of_the_committed_runs() -> None:
    held = json.loads(budget.RESULTS.read_text())
    runs = [budget.Run(**run) for run in held["runs"]]

    assert budget.summary(runs) == held["rows"]
