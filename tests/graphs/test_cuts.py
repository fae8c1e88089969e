"""Cuts: a graph run stage by stage gives what it gives when it is run whole, in both worlds."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dyt_compile.errors import DytCompileError
from dyt_compile.graphs.base import Graph
from dyt_compile.graphs.cuts import stages
from dyt_compile.passes.capture import capture
from dyt_compile.passes.match import match
from dyt_compile.sites import NormSite
from dyt_compile.terms import Value
from tests.models import (
    CHANNELS,
    Gallery,
    Residual,
    Shared,
    Spelled,
    Transformer,
    dyt_parameters,
    example,
    layer_sum,
    llama,
    randomized,
)

pytestmark = pytest.mark.core


def layer_norm() -> nn.Module:
    return nn.LayerNorm(CHANNELS)


def rms_norm() -> nn.Module:
    return Spelled(llama, bias=False)


def layer_by_hand() -> nn.Module:
    return Spelled(layer_sum)


def mask() -> Tensor:
    kept = torch.ones(2, 5)
    kept[1, 3:] = 0
    return kept


class Parallel(nn.Module):
    """Two norms of one value, and the value itself goes on."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(CHANNELS, CHANNELS)
        self.norm1, self.norm2 = nn.LayerNorm(CHANNELS), nn.RMSNorm(CHANNELS, eps=1e-6)
        self.last = nn.Linear(CHANNELS, CHANNELS)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        y: Tensor = x + self.last(self.norm1(x)) * self.norm2(x)
        return y


class Chain(nn.Module):
    """A norm of the model's input, a norm of that norm, and a norm that is the model's output."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(CHANNELS), nn.LayerNorm(CHANNELS)
        self.last = nn.Linear(CHANNELS, CHANNELS)
        self.norm3 = nn.LayerNorm(CHANNELS)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.norm2(self.norm1(x))
        return self.norm3(self.last(y) + x), y


class Counted(nn.Module):
    """A norm whose inner shape is spelled with the length of another input's axis."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm1 = nn.Linear(CHANNELS, CHANNELS), nn.LayerNorm(CHANNELS)
        self.weight = nn.Parameter(torch.ones(CHANNELS))

    def forward(self, kept: Tensor, x: Tensor) -> Tensor:
        y = self.norm1(self.first(x))
        y = y.view(kept.shape[0], -1, CHANNELS)
        inverse = torch.rsqrt(y.square().mean(-1, keepdim=True) + 1e-6)
        inverse = inverse.expand(kept.shape[0], kept.shape[1], CHANNELS)
        z: Tensor = y * inverse * self.weight + kept[..., None]
        return z


MODELS: dict[str, Callable[[], tuple[nn.Module, tuple[Tensor, ...]]]] = {
    "transformer": lambda: (Transformer(layer_norm), (example(), mask())),
    "llama": lambda: (Transformer(rms_norm), (example(), mask())),
    "by_hand": lambda: (Transformer(layer_by_hand), (example(), mask())),
    "shared": lambda: (Shared(), (example(),)),
    "parallel": lambda: (Parallel(), (example(),)),
    "chain": lambda: (Chain(), (example(),)),
    "counted": lambda: (Counted(), (mask(), example())),
}

WORLDS = ("torch", "onnx")


@functools.cache
def captured(name: str, world: str) -> tuple[Graph, tuple[Tensor, ...]]:
    module, inputs = MODELS[name]()
    randomized(module, name)
    if world == "torch":
        return capture(module, inputs), inputs
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(module, inputs, dynamo=True, opset_version=18, verbose=False)
    assert program is not None
    return capture(program.model), inputs


def whole(graph: Graph, inputs: Sequence[Tensor]) -> list[np.ndarray]:
    batch = graph.bind(tuple(inputs))
    segment = graph.segment(list(graph.inputs.values()), list(graph.outputs.values()))
    return [graph.to_array(value) for value in segment([batch[name] for name in graph.inputs])]


def staged(
    graph: Graph,
    inputs: Sequence[Tensor],
    sites: Sequence[NormSite],
    answer: Callable[[NormSite, Any], Any] | None = None,
) -> list[np.ndarray]:
    """All outputs, run stage by stage; only what the next stage says that it needs is kept."""
    batch = graph.bind(tuple(inputs))
    live: dict[Value, Any] = {value: batch[name] for name, value in graph.inputs.items()}
    cut = stages(graph, sites)
    assert len(cut) == len(sites) + 1
    for place, stage in enumerate(cut):
        live = {value: live[value] for value in stage.start}
        results = graph.segment(stage.start, stage.made)([live[v] for v in stage.start])
        live.update(zip(stage.made, results, strict=True))
        if place < len(sites):
            site = sites[place]
            if answer is None:
                start = list(dict.fromkeys((site.input, *stage.read)))
                (y,) = graph.segment(start, [site.output])([live[value] for value in start])
            else:
                y = answer(site, live[site.input])
            live[site.output] = y
    return [graph.to_array(live[value]) for value in graph.outputs.values()]


