"""What a constant of a graph is computed from, and who reads that."""

from __future__ import annotations

from .terms import Term, Value

__all__ = ["QUANTISED", "is_fixed", "is_quantised", "leaves", "readers"]

QUANTISED = ("quant", "NBits", "QLinear", "MatMulInteger", "ConvInteger")
"""Parts of the names of operators over quantised numbers."""


def is_fixed(operand: Value | float) -> bool:
    """Whether an operand is the same on every call: not even its shape depends on the inputs."""
    if not isinstance(operand, Value):
        return True
    pending, seen = [operand], {operand}
    while pending:
        value = pending.pop()
        if not value.constant or None in (value.shape or ()):
            return False
        new = [] if value.producer is None else value.producer.operands
        pending.extend(v for v in new if v not in seen)
        seen.update(new)
    return True


def leaves(constant: Value) -> set[Value]:
    """The stored tensors that a constant is computed from."""
    found: set[Value] = set()
    pending, seen = [constant], {constant}
    while pending:
        value = pending.pop()
        if value.producer is None:
            found.add(value)
            continue
        new = [v for v in value.producer.operands if v not in seen]
        seen.update(new)
        pending.extend(new)
    return found


def readers(constant: Value) -> set[Term]:
    """The terms that read what a constant is computed from, constants between left out."""
    pending = [leaf for leaf in leaves(constant) if leaf.scalar is None]
    found: set[Term] = set()
    seen = set(pending)
    while pending:
        for term in pending.pop().consumers:
            if not term.output.constant:
                found.add(term)
            elif term.output not in seen:
                seen.add(term.output)
                pending.append(term.output)
    return found


def is_quantised(weight: Value) -> bool:
    """Whether a constant is computed from quantised numbers."""
    pending = [weight]
    while pending:
        term = pending.pop().producer
        if term is not None:
            if any(part in term.label for part in QUANTISED):
                return True
            pending.extend(term.operands)
    return False
