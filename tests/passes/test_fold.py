"""Folding: the same function, fewer operators, and a reason for what stays."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

import dyt_compile
from dyt_compile import producers
from dyt_compile.errors import RewriteError
from dyt_compile.passes.fold import Folded
from dyt_compile.runtime import Session

C, T, H = 12, 5, 3
TOLERANCE = 1e-5
"""Relative to the largest value: some forty units of rounding in float32."""

ROUTES = ("torch", "onnx", "older onnx")


class DyT(nn.Module):
    """DyT with nothing neutral in it."""

    def __init__(self, shape: tuple[int, ...] = (C,), form: str = "DyT") -> None:
        super().__init__()
        self.alpha = nn.Parameter(0.4 + 0.4 * torch.rand(1))
        self.gamma = nn.Parameter(torch.rand(shape) + 0.5) if "Bare" not in form else None
        self.beta = nn.Parameter(torch.randn(shape)) if form == "DyT" else None

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.alpha * x)
        y = y if self.gamma is None else y * self.gamma
        return y if self.beta is None else y + self.beta


class Transformer(nn.Module):
    """Pre-DyT, a fused QKV without bias, LayerScale on one branch and SkipInit on the other."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.final = DyT(), DyT(), DyT()
        self.embed, self.qkv = nn.Linear(C, C), nn.Linear(C, 3 * C, bias=False)
        self.out, self.up, self.down = nn.Linear(C, C), nn.Linear(C, 2 * C), nn.Linear(2 * C, C)
        self.layer_scale = nn.Parameter(torch.rand(C))
        self.skip = nn.Parameter(torch.tensor([0.3]))
        self.head = nn.Linear(C, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        split = self.qkv(self.first(x)).reshape(x.shape[0], T, 3, H, C // H).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(split[0], split[1], split[2])
        x = x + self.out(y.transpose(1, 2).flatten(2)) * self.layer_scale
        x = x + self.skip * self.down(F.gelu(self.up(self.second(x))))
        result: Tensor = self.head(self.final(x).mean(1))
        return result


class Fixup(nn.Module):
    """A residual block of Fixup (arXiv 1901.09321, figure 1): scalar biases and a multiplier."""

    def __init__(self, kernel: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(C, C, kernel, padding=kernel // 2, bias=False)
        self.second = nn.Conv2d(C, C, kernel, padding=kernel // 2, bias=False)
        names = ("bias1a", "bias1b", "bias2a", "bias2b", "scale")
        self.scalars = nn.ParameterDict({name: torch.randn(1) for name in names})

    def forward(self, x: Tensor) -> Tensor:
        s = self.scalars
        y = torch.relu(self.first(x + s["bias1a"]) + s["bias1b"])
        y = self.second(y + s["bias2a"]) * s["scale"] + s["bias2b"]
        return torch.relu(x + y)


class SigmaReparam(nn.Module):
    """gamma / sigma(W) * W, sigma by power iteration (arXiv 2303.06296, section 3)."""

    def __init__(self) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.tensor([1.3]))
        self.register_buffer("u", F.normalize(torch.randn(8), dim=0))
        self.register_buffer("v", F.normalize(torch.randn(C), dim=0))

    def forward(self, weight: Tensor) -> Tensor:
        sigma = torch.einsum("c,cd,d->", self.u, weight, self.v)
        return self.gamma / sigma * weight


def sigma_reparam() -> nn.Module:
    linear = nn.Linear(C, 8)
    nn.utils.parametrize.register_parametrization(linear, "weight", SigmaReparam(), unsafe=True)
    return nn.Sequential(linear, nn.GELU(), nn.Linear(8, C))


def weight_norm() -> nn.Module:
    layer = nn.utils.parametrizations.weight_norm(nn.Linear(C, 8))
    return nn.Sequential(DyT(), layer, nn.GELU(), nn.Linear(8, C))


class Image(nn.Module):
    """Channels first: DyT before a depth-wise, a padded and a grouped convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.free = nn.Sequential(DyT((C, 1, 1)), nn.Conv2d(C, C, 3, groups=C, bias=False))
        self.padded = nn.Sequential(DyT((C, 1, 1), "DyTScale"), nn.Conv2d(C, 6, 3, padding=1))
        self.stuck = nn.Sequential(DyT((C, 1, 1)), nn.Conv2d(C, 6, 3, padding=1))
        self.head = nn.Sequential(
            DyT((C, 1, 1)), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(C, 4)
        )

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        y = self.free(x)
        return self.padded(y), self.stuck(y), self.head(y)


TOKENS, IMAGE = (2, T, C), (2, C, 6, 5)
MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], dict[str, int], int]] = {
    # model, shape, what folds, how much is left
    "transformer": (Transformer, TOKENS, {"beta": 3, "gamma": 3, "scale": 2}, 0),
    "Fixup, padded": (lambda: Fixup(3), IMAGE, {"scale": 1, "shift": 2}, 2),
    "Fixup, 1 x 1": (lambda: Fixup(1), IMAGE, {"scale": 1, "shift": 4}, 0),
    "sigma-Reparam": (sigma_reparam, TOKENS, {"computed": 1}, 0),
    "weight norm": (weight_norm, TOKENS, {"computed": 1, "beta": 1, "gamma": 1}, 0),
    "image": (Image, IMAGE, {"beta": 2, "gamma": 3}, 2),
}


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def folded(model: nn.Module, x: Tensor, route: str, folder: Path) -> tuple[Folded, list[Tensor]]:
    """The folded model by a route, and its outputs."""
    if route == "torch":
        result = dyt_compile.fold(model, (x,))
        return result, _listed(result.model(x))
    path = folder / "model.onnx"
    dynamo = route == "onnx"
    torch.onnx.export(
        model, (x,), path, dynamo=dynamo, opset_version=20 if dynamo else 17, verbose=False
    )
    result = dyt_compile.fold(path)
    outputs = Session(result.model, "cpu").run([x.numpy()])
    return result, [torch.from_numpy(output) for output in outputs]


def _listed(outputs: Any) -> list[Tensor]:
    return list(outputs) if isinstance(outputs, (tuple, list)) else [outputs]


def difference(found: list[Tensor], expected: list[Tensor]) -> float:
    """The largest difference, relative to the largest value of each output."""
    assert [tuple(y.shape) for y in found] == [tuple(y.shape) for y in expected]
    pairs = zip(found, expected, strict=True)
    return max(float((y - e).abs().max() / e.abs().max()) for y, e in pairs)


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("name", MODELS)
def test_folded_model_computes_the_same(name: str, route: str, tmp_path: Path) -> None:
    build, shape, expected, left = MODELS[name]
    model, x = build().eval(), torch.randn(shape)
    with torch.no_grad():
        before = _listed(model(x))
        result, after = folded(model, x, route, tmp_path)
    assert difference(after, before) < TOLERANCE
    counts = Counter(entry.what for entry in result.folded)
    if route != "torch":  # exporters compute constants themselves, and scale attention's q and k
        counts = Counter({what: min(n, expected.get(what, 0)) for what, n in counts.items()})
        counts["computed"] = expected.get("computed", 0)
    assert +counts == Counter(expected)
    assert len(result.left) == left
    assert all(entry.reason for entry in result.left)


class One(nn.Module):
    """A DyT and its one reader."""

    def __init__(self, reader: nn.Module, shape: tuple[int, ...] = (C,), form: str = "DyT") -> None:
        super().__init__()
        self.norm, self.reader = DyT(shape, form), reader

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.reader(self.norm(x))
        return y

    def size(self, x: Tensor) -> Tensor:
        """What the reader's terms add up to without their signs, in float64."""
        wide = copy.deepcopy(self).double()
        for parameter in wide.parameters():
            parameter.data.abs_()
        total: Tensor = wide(x.double().abs())
        return total


READERS: dict[str, tuple[Callable[[], One], tuple[int, ...]]] = {
    "Linear": (lambda: One(nn.Linear(C, 7)), TOKENS),
    "fused QKV without bias": (lambda: One(nn.Linear(C, 3 * C, bias=False)), TOKENS),
    "1 x 1 convolution": (lambda: One(nn.Conv2d(C, 6, 1), (C, 1, 1)), IMAGE),
    "grouped convolution": (lambda: One(nn.Conv2d(C, 6, 3, groups=3), (C, 1, 1)), IMAGE),
    "padded convolution": (
        lambda: One(nn.Conv2d(C, 6, 3, padding=1), (C, 1, 1), "DyTScale"),
        IMAGE,
    ),
}


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("name", READERS)
def test_fold_of_one_site_moves_a_value_by_two_units_of_rounding_at_most(
    name: str, route: str, tmp_path: Path
) -> None:
    """Units of the sum of its terms' sizes: what one of them is rounded by is half of one."""
    build, shape = READERS[name]
    model, x = build().eval(), torch.randn(shape)
    if "padded" in name:
        model.norm.gamma = nn.Parameter(torch.rand(C, 1, 1) + 0.5)
    with torch.no_grad():
        before, size = model(x), model.size(x)
        result, (after,) = folded(model, x, route, tmp_path)
    (site,) = dyt_compile.inspect(result.model, (x,) if route == "torch" else ()).sites
    assert site.affine == ()
    assert bool(((after - before).double().abs() <= 2 * 2.0**-23 * size).all())


@pytest.mark.parametrize("route", ROUTES)
def test_a_wrong_fold_is_noticed(
    route: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = producers.against_weight

    def wrong(uptake: Any, shape: Any) -> Any:
        factor = right(uptake, shape)
        return None if factor is None else np.roll(factor, 1)

    monkeypatch.setattr(producers, "against_weight", wrong)
    model, x = Transformer().eval(), torch.randn(TOKENS)
    with torch.no_grad():
        _, after = folded(model, x, route, tmp_path)
        assert difference(after, _listed(model(x))) > 100 * TOLERANCE


@pytest.mark.parametrize("route", ROUTES)
def test_no_scalar_operator_is_left_in_a_folded_transformer(route: str, tmp_path: Path) -> None:
    result, _ = folded(Transformer().eval(), torch.randn(TOKENS), route, tmp_path)
    found = dyt_compile.inspect(result.model, (torch.randn(TOKENS),) if route == "torch" else ())
    assert [site.affine for site in found.sites] == [()] * 3
    if route == "torch":
        names = [
            str(node.target) for node in result.model.graph.nodes if node.op == "call_function"
        ]
        assert not any("mul" in name for name in names)
        assert names.count("dyt.DyTBare.default") == 3
        assert names.count("aten.add.Tensor") == 2  # the residuals
    else:
        assert [node.op_type for node in result.model.graph].count("DyTBare") == 3


@pytest.mark.parametrize("route", ROUTES)
def test_computed_weights_become_plain_ones(route: str, tmp_path: Path) -> None:
    result, _ = folded(sigma_reparam().eval(), torch.randn(TOKENS), route, tmp_path)
    if route == "torch":
        made = {str(node.target) for node in result.model.graph.nodes if node.op == "call_function"}
        assert made == {"aten.linear.default", "aten.gelu.default"}
    else:
        kinds = {node.op_type for node in result.model.graph}
        assert not kinds & {"Einsum", "ReduceSum", "ReduceL2"}


def test_the_model_stays_as_it_is_and_shares_what_does_not_change() -> None:
    model, x = Transformer().eval(), torch.randn(TOKENS)
    before = copy.deepcopy(model.state_dict())
    result = dyt_compile.fold(model, (x,))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    after = dict(result.model.named_parameters())
    shared = {name for name, p in model.named_parameters() if p is after.get(name)}
    assert shared == {"embed.weight", "embed.bias"}
    assert {"qkv.weight", "qkv.bias", "head.bias"} <= set(after)
    assert not any("gamma" in name or "skip" in name for name in after)


@pytest.mark.parametrize("route", ROUTES)
def test_tied_weights_are_not_scaled(route: str, tmp_path: Path) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.layer = DyT(), nn.Linear(C, C)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.layer(self.norm(self.layer(x)))
            return y

    model, x = Tied().eval(), torch.randn(TOKENS)
    before = model.layer.weight.detach().clone()
    with torch.no_grad():
        result, after = folded(model, x, route, tmp_path)
        assert difference(after, _listed(model(x))) < TOLERANCE
    assert torch.equal(model.layer.weight, before)
    if route == "torch":
        assert [(entry.name, entry.what) for entry in result.folded] == [("norm", "beta")]
        assert result.left[0].reason == (
            "it cannot fold into the weight of `linear_1`, which is tied with `linear`"
        )
        assert result.model.layer.weight is model.layer.weight


class Chain(nn.Module):
    """DyT, then maps that commute with channels or do not, then a Linear over the last axis."""

    def __init__(self, steps: list[tuple[str, int]], bias: bool) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(C, C), DyT()
        self.scale = nn.Parameter(torch.rand(1) + 0.5)
        self.steps: list[Callable[[Tensor], Tensor]] = []
        y = torch.randn(TOKENS)
        for name, number in steps:
            step = STEPS[name](self, y, number)
            self.steps.append(step)
            y = step(y)
        self.last = nn.Linear(y.shape[-1], 3, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.first(x))
        for step in self.steps:
            y = step(y)
        result: Tensor = self.last(y)
        return result


def _permuted(chain: Chain, y: Tensor, number: int) -> Callable[[Tensor], Tensor]:
    order = [0, *(1 + np.random.default_rng(number).permutation(y.ndim - 1))]
    return lambda y: y.permute([int(axis) for axis in order])


def _split(chain: Chain, y: Tensor, number: int) -> Callable[[Tensor], Tensor]:
    axis = 1 + number % (y.ndim - 1)
    factor = next(f for f in (3, 2, 5, 1) if y.shape[axis] % f == 0)
    return lambda y: y.unflatten(axis, (factor, -1))


def _merged(chain: Chain, y: Tensor, number: int) -> Callable[[Tensor], Tensor]:
    first = 1 + number % (y.ndim - 1)
    return lambda y: y.flatten(first, min(first + 1, y.ndim - 1))


def _axis(action: Callable[[Tensor, int], Tensor]) -> Callable[..., Callable[[Tensor], Tensor]]:
    def make(chain: Chain, y: Tensor, number: int) -> Callable[[Tensor], Tensor]:
        axis = 1 + number % (y.ndim - 1)
        return lambda y: action(y, axis)

    return make


def _mean(chain: Chain, y: Tensor, number: int) -> Callable[[Tensor], Tensor]:
    if y.ndim < 3:
        return lambda y: y
    return lambda y: y.mean(1 + number % (y.ndim - 1))


def _linear(chain: Chain, y: Tensor, number: int) -> Callable[[Tensor], Tensor]:
    layer = nn.Linear(y.shape[-1], 4 + number % 3, bias=number % 2 == 0)
    chain.add_module(f"linear_{len(chain.steps)}", layer)
    return layer


STEPS: dict[str, Callable[[Chain, Tensor, int], Callable[[Tensor], Tensor]]] = {
    "permuted": _permuted,
    "split": _split,
    "merged": _merged,
    "mean": _mean,
    "linear": _linear,
    "flipped": _axis(lambda y, axis: y.flip(axis)),
    "rolled": _axis(lambda y, axis: y.roll(1, axis)),
    "cut": _axis(lambda y, axis: y.narrow(axis, 0, max(y.shape[axis] - 1, 1))),
    "doubled": _axis(lambda y, axis: torch.cat((y, y * 2), axis)),
    "joined": _axis(lambda y, axis: torch.cat((torch.ones_like(y), y), axis)),
    "padded": lambda chain, y, number: lambda y: F.pad(y, (0, number % 2, 1, 0)),
    "scaled": lambda chain, y, number: lambda y: y * chain.scale,
    "shifted": lambda chain, y, number: lambda y: y + chain.scale,
    "divided": lambda chain, y, number: lambda y: y / (1.5 + number),
    "negated": lambda chain, y, number: lambda y: -y,
    "added": lambda chain, y, number: lambda y: y + y * 0.5,
    "bent": lambda chain, y, number: lambda y: torch.relu(y),
}


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from(sorted(STEPS)), st.integers(0, 5)), max_size=6),
    st.booleans(),
)
def test_any_chain_of_maps_computes_the_same(steps: list[tuple[str, int]], bias: bool) -> None:
    torch.manual_seed(0)
    model, x = Chain(steps, bias).eval(), torch.randn(TOKENS)
    with torch.no_grad():
        result = dyt_compile.fold(model, (x,))
        assert difference(_listed(result.model(x)), _listed(model(x))) < TOLERANCE
    told = {(entry.name, entry.what) for entry in (*result.folded, *result.left)}
    assert {("norm", "gamma"), ("norm", "beta")} <= told


@settings(max_examples=12, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(sorted(STEPS)), st.integers(0, 5)), max_size=5))
def test_any_chain_of_maps_computes_the_same_in_onnx(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[str, int]]
) -> None:
    torch.manual_seed(0)
    model, x = Chain(steps, bias=False).eval(), torch.randn(TOKENS)
    with torch.no_grad():
        _, after = folded(model, x, "older onnx", tmp_path_factory.mktemp("chain"))
        assert difference(after, _listed(model(x))) < TOLERANCE


