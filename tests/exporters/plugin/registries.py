"""Real plugin registries, each in a process of its own: TensorRT may abort.

As a script: `registries.py MODULE LIBRARY`; prints what it found as JSON.
"""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

__all__ = ["LEAN", "RTX", "registry"]

RTX = "tensorrt_rtx"
LEAN = "tensorrt_lean_bindings"
"""TensorRT 11's runtime: a registry without a builder."""


def registry(module: str, library: Path) -> dict[str, Any]:
    """Creators of a library by name: version, fields, and the run time plugins that they make."""
    done = subprocess.run(
        [sys.executable, __file__, module, str(library)],
        capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    if done.returncode != 0:
        raise RuntimeError(f"TensorRT ended with {done.returncode}: {done.stderr[-2000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    # Without a logger from TensorRT the plugin speaks there.
    found["told"] = [line for line in done.stderr.splitlines() if line.startswith("dyt::")]
    return found


def _read(module: str, library: str) -> dict[str, Any]:
    import numpy as np

    trt = importlib.import_module(module)
    found = trt.get_plugin_registry()
    before = len(found.all_creators)
    found.load_library(library)

    def makes(creator: Any, *output_dtype: int) -> bool:
        fields = [
            trt.PluginField("output_dtype", np.array([each], np.int32), trt.PluginFieldType.INT32)
            for each in output_dtype
        ]
        collection = trt.PluginFieldCollection(fields)
        return creator.create_plugin("name", collection, trt.TensorRTPhase.RUNTIME) is not None

    ours = [creator for creator in found.all_creators if creator.plugin_namespace == "dyt"]
    creators = {
        creator.name: {
            "version": creator.plugin_version,
            "fields": [[each.name, each.type.name] for each in creator.field_names],
            "makes": {
                "nothing given": makes(creator),
                **{str(dtype): makes(creator, dtype) for dtype in (1, 3, 17)},
            },
        }
        for creator in ours
    }
    return {
        "version": trt.__version__,
        "others": len(found.all_creators) - len(ours) - before,
        "creators": creators,
        "version 2": found.get_creator("DyT", "2", "dyt") is not None,
    }


def main() -> None:
    """Print what was found."""
    sys.stdout.write(json.dumps(_read(*sys.argv[1:])) + "\n")


if __name__ == "__main__":
    main()
