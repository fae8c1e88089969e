"""Where the parts are that the plugin is compiled with: nvcc and the headers of TensorRT."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

from ...errors import ExportError

__all__ = ["architectures", "find_nvcc", "tensorrt_headers"]

HEADER = "NvInferRuntime.h"
LEAST_TENSORRT = (10, 0)
"""IPluginV3, the interface of the plugin, came with TensorRT 10."""

CUDA_VARIABLES = ("CUDA_HOME", "CUDA_PATH")
SYSTEM_ROOTS = (Path("/usr"), Path("/usr/local/tensorrt"), Path("/opt/tensorrt"))
SUBFOLDERS = ("", "include", "include/x86_64-linux-gnu", "include/aarch64-linux-gnu")


def find_nvcc() -> Path:
    """The CUDA compiler: on PATH, else below CUDA_HOME, CUDA_PATH or /usr/local/cuda.

    Raises ExportError where there is none.
    """
    roots = [Path(os.environ[name]) for name in CUDA_VARIABLES if os.environ.get(name)]
    folders = [str(root / "bin") for root in (*roots, Path("/usr/local/cuda"))]
    found = shutil.which("nvcc") or shutil.which("nvcc", path=os.pathsep.join(folders))
    if found is None:
        raise ExportError(
            f"nvcc is not found on PATH, nor in {', '.join(CUDA_VARIABLES)} and /usr/local/cuda; "
            f"install the CUDA toolkit, 12.8 or newer for compute capability 100 and 120"
        )
    return Path(found)


def tensorrt_headers(root: str | Path | None) -> Path:
    """The folder of TensorRT's headers below `root`, else below TENSORRT_ROOT or the system's.

    Raises ExportError where there are none, or where they are older than TensorRT 10.
    """
    roots = list(_roots(root))
    folders = [folder / sub for folder in roots for sub in SUBFOLDERS]
    found = next((folder for folder in folders if (folder / HEADER).is_file()), None)
    if found is None:
        raise ExportError(
            f"the headers of TensorRT ({HEADER}) are not in {', '.join(map(str, roots))} or its "
            f"'include'; set TENSORRT_ROOT to an unpacked TensorRT, 10.0 or newer"
        )
    version = _version(found)
    if version < LEAST_TENSORRT:
        raise ExportError(
            f"the headers in {str(found)!r} are of TensorRT {version[0]}.{version[1]}; "
            f"the plugin needs {LEAST_TENSORRT[0]}.{LEAST_TENSORRT[1]} or newer"
        )
    return found


def _roots(root: str | Path | None) -> Iterator[Path]:
    given = root or os.environ.get("TENSORRT_ROOT")
    if given:
        yield Path(given)
    else:
        yield from SYSTEM_ROOTS


def _version(headers: Path) -> tuple[int, int]:
    """Major and minor, from NvInferVersion.h, whose numbers may be given by other names."""
    text = (headers / "NvInferVersion.h").read_text(encoding="utf-8")
    defined = dict(re.findall(r"^#define (\w+) (\w+)", text, re.MULTILINE))

    def number(name: str) -> int:
        while name in defined:
            name = defined[name]
        return int(name) if name.isdigit() else 0

    return number("NV_TENSORRT_MAJOR"), number("NV_TENSORRT_MINOR")


def architectures(nvcc: Path) -> list[int]:
    """The compute capabilities that a compiler knows, such as 90 for 9.0.

    Raises ExportError where it does not run.
    """
    try:
        done = subprocess.run(
            [nvcc, "--list-gpu-code"], capture_output=True, text=True, check=False
        )
    except OSError as error:
        raise ExportError(f"nvcc at {str(nvcc)!r} does not run: {error.strerror}") from error
    known = sorted({int(number) for number in re.findall(r"^sm_(\d+)$", done.stdout, re.MULTILINE)})
    if done.returncode or not known:
        raise ExportError(f"nvcc at {str(nvcc)!r} does not run: {_last(done.stderr, 1)}")
    return known


def _last(output: str, count: int) -> str:
    return " | ".join([line.strip() for line in output.splitlines() if line.strip()][-count:])
