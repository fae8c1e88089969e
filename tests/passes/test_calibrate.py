"""Calibrate: against the same walk done by hand, in torch and in ONNX, batches cut in any way."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dyt_compile.calibration import Calibration, SiteFit
from dyt_compile.data import sample_keys, whole
from dyt_compile.dyt import DytParameters
from dyt_compile.errors import CalibrationError
from dyt_compile.fits import Fit, Keys, RowSample, fit_diagonal
from dyt_compile.graphs.base import Graph
from dyt_compile.passes import calibrate as calibrate_module
from dyt_compile.passes.calibrate import calibrate
from dyt_compile.passes.capture import capture
from dyt_compile.passes.match import match
from dyt_compile.shelf import Shelf

pytestmark = pytest.mark.core

WIDTH, TOKENS, DEPTH = 12, 5, 3
NAMES = ("blocks.0.norm", "blocks.1.norm", "blocks.2.norm", "norm")
Array = npt.NDArray[np.float32]


class Block(nn.Module):
    """A pre-norm MLP with its residual."""

    def __init__(self, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.norm = norm(WIDTH)
        self.up = nn.Linear(WIDTH, 2 * WIDTH)
        self.down = nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.down(F.gelu(self.up(self.norm(x))))
        return y


class Transformer(nn.Module):
    """Position by position, so that masked positions reach no other."""

    def __init__(self, norm: Callable[[int], nn.Module] = nn.LayerNorm) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.blocks = nn.Sequential(*(Block(norm) for _ in range(DEPTH)))
        self.norm = norm(WIDTH)
        for name, parameter in self.named_parameters():
            if "norm" in name:
                nn.init.normal_(parameter, 0.5, 0.3)
            elif "weight" in name:
                nn.init.normal_(parameter, 0.0, 0.4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm(self.blocks(x))
        return y


class Masked(Transformer):
    def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x) * attention_mask[..., None]


def _inputs(samples: int = 60, tokens: int = TOKENS, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, tokens, WIDTH, generator=generator)
    return x * torch.empty(samples, tokens, 1).uniform_(0.5, 2, generator=generator)


def _batches(x: Tensor, sizes: int | list[int] = 20) -> list[tuple[Tensor]]:
    return [(part,) for part in x.split(sizes)]


def _calibrated(
    graph: Graph,
    batches: Sequence[Any],
    convert: Collection[str] = NAMES,
    seed: int = 0,
    **options: Any,
) -> Calibration:
    samples = whole(graph, batches)
    return calibrate(graph, match(graph), samples, convert=convert, seed=seed, **options)


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return Transformer().eval()


@pytest.fixture(scope="module")
def graph(model: nn.Module) -> Graph:
    return capture(model, (_inputs(4),))


@pytest.fixture(scope="module")
def onnx_file(model: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("calibrate") / "model.onnx"
    program = torch.onnx.export(
        model, (_inputs(4),), dynamo=True, verbose=False,
        dynamic_shapes=({0: torch.export.Dim("batch")},),
    )  # fmt: skip
    assert program is not None
    program.save(path)
    return path


def _fitted(fit: SiteFit) -> DytParameters:
    assert fit.parameters is not None
    return fit.parameters


def _assert_close(
    a: Calibration, b: Calibration, tolerance: float, *, same_samples: bool = True
) -> None:
    """The same fits, up to a share of each parameter's largest value.

    same_samples: where the same rows come in other samples, other ones are held out.
    """
    assert list(a.fits) == list(b.fits)
    for name in a.fits:
        error = pytest.approx(b.fits[name].fit_error, rel=tolerance)
        assert not same_samples or a.fits[name].fit_error == error
        assert a.fits[name].sigma_median == pytest.approx(b.fits[name].sigma_median, rel=tolerance)
        assert a.fits[name].sigma_peak == pytest.approx(b.fits[name].sigma_peak, rel=tolerance)
        first, second = a.fits[name].arrays(), b.fits[name].arrays()
        assert list(first) == list(second)
        for parameter, array in first.items():
            scale = float(np.abs(array).max())
            np.testing.assert_allclose(
                array, second[parameter], rtol=0, atol=tolerance * scale, err_msg=name
            )


def _differ(a: SiteFit, b: SiteFit) -> bool:
    first, second = _fitted(a).named(), _fitted(b).named()
    return any(np.abs(first[p] - second[p]).max() > 1e-3 for p in first)


def test_helper_for_close_fits_can_fail(graph: Graph) -> None:
    with pytest.raises(AssertionError):
        _assert_close(
            _calibrated(graph, _batches(_inputs())),
            _calibrated(graph, _batches(_inputs(seed=1))),
            1e-3,
        )


class Dyt(nn.Module):
    def __init__(self, fit: Fit) -> None:
        super().__init__()
        self.values = {n: torch.from_numpy(v) for n, v in fit.parameters.named().items()}

    def forward(self, x: Tensor) -> Tensor:
        gamma, beta = self.values["gamma"], self.values["beta"]
        return gamma * torch.tanh(self.values["alpha"] * x) + beta


def _watched(
    original: nn.Module, converted: nn.Module, name: str, x: Tensor
) -> tuple[Tensor, Tensor]:
    """What the site is given in the converted model, and what it gives in the original."""
    seen: dict[str, Tensor] = {}
    hooks = (
        original.get_submodule(name).register_forward_hook(
            lambda module, args, result: seen.update(y=result)
        ),
        converted.get_submodule(name).register_forward_pre_hook(
            lambda module, args: seen.update(x=args[0])
        ),
    )
    with torch.no_grad():
        original(x)
        converted(x)
    for hook in hooks:
        hook.remove()
    return seen["x"], seen["y"]


def _row_keys(graph: Graph, x: Tensor, count: int = TOKENS) -> Keys:
    """Of `count` rows a sample: the first has the key of the sample and 1."""
    rows = np.arange(1, count + 1, dtype=np.uint64)
    return (sample_keys(graph.bind((x,)), graph)[:, None] + rows).ravel()


def _by_hand(model: nn.Module, graph: Graph, x: Tensor, convert: Collection[str]) -> dict[str, Fit]:
    """The walk, with hooks in place of cuts and with whole runs in place of segments."""
    original, converted = model, copy.deepcopy(model)
    fits: dict[str, Fit] = {}
    for name in NAMES:
        x_seen, y_seen = _watched(original, converted, name, x)
        sample = RowSample(0)
        sample.add(*(a.reshape(-1, WIDTH).numpy() for a in (x_seen, y_seen)), _row_keys(graph, x))
        fit = fit_diagonal(*sample.rows())
        assert isinstance(fit, Fit)
        fits[name] = fit
        if name in convert:
            parent, _, last = name.rpartition(".")
            setattr(converted.get_submodule(parent), last, Dyt(fit))
    return fits


@pytest.mark.parametrize(
    "convert", [(), NAMES, ("blocks.1.norm",), ("blocks.0.norm", "norm")], ids=str
)
def test_fits_equal_a_walk_by_hand(
    model: nn.Module, graph: Graph, convert: tuple[str, ...]
) -> None:
    found = _calibrated(graph, _batches(_inputs()), convert)
    assert found.converted == set(convert)
    for name, expected in _by_hand(model, graph, _inputs(), convert).items():
        fit = found.fits[name]
        assert fit.fit_error == pytest.approx(expected.error, rel=1e-4)
        for parameter, array in expected.parameters.named().items():
            np.testing.assert_allclose(_fitted(fit).named()[parameter], array, rtol=0, atol=1e-4)


def test_sequential_fits_differ_from_isolated_ones_behind_the_first_site(graph: Graph) -> None:
    sequential = _calibrated(graph, _batches(_inputs()))
    isolated = _calibrated(graph, _batches(_inputs()), ())
    assert not _differ(sequential.fits[NAMES[0]], isolated.fits[NAMES[0]])
    for name in NAMES[1:]:
        assert _differ(sequential.fits[name], isolated.fits[name])
    assert isolated.converted == frozenset()


def test_fits_up_to_the_first_converted_site_are_the_isolated_ones(graph: Graph) -> None:
    late = _calibrated(graph, _batches(_inputs()), NAMES[2:])
    isolated = _calibrated(graph, _batches(_inputs()), ())
    for name in NAMES[:3]:
        assert not _differ(late.fits[name], isolated.fits[name])
    assert _differ(late.fits["norm"], isolated.fits["norm"])


@pytest.mark.parametrize("convert", [(), NAMES], ids=["isolated", "sequential"])
def test_onnx_gives_the_fits_of_torch(
    graph: Graph, onnx_file: Path, convert: tuple[str, ...]
) -> None:
    exported = _calibrated(capture(onnx_file), _batches(_inputs()), convert)
    own = _calibrated(graph, _batches(_inputs()), convert)
    _assert_close(own, exported, 1e-3)
    assert own.belongs_to(exported.fingerprint)
    assert exported.converted == own.converted


@pytest.mark.parametrize("convert", [(), NAMES], ids=["isolated", "sequential"])
def test_points_to_draw_are_those_of_the_norm_in_torch_and_onnx(
    graph: Graph, onnx_file: Path, convert: tuple[str, ...]
) -> None:
    own = _calibrated(graph, _batches(_inputs(), 7), convert)
    exported = _calibrated(capture(onnx_file), _batches(_inputs()), convert)
    for name, fit in own.fits.items():
        first, second = fit.scatter, exported.fits[name].scatter
        assert first is not None
        assert second is not None
        assert first.x.shape == (32, WIDTH)
        np.testing.assert_array_equal(first.channels, second.channels)
        np.testing.assert_allclose(first.x, second.x, rtol=1e-3, atol=1e-3)
        np.testing.assert_allclose(first.y, second.y, rtol=1e-3, atol=1e-3)
        # Twelve channels are all drawn, so each token's y has a mean of 0 and a square of 1.
        np.testing.assert_allclose(first.y.mean(axis=1), 0, atol=1e-4)
        np.testing.assert_allclose((first.y**2).mean(axis=1), 1, atol=1e-3)


def test_points_of_later_calls_are_their_own() -> None:
    class Twice(Transformer):
        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.norm(super().forward(x) * 30)
            return y

    graph = capture(Twice().eval(), (_inputs(4),))
    fits = _calibrated(graph, _batches(_inputs()), (*NAMES, "norm#2")).fits
    first, second = fits["norm"].scatter, fits["norm#2"].scatter
    assert first is not None
    assert second is not None
    assert first.fitted is not None
    assert second.fitted is not None
    np.testing.assert_array_equal(first.fitted.alpha, second.fitted.alpha)
    assert np.abs(second.x).max() > 1.5 * np.abs(first.x).max()


@pytest.mark.parametrize("sizes", [1, 7, 60, [1, 30, 29]], ids=str)
def test_fits_do_not_depend_on_how_samples_are_batched(
    graph: Graph, sizes: int | list[int]
) -> None:
    x = _inputs()
    _assert_close(_calibrated(graph, _batches(x)), _calibrated(graph, _batches(x, sizes)), 1e-4)


@pytest.fixture
def few_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sample of 100 rows a site, of 300 or so."""
    monkeypatch.setattr(calibrate_module, "RowSample", functools.partial(RowSample, limit=100))


