"""dyt-compile as a user calls it: what it prints, what it writes, how it fails."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from safetensors.torch import load_file, save_file

from dyt_compile import Calibration
from dyt_compile.cli import main
from dyt_compile.cli.sources import load_model

from ..report.models import norms

pytestmark = pytest.mark.core

MODEL = """
import torch

class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = torch.nn.LayerNorm(8)
        self.linear = torch.nn.Linear(8, 8)

    def forward(self, x):
        return x + self.linear(self.norm(x))

def load():
    torch.manual_seed(0)
    return torch.nn.Sequential(Block(), Block()), (torch.randn(2, 3, 8),)

def empty():
    with torch.device("meta"):
        return torch.nn.Sequential(Block(), Block()), (torch.randn(2, 3, 8, device="cpu"),)

def wrong():
    return "model"

def batches():
    torch.manual_seed(1)
    for _ in range(8):
        yield (torch.randn(8, 3, 8),)
"""


@pytest.fixture
def model(tmp_path: Path) -> str:
    """MODEL of a small transformer-like network."""
    (tmp_path / "network.py").write_text(MODEL)
    return f"{tmp_path / 'network.py'}:load"


@pytest.fixture
def data(tmp_path: Path) -> str:
    """DATA for it, as an .npz file."""
    array = np.random.default_rng(0).normal(size=(64, 3, 8)).astype(np.float32)
    np.savez(tmp_path / "data.npz", input=array)
    return str(tmp_path / "data.npz")


def run(*arguments: str | Path) -> int:
    """The exit status of a command."""
    with pytest.raises(SystemExit) as stopped:
        main([str(argument) for argument in arguments])
    return int(stopped.value.code or 0)


def failure(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    """The one line that a failing command prints."""
    assert run(*arguments) == 1
    printed = capsys.readouterr()
    lines = [line for line in printed.err.splitlines() if ": " in line]
    assert len(lines) == 1
    assert "Traceback" not in printed.err
    return lines[0]


def convert(model: str, *options: str | Path) -> int:
    return run("convert", model, *options)


def test_inspect_writes_the_sites_as_json(model: str, tmp_path: Path) -> None:
    assert run("inspect", model, "--json", tmp_path / "sites.json") == 0
    found = json.loads((tmp_path / "sites.json").read_text())
    assert found["refusals"] == []
    assert [site["name"] for site in found["sites"]] == ["0.norm", "1.norm"]
    assert found["sites"][0] == {
        "name": "0.norm", "kind": "layer_norm", "channels": 8, "axes": [-1], "eps": 1e-5,
        "affine": ["gamma", "beta"], "dtype": "float32", "consumers": ["linear"],
        "parallel_residual": False, "tied_to": None, "folds": ["gamma", "beta"], "unfolded": "",
    }  # fmt: skip


def test_inspect_shows_repeated_layers_once(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("inspect", model) == 0
    printed = capsys.readouterr().out
    (line,) = [line for line in printed.splitlines() if "layer_norm" in line]
    assert line.split() == [
        "{0..1}.norm",
        "×2",
        "layer_norm",
        "8",
        "1e-05",
        "γ",
        "β",
        "γ",
        "β",
        "linear",
    ]
    assert all(len(line) <= 100 for line in printed.splitlines())


def test_convert_writes_model_report_and_calibration(model: str, data: str, tmp_path: Path) -> None:
    out = tmp_path / "out.onnx"
    options = ["--report", tmp_path / "r.json", "--calibration", tmp_path / "c.safetensors"]
    assert convert(model, "-o", out, "--data", data, "--mode", "all", *options) == 0
    assert [node.domain for node in onnx.load(out).graph.node].count("dyt") == 2
    assert json.loads((tmp_path / "r.json").read_text())["converted"] == 2
    assert set(Calibration.load(tmp_path / "c.safetensors").fits) == {"0.norm", "1.norm"}


def test_convert_applies_what_calibrate_wrote(
    model: str, data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fits, out = tmp_path / "fits.safetensors", tmp_path / "out.onnx"
    assert run("calibrate", model, "--data", data, "-o", fits) == 0
    assert "2 of 2 norms have a fit" in capsys.readouterr().out
    assert convert(model, "-o", out, "--fits", fits) == 0
    assert "2 of 2 sites are DyT; the error was not measured" in capsys.readouterr().out
    assert convert(model, "-o", out, "--fits", fits, "--data", data) == 0
    assert "on 64 unseen samples" in capsys.readouterr().out


def test_calibrate_merges_runs_over_other_data(
    model: str, data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second, plain = (tmp_path / name for name in ("first", "second", "plain"))
    options = ["--data", data, "--activations", "original"]
    assert run("calibrate", model, *options, "--keep-sums", "-o", first) == 0
    assert run("calibrate", model, *options, "--merge", first, "--keep-sums", "-o", second) == 0
    sums = Calibration.load(second).fits["0.norm"].sums
    assert sums is not None
    assert sums.sample.seen == 2 * 64 * 3
    assert run("calibrate", model, *options, "--merge", first, "-o", plain) == 0
    assert Calibration.load(plain).fits["0.norm"].sums is None
    told = failure(capsys, "calibrate", model, "--data", data, "--merge", first, "-o", plain)
    assert told.startswith("CalibrationError: site '1.norm' rests on fits of earlier sites")


def test_weights_of_an_empty_model_are_read_from_state(
    model: str, data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state, whole, lazy = (tmp_path / f"{name}.safetensors" for name in ("state", "whole", "lazy"))
    save_file(load_model(model).model.state_dict(), state)
    empty = model.replace(":load", ":empty")
    assert run("calibrate", model, "--data", data, "-o", whole) == 0
    options = ["--data", data, "-o", lazy, "--state", state]
    assert run("calibrate", empty, *options, "--memory", "64GB") == 0
    found, expected = load_file(lazy), load_file(whole)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-5)
    told = failure(capsys, "calibrate", empty, *options, "--memory", "9MB")
    assert told.startswith("OptionError: memory is 9 MB, and calibrating this model takes")
    told = failure(capsys, "calibrate", empty, *options, "--memory", "9XB")
    assert told == "OptionError: memory is '9XB'; allowed: bytes as in 8GB, 512MiB, 8000000000"
    told = failure(capsys, "calibrate", model, *options)
    assert told.startswith("OptionError: state is of modules that are built on the meta device")
    told = failure(capsys, "calibrate", empty, *options[:4])
    assert told.startswith("CaptureError: the weights of Sequential are on the meta device")


def test_report_may_be_written_twice_and_is_named(
    model: str, data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page, figures = tmp_path / "r.html", tmp_path / "r.json"
    options = ["--mode", "all", "--report", page, "--report", figures]
    assert convert(model, "-o", tmp_path / "o.onnx", "--data", data, *options) == 0
    printed = capsys.readouterr().out
    assert f"wrote {page}: {page.stat().st_size / 1e6:.1f} MB" in printed
    assert f"wrote {figures}: " in printed
    assert json.loads(figures.read_text())["exported"]["path"] == str(tmp_path / "o.onnx")


def test_inspect_writes_a_report(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("inspect", model, "--report", tmp_path / "found.html") == 0
    assert "Nothing was converted or measured" in (tmp_path / "found.html").read_text()
    assert "wrote " in capsys.readouterr().out


def test_report_that_cannot_be_written_is_refused_before_anything_is_done(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "o.onnx"
    expected = "OptionError: the report is 'r.pdf'; allowed: a file in .html or .json"
    assert failure(capsys, "convert", model, "-o", out, "--report", "r.pdf") == expected
    assert failure(capsys, "inspect", model, "--report", "r.pdf") == expected
    assert not out.exists()


def test_convert_takes_batches_from_a_function(model: str, tmp_path: Path) -> None:
    data = model.replace(":load", ":batches")
    assert convert(model, "-o", tmp_path / "o.onnx", "--data", data, "--max-error", "0.5") == 0


def test_convert_takes_what_it_wrote(model: str, data: str, tmp_path: Path) -> None:
    first, second = tmp_path / "first.onnx", tmp_path / "second.onnx"
    exclude = ["--exclude", "^1"]
    assert convert(model, "-o", first, "--data", data, "--mode", "all", *exclude) == 0
    assert convert(str(first), "-o", second, "--data", data, "--mode", "all") == 0
    assert [node.domain for node in onnx.load(second).graph.node].count("dyt") == 2


def test_convert_of_a_pt2_file_works(model: str, data: str, tmp_path: Path) -> None:
    namespace: dict[str, object] = {}
    exec(MODEL, namespace)
    module, args = namespace["load"]()  # type: ignore[operator]
    axes = ({0: torch.export.Dim.AUTO},)
    torch.export.save(torch.export.export(module, args, dynamic_shapes=axes), tmp_path / "m.pt2")
    out = tmp_path / "o.onnx"
    assert convert(str(tmp_path / "m.pt2"), "-o", out, "--data", data, "--mode", "all") == 0
    assert run("verify", tmp_path / "m.pt2", out, "--data", data, "--max-error", "0.9") == 0


def test_convert_without_data_is_exact(model: str, data: str, tmp_path: Path) -> None:
    out = tmp_path / "out.onnx"
    assert convert(model, "-o", out) == 0
    assert run("verify", model, out, "--data", data) == 0


def test_verify_fails_where_models_differ(
    model: str, data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.onnx"
    assert convert(model, "-o", out, "--data", data, "--mode", "all") == 0
    line = failure(capsys, "verify", model, out, "--data", data)
    assert line.startswith("VerificationError: relative error 0.")
    assert run("verify", model, out, "--data", data, "--max-error", "0.9") == 0


def test_convert_prints_the_frontier(
    model: str, data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--data", data, "--max-error", "0.3", "--frontier", "--report", tmp_path / "r.json"]
    assert convert(model, "-o", tmp_path / "o.onnx", *options) == 0
    printed = capsys.readouterr()
    assert all(len(line) <= 100 for line in printed.out.splitlines() if "wrote " not in line)
    frontier = json.loads((tmp_path / "r.json").read_text())["frontier"]
    assert [point["sites"] for point in frontier] == [1, 2]
    assert "relative error against converted sites, on the plan samples" in printed.out
    for point in frontier:
        (row,) = (line for line in printed.out.splitlines() if f"{point['error']:.3g} ±" in line)
        assert row.split()[:2] == [point["added"][0], str(point["sites"])]
        assert "█" in row


def test_convert_names_hard_sites_before_it_fits(tmp_path: Path) -> None:
    onnx.save(norms(["first", "last"]), tmp_path / "m.onnx")
    random = np.random.default_rng(0)
    np.savez(tmp_path / "d.npz", x=random.normal(size=(32, 4, 16)).astype(np.float32))
    options = ["--data", tmp_path / "d.npz", "--mode", "all", "-o", tmp_path / "o.onnx"]
    command = [sys.executable, "-m", "dyt_compile", "convert", tmp_path / "m.onnx", *options]
    told = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    warned = told.index("known to be hard to convert: first (first norm), last (final norm)")
    assert warned < told.index("calibrating")


METRIC = """
def share(output, inputs, places):
    assert inputs["input"].shape == output.shape == (len(places), 3, 8)
    return (output > 0).mean((1, 2))

