"""Capture: the only place that asks what kind of model it is."""

from __future__ import annotations

import inspect
import logging
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..batches import as_arguments
from ..errors import CaptureError, DataError, DytCompileError, OptionError, first_line
from ..graphs.base import Graph
from ..huggingface import example_inputs, is_folder, load_folder, open_folder
from ..programs import check_program
from ..requirements import check_version
from ..weights import Weights, open_weights

if TYPE_CHECKING:
    import torch

__all__ = ["capture"]

LEAST_ROWS = 2
"""torch.export takes an axis of length 1 for a constant: axis 0 is traced with two rows."""


def capture(
    model: Any,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    batches: Iterable[Any] = (),
    dynamic_shapes: Any = None,
    provider: str = "cpu",
    trust: bool = False,
    state: str | Path | None = None,
    lazy: bool = False,
) -> Graph:
    """The graph of a model.

    model: `nn.Module`, `ExportedProgram`, `GraphModule`, `onnx_ir.Model`, or the path of an
    `.onnx` file, a `.pt2` file or a Hugging Face folder (config.json and safetensors).
    args, kwargs: an example of its inputs; needed for modules alone.
    dynamic_shapes: as for `torch.export.export`; by default axis 0 of every tensor is dynamic,
    and every axis whose length differs between the example and `batches`.
    state: where the weights lie of a module on the meta device (`weights.open_weights`); they are
    read when a part of the graph runs, and released after. lazy: the same for the weights of a
    Hugging Face folder.
    A module is traced in evaluation mode, and left in the mode that it had.
    trust: open a `.pt2` file whatever is in it; else only one in which nothing can run when it is
    opened (see `programs`).

    Raises CaptureError if the model cannot be read or traced, OptionError for other types and for
    an unknown provider.
    """
    from ..runtime import parse_provider

    parse_provider(provider)  # of torch models too, which have no use for it
    if state is not None:
        return _from_meta(model, Path(state), args, dict(kwargs or {}), batches, dynamic_shapes)
    if isinstance(model, (str, Path)) and is_folder(Path(model)):
        check_version("torch")
        opened = open_folder(Path(model)) if lazy else (load_folder(Path(model)), None)
        return _from_folder(*opened, args, dict(kwargs or {}), batches, dynamic_shapes)
    if isinstance(model, (str, Path)):
        return _from_file(Path(model), provider, trust=trust)
    kind = f"{type(model).__module__}.{type(model).__name__}"
    if kind.startswith("onnx_ir."):
        from ..graphs.onnx import OnnxGraph

        return OnnxGraph.from_model(model.graph.name or "model", model, provider)
    if kind == "torch.export.exported_program.ExportedProgram":
        return _from_program(model, type(model).__name__)
    if _is_module(model):
        return _from_module(model, args, dict(kwargs or {}), batches, dynamic_shapes)
    raise OptionError(
        f"model is a {kind}; allowed: nn.Module, ExportedProgram, GraphModule, onnx_ir.Model, "
        "or the path of an .onnx file, a .pt2 file or a Hugging Face folder"
    )


def _is_module(model: Any) -> bool:
    """Whether it is a module that torch.export traces; without torch nothing is."""
    torch = sys.modules.get("torch")
    return (
        torch is not None
        and isinstance(model, torch.nn.Module)
        and not isinstance(model, torch.jit.ScriptModule)
    )


def _from_file(path: Path, provider: str, *, trust: bool) -> Graph:
    if not path.is_file():
        raise CaptureError(f"model file {str(path)!r} does not exist")
    if path.suffix == ".onnx":
        from ..graphs.onnx import OnnxGraph

        return OnnxGraph.from_file(path, provider)
    if path.suffix == ".pt2":
        with _opening(path):
            return _from_program(_opened(path, trust=trust), path.stem)
    raise OptionError(
        f"model file {str(path)!r} ends in {path.suffix!r}; allowed: .onnx, .pt2, "
        "or a folder with a config.json"
    )


