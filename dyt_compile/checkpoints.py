"""Checkpoints: named tensors and how far a run got, in one safetensors file, written whole."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from .errors import CalibrationError
from .files import replaced

__all__ = ["load_checkpoint", "save_checkpoint"]

VERSION = "1"


def save_checkpoint(
    path: Path, run: str, progress: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]
) -> None:
    """Write a checkpoint; a killed run leaves the one before, or this one.

    run: what the checkpoint belongs to; progress: JSON data. Raises ExportError where the folder
    cannot be written.
    """
    metadata = {"version": VERSION, "run": run, "progress": json.dumps(progress)}
    own = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    with replaced(path) as temporary:
        save_file(own, temporary, metadata)


def load_checkpoint(path: Path, run: str) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Progress and tensors of a checkpoint, on the CPU.

    Raises CalibrationError where the file is damaged, or belongs to another run.
    """
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise CalibrationError(f"checkpoint {str(path)!r} is damaged: {error}") from error
    if metadata.get("version") != VERSION or "progress" not in metadata:
        raise CalibrationError(
            f"{str(path)!r} is no checkpoint of recover, version {VERSION}; give another file"
        )
    if metadata.get("run") != run:
        raise CalibrationError(
            f"checkpoint {str(path)!r} belongs to another model, or to another choice of train, "
            "metric, output or seed; give another file, or delete it"
        )
    return json.loads(metadata["progress"]), tensors
