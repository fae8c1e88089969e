"""Calibrate: walk the sites in execution order; at each observe, fit, apply, go on.

Original and converted model run side by side, one part between two sites at a time, so that every
site is fitted on the inputs that the converted model will give it, towards what the original's
norm puts out for the same samples. What waits between the parts lies on a shelf.
"""

from __future__ import annotations

import logging
import math
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from types import MappingProxyType

import numpy as np
import numpy.typing as npt

from ..calibration import Calibration, SiteSketch, digest, sketch
from ..data import Part
from ..dyt import Refit
from ..errors import DataError
from ..fits import ROWS, RowSample
from ..footprint import Walked, room_within
from ..graphs.base import Graph
from ..graphs.cuts import Stage, place, stages
from ..mixing import obstacle, scaling_obstacle
from ..progress import track
from ..projections import Projection, projections
from ..ranks import current
from ..refits import refit
from ..ridge import ROWS_PER_CHANNEL, fit_full
from ..scatter import Scatter, scatter
from ..shelf import Shelf
from ..sitefits import (
    SiteFit,
    SiteSums,
    chosen,
    extended,
    fit_site,
    follow,
    median_and_peak,
    sigma,
)
from ..sites import Match, NormKind, NormSite
from ..survey import Look
from ..terms import Value
from ..walk import Walk, rows_dtype

__all__ = ["calibrate", "fingerprint", "observing", "survey"]

Array = npt.NDArray[np.float32]
Affine = tuple[Array, Array]

logger = logging.getLogger("dyt_compile")

TOLD = 3
"""Names that a warning tells."""


def calibrate(
    graph: Graph,
    match: Match,
    samples: Part,
    *,
    convert: Collection[str],
    seed: int,
    fit: str = "diagonal",
    keep_sums: bool = False,
    refits: bool = False,
    squashes: Mapping[str, Sequence[str]] = MappingProxyType({}),
    memory_bytes: int | None = None,
) -> Calibration:
    """Fits of every lossy site, the sites named in `convert` applied as the walk goes.

    fit: "diagonal"; "full", where the weights behind a site can take up a matrix; "auto", where
    they can and its error on held-out rows is smaller, too.
    With `convert` empty, every site is fitted on the original's own activations. A site that
    cannot be fitted keeps its norm, and its fit says why. Calls of one module share their values:
    they are fitted together, the later ones on the original's activations.
    squashes: by site, what is tried in place of "tanh" alone: "identity" is an affine map, where
    the weights behind all calls of the site can take one up. The first is taken, unless a later one
    has a smaller error on held-out rows.
    refits: linear layers behind converted sites are refitted where `projections` says that it pays,
    and memory_bytes lets; a warning of the logger "dyt_compile" names those that it does not.
    keep_sums: fits hold what they were made from, so that `Calibration.merge` can add other runs.

    The fits do not depend on how the samples are split into batches, nor on their order, up to the
    rounding of the model's own arithmetic. memory_bytes: of the process; kept, or refused with an
    OptionError before anything is run. Memory does not grow with the samples, but for 8 bytes a
    sample and one byte a position of the attention mask: activations beyond `Shelf`'s limit go to
    files, and a site of C channels takes 8 C max(6144, 8 C) bytes of rows, half of that where the
    model is of 16 bits; a full fit 28 C^2 more while it is solved, 4 C (C + 1) once it is done.
    """
    sites = [site for site in match.sites if not site.kind.lossless]
    fits: dict[str, SiteFit] = {}
    moved: dict[str, Refit] = {}
    prefix = ""
    converted = [site for site in sites if site.name in convert]
    behind = projections(graph, converted) if refits else []
    points: list[NormSite | Projection] = [*sites, *behind]
    points.sort(key=lambda point: place(point.output))
    _check_shares(samples)
    again = {site.tied_to for site in sites}
    full = {s.name for s in sites if _unmixed(s, s.name in again, graph, fit) is None}
    room = room_within(memory_bytes, Walked(graph, points, frozenset(full), keep_sums), samples)
    samples = room.samples
    if room.left:
        logger.warning(_told_left(room.left))
        points = [point for point in points if point.name not in room.left]
    with Shelf(graph, room.shelf_bytes) as shelf:
        later_calls = _later_calls(graph, sites, shelf, samples, seed)
        walk = Walk(graph, shelf, samples)
        for stage, following, site in zip(
            *_paired(stages(graph, points)), track(points, "calibrating", len(points)), strict=True
        ):
            walk.advance(stage)
            if isinstance(site, Projection):
                better = refit(walk, graph, site, stage, following, seed)
                if better is not None:
                    moved[site.name] = room.stored(replace(better, place=behind.index(site)))
                continue
            others = later_calls.get(site.name, ())
            unmixed = _unmixed(site, bool(others), graph, fit)
            sums = _sums(site, walk.observe(site, stage, _sample(seed, site, unmixed)), prefix)
            if site.tied_to is None:
                calls = [call for call in sites if site.name in (call.name, call.tied_to)]
                found = _Fitting(calls, sums, others, unmixed, graph, walk, fit, keep_sums).best(
                    squashes.get(site.name, ("tanh",))
                )
            else:
                found = follow(fits[site.tied_to], sums, walk.ranks)
                found = replace(found, unmixed=unmixed, scatter=_drawn(found, sums, graph, site))
            fits[site.name] = found if keep_sums else replace(found, sums=None)
            applied = site.name in convert and found.parameters is not None
            prefix = extended(prefix, len(fits), found) if applied else prefix
            walk.apply(site, found if applied else None, stage, following)
            fits[site.name] = room.stored(fits[site.name])
            del found, sums  # their rows, before the next site's are gathered
            room.settle()
    done = frozenset(name for name in convert if name in fits and fits[name].parameters is not None)
    return Calibration(
        MappingProxyType(fits), fingerprint(graph, match), done, MappingProxyType(moved)
    )


