"""What a calibration takes in memory: worked out before it runs, and cut so that it keeps a bound.

present   the process, before anything is calibrated
running   a part of the model between two points: its weights, if they lie in files, and values
fitting   one site: its sample of rows, the sums of a full fit, and what both are made from
kept      what every fit leaves behind, and what is noted of every sample
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path

import ml_dtypes  # noqa: F401 - NumPy knows bfloat16 by it
import numpy as np
import numpy.typing as npt

from .data import Part, cut, largest
from .dyt import Mix
from .errors import OptionError, RewriteError
from .fits import ROWS
from .graphs.base import Graph
from .graphs.cuts import stages
from .memory import resident_bytes, told_bytes
from .projections import Projection
from .ranks import current
from .ridge import CHUNK, ROWS_PER_CHANNEL
from .shelf import MEMORY_BYTES
from .sitefits import SiteFit
from .sites import NormSite
from .terms import Value

__all__ = ["Demand", "Room", "Walked", "room_within"]

SLACK_BYTES = 96 << 20
"""What allocators hold beyond what is asked of them, modules that are imported late, buffers of
files. Measured by benchmarks/memory.py."""

STREAMED = 28
"""Bytes for an element of a batch while its rows are read or DyT is put in: copies in float32 of
input and output, as they lie, as rows, and as rows that count."""

DIAGONAL = 8
"""Bytes for an element of the rows of a diagonal fit: copies of the quarter that is held out, and
what is worked out some rows or some channels at a time."""

SITE_BYTES, SAMPLE_BYTES, VALUE_BYTES = 1 << 14, 8, 1 << 10
"""Of a fit without arrays (what is drawn of it above all), a sample's key, a value's handle."""


@dataclass(frozen=True)
class Demand:
    """Bytes that a calibration takes at most, by what takes them; see above."""

    present: int
    running: int
    fitting: int
    kept: int

    @property
    def total(self) -> int:
        """All that there is at one time."""
        return self.present + self.kept + max(self.running, self.fitting) + SLACK_BYTES

    def told(self) -> str:
        """The parts in words."""
        return (
            f"{told_bytes(self.present)} that the process holds already, "
            f"{told_bytes(self.running)} to run a part of the model on one sample, "
            f"{told_bytes(self.fitting)} to fit a site, {told_bytes(self.kept)} that fits keep"
        )


@dataclass(frozen=True)
class Room:
    """What a calibration may hold: these batches of samples, so many bytes on its shelf.

    folder: where the matrices of its fits go; in memory without.
    """

    samples: Part
    shelf_bytes: int = MEMORY_BYTES
    folder: tempfile.TemporaryDirectory[str] | None = field(default=None, repr=False)

    def stored(self, fit: SiteFit) -> SiteFit:
        """The fit, its matrix where it belongs."""
        if self.folder is None or fit.mix is None:
            return fit
        return replace(fit, mix=_StoredMix(fit.mix, self.folder))


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

    points: in order; full: names of the sites that a full fit is tried for; keep_sums: whether fits
    keep what they were made from.
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
        return Demand(
            resident_bytes(),
            max(load.most for load in loads) + spilled + given,
            max(self._fitting(point, sizes) for point in self.points) + given,
            sum(map(self._kept, self.points)) + noted,
        )

    def _cuts(self) -> Iterator[tuple[Sequence[Value], Sequence[Value]]]:
        """What a walk runs: the stage before every point, and the point itself."""
        staged = stages(self.graph, self.points)
        for stage, point in zip(staged[:-1], self.points, strict=True):
            yield stage.start, stage.made
            yield [point.input, *(v for v in stage.read if v is not point.input)], [point.output]

    def _fitting(self, point: NormSite | Projection, sizes: Mapping[Value, int]) -> int:
        """At one point: what `fits`, `ridge` and `refits` make, and the rows of a batch."""
        streamed = STREAMED * _elements(point.output, sizes)
        if isinstance(point, Projection):
            read, put = (int(size or 0) for size in point.shape)
            return 2 * streamed + 8 * read * (6 * read + 6 * put)
        channels, full = prod(point.parameter_shape), point.name in self.full
        solved = 0
        if full:
            sums = 3 if self.keep_sums else 1
            solved = (16 * sums + 16) * channels**2 + 28 * channels * CHUNK
        sampled = _sample_bytes(channels, full=full)
        return streamed + sampled + max(DIAGONAL * channels * ROWS, solved)

    def _kept(self, point: NormSite | Projection) -> int:
        if isinstance(point, Projection):
            return 4 * prod(size or 0 for size in point.shape)
        channels, full = prod(point.parameter_shape), point.name in self.full
        kept = SITE_BYTES + 16 * channels
        if point.tied_to is not None:
            kept += _sample_bytes(channels, full=False)
        if self.keep_sums:
            kept += _sample_bytes(channels, full=full) + 48 * channels**2 * full
        return kept


def room_within(memory_bytes: int | None, walked: Walked, samples: Part) -> Room:
    """How a calibration keeps within its memory: batches cut smaller, values and matrices in files.

    None: no bound. What is worked out grows with the samples at once no faster than between one and
    all of a batch, as the most of several straight lines does. Raises OptionError where the bound
    cannot be kept, with the least that can.
    """
    if memory_bytes is None:
        return Room(samples)
    most = max(map(len, samples.places))
    try:
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
        min(memory_bytes - taken, MEMORY_BYTES),
        tempfile.TemporaryDirectory(prefix="dyt-compile-"),
    )


def _sample_bytes(channels: int, *, full: bool) -> int:
    """Of a sample of rows, as `RowSample` says, with what marks which are finite."""
    return 9 * channels * max(ROWS, ROWS_PER_CHANNEL * channels * full)


def _bytes(shape: Sequence[int], value: Value) -> int:
    return prod(shape) * _width(value)


def _elements(value: Value, sizes: Mapping[Value, int]) -> int:
    return sizes.get(value, 0) // _width(value)


def _width(value: Value) -> int:
    return np.dtype(value.dtype or "float32").itemsize
