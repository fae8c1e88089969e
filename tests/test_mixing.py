"""Full fits in real graphs: which readers take a matrix up, exactly, and which do not."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dyt_compile
from dyt_compile.calibration import Calibration, SiteFit
from dyt_compile.dyt import DytParameters, Mix
from dyt_compile.errors import CalibrationError
from dyt_compile.graphs.base import Graph
from dyt_compile.mixing import obstacle
from dyt_compile.passes.capture import capture
from dyt_compile.passes.match import match
from dyt_compile.passes.rewrite import rewrite
from dyt_compile.ridge import FullFit, fit_full

calibrate_module = importlib.import_module("dyt_compile.passes.calibrate")
WIDTH, TOKENS = 8, 5
ALPHA = 0.7


class Mixed(nn.Module):
    """tanh(alpha x) matrix + offset, in the place of a norm."""

    def __init__(self, mix: Mix, axis: int) -> None:
        super().__init__()
        self.matrix, self.offset = map(torch.from_numpy, (mix.matrix, mix.offset))
        self.axis = axis

    def forward(self, x: Tensor) -> Tensor:
        squashed = torch.tanh(ALPHA * x).movedim(self.axis, -1)
        return (squashed @ self.matrix + self.offset).movedim(-1, self.axis)


class Net(nn.Module):
    """A norm, read by what the subclass says."""

    axis = -1

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm: nn.Module = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, 6)
        self.other = nn.Linear(WIDTH, 6, bias=False)
        self.scale = nn.Parameter(torch.rand(WIDTH) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.norm(x))
        return y


class TwoReaders(Net):
    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return F.gelu(self.head(y)) * self.other(y)


class MeanOverTokens(Net):
    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.norm(x).mean(dim=1))
        return y


class FirstToken(Net):
    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.norm(x)[:, 0] * 3.0)
        return y


class FlatTokens(Net):
    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.other(self.norm(x).transpose(0, 1).flatten(0, 1))
        return y


class InputByOutput(Net):
    """Transformers' Conv1D: x @ weight + bias."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH, 6))
        self.bias = nn.Parameter(torch.randn(6))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return torch.addmm(self.bias, y.view(-1, WIDTH), self.weight).view(*y.shape[:-1], 6)


class ChannelsFirst(Net):
    axis = 1

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv1d(WIDTH, 6, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.convolution(self.norm(x).transpose(1, 2))
        return y


class Tied(Net):
    """A Linear that something else runs through, too."""

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(x)) + F.gelu(self.head(x))


class Residual(Net):
    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return y + F.gelu(y @ self.other.weight.T @ self.other.weight)


class Returned(Net):
    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm(x)
        return y


class Activated(Net):
    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(F.gelu(self.norm(x)))
        return y


class ScaledByChannel(Net):
    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.norm(x) * self.scale)
        return y


class Halved(Net):
    def forward(self, x: Tensor) -> Tensor:
        half = WIDTH // 2
        return self.norm(x)[..., :half] @ self.other.weight.T[:half]


class Turned(Net):
    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.norm(x).flip(-1))
        return y


