"""Calibrate: walk the sites in execution order; at each observe, fit, apply, go on.

Original and converted model run side by side, one part between two sites at a time, so that every
site is fitted on the inputs that the converted model will give it, towards what the original's
norm puts out for the same samples. What waits between the parts lies on a shelf.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt

from ..calibration import Calibration, SiteFit, SiteSketch, digest, sketch
from ..data import Part, attention_mask
from ..dyt import DytParameters, Mix, Refit, evaluate
from ..fits import ROWS, Fit, RowSample, fit_diagonal, inverse, relative_error
from ..graphs.base import Graph
from ..graphs.cuts import Point, Stage, place, stages
from ..mixing import obstacle
from ..progress import track
from ..projections import Projection, projections
from ..ridge import ROWS_PER_CHANNEL, RefitSums, fit_full
from ..scatter import scatter
from ..shelf import Kept, Shelf
from ..sites import Match, NormKind, NormSite
from ..terms import Value

__all__ = ["calibrate", "fingerprint"]

ROUNDS = 2
"""Of a projection's refit and the fit of the DyT behind it; a third gained nothing on MiniLM."""

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
) -> Calibration:
    """Fits of every lossy site, the sites named in `convert` applied as the walk goes.

    fit: "diagonal"; "full", where the weights behind a site can take up a matrix; "auto", where
    they can and its error on held-out rows is smaller, too.
    With `convert` empty, every site is fitted on the original's own activations. A site that
    cannot be fitted keeps its norm, and its fit says why. Calls of one module share their values:
    they are fitted together, the later ones on the original's activations. Deterministic for a
    seed and an order of the samples, whatever their batches. Memory does not grow with the samples:
    a site takes what `RowSample` and `ridge` hold, a full fit that is kept what `Mix` holds.
    """
    sites = [site for site in match.sites if not site.kind.lossless]
    fits: dict[str, SiteFit] = {}
    refits: dict[str, Refit] = {}
    points = _points(graph, sites, convert, fit)
    with Shelf(graph) as shelf:
        later_calls = _later_calls(graph, sites, shelf, samples, seed)
        walk = _Walk(graph, shelf, samples)
        for stage, following, point in zip(
            *_paired(stages(graph, points)), track(points, "calibrating", len(points)), strict=True
        ):
            walk.advance(stage)
            if isinstance(point, Projection):
                refit = walk.refit(point, stage, following, seed)
                refits |= {} if refit is None else {point.name: refit}
                continue
            others = later_calls.get(point.name, ())
            unmixed = _unmixed(point, others, graph, fit)
            sample = walk.observe(point, stage, _sample(seed, point, unmixed))
            affine = _affine(graph, point)
            if point.tied_to is None:
                found = replace(_fit(point, sample, others, affine), unmixed=unmixed)
                fits[point.name] = found if unmixed else _mixed(found, point, sample, walk, fit)
            else:
                followed = _follow(fits[point.tied_to], point, sample, affine)
                fits[point.name] = replace(followed, unmixed=unmixed)
            walk.apply(point, fits[point.name] if point.name in convert else None, stage, following)
    done = frozenset(name for name in convert if name in fits and fits[name].parameters is not None)
    return Calibration(
        MappingProxyType(fits), fingerprint(graph, match), done, MappingProxyType(refits)
    )


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


def _points(
    graph: Graph, sites: Sequence[NormSite], convert: Collection[str], fit: str
) -> list[NormSite | Projection]:
    """The sites, and the projections behind converted ones where they are refitted, in order."""
    points: list[NormSite | Projection] = list(sites)
    if fit == "auto":
        points += projections(graph, [site for site in sites if site.name in convert])
    return sorted(points, key=lambda point: place(point.output))


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
        sample = walk.observe(site, stage, RowSample(seed))
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
    return RowSample(seed, wanted) if wanted > ROWS else RowSample(seed)


def _mixed(diagonal: SiteFit, site: NormSite, sample: RowSample, walk: _Walk, fit: str) -> SiteFit:
    """The full fit of a site, or its diagonal one where that is better on held-out rows."""
    if diagonal.parameters is None or diagonal.fit_error is None:
        return diagonal
    full = fit_full(*sample.rows(), lambda: walk.rows(site))
    if fit == "auto" and not full.error < diagonal.fit_error:
        reason = f"the full fit's error on held-out rows is {full.error:.3g}, no smaller"
        return replace(diagonal, unmixed=reason)
    return replace(diagonal, parameters=full.parameters, mix=full.mix, fit_error=full.error)


