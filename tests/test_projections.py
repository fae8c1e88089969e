"""Projections behind converted sites: which are refitted, towards what, and what that changes."""

from __future__ import annotations

import copy
import io
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor, nn

import dyt_compile
from dyt_compile.calibration import Calibration
from dyt_compile.dyt import DytParameters, Mix, evaluate
from dyt_compile.errors import CalibrationError
from dyt_compile.fits import inverse
from dyt_compile.passes.capture import capture
from dyt_compile.passes.match import match
from dyt_compile.projections import Projection, changes_of, projections
from dyt_compile.refits import RefitSums, _Sums
from dyt_compile.report.terminal import report_table

Array = npt.NDArray[np.float32]
WIDTH, TOKENS = 16, 6


class Block(nn.Module):
    """A feed-forward block, its norm behind the residual sum or before the branch."""

    def __init__(self, post: bool) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.first = nn.Linear(WIDTH, 4 * WIDTH)
        self.second = nn.Linear(4 * WIDTH, WIDTH)
        self.post = post

    def forward(self, x: Tensor) -> Tensor:
        if self.post:
            y: Tensor = self.norm(x + self.second(F.gelu(self.first(x))))
            return y
        return x + self.second(F.gelu(self.first(self.norm(x))))


class Net(nn.Module):
    def __init__(self, post: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Block(post) for _ in range(3))
        self.head = nn.Linear(WIDTH, 5)
        for name, parameter in self.named_parameters():
            if "norm" not in name:
                nn.init.normal_(parameter, std=0.3)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        y: Tensor = self.head(x)
        return y


