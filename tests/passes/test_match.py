"""Matching in graphs of torch: every spelling, what only looks like one, names, real models."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dyt_compile.graphs.base import Graph
from dyt_compile.passes.capture import capture
from dyt_compile.passes.match import match
from dyt_compile.sites import NormKind, NormSite
from tests.models import (
    BATCH_NORM,
    CHANNELS,
    HEADS,
    NEAR_MISSES,
    SPELLINGS,
    TANH_NEAR_MISSES,
    TRAINED,
    Branch,
    NearMiss,
    ReadVariance,
    Residual,
    Shared,
    Spelled,
    Spelling,
    Trained,
    by_hand,
    dyt_parameters,
    example,
    llama,
    randomized,
    t5,
)

core = pytest.mark.core

EXACT = 2e-6
"""Float32: DyT as one operator against DyT by hand, through one more small layer."""


def named(entries: Iterable[Any]) -> list[Any]:
    """Entries as parameters of a test, each under its own name."""
    return [pytest.param(entry, id=entry.name) for entry in entries]


def run(graph: Graph, *inputs: Tensor) -> list[np.ndarray]:
    """All outputs of a graph as float32 arrays."""
    batch = graph.bind(inputs)
    segment = graph.segment(list(graph.inputs.values()), list(graph.outputs.values()))
    values = segment([batch[name] for name in graph.inputs])
    return [graph.to_array(value).astype(np.float32) for value in values]


def only_site(graph: Graph) -> NormSite:
    found = match(graph)
    assert found.refusals == ()
    assert len(found.sites) == 1
    return found.sites[0]


def assert_says(site: NormSite, spelling: Spelling, graph: Graph, norm: nn.Module) -> None:
    """The site's record and its gamma and beta are those of the module."""
    assert site.kind is NormKind(spelling.kind)
    assert site.axes == spelling.axes
    assert site.channels == spelling.channels
    assert site.affine == spelling.affine
    assert site.eps == pytest.approx(spelling.eps, rel=1e-4, abs=1e-14)
    assert_constant(graph, site.gamma, spelling.gamma(norm))
    assert_constant(graph, site.beta, spelling.beta(norm))


def assert_constant(graph: Graph, value: Any, expected: np.ndarray | None) -> None:
    assert (value is None) == (expected is None)
    if value is not None and expected is not None:
        found = graph.constant(value)
        assert found is not None
        np.testing.assert_allclose(np.ravel(found).astype(np.float32), expected, rtol=1e-6)


def assert_replaces(
    graph: Graph,
    site: NormSite,
    branch: Branch,
    x: Tensor,
    bound: float,
    spelling: Spelling | None = None,
) -> None:
    """DyT put into the graph equals DyT put into the module by hand."""
    parameters = dyt_parameters(site.parameter_shape)
    with torch.no_grad():
        expected = by_hand(branch, parameters, spelling)(x).float().numpy()
        original = branch(x).float().numpy()
    replaced = graph.replace([(site, parameters)])
    (y,) = run(replaced, x)
    np.testing.assert_allclose(y, expected, rtol=0, atol=bound * np.abs(expected).max())
    assert np.abs(y - original).max() > 10 * bound * np.abs(expected).max()
    (untouched,) = run(graph, x)
    np.testing.assert_allclose(untouched, original, rtol=0, atol=bound * np.abs(original).max())


@core
@pytest.mark.parametrize("spelling", named(SPELLINGS))
def test_spelling_is_found_and_replaced(spelling: Spelling) -> None:
    branch, x = spelling.branch(), example(spelling.layout)
    graph = capture(branch, (x,))
    site = only_site(graph)
    assert_says(site, spelling, graph, branch.norm)
    assert site.name == "norm"
    assert site.dtype == "float32"
    assert not site.parallel_residual
    assert_replaces(graph, site, branch, x, EXACT, spelling)


@core
@pytest.mark.parametrize("spelling", named(SPELLINGS))
def test_decomposed_spelling_is_found_and_replaced(spelling: Spelling) -> None:
    branch, x = spelling.branch(), example(spelling.layout)
    program = torch.export.export(branch, (x,)).run_decompositions()
    graph = capture(program)
    site = only_site(graph)
    assert_says(site, spelling, graph, branch.norm)
    assert site.name == "norm"
    assert_replaces(graph, site, branch, x, EXACT, spelling)


HALVES = tuple(
    spelling
    for spelling in SPELLINGS
    if spelling.name
    in ("layer_norm", "rms_norm", "llama", "olmo", "gemma", "t5", "cohere", "deberta", "deepseek")
)


