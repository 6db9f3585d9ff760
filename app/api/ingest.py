"""A request's body becomes a batch, whatever its size.

The body is spooled to disk as it arrives and walked twice. The first walk reads everything but the
requests themselves and finds what is wrong with the whole; then resources are resolved and checked
against the caller's key; only then a transaction begins and the second walk feeds the items to it.
All heavy work runs in worker threads, a megabyte at a time, so that the event loop answers others.
A dry run (``estimate_batch``) walks the same way and stores nothing.
"""

import asyncio
import errno
import hashlib
import io
import json
import re
import tempfile
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Annotated, Any, BinaryIO, TypeVar, cast
from uuid import UUID

import msgspec
from litestar.exceptions import InternalServerException
from pydantic import ValidationError as PydanticError

from app import (
    batches,
    capacity,
    forecast,
    intake,
    prices,
    quotas,
    resources,
    webhooks,
    workspaces,
)
from app.access import Principal
from app.api import auth
from app.api.context import Context
from app.api.errors import AnyRequest, BrokenOffError, StorageFullError
from app.api.splitter import STEP, MalformedError, Splitter, TooLongError
from app.api.wire import problems_of
from app.api.wire_batches import BatchHead, problems_of_deadline
from app.api.wire_capacity import amounts, capacity_entries
from app.api.wire_webhooks import CallbackOptions, callback_options
from app.batches import BatchType
from app.capacity import Amount
from app.crossroads import crossroads
from app.db import Connection
from app.doorbell import EVENTS, WORK
from app.errors import (
    NotFoundError,
    Problem,
    TooLargeError,
    ValidationError,
)
from app.forecast import Plan
from app.intake import Appraisal, Appraiser, Ingest, NewBatch, NewItem
from app.log import Log
from app.resources import Resource
from app.validator import quota_of

log = Log("api")

_ITEMS = "items"
_FEW = 2000  # items per step
_MOST_RESOURCES = 1000
_MOST_CUSTOM_ID = 512
_MOST_ATTEMPTS = 100
_MOST_KEY = 200
_SLACK = 64 * 1024  # of an item beside its request: ids and unknown keys

_WHERE = re.compile(r"^(?P<what>.*?)(?: - at `\$(?P<path>[^`]*)`)?$", re.DOTALL)

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Created:
    """The batch that a request made, or (``replayed``) had made before."""

    batch_id: UUID
    type: BatchType
    replayed: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimated:
    """What a batch would ask for, and when it would be done."""

    appraisal: Appraisal
    plan: Plan
    expires_at: datetime | None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Spooled:
    file: BinaryIO
    sha256: bytes


class _Message(msgspec.Struct, gc=False):
    """One element of ``messages``, as far as it must be right for any provider."""

    role: str


class _Vmx(msgspec.Struct, rename="camel"):
    """What ``request.vmx`` may say. ``secondary_model_index``: see app.crossroads; the last is refused."""

    correlation_id: Annotated[str, msgspec.Meta(min_length=1, max_length=200)] | None = None
    metadata: dict[str, str] | None = None
    timeout_ms: Annotated[int, msgspec.Meta(ge=100, le=600_000)] | None = None
    provider_args: dict[str, Any] | None = None
    secondary_model_index: Annotated[int, msgspec.Meta(ge=0)] | None = None
    resource_config_overrides: object = None


class _Request(msgspec.Struct, gc=False):
    """A chat completion, as far as it must be right for any provider; unknown keys are its own."""

    messages: Annotated[list[_Message], msgspec.Meta(min_length=1)]
    vmx: _Vmx | None = None


class _Item(msgspec.Struct, rename="camel", gc=False):
    """One element of ``items``; unknown keys are ignored."""

    resource_id: UUID | None = None
    resource: str | None = None
    request: msgspec.Raw = msgspec.Raw(b"")
    custom_id: str | None = None
    max_attempts: int | None = None

    @property
    def asks(self) -> UUID | str:
        """The resource: its id or its name."""
        return self.resource_id if self.resource_id is not None else self.resource or ""


_decode_item = msgspec.json.Decoder(_Item).decode
_decode_items = msgspec.json.Decoder(list[_Item]).decode
_decode_request = msgspec.json.Decoder(_Request).decode


