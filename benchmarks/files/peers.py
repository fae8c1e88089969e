"""What reads an ONNX file, does something to its norms, and writes it again: ours, and peers."""

from __future__ import annotations

import importlib.util
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import onnx_ir as ir

import dyt_compile
from dyt_compile.graphs.onnx import OnnxGraph
from dyt_compile.graphs.onnx_files import settle
from dyt_compile.graphs.onnx_prepare import prepare
from dyt_compile.graphs.onnx_validity import check
from dyt_compile.passes.match import match

__all__ = ["PEERS", "Peer", "match_ours", "match_theirs", "norms"]

NORMS = {
    "LayerNormalization", "SimplifiedLayerNormalization", "RMSNormalization",
    "SkipLayerNormalization", "SkipSimplifiedLayerNormalization", "EmbedLayerNormalization",
    "DyT", "DyTScale", "DyTBare",
}  # fmt: skip


@dataclass(frozen=True)
class Peer:
    """A way from file to file. run: from a file to another; how many norms it then knows."""

    name: str
    module: str
    run: Callable[[Path, Path], int]

    @property
    def is_here(self) -> bool:
        """Whether what it needs is installed."""
        return importlib.util.find_spec(self.module) is not None


def norms(model: ir.Model) -> int:
    """Nodes of a model that are whole norms or whole DyT."""
    counted = Counter(node.op_type for node in model.graph.all_nodes())
    return sum(counted[name] for name in NORMS)


def _inspect(source: Path, target: Path) -> int:
    return len(dyt_compile.inspect(source).sites)


def _convert(source: Path, target: Path, *, fold: bool = True) -> int:
    result = dyt_compile.convert(source, mode="exact", fold=fold)
    dyt_compile.export_onnx(result, target, check="structure")
    return len(result.match.sites)


def _floor(source: Path, target: Path) -> int:
    model = ir.load(source)
    data = f"{target.name}.data" if _is_large(source) else None
    ir.save(model, target, external_data=data)
    return norms(model)


def _is_large(source: Path) -> bool:
    return source.with_name(f"{source.name}.data").exists()


def _onnxscript(source: Path, target: Path) -> int:
    model = ir.load(source)
    match_theirs(model)
    ir.save(model, target, external_data=f"{target.name}.data" if _is_large(source) else None)
    return norms(model)


def _onnxslim(source: Path, target: Path) -> int:
    import onnxslim  # type: ignore[import-untyped]

    onnxslim.slim(str(source), str(target), save_as_external_data=_is_large(source))
    return norms(ir.load(target))


def _onnxruntime(source: Path, target: Path) -> int:
    """All that its optimizer does for CPUs, short of layouts of one machine."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(target)
    if _is_large(source):
        entry = "session.optimized_model_external_initializers_file_name"
        options.add_session_config_entry(entry, f"{target.name}.data")
    onnxruntime.InferenceSession(str(source), options, providers=["CPUExecutionProvider"])
    return norms(ir.load(target))


PEERS = {
    peer.name: peer
    for peer in (
        Peer("inspect", "dyt_compile", _inspect),
        Peer("convert", "dyt_compile", _convert),
        Peer("unfolded", "dyt_compile", partial(_convert, fold=False)),
        Peer("floor", "onnx_ir", _floor),
        Peer("onnxscript", "onnxscript", _onnxscript),
        Peer("onnxslim", "onnxslim", _onnxslim),
        Peer("onnxruntime", "onnxruntime", _onnxruntime),
    )
}


def match_ours(model: ir.Model) -> int:
    """Find the norms of a model in memory, in place: shapes, terms, match and proofs."""
    check(model)
    settle(model)
    prepare(model)
    return len(match(OnnxGraph("model", model)).sites)


def match_theirs(model: ir.Model) -> int:
    """Fuse the norms of a model in memory, in place, by onnxscript's rules for them."""
    from onnx_ir.passes import common
    from onnxscript.rewriter import rewrite
    from onnxscript.rewriter.rules.fusion import _layer_norm, _rms_normalization

    common.ShapeInferencePass(check_type=False, strict_mode=False)(model)
    rules = [*_layer_norm.layer_normalization_rules, *_rms_normalization.rms_normalization_rules]
    rewrite(model, rules)
    return norms(model)


def nodes(graphs: Iterable[ir.Graph]) -> int:
    """How many nodes graphs hold."""
    return sum(len(graph) for graph in graphs)
