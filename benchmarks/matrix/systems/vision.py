"""Vision: transformers and hybrids of timm and transformers, by how they place their norms."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import timm
import transformers
from timm import models
from timm.layers import GatedMlp
from torch import nn
from transformers import PretrainedConfig

from .. import drawn
from ..system import Inputs, System, is_norm, is_refused

__all__ = ["SYSTEMS"]

CLASSES = 10


def _is_norm(module: nn.Module) -> bool:
    """timm's RMS norm over the channels of an image is one too."""
    return is_norm(module) or type(module).__name__ in ("RmsNorm2d", "RmsNormFp32")


def _is_refused(module: nn.Module) -> bool:
    """GRN runs over space; timm's SimpleNorm scales x by an unbiased deviation."""
    grn = "GlobalResponseNorm", "ConvNextV2GRN"
    simple = "SimpleNorm", "SimpleNorm2d"
    return is_refused(module) or type(module).__name__ in (*grn, *simple)


def _images(model: nn.Module, samples: int, seed: int) -> Inputs:
    """Images of the size that the model is made for."""
    size = _size(model)
    return Inputs((drawn.normal(model, seed, samples, 3, size, size),))


def _sized(size: int) -> Callable[[nn.Module, int, int], Inputs]:
    """Images of one size, for a model that does not tell its own."""

    def images(model: nn.Module, samples: int, seed: int) -> Inputs:
        return Inputs((drawn.normal(model, seed, samples, 3, size, size),))

    return images


def _images_and_text(model: Any, samples: int, seed: int) -> Inputs:
    """As many images as texts, each text as long as the text tower takes them."""
    text, vision = model.config.text_config, model.config.vision_config
    length = text.max_position_embeddings
    tokens = drawn.integers(model, seed, text.vocab_size - 1, samples, length)
    images = drawn.normal(model, seed, samples, 3, vision.image_size, vision.image_size)
    return Inputs(kwargs={"input_ids": tokens, "pixel_values": images})


def _images_and_points(model: Any, samples: int, seed: int) -> Inputs:
    """An image and one point in it, as SAM is prompted."""
    size = model.config.vision_config.image_size
    images = drawn.normal(model, seed, samples, 3, size, size)
    points = drawn.integers(model, seed, size, samples, 1, 1, 2).float()
    return Inputs(kwargs={"pixel_values": images, "input_points": points})


def _pixels_as_tokens(model: Any, samples: int, seed: int) -> Inputs:
    return Inputs((drawn.integers(model, seed, model.config.vocab_size - 1, samples, 12),))


def _clip(model: Any, samples: int, seed: int) -> Inputs:
    return Inputs((drawn.normal(model, seed, samples, 4, 3, 32, 32),))


def _size(model: Any) -> int:
    for holder in (model, *(getattr(model, name, None) for name in ("patch_embed", "config"))):
        for name in ("img_size", "image_size"):
            size = getattr(holder, name, None)
            if size is not None:
                return int(size if isinstance(size, int) else size[0])
    return 64


def _timm(
    name: str,
    architecture: str | type[nn.Module],
    *,
    full: bool = False,
    size: int | None = None,
    **small: Any,
) -> System:
    """An architecture of timm, or a class of it where its registered names fix the widths."""
    named = isinstance(architecture, str)
    make = partial(timm.create_model, architecture) if named else architecture
    return System(
        name,
        "vision",
        f"timm `{architecture if named else architecture.__name__}`",
        drawn.weights(partial(make, **{"num_classes": CLASSES} | small)),
        _images if size is None else _sized(size),
        make if full else None,
        _is_norm,
        _is_refused,
    )


def _transformers(
    name: str,
    architecture: type[Any],
    small: PretrainedConfig,
    full: PretrainedConfig | None = None,
    *,
    inputs: Callable[[nn.Module, int, int], Inputs] = _images,
    idle: frozenset[str] = frozenset(),
) -> System:
    """An architecture of transformers at the size of a configuration."""
    return System(
        name,
        "vision",
        f"transformers `{architecture.__name__}`",
        drawn.weights(partial(architecture, small)),
        inputs,
        None if full is None else partial(architecture, full),
        _is_norm,
        _is_refused,
        idle,
    )


