"""Export: a converted model as one portable ONNX file, checked before it takes its name."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx
import onnx_ir as ir

from ..clock import Clock
from ..dyt import DOMAIN, FORMS, VERSION, Form
from ..errors import ExportError, OptionError, first_line
from ..files import replaced
from ..graphs import onnx_functions, onnx_fusion
from ..graphs.onnx import OnnxGraph
from ..graphs.onnx_data import unused_data
from ..graphs.onnx_precision import NARROW, holds, narrow
from ..graphs.onnx_prepare import restore
from ..graphs.onnx_scopes import SCOPES
from ..graphs.onnx_structure import Structure
from ..graphs.onnx_weights import EMBEDDED_BYTES, WEIGHTS, save, weight_bytes
from ..passes.match import match
from ..passes.quantize import WITHOUT_FUNCTIONS, quantize
from .onnx_checks import (
    CHECKS,
    TOLERANCES,
    check_structure,
    check_valid,
    check_values,
    comparable,
    why_not_run,
)

if TYPE_CHECKING:
    from ..compiler import Conversion
    from ..graphs.base import Graph
    from ..graphs.fx import FxGraph

__all__ = ["OnnxExport", "export_onnx", "onnx_graph", "write"]

OPSETS = range(18, 24)
"""Opsets that torch's exporter and ONNX Runtime both take."""

DEFAULT_OPSET = 20


@dataclass(frozen=True)
class OnnxExport:
    """A written file.

    export_error: largest difference from the converted model over its outputs, relative to the
    largest value of each, on one batch; None where it was not run, and not_run says why.
    bytes: of what was written; linked_bytes: of the weights in the files `linked`, beside it, to
    which it refers. structure: what it has in common with the model that it was made from, None
    where it cannot be compared with that. seconds: wall time by stage.
    """

    path: Path
    opset: int
    dtype: str
    bytes: int
    export_error: float | None
    linked_bytes: int = 0
    linked: tuple[str, ...] = ()
    structure: Structure | None = None
    not_run: str = ""
    seconds: Mapping[str, float] = field(default_factory=dict)


def export_onnx(
    result: Conversion,
    path: str | Path,
    *,
    opset: int | None = None,
    dtype: str = "fp32",
    fuse: bool = False,
    provider: str = "cpu",
    weights: str | None = None,
    check: str = "auto",
) -> OnnxExport:
    """Write a converted model as an ONNX file in which every DyT is a `dyt` function.

    Where `result` was made for OpenVINO, which reads no functions, DyT is spelled out; it is
    recognised all the same.

    opset: 18 to 23; by default 20, or the file's own where the model came from ONNX. dtype:
    "fp16" or "bf16" inside the model, whose inputs and outputs keep their types and names;
    alpha stays float32. By default nothing is narrowed. fuse: an Add before a DyT and a
    QuantizeLinear behind it become part of its node (exact; see `graphs/onnx_fusion.py`), which
    pays where TensorRT has our plugin for it.

    weights: "link" refers to the data files of the ONNX model that was converted, where they lie
    within the folder of `path`; "copy" streams the weights into `<name>.<digest>.data` beside the
    file; "embed" puts them into it, up to 1.8 GB. Tensors that changed are written in any case. By
    default weights that lie beside the model are linked by a file in the same folder; others are
    embedded up to 1.8 GB and copied above.

    check: "structure" reads the file again and compares it, node by node, with the model that was
    converted: in mode "exact" with the original, from which it may differ in nodes alone that were
    proved to compute DyT. That takes an ONNX model, written in its own opset and dtype. "run"
    compares so where it can, and runs the file beside the converted model on one batch. "auto" does
    that, but in mode "exact" runs no model with more than 1.8 GB of weights. On a CPU a run does
    not show where fp16 overflows: ONNX Runtime computes fp16 there in float32 and rounds between
    some nodes only.

    Raises OptionError, ExportError, and VerificationError if the file does not compute what the
    converted model computes; in each case nothing is left at `path`.
    """
    target = Path(path)
    if weights is not None and weights not in WEIGHTS:
        raise OptionError(f"weights is {weights!r}; allowed: {', '.join(WEIGHTS)}")
    if check not in CHECKS:
        raise OptionError(f"check is {check!r}; allowed: {', '.join(CHECKS)}")
    if dtype not in TOLERANCES:
        raise OptionError(f"dtype is {dtype!r}; allowed: {', '.join(TOLERANCES)}")
    if opset is not None and opset not in OPSETS:
        raise OptionError(f"opset is {opset}; allowed: {OPSETS[0]} to {OPSETS[-1]}")
    clock = Clock()
    with clock("build"):
        graph = _written(result, opset)
        model = _built(graph, opset, dtype, result.runtime, fuse=fuse)
    source = comparable(result, model, dtype)
    if check == "structure" and source is None:
        raise OptionError(
            "check is 'structure': allowed for a model from ONNX, written in its opset and dtype"
        )
    dtype = next((name for name, narrow_type in NARROW.items() if holds(model, narrow_type)), dtype)
    not_run = why_not_run(result, model, check)
    with replaced(target, partial(unused_data, target, model)) as temporary:
        with clock("write"):
            saved = save(model, temporary, weights, target.parent)
        folder = target.parent if saved.linked else None
        structure, error = None, None
        with clock("check"):
            check_valid(temporary)
            if source is not None:
                read = check == "structure" or saved.bytes <= EMBEDDED_BYTES
                structure = check_structure(source, temporary, folder, read=read)
        if not not_run:
            with clock("run"):
                error = check_values(temporary, result, graph, dtype, provider, folder)
    if error is None and not not_run:
        not_run = "no data"
    return OnnxExport(
        target, model.opset_imports[""], dtype, saved.bytes, error,
        saved.linked_bytes, saved.linked, structure, not_run, clock.seconds,
    )  # fmt: skip


