"""Exported programs without operators that write to their operands.

torch.export keeps `add_` and its like, and puts what runs under `no_grad` or `autocast` into
graphs of their own. Terms have neither, so a norm that is spelled with them is put in the plain
form first.
"""

from __future__ import annotations

import logging

import torch

from ..errors import first_line

__all__ = ["functional"]

REGIONS = {"wrap_with_set_grad_enabled", "wrap_with_autocast"}
"""Operators that run a graph under a setting."""

HARMLESS = {"aten::detach_"}
"""Operators that are said to write, but change no value."""

PART_OF_NORMS = {
    "mean", "sum", "var", "std", "var_mean", "std_mean", "linalg_vector_norm", "norm",
    "layer_norm", "native_layer_norm", "rms_norm", "group_norm", "rsqrt", "tanh", "erf", "einsum",
}  # fmt: skip
"""Operators without which a region holds no part of a norm, nor DyT: rotary embeddings stand in
regions in most language models, and there is no need to take those apart."""

logger = logging.getLogger("dyt_compile")


def functional(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """The same program where nothing hides a norm, else one in functional form."""
    if not _hides(program.graph_module):
        return program
    try:
        return program.run_decompositions({})
    except Exception as error:  # noqa: BLE001 — torch raises whatever the model's operators raise
        logger.warning(
            "torch cannot bring the program into functional form (%s): norms that are computed in "
            "place may not be found",
            first_line(error),
        )
        return program


def _hides(module: torch.fx.GraphModule) -> bool:
    return any(_writes(node) or _is_region_of_interest(node) for node in module.graph.nodes)


def _writes(node: torch.fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return schema is not None and schema.is_mutable and schema.name not in HARMLESS


def _is_region_of_interest(node: torch.fx.Node) -> bool:
    if getattr(node.target, "__name__", "") not in REGIONS or node.graph.owning_module is None:
        return False
    bodies = [arg for arg in node.all_input_nodes if arg.op == "get_attr"]
    for body in bodies:
        held = getattr(node.graph.owning_module, str(body.target), None)
        if isinstance(held, torch.fx.GraphModule) and any(map(_may_norm, held.graph.nodes)):
            return True
    return False


def _may_norm(node: torch.fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return _is_region_of_interest(node)
    return schema.name.partition("::")[2] in PART_OF_NORMS or _writes(node)
