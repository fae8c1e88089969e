"""Survey: which sites are known to be hard before anything is fitted."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from torch import Tensor, nn

from dyt_compile.compiler import convert, inspect
from dyt_compile.data import FIRST, split
from dyt_compile.passes.calibrate import calibrate, survey
from dyt_compile.passes.capture import capture
from dyt_compile.passes.match import match
from dyt_compile.survey import NAMED, PEAK, Look, hardships, warning

from .report.models import norms

pytestmark = pytest.mark.core

NAMES = [f"layers.{place}.norm" for place in range(4)]


@pytest.fixture(scope="module")
def sites() -> Any:
    return inspect(ir.from_proto(norms(NAMES))).sites


def test_first_and_final_norm_are_hard(sites: Any) -> None:
    assert dict(hardships(sites, {})) == {NAMES[0]: ("first norm",), NAMES[3]: ("final norm",)}


def test_only_norm_is_first_and_final(sites: Any) -> None:
    assert hardships(sites[:1], {})[NAMES[0]] == ("first norm", "final norm")


def test_model_without_sites_has_no_hard_ones() -> None:
    assert hardships((), {}) == {}
    assert warning({}, ()) is None


@pytest.mark.parametrize(
    ("peak", "hard"), [(None, False), (PEAK, False), (PEAK + 0.1, True), (np.nan, False)]
)
def test_site_with_tokens_of_very_different_sigma_is_hard(
    sites: Any, peak: float | None, hard: bool
) -> None:
    found = hardships(sites, {NAMES[1]: Look(peak, 1.0)})
    assert (NAMES[1] in found) == hard


def test_warning_names_the_sites_that_may_be_converted_and_why(sites: Any) -> None:
    hard = hardships(sites, {NAMES[0]: Look(9.123, 1.0)})
    told = warning(hard, [NAMES[0], NAMES[1]])
    assert told == (
        f"known to be hard to convert: {NAMES[0]} (first norm, σ of a token 9.12 × the median)"
    )
    assert warning(hard, [NAMES[1]]) is None


def test_warning_of_many_sites_counts_the_rest() -> None:
    hard = {f"norm{place}": ("σ",) for place in range(NAMED + 5)}
    told = warning(hard, list(hard))
    assert told is not None
    assert told.endswith(" and 5 more")
    assert "\n" not in told


class Sink(nn.Module):
    """Two norms; the first token is 30 times as large as the others at the second."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.massive, self.last = (nn.LayerNorm(8) for _ in range(3))
        self.mix, self.head = nn.Linear(8, 8), nn.Linear(8, 3)
        scale = torch.ones(6, 1)
        scale[0] = 30
        self.register_buffer("scale", scale)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mix(self.first(x)) * self.scale
        y: Tensor = self.head(self.last(x + self.mix(self.massive(x) * 0 + x / self.scale)))
        return y


def _batches(samples: int = 16) -> list[tuple[Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(samples, 6, 8, generator=generator),) for _ in range(6)]


def test_survey_sees_what_the_whole_walk_sees() -> None:
    batches = _batches()
    graph = capture(Sink().eval(), batches[0], batches=batches)
    found, samples = match(graph), split(graph, batches, 0)
    looks = survey(graph, found, samples.first)
    whole = calibrate(graph, found, samples.fit, convert=(), seed=0)
    assert samples.first.samples == FIRST
    for site in found.sites:
        peak = whole.fits[site.name].sigma_peak
        assert peak is not None
        assert looks[site.name].sigma_peak == pytest.approx(peak, rel=0.6)
        assert looks[site.name].elements == 6 * 8
    peaks = {site.name: looks[site.name].sigma_peak for site in found.sites}
    assert (peaks["massive"] or 0) > PEAK > (peaks["first"] or 0)


def test_convert_warns_before_it_fits_and_the_report_says_why(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dyt_compile import trials

    told_when_fitting: list[list[str]] = []
    fit = trials.calibrate

    def watched(*args: Any, **kwargs: Any) -> Any:
        told_when_fitting.append([record.getMessage() for record in caplog.records])
        return fit(*args, **kwargs)

    monkeypatch.setattr(trials, "calibrate", watched)
    with caplog.at_level(logging.WARNING, logger="dyt_compile"):
        report = convert(Sink().eval(), _batches(), mode="all", exclude="last").report
    (told,) = told_when_fitting[0]
    assert told.startswith("known to be hard to convert: first (first norm), massive (σ of a token")
    assert "last" not in told
    hard = {site.name: site.hard for site in report.sites}
    assert hard["first"] == ("first norm",)
    assert hard["last"][0] == "final norm"
    assert report.to_dict()["sites"][0]["hard"] == ("first norm",)


def test_convert_of_an_onnx_file_warns_too(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    random = np.random.default_rng(0)
    batches = [(random.normal(size=(8, 4, 16)).astype(np.float32),) for _ in range(6)]
    with caplog.at_level(logging.WARNING, logger="dyt_compile"):
        convert(ir.from_proto(norms(NAMES)), batches, mode="all")
    (told,) = [record.getMessage() for record in caplog.records]
    assert f"{NAMES[0]} (first norm" in told
    assert f"{NAMES[3]} (final norm" in told


def test_exact_mode_warns_of_nothing(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="dyt_compile"):
        report = convert(Sink().eval(), example=_batches()[0]).report
    assert not caplog.records
    assert all(site.hard == () for site in report.sites)
