"""Two models on their way from point to point: the original, and the one that is converted.

They run side by side, one part between two points at a time, over all samples. What waits between
the parts lies on a shelf.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

import numpy as np
import numpy.typing as npt

from .data import Part, attention_mask, dealt, sample_keys
from .dyt import DytParameters, Mix, evaluate
from .fits import Keys, RowSample, held_as
from .graphs.base import Graph, numpy_dtype
from .graphs.cuts import Point, Stage
from .ranks import current
from .shelf import Kept, Shelf
from .sitefits import SiteFit
from .sites import NormSite
from .terms import Value

__all__ = ["Lane", "Layout", "Walk", "rows_dtype"]

Array = npt.NDArray[np.float32]
Rows = npt.NDArray[Any]
Lane = list[dict[Value, Kept]]
"""The values of one model that live between two stages, by batch."""


class Walk:
    """The two models on their way.

    original, converted: what lives of each, by batch; one and the same until the first site is
    converted. ranks: those that walk together, each over its share of the samples.
    """

    def __init__(self, graph: Graph, shelf: Shelf, samples: Part) -> None:
        self.ranks = current()
        self._graph = graph
        self._shelf = shelf
        self._masks: list[npt.NDArray[np.bool_] | None] = []
        self._keys: list[Keys] = []
        self.original: Lane = []
        for batch in dealt(graph, samples, self.ranks):
            self._masks.append(attention_mask(batch, graph))
            self._keys.append(sample_keys(batch, graph))
            self.original.append(
                {value: shelf.keep(batch[name], value) for name, value in graph.inputs.items()}
            )
        self.converted = self.original
        shapes = [None if mask is None else mask.shape for mask in self._masks]
        own = list(zip(shapes, map(len, self._keys), strict=True))
        self._about = list(chain.from_iterable(self.ranks.gathered(own)))

    @property
    def parted(self) -> bool:
        """Whether the two differ by now."""
        return self.converted is not self.original

    def advance(self, stage: Stage) -> None:
        """Run both models through a stage."""
        run = self._graph.segment(stage.start, stage.made)
        for lane in self._lanes():
            for values in lane:
                results = run([values[value].load() for value in stage.start])
                for value, result in zip(stage.made, results, strict=True):
                    values[value] = self._shelf.keep(result, value)

    def answer(self, point: Point, stage: Stage, lane: Lane) -> None:
        """Run what the original has at a point, on what lives behind its stage."""
        start = [point.input, *(value for value in stage.read if value is not point.input)]
        run = self._graph.segment(start, [point.output])
        for values in lane:
            (native,) = run([values[value].load() for value in start])
            values[point.output] = self._shelf.keep(native, point.output)

    def put(self, values: dict[Value, Kept], value: Value, array: Array) -> None:
        """Let an array be a value of one batch."""
        values[value] = self._shelf.keep(self._graph.from_array(array, value), value)

    def arrays(self, values: Mapping[Value, Kept], *wanted: Value) -> list[Array]:
        """Values of one batch in float32."""
        return [self.float32(values[value].load()) for value in wanted]

    def float32(self, native: Any) -> Array:
        """A native value in float32."""
        return self._graph.to_array(native).astype(np.float32, copy=False)

    def observe(self, site: NormSite, stage: Stage, sample: RowSample) -> RowSample:
        """Run the original's norm, and offer the site's rows to the sample, which is all ranks'."""
        self.answer(site, stage, self.original)
        for x, y, keys in self._keyed_rows(site):
            sample.add(x, y, keys)
        sample.join(self.ranks)
        return sample

    def rows(self, site: NormSite) -> Iterator[tuple[Rows, Rows]]:
        """Rows of the site's input in the converted and of its output in the original model."""
        return ((x, y) for x, y, _ in self._keyed_rows(site))

    def elements(self, site: NormSite) -> int:
        """How many elements the site's input has, over all batches."""
        own = sum(math.prod(values[site.input].shape) for values in self.converted)
        return sum(self.ranks.gathered(own))

    def apply(self, site: NormSite, fit: SiteFit | None, stage: Stage, following: Stage) -> None:
        """Put the site's output into the converted model, and drop what is used no more."""
        parameters = None if fit is None else fit.parameters
        if parameters is not None and not self.parted:
            self.converted = [dict(values) for values in self.original]
        if fit is not None and parameters is not None:
            self._put_dyt(site, parameters, fit.mix)
        elif self.parted:
            self.answer(site, stage, self.converted)
        self.release(following)

    def release(self, following: Stage) -> None:
        """Drop what neither the next stage nor a later one reads."""
        for lane in self._lanes():
            lane[:] = [{value: values[value] for value in following.start} for values in lane]

    def layout(self, value: Value, channels: Sequence[int]) -> Layout:
        """How a value that lives in both models is read as rows."""
        own = [values[value].shape for values in self.converted]
        masks, samples = zip(*self._about, strict=True)
        return Layout(channels, list(chain.from_iterable(self.ranks.gathered(own))), masks, samples)

    def counted(
        self, layout: Layout, shapes: Sequence[tuple[int, ...]]
    ) -> Iterator[tuple[npt.NDArray[np.bool_], Keys]]:
        """By batch: whether each row counts, and what those that do are known by."""
        for shape, mask, keys in zip(shapes, self._masks, self._keys, strict=True):
            counted = layout.counted(mask, shape)
            yield counted, layout.keys(keys, counted)

    def _keyed_rows(self, site: NormSite) -> Iterator[tuple[Rows, Rows, Keys]]:
        layout = self.layout(site.input, _channels(site))
        shapes = [values[site.input].shape for values in self.converted]
        for original, converted, (counted, keys) in zip(
            self.original, self.converted, self.counted(layout, shapes), strict=True
        ):
            x = self._graph.to_array(converted[site.input].load())
            y = self._graph.to_array(original[site.output].load())
            yield layout.rows(x)[counted], layout.rows(y)[counted], keys

    def _put_dyt(self, site: NormSite, parameters: DytParameters, mix: Mix | None) -> None:
        for values in self.converted:
            y = evaluate(parameters, *self.arrays(values, site.input))
            self.put(values, site.output, mix(y, site.axes[0]) if mix else y)

    def _lanes(self) -> list[Lane]:
        return [self.original, self.converted] if self.parted else [self.original]


