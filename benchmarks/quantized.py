"""Bounded INT8 against float32 and against ONNX Runtime's calibrated INT8: times and errors.

    python -m benchmarks.quantized --times          # ViT-B/16 of random weights, batch 1
    python -m benchmarks.quantized --errors         # digits ViT; trains the one with DyT first

Runs of all forms alternate in one process; a ratio is that of runs that followed each other.
"""

from __future__ import annotations

import argparse
import collections
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import nn

import dyt_compile
from dyt_compile.metrics import Tally

sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "digits"))

Run = Callable[[np.ndarray], np.ndarray]

PASSING = {"ReduceMean", "Gather", "Reshape", "Transpose", "Slice", "Squeeze", "Unsqueeze"}
PRODUCTS = {"MatMul", "Gemm"}
INTEGER = ("MatMulIntegerToFloat", "QGemm", "QLinearMatMul", "MatMulInteger")
CALIBRATION = 8
"""Batches for the peer, which needs data."""


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--times", action="store_true")
    parser.add_argument("--errors", action="store_true")
    parser.add_argument("--pairs", type=int, default=30)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--weights", type=Path, help="of the digits ViT with DyT, kept there")
    parser.add_argument(
        "--folder", type=Path, help="keeps the files of ViT-B, and takes them again"
    )
    return parser.parse_args()


class Reader:
    """Batches as ONNX Runtime's calibration reads them."""

    def __init__(self, name: str, batches: Iterable[np.ndarray]) -> None:
        self._feeds: Iterator[dict[str, np.ndarray]] = ({name: batch} for batch in batches)

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self._feeds, None)


def readers_of_norms(model: onnx.ModelProto) -> list[str]:
    """The names of the products that read a LayerNorm or a DyT, through views."""
    consumers = collections.defaultdict(list)
    for node in model.graph.node:
        for name in node.input:
            consumers[name].append(node)
    found = {}
    pending = [
        node.output[0]
        for node in model.graph.node
        if node.op_type == "LayerNormalization" or node.domain == "dyt"
    ]
    while pending:
        for node in consumers[pending.pop()]:
            if node.op_type in PRODUCTS:
                found[node.name] = None
            elif node.op_type in PASSING:
                pending.append(node.output[0])
    return list(found)


def peer(path: Path, batches: Iterable[np.ndarray]) -> Path:
    """ONNX Runtime's static INT8 (MinMax, per channel) of the products that read a norm.

    Their outputs stay in float, as with ours: that is the better of its two ways.
    """
    from onnxruntime import quantization

    model = onnx.load(path)
    target = path.with_name(f"peer-{path.name}")
    if target.exists():
        return target
    quantization.quantize_static(
        str(path),
        str(target),
        Reader(model.graph.input[0].name, batches),
        quant_format=quantization.QuantFormat.QDQ,
        per_channel=True,
        calibrate_method=quantization.CalibrationMethod.MinMax,
        nodes_to_quantize=readers_of_norms(model),
        extra_options={"OpTypesToExcludeOutputQuantization": sorted(PRODUCTS)},
    )
    return target


def onnxruntime_run(path: Path, threads: int) -> Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda x: session.run(None, {name: x})[0]


def onnxruntime_kernels(path: Path) -> str:
    """What ONNX Runtime's optimizer leaves of the file, as far as products go."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    with tempfile.TemporaryDirectory() as folder:
        optimized = Path(folder) / "optimized.onnx"
        options.optimized_model_filepath = str(optimized)
        onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        counts = collections.Counter(n.op_type for n in ir.load(optimized).graph)
    shown = (*INTEGER, "DequantizeLinear", "MatMul", "FusedMatMul", "Gemm")
    return ", ".join(f"{counts[name]} {name}" for name in shown if counts[name])


def openvino_run(path: Path, threads: int) -> Run:
    import openvino

    compiled = openvino.Core().compile_model(str(path), "CPU", _openvino_options(threads))
    return lambda x: compiled([x])[0]


def openvino_kernels(path: Path) -> str:
    """In which type OpenVINO's products run, read from its compiled model."""
    import openvino

    compiled = openvino.Core().compile_model(str(path), "CPU", _openvino_options(1))
    counts: collections.Counter[str] = collections.Counter()
    for node in compiled.get_runtime_model().get_ops():
        info = node.get_rt_info()
        kind = str(info["layerType"]) if "layerType" in info else ""
        if kind in ("FullyConnected", "MatMul", "Convolution"):
            counts[f"{kind} {info['runtimePrecision']}"] += 1
    return ", ".join(f"{count} {name}" for name, count in counts.items())