@dataclass(frozen=True, slots=True, kw_only=True)
class _Examined:
    """What the first walk found. ``asked``: resources by id or name, and the first item of each."""

    head: BatchHead
    items: int
    items_at: int
    asked: dict[UUID | str, int]


async def create_batch(context: Context, request: AnyRequest, key: Principal) -> Created:
    """Create the batch that a request's body describes. Raises RequestError; then nothing is kept."""
    async with _spooled(context, request) as body:
        found = await _examine(context, body.file)
        head = found.head
        idempotency_key = _idempotency_key(request, head)
        options = _callback_options(context, head)
        by_reference = await _resolve(context, key, found.asked)
        batch = _new_batch(context, request, key, head, cast("BatchType", head.type.lower()))
        if options is not None:
            batch = _with_callback(context, batch, options)
        if batch.max_cost_nano is not None:
            async with context.db.connection() as conn:
                used = [resource.resource_id for resource in by_reference.values()]
                currency = await prices.currency_of(
                    conn, workspace_id=key.workspace_id, resource_ids=used
                )
            batch = replace(batch, currency=currency)
        batch = replace(batch, idempotency_key=idempotency_key, request_hash=body.sha256)
        async with context.db.connection() as conn:
            await intake.prepare_day(conn, batch)
        async with context.db.transaction() as conn:
            if idempotency_key is not None:
                known = await intake.replay(
                    conn,
                    workspace_id=key.workspace_id,
                    environment_id=key.environment_id,
                    idempotency_key=idempotency_key,
                    request_hash=body.sha256,
                    hours=context.settings.idempotency_hours,
                )
                if known is not None:
                    return Created(batch_id=known, type=batch.type, replayed=True)
            batch = replace(batch, expires_at=await _deadline(conn, head))
            quota = quota_of(context.settings)
            if found.items > _FEW:
                # So much is not written in vain. Whoever comes between now and the commit counts then.
                added = quotas.Amounts(items=found.items, batches=1, bytes=0)
                await quotas.look(conn, workspace_id=key.workspace_id, default=quota, added=added)
            asked = {resource.resource_id: resource for resource in by_reference.values()}
            ingest = Ingest(
                conn,
                batch,
                asked,
                crossroads=await crossroads(
                    conn,
                    workspace_id=key.workspace_id,
                    of=asked.values(),
                    metadata=batch.metadata,
                    guard_s=context.settings.guard_s,
                ),
                most_items=context.settings.max_items,
                most_item_bytes=context.settings.max_item_bytes,
                key_amounts=await _key_amounts(conn, key),
                quota=quota,
            )
            async for items in _new_items(context, body.file, found.items_at, by_reference):
                await ingest.add(items)
                if len(ingest.problems) >= ValidationError.MOST:
                    break
            await workspaces.hold_environment(
                conn, workspace_id=key.workspace_id, environment_id=key.environment_id
            )
            await ingest.finish()
    log.info("batch.created", batch=batch.batch_id, items=ingest.count)
    context.ringer.ring(WORK, ingest.resource_ids)
    context.ringer.ring(EVENTS, [batch.batch_id])
    return Created(batch_id=batch.batch_id, type=batch.type, replayed=False)


async def estimate_batch(context: Context, request: AnyRequest, key: Principal) -> Estimated:
    """What ``create_batch`` would make of the same body, without making it."""
    async with _spooled(context, request) as body:
        found = await _examine(context, body.file)
        head = found.head
        _callback_options(context, head)
        by_reference = await _resolve(context, key, found.asked)
        batch = _new_batch(context, request, key, head, "async")
        async with context.db.connection() as conn:
            expires_at = await _deadline(conn, head)
            key_amounts = await _key_amounts(conn, key)
            asked = {resource.resource_id: resource for resource in by_reference.values()}
            means = await forecast.output_means(
                conn, workspace_id=key.workspace_id, resource_ids=list(asked)
            )
            forks = await crossroads(
                conn,
                workspace_id=key.workspace_id,
                of=asked.values(),
                metadata=batch.metadata,
                guard_s=context.settings.guard_s,
            )
        appraiser = Appraiser(
            batch,
            asked,
            crossroads=forks,
            most_item_bytes=context.settings.max_item_bytes,
            key_amounts=key_amounts,
            output_means=means,
        )
        async for items in _new_items(context, body.file, found.items_at, by_reference):
            await appraiser.add(items)
    async with context.db.connection() as conn:
        plan = await forecast.of_new(
            conn,
            workspace_id=key.workspace_id,
            batch_id=batch.batch_id,
            api_key_id=key.api_key_id,
            appraisal=appraiser.found,
            amounts=batch.bounds,
            priority=batch.priority,
            weight=batch.weight,
            expires_at=expires_at,
            source_ip=batch.source_ip,
            metadata=batch.metadata,
            clockwork=context.clockwork,
        )
    return Estimated(appraisal=appraiser.found, plan=plan, expires_at=expires_at)


