"""Lengths and axes that no tensor has: they cost neither time nor memory."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import onnx
import pytest
from onnx import parser

import dyt_compile
from dyt_compile.memory import bounded

pytestmark = [
    pytest.mark.core,
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="it limits the address space"),
]

LONG = """
<ir_version: 10, opset_import: ["": 20]>
long (int64[1099511627776] x) => (int64[n] y) { y = Add(x, x) }
"""

MANY_AXES = """
<ir_version: 10, opset_import: ["": 20]>
axes (float x, float[16] w) => (float y) {
    z = Reshape(x, x)
    y = LayerNormalization<axis=AXIS>(z, w)
}
"""

LIMIT_SECONDS = 10.0
LIMIT_BYTES = 2 << 30


INSPECT = """
import json, re, resource, sys, time
import dyt_compile
from dyt_compile.memory import resident_bytes
before, limit = resident_bytes(), 6 << 30
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))  # for the machine's sake
start = time.process_time()
dyt_compile.inspect(sys.argv[1])
seconds = time.process_time() - start
peak = int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024
print(json.dumps({"seconds": seconds, "bytes": peak - before}))
"""

BOUNDED = """
import resource
import numpy as np
from dyt_compile.memory import bounded
before = resource.getrlimit(resource.RLIMIT_AS)
try:
    with bounded(64 << 20):
        np.empty(256 << 20, np.uint8)
except MemoryError:
    assert resource.getrlimit(resource.RLIMIT_AS) == before
    assert np.empty(256 << 20, np.uint8).nbytes == 256 << 20
    print("bounded")
"""


def fresh(script: str, *arguments: str) -> str:
    """What a process prints that has neither mapped nor freed anything before."""
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments],
        env={**os.environ, "PYTHONPATH": str(Path(dyt_compile.__file__).parents[1])},
        capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_vector_of_absurd_length_takes_little_memory(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    onnx.save(parser.parse_model(LONG), path)
    told = json.loads(fresh(INSPECT, str(path)))
    assert told["bytes"] < LIMIT_BYTES
    assert told["seconds"] < LIMIT_SECONDS


@pytest.mark.parametrize("axis", [-(2**62), -(2**31), -(2**24), -65, 2**62, 64])
def test_norm_over_axes_that_no_tensor_has_is_none(axis: int, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    onnx.save(parser.parse_model(MANY_AXES.replace("AXIS", str(axis))), path)
    start = time.process_time()
    assert not dyt_compile.inspect(path).sites
    assert time.process_time() - start < 1.0


def test_memory_is_bounded_meanwhile_alone() -> None:
    assert fresh(BOUNDED) == "bounded\n"


def test_a_bound_that_is_there_is_kept() -> None:
    before = resource.getrlimit(resource.RLIMIT_AS)
    lower = 1 << 40
    resource.setrlimit(resource.RLIMIT_AS, (lower, before[1]))
    try:
        with bounded(1 << 50):
            assert resource.getrlimit(resource.RLIMIT_AS)[0] == lower
        assert resource.getrlimit(resource.RLIMIT_AS)[0] == lower
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
