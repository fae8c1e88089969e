"""Convert, inspect and compare: what they take, what they promise, what they refuse."""

from __future__ import annotations

import copy
import importlib.util
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import onnx_ir as ir
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import dyt_compile
from dyt_compile import Conversion, trials
from dyt_compile.compiler import compare, convert, inspect
from dyt_compile.data import split
from dyt_compile.errors import (
    BudgetError,
    CaptureError,
    DataError,
    DytCompileError,
    OptionError,
)
from dyt_compile.metrics import Measurement
from dyt_compile.terms import Op

EXAMPLE = Path(__file__).parent.parent / "examples" / "digits" / "model.py"
WIDTH, TOKENS, DEPTH = 12, 5, 3
SITES = ["blocks.0.norm", "blocks.1.norm", "blocks.2.norm", "norm"]


class Block(nn.Module):
    def __init__(self, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.norm = norm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.dropout(self.down(F.gelu(self.up(self.norm(x)))))
        return y


class Transformer(nn.Module):
    """Pre-norm MLPs on tokens; an output for each token."""

    def __init__(self, norm: Callable[[int], nn.Module] = nn.LayerNorm) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.Sequential(*(Block(norm) for _ in range(DEPTH)))
        self.norm = norm(WIDTH)
        self.head = nn.Linear(WIDTH, 4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.norm(self.blocks(x)))
        return y


class Dyt(nn.Module):
    """As in the paper's code."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.full((1,), 0.8))
        self.weight = nn.Parameter(1 + 0.1 * torch.randn(width))
        self.bias = nn.Parameter(0.1 * torch.randn(width))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.alpha * x) * self.weight + self.bias


def _inputs(samples: int = 16, seed: int = 0) -> Tensor:
    return torch.randn(samples, TOKENS, WIDTH, generator=torch.Generator().manual_seed(seed))


def _batches(count: int = 8) -> list[tuple[Tensor]]:
    return [(_inputs(seed=number),) for number in range(count)]


def _call(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
    with torch.no_grad():
        return model(*args, **kwargs)


def _relative(f: Tensor, g: Tensor) -> float:
    return float((f - g).norm() / f.norm())


def _assert_one_line(error: BaseException, *told: str) -> None:
    message = str(error)
    assert "\n" not in message
    for part in told:
        assert part in message


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return Transformer().eval()


@pytest.fixture(scope="module")
def everything(model: nn.Module) -> Conversion:
    """All sites converted; to be read only."""
    return convert(model, _batches(), mode="all")


@pytest.fixture(scope="module")
def onnx_file(model: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("compiler") / "model.onnx"
    program = torch.onnx.export(
        model, (_inputs(4),), dynamo=True, verbose=False,
        dynamic_shapes=({0: torch.export.Dim("batch")},),
    )  # fmt: skip
    assert program is not None
    program.save(path)
    return path


# Modes


@pytest.mark.core
def test_mode_without_batches_is_exact(model: nn.Module) -> None:
    result = convert(model, example=(_inputs(),))
    assert result.report.mode == "exact"
    assert (result.report.error, result.report.converted) == (None, 0)
    assert result.calibration is None
    assert torch.equal(_call(result.model, _inputs()), _call(model, _inputs()))
    assert {str(site.reason)[:10] for site in result.report.sites} == {"mode exact"}


@pytest.mark.core
def test_mode_with_batches_is_budget(model: nn.Module) -> None:
    result = convert(model, _batches(4))
    assert (result.report.mode, result.report.budget, result.report.metric) == (
        "budget", 0.05, "relative"
    )  # fmt: skip
    assert result.report.error is not None
    assert result.report.error <= 0.05


@pytest.mark.core
def test_mode_exact_ignores_batches(model: nn.Module) -> None:
    assert convert(model, _batches(2), mode="exact").report.converted == 0


@pytest.mark.core
def test_mode_all_converts_every_site(model: nn.Module, everything: Conversion) -> None:
    report = everything.report
    assert report.converted == len(SITES)
    assert [site.name for site in report.sites] == SITES
    assert all(site.alpha and site.fit_error and site.reason is None for site in report.sites)
    assert report.budget is None
    assert [site.kind.value for site in inspect(everything.model, (_inputs(),)).sites] == [
        "dyt"
    ] * len(SITES)
    x = _inputs(seed=99)
    assert 0 < _relative(_call(model, x), _call(everything.model, x)) < 0.6


@pytest.mark.core
def test_reported_error_is_that_of_the_report_samples(
    model: nn.Module, everything: Conversion
) -> None:
    part = split(everything.original, _batches(), 0).report
    x = torch.cat([batch["x"] for batch in part])
    expected = _relative(_call(model, x), _call(everything.model, x))
    assert everything.report.error == pytest.approx(expected, rel=1e-5)
    assert everything.report.samples == len(x) == 32


@pytest.mark.core
def test_conversion_is_the_same_every_time(everything: Conversion, model: nn.Module) -> None:
    again = convert(model, _batches(), mode="all")
    assert again.report.error == everything.report.error
    first, second = everything.model.state_dict(), again.model.state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.core
@pytest.mark.parametrize("budget", [0.02, 0.1, 0.2, 0.5])
def test_mode_budget_keeps_its_budget(model: nn.Module, budget: float) -> None:
    report = convert(model, _batches(), budget=budget).report
    assert report.error is not None
    assert report.error <= budget
    for site in report.sites:
        assert site.converted is (site.reason is None)
        assert site.sensitivity is not None
        if not site.converted:
            assert site.reason == "over budget"


@pytest.mark.core
def test_mode_budget_converts_more_with_more_budget(model: nn.Module) -> None:
    counts = [convert(model, _batches(), budget=b).report.converted for b in (0.001, 0.15, 1.0)]
    assert counts[0] == 0
    assert counts[2] == len(SITES)
    assert counts == sorted(counts)


@pytest.mark.core
def test_mode_budget_measures_no_set_twice(
    model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    sets: list[frozenset[str]] = []
    calibrate = trials.calibrate

    def counted(*args: Any, convert: Any, refits: bool, **kwargs: Any) -> Any:
        if not refits:
            sets.append(frozenset(convert))
        return calibrate(*args, convert=convert, refits=refits, **kwargs)

    monkeypatch.setattr(trials, "calibrate", counted)
    report = convert(model, _batches(), budget=0.15).report
    assert len(sets) == len(set(sets))
    assert len(report.attempts) >= len(sets) - 1  # the isolated fits are no attempt


@pytest.mark.core
@pytest.mark.parametrize("metric", ["relative", "cosine", "kl", "top1"])
def test_mode_budget_keeps_its_budget_in_every_metric(model: nn.Module, metric: str) -> None:
    report = convert(model, _batches(), metric=metric, budget=0.05).report
    assert report.metric == metric
    assert report.error is not None
    assert report.error <= 0.05


@pytest.mark.core
def test_budget_that_the_report_samples_break_twice_is_an_error(
    model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    verify = trials.Trials.verify
    monkeypatch.setattr(
        trials.Trials,
        "verify",
        lambda self, graph: Measurement(0.9, 0.1, verify(self, graph).samples),
    )
    with pytest.raises(BudgetError) as caught:
        convert(model, _batches(4), budget=0.3)
    _assert_one_line(caught.value, "0.9", "0.3", "twice")


@pytest.mark.core
def test_budget_that_the_report_samples_break_once_is_planned_again(
    model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    verify, calibrate = trials.Trials.verify, trials.calibrate
    sets: list[frozenset[str]] = []
    counts: list[int] = []

    def worse_at_first(self: Any, graph: Any) -> Measurement:
        counts.append(sum(term.op is Op.DYT for term in graph.terms))
        found: Measurement = verify(self, graph)
        return replace(found, error=0.6) if len(counts) == 1 else found

    def counted(*args: Any, convert: Any, refits: bool, **kwargs: Any) -> Any:
        if not refits:
            sets.append(frozenset(convert))
        return calibrate(*args, convert=convert, refits=refits, **kwargs)

    monkeypatch.setattr(trials.Trials, "verify", worse_at_first)
    monkeypatch.setattr(trials, "calibrate", counted)
    report = convert(model, _batches(), budget=0.3).report
    assert len(counts) == 2
    assert report.converted == counts[1] < counts[0]
    assert report.error is not None
    assert report.error <= 0.15  # half the budget: the report samples were twice as bad
    assert report.budget == 0.3
    assert len(sets) == len(set(sets))  # what the first plan measured is not measured again
    assert len(report.attempts) >= len(sets) - 1


@pytest.mark.core
@pytest.mark.parametrize(("standard_error", "plans"), [(0.0, 1), (0.05, 2)])
def test_budget_that_the_report_samples_leave_in_doubt_is_planned_again(
    model: nn.Module, monkeypatch: pytest.MonkeyPatch, standard_error: float, plans: int
) -> None:
    counts: list[int] = []

    def just_within(self: Any, graph: Any) -> Measurement:
        counts.append(sum(term.op is Op.DYT for term in graph.terms))
        return Measurement(0.29, standard_error, 32)

    monkeypatch.setattr(trials.Trials, "verify", just_within)
    report = convert(model, _batches(), budget=0.3).report
    assert len(counts) == plans
    assert report.error == 0.29  # in doubt, and within: twice is enough
    assert report.converted == counts[-1] <= counts[0]


@pytest.mark.core
def test_budget_in_doubt_that_a_second_plan_breaks_is_that_of_the_first(
    model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts: list[int] = []

    def worse_at_last(self: Any, graph: Any) -> Measurement:
        counts.append(sum(term.op is Op.DYT for term in graph.terms))
        return Measurement(0.29 if len(counts) == 1 else 0.31, 0.05, 32)

    monkeypatch.setattr(trials.Trials, "verify", worse_at_last)
    report = convert(model, _batches(), budget=0.3).report
    assert len(counts) == 2
    assert (report.error, report.converted) == (0.29, counts[0])


class Fragile(Transformer):
    """Gives NaN where a sample is far out."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + torch.log(1000 - x.abs().amax((1, 2), keepdim=True)) * 0


@pytest.mark.core
def test_error_that_is_nan_does_not_keep_the_budget() -> None:
    model, batches = Fragile().eval(), [(x.clone(),) for (x,) in _batches(4)]
    numbered = [(torch.full_like(x, 0),) for (x,) in batches]
    for number, (x,) in enumerate(numbered):
        x += torch.arange(16 * number, 16 * number + 16)[:, None, None]
    graph = convert(model, example=batches[0]).original
    place = int(next(iter(split(graph, numbered, 0).report))["x"][0, 0, 0])
    batches[place // 16][0][place % 16] = 2000.0  # a sample of the report part
    with pytest.raises(BudgetError) as caught:
        convert(model, batches, budget=0.3)
    _assert_one_line(caught.value, "nan", "0.3", "NaN or infinity")


# Frontier


@pytest.mark.core
@pytest.mark.parametrize("mode", ["budget", "all"])
def test_frontier_measures_each_number_of_sites_as_a_plan_would(
    model: nn.Module, mode: str
) -> None:
    report = convert(model, _batches(), mode=mode, budget=0.15, frontier=True).report
    assert [point.sites for point in report.frontier] == [1, 2, 3, 4]
    alone = {site.name: site.sensitivity for site in report.sites}
    added = [name for point in report.frontier for name in point.added]
    assert added == sorted(SITES, key=lambda name: alone[name] or math.inf)
    measured = {point.sites: point.error for point in report.frontier}
    whole = convert(model, _batches(), budget=1e6).report
    tried = [error for count, error in whole.attempts if count == 4]
    assert measured[4] == min(tried)  # fitted together, on the plan samples
    assert all(error >= measured[4] for count, error in report.attempts if count == 4)


@pytest.mark.core
def test_frontier_estimates_savings_of_every_point(model: nn.Module) -> None:
    report = convert(model, _batches(), mode="all", frontier=True).report
    assert [point.kernels_saved for point in report.frontier][-1] <= len(SITES)
    saved = [point.traffic_bytes_saved for point in report.frontier]
    assert saved == sorted(saved)
    # Each site that stands behind the residual add saves one read of x; the last the write too.
    assert saved[-1] in {4 * WIDTH * TOKENS * reads for reads in (4, 5)}
    assert report.to_dict()["frontier"][0]["added"] == report.frontier[0].added


@pytest.mark.core
def test_frontier_keeps_what_was_excluded(model: nn.Module) -> None:
    report = convert(model, _batches(), mode="all", exclude="^norm$", frontier=True).report
    assert [point.sites for point in report.frontier] == [1, 2, 3]
    assert all("norm" not in point.added for point in report.frontier)


@pytest.mark.core
def test_frontier_is_not_measured_unasked_and_refused_where_nothing_is_converted(
    model: nn.Module, everything: Conversion
) -> None:
    assert everything.report.frontier == ()
    with pytest.raises(OptionError) as caught:
        convert(model, example=(_inputs(),), frontier=True)
    _assert_one_line(caught.value, "frontier", "'budget' or 'all'")


# A metric of one's own


def _labels(model: nn.Module) -> Tensor:
    return torch.cat([_call(model, *batch) for batch in _batches()]).argmax(-1)


@pytest.mark.core
@pytest.mark.parametrize("source", ["torch", "onnx"])
def test_own_metric_counts_in_budget_and_report(
    source: str, model: nn.Module, onnx_file: Path
) -> None:
    labels = _labels(model)
    inputs = torch.cat([x for (x,) in _batches()])

    def agreement(output: Any, given: Any, places: Any) -> Tensor:
        (x,) = given.values()
        assert torch.equal(torch.from_numpy(x), inputs[places])
        found: Tensor = (torch.from_numpy(output).argmax(-1) == labels[places]).float().mean(1)
        return found

    start: Any = model if source == "torch" else onnx_file
    batches: Any = _batches() if source == "torch" else [(x.numpy(),) for (x,) in _batches()]
    own = convert(start, batches, metric=agreement, budget=0.08).report
    top1 = convert(start, batches, metric="top1", mode="all").report
    every = convert(start, batches, metric=agreement, mode="all").report
    assert own.metric == "agreement"
    assert own.error is not None
    assert own.error <= 0.08
    assert every.error == pytest.approx(top1.error)  # the original agrees with itself everywhere
    assert every.standard_error == pytest.approx(top1.standard_error)


@pytest.mark.core
def test_compare_takes_a_metric_of_ones_own(model: nn.Module, everything: Conversion) -> None:
    def nearness(output: Any, given: Any, places: Any) -> Any:
        return -abs(output).mean((1, 2)) if len(places) else ()

    found = compare(model, everything.model, _batches(), metric=nearness)
    x = torch.cat([x for (x,) in _batches()])
    expected = _call(everything.model, x).abs().mean() - _call(model, x).abs().mean()
    assert found.error == pytest.approx(float(expected), rel=1e-3)


@pytest.mark.core
def test_metric_that_is_no_function_and_no_name_is_refused(model: nn.Module) -> None:
    with pytest.raises(OptionError) as caught:
        convert(model, _batches(), metric=3)  # type: ignore[arg-type]
    _assert_one_line(caught.value, "metric is 3", "top1", "or a function")


@pytest.mark.core
def test_recover_refuses_a_metric_of_ones_own(model: nn.Module) -> None:
    def score(output: Any, given: Any, places: Any) -> Any:
        return -abs(output).mean((1, 2))

    result = convert(model, _batches(), mode="all", metric=score, fit="diagonal")
    for metric in (None, score):
        with pytest.raises(OptionError) as caught:
            dyt_compile.recover(result, _batches(), steps=1, metric=metric)  # type: ignore[arg-type]
        _assert_one_line(caught.value, "score", "allowed: relative, cosine, kl, top1")


# Exclude


@pytest.mark.core
@pytest.mark.parametrize(
    ("exclude", "kept"),
    [
        (["^norm$"], ["norm"]),
        (["blocks"], SITES[:3]),
        ([r"\.1\.", r"\.2\."], SITES[1:3]),
        (["norm"], SITES),
        (["no such site"], []),
        ((), []),
    ],
    ids=str,
)
def test_excluded_sites_keep_their_norm(
    model: nn.Module, exclude: list[str], kept: list[str]
) -> None:
    result = convert(model, _batches(2), mode="all", exclude=exclude)
    assert [site.name for site in result.report.sites if not site.converted] == kept
    assert {site.reason for site in result.report.sites if not site.converted} <= {"excluded"}
    left = [site.name for site in inspect(result.model, (_inputs(),)).sites]
    assert len(left) == len(SITES)


@pytest.mark.core
def test_excluded_sites_say_so_in_mode_budget(model: nn.Module) -> None:
    report = convert(model, _batches(4), budget=1.0, exclude=["blocks"]).report
    assert {s.name: s.reason for s in report.sites} == {
        **dict.fromkeys(SITES[:3], "excluded"), "norm": None
    }  # fmt: skip


@pytest.mark.core
def test_exclude_given_as_a_string_is_one_expression_or_refused(model: nn.Module) -> None:
    try:
        report = convert(model, _batches(2), mode="all", exclude="ln_o").report
    except OptionError:
        return
    assert report.converted == len(SITES)


# Misuse


@pytest.mark.core
@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"mode": "some"}, ["mode", "'some'", "exact, budget, all"]),
        ({"mode": ""}, ["mode", "exact, budget, all"]),
        ({"budget": 0.0}, ["budget", "0.0", "above 0"]),
        ({"budget": -0.1}, ["budget", "-0.1", "above 0"]),
        ({"budget": math.nan}, ["budget", "nan", "above 0"]),
        ({"metric": "mse"}, ["metric", "'mse'", "relative, cosine, kl, top1"]),
        ({"exclude": ["["]}, ["exclude", "'['"]),
        ({"output": "logits"}, ["output", "'logits'", "output"]),
        ({"output": 0}, ["output", "0", "output"]),
        ({"mode": 1}, ["mode", "1", "exact, budget, all"]),
        ({"exclude": None}, ["exclude"]),
        ({"exclude": [3]}, ["exclude"]),
        ({"budget": "0.1"}, ["budget", "above 0"]),
        ({"budget": None}, ["budget", "above 0"]),
        ({"seed": -1}, ["seed", "-1"]),
        ({"seed": "a"}, ["seed", "'a'"]),
        ({"provider": "npu"}, ["provider", "'npu'"]),
    ],
    ids=str,
)  # fmt: skip
def test_option_that_is_not_allowed_is_refused_in_one_line(
    model: nn.Module, options: dict[str, Any], told: list[str]
) -> None:
    with pytest.raises(OptionError) as caught:
        convert(model, _batches(2), **options)
    _assert_one_line(caught.value, *told)


