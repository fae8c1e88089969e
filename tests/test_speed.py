"""The speed benchmark: its arithmetic on made-up times, its smallest run, and what it writes."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("matplotlib")
pytest.importorskip("onnxruntime")

from benchmarks.matrix.drawn import weights
from benchmarks.speed import __main__ as speed
from benchmarks.speed.forms import (
    FOLDED,
    INT8,
    MODEL_FORMS,
    ORIGINAL,
    SITE_FORMS,
    Made,
    Model,
    Site,
    normal,
    with_affine,
)
from benchmarks.speed.pairs import Ratio, interleaved, ratio
from benchmarks.speed.peer import readers
from benchmarks.speed.runtimes import RUNTIMES
from benchmarks.speed.subjects import SUBJECTS, bert_base, llama_1b, model
from benchmarks.speed.table import BARS, PAIRS, Bar, found, render, terminal

FOUR = "DyT as four operators"
BARE = "no norm (the limit)"
AFFINE = "affine, folded"
PEER = "original norms, calibrated INT8"
AGAIN = "the original again"


class Clock:
    """A clock that only runs let go on."""

    def __init__(self) -> None:
        self.now = 0.0
        self.order: list[str] = []

    def __call__(self) -> float:
        return self.now

    def run(self, name: str, seconds: Callable[[], float]) -> Callable[[], None]:
        def run() -> None:
            self.order.append(name)
            self.now += seconds()

        return run


def test_forms_take_turns_in_both_orders_and_warm_ups_do_not_count() -> None:
    clock = Clock()
    slow = iter([9.0, 9.0, 9.0, 0.5, 1.0, 1.5])
    runs = {"a": clock.run("a", lambda: next(slow)), "b": clock.run("b", lambda: 0.25)}
    times = interleaved(runs, 3, clock=clock)
    assert clock.order[6:] == ["a", "b", "b", "a", "a", "b"]
    assert times == {"a": [500.0, 1000.0, 1500.0], "b": [250.0] * 3}


def test_ratio_is_of_pairs_so_that_drift_cancels() -> None:
    base = [1.0, 2.0, 4.0, 8.0]
    found = ratio([1.1 * each for each in base], base)
    assert (found.median, found.low, found.high) == pytest.approx((1.1, 1.1, 1.1))
    assert ratio([1.0, 3.0, 8.0], [1.0, 1.0, 2.0]).median == 3.0


def test_interval_holds_the_true_ratio_and_shrinks_with_the_pairs() -> None:
    random = np.random.default_rng(0)

    def drawn(pairs: int) -> Ratio:
        base, times = 1 + 0.05 * np.abs(random.standard_normal((2, pairs)))
        return ratio(1.2 * times, base)

    few, many = ([drawn(pairs) for _ in range(100)] for pairs in (30, 480))
    assert sum(found.low <= 1.2 <= found.high for found in few) >= 88
    widths = [np.mean([found.high - found.low for found in each]) for each in (few, many)]
    assert widths[1] < 0.35 * widths[0]
    assert all(found.low < found.median < found.high for found in few)


class Tiny(nn.Module):
    """A pre-norm block without attention, and a head behind a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(16)
        self.up = nn.Linear(16, 32)
        self.down = nn.Linear(32, 16)
        self.norm2 = nn.LayerNorm(16)
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.down(torch.relu(self.up(self.norm1(x))))
        y: Tensor = self.head(self.norm2(x))
        return y


def tiny() -> nn.Module:
    torch.manual_seed(0)
    return Tiny().eval().requires_grad_(False)


TINY = Model(tiny, lambda seed: (normal(2, 5, 16, seed=seed),))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Made], Path]:
    """Every form of the tiny model, and its file."""
    folder = tmp_path_factory.mktemp("forms")
    forms = {}
    for name, form in MODEL_FORMS.items():
        forms[name] = form(TINY)
        forms[name].write(folder / f"{name}.onnx", "any")
    return forms, folder


def output(forms: dict[str, Made], name: str) -> Tensor:
    module = forms[name].module
    assert module is not None
    y: Tensor = module(*forms[name].args)
    return y.detach()


def session_output(path: Path, args: tuple[Tensor, ...]) -> np.ndarray:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs()]
    feeds = {name: tensor.numpy() for name, tensor in zip(names, args, strict=True)}
    y: np.ndarray = session.run(None, feeds)[0]
    return y


def operators(path: Path) -> Counter[str]:
    return Counter(node.op_type for node in onnx.load(path).graph.node)


