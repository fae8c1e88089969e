"""Graphs of Dynamo: what `torch.compile` hands to a backend.

Dynamo's graph holds whatever the model called (functions, methods, operators, gradient regions),
and its weights come in as inputs. It is traced to aten only to be matched; what is replaced is
replaced in Dynamo's own graph, which otherwise stays as it is.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch._dynamo.exc import TensorifyScalarRestartAnalysis
from torch._dynamo.source import LocalSource
from torch._dynamo.symbolic_convert import TensorifyState
from torch._guards import detect_fake_mode
from torch._ops import HigherOrderOperator
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import get_proxy_mode, get_proxy_slot, make_fx
from torch.utils import _pytree as pytree

from ..dyt import Form
from ..errors import CaptureError, first_line
from ..nn import operator
from ..sites import NormSite
from ..terms import Value
from .fx import FxGraph, ancestors
from .fx_constants import attribute
from .fx_regions import CHECKPOINTS, RUN_ONCE, is_write, lay_open, subgraphs

__all__ = ["Anchor", "Frame", "Hold", "Replacement", "opened"]

Node = torch.fx.Node
Hold = Callable[[str, torch.Tensor], Node]
"""Makes a node that yields a tensor, given a name for it."""


@dataclass(frozen=True, eq=False)
class Replacement:
    """A site that becomes one operator of `form`.

    operands: what follows x, by the form's parameters: values of the frame's graph, or tensors.
    """

    site: NormSite
    form: Form
    operands: Mapping[str, Value | torch.Tensor]


@dataclass(frozen=True)
class Anchor:
    """A parameter among the inputs of a frame, which tells where in a model the frame stands.

    place: which input it is; root: what the frame reaches it from ("L['self']"); path: its path
    below that.
    """

    place: int
    root: str
    path: str


class Frame:
    """One GraphModule of Dynamo, and the aten graph in which it is matched.

    graph: parameters and buffers that Dynamo lifted to inputs count as constants in it.
    nested: what runs inside other operators, by the name of those; it is only looked at.
    Raises CaptureError if the module cannot be traced.
    """

    def __init__(self, module: torch.fx.GraphModule) -> None:
        _fix_numbers(module)
        # Inner backends own and change the module that they are given; the frame keeps its own.
        self._module, _ = _copied(module)
        lay_open(self._module, opened())
        self.nested = list(_nested(self._module))
        traced, recorder = _traced(self._module)
        self._made_by = recorder.made_by
        self._inputs = list(self._module.graph.find_nodes(op="placeholder"))
        weights = {
            made: (_path(node), _is_parameter(node))
            for made, node in recorder.results.items()
            if _is_weight(node)
        }
        self.graph = FxGraph("frame", traced, (), {}, weights)
        self._order = {node: place for place, node in enumerate(traced.graph.nodes)}
        self._nodes: dict[Value, Node] = {}
        for made, node in recorder.results.items():
            value = self.graph.value_of(made)
            if value is not None:
                self._nodes.setdefault(value, node)

    @property
    def is_dynamic(self) -> bool:
        """Whether sizes are among the inputs."""
        return any(isinstance(n.meta.get("example_value"), torch.SymInt) for n in self._inputs)

    def input_of(self, value: Value) -> int | None:
        """Which input of the frame a value is, None if it is none."""
        node = self._nodes.get(value)
        return self._inputs.index(node) if node in self._inputs else None

    @property
    def anchors(self) -> list[Anchor]:
        """The parameters among the inputs."""
        return [
            Anchor(place, *_split(_source(node).name))
            for place, node in enumerate(self._inputs)
            if _is_parameter(node) and _source(node) is not None
        ]

    def module_of(self, site: NormSite) -> tuple[str, str] | None:
        """The module that a site belongs to, as root and path; None where that is not known."""
        path = _module_path(self._made_by[site.output.native])
        return _split(path) if path else None

    def reaches(self, values: Iterable[Value]) -> bool:
        """Whether values are results of Dynamo's own nodes, so that a replacement can take them."""
        return all(value in self._nodes for value in values)

    def device_of(self, value: Value) -> torch.device:
        """Where a value lives."""
        device: torch.device = value.native.meta["val"].device
        return device

    def obstacle(self, site: NormSite) -> str | None:
        """Why a site cannot be replaced in this frame, None if it can."""
        if not self.reaches((site.input, site.output)):
            return "it lies inside a larger operator"
        places = [self._order[node] for node in self._between(site)]
        for node in islice(self._order, min(places), max(places) + 1):
            if is_write(node):
                return f"{node.name} writes to a tensor while it is computed"
        return None

    def replaced(self, replacements: Sequence[Replacement]) -> torch.fx.GraphModule:
        """A copy of the module with the replacements made.

        Tensors among their operands become inputs, appended in the order of the replacements.
        """
        module, copies = _copied(self._module)
        graph = module.graph
        last = next((n for n in reversed(graph.nodes) if n.op == "placeholder"), None)
        mode, backend_mode = _fake_mode(self._module), detect_fake_mode()

        def hold(name: str, tensor: torch.Tensor) -> Node:
            nonlocal last
            with graph.inserting_after(last) if last else graph.inserting_before():
                last = graph.placeholder(name)
            last.meta["example_value"] = mode.from_tensor(tensor, static_shapes=True)
            if backend_mode is not None:  # its fake tensor is static from here on
                backend_mode.from_tensor(tensor, static_shapes=True)
            last.meta["tensor_dict"] = {"_dynamo_static_input_type": "unguarded"}
            last._dynamo_source = None
            return last

        self._replace(graph, copies, replacements, hold)
        module.recompile()
        return module

    def replace_in(
        self, graph: torch.fx.Graph, replacements: Sequence[Replacement], hold: Hold
    ) -> None:
        """Make the replacements in the graph itself that the frame was made of."""
        nodes = dict(zip(self._module.graph.nodes, graph.nodes, strict=True))
        self._replace(graph, nodes, replacements, hold)

    def _replace(
        self,
        graph: torch.fx.Graph,
        nodes: dict[Node, Node],
        replacements: Sequence[Replacement],
        hold: Hold,
    ) -> None:
        dead: set[Node] = set()
        for number, replacement in enumerate(replacements):
            site = replacement.site
            dead |= {nodes[self._made_by[node]] for node in self._between(site)}
            source, end = (nodes[self._nodes[value]] for value in (site.input, site.output))
            operands = [
                nodes[self._nodes[operand]]
                if isinstance(operand, Value)
                else hold(f"dyt_{number}_{name}", operand)
                for name, operand in replacement.operands.items()
            ]
            with graph.inserting_after(end):
                call = graph.call_function(operator(replacement.form), (source, *operands))
            call.meta = dict(end.meta)
            result = self._like_output(graph, call, site)
            end.replace_all_uses_with(result)
            nodes[self._nodes[site.output]] = result  # a later site may read this one
        graph.eliminate_dead_code(lambda node: node not in dead)

    def _like_output(self, graph: torch.fx.Graph, call: Node, site: NormSite) -> Node:
        """The result in the dtype and the layout of the norm's: what follows may view it."""
        x, y = (value.native.meta["val"] for value in (site.input, site.output))
        result = call
        if x.dtype != y.dtype:
            call.meta["example_value"] = torch.empty_like(y, dtype=x.dtype)
            with graph.inserting_after(result):
                result = graph.call_method("to", (result, y.dtype))
            result.meta = {**call.meta, "example_value": y}
        if y.is_contiguous() and not x.is_contiguous():
            with graph.inserting_after(result):
                contiguous = graph.call_method("contiguous", (result,))
            contiguous.meta = dict(result.meta)
            result = contiguous
        return result

    def _between(self, site: NormSite) -> list[Node]:
        """The traced nodes that compute a site's output from its input, weights' own left out."""
        found = ancestors([site.output.native], {site.input.native})
        values = ((node, self.graph.value_of(node)) for node in found)
        return [node for node, value in values if value is not None and not value.constant]


