"""Graphs of ONNX: an `onnx_ir.Model`, whose parts ONNX Runtime runs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
from onnx_ir.passes import common as ir_passes

from ..batches import as_arguments
from ..dyt import DytParameters
from ..errors import DataError, RewriteError
from ..files import work_folder
from ..isolation import try_out
from ..runtime import PROVIDERS, Session, parse_provider
from ..sites import NormSite
from ..terms import Alias, Op, Said, Term, Value, speak
from . import onnx_functions
from .base import Batch, Edit, Load, Stored, numpy_dtype
from .onnx_constants import held, is_parameter, scalar, stored
from .onnx_derived import kept
from .onnx_edits import make_edits
from .onnx_files import externals, load, parse, settle, weights_as_inputs
from .onnx_memory import most_bytes, sizes, weight_load
from .onnx_names import Names
from .onnx_prepare import OLDEST_OPSET, prepare, restore
from .onnx_quantize import Format, Product, write_products
from .onnx_rows import lookup
from .onnx_scopes import SCOPES, Scopes
from .onnx_terms import say
from .onnx_validity import check, reading

__all__ = ["OnnxGraph", "read_by"]

Array = npt.NDArray[Any]
Trial = Callable[[], None]

TRIED_BYTES = 1 << 28
"""Weights in other files up to which a file is tried out with them."""

LARGEST_INPUT = 1 << 28
"""Elements of an input that is made up."""


class OnnxGraph:
    """An ONNX model as a graph; see `graphs.base.Graph`. Native values are NumPy arrays."""

    def __init__(
        self, name: str, model: ir.Model, provider: str = "cpu", trial: Trial | None = None
    ) -> None:
        """trial: is called before ONNX Runtime gets any part of the model."""
        self.name = name
        self._model = model
        self._provider = provider
        self._trial = trial
        self._nodes = list(model.graph)
        self._order = {node: place for place, node in enumerate(model.graph.all_nodes())}
        self._scopes = Scopes(model.graph.all_nodes())
        self._values: dict[ir.Value, Value] = {}
        self.terms: list[Term] = []
        constants = set(model.graph.initializers.values())
        inputs = [value for value in model.graph.inputs if value not in constants]
        for value in (*inputs, *constants):
            self._values[value] = _seen(value, constant=value in constants)
        for node in self._nodes:
            self._say(node)
        self.inputs = {str(value.name): self._values[value] for value in inputs}
        self.outputs = {str(v.name): self._values[v] for v in model.graph.outputs}

    @classmethod
    def from_file(cls, path: Path, provider: str = "cpu", folder: Path | None = None) -> OnnxGraph:
        """The graph of an `.onnx` file; its weights stay in their files until needed.

        folder: where external data lies that is not beside it.
        """
        with reading(repr(str(path))):
            model = load(path, folder)
            check(model)
            prepare(model)
            own = folder is not None  # a file that was just written
            beside = sum(tensor.nbytes for tensor in externals(model))
            trial = None if own else _trial(path, provider, whole=beside <= TRIED_BYTES)
            return cls(path.stem, model, provider, trial)

    @classmethod
    def from_model(cls, name: str, model: ir.Model, provider: str = "cpu") -> OnnxGraph:
        """The graph of a model in memory, which stays as it is."""
        with reading(f"model {name!r}"):
            check(model)
            own = model.clone()
            settle(own)
            prepare(own)
            return cls(name, own, provider)

    @cached_property
    def model(self) -> ir.Model:
        """The model itself, with the norms that ONNX Runtime had fused as they were."""
        whole = self._model.clone()
        restore(whole)
        return whole

    @property
    def opset(self) -> int:
        """The version of ONNX's own operators."""
        return self._model.opset_imports.get("", OLDEST_OPSET)

    def apart(self) -> ir.Model:
        """A copy of the model in which no norm is fused; see `onnx_fused`."""
        return self._model.clone()

    def bind(self, batch: Any) -> Batch:
        """A batch by input name: tuples in the order of the model's inputs, dicts by name."""
        args, named = as_arguments(batch)
        rest = [name for name in self.inputs if name not in named]
        if len(args) != len(rest) or len(named) + len(rest) != len(self.inputs):
            told = ", ".join(named) or f"{len(args)} arrays"
            raise DataError(f"a batch holds {told}; the model's inputs: {', '.join(self.inputs)}")
        named |= dict(zip(rest, args, strict=True))
        return {name: _given(value, named[name]) for name, value in self.inputs.items()}

    def example(self) -> Batch | None:
        """Random floats, and zeros and ones, in the declared shapes; None for other inputs, and for
        larger ones than any model takes.

        A dynamic axis has length 2, another symbol the next length.
        """
        random = np.random.default_rng(0)
        lengths: dict[str, int] = {}
        batch = {}
        for name, value in self.inputs.items():
            if value.dtype is None or value.native.shape is None:
                return None
            shape = [
                size if isinstance(size, int) else lengths.setdefault(str(size), 2 + len(lengths))
                for size in value.native.shape
            ]
            if math.prod(shape) > LARGEST_INPUT:
                return None
            dtype = numpy_dtype(value.dtype)
            floating = "float" in value.dtype
            values = random.normal(size=shape) if floating else random.integers(0, 2, shape)
            batch[name] = np.asarray(values).astype(dtype)
        return batch

    def segment(self, start: Sequence[Value], stop: Sequence[Value]) -> OnnxSegment:
        """The nodes between two cuts, as a session of ONNX Runtime."""
        if self._trial is not None:
            self._trial()
        return OnnxSegment(self._model, start, stop, self.between(start, stop), self._provider)

    def loads(
        self,
        cuts: Sequence[tuple[Sequence[Value], Sequence[Value]]],
        batch: Batch,
        shapes: Mapping[str, tuple[int, ...]],
    ) -> list[Load]:
        """What segments take; shapes that are inferred tell."""
        size = sizes(self._model, shapes)
        found = []
        for start, stop in cuts:
            nodes = self.between(start, stop)
            ends = [v.native for v in start], [v.native for v in stop]
            loaded = [node for node in nodes if lookup(node, ends[0]) is None]
            most = most_bytes(nodes, *ends, size) + weight_load(loaded)
            found.append(Load(most, tuple(map(size, ends[1]))))
        return found

    def between(self, start: Sequence[Value], stop: Sequence[Value]) -> list[ir.Node]:
        """The nodes that compute `stop` from `start`, in execution order."""
        known = {value.native for value in start}
        pending = [value.native for value in stop if value.native not in known]
        needed: set[ir.Node] = set()
        while pending:
            value = pending.pop()
            node = value.producer()
            if node is None:
                if value.is_graph_input() and value not in self._model.graph.initializers.values():
                    raise RewriteError(f"a cut of the graph lacks the input {value.name!r}")
                continue
            if node not in needed:
                needed.add(node)
                pending.extend(v for v in read_by(node) if v not in known)
        return sorted(needed, key=self._order.__getitem__)

    def constant(self, value: Value) -> Array | None:
        """A constant's value: from the file, or computed from what the file holds.

        None for one that is no numbers.
        """
        array = held(value.native)
        if array is None and value.native.producer() is None:
            return None
        if array is None:
            (array,) = self.segment([], [value])([])
        return np.asarray(array)

    def to_array(self, native: Any) -> Array:
        """Native values are arrays already."""
        return np.asarray(native)

    def from_array(self, array: Array, like: Value) -> Array:
        """The array in the dtype of `like`."""
        return array.astype(numpy_dtype(like.dtype), copy=False)

    def replace(
        self, replacements: Iterable[tuple[NormSite, DytParameters]], edits: Iterable[Edit] = ()
    ) -> OnnxGraph:
        """A new graph with DyT at the given sites; the other weights are shared, not copied."""
        model, copies = self._copied()
        names = Names.of_values(model)

        def hold(stored: Stored) -> ir.Value:
            return _initializer(model.graph, names, kept(stored, self.constant))

        make_edits(model.graph, copies, edits, hold)
        for site, parameters in replacements:
            _put(model, copies, names, site, parameters)
        onnx_functions.declare(model)
        ir_passes.RemoveUnusedNodesPass()(model)
        return OnnxGraph(self.name, model, self._provider, self._trial)

    def revise(self, edits: Iterable[Edit]) -> OnnxGraph:
        """A new graph with the edits made; the other weights are shared, not copied."""
        return self.replace((), edits)

    def quantize(self, products: Iterable[Product], form: Format, *, shared: bool) -> OnnxGraph:
        """A new graph with these products of its own over few bits; the other weights are shared.

        Where the scales are from, how biases are kept, and `shared` is in `onnx_quantize`.
        """
        model, copies = self._copied()
        own = [replace(p, output=copies[p.output]) for p in products]
        write_products(model, own, form, shared=shared)
        ir_passes.RemoveUnusedNodesPass()(model)
        return OnnxGraph(self.name, model, self._provider, self._trial)

    def _copied(self) -> tuple[ir.Model, dict[ir.Value, ir.Value]]:
        """A copy of the model that shares its weights, and its values by those of the model."""
        model = self._model.clone()
        copies: dict[ir.Value, ir.Value] = {}
        for old, new in zip(self._nodes, model.graph, strict=True):
            copies.update(zip(old.outputs, new.outputs, strict=True))
        copies.update(zip(self._model.graph.inputs, model.graph.inputs, strict=True))
        for name, value in self._model.graph.initializers.items():
            copies[value] = model.graph.initializers[name]
        return model, copies

    def _say_nested(self, node: ir.Node) -> None:
        """The insides of If, Loop and Scan: seen, so that norms there can be refused."""
        for graph in _subgraphs(node):
            for value in (*graph.inputs, *graph.initializers.values()):
                self._values[value] = _seen(value, constant=value.is_initializer())
            for inner in graph:
                self._say(inner, within=node.op_type)

    def _say(self, node: ir.Node, within: str = "") -> None:
        self._say_nested(node)
        if node.op_type == "Constant" and node.domain == "":
            self._values[node.outputs[0]] = _seen(node.outputs[0], constant=True)
            return
        for place, output in enumerate(node.outputs):
            said = say(node, place)
            if isinstance(said, Alias) and said.operand in self._values:
                self._values[output] = self._values[said.operand]
                continue
            value = self._values[output] = _seen(output)
            meant = said if isinstance(said, Said) else None
            meant = meant or Said(Op.OPAQUE, tuple(read_by(node)))
            self.terms += speak(
                meant, value, self._operand,
                index=self._order[node], scope=self._scopes(node), label=node.op_type,
                within=within, reads=[self._values[x] for x in node.inputs if x is not None],
            )  # fmt: skip

    def _operand(self, operand: Any) -> Value | float | None:
        """An operand as a value; as a number, where it is the length of an axis that is fixed."""
        if not isinstance(operand, ir.Value):
            return None if operand is None else float(operand)
        value = self._values[operand]
        computed = not value.constant and value.shape in (None, (), (1,))
        number = scalar(operand) if computed else None
        return value if number is None else number


