"""``/v1/files`` as OpenAI has it: upload, list, read, delete; and what batches make of themselves."""

from typing import Annotated, Final
from uuid import UUID

from litestar import Response, Router, delete, get, post
from litestar.di import Provide
from litestar.params import PathParameter, QueryParameter
from litestar.response import Stream

from app import files, results
from app.access import Principal
from app.api import contents, openai_wire, uploads
from app.api.auth import Caller, authenticate, caller, require_resources
from app.api.context import Context, Given
from app.api.described import Answer
from app.api.errors import AnyRequest
from app.api.openai_wire import ErrorAnswer, FileDeleted, FileObject, FilesPage
from app.api.query import number
from app.db import Connection
from app.errors import NotFoundError, Problem, ValidationError
from app.files import File
from app.results import ResultFile

#: Fewer than OpenAI's 10,000 in a page: an output file's size may have to be measured for it.
_MOST: Final = 1000

FileId = Annotated[str, PathParameter(name="file_id", description="file-…")]
Refused = Answer(ErrorAnswer, description="Something is wrong with the request")
Missing = Answer(ErrorAnswer, description="There is no such file")


def allowed(key: Principal) -> list[UUID] | None:
    """The resources that a key is confined to; None: it may use all."""
    return None if "*" in key.resources else [UUID(r) for r in key.resources]


@post(
    "/",
    action="file:create",
    summary="Upload a file",
    description="multipart/form-data with the fields purpose, expires_after[anchor] and "
    "expires_after[seconds], and the part file. It is stored while it arrives.",
    status_code=200,
    request_max_body_size=None,  # counted while it arrives, with a sentence that helps
    responses={
        200: Answer(FileObject, description="The file"),
        400: Refused,
        413: Answer(ErrorAnswer, description="The file is too large"),
    },
)
async def create(request: AnyRequest, context: Given, caller: Caller) -> Response[bytes]:
    stored = await uploads.store_file(context, request, caller)
    return openai_wire.answer(openai_wire.file_object(stored))


@get(
    "/",
    action="file:list",
    summary="List files",
    description="Uploads, and the output and error files of batches that have any line.",
    responses={200: Answer(FilesPage, description="A page of files"), 400: Refused},
)
async def list_files(
    *,
    context: Given,
    caller: Caller,
    after: Annotated[str | None, QueryParameter(description="last id of the page before")] = None,
    limit: Annotated[str | None, QueryParameter(description="1 to 10000")] = None,
    order: Annotated[str | None, QueryParameter(description="desc (newest first) or asc")] = None,
    purpose: Annotated[str | None, QueryParameter(description="only files for this")] = None,
) -> Response[bytes]:
    most = min(number(limit, "limit", default=_MOST, least=1, most=10_000), _MOST)
    if order not in (None, "asc", "desc"):
        raise ValidationError([Problem(path="order", message="must be asc or desc")])
    beyond = openai_wire.file_id_of(after) if after is not None else None
    newest_first = order != "asc"
    stored: list[File] = []
    made: list[UUID] = []
    async with context.db.connection() as conn:
        if purpose is None or purpose in uploads.PURPOSES:
            stored = await files.page(
                conn,
                workspace_id=caller.workspace_id,
                environment_id=caller.environment_id,
                purpose=purpose,
                after=beyond,
                newest_first=newest_first,
                most=most + 1,
            )
        if purpose in (None, "batch_output"):
            made = await results.page(
                conn,
                workspace_id=caller.workspace_id,
                environment_id=caller.environment_id,
                allowed=allowed(caller),
                after=beyond,
                newest_first=newest_first,
                most=most + 1,
            )
    by_id = {file.file_id: openai_wire.file_object(file) for file in stored}
    ids = sorted([*by_id, *made], reverse=newest_first)
    data: list[FileObject] = []
    for file_id in ids[:most]:
        known = by_id.get(file_id)
        if known is None:
            # A file that was deleted or expired since is left out.
            result = await _result(context, caller, file_id)
            known = openai_wire.result_file_object(result) if result is not None else None
        if known is not None:
            data.append(known)
    return openai_wire.answer(
        FilesPage(
            data=data,
            has_more=len(ids) > most and bool(data),
            first_id=data[0].id if data else None,
            last_id=data[-1].id if data else None,
        )
    )


