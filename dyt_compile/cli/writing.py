"""The converted model as a file, in the format that its suffix names."""

from __future__ import annotations

from pathlib import Path

from ..compiler import Conversion
from ..errors import OptionError
from ..exporters.onnx import OnnxExport, export_onnx
from ..exporters.torch_files import SUFFIXES, export_torch
from ..files import check_writable
from ..graphs.onnx_weights import LONG_BYTES

__all__ = ["check_out", "write_model"]

FORMATS = (".onnx", *SUFFIXES)


def check_out(out: Path) -> None:
    """Raise OptionError unless the suffix names a format, ExportError if it cannot be written."""
    if out.suffix not in FORMATS:
        raise OptionError(f"-o is {str(out)!r}; allowed: a file that ends in {', '.join(FORMATS)}")
    check_writable(out)


def write_model(
    result: Conversion,
    out: Path,
    *,
    opset: int | None = None,
    dtype: str = "fp32",
    fuse: bool = False,
    provider: str = "cpu",
    weights: str | None = None,
    check: str = "auto",
) -> tuple[OnnxExport | None, str]:
    """Write the file; what the ONNX exporter says of it, and one line that tells what was written.

    opset and all that follows it are of ONNX files.
    """
    if out.suffix in SUFFIXES:
        written = export_torch(result, out)
        return None, f"wrote {written}: {written.stat().st_size / 1e6:.1f} MB"
    exported = export_onnx(
        result, out, opset=opset, dtype=dtype, fuse=fuse, provider=provider, weights=weights,
        check=check,
    )  # fmt: skip
    return exported, _told(exported)


def _told(exported: OnnxExport) -> str:
    """What was written, and what of it was checked, and what not."""
    linked = f" and {exported.linked_bytes / 1e6:.1f} MB linked in {', '.join(exported.linked)}"
    size = f"{exported.bytes / 1e6:.1f} MB"
    if exported.bytes >= LONG_BYTES:
        size += f" at {exported.bytes / exported.seconds['write'] / 1e6:.0f} MB/s"
    parts = [
        f"wrote {exported.path}: {size}{linked if exported.linked else ''}",
        f"opset {exported.opset}",
        exported.dtype,
        f"not run: {exported.not_run}"
        if exported.export_error is None
        else f"export error {exported.export_error:.1g}",
    ]
    if exported.structure is not None:
        parts.append(f"structure equal: {exported.structure.told()}")
    return ", ".join(parts)
