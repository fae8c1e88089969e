"""Graphs of torch: an exported program's `GraphModule`, run node by node."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import cache
from itertools import count
from operator import getitem
from types import MappingProxyType
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import torch
from torch.utils import _pytree as pytree

from ..batches import as_arguments
from ..dyt import DytParameters
from ..errors import DataError, RewriteError, first_line
from ..nn import operator, parameter
from ..sites import NormSite
from ..terms import Alias, Op, Said, Term, Value, speak
from ..weights import Weights
from .base import Batch, Edit, Load
from .fx_constants import attribute, scalar_of
from .fx_edits import make_edits, targets
from .fx_memory import Tally
from .fx_regions import is_write, subgraphs
from .fx_terms import say
from .fx_weights import Holder

__all__ = [
    "FxGraph",
    "ancestors",
    "argument_paths",
    "as_tensor",
    "automatic_axes",
    "path_name",
]

Array = npt.NDArray[Any]

NO_EFFECT = {"aten::_assert_tensor_metadata"}
"""Nodes that check what tracing saw, and compute nothing."""

AS_OTHER = {"aten::type_as", "aten::view_as", "aten::expand_as", "aten::reshape_as"}
"""Nodes that read the dtype or the shape of a second operand, where that may be known."""


LOOKUP = torch.ops.aten.embedding.default


class FxGraph:
    """A torch model as a graph; see `graphs.base.Graph`.

    module: a GraphModule of aten operators, parameters as `get_attr` nodes.
    args, kwargs: the example it was traced with; needed to export it again.
    weights: placeholders that hold weights, as Dynamo lifts them: their path and whether learned.
    stored: where the weights lie that the module has on the meta device; a segment reads its own.
    """

    def __init__(
        self,
        name: str,
        module: torch.fx.GraphModule,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        weights: Mapping[torch.fx.Node, tuple[str, bool]] = MappingProxyType({}),
        stored: Weights | None = None,
    ) -> None:
        self.name = name
        self.args = args
        self.kwargs = kwargs
        self._module = module
        self._weights = weights
        self._stored = stored
        self._holder = Holder(module, stored)
        for node in list(module.graph.nodes):
            _simplify(module.graph, node)
        self._order: dict[torch.fx.Node, int] = {}  # with those of its subgraphs
        self._places = count()
        self._values: dict[torch.fx.Node, Value] = {}
        self.terms: list[Term] = []
        for node in module.graph.nodes:
            self._say(node, module)
        placeholders = [n for n in module.graph.nodes if n.op == "placeholder" and n not in weights]
        self.inputs = {str(n.target): self._values[n] for n in placeholders}
        self.outputs = self._name_outputs()

    @property
    def model(self) -> torch.fx.GraphModule:
        """The module itself, called like the model that it was traced from."""
        return self._module

    def value_of(self, node: torch.fx.Node) -> Value | None:
        """The value that a node of the module computes, None for nodes without one."""
        return self._values.get(node)

    def program(self) -> torch.export.ExportedProgram:
        """The module as an exported program again, with the dynamic axes that it has."""
        symbolic = [
            {axis for axis, size in enumerate(value.shape or ()) if size is None}
            for value in self.inputs.values()
        ]
        module = _with_made_outputs(self._module)
        shapes = automatic_axes(module.forward, self.args, self.kwargs, symbolic)
        return torch.export.export(
            module, self.args, self.kwargs, dynamic_shapes=shapes, strict=False
        )

    def bind(self, batch: Any) -> Batch:
        """A batch by input name: tuples hold positional arguments, dicts keyword arguments.

        Arguments are known by their names in `forward`, not by the order of the batch.
        """
        args, kwargs = as_arguments(batch)
        if not args and set(kwargs) == set(self.inputs):
            leaves = [kwargs[name] for name in self.inputs]
        else:
            leaves = self._leaves(args, kwargs)
        return {
            name: as_tensor(leaf) if isinstance(leaf, np.ndarray) else leaf
            for name, leaf in zip(self.inputs, leaves, strict=True)
        }

    def _leaves(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
        """What a batch holds, in the order of the inputs; raises DataError unless all fit."""
        try:
            given = argument_paths(self._module.forward, args, kwargs)
            expected = argument_paths(self._module.forward, self.args, self.kwargs)
        except TypeError:  # arguments that `forward` does not take
            given, expected = {}, {}
        if set(given) != set(expected) or len(expected) != len(self.inputs):
            told = [f"{len(args)} by place"] if args else []
            told += kwargs
            raise DataError(
                f"a batch holds {', '.join(told) or 'nothing'}; "
                f"the model's inputs: {', '.join(self.inputs)}"
            )
        return [given[path] for path in expected]

    def example(self) -> Batch | None:
        """The inputs that the module was traced with."""
        return self.bind((self.args, self.kwargs)) if self.args or self.kwargs else None

    def segment(self, start: Sequence[Value], stop: Sequence[Value]) -> FxSegment:
        """The nodes between two cuts."""
        return self._segment(start, stop, self._holder)

    def loads(
        self,
        cuts: Sequence[tuple[Sequence[Value], Sequence[Value]]],
        batch: Batch,
        shapes: Mapping[str, tuple[int, ...]],
    ) -> list[Load]:
        """What segments take; a dry run over tensors without numbers tells."""
        tally = Tally(self._module, self._stored)
        known = {
            value: tally.empty(shapes[name], batch[name].dtype) if name in shapes else batch[name]
            for name, value in self.inputs.items()
        }
        found = []
        for start, stop in cuts:
            run = self._segment(start, stop, tally)
            try:
                load, results = tally.run(run, [known[value] for value in start])
            except DataError as error:
                raise RewriteError(f"without data no shape is known: {error}") from error
            known |= dict(zip(stop, results, strict=True))
            found.append(load)
        return found

    def _segment(self, start: Sequence[Value], stop: Sequence[Value], holder: Holder) -> FxSegment:
        known = {value.native for value in start}
        needed = ancestors([value.native for value in stop], known)
        nodes = sorted(needed - known, key=self._order.__getitem__)
        missing = [node for node in nodes if node.op == "placeholder"]
        if missing:
            raise RewriteError(f"a cut of the graph lacks the input {missing[0].target!r}")
        ends = [v.native for v in start], nodes, [v.native for v in stop]
        return FxSegment(self._module, *ends, holder)

    def constant(self, value: Value) -> Array | None:
        """A constant's value, in float32 where it was bfloat16; None on meta tensors."""
        (tensor,) = self.segment([], [value])([])
        return None if tensor.is_meta else self.to_array(tensor)

    def to_array(self, native: Any) -> Array:
        """A tensor (of any device) as an array; numbers as arrays without axes."""
        if not isinstance(native, torch.Tensor):
            return np.asarray(native)
        tensor = native.detach().cpu()
        if tensor.dtype is torch.bfloat16:
            return tensor.contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
        return tensor.numpy()

    def from_array(self, array: Array, like: Value) -> torch.Tensor:
        """A tensor of the dtype of `like`, on the model's device."""
        dtype = getattr(torch, like.dtype or "float32")
        return as_tensor(array).to(self._device(), dtype)

    def replace(
        self, replacements: Iterable[tuple[NormSite, DytParameters]], edits: Iterable[Edit] = ()
    ) -> FxGraph:
        """A new graph with DyT at the given sites; other parameters are shared, not copied."""
        graph, copies = self._copied()
        held = make_edits(graph, copies, edits)
        calls = [(site, values, _put(graph, copies, site, values)) for site, values in replacements]
        graph.eliminate_dead_code()
        used = {node: stored for node, stored in held.items() if node.users}
        attributes = self._attributes(graph, set(used))
        for node, path in targets(used, attributes).items():
            node.target = path
            dtype = getattr(torch, used[node].dtype)
            given = used[node].given(self.constant)
            parts = [
                as_tensor(part).to(self._device(), dtype, copy=True)
                for part in used[node].parts(given)
            ]
            tensor = parts[0] if len(parts) == 1 else torch.cat(parts)
            attributes[path] = torch.nn.Parameter(tensor, requires_grad=dtype.is_floating_point)
        for site, values, call in calls:
            if call is not None:
                attributes |= self._attach(graph, call, site, values, attributes)
        return self._over(attributes, graph)

    def revise(self, edits: Iterable[Edit]) -> FxGraph:
        """A new graph with the edits made; other parameters are shared, not copied."""
        return self.replace((), edits)

    def with_weights(self, weights: Mapping[str, torch.Tensor]) -> FxGraph:
        """A new graph that holds these weights under their paths; all others are shared."""
        graph, _ = self._copied()
        return self._over(self._attributes(graph) | dict(weights), graph)

    def _copied(self) -> tuple[torch.fx.Graph, dict[torch.fx.Node, torch.fx.Node]]:
        """A copy of the module's graph, and its nodes by those of the module."""
        graph = torch.fx.Graph()
        copies: dict[torch.fx.Node, torch.fx.Node] = {}
        graph.output(graph.graph_copy(self._module.graph, copies))
        graph._codegen = copy.deepcopy(self._module.graph._codegen)
        return graph, copies

    def _attributes(
        self, graph: torch.fx.Graph, but: Collection[torch.fx.Node] = ()
    ) -> dict[str, Any]:
        """What the nodes of a copy read from the module; what they write to is copied, too."""
        written = _written(graph)
        held = {
            str(node.target): attribute(self._module, str(node.target))
            for node in graph.nodes
            if node.op in ("get_attr", "call_module") and node not in but
        }
        return held | {path: held[path].detach().clone() for path in written}

    def _over(self, attributes: dict[str, Any], graph: torch.fx.Graph) -> FxGraph:
        """The graph of a module that holds the attributes."""
        module = torch.fx.GraphModule(attributes, graph)
        module.train(self._module.training)
        return FxGraph(self.name, module, self.args, self.kwargs, stored=self._stored)

    def _attach(
        self,
        graph: torch.fx.Graph,
        call: torch.fx.Node,
        site: NormSite,
        parameters: DytParameters,
        taken: Mapping[str, Any],
    ) -> dict[str, torch.nn.Parameter]:
        """Give a DyT node its values, as parameters under the site's path."""
        path = site.name.replace("#", "_call")
        while any(f"{target}.".startswith(f"{path}.") for target in taken):
            path += "_dyt"  # the norm's own parameters have another reader
        dtype = getattr(torch, site.dtype or "float32")
        held = {
            f"{path}.{name}": parameter(value, name, dtype, self._device())
            for name, value in parameters.named().items()
        }
        with graph.inserting_before(call):
            call.args = (*call.args, *map(graph.get_attr, held))
        return held

    def _say_nested(self, node: torch.fx.Node, module: torch.fx.GraphModule) -> None:
        """The insides of cond, scan and while_loop: seen, so that norms there can be refused."""
        bodies, operands = subgraphs(module, node)
        for body in bodies:
            inputs = body.graph.find_nodes(op="placeholder")
            for inner, operand in zip(inputs, operands, strict=True):
                self._values[inner] = self._value(inner, body, self._values.get(operand))
            for inner in body.graph.nodes:
                if inner.op != "placeholder" and _schema_name(inner) not in NO_EFFECT:
                    self._say(inner, body, within=_label(node))

    def _say(self, node: torch.fx.Node, module: torch.fx.GraphModule, within: str = "") -> None:
        if node.op == "output":
            return
        self._say_nested(node, module)
        self._order[node] = next(self._places)
        said = say(node) if node.op == "call_function" else None
        if isinstance(said, Alias):
            self._values[node] = self._values[said.operand]
            return
        value = self._values[node] = self._value(node, module)
        if node.op in ("placeholder", "get_attr"):
            return
        meant = said or Said(Op.OPAQUE, tuple(node.all_input_nodes))
        self.terms += speak(
            meant, value, self._known,
            index=self._order[node], scope=_scope(node), label=_label(node), within=within,
            reads=[self._values[x] for x in _reads(node, said)],
        )  # fmt: skip

    def _known(self, operand: Any) -> Value | float | None:
        if isinstance(operand, torch.fx.Node):
            return self._values[operand]
        return None if operand is None else float(operand)

    def _value(
        self, node: torch.fx.Node, module: torch.fx.GraphModule, outside: Value | None = None
    ) -> Value:
        """The value of a node of `module`; outside: what a subgraph's input is given."""
        if node.op == "get_attr":
            tensor = attribute(module, str(node.target))
            if isinstance(tensor, torch.Tensor):
                learned = isinstance(tensor, torch.nn.Parameter)
                return Value(
                    node, str(node.target), tuple(tensor.shape), _dtype_name(tensor.dtype),
                    constant=True, parameter=learned,
                    scalar=None if learned or tensor.numel() != 1 or tensor.is_meta
                    else float(tensor),
                )  # fmt: skip
        shape: tuple[int | None, ...] | None = None
        dtype: str | None = None
        seen = node.meta.get("val")
        if isinstance(seen, torch.Tensor):
            shape = tuple(map(_length, seen.shape))
            dtype = _dtype_name(seen.dtype)
        if outside is not None and outside.constant:
            return Value(
                node, outside.name, shape or outside.shape, dtype or outside.dtype,
                constant=True, parameter=outside.parameter, scalar=outside.scalar,
            )  # fmt: skip
        scalar = scalar_of(node) if node.op == "call_function" else None
        if node in self._weights:
            path, learned = self._weights[node]
            return Value(node, path, shape, dtype, constant=True, parameter=learned)
        constant = node.op == "get_attr" or scalar is not None
        return Value(node, node.name, shape, dtype, constant=constant, scalar=scalar)

    def _output_node(self) -> torch.fx.Node:
        last: torch.fx.Node = next(iter(reversed(self._module.graph.nodes)))
        return last

    def _name_outputs(self) -> dict[str, Value]:
        results = self._output_node().args[0]
        nodes = results if isinstance(results, (tuple, list)) else (results,)
        names = _output_names(self._module, len(nodes))
        return {
            name: self._values[node]
            for name, node in zip(names, nodes, strict=True)
            if isinstance(node, torch.fx.Node)
        }

    def _device(self) -> torch.device:
        devices = (p.device for p in self._module.parameters() if not p.is_meta)
        return next(devices, torch.device("cpu"))


