"""How batches come in: what is asked for, weighed, written.

Creation is one transaction: items are estimated in a worker thread and written with COPY, then the
batch, its flows and its first event; whatever is wrong with any item, nothing is kept.

    async with db.transaction() as conn:
        ingest = Ingest(conn, batch, resources)
        async for some in items:
            await ingest.add(some)
        created = await ingest.finish()
"""

import asyncio
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date, datetime
from typing import Any, NamedTuple
from uuid import UUID

import msgspec
from psycopg.types.json import Jsonb

from app import capacity, queue, quotas, resources, tokens, webhooks
from app.batches import BatchType, budget
from app.capacity import Amount
from app.crossroads import Crossroads, require_translatable
from app.db import Connection, NoRow, Query
from app.errors import ConflictError, Problem, ValidationError
from app.ids import created_on, uuid7
from app.resources import Resource
from app.webhooks import NewEndpoint

#: A thousand years: keys of runs of the command line are never used for another run.
FOR_EVER_H = 1000 * 365 * 24


#: A batch's sequence numbers and counters are 32 bits wide.
MOST_ITEMS = 2**31 - 2


class Vmx(msgspec.Struct, kw_only=True, rename="camel", omit_defaults=True):
    """What a request's member ``vmx`` says to us; it is not sent on.

    ``correlation_id``: what usage is asked by, instead of the batch's id; ``metadata``: facts of the
    item's own. ``timeout_ms``: longest time of its call. ``provider_args``: members of the request
    that count before all others.
    """

    correlation_id: str | None = None
    metadata: dict[str, str] | None = None
    timeout_ms: int | None = None
    provider_args: dict[str, Any] | None = None


class _WithVmx(msgspec.Struct):
    vmx: Vmx | None = None


_decode_with_vmx = msgspec.json.Decoder(_WithVmx).decode


def vmx_of(body: str) -> Vmx | None:
    """What a stored request says to us. One that cannot be read, from before it was checked, is none."""
    if '"vmx"' not in body:
        return None
    try:
        return _decode_with_vmx(body).vmx
    except (msgspec.DecodeError, UnicodeError):
        try:
            return msgspec.convert(json.loads(body), _WithVmx).vmx
        except (msgspec.ValidationError, ValueError, RecursionError):
            return None


class NewItem(msgspec.Struct, frozen=True, kw_only=True, gc=False):  # made by the thousand
    """An item to create: a JSON object to the letter, for a resource.

    ``place``: where its creator finds it, for messages; None: by its number in ``items``.
    ``vmx``: what that object says for us and not for the provider.
    """

    resource_id: UUID
    body: bytes
    custom_id: str | None = None
    max_attempts: int | None = None
    place: str | None = None
    vmx: Vmx | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class NewBatch:
    """A batch to create, apart from its items.

    ``amounts``: limits of its own, which can only tighten those above it; ``capacity``: the same as
    people wrote them. ``callback``: where it tells of itself, and ``callback_options`` the same as it may
    be shown. ``weight``: its share among batches of the same priority, 0.1 to 100.
    ``expires_at``: nothing is begun from then on. ``max_tokens``, ``max_cost_nano`` (billionths of
    ``currency``): it pauses when its calls have used so much. ``source_ip``: for limits per client address.
    ``max_attempts``: of items that do not say; ``given_max_attempts``: as its creator said, if so.
    ``timeout_ms``: longest time of one call; None: the resource's.
    """

    workspace_id: UUID
    environment_id: UUID
    type: BatchType
    endpoint: str = "/v1/chat/completions"
    batch_id: UUID = field(default_factory=uuid7)
    name: str | None = None
    metadata: Mapping[str, object] = field(default_factory=dict[str, object])
    capacity: Sequence[Mapping[str, object]] = ()
    callback_options: Mapping[str, object] | None = None
    callback: NewEndpoint | None = None
    amounts: Sequence[Amount] = ()
    priority: int = 0
    weight: float = 1
    expires_at: datetime | None = None
    source_ip: str | None = None
    max_tokens: int | None = None
    max_cost_nano: int | None = None
    currency: str | None = None
    max_attempts: int = 5
    given_max_attempts: int | None = None
    timeout_ms: int | None = None
    idempotency_key: str | None = None
    request_hash: bytes | None = None
    created_by_api_key_id: UUID | None = None
    created_by_user_id: UUID | None = None

    @property
    def batch_day(self) -> date:
        """The partition of the batch's rows."""
        return created_on(self.batch_id)

    @property
    def bounds(self) -> list[Amount]:
        """All limits on its own scope."""
        return [*self.amounts, *budget(self.max_tokens, self.max_cost_nano)]