@core
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("spelling", named(HALVES))
def test_spelling_in_half_precision_is_found_with_its_casts(
    spelling: Spelling, dtype: torch.dtype
) -> None:
    branch, x = spelling.branch().to(dtype), example(dtype=dtype)
    graph = capture(branch, (x,))
    site = only_site(graph)
    assert_says(site, spelling, graph, branch.norm)
    assert site.dtype == str(dtype).removeprefix("torch.")
    assert site.output.dtype == site.dtype
    assert site.input.dtype == site.dtype
    assert_replaces(graph, site, branch, x, 4 * torch.finfo(dtype).eps)


@core
@pytest.mark.parametrize(
    "dtype",
    [
        torch.float32,
        torch.bfloat16,
        torch.float16,
    ],
)
def test_default_eps_of_rms_norm_is_the_one_that_torch_adds(dtype: torch.dtype) -> None:
    branch = randomized(Branch(nn.RMSNorm(CHANNELS, elementwise_affine=False)), "rms").to(dtype)
    site = only_site(capture(branch, (example(dtype=dtype),)))
    x = torch.full((1, 1, CHANNELS), 1e-3, dtype=dtype)
    squares = x.double().square().mean()
    added = (x.double() / branch.norm(x).double()).square().mean() - squares
    assert site.eps == pytest.approx(added.item(), rel=0.03)


@core
@pytest.mark.parametrize("miss", named((*NEAR_MISSES, BATCH_NORM)))
def test_near_miss_is_no_site(miss: NearMiss) -> None:
    found = match(capture(miss.branch(), (example(miss.layout),)))
    assert found.sites == ()
    if miss.kind is not None:
        (refusal,) = found.refusals
        assert refusal.kind is NormKind(miss.kind)
        assert refusal.name == "norm"
        assert miss.reason in refusal.reason
        assert len(refusal.reason) > 20


@core
@pytest.mark.parametrize("miss", named((*NEAR_MISSES, BATCH_NORM)))
def test_decomposed_near_miss_is_no_site(miss: NearMiss) -> None:
    program = torch.export.export(miss.branch(), (example(miss.layout),)).run_decompositions()
    assert match(capture(program)).sites == ()


@core
def test_variance_that_someone_else_reads_is_no_site() -> None:
    branch = randomized(Branch(ReadVariance()), "read")
    assert match(capture(branch, (example(),))).sites == ()


class Bare(nn.Module):
    """A function of x and a learned number alone."""

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function
        self.number = nn.Parameter(torch.tensor([0.01]))

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self.number)


def factor(x: Tensor, axis: int = -1) -> Tensor:
    return torch.rsqrt(x.pow(2).mean(axis, keepdim=True) + 1e-5)


def negated(x: Tensor, _: Tensor) -> Tensor:
    deviation = torch.sqrt(x.var(-1, keepdim=True, unbiased=False) + 1e-5)
    return (x.mean(-1, keepdim=True) - x) / deviation


FALSE_POSITIVES = {
    "row_statistic_along_channels": (
        lambda x, _: x * torch.rsqrt(x.pow(2).mean(-1) + 1e-5).unsqueeze(1),
        (2, CHANNELS, CHANNELS),
    ),
    "broadcast_to_more_rows": (
        lambda x, _: x * factor(x).expand(-1, 7, -1),
        (2, 1, CHANNELS),
    ),
    "negated": (
        negated,
        (2, 5, CHANNELS),
    ),
    "learned_eps": (
        lambda x, eps: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps),
        (2, 5, CHANNELS),
    ),
    "batch_axis": (
        lambda x, _: x * factor(x, 0),
        (4, CHANNELS),
    ),
    "half_of_the_rows": (
        lambda x, _: x * torch.rsqrt(x[..., :6].pow(2).mean(-1, keepdim=True) + 1e-5),
        (2, 5, CHANNELS),
    ),
    "statistic_of_another_row": (
        lambda x, _: x * factor(x.roll(1, 1)),
        (2, 5, CHANNELS),
    ),
    "weighted_squares": (
        lambda x, eps: x * torch.rsqrt((x.pow(2) * (1 + eps)).mean(-1, keepdim=True) + 1e-5),
        (2, 5, CHANNELS),
    ),
}  # fmt: skip


@core
@pytest.mark.parametrize(
    ("function", "shape"),
    [pytest.param(function, shape, id=name) for name, (function, shape) in FALSE_POSITIVES.items()],
)
def test_false_positive_is_no_site(
    function: Callable[[Tensor, Tensor], Tensor], shape: tuple[int, ...]
) -> None:
    program = torch.export.export(Bare(function), (torch.randn(shape),))
    assert match(capture(program)).sites == ()


@core
def test_gamma_that_varies_along_the_first_axis_does_not_stop_matching() -> None:
    norm = Spelled(llama, (HEADS, CHANNELS), bias=False)
    program = torch.export.export(norm, (torch.randn(HEADS, CHANNELS),))
    (site,) = match(capture(program)).sites
    assert site.kind is NormKind.RMS_NORM