class Affine(nn.Module):
    """Scales and shifts behind a value that the residual reads too: only the Linear takes them."""

    def __init__(self, steps: str) -> None:
        super().__init__()
        self.steps, self.last = steps, nn.Linear(C, C, bias=len(steps) % 2 == 0)
        self.numbers = nn.ParameterList(torch.rand(C) + 0.5 for _ in steps)

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for step, number in zip(self.steps, self.numbers, strict=True):
            y = y * number if step == "*" else y / number if step == "/" else y + number
        return x + self.last(y)


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("steps", ["*+", "+*", "*+*+", "*+/+*"])
def test_a_scale_follows_the_shift_that_was_before_it(
    steps: str, route: str, tmp_path: Path
) -> None:
    """Once from first to last leaves the scales: a scale does not pass a shift that stays."""
    model, x = Affine(steps).eval(), torch.randn(TOKENS)
    with torch.no_grad():
        result, after = folded(model, x, route, tmp_path)
        assert difference(after, [model(x)]) < TOLERANCE
    assert result.left == ()
    assert len(result.folded) == len(steps)
    if route == "torch":
        made = [node.target for node in result.model.graph.nodes if node.op == "call_function"]
        assert made == [torch.ops.aten.linear.default, torch.ops.aten.add.Tensor]
    else:  # the second sum is the bias of the product
        made = [node.op_type for node in result.model.graph]
        assert sorted(set(made) - {"Transpose"}) == ["Add", "MatMul"]


