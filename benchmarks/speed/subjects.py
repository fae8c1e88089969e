"""What is timed: three models, and one site at two widths in two dtypes; all of random weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from ..matrix.drawn import weights
from .forms import MODEL_FORMS, SITE_FORMS, Form, Model, Site, normal

__all__ = ["SUBJECTS", "Subject", "bert_base", "llama_1b", "model", "site"]


@dataclass(frozen=True)
class Subject:
    """The forms of one thing, the one first that the others are compared with.

    together: all of them take turns (small ones); else each with the first alone, so that no more
    than two sets of weights are held.
    """

    title: str
    forms: Mapping[str, Form]
    together: bool = False

    @property
    def base(self) -> str:
        """What the others are compared with."""
        return next(iter(self.forms))

    def rounds(self) -> dict[str, tuple[str, ...]]:
        """The forms that take turns with each other, by a name."""
        base, *others = self.forms
        return {"all": (base, *others)} if self.together else {f: (base, f) for f in others}


def model(title: str, of: Model) -> Subject:
    """A model in every form."""
    return Subject(title, {name: partial(form, of) for name, form in MODEL_FORMS.items()})


def site(width: int, dtype: torch.dtype) -> Subject:
    """One site with every operator."""
    of = Site(ROWS, width, dtype)
    title = f"One site, {ROWS} × {width}, {str(dtype).removeprefix('torch.')}"
    forms = {name: partial(form, of) for name, form in SITE_FORMS.items()}
    return Subject(title, forms, together=True)


ROWS = 4096
"""Tokens at a site."""


class Hidden(nn.Module):
    """A model of transformers, to its last hidden state alone."""

    def __init__(self, inner: nn.Module, takes: str) -> None:
        super().__init__()
        self.inner = inner
        self._takes = takes

    def forward(self, x: Tensor) -> Tensor:
        hidden: Tensor = self.inner(**{self._takes: x}).last_hidden_state
        return hidden


def vit_base() -> nn.Module:
    import timm

    made: nn.Module = timm.create_model("vit_base_patch16_224", pretrained=False)
    return made


def bert_base(**changed: int) -> nn.Module:
    """BERT-base without its pooler; changed: sizes, for tests."""
    from transformers import BertConfig, BertModel

    return Hidden(BertModel(BertConfig(**changed), add_pooling_layer=False), "input_ids")


LLAMA_1B = {
    "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 4,
    "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 2,
}  # fmt: skip
"""Llama 3.2 1B, but four of its sixteen blocks, and embeddings go in."""


def llama_1b(**changed: int) -> nn.Module:
    """Four blocks and the last norm; changed: sizes, for tests."""
    from transformers import LlamaConfig, LlamaModel

    config = LlamaConfig(**LLAMA_1B | changed, use_cache=False)
    return Hidden(LlamaModel(config), "inputs_embeds")


def _normal(*shape: int) -> Callable[[int], tuple[Tensor, ...]]:
    return lambda seed: (normal(*shape, seed=seed),)


def _tokens(seed: int) -> tuple[Tensor]:
    return (torch.randint(30522, (1, 128), generator=torch.Generator().manual_seed(seed)),)


SUBJECTS = {
    "vit-b": model("ViT-B/16, one image", Model(weights(vit_base), _normal(1, 3, 224, 224))),
    "bert-base": model("BERT-base, 128 tokens", Model(weights(bert_base), _tokens)),
    "llama": model(
        "Four blocks of Llama 3.2 1B, 64 tokens", Model(weights(llama_1b), _normal(1, 64, 2048))
    ),
    "site-768-fp32": site(768, torch.float32),
    "site-768-bf16": site(768, torch.bfloat16),
    "site-4096-fp32": site(4096, torch.float32),
    "site-4096-bf16": site(4096, torch.bfloat16),
}
