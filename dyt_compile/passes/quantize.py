"""Quantize: what reads the bounded output of a DyT computes over eight bits, without calibration.

After folding, a site puts out tanh(alpha x), which lies in (-1, 1) whatever the data; its scale is
known beforehand, and so is that of gamma tanh(alpha x) + beta. Weights are quantised per output
channel, symmetrically. Works on ONNX graphs alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from math import prod
from types import MappingProxyType
from typing import Any

from ..bounds import Bound, bounds
from ..channels import spoken, takes_value
from ..constants import is_fixed, is_quantised
from ..errors import OptionError, RewriteError
from ..graphs.onnx import OnnxGraph
from ..graphs.onnx_quantize import FORMATS, Product
from ..sites import Match, NormSite
from ..terms import Op, Term, Value

__all__ = [
    "RUNTIMES",
    "WITHOUT_FUNCTIONS",
    "Quantization",
    "QuantizedSite",
    "Unquantized",
    "check_eight_bits",
    "quantize",
]

FLOATS = ("float32", "float16", "bfloat16")
"""What QuantizeLinear reads; before opset 19 the first alone."""

EVERY_FLOAT = 19

NODES = ("MatMul", "Gemm", "Conv")
"""What is written over eight bits; Einsum, too, may be a product."""


def _any(term: Term) -> str | None:
    """ONNX Runtime runs a grouped convolution of dequantised numbers 20 times slower."""
    grouped = term.op is Op.CONVOLUTION and term.attributes["groups"] > 1
    return "a grouped convolution, which not every runtime has in integers" if grouped else None


def _onnxruntime(term: Term) -> str | None:
    """QLinearConv wants the scale of its output; ConvInteger is slower than float32."""
    if term.op is Op.CONVOLUTION:
        return "a convolution, which ONNX Runtime has in integers for calibrated outputs alone"
    return None


def _every(term: Term) -> str | None:
    return None


RUNTIMES: Mapping[str, Callable[[Term], str | None]] = {
    "any": _any, "onnxruntime": _onnxruntime, "openvino": _every, "tensorrt": _every
}  # fmt: skip
"""Who the file is for, and why a product is left in float for it."""

WITHOUT_FUNCTIONS = ("openvino",)
"""Runtimes that read no functions of a model: for them every DyT is spelled out."""

SHARING = ("openvino", "tensorrt")
"""Runtimes in which several products may read one QuantizeLinear; see `onnx_quantize`."""

WITH_FP8 = ("any", "tensorrt")
"""Runtimes with kernels for FP8; elsewhere such a file runs, and slower than it was."""


@dataclass(frozen=True)
class QuantizedSite:
    """A site whose readers were quantised: its largest absolute value, and those products."""

    name: str
    bound: float
    into: tuple[str, ...]


@dataclass(frozen=True)
class Unquantized:
    """A site, and why a product that reads it, or all of them, stayed in float.

    product: which, as of `Quantization`; None for all that read the site.
    """

    name: str
    reason: str
    product: str | None = None


@dataclass(frozen=True, eq=False)
class Quantization:
    """What `quantize` returns: the quantised model, and what of it is quantised.

    dtype: "int8" or "fp8"; runtime: who it is for; weights: how many elements the weight has of
    each product that is quantised; kept: why others that could be were to stay in float. Products
    are known by the module that they belong to, where the file says that: in every opset the same.
    """

    graph: OnnxGraph = field(repr=False)
    dtype: str
    runtime: str
    weights: Mapping[str, int]
    sites: tuple[QuantizedSite, ...]
    left: tuple[Unquantized, ...]
    kept: Mapping[str, str] = field(default_factory=dict)

    @property
    def products(self) -> int:
        """How many products are quantised."""
        return len(self.weights)

    @property
    def model(self) -> Any:
        """The quantised model, an `onnx_ir.Model`."""
        return self.graph.model


def check_eight_bits(dtype: Any, runtime: Any) -> None:
    """Raise OptionError for what is not allowed; dtype None is, for nothing quantised."""
    if dtype is not None and dtype not in FORMATS:
        raise OptionError(f"quantize is {dtype!r}; allowed: {', '.join(FORMATS)}")
    if runtime not in RUNTIMES:
        raise OptionError(f"runtime is {runtime!r}; allowed: {', '.join(RUNTIMES)}")
    if dtype == "fp8" and runtime not in WITH_FP8:
        raise OptionError(
            f"quantize is 'fp8' and runtime {runtime!r}, which has no FP8 kernels; allowed with "
            f"fp8: {', '.join(WITH_FP8)}"
        )


def quantize(
    graph: OnnxGraph,
    found: Match,
    dtype: str,
    runtime: str = "any",
    kept: Mapping[str, str] = MappingProxyType({}),
) -> Quantization:
    """The graph with every product of a DyT's output and a weight over eight bits.

    found: the norms and DyT of `graph`, which itself stays as it is; the weights of other products
    are shared. kept: products that stay in float all the same, and why, as of `Quantization`.
    Raises OptionError for a dtype or a runtime that is not allowed, and RewriteError where the
    model's opset has no such type.
    """
    check_eight_bits(dtype, runtime)
    form, opset = FORMATS[dtype], graph.opset
    if opset < form.opset:
        raise RewriteError(f"{dtype} needs opset {form.opset}; the model has opset {opset}")
    bounded = bounds(graph.terms, found.sites, graph.constant)
    reads = _reads(bounded)
    names = _names(reads)
    refused = {
        term: reason
        for term in reads
        if (reason := _refused(term, opset) or RUNTIMES[runtime](term)) is not None
    }
    if unknown := sorted(set(kept).difference(names.values())):
        raise RewriteError(f"{unknown[0]!r} is no product that reads a DyT")
    asked = {t: f"`{name}`, {kept[name]}" for t, name in names.items() if name in kept}
    refused = asked | refused
    taken = {term: bound for term, bound in reads.items() if term not in refused}
    products = [_product(graph, term, bound) for term, bound in taken.items()]
    return Quantization(
        graph.quantize(products, form, shared=runtime in SHARING),
        dtype,
        runtime,
        {names[term]: _elements(term) for term in taken},
        tuple(_quantized(found.sites, bounded, {names[term]: b for term, b in taken.items()})),
        tuple(_left(found.sites, bounded, taken, refused, names)),
        dict(kept),
    )


def _reads(bounded: Mapping[Value, Bound]) -> dict[Term, Bound]:
    """Every product and convolution of a bounded value, in execution order."""
    found = {
        term: bound
        for value, bound in bounded.items()
        for term in value.consumers
        if term.op in (Op.MATMUL, Op.CONVOLUTION)
    }
    return dict(sorted(found.items(), key=lambda read: read[0].index))


def _names(terms: Iterable[Term]) -> dict[Term, str]:
    """The module that each product belongs to, numbered as sites are where it has several."""
    counts: Counter[str] = Counter()
    names = {}
    for term in terms:
        name = term.scope or term.output.name
        counts[name] += 1
        names[term] = name if counts[name] == 1 else f"{name}#{counts[name]}"
    return names


def _elements(term: Term) -> int:
    """How many elements the weight of a product has."""
    return prod(size or 1 for size in term.operands[1].shape or ())


def _refused(term: Term, opset: int) -> str | None:
    """Why no runtime could have the product over few bits."""
    x, weight = term.inputs[:2]
    named = f"`{term.output.name}`"
    if not isinstance(x, Value) or not isinstance(weight, Value):
        return spoken(term)
    if is_fixed(x):
        return f"{named}, whose weight stands before it"
    if not is_fixed(weight):
        return f"the product with another activation {named}"
    if is_quantised(weight):
        return f"the quantised weight of {named}"
    if term.label not in NODES or term.within or weight.shape is None:
        return spoken(term)
    if term.op is Op.MATMUL and len(weight.shape) != 2:
        return f"{named}, whose weight is no matrix"
    allowed = FLOATS if opset >= EVERY_FLOAT else FLOATS[:1]
    if x.dtype not in allowed:
        return f"{named} in {x.dtype}, which QuantizeLinear of opset {opset} does not read"
    return None


def _product(graph: OnnxGraph, term: Term, bound: Bound) -> Product:
    weight = term.inputs[1]
    array = graph.constant(weight) if isinstance(weight, Value) else None
    if array is None:
        raise RewriteError(f"the weight of {term.output.name!r} is not loaded")
    return Product(term.output.native, array, bound.largest)


def _quantized(
    sites: Iterable[NormSite], bounded: Mapping[Value, Bound], taken: Mapping[str, Bound]
) -> Iterator[QuantizedSite]:
    for site in sites:
        into = [name for name, bound in taken.items() if site.name in bound.sites]
        if into:
            yield QuantizedSite(site.name, bounded[site.output].largest, tuple(into))


def _left(
    sites: Iterable[NormSite],
    bounded: Mapping[Value, Bound],
    taken: Mapping[Term, Bound],
    refused: Mapping[Term, str],
    names: Mapping[Term, str],
) -> Iterator[Unquantized]:
    """What stayed in float: products that a runtime does not have, and sites without any."""
    for site in sites:
        if site.output not in bounded:
            norm = "its norm stays, whose output has no bound that is known without data"
            yield Unquantized(site.name, "no bound of it is known" if site.kind.lossless else norm)
            continue
        mine = {value for value, bound in bounded.items() if site.name in bound.sites}
        products = [t for t, reason in refused.items() if mine.intersection(t.operands)]
        for term in products:
            yield Unquantized(site.name, f"read by {refused[term]}", names[term])
        if not products and not any(site.name in bound.sites for bound in taken.values()):
            yield Unquantized(site.name, _without_product(mine))


def _without_product(values: Collection[Value]) -> str:
    """Why no product reads what is bounded: who reads it instead."""
    readers = {t for v in values for t in v.consumers if takes_value(t) and t.output not in values}
    told = dict.fromkeys(spoken(term) for term in sorted(readers, key=lambda term: term.index))
    return f"read by {', '.join(told)}" if told else "it is the model's output"
