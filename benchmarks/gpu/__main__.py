"""Table 7 of the DyT paper and ours, on this machine's GPU: `python -m benchmarks.gpu`.

LLaMA 7B in bfloat16, one sequence of 4096 tokens, 100 passes after some that are not counted: one
norm, and the whole model; eager and compiled by Inductor, pass by pass in turn, and as TensorRT
engines (`--runtime none` leaves them out), native and with the plugin, folded and in FP8. Writes
the medians as JSON, and a plot of them.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from dyt_compile.errors import DytCompileError
from dyt_compile.exporters.engine_timing import PASSES
from dyt_compile.exporters.tensorrt_process import RUNTIMES
from dyt_compile.exporters.tensorrt_worker import capability
from dyt_compile.files import replaced

from .models import LLAMA_7B, NORMS, SMALL, Size, embeddings, folded, layer, model, onnx_files
from .plot import draw
from .times import Row, Way, engine_rows, torch_rows

ENGINES = ("RMSNorm", "LayerNorm", "DyT")
"""Norms that engines are built with: our operator is exported as DyT is."""
NO_ENGINES = "none"

RESULTS = Path(__file__).parents[1] / "results" / "gpu.json"

PAPER = {
    "source": "arXiv 2503.10622, table 7: seconds of 100 forward passes, bfloat16, H100",
    "layer": {"RMSNorm": 2.1, "DyT": 1.0},
    "model": {"RMSNorm": 14.1, "DyT": 13.0},
}
"""Its "layer" is all norms of the model together."""


@dataclass(frozen=True)
class Options:
    """What is measured, and where it goes."""

    size: Size
    runtime: str
    plugin_library: Path | None
    passes: int


def measure(options: Options, folder: Path) -> list[Row]:
    """Every row of the table: torch's ways in turn, then the engines, one norm after another."""
    rows = []
    x = embeddings(options.size, options.size.tokens, "cuda")
    for what, made in (("layer", layer), ("model", model)):
        models = {norm: made(options.size, norm, "cuda") for norm in NORMS}
        rows += torch_rows(what, _ways(what, models, x), x, options.passes)
        for norm in ENGINES if options.runtime != NO_ENGINES else ():
            files = onnx_files(models[norm], options.size, folder, f"{what}-{norm}")
            rows += engine_rows(
                what, norm, files, tuple(x.shape), folder, options.runtime,
                options.plugin_library, options.passes,
            )  # fmt: skip
        del models
        torch.compiler.reset()
        torch.cuda.empty_cache()
    return rows


def _ways(what: str, models: dict[str, nn.Module], x: Tensor) -> dict[tuple[str, str], Way]:
    """Each norm eager and compiled by Inductor; and DyT recognised and folded, compiled."""
    ways: dict[tuple[str, str], Way] = {}
    for norm, made in models.items():
        ways |= {(norm, "eager"): made, (norm, "compiled"): torch.compile(made)}
    if what == "model":
        ways["DyT", "folded, compiled"] = torch.compile(folded(models["DyT"], x))
    return ways


def report(options: Options, rows: list[Row]) -> dict[str, object]:
    """The measurement as JSON data."""
    return {
        "device": torch.cuda.get_device_name(),
        "capability": capability(),
        "torch": torch.__version__,
        "runtime": options.runtime,
        "size": asdict(options.size),
        "passes": options.passes,
        "rows": [asdict(row) for row in rows],
        "paper": PAPER,
    }


def main() -> None:
    """Measure, and write JSON and a plot; without a GPU one line and status 1."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("-o", "--out", type=Path, default=RESULTS, help="JSON; a plot beside it")
    parser.add_argument("--runtime", choices=(*RUNTIMES, NO_ENGINES), default="tensorrt")
    parser.add_argument("--plugin-library", type=Path, help="of dyt-compile plugin build")
    parser.add_argument("--passes", type=int, default=PASSES)
    parser.add_argument("--small", action="store_true", help="a tiny LLaMA, to try the run")
    given = parser.parse_args()
    if capability() is None or not torch.cuda.is_available():
        sys.exit("no NVIDIA GPU was found: nothing can be measured on this machine")
    size = SMALL if given.small else LLAMA_7B
    options = Options(size, given.runtime, given.plugin_library, given.passes)
    try:
        with tempfile.TemporaryDirectory(prefix="bench-gpu-") as folder:
            found = report(options, measure(options, Path(folder)))
    except DytCompileError as error:
        sys.exit(f"{type(error).__name__}: {error}")
    with replaced(given.out) as temporary:
        temporary.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
        draw(found, temporary.with_suffix(".svg"))
    for row in found["rows"]:  # type: ignore[attr-defined]
        print("{what:6} {norm:10} {way:20} {median_ms:10.3f} ms".format(**row))


if __name__ == "__main__":
    main()
