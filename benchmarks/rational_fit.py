"""Where the coefficients of `dyt_compile.inductor` come from: `python -m benchmarks.rational_fit`.

Least greatest error of z P(z²) / Q(z²) against tanh or erf, counted in what the dtype allows, by
Lawson's reweighted least squares on the linearised error (Lawson 1961; Sanathanan and Koerner
1963). At `limit` it is 1. Seconds on one core.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from numpy.polynomial import chebyshev, polynomial

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Squash:
    """What is approximated, and its inverse; both of float64."""

    value: Callable[[Array], Array]
    inverse: Callable[[Array], Array]


SQUASHES = {
    "tanh": Squash(np.tanh, np.arctanh),
    "erf": Squash(
        lambda x: torch.special.erf(torch.from_numpy(x)).numpy(),
        lambda y: torch.special.erfinv(torch.from_numpy(y)).numpy(),
    ),
}

FORMS = {
    ("tanh", "bfloat16"): (4.1, 1, 2, 8),
    ("tanh", "float16"): (5.2, 2, 2, 11),
    ("tanh", "float32"): (8.6, 5, 3, None),
    ("erf", "bfloat16"): (2.5, 3, 1, 8),
    ("erf", "float16"): (2.85, 2, 3, 11),
    ("erf", "float32"): (3.7, 6, 4, None),
}
"""By function and dtype: limit, degrees of P and Q in z², bits of the significand (None: a bound
for all z).

Of the forms whose error, with that of float32 arithmetic, stays below half of what is allowed, the
one of the fewest operations; the limit is about where its error is least.
"""

FLOAT32_BOUND = 5e-7
POINTS = 400
ROUNDS, SETTLED = 60, 8
"""Of least squares; the weights change once the divisor has settled."""


def allowed(t: Array, bits: int | None) -> Array:
    """The error that t may have: half an ulp of the dtype, or the bound of float32."""
    if bits is None:
        return np.full_like(t, FLOAT32_BOUND)
    return 2.0 ** (np.floor(np.log2(t)) - bits)


def places(squash: Squash, limit: float, bits: int | None) -> Array:
    """Chebyshev points above 0, and both sides of every binade of y, where the ulp jumps."""
    x = limit * (1 - np.cos(np.linspace(0, np.pi, POINTS)))[1:] / 2
    jumps = squash.inverse(2.0 ** -np.arange(1, 2 + (bits or 0)))
    jumps = jumps[jumps < limit]
    return np.unique(np.concatenate([x, jumps * (1 - 1e-7), jumps * (1 + 1e-7)]))


def fit(
    name: str, limit: float, above: int, below: int, bits: int | None
) -> tuple[float, Array, Array]:
    """The error, in what is allowed, and P and Q, lowest power first, P's highest one 1.

    name: of SQUASHES.
    """
    x = places(SQUASHES[name], limit, bits)
    t = SQUASHES[name].value(x)
    scale = allowed(t, bits)
    low, high = (chebyshev.chebvander(2 * (x / limit) ** 2 - 1, n) for n in (above, below))
    numerator, denominator = low * x[:, None], high
    linear = np.hstack([numerator, -denominator * t[:, None]])
    end = np.hstack([np.full(above + 1, limit), -np.ones(below + 1)])  # 1 at the limit
    free = np.linalg.svd(end[None])[2][1:].T
    weights, divisor = np.ones_like(x), np.ones_like(x)
    best, found = np.inf, free[:, 0]
    for turn in range(ROUNDS):
        rows = (linear * (np.sqrt(weights) / (scale * np.abs(divisor)))[:, None]) @ free
        size = np.linalg.norm(rows, axis=0)
        last = np.linalg.svd(np.linalg.qr(rows / size, mode="r"))[2][-1]
        both = free @ (last / size)
        both = both / (denominator[0] @ both[above + 1 :])
        divisor = denominator @ both[above + 1 :]
        errors = np.abs(numerator @ both[: above + 1] / divisor - t) / scale
        if errors.max() < best:
            best, found = errors.max(), both
        if turn >= SETTLED:
            weights *= errors + 1e-3 * errors.max()
            weights /= weights.mean()
    p, q = (powers(part, limit) for part in np.split(found, [above + 1]))
    return float(best), p / p[-1], q / p[-1]


def powers(coefficients: Array, limit: float) -> Array:
    """A Chebyshev series in 2 (z / limit)² - 1 as a polynomial in z²."""
    inner = np.array([-1.0, 2 / limit**2])
    total = np.zeros(1)
    for coefficient in chebyshev.cheb2poly(coefficients)[::-1]:
        total = polynomial.polyadd(polynomial.polymul(total, inner), [coefficient])
    return total[: len(coefficients)]


def evaluate(z: Array, p: Array, q: Array, *, fused: bool) -> Array:
    """z P(z²) / Q(z²) in float32, in the order of the kernels; sums fused with products or not."""
    wide = np.float64 if fused else np.float32  # a product of two float32 is exact in float64

    def polynomial_of(s: Array, coefficients: Array) -> Array:
        total = np.full_like(s, coefficients[-1])
        for coefficient in coefficients[-2::-1]:
            total = (total.astype(wide) * s.astype(wide) + wide(coefficient)).astype(np.float32)
        return total

    s = z * z
    return z * polynomial_of(s, p) / polynomial_of(s, q)


def settle(limit: float, p: Array, q: Array) -> tuple[Array, Array]:
    """In float32; the highest coefficient of Q moved by ulps until z = limit gives 1 exactly."""
    p, q = p.astype(np.float32), q.astype(np.float32)
    z, highest = np.float32([limit]), q[-1:].view(np.int32).copy()
    for step in (sign * ulps for ulps in range(100) for sign in (1, -1)):
        q[-1:] = (highest + np.int32(step)).view(np.float32)
        if all(evaluate(z, p, q, fused=fused)[0] == 1 for fused in (True, False)):
            return p, q
    raise ArithmeticError(f"1 is not met at {limit}")


def main() -> None:
    """Print one entry of the table a function and dtype."""
    for (name, dtype), (limit, above, below, bits) in FORMS.items():
        error, p, q = fit(name, limit, above, below, bits)
        p, q = settle(limit, p, q)
        told = (", ".join(f"{float(value):.9g}" for value in part) for part in (p, q))
        print(f"{name}, {dtype}: limit {limit}, error {error:.3f} of what is allowed")
        for label, values in zip(("above", "below"), told, strict=True):
            print(f"    {label} ({values})")


if __name__ == "__main__":
    main()
