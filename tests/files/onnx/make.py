"""Writes the files of this folder: tiny decoders with random weights, as two tools export them.

    python make.py genai    # onnxruntime-genai 0.18.0, transformers 5.23, torch 2.13.0
    python make.py optimum  # optimum-onnx 0.1.0, transformers 4.57.6, torch 2.13.0

Both were run with onnx 1.23.2, onnx-ir 1.1.0 and onnxruntime 1.32.0.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
)

FOLDER = Path(__file__).parent
VOCABULARY = 48
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
}
CONFIGS: dict[str, type[PretrainedConfig]] = {"llama": LlamaConfig, "qwen3": Qwen3Config}


def save(name: str, folder: Path) -> None:
    """A model and a tokenizer in Hugging Face's format; gains from 0.5 to 1.5."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[name](**SIZES)).eval()
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data = torch.rand_like(parameter) + 0.5
        else:
            parameter.data = torch.randn_like(parameter) * 0.15
    model.save_pretrained(folder)
    words = {"<unk>": 0, "<s>": 1, "</s>": 2, **{f"w{n}": n for n in range(3, VOCABULARY)}}
    PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="<unk>")),
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="</s>",
    ).save_pretrained(folder)


def genai(name: str, precision: str) -> None:
    """What ONNX Runtime's GenAI model builder writes for CPUs."""
    with tempfile.TemporaryDirectory() as folder:
        source, result = Path(folder, "source"), Path(folder, "result")
        save(name, source)
        run(
            "-m", "onnxruntime_genai.models.builder", "-m", str(source), "-o", str(result),
            "-p", precision, "-e", "cpu", "-c", str(Path(folder, "cache")),
        )  # fmt: skip
        target = FOLDER / f"genai-{name}-{precision}"
        target.mkdir(exist_ok=True)
        for file in ("model.onnx", "model.onnx.data"):
            shutil.copy(result / file, target / file)


def optimum(name: str) -> None:
    """What optimum writes for text generation with past keys and values."""
    with tempfile.TemporaryDirectory() as folder:
        source, result = Path(folder, "source"), Path(folder, "result")
        save(name, source)
        run(
            "-m", "optimum.commands.optimum_cli", "export", "onnx", "-m", str(source),
            "--task", "text-generation-with-past", str(result),
        )  # fmt: skip
        target = FOLDER / f"optimum-{name}"
        target.mkdir(exist_ok=True)
        shutil.copy(result / "model.onnx", target / "model.onnx")


def run(*arguments: str) -> None:
    subprocess.run([sys.executable, *arguments], check=True)


if __name__ == "__main__":
    if sys.argv[1] == "genai":
        for name, precision in (("llama", "int4"), ("llama", "fp16"), ("qwen3", "fp32")):
            genai(name, precision)
    else:
        optimum("llama")