def _new_batch(
    context: Context, request: AnyRequest, key: Principal, head: BatchHead, kind: BatchType
) -> NewBatch:
    return NewBatch(
        workspace_id=key.workspace_id,
        environment_id=key.environment_id,
        type=kind,
        name=head.name,
        metadata=head.metadata,
        capacity=capacity_entries(head.capacity),
        amounts=amounts(head.capacity),
        priority=head.priority,
        weight=head.weight,
        max_tokens=head.max_tokens,
        max_cost_nano=None if head.max_cost is None else round(head.max_cost * prices.NANO),
        # The peer of the connection: behind a proxy that is the proxy's own address.
        source_ip=request.client.host if request.client is not None else None,
        max_attempts=head.max_attempts or context.settings.max_attempts,
        given_max_attempts=head.max_attempts,
        timeout_ms=head.timeout_ms,
        created_by_api_key_id=key.api_key_id,
        created_by_user_id=key.user_id,
    )


def _callback_options(context: Context, head: BatchHead) -> CallbackOptions | None:
    """Those of a CALLBACK batch; other types ignore them. Raises ValidationError."""
    if head.type != "CALLBACK":
        return None
    return callback_options(head.callback_options, context.settings.callback_guard)


def _with_callback(context: Context, batch: NewBatch, options: CallbackOptions) -> NewBatch:
    endpoint = webhooks.callback(
        context.keyring,
        workspace_id=batch.workspace_id,
        environment_id=batch.environment_id,
        batch_id=batch.batch_id,
        batch_day=batch.batch_day,
        url=options.url,
        topics=options.events,
        headers=options.headers or {},
        secret=options.secret,
    )
    return replace(batch, callback=endpoint, callback_options=options.shown())


async def _deadline(conn: Connection, head: BatchHead) -> datetime | None:
    """The head's deadline. Raises ValidationError when it has passed."""
    now = await batches.clock(conn)
    deadline = head.deadline(now)
    if problems := problems_of_deadline(deadline, now):
        raise ValidationError(problems)
    return deadline


async def _key_amounts(conn: Connection, key: Principal) -> list[Amount]:
    """The caller's own limits; a user, and a key that does not enforce them, have none."""
    if key.api_key_id is None:
        return []
    found = await capacity.limits(conn, workspace_id=key.workspace_id, scope_ids=[key.api_key_id])
    return [limit.amount for limit in found]


@asynccontextmanager
async def _spooled(context: Context, request: AnyRequest) -> AsyncGenerator[_Spooled]:
    """The body: in memory while it is small, else in a file that has no name."""
    most = context.settings.max_body_bytes
    announced = request.headers.get("content-length", "")
    if announced.isdecimal() and int(announced) > most:
        raise _too_large(most)
    digest = hashlib.sha256()
    file: BinaryIO = io.BytesIO()
    waiting = bytearray()
    size = 0
    try:
        async for piece in request.stream():
            size += len(piece)
            if size > most:
                raise _too_large(most)
            digest.update(piece)
            waiting += piece
            if len(waiting) >= STEP:
                if isinstance(file, io.BytesIO):
                    file = await asyncio.to_thread(_temporary)
                await asyncio.to_thread(file.write, bytes(waiting))
                waiting.clear()
        if isinstance(file, io.BytesIO):
            file.write(waiting)
        else:
            await asyncio.to_thread(file.write, bytes(waiting))
    except InternalServerException:
        file.close()
        raise BrokenOffError("The connection closed before the whole body had come.") from None
    except OSError as error:
        file.close()
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise StorageFullError(
            "The server has no room to take this request in (its temporary folder is full); "
            "nothing was kept. Repeat it later, or split the batch.",
            code="STORAGE_FULL",
        ) from None
    try:
        yield _Spooled(file=file, sha256=digest.digest())
    finally:
        file.close()