def one(output, inputs, places):
    return 1.0
"""


def test_convert_and_verify_take_a_metric_from_a_file(
    model: str, data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "score.py").write_text(METRIC)
    metric = ["--metric", f"{tmp_path / 'score.py'}:share"]
    out = tmp_path / "o.onnx"
    options = ["--data", data, "--max-error", "0.2", *metric]
    assert convert(model, "-o", out, *options, "--report", tmp_path / "r.json") == 0
    assert "loss of share " in capsys.readouterr().out
    assert json.loads((tmp_path / "r.json").read_text())["metric"] == "share"
    assert run("verify", out, out, "--data", data, *metric) == 0
    assert "loss of share 0 ± 0 on 64 samples" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("metric", "expected"),
    [
        ("mse", "OptionError: --metric is 'mse'; allowed: relative, cosine, kl, top1, file.py:fun"),
        ("nix.py:share", "OptionError: file 'nix.py' does not exist"),
        ("score.py:nix", "OptionError: score.py has no function 'nix'"),
        ("score.py:one", "OptionError: metric one returned a float; allowed: one number for each"),
    ],
)
def test_convert_names_what_is_wrong_with_a_metric(
    metric: str,
    expected: str,
    model: str,
    data: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "score.py").write_text(METRIC)
    options = ["-o", "o.onnx", "--data", data, "--metric", metric]
    assert run("convert", model, *options) == 1
    assert expected in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "o.onnx").exists()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["-o", "o.onnx", "--frontier"], "OptionError: frontier needs mode 'budget' or 'all'"),
        (["-o", "o.onnx", "--mode", "all"], "OptionError: mode 'all' needs data"),
        (["-o", "o.txt"], "OptionError: -o is 'o.txt'; allowed: a file that ends in .onnx, .pt2"),
        (["-o", "o.onnx", "--opset", "9"], "OptionError: opset is 9; allowed: 18 to 23"),
        (["-o", "o.onnx", "--exclude", "("], "OptionError: exclude has '(', no regular"),
        (["-o", "o.onnx", "--output", "nix"], "OptionError: output is 'nix'; the model's are"),
        (["-o", "o.onnx", "--data", "nix.npz"], "DataError: data 'nix.npz' is no .npz file"),
        (["-o", "o.onnx", "--calibration", "c"], "OptionError: --calibration needs --data"),
        (["-o", "nix/o.onnx"], "ExportError: cannot write 'nix/o.onnx'"),
        (["-o", "o.onnx", "--provider", "cuda"], "OptionError: provider 'cuda' is not in this"),
        ([], "MissingParameter"),
    ],
)
def test_convert_names_what_is_wrong(
    arguments: Sequence[str],
    expected: str,
    model: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert failure(capsys, "convert", model, *arguments).startswith(expected)
    assert not list(tmp_path.glob("*o.onnx*"))
    assert not (tmp_path / "c").exists()


def _largest_difference(model: str, program: torch.export.ExportedProgram, data: str) -> float:
    """Between the original and a written program, relative to the largest value."""
    original = load_model(model).model.eval()
    x = torch.from_numpy(np.load(data)["input"])
    with torch.no_grad():
        f, g = original(x), program.module()(x)
    return float((f - g).abs().max() / f.abs().max())


def test_convert_writes_a_program_that_runs_without_this_package(
    model: str, data: str, tmp_path: Path
) -> None:
    out = tmp_path / "out.pt2"
    assert convert(model, "-o", out, "--data", data, "--mode", "all") == 0
    code = "import sys, torch; torch.export.load(sys.argv[1]).module()(torch.ones(3, 3, 8))"
    subprocess.run([sys.executable, "-c", code, str(out)], check=True)
    assert 0 < _largest_difference(model, torch.export.load(out), data) < 0.5
    assert run("inspect", out, "--json", tmp_path / "sites.json") == 0
    kinds = [s["kind"] for s in json.loads((tmp_path / "sites.json").read_text())["sites"]]
    assert kinds == ["dyt", "dyt"]


def test_convert_writes_eight_bits_and_tells_their_cost(
    model: str, data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, report = tmp_path / "out.onnx", tmp_path / "r.json"
    options = ["--mode", "all", "--fold", "--quantize", "int8", "--for", "onnxruntime"]
    assert convert(model, "--data", data, *options, "-o", out, "--report", report) == 0
    assert {"QuantizeLinear", "DequantizeLinear"} <= {n.op_type for n in onnx.load(out).graph.node}
    told = json.loads(report.read_text())["quantized"]
    assert (told["dtype"], told["runtime"], told["products"]) == ("int8", "onnxruntime", 2)
    assert [(name, bound) for name, bound, _ in told["sites"]] == [("0.norm", 1), ("1.norm", 1)]
    assert 0 < told["error"] < 0.01 < told["total"]
    printed = " ".join(capsys.readouterr().out.split())
    assert (
        f"2 products in int8 (for onnxruntime); relative error of quantising {told['error']:.3g}"
        in printed
    )
    assert f"with converting {told['total']:.3g}" in printed


def test_convert_quantises_onnx_files_alone(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = failure(capsys, "convert", model, "--quantize", "int8", "-o", tmp_path / "out.pt2")
    assert "--quantize, --for, --weights and --check are of .onnx files" in line
    line = failure(capsys, "convert", model, "--for", "openvino", "-o", tmp_path / "out.pt2")
    assert "are of .onnx files" in line


def test_convert_writes_weights(model: str, data: str, tmp_path: Path) -> None:
    out = tmp_path / "out.safetensors"
    options = ["--data", data, "--mode", "all", "--fit", "diagonal"]
    assert convert(model, "-o", out, *options, "--no-fold") == 0
    held = load_file(out)
    assert held["0.norm.alpha"].shape == (1,)
    assert {"0.linear.weight", "1.norm.gamma", "1.norm.beta"} <= set(held)


def test_convert_folds_and_says_so(model: str, data: str, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "out.safetensors"
    options = ["--data", data, "--mode", "all", "--fit", "diagonal"]
    assert convert(model, "-o", out, *options) == 0
    assert "0.norm.gamma" not in load_file(out)
    assert "folded into weights: " in capsys.readouterr().out


def test_convert_makes_affine_maps(model: str, data: str, tmp_path: Path) -> None:
    out, report = tmp_path / "out.onnx", tmp_path / "report.json"
    options = ["--data", data, "--max-error", "9", "--affine", "--report", report]
    assert convert(model, "-o", out, *options) == 0
    told = json.loads(report.read_text())
    assert told["affine"] == sum(site["affine"] for site in told["sites"]) > 0
    kinds = [node.op_type for node in onnx.load(out).graph.node]
    assert sum("DyT" in kind for kind in kinds) == told["converted"] - told["affine"]


def test_onnx_file_is_rewritten_beside_its_weights_and_compared(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = tmp_path / "first.onnx", tmp_path / "second.onnx"
    assert convert(model, "-o", first, "--weights", "copy") == 0
    assert convert(str(first), "-o", second, "--check", "structure") == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "not run: check is 'structure', structure equal: " in told
    assert run("verify", first, second) == 0
    assert "same structure: " in capsys.readouterr().out
    assert run("verify", first, second, "--weights") == 0
    line = failure(capsys, "verify", model, second)
    assert "is no .onnx file: without --data" in line
    line = failure(capsys, "convert", first, "-o", tmp_path / "o.pt2", "--weights", "link")
    assert "--weights and --check are of .onnx files" in line


@pytest.mark.parametrize("suffix", [".onnx", ".pt2", ".safetensors"])
def test_recover_writes_every_format_and_leaves_no_checkpoint(
    suffix: str, model: str, data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, report = tmp_path / f"out{suffix}", tmp_path / "r.json"
    options = ["--data", data, "--fit", "diagonal", "--steps", "40", "--report", report]
    assert run("recover", model, "-o", out, *options) == 0
    printed = capsys.readouterr()
    assert "(before recovery " in printed.out
    assert f"wrote {out}" in printed.out
    assert "recovering, held-out error" in printed.err
    written = json.loads(report.read_text())
    assert written["error"] < written["recovery"]["before"]
    assert written["recovery"]["steps"] == 40
    assert {path.name for path in tmp_path.iterdir()} == {
        "network.py", "data.npz", out.name, "r.json", *(["__pycache__"] if
        (tmp_path / "__pycache__").exists() else [])
    }  # fmt: skip


def test_recover_in_stages_tells_of_them(
    model: str, data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = tmp_path / "r.json"
    options = ["--data", data, "--fit", "diagonal", "--steps", "80", "--report", report]
    assert run("recover", model, "-o", tmp_path / "out.pt2", *options, "--staged") == 0
    assert "80 steps in 2 stages" in " ".join(capsys.readouterr().out.split())
    written = json.loads(report.read_text())
    assert [sites for _, sites in written["recovery"]["stages"]] == [1, 2]
    assert written["error"] < written["recovery"]["before"]


def test_recover_of_an_onnx_file_names_the_closed_form_fits(
    model: str, data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert convert(model, "-o", tmp_path / "m.onnx") == 0
    capsys.readouterr()
    line = failure(capsys, "recover", tmp_path / "m.onnx", "--data", data, "-o", tmp_path / "o.pt2")
    assert line.startswith("OptionError: MODEL is ")
    assert "closed-form fits" in line
    assert not (tmp_path / "o.pt2").exists()


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("m.onnx", b"no model", "CaptureError: "),
        ("m.pt2", b"no archive", "CaptureError: "),
        ("m.txt", b"", "OptionError: MODEL is "),
        ("network.py:nix", None, "OptionError: "),
        ("network.py:wrong", None, "CaptureError: "),
        ("nix.py:load", None, "OptionError: file 'nix.py' does not exist"),
        ("no.such.package:load", None, "OptionError: module 'no.such.package' cannot be imported"),
    ],
)
def test_inspect_names_what_is_wrong_with_a_model(
    name: str,
    content: bytes | None,
    expected: str,
    model: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    if content is not None:
        (tmp_path / name).write_bytes(content)
    assert failure(capsys, "inspect", name).startswith(expected)


def test_data_of_another_model_is_refused(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    np.savez(tmp_path / "other.npz", pixels=np.zeros((8, 5, 7), np.float32))
    line = failure(
        capsys, "convert", model, "-o", tmp_path / "o.onnx", "--data", tmp_path / "other.npz"
    )
    assert line.startswith("DataError: ")
    assert "pixels" in line


def test_verbose_shows_the_traceback(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("convert", model, "-o", tmp_path / "o.onnx", "--mode", "all", "--verbose") == 1
    assert "Traceback" in capsys.readouterr().err


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert run() == 0
    printed = capsys.readouterr().out
    assert all(verb in printed for verb in ("inspect", "calibrate", "convert", "verify"))


def test_inspect_of_an_onnx_file_imports_no_torch(model: str, data: str, tmp_path: Path) -> None:
    out = tmp_path / "out.onnx"
    assert convert(model, "-o", out) == 0
    code = (
        "import sys\nfrom dyt_compile.cli import main\n"
        f"try:\n    main(['inspect', {str(out)!r}])\n"
        "except SystemExit as stopped:\n    assert not stopped.code\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_module_runs_as_the_command_does() -> None:
    command = [sys.executable, "-m", "dyt_compile", "--help"]
    assert "inspect" in subprocess.run(command, check=True, capture_output=True, text=True).stdout
