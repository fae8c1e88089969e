"""What becomes of norms that are read, called or fed in unusual ways: docs/fitting.md, row by row.

The architectures are real ones of transformers with random weights, in torch and in ONNX.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dyt_compile
from dyt_compile import Calibration
from dyt_compile.calibration import SiteFit
from dyt_compile.dyt import evaluate

transformers = pytest.importorskip("transformers")

SAMPLES, TOKENS, WIDTH = 16, 8, 32
Batches = list[dict[str, Tensor]]
SIZES = {
    "vocab_size": 64, "hidden_size": WIDTH, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 32,
}  # fmt: skip
DECODER = {
    **SIZES, "num_key_value_heads": 2, "use_cache": False, "bos_token_id": 1, "eos_token_id": 2,
    "pad_token_id": 0,
}  # fmt: skip
GPT2 = {
    "vocab_size": 64, "n_embd": WIDTH, "n_layer": 2, "n_head": 4, "n_positions": 32,
    "use_cache": False, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
MIXTRAL = {
    **DECODER, "num_local_experts": 4, "num_experts_per_tok": 2,
    "experts_implementation": "batched_mm",
}  # fmt: skip


def _built(architecture: str, sizes: dict[str, Any]) -> nn.Module:
    """A model with weights that matter: random ones of the usual size hardly leave the residual."""
    made = getattr(transformers, architecture)
    torch.manual_seed(0)
    model: nn.Module = made(made.config_class(**sizes)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name.lower() or "ln_" in name:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
            elif parameter.ndim == 2:
                parameter.mul_(4)
    return model


def _ids(seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 64, (SAMPLES, TOKENS), generator=generator)


def _padded(count: int = 4, *, beyond: int = 0, filler: int = 0, seed: int = 0) -> Batches:
    """Sentences of 3 to 8 tokens, with `filler` in the padding, which is longer by `beyond`."""
    made = []
    for number in range(count):
        ids = F.pad(_ids(seed + number), (0, beyond))
        counted = torch.arange(TOKENS + beyond)[None] < 3 + torch.arange(SAMPLES)[:, None] % 6
        made.append({"input_ids": ids.where(counted, filler), "attention_mask": counted.long()})
    return made


def _exported(model: nn.Module, batches: Batches, folder: Path) -> Path:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
            return self.model(input_ids=input_ids, attention_mask=attention_mask)[0]

    names = ("input_ids", "attention_mask")
    torch.onnx.export(
        Plain().eval(), tuple(batches[0][name] for name in names), folder / "model.onnx",
        dynamo=True, verbose=False, external_data=False, input_names=names,
        dynamic_shapes=({0: torch.export.Dim.DYNAMIC},) * 2,
    )  # fmt: skip
    return folder / "model.onnx"


WORLDS = pytest.mark.parametrize("world", ["torch", "onnx"])


def _in(world: str, model: nn.Module, batches: Batches, folder: Path) -> Any:
    return model if world == "torch" else _exported(model, batches, folder)


def _assert_close(a: Calibration, b: Calibration) -> None:
    """The same functions, up to a step of alpha's fine grid.

    Where tanh is nearly linear, many an alpha makes nearly the same function, and the rounding of
    another kernel (of another length) chooses among them.
    """
    for first, second in zip(a.fits.values(), b.fits.values(), strict=True):
        assert first.fit_error == pytest.approx(second.fit_error, rel=1e-3)
        y = _output(first)
        assert np.linalg.norm(_output(second) - y) < 5e-3 * np.linalg.norm(y)


def _output(fit: SiteFit) -> np.ndarray[Any, Any]:
    """What a fit gives for made-up rows of the size of its own."""
    assert fit.parameters is not None
    assert fit.sigma_median is not None
    held = fit.mix.offset if fit.mix is not None else fit.parameters.gamma
    assert held is not None
    rows = np.random.default_rng(0).standard_normal((100, held.size)) * fit.sigma_median
    y = evaluate(fit.parameters, rows.astype(np.float32))
    return y if fit.mix is None else fit.mix(y)


def _named(calibration: Calibration, ending: str) -> list[str]:
    return [name for name in calibration.fits if name.endswith(ending)]


@WORLDS
def test_padding_does_not_count_in_bert(world: str, tmp_path: Path) -> None:
    model = _in(world, _built("BertModel", SIZES), _padded(), tmp_path)
    own = dyt_compile.calibrate(model, _padded())
    _assert_close(own, dyt_compile.calibrate(model, _padded(filler=7)))
    everywhere = {"attention_mask": torch.ones(SAMPLES, TOKENS).long()}
    counted = dyt_compile.calibrate(model, [batch | everywhere for batch in _padded()])
    with pytest.raises(AssertionError):
        _assert_close(own, counted)
    if world == "torch":  # the exported file has one length
        _assert_close(own, dyt_compile.calibrate(model, _padded(beyond=4, filler=9)))


@WORLDS
def test_post_norms_are_read_by_the_residual_add(world: str, tmp_path: Path) -> None:
    model = _in(world, _built("BertModel", SIZES), _padded(), tmp_path)
    calibration = dyt_compile.calibrate(model, _padded(), fit="full")
    reasons = [str(fit.unmixed) for fit in calibration.fits.values()]
    assert ["residual add" in reason for reason in reasons] == [True] * 4 + [False]
    assert "the model's output" in reasons[-1]
    error = dyt_compile.convert(model, _padded(2, seed=50), calibration=calibration).report.error
    assert error is not None
    assert error < 0.5


@WORLDS
def test_tied_head_takes_up_a_full_fit_of_its_own(world: str, tmp_path: Path) -> None:
    model = _built("GPT2LMHeadModel", GPT2)
    assert model.lm_head.weight is model.transformer.wte.weight  # type: ignore[union-attr]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    given = _in(world, model, _padded(), tmp_path)
    calibration = dyt_compile.calibrate(given, _padded(12), fit="full")
    assert [fit.method for fit in calibration.fits.values()] == ["full"] * 5
    result = dyt_compile.convert(given, _padded(2, seed=50), calibration=calibration)
    diagonal = dyt_compile.convert(
        given,
        _padded(2, seed=50),
        calibration=dyt_compile.calibrate(given, _padded(12), fit="diagonal"),
    )
    assert result.report.error is not None
    assert diagonal.report.error is not None
    assert result.report.error < diagonal.report.error
    if world == "torch":
        state = result.model.state_dict()
        assert any(torch.equal(value, before["transformer.wte.weight"]) for value in state.values())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@WORLDS
def test_massive_first_token_leaves_the_other_tokens_their_fit(world: str, tmp_path: Path) -> None:
    model = _built("GPT2LMHeadModel", GPT2)
    with torch.no_grad():
        model.transformer.wpe.weight[0] = 3e3 * torch.randn(WIDTH)  # type: ignore[union-attr,index]
    whole = _full(12)
    given = _in(world, model, whole, tmp_path)
    calibration = dyt_compile.calibrate(given, whole, fit="diagonal")
    for fit in calibration.fits.values():
        assert fit.sigma_peak is not None
        assert fit.sigma_peak > 100
        assert fit.fit_error is not None
        assert fit.fit_error < 0.6


def _full(count: int) -> Batches:
    """Sentences without padding."""
    return [
        {"input_ids": _ids(n), "attention_mask": torch.ones(SAMPLES, TOKENS).long()}
        for n in range(count)
    ]


@WORLDS
def test_layers_that_are_called_again_share_their_values(world: str, tmp_path: Path) -> None:
    model = _in(world, _built("AlbertModel", {**SIZES, "embedding_size": 16}), _padded(), tmp_path)
    calibration = dyt_compile.calibrate(model, _padded(), fit="full")
    later = [name for name in calibration.fits if name.endswith("#2")]
    if world == "torch":
        assert len(later) == 2
    for name in later:
        first, second = calibration.fits[name.removesuffix("#2")], calibration.fits[name]
        assert first.unmixed == second.unmixed == "its module is called several times"
        for parameter, array in first.arrays().items():
            np.testing.assert_array_equal(array, second.arrays()[parameter])
        assert first.fit_error != second.fit_error
    report = dyt_compile.convert(model, _padded(2, seed=50), calibration=calibration).report
    assert report.converted == 5


@WORLDS
def test_norms_of_queries_and_keys_are_fitted_along_a_head(world: str, tmp_path: Path) -> None:
    model = _in(world, _built("Qwen3ForCausalLM", {**DECODER, "head_dim": 8}), _padded(), tmp_path)
    calibration = dyt_compile.calibrate(model, _padded(), fit="full")
    names = [*_named(calibration, "q_norm"), *_named(calibration, "k_norm")]
    assert len(names) == 4
    for name in names:
        fit = calibration.fits[name]
        assert fit.parameters is not None
        assert fit.parameters.gamma is not None
        assert fit.parameters.gamma.shape == (8,)
        assert "readers are not all linear" in str(fit.unmixed)
    _assert_close(calibration, dyt_compile.calibrate(model, _padded(filler=7), fit="full"))


def test_norm_that_a_router_reads_is_converted_and_its_cost_is_measured() -> None:
    model = _built("MixtralForCausalLM", MIXTRAL)
    calibration = dyt_compile.calibrate(model, _padded(), fit="full")
    routed = _named(calibration, "post_attention_layernorm")
    assert [calibration.fits[name].method for name in routed] == ["diagonal"] * 2
    result = dyt_compile.convert(model, _padded(2, seed=50), calibration=calibration)
    kept = dyt_compile.convert(
        model, _padded(2, seed=50), calibration=calibration, exclude="post_attention"
    )
    assert (result.report.converted, kept.report.converted) == (5, 3)
    assert result.report.error is not None
    assert kept.report.error is not None
    assert kept.report.error != result.report.error
    assert max(kept.report.error, result.report.error) < 0.5


class Routed(nn.Module):
    """A mixture of experts in which every expert sees every token: Switch, in its dense form."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm = nn.LayerNorm(WIDTH)
        self.gate = nn.Linear(WIDTH, 4, bias=False)
        self.up = nn.ModuleList(nn.Linear(WIDTH, 48) for _ in range(4))
        self.down = nn.ModuleList(nn.Linear(48, WIDTH) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        scores = self.gate(y).softmax(-1)
        best = scores.amax(-1, keepdim=True)
        made = [down(F.gelu(up(y))) for up, down in zip(self.up, self.down, strict=True)]
        weights = torch.where(scores == best, scores, 0.0)
        out: Tensor = x + sum(weights[..., n : n + 1] * expert for n, expert in enumerate(made))
        return out


def test_router_and_experts_take_up_one_matrix() -> None:
    generator = torch.Generator().manual_seed(0)
    batches = [(torch.randn(16, TOKENS, WIDTH, generator=generator),) for _ in range(12)]
    model = Routed().eval()
    calibration = dyt_compile.calibrate(model, batches)
    fit = calibration.fits["norm"]
    assert fit.mix is not None
    assert fit.parameters is not None
    result = dyt_compile.convert(model, batches, calibration=calibration)
    x = batches[0][0]
    squashed = np.tanh(fit.parameters.alpha * x.numpy())
    model.norm = nn.Identity()  # type: ignore[assignment]
    with torch.no_grad():
        wanted = model(torch.from_numpy(fit.mix(squashed))) - torch.from_numpy(fit.mix(squashed))
        found = result.model(x) - x
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4)


