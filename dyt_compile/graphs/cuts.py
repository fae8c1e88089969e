"""Cuts of a graph at its sites, so that it can run from one site to the next."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain, count

from ..sites import NormSite
from ..terms import Value
from .base import Graph

__all__ = ["Stage", "stages"]


@dataclass(frozen=True)
class Stage:
    """The part of a graph between two sites.

    start: the values that live when it begins; made: what it adds for the site behind it, for
    later stages and for the graph's outputs. read: what that site reads besides its input, such
    as the length of another input's axis.
    """

    start: tuple[Value, ...]
    made: tuple[Value, ...]
    read: tuple[Value, ...] = ()


def stages(graph: Graph, sites: Sequence[NormSite]) -> tuple[Stage, ...]:
    """One stage before each site, and one after the last; `sites` in execution order.

    Stage k makes the input of site k, and stage k + 1 starts with that site's output.
    """
    # Clock: stage k runs at 2k, site k reads and answers at 2k + 1, the graph's inputs come at -1.
    reads = [_read_inside(site) for site in sites]
    needed = _needed(graph, sites, chain.from_iterable(reads))
    ends = [_place(site.output) for site in sites]
    born = {v: -1 if v.producer is None else 2 * bisect_left(ends, _place(v)) for v in needed}
    born |= {site.output: 2 * number + 1 for number, site in enumerate(sites)}
    last = dict(born)
    answers = {site.output for site in sites}
    for value in needed - answers:
        for operand in _read_for(value):
            if operand in last:
                last[operand] = max(last[operand], born[value])
    for number, site in enumerate(sites):
        for value in (site.input, *reads[number]):
            last[value] = max(last[value], 2 * number + 1)
    for value in graph.outputs.values():
        if value in last:
            last[value] = 2 * len(sites) + 1
    return tuple(
        Stage(
            tuple(v for v in last if born[v] < clock <= last[v]),
            tuple(v for v in last if born[v] == clock < last[v]),
            read,
        )
        for clock, read in zip(count(step=2), [*reads, ()])
    )


def _read_inside(site: NormSite) -> tuple[Value, ...]:
    """What the nodes between a site's input and its output read besides the input."""
    pending, inside, read = [site.output], {site.input}, dict[Value, None]()
    while pending:
        value = pending.pop()
        if value in inside or value.constant:
            continue
        inside.add(value)
        if value.producer is not None:
            pending.extend(value.producer.operands)
            read |= dict.fromkeys(v for v in value.producer.also if not v.constant)
    return tuple(value for value in read if value not in inside)


def _needed(graph: Graph, sites: Sequence[NormSite], reads: Iterable[Value]) -> set[Value]:
    """Values that sites and outputs depend on, the insides of the sites left out."""
    answers = {site.output for site in sites}
    pending = [*(site.input for site in sites), *reads, *graph.outputs.values(), *answers]
    needed: set[Value] = set()
    while pending:
        value = pending.pop()
        if value in needed or value.constant:
            continue
        needed.add(value)
        if value not in answers:
            pending.extend(_read_for(value))
    return needed


def _read_for(value: Value) -> tuple[Value, ...]:
    """What the node of a value reads, shapes to expand to included."""
    term = value.producer
    return () if term is None else (*term.operands, *term.also)


def _place(value: Value) -> float:
    return -1 if value.producer is None else value.producer.index
