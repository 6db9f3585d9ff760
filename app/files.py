"""Stored files: uploads and their contents, which lie in Postgres in pieces of a mebibyte.

A file is written piece by piece while it arrives, each piece in a transaction of its own: a long
upload holds nothing back, and nobody sees the file before it is complete. What was broken off is
deleted by whoever took it in, or by maintenance if that process died.
"""

from dataclasses import dataclass
from datetime import datetime
from typing import Final
from uuid import UUID

from app.db import Connection, NoRow, Query
from app.ids import uuid7

CHUNK: Final = 1024 * 1024
"""Bytes of every piece but the last."""

_ABANDONED_HOURS: Final = 24  # no client sends one file for a day


@dataclass(frozen=True, slots=True, kw_only=True)
class File:
    """A complete file."""

    workspace_id: UUID
    file_id: UUID
    purpose: str
    filename: str
    bytes: int
    created_at: datetime
    expires_at: datetime | None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Piece:
    data: bytes


_file_begin = Query("files", "file_begin", NoRow)
_file_chunk_append = Query("files", "file_chunk_append", NoRow)
_file_finish = Query("files", "file_finish", File)
_file_get = Query("files", "file_get", File)
_files_page = Query("files", "files_page", File)
_file_delete = Query("files", "file_delete", NoRow)
_file_chunk_get = Query("files", "file_chunk_get", _Piece)
_files_prune = Query("files", "files_prune", NoRow)


async def begin(conn: Connection, *, workspace_id: UUID, environment_id: UUID) -> UUID:
    """A file that is about to arrive; its id. Nobody sees it before ``finish``."""
    file_id = uuid7()
    await _file_begin.run(
        conn, workspace_id=workspace_id, environment_id=environment_id, file_id=file_id
    )
    return file_id


async def append(
    conn: Connection, *, workspace_id: UUID, file_id: UUID, no: int, data: bytes
) -> None:
    """Write piece ``no`` (from 0): ``CHUNK`` bytes of it, fewer only at its end."""
    await _file_chunk_append.run(conn, workspace_id=workspace_id, file_id=file_id, no=no, data=data)


async def finish(
    conn: Connection,
    *,
    workspace_id: UUID,
    file_id: UUID,
    purpose: str,
    filename: str,
    size: int,
    expires_s: float | None,
) -> File:
    """Let a file be seen, whose pieces are all written. ``expires_s``: None never."""
    return await _file_finish.one(
        conn,
        workspace_id=workspace_id,
        file_id=file_id,
        purpose=purpose,
        filename=filename,
        bytes=size,
        expires_s=expires_s,
    )


async def get(
    conn: Connection, *, workspace_id: UUID, environment_id: UUID, file_id: UUID
) -> File | None:
    """A complete file, or None."""
    return await _file_get.one_or_none(
        conn, workspace_id=workspace_id, environment_id=environment_id, file_id=file_id
    )


async def page(
    conn: Connection,
    *,
    workspace_id: UUID,
    environment_id: UUID,
    purpose: str | None,
    after: UUID | None,
    newest_first: bool,
    most: int,
) -> list[File]:
    """Files of an environment beyond ``after``, by their ids, which begin with their time."""
    return await _files_page.all(
        conn,
        workspace_id=workspace_id,
        environment_id=environment_id,
        purpose=purpose,
        after=after,
        newest_first=newest_first,
        most=most,
    )


async def delete(
    conn: Connection, *, workspace_id: UUID, environment_id: UUID, file_id: UUID
) -> bool:
    """Delete a file, complete or not; whether there was one."""
    deleted = await _file_delete.run(
        conn, workspace_id=workspace_id, environment_id=environment_id, file_id=file_id
    )
    return deleted > 0


async def read(
    conn: Connection, *, workspace_id: UUID, file_id: UUID, at: int, most: int = CHUNK
) -> bytes | None:
    """Bytes from an offset on, at most ``most`` and to the end of their piece.

    Empty at the end of the file and beyond; None when there is no such piece.
    """
    no, within = divmod(at, CHUNK)
    piece = await _file_chunk_get.one_or_none(
        conn, workspace_id=workspace_id, file_id=file_id, no=no, at=within, bytes=most
    )
    return None if piece is None else piece.data


async def prune(conn: Connection, *, most: int = 20) -> int:
    """Delete some files that expired or whose upload was broken off; how many."""
    return await _files_prune.run(conn, most=most, abandoned_hours=_ABANDONED_HOURS)
