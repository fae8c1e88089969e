"""What calibration leaves behind: the fitted values of every site, and the model they belong to."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from numbers import Real
from pathlib import Path
from types import MappingProxyType, NoneType
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from .dyt import PARAMETERS, SQUASHES, DytParameters, Mix, Refit
from .errors import CalibrationError
from .files import Arrays, replaced, write_arrays
from .fits import RowSample
from .ridge import GramSums
from .sitefits import SiteFit, SiteSums, extended, follow, refit
from .sites import NormKind

__all__ = ["Calibration", "SiteFit", "SiteSketch", "digest", "near", "sketch"]

VERSION = 4
READABLE = (1, 2, 3, VERSION)
"""Version 1 had no mixes, version 2 no refits and no sums, version 3 no affine fits; who
reads those alone must not take a part of a fit for the whole."""

TOLD = dict.fromkeys(("reason", "unmixed", "unaffine"), str)
"""Figures of a fit that are text; the others are numbers."""

REFIT = "refit:"
"""Before the names of weights, so that they are never those of sites."""

SKETCH_TOLERANCE = 0.02
"""Relative; bfloat16 keeps 8 bits, so its means and roots differ by less than 1 %."""

ONES, ZEROS = (1.0, 1.0), (0.0, 0.0)
"""Sketches of the gamma and the beta that change nothing."""


@dataclass(frozen=True)
class SiteSketch:
    """What a site is known by across torch, ONNX and dtypes: its form and its affine part.

    gamma, beta: mean and root mean square, None where the site has none. digest: of the learned
    gamma, as `digest` makes it; torch.compile knows a site by it. Files of before it have None.
    """

    kind: str
    channels: int | None
    axes: tuple[int, ...]
    eps: float
    gamma: tuple[float, float] | None
    beta: tuple[float, float] | None
    digest: str | None = None

    def agrees(self, other: SiteSketch) -> bool:
        """Whether both describe the same site, up to rounding; digests take no part.

        No gamma is a gamma of ones, no beta one of zeros: torch.onnx writes them out.
        """
        return (
            self.same_form(other)
            and near(self.gamma or ONES, other.gamma or ONES)
            and near(self.beta or ZEROS, other.beta or ZEROS)
        )

    def described(self) -> str:
        """Its form in words."""
        return f"{self.kind} of {self.channels} channels, axes {self.axes}, eps {self.eps:g}"

    def same_form(self, other: SiteSketch) -> bool:
        """Whether both describe the same norm, whatever its affine part holds."""
        if (self.kind, self.channels, self.axes) != (other.kind, other.channels, other.axes):
            return False
        return abs(self.eps - other.eps) <= SKETCH_TOLERANCE * max(self.eps, other.eps)


@dataclass(frozen=True, eq=False)
class Calibration:
    """Fits by site name, and the sketch of the model that they belong to.

    converted: the sites that were converted while the others were fitted. refits: of projections
    behind those, by the name of their weight; they are of no use where other sites are converted.
    """

    fits: Mapping[str, SiteFit]
    fingerprint: tuple[SiteSketch, ...]
    converted: frozenset[str] = field(default_factory=frozenset)
    refits: Mapping[str, Refit] = field(default_factory=dict)

    def save(self, path: str | Path) -> None:
        """Write a safetensors file: arrays "site/alpha", and JSON in its metadata.

        A full fit takes 4 C (C + 1) bytes for the C channels of its site, a refit as many as its
        weight and bias in float32, sums what `SiteSums` tells.
        """
        held: dict[str, Callable[[], Arrays]] = {
            name: partial(_arrays, fit) for name, fit in self.fits.items()
        }
        held |= {f"{REFIT}{name}": moved.mix.named for name, moved in self.refits.items()}
        about = {
            "version": VERSION,
            "converted": sorted(self.converted),
            "fingerprint": [vars(site) for site in self.fingerprint],
            "fits": {name: _figures(fit) for name, fit in self.fits.items()},
            "refits": {n: [r.before, r.after, r.place] for n, r in self.refits.items()},
        }
        with replaced(Path(path)) as temporary:
            write_arrays(temporary, held, {"dyt_compile": json.dumps(about)})

    @classmethod
    def load(cls, path: str | Path) -> Calibration:
        """Read what `save` wrote. Raises CalibrationError for everything else."""
        from safetensors import safe_open

        try:
            with safe_open(str(path), framework="numpy") as file:
                about = json.loads((file.metadata() or {})["dyt_compile"])
                arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            if about["version"] not in READABLE:
                raise CalibrationError(
                    f"{str(path)!r} has calibration version {about['version']}; this is {VERSION}"
                )
            return cls(
                fits=MappingProxyType(
                    {name: _fit(name, fit, arrays) for name, fit in about["fits"].items()}
                ),
                fingerprint=tuple(_sketch(site) for site in about["fingerprint"]),
                converted=frozenset(map(_name, about["converted"])),
                refits=MappingProxyType(
                    {
                        name: Refit(_mix(f"{REFIT}{name}", arrays), *figures)
                        for name, figures in about.get("refits", {}).items()
                    }
                ),
            )
        except CalibrationError:
            raise
        except Exception as error:
            raise CalibrationError(f"{str(path)!r} is no calibration file: {error}") from error

    def belongs_to(self, fingerprint: tuple[SiteSketch, ...]) -> bool:
        """Whether the fits were made for a model with these sites."""
        return self.difference(fingerprint) is None

    def difference(self, fingerprint: tuple[SiteSketch, ...]) -> str | None:
        """How the sites that the fits were made for differ from these, None where they agree."""
        if len(fingerprint) != len(self.fingerprint):
            return f"it has {len(self.fingerprint)} sites, not {len(fingerprint)}"
        for place, (own, other) in enumerate(zip(self.fingerprint, fingerprint, strict=True), 1):
            if not own.same_form(other):
                return f"site {place} is {own.described()}, not {other.described()}"
            if not own.agrees(other):
                return f"gamma or beta of site {place} have other values"
        return None

    def merge(self, other: Calibration) -> Calibration:
        """The calibration of the data of both: their sums added, all sites fitted anew.

        Both are of one model, keep their sums, and rest on the same prefix of converted sites:
        what was fitted on the original's activations does, and gives what one run over all data
        would (a full fit up to what `refit_full` says). A merged fit of a converted site is no
        longer the one that later sites rest on: a sequential calibration cannot be merged behind
        its first converted site. A site takes the fit of the smaller error on held-out rows.
        Raises CalibrationError.
        """
        difference = self.difference(other.fingerprint)
        if difference is not None:
            raise CalibrationError(f"the calibrations are of different models: {difference}")
        if self.refits or other.refits:
            raise CalibrationError(
                "refits of linear layers rest on the fits of one run: they cannot be merged; "
                "calibrate on the original's activations, or with fit='full'"
            )
        pairs = zip(_sums(self), _sums(other), strict=True)
        fits = _merged(self, dict(zip(self.fits, pairs, strict=True)))
        able = (name for name, fit in fits.items() if fit.parameters is not None)
        converted = (self.converted | other.converted).intersection(able)
        return replace(self, fits=MappingProxyType(fits), converted=converted)

    def without_sums(self) -> Calibration:
        """The same fits, which can be merged no more."""
        fits = {name: replace(fit, sums=None) for name, fit in self.fits.items()}
        return replace(self, fits=MappingProxyType(fits))

    def sketches(self) -> dict[str, SiteSketch]:
        """The sketch of each calibrated site by its name, in execution order.

        Raises CalibrationError where fits and fingerprint are not of the same sites.
        """
        lossy = [site for site in self.fingerprint if not NormKind(site.kind).lossless]
        if len(lossy) != len(self.fits):
            raise CalibrationError(
                f"the calibration has fits of {len(self.fits)} sites, and sketches of {len(lossy)}"
            )
        return dict(zip(self.fits, lossy, strict=True))


def sketch(array: npt.NDArray[Any]) -> tuple[float, float]:
    """Mean and root mean square."""
    wide = array.astype(np.float64)
    return float(wide.mean()), float(np.sqrt((wide * wide).mean()))


def digest(array: npt.NDArray[Any]) -> str | None:
    """What a gamma is known by: blake2b of it in bfloat16, so that copies in float32 agree.

    None where all values are the same: that (ones, above all) tells no layer from another.
    """
    rounded = array.astype(np.float32).astype(ml_dtypes.bfloat16).ravel().view(np.uint16)
    if rounded.size == 0 or (rounded == rounded[0]).all():
        return None
    return hashlib.blake2b(rounded.tobytes(), digest_size=16).hexdigest()


def _figures(fit: SiteFit) -> dict[str, Any]:
    apart = ("parameters", "scatter", "mix", "sums")
    figures = {name: value for name, value in vars(fit).items() if name not in apart}
    if fit.parameters is not None:
        figures["squash"] = fit.parameters.squash
    if fit.sums is not None:
        held = vars(fit.sums).items()
        figures["sums"] = {n: value for n, value in held if n not in ("sample", "full")}
    return figures


def _arrays(fit: SiteFit) -> dict[str, npt.NDArray[Any]]:
    held = {} if fit.sums is None else fit.sums.arrays()
    return fit.arrays() | {f"sums/{name}": array for name, array in held.items()}


def _fit(name: str, figures: dict[str, Any], arrays: Mapping[str, Any]) -> SiteFit:
    squash = figures.pop("squash", None)
    for figure, value in figures.items():
        if figure != "sums" and not isinstance(value, (TOLD.get(figure, Real), NoneType)):
            raise CalibrationError(f"site {name!r} has the {figure} {value!r}")
    if "sums" in figures:
        figures["sums"] = _read_sums(figures["sums"], f"{name}/sums/", arrays)
    if squash is None:
        return SiteFit(None, **figures)
    if squash not in SQUASHES:
        raise CalibrationError(f"site {name!r} has the squash {squash!r}")
    values = {p: arrays[f"{name}/{p}"] for p in PARAMETERS if f"{name}/{p}" in arrays}
    if squash != "identity" and "alpha" not in values:
        raise CalibrationError(f"site {name!r} has no alpha")
    mix = _mix(name, arrays) if f"{name}/matrix" in arrays else None
    fit = SiteFit(DytParameters(squash=squash, **values), mix=mix, **figures)
    _check_finite(name, fit.arrays())
    return fit


def _name(told: Any) -> str:
    if not isinstance(told, str):
        raise CalibrationError(f"the calibration converts {told!r}, which is no name")
    return told


def _check_finite(name: str, arrays: Mapping[str, Any]) -> None:
    """Raise CalibrationError for values that no fit has."""
    for part, array in arrays.items():
        if array.dtype.kind != "f" or not np.isfinite(array).all():
            raise CalibrationError(f"{name!r} has a {part} that is no finite number")


def _read_sums(about: dict[str, Any], place: str, arrays: Mapping[str, Any]) -> SiteSums:
    parts: dict[str, dict[str, Any]] = {}
    for path in (path.removeprefix(place) for path in arrays if path.startswith(place)):
        part, _, name = path.partition("/")
        parts.setdefault(part, {})[name] = arrays[place + path]
    about["shape"] = tuple(about["shape"])
    sample = RowSample.of_arrays(**parts.pop("sample"))
    full = tuple(GramSums.of_arrays(**parts[part]) for part in sorted(parts))
    return SiteSums(sample=sample, full=full, **about)


def _sums(calibration: Calibration) -> list[SiteSums]:
    """The sums of all sites; raises CalibrationError where they were not kept."""
    held = [fit.sums for fit in calibration.fits.values()]
    for name, sums in zip(calibration.fits, held, strict=True):
        if sums is None:
            raise CalibrationError(
                f"site {name!r} has no sums to merge: calibrate both with keep_sums=True"
            )
    return [sums for sums in held if sums is not None]


def _merged(
    calibration: Calibration, pairs: Mapping[str, tuple[SiteSums, SiteSums]]
) -> dict[str, SiteFit]:
    """The fits from the sums of two runs, site by site, as long as they rest on the fits so far."""
    samples = {name: a.sample.united(b.sample) for name, (a, b) in pairs.items()}
    fits: dict[str, SiteFit] = {}
    prefix = ""
    for place, (name, (a, b)) in enumerate(pairs.items(), 1):
        if a.prefix != b.prefix or a.prefix not in ("", prefix):
            raise CalibrationError(
                f"site {name!r} rests on fits of earlier sites that differ from the merged ones; "
                "merge calibrations on the original's activations, or give one run all data"
            )
        sums = replace(a, sample=samples[name], full=())
        if a.tied_to is None:
            later = [samples[n] for n, (follower, _) in pairs.items() if follower.tied_to == name]
            fit = refit(sums, [a.full, b.full], later)
        else:
            fit = follow(fits[a.tied_to], sums)
        told = fit.mix is not None or fit.unmixed is not None
        fits[name] = fit if told else replace(fit, unmixed=calibration.fits[name].unmixed)
        if name in calibration.converted and fit.parameters is not None:
            prefix = extended(prefix, place, fit)
    return fits


def _mix(name: str, arrays: Mapping[str, Any]) -> Mix:
    mix = Mix(arrays[f"{name}/matrix"], arrays[f"{name}/offset"])
    _check_finite(name, vars(mix))
    return mix


def _sketch(data: dict[str, Any]) -> SiteSketch:
    """Raises TypeError, ValueError or KeyError for data of other types."""
    NormKind(data["kind"])
    numbers = data["eps"], *data["axes"], *(data["gamma"] or ()), *(data["beta"] or ())
    if not all(isinstance(number, Real) for number in (*numbers, data["channels"] or 0)):
        raise TypeError(f"a site is described by {data!r}")
    if any(len(data[part] or (0, 0)) != 2 for part in ("gamma", "beta")):
        raise ValueError(f"a site is described by {data!r}")
    data["axes"] = tuple(data["axes"])
    for name in ("gamma", "beta"):
        data[name] = None if data[name] is None else tuple(data[name])
    return SiteSketch(**data)


def near(a: tuple[float, float] | None, b: tuple[float, float] | None) -> bool:
    """Whether two sketches of a parameter agree, up to rounding; absent ones only agree."""
    if a is None or b is None:
        return a is b
    scale = max(abs(a[1]), abs(b[1]))  # the root mean square bounds the mean
    return all(abs(x - y) <= SKETCH_TOLERANCE * scale for x, y in zip(a, b, strict=True))
