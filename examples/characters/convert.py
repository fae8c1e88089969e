"""Converts the character GPT, and shows what that costs on text that it has not seen.

Writes model.onnx, report.html, report.json and figures.json into the output folder.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

from model import calibration, compared, load
from rich.console import Console
from rich.table import Table

import dyt_compile


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mode", choices=["budget", "all"], default="budget")
    parser.add_argument("--max-error", type=float, default=0.01, help="KL, nats a character")
    parser.add_argument("--fit", choices=["auto", "diagonal", "full"], default="auto")
    parser.add_argument("--affine", action="store_true", help="sites may become affine maps")
    parser.add_argument("--output-folder", type=Path, default=Path("build/characters"))
    return parser.parse_args()


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
    model, _ = load()

    started = time.perf_counter()
    result = dyt_compile.convert(
        model,
        list(calibration()),
        mode=options.mode,
        budget=options.max_error,
        metric="kl",
        fit=options.fit,
        affine=options.affine,
    )
    exported = dyt_compile.export_onnx(result, folder / "model.onnx", opset=20)
    seconds = time.perf_counter() - started

    report = result.report
    for name in ("report.html", "report.json"):
        dyt_compile.write_report(report, folder / name, exported=exported)
    figures = {
        **compared(model, result.model),
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
        f"held-out text: KL {figures['kl']:.4f} nats a character, loss "
        f"{figures['loss_before']:.3f} before, {figures['loss_after']:.3f} after; "
        f"{figures['converted']} of {figures['sites']} norms converted{affine}; "
        f"KL on the report's samples {report.error:.4f} (budget {options.max_error}, "
        f"mode {options.mode})"
    )
    console.print(
        f"{seconds:.0f} s; wrote {folder}/model.onnx, report.html, report.json, figures.json",
        soft_wrap=True,
    )


if __name__ == "__main__":
    main()
