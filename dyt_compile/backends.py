"""DyT within `torch.compile`: the backend "dyt", and a pass for Inductor.

One compiled artifact may serve many blocks (regional compilation, graph breaks), so nothing of a
calibration is built into it. The values of a site reach the artifact as further inputs, looked up
at each call by the identity of the gamma that Dynamo lifted; blocks that keep a norm which others
convert run a variant of their own.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.utils.weak import WeakIdKeyDictionary

from .calibration import Calibration, SiteSketch, digest, near, sketch
from .dyt import FORMS, DytParameters, Form
from .errors import CalibrationError, CaptureError, OptionError, RewriteError, first_line
from .graphs.dynamo import Anchor, Frame, Replacement, opened
from .graphs.fx_regions import CHECKPOINTS, lay_open
from .nn import parameter
from .passes.match import match
from .sites import Match, NormKind, NormSite
from .terms import Op, Value

__all__ = ["InductorPass", "backend", "dyt"]

Compiled = Callable[..., Any]
Compiler = Callable[..., Compiled]

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
    itself, that compiles the result. model: the model that the calibration was made of; it tells
    apart layers whose gamma is the same, as in a model that was never trained.

    A site is known by its learned gamma. One that cannot be told from another keeps its norm, and
    a warning names it and the reason. The values are constants: no gradient reaches them.
    Raises OptionError or CalibrationError.
    """
    return _Backend(_Known(_loaded(calibration), model), _inner(inner))


