"""Plugins ahead of time: led through TensorRT's own `tensorrt.plugin`, and run on the CPU."""

from __future__ import annotations

import ctypes
import importlib.util
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from dyt_compile.errors import ExportError, MissingDependencyError, OptionError
from dyt_compile.exporters.plugin import ahead_of_time
from dyt_compile.exporters.plugin.entry import Entry, entry, layout, ptx

from .host import Array, aligned
from .nodes import DYT, NAMES, NODES
from .quick import Kernel, kernels
from .reference import added, outside

pytest.importorskip("tensorrt_lean_bindings")
pytest.importorskip("cuda.bindings.nvrtc")


@pytest.fixture(scope="module")
def found() -> list[Kernel]:
    """What TensorRT's code makes of all nodes."""
    return kernels([node.case() for node in NODES])


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory, for_host: Callable[..., None]) -> ctypes.CDLL:
    """The kernels of all nodes for the host: run_<name>(shape, pointers, rows, planes, columns)."""
    folder = tmp_path_factory.mktemp("entries")
    entries = {each.name: each for each in (node.entry() for node in NODES)}
    parts = [each.source + _runner(each) for each in entries.values()]
    (folder / "entries.cu").write_text("\n".join(parts))
    for_host(folder / "entries.so", folder / "entries.cu")
    return ctypes.CDLL(str(folder / "entries.so"))


def _runner(made: Entry) -> str:
    pointers = iter(range(len(made.parameters)))
    given = ", ".join(
        name if kind == "int" else f"pointers[{next(pointers)}]" for kind, name in made.parameters
    )
    return f"""
extern "C" void run_{made.name}(
    unsigned const* shape, void** pointers, int rows, int planes, int columns)
{{
    gridDim = dim3(shape[0], shape[1], shape[2]);
    blockDim = dim3(shape[3], shape[4], shape[5]);
    for (unsigned z = 0; z < gridDim.z; ++z)
    for (unsigned y = 0; y < gridDim.y; ++y)
    for (unsigned x = 0; x < gridDim.x; ++x)
    for (unsigned down = 0; down < blockDim.y; ++down)
    for (unsigned across = 0; across < blockDim.x; ++across)
    {{
        blockIdx = {{x, y, z}};
        threadIdx = {{across, down, 0}};
        {made.name}({given});
    }}
}}
"""


@pytest.mark.parametrize("place", range(len(NODES)), ids=lambda place: str(NODES[place]))
def test_kernel_and_launch_that_tensorrt_keeps_compute_the_node(
    found: list[Kernel], library: ctypes.CDLL, place: int
) -> None:
    node, kept = NODES[place], found[place]
    made = node.entry()
    assert kept.name == made.name
    shape = node.inputs["x"].shape
    outputs = [aligned(shape, node.out), aligned(shape, node.dtype)][: len(node.form.outputs)]
    arrays = [*(node.inputs[name] for name in node.form.inputs), *outputs]
    pointers = (ctypes.c_void_p * len(arrays))(*(array.ctypes.data for array in arrays))
    run = getattr(library, f"run_{made.name}")
    run((ctypes.c_uint * 6)(*kept.shape), pointers, *kept.extents)
    assert not outside(node.form, node.inputs, outputs[0]).any()
    for total in outputs[1:]:
        np.testing.assert_array_equal(total.view(np.uint8), added(node.inputs).view(np.uint8))


@pytest.mark.parametrize("place", range(len(NODES)), ids=lambda place: str(NODES[place]))
def test_kernel_takes_inputs_then_extents_then_outputs(found: list[Kernel], place: int) -> None:
    node, kept = NODES[place], found[place]
    code = kept.ptx.decode()
    (parameters,) = re.findall(rf"\.entry {kept.name}\((.*?)\)", code, re.DOTALL)
    kinds = re.findall(r"\.param \.(\w+)", parameters)
    expected = ["u64"] * len(node.form.inputs) + ["u32"] * 3 + ["u64"] * len(node.form.outputs)
    assert kinds == expected
    assert ".target sm_80" in code
    assert ".local" not in code