class Depthwise(Net):
    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv1d(WIDTH, WIDTH, kernel_size=1, groups=WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.convolution(self.norm(x).transpose(1, 2))
        return y


class Padded(Net):
    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv1d(WIDTH, 6, kernel_size=3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.convolution(self.norm(x).transpose(1, 2))
        return y


LEGAL = [Net, TwoReaders, MeanOverTokens, FirstToken, FlatTokens, InputByOutput, ChannelsFirst,
         Tied]  # fmt: skip
ILLEGAL = {
    Residual: "residual add",
    Returned: "the model's output",
    Activated: "activation",
    ScaledByChannel: "product for each channel",
    Halved: "takes its channels apart",
    Turned: "",
    Depthwise: "takes its channels apart",
    Padded: "zero padding",
}


def _x(samples: int = 4) -> Tensor:
    return torch.randn(samples, TOKENS, WIDTH, generator=torch.Generator().manual_seed(3))


def _torch_graph(model: nn.Module, folder: Path) -> Graph:
    return capture(model, (_x(),), {})


def _onnx_graph(model: nn.Module, folder: Path) -> Graph:
    torch.onnx.export(
        model, (_x(),), folder / "model.onnx", dynamo=True, verbose=False, opset_version=20,
        dynamic_shapes=({0: torch.export.Dim.DYNAMIC},), external_data=False,
    )  # fmt: skip
    return capture(folder / "model.onnx", (), {})


WORLDS = pytest.mark.parametrize("world", [_torch_graph, _onnx_graph], ids=["torch", "onnx"])
World = Callable[[nn.Module, Path], Graph]


def _fit(seed: int = 5) -> SiteFit:
    rng = np.random.default_rng(seed)
    mix = Mix(
        rng.normal(size=(WIDTH, WIDTH)).astype(np.float32),
        rng.normal(size=WIDTH).astype(np.float32),
    )
    return SiteFit(DytParameters(np.array([ALPHA], np.float32)), 0.1, mix=mix)


def _run(graph: Graph, x: Tensor) -> np.ndarray[Any, Any]:
    values = graph.bind((x.numpy(),))
    run = graph.segment(list(graph.inputs.values()), list(graph.outputs.values()))
    return graph.to_array(run([values[name] for name in graph.inputs])[0])


@WORLDS
@pytest.mark.parametrize("net", LEGAL)
def test_readers_take_up_a_matrix_exactly(net: type[Net], world: World, tmp_path: Path) -> None:
    model = net().eval()
    graph = world(model, tmp_path)
    found = match(graph)
    (site,) = found.sites
    assert obstacle(site, graph.outputs) is None
    fit = _fit()
    calibration = Calibration(MappingProxyType({site.name: fit}), ())
    before = _run(graph, _x())
    converted = rewrite(graph, found, calibration, {site.name})
    assert fit.mix is not None
    expected = copy.deepcopy(model)
    expected.norm = Mixed(fit.mix, -1)
    with torch.no_grad():
        y = expected(_x()).numpy()
    np.testing.assert_allclose(_run(converted, _x()), y, rtol=1e-4, atol=1e-4)
    assert np.abs(before - y).max() > 0.1  # the tolerance tells them apart
    np.testing.assert_array_equal(_run(graph, _x()), before)  # its weights are as they were


@WORLDS
@pytest.mark.parametrize("net", ILLEGAL)
def test_readers_that_mix_no_matrix_tell_why(net: type[Net], world: World, tmp_path: Path) -> None:
    graph = world(net().eval(), tmp_path)
    (site,) = match(graph).sites
    reason = obstacle(site, graph.outputs)
    assert reason is not None
    assert ILLEGAL[net] in reason


@pytest.mark.parametrize("fit", ["auto", "full"])
def test_convert_fits_a_matrix_where_it_may_and_says_why_not_elsewhere(fit: str) -> None:
    batches = [(_x(16) * (1 + number),) for number in range(8)]
    legal, illegal = (
        dyt_compile.convert(net().eval(), batches, mode="all", fit=fit) for net in (Net, Residual)
    )
    assert (legal.report.sites[0].fit, legal.report.sites[0].unmixed) == ("full", None)
    assert illegal.report.sites[0].fit == "diagonal"
    assert "residual add" in str(illegal.report.sites[0].unmixed)
    diagonal = dyt_compile.convert(Net().eval(), batches, mode="all", fit="diagonal").report
    assert diagonal.sites[0].unmixed == "fit is diagonal"
    assert legal.report.error is not None
    assert diagonal.error is not None
    assert legal.report.error < diagonal.error


def test_auto_keeps_the_diagonal_fit_where_the_full_one_is_worse(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def worse(*rows: Any, **options: Any) -> FullFit:
        full = fit_full(*rows, **options)
        assert isinstance(full, FullFit)
        return replace(full, error=9.0, least=9.0)

    monkeypatch.setattr(calibrate_module, "fit_full", worse)
    for fit, chosen in (("auto", "diagonal"), ("full", "full")):
        batches = [(_x(16),)] * 8
        site = dyt_compile.convert(Net().eval(), batches, mode="all", fit=fit).report.sites[0]
        assert site.fit == chosen
        assert (site.unmixed is None) == (fit == "full")
    assert site.fit_error == 9.0


def test_calls_of_one_module_get_a_diagonal_fit() -> None:
    class Twice(Net):
        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.norm(x)) + self.other(self.norm(2 * x + 1))

    batches = [(_x(16),)] * 8
    sites = dyt_compile.convert(Twice().eval(), batches, mode="all", fit="full").report.sites
    assert [site.fit for site in sites] == ["diagonal", "diagonal"]
    assert {site.unmixed for site in sites} == {"its module is called several times"}


def test_calibration_file_holds_the_matrix(tmp_path: Path) -> None:
    result = dyt_compile.convert(Net().eval(), [(_x(16),)] * 8, mode="all", fit="full")
    assert result.calibration is not None
    result.calibration.save(tmp_path / "fits.safetensors")
    loaded = Calibration.load(tmp_path / "fits.safetensors")
    graph = capture(Net().eval(), (_x(),), {})
    again = rewrite(graph, match(graph), loaded, loaded.converted)
    np.testing.assert_array_equal(_run(again, _x()), _run(result.graph, _x()))


def test_compiled_models_refuse_a_full_fit() -> None:
    result = dyt_compile.convert(Net().eval(), [(_x(16),)] * 8, mode="all", fit="full")
    with pytest.raises(CalibrationError, match=r"'norm' has a full fit.*fit='diagonal'"):
        dyt_compile.backend(calibration=result.calibration)