def survey(graph: Graph, match: Match, samples: Part) -> dict[str, Look]:
    """What every lossy site reads in the original; nothing is fitted or converted.

    One pass over `samples`, which are few: of every row sigma alone is kept.
    """
    sites = [site for site in match.sites if not site.kind.lossless]
    looks = {}
    with Shelf(graph) as shelf:
        for site, walk, _ in observing(graph, sites, shelf, samples, lambda _: RowSample(0, 1)):
            centred = site.kind is NormKind.LAYER_NORM
            own = [sigma(x, centred=centred) for x, _ in walk.rows(site)]
            deviations = np.concatenate(list(chain.from_iterable(walk.ranks.gathered(own))))
            elements = walk.elements(site) / samples.samples
            looks[site.name] = Look(median_and_peak(deviations)[1], elements)
    return looks


def observing(
    graph: Graph,
    sites: Sequence[NormSite],
    shelf: Shelf,
    samples: Part,
    sample_of: Callable[[NormSite], RowSample],
) -> Iterator[tuple[NormSite, Walk, RowSample]]:
    """Each site of the original with rows of it, in a sample that `sample_of` begins.

    One forward pass over the samples, whatever is observed.
    """
    walk = Walk(graph, shelf, samples)
    for stage, following, site in zip(*_paired(stages(graph, sites)), sites, strict=True):
        walk.advance(stage)
        yield site, walk, walk.observe(site, stage, sample_of(site))
        walk.apply(site, None, stage, following)


def fingerprint(graph: Graph, match: Match) -> tuple[SiteSketch, ...]:
    """What the model is known by: its sites in order, with a sketch of their affine parts."""
    return tuple(
        SiteSketch(
            site.kind.value,
            site.channels,
            site.axes,
            site.eps,
            _sketch(graph, site.gamma),
            _sketch(graph, site.beta),
            _digest(graph, site.gamma),
        )
        for site in match.sites
    )


def _told_left(names: Collection[str]) -> str:
    return (
        f"memory is too little to refit {len(names)} linear layer(s), which stay as they are: "
        f"{', '.join(sorted(names)[:TOLD])}{', ...' if len(names) > TOLD else ''}"
    )


def _check_shares(samples: Part) -> None:
    ranks = current()
    if samples.samples < ranks.size:
        raise DataError(
            f"the data holds {samples.samples} samples for {ranks.size} ranks; allowed: one for "
            "each, or more"
        )


def _later_calls(
    graph: Graph, sites: Sequence[NormSite], shelf: Shelf, samples: Part, seed: int
) -> dict[str, list[RowSample]]:
    """What the second and later calls of a module see in the original, by the first call's site."""
    found: dict[str, list[RowSample]] = {}
    if all(site.tied_to is None for site in sites):
        return found

    def sample_of(site: NormSite) -> RowSample:
        return RowSample(_seed(seed, site), dtype=rows_dtype(site))

    for site, _, sample in observing(graph, sites, shelf, samples, sample_of):
        if site.tied_to is not None:
            found.setdefault(site.tied_to, []).append(sample)
    return found


def _unmixed(site: NormSite, again: bool, graph: Graph, fit: str) -> str | None:
    """Why a site gets no full fit, None where it may. again: whether its module is called again."""
    if fit == "diagonal":
        return "fit is diagonal"
    if again or site.tied_to is not None:
        return "its module is called several times"
    return obstacle(site, graph.outputs)


