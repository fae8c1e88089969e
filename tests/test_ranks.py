"""Several ranks find what one finds, whatever the split. Threads stand for the processes here.

`tests/test_torchrun.py` starts real ones.
"""

from __future__ import annotations

import functools
import pickle
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from dyt_compile import ranks as ranks_module
from dyt_compile.calibration import Calibration
from dyt_compile.data import dealt, own_rows, sample_keys, whole
from dyt_compile.errors import DataError, OptionError
from dyt_compile.fits import Fit, RowSample, fit_diagonal
from dyt_compile.graphs.base import Graph
from dyt_compile.metrics import METRICS
from dyt_compile.passes import calibrate as calibrate_module
from dyt_compile.passes.calibrate import survey
from dyt_compile.passes.capture import capture
from dyt_compile.passes.match import match
from dyt_compile.passes.rewrite import rewrite
from dyt_compile.passes.verify import Reference
from dyt_compile.ranks import ALONE, Ranks, among, current
from dyt_compile.ridge import GramSums
from dyt_compile.runtime import provider_options
from dyt_compile.shelf import Shelf

from .passes.test_calibrate import (
    NAMES,
    TOKENS,
    WIDTH,
    Masked,
    TimeMajor,
    Transformer,
    _assert_close,
    _batches,
    _calibrated,
    _inputs,
    _mask,
    _masked,
)  # fmt: skip
from .test_projections import Net
from .test_projections import _batches as _uneven_batches

pytestmark = pytest.mark.core

T = TypeVar("T")


