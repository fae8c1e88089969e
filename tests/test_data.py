"""Data: how batches become the three parts, and what is refused."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from dyt_compile.data import Part, Splits, attention_mask, load, pieces, split, whole
from dyt_compile.errors import DataError, DytCompileError
from dyt_compile.graphs.base import Graph
from dyt_compile.passes.capture import capture

pytestmark = pytest.mark.core

WIDTH = 3
PARTS = ("fit", "plan", "report")


class Shifted(nn.Module):
    """Two inputs with samples along axis 0, one without."""

    def forward(self, x: Tensor, attention_mask: Tensor, shift: Tensor) -> Tensor:
        return (x + shift) * attention_mask[..., None]


class Doubled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 2


def _onnx(batch: int | str) -> ir.Model:
    """y = x + x, with that first axis; no torch in it."""
    shape, kind = ir.Shape([batch, WIDTH]), ir.TensorType(ir.DataType.FLOAT)
    x = ir.Value(name="x", shape=shape, type=kind)
    node = ir.Node("", "Add", [x, x], num_outputs=1)
    y = node.outputs[0]
    y.name, y.shape, y.type = "y", shape, kind
    graph = ir.Graph([x], [y], nodes=[node], opset_imports={"": 20}, name="doubled")
    return ir.Model(graph, ir_version=10)


def _shifted_batch(start: int, size: int) -> dict[str, Tensor]:
    x = torch.arange(start, start + size, dtype=torch.float32)[:, None, None].expand(-1, 2, WIDTH)
    mask = torch.arange(start, start + size)[:, None].expand(-1, 2)
    return {"x": x, "attention_mask": mask, "shift": torch.tensor(0.5)}


def _batches(sizes: list[int]) -> list[tuple[np.ndarray[Any, Any]]]:
    """Batches of numbered samples."""
    numbers = np.arange(sum(sizes), dtype=np.float32)[:, None].repeat(WIDTH, axis=1)
    cuts = np.cumsum(sizes)[:-1]
    return [(part,) for part in np.split(numbers, cuts)]


def _numbers(part: Part, name: str = "x") -> list[int]:
    """The samples of a part, by number, in the order in which they come."""
    arrays = [np.asarray(batch[name]).reshape(len(batch[name]), -1)[:, 0] for batch in part]
    return [int(number) for number in np.concatenate(arrays)]


def _parts(splits: Splits) -> list[list[int]]:
    return [_numbers(getattr(splits, name)) for name in PARTS]


@pytest.fixture(scope="module")
def dynamic() -> Graph:
    return capture(_onnx("batch"))


@pytest.fixture(scope="module")
def static() -> Graph:
    return capture(_onnx(2))


@pytest.fixture(scope="module")
def shifted() -> Graph:
    return capture(Shifted(), kwargs=_shifted_batch(0, 4))


@settings(deadline=None, max_examples=80)
@given(sizes=st.lists(st.integers(1, 9), min_size=1, max_size=9), seed=st.integers(0, 99))
def test_split_is_disjoint_and_complete(sizes: list[int], seed: int) -> None:
    total = sum(sizes)
    graph = capture(_onnx("batch"))
    if total < 4:
        with pytest.raises(DataError, match=f"{total} samples; at least 4"):
            split(graph, _batches(sizes), seed)
        return
    splits = split(graph, _batches(sizes), seed)
    parts = _parts(splits)
    assert sorted(parts[0] + parts[1] + parts[2]) == list(range(total))
    for own, share in zip(parts, (0.5, 0.25, 0.25), strict=True):
        assert own  # no part is ever empty
        assert abs(len(own) - share * total) <= 1
        assert own == sorted(own)  # the order of the data
    for name, own in zip(PARTS, parts, strict=True):
        part = getattr(splits, name)
        assert part.samples == len(own)
        assert part.batches == len(list(part))
        assert _numbers(part) == own  # again


@settings(deadline=None, max_examples=40)
@given(sizes=st.lists(st.integers(1, 7), min_size=2, max_size=8).filter(lambda s: sum(s) >= 4))
def test_split_takes_the_same_samples_whatever_their_batches(sizes: list[int]) -> None:
    """Holds where axis 0 is dynamic: a sample's part depends on its place in the stream alone."""
    graph = capture(_onnx("batch"))
    assert _parts(split(graph, _batches(sizes), 5)) == _parts(
        split(graph, _batches([sum(sizes)]), 5)
    )


def test_split_depends_on_the_seed_alone(dynamic: Graph) -> None:
    first, again, other = (_parts(split(dynamic, _batches([8] * 4), s)) for s in (3, 3, 4))
    assert first == again
    assert first != other


