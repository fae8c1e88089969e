"""The report's page in headless Chromium: it draws, sorts, filters, and fits its window."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dyt_compile import Report, write_report
from dyt_compile.report.records import QuantizationReport, RefitReport

from .models import HOSTILE, converted, recovered

pytest.importorskip("selenium")

from benchmarks.browser import Browser, available, opened

pytestmark = pytest.mark.skipif(
    not (available() or os.environ.get("CI")),
    reason="needs Debian's packages chromium and chromium-driver",
)

NAMES = tuple(f"layers.{place}.norm" for place in range(12))
MANY = tuple(f"model.layers.{place}.input_layernorm" for place in range(161))
MEGABYTES, SECONDS = 15, 3


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with opened() as found:
        yield found


@pytest.fixture(scope="module")
def report() -> Report:
    found = converted(NAMES).report
    assert 0 < found.converted < len(NAMES)
    return found


@pytest.fixture(scope="module")
def page(report: Report, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_report(report, tmp_path_factory.mktemp("report") / "report.html")


def _write(report: Report, folder: Path) -> Path:
    return write_report(report, folder / "report.html")


HEADING = """const [heading] = arguments, table = document.getElementById("site-table");
const headings = [...table.querySelectorAll("th")];
const place = headings.findIndex((th) => th.innerText.trim().startsWith(heading));"""


def _column(browser: Browser, heading: str) -> list[str]:
    """The cells of a column of the sites, from the top."""
    cells: list[str] = browser.run(
        HEADING + "return [...table.tBodies[0].rows].map((row) => row.cells[place].textContent);",
        heading,
    )
    return cells


def _press(browser: Browser, heading: str) -> str | None:
    """Click a heading of the table of sites; how it is sorted now."""
    sort: str | None = browser.run(
        HEADING + """headings[place].querySelector("button").click();
        return headings[place].getAttribute("aria-sort");""",
        heading,
    )  # fmt: skip
    return sort


def _choose(browser: Browser, name: str, value: str) -> None:
    browser.run(
        """const field = document.getElementById(arguments[0]);
        field.value = arguments[1];
        field.dispatchEvent(new Event(field.tagName === "INPUT" ? "input" : "change"));""",
        name, value,
    )  # fmt: skip


def _drawn(browser: Browser) -> dict[str, int]:
    """How many marks each visible chart holds."""
    marks: dict[str, int] = browser.run(
        """return Object.fromEntries([...document.querySelectorAll(".plot")]
          .filter((plot) => plot.offsetParent)
          .map((plot) => [plot.id, plot.querySelectorAll(".scatterlayer .point").length]))"""
    )
    return marks


CROSSING = """
const inside = (a, b) => a.left >= b.left - 1 && a.right <= b.right + 1
  && a.top >= b.top - 1 && a.bottom <= b.bottom + 1;
const crossing = (a, b) => a.left < b.right - 1 && b.left < a.right - 1
  && a.top < b.bottom - 1 && b.top < a.bottom - 1;
