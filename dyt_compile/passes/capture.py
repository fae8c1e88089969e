"""Capture: the only place that asks what kind of model it is."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import CaptureError, OptionError
from ..graphs.base import Graph

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
    dynamic_shapes: Any = None,
    provider: str = "cpu",
) -> Graph:
    """The graph of a model.

    model: `nn.Module`, `ExportedProgram`, `GraphModule`, `onnx_ir.Model`, or the path of an
    `.onnx` or `.pt2` file. args, kwargs: an example of its inputs; needed for modules alone.
    dynamic_shapes: as for `torch.export.export`; by default axis 0 of every tensor is dynamic.
    A module is traced in evaluation mode, and left in the mode that it had.

    Raises CaptureError if the model cannot be read or traced, OptionError for other types.
    """
    if isinstance(model, (str, Path)):
        return _from_file(Path(model), provider)
    kind = f"{type(model).__module__}.{type(model).__name__}"
    if kind.startswith("onnx_ir."):
        from ..graphs.onnx import OnnxGraph

        return OnnxGraph.from_model(model.graph.name or "model", model, provider)
    if kind == "torch.export.exported_program.ExportedProgram":
        return _from_program(model, type(model).__name__)
    if hasattr(model, "forward"):
        return _from_module(model, args, dict(kwargs or {}), dynamic_shapes)
    raise OptionError(
        f"model is a {kind}; allowed: nn.Module, ExportedProgram, GraphModule, onnx_ir.Model, "
        "or the path of an .onnx or .pt2 file"
    )


def _from_file(path: Path, provider: str) -> Graph:
    if not path.is_file():
        raise CaptureError(f"model file {str(path)!r} does not exist")
    if path.suffix == ".onnx":
        from ..graphs.onnx import OnnxGraph

        return OnnxGraph.from_file(path, provider)
    if path.suffix == ".pt2":
        import torch

        try:
            program = torch.export.load(path)
        except Exception as error:
            raise CaptureError(
                f"{str(path)!r} is no program of torch.export.save: {_first_line(error)}"
            ) from error
        return _from_program(program, path.stem)
    raise OptionError(f"model file {str(path)!r} ends in {path.suffix!r}; allowed: .onnx, .pt2")


def _from_module(
    module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], dynamic_shapes: Any
) -> Graph:
    import torch

    if not args and not kwargs:
        raise OptionError("a torch model needs an example of its inputs to be traced; none given")
    if dynamic_shapes is None:
        args, kwargs = _at_least_two_rows(args), _at_least_two_rows(kwargs)
        dynamic_shapes = _first_axis_dynamic(args, kwargs)
    modes = {part: part.training for part in module.modules()}
    module.eval()
    try:
        program = torch.export.export(
            module, args, kwargs, dynamic_shapes=dynamic_shapes, strict=False
        )
    except Exception as error:
        raise CaptureError(
            f"torch.export cannot trace {type(module).__name__}: {_first_line(error)}"
        ) from error
    finally:
        for part, training in modes.items():
            part.training = training
    return _from_program(program, type(module).__name__)


def _from_program(program: torch.export.ExportedProgram, name: str) -> Graph:
    from ..graphs.fx import FxGraph

    module = _plain(program.module(check_guards=False))
    args, kwargs = program.example_inputs or ((), {})
    return FxGraph(name, module, tuple(args), dict(kwargs))


def _plain(module: torch.fx.GraphModule) -> torch.fx.GraphModule:
    """A GraphModule that can be trained: exported modules refuse `.train()` and `.eval()`."""
    import torch

    plain = torch.fx.GraphModule(module, module.graph)
    plain.train(False)
    return plain


def _at_least_two_rows(tree: Any) -> Any:
    import torch
    from torch.utils._pytree import tree_map_only

    def grown(x: torch.Tensor) -> torch.Tensor:
        if x.dim() == 0 or x.shape[0] >= LEAST_ROWS:
            return x
        return x.expand(LEAST_ROWS, *x.shape[1:]) if x.shape[0] else x

    return tree_map_only(torch.Tensor, grown, tree)


def _first_axis_dynamic(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """AUTO for axis 0 of every tensor, in the structure that torch.export asks for."""
    import torch
    from torch.utils._pytree import tree_map

    def shape(x: Any) -> Any:
        dynamic = isinstance(x, torch.Tensor) and x.dim() > 0
        return {0: torch.export.Dim.AUTO} if dynamic else None

    return tuple(tree_map(shape, x) for x in (*args, *kwargs.values()))


def _first_line(error: BaseException) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