SPLITS = pytest.mark.parametrize(
    "sizes", [[60], [1] * 60, [7] * 8 + [4], [1, 30, 29], [5] * 12], ids=lambda s: f"{len(s)}"
)


@SPLITS
@pytest.mark.parametrize("fit", ["diagonal", "full"])
@pytest.mark.usefixtures("few_rows")
def test_fits_on_a_sample_do_not_depend_on_the_split_or_the_order(
    graph: Graph, fit: str, sizes: list[int]
) -> None:
    x = _inputs()
    own = _calibrated(graph, _batches(x), fit=fit)
    assert own.fits[NAMES[0]].method == fit
    _assert_close(own, _calibrated(graph, _batches(x, sizes), fit=fit), 2e-4)
    _assert_close(own, _calibrated(graph, _batches(x, sizes)[::-1], fit=fit), 2e-4)


@SPLITS
@pytest.mark.parametrize("fit", ["diagonal", "full"])
@pytest.mark.usefixtures("few_rows")
def test_masked_fits_on_a_sample_do_not_depend_on_the_split_or_the_padding(
    fit: str, sizes: list[int]
) -> None:
    x, mask = _inputs(), _mask()
    graph = capture(Masked().eval(), kwargs=_masked(x, mask)[0])
    own = _calibrated(graph, _masked(x, mask), fit=fit)
    assert own.fits[NAMES[0]].method == fit
    x, mask = F.pad(x, (0, 0, 0, 2), value=9.0), F.pad(mask, (0, 2))
    parts = zip(x.split(sizes), mask.split(sizes), strict=True)
    batches = [{"x": a, "attention_mask": b} for a, b in parts]
    wider = capture(Masked().eval(), kwargs=_masked(x, mask)[0])
    _assert_close(own, _calibrated(wider, batches, fit=fit), 2e-4)


