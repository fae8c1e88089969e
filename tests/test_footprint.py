"""Memory that is promised: kept under a hard limit of address space, or refused with the number."""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import dyt_compile
from dyt_compile import Calibration, footprint
from dyt_compile.data import cut, largest, whole
from dyt_compile.dyt import evaluate
from dyt_compile.errors import OptionError
from dyt_compile.fits import ROWS, fit_diagonal
from dyt_compile.footprint import diagonal_bytes, full_bytes
from dyt_compile.memory import give_back, parse_bytes, resident_bytes, told_bytes
from dyt_compile.passes.calibrate import calibrate
from dyt_compile.passes.capture import capture
from dyt_compile.passes.match import match
from dyt_compile.ridge import fit_full
from dyt_compile.sitefits import SiteFit

from .promised import WIDTH
from .test_projections import Net, _batches
from .test_weights import WORDS, Words, same

pytestmark = pytest.mark.core


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("8GB", 8_000_000_000), ("1.5 GiB", 3 << 29), ("512MiB", 1 << 29), ("10kb", 10_000),
        ("7", 7), (2_000_000, 2_000_000), ("3B", 3), ("1TB", 10**12),
    ],
)  # fmt: skip
def test_sizes_are_read(text: str | int, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "8 XB", "0", "1e9", "8GBs", 0, -5, "0.1B"])
def test_other_sizes_are_refused(text: str | int) -> None:
    with pytest.raises(OptionError, match="allowed: bytes as in 8GB"):
        parse_bytes(text)


def test_memory_of_this_process_is_known() -> None:
    before = resident_bytes()
    held = np.ones(1 << 24)
    assert resident_bytes() - before > 0.9 * held.nbytes
    assert told_bytes(1_240_000_000) == "1.24 GB"


@pytest.mark.skipif(
    not hasattr(ctypes.pythonapi, "malloc_trim"), reason="this libc gives memory back by itself"
)
def test_what_is_freed_is_given_back() -> None:
    freed, held = [], []
    for _ in range(2000):  # what is held lies between what is freed
        freed.append(bytearray(60_000))
        held.append(bytearray(2_000))
    before = resident_bytes()
    freed.clear()
    give_back()
    assert before - resident_bytes() > 80_000_000
    assert len(held) == 2000


def test_batches_are_cut_and_hold_the_same_samples() -> None:
    graph = capture(nn.LayerNorm(4), (torch.zeros(2, 3, 4),), batches=[(torch.zeros(2, 5, 4),)])
    given = [(torch.randn(size, tokens, 4),) for size, tokens in ((5, 3), (2, 9), (4, 1))]
    samples = whole(graph, given)
    parts = cut(graph, samples, 2)
    name = next(iter(graph.inputs))
    lengths = [len(batch[name]) for batch in parts]
    assert lengths == [2, 2, 1, 2, 2, 2] == list(map(len, parts.places))
    assert torch.equal(torch.cat([b[name] for b in parts][:3]), given[0][0])
    assert np.array_equal(np.concatenate(parts.places), np.concatenate(samples.places))
    assert largest(graph, samples, 3)[1] == {name: (3, 9, 4)}
    assert largest(graph, samples, 9)[1] == {name: (5, 9, 4)}


