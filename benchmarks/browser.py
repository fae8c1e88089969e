"""Headless Chromium, to look at pages: Debian's chromium and chromium-driver, through selenium."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from selenium import webdriver
from selenium.webdriver.chrome.service import Service

__all__ = ["Browser", "available", "opened"]

HEIGHT = 900
"""Pixels of the window; pictures are as high as their page."""


class Browser:
    """One window, whose pages are files."""

    def __init__(self, driver: webdriver.Chrome) -> None:
        self._driver = driver
        driver.execute_cdp_cmd("Performance.enable", {"timeDomain": "threadTicks"})

    def open(self, path: Path, *, width: int = 1280, scheme: str = "light") -> None:
        """Load a page anew, at a width in pixels, in the colour scheme "light" or "dark"."""
        self.resize(width)
        feature = {"name": "prefers-color-scheme", "value": scheme}
        self._driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
        self.errors()  # those of the page before
        self._driver.get(path.resolve().as_uri())
        self.settle()

    def resize(self, width: int, height: int = HEIGHT) -> None:
        """Give the window a size in pixels."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self._driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)

    def run(self, script: str, *arguments: Any) -> Any:
        """What a piece of JavaScript returns."""
        return self._driver.execute_script(script, *arguments)

    def busy_seconds(self) -> float:
        """CPU seconds that the page's main thread has worked: scripts, layout, painting.

        Unlike wall time it hardly depends on what else the machine does.
        """
        found = self._driver.execute_cdp_cmd("Performance.getMetrics", {})["metrics"]
        return float(next(each["value"] for each in found if each["name"] == "TaskDuration"))

    def settle(self) -> None:
        """Wait until the page is drawn: two frames without work between them."""
        self._driver.execute_async_script(
            "const done = arguments[0];"
            "requestAnimationFrame(() => requestAnimationFrame(() => setTimeout(done, 50)));"
        )

    def errors(self) -> list[str]:
        """What the console has said since the last call, warnings included."""
        return [entry["message"] for entry in self._driver.get_log("browser")]

    def picture(self, path: Path, *, height: int | None = None) -> None:
        """Write the page as PNG, whole or the topmost pixels."""
        width, whole = self.run(
            "const page = document.documentElement; return [innerWidth, page.scrollHeight]"
        )
        self.resize(width, height or whole)
        self.settle()
        self._driver.save_screenshot(str(path))
        self.resize(width)


def available() -> bool:
    """Whether the browser and its driver are installed."""
    return all(shutil.which(name) for name in ("chromium", "chromedriver"))


@contextmanager
def opened() -> Iterator[Browser]:
    """A browser that reaches no network, ended with the block."""
    options = webdriver.ChromeOptions()
    options.binary_location = str(shutil.which("chromium"))
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    with tempfile.TemporaryDirectory() as profile:
        for argument in (
            "--headless=new",
            "--no-sandbox",  # Chromium refuses root otherwise; the pages are our own
            "--disable-dev-shm-usage",
            "--hide-scrollbars",
            "--proxy-server=127.0.0.1:9",  # nothing listens there
            f"--user-data-dir={profile}",
        ):
            options.add_argument(argument)
        driver = webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))
        try:
            yield Browser(driver)
        finally:
            driver.quit()
