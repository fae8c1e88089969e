"""Match: find every normalization of a graph, and prove each before it is accepted.

Recall is algebra: a value that is scaled by something made from the root of a reduction is looked
at, whatever the spelling. The nearest values that all its paths pass through are tried as the
norm's input. Precision is proof: `proof.Prover` runs the piece between the two.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import chain

from ..graphs.base import Graph
from ..proof import Miss, NormalForm, Piece, Prover
from ..sites import Match, NormKind, NormSite, Refusal
from ..terms import Op, Term, Value, has_meaning

__all__ = ["match"]

WHOLE_NORMS = {Op.LAYER_NORM, Op.RMS_NORM}
ROOTS = {Op.SQRT, Op.RSQRT, Op.POW, Op.LENGTH}
REDUCTIONS = {Op.MEAN, Op.SUM, Op.VARIANCE, Op.LENGTH}
SCALINGS = {Op.MUL, Op.DIV}
STATISTIC = {
    Op.ADD, Op.SUB, Op.MUL, Op.DIV, Op.MAXIMUM, Op.SQUARE, Op.POW, Op.SQRT, Op.RSQRT,
    Op.RECIPROCAL, Op.CAST, Op.EXPAND, Op.UNSQUEEZE, Op.SQUEEZE,
}  # fmt: skip
"""What may stand between a reduction and the scaling by its root."""

BATCH_NORM_REASON = (
    "BatchNorm cannot be replaced: ImageNet accuracy falls from 76.2 to 68.9 (ResNet-50) and "
    "from 72.7 to 71.0 (VGG19), arXiv 2503.10622, Table 15"
)

REFUSED = {
    Op.BATCH_NORM: (NormKind.BATCH_NORM, BATCH_NORM_REASON),
    Op.GROUP_NORM: (NormKind.GROUP_NORM, "GroupNorm's statistics run over space and channels"),
    Op.INSTANCE_NORM: (NormKind.INSTANCE_NORM, "InstanceNorm's statistics run over space"),
}
STEPS = 48
"""Terms that a piece may span; the longest known spelling (LayerNorm2d by hand) takes 14."""


@dataclass
class _Found:
    sites: list[NormSite] = field(default_factory=list)
    refusals: list[tuple[int, Refusal]] = field(default_factory=list)
    claimed: set[Term] = field(default_factory=set)


def match(graph: Graph) -> Match:
    """Every normalization of `graph`, one entry a call, in execution order."""
    prover = Prover()
    found = _Found()
    outputs = set(graph.outputs.values())
    for term in graph.terms:
        if term in found.claimed or term.output.constant:
            continue
        if term.op in REFUSED:
            kind, reason = REFUSED[term.op]
            found.refusals.append((term.index, Refusal(term.scope or term.label, kind, reason)))
        elif term.op in WHOLE_NORMS:
            _settle([term], prover, outputs, found)
        elif term.op is Op.DYT:
            _add(found, _whole_dyt(term))
        elif term.op in (Op.TANH, Op.ERF):
            _add(found, _spelled_dyt(term, prover, outputs))
        elif term.op in ROOTS and _reduced(term):
            for scaling in _scalings(term):
                if scaling not in found.claimed:
                    _settle([scaling, *_rescaled(scaling, outputs)], prover, outputs, found)
    return _named(graph.name, found)


def _settle(ends: list[Term], prover: Prover, outputs: set[Value], found: _Found) -> None:
    """Accept the first of `ends` that is proved, or refuse with the nearest miss."""
    misses: list[str] = []
    for end in ends:
        proved = _prove(end, prover, misses)
        if proved is None:
            continue
        piece, form = proved
        site = _with_affine(piece, form, prover, outputs)
        found.claimed.update(site.terms)
        found.sites.append(site.site)
        return
    end = ends[0]
    found.claimed.add(end)
    if misses:
        refusal = Refusal(end.scope or end.output.name, NormKind.OTHER, misses[0])
        found.refusals.append((end.index, refusal))


def _prove(end: Term, prover: Prover, misses: list[str]) -> tuple[Piece, NormalForm] | None:
    """The widest reading of `end` as a norm: an RMS norm of x - mean(x) is the LayerNorm of x."""
    best: tuple[Piece, NormalForm] | None = None
    for piece in _pieces(end):
        if best is not None and not _may_centre(best[0].input):
            break
        form = prover.identify(piece)
        if isinstance(form, Miss):
            misses.append(form.reason)
        elif best is None or (form.centred and not best[1].centred):
            best = (piece, form)
    return best


def _may_centre(value: Value) -> bool:
    return value.producer is not None and value.producer.op in (Op.SUB, Op.ADD)


def _pieces(end: Term) -> Iterator[Piece]:
    """Pieces that end in `end`, by growing size: one for each value that all paths pass through."""
    pending: dict[Value, None] = {v: None for v in end.operands if not v.constant}
    order = [(-_position(v), id(v), v) for v in pending]
    heapq.heapify(order)
    terms = [end]
    while len(terms) <= STEPS:
        if len(pending) == 1:
            (source,) = pending
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


def _position(value: Value) -> int:
    return -1 if value.producer is None else value.producer.index


def _reduced(root: Term) -> bool:
    """Whether a root is taken of something that a reduction made."""
    if root.op is Op.LENGTH:
        return True
    pending, steps = list(root.operands), 0
    while pending and steps < STEPS:
        term = pending.pop().producer
        steps += 1
        if term is None or term.output.constant:
            continue
        if term.op in REDUCTIONS:
            return True
        if term.op in STATISTIC:
            pending.extend(term.operands)
    return False


def _scalings(root: Term) -> Iterator[Term]:
    """Terms that multiply or divide another value by what was made from `root`."""
    pending, statistics = [root.output], {root.output}
    while pending:
        value = pending.pop()
        for term in value.consumers:
            others = [v for v in term.operands if v not in statistics and not v.constant]
            if others and term.op in SCALINGS:
                yield term
            elif not others and term.op in STATISTIC and term.output not in statistics:
                statistics.add(term.output)
                pending.append(term.output)


def _rescaled(end: Term, outputs: set[Value]) -> Iterator[Term]:
    """`end` times the literals that follow it: x / length(x) * sqrt(D) is an RMS norm."""
    term: Term | None = end
    while term is not None:
        term = _only_consumer(term.output, outputs)
        if term is None or term.op not in (*SCALINGS, Op.CAST):
            return
        others = [v for v in term.operands if v.constant]
        if any(v.scalar is None for v in others):
            return
        if term.op is not Op.CAST:
            yield term


@dataclass
class _Extended:
    site: NormSite
    terms: tuple[Term, ...]


def _with_affine(piece: Piece, form: NormalForm, prover: Prover, outputs: set[Value]) -> _Extended:
    """The site of a proved piece, with the gamma and beta around it, before and behind casts."""
    whole = piece.terms[-1]
    gamma, beta = (None, None)
    if whole.op in WHOLE_NORMS:
        gamma, beta = _optional(whole, 1), _optional(whole, 2)
    terms = list(piece.terms)
    trail: list[Term] = []  # casts that are taken along only if something follows
    end = piece.output
    source = _before_casts(piece.input)
    term = _only_consumer(end, outputs)
    while term is not None:
        operand = _per_channel(term, piece.input, form.axes)
        if term.op is Op.CAST:
            trail.append(term)
            if term.output.dtype == source.dtype and end.dtype != source.dtype:
                terms, trail, end = [*terms, *trail], [], term.output
        elif term.op is Op.MUL and operand is not None and gamma is None and beta is None:
            gamma, terms, trail, end = operand, [*terms, *trail, term], [], term.output
        elif term.op is Op.ADD and operand is not None and beta is None:
            beta, terms, trail, end = operand, [*terms, *trail, term], [], term.output
        else:
            break
        term = _only_consumer(term.output, outputs)
    grown = Piece(piece.input, end, tuple(terms))
    if not prover.holds(grown, form, gamma, beta):
        whole_affine = whole.op in WHOLE_NORMS
        gamma = _optional(whole, 1) if whole_affine else None
        beta = _optional(whole, 2) if whole_affine else None
        grown = piece
    last = grown.terms[-1]
    kind = NormKind.LAYER_NORM if form.centred else NormKind.RMS_NORM
    site = NormSite(
        name=_name(last, gamma),
        kind=kind,
        channels=_channels(source, gamma or beta, form.axes),
        axes=form.axes,
        eps=form.eps,
        affine=_affine_names(gamma, beta),
        dtype=source.dtype,
        consumers=_consumers(grown.output, outputs),
        parallel_residual=False,
        tied_to=None,
        input=source,
        output=grown.output,
        gamma=gamma,
        beta=beta,
    )
    return _Extended(site, grown.terms)


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
        shift = _learned(argument)
        if shift is not None:
            parameters["shift"] = shift
            terms.insert(0, argument)
            argument = next(v for v in argument.operands if v is not shift).producer
    while argument is not None and argument.op is Op.CAST:
        terms.insert(0, argument)
        argument = argument.operands[0].producer
    alpha = None if argument is None or argument.op is not Op.MUL else _learned(argument)
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
    if len(parameters) == 1 and alpha.shape == ():
        return None  # a lone tanh(c * x) is a soft-cap or an activation, not a norm's stand-in
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


def _add(found: _Found, site: NormSite | None) -> None:
    if site is not None:
        found.sites.append(site)


def _optional(term: Term, place: int) -> Value | None:
    value = term.inputs[place] if len(term.inputs) > place else None
    return value if isinstance(value, Value) else None


def _only_consumer(value: Value, outputs: set[Value]) -> Term | None:
    if value in outputs or len(value.consumers) != 1:
        return None
    return value.consumers[0]


def _constant_operand(term: Term) -> Value | None:
    constants = [v for v in term.operands if v.constant]
    return constants[0] if len(constants) == 1 and len(term.inputs) == 2 else None


def _learned(term: Term) -> Value | None:
    """The constant operand of a term if it is a parameter, or computed from one."""
    value = _constant_operand(term)
    if value is None or not _from_parameter(value):
        return None
    return value


def _from_parameter(value: Value) -> bool:
    if value.parameter:
        return True
    return value.producer is not None and any(map(_from_parameter, value.producer.operands))


def _per_channel(term: Term, x: Value, axes: tuple[int, ...]) -> Value | None:
    """The constant operand of a term if it has one value for each index of the normalized axes."""
    value = _constant_operand(term)
    if value is None or value.shape is None or len(value.shape) < -min(axes):
        return None
    if x.shape is not None:
        if len(value.shape) > len(x.shape):
            return None
        aligned = zip(reversed(value.shape), reversed(x.shape), strict=False)
        if any(size not in (1, length) for size, length in aligned):
            return None
        if any(value.shape[axis] != x.shape[axis] for axis in axes):
            return None
    return value


def _before_casts(value: Value) -> Value:
    """The value before the casts of a norm that computes in a wider dtype than its input has."""
    while value.producer is not None and value.producer.op is Op.CAST:
        operand = value.producer.operands[0]
        if not (operand.dtype or "").startswith(("float", "bfloat")):
            break
        value = operand
    return value


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
    calls: dict[str, list[NormSite]] = {}
    for site in sites:
        known = calls.setdefault(site.name, [])
        tied = bool(known) and (known[0].gamma, known[0].beta) == (site.gamma, site.beta)
        known.append(
            replace(
                site,
                name=site.name if not known else f"{site.name}#{len(known) + 1}",
                parallel_residual=readers[id(site.input)] > 1,
                tied_to=site.name if tied and not site.kind.lossless else None,
            )
        )
    unique = sorted(chain(*calls.values()), key=lambda site: _position(site.output))
    refusals = tuple(refusal for _, refusal in sorted(found.refusals, key=lambda r: r[0]))
    return Match(model, tuple(unique), refusals)
