"""ONNX Runtime: sessions over models in memory or in files, in any of its dtypes."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from .dyt import DOMAIN
from .errors import CaptureError, DataError, MissingDependencyError, OptionError, first_line
from .files import work_folder
from .graphs.onnx_files import externals, load
from .graphs.onnx_fusion import unfuse
from .graphs.onnx_precision import holds, surface, widen
from .graphs.onnx_weights import EMBEDDED_BYTES, save, weight_bytes
from .ranks import current

__all__ = ["PROVIDERS", "Session", "as_plugins", "parse_provider", "provider_options"]

Array = npt.NDArray[Any]
BFLOAT16, FP8 = ir.DataType.BFLOAT16, ir.DataType.FLOAT8E4M3FN

FATAL = 4

CPU = "CPUExecutionProvider"

CUDA = "CUDAExecutionProvider"
TENSORRT = "TensorrtExecutionProvider"

PROVIDERS = {"cpu": [CPU], "cuda": [CUDA, CPU], "tensorrt": [TENSORRT, CUDA, CPU]}
"""What runs a model, the first that can; written "tensorrt:LIBRARY", with a library of plugins."""

EXTERNAL_FOLDER = "session.model_external_initializers_file_folder_path"
"""ONNX Runtime's key for where the external data of a model given as bytes lies."""

PLUGIN_DOMAIN = "trt.plugins"
"""Where ONNX Runtime's TensorRT provider expects the plugins of a library."""

INTEGERS_ALONE = "QDQSelectorActionTransformer"
"""An optimizer of ONNX Runtime; that of 1.24 puts kernels for integers behind quantizers to FP8."""

PROVIDER_OPTIONS = {
    CUDA: {"use_tf32": "0"},  # it rounds what float32 products read to 10 bits
}


class Session:
    """A model that runs. Arrays go in and come out in the order of its inputs and outputs.

    bfloat16 arrays are `ml_dtypes.bfloat16`. ONNX Runtime has almost no bfloat16 kernels for CPUs:
    there such nodes run in float32, and their results are rounded to bfloat16.

    folder: where the external data of a file lies, by default beside it.

    Raises OptionError for an unknown or unavailable provider, CaptureError where ONNX Runtime
    does not take the model, MissingDependencyError without ONNX Runtime.
    """

    def __init__(
        self, model: ir.Model | Path, provider: str = "cpu", folder: Path | None = None
    ) -> None:
        if importlib.util.find_spec("onnxruntime") is None:
            raise MissingDependencyError("onnxruntime", "cpu")
        import onnxruntime

        name, library = parse_provider(provider)
        wanted = _available(name, onnxruntime.get_available_providers())
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = current().threads
        options.log_severity_level = FATAL  # its errors are raised, its warnings are its own
        self._narrow: set[str] = set()
        loaded = load(model, folder) if isinstance(model, Path) else model
        widened = holds(loaded, BFLOAT16)
        changed = widened or library is not None
        if changed:
            loaded = loaded.clone()
        if widened:
            self._widen(loaded, on_cpu=wanted[0] == CPU)
        if library is not None:
            as_plugins(loaded)
            register(library)
        with ExitStack() as temporary:
            unchanged = isinstance(model, Path) and not changed and folder is None
            source = str(model) if unchanged else _source(loaded, temporary, options)
            providers = [(each, provider_options(each, library)) for each in wanted]
            try:
                self._session = onnxruntime.InferenceSession(
                    source,
                    options,
                    providers=providers,
                    disabled_optimizers=[INTEGERS_ALONE] if holds(loaded, FP8) else [],
                )
            except Exception as error:
                raise CaptureError(
                    f"ONNX Runtime does not take the model: {first_line(error)}"
                ) from error
        self.inputs = [value.name for value in self._session.get_inputs()]
        self.outputs = [value.name for value in self._session.get_outputs()]

    def run(self, arrays: Sequence[Array]) -> list[Array]:
        """All outputs for all inputs."""
        feeds = {
            name: array.astype(np.float32) if name in self._narrow else array
            for name, array in zip(self.inputs, arrays, strict=True)
        }
        try:
            results = self._session.run(self.outputs, feeds)
        except Exception as error:
            raise DataError(f"the model cannot run on a batch: {first_line(error)}") from error
        return [
            result.astype(ml_dtypes.bfloat16) if name in self._narrow else result
            for name, result in zip(self.outputs, results, strict=True)
        ]

    def _widen(self, model: ir.Model, *, on_cpu: bool) -> None:
        """Float32 where the session cannot take bfloat16: outside always, on CPUs inside too."""
        self._narrow = {
            str(value.name)
            for value in (*model.graph.inputs, *model.graph.outputs)
            if value.dtype is BFLOAT16
        }
        surface(model, BFLOAT16, outside=BFLOAT16)
        if on_cpu:
            unfuse(model)  # the Add of a fused form is one of the kernels that are missing
            widen(model, BFLOAT16)