# ruff format would spread each row over a dozen lines.
# fmt: off
PLAIN = {"embed_dim": 48, "depth": 2, "num_heads": 3}
WINDOWS = {
    "img_size": 64, "embed_dim": 16, "depths": (2, 2), "num_heads": (2, 4), "window_size": 4,
}
PYRAMID = {"depths": (1, 1, 1, 1), "embed_dims": (16, 32, 48, 64)}
CONVOLUTIONS = {"depths": (1, 1, 2, 1), "dims": (16, 32, 48, 64)}

TIMM = (
    _timm("Swin", "swin_base_patch4_window7_224", full=True, **WINDOWS),
    _timm("Swin v2", "swinv2_base_window8_256", full=True, **WINDOWS),
    _timm("Swin v2-CR", "swinv2_cr_small_ns_224", **WINDOWS),
    _timm("DeiT-3", "deit3_base_patch16_224", full=True, img_size=64, **PLAIN),
    _timm("BEiT", "beit_base_patch16_224", full=True, img_size=64, **PLAIN),
    _timm("EVA-02", "eva02_base_patch14_224", full=True, img_size=56, **PLAIN),
    _timm("EVA giant", "eva_giant_patch14_224", img_size=56, **PLAIN),
    _timm("DINOv2", "vit_base_patch14_dinov2", img_size=56, **PLAIN),
    _timm("DINOv3", "vit_base_patch16_dinov3", img_size=64, **PLAIN),
    _timm("FlexiViT", "flexivit_base", img_size=64, **PLAIN),
    _timm("ViT, parallel blocks", "vit_base_patch16_xp_224", img_size=64, **PLAIN),
    _timm("ViT, RMSNorm", "test_vit4", img_size=64, **PLAIN),
    _timm("ViT, SimpleNorm", "vit_base_patch16_224",
          img_size=64, norm_layer="simplenorm", **PLAIN),
    _timm("ViT, relative positions", "vit_relpos_base_patch16_224", img_size=64, **PLAIN),
    _timm("NaFlexViT", "naflexvit_base_patch16_gap", img_size=64, **PLAIN),
    _timm("AIMv2", "aimv2_large_patch14_224", img_size=56, **PLAIN),
    _timm("CaiT", "cait_xxs24_224", img_size=64, **PLAIN),
    _timm("XCiT", "xcit_nano_12_p16_224", img_size=64, **PLAIN),
    _timm("ConViT", "convit_tiny", img_size=64, **PLAIN),
    _timm("TNT", "tnt_s_patch16_224", img_size=64, inner_dim=16, num_heads_outer=3,
          num_heads_inner=2, embed_dim=48, depth=2),
    _timm("MLP-Mixer", models.mlp_mixer.MlpMixer, img_size=64, embed_dim=48, num_blocks=2),
    _timm("gMLP", models.mlp_mixer.MlpMixer, img_size=64, embed_dim=48, num_blocks=2,
          block_layer=models.mlp_mixer.SpatialGatingBlock, mlp_ratio=6, mlp_layer=GatedMlp),
    _timm("Sequencer", "sequencer2d_s", img_size=56, layers=(1, 1), patch_sizes=(7, 2),
          embed_dims=(16, 32), hidden_sizes=(8, 8), mlp_ratios=(3.0, 3.0)),
    _timm("Hiera", "hiera_base_224", size=224, embed_dim=16, stages=(1, 1, 2, 1)),
    _timm("MViTv2", "mvitv2_tiny", size=224),
    _timm("CoAtNet", "test_coatnet", img_size=64),
    _timm("MaxViT", "test_maxvit", img_size=64),
    _timm("PVTv2", "pvt_v2_b0", num_heads=(1, 2, 3, 4), **PYRAMID),
    _timm("Twins-SVT", "twins_svt_small", img_size=64, num_heads=(1, 2, 3, 4), **PYRAMID),
    _timm("DaViT", "davit_tiny", num_heads=(1, 2, 3, 4), **PYRAMID),
    _timm("GC ViT", models.gcvit.GlobalContextVit, img_size=64, embed_dim=16, depths=(1, 1, 1, 1),
          num_heads=(1, 1, 2, 2)),
    _timm("FocalNet", models.focalnet.FocalNet, embed_dim=16, depths=(1, 1, 1, 1),
          use_post_norm=True, use_post_norm_in_modulation=True),
    _timm("NesT", models.nest.Nest, img_size=64, embed_dims=(16, 32, 48), num_heads=(1, 2, 3),
          depths=(1, 1, 1)),
    _timm("CrossViT", "crossvit_9_240", size=240, embed_dim=(24, 48), depth=((1, 1, 0),),
          num_heads=(2, 2), mlp_ratio=(2.0, 2.0, 1.0)),
    _timm("CoaT", "coat_lite_tiny", img_size=64, embed_dims=(16, 32, 48, 64),
          serial_depths=(1, 1, 1, 1), num_heads=8),
    _timm("VOLO", models.volo.VOLO, size=64, img_size=64, layers=(1, 1, 1, 1),
          embed_dims=(24, 48, 48, 48), num_heads=(2, 3, 3, 3)),
    _timm("LeViT", "levit_128", img_size=64, embed_dim=(16, 32, 48), num_heads=(2, 2, 2),
          depth=(1, 1, 1), key_dim=8),
    _timm("EfficientFormer", "efficientformer_l1", depths=(1, 1, 1, 2),
          embed_dims=(16, 32, 48, 64), num_vit=1, size=224),
    _timm("PoolFormer", models.metaformer.MetaFormer, **CONVOLUTIONS),
    _timm("CAFormer", models.metaformer.MetaFormer,
          token_mixers=[models.metaformer.SepConv] * 2 + [models.metaformer.Attention] * 2,
          norm_layers=[models.metaformer.LayerNorm2dNoBias] * 2
          + [models.metaformer.LayerNormNoBias] * 2,
          depths=(1, 1, 2, 1), dims=(16, 32, 64, 64)),
    _timm("ConvNeXt v2", "convnextv2_base", full=True, **CONVOLUTIONS),
    _timm("ConvNeXt, RMSNorm2d", "convnext_atto_rms", **CONVOLUTIONS),
    _timm("ConvNeXt, SimpleNorm", "convnext_zepto_rms", norm_layer="simplenorm", **CONVOLUTIONS),
    _timm("EdgeNeXt", "edgenext_xx_small", depths=(1, 1, 2, 1), dims=(16, 32, 48, 64),
          heads=(2, 2, 4, 4)),
    _timm("MambaOut", "mambaout_femto", depths=(1, 1, 1, 1), dims=(16, 32, 48, 64)),
    _timm("Gemma-4 vision", "gemma4_vit_167m", img_size=96, **PLAIN),
    _timm("DeepSeek vision", "deepseek_vit_412m", size=84, img_size=84, **PLAIN),
    _timm("Qwen-3 vision", "qwen3_vit_88m", img_size=64, **PLAIN),
)