def _sample(seed: int, site: NormSite, unmixed: str | None) -> RowSample:
    """Larger where a matrix needs more rows."""
    wanted = 0 if unmixed else ROWS_PER_CHANNEL * (site.channels or 0)
    own, dtype = _seed(seed, site), rows_dtype(site)
    return RowSample(own, wanted, dtype) if wanted > ROWS else RowSample(own, dtype=dtype)


def _seed(seed: int, site: NormSite) -> int:
    """The same rows at every site; others where a module is called again and both are united."""
    return seed if site.tied_to is None else seed + zlib.crc32(site.name.encode())


@dataclass(frozen=True)
class _Fitting:
    """One site that the walk has reached. calls: of its module, itself the first."""

    calls: Sequence[NormSite]
    sums: SiteSums
    later: Collection[RowSample]
    unmixed: str | None
    graph: Graph
    walk: Walk
    fit: str
    keep_sums: bool

    def best(self, squashes: Sequence[str]) -> SiteFit:
        """The first fit, or the one of a smaller error on held-out rows."""
        unaffine = self._unaffine() if "identity" in squashes else None
        able = [s for s in squashes if s != "identity" or unaffine is None] or ["tanh"]
        found = [self._fitted(squash) for squash in able]
        best = min(found, key=lambda fit: math.inf if fit.fit_error is None else fit.fit_error)
        if unaffine is None and not best.affine:
            tried = any(fit.affine for fit in found)
            unaffine = "DyT fits held-out rows better" if tried else None
        return replace(best, unaffine=unaffine)

    def _unaffine(self) -> str | None:
        """Why a site cannot be an affine map that weights take up, None where it can."""
        if self.unmixed is None:
            return None
        return next(filter(None, map(scaling_obstacle, self.calls)), None)

    def _fitted(self, squash: str) -> SiteFit:
        """The full fit of a site, or its diagonal one where that is better on held-out rows."""
        site = self.calls[0]
        ranks = self.walk.ranks
        diagonal = fit_site(self.sums, self.later, squash, ranks)
        drawn = _drawn(diagonal, self.sums, self.graph, site)
        diagonal = replace(diagonal, unmixed=self.unmixed, scatter=drawn)
        if self.unmixed or diagonal.parameters is None:
            return diagonal
        rows = self.sums.sample.rows()
        full = fit_full(
            *rows, lambda: self.walk.rows(site), beside=self.keep_sums, squash=squash, ranks=ranks
        )
        stuck = diagonal.affine and scaling_obstacle(site) is not None
        return chosen(diagonal, full, "full" if stuck else self.fit)


def _sums(site: NormSite, sample: RowSample, prefix: str) -> SiteSums:
    centred = site.kind is NormKind.LAYER_NORM
    return SiteSums(prefix, sample, site.parameter_shape, centred, site.tied_to)


def _drawn(fit: SiteFit, sums: SiteSums, graph: Graph, site: NormSite) -> Scatter | None:
    affine = _affine(graph, site)
    if affine is None:
        return None
    x, y = sums.rows()
    return scatter(x, y, sigma(x, centred=sums.centred), fit.parameters, affine)


def _paired(staged: tuple[Stage, ...]) -> tuple[tuple[Stage, ...], tuple[Stage, ...]]:
    return staged[:-1], staged[1:]


def _affine(graph: Graph, site: NormSite) -> Affine | None:
    """The norm's own gamma and beta, one value a channel; None where they are not so shaped."""
    found = []
    for value, neutral in ((site.gamma, 1.0), (site.beta, 0.0)):
        array = np.asarray(neutral) if value is None else graph.constant(value)
        if array is None or not _broadcasts(array.shape, site.parameter_shape):
            return None
        found.append(np.broadcast_to(array.astype(np.float32), site.parameter_shape).ravel())
    return found[0], found[1]


def _broadcasts(shape: tuple[int, ...], target: tuple[int, ...]) -> bool:
    pairs = zip(reversed(shape), reversed(target), strict=False)
    return len(shape) <= len(target) and all(size in (1, wanted) for size, wanted in pairs)


def _sketch(graph: Graph, value: Value | None) -> tuple[float, float] | None:
    array = None if value is None else graph.constant(value)
    return None if array is None else sketch(array)


def _digest(graph: Graph, gamma: Value | None) -> str | None:
    """The digest of what is learned of a gamma: of w where the norm multiplies by 1 + w."""
    source = None if gamma is None else gamma.learned()
    array = None if source is None else graph.constant(source)
    return None if array is None else digest(array)
