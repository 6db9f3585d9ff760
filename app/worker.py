"""The worker: claims what it can start at once, calls the provider, records outcomes together.

Five loops around the in-flight calls, each supervised:

    claim      asks the due resources for as many items as there are free slots, then sleeps until
               capacity frees, a ring, or a free slot; every 5 s it looks anyway
    flush      writes outcomes: a few hundred, or what came within a few tens of milliseconds
    heartbeat  shows that the process lives
    cut        lets go of the calls of cancelled batches, when told so and with every heartbeat
    listen     hears rings

No transaction is open during a call. While the database is away, outcomes are kept (a bounded
number, then claiming stops) and written when it is back; the claim's fencing number decides then.
"""

import asyncio
import contextlib
import os
import random
import socket
import time
from collections import defaultdict, deque
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import assert_never
from uuid import UUID

import msgspec
import psycopg

from app import __version__, connections, queue
from app.connections import Route
from app.db import CONNECTION_ERRORS, Database
from app.doorbell import ABORTS, EVENTS, WORK, Listener, Ringer
from app.errors import SecretError
from app.ids import uuid7
from app.intake import vmx_of
from app.log import Log
from app.presets import key_header_of, protocol_of
from app.provider import Answered, Call, Endpoint, Provider, Rejected, Throttled, Unreachable
from app.provider import Outcome as CallOutcome
from app.queue import Item, Observation, Outcome, Settlement
from app.rate_limits import RateLimit
from app.secrets import Keyring
from app.settings import Settings
from app.supervision import Supervisor

log = Log("worker")

_LOOK_S = 5.0
#: A full worker waits until this share of its slots is free, or this long, before it claims again:
#: one claim of fifty items costs little more than one of a single item.
_REFILL_SHARE = 20
_REFILL_S = 0.02
#: Before asking again where another worker was just claiming.
_BUSY_S = 0.01


@dataclass(slots=True)
class _Target:
    """A resource's route with its secret in the clear, as of ``route.config_at``."""

    route: Route
    secret: str | None
    default_args: bytes | None