@pytest.mark.parametrize("sizes", [[60], [7] * 8 + [4], [1, 30, 29]], ids=lambda s: f"{len(s)}")
@pytest.mark.usefixtures("few_rows")
def test_fits_on_a_sample_of_tokens_first_do_not_depend_on_the_split(sizes: list[int]) -> None:
    class Bare(TimeMajor):
        def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
            y: Tensor = self.norm(x.transpose(0, 1)).transpose(0, 1)
            return y

    x = _inputs()
    graph = capture(Bare().eval(), (x[:4],))
    _assert_close(_calibrated(graph, _batches(x)), _calibrated(graph, _batches(x, sizes)), 1e-4)


@pytest.mark.usefixtures("few_rows")
def test_fits_on_a_sample_of_the_rows_do_not_depend_on_batches(graph: Graph) -> None:
    x = _inputs()
    first = _calibrated(graph, _batches(x))
    _assert_close(first, _calibrated(graph, _batches(x, 7)), 1e-4)
    other = _calibrated(graph, _batches(x), seed=12345)
    assert _differ(first.fits["norm"], other.fits["norm"])


def test_calibration_twice_is_equal_to_the_bit(graph: Graph) -> None:
    first, second = (_calibrated(graph, _batches(_inputs())) for _ in range(2))
    _assert_close(first, second, 0.0)


