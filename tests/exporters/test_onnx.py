"""Exported ONNX files: valid, portable, with the model's names, and equal to what was converted."""

from __future__ import annotations

import copy
import functools
import importlib.util
import math
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx.reference
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import dyt_compile
from dyt_compile import Conversion, export_onnx
from dyt_compile.dyt import DOMAIN, FORMS
from dyt_compile.errors import ExportError, OptionError, VerificationError
from dyt_compile.exporters import onnx as exporter
from dyt_compile.exporters.onnx import OnnxExport
from dyt_compile.graphs import onnx_weights
from dyt_compile.runtime import Session

ort = pytest.importorskip("onnxruntime")
convert = partial(dyt_compile.convert, fold=False)
"""So that every DyT is seen with all of its values."""

core = pytest.mark.core

Array = npt.NDArray[Any]

ROOT = Path(__file__).parents[2]
WIDTH = 16
OPSETS = [18, 20, 23]
DTYPES = ["fp32", "fp16", "bf16"]


# The models.


class Attention(nn.Module):
    """Causal self-attention of a LLaMA-like block, with rotated queries and keys."""

    def __init__(self, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.out = nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in self.qkv(x).chunk(3, dim=-1)
        )
        query, key = rotated(query), rotated(key)
        y = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        attended: Tensor = self.out(y.transpose(1, 2).flatten(2))
        return attended


def rotated(x: Tensor) -> Tensor:
    """Rotary embedding along the tokens."""
    half = x.shape[-1] // 2
    speed = torch.exp(-math.log(10000) * torch.arange(half, device=x.device) / half)
    angle = torch.arange(x.shape[-2], device=x.device)[:, None] * speed
    a, b = x[..., :half], x[..., half:]
    cosine, sine = angle.cos(), angle.sin()
    return torch.cat([a * cosine - b * sine, a * sine + b * cosine], dim=-1)


class Layer(nn.Module):
    """Pre-norm attention and SwiGLU."""

    def __init__(self) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(WIDTH, eps=1e-6)
        self.attention = Attention()
        self.mlp_norm = nn.RMSNorm(WIDTH, eps=1e-6)
        self.gate = nn.Linear(WIDTH, 2 * WIDTH, bias=False)
        self.up = nn.Linear(WIDTH, 2 * WIDTH, bias=False)
        self.down = nn.Linear(2 * WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x))
        y = self.mlp_norm(x)
        output: Tensor = x + self.down(F.silu(self.gate(y)) * self.up(y))
        return output


class Decoder(nn.Module):
    """A LLaMA-like model of one layer; logits and hidden states by name."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(32, WIDTH)
        self.layers = nn.ModuleList([Layer()])
        self.norm = nn.RMSNorm(WIDTH, eps=1e-6)
        self.head = nn.Linear(WIDTH, 32, bias=False)

    def forward(self, tokens: Tensor) -> dict[str, Tensor]:
        x = self.embedding(tokens)
        for layer in self.layers:
            x = layer(x)
        hidden = self.norm(x)
        return {"logits": self.head(hidden), "hidden": hidden}


class Residual(nn.Module):
    """x + linear(norm(x))."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = x + self.linear(self.norm(x))
        return output


