"""``sluice doctor``: looks at a deployment and says what is wrong and what to do about it.

Reads only. Each check is a function that returns findings; one that says nothing is wrong is told
too, so that its silence is not mistaken for health.
"""

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from uuid import UUID

import psycopg

from app import migrate, queue, rotation
from app.db import Connection, Query, unavailable
from app.errors import SecretError
from app.secrets import Keyring
from app.settings import Settings

_OLDEST_VERSION = 150000
_IDLE_S = 60.0
_SNAPSHOT_S = 900.0
#: Beside the pools: listeners, migrations, somebody's psql.
_SPARE_CONNECTIONS = 5
_SHOWN = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """What was found; ``remedy`` is what to do about it, None when all is well."""

    what: str
    remedy: str | None = None

    @property
    def is_well(self) -> bool:
        """Whether there is nothing to do."""
        return self.remedy is None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Server:
    version: int
    version_name: str
    synchronous_commit: str
    fsync: bool
    autovacuum: bool
    isolation: str
    max_connections: int
    connections: int


@dataclass(frozen=True, slots=True, kw_only=True)
class _Oldest:
    idle_s: float
    snapshot_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class _Missing:
    name: str


@dataclass(frozen=True, slots=True, kw_only=True)
class _Workers:
    alive: int
    silent: int
    work_waits: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class _Behind:
    resources: int


@dataclass(frozen=True, slots=True, kw_only=True)
class _Flow:
    workspace_id: UUID
    batch_id: UUID
    resource_id: UUID


@dataclass(frozen=True, slots=True, kw_only=True)
class _Slot:
    workspace_id: UUID
    limit_id: UUID
    slot_at: datetime
    requests: int
    true_requests: int
    tokens: int
    true_tokens: int


_server_facts = Query("doctor", "server_facts", _Server)
_oldest_transactions = Query("doctor", "oldest_transactions", _Oldest)
_partitions_missing = Query("doctor", "partitions_missing", _Missing)
_workers_seen = Query("doctor", "workers_seen", _Workers)
_ready_behind = Query("doctor", "ready_behind", _Behind)
_counters_off = Query("doctor", "counters_off", _Flow)
_ledger_off = Query("doctor", "ledger_off", _Slot)


async def examine(settings: Settings, *, url: str, keyring: Keyring | None) -> list[Finding]:
    """All findings about a database, in the order in which they should be mended.

    ``keyring`` None: no key is configured. A database that cannot be used ends it early.
    """
    try:
        async with await psycopg.AsyncConnection.connect(
            url, autocommit=True, connect_timeout=10, application_name="sluice-doctor"
        ) as conn:
            return await _examine(settings, conn, url=url, keyring=keyring)
    except psycopg.OperationalError as error:
        told = str(unavailable(url, error))
        return [Finding(what=told, remedy="See the server's log, and the address.")]


async def _examine(
    settings: Settings, conn: Connection, *, url: str, keyring: Keyring | None
) -> list[Finding]:
    found = await _server(settings, conn)
    if found and not found[0].is_well:
        return found
    at, needed = migrate.current(url), migrate.head()
    if at != needed:
        state = "was never migrated" if at is None else f"is at revision {at}"
        what = f"The database {state}; this program needs revision {needed}."
        return [*found, Finding(what=what, remedy="Run: sluice migrate")]
    found.append(Finding(what=f"The schema is at revision {at}, as this program needs it."))
    checks: Sequence[Callable[[Settings, Connection], Awaitable[list[Finding]]]] = (
        _transactions,
        _partitions,
        _workers,
        _ready,
        _floors,
        _counters,
        _ledger,
    )
    for check in checks:
        found += await check(settings, conn)
    return found + await _secrets(conn, keyring)


async def _server(settings: Settings, conn: Connection) -> list[Finding]:
    server = await _server_facts.one(conn)
    if server.version < _OLDEST_VERSION:
        what = f"The server is PostgreSQL {server.version_name}."
        return [Finding(what=what, remedy="Sluice needs 15 or newer: upgrade the server.")]
    found = [Finding(what=f"The server is PostgreSQL {server.version_name}.")]
    if server.synchronous_commit == "off":
        what = "synchronous_commit is off: a crash could lose answers that were paid for."
        found.append(Finding(what=what, remedy="Set it to on for this database and its user."))
    if not server.fsync:
        what = "fsync is off: a power cut could destroy the database."
        found.append(Finding(what=what, remedy="Set fsync = on in postgresql.conf."))
    if not server.autovacuum:
        what = "autovacuum is off: the queue's tables will grow and slow down."
        found.append(Finding(what=what, remedy="Set autovacuum = on in postgresql.conf."))
    if server.isolation != "read committed":
        what = f"default_transaction_isolation is {server.isolation}; claims need read committed."
        found.append(Finding(what=what, remedy="Reset it for this database and its user."))
    left = server.max_connections - server.connections
    if left < settings.pool_size + _SPARE_CONNECTIONS:
        what = (
            f"{server.connections} of {server.max_connections} connections are taken; a process of"
            f" Sluice wants {settings.pool_size}."
        )
        remedy = "Raise max_connections, lower SLUICE_POOL_SIZE, or put a pooler between."
        found.append(Finding(what=what, remedy=remedy))
    return found


