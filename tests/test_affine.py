"""Sites that become affine maps: what their readers take up, and that nothing else is left."""

from __future__ import annotations

import copy
import json
from collections import Counter
from io import StringIO
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

import dyt_compile
from dyt_compile.calibration import Calibration, SiteFit
from dyt_compile.dyt import DytParameters, Mix, evaluate
from dyt_compile.errors import CalibrationError, OptionError
from dyt_compile.fits import Fit, fit_diagonal
from dyt_compile.graphs.base import Graph
from dyt_compile.mixing import scaling_obstacle
from dyt_compile.passes.capture import capture
from dyt_compile.passes.match import match
from dyt_compile.passes.rewrite import rewrite
from dyt_compile.report.html import page
from dyt_compile.report.terminal import headline, report_table
from dyt_compile.ridge import FullFit, fit_full

from .test_mixing import (
    LEGAL,
    TOKENS,
    WIDTH,
    WORLDS,
    Activated,
    Depthwise,
    Halved,
    Net,
    Padded,
    Residual,
    Returned,
    ScaledByChannel,
    Tied,
    Turned,
    World,
    _run,
    _x,
)

SCALABLE = [*(net for net in LEGAL if net is not Tied), ScaledByChannel, Halved, Turned, Depthwise]
STUCK = [Residual, Returned, Activated, Padded]
"""What takes up gamma and beta, and what does not."""


class Affine(nn.Module):
    """x matrix + offset, in the place of a norm."""

    def __init__(self, matrix: np.ndarray[Any, Any], offset: np.ndarray[Any, Any]) -> None:
        super().__init__()
        self.matrix, self.offset = torch.from_numpy(matrix), torch.from_numpy(offset)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.matrix + self.offset