class Squash(nn.Module):
    """A trained DyT or Derf, written as its authors do."""

    def __init__(self, parameters: Iterable[str], squash: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        for name in parameters:
            shape = (1,) if name in ("alpha", "shift") else (WIDTH,)
            self.register_parameter(name, nn.Parameter(0.3 + torch.rand(shape)))
        self.squash = squash

    def forward(self, x: Tensor) -> Tensor:
        held = dict(self.named_parameters())
        y = held["alpha"] * x
        y = self.squash(y + held["shift"] if "shift" in held else y)
        y = y * held["gamma"] if "gamma" in held else y
        return y + held["beta"] if "beta" in held else y


class Image(nn.Module):
    """LayerNorm over the channels of an image, between convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, WIDTH, 3, padding=1)
        self.norm = nn.LayerNorm(WIDTH)
        self.last = nn.Conv2d(WIDTH, 4, 3, stride=2, padding=1)

    def forward(self, image: Tensor) -> Tensor:
        x = self.norm(self.first(image).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        output: Tensor = self.last(F.gelu(x))
        return output


def normal(*shape: int, seed: int = 0) -> Tensor:
    """Random numbers, the same ones each time."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def tokens(rows: int, length: int, seed: int = 0) -> Tensor:
    """Random token numbers."""
    return torch.randint(32, (rows, length), generator=torch.Generator().manual_seed(seed))


def digits() -> ModuleType:
    """The example's model file."""
    pytest.importorskip("sklearn")
    if "digits_model" not in sys.modules:
        path = ROOT / "examples" / "digits" / "model.py"
        spec = importlib.util.spec_from_file_location("digits_model", path)
        assert spec is not None
        assert spec.loader is not None
        sys.modules["digits_model"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules["digits_model"])
    return sys.modules["digits_model"]


def _digits() -> Conversion:
    example = digits()
    model, _ = example.load()
    return convert(model, list(example.calibration())[:4], mode="all", fit="diagonal")


def _decoder() -> Conversion:
    torch.manual_seed(0)
    batches = [(tokens(4, 4 + place, place),) for place in range(6)]
    return convert(Decoder(), batches, mode="all", fit="diagonal")


def _partly() -> Conversion:
    torch.manual_seed(0)
    norms = (nn.LayerNorm(WIDTH), nn.RMSNorm(WIDTH), nn.LayerNorm(WIDTH), nn.RMSNorm(WIDTH))
    model = nn.Sequential(*map(Residual, norms))
    batches = [(normal(8, 3, WIDTH, seed=place),) for place in range(4)]
    return convert(model, batches, mode="all", fit="diagonal", exclude=["^[01]"])


def _trained() -> Conversion:
    torch.manual_seed(0)
    squashes = {"tanh": torch.tanh, "erf": torch.erf}
    model = nn.Sequential(
        *(Residual(Squash(form.parameters, squashes[form.squash])) for form in FORMS.values())
    )
    return convert(model, mode="exact", example=(normal(2, 3, WIDTH),))


def _image() -> Conversion:
    torch.manual_seed(0)
    batches = [(normal(8, 3, 6, 6, seed=place),) for place in range(4)]
    return convert(Image(), batches, mode="all", fit="diagonal")


MODELS: dict[str, Callable[[], Conversion]] = {
    "digits": _digits,
    "decoder": _decoder,
    "partly": _partly,
    "trained": _trained,
    "image": _image,
}

NODES = {
    "digits": {"DyT": 9},
    "decoder": {"DyT": 3},
    "partly": {"DyT": 2},
    "trained": {"DyT": 1, "DyTScale": 1, "DyTBare": 1, "Derf": 1},
    "image": {"DyT": 1},
}
"""Nodes of our domain that each model's file holds."""

DECODER = pytest.param("decoder", marks=core)
SMALL = [DECODER, *(pytest.param(name, marks=core) for name in ("partly", "trained", "image"))]
ALL = ["digits", *SMALL]


def batch(model: str, rows: int) -> tuple[Tensor, ...]:
    """An input that no other stage has seen."""
    if model == "digits":
        return (digits().images()[2][:rows],)
    if model == "decoder":
        return (tokens(rows, 7, seed=99),)
    if model == "image":
        return (normal(rows, 3, 6, 6, seed=99),)
    return (normal(rows, 3, WIDTH, seed=99),)


@functools.cache
def converted(model: str) -> Conversion:
    """One of MODELS, converted."""
    return MODELS[model]()


class Exports:
    """Files of MODELS, each written once."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._written: dict[tuple[str, str, int], OnnxExport] = {}

    def __call__(self, model: str, dtype: str = "fp32", opset: int = 20) -> OnnxExport:
        key = (model, dtype, opset)
        if key not in self._written:
            path = self._folder / f"{model}-{dtype}-{opset}.onnx"
            self._written[key] = export_onnx(converted(model), path, dtype=dtype, opset=opset)
        return self._written[key]


@functools.cache
def _exports(folder: Path) -> Exports:
    folder.mkdir(exist_ok=True)
    return Exports(folder)


@pytest.fixture(scope="session")
def exports(tmp_path_factory: pytest.TempPathFactory) -> Exports:
    """Files of MODELS, by model, dtype and opset; the same ones for every test module."""
    return _exports(tmp_path_factory.getbasetemp() / "exports")


# What is asked of files.


def run(path: Path, *inputs: Tensor | Array) -> dict[str, Array]:
    """What ONNX Runtime alone computes, by output name; it needs help with bf16 on CPUs."""
    arrays = [x.numpy() if isinstance(x, Tensor) else x for x in inputs]
    if "bfloat16" in onnx.printer.to_text(onnx.load(path, load_external_data=False)):
        helped = Session(path)
        return dict(zip(helped.outputs, helped.run(arrays), strict=True))
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    feeds = dict(zip((x.name for x in session.get_inputs()), arrays, strict=True))
    names = [y.name for y in session.get_outputs()]
    return dict(zip(names, session.run(names, feeds), strict=True))


def run_by_reference(path: Path, *inputs: Tensor) -> list[Array]:
    """What ONNX's own evaluator computes: it rounds to fp16 and bf16 after every node."""
    evaluator = onnx.reference.ReferenceEvaluator(str(path))
    feeds = dict(zip(evaluator.input_names, (x.numpy() for x in inputs), strict=True))
    return [np.asarray(y) for y in evaluator.run(None, feeds)]


def difference(found: Array, expected: Array) -> float:
    """Largest difference relative to the largest value; infinite for other shapes, and for NaN."""
    if found.shape != expected.shape or not np.isfinite(found).all():
        return math.inf
    a, b = found.astype(np.float64), expected.astype(np.float64)
    return float(np.abs(a - b).max() / np.abs(b).max())


def leaves(outputs: Any) -> list[Array]:
    """The tensors that a torch model returned, as arrays."""
    tensors = [y for y in pytree.tree_leaves(outputs) if y is not None]
    return [y.detach().float().numpy() for y in tensors]


def worst(path: Path, expected: Any, *inputs: Tensor) -> float:
    """The largest difference over all outputs."""
    found = list(run(path, *inputs).values())
    return max(difference(a, b) for a, b in zip(found, leaves(expected), strict=True))


def our_nodes(file: onnx.ModelProto) -> list[onnx.NodeProto]:
    return [node for node in file.graph.node if node.domain == DOMAIN]


def initializers(file: onnx.ModelProto) -> dict[str, onnx.TensorProto]:
    return {tensor.name: tensor for tensor in file.graph.initializer}


def shapes(values: Sequence[onnx.ValueInfoProto]) -> dict[str, list[int | str]]:
    """Shapes by name: numbers, or the symbols of dynamic axes."""
    return {
        value.name: [axis.dim_param or axis.dim_value for axis in value.type.tensor_type.shape.dim]
        for value in values
    }


def types(values: Sequence[onnx.ValueInfoProto]) -> set[int]:
    return {value.type.tensor_type.elem_type for value in values}


FLOAT, FLOAT16 = onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16
BFLOAT16, DOUBLE = onnx.TensorProto.BFLOAT16, onnx.TensorProto.DOUBLE
LIMITS = {"fp32": 1e-4, "fp16": 5e-3, "bf16": 4e-2}
"""Largest difference from the model in float32: ten units of rounding for the narrow types."""
ELEMENT = {"fp32": FLOAT, "fp16": FLOAT16, "bf16": BFLOAT16}


# Of every model.


@pytest.mark.parametrize("model", ALL)
@pytest.mark.parametrize("dtype", DTYPES)
def test_file_is_valid(exports: Exports, model: str, dtype: str) -> None:
    onnx.checker.check_model(str(exports(model, dtype).path), full_check=True)


@pytest.mark.parametrize("model", ALL)
def test_file_computes_what_the_model_does_for_any_number_of_rows(
    exports: Exports, model: str
) -> None:
    written = exports(model)
    for rows in (1, 2, 3, 17):
        inputs = batch(model, rows)
        assert worst(written.path, converted(model).model(*inputs), *inputs) < 1e-4
    assert written.export_error is not None
    assert written.export_error < 1e-4


@pytest.mark.parametrize("model", [name for name in ALL if name != DECODER])
@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_narrow_file_is_no_worse_than_torch_in_its_dtype(
    exports: Exports, model: str, dtype: str
) -> None:
    path = exports(model, dtype).path
    inputs = batch(model, 8)
    exact = leaves(converted(model).model(*inputs))
    kind = {"fp16": torch.float16, "bf16": torch.bfloat16}[dtype]
    narrow = copy.deepcopy(converted(model).model).to(kind)
    given = [x.to(kind) if x.is_floating_point() else x for x in inputs]
    eager = max(map(difference, leaves(narrow(*given)), exact))
    assert worst(path, converted(model).model(*inputs), *inputs) < 3 * eager
    by_reference = run_by_reference(path, *inputs)
    assert max(map(difference, by_reference, exact)) < 3 * eager


@core
@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_narrow_decoder_computes_the_same_to_its_precision(exports: Exports, dtype: str) -> None:
    inputs = batch("decoder", 8)
    exact = converted("decoder").model(*inputs)
    assert worst(exports("decoder", dtype).path, exact, *inputs) < LIMITS[dtype]


@core
def test_difference_notices_what_is_wrong() -> None:
    expected = np.array([1.0, -4.0])
    assert difference(expected, expected) == 0
    assert difference(expected + np.array([0, 4e-3]), expected) == pytest.approx(1e-3)
    assert difference(np.array([np.nan, -4.0]), expected) == math.inf
    assert difference(expected[:1], expected) == math.inf


@core
def test_file_of_another_model_is_noticed(exports: Exports) -> None:
    inputs = batch("partly", 3)
    assert worst(exports("trained").path, converted("partly").model(*inputs), *inputs) > 1e-2


@pytest.mark.parametrize("model", ALL)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dyt_is_a_node_that_a_plugin_may_replace(
    exports: Exports, model: str, dtype: str
) -> None:
    file = onnx.load(exports(model, dtype).path)
    assert Counter(node.op_type for node in our_nodes(file)) == NODES[model]
    wanted = {"plugin_namespace": b"dyt", "plugin_version": b"1"}
    for node in our_nodes(file):
        assert {attribute.name: attribute.s for attribute in node.attribute} == wanted
        assert len(node.input) == 1 + len(FORMS[node.op_type].parameters)
    assert {function.name for function in file.functions} == NODES[model].keys()
    for function in file.functions:
        assert function.domain == DOMAIN
        assert sorted(function.attribute) == sorted(wanted)
    assert {entry.domain: entry.version for entry in file.opset_import} == {"": 20, "dyt": 1}


@pytest.mark.parametrize("model", ALL)
@pytest.mark.parametrize("dtype", DTYPES)
def test_alpha_stays_float32_and_gamma_has_the_type_of_x(
    exports: Exports, model: str, dtype: str
) -> None:
    file = onnx.load(exports(model, dtype).path)
    held = initializers(file)
    for node in our_nodes(file):
        for name, given in zip(FORMS[node.op_type].parameters, node.input[1:], strict=True):
            wide = name in ("alpha", "shift")
            assert held[given].data_type == (FLOAT if wide else ELEMENT[dtype])


@pytest.mark.parametrize("model", ALL)
@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_inputs_and_outputs_keep_names_types_and_shapes(
    exports: Exports, model: str, dtype: str
) -> None:
    wide = onnx.load(exports(model).path).graph
    narrow = onnx.load(exports(model, dtype).path).graph
    assert shapes(narrow.input) == shapes(wide.input)
    assert shapes(narrow.output) == shapes(wide.output)
    assert types(narrow.input) == types(wide.input)
    assert types(narrow.output) == types(wide.output) == {FLOAT}
    assert narrow.ByteSize() < 0.9 * wide.ByteSize() or model != "digits"


@pytest.mark.parametrize("model", ALL)
@pytest.mark.parametrize("dtype", DTYPES)
def test_file_says_nothing_of_the_machine(exports: Exports, model: str, dtype: str) -> None:
    text = exports(model, dtype).path.read_bytes()
    folders = {str(ROOT), str(Path.home()), str(Path(torch.__file__).parent), str(Path.cwd())}
    told = [folder.encode() for folder in folders if len(folder) > 1]
    for trace in (b"stack_trace", b"Traceback", b'File "', b".py", b"site-packages", *told):
        assert trace not in text


@core
@pytest.mark.parametrize("model", ["decoder", "trained"])
@pytest.mark.parametrize("opset", OPSETS)
def test_every_opset_computes_the_same(exports: Exports, model: str, opset: int) -> None:
    written = exports(model, "fp32", opset)
    assert written.opset == opset
    file = onnx.load(written.path)
    assert {entry.domain: entry.version for entry in file.opset_import} == {"": opset, "dyt": 1}
    inputs = batch(model, 3)
    assert worst(written.path, converted(model).model(*inputs), *inputs) < 1e-4


@core
@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
@pytest.mark.parametrize("opset", [18, 23])
def test_every_opset_can_be_narrow(exports: Exports, dtype: str, opset: int) -> None:
    written = exports("partly", dtype, opset)
    inputs = batch("partly", 3)
    assert worst(written.path, converted("partly").model(*inputs), *inputs) < LIMITS[dtype]


@core
def test_export_describes_the_file(exports: Exports) -> None:
    written = exports("trained", "bf16")
    assert (written.opset, written.dtype) == (20, "bf16")
    assert written.bytes == written.path.stat().st_size
    assert written.export_error is not None
    assert 0 < written.export_error < 8e-2


@core
def test_opset_is_twenty_by_default(tmp_path: Path) -> None:
    written = export_onnx(converted("trained"), str(tmp_path / "model.onnx"))
    assert written.opset == 20
    assert written.path == tmp_path / "model.onnx"
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]


