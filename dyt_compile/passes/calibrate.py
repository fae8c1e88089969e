"""Calibrate: walk the sites in execution order; at each observe, fit, apply, go on.

Original and converted model run side by side, one part between two sites at a time, so that every
site is fitted on the inputs that the converted model will give it, towards what the original's
norm puts out for the same samples. What waits between the parts lies on a shelf.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt

from ..calibration import Calibration, SiteSketch, digest, sketch
from ..data import Part, attention_mask, sample_keys
from ..dyt import DytParameters, Mix, evaluate
from ..fits import ROWS, Keys, RowSample
from ..graphs.base import Graph
from ..graphs.cuts import Stage, stages
from ..mixing import obstacle
from ..progress import track
from ..ridge import ROWS_PER_CHANNEL, fit_full
from ..scatter import Scatter, scatter
from ..shelf import Kept, Shelf
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

__all__ = ["calibrate", "fingerprint", "survey"]

Array = npt.NDArray[np.float32]
Affine = tuple[Array, Array]
Lane = list[dict[Value, Kept]]
"""The values of one model that live between two stages, by batch."""


def calibrate(
    graph: Graph,
    match: Match,
    samples: Part,
    *,
    convert: Collection[str],
    seed: int,
    fit: str = "diagonal",
    keep_sums: bool = False,
) -> Calibration:
    """Fits of every lossy site, the sites named in `convert` applied as the walk goes.

    fit: "diagonal"; "full", where the weights behind a site can take up a matrix; "auto", where
    they can and its error on held-out rows is smaller, too.
    With `convert` empty, every site is fitted on the original's own activations. A site that
    cannot be fitted keeps its norm, and its fit says why. Calls of one module share their values:
    they are fitted together, the later ones on the original's activations.
    keep_sums: fits hold what they were made from, so that `Calibration.merge` can add other runs.

    The fits do not depend on how the samples are split into batches, nor on their order, up to the
    rounding of the model's own arithmetic. Memory does not grow with the samples, but for 8 bytes a
    sample and one byte a position of the attention mask: activations beyond `Shelf`'s limit go to
    files, and a site of C channels takes 8 C max(6144, 8 C) bytes of rows; a full fit 40 C^2 more
    while it is solved, 4 C (C + 1) once it is done.
    """
    sites = [site for site in match.sites if not site.kind.lossless]
    fits: dict[str, SiteFit] = {}
    prefix = ""
    with Shelf(graph) as shelf:
        later_calls = _later_calls(graph, sites, shelf, samples, seed)
        walk = _Walk(graph, shelf, samples)
        for stage, following, site in zip(
            *_paired(stages(graph, sites)), track(sites, "calibrating", len(sites)), strict=True
        ):
            walk.advance(stage)
            others = later_calls.get(site.name, ())
            unmixed = _unmixed(site, others, graph, fit)
            sample = walk.observe(site, stage, _sample(seed, site, unmixed))
            sums = _sums(site, sample, prefix)
            if site.tied_to is None:
                found = fit_site(sums, others)
            else:
                found = follow(fits[site.tied_to], sums)
            found = replace(found, unmixed=unmixed, scatter=_drawn(found, sums, graph, site))
            if not unmixed:
                found = _mixed(found, site, sample, walk, fit, keep_sums)
            fits[site.name] = found if keep_sums else replace(found, sums=None)
            applied = site.name in convert and found.parameters is not None
            prefix = extended(prefix, len(fits), found) if applied else prefix
            walk.apply(site, found if applied else None, stage, following)
    done = frozenset(name for name in convert if name in fits and fits[name].parameters is not None)
    return Calibration(MappingProxyType(fits), fingerprint(graph, match), done)


def survey(graph: Graph, match: Match, samples: Part) -> dict[str, Look]:
    """What every lossy site reads in the original; nothing is fitted or converted.

    One pass over `samples`, which are few: of every row sigma alone is kept.
    """
    sites = [site for site in match.sites if not site.kind.lossless]
    looks = {}
    with Shelf(graph) as shelf:
        walk = _Walk(graph, shelf, samples)
        for stage, following, site in zip(*_paired(stages(graph, sites)), sites, strict=True):
            walk.advance(stage)
            walk.observe(site, stage, RowSample(0, 1))
            centred = site.kind is NormKind.LAYER_NORM
            deviations = np.concatenate([sigma(x, centred=centred) for x, _ in walk.rows(site)])
            elements = walk.elements(site) / samples.samples
            looks[site.name] = Look(median_and_peak(deviations)[1], elements)
            walk.apply(site, None, stage, following)
    return looks


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


def _later_calls(
    graph: Graph, sites: Sequence[NormSite], shelf: Shelf, samples: Part, seed: int
) -> dict[str, list[RowSample]]:
    """What the second and later calls of a module see in the original, by the first call's site."""
    found: dict[str, list[RowSample]] = {}
    if all(site.tied_to is None for site in sites):
        return found
    walk = _Walk(graph, shelf, samples)
    for stage, following, site in zip(*_paired(stages(graph, sites)), sites, strict=True):
        walk.advance(stage)
        sample = walk.observe(site, stage, RowSample(_seed(seed, site)))
        if site.tied_to is not None:
            found.setdefault(site.tied_to, []).append(sample)
        walk.apply(site, None, stage, following)
    return found