def _temporary() -> BinaryIO:
    return cast("BinaryIO", tempfile.TemporaryFile(buffering=0))


def _too_large(most: int) -> TooLargeError:
    return TooLargeError(
        f"The request is larger than {most:,} bytes (SLUICE_MAX_BODY_BYTES); split the batch.",
        code="REQUEST_TOO_LARGE",
    )


def _idempotency_key(request: AnyRequest, head: BatchHead) -> str | None:
    header = request.headers.get("idempotency-key")
    if header is None:
        return head.idempotency_key
    problem = None
    if not 0 < len(header) <= _MOST_KEY:
        problem = f"must have 1 to {_MOST_KEY} characters"
    elif head.idempotency_key not in (None, header):
        problem = "differs from the body's idempotencyKey; send one of them"
    if problem is not None:
        raise ValidationError([Problem(path="Idempotency-Key", message=problem)])
    return header


# The first walk -----------------------------------------------------------------------------------


async def _examine(context: Context, file: BinaryIO) -> _Examined:
    """Everything but the requests. Raises ValidationError with the first hundred problems."""
    walk = _Walk(file, context.settings.max_item_bytes, context.settings.max_items)
    while await asyncio.to_thread(walk.step):
        pass
    return walk.result()


class _Walk:
    """The first walk over a body, in steps for a worker thread."""

    def __init__(self, file: BinaryIO, most_item_bytes: int, most_items: int) -> None:
        file.seek(0)
        self._splitter = Splitter(file.read, array=_ITEMS, most_element=most_item_bytes + _SLACK)
        self._members = self._splitter.members(_decode_items)
        self._most_item_bytes = most_item_bytes
        self._most_items = most_items
        self._head: dict[str, object] = {}
        self._asked: dict[UUID | str, int] = {}
        self._count = 0
        self._problems: list[Problem] = []

    def step(self) -> bool:
        """Look at some more; False when there is nothing more to look at."""
        try:
            return self._some()
        except MalformedError as error:
            self._problems.append(Problem(path="body", message=str(error)))
        except TooLongError as error:
            if error.index is None:
                problem = Problem(path=error.key or "body", message=str(error))
            else:
                problem = Problem(
                    path=f"{_ITEMS}[{error.index}]",
                    message=f"is larger than {self._most_item_bytes:,} bytes (SLUICE_MAX_ITEM_BYTES)",
                )
            self._problems.append(problem)
        return False

    def _some(self) -> bool:
        size = 0
        for name, found in _up_to(self._members, _FEW):
            if isinstance(found, list):
                is_going_on = all(self._item(item) for item in found)
                size = STEP
            elif name == _ITEMS and self._splitter.elements_at is not None:
                is_going_on = self._item(found)
                size += len(found)
            else:
                is_going_on = self._member(name, found)
                size += len(found)
            if not is_going_on:
                return False
            if size >= STEP:
                return True
        return size > 0

    def _member(self, name: str, raw: bytes) -> bool:
        try:
            self._head[name] = _decoded(raw)
        except ValueError as error:
            self._problems.append(Problem(path=name, message=f"is not valid JSON: {error}"))
        return len(self._problems) < ValidationError.MOST

    def _item(self, found: _Item | bytes) -> bool:
        """Look at the next item; False when no more need be looked at."""
        index = self._count
        if index == self._most_items:
            self._problems.append(
                Problem(
                    path=_ITEMS,
                    message=f"more than {self._most_items:,} items; "
                    "split the batch or raise SLUICE_MAX_ITEMS",
                )
            )
            return False
        self._count += 1
        try:
            item = _item_of(found) if isinstance(found, bytes) else found
        except _ItemError as error:
            path = f"{_ITEMS}[{index}]{error.path}"
            self._problems.append(Problem(path=path, message=str(error)))
        else:
            for field, message in _wrong(item):
                self._problems.append(Problem(path=f"{_ITEMS}[{index}].{field}", message=message))
            if item.asks and item.asks not in self._asked:
                self._asked[item.asks] = index
        return len(self._problems) < ValidationError.MOST

    def result(self) -> _Examined:
        """What was found, once ``step`` has said False."""
        problems = self._problems
        head: BatchHead | None = None
        # A body that breaks off has no reliable head: what seems missing may come later.
        if not any(p.path == "body" for p in problems):
            if self._splitter.elements_at is None:
                given = _ITEMS in self._head
                message = "must be an array" if given else "is required"
                problems.append(Problem(path=_ITEMS, message=message))
            elif not self._count and not problems:
                problems.append(Problem(path=_ITEMS, message="must have at least one item"))
            try:
                head = BatchHead.model_validate(self._head)
            except PydanticError as error:
                problems = problems_of(error) + problems
            if len(self._asked) > _MOST_RESOURCES:
                problems.append(
                    Problem(path=_ITEMS, message=f"use more than {_MOST_RESOURCES:,} resources")
                )
        if problems or head is None or self._splitter.elements_at is None:
            raise ValidationError(problems)
        return _Examined(
            head=head,
            items=self._count,
            items_at=self._splitter.elements_at,
            asked=self._asked,
        )