const found = [];
for (const plot of document.querySelectorAll(".plot")) {
  const texts = [...plot.querySelectorAll("svg text")].filter((text) => text.textContent.trim());
  const labels = texts.map((text) => [text.textContent, text.getBoundingClientRect()]);
  labels.forEach(([one, box], place) => {
    if (!inside(box, plot.getBoundingClientRect())) found.push([plot.id, one, "outside"]);
    for (const [other, another] of labels.slice(place + 1))
      if (crossing(box, another)) found.push([plot.id, one, other]);
  });
}
return found;"""


def _crossing(browser: Browser) -> list[Any]:
    """Pairs of labels of one chart whose boxes lie over each other, and labels outside of it."""
    pairs: list[Any] = browser.run(CROSSING)
    return pairs


def _wider(browser: Browser) -> bool:
    """Whether the page is wider than its window."""
    return bool(browser.run("return document.documentElement.scrollWidth > innerWidth"))


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 400])
def test_page_draws_every_chart_without_a_word_in_the_console(
    browser: Browser, page: Path, report: Report, width: int, scheme: str
) -> None:
    browser.open(page, width=width, scheme=scheme)
    assert browser.errors() == []
    tried = len(report.attempts)
    points = 32 * 16
    assert _drawn(browser) == {
        "cost": tried + 1, "alone": 12, "alpha": 12, "sigma": 24,
        "by-token": points, "by-channel": points,
    }  # fmt: skip
    assert not _wider(browser)
    assert _crossing(browser) == []


@pytest.mark.parametrize("width", [1280, 400])
def test_page_draws_the_errors_of_a_recovery(
    browser: Browser, report: Report, tmp_path: Path, width: int
) -> None:
    browser.open(_write(recovered(report), tmp_path), width=width)
    assert browser.errors() == []
    assert _drawn(browser)["recovery"] == 5 + 1  # one error is NaN; the chosen one stands out
    texts = browser.run(
        "return [...document.querySelectorAll('#recovery svg text')].map((t) => t.textContent)"
    )
    assert {"2 DyT", "4 DyT", "seconds", "before", "after"} <= set(texts)
    assert not _wider(browser)
    assert [pair for pair in _crossing(browser) if pair[0] == "recovery"] == []


CURVE = "return document.getElementById('cost').data.find((trace) => trace.name === 'frontier')"


@pytest.mark.parametrize("width", [1280, 400])
def test_frontier_is_drawn_against_what_is_chosen(
    browser: Browser, tmp_path: Path, width: int
) -> None:
    report = converted(NAMES, frontier=True).report
    browser.open(_write(report, tmp_path), width=width)
    points = report.frontier
    expected = {
        "sites": [point.sites for point in points],
        "kernels": [point.kernels_saved for point in points],
        "traffic": [point.traffic_bytes_saved / 1e6 for point in points],
    }
    for against, x in expected.items():
        _choose(browser, "against", against)
        drawn = browser.run(CURVE)
        assert drawn["x"] == pytest.approx(x)
        assert drawn["y"] == pytest.approx([point.error for point in points])
        taken = len(report.attempts) + 1 if against == "sites" else 0
        assert _drawn(browser)["cost"] == len(points) + taken
        assert not _wider(browser)
        assert _crossing(browser) == []
    assert browser.errors() == []


def test_page_without_a_frontier_offers_nothing_to_draw_it_against(
    browser: Browser, page: Path
) -> None:
    browser.open(page)
    assert browser.run("return document.getElementById('frontier').hidden")


@pytest.mark.parametrize("width", [1280, 400])
def test_page_lists_what_was_refitted(
    browser: Browser, report: Report, tmp_path: Path, width: int
) -> None:
    moved = tuple(RefitReport(f"layers.{n}.dense.weight", 0.5 / n, 0.1 / n) for n in (1, 2, 3))
    browser.open(_write(replace(report, refits=moved), tmp_path), width=width)
    rows = browser.run(
        "return [...document.querySelectorAll('#refit-table tbody tr')].map((row) =>"
        " [...row.cells].map((cell) => cell.textContent))"
    )
    assert [row[0] for row in rows] == [refit.name for refit in moved]
    assert [float(row[1]) for row in rows] == pytest.approx([r.before for r in moved], rel=0.01)
    assert not _wider(browser)
    assert browser.errors() == []


@pytest.mark.parametrize("width", [1280, 400])
def test_page_lists_what_is_over_eight_bits_and_what_was_left(
    browser: Browser, report: Report, tmp_path: Path, width: int
) -> None:
    left = (("b.norm", "read by `b`, left: the budget", "b"),)
    told = QuantizationReport(
        "int8",
        "any",
        1,
        (("a.norm", 1.0, ("a",)),),
        left,
        over_budget=1,
        alone={"a": 0.1, "b": 0.2},
    )
    browser.open(_write(replace(report, quantized=told), tmp_path), width=width)
    cells = browser.run(
        "return [...document.querySelectorAll('#quantized-table tbody tr')].map((row) =>"
        " [...row.cells].map((cell) => cell.textContent))"
    )
    assert [row[:3] for row in cells] == [["a.norm", "a", "int8"], ["b.norm", "b", "float"]]
    assert cells[1][-1] == left[0][1]
    assert not _wider(browser)
    assert browser.errors() == []


def test_check_for_crossing_labels_can_fail(browser: Browser, page: Path) -> None:
    browser.open(page)
    browser.run(
        """for (const text of document.querySelectorAll("#cost .xtick text"))
          text.setAttribute("transform", "translate(0, 0)"), text.setAttribute("x", 100);"""
    )
    assert any(plot == "cost" for plot, *_ in _crossing(browser))


def test_check_of_the_console_can_fail(browser: Browser, page: Path, tmp_path: Path) -> None:
    broken = page.read_text(encoding="utf-8").replace("function drawCost", "function lost")
    (tmp_path / "broken.html").write_text(broken, encoding="utf-8")
    browser.open(tmp_path / "broken.html")
    assert any("drawCost is not defined" in error for error in browser.errors())


def test_page_loads_nothing_else(browser: Browser, page: Path) -> None:
    browser.open(page)
    assert browser.run("return performance.getEntriesByType('resource').length") == 0


def test_page_follows_the_colour_scheme(browser: Browser, page: Path) -> None:
    script = """return [getComputedStyle(document.body).backgroundColor,
      document.querySelector("#cost .bg, #cost .main-svg").style.background
      || getComputedStyle(document.querySelector("#cost .main-svg")).backgroundColor]"""
    seen = []
    for scheme in ("light", "dark"):
        browser.open(page, scheme=scheme)
        seen.append(browser.run(script))
    light, dark = seen
    assert all(a != b for a, b in zip(light, dark, strict=True)), seen


def test_table_sorts_by_numbers_both_ways(browser: Browser, page: Path) -> None:
    browser.open(page)
    assert [float(cell) for cell in _column(browser, "#")] == list(range(1, 13))
    assert _press(browser, "alone") == "ascending"
    rising = [float(cell) for cell in _column(browser, "alone")]
    assert rising == sorted(rising)
    assert len(set(rising)) > 6
    assert _press(browser, "alone") == "descending"
    assert [float(cell) for cell in _column(browser, "alone")] == rising[::-1]


def test_table_sorts_names_by_their_numbers_and_empty_cells_last(
    browser: Browser, page: Path, report: Report
) -> None:
    browser.open(page)
    _press(browser, "alone")
    _press(browser, "site")
    assert _column(browser, "site") == list(NAMES)
    for _ in ("ascending", "descending"):
        _press(browser, "α")
        cells = _column(browser, "α")
        assert all(cells[: report.converted])
        assert not any(cells[report.converted :])


def test_decimal_points_of_a_column_stand_under_each_other(browser: Browser, page: Path) -> None:
    browser.open(page)
    for heading in ("fit error", "alone", "σ median", "σ peak"):
        assert len({len(cell.partition(".")[2]) for cell in _column(browser, heading)}) == 1


def test_table_filters_by_words_and_by_what_computes(
    browser: Browser, page: Path, report: Report
) -> None:
    browser.open(page)
    _choose(browser, "search", "LAYERS.1 norm")
    assert _column(browser, "site") == ["layers.1.norm", "layers.10.norm", "layers.11.norm"]
    _choose(browser, "search", "")
    _choose(browser, "state", "DyT")
    names = [site.name for site in report.sites if site.converted]
    assert _column(browser, "site") == names
    assert (
        browser.run("return document.getElementById('count').textContent") == f"{len(names)} of 12"
    )
    _choose(browser, "search", "nothing like this")
    assert "Nothing matches." in browser.run(
        "return document.getElementById('site-table').innerText"
    )
    assert browser.errors() == []


def test_site_is_chosen_by_table_list_and_arrows(
    browser: Browser, page: Path, report: Report
) -> None:
    browser.open(page)

    def shown() -> Any:
        return browser.run("return [selected, document.getElementById('by-token').data[0].x]")

    first = shown()
    browser.run("document.querySelectorAll('#site-table td.site button')[7].click()")
    eighth = shown()
    assert (first[0], eighth[0]) == (0, 7)
    scatter = report.sites[7].scatter
    assert scatter is not None
    assert eighth[1] == pytest.approx(scatter.x.ravel().tolist(), rel=1e-3)
    assert eighth[1] != first[1]
    browser.run("document.getElementById('next').click()")
    assert shown()[0] == 8
    _choose(browser, "site", "11")
    assert shown()[0] == 11
    assert browser.run("return document.getElementById('next').disabled")
    told = browser.run("return document.getElementById('about-site').textContent")
    assert f"{report.sites[11].fit_error:.3g}" in told
    assert browser.errors() == []


def test_names_of_a_model_are_shown_as_text(browser: Browser, tmp_path: Path) -> None:
    report = converted((HOSTILE, "norm")).report
    browser.open(_write(replace(report, model=HOSTILE), tmp_path))
    assert browser.errors() == []
    assert browser.run("return window.hacked === undefined")
    assert browser.run("return document.querySelectorAll('b, script').length") == 3
    assert HOSTILE in _column(browser, "site")
    assert browser.run("return document.querySelector('h1').textContent") == HOSTILE
    label = browser.run(
        """Plotly.Fx.hover("sigma", [{ curveNumber: 0, pointNumber: 0 }]);
        return document.querySelector("#sigma .hoverlayer").textContent"""
    )
    assert "<script>window.hacked=1</script><b>" in label


def test_page_of_a_model_without_norms_shows_no_empty_charts(
    browser: Browser, tmp_path: Path
) -> None:
    browser.open(_write(converted((), mode="all").report, tmp_path))
    assert browser.errors() == []
    assert _drawn(browser) == {}
    assert "No norm was found" in browser.run("return document.body.innerText")


def test_page_with_every_norm_converted_draws_what_was_measured(
    browser: Browser, tmp_path: Path
) -> None:
    browser.open(_write(converted(NAMES, mode="all").report, tmp_path))
    assert browser.errors() == []
    assert set(_drawn(browser)) == {"alpha", "sigma", "by-token", "by-channel"}


def test_page_in_mode_exact_draws_the_alpha_of_the_model(browser: Browser, tmp_path: Path) -> None:
    from dyt_compile import convert

    browser.open(_write(convert(converted(NAMES, mode="all").model).report, tmp_path))
    assert browser.errors() == []
    assert _drawn(browser) == {"alpha": 12}


def test_page_with_errors_that_are_not_finite_is_drawn(
    browser: Browser, report: Report, tmp_path: Path
) -> None:
    sites = (replace(report.sites[0], sensitivity=math.nan, fit_error=math.inf), *report.sites[1:])
    browser.open(_write(replace(report, sites=sites, error=math.inf), tmp_path))
    assert browser.errors() == []
    assert _drawn(browser)["alone"] == 11
    assert "Infinity" in _column(browser, "fit error")


@pytest.mark.slow
def test_page_of_161_sites_is_small_and_opens_soon(browser: Browser, tmp_path: Path) -> None:
    report = converted(MANY, mode="all").report
    assert report.converted == 161
    path = _write(report, tmp_path)
    assert path.stat().st_size < MEGABYTES * 1e6
    browser.open(path)
    assert 0.1 < browser.busy_seconds() < SECONDS
    assert browser.errors() == []
    assert _drawn(browser)["sigma"] == 2 * 161
    assert len(_column(browser, "site")) == 161
