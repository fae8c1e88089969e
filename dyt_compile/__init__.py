"""Find the norms of a transformer, replace them by Dynamic Tanh, and say what that costs."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__all__ = [
    "Calibration",
    "Conversion",
    "DytCompileError",
    "EngineReport",
    "Folded",
    "InductorPass",
    "Match",
    "NormKind",
    "NormSite",
    "PluginInfo",
    "Quantization",
    "Refusal",
    "Report",
    "__version__",
    "backend",
    "build_engine",
    "build_plugin",
    "calibrate",
    "convert",
    "convert_for_training",
    "export_onnx",
    "fold",
    "inspect",
    "plugin_info",
    "recover",
    "write_report",
]

__version__ = "0.1.0"

if TYPE_CHECKING:
    from .backends import InductorPass, backend
    from .calibration import Calibration
    from .compiler import Conversion, calibrate, convert, fold, inspect
    from .errors import DytCompileError
    from .exporters.engine_report import EngineReport
    from .exporters.onnx import export_onnx
    from .exporters.plugin.build import PluginInfo, build_plugin, plugin_info
    from .exporters.tensorrt import build_engine
    from .passes.fold import Folded
    from .passes.quantize import Quantization
    from .recovery import recover
    from .report import Report
    from .report.writing import write_report
    from .sites import Match, NormKind, NormSite, Refusal
    from .training import convert_for_training

_HOMES = {
    "Calibration": "calibration",
    "Conversion": "compiler",
    "DytCompileError": "errors",
    "EngineReport": "exporters.engine_report",
    "Folded": "passes.fold",
    "InductorPass": "backends",
    "Match": "sites",
    "NormKind": "sites",
    "NormSite": "sites",
    "PluginInfo": "exporters.plugin.build",
    "Quantization": "passes.quantize",
    "Refusal": "sites",
    "Report": "report",
    "backend": "backends",
    "build_engine": "exporters.tensorrt",
    "build_plugin": "exporters.plugin.build",
    "calibrate": "compiler",
    "convert": "compiler",
    "convert_for_training": "training",
    "export_onnx": "exporters.onnx",
    "fold": "compiler",
    "inspect": "compiler",
    "plugin_info": "exporters.plugin.build",
    "recover": "recovery",
    "write_report": "report.writing",
}


def __getattr__(name: str) -> Any:
    # Names come in when they are used: the ONNX route starts without torch, the CLI at once.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if _HOMES[name] == "backends":  # it uses torch before it could check its version
        importlib.import_module(".nn", __name__)
    return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)
