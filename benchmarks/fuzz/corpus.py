"""Cases that are kept, as a JSON file: one of every message that bad input has met, every fault."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import zlib
from collections.abc import Iterator
from pathlib import Path

from .cases import Case

__all__ = ["Corpus", "alike", "load"]

QUOTED = r"'[^']*'|\"[^\"]*\"|\[[^]]*\]|\([^)]*\)|--?[a-zA-Z][\w-]*"


def alike(message: str) -> str:
    """A message without what differs between cases that are refused for one reason."""
    return re.sub(r"[-\d.e+]*\d[\w.+-]*", "0", re.sub(QUOTED, "…", message))[:100]


class Corpus:
    """The first case of every message, behind those that a file holds already."""

    def __init__(self, path: Path | None = None) -> None:
        self._held: dict[str, tuple[str, Case]] = {}
        for message, name, case in _held(path) if path is not None and path.exists() else ():
            self._held[message] = name, case

    def lacks(self, message: str) -> bool:
        """Whether no case was refused with a message like this one."""
        return alike(message) not in self._held

    def add(self, name: str, message: str, case: Case) -> None:
        """Take a case in."""
        self._held[alike(message)] = name, case

    def save(self, path: Path) -> None:
        """Write all that is held; files that several cases share stand there once."""
        contents: dict[str, str] = {}
        told = []
        for message, (name, case) in sorted(self._held.items()):
            files = {}
            for file, data in case.files.items():
                key = hashlib.blake2b(data, digest_size=6).hexdigest()
                contents[key] = base64.b64encode(zlib.compress(data, 9)).decode()
                files[file] = key
            told.append(
                {"name": name, "message": message, "arguments": case.arguments, "files": files}
            )
        text = json.dumps({"cases": told, "contents": contents}, indent=0)
        path.write_text(text + "\n", encoding="utf-8")


def load(path: Path) -> list[Case]:
    """The cases of a file."""
    return [case for _, _, case in _held(path)]


def _held(path: Path) -> Iterator[tuple[str, str, Case]]:
    """Messages as they are alike, names and cases."""
    held = json.loads(path.read_text(encoding="utf-8"))
    contents = {k: zlib.decompress(base64.b64decode(v)) for k, v in held["contents"].items()}
    for each in held["cases"]:
        files = {file: contents[key] for file, key in each["files"].items()}
        yield each["message"], each["name"], Case(tuple(each["arguments"]), files)
