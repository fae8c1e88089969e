"""Dynamic Tanh as a module, and models in which it stands where norms stood."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._inductor.utils import run_and_get_code

import dyt_compile
from dyt_compile.dyt import LLAMA_ALPHAS, initial_alpha
from dyt_compile.errors import OptionError
from dyt_compile.nn import SQUASHES, DynamicTanh
from dyt_compile.training import ScaledEmbedding, convert_for_training

pytestmark = pytest.mark.core

WIDTH = 6


def _filled(module: DynamicTanh) -> DynamicTanh:
    """The module with parameters that are neither 0 nor 1."""
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(0.5 + torch.rand(parameter.shape, generator=random))
    return module


def _x(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=dtype)


@pytest.mark.parametrize("squash", SQUASHES)
@pytest.mark.parametrize("alpha", [0.5, None])
@pytest.mark.parametrize(("affine", "bias"), [(True, True), (True, False), (False, False)])
@pytest.mark.parametrize("spatial_axes", [0, 2])
def test_gradients_are_those_of_the_function(
    squash: str, alpha: float | None, affine: bool, bias: bool, spatial_axes: int
) -> None:
    module = _filled(DynamicTanh(WIDTH, alpha, squash=squash, affine=affine, bias=bias,
                                 spatial_axes=spatial_axes, dtype=torch.float64))  # fmt: skip
    shape = (2, WIDTH, 2, 3) if spatial_axes else (3, WIDTH)
    x = _x(*shape).requires_grad_()
    names = [name for name, _ in module.named_parameters()]
    assert ("alpha" in names, "shift" in names) == (alpha is not None, squash == "erf")
    assert ("gamma" in names, "beta" in names) == (affine, bias)

    def run(x: Tensor, *values: Tensor) -> Tensor:
        given = dict(zip(names, values, strict=True))
        y: Tensor = torch.func.functional_call(module, given, (x,))
        return y

    assert torch.autograd.gradcheck(run, (x, *module.parameters()))


@pytest.mark.parametrize("squash", SQUASHES)
def test_module_computes_its_formula(squash: str) -> None:
    module = _filled(DynamicTanh(WIDTH, squash=squash, dtype=torch.float64))
    x = _x(4, WIDTH)
    shift = 0.0 if module.shift is None else module.shift
    expected = module.gamma * SQUASHES[squash](module.alpha * x + shift) + module.beta
    torch.testing.assert_close(module(x), expected, rtol=1e-12, atol=1e-12)


def test_module_starts_as_the_paper_does() -> None:
    module = DynamicTanh(WIDTH)
    torch.testing.assert_close(module(_x(4, WIDTH)), torch.tanh(0.5 * _x(4, WIDTH)))
    assert module.alpha.shape == (1,)
    images = DynamicTanh(WIDTH, spatial_axes=2)
    assert images.gamma.shape == (WIDTH, 1, 1)
    assert images(_x(2, WIDTH, 3, 3)).shape == (2, WIDTH, 3, 3)


def test_narrow_module_computes_in_float32() -> None:
    module = _filled(DynamicTanh(WIDTH, dtype=torch.bfloat16))
    assert (module.alpha.dtype, module.gamma.dtype) == (torch.float32, torch.bfloat16)
    x = _x(64, WIDTH, dtype=torch.bfloat16)
    expected = module.gamma.float() * torch.tanh(module.alpha * x.float()) + module.beta.float()
    assert torch.equal(module(x), expected.to(torch.bfloat16))


@pytest.mark.parametrize("squash", ["tanh", "erf"])
@pytest.mark.parametrize(("affine", "bias"), [(True, True), (False, False)])
def test_compiled_module_is_one_kernel_without_calls_and_trains(
    squash: str, affine: bool, bias: bool
) -> None:
    module = _filled(DynamicTanh(16, squash=squash, affine=affine, bias=bias))
    x = _x(24, 16, dtype=torch.float32)
    torch.compiler.reset()
    with torch._inductor.config.patch(force_disable_caches=True):
        _, codes = run_and_get_code(torch.compile(module, fullgraph=True), x)
        compiled = torch.compile(copy.deepcopy(module), fullgraph=True)
        (compiled(x) ** 2).sum().backward()
    whole = squash == "tanh" or affine  # else there is no operator of ours that fits
    assert (f"{squash}(" not in "".join(codes)) == whole
    (module(x) ** 2).sum().backward()
    for ours, exact in zip(compiled.parameters(), module.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, exact.grad, rtol=1e-5, atol=1e-5)


def test_exported_module_holds_operators_of_torch_alone() -> None:
    module = _filled(DynamicTanh(WIDTH))
    x = _x(4, WIDTH, dtype=torch.float32)
    for strict in (True, False):
        code = torch.export.export(module, (x,), strict=strict).graph_module.code
        assert "tanh" in code
        assert "ops.dyt" not in code
    assert "dyt::" not in str(torch.jit.trace(module, (x,)).graph)
    assert list(module.state_dict()) == ["alpha", "gamma", "beta"]
    torch.testing.assert_close(pickle.loads(pickle.dumps(module))(x), module(x))


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"squash": "relu"}, "squash is 'relu'; allowed: tanh, erf"),
        ({"alpha": 0.0}, "alpha is 0.0; allowed"),
        ({"width": 0}, "width is 0; allowed"),
    ],
)
def test_module_names_what_is_not_allowed(options: dict[str, object], told: str) -> None:
    with pytest.raises(OptionError, match=told):
        DynamicTanh(**{"width": WIDTH, **options})  # type: ignore[arg-type]


@pytest.mark.parametrize("squash", ["tanh", "erf"])
@pytest.mark.parametrize(("affine", "bias"), [(True, True), (True, False), (False, False)])
def test_trained_module_is_recognised_and_kept_exactly(
    squash: str, affine: bool, bias: bool
) -> None:
    model = nn.Sequential(
        nn.Linear(WIDTH, WIDTH),
        _filled(DynamicTanh(WIDTH, squash=squash, affine=affine, bias=bias)),
        nn.Linear(WIDTH, WIDTH),
    )
    x = _x(5, WIDTH, dtype=torch.float32)
    result = dyt_compile.convert(model, example=(x,), mode="exact")
    (site,) = result.report.sites
    assert (site.name, site.kind) == ("1", "dyt" if squash == "tanh" else "derf")
    with torch.no_grad():
        torch.testing.assert_close(result.model(x), model(x), rtol=1e-6, atol=1e-6)


def test_alpha_is_that_of_the_tables() -> None:
    for width, (attention, other) in LLAMA_ALPHAS.items():
        assert initial_alpha(width, attention=True, llama=True) == attention
        assert initial_alpha(width, llama=True) == other
        assert initial_alpha(width) == 0.5
    assert initial_alpha(64) == initial_alpha(64, llama=True) == 1.0
    assert initial_alpha(16384, attention=True, llama=True) == pytest.approx(0.2)
    assert 0.2 < initial_alpha(3072, llama=True) < 0.5


class Gain(nn.Module):
    """An RMSNorm as Gemma has it: 1 + weight, in float32; the name is its only hint."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)
        return (normed * (1 + self.weight.float())).to(x.dtype)


