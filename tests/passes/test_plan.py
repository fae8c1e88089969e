"""Plan: the search alone, against attempts whose errors are known."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dyt_compile.calibration import Calibration
from dyt_compile.metrics import Measurement
from dyt_compile.passes.plan import (
    DEVIATIONS,
    FRONTIER,
    PATIENCE,
    Attempt,
    Choice,
    Plan,
    frontier_sizes,
    in_order,
    largest,
    plan,
)

pytestmark = pytest.mark.core

EMPTY = Calibration({}, ())
Error = Callable[[frozenset[str]], float]


class Attempts:
    """Measures sets by a formula, and keeps what it was asked for."""

    def __init__(self, error: Error, standard_error: float = 0.0) -> None:
        self.error = error
        self.standard_error = standard_error
        self.asked: list[frozenset[str]] = []

    def __call__(self, choice: Choice) -> Attempt:
        names = choice.names
        self.asked.append(names)
        return Attempt(choice, EMPTY, Measurement(self.error(names), self.standard_error, 100))


def _named(errors: list[float]) -> dict[str, float]:
    return {f"site{number}": error for number, error in enumerate(errors)}


def _additive(sensitivities: dict[str, float]) -> Error:
    """Independent errors: their squares add."""
    return lambda names: math.sqrt(sum(sensitivities[name] ** 2 for name in names))


def _largest_prefix(sensitivities: dict[str, float], error: Error, budget: float) -> int:
    order = sorted(sensitivities, key=lambda name: sensitivities[name])
    sizes = range(len(order) + 1)
    return max(n for n in sizes if n == 0 or error(frozenset(order[:n])) <= budget)


def _chosen_error(planned: Plan) -> float:
    assert planned.chosen is not None
    return planned.chosen.measurement.error


def _bound(count: int) -> float:
    return 2 * math.log2(max(count, 1)) + PATIENCE + 3


errors = st.lists(st.floats(1e-4, 1.0), max_size=70)
budgets = st.floats(1e-3, 2.0)


@settings(deadline=None, max_examples=300)
@given(errors=errors, budget=budgets)
def test_plan_of_additive_errors_takes_the_largest_set(errors: list[float], budget: float) -> None:
    sensitivities = _named(errors)
    attempts = Attempts(_additive(sensitivities))
    planned = plan(sensitivities, attempts, budget)
    # Of independent errors the smallest ones make the largest set: the prefix is the optimum.
    assert len(planned.converted) == _largest_prefix(sensitivities, attempts.error, budget)
    assert len(attempts.asked) <= _bound(len(errors))
    if planned.chosen is not None:
        assert _chosen_error(planned) <= budget


@pytest.mark.parametrize(("spent", "expected"), [(0.0, 25), (0.3, 16), (0.5, 1)])
def test_search_begins_where_the_error_that_was_there_before_puts_it(
    spent: float, expected: int
) -> None:
    alone = _named([0.1] * 30)
    attempts = Attempts(lambda names: math.hypot(spent, 0.1 * len(names) ** 0.5))
    best, log = largest(in_order(alone), attempts, 0.501, spent)
    assert len(attempts.asked[0]) == expected
    assert best is not None or spent == 0.5
    assert len(log) <= _bound(30)
    assert best is None or len(best.names) == expected


@settings(deadline=None, max_examples=300)
@given(
    steps=st.lists(st.floats(0, 0.2), max_size=70),
    off=st.floats(0.01, 100),
    budget=budgets,
)
def test_plan_of_monotone_errors_takes_the_longest_prefix(
    steps: list[float], off: float, budget: float
) -> None:
    """However wrong the sensitivities are about the size of the errors."""
    sensitivities = _named([off * (number + 1) for number in range(len(steps))])
    total = [sum(steps[: n + 1]) for n in range(len(steps))]

    def error(names: frozenset[str]) -> float:
        return total[max(int(name[4:]) for name in names)]

    attempts = Attempts(error)
    planned = plan(sensitivities, attempts, budget)
    assert len(planned.converted) == _largest_prefix(sensitivities, error, budget)
    assert len(attempts.asked) <= _bound(len(steps))


@settings(deadline=None, max_examples=300)
@given(data=st.data(), count=st.integers(0, 12), budget=budgets)
def test_plan_never_exceeds_the_budget(data: st.DataObject, count: int, budget: float) -> None:
    """Whatever the errors do: with a set grown, they may fall; they may be NaN or infinite."""
    sensitivities = _named(data.draw(st.lists(st.floats(0, 2), min_size=count, max_size=count)))
    known: dict[frozenset[str], float] = {}

    def error(names: frozenset[str]) -> float:
        if names not in known:
            known[names] = data.draw(st.floats(0, 2) | st.just(math.nan) | st.just(math.inf))
        return known[names]

    attempts = Attempts(error)
    planned = plan(sensitivities, attempts, budget)
    kept = [names for names in attempts.asked if error(names) <= budget]
    if planned.chosen is None:
        assert planned.converted == frozenset()
        assert not kept
    else:
        assert _chosen_error(planned) <= budget
        assert planned.chosen.names == planned.converted
        assert len(planned.converted) == max(map(len, kept))  # nothing affordable is left behind
    assert len(attempts.asked) == len(set(attempts.asked))  # no set is measured twice
    assert [size for size, _ in planned.attempts] == [len(names) for names in attempts.asked]


def test_plan_without_sites_asks_for_nothing() -> None:
    attempts = Attempts(lambda names: 0.0)
    planned = plan({}, attempts, 0.1)
    assert planned.chosen is None
    assert planned.converted == frozenset()
    assert planned.attempts == ()
    assert attempts.asked == []


@pytest.mark.parametrize("count", [1, 2, 3, 13, 65, 500])
def test_plan_where_everything_passes_takes_all(count: int) -> None:
    sensitivities = _named([0.01] * count)
    attempts = Attempts(lambda names: 0.0)
    planned = plan(sensitivities, attempts, 0.05)
    assert planned.converted == frozenset(sensitivities)
    assert len(attempts.asked) <= math.log2(count) + 4


@pytest.mark.parametrize("count", [1, 2, 3, 13, 65, 500])
def test_plan_where_everything_fails_keeps_all_norms(count: int) -> None:
    sensitivities = _named([0.01] * count)
    attempts = Attempts(lambda names: 1.0)
    planned = plan(sensitivities, attempts, 0.05)
    assert planned.chosen is None
    assert len(attempts.asked) <= _bound(count)


def test_plan_with_all_sites_affordable_at_once_asks_once() -> None:
    sensitivities = _named([0.001] * 40)
    attempts = Attempts(_additive(sensitivities))
    plan(sensitivities, attempts, 0.05)
    assert attempts.asked == [frozenset(sensitivities)]


def test_plan_starts_with_the_least_sensitive_site() -> None:
    sensitivities = {"bad": 0.9, "fair": 0.04, "good": 0.001}
    planned = plan(sensitivities, Attempts(_additive(sensitivities)), 0.05)
    assert planned.converted == {"good", "fair"}


def test_plan_counts_the_uncertainty_of_a_measurement() -> None:
    sensitivities = _named([0.01] * 4)
    within = Attempts(lambda names: 0.04, standard_error=0.009 / DEVIATIONS)
    beyond = Attempts(lambda names: 0.04, standard_error=0.011 / DEVIATIONS)
    assert len(plan(sensitivities, within, 0.05).converted) == 4
    assert plan(sensitivities, beyond, 0.05).converted == frozenset()


def test_plan_goes_around_a_site_that_ruins_the_model() -> None:
    """One site is harmless alone, and not with others."""
    sensitivities = _named([0.001 * (number + 1) for number in range(12)])
    additive = _additive(sensitivities)

    def error(names: frozenset[str]) -> float:
        return 1.0 if "site4" in names and len(names) > 1 else additive(names)

    planned = plan(sensitivities, Attempts(error), 0.05)
    assert planned.converted == frozenset(sensitivities) - {"site4"}


def test_plan_gives_up_after_as_many_failures_as_its_patience() -> None:
    sensitivities = _named([0.01] * 30)

    def error(names: frozenset[str]) -> float:
        return 0.01 if names <= {"site0", "site1"} else 1.0

    attempts = Attempts(error)
    planned = plan(sensitivities, attempts, 0.05)
    assert planned.converted == {"site0", "site1"}
    singles = [names for names in attempts.asked if {"site0", "site1"} < names and len(names) == 3]
    assert len(singles) <= PATIENCE + 1


def test_plan_tries_no_straggler_that_alone_exceeds_the_budget() -> None:
    sensitivities = {"good": 0.01, "bad": 0.06, "worse": 0.9, "worst": 1.0}
    attempts = Attempts(_additive(sensitivities))
    planned = plan(sensitivities, attempts, 0.05)
    assert planned.converted == {"good"}
    assert not any("worst" in names and len(names) == 2 for names in attempts.asked)


def test_plan_keeps_a_site_whose_sensitivity_is_nan_and_converts_others() -> None:
    sensitivities = {"broken": math.nan, "good": 0.01, "fair": 0.02}

    def error(names: frozenset[str]) -> float:
        return math.nan if "broken" in names else 0.01 * len(names)

    assert plan(sensitivities, Attempts(error), 0.05).converted == {"good", "fair"}


def test_plan_of_attempts_that_convert_less_than_asked_says_what_they_did() -> None:
    """A site may lose its fit once others are converted."""
    sensitivities = _named([0.01] * 5)

    def attempt(choice: Choice) -> Attempt:
        done = Choice(choice.names - {"site2"})
        return Attempt(done, EMPTY, Measurement(0.01 * len(done.names), 0.0, 9))

    planned = plan(sensitivities, attempt, 0.05)
    assert planned.converted == frozenset(sensitivities) - {"site2"}


def test_plan_hands_on_its_sensitivities() -> None:
    sensitivities = _named([0.01, 0.5])
    planned = plan(sensitivities, Attempts(_additive(sensitivities)), 0.05)
    assert dict(planned.sensitivities) == sensitivities


def test_order_is_from_the_least_sensitive_site_on_and_nan_is_last() -> None:
    order = in_order({"broken": math.nan, "bad": 0.3, "good": 0.1})
    assert [step.name for step in order] == ["good", "bad", "broken"]


pairs = st.lists(st.tuples(st.floats(1e-3, 0.5), st.floats(0.5, 3.0)), max_size=12)


@settings(deadline=None, max_examples=300)
@given(pairs=pairs, budget=budgets)
def test_plan_with_affine_maps_keeps_the_budget_and_gains_no_less_than_its_prefix(
    pairs: list[tuple[float, float]], budget: float
) -> None:
    dyt = _named([error for error, _ in pairs])
    affine = _named([error * factor for error, factor in pairs])
    attempt = _attempt(dyt, affine)
    planned = plan(dyt, attempt, budget, affine)
    order = in_order(dyt, affine)
    prefixes = [Choice().after(order[:size]) for size in range(len(order) + 1)]
    largest = max(c.gain for c in prefixes if attempt(c).measurement.error <= budget)
    found = Choice() if planned.chosen is None else planned.chosen.choice
    assert found.gain >= largest
    assert found.affine <= found.names
    assert found.gain == 0 or _chosen_error(planned) <= budget
    if min(dyt.values(), default=math.inf) <= budget:
        assert found.gain > 0  # where an affine map is too much, DyT is tried


def test_plan_takes_affine_maps_where_they_cost_little_more() -> None:
    dyt, affine = {"flat": 0.01, "bent": 0.01}, {"flat": 0.012, "bent": 0.04}
    planned = plan(dyt, _attempt(dyt, affine), 0.02, affine)
    assert planned.chosen is not None
    assert planned.chosen.choice == Choice(frozenset(dyt), frozenset({"flat"}))
    assert planned.affine == affine


def test_plan_takes_dyt_where_an_affine_map_is_too_much() -> None:
    dyt, affine = {"site": 0.05}, {"site": 0.06}
    planned = plan(dyt, _attempt(dyt, affine), 0.055, affine)
    assert planned.chosen is not None
    assert planned.chosen.choice == Choice(frozenset({"site"}))


def test_steps_put_dyt_before_an_affine_map_that_costs_much_more() -> None:
    cheap, dear = (in_order({"site": 0.1}, {"site": error}) for error in (0.11, 0.3))
    assert [step.affine for step in cheap] == [True, False]
    assert [step.affine for step in dear] == [False, True]
    assert [step.affine for step in in_order({"site": 0.1})] == [False]


def _attempt(dyt: dict[str, float], affine: dict[str, float]) -> Callable[[Choice], Attempt]:
    """Attempts at choices, whose errors add in squares."""

    def attempt(choice: Choice) -> Attempt:
        errors = [(affine if n in choice.affine else dyt)[n] for n in choice.names]
        return Attempt(choice, EMPTY, Measurement(math.hypot(*errors), 0.0, 100))

    return attempt


@pytest.mark.parametrize("sites", [0, 1, 9, FRONTIER])
def test_frontier_of_few_sites_has_a_point_for_each(sites: int) -> None:
    assert frontier_sizes(sites) == list(range(1, sites + 1))


@pytest.mark.parametrize("sites", [FRONTIER + 1, 65, 161, 1000])
def test_frontier_of_many_sites_is_bounded_and_ends_with_all(sites: int) -> None:
    sizes = frontier_sizes(sites)
    assert (sizes[0], sizes[-1]) == (1, sites)
    assert len(sizes) <= FRONTIER
    steps = [after - before for before, after in pairwise(sizes)]
    assert min(steps) >= 1
    assert max(steps) == steps[-1]  # closest where few are converted
