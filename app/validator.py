"""The validator: turns submissions into batches, in the background of every process with an API.

One pass over the file: its lines are checked and its items written in one transaction, which is
committed only when the last line was found valid, together with the word that the submission is
accepted. With the first mistake nothing more is written; the rest is read for more mistakes, and
all is rolled back. A process that dies in the middle leaves nothing, and its lease passes.

In memory at any time: a mebibyte of the file, its lines, and the digests of the custom ids. All heavy
work is done in worker threads, so that the event loop answers others.
"""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from uuid import UUID

from app import api_keys, capacity, files, intake, models, prices, quotas, submissions
from app.batch_lines import BatchLines, Line, LineError
from app.crossroads import Crossroads, crossroads
from app.db import CONNECTION_ERRORS, Connection, Database
from app.doorbell import EVENTS, WORK, Ringer
from app.errors import Problem, QuotaError, TooLargeError, ValidationError
from app.ids import uuid7
from app.intake import Ingest, NewBatch, NewItem
from app.log import Log
from app.resources import Resource
from app.settings import Settings
from app.submissions import Leased

log = Log("validator")

#: A submission is found by a look even if the process that took it in has died.
_LOOK_S = 1.5
#: Files at once in a process: a small one need not wait for a large one. Each has a connection or two.
_AT_ONCE = 3
_CONNECTIONS_EACH = 3
#: A file that ends its process so often is at fault itself.
_MOST_TRIES = 5


class _LostError(Exception):
    """The lease passed to another, or the submission was cancelled."""


class _InvalidError(Exception):
    """Ends the transaction of a file with mistakes."""


@dataclass(slots=True)
class Reading:
    """What of a file has been read: its lines' models, and its mistakes (the first hundred)."""

    models: dict[str, Resource] = field(default_factory=dict[str, Resource])
    lines: int = 0
    errors: list[LineError] = field(default_factory=list[LineError])

    @property
    def is_full(self) -> bool:
        """Whether no more mistakes are collected."""
        return len(self.errors) >= ValidationError.MOST

    def note(self, error: LineError) -> None:
        """Keep a mistake."""
        if not self.is_full:
            self.errors.append(error)


async def read_lines(
    conn: Connection,
    *,
    workspace_id: UUID,
    file_id: UUID,
    endpoint: str,
    most_item_bytes: int,
) -> AsyncGenerator[Sequence[Line | LineError]]:
    """A stored file's lines, a piece of the file at a time."""
    cutting = BatchLines(endpoint, most_item_bytes=most_item_bytes)
    at = 0
    while True:
        piece = await files.read(conn, workspace_id=workspace_id, file_id=file_id, at=at)
        if not piece:
            break
        at += len(piece)
        yield await asyncio.to_thread(cutting.feed, piece)
        if len(piece) < files.CHUNK:
            break
    yield cutting.end()


async def resolve(
    conn: Connection,
    db: Database | None,
    *,
    workspace_id: UUID,
    environment_id: UUID,
    api_key_id: UUID,
    lines: Sequence[Line | LineError],
    reading: Reading,
) -> list[NewItem]:
    """The items that lines ask for; mistakes are noted in ``reading``, with what models mean.

    ``db``: where resources are made for models that a connection allows; they are kept, whatever
    becomes of the lines. None: such models count as unknown.
    """
    valid = [line for line in lines if isinstance(line, Line)]
    for line in lines:
        if isinstance(line, LineError):
            reading.note(line)
    news = sorted({line.model for line in valid} - reading.models.keys())
    refused: dict[str, LineError] = {}
    if news:
        found, refused = await _resources(
            conn,
            db,
            workspace_id=workspace_id,
            environment_id=environment_id,
            api_key_id=api_key_id,
            names=news,
        )
        reading.models |= found
    reading.lines += len(valid)
    items: list[NewItem] = []
    for line in valid:
        resource = reading.models.get(line.model)
        if resource is None:
            wrong = refused[line.model]
            reading.note(
                LineError(
                    code=wrong.code, message=wrong.message, param=wrong.param, line=line.number
                )
            )
            continue
        items.append(
            NewItem(
                resource_id=resource.resource_id,
                body=line.body,
                custom_id=line.custom_id,
                place=str(line.number),
            )
        )
    return items


