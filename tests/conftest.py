"""Settings of the whole suite."""

from __future__ import annotations

import pytest
from hypothesis import settings

from dyt_compile.exporters.tensorrt_worker import capability

# The machines that run this are shared: no example has a deadline, and every run has the same ones.
settings.register_profile("steady", deadline=None, derandomize=True)
settings.load_profile("steady")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that need a GPU are skipped where there is none."""
    if capability() is not None:
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no NVIDIA GPU"))