class OnnxSegment:
    """A part of a model as a session of ONNX Runtime."""

    def __init__(
        self,
        model: ir.Model,
        start: Sequence[Value],
        stop: Sequence[Value],
        nodes: Sequence[ir.Node],
        provider: str,
    ) -> None:
        self._passed = [value.native for value in start]
        self._stop = [value.native for value in stop]
        apart = {node: found for node in nodes if (found := lookup(node, self._passed))}
        self._lookups = list(apart.values())
        nodes = [node for node in nodes if node not in apart]
        looked_up = {found.output: None for found in self._lookups}
        made = {output for node in nodes for output in node.outputs}
        self._outputs = [value for value in dict.fromkeys(self._stop) if value in made]
        self._constants = {
            value: np.asarray(tensor.numpy())
            for value in self._stop
            if value not in {*made, *looked_up} and (tensor := stored(value)) is not None
        }
        read = {value for node in nodes for value in read_by(node)}
        self._inputs = [value for value in (*self._passed, *looked_up) if value in read]
        self._session: Session | None = None
        if nodes and self._outputs:
            initializers = [
                v for v in model.graph.initializers.values() if v in read and v not in self._inputs
            ]
            view = ir.GraphView(
                self._inputs, self._outputs, nodes=nodes, initializers=initializers,
                opset_imports=model.opset_imports, name="segment",
            )  # fmt: skip
            part = ir.Model(
                view.clone(), ir_version=model.ir_version,
                functions=[function.clone() for function in model.functions.values()],
            )  # fmt: skip
            self._session = Session(part, provider)

    def __call__(self, values: Sequence[Any]) -> list[Any]:
        """Values of the later cut."""
        known: dict[ir.Value, Any] = {
            **self._constants, **dict(zip(self._passed, values, strict=True))
        }  # fmt: skip
        known |= {found.output: found(known[found.places]) for found in self._lookups}
        if self._session is not None:
            results = self._session.run([known[value] for value in self._inputs])
            known.update(zip(self._outputs, results, strict=True))
        return [known[value] for value in self._stop]


