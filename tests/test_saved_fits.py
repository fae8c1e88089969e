"""Calibrations through the public API: made alone, merged, applied without data, refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dyt_compile
from dyt_compile import Calibration
from dyt_compile.errors import CalibrationError, DataError, OptionError
from dyt_compile.report.terminal import headline

pytestmark = pytest.mark.core

WIDTH, TOKENS = 12, 5


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, 2 * WIDTH)
        self.down = nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.down(F.gelu(self.up(self.norm(x))))
        return y


class Transformer(nn.Module):
    def __init__(self, seed: int = 1) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.blocks = nn.Sequential(Block(), Block())
        self.norm = nn.LayerNorm(WIDTH)
        for name, parameter in self.named_parameters():
            if "norm" in name:
                nn.init.normal_(parameter, 0.5, 0.3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm(self.blocks(x))
        return y


def _batches(count: int = 6, seed: int = 0) -> list[tuple[Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randn(10, TOKENS, WIDTH, generator=generator),) for _ in range(count)]


def _output(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        y: Tensor = model(x)
    return y


def _relative(f: Tensor, g: Tensor) -> float:
    return float((f - g).norm() / f.norm())


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return Transformer().eval()


@pytest.fixture(scope="module")
def calibration(model: nn.Module) -> Calibration:
    return dyt_compile.calibrate(model, _batches())


def test_calibration_is_applied_without_data(model: nn.Module, calibration: Calibration) -> None:
    result = dyt_compile.convert(model, calibration=calibration, example=_batches()[0])
    assert (result.report.mode, result.report.error, result.report.converted) == (
        "calibration", None, 3,
    )  # fmt: skip
    (x,) = _batches(seed=5)[0]
    error = _relative(_output(model, x), _output(result.model, x))
    assert 1e-3 < error < 0.6
    measured = dyt_compile.convert(model, _batches(1, seed=5), calibration=calibration)
    assert measured.report.error == pytest.approx(error, rel=1e-4)
    assert measured.report.samples == 10


def test_calibration_that_convert_saved_gives_what_it_returned(
    model: nn.Module, tmp_path: Path
) -> None:
    result = dyt_compile.convert(model, _batches(), mode="budget", budget=0.2)
    assert 0 < result.report.converted < 3
    assert result.calibration is not None
    result.calibration.save(tmp_path / "fits")
    again = dyt_compile.convert(model, calibration=tmp_path / "fits", example=_batches()[0])
    (x,) = _batches(seed=5)[0]
    assert torch.equal(_output(again.model, x), _output(result.model, x))
    kept = [site for site in again.report.sites if not site.converted]
    assert {site.reason for site in kept} == {"excluded, or kept by the calibration"}


def test_calibration_of_torch_is_applied_to_the_exported_file(
    model: nn.Module, calibration: Calibration, tmp_path: Path
) -> None:
    torch.onnx.export(
        model, _batches()[0], tmp_path / "model.onnx", dynamo=True, verbose=False,
        dynamic_shapes=({0: torch.export.Dim.DYNAMIC},), external_data=False,
    )  # fmt: skip
    torch_result = dyt_compile.convert(model, _batches(), calibration=calibration)
    onnx_result = dyt_compile.convert(tmp_path / "model.onnx", _batches(), calibration=calibration)
    assert onnx_result.report.error == pytest.approx(torch_result.report.error, rel=1e-4)
    assert [site.fit for site in onnx_result.report.sites] == ["full", "full", "diagonal"]


def test_calibration_of_another_model_is_refused(calibration: Calibration) -> None:
    class Wider(Transformer):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.LayerNorm(WIDTH, eps=1e-3)

    class Deeper(Transformer):
        def __init__(self) -> None:
            super().__init__()
            self.blocks.append(Block())

    for other, told in (
        (Transformer(seed=2), "gamma or beta of site 1 have other values"),
        (Wider(), "site 3 is layer_norm of 12 channels, axes .*eps 1e-05, not .*eps 0.001"),
        (Deeper(), "it has 3 sites, not 4"),
    ):
        with pytest.raises(CalibrationError, match=f"of another model: {told}") as caught:
            dyt_compile.convert(other.eval(), calibration=calibration, example=_batches()[0])
        assert "\n" not in str(caught.value)


def test_full_fit_is_refused_where_the_readers_cannot_take_it(calibration: Calibration) -> None:
    class Gated(Block):
        def forward(self, x: Tensor) -> Tensor:
            y = self.norm(x)
            z: Tensor = x + y * self.down(F.gelu(self.up(y)))
            return z

    other = Transformer()
    gated = Gated()
    gated.load_state_dict(other.blocks[1].state_dict())
    other.blocks[1] = gated
    with pytest.raises(CalibrationError, match=r"'blocks\.1\.norm' cannot take up its full fit"):
        dyt_compile.convert(other.eval(), calibration=calibration, example=_batches()[0])


def test_options_that_do_not_go_together_are_refused(
    model: nn.Module, calibration: Calibration
) -> None:
    with pytest.raises(OptionError, match="mode is 'all'; a calibration says what it converts"):
        dyt_compile.convert(model, _batches(), mode="all", calibration=calibration)
    with pytest.raises(OptionError, match="activations is 'both'; allowed: converted, original"):
        dyt_compile.calibrate(model, _batches(), activations="both")
    with pytest.raises(OptionError, match="fit is 'best'"):
        dyt_compile.calibrate(model, _batches(), fit="best")
    with pytest.raises(DataError):
        dyt_compile.calibrate(model, iter(_batches()))
    with pytest.raises(CalibrationError, match="missing"):
        dyt_compile.convert(model, calibration="missing", example=_batches()[0])


def test_excluded_sites_keep_their_norm(model: nn.Module, calibration: Calibration) -> None:
    example: Any = _batches()[0]
    for result in (
        dyt_compile.convert(
            model,
            calibration=dyt_compile.calibrate(model, _batches(), exclude="blocks"),
            example=example,
        ),
        dyt_compile.convert(model, calibration=calibration, exclude="blocks", example=example),
    ):
        assert [site.converted for site in result.report.sites] == [False, False, True]


def test_runs_on_the_original_over_parts_are_merged_and_applied(
    model: nn.Module, tmp_path: Path
) -> None:
    batches = _batches(8)
    parts = [
        dyt_compile.calibrate(model, part, activations="original", keep_sums=True)
        for part in (batches[:5], batches[5:])
    ]
    merged = parts[0].merge(parts[1])
    merged.save(tmp_path / "merged")
    whole = dyt_compile.calibrate(model, batches, activations="original")
    errors = [
        dyt_compile.convert(model, _batches(2, seed=9), calibration=c).report.error
        for c in (merged, tmp_path / "merged", whole, parts[1])
    ]
    assert errors[0] == pytest.approx(errors[2], rel=1e-4)
    assert errors[0] == errors[1]
    assert errors[3] != pytest.approx(errors[2], rel=1e-4)


def test_fits_on_the_original_are_others_behind_the_first_site(
    model: nn.Module, calibration: Calibration
) -> None:
    original = dyt_compile.calibrate(model, _batches(), activations="original")
    assert original.converted == calibration.converted
    same = [
        original.fits[name].fit_error == pytest.approx(calibration.fits[name].fit_error, rel=1e-6)
        for name in calibration.fits
    ]
    assert same == [True, False, False]


def test_report_without_data_says_that_nothing_was_measured(
    model: nn.Module, calibration: Calibration, tmp_path: Path
) -> None:
    report = dyt_compile.convert(model, calibration=calibration, example=_batches()[0]).report
    assert "3 of 3 sites are DyT; the error was not measured" in headline(report)
    dyt_compile.write_report(report, tmp_path / "r.html")
    page = (tmp_path / "r.html").read_text(encoding="utf-8")
    assert "without data, no error was measured" in page
    assert "Norms are left alone" not in page


def test_weights_are_not_changed(model: nn.Module, calibration: Calibration) -> None:
    before = {name: value.clone() for name, value in model.state_dict().items()}
    dyt_compile.convert(model, calibration=calibration, example=_batches()[0])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
