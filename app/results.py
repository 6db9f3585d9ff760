"""Output and error files of batches. They are not stored: their lines are made from rows when read.

A line belongs to the event that ended its item. Events are numbered under the batch's lock, so the
order of their numbers is the order of completion, and a line's place never changes: what comes later
comes behind. Where which byte is, is measured when somebody first asks, and kept (`result_parts`):
sizes are known without reading the replies. So a file can be followed while its batch runs, from
any byte on, and what was read stays as it was.

Failed items that are put back leave the error file; so it has a new id after each redrive, and the
old one is gone. The input of a batch that was not made from a file can be read in the same way.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date, datetime, timedelta
from typing import Final
from uuid import UUID

from app.db import Connection, NoRow, Query
from app.ids import BatchFileKind, batch_file_kind, kin

PART_BYTES: Final = 256 * 1024
"""A part is closed when it has so many bytes."""

_EVENT_ROWS: Final = 40  # measured at a time; each may tell of hundreds of items
_KINDS: Final[dict[BatchFileKind, list[str]]] = {
    "output": ["item-completed"],
    "error": ["item-failed", "item-cancelled"],
}
_LAST_NO: Final = 2**62


@dataclass(frozen=True, slots=True, kw_only=True)
class Owner:
    """The batch that a file belongs to. ``output_lines``, ``error_lines``: so far."""

    workspace_id: UUID
    batch_id: UUID
    batch_day: date
    endpoint: str
    redrives: int
    is_finished: bool
    created_at: datetime
    output_expires_s: int | None
    output_lines: int
    error_lines: int
    resource_ids: list[UUID]


@dataclass(frozen=True, slots=True, kw_only=True)
class ResultFile:
    """A file of a batch, as it is now.

    ``is_complete``: nothing will be added any more. ``measured``: whether ``bytes`` counts every
    line that there is; else `measure` it first. ``begun_at``: when its first line came to be.
    """

    owner: Owner
    file_id: UUID
    kind: BatchFileKind
    bytes: int
    is_measured: bool
    is_complete: bool
    begun_at: datetime | None
    expires_at: datetime | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """Whole lines of a file: from a byte on, those of the events from one number to another."""

    begin: int
    bytes: int
    first_no: int
    last_no: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ResultLine:
    """A line with its line break. ``no``: of its event, or of its item when read by input."""

    no: int
    is_answered: bool
    line: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class _Id:
    file_id: UUID


@dataclass(frozen=True, slots=True, kw_only=True)
class _Known:
    bytes: int
    indexed_no: int
    begun_at: datetime | None
    deleted_at: datetime | None
    last_no: int
    now: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class _Held:
    bytes: int
    indexed_no: int


@dataclass(frozen=True, slots=True, kw_only=True)
class _Size:
    event_no: int
    at: datetime
    no: int | None
    bytes: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Bytes:
    bytes: int


_result_owner = Query("results", "result_owner", Owner)
_result_files_page = Query("results", "result_files_page", _Id)
_result_file_get = Query("results", "result_file_get", _Known)
_result_file_make = Query("results", "result_file_make", NoRow)
_result_file_lock = Query("results", "result_file_lock", _Held)
_result_file_extend = Query("results", "result_file_extend", NoRow)
_result_file_delete = Query("results", "result_file_delete", NoRow)
_result_files_forget = Query("results", "result_files_forget", NoRow)
_result_parts_from = Query("results", "result_parts_from", Part)
_result_sizes = Query("results", "result_sizes", _Size)
_result_lines = Query("results", "result_lines", ResultLine)
_result_lines_by_input = Query("results", "result_lines_by_input", ResultLine)
_request_lines = Query("results", "request_lines", ResultLine)
_request_bytes = Query("results", "request_bytes", _Bytes)


async def find(
    conn: Connection, *, workspace_id: UUID, environment_id: UUID, file_id: UUID
) -> ResultFile | None:
    """The batch's file with this id; None: there is none, or it has no line yet, or no more."""
    least, most = kin(file_id)
    owner = await _result_owner.one_or_none(
        conn,
        workspace_id=workspace_id,
        environment_id=environment_id,
        from_id=least,
        to_id=most,
    )
    found = batch_file_kind(owner.batch_id, file_id) if owner is not None else None
    if owner is None or found is None:
        return None
    kind, redrives = found
    if kind == "input":
        size = await _request_bytes.one(conn, **_batch(owner), endpoint=owner.endpoint)
        return ResultFile(
            owner=owner,
            file_id=file_id,
            kind=kind,
            bytes=size.bytes,
            is_measured=True,
            is_complete=True,
            begun_at=owner.created_at,
            expires_at=None,
        )
    if kind == "error" and redrives != owner.redrives:
        return None
    if not (owner.output_lines if kind == "output" else owner.error_lines):
        return None
    known = await _result_file_get.one(conn, **_batch(owner), kind=kind)
    expires_at = None
    if owner.output_expires_s is not None and known.begun_at is not None:
        expires_at = known.begun_at + timedelta(seconds=owner.output_expires_s)
    if known.deleted_at is not None or (expires_at is not None and expires_at <= known.now):
        return None
    return ResultFile(
        owner=owner,
        file_id=file_id,
        kind=kind,
        bytes=known.bytes,
        is_measured=known.indexed_no >= known.last_no,
        is_complete=owner.is_finished,
        begun_at=known.begun_at,
        expires_at=expires_at,
    )


