"""Capture of torch models: GraphModules of torch.fx and programs of torch.export."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._inductor.decomposition import select_decomp_table
from torch.export import Dim, ExportedProgram, export
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.passes.split_module import split_module

import dyt_compile
from dyt_compile.errors import CaptureError, OptionError

pytestmark = pytest.mark.core

WIDTH = 16
ROWS = 4
BATCH = Dim("batch", min=2, max=64)


class RMSNorm(nn.Module):
    """As LLaMA writes it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(WIDTH) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.float32)
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
        return self.weight * wide.to(x.dtype)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), RMSNorm()
        self.mixer = nn.Linear(WIDTH, WIDTH)
        nn.init.uniform_(self.norm1.weight, 0.5, 1.5)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mixer(self.norm1(x))
        return x.add(self.mixer(self.norm2(x)))


class Model(nn.Module):
    """Modules, functions and methods; a norm called twice, one without a module or parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.norm = nn.LayerNorm(WIDTH, elementwise_affine=False)
        self.head = nn.Module()
        self.head.gamma = nn.Parameter(torch.rand(WIDTH) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        x = self.blocks[0].norm1(x)
        x = F.layer_norm(x, (WIDTH,), self.head.gamma, None)
        return self.norm(x)


class Switched(nn.Module):
    """Traced for one value of an argument."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList((nn.LayerNorm(WIDTH), RMSNorm()))

    def forward(self, x: Tensor, first: bool = True, scale: Tensor | None = None) -> Tensor:
        x = self.norms[0 if first else 1](x)
        return x if scale is None else x * scale


NAMES = [
    "blocks.0.norm1", "blocks.0.norm2", "blocks.1.norm1", "blocks.1.norm2", "blocks.0.norm1#2",
    "head", "norm",
]  # fmt: skip


@pytest.fixture(scope="module")
def model() -> Model:
    torch.manual_seed(0)
    return Model().eval()


@pytest.fixture(scope="module")
def converted(model: Model) -> dyt_compile.Conversion:
    return dyt_compile.convert(model, _batches(), mode="all")


def _batches() -> list[tuple[Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(ROWS, 5, WIDTH, generator=generator),) for _ in range(4)]


def _names(model: Any, *args: Any) -> list[str]:
    return [site.name for site in dyt_compile.inspect(model, args).sites]


def _traced_by(is_leaf: Callable[[nn.Module], bool]) -> Callable[[nn.Module], torch.fx.GraphModule]:
    class Tracer(torch.fx.Tracer):
        def is_leaf_module(self, m: nn.Module, path: str) -> bool:
            return is_leaf(m)

    return lambda model: torch.fx.GraphModule(model, Tracer().trace(model))


def _in_training(model: nn.Module) -> torch.fx.GraphModule:
    return torch.fx.symbolic_trace(model).train()


def _program(model: nn.Module, **options: Any) -> ExportedProgram:
    return export(model, _batches()[0], **options)


TRACERS = {
    "leaf norms": torch.fx.symbolic_trace,
    "leaf norms of our own": _traced_by(lambda m: isinstance(m, (nn.LayerNorm, RMSNorm))),
    "no leaves": _traced_by(lambda m: False),
    "training mode": _in_training,
    "exported module": lambda m: _program(m, dynamic_shapes=({0: BATCH},)).module(),
    "unflattened": lambda m: torch.export.unflatten(_program(m, dynamic_shapes=({0: BATCH},))),
}


@pytest.mark.parametrize("tracer", TRACERS)
def test_graph_modules_have_the_sites_of_their_model(model: Model, tracer: str) -> None:
    graph = TRACERS[tracer](model)
    found = _names(graph, *_batches()[0])
    assert [name for name in found if not name.startswith("norm_")] == [
        name for name in NAMES if name in found
    ]
    assert len(found) == len(NAMES)
    assert set(NAMES) - set(found) <= {"head"}  # a parameter that no module of its own applies


