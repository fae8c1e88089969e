"""Files damaged without regard to what they hold: bits flipped, cut short, pieces moved."""

from __future__ import annotations

from random import Random

__all__ = ["damaged"]

INTERESTING = (b"\x00", b"\xff", b"\x7f", b"\x80", b"\xff\xff\xff\xff", b"\x00\x00\x00\x80", b"\n")


def damaged(data: bytes, random: Random) -> bytes:
    """The bytes with one to eight changes."""
    changed = bytearray(data)
    for _ in range(random.choice((1, 1, 1, 2, 4, 8))):
        random.choice(_CHANGES)(changed, random)
    return bytes(changed)


def _flip(data: bytearray, random: Random) -> None:
    if data:
        data[random.randrange(len(data))] ^= 1 << random.randrange(8)


def _overwrite(data: bytearray, random: Random) -> None:
    at = random.randrange(len(data) + 1)
    piece = random.choice(INTERESTING)
    data[at : at + len(piece)] = piece


def _cut(data: bytearray, random: Random) -> None:
    del data[random.randrange(len(data) + 1) :]


def _remove(data: bytearray, random: Random) -> None:
    at = random.randrange(len(data) + 1)
    del data[at : at + random.randrange(1, 64)]


def _insert(data: bytearray, random: Random) -> None:
    at = random.randrange(len(data) + 1)
    data[at:at] = random.randbytes(random.randrange(1, 32))


def _repeat(data: bytearray, random: Random) -> None:
    start = random.randrange(len(data) + 1)
    at = random.randrange(len(data) + 1)
    data[at:at] = data[start : start + random.randrange(1, 256)]


_CHANGES = (_flip, _flip, _flip, _overwrite, _cut, _remove, _insert, _repeat)
