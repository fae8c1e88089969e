"""Programs of torch.export.save are opened where nothing in them can run; else with trust."""

from __future__ import annotations

import io
import json
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dyt_compile import calibrate, compiler, convert, fold, inspect
from dyt_compile.errors import CaptureError
from dyt_compile.programs import check_program

from .test_archives import Pickled

Entries = dict[str, bytes]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Entries:
    module = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8))
    axis = torch.export.Dim.AUTO
    program = torch.export.export(module, (torch.zeros(3, 8),), dynamic_shapes=({0: axis},))
    path = tmp_path_factory.mktemp("plain") / "model.pt2"
    torch.export.save(program, path)
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def _write(path: Path, entries: Entries) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    return path


def _changed(entries: Entries, suffix: str, change: Callable[[Any], Any]) -> Entries:
    """The entries with the JSON of one of them changed."""
    name = next(key for key in entries if key.endswith(suffix))
    told = json.loads(entries[name])
    change(told)
    return entries | {name: json.dumps(told).encode()}


def _graph(told: Any) -> Any:
    return told["graph_module"]["graph"]


def _call(told: Any) -> Any:
    return told["graph_module"]["module_call_graph"][0]["signature"]


def test_plain_program_is_opened(plain: Entries, tmp_path: Path) -> None:
    path = _write(tmp_path / "model.pt2", plain)
    check_program(path)
    assert [site.name for site in inspect(path).sites] == ["1"]


CODE = "__import__('pathlib').Path('hacked').touch()"


def _symbol(text: str) -> Callable[[Any], None]:
    def change(told: Any) -> None:
        _graph(told)["tensor_values"]["input"]["sizes"][0]["as_expr"]["expr_str"] = text

    return change


def _target(text: str) -> Callable[[Any], None]:
    return lambda told: _graph(told)["nodes"][0].update(target=text)


def _spec(kind: str, context: Any) -> Callable[[Any], None]:
    branch = {"type": kind, "context": context, "children_spec": []}
    return lambda told: _call(told).update(out_spec=json.dumps([1, branch]))


HOSTILE: dict[str, tuple[Callable[[Any], Any], str]] = {
    "an expression": (_symbol(CODE), "allowed: arithmetic"),
    "an attribute": (_symbol("Symbol('s0').func"), "allowed: arithmetic"),
    "an unknown function": (_symbol("preview(Symbol('s0'))"), "allowed: arithmetic"),
    "powers without end": (_symbol("Pow(9, Pow(9, Pow(9, Pow(9, 9))))"), "4 powers"),
    "a guard": (lambda told: told.update(guards_code=[CODE]), "allowed: arithmetic"),
    "a Python function": (_target("torch.os.system"), "no operator of a plain program"),
    "a caller of functions": (_target("_operator.call"), "no operator of a plain program"),
    "a file on disk": (_target("torch.ops.aten.from_file.default"), "no operator"),
    "a name that is code": (
        lambda told: _graph(told)["inputs"][4]["as_tensor"].update(name=f"x={CODE}"),
        "the name",
    ),
    "an argument that is code": (
        lambda told: _call(told).update(forward_arg_names=[f"x={CODE}"]),
        "the name",
    ),
    "an imported container": (
        _spec("collections.defaultdict", {"default_factory_module": "os"}),
        "would import",
    ),
    "an imported enum": (
        _spec("builtins.dict", json.dumps([{"__enum__": True, "fqn": "os:x", "name": "y"}])),
        "may import",
    ),
    "a length without end": (
        lambda told: told.update(range_constraints={"u9999999999": {"min_val": 0}}),
        "the name 'u9999999999'",
    ),
    "code in place of a trace": (
        lambda told: _graph(told)["tensor_values"].update(
            metadata={"sizes": [{"as_expr": {"expr_str": CODE}}]}
        ),
        "allowed: arithmetic",
    ),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_program_that_could_run_code_is_refused(
    plain: Entries, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    monkeypatch.chdir(tmp_path)
    change, reason = HOSTILE[what]
    path = _write(tmp_path / "model.pt2", _changed(plain, "models/model.json", change))
    with pytest.raises(CaptureError, match=r"model\.pt2' may run code.*--trust") as caught:
        inspect(path)
    assert reason in str(caught.value)
    assert [entry.name for entry in tmp_path.iterdir()] == ["model.pt2"]


def _weights(told: Any) -> None:
    next(iter(told["config"].values()))["use_pickle"] = True


def test_pickled_weights_are_refused(plain: Entries, tmp_path: Path) -> None:
    changed = _changed(plain, "weights_config.json", _weights)
    with pytest.raises(CaptureError, match="pickled tensors"):
        inspect(_write(tmp_path / "model.pt2", changed))


@pytest.mark.parametrize(
    "name",
    [
        "data/weights/model.pt", "data/constants/opaque_obj_0", "data/constants/custom_obj_0",
        "data/aotinductor/model/x.so", "data/aotinductor/model/x.wrapper.cpp", "x.py",
    ],
)  # fmt: skip
def test_entry_that_torch_would_run_is_refused(plain: Entries, tmp_path: Path, name: str) -> None:
    root = next(iter(plain)).partition("/")[0]
    path = _write(tmp_path / "model.pt2", plain | {f"{root}/{name}": b""})
    with pytest.raises(CaptureError, match=f"it holds '{name}'"):
        inspect(path)


def _pickled(trap: Any) -> Callable[[bool], bytes]:
    def made(zipped: bool) -> bytes:
        if not zipped:
            return pickle.dumps(trap)
        buffer = io.BytesIO()
        torch.save(((torch.zeros(1), trap), {}), buffer)
        return buffer.getvalue()

    return made


@pytest.mark.parametrize("zipped", [False, True])
def test_pickled_sample_is_refused_and_run_with_trust_alone(
    plain: Entries, tmp_path: Path, zipped: bool
) -> None:
    trap = _pickled(Pickled(tmp_path / "hacked"))(zipped)
    name = next(key for key in plain if key.endswith("sample_inputs/model.pt"))
    path = _write(tmp_path / "model.pt2", plain | {name: trap})
    with pytest.raises(CaptureError, match="a pickle of more than tensors"):
        inspect(path)
    assert not (tmp_path / "hacked").exists()
    with pytest.raises(CaptureError, match="no program"):
        inspect(path, trust=True)  # the sample is no sample
    assert (tmp_path / "hacked").exists(), "the trap of this test does nothing"


def test_every_function_that_takes_a_model_takes_trust(plain: Entries, tmp_path: Path) -> None:
    root = next(iter(plain)).partition("/")[0]
    path = _write(tmp_path / "model.pt2", plain | {f"{root}/notes.txt": b"mine"})
    batches = [(torch.randn(16, 8),)]
    calls: list[Callable[[bool], Any]] = [
        lambda trust: inspect(path, trust=trust),
        lambda trust: fold(path, trust=trust),
        lambda trust: convert(path, trust=trust),
        lambda trust: calibrate(path, batches, trust=trust),
        lambda trust: compiler.compare(path, path, batches, trust=trust),
    ]
    for call in calls:
        with pytest.raises(CaptureError, match=r"notes\.txt.*--trust"):
            call(False)
        call(True)


def test_compressed_program_is_refused(plain: Entries, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "model.pt2", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in plain.items():
            archive.writestr(name, content)
    with pytest.raises(CaptureError, match="is compressed"):
        inspect(tmp_path / "model.pt2")
