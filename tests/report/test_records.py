"""What a report says of the versions that made it."""

from __future__ import annotations

from importlib import metadata

import pytest

from dyt_compile.report.records import environment

pytestmark = pytest.mark.core


def test_version_is_told_where_the_package_has_another_name(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """onnxruntime-gpu holds the module onnxruntime; no package holds sources that are run so."""
    real = metadata.version

    def version(name: str) -> str:
        if name in ("onnxruntime", "dyt-compile"):
            raise metadata.PackageNotFoundError(name)
        return "1.99" if name == "onnxruntime-gpu" else real(name)

    held = {"onnxruntime": ["onnxruntime-gpu"]}
    monkeypatch.setattr(metadata, "version", version)
    monkeypatch.setattr(metadata, "packages_distributions", lambda: held)
    found = environment()
    assert found["onnxruntime"] == "1.99"
    assert found["dyt-compile"] == "not installed"
    assert found["torch"] == real("torch")
