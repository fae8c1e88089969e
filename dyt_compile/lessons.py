"""Lessons: a converted model learns from the original what that has at some of its places."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .data import attention_mask
from .graphs.base import Batch
from .graphs.fx import FxGraph
from .graphs.fx_training import Weight, dyt_paths, learned, learning, parted, watching
from .losses import LOSSES, WEIGHTS, positions, relative
from .terms import Value

__all__ = ["Learner", "Lesson", "Material", "Share", "Teacher"]

KEPT_BYTES = 2 << 30
"""Of the original's values, which then need not be computed again in every epoch."""


@dataclass(frozen=True)
class Lesson:
    """What is learned from what.

    original, converted: the two models; pairs: values of both that should agree, in execution
    order; outputs: the output of both, which `metric` measures; train: "all" or "dyt"; about: what
    is told of it while it goes on.
    """

    original: FxGraph
    converted: FxGraph
    pairs: Sequence[tuple[Value, Value]]
    outputs: tuple[Value, Value]
    metric: str
    train: str
    about: str = ""

    @property
    def places(self) -> list[tuple[Value, Value]]:
        """All values that should agree, the output last."""
        return [*self.pairs, self.outputs]

    def trained(self) -> dict[str, torch.nn.Parameter]:
        """The parameters to train, by path."""
        found = learned(self.converted)
        if self.train == "all":
            return found
        own = dyt_paths(self.converted)
        return {path: tensor for path, tensor in found.items() if path in own}


@dataclass(frozen=True)
class Share:
    """What one rank learns from in a step, of the batch that all learn from.

    counts: False where there are fewer samples than ranks, and this one has another's.
    """

    load: Callable[[], Batch]
    counts: bool = True


@dataclass(frozen=True)
class Material:
    """A batch to learn from, what the original makes of it, and the positions of it that count.

    weights: float64 [places], by which its loss at each place counts beside that of other batches.
    """

    batch: Batch
    taught: Sequence[Tensor]
    mask: Tensor | None
    weights: Tensor


class Teacher:
    """What the original has where the converted model learns; kept, since batches come again."""

    def __init__(self, lesson: Lesson) -> None:
        self._graph = lesson.original
        self._metric = lesson.metric
        self._run = watching(lesson.original, [value for value, _ in lesson.places])
        self._kept: dict[int, list[Tensor]] = {}
        self._left_bytes = KEPT_BYTES

    def material(self, share: Share, number: int | None = None) -> Material:
        """What is learned of a rank's share; of one with a number the values are kept."""
        batch = share.load()
        taught = self(batch, number)
        counted = attention_mask(batch, self._graph)
        mask = None if counted is None else torch.from_numpy(counted).to(taught[-1].device)
        weights = [positions(f, mask) for f in taught[:-1]]
        weights.append(WEIGHTS[self._metric](taught[-1], mask))
        return Material(batch, taught, mask, torch.stack(weights) * share.counts)

    @torch.no_grad()
    def __call__(self, batch: Batch, number: int | None = None) -> list[Tensor]:
        """The values for a batch; of one with a number they are kept while there is room."""
        if number is not None and number in self._kept:
            return self._kept[number]
        made = list(self._run(*(batch[name] for name in self._graph.inputs)))
        size = sum(tensor.nbytes for tensor in made)
        if number is not None and size <= self._left_bytes:
            self._left_bytes -= size
            self._kept[number] = made
        return made


class Learner(torch.nn.Module):
    """The converted model over weights that are learned, which tells how far off it is.

    As a whole, or (cut) in parts that learn by themselves. bfloat16: as in `learning`. sharded: in
    parts that the ranks can gather one by one.
    """

    def __init__(
        self,
        lesson: Lesson,
        weights: Mapping[str, Weight],
        *,
        bfloat16: bool = False,
        sharded: bool = False,
    ) -> None:
        super().__init__()
        self._metric = lesson.metric
        self._inputs = list(lesson.converted.inputs)
        places = [value for _, value in lesson.places]
        student = learning(lesson.converted, places, weights, bfloat16=bfloat16)
        chain, parts = parted(student) if sharded else (student, [])
        self.parts = torch.nn.ModuleList(parts)
        own = {id(module) for module in self.parts.modules()}
        rest = {id(weight): weight for weight in weights.values() if id(weight) not in own}
        self.rest = torch.nn.ModuleList(rest.values())
        self.student = chain.forward  # no module of this one: what does not learn stays where it is

    def forward(self, material: Material, shares: Tensor, cut: bool) -> Tensor:
        """The error at the output and the mean error at the sites, a scalar.

        shares: [places], what each loss counts of that of all ranks.
        """
        *made, g = self.student(*(material.batch[name] for name in self._inputs), cut)
        *taught, f = material.taught
        loss = LOSSES[self._metric](f, g, material.mask) * shares[-1]
        if made:
            sites = [relative(a, b, material.mask) for a, b in zip(taught, made, strict=True)]
            loss = loss + (torch.stack(sites) * shares[:-1]).mean()
        return loss