@dataclass(slots=True)
class _Finished:
    """An outcome that waits to be written."""

    workspace_id: UUID
    settlement: Settlement
    body: str | None
    rate_limits: tuple[RateLimit, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Rest:
    """When to claim again: after so many seconds or a ring, or when slots are free."""

    seconds: float = 0.0
    for_slots: bool = False


_Key = tuple[UUID, int, int]


def _key(of: Item | Settlement) -> _Key:
    return (of.batch_id, of.seq, of.attempt)


def _more_in(claim: queue.Claim, asked: int) -> float | None:
    """Seconds until another claim may find something; None when nothing waits."""
    if claim.busy:
        return random.uniform(0.5, 1.5) * _BUSY_S  # noqa: S311 - jitter
    if claim.wait_s is None:
        return None
    if len(claim.items) >= asked:
        return 0.0
    return max(claim.wait_s, _BUSY_S)


class Worker:
    """One worker process's work. ``run`` returns when ``stop`` is set and all is written.

    ``stop`` ends claiming and lets calls in flight finish for ``settings.drain_s``; ``force`` ends
    at once, leaving what is in flight to be reclaimed.
    """

    def __init__(
        self, settings: Settings, db: Database, *, keyring: Keyring, listen_url: str
    ) -> None:
        self.worker_id = uuid7()
        self.stop = asyncio.Event()
        self.force = asyncio.Event()
        self._settings = settings
        self._db = db
        self._keyring = keyring
        self._provider = Provider(
            max_connections=settings.concurrency,
            max_response_bytes=settings.max_response_bytes,
            guard=settings.provider_guard,
        )
        self._ringer = Ringer(db)
        self._listener = Listener(listen_url, [WORK, ABORTS], self._heard, db=db)
        self._calls: dict[asyncio.Task[None], Item] = {}
        self._told_to_cut = asyncio.Event()
        self._finished: deque[_Finished] = deque()
        self._has_finished = asyncio.Event()
        self._flushing = asyncio.Lock()
        self._wake = asyncio.Event()
        self._slot_freed = asyncio.Event()
        self._targets: dict[UUID, _Target] = {}
        self._suspecting = False
        self._claim_in_doubt = False
        self._held: set[_Key] = set()

    @property
    def in_flight(self) -> int:
        """Calls out at present."""
        return len(self._calls)

    async def run(self) -> None:
        """Work until ``stop`` is set, then finish, write and say goodbye."""
        await self._db.persist(self._register, what="registering the worker", stop=self.stop)
        log.info("worker.started", worker=self.worker_id, concurrency=self._settings.concurrency)
        background = Supervisor("worker")
        background.start("listen", self._listener.run)
        background.start("ring", self._ringer.run)
        background.start("heartbeat", self._heartbeat_loop)
        background.start("cut", self._cut_loop)
        background.start("flush", self._flush_loop)
        claiming = Supervisor("worker")
        claiming.start("claim", self._claim_loop)
        try:
            await self.stop.wait()
            await claiming.stop()
            if self._claim_in_doubt:
                # Stopped in mid-claim: what it took, if it took, is given back.
                with contextlib.suppress(*CONNECTION_ERRORS):
                    await self._recover_claim()
            await self._drain()
        finally:
            await claiming.stop()
            await background.stop()
            await self._finish_writing()
            await self._provider.close()

    # Claiming --------------------------------------------------------------------------------------

    def _heard(self, channel: str, ids: frozenset[UUID] | None) -> None:
        if channel != ABORTS:
            self._wake.set()
        elif ids is None or any(item.batch_id in ids for item in self._calls.values()):
            self._told_to_cut.set()

    async def _claim_loop(self) -> None:
        while True:
            self._wake.clear()
            self._slot_freed.clear()
            rest = await self._db.persist(self._claim_round, what="claiming")
            if rest.for_slots:
                await self._wait_for_slots()
            elif rest.seconds > 0:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(rest.seconds):
                        await self._wake.wait()

    async def _wait_for_slots(self) -> None:
        """Until slots are free: a few at least, so that claims stay worth their transaction."""
        while self._free() <= 0 or (self._suspecting and self._calls):
            await self._slot_freed.wait()
            self._slot_freed.clear()
        enough = max(self._settings.concurrency // _REFILL_SHARE, 1)
        until = time.monotonic() + _REFILL_S
        while self._free() < enough and (left := until - time.monotonic()) > 0:
            self._slot_freed.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(left):
                    await self._slot_freed.wait()

    def _free(self) -> int:
        """Slots to claim for; none while too many outcomes wait for the database."""
        if len(self._finished) >= self._settings.max_unwritten:
            return 0
        return self._settings.concurrency - len(self._calls)

    async def _claim_round(self) -> "_Rest":
        """Ask every due resource for its equal share of the free slots, until either runs out."""
        if self._claim_in_doubt:
            await self._recover_claim()
        if self._suspecting and self._calls:
            return _Rest(for_slots=True)
        self._suspecting = False
        ready, sleep_s = await self._due()
        while ready:
            share = max(self._free() // len(ready), 1)
            has_more: list[queue.Due] = []
            for resource in ready:
                want = min(share, self._free())
                if want <= 0:
                    return _Rest(for_slots=True)
                claim = await self._claim(resource, want)
                self._suspecting = claim.isolated
                if claim.isolated:
                    return _Rest(for_slots=True)
                more_s = _more_in(claim, want)
                if more_s == 0:
                    has_more.append(resource)
                elif more_s is not None:
                    sleep_s = min(sleep_s, more_s)
            ready = has_more
        return _Rest(seconds=sleep_s)

    async def _due(self) -> tuple[list[queue.Due], float]:
        """Resources to ask now, in random order, and seconds until the next one or a look."""
        async with self._db.connection() as conn:
            known = await queue.due(conn)
        waits = {due.resource_id: (due.next_at - due.now).total_seconds() for due in known}
        ready = [due for due in known if waits[due.resource_id] <= 0]
        random.shuffle(ready)
        look_s = random.uniform(0.8, 1.2) * _LOOK_S  # noqa: S311 - jitter
        return ready, min([look_s, *(s for s in waits.values() if s > 0)])

    async def _claim(self, due: queue.Due, want: int) -> queue.Claim:
        begun = time.monotonic()
        self._claim_in_doubt = True
        try:
            async with self._db.transaction() as conn:
                claim = await queue.claim(
                    conn,
                    workspace_id=due.workspace_id,
                    resource_id=due.resource_id,
                    worker_id=self.worker_id,
                    want=want,
                    alone=not self._calls,
                    guard_s=self._settings.guard_s,
                    grace_s=self._settings.lease_grace_s,
                    burst_s=self._settings.burst_s,
                    slow_start=self._settings.slow_start,
                )
        except psycopg.Error as error:
            if error.sqlstate in queue.CROSSED:
                # A cancel or pause crossed the claim; nothing was taken. Ask again.
                self._claim_in_doubt = False
                return queue.Claim(items=[], wait_s=0.0, busy=True, isolated=False, config_at=None)
            raise
        self._held.update(_key(item) for item in claim.items)
        self._claim_in_doubt = False
        if claim.items:
            log.debug("item.claimed", resource=due.resource_id, items=len(claim.items))
            try:
                target = await self._target(due, claim.config_at)
            except CONNECTION_ERRORS:
                for item in claim.items:
                    self._settle_unsent(item, Outcome.unsent, None, None)
                raise
            for item in claim.items:
                self._begin(item, target, begun)
            self._ringer.ring(EVENTS, {item.batch_id for item in claim.items})
        return claim

    async def _recover_claim(self) -> None:
        """Give back what a claim took whose answer never came: committed, but unknown to us."""
        async with self._db.connection() as conn:
            held = await queue.held_by(conn, worker_id=self.worker_id)
        self._claim_in_doubt = False
        for item in held:
            if _key(item) not in self._held:
                self._held.add(_key(item))
                self._settle_unsent(item, Outcome.unsent, None, None)

    async def _target(
        self, due: queue.Due, config_at: datetime | None
    ) -> _Target | SecretError | None:
        """Where to call; None when the resource is gone; the error when its secret is sealed."""
        known = self._targets.get(due.resource_id)
        if known is not None and config_at is not None and known.route.config_at >= config_at:
            return known
        async with self._db.connection() as conn:
            route = await connections.route(
                conn, workspace_id=due.workspace_id, resource_id=due.resource_id
            )
        if route is None:
            return None
        try:
            secret = connections.open_secret(self._keyring, route)
        except SecretError as error:
            log.warning("secret.unreadable", connection=route.connection_id, reason=str(error))
            return error
        default_args = msgspec.json.encode(route.default_args) if route.default_args else None
        target = _Target(route=route, secret=secret, default_args=default_args)
        self._targets[due.resource_id] = target
        return target

    # Calling ---------------------------------------------------------------------------------------

    def _begin(self, item: Item, target: _Target | SecretError | None, claim_begun: float) -> None:
        if item.impossible:
            self._settle_unsent(
                item,
                Outcome.impossible,
                "CAPACITY_IMPOSSIBLE",
                "its prompt alone is larger than a limit that was set after its creation",
            )
        elif target is None:
            self._settle_unsent(
                item, Outcome.rejected, "AI_RESOURCE_NOT_FOUND", "its resource was deleted"
            )
        elif isinstance(target, SecretError):
            self._settle_unsent(item, Outcome.unsent, "SECRET_UNREADABLE", str(target), wait_s=30.0)
        elif not target.route.is_allowed:
            settlement = self._settlement(item, Outcome.rejected, target.route.connection_id)
            settlement.refund = True
            settlement.error_code = "MODEL_NOT_ALLOWED"
            settlement.error_message = (
                f"its connection's allowedModels have no '{target.route.model}'"
            )
            self._finish(item, settlement, None)
        else:
            task = asyncio.create_task(self._call(item, target, claim_begun))
            self._calls[task] = item
            task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        del self._calls[task]
        self._slot_freed.set()
        if not task.cancelled() and (error := task.exception()) is not None:
            # A mistake of ours; the lease brings the item back.
            log.error("call.broken", reason=type(error).__name__)

    async def _call(self, item: Item, target: _Target, claim_begun: float) -> None:
        # Sent later, it could arrive in a window that the ledger has already given away.
        send_by = claim_begun + self._settings.guard_s if item.is_limited else None
        if send_by is not None and time.monotonic() > send_by:
            self._settle_unsent(item, Outcome.unsent, None, None)
            return
        route = target.route
        vmx = vmx_of(item.body)
        started_at = datetime.now(UTC)  # noqa: TID251 - a fact about this host, not a deadline
        call = Call(
            base_url=route.base_url,
            endpoint=Endpoint(item.endpoint),
            model=route.model,
            body=item.body.encode(),
            timeout_s=(item.timeout_ms or route.timeout_ms) / 1000,
            api_key=target.secret,
            headers=route.headers,
            default_args=target.default_args,
            override_args=msgspec.json.encode(vmx.provider_args)
            if vmx is not None and vmx.provider_args
            else None,
            # The same for every attempt of an item: a provider that honours it bills it once.
            idempotency_key=f"sluice-{item.batch_id}-{item.seq}",
            send_by=send_by,
            protocol=protocol_of(route.provider),
            key_header=key_header_of(route.provider),
        )
        try:
            outcome = await self._provider.call(call)
        except asyncio.CancelledError:
            # Cut in mid-call: it may have been made, so it is no release; nothing is burned.
            settlement = self._settlement(item, Outcome.lost, connection_id=route.connection_id)
            settlement.error_code = "aborted"
            settlement.error_message = (
                "the call was cut: its worker stopped, or its batch was cancelled"
            )
            self._finish(item, settlement, None)
            return
        if isinstance(outcome, Unreachable) and outcome.code == "late":
            self._settle_unsent(item, Outcome.unsent, None, None)
            return
        settlement, body = self._recorded(item, route, outcome)
        settlement.started_at = started_at
        self._finish(item, settlement, body, outcome.rate_limits)

    def _recorded(
        self, item: Item, route: Route, outcome: CallOutcome
    ) -> tuple[Settlement, str | None]:
        """The outcome of a call as it is written down."""
        body: str | None = None
        match outcome:
            case Answered():
                settlement = self._settlement(item, Outcome.answered, route.connection_id)
                body = outcome.body.decode()
                settlement.model = outcome.model
                if outcome.usage is not None:
                    settlement.input_tokens = outcome.usage.input_tokens
                    settlement.output_tokens = outcome.usage.output_tokens
                    settlement.cached_tokens = outcome.usage.cached_tokens
                    settlement.reasoning_tokens = outcome.usage.reasoning_tokens
            case Rejected():
                settlement = self._settlement(item, Outcome.rejected, route.connection_id)
                settlement.error_code = outcome.code
                settlement.error_message = outcome.message
                body = outcome.body.decode() if outcome.body is not None else None
            case Throttled():
                settlement = self._settlement(item, Outcome.throttled, route.connection_id)
                settlement.error_code = outcome.code
                settlement.error_message = outcome.message
                if outcome.retry_after_s is not None:
                    # A little jitter keeps workers and programs from coming back in one moment.
                    jitter = random.uniform(1.0, 1.1)  # noqa: S311 - jitter
                    settlement.wait_s = max(outcome.retry_after_s, 0.05) * jitter
                log.warning(
                    "resource.throttled",
                    resource=route.resource_id,
                    code=outcome.code,
                    asked_s=outcome.retry_after_s,
                )
            case Unreachable():
                settlement = self._settlement(item, Outcome.unreachable, route.connection_id)
                settlement.error_code = outcome.code
                settlement.error_message = outcome.message
                settlement.refund = not outcome.sent
                settlement.wait_s = max(self._backoff_s(item.failures), outcome.retry_after_s or 0)
            case _:
                assert_never(outcome)
        settlement.status_code = outcome.status_code
        settlement.request_id = outcome.request_id
        settlement.latency_ms = outcome.latency_ms
        settlement.headers = outcome.headers or None
        return settlement, body

    def _settlement(
        self, item: Item, outcome: Outcome, connection_id: UUID | None = None
    ) -> Settlement:
        return Settlement(
            batch_day=item.batch_day,
            batch_id=item.batch_id,
            resource_id=item.resource_id,
            connection_id=connection_id,
            seq=item.seq,
            attempt=item.attempt,
            outcome=outcome,
            claimed_at=item.claimed_at,
            limit_ids=item.limit_ids,
            reserved_input_tokens=item.input_tokens,
            reserved_output_tokens=item.output_tokens,
            expected_output_tokens=item.expected_output_tokens,
            refund=False,
            ended_at=datetime.now(UTC),  # noqa: TID251 - a fact about this host, not a deadline
        )

    def _settle_unsent(
        self,
        item: Item,
        outcome: Outcome,
        code: str | None,
        message: str | None,
        wait_s: float | None = None,
    ) -> None:
        settlement = self._settlement(item, outcome)
        settlement.refund = True
        settlement.error_code = code
        settlement.error_message = message
        settlement.wait_s = wait_s
        self._finish(item, settlement, None)

    def _backoff_s(self, failures: int) -> float:
        """Full jitter: anything up to base * 2^failures, capped (AWS architecture blog, 2015)."""
        most = min(self._settings.backoff_cap_s, self._settings.backoff_base_s * 2**failures)
        return random.uniform(0, most)  # noqa: S311 - jitter

    # Writing ---------------------------------------------------------------------------------------

    def _finish(
        self,
        item: Item,
        settlement: Settlement,
        body: str | None,
        rate_limits: tuple[RateLimit, ...] = (),
    ) -> None:
        self._finished.append(_Finished(item.workspace_id, settlement, body, rate_limits))
        self._has_finished.set()

    async def _flush_loop(self) -> None:
        while True:
            await self._has_finished.wait()
            if len(self._finished) < self._settings.flush_items:
                await asyncio.sleep(self._settings.flush_ms / 1000)
            await self._flush()

    async def _flush(self) -> None:
        """Write what has finished, at most ``flush_items``; on any failure it is kept."""
        async with self._flushing:
            some = [
                self._finished.popleft()
                for _ in range(min(len(self._finished), self._settings.flush_items))
            ]
            if not self._finished:
                self._has_finished.clear()
            parts = _by_workspace(some)
            try:
                for workspace_id in list(parts):
                    await self._db.persist(
                        lambda w=workspace_id: self._write(w, parts[w]),
                        what="recording outcomes",
                        stop=self.force,
                    )
                    del parts[workspace_id]
            finally:
                # What was not written (a cancelled or failed flush) goes back to the front.
                for part in parts.values():
                    self._finished.extendleft(reversed(part))
                if self._finished:
                    self._has_finished.set()

    async def _write(self, workspace_id: UUID, part: list[_Finished]) -> None:
        try:
            async with self._db.transaction() as conn:
                settled = await queue.settle(
                    conn,
                    workspace_id=workspace_id,
                    worker_id=self.worker_id,
                    settlements=[finished.settlement for finished in part],
                    bodies=[finished.body for finished in part],
                    observed=_observed(part),
                    rest_s=self._settings.backoff_base_s,
                    rest_most_s=self._settings.backoff_cap_s,
                )
        except CONNECTION_ERRORS:
            raise
        except psycopg.Error as error:
            if len(part) == 1:
                self._give_up(part[0], error)
                return
            # One outcome that the database refuses must not hold up the others: halve.
            middle = len(part) // 2
            await self._write(workspace_id, part[:middle])
            await self._write(workspace_id, part[middle:])
            return
        for row in settled:
            finished = part[row.ord - 1]
            if row.settled:
                self._held.discard(_key(finished.settlement))
            else:
                self._finished.append(finished)
        self._slot_freed.set()
        self._ringer.ring(EVENTS, {row.batch_id for row in settled if row.becomes is not None})
        if any(row.wakes for row in settled):
            self._ringer.ring(WORK, {row.resource_id for row in settled})
            self._wake.set()

    def _give_up(self, finished: _Finished, error: psycopg.Error) -> None:
        """An outcome that cannot be stored as it is: store that fact instead, once."""
        settlement = finished.settlement
        log.error(
            "outcome.refused",
            batch=settlement.batch_id,
            seq=settlement.seq,
            sqlstate=error.sqlstate,
        )
        if settlement.error_code == "unstorable":
            self._held.discard(_key(settlement))
            return
        settlement.outcome = Outcome.rejected
        settlement.error_code = "unstorable"
        settlement.error_message = "the provider's reply could not be stored"
        settlement.model = settlement.request_id = settlement.headers = None
        self._finished.append(_Finished(finished.workspace_id, settlement, None))
        self._has_finished.set()

    # Living and ending -----------------------------------------------------------------------------

    async def _register(self) -> None:
        machine = _machine()
        async with self._db.connection() as conn:
            await queue.register_worker(
                conn,
                worker_id=self.worker_id,
                host=socket.gethostname(),
                machine=machine,
                pid=os.getpid(),
                version=__version__,
            )
            for other in await queue.neighbours(conn, machine=machine):
                if other.worker_id != self.worker_id and not _is_alive(other.pid):
                    log.info("worker.found_dead", worker=other.worker_id, pid=other.pid)
                    await queue.note_death(conn, worker_id=other.worker_id)

    async def _heartbeat_loop(self) -> None:
        while True:
            await self._db.persist(self._beat, what="the heartbeat")
            await asyncio.sleep(self._settings.heartbeat_s)

    async def _beat(self) -> None:
        async with self._db.connection() as conn:
            await queue.heartbeat(conn, worker_id=self.worker_id, in_flight=len(self._calls))
        self._told_to_cut.set()  # a ring may have been lost

    async def _cut_loop(self) -> None:
        while True:
            await self._told_to_cut.wait()
            self._told_to_cut.clear()
            if self._calls:
                await self._db.persist(self._cut, what="looking for calls to cut")

    async def _cut(self) -> None:
        """Let go of the calls of batches that were cancelled with all their calls."""
        held = {(item.workspace_id, item.batch_id) for item in self._calls.values()}
        async with self._db.connection() as conn:
            aborted = await queue.aborted(conn, of=held)
        for call, item in list(self._calls.items()):
            if item.batch_id in aborted:
                call.cancel()
        for batch_id in aborted:
            log.info("call.cut", batch=batch_id)

    async def _drain(self) -> None:
        """Let calls finish; after ``drain_s`` or a second signal, abort the rest."""
        if self._calls and not self.force.is_set():
            log.info("worker.draining", calls=len(self._calls), for_s=self._settings.drain_s)
            forced = asyncio.create_task(self.force.wait())
            until = time.monotonic() + self._settings.drain_s
            while self._calls and not forced.done() and (left := until - time.monotonic()) > 0:
                await asyncio.wait(
                    {*self._calls, forced}, timeout=left, return_when=asyncio.FIRST_COMPLETED
                )
            forced.cancel()
        for call in list(self._calls):
            call.cancel()
        await asyncio.gather(*self._calls, return_exceptions=True)

    async def _finish_writing(self) -> None:
        """Write all that is left and say goodbye; one last try if the database is away."""
        written = len(self._finished)
        try:
            async with asyncio.timeout(self._settings.drain_s or None):
                while self._finished:
                    await self._flush()
                await self._ringer.flush()
                async with self._db.connection() as conn:
                    await queue.stop_worker(conn, worker_id=self.worker_id)
        except (*CONNECTION_ERRORS, TimeoutError) as error:
            log.warning(
                "worker.stopped_unwritten", outcomes=len(self._finished), error=type(error).__name__
            )
        else:
            log.info("worker.stopped", worker=self.worker_id, written_at_the_end=written)


def _by_workspace(some: Iterable[_Finished]) -> dict[UUID, list[_Finished]]:
    parts: dict[UUID, list[_Finished]] = defaultdict(list)
    for finished in some:
        parts[finished.workspace_id].append(finished)
    return parts


def _observed(part: Iterable[_Finished]) -> list[Observation]:
    """What replies stated of limits: the latest limit of each kind, and the most that was used."""
    found: dict[tuple[UUID, str, str], Observation] = {}
    for finished in part:
        resource_id = finished.settlement.resource_id
        for stated in finished.rate_limits:
            key = (resource_id, stated.kind, stated.period)
            held = found.get(key)
            used = stated.used
            if used is not None and held and held.limit == stated.limit and held.used is not None:
                used = max(held.used, used)
            found[key] = Observation(
                resource_id=resource_id,
                kind=stated.kind,
                period=stated.period,
                limit=stated.limit,
                used=used,
            )
    return list(found.values())


def _machine() -> str:
    """Where process ids mean the same: containers may share a host's name, but not these."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot}/{Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return socket.gethostname()


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
