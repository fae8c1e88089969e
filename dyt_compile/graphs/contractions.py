"""Products that are summed, where they are no more than a sum over one axis of a value."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..terms import Op, Said

__all__ = ["einsum", "row_by_column", "row_sum"]

Shape = Sequence["int | None"]


def row_by_column(left: Any, right: Any, rows: Shape | None, columns: Shape | None) -> Said | None:
    """A matrix product of rows by columns: for each row the sum of a product.

    rows, columns: the shapes of `left` and `right`. None for other matrix products.
    """
    if rows is None or columns is None or len(rows) != len(columns) or len(rows) < 2:
        return None
    if rows[-2] != 1 or columns[-1] != 1:
        return None
    rank = len(rows)
    turned = Said(Op.TRANSPOSE, (right,), {"order": (*range(rank - 2), rank - 1, rank - 2)})
    return Said(Op.SUM, (Said(Op.MUL, (left, turned)),), {"axes": (-1,), "keepdims": True})


def row_sum(x: Any, weight: float) -> Said:
    """The product with a matrix that holds one number everywhere; its columns are all equal."""
    total = Said(Op.SUM, (x,), {"axes": (-1,), "keepdims": True})
    return Said(Op.EXPAND, (Said(Op.MUL, (total, weight)),))


def einsum(equation: str, operands: Sequence[Any]) -> Said | None:
    """Two operands of which one has all axes, in the order of the other and of the result.

    "btd,btd->bt" and "...d,...d->..." are sums of a product, "btd,bt->btd" scales rows; None for
    matrix products and what permutes.
    """
    given, arrow, result = equation.replace(" ", "").replace("...", "*").partition("->")
    terms = given.split(",")
    if not arrow or len(terms) != 2 or any(len(set(term)) != len(term) for term in terms):
        return None
    full = max(terms, key=len)
    if not all(_is_part(term, full) for term in (*terms, result)):
        return None
    if "*" in full and "*" not in result:
        return None
    factors = (_aligned(x, term, full) for x, term in zip(operands, terms, strict=True))
    product = Said(Op.MUL, tuple(factors))
    axes = tuple(place - len(full) for place, name in enumerate(full) if name not in result)
    return Said(Op.SUM, (product,), {"axes": axes, "keepdims": False}) if axes else product


def _is_part(term: str, full: str) -> bool:
    """Whether a term has some axes of another in their order; others of any number come first."""
    return term == "".join(name for name in full if name in term) and "*" not in full[1:]


def _aligned(x: Any, term: str, full: str) -> Any:
    """An operand that broadcasts against the one with all axes."""
    missing = [place - len(full) for place, name in enumerate(full) if name not in term]
    inner = tuple(place for place in missing if full[place] != "*" and place > -len(full))
    return Said(Op.UNSQUEEZE, (x,), {"axes": inner}) if inner else x
