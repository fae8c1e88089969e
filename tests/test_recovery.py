"""Recover: what it gains, what it leaves alone, and how it goes on after it was killed."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

import dyt_compile
from dyt_compile import Conversion, losses, rates
from dyt_compile.compiler import convert
from dyt_compile.data import whole
from dyt_compile.errors import CalibrationError, DataError, OptionError
from dyt_compile.lessons import Learner, Lesson, Share, Teacher
from dyt_compile.metrics import METRICS, Tally
from dyt_compile.passes import recover as recover_pass
from dyt_compile.passes.calibrate import calibrate
from dyt_compile.passes.capture import capture
from dyt_compile.passes.match import match
from dyt_compile.progress import reporting
from dyt_compile.rates import highest_rate
from dyt_compile.recovery import _groups, _step_size, recover
from dyt_compile.recovery import _lesson as _lesson_of
from dyt_compile.run_progress import Progress

EXAMPLE = Path(__file__).parent.parent / "examples" / "digits" / "model.py"
WIDTH, TOKENS, CLASSES = 12, 5, 6


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.down(F.gelu(self.up(self.norm(x))))
        return y


class Network(nn.Module):
    """Pre-norm blocks on tokens with a tied head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(CLASSES, WIDTH)
        self.blocks = nn.Sequential(Block(), Block())
        self.norm = nn.RMSNorm(WIDTH)
        self.head = nn.Linear(WIDTH, CLASSES, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.head(self.norm(self.blocks(self.embedding(tokens))))
        return logits


def _batches(count: int = 8) -> list[tuple[Tensor]]:
    random = torch.Generator().manual_seed(0)
    return [(torch.randint(CLASSES, (16, TOKENS), generator=random),) for _ in range(count)]


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return Network().eval()


@pytest.fixture(scope="module")
def converted(model: nn.Module) -> Conversion:
    """All sites converted; to be read only."""
    return convert(model, _batches(), mode="all", fit="diagonal", fold=False)


def _state(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def _assert_equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert list(first) == list(second)
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


class KilledError(Exception):
    """Stands for the end of a process."""


def _killed_at(monkeypatch: pytest.MonkeyPatch, evaluation: int) -> None:
    """Let the run end by an exception before that evaluation."""
    evaluate = recover_pass._Run.evaluate
    done = iter(range(evaluation))

    def dying(run: Any, *args: Any) -> None:
        if next(done, None) is None:
            raise KilledError
        evaluate(run, *args)

    monkeypatch.setattr(recover_pass._Run, "evaluate", dying)


@pytest.mark.core
def test_recover_lowers_the_error_on_unseen_samples(converted: Conversion) -> None:
    found = recover(converted, _batches(), steps=120)
    recovery = found.report.recovery
    assert recovery is not None
    assert found.report.error is not None
    assert found.report.error < 0.6 * recovery.before
    assert (recovery.steps, recovery.train, found.report.samples) == (120, "all", 13)
    assert recovery.curve[0][0] == 0.0
    assert recovery.curve[-1][0] == 1.0
    assert {site.converted for site in found.report.sites} == {True}


@pytest.mark.core
def test_recover_writes_neither_to_the_original_nor_to_the_result(
    model: nn.Module, converted: Conversion
) -> None:
    original, before, graph = _state(model), _state(converted.model), converted.graph
    found = recover(converted, _batches(), steps=20)
    _assert_equal(_state(model), original)
    _assert_equal(_state(converted.model), before)
    assert converted.graph is graph
    shared = {p.data_ptr() for p in converted.model.parameters()}
    assert not shared & {p.data_ptr() for p in found.model.parameters()}


@pytest.mark.core
def test_recover_returns_what_convert_returns(converted: Conversion, tmp_path: Path) -> None:
    found = recover(converted, _batches(), steps=20)
    assert isinstance(found, Conversion)
    assert found.calibration is None
    assert "recovery" in found.report.to_dict()
    alpha = found.model.get_parameter("blocks.0.norm.alpha")
    assert found.report.sites[0].alpha == pytest.approx(alpha.item())
    written = dyt_compile.export_onnx(found, tmp_path / "model.onnx")
    assert written.export_error is not None
    assert written.export_error < 1e-4


@pytest.mark.core
def test_recover_of_dyt_alone_shares_all_other_weights(
    model: nn.Module, converted: Conversion
) -> None:
    found = recover(converted, _batches(), steps=60, train="dyt")
    assert found.report.recovery is not None
    assert found.report.error is not None
    assert found.report.error < found.report.recovery.before
    changed = {
        name.rpartition(".")[2]
        for name, tensor in found.model.named_parameters()
        if not torch.equal(tensor, converted.model.get_parameter(name))
    }
    assert changed == {"alpha", "gamma", "beta"}
    assert found.model.get_parameter("head.weight") is converted.model.get_parameter("head.weight")


@pytest.mark.core
def test_recover_keeps_tied_weights_tied(converted: Conversion) -> None:
    found = recover(converted, _batches(), steps=20).model
    tokens = _batches(1)[0][0]
    given = {id(p) for name, p in found.named_parameters(remove_duplicate=False)
             if name in ("head.weight", "embedding.weight")}  # fmt: skip
    assert len(given) == 1
    assert not torch.equal(found(tokens), converted.model(tokens))


@pytest.mark.core
def test_recover_is_repeatable_in_steps(converted: Conversion) -> None:
    first, second = (recover(converted, _batches(), steps=20) for _ in range(2))
    _assert_equal(_state(first.model), _state(second.model))
    other = recover(converted, _batches(), steps=20, seed=1)
    assert not torch.equal(_state(first.model)["head.weight"], _state(other.model)["head.weight"])


@pytest.mark.core
@pytest.mark.parametrize("evaluation", [1, 2, 9])
def test_killed_run_goes_on_to_the_same_weights(
    converted: Conversion, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, evaluation: int
) -> None:
    whole = recover(converted, _batches(), steps=40)
    path = tmp_path / "run.safetensors"
    with monkeypatch.context() as patch:
        _killed_at(patch, evaluation)
        with pytest.raises(KilledError):
            recover(converted, _batches(), steps=40, checkpoint=path)
    assert path.is_file() == (evaluation > 1)
    resumed = recover(converted, _batches(), steps=40, checkpoint=path)
    _assert_equal(_state(resumed.model), _state(whole.model))
    assert resumed.report.recovery is not None
    assert whole.report.recovery is not None
    assert resumed.report.recovery.curve == whole.report.recovery.curve


@pytest.mark.core
def test_staged_run_converts_the_easy_sites_first(converted: Conversion) -> None:
    found = recover(converted, _batches(), steps=160, staged=True)
    recovery = found.report.recovery
    assert recovery is not None
    assert found.report.error is not None
    assert found.report.error < 0.6 * recovery.before
    assert [sites for _, sites in recovery.stages] == [1, 2, 3]
    begun = [recovery.curve[place][0] for place, _ in recovery.stages]
    assert begun == pytest.approx([0, 0.25, 0.5], abs=0.01)
    easiest = min(converted.report.sites, key=lambda site: site.fit_error or 0)
    assert _groups(converted)[0] == {easiest.name}
    assert {site.converted for site in found.report.sites} == {True}
    assert all(site.kind.lossless for site in match(found.graph).sites)


@pytest.mark.core
@pytest.mark.parametrize("staged", [False, True])
def test_recover_folds_what_was_folded(
    model: nn.Module, converted: Conversion, staged: bool
) -> None:
    batches = _batches()
    options: dict[str, Any] = {"steps": 30, "staged": staged, "train": "dyt"}
    loose = recover(converted, batches, **options)
    folded = recover(convert(model, batches, mode="all", fit="diagonal"), batches, **options)
    assert loose.folded is None
    assert folded.folded is not None
    assert {entry.what for entry in folded.folded.folded} == {"beta", "gamma"}
    assert len(_state(folded.model)) < len(_state(loose.model))
    assert folded.report.error == loose.report.error  # the same training, before the fold
    (tokens,) = batches[0]
    with torch.no_grad():
        y, expected = folded.model(tokens), loose.model(tokens)
    assert float((y - expected).norm() / expected.norm()) < 1e-5


@pytest.mark.core
@pytest.mark.parametrize("affine", [["blocks.0.norm"], ["blocks.0.norm", "blocks.1.norm"]])
def test_affine_sites_stay_so_when_the_rest_is_trained(model: nn.Module, affine: list[str]) -> None:
    batches = _batches()
    graph = capture(model, batches[0], {}, batches=batches)
    found = match(graph)
    fits = calibrate(
        graph, found, whole(graph, batches), convert=[site.name for site in found.sites], seed=0,
        squashes=dict.fromkeys(affine, ("identity",)),
    )  # fmt: skip
    result = convert(model, batches, calibration=fits)
    assert [site.name for site in result.report.sites if site.affine] == affine
    assert _groups(result)[-1] >= set(affine)
    for staged in (False, True):
        trained = recover(result, batches, steps=60, staged=staged)
        assert trained.report.affine == len(affine)
        assert len(match(trained.graph).sites) == len(found.sites) - len(affine)
        assert trained.report.recovery is not None
        assert trained.report.error is not None
        assert trained.report.error < trained.report.recovery.before


@pytest.mark.core
@pytest.mark.parametrize("evaluation", [3, 9, 13])
@pytest.mark.parametrize("train", ["all", "dyt"])
def test_killed_staged_run_goes_on_to_the_same_weights(
    model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, evaluation: int, train: str
) -> None:
    result = convert(model, _batches(), mode="all")
    options: dict[str, Any] = {"steps": 60, "staged": True, "train": train}
    whole = recover(result, _batches(), **options)
    path = tmp_path / "run.safetensors"
    with monkeypatch.context() as patch:
        _killed_at(patch, evaluation)
        with pytest.raises(KilledError):
            recover(result, _batches(), checkpoint=path, **options)
    resumed = recover(result, _batches(), checkpoint=path, **options)
    _assert_equal(_state(resumed.model), _state(whole.model))
    assert resumed.report.recovery is not None
    assert whole.report.recovery is not None
    assert resumed.report.recovery.curve == whole.report.recovery.curve
    with pytest.raises(CalibrationError, match="belongs to another model"):
        recover(result, _batches(), steps=60, checkpoint=path, train=train)


@pytest.mark.core
def test_finished_run_is_not_trained_again(converted: Conversion, tmp_path: Path) -> None:
    path = tmp_path / "run.safetensors"
    first = recover(converted, _batches(), steps=20, checkpoint=path)
    again = recover(converted, _batches(), steps=20, checkpoint=path)
    assert again.report.recovery is not None
    assert again.report.recovery.steps == 20
    _assert_equal(_state(first.model), _state(again.model))


@pytest.mark.core
def test_checkpoint_of_another_run_is_refused(converted: Conversion, tmp_path: Path) -> None:
    path = tmp_path / "run.safetensors"
    recover(converted, _batches(), steps=2, checkpoint=path)
    with safe_open(path, "pt") as file:
        assert file.metadata()["version"] == "1"
    with pytest.raises(CalibrationError, match="belongs to another model"):
        recover(converted, _batches(), steps=2, checkpoint=path, train="dyt")
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(CalibrationError, match="damaged"):
        recover(converted, _batches(), steps=2, checkpoint=path)


@pytest.mark.core
def test_run_that_becomes_worse_returns_what_came_in(
    converted: Conversion, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rates, "RATE", 30.0)
    found = recover(converted, _batches(), steps=60)
    recovery = found.report.recovery
    assert recovery is not None
    assert found.report.error == recovery.before
    errors = [error for _, error in recovery.curve[1:]]
    assert len(errors) == errors.index(min(errors)) + 1 + recover_pass.PATIENCE
    assert recovery.steps < 60


@pytest.mark.core
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_weights_are_trained_as_float32(dtype: torch.dtype, tmp_path: Path) -> None:
    narrow = Network().eval().to(dtype)
    result = convert(narrow, _batches(), mode="all", fit="diagonal")
    path = tmp_path / "run.safetensors"
    found = recover(result, _batches(), steps=80, checkpoint=path)
    assert found.report.recovery is not None
    assert found.report.error is not None
    assert found.report.error < 0.8 * found.report.recovery.before
    held = load_file(path)
    assert held["weight/head.weight" if "weight/head.weight" in held else
                "weight/embedding.weight"].dtype is torch.float32  # fmt: skip
    expected = {name: p.dtype for name, p in result.model.named_parameters()}
    assert {name: p.dtype for name, p in found.model.named_parameters()} == expected
    assert dtype in set(expected.values())


def _lesson(result: Conversion) -> Lesson:
    return _lesson_of(result, "all", "relative", result.graph)


@pytest.mark.core
def test_products_are_computed_in_bfloat16_where_the_loss_stays_the_same(
    converted: Conversion, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recover_pass, "_fast_in_bfloat16", lambda _: True)
    lesson = _lesson(converted)
    teacher = Teacher(lesson)
    (tokens,) = _batches(1)[0]
    share = Share(lambda: {"tokens": tokens})

    def results() -> list[Tensor]:
        run = recover_pass._Run(lesson, teacher, Progress(), 0, share)
        return [value.detach() for value in run._learner.student(tokens, False)]

    exact = converted.model(tokens).detach()
    *_, rounded = results()
    assert rounded.dtype is torch.float32
    assert 1e-4 < float((rounded - exact).norm() / exact.norm()) < 0.02
    monkeypatch.setattr(recover_pass, "BFLOAT16_TOLERANCE", 0.0)
    assert torch.equal(results()[-1], exact)


@pytest.mark.core
@pytest.mark.parametrize("cut", [False, True])
@pytest.mark.parametrize("train", ["all", "dyt"])
def test_learner_in_parts_has_the_loss_and_the_gradients_of_the_whole(
    converted: Conversion, train: str, cut: bool
) -> None:
    lesson = _lesson_of(converted, train, "relative", converted.graph)
    (tokens,) = _batches(1)[0]
    material = Teacher(lesson).material(Share(lambda: {"tokens": tokens}))
    shares = torch.ones_like(material.weights, dtype=torch.float32)
    weights = recover_pass._weights(lesson.trained())

    def learned(learner: Learner) -> tuple[Tensor, list[Tensor | None]]:
        loss = learner(material, shares, cut)
        masters = [weight.master for weight in weights.values()]
        return loss, list(torch.autograd.grad(loss, masters, allow_unused=True))

    learner = Learner(lesson, weights, sharded=True)
    expected, found = learned(Learner(lesson, weights)), learned(learner)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert all(gradient is not None for gradient in found[1])
    held = [{id(p) for p in part.parameters()} for part in learner.parts]
    assert len(held) == len(converted.match.sites)
    assert not any(a & b for place, a in enumerate(held) for b in held[place + 1 :])
    shared = {id(p) for p in learner.parameters()}.difference(*held)
    assert shared == {id(w.master) for w in weights.values() if w.master.shape == (CLASSES, WIDTH)}


@pytest.mark.core
@pytest.mark.parametrize(
    ("path", "shape", "rate"),
    [
        ("head.weight", (7, 128), 0.01),
        ("head.weight", (7, 256), 0.0025),
        ("head.weight", (7, 4096), 0.001),
        ("head.weight", (512, 7), 0.01),
        ("head.bias", (400,), 0.01),
        ("norm.gamma", (400,), 0.01),
    ],
)
def test_rate_is_relative_to_size_and_falls_with_width(
    path: str, shape: tuple[int, ...], rate: float
) -> None:
    assert highest_rate(path, torch.full(shape, 3.0)) == pytest.approx(3 * rate)


@pytest.mark.core
def test_parameter_that_begins_at_zero_learns() -> None:
    assert highest_rate("norm.beta", torch.zeros(4)) == pytest.approx(0.003)
    assert highest_rate("head.bias", torch.zeros(4)) == pytest.approx(0.0002)


@pytest.mark.core
@pytest.mark.parametrize(("samples", "tokens", "size"), [(64, 16, 32), (8, 500, 4), (99, 2, 64)])
def test_step_has_about_as_many_positions_for_any_length(
    converted: Conversion, samples: int, tokens: int, size: int
) -> None:
    batch = {"tokens": torch.zeros(samples, tokens, dtype=torch.long)}
    assert _step_size(converted)(batch, samples) == size


@pytest.mark.core
def test_original_is_asked_once_a_batch_while_there_is_room(converted: Conversion) -> None:
    lesson = _lesson(converted)
    (tokens,) = _batches(1)[0]
    teacher = Teacher(lesson)
    first = teacher({"tokens": tokens}, 0)
    assert all(a is b for a, b in zip(first, teacher({"tokens": tokens}, 0), strict=True))
    assert teacher({"tokens": tokens})[0] is not first[0]
    teacher._left_bytes = 0
    assert teacher({"tokens": tokens}, 1)[0] is not teacher({"tokens": tokens}, 1)[0]
    assert torch.equal(teacher({"tokens": tokens}, 1)[0], first[0])


@pytest.mark.core
@pytest.mark.parametrize("metric", METRICS)
def test_recover_learns_by_every_metric(converted: Conversion, metric: str) -> None:
    found = recover(converted, _batches(), steps=40, metric=metric)
    assert found.report.metric == metric
    assert found.report.recovery is not None
    assert found.report.error is not None
    assert found.report.error <= found.report.recovery.before


@pytest.mark.core
def test_minutes_end_a_run(converted: Conversion, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recover_pass, "PATIENCE", 100)  # nothing else may end it before
    found = recover(converted, _batches(), minutes=0.02)
    assert found.report.recovery is not None
    assert 1.2 <= found.report.recovery.seconds < 30
    assert found.report.recovery.steps > 0


@pytest.mark.core
@pytest.mark.parametrize("staged", [False, True])
@pytest.mark.parametrize(("limit", "steps"), [({"minutes": 1e-9}, 0), ({"steps": 1}, 1)])
def test_stage_that_begins_when_the_run_is_over_learns_nothing(
    converted: Conversion,
    staged: bool,
    limit: dict[str, Any],
    steps: int,
    caplog: pytest.LogCaptureFixture,
) -> None:
    found = recover(converted, _batches(), staged=staged, **limit)
    assert ("learned nothing: 1e-09 minutes were over" in caplog.text) == (steps == 0)
    recovery = found.report.recovery
    assert recovery is not None
    assert recovery.steps == steps
    assert [sites for _, sites in recovery.stages] == ([1, 2, 3] if staged else [3])
    assert found.report.error is not None
    assert found.report.error <= recovery.before


@pytest.mark.core
def test_progress_tells_the_held_out_error(converted: Conversion) -> None:
    told: list[str] = []

    class Listener:
        def track(self, items: Any, doing: Any, total: int | None) -> Iterator[Any]:
            for item in items:
                yield item
                told.append(doing if isinstance(doing, str) else doing())

    with reporting(Listener()):
        found = recover(converted, _batches(), steps=20)
    assert found.report.recovery is not None
    assert f"recovering, held-out error {found.report.recovery.curve[-1][1]:.4g}" in told


@pytest.mark.core
def test_model_from_onnx_is_refused(model: nn.Module, tmp_path: Path) -> None:
    example = _batches(1)[0]
    batch = ({0: torch.export.Dim("batch")},)
    program = torch.onnx.export(model, example, dynamo=True, verbose=False, dynamic_shapes=batch)
    assert program is not None
    program.save(tmp_path / "model.onnx")
    arrays = [(tokens.numpy(),) for (tokens,) in _batches()]
    result = convert(tmp_path / "model.onnx", arrays, mode="all")
    with pytest.raises(OptionError, match=r"ONNX file, which has no gradients.*closed-form fits"):
        recover(result, arrays)


@pytest.mark.core
@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"minutes": 0}, "minutes is 0; allowed: a number above 0"),
        ({"steps": 0}, "steps is 0; allowed"),
        ({"train": "some"}, "train is 'some'; allowed: all, dyt"),
        ({"metric": "accuracy"}, "metric is 'accuracy'; allowed: relative, cosine, kl, top1"),
        ({"metric": len}, "metric is <built-in function len>; allowed: relative"),
        ({"seed": -1}, "seed is -1; allowed"),
    ],
)
def test_option_that_is_not_allowed_is_refused(
    converted: Conversion, options: dict[str, Any], told: str
) -> None:
    with pytest.raises(OptionError, match=told):
        recover(converted, _batches(), **options)


