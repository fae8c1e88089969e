"""Refits of linear projections: a walk over converted sites moves their weights a little.

The least squares that a full fit solves for a site, solved for a projection, and drawn towards the
weight that it has.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import numpy as np
import numpy.typing as npt

from .dyt import DytParameters, Mix, Refit
from .fits import HELD_OUT, Fit, Keys, RowSample, fit_diagonal, inverse
from .graphs.base import Graph
from .graphs.cuts import Stage
from .projections import Projection
from .ranks import ALONE, Ranks
from .ridge import GramSums
from .shelf import Kept
from .sites import NormSite
from .terms import Value
from .walk import Walk

__all__ = ["RefitSums", "refit"]

Array = npt.NDArray[np.float32]

RIDGES = (1e-2, 1e-1, 1.0)
"""Parts of a channel's own sum of squares that draw its row of a weight to what it was."""

ROUNDS = 2
"""Of a projection's refit and the fit of the DyT behind it."""


def refit(
    walk: Walk, graph: Graph, projection: Projection, stage: Stage, following: Stage, seed: int
) -> Refit | None:
    """Run a projection, in the converted model with the weight that suits its input best.

    None where the two models are still one, or no other weight does better on held-out rows.
    """
    walk.answer(projection, stage, walk.original)
    found = None
    if walk.parted:
        walk.answer(projection, stage, walk.converted)
        found = _Refitting(walk, graph, projection, seed).best()
    walk.release(following)
    return found


class RefitSums:
    """The sums from which a projection is refitted, those of every fourth row apart.

    ranks: each adds rows of its own, once at least, and all join.
    """

    def __init__(self, like: RefitSums | None = None, ranks: Ranks = ALONE) -> None:
        """like: complete sums of the same rows of x; their products are shared."""
        self._ranks = ranks
        self._like: tuple[_Sums, _Sums] | None = None if like is None else like._parts
        self._parts: tuple[_Sums, _Sums] | None = None
        self._rows = 0
        self._wanted = 0.0

    def add(self, x: Array, y: Array, missing: Array, keys: Keys | None = None) -> None:
        """Count rows in. x: input; y: output wanted; missing: that, less the output of now.

        keys: what each row is known by; by default its place among all.
        """
        if self._parts is None:
            like = self._like or (None, None)
            centres = self._ranks.first(lambda: (x.mean(axis=0), missing.mean(axis=0)))
            self._parts = _Sums(*centres, like[0]), _Sums(*centres, like[1])
        if keys is None:
            keys = np.arange(self._rows, self._rows + len(x), dtype=np.uint64)
        held = keys % np.uint64(HELD_OUT) == 0
        self._rows += len(x)
        self._wanted += float(np.square(y[held], dtype=np.float64).sum())
        for sums, rows in zip(self._parts, (~held, held), strict=True):
            sums.add(x[rows], missing[rows])

    def join(self) -> None:
        """Let the first rank's be the sums of all."""
        wanted = np.array([self._wanted])
        self._ranks.add([wanted])
        self._wanted = float(wanted[0])
        for sums in self._parts or ():
            sums.join(self._ranks)

    def solve(self) -> Refit | None:
        """The refit with the ridge that does best on held-out rows; None where none helps."""
        if self._parts is None or not self._wanted > 0 or not all(p.finite for p in self._parts):
            return None
        fitted, held = self._parts
        errors = {ridge: held.squared_error(fitted.solve(ridge)) for ridge in RIDGES}
        ridge = min(errors, key=errors.__getitem__)
        if not errors[ridge] < held.total:
            return None
        before, after = (
            (max(error, 0.0) / self._wanted) ** 0.5 for error in (held.total, errors[ridge])
        )
        return Refit(fitted.united(held).solve(ridge, spent=True), before, after)


class _Sums(GramSums):
    """Sums for y = x matrix + offset, which also tell the error of one."""

    def __init__(self, centre_x: Array, centre_y: Array, like: _Sums | None) -> None:
        centre = centre_x if like is None else like._centres[0]
        squares = None if like is None else like._squares
        # What a projection reads is squashed already, if at all.
        super().__init__(1.0, centre, centre_y, squares=squares, squash="identity")
        self._length = 0.0

    def add(self, x: Array, y: Array) -> None:
        """Count rows in."""
        super().add(x, y)
        self._length += float(np.square(y - self._centres[1]).sum())

    def join(self, ranks: Ranks) -> None:
        """Let the first rank's be the sums of all ranks."""
        super().join(ranks)
        length = np.array([self._length])
        ranks.add([length])
        self._length = float(length[0])

    @property
    def total(self) -> float:
        """Sum over all rows of y^2."""
        centre = self._centres[1]
        return float(self._length + 2 * centre @ self._totals[1] + self.rows * centre @ centre)

    def squared_error(self, mix: Mix) -> float:
        """Sum over all rows of (x matrix + offset - y)^2."""
        matrix = mix.matrix.astype(np.float64)
        shift = mix.offset + self._centres[0] @ matrix - self._centres[1]
        bent = np.einsum("io,io->", matrix, self._squares @ matrix - 2 * self._products)
        left = self._totals[1] - self._totals[0] @ matrix
        return float(self._length + bent - 2 * shift @ left + self.rows * shift @ shift)


