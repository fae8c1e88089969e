"""The whole way, in order: capture, match, calibrate and plan, rewrite, verify, report."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from numbers import Integral, Real
from typing import Any

from .batches import as_arguments, as_batches
from .calibration import Calibration
from .data import split, whole
from .errors import BudgetError, DataError, OptionError
from .graphs.base import Batch, Graph
from .metrics import Measurement, check_metric
from .passes.capture import capture
from .passes.fold import Folded
from .passes.fold import fold as fold_graph
from .passes.match import match
from .passes.plan import Plan
from .passes.rewrite import rewrite
from .passes.verify import Reference, chosen_output
from .report import Report
from .report.assembly import assemble
from .shelf import Shelf
from .sites import Match
from .trials import Trials

__all__ = ["Conversion", "compare", "convert", "fold", "inspect"]

MODES = ("exact", "budget", "all")
FITS = ("auto", "diagonal", "full")


@dataclass(frozen=True, eq=False)
class Conversion:
    """What `convert` returns.

    model: an `nn.Module`, called like the original, or an `onnx_ir.Model`; graph: the same, as
    passes and exporters see it; original: the graph that it was made from; calibration: None in
    mode "exact"; probe: a batch on which an exporter checks what it wrote; folded: what went into
    the weights, None where nothing was folded.
    """

    graph: Graph = field(repr=False)
    original: Graph = field(repr=False)
    match: Match = field(repr=False)
    calibration: Calibration | None = field(repr=False)
    report: Report
    probe: Batch | None = field(default=None, repr=False)
    folded: Folded | None = field(default=None, repr=False)

    @property
    def model(self) -> Any:
        """The converted model."""
        return self.graph.model


def inspect(
    model: Any,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    dynamic_shapes: Any = None,
) -> Match:
    """Every normalization of a model, one entry a call, in execution order.

    model: `nn.Module`, `ExportedProgram`, `GraphModule`, `onnx_ir.Model`, or the path of an
    `.onnx` or `.pt2` file. args, kwargs: an example of its inputs; needed for modules alone.
    Raises CaptureError or OptionError.
    """
    return match(capture(model, args, kwargs, dynamic_shapes=dynamic_shapes))


def fold(
    model: Any,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    dynamic_shapes: Any = None,
) -> Folded:
    """The same function with fewer operators: constants folded into the weights beside them.

    Gamma and beta of DyT, scalars of SkipInit and Fixup, LayerScale, and weights that are computed
    from parameters on every call (sigma-Reparam, weight norm) become plain weights. Norms stay as
    they are. The result's `model` shares all weights that do not change; the model itself stays as
    it is.

    model, args, kwargs: as for `inspect`. Raises CaptureError or OptionError, and RewriteError
    where weights are not loaded.
    """
    graph = capture(model, args, kwargs, dynamic_shapes=dynamic_shapes)
    whole_dyt = rewrite(graph, match(graph), None, ())
    return fold_graph(whole_dyt, match(whole_dyt))


def convert(
    model: Any,
    batches: Iterable[Any] | None = None,
    *,
    mode: str | None = None,
    budget: float = 0.05,
    metric: str = "relative",
    output: str | None = None,
    example: Any = None,
    dynamic_shapes: Any = None,
    exclude: str | Sequence[str] = (),
    seed: int = 0,
    provider: str = "cpu",
    fold: bool = False,
    fit: str = "auto",
) -> Conversion:
    """Replace the norms of a model by Dynamic Tanh.

    model: as for `inspect`. batches: tuples (positional arguments) or dicts (keyword arguments)
    of tensors or arrays, in an iterable that can be gone through again; they are split 50/25/25
    into fit, plan and report. example: a tuple or a dict like a batch, or (args, kwargs); by
    default the first batch.

    mode "exact" recognises the DyT and Derf that the model holds and leaves its norms alone;
    "budget" converts as many norms as keep the error at `output` (by default the first
    floating-point one) within `budget`, in `metric`: "relative", "cosine", "kl" (nats a position)
    or "top1"; "all" converts every norm and reports what that cost. Default: "budget" with
    batches, "exact" without. Sites whose name matches a regular expression of `exclude` (one, or
    several) keep their norm.

    fit "diagonal" gives every site a gamma and a beta of one value a channel; "full" a matrix over
    its channels where the weights of all its readers can take that up (linear layers, 1 x 1
    convolutions), so that it costs nothing when the model runs; "auto" chooses by the error on
    held-out rows. The report says which, and why not the other. "auto" also refits linear layers
    of post-norm models, where the residual reads a norm too: those that read such a norm, and
    those whose output is summed for a norm alone, each to put out what the original has there. A
    layer without a bias gets one. fold: exact algebra afterwards, as in `fold`.

    The model itself stays as it is. The result's `model` has parameters of its own where a norm
    was replaced, and shares all other weights with the original: to change one and keep the other
    (fine-tuning, moving it to another device), copy it first.

    Raises OptionError, CaptureError, DataError, and BudgetError if the error on the report
    samples exceeds the budget twice.
    """
    mode = _checked(mode, batches, budget, metric, seed)
    if fit not in FITS:
        raise OptionError(f"fit is {fit!r}; allowed: {', '.join(FITS)}")
    exclude = _patterns(exclude)
    clock = _Clock()
    with clock("capture"):
        args, kwargs = _example(example, batches)
        graph = capture(
            model,
            args,
            kwargs,
            batches=() if batches is None else batches,
            dynamic_shapes=dynamic_shapes,
            provider=provider,
        )
        output = chosen_output(graph, output)
    with clock("match"):
        found = match(graph)
    if mode == "exact" or batches is None:
        with clock("rewrite"):
            rewritten = rewrite(graph, found, None, ())
        report = assemble(graph, found, mode, metric, output, seconds=clock.seconds)
        probe = _probe(graph, args, kwargs)
        return _concluded(Conversion(rewritten, graph, found, None, report, probe), fold)
    with Shelf(graph) as shelf:
        trials = Trials(graph, found, split(graph, batches, seed), shelf, output, metric, seed, fit)
        candidates = _candidates(found, exclude)
        with clock("calibrate and plan"):
            if mode == "all":
                attempt = trials.attempt(frozenset(candidates))
                tried = (len(attempt.names), attempt.measurement.error)
                planned = Plan(attempt, {}, (tried,))
            else:
                planned = trials.plan(candidates, budget)
        with clock("rewrite"):
            rewritten = trials.rewrite(planned)
        with clock("verify"):
            measured = trials.verify(rewritten)
            if mode == "budget" and not measured.error <= budget:  # NaN keeps none
                # Once back to the plan.
                again = trials.plan(candidates, _tightened(budget, measured.error))
                planned = replace(again, attempts=planned.attempts + again.attempts)
                rewritten = trials.rewrite(planned)
                measured = trials.verify(rewritten)
                if not measured.error <= budget:
                    raise BudgetError(_broken(metric, measured, budget, len(planned.converted)))
    limit = budget if mode == "budget" else None
    report = assemble(
        graph,
        found,
        mode,
        metric,
        output,
        budget=limit,
        measured=measured,
        planned=planned,
        isolated=trials.isolated,
        seconds=clock.seconds,
    )
    chosen = planned.chosen
    kept = trials.isolated if chosen is None else chosen.calibration
    probe = _probe(graph, args, kwargs)
    return _concluded(Conversion(rewritten, graph, found, kept, report, probe), fold)


def _concluded(result: Conversion, fold: bool) -> Conversion:
    """The conversion with its graph folded, if that is wanted."""
    if not fold:
        return result
    folded = fold_graph(result.graph, match(result.graph))
    return replace(result, graph=folded.graph, folded=folded)


def compare(
    a: Any,
    b: Any,
    batches: Iterable[Any],
    *,
    metric: str = "relative",
    output: str | None = None,
    examples: tuple[Any, Any] = (None, None),
    provider: str = "cpu",
) -> Measurement:
    """How far model `b` is from model `a`, over all samples; models and batches as for `convert`.

    Raises CaptureError, DataError or OptionError.
    """
    check_metric(metric)
    as_batches(batches)
    graphs = []
    for model, example in zip((a, b), examples, strict=True):
        args, kwargs = _example(example, batches)
        graphs.append(capture(model, args, kwargs, batches=batches, provider=provider))
    original, other = graphs
    with Shelf(original) as shelf:
        samples = whole(original, batches)
        reference = Reference(original, samples, shelf, output=output, metric=metric)
        return reference.measure(other)


class _Clock:
    """Seconds of wall time by stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[stage] = round(time.perf_counter() - start, 3)


