"""What is never done: by the sources, and by the whole command line without a network."""

from __future__ import annotations

import ast
import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import dyt_compile
from dyt_compile.errors import CaptureError, ExportError, printable
from dyt_compile.exporters.tensorrt_process import RUNTIMES, call

from .report.models import norms

ROOT = Path(dyt_compile.__file__).parent

OWN_CODE = {"cli/sources.py"}
"""Where file.py:function is imported, which is the user's own code."""

BANNED_IMPORTS = {"_pickle", "cloudpickle", "dill", "joblib", "marshal", "pickle", "shelve"}

ALLOWED = {
    "importlib.import_module": {"cli/sources.py", "__init__.py"},  # the latter: its own modules
    "importlib.util.spec_from_file_location": OWN_CODE,
    "importlib.util.module_from_spec": OWN_CODE,
    "torch.export.load": {"passes/capture.py", "exporters/torch_files.py"},
    "ctypes.CDLL": {"exporters/plugin/build.py", "exporters/tensorrt_worker.py"},
}
"""Calls that run what they are given, and the modules that make them."""

BANNED_CALLS = {
    "eval", "exec", "compile", "__import__", "os.system", "os.popen", "torch.jit.load",
    "torch.ops.load_library", "torch.classes.load_library", "torch.hub.load", "yaml.load",
    "runpy.run_path", "runpy.run_module", "np.fromregex", "ctypes.cdll.LoadLibrary",
}  # fmt: skip

PLAIN = {"torch.load": ("weights_only", True), "np.load": ("allow_pickle", False),
         "numpy.load": ("allow_pickle", False)}  # fmt: skip
"""Readers that also open pickles, and what keeps them from it."""


def _called(node: ast.Call) -> str:
    """The name of a function that is called: "torch.load"; "" for others."""
    parts = []
    place: ast.expr = node.func
    while isinstance(place, ast.Attribute):
        parts.append(place.attr)
        place = place.value
    return ".".join([place.id, *reversed(parts)]) if isinstance(place, ast.Name) else ""


def _faults(source: str, module: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            imported = {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported = {str(node.module).partition(".")[0]} if not node.level else set()
        else:
            imported = set()
        yield from (f"imports {name}" for name in imported & BANNED_IMPORTS)
        if not isinstance(node, ast.Call):
            continue
        name = _called(node)
        given = {k.arg: k.value.value for k in node.keywords if isinstance(k.value, ast.Constant)}
        if name in BANNED_CALLS or module not in ALLOWED.get(name, {module}):
            yield f"calls {name}"
        if name in PLAIN and given.get(PLAIN[name][0]) is not PLAIN[name][1]:
            yield f"calls {name} without {PLAIN[name][0]}={PLAIN[name][1]}"
        if given.get("shell") or given.get("trust_remote_code") or given.get("allow_pickle"):
            yield f"calls {name} with shell, trust_remote_code or allow_pickle"


@pytest.mark.core
@pytest.mark.parametrize(
    "source",
    [
        "torch.load(f)", "torch.load(f, weights_only=False)", "np.load(f)", "import pickle",
        "np.load(f, allow_pickle=True)", "from pickle import loads", "eval('1')", "exec(code)",
        "importlib.import_module(name)", "subprocess.run(x, shell=True)", "torch.export.load(p)",
        "f.from_pretrained(p, trust_remote_code=True)", "__import__(name)", "compile(a, b, c)",
        "importlib.util.spec_from_file_location(a, b)", "torch.ops.load_library(p)",
    ],
)  # fmt: skip
def test_reader_of_sources_finds_what_runs_foreign_code(source: str) -> None:
    assert list(_faults(source, "graphs/onnx.py"))


@pytest.mark.core
@pytest.mark.parametrize(
    "source",
    ["torch.load(f, weights_only=True)", "np.load(f, allow_pickle=False)", "model.eval()",
     "torch.compile(model)", "from .. import dyt"],
)  # fmt: skip
def test_reader_of_sources_takes_what_runs_nothing(source: str) -> None:
    assert not list(_faults(source, "graphs/onnx.py"))


@pytest.mark.core
@pytest.mark.parametrize(
    "module", [str(path.relative_to(ROOT).as_posix()) for path in sorted(ROOT.rglob("*.py"))]
)
def test_module_runs_nothing_that_a_file_holds(module: str) -> None:
    assert not list(_faults((ROOT / module).read_text(encoding="utf-8"), module))


@pytest.mark.core
def test_allowed_calls_are_made() -> None:
    """So that the list does not outlive what it allows."""
    for name, modules in ALLOWED.items():
        for module in modules:
            tree = ast.parse((ROOT / module).read_text(encoding="utf-8"))
            calls = {_called(node) for node in ast.walk(tree) if isinstance(node, ast.Call)}
            assert name in calls, (name, module)


@pytest.mark.core
def test_modules_beside_a_model_are_not_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("json", "tensorrt", "numpy", "dyt_compile"):
        (tmp_path / f"{name}.py").write_text("open('hacked', 'w')")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ExportError):
        call(RUNTIMES["tensorrt"], "reading", {"verb": "read", "onnx": str(tmp_path / "no.onnx")})
    assert not (tmp_path / "hacked").exists()


@pytest.mark.core
@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("blocks.0.norm", "blocks.0.norm"),
        ("σ × γ\nβ", "σ × γ\nβ"),
        ("\x1b[2Jgone", "\\x1b[2Jgone"),
        ("a\rb\x07\x9b31m", "a\\rb\\x07\\x9b31m"),
        ("\u202eevil\u2028", "\\u202eevil\\u2028"),
    ],
)
def test_text_for_a_terminal_cannot_move_its_cursor(text: str, shown: str) -> None:
    assert printable(text) == shown