async def _resources(
    conn: Connection,
    db: Database | None,
    *,
    workspace_id: UUID,
    environment_id: UUID,
    api_key_id: UUID,
    names: Sequence[str],
) -> tuple[dict[str, Resource], dict[str, LineError]]:
    """What models mean to a caller, and why some mean nothing."""
    key = await api_keys.get(
        conn, workspace_id=workspace_id, environment_id=environment_id, api_key_id=api_key_id
    )
    allowed = _allowed(key.resources if key is not None else [])
    found = await models.resolve(
        conn,
        workspace_id=workspace_id,
        environment_id=environment_id,
        names=names,
        allowed=allowed,
    )
    refused: dict[str, LineError] = {}
    for name in names:
        is_known = name in found or allowed is not None or len(refused) >= ValidationError.MOST
        if not is_known and db is not None:
            async with db.transaction() as making:
                made = await models.make(
                    making, workspace_id=workspace_id, environment_id=environment_id, name=name
                )
            if made is not None:
                found[name] = made
        resource = found.get(name)
        if resource is None:
            refused[name] = LineError(
                code="model_not_found",
                message=f"There is no resource named '{name}', none of that model, and no "
                "connection that allows it.",
                param="body.model",
            )
        elif allowed is not None and resource.resource_id not in allowed:
            del found[name]
            refused[name] = LineError(
                code="model_not_allowed",
                message=f"The API key may not use the resource of the model '{name}'.",
                param="body.model",
            )
    return found, refused


def _allowed(resources: Sequence[str]) -> list[UUID] | None:
    return None if "*" in resources else [UUID(r) for r in resources]


def quota_of(settings: Settings) -> quotas.Amounts:
    """What a workspace without a quota of its own may have in the queue."""
    return quotas.Amounts(
        items=settings.quota_items, batches=settings.quota_batches, bytes=settings.quota_bytes
    )


