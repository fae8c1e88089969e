"""Programs of torch.export.save (.pt2), looked at before torch opens them.

torch.export.load unpickles what weights_only refuses (sample inputs, tensor subclasses, constants),
loads compiled libraries, evaluates expressions and guards as Python, imports what a tree of
arguments names, and makes source code of names. So it gets only files in which none of that can be:
whose entries, names, operators and expressions are those that torch itself writes for a plain
program.
"""

from __future__ import annotations

import ast
import io
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from .archives import entries
from .errors import CaptureError

__all__ = ["check_program"]

ENTRIES = re.compile(
    r"archive_format|archive_version|byteorder|\.format_version|\.storage_alignment"
    r"|\.data/(version|serialization_id)|models/[\w.-]+\.json|extra/[\w./-]+"
    r"|data/weights/(weight_\d+|[\w.-]+_weights_config\.json)"
    r"|data/constants/(tensor_\d+|[\w.-]+_constants_config\.json)"
    r"|data/sample_inputs/[\w.-]+\.pt"
)
"""Below the folder that all of them lie in. Compiled libraries and pickled weights, constants and
objects have other names."""

OPERATORS = re.compile(
    r"torch\.ops\.(aten|prims|dyt|quantized_decomposed|torchvision)\.(?!from_file)\w+\.\w+"
    r"|torch\.ops\.higher_order\.(associative_scan|cond|flex_attention|hints_wrapper"
    r"|invoke_subgraph|map_impl|out_dtype|scan|switch|while_loop|wrap_with_autocast"
    r"|wrap_with_set_grad_enabled)"
    r"|torch\._functorch\.predispatch\.(_add_batch_dim|_remove_batch_dim|_vmap_increment_nesting"
    r"|_vmap_decrement_nesting|lazy_load_decompositions)"
    r"|_operator\.(add|and_|eq|floordiv|ge|getitem|gt|le|lshift|lt|mod|mul|ne|neg|or_|pos|pow"
    r"|rshift|sub|truediv)"
    r"|math\.(ceil|floor|trunc)|torch\.sym_(float|int|ite|max|min|not|sqrt)"
)
"""Those that compute. aten::from_file maps a file of any name, and can write to it."""

NAME = re.compile(r"[\w.-]*")
"""Of values, weights and arguments: torch writes some into source code as they are."""

TEXT = re.compile(r"[^'\"\\\n\r]*")
"""Of operands: torch writes them into source code between quotes."""

SYMBOL = re.compile(r"[a-z_]*\d{0,6}")
"""Of a length; torch counts up to its number."""

FUNCTIONS = re.compile(
    r"Abs|Add|And|Ceil(Div|ToInt)|CleanDiv|Eq(uality)?|Float|FloatPow|FloatTrueDiv|FloorDiv"
    r"|FloorToInt|Ge|Gt|Identity|IntTrueDiv|Integer|IsNonOverlappingAndDenseIndicator|LShift|Le|Lt"
    r"|(Strict)?(Greater|Less)Than|Max|Min|Mod|ModularIndexing|Mul|Ne|Not|Or|Piecewise|Pow"
    r"|PowByNatural|PythonMod|RShift|Rational|Round(Decimal|ToInt)|Symbol|ToFloat"
    r"|TruncTo(Float|Int)|Unequality|Where|ceiling|floor"
)
"""Of sympy and of torch's additions to it: those that expressions over lengths are made of."""

METHODS = frozenset(("dim", "size", "storage_offset", "stride"))
"""Of a tensor, in guards."""

POWERS = frozenset(("FloatPow", "LShift", "Pow", "PowByNatural"))
MOST_POWERS, LONGEST, LARGEST = 3, 20_000, 2**63
"""So that an expression is a number of a few digits, in no time."""


class _UnsafeError(Exception):
    """What is no part of a plain program."""


def check_program(path: Path) -> None:
    """Raise CaptureError, with what was found, unless torch may open a .pt2 file.

    What `zipfile`, torch's own reader and `json` raise for a damaged file passes through.
    """
    try:
        _check_records(path)
    except _UnsafeError as error:
        raise CaptureError(
            f"{str(path)!r} may run code when it is opened: {error}; if you trust it all the same, "
            "open it with trust=True (--trust)"
        ) from error


def _check_records(path: Path) -> None:
    import torch

    found = {entry.filename for entry in entries(path, stored=True)}
    reader = torch._C.PyTorchFileReader(str(path))
    names = reader.get_all_records()
    roots = {name.partition("/")[0] for name in found}
    # What is looked at is what torch will see, which is not what another reader makes of it.
    if len(roots) != 1 or {f"{root}/{name}" for root in roots for name in names} != found:
        raise _UnsafeError(
            "its entries lie in no folder of their own, or are not those torch finds"
        )
    size = path.stat().st_size
    if sum(map(reader.get_record_size, names)) > size:
        raise _UnsafeError(f"its entries hold more than its {size} bytes")
    for name in names:
        if ENTRIES.fullmatch(name) is None:
            raise _UnsafeError(f"it holds {name!r}, which is no part of a plain program")
        if name.endswith(".json"):
            _check(json.loads(reader.get_record(name)), "")
        elif name.endswith(".pt"):
            _check_sample(name, reader.get_record(name))


