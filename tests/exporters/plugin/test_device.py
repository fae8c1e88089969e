"""On a GPU: the plugin from creator to enqueue, its kernels, and the hardware's own tanh."""

from __future__ import annotations

import ctypes
import subprocess
from collections.abc import Sequence
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.gpu import kernels
from benchmarks.gpu.predict import Case
from dyt_compile.dyt import FORMS, Form
from dyt_compile.exporters.plugin.build import SOURCES
from dyt_compile.exporters.plugin.entry import Entry, ceil_div, entry, layout, ptx

from .conftest import CPP
from .host import BF16, OUTPUT_DTYPES, Array, Host
from .nodes import NAMES, NODES, Node
from .reference import HARDWARE_TANH, ROUNDING, SMALLEST, added, outside, samples
from .test_numbers import CASES

driver = pytest.importorskip("cuda.bindings.driver")

pytestmark = pytest.mark.gpu


def checked(result: tuple[Any, ...]) -> Any:
    """What a call of the driver gives."""
    status, *values = result
    assert status == driver.CUresult.CUDA_SUCCESS, status
    return values[0] if values else None


class Device:
    """The first GPU."""

    def __init__(self) -> None:
        checked(driver.cuInit(0))
        device = checked(driver.cuDeviceGet(0))
        context = checked(driver.cuDevicePrimaryCtxRetain(device))
        checked(driver.cuCtxSetCurrent(context))
        attribute = driver.CUdevice_attribute
        self.arch = 10 * checked(
            driver.cuDeviceGetAttribute(
                attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, device
            )
        ) + checked(
            driver.cuDeviceGetAttribute(
                attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR, device
            )
        )

    def run(
        self, made: Entry, inputs: Sequence[Array], extents: Sequence[int], outputs: Sequence[Array]
    ) -> None:
        """Launch a kernel once; fills `outputs`."""
        module = checked(driver.cuModuleLoadData(ptx(made.source, self.arch) + b"\0"))
        function = checked(driver.cuModuleGetFunction(module, made.name.encode()))
        pointers = [checked(driver.cuMemAlloc(array.nbytes)) for array in (*inputs, *outputs)]
        for pointer, array in zip(pointers, inputs, strict=False):
            checked(driver.cuMemcpyHtoD(pointer, array.ctypes.data, array.nbytes))
        count = len(inputs)
        given = [int(pointer) for pointer in pointers]
        values = (*given[:count], *extents, *given[count:])
        kinds = (
            *[ctypes.c_void_p] * count, *[ctypes.c_int] * 3, *[ctypes.c_void_p] * len(outputs)
        )  # fmt: skip
        checked(driver.cuLaunchKernel(function, *launch(made, *extents), 0, 0, (values, kinds), 0))
        checked(driver.cuCtxSynchronize())
        for pointer, array in zip(pointers[count:], outputs, strict=True):
            checked(driver.cuMemcpyDtoH(array.ctypes.data, pointer, array.nbytes))
        for pointer in pointers:
            checked(driver.cuMemFree(pointer))
        checked(driver.cuModuleUnload(module))


def launch(made: Entry, rows: int, planes: int, columns: int) -> tuple[int, ...]:
    """Grid x, y, z and block x, y, z."""
    across = ceil_div(columns, made.width * made.across)
    down = min(ceil_div(rows, made.down), 64)
    return across, down, min(planes, 65535), made.across, made.down, 1


@pytest.fixture(scope="module")
def device() -> Device:
    """The first GPU."""
    return Device()


@pytest.mark.parametrize("node", NODES, ids=str)
def test_kernel_computes_the_node(device: Device, node: Node) -> None:
    shapes = {name: list(value.shape) for name, value in node.inputs.items()}
    laid = layout(node.form, shapes)
    extents = [
        prod(shapes["x"][axis] for axis in axes) for axes in (laid.rows, laid.planes, laid.columns)
    ]
    x = node.inputs["x"]
    outputs = [np.empty(x.shape, node.out), np.empty(x.shape, node.dtype)]
    outputs = outputs[: len(node.form.outputs)]
    inputs = [node.inputs[name] for name in node.form.inputs]
    device.run(node.entry(), inputs, extents, outputs)
    assert not outside(node.form, node.inputs, outputs[0]).any()
    for total in outputs[1:]:
        np.testing.assert_array_equal(total.view(np.uint8), added(node.inputs).view(np.uint8))


