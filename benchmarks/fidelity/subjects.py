"""The models, their data by seed, and the figures that they are held to."""

from __future__ import annotations

import random
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from dyt_compile.files import replaced
from examples.characters import model as characters
from examples.digits import model as digits
from examples.forecast import model as forecast
from examples.minilm import model as minilm

__all__ = ["HELD", "SUBJECTS", "Figure", "Subject"]

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Bar:
    """What a figure should reach: the floor is held, the goal is aimed at."""

    floor: float
    goal: float | None = None


@dataclass(frozen=True)
class Figure:
    """One held-out figure of a converted model.

    value: from what `compared` gives; form: how a number is written; higher: whether that is
    better; bars: by stage, "training_free" or "recovered".
    """

    title: str
    value: Callable[[Mapping[str, float]], float]
    form: str
    bars: Mapping[str, Bar]
    higher: bool = False

    def holds(self, value: float, limit: float) -> bool:
        """Whether a value reaches a limit."""
        return value >= limit if self.higher else value <= limit


@dataclass(frozen=True)
class Subject:
    """A trained model.

    batches: by seed, to fit on, and to learn from where `lessons` gives no more; compared: held-out
    figures of a converted model beside the original, by seed; train: the script that makes the
    weights of another seed than 0, None where they are a third party's.
    """

    title: str
    metric: str
    load: Callable[..., Any]
    batches: Callable[[int], list[Any]]
    compared: Callable[[nn.Module, nn.Module, int], dict[str, float]]
    figures: tuple[Figure, ...]
    train: Path | None = None
    lessons: Callable[[int], list[Any]] | None = None

    def model(self, seed: int, weights: Path) -> nn.Module:
        """The original: the example's for seed 0; trained from another seed on its own split.

        weights: where those are kept, and found again.
        """
        if self.train is None or seed == 0:
            model: nn.Module = self.load()[0]
            return model
        if not weights.is_file():
            with replaced(weights) as temporary:
                command = [str(self.train), "--seed", str(seed), "--output", str(temporary)]
                subprocess.run([sys.executable, *command], check=True)
        trained: nn.Module = self.load(weights)[0]
        return trained


def _figure(name: str) -> Callable[[Mapping[str, float]], float]:
    return lambda found: found[name]


def _points_lost(found: Mapping[str, float]) -> float:
    return 100 * (found["accuracy_before"] - found["accuracy_after"])


def _loss_added(found: Mapping[str, float]) -> float:
    return found["loss_after"] - found["loss_before"]


def _sentences(seed: int, more: int = 2500) -> list[dict[str, Any]]:
    """Batches of all calibration sentences, and of as many or fewer `more` of docstrings."""
    return minilm.mixed(minilm.sentences(seed)[0] + minilm.docstrings(seed)[:more], seed)


def _all_sentences(seed: int) -> list[dict[str, Any]]:
    """Learning takes up more than the fits, whose time grows with the sentences."""
    return _sentences(seed, more=12_000)


def _windows(seed: int) -> list[Any]:
    found = list(forecast.calibration())
    return random.Random(seed).sample(found, len(found))


def _forecast(original: nn.Module, converted: nn.Module, seed: int) -> dict[str, float]:
    return forecast.compared(original, converted)  # another year, whatever the seed


def _embedded(original: nn.Module, converted: nn.Module, seed: int) -> dict[str, float]:
    return minilm.compared(lambda batch: original(**batch), lambda batch: converted(**batch), seed)


SUBJECTS = {
    "digits": Subject(
        "digits ViT, 9 LayerNorms",
        "relative",
        digits.load,
        digits.batches,
        digits.compared,
        (
            Figure("accuracy lost, points", _points_lost, ".2f", {"training_free": Bar(2.0)}),
            Figure(
                "relative error",
                _figure("relative_error"),
                ".3f",
                {"training_free": Bar(0.17, 0.05), "recovered": Bar(0.09, 0.02)},
            ),
            Figure(
                "agreement",
                _figure("agreement"),
                ".1%",
                {"recovered": Bar(0.985)},
                higher=True,
            ),
        ),
        ROOT / "examples/digits/train.py",
    ),
    "minilm": Subject(
        "MiniLM sentence encoder, 13 LayerNorms",
        "cosine",
        minilm.load,
        _sentences,
        _embedded,
        (
            Figure(
                "cosine",
                _figure("cosine_similarity"),
                ".4f",
                {"training_free": Bar(0.86, 0.95), "recovered": Bar(0.975, 0.99)},
                higher=True,
            ),
            Figure(
                "nearest neighbour kept",
                _figure("nearest_neighbour_agreement"),
                ".1%",
                {"recovered": Bar(0.74, 0.90)},
                higher=True,
            ),
            Figure("relative error", _figure("relative_error"), ".3f", {}),
        ),
        lessons=_all_sentences,
    ),
    "characters": Subject(
        "character GPT, 9 RMSNorms",
        "kl",
        characters.load,
        characters.batches,
        characters.compared,
        (
            Figure(
                "KL, nats a character",
                _figure("kl"),
                ".4f",
                {"training_free": Bar(0.095, 0.03), "recovered": Bar(0.018, 0.005)},
            ),
            Figure("loss added, nats", _loss_added, ".4f", {}),
            Figure("relative error", _figure("relative_error"), ".3f", {}),
        ),
        ROOT / "examples/characters/train.py",
    ),
    "forecast": Subject(
        "Fracast-0 forecaster, 36 calls of 8 RMSNorms",
        "relative",
        forecast.load,
        _windows,
        _forecast,
        (
            Figure("pinball loss", _figure("pinball_after"), ".1f", {}),
            Figure("relative error", _figure("relative_error"), ".3f", {}),
        ),
    ),
}

HELD = tuple(
    name for name, subject in SUBJECTS.items() if any(figure.bars for figure in subject.figures)
)
"""Models that are held to something; no choice was made with a look at the others."""
