"""One site on this machine's GPU, way by way: `python -m benchmarks.gpu.kernels`.

The cases of `benchmarks.gpu.predict`: the plugin's kernel, beside what TensorRT is not needed for:
the same function and the norms compiled by Inductor, DyT eager, and the memory's limit, which is a
copy, or with a residual the bare add. Every way is a CUDA graph of passes over buffers that no
cache holds; the graphs are replayed in turn, round after round, and a way's time is the median over
the rounds. What the plugin puts out is compared with float64 first.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import statistics
import subprocess
import sys
import tempfile
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

from dyt_compile import inductor
from dyt_compile.dyt import FORMS, FUSED
from dyt_compile.exporters.plugin.build import SOURCES
from dyt_compile.exporters.plugin.toolchain import find_nvcc
from dyt_compile.exporters.tensorrt_worker import capability
from dyt_compile.files import replaced
from tests.exporters.plugin.reference import added, outside

from .predict import CASES, DEVICES, Case, predicted
from .times import quarters

RESULTS = Path(__file__).parents[1] / "results" / "gpu-kernels.json"

SETS = 6
"""Buffers that take turns: of 33 MB each tensor, where an H100's second cache holds 50 MB."""
PASSES = 24
ROUNDS = 30
EPS = 1e-6
SCALE = 1 / 127

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16,
          "int8": torch.int8, "fp8": torch.float8_e4m3fn}  # fmt: skip
TYPES = {"fp32": 0, "fp16": 1, "bf16": 2, "int8": 3, "fp8": 4}
"""Values of `Type` in launch.cuh."""
CHECKED = 64
"""Rows whose results are compared."""

Way = Callable[[Tensor, Tensor], object]


class Parameter(ctypes.Structure):
    """As in kernel.cuh; along 1: the columns."""

    _fields_ = (("data", ctypes.c_void_p), ("along", ctypes.c_int))