def _fit(
    site: NormSite, sample: RowSample, others: Iterable[RowSample], affine: Affine | None
) -> SiteFit:
    own = sample.rows()
    for other in others:
        sample.add(*other.rows())
    fit = fit_diagonal(*sample.rows())
    if isinstance(fit, Fit):
        return _fitted(site, own, _shaped(fit.parameters, site), fit.error, None, affine)
    return _fitted(site, own, None, None, fit, affine)


def _follow(first: SiteFit, site: NormSite, sample: RowSample, affine: Affine | None) -> SiteFit:
    """The fit of a later call of a module: the values of the first, the error on its own rows."""
    own = sample.rows()
    error = None if first.parameters is None else relative_error(first.parameters, *own)
    return _fitted(site, own, first.parameters, error, first.reason, affine)


def _fitted(
    site: NormSite,
    own: tuple[Array, Array],
    parameters: DytParameters | None,
    error: float | None,
    reason: str | None,
    affine: Affine | None,
) -> SiteFit:
    """A fit with what is told of the site's own rows."""
    sigma = _sigma(own[0], centred=site.kind is NormKind.LAYER_NORM)
    drawn = None if affine is None else scatter(*own, sigma, parameters, affine)
    return SiteFit(parameters, error, reason, *_median_and_peak(sigma), drawn)


def _paired(staged: tuple[Stage, ...]) -> tuple[tuple[Stage, ...], tuple[Stage, ...]]:
    return staged[:-1], staged[1:]


