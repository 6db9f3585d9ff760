"""Multipart uploads, taken apart as they arrive: a file of any size in memory for a mebibyte or two.

The parts may come in any order. Of a file nothing is seen before the whole request was read and
found right; what was written of it until then is deleted when it turns out wrong or breaks off.
"""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Final
from uuid import UUID

from litestar.exceptions import ClientException, InternalServerException
from multipart import (  # pyright: ignore[reportMissingTypeStubs] - annotated, without py.typed
    MultipartError,
    MultipartSegment,
    PushMultipartParser,
)

from app import files
from app.access import Principal
from app.api.context import Context
from app.api.errors import AnyRequest, BrokenOffError
from app.db import CONNECTION_ERRORS
from app.errors import Problem, RequestError, TooLargeError, ValidationError
from app.files import CHUNK, File
from app.log import Log
from app.settings import Settings

log = Log("api")

#: What may be uploaded; batch_output is what batches make.
PURPOSES: Final = ("assistants", "batch", "evals", "fine-tune", "user_data", "vision")

_MOST_FIELD_BYTES: Final = 1024
_MOST_PARTS: Final = 20
_SLACK: Final = 64 * 1024  # of a request beside its file
_MOST_NAME: Final = 512
_LEAST_S: Final = 3600
_MOST_S: Final = 30 * 86_400
_MOST_DIGITS: Final = 9
_DAY_S: Final = 86_400