def _built(graph: Graph, opset: int | None, dtype: str, runtime: str, *, fuse: bool) -> ir.Model:
    """The model as the file will hold it."""
    model = _portable(graph, opset)
    if dtype in NARROW:
        narrow(model, NARROW[dtype], _kept_norms(model))
    if fuse:
        onnx_fusion.fuse(model)
    restore(model)
    if runtime in WITHOUT_FUNCTIONS:
        onnx_functions.spell_out(model)
    return model


def _written(result: Conversion, opset: int | None) -> Graph:
    """The graph to write; what is quantised goes to another opset before it is."""
    made = result.quantized
    if made is None:
        return result.graph
    if opset is None or opset == made.graph.opset:
        return made.graph
    graph = OnnxGraph.from_model(made.graph.name, _portable(result.graph, opset))
    return quantize(graph, match(graph), made.dtype, made.runtime, made.kept).graph


def onnx_graph(graph: Graph, least_opset: int) -> OnnxGraph:
    """The graph in the world of ONNX: itself, or what torch's exporter makes of it.

    least_opset: an older file is raised to the opset that torch models are written in.
    Raises ExportError as `export_onnx` does.
    """
    if isinstance(graph, OnnxGraph) and graph.opset >= least_opset:
        return graph
    return OnnxGraph.from_model(graph.name, _portable(graph, DEFAULT_OPSET))


def _portable(graph: Any, opset: int | None) -> ir.Model:
    """A model of its own, in the opset."""
    if isinstance(graph, OnnxGraph):
        model = _from_onnx(graph, opset)
    else:
        model = _from_torch(graph, opset or DEFAULT_OPSET)
    _forget_the_machine(model)
    return model


def _from_onnx(graph: OnnxGraph, opset: int | None) -> ir.Model:
    model = graph.apart()
    if opset is not None and opset != model.opset_imports.get(""):
        from onnxscript import version_converter

        before = model.opset_imports.get("")
        model.functions.clear()
        version_converter.convert_version(model, opset, fallback=True)
        if model.opset_imports.get("") != opset:
            raise ExportError(f"the model's opset {before} cannot be converted to {opset}")
        onnx_functions.declare(model)
    return model


