"""What Dynamo runs for a frame, and what is put in the place of its sites."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor

from ..dyt import FORMS, Form
from ..graphs.dynamo import Frame, Replacement
from ..sites import NormKind, NormSite
from ..terms import Op, Value
from .lookup import Choice, Known, Values, unless, version_of

__all__ = ["Artifact", "Compiled", "Compiler", "log_choices", "replacements_for"]

Compiled = Callable[..., Any]
Compiler = Callable[..., Compiled]

logger = logging.getLogger("dyt_compile")


@dataclass(frozen=True, eq=False)
class _Call:
    """How to run the frame for some gammas: the variant, and the inputs that it takes further.

    versions: of the gammas, which change when they are written to; watches: drop this from the
    artifact's table when one of the weights dies.
    """

    variant: Compiled
    values: tuple[torch.Tensor, ...]
    versions: tuple[int, ...]
    choices: Sequence[Choice]
    watches: tuple[weakref.ref[torch.Tensor], ...]


class Artifact:
    """What Dynamo runs for a frame: one graph for each set of sites that turn into DyT."""

    def __init__(
        self, frame: Frame, sites: Sequence[NormSite], known: Known, inner: Compiler
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
        return tuple(version_of(inputs[place]) for place in self._gammas)

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
            log_choices(self._sites, choices)
        replacements = replacements_for(self._frame, self._sites, choices, self._known.values)
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

    def _choices(self, inputs: Sequence[Any]) -> list[Choice]:
        gammas = [None if place is None else inputs[place] for place in self._places]
        prefixes = self._known.prefixes(self._anchors, inputs)
        paths = [
            None if module is None or module[0] not in prefixes else prefixes[module[0]] + module[1]
            for module in self._modules
        ]
        found = self._known.choose(self._lossy, gammas, paths)
        return [unless(o, c) for o, c in zip(self._obstacles, found, strict=True)]


def _run(call: _Call, *inputs: Any) -> Any:
    return call.variant(*inputs, *call.values)


def replacements_for(
    frame: Frame, sites: Sequence[NormSite], choices: Sequence[Choice], values: Values
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


def log_choices(sites: Sequence[NormSite], choices: Sequence[Choice]) -> None:
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