@get(
    "/{file_id:str}",
    action="file:get",
    summary="Read about a file",
    responses={200: Answer(FileObject, description="The file"), 404: Missing},
)
async def retrieve(context: Given, caller: Caller, file_id: FileId) -> Response[bytes]:
    match await _found(context, caller, file_id):
        case File() as stored:
            return openai_wire.answer(openai_wire.file_object(stored))
        case result:
            return openai_wire.answer(openai_wire.result_file_object(result))


@get(
    "/{file_id:str}/content",
    action="file:get",
    summary="Read a file",
    description="Whole or by Range. An output or error file can be read while its batch runs: "
    "x-sluice-complete says whether more will come, x-sluice-next-offset from which byte on.",
    responses={
        200: Answer(bytes, description="The file", media_type="application/octet-stream"),
        206: Answer(bytes, description="The range", media_type="application/octet-stream"),
        400: Refused,
        404: Missing,
        416: Answer(ErrorAnswer, description="The range begins at the end of the file, or beyond"),
    },
)
async def content(
    *,
    request: AnyRequest,
    context: Given,
    caller: Caller,
    file_id: FileId,
    order: Annotated[
        str | None,
        QueryParameter(description="completion, or input for a batch that has ended"),
    ] = None,
) -> Response[bytes] | Stream:
    if order not in (None, "completion", "input"):
        raise ValidationError([Problem(path="order", message="must be completion or input")])
    range_header = request.headers.get("range")
    match await _found(context, caller, file_id):
        case File() as stored:
            return contents.stored(context.db, stored, range_header=range_header)
        case result if order == "input" or result.kind == "input":
            return contents.result_by_input(context.db, result)
        case result:
            return contents.result(context.db, result, range_header=range_header)


@delete(
    "/{file_id:str}",
    action="file:delete",
    summary="Delete a file",
    description="An output or error file is not shown any more; its batch keeps its items.",
    status_code=200,
    responses={200: Answer(FileDeleted, description="It is gone"), 404: Missing},
)
async def remove(context: Given, caller: Caller, file_id: FileId) -> Response[bytes]:
    match await _found(context, caller, file_id):
        case File() as stored:
            async with context.db.connection() as conn:
                deleted = await files.delete(
                    conn,
                    workspace_id=caller.workspace_id,
                    environment_id=caller.environment_id,
                    file_id=stored.file_id,
                )
        case result if result.kind == "input":
            raise ValidationError(
                [Problem(path="id", message="is made of the batch's own requests; it stays")]
            )
        case result:
            async with context.db.transaction() as conn:
                deleted = await results.delete(conn, of=result)
    if not deleted:
        raise openai_wire.no_file(file_id)
    return openai_wire.answer(FileDeleted(id=file_id))


async def stored_file(conn: Connection, key: Principal, name: str) -> File | None:
    """An upload of the caller's environment, or None."""
    try:
        file_id = openai_wire.file_id_of(name)
    except NotFoundError:
        return None
    return await files.get(
        conn,
        workspace_id=key.workspace_id,
        environment_id=key.environment_id,
        file_id=file_id,
    )


async def _found(context: Context, key: Principal, name: str) -> File | ResultFile:
    """A file that the caller may see. Raises NotFoundError or ForbiddenError."""
    async with context.db.connection() as conn:
        stored = await stored_file(conn, key, name)
    if stored is not None:
        return stored
    result = await _result(context, key, openai_wire.file_id_of(name))
    if result is None:
        raise openai_wire.no_file(name)
    require_resources(key, result.owner.resource_ids)
    return result


async def _result(context: Context, key: Principal, file_id: UUID) -> ResultFile | None:
    return await contents.measured(
        context.db,
        workspace_id=key.workspace_id,
        environment_id=key.environment_id,
        file_id=file_id,
    )


router = Router(
    "/v1/files",
    route_handlers=[create, list_files, retrieve, content, remove],
    guards=[authenticate],
    dependencies={"caller": Provide(caller)},
    tags=["OpenAI files"],
)