class FxSegment:
    """Nodes of a GraphModule, run in order; what is used no more is released at once.

    Weights that lie in files are read when they are first used, and go with the segment; of tables
    in which rows are looked up (embeddings), only those rows are read.
    """

    def __init__(
        self,
        module: torch.fx.GraphModule,
        start: Sequence[torch.fx.Node],
        nodes: Sequence[torch.fx.Node],
        stop: Sequence[torch.fx.Node],
        holder: Holder,
    ) -> None:
        self._module = module
        self._holder = holder
        self._whole = cache(holder.whole)
        self._start = start
        self._nodes = nodes
        self._stop = stop
        last_use: dict[torch.fx.Node, torch.fx.Node] = {}
        for node in nodes:
            for operand in node.all_input_nodes:
                last_use[operand] = node
        own = set(nodes)
        self._tables = {node for node in nodes if _is_table(node, own, holder)}
        kept = set(stop)
        self._released: dict[torch.fx.Node, list[torch.fx.Node]] = {}
        for operand, node in last_use.items():
            if operand not in kept:
                self._released.setdefault(node, []).append(operand)

    @torch.no_grad()
    def __call__(self, values: Sequence[Any]) -> list[Any]:
        """Values of the later cut."""
        env = dict(zip(self._start, values, strict=True))
        for node in self._nodes:
            try:
                env[node] = self._run(node, env)
            except (RuntimeError, IndexError, TypeError, ValueError) as error:
                raise DataError(
                    f"the model cannot run on a batch: {node.name}: {first_line(error)}"
                ) from error
            for operand in self._released.get(node, ()):
                del env[operand]
        return [env[node] for node in self._stop]

    def _run(self, node: torch.fx.Node, env: Mapping[torch.fx.Node, Any]) -> Any:
        if node in self._tables:
            return str(node.target)
        if node.op == "get_attr":
            return self._whole(str(node.target))
        if node.target is LOOKUP and node.args[0] in self._tables:
            table, places = node.all_input_nodes
            return self._holder.rows(env[table], env[places])
        args = torch.fx.node.map_arg(node.args, env.__getitem__)
        kwargs = torch.fx.node.map_arg(node.kwargs, env.__getitem__)
        if node.op == "call_module":
            return self._module.get_submodule(str(node.target))(*args, **kwargs)
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        return node.target(*args, **kwargs)  # type: ignore[operator]


