"""recover(): a converted model learns from the original what the conversion cost it."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Collection, Iterable
from dataclasses import replace
from functools import partial
from numbers import Integral, Real
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .compiler import Conversion, concluded
from .data import Part, own_rows, pieces, split
from .errors import OptionError
from .graphs.base import Batch, Graph
from .passes.calibrate import calibrate
from .passes.match import match
from .passes.rewrite import rewrite
from .passes.verify import Reference
from .ranks import current
from .report.records import Recovery
from .shelf import Kept, Shelf
from .sites import Match, NormSite
from .terms import Value

if TYPE_CHECKING:
    from .lessons import Lesson, Share
    from .passes.recover import Course

__all__ = ["recover"]

logger = logging.getLogger("dyt_compile")

SHARES = (0.8, 0.1, 0.1)
"""Of the samples: to learn from, to choose the weights by, and for the report. `convert` took its
report from the last quarter of the same order, so the report's are new to both."""

STEP_POSITIONS = 512
STEP_SAMPLES = (4, 64)
"""Of a step: about how many positions (tokens, patches) it learns from, and how many samples it has
at least and at most. Fewer images, or more windows of text, gave less for the same work
(docs/recovery.md)."""

STAGES = 4
ALL_CONVERTED_FROM = 0.5
"""Of a staged run: into how many groups the sites are split, and from which share of the run on
all of them are converted."""

FITTED_SAMPLES = 512
"""What the fits of a staged run are made on."""

TRAIN = ("all", "dyt")


def recover(
    result: Conversion,
    batches: Iterable[Any],
    *,
    minutes: float = 10.0,
    steps: int | None = None,
    train: str = "all",
    metric: str | None = None,
    staged: bool = False,
    checkpoint: str | os.PathLike[str] | None = None,
    seed: int = 0,
    sharded: bool = False,
) -> Conversion:
    """Train the converted model to agree with the original, on inputs without labels.

    result: what `convert` returned for a torch model; batches, seed: the same as there, so that
    the figures in the report come from samples that took part in nothing; more batches serve
    learning, but then the report counts some samples that the fits saw. minutes: of wall time;
    steps: a number of steps instead, which makes runs repeatable. train: "all" weights, or "dyt"
    for alpha, gamma and beta alone. metric: what the held-out error counts, and what is learned
    at the output; by default the report's; "top1" is learned by KL. staged: convert the sites
    anew, a few at a time, those first whose error alone is small (where the plan measured none,
    that of their fit), and train in between; their fits are those on the original's activations.
    checkpoint: a safetensors file, written as the run goes on; a run that was killed goes on from
    it when it is called again with the same arguments. sharded: among several ranks, each holds a
    part of what is learned (FSDP2) rather than all of it (DistributedDataParallel).

    Returns a conversion with a model of its own, folded if `result` is: gamma and beta learn as
    parameters of their own, and are folded at the end. `result` and the original stay as they are.
    The weights are those with the least held-out error, at worst the ones that came in. bfloat16
    and float16 weights are trained as float32 and rounded at the end. `calibration` is None: the
    model's values are no longer those of the fit.

    Raises OptionError (a result that came from an ONNX file, or in which no norm was converted),
    DataError, and CalibrationError for a checkpoint that is damaged or of another run.
    """
    metric = _checked(result, minutes, steps, train, staged, metric, seed)
    fold = result.folded is not None
    if result.unfolded is not None:
        result = replace(result, graph=result.unfolded, folded=None, unfolded=None)
    from .passes.recover import recover as learn
    from .run_progress import Limit

    original = result.original
    samples = split(original, batches, seed, SHARES)
    with Shelf(original) as shelf:
        held_out, unseen = (
            Reference(original, part, shelf, output=result.report.output, metric=metric)
            for part in (samples.plan, samples.report)
        )
        lesson_of = partial(_lesson, result, train, metric)
        course: Course = [(1.0, lambda _: lesson_of(result.graph))]
        if staged:
            course = _stages(result, samples.fit, seed, lesson_of)
        recovered = learn(
            course,
            _shares(original, pieces(original, samples.fit, _step_size(result), seed), shelf),
            held_out.measure,
            Limit(float(minutes), steps),
            seed=seed,
            checkpoint=None if checkpoint is None else Path(checkpoint),
            sharded=sharded,
        )
        if not recovered.steps:
            logger.warning("learned nothing: %g minutes were over before the first step", minutes)
        graph: Graph = recovered.graph
        if staged and held_out.measure(result.graph).error < recovered.curve[-1][1]:
            graph = result.graph
        before, after = unseen.measure(result.graph), unseen.measure(graph)
    told = Recovery(
        train,
        before.error,
        recovered.steps,
        recovered.seconds,
        recovered.curve,
        tuple(zip(recovered.stages, _counts(result, staged), strict=True)),
    )
    report = replace(
        result.report,
        metric=metric,
        error=after.error,
        standard_error=after.standard_error,
        samples=after.samples,
        sites=_with_alphas(result, graph),
        seconds={**result.report.seconds, "recover": round(recovered.seconds, 3)},
        recovery=told,
    )
    return concluded(replace(result, graph=graph, calibration=None, report=report), fold)