class _Form:
    """The parts of a request: its fields, and how much of the file has come."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._name = ""
        self.fields: dict[str, bytes] = {}
        self.filename: str | None = None
        self.size = 0

    def begin(self, part: MultipartSegment) -> None:
        """What comes from now on belongs to this part."""
        self._name = part.name or ""
        if self._name == "file":
            if self.filename is not None:
                raise _malformed()
            self.filename = (part.filename or "file")[:_MOST_NAME]
        else:
            self.fields[self._name] = b""

    def take(self, data: bytes) -> bytes:
        """Keep what belongs to a field; what belongs to the file is given back."""
        if self._name != "file":
            text = self.fields[self._name] + data
            if len(text) > _MOST_FIELD_BYTES:
                raise _malformed()
            self.fields[self._name] = text
            return b""
        self.size += len(data)
        self.check_size()
        return data

    def check_size(self) -> None:
        """Raises TooLargeError."""
        most, name = self._settings.max_file_bytes, "SLUICE_MAX_FILE_BYTES"
        if self.fields.get("purpose") == b"batch":
            most, name = self._settings.max_batch_file_bytes, "SLUICE_MAX_BATCH_FILE_BYTES"
        if self.size > most:
            raise _too_large(most, name)

    def purpose(self) -> str:
        """What for. Raises ValidationError, also for what is wrong with the file as a whole."""
        problem: tuple[str, str] | None = None
        purpose = self.fields.get("purpose", b"").decode("latin-1")
        if self.filename is None:
            problem = ("file", "is required")
        elif "\0" in self.filename:
            problem = ("file", "has a name that cannot be stored")
        elif not self.size:
            problem = ("file", "is empty")
        elif not purpose:
            problem = ("purpose", "is required")
        elif purpose not in PURPOSES:
            problem = ("purpose", f"must be one of {', '.join(PURPOSES)}")
        if problem is not None:
            raise ValidationError([Problem(path=problem[0], message=problem[1])])
        self.check_size()
        return purpose

    def expires_s(self) -> float | None:
        """Seconds until it is deleted; None: never. Raises ValidationError."""
        anchor = self.fields.get("expires_after[anchor]")
        seconds = self.fields.get("expires_after[seconds]")
        if anchor is None and seconds is None:
            is_batch = self.fields.get("purpose") == b"batch"
            return self._settings.batch_file_days * _DAY_S if is_batch else None
        if anchor != b"created_at":
            raise ValidationError(
                [Problem(path="expires_after[anchor]", message="must be created_at")]
            )
        digits = seconds is not None and seconds.isdigit() and len(seconds) < _MOST_DIGITS
        if seconds is None or not digits or not _LEAST_S <= int(seconds) <= _MOST_S:
            raise ValidationError(
                [
                    Problem(
                        path="expires_after[seconds]",
                        message=f"must be a whole number from {_LEAST_S} to {_MOST_S}",
                    )
                ]
            )
        return float(seconds)


async def store_file(context: Context, request: AnyRequest, key: Principal) -> File:
    """Store the file of a request. Raises RequestError; then nothing of it is kept."""
    parser = _parser(request)
    announced = request.headers.get("content-length", "")
    if announced.isdecimal() and int(announced) > context.settings.max_file_bytes + _SLACK:
        raise _too_large(context.settings.max_file_bytes, "SLUICE_MAX_FILE_BYTES")
    async with context.db.connection() as conn:
        file_id = await files.begin(
            conn, workspace_id=key.workspace_id, environment_id=key.environment_id
        )
    kept = False
    try:
        form = _Form(context.settings)
        no = 0
        async with aclosing(_pieces(request, parser, form)) as pieces:
            async for piece in pieces:
                async with context.db.connection() as conn:
                    await files.append(
                        conn, workspace_id=key.workspace_id, file_id=file_id, no=no, data=piece
                    )
                no += 1
        purpose, expires_s = form.purpose(), form.expires_s()
        async with context.db.connection() as conn:
            stored = await files.finish(
                conn,
                workspace_id=key.workspace_id,
                file_id=file_id,
                purpose=purpose,
                filename=form.filename or "",
                size=form.size,
                expires_s=expires_s,
            )
        kept = True
    finally:
        if not kept:
            # Also when the request was cancelled, as a client that leaves cancels it.
            await asyncio.shield(_discard(context, key, file_id))
    log.info("file.stored", file=file_id, bytes=stored.bytes)
    return stored


async def _discard(context: Context, key: Principal, file_id: UUID) -> None:
    try:
        async with context.db.connection() as conn:
            await files.delete(
                conn,
                workspace_id=key.workspace_id,
                environment_id=key.environment_id,
                file_id=file_id,
            )
    except CONNECTION_ERRORS:
        log.info("file.left", file=file_id)


def _parser(request: AnyRequest) -> PushMultipartParser:
    kind, options = request.content_type
    boundary = options.get("boundary")
    if kind != "multipart/form-data" or not boundary:
        raise RequestError(
            "Send the file as multipart/form-data with the fields purpose and file.",
            details={"param": "file"},
        )
    try:
        return PushMultipartParser(boundary, max_segment_count=_MOST_PARTS)
    except MultipartError:
        raise _malformed() from None


async def _pieces(
    request: AnyRequest, parser: PushMultipartParser, form: _Form
) -> AsyncGenerator[bytes]:
    """The file in pieces of ``CHUNK``, the last one shorter; ``form`` is filled on the way."""
    waiting = bytearray()
    try:
        async for received in request.stream():
            for event in parser.parse(received) if received else ():
                if isinstance(event, MultipartSegment):
                    form.begin(event)
                elif event:
                    waiting += form.take(bytes(event))
            while len(waiting) >= CHUNK:
                yield bytes(waiting[:CHUNK])
                del waiting[:CHUNK]
        parser.close()
    except MultipartError:
        raise _malformed() from None
    except (InternalServerException, ClientException):
        raise BrokenOffError("The connection closed before the whole file had come.") from None
    if waiting:
        yield bytes(waiting)


def _too_large(most: int, name: str) -> TooLargeError:
    return TooLargeError(
        f"The file is larger than {most:,} bytes ({name}); split it.", details={"param": "file"}
    )


def _malformed() -> RequestError:
    return RequestError(
        "The body is not the multipart/form-data that its header announces: one part named file, "
        "short fields beside it.",
        details={"param": "file"},
    )
