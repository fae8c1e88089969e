"""Speech and sound: encoders of waves and spectrograms, with and without a decoder."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from ..from_config import built, square_mask, system, tokens
from ..system import Inputs, System

__all__ = ["SYSTEMS"]

FRONT = {"conv_dim": [16, 16, 32], "conv_stride": [5, 2, 2], "conv_kernel": [10, 3, 3]}
"""The convolutions that turn a wave into frames, seven of them in the real models."""

WAVE = {
    **FRONT,
    "vocab_size": 32,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
}
STABLE = {"feat_extract_norm": "layer", "do_stable_layer_norm": True, "conv_bias": True}
"""Pre-norm, and a LayerNorm behind each convolution, as the large models have it."""

SEQ2SEQ = {
    "vocab_size": 96,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "use_cache": False,
}
WORDS = {"decoder_input_ids": 5}
SAMPLES = 800
"""Of a wave, at least two frames of the real models."""

MEL_BINS = 16


def _signal(
    model: nn.Module,
    samples: int,
    seed: int,
    name: str = "input_values",
    shape: Callable[[Any], tuple[int, ...]] = lambda _: (SAMPLES,),
    words: dict[str, int] | None = None,
) -> Inputs:
    """A random signal of the shape that the configuration asks for; words: token ids beside it."""
    generator = torch.Generator().manual_seed(seed)
    signal = torch.randn(samples, *shape(model.config), generator=generator, device="cpu")
    kwargs = {name: signal.to(model.device)}
    for key, length in (words or {}).items():
        kwargs[key] = tokens(model, samples, seed, length)
        if model.device.type == "meta":  # else it looks at the values for packed sequences
            kwargs[key.replace("input_ids", "attention_mask")] = square_mask(samples, length)
    return Inputs(kwargs=kwargs)


def _system(
    name: str,
    architecture: str,
    small: dict[str, Any],
    full: dict[str, Any] | None = None,
    inputs: Callable[[nn.Module, int, int], Inputs] = _signal,
) -> System:
    return system(name, "speech", architecture, small, full, inputs=inputs)


def _with_weight_norm(architecture: str, settings: dict[str, Any]) -> nn.Module:
    """A vocoder as it is trained, before the norms of its weights are folded away."""
    model = built(architecture, settings)
    model.apply_weight_norm()
    return model


WAVES = (
    _system("HuBERT", "HubertModel", WAVE),
    _system(
        "HuBERT Large",
        "HubertModel",
        {**WAVE, **STABLE},
        {
            **STABLE,
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
        },
    ),
    _system("WavLM", "WavLMModel", WAVE),
    _system("WavLM Large", "WavLMModel", {**WAVE, **STABLE}),
    _system(
        "wav2vec 2.0 Conformer",
        "Wav2Vec2ConformerModel",
        {**WAVE, "feat_extract_norm": "layer", "conv_depthwise_kernel_size": 5},
    ),
    _system(
        "wav2vec 2.0 Conformer (rotary)",
        "Wav2Vec2ConformerModel",
        {**WAVE, "conv_depthwise_kernel_size": 5, "position_embeddings_type": "rotary"},
    ),
    _system(
        "Wav2Vec2-BERT",
        "Wav2Vec2BertModel",
        {
            "feature_projection_input_dim": MEL_BINS,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "conv_depthwise_kernel_size": 5,
        },
        inputs=partial(_signal, name="input_features", shape=lambda _: (12, MEL_BINS)),
    ),
    _system("SEW", "SEWModel", WAVE),
    _system("data2vec audio", "Data2VecAudioModel", {**WAVE, "conv_pos_kernel_size": 5}),
    _system("UniSpeech-SAT", "UniSpeechSatModel", WAVE),
)

SPECTROGRAMS = (
    _system(
        "AST",
        "ASTModel",
        {
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_length": 32,
            "num_mel_bins": MEL_BINS,
        },
        inputs=partial(_signal, shape=lambda config: (config.max_length, config.num_mel_bins)),
    ),
    _system(
        "Parakeet",
        "ParakeetForCTC",
        {
            "vocab_size": 32,
            "pad_token_id": 0,
            "encoder_config": {
                "hidden_size": 32,
                "intermediate_size": 48,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "num_mel_bins": MEL_BINS,
                "subsampling_conv_channels": 8,
            },
        },
        inputs=partial(_signal, name="input_features", shape=lambda _: (64, MEL_BINS)),
    ),
    _system(
        "CLAP",
        "ClapModel",
        {
            "text_config": {
                "vocab_size": 96,
                "hidden_size": 32,
                "intermediate_size": 48,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "max_position_embeddings": 40,
            },
            "audio_config": {
                "spec_size": 32,
                "num_mel_bins": MEL_BINS,
                "window_size": 4,
                "depths": [2, 2],
                "num_attention_heads": [2, 4],
                "num_hidden_layers": 2,
                "patch_embeds_hidden_size": 16,
                "hidden_size": 32,
            },
            "projection_dim": 16,
        },
        inputs=partial(
            _signal,
            name="input_features",
            shape=lambda _: (1, 64, MEL_BINS),
            words={"input_ids": 6},
        ),
    ),
)

ENCODER_DECODERS = (
    _system(
        "Whisper",
        "WhisperForConditionalGeneration",
        {
            **SEQ2SEQ,
            "d_model": 32,
            "num_mel_bins": MEL_BINS,
            "max_source_positions": 12,
            "max_target_positions": 20,
            "pad_token_id": 0,
        },
        {
            "d_model": 1280,
            "encoder_layers": 32,
            "decoder_layers": 32,
            "encoder_attention_heads": 20,
            "decoder_attention_heads": 20,
            "encoder_ffn_dim": 5120,
            "decoder_ffn_dim": 5120,
            "num_mel_bins": 128,
            "vocab_size": 51866,
            "use_cache": False,
        },
        inputs=partial(
            _signal,
            name="input_features",
            shape=lambda config: (config.num_mel_bins, 2 * config.max_source_positions),
            words=WORDS,
        ),
    ),
    _system(
        "Speech2Text",
        "Speech2TextForConditionalGeneration",
        {
            **SEQ2SEQ,
            "d_model": 32,
            "conv_channels": 32,
            "input_feat_per_channel": MEL_BINS,
            "max_source_positions": 40,
            "max_target_positions": 20,
        },
        inputs=partial(_signal, name="input_features", shape=lambda _: (24, MEL_BINS), words=WORDS),
    ),
    _system(
        "SpeechT5",
        "SpeechT5ForSpeechToText",
        {
            **SEQ2SEQ,
            **FRONT,
            "hidden_size": 32,
            "num_conv_pos_embeddings": 16,
            "num_conv_pos_embedding_groups": 4,
        },
        inputs=partial(_signal, words=WORDS),
    ),
    _system(
        "Moonshine",
        "MoonshineModel",
        {
            "vocab_size": 96,
            "hidden_size": 32,
            "intermediate_size": 48,
            "encoder_num_hidden_layers": 2,
            "decoder_num_hidden_layers": 2,
            "encoder_num_attention_heads": 4,
            "decoder_num_attention_heads": 4,
            "use_cache": False,
        },
        inputs=partial(_signal, shape=lambda _: (4000,), words=WORDS),
    ),
    _system(
        "SeamlessM4T",
        "SeamlessM4TForSpeechToText",
        {
            **SEQ2SEQ,
            "hidden_size": 32,
            "speech_encoder_layers": 2,
            "speech_encoder_attention_heads": 4,
            "speech_encoder_intermediate_size": 48,
            "feature_projection_input_dim": MEL_BINS,
            "conv_depthwise_kernel_size": 5,
            "adaptor_kernel_size": 4,
            "adaptor_stride": 4,
        },
        inputs=partial(_signal, name="input_features", shape=lambda _: (16, MEL_BINS), words=WORDS),
    ),
)

VOCODERS = (
    System(
        name="DAC",
        group="speech",
        source="transformers.DacModel",
        small=partial(
            _with_weight_norm,
            "DacModel",
            {
                "encoder_hidden_size": 8,
                "decoder_hidden_size": 16,
                "downsampling_ratios": [2, 4],
                "n_codebooks": 2,
                "codebook_size": 16,
                "codebook_dim": 4,
            },
        ),
        inputs=partial(_signal, shape=lambda _: (1, SAMPLES)),
        is_refused=lambda module: type(module).__name__ == "DacVectorQuantize",
    ),
    System(
        name="HiFi-GAN",
        group="speech",
        source="transformers.SpeechT5HifiGan",
        small=partial(
            _with_weight_norm,
            "SpeechT5HifiGan",
            {
                "model_in_dim": MEL_BINS,
                "upsample_initial_channel": 16,
                "upsample_rates": [4, 4],
                "upsample_kernel_sizes": [8, 8],
                "resblock_kernel_sizes": [3],
                "resblock_dilation_sizes": [[1, 3]],
            },
        ),
        inputs=partial(_signal, name="spectrogram", shape=lambda _: (12, MEL_BINS)),
    ),
)
"""Weight norm on convolutions is nothing to find; codes scaled to length one, in the quantizers,
are refused."""

SYSTEMS = (*WAVES, *SPECTROGRAMS, *ENCODER_DECODERS, *VOCODERS)
