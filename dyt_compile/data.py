"""The user's samples: batches that can be gone through again, split into fit, plan and report."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from .archives import entries
from .batches import as_batches
from .errors import DataError, first_line
from .graphs.base import Batch, Graph
from .ranks import Ranks

__all__ = [
    "FIRST", "HALVES", "SHARES", "UNPLANNED", "Part", "Splits", "attention_mask", "cut", "dealt",
    "largest", "load", "own_rows", "pieces", "sample_keys", "split", "whole",
]  # fmt: skip

SHARES = (0.5, 0.25, 0.25)
"""Of the samples, for fitting, for planning, and for the report."""

UNPLANNED = (0.75, 0.0, 0.25)
"""The same, where nothing is planned."""

HALVES = (0.0, 0.5, 0.5)
"""The same, where nothing is fitted."""

FIRST = 32
"""Samples for a first look: a site's largest sigma is that of a token that every sample has."""


@dataclass(frozen=True)
class Part:
    """A subset of the samples, as batches bound to the model's inputs; can be iterated again.

    places: of its samples among all, counted from 0, for each batch.
    """

    make: Callable[[], Iterator[Batch]]
    places: tuple[npt.NDArray[np.int64], ...] = field(repr=False)

    @property
    def batches(self) -> int:
        """How many batches there are."""
        return len(self.places)

    @property
    def samples(self) -> int:
        """How many samples there are."""
        return sum(map(len, self.places))

    def __iter__(self) -> Iterator[Batch]:
        return self.make()

    def first(self, samples: int) -> Part:
        """About so many of the samples: whole batches, one at least."""
        count = max(1, min(self.batches, self.batches * samples // max(1, self.samples)))
        return Part(lambda: islice(self.make(), count), self.places[:count])


@dataclass(frozen=True)
class Splits:
    """Disjoint samples for fitting, for planning, and for the figures in the report.

    first: the first few of those for fitting.
    """

    fit: Part
    plan: Part
    report: Part
    first: Part


def split(
    graph: Graph,
    batches: Iterable[Any],
    seed: int,
    shares: tuple[float, float, float] = SHARES,
) -> Splits:
    """The samples of `batches` split at random, by default 50/25/25.

    Samples lie along axis 0 where that axis is dynamic in the model; else a batch is a sample.
    One seed gives one order, whatever the shares: the last 10 % lie within the last 25 %.
    Raises DataError for one-shot iterators, batches that do not fit, and too few samples for the
    smallest share.
    """
    splitter = _Splitter(graph, as_batches(batches))
    sizes = [splitter.size(batch) for batch in splitter.bound()]
    total = sum(sizes)
    least = math.ceil(1 / min(share for share in shares if share))
    if total < least:
        raise DataError(
            f"the data holds {total} samples; at least {least} are needed for fit, plan and report"
        )
    order = np.random.default_rng(seed).permutation(total)
    first, second = round(total * shares[0]), round(total * (shares[0] + shares[1]))
    chosen = [np.sort(order[:first]), np.sort(order[first:second]), np.sort(order[second:])]
    chosen.append(chosen[0][:FIRST])
    starts = np.cumsum([0, *sizes])
    return Splits(*(splitter.part(indices, starts) for indices in chosen))


def whole(graph: Graph, batches: Iterable[Any]) -> Part:
    """All samples of `batches`, as they are. Raises DataError as `split` does."""
    splitter = _Splitter(graph, as_batches(batches))
    sizes = [splitter.size(batch) for batch in splitter.bound()]
    if not sizes:
        raise DataError("the data holds no batch")
    return Part(splitter.bound, tuple(np.split(np.arange(sum(sizes)), np.cumsum(sizes)[:-1])))


def cut(graph: Graph, samples: Part, size: int) -> Part:
    """The same samples in the same order, at most `size` a batch."""
    splitter = _Splitter(graph, ())

    def make() -> Iterator[Batch]:
        for batch in samples:
            own = np.arange(splitter.size(batch))
            for start in range(0, len(own), size):
                yield splitter.rows(batch, own[start : start + size])

    starts = ((places, n) for places in samples.places for n in range(0, len(places), size))
    return Part(make, tuple(places[n : n + size] for places, n in starts))


def largest(graph: Graph, samples: Part, size: int) -> tuple[Batch, dict[str, tuple[int, ...]]]:
    """A batch, and shapes of its tensors that no batch of at most `size` samples has a larger of.

    Of every axis it is the greatest length, though no batch may have all of them.
    """
    splitter = _Splitter(graph, ())
    batch: Batch = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for batch in samples:
        for name, value in batch.items():
            if shape := tuple(getattr(value, "shape", ())):
                held = shapes.get(name, shape)
                shapes[name] = tuple(max(pair) for pair in zip(held, shape, strict=True))
    for name, shape in shapes.items():
        if splitter.sampled(name, batch[name], splitter.size(batch)):
            shapes[name] = (min(size, shape[0]), *shape[1:])
    return batch, shapes


def dealt(graph: Graph, samples: Part, ranks: Ranks) -> Part:
    """One rank's share of the samples: whole batches by turns, and rows of those left over.

    A rank may get none, if there are fewer samples than ranks. Raises DataError unless all ranks
    were given as many samples.
    """
    counts = ranks.gathered(samples.samples)
    if len(set(counts)) > 1:
        raise DataError(
            f"the ranks were given {', '.join(map(str, counts))} samples; allowed: the same data "
            "on each, which then takes its share"
        )
    splitter, whole = _Splitter(graph, ()), samples.batches // ranks.size * ranks.size
    lengths = list(map(len, samples.places))

    def own(number: int) -> npt.NDArray[np.int64]:
        if number < whole:
            return np.arange(lengths[number] if number % ranks.size == ranks.number else 0)
        return _part(lengths[number], ranks, turn=sum(lengths[whole:number]))

    rows = list(map(own, range(samples.batches)))

    def make() -> Iterator[Batch]:
        pairs = zip(samples, rows, strict=True)
        return (splitter.rows(batch, taken) for batch, taken in pairs if len(taken))

    pairs = zip(samples.places, rows, strict=True)
    return Part(make, tuple(places[taken] for places, taken in pairs if len(taken)))


def own_rows(graph: Graph, batch: Batch, ranks: Ranks) -> tuple[Batch, bool]:
    """One rank's rows of a batch; where there are too few, some that do not count, and False."""
    splitter = _Splitter(graph, ())
    size = splitter.size(batch)
    rows = _part(size, ranks)
    counts = len(rows) > 0
    return splitter.rows(batch, rows if counts else np.arange(1)), counts


def _part(count: int, ranks: Ranks, turn: int = 0) -> npt.NDArray[np.int64]:
    """One rank's part of so many rows; turn: which rank gets the first, and with it the most."""
    return np.array_split(np.arange(count), ranks.size)[(ranks.number - turn) % ranks.size]


def pieces(
    graph: Graph, samples: Iterable[Batch], size: Callable[[Batch, int], int], seed: int
) -> Iterator[Batch]:
    """The samples in smaller batches, put together at random, as `seed` says.

    size: how many samples one may have at most, of a batch and its number of samples, since
    samples of one batch stay together: others may have other lengths. An even size makes all even,
    but for one of an odd batch, so that two ranks have as much to do.
    """
    splitter = _Splitter(graph, ())
    random = np.random.default_rng(seed)
    for batch in samples:
        order = random.permutation(splitter.size(batch))
        most = size(batch, len(order))
        together = 1 if most % 2 else 2
        groups = np.arange(len(order) // together)
        parts = np.array_split(groups, math.ceil(len(order) / most))
        ends = np.cumsum([together * len(part) for part in parts])
        for rows in np.split(order, ends[:-1]):
            yield splitter.rows(batch, rows)


class _Splitter:
    def __init__(self, graph: Graph, batches: Iterable[Any]) -> None:
        self._graph = graph
        self._batches = batches
        self._sampled = [
            name for name, value in graph.inputs.items() if value.shape and value.shape[0] is None
        ]

    def bound(self) -> Iterator[Batch]:
        return (self._graph.bind(batch) for batch in self._batches)

    def size(self, batch: Batch) -> int:
        """Samples in a batch."""
        if not self._sampled:
            return 1
        size = int(batch[self._sampled[0]].shape[0])
        if size == 0:
            raise DataError(f"a batch holds no samples: {self._sampled[0]!r} has length 0")
        return size

    def part(self, indices: npt.NDArray[np.int64], starts: npt.NDArray[np.int64]) -> Part:
        own = np.split(indices, np.searchsorted(indices, starts[1:-1]))
        used = [number for number, places in enumerate(own) if len(places)]

        def make() -> Iterator[Batch]:
            for number, batch in enumerate(islice(self.bound(), used[-1] + 1)):
                if len(own[number]):
                    yield self.rows(batch, own[number] - starts[number])

        return Part(make, tuple(own[number] for number in used))

    def rows(self, batch: Batch, rows: npt.NDArray[np.int64]) -> Batch:
        """Some samples of a batch, as many rows as given."""
        size = self.size(batch)
        if len(rows) == size:
            return batch
        return {
            name: value[rows] if self.sampled(name, value, size) else value
            for name, value in batch.items()
        }

    def sampled(self, name: str, value: Any, size: int) -> bool:
        """Whether samples lie along axis 0 of an input, in a batch of that size."""
        return name in self._sampled and value.shape[0] == size


def attention_mask(batch: Batch, graph: Graph) -> npt.NDArray[np.bool_] | None:
    """The positions that count, [samples, positions]; None where the model takes no mask."""
    native = batch.get("attention_mask")
    if native is None:
        return None
    mask = graph.to_array(native)
    return mask > 0 if mask.ndim == 2 else None


def sample_keys(batch: Batch, graph: Graph) -> npt.NDArray[np.uint64]:
    """What each sample of a batch is known by: a hash of its inputs, padding left out.

    The same in every batch, at every place of the data, on every machine, for a model of any dtype.
    """
    splitter = _Splitter(graph, ())
    hashers = [hashlib.blake2b(digest_size=8) for _ in range(splitter.size(batch))]
    mask = attention_mask(batch, graph)
    for name, native in batch.items():
        array = _widened(graph.to_array(native))
        if not splitter.sampled(name, array, len(hashers)):
            if len(hashers) == 1:
                hashers[0].update(array.tobytes())
            continue
        padded = mask is not None and mask.shape == array.shape[:2]
        for number, hasher in enumerate(hashers):
            own = array[number][mask[number]] if padded else array[number]  # type: ignore[index]
            hasher.update(own.tobytes())
    return np.array([int.from_bytes(h.digest(), "little") for h in hashers], np.uint64)


def _widened(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """The values in one dtype for all floats, bfloat16 included, and one for all integers."""
    return array.astype(np.int64 if array.dtype.kind in "biu" else np.float32)


def load(path: Path, batch_size: int) -> Iterable[Any]:
    """Batches from a file: `.npz` (one array an input, first axis = samples), or a folder of them.

    Raises DataError; object arrays, which would be pickles, are refused.
    """
    if path.is_dir():
        files = sorted(path.glob("*.npz"))
        if not files:
            raise DataError(f"folder {str(path)!r} holds no .npz file")
        return _Folder(files)
    if path.suffix != ".npz" or not path.is_file():
        raise DataError(
            f"data {str(path)!r} is no .npz file and no folder; allowed: an .npz file, "
            "a folder of .npz files, or file.py:function"
        )
    return _Chunks(_arrays(path), batch_size)


@dataclass(frozen=True)
class _Folder:
    files: list[Path]

    def __iter__(self) -> Iterator[Mapping[str, npt.NDArray[Any]]]:
        return (_arrays(file) for file in self.files)


class _Chunks:
    def __init__(self, arrays: dict[str, npt.NDArray[Any]], size: int) -> None:
        self._arrays = arrays
        self._size = size
        self._total = len(next(iter(arrays.values())))

    def __iter__(self) -> Iterator[Mapping[str, npt.NDArray[Any]]]:
        for start in range(0, self._total, self._size):
            yield {name: a[start : start + self._size] for name, a in self._arrays.items()}


def _arrays(path: Path) -> dict[str, npt.NDArray[Any]]:
    """The arrays of a file, all of one length."""
    try:
        entries(path)
        with np.load(path, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
    except Exception as error:
        raise DataError(
            f"{str(path)!r} is no archive of plain arrays: {first_line(error)}"
        ) from error
    if not arrays:
        raise DataError(f"{str(path)!r} holds no array")
    for name, array in arrays.items():
        if not isinstance(array, np.ndarray):
            raise DataError(f"{str(path)!r} holds {name!r}, which is no array")
    lengths = {name: len(array) if array.ndim else 0 for name, array in arrays.items()}
    if len(set(lengths.values())) != 1 or not all(lengths.values()):
        told = ", ".join(f"{name}: {length}" for name, length in lengths.items())
        raise DataError(
            f"{str(path)!r}: every array needs the same, non-zero number of samples; {told}"
        )
    return arrays
