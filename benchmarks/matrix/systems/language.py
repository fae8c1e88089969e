"""Language models: encoders, decoders and both, of transformers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

from torch import nn

from ..from_config import system, token_inputs
from ..system import Inputs, System, is_norm, is_refused

__all__ = ["SYSTEMS"]

ENCODER = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 40,
}
DECODER = {
    **ENCODER,
    "num_key_value_heads": 2,
    "use_cache": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
T5 = {
    "vocab_size": 96,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 2,
    "num_heads": 4,
    "use_cache": False,
    "attn_implementation": "eager",  # the exporter to ONNX cannot decompose the fused one
}
BATCHED_EXPERTS = {"experts_implementation": "batched_mm"}
"""Multiplies with batches of gathered weights; no exporter to ONNX knows the grouped kernel."""

EXPERTS = {**BATCHED_EXPERTS, "num_local_experts": 4, "num_experts_per_tok": 2}
NO_CACHE = {"use_cache": False}

_seq2seq = partial(token_inputs, names=("input_ids", "decoder_input_ids"))


def _system(
    name: str,
    architecture: str,
    small: dict[str, Any],
    full: dict[str, Any] | None = None,
    inputs: Callable[[nn.Module, int, int], Inputs] = token_inputs,
    norms: Callable[[nn.Module], bool] = is_norm,
    refused: Callable[[nn.Module], bool] = is_refused,
) -> System:
    return system(
        name, "language", architecture, small, full, inputs=inputs, norms=norms, refused=refused
    )


def _llama4_norm(module: nn.Module) -> bool:
    """LLaMA 4's L2Norm divides by the root of the mean of squares: an RMSNorm without gamma."""
    return is_norm(module) or type(module).__name__ == "Llama4TextL2Norm"


def _qwen3_next_refused(module: nn.Module) -> bool:
    """The layer that scales its queries and its keys to length one: two calls of a function."""
    return type(module).__name__ == "Qwen3NextGatedDeltaNet"