@dataclass(slots=True, kw_only=True)
class Load:
    """What items ask of one resource; output tokens as they are expected."""

    items: int = 0
    input_tokens: int = 0
    output_tokens: float = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Impossible:
    """An item that could never be sent, and why. ``place``: as of `NewItem`."""

    index: int
    reason: str
    place: str | None = None


@dataclass(slots=True, kw_only=True)
class Appraisal:
    """What a batch that is not made would ask for. ``impossible``: the first hundred."""

    items: int = 0
    loads: dict[UUID, Load] = field(default_factory=dict[UUID, Load])
    impossible: list[Impossible] = field(default_factory=list[Impossible])
    impossible_items: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class _Known:
    batch_id: UUID
    request_hash: bytes | None
    is_old: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class _Locked:
    locked: str


@dataclass(frozen=True, slots=True, kw_only=True)
class _Number:
    no: int


_batch_insert = Query("batches", "batch_insert", NoRow)
_flows_insert = Query("batches", "flows_insert", NoRow)
_ready_now = Query("batches", "ready_now", NoRow)
_event_append = Query("batches", "event_append", _Number)
_by_idempotency_key = Query("batches", "batch_by_idempotency_key", _Known)
_idempotency_key_free = Query("batches", "idempotency_key_free", NoRow)
_idempotency_lock = Query("batches", "idempotency_lock", _Locked)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Scale:
    """Weighs items before they are kept: what their requests ask for, and what is wrong with them."""

    endpoint: str
    resources: Mapping[UUID, Resource]
    most_item_bytes: int
    own_bounds: Sequence[tuple[int | None, str]]
    batch_id: UUID
    crossroads: Mapping[UUID, Crossroads]

    @classmethod
    def of(
        cls,
        batch: NewBatch,
        resources: Mapping[UUID, Resource],
        *,
        most_item_bytes: int,
        key_amounts: Sequence[Amount],
        crossroads: Mapping[UUID, Crossroads] | None,
    ) -> "_Scale":
        return cls(
            endpoint=batch.endpoint,
            resources=resources,
            most_item_bytes=most_item_bytes,
            own_bounds=(
                (capacity.most_input_tokens(batch.bounds), "the batch"),
                (capacity.most_input_tokens(key_amounts), "the api key"),
            ),
            batch_id=batch.batch_id,
            crossroads={} if crossroads is None else crossroads,
        )

    def weigh(self, items: Sequence[NewItem], first_seq: int) -> "Iterator[_Weighed | ValueError]":
        """Each item's estimate and way, or a sentence about what is wrong with it."""
        tally = tokens.Tally()
        bodies = [self._counted(item, tally) for item in items]
        estimates = iter(tally.estimates())
        for seq, (item, body) in enumerate(zip(items, bodies, strict=True), start=first_seq):
            if isinstance(body, ValueError):
                yield body
                continue
            try:
                yield self._placed(item, seq, body, next(estimates))
            except ValueError as error:
                yield error

    def _counted(self, item: NewItem, tally: tokens.Tally) -> "_Body | ValueError":
        """Put an item's request into the tally. Returns it, or what is wrong with it."""
        resource = self.resources[item.resource_id]
        fork = self.crossroads.get(item.resource_id)
        try:
            body = parse_body(item.body, most_bytes=self.most_item_bytes)
            if fork is None:
                require_translatable(resource, self.endpoint, body)
        except ValueError as error:
            return error
        tally.add(self.endpoint, body, model=resource.model)
        # Thousands of them at a time keep the garbage collector busy: only what is needed again.
        return None if fork is None else body

    def _placed(
        self, item: NewItem, seq: int, body: "_Body", estimate: tokens.Estimate
    ) -> "_Weighed":
        """An item on its way. Raises ValueError with a sentence about what is wrong."""
        resource = self.resources[item.resource_id]
        if body is not None:
            resource = self.crossroads[item.resource_id].choose(
                resource,
                body,
                input_tokens=estimate.input_tokens,
                batch_id=self.batch_id,
                seq=seq,
            )
            require_translatable(resource, self.endpoint, body)
        most = resource.most_tokens
        if most and estimate.input_tokens > most:
            raise _too_long(estimate, most, f"resource '{resource.name}'")
        for most, of in self.own_bounds:
            if most and estimate.input_tokens > most:
                raise _too_long(estimate, most, of)
        return _Weighed(estimate, resource.resource_id)