@core
@pytest.mark.parametrize("dtype", DTYPES)
def test_kept_norms_stay_float32(exports: Exports, dtype: str) -> None:
    file = onnx.load(exports("partly", dtype).path)
    inferred = onnx.shape_inference.infer_shapes(file)
    element = {v.name: v.type.tensor_type.elem_type for v in inferred.graph.value_info}
    element |= {name: tensor.data_type for name, tensor in initializers(file).items()}
    (whole,) = (node for node in file.graph.node if node.op_type == "LayerNormalization")
    assert {element.get(name, FLOAT) for name in whole.input} == {FLOAT}
    (root,) = (node for node in file.graph.node if node.op_type == "Sqrt")
    assert {element.get(name, FLOAT) for name in (*root.input, *root.output)} == {FLOAT}
    products = (node for node in file.graph.node if node.op_type == "MatMul")
    assert {element[node.input[1]] for node in products} == {ELEMENT[dtype]}


# Names and structures of inputs and outputs.


class Call(nn.Module):
    """A linear layer and a norm, called as `call` says."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.linear = nn.Linear(WIDTH, WIDTH)

    def through(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.linear(self.norm(x))
        return y


class NamedOutputs(Call):
    def forward(self, x: Tensor) -> dict[str, Any]:
        y = self.through(x)
        return {"logits": y, "states": (y * 2, y * 3)}


class ManyOutputs(Call):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.through(x)
        return y, y.mean(dim=1)


class NamedInputs(Call):
    def forward(self, pixel_values: Tensor, *, scale: Tensor, offset: Tensor) -> Tensor:
        return self.through(pixel_values) * scale - offset


class NestedInputs(Call):
    def forward(self, pair: tuple[Tensor, Tensor], more: dict[str, Tensor]) -> Tensor:
        return self.through(pair[0] - pair[1]) + more["bias"]


class SameNames(Call):
    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"x": self.through(x)}


class UnusedInput(Call):
    def forward(self, x: Tensor, spare: Tensor) -> Tensor:
        return self.through(x)


class RepeatedOutput(Call):
    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y = self.through(x)
        return {"first": y, "second": y}


class PassedInput(Call):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.through(x), x


class LearnedOutput(Call):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor([2.5]))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.through(x), self.scale


class MissingOutput(Call):
    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return self.through(x), None


X = normal(4, 3, WIDTH)


def _exported_call(
    model: nn.Module, example: Any, path: Path, dtype: str = "fp32"
) -> tuple[list[str], list[str]]:
    result = convert(model.eval(), example=example)
    export_onnx(result, path, dtype=dtype)
    graph = onnx.load(path).graph
    return [value.name for value in graph.input], [value.name for value in graph.output]


@core
@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (NamedOutputs, ["logits", "states.0", "states.1"]),
        (ManyOutputs, ["output_0", "output_1"]),
        (RepeatedOutput, ["first", "second"]),
        (PassedInput, ["output_0", "output_1"]),
        (MissingOutput, ["output_0"]),
    ],
)
def test_outputs_are_named_by_their_structure(
    model: type[nn.Module], expected: list[str], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    network = model().eval()
    path = tmp_path / "model.onnx"
    inputs, outputs = _exported_call(network, (X,), path, "fp16")
    assert inputs == ["x"]
    assert outputs == expected
    graph = onnx.load(path).graph
    assert types((*graph.input, *graph.output)) == {FLOAT}
    assert worst(path, network(X), X) < LIMITS["fp16"]


@core
@pytest.mark.parametrize("dtype", DTYPES)
def test_weight_that_is_an_output_keeps_its_type(dtype: str, tmp_path: Path) -> None:
    network = LearnedOutput().eval()
    _, outputs = _exported_call(network, (X,), tmp_path / "model.onnx", dtype)
    assert outputs == ["output_0", "output_1"]
    assert types(onnx.load(tmp_path / "model.onnx").graph.output) == {FLOAT}
    assert worst(tmp_path / "model.onnx", network(X), X) < LIMITS[dtype]


@core
def test_output_with_the_name_of_an_input_is_exported(tmp_path: Path) -> None:
    network = SameNames().eval()
    names = _exported_call(network, (X,), tmp_path / "model.onnx")
    assert names == (["x"], ["x_output"])
    assert worst(tmp_path / "model.onnx", network(X), X) < 1e-4


class Squeezed(nn.Module):
    """An axis that is squeezed although it is longer than one: torch leaves it."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.norm(x.squeeze(1)) + x[:, :1].squeeze(-2).unsqueeze(1)
        return y