class _Refitting:
    """One projection, whose output both models have."""

    def __init__(self, walk: Walk, graph: Graph, projection: Projection, seed: int) -> None:
        self._walk = walk
        self._ranks = walk.ranks
        self._graph = graph
        self._projection = projection
        self._seed = seed
        self._layout = walk.layout(projection.beside, (-1,))
        self._shapes = [values[projection.beside].shape for values in walk.converted]

    def best(self) -> Refit | None:
        """The refit, which the converted model's output has then."""
        sums = self._sums(self._restored())
        found = self._ranks.first(sums.solve)
        if found is None:
            return None
        if self._projection.site is not None:
            found = self._aimed(self._projection.site, found, sums)
        for values in self._walk.converted:
            self._walk.put(values, self._projection.output, self._output(found, values))
        return found

    def _aimed(self, site: NormSite, found: Refit, sums: RefitSums) -> Refit:
        """A refit towards what the DyT behind it has to read, to put out what the norm does.

        The sum that the original's norm reads is no aim in itself, where only that norm reads it:
        dividing by sigma, the norm takes from it what tanh cannot. Alternates with the fit of the
        DyT, as long as its error on held-out rows falls.
        """
        fit = self._site_fit(site, found)
        for _ in range(ROUNDS):
            if isinstance(fit, str):
                break
            again = self._sums(self._inverted(site, found, fit.parameters), sums)
            aimed = self._ranks.first(again.solve)
            aimed_fit = fit if aimed is None else self._site_fit(site, aimed)
            if aimed is None or isinstance(aimed_fit, str) or not aimed_fit.error < fit.error:
                break
            found, fit = aimed, aimed_fit
        return found

    def _sums(self, targets: Iterable[Array], like: RefitSums | None = None) -> RefitSums:
        """The sums over all rows of what the projection reads and of what it should put out."""
        sums = RefitSums(like, self._ranks)
        read = self._projection.input, self._projection.output
        for converted, target, (counted, keys) in zip(
            self._walk.converted, targets, self._rows(), strict=True
        ):
            x, now = self._walk.arrays(converted, *read)
            x, y, missing = (
                part.reshape(-1, part.shape[-1])[counted] for part in (x, target, target - now)
            )
            sums.add(x, y, missing, keys)
        sums.join()
        return sums

    def _rows(self) -> Iterator[tuple[npt.NDArray[np.bool_], Keys]]:
        """The rows of the projection that count, and their keys; masks are of what lies behind."""
        found = self._walk.counted(self._layout, self._shapes)
        for shape, (counted, keys) in zip(self._shapes, found, strict=True):
            places = np.cumsum(counted) * counted  # 0, or which of the keys is a row's
            flat = self._projection.back(self._layout.spread(places, shape))
            order = flat.reshape(-1, shape[-1])[:, 0]
            yield order > 0, keys[order[order > 0] - 1]

    def _restored(self) -> Iterator[Array]:
        """What the projection has to put out for the sums behind it to be the original's."""
        walk, projection = self._walk, self._projection
        for original, converted in zip(walk.original, walk.converted, strict=True):
            (wanted,) = walk.arrays(original, projection.output)
            before = walk.arrays(original, *projection.residuals)
            after = walk.arrays(converted, *projection.residuals)
            yield projection.target(wanted, [a - b for a, b in zip(before, after, strict=True)])

    def _inverted(self, site: NormSite, found: Refit, parameters: DytParameters) -> Iterator[Array]:
        """What the projection has to put out for the DyT behind it to give the original's."""
        for now, x, y in self._behind(site, found):
            yield self._projection.target(now, [inverse(parameters, x, y) - x])

    def _site_fit(self, site: NormSite, found: Refit) -> Fit | str:
        """The diagonal fit of the site behind, once the projection is refitted."""
        sample = RowSample(self._seed)
        rows = self._walk.counted(self._layout, self._shapes)
        for (_, x, y), (counted, keys) in zip(self._behind(site, found), rows, strict=True):
            sample.add(self._layout.rows(x)[counted], self._layout.rows(y)[counted], keys)
        sample.join(self._ranks)
        return fit_diagonal(*sample.rows(), ranks=self._ranks)

    def _behind(self, site: NormSite, found: Refit) -> Iterator[tuple[Array, Array, Array]]:
        """By batch: the refitted output, what the site reads then, and what the norm puts out."""
        start = [self._projection.output, *self._projection.known]
        to_input = self._graph.segment(start, [site.input])
        to_output = self._graph.segment(start, [site.output])
        for original, converted in zip(self._walk.original, self._walk.converted, strict=True):
            now = self._output(found, converted)
            known = [converted[value].load() for value in start[1:]]
            (x,) = to_input([self._graph.from_array(now, start[0]), *known])
            (y,) = to_output([original[value].load() for value in start])
            yield now, self._walk.float32(x), self._walk.float32(y)

    def _output(self, found: Refit, values: Mapping[Value, Kept]) -> Array:
        x, now = self._walk.arrays(values, self._projection.input, self._projection.output)
        return np.asarray(now + found.mix(x), np.float32)
