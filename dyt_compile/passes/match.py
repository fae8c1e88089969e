"""Match: find every normalization of a graph, and prove each before it is accepted.

Recall is algebra: a value that is scaled by something made from the root of a reduction is looked
at, whatever the spelling. The nearest values that all its paths pass through are tried as the
norm's input. Precision is proof: `proof.Prover` runs the piece between the two.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import chain

from ..channels import with_folds
from ..errors import CaptureError, first_line
from ..graphs.base import Graph
from ..proof import Miss, Piece, Proof, Prover
from ..sites import Match, NormKind, NormSite, Refusal
from ..terms import SHAPE_READERS, Op, Term, Value, has_meaning

__all__ = ["match"]

WHOLE_NORMS = {Op.LAYER_NORM, Op.RMS_NORM}
ROOTS = {Op.SQRT, Op.RSQRT, Op.POW, Op.EXP, Op.LENGTH, Op.DEVIATION}
REDUCTIONS = {Op.MEAN, Op.SUM, Op.VARIANCE, Op.LENGTH, Op.DEVIATION}
SCALINGS = {Op.MUL, Op.DIV}
STATISTIC = {
    Op.ADD, Op.SUB, Op.MUL, Op.DIV, Op.MAXIMUM, Op.SQUARE, Op.POW, Op.SQRT, Op.RSQRT, Op.EXP,
    Op.LOG, Op.RECIPROCAL, Op.CAST, Op.EXPAND, Op.UNSQUEEZE, Op.SQUEEZE, Op.RESHAPE, Op.TRANSPOSE,
    Op.VIEW,
}  # fmt: skip
"""What may stand between a reduction and the scaling by its root."""

BATCH_NORM_REASON = (
    "BatchNorm cannot be replaced: ImageNet accuracy falls from 76.2 to 68.9 (ResNet-50) and "
    "from 72.7 to 71.0 (VGG19), arXiv 2503.10622, Table 15"
)

REFUSED = {
    Op.BATCH_NORM: (NormKind.BATCH_NORM, BATCH_NORM_REASON),
    Op.GROUP_NORM: (
        NormKind.GROUP_NORM,
        "GroupNorm's statistics run over groups of channels and over space, not over one axis",
    ),
    Op.INSTANCE_NORM: (
        NormKind.INSTANCE_NORM,
        "InstanceNorm's statistics run over space or time, for each channel alone",
    ),
}
CENTRING = {Op.ADD, Op.SUB, Op.NEG, Op.MEAN, Op.SUM, Op.CAST, Op.EXPAND, Op.UNSQUEEZE, Op.SQUEEZE}
"""Operators that make x - mean(x) of x; with them scalings by a constant."""

OF_A_WEIGHT = "its input is a weight of the model, so its result never changes"

UNKNOWN_CHANNELS = (
    "the length of its normalized axis is not fixed, so that there is no gamma for each channel"
)
AFFINE_OF_INPUTS = "its gamma or beta is computed from the model's inputs"
ACROSS_CHANNELS = "its gamma or beta varies along another axis than it normalizes"

JOINED_AXES = (
    "its statistics run over several axes that a view puts together, as those of GroupNorm and "
    "InstanceNorm do"
)

OTHER_SHAPE = Miss("its gamma or beta has another shape than one value a channel", near=False)

BEHIND = {Op.MUL, Op.DIV, Op.ADD, Op.SUB, Op.CAST, Op.RESHAPE}
"""What may follow the scaling and still belong to the norm."""

BETWEEN = {Op.CAST, Op.RESHAPE}
"""Those of them that may stand between the norm and its gamma or beta."""

ENDS = 8
"""Terms behind the scaling that are tried: casts, a literal, gamma, beta and their sums."""

STEPS = 48
"""Terms that a piece may span; the longest known spelling (LayerNorm2d by hand) takes 14."""


@dataclass
class _Found:
    sites: list[NormSite] = field(default_factory=list)
    refusals: list[tuple[float, Refusal]] = field(default_factory=list)
    claimed: set[Term] = field(default_factory=set)

    def refuse(
        self, term: Term, reason: str, kind: NormKind = NormKind.OTHER, name: str = ""
    ) -> None:
        """Take in that the norm which ends in `term` stays, and why."""
        named = name or term.scope or term.output.name
        self.refusals.append((term.index, Refusal(named, kind, reason)))


def match(graph: Graph) -> Match:
    """Every normalization of `graph`, one entry a call, in execution order.

    Raises CaptureError where the shapes that a file gives its values contradict each other.
    """
    try:
        return _matched(graph)
    except (ArithmeticError, LookupError, TypeError, ValueError) as error:
        raise CaptureError(
            f"model {graph.name!r} contradicts itself in shapes or constants: "
            f"{type(error).__name__}, {first_line(error)}"
        ) from error


def _matched(graph: Graph) -> Match:
    prover = Prover()
    found = _Found()
    outputs = set(graph.outputs.values())
    for term in graph.terms:
        if term in found.claimed:
            continue
        if term.output.constant:
            if term.op in WHOLE_NORMS or _normalizes_a_weight(term, prover):
                found.refuse(term, OF_A_WEIGHT)
        elif term.op in REFUSED:
            kind, reason = REFUSED[term.op]
            found.refuse(term, reason, kind)
        elif term.op in WHOLE_NORMS:
            _settle(term, prover, outputs, found, whole=True)
        elif term.op is Op.FUSED_NORM:
            found.refuse(term, str(term.attributes["reason"]))
        elif term.op is Op.DYT:
            _add(found, term, _whole_dyt(term))
        elif term.op in (Op.TANH, Op.ERF):
            _add(found, term, _spelled_dyt(term, prover, outputs))
        elif term.op in ROOTS and _reduced(term):
            for scaling in _scalings(term):
                if scaling not in found.claimed:
                    _settle(scaling, prover, outputs, found)
    found.sites[:] = [with_folds(site, graph.outputs) for site in found.sites]
    return _named(graph.name, found)


def _settle(
    first: Term, prover: Prover, outputs: set[Value], found: _Found, *, whole: bool = False
) -> None:
    """Accept what ends in `first` or a little behind it, if it is proved, or refuse it."""
    misses: list[Miss] = []
    best = _furthest(first, prover, outputs, misses)
    if best is None:
        reasons = [miss.reason for miss in misses if miss.near or whole]
        if reasons or whole:
            found.refuse(first, next(iter(reasons), AFFINE_OF_INPUTS))
        found.claimed.add(first)
        return
    piece, proof = best
    found.claimed.update(piece.terms)
    site = _site(first, piece, proof, outputs)
    if site.input.fixed:
        found.refuse(first, OF_A_WEIGHT, name=site.name)
    elif site.channels is None:
        found.refuse(first, UNKNOWN_CHANNELS)
    else:
        _add(found, first, site)


def _furthest(
    first: Term, prover: Prover, outputs: set[Value], misses: list[Miss]
) -> tuple[Piece, Proof] | None:
    """The norm that ends in `first`, with as much of what follows as still belongs to it."""
    best: tuple[Piece, Proof] | None = None
    end: Term | None = first
    for _ in range(ENDS):
        if end is None or (best is not None and _takes_more(end)):
            break
        if end.output.native is not None:  # a part of a node cannot be replaced
            proved = None if end.op is Op.RESHAPE else _prove(end, prover, misses)
            if proved is not None and _worth_its_casts(end, proved, best):
                best = proved
            elif proved is None and best is not None and end.op not in BETWEEN:
                break
        end = _only_consumer(end.output, outputs)
        if end is not None and end.op not in BEHIND:
            break
    if best is not None and best[1].form.axes != (-1,) and OTHER_SHAPE in misses:
        misses[:] = [Miss(ACROSS_CHANNELS)]
        return None
    return best


def _takes_more(end: Term) -> bool:
    """Whether a term behind the norm combines it with another value. Before anything is proved
    it may take a norm's own parts together: x * f + (beta - mean * f)."""
    return end.op not in BETWEEN and sum(not v.constant for v in end.operands) > 1


