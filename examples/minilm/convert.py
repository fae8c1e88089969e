"""Converts the sentence encoder, and shows how far its embeddings move.

Writes model.onnx, report.html, report.json and figures.json into the output folder. The converted
embeddings are those of the ONNX file that it wrote, run by ONNX Runtime.
"""

from __future__ import annotations

import argparse
import json
import time
from functools import partial
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from model import Encoder, SentenceEncoder, calibration, compared, load
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.export import Dim

import dyt_compile

Batch = dict[str, Tensor]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mode", choices=["budget", "all"], default="budget")
    parser.add_argument("--max-error", type=float, default=0.05)
    parser.add_argument("--fit", choices=["auto", "diagonal", "full"], default="auto")
    parser.add_argument("--affine", action="store_true", help="sites may become affine maps")
    parser.add_argument("--from-onnx", action="store_true", help="convert an ONNX file instead")
    parser.add_argument("--output-folder", type=Path, default=Path("build/minilm"))
    return parser.parse_args()


def export_original(model: SentenceEncoder, example: Batch, path: Path) -> None:
    axes = {0: Dim.DYNAMIC, 1: Dim.DYNAMIC}
    torch.onnx.export(
        model,
        kwargs=example,
        f=path,
        opset_version=20,
        dynamo=True,
        dynamic_shapes=dict.fromkeys(example, axes),
        external_data=False,
        verbose=False,
    )


def as_numpy(batch: Batch) -> dict[str, np.ndarray]:
    return {name: values.numpy() for name, values in batch.items()}


def onnx_encoder(path: Path) -> Encoder:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda batch: torch.from_numpy(session.run(None, as_numpy(batch))[0])


def sites_table(report: dyt_compile.Report) -> Table:
    table = Table("site", "now", "fit", "fit error")
    for site in report.sites:
        fit_error = "" if site.fit_error is None else f"{site.fit_error:.3f}"
        table.add_row(site.name, site.now, site.fit or "", fit_error)
    return table


def main() -> None:
    options = arguments()
    folder: Path = options.output_folder
    folder.mkdir(parents=True, exist_ok=True)
    model, _, example = load()
    convert = partial(
        dyt_compile.convert,
        mode=options.mode,
        budget=options.max_error,
        metric="relative",
        fit=options.fit,
        affine=options.affine,
    )

    started = time.perf_counter()
    if options.from_onnx:
        export_original(model, example, folder / "original.onnx")
        result = convert(folder / "original.onnx", [as_numpy(batch) for batch in calibration()])
    else:
        result = convert(model, list(calibration()))
    exported = dyt_compile.export_onnx(result, folder / "model.onnx", opset=20)
    seconds = time.perf_counter() - started

    report = result.report
    for name in ("report.html", "report.json"):
        dyt_compile.write_report(report, folder / name, exported=exported)
    figures = {
        **compared(lambda batch: model(**batch), onnx_encoder(folder / "model.onnx")),
        "error": report.error,
        "budget": report.budget,
        "sites": len(report.sites),
        "converted": report.converted,
        "affine": report.affine,
        "fits": [site.fit for site in report.sites],
        "seconds": seconds,
    }
    (folder / "figures.json").write_text(json.dumps(figures, indent=2) + "\n")

    affine = f", {figures['affine']} to affine maps" if options.affine else ""
    console = Console()
    console.print(sites_table(report))
    console.print(
        f"held-out sentences: cosine similarity {figures['cosine_similarity']:.4f}, "
        f"nearest neighbour agreement {figures['nearest_neighbour_agreement']:.1%}; "
        f"{figures['converted']} of {figures['sites']} norms converted{affine}; "
        f"output error {report.error:.3f} (budget {options.max_error}, mode {options.mode})"
    )
    console.print(
        f"{seconds:.0f} s; wrote {folder}/model.onnx, report.html, report.json, figures.json",
        soft_wrap=True,
    )


if __name__ == "__main__":
    main()
