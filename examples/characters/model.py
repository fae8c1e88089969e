"""A small GPT of characters in the manner of LLaMA: RMSNorm, rotary positions, SwiGLU.

Its text is that of Python's own help topics, so that nothing has to be downloaded. Convert it with
`dyt-compile convert examples/characters/model.py:load
--data examples/characters/model.py:calibration --metric kl`.
"""

from __future__ import annotations

import random
import string
from collections.abc import Iterator, Mapping
from pathlib import Path
from pydoc_data.topics import topics

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dyt_compile.files import replaced

WEIGHTS = Path(__file__).with_name("gpt.safetensors")
CHARACTERS = "\n" + "".join(sorted(set(string.printable) - set(string.whitespace) | {" "}))
CONTEXT = 128
PIECE = 16 * CONTEXT
HELD_OUT_SHARE = 0.1
CALIBRATION_WINDOWS = 512
BATCH_SIZE = 32
SCALE = ".scale"


class Attention(nn.Module):
    """Causal multi-head self-attention on tokens of shape (batch, tokens, width)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.projection = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor, turns: tuple[Tensor, Tensor]) -> Tensor:
        query, key, value = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        query, key = turned(query, turns), turned(key, turns)
        attended = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        output: Tensor = self.projection(attended.transpose(1, 2).flatten(2))
        return output


def turned(x: Tensor, turns: tuple[Tensor, Tensor]) -> Tensor:
    """Rotary positions: pairs of channels, half a head apart, turned by the position's angle."""
    cosines, sines = turns
    first, second = x.chunk(2, dim=-1)
    return x * cosines + torch.cat([-second, first], dim=-1) * sines


class SwiGLU(nn.Module):
    """The gated MLP of LLaMA, without biases."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate_and_up = nn.Linear(width, 2 * hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_and_up(x).chunk(2, dim=-1)
        output: Tensor = self.down(F.silu(gate) * up)
        return output


class Block(nn.Module):
    """Pre-norm attention and MLP, each with its residual."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(width, eps=1e-6)
        self.attention = Attention(width, heads)
        self.mlp_norm = nn.RMSNorm(width, eps=1e-6)
        self.mlp = SwiGLU(width, 3 * width)

    def forward(self, x: Tensor, turns: tuple[Tensor, Tensor]) -> Tensor:
        x = x + self.attention(self.attention_norm(x), turns)
        output: Tensor = x + self.mlp(self.mlp_norm(x))
        return output


class CharacterGPT(nn.Module):
    """Logits (batch, tokens, 96) of the next character, for ids (batch, tokens), int64.

    At most 128 tokens. The head has weights of its own.
    """

    cosines: Tensor
    sines: Tensor

    def __init__(self, width: int = 128, depth: int = 4, heads: int = 4) -> None:
        super().__init__()
        self.embedding = nn.Embedding(len(CHARACTERS), width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm = nn.RMSNorm(width, eps=1e-6)
        self.head = nn.Linear(width, len(CHARACTERS), bias=False)
        half = width // heads // 2
        rates = 10000.0 ** (-torch.arange(half) / half)
        angles = torch.outer(torch.arange(CONTEXT), torch.cat([rates, rates]))
        self.register_buffer("cosines", angles.cos(), persistent=False)
        self.register_buffer("sines", angles.sin(), persistent=False)
        for parameter in self.parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, ids: Tensor) -> Tensor:
        tokens = ids.shape[1]
        turns = self.cosines[:tokens], self.sines[:tokens]
        x = self.embedding(ids)
        for block in self.blocks:
            x = block(x, turns)
        logits: Tensor = self.head(self.norm(x))
        return logits


def save(model: nn.Module, path: Path) -> None:
    """Write the weights, matrices as int8 with a scale a row: a quarter of the size.

    What that costs is printed by train.py: from 1.3947 to 1.3946 nats a character.
    """
    tensors: dict[str, Tensor] = {}
    for name, weight in model.state_dict().items():
        if weight.dim() < 2:
            tensors[name] = weight
        else:
            scale = weight.abs().amax(dim=1, keepdim=True) / 127
            tensors[name] = (weight / scale).round().to(torch.int8)
            tensors[name + SCALE] = scale
    with replaced(path) as temporary:
        save_file(tensors, temporary)


def decoded(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The float32 weights that `save` wrote."""
    return {
        name: tensor * tensors[name + SCALE] if name + SCALE in tensors else tensor
        for name, tensor in tensors.items()
        if not name.endswith(SCALE)
    }


def load(weights: Path = WEIGHTS) -> tuple[CharacterGPT, tuple[Tensor]]:
    """The trained model in eval mode, and two example windows.

    The model is what the int8 weights decode to, in float32: nothing is quantized when it runs.
    """
    model = CharacterGPT()
    model.load_state_dict(decoded(load_file(weights)))
    return model.eval(), (windows(text()[1])[:2, :-1],)


def text(seed: int = 0) -> tuple[Tensor, Tensor]:
    """Character ids (pieces, 2048) to train on, and others held out; a seed gives the split."""
    ids = {character: number for number, character in enumerate(CHARACTERS)}
    whole = "\n\n".join(topics[name] for name in sorted(topics))
    coded = torch.tensor([ids[character] for character in whole if character in ids])
    pieces = coded[: len(coded) // PIECE * PIECE].view(-1, PIECE)
    order = random.Random(seed).sample(range(len(pieces)), len(pieces))
    count = round(HELD_OUT_SHARE * len(pieces))
    return pieces[order[count:]], pieces[order[:count]]


def windows(pieces: Tensor) -> Tensor:
    """All of the text once, as windows (windows, 129): 128 characters and the one that follows."""
    return pieces.unfold(1, CONTEXT + 1, CONTEXT).flatten(0, 1)


def batches(seed: int = 0) -> list[tuple[Tensor]]:
    """The text to train on as batches of inputs, in a random order, without what follows."""
    inputs = windows(text(seed)[0])[:, :-1]
    order = random.Random(seed).sample(range(len(inputs)), len(inputs))
    return [(batch,) for batch in inputs[order].split(BATCH_SIZE)]


def calibration() -> Iterator[tuple[Tensor]]:
    """Batches of text that the model was trained on."""
    yield from batches()[: CALIBRATION_WINDOWS // BATCH_SIZE]


@torch.inference_mode()
def compared(original: nn.Module, converted: nn.Module, seed: int = 0) -> dict[str, float]:
    """Held-out figures: KL(original, converted) in nats a character, and the loss of both."""
    held_out = windows(text(seed)[1])
    inputs, targets = held_out[:, :-1], held_out[:, 1:].flatten()
    f, g = (
        torch.cat([model(batch) for batch in inputs.split(BATCH_SIZE)]).flatten(0, 1)
        for model in (original, converted)
    )
    p, q = f.log_softmax(-1), g.log_softmax(-1)
    return {
        "kl": F.kl_div(q, p, reduction="batchmean", log_target=True).item(),
        "loss_before": F.nll_loss(p, targets).item(),
        "loss_after": F.nll_loss(q, targets).item(),
        "relative_error": ((f - g).norm() / f.norm()).item(),
        "agreement": (f.argmax(-1) == g.argmax(-1)).float().mean().item(),
    }