def assert_equal(found: Sequence[np.ndarray], expected: Sequence[np.ndarray]) -> None:
    assert len(found) == len(expected)
    for y, z in zip(found, expected, strict=True):
        np.testing.assert_allclose(y, z, rtol=0, atol=3e-6 * np.abs(z).max())


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("name", MODELS)
def test_stages_in_order_give_what_the_whole_graph_gives(name: str, world: str) -> None:
    graph, inputs = captured(name, world)
    sites = match(graph).sites
    assert len(sites) >= 2
    assert_equal(staged(graph, inputs, sites), whole(graph, inputs))


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("name", MODELS)
def test_whole_graph_gives_what_the_module_gives(name: str, world: str) -> None:
    graph, inputs = captured(name, world)
    module, _ = MODELS[name]()
    with torch.no_grad():
        results = randomized(module, name)(*inputs)
    if isinstance(results, dict):
        results = tuple(results.values())
    results = results if isinstance(results, tuple) else (results,)
    found = whole(graph, inputs)
    assert len(found) == len(results)
    for y, z in zip(found, results, strict=True):
        np.testing.assert_allclose(y, z.numpy(), rtol=0, atol=1e-5 * float(z.abs().max()))


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("name", MODELS)
def test_any_choice_of_sites_can_be_cut_at(name: str, world: str) -> None:
    graph, inputs = captured(name, world)
    sites = match(graph).sites
    expected = whole(graph, inputs)
    for chosen in ((), sites[:1], sites[-1:], sites[::2]):
        assert_equal(staged(graph, inputs, chosen), expected)


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("name", MODELS)
def test_dyt_between_stages_equals_dyt_in_the_graph(name: str, world: str) -> None:
    graph, inputs = captured(name, world)
    sites = match(graph).sites
    values = {site.name: dyt_parameters((CHANNELS,), seed=n) for n, site in enumerate(sites)}

    def answer(site: NormSite, x: Any) -> Any:
        p = values[site.name]
        assert p.gamma is not None
        assert p.beta is not None
        array = graph.to_array(x)
        y = np.tanh(p.alpha * array) * p.gamma + p.beta
        return graph.from_array(y.astype(np.float32), site.output)

    replaced = graph.replace([(site, values[site.name]) for site in sites])
    expected = whole(replaced, inputs)
    assert_equal(staged(graph, inputs, sites, answer), expected)
    original = whole(graph, inputs)
    assert any(np.abs(y - z).max() > 0.01 for y, z in zip(expected, original, strict=True))
    assert len(match(replaced).sites) == len(sites)
    assert all(site.kind.value == "dyt" for site in match(replaced).sites)


@pytest.mark.parametrize("world", WORLDS)
def test_stage_starts_with_no_more_than_what_lives(world: str) -> None:
    graph, _ = captured("transformer", world)
    sites = match(graph).sites
    for place, stage in enumerate(stages(graph, sites)):
        assert len(set(stage.start)) == len(stage.start)
        assert not set(stage.start) & set(stage.made)
        assert not any(value.constant for value in (*stage.start, *stage.made))
        if place:
            assert sites[place - 1].output in stage.start
        if place < len(sites):
            assert sites[place].input in (*stage.start, *stage.made)
        # the residual, the norm's output, the mask's bias, and the skip over all blocks
        assert len(stage.start) <= 4


@pytest.mark.parametrize("world", WORLDS)
def test_segment_without_its_input_names_what_is_missing(world: str) -> None:
    graph, _ = captured("transformer", world)
    site = match(graph).sites[-1]
    with pytest.raises(DytCompileError, match=next(iter(graph.inputs))):
        graph.segment([], [site.output])


@pytest.mark.parametrize("world", WORLDS)
def test_replacing_leaves_the_graph_and_its_weights_as_they_are(world: str) -> None:
    graph, inputs = captured("transformer", world)
    before = whole(graph, inputs)
    count = len(graph.terms)
    graph.replace([(site, dyt_parameters((CHANNELS,))) for site in match(graph).sites])
    assert len(graph.terms) == count
    for y, z in zip(whole(graph, inputs), before, strict=True):
        np.testing.assert_array_equal(y, z)


def test_branches_without_a_common_path_are_cut_right() -> None:
    branches = {name: Residual(nn.LayerNorm(CHANNELS)) for name in ("left", "right")}
    module = Gallery(branches, dict.fromkeys(branches, "tokens"))
    inputs = (example(), example("image"))
    graph = capture(randomized(module, "gallery"), inputs)
    sites = match(graph).sites
    assert [site.name for site in sites] == ["left.norm", "right.norm"]
    assert_equal(staged(graph, inputs, sites), whole(graph, inputs))
