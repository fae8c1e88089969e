"""What a calibration takes in memory: worked out before it runs, and cut so that it keeps a bound.

present   the process, before anything is calibrated
running   a part of the model between two points: its weights, if they lie in files, and values
fitting   one site: its sample of rows, the sums of a full fit, and what both are made from
refitting a linear layer: its sums; left out where that takes more than the bound lets
kept      what every fit leaves behind, and what is noted of every sample
"""

from __future__ import annotations

import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from .data import Part, cut, largest
from .dyt import Mix, Refit
from .errors import OptionError, RewriteError
from .fits import BLOCK, CHUNK, ROWS
from .graphs.base import Graph, numpy_dtype
from .graphs.cuts import stages
from .memory import give_back, resident_bytes, told_bytes
from .projections import Projection
from .ranks import current
from .ridge import ROWS_PER_CHANNEL, TRIED
from .shelf import MEMORY_BYTES
from .sitefits import SiteFit
from .sites import NormSite
from .terms import Value
from .walk import rows_dtype

Fitted = TypeVar("Fitted", SiteFit, Refit)

__all__ = ["Demand", "Room", "Walked", "diagonal_bytes", "full_bytes", "room_within"]

SLACK_BYTES = 80 << 20
"""What allocators hold beyond what is asked of them, modules that are imported late, buffers of
files. Measured by benchmarks/memory.py."""

STREAMED = 28
"""Bytes for an element of a batch while its rows are read or DyT is put in: copies in float32 of
input and output, as they lie, as rows, and as rows that count."""

DIAGONAL, WORKED = 4, 32
"""Bytes for an element of the rows of a diagonal fit, in float32 what alpha is searched on; and for
one of those channels that are worked on at once."""

FULL = 40
"""Bytes for an element of `CHUNK` rows of a full fit: copies in float32 and in float64, and the
products of some channels with all."""

SQUARES, PRODUCTS = 4 * 8, 9 * 8
"""Bytes for an element of the squares and of the products that a linear layer is refitted from: of
rows that are held out and the others, of both, and of two rounds; what is made of them; copies."""

SITE_BYTES, SAMPLE_BYTES, VALUE_BYTES = 1 << 14, 8, 1 << 10
"""Of a fit without arrays (what is drawn of it above all), a sample's key, a value's handle."""


@dataclass(frozen=True)
class Demand:
    """Bytes that a calibration takes at most, by what takes them; see above."""

    present: int
    running: int
    fitting: int
    refitting: Mapping[str, int]
    kept: int

    @property
    def total(self) -> int:
        """All that there is at one time."""
        return self._beside + max(self.running, self._fitting)

    def beyond(self, memory_bytes: int) -> list[str]:
        """The linear layers that such a bound lets nobody refit."""
        return [n for n, size in self.refitting.items() if self._beside + size > memory_bytes]

    @property
    def _beside(self) -> int:
        return self.present + self.kept + SLACK_BYTES

    @property
    def _fitting(self) -> int:
        return max(self.fitting, *self.refitting.values(), 0)

    def told(self) -> str:
        """The parts in words."""
        return (
            f"{told_bytes(self.present)} that the process holds already, "
            f"{told_bytes(self.running)} to run a part of the model on one sample, "
            f"{told_bytes(self._fitting)} to fit a site, {told_bytes(self.kept)} that fits keep"
        )


@dataclass(frozen=True)
class Room:
    """What a calibration may hold: these batches of samples, so many bytes on its shelf.

    left: names of linear layers that it does not refit. folder: where the matrices of its fits go;
    in memory without.
    """

    samples: Part
    left: Collection[str] = ()
    shelf_bytes: int = MEMORY_BYTES
    folder: tempfile.TemporaryDirectory[str] | None = field(default=None, repr=False)

    def stored(self, fit: Fitted) -> Fitted:
        """The fit, its matrix where it belongs."""
        if self.folder is None or fit.mix is None:
            return fit
        return replace(fit, mix=_StoredMix(fit.mix, self.folder))

    def settle(self) -> None:
        """Between two sites, where a bound is kept: let go of what the last one took."""
        if self.folder is not None:
            give_back()


