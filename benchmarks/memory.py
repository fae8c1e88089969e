"""Calibrating a model larger than memory: what the process holds at most, and how long it takes.

A LLaMA of the shape of Llama 3.2 1B (1.24 billion weights at random, 2.5 GB) in shards of
safetensors, as a Hugging Face folder in bfloat16, and as an .onnx file with external data in
float16. Every run is a process of its own, `dyt-compile calibrate`; its peak is VmHWM of
/proc/self/status, mapped pages of files among it, and `import_bytes` what it held before: what a
calibration of a tiny model of the same kind loads (torch and transformers; ONNX Runtime). With a
limit the process runs under RLIMIT_AS: what the imports mapped without holding it, and the memory
that was promised.

Usage: python -m benchmarks.memory [--samples 128] [--tokens 128] [--folder FOLDER] [NAME ...];
what it measures replaces the same runs in benchmarks/results/memory.json. It takes 6 GB in FOLDER
(by default a temporary one), and hours for all runs with the default data on two cores.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from dyt_compile.files import replaced
from dyt_compile.report import environment

from .files.one import peak_bytes

RESULTS = Path(__file__).parent / "results" / "memory.json"
WORDS, BLOCKS = 128256, 16
SHARD_BYTES = 400_000_000
ONNX_BATCH, ONNX_TOKENS = 2, 16
"""What the exporter wrote the .onnx file for."""


@dataclass(frozen=True)
class Run:
    """A calibration with further options.

    memory: what is promised; limited: under a hard limit of address space; whole: with all weights
    in memory; onnx: of the .onnx file.
    """

    options: tuple[str, ...] = ()
    memory: str | None = None
    limited: bool = False
    whole: bool = False
    onnx: bool = False


RUNS = {
    "in memory": Run(whole=True),
    "diagonal": Run(("--fit", "diagonal")),
    "auto": Run(),
    "auto, promised": Run(memory="1.24GB", limited=True),
    "auto, refused": Run(memory="1GB", limited=True),
    "diagonal, promised": Run(("--fit", "diagonal"), memory="1.24GB", limited=True),
    "onnx, promised": Run(("--fit", "diagonal"), memory="1.24GB", limited=True, onnx=True),
}


def write_folder(folder: Path) -> None:
    """The model's config, and random weights, made and written a shard at a time."""
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=2048, intermediate_size=8192, num_hidden_layers=BLOCKS, num_attention_heads=32,
        num_key_value_heads=8, head_dim=64, vocab_size=WORDS, tie_word_embeddings=True,
        rope_theta=500000.0, max_position_embeddings=131072, rms_norm_eps=1e-5, dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(folder)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    random = torch.Generator().manual_seed(0)
    shard: dict[str, torch.Tensor] = {}
    shards: dict[str, str] = {}

    def write() -> None:
        name = f"model-{len(set(shards.values())) + 1:05d}.safetensors"
        save_file(shard, folder / name, metadata={"format": "pt"})
        shards.update(dict.fromkeys(shard, name))
        shard.clear()

    for name, like in model.named_parameters():
        made = torch.randn(like.shape, generator=random).mul_(0.02)
        shard[name] = (made if like.dim() > 1 else 1 + made).bfloat16()
        if sum(tensor.nbytes for tensor in shard.values()) >= SHARD_BYTES:
            write()
    write()
    index = {"metadata": {}, "weight_map": shards}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def write_onnx(folder: Path) -> None:
    """The model's .onnx file, and that of a tiny one like it."""
    from .files.subjects import ONE_BILLION, write_llama

    folder.mkdir(parents=True, exist_ok=True)
    tiny = replace(ONE_BILLION, width=32, inner=64, layers=1, heads=2, groups=1, words=64)
    write_llama(folder / "tiny.onnx", tiny, dyt=False, sparse=False)
    write_llama(folder / "model.onnx", ONE_BILLION, dyt=False, sparse=False)


