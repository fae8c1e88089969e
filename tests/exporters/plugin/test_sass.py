"""Machine code of every architecture: accesses, hardware tanh, registers, no local memory."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from benchmarks.gpu.predict import CASES, DEVICES, Device, Prediction, predict
from benchmarks.gpu.sass import BYTES, Instruction, Kernel, count, cuobjdump, kernels
from dyt_compile.exporters.plugin.build import ARCHITECTURES, PluginInfo

pytestmark = pytest.mark.skipif(cuobjdump() is None, reason="cuobjdump is not found")

LOAD, STORE = "LDG.E.128.CONSTANT", "STG.E.128"


@pytest.fixture(scope="module")
def found(plugin: PluginInfo) -> list[Kernel]:
    """All kernels of the library."""
    return kernels(plugin.path)


@pytest.fixture(scope="module")
def wide(found: list[Kernel]) -> list[Kernel]:
    """Those of the aligned path."""
    return [kernel for kernel in found if kernel.width > 1]


def _name(kernel: Kernel) -> str:
    added = "residual " * kernel.residual
    return f"sm_{kernel.arch} {kernel.dtype}→{kernel.out} {added}{kernel.squash} ×{kernel.width}"


def test_every_architecture_has_every_kernel(found: list[Kernel]) -> None:
    # dtypes, each with itself, INT8 and FP8; two functions; residual or not; aligned or not
    assert Counter(kernel.arch for kernel in found) == dict.fromkeys(
        ARCHITECTURES, 3 * 3 * 2 * 2 * 2
    )
    assert len({_name(kernel) for kernel in found}) == len(found)


def test_aligned_path_takes_sixteen_bytes_of_the_narrowest_type(wide: list[Kernel]) -> None:
    for kernel in wide:
        assert kernel.width * min(BYTES[kernel.dtype], BYTES[kernel.out]) == 16, _name(kernel)


def test_loop_reads_and_writes_each_byte_once_by_sixteen(wide: list[Kernel]) -> None:
    for kernel in wide:
        rows, size = kernel.rows_at_once(), BYTES[kernel.dtype]
        loads = rows * kernel.width * size * (1 + kernel.residual) // 16
        stored = BYTES[kernel.out] + size * kernel.residual
        assert count(kernel.loop(), "LDG") == {LOAD: loads}, _name(kernel)
        assert count(kernel.loop(), "ST") == {STORE: rows * kernel.width * stored // 16}, _name(
            kernel
        )


def test_parameters_are_read_by_sixteen_bytes_or_once_for_all(wide: list[Kernel]) -> None:
    """alpha, shift, gamma and beta each have one load for one value, and y_scale has one."""
    for kernel in wide:
        outside = count(kernel.instructions, "LDG") - count(kernel.loop(), "LDG")
        single = sum(number for code, number in outside.items() if ".128" not in code)
        parameters = 4 if kernel.squash == "erf" else 3
        assert single <= parameters + kernel.quantized, _name(kernel)
        assert outside[LOAD] > 0


def test_two_rows_are_asked_for_before_the_first_is_stored(wide: list[Kernel]) -> None:
    for kernel in wide:
        expected = 1 if kernel.width * BYTES[kernel.dtype] > 32 else 2
        assert kernel.rows_at_once() == expected, _name(kernel)
        codes = [each.code for each in kernel.loop()]
        loads = [place for place, code in enumerate(codes) if code == LOAD]
        assert max(loads) < codes.index(STORE), _name(kernel)


def test_narrow_types_take_the_hardware_tanh_and_nothing_else(wide: list[Kernel]) -> None:
    for kernel in wide:
        if kernel.squash == "tanh" and kernel.dtype != "fp32":
            expected = {"MUFU.TANH": kernel.width * kernel.rows_at_once()}
            assert count(kernel.loop(), "MUFU") == expected, _name(kernel)


def test_fp32_and_erf_do_not_take_the_hardware_tanh(found: list[Kernel]) -> None:
    for kernel in found:
        if kernel.squash == "erf" or kernel.dtype == "fp32":
            assert not count(kernel.instructions, "MUFU.TANH"), _name(kernel)


def test_index_arithmetic_divides_nothing(found: list[Kernel]) -> None:
    """A division of integers starts with I2F, that of floats has MUFU.RCP: of the scale, once."""
    for kernel in found:
        assert not count(kernel.instructions, "I2F"), _name(kernel)
        reciprocals = count(kernel.loop(), "MUFU.RCP").total()
        if kernel.dtype != "fp32" or kernel.squash == "erf":
            assert reciprocals == 0, _name(kernel)


def test_no_kernel_uses_local_memory(found: list[Kernel]) -> None:
    for kernel in found:
        assert not count(kernel.instructions, "LDL"), _name(kernel)
        assert not count(kernel.instructions, "STL"), _name(kernel)


def test_registers_leave_room_for_the_blocks_that_are_meant_to_fit(found: list[Kernel]) -> None:
    for kernel in found:
        blocks = (4 if kernel.quantized else 6) - (kernel.squash == "erf")
        assert kernel.registers * 128 * blocks <= 65536, _name(kernel)


def test_fp8_is_converted_in_hardware_where_there_is_such(wide: list[Kernel]) -> None:
    for kernel in wide:
        if kernel.out == "fp8" and kernel.arch >= 89:
            converted = count(kernel.loop(), "F2FP.SATFINITE.E4M3").total()
            assert converted == kernel.rows_at_once() * kernel.width // 2, _name(kernel)
            assert not count(kernel.instructions, "F2F."), _name(kernel)


def test_reader_finds_the_loop_that_stores() -> None:
    codes = ["LDG.E", "LDG.E.128", "STG.E.128", "BRA", "EXIT", "BRA"]
    lines = tuple(
        Instruction(16 * place, code, {3: "0x10", 5: "0x50"}.get(place, ""))
        for place, code in enumerate(codes)
    )
    kernel = Kernel(90, "bf16", "bf16", "tanh", False, 8, 32, lines)
    assert [each.code for each in kernel.loop()] == ["LDG.E.128", "STG.E.128", "BRA"]
    assert kernel.rows_at_once() == 1


@pytest.mark.parametrize("device", DEVICES, ids=lambda device: device.name)
def test_predicted_times_are_those_of_the_memory(wide: list[Kernel], device: Device) -> None:
    for case in CASES:
        (kernel,) = (
            each
            for each in wide
            if (each.arch, each.dtype, each.out) == (device.arch, case.dtype, case.out)
            and (each.squash, each.residual) == (case.squash, case.residual)
        )
        made = predict(kernel, case.elements, device)
        assert made.bound == "memory"
        assert made.time_us == pytest.approx(case.elements * kernel.bytes / device.bandwidth * 1e6)


def test_prediction_names_the_tightest_limit() -> None:
    assert Prediction(1.0, 2.0, 3.0).bound == "MUFU"
    assert Prediction(1.0, 3.0, 2.0).time_us == 3.0


def test_predictions_are_printed_as_such(plugin: PluginInfo) -> None:
    command = [sys.executable, "-m", "benchmarks.gpu.predict", str(plugin.path)]
    root = Path(__file__).parents[3]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("PREDICTIONS from instruction and byte counts; nothing was")
    assert all(device.name in done.stdout for device in DEVICES)