def _worth_its_casts(
    end: Term, proved: tuple[Piece, Proof], best: tuple[Piece, Proof] | None
) -> bool:
    """A cast at the end is part of the norm where it restores the dtype that went in."""
    if end.op is not Op.CAST or best is None:
        return True
    source = _before_casts(proved[0].input)
    return end.output.dtype == source.dtype and best[0].output.dtype != source.dtype


def _prove(end: Term, prover: Prover, misses: list[Miss]) -> tuple[Piece, Proof] | None:
    """The widest reading of `end` as a norm: an RMS norm of x - mean(x) is the LayerNorm of x."""
    best: tuple[Piece, Proof] | None = None
    for piece in _pieces(end):
        if best is not None and not _may_centre(best[0].input):
            break
        proof = prover.identify(piece)
        if not isinstance(proof, Miss):
            proof = _closed(piece) or _per_channel(piece, proof) or proof
        if isinstance(proof, Miss):
            misses.append(proof)
        elif best is None or (proof.form.centred and not best[1].form.centred):
            best = (piece, proof)
    return best


def _may_centre(value: Value) -> bool:
    return value.producer is not None and value.producer.op in (Op.SUB, Op.ADD, Op.NEG)


def _closed(piece: Piece) -> Miss | None:
    """A miss where a value inside is read from outside; casts and x - mean(x) may be."""
    terms, centred = set(piece.terms), {piece.input}
    for term in piece.terms[:-1]:
        if _centres(term, centred):
            centred.add(term.output)
            if term.output.shape is not None and term.output.shape == piece.input.shape:
                continue
        readers = [reader for reader in term.output.consumers if reader.label not in SHAPE_READERS]
        if term.op is not Op.CAST and not terms.issuperset(readers):
            return Miss(f"its {term.op.name.lower()} is read by another part of the model, too")
    return None


