"""Recover: the converted model learns from the original, on inputs without labels.

First block by block: at every site the gradient is cut, so that each part learns to make of what
it gets what the original has there. Then end to end: the error at the output, and that at the
sites. The original is run beside it, and neither its weights nor the given graph's are written to.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call

from ..checkpoints import load_checkpoint, save_checkpoint
from ..data import attention_mask, shuffled
from ..errors import OptionError
from ..graphs.base import Batch
from ..graphs.fx import FxGraph
from ..graphs.fx_training import dyt_paths, learned, watching
from ..losses import LOSSES, relative
from ..metrics import Measurement
from ..progress import track
from ..terms import Value

__all__ = ["Lesson", "Limit", "Recovered", "recover"]

BATCH_SAMPLES = 32
BLOCKWISE = 0.05
"""The share of a run that learns block by block. On the digits ViT, 250 steps, more did not pay: a
fifth ended at an error of .116, none at .113. Not measured on models of many blocks."""

TICKS = 100
EVERY = 10
"""Ticks between two evaluations on held-out samples, each of which is followed by a checkpoint."""

PATIENCE = 5
"""Evaluations without a better one before the run ends. The weights that came in do not count as
one: from a good fit the error first rises, and falls below it only as the rate falls."""

WARM_UP_STEPS = 20
CLIP = 1.0
RATE = 1e-2
"""The highest learning rate, relative to a parameter's root mean square: a small alpha makes gamma
huge, and no absolute rate suits both."""

LEAST_SIZE = {"alpha": 1e-4, "gamma": 1e-4, "beta": 0.3, "shift": 0.3, "": 0.02}
"""What a parameter's root mean square counts at least: a beta, or a bias, may begin at zero."""

Measure = Callable[[FxGraph], Measurement]


@dataclass(frozen=True)
class Limit:
    """When a run ends: after so many minutes of wall time, or after so many steps."""

    minutes: float
    steps: int | None = None

    def share(self, seconds: float, steps: int) -> float:
        """How much of the run is over, from 0 to 1."""
        if self.steps is not None:
            return min(1.0, steps / self.steps)
        return min(1.0, seconds / (60 * self.minutes))


@dataclass(frozen=True)
class Lesson:
    """What is learned from what.

    original, converted: the two models; pairs: values of both that should agree, in execution
    order; outputs: the output of both, which `metric` measures; train: "all" or "dyt".
    """

    original: FxGraph
    converted: FxGraph
    pairs: Sequence[tuple[Value, Value]]
    outputs: tuple[Value, Value]
    metric: str
    train: str

    def trained(self) -> dict[str, torch.nn.Parameter]:
        """The parameters to train, by path."""
        found = learned(self.converted)
        if self.train == "all":
            return found
        own = dyt_paths(self.converted)
        return {path: tensor for path, tensor in found.items() if path in own}


@dataclass(frozen=True)
class Recovered:
    """A graph with the best weights of the run, and the run.

    before, after: the held-out error; curve: (share of the run, held-out error); seconds: of
    wall time, those of a run that this one went on from included.
    """

    graph: FxGraph
    before: float
    after: float
    curve: tuple[tuple[float, float], ...]
    steps: int
    seconds: float


def recover(
    lesson: Lesson,
    loaders: Sequence[Callable[[], Batch]],
    measure: Measure,
    limit: Limit,
    *,
    seed: int,
    checkpoint: Path | None = None,
) -> Recovered:
    """Train copies of the converted graph's weights; the given graphs stay as they are.

    loaders: the batches to learn from; measure: the held-out error, by which the weights to
    return are chosen, those that came in among them. checkpoint: written at every evaluation; a
    run goes on from it where it exists. With a limit in steps the result depends on nothing but
    the arguments.

    Raises OptionError where there is nothing to train, CalibrationError for a checkpoint that is
    damaged or of another run.
    """
    run = _Run(lesson, seed)
    if checkpoint is not None and checkpoint.is_file():
        run.load(checkpoint)
    if not run.curve:
        run.evaluate(measure, 0.0)
    batches = run.batches(loaders)
    ticks = range(math.floor(run.share(limit) * TICKS) + 1, TICKS + 1)
    for tick in track(ticks, run.told, TICKS):
        while run.share(limit) < tick / TICKS:
            run.step(next(batches), run.share(limit))
        if tick % EVERY == 0:
            run.evaluate(measure, tick / TICKS)
            if checkpoint is not None:
                run.save(checkpoint)
            if run.hopeless:
                break
    return run.recovered()