def write_data(path: Path, samples: int, tokens: int) -> None:
    """Words at random."""
    random = np.random.default_rng(0)
    np.savez(path, input_ids=random.integers(0, WORDS, (samples, tokens)))


def one(arguments: Sequence[str]) -> None:
    """A run in this process: prints its seconds and its memory as JSON."""
    whole, limit, *command = arguments
    model = Path(command[1])
    if model.suffix == ".onnx":
        _try(model.with_name("tiny.onnx"))
    else:
        with tempfile.TemporaryDirectory() as folder:
            _try(_tiny_folder(Path(folder)))
    held = {name: _status(name) for name in ("VmSize", "VmRSS")}
    if limit != "-":
        size = held["VmSize"] - held["VmRSS"] + int(limit)
        resource.setrlimit(resource.RLIMIT_AS, (size, size))
    from dyt_compile import compiler
    from dyt_compile.cli import app

    if whole == "whole":
        lazy = compiler.capture
        compiler.capture = lambda *a, **k: lazy(*a, **k | {"lazy": False})  # type: ignore[assignment]
    start = time.perf_counter()
    app(command, standalone_mode=False)
    seconds = time.perf_counter() - start
    told = {"seconds": round(seconds, 1), "peak_bytes": peak_bytes(), "import_bytes": held["VmRSS"]}
    print(json.dumps(told))


def _tiny_folder(folder: Path) -> Path:
    """A model of the same kind, of which hardly anything is kept in memory."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, vocab_size=64, tie_word_embeddings=True, dtype="bfloat16",
    )  # fmt: skip
    LlamaForCausalLM(config).bfloat16().save_pretrained(folder, max_shard_size="4KB")
    return folder


def _try(model: Path) -> None:
    """Load what every run loads, so that it can be told apart."""
    import dyt_compile
    from dyt_compile.memory import give_back, resident_bytes

    batches = [{"input_ids": np.arange(32).reshape(2, 16)}] * 2
    found = dyt_compile.calibrate(model, batches, memory=resident_bytes() + (1 << 30))
    with tempfile.TemporaryDirectory() as folder:
        found.save(Path(folder) / "fits.safetensors")
    give_back()


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def measured(run: Run, folder: Path, samples: int, tokens: int) -> dict[str, Any]:
    """What a run takes, in a process of its own."""
    from dyt_compile.memory import parse_bytes

    limit = str(parse_bytes(run.memory)) if run.limited and run.memory else "-"
    model = folder / "onnx/model.onnx" if run.onnx else folder / "llama"
    write_data(folder / "words.npz", samples, tokens)
    batch = ONNX_BATCH if run.onnx else min(samples, 8)
    command = [
        sys.executable, "-m", "benchmarks.memory", "one", "whole" if run.whole else "lazy", limit,
        "calibrate", str(model), "-o", str(folder / "fits.safetensors"), "--data",
        str(folder / "words.npz"), "--batch-size", str(batch), *run.options,
        *(("--memory", run.memory) if run.memory else ()),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        return {"error": done.stderr.strip().splitlines()[-1]}
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    """Measure the runs that were named, and write them."""
    if sys.argv[1:2] == ["one"]:
        one(sys.argv[2:])
        return
    parser = argparse.ArgumentParser(prog="benchmarks.memory")
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(RUNS))
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--folder", type=Path)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = given.folder or Path(temporary)
        chosen = {name: RUNS[name] for name in given.names or RUNS}
        for onnx, kind, write in ((False, "llama", write_folder), (True, "onnx", write_onnx)):
            if not (folder / kind).exists() and any(run.onnx is onnx for run in chosen.values()):
                write(folder / kind)
        results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"runs": {}}
        for name, run in chosen.items():
            tokens = ONNX_TOKENS if run.onnx else given.tokens
            found = measured(run, folder, given.samples, tokens)
            about = asdict(run) | {"samples": given.samples, "tokens": tokens}
            results["runs"][name] = about | found
            print(name, results["runs"][name])
            results["environment"] = environment()
            with replaced(RESULTS) as path:
                path.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