def _centres(term: Term, centred: set[Value]) -> bool:
    """Whether a term leads from x to x - mean(x)."""
    if not centred.issuperset(v for v in term.operands if not v.constant):
        return False
    if term.op in SCALINGS:
        return sum(v not in centred for v in term.inputs) == 1
    return term.op in CENTRING


def _per_channel(piece: Piece, proof: Proof) -> Miss | None:
    """A miss where gamma or beta is no value per channel (or per channel and head).

    Without either, the axis tells what channels are: the last one, or the second one of images.
    """
    x, axes, constants = piece.input.shape, proof.form.axes, piece.constants()
    for place in (proof.gamma, proof.beta):
        shape = () if place is None else constants[place].shape
        if shape is None or (x is not None and len(shape) > len(x)):
            return OTHER_SHAPE
        varying = [axis for axis in range(-len(shape), 0) if shape[axis] != 1 and axis not in axes]
        # Heads may have channels of their own; samples and tokens may not.
        allowed = 0 if x is None or axes != (-1,) else max(len(x) - 3, 0)
        if len(varying) > allowed:
            return OTHER_SHAPE
    bare = proof.gamma is None and proof.beta is None
    if bare and axes != (-1,) and not _is_channel_axis_of_images(axes, x):
        return Miss(
            f"it normalizes axis {axes[0]} without a gamma or beta along it, as instance norms of "
            "tokens do"
        )
    return Miss(JOINED_AXES) if bare and _joins_axes(piece) else None


def _joins_axes(piece: Piece) -> bool:
    """Whether a view before makes its last axis of several, and one behind takes them apart."""
    before = _before_casts(piece.input).producer
    if before is None or not _is_longer(before.output, before.operands[:1]):
        return False
    pending, behind = [piece.output], list[Value]()
    while pending:
        for term in pending.pop().consumers:
            (pending if term.op is Op.CAST else behind).append(term.output)
    views = [value for value in behind if value.producer and value.producer.op is Op.VIEW]
    return before.op is Op.VIEW and _is_longer(piece.output, views)


