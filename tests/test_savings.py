"""Savings: what is counted, in graphs small enough to count by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from dyt_compile.passes.capture import capture
from dyt_compile.passes.match import match
from dyt_compile.savings import Savings, savings
from dyt_compile.survey import Look

pytestmark = pytest.mark.core

ELEMENTS = 40
WIDTH = 8


class Net(nn.Module):
    """A norm of `source`, whose value the residual reads too where `kept`."""

    def __init__(self, source: str, kept: bool, norm: type[nn.Module] = nn.LayerNorm) -> None:
        super().__init__()
        self.source, self.kept = source, kept
        self.norm, self.linear, self.head = norm(WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        made = {
            "input": lambda: x,
            "product": lambda: self.linear(x),
            "sum": lambda: x + 1,
            "view": lambda: (x + 1).transpose(0, 1).unsqueeze(0).squeeze(0),
            "concatenation": lambda: torch.cat([x, x], 1),
        }[self.source]()
        y: Tensor = self.head(self.norm(made))
        return y + made[..., :3] if self.kept else y


def _saved(net: nn.Module, dtype: torch.dtype = torch.float32) -> Savings:
    graph = capture(net.eval().to(dtype), (torch.ones(2, 5, WIDTH, dtype=dtype),))
    sites = match(graph).sites
    looks = {site.name: Look(None, ELEMENTS) for site in sites}
    return savings(sites, looks, tuple(graph.outputs.values()))


@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.RMSNorm])
@pytest.mark.parametrize("source", ["product", "sum", "view"])
def test_site_behind_a_kernel_saves_its_own_and_the_read(
    source: str, norm: type[nn.Module]
) -> None:
    assert _saved(Net(source, kept=True, norm=norm)) == Savings(1, 4 * ELEMENTS)


@pytest.mark.parametrize("source", ["product", "sum"])
def test_site_that_alone_reads_its_input_saves_the_write_too(source: str) -> None:
    assert _saved(Net(source, kept=False)) == Savings(1, 2 * 4 * ELEMENTS)


@pytest.mark.parametrize("source", ["input", "concatenation"])
def test_site_behind_no_kernel_that_it_could_join_saves_nothing(source: str) -> None:
    assert _saved(Net(source, kept=True)) == Savings(0, 0)


def test_bfloat16_saves_half_the_bytes() -> None:
    assert _saved(Net("sum", kept=True), torch.bfloat16) == Savings(1, 2 * ELEMENTS)


def test_savings_of_several_sites_add() -> None:
    both = nn.Sequential(Net("sum", kept=True), nn.Linear(3, WIDTH), Net("product", kept=False))
    assert _saved(both) == Savings(2, 4 * ELEMENTS + 2 * 4 * ELEMENTS)


def test_no_site_saves_nothing() -> None:
    assert savings((), {}, ()) == Savings(0, 0)
