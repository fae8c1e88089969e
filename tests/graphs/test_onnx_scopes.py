"""Module paths in files of torch's older exporter, which leaves some out and repeats others."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from dyt_compile.passes.capture import capture
from dyt_compile.passes.match import match
from dyt_compile.sites import Match
from tests.models import CHANNELS, Shared, Spelled, example, llama, randomized

pytestmark = pytest.mark.core


class Held(nn.Module):
    """Norms in containers that are never called, and in a sequence, which is."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleDict({"norm": nn.LayerNorm(CHANNELS), "mix": nn.Linear(CHANNELS, CHANNELS)})
            for _ in range(2)
        )
        bare = nn.LayerNorm(CHANNELS, elementwise_affine=False)
        self.head = nn.Sequential(nn.Linear(CHANNELS, CHANNELS), nn.Sequential(bare, nn.ReLU()))
        self.norm = Spelled(llama, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer["mix"](layer["norm"](x))
        return self.norm(self.head(x))


class Repeated(nn.Module):
    """A model within a model, called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Held()
        self.norm = nn.LayerNorm(CHANNELS)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.inner(self.inner(x)))


class Numbered(nn.Module):
    """Attributes whose own names end as those of second calls do."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(CHANNELS)
        self.norm_1 = nn.LayerNorm(CHANNELS)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm_1(torch.relu(self.norm(x)))


class Untrained(Repeated):
    """Every gamma the same, so that the exporter keeps one."""


MODELS: dict[str, Callable[[], nn.Module]] = {
    "shared": Shared,
    "held": Held,
    "repeated": Repeated,
    "numbered": Numbered,
}


def export(module: nn.Module, path: Path, opset: int) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(module, (example(),), path, dynamo=False, opset_version=opset)
    return path


def told(found: Match) -> list[tuple[str, str, tuple[str, ...], str | None]]:
    assert found.refusals == ()
    return [(site.name, site.kind.value, site.affine, site.tied_to) for site in found.sites]


@pytest.mark.parametrize("opset", [14, 17])
@pytest.mark.parametrize("name", MODELS)
def test_older_exporter_gives_the_sites_of_torch_export(
    name: str, opset: int, tmp_path: Path
) -> None:
    module = randomized(MODELS[name](), name)
    wanted = told(match(capture(module, (example(),))))
    assert told(match(capture(export(module, tmp_path / "old.onnx", opset)))) == wanted


def test_gammas_that_the_exporter_merged_leave_the_names_apart(tmp_path: Path) -> None:
    module = Untrained().eval()
    wanted = told(match(capture(module, (example(),))))
    found = match(capture(export(module, tmp_path / "old.onnx", 17)))
    assert [(name, kind) for name, kind, *_ in told(found)] == [entry[:2] for entry in wanted]


def test_optimizer_leaves_the_names_apart(tmp_path: Path) -> None:
    module = randomized(Repeated(), "repeated")
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    path = export(module, tmp_path / "old.onnx", 17)
    onnxruntime.InferenceSession(path, options)
    wanted = told(match(capture(module, (example(),))))
    assert told(match(capture(tmp_path / "optimized.onnx"))) == wanted