@dataclass
class _Progress:
    """What of a run is no tensor."""

    steps: int = 0
    seconds: float = 0.0
    epoch: int = 0
    taken: int = 0
    scale: float = 65536.0
    curve: list[tuple[float, float]] = field(default_factory=list)


class _Run:
    """The weights on their way: float32 masters, their optimizer, and the best ones so far."""

    def __init__(self, lesson: Lesson, seed: int) -> None:
        self._lesson = lesson
        self._seed = seed
        self._given = lesson.trained()
        self._masters = _masters(self._given)
        self._distinct = {id(m): (path, m) for path, m in reversed(self._masters.items())}
        self._best = self._copied()
        self._name = self._fingerprint()
        self._optimizer = torch.optim.AdamW(
            [_group(path, m) for path, m in self._distinct.values()], weight_decay=0.0
        )
        self._rates = [group["lr"] for group in self._optimizer.param_groups]
        narrow = any(tensor.dtype is torch.float16 for tensor in self._given.values())
        device = next(iter(self._masters.values())).device.type
        self._scaler = torch.amp.GradScaler(device, enabled=narrow)
        taught, student = zip(*lesson.pairs, lesson.outputs, strict=True)
        self._teacher = watching(lesson.original, taught, cut=False)
        self._blockwise = watching(lesson.converted, student, cut=True)
        self._whole = watching(lesson.converted, student, cut=False)
        self._progress = _Progress()
        self._since = time.perf_counter()

    @property
    def curve(self) -> Sequence[tuple[float, float]]:
        """(share of the run, held-out error) so far."""
        return self._progress.curve

    @property
    def hopeless(self) -> bool:
        """Whether nothing became better for a while."""
        errors = [error for _, error in self.curve[1:]]
        return len(errors) - 1 - _best_place(errors) >= PATIENCE

    def told(self) -> str:
        """The run in words."""
        return f"recovering, held-out error {self.curve[-1][1]:.4g}" if self.curve else "recovering"

    def share(self, limit: Limit) -> float:
        """How much of the run is over."""
        return limit.share(self._seconds(), self._progress.steps)

    def batches(self, loaders: Sequence[Callable[[], Batch]]) -> Iterator[Batch]:
        """Batches without end, from where the run is; every epoch in an order of its own."""
        while True:
            seed = (self._seed, self._progress.epoch)
            order = shuffled(self._lesson.converted, loaders, BATCH_SAMPLES, seed)
            for number, batch in enumerate(order):
                if number >= self._progress.taken:
                    self._progress.taken += 1
                    yield batch
            self._progress.epoch += 1
            self._progress.taken = 0

    def step(self, batch: Batch, share: float) -> None:
        """Learn from one batch."""
        progress = self._progress
        factor = min(1.0, (progress.steps + 1) / WARM_UP_STEPS) * _cosine(share)
        for group, rate in zip(self._optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate * factor
        self._optimizer.zero_grad(set_to_none=True)
        loss = self._loss(batch, self._blockwise if share < BLOCKWISE else self._whole)
        self._scaler.scale(loss).backward()
        self._scaler.unscale_(self._optimizer)
        torch.nn.utils.clip_grad_norm_([m for _, m in self._distinct.values()], CLIP)
        self._scaler.step(self._optimizer)
        self._scaler.update()
        progress.steps += 1

    def evaluate(self, measure: Measure, share: float) -> None:
        """Measure the weights as they would be returned, and keep them if they are the best."""
        error = measure(self._graph(self._masters)).error
        self._progress.curve.append((share, error))
        errors = [error for _, error in self.curve]
        if _best_place(errors) == len(errors) - 1:
            self._best = self._copied()

    def save(self, path: Path) -> None:
        """Write all that the run needs to go on."""
        tensors = {f"best/{name}": tensor for name, tensor in self._best.items()}
        for name, master in self._distinct.values():
            tensors[f"weight/{name}"] = master
            state = self._optimizer.state.get(master, {})
            tensors |= {f"{kind}/{name}": tensor for kind, tensor in state.items()}
        self._progress.seconds = self._seconds()
        self._since = time.perf_counter()
        self._progress.scale = self._scaler.get_scale()
        save_checkpoint(path, self._name, vars(self._progress), tensors)

    def load(self, path: Path) -> None:
        """Go on from a checkpoint."""
        progress, tensors = load_checkpoint(path, self._name)
        self._progress = _Progress(**progress)
        self._progress.curve = [(share, error) for share, error in self._progress.curve]
        self._since = time.perf_counter()
        if self._scaler.is_enabled():
            self._scaler.load_state_dict(
                self._scaler.state_dict() | {"scale": self._progress.scale}
            )
        for name, master in self._distinct.values():
            with torch.no_grad():
                master.copy_(tensors.pop(f"weight/{name}"))
            self._best[name].copy_(tensors.pop(f"best/{name}"))
        masters = dict(self._distinct.values())
        for key, tensor in tensors.items():
            kind, _, name = key.partition("/")
            own = tensor if kind == "step" else tensor.to(masters[name].device)
            self._optimizer.state[masters[name]][kind] = own

    def recovered(self) -> Recovered:
        """The best weights in a graph of their own."""
        errors = [error for _, error in self.curve]
        best = {path: self._best[self._distinct[id(m)][0]] for path, m in self._masters.items()}
        return Recovered(
            self._graph(best),
            errors[0],
            errors[_best_place(errors)],
            tuple(self.curve),
            self._progress.steps,
            self._seconds(),
        )

    def _loss(self, batch: Batch, student: torch.fx.GraphModule) -> Tensor:
        """The error at the output and the mean error at the sites."""
        given = tuple(batch[name] for name in self._lesson.original.inputs)
        with torch.no_grad():
            *taught, f = self._teacher(*given)
        weights = {path: m.to(self._given[path].dtype) for path, m in self._masters.items()}
        given = tuple(batch[name] for name in self._lesson.converted.inputs)
        *made, g = functional_call(student, weights, given, tie_weights=False)
        counted = attention_mask(batch, self._lesson.original)
        mask = None if counted is None else torch.from_numpy(counted).to(f.device)
        loss = LOSSES[self._lesson.metric](f, g, mask)
        if made:
            sites = [relative(a, b, mask) for a, b in zip(taught, made, strict=True)]
            loss = loss + torch.stack(sites).mean()
        return loss

    def _graph(self, weights: Mapping[str, Tensor]) -> FxGraph:
        """The converted graph with these weights, in the dtypes that it had; shared ones shared."""
        made: dict[int, torch.nn.Parameter] = {}
        for path, weight in weights.items():
            if id(weight) not in made:
                own = weight.detach().to(self._given[path].dtype, copy=True)
                made[id(weight)] = torch.nn.Parameter(own)
        return self._lesson.converted.with_weights(
            {path: made[id(weight)] for path, weight in weights.items()}
        )

    def _copied(self) -> dict[str, Tensor]:
        return {path: master.detach().clone() for path, master in self._distinct.values()}

    def _seconds(self) -> float:
        return self._progress.seconds + time.perf_counter() - self._since

    def _fingerprint(self) -> str:
        """What a checkpoint of this run belongs to: the weights that came in, and the choices."""
        lesson = self._lesson
        places = [output.name for output in lesson.outputs]
        found = hashlib.sha256(
            json.dumps([lesson.metric, lesson.train, self._seed, places]).encode()
        )
        for path, tensor in self._given.items():
            found.update(f"{path} {tuple(tensor.shape)} {tensor.dtype}".encode())
            found.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
        return found.hexdigest()


def _masters(given: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Float32 copies (float64 of float64) of the parameters; those that are one stay one."""
    if not given:
        raise OptionError("the converted model has no parameter to train")
    made: dict[int, Tensor] = {}
    for tensor in given.values():
        if id(tensor) not in made:
            wide = torch.promote_types(tensor.dtype, torch.float32)
            made[id(tensor)] = tensor.detach().to(wide, copy=True).requires_grad_()
    return {path: made[id(tensor)] for path, tensor in given.items()}


def _group(path: str, master: Tensor) -> dict[str, Any]:
    """A parameter with its learning rate, relative to its root mean square."""
    least = LEAST_SIZE.get(path.rpartition(".")[2], LEAST_SIZE[""])
    size = float(master.detach().square().mean().sqrt())
    return {"params": [master], "lr": RATE * max(size, least)}


def _cosine(share: float) -> float:
    """From 1 to 0 over a run."""
    return 0.5 + 0.5 * math.cos(math.pi * share)


def _best_place(errors: Sequence[float]) -> int:
    """Where the least error stands; NaN is none."""
    return min(range(len(errors)), key=lambda n: math.inf if math.isnan(errors[n]) else errors[n])