@pytest.mark.core
def test_conversion_without_a_norm_is_refused(model: nn.Module) -> None:
    with pytest.raises(OptionError, match="nothing to recover"):
        recover(convert(model, example=_batches(1)[0]), _batches())


@pytest.mark.core
def test_too_few_samples_are_refused(converted: Conversion) -> None:
    tokens = _batches(1)[0][0]
    with pytest.raises(DataError, match="holds 9 samples; at least 10"):
        recover(converted, [(tokens[:9],)], steps=1)


@pytest.mark.core
@pytest.mark.parametrize("metric", ["relative", "cosine", "kl"])
def test_loss_is_its_metric_with_what_is_masked_left_out(metric: str) -> None:
    torch.manual_seed(0)
    f, g, mask = torch.randn(4, 3, 7), torch.randn(4, 3, 7), torch.rand(4, 3) > 0.3
    tally = Tally(metric)
    tally.add(f.numpy(), g.numpy(), mask.numpy())
    expected = tally.measurement().error ** (2 if metric == "relative" else 1)
    assert float(losses.LOSSES[metric](f, g, mask)) == pytest.approx(expected, rel=1e-5)
    assert float(losses.LOSSES[metric](f, g, None)) != pytest.approx(expected, rel=1e-3)


@pytest.mark.core
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("masked", [True, False])
def test_losses_of_parts_add_up_to_that_of_the_whole(metric: str, masked: bool) -> None:
    torch.manual_seed(0)
    f, g = torch.randn(5, 3, 7), torch.randn(5, 3, 7)
    mask = torch.rand(5, 3) > 0.3 if masked else None

    def parts(whole: Tensor) -> tuple[Tensor, ...]:
        return whole.split([1, 4])

    masks = (None, None) if mask is None else parts(mask)
    for loss, weight in (
        (losses.LOSSES[metric], losses.WEIGHTS[metric]),
        (losses.relative, losses.positions),
    ):
        weights = torch.stack([weight(a, m) for a, m in zip(parts(f), masks, strict=True)])
        own = torch.stack(
            [loss(a, b, m) for a, b, m in zip(parts(f), parts(g), masks, strict=True)]
        )
        total = float((own * weights).sum() / weights.sum())
        assert total == pytest.approx(float(loss(f, g, mask)), rel=1e-5)


@pytest.mark.core
def test_relative_loss_counts_positions_alike() -> None:
    f = torch.ones(1, 2, 4)
    f[0, 0] *= 1000  # a massive token
    g = f.clone()
    g[0, 1] += 1
    assert float(losses.relative(f, g, None)) == pytest.approx(0.5 * 4 / (1e-3 * 2e6), rel=1e-2)
    assert float(losses.relative(f[:, 1:], g[:, 1:], None)) == pytest.approx(1.0)


@pytest.fixture(scope="module")
def digits() -> ModuleType:
    pytest.importorskip("sklearn")
    found = importlib.util.spec_from_file_location("digits_model", EXAMPLE)
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    sys.modules["digits_model"] = module
    found.loader.exec_module(module)
    return module


def test_recovery_of_a_trained_model_halves_its_error(digits: ModuleType) -> None:
    model, _ = digits.load()
    batches = list(digits.calibration())
    pixels = digits.images()[2]
    result = convert(model, batches, mode="all", fit="diagonal")
    found = recover(result, batches, steps=80)

    def error(other: nn.Module) -> float:
        with torch.no_grad():
            f, g = model(pixels), other(pixels)
        return float((f - g).norm() / f.norm())

    assert error(found.model) < 0.5 * error(result.model)
