"""What code a figure depends on, as one short text."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

__all__ = ["digest"]


def digest(root: Path, patterns: Iterable[str]) -> str:
    """A digest of the files below a folder that match any of the patterns."""
    found = hashlib.sha256()
    for pattern in patterns:
        for path in sorted(filter(Path.is_file, root.glob(pattern))):
            found.update(path.read_bytes())
    return found.hexdigest()[:12]
