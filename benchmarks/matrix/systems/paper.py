"""The systems of "Transformers without Normalization" (arXiv 2503.10622), at the paper's sizes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import timm
import torch
from diffusers import DiTTransformer2DModel
from torch import nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    ViTConfig,
    ViTMAEConfig,
    ViTMAEForPreTraining,
    ViTModel,
    Wav2Vec2Config,
    Wav2Vec2Model,
)

from ..caduceus import Caduceus
from ..hyena import HyenaDNA
from ..norm_free import STYLES, VisionTransformer
from ..system import Inputs, System

__all__ = ["SYSTEMS"]

VISION = "Paper: vision"
DIFFUSION = "Paper: diffusion"
LANGUAGE = "Paper: language"
SPEECH = "Paper: speech"
DNA = "Paper: DNA"
REFUSED = "Paper: BatchNorm, which cannot be replaced"
NORM_FREE = "Paper: without norms"


def _random(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _images(small: int, full: int = 224) -> Callable[[nn.Module, int, int], Inputs]:
    """Square images, [samples, 3, side, side]; small or full by where the model lies."""

    def inputs(model: nn.Module, samples: int, seed: int) -> Inputs:
        side = full if next(model.parameters()).is_meta else small
        return Inputs((torch.randn(samples, 3, side, side, generator=_random(seed)),))

    return inputs


def _timm(
    name: str, architecture: str, small: Mapping[str, Any], *, group: str = VISION, side: int = 32
) -> System:
    return System(
        name,
        group,
        f"timm {architecture}",
        partial(timm.create_model, architecture, **small),
        _images(side),
        partial(timm.create_model, architecture),
    )


TINY_VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 4}
TINY_CONVNEXT = {"depths": (1, 1, 2, 1), "dims": (16, 24, 32, 48)}


def _vit_sizes(width: int, layers: int, heads: int) -> dict[str, int]:
    """A ViT of transformers: its MLP is four times as wide."""
    return {
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": 4 * width,
    }


SMALL_VIT = {**_vit_sizes(48, 2, 4), "image_size": 32, "patch_size": 8}


def _mae(name: str, **full: int) -> System:
    decoder = {
        "decoder_hidden_size": 32,
        "decoder_num_hidden_layers": 2,
        "decoder_num_attention_heads": 4,
        "decoder_intermediate_size": 64,
    }

    def make(**sizes: int) -> nn.Module:
        return ViTMAEForPreTraining(ViTMAEConfig(**sizes))

    def inputs(model: Any, samples: int, seed: int) -> Inputs:
        # The noise that chooses the masked patches is an input, or each pass chooses others.
        config, random = model.config, _random(seed)
        side, patches = config.image_size, (config.image_size // config.patch_size) ** 2
        images = torch.randn(samples, 3, side, side, generator=random)
        return Inputs((images,), {"noise": torch.rand(samples, patches, generator=random)})

    small = partial(make, **SMALL_VIT, **decoder)
    source = "transformers ViTMAEForPreTraining"
    return System(name, VISION, source, small, inputs, partial(make, **full))


def _dino(name: str, patch: int) -> System:
    def make(**sizes: int) -> nn.Module:
        return ViTModel(ViTConfig(**sizes), add_pooling_layer=False)

    small = partial(make, **{**SMALL_VIT, "patch_size": patch // 2})
    full = partial(make, patch_size=patch)
    return System(name, VISION, "transformers ViTModel", small, _images(32), full)


def _dit(name: str, layers: int, heads: int, head_width: int) -> System:
    def make(layers: int, heads: int, head_width: int, side: int) -> nn.Module:
        return DiTTransformer2DModel(
            num_layers=layers,
            num_attention_heads=heads,
            attention_head_dim=head_width,
            sample_size=side,
            out_channels=8,
            num_embeds_ada_norm=1000,
        )

    def inputs(model: Any, samples: int, seed: int) -> Inputs:
        side, random = model.config.sample_size, _random(seed)
        latents = torch.randn(samples, 4, side, side, generator=random)
        times, classes = torch.randint(1000, (2, samples), generator=random)
        return Inputs((latents,), {"timestep": times, "class_labels": classes})

    source = "diffusers DiTTransformer2DModel"
    small, full = partial(make, 2, 4, 12, 8), partial(make, layers, heads, head_width, 32)
    return System(name, DIFFUSION, source, small, inputs, full)


def _llama(name: str, width: int, layers: int, inner: int, heads: int, kv_heads: int) -> System:
    def make(width: int, layers: int, inner: int, heads: int, kv_heads: int) -> nn.Module:
        config = LlamaConfig(
            hidden_size=width,
            num_hidden_layers=layers,
            intermediate_size=inner,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            use_cache=False,
        )
        return LlamaForCausalLM(config)

    small = partial(make, 48, 2, 96, 4, 4 if kv_heads == heads else 2)
    full = partial(make, width, layers, inner, heads, kv_heads)
    return System(name, LANGUAGE, "transformers LlamaForCausalLM", small, _tokens(1000, 8), full)


def _tokens(vocabulary: int, length: int) -> Callable[[nn.Module, int, int], Inputs]:
    def inputs(_: nn.Module, samples: int, seed: int) -> Inputs:
        return Inputs((torch.randint(vocabulary, (samples, length), generator=_random(seed)),))

    return inputs


def _wav2vec(name: str, *, grouped: bool, **full: int) -> System:
    """grouped: a GroupNorm in the first convolution and post-norm layers; else LayerNorms."""
    layout = {
        "feat_extract_norm": "group" if grouped else "layer",
        "do_stable_layer_norm": not grouped,
        "conv_bias": not grouped,
    }
    small = {
        **_vit_sizes(48, 2, 4),
        "conv_dim": (32, 32, 32),
        "conv_kernel": (10, 3, 3),
        "conv_stride": (5, 2, 2),
        "num_conv_pos_embeddings": 8,
        "num_conv_pos_embedding_groups": 2,
    }

    def make(**sizes: Any) -> nn.Module:
        return Wav2Vec2Model(Wav2Vec2Config(**layout, **sizes))

    def inputs(model: nn.Module, samples: int, seed: int) -> Inputs:
        length = 16000 if next(model.parameters()).is_meta else 800
        return Inputs((torch.randn(samples, length, generator=_random(seed)),))

    source = "transformers Wav2Vec2Model"
    return System(name, SPEECH, source, partial(make, **small), inputs, partial(make, **full))


def _hyena() -> System:
    """Large, for sequences of a million: matched on a short one, its filter is as long."""
    small = partial(HyenaDNA, 32, 2, 64, direct=True)
    full = partial(HyenaDNA, 256, 8, 1_000_002)
    source = "benchmarks/matrix/hyena.py after HazyResearch/hyena-dna"
    return System("HyenaDNA", DNA, source, small, _tokens(16, 32), full)


def _caduceus() -> System:
    complement = (0, 1, 2, 3, 4, 5, 6, 10, 9, 8, 7, 11)  # of A C G T, after seven special tokens
    small = partial(Caduceus, 32, 2, complement)
    full = partial(Caduceus, 256, 16, complement)
    source = "benchmarks/matrix/caduceus.py after kuleshov-group/caduceus"
    return System("Caduceus", DNA, source, small, _tokens(12, 8), full)


def _norm_free(name: str) -> System:
    tiny = {"width": 48, "layers": 2, "heads": 4, "image": 32, "patch": 8}
    make: Callable[..., nn.Module] = partial(VisionTransformer, STYLES[name])
    source = "benchmarks/matrix/norm_free.py, a ViT-B"
    return System(name, NORM_FREE, source, partial(make, **tiny), _images(32), make)


SYSTEMS = (
    _timm("ViT-B", "vit_base_patch16_224", TINY_VIT),
    _timm("ViT-L", "vit_large_patch16_224", TINY_VIT),
    _timm("ConvNeXt-B", "convnext_base", TINY_CONVNEXT, side=64),
    _timm("ConvNeXt-L", "convnext_large", TINY_CONVNEXT, side=64),
    _mae("MAE ViT-B", **_vit_sizes(768, 12, 12)),
    _mae("MAE ViT-L", **_vit_sizes(1024, 24, 16)),
    _dino("DINO ViT-B/16", 16),
    _dino("DINO ViT-B/8", 8),
    _dit("DiT-B", 12, 12, 64),
    _dit("DiT-L", 24, 16, 64),
    _dit("DiT-XL", 28, 16, 72),
    _llama("LLaMA 7B", 4096, 32, 11008, 32, 32),
    _llama("LLaMA 13B", 5120, 40, 13824, 40, 40),
    _llama("LLaMA 34B", 8192, 48, 22016, 64, 8),
    _llama("LLaMA 70B", 8192, 80, 28672, 64, 8),
    _wav2vec("wav2vec 2.0 Base", grouped=True, **_vit_sizes(768, 12, 12)),
    _wav2vec("wav2vec 2.0 Large", grouped=False, **_vit_sizes(1024, 24, 16)),
    _hyena(),
    _caduceus(),
    _timm("ResNet-50", "resnet50", {"channels": (8, 12, 16, 24)}, group=REFUSED, side=64),
    _timm("VGG19", "vgg19_bn", {"mlp_ratio": 1 / 512}, group=REFUSED, side=224),
    *map(_norm_free, STYLES),
)