def _up_to(source: Iterator[T], most: int) -> Iterator[T]:
    for _ in range(most):
        try:
            yield next(source)
        except StopIteration:
            return


class _ItemError(ValueError):
    def __init__(self, message: str, path: str = "") -> None:
        super().__init__(message)
        self.path = path


def _item_of(raw: bytes) -> _Item:
    try:
        try:
            return _decode_item(raw)
        except msgspec.ValidationError:
            raise
        except (msgspec.DecodeError, UnicodeDecodeError):
            # msgspec refuses halves of surrogate pairs, which JSON's grammar allows and models do
            # write. So such an item is taken apart by ourselves, to keep its request to the letter.
            _decoded(raw)
            return _by_hand(raw)
    except msgspec.ValidationError as error:
        found = _WHERE.match(str(error))
        assert found is not None
        raise _ItemError(found["what"], found["path"] or "") from None
    except RecursionError:
        raise _ItemError("is nested too deeply") from None
    except (msgspec.DecodeError, ValueError) as error:
        raise _ItemError(f"is not valid JSON: {error}") from None


def _by_hand(raw: bytes) -> _Item:
    source = io.BytesIO(raw)
    most = len(raw)
    members = dict(Splitter(source.read, array="", most_element=most, most_member=most).members())
    request = members.pop("request", b"")
    known = (b'"%s":%s' % (n.encode(), v) for n, v in members.items() if n in _OWN)
    item = _decode_item(b"{%s}" % b",".join(known))
    item.request = msgspec.Raw(request)
    return item


_OWN = frozenset(f.encode_name for f in msgspec.structs.fields(_Item))


def _decoded(raw: bytes) -> object:
    """Any JSON text, also one with halves of surrogate pairs. Raises ValueError."""
    try:
        return msgspec.json.decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError):
        try:
            return json.loads(raw.decode(), parse_constant=_refuse_constant)
        except RecursionError:
            raise ValueError("it is nested too deeply") from None
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _refuse_constant(name: str) -> object:
    raise ValueError(f"{name} is not JSON")


def _wrong(item: _Item) -> Iterator[tuple[str, str]]:
    if item.resource_id is not None and item.resource is not None:
        yield "resource", "give either resourceId or resource (its name)"
    elif not item.asks:
        yield "resourceId", "is required (or resource, its name)"
    if not bytes(item.request):
        yield "request", "is required"
    else:
        yield from _wrong_in_request(bytes(item.request))
    if item.custom_id is not None:
        if len(item.custom_id) > _MOST_CUSTOM_ID:
            yield "customId", f"must have at most {_MOST_CUSTOM_ID} characters"
        if "\0" in item.custom_id:
            yield "customId", "must not contain the character \\u0000"
    if item.max_attempts is not None and not 1 <= item.max_attempts <= _MOST_ATTEMPTS:
        yield "maxAttempts", f"must be from 1 to {_MOST_ATTEMPTS}"