def _trial(path: Path, provider: str, *, whole: bool) -> Trial:
    """Loads a file where it can end no process but its own; once, if it goes well.

    whole: with its weights, of which ONNX Runtime makes three times as much memory.
    """

    def load_apart() -> None:
        providers = PROVIDERS[parse_provider(provider)[0]]
        if whole:
            try_out(path, providers)
            return
        with work_folder() as folder:
            proto, _ = parse(path)
            weights_as_inputs(proto)
            onnx.save(proto, folder / path.name)
            try_out(path, providers, folder / path.name)

    return cache(load_apart)


def _put(
    model: ir.Model,
    copies: dict[ir.Value, ir.Value],
    names: Names,
    site: NormSite,
    parameters: DytParameters,
) -> None:
    """Let every reader of the site's output read DyT of its input; its input, of an identity."""
    graph = model.graph
    source, end = copies[site.input.native], copies[site.output.native]
    gamma = None if site.gamma is None else site.gamma.native
    dtype = source.dtype or end.dtype or (gamma and gamma.dtype) or ir.DataType.FLOAT
    held, nodes, result = [], list[ir.Node](), source
    for name, array in parameters.named().items():
        kept = ir.DataType.FLOAT if name in ("alpha", "shift") else dtype
        tensor = ir.tensor(array.astype(kept.numpy()), dtype=kept, name=f"{site.name}.{name}")
        held.append(_initializer(graph, names, tensor))
    final = str(end.name)
    if not parameters.affine:
        made = names.free(f"{final}_dyt")
        nodes.append(onnx_functions.call(parameters.form(), [source, *held], made))
        result = nodes[0].outputs[0]
        result.shape, result.type = end.shape, source.type
    if end.dtype is not None and source.dtype is not None and end.dtype != source.dtype:
        nodes.append(ir.Node("", "Cast", [result], [ir.AttrInt64("to", end.dtype.value)]))
        result = nodes[-1].outputs[0]
    if nodes:
        result.shape, result.type = end.shape, end.type
    producer = end.producer()
    if producer is None:
        raise RewriteError(f"site {site.name!r} has no node that makes its output")
    for place, added in enumerate(nodes):
        graph.insert_after(producer if place == 0 else nodes[place - 1], added)
    end.replace_all_uses_with(result, replace_graph_outputs=True)
    if nodes and result.is_graph_output():
        end.name, result.name = names.free(f"{final}_norm"), final
    _copy_scope(producer, nodes)
    copies[site.output.native] = result  # a later site may read this one


