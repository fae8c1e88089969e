"""Export for torch: a converted model as a `.pt2` program, or its weights as `.safetensors`."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ExportError, OptionError, VerificationError
from ..files import replaced

if TYPE_CHECKING:
    from ..compiler import Conversion

__all__ = ["SUFFIXES", "export_torch"]

SUFFIXES = (".pt2", ".safetensors")
TOLERANCE = 1e-4
"""Largest difference allowed, relative to the largest value of the output: the same kernels run,
in another order at most. Of narrow types, a few units of rounding."""


def export_torch(result: Conversion, path: str | Path) -> Path:
    """Write a converted torch model; the suffix of `path` chooses the form.

    .pt2: a program for `torch.export.load`, in operators of torch alone; it is loaded again and run
    beside the converted model before it takes its name. .safetensors: the weights by their paths
    in the model, alpha, gamma and beta of a site under the site's name.

    Raises OptionError for other suffixes, ExportError for a model that came from ONNX, and
    VerificationError if the program does not compute what the model computes.
    """
    target = Path(path)
    if target.suffix not in SUFFIXES:
        raise OptionError(f"path is {str(target)!r}; allowed: {', '.join(SUFFIXES)}")
    graph: Any = result.graph
    if result.quantized is not None:
        raise OptionError(f"path is {str(target)!r}; a quantised model is written as .onnx alone")
    if not hasattr(graph, "program"):
        raise ExportError(f"{result.report.model!r} came from an ONNX file: only .onnx is written")
    with replaced(target) as temporary:
        if target.suffix == ".pt2":
            _save_program(graph, temporary)
        else:
            _save_weights(graph, temporary)
    return target


def _save_program(graph: Any, path: Path) -> None:
    import torch

    from ..nn import decompositions

    decomposed = graph.program().run_decompositions(decompositions())
    with _Patient(path, "wb") as file:
        torch.export.save(decomposed, file)
    if file.error is not None:
        raise file.error
    program = torch.export.load(path).module(check_guards=False)
    with torch.no_grad():
        expected = graph.model(*graph.args, **graph.kwargs)
        found = program(*graph.args, **graph.kwargs)
    pairs = zip(*map(torch.utils._pytree.tree_leaves, (expected, found)), strict=True)
    for f, g in pairs:
        if isinstance(f, torch.Tensor) and f.is_floating_point():
            allowed = max(TOLERANCE, 16 * torch.finfo(f.dtype).eps) * float(f.abs().max())
            difference = float((f - g).abs().max())
            if not difference <= allowed:
                raise VerificationError(
                    f"the program differs from the converted model by {difference:.3g}; "
                    f"allowed: {allowed:.3g}"
                )


class _Patient(io.FileIO):
    """A file that keeps its error for later: torch ends the process where it meets one while it
    closes an archive, as on a full disk."""

    error: OSError | None = None

    def write(self, data: Any) -> int:
        left = memoryview(data).cast("B")
        try:
            while left and self.error is None:
                left = left[super().write(left) :]
        except OSError as error:
            self.error = error
        return len(data)


def _save_weights(graph: Any, path: Path) -> None:
    from safetensors.torch import save_model

    save_model(graph.model, str(path), metadata={"format": "pt"})