class GainRMSNorm(Gain):
    pass


class NormOfImages(nn.Module):
    """A LayerNorm over axis 1."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        y = F.layer_norm(x.permute(0, 2, 3, 1), self.weight.shape, self.weight, self.bias)
        return y.permute(0, 3, 1, 2)


class NormalizedByLength(nn.Module):
    """No norm of ours: divides by the largest value."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return x / x.abs().amax(-1, keepdim=True) * self.weight


def _replaced(norm: nn.Module) -> nn.Module:
    changed = convert_for_training(nn.Sequential(norm, nn.LayerNorm(3)))
    return changed.get_submodule("0")


@pytest.mark.parametrize(
    ("make", "bias", "spatial_axes"),
    [
        (nn.LayerNorm, True, 0),
        (lambda width: nn.LayerNorm(width, bias=False), False, 0),
        (nn.RMSNorm, False, 0),
        (GainRMSNorm, False, 0),
        (NormOfImages, True, 2),
    ],
)
def test_norm_is_replaced_with_the_parameters_that_it_had(
    make: Callable[[int], nn.Module], bias: bool, spatial_axes: int
) -> None:
    found = _replaced(make(WIDTH))
    assert isinstance(found, DynamicTanh)
    assert found.gamma.shape == (WIDTH, *[1] * spatial_axes)
    assert (found.beta is not None) == bias
    assert torch.equal(found.gamma, torch.ones_like(found.gamma))


