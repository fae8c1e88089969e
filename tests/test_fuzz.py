"""Bad input: what once was a fault, or had a message of its own, and a few new cases."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="the harness forks, and reads /proc"
)

ROOT = Path(__file__).parents[1]
CORPUS = Path(__file__).parent / "files" / "fuzz.json"


def _fuzz(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "benchmarks.fuzz", *arguments],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip


def test_kept_cases_are_refused_in_one_line_or_taken() -> None:
    done = _fuzz("--replay", str(CORPUS))
    assert done.returncode == 0, done.stdout + done.stderr


def test_new_cases_are_refused_in_one_line_or_taken(tmp_path: Path) -> None:
    kinds = (f"--only={kind}" for kind in ("bytes", "structure", "data", "arguments"))
    done = _fuzz("--cases=400", "--first=900000", f"--out={tmp_path / 'fuzz.json'}", *kinds)
    assert done.returncode == 0, done.stdout + done.stderr


BROKEN = """
import os, signal, sys
import numpy as np
import onnx_ir as ir
from onnx import parser
from benchmarks.fuzz import judge, runs
from benchmarks.fuzz.cases import Case
from dyt_compile import cli, runtime

LOOP = '''
<ir_version: 10, opset_import: ["": 20]>
endless (float[2] x) => (float[2] y) <int64 trips = {4611686018427387904}, bool yes = {1}> {
    y = Loop (trips, yes, x) <body = once (int64 i, bool go, float[2] a) => (bool on, float[2] b) {
        on = Identity (go)
        b = Tanh (a)
    }>
}
'''

def broken(arguments):
    what = arguments[0]
    if what == "crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    while what == "hang":
        pass
    if what == "endless":
        model = ir.from_proto(parser.parse_model(LOOP))
        runtime.Session(model).run([np.ones(2, np.float32)])
    if what == "left":
        open("out.onnx", "w").close()
    if what == "hacked":
        open("HACKED", "w").close()
    sys.stderr.write({
        "foreign": "KeyError: 'x'\\n", "trace": "Traceback (most recent call last):\\n",
        "silent": "",
    }.get(what, "DataError: it is empty\\n"))
    raise SystemExit(0 if what == "taken" else 1)

cli.main = broken
runs.HANG_SECONDS = 1.0
words = sys.argv[1:]
for result in runs.run(lambda number: Case((words[number],), {}), range(len(words))):
    print(words[result.number], result.outcome)
"""


def test_judge_tells_every_fault() -> None:
    words = ("taken", "refused", "foreign", "trace", "silent", "left", "hacked", "hang", "endless",
             "crash", "refused")  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", BROKEN, *words], cwd=ROOT, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)}, check=True,
    )  # fmt: skip
    assert [line.split() for line in done.stdout.splitlines()] == [
        ["taken", "taken"],
        ["refused", "DataError"],
        *([word, "fault"] for word in ("foreign", "trace", "silent", "left", "hacked")),
        ["hang", "hang"],
        ["endless", "endless"],
        ["crash", "crash"],
        ["refused", "DataError"],
    ]
