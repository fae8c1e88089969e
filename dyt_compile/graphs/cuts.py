"""Cuts of a graph at its sites and projections, so that it can run from one point to the next."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain, count
from typing import Protocol

from ..terms import Value
from .base import Graph

__all__ = ["Point", "Stage", "place", "read_between", "stages"]


class Point(Protocol):
    """Where a walk stops: a site, or another part of the graph with one input and one output."""

    @property
    def input(self) -> Value:
        """What the point reads."""
        ...

    @property
    def output(self) -> Value:
        """What the point answers."""
        ...

    @property
    def known(self) -> tuple[Value, ...]:
        """What a walk has to know there, besides."""
        ...


@dataclass(frozen=True)
class Stage:
    """The part of a graph between two points.

    start: the values that live when it begins; made: what it adds for the point behind it, for
    later stages and for the graph's outputs. read: what that point reads besides its input, such
    as the length of another input's axis.
    """

    start: tuple[Value, ...]
    made: tuple[Value, ...]
    read: tuple[Value, ...] = ()


def stages(graph: Graph, points: Sequence[Point]) -> tuple[Stage, ...]:
    """One stage before each point, and one after the last; `points` in execution order.

    Stage k makes the input of point k, and stage k + 1 starts with that point's output.
    """
    # Clock: stage k runs at 2k, point k reads and answers at 2k + 1, the graph's inputs come at -1.
    reads = [read_between([point.input], point.output) for point in points]
    known = [(point.input, *point.known, *read) for point, read in zip(points, reads, strict=True)]
    answers = {point.output for point in points}
    needed = _needed(graph, answers, chain.from_iterable(known))
    ends = [place(point.output) for point in points]
    born = {v: -1 if v.producer is None else 2 * bisect_left(ends, place(v)) for v in needed}
    born |= {point.output: 2 * number + 1 for number, point in enumerate(points)}
    last = dict(born)
    for value in needed - answers:
        for operand in _read_for(value):
            if operand in last:
                last[operand] = max(last[operand], born[value])
    for number, values in enumerate(known):
        for value in values:
            last[value] = max(last[value], 2 * number + 1)
    for value in graph.outputs.values():
        if value in last:
            last[value] = 2 * len(points) + 1
    return tuple(
        Stage(
            tuple(v for v in last if born[v] < clock <= last[v]),
            tuple(v for v in last if born[v] == clock < last[v]),
            read,
        )
        for clock, read in zip(count(step=2), [*reads, ()])
    )


def read_between(start: Iterable[Value], stop: Value) -> tuple[Value, ...]:
    """What the nodes from some values to a later one read besides those: lengths of axes."""
    pending, inside, read = [stop], set(start), dict[Value, None]()
    while pending:
        value = pending.pop()
        if value in inside or value.constant:
            continue
        inside.add(value)
        if value.producer is not None:
            pending.extend(value.producer.operands)
            read |= dict.fromkeys(v for v in value.producer.also if not v.constant)
    return tuple(value for value in read if value not in inside)


def _needed(graph: Graph, answers: set[Value], known: Iterable[Value]) -> set[Value]:
    """Values that points and outputs depend on, the insides of the points left out."""
    pending = [*known, *graph.outputs.values(), *answers]
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


def place(value: Value) -> float:
    """Where a value is made in execution order; inputs come before everything."""
    return -1 if value.producer is None else value.producer.index
