"""torch.compile: the backend "dyt" and the Inductor pass, against what `convert` returns."""

from __future__ import annotations

import copy
import gc
import logging
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed

import dyt_compile
from dyt_compile.calibration import Calibration, digest
from dyt_compile.errors import CalibrationError, CaptureError, OptionError, RewriteError
from dyt_compile.passes.rewrite import rewrite

pytestmark = pytest.mark.core

WIDTH = 16


class RMSNorm(nn.Module):
    """As LLaMA writes it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(width) + 0.5)
        self.eps = 1e-6

    def forward(self, x: Tensor) -> Tensor:
        dtype = x.dtype
        x = x.to(torch.float32)
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * x.to(dtype)


class Block(nn.Module):
    """LayerNorm and RMSNorm, with another gamma and another scale in each block."""

    def __init__(self, place: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(WIDTH)
        self.mixer = nn.Linear(WIDTH, WIDTH)
        self.norm2 = RMSNorm(WIDTH)
        nn.init.uniform_(self.norm1.weight, 0.5 + place, 1.5 + place)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mixer(self.norm1(x))
        return x + self.mixer(self.norm2(x))


class Model(nn.Module):
    """Three blocks; the last norm has no affine part."""

    def __init__(self, *, breaks: bool = False) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(place) for place in range(3))
        self.norm = nn.LayerNorm(WIDTH, elementwise_affine=False)
        self.breaks = breaks

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks[0](x)
        if self.breaks:
            torch._dynamo.graph_break()
        for block in self.blocks[1:]:
            x = block(x)
        return self.norm(x)


class Counting:
    """An inner backend that runs what it is given as it is, and keeps it."""

    def __init__(self) -> None:
        self.modules: list[torch.fx.GraphModule] = []

    def __call__(self, module: torch.fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        self.modules.append(module)
        return module.forward

    def labels(self, place: int = 0) -> list[str]:
        return [str(node.target) for node in self.modules[place].graph.nodes]


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    torch.manual_seed(0)
    yield
    torch._dynamo.reset()


def _inputs(rows: int = 4) -> Tensor:
    return torch.randn(rows, 5, WIDTH)


def _converted(model: nn.Module, mode: str = "all") -> dyt_compile.Conversion:
    batches = [(_inputs(8),) for _ in range(4)]
    return dyt_compile.convert(model, batches, mode=mode, fit="diagonal", fold=False)


def _calibration(result: dyt_compile.Conversion) -> Calibration:
    assert result.calibration is not None
    return result.calibration


def _only(result: dyt_compile.Conversion, *names: str) -> tuple[Calibration, nn.Module]:
    """The calibration with these sites converted alone, and the model that this gives."""
    calibration = replace(_calibration(result), converted=frozenset(names))
    return calibration, rewrite(result.original, result.match, calibration, names).model


def _close(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a, b, rtol=1e-5, atol=1e-5)


def _warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What the backend warned of; convert's own warning, of hard sites, comes before it."""
    told = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
    return [message for message in told if not message.startswith("known to be hard")]


def test_closeness_tells_dyt_from_its_norm() -> None:
    model = Model().eval()
    x = _inputs()
    assert not _close(_converted(model).model(x), model(x))


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
def test_whole_model_computes_what_convert_returns(inner: str) -> None:
    model, x = Model().eval(), _inputs()
    result = _converted(model)
    made = dyt_compile.backend(calibration=_calibration(result), inner=inner)
    compiled = torch.compile(model, backend=made, fullgraph=True)
    assert _close(compiled(x), result.model(x))


def test_inductor_computes_what_convert_returns() -> None:
    model, x = Model().eval(), _inputs()
    result = _converted(model)
    compiled = torch.compile(model, backend=dyt_compile.backend(calibration=result.calibration))
    with torch.no_grad():
        assert _close(compiled(x), result.model(x))


def test_sites_of_a_budget_are_converted_and_no_others() -> None:
    model, x = Model().eval(), _inputs()
    calibration, expected = _only(_converted(model), "blocks.1.norm1", "norm")
    inner = Counting()
    compiled = torch.compile(
        model, backend=dyt_compile.backend(calibration=calibration, inner=inner)
    )
    assert _close(compiled(x), expected(x))
    assert sum("dyt.DyT" in label for label in inner.labels()) == 2


def test_regional_compilation_gives_each_block_its_own_values() -> None:
    model, x = Model().eval(), _inputs()
    result = _converted(model)
    calibration, expected = _only(result, *(n for n in result.calibration.fits if n != "norm"))
    alphas = [calibration.fits[f"blocks.{n}.norm1"].parameters.alpha.item() for n in range(3)]
    assert len(set(alphas)) == 3
    inner = Counting()
    made = dyt_compile.backend(calibration=_calibration(result), inner=inner)
    for block in model.blocks:
        block.compile(backend=made, fullgraph=True)
    with torch.no_grad():
        assert _close(model(x), expected(x))
        assert len(inner.modules) == 1  # one artifact serves all blocks


