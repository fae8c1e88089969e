"""Where gamma and beta of a site fold, and the sentence that says why not."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import dyt_compile
from dyt_compile.sites import NormSite
from dyt_compile.views import viewed

C, T, H = 12, 5, 3
BOTH = ("gamma", "beta")
MULTIPLIED = "the multiplication by another activation `mul`"
TURNED = "the sum `add` of parts that differ in it (as in a rotary embedding)"


class Around(nn.Module):
    """after(self, norm(before(x))): `last`, `other` and `conv` are layers that may follow."""

    def __init__(self, after: Callable[[Any, Tensor], Any], channels: int = C) -> None:
        super().__init__()
        self.first = nn.Linear(C, C)
        self.norm = nn.LayerNorm(channels)
        self.last = nn.Linear(channels, 4)
        self.other = nn.Linear(channels, channels)
        self.bare = nn.Linear(channels, channels, bias=False)
        self.wide = nn.Linear(T * channels, 2)
        self.conv = nn.Conv1d(channels, 6, 3, groups=3)
        self.padded = nn.Conv1d(channels, 6, 3, padding=1)
        self.back = nn.ConvTranspose1d(channels, 6, 3)
        self.matrix = nn.Parameter(torch.randn(channels, 7))
        self.heads = nn.Parameter(torch.randn(H, channels // H, 2))
        self.token = nn.Parameter(torch.randn(1, 1, channels))
        self.scale = nn.Parameter(torch.randn(channels))
        self.place = nn.Parameter(torch.randn(T, channels))
        self.register_buffer("zero", torch.zeros(()))
        self.after = after

    def forward(self, x: Tensor) -> Any:
        x = self.first(x)
        self.source = x
        return self.after(self, self.norm(x))


def heads(y: Tensor) -> Tensor:
    return y.reshape(y.shape[0], y.shape[1], H, -1).transpose(1, 2)


def rotated(y: Tensor) -> Tensor:
    first, second = y.chunk(2, dim=-1)
    angle = torch.linspace(0, 1, T * C // 2).reshape(T, C // 2)
    cos, sin = angle.cos().repeat(1, 2), angle.sin().repeat(1, 2)
    return y * cos + torch.cat((-second, first), dim=-1) * sin


def attention(self: Around, y: Tensor) -> Tensor:
    q, k, v = heads(y), heads(self.other(y)), heads(self.bare(y))
    return F.scaled_dot_product_attention(q, k, v)


def experts(self: Around, y: Tensor) -> Tensor:
    routed = self.last(y).softmax(-1)
    return routed[..., :1] * torch.where(routed[..., :1] > 0.5, self.other(y), self.bare(y))


def modulated(self: Around, y: Tensor) -> Tensor:
    scale, shift = self.other(self.source), self.bare(self.source)
    result: Tensor = self.last(y * (1 + scale) + shift)
    return result


FOLDING: dict[str, Callable[[Any, Tensor], Any]] = {
    "linear": lambda m, y: m.last(y),
    "three linears": lambda m, y: (m.last(y), m.other(y), m.bare(y)),
    "matmul": lambda m, y: y @ m.matrix,
    "matmul by head": lambda m, y: heads(y) @ m.heads,
    "addmm": lambda m, y: torch.addmm(m.matrix[0], y.reshape(-1, C), m.matrix),
    "grouped convolution": lambda m, y: m.conv(y.transpose(1, 2)),
    "merged tokens": lambda m, y: m.last(y.flatten(0, 1)),
    "channels flattened with tokens": lambda m, y: m.wide(y.flatten(1)),
    "split heads and back": lambda m, y: m.last(heads(y).transpose(1, 2).flatten(2)),
    "permuted twice": lambda m, y: m.last(y.permute(2, 0, 1).permute(1, 2, 0)),
    "first token": lambda m, y: m.last(y[:, 0]),
    "some tokens": lambda m, y: m.last(y[:, 1:3]),
    "picked tokens": lambda m, y: m.last(y[:, torch.tensor([2, 0])]),
    "rolled tokens": lambda m, y: m.last(y.roll(1, 1)),
    "mean over tokens": lambda m, y: m.last(y.mean(1)),
    "sum over tokens": lambda m, y: m.last(y.sum(1)),
    "pooled": lambda m, y: m.last(F.adaptive_avg_pool1d(y.transpose(1, 2), 1).flatten(1)),
    "split channels": lambda m, y: [F.linear(p, m.matrix[:4].T) for p in y.split(4, -1)],
    "chunked tokens": lambda m, y: m.last(y[:, :4].chunk(2, dim=1)[1]),
    "reversed channels": lambda m, y: m.last(y.flip(-1)),
    "joined channels": lambda m, y: F.linear(torch.cat((y, m.source), -1), m.wide.weight[:, :24]),
    "joined with itself": lambda m, y: m.last(torch.cat((y, y), 1)),
    "dropout": lambda m, y: m.last(F.dropout(y, 0.5, training=False)),
    "expanded": lambda m, y: m.last(y[:, None].expand(-1, 2, -1, -1)),
    "negated": lambda m, y: m.last(-y / 3),
    "times a parameter": lambda m, y: m.last(y * m.scale),
    "plus its own double": lambda m, y: m.last(y + y),
    "only its shape besides": lambda m, y: m.last(y) + torch.zeros_like(y)[..., :4],
}

STOPPED: dict[str, tuple[Callable[[Any, Tensor], Any], tuple[str, ...], str]] = {
    "residual": (
        lambda m, y: m.last(y + m.other(y)), (),
        "also read by the residual add `add`",
    ),
    "branch post-norm": (
        lambda m, y: m.source + y, (), "read by the residual add `add`",
    ),
    "output": (lambda m, y: y, (), "it is the model's output `output`"),
    "also output": (
        lambda m, y: (y, m.last(y)), (), "it is also the model's output `output_0`",
    ),
    "activation": (lambda m, y: m.last(F.gelu(y)), (), "read by the activation `gelu`"),
    "norm": (
        lambda m, y: m.last(F.layer_norm(y, (C,))), (), "read by the LayerNorm `layer_norm_1`",
    ),
    "adaLN": (
        modulated, (),
        f"γ cannot pass the addition of another activation `add_1`; β cannot pass {MULTIPLIED}",
    ),
    "rotary embedding": (
        lambda m, y: m.last(rotated(y)), (),
        f"γ cannot pass {TURNED}; β cannot pass {MULTIPLIED}",
    ),
    "attention": (
        attention, (), "γ and β cannot pass the attention `scaled_dot_product_attention`",
    ),
    "product of activations": (
        lambda m, y: y @ m.source.transpose(1, 2), (),
        "read by the product with another activation `matmul`",
    ),
    "padding": (
        lambda m, y: m.last(F.pad(y, (0, 0, 0, 3))), ("gamma",),
        "β cannot pass the zero padding of `pad`",
    ),
    "padded convolution": (
        lambda m, y: m.padded(y.transpose(1, 2)), ("gamma",),
        "β cannot pass the zero padding of `conv1d`",
    ),
    "transposed convolution": (
        lambda m, y: m.back(y.transpose(1, 2)), (),
        "γ and β cannot pass the transposed convolution `conv_transpose1d`",
    ),
    "tied weight": (
        lambda m, y: F.linear(y, m.other.weight) + m.other(m.source), ("beta",),
        "γ cannot fold into the weight of `linear_1`, which is tied with `linear_2`",
    ),
    "plus a parameter": (
        lambda m, y: m.last(y + m.place), ("beta",),
        "γ cannot pass the addition of a constant `add`",
    ),
    "mean over channels": (
        lambda m, y: y.mean(-1), (),
        "γ cannot pass the mean over channels `mean`; β reaches the model's output `output`",
    ),
    "gate": (
        lambda m, y: m.last(y * F.silu(m.source)), ("gamma",),
        "β cannot pass the multiplication by another activation `mul`",
    ),
    "token beside": (
        lambda m, y: m.last(torch.cat((m.token.expand(2, -1, -1), y), 1)), (),
        "γ and β cannot pass `linear_1`, whose weight does not tell its channels apart",
    ),
    "channels as tokens": (
        lambda m, y: F.linear(y.transpose(1, 2), m.place.T), (),
        "γ and β cannot pass `linear_1`, whose weight does not tell its channels apart",
    ),
    "grouped experts": (experts, BOTH, ""),
}  # fmt: skip


def site(after: Callable[[Any, Tensor], Any]) -> NormSite:
    torch.manual_seed(0)
    found = dyt_compile.inspect(Around(after).eval(), (torch.randn(2, T, C),))
    return next(site for site in found.sites if site.name == "norm")


@pytest.mark.parametrize("name", FOLDING)
def test_both_fold_where_all_readers_are_linear_in_the_channels(name: str) -> None:
    found = site(FOLDING[name])
    assert (found.folds, found.unfolded) == (BOTH, "")


@pytest.mark.parametrize("name", STOPPED)
def test_a_reader_that_stops_them_is_named(name: str) -> None:
    after, folds, sentence = STOPPED[name]
    found = site(after)
    assert (found.folds, found.unfolded) == (folds, sentence)
    assert found.to_dict()["folds"] == list(folds)
    assert found.to_dict()["unfolded"] == sentence


# Views, the way of the arrays.


def factored(draw: st.DrawFn, size: int) -> tuple[int, ...]:
    """A shape of that many elements."""
    shape: list[int] = []
    while size > 1:
        factor = draw(st.sampled_from([f for f in range(2, size + 1) if size % f == 0]))
        shape.append(factor)
        size //= factor
    for _ in range(draw(st.integers(0, 2))):
        shape.insert(draw(st.integers(0, len(shape))), 1)
    return tuple(shape) or (1,)


@st.composite
def views(draw: st.DrawFn) -> tuple[np.ndarray, tuple[int, ...], tuple[int, ...]]:
    """An array that broadcasts against a shape, that shape, and another of the same size."""
    size = draw(st.sampled_from([12, 24, 30, 36]))
    before, after = factored(draw, size), factored(draw, size)
    own = [draw(st.sampled_from([1, length])) for length in before]
    array = np.random.default_rng(draw(st.integers(0, 9))).normal(size=own)
    return array, before, after


@given(views())
def test_a_view_of_an_array_is_the_view_of_the_value(
    case: tuple[np.ndarray, tuple[int, ...], tuple[int, ...]],
) -> None:
    array, before, after = case
    found = viewed(array, before, after)
    assert found is not None
    expected = np.broadcast_to(array, before).reshape(after)
    np.testing.assert_array_equal(np.broadcast_to(found, after), expected)


@pytest.mark.parametrize(
    ("before", "after", "own", "expected"),
    [
        ((None, 5, 12), (None, 12), (1, 1, 12), (1, 12)),
        ((None, 5, 12), (None, 60), (1, 1, 12), (1, 60)),
        ((None, None, 12), (None, None, 3, 4), (1, 1, 12), (1, 1, 3, 4)),
        ((2, 12, None, None), (2, 12, None), (1, 12, 1, 1), (1, 12, 1)),
        ((None, None, 12), (None, 12, None), (1, 1, 12), None),
        ((None, 12), (None,), (1, 12), None),
    ],
)
def test_a_view_over_axes_of_unknown_length_keeps_channels_or_refuses(
    before: tuple[int | None, ...],
    after: tuple[int | None, ...],
    own: tuple[int, ...],
    expected: tuple[int, ...] | None,
) -> None:
    found = viewed(np.random.default_rng(0).normal(size=own), before, after)
    assert (None if found is None else found.shape) == expected


# ONNX says the same.


class Gallery(nn.Module):
    """Many models side by side, so that one export covers them all."""

    def __init__(self, names: list[str]) -> None:
        super().__init__()
        every = {**FOLDING, **{name: after for name, (after, _, _) in STOPPED.items()}}
        self.branches = nn.ModuleList(Around(every[name]) for name in names)

    def forward(self, x: Tensor) -> list[Any]:
        return [branch(x) for branch in self.branches]


@pytest.mark.parametrize("dynamo", [True, False], ids=["dynamo", "older exporter"])
def test_onnx_folds_what_torch_folds_and_is_stopped_where_torch_is(
    tmp_path: Path, dynamo: bool
) -> None:
    same = ["linear", "three linears", "matmul by head", "split heads and back", "some tokens",
            "grouped convolution", "joined channels", "split channels", "mean over tokens",
            "channels flattened with tokens", "reversed channels", "picked tokens"]  # fmt: skip
    stopped = ["residual", "output", "adaLN", "padded convolution", "gate"]
    path = tmp_path / "model.onnx"
    torch.manual_seed(0)
    torch.onnx.export(
        Gallery(same + stopped).eval(), (torch.randn(2, T, C),), path,
        dynamo=dynamo, opset_version=20 if dynamo else 17, verbose=False,
    )  # fmt: skip
    sites = [s for s in dyt_compile.inspect(path).sites if s.gamma is not None]
    expected = [(BOTH, "")] * len(same) + [STOPPED[name][1:] for name in stopped]
    for name, found, (folds, sentence) in zip(same + stopped, sites, expected, strict=True):
        assert found.folds == folds, name
        assert _nameless(found.unfolded) == _nameless(sentence), name


def _nameless(sentence: str) -> str:
    return re.sub("`[^`]*`", "``", sentence)


# Models as people have them: pre-norm folds, other places say why they do not.


def _llama_like(kind: str, **options: Any) -> tuple[nn.Module, dict[str, Any]]:
    transformers = pytest.importorskip("transformers")
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, pad_token_id=0, **options,
    )  # fmt: skip
    model = getattr(transformers, kind if kind == "BertModel" else f"{kind}ForCausalLM")(config)
    return model.eval(), {"input_ids": torch.randint(0, 60, (2, 8)), "use_cache": False}


def llama() -> tuple[nn.Module, dict[str, Any]]:
    return _llama_like("Llama", num_key_value_heads=2)


def olmo2() -> tuple[nn.Module, dict[str, Any]]:
    return _llama_like("Olmo2")


def gemma2() -> tuple[nn.Module, dict[str, Any]]:
    return _llama_like("Gemma2", num_key_value_heads=2, head_dim=8)


def mixtral() -> tuple[nn.Module, dict[str, Any]]:
    return _llama_like("Mixtral", num_key_value_heads=2, num_local_experts=4)


def gpt2() -> tuple[nn.Module, dict[str, Any]]:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4)
    model = transformers.GPT2LMHeadModel(config).eval()
    return model, {"input_ids": torch.randint(0, 60, (2, 8)), "use_cache": False}


def bert() -> tuple[nn.Module, dict[str, Any]]:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4,
    )  # fmt: skip
    model = transformers.BertModel(config, add_pooling_layer=False).eval()
    return model, {"input_ids": torch.randint(0, 60, (2, 8))}


def vit() -> tuple[nn.Module, dict[str, Any]]:
    return _timm("vit_tiny_patch16_224", 32, depth=2)


def swin_with_padding() -> tuple[nn.Module, dict[str, Any]]:
    options = {"window_size": 5, "strict_img_size": False, "img_size": 48}
    return _timm("swin_tiny_patch4_window7_224", 48, depths=(2,), embed_dim=16, **options)


def swin_v2() -> tuple[nn.Module, dict[str, Any]]:
    return _timm("swinv2_tiny_window8_256", 64, depths=(2,), embed_dim=16, num_heads=(2,))


def convnext() -> tuple[nn.Module, dict[str, Any]]:
    return _timm("convnext_atto", 64, depths=(1, 1, 1, 1), dims=(16, 16, 32, 32))


def _timm(name: str, size: int, **options: Any) -> tuple[nn.Module, dict[str, Any]]:
    timm = pytest.importorskip("timm")
    if "vit" in name or "swinv2" in name:
        options["img_size"] = size
    if name.startswith("swin_"):
        options["num_heads"] = (2,)
    return timm.create_model(name, **options).eval(), {"x": torch.randn(2, 3, size, size)}


ADD, OUTPUT = "also read by the residual add ``", "it is the model's output ``"
TIED = "γ cannot fold into the weight of ``, which is tied with ``"
ROTARY = STOPPED["rotary embedding"][2]
TRUTH: dict[str, tuple[Callable[[], Any], dict[tuple[tuple[str, ...], str], int]]] = {
    "ViT": (vit, {(BOTH, ""): 5}),
    "LLaMA": (llama, {(BOTH, ""): 5}),
    "GPT-2": (gpt2, {(BOTH, ""): 4, (("beta",), TIED): 1}),
    "BERT": (bert, {((), ADD): 4, ((), OUTPUT): 1}),
    "Gemma 2": (
        gemma2, {(BOTH, ""): 4, ((), "read by the residual add ``"): 4, (("beta",), TIED): 1},
    ),
    "OLMo 2": (
        olmo2, {((), "read by the residual add ``"): 4, ((), ROTARY): 4, (BOTH, ""): 1},
    ),
    "Mixtral": (
        mixtral,
        {
            (BOTH, ""): 3,
            ((), "γ and β cannot pass the product with a weight for each expert ``"): 2,
        },
    ),
    "Swin with padding": (
        swin_with_padding,
        {
            ((), "also read by the LayerNorm ``"): 1,
            (("gamma",), "β cannot pass the zero padding of ``"): 2,
            (BOTH, ""): 3,
        },
    ),
    "Swin v2": (
        swin_v2, {((), ADD): 1, ((), "read by the residual add ``"): 4, (BOTH, ""): 1},
    ),
    "ConvNeXt": (
        convnext,
        {
            ((), "γ cannot pass the residual add ``; β cannot pass the zero padding of ``"): 1,
            (BOTH, ""): 8,
        },
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", TRUTH)
def test_real_architectures_fold_where_they_can(name: str) -> None:
    build, expected = TRUTH[name]
    torch.manual_seed(0)
    model, inputs = build()
    found = dyt_compile.inspect(model, (), inputs)
    counts = Counter((site.folds, _nameless(site.unfolded)) for site in found.sites)
    assert counts == {(folds, _nameless(told)): n for (folds, told), n in expected.items()}
