"""One calibration under a hard limit of address space, as a process of its own.

Usage: promised.py write FOLDER 0, which writes a model of 201 MB and its fits; then promised.py
KIND FOLDER BYTES: state, onnx (both with the memory promised) or whole (in memory), under a limit
of so many bytes above what the imports hold: what is mapped by then, less what of it is held
(libraries map far more than they touch), and the memory.
"""

from __future__ import annotations

import json
import resource
import sys
from pathlib import Path
from typing import Any

import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from safetensors.torch import save_file
from torch import Tensor, nn

import dyt_compile
from dyt_compile.memory import resident_bytes

WIDTH, INNER, BLOCKS, EPS = 512, 8192, 6, 1e-5


class Block(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, EPS)
        self.up = nn.Linear(width, inner, bias=False)
        self.down = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = x + self.down(self.up(self.norm(x)).relu())
        return found


def made(width: int = WIDTH, inner: int = INNER, blocks: int = BLOCKS) -> nn.Sequential:
    """The model, or one like it."""
    return nn.Sequential(*(Block(width, inner) for _ in range(blocks))).eval()


def batches(width: int, count: int) -> list[tuple[Tensor]]:
    """Rows at random."""
    random = torch.Generator().manual_seed(0)
    return [(torch.randn(16, 8, width, generator=random),) for _ in range(count)]


def write_onnx(model: nn.Sequential, width: int, path: Path) -> None:
    """The same model, its weights in a file beside."""
    nodes, weights, read = [], [], "x"
    for place, block in enumerate(model):
        own = {
            f"{place}.scale": block.norm.weight, f"{place}.bias": block.norm.bias,
            f"{place}.up": block.up.weight.T, f"{place}.down": block.down.weight.T,
        }  # fmt: skip
        weights += [
            numpy_helper.from_array(tensor.detach().numpy().copy(), name)
            for name, tensor in own.items()
        ]
        names, made_here = list(own), [f"{place}.{step}" for step in range(5)]
        normed, up, bent, down, added = made_here
        nodes += [
            helper.make_node(
                "LayerNormalization", [read, *names[:2]], [normed], axis=-1, epsilon=EPS
            ),
            helper.make_node("MatMul", [normed, names[2]], [up]),
            helper.make_node("Relu", [up], [bent]),
            helper.make_node("MatMul", [bent, names[3]], [down]),
            helper.make_node("Add", [read, down], [added]),
        ]
        read = added
    nodes[-1].output[0] = "y"
    x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, ["n", 8, width]) for n in "xy")
    graph = helper.make_graph(nodes, "blocks", [x], [y], weights)
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    beside = f"{path.name}.data"
    onnx.save(proto, path, save_as_external_data=True, location=beside, size_threshold=0)


def write(folder: Path) -> None:
    """The model, and its fits."""
    torch.manual_seed(0)
    model = made()
    save_file(model.state_dict(), folder / "model.safetensors")
    write_onnx(model, WIDTH, folder / "model.onnx")
    write_onnx(made(8, 8, 1), 8, folder / "tiny.onnx")
    found = dyt_compile.calibrate(model, batches(WIDTH, 8), fit="diagonal")
    found.save(folder / "whole.fits")


def calibrate(kind: str, folder: Path, above: int) -> None:
    """Calibrate under the limit, and print what was promised and what the peak was."""
    tiny = folder / "tiny.onnx" if kind == "onnx" else made(8, 8, 1)
    dyt_compile.calibrate(tiny, batches(8, 2), fit="diagonal")  # whatever is imported late
    data = batches(WIDTH, 8)
    present = resident_bytes()
    limit = status("VmSize") + above
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    model: Any = folder / "model.onnx"
    options: dict[str, Any] = {} if kind == "whole" else {"memory": present + above}
    if kind != "onnx":
        with torch.device("meta" if kind == "state" else "cpu"):
            model = made()
    if kind == "state":
        options["state"] = folder / "model.safetensors"
    found = dyt_compile.calibrate(model, data, fit="diagonal", **options)
    found.save(folder / f"{kind}.fits")
    sys.stdout.write(json.dumps({"memory": present + above, "peak": status("VmHWM")}) + "\n")


def status(name: str) -> int:
    """Bytes that /proc tells of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


if __name__ == "__main__":
    if sys.argv[1] == "write":
        write(Path(sys.argv[2]))
    else:
        calibrate(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))
