"""What is drawn at random for a system: its weights, and the tensors of its inputs."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

__all__ = ["integers", "normal", "weights"]


def weights(build: Callable[[], nn.Module], noise: float = 0.02) -> Callable[[], nn.Module]:
    """The module with the same random weights each time, in evaluation mode.

    Noise on top, so that no gamma is 1, no beta and no gate is 0: exporters drop neutral ones.
    """

    def built() -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            module = build()
            with torch.no_grad():
                for parameter in module.parameters():
                    parameter.add_(torch.randn_like(parameter), alpha=noise)
        return module.eval().requires_grad_(False)

    return built


def normal(model: nn.Module, seed: int, *shape: int) -> Tensor:
    """Standard normal values where the model is, the meta device too."""
    values = torch.randn(shape, generator=torch.Generator("cpu").manual_seed(seed), device="cpu")
    return values.to(_device(model))


def integers(model: nn.Module, seed: int, high: int, *shape: int) -> Tensor:
    """Whole numbers below `high` where the model is."""
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randint(high, shape, generator=generator, device="cpu").to(_device(model))


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device