def parse_provider(provider: str) -> tuple[str, Path | None]:
    """The name of a provider, and the library of plugins that follows "tensorrt:".

    Raises OptionError for another name, a library of another provider, and one that is no file.
    """
    name, colon, rest = str(provider).partition(":")
    if name not in PROVIDERS:
        raise OptionError(f"provider is {provider!r}; allowed: {', '.join(PROVIDERS)}")
    if not colon:
        return name, None
    if name != "tensorrt":
        raise OptionError(f"provider is {provider!r}; a library follows 'tensorrt:' alone")
    if not Path(rest).is_file():
        raise OptionError(f"provider is {provider!r}; its plugin library does not exist")
    return name, Path(rest).absolute()


def provider_options(name: str, library: Path | None) -> dict[str, str]:
    """Options of one of ONNX Runtime's providers, with a library of TensorRT plugins or none."""
    options = dict(PROVIDER_OPTIONS.get(name, {}))
    if name != CPU and current().local:
        options["device_id"] = str(current().local)
    if name == TENSORRT and library is not None:
        options["trt_extra_plugin_lib_paths"] = str(library)
    return options


def register(library: Path) -> None:
    """Put a library's plugins into this process's TensorRT.

    ONNX Runtime only opens the library, and ours, one for TensorRT 10 and 11, registers nothing
    by itself. Raises MissingDependencyError without TensorRT, CaptureError for another library.
    """
    if importlib.util.find_spec("tensorrt") is None:
        raise MissingDependencyError("tensorrt", "gpu")
    import tensorrt

    if tensorrt.get_plugin_registry().load_library(str(library)) is None:
        raise CaptureError(f"TensorRT does not take {str(library)!r} as a library of plugins")


def as_plugins(model: ir.Model) -> None:
    """Call every DyT as a plugin of ONNX Runtime's TensorRT provider instead of its function.

    It inlines functions, and knows a library's plugins in a domain of its own alone.
    """
    for node in model.graph.all_nodes():
        if node.domain == DOMAIN:
            node.domain = PLUGIN_DOMAIN
    for identifier in [key for key in model.functions if key[0] == DOMAIN]:
        del model.functions[identifier]
    if model.opset_imports.pop(DOMAIN, None) is not None:
        model.opset_imports[PLUGIN_DOMAIN] = 1


def _source(model: ir.Model, temporary: ExitStack, options: Any) -> str | bytes:
    """The model as bytes, or as a temporary file where it is too large for protobuf.

    Weights in the files of one folder stay there, and the options say where that is.
    """
    homes = {str(tensor.base_dir) for tensor in externals(model)}
    here = sum(tensor.nbytes for tensor in externals(model))
    if len(homes) == 1 and weight_bytes(model) - here <= EMBEDDED_BYTES:
        options.add_session_config_entry(EXTERNAL_FOLDER, str(Path(homes.pop()).absolute()))
    elif weight_bytes(model) > EMBEDDED_BYTES:
        path = temporary.enter_context(work_folder()) / "model.onnx"
        save(model, path, "copy")
        return str(path)
    else:
        model = ir.external_data.load_to_model(model.clone())
    data: bytes = ir.serde.serialize_model(model).SerializeToString()
    return data


def _available(provider: str, available: Sequence[str]) -> list[str]:
    wanted = PROVIDERS[provider]
    if wanted[0] not in available:
        raise OptionError(
            f"provider {provider!r} is not in this ONNX Runtime, which has: "
            f"{', '.join(available)}; install it with: pip install 'dyt-compile[gpu]'"
        )
    return [name for name in wanted if name in available]
