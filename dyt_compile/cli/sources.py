"""MODEL and DATA as they are given on the command line."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from .. import data
from ..errors import CaptureError, DataError, OptionError
from ..metrics import METRICS, Metric

__all__ = ["Source", "load_data", "load_metric", "load_model"]


@dataclass(frozen=True)
class Source:
    """A model with an example of its inputs; for files the path, which needs no example."""

    model: Any
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] | None = None

    @property
    def example(self) -> Any:
        """The example as `dyt_compile.convert` takes it."""
        return (self.args, self.kwargs or {}) if self.args or self.kwargs else None


def load_model(text: str) -> Source:
    """MODEL: an .onnx or .pt2 file, a Hugging Face folder, or package.module:function.

    The function, which is the user's own code, returns (model, args) or (model, args, kwargs).
    """
    if Path(text).suffix in (".onnx", ".pt2") or os.path.isdir(text):  # noqa: PTH112 - no name is too long for it
        return Source(Path(text))
    function = _function(text, "MODEL", "an .onnx file, a .pt2 file, a folder")
    found = function()
    if isinstance(found, tuple) and len(found) in (2, 3) and isinstance(found[1], (tuple, list)):
        model, args, *rest = found
        return Source(model, tuple(args), dict(rest[0]) if rest else {})
    raise CaptureError(
        f"{text} returned {_told(found)}; allowed: (model, args) or (model, args, kwargs)"
    )


def load_data(text: str, batch_size: int) -> Iterable[Any]:
    """DATA: an .npz file, a folder of them, or file.py:function that yields tuples or dicts."""
    if batch_size < 1:
        raise OptionError(f"--batch-size is {batch_size}; allowed: 1 and more")
    if ":" in text and not os.path.exists(text):  # noqa: PTH110 - as above
        return _Again(_function(text, "DATA", "an .npz file, a folder of .npz files"), text)
    return data.load(Path(text), batch_size)


def load_metric(text: str) -> Metric:
    """METRIC: the name of one, or file.py:function, the user's own code, a `metrics.Score`.

    Raises OptionError, before a model is loaded.
    """
    if text in METRICS:
        return text
    return _function(text, "--metric", ", ".join(METRICS))


class _Again:
    """Batches from a function, which is called anew whenever they are gone through."""

    def __init__(self, function: Callable[[], Any], text: str) -> None:
        self._function = function
        self._text = text

    def __iter__(self) -> Iterator[Any]:
        batches = self._function()
        if not isinstance(batches, Iterable):
            raise DataError(f"{self._text} returned {_told(batches)}; allowed: batches to iterate")
        return iter(batches)


def _function(text: str, what: str, files: str) -> Callable[..., Any]:
    place, colon, name = text.rpartition(":")
    if not colon or not place or not name.isidentifier():
        raise OptionError(
            f"{what} is {text!r}; allowed: {files}, file.py:function or package.module:function"
        )
    module = _from_file(Path(place)) if place.endswith(".py") else _from_name(place)
    function = getattr(module, name, None)
    if not callable(function):
        raise OptionError(f"{place} has no function {name!r}")
    found: Callable[..., Any] = function
    return found


def _from_file(path: Path) -> ModuleType:
    if not os.path.isfile(path):  # noqa: PTH113 - as above
        raise OptionError(f"file {str(path)!r} does not exist")
    specification = importlib.util.spec_from_file_location(path.stem, path)
    if specification is None or specification.loader is None:
        raise OptionError(f"file {str(path)!r} is no Python module")
    module = importlib.util.module_from_spec(specification)
    sys.modules[path.stem] = module  # dataclasses and pickling of its classes look here
    sys.path.insert(0, str(path.resolve().parent))
    try:
        specification.loader.exec_module(module)
    finally:
        sys.path.pop(0)
    return module


def _from_name(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise OptionError(f"module {name!r} cannot be imported: {error}") from error


def _told(found: Any) -> str:
    if isinstance(found, tuple):
        return f"a tuple of {len(found)}"
    return f"a {type(found).__name__}"