@pytest.mark.parametrize("place", range(len(NODES)), ids=lambda place: str(NODES[place]))
def test_outputs_have_the_shape_of_x_and_the_types_of_the_form(
    found: list[Kernel], place: int
) -> None:
    node, kept = NODES[place], found[place]
    assert kept.output_shapes == [list(node.inputs["x"].shape)] * len(node.form.outputs)
    types = [NAMES[node.out][0], NAMES[node.dtype][0]]
    assert kept.output_types == types[: len(node.form.outputs)]


def test_launch_is_wide_where_the_known_sizes_allow_it() -> None:
    widths = {str(node): node.entry().width for node in NODES[16:]}
    assert list(widths.values()) == [4, 8, 1, 16, 1, 1, 8, 8, 1, 1]


def test_ptx_has_the_hardware_tanh_for_narrow_types_alone() -> None:
    for dtype, out, expected in (("Half", "Half", True), ("float", "float", False)):
        laid = layout(DYT, {"x": [2, 64], "alpha": [1], "gamma": [64], "beta": [64]})
        code = ptx(entry(DYT, dtype, out, laid, [64]).source, 90).decode()
        assert ("tanh.approx.f32" in code) is expected
        assert "ld.global.nc.v4.u32" in code
        assert re.search(r"st\.global\.v4\.[uf]32", code)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({"x": [2, 64], "alpha": [1], "gamma": [63], "beta": [64]}, r"gamma has shape \[63\]"),
        ({"x": [2, 64], "alpha": [1], "gamma": [64], "beta": [2, 1]}, r"beta has shape \[2, 1\]"),
        ({"x": [2, 64], "alpha": [2, 64], "gamma": [64], "beta": [64]}, r"alpha has shape"),
        ({"x": [64], "alpha": [2, 1], "gamma": [64], "beta": [64]}, r"alpha has shape"),
    ],
)
def test_shapes_that_do_not_fit_are_named(shapes: dict[str, Any], message: str) -> None:
    with pytest.raises(ExportError, match=message):
        layout(DYT, shapes)


def test_layout_of_unknown_sizes_fits() -> None:
    laid = layout(DYT, {"x": [None, None], "alpha": [1], "gamma": [64], "beta": [64]})
    assert (laid.rows, laid.planes, laid.columns) == (range(1), range(0), range(1, 2))


def test_source_that_does_not_compile_shows_its_first_error() -> None:
    with pytest.raises(ExportError, match=r"not compile the kernel: entry.cu\(2\): error: "):
        ptx('#include "kernel.cuh"\nnonsense', 80)


@pytest.mark.skipif(importlib.util.find_spec("tensorrt") is not None, reason="it is installed")
def test_missing_tensorrt_is_named() -> None:
    with pytest.raises(MissingDependencyError, match=r"dyt-compile\[gpu\]"):
        ahead_of_time.register()


@pytest.mark.parametrize("version", ["10.8.0.43", "8.6.1", "10.14.1.48"])
def test_versions_without_working_ahead_of_time_plugins_are_refused(version: str) -> None:
    with pytest.raises(OptionError, match=f"TensorRT is {re.escape(version)}; .* 10.9 or newer"):
        ahead_of_time._check_version(version)


@pytest.mark.parametrize("version", ["10.9.0.34", "10.13.3", "10.15.0", "11.4.0.106"])
def test_other_versions_are_taken(version: str) -> None:
    ahead_of_time._check_version(version)


def test_check_of_the_kernels_can_fail(found: list[Kernel], library: ctypes.CDLL) -> None:
    """With one extent wrong the numbers are."""
    node, kept = NODES[0], found[0]
    y = aligned(node.inputs["x"].shape, node.out)
    y[...] = 0
    arrays: list[Array] = [*(node.inputs[name] for name in node.form.inputs), y]
    pointers = (ctypes.c_void_p * len(arrays))(*(array.ctypes.data for array in arrays))
    rows, planes, columns = kept.extents
    run = getattr(library, f"run_{kept.name}")
    run((ctypes.c_uint * 6)(*kept.shape), pointers, rows - 1, planes, columns)
    assert outside(node.form, node.inputs, y).any()
