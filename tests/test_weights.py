"""Models whose weights stay in their files: the same fits as with all of them in memory."""

from __future__ import annotations

import gc
import json
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import dyt_compile
from dyt_compile import Calibration
from dyt_compile.errors import CaptureError, OptionError
from dyt_compile.graphs import fx_weights
from dyt_compile.huggingface import load_folder, open_folder
from dyt_compile.weights import Weights, open_weights

pytestmark = pytest.mark.core

WIDTH, WORDS = 16, 50


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(WIDTH)
        self.up = nn.Linear(WIDTH, 4 * WIDTH)
        self.down = nn.Linear(4 * WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = x + self.down(self.up(self.norm(x)).relu())
        return found


class Words(nn.Module):
    """Tied ends, a buffer in the file, and one that is computed."""

    steps: Tensor

    def __init__(self, device: str = "cpu") -> None:
        super().__init__()
        with torch.device(device):
            self.embed = nn.Embedding(WORDS, WIDTH)
            self.blocks = nn.ModuleList(Block() for _ in range(3))
            self.norm = nn.LayerNorm(WIDTH)
            self.head = nn.Linear(WIDTH, WORDS, bias=False)
            self.head.weight = self.embed.weight
            self.register_buffer("shift", torch.full((WIDTH,), 0.5))
        self.register_buffer("steps", torch.linspace(0, 1, WIDTH), persistent=False)

    def forward(self, words: Tensor) -> Tensor:
        x = self.embed(words) + self.steps + self.shift
        for block in self.blocks:
            x = block(x)
        found: Tensor = self.head(self.norm(x))
        return found


@pytest.fixture(autouse=True)
def _no_tensor_is_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fx_weights, "SMALL_BYTES", 100)


@pytest.fixture(scope="module")
def model() -> Words:
    torch.manual_seed(0)
    return Words().eval()


@pytest.fixture(scope="module")
def batches() -> list[tuple[Tensor]]:
    torch.manual_seed(1)
    return [(torch.randint(0, WORDS, (8, 5)),) for _ in range(4)]


@pytest.fixture
def index(model: Words, tmp_path: Path) -> Path:
    """The model in two shards, the tied weight under one of its names."""
    state = {name: t.clone() for name, t in model.state_dict().items() if name != "head.weight"}
    names = sorted(state)
    shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for shard, own in shards.items():
        save_file({name: state[name] for name in own}, tmp_path / shard)
    placed = {name: shard for shard, own in shards.items() for name in own}
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": placed}))
    return path


def same(a: Calibration, b: Calibration) -> bool:
    """Whether all values are, bit by bit."""
    if a.fits.keys() != b.fits.keys() or a.fingerprint != b.fingerprint:
        return False
    pairs = [(fit.arrays(), b.fits[name].arrays()) for name, fit in a.fits.items()]
    return all(
        x.keys() == y.keys() and all(np.array_equal(x[name], y[name]) for name in x)
        for x, y in pairs
    )


def test_state_gives_the_fits_of_the_model_in_memory(
    model: Words, batches: list[Any], index: Path
) -> None:
    whole = dyt_compile.calibrate(model, batches, fit="full")
    empty = Words("meta")
    assert same(whole, dyt_compile.calibrate(empty, batches, fit="full", state=index))
    assert empty.embed.weight.is_meta  # it stays as it was
    assert empty.head.weight is empty.embed.weight
    assert not same(whole, dyt_compile.calibrate(model, batches[:2], fit="full"))


def test_state_in_one_file_or_folder_is_the_same(
    model: Words, batches: list[Any], tmp_path: Path
) -> None:
    save_file({n: t.clone() for n, t in model.state_dict().items()}, tmp_path / "model.safetensors")
    made = [
        dyt_compile.calibrate(Words("meta"), batches, state=state)
        for state in (tmp_path / "model.safetensors", tmp_path)
    ]
    assert same(dyt_compile.calibrate(model, batches), made[0])
    assert same(*made)


