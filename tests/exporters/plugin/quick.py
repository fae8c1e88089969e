"""TensorRT's own `tensorrt.plugin`, over the registry of its lean runtime, without a builder.

As a script: reads cases as JSON, registers the plugins ahead of time, and leads each through what
the builder asks of it; prints the kernels and their launches as JSON. The lean runtime lacks the
builder's symbolic sizes: those here have the same operations, and can be evaluated.
"""

from __future__ import annotations

import base64
import json
import subprocess
import sys
import types
from dataclasses import asdict, dataclass, field
from enum import IntEnum
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[3]


@dataclass(frozen=True)
class Case:
    """One node: its form, TensorRT's types of x and y, sizes at run time.

    dynamic: the axes of x whose sizes are not known while the engine is built.
    """

    form: str
    dtype: str
    out: str
    shapes: list[list[int]]
    dynamic: list[int] = field(default_factory=list)
    output_dtype: int = 0


@dataclass(frozen=True)
class Kernel:
    """What the engine would keep: a launch for the sizes of the case, three extents, the PTX."""

    name: str
    ptx: bytes
    shape: list[int]
    extents: list[int]
    output_shapes: list[list[int]]
    output_types: list[str]


def kernels(cases: list[Case], arch: int = 80) -> list[Kernel]:
    """What TensorRT's code makes of the cases, in a new process."""
    done = subprocess.run(
        [sys.executable, "-m", __name__, str(arch)],
        cwd=ROOT, input=json.dumps([asdict(case) for case in cases]),
        capture_output=True, text=True, check=False, timeout=600,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(done.stderr[-3000:])
    found = json.loads(done.stdout.splitlines()[-1])
    return [Kernel(**{**each, "ptx": base64.b64decode(each["ptx"])}) for each in found]


class Size:
    """A symbolic size: its value, and whether TensorRT would know it while it builds."""

    def __init__(self, value: int, constant: bool) -> None:
        self.value = value
        self._constant = constant

    def is_constant(self) -> bool:
        return self._constant

    def get_constant_value(self) -> int:
        assert self._constant
        return self.value


class Sizes:
    """Stands for the builder's IExprBuilder."""

    def constant(self, value: int) -> Size:
        return Size(value, True)

    def operation(self, operation: Any, first: Size, second: Size) -> Size:
        a, b = first.value, second.value
        value = {
            "SUM": a + b, "PROD": a * b, "MAX": max(a, b), "MIN": min(a, b), "SUB": a - b,
            "FLOOR_DIV": a // b if b else 0, "CEIL_DIV": -(-a // b) if b else 0,
        }[operation.name]  # fmt: skip
        return Size(value, first.is_constant() and second.is_constant())


def _stand_in(trt: Any) -> Any:
    """The lean bindings under the name `tensorrt`, with what only the full ones have."""

    class TensorFormat(IntEnum):
        LINEAR = 0

    trt.TensorFormat = TensorFormat
    trt.ITensor = type("ITensor", (), {})
    trt.IDimensionExpr = Size
    trt.DimsExprs = lambda length: [None] * length
    sys.modules["tensorrt"] = trt
    import tensorrt_lean_bindings.plugin as quick

    sys.modules["tensorrt.plugin"] = quick
    return quick


def _kernel(trt: Any, quick: Any, case: Case) -> dict[str, Any]:
    dtype, out = (getattr(trt.DataType, name) for name in (case.dtype, case.out))
    library = sys.modules["tensorrt_lean_bindings.plugin._lib"]
    definition = library.QDP_REGISTRY[f"dyt::{case.form}"]
    float32 = ("alpha", "shift", "y_scale")
    inputs = [
        trt.DataType.FLOAT if name in float32 else dtype for name in definition.input_tensor_names
    ]
    creator = library._TemplatePluginCreator(case.form, "dyt", {})
    fields = []
    if case.output_dtype:
        import numpy as np

        array = np.array([case.output_dtype], np.int64)
        fields.append(trt.PluginField("output_dtype", array, trt.PluginFieldType.INT64))
    plugin = creator.create_plugin(
        case.form, "dyt", trt.PluginFieldCollection(fields), trt.TensorRTPhase.BUILD,
        trt.QuickPluginCreationRequest.STRICT_AOT,
    )  # fmt: skip
    output_types = plugin.get_output_data_types(inputs, [len(shape) for shape in case.shapes])
    sizes = [
        [Size(n, axis not in case.dynamic) for axis, n in enumerate(shape)]
        if len(shape) == len(case.shapes[0])
        else [Size(n, True) for n in shape]
        for shape in case.shapes
    ]
    output_shapes = plugin.get_output_shapes(sizes, [], Sizes())
    plugin.set_tactic(0)
    outputs = [out, dtype][: len(output_types)]
    described = [_described(trt, kind) for kind in (*inputs, *outputs)]
    launch, extents = types.SimpleNamespace(), {}

    class Extents:
        nbSymExprs = 0  # noqa: N815

        def __setitem__(self, place: int, expression: Any) -> None:
            extents[place] = expression.expr.value

    _record(sys.modules["tensorrt_lean_bindings.plugin._tensor"])
    plugin.get_launch_params(sizes, described, len(inputs), launch, Extents(), Sizes())
    ((name, code),) = plugin.kernel_map.values()
    return {
        "name": name,
        "ptx": base64.b64encode(code).decode(),
        "shape": [
            getattr(launch, f"{what}_{axis}").expr.value
            for what in ("grid", "block")
            for axis in "xyz"
        ],
        "extents": [extents[place] for place in range(3)],
        "output_shapes": [[size.value for size in shape] for shape in output_shapes],
        "output_types": [kind.name for kind in output_types],
    }


def _record(tensor: Any) -> None:
    """TensorRT's scalars of a launch take its own expressions only; these take ours."""
    tensor.SymInt32.__call__ = lambda self: types.SimpleNamespace(expr=self._expr)


def _described(trt: Any, kind: Any) -> Any:
    tensor = types.SimpleNamespace(type=kind, format=trt.TensorFormat.LINEAR, scale=1.0, dims=())
    return types.SimpleNamespace(desc=tensor)


def main() -> None:
    """Print the kernels of the cases."""
    import tensorrt_lean_bindings as trt

    quick = _stand_in(trt)
    tensor = sys.modules["tensorrt_lean_bindings.plugin._plugin_class"]
    tensor.Shape = lambda desc: None
    from dyt_compile.exporters.plugin import ahead_of_time

    names = ahead_of_time.register(arch=int(sys.argv[1]))
    registered = {
        creator.name
        for creator in trt.get_plugin_registry().all_creators
        if creator.plugin_namespace == "dyt"
    }
    assert registered == set(names), registered
    found = [_kernel(trt, quick, Case(**case)) for case in json.load(sys.stdin)]
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