def _unmixed(site: NormSite, others: Collection[RowSample], graph: Graph, fit: str) -> str | None:
    """Why a site gets no full fit, None where it may."""
    if fit == "diagonal":
        return "fit is diagonal"
    if others or site.tied_to is not None:
        return "its module is called several times"
    return obstacle(site, graph.outputs)


def _sample(seed: int, site: NormSite, unmixed: str | None) -> RowSample:
    """Larger where a matrix needs more rows."""
    wanted = 0 if unmixed else ROWS_PER_CHANNEL * (site.channels or 0)
    own = _seed(seed, site)
    return RowSample(own, wanted) if wanted > ROWS else RowSample(own)


def _seed(seed: int, site: NormSite) -> int:
    """The same rows at every site; others where a module is called again and both are united."""
    return seed if site.tied_to is None else seed + zlib.crc32(site.name.encode())


def _mixed(
    diagonal: SiteFit, site: NormSite, sample: RowSample, walk: _Walk, fit: str, keep_sums: bool
) -> SiteFit:
    """The full fit of a site, or its diagonal one where that is better on held-out rows."""
    if diagonal.parameters is None:
        return diagonal
    full = fit_full(*sample.rows(), lambda: walk.rows(site), beside=keep_sums)
    return chosen(diagonal, full, fit)


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


class _Walk:
    """The two models on their way from site to site."""

    def __init__(self, graph: Graph, shelf: Shelf, samples: Part) -> None:
        self._graph = graph
        self._shelf = shelf
        self._masks: list[npt.NDArray[np.bool_] | None] = []
        self._keys: list[Keys] = []
        self._original: Lane = []
        for batch in samples:
            self._masks.append(attention_mask(batch, graph))
            self._keys.append(sample_keys(batch, graph))
            self._original.append(
                {value: shelf.keep(batch[name], value) for name, value in graph.inputs.items()}
            )
        self._converted = self._original  # one lane, until the first site is converted

    def advance(self, stage: Stage) -> None:
        """Run both models through a stage."""
        run = self._graph.segment(stage.start, stage.made)
        for lane in self._lanes():
            for values in lane:
                results = run([values[value].load() for value in stage.start])
                for value, result in zip(stage.made, results, strict=True):
                    values[value] = self._shelf.keep(result, value)

    def observe(self, site: NormSite, stage: Stage, sample: RowSample) -> RowSample:
        """Run the original's norm, and offer the site's rows to the sample."""
        norm = self._norm(site, stage)
        for original in self._original:
            original[site.output] = self._shelf.keep(norm(original), site.output)
        for x, y, keys in self._keyed_rows(site):
            sample.add(x, y, keys)
        return sample

    def rows(self, site: NormSite) -> Iterator[tuple[Array, Array]]:
        """Rows of the site's input in the converted and of its output in the original model."""
        return ((x, y) for x, y, _ in self._keyed_rows(site))

    def _keyed_rows(self, site: NormSite) -> Iterator[tuple[Array, Array, Keys | None]]:
        """The same, and what each row is known by."""
        shapes = [values[site.input].shape for values in self._converted]
        layout = _Layout(site, shapes, self._masks, list(map(len, self._keys)))
        for original, converted, mask, keys in zip(
            self._original, self._converted, self._masks, self._keys, strict=True
        ):
            x = self._graph.to_array(converted[site.input].load())
            y = self._graph.to_array(original[site.output].load())
            counted = layout.counted(mask, x.shape)
            known = layout.keys(keys, counted)
            yield layout.rows(x)[counted], layout.rows(y)[counted], known

    def elements(self, site: NormSite) -> int:
        """How many elements the site's input has, over all batches."""
        return sum(math.prod(values[site.input].shape) for values in self._converted)

    def apply(self, site: NormSite, fit: SiteFit | None, stage: Stage, following: Stage) -> None:
        """Put the site's output into the converted model, and drop what is used no more."""
        applied = fit is not None and fit.parameters is not None
        if applied and self._converted is self._original:
            self._converted = [dict(values) for values in self._original]
        if self._converted is not self._original:
            norm = self._norm(site, stage)
            if fit is not None and fit.parameters is not None:
                norm = self._dyt(site, fit.parameters, fit.mix)
            for values in self._converted:
                y = norm(values)
                values[site.output] = self._shelf.keep(y, site.output)
        for lane in self._lanes():
            lane[:] = [{value: values[value] for value in following.start} for values in lane]

    def _lanes(self) -> list[Lane]:
        same = self._converted is self._original
        return [self._original] if same else [self._original, self._converted]

    def _norm(self, site: NormSite, stage: Stage) -> Callable[[Mapping[Value, Kept]], Any]:
        """The norm of a site as the model computes it, from what lives behind its stage."""
        start = [site.input, *(value for value in stage.read if value is not site.input)]
        run = self._graph.segment(start, [site.output])
        return lambda values: run([values[value].load() for value in start])[0]

    def _dyt(
        self, site: NormSite, parameters: DytParameters, mix: Mix | None
    ) -> Callable[[Mapping[Value, Kept]], Any]:
        def run(values: Mapping[Value, Kept]) -> Any:
            x = self._graph.to_array(values[site.input].load()).astype(np.float32)
            y = evaluate(parameters, x)
            return self._graph.from_array(mix(y, site.axes[0]) if mix else y, site.output)

        return run


