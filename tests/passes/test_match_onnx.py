"""Matching in graphs of ONNX, as torch's exporter writes them for opsets 18, 20 and 23."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterable
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from torch import Tensor, nn

from dyt_compile.graphs.base import Graph
from dyt_compile.passes.capture import capture
from dyt_compile.passes.match import match
from dyt_compile.sites import Match, NormKind, NormSite
from tests.models import (
    CHANNELS,
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
    examples,
    gallery,
    layer_rsqrt,
    llama,
    randomized,
)

pytestmark = pytest.mark.core

OPSETS = (18, 20, 23)

VARIANTS = ("18", "20", "23", "18-dynamic")
"""Opsets, and whether the batch may have any length."""

FEWER = ("18", "23")
"""For what is written alike at opsets 18 and 20."""

ALONE = "rms_norm_without_affine"
"""At opset 23 its gamma is a tensor of ones as large as x: a model of its own."""

CLOSE = 1e-5
"""Float32: ONNX Runtime against torch, through two small layers and a DyT."""


def named(entries: Iterable[Any]) -> list[Any]:
    """Entries as parameters of a test, each under its own name."""
    return [pytest.param(entry, id=entry.name) for entry in entries]


def export(module: nn.Module, *inputs: Tensor, opset: int = 18, dynamic: bool = False) -> ir.Model:
    """The ONNX model that torch writes; dynamic: axis 0 of every input has any length."""
    shapes = tuple({0: torch.export.Dim.DYNAMIC} for _ in inputs) if dynamic else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            module, inputs, dynamo=True, opset_version=opset, verbose=False, dynamic_shapes=shapes
        )
    assert program is not None
    return program.model


def operators(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


def run(graph: Graph, *inputs: Tensor) -> list[np.ndarray]:
    """All outputs of a graph as float32 arrays."""
    batch = graph.bind(inputs)
    segment = graph.segment(list(graph.inputs.values()), list(graph.outputs.values()))
    values = segment([batch[name] for name in graph.inputs])
    return [graph.to_array(value).astype(np.float32) for value in values]


class Exported:
    """A gallery, its graph in ONNX, and what was matched in it."""

    def __init__(self, entries: tuple[Any, ...], variant: str) -> None:
        opset, _, dynamic = variant.partition("-")
        self.module = gallery(entries)
        model = export(self.module, *examples(), opset=int(opset), dynamic=bool(dynamic))
        self.graph = capture(model)
        self.found: Match = match(self.graph)

    def sites(self, name: str) -> list[NormSite]:
        return [site for site in self.found.sites if site.name.split(".")[0] == name]

    def refusals(self, name: str) -> list[Any]:
        return [entry for entry in self.found.refusals if entry.name.split(".")[0] == name]

    def site(self, name: str) -> NormSite:
        assert self.refusals(name) == []
        (site,) = self.sites(name)
        return site

    @functools.cached_property
    def original(self) -> dict[str, np.ndarray]:
        """Every branch's output."""
        return dict(zip(self.module.names, run(self.graph, *examples()), strict=True))

    @functools.cached_property
    def replaced(self) -> dict[str, np.ndarray]:
        """Every branch's output with DyT at every site."""
        pairs = [(site, dyt_parameters(site.parameter_shape)) for site in self.found.sites]
        replaced = self.graph.replace(pairs)
        return dict(zip(self.module.names, run(replaced, *examples()), strict=True))


GATHERED = tuple(spelling for spelling in SPELLINGS if spelling.name != ALONE)


@functools.cache
def spellings(variant: str) -> Exported:
    return Exported(GATHERED, variant)


@functools.cache
def near_misses(variant: str) -> Exported:
    return Exported((*NEAR_MISSES, *TANH_NEAR_MISSES), variant)


@functools.cache
def trained(variant: str) -> Exported:
    return Exported(TRAINED, variant)


