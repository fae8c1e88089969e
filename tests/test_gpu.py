"""Models on a GPU: converted, recovered and compiled there, against what the CPU finds."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor, nn
from torch.torch_version import TorchVersion

import dyt_compile
import dyt_compile.nn as dyt_nn
from dyt_compile import Calibration

from .passes.test_calibrate import _assert_close
from .test_inductor import EXACT, every_16_bits, excess, ulp
from .test_torchrun import MODEL, told

pytestmark = pytest.mark.gpu

NAMES: dict[str, object] = {}
exec(MODEL, NAMES)
ON_GPU = """
def on_gpu():
    model, (x,) = load()
    return model.cuda(), (x.cuda(),)

def rows():
    return [(x.cuda(),) for (x,) in batches()]
"""

FLOAT32 = 2e-3
"""Products on a GPU may take TF32, ten bits of precision, and add in another order."""


def network(device: str) -> nn.Module:
    """The same weights wherever it lies."""
    module: nn.Module = NAMES["load"]()[0]  # type: ignore[operator]
    return module.to(device)


def batches(device: str) -> list[tuple[Tensor]]:
    """The same rows."""
    return [(x.to(device),) for (x,) in NAMES["batches"]()]  # type: ignore[operator]


def test_calibration_is_that_of_the_cpu() -> None:
    here, there = (dyt_compile.calibrate(network(d), batches(d)) for d in ("cpu", "cuda"))
    _assert_close(here, there, FLOAT32)


@pytest.mark.parametrize("mode", ["all", "budget", "exact"])
def test_converted_model_lies_where_the_model_lies(mode: str, tmp_path: Path) -> None:
    model, data = network("cuda"), batches("cuda")
    made = dyt_compile.convert(model, data, mode=mode, budget=0.3)
    assert {tensor.device.type for tensor in made.model.parameters()} == {"cuda"}
    x = data[0][0]
    y = made.model(x)
    assert y.device.type == "cuda"
    on_cpu = copy.deepcopy(made.model).cpu()(x.cpu())
    torch.testing.assert_close(y.cpu(), on_cpu, rtol=FLOAT32, atol=FLOAT32)
    path = dyt_compile.export_onnx(made, tmp_path / "made.onnx").path
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: x.cpu().numpy()})
    np.testing.assert_allclose(found, on_cpu.detach().numpy(), rtol=1e-4, atol=1e-4)


def test_compiled_conversion_computes_what_the_eager_one_does() -> None:
    model, data = network("cuda"), batches("cuda")
    fits = dyt_compile.calibrate(model, data, fit="diagonal")
    made = dyt_compile.convert(model, calibration=fits, example=data[0], fold=False)
    from dyt_compile.backends import dyt

    compiled = torch.compile(model, backend=dyt, options={"calibration": fits})
    with torch.no_grad():
        torch.testing.assert_close(
            compiled(data[0][0]), made.model(data[0][0]), rtol=FLOAT32, atol=FLOAT32
        )


@pytest.mark.parametrize("train", ["dyt", "all"])
def test_recovery_on_a_gpu_lowers_the_error(train: str) -> None:
    data = batches("cuda")
    converted = dyt_compile.convert(network("cuda"), data, mode="all")
    made = dyt_compile.recover(converted, data, steps=40, train=train)
    assert made.report.recovery is not None
    assert made.report.error < made.report.recovery.before
    assert {tensor.device.type for tensor in made.model.parameters()} == {"cuda"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["DyTBare", "Derf"])
def test_compiled_operator_is_within_an_ulp_over_all_narrow_values(
    name: str, dtype: torch.dtype
) -> None:
    squash = "erf" if name == "Derf" else "tanh"
    one, zero = torch.ones(1, device="cuda"), torch.zeros(1, device="cuda")
    more = (one, zero, one.to(dtype), zero.to(dtype)) if name == "Derf" else (one,)
    operator = getattr(torch.ops.dyt, name)
    x = every_16_bits(dtype).cuda()
    y = torch.compile(lambda x: operator(x, *more))(x).cpu()
    x = x.cpu()
    assert bool((y.isnan() == x.isnan()).all())
    known = (x.abs() >= torch.finfo(dtype).tiny) | (x == 0)  # a GPU may take smaller ones for 0
    assert excess(y[known], x[known], squash) <= 1
    t = EXACT[squash](x[known].double())
    eager = operator(x.cuda(), *more).cpu()[known]
    assert bool(((eager.double() - t).abs() <= ulp(t, dtype)).all())


@pytest.mark.skipif(
    TorchVersion(torch.__version__) < "2.13", reason="Inductor does not say that it traces"
)
def test_bfloat16_takes_the_hardware_s_tanh() -> None:
    from torch._inductor.utils import run_and_get_code

    module = dyt_nn.DynamicTanh(64).to("cuda", torch.bfloat16)
    x = torch.randn(8, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    y, codes = run_and_get_code(torch.compile(module), x)
    assert any("tanh.approx.f32" in code for code in codes)
    y.sum().backward()
    assert x.grad is not None
    assert bool(x.grad.isfinite().all())


@pytest.mark.parametrize("more", [(), ("--sharded",)], ids=["whole", "sharded"])
def test_rank_on_a_gpu_recovers(tmp_path: Path, more: tuple[str, ...]) -> None:
    path = tmp_path / "network.py"
    path.write_text(MODEL + ON_GPU)
    out = tmp_path / "recovered.pt2"
    for command in (
        ["calibrate", f"{path}:on_gpu", "--data", f"{path}:rows", "-o", f"{tmp_path}/f"],
        ["recover", f"{path}:on_gpu", "--data", f"{path}:rows", "--steps", "6",
         "-o", str(out), *more],
    ):  # fmt: skip
        run = [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1",
            "-m", "dyt_compile", *command,
        ]  # fmt: skip
        done = subprocess.run(run, env=os.environ, capture_output=True, text=True, check=False)
        assert done.returncode == 0, told(done.stderr) or done.stderr
    assert out.exists()
    assert Calibration.load(tmp_path / "f").fits
