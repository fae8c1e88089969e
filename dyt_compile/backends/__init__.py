"""DyT within `torch.compile`: the backend "dyt", and a pass for Inductor.

One compiled artifact may serve many blocks (regional compilation, graph breaks), so nothing of a
calibration is built into it. The values of a site reach the artifact as further inputs, looked up
at each call by the identity of the weights that Dynamo lifted; blocks that keep a norm which others
convert run a variant of their own.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files

from ..calibration import Calibration
from ..errors import CalibrationError, CaptureError, OptionError, RewriteError, first_line
from ..graphs.dynamo import Frame, opened
from ..graphs.fx_regions import lay_open
from ..passes.match import match
from .artifact import Artifact, Compiled, Compiler, log_choices, replacements_for
from .lookup import Known, Values, decided, names_of_the_whole, unless

__all__ = ["InductorPass", "backend", "dyt"]

OPTIONS = ("calibration", "inner")
"""What `torch.compile(backend="dyt", options=...)` takes."""

logger = logging.getLogger("dyt_compile")


def backend(
    *,
    calibration: Calibration | str | Path | None = None,
    inner: str | Compiler = "inductor",
    model: torch.nn.Module | None = None,
) -> Compiler:
    """A backend for `torch.compile` that converts the norms which a calibration converts.

    calibration: as `convert` returns it, or the path of a saved one; None converts no norm, and
    only makes DyT that the model already holds one operator. inner: the backend, by its name or
    itself, that compiles the result; it gets torch.compile's mode and options. model: the model
    that the calibration was made of. With it, a norm is known by the place of its block's
    parameters too: one whose gamma others have as well (a model that was never trained), or that
    has none (DiT), where the frame is only a part of the model.

    Else a norm is known by the values of its gamma, looked up again when those are written to (but
    not through `.data`). One that cannot be told from another, or stands in control flow, keeps its
    norm, and a warning names it and the reason. The values are constants: no gradient reaches them.
    Raises OptionError or CalibrationError.
    """
    return _Backend(Known(_loaded(calibration), model), _inner(inner))


def dyt(
    module: torch.fx.GraphModule,
    inputs: Sequence[Any],
    *,
    options: Mapping[str, Any] | None = None,
    mode: str | None = None,
) -> Compiled:
    """The backend that `torch.compile(model, backend="dyt", options={...})` finds by its name.

    options: "calibration" and "inner", as for `backend`. mode: that of torch.compile, which takes
    either options or a mode: with a mode, no norm is converted.
    Raises OptionError or CalibrationError, which torch.compile tells in an error of its own.
    """
    options = options or {}
    for name in options:
        if name not in OPTIONS:
            raise OptionError(f"option {name!r} is not known; allowed: {', '.join(OPTIONS)}")
    known = _known(options.get("calibration"))
    return _Backend(known, _inner(options.get("inner", "inductor")))(module, inputs, mode=mode)


class InductorPass(CustomGraphPass):
    """Converts norms within Inductor: `torch._inductor.config.pre_grad_custom_pass`.

    It sees names but no weights, so the frame must be the whole model that was calibrated: it
    raises RewriteError for any other (regional compilation, graph breaks). Before autograd is the
    one place for it: later the backward pass of the norm is there already. It works the same for
    `torch._inductor.aoti_compile_and_package`.
    """

    def __init__(self, calibration: Calibration | str | Path) -> None:
        found = _loaded(calibration)
        if found is None:
            raise OptionError("calibration is None; allowed: a Calibration, or the path of one")
        self._calibration = replace(found, fits=dict(found.fits))  # proxies cannot be pickled

    def __deepcopy__(self, memo: dict[int, Any]) -> InductorPass:
        return self  # Inductor copies its configuration whenever it is read

    def __call__(self, graph: torch.fx.Graph) -> None:
        """Convert in place. Raises RewriteError, CaptureError."""
        module = graph.owning_module
        if module is None:
            raise RewriteError("the graph belongs to no module that could hold the values of DyT")
        lay_open(module, opened())
        frame = Frame(module)
        sites = match(frame.graph).sites
        lossy = [site for site in sites if not site.kind.lossless]
        names = names_of_the_whole(lossy, self._calibration.sketches())
        if names is None:
            told = ", ".join(site.name for site in lossy[:3]) or "none"
            raise RewriteError(
                f"the frame is not the model that was calibrated: it has {len(lossy)} norms "
                f"({told}), the calibration {len(self._calibration.fits)}; for regional "
                "compilation and graph breaks use torch.compile(backend='dyt')"
            )
        choices = [decided(self._calibration, name) for name in names]
        choices = [unless(frame.obstacle(s), c) for s, c in zip(lossy, choices, strict=True)]
        values = Values(self._calibration)

        def hold(name: str, tensor: torch.Tensor) -> torch.fx.Node:
            # AOTAutograd has listed the module's buffers already: this one is a fresh constant.
            module.register_buffer(name, tensor)
            with graph.inserting_before():
                held = graph.get_attr(name)
            with graph.inserting_after(held):
                return graph.call_function(torch.ops.aten.lift_fresh_copy.default, (held,))

        frame.replace_in(graph, replacements_for(frame, sites, choices, values), hold)
        log_choices(sites, choices)

    def uuid(self) -> bytes:
        """A hash of this package's sources and of the calibration, for Inductor's cache."""
        sources = sorted(str(path) for path in Path(__file__).parent.parent.rglob("*.py"))
        return get_hash_for_files(tuple(sources), _hash(self._calibration))


class _Backend:
    """A backend for Dynamo; `__name__` is what torch.compile calls it in its errors."""

    __name__ = "dyt"

    def __init__(self, known: Known, inner: Compiler) -> None:
        self._known = known
        self._inner = inner

    def __call__(
        self,
        module: torch.fx.GraphModule,
        inputs: Sequence[Any],
        *,
        mode: str | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> Compiled:
        inner = _in_mode(self._inner, mode, options)
        try:
            frame = Frame(module)
        except CaptureError as error:
            logger.warning("a frame is compiled as it is: %s", error)
            return inner(module, list(inputs))
        found = match(frame.graph)
        self._known.tell_refused(frame, found)
        if not found.sites:
            return inner(module, list(inputs))
        return Artifact(frame, found.sites, self._known, inner).compiled(module, inputs)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Backend:
        return self  # it belongs to the calibration: a copied model has the same one


def _in_mode(inner: Compiler, mode: str | None, options: Mapping[str, Any] | None) -> Compiler:
    """The inner backend with the mode and the options that torch.compile was given."""
    if inner is torch._dynamo.lookup_backend("inductor"):
        try:
            patches = {**torch._inductor.list_mode_options(mode or "default"), **(options or {})}
        except RuntimeError as error:
            raise OptionError(f"mode is {mode!r}: {first_line(error)}") from error
        return partial(inner, config_patches=patches) if patches else inner
    given = {"mode": mode, "options": options}
    return partial(inner, **{k: v for k, v in given.items() if v}) if mode or options else inner


def _inner(inner: str | Compiler) -> Compiler:
    if not isinstance(inner, str):
        if not callable(inner):
            raise OptionError(f"inner is {inner!r}; allowed: a backend or the name of one")
        return inner
    known = torch._dynamo.list_backends(exclude_tags=())
    if inner not in known or inner == "dyt":
        allowed = ", ".join(name for name in known if name != "dyt")
        raise OptionError(f"inner is {inner!r}; allowed: a backend, or one of {allowed}")
    found: Compiler = torch._dynamo.lookup_backend(inner)
    return found


def _loaded(calibration: Calibration | str | Path | None) -> Calibration | None:
    if calibration is None or isinstance(calibration, Calibration):
        return calibration
    if not isinstance(calibration, (str, Path)):
        raise OptionError(
            f"calibration is a {type(calibration).__name__}; allowed: a Calibration, its path, None"
        )
    if not Path(calibration).is_file():
        raise CalibrationError(f"calibration file {str(calibration)!r} does not exist")
    return Calibration.load(calibration)


def _known(calibration: Calibration | str | Path | None) -> Known:
    """The same for all frames of a model: a file is read once, until it changes."""
    if isinstance(calibration, (str, Path)) and Path(calibration).is_file():
        changed = Path(calibration).stat().st_mtime_ns
        return _known_file(str(Path(calibration).resolve()), changed)
    return _known_object(_loaded(calibration))


@lru_cache(maxsize=16)
def _known_file(path: str, changed_ns: int) -> Known:
    return Known(Calibration.load(path))


@lru_cache(maxsize=16)
def _known_object(calibration: Calibration | None) -> Known:
    return Known(calibration)


def _hash(calibration: Calibration) -> str:
    hasher = hashlib.sha256(json.dumps(sorted(calibration.converted)).encode())
    for name, fit in calibration.fits.items():
        for role, value in fit.arrays().items():
            hasher.update(f"{name}/{role}{value.shape}".encode())
            hasher.update(np.ascontiguousarray(value, np.float32).tobytes())
    return hasher.hexdigest()
