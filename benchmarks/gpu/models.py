"""LLaMA 7B with one norm or another, as in Table 7 of the DyT paper, and their ONNX files."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir
import torch
from torch import Tensor, nn
from torch.export import Dim
from transformers import LlamaConfig, LlamaModel

import dyt_compile
import dyt_compile.nn as dyt_nn
from dyt_compile.exporters.onnx import write
from tests.quantize import quantize

__all__ = [
    "LLAMA_7B",
    "NORMS",
    "SMALL",
    "Size",
    "embeddings",
    "folded",
    "layer",
    "model",
    "onnx_files",
]

SHORT = 8
"""Tokens of the example that a file is traced and checked with; its sequence axis is dynamic."""


@dataclass(frozen=True)
class Size:
    """Of a LLaMA, and how many tokens its one sequence has."""

    hidden: int
    intermediate: int
    heads: int
    layers: int
    tokens: int


LLAMA_7B = Size(4096, 11008, 32, 32, 4096)
"""arXiv 2302.13971, table 2; 4096 tokens as in Table 7 of arXiv 2503.10622."""

SMALL = Size(64, 128, 4, 2, 16)


class DyT(nn.Module):
    """Dynamic Tanh as the paper writes it; alpha starts as for LLaMA 7B (its table 11)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.full((1,), 0.8))
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.alpha * x) * self.weight + self.bias


NORMS: dict[str, Callable[[int], nn.Module]] = {
    "RMSNorm": lambda width: nn.RMSNorm(width, eps=1e-6),
    "LayerNorm": lambda width: nn.LayerNorm(width, eps=1e-6),
    "DyT": DyT,
    "DynamicTanh": lambda width: dyt_nn.DynamicTanh(width, 0.8),
}
"""DynamicTanh: the same as DyT, by the operator of this package."""


class Layer(nn.Module):
    """A norm alone."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm(x)
        return y


class Llama(nn.Module):
    """All blocks of a LLaMA and its last norm, over embeddings."""

    def __init__(self, size: Size, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        config = LlamaConfig(
            hidden_size=size.hidden,
            intermediate_size=size.intermediate,
            num_attention_heads=size.heads,
            num_key_value_heads=size.heads,
            num_hidden_layers=size.layers,
            vocab_size=2,  # embeddings go in
        )
        self.model = LlamaModel(config)
        self.model.norm = norm(size.hidden)
        for block in self.model.layers:
            block.input_layernorm = norm(size.hidden)
            block.post_attention_layernorm = norm(size.hidden)

    def forward(self, x: Tensor) -> Tensor:
        hidden: Tensor = self.model(inputs_embeds=x, use_cache=False).last_hidden_state
        return hidden


def layer(size: Size, norm: str, device: str = "cpu") -> nn.Module:
    """One norm in bfloat16."""
    return Layer(NORMS[norm](size.hidden)).to(device, torch.bfloat16).eval()


def model(size: Size, norm: str, device: str = "cpu") -> nn.Module:
    """A LLaMA of random weights in bfloat16."""
    torch.manual_seed(0)
    with torch.device(device):
        return Llama(size, NORMS[norm]).to(torch.bfloat16).eval()


def embeddings(size: Size, tokens: int, device: str = "cpu") -> Tensor:
    """One sequence in bfloat16."""
    return torch.randn(1, tokens, size.hidden, dtype=torch.bfloat16, device=device)


def folded(built: nn.Module, x: Tensor) -> nn.Module:
    """A model with DyT, recognised and folded, as torch runs it."""
    conversion = dyt_compile.convert(built, example=(x,))
    made: nn.Module = conversion.model
    return made


def onnx_files(built: nn.Module, size: Size, folder: Path, name: str) -> dict[str, Path]:
    """Files by what was done: "exact" always, "folded" and "fp8" where a product reads a DyT.

    The norms stay and DyT is recognised: nothing is fitted, so all files compute the same, but for
    the rounding of "fp8".
    """
    device = next(built.parameters()).device.type
    example = ((embeddings(size, SHORT, device),), {})
    axes = ({1: Dim.DYNAMIC},)
    files = {}
    conversion = dyt_compile.convert(built, example=example, dynamic_shapes=axes, fold=False)
    files["exact"] = dyt_compile.export_onnx(conversion, folder / f"{name}.onnx").path
    holds_dyt = any(site.kind.lossless for site in conversion.match.sites)
    if holds_dyt and isinstance(built, Llama):
        made = dyt_compile.convert(built, example=example, dynamic_shapes=axes)
        files["folded"] = dyt_compile.export_onnx(made, folder / f"{name}-folded.onnx").path
        files["fp8"] = folder / f"{name}-fp8.onnx"
        file = ir.load(files["exact"])
        quantize(file, ir.DataType.FLOAT8E4M3FN)
        write(file, files["fp8"])
    return files
