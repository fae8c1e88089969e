"""Takes the README's picture of a report: converts the digits ViT and writes docs/report.png.

Needs Debian's packages chromium and chromium-driver.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import dyt_compile
from benchmarks.browser import available, opened
from examples.digits.model import calibration, load

PICTURE = Path(__file__).parent.parent / "docs" / "report.png"
BUDGET = 0.15
HEIGHT = 1780
"""Pixels: down to the curves of one site."""


def main() -> None:
    if not available():
        sys.exit("chromium and chromedriver are needed: apt-get install chromium chromium-driver")
    model, _ = load()
    result = dyt_compile.convert(
        model, list(calibration()), mode="budget", budget=BUDGET, fit="diagonal"
    )
    with tempfile.TemporaryDirectory() as folder, opened() as browser:
        exported = dyt_compile.export_onnx(result, Path(folder) / "digits.onnx")
        page = dyt_compile.write_report(
            result.report, Path(folder) / "report.html", exported=exported
        )
        browser.open(page)
        browser.run("select(4)")
        browser.picture(PICTURE, height=HEIGHT)
    print(f"wrote {PICTURE}: {PICTURE.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