@settings(max_examples=30, deadline=None)
@given(st.text("*+/", max_size=7))
def test_any_chain_of_scales_and_shifts_goes_whole(steps: str) -> None:
    torch.manual_seed(0)
    model, x = Affine(steps).eval(), torch.randn(TOKENS)
    with torch.no_grad():
        result = dyt_compile.fold(model, (x,))
        assert difference([result.model(x)], [model(x)]) < TOLERANCE
    assert (len(result.folded), result.left) == (len(steps), ())


class ScaledLogits(nn.Module):
    """A head whose logits are scaled last, as Cohere's are: what folds is the model's output."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(C, C), nn.Linear(C, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(torch.relu(self.first(x))) * 0.0625
        return logits


@pytest.mark.parametrize("route", ROUTES)
def test_scale_of_the_output_goes_and_the_output_keeps_its_name(route: str, tmp_path: Path) -> None:
    x = torch.randn(3, T, C)
    model = ScaledLogits().eval()
    made, outputs = folded(model, x, route, tmp_path)
    assert difference(outputs, [model(x)]) < TOLERANCE
    assert [fold.what for fold in made.folded] == ["scale"]
    if route != "torch":
        written = onnx.load(next(tmp_path.glob("*.onnx")))
        assert list(made.graph.outputs) == [value.name for value in written.graph.output]


def test_what_stays_says_why() -> None:
    result = dyt_compile.fold(Fixup(3).eval(), (torch.randn(IMAGE),))
    left = {entry.name: entry.reason for entry in result.left}
    padding = "and in its readers it cannot pass the zero padding of"
    assert left == {
        "scalars.bias1a": f"`x` has other readers, {padding} `conv2d`",
        "scalars.bias2a": f"the activation `relu` makes it, {padding} `conv2d_1`",
    }
    assert result.to_dict()["left"][0]["what"] == "shift"


def test_gamma_stays_where_beta_does() -> None:
    result = dyt_compile.fold(Image().eval(), (torch.randn(IMAGE),))
    assert {(e.name, e.what): e.reason for e in result.left} == {
        ("stuck.0", "beta"): "it cannot pass the zero padding of `conv2d_2`",
        ("stuck.0", "gamma"): "its beta stays, and there is no form of DyT with beta alone",
    }


def test_derf_stays_whole() -> None:
    class Derf(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.alpha, self.shift = nn.Parameter(torch.ones(1)), nn.Parameter(torch.zeros(1))
            self.gamma, self.beta = nn.Parameter(torch.rand(C)), nn.Parameter(torch.rand(C))

        def forward(self, x: Tensor) -> Tensor:
            return torch.erf(self.alpha * x + self.shift) * self.gamma + self.beta

    model, x = nn.Sequential(Derf(), nn.Linear(C, C)).eval(), torch.randn(TOKENS)
    result = dyt_compile.fold(model, (x,))
    assert [entry.reason for entry in result.left] == [
        "Derf has no form without beta", "Derf has no form without gamma",
    ]  # fmt: skip
    assert difference([result.model(x)], [model(x)]) < TOLERANCE


def test_norms_stay_as_they_are() -> None:
    """The gamma of an RMSNorm that is written out is no constant beside a Linear."""

    class Norm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.rand(C))

        def forward(self, x: Tensor) -> Tensor:
            return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))

    model, x = nn.Sequential(Norm(), nn.Linear(C, C)).eval(), torch.randn(TOKENS)
    result = dyt_compile.fold(model, (x,))
    assert result.folded == ()
    assert result.model.get_parameter("0.weight") is model[0].weight


def test_random_constants_are_not_stored() -> None:
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.rand(C, C))

        def forward(self, x: Tensor) -> Tensor:
            return x @ (self.weight + torch.rand_like(self.weight))

    result = dyt_compile.fold(Noisy().eval(), (torch.randn(TOKENS),))
    assert result.folded == ()


def test_weights_in_half_precision_are_rounded_once() -> None:
    model = Transformer().eval().to(torch.bfloat16)
    x = torch.randn(TOKENS, dtype=torch.bfloat16)
    result = dyt_compile.fold(model, (x,))
    wide = copy.deepcopy(model).double()
    exact = wide.qkv.weight * wide.first.gamma
    assert torch.equal(result.model.get_parameter("qkv.weight"), exact.bfloat16())


def test_meta_weights_are_refused() -> None:
    with torch.device("meta"):
        model, x = Transformer().eval(), torch.randn(TOKENS)
    with pytest.raises(RewriteError, match="weights are not loaded"):
        dyt_compile.fold(model, (x,))


def test_quantised_weights_in_onnx_are_left(tmp_path: Path) -> None:
    path = tmp_path / "quantised.onnx"
    random = np.random.default_rng(0)
    arrays = {
        "norm.alpha": np.array([0.5], np.float32),
        "norm.gamma": random.uniform(0.5, 1.5, C).astype(np.float32),
        "w.weight": random.integers(-128, 127, (C, 4)).astype(np.int8),
        "w.scale": np.array(0.01, np.float32),
    }
    nodes = [
        helper.make_node("Mul", ["x", "norm.alpha"], ["a"]),
        helper.make_node("Tanh", ["a"], ["b"]),
        helper.make_node("Mul", ["b", "norm.gamma"], ["c"]),
        helper.make_node("DequantizeLinear", ["w.weight", "w.scale"], ["w"]),
        helper.make_node("MatMul", ["c", "w"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes, "quantised",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, C])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [2, 4])],
        [numpy_helper.from_array(array, name) for name, array in arrays.items()],
    )  # fmt: skip
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)]), path)
    result = dyt_compile.fold(path)
    assert [entry.reason for entry in result.left] == ["it cannot pass the quantised weight of `y`"]
    assert "DequantizeLinear" in [node.op_type for node in result.model.graph]
    assert (
        dyt_compile.inspect(path).sites[0].unfolded == "γ cannot pass the quantised weight of `y`"
    )


def test_converted_model_folds_and_exports(tmp_path: Path) -> None:
    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.last = nn.LayerNorm(C), nn.Linear(C, 4, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.last(self.norm(x))
            return y

    batches = [(torch.randn(8, T, C),) for _ in range(4)]
    model = Normed().eval()
    plain = dyt_compile.convert(model, batches, mode="all", fold=False, fit="diagonal")
    result = dyt_compile.convert(model, batches, mode="all", fit="diagonal")
    assert (plain.folded, plain.unfolded) == (None, None)
    assert result.folded is not None
    assert result.unfolded is not None
    assert [entry.what for entry in result.folded.folded] == ["beta", "gamma"]
    x = batches[0][0]
    assert difference([result.model(x)], [plain.model(x)]) < TOLERANCE
    written = dyt_compile.export_onnx(result, tmp_path / "folded.onnx")
    nodes = [node.op_type for node in onnx.load(written.path).graph.node]
    assert "DyTBare" in nodes
    output = Session(ir.load(written.path), "cpu").run([x.numpy()])[0]
    assert difference([torch.from_numpy(output)], [plain.model(x).detach()]) < TOLERANCE