def _from_torch(graph: FxGraph, opset: int) -> ir.Model:
    import torch

    from ..nn import operator

    if any(p.is_meta for p in graph.model.parameters()):
        raise ExportError("the model's weights are not loaded (meta tensors): nothing to export")
    table: dict[Callable[..., Any], Callable[..., Any]] = {
        operator(form): _translation(form) for form in FORMS.values()
    }
    table[torch.ops.aten.squeeze.dim] = _squeeze
    try:
        program = torch.onnx.export(
            graph.program(),
            dynamo=True,
            opset_version=opset,
            custom_translation_table=table,
            output_names=[
                f"{name}_output" if name in graph.inputs else name for name in graph.outputs
            ],
            verbose=False,
        )
    except Exception as error:
        raise ExportError(
            f"torch.onnx.export cannot write {graph.name}: {first_line(error)}"
        ) from error
    if program is None:
        raise ExportError(f"torch.onnx.export wrote no program for {graph.name}")
    model: ir.Model = program.model
    onnx_functions.declare(model)
    _name_axes(model)
    return model


def _translation(form: Form) -> Any:
    """What torch's exporter calls for an operator of ours: it adds one node of the form."""
    from onnxscript.values import Op as OnnxOp
    from onnxscript.values import Opset

    schema_of = onnx.defs.OpSchema
    floats = ["tensor(float)", "tensor(float16)", "tensor(bfloat16)", "tensor(double)"]
    typed = {"alpha": "tensor(float)", "shift": "tensor(float)"}
    schema = schema_of(
        form.name,
        DOMAIN,
        VERSION,
        inputs=[
            schema_of.FormalParameter(name, typed.get(name, "T"))
            for name in ("x", *form.parameters)
        ],
        outputs=[schema_of.FormalParameter("y", "T")],
        type_constraints=[("T", floats, "")],
        attributes=[
            schema_of.Attribute(name, schema_of.AttrType.STRING, "")
            for name in onnx_functions.PLUGIN_ATTRIBUTES
        ],
    )
    node = OnnxOp(Opset(DOMAIN, VERSION), form.name, schema)
    return lambda *inputs: node(*inputs, **onnx_functions.PLUGIN_ATTRIBUTES)


def _squeeze(*inputs: Any) -> Any:
    """An axis of length 1 removed: torch leaves a longer one, and its exporter forgets that."""
    from onnxscript import opset18

    write: Any = opset18
    x, axis = inputs
    longer = x.shape is not None and x.shape[axis] != 1
    return write.Identity(x) if longer else write.Squeeze(x, [axis])


def _forget_the_machine(model: ir.Model) -> None:
    """Drop what torch's exporter noted for debugging: its stack traces hold paths."""
    for node in model.graph.all_nodes():
        for key in [key for key in node.metadata_props if key.startswith("pkg.") and key != SCOPES]:
            del node.metadata_props[key]


def _kept_norms(model: ir.Model) -> set[ir.Node]:
    """The nodes of norms that were kept: their squares overflow fp16, so they stay in float32."""
    graph = OnnxGraph("export", model)
    return {
        node
        for site in match(graph).sites
        if not site.kind.lossless
        for node in graph.between([site.input], [site.output])
    }


def _name_axes(model: ir.Model) -> None:
    """Call the symbol of axis 0 "batch", as it says in files made by hand, instead of "s31"."""
    first = next((v for v in model.graph.inputs if v.shape and not v.shape.is_static(0)), None)
    symbol = None if first is None or first.shape is None else first.shape[0]
    if not isinstance(symbol, ir.SymbolicDim) or symbol.value is None:
        return
    whole_word = re.compile(rf"\b{re.escape(symbol.value)}\b")
    for value in _all_values(model):
        if value.shape is not None:
            value.shape = ir.Shape([_renamed(size, whole_word) for size in value.shape])


def _renamed(size: int | ir.SymbolicDim, symbol: re.Pattern[str]) -> int | str | None:
    if isinstance(size, int):
        return size
    return None if size.value is None else symbol.sub("batch", size.value)


def _all_values(model: ir.Model) -> list[ir.Value]:
    made = [output for node in model.graph.all_nodes() for output in node.outputs]
    return [*model.graph.inputs, *made]


def write(model: ir.Model, path: Path) -> None:
    """Write a model as a file of its own, large weights in another beside it."""
    save(model, path, "copy" if weight_bytes(model) > EMBEDDED_BYTES else "embed")
