"""The routes of the matrix: each takes a system one way and says in a cell what came of it.

As a script (`python -m benchmarks.matrix.routes NAME [--quick]`) it takes one system through all
of them, in a process that may end: a line of JSON as each route begins and when it is done.
"""

from __future__ import annotations

import json
import os
import re
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only, tree_unflatten

import dyt_compile
from dyt_compile.compiler import Conversion
from dyt_compile.dyt import FORMS
from dyt_compile.errors import first_line
from dyt_compile.exporters.onnx import DEFAULT_OPSET, OnnxExport
from dyt_compile.nn import operator
from dyt_compile.passes.match import match
from tests.exporters.engines import profiles

from .system import Inputs, System
from .truth import Truth, WrongError, counted, disagreement, miscounted, some, truth

__all__ = ["ONNX", "QUICK", "ROUTES", "Cell", "State", "Subject", "facts", "take"]

SAMPLES, BATCHES = 2, 8
"""A batch, and how many: enough to fit a norm that sees one row a sample, whatever is dynamic."""

TOLERANCE = 1e-4
"""Largest difference between two ways to compute a float32 model, relative to its output."""

TARGET = "sm89"


class ClosedError(Exception):
    """Torch, or another tool before or behind us, does not take the model at all."""


class State:
    """What came of a route."""

    PASS, WRONG, CLOSED, SKIPPED, ENDED = "pass", "wrong", "closed", "skipped", "ended"


@dataclass(frozen=True)
class Cell:
    """state: one of `State`; told: the figure to show; reason: a note to it, in one line."""

    state: str = State.PASS
    told: str = ""
    reason: str = ""

    def to_dict(self) -> dict[str, str]:
        """The cell as JSON data, without what is empty."""
        return {name: text for name, text in vars(self).items() if text}


@dataclass(frozen=True)
class Route:
    """run: raises WrongError or ClosedError. needs: a route that must pass before."""

    run: Callable[[Subject], Cell]
    needs: str = ""


class Subject:
    """A system at small size, with what several routes need made once."""

    def __init__(self, system: System, folder: Path) -> None:
        torch.manual_seed(0)
        self.system = system
        self.folder = folder
        self.model = system.small().eval()
        self.inputs = system.inputs(self.model, SAMPLES, 0)

    @cached_property
    def truth(self) -> Truth:
        return truth(self.system, self.model, self.inputs, kinds=True)

    @cached_property
    def found(self) -> dyt_compile.Match:
        return dyt_compile.inspect(self.model, self.inputs.args, self.inputs.kwargs)

    @cached_property
    def program(self) -> torch.export.ExportedProgram:
        with tool("torch.export"):
            return exported(self.model, self.inputs)

    @cached_property
    def conversion(self) -> Conversion:
        given = [self.system.inputs(self.model, SAMPLES, seed) for seed in range(BATCHES)]
        return dyt_compile.convert(
            self.model,
            [(inputs.args, inputs.kwargs) for inputs in given],
            mode="all",
            fit="diagonal",  # torch.compile takes no other
            fold=False,  # benchmarks.folding does that
        )

    @cached_property
    def portable(self) -> OnnxExport:
        return dyt_compile.export_onnx(self.conversion, self.folder / "converted.onnx")

    @cached_property
    def unseen(self) -> Inputs:
        """A batch that no stage has seen."""
        return self.system.inputs(self.model, SAMPLES, BATCHES)

    def outputs(self, model: Callable[..., Any]) -> list[Tensor]:
        """What a model makes of the unseen batch, its tensors in order."""
        with torch.no_grad():
            made = model(*self.unseen.args, **self.unseen.kwargs)
        return [leaf for leaf in tree_leaves(made) if isinstance(leaf, Tensor)]


@contextmanager
def tool(name: str) -> Iterator[None]:
    """What fails inside is the failure of the tool of that name, and closes the route."""
    try:
        yield
    except Exception as error:
        raise ClosedError(f"{name}: {type(error).__name__}: {first_line(error)}") from error


@contextmanager
def alike(name: str, original: Callable[[], Any]) -> Iterator[None]:
    """What fails inside, and with the original model too, is the failure of the tool `name`."""
    try:
        yield
    except Exception:
        with tool(name):
            original()
        raise


def exported(model: nn.Module, inputs: Inputs) -> torch.export.ExportedProgram:
    return torch.export.export(model, inputs.args, inputs.kwargs, strict=False)


def full_size(subject: Subject) -> Cell:
    """Real width and depth on the meta device: no weights, so only matching can be done."""
    system = subject.system
    if system.full is None:
        return Cell(State.SKIPPED)
    with torch.device("meta"):
        model = system.full().eval()
    inputs = system.inputs(model, SAMPLES, 0)
    args, kwargs = tree_map_only(Tensor, lambda t: t.to("meta"), (inputs.args, inputs.kwargs))
    inputs = Inputs(args, kwargs)
    start = time.process_time()
    with tool("torch.export"):
        program = exported(model, inputs)
    middle = time.process_time()
    found = dyt_compile.inspect(program)
    end = time.process_time()
    # Transformers looks into the values of plain meta tensors, and knows fake ones.
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = tree_map_only(Tensor, mode.from_tensor, (args, kwargs))
        true = truth(system, model, Inputs(*fake))
    agree(found, true)
    return Cell(told=f"{len(found.sites)} in {middle - start:.1f} + {end - middle:.1f} s")