@core
@pytest.mark.parametrize("trained", named(TRAINED))
def test_trained_dyt_is_recognized_with_its_parameters(trained: Trained) -> None:
    branch, x = trained.branch(), example(trained.layout)
    graph = capture(branch, (x,))
    site = only_site(graph)
    assert site.kind is NormKind(trained.kind)
    assert site.affine == trained.affine
    assert site.name == "norm"
    assert site.kind.lossless
    values = [site.alpha, site.gamma, site.beta, site.shift]
    held = [value for value in values if value is not None]
    assert len(held) == len(trained.parameters)
    for value, name in zip(held, trained.parameters, strict=True):
        offset = 0.0 if name in ("beta", "bias", "shift") else trained.offset
        expected = branch.norm.get_parameter(name).detach().flatten().numpy() + offset
        assert_constant(graph, value, expected)


@core
@pytest.mark.parametrize("miss", named(TANH_NEAR_MISSES))
def test_tanh_or_erf_elsewhere_is_no_site(miss: NearMiss) -> None:
    found = match(capture(miss.branch(), (example(),)))
    assert found.sites == ()
    assert found.refusals == ()


@core
def test_second_call_of_a_shared_module_is_numbered() -> None:
    graph = capture(randomized(Shared(), "shared"), (example(),))
    found = match(graph)
    assert [site.name for site in found.sites] == ["norm", "norm#2"]
    assert [site.tied_to for site in found.sites] == [None, "norm"]
    assert found.sites[0].gamma is not None
    first, second = (graph.constant(site.gamma) for site in found.sites if site.gamma is not None)
    np.testing.assert_array_equal(first, second)


@core
def test_second_call_of_a_shared_module_is_replaced_alone() -> None:
    module, x = randomized(Shared(), "shared"), example()
    graph = capture(module, (x,))
    second = match(graph).sites[1]
    parameters = dyt_parameters((CHANNELS,))
    replaced = graph.replace([(second, parameters)])
    with torch.no_grad():
        inner = module.second(module.norm(module.first(x))).numpy()
        y = np.tanh(parameters.alpha * inner) * parameters.gamma + parameters.beta
        expected = module.last(torch.from_numpy(y)).numpy()
    (found,) = run(replaced, x)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert [site.kind.value for site in match(replaced).sites] == ["layer_norm", "dyt"]


@core
@pytest.mark.parametrize("formula", [llama, t5], ids=["llama", "t5"])
def test_residual_add_that_reads_a_cast_of_the_norm_does_not_hide_it(
    formula: Callable[[Any, Tensor], Tensor],
) -> None:
    branch = randomized(Residual(Spelled(formula, bias=False)), "residual")
    x = example()
    graph = capture(branch, (x,))
    site = only_site(graph)
    assert site.affine == ("gamma",)
    assert_replaces(graph, site, branch, x, EXACT)


@core
def test_two_norms_of_one_value_are_marked_as_parallel() -> None:
    class Parallel(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm1, self.norm2 = nn.LayerNorm(CHANNELS), nn.LayerNorm(CHANNELS)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.norm1(x) * self.norm2(x)
            return y

    sites = match(capture(Parallel(), (example(),))).sites
    assert [site.name for site in sites] == ["norm1", "norm2"]
    assert all(site.parallel_residual for site in sites)


@core
def test_consumers_are_named_and_the_models_output_is_among_them() -> None:
    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.head = nn.LayerNorm(CHANNELS), nn.Linear(CHANNELS, 2)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            y = self.norm(x)
            return y, self.head(y)

    (site,) = match(capture(Last(), (example(),))).sites
    assert site.consumers == ("linear", "output")


@core
def test_matching_twice_gives_the_same_sites() -> None:
    graph = capture(randomized(Shared(), "shared"), (example(),))
    assert match(graph).to_dict() == match(graph).to_dict()


# Real architectures, small and with random weights: hooks tell how often each norm is called.


def bert() -> tuple[nn.Module, dict[str, Tensor]]:
    from transformers import BertConfig, BertModel

    config = BertConfig(
        vocab_size=50, hidden_size=24, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=16,
    )  # fmt: skip
    return BertModel(config), {"input_ids": torch.arange(16).reshape(2, 8)}


def llama_model() -> tuple[nn.Module, dict[str, Any]]:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=50, hidden_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, intermediate_size=32,
    )  # fmt: skip
    return LlamaForCausalLM(config), {
        "input_ids": torch.arange(16).reshape(2, 8), "use_cache": False,
    }  # fmt: skip


