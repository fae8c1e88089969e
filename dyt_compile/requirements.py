"""Other packages in the versions that this one needs, as its own metadata says."""

from __future__ import annotations

import re
from importlib import metadata

from .errors import OutdatedDependencyError

__all__ = ["check_version"]

PACKAGE = "dyt-compile"
LEAST = re.compile(r"([\w.-]+)\s*>=\s*([\d.]+)")


def check_version(name: str) -> None:
    """Raise OutdatedDependencyError where an installed package is older than this one needs."""
    try:
        needs, version = metadata.requires(PACKAGE) or [], metadata.version(name)
    except metadata.PackageNotFoundError:
        return  # run from its sources, without metadata; or a module that its import will miss
    for need in filter(None, map(LEAST.match, needs)):
        if need[1] == name and _numbers(version) < _numbers(need[2]):
            raise OutdatedDependencyError(name, version, need[2])


def _numbers(version: str) -> tuple[int, ...]:
    """A version as numbers, without what is local: 2.13.0+cu130 as 2, 13, 0."""
    return tuple(map(int, re.findall(r"\d+", version.partition("+")[0])))