class Validator:
    """Validates whatever submission nobody else does; ``run`` does so until it is cancelled."""

    def __init__(self, settings: Settings, db: Database, *, ringer: Ringer) -> None:
        self._settings = settings
        self._db = db
        self._ringer = ringer
        self._kicked = asyncio.Event()
        self._at_once = max(1, min(_AT_ONCE, settings.pool_size // _CONNECTIONS_EACH))
        self._working: set[asyncio.Task[None]] = set()

    def kick(self) -> None:
        """There is something to do now."""
        self._kicked.set()

    async def run(self) -> None:
        """Keep at it; when cancelled, what it has begun is given back."""
        try:
            while True:
                self._kicked.clear()
                while len(self._working) < self._at_once and await self._begin():
                    pass
                try:
                    async with asyncio.timeout(_LOOK_S):
                        await self._kicked.wait()
                except TimeoutError:
                    continue
        finally:
            for task in self._working:
                task.cancel()
            await asyncio.gather(*self._working, return_exceptions=True)

    async def _begin(self) -> bool:
        """Take one on, if there is one."""
        lease_id = uuid7()
        try:
            async with self._db.connection() as conn:
                held = await submissions.lease(
                    conn, lease_id=lease_id, lease_s=self._settings.validation_lease_s
                )
        except CONNECTION_ERRORS:
            await self._db.revive()
            return False
        if held is None:
            return False
        task = asyncio.create_task(self._validate(held, lease_id))
        self._working.add(task)
        task.add_done_callback(self._ended)
        return True

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._working.discard(task)
        self._kicked.set()
        if not task.cancelled() and (error := task.exception()) is not None:
            # The lease passes, and somebody begins anew.
            log.error("validation.broken", reason=type(error).__name__)

    async def _validate(self, held: Leased, lease_id: UUID) -> None:
        """Decide on one while its lease is kept."""
        deciding = asyncio.create_task(self._decide(held, lease_id))
        try:
            while not deciding.done():
                await asyncio.wait({deciding}, timeout=self._settings.validation_lease_s / 3)
                if not deciding.done() and not await self._renewed(held, lease_id):
                    deciding.cancel()
                    await asyncio.wait({deciding})
                    log.info("validation.left", batch=held.batch_id)
                    return
            deciding.result()
        except asyncio.CancelledError:
            deciding.cancel()
            await asyncio.wait({deciding})
            try:
                async with asyncio.timeout(2), self._db.connection() as conn:
                    await submissions.release(conn, held=held, lease_id=lease_id)
            except (*CONNECTION_ERRORS, TimeoutError):
                log.info("validation.left", batch=held.batch_id)
        except (_LostError, *CONNECTION_ERRORS):
            # With the database gone the lease passes, which is pause enough.
            log.info("validation.left", batch=held.batch_id)

    async def _renewed(self, held: Leased, lease_id: UUID) -> bool:
        try:
            async with self._db.connection() as conn:
                return await submissions.renew(
                    conn, held=held, lease_id=lease_id, lease_s=self._settings.validation_lease_s
                )
        except CONNECTION_ERRORS:
            return True  # the transaction itself finds out

    async def _decide(self, held: Leased, lease_id: UUID) -> None:
        reading = Reading()
        if held.tries > _MOST_TRIES:
            reading.note(
                LineError(
                    code="server_error",
                    message=f"The file could not be validated in {_MOST_TRIES} tries.",
                )
            )
        else:
            try:
                await self._ingest(held, lease_id, reading)
            except _InvalidError:
                pass
            else:
                return
        async with self._db.transaction() as conn:
            if not await submissions.decide(
                conn, held=held, lease_id=lease_id, errors=reading.errors
            ):
                raise _LostError
        log.info("batch.invalid", batch=held.batch_id, mistakes=len(reading.errors))
        self._ringer.ring(EVENTS, [held.batch_id])

    async def _ingest(self, held: Leased, lease_id: UUID, reading: Reading) -> None:
        """Make the batch; raises _InvalidError, and then nothing is made."""
        batch = NewBatch(
            workspace_id=held.workspace_id,
            environment_id=held.environment_id,
            batch_id=held.batch_id,
            type="async",
            endpoint=held.endpoint,
            name=held.name,
            metadata=held.metadata,
            priority=held.priority,
            weight=held.weight,
            max_tokens=held.max_tokens,
            max_cost_nano=held.max_cost_nano,
            expires_at=held.expires_at,
            source_ip=held.source_ip,
            max_attempts=self._settings.max_attempts,
            created_by_api_key_id=held.created_by_api_key_id,
        )
        async with self._db.connection() as conn:
            await intake.prepare_day(conn, batch)
        async with self._db.transaction() as conn:
            ingest = await self._fill(conn, held, batch, reading)
            currency = await _currency(conn, held, reading)
            try:
                await ingest.finish(currency=currency)
            except (QuotaError, TooLargeError) as error:
                reading.note(LineError(code="quota_exceeded", message=str(error)))
                raise _InvalidError from None
            named = list(reading.models)
            model = named[0] if len(named) == 1 else None
            if not await submissions.decide(conn, held=held, lease_id=lease_id, model=model):
                raise _LostError
        log.info("batch.created", batch=batch.batch_id, items=ingest.count)
        self._ringer.ring(WORK, ingest.resource_ids)
        self._ringer.ring(EVENTS, [batch.batch_id])

    async def _fill(
        self, conn: Connection, held: Leased, batch: NewBatch, reading: Reading
    ) -> Ingest:
        """Write the items of every line; raises _InvalidError when there is a mistake in any."""
        limits = await capacity.limits(
            conn, workspace_id=held.workspace_id, scope_ids=[held.created_by_api_key_id]
        )
        resources: dict[UUID, Resource] = {}
        forks: dict[UUID, Crossroads] = {}
        ingest = Ingest(
            conn,
            batch,
            resources,
            crossroads=forks,
            most_items=self._settings.max_items,
            most_item_bytes=self._settings.max_item_bytes,
            key_amounts=[limit.amount for limit in limits],
            quota=quota_of(self._settings),
        )
        file = await files.get(
            conn,
            workspace_id=held.workspace_id,
            environment_id=held.environment_id,
            file_id=held.input_file_id,
        )
        if file is None:
            reading.note(LineError(code="file_not_found", message="The input file is gone."))
            raise _InvalidError
        pieces = read_lines(
            conn,
            workspace_id=held.workspace_id,
            file_id=held.input_file_id,
            endpoint=held.endpoint,
            most_item_bytes=self._settings.max_item_bytes,
        )
        async with aclosing(pieces):
            async for lines in pieces:
                items = await resolve(
                    conn,
                    self._db,
                    workspace_id=held.workspace_id,
                    environment_id=held.environment_id,
                    api_key_id=held.created_by_api_key_id,
                    lines=lines,
                    reading=reading,
                )
                named = {r.resource_id: r for r in reading.models.values()}
                forks |= await crossroads(
                    conn,
                    workspace_id=held.workspace_id,
                    of=[each for key, each in named.items() if key not in resources],
                    metadata=batch.metadata,
                    guard_s=self._settings.guard_s,
                )
                resources |= named
                await _add(ingest, items, reading)
                if reading.is_full:
                    break
        if not reading.lines and not reading.errors:
            reading.note(LineError(code="empty_file", message="The file has no requests."))
        if reading.errors:
            reading.errors.sort(key=lambda e: e.line or 0)
            raise _InvalidError
        return ingest


async def _currency(conn: Connection, held: Leased, reading: Reading) -> str | None:
    """The currency of what it may cost, if that is bounded; raises _InvalidError if there is none."""
    if held.max_cost_nano is None:
        return None
    try:
        return await prices.currency_of(
            conn,
            workspace_id=held.workspace_id,
            resource_ids=sorted({r.resource_id for r in reading.models.values()}),
        )
    except ValidationError as error:
        message = f"max_cost {error.problems[0].message}."
        reading.note(LineError(code="price_not_known", message=message, param="max_cost"))
        raise _InvalidError from None


async def _add(ingest: Ingest, items: Sequence[NewItem], reading: Reading) -> None:
    """Write items. Once there is a mistake they are only weighed, to find more."""
    if reading.errors and not ingest.problems:
        ingest.problems.append(Problem(path="", message="a line before is wrong"))
    before = len(ingest.problems)
    try:
        if items:
            await ingest.add(items)
    except ValidationError as error:
        message = f"The file has {error.problems[0].message}."
        reading.note(LineError(code="too_many_lines", message=message))
    for problem in ingest.problems[before:]:
        reading.note(
            LineError(
                code="invalid_request",
                message=f"The body {problem.message}.",
                param="body",
                line=int(problem.path),
            )
        )