def test_fits_with_values_on_disk_are_the_same(
    graph: Graph, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = _calibrated(graph, _batches(_inputs()))
    monkeypatch.setattr(calibrate_module, "Shelf", lambda graph, *_: Shelf(graph, memory_bytes=0))
    _assert_close(own, _calibrated(graph, _batches(_inputs())), 0.0)


def test_calibration_leaves_the_model_as_it_was(model: nn.Module) -> None:
    before = copy.deepcopy(model.state_dict())
    graph = capture(model, (_inputs(4),))
    module: Any = graph.model
    text, own = str(module.graph), copy.deepcopy(module.state_dict())
    batches = _batches(_inputs())
    data = [batch[0].clone() for batch in batches]
    _calibrated(graph, batches)
    assert str(module.graph) == text
    for state, expected in ((model.state_dict(), before), (module.state_dict(), own)):
        assert list(state) == list(expected)
        assert all(torch.equal(state[name], expected[name]) for name in state)
    assert all(torch.equal(batch[0], x) for batch, x in zip(batches, data, strict=True))


def test_calibration_leaves_an_onnx_model_as_it_was(onnx_file: Path) -> None:
    import onnx_ir as ir

    graph = capture(onnx_file)
    before = ir.serde.serialize_model(graph.model).SerializeToString(deterministic=True)
    _calibrated(graph, _batches(_inputs()))
    after = ir.serde.serialize_model(graph.model).SerializeToString(deterministic=True)
    assert before == after


def _masked(x: Tensor, mask: Tensor, size: int = 20) -> list[dict[str, Tensor]]:
    return [
        {"x": a, "attention_mask": b} for a, b in zip(x.split(size), mask.split(size), strict=True)
    ]


def _mask(samples: int = 60) -> Tensor:
    lengths = torch.randint(1, TOKENS + 1, (samples, 1), generator=torch.Generator().manual_seed(2))
    return (torch.arange(TOKENS)[None] < lengths).long()


@pytest.mark.parametrize("spoilt", [1e4, float("nan")], ids=str)
def test_masked_rows_do_not_count(spoilt: float) -> None:
    x, mask = _inputs(), _mask()
    graph = capture(Masked().eval(), kwargs=_masked(x, mask)[0])
    changed = torch.where(mask[..., None] > 0, x, torch.tensor(spoilt))
    own = _calibrated(graph, _masked(x, mask))
    _assert_close(own, _calibrated(graph, _masked(changed, mask)), 0.0)
    _assert_close(own, _calibrated(graph, _masked(x, mask, 7)), 1e-4)


def test_masked_fits_are_those_of_the_positions_that_count() -> None:
    x, mask = _inputs(), _mask()
    graph = capture(Masked().eval(), kwargs=_masked(x, mask)[0])
    flat = capture(Transformer().eval(), (_inputs(4, 1),))
    counted = x[mask > 0][:, None]  # one token a sample
    own = _calibrated(graph, _masked(x, mask))
    _assert_close(own, _calibrated(flat, _batches(counted)), 1e-4, same_samples=False)


def test_batches_of_unequal_lengths_are_calibrated_together(model: nn.Module) -> None:
    batches = [(_inputs(20, tokens),) for tokens in (2, 5, 9)]
    graph = capture(model, batches[0], batches=batches)
    together = torch.cat([x.reshape(-1, 1, WIDTH) for (x,) in batches])
    flat = capture(model, (together[:4],))
    own = _calibrated(graph, batches)
    _assert_close(own, _calibrated(flat, [(together,)]), 1e-4, same_samples=False)


def test_bfloat16_model_is_calibrated_close_to_its_float32_original(graph: Graph) -> None:
    x = _inputs().bfloat16()
    narrow = capture(Transformer().eval().bfloat16(), (x[:4],))
    found = _calibrated(narrow, _batches(x))
    own = _calibrated(graph, _batches(x.float()))
    assert list(found.fits) == list(own.fits)
    for name in NAMES:
        assert _fitted(found.fits[name]).alpha.dtype == np.float32
        assert found.fits[name].fit_error == pytest.approx(own.fits[name].fit_error, rel=0.05)
        for parameter, array in _fitted(own.fits[name]).named().items():
            np.testing.assert_allclose(
                _fitted(found.fits[name]).named()[parameter], array,
                atol=0.05 * float(np.abs(array).max()),
            )  # fmt: skip


@pytest.mark.parametrize("centred", [True, False], ids=["layer_norm", "rms_norm"])
def test_sigma_is_what_the_norm_divides_by(centred: bool) -> None:
    norm: Callable[[int], nn.Module] = nn.LayerNorm if centred else nn.RMSNorm
    x = _inputs() + 3
    x[7, 2] *= 50
    graph = capture(Transformer(norm).eval(), (x[:4],))
    rows = x.reshape(-1, WIDTH).double()
    sigma = rows.std(dim=1, correction=0) if centred else rows.square().mean(dim=1).sqrt()
    fit = _calibrated(graph, _batches(x), ()).fits[NAMES[0]]
    assert fit.sigma_median == pytest.approx(float(np.median(sigma)), rel=1e-4)
    assert fit.sigma_peak == pytest.approx(float(sigma.max() / np.median(sigma)), rel=1e-4)


class Odd(nn.Module):
    """Two norms of one value, a norm of a norm, a norm that is called twice, one that is output."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.left, self.right = nn.LayerNorm(WIDTH), nn.RMSNorm(WIDTH)
        self.twice, self.last = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.mix = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.mix(self.left(x)) + F.gelu(self.right(x))
        y = self.twice(self.twice(y) + x)
        return y, self.last(y)


def test_every_site_of_an_odd_model_is_fitted_and_converted() -> None:
    graph = capture(Odd().eval(), (_inputs(4),))
    names = [site.name for site in match(graph).sites]
    assert sorted(names) == ["last", "left", "right", "twice", "twice#2"]
    found = _calibrated(graph, _batches(_inputs()), names)
    assert found.converted == set(names)
    assert all(0 < (found.fits[name].fit_error or 0) < 0.6 for name in names)
    isolated = _calibrated(graph, _batches(_inputs()), ())
    for name, same in {"left": True, "right": True, "twice": False, "last": False}.items():
        assert _differ(found.fits[name], isolated.fits[name]) is not same


class Dead(nn.Module):
    """The middle norm sees zeros alone."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.dead, self.last = (nn.LayerNorm(WIDTH) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        y: Tensor = self.last(x + self.dead(x * 0))
        return y


def test_site_without_a_fit_keeps_its_norm_and_says_why() -> None:
    graph = capture(Dead().eval(), (_inputs(4),))
    found = _calibrated(graph, _batches(_inputs()), ("first", "dead", "last"))
    assert found.converted == {"first", "last"}
    assert found.fits["dead"].parameters is None
    assert found.fits["dead"].reason == "its input does not vary over the data"
    assert _fitted(found.fits["last"]) is not None


class Heads(nn.Module):
    """A norm over the last axis of four."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm(x.unflatten(-1, (3, 4)).transpose(1, 2)).mean(1)
        return y


def test_norm_of_heads_has_one_value_a_channel() -> None:
    graph = capture(Heads().eval(), (_inputs(4),))
    parameters = _fitted(_calibrated(graph, _batches(_inputs()), ()).fits["norm"])
    assert parameters.gamma is not None
    assert parameters.gamma.shape == (4,)


class HeadsMasked(Heads):
    def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x) * attention_mask[..., None]


def test_masked_rows_of_heads_do_not_count() -> None:
    x, mask = _inputs(), _mask()
    graph = capture(HeadsMasked().eval(), kwargs=_masked(x, mask)[0])
    changed = torch.where(mask[..., None] > 0, x, torch.tensor(1e4))
    _assert_close(
        _calibrated(graph, _masked(x, mask), ()), _calibrated(graph, _masked(changed, mask), ()), 0
    )


class ChannelsFirst(nn.Module):
    """ConvNeXt's norm: over axis 1 of images."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(0.5, 2, WIDTH))
        self.bias = nn.Parameter(torch.linspace(-1, 1, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean(1, keepdim=True)
        x = (x - mean) / torch.sqrt((x - mean).pow(2).mean(1, keepdim=True) + 1e-6)
        return self.weight[:, None, None] * x + self.bias[:, None, None]


def test_norm_over_the_first_channels_is_fitted_along_them() -> None:
    x = _inputs(60, 6).transpose(1, 2).unflatten(-1, (2, 3))
    model = nn.Sequential(ChannelsFirst(), nn.Conv2d(WIDTH, 3, 1)).eval()
    graph = capture(model, (x[:4],))
    (fit,) = _calibrated(graph, _batches(x), ()).fits.values()
    parameters = _fitted(fit)
    assert parameters.gamma is not None
    assert parameters.gamma.shape == (WIDTH, 1, 1)
    with torch.no_grad():
        y = model[0](x)
    sample = RowSample(0)
    rows = (a.movedim(1, -1).reshape(-1, WIDTH).contiguous().numpy() for a in (x, y))
    sample.add(*rows, _row_keys(graph, x, 6))
    expected = fit_diagonal(*sample.rows())
    assert isinstance(expected, Fit)
    assert expected.parameters.gamma is not None
    np.testing.assert_allclose(parameters.gamma.ravel(), expected.parameters.gamma, atol=1e-3)
    assert fit.fit_error == pytest.approx(expected.error, rel=1e-3)


class TimeMajor(nn.Module):
    """Tokens along axis 0 inside."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
        y: Tensor = self.norm(x.transpose(0, 1)).transpose(0, 1)
        return y * attention_mask[..., None]


def test_masked_rows_of_tokens_first_do_not_count() -> None:
    x, mask = _inputs(), _mask()
    graph = capture(TimeMajor().eval(), kwargs=_masked(x, mask)[0])
    changed = torch.where(mask[..., None] > 0, x, torch.tensor(1e4))
    for size in (20, 7):
        _assert_close(
            _calibrated(graph, _masked(x, mask, size), ()),
            _calibrated(graph, _masked(changed, mask, size), ()),
            0,
        )


def test_batch_of_as_many_samples_as_tokens_is_read_as_the_others_are() -> None:
    x, mask = _inputs(), _mask()
    for model in (Masked().eval(), TimeMajor().eval()):
        graph = capture(model, kwargs=_masked(x, mask)[0])
        square = _masked(x, mask, TOKENS)
        mixed = [*square[:-1], *_masked(x[-TOKENS:], mask[-TOKENS:], 3)]
        own = _calibrated(graph, _masked(x, mask), ())
        found = _calibrated(graph, mixed, ())
        for name, fit in own.fits.items():
            assert fit.sigma_peak == pytest.approx(found.fits[name].sigma_peak, rel=1e-5)
            assert fit.sigma_median == pytest.approx(found.fits[name].sigma_median, rel=1e-5)


def test_mask_that_could_be_read_in_two_ways_counts_nothing_out() -> None:
    x, mask = _inputs(), _mask()
    graph = capture(TimeMajor().eval(), kwargs=_masked(x, mask)[0])
    square, ones = _masked(x, mask, TOKENS), torch.ones(TOKENS, TOKENS, dtype=torch.long)
    _assert_close(
        _calibrated(graph, square, ()),
        _calibrated(graph, [batch | {"attention_mask": ones} for batch in square], ()),
        1e-5,  # another mask makes other samples, whose rows come in another order
        same_samples=False,
    )


def _run(graph: Graph, x: Tensor, convert: Collection[str] = (), **options: Any) -> Calibration:
    return _calibrated(graph, _batches(x), convert, keep_sums=True, **options)


@pytest.mark.parametrize("fit", ["diagonal", "full"])
@pytest.mark.parametrize("way", ["memory", "files"])
@pytest.mark.usefixtures("few_rows")
def test_merged_runs_are_one_run_over_all_data(
    graph: Graph, fit: str, way: str, tmp_path: Path
) -> None:
    x = _inputs()
    runs = [_run(graph, part, fit=fit) for part in x.split([25, 30, 5])]
    if way == "files":
        for number, run in enumerate(runs):
            run.save(tmp_path / str(number))
        runs = [Calibration.load(tmp_path / str(number)) for number in range(len(runs))]
    own = _run(graph, x, fit=fit)
    _assert_close(runs[0].merge(runs[1]).merge(runs[2]), own, 1e-4)
    _assert_close(runs[2].merge(runs[0].merge(runs[1])), own, 1e-4)
    assert [fit.method for fit in own.fits.values()] == [fit, fit, fit, "diagonal"]
    assert own.fits["norm"].unmixed == runs[0].merge(runs[1]).fits["norm"].unmixed


@pytest.mark.usefixtures("few_rows")
def test_merged_runs_of_a_module_that_is_called_twice_are_one_run() -> None:
    class Twice(Transformer):
        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.norm(super().forward(x) * 30)
            return y

    graph = capture(Twice().eval(), (_inputs(4),))
    first, second = (_run(graph, part) for part in _inputs().split(30))
    merged = first.merge(second)
    _assert_close(merged, _run(graph, _inputs()), 1e-4)
    np.testing.assert_array_equal(
        _fitted(merged.fits["norm"]).alpha, _fitted(merged.fits["norm#2"]).alpha
    )


def test_merged_sums_are_those_of_all_rows(graph: Graph) -> None:
    first, second = (_run(graph, part, fit="full") for part in _inputs().split([20, 40]))
    sums = first.merge(second).fits[NAMES[0]].sums
    assert sums is not None
    assert sums.sample.seen == 300
    assert {part.rows for part in sums.full} == {300}


def test_sequential_runs_are_not_merged_behind_the_first_converted_site(graph: Graph) -> None:
    first, second = (_run(graph, part, NAMES) for part in _inputs().split(30))
    for one, other in ((first, second), (first, first)):  # equal prefixes, but no merged ones
        with pytest.raises(CalibrationError, match=r"'blocks\.1\.norm' rests on fits of earlier"):
            one.merge(other)


def test_runs_that_convert_the_last_site_alone_are_merged(graph: Graph) -> None:
    first, second = (_run(graph, part, NAMES[-1:]) for part in _inputs().split(30))
    merged = first.merge(second)
    assert merged.converted == {"norm"}
    assert first.merge(_run(graph, _inputs(seed=1))).converted == {"norm"}
    _assert_close(merged, _run(graph, _inputs(), NAMES[-1:]), 1e-4)


def test_runs_of_other_models_or_without_sums_are_not_merged(graph: Graph) -> None:
    own = _run(graph, _inputs())
    other = Transformer()
    nn.init.normal_(other.norm.weight, 2.0, 0.5)  # type: ignore[arg-type]
    foreign = capture(other.eval(), (_inputs(4),))
    for calibration, told in (
        (_run(foreign, _inputs()), "of different models"),
        (_calibrated(graph, _batches(_inputs()), ()), "has no sums to merge.*keep_sums=True"),
    ):
        for pair in ((own, calibration), (calibration, own)):
            with pytest.raises(CalibrationError, match=told):
                pair[0].merge(pair[1])


def test_sums_are_kept_on_request_alone(graph: Graph, tmp_path: Path) -> None:
    plain = _calibrated(graph, _batches(_inputs()), fit="full")
    assert all(fit.sums is None for fit in plain.fits.values())
    plain.save(tmp_path / "plain")
    _run(graph, _inputs(), NAMES, fit="full").save(tmp_path / "sums")
    sizes = [(tmp_path / name).stat().st_size for name in ("plain", "sums")]
    assert sizes[1] > 10 * sizes[0]
    _assert_close(Calibration.load(tmp_path / "sums"), Calibration.load(tmp_path / "plain"), 0)