def test_norm_without_parameters_is_replaced_by_a_bare_one() -> None:
    found = _replaced(nn.LayerNorm(WIDTH, elementwise_affine=False))
    assert isinstance(found, DynamicTanh)
    assert (found.gamma, found.beta) == (None, None)


@pytest.mark.parametrize(
    "norm",
    [
        nn.BatchNorm1d(WIDTH), nn.BatchNorm2d(WIDTH), nn.GroupNorm(2, WIDTH),
        nn.GroupNorm(1, WIDTH), nn.InstanceNorm2d(WIDTH, affine=True), Gain(WIDTH),
        NormalizedByLength(WIDTH), nn.LayerNorm((3, WIDTH)),
    ],
)  # fmt: skip
def test_other_modules_stay(norm: nn.Module) -> None:
    assert type(_replaced(norm)) is type(norm)


def test_llama_starts_as_in_the_paper() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=40, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    changed = convert_for_training(model)
    kinds = [type(module).__name__ for module in changed.modules()]
    assert kinds.count("DynamicTanh") == 5
    assert not any("RMSNorm" in kind for kind in kinds)
    embedding = changed.get_input_embeddings()
    assert isinstance(embedding, ScaledEmbedding)
    assert embedding.scale.item() == 8.0
    assert changed.lm_head.weight is embedding.weight
    assert changed.model.norm.beta is None
    tokens = torch.arange(12).reshape(2, 6)
    loss = changed(tokens, labels=tokens).loss
    loss.backward()
    assert all(p.grad is not None for p in changed.parameters())
    assert any("RMSNorm" in type(module).__name__ for module in model.modules())


def test_attention_norms_of_llama_get_an_alpha_of_their_own() -> None:
    with torch.device("meta"):
        block = nn.ModuleDict({
            "input_layernorm": nn.RMSNorm(4096), "post_attention_layernorm": nn.RMSNorm(4096)
        })  # fmt: skip
        model = nn.ModuleDict({"embed_tokens": nn.Embedding(8, 4096), "block": block})
    changed = convert_for_training(model)
    assert changed.get_submodule("block.input_layernorm").alpha.is_meta
    real = convert_for_training(model.to_empty(device="cpu"))
    alphas = {name: p.item() for name, p in real.named_parameters() if name.endswith("alpha")}
    assert alphas == pytest.approx(
        {"block.input_layernorm.alpha": 0.8, "block.post_attention_layernorm.alpha": 0.2}
    )


def test_alpha_that_is_given_holds_everywhere_and_shared_norms_stay_shared() -> None:
    norm = nn.LayerNorm(WIDTH)
    changed = convert_for_training(nn.Sequential(norm, nn.Linear(WIDTH, WIDTH), norm), alpha=0.7)
    assert changed.get_submodule("0") is changed.get_submodule("2")
    assert changed.get_parameter("0.alpha").item() == pytest.approx(0.7)


@pytest.mark.parametrize("alpha", [0, -1.0, "large"])
def test_alpha_that_is_not_allowed_is_refused(alpha: float | str) -> None:
    with pytest.raises(OptionError, match="allowed: 'auto', or a number above 0"):
        convert_for_training(nn.Sequential(nn.LayerNorm(3)), alpha)


def test_model_without_norms_is_refused() -> None:
    with pytest.raises(OptionError, match="nothing to replace"):
        convert_for_training(nn.Sequential(nn.Linear(3, 3)))


def test_converted_model_learns() -> None:
    torch.manual_seed(0)
    model = convert_for_training(
        nn.Sequential(nn.Linear(8, 32), nn.LayerNorm(32), nn.Linear(32, 3))
    )
    x = torch.randn(128, 8)
    labels = x[:, :3].argmax(1)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(150):
        loss = F.cross_entropy(model(x), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.15
    assert model.get_parameter("1.alpha").item() != 1.0
