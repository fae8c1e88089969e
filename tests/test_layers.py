"""The house: which module may import which, read from the sources."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import dyt_compile

pytestmark = pytest.mark.core

ROOT = Path(dyt_compile.__file__).parent

LAYERS = (
    # what knows of nothing but itself: formulas, words, files
    (
        "archives",
        "errors",
        "dyt",
        "progress",
        "clock",
        "requirements",
        "tracing",
        "ranks",
        "rates",
        "run_progress",
        "shards",
    ),
    ("inductor",),
    (
        "terms",
        "batches",
        "files",
        "fits",
        "ridge",
        "metrics",
        "nn",
        "huggingface",
        "scatter",
        "programs",
        "isolation",
        "memory",
        "weights",
    ),
    ("sitefits",),
    (
        "sites",
        "proof",
        "bounds",
        "calibration",
        "changes",
        "channels",
        "constants",
        "producers",
        "mixing",
        "views",
        "exclusion",
        "survey",
        "savings",
    ),
    ("checkpoints", "losses", "training"),
    # a model as a graph, and what runs it
    ("graphs", "runtime"),
    # the user's samples as native values of a graph
    ("data", "shelf", "revision", "projections"),
    ("walk", "refits", "footprint", "lessons"),
    ("passes",),
    ("exporters", "backends"),
    ("report", "trials"),
    ("saved_fits", "eight_bits"),
    ("compiler",),
    ("recovery",),
    ("cli", "__main__"),
)
"""Lowest first. A module, or all modules of a folder, may import its own layer and those below."""

TORCH_AT_THE_TOP = {
    "inductor", "nn", "backends", "backends.artifact", "backends.lookup", "graphs.dynamo",
    "graphs.fx",
    "graphs.fx_constants", "graphs.fx_edits", "graphs.fx_memory", "graphs.fx_regions",
    "graphs.fx_terms",
    "graphs.fx_training", "graphs.fx_weights", "lessons", "losses", "checkpoints", "passes.recover",
    "rates", "shards",
    "tracing", "training",
}  # fmt: skip
TENSORRT = {"exporters.tensorrt_worker", "exporters.plugin.ahead_of_time", "runtime"}
APART = ("passes",)
"""Folders whose modules never import each other."""


@dataclass(frozen=True)
class Import:
    """One imported module. `late`: inside a function; `typing`: under TYPE_CHECKING."""

    module: str
    late: bool
    typing: bool


def _sources() -> dict[str, Path]:
    """Module names below the package: "compiler", "graphs.fx", "" for the package itself."""
    found = {}
    for path in sorted(ROOT.rglob("*.py")):
        parts = list(path.relative_to(ROOT).with_suffix("").parts)
        if parts[-1] == "__init__":
            parts.pop()
        found[".".join(parts)] = path
    return found


def _is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)


def _walk(node: ast.AST, late: bool, typing: bool) -> Iterator[tuple[ast.AST, bool, bool]]:
    for child in ast.iter_child_nodes(node):
        inner = late or isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        hidden = typing or _is_type_checking(child)
        yield child, inner, hidden
        yield from _walk(child, inner, hidden)


def _imports(name: str, source: str, *, package: bool, known: set[str]) -> list[Import]:
    """Imports of a module; those of this package by their name below it ("graphs.fx")."""
    here = [*name.split("."), ""] if package and name else name.split(".")
    found = []
    for node, late, typing in _walk(ast.parse(source), False, False):
        if isinstance(node, ast.Import):
            found += [Import(alias.name, late, typing) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                base = [*here[: len(here) - node.level], *(node.module or "").split(".")]
                own = ".".join(part for part in base if part)
                names = [f"{own}.{alias.name}".lstrip(".") for alias in node.names]
                modules = [full if full in known else own for full in names]
                found += [Import(f"dyt_compile.{m}".rstrip("."), late, typing) for m in modules]
            else:
                found.append(Import(str(node.module), late, typing))
    return found


SOURCES = _sources()
IMPORTS = {
    name: _imports(
        name,
        path.read_text(encoding="utf-8"),
        package=path.stem == "__init__",
        known=set(SOURCES),
    )
    for name, path in SOURCES.items()
}
MODULES = [name for name in SOURCES if name]


def _own(name: str) -> Iterator[Import]:
    """Imports within the package, without those for type checkers alone."""
    for found in IMPORTS[name]:
        if found.module.partition(".")[0] == "dyt_compile" and not found.typing:
            yield Import(found.module.partition(".")[2], found.late, found.typing)


def _layer(name: str) -> int:
    top = name.partition(".")[0]
    for place, names in enumerate(LAYERS):
        if top in names:
            return place
    raise AssertionError(f"module {name!r} has no layer; give it one in LAYERS")


def test_reader_of_imports_finds_every_kind() -> None:
    source = (
        "import torch.fx as fx\nfrom . import base\nfrom ..nn import operator\n"
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from ..compiler import convert\n"
        "def f():\n    import tensorrt\n    class C:\n        from .. import dyt\n"
    )
    found = _imports("graphs.fx", source, package=False, known={"graphs.base", "nn", "dyt"})
    assert found == [
        Import("torch.fx", False, False),
        Import("dyt_compile.graphs.base", False, False),
        Import("dyt_compile.nn", False, False),
        Import("typing", False, False),
        Import("dyt_compile.compiler", False, True),
        Import("tensorrt", True, False),
        Import("dyt_compile.dyt", True, False),
    ]
    folder = _imports("cli", "from . import convert", package=True, known={"cli.convert"})
    assert folder == [Import("dyt_compile.cli.convert", False, False)]


def test_reader_of_imports_resolves_every_import_of_the_package() -> None:
    imported = {own.module for name in MODULES for own in _own(name)}
    assert imported <= set(SOURCES)
    assert {"terms", "graphs.base", "passes.match", "compiler"} <= imported


@pytest.mark.parametrize("name", MODULES)
def test_module_imports_its_own_layer_and_those_below(name: str) -> None:
    above = [own.module for own in _own(name) if _layer(own.module) > _layer(name)]
    assert not above, f"{name} imports {above}, which lie above it"


def test_package_itself_imports_no_module_early() -> None:
    assert not list(_own(""))


def test_modules_import_each_other_in_no_circle() -> None:
    edges = {name: {own.module for own in _own(name) if not own.late} for name in MODULES}
    done: set[str] = set()
    while len(done) < len(edges):
        free = {name for name, below in edges.items() if name not in done and below <= done}
        assert free, f"a circle among {sorted(set(edges) - done)}"
        done |= free


@pytest.mark.parametrize("folder", APART)
def test_modules_of_a_folder_never_import_each_other(folder: str) -> None:
    members = [name for name in MODULES if name.startswith(f"{folder}.")]
    assert members
    for name in members:
        siblings = [i.module for i in IMPORTS[name] if f"dyt_compile.{folder}." in f"{i.module}."]
        assert not siblings, f"{name} imports {siblings}"


def test_passes_never_import_exporters() -> None:
    for name in MODULES:
        if name.startswith("passes."):
            assert not [own for own in _own(name) if own.module.startswith("exporters")]


@pytest.mark.parametrize("name", [m for m in MODULES if m not in TORCH_AT_THE_TOP])
def test_torch_is_imported_late(name: str) -> None:
    early = [
        found.module
        for found in IMPORTS[name]
        if found.module.partition(".")[0] in ("torch", "torchvision", "onnxscript")
        and not (found.late or found.typing)
    ]
    assert not early


@pytest.mark.parametrize("name", [m for m in MODULES if m not in TORCH_AT_THE_TOP])
def test_modules_that_import_torch_are_imported_late(name: str) -> None:
    early = [own.module for own in _own(name) if own.module in TORCH_AT_THE_TOP and not own.late]
    assert not early


def test_tensorrt_is_imported_in_few_places_and_late() -> None:
    for name in MODULES:
        found = [i for i in IMPORTS[name] if i.module.partition(".")[0].startswith("tensorrt")]
        assert not found or name in TENSORRT, name
        assert all(each.late or each.typing for each in found), name


def test_onnxruntime_is_imported_late() -> None:
    for name in MODULES:
        for found in IMPORTS[name]:
            if found.module.partition(".")[0] == "onnxruntime":
                assert found.late, name


@pytest.mark.parametrize("name", MODULES)
def test_module_says_what_it_is_for_and_what_it_gives(name: str) -> None:
    tree = ast.parse(SOURCES[name].read_text(encoding="utf-8"))
    if not tree.body:
        return
    assert ast.get_docstring(tree)
    defined = {node.name for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    if name != "__main__" and any(not part.startswith("_") for part in defined):
        targets = [t for node in tree.body if isinstance(node, ast.Assign) for t in node.targets]
        assert "__all__" in {t.id for t in targets if isinstance(t, ast.Name)}
