"""Which weights can take up an affine map of the channels of a site's output, exactly.

Where every reader is a product with a constant weight, reached through nothing but what commutes
with a map of the channels (a mean or a slice over tokens, a view, a transpose), a full matrix costs
nothing when the model runs: W becomes M W, and the bias takes up what W makes of the offset.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from .changes import Change
from .channels import Array, Kind, Stop, Uptake, Weights, against_weight, carried, narrowed
from .dyt import DytParameters, Mix
from .producers import changes
from .sites import NormSite
from .terms import Value

__all__ = ["changes_for", "obstacle", "scaling_changes", "scaling_obstacle"]


def obstacle(site: NormSite, outputs: Mapping[str, Value]) -> str | None:
    """Why the readers of a site cannot take up a matrix, None where they can.

    outputs: of the graph. The answer needs no weights.
    """
    if site.channels is None or site.output.shape is None:
        return "its number of channels is unknown"
    if len(site.axes) != 1 or int(np.prod(site.parameter_shape)) != site.channels:
        return "its channels lie along several axes"
    for kind in (Kind.MATRIX, Kind.SHIFT):
        found = carried(site.output, _probe(site), kind, outputs)
        if isinstance(found, Stop):
            return f"its readers are not all linear: {found.cause}"
        if kind is Kind.MATRIX and any(_axis(uptake, site) is None for uptake in found):
            return "a reader takes its channels apart"
    return None


def scaling_obstacle(site: NormSite) -> str | None:
    """Why the readers of a site cannot take up a gamma and a beta, None where they can."""
    return None if {"gamma", "beta"} <= set(site.folds) else site.unfolded


def scaling_changes(
    site: NormSite, parameters: DytParameters, outputs: Mapping[str, Value], weights: Weights
) -> tuple[Change, ...]:
    """What the readers of a site change to take up its gamma and its beta.

    weights: those that beta meets. Raises ValueError where there is an obstacle.
    """
    made: list[Change] = []
    named = parameters.named()
    for name, kind in (("beta", Kind.SHIFT), ("gamma", Kind.SCALE)):
        array = named[name].astype(np.float64)
        reached = carried(site.output, array, kind, outputs, weights)
        if isinstance(reached, Stop):
            raise ValueError(f"{site.name} has readers that take up no {name}: {reached.cause}")
        made += [change for uptake in reached for change in changes(uptake, kind, weights)]
    return tuple(made)


def changes_for(
    site: NormSite, mix: Mix, outputs: Mapping[str, Value], weights: Weights
) -> tuple[Change, ...]:
    """What the readers of a site change to take up its matrix and its offset.

    weights: those that the offset meets. Raises ValueError where there is an obstacle.
    """
    reached = carried(site.output, _probe(site), Kind.MATRIX, outputs)
    offset = mix.offset.astype(np.float64).reshape(site.parameter_shape)
    shifted = carried(site.output, offset, Kind.SHIFT, outputs, weights)
    if isinstance(reached, Stop) or isinstance(shifted, Stop):
        raise ValueError(f"{site.name} has readers that take up no matrix")
    made = [change for uptake in shifted for change in changes(uptake, Kind.SHIFT, weights)]
    matrix = mix.matrix.astype(np.float64)
    for uptake in reached:
        axis = _axis(uptake, site)
        if axis is None:
            raise ValueError(f"{uptake.term} takes up no matrix")
        made.append(Change(uptake.term, 1 - uptake.place, Kind.MATRIX, matrix, axis))
    return tuple(made)


def _probe(site: NormSite) -> Array:
    """A number for each channel, all different."""
    return np.arange(2.0, site.channels + 2.0).reshape(site.parameter_shape)  # type: ignore[operator]


def _axis(uptake: Uptake, site: NormSite) -> int | None:
    """The axis of the weight that the channels meet, whole and in order; None where they do not."""
    if uptake.term.attributes.get("groups", 1) != 1:
        return None
    weight = uptake.term.inputs[1 - uptake.place]
    shape = weight.shape if isinstance(weight, Value) else None
    factor = None if shape is None else against_weight(uptake, shape)
    if factor is None or shape is None:
        return None
    factor = narrowed(factor)
    if not np.array_equal(factor.ravel(), _probe(site).ravel()):
        return None
    return int(np.argmax(factor.shape)) + len(shape) - factor.ndim
