"""Numbers in graphs of torch, known without running them: literals, and tensors filled with one."""

from __future__ import annotations

from typing import Any

import torch

__all__ = ["Arguments", "arguments", "attribute", "filled", "scalar_of"]

Arguments = dict[str, Any]

FILLED: dict[str, str | float] = {
    "full": "fill_value", "scalar_tensor": "s", "ones": 1.0, "zeros": 0.0
}  # fmt: skip
"""Operators that make a tensor of one number: that number, or the argument that gives it."""

PASSING = ("expand", "clone", "lift_fresh_copy", "alias", "detach_", "t", "transpose", "permute")
"""Operators that leave such a tensor filled with its number."""

LARGEST = 1 << 22
"""Elements; larger tensors are weights."""


def arguments(node: torch.fx.Node, target: torch._ops.OpOverload) -> Arguments:
    """The node's arguments by name, defaults filled in."""
    schema = target._schema.arguments
    named = {a.name: a.default_value for a in schema if a.has_default_value()}
    named.update(zip((a.name for a in schema), node.args, strict=False))
    named.update(node.kwargs)
    return named


def attribute(module: torch.nn.Module, path: str) -> Any:
    """What a module holds under a dotted path."""
    found: Any = module
    for name in path.split("."):
        found = getattr(found, name)
    return found


def scalar_of(node: torch.fx.Node) -> float | None:
    """The value of a node that makes a constant of one element from a literal."""
    name = _name(node)
    if name not in FILLED or not isinstance(node.target, torch._ops.OpOverload):
        return None
    size = arguments(node, node.target).get("size", ())
    known = isinstance(size, (list, tuple)) and all(length == 1 for length in size)
    return filled(node) if known else None


def filled(operand: Any) -> float | None:
    """The number that an operand holds everywhere; None where that is not known, or learned."""
    if isinstance(operand, (int, float)):
        return float(operand)
    if not isinstance(operand, torch.fx.Node):
        return None
    if operand.op == "get_attr" and operand.graph.owning_module is not None:
        return _held(attribute(operand.graph.owning_module, str(operand.target)))
    name = _name(operand)
    if not isinstance(operand.target, torch._ops.OpOverload):
        return None
    given = arguments(operand, operand.target)
    if name in FILLED:
        number = FILLED[name]
        return filled(given[number] if isinstance(number, str) else number)
    if name in PASSING:
        return filled(operand.args[0])
    if name not in ("mul", "div") or given.get("rounding_mode") is not None:
        return None
    first, second = filled(given["self"]), filled(given["other"])
    if first is None or second is None or (name == "div" and second == 0):
        return None
    return first * second if name == "mul" else first / second


def _held(tensor: Any) -> float | None:
    if not isinstance(tensor, torch.Tensor) or isinstance(tensor, torch.nn.Parameter):
        return None
    if tensor.is_meta or not 0 < tensor.numel() <= LARGEST or tensor.is_complex():
        return None
    first = tensor.flatten()[0]
    return float(first) if bool((tensor == first).all()) else None


def _name(node: torch.fx.Node) -> str:
    schema = getattr(node.target, "_schema", None)
    return "" if schema is None else str(schema.name).removeprefix("aten::")