def _values(*shape: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng(len(shape)).normal(size=shape).astype(np.float32)


def _fit(kind: str) -> SiteFit:
    """An affine fit with a matrix, or with one value a channel."""
    if kind == "full":
        mix = Mix(_values(WIDTH, WIDTH), _values(WIDTH))
        return SiteFit(DytParameters(squash="identity"), 0.1, mix=mix)
    scaled = DytParameters(gamma=_values(WIDTH), beta=_values(WIDTH, 1)[:, 0], squash="identity")
    return SiteFit(scaled, 0.1)


def _reference(model: nn.Module, fit: SiteFit) -> nn.Module:
    expected = copy.deepcopy(model)
    assert fit.parameters is not None
    if fit.mix is not None:
        expected.norm = Affine(fit.mix.matrix, fit.mix.offset)
    else:
        assert fit.parameters.gamma is not None
        assert fit.parameters.beta is not None
        expected.norm = Affine(np.diag(fit.parameters.gamma), fit.parameters.beta)
    return expected


def _operators(graph: Graph) -> Counter[str]:
    """How many operators of each kind compute in a graph."""
    model: Any = graph.model
    if hasattr(model.graph, "nodes"):
        return Counter(str(n.target) for n in model.graph.nodes if n.op == "call_function")
    return Counter(node.op_type for node in model.graph)


CASES = [*(("full", net) for net in LEGAL), *(("diagonal", net) for net in SCALABLE)]


@WORLDS
@pytest.mark.parametrize(("kind", "net"), CASES)
def test_readers_take_up_an_affine_map_and_nothing_is_left(
    kind: str, net: type[Net], world: World, tmp_path: Path
) -> None:
    model = net().eval()
    graph = world(model, tmp_path)
    found = match(graph)
    (site,) = found.sites
    fit = _fit(kind)
    calibration = Calibration(MappingProxyType({site.name: fit}), ())
    before = _run(graph, _x())
    converted = rewrite(graph, found, calibration, {site.name})
    with torch.no_grad():
        y = _reference(model, fit)(_x()).numpy()
    np.testing.assert_allclose(_run(converted, _x()), y, rtol=2e-5, atol=2e-5 * np.abs(y).max())
    assert np.abs(before - y).max() > 0.1  # the tolerance tells them apart
    np.testing.assert_array_equal(_run(graph, _x()), before)  # its weights are as they were
    assert match(converted).sites == ()
    added = _operators(converted) - _operators(graph)
    assert set(added) <= {"aten.add.Tensor", "Add"}  # the bias that a reader did not have
    assert _operators(converted).total() <= _operators(graph).total()


@WORLDS
@pytest.mark.parametrize("net", STUCK)
def test_readers_that_take_up_no_affine_map_tell_why(
    net: type[Net], world: World, tmp_path: Path
) -> None:
    (site,) = match(world(net().eval(), tmp_path)).sites
    assert scaling_obstacle(site) == site.unfolded
    assert site.unfolded


def test_identity_fits_are_those_of_least_squares() -> None:
    x = np.random.default_rng(0).normal(size=(4000, 6)).astype(np.float32)
    y = 3.0 * x + 0.5
    diagonal = fit_diagonal(x, y, "identity")
    assert isinstance(diagonal, Fit)
    np.testing.assert_allclose(diagonal.parameters.gamma, 3.0, rtol=1e-4)
    np.testing.assert_allclose(diagonal.parameters.beta, 0.5, atol=1e-4)
    matrix = np.random.default_rng(1).normal(size=(6, 6)).astype(np.float32)
    full = fit_full(x, x @ matrix + 1, lambda: [(x, x @ matrix + 1)], squash="identity")
    assert isinstance(full, FullFit)
    assert full.parameters.affine
    np.testing.assert_allclose(full.mix.matrix, matrix, atol=1e-3)
    for found in (diagonal.parameters, full.parameters):
        assert found.alpha == 1
    assert diagonal.error < 1e-4
    assert full.error < 1e-3


def test_affine_values_are_evaluated_without_a_squash() -> None:
    x, gamma, beta = _values(3, WIDTH), _values(WIDTH), _values(WIDTH, 1)[:, 0]
    parameters = DytParameters(gamma=gamma, beta=beta, squash="identity")
    np.testing.assert_allclose(evaluate(parameters, x), gamma * x + beta, rtol=1e-6)
    assert set(parameters.named()) == {"gamma", "beta"}


def _batches(scale: float = 0.3) -> list[tuple[Tensor]]:
    """Rows of nearly the same length, whose norm is nearly affine."""
    generator = torch.Generator().manual_seed(7)
    rows = torch.randn(8, 64, TOKENS, WIDTH, generator=generator)
    rows = rows - rows.mean(-1, keepdim=True)
    rows = rows / rows.norm(dim=-1, keepdim=True) * (1 + 1e-3 * rows[..., :1])
    return [(scale * part,) for part in rows]


@pytest.mark.parametrize("fit", ["full", "diagonal"])
@pytest.mark.parametrize("options", [{"mode": "all"}, {"mode": "budget", "budget": 0.05}])
def test_site_whose_norm_is_nearly_affine_becomes_affine(
    options: dict[str, Any], fit: str, tmp_path: Path
) -> None:
    model = Net().eval()
    result = dyt_compile.convert(model, _batches(), affine=True, fit=fit, **options)
    (site,) = result.report.sites
    assert (site.now, site.alpha, site.unaffine) == ("affine", None, None)
    assert site.fit == fit
    assert result.report.error is not None
    assert result.report.error < 0.01
    assert (result.report.converted, result.report.affine) == (1, 1)
    assert "1 to affine maps" in headline(result.report)
    assert _operators(result.graph) == {"aten.linear.default": 1}
    written = dyt_compile.export_onnx(result, tmp_path / "model.onnx")
    assert written.export_error is not None
    assert written.export_error < 1e-5
    told = json.loads(result.report.to_json())
    assert (told["affine"], told["sites"][0]["affine"]) == (1, True)
    assert '"now":"affine"' in page(result.report)
    console = Console(width=100, record=True, file=StringIO())
    console.print(report_table(result.report))
    shown = console.export_text()
    assert "affine" in shown.split("\n\n")[0]
    assert ("affine alone" in shown) == (options["mode"] == "budget")


def test_without_affine_no_site_is_one() -> None:
    result = dyt_compile.convert(Net().eval(), _batches(), mode="all")
    assert result.report.affine == 0
    assert match(result.graph).sites


def test_site_that_cannot_be_affine_says_why_and_becomes_dyt() -> None:
    for options in ({"mode": "all"}, {"mode": "budget", "budget": 0.5}):
        result = dyt_compile.convert(Residual().eval(), _batches(), affine=True, **options)
        (site,) = result.report.sites
        assert site.now == "DyT"
        assert "residual add" in str(site.unaffine)


def test_site_that_dyt_fits_better_says_so() -> None:
    uneven = [(x * torch.linspace(0.1, 4, len(x)).view(-1, 1, 1),) for (x,) in _batches(3.0)]
    result = dyt_compile.convert(Net().eval(), uneven, mode="all", affine=True)
    (site,) = result.report.sites
    assert (site.now, site.unaffine) == ("DyT", "DyT fits held-out rows better")


def test_calls_of_one_module_become_affine_together() -> None:
    class Twice(Net):
        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.norm(x)) + self.other(self.norm(x.flip(1)))

    result = dyt_compile.convert(Twice().eval(), _batches(), mode="all", affine=True)
    assert [(site.now, site.fit) for site in result.report.sites] == [("affine", "diagonal")] * 2
    assert match(result.graph).sites == ()
    assert result.report.error is not None
    assert result.report.error < 0.01


