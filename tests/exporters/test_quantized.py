"""Quantised files of torch models: in every type, and with integer kernels in the runtimes."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from torch import Tensor, nn

import dyt_compile
from dyt_compile import Conversion, export_onnx
from dyt_compile.errors import OptionError
from dyt_compile.exporters.torch_files import export_torch
from dyt_compile.runtime import Session
from dyt_compile.sites import NormKind

pytest.importorskip("onnxruntime")

WIDTH, TOKENS, BLOCKS = 32, 5, 2
PRODUCTS = 3 * BLOCKS + 1


class Block(nn.Module):
    """Attention over one head, whose projections are apart, and an MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.query, self.value = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        query = self.query(y)
        x = x + torch.softmax(query @ query.mT / WIDTH**0.5, -1) @ self.value(y)
        z: Tensor = x + self.down(torch.nn.functional.gelu(self.up(self.norm2(x))))
        return z


class Network(nn.Module):
    """Blocks, and a head on the mean of what the last norm gives: a Gemm."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(Block() for _ in range(BLOCKS)))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.norm(self.blocks(x)).mean(1))
        return y


@pytest.fixture(scope="module")
def trained() -> nn.Module:
    """As if trained with DyT: gamma and beta that are not neutral."""
    torch.manual_seed(0)
    model = dyt_compile.convert_for_training(Network(), 0.8).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name and not name.endswith("alpha"):
            parameter.data.add_(0.2 * torch.randn_like(parameter))
    return model


DATA = [
    (torch.randn(8, TOKENS, WIDTH, generator=torch.Generator().manual_seed(s)),) for s in (1, 2)
]


def quantized(model: nn.Module, dtype: str, **options: Any) -> Conversion:
    return dyt_compile.convert(model, DATA, mode="exact", fold=True, quantize=dtype, **options)


@pytest.mark.parametrize("dtype", ["int8", "fp8"])
@pytest.mark.parametrize("wide", ["fp32", "fp16", "bf16"])
def test_file_computes_what_was_measured(
    trained: nn.Module, dtype: str, wide: str, tmp_path: Path
) -> None:
    result = quantized(trained, dtype)
    told = result.report.quantized
    assert told is not None
    assert told.products == PRODUCTS
    assert told.left == ()
    assert {name: into for name, _, into in told.sites}["blocks.1.norm1"] == (
        "blocks.1.query", "blocks.1.value",
    )  # fmt: skip
    path = export_onnx(result, tmp_path / "model.onnx", dtype=wide).path
    x = torch.cat([x for (x,) in DATA])
    with torch.no_grad():
        expected = trained(x).numpy()
    (found,) = Session(path).run([x.numpy()])
    error = np.linalg.norm(found - expected) / np.linalg.norm(expected)
    if wide == "fp32":
        assert error == pytest.approx(told.error, rel=1e-2)
    assert error < {"int8": 0.015, "fp8": 0.06}[dtype]


@pytest.mark.parametrize("opset", [18, 23])
def test_files_of_other_opsets_have_the_products_that_a_budget_chose(
    trained: nn.Module, opset: int, tmp_path: Path
) -> None:
    whole = quantized(trained, "int8").report.quantized
    assert whole is not None
    assert whole.total is not None
    result = quantized(trained, "int8", budget=whole.total)  # and no room for the uncertainty
    assert result.quantized is not None
    assert 0 < result.quantized.products < PRODUCTS
    path = export_onnx(result, tmp_path / "model.onnx", opset=opset).path
    x = DATA[0][0].numpy()
    (found,), (expected,), (float_,) = (
        Session(model).run([x]) for model in (path, result.quantized.model, whole_model(trained))
    )
    size = np.linalg.norm(expected)
    assert np.linalg.norm(found - expected) / size < 1e-4 < np.linalg.norm(float_ - expected) / size


def whole_model(trained: nn.Module) -> Any:
    """With every product over eight bits."""
    made = quantized(trained, "int8").quantized
    assert made is not None
    return made.model


def test_every_product_behind_a_dyt_runs_as_integers(trained: nn.Module, tmp_path: Path) -> None:
    import onnxruntime

    path = export_onnx(quantized(trained, "int8"), tmp_path / "model.onnx").path
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 3
    onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    found = Counter(node.op_type for node in ir.load(tmp_path / "optimized.onnx").graph)
    assert found["MatMulIntegerToFloat"] == PRODUCTS - 1
    assert found["QGemm"] == 1
    assert not found["DequantizeLinear"]
    assert found["QuantizeLinear"] == PRODUCTS


def test_file_with_a_norm_that_stays_is_the_quantised_model(tmp_path: Path) -> None:
    """Its eps is no number of 32 bits: in memory it is 1e-5, in the file what is next to that."""
    torch.manual_seed(0)
    batches = [(torch.randn(16, TOKENS, WIDTH),) for _ in range(2)]
    result = dyt_compile.convert(
        Network().eval(), batches, mode="all", exclude="^norm$", quantize="int8"
    )
    written = export_onnx(result, tmp_path / "model.onnx")
    kinds = Counter(node.op_type for node in onnx.load(tmp_path / "model.onnx").graph.node)
    assert (kinds["LayerNormalization"], kinds["QuantizeLinear"]) == (1, PRODUCTS - 1)
    assert written.structure is not None


def openvino_model(path: Path) -> Any:
    openvino = pytest.importorskip("openvino")
    options = {"INFERENCE_PRECISION_HINT": "f32"}
    return openvino.Core().compile_model(str(path), "CPU", options)


def test_every_product_behind_a_dyt_runs_as_integers_in_openvino(
    trained: nn.Module, tmp_path: Path
) -> None:
    result = quantized(trained, "int8", runtime="openvino")
    compiled = openvino_model(export_onnx(result, tmp_path / "model.onnx").path)
    kernels = Counter(
        info["runtimePrecision"].astype(str)
        for info in (node.get_rt_info() for node in compiled.get_runtime_model().get_ops())
        if info["layerType"].astype(str) == "FullyConnected"
    )
    assert kernels["i8"] + kernels["u8"] == PRODUCTS, kernels


def test_dyt_is_spelled_out_for_openvino(trained: nn.Module, tmp_path: Path) -> None:
    (x,), path = DATA[0], tmp_path / "model.onnx"
    export_onnx(dyt_compile.convert(trained, example=(x,), runtime="openvino"), path)
    assert {node.domain for node in onnx.load(path).graph.node} == {""}
    assert "CastLike" not in {node.op_type for node in onnx.load(path).graph.node}
    assert {site.kind for site in dyt_compile.inspect(path).sites} == {NormKind.DYT}
    (logits,) = openvino_model(path)([x.numpy()]).values()
    assert np.allclose(logits, trained(x).detach().numpy(), atol=1e-5)


@pytest.mark.parametrize("dtype", ["int8", "fp8"])
def test_tensorrt_quantises_inside_the_kernel_of_the_dyt(
    trained: nn.Module, dtype: str, tmp_path: Path
) -> None:
    pytest.importorskip("tensorrt_rtx")
    from .engines import engine

    result = quantized(trained, dtype, runtime="tensorrt")
    path = export_onnx(result, tmp_path / "model.onnx", dtype="fp16").path
    layers = engine(path).layers
    behind = [
        layer for layer in layers
        if "Tanh" in layer.name and any("quantized" in source for source in layer.sources)
    ]  # fmt: skip
    assert len(behind) >= 2 * BLOCKS  # before the head stands a mean


def test_torch_files_of_a_quantised_model_are_refused(trained: nn.Module, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"quantised model is written as \.onnx alone"):
        export_torch(quantized(trained, "int8"), tmp_path / "model.pt2")


def test_recover_of_a_quantised_model_is_refused() -> None:
    torch.manual_seed(0)
    result = dyt_compile.convert(Network().eval(), DATA, mode="all", quantize="int8")
    with pytest.raises(OptionError, match="recover trains floats"):
        dyt_compile.recover(result, DATA, steps=1)


def test_the_torch_model_stays_in_float(trained: nn.Module) -> None:
    result = quantized(trained, "int8")
    assert isinstance(result.model, nn.Module)
    with torch.no_grad():
        difference = (result.model(*DATA[0]) - trained(*DATA[0])).abs().max()
    assert difference < 1e-5