@pytest.mark.parametrize("tracer", TRACERS)
def test_graph_module_is_converted_and_stays_as_it_is(
    model: Model, converted: dyt_compile.Conversion, tracer: str
) -> None:
    graph = TRACERS[tracer](model)
    code, modes = getattr(graph, "code", None), [m.training for m in graph.modules()]
    state = {name: value.clone() for name, value in graph.state_dict().items()}
    result = dyt_compile.convert(graph, _batches(), mode="all")
    x = _batches()[1][0]
    assert result.report.converted == len(NAMES)
    assert torch.allclose(result.model(x), converted.model(x), atol=1e-5)
    assert getattr(graph, "code", None) == code
    assert [m.training for m in graph.modules()] == modes
    assert all(torch.equal(value, state[name]) for name, value in graph.state_dict().items())


def test_dissolved_modules_without_scopes_are_named_by_their_parameters(model: Model) -> None:
    graph = _traced_by(lambda m: False)(model)
    for node in graph.graph.nodes:
        node.meta.clear()
    found = _names(graph, *_batches()[0])
    assert found[:6] == NAMES[:6]
    assert found[6].startswith("norm_")


@pytest.mark.parametrize("pre_dispatch", [False, True])
def test_aten_graph_without_names_is_numbered(model: Model, pre_dispatch: bool) -> None:
    x = _batches()[0][0]
    graph = make_fx(model, pre_dispatch=pre_dispatch)(x)
    result = dyt_compile.convert(graph, _batches(), mode="all")
    assert result.report.converted == len({site.name for site in result.match.sites}) == len(NAMES)
    assert torch.allclose(result.original.model(x), model(x), atol=1e-6)
    labels = [str(node.target) for node in result.model.graph.nodes]
    assert sum("dyt." in label for label in labels) == len(NAMES)
    assert not any("norm" in label for label in labels if label.startswith("aten."))