def test_forms_compute_what_they_are_called(made: tuple[dict[str, Made], Path]) -> None:
    forms, _ = made
    torch.testing.assert_close(output(forms, AGAIN), output(forms, ORIGINAL), rtol=0, atol=0)
    torch.testing.assert_close(output(forms, FOLDED), output(forms, FOUR), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(output(forms, FOUR), output(forms, ORIGINAL), atol=0.1)
    assert not torch.allclose(output(forms, BARE), output(forms, FOUR), atol=0.1)
    assert not torch.allclose(output(forms, AFFINE), output(forms, BARE), atol=1e-3)
    spelled = with_affine(TINY)(*forms[AFFINE].args).detach()
    torch.testing.assert_close(output(forms, AFFINE), spelled, rtol=1e-5, atol=1e-5)


def test_files_hold_what_the_forms_are_called(made: tuple[dict[str, Made], Path]) -> None:
    forms, folder = made
    kinds = {name: operators(folder / f"{name}.onnx") for name in forms}
    assert kinds[ORIGINAL]["LayerNormalization"] == 2
    assert kinds[FOUR]["Tanh"] == 2
    assert kinds[FOUR]["Mul"] == 4
    assert kinds[FOLDED]["DyTBare"] == 2
    for name in (BARE, AFFINE):
        assert kinds[name] == {"MatMul": 3, "Add": 4, "Relu": 1}
    for name, form in forms.items():
        if form.module is not None:
            y = session_output(folder / f"{name}.onnx", form.args)
            np.testing.assert_allclose(y, output(forms, name).numpy(), rtol=1e-4, atol=1e-5)


def test_peer_quantizes_exactly_what_reads_a_norm(made: tuple[dict[str, Made], Path]) -> None:
    forms, folder = made
    assert len(readers(folder / f"{ORIGINAL}.onnx")) == 2  # up and head, not down
    assert forms[PEER].module is None
    kinds = operators(folder / f"{PEER}.onnx")
    assert kinds["LayerNormalization"] == 2
    narrow = [
        tensor
        for tensor in onnx.load(folder / f"{PEER}.onnx").graph.initializer
        if tensor.data_type == onnx.TensorProto.INT8 and len(tensor.dims) == 2
    ]
    assert sorted(tuple(tensor.dims) for tensor in narrow) == [(16, 4), (16, 32)]
    y = session_output(folder / f"{PEER}.onnx", forms[PEER].args)
    exact = output(forms, ORIGINAL).numpy()
    error = np.linalg.norm(y - exact) / np.linalg.norm(exact)
    assert 0 < error < 0.05


@pytest.mark.parametrize("name", SITE_FORMS)
def test_forms_of_a_site_compute_their_formula(name: str) -> None:
    site = Site(6, 8, torch.float32)
    form = SITE_FORMS[name](site)
    x, residual = site.example()
    assert len(form.args) == (2 if name.startswith(("residual", "bare")) else 1)
    total = x + residual if len(form.args) == 2 else x
    expected = {
        "add": lambda: total,
        "LayerNorm": lambda: nn.functional.layer_norm(total, (8,)),
        "RMSNorm": lambda: total * (total.square().mean(-1, keepdim=True) + 1e-6).rsqrt(),
        "DyT": lambda: torch.tanh(0.5 * total),
    }[name.split()[-1]]()
    assert form.module is not None
    torch.testing.assert_close(form.module(*form.args).detach(), expected)


SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}


@pytest.mark.parametrize(
    ("build", "inputs", "kept"),
    [
        pytest.param(
            partial(bert_base, **SMALL, num_attention_heads=2, vocab_size=99),
            lambda seed: (torch.full((1, 6), seed + 1),),
            3,  # all feed the residual, but the last, which is the output
            id="bert",
        ),
        pytest.param(
            partial(llama_1b, **SMALL, num_attention_heads=2, num_key_value_heads=1),
            lambda seed: (normal(1, 6, 32, seed=seed),),
            1,  # the last is the output
            id="llama",
        ),
    ],
)
def test_forms_of_the_other_models_keep_what_cannot_fold(
    build: Callable[[], nn.Module],
    inputs: Callable[[int], tuple[Tensor]],
    kept: int,
    tmp_path: Path,
) -> None:
    pytest.importorskip("transformers")
    of = Model(weights(build), inputs)
    with torch.no_grad():
        forms = {name: MODEL_FORMS[name](of) for name in (FOUR, FOLDED, AFFINE, BARE)}
        torch.testing.assert_close(output(forms, FOLDED), output(forms, FOUR), rtol=1e-4, atol=1e-4)
    names = {}
    for name in (FOLDED, AFFINE, BARE):
        forms[name].write(tmp_path / f"{name}.onnx", "any")
        names[name] = operators(tmp_path / f"{name}.onnx")
        y = session_output(tmp_path / f"{name}.onnx", forms[name].args)
        np.testing.assert_allclose(y, output(forms, name).numpy(), rtol=1e-3, atol=1e-4)
    whole = names[FOLDED]["DyT"] + names[FOLDED]["DyTScale"]
    assert whole == kept
    assert whole + names[FOLDED]["DyTBare"] == 3
    assert names[AFFINE]["Mul"] - names[BARE]["Mul"] == kept


