"""Small models, and the commands that are to be disturbed while they write."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import sys
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from onnx import TensorProto, helper, numpy_helper

from dyt_compile.cli import main
from dyt_compile.graphs.onnx_files import externals
from dyt_compile.shelf import Shelf

__all__ = ["CASES", "TORCH", "Case", "command", "prepare", "state"]

TORCH = ("network.py:load", "--data", "network.py:batches")

WIDTH, ROWS = 64, 96
BLOCKS = 2

NETWORK = f"""
import torch


class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = torch.nn.LayerNorm({WIDTH})
        self.linear = torch.nn.Linear({WIDTH}, {WIDTH})

    def forward(self, x):
        return x + torch.nn.functional.gelu(self.linear(self.norm(x)))


def load():
    torch.manual_seed(0)
    return torch.nn.Sequential(*(Block() for _ in range({BLOCKS}))), (torch.randn(2, 3, {WIDTH}),)


def batches():
    torch.manual_seed(1)
    for _ in range(6):
        yield (torch.randn(16, 3, {WIDTH}),)
"""


@dataclass(frozen=True)
class Case:
    """A command whose target is there already.

    verb: of the command line, or "export" for the function; old, new: what writes the target in
    the working folder, in two versions; target: its name; needs: a package that it cannot do
    without; share: of all tries, fewer where a run takes seconds.
    """

    name: str
    verb: str
    old: Callable[[], object]
    new: Callable[[], object]
    target: str
    needs: str | None = None
    share: float = 1.0

    @property
    def can_run(self) -> bool:
        """Whether what it needs is installed."""
        return self.needs is None or importlib.util.find_spec(self.needs) is not None


def command(*arguments: str) -> Callable[[], object]:
    """A command in the working folder, as the shell calls it."""
    return partial(main, list(arguments))


def _spilling(*arguments: str) -> Callable[[], object]:
    """The same, with all activations in files."""

    def work() -> None:
        plain = Shelf.__init__

        def none(shelf: Shelf, graph: Any, _: int = 0) -> None:
            plain(shelf, graph, 0)

        Shelf.__init__ = none  # type: ignore[method-assign] # in a process of its own
        main(list(arguments))

    return work


def _exported(fit: str) -> Callable[[], object]:
    """export_onnx of the torch model, in Python, weights in a file of their own; it ends as a
    command does."""

    def work() -> None:
        import dyt_compile
        from dyt_compile.cli.sources import load_data, load_model

        source = load_model("network.py:load")
        batches = load_data("network.py:batches", 16)
        result = dyt_compile.convert(
            source.model, batches, mode="all", example=source.example, fit=fit
        )
        try:
            dyt_compile.export_onnx(result, "out.onnx", weights="copy")
        except dyt_compile.DytCompileError as error:
            sys.stderr.write(f"{type(error).__name__}: {error}\n")
            sys.exit(1)

    return work


def _onnx(fit: str, *more: str, source: str = "model.onnx", out: str = "out.onnx") -> Any:
    return command(
        "convert", source, "--data", "data.npz", "--mode", "all", "--fit", fit, "-o", out, *more
    )


def _engine(model: str) -> Callable[[], object]:
    shapes = (f"--{which}Shapes=x:8x{WIDTH}" for which in ("min", "opt", "max"))
    return command(
        "build", model, "-o", "out.plan", "--runtime", "tensorrt-rtx", "--target", "sm89", *shapes
    )


def _torch(fit: str, out: str) -> Callable[[], object]:
    return command(
        "convert", *TORCH, "--mode", "all", "--fit", fit, "-o", out,
    )  # fmt: skip


def _calibrated(model: str, data: str, seed: str) -> Callable[[], object]:
    return _spilling(
        "calibrate", model, "--data", data, "--seed", seed, "--fit", "diagonal",
        "-o", "fits.safetensors",
    )  # fmt: skip


CASES = (
    Case("convert, weights inside", "convert", _onnx("diagonal"), _onnx("full"), "out.onnx"),
    Case(
        "convert, weights copied", "convert",
        _onnx("diagonal", "--weights", "copy"), _onnx("full", "--weights", "copy"), "out.onnx",
    ),
    Case(
        "convert, weights linked", "convert",
        _onnx("diagonal", source="beside.onnx"), _onnx("full", source="beside.onnx"), "out.onnx",
    ),
    Case(
        "convert over its own input, weights copied", "convert",
        command("convert", "model.onnx", "--weights", "copy", "-o", "source.onnx"),
        _onnx("full", "--weights", "copy", source="source.onnx", out="source.onnx"),
        "source.onnx",
    ),
    Case(
        "convert to .safetensors", "convert",
        _torch("diagonal", "out.safetensors"), _torch("full", "out.safetensors"), "out.safetensors",
        share=0.3,
    ),
    Case(
        "convert to .pt2", "convert",
        _torch("diagonal", "out.pt2"), _torch("full", "out.pt2"), "out.pt2", share=0.3,
    ),
    Case(
        "export, weights copied", "export", _exported("diagonal"), _exported("full"), "out.onnx",
        share=0.3,
    ),
    Case(
        "build", "build", _engine("small.onnx"), _engine("model.onnx"), "out.plan", "tensorrt_rtx",
        share=0.6,
    ),
    Case(
        "calibrate from ONNX, activations in files", "calibrate",
        _calibrated("model.onnx", "data.npz", "0"), _calibrated("model.onnx", "data.npz", "1"),
        "fits.safetensors",
    ),
    Case(
        "calibrate from torch, activations in files", "calibrate",
        _calibrated("network.py:load", "network.py:batches", "0"),
        _calibrated("network.py:load", "network.py:batches", "1"),
        "fits.safetensors", share=0.3,
    ),
)  # fmt: skip


def prepare(folder: Path) -> None:
    """The models and data that the commands read."""
    folder.mkdir(parents=True)
    (folder / "network.py").write_text(NETWORK, encoding="utf-8")
    random = np.random.default_rng(0)
    np.savez(folder / "data.npz", x=random.normal(size=(ROWS, WIDTH)).astype(np.float32))
    onnx.save(_model(), folder / "model.onnx")
    onnx.save(_model(blocks=1), folder / "small.onnx")
    onnx.save(
        _model(), folder / "beside.onnx", save_as_external_data=True, location="beside.data",
        size_threshold=0,
    )  # fmt: skip


def _model(blocks: int = BLOCKS) -> onnx.ModelProto:
    """Pre-norm blocks with a product each."""
    random = np.random.default_rng(0)
    nodes, weights, x = [], [], "x"
    for block in range(blocks):
        arrays = {
            "norm.weight": np.ones(WIDTH), "norm.bias": np.zeros(WIDTH),
            "weight": random.normal(size=(WIDTH, WIDTH)) / WIDTH**0.5,
        }  # fmt: skip
        weights += [
            numpy_helper.from_array(array.astype(np.float32), f"{block}.{name}")
            for name, array in arrays.items()
        ]
        norm = [f"{block}.{name}" for name in ("norm.weight", "norm.bias")]
        nodes += [
            helper.make_node("LayerNormalization", [x, *norm], [f"n{block}"], axis=-1),
            helper.make_node("MatMul", [f"n{block}", f"{block}.weight"], [f"m{block}"]),
            helper.make_node("Add", [x, f"m{block}"], [f"x{block}"]),
        ]
        x = f"x{block}"
    kind = TensorProto.FLOAT
    graph = helper.make_graph(
        nodes, "model",
        [helper.make_tensor_value_info("x", kind, ["batch", WIDTH])],
        [helper.make_tensor_value_info(x, kind, ["batch", WIDTH])],
        weights,
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def state(target: Path) -> str:
    """A digest of what a target is, with all that belongs to it; raises where it is not whole."""
    read: Mapping[str, Callable[[Path], bytes]] = {
        ".onnx": _onnx_parts, ".pt2": _archive_parts, ".plan": _engine_parts,
        ".safetensors": _tensor_parts,
    }  # fmt: skip
    return hashlib.sha256(read[target.suffix](target)).hexdigest()[:16]


def _onnx_parts(path: Path) -> bytes:
    """The graph, and the data that it refers to."""
    found = [path.read_bytes()]
    for tensor in externals(ir.load(path)):
        data = Path(tensor.path).read_bytes()
        start = tensor.offset or 0
        if start + tensor.nbytes > len(data):
            raise ValueError(f"{tensor.path} is cut short")
        found.append(data[start : start + tensor.nbytes])
    return b"".join(found)


def _archive_parts(path: Path) -> bytes:
    """Names and checksums of the weights in an archive, whose other files differ each time."""
    with zipfile.ZipFile(path) as archive:
        if archive.testzip() is not None:
            raise ValueError(f"{archive.testzip()} is damaged")
        files = [(file.filename, file.CRC) for file in archive.infolist()]
    return repr(sorted(file for file in files if "/weights/" in file[0])).encode()


def _tensor_parts(path: Path) -> bytes:
    from safetensors.numpy import load_file

    arrays = load_file(path)
    return b"".join(name.encode() + arrays[name].tobytes() for name in sorted(arrays))


def _engine_parts(path: Path) -> bytes:
    """Which of both versions an engine is: it differs from build to build, its length does not.

    The file beside it, where there is one, must tell of this engine.
    """
    size = path.stat().st_size
    about = path.with_name(f"{path.name}.json")
    if about.exists() and json.loads(about.read_text(encoding="utf-8"))["bytes"] != size:
        raise ValueError(f"{about.name} tells of another engine")
    return str(size).encode()
