"""The fit of one site, and the sums that it was made from, of which two runs make one."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from .dyt import DytParameters, Mix
from .fits import CHUNK, ROWS, Fit, RowSample, fit_diagonal, relative_error
from .ranks import ALONE, Ranks
from .ridge import FullFit, GramSums, refit_full
from .scatter import Scatter

__all__ = [
    "SiteFit", "SiteSums", "chosen", "extended", "fit_site", "follow", "median_and_peak", "refit",
    "sigma",
]  # fmt: skip

Rows = npt.NDArray[Any]


@dataclass(frozen=True, eq=False)
class SiteSums:
    """What the fit of a site was made from: rows, and 48 C^2 bytes of a full fit.

    prefix: a hash of the converted sites before it, "" where there are none: only sums that rest
    on the same ones are of the same inputs. sample: max(6144, 8 C) rows of the site. full: sums for
    the alpha of the full fit and those beside it; empty where none was tried. tied_to: the site of
    the module's first call. shape: of gamma; centred: LayerNorm.
    """

    prefix: str
    sample: RowSample = field(repr=False)
    shape: tuple[int, ...]
    centred: bool
    tied_to: str | None = None
    full: tuple[GramSums, ...] = field(default=(), repr=False)

    def rows(self) -> tuple[Rows, Rows]:
        """The rows of a diagonal fit: no more than are needed for one."""
        x, y = self.sample.rows()
        return x[:ROWS], y[:ROWS]

    def arrays(self) -> dict[str, npt.NDArray[Any]]:
        """All arrays, by name: "sample/x", "0/squares" of the first alpha."""
        parts: dict[str, RowSample | GramSums] = {"sample": self.sample}
        parts |= {str(number): sums for number, sums in enumerate(self.full)}
        return {
            f"{part}/{name}": array
            for part, held in parts.items()
            for name, array in held.arrays().items()
        }


@dataclass(frozen=True, eq=False)
class SiteFit:
    """The fit of one site.

    parameters: None where there is no fit, `reason` says why; fit_error: relative, held-out rows.
    mix: of a full fit, what the readers' weights take up, behind parameters that are a bare DyT;
    None for a diagonal fit, `unmixed` says why. Where the parameters are affine, the readers'
    weights take up all of the site; unaffine: why they are not, where that was asked for.
    sigma_median: median over rows of the root mean square (centred for LayerNorm) that the norm
    divides by; sigma_peak: largest over median; large peaks are tokens that tanh cannot follow.
    scatter: some inputs and outputs, for drawing, with the curve of the diagonal fit; not written
    to files. sums: what the fit was made from, where it was asked to be kept.
    """

    parameters: DytParameters | None
    fit_error: float | None = None
    reason: str | None = None
    sigma_median: float | None = None
    sigma_peak: float | None = None
    scatter: Scatter | None = field(default=None, repr=False)
    mix: Mix | None = field(default=None, repr=False)
    unmixed: str | None = None
    unaffine: str | None = None
    sums: SiteSums | None = field(default=None, repr=False)

    @property
    def affine(self) -> bool:
        """Whether the site is affine in what it reads: nothing is left of it."""
        return self.parameters is not None and self.parameters.affine

    @property
    def method(self) -> str | None:
        """ "full", "diagonal", or None where there is no fit."""
        if self.parameters is None:
            return None
        return "diagonal" if self.mix is None else "full"

    def arrays(self) -> dict[str, npt.NDArray[Any]]:
        """Everything fitted, by name."""
        held = {} if self.parameters is None else self.parameters.named()
        return held if self.mix is None else held | self.mix.named()


def fit_site(
    sums: SiteSums,
    later: Iterable[RowSample] = (),
    squash: str = "tanh",
    ranks: Ranks = ALONE,
) -> SiteFit:
    """The diagonal fit of a site; later: rows of later calls of its module, fitted together.

    ranks: all have the fit then; the rows are the first's, which alone tells of them.
    """
    fitted = replace(sums, sample=sums.sample.united(*later)) if (later := tuple(later)) else sums
    fit = fit_diagonal(*fitted.rows(), squash, ranks)
    if isinstance(fit, Fit):
        return _told(sums, _shaped(fit.parameters, sums.shape), fit.error, None)
    return _told(sums, None, None, fit)


def follow(first: SiteFit, sums: SiteSums, ranks: Ranks = ALONE) -> SiteFit:
    """The fit of a later call of a module: the values of the first, the error on its own rows.

    ranks: as for `fit_site`.
    """
    own = first.parameters
    error = ranks.first(lambda: None if own is None else relative_error(own, *sums.rows()))
    return _told(sums, own, error, first.reason)


def chosen(diagonal: SiteFit, full: FullFit | str, method: str = "auto") -> SiteFit:
    """The full fit, or in "auto" the diagonal one where that is better on held-out rows."""
    if isinstance(full, str):
        return replace(diagonal, unmixed=full)
    sums = None if diagonal.sums is None else replace(diagonal.sums, full=full.sums)
    if method == "auto" and diagonal.fit_error is not None and full.least >= diagonal.fit_error:
        reason = f"the full fit's error on held-out rows is {full.least:.3g}, no smaller"
        return replace(diagonal, unmixed=reason, sums=sums)
    return replace(
        diagonal,
        parameters=full.parameters, mix=full.mix, fit_error=full.error, unmixed=None, sums=sums,
    )  # fmt: skip


def refit(
    sums: SiteSums, runs: Sequence[Sequence[GramSums]], later: Iterable[RowSample] = ()
) -> SiteFit:
    """The better fit of a site, by held-out rows, from sums alone; runs: those of its full fits."""
    diagonal = fit_site(sums, later)
    if diagonal.parameters is None or not all(runs):
        return diagonal
    return chosen(diagonal, refit_full(*sums.sample.rows(), runs))


def extended(prefix: str, place: int, fit: SiteFit) -> str:
    """The hash of a converted prefix and one more converted site, the `place`-th of the model."""
    hasher = hashlib.blake2b(f"{prefix}/{place}".encode(), digest_size=16)
    for name, array in fit.arrays().items():
        hasher.update(name.encode() + array.tobytes())
    return hasher.hexdigest()


def sigma(rows: Rows, *, centred: bool) -> npt.NDArray[np.float64]:
    """What the norm divides each row by (eps left out)."""
    found = np.empty(len(rows), np.float64)
    for start in range(0, len(rows), CHUNK):  # in float64 they take twice the sample's memory
        own = slice(start, start + CHUNK)
        wide = rows[own].astype(np.float64)
        with np.errstate(invalid="ignore"):  # of rows that hold infinity, which then have none
            found[own] = wide.std(axis=1) if centred else np.sqrt((wide * wide).mean(axis=1))
    return found


def _told(
    sums: SiteSums, parameters: DytParameters | None, error: float | None, reason: str | None
) -> SiteFit:
    """A fit with what is told of the site's own rows."""
    deviations = sigma(sums.rows()[0], centred=sums.centred)
    figures = median_and_peak(deviations)
    return SiteFit(parameters, error, reason, *figures, sums=sums)


def _shaped(parameters: DytParameters, shape: tuple[int, ...]) -> DytParameters:
    """gamma and beta in the shape that broadcasts against the site."""
    gamma, beta = parameters.gamma, parameters.beta
    return DytParameters(
        parameters.alpha,
        None if gamma is None else gamma.reshape(shape),
        None if beta is None else beta.reshape(shape),
        squash=parameters.squash,
    )


def median_and_peak(sigma: npt.NDArray[np.float64]) -> tuple[float | None, float | None]:
    """The median, and the largest over the median."""
    if not len(sigma):
        return None, None
    median = float(np.median(sigma))
    return median, float(sigma.max()) / median if median else None
