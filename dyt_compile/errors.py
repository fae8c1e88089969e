"""Every error that a user can meet. Each message names the thing, its value and what is allowed."""

__all__ = [
    "BudgetError",
    "CalibrationError",
    "CaptureError",
    "DataError",
    "DytCompileError",
    "ExportError",
    "MissingDependencyError",
    "OptionError",
    "RankError",
    "RewriteError",
    "VerificationError",
    "first_line",
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


def first_line(error: BaseException) -> str:
    """The first line of a foreign error that says something, to be told in one of ours."""
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
