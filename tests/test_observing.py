"""What observing costs: one forward pass a sample, counted node by node; the benchmarks' tables."""

from __future__ import annotations

import time
from collections import Counter
from typing import Any

import pytest
import torch

from benchmarks import ranks as ranks_benchmark
from benchmarks.observing import Images, observe, table
from dyt_compile.graphs.fx import FxSegment
from dyt_compile.passes.capture import capture
from dyt_compile.passes.match import match
from dyt_compile.ranks import ALONE

from .passes.test_calibrate import Transformer, _batches, _inputs

pytestmark = pytest.mark.core


def test_observing_all_sites_runs_every_node_once_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    graph = capture(Transformer().eval(), (_inputs(4),))
    ran: Counter[str] = Counter()
    run = FxSegment._run

    def counting(segment: Any, node: Any, env: Any) -> Any:
        if node.op == "call_function":
            ran[node.name] += 1
        return run(segment, node, env)

    monkeypatch.setattr(FxSegment, "_run", counting)
    batches = _batches(_inputs(), 12)
    for batch in map(graph.bind, batches):
        graph.segment(list(graph.inputs.values()), list(graph.outputs.values()))([batch["x"]])
    plain = Counter(ran)
    assert set(plain.values()) == {len(batches)}
    ran.clear()
    rows = observe(graph, match(graph).sites, batches)
    assert rows == 4 * _inputs().shape[:2].numel()
    assert not ran - plain


def test_images_come_again_and_figures_are_told() -> None:
    images = Images(2, 1)
    first, second = (torch.cat([x for (x,) in images]) for _ in range(2))
    assert torch.equal(first, second)
    assert first.shape == (2, 3, 224, 224)
    ratio = {"median": 1.05, "low": 1.0, "high": 1.1}
    told = {"cost": {"model": "vit", "images": 8, "ratio": ratio}, "peak_bytes": {"10": 2_000_000}}
    assert table(told).row_count == 2


def test_processes_that_do_not_share_have_the_throughput_of_one() -> None:
    found = ranks_benchmark.measured(lambda: time.sleep(0.1), 3, ALONE)
    assert found["two"]["median"] == pytest.approx(1, rel=0.3)  # each does all of it
    assert found["apart"]["median"] == pytest.approx(2, rel=0.3)  # two of them do it twice
    assert ranks_benchmark.table({"calibrate": found}).row_count == 1
