"""Whole files as tools write them: GenAI's model builder, optimum, ONNX Runtime's optimizer."""

from __future__ import annotations

from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest

import dyt_compile
from dyt_compile import export_onnx, inspect
from dyt_compile.sites import NormKind

pytestmark = pytest.mark.core

convert = partial(dyt_compile.convert, fold=False)
"""So that every DyT is seen with all of its values."""

FILES = Path(__file__).parents[1] / "files" / "onnx"

Array = np.ndarray[Any, Any]

LAYERS = (
    *(f"model.layers.{n}.{norm}_layernorm" for n in (0, 1) for norm in ("input", "post_attention")),
)
GENAI_SITES = (*LAYERS, "model.layers.2.final_norm_layernorm")
QWEN3_SITES = (
    *(
        f"model.layers.{layer}.{norm}"
        for layer in (0, 1)
        for norm in ("input_layernorm", "attn.q_norm", "attn.k_norm", "post_attention_layernorm")
    ),
    "model.layers.2.final_norm_layernorm",
)
DECODERS = {
    "genai-llama-int4": GENAI_SITES,
    "genai-llama-fp16": GENAI_SITES,
    "genai-qwen3-fp32": QWEN3_SITES,
    "optimum-llama": (*LAYERS, "model.norm"),
}
FUSED = {
    "genai-llama-int4": {
        "MatMulNBits": 11, "SkipSimplifiedLayerNormalization": 4, "GroupQueryAttention": 2,
    },
    "genai-llama-fp16": {"SkipSimplifiedLayerNormalization": 4, "MultiHeadAttention": 2},
    "genai-qwen3-fp32": {"SkipSimplifiedLayerNormalization": 4, "GroupQueryAttention": 2},
    "optimum-llama": {},
}  # fmt: skip
LENGTHS = {
    # GenAI's fp16 file for CPUs declares shapes that hold without a past alone.
    "genai-llama-fp16": ((5, 0),),
    # Its attention takes one new token behind a past, of several samples at a time.
    "genai-llama-int4": ((5, 0), (1, 3)),
    "genai-qwen3-fp32": ((5, 0), (1, 3)),
    "optimum-llama": ((5, 0), (1, 3), (4, 2)),
}
"""New tokens and tokens in the past that each file can take."""

DTYPES = {"tensor(int64)": np.int64, "tensor(float)": np.float32, "tensor(float16)": np.float16}


def session(path: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    return onnxruntime.InferenceSession(str(path), options)


def batch(
    model: onnxruntime.InferenceSession, tokens: int, past: int, seed: int, samples: int = 2
) -> dict[str, Array]:
    """Random tokens behind a random past, every position attended to."""
    random = np.random.default_rng(seed)
    lengths = {
        "batch_size": samples, "sequence_length": tokens, "past_sequence_length": past,
        "total_sequence_length": past + tokens, "kv_cache_dim": 16,
        "past_sequence_length + sequence_length": past + tokens,
    }  # fmt: skip
    made: dict[str, Array] = {}
    for value in model.get_inputs():
        shape = [lengths.get(size, size) for size in value.shape]
        if value.name == "attention_mask":
            array = np.ones(shape)
        elif value.name == "position_ids":
            array = np.broadcast_to(np.arange(past, past + tokens), shape)
        elif value.name == "input_ids":
            array = random.integers(3, 48, shape)
        else:
            array = random.normal(size=shape) * 0.5
        made[value.name] = array.astype(DTYPES[value.type])
    return made


def operators(path: Path) -> Counter[str]:
    return Counter(node.op_type for node in onnx.load(path, load_external_data=False).graph.node)


@pytest.mark.parametrize("name", DECODERS)
def test_every_norm_of_a_decoder_is_found_under_its_path(name: str) -> None:
    found = inspect(FILES / name / "model.onnx")
    assert tuple(site.name for site in found.sites) == DECODERS[name]
    assert {site.kind for site in found.sites} == {NormKind.RMS_NORM}
    assert {site.affine for site in found.sites} == {("gamma",)}
    assert {site.channels for site in found.sites} <= {32, 16}
    assert {site.dtype for site in found.sites} == {"float16" if "fp16" in name else "float32"}
    assert found.refusals == ()


@pytest.mark.parametrize("name", DECODERS)
def test_decoder_that_keeps_its_norms_is_the_same_to_the_last_bit(
    name: str, tmp_path: Path
) -> None:
    source = FILES / name / "model.onnx"
    written = export_onnx(convert(source), tmp_path / "exact.onnx").path
    counted = operators(written)
    assert FUSED[name].items() <= counted.items()
    original, other = session(source), session(written)
    for tokens, past in LENGTHS[name]:
        given = batch(original, tokens, past, seed=1)
        for a, b in zip(original.run(None, given), other.run(None, given), strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("name", DECODERS)
def test_decoder_is_converted_with_and_without_a_past(name: str, tmp_path: Path) -> None:
    source = FILES / name / "model.onnx"
    original = session(source)
    lengths = LENGTHS[name]
    data = [batch(original, *lengths[seed % len(lengths)], seed=seed) for seed in range(4)]
    result = convert(source, data, mode="all")
    written = export_onnx(result, tmp_path / "all.onnx")
    assert written.export_error is not None
    assert written.export_error < (1e-2 if "fp16" in name else 1e-5)
    counted = operators(written.path)
    assert counted["DyT"] == len(DECODERS[name])
    assert not any("LayerNormalization" in operator for operator in counted)
    for tokens, past in lengths:
        for samples in (1, 3):
            given = batch(original, tokens, past, seed=9, samples=samples)
            logits, *presents = session(written.path).run(None, given)
            assert logits.shape == (samples, tokens, 48)
            assert np.isfinite(logits).all()
            assert all(present.shape[2] == past + tokens for present in presents)


@pytest.mark.parametrize("name", ["genai-llama-int4", "genai-llama-fp16"])
def test_norms_that_are_kept_stay_fused_beside_converted_ones(name: str, tmp_path: Path) -> None:
    source = FILES / name / "model.onnx"
    original = session(source)
    data = [batch(original, 5, 0, seed=seed) for seed in range(4)]
    result = convert(source, data, mode="all", exclude="layers.0")
    written = export_onnx(result, tmp_path / "partly.onnx")
    assert written.export_error is not None
    assert written.export_error < (1e-2 if "fp16" in name else 1e-5)
    counted = operators(written.path)
    assert counted["DyT"] == 3
    assert counted["SkipSimplifiedLayerNormalization"] == 1
    assert counted["SimplifiedLayerNormalization"] == 1