def symbolic(subject: Subject) -> Cell:
    """A GraphModule of torch.fx.symbolic_trace, its norms leaf modules."""
    with tool("torch.fx.symbolic_trace"):
        traced = torch.fx.symbolic_trace(subject.model)
    return agree(
        dyt_compile.inspect(traced, subject.inputs.args, subject.inputs.kwargs), subject.truth
    )


def undecomposed(subject: Subject) -> Cell:
    """torch.export with a dynamic axis 0, as `inspect` does it, and with static shapes."""
    agree(dyt_compile.inspect(subject.program), subject.truth)
    return agree(subject.found, subject.truth)


def decomposed(subject: Subject) -> Cell:
    """An exported program in core aten operators."""
    with tool("run_decompositions"):
        program = subject.program.run_decompositions()
    return agree(dyt_compile.inspect(program), subject.truth)


def agree(found: dyt_compile.Match, true: Truth) -> Cell:
    """Passes where a match says what the truth is."""
    told = disagreement(found, true)
    if told:
        raise WrongError(told)
    return Cell()


def refusals(subject: Subject) -> Cell:
    """What the matcher refuses, and why."""
    found = subject.found.refusals
    kinds = Counter(refusal.kind.value for refusal in found)
    told = ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))
    return Cell(told=told or "none", reason=" ".join(sorted({f"{r.reason}." for r in found})))


def converted(subject: Subject) -> Cell:
    """Every norm of the model turned into DyT; the model still runs."""
    conversion = subject.conversion
    true = subject.truth
    kept = [f"{s.name} ({s.reason})" for s in conversion.report.sites if s.reason]
    kept = [told for told in kept if told.partition(" ")[0] not in true.idle]
    sites = counted(match(conversion.graph), true)
    if kept or not all(site.kind.lossless for site in sites):
        raise WrongError(f"still norms: {some(kept)}")
    if len(sites) != len(true.norms):
        raise WrongError(f"{len(sites)} DyT instead of {len(true.norms)}")
    outputs = [x for x in subject.outputs(conversion.model) if x.is_floating_point()]
    if not all(bool(x.isfinite().all()) for x in outputs):
        raise WrongError("an output of the converted model is not finite")
    return Cell()


def compiled(subject: Subject) -> Cell:
    """torch.compile of the original with the calibration computes what the converted does."""
    forms = {operator(form) for form in FORMS.values()}
    seen: list[int] = []

    def count(module: torch.fx.GraphModule, _: Sequence[Any]) -> Callable[..., Any]:
        seen.append(sum(node.target in forms for node in module.graph.nodes))
        return module.forward

    result = subject.conversion
    backend = dyt_compile.backend(calibration=result.calibration, inner=count, model=subject.model)
    with alike("torch.compile", lambda: traced_whole(subject, "eager")):
        outputs = traced_whole(subject, backend)
    if seen != [len(subject.truth.norms)]:
        raise WrongError(f"{seen} sites are DyT instead of {len(subject.truth.norms)}")
    same(outputs, subject.outputs(result.model))
    return Cell()


def traced_whole(subject: Subject, backend: Any) -> list[Tensor]:
    """The outputs of the original model through a backend of torch.compile."""
    torch.compiler.reset()
    return subject.outputs(torch.compile(subject.model, backend=backend, fullgraph=True))


def onnx_file(opset: int, dynamo: bool, subject: Subject) -> Cell:
    """The original model as torch's exporters write it, read without torch."""
    path = subject.folder / f"original-{opset}.onnx"
    with tool("torch.onnx.export"):
        (original if dynamo else legacy)(subject, path, opset)
    told = miscounted(dyt_compile.inspect(path), subject.truth)
    if told:
        raise WrongError(told[0])
    return Cell()


def original(subject: Subject, path: Path, opset: int) -> None:
    """torch's exporter over torch.export; it may write what is not valid."""
    torch.onnx.export(subject.program, f=path, opset_version=opset, verbose=False)
    onnx.checker.check_model(path)


def legacy(subject: Subject, path: Path, opset: int) -> None:
    """torch's exporter over TorchScript, which takes tensors by place and returns a tuple."""
    leaves, tree = tree_flatten((subject.inputs.args, subject.inputs.kwargs))
    places = [place for place, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]

    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = subject.model

        def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
            filled = list(leaves)
            for place, tensor in zip(places, tensors, strict=True):
                filled[place] = tensor
            args, kwargs = tree_unflatten(filled, tree)
            made = tree_leaves(self.model(*args, **kwargs))
            return tuple(leaf for leaf in made if isinstance(leaf, Tensor))

    tensors = tuple(leaves[place] for place in places)
    torch.onnx.export(Flat().eval(), tensors, path, dynamo=False, opset_version=opset)