_Body = dict[str, object] | None
"""A request that is looked into when its tokens are known; None: it need not be."""


def _too_long(estimate: tokens.Estimate, most: int, of: str) -> ValueError:
    return ValueError(
        f"its prompt of about {estimate.input_tokens:,} tokens alone is "
        f"larger than the limit of {most:,} tokens of {of}; "
        "shorten it or raise the limit"
    )


class _Weighed(NamedTuple):
    estimate: tokens.Estimate
    resource_id: UUID


class Appraiser:
    """Weighs the items of a batch that is not made. ``output_means``: of resources, if known."""

    #: Output tokens of an item that nothing bounds and nobody has seen an answer to.
    UNKNOWN_OUTPUT: int = 1024

    def __init__(
        self,
        batch: NewBatch,
        resources: Mapping[UUID, Resource],
        *,
        most_item_bytes: int,
        key_amounts: Sequence[Amount],
        output_means: Mapping[UUID, float],
        crossroads: Mapping[UUID, Crossroads] | None = None,
    ) -> None:
        self._scale = _Scale.of(
            batch,
            resources,
            most_item_bytes=most_item_bytes,
            key_amounts=key_amounts,
            crossroads=crossroads,
        )
        self._output_means = output_means
        self.found = Appraisal()

    async def add(self, items: Sequence[NewItem]) -> None:
        """Weigh some more."""
        await asyncio.to_thread(self._add, items)

    def _add(self, items: Sequence[NewItem]) -> None:
        found = self.found
        weighing = self._scale.weigh(items, found.items)
        for item, weighed in zip(items, weighing, strict=True):
            index = found.items
            found.items += 1
            if isinstance(weighed, ValueError):
                found.impossible_items += 1
                if len(found.impossible) < ValidationError.MOST:
                    found.impossible.append(
                        Impossible(index=index, reason=str(weighed), place=item.place)
                    )
                continue
            estimate = weighed.estimate
            bound = estimate.max_output_tokens
            mean = self._output_means.get(weighed.resource_id)
            output = mean if mean is not None else bound if bound is not None else None
            load = found.loads.setdefault(weighed.resource_id, Load())
            load.items += 1
            load.input_tokens += estimate.input_tokens
            expected = self.UNKNOWN_OUTPUT if output is None else output
            load.output_tokens += expected if bound is None else min(expected, bound)


