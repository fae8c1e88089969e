"""Cases that are kept: one of every message that bad input has met, as a JSON file."""

from __future__ import annotations

import base64
import json
import re
from pathlib import Path

from .cases import Case

__all__ = ["Corpus", "alike", "load"]


def alike(message: str) -> str:
    """A message without what differs between cases that are refused for one reason."""
    plain = re.sub(r"'[^']*'|\"[^\"]*\"|\[[^]]*\]|\([^)]*\)", "…", message)
    return re.sub(r"[-\d.e+]*\d[\w.+-]*", "0", plain)[:120]


class Corpus:
    """The first case of every kind and message."""

    def __init__(self) -> None:
        self._held: dict[tuple[str, str], tuple[str, Case]] = {}

    def lacks(self, kind: str, message: str) -> bool:
        """Whether no case of that kind was refused with a message like this one."""
        return (kind, alike(message)) not in self._held

    def add(self, kind: str, number: int, message: str, case: Case) -> None:
        """Take a case in."""
        self._held[kind, alike(message)] = f"{kind}/{number}", case

    def save(self, path: Path) -> None:
        """Write all that is held."""
        told = [
            {
                "name": name,
                "message": message,
                "arguments": case.arguments,
                "files": {file: base64.b64encode(b).decode() for file, b in case.files.items()},
            }
            for (_, message), (name, case) in sorted(self._held.items())
        ]
        lines = ",\n".join(json.dumps(each) for each in told)
        path.write_text(f"[\n{lines}\n]\n", encoding="utf-8")


def load(path: Path) -> list[Case]:
    """The cases of a file."""
    return [
        Case(
            tuple(each["arguments"]),
            {name: base64.b64decode(text) for name, text in each["files"].items()},
        )
        for each in json.loads(path.read_text(encoding="utf-8"))
    ]