class TimeFirst(nn.Module):
    """Its branch ends flattened and transposed, as in torchvision's attention."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm = nn.LayerNorm(WIDTH)
        self.inner = nn.Linear(WIDTH, WIDTH)
        self.outer = nn.Linear(WIDTH, WIDTH)
        self.last = nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        turned = torch.tanh(self.inner(y)).transpose(0, 1).reshape(-1, WIDTH)
        z: Tensor = self.last(y + self.outer(turned).view(TOKENS, -1, WIDTH).transpose(0, 1))
        return z


def _batches(seed: int = 1, count: int = 8) -> list[tuple[Tensor]]:
    """Tokens of very different lengths, which an element-wise function cannot make equal."""
    random = torch.Generator().manual_seed(seed)
    lengths = (1.2 * torch.randn(count, 32, TOKENS, 1, generator=random)).exp()
    return [(part,) for part in lengths * torch.randn(count, 32, TOKENS, WIDTH, generator=random)]


def _dependent_batches() -> list[tuple[Tensor]]:
    """Channels that depend on each other, or no projection could make up for a diagonal fit."""
    mixing = torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(3)) ** 3
    return [(x @ mixing,) for (x,) in _batches()]


def _found(model: nn.Module, *args: Tensor) -> dict[str, Projection]:
    graph = capture(model.eval(), args)
    return {p.name: p for p in projections(graph, match(graph).sites)}


def test_refits_lower_the_error_of_the_output() -> None:
    model, batches = Net(post=True).eval(), _batches()
    errors = {}
    for fit in ("full", "auto"):
        result = dyt_compile.convert(model, batches, mode="all", fit=fit)
        assert result.report.error is not None
        errors[fit] = result.report.error
    assert errors["auto"] < 0.93 * errors["full"]


def test_a_converted_model_is_the_module_with_refits_put_in_by_hand() -> None:
    model, batches = Net(post=True).eval(), _batches()
    result = dyt_compile.convert(model, batches, mode="all")
    calibration = result.calibration
    assert calibration is not None
    assert calibration.refits
    by_hand = copy.deepcopy(model)
    for name, refit in calibration.refits.items():
        linear = by_hand.get_submodule(name.removesuffix(".weight"))
        assert isinstance(linear, nn.Linear)
        with torch.no_grad():
            linear.weight += torch.from_numpy(refit.mix.matrix.T)
            linear.bias += torch.from_numpy(refit.mix.offset)
    for name, fit in calibration.fits.items():
        parent, _, child = name.rpartition(".")
        setattr(by_hand.get_submodule(parent), child, _Fitted(fit.parameters))
    x = batches[0][0]
    with torch.no_grad():
        torch.testing.assert_close(result.model(x), by_hand(x), rtol=1e-4, atol=1e-4)


class _Fitted(nn.Module):
    def __init__(self, values: Any) -> None:
        super().__init__()
        self.values = values

    def forward(self, x: Tensor) -> Tensor:
        return torch.from_numpy(np.asarray(evaluate(self.values, x.numpy()), np.float32))


@pytest.fixture(scope="module")
def onnx_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("projections") / "model.onnx"
    torch.onnx.export(
        Net(post=True).eval(), _batches()[0], path, dynamo=True, verbose=False,
        dynamic_shapes=({0: torch.export.Dim.DYNAMIC},), external_data=False,
    )  # fmt: skip
    return path


def test_an_onnx_file_gets_the_refits_of_the_torch_model(onnx_file: Path) -> None:
    batches = _batches()
    ours = dyt_compile.convert(Net(post=True).eval(), batches, mode="all")
    theirs = dyt_compile.convert(onnx_file, [(x.numpy(),) for (x,) in batches], mode="all")
    assert ours.calibration is not None
    assert theirs.calibration is not None
    # The exporter transposes weights and names them anew; their order stays. Its products have no
    # bias, so what their errors are relative to is a little different.
    errors = [[(r.before, r.after) for r in c.refits.values()]
              for c in (ours.calibration, theirs.calibration)]  # fmt: skip
    assert errors[0]
    np.testing.assert_allclose(errors[0], errors[1], rtol=5e-2)
    assert theirs.report.error == pytest.approx(ours.report.error, rel=1e-2)
    # Each changed bias stays the one constant that it was: no node is added.
    assert len(theirs.model.graph) == len(theirs.original.model.graph)


def test_a_product_that_is_added_to_a_residual_knows_it_and_the_norm_behind() -> None:
    found = _found(Net(post=True), *_batches()[0])
    assert list(found) == [
        f"blocks.{n}.{layer}.weight" for n in (1, 2) for layer in ("first", "second")
    ]
    for name, projection in found.items():
        assert len(projection.residuals) == ("second" in name)
    sites = {name: p.site.name for name, p in found.items() if p.site is not None}
    assert sites == {f"blocks.{n}.second.weight": f"blocks.{n}.norm" for n in (1, 2)}


def test_pre_norm_models_keep_their_writers() -> None:
    assert not _found(Net(post=False), *_batches()[0])


def test_a_sum_that_is_an_output_too_is_no_norms_own() -> None:
    class Open(Net):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
            x = self.blocks[0](x)
            block = self.blocks[1]
            total = x + block.second(F.gelu(block.first(x)))
            return self.head(block.norm(total)), total

    found = _found(Open(post=True), *_batches()[0])
    assert list(found) == ["blocks.1.first.weight"]


def test_a_sum_that_two_norms_read_is_no_norms_own() -> None:
    class Parallel(Net):
        def forward(self, x: Tensor) -> Tensor:
            x = self.blocks[0](x)
            block, other = self.blocks[1], self.blocks[2]
            total = x + block.second(F.gelu(block.first(x)))
            y: Tensor = self.head(block.norm(total) * other.norm(total))
            return y

    found = _found(Parallel(post=True), *_batches()[0])
    assert list(found) == ["blocks.1.first.weight"]


def test_projections_not_at_a_converted_site_are_left() -> None:
    graph = capture(Net(post=True).eval(), _batches()[0])
    last = match(graph).sites[-1]
    assert not projections(graph, [last]), "its one reader takes up a matrix"
    first = match(graph).sites[0]
    assert [p.name for p in projections(graph, [first])] == ["blocks.1.first.weight"]


def test_a_shared_or_tied_weight_is_left() -> None:
    class Tied(Net):
        def forward(self, x: Tensor) -> Tensor:
            first, last = self.blocks[0], self.blocks[1]
            y = first(x)
            hidden = F.gelu(F.linear(y, first.first.weight)) + last.first(y)
            z: Tensor = last.norm(y + last.second(hidden))
            return z * last.second.weight.mean()

    assert list(_found(Tied(post=True), *_batches()[0])) == ["blocks.1.first.weight"]


def test_masked_rows_have_no_part_in_a_refit_behind_views() -> None:
    class Masked(TimeFirst):
        def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:  # type: ignore[override]
            return super().forward(x) * attention_mask.unsqueeze(-1)

    found = []
    for padding in (0.0, 100.0):
        batches = []
        for (x,) in _dependent_batches():
            mask = torch.ones(x.shape[:2], dtype=torch.int64)
            mask[::2, 4:] = 0
            batches.append((x + padding * (1 - mask).unsqueeze(-1), mask))
        result = dyt_compile.convert(Masked().eval(), batches, mode="all")
        assert result.calibration is not None
        found.append(result.calibration.refits["outer.weight"].mix.matrix)
    np.testing.assert_allclose(found[0], found[1], atol=1e-5)


class Encoder(nn.Module):
    """Its attention flattens samples and tokens, and asks the input for their lengths."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(WIDTH, 2, 2 * WIDTH, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.layers(x).mean(dim=1))
        return y


