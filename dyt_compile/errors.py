"""Every error that a user can meet. Each message names the thing, its value and what is allowed."""

import unicodedata

__all__ = [
    "BudgetError",
    "CalibrationError",
    "CaptureError",
    "DataError",
    "DytCompileError",
    "ExportError",
    "MemoryExhaustedError",
    "MissingDependencyError",
    "OptionError",
    "OutdatedDependencyError",
    "RankError",
    "RewriteError",
    "VerificationError",
    "first_line",
    "out_of_memory",
    "printable",
]


class DytCompileError(Exception):
    """Parent of all errors that this package raises on purpose."""


class OptionError(DytCompileError):
    """An argument or a flag has a value that is not allowed."""


class CaptureError(DytCompileError):
    """A model cannot be read or traced."""


class DataError(DytCompileError):
    """Batches do not fit the model, or there are too few of them."""


class CalibrationError(DytCompileError):
    """A calibration file is damaged or belongs to another model."""


class RankError(DytCompileError):
    """A process of a job of several is lost, or they do not meet."""


class RewriteError(DytCompileError):
    """A site cannot be replaced in its graph."""


class BudgetError(DytCompileError):
    """The measured error on held-out samples exceeds the budget."""


class VerificationError(DytCompileError):
    """A converted or exported model does not compute what it should."""


class ExportError(DytCompileError):
    """A model cannot be written in the form that was asked for."""


class MissingDependencyError(DytCompileError):
    """An optional dependency is not installed."""

    def __init__(self, module: str, extra: str) -> None:
        super().__init__(
            f"{module!r} is not installed; install it with: pip install 'dyt-compile[{extra}]'"
        )


class OutdatedDependencyError(DytCompileError):
    """A dependency is installed in a version that is too old."""

    def __init__(self, package: str, version: str, least: str) -> None:
        super().__init__(
            f"{package} {version} is installed, at least {least} is needed; install it with: "
            f"pip install --upgrade '{package}>={least}'"
        )


class MemoryExhaustedError(DytCompileError):
    """There is not enough memory; `foreign`: how a library said so."""

    def __init__(self, foreign: BaseException) -> None:
        super().__init__(
            f"not enough memory ({first_line(foreign)}); smaller batches need less (--batch-size)"
        )


OUT_OF_MEMORY = (
    "bad_alloc",
    "can't allocate memory",  # torch, on CPUs
    "Cannot allocate memory",  # the system
    "Failed to allocate memory",  # ONNX Runtime
    "out of memory",  # CUDA
)


def out_of_memory(error: BaseException) -> BaseException | None:
    """The error, or the one behind it, by which a library says that memory is exhausted."""
    found: BaseException | None = error
    while found is not None:
        told = str(found)
        if isinstance(found, MemoryError) or any(words in told for words in OUT_OF_MEMORY):
            return found
        found = found.__cause__
    return None


def first_line(error: BaseException) -> str:
    """The first line of a foreign error that says something, to be told in one of ours."""
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)


def printable(text: str) -> str:
    """The text for a terminal: what would move its cursor, or turn its lines, is spelled out.

    A model's names are anyone's; line feeds stay.
    """
    return text if text.isprintable() else "".join(map(_shown, text))


def _shown(character: str) -> str:
    unseen = unicodedata.category(character)[0] == "C" or character in "\u2028\u2029"
    spelled = character.encode("unicode_escape").decode()
    return spelled if unseen and character != "\n" else character