class Arguments(ctypes.Structure):
    """As in kernel.cuh."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "residual", "y", "sum", "y_scale")),
        *((name, Parameter) for name in ("alpha", "shift", "gamma", "beta")),
        *((name, ctypes.c_longlong) for name in ("rows", "planes", "columns")),
    )


@dataclass(frozen=True)
class Weights:
    """alpha, shift and scale in float32, one value; gamma and beta, one value a channel."""

    alpha: Tensor
    shift: Tensor
    gamma: Tensor
    beta: Tensor
    scale: Tensor


@dataclass(frozen=True)
class Timing:
    """Microseconds of one pass: the median of the rounds, and their quarters."""

    case: str
    types: str
    way: str
    median_us: float
    quarters_us: tuple[float, float]


def built(folder: Path) -> ctypes.CDLL:
    """The library, for this GPU."""
    out, arch = folder / "libdyt_launch.so", str(capability())
    source = Path(__file__).with_name("launch.cu")
    command = [
        str(find_nvcc()), "-std=c++17", "-O3", "-shared", "-cudart=static", "-Xcompiler=-fPIC",
        f"-arch={arch.replace('sm', 'sm_')}", f"-I{SOURCES}", "-o", str(out), str(source),
    ]  # fmt: skip
    subprocess.run(command, check=True)
    return ctypes.CDLL(str(out))


def weights(case: Case) -> Weights:
    """Of a site."""
    one = partial(torch.full, (1,), device="cuda", dtype=torch.float32)
    along = partial(torch.randn, case.columns, device="cuda")
    dtype = DTYPES[case.dtype]
    gamma, beta = (1 + 0.1 * along()).to(dtype), (0.1 * along()).to(dtype)
    return Weights(one(0.8), one(0.1), gamma, beta, one(SCALE))


def plugin_way(library: ctypes.CDLL, case: Case, held: Weights) -> Callable[..., list[Tensor]]:
    """The kernel of the plugin: y, and with a residual the sum."""
    outputs: dict[int, list[Tensor]] = {}

    def run(x: Tensor, residual: Tensor) -> list[Tensor]:
        made = outputs.setdefault(x.data_ptr(), [torch.empty_like(x, dtype=DTYPES[case.out])])
        if case.residual and len(made) == 1:
            made.append(torch.empty_like(x))
        arguments = Arguments(
            x=x.data_ptr(), y=made[0].data_ptr(), y_scale=held.scale.data_ptr(),
            alpha=Parameter(held.alpha.data_ptr(), 0),
            gamma=Parameter(held.gamma.data_ptr(), 1), beta=Parameter(held.beta.data_ptr(), 1),
            rows=case.rows, planes=1, columns=case.columns,
        )  # fmt: skip
        if case.residual:
            arguments.residual, arguments.sum = residual.data_ptr(), made[1].data_ptr()
        if case.squash == "erf":
            arguments.shift = Parameter(held.shift.data_ptr(), 0)
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        kinds = TYPES[case.dtype], TYPES[case.out], int(case.squash == "erf")
        status = library.dyt_launch(ctypes.byref(arguments), *kinds, stream)
        if status:
            raise RuntimeError(f"the launch failed: cudaError {status}")
        return made

    return run


def site(case: Case, held: Weights, inside: Callable[[Tensor], Tensor]) -> Way:
    """Residual add, a norm or its replacement, and the quantizer: as much of it as the case has."""

    def run(x: Tensor, residual: Tensor) -> tuple[Tensor, ...]:
        total = x + residual if case.residual else x
        y = inside(total)
        if case.out != case.dtype:
            y = y.float() / held.scale
            y = y.round().clamp(-128, 127) if case.out == "int8" else y.clamp(-448, 448)
            y = y.to(DTYPES[case.out])
        return (y, total) if case.residual else (y,)

    return run


def functions(case: Case, held: Weights) -> dict[str, Callable[[Tensor], Tensor]]:
    """Norms, and what replaces them, as the paper writes it; DyT also as ours becomes in Inductor.

    That is from torch 2.13 on; here it is written out, for older ones.
    """
    gamma, beta, width = held.gamma, held.beta, (case.columns,)
    alpha, shift = held.alpha.to(gamma.dtype), held.shift.to(gamma.dtype)
    norms: dict[str, Callable[[Tensor], Tensor]] = {
        "RMSNorm": lambda x: F.rms_norm(x, width, gamma, EPS),
        "LayerNorm": lambda x: F.layer_norm(x, width, gamma, beta, EPS),
    }
    if case.squash == "erf":
        return norms | {"Derf": lambda x: torch.erf(alpha * x + shift) * gamma + beta}

    def ours(x: Tensor) -> Tensor:
        t = inductor.squashed("tanh", held.alpha * x.float(), x.dtype)
        return (t * gamma.float() + beta.float()).to(x.dtype)

    return norms | {"DyT": lambda x: torch.tanh(alpha * x) * gamma + beta, "DyT of ours": ours}


def limit(case: Case) -> Way:
    """The memory's: a copy, or with a residual the bare add, each into a tensor of its own."""
    outputs: dict[int, Tensor] = {}

    def run(x: Tensor, residual: Tensor) -> Tensor:
        y = outputs.setdefault(x.data_ptr(), torch.empty_like(x))
        return torch.add(x, residual, out=y) if case.residual else y.copy_(x)

    return run


