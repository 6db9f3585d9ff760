"""The contents of files, whole or by range: stored ones, and those that batches make.

A file whose batch still runs ends where its last line ended when it was asked for. The headers
``x-sluice-complete`` and ``x-sluice-next-offset`` say so, and where to go on; what was read once
stays as it was. A range that begins at that end is not satisfiable yet: 416, with the same headers.
"""

import re
from collections.abc import AsyncGenerator, Callable
from typing import Final
from uuid import UUID

from litestar import Response
from litestar.response import Stream

from app import files, results
from app.api.openai_wire import ErrorAnswer, ErrorObject
from app.api.wire import encode
from app.db import Database
from app.errors import RequestError
from app.files import File
from app.results import ResultFile

#: The bytes of a file from one offset to another.
_Read = Callable[[int, int], AsyncGenerator[bytes]]

_RANGE: Final = re.compile(r"bytes=(\d{0,18})-(\d{0,18})")
_PARTS: Final = 50  # looked up at a time
_FEW: Final = 16  # lines, until their size is known
_STEP_BYTES: Final = 1024 * 1024
_MOST_LINES: Final = 2000


def stored(db: Database, file: File, *, range_header: str | None) -> Response[bytes] | Stream:
    """A stored file, or what of it was asked for."""

    def read(begin: int, end: int) -> AsyncGenerator[bytes]:
        return _stored_bytes(db, file, begin, end)

    headers = {"content-disposition": _attachment(file.filename)}
    return _ranged(file.bytes, range_header, read, headers=headers, is_complete=True)


def result(db: Database, file: ResultFile, *, range_header: str | None) -> Response[bytes] | Stream:
    """A file of a batch, in the order of completion, or what of it was asked for."""

    def read(begin: int, end: int) -> AsyncGenerator[bytes]:
        return _result_bytes(db, file, begin, end)

    headers = {
        "x-sluice-complete": "true" if file.is_complete else "false",
        "x-sluice-next-offset": str(file.bytes),
    }
    return _ranged(file.bytes, range_header, read, headers=headers, is_complete=file.is_complete)


def result_by_input(db: Database, file: ResultFile) -> Stream:
    """A file of a batch that has ended, in the order of the input; always whole."""
    if not file.is_complete:
        raise RequestError(
            "The batch still runs: its files are in the order of completion. Leave order away, or "
            "ask again when it has ended.",
            details={"param": "order"},
        )
    return Stream(
        _lines_by_input(db, file),
        status_code=200,
        media_type="application/octet-stream",
        headers={"x-sluice-complete": "true", "accept-ranges": "none"},
    )


async def measured(
    db: Database, *, workspace_id: UUID, environment_id: UUID, file_id: UUID
) -> ResultFile | None:
    """A batch's file with its present size, or None."""
    for measures in (True, False):
        async with db.connection() as conn:
            file = await results.find(
                conn, workspace_id=workspace_id, environment_id=environment_id, file_id=file_id
            )
        if file is None or file.is_measured or not measures:
            return file
        has_more = True
        while has_more:
            async with db.transaction() as conn:
                has_more = await results.measure(conn, of=file)
    return None


def _ranged(
    size: int,
    range_header: str | None,
    read: _Read,
    *,
    headers: dict[str, str],
    is_complete: bool,
) -> Response[bytes] | Stream:
    headers = {**headers, "accept-ranges": "bytes"}
    wanted = _range(range_header, size)
    if wanted is None:
        begin, end, status = 0, size, 200
    else:
        begin, end = wanted
        status = 206
        if begin >= end:
            return _unsatisfiable(size, headers, is_complete=is_complete)
        # Of a file that grows nobody knows the whole size yet.
        total = str(size) if is_complete else "*"
        headers["content-range"] = f"bytes {begin}-{end - 1}/{total}"
    headers["content-length"] = str(end - begin)
    return Stream(
        read(begin, end),
        status_code=status,
        media_type="application/octet-stream",
        headers=headers,
    )


def _unsatisfiable(size: int, headers: dict[str, str], *, is_complete: bool) -> Response[bytes]:
    why = (
        "The range begins at or beyond the end of the file."
        if is_complete
        else "There is no more of the file yet; ask again while x-sluice-complete is false."
    )
    error = ErrorObject(
        message=why, type="invalid_request_error", param="range", code="range_not_satisfiable"
    )
    return Response(
        encode(ErrorAnswer(error=error)),
        status_code=416,
        media_type="application/json",
        headers={**headers, "content-range": f"bytes */{size}"},
    )


def _range(header: str | None, size: int) -> tuple[int, int] | None:
    """What a Range asks for: begin and end. None: the whole, as for several ranges (RFC 9110)."""
    found = _RANGE.fullmatch(header.replace(" ", "")) if header is not None else None
    if found is None or found[0] == "bytes=-":
        return None
    first, last = found[1], found[2]
    if not first:
        return max(size - int(last), 0), size
    if last and int(last) < int(first):
        return None
    return int(first), min(int(last) + 1, size) if last else size


def _attachment(filename: str) -> str:
    plain = re.sub(r'[^\x20-\x7e]|["\\]', "_", filename)
    return f'attachment; filename="{plain}"'


async def _stored_bytes(db: Database, file: File, begin: int, end: int) -> AsyncGenerator[bytes]:
    while begin < end:
        async with db.connection() as conn:
            piece = await files.read(
                conn,
                workspace_id=file.workspace_id,
                file_id=file.file_id,
                at=begin,
                most=min(files.CHUNK, end - begin),
            )
        if not piece:
            return  # it was deleted meanwhile; the length that was announced shows it
        begin += len(piece)
        yield piece


async def _result_bytes(
    db: Database, file: ResultFile, begin: int, end: int
) -> AsyncGenerator[bytes]:
    while begin < end:
        async with db.connection() as conn:
            parts = await results.parts(conn, of=file, at=begin, most=_PARTS)
        if not parts:
            return
        for part in parts:
            if part.begin >= end:
                return
            async with db.connection() as conn:
                data = await results.part_bytes(conn, of=file, part=part)
            if len(data) != part.bytes:
                return  # failed items were put back meanwhile: this file is no more
            yield data[max(begin - part.begin, 0) : end - part.begin]
            begin = part.begin + part.bytes


async def _lines_by_input(db: Database, file: ResultFile) -> AsyncGenerator[bytes]:
    from_seq, most = 0, _FEW
    while True:
        async with db.connection() as conn:
            rows = await results.lines_by_input(conn, of=file, from_seq=from_seq, most=most)
        if not rows:
            return
        size = sum(len(row.line) for row in rows)
        yield b"".join([row.line for row in rows])
        from_seq = rows[-1].no + 1
        most = min(max(_STEP_BYTES * len(rows) // size, 1), _MOST_LINES)
