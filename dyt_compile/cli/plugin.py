"""dyt-compile plugin: the TensorRT plugin library."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..errors import OptionError
from ..exporters.plugin.build import ARCHITECTURES, PluginInfo, build_plugin, plugin_info
from .options import Verbose
from .progress import console

__all__ = ["app", "build", "info"]

LIBRARY = Path("libdyt_plugin.so")

app = typer.Typer(
    help="Build and describe the TensorRT plugin library (DyT, with residual, quantised).",
    no_args_is_help=True,
)


@app.command()
def build(
    output: Annotated[Path, typer.Option("-o", "--output", help="The library.")] = LIBRARY,
    arch: Annotated[
        str, typer.Option(help="Compute capabilities, 90 for 9.0, with commas between them.")
    ] = ",".join(map(str, ARCHITECTURES)),
    tensorrt_root: Annotated[
        Path | None,
        typer.Option(help="TensorRT's folder, for its headers; default: TENSORRT_ROOT."),
    ] = None,
    verbose: Verbose = False,
) -> None:
    """Compile the plugin library for TensorRT 10 and 11; needs nvcc and TensorRT's headers."""
    try:
        capabilities = [int(each) for each in arch.split(",")]
    except ValueError:
        raise OptionError(f"--arch is {arch!r}; allowed: numbers with commas, 80,90") from None
    _show(build_plugin(output, arch=capabilities, tensorrt_root=tensorrt_root))


@app.command()
def info(
    library: Annotated[Path, typer.Argument(help="The library.")] = LIBRARY,
    verbose: Verbose = False,
) -> None:
    """Say what a plugin library holds: its plugins with their inputs, and what it was built for."""
    _show(plugin_info(library))


def _show(found: PluginInfo) -> None:
    made_for = (
        f"CUDA {found.cuda}, headers of TensorRT {found.tensorrt}, "
        f"compute capabilities {', '.join(map(str, found.architectures))}"
    )
    plugins = [
        f"  {found.namespace}::{name} version {found.version} ({', '.join(inputs)})"
        for name, inputs in found.inputs.items()
    ]
    lines = [f"{found.path}: {found.bytes / 1e6:.1f} MB, {made_for}", *plugins]
    console().print("\n".join(lines), highlight=False, soft_wrap=True)
