"""Architectures of transformers, built from their configurations with random weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import transformers
from torch import nn

from .system import Inputs, System, is_norm, is_refused

__all__ = ["built", "square_mask", "system", "token_inputs", "tokens"]

SPREAD = 0.1
"""Of gammas and betas around their initial value: exporters fold away the ones and zeros of a
fresh norm, which no trained model has."""


def built(architecture: str, settings: dict[str, Any]) -> nn.Module:
    """A model of the class `architecture` in evaluation mode, the same one at each call."""
    model_class = getattr(transformers, architecture)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        model = model_class(model_class.config_class(**settings)).eval()
        for module in model.modules():
            if "Norm" in type(module).__name__:
                for parameter in module.parameters(recurse=False):
                    parameter.add_(torch.randn_like(parameter), alpha=SPREAD)
    return model.to(torch.get_default_device())  # torch.Tensor(n) does not heed it: HuBERT's mask


def system(
    name: str,
    group: str,
    architecture: str,
    small: dict[str, Any],
    full: dict[str, Any] | None = None,
    *,
    inputs: Callable[[nn.Module, int, int], Inputs],
    norms: Callable[[nn.Module], bool] = is_norm,
    refused: Callable[[nn.Module], bool] = is_refused,
) -> System:
    """An architecture of transformers at the sizes of two configurations."""
    return System(
        name=name,
        group=group,
        source=f"transformers.{architecture}",
        small=partial(built, architecture, small),
        inputs=inputs,
        full=None if full is None else partial(built, architecture, full),
        is_norm=norms,
        is_refused=refused,
    )


def tokens(model: nn.Module, samples: int, seed: int, length: int) -> torch.Tensor:
    """Random token ids above the special ones; a meta tensor for a model on the meta device."""
    generator = torch.Generator().manual_seed(seed)
    size = model.config.get_text_config().vocab_size
    ids = torch.randint(3, size, (samples, length), generator=generator, device="cpu")
    return ids.to(model.device)


def token_inputs(
    model: nn.Module,
    samples: int,
    seed: int,
    names: Sequence[str] = ("input_ids",),
    length: int = 6,
    square: bool = True,
) -> Inputs:
    """Random tokens under each of the given names, and the mask that a tokenizer gives beside them.

    Without the mask a decoder looks for packed sequences, in operators that the exporters lack. A
    meta tensor has no values, so that a model cannot ask whether it masks anything: there the masks
    are the square ones that most models take as they are, or none.
    """
    kwargs = {
        name: tokens(model, samples, seed + place, length) for place, name in enumerate(names)
    }
    if model.device.type != "meta":
        kwargs["attention_mask"] = torch.ones(samples, length, dtype=torch.int64)
    elif square:
        masks = [name.replace("input_ids", "attention_mask") for name in names]
        kwargs |= dict.fromkeys(masks, square_mask(samples, length))
    return Inputs(kwargs=kwargs)


def square_mask(samples: int, length: int) -> torch.Tensor:
    """A mask on the meta device that a model takes as it is: a row of keys for each query."""
    return torch.ones(samples, 1, length, length, dtype=torch.bool, device="meta")
