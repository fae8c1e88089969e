"""dyt-compile inspect: every normalization of a model."""

from __future__ import annotations

import json

from .. import compiler
from ..files import replaced
from ..report.terminal import match_table
from ..report.writing import check_target, write_report
from .options import JsonPath, Model, Reports, Trust, Verbose
from .progress import console, tell_written
from .sources import load_model

__all__ = ["inspect"]


def inspect(
    model: Model,
    json_path: JsonPath = None,
    report: Reports = None,
    trust: Trust = False,
    verbose: Verbose = False,
) -> None:
    """Find the norms of MODEL: what can be replaced, and what is refused, with the reason."""
    for path in report or ():
        check_target(path)
    source = load_model(model)
    found = compiler.inspect(source.model, source.args, source.kwargs, trust=trust)
    if json_path is not None:
        with replaced(json_path) as temporary:
            temporary.write_text(json.dumps(found.to_dict(), indent=2) + "\n", encoding="utf-8")
    console().print(match_table(found))
    for path in report or ():
        tell_written(write_report(found, path))