def as_array(result: Any) -> np.ndarray:
    """The first output, from what a runtime holds it in."""
    if isinstance(result, Tensor):
        return result.detach().numpy()
    first = result[0]
    y: np.ndarray = first if isinstance(first, np.ndarray) else first.numpy()
    return y


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_runtimes_run_a_form(made: tuple[dict[str, Made], Path], runtime: str) -> None:
    about = RUNTIMES[runtime]
    if not about.installed:
        pytest.skip(f"{about.package} is not installed")
    forms, folder = made
    for name in (ORIGINAL, FOLDED):
        source: Any = forms[name].module
        if about.reads_files:
            source = folder / f"{name}-{runtime}.onnx"
            forms[name].write(source, runtime)
        run = about.load(source, forms[name].args, 1)
        for _ in range(2):
            y = as_array(run())
            np.testing.assert_allclose(y, output(forms, name).numpy(), rtol=1e-4, atol=1e-5)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    """Runs the benchmark on the tiny model, eager and in ONNX Runtime, and gives its results."""
    subjects = {"tiny": model("A tiny model", TINY)}
    few = {name: RUNTIMES[name] for name in ("eager", "onnxruntime")}
    for module in ("__main__", "bench", "table", "picture"):
        part = sys.modules[f"benchmarks.speed.{module}"]
        for name, value in (("SUBJECTS", subjects), ("RUNTIMES", few)):
            if hasattr(part, name):
                monkeypatch.setattr(part, name, value)
    monkeypatch.setattr(speed, "hold_memory", lambda: None)  # of this whole process, for good
    files = ["--results", str(tmp_path / "found.json"), "--page", str(tmp_path / "found.md")]

    def main(*options: str) -> dict[str, Any]:
        command = ["speed", "--pairs", "2", "--threads", "1"]
        monkeypatch.setattr(sys, "argv", [*command, *files, *options])
        speed.main()
        results: dict[str, Any] = json.loads((tmp_path / "found.json").read_text())
        return results

    return main