def _checked(
    mode: str | None,
    batches: Iterable[Any] | None,
    budget: Any,
    metric: str,
    seed: Any,
) -> str:
    """The mode to use; raises OptionError for every option that is not allowed."""
    chosen = ("exact" if batches is None else "budget") if mode is None else mode
    if chosen not in MODES:
        raise OptionError(f"mode is {chosen!r}; allowed: {', '.join(MODES)}")
    if chosen != "exact" and batches is None:
        raise OptionError(
            f"mode {chosen!r} needs data: without it every choice of alpha ruins the model; "
            "pass batches (--data), or use mode 'exact'"
        )
    if not isinstance(budget, Real) or not float(budget) > 0:
        raise OptionError(f"budget is {budget!r}; allowed: a number above 0")
    if not isinstance(seed, Integral) or seed < 0:
        raise OptionError(f"seed is {seed!r}; allowed: a whole number, 0 or above")
    check_metric(metric)
    if batches is not None:
        as_batches(batches)
    return chosen


def _patterns(exclude: Any) -> tuple[str, ...]:
    """The regular expressions of `exclude`: a string is one, not an iterable of letters."""
    patterns = (exclude,) if isinstance(exclude, str) else exclude
    if not isinstance(patterns, Iterable):
        raise OptionError(f"exclude is {exclude!r}; allowed: regular expressions, one or a list")
    found = tuple(patterns)
    for pattern in found:
        _check_pattern(pattern)
    return found


