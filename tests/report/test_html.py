"""The report as a page and as JSON: what stands in it, read from the text."""

from __future__ import annotations

import importlib.util
import io
import json
import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from rich.console import Console, RenderableType

import dyt_compile
from dyt_compile import DytCompileError, write_report
from dyt_compile.errors import MissingDependencyError, OptionError
from dyt_compile.report.html import page
from dyt_compile.report.records import QuantizationReport, RefitReport
from dyt_compile.report.terminal import quantization_line, quantization_table, report_table

from .models import HOSTILE, converted, norms, recovered

pytestmark = pytest.mark.core

NAMES = ("a.norm", "b.norm", "c.norm", "d.norm")


class _Scripts(HTMLParser):
    """Script elements as a browser sees them, and every address that one would load."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.scripts: list[tuple[str | None, str]] = []
        self.loaded: list[str] = []
        self._kind: str | None = None
        self._inside = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.loaded += [v or "" for k, v in attrs if k in ("src", "href") and v != "data:,"]
        self._inside, self._kind = tag == "script", found.get("type")
        if self._inside:
            self.scripts.append((self._kind, ""))

    def handle_endtag(self, tag: str) -> None:
        self._inside = False

    def handle_data(self, data: str) -> None:
        if self._inside:
            kind, text = self.scripts.pop()
            self.scripts.append((kind, text + data))


def _data(text: str) -> dict[str, Any]:
    """The data of a page, read strictly: NaN is no JSON."""

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    found = _Scripts(text)
    assert [kind for kind, _ in found.scripts] == ["application/json", None, None]
    data: dict[str, Any] = json.loads(found.scripts[0][1], parse_constant=refuse)
    return data


def test_page_holds_everything_it_needs() -> None:
    text = page(converted(NAMES).report)
    assert _Scripts(text).loaded == []
    assert "plotly.js v" in text
    assert "default-src 'none'" in text
    assert "<!--put" not in text


def test_page_tells_what_the_report_says() -> None:
    report = converted(NAMES).report
    data = _data(page(report))
    assert 0 < report.converted < len(NAMES)
    assert data["headline"].startswith(f"{report.converted} of 4 sites are DyT. On 16 samples")
    assert [row["name"] for row in data["sites"]["rows"]] == list(NAMES)
    assert [row["fit_error"] for row in data["sites"]["rows"]] == [
        site.fit_error for site in report.sites
    ]
    assert data["cost"]["attempts"] == [list(attempt) for attempt in report.attempts]
    kept = next(card for card in data["cards"] if card["label"] == "Keep their norm")
    assert kept["note"] == f"{4 - report.converted} over budget"
    assert dict(data["environment"])["numpy"] == np.__version__


def test_page_holds_the_frontier_and_what_it_would_save() -> None:
    report = converted(NAMES, frontier=True).report
    data = _data(page(report))
    assert [point["sites"] for point in data["cost"]["frontier"]] == [1, 2, 3, 4]
    assert [point["error"] for point in data["cost"]["frontier"]] == [
        point.error for point in report.frontier
    ]
    # The first norm reads the model's input, which no kernel makes.
    assert report.frontier[-1].kernels_saved == 3
    # 3 norms read a sum of 4 x 16 floats, which the residual reads, too.
    assert report.frontier[-1].traffic_bytes_saved == 3 * 4 * 4 * 16
    assert data["cost"]["measure"] == "relative error"
    assert data["sites"]["rows"][0]["hard"] == "first norm"


def test_page_calls_the_error_of_an_own_metric_a_loss() -> None:
    data = _data(page(replace(converted(NAMES).report, metric="accuracy")))
    assert data["cost"]["measure"] == "loss of accuracy"
    assert "by a loss of accuracy of " in data["headline"]


def test_page_draws_the_points_and_the_fit_of_every_site() -> None:
    report = converted(NAMES).report
    for site, drawn in zip(report.sites, _data(page(report))["scatters"], strict=True):
        assert site.scatter is not None
        assert site.scatter.fitted is not None
        np.testing.assert_allclose(drawn["x"], site.scatter.x, rtol=1e-3)
        np.testing.assert_allclose(drawn["y"], site.scatter.y, rtol=1e-3)
        fit = drawn["fit"]
        np.testing.assert_allclose(
            fit["squashed"], np.tanh(fit["alpha"] * np.array(fit["x"])), atol=1e-3
        )
        np.testing.assert_allclose(fit["gamma"], site.scatter.fitted.gamma, rtol=1e-3)


def test_fit_that_is_drawn_goes_through_its_points() -> None:
    (drawn, *_) = _data(page(converted(NAMES, mode="all").report))["scatters"]
    fit, x, y = drawn["fit"], np.array(drawn["x"]), np.array(drawn["y"])
    fitted = np.array(fit["gamma"]) * np.tanh(fit["alpha"] * x) + np.array(fit["beta"])
    assert np.linalg.norm(fitted - y) < 0.5 * np.linalg.norm(y)


def test_names_of_a_model_end_no_script_and_open_none() -> None:
    report = converted((HOSTILE, "norm")).report
    assert HOSTILE in {site.name for site in report.sites}
    text = page(replace(report, model=HOSTILE))
    assert "<script>window" not in text
    data = _data(text)
    assert data["model"] == HOSTILE
    assert HOSTILE in {row["name"] for row in data["sites"]["rows"]}


def test_errors_that_are_not_finite_stay_in_the_page() -> None:
    report = converted(NAMES).report
    spoilt = replace(report, error=math.inf, standard_error=math.nan, budget=None)
    data = _data(page(replace(spoilt, attempts=((1, math.nan), (2, math.inf)))))
    assert data["cost"]["attempts"] == [[1, "NaN"], [2, "Infinity"]]
    assert "error of inf." in data["headline"]


@pytest.mark.parametrize(
    ("error", "deviation", "told"),
    [(0.1101, 0.0072, "0.110 ± 0.007"), (0.0, 0.0, "0"), (0.25, None, "0.25"),
     (123.4, 20.0, "123 ± 20"), (3.2e-9, 1e-10, "3.2e-09 ± 1e-10")],
)  # fmt: skip
def test_error_is_told_to_its_last_certain_digit(
    error: float, deviation: float | None, told: str
) -> None:
    report = replace(converted(NAMES).report, error=error, standard_error=deviation)
    card = next(c for c in _data(page(report))["cards"] if c["label"] == "Output error")
    assert card["value"].replace("\N{NO-BREAK SPACE}", " ") == told


def test_output_error_and_export_error_stand_apart(tmp_path: Path) -> None:
    result = converted(NAMES)
    exported = dyt_compile.export_onnx(result, tmp_path / "model.onnx")
    cards = {c["label"]: c for c in _data(page(result.report, exported))["cards"]}
    assert cards["Export error"]["value"] == f"{exported.export_error:.1g}"
    assert "model.onnx against the converted model" in cards["Export error"]["note"]
    assert "converted against original" in cards["Output error"]["note"]
    fields = {column["field"] for column in _data(page(result.report))["sites"]["columns"]}
    assert "fit_error" in fields
    assert "export_error" not in fields


def test_page_lists_what_was_refitted() -> None:
    report = converted(NAMES).report
    assert _data(page(report))["refits"]["rows"] == []
    moved = (RefitReport("layer.<b>.weight", 0.25, 0.125),)
    rows = _data(page(replace(report, refits=moved)))["refits"]["rows"]
    assert rows == [{"name": "layer.<b>.weight", "before": 0.25, "after": 0.125}]


def test_page_of_a_model_without_norms_says_so() -> None:
    data = _data(page(converted((), mode="all").report))
    assert data["headline"].startswith("No norm was found")
    assert data["sites"]["rows"] == data["scatters"] == []


def test_page_in_mode_exact_tells_no_cost() -> None:
    data = _data(page(dyt_compile.convert(converted(NAMES).original.model).report))
    assert "0 of 4 sites are DyT" in data["headline"]
    assert {card["label"] for card in data["cards"]} == {"DyT", "Keep their norm", "Refused"}
    assert {row["reason"] for row in data["sites"]["rows"]} == {"mode exact"}


def test_report_in_mode_exact_tells_the_alpha_of_dyt_in_the_model() -> None:
    first = converted(NAMES, mode="all")
    again = dyt_compile.convert(first.model).report
    expected = [site.alpha for site in first.report.sites]
    assert [site.alpha for site in again.sites] == pytest.approx(expected)
    assert {site.kind for site in again.sites} == {"dyt"}


def test_page_of_an_inspection_lists_what_was_found(tmp_path: Path) -> None:
    onnx.save(norms(NAMES), tmp_path / "norms.onnx")
    found = dyt_compile.inspect(tmp_path / "norms.onnx")
    data = _data(write_report(found, tmp_path / "page.html").read_text(encoding="utf-8"))
    assert data["headline"].startswith("4 sites, 0 refused.")
    assert [row["affine"] for row in data["sites"]["rows"]] == ["γ β"] * 4
    write_report(found, tmp_path / "page.json")
    assert json.loads((tmp_path / "page.json").read_text()) == found.to_dict()


def test_page_tells_how_the_model_recovered() -> None:
    report = recovered(converted(NAMES).report)
    data = _data(page(report))
    assert data["recovery"]["times"] == [0, 30, 60, 60, 90, 120]
    assert data["recovery"]["stages"] == [[0, 2], [60, 4]]
    assert data["recovery"]["chosen"] == 4  # the least of the last stage: the NaN is none
    assert data["recovery"]["before"] == 0.5
    assert data["recovery"]["after"] == report.error
    told = "80 steps in 2 stages, 120 s, all weights trained"
    assert data["recovery"]["about"] == f"{told}."
    card = {"label": "Before recovery", "value": "0.5", "note": told}
    assert card in data["cards"]
    assert _data(page(converted(NAMES).report))["recovery"] is None


def test_terminal_tells_how_the_model_recovered() -> None:
    console = Console(width=100, file=io.StringIO())
    console.print(report_table(recovered(converted(NAMES).report)))
    assert isinstance(console.file, io.StringIO)
    told = " ".join(console.file.getvalue().split())
    assert "(before recovery 0.5)" in told
    assert "80 steps in 2 stages, 120 s, all weights trained; held-out errors 0.1 0.05 0.04" in told


EIGHT_BITS = QuantizationReport(
    "int8", "any", 3, (("a.norm", 1.0, ("a", "b")), ("b.norm", 2.5, ("c",))),
    (("c.norm", "its norm stays", None), ("d.norm", "its norm stays", None)), 0.004, 0.0002, 0.06,
    0.003, 16,
)  # fmt: skip
CHOSEN = replace(
    EIGHT_BITS, over_budget=2, alone={"a": 0.001, "b": 0.002, "c": 0.003, "e0": 0.02, "e1": 0.03},
    left=(
        *EIGHT_BITS.left, ("e.0.norm", "read by `e0`, left: the budget", "e0"),
        ("e.1.norm", "read by `e1`, left: the budget", "e1"),
    ),
)  # fmt: skip


def test_page_and_terminal_tell_the_error_of_quantising_apart() -> None:
    report = replace(converted(NAMES).report, quantized=EIGHT_BITS)
    cards = {card["label"]: card for card in _data(page(report))["cards"]}
    before = {card["label"]: card for card in _data(page(converted(NAMES).report))["cards"]}
    assert cards["Output error"] == before["Output error"]
    assert cards["Error of quantising"]["value"].startswith("0.0040")
    assert "3 products in int8" in cards["Error of quantising"]["note"]
    assert "0.060" in cards["Error of quantising"]["note"]
    told = _printed(quantization_table(report))
    assert "of quantising 0.004 ± 0.0002, with converting 0.06 ± 0.003, on 16 samples" in told
    assert "its norm stays" in told
    assert "2.5" in told


def test_page_and_terminal_list_what_is_over_eight_bits_and_what_stayed_in_float() -> None:
    report = replace(converted(NAMES).report, quantized=CHOSEN)
    data = _data(page(report))
    rows = [tuple(row.values()) for row in data["quantized"]["rows"]]
    assert rows == [
        ("a.norm", "a", "int8", 1.0, None, 0.001), ("a.norm", "b", "int8", 1.0, None, 0.002),
        ("b.norm", "c", "int8", 2.5, None, 0.003),
        ("c.norm", None, "float", None, "its norm stays", None),
        ("d.norm", None, "float", None, "its norm stays", None),
        ("e.0.norm", "e0", "float", None, "read by `e0`, left: the budget", 0.02),
        ("e.1.norm", "e1", "float", None, "read by `e1`, left: the budget", 0.03),
    ]  # fmt: skip
    card = next(card for card in data["cards"] if card["label"] == "Error of quantising")
    assert card["note"].startswith("3 of 5 products in int8, 2 left: the budget")
    told = _printed(quantization_table(report))
    assert "e.{0..1}.norm ×2 read by `e0`, left: the budget 0.02 to 0.03" in told
    assert "3 of 5 products in int8, 2 left: the budget (for any)" in told
    assert json.loads(report.to_json())["quantized"]["alone"]["e1"] == 0.03
    assert _data(page(converted(NAMES).report))["quantized"]["rows"] == []


def _printed(shown: RenderableType) -> str:
    console = Console(width=100, file=io.StringIO())
    console.print(shown)
    return " ".join(console.file.getvalue().split())  # type: ignore[attr-defined]


def test_eight_bits_without_data_are_told_as_not_measured() -> None:
    told = replace(EIGHT_BITS, error=None, total=None)
    report = replace(converted(NAMES).report, quantized=told)
    assert "was not measured" in quantization_line(report)
    assert '"not measured"' in page(report)


def test_json_has_the_figures_and_the_file_but_no_points(tmp_path: Path) -> None:
    result = converted(NAMES)
    exported = dyt_compile.export_onnx(result, tmp_path / "model.onnx")
    path = write_report(result.report, tmp_path / "report.json", exported=exported)
    written = json.loads(path.read_text())
    assert written.pop("exported")["export_error"] == exported.export_error
    assert written == json.loads(result.report.to_json())
    assert "scatter" not in written["sites"][0]


@pytest.mark.parametrize("name", ["report.txt", "report", "report.html.gz"])
def test_report_of_another_suffix_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=re.escape(name)):
        write_report(converted(NAMES).report, tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_page_without_plotly_is_refused_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "plotly" else found(name)
    )
    with pytest.raises(MissingDependencyError, match=r"pip install 'dyt-compile\[report\]'"):
        write_report(converted(NAMES).report, tmp_path / "report.html")
    assert not list(tmp_path.iterdir())
    write_report(converted(NAMES).report, tmp_path / "report.json")


def test_report_into_a_missing_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DytCompileError, match="its folder does not exist"):
        write_report(converted(NAMES).report, tmp_path / "missing" / "report.html")
