"""The plugin library and its host counterpart, each compiled once for all workers of a session."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock

from dyt_compile.errors import ExportError
from dyt_compile.exporters.plugin.build import SOURCES, PluginInfo, build_plugin, plugin_info
from dyt_compile.exporters.plugin.toolchain import find_nvcc

from .host import Host

CPP = Path(__file__).parent / "cpp"


@pytest.fixture(scope="session")
def nvcc() -> Path:
    """The CUDA compiler."""
    try:
        return find_nvcc()
    except ExportError as missing:
        pytest.skip(str(missing))


@pytest.fixture(scope="session")
def headers() -> Path:
    """The headers of TensorRT 10.14 that the wheel kernel-lens carries."""
    spec = importlib.util.find_spec("kernel_lens")
    if spec is None or spec.origin is None:
        pytest.skip("the headers of TensorRT are not installed (kernel-lens)")
    return Path(spec.origin).parent / "include" / "tensorrt"


def _once(factory: pytest.TempPathFactory, worker: str, name: str, make: Callable[[Path], object]):
    """A file that the first worker makes and all others take."""
    base = factory.getbasetemp()
    folder = base if worker == "master" else base.parent
    path = folder / name
    with FileLock(folder / f"{name}.lock"):
        if not path.exists():
            make(path)
    return path


@pytest.fixture(scope="session")
def plugin(
    tmp_path_factory: pytest.TempPathFactory, worker_id: str, nvcc: Path, headers: Path
) -> PluginInfo:
    """The library as users build it, for every architecture."""
    path = _once(
        tmp_path_factory,
        worker_id,
        "libdyt_plugin.so",
        lambda path: build_plugin(path, tensorrt_root=headers),
    )
    return plugin_info(path)


@pytest.fixture(scope="session")
def for_host(nvcc: Path, headers: Path) -> Callable[..., None]:
    """Compiles CUDA sources into a library for the host, over a stub of the CUDA runtime."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("g++ is not found on PATH")
    toolkit = subprocess.run(
        [nvcc, "--dryrun", "-x", "cu", "/dev/null"], capture_output=True, text=True, check=False
    ).stderr
    (root,) = re.findall(r'INCLUDES="-I(\S+?)"', toolkit)[:1]
    # -Bsymbolic: the stub is taken even where a test before this one loaded CUDA's own runtime.
    command = [
        compiler, "-shared", "-fPIC", "-Wl,-Bsymbolic", "-std=c++17", "-O1",
        "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas",
        "-include", str(CPP / "emulation.h"), f"-I{SOURCES}",
        "-isystem", root, "-isystem", f"{root}/cccl", "-isystem", str(headers), "-x", "c++",
        str(CPP / "runtime.cpp"),
    ]  # fmt: skip

    def compiled(output: Path, *sources: Path) -> None:
        subprocess.run([*command, *map(str, sources), "-o", str(output)], check=True)

    return compiled


@pytest.fixture(scope="session")
def host(
    tmp_path_factory: pytest.TempPathFactory, worker_id: str, for_host: Callable[..., None]
) -> Host:
    """The plugin for the host, kernel included, with a driver that leads its life."""
    sources = (SOURCES / "plugin.cu", CPP / "driver.cpp")
    return Host(
        _once(
            tmp_path_factory,
            worker_id,
            "libdyt_host.so",
            lambda path: for_host(path, *sources),
        )
    )