@core
def test_squeeze_of_a_longer_axis_changes_nothing(tmp_path: Path) -> None:
    network = Squeezed().eval()
    _exported_call(network, (X,), tmp_path / "model.onnx")
    assert worst(tmp_path / "model.onnx", network(X), X) < 1e-4


@core
def test_keyword_arguments_are_named_inputs(tmp_path: Path) -> None:
    network = NamedInputs().eval()
    scale, offset = normal(4, 1, 1, seed=1), normal(4, 3, WIDTH, seed=2)
    example = ((X,), {"offset": offset, "scale": scale})  # not in the order of the signature
    inputs, _ = _exported_call(network, example, tmp_path / "model.onnx")
    assert set(inputs) == {"pixel_values", "scale", "offset"}
    named = {"pixel_values": X, "scale": scale, "offset": offset}
    found = run(tmp_path / "model.onnx", *(named[name] for name in inputs))
    expected = network(X, scale=scale, offset=offset).detach().numpy()
    assert difference(found["output"], expected) < 1e-4


@core
def test_nested_inputs_are_exported(tmp_path: Path) -> None:
    network = NestedInputs().eval()
    pair, more = (X, normal(4, 3, WIDTH, seed=3)), {"bias": normal(4, 3, WIDTH, seed=4)}
    inputs, _ = _exported_call(network, ((pair, more), {}), tmp_path / "model.onnx")
    assert len(set(inputs)) == 3
    assert worst(tmp_path / "model.onnx", network(pair, more), *pair, more["bias"]) < 1e-4