def _checked(
    result: Conversion,
    minutes: Any,
    steps: Any,
    train: Any,
    staged: bool,
    metric: Any,
    seed: Any,
) -> str:
    """The metric to use; raises OptionError for all that is not allowed."""
    if not hasattr(result.graph, "with_weights"):
        raise OptionError(
            f"{result.report.model!r} came from an ONNX file, which has no gradients: recover "
            "needs the torch model; from ONNX the closed-form fits of convert are all there is"
        )
    if result.quantized is not None:
        raise OptionError(
            "the result is quantised, and recover trains floats: convert without quantize, "
            "recover, export, and convert that file with quantize"
        )
    if result.report.error is None or not result.report.converted:
        raise OptionError("no norm was converted: there is nothing to recover")
    if staged and not _groups(result):
        raise OptionError("staged is True; all DyT came with the model: there is nothing to stage")
    if not isinstance(minutes, Real) or not float(minutes) > 0:
        raise OptionError(f"minutes is {minutes!r}; allowed: a number above 0")
    if steps is not None and (not isinstance(steps, Integral) or steps < 1):
        raise OptionError(f"steps is {steps!r}; allowed: a whole number, 1 or above, or None")
    if train not in TRAIN:
        raise OptionError(f"train is {train!r}; allowed: {', '.join(TRAIN)}")
    if not isinstance(seed, Integral) or seed < 0:
        raise OptionError(f"seed is {seed!r}; allowed: a whole number, 0 or above")
    from .losses import LOSSES  # late, since it imports torch

    chosen = result.report.metric if metric is None else metric
    if chosen not in tuple(LOSSES):  # a tuple takes what cannot be hashed too
        raise OptionError(
            f"metric is {chosen!r}; allowed: {', '.join(LOSSES)}, which have gradients to learn by"
        )
    return str(chosen)


def _stages(
    result: Conversion, samples: Part, seed: int, lesson_of: Callable[[Graph], Lesson]
) -> Course:
    """A course that converts the sites of `result` anew, group by group."""
    groups = _groups(result)
    method = "auto" if any(site.fit == "full" for site in result.report.sites) else "diagonal"
    some = samples.first(FITTED_SAMPLES)
    squashes = dict.fromkeys(_affine(result), ("identity",))
    fits = calibrate(
        result.original, result.match, some, convert=(), seed=seed, fit=method, squashes=squashes
    )

    def convert(names: Collection[str], before: Graph | None) -> Lesson:
        graph = result.original if before is None else before
        return lesson_of(rewrite(graph, match(graph), fits, names))

    shares = [ALL_CONVERTED_FROM * place / (len(groups) - 1) for place in range(1, len(groups))]
    return [
        (end, partial(convert, names)) for end, names in zip((*shares, 1.0), groups, strict=True)
    ]