def _wrong_in_request(raw: bytes) -> Iterator[tuple[str, str]]:
    try:
        request = _request_of(raw)
    except _ItemError as error:
        yield f"request{error.path}", str(error)
        return
    vmx = request.vmx
    if vmx is None:
        return
    if vmx.resource_config_overrides:
        yield (
            "request.vmx.resourceConfigOverrides",
            "is not offered; make a resource of that configuration and name it",
        )
    for text in (vmx.correlation_id or "", *(vmx.metadata or {}), *(vmx.metadata or {}).values()):
        if "\0" in text or not _is_unicode(text):
            yield "request.vmx", "must not contain \\u0000 or half of a surrogate pair"
            return


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _request_of(raw: bytes) -> _Request:
    try:
        try:
            return _decode_request(raw)
        except msgspec.ValidationError:
            raise
        except (msgspec.DecodeError, UnicodeDecodeError):
            return msgspec.convert(_decoded(raw), _Request)
    except msgspec.ValidationError as error:
        found = _WHERE.match(str(error))
        assert found is not None
        raise _ItemError(_lowered(found["what"]), found["path"] or "") from None
    except RecursionError:
        raise _ItemError("is nested too deeply") from None
    except (msgspec.DecodeError, ValueError) as error:
        raise _ItemError(f"is not valid JSON: {error}") from None


def _lowered(sentence: str) -> str:
    """msgspec's words after our path: 'expected `array`, got `int`'."""
    return sentence[:1].lower() + sentence[1:]


async def _resolve(
    context: Context, key: Principal, asked: dict[UUID | str, int]
) -> dict[UUID | str, Resource]:
    """The resources behind ids and names. Raises NotFoundError or ForbiddenError naming all."""
    found: dict[UUID | str, Resource] = {}
    async with context.db.connection() as conn:
        for reference in asked:
            if isinstance(reference, UUID):
                resource = await resources.get(
                    conn,
                    workspace_id=key.workspace_id,
                    environment_id=key.environment_id,
                    resource_id=reference,
                )
            elif "\0" in reference:
                resource = None  # Postgres knows no such text
            else:
                resource = await resources.named(
                    conn,
                    workspace_id=key.workspace_id,
                    environment_id=key.environment_id,
                    name=reference,
                )
            if resource is not None:
                found[reference] = resource
    missing = [str(r)[:_MOST_KEY] for r in asked if r not in found]
    if missing:
        more = f" and {len(missing) - 20} more" if len(missing) > 20 else ""  # noqa: PLR2004 - as many as are named
        raise NotFoundError(
            f"AI Resource not found: {', '.join(missing[:20])}{more}",
            code="AI_RESOURCE_NOT_FOUND",
            details={"resources": missing[:100]},
        )
    auth.require_resources(key, (r.resource_id for r in found.values()))
    return found


# The second walk ----------------------------------------------------------------------------------


async def _new_items(
    context: Context, file: BinaryIO, items_at: int, resources: dict[UUID | str, Resource]
) -> AsyncIterator[list[NewItem]]:
    file.seek(items_at)
    splitter = Splitter(
        file.read, array=_ITEMS, most_element=context.settings.max_item_bytes + _SLACK
    )
    elements = splitter.elements(_decode_items)

    def some() -> list[NewItem]:
        made: list[NewItem] = []
        size = 0
        for found in _up_to(elements, _FEW):
            if isinstance(found, list):
                made += [new_item(item) for item in found]
                break
            made.append(new_item(_item_of(found)))
            size += len(found)
            if size >= STEP:
                break
        return made

    def new_item(item: _Item) -> NewItem:
        request = bytes(item.request)
        return NewItem(
            resource_id=ids[item.asks],
            body=request,
            custom_id=item.custom_id,
            max_attempts=item.max_attempts,
            vmx=intake.vmx_of(request.decode()) if b'"vmx"' in request else None,
        )

    ids = {asked: resource.resource_id for asked, resource in resources.items()}
    while items := await asyncio.to_thread(some):
        yield items
