"""A kernel of its own for one node: its launch, its CUDA source, and the PTX that NVRTC makes."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

from ...dyt import Form
from ...errors import ExportError, MissingDependencyError
from .build import SOURCES

__all__ = ["Entry", "Layout", "Size", "ceil_div", "entry", "layout", "ptx"]

Size = int | None
"""A length; None where it is known at run time only."""

THREADS = 128
ACCESS_BYTES = 16
MOST_AT_ONCE = 32
"""Bytes of x in a row, beyond which one row is all that a thread takes at once."""
RESIDENT = {False: 5, True: 3}
"""Blocks of a kernel with erf that a multiprocessor holds, by whether it quantizes."""

BYTES = {"float": 4, "Half": 2, "BFloat16": 2, "Int8": 1, "Float8": 1}
"""Of the types by their names in core.cuh."""


def ceil_div(dividend: int, divisor: int) -> int:
    """The quotient, rounded up."""
    return -(-dividend // divisor)


@dataclass(frozen=True)
class Layout:
    """x as [rows][planes][columns], each a range of its axes; see kernel.cuh.

    along: for each parameter, which of these it varies with, by its name in kernel.cuh.
    """

    rows: range
    planes: range
    columns: range
    along: Mapping[str, str]


def layout(form: Form, shapes: Mapping[str, Sequence[Size]]) -> Layout:
    """Where the channels are. Raises ExportError where a parameter does not fit x."""
    x = shapes["x"]
    axis: int | None = None
    along = dict.fromkeys(form.parameters, "kNothing")
    for name in form.parameters:
        varying = [place - len(shapes[name]) for place, n in enumerate(shapes[name]) if n != 1]
        for each in varying:
            found = len(x) + each
            fits = found >= 0 and None in (x[found], shapes[name][each])
            fits = fits or (found >= 0 and x[found] == shapes[name][each])
            if not fits or axis not in (None, found) or len(varying) > 1:
                raise ExportError(
                    f"dyt::{form.name}: {name} has shape {list(shapes[name])} for x of shape "
                    f"{list(x)}; allowed: [1], or one axis of x, the same for all parameters"
                )
            axis = found
            along[name] = "kColumns" if each == -1 else "kPlanes"
    rank = len(x)
    if axis is None or axis == rank - 1:
        first = 0 if axis is None else axis
        return Layout(range(first), range(0), range(first, rank), along)
    return Layout(range(axis), range(axis, axis + 1), range(axis + 1, rank), along)


@dataclass(frozen=True)
class Entry:
    """A kernel: its name, its source, and the shape of its blocks.

    parameters: C types and names in order: inputs, then rows, planes and columns as int, then
    outputs. width: elements that a thread takes at once, and rows_at_once: of so many rows; across,
    down: threads of a block over the columns and over the rows; resident: as in launch.cuh.
    """

    name: str
    source: str
    parameters: tuple[tuple[str, str], ...]
    width: int
    rows_at_once: int
    across: int
    down: int
    resident: int


def entry(form: Form, dtype: str, out: str, laid: Layout, columns: Sequence[Size]) -> Entry:
    """The kernel of a form for x of `dtype` and y of `out`, named as in core.cuh.

    columns: lengths of the axes that are columns. Pointers must be multiples of 16 bytes.
    """
    wide = ACCESS_BYTES // min(BYTES[dtype], BYTES[out])
    known = prod(size for size in columns if size is not None)
    width = wide if known % wide == 0 else 1
    across = THREADS
    if None not in columns:
        chunks = max(1, known // width)
        across = ceil_div(chunks, ceil_div(chunks, THREADS))
    rows_at_once = 1 if wide * BYTES[dtype] > MOST_AT_ONCE else 2
    resident = RESIDENT[form.quantized] if form.squash == "erf" else 0
    parameters = (
        *(("void const*", name) for name in form.inputs),
        *(("int", name) for name in ("rows", "planes", "columns")),
        *(("void*", name) for name in form.outputs),
    )
    letters = "".join(along[1] for along in laid.along.values())
    name = f"dyt_{form.name}_{dtype}_{out}_{letters}{width}"
    return Entry(
        name=name,
        source=_source(name, form, dtype, out, laid, parameters, width, rows_at_once, resident),
        parameters=parameters,
        width=width,
        rows_at_once=rows_at_once,
        across=across,
        down=THREADS // across,
        resident=resident,
    )


def _source(
    name: str,
    form: Form,
    dtype: str,
    out: str,
    laid: Layout,
    parameters: Sequence[tuple[str, str]],
    width: int,
    rows_at_once: int,
    resident: int,
) -> str:
    taken = ", ".join(f"{kind} {each}" for kind, each in parameters)
    plain = ["x", "rows", "planes", "columns", *form.outputs, *(["residual"] * form.residual)]
    lines = [f"arguments.{each} = {each};" for each in plain]
    if form.quantized:
        lines.append("arguments.y_scale = static_cast<float const*>(y_scale);")
    lines += [
        f"arguments.{each} = {{{each}, dyt::Along::{laid.along[each]}}};"
        for each in form.parameters
    ]
    kinds = ", ".join(map(_cpp, (dtype, out)))
    squash = f"dyt::Squash::k{form.squash.capitalize()}"
    blocks = f"dyt::kBLOCKS_AT_ONCE<{_cpp(out)}, {squash}>"
    bounds = f"dyt::kTHREADS, {blocks}"
    alike = f"dyt::kTHREADS == {THREADS} && dyt::kROWS_AT_ONCE<{kinds}> == {rows_at_once}"
    if resident:
        alike += f" && {blocks} == {resident}"
    flag = str(form.residual).lower()
    return "\n".join(
        [
            '#include "kernel.cuh"',
            f'static_assert({alike}, "the launch is made for this kernel");',
            f'extern "C" __global__ void __launch_bounds__({bounds}) {name}({taken})',
            "{",
            "    dyt::Arguments arguments{};",
            *(f"    {line}" for line in lines),
            f"    dyt::transform_rows<{kinds}, {squash}, {flag}, {width}>(arguments);",
            "}",
            "",
        ]
    )


def _cpp(kind: str) -> str:
    return kind if kind == "float" else f"dyt::{kind}"


def ptx(source: str, arch: int) -> bytes:
    """The PTX that NVRTC makes of a source for a compute capability and those above it.

    Raises MissingDependencyError without NVRTC, ExportError where it fails, with its first error.
    """
    if importlib.util.find_spec("cuda") is None:
        raise MissingDependencyError("cuda.bindings", "gpu")
    from cuda.bindings import nvrtc

    def checked(result: tuple[object, ...]) -> object:
        if result[0] != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            raise ExportError(f"NVRTC fails: {result[0]}")
        return result[1] if len(result) > 1 else None

    program = checked(nvrtc.nvrtcCreateProgram(source.encode(), b"entry.cu", 0, [], []))
    options = [
        f"--gpu-architecture=compute_{arch}", "--std=c++17", f"-I{SOURCES}", f"-I{_headers()}"
    ]  # fmt: skip
    encoded = [option.encode() for option in options]
    status = nvrtc.nvrtcCompileProgram(program, len(encoded), encoded)[0]
    if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        log = b" " * int(str(checked(nvrtc.nvrtcGetProgramLogSize(program))))
        checked(nvrtc.nvrtcGetProgramLog(program, log))
        raise ExportError(f"NVRTC does not compile the kernel: {_first_error(log)}")
    made = b" " * int(str(checked(nvrtc.nvrtcGetPTXSize(program))))
    checked(nvrtc.nvrtcGetPTX(program, made))
    return made.rstrip(b"\0")


def _first_error(log: bytes) -> str:
    lines = log.decode(errors="replace").strip("\0 \n").splitlines()
    return next((line.strip() for line in lines if "error" in line), "no reason given")


def _headers() -> Path:
    """The folder of cuda_fp16.h: of NVIDIA's wheels, else of the toolkit."""
    folders = [Path("/usr/local/cuda/include")]
    spec = importlib.util.find_spec("nvidia")
    for root in [] if spec is None else list(spec.submodule_search_locations or []):
        folders = [*sorted(Path(root).glob("*/include")), *folders]
    found = next((folder for folder in folders if (folder / "cuda_fp16.h").is_file()), None)
    if found is None:
        raise ExportError("cuda_fp16.h is not found in NVIDIA's wheels, nor in /usr/local/cuda")
    return found
