"""Norms in torch's operators beyond what models are known to use, and what only looks alike."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dyt_compile.passes.capture import capture
from dyt_compile.passes.match import match
from dyt_compile.sites import NormKind
from tests.models import CHANNELS, LAYER, RMS, Branch, Spelled, Spelling, example, randomized
from tests.passes.test_match import EXACT, assert_replaces, assert_says, only_site

pytestmark = pytest.mark.core

Formula = Callable[[Spelled, Tensor], Tensor]


def _moments(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.mean(-1, keepdim=True), x.var(-1, unbiased=False, keepdim=True)


def in_place(self: Spelled, x: Tensor) -> Tensor:
    y = x - x.mean(-1, keepdim=True)
    variance = y.pow(2).mean(-1, keepdim=True)
    variance.add_(self.eps)
    y.div_(variance.sqrt_())
    y.mul_(self.weight)
    return y.add_(self.bias)


def statistics_without_gradient(self: Spelled, x: Tensor) -> Tensor:
    with torch.no_grad():
        mean, variance = _moments(x)
    return (x - mean) / torch.sqrt(variance + self.eps) * self.weight + self.bias


def outside_of_autocast(self: Spelled, x: Tensor) -> Tensor:
    with torch.autocast("cpu", enabled=False):
        mean, variance = _moments(x.float())
        return (x - mean) * torch.rsqrt(variance + self.eps) * self.weight + self.bias


def addcmul(self: Spelled, x: Tensor) -> Tensor:
    mean, variance = _moments(x)
    return torch.addcmul(self.bias, (x - mean) * torch.rsqrt(variance + self.eps), self.weight)


def addcdiv(self: Spelled, x: Tensor) -> Tensor:
    mean, variance = _moments(x)
    return torch.addcdiv(self.bias, (x - mean) * self.weight, torch.sqrt(variance + self.eps))


def std_mean(self: Spelled, x: Tensor) -> Tensor:
    deviation, mean = torch.std_mean(x, dim=-1, unbiased=False, keepdim=True)
    return (x - mean) / torch.sqrt(deviation * deviation + self.eps) * self.weight + self.bias


def squared_error(self: Spelled, x: Tensor) -> Tensor:
    mean = x.mean(-1, keepdim=True).expand_as(x)
    variance = F.mse_loss(x, mean, reduction="none").mean(-1, keepdim=True)
    return (x - mean) * torch.rsqrt(variance + self.eps) * self.weight + self.bias


def scaled_subtraction(self: Spelled, x: Tensor) -> Tensor:
    centred = torch.sub(x, x.sum(-1, keepdim=True), alpha=1 / CHANNELS)
    factor = (centred.pow(2).mean(-1, keepdim=True) + self.eps).rsqrt()
    return centred * factor * self.weight + self.bias


def einsum(self: Spelled, x: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    variance = torch.einsum("...d,...d->...", centred, centred)[..., None] / CHANNELS
    return centred / torch.sqrt(variance + self.eps) * self.weight + self.bias


def rows_by_columns(self: Spelled, x: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    variance = (centred.unsqueeze(-2) @ centred.unsqueeze(-1)).squeeze(-1) / CHANNELS
    return centred * torch.rsqrt(variance + self.eps) * self.weight + self.bias


def length(self: Spelled, x: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    size = torch.linalg.norm(centred, dim=-1, keepdim=True)
    return centred / torch.sqrt(size**2 / CHANNELS + self.eps) * self.weight + self.bias


def pooled(self: Spelled, x: Tensor) -> Tensor:
    centred = x - F.adaptive_avg_pool1d(x, 1)
    variance = F.adaptive_avg_pool1d(centred * centred, 1)
    return centred / torch.sqrt(variance + self.eps) * self.weight + self.bias


def exponent_of_logarithm(self: Spelled, x: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    variance = centred.pow(2).mean(-1, keepdim=True) + self.eps
    return centred * torch.exp(-0.5 * torch.log(variance)) * self.weight + self.bias


def hypotenuse(self: Spelled, x: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    deviation = centred.pow(2).mean(-1, keepdim=True).sqrt()
    both = torch.hypot(deviation, torch.tensor(self.eps**0.5))
    return centred / both * self.weight + self.bias


def clamped_variance(self: Spelled, x: Tensor) -> Tensor:
    mean = x.mean(-1, keepdim=True)
    variance = F.relu((x * x).mean(-1, keepdim=True) - mean * mean)
    return (x - mean) * torch.rsqrt(variance + self.eps) * self.weight + self.bias


def transposed_statistics(self: Spelled, x: Tensor) -> Tensor:
    centred = x - x.transpose(1, 2).mean(1).unsqueeze(-1)
    variance = centred.pow(2).transpose(-1, -2).mean(-2)[..., None]
    return centred * torch.rsqrt(variance + self.eps) * self.weight + self.bias


def group_norm_of_tokens(self: Spelled, x: Tensor) -> Tensor:
    rows = x.reshape(-1, CHANNELS)
    return F.group_norm(rows, 1, self.weight, self.bias, self.eps).reshape(x.shape)


def centred_value_read_elsewhere(self: Spelled, x: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    factor = torch.rsqrt(centred.square().mean(-1, keepdim=True) + self.eps)
    return centred * factor * self.weight + self.bias + 0.0 * torch.relu(centred)


def in_place_rms(self: Spelled, x: Tensor) -> Tensor:
    factor = x.pow(2).mean(-1, keepdim=True).add_(self.eps).rsqrt_()
    return x.mul(factor).mul_(self.weight)


def repeated_rms(self: Spelled, x: Tensor) -> Tensor:
    factor = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)
    return x * factor.repeat(1, 1, CHANNELS) * self.weight


def view_around(self: Spelled, x: Tensor) -> Tensor:
    y = x.view(*x.shape[:-1], 1, CHANNELS)
    y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + self.eps)
    return self.weight * y.view(x.shape)


def clamped_length(self: Spelled, x: Tensor) -> Tensor:
    size = x.norm(p=2, dim=-1, keepdim=True).clamp_min(0.0078)
    return x * (CHANNELS**0.5 / size) * self.weight


def mean_as_product(self: Spelled, x: Tensor) -> Tensor:
    column = torch.full((CHANNELS, 1), 1 / CHANNELS)
    centred = x - x @ column
    return centred * torch.rsqrt((centred * centred) @ column + self.eps) * self.weight + self.bias


def mean_as_linear(self: Spelled, x: Tensor) -> Tensor:
    row = torch.ones(1, CHANNELS) / CHANNELS
    centred = x - F.linear(x, row)
    variance = F.linear(centred.square(), row)
    return centred / torch.sqrt(variance + self.eps) * self.weight + self.bias


def mean_by_pooling(self: Spelled, x: Tensor) -> Tensor:
    centred = x - F.avg_pool1d(x, CHANNELS)
    variance = F.avg_pool1d(centred * centred, CHANNELS)
    return centred / torch.sqrt(variance + self.eps) * self.weight + self.bias


def larger_of_variance_and_nothing(self: Spelled, x: Tensor) -> Tensor:
    mean = x.mean(-1, keepdim=True)
    variance = torch.maximum((x * x).mean(-1, keepdim=True) - mean * mean, torch.zeros(()))
    return (x - mean) * torch.rsqrt(variance + self.eps) * self.weight + self.bias


def statistics_for_each_channel(self: Spelled, x: Tensor) -> Tensor:
    mean, variance = (y.repeat_interleave(CHANNELS, -1) for y in _moments(x))
    return (x - mean) / torch.sqrt(variance + self.eps) * self.weight + self.bias


def beta_subtracted(self: Spelled, x: Tensor) -> Tensor:
    return F.layer_norm(x, (CHANNELS,)) * self.weight - self.bias


def beta_first(self: Spelled, x: Tensor) -> Tensor:
    return (F.layer_norm(x, (CHANNELS,)) + self.bias) * self.weight


def divided_by_gamma(self: Spelled, x: Tensor) -> Tensor:
    return F.layer_norm(x, (CHANNELS,)) / self.weight + self.bias


def einsum_of_named_axes(self: Spelled, x: Tensor) -> Tensor:
    squares = torch.einsum("btd,btd->bt", x, x)
    factor = torch.rsqrt(squares / CHANNELS + self.eps)
    return torch.einsum("btd,bt->btd", x, factor) * self.weight


def einsum_with_gamma(self: Spelled, x: Tensor) -> Tensor:
    factor = torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)
    return torch.einsum("...d,d->...d", x * factor, self.weight)


def batched_product_with_itself(self: Spelled, x: Tensor) -> Tensor:
    rows = x.reshape(-1, 1, CHANNELS)
    squares = torch.bmm(rows, rows.transpose(1, 2)).reshape(*x.shape[:-1], 1)
    return x * torch.rsqrt(squares / CHANNELS + self.eps) * self.weight


def dot_product_with_itself(self: Spelled, x: Tensor) -> Tensor:
    squares = torch.linalg.vecdot(x, x)[..., None]
    return x * torch.rsqrt(squares / CHANNELS + self.eps) * self.weight


LAYERS: tuple[Formula, ...] = (
    in_place, statistics_without_gradient, outside_of_autocast, addcmul, addcdiv, std_mean,
    squared_error, scaled_subtraction, einsum, rows_by_columns, length, pooled,
    exponent_of_logarithm, hypotenuse, clamped_variance, transposed_statistics,
    group_norm_of_tokens, mean_as_product, mean_as_linear, mean_by_pooling,
    larger_of_variance_and_nothing, statistics_for_each_channel, beta_subtracted, beta_first,
    divided_by_gamma,
)  # fmt: skip
ROOT_MEAN_SQUARES: tuple[Formula, ...] = (
    in_place_rms, repeated_rms, view_around, einsum_of_named_axes, einsum_with_gamma,
    batched_product_with_itself, dot_product_with_itself,
)  # fmt: skip

SPELLINGS = (
    *(Spelling(f.__name__, lambda f=f: Spelled(f), "layer_norm", 1e-5, LAYER) for f in LAYERS),
    *(
        Spelling(f.__name__, lambda f=f: Spelled(f, bias=False), "rms_norm", 1e-5, RMS)
        for f in ROOT_MEAN_SQUARES
    ),
    Spelling("clamped", lambda: Spelled(clamped_length, bias=False), "rms_norm", 0.0, RMS),
)


@pytest.mark.parametrize("spelling", [pytest.param(s, id=s.name) for s in SPELLINGS])
def test_spelling_is_found_and_replaced(spelling: Spelling) -> None:
    branch, x = spelling.branch(), example()
    graph = capture(branch, (x,))
    site = only_site(graph)
    assert_says(site, spelling, graph, branch.norm)
    assert_replaces(graph, site, branch, x, EXACT)


@pytest.mark.parametrize("spelling", [pytest.param(s, id=s.name) for s in SPELLINGS])
def test_decomposed_spelling_is_found(spelling: Spelling) -> None:
    branch, x = spelling.branch(), example()
    shapes = ({0: torch.export.Dim.AUTO},)
    program = torch.export.export(branch, (x,), dynamic_shapes=shapes).run_decompositions()
    graph = capture(program)
    assert_says(only_site(graph), spelling, graph, branch.norm)


def test_layer_norm_whose_centred_value_others_read_is_a_layer_norm() -> None:
    site = only_site(capture(Branch(Spelled(centred_value_read_elsewhere)).eval(), (example(),)))
    assert site.kind is NormKind.LAYER_NORM
    assert site.affine == LAYER


def over_tokens(self: Spelled, x: Tensor) -> Tensor:
    deviation = torch.sqrt(x.var(1, unbiased=False, keepdim=True) + self.eps)
    return (x - x.mean(1, keepdim=True)) / deviation


def over_tokens_with_gamma(self: Spelled, x: Tensor) -> Tensor:
    return over_tokens(self, x) * self.weight + self.bias


def large_clamp(self: Spelled, x: Tensor) -> Tensor:
    return x / x.square().mean(-1, keepdim=True).sqrt().clamp(min=1.0) * self.weight


def fourth_powers(self: Spelled, x: Tensor) -> Tensor:
    return x / (x.pow(4).mean(-1, keepdim=True) + self.eps).pow(0.25) * self.weight


def groups(self: Spelled, x: Tensor) -> Tensor:
    rows = x.reshape(-1, CHANNELS)
    return F.group_norm(rows, 3, self.weight, self.bias, self.eps).reshape(x.shape)


def of_a_weight(self: Spelled, x: Tensor) -> Tensor:
    return x + F.layer_norm(self.weight, (CHANNELS,))


def of_a_weight_by_hand(self: Spelled, x: Tensor) -> Tensor:
    factor = torch.rsqrt(self.weight.pow(2).mean(-1, keepdim=True) + self.eps)
    return x * (self.weight * factor)


OTHERS: dict[str, tuple[Formula, str]] = {
    "over_tokens": (over_tokens, "axis -2"),  # RevIN, an instance norm of series
    "over_tokens_with_gamma": (over_tokens_with_gamma, "axis -2"),
    "large_clamp": (large_clamp, "smaller rows keep their size"),
    "fourth_powers": (fourth_powers, "not the root"),
    "groups": (groups, "groups of channels"),
    "of_a_weight": (of_a_weight, "never changes"),
    "of_a_weight_by_hand": (of_a_weight_by_hand, "never changes"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_only_looks_alike_is_refused_with_the_reason(name: str) -> None:
    formula, reason = OTHERS[name]
    branch = randomized(Branch(Spelled(formula)), name)
    found = match(capture(branch, (example(),)))
    assert found.sites == ()
    (refusal,) = found.refusals
    assert reason in refusal.reason


def weighted_mean(self: Spelled, x: Tensor) -> Tensor:
    column = torch.linspace(0, 1, CHANNELS)[:, None] / CHANNELS
    return x * torch.rsqrt((x * x) @ column + self.eps)


def pooled_in_parts(self: Spelled, x: Tensor) -> Tensor:
    squares = F.avg_pool1d(x * x, CHANNELS // 2).repeat_interleave(CHANNELS // 2, -1)
    return x * torch.rsqrt(squares + self.eps)


def product_with_another_row(self: Spelled, x: Tensor) -> Tensor:
    squares = torch.einsum("btd,btd->bt", x, x.flip(1)) / CHANNELS
    return x * torch.rsqrt(squares.abs() + self.eps)[..., None]


def length_of_a_weight(self: Spelled, x: Tensor) -> Tensor:
    return x * (self.weight / self.weight.norm(dim=-1, keepdim=True))


@pytest.mark.parametrize(
    "formula",
    [weighted_mean, pooled_in_parts, product_with_another_row, length_of_a_weight],
)
def test_what_divides_by_something_else_is_neither_site_nor_refusal(formula: Formula) -> None:
    branch = randomized(Branch(Spelled(formula)), formula.__name__)
    found = match(capture(branch, (example(),)))
    assert (found.sites, found.refusals) == ((), ())


def test_norm_is_named_after_its_module_and_not_after_a_scale_behind() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.LayerNorm(CHANNELS, elementwise_affine=False)
            self.scale = Spelled(lambda self, x: x * self.weight, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.scale(self.norm(x))
            return y

    site = only_site(capture(Scaled(), (example(),)))
    assert (site.name, site.affine) == ("norm", RMS)


def test_gamma_along_another_axis_than_the_normalized_one_is_refused() -> None:
    def along_width(self: Spelled, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(1, keepdim=True) + self.eps) * self.weight

    image = example("image")
    norm = Spelled(along_width, image.shape[-1:], bias=False)
    found = match(capture(Branch(norm, "image").eval(), (image,)))
    assert found.sites == ()
    assert "along another axis" in found.refusals[0].reason


def test_norm_over_an_axis_of_any_length_is_refused() -> None:
    class Last(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.layer_norm(x, x.shape[-1:])

    shapes = {"x": {2: torch.export.Dim.AUTO}}
    found = match(capture(Last(), (example(),), dynamic_shapes=shapes))
    assert found.sites == ()
    assert "not fixed" in found.refusals[0].reason


def test_tensor_of_a_dynamic_length_does_not_stop_matching() -> None:
    class Filled(Branch):
        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = super().forward(x) + torch.full((x.shape[0], 1, 1), 0.5)
            return y

    assert only_site(capture(Filled(nn.LayerNorm(CHANNELS)), (example(),))).name == "norm"


def test_dtype_of_another_value_is_not_read_across_a_cut() -> None:
    """Gemma's norm ends in type_as(x): what follows must run without x."""

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = (Branch(Spelled(typed, bias=False)) for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.second(self.first(x))
            return y

    def typed(self: Spelled, x: Tensor) -> Tensor:
        y = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + self.eps)
        return (y * self.weight).type_as(x)

    graph = capture(Twice().eval(), (example(),))
    site, _ = match(graph).sites
    batch = graph.bind((example(),))
    (normed,) = graph.segment(list(graph.inputs.values()), [site.output])(list(batch.values()))
    outputs = list(graph.outputs.values())
    (y,) = graph.segment([site.output], outputs)([normed])
    (expected,) = graph.segment(list(graph.inputs.values()), outputs)(list(batch.values()))
    torch.testing.assert_close(y, expected)


def test_axes_of_length_1_beside_the_normalized_one_do_not_count() -> None:
    """The LayerNorm of GCNet's context, over channels of one place."""

    class Context(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.LayerNorm([CHANNELS, 1, 1])

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = x * self.norm(x.mean((2, 3), keepdim=True))
            return y

    site = only_site(capture(randomized(Context(), "context"), (example("image"),)))
    assert (site.axes, site.channels, site.affine) == ((-3,), CHANNELS, LAYER)
    assert site.parameter_shape == (CHANNELS, 1, 1)