@pytest.mark.core
@pytest.mark.parametrize("mode", ["budget", "all"])
def test_lossy_mode_without_data_is_refused(model: nn.Module, mode: str) -> None:
    with pytest.raises(OptionError) as caught:
        convert(model, mode=mode, example=(_inputs(),))
    _assert_one_line(caught.value, f"'{mode}'", "data", "'exact'")


@pytest.mark.core
@pytest.mark.parametrize("thing", [7, None, "weights.bin", {"x": 1}, "x.safetensors"], ids=str)
def test_model_of_another_type_is_refused(thing: Any, tmp_path: Path) -> None:
    if isinstance(thing, str):
        thing = tmp_path / thing
        thing.touch()
    with pytest.raises(OptionError) as caught:
        convert(thing, _batches(2))
    _assert_one_line(caught.value, ".onnx", ".pt2")


@pytest.mark.core
@pytest.mark.parametrize("name", ["model.onnx", "model.pt2"])
def test_model_file_that_is_missing_or_damaged_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(CaptureError, match="does not exist"):
        inspect(tmp_path / name)
    (tmp_path / name).write_bytes(b"garbage")
    with pytest.raises(CaptureError) as caught:
        inspect(tmp_path / name)
    _assert_one_line(caught.value, name)


@pytest.mark.core
def test_module_without_an_example_is_refused(model: nn.Module) -> None:
    with pytest.raises(OptionError, match="needs an example"):
        inspect(model)