def _initializer(graph: ir.Graph, names: Names, tensor: ir.TensorProtocol) -> ir.Value:
    name = names.free(str(tensor.name))
    value = ir.Value(
        name=name, shape=ir.Shape(tensor.shape.numpy()), type=ir.TensorType(tensor.dtype),
        const_value=tensor,
    )  # fmt: skip
    graph.register_initializer(value)
    return value


def _copy_scope(source: ir.Node, nodes: Iterable[ir.Node]) -> None:
    if SCOPES in source.metadata_props:
        for node in nodes:
            node.metadata_props[SCOPES] = source.metadata_props[SCOPES]


def read_by(node: ir.Node) -> list[ir.Value]:
    """What a node reads, values that its subgraphs take from outside included."""
    values = [value for value in node.inputs if value is not None]
    for graph in _subgraphs(node):
        values.extend(_captured(graph))
    return values


def _subgraphs(node: ir.Node) -> Iterator[ir.Graph]:
    for attribute in node.attributes.values():
        if attribute.type is ir.AttributeType.GRAPH:
            yield attribute.as_graph()
        elif attribute.type is ir.AttributeType.GRAPHS:
            yield from attribute.as_graphs()


def _captured(graph: ir.Graph) -> list[ir.Value]:
    own = {*graph.inputs, *graph.initializers.values()}
    own.update(output for node in graph for output in node.outputs)
    read = [value for node in graph for value in read_by(node)]
    return [value for value in (*read, *graph.outputs) if value not in own]


def _seen(value: ir.Value, *, constant: bool = False) -> Value:
    shape: tuple[int | None, ...] | None = None
    if value.shape is not None:
        shape = tuple(n if isinstance(n, int) and n >= 0 else None for n in value.shape)
    elif constant and value.const_value is not None:
        shape = tuple(value.const_value.shape.numpy())
    dtype = None if value.dtype in (None, ir.DataType.UNDEFINED) else _name(value.dtype)
    number = scalar(value) if constant else None
    # A learned number and a literal are both initializers; exporters give the learned one the
    # path of its module, and axes.
    learned = constant and value.is_initializer() and (shape != () or is_parameter(value))
    return Value(
        value, str(value.name), shape, dtype, constant=constant, parameter=learned, scalar=number
    )


def _given(value: Value, given: Any) -> Array:
    """What a batch gives for an input. Raises DataError where it cannot be that."""
    try:
        array = np.asarray(given.numpy() if hasattr(given, "numpy") else given)
    except ValueError as error:
        raise DataError(f"input {value.name!r} is given lists of unequal lengths") from error
    # Strings and objects are of models that take text alone; bfloat16 is "V", as records are.
    kinds = "OUS" if value.dtype == "object" else "biufV"
    fits = array.dtype.kind in kinds and array.dtype.type is not np.void
    if not fits or (value.shape is not None and len(value.shape) != array.ndim):
        sizes = "any shape" if value.shape is None else [n or "any" for n in value.shape]
        raise DataError(
            f"input {value.name!r} takes {value.dtype} of {sizes}; a batch has {array.dtype} of "
            f"{list(array.shape)}"
        )
    return array


@cache
def _name(dtype: ir.DataType) -> str:
    """NumPy's name of a dtype, which NumPy makes anew each time."""
    return str(dtype.numpy().name)
