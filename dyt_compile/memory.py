"""Memory: sizes as they are written, and what this process holds of it."""

from __future__ import annotations

import ctypes
import gc
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import OptionError

__all__ = ["bounded", "give_back", "parse_bytes", "resident_bytes", "told_bytes"]

UNITS: dict[str, int] = {"": 1, "b": 1} | {
    f"{prefix}{suffix}": base ** (power + 1)
    for power, prefix in enumerate("kmgt")
    for suffix, base in (("b", 1000), ("ib", 1024))
}
"""Powers of 1000, and with an "i" of 1024 (IEC 80000-13)."""


def parse_bytes(size: str | int) -> int:
    """Bytes of a size such as "8GB", "1.5 GiB" or a whole number of bytes.

    Raises OptionError for everything else, and below 1.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", str(size))
    factor = None if found is None else UNITS.get(found[2].lower())
    if found is None or factor is None or float(found[1]) * factor < 1:
        raise OptionError(f"memory is {size!r}; allowed: bytes as in 8GB, 512MiB, 8000000000")
    return round(float(found[1]) * factor)


def told_bytes(size: int) -> str:
    """A size in words: 1.24 GB."""
    for unit, factor in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if size >= factor:
            return f"{size / factor:.3g} {unit}"
    return f"{size} B"


def give_back() -> None:
    """Give the system what is freed and held for later: glibc does so from the end of a heap alone,
    below which one small block may keep hundreds of megabytes."""
    gc.collect()
    loaded = ctypes.pythonapi  # this process: glibc is in it already, or its like without a trim
    if sys.platform == "linux" and hasattr(loaded, "malloc_trim"):
        loaded.malloc_trim(0)


def resident_bytes() -> int:
    """What this process holds in memory now; where only the most so far is known, that.

    Raises OptionError on systems that tell neither.
    """
    status = Path("/proc/self/status")
    if status.exists():
        line = next(x for x in status.read_text().splitlines() if x.startswith("VmRSS"))
        return int(line.split()[1]) * 1024
    try:
        import resource
    except ImportError as error:
        raise OptionError(f"memory cannot be bounded on {sys.platform}: it is not told") from error
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


@contextmanager
def bounded(more_bytes: int) -> Iterator[None]:
    """MemoryError where this process takes more than so many bytes meanwhile, on Linux.

    For native code that makes lists as long as anyone's file says. It is a limit on the address
    space of the whole process: for a short time alone.
    """
    pages = Path("/proc/self/statm")
    if not pages.exists():
        yield
        return
    import resource

    before = resource.getrlimit(resource.RLIMIT_AS)
    limit = int(pages.read_text().split()[0]) * resource.getpagesize() + more_bytes
    if before[0] != resource.RLIM_INFINITY:
        limit = min(limit, before[0])
    resource.setrlimit(resource.RLIMIT_AS, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