def _check_pattern(pattern: Any) -> None:
    if not isinstance(pattern, str):
        raise OptionError(f"exclude has {pattern!r}; allowed: strings, regular expressions")
    try:
        re.compile(pattern)
    except re.error as error:
        raise OptionError(f"exclude has {pattern!r}, no regular expression: {error}") from error


def _tightened(budget: float, error: float) -> float:
    """The budget to plan for once the report samples gave that error, by as much as they differ.

    Nothing where the error is infinite or NaN: then only sites without any error are converted.
    """
    return budget * (budget / error) if math.isfinite(error) else 0.0


def _broken(metric: str, measured: Measurement, budget: float, converted: int) -> str:
    told = (
        f"the {metric} error on the report samples is {measured.error:.4g} with {converted} sites "
        f"converted, not within the budget of {budget:g} after planning twice; "
    )
    if math.isfinite(measured.error):
        return f"{told}give more samples than {measured.samples * 4}, or a larger budget"
    return f"{told}its outputs, or the original's, hold NaN or infinity on some of the samples"


def _candidates(found: Match, exclude: Sequence[str]) -> list[str]:
    """The sites that may be converted; a module's first call stands for all of its calls."""
    kept = {site.tied_to or site.name for site in found.sites if _excluded(site.name, exclude)}
    return [
        site.name
        for site in found.sites
        if not site.kind.lossless and site.tied_to is None and site.name not in kept
    ]


def _excluded(name: str, exclude: Sequence[str]) -> bool:
    return any(re.search(pattern, name) for pattern in exclude)


def _example(example: Any, batches: Iterable[Any] | None) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments of the example, by default of the first batch."""
    if example is not None:
        return as_arguments(example)
    if batches is None:
        return (), {}
    for first in batches:
        return as_arguments(first)
    raise DataError("the data holds no batch")


def _probe(graph: Graph, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Batch | None:
    """The example as a batch; without one, what the graph makes up."""
    return graph.bind((args, kwargs)) if args or kwargs else graph.example()