def vit() -> tuple[nn.Module, dict[str, Tensor]]:
    from transformers import ViTConfig, ViTModel

    config = ViTConfig(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        image_size=16, patch_size=8,
    )  # fmt: skip
    return ViTModel(config), {"pixel_values": torch.randn(2, 3, 16, 16)}


def gpt2() -> tuple[nn.Module, dict[str, Any]]:
    from transformers import GPT2Config, GPT2Model

    config = GPT2Config(vocab_size=50, n_embd=24, n_layer=2, n_head=2, n_positions=16)
    return GPT2Model(config), {"input_ids": torch.arange(16).reshape(2, 8), "use_cache": False}


def t5_model() -> tuple[nn.Module, dict[str, Any]]:
    from transformers import T5Config, T5Model

    config = T5Config(
        vocab_size=50, d_model=24, d_kv=12, d_ff=32, num_layers=2, num_heads=2,
    )  # fmt: skip
    ids = torch.arange(16).reshape(2, 8)
    return T5Model(config), {"input_ids": ids, "decoder_input_ids": ids, "use_cache": False}


def gemma2() -> tuple[nn.Module, dict[str, Any]]:
    from transformers import Gemma2Config, Gemma2ForCausalLM

    config = Gemma2Config(
        vocab_size=50, hidden_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, intermediate_size=32, head_dim=12,
    )  # fmt: skip
    return Gemma2ForCausalLM(config), {
        "input_ids": torch.arange(16).reshape(2, 8), "use_cache": False,
    }  # fmt: skip


def whisper() -> tuple[nn.Module, dict[str, Any]]:
    from transformers import WhisperConfig, WhisperModel

    config = WhisperConfig(
        vocab_size=50, d_model=24, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32, num_mel_bins=8,
        max_source_positions=8, max_target_positions=16, pad_token_id=0, bos_token_id=1,
        eos_token_id=2, decoder_start_token_id=1,
    )  # fmt: skip
    return WhisperModel(config), {
        "input_features": torch.randn(2, 8, 16),
        "decoder_input_ids": torch.arange(8).reshape(2, 4), "use_cache": False,
    }  # fmt: skip


MODELS = {
    "bert": bert,
    "llama": llama_model,
    "vit": vit,
    "gpt2": gpt2,
    "t5": t5_model,
    "gemma2": gemma2,
    "whisper": whisper,
}


def is_norm(module: nn.Module) -> bool:
    return isinstance(module, nn.LayerNorm) or type(module).__name__.endswith(
        ("RMSNorm", "T5LayerNorm")
    )


def calls(model: nn.Module, inputs: dict[str, Any]) -> list[str]:
    """Paths of the norms that a forward pass calls, in order; later calls end in their number."""
    seen: list[str] = []
    count: Counter[str] = Counter()

    def hook(path: str) -> Callable[..., None]:
        def called(*_: Any) -> None:
            count[path] += 1
            seen.append(path if count[path] == 1 else f"{path}#{count[path]}")

        return called

    handles = [m.register_forward_hook(hook(p)) for p, m in model.named_modules() if is_norm(m)]
    with torch.no_grad():
        model(**inputs)
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("name", MODELS)
def test_every_norm_that_a_real_model_calls_is_a_site(name: str) -> None:
    pytest.importorskip("transformers")
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model, inputs = MODELS[name]()
        model.eval()
        called = calls(model, inputs)
        graph = capture(model, (), inputs)
    found = match(graph)
    assert called
    assert [site.name for site in found.sites] == called
    assert found.refusals == ()
    norms = dict(model.named_modules())
    for site in found.sites:
        norm = norms[site.name.partition("#")[0]]
        eps = getattr(norm, "eps", getattr(norm, "variance_epsilon", None))
        assert site.eps == pytest.approx(eps, rel=1e-4)
        assert site.channels == 24
        kind = NormKind.LAYER_NORM if isinstance(norm, nn.LayerNorm) else NormKind.RMS_NORM
        assert site.kind is kind


class LearnedQueries(nn.Module):
    """A decoder that normalizes its queries alone before they have seen the input, as DETR does."""

    def __init__(self) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(1, 5, CHANNELS))
        self.norm = nn.LayerNorm(CHANNELS)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.queries.expand(x.shape[0], -1, -1))
        z: Tensor = self.norm(y + x)
        return z


@core
@pytest.mark.parametrize("rows", ["any", "two"])
def test_norm_of_learned_queries_is_refused_and_counted_as_a_call(rows: str) -> None:
    module, inputs = LearnedQueries().eval(), (example(),)
    static = torch.export.export(module, inputs)
    found = match(capture(module, inputs) if rows == "any" else capture(static))
    (site,) = found.sites
    assert (site.name, site.tied_to) == ("norm#2", None)
    (refusal,) = found.refusals
    assert refusal.name == "norm"
    assert "its input is a weight of the model" in refusal.reason
