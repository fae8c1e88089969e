"""dyt-compile under torchrun: two processes find what one finds; one that dies ends both."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from dyt_compile import Calibration
from dyt_compile.cli import main

from .passes.test_calibrate import _assert_close

pytestmark = pytest.mark.core

MODEL = """
import torch
import torch.nn.functional as F

class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = torch.nn.LayerNorm(8)
        self.up, self.down = torch.nn.Linear(8, 16), torch.nn.Linear(16, 8)

    def forward(self, x):
        return self.norm(x + self.down(F.gelu(self.up(x))))

class Network(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = torch.nn.Sequential(Block(), Block())
        self.last, self.head = torch.nn.LayerNorm(8), torch.nn.Linear(8, 8)

    def forward(self, x):
        return self.head(self.last(self.blocks(x)))

def load():
    torch.manual_seed(0)
    return Network(), (torch.randn(2, 3, 8),)

def unseeded():
    return Network(), (torch.randn(2, 3, 8),)

def batches():
    generator = torch.Generator().manual_seed(1)
    for size in (24, 24, 24, 25):
        lengths = torch.empty(size, 3, 1).uniform_(0.5, 2, generator=generator)
        yield (torch.randn(size, 3, 8, generator=generator) * lengths,)
"""

LAST_S = 280


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("torchrun") / "network.py"
    path.write_text(MODEL)
    return str(path)


def torchrun(arguments: Sequence[str], **environment: str) -> subprocess.Popen[str]:
    """Two ranks on this machine; arguments: of dyt_compile, or a script of its own."""
    own = [] if arguments[0].endswith(".py") else ["-m", "dyt_compile"]
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
        *own, *arguments,
    ]  # fmt: skip
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )  # fmt: skip


def ended(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    """Its status, output and errors, once it is over."""
    try:
        out, errors = process.communicate(timeout=LAST_S)
    finally:
        process.kill()
    return process.returncode, out, errors


def told(errors: str) -> list[str]:
    """The lines of ours among what torchrun tells."""
    return [line for line in errors.splitlines() if re.match(r"[A-Z]\w*Error: ", line)]


def rank_of(process: subprocess.Popen[str], number: int) -> int:
    """The process id of a rank."""
    for child in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split():
        environment = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
        if f"RANK={number}".encode() in environment:
            return int(child)
    raise AssertionError(f"rank {number} does not run")


def until(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    """Wait for something that a running job makes true."""
    end = time.monotonic() + LAST_S
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.02)


def alone(arguments: Sequence[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 0


def _calibrate(network: str, out: Path, *more: str) -> list[str]:
    return [
        "calibrate", f"{network}:load", "--data", f"{network}:batches", "-o", str(out), *more,
    ]  # fmt: skip


def _recover(network: str, out: Path, *more: str) -> list[str]:
    return ["recover", f"{network}:load", "--data", f"{network}:batches", "-o", str(out), *more]


def test_two_processes_calibrate_as_one(network: str, tmp_path: Path) -> None:
    status, out, errors = ended(torchrun(_calibrate(network, tmp_path / "two.safetensors")))
    assert status == 0, errors
    assert out.count("3 of 3 norms have a fit") == 1
    assert errors.count("calibrating") == 1
    alone(_calibrate(network, tmp_path / "one.safetensors"))
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "one.safetensors", "two.safetensors",
    ]  # fmt: skip
    one, two = (Calibration.load(tmp_path / f"{n}.safetensors") for n in ("one", "two"))
    assert one.refits
    assert {fit.method for fit in one.fits.values()} == {"diagonal", "full"}
    _assert_close(one, two, 1e-3)
    for name, refit in one.refits.items():
        for part, array in vars(refit.mix).items():
            other = getattr(two.refits[name].mix, part)
            np.testing.assert_allclose(array, other, rtol=0, atol=1e-3 * np.abs(array).max())


STEPS = ["--steps", "300", "--fit", "diagonal"]


@pytest.fixture(scope="module")
def recovered(network: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """The weights that one process finds."""
    out = tmp_path_factory.mktemp("recovered") / "one.safetensors"
    alone(_recover(network, out, *STEPS))
    return load_file(out)


@pytest.mark.parametrize(
    ("first", "second"), [([], ["--sharded"]), (["--sharded"], [])], ids=["whole", "sharded"]
)
def test_two_processes_recover_as_one_and_go_on_when_one_was_killed(
    network: str,
    recovered: dict[str, torch.Tensor],
    tmp_path: Path,
    first: list[str],
    second: list[str],
) -> None:
    out = tmp_path / "two.safetensors"
    job = torchrun(_recover(network, out, *STEPS, *first))
    checkpoint = tmp_path / "two.safetensors.checkpoint"
    until(checkpoint.is_file, job)
    os.kill(rank_of(job, 1), signal.SIGKILL)
    since = time.monotonic()
    status, _, errors = ended(job)
    assert time.monotonic() - since < 20
    assert status != 0
    (line,) = told(errors)
    assert line.startswith("RankError: rank 0 of 2 ")
    assert [path.name for path in tmp_path.iterdir()] == [checkpoint.name]
    status, printed, errors = ended(torchrun(_recover(network, out, *STEPS, *second)))
    assert status == 0, errors
    assert printed.count("wrote ") == 1
    assert [path.name for path in tmp_path.iterdir()] == [out.name]
    two = load_file(out)
    assert recovered.keys() == two.keys()
    for name, tensor in recovered.items():
        torch.testing.assert_close(two[name], tensor, rtol=0.02, atol=5e-3, msg=name)


def test_a_rank_that_says_nothing_ends_the_job_within_the_timeout(
    network: str, tmp_path: Path
) -> None:
    out = tmp_path / "fits.safetensors"
    job = torchrun(_recover(network, out, "--minutes", "5"), DYT_COMPILE_TIMEOUT_S="4")
    until((tmp_path / f"{out.name}.checkpoint").is_file, job)
    os.kill(rank_of(job, 1), signal.SIGSTOP)
    since = time.monotonic()
    status, _, errors = ended(job)
    assert 3 < time.monotonic() - since < 50
    assert status != 0
    (line,) = told(errors)
    assert "did not answer within 4 s" in line
    assert not out.exists()


MET = """
import sys
from pathlib import Path
from dyt_compile.ranks import joined

with joined() as ranks:
    import torch._dynamo
    assert ranks.gathered("met") == ["met", "met"]
threads = [task.joinpath("comm").read_text() for task in Path("/proc/self/task").iterdir()]
Path(sys.argv[1], str(ranks.number)).write_text(" ".join(threads))
"""


def test_no_thread_of_the_meeting_outlives_it(tmp_path: Path) -> None:
    """One that does may abort the process while Python ends, though all is written."""
    script = tmp_path / "met.py"
    script.write_text(MET)
    status, _, errors = ended(torchrun([str(script), str(tmp_path)]))
    assert status == 0, errors
    for rank in "01":
        assert "gloo" not in (tmp_path / rank).read_text()


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["inspect", "{network}:load"], "OptionError: inspect under torchrun with 2 processes; "),
        (
            ["recover", "{network}:unseeded", "--data", "{network}:batches", "-o", "{out}/a.pt2"],
            "OptionError: the ranks were given models of different weights; ",
        ),
    ],
    ids=["other command", "unlike models"],
)
def test_error_of_a_job_is_told_once(
    network: str, tmp_path: Path, arguments: Sequence[str], line: str
) -> None:
    given = [each.format(network=network, out=tmp_path) for each in arguments]
    status, out, errors = ended(torchrun(given))
    assert status != 0
    assert not out
    (own,) = told(errors)
    assert own.startswith(line)
    assert not list(tmp_path.iterdir())
