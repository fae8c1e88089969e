"""Trains the digits ViT from scratch with LayerNorm and with Dynamic Tanh, side by side.

Prints the test accuracies, writes the loss curves (training.svg) and figures.json into the output
folder, and carries one of the models with DyT over losslessly, into an ONNX file.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from model import DigitsViT, images
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import nn
from train import EPOCHS, RATE, accuracy, train

import dyt_compile


@dataclass(frozen=True)
class Recipe:
    """alpha: where DyT's begins, None for LayerNorm; rate: the highest learning rate.

    length: how many times as many epochs as others.
    """

    alpha: float | None
    rate: float = RATE
    length: int = 1

    def __str__(self) -> str:
        norm = "LayerNorm" if self.alpha is None else f"DyT, α₀ {self.alpha:g}"
        if self == Recipe(self.alpha):
            return norm
        return f"{norm}, rate {self.rate:g}, {self.length} × the epochs"


RECIPES = [Recipe(None), Recipe(0.5), Recipe(1.0), Recipe(4.0, rate=4e-3, length=2)]
"""LayerNorm; DyT by the same recipe from the paper's alpha and from that of
`convert_for_training`; and DyT by the best recipe of those tried, which is in the README."""


@dataclass(frozen=True)
class Run:
    model: nn.Module
    losses: Sequence[float]
    accuracy: float
    seconds: float


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    parser.add_argument("--seeds", type=int, default=1, help="of weights, batches and split")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output-folder", type=Path, default=Path("build/digits"))
    return parser.parse_args()


def trained(recipe: Recipe, seed: int, epochs: int) -> Run:
    """A model of the same first weights and the same batches, whatever the recipe."""
    train_x, train_y, test_x, test_y = images(seed)
    torch.manual_seed(seed)
    model: nn.Module = DigitsViT()
    if recipe.alpha is not None:
        model = dyt_compile.convert_for_training(model, recipe.alpha)
    epochs *= recipe.length
    learning = train(model, train_x, train_y, epochs=epochs, rate=recipe.rate)
    started = time.perf_counter()
    losses = list(track(learning, f"{recipe}, seed {seed}", total=epochs))
    seconds = time.perf_counter() - started
    return Run(model.eval(), losses, accuracy(model, test_x, test_y), seconds)


def draw(runs: dict[Recipe, list[Run]], path: Path) -> None:
    """The training losses of the first seed, epoch by epoch."""
    import matplotlib as mpl

    mpl.use("Agg")
    mpl.rcParams["svg.hashsalt"] = "digits"
    from matplotlib import pyplot as plt

    figure, panel = plt.subplots(figsize=(7, 3.6), layout="constrained")
    for recipe, (run, *_) in runs.items():
        epochs = range(1, len(run.losses) + 1)
        panel.plot(epochs, run.losses, label=f"{recipe}: test accuracy {run.accuracy:.1%}")
    panel.set(xlabel="epoch", ylabel="training loss", title="Digits ViT from scratch")
    panel.legend()
    panel.grid(alpha=0.3)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def table(runs: dict[Recipe, list[Run]]) -> Table:
    made = Table("norm", "test accuracy", "by seed", "last training loss", "seconds")
    for recipe, found in runs.items():
        accuracies = [run.accuracy for run in found]
        made.add_row(
            str(recipe),
            f"{statistics.mean(accuracies):.1%}",
            " ".join(f"{each:.1%}" for each in accuracies),
            f"{statistics.mean(run.losses[-1] for run in found):.4f}",
            f"{sum(run.seconds for run in found):.0f}",
        )
    return made


def carried_over(model: nn.Module, folder: Path) -> dict[str, float]:
    """Convert a model that was trained with DyT in mode "exact", and say what differs.

    kept: how many of its tensors the converted model has, bit for bit; difference: the largest of
    the logits, on the test images; export_error: of the file, relative to the largest logit.
    """
    _, _, pixels, _ = images()
    result = dyt_compile.convert(model, example=(pixels[:2],), mode="exact", fold=False)
    exported = dyt_compile.export_onnx(result, folder / "dyt.onnx", opset=20)
    own, kept = model.state_dict(), result.model.state_dict()
    with torch.inference_mode():
        difference = (model(pixels) - result.model(pixels)).abs().max().item()
    return {
        "recognised": sum(site.kind == "dyt" for site in result.match.sites),
        "tensors": len(own),
        "kept": sum(name in kept and torch.equal(own[name], kept[name]) for name in own),
        "difference": difference,
        "export_error": exported.export_error,
    }


def main() -> None:
    options = arguments()
    folder: Path = options.output_folder
    folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(options.threads)
    runs = {
        recipe: [trained(recipe, seed, options.epochs) for seed in range(options.seeds)]
        for recipe in RECIPES
    }
    draw(runs, folder / "training.svg")
    exact = carried_over(runs[RECIPES[-1]][0].model, folder)
    figures = {
        "runs": {
            str(recipe): {
                "accuracy": [run.accuracy for run in found],
                "losses": [run.losses for run in found],
            }
            for recipe, found in runs.items()
        },
        "exact": exact,
    }
    (folder / "figures.json").write_text(json.dumps(figures, indent=2) + "\n")
    console = Console()
    console.print(table(runs))
    console.print(
        "mode exact: {recognised} DyT recognised, {kept} of {tensors} tensors kept bit for bit, "
        "logits differ by {difference:g}, those of the ONNX file by {export_error:.1g}".format(
            **exact
        )
    )
    console.print(f"wrote {folder}/training.svg, dyt.onnx, figures.json", soft_wrap=True)


if __name__ == "__main__":
    main()