def test_split_graph_module_is_one_graph(model: Model) -> None:
    graph = torch.fx.symbolic_trace(model)
    places = {node: place for place, node in enumerate(graph.graph.nodes)}
    parts = split_module(graph, model, lambda node: places[node] // 6)
    assert sum(isinstance(part, torch.fx.GraphModule) for part in parts.children()) > 2
    assert len(_names(parts, *_batches()[0])) == len(NAMES)


def test_graph_module_without_example_is_told_in_one_line(model: Model) -> None:
    for graph in (torch.fx.symbolic_trace(model), _program(model).module()):
        with pytest.raises(OptionError, match="needs an example of its inputs") as raised:
            dyt_compile.inspect(graph)
        assert "\n" not in str(raised.value)


@pytest.mark.parametrize("first", [False, True])
def test_concrete_arguments_choose_the_norm(first: bool) -> None:
    model, x = Switched().eval(), _batches()[0][0]
    graph = torch.fx.symbolic_trace(model, {"first": first, "scale": None})
    names = [f"norms.{0 if first else 1}"]
    assert _names(graph, x, first) == names
    with pytest.raises(CaptureError, match="first has been specialized") as raised:
        dyt_compile.inspect(graph, (x, not first))
    assert "\n" not in str(raised.value)
    graph = torch.fx.symbolic_trace(model, {"first": first})
    assert _names(graph, x, first, torch.ones(WIDTH)) == names


PROGRAMS: dict[str, dict[str, Any]] = {
    "static": {},
    "automatic axes": {"dynamic_shapes": {"x": {0: Dim.AUTO, 1: Dim.AUTO}}},
    "strict": {"strict": True, "dynamic_shapes": {"x": {0: BATCH}}},
}


@pytest.mark.parametrize("options", PROGRAMS)
def test_program_has_the_same_sites_in_every_form(
    model: Model, options: str, tmp_path: Path
) -> None:
    program = _program(model, **PROGRAMS[options])
    torch.export.save(program, tmp_path / "model.pt2")
    forms = (
        program,
        tmp_path / "model.pt2",
        program.run_decompositions(),
        program.run_decompositions(select_decomp_table()),
    )
    for form in forms:
        names = _names(form)
        assert [n for n in names if not n.startswith("norm_")] == [n for n in NAMES if n in names]
        assert len(names) == len(NAMES)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_program_has_the_same_sites_in_every_form(dtype: torch.dtype) -> None:
    narrow = nn.Sequential(Block(), Block()).eval().to(dtype)
    program = export(narrow, (_batches()[0][0].to(dtype),))
    kind = {"norm1": "layer_norm", "norm2": "rms_norm"}
    for form in (program, *map(program.run_decompositions, (None, select_decomp_table()))):
        sites = dyt_compile.inspect(form).sites
        assert [site.name for site in sites] == ["0.norm1", "0.norm2", "1.norm1", "1.norm2"]
        assert all(site.kind.value == kind[site.name[2:]] for site in sites)
        assert {site.dtype for site in sites} == {str(dtype).removeprefix("torch.")}


def test_decomposed_program_is_converted_alike(
    model: Model, converted: dyt_compile.Conversion
) -> None:
    program = _program(model, dynamic_shapes={"x": {0: BATCH}})
    program = program.run_decompositions(select_decomp_table())
    result = dyt_compile.convert(program, _batches(), mode="all")
    x = torch.randn(7, 5, WIDTH)
    assert torch.allclose(result.model(x), converted.model(x), atol=1e-5)


class Language(nn.Module):
    """Head and embedding share a weight; inputs by keyword, in and out by dict."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, 11, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("scale", torch.rand(WIDTH) + 0.5, persistent=False)

    def forward(self, inputs: dict[str, Tensor], *, mask: Tensor) -> dict[str, Tensor]:
        x = self.embedding(inputs["tokens"]) * self.scale * mask[..., None]
        x = self.norm(x)
        return {"logits": self.head(x), "hidden": x}


def test_tied_weights_nested_inputs_and_buffers_outside_the_state_survive(tmp_path: Path) -> None:
    language = Language().eval()

    def batch() -> dict[str, Any]:
        return {"inputs": {"tokens": torch.randint(0, 11, (4, 5))}, "mask": torch.ones(4, 5)}

    program = export(language, (), batch())
    torch.export.save(program, tmp_path / "model.pt2")
    for form in (language, program, tmp_path / "model.pt2"):
        result = dyt_compile.convert(form, [batch() for _ in range(4)], mode="exact")
        given = batch()
        found, expected = result.model(**given), language(**given)
        assert list(found) == list(expected)
        assert all(torch.equal(found[name], expected[name]) for name in expected)
        assert [site.name for site in result.match.sites] == ["norm"]


@pytest.mark.parametrize("shape", [(WIDTH,), (6, WIDTH), (2, 3, 4, WIDTH)])
def test_norm_of_the_input_itself_is_found_for_any_rank(shape: tuple[int, ...]) -> None:
    (site,) = dyt_compile.inspect(export(nn.LayerNorm(WIDTH), (torch.randn(shape),))).sites
    assert (site.channels, site.axes, site.consumers) == (WIDTH, (-1,), ("output",))


class Spectral(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor, shift: Tensor) -> Tensor:
        spectrum = torch.fft.fft(x) * torch.ones((), dtype=torch.complex64)
        return self.norm(torch.view_as_real(spectrum).mean(-1)) + shift


def test_complex_and_integer_tensors_around_a_norm_do_no_harm() -> None:
    batches = [(x, torch.ones(ROWS, 5, WIDTH, dtype=torch.int32)) for (x,) in _batches()]
    result = dyt_compile.convert(Spectral().eval(), batches, mode="all")
    assert result.report.converted == 1
    assert result.model(*batches[0]).dtype is torch.float32
