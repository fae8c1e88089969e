"""Which of a calibration's sites the norms of a frame are.

A norm is known by the values of its learned gamma; with the model at hand also by where in it the
frame's parameters are, which tells apart norms of one gamma, and norms without any.
"""

from __future__ import annotations

import logging
import re
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.utils.weak import WeakIdKeyDictionary

from ..calibration import Calibration, SiteSketch, digest, near, sketch
from ..dyt import DytParameters, Form
from ..errors import CalibrationError
from ..graphs.dynamo import Anchor, Frame
from ..graphs.fx_regions import CHECKPOINTS
from ..nn import parameter
from ..passes.match import match
from ..sites import Match, NormKind, NormSite

__all__ = ["Choice", "Known", "Values", "decided", "names_of_the_whole", "unless", "version_of"]

logger = logging.getLogger("dyt_compile")


@dataclass(frozen=True)
class Choice:
    """What becomes of a lossy site: the calibrated site whose values it takes, or why it stays.

    planned: the calibration itself keeps the norm.
    """

    name: str | None
    form: Form | None = None
    reason: str = ""
    planned: bool = False


@dataclass(frozen=True)
class _Gamma:
    """What a gamma is known by, as long as its version stays."""

    digest: str | None
    sketch: tuple[float, float]
    version: int