class _Walk:
    """The two models on their way from site to site."""

    def __init__(self, graph: Graph, shelf: Shelf, samples: Part) -> None:
        self._graph = graph
        self._shelf = shelf
        self._masks: list[npt.NDArray[np.bool_] | None] = []
        self._original: Lane = []
        for batch in samples:
            self._masks.append(attention_mask(batch, graph))
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
        self._answer(site, stage, self._original)
        for x, y in self.rows(site):
            sample.add(x, y)
        return sample

    def rows(self, site: NormSite) -> Iterator[tuple[Array, Array]]:
        """Rows of the site's input in the converted and of its output in the original model."""
        layout = self._layout(site.input, _channels(site))
        for original, converted, mask in zip(
            self._original, self._converted, self._masks, strict=True
        ):
            x = self._graph.to_array(converted[site.input].load())
            y = self._graph.to_array(original[site.output].load())
            counted = layout.counted(mask, x.shape)
            yield layout.rows(x)[counted], layout.rows(y)[counted]

    def apply(self, site: NormSite, fit: SiteFit | None, stage: Stage, following: Stage) -> None:
        """Put the site's output into the converted model, and drop what is used no more."""
        applied = fit is not None and fit.parameters is not None
        if applied and self._converted is self._original:
            self._converted = [dict(values) for values in self._original]
        if self._converted is not self._original:
            if fit is not None and fit.parameters is not None:
                self._put_dyt(site, fit.parameters, fit.mix)
            else:
                self._answer(site, stage, self._converted)
        self._release(following)

    def refit(
        self, projection: Projection, stage: Stage, following: Stage, seed: int
    ) -> Refit | None:
        """Run a projection, in the converted model with the weight that suits its input best."""
        self._answer(projection, stage, self._original)
        found = None
        if self._converted is not self._original:
            self._answer(projection, stage, self._converted)
            sums = self._sums(projection, self._restored(projection))
            found = sums.solve()
            if found is not None and projection.site is not None:
                found = self._aimed(projection, projection.site, found, sums, seed)
            if found is not None:
                self._put_refit(projection, found)
        self._release(following)
        return found

    def _sums(
        self, projection: Projection, targets: Iterable[Array], like: RefitSums | None = None
    ) -> RefitSums:
        """The sums over all rows of what a projection reads and of what it should put out.

        like: sums of the same projection towards other targets.
        """
        sums = RefitSums(like)
        rows = self._rows_of(projection)
        for converted, target, counted in zip(self._converted, targets, rows, strict=True):
            x, now = self._arrays(converted, projection.input, projection.output)
            parts = (x, target, target - now)
            sums.add(*(part.reshape(-1, part.shape[-1])[counted] for part in parts))
        return sums

    def _rows_of(self, projection: Projection) -> Iterator[npt.NDArray[np.bool_] | slice]:
        """The rows of a projection's output that count, by batch; masks are of what lies behind."""
        layout = self._layout(projection.beside, (-1,))
        for converted, mask in zip(self._converted, self._masks, strict=True):
            shape = converted[projection.beside].shape
            counted = layout.counted(mask, shape)
            if isinstance(counted, np.ndarray):
                marks = np.broadcast_to(counted.reshape(*shape[:-1], 1), shape)
                counted = projection.back(marks).reshape(-1, shape[-1])[:, 0]
            yield counted

    def _restored(self, projection: Projection) -> Iterator[Array]:
        """What a projection has to put out for the sums behind it to be the original's."""
        for original, converted in zip(self._original, self._converted, strict=True):
            before = self._arrays(original, *projection.residuals)
            after = self._arrays(converted, *projection.residuals)
            (wanted,) = self._arrays(original, projection.output)
            yield projection.target(wanted, [a - b for a, b in zip(before, after, strict=True)])

    def _aimed(
        self, projection: Projection, site: NormSite, refit: Refit, sums: RefitSums, seed: int
    ) -> Refit:
        """A refit towards what the DyT behind it has to read, to put out what the norm does.

        The sum that the original's norm reads is no aim in itself, where only that norm reads it:
        dividing by sigma, the norm takes from it what tanh cannot. Alternates with the fit of the
        DyT, as long as its error on held-out rows falls.
        """
        fit = self._site_fit(projection, site, refit, seed)
        for _ in range(ROUNDS):
            if isinstance(fit, str):
                break
            targets = self._inverted(projection, site, refit, fit.parameters)
            aimed = self._sums(projection, targets, sums).solve()
            aimed_fit = fit if aimed is None else self._site_fit(projection, site, aimed, seed)
            if aimed is None or isinstance(aimed_fit, str) or not aimed_fit.error < fit.error:
                break
            refit, fit = aimed, aimed_fit
        return refit

    def _site_fit(
        self, projection: Projection, site: NormSite, refit: Refit, seed: int
    ) -> Fit | str:
        """The diagonal fit of the site behind a projection, once that is refitted."""
        sample = RowSample(seed)
        layout = self._layout(projection.beside, (-1,))
        for (_, x, y), mask in zip(self._behind(projection, site, refit), self._masks, strict=True):
            counted = layout.counted(mask, x.shape)
            sample.add(layout.rows(x)[counted], layout.rows(y)[counted])
        return fit_diagonal(*sample.rows())

    def _inverted(
        self, projection: Projection, site: NormSite, refit: Refit, parameters: DytParameters
    ) -> Iterator[Array]:
        """What a projection has to put out for the DyT behind it to give the original's output."""
        for now, x, y in self._behind(projection, site, refit):
            yield projection.target(now, [inverse(parameters, x, y) - x])

    def _behind(
        self, projection: Projection, site: NormSite, refit: Refit
    ) -> Iterator[tuple[Array, Array, Array]]:
        """By batch: a refitted projection's output, what the site reads then, the norm's output."""
        start = [projection.output, *projection.residuals]
        to_input = self._graph.segment(start, [site.input])
        to_output = self._graph.segment(start, [site.output])
        for original, converted in zip(self._original, self._converted, strict=True):
            now = self._refitted(projection, refit, converted)
            residuals = [converted[value].load() for value in projection.residuals]
            (x,) = to_input([self._graph.from_array(now, projection.output), *residuals])
            (y,) = to_output([original[value].load() for value in start])
            yield now, self._float32(x), self._float32(y)

    def _refitted(
        self, projection: Projection, refit: Refit, values: Mapping[Value, Kept]
    ) -> Array:
        x, now = self._arrays(values, projection.input, projection.output)
        return now + refit.mix(x)

    def _put_refit(self, projection: Projection, refit: Refit) -> None:
        for values in self._converted:
            y = self._refitted(projection, refit, values)
            native = self._graph.from_array(y, projection.output)
            values[projection.output] = self._shelf.keep(native, projection.output)

    def _arrays(self, values: Mapping[Value, Kept], *wanted: Value) -> list[Array]:
        """Values of a lane in float32."""
        return [self._float32(values[value].load()) for value in wanted]

    def _float32(self, native: Any) -> Array:
        return self._graph.to_array(native).astype(np.float32, copy=False)

    def _layout(self, value: Value, channels: Sequence[int]) -> _Layout:
        shapes = [values[value].shape for values in self._converted]
        return _Layout(channels, shapes, self._masks)

    def _release(self, following: Stage) -> None:
        for lane in self._lanes():
            lane[:] = [{value: values[value] for value in following.start} for values in lane]

    def _lanes(self) -> list[Lane]:
        same = self._converted is self._original
        return [self._original] if same else [self._original, self._converted]

    def _answer(self, point: Point, stage: Stage, lane: Lane) -> None:
        """What the original model computes at a point, from what lives behind its stage."""
        start = [point.input, *(value for value in stage.read if value is not point.input)]
        run = self._graph.segment(start, [point.output])
        for values in lane:
            (native,) = run([values[value].load() for value in start])
            values[point.output] = self._shelf.keep(native, point.output)

    def _put_dyt(self, site: NormSite, parameters: DytParameters, mix: Mix | None) -> None:
        for values in self._converted:
            y = evaluate(parameters, *self._arrays(values, site.input))
            native = self._graph.from_array(mix(y, site.axes[0]) if mix else y, site.output)
            values[site.output] = self._shelf.keep(native, site.output)