class _Layout:
    """How a site's tensors, one a batch, are read as rows of channels.

    Channels are the axes over which gamma varies: the normalized one, or that and others (a gamma
    of its own for each head). Rows come sample by sample, wherever the samples' axis lies. shapes,
    masks, samples: of all batches, which tell together where the axes of samples and tokens lie: a
    batch of as many samples as tokens could be read in two ways.
    """

    def __init__(
        self,
        site: NormSite,
        shapes: Sequence[tuple[int, ...]],
        masks: Sequence[npt.NDArray[np.bool_] | None],
        samples: Sequence[int],
    ) -> None:
        rank = max(map(len, shapes), default=0)
        self._channels = [
            axis % rank
            for axis, size in zip(range(-len(site.parameter_shape), 0), site.parameter_shape,
                                  strict=True)
            if size != 1 or axis in site.axes
        ]  # fmt: skip
        others = [axis for axis in range(rank) if axis not in self._channels]
        found = [
            _mask_axes(shape, others, mask.shape)
            for shape, mask in zip(shapes, masks, strict=True)
            if mask is not None
        ]
        common = set.intersection(*found) if found else set()
        self._mask_axes = common.pop() if len(common) == 1 else None
        own = None if self._mask_axes is None else self._mask_axes[0]
        self._samples = _sample_axis(shapes, others, samples) if own is None else own
        first = [] if self._samples is None else [self._samples]
        self._others = [*first, *(axis for axis in others if axis not in first)]

    def rows(self, array: npt.NDArray[Any]) -> Array:
        """Float32 [rows, channels]."""
        moved = array.transpose([*self._others, *self._channels])
        channels = int(np.prod(moved.shape[len(self._others) :]))
        return np.ascontiguousarray(moved.reshape(-1, channels), dtype=np.float32)

    def keys(self, samples: Keys, counted: npt.NDArray[np.bool_]) -> Keys | None:
        """What each row that counts is known by: its sample, and its place among that one's rows.

        None where it is unknown which sample a row is of.
        """
        if self._samples is None:
            return None
        own = counted.reshape(len(samples), -1)
        places = np.cumsum(own, axis=1, dtype=np.uint64)
        return np.asarray((samples[:, None] + places)[own])

    def counted(
        self, mask: npt.NDArray[np.bool_] | None, shape: tuple[int, ...]
    ) -> npt.NDArray[np.bool_]:
        """Whether a mask of [samples, tokens] lets each row count; all, its place unknown."""
        lengths = [shape[axis] for axis in self._others]
        if mask is None or self._mask_axes is None:
            return np.ones(int(np.prod(lengths)), np.bool_)
        if self._mask_axes[0] == self._mask_axes[1]:
            return mask.reshape(-1)
        spread = [shape[axis] if axis in self._mask_axes else 1 for axis in self._others]
        return np.broadcast_to(mask.reshape(spread), lengths).reshape(-1)


def _sample_axis(
    shapes: Sequence[tuple[int, ...]], axes: Sequence[int], samples: Sequence[int]
) -> int | None:
    """The axis of the samples; the first where they are flattened with others behind them."""
    for axis in axes:
        if all(shape[axis] == count for shape, count in zip(shapes, samples, strict=True)):
            return axis
    parted = all(shape[0] % count == 0 for shape, count in zip(shapes, samples, strict=True))
    return 0 if 0 in axes and parted else None


def _mask_axes(
    shape: tuple[int, ...], axes: Sequence[int], mask: tuple[int, ...]
) -> set[tuple[int, int]]:
    """Where samples and tokens of a mask can lie among the axes, of which one is axis 0.

    (0, 0): both, flattened.
    """
    if list(axes) == [0]:
        return {(0, 0)} if len(shape) == 2 and shape[0] == mask[0] * mask[1] else set()
    if 0 not in axes:
        return set()
    pairs = [pair for axis in axes if axis for pair in ((0, axis), (axis, 0))]
    return {(s, t) for s, t in pairs if (shape[s], shape[t]) == mask}


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
