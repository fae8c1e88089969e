"""The machine code of the plugin library: its kernels, and the loop over rows of each.

Reads what cuobjdump shows (in PATH, or the one that Triton brings).
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

__all__ = ["BYTES", "Instruction", "Kernel", "count", "cuobjdump", "kernels"]

TYPES = {
    "f": "fp32",
    "6__half": "fp16",
    "13__nv_bfloat16": "bf16",
    "a": "int8",
    "13__nv_fp8_e4m3": "fp8",
}
BYTES = {"fp32": 4, "fp16": 2, "bf16": 2, "int8": 1, "fp8": 1}
SQUASHES = ("tanh", "erf")

NAME = re.compile(
    r"_ZN3dyt9transformI(?P<dtype>f|6__half|13__nv_bfloat16)"
    r"(?P<out>f|a|S1_|13__nv_fp8_e4m3)"
    r"LNS_6SquashE(?P<squash>\d)ELb(?P<residual>\d)ELi(?P<width>\d+)EEEvNS_9ArgumentsE"
)
"""dyt::transform<dtype, out, squash, residual, width>; S1_ repeats dtype."""

INSTRUCTION = re.compile(
    r"^\s+/\*(?P<address>[0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?(?P<code>[A-Z][\w.]*)(?P<operands>[^;]*);"
)


@dataclass(frozen=True)
class Instruction:
    """One line: its address, opcode with modifiers, operands as printed."""

    address: int
    code: str
    operands: str


@dataclass(frozen=True)
class Kernel:
    """One instance for one architecture; width: elements that a thread takes at once."""

    arch: int
    dtype: str
    out: str
    squash: str
    residual: bool
    width: int
    registers: int
    instructions: tuple[Instruction, ...]

    @property
    def quantized(self) -> bool:
        """Whether y has another dtype than x."""
        return self.out != self.dtype

    @property
    def bytes(self) -> int:
        """What the loop reads and writes for one element, without parameters."""
        return BYTES[self.dtype] * (3 if self.residual else 1) + BYTES[self.out]

    def rows_at_once(self) -> int:
        """Rows that one pass of the loop takes, from the bytes that it stores."""
        stores = sum(each.code.startswith("STG") for each in self.loop())
        sums = BYTES[self.dtype] if self.residual else 0
        return stores * 16 // (self.width * (BYTES[self.out] + sums))

    def loop(self) -> tuple[Instruction, ...]:
        """The loop over the rows: from the nearest label to which it jumps back past a store."""
        stores = [each.address for each in self.instructions if each.code.startswith("STG")]
        targets = [
            (re.search(r"(0x[0-9a-f]+)", each.operands), each.address)
            for each in self.instructions
            if each.code.startswith("BRA")
        ]
        jumps = [(int(target.group(1), 16), address) for target, address in targets if target]
        around = [(a, b) for a, b in jumps if a < b and any(a <= store <= b for store in stores)]
        first, last = min(around, key=lambda ends: ends[1] - ends[0])
        return tuple(each for each in self.instructions if first <= each.address <= last)


def count(instructions: tuple[Instruction, ...], prefix: str) -> Counter[str]:
    """How often each opcode that begins with `prefix` occurs."""
    return Counter(each.code for each in instructions if each.code.startswith(prefix))


def cuobjdump() -> Path | None:
    """The program, or None."""
    found = shutil.which("cuobjdump")
    if found is not None:
        return Path(found)
    spec = importlib.util.find_spec("triton")
    folders = [] if spec is None else list(spec.submodule_search_locations or [])
    paths = [Path(folder) / "backends" / "nvidia" / "bin" / "cuobjdump" for folder in folders]
    return next((path for path in paths if path.is_file()), None)


def kernels(library: Path) -> list[Kernel]:
    """Every kernel of a plugin library. Raises RuntimeError where cuobjdump cannot be run."""
    registers = {
        (arch, name): int(count)
        for arch, text in _by_architecture(_shown(library, "-res-usage"))
        for name, count in re.findall(r"Function (\w+):\s+REG:(\d+)", text)
    }
    found = []
    for arch, text in _by_architecture(_shown(library, "-sass")):
        for block in re.split(r"^\s*Function : ", text, flags=re.MULTILINE)[1:]:
            name = block.split(None, 1)[0]
            matched = NAME.fullmatch(name)
            if matched is None:
                raise RuntimeError(f"{name} is no kernel that this reader knows")
            found.append(_kernel(arch, matched, registers[arch, name], block))
    return found


def _kernel(arch: int, name: re.Match[str], registers: int, block: str) -> Kernel:
    dtype = TYPES[name["dtype"]]
    lines = (INSTRUCTION.match(line) for line in block.splitlines())
    return Kernel(
        arch=arch,
        dtype=dtype,
        out=TYPES.get(name["out"], dtype),
        squash=SQUASHES[int(name["squash"])],
        residual=name["residual"] == "1",
        width=int(name["width"]),
        registers=registers,
        instructions=tuple(
            Instruction(int(line["address"], 16), line["code"], line["operands"].strip())
            for line in lines
            if line
        ),
    )


def _by_architecture(shown: str) -> list[tuple[int, str]]:
    parts = re.split(r"^arch = sm_(\d+)\w*$", shown, flags=re.MULTILINE)
    return [(int(arch), text) for arch, text in zip(parts[1::2], parts[2::2], strict=True)]


def _shown(library: Path, what: str) -> str:
    program = cuobjdump()
    if program is None:
        raise RuntimeError("cuobjdump is not found on PATH, nor in Triton")
    # It calls nvdisasm, which lies beside it.
    path = os.pathsep.join([str(program.parent), os.environ.get("PATH", "")])
    done = subprocess.run(
        [program, what, library],
        env={**os.environ, "PATH": path}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"cuobjdump ended with {done.returncode}: {done.stderr.strip()}")
    return done.stdout