@core
def test_input_that_is_not_used_keeps_its_place(tmp_path: Path) -> None:
    network = UnusedInput().eval()
    inputs, _ = _exported_call(network, (X, X), tmp_path / "model.onnx")
    assert inputs == ["x", "spare"]
    assert worst(tmp_path / "model.onnx", network(X, X), X, X) < 1e-4


@core
def test_dynamic_axes_stay_dynamic_and_others_fixed(exports: Exports) -> None:
    decoder = onnx.load(exports("decoder").path).graph
    ((first, length),) = shapes(decoder.input).values()
    assert first == "batch"
    assert isinstance(length, str)
    assert length != "batch"
    assert shapes(decoder.output) == {
        "logits": ["batch", length, 32], "hidden": ["batch", length, WIDTH]
    }  # fmt: skip
    partly = onnx.load(exports("partly").path).graph
    assert list(shapes(partly.input).values()) == [["batch", 3, WIDTH]]


@core
def test_sequence_length_may_differ_from_every_example(exports: Exports) -> None:
    for rows, length in ((1, 1), (3, 2), (2, 31)):
        inputs = tokens(rows, length, seed=5)
        assert worst(exports("decoder").path, converted("decoder").model(inputs), inputs) < 1e-4


@core
def test_example_of_one_row_gives_a_dynamic_file(tmp_path: Path) -> None:
    network = ManyOutputs().eval()
    _exported_call(network, (X[:1],), tmp_path / "model.onnx")
    assert worst(tmp_path / "model.onnx", network(X), X) < 1e-4


# Narrow types.