def _opened(path: Path, *, trust: bool) -> torch.export.ExportedProgram:
    """The program of a `.pt2` file."""
    check_version("torch")
    import torch

    logger = logging.getLogger("torch.export")
    level = logger.level
    logger.setLevel(logging.ERROR)  # it logs a traceback and then raises another error
    try:
        if not trust:
            check_program(path)
        return torch.export.load(path)
    finally:
        logger.setLevel(level)


@contextmanager
def _opening(path: Path) -> Iterator[None]:
    """While a foreign program is read: whatever fails then, it is the file that is no program."""
    try:
        yield
    except DytCompileError:
        raise
    except Exception as error:
        raise CaptureError(
            f"{str(path)!r} is no program of torch.export.save: {first_line(error)}"
        ) from error


def _from_meta(
    model: Any,
    state: Path,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    batches: Iterable[Any],
    dynamic_shapes: Any,
) -> Graph:
    """The graph of a module on the meta device, whose weights lie in files."""
    if not _is_module(model) or not _is_absent(model):
        raise OptionError(
            "state is of modules that are built on the meta device (with torch.device('meta')); "
            "models in files know where their weights are"
        )
    weights = open_weights(state)
    return _from_module(model, args, kwargs, batches, dynamic_shapes, weights)


def _is_absent(module: torch.nn.Module) -> bool:
    return any(parameter.is_meta for parameter in module.parameters())


def _any_absent(tree: Any) -> bool:
    from torch.utils._pytree import tree_leaves

    return any(getattr(leaf, "is_meta", False) for leaf in tree_leaves(tree))


def _from_folder(
    model: torch.nn.Module,
    weights: Weights | None,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    batches: Iterable[Any],
    dynamic_shapes: Any,
) -> Graph:
    if not args and not kwargs:
        kwargs = example_inputs(model, length=8)
        batches = [example_inputs(model, length=9)]  # so that the axis of tokens is dynamic
    return _from_module(model, args, kwargs, batches, dynamic_shapes, weights)


def _from_module(
    module: torch.nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    batches: Iterable[Any],
    dynamic_shapes: Any,
    weights: Weights | None = None,
) -> Graph:
    import torch

    from ..graphs.fx import automatic_axes
    from ..graphs.fx_weights import named_weights, stood_in

    if not args and not kwargs:
        raise OptionError("a torch model needs an example of its inputs to be traced; none given")
    args, kwargs = _as_tensors((args, _in_order(module, kwargs)))
    if weights is None and _is_absent(module) and not _any_absent((args, kwargs)):
        raise CaptureError(
            f"the weights of {type(module).__name__} are on the meta device: calibrate reads them "
            "from state, a .safetensors or .safetensors.index.json file; whatever else needs data "
            "takes a model with its weights in memory"
        )
    if dynamic_shapes is None:
        varying = _varying_axes(module, (args, kwargs), batches)
        args, kwargs = _at_least_two_rows((args, kwargs))
        dynamic_shapes = automatic_axes(module.forward, args, kwargs, varying)
    modes = {part: part.training for part in module.modules()}
    try:
        _evaluate(module)
        with nullcontext() if weights is None else stood_in(module):
            program = torch.export.export(
                module, args, kwargs, dynamic_shapes=dynamic_shapes, strict=False
            )
    except Exception as error:
        raise CaptureError(
            f"torch.export cannot trace {type(module).__name__}: {first_line(error)}"
        ) from error
    finally:
        for part, training in modes.items():
            part.training = training
    named = None if weights is None else named_weights(module, weights)
    return _from_program(program, type(module).__name__, named)


def _evaluate(module: torch.nn.Module) -> None:
    """Evaluation mode, but for what torch.export made: that keeps the mode it was traced in."""
    try:
        module.eval()
    except NotImplementedError:
        for part in module.modules():
            part.training = False