def test_promise_gives_the_same_fits(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, batches = Words().eval(), [(torch.randint(0, WORDS, (8, 5)),) for _ in range(4)]
    free = dyt_compile.calibrate(model, batches, fit="full")
    bound = dyt_compile.calibrate(model, batches, fit="full", memory=resident_bytes() + (1 << 30))
    assert same(free, bound)
    bound.save(tmp_path / "bound.safetensors")
    assert same(free, Calibration.load(tmp_path / "bound.safetensors"))


def test_too_little_memory_is_refused_with_what_it_takes() -> None:
    model, batches = Words().eval(), [(torch.randint(0, WORDS, (8, 5)),) for _ in range(4)]
    with pytest.raises(OptionError, match=r"memory is 9 MB, .* takes .* holds already, .*"):
        dyt_compile.calibrate(model, batches, memory="9MB")


def test_model_whose_shapes_data_tells_is_refused() -> None:
    class Chosen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.LayerNorm(4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            found: torch.Tensor = self.norm(x[x[:, 0] > 0])
            return found

    with pytest.raises(OptionError, match="memory cannot be promised for this model: without data"):
        dyt_compile.calibrate(Chosen(), [(torch.randn(9, 4),)] * 2, memory="8GB")


def test_refits_beyond_the_promise_are_left_and_named(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    x = _batches(count=2)
    graph = capture(Net(post=True).eval(), x[0])
    found, samples = match(graph), whole(graph, x)
    names = [site.name for site in found.sites]

    def refitted(squares: int, *, refits: bool = True) -> Calibration:
        monkeypatch.setattr(footprint, "SQUARES", squares)
        memory = resident_bytes() + (1 << 30)
        return calibrate(
            graph, found, samples, convert=names, seed=0, refits=refits, memory_bytes=memory
        )

    moved = refitted(footprint.SQUARES).refits
    assert moved
    left = refitted(1 << 40)
    assert not left.refits
    assert same(left, refitted(1 << 40, refits=False))
    (told,) = (r.message for r in caplog.records if r.name == "dyt_compile")
    assert "memory is too little to refit" in told
    assert min(moved) in told


def test_fits_take_what_is_worked_out() -> None:
    channels = 384
    x = np.random.default_rng(0).normal(size=(ROWS, channels)).astype(np.float32)
    y = x / np.sqrt(np.square(x).mean(axis=1, keepdims=True))
    narrow = x.astype("bfloat16"), y.astype("bfloat16")

    def took(fit: Callable[[], object]) -> int:
        tracemalloc.start()
        assert not isinstance(fit(), str)
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return most

    diagonal, full = diagonal_bytes(channels), full_bytes(channels, keep_sums=False)
    assert diagonal / 3 < took(lambda: fit_diagonal(*narrow)) <= diagonal
    assert full / 3 < took(lambda: fit_full(*narrow, lambda: [narrow])) <= full


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of 201 MB in safetensors and in ONNX, and its fits, made in memory."""
    found = tmp_path_factory.mktemp("model")
    done = child("write", found, 0)
    assert done.returncode == 0, done.stderr
    return found


def child(kind: str, folder: Path, above: int) -> subprocess.CompletedProcess[str]:
    """A calibration under a limit of so many bytes above what its process holds by then."""
    script = Path(__file__).with_name("promised.py")
    command = [sys.executable, str(script), kind, str(folder), str(above)]
    threads = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(dyt_compile.__file__).parents[1])}
    return subprocess.run(
        command, env=os.environ | threads, capture_output=True, text=True, check=False
    )


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_AS binds on Linux alone")
@pytest.mark.parametrize(("kind", "above"), [("state", 190_000_000), ("onnx", 420_000_000)])
def test_promise_is_kept_under_a_hard_limit(folder: Path, kind: str, above: int) -> None:
    done = child(kind, folder, above)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["peak"] <= told["memory"]
    whole, bound = (Calibration.load(folder / f"{name}.fits") for name in ("whole", kind))
    x = np.random.default_rng(0).normal(size=(64, WIDTH)).astype(np.float32)
    for own, fit in zip(bound.fits.values(), whole.fits.values(), strict=True):
        expected = put_out(fit, x)
        assert np.linalg.norm(put_out(own, x) - expected) < 2e-3 * np.linalg.norm(expected)


def put_out(fit: SiteFit, x: np.ndarray) -> np.ndarray:
    """What a fitted site puts out. Where tanh is hardly bent alpha is not settled, but this is."""
    assert fit.parameters is not None
    y = evaluate(fit.parameters, x)
    return y if fit.mix is None else fit.mix(y)


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_AS binds on Linux alone")
def test_limit_is_one_that_the_whole_model_breaks(folder: Path) -> None:
    done = child("whole", folder, 190_000_000)
    assert done.returncode != 0
    assert "MemoryError" in done.stderr or "memory" in done.stderr