async def page(
    conn: Connection,
    *,
    workspace_id: UUID,
    environment_id: UUID,
    allowed: Sequence[UUID] | None,
    after: UUID | None,
    newest_first: bool,
    most: int,
) -> list[UUID]:
    """Ids of output and error files that have lines, beyond ``after``.

    ``allowed``: only of batches whose resources are all among these.
    """
    rows = await _result_files_page.all(
        conn,
        workspace_id=workspace_id,
        environment_id=environment_id,
        resource_ids=None if allowed is None else list(allowed),
        after=after,
        newest_first=newest_first,
        most=most,
    )
    return [row.file_id for row in rows]


async def measure(conn: Connection, *, of: ResultFile) -> bool:
    """Measure some more lines of a file; False when there were none left. Needs a transaction."""
    await _result_file_make.run(conn, **_key(of))
    held = await _result_file_lock.one(conn, **_key(of))
    rows = await _result_sizes.all(
        conn,
        **_batch(of.owner),
        after=held.indexed_no,
        most_rows=_EVENT_ROWS,
        kinds=_KINDS[of.kind],
    )
    if not rows:
        return False
    parts = _parts(rows, held.bytes)
    await _result_file_extend.run(
        conn,
        **_key(of),
        begins=[part.begin for part in parts],
        sizes=[part.bytes for part in parts],
        first_nos=[part.first_no for part in parts],
        last_nos=[part.last_no for part in parts],
        bytes=parts[-1].begin + parts[-1].bytes if parts else held.bytes,
        indexed_no=rows[-1].event_no,
        begun_at=next((row.at for row in rows if row.no is not None), None),
    )
    return True


def _parts(rows: Sequence[_Size], begin: int) -> list[Part]:
    parts: list[Part] = []
    first: int | None = None
    size = 0
    lines = [(row.no, row.bytes) for row in rows if row.no is not None and row.bytes is not None]
    for position, (no, line) in enumerate(lines, start=1):
        first = no if first is None else first
        size += line
        if size >= PART_BYTES or position == len(lines):
            parts.append(Part(begin=begin, bytes=size, first_no=first, last_no=no))
            begin, size, first = begin + size, 0, None
    return parts


async def parts(conn: Connection, *, of: ResultFile, at: int, most: int = 100) -> list[Part]:
    """The part that holds a byte, and those after it, as far as they have been measured."""
    return await _result_parts_from.all(conn, **_key(of), at=at, most=most)


async def part_bytes(conn: Connection, *, of: ResultFile, part: Part) -> bytes:
    """A part's lines."""
    rows = await _result_lines.all(
        conn,
        **_batch(of.owner),
        kinds=_KINDS[of.kind],
        from_no=part.first_no,
        to_no=part.last_no,
        most=part.bytes,
    )
    return b"".join([row.line for row in rows])


async def lines_after(
    conn: Connection, *, owner: Owner, number: int, most: int
) -> list[ResultLine]:
    """Lines of both files together, of the events after a number."""
    return await _result_lines.all(
        conn,
        **_batch(owner),
        kinds=[kind for each in _KINDS.values() for kind in each],
        from_no=number + 1,
        to_no=_LAST_NO,
        most=most,
    )


async def lines_by_input(
    conn: Connection, *, of: ResultFile, from_seq: int, most: int
) -> list[ResultLine]:
    """A file's lines in the order of the input, of the items from a number on."""
    if of.kind == "input":
        return await _request_lines.all(
            conn, **_batch(of.owner), endpoint=of.owner.endpoint, from_no=from_seq, most=most
        )
    return await _result_lines_by_input.all(
        conn, **_batch(of.owner), kinds=_KINDS[of.kind], from_no=from_seq, most=most
    )


async def owner_of(
    conn: Connection, *, workspace_id: UUID, environment_id: UUID, batch_id: UUID
) -> Owner | None:
    """A batch as the owner of its files, or None."""
    return await _result_owner.one_or_none(
        conn,
        workspace_id=workspace_id,
        environment_id=environment_id,
        from_id=batch_id,
        to_id=batch_id,
    )


async def delete(conn: Connection, *, of: ResultFile) -> bool:
    """Show a file no more; the rows that it is made of go with their batch."""
    await _result_file_make.run(conn, **_key(of))
    return await _result_file_delete.run(conn, **_key(of)) > 0


async def forget(conn: Connection) -> int:
    """Forget where the lines of batches were that are gone; how many files."""
    return await _result_files_forget.run(conn)


def _batch(owner: Owner) -> dict[str, object]:
    return {
        "workspace_id": owner.workspace_id,
        "batch_day": owner.batch_day,
        "batch_id": owner.batch_id,
    }


def _key(of: ResultFile) -> dict[str, object]:
    return {
        "workspace_id": of.owner.workspace_id,
        "batch_id": of.owner.batch_id,
        "kind": of.kind,
    }
