"""An estimate of what a site without its norm saves: kernels, and bytes of memory traffic.

Counted from shapes, not measured, and an upper bound. A norm needs a whole row before it gives
its first element, so it is counted as a kernel of its own that reads x and writes y. DyT is
element-wise: where x is made by element-wise operators, a product or a convolution, DyT is counted
as a part of that kernel, which writes y from registers. What then goes is one kernel, the read of
x and, where nothing else reads x, the write of it. Of an affine map nothing is left: its readers
read x, and there is no y to write; one kernel goes, whatever makes x. Gamma, beta and statistics
are not counted. A runtime that also fuses norms with what stands before them saves less:
docs/tensorrt.md has kernels counted in engines.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

import ml_dtypes
import numpy as np

from .sites import NormSite
from .survey import Look
from .terms import ELEMENTWISE, Op, Term, Value

__all__ = ["Savings", "savings"]

VIEWS = {Op.EXPAND, Op.UNSQUEEZE, Op.SQUEEZE, Op.RESHAPE, Op.VIEW, Op.TRANSPOSE}
"""What moves no data by itself."""

PRODUCTS = {Op.MATMUL, Op.CONVOLUTION}


@dataclass(frozen=True)
class Savings:
    """An upper bound: kernels of one run, and bytes read and written for each sample."""

    kernels: int
    traffic_bytes: float


def savings(
    sites: Iterable[NormSite],
    looks: Mapping[str, Look],
    outputs: Collection[Value],
    affine: Collection[str] = (),
) -> Savings:
    """What these sites save together when they are converted; outputs: of their graph.

    affine: the names of those that become an affine map, and no DyT.
    """
    gone = [
        site
        for site in sites
        if not site.kind.lossless and (site.name in affine or _fuses(site.input))
    ]
    traffic = sum(
        (2 if site.name in affine else 1 + _alone(site, outputs))
        * looks[site.name].elements
        * _width(site.input)
        for site in gone
    )
    return Savings(len(gone), traffic)


def _fuses(x: Value) -> bool:
    """Whether what makes x can go on element by element."""
    while x.producer is not None and x.producer.op in VIEWS:
        x = x.producer.operands[0]
    return x.producer is not None and x.producer.op in ELEMENTWISE | PRODUCTS


def _alone(site: NormSite, outputs: Collection[Value]) -> bool:
    """Whether nothing but the norm itself reads its input."""
    inside = _inside(site)
    return site.input not in outputs and all(term in inside for term in site.input.consumers)


def _inside(site: NormSite) -> set[Term]:
    """The terms between a site's input and its output."""
    pending, found = [site.output], set[Term]()
    while pending:
        value = pending.pop()
        term = value.producer
        if value is site.input or term is None or term in found:
            continue
        found.add(term)
        pending.extend(term.operands)
    return found


def _width(value: Value) -> int:
    """Bytes of an element; 4 where its type is unknown."""
    if value.dtype == "bfloat16":
        return int(np.dtype(ml_dtypes.bfloat16).itemsize)
    return 4 if value.dtype is None else int(np.dtype(value.dtype).itemsize)
