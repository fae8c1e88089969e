"""The converted model as a file, in the format that its suffix names."""

from __future__ import annotations

from pathlib import Path

from ..compiler import Conversion
from ..errors import OptionError
from ..exporters.onnx import OnnxExport, export_onnx
from ..exporters.torch_files import SUFFIXES, export_torch

__all__ = ["check_out", "write_model"]

FORMATS = (".onnx", *SUFFIXES)


def check_out(out: Path) -> None:
    """Raise OptionError unless the suffix names a format."""
    if out.suffix not in FORMATS:
        raise OptionError(f"-o is {str(out)!r}; allowed: a file that ends in {', '.join(FORMATS)}")


def write_model(
    result: Conversion,
    out: Path,
    *,
    opset: int | None = None,
    dtype: str = "fp32",
    fuse: bool = False,
    provider: str = "cpu",
) -> tuple[OnnxExport | None, str]:
    """Write the file; what the ONNX exporter says of it, and one line that tells what was written.

    opset, dtype, fuse and provider are of ONNX files.
    """
    if out.suffix in SUFFIXES:
        written = export_torch(result, out)
        return None, f"wrote {written}: {written.stat().st_size / 1e6:.1f} MB"
    exported = export_onnx(result, out, opset=opset, dtype=dtype, fuse=fuse, provider=provider)
    checked = (
        "not run: no data"
        if exported.export_error is None
        else f"export error {exported.export_error:.1g}"
    )
    told = (
        f"wrote {exported.path}: {exported.bytes / 1e6:.1f} MB, opset {exported.opset}, "
        f"{exported.dtype}, {checked}"
    )
    return exported, told
