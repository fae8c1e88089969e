"""The files: real models through torch's exporters, and large ones whose weights are holes.

A sparse file takes no place on the disk: its weights read as zeros, but for those of norms, which
are written.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dyt_compile.files import replaced
from dyt_compile.nn import DynamicTanh

__all__ = ["SUBJECTS", "Llama", "Subject", "write_llama"]

WIDTH = 768
BLOCKS = 12
SMALL_BYTES = 1 << 16


@dataclass(frozen=True)
class Subject:
    """A file: what it is, how many norms (or DyT) it truly holds, and how it is written.

    sparse: its weights are holes; external: they lie in a file beside it.
    """

    name: str
    what: str
    norms: int
    write: Callable[[Path], None]
    external: bool = False
    sparse: bool = False


Formula = Callable[["ByHand", Tensor], Tensor]


class ByHand(nn.Module):
    """A norm that is written out, with a gamma and, where it is centred, a beta."""

    def __init__(self, formula: Formula, width: int) -> None:
        super().__init__()
        self.formula = formula
        self.eps = 1e-6
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        return self.formula(self, x)


def _std(norm: ByHand, x: Tensor) -> Tensor:
    var = x.var(-1, unbiased=False, keepdim=True)
    return norm.weight * (x - x.mean(-1, keepdim=True)) / (var + norm.eps).sqrt() + norm.bias


def _moments(norm: ByHand, x: Tensor) -> Tensor:
    mean = x.mean(-1, keepdim=True)
    var = (x * x).mean(-1, keepdim=True) - mean * mean
    return (x - mean) * torch.rsqrt(var + norm.eps) * norm.weight + norm.bias


def _squares(norm: ByHand, x: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    var = centred.square().mean(-1, keepdim=True)
    return centred / torch.sqrt(var + norm.eps) * norm.weight + norm.bias


def _folded(norm: ByHand, x: Tensor) -> Tensor:
    mean = x.mean(-1, keepdim=True)
    factor = norm.weight * ((x - mean).pow(2).mean(-1, keepdim=True) + norm.eps).pow(-0.5)
    return x * factor + (norm.bias - mean * factor)


def _rsqrt(norm: ByHand, x: Tensor) -> Tensor:
    return norm.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + norm.eps))


def _divided(norm: ByHand, x: Tensor) -> Tensor:
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + norm.eps) * norm.weight


def _summed(norm: ByHand, x: Tensor) -> Tensor:
    squares = (x * x).sum(-1, keepdim=True) / x.shape[-1]
    return x * (1 / (squares + norm.eps).sqrt()) * norm.weight


def _length(norm: ByHand, x: Tensor) -> Tensor:
    return F.normalize(x, dim=-1, eps=norm.eps) * x.shape[-1] ** 0.5 * norm.weight


BY_HAND = (_std, _moments, _squares, _folded, _rsqrt, _divided, _summed, _length)
"""As found in public code: four of LayerNorm, four of RMSNorm."""


def _vit(norm: str) -> nn.Module:
    """A ViT-B/16 of timm with random weights, its norms as they are, by hand, or DyT."""
    import timm

    torch.manual_seed(0)
    model: nn.Module = timm.create_model("vit_base_patch16_224", pretrained=False)
    formulas = itertools.cycle(BY_HAND)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.LayerNorm) and norm != "layer":
            made = DynamicTanh(WIDTH) if norm == "dyt" else ByHand(next(formulas), WIDTH)
            model.set_submodule(name, made)
    return model.eval()


def _write_vit(path: Path, norm: str, *, opset: int, legacy: bool = False) -> None:
    model, image = _vit(norm), torch.randn(2, 3, 224, 224)
    if legacy:
        torch.onnx.export(
            model, (image,), path, dynamo=False, opset_version=opset,
            input_names=["x"], dynamic_axes={"x": {0: "batch"}},
        )  # fmt: skip
        return
    program = torch.export.export(model, (image,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    torch.onnx.export(
        program.run_decompositions() if norm == "dyt" else program, f=path, dynamo=True,
        opset_version=opset, external_data=False, verbose=False,
    )  # fmt: skip


@dataclass(frozen=True)
class Llama:
    """A LLaMA by its shape, in 16 bits."""

    width: int
    inner: int
    layers: int
    heads: int
    groups: int
    words: int
    dtype: torch.dtype
    tied: bool = False

    def program(self, *, dyt: bool) -> torch.export.ExportedProgram:
        """The model on the meta device, exported: it holds no weights."""
        from transformers import LlamaConfig, LlamaForCausalLM

        config = LlamaConfig(
            hidden_size=self.width, intermediate_size=self.inner, num_hidden_layers=self.layers,
            num_attention_heads=self.heads, num_key_value_heads=self.groups, use_cache=False,
            vocab_size=self.words, tie_word_embeddings=self.tied,
        )  # fmt: skip
        with torch.device("meta"):
            model: nn.Module = LlamaForCausalLM(config)
            for name, module in list(model.named_modules()):
                if dyt and type(module).__name__ == "LlamaRMSNorm":
                    model.set_submodule(name, DynamicTanh(self.width))
            tokens = torch.zeros(2, 16, dtype=torch.long)
        program = torch.export.export(model.to(self.dtype).eval(), (tokens,), strict=False)
        return program.run_decompositions() if dyt else program


def write_llama(path: Path, shape: Llama, *, dyt: bool, sparse: bool) -> None:
    """The exporter's graph; its weights are holes, or random, in a file beside it."""
    exported = torch.onnx.export(
        shape.program(dyt=dyt), dynamo=True, opset_version=20, optimize=False, verbose=False
    )
    if exported is None:
        raise RuntimeError("torch.onnx.export wrote no program")
    model: ir.Model = exported.model
    offset, random = 0, np.random.default_rng(0)
    data = path.with_name(f"{path.name}.data")
    with data.open("wb") as file:
        for value in model.graph.initializers.values():
            tensor = value.const_value
            if tensor is None:
                continue
            external = ir.ExternalTensor(
                data.name, offset, tensor.nbytes, tensor.dtype,
                shape=ir.Shape(tensor.shape.numpy()), name=str(value.name), base_dir=path.parent,
            )  # fmt: skip
            file.seek(offset)
            if not sparse or tensor.nbytes <= SMALL_BYTES:
                for chunk in _numbers(tensor, random):
                    file.write(chunk)
            offset += -(-tensor.nbytes // SMALL_BYTES) * SMALL_BYTES
            value.const_value = external
        file.truncate(offset)
    with replaced(path) as temporary:
        ir.save(model, temporary)


def _numbers(tensor: ir.TensorProtocol, random: np.random.Generator) -> Iterator[bytes]:
    """Ones for vectors, which are norms' or frequencies; small random numbers for matrices."""
    dtype = tensor.dtype.numpy()
    if len(tensor.shape) < 2:
        yield np.ones(tensor.size, dtype).tobytes()
        return
    for start in range(0, tensor.size, 1 << 22):
        size = min(1 << 22, tensor.size - start)
        yield (random.standard_normal(size, np.float32) * 0.02).astype(dtype).tobytes()


ONE_BILLION = Llama(2048, 8192, 16, 32, 8, 128256, torch.float16, tied=True)
"""LLaMA-3.2-1B's: 2.5 GB."""

SEVEN_BILLION = Llama(4096, 11008, 32, 32, 32, 32000, torch.bfloat16)
"""LLaMA-7B's: 13.5 GB."""


def _vit_subject(name: str, what: str, norm: str, *, opset: int, legacy: bool = False) -> Subject:
    count = 2 * BLOCKS + 1
    return Subject(name, what, count, lambda p: _write_vit(p, norm, opset=opset, legacy=legacy))


def _llama_subject(name: str, what: str, shape: Llama, *, dyt: bool, sparse: bool) -> Subject:
    return Subject(
        name, what, 2 * shape.layers + 1,
        lambda path: write_llama(path, shape, dyt=dyt, sparse=sparse),
        external=True, sparse=sparse,
    )  # fmt: skip


SUBJECTS = {
    subject.name: subject
    for subject in (
        _vit_subject("vit-b", "ViT-B, LayerNorm, opset 20", "layer", opset=20),
        _vit_subject("vit-b-dyt", "ViT-B with DyT, opset 20", "dyt", opset=20),
        _vit_subject("vit-b-14", "ViT-B, older exporter, opset 14", "layer", opset=14, legacy=True),
        _vit_subject("vit-b-hand", "ViT-B, 8 norms by hand, opset 18", "hand", opset=18),
        _llama_subject("llama-1b", "LLaMA-1B shape, fp16", ONE_BILLION, dyt=False, sparse=False),
        _llama_subject(
            "llama-1b-dyt", "LLaMA-1B shape with DyT, fp16", ONE_BILLION, dyt=True, sparse=False
        ),
        _llama_subject("llama-7b", "LLaMA-7B shape, bf16", SEVEN_BILLION, dyt=False, sparse=True),
        _llama_subject(
            "llama-7b-dyt", "LLaMA-7B shape with DyT, bf16", SEVEN_BILLION, dyt=True, sparse=True
        ),
    )
}