async def _transactions(_: Settings, conn: Connection) -> list[Finding]:
    oldest = await _oldest_transactions.one(conn)
    found: list[Finding] = []
    if oldest.idle_s > _IDLE_S:
        what = f"A transaction has been idle for {oldest.idle_s:,.0f} s; it blocks cleaning up."
        remedy = "Find it in pg_stat_activity (state 'idle in transaction') and end its program."
        found.append(Finding(what=what, remedy=remedy))
    if oldest.snapshot_s > _SNAPSHOT_S:
        what = f"A query has held a snapshot for {oldest.snapshot_s:,.0f} s; claims slow down."
        remedy = "Let long reports run on a replica, or in shorter steps."
        found.append(Finding(what=what, remedy=remedy))
    return found or [Finding(what="No transaction holds back cleaning up.")]


async def _partitions(_: Settings, conn: Connection) -> list[Finding]:
    missing = [row.name for row in await _partitions_missing.all(conn)]
    if not missing:
        return [Finding(what="The partitions of today and tomorrow exist.")]
    what = f"{len(missing)} partitions of today and tomorrow are missing, such as {missing[0]}."
    return [Finding(what=what, remedy="Start a worker: it makes them within a minute.")]


async def _workers(settings: Settings, conn: Connection) -> list[Finding]:
    seen = await _workers_seen.one(conn, dead_after_s=settings.dead_after_s)
    found: list[Finding] = []
    if seen.work_waits:
        what = f"Work has been waiting for more than a minute, and {seen.alive} workers live."
        found.append(Finding(what=what, remedy="Start `sluice worker`, or look at its log."))
    if seen.silent:
        what = f"{seen.silent} workers fell silent without saying goodbye."
        if seen.alive:
            found.append(Finding(what=f"{what} Their items are brought back by the others."))
        else:
            found.append(Finding(what=what, remedy="Start `sluice worker`; nothing is lost."))
    return found or [Finding(what=f"{seen.alive} workers live, and no work is left waiting.")]


async def _ready(_: Settings, conn: Connection) -> list[Finding]:
    behind = await _ready_behind.one(conn)
    if not behind.resources:
        return [Finding(what="Workers are told of all work there is.")]
    what = f"{behind.resources} resources have work that no worker is told of: a bug of ours."
    return [
        Finding(what=what, remedy="A running worker mends it within a minute; please report it.")
    ]


async def _floors(_: Settings, conn: Connection) -> list[Finding]:
    below = await queue.below_floor(conn)
    if not below:
        return [Finding(what="No unstarted item lies below a floor.")]
    items = sum(row.items for row in below)
    what = (
        f"{items} unstarted items lie below the floor of batch {below[0].batch_id}: a bug of ours."
    )
    remedy = "They are never claimed: set the flow's floor to 0, and please report it."
    return [Finding(what=what, remedy=remedy)]


async def _counters(_: Settings, conn: Connection) -> list[Finding]:
    off = await _counters_off.all(conn)
    if not off:
        return [Finding(what="All counters equal a recount of the items.")]
    which = ", ".join(str(row.batch_id) for row in off[:_SHOWN])
    what = (
        f"The counters of {len(off)} flows differ from a recount: batches {which}. A bug of ours."
    )
    return [Finding(what=what, remedy="Answers are not affected; please report it.")]


async def _ledger(settings: Settings, conn: Connection) -> list[Finding]:
    off = await _ledger_off.all(conn, keep_hours=settings.ledger_keep_hours)
    if not off:
        return [Finding(what="The ledger equals a recount of the calls.")]
    first = off[0]
    what = (
        f"{len(off)} slots of the ledger differ from a recount; the first, of limit"
        f" {first.limit_id} at {first.slot_at:%Y-%m-%d %H:%M:%S}, has {first.requests:,} requests and"
        f" {first.tokens:,} tokens for {first.true_requests:,} and {first.true_tokens:,}."
    )
    return [Finding(what=what, remedy="It ages out with its window; please report it.")]


async def _secrets(conn: Connection, keyring: Keyring | None) -> list[Finding]:
    stored = await rotation.stored(conn)
    if keyring is None:
        if not stored:
            return []
        what = f"{len(stored)} secrets are stored, and no key is configured."
        return [Finding(what=what, remedy="Set SLUICE_SECRET_KEY to the key that sealed them.")]
    found: list[Finding] = []
    for secret in stored:
        try:
            secret.open(keyring)
        except SecretError as error:
            what = f"The secret of {secret.owner} ({secret.id}): {error}."
            found.append(Finding(what=what, remedy="Add the key, or enter the secret again."))
    if not found:
        found = [Finding(what=f"All {len(stored)} secrets open.")]
    uses = await rotation.key_uses(conn)
    old = [
        use
        for use in uses
        if use.secret_key_id != keyring.key_id and keyring.holds(use.secret_key_id)
    ]
    for use in old:
        what = (
            f"{use.secrets} secrets are sealed with the older key '{use.secret_key_id}', not with "
            f"'{keyring.key_id}'."
        )
        found.append(Finding(what=f"{what} `sluice secrets rotate` seals them anew."))
    return found