class Large(nn.Module):
    """Kept norms of activations near 1000, whose squares fp16 does not hold."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.norms = nn.Sequential(nn.RMSNorm(WIDTH, eps=1e-6), nn.Linear(WIDTH, WIDTH))
        self.other = nn.LayerNorm(WIDTH, eps=1e-6)
        self.bare = nn.RMSNorm(WIDTH, eps=1e-6, elementwise_affine=False)
        with torch.no_grad():
            self.first.weight.mul_(1500)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        z: Tensor = self.norms(y) + self.other(y) + self.bare(y)
        return z


@core
@pytest.mark.parametrize("opset", OPSETS)
def test_kept_norms_of_large_activations_do_not_overflow_in_fp16(
    opset: int, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    network = Large().eval()
    assert network.first(X).abs().mean() > 500
    path = tmp_path / "model.onnx"
    export_onnx(convert(network, example=(X,)), path, dtype="fp16", opset=opset)
    (found,) = run_by_reference(path, X)
    expected = network(X).detach().numpy()
    assert difference(found, expected) < 5e-3
    assert worst(path, network(X), X) < 5e-3


@core
def test_reference_notices_squares_that_overflow_in_fp16(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    network = Large().eval()
    monkeypatch.setattr(exporter, "_kept_norms", lambda model: set())
    path = tmp_path / "model.onnx"
    export_onnx(convert(network, example=(X,)), path, dtype="fp16", opset=18)
    with np.errstate(all="ignore"):
        (found,) = run_by_reference(path, X)
    assert difference(found, network(X).detach().numpy()) > 0.1


@core
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_model_in_another_dtype_is_exported_in_it(dtype: torch.dtype, tmp_path: Path) -> None:
    torch.manual_seed(0)
    parameters = FORMS["DyT"].parameters
    model = nn.Sequential(Residual(Squash(parameters, torch.tanh)), Residual(nn.LayerNorm(WIDTH)))
    model = model.to(dtype).eval()
    path = tmp_path / "model.onnx"
    chosen = {torch.float16: "fp16", torch.bfloat16: "bf16"}.get(dtype, "fp32")
    written = export_onnx(convert(model, example=(X.to(dtype),)), path, dtype=chosen)
    assert written.export_error is not None
    graph = onnx.load(path).graph
    element = {torch.float16: FLOAT16, torch.bfloat16: BFLOAT16, torch.float64: DOUBLE}
    assert types((*graph.input, *graph.output)) == {element[dtype]}


@core
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_model_is_exported_by_default(dtype: torch.dtype, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Residual(nn.LayerNorm(WIDTH))).to(dtype).eval()
    written = export_onnx(convert(model, example=(X.to(dtype),)), tmp_path / "model.onnx")
    assert written.dtype == {torch.float16: "fp16", torch.bfloat16: "bf16"}[dtype]


class Rotary(Call):
    """Rotated by an angle that grows with the place in the sequence."""

    def forward(self, x: Tensor) -> Tensor:
        return rotated(self.through(x))


@core
@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_positions_of_long_sequences_stay_exact(dtype: str, tmp_path: Path) -> None:
    auto = torch.export.Dim.AUTO
    network = Rotary().eval()
    result = convert(network, example=(X,), dynamic_shapes=({0: auto, 1: auto},))
    export_onnx(result, tmp_path / "model.onnx", dtype=dtype)
    for length in (8, 4000):
        x = normal(1, length, WIDTH)
        assert worst(tmp_path / "model.onnx", network(x), x) < LIMITS[dtype]


# Files that come from ONNX.


def _source(folder: Path, opset: int = 18, **options: Any) -> Path:
    """A file of torch's own exporter, with two norms."""
    torch.manual_seed(0)
    model = nn.Sequential(Residual(nn.LayerNorm(WIDTH)), Residual(nn.RMSNorm(WIDTH))).eval()
    path = folder / "source.onnx"
    shape = ({0: torch.export.Dim("batch")},)
    torch.onnx.export(
        model, (X,), path, dynamo=True, opset_version=opset, dynamic_shapes=shape,
        input_names=["pixels"], output_names=["scores"], verbose=False, **options,
    )  # fmt: skip
    return path