def _is_longer(value: Value, others: Iterable[Value]) -> bool:
    """Whether its last axis is known to be longer than that of one of the others."""
    last = value.shape[-1] if value.shape else None
    lasts = [other.shape[-1] for other in others if other.shape]
    return last is not None and any(size is not None and size < last for size in lasts)


def _is_channel_axis_of_images(axes: tuple[int, ...], shape: tuple[int | None, ...] | None) -> bool:
    return shape is not None and len(shape) >= 4 and axes == (1 - len(shape),)


def _pieces(end: Term) -> Iterator[Piece]:
    """Pieces that end in `end`, by growing size: one for each value that all paths pass through."""
    pending: dict[Value, None] = {v: None for v in end.operands if not v.constant}
    order = [(-_position(v), id(v), v) for v in pending]
    heapq.heapify(order)
    terms = [end]
    while len(terms) <= STEPS:
        source = next(iter(pending), None)
        if len(pending) == 1 and source is not None and source.native is not None:
            yield Piece(source, end.output, tuple(sorted(terms, key=lambda term: term.index)))
        if not order:
            return
        value = heapq.heappop(order)[2]
        term = value.producer
        if term is None or not has_meaning(term.op):
            return
        del pending[value]
        terms.append(term)
        for operand in term.operands:
            if not operand.constant and operand not in pending:
                pending[operand] = None
                heapq.heappush(order, (-_position(operand), id(operand), operand))


def _position(value: Value) -> float:
    return -1 if value.producer is None else value.producer.index


def _reduced(root: Term) -> bool:
    """Whether a root is taken of something that a reduction made, of a constant if it is one."""
    if root.op in REDUCTIONS:
        return True
    pending, steps = list(root.operands), 0
    while pending and steps < STEPS:
        term = pending.pop().producer
        steps += 1
        if term is None or term.output.constant is not root.output.constant:
            continue
        if term.op in REDUCTIONS:
            return True
        if term.op in STATISTIC:
            pending.extend(term.operands)
    return False


def _scalings(root: Term) -> Iterator[Term]:
    """Terms that multiply or divide another value by what was made from `root`."""
    pending, statistics = [root.output], {root.output}
    of_weight = root.output.constant
    while pending:
        value = pending.pop()
        for term in value.consumers:
            others = [
                v
                for v in term.operands
                if v not in statistics and (v.scalar is None if of_weight else not v.constant)
            ]
            if others and term.op in SCALINGS:
                yield term
            elif not others and term.op in STATISTIC and term.output not in statistics:
                statistics.add(term.output)
                pending.append(term.output)


def _normalizes_a_weight(root: Term, prover: Prover) -> bool:
    """Whether a constant root is that of a norm of the one parameter that it is computed from."""
    weight = root.output.learned() if root.op in ROOTS else None
    if weight is None or weight is root.output or not _reduced(root):
        return False
    return any(
        isinstance(prover.identify(Piece(weight, scaling.output, _between(weight, scaling))), Proof)
        for scaling in _scalings(root)
        if scaling.output.constant
    )


def _between(weight: Value, end: Term) -> tuple[Term, ...]:
    """The terms that compute a constant from a parameter, in execution order."""
    terms, pending = {end}, [end]
    while pending:
        for value in pending.pop().operands:
            term = value.producer
            if value is not weight and term is not None and term not in terms:
                terms.add(term)
                pending.append(term)
    return tuple(sorted(terms, key=lambda term: term.index))


