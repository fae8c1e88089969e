"""The kernels on a GPU: their numbers, and the hardware's tanh itself over all narrow values."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from math import prod
from typing import Any

import numpy as np
import pytest

from dyt_compile.dyt import FORMS
from dyt_compile.exporters.plugin.entry import Entry, ceil_div, entry, layout, ptx

from .host import BF16, Array
from .nodes import NAMES, NODES, Node
from .reference import HARDWARE_TANH, ROUNDING, SMALLEST, added, outside

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