@pytest.mark.parametrize("first", [0, 2])
def test_blocks_of_one_artifact_may_differ_in_what_is_converted(first: int) -> None:
    model, x = Model().eval(), _inputs()
    others = [f"blocks.{place}.norm1" for place in range(3) if place != first]
    calibration, expected = _only(_converted(model), "blocks.1.norm2", *others)
    inner = Counting()
    made = dyt_compile.backend(calibration=calibration, inner=inner)
    for block in model.blocks:
        block.compile(backend=made)
    with torch.no_grad():
        for rows in (4, 6, 7):
            x = _inputs(rows)
            assert _close(model(x), expected(x))
    # three variants (first block, middle block, the other), static and then dynamic
    assert len(inner.modules) <= 6


def test_gamma_that_replaces_a_dead_one_is_looked_up_anew() -> None:
    model, x = Model().eval(), _inputs()
    result = _converted(model)
    made = dyt_compile.backend(calibration=_calibration(result), inner="eager")
    block = Block(0).eval()
    block.mixer = model.blocks[0].mixer
    compiled = torch.compile(block, backend=made)
    with torch.no_grad():
        for place in (0, 1, 2, 1, 0):
            block.norm1.weight = nn.Parameter(model.blocks[place].norm1.weight.clone())
            block.norm2.weight = nn.Parameter(model.blocks[place].norm2.weight.clone())
            gc.collect()
            names = (f"blocks.{place}.norm1", f"blocks.{place}.norm2")
            first, second = (calibration_values(result, name) for name in names)
            y = x + block.mixer(torch.ops.dyt.DyT(x, *first))
            operator = torch.ops.dyt.DyT if len(second) == 3 else torch.ops.dyt.DyTScale
            assert _close(compiled(x), y + block.mixer(operator(y, *second)))


def calibration_values(result: dyt_compile.Conversion, name: str) -> list[Tensor]:
    parameters = _calibration(result).fits[name].parameters
    assert parameters is not None
    return [torch.from_numpy(value) for value in parameters.named().values()]


class Tied(nn.Module):
    """One block, called three times."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Block(0)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = self.block(x)
        return x


def test_block_that_is_called_again_shares_its_values() -> None:
    model, x = Tied().eval(), _inputs()
    result = _converted(model)
    made = dyt_compile.backend(calibration=_calibration(result), inner="eager")
    with torch.no_grad():
        whole = torch.compile(copy.deepcopy(model), backend=made)
        assert _close(whole(x), result.model(x))
        model.block.compile(backend=made)
        assert _close(model(x), result.model(x))


def test_graph_break_in_the_middle_keeps_the_values_apart() -> None:
    model, x = Model(breaks=True).eval(), _inputs()
    whole = Model().eval()
    whole.load_state_dict(model.state_dict())
    result = _converted(whole)
    _, expected = _only(result, *(name for name in result.calibration.fits if name != "norm"))
    inner = Counting()
    made = dyt_compile.backend(calibration=_calibration(result), inner=inner)
    compiled = torch.compile(model, backend=made)
    with torch.no_grad():
        assert _close(compiled(x), expected(x))
    assert len(inner.modules) == 2


def test_dynamic_shapes_are_compiled_twice_at_most() -> None:
    model = Model().eval()
    result = _converted(model)
    inner = Counting()
    made = dyt_compile.backend(calibration=_calibration(result), inner=inner)
    compiled = torch.compile(model, backend=made, fullgraph=True)
    with torch.no_grad():
        for rows in (4, 6, 7, 9):
            x = _inputs(rows)
            assert _close(compiled(x), result.model(x))
    assert len(inner.modules) == 2


def test_dynamic_from_the_start_is_compiled_once() -> None:
    model = Model().eval()
    result = _converted(model)
    inner = Counting()
    made = dyt_compile.backend(calibration=_calibration(result), inner=inner)
    compiled = torch.compile(model, backend=made, dynamic=True)
    with torch.no_grad():
        for rows in (4, 6, 7):
            x = _inputs(rows)
            assert _close(compiled(x), result.model(x))
    assert len(inner.modules) == 1


def test_whole_model_without_a_forward_of_its_own_resolves_its_paths() -> None:
    model, x = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH)).eval(), _inputs()
    result = _converted(model)  # one gamma of ones: known by its path alone
    made = dyt_compile.backend(calibration=_calibration(result), inner="eager")
    with torch.no_grad():
        assert _close(torch.compile(model, backend=made)(x), result.model(x))


class Looking(nn.Module):
    """Looks its attributes up itself, as the models of diffusers do."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH)
        self.norm = nn.LayerNorm(WIDTH, elementwise_affine=False)

    def __getattr__(self, name: str) -> Any:
        return super().__getattr__(name)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm(self.layer(x))
        return y


