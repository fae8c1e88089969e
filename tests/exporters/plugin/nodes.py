"""Nodes with kernels of their own, as plugins ahead of time have them: forms, types, layouts."""

from __future__ import annotations

from typing import Any

import numpy as np

from dyt_compile.dyt import FORMS, FUSED, Form
from dyt_compile.exporters.plugin.entry import Entry, entry, layout

from .host import BF16, FP8, INT8
from .quick import Case
from .reference import OPERATORS, samples

NAMES = {
    np.dtype(np.float32): ("FLOAT", "float"),
    np.dtype(np.float16): ("HALF", "Half"),
    BF16: ("BF16", "BFloat16"),
    INT8: ("INT8", "Int8"),
    FP8: ("FP8", "Float8"),
}
OUTPUT_DTYPES = {INT8: 3, FP8: 17}


class Node:
    """One case with its arrays."""

    def __init__(
        self,
        form: Form,
        dtype: Any,
        shape: tuple[int, ...],
        *,
        out: Any = None,
        axis: int = -1,
        dynamic: tuple[int, ...] = (0,),
        per_channel: bool = False,
    ) -> None:
        self.form, self.dtype, self.out = form, np.dtype(dtype), np.dtype(out or dtype)
        self.inputs = samples(form, shape, self.dtype, axis=axis, per_channel=per_channel)
        self.dynamic = dynamic

    def case(self) -> Case:
        """As TensorRT meets it."""
        return Case(
            self.form.name, NAMES[self.dtype][0], NAMES[self.out][0],
            [list(self.inputs[name].shape) for name in self.form.inputs],
            list(self.dynamic), OUTPUT_DTYPES.get(self.out, 0),
        )  # fmt: skip

    def entry(self) -> Entry:
        """The kernel that TensorRT is to be given."""
        shapes: dict[str, list[int | None]] = {
            name: list(value.shape) for name, value in self.inputs.items()
        }
        for name in ("x", "residual"):
            for place in self.dynamic if name in shapes else ():
                shapes[name][place] = None
        laid = layout(self.form, shapes)
        columns = [shapes["x"][place] for place in laid.columns]
        return entry(self.form, NAMES[self.dtype][1], NAMES[self.out][1], laid, columns)

    def __str__(self) -> str:
        return f"{self.form.name} {self.dtype} {self.out} {self.inputs['x'].shape}"


BARE, DYT, ADD, DERF = FORMS["DyTBare"], FORMS["DyT"], FUSED["AddDyT"], FORMS["Derf"]
ADD_QUANTIZE = FUSED["AddDyTQuantize"]

NODES = [
    *(Node(form, BF16, (2, 3, 64), out=FP8 if form.quantized else None) for form in OPERATORS),
    Node(DYT, np.float32, (3, 5, 48)),
    Node(DYT, np.float16, (3, 5, 4104)),
    Node(ADD, np.float16, (300, 7), per_channel=True),
    Node(ADD_QUANTIZE, np.float16, (5, 2048), out=INT8, dynamic=()),
    Node(ADD_QUANTIZE, np.float32, (2, 33), out=INT8),
    Node(BARE, np.float16, (3, 5, 7)),
    Node(BARE, np.float16, (3, 5, 80)),
    Node(DERF, np.float16, (2, 6, 4, 8), axis=-3, per_channel=True),
    Node(ADD, BF16, (2, 6, 4, 8), axis=-3, dynamic=(0, 2, 3)),
    Node(DYT, BF16, (2, 5, 3, 7), axis=-3, dynamic=(0, 2)),
]
