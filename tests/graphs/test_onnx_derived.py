"""Folded weights of models in files: computed when they are written, and never all at once."""

from __future__ import annotations

import gc
import tracemalloc
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

import dyt_compile
from dyt_compile import changes, export_onnx
from dyt_compile.changes import Change, after, in_parts
from dyt_compile.channels import Kind
from dyt_compile.errors import CaptureError, RewriteError, VerificationError
from dyt_compile.graphs import onnx_weights
from dyt_compile.graphs.onnx_derived import Derived
from dyt_compile.graphs.onnx_weights import chunks, save

pytestmark = pytest.mark.core

WIDTH, INNER = 48, 80
DTYPES = {
    "float32": TensorProto.FLOAT,
    "float16": TensorProto.FLOAT16,
    "bfloat16": TensorProto.BFLOAT16,
}


def _written(
    folder: Path,
    *,
    width: int = WIDTH,
    inner: int = INNER,
    layers: int = 2,
    dtype: str = "float32",
    transposed: bool = True,
    beside: bool = True,
    gamma: float = 1.0,
    size: float = 1.0,
    cast: bool = False,
) -> Path:
    """Layers x + down(tanh(up(DyT(x)))), as torch's exporter writes them; data beside or not."""
    random = np.random.default_rng(0)
    numbers = np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    held: dict[str, np.ndarray] = {}
    nodes = []

    def node(operator: str, inputs: list[str], output: str, **attributes: Any) -> str:
        nodes.append(helper.make_node(operator, inputs, [output], **attributes))
        return output

    def product(x: str, name: str, rows: int, columns: int) -> str:
        matrix = random.standard_normal((rows, columns), np.float32) * size / rows**0.5
        held[f"{name}.weight"] = matrix.T if transposed else matrix
        weight = f"{name}.weight"
        if transposed:
            weight = node("Transpose", [weight], f"{name}_turned", perm=[1, 0])
        return node("MatMul", [x, weight], f"{name}_y")

    x = "x"
    for place in range(layers):
        held |= {
            f"{place}.norm.alpha": np.array([0.7]),
            f"{place}.norm.weight": gamma * (0.5 + random.random(width)),
            f"{place}.norm.bias": random.normal(size=width),
        }
        y = node("Cast", [x], f"{place}_c", to=TensorProto.FLOAT) if cast else x
        y = node("Tanh", [node("Mul", [y, f"{place}.norm.alpha"], f"{place}_a")], f"{place}_t")
        y = node("Mul", [y, f"{place}.norm.weight"], f"{place}_g")
        y = node("Add", [y, f"{place}.norm.bias"], f"{place}_n")
        y = node("Cast", [y], f"{place}_d", to=DTYPES[dtype]) if cast else y
        y = node("Tanh", [product(y, f"{place}.up", width, inner)], f"{place}_h")
        x = node("Add", [x, product(y, f"{place}.down", inner, width)], f"{place}_x")
    kind = DTYPES[dtype]
    graph = helper.make_graph(
        nodes,
        "model",
        [helper.make_tensor_value_info("x", kind, [2, width])],
        [helper.make_tensor_value_info(x, kind, [2, width])],
        [
            numpy_helper.from_array(
                np.asarray(a, "f4" if cast and "norm" in name else numbers), name
            )
            for name, a in held.items()
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    path = folder / ("beside.onnx" if beside else "inside.onnx")
    onnx.save(model, path, save_as_external_data=beside, location="w.data", size_threshold=0)
    return path


def _weights(model: ir.Model) -> dict[str, ir.TensorProtocol]:
    """Weights by the places of their names: a file that was folded calls them by other names."""
    held = {name: value.const_value for name, value in model.graph.initializers.items()}
    return {name: tensor for name, tensor in held.items() if tensor is not None}


def _held(path: Path) -> dict[str, np.ndarray]:
    return {t.name: numpy_helper.to_array(t) for t in onnx.load(path).graph.initializer}


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_computed_when_written_are_those_computed_at_once(
    dtype: str, transposed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(changes, "PART_BYTES", 5000)  # several parts, the last one shorter
    monkeypatch.setattr(onnx_weights, "CHUNK_BYTES", 1700)
    written = {}
    for beside in (False, True):
        path = _written(tmp_path, dtype=dtype, transposed=transposed, beside=beside)
        result = dyt_compile.convert(path)
        lazy = [t for t in _weights(result.model).values() if isinstance(t, Derived)]
        assert len(lazy) == (2 if beside else 0)
        target = tmp_path / f"{path.stem}_folded.onnx"
        assert export_onnx(result, target, check="structure").structure is not None
        written[beside] = _held(target)
    assert written[True].keys() == written[False].keys()
    for name, array in written[True].items():
        assert array.tobytes() == written[False][name].tobytes(), name
    once = "float64" if dtype == "float32" else "float32"
    source = _held(tmp_path / "inside.onnx")
    scale = source["0.norm.weight"].astype(once)
    exact = source["0.up.weight"].astype(once) * (scale if transposed else scale[:, None])
    expected = (exact.T if transposed else exact).astype(source["0.up.weight"].dtype)
    folded = next(a for n, a in written[True].items() if n.startswith("0.up.weight"))
    np.testing.assert_array_equal(folded.astype(once), expected.astype(once))


def test_only_weights_that_change_are_written(tmp_path: Path) -> None:
    path = _written(tmp_path)
    data = path.with_name("w.data").stat()
    written = export_onnx(dyt_compile.convert(path), tmp_path / "new.onnx", weights="link")
    assert written.linked_bytes == 2 * WIDTH * INNER * 4  # what reads no DyT
    assert written.bytes > 2 * WIDTH * INNER * 4
    assert written.export_error is not None
    assert written.export_error < 1e-6
    assert path.with_name("w.data").stat() == data


def test_dyt_in_float32_folds_into_narrow_weights(tmp_path: Path) -> None:
    result = dyt_compile.convert(_written(tmp_path, dtype="float16", cast=True))
    assert result.folded is not None
    assert [(fold.what, fold.name[0]) for fold in result.folded.folded] == [
        ("beta", "0"), ("gamma", "0"), ("beta", "1"), ("gamma", "1")
    ]  # fmt: skip
    written = export_onnx(result, tmp_path / "new.onnx")
    assert written.export_error == 0
    original = dyt_compile.convert(tmp_path / "beside.onnx", fold=False).graph
    batch = original.example()
    assert batch is not None
    ends = [
        graph.segment(list(graph.inputs.values()), list(graph.outputs.values()))(
            list(batch.values())
        )
        for graph in (original, result.graph)
    ]
    np.testing.assert_allclose(*(end[0].astype("f4") for end in ends), rtol=1e-2, atol=1e-2)


def test_memory_does_not_grow_with_the_number_of_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(changes, "PART_BYTES", 1 << 18)
    monkeypatch.setattr(onnx_weights, "CHUNK_BYTES", 1 << 18)
    monkeypatch.setattr(onnx_weights, "EMBEDDED_BYTES", 0)
    peaks = []
    for layers in (2, 8):
        folder = tmp_path / str(layers)
        folder.mkdir()
        path = _written(folder, width=512, inner=1024, layers=layers, dtype="bfloat16")
        gc.collect()
        tracemalloc.start()
        try:
            result = dyt_compile.convert(path)
            written = export_onnx(result, folder / "new.onnx", check="structure")
            peaks.append(tracemalloc.get_traced_memory()[1])
        finally:
            tracemalloc.stop()
        assert written.bytes > layers * 512 * 1024 * 2
    weight = 512 * 1024 * 2  # twelve more of them are written
    assert peaks[1] - peaks[0] < 2 * weight, [peak / weight for peak in peaks]


@pytest.mark.parametrize("beside", [False, True])
def test_weights_that_leave_the_range_of_their_type_are_refused(
    beside: bool, tmp_path: Path
) -> None:
    path = _written(tmp_path, dtype="float16", beside=beside, gamma=40_000.0, size=20.0)
    before = set(tmp_path.iterdir())
    with pytest.raises(RewriteError, match=r"up\.weight.*leave the range of float16.*no folding"):
        export_onnx(dyt_compile.convert(path), tmp_path / "new.onnx", check="structure")
    assert set(tmp_path.iterdir()) == before
    kept = dyt_compile.convert(path, fold=False)
    assert export_onnx(kept, tmp_path / "new.onnx", check="structure").bytes


def test_model_is_folded_onto_itself(tmp_path: Path) -> None:
    path = _written(tmp_path)
    result = dyt_compile.convert(path)
    expected = export_onnx(result, tmp_path / "first.onnx", weights="copy")
    again = export_onnx(result, path, weights="copy")
    third = export_onnx(result, tmp_path / "third.onnx", weights="copy")  # its data are still there
    for written in (again, third):
        assert _held(written.path).keys() == _held(expected.path).keys()
        for name, array in _held(written.path).items():
            np.testing.assert_array_equal(array, _held(expected.path)[name])


def test_what_a_folded_model_is_made_of_is_never_written_over(tmp_path: Path) -> None:
    unfolded = dyt_compile.convert(_written(tmp_path), fold=False)
    first = export_onnx(unfolded, tmp_path / "a.onnx", weights="copy")
    result = dyt_compile.convert(first.path)
    second = export_onnx(result, first.path, weights="copy")
    third = export_onnx(result, tmp_path / "b.onnx", weights="copy")  # reads the same data again
    for name, array in _held(second.path).items():
        assert array.tobytes() == _held(third.path)[name].tobytes()


def test_data_that_went_away_after_the_fold_is_told(tmp_path: Path) -> None:
    path = _written(tmp_path)
    result = dyt_compile.convert(path)
    data = path.with_name("w.data")
    data.write_bytes(data.read_bytes()[:2000])
    with pytest.raises(CaptureError, match=r"w\.data' ends \d+ bytes before"):
        export_onnx(result, tmp_path / "new.onnx")
    data.unlink()
    with pytest.raises(CaptureError, match=r"cannot be read from .*w\.data"):
        export_onnx(result, tmp_path / "new.onnx")
    assert not (tmp_path / "new.onnx").exists()


def test_folded_file_that_differs_is_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dyt_compile.exporters import onnx as exporter
    from dyt_compile.graphs import onnx_structure

    def spoil(model: Any, path: Path, *options: Any) -> Any:
        saved = save(model, path, *options)
        (data,) = path.parent.glob("*.data")
        content = bytearray(data.read_bytes())
        content[9001] ^= 1
        data.write_bytes(content)
        return saved

    monkeypatch.setattr(onnx_structure, "SMALL_BYTES", 1000)
    monkeypatch.setattr(exporter, "save", spoil)
    result = dyt_compile.convert(_written(tmp_path))
    with pytest.raises(VerificationError, match="have other values"):
        export_onnx(result, tmp_path / "new.onnx", weights="copy", check="structure")
    assert not list(tmp_path.glob("new.*"))


def test_folded_model_is_saved_by_onnx_ir_too(tmp_path: Path) -> None:
    folded = dyt_compile.fold(_written(tmp_path)).model
    ir.save(folded, tmp_path / "saved.onnx")
    lazy = {n: t for n, t in _weights(folded).items() if isinstance(t, Derived)}
    assert lazy
    for name, tensor in lazy.items():
        assert _held(tmp_path / "saved.onnx")[name].tobytes() == b"".join(chunks(tensor))


ROWS = st.integers(1, 9)


@given(
    shape=st.tuples(ROWS, ROWS, ROWS), axis=st.integers(-3, 2), size=st.integers(8, 600),
    kinds=st.lists(st.sampled_from([Kind.SCALE, Kind.SHIFT, Kind.MATRIX]), max_size=3),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_parts_after_changes_are_parts_of_the_whole(
    shape: tuple[int, int, int], axis: int, size: int, kinds: list[Kind], seed: int
) -> None:
    random = np.random.default_rng(seed)
    made = []
    for kind in kinds:
        own = [n if random.random() < 0.5 else 1 for n in shape][random.integers(0, 3) :]
        matrix = random.normal(size=(shape[1], shape[1]))
        array = matrix if kind is Kind.MATRIX else random.normal(size=own)
        made.append(Change(None, 0, kind, array, 1))  # type: ignore[arg-type]
    operand = random.normal(size=shape)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(changes, "PART_BYTES", size)
        found = list(in_parts(operand, made, axis))
    if Kind.MATRIX not in kinds:
        assert all(part.nbytes <= max(size, operand.nbytes // shape[axis]) for part, _ in found)
    np.testing.assert_array_equal(np.concatenate([part for part, _ in found], axis), operand)
    expected = after(operand, made)
    np.testing.assert_array_equal(np.concatenate([now for _, now in found], axis), expected)