@pytest.mark.parametrize("dtype", [np.dtype(np.float16), BF16], ids=str)
def test_hardware_tanh_of_all_narrow_inputs_keeps_the_bound(
    device: Device, dtype: np.dtype[Any]
) -> None:
    form = FORMS["DyTBare"]
    x = np.arange(65536, dtype=np.uint16).view(dtype)
    name = NAMES[dtype][1]
    made = entry(form, name, name, layout(form, {"x": [65536], "alpha": [1]}), [65536])
    y = np.empty_like(x)
    device.run(made, [x, np.ones(1, np.float32)], [1, 1, 65536], [y])
    with np.errstate(invalid="ignore"):
        exact, found = np.tanh(x.astype(np.float64)), y.astype(np.float64)
    np.testing.assert_array_equal(np.isnan(found), np.isnan(exact))
    relative = HARDWARE_TANH + ROUNDING[dtype] * (1 + HARDWARE_TANH)
    bound = np.abs(exact) * relative + SMALLEST[dtype]
    assert (np.abs(found - exact) <= bound)[~np.isnan(exact)].all()


@pytest.fixture(scope="module")
def library(nvcc: Path, headers: Path, device: Device, tmp_path_factory: Any) -> Host:
    """The plugin for this GPU, with the driver that leads its life."""
    out = tmp_path_factory.mktemp("device") / "libdyt_device.so"
    command = [
        str(nvcc), "-std=c++17", "-O2", "-shared", "-cudart=static", "-Xcompiler=-fPIC",
        f"-arch=sm_{device.arch}", f"-I{SOURCES}", "-isystem", str(headers), "-o", str(out),
        str(SOURCES / "plugin.cu"), str(CPP / "driver.cpp"),
    ]  # fmt: skip
    subprocess.run(command, check=True)
    return Host(out)


def pinned(array: Array) -> Array:
    """A copy in memory that host and GPU both read at the same address."""
    memory = torch.empty(max(array.nbytes, 1), dtype=torch.uint8, pin_memory=True).numpy()
    made = memory[: array.nbytes].view(array.dtype).reshape(array.shape)
    made[...] = array
    return made


@pytest.mark.parametrize(("operator", "dtype", "out"), CASES)
@pytest.mark.parametrize(
    ("shape", "axis"), [((3, 5, 64), -1), ((300, 7), -1), ((2, 6, 4, 8), -3), ((2, 5, 3, 7), -3)],
    ids=str,
)  # fmt: skip
def test_plugin_lives_on_the_gpu(
    library: Host,
    operator: Form,
    dtype: np.dtype[Any],
    out: np.dtype[Any],
    shape: tuple[int, ...],
    axis: int,
) -> None:
    inputs = samples(operator, shape, dtype, axis=axis, per_channel=True)
    given = [pinned(inputs[name]) for name in operator.inputs]
    outputs = [pinned(np.zeros(shape, out))]
    if operator.residual:
        outputs.append(pinned(np.zeros(shape, dtype)))
    kind = OUTPUT_DTYPES[out] if operator.quantized else 0
    library.run(operator.name, given, outputs, kind)
    torch.cuda.synchronize()
    assert not outside(operator, inputs, outputs[0]).any()
    for total in outputs[1:]:
        np.testing.assert_array_equal(total.view(np.uint8), added(inputs).view(np.uint8))


def test_more_elements_than_32_bits_count(nvcc: Path, tmp_path: Path) -> None:
    case = Case("large", 2**19 + 3, 4096, "bf16", "bf16", residual=True)
    held = kernels.weights(case)
    x, residual = (
        torch.randn(case.rows, case.columns, device="cuda", dtype=torch.bfloat16) for _ in "xr"
    )
    found = kernels.plugin_way(kernels.built(tmp_path), case, held)(x, residual)
    torch.cuda.synchronize()
    last = slice(case.rows - 64, case.rows)
    parts = [tensor[last] for tensor in (x, residual, *found)]
    few = Case("last", 64, case.columns, "bf16", "bf16", residual=True)
    assert kernels.wrong(few, held, parts[0], parts[1], parts[2:]) == 0
