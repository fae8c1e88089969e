"""The module paths that nodes of an ONNX model belong to."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator
from functools import lru_cache

import onnx_ir as ir

from .onnx_constants import is_parameter

__all__ = ["SCOPES", "Scopes"]

SCOPES = "pkg.torch.onnx.name_scopes"
"""Where torch's exporter keeps the module paths of a node, outermost first."""

Scope = tuple[str, ...]


class Scopes:
    """The module path of every node: from torch's metadata, or from the name that it gave the node.

    The older exporter names nodes "/model/layers.0/norm_1/Mul", a level for each module that was
    called: by its attribute, with what numbers it in a list or a sequence, and "_1" where the name
    is taken, be it by an earlier call or by another module. Modules that only hold others are left
    out. So where a node reads a parameter whose path ends in its scope, that path is the true one;
    for scopes without parameters the names are joined, and "_1" is a second call.
    """

    def __init__(self, nodes: Iterable[ir.Node]) -> None:
        self._paths: dict[Scope, str] = {}
        for node in nodes:
            if levels := _levels(node):
                for scope, path in zip(_prefixes(levels), _read_paths(node, levels), strict=False):
                    self._paths.setdefault(scope, path)
        self._known = set(self._paths.values())

    def __call__(self, node: ir.Node) -> str:
        """The path of the innermost module, "" where nothing tells it."""
        scopes = node.metadata_props.get(SCOPES)
        if scopes is not None:
            return _innermost(scopes)
        levels = _levels(node)
        return next(iter(_read_paths(node, levels)), None) or self._path(levels)

    def _path(self, scope: Scope) -> str:
        if not scope:
            return ""
        if scope not in self._paths:
            parent = self._path(scope[:-1])
            again = _joined(parent, _first_call(scope[-1]))
            path = again if again in self._known else _joined(parent, scope[-1])
            self._paths[scope] = path
            self._known.add(path)
        return self._paths[scope]


@lru_cache(maxsize=4096)
def _innermost(scopes: str) -> str:
    """The path of the innermost module in torch's metadata, where the node itself comes last."""
    try:
        path = ast.literal_eval(scopes)
    except (SyntaxError, ValueError, TypeError, MemoryError, RecursionError):
        return ""  # anyone may write there; the last two are those of a deep nesting
    return str(path[-2]) if isinstance(path, list) and len(path) > 1 else ""


def _levels(node: ir.Node) -> Scope:
    """The scope in a node's name; ONNX Runtime's optimizer appends the names of its fusions."""
    name = node.name or ""
    if not name.startswith("/"):
        return ()
    return tuple(part for part in name.split("/") if part and "Fusion" not in part)[:-1]


def _read_paths(node: ir.Node, levels: Scope) -> list[str]:
    """The paths of the scope of a node and of those around it, by a parameter that it reads."""
    for value in node.inputs if levels else ():
        if value is not None and is_parameter(value):
            found = _aligned(levels, str(value.name).rpartition(".")[0])
            if found:
                return found
    return []


def _prefixes(scope: Scope) -> Iterator[Scope]:
    """The scope, the one around it, and so on."""
    return (scope[:length] for length in range(len(scope), 0, -1))


def _aligned(scope: Scope, path: str) -> list[str]:
    """The paths of `_prefixes(scope)`, if that of the scope itself may be `path`; else none."""
    atoms = path.split(".")
    found: list[str] = []
    ends = iter(range(len(atoms), 0, -1))
    for name in reversed(scope):
        for end in ends:
            if _called(atoms[:end]) in (name, _first_call(name)):
                found.append(".".join(atoms[:end]))
                break
            if not found:
                return []
        else:
            return []
    return found


def _called(atoms: list[str]) -> str:
    """What the older exporter calls a module: its path from the last part that is no number on."""
    place = max((p for p, atom in enumerate(atoms) if not atom.isnumeric()), default=0)
    return ".".join(atoms[place:])


def _first_call(name: str) -> str:
    return re.sub(r"_\d+$", "", name)


def _joined(parent: str, name: str) -> str:
    """The path of a module in a parent; "layers.0" in the sequence "layers" is "layers.0"."""
    around = _called(parent.split("."))
    if around and name.startswith(f"{around}."):
        return parent + name.removeprefix(around)
    return f"{parent}.{name}" if parent else name