def parity(subject: Subject) -> Cell:
    """The converted model in ONNX Runtime, on the batch of its check and on an unseen one."""
    path = subject.folder / "original.onnx"
    with alike("torch.onnx.export", lambda: original(subject, path, DEFAULT_OPSET)):
        session = onnxruntime.InferenceSession(subject.portable.path)
    batch = subject.conversion.graph.bind((subject.unseen.args, subject.unseen.kwargs))
    feeds = {value.name: batch[value.name].numpy() for value in session.get_inputs()}
    outputs = [torch.from_numpy(array) for array in session.run(None, feeds)]
    error = same(outputs, subject.outputs(subject.conversion.model))
    return Cell(told=f"{max(error, subject.portable.export_error or 0.0):.0e}")


def engine(subject: Subject) -> Cell:
    """TensorRT-RTX builds an engine from the converted model's file; it needs no GPU for that."""
    path = subject.portable.path
    with tool("build"):
        report = dyt_compile.build_engine(
            path,
            subject.folder / "converted.plan",
            runtime="tensorrt-rtx",
            shapes=profiles(path),
            target=TARGET,
        )
    return Cell(told=f"{report.bytes / 1e6:.1f} MB")


def same(outputs: list[Tensor], wanted: list[Tensor]) -> float:
    """The largest difference, relative to the largest value of its output; raises WrongError."""
    if [x.shape for x in outputs] != [x.shape for x in wanted]:
        shapes = [[tuple(x.shape) for x in tensors] for tensors in (outputs, wanted)]
        raise WrongError(f"outputs of shapes {shapes[0]} instead of {shapes[1]}")
    pairs = zip(outputs, wanted, strict=True)
    error = max((_relative(x.double(), y.double()) for x, y in pairs), default=0.0)
    if not error <= TOLERANCE:
        raise WrongError(f"its outputs differ by {error:.1e}")
    return error


def _relative(x: Tensor, y: Tensor) -> float:
    """Infinity where one is NaN and the other is not."""
    if not torch.equal(x.isfinite(), y.isfinite()):
        return float("inf")
    finite = y.isfinite()
    if not bool(finite.any()):
        return 0.0
    return float((x - y)[finite].abs().max() / (y[finite].abs().max() or 1.0))


ONNX = {"18": (18, True), "20": (20, True), "23": (23, True), "14": (14, False), "17": (17, False)}
"""The files that are read: opset, and whether the exporter is the one over torch.export."""

ROUTES: dict[str, Route] = {
    "export": Route(undecomposed),
    "refusals": Route(refusals),
    "fx": Route(symbolic),
    "decomposed": Route(decomposed),
    "full": Route(full_size),
    "convert": Route(converted),
    "compile": Route(compiled, needs="convert"),
    "parity": Route(parity, needs="convert"),
    "engine": Route(engine, needs="parity"),
    **{f"onnx{name}": Route(partial(onnx_file, *form)) for name, form in ONNX.items()},
}

QUICK = ("export", "refusals", "fx", "decomposed")
"""Routes of seconds, that a test takes again."""


def take(subject: Subject, name: str, done: dict[str, Cell]) -> Cell:
    """One route as a cell: what fails is told in it, whatever it is."""
    route = ROUTES[name]
    if route.needs and done[route.needs].state != State.PASS:
        return Cell(State.SKIPPED, reason=f"needs {route.needs}")
    try:
        return route.run(subject)
    except ClosedError as closed:
        return Cell(State.CLOSED, reason=line(str(closed)))
    except WrongError as wrong:
        return Cell(State.WRONG, reason=line(str(wrong)))
    except Exception as error:  # noqa: BLE001 - the matrix shows the failures of any code
        return Cell(State.WRONG, reason=line(f"{type(error).__name__}: {first_line(error)}"))


def line(text: str) -> str:
    """A reason as it stands in a note: its first sentence, the same on every machine."""
    text = re.sub(r"(?:/[\w.-]+){2,}/", "", " ".join(text.split()))
    text = re.sub(r" at 0x[0-9a-f]+", "", text).split(". ")[0]
    return text if len(text) <= 160 else f"{text[:157]}..."


def facts(subject: Subject) -> dict[str, Any]:
    """What is known of a system before any route: the truth."""
    system, true = subject.system, subject.truth
    return {
        "group": system.group,
        "source": system.source,
        "sites": len(true.norms),
        "kinds": dict(sorted((true.kinds or Counter()).items())),
    }


def main(name: str, quick: bool) -> None:
    """Take a system through its routes; whatever else is printed goes to stderr."""
    from .systems import SYSTEMS

    told = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())

    def say(**what: Any) -> None:
        told.write(json.dumps(what) + "\n")

    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory(prefix="matrix-") as folder:
        subject = Subject(SYSTEMS[name], Path(folder))
        say(facts=facts(subject))
        done: dict[str, Cell] = {}
        for route in QUICK if quick else ROUTES:
            say(begun=route)
            done[route] = take(subject, route, done)
            say(route=route, cell=done[route].to_dict())
        if not quick:
            say(facts={"seconds": round(sum(os.times()[:4]), 1)})  # its own, and its processes'


if __name__ == "__main__":
    main(sys.argv[1], "--quick" in sys.argv[2:])