def wrong(case: Case, held: Weights, x: Tensor, residual: Tensor, found: Sequence[Tensor]) -> int:
    """How many of the plugin's results no error bound allows, in some of the rows."""
    base = "Derf" if case.squash == "erf" else "DyT"
    quantized = case.out != case.dtype
    name = f"{'Add' if case.residual else ''}{base}{'Quantize' if quantized else ''}"
    form = (FORMS | FUSED)[name]
    rows = torch.arange(0, case.rows, max(1, case.rows // CHECKED))
    given = {
        "x": x[rows], "alpha": held.alpha, "shift": held.shift, "gamma": held.gamma,
        "beta": held.beta, "y_scale": held.scale,
    }  # fmt: skip
    if case.residual:
        given["residual"] = residual[rows]
    inputs = {part: array(given[part]) for part in form.inputs}
    y, *sums = (array(each[rows]) for each in found)
    unlike = sum(int((total != added(inputs)).sum()) for total in sums)
    return int(outside(form, inputs, y).sum()) + unlike


def array(tensor: Tensor) -> npt.NDArray[Any]:
    """A tensor as NumPy knows it, with the dtypes of ml_dtypes."""
    name = str(tensor.dtype).removeprefix("torch.")
    bits = tensor.cpu().contiguous().view(torch.uint8).numpy()
    return bits.view(np.dtype(getattr(ml_dtypes, name, name))).reshape(tensor.shape)


def recorded(way: Way, sets: Sequence[tuple[Tensor, Tensor]]) -> torch.cuda.CUDAGraph:
    """Passes over the buffers in turn, as one graph."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            for x, residual in sets:
                way(x, residual)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    held: deque[object] = deque(maxlen=len(sets))  # or one piece of memory would take all results
    with torch.cuda.graph(graph, stream=stream):
        for each in range(PASSES):
            held.append(way(*sets[each % len(sets)]))
    return graph


def timed(graphs: Mapping[str, torch.cuda.CUDAGraph], rounds: int) -> dict[str, list[float]]:
    """Microseconds of a pass, round by round, each way in turn."""
    found: dict[str, list[float]] = {name: [] for name in graphs}
    for number in range(rounds + 2):
        for name, graph in graphs.items():
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            if number > 1:
                found[name].append(begin.elapsed_time(end) * 1e3 / PASSES)
    return found


@torch.no_grad()
def measure(library: ctypes.CDLL, case: Case, rounds: int) -> tuple[list[Timing], int]:
    """Every way of one case, and how many of the plugin's results are wrong."""
    torch.manual_seed(0)
    held, shape = weights(case), (case.rows, case.columns)
    make = partial(torch.randn, shape, device="cuda", dtype=DTYPES[case.dtype])
    sets = [(make(), make() if case.residual else torch.empty(0)) for _ in range(SETS)]
    plugin = plugin_way(library, case, held)
    unlike = wrong(case, held, *sets[0], plugin(*sets[0]))
    ways: dict[str, Way] = {"limit": limit(case), "plugin": plugin}
    for name, inside in functions(case, held).items():
        torch.compiler.reset()
        made = site(case, held, inside)
        ways[f"{name}, compiled"] = torch.compile(made, dynamic=False)
        if name in ("DyT", "Derf"):
            ways[f"{name}, eager"] = made
    times = timed({name: recorded(way, sets) for name, way in ways.items()}, rounds)
    types = f"{case.dtype}→{case.out}"
    return [
        Timing(case.title, types, way, statistics.median(each), quarters(each))
        for way, each in times.items()
    ], unlike


def main() -> None:
    """Measure, print a table a case, and write all as JSON; without a GPU one line and status 1."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.kernels", description=__doc__)
    parser.add_argument("-o", "--out", type=Path, default=RESULTS, help="JSON")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    given = parser.parse_args()
    if capability() is None or not torch.cuda.is_available():
        sys.exit("no NVIDIA GPU was found: nothing can be measured on this machine")
    console = Console(width=100)
    device = torch.cuda.get_device_name()
    known = next((each for each in DEVICES if each.name.split()[0] in device), None)
    found, unlike = [], 0
    with tempfile.TemporaryDirectory(prefix="gpu-kernels-") as folder:
        library = built(Path(folder))
        for case in CASES:
            timings, number = measure(library, case, given.rounds)
            unlike += number
            found += timings
            console.print(_table(timings))
            if known is not None:
                floor = predicted(Path(folder) / "libdyt_launch.so", case, known)
                console.print(f"predicted for {known.name}: {floor.time_us:.1f} us ({floor.bound})")
            torch.cuda.empty_cache()
    with replaced(given.out) as temporary:
        held = {
            "device": device, "torch": torch.__version__, "rounds": given.rounds,
            "rows": [asdict(each) for each in found],
        }  # fmt: skip
        temporary.write_text(json.dumps(held, indent=2) + "\n", encoding="utf-8")
    if unlike:
        sys.exit(f"{unlike} of the plugin's results are outside their error bounds")


def _table(timings: Sequence[Timing]) -> Table:
    table = Table(title=f"{timings[0].case}, {timings[0].types}", title_justify="left")
    for name in ("way", "µs", "quarters", "× limit", "× RMSNorm"):
        table.add_column(name, justify="left" if name == "way" else "right")
    by = {each.way: each.median_us for each in timings}
    for each in timings:
        low, high = each.quarters_us
        table.add_row(
            each.way, f"{each.median_us:.1f}", f"{low:.1f} to {high:.1f}",
            f"{each.median_us / by['limit']:.2f}",
            f"{each.median_us / by['RMSNorm, compiled']:.2f}",
        )  # fmt: skip
    return table


if __name__ == "__main__":
    main()