def test_split_mixes_early_and_late_samples(dynamic: Graph) -> None:
    for own in _parts(split(dynamic, _batches([16] * 8), 0)):
        assert min(own) < 32
        assert max(own) >= 96


def test_split_of_a_static_model_takes_whole_batches(static: Graph) -> None:
    splits = split(static, _batches([2] * 8), 0)
    assert [getattr(splits, name).samples for name in PARTS] == [4, 2, 2]
    for name in PARTS:
        assert all(batch["x"].shape == (2, WIDTH) for batch in getattr(splits, name))
    assert sorted(chain(*_parts(splits))) == list(range(16))


def test_split_of_a_static_model_counts_batches(static: Graph) -> None:
    with pytest.raises(DataError, match="3 samples"):
        split(static, _batches([2] * 3), 0)


def test_split_keeps_the_inputs_of_a_sample_together(shifted: Graph) -> None:
    splits = split(shifted, [_shifted_batch(0, 5), _shifted_batch(5, 6)], 1)
    for name in PARTS:
        part = getattr(splits, name)
        assert _numbers(part, "x") == _numbers(part, "attention_mask")
        assert all(batch["shift"].shape == () for batch in part)


@pytest.mark.parametrize("kind", ["tuple", "list", "dict", "numpy", "arguments"])
def test_split_takes_batches_of_every_kind(shifted: Graph, kind: str) -> None:
    make: dict[str, Callable[[dict[str, Tensor]], Any]] = {
        "tuple": lambda b: tuple(b.values()),
        "list": lambda b: list(b.values()),
        "dict": lambda b: dict(reversed(b.items())),
        "numpy": lambda b: {name: value.numpy() for name, value in b.items()},
        "arguments": lambda b: ((b["x"],), {n: b[n] for n in ("attention_mask", "shift")}),
    }
    batches = [make[kind](_shifted_batch(start, 4)) for start in (0, 4)]
    splits = split(shifted, batches, 0)
    for name in PARTS:
        for batch in getattr(splits, name):
            assert list(batch) == ["x", "attention_mask", "shift"]
            assert all(isinstance(value, Tensor) for value in batch.values())
            torch.testing.assert_close(batch["x"][:, 0, 0].long(), batch["attention_mask"][:, 0])


def test_whole_takes_every_sample(dynamic: Graph) -> None:
    part = whole(dynamic, _batches([3, 1, 5]))
    assert (part.batches, part.samples) == (3, 9)
    assert _numbers(part) == list(range(9)) == _numbers(part)


def _generator() -> Iterator[tuple[np.ndarray[Any, Any]]]:
    yield from _batches([4, 4])


@pytest.mark.parametrize("make", [_generator, lambda: iter(_batches([4])), lambda: map(str, "ab")])
@pytest.mark.parametrize("take", ["split", "whole"])
def test_one_shot_iterators_are_refused(
    dynamic: Graph, make: Callable[[], Iterator[Any]], take: str
) -> None:
    with pytest.raises(DataError, match="one-shot iterator"):
        split(dynamic, make(), 0) if take == "split" else whole(dynamic, make())


def test_batches_may_be_an_object_that_starts_anew(dynamic: Graph) -> None:
    class Stream:
        def __iter__(self) -> Iterator[Any]:
            return iter(_batches([4, 4]))

    assert split(dynamic, Stream(), 0).fit.samples == 4


def test_no_batch_is_refused(dynamic: Graph) -> None:
    with pytest.raises(DataError, match="0 samples"):
        split(dynamic, [], 0)
    with pytest.raises(DataError, match="no batch"):
        whole(dynamic, [])


def test_batch_without_samples_is_refused_by_name(dynamic: Graph) -> None:
    with pytest.raises(DataError, match="no samples: 'x'"):
        split(dynamic, [*_batches([8]), (np.zeros((0, WIDTH), np.float32),)], 0)


X = np.zeros((4, 2, WIDTH), np.float32)
MASK = np.ones((4, 2), np.int64)
SHIFT = np.zeros((), np.float32)


@pytest.mark.parametrize(
    "batch",
    [
        (X,),
        (X, MASK, SHIFT, SHIFT),
        {"x": X},
        {"pixels": X, "mask": MASK, "shift": SHIFT, "more": SHIFT},
        (),
        {},
        X,
        "x",
        None,
        7,
    ],
    ids=["few", "many", "few-named", "many-named", "none", "empty", "array", "str", "None", "int"],
)
def test_batch_that_does_not_fit_is_refused_in_one_line(shifted: Graph, batch: Any) -> None:
    with pytest.raises(DataError) as caught:
        split(shifted, [_shifted_batch(0, 4), batch], 0)
    message = str(caught.value)
    assert message.startswith("a batch ")
    assert "\n" not in message
    if isinstance(batch, (tuple, dict)):
        assert "x, attention_mask, shift" in message  # what the model takes