@pytest.mark.core
@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")
def test_script_module_is_refused(model: nn.Module) -> None:
    scripted = torch.jit.trace(model, (_inputs(),))
    with pytest.raises(DytCompileError):
        convert(scripted, _batches(2))


class Branching(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + 1 if float(x.sum()) > 0 else x


@pytest.mark.core
def test_module_that_cannot_be_traced_is_refused_in_one_line() -> None:
    with pytest.raises(CaptureError) as caught:
        inspect(Branching(), (_inputs(),))
    _assert_one_line(caught.value, "torch.export cannot trace Branching")


@pytest.mark.core
def test_module_that_cannot_be_traced_keeps_its_mode() -> None:
    module = Branching().train()
    with pytest.raises(CaptureError):
        inspect(module, (_inputs(),))
    assert module.training


@pytest.mark.core
@pytest.mark.parametrize(
    "batches",
    [
        lambda: (batch for batch in _batches(4)),
        lambda: [(_inputs(3),)],
        lambda: [(_inputs(), _inputs())] * 4,
        lambda: [{"pixels": _inputs()}] * 4,
        lambda: [(_inputs(),), (_inputs()[0],)],
        pytest.param(
            lambda: _inputs(),
            id="tensor",
        ),
        lambda: {"x": _inputs()},
        lambda: ["ab", "cd"],
        lambda: 5,
        lambda: [{"x": "text"}] * 4,
        list,
        lambda: [(_inputs().double(),), *_batches(3)],
        lambda: [*_batches(3), (_inputs().double(),)],
        pytest.param(
            lambda: [*_batches(3), (_inputs()[..., :7],)],
            id="width",
        ),
    ],
)  # fmt: skip
def test_batches_that_do_not_fit_a_module_are_refused_in_one_line(
    model: nn.Module, batches: Callable[[], Any]
) -> None:
    with pytest.raises(DytCompileError) as caught:
        convert(model, batches(), mode="all")
    _assert_one_line(caught.value)


@pytest.mark.core
def test_data_without_batches_is_said_to_be_empty(model: nn.Module, onnx_file: Path) -> None:
    for given in (model, onnx_file):
        with pytest.raises(DataError, match="the data holds no batch"):
            convert(given, [])


@pytest.mark.core
@pytest.mark.parametrize(
    "batches",
    [
        lambda: iter(_batches(4)),
        lambda: [(_inputs(3),)],
        lambda: [(_inputs(), _inputs())] * 4,
        lambda: [{"pixels": _inputs()}] * 4,
        pytest.param(lambda: [(_inputs().double(),)] * 2, id="double"),
        pytest.param(lambda: [(_inputs()[..., :7],)] * 2, id="width"),
        pytest.param(lambda: [(_inputs()[0],)] * 2, id="rank"),
    ],
)
def test_batches_that_do_not_fit_an_onnx_model_are_refused_in_one_line(
    onnx_file: Path, batches: Callable[[], Any]
) -> None:
    with pytest.raises(DataError) as caught:
        convert(onnx_file, batches(), mode="all")
    _assert_one_line(caught.value)


@pytest.mark.core
@pytest.mark.parametrize("place", [0, 1])
def test_batch_of_unequal_numbers_of_samples_is_refused_in_one_line(place: int) -> None:
    batches = [(_inputs(), SCALE)] * 2
    batches[place] = (_inputs(), SCALE[:5])
    with pytest.raises(DytCompileError) as caught:
        convert(Conditioned().eval(), batches, mode="all")
    _assert_one_line(caught.value)


@pytest.mark.core
def test_unknown_provider_of_an_onnx_model_is_refused(onnx_file: Path) -> None:
    with pytest.raises(OptionError) as caught:
        convert(onnx_file, _batches(2), provider="npu")
    _assert_one_line(caught.value, "provider", "'npu'", "cpu")


# Models in


@pytest.mark.core
@pytest.mark.parametrize("kind", ["module", "training", "program", "pt2", "graph_module"])
def test_torch_models_of_every_kind_convert_alike(
    kind: str, model: nn.Module, everything: Conversion, tmp_path: Path
) -> None:
    given: Any = copy.deepcopy(model)
    if kind == "training":
        given.train()
    elif kind == "graph_module":
        given = torch.fx.symbolic_trace(given)
    elif kind in ("program", "pt2"):
        given = torch.export.export(
            given, (_inputs(4),), dynamic_shapes=({0: torch.export.Dim("batch")},)
        )
    if kind == "pt2":
        torch.export.save(given, tmp_path / "model.pt2")
        given = tmp_path / "model.pt2"
    result = convert(given, _batches(), mode="all")
    assert result.report.error == pytest.approx(everything.report.error, rel=1e-4)
    assert [site.name for site in result.report.sites] == SITES
    x = _inputs(3, seed=50)
    torch.testing.assert_close(
        _call(result.model, x), _call(everything.model, x), atol=1e-4, rtol=1e-4
    )


@pytest.mark.core
@pytest.mark.parametrize("kind", ["path", "text", "model"])
def test_onnx_models_of_every_kind_convert_as_torch_does(
    kind: str, onnx_file: Path, everything: Conversion
) -> None:
    given: Any = {"path": onnx_file, "text": str(onnx_file)}.get(kind) or ir.load(onnx_file)
    result = convert(given, _batches(), mode="all")
    assert isinstance(result.model, ir.Model)
    assert result.report.error == pytest.approx(everything.report.error, rel=1e-3)
    assert [site.name for site in result.report.sites] == SITES


@pytest.mark.core
def test_onnx_model_in_memory_is_left_alone(onnx_file: Path) -> None:
    given = ir.load(onnx_file)
    before = ir.serde.serialize_model(given).SerializeToString(deterministic=True)
    convert(given, _batches(2), mode="all")
    assert ir.serde.serialize_model(given).SerializeToString(deterministic=True) == before


@pytest.mark.core
@pytest.mark.parametrize("kind", ["list", "dict", "numpy", "numpy-dict", "arguments", "mixed"])
def test_batches_of_every_kind_give_the_same(
    kind: str, model: nn.Module, everything: Conversion
) -> None:
    make: dict[str, Callable[[Tensor], Any]] = {
        "list": lambda x: [x],
        "dict": lambda x: {"x": x},
        "numpy": lambda x: (x.numpy(),),
        "numpy-dict": lambda x: {"x": x.numpy()},
        "arguments": lambda x: ((), {"x": x}),
        "mixed": lambda x: (x,) if x[0, 0, 0] > 0 else {"x": x},
    }
    result = convert(model, [make[kind](x) for (x,) in _batches()], mode="all")
    assert result.report.error == pytest.approx(everything.report.error, rel=1e-6)


@pytest.mark.core
def test_batches_may_be_a_data_loader(model: nn.Module, everything: Conversion) -> None:
    data = torch.utils.data.TensorDataset(torch.cat([x for (x,) in _batches()]))
    loader = torch.utils.data.DataLoader(data, batch_size=24)
    result = convert(model, loader, mode="all")
    assert result.report.error == pytest.approx(everything.report.error, rel=1e-4)


@pytest.mark.core
@pytest.mark.parametrize("size", [1, 3, 128])
def test_batches_of_any_size_give_the_same(
    size: int, model: nn.Module, everything: Conversion
) -> None:
    together = torch.cat([x for (x,) in _batches()])
    result = convert(model, [(x,) for x in together.split(size)], mode="all")
    assert result.report.error == pytest.approx(everything.report.error, rel=1e-3)
    assert _call(result.model, _inputs(1)).shape == (1, TOKENS, 4)


class Conditioned(Transformer):
    """Takes more than it needs."""

    def forward(
        self,
        x: Tensor,
        scale: Tensor | None = None,
        shift: Tensor | None = None,
        flip: bool = False,
    ) -> Tensor:
        if scale is not None:
            x = x * scale
        if shift is not None:
            x = x + shift
        return super().forward(x.flip(1) if flip else x)


SCALE, SHIFT = torch.full((16, TOKENS, WIDTH), 2.0), torch.full((16, TOKENS, WIDTH), -0.5)


def _conditioned(kind: str) -> Any:
    x = _inputs()
    return {
        "defaults": {"x": x},
        "named": {"x": x, "scale": SCALE, "shift": SHIFT},
        "reversed": {"shift": SHIFT, "scale": SCALE, "x": x},
        "second": {"x": x, "shift": SHIFT},
        "none": {"x": x, "scale": None, "shift": SHIFT},
        "flag": {"x": x, "scale": SCALE, "flip": True},
        "both": ((x,), {"scale": SCALE, "shift": SHIFT}),
        "both-reversed": ((x,), {"shift": SHIFT, "scale": SCALE}),
        "positional": (x, SCALE, SHIFT),
    }[kind]


@pytest.mark.core
@pytest.mark.parametrize(
    "kind",
    [
        "defaults", "named", "reversed", "second", "none", "flag", "both", "both-reversed",
        "positional",
    ],
)  # fmt: skip
def test_arguments_with_defaults_reach_the_model(kind: str) -> None:
    model = Conditioned().eval()
    batch = _conditioned(kind)
    result = convert(model, [batch] * 2, mode="all")
    args, kwargs = batch if isinstance(batch, tuple) and isinstance(batch[0], tuple) else ((), {})
    if isinstance(batch, dict):
        kwargs = batch
    elif not kwargs:
        args = batch
    expected = _call(model, *args, **kwargs)
    found = _call(result.model, *args, **kwargs)
    assert result.report.error is not None
    assert _relative(expected, found) == pytest.approx(result.report.error, rel=0.3)
    exact = convert(model, example=batch)
    torch.testing.assert_close(_call(exact.model, *args, **kwargs), expected)


@pytest.mark.core
def test_keyword_arguments_may_come_in_any_order() -> None:
    graph = convert(Conditioned().eval(), example=_conditioned("both")).original
    batch = graph.bind(_conditioned("both-reversed"))
    assert torch.equal(batch["scale"], SCALE)
    assert torch.equal(batch["shift"], SHIFT)


class Several(Transformer):
    def forward(self, x: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
        logits = super().forward(x)
        return {"ids": logits.argmax(-1), "logits": logits, "pooled": logits.mean(1)}


@pytest.mark.core
@pytest.mark.parametrize(("output", "measured"), [(None, "logits"), ("pooled", "pooled")])
def test_error_is_measured_at_the_chosen_output(output: str | None, measured: str) -> None:
    result = convert(Several().eval(), _batches(2), mode="all", output=output)
    assert result.report.output == measured
    assert list(_call(result.model, _inputs())) == ["ids", "logits", "pooled"]


class Scored(Transformer):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).mean((1, 2))


@pytest.mark.core
def test_model_with_one_number_a_sample_is_converted() -> None:
    assert convert(Scored().eval(), _batches(2), mode="all").report.error


@pytest.mark.core
def test_model_without_norms_is_returned_as_it_is() -> None:
    model = nn.Sequential(nn.Linear(WIDTH, 3), nn.ReLU()).eval()
    for mode in ("exact", "budget", "all"):
        result = convert(model, _batches(2), mode=mode)
        assert result.report.sites == ()
        assert torch.equal(_call(result.model, _inputs()), _call(model, _inputs()))
        assert result.report.error in (None, 0.0)


@pytest.mark.core
def test_model_in_bfloat16_is_converted() -> None:
    model = Transformer().eval().bfloat16()
    batches = [(x.bfloat16(),) for (x,) in _batches()]
    result = convert(model, batches, mode="all")
    found = _call(result.model, batches[0][0])
    assert found.dtype is torch.bfloat16
    expected = _call(model, batches[0][0])
    assert result.report.error == pytest.approx(_relative(expected.float(), found.float()), rel=0.2)


# The original, and the model that comes out


@pytest.mark.core
@pytest.mark.parametrize("training", [True, False])
def test_original_module_is_left_alone(training: bool) -> None:
    model = Transformer().train(training)
    model.blocks[1].eval()
    modes = [part.training for part in model.modules()]
    before = copy.deepcopy(model.state_dict())
    names = [name for name, _ in model.named_modules()]
    result = convert(model, _batches(2), mode="all")
    _call(result.model, _inputs())
    assert [part.training for part in model.modules()] == modes
    assert [name for name, _ in model.named_modules()] == names
    assert not any(parameter.grad is not None for parameter in model.parameters())
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)