def assert_constant(graph: Graph, value: Any, expected: np.ndarray | None) -> None:
    assert (value is None) == (expected is None)
    if value is not None and expected is not None:
        found = graph.constant(value)
        assert found is not None
        np.testing.assert_allclose(np.ravel(found).astype(np.float32), expected, rtol=1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("spelling", named(GATHERED))
def test_exported_spelling_is_found(spelling: Spelling, variant: str) -> None:
    exported = spellings(variant)
    site = exported.site(spelling.name)
    norm = exported.module.get_submodule(spelling.name).get_submodule("norm")
    assert site.name == f"{spelling.name}.norm"
    assert site.kind is NormKind(spelling.kind)
    assert site.axes == spelling.axes
    assert site.channels == spelling.channels
    assert site.affine == spelling.affine
    assert site.eps == pytest.approx(spelling.eps, rel=1e-4, abs=1e-8)
    assert site.dtype == "float32"
    assert_constant(exported.graph, site.gamma, spelling.gamma(norm))
    assert_constant(exported.graph, site.beta, spelling.beta(norm))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("spelling", named(GATHERED))
def test_exported_spelling_is_replaced_as_by_hand(spelling: Spelling, variant: str) -> None:
    exported = spellings(variant)
    site = exported.site(spelling.name)
    branch = exported.module.get_submodule(spelling.name)
    assert isinstance(branch, Branch)
    x, parameters = example(spelling.layout), dyt_parameters(site.parameter_shape)
    with torch.no_grad():
        expected = by_hand(branch, parameters, spelling)(x).numpy()
        original = branch(x).numpy()
    bound = CLOSE * np.abs(expected).max()
    np.testing.assert_allclose(exported.replaced[spelling.name], expected, rtol=0, atol=bound)
    np.testing.assert_allclose(exported.original[spelling.name], original, rtol=0, atol=bound)
    assert np.abs(expected - original).max() > 100 * bound


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize(
    "opset",
    [
        18,
        20,
        23,
    ],
)
def test_rms_norm_without_affine_is_a_site_without_affine(opset: int, dynamic: bool) -> None:
    (spelling,) = (s for s in SPELLINGS if s.name == ALONE)
    branch, x = spelling.branch(), example()
    graph = capture(export(branch, x, opset=opset, dynamic=dynamic))
    (site,) = match(graph).sites
    assert site.kind is NormKind.RMS_NORM
    assert site.affine == ()
    assert site.eps == pytest.approx(spelling.eps, rel=1e-4)
    parameters = dyt_parameters(site.parameter_shape)
    with torch.no_grad():
        expected = by_hand(branch, parameters)(x).numpy()
    (y,) = run(graph.replace([(site, parameters)]), x)
    np.testing.assert_allclose(y, expected, rtol=0, atol=CLOSE * np.abs(expected).max())


@pytest.mark.parametrize("variant", FEWER)
@pytest.mark.parametrize("miss", named(NEAR_MISSES))
def test_exported_near_miss_is_no_site(miss: NearMiss, variant: str) -> None:
    exported = near_misses(variant)
    assert exported.sites(miss.name) == []
    if miss.kind is not None:
        (refusal,) = exported.refusals(miss.name)
        assert refusal.name == f"{miss.name}.norm"
        if miss.kind not in ("group_norm", "instance_norm"):
            assert refusal.kind is NormKind(miss.kind)
            assert miss.reason in refusal.reason


@pytest.mark.parametrize("variant", FEWER)
@pytest.mark.parametrize("miss", named(TANH_NEAR_MISSES))
def test_exported_tanh_or_erf_elsewhere_is_no_site(miss: NearMiss, variant: str) -> None:
    exported = near_misses(variant)
    assert exported.sites(miss.name) == []
    assert exported.refusals(miss.name) == []


@pytest.mark.parametrize("variant", FEWER)
@pytest.mark.parametrize("entry", named(TRAINED))
def test_exported_trained_dyt_is_recognized(entry: Trained, variant: str) -> None:
    exported = trained(variant)
    site = exported.site(entry.name)
    norm = exported.module.get_submodule(entry.name).get_submodule("norm")
    assert site.name == f"{entry.name}.norm"
    assert site.kind is NormKind(entry.kind)
    assert site.affine == entry.affine
    held = [v for v in (site.alpha, site.gamma, site.beta, site.shift) if v is not None]
    assert len(held) == len(entry.parameters)
    for value, name in zip(held, entry.parameters, strict=True):
        offset = 0.0 if name in ("beta", "bias", "shift") else entry.offset
        expected = norm.get_parameter(name).detach().flatten().numpy() + offset
        assert_constant(exported.graph, value, expected)


@pytest.mark.parametrize("variant", FEWER)
def test_group_norm_is_refused_by_its_kind(variant: str) -> None:
    (refusal,) = near_misses(variant).refusals("group_norm")
    assert refusal.kind in (NormKind.GROUP_NORM, NormKind.INSTANCE_NORM)


@pytest.mark.parametrize("variant", FEWER)
def test_instance_norm_is_refused_by_its_kind(variant: str) -> None:
    (refusal,) = near_misses(variant).refusals("instance_norm")
    assert refusal.kind is NormKind.INSTANCE_NORM


def test_hand_written_layer_norm_of_opset_23_is_no_rms_norm() -> None:
    branch = randomized(Branch(Spelled(layer_rsqrt)), "trap")
    model = export(branch, example(), opset=23)
    written = operators(model)
    assert "RMSNormalization" in written, "torch no longer fuses this form: rewrite the test"
    assert "Sub" in written
    (site,) = match(capture(model)).sites
    assert site.kind is NormKind.LAYER_NORM
    assert site.affine == ("gamma", "beta")


def test_eps_that_the_exporter_drops_is_read_as_none() -> None:
    branch = randomized(Branch(Spelled(llama, bias=False, eps=1e-9)), "tiny")
    model = export(branch, example(), opset=18)
    (site,) = match(capture(model)).sites
    assert site.kind is NormKind.RMS_NORM
    assert site.eps == pytest.approx(0.0, abs=2e-9)


@pytest.mark.parametrize("opset", OPSETS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_half_precision_llama_is_found_with_its_casts(dtype: torch.dtype, opset: int) -> None:
    branch = randomized(Branch(Spelled(llama, bias=False, eps=1e-6)), "half").to(dtype)
    x = example(dtype=dtype)
    graph = capture(export(branch, x, opset=opset))
    (site,) = match(graph).sites
    name = str(dtype).removeprefix("torch.")
    assert site.kind is NormKind.RMS_NORM
    assert site.eps == pytest.approx(1e-6, rel=1e-3)
    assert site.affine == ("gamma",)
    assert (site.dtype, site.input.dtype, site.output.dtype) == (name, name, name)
    parameters = dyt_parameters((CHANNELS,))
    with torch.no_grad():
        expected = by_hand(branch, parameters)(x).float().numpy()
    batch = graph.bind((x.float().numpy().astype(np.dtype(ir.DataType[NAMES[name]].numpy())),))
    replaced = graph.replace([(site, parameters)])
    segment = replaced.segment(list(replaced.inputs.values()), list(replaced.outputs.values()))
    (y,) = segment([batch[key] for key in replaced.inputs])
    bound = 4 * torch.finfo(dtype).eps * np.abs(expected).max()
    np.testing.assert_allclose(y.astype(np.float32), expected, rtol=0, atol=bound)


NAMES = {"float16": "FLOAT16", "bfloat16": "BFLOAT16"}


def test_second_call_of_a_shared_module_is_numbered() -> None:
    graph = capture(export(randomized(Shared(), "shared"), example()))
    sites = match(graph).sites
    assert [site.name for site in sites] == ["norm", "norm#2"]
    assert [site.tied_to for site in sites] == [None, "norm"]


def test_residual_add_of_the_norms_input_does_not_hide_it() -> None:
    branch = randomized(Residual(Spelled(llama, bias=False)), "residual")
    x = example()
    graph = capture(export(branch, x))
    (site,) = match(graph).sites
    parameters = dyt_parameters((CHANNELS,))
    with torch.no_grad():
        expected = by_hand(branch, parameters)(x).numpy()
    (y,) = run(graph.replace([(site, parameters)]), x)
    np.testing.assert_allclose(y, expected, rtol=0, atol=CLOSE * np.abs(expected).max())


def test_variance_that_someone_else_reads_is_no_site() -> None:
    branch = randomized(Branch(ReadVariance()), "read")
    assert match(capture(export(branch, example()))).sites == ()


@pytest.mark.parametrize("opset", OPSETS)
def test_stripped_metadata_leaves_names_from_initializers(opset: int) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = Branch(nn.LayerNorm(CHANNELS))
            self.llama = Branch(Spelled(llama, bias=False))
            self.bare = Branch(nn.LayerNorm(CHANNELS, elementwise_affine=False))

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.bare(self.llama(self.block(x)))
            return y

    model = export(randomized(Model(), "named"), example(), opset=opset)
    full = [site.name for site in match(capture(model)).sites]
    assert full == ["block.norm", "llama.norm", "bare.norm"]
    for node in model.graph:
        node.metadata_props.clear()
    names = [site.name for site in match(capture(model)).sites]
    assert names[:2] == ["block.norm", "llama.norm"]
    assert len(set(names)) == 3


def test_same_norms_are_found_in_torch_and_in_onnx() -> None:
    branch = randomized(Residual(nn.LayerNorm(CHANNELS)), "both")
    (in_torch,) = match(capture(branch, (example(),))).sites
    (in_onnx,) = match(capture(export(branch, example()))).sites
    ours, theirs = in_torch.to_dict(), in_onnx.to_dict()
    for record in (ours, theirs):
        del record["consumers"]
    assert ours == theirs
