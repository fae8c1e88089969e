"""Models in local Hugging Face folders (config.json and safetensors), read by transformers."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

from .errors import CaptureError, MissingDependencyError, first_line
from .weights import Weights, open_weights

if TYPE_CHECKING:
    import torch

__all__ = ["example_inputs", "is_folder", "load_folder", "open_folder"]

ROWS = 2
SECOND = 16_000
"""Samples of speech, at the rate of every speech model in transformers."""


def is_folder(path: Path) -> bool:
    """Whether the path is a folder that holds a config.json."""
    return (path / "config.json").is_file()


def load_folder(path: Path) -> torch.nn.Module:
    """The model of a folder, of the class that its config names, in evaluation mode.

    Only safetensors are read, and no code of the folder runs. Raises CaptureError, or
    MissingDependencyError without transformers.
    """
    with _reading(path):
        family, config = _family(path)
        return _ready(family.from_pretrained(
            path, config=config, local_files_only=True, use_safetensors=True
        ))  # fmt: skip


def open_folder(path: Path) -> tuple[torch.nn.Module, Weights | None]:
    """The model of a folder on the meta device, and where its weights lie.

    They are loaded, and None comes with them, where some are not in the files as the model has
    them: merged from several, or quantized. Raises as `load_folder`.
    """
    with _reading(path):
        family, config = _family(path)
        found = _over_stand_ins(family, config, open_weights(path))
    return found or (load_folder(path), None)


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    _check_names(path)
    if importlib.util.find_spec("transformers") is None:
        raise MissingDependencyError("transformers", "huggingface")
    try:
        yield
    except Exception as error:
        raise CaptureError(
            f"transformers cannot load the folder {str(path)!r}: {first_line(error)}"
        ) from error


def _family(path: Path) -> tuple[Any, Any]:
    """The class of a folder's model, and its config."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(
        path, local_files_only=True, trust_remote_code=False
    )
    name = next(iter(config.architectures or ()), "AutoModel")
    family = getattr(transformers, name, None)
    if not (isinstance(family, type) and issubclass(family, transformers.PreTrainedModel)):
        family = transformers.AutoModel
    return family, config


def _over_stand_ins(
    family: Any, config: Any, weights: Weights
) -> tuple[torch.nn.Module, Weights] | None:
    """The model, loaded from tensors of one element each, by which its own are known again.

    So transformers itself says which name of a file is which of the model's, ties them and
    computes its buffers. None where a tensor is another than those.
    """
    if not hasattr(family, "config_class") or hasattr(config, "quantization_config"):
        return None
    stand_ins = {name: _stand_in(weights, name, config.dtype) for name in weights.places}
    model, told = family.from_pretrained(
        None, config=config, state_dict=stand_ins, output_loading_info=True
    )
    origins = {tensor.data_ptr(): name for name, tensor in stand_ins.items()}
    names, absent = {}, {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        origin = origins.get(tensor.data_ptr())
        if origin is not None:
            names[name] = origin
            absent[name] = tensor.new_empty(tensor.shape, device="meta")
        elif name not in told["missing_keys"]:
            return None
    model.load_state_dict(absent, strict=False, assign=True)
    model.tie_weights()
    return _ready(model), weights.renamed(names)


def _stand_in(weights: Weights, name: str, dtype: torch.dtype | None) -> torch.Tensor:
    """A tensor of the shape of one in a file, of one element; in the dtype that a model has."""
    import torch

    own = weights.dtype(name)
    kept = own if dtype is None or not own.is_floating_point else dtype
    return torch.zeros((), dtype=kept).expand(weights.shape(name))


def _ready(model: Any) -> torch.nn.Module:
    """The model in evaluation mode, and without a cache, which no converted model is used for."""
    if hasattr(model.config, "use_cache"):
        model.config.use_cache = False
    ready: torch.nn.Module = model.eval()
    return ready


def _check_names(path: Path) -> None:
    """Raise CaptureError where a file of the folder names something outside of it.

    transformers joins the names of shards to the folder as they are, and takes an implementation of
    the name "owner/kernel" for a library to be downloaded.
    """
    for file in (path / "config.json", *sorted(path.glob("*.index.json"))):
        try:
            held = json.loads(file.read_text(encoding="utf-8"))
        except (ValueError, OSError, RecursionError) as error:
            raise CaptureError(f"{str(file)!r} is no JSON: {first_line(error)}") from error
        for key, name in _named(held, ""):
            inside = PurePath(name).name == name
            if not inside and (key.endswith("_implementation") or file.name != "config.json"):
                raise CaptureError(
                    f"{str(file)!r} names {name!r} for {key!r}; allowed: names without a folder"
                )


def _named(data: Any, key: str) -> Iterator[tuple[str, str]]:
    """Every text below a key, with the innermost key that it has."""
    if isinstance(data, str):
        yield key, data
    elif isinstance(data, Mapping):
        for name, value in data.items():
            yield from _named(value, name)
    elif isinstance(data, list):
        for value in data:
            yield from _named(value, key)


def example_inputs(model: Any, length: int) -> dict[str, torch.Tensor]:
    """Keyword arguments that a transformers model takes; `length`: tokens, where it takes tokens.

    Raises CaptureError for a kind of input that is not known here.
    """
    import torch

    config = model.config
    name = str(model.main_input_name)
    tokens = torch.arange(ROWS * length).reshape(ROWS, length) % int(_of(config, "vocab_size", 2))
    if name == "input_ids":
        inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    elif name == "pixel_values":
        size = _of(config, "image_size", 224)
        height, width = size if isinstance(size, (tuple, list)) else (size, size)
        channels = int(_of(config, "num_channels", 3))
        inputs = {"pixel_values": torch.zeros(ROWS, channels, int(height), int(width))}
    elif name == "input_values":
        inputs = {"input_values": torch.zeros(ROWS, SECOND)}
    elif name == "input_features":
        frames = 2 * int(_of(config, "max_source_positions", 1500))
        inputs = {"input_features": torch.zeros(ROWS, int(_of(config, "num_mel_bins", 80)), frames)}
    else:
        raise CaptureError(
            f"{type(model).__name__} takes {name!r}, for which no example is known: pass data"
        )
    if getattr(config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = tokens
    return inputs


def _of(config: Any, name: str, default: Any) -> Any:
    """A setting of a config, or of the vision or text config that it holds."""
    parts = (getattr(config, f"{part}_config", None) for part in ("vision", "text"))
    found = (getattr(place, name, None) for place in (config, *parts))
    return next((value for value in found if value is not None), default)