def test_weights_are_read_once_a_stage_and_released(
    batches: list[Any], index: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held: list[weakref.ref[Tensor]] = []
    names: list[str] = []
    most = 0
    read = Weights.read

    def counted(weights: Weights, name: str) -> Tensor:
        nonlocal most
        tensor = read(weights, name)
        held.append(weakref.ref(tensor))
        names.append(name)
        gc.collect()
        most = max(most, sum(t.nbytes for ref in held if (t := ref()) is not None))
        return tensor

    monkeypatch.setattr(Weights, "read", counted)
    dyt_compile.calibrate(Words("meta"), batches, state=index, fit="diagonal")
    gc.collect()
    assert not [ref for ref in held if ref() is not None]
    assert sorted(name for name in names if "down" in name) == [
        f"blocks.{block}.down.weight" for block in range(3)
    ]
    assert "embed.weight" not in names  # its rows are looked up
    assert most <= 4 * WIDTH * (8 * WIDTH + 4 * WIDTH + 2 * WIDTH)  # one block of three


def test_hugging_face_folder_is_read_block_by_block(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, vocab_size=WORDS, tie_word_embeddings=True,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path, max_shard_size="4KB")
    words = [{"input_ids": torch.randint(0, WORDS, (4, 6))} for _ in range(3)]
    opened, weights = open_folder(tmp_path)
    assert weights is not None
    assert all(parameter.is_meta for parameter in opened.parameters())
    assert set(weights.places) == set(opened.state_dict())
    whole = dyt_compile.calibrate(load_folder(tmp_path), words)
    assert same(whole, dyt_compile.calibrate(tmp_path, words))


def test_folder_whose_class_merges_weights_is_loaded_whole(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.MixtralConfig(
        hidden_size=16, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, vocab_size=WORDS, num_local_experts=2,
    )  # fmt: skip
    transformers.MixtralForCausalLM(config).save_pretrained(tmp_path)
    opened, weights = open_folder(tmp_path)
    assert weights is None
    assert not any(parameter.is_meta for parameter in opened.parameters())


def test_state_is_refused_where_it_does_not_fit(
    model: Words, batches: list[Any], index: Path, tmp_path: Path
) -> None:
    def refused(error: type[Exception], told: str, **options: Any) -> None:
        given = {"model": Words("meta"), "state": index} | options
        with pytest.raises(error, match=told):
            dyt_compile.calibrate(given["model"], batches, state=given["state"])

    refused(OptionError, "built on the meta device", model=model)
    refused(OptionError, "allowed: a .safetensors file", state=tmp_path / "absent")
    refused(CaptureError, "calibrate reads them from state", state=None)
    lost = Words("meta")
    lost.register_buffer("steps", lost.steps.to("meta"), persistent=False)
    refused(CaptureError, "'steps' is on the meta device, and none of the files", model=lost)
    wide = Words("meta")
    wide.blocks[1].down = nn.Linear(4 * WIDTH, WIDTH, bias=False, device="meta")
    wide.blocks[1].up = nn.Linear(WIDTH, 4 * WIDTH, device="meta")
    wide.embed = nn.Embedding(WORDS + 1, WIDTH, device="meta")
    refused(CaptureError, r"'embed.weight' has shape \[50, 16\] in its file", model=wide)


@pytest.mark.parametrize("shard", ["../a.safetensors", "/etc/passwd", "sub/a.safetensors"])
def test_shards_outside_the_folder_are_refused(tmp_path: Path, shard: str) -> None:
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": {"weight": shard}}))
    with pytest.raises(CaptureError, match="allowed: names of files beside it"):
        open_weights(path)


@pytest.mark.parametrize("text", ["", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 1}}'])
def test_damaged_index_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(text)
    with pytest.raises(CaptureError, match="holds no weights"):
        open_weights(path)


def test_index_that_tells_of_what_a_shard_lacks_is_refused(index: Path) -> None:
    told = json.loads(index.read_text())["weight_map"]
    other = {"a.safetensors": "b.safetensors", "b.safetensors": "a.safetensors"}
    told["embed.weight"] = other[told["embed.weight"]]
    index.write_text(json.dumps({"weight_map": told}))
    with pytest.raises(CaptureError, match=r"'embed.weight' in '.\.safetensors', which lacks it"):
        open_weights(index)


@pytest.mark.parametrize(
    "head",
    [
        "[]", "{", '{"a": 1}', '{"a": {"dtype": "F32", "shape": [1]}}',
        '{"a": {"dtype": "F31", "shape": [1], "data_offsets": [0, 4]}}',
        '{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}',
        '{"a": {"dtype": "F32", "shape": [-1, -1], "data_offsets": [0, 4]}}',
        '{"a": {"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]}}',
        '{"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}',
        '{"a": {"dtype": "F32", "shape": "1", "data_offsets": [0, 4]}}',
        '{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4], "path": "x"}}',
    ],
)  # fmt: skip
def test_damaged_head_is_refused(tmp_path: Path, head: str) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(head).to_bytes(8, "little") + head.encode() + bytes(4))
    with pytest.raises(CaptureError, match="holds no weights"):
        open_weights(path)


@pytest.mark.parametrize("data", [b"", b"1234567", b"\xff" * 20, (50).to_bytes(8, "little")])
def test_file_without_a_head_is_refused(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(data)
    with pytest.raises(CaptureError, match="holds no weights"):
        open_weights(path)


@pytest.mark.parametrize("dtype", ["float64", "float16", "bfloat16", "int64", "uint8", "bool"])
def test_tensors_are_those_of_safetensors(tmp_path: Path, dtype: str) -> None:
    made = {
        name: torch.randn(shape).mul(9).to(getattr(torch, dtype))
        for name, shape in {"one": (), "none": (0, 3), "many": (7, 5), "odd": (3,)}.items()
    }
    save_file(made, tmp_path / "model.safetensors")
    weights = open_weights(tmp_path)
    for name, tensor in made.items():
        found = weights.read(name)
        assert (found.dtype, found.shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(found, tensor)
    places = torch.tensor([[6, 0], [6, 2]])
    assert torch.equal(weights.rows("many", places), made["many"][places])
    for place in (7, -1):
        with pytest.raises(IndexError):
            weights.rows("many", torch.tensor([place]))


def test_cut_off_file_is_refused(model: Words, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({n: t.clone() for n, t in model.state_dict().items()}, path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CaptureError, match="holds no weights"):
        open_weights(path)


def test_inspect_of_a_folder_reads_no_large_weight(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        vocab_size=WORDS, max_position_embeddings=16,
    )  # fmt: skip
    transformers.BertModel(config).save_pretrained(tmp_path)
    monkeypatch.setattr(Weights, "read", lambda weights, name: pytest.fail(name))
    monkeypatch.setattr(fx_weights, "SMALL_BYTES", 0)
    assert len(dyt_compile.inspect(tmp_path).sites) == 3
