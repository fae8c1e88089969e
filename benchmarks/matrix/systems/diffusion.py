"""Diffusion: transformers and U-Nets of diffusers, most of whose norms are modulated (adaLN)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

from .. import drawn
from ..system import Inputs, System, is_norm, is_refused

__all__ = ["SYSTEMS"]

Given = Callable[[Any, int, int], dict[str, Tensor]]

TEXT_LENGTH = 6
STEPS = 1000


def _is_norm(module: nn.Module) -> bool:
    """Two classes named like norms hold one, and what modulates it."""
    holders = "AdaLayerNorm", "MochiModulatedRMSNorm"
    return is_norm(module) and type(module).__name__ not in holders


def _is_refused(module: nn.Module) -> bool:
    """GRN runs over space."""
    return is_refused(module) or type(module).__name__ == "GlobalResponseNorm"


def _latents(model: Any, samples: int, seed: int, *shape: int, width: int) -> dict[str, Tensor]:
    """What every denoiser takes: latents, their step, and the text that conditions them."""
    return {
        "hidden_states": drawn.normal(model, seed, samples, *shape),
        "timestep": drawn.integers(model, seed, STEPS, samples),
        "encoder_hidden_states": drawn.normal(model, seed + 1, samples, TEXT_LENGTH, width),
    }


def _mask(model: nn.Module, samples: int) -> Tensor:
    """All tokens of the text count."""
    return drawn.normal(model, 0, samples, TEXT_LENGTH).isfinite()


def _images(model: Any, samples: int, seed: int, width: int) -> dict[str, Tensor]:
    config = model.config
    size = config.sample_size
    return _latents(model, samples, seed, config.in_channels, size, size, width=width)


def _sd3(model: Any, samples: int, seed: int) -> dict[str, Tensor]:
    config = model.config
    pooled = drawn.normal(model, seed, samples, config.pooled_projection_dim)
    given = _images(model, samples, seed, config.joint_attention_dim)
    return given | {"pooled_projections": pooled}


def _flux(model: Any, samples: int, seed: int) -> dict[str, Tensor]:
    """Latents as a row of tokens; where each stands is the same for all samples."""
    config = model.config
    side = 4
    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    places = torch.stack((torch.zeros_like(rows), rows, columns), -1).reshape(-1, 3).float()
    pooled = drawn.normal(model, seed, samples, config.pooled_projection_dim)
    width = config.joint_attention_dim
    return _latents(model, samples, seed, side * side, config.in_channels, width=width) | {
        "pooled_projections": pooled,
        "timestep": drawn.integers(model, seed, STEPS, samples) / STEPS,
        "img_ids": places.to(pooled.device),
        "txt_ids": torch.zeros(TEXT_LENGTH, 3, device="cpu").to(pooled.device),
    }


def _pixart(model: Any, samples: int, seed: int) -> dict[str, Tensor]:
    return _images(model, samples, seed, model.config.caption_channels)


def _aura(model: Any, samples: int, seed: int) -> dict[str, Tensor]:
    """The step as a share: the model itself multiplies it by their number."""
    given = _images(model, samples, seed, model.config.joint_attention_dim)
    return given | {"timestep": given["timestep"] / STEPS}


def _dit(model: Any, samples: int, seed: int) -> dict[str, Tensor]:
    given = _images(model, samples, seed, 1)
    del given["encoder_hidden_states"]
    return given | {"class_labels": drawn.integers(model, seed, STEPS, samples)}


def _video(model: Any, samples: int, seed: int) -> dict[str, Tensor]:
    """A clip of few frames, channels first."""
    config = model.config
    return _latents(model, samples, seed, config.in_channels, 2, 8, 8, width=config.text_dim)


def _cogvideo(model: Any, samples: int, seed: int) -> dict[str, Tensor]:
    config = model.config
    frames = (config.sample_frames - 1) // config.temporal_compression_ratio + 1
    shape = frames, config.in_channels, config.sample_height, config.sample_width
    given = _latents(model, samples, seed, *shape, width=config.text_embed_dim)
    text = drawn.normal(model, seed, samples, config.max_text_seq_length, config.text_embed_dim)
    return given | {"encoder_hidden_states": text}


def _cogview(model: Any, samples: int, seed: int) -> dict[str, Tensor]:
    """Beside the text, the size that an image had, shall have, and where it was cut."""
    given = _images(model, samples, seed, model.config.text_embed_dim)
    size = drawn.integers(model, 0, 1, samples, 2) + 64.0
    return given | {"original_size": size, "target_size": size, "crop_coords": size * 0}


def _ltx(model: Any, samples: int, seed: int) -> dict[str, Any]:
    """A clip as a row of tokens."""
    config = model.config
    given = _latents(model, samples, seed, 32, config.in_channels, width=config.caption_channels)
    coordinates = drawn.normal(model, 0, samples, 3, 32).abs()
    return given | {
        "encoder_attention_mask": _mask(model, samples),
        "video_coords": coordinates,
    }


def _audio(model: Any, samples: int, seed: int) -> dict[str, Any]:
    config = model.config
    shape = config.in_channels, config.sample_size
    given = _latents(model, samples, seed, *shape, width=config.cross_attention_input_dim)
    states = drawn.normal(model, seed, samples, 1, config.global_states_input_dim)
    angles = drawn.normal(model, 0, config.sample_size + 1, config.attention_head_dim // 2)
    return given | {
        "timestep": drawn.integers(model, seed, STEPS, samples) / STEPS,
        "global_hidden_states": states,
        "rotary_embedding": (angles.cos(), angles.sin()),
    }


def _hunyuan(model: Any, samples: int, seed: int) -> dict[str, Tensor]:
    """Two texts, of CLIP and of T5, and rotary angles for each head."""
    config = model.config
    size, long = config.sample_size, config.text_len_t5
    angles = drawn.normal(model, 0, (size // config.patch_size) ** 2, config.attention_head_dim)
    texts = {
        "encoder_hidden_states": (config.text_len, config.cross_attention_dim),
        "encoder_hidden_states_t5": (long, config.cross_attention_dim_t5),
    }
    masks = {"text_embedding_mask": config.text_len, "text_embedding_mask_t5": long}
    return (
        {
            "hidden_states": drawn.normal(model, seed, samples, config.in_channels, size, size),
            "timestep": drawn.integers(model, seed, STEPS, samples).float(),
        }
        | {name: drawn.normal(model, seed, samples, *shape) for name, shape in texts.items()}
        | {name: drawn.integers(model, 0, 2, samples, n) for name, n in masks.items()}
        | {
            "image_meta_size": drawn.integers(model, seed, 512, samples, 6).float(),
            "style": drawn.integers(model, seed, 1, samples),
            "image_rotary_emb": (angles.cos(), angles.sin()),
        }
    )


def _unet(model: Any, samples: int, seed: int) -> dict[str, Tensor]:
    given = _images(model, samples, seed, model.config.cross_attention_dim)
    return {"sample": given.pop("hidden_states")} | given


def _uvit(model: Any, samples: int, seed: int) -> dict[str, Tensor]:
    """Codes of image tokens, as aMUSEd fills them in."""
    config = model.config
    side = config.sample_size
    return {
        "input_ids": drawn.integers(model, seed, config.codebook_size, samples, side, side),
        "encoder_hidden_states": drawn.normal(
            model, seed, samples, TEXT_LENGTH, config.encoder_hidden_size
        ),
        "pooled_text_emb": drawn.normal(model, seed, samples, config.cond_embed_dim),
        "micro_conds": drawn.normal(model, seed, samples, 5),
    }


def _mochi(model: Any, samples: int, seed: int) -> dict[str, Tensor]:
    config = model.config
    shape = config.in_channels, 2, 8, 8
    return _latents(model, samples, seed, *shape, width=config.text_embed_dim) | {
        "encoder_attention_mask": _mask(model, samples),
    }


def _system(
    name: str,
    architecture: type[Any],
    given: Given,
    *,
    full: dict[str, Any] | None = None,
    **small: Any,
) -> System:
    """An architecture of diffusers, small by some arguments and of its real size by others."""

    def inputs(model: nn.Module, samples: int, seed: int) -> Inputs:
        return Inputs(kwargs=given(model, samples, seed))

    return System(
        name,
        "diffusion",
        f"diffusers `{architecture.__name__}`",
        drawn.weights(partial(architecture, **small)),
        inputs,
        None if full is None else partial(architecture, **full),
        _is_norm,
        _is_refused,
    )


# ruff format would spread each row over two dozen lines.
# fmt: off
HEADS = {"num_attention_heads": 3, "attention_head_dim": 16}

SYSTEMS = (
    _system(
        "SD3", diffusers.SD3Transformer2DModel, _sd3, **HEADS, num_layers=2,
        full={
            "num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536,
            "pos_embed_max_size": 192,
        },
        sample_size=8, in_channels=4, out_channels=4, joint_attention_dim=32,
        caption_projection_dim=48, pooled_projection_dim=64, pos_embed_max_size=8,
    ),
    _system(
        "SD3.5", diffusers.SD3Transformer2DModel, _sd3, **HEADS, num_layers=2,
        sample_size=8, in_channels=4, out_channels=4, joint_attention_dim=32,
        caption_projection_dim=48, pooled_projection_dim=64, pos_embed_max_size=8,
        dual_attention_layers=(0,), qk_norm="rms_norm",
    ),
    _system(
        "Flux", diffusers.FluxTransformer2DModel, _flux, full={}, **HEADS, in_channels=8,
        num_layers=1, num_single_layers=1, joint_attention_dim=32, pooled_projection_dim=32,
        axes_dims_rope=(4, 4, 8),
    ),
    _system(
        "PixArt", diffusers.PixArtTransformer2DModel, _pixart, **HEADS, num_layers=2,
        full={
            "caption_channels": 4096, "sample_size": 64, "use_additional_conditions": False,
        },
        cross_attention_dim=48, caption_channels=32, sample_size=8,
        use_additional_conditions=False,
    ),
    _system("DiT (diffusers)", diffusers.DiTTransformer2DModel, _dit, **HEADS, num_layers=2,
            sample_size=8),
    _system(
        "Sana", diffusers.SanaTransformer2DModel, _pixart, **HEADS, in_channels=4,
        out_channels=4, num_layers=2, num_cross_attention_heads=3, cross_attention_head_dim=16,
        cross_attention_dim=48, caption_channels=32, sample_size=8,
        qk_norm="rms_norm_across_heads",
    ),
    _system(
        "HunyuanDiT", diffusers.HunyuanDiT2DModel, _hunyuan, **HEADS, in_channels=4,
        patch_size=2, sample_size=8, hidden_size=48, num_layers=2, cross_attention_dim=32,
        cross_attention_dim_t5=32, pooled_projection_dim=32, text_len=4, text_len_t5=6,
    ),
    _system(
        "CogVideoX", diffusers.CogVideoXTransformer3DModel, _cogvideo, **HEADS, in_channels=4,
        out_channels=4, time_embed_dim=16, text_embed_dim=32, num_layers=2, sample_width=8,
        sample_height=8, sample_frames=5, max_text_seq_length=6,
    ),
    _system(
        "AuraFlow", diffusers.AuraFlowTransformer2DModel, _aura, **HEADS, sample_size=8,
        num_mmdit_layers=1, num_single_dit_layers=1, joint_attention_dim=32,
        caption_projection_dim=48, pos_embed_max_size=64,
    ),
    replace(_system(
        "CogView4", diffusers.CogView4Transformer2DModel, _cogview, in_channels=4, out_channels=4,
        num_layers=2, num_attention_heads=3, attention_head_dim=16, text_embed_dim=32,
        time_embed_dim=16, condition_dim=8, pos_embed_max_size=8, sample_size=8,
        rope_axes_dim=(8, 8),
    ), idle=frozenset({"transformer_blocks.1.norm2_context"})),  # the last text is dropped
    _system(
        "LTX-Video", diffusers.LTXVideoTransformer3DModel, _ltx, **HEADS, in_channels=8,
        out_channels=8, cross_attention_dim=48, num_layers=2, caption_channels=32,
    ),
    _system(
        "Stable Audio", diffusers.StableAudioDiTModel, _audio, **HEADS, sample_size=16,
        in_channels=4, out_channels=4, num_layers=2, num_key_value_attention_heads=3,
        cross_attention_dim=48, time_proj_dim=16, global_states_input_dim=32,
        cross_attention_input_dim=32,
    ),
    _system(
        "Wan", diffusers.WanTransformer3DModel, _video, **HEADS, in_channels=4, out_channels=4,
        text_dim=32, freq_dim=16, ffn_dim=64, num_layers=2, rope_max_seq_len=32,
    ),
    _system(
        "Mochi", diffusers.MochiTransformer3DModel, _mochi, **HEADS, num_layers=2,
        pooled_projection_dim=32, in_channels=4, text_embed_dim=32, time_embed_dim=16,
    ),
    _system(
        "U-ViT (aMUSEd)", diffusers.UVit2DModel, _uvit, hidden_size=48, cond_embed_dim=16,
        micro_cond_encode_dim=8, micro_cond_embed_dim=40, encoder_hidden_size=32, vocab_size=66,
        codebook_size=64, in_channels=32, block_out_channels=32, num_res_blocks=1,
        block_num_heads=2, num_hidden_layers=2, num_attention_heads=3, intermediate_size=64,
        sample_size=4,
    ),
    _system(
        "SD U-Net", diffusers.UNet2DConditionModel, _unet, sample_size=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), block_out_channels=(16, 32),
        layers_per_block=1, norm_num_groups=4, cross_attention_dim=32, attention_head_dim=2,
    ),
)
# fmt: on
