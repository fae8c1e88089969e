"""ONNX files without their weights in memory: reading, linking, copying, embedding, comparing."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

import dyt_compile
from dyt_compile import export_onnx
from dyt_compile.compiler import compare_structure
from dyt_compile.errors import CaptureError, ExportError, OptionError, VerificationError
from dyt_compile.graphs import onnx_structure, onnx_weights
from dyt_compile.graphs.onnx_files import load
from dyt_compile.graphs.onnx_weights import save

convert = partial(dyt_compile.convert, fold=False)
"""What changes no weights, so that all of them stay where they are."""

pytestmark = pytest.mark.core

WIDTH = 24
RANDOM = np.random.default_rng(0)


def _arrays(*, gamma: float = 1.0) -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    return {
        "first.weight": random.normal(size=(WIDTH, WIDTH)).astype(np.float32),
        "norm.alpha": np.array([0.5], np.float32),
        "norm.weight": np.full(WIDTH, gamma, np.float32),
        "norm.bias": random.normal(size=WIDTH).astype(np.float32),
        "last.weight": random.normal(size=(WIDTH, WIDTH)).astype(np.float32),
    }


def _model(*, branch: bool = False, last: str = "MatMul", gamma: float = 1.0) -> onnx.ModelProto:
    """A product, DyT written out, and another one; its result may go through an If."""
    nodes = [
        helper.make_node("MatMul", ["x", "first.weight"], ["h"]),
        helper.make_node("Mul", ["h", "norm.alpha"], ["scaled"]),
        helper.make_node("Tanh", ["scaled"], ["squashed"]),
        helper.make_node("Mul", ["squashed", "norm.weight"], ["stretched"]),
        helper.make_node("Add", ["stretched", "norm.bias"], ["n"]),
        helper.make_node(last, ["n", "last.weight"], ["raw"]),
        helper.make_node("Softmax", ["raw"], ["y"], axis=-1),
    ]
    if branch:
        value = helper.make_tensor_value_info("inner", TensorProto.FLOAT, None)
        then, other = (
            helper.make_graph([helper.make_node(name, ["raw"], ["inner"])], name, [], [value])
            for name in ("Relu", "Neg")
        )
        nodes[-1] = helper.make_node("If", ["flag"], ["y"], then_branch=then, else_branch=other)
    given = [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, WIDTH])]
    if branch:
        given.append(helper.make_tensor_value_info("flag", TensorProto.BOOL, []))
    graph = helper.make_graph(
        nodes, "model", given, [helper.make_tensor_value_info("y", TensorProto.FLOAT, [2, WIDTH])],
        [numpy_helper.from_array(a, name) for name, a in _arrays(gamma=gamma).items()],
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def _beside(path: Path, location: str = "w.data", **options: Any) -> Path:
    path.parent.mkdir(exist_ok=True)
    onnx.save(
        _model(**options), path, save_as_external_data=True, location=location, size_threshold=0
    )
    return path


@pytest.fixture
def beside(tmp_path: Path) -> Path:
    """A file whose weights, small ones too, lie beside it."""
    return _beside(tmp_path / "model.onnx")


@pytest.fixture
def inside(tmp_path: Path) -> Path:
    """A file that holds its weights."""
    path = tmp_path / "model.onnx"
    onnx.save(_model(), path)
    return path


def _held(path: Path) -> dict[str, np.ndarray]:
    """All initializers of a file, as onnx itself reads them."""
    return {t.name: numpy_helper.to_array(t) for t in onnx.load(path).graph.initializer}


def _assert_weights(path: Path) -> None:
    held = _held(path)
    for name in ("first.weight", "last.weight"):
        np.testing.assert_array_equal(held[name], _arrays()[name])


def _locations(path: Path) -> dict[str, str]:
    graph = onnx.load(path, load_external_data=False).graph
    return {
        tensor.name: {entry.key: entry.value for entry in tensor.external_data}["location"]
        for tensor in graph.initializer
        if tensor.data_location == TensorProto.EXTERNAL
    }


# Reading.


@pytest.mark.parametrize("name", ["inside", "beside"])
def test_file_is_read_as_onnx_reads_it(name: str, request: pytest.FixtureRequest) -> None:
    path = request.getfixturevalue(name)
    found = load(path).graph.initializers
    expected = _held(path)
    assert list(found) == list(expected)
    for key, value in found.items():
        assert value.const_value is not None
        np.testing.assert_array_equal(value.const_value.numpy(), expected[key])


@pytest.mark.parametrize("dtype", [TensorProto.INT4, TensorProto.BFLOAT16, TensorProto.FLOAT16])
def test_types_of_fewer_bits_are_read(dtype: int, tmp_path: Path) -> None:
    numbers = RANDOM.integers(-7, 7, 4096)
    tensor = helper.make_tensor("w", dtype, [64, 64], numbers)
    raw = numpy_helper.from_array(numpy_helper.to_array(tensor), "w")
    graph = helper.make_graph([], "g", [], [], [raw])
    onnx.save(helper.make_model(graph), tmp_path / "m.onnx")
    found = load(tmp_path / "m.onnx").graph.initializers["w"].const_value
    assert found is not None
    assert found.dtype.value == dtype
    np.testing.assert_array_equal(found.numpy().astype(np.int64), numbers.reshape(64, 64))


def test_a_file_may_be_replaced_while_its_weights_are_in_use(inside: Path) -> None:
    result = convert(inside)
    written = export_onnx(result, inside)
    _assert_weights(written.path)
    again = export_onnx(result, inside.with_name("again.onnx"))
    _assert_weights(again.path)


def _cut(data: bytes) -> Iterator[bytes]:
    yield b""
    yield b"no model at all"
    yield from (data[: len(data) * share // 7] for share in range(1, 7))
    yield from (data[:place] + b"\xff" * 10 + data[place:] for place in (0, 5, 100, len(data) // 2))


def test_damaged_files_are_refused_in_one_line(inside: Path) -> None:
    for place, data in enumerate(_cut(inside.read_bytes())):
        path = inside.with_name(f"damaged{place}.onnx")
        path.write_bytes(data)
        with pytest.raises(CaptureError) as raised:
            convert(path)
        assert "\n" not in str(raised.value)


# Where external data may lie.


def _outside(folder: Path, location: str) -> Path:
    """A model that says that its weights lie in `location`."""
    path = _beside(folder / "model.onnx")
    proto = onnx.load(path, load_external_data=False)
    for tensor in proto.graph.initializer:
        next(entry for entry in tensor.external_data if entry.key == "location").value = location
    path.write_bytes(proto.SerializeToString())
    return path


def test_data_outside_the_folder_is_refused_by_name(tmp_path: Path) -> None:
    secret = _beside(tmp_path / "other" / "model.onnx").with_name("w.data")
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "link.data").symlink_to(secret)
    (folder / "sub").symlink_to(secret.parent)
    for location in ("../other/w.data", str(secret), "sub/../../other/w.data"):
        with pytest.raises(CaptureError, match=r"first\.weight.*outside the model's folder"):
            convert(_outside(folder, location))
    for location in ("link.data", "sub/w.data"):
        with pytest.raises(CaptureError, match=r"first\.weight.*a link to.*outside the model's"):
            convert(_outside(folder, location))
    with pytest.raises(CaptureError, match="which is no file"):
        convert(_outside(folder, "missing.data"))


def test_data_with_another_name_elsewhere_is_refused(beside: Path) -> None:
    os.link(beside.with_name("w.data"), beside.with_name("second.data"))
    with pytest.raises(CaptureError, match="2 hard links"):
        convert(beside)


def test_data_outside_is_refused_in_models_in_memory(tmp_path: Path) -> None:
    _beside(tmp_path / "other" / "model.onnx")
    (tmp_path / "model").mkdir()
    path = _outside(tmp_path / "model", "../other/w.data")
    with pytest.raises(CaptureError, match="outside the model's folder"):
        convert(ir.load(path))


def test_link_within_the_folder_is_followed(beside: Path) -> None:
    (beside.parent / "alias.data").symlink_to(beside.parent / "w.data")
    convert(_outside(beside.parent, "alias.data"))


def test_data_that_is_cut_short_is_refused(beside: Path) -> None:
    data = beside.with_name("w.data")
    data.write_bytes(data.read_bytes()[:-100])
    with pytest.raises(CaptureError, match=r"last\.weight.*its shape takes 2304 bytes"):
        convert(beside)


# Writing.


def _state(path: Path) -> tuple[int, int, int]:
    """What changes where a file is written, but not where it is read."""
    about = path.stat()
    return about.st_ino, about.st_size, about.st_mtime_ns


def test_weights_are_linked_within_one_folder(beside: Path) -> None:
    before = _state(beside.with_name("w.data"))
    written = export_onnx(convert(beside), beside.with_name("new.onnx"))
    assert written.linked == ("w.data",)
    assert written.linked_bytes == 2 * WIDTH * WIDTH * 4
    assert written.export_error == 0
    assert _locations(written.path) == {"first.weight": "w.data", "last.weight": "w.data"}
    assert _state(beside.with_name("w.data")) == before
    assert {path.name for path in beside.parent.iterdir()} == {"model.onnx", "w.data", "new.onnx"}
    onnx.checker.check_model(str(written.path), full_check=True)
    _assert_weights(written.path)


def test_folding_writes_the_weights_alone_that_it_changes(beside: Path) -> None:
    written = export_onnx(dyt_compile.convert(beside), beside.with_name("new.onnx"))
    assert _locations(written.path) == {"first.weight": "w.data"}  # the other one took gamma
    assert written.structure is not None
    with pytest.raises(VerificationError):
        compare_structure(beside, written.path)  # another function, by rounding


def test_weights_of_another_folder_are_embedded_or_copied(tmp_path: Path) -> None:
    result = convert(_beside(tmp_path / "source" / "model.onnx"))
    assert not _locations(export_onnx(result, tmp_path / "new.onnx").path)
    copied = export_onnx(result, tmp_path / "copy.onnx", weights="copy")
    (location,) = set(_locations(copied.path).values())
    assert re.fullmatch(r"copy\.onnx\.[0-9a-f]{16}\.data", location)
    assert copied.bytes == sum(p.stat().st_size for p in tmp_path.glob("copy.*"))
    linked = export_onnx(result, tmp_path / "link.onnx", weights="link")
    assert linked.linked == ("source/w.data",)
    (tmp_path / "far").mkdir()
    with pytest.raises(ExportError, match="outside"):
        export_onnx(result, tmp_path / "far" / "link.onnx", weights="link")
    for name in ("new", "copy", "link"):
        _assert_weights(tmp_path / f"{name}.onnx")


def test_copy_never_writes_over_the_data_that_it_reads(tmp_path: Path) -> None:
    beside = _beside(tmp_path / "model.onnx", gamma=2.0)
    first = export_onnx(convert(beside), beside.with_name("a.onnx"), weights="copy")
    before = _contents(beside.parent)
    result = convert(first.path)
    assert export_onnx(result, first.path, weights="copy").path == first.path
    assert _contents(beside.parent) == before  # the same weights, under the same name
    folded = export_onnx(dyt_compile.convert(first.path), first.path, weights="copy")
    assert len(_data(beside.parent)) == 2
    assert set(_locations(folded.path).values()) < _data(beside.parent)
    again = export_onnx(result, beside.with_name("again.onnx"))  # its data is still there
    _assert_weights(again.path)


def _contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def _data(folder: Path) -> set[str]:
    return {path.name for path in folder.glob("*.onnx.*.data")}


def test_data_of_the_file_that_was_replaced_goes_with_it(inside: Path) -> None:
    target = inside.with_name("a.onnx")
    onnx.save(_model(gamma=2.0), inside)
    export_onnx(convert(inside), target, weights="copy")
    (old,) = _data(inside.parent)
    export_onnx(dyt_compile.convert(inside), target, weights="copy")
    (new,) = _data(inside.parent)
    assert new != old
    export_onnx(convert(inside), target, weights="embed")
    assert not _data(inside.parent)
    _assert_weights(target)


def test_data_that_another_graph_refers_to_stays(inside: Path) -> None:
    target, other = inside.with_name("a.onnx"), inside.with_name("b.onnx")
    export_onnx(convert(inside), target, weights="copy")
    export_onnx(convert(target), other, weights="link")
    (old,) = _data(inside.parent)
    export_onnx(convert(inside), target, weights="embed")
    assert _data(inside.parent) == {old}
    _assert_weights(other)
    other.write_bytes(b"damaged: nobody knows what it refers to")
    export_onnx(convert(inside), target, weights="embed")
    assert _data(inside.parent) == {old}
    other.unlink()
    export_onnx(convert(inside), target, weights="embed")
    assert not _data(inside.parent)


def test_data_of_other_programs_stays(inside: Path) -> None:
    target = _beside(inside.with_name("a.onnx"), "a.onnx.data")
    for name in ("a.onnx.0123.data", "b.onnx.0123456789abcdef.data", "a.onnx.x.data"):
        inside.with_name(name).write_text("another's")
    before = _contents(inside.parent)
    export_onnx(convert(inside), target, weights="copy")
    after = _contents(inside.parent)
    assert {name: after[name] for name in before if name != "a.onnx"} == {
        name: data for name, data in before.items() if name != "a.onnx"
    }


def test_link_needs_something_to_link_to(inside: Path) -> None:
    with pytest.raises(ExportError, match="none in other files"):
        export_onnx(convert(inside), inside.with_name("new.onnx"), weights="link")
    with pytest.raises(OptionError, match="allowed: link, copy, embed"):
        export_onnx(convert(inside), inside.with_name("new.onnx"), weights="move")


def test_more_than_protobuf_holds_is_not_embedded(
    beside: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnx_weights, "EMBEDDED_BYTES", 1000)
    with pytest.raises(ExportError, match="allowed: up to"):
        export_onnx(convert(beside), beside.with_name("new.onnx"), weights="embed")


def test_large_tensors_begin_where_every_system_can_map_them(tmp_path: Path) -> None:
    model = ir.Model(ir.Graph([], [], nodes=[], opset_imports={"": 20}), ir_version=10)
    for name in ("a", "b"):
        tensor = ir.tensor(RANDOM.normal(size=(600, 600)).astype(np.float32), name=name)
        value = ir.Value(name=name, shape=tensor.shape, const_value=tensor)
        model.graph.register_initializer(value)
    save(model, tmp_path / "m.onnx", "copy")
    graph = onnx.load(tmp_path / "m.onnx", load_external_data=False).graph
    places = [{e.key: e.value for e in tensor.external_data} for tensor in graph.initializer]
    offsets = [int(place["offset"]) for place in places]
    assert [offset % onnx_weights.ALIGNED_BYTES for offset in offsets] == [0, 0]
    assert offsets[1] - offsets[0] >= 600 * 600 * 4


# What is checked, and what not.


def test_exact_conversion_is_compared_with_its_source(inside: Path) -> None:
    written = export_onnx(convert(inside), inside.with_name("new.onnx"))
    assert written.structure is not None
    assert (written.structure.nodes, written.structure.proved) == (4, 1)


def test_large_model_is_not_run_unless_asked(beside: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dyt_compile.exporters import onnx as exporter
    from dyt_compile.exporters import onnx_checks

    for module in (exporter, onnx_checks):
        monkeypatch.setattr(module, "EMBEDDED_BYTES", 1000)
    result = convert(beside)
    monkeypatch.setattr(exporter, "check_values", None)
    written = export_onnx(result, beside.with_name("new.onnx"))
    assert written.export_error is None
    assert "check 'run' does" in written.not_run
    with pytest.raises(TypeError):
        export_onnx(result, beside.with_name("new.onnx"), check="run")


def test_structure_alone_needs_an_onnx_model_in_its_own_types(inside: Path) -> None:
    result = convert(inside)
    assert export_onnx(result, inside.with_name("n.onnx"), check="structure").export_error is None
    with pytest.raises(OptionError, match="allowed for a model from ONNX"):
        export_onnx(result, inside.with_name("n.onnx"), check="structure", dtype="fp16")
    with pytest.raises(OptionError, match="allowed: auto, structure, run"):
        export_onnx(result, inside.with_name("n.onnx"), check="none")


@pytest.mark.parametrize("branch", [False, True])
def test_structure_sees_that_dyt_stands_for_its_nodes(
    branch: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnx_structure, "SMALL_BYTES", 1000)
    onnx.save(_model(branch=branch), tmp_path / "a.onnx")
    written = export_onnx(convert(tmp_path / "a.onnx"), tmp_path / "b.onnx")
    found = compare_structure(tmp_path / "a.onnx", written.path)
    assert found.proved == 1
    assert found.unread_bytes == 2 * WIDTH * WIDTH * 4
    assert compare_structure(tmp_path / "a.onnx", written.path, read=True).unread_bytes == 0


def _with_other_attribute(proto: onnx.ModelProto) -> None:
    proto.graph.node[-1].attribute[0].i = 0


def _with_other_operator(proto: onnx.ModelProto) -> None:
    next(node for node in proto.graph.node if node.op_type == "MatMul").op_type = "Gemm"


def _with_other_order(proto: onnx.ModelProto) -> None:
    node = next(node for node in proto.graph.node if node.op_type == "MatMul")
    node.input[1] = "last.weight"


def _with_other_gamma(proto: onnx.ModelProto) -> None:
    for tensor in proto.graph.initializer:
        if tensor.name.endswith("gamma"):
            array = numpy_helper.to_array(tensor).copy()
            array[0] += 1e-3
            tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (_with_other_attribute, "'y', made by Softmax"),
        (_with_other_operator, "'h', made by Gemm"),
        (_with_other_order, "'h', made by MatMul"),
        (_with_other_gamma, "made by DyT"),
    ],
)
def test_structure_names_the_first_difference(change: Any, named: str, inside: Path) -> None:
    written = export_onnx(convert(inside), inside.with_name("new.onnx"))
    proto = onnx.load(written.path)
    change(proto)
    onnx.save(proto, written.path)
    with pytest.raises(VerificationError, match=named):
        compare_structure(inside, written.path)


def test_structure_sees_the_difference_of_branches(tmp_path: Path) -> None:
    proto = _model(branch=True)
    onnx.save(proto, tmp_path / "a.onnx")
    proto.graph.node[-1].attribute[0].g.node[0].op_type = "Abs"
    onnx.save(proto, tmp_path / "b.onnx")
    with pytest.raises(VerificationError, match="'inner', made by Abs"):
        compare_structure(tmp_path / "a.onnx", tmp_path / "b.onnx")


def test_structure_sees_along_which_axis_gamma_lies(tmp_path: Path) -> None:
    gamma = RANDOM.random(WIDTH).astype(np.float32)
    for name, shape in (("last", [WIDTH]), ("first", [WIDTH, 1])):
        nodes = [
            helper.make_node("Mul", ["x", "alpha"], ["scaled"]),
            helper.make_node("Tanh", ["scaled"], ["squashed"]),
            helper.make_node("Mul", ["squashed", "gamma"], ["y"]),
        ]
        x, y = (
            helper.make_tensor_value_info(v, TensorProto.FLOAT, [2, WIDTH, WIDTH]) for v in "xy"
        )
        held = {"alpha": np.array(0.7, np.float32), "gamma": gamma.reshape(shape)}
        graph = helper.make_graph(
            nodes, "g", [x], [y], [numpy_helper.from_array(a, n) for n, a in held.items()]
        )
        opsets = [helper.make_opsetid("", 20)]
        onnx.save(
            helper.make_model(graph, opset_imports=opsets, ir_version=10), tmp_path / f"{name}.onnx"
        )
    last, first = tmp_path / "last.onnx", tmp_path / "first.onnx"
    assert compare_structure(last, last).proved == compare_structure(first, first).proved == 1
    with pytest.raises(VerificationError, match="'y'"):
        compare_structure(last, first)


def test_weights_that_differ_are_found_where_they_are_read(
    inside: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnx_structure, "SMALL_BYTES", 1000)
    written = export_onnx(convert(inside), inside.with_name("new.onnx"))
    data = bytearray(written.path.read_bytes())
    place = bytes(data).index(_arrays()["last.weight"].tobytes())
    data[place + 1000] ^= 1
    written.path.write_bytes(bytes(data))
    compare_structure(inside, written.path)
    with pytest.raises(VerificationError, match=r"weights 'last\.weight' have other values"):
        compare_structure(inside, written.path, read=True)


def test_file_that_differs_from_its_source_is_not_kept(
    inside: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dyt_compile.exporters import onnx as exporter

    def spoil(model: Any, path: Path, *options: Any) -> Any:
        saved = save(model, path, *options)
        proto = onnx.load(path)
        _with_other_gamma(proto)
        onnx.save(proto, path)
        return saved

    monkeypatch.setattr(exporter, "save", spoil)
    with pytest.raises(VerificationError, match="made by DyT"):
        export_onnx(convert(inside), inside.with_name("new.onnx"), check="structure")
    assert [path.name for path in inside.parent.iterdir()] == ["model.onnx"]
