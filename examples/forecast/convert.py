"""Converts the forecaster, and shows what that costs in the error of its forecasts.

Writes model.onnx, report.html, report.json and figures.json into the output folder. The converted
forecasts are those of the ONNX file that it wrote, run by ONNX Runtime, on windows of the year
after the calibration year.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from model import (
    TEST_YEARS,
    Network,
    calibration,
    forecasts,
    load,
    quality,
    seasonal_naive,
    windows,
)
from rich.console import Console
from rich.table import Table
from torch import Tensor

import dyt_compile


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mode", choices=["budget", "all"], default="budget")
    parser.add_argument("--max-error", type=float, default=0.05)
    parser.add_argument("--output-folder", type=Path, default=Path("build/forecast"))
    return parser.parse_args()


def onnx_network(path: Path) -> Network:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

    def run(values: Tensor, observed: Tensor) -> Tensor:
        inputs = {"values": values.numpy(), "observed": observed.numpy()}
        return torch.from_numpy(session.run(None, inputs)[0])

    return run


def sites_table(report: dyt_compile.Report) -> Table:
    table = Table("site", "now", "fit error")
    for site in report.sites:
        fit_error = "" if site.fit_error is None else f"{site.fit_error:.3f}"
        table.add_row(site.name, "DyT" if site.converted else "norm", fit_error)
    return table


def quality_table(qualities: dict[str, dict[str, float]]) -> Table:
    table = Table("forecast", "mean absolute error", "pinball loss")
    for name, found in qualities.items():
        table.add_row(name, f"{found['mae']:.1f}", f"{found['pinball']:.1f}")
    return table


def main() -> None:
    options = arguments()
    folder: Path = options.output_folder
    folder.mkdir(parents=True, exist_ok=True)
    model, _ = load()

    started = time.perf_counter()
    result = dyt_compile.convert(
        model, list(calibration()), mode=options.mode, budget=options.max_error, metric="relative"
    )
    exported = dyt_compile.export_onnx(result, folder / "model.onnx", opset=20)
    seconds = time.perf_counter() - started

    contexts, truth = (part.reshape(-1, part.shape[-1]) for part in windows(TEST_YEARS))
    before = forecasts(model, contexts)
    after = forecasts(onnx_network(folder / "model.onnx"), contexts)
    qualities = {
        "seasonal naive": quality(seasonal_naive(contexts), truth),
        "original": quality(before, truth),
        "converted": quality(after, truth),
    }
    report = result.report
    for name in ("report.html", "report.json"):
        dyt_compile.write_report(report, folder / name, exported=exported)
    figures = {
        "quality": qualities,
        "test_error": float(np.linalg.norm(after - before) / np.linalg.norm(before)),
        "error": report.error,
        "budget": report.budget,
        "sites": len(report.sites),
        "converted": sum(site.converted for site in report.sites),
        "seconds": seconds,
    }
    (folder / "figures.json").write_text(json.dumps(figures, indent=2) + "\n")

    console = Console()
    console.print(sites_table(report))
    console.print(quality_table(qualities))
    console.print(
        f"{len(truth)} test windows, pedestrians an hour; forecasts moved by "
        f"{figures['test_error']:.3f}; {figures['converted']} of {figures['sites']} norms "
        f"converted; output error {report.error:.3f} (budget {options.max_error}, "
        f"mode {options.mode})"
    )
    console.print(
        f"{seconds:.0f} s; wrote {folder}/model.onnx, report.html, report.json, figures.json",
        soft_wrap=True,
    )


if __name__ == "__main__":
    main()
