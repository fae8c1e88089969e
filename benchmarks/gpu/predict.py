"""Predicted times of the plugin's kernels, from their machine code: no GPU is used, none is needed.

    python -m benchmarks.gpu.predict LIBRARY

Each time is the largest of three: bytes over the device's memory bandwidth (the floor), warp
instructions over what its schedulers issue, MUFU operations over what its units take. It assumes
perfect overlap, and leaves out launch, tail, caches and the loading of parameters. So it is a
prediction, and says which of the three would bound the kernel; it is no measurement.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .sass import BYTES, Kernel, kernels

WARP = 32
ISSUED_PER_CYCLE = 4
"""Warp instructions a multiprocessor: one a scheduler (CUDA C++ Programming Guide, compute
capability 8.x and 9.0)."""
MUFU_PER_CYCLE = 16
"""Results a multiprocessor (the guide's table of arithmetic throughput, 8.x and 9.0)."""


@dataclass(frozen=True)
class Device:
    """Figures of a data sheet; clock in Hz, bandwidth in bytes a second."""

    name: str
    arch: int
    multiprocessors: int
    clock: float
    bandwidth: float


DEVICES = (
    # NVIDIA H100 data sheet: 3.35 TB/s; 67 TFLOPS of fp32 in 132 * 128 units are 1.98 GHz
    Device("H100 SXM", 90, 132, 1.98e9, 3.35e12),
    # NVIDIA Ada architecture white paper, table of the RTX 4090
    Device("RTX 4090", 89, 128, 2.52e9, 1.008e12),
)


@dataclass(frozen=True)
class Case:
    """One kernel on so many rows of so many channels."""

    title: str
    rows: int
    columns: int
    dtype: str
    out: str
    squash: str = "tanh"
    residual: bool = False

    @property
    def elements(self) -> int:
        """Of x."""
        return self.rows * self.columns


LLAMA, VIT = (4096, 4096), (64 * 197, 768)
CASES = (
    Case("LLaMA-7B, 4096 tokens: DyT", *LLAMA, "bf16", "bf16"),
    Case("LLaMA-7B, 4096 tokens: AddDyT", *LLAMA, "bf16", "bf16", residual=True),
    Case("LLaMA-7B, 4096 tokens: AddDyTQuantize", *LLAMA, "bf16", "fp8", residual=True),
    Case("LLaMA-7B, 4096 tokens: AddDyTQuantize", *LLAMA, "bf16", "int8", residual=True),
    Case("LLaMA-7B, 4096 tokens: Derf", *LLAMA, "bf16", "bf16", "erf"),
    Case("LLaMA-7B, 4096 tokens: DyT", *LLAMA, "fp32", "fp32"),
    Case("ViT-B, 64 images: DyT", *VIT, "fp16", "fp16"),
    Case("ViT-B, 64 images: AddDyTQuantize", *VIT, "fp16", "int8", residual=True),
)


@dataclass(frozen=True)
class Prediction:
    """Microseconds, were each resource alone the limit."""

    memory_us: float
    issue_us: float
    mufu_us: float

    @property
    def time_us(self) -> float:
        """The largest."""
        return max(self.memory_us, self.issue_us, self.mufu_us)

    @property
    def bound(self) -> str:
        """Which one that is."""
        limits = {"memory": self.memory_us, "issue": self.issue_us, "MUFU": self.mufu_us}
        return max(limits, key=lambda name: limits[name])


def predict(kernel: Kernel, elements: int, device: Device) -> Prediction:
    """The loop's instructions and bytes, times its passes, over what the device takes."""
    loop = kernel.loop()
    mufu = sum(each.code.startswith("MUFU") for each in loop)
    passes = elements / (kernel.width * kernel.rows_at_once())
    cycles = device.multiprocessors * device.clock
    return Prediction(
        memory_us=elements * kernel.bytes / device.bandwidth * 1e6,
        issue_us=passes / WARP * len(loop) / (ISSUED_PER_CYCLE * cycles) * 1e6,
        mufu_us=passes * mufu / (MUFU_PER_CYCLE * cycles) * 1e6,
    )


def predicted(library: Path, case: Case, device: Device) -> Prediction:
    """The same for the kernel of a library that takes a case."""
    return predict(_kernel(kernels(library), case, device), case.elements, device)


def apart(case: Case, device: Device) -> float:
    """Microseconds that memory alone takes where Add, DyT and Quantize are separate kernels."""
    size = BYTES[case.dtype]
    moved = 2 * size  # DyT reads and writes
    moved += 3 * size if case.residual else 0
    moved += size + BYTES[case.out] if case.out != case.dtype else 0
    return case.elements * moved / device.bandwidth * 1e6


def _kernel(found: Sequence[Kernel], case: Case, device: Device) -> Kernel:
    wanted = (device.arch, case.dtype, case.out, case.squash, case.residual)
    return next(
        each
        for each in found
        if (each.arch, each.dtype, each.out, each.squash, each.residual) == wanted
        and each.width > 1
    )


def main() -> None:
    """Print one table a device."""
    if len(sys.argv) != 2:
        sys.exit("usage: python -m benchmarks.gpu.predict LIBRARY (dyt-compile plugin build)")
    found = kernels(Path(sys.argv[1]))
    print("PREDICTIONS from instruction and byte counts; nothing was measured. Microseconds.")
    for device in DEVICES:
        print(f"\n{device.name}, sm_{device.arch}")
        print(f"{'':40} {'types':10} predicted  floor  issue   MUFU  bound  in separate kernels")
        for case in CASES:
            made = predict(_kernel(found, case, device), case.elements, device)
            types = f"{case.dtype}→{case.out}"
            print(
                f"{case.title:40} {types:10} {made.time_us:9.1f} {made.memory_us:6.1f} "
                f"{made.issue_us:6.1f} {made.mufu_us:6.1f}  {made.bound:6} "
                f"{apart(case, device):20.1f}"
            )


if __name__ == "__main__":
    main()
