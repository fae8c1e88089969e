"""Cases by kind and number: files, and what dyt-compile is called with. A number gives one case."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count
from random import Random

from google.protobuf.message import DecodeError, EncodeError

from . import seeds
from .bytes import damaged
from .containers import bad_archive, bad_calibration, bad_program
from .graphs import changed

__all__ = ["KINDS", "Case", "Kind", "case"]


UNMADE = (DecodeError, EncodeError, ValueError, TypeError, OverflowError)
"""What protobuf and NumPy say where they cannot write something that bad."""


@dataclass(frozen=True)
class Case:
    """Files by name in a folder of their own, and the words behind `dyt-compile`."""

    arguments: tuple[str, ...]
    files: dict[str, bytes] = field(repr=False)


@dataclass(frozen=True)
class Kind:
    """share: of all cases; about: what is bad."""

    about: str
    share: float
    make: Callable[[Random], Case]


def case(kind: str, number: int) -> Case:
    """The case of a kind that has this number."""
    for attempt in count():
        try:
            return KINDS[kind].make(Random(f"{kind}/{number}/{attempt}"))
        except UNMADE:  # noqa: PERF203 - a change that the one before left nothing for
            continue
    raise AssertionError("count() never ends")


def _model(random: Random) -> bytes:
    return seeds.seed(random.choice(sorted(seeds.SEEDS)))


def _inspect(model: bytes) -> Case:
    return Case(("inspect", "model.onnx", "--json", "out.json"), {"model.onnx": model})


def _bytes(random: Random) -> Case:
    return _inspect(damaged(_model(random), random))


def _structure(random: Random) -> Case:
    return _inspect(changed(_model(random), random))


def _exact(random: Random) -> Case:
    arguments = ["convert", "model.onnx", "-o", "out.onnx"]
    arguments += random.choice(([], ["--no-fold"], ["--weights", "copy"], ["--check", "structure"]))
    return Case(tuple(arguments), {"model.onnx": changed(_model(random), random)})


def _compared(random: Random) -> Case:
    first = _model(random)
    files = {"a.onnx": first, "b.onnx": changed(first, random)}
    return Case(("verify", *random.sample(sorted(files), 2)), files)


def _run(random: Random) -> Case:
    """Bad models, and good data."""
    name = random.choice([name for name in seeds.SEEDS if name not in ("embedding", "rms-half")])
    files = {"model.onnx": changed(seeds.seed(name), random), "data.npz": seeds.archive()}
    if random.random() < 0.3:
        return Case(("verify", "model.onnx", "model.onnx", "--data", "data.npz"), files)
    mode = ("--mode", random.choice(("all", "budget")))
    return Case(("convert", "model.onnx", "--data", "data.npz", *mode, "-o", "out.onnx"), files)


def _data(random: Random) -> Case:
    """Good models, and bad data."""
    bad = damaged if random.random() < 0.3 else bad_archive
    files = {"model.onnx": seeds.seed("layer"), "data.npz": bad(seeds.archive(), random)}
    verb = ("calibrate", "model.onnx", "--data", "data.npz", "-o", "out.safetensors")
    if random.random() < 0.2:
        verb = ("convert", "model.onnx", "--data", "data.npz", "--mode", "all", "-o", "out.onnx")
    return Case(verb, files)


def _fits(random: Random) -> Case:
    fits = bad_calibration(seeds.calibration(), random)
    files = {"model.onnx": seeds.seed("layer"), "fits.safetensors": fits}
    return Case(("convert", "model.onnx", "--fits", "fits.safetensors", "-o", "out.onnx"), files)


def _program(random: Random) -> Case:
    program = bad_program(seeds.program(), random)
    return Case(("inspect", "model.pt2", "--json", "out.json"), {"model.pt2": program})


VERBS = ("inspect", "convert", "calibrate", "recover", "verify", "build", "bench-gpu", "plugin")

OPTIONS = (
    "-o", "--out", "--data", "--mode", "--max-error", "--metric", "--output", "--exclude", "--fit",
    "--batch-size", "--opset", "--dtype", "--weights", "--check", "--provider", "--seed",
    "--report", "--calibration", "--fits", "--no-fold", "--affine", "--fuse", "--quantize", "--for",
    "--frontier", "--json", "--activations", "--keep-sums", "--merge", "--minutes", "--steps",
    "--runtime", "--minShapes", "--target", "--lowering", "--passes", "--trust", "--help", "--no",
)  # fmt: skip

WORDS = (
    "model.onnx", "data.npz", "out.onnx", "out.json", "out.html", "out.safetensors", "missing.onnx",
    "missing.npz", ".", "", "/", "-", "--", "\x1b[2J", "nan", "inf", "-1", "0", "1e999", "1e-9",
    "99999999999999999999", "(", "[a", "(?P<", ".*", "relative", "kl", "all", "exact", "budget",
    "fp16", "bf16", "int8", "fp8", "cpu", "cuda", "tensorrt:", "tensorrt:x.so", "full", "link",
    "copy", "embed", "20", "3", "x:1x3", "x:", "sm89", "x.py:f", "no_such_module:f", ":", "a:b:c",
    "model.pt", "model.bin", "y", "x" * 4096, "out.txt", "../out.onnx/", "auto", "run", "openvino",
)  # fmt: skip


def _arguments(random: Random) -> Case:
    """Words of the command line in any order, where the files are good."""
    files = {"model.onnx": seeds.seed("layer"), "data.npz": seeds.archive()}
    words = [random.choice((*VERBS[:5], *VERBS))]
    words += random.choice((["model.onnx"], ["model.onnx"], []))
    for _ in range(random.randrange(7)):
        words.append(random.choice(OPTIONS if random.random() < 0.5 else WORDS))
    return Case(tuple(words), files)


KINDS: dict[str, Kind] = {
    "bytes": Kind("ONNX files, damaged; inspect", 0.44, _bytes),
    "structure": Kind("ONNX models, changed; inspect", 0.2, _structure),
    "exact": Kind("the same; convert --mode exact", 0.02, _exact),
    "compared": Kind("the same; verify without data", 0.03, _compared),
    "run": Kind("the same; convert and verify with data", 0.01, _run),
    "data": Kind(".npz files; calibrate and convert", 0.06, _data),
    "fits": Kind("calibrations; convert --fits", 0.03, _fits),
    "program": Kind(".pt2 files; inspect", 0.03, _program),
    "arguments": Kind("words of the command line", 0.18, _arguments),
}
"""Shares add up to one."""