def _check_sample(name: str, data: bytes) -> None:
    """Raise _UnsafeError unless a pickle holds tensors and containers alone."""
    import torch

    if not data:
        return
    try:
        entries(io.BytesIO(data), stored=True)
        torch.load(io.BytesIO(data), weights_only=True, map_location="cpu")
    except Exception as error:
        raise _UnsafeError(f"its entry {name!r} is a pickle of more than tensors") from error


def _check(data: Any, key: str) -> None:
    """Raise _UnsafeError unless everything below a key is what torch writes."""
    if isinstance(data, Mapping):
        _check_fields(data, key)
    elif isinstance(data, list):
        for value in data:
            _check(value, key)
    elif isinstance(data, str):
        _STRINGS.get(key, _check_name)(data)
    elif data is True and key == "use_pickle":
        raise _UnsafeError("it holds pickled tensors (use_pickle)")
    if data is not None and key in ("as_custom_obj", "custom_obj"):
        raise _UnsafeError(f"it holds an object of a class ({key})")


def _check_fields(data: Mapping[str, Any], key: str) -> None:
    if key == "metadata" and all(isinstance(value, str) for value in data.values()):
        return  # traces and module paths, which stay text; a value of that name has other fields
    for name, value in data.items():
        _match(SYMBOL if key == "range_constraints" else NAME, name, "the name")
        _check(value, name)


def _match(pattern: re.Pattern[str], text: str, what: str) -> None:
    if pattern.fullmatch(text) is None:
        raise _UnsafeError(f"it has {what} {text[:80]!r}; allowed: {pattern.pattern}")


def _check_name(text: str) -> None:
    _match(NAME, text, "the name")


def _check_text(text: str) -> None:
    _match(TEXT, text, "the text")


def _check_operator(text: str) -> None:
    if OPERATORS.fullmatch(text) is None:
        raise _UnsafeError(f"it calls {text[:80]!r}, which is no operator of a plain program")


def _check_tree(text: str) -> None:
    """Raise _UnsafeError where a tree of arguments has types that are to be imported."""
    protocol, tree = json.loads(text)
    if not isinstance(protocol, int):
        raise _UnsafeError(f"its arguments are of protocol {protocol!r}; allowed: a number")
    _check_branch(tree)


def _check_branch(tree: Mapping[str, Any]) -> None:
    name, context = tree["type"], tree["context"]
    _check(name, "type")
    if str(name).endswith("defaultdict"):
        raise _UnsafeError(f"its arguments hold a {name}, whose values' type torch would import")
    _check_context(json.loads(context) if isinstance(context, str) else context)
    for child in tree["children_spec"]:
        _check_branch(child)


def _check_context(data: Any) -> None:
    """Raise _UnsafeError unless the keys of a container are plain: enums are imported."""
    if isinstance(data, Mapping):
        raise _UnsafeError(f"its arguments hold {str(data)[:80]!r}, which torch may import")
    for value in data if isinstance(data, list) else [data]:
        if isinstance(value, (list, Mapping)):
            _check_context(value)
        else:
            _check(value, "")


def _check_expression(text: str) -> None:
    """Arithmetic over symbols and lengths: torch evaluates it as Python."""
    told = f"the expression {text[:80]!r}"
    if len(text) > LONGEST:
        raise _UnsafeError(f"{told} has {len(text)} characters; allowed: {LONGEST}")
    powers = 0
    for node in ast.walk(ast.parse(text.strip(), mode="eval")):
        if not isinstance(node, _ARITHMETIC) or not _is_plain(node):
            raise _UnsafeError(f"{told} holds {ast.unparse(node)[:80]!r}; allowed: arithmetic")
        powers += isinstance(node, ast.Pow) or _called(node) in POWERS
    if powers > MOST_POWERS:
        raise _UnsafeError(f"{told} takes {powers} powers; allowed: {MOST_POWERS}")


_ARITHMETIC = (
    ast.Expression, ast.BoolOp, ast.BinOp, ast.UnaryOp, ast.Compare, ast.Call, ast.keyword,
    ast.Constant, ast.Name, ast.Attribute, ast.Subscript, ast.operator, ast.unaryop, ast.boolop,
    ast.cmpop, ast.expr_context,
)  # fmt: skip


def _called(node: ast.AST) -> str:
    return node.func.id if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) else ""


def _is_plain(node: ast.AST) -> bool:
    """Whether a node of an expression is one that only computes."""
    if isinstance(node, ast.Call):
        return (
            isinstance(node.func, ast.Attribute) or FUNCTIONS.fullmatch(_called(node)) is not None
        )
    if isinstance(node, ast.Attribute):
        return node.attr in METHODS
    if isinstance(node, ast.Name):
        return "__" not in node.id
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return NAME.fullmatch(node.value) is not None
    if isinstance(node, ast.Constant) and isinstance(node.value, int):
        return abs(node.value) <= LARGEST
    return True


_STRINGS: dict[str, Callable[[str], None]] = {
    "as_operator": _check_operator,
    "as_string": _check_text,
    "as_strings": _check_text,
    "expr_str": _check_expression,
    "guards_code": _check_expression,
    "in_spec": _check_tree,
    "out_spec": _check_tree,
    "target": _check_operator,
    "torch_version": _check_text,
}