def test_torchs_own_encoder_is_refitted_through_its_views() -> None:
    model, batches = Encoder().eval(), _dependent_batches()
    full = dyt_compile.convert(model, batches, mode="all", fit="full").report.error
    auto = dyt_compile.convert(model, batches, mode="all").report
    assert auto.refits
    assert auto.error < full  # type: ignore[operator]
    writer = _found(model, *batches[0])["layers.layers.1.self_attn.out_proj.weight"]
    assert writer.site is not None
    assert writer.lengths, "its view asks the input for the number of samples"


def test_a_target_is_led_back_through_views() -> None:
    model = TimeFirst()
    projection = _found(model, *_batches()[0])["outer.weight"]
    assert len(projection.moves) == 2
    output = np.zeros((TOKENS * 4, WIDTH), np.float32)
    difference = np.random.default_rng(0).normal(size=(4, TOKENS, WIDTH)).astype(np.float32)
    moved = projection.target(output, [difference])
    np.testing.assert_array_equal(moved.reshape(TOKENS, 4, WIDTH).transpose(1, 0, 2), difference)


def test_views_on_the_way_to_a_residual_do_not_spoil_a_refit() -> None:
    model, batches = TimeFirst().eval(), _batches()
    errors = [
        dyt_compile.convert(model, batches, mode="all", fit=fit).report.error
        for fit in ("full", "auto")
    ]
    assert errors[1] < 0.99 * errors[0]  # type: ignore[operator]


def test_a_change_of_a_product_without_a_bias_goes_to_the_one_behind_it(onnx_file: Path) -> None:
    graph = capture(onnx_file)
    *_, head = projections(graph, match(graph).sites)
    refit = Mix(np.ones((WIDTH, 5), np.float32), np.ones(5, np.float32))
    places = {(change.term.op.name, change.place) for change in changes_of(head, refit)}
    assert places <= {("MATMUL", 1), ("MATMUL", 2), ("ADD", 0), ("ADD", 1)}
    assert len(places) == 2


def test_sums_give_their_squared_error() -> None:
    rng = np.random.default_rng(0)
    x, y = (rng.normal(3.0, 1.0, size=(500, n)).astype(np.float32) for n in (7, 4))
    mix = Mix(*(rng.normal(size=size).astype(np.float32) for size in ((7, 4), (4,))))
    sums = _Sums(x[:10].mean(axis=0), y[:10].mean(axis=0), None)
    sums.add(x, y)
    expected = np.square(mix(x).astype(np.float64) - y).sum()
    assert sums.squared_error(mix) == pytest.approx(expected, rel=1e-5)
    assert sums.total == pytest.approx(np.square(y.astype(np.float64)).sum(), rel=1e-6)


def test_sums_find_a_missing_map_and_say_what_it_was_worth() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(4000, 7)).astype(np.float32)
    missing = x @ rng.normal(size=(7, 4)).astype(np.float32) + 2.0
    sums = RefitSums()
    for start in range(0, 4000, 333):
        sums.add(*(a[start : start + 333] for a in (x, missing, missing)))
    refit = sums.solve()
    assert refit is not None
    assert refit.before == pytest.approx(1.0)
    assert refit.after < 0.02
    np.testing.assert_allclose(refit.mix(x), missing, atol=0.2)


def test_sums_find_nothing_in_noise() -> None:
    rng = np.random.default_rng(0)
    sums = RefitSums()
    sums.add(*(rng.normal(size=(60, n)).astype(np.float32) for n in (40, 4, 4)))
    assert sums.solve() is None