ENCODERS = (
    _system("BERT", "BertModel", ENCODER, {}),
    _system(
        "RoBERTa",
        "RobertaModel",
        ENCODER,
        {
            "vocab_size": 50265,
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "max_position_embeddings": 514,
            "type_vocab_size": 1,
        },
    ),
    _system("ALBERT", "AlbertModel", {**ENCODER, "embedding_size": 16}),
    _system("ELECTRA", "ElectraModel", {**ENCODER, "embedding_size": 16}),
    _system("MPNet", "MPNetModel", ENCODER, {}),
    _system(
        "DeBERTa",
        "DebertaModel",
        {**ENCODER, "relative_attention": True, "pos_att_type": ["c2p", "p2c"]},
    ),
    replace(
        _system(
            "DeBERTa-v2",
            "DebertaV2Model",
            {
                **ENCODER,
                "relative_attention": True,
                "pos_att_type": ["p2c", "c2p"],
                "position_buckets": 8,
                "norm_rel_ebd": "layer_norm",
                "share_att_key": True,
                "position_biased_input": False,
                "conv_kernel_size": 3,
            },
        ),
        idle=frozenset({"encoder.LayerNorm"}),
    ),  # of the table of distances, a weight
    _system(
        "ModernBERT",
        "ModernBertForMaskedLM",
        {**ENCODER, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "local_attention": 4},
        {},
    ),
    _system("BigBird", "BigBirdModel", {**ENCODER, "attention_type": "original_full"}),
    _system(
        "XLNet",
        "XLNetModel",
        {"vocab_size": 96, "d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 48},
    ),
)

ENCODER_DECODERS = (
    _system(
        "T5",
        "T5Model",
        T5,
        {
            "d_model": 1024,
            "d_kv": 64,
            "d_ff": 4096,
            "num_layers": 24,
            "num_heads": 16,
            "use_cache": False,
        },
        inputs=_seq2seq,
    ),
    _system("mT5", "MT5Model", T5, inputs=_seq2seq),
    _system("UMT5", "UMT5Model", T5, inputs=_seq2seq),
    _system(
        "BART",
        "BartModel",
        {
            "vocab_size": 96,
            "d_model": 32,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "encoder_ffn_dim": 48,
            "decoder_ffn_dim": 48,
            "max_position_embeddings": 40,
            "use_cache": False,
        },
        NO_CACHE,
        inputs=_seq2seq,
    ),
)

DECODERS = (
    _system(
        "GPT-2",
        "GPT2LMHeadModel",
        {
            "vocab_size": 96,
            "n_embd": 32,
            "n_layer": 2,
            "n_head": 4,
            "n_positions": 40,
            "use_cache": False,
        },
        NO_CACHE,
    ),
    _system(
        "GPT-J",
        "GPTJForCausalLM",
        {
            "vocab_size": 96,
            "n_embd": 32,
            "n_layer": 2,
            "n_head": 4,
            "n_positions": 40,
            "rotary_dim": 4,
            "use_cache": False,
        },
    ),
    _system("GPT-NeoX", "GPTNeoXForCausalLM", {**ENCODER, "use_cache": False}, NO_CACHE),
    _system(
        "OPT",
        "OPTForCausalLM",
        {
            "vocab_size": 96,
            "hidden_size": 32,
            "word_embed_proj_dim": 32,
            "ffn_dim": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 40,
            "use_cache": False,
        },
        {
            "hidden_size": 4096,
            "word_embed_proj_dim": 4096,
            "ffn_dim": 16384,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "use_cache": False,
        },
        inputs=partial(token_inputs, square=False),  # it counts its positions in the mask
    ),
    _system(
        "Bloom",
        "BloomForCausalLM",
        {"vocab_size": 96, "hidden_size": 32, "n_layer": 2, "n_head": 4, "use_cache": False},
    ),
    _system("Falcon", "FalconForCausalLM", {**ENCODER, "use_cache": False}, NO_CACHE),
    _system(
        "Falcon (new decoder)",
        "FalconForCausalLM",
        {**ENCODER, "new_decoder_architecture": True, "num_kv_heads": 2, "use_cache": False},
    ),
    _system("Mistral", "MistralForCausalLM", DECODER, NO_CACHE),
    _system(
        "Mixtral", "MixtralForCausalLM", {**DECODER, **EXPERTS}, {**BATCHED_EXPERTS, **NO_CACHE}
    ),
    _system(
        "Qwen2",
        "Qwen2ForCausalLM",
        DECODER,
        {
            "vocab_size": 152064,
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "num_hidden_layers": 28,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
            "use_cache": False,
        },
    ),
    _system(
        "Qwen3",
        "Qwen3ForCausalLM",
        {**DECODER, "head_dim": 8},
        {
            "hidden_size": 4096,
            "intermediate_size": 12288,
            "num_hidden_layers": 36,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "use_cache": False,
        },
    ),
    _system(
        "Qwen3-Next",
        "Qwen3NextForCausalLM",
        {
            **DECODER,
            **BATCHED_EXPERTS,
            "head_dim": 8,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
            "shared_expert_intermediate_size": 16,
            "layer_types": ["linear_attention", "full_attention"],
        },
        refused=_qwen3_next_refused,
    ),
    _system("Gemma", "GemmaForCausalLM", {**DECODER, "head_dim": 8}),
    _system(
        "Gemma 2",
        "Gemma2ForCausalLM",
        {**DECODER, "head_dim": 8, "attn_implementation": "eager"},
        {
            "hidden_size": 3584,
            "intermediate_size": 14336,
            "num_hidden_layers": 42,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "head_dim": 256,
            "attn_implementation": "eager",  # the only one with a soft-cap on the scores
            "use_cache": False,
        },
    ),
    _system(
        "Gemma 3",
        "Gemma3ForCausalLM",
        {**DECODER, "head_dim": 8, "final_logit_softcapping": 30.0},
        {
            "vocab_size": 262208,
            "hidden_size": 2560,
            "intermediate_size": 10240,
            "num_hidden_layers": 34,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "head_dim": 256,
            "sliding_window": 1024,
            "use_cache": False,
        },
    ),
    _system("OLMo", "OlmoForCausalLM", DECODER),
    _system("OLMo 2", "Olmo2ForCausalLM", DECODER, NO_CACHE),
    _system("Phi-3", "Phi3ForCausalLM", DECODER, NO_CACHE),
    _system(
        "PhiMoE",
        "PhimoeForCausalLM",
        {**DECODER, **EXPERTS},
    ),
    _system("Cohere", "CohereForCausalLM", {**DECODER, "use_qk_norm": True}, NO_CACHE),
    _system("StableLM", "StableLmForCausalLM", {**DECODER, "partial_rotary_factor": 0.5}),
    _system(
        "StableLM (QK norm)",
        "StableLmForCausalLM",
        {**DECODER, "qk_layernorm": True, "use_parallel_residual": True},
    ),
    _system(
        "DeepSeek-V3",
        "DeepseekV3ForCausalLM",
        {
            **DECODER,
            **BATCHED_EXPERTS,
            "num_key_value_heads": 4,
            "moe_intermediate_size": 16,
            "n_routed_experts": 8,
            "n_group": 2,
            "topk_group": 1,
            "num_experts_per_tok": 2,
            "kv_lora_rank": 16,
            "q_lora_rank": 16,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8,
            "v_head_dim": 8,
            "first_k_dense_replace": 1,
        },
        {**BATCHED_EXPERTS, **NO_CACHE},
    ),
    _system("gpt-oss", "GptOssForCausalLM", {**DECODER, **EXPERTS, "head_dim": 8}),
    _system("GLM-4", "Glm4ForCausalLM", {**DECODER, "head_dim": 8}),
    _system("Granite", "GraniteForCausalLM", DECODER),
    _system("Nemotron", "NemotronForCausalLM", DECODER),
    _system(
        "LLaMA 4",
        "Llama4ForCausalLM",
        {
            **DECODER,
            **EXPERTS,
            "head_dim": 8,
            "intermediate_size_mlp": 48,
            "interleave_moe_layer_step": 2,
        },
        norms=_llama4_norm,
    ),
    _system(
        "MiniMax",
        "MiniMaxForCausalLM",
        {
            **DECODER,
            **EXPERTS,
            "head_dim": 8,
            "block_size": 4,
            "layer_types": ["linear_attention", "full_attention"],
        },
    ),
    _system("SmolLM3", "SmolLM3ForCausalLM", DECODER),
    _system("Jais 2", "Jais2ForCausalLM", DECODER),
)

SYSTEMS = (*ENCODERS, *ENCODER_DECODERS, *DECODERS)