class _Recorder(torch.fx.Interpreter):
    """Runs a Dynamo module node by node, and records which aten nodes that makes.

    given: results that are not computed but known, None for those that nothing needs. results: the
    first Dynamo node whose result a traced node is; made_by: the Dynamo node at which a traced node
    was made.
    """

    def __init__(self, module: torch.fx.GraphModule, given: Mapping[Node, Any]) -> None:
        super().__init__(module)
        self._given = given
        self.results: dict[Node, Node] = {}
        self.made_by: dict[Node, Node] = {}

    def run_node(self, n: Node) -> Any:
        mode = get_proxy_mode()
        if mode is None:
            raise CaptureError("Dynamo's graph runs outside its trace")
        nodes = mode.tracer.graph.nodes
        before = len(nodes)
        result = self._given[n] if n in self._given else super().run_node(n)
        for made in islice(reversed(nodes), len(nodes) - before):
            self.made_by[made] = n
            made.meta["nn_module_stack"] = {"": (_split(_module_path(n))[1], None)}
        if isinstance(result, torch.Tensor):
            slot = get_proxy_slot(result, mode.tracer, None)
            if slot is not None:
                self.results.setdefault(slot.proxy.node, n)
        return result


def _traced(module: torch.fx.GraphModule) -> tuple[torch.fx.GraphModule, _Recorder]:
    """The module in aten, traced on the fake tensors that Dynamo left in it."""
    mode = _fake_mode(module)
    recorders: list[_Recorder] = []
    with ExitStack() as stack:
        stack.enter_context(mode)
        stack.enter_context(torch.no_grad())
        if mode.shape_env is not None:  # what is only looked at must leave no guards
            stack.enter_context(mode.shape_env.suppress_guards())
            stack.enter_context(mode.shape_env.ignore_fresh_unbacked_symbols())
        closed = _transformed(module.graph)
        known = {node: _known(module, node, mode, closed) for node in module.graph.nodes}
        known = {node: value for node, value in known.items() if value is not None}
        skipped = dict.fromkeys(closed - set(known))
        leaves, tree = pytree.tree_flatten(list(known.values()))

        def run(*arguments: Any) -> Any:
            given = pytree.tree_unflatten(arguments, tree)
            recorders.append(_Recorder(module, dict(zip(known, given, strict=True)) | skipped))
            return recorders[-1].run()

        try:
            traced = make_fx(run, pre_dispatch=True)(*leaves)
        except Exception as error:
            raise CaptureError(
                f"Dynamo's graph cannot be traced to aten: {first_line(error)}"
            ) from error
    return traced, recorders[-1]