def _is_table(node: torch.fx.Node, own: set[torch.fx.Node], holder: Holder) -> bool:
    """Whether a weight lies in a file, and a segment does nothing with it but look up rows."""
    if node.op != "get_attr":
        return False
    readers = [reader for reader in node.users if reader in own]
    return (
        bool(readers)
        and all(r.target is LOOKUP and r.args[0] is node is not r.args[1] for r in readers)
        and holder.stored(str(node.target)) is not None
    )


def argument_paths(
    forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[tuple[Any, ...], Any]:
    """The tensors of a call by where they are: the parameter of `forward`, then keys inside of it.

    In the order of the parameters, as torch.export has it. Raises TypeError if the arguments do
    not fit.
    """
    return dict(_leaves_by_path(_bound(forward, args, kwargs)))


def _leaves_by_path(tree: Any) -> list[tuple[tuple[Any, ...], Any]]:
    """Leaves with their paths; by place where a container was registered without keys."""
    try:
        return pytree.tree_flatten_with_path(tree)[0]
    except ValueError:
        return [((place,), leaf) for place, leaf in enumerate(pytree.tree_leaves(tree))]


def path_name(path: tuple[Any, ...]) -> str:
    """A path of `argument_paths` as it is told to users: parameter, keys and places."""
    return ".".join(
        str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path
    )


def automatic_axes(
    forward: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    axes: Sequence[Collection[int]],
) -> dict[str, Any]:
    """`dynamic_shapes` for torch.export: AUTO for the given axes of each of `argument_paths`."""
    auto = torch.export.Dim.AUTO
    marks = [dict.fromkeys(sorted(own), auto) or None for own in axes]
    tree = pytree.tree_structure(_bound(forward, args, kwargs))
    marked: dict[str, Any] = pytree.tree_unflatten(marks, tree)
    return marked


def _bound(
    forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, Any]:
    return dict(inspect.signature(forward).bind(*args, **kwargs).arguments)


def as_tensor(array: Array) -> torch.Tensor:
    """A tensor of the array's shape and dtype, over its memory where torch can use that.

    Raises DataError for a dtype that torch does not have.
    """
    own = np.require(array, requirements=["C", "W"])  # not ascontiguousarray: that adds an axis
    try:
        if own.dtype == ml_dtypes.bfloat16:
            return torch.from_numpy(own.view(np.int16)).view(torch.bfloat16)
        return torch.from_numpy(own)
    except TypeError as error:
        raise DataError(f"an array has dtype {array.dtype}, which torch does not have") from error


def _with_made_outputs(module: torch.fx.GraphModule) -> torch.fx.GraphModule:
    """The module, or a copy in which no output is an input itself: exporters name them apart."""
    graph = torch.fx.Graph()
    output = graph.output(graph.graph_copy(module.graph, {}))
    graph._codegen = copy.deepcopy(module.graph._codegen)
    passed = [node for node in output.all_input_nodes if node.op == "placeholder"]
    if not passed:
        return module
    for node in passed:
        with graph.inserting_before(output):
            made = graph.call_function(torch.ops.aten.clone.default, (node,))
        made.meta = dict(node.meta)
        output.replace_input_with(node, made)
    return torch.fx.GraphModule(module, graph)


def _put(
    graph: torch.fx.Graph,
    copies: dict[torch.fx.Node, torch.fx.Node],
    site: NormSite,
    parameters: DytParameters,
) -> torch.fx.Node | None:
    """Let every reader of the site's output read DyT of its input, still without parameters.

    The node of DyT; None where it is an identity, and has none.
    """
    source, end = copies[site.input.native], copies[site.output.native]
    call, result = None, source
    if not parameters.affine:
        with graph.inserting_after(end):
            call = result = graph.call_function(operator(parameters.form()), (source,))
        call.meta = dict(end.meta)
    if site.input.dtype != site.output.dtype:
        dtype = getattr(torch, str(site.output.dtype))
        if call is not None:
            call.meta["val"] = end.meta["val"].to(source.meta["val"].dtype)
        with graph.inserting_after(end if call is None else call):
            result = graph.call_function(torch.ops.aten.to.dtype, (result, dtype))
        result.meta = dict(end.meta)
    if end.meta["val"].is_contiguous() and not source.meta["val"].is_contiguous():
        with graph.inserting_after(end if result is source else result):  # it may be viewed
            result = graph.call_function(torch.ops.aten.contiguous.default, (result,))
        result.meta = dict(end.meta)
    end.replace_all_uses_with(result)
    copies[site.output.native] = result  # a later site may read this one
    return call


def _simplify(graph: torch.fx.Graph, node: torch.fx.Node) -> None:
    """Drop a node without effect; let others read no more than they need."""
    name = _schema_name(node)
    if name in NO_EFFECT:
        graph.erase_node(node)
    elif name in AS_OTHER:
        source = node.all_input_nodes[0]
        before, after = source.meta.get("val"), node.meta.get("val")
        if before is None or after is None:
            return
        if before.dtype != after.dtype:
            node.target, node.args = torch.ops.aten.to.dtype, (source, after.dtype)
        elif [*map(str, before.shape)] == [*map(str, after.shape)]:
            node.replace_all_uses_with(source)
            graph.erase_node(node)


def _written(graph: torch.fx.Graph) -> set[str]:
    """The paths of the tensors that a graph writes to: running statistics, caches."""
    return {
        str(node.args[0].target)
        for node in graph.nodes
        if is_write(node)
        and isinstance(node.args[0], torch.fx.Node)
        and node.args[0].op == "get_attr"
    }


def ancestors(stop: Iterable[torch.fx.Node], known: set[torch.fx.Node]) -> set[torch.fx.Node]:
    """The nodes that `stop` is computed from, itself among them, as far back as `known`."""
    pending, seen = [node for node in stop if node not in known], set[torch.fx.Node]()
    while pending:
        node = pending.pop()
        if node in seen:
            continue
        seen.add(node)
        pending.extend(n for n in node.all_input_nodes if n not in known and n not in seen)
    return seen


def _reads(node: torch.fx.Node, said: Said | None) -> list[torch.fx.Node]:
    """What a node reads; of one of several results, what the node reads that makes them all."""
    source = node.args[0] if node.target is getitem and said is not None else node
    return source.all_input_nodes if isinstance(source, torch.fx.Node) else []


def _scope(node: torch.fx.Node) -> str:
    stack = node.meta.get("nn_module_stack") or {}
    path, _ = next(reversed(stack.values()), ("", None))
    return str(path)


def _label(node: torch.fx.Node) -> str:
    name = _schema_name(node)
    return name.partition("::")[2] if name else getattr(node.target, "__name__", str(node.target))


def _schema_name(node: torch.fx.Node) -> str:
    schema = getattr(node.target, "_schema", None)
    return str(schema.name) if schema is not None else ""


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _length(size: int | torch.SymInt) -> int | None:
    """The length of an axis, None where it is dynamic: a symbol may stand for a known number."""
    known: int | None = size.node.maybe_as_int() if isinstance(size, torch.SymInt) else size
    return known


def _output_names(module: torch.fx.GraphModule, count: int) -> list[str]:
    """Names of the outputs from the model's own structure: dict keys, fields, tuple places."""
    info = getattr(module.graph._codegen, "pytree_info", None)
    spec = getattr(info, "out_spec", None)
    if spec is None or spec.num_leaves != count:
        return ["output"] if count == 1 else [f"output_{place}" for place in range(count)]
    tree = pytree.tree_unflatten(list(range(count)), spec)
    return [_joined(path, count) for path, _ in _leaves_by_path(tree)]


def _joined(path: tuple[Any, ...], count: int) -> str:
    parts = [getattr(key, "key", getattr(key, "name", getattr(key, "idx", key))) for key in path]
    if parts and isinstance(parts[0], str):
        return ".".join(map(str, parts))
    name = "_".join(map(str, parts))
    return f"output_{name}" if name and count > 1 else "output"
