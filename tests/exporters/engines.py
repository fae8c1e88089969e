"""Engines for tests and benchmarks: of any file, and of two models with everything done to them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import onnx
import onnx_ir as ir
import torch
from torch import Tensor, nn

import dyt_compile
from dyt_compile import EngineReport, build_engine, export_onnx
from dyt_compile.compiler import Conversion
from dyt_compile.exporters.engine_shapes import Profile
from dyt_compile.exporters.onnx import write

from ..quantize import quantize

__all__ = [
    "EMBEDDINGS", "IMAGE", "NARROW", "RTX", "TARGET", "WIDTH", "Files", "conversions", "engine",
    "files", "llama", "norm_kernels", "profiles", "vit_base",
]  # fmt: skip

RTX, TARGET = "tensorrt-rtx", "sm89"

SHORTEST, USUAL, LONGEST = 1, 8, 16
"""Lengths of a dynamic axis that an engine is built for."""

NORM = re.compile(r"Sqrt|Rsq|Norm")
"""In the name of a fused kernel: the root of a norm, which nothing else in our models takes."""

NARROW = {"int8": ir.DataType.INT8, "fp8": ir.DataType.FLOAT8E4M3FN}

WIDTH, TOKENS = 256, 16
EMBEDDINGS = (TOKENS, WIDTH)
IMAGE = (3, 224, 224)


@dataclass(frozen=True)
class Files:
    """Files of one model: with its norms, with DyT, and that with Q/DQ, by type."""

    norms: Path
    dyt: Path
    quantized: Mapping[str, Path]


def profiles(path: Path) -> dict[str, Profile]:
    """Shapes for every input of a file."""
    graph = onnx.load(path, load_external_data=False).graph
    found = {}
    for value in graph.input:
        axes = value.type.tensor_type.shape.dim
        least, usual, most = (
            tuple(axis.dim_value if axis.HasField("dim_value") else length for axis in axes)
            for length in (SHORTEST, USUAL, LONGEST)
        )
        found[value.name] = (least, usual, most)
    return found


def engine(path: Path, library: Path | None = None, target: str = TARGET) -> EngineReport:
    """An engine for dynamic axes of 1 to 16; with the plugin where its library is given."""
    return build_engine(
        path,
        path.with_suffix(".plan"),
        runtime=RTX,
        shapes=profiles(path),
        target=target,
        lowering="native" if library is None else "plugin",
        plugin_library=library,
    )


def norm_kernels(report: EngineReport) -> list[str]:
    """The kernels of an engine that normalize."""
    return [layer.name for layer in report.layers if NORM.search(layer.name)]


def files(model: nn.Module, shape: tuple[int, ...], folder: Path, dtype: str) -> Files:
    """All files of a model with one input of that shape behind the batch."""
    folder.mkdir(exist_ok=True)
    norms, dyt = (
        export_onnx(conversion, folder / f"{name}-{dtype}.onnx", dtype=dtype).path
        for name, conversion in zip(("norms", "dyt"), conversions(model, shape), strict=True)
    )
    quantized = {}
    for name, narrow in NARROW.items():
        file = ir.load(dyt)
        if not quantize(file, narrow):
            raise ValueError(f"{dyt} has no product to quantize")
        quantized[name] = folder / f"{name}-{dtype}.onnx"
        write(file, quantized[name])
    return Files(norms, dyt, quantized)


@cache
def conversions(model: nn.Module, shape: tuple[int, ...]) -> tuple[Conversion, Conversion]:
    """A model with its norms kept, and with all of them converted."""
    torch.manual_seed(0)
    batches = [(torch.randn(2, *shape),) for _ in range(4)]
    kept = dyt_compile.convert(model, example=(batches[0], {}), fold=False)
    return kept, dyt_compile.convert(model, batches, mode="all", fit="diagonal", fold=False)


class Llama(nn.Module):
    """Two blocks of LLaMA and its last norm, over embeddings."""

    def __init__(self) -> None:
        from transformers import LlamaConfig, LlamaModel

        super().__init__()
        config = LlamaConfig(
            hidden_size=WIDTH, intermediate_size=2 * WIDTH, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=4, vocab_size=32,
        )  # fmt: skip
        self.model = LlamaModel(config)

    def forward(self, x: Tensor) -> Tensor:
        hidden: Tensor = self.model(inputs_embeds=x, use_cache=False).last_hidden_state
        return hidden


@cache
def llama() -> nn.Module:
    """Two blocks, of random weights."""
    torch.manual_seed(0)
    return Llama().eval()


@cache
def vit_base() -> nn.Module:
    """ViT-B/16, of random weights."""
    import timm

    torch.manual_seed(0)
    model: nn.Module = timm.create_model("vit_base_patch16_224", pretrained=False).eval()
    return model