class Threads(Ranks):
    """Ranks that are threads: what they tell each other goes through pickle, as in processes."""

    def __init__(self, number: int, size: int, held: list[Any], barrier: threading.Barrier) -> None:
        self.number, self.size = number, size
        self._held, self._barrier = held, barrier

    def gathered(self, own: T) -> list[T]:
        self._held[self.number] = pickle.dumps(own)
        self._barrier.wait(60)
        found = [pickle.loads(each) for each in self._held]
        self._barrier.wait(60)
        return found

    def first(self, make: Callable[[], T]) -> T:
        return self.gathered(None if self.number else make())[0]  # type: ignore[return-value]

    def spread(self, function: Callable[[Any], T], items: Sequence[Any]) -> list[T]:
        parts = self.gathered([function(item) for item in items[self.number :: self.size]])
        return [parts[place % self.size][place // self.size] for place in range(len(items))]

    def collected(self, make: Callable[[], Sequence[Any]]) -> Iterator[Any]:
        found = self.gathered(list(make()) if self.number else [])
        return iter([] if self.number else found[1:])

    def add(self, arrays: Any) -> None:
        arrays = list(arrays)
        totals = [sum(parts) for parts in zip(*self.gathered(arrays), strict=True)]
        for array, total in zip(arrays, totals, strict=True):
            array[...] = np.nan if self.number and array.dtype.kind == "f" else total


def together(size: int, work: Callable[[], T]) -> list[T]:
    """What each of so many ranks makes of the work."""
    held: list[Any] = [None] * size
    barrier = threading.Barrier(size)

    def run(number: int) -> T:
        try:
            with among(Threads(number, size, held, barrier)):
                return work()
        except BaseException:
            barrier.abort()
            raise

    with ThreadPoolExecutor(size) as pool:
        futures = [pool.submit(run, number) for number in range(size)]
        errors = [e for e in (f.exception() for f in futures) if e is not None]
        told = [e for e in errors if not isinstance(e, threading.BrokenBarrierError)]
        for error in (*told, *errors):
            raise error
        return [future.result() for future in futures]


def _with_told(found: Calibration, own: Calibration) -> Calibration:
    """What another rank than the first finds, with the figures that only the first can tell."""
    fits = {}
    for name, fit in found.fits.items():
        assert (fit.sigma_median, fit.sigma_peak, fit.scatter) == (None, None, None)
        told = {key: getattr(own.fits[name], key) for key in ("sigma_median", "sigma_peak")}
        fits[name] = replace(fit, **told)
    return replace(found, fits=fits)


def _same(size: int, work: Callable[[], Calibration], tolerance: float = 2e-4) -> Calibration:
    """One rank's calibration, which so many ranks find, too."""
    own = work()
    for number, found in enumerate(together(size, work)):
        _assert_close(own, found if not number else _with_told(found, own), tolerance)
        assert found.converted == own.converted
        assert found.refits.keys() == own.refits.keys()
        assert [f.unmixed for f in found.fits.values()] == [f.unmixed for f in own.fits.values()]
        for name, refit in own.refits.items():
            for a, b in zip(vars(refit.mix).values(), vars(found.refits[name].mix).values(),
                            strict=True):  # fmt: skip
                np.testing.assert_allclose(a, b, rtol=0, atol=1e-3 * np.abs(a).max())
    return own


@pytest.fixture(scope="module")
def graph() -> Graph:
    return capture(Transformer().eval(), (_inputs(4),))


@pytest.fixture
def few_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sample of 100 rows a site, of 300 or so."""
    monkeypatch.setattr(calibrate_module, "RowSample", functools.partial(RowSample, limit=100))


def test_process_alone_asks_nobody() -> None:
    assert current() is ALONE
    assert ALONE.first(lambda: 3) == 3
    assert ALONE.gathered(4) == [4]
    assert ALONE.spread(abs, [-1, 2]) == [1, 2]
    assert list(ALONE.collected(lambda: pytest.fail("it has no other"))) == []
    assert ALONE.shares(torch.tensor([0.0, 5.0])).tolist() == [1.0, 1.0]


SPLITS = pytest.mark.parametrize(
    ("size", "sizes"),
    [(2, [20] * 3), (2, [60]), (3, [7] * 8 + [4]), (4, [1] * 60), (5, [1, 30, 29])],
    ids=lambda each: str(each) if isinstance(each, int) else f"{len(each)} batches",
)


@SPLITS
@pytest.mark.parametrize("fit", ["diagonal", "full"])
@pytest.mark.usefixtures("few_rows")
def test_fits_of_several_ranks_are_those_of_one(
    graph: Graph, fit: str, size: int, sizes: list[int]
) -> None:
    batches = _batches(_inputs(), sizes)
    own = _same(size, lambda: _calibrated(graph, batches, fit=fit))
    assert {each.method for each in own.fits.values()} == {fit} or fit == "full"


@pytest.mark.usefixtures("few_rows")
def test_isolated_fits_of_several_ranks_are_those_of_one(graph: Graph) -> None:
    batches = _batches(_inputs(), 7)
    _same(3, lambda: _calibrated(graph, batches, (), fit="auto"))
    squashes = dict.fromkeys(NAMES, ("identity", "tanh"))
    _same(2, lambda: _calibrated(graph, batches, (), fit="full", squashes=squashes))


@SPLITS
@pytest.mark.usefixtures("few_rows")
def test_masked_fits_of_several_ranks_are_those_of_one(size: int, sizes: list[int]) -> None:
    x, mask = _inputs(), _mask()
    graph = capture(Masked().eval(), kwargs=_masked(x, mask)[0])
    parts = zip(x.split(sizes), mask.split(sizes), strict=True)
    batches = [{"x": a, "attention_mask": b} for a, b in parts]
    _same(size, lambda: _calibrated(graph, batches, fit="auto"))


class Twice(Transformer):
    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm(super().forward(x) * 30)
        return y


@pytest.mark.usefixtures("few_rows")
@pytest.mark.parametrize("size", [2, 3])
def test_later_calls_of_a_module_on_several_ranks_are_fitted_as_on_one(size: int) -> None:
    graph = capture(Twice().eval(), (_inputs(4),))
    batches = _batches(_inputs(), 7)
    own = _same(size, lambda: _calibrated(graph, batches, (*NAMES, "norm#2")))
    found = together(size, lambda: _calibrated(graph, batches, (*NAMES, "norm#2")))
    first, second = own.fits["norm#2"].scatter, found[0].fits["norm#2"].scatter
    assert first is not None
    assert second is not None
    np.testing.assert_allclose(first.x, second.x, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.usefixtures("few_rows")
def test_refits_of_several_ranks_are_those_of_one(size: int) -> None:
    batches = _uneven_batches()
    graph = capture(Net(post=True).eval(), batches[0])
    names = [site.name for site in match(graph).sites]
    own = _same(size, lambda: _calibrated(graph, batches, names, fit="auto", refits=True), 1e-3)
    assert len(own.refits) >= 3


def test_batch_of_as_many_samples_as_tokens_is_read_as_those_of_other_ranks_are() -> None:
    x, mask = _inputs(), _mask()
    graph = capture(TimeMajor().eval(), kwargs=_masked(x, mask)[0])
    square = [*_masked(x[:TOKENS], mask[:TOKENS]), *_masked(x[TOKENS:], mask[TOKENS:])]
    _same(2, lambda: _calibrated(graph, [square[1], square[0]], ()), 1e-4)
    _same(2, lambda: _calibrated(graph, square[:2], ()), 1e-4)


class Flat(nn.Module):
    """Tokens of all samples that are chosen by what they hold: rows of no known sample."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm = nn.LayerNorm(WIDTH)
        self.down = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, 1)[: x.shape[0] * TOKENS - 1]
        y: Tensor = self.down(self.norm(rows))
        return y


@pytest.mark.usefixtures("few_rows")
def test_rows_of_no_known_sample_are_the_same_ones_for_any_order_of_whole_batches() -> None:
    batches = _batches(_inputs(), 10)
    graph = capture(Flat().eval(), batches[0])
    own = _same(3, lambda: _calibrated(graph, batches, ("norm",)))
    _assert_close(own, _calibrated(graph, batches[::-1], ("norm",)), 1e-4)


@pytest.mark.usefixtures("few_rows")
def test_sums_of_several_ranks_can_be_merged_with_those_of_one(graph: Graph) -> None:
    def run(x: Tensor) -> Calibration:
        return _calibrated(graph, _batches(x, 6), (), fit="full", keep_sums=True)

    here, there = _inputs().split([36, 24])
    merged = together(2, lambda: run(here))[0].merge(run(there))
    sums = merged.fits[NAMES[0]].sums
    assert sums is not None
    assert sums.sample.seen == 60 * TOKENS
    assert {part.rows for part in sums.full} == {60 * TOKENS}
    _assert_close(merged, run(_inputs()), 1e-4)


def test_first_rank_alone_holds_rows_and_sums() -> None:
    def work() -> tuple[int, int, float]:
        sample = RowSample(0, limit=10)
        mine = np.full((7, 3), current().number, np.float32)
        sample.add(mine, mine, np.arange(7, dtype=np.uint64) + 7 * current().number)
        sample.join(current())
        sums = GramSums(1.0, np.zeros(3), np.zeros(3), squash="identity")
        sums.add(mine, mine)
        sums.join(current())
        return len(sample.rows()[0]), sample.seen, float(sums._totals[0][0])

    (rows, seen, total), *others = together(3, work)
    assert (rows, seen, total) == (10, 21, 7 * (0 + 1 + 2))
    assert all(rows == 0 and np.isnan(total) for rows, _, total in others)


@settings(max_examples=30)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=7), st.integers(1, 5))
def test_every_sample_is_dealt_to_one_rank(sizes: list[int], size: int) -> None:
    graph = _identity()
    x = torch.arange(sum(sizes) * 2.0).reshape(-1, 2)
    samples = whole(graph, [(part,) for part in x.split(sizes)])
    parts = together(size, lambda: dealt(graph, samples, current()))
    places = [place for part in parts for own in part.places for place in own.tolist()]
    assert sorted(places) == list(range(len(x)))
    for part in parts:
        for batch, own in zip(part, part.places, strict=True):
            assert torch.equal(batch["input"], x[own])
    if sum(sizes) >= size:
        assert min(part.samples for part in parts) >= 1
    counts = [part.samples for part in parts]
    whole_rounds = len(sizes) // size * size
    uneven = max(sizes) - min(sizes) if whole_rounds else 0
    assert max(counts) - min(counts) <= uneven * (len(sizes) // size) + len(sizes) - whole_rounds


@functools.cache
def _identity() -> Graph:
    return capture(nn.LayerNorm(2), (torch.zeros(4, 2),))


def test_rows_of_a_step_are_dealt_and_those_for_company_do_not_count() -> None:
    batch = {"input": torch.arange(6.0).reshape(3, 2)}
    for size in (1, 2, 3, 5):
        parts = together(size, lambda: own_rows(_identity(), batch, current()))
        counted = torch.cat([own["input"] for own, counts in parts if counts])
        assert torch.equal(counted, batch["input"])
        assert sum(counts for _, counts in parts) == min(size, 3)
        assert all(len(own["input"]) for own, _ in parts)


@pytest.mark.parametrize("metric", METRICS)
def test_error_over_several_ranks_is_that_of_one(graph: Graph, metric: str) -> None:
    batches = _batches(_inputs(), 7)
    fits = _calibrated(graph, batches)
    converted = rewrite(graph, match(graph), fits, NAMES)

    def measured(count: int) -> Any:
        with Shelf(graph) as shelf:
            samples = whole(graph, batches[:count])
            reference = Reference(graph, samples, shelf, output=None, metric=metric)
            return reference.measure(converted)

    for count in (1, 8):
        own = measured(count)
        for found in together(3, lambda: measured(count)):  # noqa: B023
            assert found.samples == own.samples
            assert found.error == pytest.approx(own.error, rel=1e-5)
            assert found.standard_error == pytest.approx(own.standard_error, rel=1e-4)


def test_look_at_fewer_samples_than_ranks_is_that_of_one(graph: Graph) -> None:
    samples = whole(graph, [(_inputs(2),)])
    own = survey(graph, match(graph), samples)
    for found in together(3, lambda: survey(graph, match(graph), samples)):
        assert found.keys() == own.keys()
        for name, look in own.items():
            assert found[name].elements == look.elements
            assert found[name].sigma_peak == pytest.approx(look.sigma_peak, rel=1e-5)


def test_search_of_alpha_is_shared() -> None:
    random = np.random.default_rng(0)
    x = random.standard_normal((300, 4)).astype(np.float32)
    y = np.tanh(2 * x)
    own = fit_diagonal(x, y)
    assert isinstance(own, Fit)

    def work() -> Any:
        empty = np.empty((0, 0), np.float32)
        return fit_diagonal(*((x, y) if not current().number else (empty, empty)), ranks=current())

    for found in together(3, work):
        assert found.error == own.error
        np.testing.assert_array_equal(found.parameters.alpha, own.parameters.alpha)


def test_fewer_samples_than_ranks_are_refused(graph: Graph) -> None:
    with pytest.raises(DataError, match="2 samples for 3 ranks; allowed: one for each, or more"):
        together(3, lambda: _calibrated(graph, _batches(_inputs(2))))


def test_unlike_data_is_refused(graph: Graph) -> None:
    with pytest.raises(DataError, match="given 20, 21 samples; allowed: the same data"):
        together(2, lambda: _calibrated(graph, _batches(_inputs(20 + current().number))))


@pytest.mark.parametrize("text", ["0", "-1", "soon", "inf", "nan", ""])
def test_timeout_that_is_no_time_is_refused(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ranks_module.TIMEOUT, text)
    with pytest.raises(OptionError, match=r"DYT_COMPILE_TIMEOUT_S is .*allowed: a number of"):
        ranks_module._timeout_s()


def test_each_rank_of_a_machine_has_an_accelerator_of_its_own() -> None:
    def device() -> str | None:
        ranks = current()
        ranks.local = ranks.number
        return provider_options("CUDAExecutionProvider", None).get("device_id")

    assert together(3, device) == [None, "1", "2"]


def test_keys_of_samples_do_not_depend_on_who_has_them(graph: Graph) -> None:
    batches = _batches(_inputs(), 7)
    samples = whole(graph, batches)
    own = {int(k) for batch in samples for k in sample_keys(batch, graph)}
    parts = together(3, lambda: [k for b in dealt(graph, samples, current())
                                 for k in sample_keys(b, graph).tolist()])  # fmt: skip
    assert {k for part in parts for k in part} == own
    assert sum(map(len, parts)) == len(_inputs())