def _transformed(graph: torch.fx.Graph) -> set[Node]:
    """The nodes within vmap and its like, whose tensors no trace follows."""
    depth, found = 0, set[Node]()
    for node in graph.nodes:
        name = getattr(node.target, "__name__", "")
        depth += name.endswith("increment_nesting")
        if depth > 0:
            found.add(node)
        depth -= name.endswith("decrement_nesting")
    return found


def _known(
    module: torch.fx.GraphModule, node: Node, mode: FakeTensorMode, closed: set[Node]
) -> Any:
    """What the trace is given for a node, None where it computes it.

    Inputs (also floats, which Dynamo wraps in tensors), tensors that the module holds, and the
    results of higher-order operators and of `closed` nodes, which are not entered.
    """
    if node.op == "get_attr":
        held = attribute(module, str(node.target))
        return mode.from_tensor(held, static_shapes=True) if _is_tensor(held) else None
    leaves = node in closed and not closed.issuperset(node.users)
    opaque = isinstance(node.target, HigherOrderOperator) or _is_number(node) or leaves
    if node.op != "placeholder" and not opaque:
        return None
    value = _seen(node)
    if isinstance(value, torch.SymFloat) and not value.node.expr.free_symbols:
        return float(value)  # Dynamo has guarded on it
    return pytree.tree_map_only(torch.Tensor, torch.Tensor.detach, value)


def _fix_numbers(module: torch.fx.GraphModule) -> None:
    """Let Dynamo start again with the floats that modules hold, an eps above all, as constants.

    With dynamic=True they come as symbols. AOTAutograd asks for the same where an operator needs
    the number itself, but only after the norms have been matched.
    """
    symbols = [
        node.meta["example_value"].node.expr
        for node in module.graph.nodes
        if _is_number(node) and not isinstance(_source(node.args[0]), LocalSource)
    ]
    open_ones = [symbol for symbol in symbols if symbol.is_symbol]
    for symbol in open_ones:
        TensorifyState.specialize(str(symbol))
    if open_ones:
        raise TensorifyScalarRestartAnalysis


def _is_number(node: Node) -> bool:
    """Whether a node unwraps a float that is an input."""
    if node.target != "item" or not isinstance(node.meta.get("example_value"), torch.SymFloat):
        return False
    wrapped = node.args[0]
    return isinstance(wrapped, Node) and wrapped.op == "placeholder"