@pytest.mark.core
@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("config.json", '{"attn_implementation": "owner/kernel"}'),
        ("config.json", '{"text_config": {"_attn_implementation": "../kernel"}}'),
        ("model.safetensors.index.json", '{"weight_map": {"a": "../../other.safetensors"}}'),
        ("model.safetensors.index.json", '{"weight_map": {"a": "/other.safetensors"}}'),
        ("config.json", "[" * 100_000),
        ("config.json", "no JSON"),
    ],
)
def test_folder_that_names_what_lies_elsewhere_is_refused(
    tmp_path: Path, file: str, content: str
) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    (tmp_path / file).write_text(content)
    with pytest.raises(CaptureError, match=file.replace(".", r"\.")) as caught:
        dyt_compile.inspect(tmp_path)
    assert "\n" not in str(caught.value)


OFFLINE = """
import sys
def watch(event, arguments):
    if event.startswith("socket.") and event not in ("socket.gethostname", "socket.__new__"):
        print("NETWORK", event, arguments, file=sys.stderr, flush=True)
        raise PermissionError(event)
sys.addaudithook(watch)
import socket
try:
    socket.create_connection(("127.0.0.1", 9), 0.1)
except PermissionError:
    print("the watch works")
from dyt_compile.cli import main
for line in sys.stdin.read().splitlines():
    try:
        main(line.split(" "))
    except SystemExit as ended:
        print(line.split(" ")[0], "ended with", ended.code)
"""

COMMANDS = """\
inspect model.onnx --report found.html --json found.json
inspect subject.py:load
convert model.onnx --data data.npz --mode all --report cost.html -o all.onnx --calibration fits.bin
convert subject.py:load --data data.npz --mode all -o program.pt2
convert model.onnx --fits fits.bin -o applied.onnx
calibrate model.onnx --data data.npz -o again.safetensors
verify model.onnx all.onnx --data data.npz --max-error 10
verify model.onnx model.onnx
inspect program.pt2
recover subject.py:load --data data.npz --steps 2 -o learned.safetensors
inspect folder
build model.onnx -o model.plan
bench-gpu model.onnx
plugin info missing.so
plugin build -o plugin.so"""

MAY_FAIL = {"build", "bench-gpu", "plugin"}
"""Where no TensorRT, GPU or compiler is."""

SUBJECT = """
import torch
class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.out = torch.nn.LayerNorm(16), torch.nn.Linear(16, 16)
    def forward(self, x):
        return self.out(self.norm(x))
def load():
    torch.manual_seed(0)
    return Model(), (torch.randn(2, 4, 16),)
"""


@pytest.fixture(scope="module")
def offline(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, str]:
    """A folder in which every command ran without a network, and what they said."""
    folder = tmp_path_factory.mktemp("offline")
    (folder / "model.onnx").write_bytes(norms(("first", "second")).SerializeToString())
    np.savez(folder / "data.npz", x=np.random.default_rng(0).normal(size=(24, 4, 16)).astype("f4"))
    (folder / "subject.py").write_text(SUBJECT)
    (folder / "folder").mkdir()
    (folder / "folder" / "config.json").write_text(
        '{"architectures": ["BertModel"], "model_type": "bert"}'
    )
    mask = os.umask(0o026)
    try:
        done = subprocess.run(
            [sys.executable, "-c", OFFLINE], input=COMMANDS, cwd=folder, text=True,
            capture_output=True, check=False,
            env={**os.environ, "PYTHONPATH": str(ROOT.parent), "HF_HUB_OFFLINE": "0"},
        )  # fmt: skip
    finally:
        os.umask(mask)
    return folder, done.stdout, done.stderr


def test_whole_command_line_needs_no_network(offline: tuple[Path, str, str]) -> None:
    _, told, said = offline
    assert "the watch works" in told, said
    assert said.count("NETWORK") == 1, said  # what the watch was tried with
    ended = [line.split() for line in told.splitlines() if " ended with " in line]
    assert len(ended) == len(COMMANDS.splitlines())
    failed = {words[0] for words in ended if words[-1] != "0"}
    assert failed <= {*MAY_FAIL, "inspect"}, said
    assert [w[-1] for w in ended if w[0] == "inspect"] == ["0", "0", "0", "1"]
    assert "transformers cannot load the folder 'folder'" in said


def test_files_are_made_with_the_umask_of_the_user(offline: tuple[Path, str, str]) -> None:
    folder, *_ = offline
    names = ("found.html", "found.json", "cost.html", "all.onnx", "fits.bin", "program.pt2",
             "applied.onnx", "again.safetensors", "learned.safetensors")  # fmt: skip
    modes = {name: oct(stat.S_IMODE((folder / name).stat().st_mode)) for name in names}
    assert modes == dict.fromkeys(names, oct(0o640))
    left = {path.name for path in folder.iterdir()} - {*names, "model.onnx", "data.npz"}
    assert left - {"model.plan", "plugin.so", "__pycache__"} == {"subject.py", "folder"}
