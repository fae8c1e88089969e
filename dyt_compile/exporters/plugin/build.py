"""Building the TensorRT plugin library from its sources, and reading what a library holds."""

from __future__ import annotations

import ctypes
import json
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ...errors import ExportError, OptionError
from ...files import replaced
from .toolchain import architectures, find_nvcc, tensorrt_headers

__all__ = ["ARCHITECTURES", "SOURCES", "PluginInfo", "build_plugin", "plugin_info"]

SOURCES = Path(__file__).parent
"""The folder of the CUDA C++ sources; plugin.cu includes the others."""

ARCHITECTURES = (80, 89, 90, 100, 120)
"""A100, Ada (which runs code for 80 too, but converts to FP8 in hardware), H100, B200, Blackwell
RTX. Newer devices compile the PTX that is added for the last one."""

LAST_LINES = 6


@dataclass(frozen=True)
class PluginInfo:
    """What a plugin library holds.

    inputs: by the name of each creator, its inputs in order; architectures: compute capabilities
    with code of their own; tensorrt, cuda: versions of the headers that it was compiled with.
    """

    path: Path
    bytes: int
    namespace: str
    version: str
    inputs: dict[str, tuple[str, ...]]
    architectures: tuple[int, ...]
    tensorrt: str
    cuda: str


def build_plugin(
    output: str | Path,
    *,
    arch: Sequence[int] = ARCHITECTURES,
    tensorrt_root: str | Path | None = None,
) -> PluginInfo:
    """Compile the plugin library for TensorRT 10 and 11 with nvcc; about a minute.

    arch: compute capabilities, 90 for 9.0; PTX for the highest is added, which newer devices
    compile when they load it. tensorrt_root: an unpacked TensorRT, of which only headers are read;
    by default TENSORRT_ROOT, else the system's.

    Raises OptionError for an unknown capability, and ExportError where nvcc or the headers are
    missing, the compiler fails (with its last lines) or `output` cannot be written; whatever was
    at `output` then stays.
    """
    target = Path(output)
    nvcc, headers = find_nvcc(), tensorrt_headers(tensorrt_root)
    known = architectures(nvcc)
    unknown = [each for each in arch if each not in known or each < ARCHITECTURES[0]]
    if unknown or not arch:
        allowed = [each for each in known if each >= ARCHITECTURES[0]]
        raise OptionError(
            f"arch is {', '.join(map(str, unknown or arch)) or 'empty'}; "
            f"this nvcc knows: {', '.join(map(str, allowed))}"
        )
    with replaced(target) as temporary:
        _compile(_command(nvcc, headers, sorted(set(arch)), temporary))
        info = plugin_info(temporary)
    return PluginInfo(**{**vars(info), "path": target})


def _command(nvcc: Path, headers: Path, arch: Sequence[int], output: Path) -> list[str]:
    code = [f"-gencode=arch=compute_{each},code=sm_{each}" for each in arch]
    code.append(f"-gencode=arch=compute_{arch[-1]},code=compute_{arch[-1]}")
    return [
        str(nvcc), "-std=c++17", "-O3", "-shared", "-cudart=static", "--threads=0",
        "-Xcompiler=-fPIC,-fvisibility=hidden", "-isystem", str(headers),
        *code, "-o", str(output), str(SOURCES / "plugin.cu"),
    ]  # fmt: skip


def _compile(command: Sequence[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
        raise ExportError(f"nvcc ended with {done.returncode}: {' | '.join(lines[-LAST_LINES:])}")


def plugin_info(library: str | Path) -> PluginInfo:
    """What a plugin library holds. It is loaded into this process, without TensorRT or a GPU.

    Raises ExportError where the file is missing or is no library of this plugin.
    """
    path = Path(library)
    if not path.is_file():
        raise ExportError(f"{str(library)!r} is no file; make one with: dyt-compile plugin build")
    try:
        describe = ctypes.CDLL(str(path.resolve())).dyt_plugin_info
    except (OSError, AttributeError) as error:
        raise ExportError(f"{str(library)!r} is no DyT plugin library: {error}") from error
    describe.restype = ctypes.c_char_p
    found = json.loads(describe())
    return PluginInfo(
        path=path,
        bytes=path.stat().st_size,
        namespace=found["namespace"],
        version=found["version"],
        inputs={name: tuple(inputs) for name, inputs in found["inputs"].items()},
        architectures=tuple(each // 10 for each in found["architectures"]),
        tensorrt=found["tensorrt"],
        cuda=f"{found['cuda'] // 1000}.{found['cuda'] % 1000 // 10}",
    )