class Ingest:
    """Writes a new batch within the caller's transaction. Use ``add`` as often as needed.

    ``prepare_day`` must have been awaited before the transaction began. Problems of items are
    collected (the first 100) and raised together by ``finish``, so that one answer names them all.
    ``quota``: what the workspace may have in the queue, where it has none of its own; None: anything.
    """

    #: Items that are weighed in one go: some ten milliseconds.
    PART: int = 500

    def __init__(
        self,
        conn: Connection,
        batch: NewBatch,
        resources: Mapping[UUID, Resource],
        *,
        most_items: int = MOST_ITEMS,
        most_item_bytes: int = 8 * 1024 * 1024,
        key_amounts: Sequence[Amount] = (),
        quota: quotas.Amounts | None = None,
        crossroads: Mapping[UUID, Crossroads] | None = None,
    ) -> None:
        self._conn = conn
        self._quota = quota
        self._batch = batch
        self._most_items = min(most_items, MOST_ITEMS)
        self._asked = resources
        self._scale = _Scale.of(
            batch,
            resources,
            most_item_bytes=most_item_bytes,
            key_amounts=key_amounts,
            crossroads=crossroads,
        )
        self._flows: dict[UUID, int] = {}
        self._bytes: dict[UUID, int] = {}
        self._estimated = 0
        self.count = 0
        self.problems: list[Problem] = []

    async def add(self, items: Sequence[NewItem]) -> None:
        """Write items; a few thousand at a time is best: some are weighed while others are copied."""
        if self.count + len(items) > self._most_items:
            raise ValidationError(
                [
                    Problem(
                        path="items",
                        message=f"more than {self._most_items:,} items; "
                        "split the batch or raise SLUICE_MAX_ITEMS",
                    )
                ]
            )
        copying: asyncio.Task[None] | None = None
        try:
            for start in range(0, len(items), self.PART):
                part = items[start : start + self.PART]
                prepared = await asyncio.to_thread(self._prepare, part, self.count)
                self.count += len(part)
                self.problems += prepared.problems[: ValidationError.MOST + 1 - len(self.problems)]
                if copying is not None:
                    await copying
                    copying = None
                if not self.problems:
                    copying = asyncio.create_task(self._copy(prepared))
            if copying is not None:
                await copying
        except asyncio.CancelledError:
            if copying is not None:
                copying.cancel()
            raise
        finally:
            # Whoever ends the transaction needs the connection to itself.
            if copying is not None and not copying.done():
                await asyncio.wait({copying})

    async def _copy(self, prepared: "_Prepared") -> None:
        self._estimated += prepared.input_tokens
        for resource_id, load in prepared.flows.items():
            self._flows[resource_id] = self._flows.get(resource_id, 0) + load.items
            self._bytes[resource_id] = self._bytes.get(resource_id, 0) + load.bytes
        async with self._conn.cursor() as cursor:
            async with cursor.copy(_COPY_ITEMS) as copy:
                await copy.write(prepared.items)
            async with cursor.copy(_COPY_REQUESTS) as copy:
                await copy.write(prepared.requests)

    async def finish(self, *, currency: str | None = None) -> UUID:
        """Write batch, flows and the first event; the batch's id. Raises RequestError.

        ``currency``: the batch's, where only its items told; None: as the batch says.
        """
        if not self.count:
            self.problems.append(Problem(path="items", message="must have at least one item"))
        if self.problems:
            raise ValidationError(self.problems)
        batch = self._batch
        conn = self._conn
        self._plan_fallbacks()
        await resources.pin(
            conn, workspace_id=batch.workspace_id, resource_ids=[*self._asked, *self._flows]
        )
        await _batch_insert.run(
            conn,
            workspace_id=batch.workspace_id,
            batch_id=batch.batch_id,
            environment_id=batch.environment_id,
            batch_day=batch.batch_day,
            type=batch.type,
            endpoint=batch.endpoint,
            name=batch.name,
            metadata=Jsonb(dict(batch.metadata)),
            capacity=Jsonb(list(batch.capacity)),
            callback_options=Jsonb(dict(batch.callback_options))
            if batch.callback_options is not None
            else None,
            priority=batch.priority,
            weight=batch.weight,
            expires_at=batch.expires_at,
            source_ip=batch.source_ip,
            max_tokens=batch.max_tokens,
            max_cost_nano=batch.max_cost_nano,
            currency=currency or batch.currency,
            total_items=self.count,
            estimated_input_tokens=self._estimated,
            idempotency_key=batch.idempotency_key,
            request_hash=batch.request_hash,
            created_by_api_key_id=batch.created_by_api_key_id,
            created_by_user_id=batch.created_by_user_id,
            timeout_ms=batch.timeout_ms,
            max_attempts=batch.given_max_attempts,
        )
        if batch.callback is not None:
            await webhooks.add(conn, batch.callback)
        scope_ids = [batch.batch_id]
        if batch.created_by_api_key_id is not None:
            scope_ids.append(batch.created_by_api_key_id)
        resource_ids = sorted(self._flows)
        await _flows_insert.run(
            conn,
            workspace_id=batch.workspace_id,
            batch_id=batch.batch_id,
            batch_day=batch.batch_day,
            priority=batch.priority,
            weight=batch.weight,
            expires_at=batch.expires_at,
            scope_ids=scope_ids,
            resource_ids=resource_ids,
            items=[self._flows[r] for r in resource_ids],
            request_bytes=[self._bytes.get(r, 0) for r in resource_ids],
        )
        if batch.bounds:
            await capacity.open_scope(
                conn,
                workspace_id=batch.workspace_id,
                scope_id=batch.batch_id,
                kind="batch",
                amounts=batch.bounds,
            )
        await capacity.attach_dimensions(
            conn, workspace_id=batch.workspace_id, batch_id=batch.batch_id
        )
        await _event_append.run(
            conn,
            workspace_id=batch.workspace_id,
            batch_day=batch.batch_day,
            batch_id=batch.batch_id,
            kind="batch-created",
        )
        if self._quota is not None:
            added = quotas.Amounts(items=self.count, batches=1, bytes=sum(self._bytes.values()))
            await quotas.enforce(
                conn, workspace_id=batch.workspace_id, default=self._quota, added=added
            )
        await _ready_now.run(conn, workspace_id=batch.workspace_id, resource_ids=resource_ids)
        return batch.batch_id

    def _plan_fallbacks(self) -> None:
        """Give the models that items may fall back to their flows, empty at first.

        All flows of a batch are made with it: whoever locks those of a batch has them all.
        """
        for resource in self._asked.values():
            if resource.use_fallback:
                for fallback_id in resource.fallback_ids:
                    self._flows.setdefault(fallback_id, 0)

    @property
    def resource_ids(self) -> list[UUID]:
        """The resources that got items: whom to ring for after the commit."""
        return sorted(self._flows)

    def _prepare(self, items: Sequence[NewItem], first_seq: int) -> "_Prepared":
        """Estimate and format; runs in a worker thread."""
        batch = self._batch
        key = f"{batch.workspace_id}\t{batch.batch_day}\t{batch.batch_id}\t"
        request_key = key.encode()
        rows: list[str] = []
        requests: list[bytes] = []
        problems: list[Problem] = []
        flows: dict[UUID, _Share] = {}
        input_tokens = 0
        weighing = self._scale.weigh(items, first_seq)
        for seq, (item, weighed) in enumerate(zip(items, weighing, strict=True), start=first_seq):
            if isinstance(weighed, ValueError):
                place = item.place or f"items[{seq}].request"
                problems.append(Problem(path=place, message=str(weighed)))
                continue
            estimate, resource_id = weighed
            share = flows.get(resource_id)
            if share is None:
                share = flows[resource_id] = _Share(row=f"{key}{resource_id}\t")
            share.items += 1
            share.bytes += len(item.body)
            input_tokens += estimate.input_tokens
            bound = estimate.max_output_tokens
            most_output = _NULL if bound is None else min(bound, 2**31 - 1)
            timeout_ms = (item.vmx.timeout_ms if item.vmx else None) or batch.timeout_ms
            rows.append(
                f"{share.row}{seq}\t{estimate.input_tokens}\t"
                f"{most_output}\t"
                f"{item.max_attempts or batch.max_attempts}\t"
                f"{_NULL if timeout_ms is None else timeout_ms}\n"
            )
            custom_id = _or_null(None if item.custom_id is None else item.custom_id.encode())
            vmx = _or_null(None if item.vmx is None else _vmx_facts(item.vmx))
            requests.append(
                b"%s%d\t%s\t%s\t%s\n" % (request_key, seq, custom_id, _escaped(item.body), vmx)
            )
        return _Prepared(
            items="".join(rows).encode(),
            requests=b"".join(requests),
            flows=flows,
            problems=problems,
            input_tokens=input_tokens,
        )