WIDE = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3}
NARROW = WIDE | {"intermediate_size": 96}
SMALL_IMAGE = NARROW | {"image_size": 32, "patch_size": 8}
TEXT = NARROW | {
    "vocab_size": 99, "max_position_embeddings": 16, "bos_token_id": 97, "eos_token_id": 98,
}
SHALLOW_RESNET = transformers.ResNetConfig(
    embedding_size=16, hidden_sizes=[16, 32], depths=[1, 1], out_features=["stage2"],
)
SAM_SMALL = {
    "vision_config": {
        "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3, "mlp_dim": 96,
        "image_size": 64, "patch_size": 8, "window_size": 4, "global_attn_indexes": [1],
        "output_channels": 32, "num_pos_feats": 16,
    },
    "prompt_encoder_config": {"hidden_size": 32, "image_size": 64, "patch_size": 8},
    "mask_decoder_config": {
        "hidden_size": 32, "mlp_dim": 64, "num_attention_heads": 2, "iou_head_hidden_dim": 32,
    },
}

TRANSFORMERS = (
    _transformers(
        "SigLIP", transformers.SiglipModel,
        transformers.SiglipConfig(text_config=TEXT, vision_config=SMALL_IMAGE),
        transformers.SiglipConfig(text_config={"bos_token_id": 1, "eos_token_id": 1}),
        inputs=_images_and_text,
    ),
    _transformers(
        "CLIP", transformers.CLIPModel,
        transformers.CLIPConfig(
            text_config=TEXT,
            vision_config=SMALL_IMAGE, projection_dim=32,
        ),
        transformers.CLIPConfig(), inputs=_images_and_text,
    ),
    _transformers(
        "SAM", transformers.SamModel, transformers.SamConfig(**SAM_SMALL),
        transformers.SamConfig(), inputs=_images_and_points,
    ),
    _transformers(
        "SAM, vision", transformers.SamVisionModel,
        transformers.SamVisionConfig(**SAM_SMALL["vision_config"]),
    ),
    _transformers(
        "SAM 2, vision", transformers.Sam2VisionModel,
        transformers.Sam2VisionConfig(
            backbone_config=transformers.Sam2HieraDetConfig(
                hidden_size=16, image_size=[64, 64], blocks_per_stage=[1, 2, 2, 1],
                embed_dim_per_stage=[16, 32, 48, 64], num_attention_heads_per_stage=[1, 2, 3, 4],
                global_attention_blocks=[2], window_size_per_stage=[4, 2, 2, 2],
            ),
            backbone_channel_list=[64, 48, 32, 16], fpn_hidden_size=32,
            backbone_feature_sizes=[[16, 16], [8, 8], [4, 4]],
        ),
        inputs=_sized(64),
    ),
    _transformers(
        "SegFormer", transformers.SegformerForSemanticSegmentation,
        transformers.SegformerConfig(
            depths=[1, 1, 1, 1], hidden_sizes=[16, 32, 48, 64], num_attention_heads=[1, 2, 3, 4],
            decoder_hidden_size=32,
        ),
        inputs=_sized(64),
    ),
    # Before its first cross attention the decoder has seen its queries alone, which are learned.
    _transformers(
        "DETR", transformers.DetrForObjectDetection,
        transformers.DetrConfig(
            backbone_config=SHALLOW_RESNET, d_model=48, encoder_layers=1, decoder_layers=2,
            encoder_attention_heads=3, decoder_attention_heads=3, encoder_ffn_dim=64,
            decoder_ffn_dim=64, num_queries=5, init_std=0.3,
        ),
        inputs=_sized(64),
        idle=frozenset({"model.decoder.layers.0.self_attn_layer_norm"}),
    ),
    # The pyramid takes the stages, not the backbone's output; queries are learned.
    _transformers(
        "Mask2Former", transformers.Mask2FormerModel,
        transformers.Mask2FormerConfig(
            backbone_config=transformers.SwinConfig(
                image_size=64, embed_dim=16, depths=[1, 1, 1, 1], num_heads=[1, 2, 4, 8],
                window_size=4, out_features=["stage1", "stage2", "stage3", "stage4"],
            ),
            feature_size=32, mask_feature_size=32, hidden_dim=32, encoder_feedforward_dim=64,
            encoder_layers=1, decoder_layers=2, num_attention_heads=2, dim_feedforward=64,
            num_queries=5,
        ),
        inputs=_sized(64),
        idle=frozenset({
            "pixel_level_module.encoder.swin.layernorm", "transformer_module.decoder.layernorm",
        }),
    ),
    # Of the latents, which are learned.
    _transformers(
        "Perceiver", transformers.PerceiverModel,
        transformers.PerceiverConfig(
            num_latents=6, d_latents=48, d_model=20, num_blocks=1, num_self_attends_per_block=2,
            num_self_attention_heads=3, num_cross_attention_heads=2,
        ),
        inputs=lambda model, samples, seed: Inputs((drawn.normal(model, seed, samples, 9, 20),)),
        idle=frozenset({"encoder.cross_attention.attention.self.layernorm1"}),
    ),
    _transformers(
        "ViTDet", transformers.VitDetModel,
        transformers.VitDetConfig(
            hidden_size=48, num_hidden_layers=2, num_attention_heads=3, image_size=64,
            patch_size=8, pretrain_image_size=64, window_size=4, window_block_indices=[0],
            residual_block_indices=[0, 1], use_relative_position_embeddings=True,
        ),
    ),
    _transformers(
        "ImageGPT", transformers.ImageGPTModel,
        transformers.ImageGPTConfig(
            n_embd=48, n_layer=2, n_head=3, n_positions=64, vocab_size=65, use_cache=False,
        ),
        inputs=_pixels_as_tokens,
    ),
    _transformers(
        "InternViT", transformers.InternVLVisionModel,
        transformers.InternVLVisionConfig(
            norm_type="rms_norm", use_qk_norm=True, **NARROW, image_size=[32, 32],
            patch_size=[8, 8],
        ),
    ),
    _transformers(
        "Pixtral, vision", transformers.PixtralVisionModel,
        transformers.PixtralVisionConfig(**SMALL_IMAGE | {"num_attention_heads": 4}),
        inputs=_sized(32),
    ),
    _transformers(
        "Swin2SR", transformers.Swin2SRModel,
        transformers.Swin2SRConfig(
            image_size=16, embed_dim=24, depths=[2, 2], num_heads=[2, 2], window_size=4,
        ),
        inputs=_sized(16),
    ),
    _transformers(
        "CvT", transformers.CvtModel,
        transformers.CvtConfig(embed_dim=[16, 32, 48], num_heads=[1, 2, 3], depth=[1, 2, 3]),
        inputs=_sized(64),
    ),
    _transformers(
        "VideoMAE", transformers.VideoMAEModel,
        transformers.VideoMAEConfig(**SMALL_IMAGE, num_frames=4), inputs=_clip,
    ),
    _transformers(
        "TimeSformer", transformers.TimesformerModel,
        transformers.TimesformerConfig(**SMALL_IMAGE, num_frames=4), inputs=_clip,
    ),
    _transformers(
        "MobileViT", transformers.MobileViTModel,
        transformers.MobileViTConfig(
            hidden_sizes=[16, 24, 32], neck_hidden_sizes=[8, 8, 16, 16, 24, 32, 48],
            num_attention_heads=2, image_size=64,
        ),
    ),
    _transformers(
        "GroupViT, vision", transformers.GroupViTVisionModel,
        transformers.GroupViTVisionConfig(
            hidden_size=48, intermediate_size=64, depths=[1, 1, 1], num_hidden_layers=3,
            num_attention_heads=3,
            image_size=32, patch_size=8, num_group_tokens=[6, 3, 0], num_output_groups=[6, 3, 0],
        ),
    ),
    # Depth is made of the stages, not of the backbone's output.
    _transformers(
        "DPT", transformers.DPTForDepthEstimation,
        transformers.DPTConfig(
            **SMALL_IMAGE | {"num_hidden_layers": 4}, backbone_out_indices=[0, 1, 2, 3],
            neck_hidden_sizes=[8, 8, 16, 16], fusion_hidden_size=16, is_hybrid=False,
        ),
        idle=frozenset({"dpt.layernorm"}),
    ),
)
# fmt: on

SYSTEMS = TIMM + TRANSFORMERS
