"""Shapes that an engine is built for: one profile of least, usual and largest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from ..errors import OptionError

__all__ = ["Profile", "Shape", "Sizes", "combine", "parse_shapes", "profile", "spelled"]

Shape = tuple[int, ...]
Profile = tuple[Shape, Shape, Shape]
"""Least, usual and largest."""

Sizes = tuple[int | str | None, ...]
"""A shape of a file: a number, a name of a dynamic axis, or None for one without a name."""

FLAGS = "--minShapes, --optShapes and --maxShapes"


def parse_shapes(text: str, flag: str) -> dict[str, Shape]:
    """`input:1x3x224x224,mask:1x224` as trtexec spells shapes. Raises OptionError."""
    found = {}
    for part in filter(None, text.split(",")):
        name, colon, sizes = part.rpartition(":")
        try:
            shape = tuple(int(size) for size in sizes.split("x"))
        except ValueError:
            shape = ()
        if not (colon and name and shape and min(shape) >= 0):
            raise OptionError(f"{flag} has {part!r}; allowed: name:1x3x224x224, joined by commas")
        found[name] = shape
    return found


def combine(
    least: Mapping[str, Shape], usual: Mapping[str, Shape], most: Mapping[str, Shape]
) -> dict[str, Profile]:
    """Profiles of three sets of shapes; an input that one lacks has there what another has."""
    combined = {}
    for name in dict.fromkeys([*least, *usual, *most]):
        middle = usual.get(name) or most.get(name) or least[name]
        combined[name] = (least.get(name, middle), middle, most.get(name, middle))
    return combined


def profile(
    inputs: Mapping[str, Sizes], shapes: Mapping[str, Shape | Sequence[Shape]]
) -> dict[str, Profile]:
    """The profile of every dynamic input; a lone shape stands for all three.

    Raises OptionError: for a dynamic input without shapes, named with its axes; for a shape that
    does not fit its input; for three that do not grow.
    """
    for name in shapes:
        if name not in inputs:
            raise OptionError(f"shapes are given for {name!r}; the inputs: {', '.join(inputs)}")
    profiles = {}
    for name, sizes in inputs.items():
        given = shapes.get(name)
        dynamic = [
            f"{axis} ({size})" if size else f"{axis}"
            for axis, size in enumerate(sizes)
            if not isinstance(size, int)
        ]
        if given is not None:
            checked = _three(given)
            _check(name, sizes, checked)
            profiles[name] = checked
        elif dynamic:
            example = "x".join(str(size) if isinstance(size, int) else "1" for size in sizes)
            raise OptionError(
                f"input {name!r} is dynamic in axis {', '.join(dynamic)} and has no shapes; "
                f"give {FLAGS}, such as {name}:{example}"
            )
    return profiles


def spelled(shapes: Mapping[str, Shape]) -> str:
    """Shapes as trtexec spells them."""
    return ",".join(f"{name}:{'x'.join(map(str, shape))}" for name, shape in shapes.items())


def _three(given: Sequence[Any]) -> Profile:
    if all(isinstance(size, int) for size in given):
        shape = tuple(given)
        return shape, shape, shape
    if len(given) != 3:
        raise OptionError(f"shapes are {given!r}; allowed: one shape, or least, usual and largest")
    return tuple(given[0]), tuple(given[1]), tuple(given[2])


def _check(name: str, sizes: Sizes, profile: Profile) -> None:
    for shape in profile:
        fits = len(shape) == len(sizes) and all(
            not isinstance(size, int) or size == length
            for size, length in zip(sizes, shape, strict=True)
        )
        if not fits:
            declared = "x".join("?" if size is None else str(size) for size in sizes)
            raise OptionError(f"shape {spelled({name: shape})} does not fit the input's {declared}")
    for smaller, larger in pairwise(profile):
        if any(a > b for a, b in zip(smaller, larger, strict=True)):
            told = " > ".join(spelled({name: shape}) for shape in (smaller, larger))
            raise OptionError(f"shapes must not shrink from least over usual to largest: {told}")