def _onnx_batches() -> list[dict[str, Array]]:
    return [{"pixels": normal(8, 3, WIDTH, seed=place).numpy()} for place in range(4)]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An ONNX file of opset 18."""
    return _source(tmp_path_factory.mktemp("source"), external_data=False)


@pytest.fixture
def from_onnx(source: Path) -> Conversion:
    """It, with its second norm converted."""
    return convert(source, _onnx_batches(), mode="all", fit="diagonal", exclude=["^0"])


def _expected(result: Conversion, x: Tensor) -> list[Array]:
    graph: Any = result.graph
    segment = graph.segment(list(graph.inputs.values()), list(graph.outputs.values()))
    return [np.asarray(y) for y in segment([x.numpy()])]


@core
@pytest.mark.parametrize("opset", [None, 18, 20, 22])
@pytest.mark.parametrize("dtype", DTYPES)
def test_file_from_onnx_computes_the_same(
    from_onnx: Conversion, opset: int | None, dtype: str, tmp_path: Path
) -> None:
    written = export_onnx(from_onnx, tmp_path / "model.onnx", opset=opset, dtype=dtype)
    assert written.opset == (opset or 18)
    onnx.checker.check_model(str(written.path), full_check=True)
    file = onnx.load(written.path)
    assert [node.op_type for node in our_nodes(file)] == ["DyT"]
    assert shapes(file.graph.input) == {"pixels": ["batch", 3, WIDTH]}
    assert list(shapes(file.graph.output)) == ["scores"]
    for rows in (1, 5):
        x = normal(rows, 3, WIDTH, seed=7)
        (expected,) = _expected(from_onnx, x)
        assert difference(run(written.path, x)["scores"], expected) < LIMITS[dtype]


@core
@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_export_leaves_the_converted_model_alone(
    from_onnx: Conversion, dtype: str, tmp_path: Path
) -> None:
    first = export_onnx(from_onnx, tmp_path / "first.onnx").path.read_bytes()
    export_onnx(from_onnx, tmp_path / "narrow.onnx", dtype=dtype)
    assert export_onnx(from_onnx, tmp_path / "second.onnx").path.read_bytes() == first


@core
def test_export_leaves_the_torch_model_alone(tmp_path: Path) -> None:
    model = converted("partly").model
    before = {name: value.clone() for name, value in model.state_dict().items()}
    export_onnx(converted("partly"), tmp_path / "model.onnx", dtype="bf16")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@core
@pytest.mark.parametrize("opset", [18, 20])
def test_older_opset_than_the_file_has_is_reached_or_refused(opset: int, tmp_path: Path) -> None:
    source = _source(tmp_path, 20, external_data=False)
    result = convert(source, _onnx_batches(), mode="all", fit="diagonal")
    written = export_onnx(result, tmp_path / "model.onnx", opset=opset)
    assert written.opset == opset
    onnx.checker.check_model(str(written.path), full_check=True)


@core
@pytest.mark.parametrize("dtype", DTYPES)
def test_own_file_can_be_converted_and_exported_again(
    exports: Exports, dtype: str, tmp_path: Path
) -> None:
    again = convert(exports("partly").path)
    written = export_onnx(again, tmp_path / "again.onnx", dtype=dtype)
    file = onnx.load(written.path)
    assert Counter(node.op_type for node in our_nodes(file)) == NODES["partly"]
    inputs = batch("partly", 3)
    assert worst(written.path, converted("partly").model(*inputs), *inputs) < LIMITS[dtype]


@core
@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_own_narrow_file_can_be_converted_and_exported_again(
    exports: Exports, dtype: str, tmp_path: Path
) -> None:
    again = convert(exports("partly", dtype).path)
    written = export_onnx(again, tmp_path / "again.onnx", dtype=dtype)
    assert Counter(node.op_type for node in our_nodes(onnx.load(written.path))) == NODES["partly"]


@core
def test_names_survive_another_round(exports: Exports, tmp_path: Path) -> None:
    first = onnx.load(exports("trained").path)
    written = export_onnx(convert(exports("trained").path), tmp_path / "again.onnx")
    again = onnx.load(written.path)
    assert initializers(again).keys() == initializers(first).keys()


@core
def test_file_from_onnx_says_nothing_of_the_machine(source: Path, tmp_path: Path) -> None:
    proto = onnx.load(source)
    for node in proto.graph.node:  # as torch's exporter wrote it for years
        entry = node.metadata_props.add()
        entry.key, entry.value = "pkg.torch.onnx.stack_trace", f'File "{ROOT}/model.py", line 1'
    onnx.save(proto, tmp_path / "source.onnx")
    result = convert(tmp_path / "source.onnx", _onnx_batches(), mode="all", fit="diagonal")
    text = export_onnx(result, tmp_path / "model.onnx").path.read_bytes()
    assert b"stack_trace" not in text
    assert str(ROOT).encode() not in text


@core
def test_onnx_input_with_weights_in_another_file_is_exported(tmp_path: Path) -> None:
    folder = tmp_path / "source"
    folder.mkdir()
    source = _source(folder, external_data=False)
    proto = onnx.load(source)
    onnx.save(proto, source, save_as_external_data=True, location="weights.bin", size_threshold=0)
    assert (folder / "weights.bin").exists()
    result = convert(source, _onnx_batches(), mode="all", fit="diagonal")
    written = export_onnx(result, tmp_path / "model.onnx")
    assert {path.name for path in tmp_path.iterdir()} == {"source", "model.onnx"}
    x = normal(2, 3, WIDTH, seed=7)
    (expected,) = _expected(result, x)
    assert difference(run(written.path, x)["scores"], expected) < 1e-4


# Weights beside the file.


@core
@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_above_the_limit_lie_beside_the_file(
    dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnx_weights, "EMBEDDED_BYTES", 1000)
    monkeypatch.setattr(onnx_weights, "LARGE_BYTES", 100)
    (tmp_path / "model.onnx").write_text("old")
    (tmp_path / f"model.onnx.{'0' * 16}.data").write_text("old data")
    written = export_onnx(converted("partly"), tmp_path / "model.onnx", dtype=dtype)
    files = {path.name: path.stat().st_size for path in tmp_path.iterdir()}
    name, data = sorted(files)
    assert name == "model.onnx"
    assert data.startswith("model.onnx.")
    assert written.bytes == sum(files.values())
    assert files[data] > 1000
    onnx.checker.check_model(str(written.path), full_check=True)
    inputs = batch("partly", 3)
    assert worst(written.path, converted("partly").model(*inputs), *inputs) < LIMITS[dtype]
    (tmp_path / "elsewhere").mkdir()
    for name in files:
        (tmp_path / name).rename(tmp_path / "elsewhere" / name)
    moved = tmp_path / "elsewhere" / "model.onnx"
    assert worst(moved, converted("partly").model(*inputs), *inputs) < LIMITS[dtype]


# What goes wrong.


@core
@pytest.mark.parametrize("dtype", ["float16", "FP16", "", "int8"])
def test_unknown_dtype_is_refused(dtype: str, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=f"^dtype is '{dtype}'; allowed: fp32, fp16, bf16$"):
        export_onnx(converted("trained"), tmp_path / "model.onnx", dtype=dtype)
    assert not list(tmp_path.iterdir())


@core
@pytest.mark.parametrize("opset", [0, 17, 24, -1])
def test_unknown_opset_is_refused(opset: int, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=f"^opset is {opset}; allowed: 18 to 23$"):
        export_onnx(converted("trained"), tmp_path / "model.onnx", opset=opset)
    assert not list(tmp_path.iterdir())


@core
def test_unknown_provider_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"^provider is 'tpu'"):
        export_onnx(converted("trained"), tmp_path / "model.onnx", provider="tpu")
    assert not list(tmp_path.iterdir())


@core
def test_missing_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="its folder does not exist"):
        export_onnx(converted("trained"), tmp_path / "missing" / "model.onnx")
    assert not list(tmp_path.iterdir())


@core
def test_folder_as_target_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="it is a folder"):
        export_onnx(converted("trained"), tmp_path)
    assert not list(tmp_path.iterdir())


@core
@pytest.mark.parametrize("old", [None, b"old"])
def test_file_that_differs_is_not_kept(
    old: bytes | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "model.onnx"
    if old is not None:
        target.write_bytes(old)
    save = exporter.save

    def spoil(model: Any, path: Path, *options: Any) -> Any:
        saved = save(model, path, *options)
        file = onnx.load(path)
        for tensor in file.graph.initializer:
            if tensor.name.endswith("gamma"):
                array = onnx.numpy_helper.to_array(tensor)
                tensor.CopyFrom(onnx.numpy_helper.from_array(array * 1.01, tensor.name))
        onnx.save(file, path)
        return saved

    monkeypatch.setattr(exporter, "save", spoil)
    with pytest.raises(VerificationError, match=r"differs from the converted one by 0\.0"):
        export_onnx(converted("trained"), target)
    left = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert left == ({} if old is None else {"model.onnx": old})


@core
def test_output_that_is_no_number_is_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Session.run

    def spoil(session: Any, arrays: Sequence[Array]) -> list[Array]:
        first, *rest = run(session, arrays)
        return [first, *(np.full_like(array, np.nan) for array in rest)]

    result = convert(ManyOutputs().eval(), example=(X,))
    monkeypatch.setattr(Session, "run", spoil)
    with pytest.raises(VerificationError):
        export_onnx(result, tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


class Masked(Call):
    """Logits of which some are ruled out."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.through(x)
        return y.masked_fill(torch.arange(WIDTH) > 12, -torch.inf)


