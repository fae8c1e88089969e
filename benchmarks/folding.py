"""What folding does to the architectures of the matrix: `python -m benchmarks.folding`.

Every norm becomes DyT with random values, in torch and in an ONNX file; then gamma and beta fold.
Counts what is left, and by how much the outputs move. Writes benchmarks/results/folding.json after
each system; systems that stand there already stay, but for those of --only. No figure of quality.
"""

from __future__ import annotations

import argparse
import json
import re
import tempfile
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

import dyt_compile
from dyt_compile.calibration import Calibration, SiteFit
from dyt_compile.dyt import DytParameters
from dyt_compile.errors import first_line
from dyt_compile.files import replaced
from dyt_compile.graphs.base import Graph
from dyt_compile.passes.calibrate import fingerprint
from dyt_compile.passes.capture import capture
from dyt_compile.passes.fold import Folded
from dyt_compile.passes.match import match
from dyt_compile.runtime import Session
from dyt_compile.sites import NormSite

from .matrix.routes import Subject
from .matrix.systems import SYSTEMS

RESULTS = Path(__file__).parent / "results/folding.json"
ULP = 2.0**-23
"""Of float32: the distance from 1 to the next number."""


def calibration(graph: Graph) -> Calibration:
    """Random DyT for every norm, nothing neutral in it; calls of a module share theirs."""
    found = match(graph)
    random = np.random.default_rng(0)
    fits: dict[str, SiteFit] = {}
    for site in (site for site in found.sites if not site.kind.lossless):
        fits[site.name] = fits[site.tied_to] if site.tied_to else SiteFit(drawn(site, random), 0.0)
    own = fingerprint(graph, found)
    return Calibration(MappingProxyType(fits), own, frozenset(fits))


def drawn(site: NormSite, random: np.random.Generator) -> DytParameters:
    """Values of the size that fits have."""
    shape = site.parameter_shape
    return DytParameters(
        alpha=random.uniform(0.3, 1.0, 1).astype(np.float32),
        gamma=random.uniform(0.5, 1.5, shape).astype(np.float32),
        beta=random.normal(0, 0.3, shape).astype(np.float32),
    )


def row(name: str, folder: Path) -> dict[str, Any]:
    """The figures of one system."""
    subject = Subject(SYSTEMS[name], folder)
    program = subject.program
    fits = calibration(capture(program, (), {}))
    example = (subject.inputs.args, subject.inputs.kwargs)
    loose = dyt_compile.convert(program, calibration=fits, example=example, fold=False)
    folded = dyt_compile.fold(loose.model, *example)
    made = ran(loose.model, example)
    told = {"torch": figures(folded, made, ran(folded.model, example))}
    written = dyt_compile.export_onnx(loose, folder / "loose.onnx")
    again = dyt_compile.fold(written.path)
    batch = loose.graph.bind(example)
    feeds = [batch[value].numpy() for value in again.graph.inputs]
    runs = (Session(capture(written.path, (), {}).model, "cpu"), Session(again.model, "cpu"))
    before, after = ([torch.from_numpy(y) for y in run.run(feeds)] for run in runs)
    told["onnx"] = figures(again, before, after)
    return {"sites": len(fits.fits), **told, "runtimes_ulp": moved(made, before)}


def ran(model: Any, example: tuple[Any, Any]) -> list[Tensor]:
    with torch.no_grad():
        made = model(*example[0], **example[1])
    return [leaf for leaf in torch.utils._pytree.tree_leaves(made) if isinstance(leaf, Tensor)]


def figures(folded: Folded, before: Sequence[Tensor], after: Sequence[Tensor]) -> dict[str, Any]:
    """What is left at the sites, why, and the largest difference in units of rounding."""
    sites = [site for site in match(folded.graph).sites if site.kind.lossless]
    left = Counter(what for site in sites for what in site.affine)
    names = {site.name for site in sites}
    reasons = Counter(plain(entry.reason) for entry in folded.left if entry.name in names)
    return {
        "ulp": moved(before, after),
        "operators": [4 * len(sites), 2 * len(sites) + sum(left.values())],
        "left": dict(left),
        "reasons": dict(reasons.most_common()),
    }


def moved(before: Sequence[Tensor], after: Sequence[Tensor]) -> float:
    """The largest difference, in units of rounding of the largest value of its output."""
    found = [
        float((a - b).abs().max() / b.abs().max() / ULP)
        for a, b in zip(after, before, strict=True)
        if b.is_floating_point() and b.numel() and b.abs().max() > 0
    ]
    return round(max(found, default=0.0), 1)


def plain(reason: str) -> str:
    """A reason without the names of nodes."""
    return " ".join(re.sub(r"`[^`]*`", "", reason).split())


def table(rows: dict[str, Any]) -> Table:
    """One line a system. runtimes: how far the unfolded one is from itself in ONNX Runtime."""
    made = Table("system", "sites", "γ, β left", "operators", "torch", "ONNX", "runtimes", "why")
    for name, told in rows.items():
        if "error" in told:
            made.add_row(name, *[""] * 6, told["error"])
            continue
        known, onnx = told["torch"], told["onnx"]
        before, after = known["operators"]
        made.add_row(
            name, str(told["sites"]),
            f"{known['left'].get('gamma', 0)}, {known['left'].get('beta', 0)}",
            f"{before} → {after}", str(known["ulp"]), str(onnx["ulp"]),
            str(told["runtimes_ulp"]), next(iter(known["reasons"]), ""),
        )  # fmt: skip
    return made


def tried(name: str) -> dict[str, Any]:
    """The row of a system; of one that a tool does not take, the error."""
    with tempfile.TemporaryDirectory(prefix="folding-") as folder:
        try:
            return row(name, Path(folder))
        except Exception as error:  # noqa: BLE001 - the table shows the failures of any code
            return {"error": f"{type(error).__name__}: {first_line(error)}"}


def run(names: Iterable[str], results: Path) -> dict[str, Any]:
    """Take systems one after another; the results are written after each."""
    rows = json.loads(results.read_text()) if results.exists() else {}
    for name in names:
        rows[name] = tried(name)
        Console().print(table({name: rows[name]}))
        with replaced(results) as temporary:
            temporary.write_text(json.dumps(rows, indent=1, ensure_ascii=False) + "\n")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.folding", description=__doc__)
    parser.add_argument("--only", metavar="REGEX", default="", help="systems whose name matches")
    asked = parser.parse_args()
    known = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    names = [name for name in SYSTEMS if re.search(asked.only, name)]
    Console().print(table(run([n for n in names if asked.only or n not in known], RESULTS)))


if __name__ == "__main__":
    main()