def _fresh(model: nn.Module) -> nn.Module:
    found = convert(copy.deepcopy(model), _batches(2), mode="all").model
    assert isinstance(found, nn.Module)
    return found


@pytest.mark.core
def test_converted_module_shares_the_weights_that_it_keeps(model: nn.Module) -> None:
    result = convert(model, _batches(2), mode="all")
    own, original = dict(result.model.named_parameters()), dict(model.named_parameters())
    weight = "blocks.0.down.weight"
    assert own[weight].data_ptr() == original[weight].data_ptr()
    assert own["head.weight"].data_ptr() != original["head.weight"].data_ptr()  # took a matrix up
    assert not any("norm.weight" in name or "norm.bias" in name for name in own)


@pytest.mark.core
def test_converted_module_saves_and_loads_its_state(model: nn.Module, tmp_path: Path) -> None:
    converted = _fresh(model)
    save_file(converted.state_dict(), tmp_path / "weights.safetensors")
    x = _inputs()
    expected = _call(converted, x)
    other = copy.deepcopy(converted)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    other.load_state_dict(load_file(tmp_path / "weights.safetensors"))
    assert torch.equal(_call(other, x), expected)


@pytest.mark.core
def test_converted_module_names_its_parameters_by_site(everything: Conversion) -> None:
    names = set(everything.model.state_dict())
    assert {site.fit for site in everything.report.sites} == {"full"}
    assert {f"{site}.alpha" for site in SITES} <= names
    assert not any(name.endswith(("gamma", "beta")) for name in names)