@core
def test_outputs_may_be_infinite_where_the_model_says_so(tmp_path: Path) -> None:
    network = Masked().eval()
    written = export_onnx(convert(network, example=(X,)), tmp_path / "model.onnx")
    np.testing.assert_allclose(
        run(written.path, X)["output"], network(X).detach().numpy(), rtol=1e-4, atol=1e-5
    )


@core
def test_invalid_file_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model.onnx").write_text("old")

    def spoil(model: Any) -> None:
        next(node for node in model.graph if not node.domain).op_type = "NoSuchOperator"

    monkeypatch.setattr(exporter, "_name_axes", spoil)
    with pytest.raises(ExportError, match="not valid ONNX"):
        export_onnx(converted("trained"), tmp_path / "model.onnx")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["old"]


@core
def test_meta_weights_are_refused(tmp_path: Path) -> None:
    with torch.device("meta"):
        model = nn.Sequential(Residual(nn.LayerNorm(WIDTH))).eval()
    result = convert(model, example=(torch.empty(2, 3, WIDTH, device="meta"),))
    with pytest.raises(ExportError, match="weights are not loaded"):
        export_onnx(result, tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


class Unexportable(Call):
    """Holds an operator that ONNX has no translation for."""

    def forward(self, x: Tensor) -> Tensor:
        return self.through(torch.linalg.lu_solve(*torch.linalg.lu_factor(x[:, :, :3]), x))


@core
def test_operator_that_onnx_lacks_is_named(tmp_path: Path) -> None:
    result = convert(Unexportable().eval(), example=(X,))
    with pytest.raises(ExportError, match=r"torch\.onnx\.export cannot write") as raised:
        export_onnx(result, tmp_path / "model.onnx")
    assert "\n" not in str(raised.value)
    assert not list(tmp_path.iterdir())


@core
def test_export_is_a_public_name() -> None:
    assert dyt_compile.export_onnx is export_onnx