def _site(first: Term, piece: Piece, proof: Proof, outputs: set[Value]) -> NormSite:
    """The site of a proved piece, whose input is first scaled in `first`."""
    constants = piece.constants()
    gamma = None if proof.gamma is None else constants[proof.gamma]
    beta = None if proof.beta is None else constants[proof.beta]
    source = _before_casts(piece.input)
    return NormSite(
        name=_name(_owner(first, piece.terms[-1]), gamma),
        kind=NormKind.LAYER_NORM if proof.form.centred else NormKind.RMS_NORM,
        channels=_channels(source, gamma or beta, proof.form.axes),
        axes=proof.form.axes,
        eps=proof.form.eps,
        affine=_affine_names(gamma, beta),
        dtype=source.dtype,
        consumers=_consumers(piece.output, outputs),
        parallel_residual=False,
        tied_to=None,
        input=source,
        output=piece.output,
        gamma=gamma,
        beta=beta,
    )


def _whole_dyt(term: Term) -> NormSite:
    source = term.inputs[0]
    form = term.attributes["form"]
    named = dict(zip(form.parameters, term.inputs[1:], strict=True))
    kind = NormKind.DYT if form.squash == "tanh" else NormKind.DERF
    return _dyt_site(term, kind, source, term.output, named)  # type: ignore[arg-type]


def _spelled_dyt(squash: Term, prover: Prover, outputs: set[Value]) -> NormSite | None:
    """DyT written out: squash(alpha * x [+ shift]), then gamma and beta; alpha must be learned."""
    parameters: dict[str, Value] = {}
    terms = [squash]
    argument = squash.operands[0].producer
    if squash.op is Op.ERF and argument is not None and argument.op is Op.ADD:
        shift = _constant_operand(argument)
        if shift is not None:
            parameters["shift"] = shift
            terms.insert(0, argument)
            argument = next(v for v in argument.operands if v is not shift).producer
    while argument is not None and argument.op is Op.CAST:
        terms.insert(0, argument)
        argument = argument.operands[0].producer
    alpha = None if argument is None or argument.op is not Op.MUL else _constant_operand(argument)
    if argument is None or alpha is None:
        return None
    parameters["alpha"] = alpha
    terms.insert(0, argument)
    source = next(v for v in argument.operands if v is not alpha)
    end = squash.output
    term = _only_consumer(end, outputs)
    for name, op in (("gamma", Op.MUL), ("beta", Op.ADD)):
        while term is not None and term.op is Op.CAST:
            terms.append(term)
            term = _only_consumer(term.output, outputs)
        operand = None if term is None or term.op is not op else _constant_operand(term)
        if term is not None and operand is not None and operand.scalar is None:
            parameters[name] = operand
            terms.append(term)
            end = term.output
            term = _only_consumer(end, outputs)
    while terms[-1].output is not end:
        terms.pop()
    kind = NormKind.DYT if squash.op is Op.TANH else NormKind.DERF
    piece = Piece(source, end, tuple(terms))
    name = "tanh" if squash.op is Op.TANH else "erf"
    gamma = parameters.get("gamma")
    if not _from_parameter(alpha) and (gamma is None or not gamma.shape):
        return None  # tanh(c * x) with a fixed number is a soft-cap or an activation
    if not prover.holds_dyt(piece, parameters, name):
        return None
    return _dyt_site(terms[-1], kind, _before_casts(source), end, parameters, outputs)


def _dyt_site(
    last: Term,
    kind: NormKind,
    source: Value,
    end: Value,
    parameters: dict[str, Value],
    outputs: set[Value] | None = None,
) -> NormSite:
    gamma, beta = parameters.get("gamma"), parameters.get("beta")
    return NormSite(
        name=_name(last, parameters.get("alpha")),
        kind=kind,
        channels=source.shape[-1] if source.shape else None,
        axes=(-1,),
        eps=0.0,
        affine=_affine_names(gamma, beta),
        dtype=source.dtype,
        consumers=_consumers(end, outputs or set()),
        parallel_residual=False,
        tied_to=None,
        input=source,
        output=end,
        alpha=parameters.get("alpha"),
        shift=parameters.get("shift"),
        gamma=gamma,
        beta=beta,
    )