def _groups(result: Conversion) -> list[frozenset[str]]:
    """The sites of the stages; calls of one module, which share their values, together.

    Affine maps come last: with nothing left of a site, those behind it may get another name.
    """
    errors = {
        site.name: site.fit_error if site.sensitivity is None else site.sensitivity
        for site in result.report.sites
        if site.converted
    }
    first = [site.name for site in result.match.sites
             if site.tied_to is None and errors.get(site.name) is not None]  # fmt: skip
    affine = _affine(result)
    order = sorted(
        (name for name in first if name not in affine), key=lambda name: errors[name] or 0.0
    )
    parts = np.array_split(np.array(order, dtype=object), max(1, min(STAGES, len(order))))
    groups = [set(part) for part in parts]
    groups[-1] |= affine.intersection(first)
    return [
        frozenset(s.name for s in result.match.sites if (s.tied_to or s.name) in group)
        for group in groups
        if group
    ]


def _affine(result: Conversion) -> frozenset[str]:
    """The sites of which an affine map in the weights behind them is all that is left."""
    return frozenset(site.name for site in result.report.sites if site.affine)


def _counts(result: Conversion, staged: bool) -> list[int]:
    """How many sites are DyT in each stage."""
    if not staged:
        return [result.report.converted]
    sizes = np.cumsum([len(group) for group in _groups(result)])
    held = result.report.converted - int(sizes[-1])  # DyT that the model came with
    return [held + int(size) for size in sizes]


def _lesson(result: Conversion, train: str, metric: str, graph: Graph) -> Lesson:
    from .lessons import Lesson

    original: Any = result.original
    converted: Any = graph
    output = result.report.output
    return Lesson(
        original,
        converted,
        _pairs(result.match, match(converted), _affine(result)),
        (original.outputs[output], converted.outputs[output]),
        metric,
        train,
    )


def _pairs(original: Match, converted: Match, affine: Collection[str]) -> list[tuple[Value, Value]]:
    """What the sites of both read, in execution order: the model's state between its blocks.

    The same ones in every stage: affine sites, which the last one does without, are left out.
    """
    known = _by_name(original, converted, affine)
    names = [site.name for site in original.sites if site.name not in affine]
    inputs = {site.name: site.input for site in original.sites}
    found = [(inputs[name], known[name].input) for name in names if name in known]
    return list({id(pair[0]): pair for pair in found}.values())


def _by_name(original: Match, converted: Match, affine: Collection[str]) -> dict[str, NormSite]:
    """The sites of the converted model by their names in the original.

    affine: sites that may be gone in the converted model; names of those behind may have changed.
    """
    left = tuple(site for site in original.sites if site.name not in affine)
    for sites in (original.sites, left, converted.sites):
        if len(sites) == len(converted.sites):
            break
    return {site.name: own for site, own in zip(sites, converted.sites, strict=True)}


def _step_size(result: Conversion) -> Callable[[Batch, int], int]:
    """How many samples of a batch a step learns from, by its positions at the first site."""
    graph, site = result.original, result.match.sites[0]
    run = graph.segment(list(graph.inputs.values()), [site.input])

    def size(batch: Batch, samples: int) -> int:
        value: Any
        (value,) = run([batch[name] for name in graph.inputs])
        positions: float = math.prod(value.shape) / (site.channels or value.shape[-1])
        least, most = (max(bound, current().size) for bound in STEP_SAMPLES)
        return int(min(most, max(least, round(STEP_POSITIONS * samples / positions))))

    return size


def _shares(graph: Graph, batches: Iterable[Batch], shelf: Shelf) -> list[Share]:
    """This rank's rows of the batches, each to be loaded by itself; many of them wait in files."""
    from .lessons import Share

    def load(kept: dict[str, Kept]) -> Batch:
        return {name: value.load() for name, value in kept.items()}

    def share(batch: Batch) -> Share:
        own, counts = own_rows(graph, batch, current())
        kept = {name: shelf.keep(own[name], value) for name, value in graph.inputs.items()}
        return Share(partial(load, kept), counts)

    return list(map(share, batches))


def _with_alphas(result: Conversion, graph: Graph) -> tuple[Any, ...]:
    """The report's sites with the alphas of the trained graph."""
    alphas = {}
    for name, site in _by_name(result.match, match(graph), _affine(result)).items():
        array = None if site.alpha is None else graph.constant(site.alpha)
        if array is not None:
            alphas[name] = float(np.mean(array, dtype=np.float64))
    return tuple(replace(s, alpha=alphas.get(s.name, s.alpha)) for s in result.report.sites)
