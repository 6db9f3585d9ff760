"""Identifiers: UUIDv7, minted here because Postgres 16 has no ``uuidv7()``.

A batch's id carries its creation time, so its partition (``batch_day``) follows from it. An item's
id follows from its batch's id and its number: the low 32 bits of the batch's id XOR (seq + 1).
So items need neither a stored id nor an index over one, and both directions are arithmetic.
A batch's own files (its output, its errors, its input where that was no upload) have ids of the same
kind, with differences that no item has.
"""

import secrets
import time
from datetime import UTC, date, datetime
from typing import Literal
from uuid import UUID

_VERSION = 0x7 << 76
_VARIANT = 0b10 << 62
_SEQ_MASK = 0xFFFF_FFFF
_OUTPUT = 0xFFFF_FFFF
_INPUT = 0xFFFF_FFFE
_FIRST_ERROR = 0xC000_0000

BatchFileKind = Literal["output", "error", "input"]


def uuid7(at_ms: int | None = None) -> UUID:
    """A UUID of version 7 (RFC 9562): 48 bits of Unix milliseconds, 74 random bits."""
    ms = time.time_ns() // 1_000_000 if at_ms is None else at_ms
    random = secrets.randbits(74)
    return UUID(int=ms << 80 | _VERSION | (random >> 62) << 64 | _VARIANT | random & (1 << 62) - 1)


def created_on(batch_id: UUID) -> date:
    """The UTC day in a UUIDv7: the ``batch_day`` of a batch and of all its rows."""
    return datetime.fromtimestamp((batch_id.int >> 80) / 1000, tz=UTC).date()


def item_id(batch_id: UUID, seq: int) -> UUID:
    """The id of item ``seq`` (from 0) of a batch."""
    return UUID(int=batch_id.int ^ (seq + 1))


def item_seq(batch_id: UUID, item: UUID) -> int | None:
    """The number behind an item's id, or None when it cannot be an item of this batch."""
    difference = batch_id.int ^ item.int
    return difference - 1 if 0 < difference <= _SEQ_MASK >> 1 else None


def batch_file_id(batch_id: UUID, kind: BatchFileKind, *, redrives: int = 0) -> UUID:
    """The id of a batch's own file. The error file has another id after each redrive."""
    match kind:
        case "output":
            difference = _OUTPUT
        case "input":
            difference = _INPUT
        case "error":
            difference = _FIRST_ERROR + redrives
    return UUID(int=batch_id.int ^ difference)


def batch_file_kind(batch_id: UUID, file_id: UUID) -> tuple[BatchFileKind, int] | None:
    """What a file is to a batch and, of an error file, since which redrive; None: nothing."""
    match batch_id.int ^ file_id.int:
        case difference if difference == _OUTPUT:
            return "output", 0
        case difference if difference == _INPUT:
            return "input", 0
        case difference if _FIRST_ERROR <= difference < _INPUT:
            return "error", difference - _FIRST_ERROR
        case _:
            return None


def kin(any_id: UUID) -> tuple[UUID, UUID]:
    """The least and the most that the id of a batch can be to which this id belongs."""
    return UUID(int=any_id.int & ~_SEQ_MASK), UUID(int=any_id.int | _SEQ_MASK)