def test_converted_module_names_gamma_and_beta_of_diagonal_fits(model: nn.Module) -> None:
    result = convert(model, _batches(), mode="all", fit="diagonal", fold=False)
    names = set(result.model.state_dict())
    for site in SITES:
        assert {f"{site}.{name}" for name in ("alpha", "gamma", "beta")} <= names


def test_convert_with_an_unknown_fit_is_refused(model: nn.Module) -> None:
    with pytest.raises(OptionError, match="fit is 'best'; allowed: auto, diagonal, full"):
        convert(model, _batches(2), mode="all", fit="best")


@pytest.mark.core
@pytest.mark.parametrize("strict", [False, True])
def test_converted_module_is_exported_again(everything: Conversion, strict: bool) -> None:
    program = torch.export.export(
        everything.model, (_inputs(4),), strict=strict,
        dynamic_shapes=({0: torch.export.Dim("batch")},),
    )  # fmt: skip
    x = _inputs(7, seed=3)
    torch.testing.assert_close(_call(program.module(), x), _call(everything.model, x))


@pytest.mark.core
def test_converted_module_is_compiled(everything: Conversion) -> None:
    compiled = torch.compile(everything.model, backend="aot_eager", fullgraph=True)
    for samples in (4, 7):
        x = _inputs(samples, seed=3)
        torch.testing.assert_close(_call(compiled, x), _call(everything.model, x))