@dataclass(slots=True, kw_only=True)
class _Share:
    """What some items add to a flow; ``row``: how their rows begin."""

    row: str
    items: int = 0
    bytes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class _Prepared:
    items: bytes
    requests: bytes
    flows: dict[UUID, _Share]
    problems: list[Problem]
    input_tokens: int


_COPY_ITEMS = (
    b"copy items (workspace_id, batch_day, batch_id, resource_id, seq, input_tokens, "
    b"max_output_tokens, max_attempts, timeout_ms) from stdin"
)


_COPY_REQUESTS = (
    b"copy item_requests (workspace_id, batch_day, batch_id, seq, custom_id, body, vmx) from stdin"
)


_NULL = "\\N"
_NULL_BYTES = _NULL.encode()


def _vmx_facts(vmx: Vmx) -> bytes:
    """What is asked by later; arguments stay in the request only."""
    return msgspec.json.encode(msgspec.structs.replace(vmx, provider_args=None))


def _or_null(text: bytes | None) -> bytes:
    return _NULL_BYTES if text is None else _escaped(text)


def _escaped(text: bytes) -> bytes:
    """Text for COPY's text format."""
    return (
        text.replace(b"\\", b"\\\\")
        .replace(b"\n", b"\\n")
        .replace(b"\r", b"\\r")
        .replace(b"\t", b"\\t")
    )


