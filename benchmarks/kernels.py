"""Kernels of TensorRT-RTX engines, counted without a GPU: `python -m benchmarks.kernels LIBRARY`.

LIBRARY is what `dyt-compile plugin build` wrote. ViT-B/16 and two blocks of LLaMA, of random
weights, dynamic batch, for compute capability 8.9. A count says nothing of speed.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from tests.exporters.engines import EMBEDDINGS, IMAGE, engine, files, llama, vit_base

MODELS = {"ViT-B": (vit_base, IMAGE), "LLaMA, 2 blocks": (llama, EMBEDDINGS)}
ROWS = (
    ("LLaMA, 2 blocks", "fp32"), ("LLaMA, 2 blocks", "fp16"), ("LLaMA, 2 blocks", "bf16"),
    ("ViT-B", "fp16"),
)  # fmt: skip
HEAD = (
    "model", "dtype", "norms", "DyT", "DyT plugin", "INT8", "INT8 plugin", "FP8", "FP8 plugin",
)  # fmt: skip


def counts(name: str, dtype: str, library: Path, folder: Path) -> list[int]:
    """Kernels with norms; with DyT, native and by the plugin; quantized, in the same way."""
    model, shape = MODELS[name]
    found = files(model(), shape, folder, dtype)
    pairs = [found.dyt, *found.quantized.values()]
    both = [engine(path, lowering).kernels for path in pairs for lowering in (None, library)]
    return [engine(found.norms).kernels, *both]


def main() -> None:
    """Print the table."""
    if len(sys.argv) != 2 or not Path(sys.argv[1]).is_file():
        sys.exit(f"usage: python -m benchmarks.kernels LIBRARY (given: {sys.argv[1:]})")
    print(f"| {' | '.join(HEAD)} |\n|{'---|' * len(HEAD)}")
    with tempfile.TemporaryDirectory(prefix="kernels-") as folder:
        for name, dtype in ROWS:
            row = counts(name, dtype, Path(sys.argv[1]), Path(folder))
            print(f"| {name} | {dtype} | {' | '.join(map(str, row))} |", flush=True)


if __name__ == "__main__":
    main()