def test_sums_of_the_same_rows_share_their_products() -> None:
    rng = np.random.default_rng(0)
    x, a, b = (rng.normal(size=(400, n)).astype(np.float32) for n in (5, 3, 3))
    a, b = a + x[:, :3], b - x[:, :3]
    first, alone = RefitSums(), RefitSums()
    first.add(x, a, a)
    again = RefitSums(first)
    for sums in (again, alone):
        sums.add(x, b, b)
    found, expected = again.solve(), alone.solve()
    assert found is not None
    assert expected is not None
    np.testing.assert_array_equal(found.mix.matrix, expected.mix.matrix)


def test_inverse_is_what_gives_y_where_tanh_can() -> None:
    gamma, beta = np.array([2.0, -0.5], np.float32), np.array([0.3, 0.0], np.float32)
    parameters = DytParameters(np.array([0.8], np.float32), gamma, beta)
    y = evaluate(parameters, np.linspace(-2, 2, 20, dtype=np.float32).reshape(10, 2))
    found = inverse(parameters, np.zeros_like(y), y)
    np.testing.assert_allclose(evaluate(parameters, found), y, atol=1e-5)


def test_inverse_leaves_what_is_far_enough_and_stops_at_saturation() -> None:
    parameters = DytParameters(np.array([1.0], np.float32), np.ones(1, np.float32))
    x = np.array([[9.0], [0.0], [-9.0]], np.float32)
    found = inverse(parameters, x, np.full((3, 1), 5.0, np.float32))
    bound = np.arctanh(np.float32(0.98))
    np.testing.assert_allclose(found, [[9.0], [bound], [bound]], rtol=1e-5)


def test_refits_survive_a_file(tmp_path: Path) -> None:
    result = dyt_compile.convert(Net(post=True).eval(), _batches(), mode="all")
    assert result.calibration is not None
    result.calibration.save(tmp_path / "fits.safetensors")
    loaded = Calibration.load(tmp_path / "fits.safetensors")
    assert set(loaded.refits) == set(result.calibration.refits)
    for name, refit in loaded.refits.items():
        saved = result.calibration.refits[name]
        np.testing.assert_array_equal(refit.mix.matrix, saved.mix.matrix)
        np.testing.assert_array_equal(refit.mix.offset, saved.mix.offset)
        assert (refit.before, refit.after) == (saved.before, saved.after)


def test_a_report_names_what_was_refitted() -> None:
    result = dyt_compile.convert(Net(post=True).eval(), _batches(), mode="all")
    assert result.calibration is not None
    told = {refit.name: (refit.before, refit.after) for refit in result.report.refits}
    kept = {name: (r.before, r.after) for name, r in result.calibration.refits.items()}
    assert told == kept
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(report_table(result.report))
    assert "blocks.{1..2}.second.weight ×2" in console.export_text()


def test_a_calibration_of_the_torch_model_refits_its_onnx_file(onnx_file: Path) -> None:
    batches = _batches()
    ours = dyt_compile.convert(Net(post=True).eval(), batches, mode="all")
    theirs = dyt_compile.convert(onnx_file, calibration=ours.calibration)
    assert len(theirs.report.refits) == len(ours.report.refits) > 0
    arrays = [(x.numpy(),) for (x,) in batches]
    assert dyt_compile.compiler.compare(ours.model, theirs.model, arrays).error < 1e-4


def test_a_calibration_with_refits_leaves_no_site_out() -> None:
    ours = dyt_compile.convert(Net(post=True).eval(), _batches(), mode="all")
    with pytest.raises(CalibrationError, match="exclude leaves sites out"):
        dyt_compile.convert(
            Net(post=True).eval(), calibration=ours.calibration, example=_batches()[0], exclude="2"
        )


def test_torch_compile_refuses_refits() -> None:
    model, batches = Net(post=True).eval(), _batches()
    calibration = dyt_compile.convert(model, batches, mode="all").calibration
    compiled = torch.compile(model, backend="dyt", options={"calibration": calibration})
    with pytest.raises(Exception, match="fit='diagonal'"):
        compiled(batches[0][0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_models_are_refitted_in_their_own_dtype(dtype: torch.dtype) -> None:
    model = Net(post=True).eval().to(dtype)
    batches = [(x.to(dtype),) for (x,) in _batches()]
    full = dyt_compile.convert(model, batches, mode="all", fit="full")
    auto = dyt_compile.convert(model, batches, mode="all")
    assert {p.dtype for p in auto.model.parameters()} <= {dtype, torch.float32}
    assert auto.report.error < 0.93 * full.report.error  # type: ignore[operator]
