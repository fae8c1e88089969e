"""Calibration: files, what they refuse, and the model that they belong to."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import save_file
from torch import Tensor, nn

from dyt_compile.calibration import Calibration, SiteFit, SiteSketch
from dyt_compile.dyt import DytParameters, evaluate
from dyt_compile.errors import CalibrationError, DytCompileError
from dyt_compile.passes.calibrate import fingerprint
from dyt_compile.passes.capture import capture
from dyt_compile.passes.match import match
from dyt_compile.scatter import Scatter

pytestmark = pytest.mark.core

SKETCHES = (
    SiteSketch("layer_norm", 6, (-1,), 1e-5, (1.0, 1.1), (0.0, 0.2)),
    SiteSketch("rms_norm", None, (-2, -1), 1e-6, None, None),
)


def _calibration() -> Calibration:
    row = np.arange(6, dtype=np.float32)
    alpha = np.array([0.25], np.float32)
    fits = {
        "blocks.0.norm": SiteFit(DytParameters(alpha, row, row - 3), 0.125, None, 1.5, 4.0),
        "blocks.0.norm#2": SiteFit(DytParameters(alpha, row.reshape(2, 3, 1)), 0.25),
        "bare": SiteFit(DytParameters(alpha), 0.0),
        "shifted": SiteFit(
            DytParameters(alpha, row, beta=row + 1, shift=alpha + 1, squash="erf"), 0.5
        ),
        "dead": SiteFit(None, None, "its input does not vary over the data", 0.0, None),
    }
    return Calibration(fits, SKETCHES, frozenset({"bare", "blocks.0.norm"}))


def _saved(path: Path) -> Path:
    _calibration().save(path / "fits.safetensors")
    return path / "fits.safetensors"


def _rewritten(path: Path, change: Any) -> None:
    """Save the file again with its description changed."""
    with safe_open(str(path), framework="numpy") as file:
        about = json.loads(file.metadata()["dyt_compile"])
        arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    change(about, arrays)
    save_file(arrays, path, metadata={"dyt_compile": json.dumps(about)})


def test_saved_calibration_is_loaded_equal(tmp_path: Path) -> None:
    saved = _calibration()
    loaded = Calibration.load(_saved(tmp_path))
    assert list(loaded.fits) == list(saved.fits)
    assert loaded.fingerprint == saved.fingerprint
    assert loaded.converted == saved.converted
    x = np.random.default_rng(0).standard_normal((2, 3, 6)).astype(np.float32)
    for name, fit in saved.fits.items():
        found = loaded.fits[name]
        assert (found.fit_error, found.reason) == (fit.fit_error, fit.reason)
        assert (found.sigma_median, found.sigma_peak) == (fit.sigma_median, fit.sigma_peak)
        if fit.parameters is None:
            assert found.parameters is None
            continue
        assert found.parameters is not None
        assert found.parameters.form() is fit.parameters.form()
        for parameter, array in fit.parameters.named().items():
            np.testing.assert_array_equal(found.parameters.named()[parameter], array)
        if name != "blocks.0.norm#2":
            np.testing.assert_array_equal(
                evaluate(found.parameters, x), evaluate(fit.parameters, x)
            )


def test_saved_twice_is_the_same_calibration(tmp_path: Path) -> None:
    first = _saved(tmp_path)
    Calibration.load(first).save(tmp_path / "again")
    again = Calibration.load(tmp_path / "again")
    assert again.fingerprint == SKETCHES
    assert {n: f.fit_error for n, f in again.fits.items()} == {
        n: f.fit_error for n, f in _calibration().fits.items()
    }


def test_strided_arrays_are_saved_by_value(tmp_path: Path) -> None:
    gamma = np.arange(12, dtype=np.float32).reshape(3, 4).T[::2]
    fits = {"norm": SiteFit(DytParameters(np.ones(1, np.float32), gamma), 0.0)}
    Calibration(fits, ()).save(tmp_path / "file")
    loaded = Calibration.load(tmp_path / "file").fits["norm"].parameters
    assert loaded is not None
    np.testing.assert_array_equal(loaded.named()["gamma"], gamma)


def test_points_to_draw_are_not_saved(tmp_path: Path) -> None:
    one = np.ones((1, 1), np.float32)
    points = Scatter(one, one, one[0], np.zeros(1, np.int64))
    fits = {"norm": SiteFit(DytParameters(np.ones(1, np.float32)), 0.0, scatter=points)}
    Calibration(fits, ()).save(tmp_path / "file")
    assert Calibration.load(tmp_path / "file").fits["norm"].scatter is None


def test_calibration_without_a_fit_is_saved(tmp_path: Path) -> None:
    Calibration({"norm": SiteFit(None, reason="no")}, ()).save(tmp_path / "file")
    assert Calibration.load(str(tmp_path / "file")).fits["norm"].reason == "no"


def test_save_leaves_no_other_file(tmp_path: Path) -> None:
    path = _saved(tmp_path)
    assert list(tmp_path.iterdir()) == [path]


def test_save_into_a_missing_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DytCompileError, match="folder does not exist"):
        _calibration().save(tmp_path / "missing" / "file")


def test_load_of_another_version_is_refused(tmp_path: Path) -> None:
    path = _saved(tmp_path)
    _rewritten(path, lambda about, arrays: about.update(version=99))
    with pytest.raises(CalibrationError, match="version 99; this is 4"):
        Calibration.load(path)


@pytest.mark.parametrize("content", [b"", b"garbage", b"\xff" * 64], ids=["empty", "text", "bits"])
def test_load_of_a_damaged_file_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "file"
    path.write_bytes(content)
    with pytest.raises(CalibrationError, match="no calibration file") as caught:
        Calibration.load(path)
    assert "\n" not in str(caught.value)


def test_load_of_a_cut_file_is_refused(tmp_path: Path) -> None:
    path = _saved(tmp_path)
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(CalibrationError, match="no calibration file"):
        Calibration.load(path)


def test_load_of_other_weights_is_refused(tmp_path: Path) -> None:
    save_file({"weight": np.zeros(3)}, tmp_path / "file")
    with pytest.raises(CalibrationError, match="no calibration file"):
        Calibration.load(tmp_path / "file")


def test_load_of_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="missing"):
        Calibration.load(tmp_path / "missing")


@pytest.mark.parametrize("key", ["version", "fits", "fingerprint", "converted"])
def test_load_of_an_incomplete_file_is_refused(tmp_path: Path, key: str) -> None:
    path = _saved(tmp_path)
    _rewritten(path, lambda about, arrays: about.pop(key))
    with pytest.raises(CalibrationError, match="no calibration file"):
        Calibration.load(path)


def test_load_of_a_file_without_an_alpha_is_refused(tmp_path: Path) -> None:
    path = _saved(tmp_path)
    _rewritten(path, lambda about, arrays: arrays.pop("bare/alpha"))
    with pytest.raises(CalibrationError):
        Calibration.load(path)


def test_calibration_belongs_to_its_own_fingerprint() -> None:
    assert _calibration().belongs_to(SKETCHES)


@pytest.mark.parametrize(
    "change",
    [
        {"kind": "rms_norm"},
        {"channels": 7},
        {"axes": (-2,)},
        {"eps": 1e-6},
        {"gamma": None},
        {"gamma": (1.0, 1.2)},
        {"gamma": (0.9, 1.1)},
        {"beta": (0.1, 0.2)},
        {"beta": None},
    ],
    ids=str,
)
def test_calibration_of_another_model_does_not_belong(change: dict[str, Any]) -> None:
    other = (replace(SKETCHES[0], **change), SKETCHES[1])
    assert not _calibration().belongs_to(other)


def test_calibration_of_more_or_fewer_sites_does_not_belong() -> None:
    assert not _calibration().belongs_to(SKETCHES[:1])
    assert not _calibration().belongs_to((*SKETCHES, SKETCHES[0]))
    assert not _calibration().belongs_to(SKETCHES[::-1])


class Normed(nn.Module):
    """Norms with values that bfloat16 has to round, and a plain one on demand."""

    def __init__(self, seed: int = 0, eps: float = 1e-5, *, plain: bool = False) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.norms = nn.Sequential(
            nn.LayerNorm(24, eps=eps),
            nn.RMSNorm(24, eps=eps),
            nn.LayerNorm(24, eps=eps, bias=False),
        )
        for parameter in self.norms.parameters():
            nn.init.normal_(parameter, 0.1, 0.3)
        if plain:
            self.norms.append(nn.LayerNorm(24, eps=eps, elementwise_affine=False))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.norms(x)
        return y


def _fingerprint(
    model: nn.Module | Path, dtype: torch.dtype = torch.float32
) -> tuple[SiteSketch, ...]:
    example = () if isinstance(model, Path) else (torch.randn(4, 24, dtype=dtype),)
    graph = capture(model, example)
    return fingerprint(graph, match(graph))


def _of(sketches: tuple[SiteSketch, ...]) -> Calibration:
    return Calibration({}, sketches)


def test_fingerprint_holds_between_float32_and_bfloat16() -> None:
    model = Normed(plain=True)
    wide = _fingerprint(model)
    narrow = _fingerprint(copy.deepcopy(model).bfloat16(), torch.bfloat16)
    assert len(wide) == 4
    assert wide != narrow  # rounding shows
    assert _of(wide).belongs_to(narrow)
    assert _of(narrow).belongs_to(wide)


def test_fingerprint_tells_other_weights_and_eps() -> None:
    own = _fingerprint(Normed())
    assert not _of(own).belongs_to(_fingerprint(Normed(seed=1)))
    assert not _of(own).belongs_to(_fingerprint(Normed(eps=1e-6)))


@pytest.mark.parametrize("plain", [False, True])
def test_fingerprint_holds_between_torch_and_onnx(tmp_path: Path, plain: bool) -> None:
    model = Normed(plain=plain).eval()
    program = torch.onnx.export(model, (torch.randn(4, 24),), dynamo=True, verbose=False)
    assert program is not None
    program.save(tmp_path / "model.onnx")
    exported = _fingerprint(tmp_path / "model.onnx")
    assert len(exported) == 3 + plain
    assert _of(_fingerprint(model)).belongs_to(exported)