class Adaptive(nn.Module):
    """DiT's block without its attention: a norm that the condition scales and shifts (adaLN)."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm = nn.LayerNorm(WIDTH, elementwise_affine=False, eps=1e-6)
        self.modulation = nn.Linear(WIDTH, 3 * WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 64), nn.Linear(64, WIDTH)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        shift, scale, gate = self.modulation(F.silu(condition))[:, None].chunk(3, dim=-1)
        y = self.norm(x) * (1 + scale) + shift
        out: Tensor = x + gate * self.down(F.gelu(self.up(y)))
        return out


def _conditions(count: int = 6, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    shapes = (8, TOKENS, WIDTH), (8, WIDTH)
    made = [[torch.randn(shape, generator=generator) for shape in shapes] for _ in range(count)]
    return [(x, condition) for x, condition in made]


def _adaptive_file(model: nn.Module, folder: Path) -> Path:
    torch.onnx.export(
        model, _conditions()[0], folder / "model.onnx", dynamo=True, verbose=False,
        external_data=False, dynamic_shapes=({0: torch.export.Dim.DYNAMIC},) * 2,
    )  # fmt: skip
    return folder / "model.onnx"


@WORLDS
def test_adaptive_norms_keep_their_modulation(world: str, tmp_path: Path) -> None:
    model: Any = Adaptive().eval()
    if world == "onnx":
        model = _adaptive_file(model, tmp_path)
    calibration = dyt_compile.calibrate(model, _conditions(), fit="full")
    (fit,) = calibration.fits.values()
    assert fit.method == "diagonal"
    assert "readers are not all linear" in str(fit.unmixed)
    assert fit.parameters is not None
    assert fit.parameters.gamma is not None
    assert fit.parameters.gamma.shape == (WIDTH,)
    error = dyt_compile.convert(model, _conditions(2, 9), calibration=calibration).report.error
    assert error is not None
    assert error < 0.1
