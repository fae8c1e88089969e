"""The architectures of the matrix, one module a field; each holds a tuple SYSTEMS."""

from __future__ import annotations

import importlib
import pkgutil

from ..system import System

__all__ = ["SYSTEMS"]


def _collected() -> dict[str, System]:
    """Every system of every module here, by its name."""
    found: dict[str, System] = {}
    for module in sorted(info.name for info in pkgutil.iter_modules(__path__)):
        for system in importlib.import_module(f"{__name__}.{module}").SYSTEMS:
            if system.name in found:
                raise ValueError(f"two systems are called {system.name!r}")
            found[system.name] = system
    return found


SYSTEMS: dict[str, System] = _collected()
