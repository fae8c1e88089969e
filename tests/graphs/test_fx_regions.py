"""Regions and control flow in exported graphs, and operators that write in place."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._higher_order_ops.scan import scan
from torch._higher_order_ops.while_loop import while_loop

import dyt_compile

pytestmark = pytest.mark.core

WIDTH = 16


def _norm() -> nn.LayerNorm:
    norm = nn.LayerNorm(WIDTH)
    nn.init.uniform_(norm.weight, 0.5, 1.5)
    return norm


def _batches(count: int = 4) -> list[tuple[Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(8, 5, WIDTH, generator=generator),) for _ in range(count)]


def _names(model: nn.Module) -> list[str]:
    (x,) = _batches(1)[0]
    return [site.name for site in dyt_compile.inspect(model, (x,)).sites]


def _operands(result: dyt_compile.Conversion) -> list[Tensor]:
    """The values of its one site."""
    (fit,) = result.calibration.fits.values()
    return [torch.from_numpy(value) for value in fit.parameters.named().values()]


class Regions(nn.Module):
    """Norms under autocast, under its opposite within it, without gradients, in a checkpoint."""

    def __init__(self) -> None:
        super().__init__()
        self.cast, self.wide, self.still = _norm(), _norm(), _norm()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            y = self.linear(self.cast(x))
            with torch.autocast("cpu", enabled=False):
                y = self.wide(y.float())
        with torch.no_grad():
            z = self.still(self.linear(x))
        return y + z + torch.utils.checkpoint.checkpoint(self.cast, x, use_reentrant=False)


def test_norms_in_regions_are_found_under_their_names() -> None:
    assert _names(Regions().eval()) == ["cast", "wide", "still", "cast#2"]


def test_regions_laid_open_compute_what_they_computed() -> None:
    model = Regions().eval()
    (x,) = _batches(1)[0]
    result = dyt_compile.convert(model, example=(x,), mode="exact")
    assert torch.equal(result.model(x), model(x))
    a, b = (x.clone().requires_grad_() for _ in range(2))
    result.model(a).square().sum().backward()
    model(b).square().sum().backward()
    assert torch.allclose(a.grad, b.grad, atol=1e-6)  # none through the region without gradients
    assert result.model.still.weight.grad is None


def test_norms_in_regions_are_converted() -> None:
    model = Regions().eval()
    result = dyt_compile.convert(model, _batches(), mode="all")
    assert result.report.converted == 4
    labels = [str(node.target) for node in result.model.graph.nodes]
    assert not any("layer_norm" in label or "wrap_with" in label for label in labels)


class Flow(nn.Module):
    """A norm before, and a norm and a DyT within control flow."""

    def __init__(self, run: Callable[[Callable[[Tensor], Tensor], Tensor], Tensor]) -> None:
        super().__init__()
        self.before, self.within = _norm(), _norm()
        self.alpha, self.gamma = nn.Parameter(torch.ones(1) * 0.7), nn.Parameter(torch.rand(WIDTH))
        self.run = run

    def forward(self, x: Tensor) -> Tensor:
        return self.run(
            lambda x: self.within(torch.tanh(self.alpha * x) * self.gamma), self.before(x)
        )


def _cond(step: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return torch.cond(x.sum() > 0, step, lambda x: x + 1, (x,))


def _longer_branch(step: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return torch.cond(x.sum() > 0, lambda x: step(x) * 2 + 1, lambda x: x + 1, (x,))


def _loop(step: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    start = torch.zeros((), dtype=torch.int64)
    return while_loop(lambda n, x: n < 2, lambda n, x: (n + 1, step(x)), (start, x))[1]


def _scan(step: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return scan(lambda carry, x: (carry + x, step(x)), torch.zeros(5, WIDTH), x)[1]


@pytest.mark.parametrize(
    ("run", "operator"),
    [(_cond, "cond"), (_longer_branch, "cond"), (_loop, "while_loop"), (_scan, "scan")],
)
def test_norm_in_control_flow_is_refused_and_dyt_stays(
    run: Callable[[Callable[[Tensor], Tensor], Tensor], Tensor], operator: str
) -> None:
    torch._dynamo.reset()
    model = Flow(run).eval()
    (x,) = _batches(1)[0]
    program = torch.export.export(model, (x,))
    result = dyt_compile.convert(program, _batches(), mode="all")
    assert [site.name for site in result.match.sites] == ["before"]
    (refusal,) = result.match.refusals
    assert refusal.name == "within"
    assert refusal.reason.startswith(f"it stands inside {operator}")
    expected = copy.deepcopy(model)
    expected.before.forward = lambda x: torch.ops.dyt.DyT(x, *_operands(result))
    assert torch.allclose(result.model(x), expected(x), atol=1e-6)


class Residual(nn.Module):
    """A residual stream that is written in place, or is not."""

    def __init__(self, in_place: bool) -> None:
        super().__init__()
        self.norms = nn.ModuleList(_norm() for _ in range(3))
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.in_place = in_place

    def forward(self, x: Tensor) -> Tensor:
        x = self.linear(x)
        for norm in self.norms:
            if self.in_place:
                x += F.relu(self.linear(norm(x)), inplace=True)
            else:
                x = x + F.relu(self.linear(norm(x)))
        return x


def test_residual_stream_written_in_place_is_fitted_like_one_that_is_not() -> None:
    model, twin = Residual(True).eval(), Residual(False).eval()
    twin.load_state_dict(model.state_dict())
    result, expected = (dyt_compile.convert(m, _batches(), mode="all") for m in (model, twin))
    assert result.report.error == pytest.approx(expected.report.error, rel=1e-5)
    for name, fit in expected.calibration.fits.items():
        alpha = result.calibration.fits[name].parameters.alpha
        assert alpha == pytest.approx(fit.parameters.alpha, rel=1e-5)
    (x,) = _batches(1)[0]
    assert torch.allclose(result.model(x), expected.model(x), atol=1e-5)


class InPlaceNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(WIDTH) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        x = x - x.mean(-1, keepdim=True)
        x /= torch.sqrt(x.square().mean(-1, keepdim=True) + 1e-5)
        x *= self.weight
        return x


def test_norm_written_with_in_place_operators_is_found() -> None:
    (x,) = _batches(1)[0]
    (site,) = dyt_compile.inspect(nn.Sequential(InPlaceNorm()).eval(), (x,)).sites
    assert (site.name, site.kind.value, site.affine) == ("0", "layer_norm", ("gamma",))


class Cached(nn.Module):
    """A norm of what is in a cache, as decoders have one."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = _norm()
        self.register_buffer("cache", torch.zeros(8, 9, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        self.cache[: x.shape[0], 2:7] = x
        return self.norm(self.cache[: x.shape[0]])


def test_buffers_that_the_model_writes_to_stay_its_own() -> None:
    model = Cached().eval()
    result = dyt_compile.convert(model, _batches(), mode="all")
    (x,) = _batches(1)[0]
    result.model(x)
    assert not model.cache.any()
    assert torch.equal(result.model.cache[:, 2:7], x)
    assert result.calibration.fits["norm"].fit_error < 0.5  # of what was written, not of zeros


class Mapped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = _norm()

    def forward(self, x: Tensor) -> Tensor:
        return torch.vmap(self.norm)(x)


def test_norm_under_vmap_is_converted() -> None:
    result = dyt_compile.convert(Mapped().eval(), _batches(), mode="all")
    (x,) = _batches(1)[0]
    assert [site.name for site in result.match.sites] == ["norm"]
    assert torch.allclose(result.model(x), torch.ops.dyt.DyT(x, *_operands(result)), atol=1e-6)


def test_batch_norm_in_training_is_refused_in_every_form() -> None:
    model = nn.Sequential(nn.BatchNorm1d(5), nn.LayerNorm(WIDTH)).train()
    (x,) = _batches(1)[0]
    program = torch.export.export(model, (x,))
    for form in (program, program.run_decompositions({}), program.run_decompositions()):
        found = dyt_compile.inspect(form)
        assert [site.name for site in found.sites] == ["1"]
        assert [refusal.name for refusal in found.refusals] == ["0"]
