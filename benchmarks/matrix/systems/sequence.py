"""Sequences without attention alone: state spaces, recurrences, time series, decisions."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import transformers
from torch import nn
from transformers import PretrainedConfig

from .. import drawn
from ..system import Inputs, System

__all__ = ["SYSTEMS"]

LENGTH = 6


def _tokens(model: Any, samples: int, seed: int) -> Inputs:
    return Inputs((drawn.integers(model, seed, model.config.vocab_size, samples, LENGTH),))


def _past_values(model: Any, samples: int, seed: int) -> Inputs:
    """Values of all channels over the context."""
    config = model.config
    shape = samples, config.context_length, config.num_input_channels
    return Inputs((drawn.normal(model, seed, *shape),))


def _forecast(model: Any, samples: int, seed: int) -> Inputs:
    """Past values with their lags, the future that the decoder is taught, and features of time."""
    config = model.config
    past = config.context_length + max(config.lags_sequence)
    future, features = config.prediction_length, config.num_time_features
    values = drawn.normal(model, seed, samples, past)
    return Inputs(
        kwargs={
            "past_values": values,
            "past_time_features": drawn.normal(model, seed + 1, samples, past, features),
            "past_observed_mask": values.isfinite().float(),
            "future_values": drawn.normal(model, seed + 2, samples, future),
            "future_time_features": drawn.normal(model, seed + 3, samples, future, features),
        }
    )


def _window(model: Any, samples: int, seed: int) -> Inputs:
    """A context of values, none of it padding, at a frequency of each series."""
    values = drawn.normal(model, seed, samples, model.config.context_length)
    return Inputs(
        kwargs={
            "past_values": values,
            "past_values_padding": drawn.integers(model, 0, 1, *values.shape),
            "freq": drawn.integers(model, seed, 3, samples, 1),
        }
    )


def _decisions(model: Any, samples: int, seed: int) -> Inputs:
    """States, actions and returns to go of an episode."""
    config = model.config
    return Inputs(
        kwargs={
            "states": drawn.normal(model, seed, samples, LENGTH, config.state_dim),
            "actions": drawn.normal(model, seed + 1, samples, LENGTH, config.act_dim),
            "rewards": drawn.normal(model, seed + 2, samples, LENGTH, 1),
            "returns_to_go": drawn.normal(model, seed + 3, samples, LENGTH, 1),
            "timesteps": drawn.integers(model, seed, LENGTH, samples, LENGTH),
            "attention_mask": drawn.integers(model, 0, 1, samples, LENGTH) + 1,
        }
    )


def _system(
    name: str,
    architecture: type[Any],
    small: PretrainedConfig,
    full: PretrainedConfig | None = None,
    *,
    inputs: Callable[[nn.Module, int, int], Inputs] = _tokens,
) -> System:
    """An architecture of transformers at the size of a configuration."""
    return System(
        name,
        "sequence",
        f"transformers `{architecture.__name__}`",
        drawn.weights(partial(architecture, small)),
        inputs,
        None if full is None else partial(architecture, full),
    )


# ruff format would spread each row over two dozen lines.
# fmt: off
TEXT = {
    "vocab_size": 99, "use_cache": False, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}
DEEP = TEXT | {"hidden_size": 48, "num_hidden_layers": 2}
LARGE = {"use_cache": False}
ATTENTION = {"num_attention_heads": 3, "num_key_value_heads": 3, "intermediate_size": 64}
SERIES = {
    "context_length": 8, "prediction_length": 4, "lags_sequence": [1, 2], "num_time_features": 1,
    "d_model": 32, "encoder_layers": 2, "decoder_layers": 1, "use_cache": False,
}

SYSTEMS = (
    _system(
        "Mamba", transformers.MambaForCausalLM,
        transformers.MambaConfig(**DEEP, state_size=8, time_step_rank=3),
        transformers.MambaConfig(**LARGE, hidden_size=2560, num_hidden_layers=64),
    ),
    _system(
        "Mamba-2", transformers.Mamba2ForCausalLM,
        transformers.Mamba2Config(
            **DEEP, state_size=8, num_heads=6, head_dim=16, n_groups=1, chunk_size=4,
        ),
        transformers.Mamba2Config(**LARGE),
    ),
    _system(
        "RWKV", transformers.RwkvForCausalLM,
        transformers.RwkvConfig(**DEEP, attention_hidden_size=48, context_length=16),
        transformers.RwkvConfig(**LARGE),
    ),
    _system(
        "Falcon-Mamba", transformers.FalconMambaForCausalLM,
        transformers.FalconMambaConfig(**DEEP, state_size=8, time_step_rank=3),
    ),
    _system(
        "Jamba", transformers.JambaForCausalLM,
        transformers.JambaConfig(
            **DEEP, **ATTENTION, attn_layer_period=2, attn_layer_offset=1, num_experts=2,
            mamba_d_state=8, mamba_dt_rank=3,
        ),
    ),
    _system(
        "Zamba2", transformers.Zamba2ForCausalLM,
        transformers.Zamba2Config(
            **DEEP | {"num_hidden_layers": 3}, num_attention_heads=3, num_key_value_heads=3,
            intermediate_size=64, attention_head_dim=32, n_mamba_heads=6, mamba_headdim=16,
            mamba_d_state=8, mamba_ngroups=1, chunk_size=4,
            layers_block_type=["linear_attention", "hybrid", "hybrid"], hybrid_layer_ids=[1, 2],
            adapter_rank=4,
        ),
    ),
    _system(
        "Bamba", transformers.BambaForCausalLM,
        transformers.BambaConfig(
            **DEEP, **ATTENTION, attn_layer_indices=[1], mamba_n_heads=6, mamba_d_head=16,
            mamba_d_state=8, mamba_chunk_size=4,
        ),
    ),
    _system(
        "Falcon-H1", transformers.FalconH1ForCausalLM,
        transformers.FalconH1Config(
            **DEEP, **ATTENTION, mamba_d_ssm=96, mamba_n_heads=6, mamba_d_head=16,
            mamba_d_state=8, mamba_chunk_size=4, mamba_rms_norm=True,
        ),
    ),
    _system(
        "xLSTM", transformers.xLSTMForCausalLM,
        transformers.xLSTMConfig(**DEEP, embedding_dim=48, num_blocks=2, num_heads=2,
                                 chunk_size=4, ffn_round_up_to_multiple_of=8),
    ),
    _system(
        "RecurrentGemma", transformers.RecurrentGemmaForCausalLM,
        transformers.RecurrentGemmaConfig(
            **DEEP, **ATTENTION, lru_width=48, attention_window_size=8, head_dim=16,
            block_types=["recurrent", "attention"],
        ),
    ),
    _system(
        "LFM2", transformers.Lfm2ForCausalLM,
        transformers.Lfm2Config(
            **DEEP, **ATTENTION, layer_types=["conv", "full_attention"], block_multiple_of=16,
        ),
    ),
    _system(
        "Qwen3-Next hybrid", transformers.Qwen3NextForCausalLM,
        transformers.Qwen3NextConfig(
            **DEEP, **ATTENTION, head_dim=16, linear_key_head_dim=8, linear_value_head_dim=8,
            linear_num_key_heads=2, linear_num_value_heads=4, num_experts=0,
            layer_types=["linear_attention", "full_attention"],
        ),
    ),
    _system(
        "PatchTST", transformers.PatchTSTForPrediction,
        transformers.PatchTSTConfig(
            num_input_channels=2, context_length=16, patch_length=4, patch_stride=4,
            num_hidden_layers=2, d_model=32, num_attention_heads=2, ffn_dim=48,
            norm_type="layernorm", prediction_length=4, loss="mse", scaling="std",
        ),
        inputs=_past_values,
    ),
    _system(
        "PatchTST, BatchNorm", transformers.PatchTSTForPrediction,
        transformers.PatchTSTConfig(
            num_input_channels=2, context_length=16, patch_length=4, patch_stride=4,
            num_hidden_layers=2, d_model=32, num_attention_heads=2, ffn_dim=48,
            norm_type="batchnorm", prediction_length=4, loss="mse", scaling=None,
        ),
        inputs=_past_values,
    ),
    _system(
        "PatchTSMixer", transformers.PatchTSMixerForPrediction,
        transformers.PatchTSMixerConfig(
            num_input_channels=2, context_length=16, patch_length=4, patch_stride=4, d_model=16,
            num_layers=2, prediction_length=4, loss="mse", scaling=None,
        ),
        inputs=_past_values,
    ),
    _system(
        "Informer", transformers.InformerModel,
        transformers.InformerConfig(**SERIES, distil=False),
        inputs=_forecast,  # torch.export cannot trace its distillation
    ),
    _system(
        "Time series transformer", transformers.TimeSeriesTransformerModel,
        transformers.TimeSeriesTransformerConfig(**SERIES), inputs=_forecast,
    ),
    _system(
        "TimesFM", transformers.TimesFmModel,
        transformers.TimesFmConfig(
            patch_length=4, context_length=16, horizon_length=4, num_hidden_layers=2,
            hidden_size=48, intermediate_size=64, head_dim=16, num_attention_heads=3,
        ),
        inputs=_window,
    ),
    _system(
        "Decision Transformer", transformers.DecisionTransformerModel,
        transformers.DecisionTransformerConfig(
            state_dim=5, act_dim=3, hidden_size=48, max_ep_len=16, n_positions=32, n_layer=2,
            n_head=3, bos_token_id=0, eos_token_id=0, use_cache=False,
        ),
        inputs=_decisions,
    ),
)
# fmt: on
