"""What a report says of the versions that made it."""

from __future__ import annotations

from importlib import metadata

import onnxruntime
import pytest

import dyt_compile
from dyt_compile.report.records import environment

pytestmark = pytest.mark.core


def test_version_is_told_where_no_package_has_the_module_s_name(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """onnxruntime-gpu holds the module onnxruntime; sources that are not installed, ours."""
    real = metadata.version

    def version(name: str) -> str:
        if name in ("onnxruntime", "dyt-compile"):
            raise metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(metadata, "version", version)
    found = environment()
    assert found["onnxruntime"] == onnxruntime.__version__
    assert found["dyt-compile"] == dyt_compile.__version__
    assert found["torch"] == real("torch")