def _source(node: Any) -> Any:
    return getattr(node, "_dynamo_source", None)


def _seen(node: Node) -> Any:
    """What a node's result is like, as Dynamo notes it, or torch.export."""
    return node.meta.get("example_value", node.meta.get("val"))


def _is_tensor(held: Any) -> bool:
    return isinstance(held, torch.Tensor)


def _fake_mode(module: torch.fx.GraphModule) -> FakeTensorMode:
    """The mode of a module's own fake tensors; Dynamo gives another one to backends."""
    for node in module.graph.nodes:
        for leaf in pytree.tree_leaves(_seen(node)):
            if isinstance(leaf, FakeTensor):
                return leaf.fake_mode
    raise CaptureError("the graph holds no fake tensors: it does not come from Dynamo")


def _copied(module: torch.fx.GraphModule) -> tuple[torch.fx.GraphModule, dict[Node, Node]]:
    """A copy that shares the tensors, with what Dynamo tells AOTAutograd; nodes by the old ones."""
    graph = torch.fx.Graph()
    copies: dict[Node, Node] = {}
    result = graph.graph_copy(module.graph, copies)
    graph.output(result)
    for old, new in copies.items():
        if hasattr(old, "_dynamo_source"):
            new._dynamo_source = old._dynamo_source
    copied = torch.fx.GraphModule(module, graph)
    copied.meta = dict(module.meta)
    for name in ("_param_name_to_source", "_source_to_user_stacks"):
        if hasattr(module, name):
            setattr(copied, name, getattr(module, name))
    return copied, copies


def _held(node: Node) -> Any:
    """What a node stands for where it computes nothing."""
    if node.op == "get_attr" and node.graph.owning_module is not None:
        return attribute(node.graph.owning_module, str(node.target))
    return node.meta.get("example_value")


def _is_parameter(node: Node) -> bool:
    return isinstance(_held(node), torch.nn.Parameter)


def _is_weight(node: Node) -> bool:
    """What a module holds: its address does not change, so Dynamo marks the input as static."""
    static = "_dynamo_static_input_type" in (node.meta.get("tensor_dict") or {})
    return static or _is_parameter(node) or (node.op == "get_attr" and _is_tensor(_held(node)))


def opened() -> set[str]:
    """The regions that are laid open: checkpoints only where no gradients are computed."""
    return RUN_ONCE - CHECKPOINTS if torch.is_grad_enabled() else RUN_ONCE


def _nested(module: torch.fx.GraphModule) -> Iterator[tuple[str, Frame]]:
    """The subgraphs of the operators that were not laid open; those that no trace enters left out.

    An input of theirs is what it is outside: a weight above all.
    """
    for node in module.graph.nodes:
        bodies, operands = subgraphs(module, node)
        for original in bodies:
            body, _ = _copied(original)
            inputs = body.graph.find_nodes(op="placeholder")
            for inner, outer in zip(inputs, operands, strict=False):
                if isinstance(outer, Node) and _is_weight(outer):
                    inner.meta = {**inner.meta, **outer.meta}
                    inner._dynamo_source = _source(outer)
            with suppress(CaptureError):
                yield str(node.target.name()), Frame(body)


def _module_path(node: Node) -> str:
    """Dynamo's path of the module that a node belongs to."""
    stack = node.meta.get("nn_module_stack") or {}
    path, _ = next(reversed(stack.values()), ("", None))
    return str(path)


def _path(node: Node) -> str:
    """The path of a weight, below the frame's own `self`."""
    source = _source(node)
    if source is None:
        return str(node.target)
    return _split(source.name)[1]


def _split(path: str) -> tuple[str, str]:
    """("L['self']", "blocks.0.norm") for "L['self'].blocks._modules['0'].norm"."""
    # Through `__dict__` where a model has a `__getattr__` of its own, as those of diffusers.
    path = re.sub(r"\.__dict__\['(_(?:modules|parameters|buffers))'\]", r".\1", path)
    path = re.sub(r"\._(?:modules|parameters|buffers)\['([^']*)'\]", r".\1", path)
    while path != (plain := re.sub(r"getattr\(([^()]*), '([^']*)'\)", r"\1.\2", path)):
        path = plain
    found = re.match(r"[LG]\['[^']*'\](?:\.__self__)?", path)
    root = found[0] if found else ""
    return root, path[len(root) :].removeprefix(".")