def _from_program(
    program: torch.export.ExportedProgram, name: str, weights: Weights | None = None
) -> Graph:
    """weights: of a program that was traced without them."""
    from ..graphs.fx import FxGraph
    from ..graphs.fx_regions import lay_open
    from ..graphs.fx_weights import laid

    module = _plain(_functional(program).module(check_guards=False))
    lay_open(module)
    module.graph.eliminate_dead_code()  # as every exporter does: what nothing reads is no norm
    if weights is not None:
        laid(module, weights)
    args, kwargs = program.example_inputs or ((), {})
    return FxGraph(name, module, tuple(args), dict(kwargs), stored=weights)


def _functional(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """The program without operators that write in place, and without vmap's.

    A part of the graph can then run alone, and again: what it needs is among its operands, and no
    buffer of the model changes (running statistics, caches).
    """
    from ..graphs.fx_regions import is_functional

    if is_functional(program.graph_module):
        return program
    try:
        functional: torch.export.ExportedProgram = program.run_decompositions({})
    except Exception as error:
        raise CaptureError(
            f"the program cannot be made functional (in-place writes, vmap): {first_line(error)}"
        ) from error
    return functional


def _plain(module: torch.fx.GraphModule) -> torch.fx.GraphModule:
    """A GraphModule that can be trained: exported modules refuse `.train()` and `.eval()`."""
    import torch

    plain = torch.fx.GraphModule(module, module.graph)
    plain.train(False)
    return plain


def _in_order(module: torch.nn.Module, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Keyword arguments as `forward` has them: the traced module takes them by place in that order.

    Else a batch given by place would be bound to the names in the order of the example.
    """
    names = list(inspect.signature(module.forward).parameters)
    known = {name: kwargs[name] for name in names if name in kwargs}
    return known | kwargs


def _as_tensors(tree: Any) -> Any:
    from torch.utils._pytree import tree_map_only

    from ..graphs.fx import as_tensor

    return tree_map_only(np.ndarray, as_tensor, tree)


def _at_least_two_rows(tree: Any) -> Any:
    import torch
    from torch.utils._pytree import tree_map_only

    def grown(x: torch.Tensor) -> torch.Tensor:
        if x.dim() == 0 or x.shape[0] != 1:
            return x
        return x.expand(LEAST_ROWS, *x.shape[1:])

    return tree_map_only(torch.Tensor, grown, tree)


def _varying_axes(
    module: torch.nn.Module, example: tuple[Any, ...], batches: Iterable[Any]
) -> list[set[int]]:
    """For each tensor of the example, axis 0 and the axes whose length differs between batches."""
    from ..graphs.fx import argument_paths

    def shapes(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[Any, tuple[int, ...]]:
        try:
            found = argument_paths(module.forward, args, kwargs)
        except TypeError as error:
            told = ", ".join(kwargs) or f"{len(args)} tensors"
            raise DataError(
                f"{told} given, which do not fit {type(module).__name__}.forward: {error}"
            ) from error
        return {path: tuple(getattr(leaf, "shape", ())) for path, leaf in found.items()}

    known = shapes(*example)
    varying: dict[Any, set[int]] = {path: {0} if shape else set() for path, shape in known.items()}
    for batch in batches:
        found = shapes(*as_arguments(batch))
        if {p: len(shape) for p, shape in found.items()} != {p: len(s) for p, s in known.items()}:
            raise DataError(f"a batch has tensors {_told(found)}; the example: {_told(known)}")
        for path, axes in varying.items():
            lengths = enumerate(zip(known[path], found[path], strict=True))
            axes.update(axis for axis, (m, n) in lengths if m != n)
    return list(varying.values())


def _told(shapes: Mapping[Any, tuple[int, ...]]) -> str:
    from ..graphs.fx import path_name

    return ", ".join(f"{path_name(path)} {list(shape)}" for path, shape in shapes.items())