class Known:
    """A calibration, and which of its sites a gamma belongs to."""

    def __init__(
        self, calibration: Calibration | None, model: torch.nn.Module | None = None
    ) -> None:
        _check_diagonal(calibration)
        self.calibration = calibration
        self._sketches = {} if calibration is None else calibration.sketches()
        self._gammas = WeakIdKeyDictionary()
        self._paths = WeakIdKeyDictionary()
        self._model = None if model is None else weakref.ref(model)
        self.values = Values(calibration)
        self._find_paths()

    @property
    def has_model(self) -> bool:
        """Whether weights tell where in the model they are."""
        return self._model is not None

    def _find_paths(self) -> None:
        model = None if self._model is None else self._model()
        self._paths.clear()
        for path, held in () if model is None else model.named_parameters(remove_duplicate=False):
            self._paths.setdefault(held, []).append(path)

    def prefixes(self, anchors: Sequence[Anchor], inputs: Sequence[Any]) -> dict[str, str]:
        """Where in the model each root of a frame is, as far as its parameters leave one place."""
        if any(inputs[anchor.place] not in self._paths for anchor in anchors):
            self._find_paths()  # parameters were replaced
        places: dict[str, set[str]] = {}
        for anchor in anchors:
            found = {
                path.removesuffix(anchor.path)
                for path in self._paths.get(inputs[anchor.place], ())
                if f".{path}".endswith(f".{anchor.path}")
            }
            places[anchor.root] = places.get(anchor.root, found) & found
        return {root: found.pop() for root, found in places.items() if len(found) == 1}

    def tell_refused(self, frame: Frame, found: Match) -> None:
        """Log the norms of a frame that no calibration can convert."""
        level = logging.DEBUG if self.calibration is None else logging.WARNING
        for refusal in found.refusals:
            told = level if refusal.kind is NormKind.OTHER else logging.DEBUG
            logger.log(told, "%s keeps its norm: %s", refusal.name, refusal.reason)
        for operator, nested in frame.nested:
            where = "a checkpoint, which training needs" if operator in CHECKPOINTS else operator
            inside = match(nested.graph)
            names = [site.name for site in inside.sites if not site.kind.lossless]
            for name in (*names, *(refusal.name for refusal in inside.refusals)):
                logger.log(level, "%s keeps its norm: it stands inside %s", name, where)

    def choose(
        self,
        sites: Sequence[NormSite],
        gammas: Sequence[torch.Tensor | None],
        paths: Sequence[str | None],
    ) -> list[Choice]:
        """What becomes of the lossy sites of a frame.

        gammas: what is learned of each; paths: of their modules in the model, where known.
        """
        if self.calibration is None:
            return [Choice(None, reason="no calibration", planned=True) for _ in sites]
        names = self._whole(sites, gammas)
        if names is not None:
            return [decided(self.calibration, name) for name in names]
        return [
            self._by_path(site, gamma, path) or self._choice(site, gamma)
            for site, gamma, path in zip(sites, gammas, paths, strict=True)
        ]

    def _whole(
        self, sites: Sequence[NormSite], gammas: Sequence[torch.Tensor | None]
    ) -> tuple[str, ...] | None:
        """The names of the sites if the frame is the whole model, all its gammas agreeing."""
        names = names_of_the_whole(sites, self._sketches)
        if names is None:
            return None
        for site, name, gamma in zip(sites, names, gammas, strict=True):
            if gamma is None:
                if site.gamma is not None or self._sketches[name].gamma is not None:
                    return None
            elif not _agree(self._sketches[name], self._gamma(gamma), site):
                return None
        return names

    def _by_path(
        self, site: NormSite, gamma: torch.Tensor | None, path: str | None
    ) -> Choice | None:
        """The choice for the module at a path of the model, None where it tells nothing."""
        calibration = self.calibration
        names = [] if path is None else self._names_at(path, site)
        if (
            calibration is None
            or not names
            or any(not _same(calibration, names[0], n) for n in names)
        ):
            return None
        if gamma is not None and self._sketches[names[0]].digest != self._gamma(gamma).digest:
            return Choice(None, reason="its gamma is not the one that was calibrated")
        return decided(calibration, names[0])

    def _names_at(self, path: str, site: NormSite) -> list[str]:
        """The calibrated calls of the module at a path."""
        return [
            name
            for name, calibrated in self._sketches.items()
            if name.partition("#")[0] == path and calibrated.same_form(_sketch(site))
        ]

    def _choice(self, site: NormSite, gamma: torch.Tensor | None) -> Choice:
        calibration = self.calibration
        if calibration is None or site.gamma is None:
            reason = (
                "it has no gamma to be known by, and the frame is not the calibrated model; "
                "pass the model"
            )
            return Choice(None, reason=reason)
        if gamma is None:
            return Choice(None, reason="its gamma is computed from several inputs of the frame")
        known = self._gamma(gamma)
        names = [
            name
            for name, calibrated in self._sketches.items()
            if calibrated.gamma is not None
            and calibrated.digest == known.digest
            and calibrated.same_form(_sketch(site))
        ]
        paths = self._paths.get(gamma)
        if paths is not None:
            names = [n for n in names if any(_holds(n, path) for path in paths)]
        elif known.digest is None:
            reason = "its gamma has one value throughout, as other layers may; pass the model"
            return Choice(None, reason=reason)
        if not names:
            return Choice(None, reason="its gamma is none of the calibration's")
        if any(not _same(calibration, names[0], name) for name in names):
            reason = f"its gamma is that of {', '.join(names)}, which have different values"
            return Choice(None, reason=reason)
        return decided(calibration, names[0])

    def _gamma(self, tensor: torch.Tensor) -> _Gamma:
        """What a gamma is known by, from its values."""
        found = self._gammas.get(tensor)
        version = version_of(tensor)
        if found is None or found.version != version:
            with unset_fake_temporarily():
                array = tensor.detach().to("cpu", torch.float32).numpy()
            found = self._gammas[tensor] = _Gamma(digest(array), sketch(array), version)
        known: _Gamma = found
        return known


def _check_diagonal(calibration: Calibration | None) -> None:
    """Raise CalibrationError for fits that live in weights: a frame's weights are its model's."""
    if calibration is None:
        return
    for name in calibration.refits:
        raise CalibrationError(
            f"{name!r} is refitted, which changes a weight; torch.compile takes diagonal fits "
            "alone: calibrate with fit='diagonal'"
        )
    for name, fit in calibration.fits.items():
        if fit.mix is not None:
            raise CalibrationError(
                f"site {name!r} has a full fit, which goes into the weights of its readers; "
                "torch.compile takes diagonal ones alone: calibrate with fit='diagonal'"
            )
        if fit.affine:
            raise CalibrationError(
                f"site {name!r} has an affine fit, which goes into the weights of its readers; "
                "torch.compile takes DyT alone: convert without affine"
            )


