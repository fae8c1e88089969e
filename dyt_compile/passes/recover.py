"""Recover: the converted model learns from the original, on inputs without labels.

First block by block: at every site the gradient is cut, so that each part learns to make of what
it gets what the original has there. Then end to end: the error at the output, and that at the
sites. The original is run beside it, and neither its weights nor the given graph's are written to.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..checkpoints import load_checkpoint, save_checkpoint
from ..errors import OptionError
from ..graphs.fx import FxGraph
from ..graphs.fx_training import Weight
from ..lessons import Learner, Lesson, Share, Teacher
from ..metrics import Measurement
from ..progress import track
from ..ranks import ALONE, current
from ..rates import highest_rate, rate_factor
from ..run_progress import Limit, Progress, best_place
from ..shards import like, whole

__all__ = ["Course", "Recovered", "recover"]

BLOCKWISE = 0.05
"""The share of a run that learns block by block. On the digits ViT, 250 steps, more did not pay: a
fifth ended at an error of .116, none at .113. Not measured on models of many blocks."""

TICKS = 100
EVERY = 10
"""Ticks between two evaluations on held-out samples, each of which is followed by a checkpoint."""

PATIENCE = 5
"""Evaluations without a better one before the run ends. The weights that came in do not count as
one: from a good fit the error first rises, and falls below it only as the rate falls."""

BFLOAT16_TOLERANCE = 0.05
"""How much of the first loss bfloat16 may change, for the products to be computed in it."""

CLIP = 1.0
Measure = Callable[[FxGraph], Measurement]


Course = Sequence[tuple[float, Callable[[FxGraph | None], Lesson]]]
"""The stages of a run: up to which share of it each one goes, and what makes its lesson of the
graph that the stage before ended with."""


@dataclass(frozen=True)
class Recovered:
    """A graph with the best weights of the run's last stage, and the run.

    curve: (share of the run, held-out error); stages: where in the curve each stage begins;
    seconds: of wall time, those of a run that this one went on from included.
    """

    graph: FxGraph
    curve: tuple[tuple[float, float], ...]
    stages: tuple[int, ...]
    steps: int
    seconds: float


def recover(
    course: Course,
    shares: Sequence[Share],
    measure: Measure,
    limit: Limit,
    *,
    seed: int,
    checkpoint: Path | None = None,
    sharded: bool = False,
) -> Recovered:
    """Train copies of the converted graph's weights; the given graphs stay as they are.

    shares: this rank's of the batches to learn from; measure: the held-out error, by which the
    weights that a stage ends with are chosen, those that came in among them. checkpoint: written by
    the first rank at every evaluation; a run goes on from it where it exists. With a limit in steps
    the result depends on nothing but the arguments; on the number of ranks up to rounding. sharded:
    each rank holds a part of what is learned.

    Raises OptionError where there is nothing to train, CalibrationError for a checkpoint that is
    damaged or of another run.
    """
    lesson = course[0][1](None)
    name = _fingerprint(lesson, [end for end, _ in course], seed)
    progress, tensors = _loaded(checkpoint, name)
    teacher = Teacher(lesson)
    graph = lesson.converted
    for number, (end, lesson_of) in enumerate(course):
        if number:
            lesson = lesson_of(graph)
            graph = lesson.converted
        if number < len(progress.stages) - 1:
            continue  # it is over: the checkpoint has the weights of a later one
        run = _Run(lesson, teacher, progress, seed, shares[0], sharded=sharded)
        if number < len(progress.stages):
            run.load(tensors)
        else:
            run.begin(measure, limit)
        for done in track(run.learn(shares, limit, end), run.told, run.ticks(end)):
            if done is not None:
                run.evaluate(measure, done)
                if checkpoint is not None:
                    _save(checkpoint, name, progress, run)
                if run.hopeless:
                    break
        graph = run.graph()
    return Recovered(
        graph, tuple(progress.curve), tuple(progress.stages), progress.steps, progress.elapsed()
    )


def _loaded(checkpoint: Path | None, run: str) -> tuple[Progress, dict[str, Tensor]]:
    """How far a run got before, on all ranks; the file need lie where the first rank is alone.

    Raises OptionError where the ranks are not of one run.
    """
    ranks = current()
    if len(set(ranks.gathered(run))) > 1:
        raise OptionError(
            "the ranks were given models of different weights; allowed: the same on each, so load "
            "it, or seed what makes it"
        )
    held: dict[str, Any] | None = None
    tensors: dict[str, Tensor] = {}
    if not ranks.number and checkpoint is not None and checkpoint.is_file():
        held, tensors = load_checkpoint(checkpoint, run)
    held = ranks.first(lambda: held)
    return Progress() if held is None else Progress.of(held), ranks.tensors(lambda: tensors)


def _save(checkpoint: Path, name: str, progress: Progress, run: _Run) -> None:
    tensors = run.tensors()  # which tells progress the scale, too
    current().first(lambda: save_checkpoint(checkpoint, name, progress.held(), tensors))


class _Run:
    """A stage's weights on their way: float32 masters, their optimizer, and the best ones."""

    def __init__(
        self,
        lesson: Lesson,
        teacher: Teacher,
        progress: Progress,
        seed: int,
        share: Share,
        *,
        sharded: bool = False,
    ) -> None:
        self._lesson = lesson
        self._teacher = teacher
        self._progress = progress
        self._seed = seed
        self._ranks = current()
        self._given = lesson.trained()
        self._weights = _weights(self._given)
        first = {id(weight): path for path, weight in reversed(self._weights.items())}
        self._distinct = {path: self._weights[path] for path in first.values()}
        rates = {path: highest_rate(path, weight.master) for path, weight in self._distinct.items()}
        self._device = next(iter(self._given.values())).device.type
        bfloat16 = self._ranks.first(lambda: self._bfloat16_serves(share))
        learner = Learner(lesson, self._weights, bfloat16=bfloat16, sharded=sharded)
        self._learner = self._ranks.adding(learner, learner.parts if sharded else None)
        self._best = self._copied()
        self._measured = {
            path: torch.nn.Parameter(torch.empty_like(self._given[path])) for path in self._distinct
        }
        self._graph = lesson.converted.with_weights(
            {path: self._measured[first[id(weight)]] for path, weight in self._weights.items()}
        )
        groups = [{"params": [self._distinct[p].master], "lr": rate} for p, rate in rates.items()]
        self._optimizer = torch.optim.AdamW(groups, weight_decay=0.0, fused=True)
        narrow = any(tensor.dtype is torch.float16 for tensor in self._given.values())
        self._scaler = torch.amp.GradScaler(self._device, enabled=narrow)

    @property
    def hopeless(self) -> bool:
        """Whether nothing became better for a while."""
        errors = self._progress.errors()[1:]
        return len(errors) - 1 - best_place(errors) >= PATIENCE

    def told(self) -> str:
        """The run in words."""
        return f"recovering{self._lesson.about}, held-out error {self._progress.curve[-1][1]:.4g}"

    def ticks(self, end: float) -> int:
        """In how many parts the stage is shown."""
        return max(1, round(TICKS * (end - self._progress.began)))

    def begin(self, measure: Measure, limit: Limit) -> None:
        """Begin the stage."""
        progress = self._progress
        progress.began = self._share(limit)
        progress.stages.append(len(progress.curve))
        progress.rates = [group["lr"] for group in self._optimizer.param_groups]
        self.evaluate(measure, progress.began)

    def learn(self, shares: Sequence[Share], limit: Limit, end: float) -> Iterator[float | None]:
        """Learn until `end`, a share of the run; give the share where it is time to evaluate.

        A stage whose end is past when it begins learns nothing.
        """
        progress, order = self._progress, self._order(len(shares))
        ticks, width = self.ticks(end), end - progress.began

        def part() -> float:
            share = self._share(limit)
            return 1.0 if share >= end else max(0.0, (share - progress.began) / width)

        for tick in range(math.floor(part() * ticks) + 1, ticks + 1):
            while (done := part()) < tick / ticks:
                number = next(order)
                self._step(number, shares[number], done)
            time_is_up = tick % EVERY == 0 or tick == ticks
            yield progress.began + width * tick / ticks if time_is_up else None

    def _share(self, limit: Limit) -> float:
        """How much of the run is over; where time tells, by the first rank's clock."""
        progress = self._progress
        ranks = self._ranks if limit.steps is None else ALONE
        return ranks.first(lambda: limit.share(progress.elapsed(), progress.steps))

    def _order(self, batches: int) -> Iterator[int]:
        """Numbers of batches without end, from where the run is; each epoch has its own order."""
        while True:
            order = np.random.default_rng((self._seed, self._progress.epoch)).permutation(batches)
            for number in order[self._progress.taken :].tolist():
                self._progress.taken += 1
                yield number
            self._progress.epoch += 1
            self._progress.taken = 0

    def _step(self, number: int, share: Share, done: float) -> None:
        """Learn from the batch of that number, each rank from its share; done: of the stage."""
        progress = self._progress
        for group, rate in zip(self._optimizer.param_groups, progress.rates, strict=True):
            group["lr"] = rate * rate_factor(progress.steps, done)
        self._optimizer.zero_grad(set_to_none=True)
        material = self._teacher.material(share, number)
        shares = self._ranks.shares(material.weights).float()
        with self._ranks.meeting():
            loss = self._learner(material, shares, cut=done < BLOCKWISE)
            self._scaler.scale(loss).backward()
        self._scaler.unscale_(self._optimizer)
        torch.nn.utils.clip_grad_norm_(self._masters().values(), CLIP)
        self._scaler.step(self._optimizer)
        self._scaler.update()
        progress.steps += 1

    def evaluate(self, measure: Measure, share: float) -> None:
        """Measure the weights as they would be returned, and keep them if they are the best."""
        error = measure(self._with(self._masters())).error
        self._progress.curve.append((share, error))
        errors = self._progress.errors()
        if best_place(errors) == len(errors) - 1:
            self._best = self._copied()

    def tensors(self) -> dict[str, Tensor]:
        """All that the stage needs to go on, on the first rank; {} on the others."""
        held = {f"best/{path}": tensor for path, tensor in self._best.items()}
        for path, master in self._masters().items():
            held[f"weight/{path}"] = master
            state = self._optimizer.state.get(master, {})
            held |= {f"{kind}/{path}": tensor for kind, tensor in state.items()}
        self._progress.scale = self._scaler.get_scale()
        every = ((name, whole(tensor)) for name, tensor in held.items())
        return {name: tensor for name, tensor in every if not self._ranks.number}

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Go on from what `tensors` gave."""
        if self._scaler.is_enabled():
            self._scaler.load_state_dict(
                self._scaler.state_dict() | {"scale": self._progress.scale}
            )
        masters = self._masters()
        for path, master in masters.items():
            with torch.no_grad():
                master.copy_(like(tensors.pop(f"weight/{path}"), master))
            self._best[path].copy_(like(tensors.pop(f"best/{path}"), master))
        for key, tensor in tensors.items():
            kind, _, path = key.partition("/")
            own = tensor if kind == "step" else like(tensor, masters[path])
            self._optimizer.state[masters[path]][kind] = own

    def graph(self) -> FxGraph:
        """The best weights in a graph of their own."""
        return self._with(self._best)

    def _bfloat16_serves(self, share: Share) -> bool:
        """Whether products can be computed in bfloat16: it is fast here, and the loss the same."""
        tensors = self._given.values()
        if not _fast_in_bfloat16(self._device) or any(t.dtype != torch.float32 for t in tensors):
            return False
        material = self._teacher.material(share)
        shares = torch.ones_like(material.weights, dtype=torch.float32)
        with torch.no_grad():
            exact, rounded = (
                float(Learner(self._lesson, self._weights, bfloat16=b)(material, shares, cut=False))
                for b in (False, True)
            )
        return abs(rounded - exact) <= BFLOAT16_TOLERANCE * exact

    def _with(self, masters: Mapping[str, Tensor]) -> FxGraph:
        """The graph that is measured, and returned, with these weights in its dtypes.

        The one graph: those of its kind end in cycles, which hold their weights until a collection.
        """
        with torch.no_grad():
            for path, master in masters.items():
                own = self._measured[path]
                own.copy_(whole(master).reshape(own.shape))
        return self._graph

    def _masters(self) -> dict[str, torch.nn.Parameter]:
        return {path: weight.master for path, weight in self._distinct.items()}

    def _copied(self) -> dict[str, Tensor]:
        return {path: master.detach().clone() for path, master in self._masters().items()}


def _fast_in_bfloat16(device: str) -> bool:
    """Whether the machine multiplies matrices of bfloat16 faster than those of float32."""
    if device == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    able = torch.cpu.get_capabilities()
    return device == "cpu" and bool(able.get("avx512_bf16") or able.get("amx_bf16"))


def _fingerprint(lesson: Lesson, ends: Sequence[float], seed: int) -> str:
    """What a checkpoint of a run belongs to: the weights that came in, and the choices."""
    choices = [lesson.metric, lesson.train, seed, *ends, *(o.name for o in lesson.outputs)]
    found = hashlib.sha256(json.dumps(choices).encode())
    for path, tensor in lesson.trained().items():
        found.update(f"{path} {tuple(tensor.shape)} {tensor.dtype}".encode())
        found.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def _weights(given: Mapping[str, torch.nn.Parameter]) -> dict[str, Weight]:
    """What is learned of the parameters; those that are one stay one."""
    if not given:
        raise OptionError("the converted model has no parameter to train")
    made: dict[int, Weight] = {}
    for parameter in given.values():
        if id(parameter) not in made:
            made[id(parameter)] = Weight(parameter)
    return {path: made[id(parameter)] for path, parameter in given.items()}