def _openvino_options(threads: int) -> dict[str, Any]:
    return {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": "f32"}


def runtimes() -> dict[str, tuple[Callable[[Path, int], Run], Callable[[Path], str]]]:
    import importlib.util

    found = {"onnxruntime": (onnxruntime_run, onnxruntime_kernels)}
    if importlib.util.find_spec("openvino") is not None:
        found["openvino"] = (openvino_run, openvino_kernels)
    return found


def exported(model: nn.Module, example: torch.Tensor, path: Path, **options: Any) -> Path:
    if path.exists():
        return path
    made = dyt_compile.convert(model, example=(example,), mode="exact", **options)
    return dyt_compile.export_onnx(made, path).path


def forms(norms: nn.Module, dyt: nn.Module, batches: list[torch.Tensor], folder: Path) -> dict:
    """The files to compare; the first is what the ratios are against."""
    example = batches[0][:2]
    original = exported(norms, example, folder / "norms.onnx")
    calibration = [batch.numpy() for batch in batches]
    return {
        "norms, float32": original,
        "DyT folded, float32": exported(dyt, example, folder / "dyt.onnx", fold=True),
        "DyT, bounded INT8": exported(
            dyt, example, folder / "int8.onnx", fold=True, quantize="int8"
        ),
        "norms, calibrated INT8 (peer)": peer(original, calibration),
    }


def times(pairs: int, threads: int, kept: Path | None, console: Console) -> None:
    import timm

    torch.manual_seed(0)
    norms = timm.create_model("vit_base_patch16_224", pretrained=False).eval()
    dyt = dyt_compile.convert_for_training(norms, 0.5).eval()
    batches = [torch.randn(2, 3, 224, 224) for _ in range(CALIBRATION)]
    x = torch.randn(1, 3, 224, 224).numpy()
    with tempfile.TemporaryDirectory() as folder:
        files = forms(norms, dyt, batches, kept or Path(folder))
        for runtime, (load, kernels) in runtimes().items():
            runs = {name: load(path, threads) for name, path in files.items()}
            seconds = alternated(runs, x, pairs)
            told = {name: kernels(path) for name, path in files.items()}
            console.print(times_table(runtime, seconds, told, threads))


def alternated(runs: Mapping[str, Run], x: np.ndarray, pairs: int) -> dict[str, list[float]]:
    """Seconds of every form, one after the other, so many times over, after three unmeasured."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for turn in track(range(pairs + 3), "timing"):
        for name, run in runs.items():
            start = time.perf_counter()
            run(x)
            if turn >= 3:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def times_table(
    runtime: str, seconds: Mapping[str, list[float]], kernels: Mapping[str, str], threads: int
) -> Table:
    first = next(iter(seconds.values()))
    pairs, threads_told = len(first), f"{threads} thread{'s' * (threads > 1)}"
    table = Table("form", "ratio", "quartiles", "products", title=f"{runtime}, {threads_told}")
    for name, found in seconds.items():
        ratios = [a / b for a, b in zip(found, first, strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4) if pairs > 1 else ratios * 3
        table.add_row(name, f"{middle:.3f}", f"{low:.3f} to {high:.3f}", kernels[name])
    table.caption = f"time over that of the first row; medians of {pairs} alternating runs"
    return table


def digits_with_dyt(weights: Path | None) -> nn.Module:
    """The digits ViT trained with DyT, from `weights`, else by the best recipe of the example."""
    from from_scratch import EPOCHS, RECIPES, trained
    from model import DigitsViT
    from safetensors.torch import load_file, save_file

    recipe = RECIPES[-1]
    if weights is not None and weights.exists():
        model = dyt_compile.convert_for_training(DigitsViT(), recipe.alpha)
        model.load_state_dict(load_file(weights))
        return model.eval()
    model = trained(recipe, 0, EPOCHS).model
    if weights is not None:
        save_file({k: v.contiguous() for k, v in model.state_dict().items()}, weights)
    return model


def errors(weights: Path | None, console: Console) -> None:
    from model import images, load

    norms, _ = load()
    dyt = digits_with_dyt(weights)
    training, _, test, labels = images()
    batches = list(training.split(64))[:CALIBRATION]
    table = Table(
        "model", "INT8", "error of quantising", "accuracy before", "after", title="digits ViT"
    )
    with tempfile.TemporaryDirectory() as name:
        files = forms(norms, dyt, batches, Path(name))
        plain, bounded, original, calibrated = (
            files[key] for key in ("DyT folded, float32", "DyT, bounded INT8", *_peer_keys(files))
        )
        rows = (
            ("DyT, trained", "bounded, no data", plain, bounded),
            (
                "DyT, trained",
                "calibrated (MinMax)",
                plain,
                peer(plain, [b.numpy() for b in batches]),
            ),
            ("LayerNorm, trained", "calibrated (MinMax): the peer", original, calibrated),
        )
        for model, how, before, after in rows:
            f, g = (onnxruntime_run(path, 1)(test.numpy()) for path in (before, after))
            tally = Tally("relative")
            tally.add(f, g)
            error = tally.measurement()
            right = [f"{(y.argmax(1) == labels.numpy()).mean():.1%}" for y in (f, g)]
            cost = f"{error.error:.2%} ± {error.standard_error:.2%}"
            table.add_row(model, how, cost, *right)
    console.print(table)


def _peer_keys(files: Mapping[str, Path]) -> tuple[str, str]:
    names = list(files)
    return names[0], names[-1]


def main() -> None:
    options = arguments()
    torch.set_num_threads(options.threads)
    console = Console()
    if options.errors or not options.times:
        errors(options.weights, console)
    if options.times or not options.errors:
        times(options.pairs, options.threads, options.folder, console)


if __name__ == "__main__":
    main()