@pytest.mark.core
def test_converted_module_is_copied_and_moved(model: nn.Module) -> None:
    converted = _fresh(model)
    x = _inputs()
    expected = _call(converted, x)
    double = copy.deepcopy(converted).double()
    torch.testing.assert_close(_call(double, x.double()).float(), expected, atol=1e-4, rtol=1e-4)
    assert torch.equal(_call(converted, x), expected)


@pytest.mark.core
def test_converted_module_is_fine_tuned(model: nn.Module) -> None:
    converted = _fresh(model)
    assert converted.train() is converted
    assert converted.training
    x, target = _inputs(), _call(model, _inputs())
    optimizer = torch.optim.Adam(converted.parameters(), lr=3e-3)
    losses = []
    for _ in range(30):
        loss = F.mse_loss(converted(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    for site in SITES:
        alpha = converted.get_parameter(f"{site}.alpha")
        assert alpha.grad is not None
        assert alpha.grad.abs().sum() > 0
    assert losses[-1] < 0.5 * losses[0]
    assert converted.eval() is converted
    assert not converted.training
    torch.testing.assert_close(_call(converted, x), _call(converted, x))


@pytest.mark.core
def test_converted_model_is_converted_again_without_loss(everything: Conversion) -> None:
    again = convert(everything.model, _batches(2))
    assert {site.kind for site in again.report.sites} == {"dyt"}
    x = _inputs()
    torch.testing.assert_close(_call(again.model, x), _call(everything.model, x))


# Models trained with DyT


@pytest.mark.core
def test_dyt_trained_model_in_mode_exact_is_lossless() -> None:
    model = Transformer(Dyt).eval()
    result = convert(model, example=(_inputs(),))
    assert {site.kind for site in result.report.sites} == {"dyt"}
    assert result.report.converted == len(SITES)
    assert result.report.error is None
    targets = [str(node.target) for node in result.model.graph.nodes]
    assert sum(target.startswith("dyt.DyT") for target in targets) == len(SITES)
    assert not any("tanh" in target for target in targets)
    for samples in (1, 6):
        x = _inputs(samples, seed=8)
        torch.testing.assert_close(_call(result.model, x), _call(model, x), atol=1e-6, rtol=1e-6)


@pytest.mark.core
def test_dyt_trained_model_keeps_any_budget() -> None:
    result = convert(Transformer(Dyt).eval(), _batches(2), budget=1e-6)
    assert result.report.converted == len(SITES)
    assert result.report.error is not None
    assert result.report.error <= 1e-6


@pytest.mark.core
def test_model_of_both_kinds_has_its_norms_calibrated() -> None:
    kinds: Iterator[Callable[[int], nn.Module]] = iter([Dyt, nn.LayerNorm, Dyt, nn.RMSNorm])
    model = Transformer(lambda width: next(kinds)(width)).eval()
    exact = convert(model, example=(_inputs(),))
    assert [site.converted for site in exact.report.sites] == [True, False, True, False]
    everything = convert(model, _batches(2), mode="all")
    assert everything.report.converted == 4
    assert everything.calibration is not None
    assert list(everything.calibration.fits) == [SITES[1], SITES[3]]


# Compare


@pytest.mark.core
def test_compare_measures_all_samples(model: nn.Module, everything: Conversion) -> None:
    found = compare(model, everything.model, _batches())
    x = torch.cat([x for (x,) in _batches()])
    assert found.error == pytest.approx(_relative(_call(model, x), _call(everything.model, x)))
    assert found.samples == len(x)


@pytest.mark.core
def test_compare_of_a_model_with_itself_is_zero(model: nn.Module, onnx_file: Path) -> None:
    for metric in ("relative", "cosine", "kl", "top1"):
        found = compare(onnx_file, onnx_file, _batches(2), metric=metric)
        assert found.error == pytest.approx(0, abs=1e-6)
    assert compare(model, model, _batches(2)).error == 0


@pytest.mark.core
def test_compare_refuses_an_unknown_metric(model: nn.Module) -> None:
    with pytest.raises(OptionError, match="metric is 'mse'"):
        compare(model, model, _batches(2), metric="mse")


@pytest.mark.core
@pytest.mark.parametrize("turned", [False, True])
def test_compare_of_torch_with_its_onnx_export_is_small(
    model: nn.Module, onnx_file: Path, turned: bool
) -> None:
    pair: tuple[Any, Any] = (onnx_file, model) if turned else (model, onnx_file)
    assert compare(*pair, _batches(2)).error < 1e-5


@pytest.mark.core
def test_compare_takes_no_output_by_place_that_was_named(model: nn.Module, onnx_file: Path) -> None:
    with pytest.raises(OptionError, match="output is 'output'"):
        compare(model, onnx_file, _batches(2), output="output")


@pytest.mark.core
def test_compare_of_models_with_other_outputs_is_refused(model: nn.Module) -> None:
    other = copy.deepcopy(model)
    other.head = nn.Linear(WIDTH, 1)
    with pytest.raises(DytCompileError):
        compare(model, other, _batches(2))


# The digits example


@pytest.fixture(scope="module")
def digits() -> Iterator[ModuleType]:
    pytest.importorskip("sklearn")
    specification = importlib.util.spec_from_file_location("digits_model", EXAMPLE)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules["digits_model"] = module
    specification.loader.exec_module(module)
    yield module
    del sys.modules["digits_model"]


def test_digits_in_mode_budget_keep_their_budget(digits: ModuleType) -> None:
    model, _ = digits.load()
    batches, budget = list(digits.calibration())[:8], 0.08
    result = dyt_compile.convert(model, batches, budget=budget)
    report = result.report
    assert report.error is not None
    assert report.error <= budget
    assert 0 < report.converted < len(report.sites) == 9
    _, _, pixels, labels = digits.images()
    found = _call(result.model, pixels)
    original = _call(model, pixels)
    assert _relative(original, found) < 1.5 * budget  # images that convert never saw
    assert (found.argmax(1) == labels).float().mean() > 0.95


def test_digits_in_mode_all_report_what_it_cost(digits: ModuleType) -> None:
    model, _ = digits.load()
    batches = list(digits.calibration())[:8]
    result = dyt_compile.convert(model, batches, mode="all")
    assert result.report.converted == 9
    pixels = digits.images()[2]
    error = _relative(_call(model, pixels), _call(result.model, pixels))
    assert result.report.error == pytest.approx(error, rel=0.25)


# Mode all


@pytest.mark.core
def test_mode_all_fits_on_what_a_plan_would_have_been_measured_on(
    model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    fitted: list[int] = []
    calibrate = trials.calibrate

    def counted(*args: Any, **others: Any) -> dyt_compile.Calibration:
        fitted.append(args[2].samples)
        return calibrate(*args, **others)

    monkeypatch.setattr(trials, "calibrate", counted)
    report = convert(model, _batches(), mode="all").report
    total = sum(len(batch[0]) for batch in _batches())
    assert fitted == [round(0.75 * total)]
    assert report.samples == total - fitted[0]