def test_batch_with_wrong_names_is_refused_for_torch(shifted: Graph) -> None:
    with pytest.raises(DataError, match="attention_mask"):
        split(shifted, [{"shift": SHIFT, "mask": MASK, "pixels": X}] * 2, 0)


def test_batch_with_wrong_names_is_refused_for_onnx(dynamic: Graph) -> None:
    with pytest.raises(DataError, match="pixels; the model's inputs: x"):
        split(dynamic, [{"pixels": np.zeros((4, WIDTH), np.float32)}], 0)


def test_batches_that_are_no_iterable_are_refused(dynamic: Graph) -> None:
    with pytest.raises(DytCompileError):
        split(dynamic, 5, 0)  # type: ignore[arg-type]


def test_attention_mask_is_true_where_positions_count(shifted: Graph) -> None:
    mask = attention_mask({"attention_mask": torch.tensor([[1, 1, 0], [1, 0, 0]])}, shifted)
    assert mask is not None
    assert mask.dtype == np.bool_
    assert mask.tolist() == [[True, True, False], [True, False, False]]


@pytest.mark.parametrize("batch", [{}, {"attention_mask": torch.ones(2, 1, 3, 3)}])
def test_attention_mask_of_other_forms_is_none(shifted: Graph, batch: dict[str, Any]) -> None:
    assert attention_mask(batch, shifted) is None


def test_load_of_a_file_gives_batches_by_name(tmp_path: Path) -> None:
    x, y = np.arange(10), np.arange(20).reshape(10, 2)
    np.savez(tmp_path / "data.npz", x=x, y=y)
    batches = load(tmp_path / "data.npz", 4)
    for _ in range(2):
        found = list(batches)
        assert [len(batch["x"]) for batch in found] == [4, 4, 2]
        np.testing.assert_array_equal(np.concatenate([b["x"] for b in found]), x)
        np.testing.assert_array_equal(np.concatenate([b["y"] for b in found]), y)


def test_load_of_a_folder_gives_a_batch_a_file_in_order(tmp_path: Path) -> None:
    for number in (2, 0, 1):
        np.savez(tmp_path / f"{number}.npz", x=np.full((number + 1, 2), number))
    (tmp_path / "notes.txt").write_text("not data")
    batches = load(tmp_path, 64)
    for _ in range(2):
        assert [batch["x"].shape for batch in batches] == [(1, 2), (2, 2), (3, 2)]


def test_loaded_batches_can_be_split(tmp_path: Path, dynamic: Graph) -> None:
    np.savez(tmp_path / "data.npz", x=_batches([9])[0][0])
    parts = _parts(split(dynamic, load(tmp_path / "data.npz", 2), 0))
    assert sorted(chain(*parts)) == list(range(9))


def test_load_of_object_arrays_is_refused(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.write_text, (tmp_path / "trapped", "unpickled"))

    np.savez(tmp_path / "data.npz", x=np.array([Trap(), None], dtype=object))
    with pytest.raises(DataError, match="no archive of plain arrays"):
        list(load(tmp_path / "data.npz", 2))
    assert not (tmp_path / "trapped").exists()


def test_load_of_object_arrays_in_a_folder_is_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "data.npz", x=np.array([{}, None], dtype=object))
    with pytest.raises(DataError, match="no archive of plain arrays"):
        list(load(tmp_path, 2))


@pytest.mark.parametrize(
    "arrays",
    [
        {"x": np.zeros(4), "y": np.zeros(5)},
        {"x": np.zeros(4), "y": np.zeros(())},
        {"x": np.zeros((0, 2))},
        {"x": np.zeros(())},
    ],
    ids=["unequal", "scalar", "empty", "only-scalar"],
)
def test_load_of_unequal_or_empty_arrays_is_refused(
    tmp_path: Path, arrays: dict[str, np.ndarray[Any, Any]]
) -> None:
    np.savez(tmp_path / "data.npz", **arrays)
    with pytest.raises(DataError, match="same, non-zero number of samples; x:"):
        load(tmp_path / "data.npz", 2)


def test_load_of_unequal_arrays_in_a_folder_is_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "data.npz", x=np.zeros(4), y=np.zeros(5))
    with pytest.raises(DataError, match="same, non-zero number of samples"):
        list(load(tmp_path, 2))


def test_load_of_an_archive_without_arrays_is_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "data.npz")
    with pytest.raises(DataError, match="holds no array"):
        load(tmp_path / "data.npz", 2)


def test_load_of_an_empty_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"holds no \.npz file"):
        load(tmp_path, 2)