def test_smallest_run_times_every_form_and_writes(
    run: Callable[..., dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results = run()
    told = results["subjects"]["tiny"]
    assert list(told) == ["eager", "onnxruntime"]
    for runtime, cells in told.items():
        assert [ORIGINAL, *cells] == list(MODEL_FORMS)
        for name, cell in cells.items():
            if runtime == "eager" and name in (PEER, INT8):
                assert cell["times_ms"] == {}
                assert "a file" in cell["reasons"][name]
                continue
            assert list(cell["times_ms"]) == [ORIGINAL, name]
            assert all(len(times) == 2 and min(times) > 0 for times in cell["times_ms"].values())
            value = found(results, "tiny", runtime, name, ORIGINAL)
            pairs = np.divide(cell["times_ms"][name], cell["times_ms"][ORIGINAL])
            assert value is not None
            assert value.median == pytest.approx(np.median(pairs))
    (about,) = results["runs"].values()
    assert about["pairs"] == 2
    assert about["threads"] == 1
    page = (tmp_path / "found.md").read_text(encoding="utf-8")
    assert page == render(results)
    assert "A tiny model" in page
    assert "<svg" in (tmp_path / "found.svg").read_text()
    assert "torch eager" in capsys.readouterr().out


def test_finished_turns_stay_and_others_are_made_anew(
    run: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []

    def counted(self: Any, turns: Any) -> Any:
        for turn in turns:
            done.append(f"{turn.runtime}/{turn.name}")
            yield turn, _cell({ORIGINAL: [2.0], turn.name: [1.0]})

    monkeypatch.setattr(speed.Bench, "cells", counted)
    run("--only", "eager/(folded|no)")
    assert done == [f"eager/{FOLDED}", f"eager/{BARE}"]
    run("--only", f"eager/{FOLDED}")
    assert len(done) == 2
    results = run("--only", "tiny/.*/folded")
    assert done[2:] == [f"onnxruntime/{FOLDED}"]
    assert list(results["subjects"]["tiny"]["eager"]) == [FOLDED, BARE]
    results = run("--only", f"eager/{FOLDED}", "--pairs", "3")
    assert done[3:] == [f"eager/{FOLDED}"]
    assert sorted(about["pairs"] for about in results["runs"].values()) == [2, 3]


def test_killed_run_keeps_the_turns_before(
    run: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def killed(self: Any, turns: Any) -> Any:
        yield turns[0], _cell({ORIGINAL: [2.0], turns[0].name: [1.0]})
        raise KeyboardInterrupt

    monkeypatch.setattr(speed.Bench, "cells", killed)
    with pytest.raises(KeyboardInterrupt):
        run()
    kept = json.loads((tmp_path / "found.json").read_text())
    assert list(kept["subjects"]["tiny"]["eager"]) == [AGAIN]


def _cell(times: dict[str, list[float]], **more: Any) -> dict[str, Any]:
    return {"times_ms": times, "reasons": {}, "others": 0.0, **more}


def _results(times: dict[str, list[float]], subject: str = "vit-b", **more: Any) -> dict[str, Any]:
    name = "all" if SUBJECTS[subject].together else FOLDED
    cell = _cell(times, run="1", **more)
    return {
        "runs": {"1": {"torch": "2", "threads": 2}},
        "subjects": {subject: {"inductor": {name: cell}}},
    }


def test_page_holds_the_upper_bound_of_enough_pairs() -> None:
    noisy = [1.0 + 0.05 * (place % 2) for place in range(PAIRS)]
    for times, sign in (
        ([0.99] * PAIRS, "✓"),
        ([1.04] * PAIRS, "✗"),
        (noisy, "✗"),  # its median is within the limit, its bound is not
        ([0.99] * (PAIRS - 1), "29 pairs: too few"),
    ):
        page = render(_results({ORIGINAL: [1.0] * len(times), FOLDED: times}))
        (line,) = (line for line in page.splitlines() if "upper bound ≤ 1.03" in line)
        assert line.endswith(f"| {sign} |"), line
    assert "| folded DyT |  | 0.990 (0.990 to 0.990) |  |  |" in page
    assert "All: torch 2, threads 2." in page


def test_page_holds_medians_of_a_site_against_other_forms() -> None:
    times = {"bare add": [1.0], "residual + LayerNorm": [2.0], "residual + DyT": [1.2]}
    page = render(_results(times, "site-768-fp32"))
    held = [line for line in page.splitlines() if "residual + DyT /" in line]
    assert [line[-3] for line in held] == ["✗", "✓"]
    assert "median ≤ 1.1 | 1.200" in held[0]
    assert "median ≤ 0.75 | 0.600" in held[1]


def test_page_says_when_the_machine_was_loaded_and_why_a_form_is_missing() -> None:
    results = _results({ORIGINAL: [1.0], FOLDED: [1.0]}, others=1.5)
    assert "**The machine was loaded**: other work kept 1.50 of its cores busy" in render(results)
    closed = _results({})
    closed["subjects"]["vit-b"]["inductor"][FOLDED]["reasons"] = {FOLDED: "no [kernel]"}
    page = render(closed)
    assert "| folded DyT |  | –[^vit-b-1] |  |  |" in page
    assert "[^vit-b-1]: no \\[kernel\\]" in page
    assert "loaded" not in page
    assert [table.row_count for table in terminal(closed)] == [len(MODEL_FORMS)]


def test_bars_are_of_forms_that_exist_and_take_turns() -> None:
    for bar in BARS:
        for subject in bar.subjects:
            assert {bar.form, bar.base} <= SUBJECTS[subject].forms.keys()
            assert SUBJECTS[subject].together or bar.base == SUBJECTS[subject].base
        assert set(bar.runtimes) <= RUNTIMES.keys()
    assert Bar((), (), "", "", 1.0, upper=True).holds(Ratio(1.0, 0.9, 1.1)) is False
    assert Bar((), (), "", "", 1.0).holds(Ratio(1.0, 0.9, 1.1)) is True


@pytest.mark.skipif(not speed.RESULTS.exists(), reason="make bench has not been run")
def test_page_is_what_the_results_render_to() -> None:
    results = json.loads(speed.RESULTS.read_text())
    assert speed.PAGE.read_text(encoding="utf-8") == render(results)