def test_model_with_a_getattr_of_its_own_resolves_its_paths() -> None:
    model, x = Looking().eval(), _inputs()
    result = _converted(model)
    made = dyt_compile.backend(calibration=_calibration(result), inner="eager")
    with torch.no_grad():
        assert _close(torch.compile(model, backend=made)(x), result.model(x))


def test_norm_without_affine_is_kept_where_its_path_does_not_resolve(
    caplog: pytest.LogCaptureFixture,
) -> None:
    result = _converted(model := Model().eval())
    made = dyt_compile.backend(calibration=_calibration(result), inner="eager")
    alone = torch.compile(model.norm, backend=made)
    x = _inputs()
    assert torch.equal(alone(x), model.norm(x))
    assert any("no gamma to be known by" in told for told in _warnings(caplog))


def test_layers_of_one_gamma_keep_their_norms_unless_the_model_tells(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model, x = Model().eval(), _inputs()
    for block in model.blocks:
        nn.init.ones_(block.norm1.weight)
        block.norm2.weight = nn.Parameter(model.blocks[0].norm2.weight.detach().clone())
    result = _converted(model)
    blind = copy.deepcopy(model)
    made = dyt_compile.backend(calibration=_calibration(result), inner="eager")
    for block in blind.blocks:
        block.compile(backend=made)
    with torch.no_grad():
        assert _close(blind(x), model(x))
        told = _warnings(caplog)
        assert any("one value throughout" in line for line in told)
        assert any("which have different values" in line for line in told)
        seeing = copy.deepcopy(model)
        knows = dyt_compile.backend(calibration=_calibration(result), inner="eager", model=seeing)
        for block in seeing.blocks:
            block.compile(backend=knows)
        _, expected = _only(result, *(n for n in result.calibration.fits if n != "norm"))
        assert _close(seeing(x), expected(x))
        # the whole model resolves by its paths
        whole = torch.compile(copy.deepcopy(model), backend=made)
        assert _close(whole(x), result.model(x))


def test_gamma_of_another_model_keeps_its_norm(caplog: pytest.LogCaptureFixture) -> None:
    result = _converted(Model().eval())
    other, x = Model().eval(), _inputs()
    made = dyt_compile.backend(calibration=_calibration(result), inner="eager")
    with torch.no_grad():
        assert torch.equal(torch.compile(other, backend=made)(x), other(x))
    assert any("none of the calibration's" in told for told in _warnings(caplog))


def test_bfloat16_copy_of_the_model_is_known() -> None:
    model, x = Model().eval(), _inputs()
    result = _converted(model)
    half = copy.deepcopy(model).to(torch.bfloat16)
    inner = Counting()
    made = dyt_compile.backend(calibration=_calibration(result), inner=inner)
    with torch.no_grad():
        y = torch.compile(half, backend=made)(x.to(torch.bfloat16))
    assert y.dtype is torch.bfloat16
    assert sum("dyt.DyT" in label for label in inner.labels()) == 7
    expected = result.model(x)
    assert (y - expected).norm() < 0.05 * expected.norm()


class Native(nn.Module):
    """DyT, written out as in its paper's code, next to a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.ones(1) * 0.7)
        self.weight = nn.Parameter(torch.rand(WIDTH))
        self.bias = nn.Parameter(torch.rand(WIDTH))
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x) * 2 + (torch.tanh(self.alpha * x) * self.weight + self.bias)


def test_without_calibration_norms_stay_and_dyt_becomes_one_operator() -> None:
    model, x = Native(), _inputs()
    inner = Counting()
    compiled = torch.compile(model, backend=dyt_compile.backend(inner=inner))
    y = compiled(x)
    assert _close(y, model(x))
    labels = inner.labels()
    assert sum("dyt.DyT" in label for label in labels) == 1
    assert not any("tanh" in label for label in labels)
    assert any("layer_norm" in label for label in labels)
    y.sum().backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    model(x).sum().backward()
    assert all(_close(a, p.grad) for a, p in zip(gradients, model.parameters(), strict=True))


def test_without_calibration_a_model_of_norms_reaches_the_inner_backend_untouched() -> None:
    model, x = Model().eval(), _inputs()
    inner = Counting()
    assert torch.equal(torch.compile(model, backend=dyt_compile.backend(inner=inner))(x), model(x))
    assert not any("dyt" in label for label in inner.labels())


def test_backward_through_x_is_that_of_dyt() -> None:
    model, x = Model(), _inputs()
    result = _converted(model)
    made = dyt_compile.backend(calibration=_calibration(result), inner="aot_eager")
    compiled = torch.compile(model, backend=made)
    with torch.inference_mode():
        compiled(x)  # values made here must serve the training below
    torch._dynamo.reset()
    a, b = (x.clone().requires_grad_() for _ in range(2))
    compiled(a).square().sum().backward()
    result.model(b).square().sum().backward()
    assert a.grad is not None
    assert b.grad is not None
    assert _close(a.grad, b.grad)
    assert model.blocks[0].norm1.weight.grad is None
    assert model.blocks[0].mixer.weight.grad is not None


class Viewed(nn.Module):
    """A norm of a transposed tensor, whose result is viewed: it must be contiguous."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        nn.init.uniform_(self.norm.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.transpose(1, 2)).view(x.shape[0], -1)


def test_result_has_the_layout_of_the_norms() -> None:
    model, x = Viewed().eval(), torch.randn(4, WIDTH, 5)
    result = dyt_compile.convert(
        model, [(torch.randn(8, WIDTH, 5),)] * 4, mode="all", fit="diagonal"
    )
    inner = Counting()
    made = dyt_compile.backend(calibration=_calibration(result), inner=inner)
    assert _close(torch.compile(model, backend=made)(x), result.model(x))
    assert any("dyt.DyT" in label for label in inner.labels())


class Written(nn.Module):
    """An RMSNorm in whose middle something is written, to its input or to another tensor."""

    def __init__(self, within: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(WIDTH))
        self.within = within

    def forward(self, x: Tensor) -> Tensor:
        x = x + 1
        if not self.within:
            x.mul_(2)
        scale = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
        if self.within:
            x.mul_(2)
        return x * scale * self.weight


@pytest.mark.parametrize("within", [False, True])
def test_norm_whose_input_is_written_to_meanwhile_is_kept(
    within: bool, caplog: pytest.LogCaptureFixture
) -> None:
    model, x = Written(within), _inputs()
    calm = Written(False)
    calm.load_state_dict(model.state_dict())
    result = _converted(calm)
    inner = Counting()
    made = dyt_compile.backend(calibration=_calibration(result), inner=inner)
    y = torch.compile(model, backend=made)(x)
    assert _close(y, model(x) if within else result.model(x))
    assert any("dyt." in label for label in inner.labels()) is not within


class InPlace(nn.Module):
    """An RMSNorm that writes its statistic and its result in place."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(WIDTH) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        x = x + 1
        factor = x.pow(2).mean(-1, keepdim=True).add_(1e-6).rsqrt_()
        return x.mul_(factor).mul_(self.weight)


def test_norm_that_writes_in_place_is_kept_with_the_reason(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model, x = InPlace(), _inputs()
    made = dyt_compile.backend(calibration=_calibration(_converted(model)), inner="eager")
    assert _close(torch.compile(model, backend=made)(x), model(x))
    assert any("writes to a tensor" in told for told in _warnings(caplog))


class Checkpointed(nn.Module):
    """Its first block is a higher-order operator in Dynamo's graph."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(place) for place in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.utils.checkpoint.checkpoint(self.blocks[0], x, use_reentrant=False)
        return self.blocks[1](x)


def test_checkpoint_is_converted_without_gradients_and_stays_with_them(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model, x = Checkpointed(), _inputs()
    result = _converted(nn.Sequential(*model.blocks))
    _, expected = _only(result, "1.norm1", "1.norm2")
    inner = Counting()
    made = dyt_compile.backend(calibration=_calibration(result), inner=inner)
    compiled = torch.compile(model, backend=made)
    with torch.no_grad():
        assert _close(compiled(x), result.model(x))
    assert _warnings(caplog) == []
    x.requires_grad_()
    assert _close(compiled(x), expected(x))
    assert [sum("dyt.DyT" in label for label in inner.labels(n)) for n in range(2)] == [4, 2]
    assert "checkpoint" in "".join(inner.labels(1))
    assert _warnings(caplog) == [
        f"blocks.0.norm{n} keeps its norm: it stands inside a checkpoint, which training needs"
        for n in (1, 2)
    ]


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        nn.init.uniform_(self.norm.weight)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cond(x.sum() > 0, self.norm, lambda x: x.clone(), (x,))


def test_norm_in_a_branch_is_left_alone_and_told(caplog: pytest.LogCaptureFixture) -> None:
    model, x = Branching().eval(), _inputs()
    calibration = _calibration(_converted(nn.Sequential(model.norm)))
    made = dyt_compile.backend(calibration=calibration, inner="eager")
    with torch.no_grad():
        compiled = torch.compile(model, backend=made, fullgraph=True)
        for y in (x - x.mean() + 1, x - x.mean() - 1):
            assert torch.equal(compiled(y), model(y))
    assert _warnings(caplog) == ["norm keeps its norm: it stands inside cond"]


@torch.compiler.nested_compile_region
def _region(block: nn.Module, x: Tensor) -> Tensor:
    return block(x)


class Marked(Model):
    """Its blocks are regions that torch.compile traces once."""

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = _region(block, x)
        return self.norm(x)


def test_marked_regions_take_the_values_of_their_blocks() -> None:
    model, x = Marked().eval(), _inputs()
    result = _converted(model)
    calibration, expected = _only(result, *(n for n in result.calibration.fits if n != "norm"))
    made = dyt_compile.backend(calibration=calibration, inner="aot_eager")
    compiled = torch.compile(model, backend=made, fullgraph=True)
    with torch.no_grad():
        assert _close(compiled(x), expected(x))


class Modulated(nn.Module):
    """As in DiT: a norm without affine part, scaled by what a condition gives."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(WIDTH, elementwise_affine=False)
        self.mixer = nn.Linear(WIDTH, WIDTH)
        self.modulation = nn.Linear(WIDTH, 2 * WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        scale, shift = self.modulation(x.mean(1, keepdim=True)).chunk(2, -1)
        return x + self.mixer(3 * self.norm1(x) * (1 + scale) + shift)


class Diffusion(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Modulated() for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


class BrokenUp(Diffusion):
    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
            torch._dynamo.graph_break()
        return x


def _by_blocks(model: Diffusion, made: Callable[..., Any]) -> Callable[..., Tensor]:
    for block in model.blocks:
        block.compile(backend=made, fullgraph=True)
    return model


def _by_breaks(model: Diffusion, made: Callable[..., Any]) -> Callable[..., Tensor]:
    broken = BrokenUp().eval()
    broken.blocks = model.blocks
    return torch.compile(broken, backend=made)


def _by_a_function(model: Diffusion, made: Callable[..., Any]) -> Callable[..., Tensor]:
    """Two blocks a call, so that a frame has two roots."""
    pair = torch.compile(lambda f, g, x: g(f(x)), backend=made, fullgraph=True)
    first, second, third, fourth = model.blocks
    return lambda x: pair(third, fourth, pair(first, second, x))


@pytest.mark.parametrize("compile_", [_by_blocks, _by_breaks, _by_a_function])
def test_norms_without_affine_are_known_by_the_parameters_beside_them(
    compile_: Callable[..., Callable[..., Tensor]], caplog: pytest.LogCaptureFixture
) -> None:
    model, x = Diffusion().eval(), _inputs()
    result = _converted(model)
    fits = _calibration(result).fits
    assert len({fits[f"blocks.{n}.norm1"].parameters.alpha.item() for n in range(4)}) == 4
    calibration, expected = _only(result, "blocks.0.norm1", "blocks.2.norm1", "blocks.3.norm1")
    for seen in (model, None):
        torch._dynamo.reset()
        twin = copy.deepcopy(model)
        made = dyt_compile.backend(
            calibration=calibration, inner="eager", model=None if seen is None else twin
        )
        with torch.no_grad():
            truth = model if seen is None else expected
            assert _close(compile_(twin, made)(x), truth(x))
        assert any("pass the model" in told for told in _warnings(caplog)) is (seen is None)


def test_blocks_that_share_everything_keep_their_norms(caplog: pytest.LogCaptureFixture) -> None:
    model, x = Diffusion().eval(), _inputs()
    for block in model.blocks[1:]:
        block.mixer, block.modulation = model.blocks[0].mixer, model.blocks[0].modulation
    result = _converted(model)
    made = dyt_compile.backend(calibration=_calibration(result), inner="eager", model=model)
    with torch.no_grad():
        expected = model(x)
        assert torch.equal(_by_blocks(model, made)(x), expected)
    assert any("no gamma to be known by" in told for told in _warnings(caplog))


def test_gamma_shared_by_blocks_is_told_apart_by_the_model() -> None:
    model, x = Model().eval(), _inputs()
    for block in model.blocks[1:]:
        block.norm1.weight = model.blocks[0].norm1.weight
    result = _converted(model)
    _, expected = _only(result, *(n for n in result.calibration.fits if n != "norm"))
    twin = copy.deepcopy(model)
    made = dyt_compile.backend(calibration=_calibration(result), inner="eager", model=twin)
    for block in twin.blocks:
        block.compile(backend=made)
    with torch.no_grad():
        assert _close(twin(x), expected(x))
        # its parameters are replaced: found again, under the same paths
        state = {name: value.clone() for name, value in twin.state_dict().items()}
        twin.load_state_dict(state, assign=True)
        for block in twin.blocks[1:]:
            block.norm1.weight = twin.blocks[0].norm1.weight
        assert _close(twin(x), expected(x))


def test_gamma_that_is_written_to_is_looked_up_anew(caplog: pytest.LogCaptureFixture) -> None:
    model, x = Model().eval(), _inputs()
    result = _converted(model)
    trained = copy.deepcopy(model.state_dict())
    twin = Model().eval()  # of other weights, until those of the calibration are loaded
    made = dyt_compile.backend(calibration=_calibration(result), inner="eager")
    compiled = torch.compile(twin, backend=made)
    with torch.no_grad():
        assert _close(compiled(x), twin(x))
        assert len(_warnings(caplog)) == 7
        twin.load_state_dict(trained)
        assert _close(compiled(x), result.model(x))
        for block in twin.blocks:
            block.norm1.weight.mul_(1.5)
        told = len(_warnings(caplog))
        _, expected = _only(result, *(f"blocks.{n}.norm2" for n in range(3)))
        for place, block in enumerate(twin.blocks):
            getattr(expected.blocks, str(place)).norm1.weight.copy_(block.norm1.weight)
        assert _close(compiled(x), expected(x))
        assert len(_warnings(caplog)) == told + 4  # three gammas, and the norm without one
        compiled(x)
        assert len(_warnings(caplog)) == told + 4


def test_kept_norms_train_and_are_told_once(caplog: pytest.LogCaptureFixture) -> None:
    model, x = Model(), _inputs()
    calibration, _ = _only(_converted(model), "blocks.0.norm1")
    made = dyt_compile.backend(calibration=calibration, inner="aot_eager")
    compiled = torch.compile(model, backend=made)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    before = model.blocks[1].norm1.weight.detach().clone()
    for _ in range(3):
        compiled(x)[..., 0].square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert not torch.equal(model.blocks[1].norm1.weight, before)
    names = [told.partition(" keeps")[0] for told in _warnings(caplog)]
    assert sorted(names) == sorted(set(names))


def test_copy_of_a_compiled_model_is_converted_too() -> None:
    model, x = Model().eval(), _inputs()
    result = _converted(model)
    made = dyt_compile.backend(calibration=_calibration(result), inner="eager")
    compiled = torch.compile(model, backend=made)
    with torch.no_grad():
        assert _close(compiled(x), result.model(x))
        assert _close(copy.deepcopy(compiled)(x), result.model(x))


def test_model_that_is_cast_after_compilation_stays_converted() -> None:
    model, x = Model().eval(), _inputs()
    result = _converted(model)
    twin = copy.deepcopy(model)
    made = dyt_compile.backend(calibration=_calibration(result), inner="eager")
    compiled = torch.compile(twin, backend=made)
    with torch.no_grad():
        compiled(x)
        twin.double()
        y = compiled(x.double())
    assert y.dtype is torch.float64
    assert _close(y.float(), result.model(x))


def test_functional_call_is_known_by_parameters_and_refused_for_plain_tensors(
    caplog: pytest.LogCaptureFixture,
) -> None:
    from torch.func import functional_call

    model, x = Model().eval(), _inputs()
    result = _converted(model)
    made = dyt_compile.backend(calibration=_calibration(result), inner="eager")
    parameters = {n: nn.Parameter(p.detach().clone()) for n, p in model.named_parameters()}
    plain = {name: held.detach() for name, held in parameters.items()}

    def run(held: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(model, held, (x,))

    compiled = torch.compile(run, backend=made, fullgraph=True)
    _, expected = _only(result, *(n for n in result.calibration.fits if n != "norm"))
    with torch.no_grad():
        y = compiled(parameters, x)
        assert _close(y, result.model(x)) or _close(y, expected(x))
        caplog.clear()
        assert _close(compiled(plain, x), model(x))
    assert any("blocks.0.norm1 keeps its norm: its gamma" in told for told in _warnings(caplog))


class Mapped(nn.Module):
    """A norm beside a vmap, as where attention masks are made."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        nn.init.uniform_(self.norm.weight)

    def forward(self, x: Tensor) -> Tensor:
        mask = torch.vmap(lambda row: row.abs() > 0.5)(x)
        return self.norm(x).masked_fill(mask, 0.0)


def test_vmap_beside_a_norm_is_passed_over() -> None:
    model, x = Mapped().eval(), _inputs()
    result = _converted(model)
    made = dyt_compile.backend(calibration=_calibration(result), inner="aot_eager")
    with torch.no_grad():
        compiled = torch.compile(model, backend=made, fullgraph=True)
        assert _close(compiled(x), result.model(x))


def test_autocast_around_and_inside_the_model(caplog: pytest.LogCaptureFixture) -> None:
    model, x = Model().eval(), _inputs()
    result = _converted(model)
    made = dyt_compile.backend(calibration=_calibration(result), inner="aot_eager")
    compiled = torch.compile(model, backend=made, fullgraph=True)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        y, expected = compiled(x), result.model(x)
    assert (y - expected).norm() < 0.02 * expected.norm()
    assert _warnings(caplog) == []


def test_frame_that_cannot_be_traced_is_compiled_as_it_is(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x = Model().eval(), _inputs()
    result = _converted(model)

    def fail(module: torch.fx.GraphModule) -> None:
        raise CaptureError("Dynamo's graph cannot be traced to aten: sorry")

    monkeypatch.setattr("dyt_compile.backends.Frame", fail)
    made = dyt_compile.backend(calibration=_calibration(result), inner="eager")
    with torch.no_grad():
        assert torch.equal(torch.compile(model, backend=made)(x), model(x))
    (told,) = _warnings(caplog)
    assert told.endswith("cannot be traced to aten: sorry")


def test_values_come_from_a_file_by_the_registered_name(tmp_path: Path) -> None:
    model, x = Model().eval(), _inputs()
    result = _converted(model)
    _calibration(result).save(tmp_path / "fits.safetensors")
    for calibration in (str(tmp_path / "fits.safetensors"), result.calibration):
        torch._dynamo.reset()
        options = {"calibration": calibration, "inner": "eager"}
        compiled = torch.compile(model, backend="dyt", options=options)
        with torch.no_grad():
            assert _close(compiled(x), result.model(x))
    made = dyt_compile.backend(calibration=tmp_path / "fits.safetensors", inner="eager")
    assert _close(torch.compile(model, backend=made)(x), result.model(x))


@pytest.mark.parametrize(
    ("options", "kind", "told"),
    [
        ({"calibraton": "x"}, OptionError, "'calibraton'"),
        ({"calibration": "missing.safetensors"}, CalibrationError, "'missing.safetensors'"),
        ({"calibration": 3}, OptionError, "int"),
        ({"inner": "inductr"}, OptionError, "'inductr'"),
        ({"inner": "dyt"}, OptionError, "'dyt'"),
        ({"inner": 3}, OptionError, "3"),
    ],
)
def test_wrong_option_is_told_in_one_line(
    options: dict[str, Any], kind: type[Exception], told: str
) -> None:
    with pytest.raises(BackendCompilerFailed) as raised:
        torch.compile(Model(), backend="dyt", options=options)(_inputs())
    error = raised.value.inner_exception
    assert type(error) is kind
    assert told in str(error)
    assert "\n" not in str(error)
    if "calibraton" not in options:
        with pytest.raises(kind):
            dyt_compile.backend(**options)


def test_mode_and_options_reach_the_inner_backend() -> None:
    given: list[dict[str, Any]] = []

    def inner(module: torch.fx.GraphModule, inputs: Sequence[Any], **options: Any) -> Any:
        given.append(options)
        return module.forward

    made = dyt_compile.backend(inner=inner)
    torch.compile(Native(), backend=made, mode="max-autotune")(_inputs())
    torch.compile(Native(), backend=made, options={"max_autotune": True})(_inputs())
    assert given == [{"mode": "max-autotune"}, {"options": {"max_autotune": True}}]
    with pytest.raises(BackendCompilerFailed, match="mode is 'fastest'"):
        torch.compile(Model(), backend="dyt", mode="fastest")(_inputs())


def test_inductor_takes_a_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def compile_fx(module: Any, inputs: Any, config_patches: dict[str, Any]) -> Any:
        seen.append(config_patches)
        return module.forward

    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", compile_fx)
    torch.compile(Native(), backend="dyt", mode="max-autotune-no-cudagraphs")(_inputs())
    assert seen[0]["max_autotune"] is True


def test_summary_counts_sites(caplog: pytest.LogCaptureFixture) -> None:
    model = Model().eval()
    calibration, _ = _only(_converted(model), "blocks.1.norm1", "norm")
    caplog.clear()
    with caplog.at_level(logging.INFO, logger="dyt_compile"):
        made = dyt_compile.backend(calibration=calibration, inner="eager")
        torch.compile(model, backend=made)(_inputs())
    told = [r.getMessage() for r in caplog.records if r.name == "dyt_compile"]
    assert told == ["7 sites found: 2 norms converted to DyT, 5 norms kept, 0 DyT already there"]


def test_digest_agrees_across_dtypes_and_tells_gammas_apart() -> None:
    gamma = np.random.default_rng(0).normal(size=64).astype(np.float32)
    half = torch.from_numpy(gamma).to(torch.bfloat16).float().numpy()
    assert digest(gamma) == digest(half) is not None
    assert digest(gamma) == digest(gamma.reshape(4, 16))
    assert digest(gamma) != digest(np.roll(gamma, 1))
    assert digest(np.ones(64, np.float32)) is None


def test_digest_is_saved(tmp_path: Path) -> None:
    calibration = _calibration(_converted(Model().eval()))
    calibration.save(tmp_path / "fits.safetensors")
    loaded = Calibration.load(tmp_path / "fits.safetensors")
    assert loaded.fingerprint == calibration.fingerprint
    digests = [sketch.digest for sketch in loaded.sketches().values()]
    assert len(set(digests)) == 7
    assert digests[-1] is None
    broken = replace(calibration, fits=MappingProxyType({}))
    with pytest.raises(CalibrationError, match="0 sites"):
        broken.sketches()


def test_inductor_pass_converts_a_whole_model() -> None:
    model, x = Model().eval(), _inputs()
    result = _converted(model)
    change = dyt_compile.InductorPass(_calibration(result))
    with torch._inductor.config.patch(pre_grad_custom_pass=change), torch.no_grad():
        assert _close(torch.compile(model)(x), result.model(x))


def test_inductor_pass_refuses_a_part_of_the_model() -> None:
    model, x = Model().eval(), _inputs()
    change = dyt_compile.InductorPass(_calibration(_converted(model)))
    model.blocks[0].compile()
    with (
        torch._inductor.config.patch(pre_grad_custom_pass=change),
        pytest.raises(BackendCompilerFailed, match="not the model that was calibrated") as e,
    ):
        model(x)
    assert isinstance(e.value.inner_exception, RewriteError)


def test_inductor_pass_is_known_by_its_calibration() -> None:
    result = _converted(Model().eval())
    calibration = _calibration(result)
    same = dyt_compile.InductorPass(replace(calibration))
    fewer, _ = _only(result, "norm")
    assert dyt_compile.InductorPass(calibration).uuid() == same.uuid()
    assert dyt_compile.InductorPass(fewer).uuid() != same.uuid()
    fit = calibration.fits["norm"]
    louder = replace(fit, parameters=replace(fit.parameters, alpha=fit.parameters.alpha * 2))
    other = replace(calibration, fits={**calibration.fits, "norm": louder})
    assert dyt_compile.InductorPass(other).uuid() != same.uuid()
    with pytest.raises(OptionError, match="None"):
        dyt_compile.InductorPass(None)  # type: ignore[arg-type]


def test_inductor_fuses_dyt_with_the_residual_add() -> None:
    from torch._inductor.utils import run_and_get_code

    model, x = Model().eval(), _inputs()
    result = _converted(model)
    made = dyt_compile.backend(calibration=_calibration(result))
    with torch.no_grad(), torch._inductor.config.patch(force_disable_caches=True):
        y, codes = run_and_get_code(torch.compile(model, backend=made), x)
    assert _close(y, result.model(x))
    code = "\n".join(codes)
    called = [line for line in code.splitlines() if not line.lstrip().startswith("#")]
    assert not any("ops.dyt" in line for line in called)
    kernels = re.findall(r"r\'{3}(.*?)\'{3}", code, re.S)
    before = [
        k.partition("at::vec::clamp(")[0] for k in kernels if "clamp" in k
    ]  # tanh's first step
    assert len(before) >= 5  # equal ones are shared
    added = re.compile(r"= tmp\d+ \+ tmp\d+;")
    assert sum(added.search(part) is None for part in before) == 1  # that of the first norm
    assert "rsqrt" not in code


@pytest.mark.slow
def test_variants_and_dynamic_shapes_work_with_inductor() -> None:
    model = Model().eval()
    calibration, expected = _only(_converted(model), "blocks.1.norm1", "blocks.2.norm2")
    made = dyt_compile.backend(calibration=calibration)
    for block in model.blocks:
        block.compile(backend=made)
    with torch.no_grad():
        for rows in (4, 6, 7):
            x = _inputs(rows)
            assert _close(model(x), expected(x))
    x = _inputs().requires_grad_()
    (gradient,) = torch.autograd.grad(model(x).square().sum(), x)
    (true_gradient,) = torch.autograd.grad(expected(x).square().sum(), x)
    assert _close(gradient, true_gradient)


@pytest.mark.slow
def test_recompilation_finds_the_cache() -> None:
    from torch._dynamo.utils import counters

    model, x = Model().eval(), _inputs()
    result = _converted(model)
    for attempt in range(2):
        torch._dynamo.reset()
        counters.clear()
        made = dyt_compile.backend(calibration=_calibration(result))
        with torch.no_grad():
            torch.compile(model, backend=made)(x)
        if attempt:
            assert (
                counters["inductor"]["fxgraph_cache_hit"]
                + counters["aot_autograd"]["autograd_cache_hit"]
            )


@pytest.mark.slow
def test_inductor_pass_works_in_aot_inductor(tmp_path: Path) -> None:
    model, x = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)).eval(), _inputs()
    result = _converted(model)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("rows")},))
    change = dyt_compile.InductorPass(_calibration(result))
    with torch._inductor.config.patch(pre_grad_custom_pass=change):
        package = torch._inductor.aoti_compile_and_package(
            program, package_path=str(tmp_path / "model.pt2")
        )
    compiled = torch._inductor.aoti_load_package(package)
    with torch.no_grad():
        for rows in (4, 7):
            x = _inputs(rows)
            assert _close(compiled(x), result.model(x))