class Values:
    """The fitted values as tensors, made once for a dtype and a device."""

    def __init__(self, calibration: Calibration | None) -> None:
        self._fits = {} if calibration is None else calibration.fits
        self._made: dict[tuple[str, torch.dtype, torch.device], dict[str, torch.Tensor]] = {}

    def of(self, name: str, dtype: torch.dtype, device: torch.device) -> dict[str, torch.Tensor]:
        """The operands of a calibrated site, by the parameters of its form."""
        key = (name, dtype, device)
        if key not in self._made:
            parameters = self._fits[name].parameters
            named = {} if parameters is None else parameters.named()
            # Inference tensors could not be saved for a backward pass.
            with unset_fake_temporarily(), torch.inference_mode(False):
                self._made[key] = {
                    role: parameter(value, role, dtype, device).detach()
                    for role, value in named.items()
                }
        return self._made[key]


def decided(calibration: Calibration, name: str) -> Choice:
    fit = calibration.fits[name]
    if fit.parameters is None:
        return Choice(None, reason=fit.reason or "it has no fit", planned=True)
    if name not in calibration.converted:
        return Choice(None, reason="the calibration keeps it", planned=True)
    return Choice(name, fit.parameters.form())


def unless(obstacle: str | None, choice: Choice) -> Choice:
    return choice if obstacle is None or choice.name is None else Choice(None, reason=obstacle)


def _same(calibration: Calibration, a: str, b: str) -> bool:
    """Whether two sites are converted to the same function, or both kept."""
    first, second = decided(calibration, a), decided(calibration, b)
    if first.name is None or second.name is None:
        return first.name is second.name
    x, y = (_parameters(calibration, name) for name in (a, b))
    return first.form == second.form and all(
        np.array_equal(value, y.named()[role]) for role, value in x.named().items()
    )


def _parameters(calibration: Calibration, name: str) -> DytParameters:
    parameters = calibration.fits[name].parameters
    if parameters is None:
        raise CalibrationError(f"site {name!r} has no fit")
    return parameters


def names_of_the_whole(
    sites: Sequence[NormSite], sketches: Mapping[str, SiteSketch]
) -> tuple[str, ...] | None:
    """The calibrated names of all lossy sites of a frame, None where the frame is another model."""
    same = len(sites) == len(sketches) and all(
        _unplaced(site.name) == _unplaced(name) and calibrated.same_form(_sketch(site))
        for site, (name, calibrated) in zip(sites, sketches.items(), strict=True)
    )
    return tuple(sketches) if same and sites else None


def _unplaced(name: str) -> str:
    """A name without the number that sites outside all modules get from their place."""
    return re.sub(r"^norm_\d+$", "norm_", name)


def _sketch(site: NormSite) -> SiteSketch:
    return SiteSketch(site.kind.value, site.channels, site.axes, site.eps, None, None)


def _agree(calibrated: SiteSketch, gamma: _Gamma, site: NormSite) -> bool:
    if calibrated.digest is not None:
        return calibrated.digest == gamma.digest
    if site.gamma is not None and site.gamma.producer is not None:
        return calibrated.gamma is not None  # 1 + w: the sketch is not that of w
    return near(calibrated.gamma, gamma.sketch)


def _holds(name: str, path: str) -> bool:
    """Whether a site's module is, or holds, the module of a parameter."""
    return f"{path.rpartition('.')[0]}.".startswith(f"{name.partition('#')[0]}.")


def version_of(tensor: torch.Tensor) -> int:
    """Counts the writes to a tensor; those to its `.data` are not seen."""
    version: int = 0 if tensor.is_inference() else tensor._version
    return version