def _channels(site: NormSite) -> list[int]:
    """The axes, counted from the end, over which the gamma of a site varies."""
    shape = site.parameter_shape
    return [
        axis
        for axis, size in zip(range(-len(shape), 0), shape, strict=True)
        if size != 1 or axis in site.axes
    ]


class _Layout:
    """How a point's tensors, one a batch, are read as rows of channels.

    channels: axes counted from the end; of a site the normalized one, or that and others (a gamma
    of its own for each head). shapes, masks: of all batches, which tell together where the axes
    of the masks lie: a batch of as many samples as tokens could be read in two ways.
    """

    def __init__(
        self,
        channels: Sequence[int],
        shapes: Sequence[tuple[int, ...]],
        masks: Sequence[npt.NDArray[np.bool_] | None],
    ) -> None:
        rank = max(map(len, shapes), default=0)
        self._channels = [axis % rank for axis in channels]
        self._others = [axis for axis in range(rank) if axis not in self._channels]
        found = [
            _mask_axes(shape, self._others, mask.shape)
            for shape, mask in zip(shapes, masks, strict=True)
            if mask is not None
        ]
        common = set.intersection(*found) if found else set()
        self._mask_axes = common.pop() if len(common) == 1 else None

    def rows(self, array: npt.NDArray[Any]) -> Array:
        """Float32 [rows, channels]."""
        count = len(self._channels)
        moved = np.moveaxis(array, self._channels, range(-count, 0))
        channels = int(np.prod(moved.shape[-count:]))
        return np.ascontiguousarray(moved.reshape(-1, channels), dtype=np.float32)

    def counted(
        self, mask: npt.NDArray[np.bool_] | None, shape: tuple[int, ...]
    ) -> npt.NDArray[np.bool_] | slice:
        """The rows that a mask of [samples, tokens] lets count; all where its place is unknown."""
        if mask is None or self._mask_axes is None:
            return slice(None)
        samples, tokens = self._mask_axes
        if samples == tokens:
            return mask.reshape(-1)
        turned = mask if samples < tokens else mask.T
        spread = [shape[axis] if axis in self._mask_axes else 1 for axis in self._others]
        lengths = [shape[axis] for axis in self._others]
        return np.broadcast_to(turned.reshape(spread), lengths).reshape(-1)


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


def _shaped(parameters: DytParameters, site: NormSite) -> DytParameters:
    """gamma and beta in the shape that broadcasts against the site."""
    gamma, beta = parameters.gamma, parameters.beta
    return DytParameters(
        parameters.alpha,
        None if gamma is None else gamma.reshape(site.parameter_shape),
        None if beta is None else beta.reshape(site.parameter_shape),
        squash=parameters.squash,
    )


def _sigma(rows: Array, *, centred: bool) -> npt.NDArray[np.float64]:
    """What the norm divides each row by (eps left out)."""
    wide = rows.astype(np.float64)
    return np.asarray(wide.std(axis=1) if centred else np.sqrt((wide * wide).mean(axis=1)))


def _median_and_peak(sigma: npt.NDArray[np.float64]) -> tuple[float | None, float | None]:
    """The median, and the largest over the median."""
    if not len(sigma):
        return None, None
    median = float(np.median(sigma))
    return median, float(sigma.max()) / median if median else None


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