def parse_body(body: bytes, *, most_bytes: int) -> dict[str, object]:
    """A request's JSON object. Raises ValueError with a sentence about what is wrong."""
    if len(body) > most_bytes:
        raise ValueError(
            f"is {len(body):,} bytes long; the most is {most_bytes:,} (SLUICE_MAX_ITEM_BYTES)"
        )
    try:
        parsed: object = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError):
        # msgspec refuses lone surrogates, which JSON's grammar allows and providers accept.
        # json on bytes would also take UTF-16, a byte order mark and NaN, which Postgres refuses.
        try:
            parsed = json.loads(body.decode(), parse_constant=_refuse_constant)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"is not valid JSON: {error}") from None
    except RecursionError:
        raise ValueError("is nested too deeply") from None
    if not isinstance(parsed, dict) or not parsed:
        raise ValueError("must be a JSON object with at least one field")
    return parsed  # pyright: ignore[reportUnknownVariableType] - JSON keys are strings


def _refuse_constant(name: str) -> object:
    raise ValueError(f"{name} is no number of JSON's")


async def prepare_day(conn: Connection, batch: NewBatch) -> None:
    """Make the batch's partitions, outside of and before the transaction that fills them."""
    known = (conn.info.dsn, conn.info.dbname, batch.batch_day)
    if known not in _prepared_days:
        await queue.ensure_partitions(conn, day=batch.batch_day)
        _prepared_days.add(known)


_prepared_days: set[tuple[str, str, date]] = set()


async def lock_idempotency(
    conn: Connection, *, workspace_id: UUID, environment_id: UUID, idempotency_key: str
) -> None:
    """Make a concurrent creation with the same key wait for this transaction."""
    await _idempotency_lock.run(
        conn,
        workspace_id=workspace_id,
        environment_id=environment_id,
        idempotency_key=idempotency_key,
    )


async def replay(
    conn: Connection,
    *,
    workspace_id: UUID,
    environment_id: UUID,
    idempotency_key: str,
    request_hash: bytes,
    hours: int = FOR_EVER_H,
) -> UUID | None:
    """The batch that this very request made before, or None after locking the key for us.

    A concurrent creation with the same key makes this wait for its end. Raises ConflictError when
    the key was used for another request. ``hours``: for so long a key is remembered.
    """
    await lock_idempotency(
        conn,
        workspace_id=workspace_id,
        environment_id=environment_id,
        idempotency_key=idempotency_key,
    )
    known = await _by_idempotency_key.one_or_none(
        conn,
        workspace_id=workspace_id,
        environment_id=environment_id,
        idempotency_key=idempotency_key,
        hours=hours,
    )
    if known is None:
        return None
    if known.is_old:
        await _idempotency_key_free.run(conn, workspace_id=workspace_id, batch_id=known.batch_id)
        return None
    if known.request_hash != request_hash:
        raise ConflictError(
            "This Idempotency-Key was used for a different request; use a new key.",
            code="IDEMPOTENCY_MISMATCH",
            details={"batchId": str(known.batch_id)},
        )
    return known.batch_id