class _StoredMix(Mix):
    """A mix whose matrix lies in a file, from which it is read whenever it is asked for.

    The folder goes with the last mix in it.
    """

    def __init__(self, mix: Mix, folder: tempfile.TemporaryDirectory[str]) -> None:
        with tempfile.NamedTemporaryFile(dir=folder.name, suffix=".npy", delete=False) as file:
            np.save(file, mix.matrix, allow_pickle=False)
        vars(self).update(offset=mix.offset, _file=Path(file.name), _folder=folder)

    @property
    def matrix(self) -> npt.NDArray[np.float32]:
        """As of every mix."""
        found: npt.NDArray[np.float32] = np.load(vars(self)["_file"], allow_pickle=False)
        return found


@dataclass(frozen=True, eq=False)
class Walked:
    """What a calibration goes through.

    points: in order, without those that are left; full: names of the sites that a full fit is tried
    for; keep_sums: whether fits keep what they were made from.
    """

    graph: Graph
    points: Sequence[NormSite | Projection]
    full: frozenset[str]
    keep_sums: bool

    def demand(self, samples: Part, size: int) -> Demand:
        """What it takes with so many samples at once. Raises RewriteError where none can tell."""
        batch, shapes = largest(self.graph, samples, size)
        sizes = {v: _bytes(shapes[n], v) for n, v in self.graph.inputs.items() if n in shapes}
        given = sum(sizes.values()) * -(-max(map(len, samples.places)) // size)
        cuts = list(self._cuts())
        loads = self.graph.loads(cuts, batch, shapes)
        for (_, stop), load in zip(cuts, loads, strict=True):
            sizes |= dict(zip(stop, load.made, strict=True))
        spilled = 2 * max(sizes.values(), default=0)  # in float32 on the way to or from a file
        noted = samples.samples * (SAMPLE_BYTES + VALUE_BYTES * len(cuts[0][0]))
        noted += sum(prod(shape) for name, shape in shapes.items() if name == "attention_mask")
        sites, behind = self._sites(), self._behind()
        return Demand(
            resident_bytes(),
            max(load.most for load in loads) + spilled + given,
            max((self._fitting(site, sizes) for site in sites), default=0) + given,
            {layer.name: _refitting(layer, sizes) + given for layer in behind},
            sum(map(self._kept, sites)) + SITE_BYTES * len(behind) + noted,
        )

    def without(self, names: Collection[str]) -> Walked:
        """The same without some linear layers."""
        behind = [layer for layer in self._behind() if layer.name in names]
        return replace(self, points=[point for point in self.points if point not in behind])

    def _sites(self) -> list[NormSite]:
        return [point for point in self.points if isinstance(point, NormSite)]

    def _behind(self) -> list[Projection]:
        return [point for point in self.points if isinstance(point, Projection)]

    def _cuts(self) -> Iterator[tuple[Sequence[Value], Sequence[Value]]]:
        """What a walk runs: the stage before every point, and the point itself."""
        staged = stages(self.graph, self.points)
        for stage, point in zip(staged[:-1], self.points, strict=True):
            yield stage.start, stage.made
            yield [point.input, *(v for v in stage.read if v is not point.input)], [point.output]

    def _fitting(self, site: NormSite, sizes: Mapping[Value, int]) -> int:
        """At one site: what `fits` and `ridge` make, and the rows of a batch."""
        streamed = STREAMED * _elements(site.output, sizes)
        channels, full = prod(site.parameter_shape), site.name in self.full
        solved = full_bytes(channels, keep_sums=self.keep_sums) if full else 0
        again = any(other.tied_to == site.name for other in self._sites())
        sampled = _sample_bytes(site, full=full) * (2 if again else 1)
        return streamed + sampled + max(diagonal_bytes(channels), solved)

    def _kept(self, site: NormSite) -> int:
        channels, full = prod(site.parameter_shape), site.name in self.full
        kept = SITE_BYTES + 16 * channels
        if site.tied_to is not None:
            kept += _sample_bytes(site, full=False)
        if self.keep_sums:
            kept += _sample_bytes(site, full=full) + 48 * channels**2 * full
        return kept


def room_within(memory_bytes: int | None, walked: Walked, samples: Part) -> Room:
    """How a calibration keeps within its memory: batches cut smaller, values and matrices in files.

    None: no bound. What is worked out grows with the samples at once no faster than between one and
    all of a batch, as the most of several straight lines does. Linear layers whose refit alone is
    too much are left. Raises OptionError where the bound cannot be kept, with the least that can.
    """
    if memory_bytes is None:
        return Room(samples)
    most = max(map(len, samples.places))
    give_back()
    try:
        beyond = current().gathered(walked.demand(samples, 1).beyond(memory_bytes))
        left = sorted(set().union(*beyond))
        walked = walked.without(left)
        least, whole = (walked.demand(samples, size) for size in (1, most))
    except RewriteError as error:
        raise OptionError(f"memory cannot be promised for this model: {error}") from error
    if least.total > memory_bytes:
        raise OptionError(
            f"memory is {told_bytes(memory_bytes)}, and calibrating this model takes "
            f"{told_bytes(least.total)}: {least.told()}"
        )
    steep = max(whole.total - least.total, 1) / max(most - 1, 1)
    size = min(most, 1 + int((memory_bytes - least.total) / steep))
    size = min(current().gathered(size))  # ranks deal the same batches among themselves
    taken = least.total + int(steep * (size - 1))
    return Room(
        cut(walked.graph, samples, size),
        left,
        min(memory_bytes - taken, MEMORY_BYTES),
        tempfile.TemporaryDirectory(prefix="dyt-compile-"),
    )


def diagonal_bytes(channels: int) -> int:
    """Of a diagonal fit, beside its rows."""
    return (DIAGONAL * channels + WORKED * BLOCK) * ROWS


def full_bytes(channels: int, *, keep_sums: bool) -> int:
    """Of a full fit, beside its rows: float64 sums and copies of them, a float32 matrix."""
    if keep_sums:  # for three alphas; the squares of one are copied
        matrices = (3 * 16 + 8 + 4) * channels
    else:  # for some channels of y while the ridge is chosen, for all behind that
        matrices = max(16 * channels + 12 * min(channels, TRIED), 20 * channels)
    return (matrices + FULL * CHUNK) * channels


def _refitting(layer: Projection, sizes: Mapping[Value, int]) -> int:
    """At a linear layer: what `refits` makes, the fit of a site behind it, the rows of a batch."""
    read, put = (int(size or 0) for size in layer.shape)
    streamed = 2 * STREAMED * _elements(layer.output, sizes)
    behind = 0 if layer.site is None else 8 * put * ROWS + diagonal_bytes(put)
    return streamed + behind + read * (SQUARES * read + PRODUCTS * put)


def _sample_bytes(site: NormSite, *, full: bool) -> int:
    """Of a sample of rows, as `RowSample` says."""
    channels = prod(site.parameter_shape)
    rows = max(ROWS, ROWS_PER_CHANNEL * channels * full)
    return rows * (2 * channels * rows_dtype(site).itemsize + SAMPLE_BYTES)


def _bytes(shape: Sequence[int], value: Value) -> int:
    return prod(shape) * _width(value)


def _elements(value: Value, sizes: Mapping[Value, int]) -> int:
    return sizes.get(value, 0) // _width(value)


def _width(value: Value) -> int:
    return numpy_dtype(value.dtype).itemsize