def rows_dtype(site: NormSite) -> np.dtype[Any]:
    """In which the rows of a site are sampled."""
    return held_as(*(numpy_dtype(value.dtype) for value in (site.input, site.output)))


def _channels(site: NormSite) -> list[int]:
    """The axes, counted from the end, over which the gamma of a site varies."""
    shape = site.parameter_shape
    return [
        axis
        for axis, size in zip(range(-len(shape), 0), shape, strict=True)
        if size != 1 or axis in site.axes
    ]


class Layout:
    """How a value's tensors, one a batch, are read as rows of channels.

    channels: axes counted from the end; of a site those over which gamma varies: the normalized
    one, or that and others (a gamma of its own for each head). Rows come sample by sample, wherever
    the samples' axis lies. shapes, masks, samples: of all batches (of masks their shapes), which
    tell together where the axes of samples and tokens lie: a batch of as many samples as tokens
    could be read in two ways.
    """

    def __init__(
        self,
        channels: Sequence[int],
        shapes: Sequence[tuple[int, ...]],
        masks: Sequence[tuple[int, ...] | None],
        samples: Sequence[int],
    ) -> None:
        rank = max(map(len, shapes), default=0)
        self._channels = [axis % rank for axis in channels]
        others = [axis for axis in range(rank) if axis not in self._channels]
        found = [
            _mask_axes(shape, others, mask)
            for shape, mask in zip(shapes, masks, strict=True)
            if mask is not None
        ]
        common = set.intersection(*found) if found else set()
        self._mask_axes = common.pop() if len(common) == 1 else None
        own = None if self._mask_axes is None else self._mask_axes[0]
        self._samples = _sample_axis(shapes, others, samples) if own is None else own
        first = [] if self._samples is None else [self._samples]
        self._others = [*first, *(axis for axis in others if axis not in first)]

    def rows(self, array: npt.NDArray[Any]) -> Rows:
        """[rows, channels], in the 16 bits that the array has, else in float32."""
        moved = array.transpose([*self._others, *self._channels])
        channels = int(np.prod(moved.shape[len(self._others) :]))
        return np.ascontiguousarray(moved.reshape(-1, channels), dtype=held_as(array.dtype))

    def spread(self, rows: npt.NDArray[Any], shape: tuple[int, ...]) -> npt.NDArray[Any]:
        """One number for each row, at all of its channels in a tensor of that shape."""
        lying = rows.reshape([shape[axis] for axis in self._others])
        lying = lying.transpose(np.argsort(self._others))
        return np.broadcast_to(np.expand_dims(lying, tuple(self._channels)), shape)

    def keys(self, samples: Keys, counted: npt.NDArray[np.bool_]) -> Keys:
        """What each row that counts is known by: its sample, and its place among that one's rows.

        All samples of its batch, where it is unknown which of them a row is of.
        """
        if self._samples is None:
            samples = samples.sum(keepdims=True)
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
