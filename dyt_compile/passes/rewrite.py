"""Rewrite: a new graph with DyT in place of the chosen sites; the old one stays as it is."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import replace

import numpy as np

from ..calibration import Calibration
from ..dyt import DytParameters, Refit
from ..errors import RewriteError
from ..graphs.base import Graph
from ..mixing import changes_for, scaling_changes
from ..projections import Projection, changes_of, projections
from ..revision import Revision
from ..sites import Match, NormKind, NormSite
from ..terms import Op, Value

__all__ = ["rewrite"]


def rewrite(
    graph: Graph, match: Match, calibration: Calibration | None, convert: Collection[str]
) -> Graph:
    """The graph with `convert` replaced by their fits, and DyT that it already holds as one node.

    The matrix of a full fit goes into the weights of the site's readers, exactly (in float64,
    rounded once); so do gamma and beta of an affine one, whose readers then read what it read.
    Weights that something else reads, too, stay as they are for that. Refits of projections are
    applied where the converted sites are those that they were made with.

    Raises RewriteError where a site to convert has no fit, or a DyT's weights are not loaded.
    """
    replacements, weights = [], Revision(graph)
    for projection, refit in _refits(graph, match, calibration, convert):
        weights.add(changes_of(projection, refit.mix))
    for site in match.sites:
        if site.kind.lossless:
            if not _is_one_node(site):
                replacements.append((site, _held(graph, site)))
        elif site.name in convert:
            fit = None if calibration is None else calibration.fits.get(site.name)
            if fit is None or fit.parameters is None:
                reason = "it was not calibrated" if fit is None else fit.reason
                raise RewriteError(f"site {site.name!r} has no fit: {reason}")
            left = fit.parameters
            if fit.mix is not None:
                weights.add(changes_for(site, fit.mix, graph.outputs, weights))
            elif left.affine:
                weights.add(scaling_changes(site, left, graph.outputs, weights))
                left = replace(left, gamma=None, beta=None)
            replacements.append((site, left))
    return graph.replace(replacements, weights.edits())


def _refits(
    graph: Graph, match: Match, calibration: Calibration | None, convert: Collection[str]
) -> Iterator[tuple[Projection, Refit]]:
    """The projections to refit; they come before the mixes, which act on what a site puts out."""
    if calibration is None or not calibration.refits or set(convert) != calibration.converted:
        return
    for projection in projections(graph, [site for site in match.sites if site.name in convert]):
        refit = calibration.refits.get(projection.name)
        if refit is not None:
            yield projection, refit


def _is_one_node(site: NormSite) -> bool:
    """Whether the graph holds the DyT as our operator already."""
    return site.output.producer is not None and site.output.producer.op is Op.DYT


def _held(graph: Graph, site: NormSite) -> DytParameters:
    """The values of a DyT that the model already holds."""
    return DytParameters(
        alpha=_vector(graph, site, site.alpha),
        gamma=None if site.gamma is None else _constant(graph, site, site.gamma),
        beta=None if site.beta is None else _constant(graph, site, site.beta),
        shift=None if site.shift is None else _vector(graph, site, site.shift),
        squash="tanh" if site.kind is NormKind.DYT else "erf",
    )


def _vector(graph: Graph, site: NormSite, value: Value | None) -> np.ndarray:
    return np.atleast_1d(_constant(graph, site, value))


def _constant(graph: Graph, site: NormSite, value: Value | None) -> np.ndarray:
    array = None if value is None else graph.constant(value)
    if array is None:
        raise RewriteError(f"site {site.name!r}: its weights are not loaded (meta tensors)")
    return array.astype(np.float32)
