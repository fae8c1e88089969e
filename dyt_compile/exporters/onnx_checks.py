"""Checks of a written ONNX file: is it valid, are its nodes those of its source, and its values."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir

from ..dyt import FUSED
from ..errors import CaptureError, DataError, ExportError, VerificationError
from ..graphs import onnx_fusion
from ..graphs.onnx import OnnxGraph
from ..graphs.onnx_files import parse, weights_as_inputs
from ..graphs.onnx_functions import LEAST_OPSET
from ..graphs.onnx_precision import NARROW
from ..graphs.onnx_structure import Structure, compare
from ..graphs.onnx_weights import EMBEDDED_BYTES, weight_bytes
from ..passes.match import match
from ..passes.quantize import WITHOUT_FUNCTIONS
from ..runtime import Session
from ..sites import NormSite

if TYPE_CHECKING:
    from ..compiler import Conversion
    from ..graphs.base import Graph

__all__ = [
    "CHECKS",
    "TOLERANCES",
    "check_structure",
    "check_valid",
    "check_values",
    "comparable",
    "why_not_run",
]

CHECKS = ("auto", "structure", "run")

TOLERANCES = {"fp32": 1e-4, "fp16": 1e-2, "bf16": 8e-2}
"""Largest difference allowed, relative to the largest value of the output: twenty units of rounding
for the narrow types."""

FLIPS = 8e-2
"""The same where numbers of eight bits are made of narrow ones: what lay next to the middle between
two of them may go to the other one."""


def comparable(
    result: Conversion, model: ir.Model, dtype: str
) -> tuple[OnnxGraph, Sequence[NormSite]] | None:
    """What the written file is to equal, node by node, with its sites: the original where nothing
    was fitted or folded, else the converted model; None where its types or operators change."""
    graph: Any = result.graph if result.quantized is None else result.quantized.graph
    respelled = result.runtime in WITHOUT_FUNCTIONS or any(
        FUSED[name].quantized for name in onnx_fusion.forms(model) if name in FUSED
    )
    if not isinstance(graph, OnnxGraph) or dtype in NARROW or respelled:
        return None
    if model.opset_imports[""] not in (graph.opset, LEAST_OPSET):
        return None
    original: Any = result.original
    unchanged = result.folded is None or not result.folded.folded
    if result.calibration is None and unchanged and graph is result.graph:
        return original, result.match.sites
    return graph, match(graph).sites


def why_not_run(result: Conversion, model: ir.Model, check: str) -> str:
    """Why the check of this name runs no file; empty where it does."""
    size = weight_bytes(model)
    if check == "structure":
        return "check is 'structure'"
    exact = result.calibration is None and isinstance(result.graph, OnnxGraph)
    if check == "auto" and exact and size > EMBEDDED_BYTES:
        return f"{size / 1e9:.1f} GB of weights; check 'run' does"
    return ""


def check_structure(
    source: tuple[OnnxGraph, Sequence[NormSite]], path: Path, folder: Path | None, *, read: bool
) -> Structure:
    """What a written file has in common with its source; read: whether weights are, too.

    Raises VerificationError where it differs.
    """
    written = OnnxGraph.from_file(path, folder=folder)
    return compare(*source, written, match(written).sites, read=read)


def check_valid(path: Path) -> None:
    """Raise ExportError where ONNX's checker finds a fault; weights stay out of it."""
    proto, _ = parse(path)
    weights_as_inputs(proto)
    try:
        with _operators_of_onnx_runtime():
            onnx.checker.check_model(proto, full_check=True)
    except Exception as error:
        raise ExportError(f"the exported model is not valid ONNX: {error}") from error


@contextmanager
def _operators_of_onnx_runtime() -> Iterator[None]:
    """Lets ONNX's checker know the norms that ONNX Runtime's optimizer writes in ONNX's domain."""
    schema_of = onnx.defs.OpSchema
    floats = ["tensor(float)", "tensor(float16)", "tensor(bfloat16)", "tensor(double)"]
    optional = schema_of.FormalParameterOption.Optional
    schemas = [
        schema_of(
            name,
            "",
            1,
            inputs=[
                schema_of.FormalParameter("x", "T"),
                schema_of.FormalParameter("scale", "V"),
                *(schema_of.FormalParameter(more, "V", param_option=optional) for more in inputs),
            ],
            outputs=[
                schema_of.FormalParameter("y", "V"),
                *(schema_of.FormalParameter(more, "U", param_option=optional) for more in outputs),
            ],
            type_constraints=[(letter, floats, "") for letter in "TUV"],
            attributes=[
                schema_of.Attribute("axis", schema_of.AttrType.INT, ""),
                schema_of.Attribute("epsilon", schema_of.AttrType.FLOAT, ""),
                schema_of.Attribute("stash_type", schema_of.AttrType.INT, ""),
            ],
        )
        for name, inputs, outputs in (
            ("SimplifiedLayerNormalization", (), ("inv_std_var",)),
            ("LayerNormalization", ("bias",), ("mean", "inv_std_var")),
        )
    ]
    for schema in schemas:
        onnx.defs.register_schema(schema)
    try:
        yield
    finally:
        for schema in schemas:
            onnx.defs.deregister_schema(schema.name, schema.since_version, schema.domain)


def check_values(
    path: Path,
    result: Conversion,
    graph: Graph,
    dtype: str,
    provider: str,
    folder: Path | None,
) -> float | None:
    """Run the file beside the graph written on one batch; the error, None without a batch."""
    if result.probe is None:
        return None
    batch = {name: result.graph.to_array(native) for name, native in result.probe.items()}
    given = result.probe if graph is result.graph else batch  # of another world: one of ONNX
    whole = graph.segment(list(graph.inputs.values()), list(graph.outputs.values()))
    try:
        expected = whole([given[name] for name in graph.inputs])
    except DataError:
        if result.report.samples:  # the user's own batch ran before
            raise
        return None  # made up without data, and not to the model's taste
    reference = [graph.to_array(value) for value in expected]
    try:
        session = Session(path, provider, folder)
    except CaptureError as error:
        raise ExportError(f"the exported model does not load: {error}") from error
    found = session.run([batch[name] for name in session.inputs])
    largest = max(map(_difference, reference, found), default=0.0)
    eight = result.quantized is not None and dtype in NARROW
    allowed = FLIPS if eight else TOLERANCES[dtype]
    if not largest <= allowed:
        raise VerificationError(
            f"the exported model differs from the converted one by {largest:.3g} "
            f"(relative to the largest output); allowed in {dtype}: {allowed:g}"
        )
    return largest


def _difference(expected: npt.NDArray[Any], found: npt.NDArray[Any]) -> float:
    if expected.shape != found.shape:
        return float("inf")
    if not expected.size:
        return 0.0
    a, b = expected.astype(np.float64), found.astype(np.float64)
    finite = np.isfinite(a)
    if not np.array_equal(a[~finite], b[~finite]) or not np.isfinite(b[finite]).all():
        return float("inf")  # infinities belong where the model has them, and NaN nowhere
    if not finite.any():
        return 0.0
    return float(np.abs(a[finite] - b[finite]).max() / (np.abs(a[finite]).max() or 1.0))