def dyt(
    module: torch.fx.GraphModule,
    inputs: Sequence[Any],
    *,
    options: Mapping[str, Any] | None = None,
    mode: str | None = None,
) -> Compiled:
    """The backend that `torch.compile(model, backend="dyt", options={...})` finds by its name.

    options: "calibration" and "inner", as for `backend`.
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
    one place for it: later the backward pass of the norm is there already.
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
        names = _names_of_the_whole(lossy, self._calibration.sketches())
        if names is None:
            told = ", ".join(site.name for site in lossy[:3]) or "none"
            raise RewriteError(
                f"the frame is not the model that was calibrated: it has {len(lossy)} norms "
                f"({told}), the calibration {len(self._calibration.fits)}; for regional "
                "compilation and graph breaks use torch.compile(backend='dyt')"
            )
        choices = [_decided(self._calibration, name) for name in names]
        choices = [_unless(frame.obstacle(s), c) for s, c in zip(lossy, choices, strict=True)]
        values = _Values(self._calibration)

        def hold(name: str, tensor: torch.Tensor) -> torch.fx.Node:
            # AOTAutograd has listed the module's buffers already: this one is a fresh constant.
            module.register_buffer(name, tensor)
            with graph.inserting_before():
                held = graph.get_attr(name)
            with graph.inserting_after(held):
                return graph.call_function(torch.ops.aten.lift_fresh_copy.default, (held,))

        frame.replace_in(graph, _replacements(frame, sites, choices, values), hold)
        _log(sites, choices)

    def uuid(self) -> bytes:
        """A hash of this package's sources and of the calibration, for Inductor's cache."""
        sources = sorted(str(path) for path in Path(__file__).parent.rglob("*.py"))
        return get_hash_for_files(tuple(sources), _hash(self._calibration))


@dataclass(frozen=True)
class _Choice:
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


@dataclass(frozen=True, eq=False)
class _Call:
    """How to run the frame for some gammas: the variant, and the inputs that it takes further.

    versions: of the gammas, which change when they are written to; watches: drop this from the
    artifact's table when one of the weights dies.
    """

    variant: Compiled
    values: tuple[torch.Tensor, ...]
    versions: tuple[int, ...]
    choices: Sequence[_Choice]
    watches: tuple[weakref.ref[torch.Tensor], ...]


class _Backend:
    """A backend for Dynamo; `__name__` is what torch.compile calls it in its errors."""

    __name__ = "dyt"

    def __init__(self, known: _Known, inner: Compiler) -> None:
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
        return _Artifact(frame, found.sites, self._known, inner).compiled(module, inputs)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Backend:
        return self  # it belongs to the calibration: a copied model has the same one


class _Artifact:
    """What Dynamo runs for a frame: one graph for each set of sites that turn into DyT."""

    def __init__(
        self, frame: Frame, sites: Sequence[NormSite], known: _Known, inner: Compiler
    ) -> None:
        self._frame = frame
        self._sites = sites
        self._known = known
        self._inner = inner
        self._lossy = [site for site in sites if not site.kind.lossless]
        self._obstacles = [frame.obstacle(site) for site in self._lossy]
        learned = [None if s.gamma is None else s.gamma.learned() for s in self._lossy]
        self._places = [None if v is None else frame.input_of(v) for v in learned]
        self._gammas = sorted({place for place in self._places if place is not None})
        self._modules = [frame.module_of(site) for site in self._lossy]
        self._anchors = frame.anchors if known.has_model and self._lossy else []
        self._looked_at = sorted({*self._gammas, *(anchor.place for anchor in self._anchors)})
        self._variants: dict[tuple[Form | None, ...], Compiled] = {}
        self._calls: dict[tuple[int, ...], _Call] = {}

    def compiled(self, module: torch.fx.GraphModule, inputs: Sequence[Any]) -> Compiled:
        """Compile what the example inputs need; other variants follow when they are called."""
        if any(isinstance(inputs[place], FakeTensor) for place in self._looked_at):
            return self  # nothing is known of the weights before the first call

        def compile_at_once(replacements: Sequence[Replacement]) -> Compiled:
            changed = self._frame.replaced(replacements) if replacements else module
            return self._inner(changed, [*inputs, *_tensors(replacements)])

        call = self._call(inputs, compile_at_once)
        return self if self._lossy else partial(_run, call)

    def __call__(self, *inputs: Any) -> Any:
        call = self._calls.get(tuple(id(inputs[place]) for place in self._looked_at))
        if call is None or call.versions != self._versions(inputs):
            call = self._call(inputs, self._compile_later)
        return _run(call, *inputs)

    def _versions(self, inputs: Sequence[Any]) -> tuple[int, ...]:
        return tuple(_version(inputs[place]) for place in self._gammas)

    def _compile_later(self, replacements: Sequence[Replacement]) -> Compiled:
        """Dynamo is done with its frame: the variant becomes one of its own, with guards."""
        dynamic = True if self._frame.is_dynamic else None
        changed = self._frame.replaced(replacements)
        compiled: Compiled = torch.compile(changed, backend=self._inner, dynamic=dynamic)
        return compiled

    def _call(
        self, inputs: Sequence[Any], compiler: Callable[[Sequence[Replacement]], Compiled]
    ) -> _Call:
        """How to run these inputs, remembered while their weights live and no gamma changes."""
        calls, weights = self._calls, [inputs[place] for place in self._looked_at]
        key = tuple(map(id, weights))
        choices = self._choices(inputs)
        if key not in calls or calls[key].choices != choices:
            _log(self._sites, choices)
        replacements = _replacements(self._frame, self._sites, choices, self._known.values)
        variant = tuple(choice.form for choice in choices)
        if variant not in self._variants:
            self._variants[variant] = compiler(replacements)
        watches = tuple(weakref.ref(weight, lambda _: calls.pop(key, None)) for weight in weights)
        calls[key] = _Call(
            self._variants[variant],
            _tensors(replacements),
            self._versions(inputs),
            choices,
            watches,
        )
        return calls[key]

    def _choices(self, inputs: Sequence[Any]) -> list[_Choice]:
        gammas = [None if place is None else inputs[place] for place in self._places]
        prefixes = self._known.prefixes(self._anchors, inputs)
        paths = [
            None if module is None or module[0] not in prefixes else prefixes[module[0]] + module[1]
            for module in self._modules
        ]
        found = self._known.choose(self._lossy, gammas, paths)
        return [_unless(o, c) for o, c in zip(self._obstacles, found, strict=True)]


def _run(call: _Call, *inputs: Any) -> Any:
    return call.variant(*inputs, *call.values)


class _Known:
    """A calibration, and which of its sites a gamma belongs to."""

    def __init__(
        self, calibration: Calibration | None, model: torch.nn.Module | None = None
    ) -> None:
        self._calibration = calibration
        self._sketches = {} if calibration is None else calibration.sketches()
        self._gammas = WeakIdKeyDictionary()
        self._paths = WeakIdKeyDictionary()
        self._model = None if model is None else weakref.ref(model)
        self.values = _Values(calibration)
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
        level = logging.DEBUG if self._calibration is None else logging.WARNING
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
    ) -> list[_Choice]:
        """What becomes of the lossy sites of a frame.

        gammas: what is learned of each; paths: of their modules in the model, where known.
        """
        if self._calibration is None:
            return [_Choice(None, reason="no calibration", planned=True) for _ in sites]
        names = self._whole(sites, gammas)
        if names is not None:
            return [_decided(self._calibration, name) for name in names]
        return [
            self._by_path(site, gamma, path) or self._choice(site, gamma)
            for site, gamma, path in zip(sites, gammas, paths, strict=True)
        ]

    def _whole(
        self, sites: Sequence[NormSite], gammas: Sequence[torch.Tensor | None]
    ) -> tuple[str, ...] | None:
        """The names of the sites if the frame is the whole model, all its gammas agreeing."""
        names = _names_of_the_whole(sites, self._sketches)
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
    ) -> _Choice | None:
        """The choice for the module at a path of the model, None where it tells nothing."""
        calibration = self._calibration
        names = [] if path is None else self._names_at(path, site)
        if (
            calibration is None
            or not names
            or any(not _same(calibration, names[0], n) for n in names)
        ):
            return None
        if gamma is not None and self._sketches[names[0]].digest != self._gamma(gamma).digest:
            return _Choice(None, reason="its gamma is not the one that was calibrated")
        return _decided(calibration, names[0])

    def _names_at(self, path: str, site: NormSite) -> list[str]:
        """The calibrated calls of the module at a path."""
        return [
            name
            for name, calibrated in self._sketches.items()
            if name.partition("#")[0] == path and calibrated.same_form(_sketch(site))
        ]

    def _choice(self, site: NormSite, gamma: torch.Tensor | None) -> _Choice:
        calibration = self._calibration
        if calibration is None or site.gamma is None:
            reason = (
                "it has no gamma to be known by, and the frame is not the calibrated model; "
                "pass the model"
            )
            return _Choice(None, reason=reason)
        if gamma is None:
            return _Choice(None, reason="its gamma is computed from several inputs of the frame")
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
            return _Choice(None, reason=reason)
        if not names:
            return _Choice(None, reason="its gamma is none of the calibration's")
        if any(not _same(calibration, names[0], name) for name in names):
            reason = f"its gamma is that of {', '.join(names)}, which have different values"
            return _Choice(None, reason=reason)
        return _decided(calibration, names[0])

    def _gamma(self, tensor: torch.Tensor) -> _Gamma:
        """What a gamma is known by, from its values."""
        found = self._gammas.get(tensor)
        version = _version(tensor)
        if found is None or found.version != version:
            with unset_fake_temporarily():
                array = tensor.detach().to("cpu", torch.float32).numpy()
            found = self._gammas[tensor] = _Gamma(digest(array), sketch(array), version)
        known: _Gamma = found
        return known


class _Values:
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


def _replacements(
    frame: Frame, sites: Sequence[NormSite], choices: Sequence[_Choice], values: _Values
) -> list[Replacement]:
    """Those of the lossy sites that are chosen, and DyT that is written out, as one operator."""
    pending = iter(choices)
    made = []
    for site in sites:
        if site.kind.lossless:
            native = _native(frame, site)
            if native is not None:
                made.append(native)
            continue
        choice = next(pending)
        if choice.name is not None and choice.form is not None:
            dtype = getattr(torch, site.dtype or "float32")
            operands = values.of(choice.name, dtype, frame.device_of(site.input))
            made.append(Replacement(site, choice.form, operands))
    return made


def _native(frame: Frame, site: NormSite) -> Replacement | None:
    """A DyT that is written out as its operator, None where it is one, or no form fits it."""
    producer = site.output.producer
    if producer is None or producer.op is Op.DYT or site.input.dtype != site.output.dtype:
        return None
    squash = "tanh" if site.kind is NormKind.DYT else "erf"
    held: dict[str, Value] = {
        name: value
        for name in ("alpha", "shift", "gamma", "beta")
        if (value := getattr(site, name)) is not None
    }
    for form in FORMS.values():
        if form.squash == squash and form.parameters == tuple(held):
            stands = frame.obstacle(site) is not None or not frame.reaches(held.values())
            return None if stands else Replacement(site, form, held)
    return None


def _tensors(replacements: Sequence[Replacement]) -> tuple[torch.Tensor, ...]:
    return tuple(
        operand
        for replacement in replacements
        for operand in replacement.operands.values()
        if isinstance(operand, torch.Tensor)
    )


def _decided(calibration: Calibration, name: str) -> _Choice:
    fit = calibration.fits[name]
    if fit.parameters is None:
        return _Choice(None, reason=fit.reason or "it has no fit", planned=True)
    if name not in calibration.converted:
        return _Choice(None, reason="the calibration keeps it", planned=True)
    return _Choice(name, fit.parameters.form())


def _unless(obstacle: str | None, choice: _Choice) -> _Choice:
    return choice if obstacle is None or choice.name is None else _Choice(None, reason=obstacle)


def _same(calibration: Calibration, a: str, b: str) -> bool:
    """Whether two sites are converted to the same function, or both kept."""
    first, second = _decided(calibration, a), _decided(calibration, b)
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


def _names_of_the_whole(
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


def _log(sites: Sequence[NormSite], choices: Sequence[_Choice]) -> None:
    """A line on what was found and converted, and one for each norm that stays unplanned."""
    lossy = [site for site in sites if not site.kind.lossless]
    logger.info(
        "%d sites found: %d norms converted to DyT, %d norms kept, %d DyT already there",
        len(sites),
        sum(choice.name is not None for choice in choices),
        sum(choice.name is None for choice in choices),
        len(sites) - len(lossy),
    )
    for site, choice in zip(lossy, choices, strict=True):
        if choice.name is None:
            level = logging.DEBUG if choice.planned else logging.WARNING
            logger.log(level, "%s keeps its norm: %s", site.name, choice.reason)


def _version(tensor: torch.Tensor) -> int:
    """Counts the writes to a tensor; those to its `.data` are not seen."""
    version: int = 0 if tensor.is_inference() else tensor._version
    return version


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


def _known(calibration: Calibration | str | Path | None) -> _Known:
    """The same for all frames of a model: a file is read once, until it changes."""
    if isinstance(calibration, (str, Path)) and Path(calibration).is_file():
        changed = Path(calibration).stat().st_mtime_ns
        return _known_file(str(Path(calibration).resolve()), changed)
    return _known_object(_loaded(calibration))


@lru_cache(maxsize=16)
def _known_file(path: str, changed_ns: int) -> _Known:
    return _Known(Calibration.load(path))


@lru_cache(maxsize=16)
def _known_object(calibration: Calibration | None) -> _Known:
    return _Known(calibration)


def _hash(calibration: Calibration) -> str:
    hasher = hashlib.sha256(json.dumps(sorted(calibration.converted)).encode())
    for name, fit in calibration.fits.items():
        held = {} if fit.parameters is None else fit.parameters.named()
        for role, value in held.items():
            hasher.update(f"{name}/{role}{value.shape}".encode())
            hasher.update(np.ascontiguousarray(value, np.float32).tobytes())
    return hasher.hexdigest()