@pytest.mark.parametrize("content", [b"", b"garbage", b"PK\x03\x04 cut short"])
def test_load_of_a_damaged_file_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "data.npz").write_bytes(content)
    with pytest.raises(DataError, match="no archive of plain arrays"):
        load(tmp_path / "data.npz", 2)


def test_load_of_a_single_array_is_refused(tmp_path: Path) -> None:
    with (tmp_path / "data.npz").open("wb") as file:
        np.save(file, np.zeros(4))
    with pytest.raises(DataError, match="no archive of plain arrays"):
        load(tmp_path / "data.npz", 2)


@pytest.mark.parametrize("name", ["missing.npz", "data.csv"])
def test_load_of_no_npz_file_names_the_allowed(tmp_path: Path, name: str) -> None:
    (tmp_path / "data.csv").write_text("1,2")
    with pytest.raises(DataError, match=r"allowed: an \.npz file, a folder of \.npz files"):
        load(tmp_path / name, 2)


class Nested(nn.Module):
    def forward(self, pair: dict[str, Tensor], *, weight: Tensor) -> Tensor:
        return pair["left"] + weight * pair["right"]


def test_batch_of_a_nested_dict_is_bound_by_its_keys() -> None:
    left, right, weight = (torch.full((4, 2), float(n)) for n in range(3))
    graph = capture(Nested(), ({"left": left, "right": right},), {"weight": weight})
    batch = graph.bind({"weight": weight, "pair": {"right": right, "left": left}})
    assert {name: float(value[0, 0]) for name, value in batch.items()} == {
        "pair_left": 0, "pair_right": 1, "weight": 2
    }  # fmt: skip
    with pytest.raises(DataError, match="left, right"):
        graph.bind({"left": left, "right": right, "weights": weight})


def test_batch_by_place_is_bound_in_the_order_of_forward() -> None:
    example = _shifted_batch(0, 4)
    graph = capture(Shifted(), kwargs=dict(reversed(example.items())))
    batch = graph.bind(tuple(example.values()))
    assert all(batch[name] is value for name, value in example.items())


@pytest.mark.parametrize("change", ["reversed", "read-only"])
def test_arrays_that_torch_cannot_share_are_copied(change: str) -> None:
    array = np.arange(12, dtype=np.float32).reshape(4, 3)
    array = array[::-1] if change == "reversed" else np.broadcast_to(array[:1], (4, 3))
    batch = capture(Doubled(), (torch.zeros(4, 3),)).bind((array,))
    np.testing.assert_array_equal(batch["x"].numpy(), array)


def test_array_of_a_dtype_that_torch_does_not_have_is_refused(shifted: Graph) -> None:
    with pytest.raises(DataError, match="dtype object"):
        shifted.bind((np.array([None]), MASK, SHIFT))


@pytest.mark.parametrize("batches", [torch.zeros(4, 2, WIDTH), {"x": X}, "text", None], ids=type)
def test_one_batch_is_not_taken_for_several(dynamic: Graph, batches: Any) -> None:
    with pytest.raises(DataError, match=r"batches is .*allowed: a list of batches"):
        split(dynamic, batches, 0)


@settings(deadline=None, max_examples=40)
@given(sizes=st.lists(st.integers(1, 20), min_size=1, max_size=5), size=st.integers(1, 8))
def test_pieces_hold_every_sample_once_and_are_alike_in_size(sizes: list[int], size: int) -> None:
    graph = capture(_onnx("batch"))
    batches = list(whole(graph, _batches(sizes)))
    found = list(pieces(graph, batches, lambda *_: size, 0))
    assert sorted(n for batch in found for n in batch["x"][:, 0]) == list(range(sum(sizes)))
    lengths = [len(batch["x"]) for batch in found]
    assert max(lengths) <= size
    assert len(found) == sum(-(-count // size) for count in sizes)
    if len(sizes) == 1:
        assert max(lengths) - min(lengths) <= 2 - size % 2
    if size % 2 == 0:
        assert sum(length % 2 for length in lengths) == sum(count % 2 for count in sizes)
    again = pieces(graph, batches, lambda *_: size, 0)
    assert all(np.array_equal(a["x"], b["x"]) for a, b in zip(found, again, strict=True))


@given(sizes=st.lists(st.integers(1, 20), min_size=1, max_size=9), wanted=st.integers(1, 200))
@settings(deadline=None, max_examples=40)
def test_first_samples_are_whole_batches(sizes: list[int], wanted: int) -> None:
    part = whole(capture(_onnx("batch")), _batches(sizes))
    some = part.first(wanted)
    assert 1 <= len(list(some)) == some.batches <= len(sizes)
    assert _numbers(some) == list(range(len(_numbers(some))))
    if wanted >= sum(sizes):
        assert some.batches == len(sizes)