def _add(found: _Found, term: Term, site: NormSite | None) -> None:
    """Take a site in; in a branch or a loop, DyT stays as it is and a norm is refused."""
    if site is None:
        return
    if not term.within:
        found.sites.append(site)
    elif not site.kind.lossless:
        found.refuse(
            term,
            f"it stands inside {term.within}, where its activations cannot be observed",
            name=site.name,
        )


def _only_consumer(value: Value, outputs: set[Value]) -> Term | None:
    if value in outputs or len(value.consumers) != 1:
        return None
    return value.consumers[0]


def _constant_operand(term: Term) -> Value | None:
    constants = [v for v in term.operands if v.constant]
    return constants[0] if len(constants) == 1 and len(term.inputs) == 2 else None


def _from_parameter(value: Value) -> bool:
    if value.parameter:
        return True
    return value.producer is not None and any(map(_from_parameter, value.producer.operands))


def _before_casts(value: Value) -> Value:
    """The value before the casts of a norm that computes in a wider dtype than its input has."""
    while value.producer is not None and value.producer.op is Op.CAST:
        operand = value.producer.operands[0]
        if not (operand.dtype or "").startswith(("float", "bfloat")):
            break
        if _bits(operand) > _bits(value):
            break  # it narrows: the end of what comes before
        value = operand
    return value


def _bits(value: Value) -> int:
    """Bits of a floating-point dtype by its name."""
    digits = (value.dtype or "").lstrip("abcdefghijklmnopqrstuvwxyz").partition("_")[0]
    return int(digits or 32)


def _channels(x: Value, parameter: Value | None, axes: tuple[int, ...]) -> int | None:
    """The length of the normalized axis, from the input's shape or from gamma's."""
    for value in (x, parameter):
        if value is not None and value.shape is not None and value.shape[axes[0]] is not None:
            return value.shape[axes[0]]
    return None


def _affine_names(gamma: Value | None, beta: Value | None) -> tuple[str, ...]:
    return tuple(name for name, value in (("gamma", gamma), ("beta", beta)) if value is not None)


def _consumers(value: Value, outputs: set[Value]) -> tuple[str, ...]:
    labels = [term.label for term in value.consumers]
    return (*labels, "output") if value in outputs else tuple(labels)


def _owner(first: Term, last: Term) -> Term:
    """The term whose module a norm is named after: its last one, or what scales its input first
    where the gamma or the beta behind belongs to another module (a LayerScale)."""
    around = not last.scope or f"{first.scope}.".startswith(f"{last.scope}.")
    return last if around or not first.scope else first


def _name(last: Term, parameter: Value | None) -> str:
    """The module's path; without scopes, the path of its parameter; else its place in the order."""
    if last.scope:
        return last.scope
    while parameter is not None and not parameter.parameter:
        producer = parameter.producer
        parameter = producer.operands[0] if producer is not None and producer.operands else None
    if parameter is not None and "." in parameter.name:
        return parameter.name.rpartition(".")[0]
    return f"norm_{last.index}"


def _named(model: str, found: _Found) -> Match:
    """The match in execution order, each site under a name of its own."""
    sites = sorted(found.sites, key=lambda site: _position(site.output))
    readers = Counter(id(site.input) for site in sites)
    # Calls that normalize a weight come before those that see the model's inputs.
    weights = Counter(r.name for _, r in found.refusals if r.reason == OF_A_WEIGHT)
    calls: dict[str, list[NormSite]] = {}
    for site in sites:
        known = calls.setdefault(site.name, [])
        tied = bool(known) and (known[0].gamma, known[0].beta) == (site.gamma, site.beta)
        number = 1 + weights[site.name] + len(known)
        known.append(
            replace(
                site,
                name=site.name if number == 1 else f"{site.name}#{number}",
                parallel_residual=readers[id(site.input)] > 1,
                tied_to=known[0].name if tied and not site.kind.lossless else None,
            )
        )
    unique = sorted(chain(*calls.values()), key=lambda site: _position(site.output))
    refusals = tuple(refusal for _, refusal in sorted(found.refusals, key=lambda r: r[0]))
    return Match(model, tuple(unique), refusals)
