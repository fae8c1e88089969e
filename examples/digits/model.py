"""A small pre-norm vision transformer for scikit-learn's handwritten digits.

Convert it with
`dyt-compile convert examples/digits/model.py:load --data examples/digits/model.py:calibration`.
"""

from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_model
from sklearn.datasets import load_digits
from torch import Tensor, nn

WEIGHTS = Path(__file__).with_name("vit.safetensors")
TRAINING_IMAGES = 1297
BATCH_SIZE = 64


class Attention(nn.Module):
    """Multi-head self-attention on tokens of shape (batch, tokens, width)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.projection = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(query, key, value)
        output: Tensor = self.projection(attended.transpose(1, 2).flatten(2))
        return output


class Block(nn.Module):
    """Pre-norm attention and MLP, each with its residual."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attention = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = nn.Sequential(
            nn.Linear(width, 3 * width), nn.GELU(), nn.Linear(3 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        output: Tensor = x + self.mlp(self.norm2(x))
        return output


class DigitsViT(nn.Module):
    """Logits of shape (batch, 10) for images of shape (batch, 8, 8) in [0, 1]."""

    def __init__(self, width: int = 64, depth: int = 4, heads: int = 4) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, width, kernel_size=2, stride=2)
        self.class_token = nn.Parameter(torch.zeros(1, 1, width))
        self.positions = nn.Parameter(0.02 * torch.randn(1, 17, width))
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.head = nn.Linear(width, 10)

    def forward(self, images: Tensor) -> Tensor:
        patches = self.patches(images.unsqueeze(1)).flatten(2).transpose(1, 2)
        class_token = self.class_token.expand(images.shape[0], -1, -1)
        tokens = torch.cat([class_token, patches], dim=1) + self.positions
        logits: Tensor = self.head(self.norm(self.blocks(tokens)).mean(dim=1))
        return logits


def images(seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training images and labels, then test images and labels; a seed gives the split."""
    digits = load_digits()
    order = torch.randperm(len(digits.target), generator=torch.Generator().manual_seed(7 + seed))
    pixels = torch.tensor(digits.images / 16, dtype=torch.float32)[order]
    labels = torch.tensor(digits.target)[order]
    return (
        pixels[:TRAINING_IMAGES],
        labels[:TRAINING_IMAGES],
        pixels[TRAINING_IMAGES:],
        labels[TRAINING_IMAGES:],
    )


def load(weights: Path = WEIGHTS) -> tuple[DigitsViT, tuple[Tensor]]:
    """The trained model in eval mode, and two example images."""
    model = DigitsViT()
    load_model(model, weights)
    return model.eval(), (images()[2][:2],)


def batches(seed: int = 0) -> list[tuple[Tensor]]:
    """The training images as batches, without their labels."""
    return [(batch,) for batch in images(seed)[0].split(BATCH_SIZE)]


def calibration() -> Iterator[tuple[Tensor]]:
    """Batches of training images, without their labels."""
    yield from batches()


@torch.inference_mode()
def compared(original: nn.Module, converted: nn.Module, seed: int = 0) -> dict[str, float]:
    """Figures on the test images: accuracy of both, relative error of the logits, agreement."""
    _, _, pixels, labels = images(seed)
    f, g = original(pixels), converted(pixels)
    return {
        "accuracy_before": (f.argmax(1) == labels).float().mean().item(),
        "accuracy_after": (g.argmax(1) == labels).float().mean().item(),
        "relative_error": ((f - g).norm() / f.norm()).item(),
        "agreement": (f.argmax(1) == g.argmax(1)).float().mean().item(),
    }
