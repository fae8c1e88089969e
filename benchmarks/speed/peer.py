"""The peer: ONNX Runtime's static INT8, calibrated on data, in the way of its documentation.

https://onnxruntime.ai/docs/performance/model-optimizations/quantization.html: pre-processing with
shape inference and optimization, then Q/DQ around the chosen operators with the ranges that
activations had.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import onnx
from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process
from torch import Tensor

import dyt_compile
from dyt_compile.terms import Op, Value

__all__ = ["quantize_calibrated", "readers"]

VIEWS = {Op.CAST, Op.GATHER, Op.RESHAPE, Op.SLICE, Op.SQUEEZE, Op.TRANSPOSE, Op.UNSQUEEZE, Op.VIEW}
PRODUCTS = {Op.CONVOLUTION, Op.MATMUL}


def quantize_calibrated(source: Path, target: Path, samples: Sequence[tuple[Tensor, ...]]) -> int:
    """Quantize what reads a norm in a file, weights per channel; how many operators that is."""
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        prepared = Path(folder) / "prepared.onnx"
        quant_pre_process(source, prepared, skip_symbolic_shape=True)
        chosen = readers(prepared)
        quantize_static(
            prepared,
            target,
            _Samples(prepared, samples),
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            nodes_to_quantize=chosen,
        )
    return len(chosen)


def readers(path: Path) -> list[str]:
    """The names of the products with weights that read a norm of a file, through views too."""
    graph = onnx.load(path, load_external_data=False).graph
    names = {output: node.name for node in graph.node for output in node.output}
    sites = dyt_compile.inspect(path).sites
    found = (name for site in sites for name in _products(site.output))
    return list(dict.fromkeys(names[name] for name in found))


def _products(value: Value) -> Iterator[str]:
    for term in value.consumers:
        if term.op in VIEWS:
            yield from _products(term.output)
        elif term.op in PRODUCTS and any(v.constant for v in term.operands):
            yield term.output.name


class _Samples(CalibrationDataReader):  # type: ignore[misc]
    """Inputs by name, one sample after another."""

    def __init__(self, path: Path, samples: Sequence[tuple[Tensor, ...]]) -> None:
        names = [value.name for value in onnx.load(path, load_external_data=False).graph.input]
        self._rest = iter(
            {name: tensor.numpy() for name, tensor in zip(names, sample, strict=True)}
            for sample in samples
        )

    def get_next(self) -> dict[str, object] | None:
        """The next sample, None behind the last."""
        return next(self._rest, None)
