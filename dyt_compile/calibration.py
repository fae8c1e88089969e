"""What calibration leaves behind: the fitted values of every site, and the model they belong to."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from .dyt import PARAMETERS, DytParameters, Mix, Refit
from .errors import CalibrationError
from .files import replaced
from .scatter import Scatter
from .sites import NormKind

__all__ = ["Calibration", "SiteFit", "SiteSketch", "digest", "near", "sketch"]

VERSION = 3
READABLE = (1, 2, VERSION)
"""Version 1 had no mixes, version 2 no refits; who reads those alone must not take a part of a fit
for the whole."""

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

    def same_form(self, other: SiteSketch) -> bool:
        """Whether both describe the same norm, whatever its affine part holds."""
        if (self.kind, self.channels, self.axes) != (other.kind, other.channels, other.axes):
            return False
        return abs(self.eps - other.eps) <= SKETCH_TOLERANCE * max(self.eps, other.eps)


@dataclass(frozen=True, eq=False)
class SiteFit:
    """The fit of one site.

    parameters: None where there is no fit, `reason` says why; fit_error: relative, held-out rows.
    mix: of a full fit, what the readers' weights take up, behind parameters that are a bare DyT;
    None for a diagonal fit, `unmixed` says why.
    sigma_median: median over rows of the root mean square (centred for LayerNorm) that the norm
    divides by; sigma_peak: largest over median; large peaks are tokens that tanh cannot follow.
    scatter: some inputs and outputs, for drawing, with the curve of the diagonal fit; not written
    to files.
    """

    parameters: DytParameters | None
    fit_error: float | None = None
    reason: str | None = None
    sigma_median: float | None = None
    sigma_peak: float | None = None
    scatter: Scatter | None = field(default=None, repr=False)
    mix: Mix | None = field(default=None, repr=False)
    unmixed: str | None = None

    @property
    def method(self) -> str | None:
        """ "full", "diagonal", or None where there is no fit."""
        if self.parameters is None:
            return None
        return "diagonal" if self.mix is None else "full"

    def arrays(self) -> dict[str, npt.NDArray[Any]]:
        """Everything fitted, by name."""
        held = {} if self.parameters is None else self.parameters.named()
        return held if self.mix is None else held | vars(self.mix)


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
        weight and bias in float32.
        """
        from safetensors.numpy import save_file

        arrays = {  # safetensors writes an array's memory as it lies
            f"{name}/{parameter}": np.require(array, requirements="C")
            for name, fit in self.fits.items()
            for parameter, array in fit.arrays().items()
        }
        for name, refit in self.refits.items():
            arrays |= {f"{REFIT}{name}/{part}": array for part, array in vars(refit.mix).items()}
        about = {
            "version": VERSION,
            "converted": sorted(self.converted),
            "fingerprint": [vars(site) for site in self.fingerprint],
            "fits": {name: _figures(fit) for name, fit in self.fits.items()},
            "refits": {name: [refit.before, refit.after] for name, refit in self.refits.items()},
        }
        with replaced(Path(path)) as temporary:
            save_file(arrays, temporary, metadata={"dyt_compile": json.dumps(about)})

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
                converted=frozenset(about["converted"]),
                refits=MappingProxyType(
                    {
                        name: Refit(_mix(f"{REFIT}{name}", arrays), *errors)
                        for name, errors in about.get("refits", {}).items()
                    }
                ),
            )
        except CalibrationError:
            raise
        except Exception as error:
            raise CalibrationError(f"{str(path)!r} is no calibration file: {error}") from error

    def belongs_to(self, fingerprint: tuple[SiteSketch, ...]) -> bool:
        """Whether the fits were made for a model with these sites."""
        return len(fingerprint) == len(self.fingerprint) and all(
            a.agrees(b) for a, b in zip(self.fingerprint, fingerprint, strict=True)
        )

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
    apart = ("parameters", "scatter", "mix")
    figures = {name: value for name, value in vars(fit).items() if name not in apart}
    if fit.parameters is not None:
        figures["squash"] = fit.parameters.squash
    return figures


def _fit(name: str, figures: dict[str, Any], arrays: Mapping[str, Any]) -> SiteFit:
    squash = figures.pop("squash", None)
    if squash is None:
        return SiteFit(None, **figures)
    values = {p: arrays[f"{name}/{p}"] for p in PARAMETERS if f"{name}/{p}" in arrays}
    mix = _mix(name, arrays) if f"{name}/matrix" in arrays else None
    return SiteFit(DytParameters(squash=squash, **values), mix=mix, **figures)


def _mix(name: str, arrays: Mapping[str, Any]) -> Mix:
    return Mix(arrays[f"{name}/matrix"], arrays[f"{name}/offset"])


def _sketch(data: dict[str, Any]) -> SiteSketch:
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