@WORLDS
def test_saved_affine_fits_are_applied_to_the_model_in_any_form(
    world: World, tmp_path: Path
) -> None:
    model = Net().eval()
    result = dyt_compile.convert(model, _batches(), mode="all", affine=True)
    assert result.calibration is not None
    result.calibration.save(tmp_path / "fits.safetensors")
    graph = world(model, tmp_path)
    again = dyt_compile.convert(
        graph.model, calibration=tmp_path / "fits.safetensors", example=(_x(),)
    )
    assert again.report.affine == 1
    with torch.no_grad():
        y = result.model(_x()).numpy()
    np.testing.assert_allclose(_run(again.graph, _x()), y, rtol=1e-5, atol=1e-5)


def test_affine_fit_of_readers_that_cannot_take_it_up_is_refused() -> None:
    loaded = Calibration(MappingProxyType({"norm": _fit("diagonal")}), (), frozenset({"norm"}))
    graph = capture(Residual().eval(), (_x(),), {})
    with pytest.raises(ValueError, match="take up no beta"):
        rewrite(graph, match(graph), loaded, {"norm"})


def test_compiled_models_refuse_an_affine_fit() -> None:
    result = dyt_compile.convert(Net().eval(), _batches(), mode="all", affine=True, fit="diagonal")
    with pytest.raises(CalibrationError, match="'norm' has an affine fit"):
        dyt_compile.backend(calibration=result.calibration)


@pytest.mark.parametrize("options", [{"mode": "exact"}, {}])
def test_affine_where_nothing_is_fitted_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match="affine needs mode"):
        dyt_compile.convert(Net().eval(), example=(_x(),), affine=True, **options)


def test_site_that_reads_an_output_of_the_model_leaves_its_name(tmp_path: Path) -> None:
    class Shown(Net):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            y = 2 * x
            return self.head(self.norm(y)), y

    model, path = Shown().eval(), tmp_path / "model.onnx"
    torch.onnx.export(
        model, (_x(),), path, dynamo=True, verbose=False, output_names=["logits", "hidden"]
    )
    graph = capture(path, (), {})
    calibration = Calibration(MappingProxyType({"norm": _fit("full")}), ())
    converted = rewrite(graph, match(graph), calibration, {"norm"})
    assert list(converted.outputs) == ["logits", "hidden"]
    run = converted.segment(list(converted.inputs.values()), list(converted.outputs.values()))
    logits, hidden = run([_x().numpy()])
    np.testing.assert_allclose(hidden, 2 * _x().numpy())
    assert logits.shape == (4, TOKENS, 6)


@pytest.mark.parametrize("fit", ["full", "diagonal"])
def test_norm_in_a_wider_dtype_than_its_readers_leaves_a_cast_at_most(fit: str) -> None:
    class Wide(Net):
        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.head(self.norm(x.float()).to(x.dtype))
            return y

    model = Wide().eval().to(torch.bfloat16)
    model.norm.float()
    x = _x().to(torch.bfloat16)
    graph = capture(model, (x,), {})
    found = match(graph)
    (site,) = found.sites
    calibration = Calibration(MappingProxyType({site.name: _fit(fit)}), ())
    converted = rewrite(graph, found, calibration, {site.name})
    assert match(converted).sites == ()
    with torch.no_grad():
        y = converted.model(x)
        expected = _reference(model.float(), _fit(fit))(x.float())
    assert not {"aten.layer_norm.default", "aten.mul.Tensor"} & set(_operators(converted))
    assert y.dtype is torch.bfloat16
    assert float((y.float() - expected).norm() / expected.norm()) < 0.02


def test_frontier_counts_affine_maps() -> None:
    result = dyt_compile.convert(Net().eval(), _batches(), affine=True, frontier=True, budget=0.05)
    last = result.report.frontier[-1]
    assert (last.sites, last.affine, last.added) == (1, 1, ("norm (affine)",))
    assert last.kernels_saved == 1
