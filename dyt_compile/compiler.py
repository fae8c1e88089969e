"""The whole way, in order: capture, match, calibrate and plan, rewrite, verify, report."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from numbers import Integral, Real
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .batches import as_arguments, as_batches
from .calibration import Calibration
from .clock import Clock
from .data import HALVES, SHARES, UNPLANNED, Part, Splits, split, whole
from .eight_bits import EightBits
from .errors import DataError, OptionError
from .exclusion import candidates, patterns
from .graphs.base import Batch, Graph
from .memory import parse_bytes
from .metrics import Measurement, Metric, check_metric, named
from .passes.calibrate import calibrate as fit_sites
from .passes.capture import capture
from .passes.fold import Folded
from .passes.fold import fold as fold_graph
from .passes.match import match
from .passes.quantize import Quantization, check_eight_bits
from .passes.rewrite import rewrite
from .passes.verify import Reference, chosen_output
from .report import Report
from .report.assembly import assemble
from .report.records import FrontierPoint
from .saved_fits import apply, of_model
from .shelf import Shelf
from .sites import Match
from .survey import hardships, warning
from .trials import Trials

if TYPE_CHECKING:
    from .graphs.onnx_structure import Structure

__all__ = ["Conversion", "calibrate", "compare", "compare_structure", "convert", "fold", "inspect"]

logger = logging.getLogger("dyt_compile")

MODES = ("exact", "budget", "all")
FITS = ("auto", "diagonal", "full")
ACTIVATIONS = ("converted", "original")


@dataclass(frozen=True, eq=False)
class Conversion:
    """What `convert` returns.

    model: an `nn.Module`, called like the original, or an `onnx_ir.Model`; graph: the same, as
    passes and exporters see it; original: the graph that it was made from; calibration: None in
    mode "exact"; probe: a batch on which an exporter checks what it wrote; folded: what went into
    the weights, and unfolded: the graph before that, which `recover` trains; None without fold.
    quantized: the same model over eight bits, which is what `export_onnx` then writes; runtime: who
    that file is for.
    """

    graph: Graph = field(repr=False)
    original: Graph = field(repr=False)
    match: Match = field(repr=False)
    calibration: Calibration | None = field(repr=False)
    report: Report
    probe: Batch | None = field(default=None, repr=False)
    folded: Folded | None = field(default=None, repr=False)
    unfolded: Graph | None = field(default=None, repr=False)
    quantized: Quantization | None = field(default=None, repr=False)
    runtime: str = "any"

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
    trust: bool = False,
) -> Match:
    """Every normalization of a model, one entry a call, in execution order.

    model: `nn.Module`, `ExportedProgram`, `GraphModule`, `onnx_ir.Model`, or the path of an
    `.onnx` or `.pt2` file. args, kwargs: an example of its inputs; needed for modules alone.
    trust: open a `.pt2` file whatever it may run; else only one in which nothing can.
    Raises CaptureError or OptionError.
    """
    graph = capture(model, args, kwargs, dynamic_shapes=dynamic_shapes, trust=trust, lazy=True)
    return match(graph)


def fold(
    model: Any,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    dynamic_shapes: Any = None,
    trust: bool = False,
) -> Folded:
    """The same function with fewer operators: constants folded into the weights beside them.

    Gamma and beta of DyT, scalars of SkipInit and Fixup, LayerScale, and weights that are computed
    from parameters on every call (sigma-Reparam, weight norm) become plain weights. Norms stay as
    they are. The result's `model` shares all weights that do not change; the model itself stays as
    it is.

    model, args, kwargs, trust: as for `inspect`. Raises CaptureError or OptionError, and
    RewriteError where weights are not loaded.
    """
    graph = capture(model, args, kwargs, dynamic_shapes=dynamic_shapes, trust=trust)
    whole_dyt = rewrite(graph, match(graph), None, ())
    return fold_graph(whole_dyt, match(whole_dyt))


def convert(
    model: Any,
    batches: Iterable[Any] | None = None,
    *,
    mode: str | None = None,
    budget: float = 0.05,
    metric: Metric = "relative",
    output: str | None = None,
    example: Any = None,
    dynamic_shapes: Any = None,
    exclude: str | Sequence[str] = (),
    seed: int = 0,
    provider: str = "cpu",
    fold: bool = True,
    fit: str = "auto",
    affine: bool = False,
    frontier: bool = False,
    calibration: Calibration | str | Path | None = None,
    quantize: str | None = None,
    runtime: str = "any",
    trust: bool = False,
) -> Conversion:
    """Replace the norms of a model by Dynamic Tanh.

    model, trust: as for `inspect`. batches: tuples (positional arguments) or dicts (keyword
    arguments) of tensors or arrays, in an iterable that can be gone through again; they are split
    50/25/25 into fit, plan and report (75/0/25 in mode "all" without a frontier). example: a tuple
    or a dict like a batch, or (args, kwargs); by default the first batch.

    mode "exact" recognises the DyT and Derf that the model holds and leaves its norms alone;
    "budget" converts as many norms as keep the error at `output` (by default the first
    floating-point one) within `budget`, in `metric`: "relative", "cosine", "kl" (nats a position),
    "top1", or a function of your own, whose loss is the error (`metrics.Score` says what it gets
    and gives); "all" converts every norm and reports what that cost. Default: "budget" with
    batches, "exact" without. Sites whose name matches a regular expression of `exclude` (one, or
    several) keep their norm.

    fit "diagonal" gives every site a gamma and a beta of one value a channel; "full" a matrix over
    its channels where the weights of all its readers can take that up (linear layers, 1 x 1
    convolutions), so that it costs nothing when the model runs; "auto" chooses by the error on
    held-out rows. The report says which, and why not the other. "auto" also refits linear layers
    of post-norm models, where the residual reads a norm too: those that read such a norm, and
    those whose output is summed for a norm alone, each to put out what the original has there. A
    layer without a bias gets one. affine: a site may also become an affine map of what it reads, by
    the same fits without tanh, where the weights of all its readers can take it up, so that no
    operator is left. In mode "budget" the plan weighs both against what each costs at the output,
    an affine map counting as two converted sites; in mode "all" it is taken where it fits held-out
    rows no worse than DyT.

    fold: exact algebra afterwards, as in `fold`: gamma and beta of DyT, and other scalars, go into
    the weights beside them wherever they can. frontier: measure the error against the number of
    converted sites, too, for the report: at most 16 more calibrations.

    Before anything is fitted, a warning of the logger "dyt_compile" names the sites that are known
    to be hard; the report's sites have the reasons as `hard`.

    calibration: a saved one, or its path: its fits are applied to the sites that it converts, and
    nothing is fitted or planned. It needs no batches; if there are some, the error is measured on
    all of them. It may have been made of the same model in another form (torch, ONNX) or dtype.

    quantize: "int8" or "fp8": products and convolutions that read a DyT compute over eight bits in
    the ONNX file that `export_onnx` writes; no calibration data is needed, as DyT is bounded
    (`passes/quantize.py`). runtime: who that file is for, "any", "onnxruntime", "openvino" or
    "tensorrt". With data the error that this adds is measured apart; in modes "budget" and "exact"
    products stay in float where the error of both together would not keep the budget, and the
    report says which.

    The model itself stays as it is. The result's `model` has parameters of its own where a norm
    was replaced or a weight took something up, and shares all other weights with the original: to
    change one and keep the other (fine-tuning, moving it to another device), copy it first.

    Raises OptionError, CaptureError, DataError, CalibrationError for a calibration of another
    model, and BudgetError if the error on the report samples exceeds the budget twice.
    """
    check_eight_bits(quantize, runtime)
    if calibration is not None and mode is not None:
        raise OptionError(f"mode is {mode!r}; a calibration says what it converts: leave out mode")
    mode = _checked(mode, batches, budget, metric, seed)
    _check_fit(fit)
    for name, wanted in (("frontier", frontier), ("affine", affine)):
        if wanted and (mode == "exact" or calibration is not None):
            raise OptionError(f"{name} needs mode 'budget' or 'all': only those fit norms")
    exclude = patterns(exclude)
    clock = Clock()
    with clock("capture"):
        args, kwargs = _example(example, batches)
        graph = capture(
            model,
            args,
            kwargs,
            batches=() if batches is None else batches,
            dynamic_shapes=dynamic_shapes,
            provider=provider,
            trust=trust,
        )
        output = chosen_output(graph, output)
    with clock("match"):
        found = match(graph)
    eight = None if quantize is None else EightBits(quantize, runtime, metric, budget, clock)
    finished = partial(_finished, fold=fold, eight=eight, runtime=runtime)
    halves = partial(split, graph, () if batches is None else batches, seed, HALVES)
    if calibration is not None:
        fits = of_model(calibration, graph, found, exclude)
        applied = apply(fits, graph, found, batches, metric, output, clock)
        report = assemble(
            graph,
            found,
            "calibration",
            named(metric),
            output,
            measured=applied.measured if batches is not None else None,
            planned=applied.planned,
            seconds=clock.seconds,
        )
        probe = _probe(graph, args, kwargs)
        made = Conversion(applied.graph, graph, found, fits, report, probe)
        return finished(made, None if batches is None else whole(graph, batches), halves)
    if mode == "exact" or batches is None:
        with clock("rewrite"):
            rewritten = rewrite(graph, found, None, ())
        report = assemble(graph, found, mode, named(metric), output, seconds=clock.seconds)
        probe = _probe(graph, args, kwargs)
        made = Conversion(rewritten, graph, found, None, report, probe)
        return finished(made, None if batches is None else whole(graph, batches), halves)
    shares = UNPLANNED if mode == "all" and not frontier else SHARES
    with Shelf(graph) as shelf:
        samples = split(graph, batches, seed, shares)
        trials = Trials(graph, found, samples, shelf, output, metric, seed, fit, affine=affine)
        allowed = candidates(found, exclude)
        with clock("survey"):
            hard = hardships(found.sites, trials.survey())
            if told := warning(hard, allowed):
                logger.warning(told)
        with clock("calibrate, plan, verify"):
            outcome = trials.all(allowed) if mode == "all" else trials.within(allowed, budget)
        points: tuple[FrontierPoint, ...] = ()
        if frontier:
            with clock("frontier"):
                points = trials.frontier(allowed)
    limit = budget if mode == "budget" else None
    report = assemble(
        graph,
        found,
        mode,
        named(metric),
        output,
        budget=limit,
        measured=outcome.measured,
        planned=outcome.planned,
        isolated=trials.isolated,
        hard=hard,
        unaffine=trials.unaffine,
        frontier=points,
        seconds=clock.seconds,
    )
    chosen = outcome.planned.chosen
    kept = trials.isolated if chosen is None else chosen.calibration
    probe = _probe(graph, args, kwargs)
    made = Conversion(outcome.graph, graph, found, kept, report, probe)
    return finished(made, samples.report, lambda: samples)


def calibrate(
    model: Any,
    batches: Iterable[Any],
    *,
    activations: str = "converted",
    keep_sums: bool = False,
    fit: str = "auto",
    example: Any = None,
    dynamic_shapes: Any = None,
    exclude: str | Sequence[str] = (),
    seed: int = 0,
    provider: str = "cpu",
    trust: bool = False,
    state: str | Path | None = None,
    memory: str | int | None = None,
) -> Calibration:
    """Fit every norm of a model on all of `batches`; `convert(model, calibration=…)` applies that.

    model, batches, fit, exclude and the rest: as for `convert`, which does this and also plans and
    measures. activations "converted": every site is fitted on what the sites before it give once
    they are converted. "original": on the activations of the original; where several sites are
    converted together that is much the worse fit, but runs on other data can be merged with it.
    keep_sums: keep what the fits were made from, for `Calibration.merge`: 8 C max(6144, 8 C) bytes
    for a site of C channels, and 48 C^2 more for a full fit.

    The model may be larger than memory: weights in a Hugging Face folder, or in files beside an
    .onnx file, are read when the walk comes to them, those between two sites at a time, and
    released after. state: the same for a module that was built on the meta device, whose weights
    lie in a .safetensors file, in the shards of a .safetensors.index.json, or in a folder of them.
    memory: what the process may hold, such as "8GB": batches are run in parts and values go to
    temporary files as that demands, or it is refused before anything is run, with what it takes.
    Linear layers whose refit takes more stay; a warning of the logger "dyt_compile" names them.

    Raises OptionError, CaptureError, DataError.
    """
    if activations not in ACTIVATIONS:
        raise OptionError(f"activations is {activations!r}; allowed: {', '.join(ACTIVATIONS)}")
    _checked("all", batches, 1.0, "relative", seed)
    _check_fit(fit)
    memory_bytes = None if memory is None else parse_bytes(memory)
    exclude = patterns(exclude)
    args, kwargs = _example(example, batches)
    graph = capture(
        model,
        args,
        kwargs,
        batches=batches,
        dynamic_shapes=dynamic_shapes,
        provider=provider,
        trust=trust,
        state=state,
        lazy=True,
    )
    found = match(graph)
    allowed = candidates(found, exclude)
    chosen = [s.name for s in found.sites if s.name in allowed or s.tied_to in allowed]
    fitted = fit_sites(
        graph,
        found,
        whole(graph, batches),
        convert=chosen if activations == "converted" else (),
        seed=seed,
        fit=fit,
        keep_sums=keep_sums,
        refits=fit == "auto",
        memory_bytes=memory_bytes,
    )
    able = (name for name in chosen if fitted.fits[name].parameters is not None)
    return replace(fitted, converted=frozenset(able))


def _finished(
    result: Conversion,
    samples: Part | None,
    apart: Callable[[], Splits],
    *,
    fold: bool,
    eight: EightBits | None,
    runtime: str,
) -> Conversion:
    """The conversion folded, and over eight bits, if that is wanted."""
    made = replace(concluded(result, fold), runtime=runtime)
    return made if eight is None else eight(made, samples, apart)


def concluded(result: Conversion, fold: bool) -> Conversion:
    """The conversion with its graph folded, if that is wanted."""
    if not fold:
        return result
    folded = fold_graph(result.graph, match(result.graph))
    return replace(result, graph=folded.graph, folded=folded, unfolded=result.graph)


def compare(
    a: Any,
    b: Any,
    batches: Iterable[Any],
    *,
    metric: Metric = "relative",
    output: str | None = None,
    examples: tuple[Any, Any] = (None, None),
    provider: str = "cpu",
    trust: bool = False,
) -> Measurement:
    """How far model `b` is from model `a`, over all samples.

    Models, batches, trust: as for `convert`. Raises CaptureError, DataError or OptionError.
    """
    check_metric(metric, own=True)
    as_batches(batches)
    graphs = []
    for model, example in zip((a, b), examples, strict=True):
        args, kwargs = _example(example, batches)
        graphs.append(capture(model, args, kwargs, batches=batches, provider=provider, trust=trust))
    original, other = graphs
    with Shelf(original) as shelf:
        samples = whole(original, batches)
        reference = Reference(original, samples, shelf, output=output, metric=metric)
        return reference.measure(other)


def compare_structure(a: Any, b: Any, *, read: bool = False) -> Structure:
    """What two ONNX models have in common, if they are the same function; nothing is run.

    a, b: paths of `.onnx` files, or `onnx_ir.Model`. Model `b` may differ from `a` in nodes alone
    that are proved to compute DyT. Weights stay in their files, unread; read: compare the bytes of
    those that lie in different places. Raises CaptureError, OptionError for other models, and
    VerificationError that names the first difference.
    """
    from .graphs.onnx import OnnxGraph
    from .graphs.onnx_structure import compare as compare_graphs

    sides: list[Any] = []
    for model in (a, b):
        graph = capture(model)
        if not isinstance(graph, OnnxGraph):
            raise OptionError(
                f"model {graph.name!r} is none of ONNX; allowed without data: .onnx files"
            )
        sides += [graph, match(graph).sites]
    return compare_graphs(*sides, read=read)


def _checked(
    mode: str | None,
    batches: Iterable[Any] | None,
    budget: Any,
    metric: Any,
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
    check_metric(metric, own=True)
    if batches is not None:
        as_batches(batches)
    return chosen


def _check_fit(fit: Any) -> None:
    if fit not in FITS:
        raise OptionError(f"fit is {fit!r}; allowed: {', '.join(FITS)}")


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
