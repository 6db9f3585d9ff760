"""The sender: posts deliveries until they are taken or given up. At least once each, never in silence.

One loop looks which endpoints have something due: at a ring of the doorbell, when the next one falls
due, and every few seconds anyway. Each of those gets a task that, in one transaction after the other,
records what came of its last tries and claims as many new ones as it may have out. No transaction is
open during a try. Any number of processes may do this beside each other: an endpoint's row is the
mutex of its deliveries, and a claim is a lease. What a process had out when it died is sent again by
whoever comes when the lease is over, under the same id.

An address that fails three times in a row is left alone for a while that doubles, and then gets a single
delivery at a time until one is taken: what waits behind it spends no tries, and one that hangs holds one
slot. All failing addresses together never hold more than half of the slots.
"""

import asyncio
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from http import HTTPStatus
from typing import Final
from uuid import UUID

from app import batches, items, webhooks
from app.api import wire_webhooks
from app.batches import Batch
from app.courier import Courier, Message, Receipt
from app.db import Connection, Database
from app.doorbell import EVENTS, Listener
from app.errors import SecretError
from app.items import Item
from app.log import Log
from app.secrets import Keyring
from app.settings import Settings
from app.supervision import Supervisor
from app.webhooks import Claimed, Due, Endpoint, Tried

log = Log("sender")

_LOOK_S: Final = 5.0
#: Between looks: rings come with every commit of every batch.
_PAUSE_S: Final = 0.05
_MOST: Final = 500
_FAILING: Final = 3
_FIRST_REST_S: Final = 0.5
#: A lease is the time limit of a try plus this.
_GRACE_S: Final = 5.0
_CLOSE_S: Final = 5.0
#: After so long others that share an address get their turn.
_TURN_S: Final = 2.0

_FORGOTTEN: Final = Receipt(
    status_code=None,
    error_code="not_sent",
    error_message="what it told of is no longer kept",
    latency_ms=0,
)
#: A failure like any other: a key that is missing may be configured again before the last try.
_SEALED: Final = Receipt(
    status_code=None,
    error_code="secret_unreadable",
    error_message="the endpoint's secret cannot be opened with the operator's SLUICE_SECRET_KEY",
    latency_ms=0,
)


@dataclass(slots=True)
class _Address:
    """What this process knows of a URL of a workspace."""

    in_flight: int = 0
    failures: int = 0
    rests_until: float = 0.0

    @property
    def is_failing(self) -> bool:
        return self.failures >= _FAILING

    def note(self, receipt: Receipt, most_rest_s: float) -> None:
        """Learn from a try. A refusal of a message says nothing against the address."""
        if not receipt.is_overload:
            self.failures = 0
            return
        self.failures += 1
        if self.is_failing:
            rest_s = min(most_rest_s, _FIRST_REST_S * 2 ** min(self.failures - _FAILING, 20))
            self.rests_until = time.monotonic() + rest_s * random.uniform(0.8, 1.0)  # noqa: S311 - jitter


@dataclass(frozen=True, slots=True, kw_only=True)
class _Post:
    """A claimed delivery and what to send; a receipt in its place: nothing can be, and why."""

    delivery: Claimed
    message: Message | Receipt


class Sender:
    """Sends deliveries while ``run`` runs; ``close`` lets what is out end, for a few seconds."""

    def __init__(
        self, settings: Settings, db: Database, *, keyring: Keyring, listen_url: str
    ) -> None:
        self._settings = settings
        self._db = db
        self._keyring = keyring
        self._courier = Courier(
            guard=settings.callback_guard, timeout_s=settings.delivery_timeout_s, most=_MOST
        )
        self._listener = Listener(listen_url, [EVENTS], self._heard, db=db)
        self._background = Supervisor("sender")
        self._addresses: dict[tuple[UUID, str], _Address] = {}
        self._serving: dict[tuple[UUID, UUID], asyncio.Task[None]] = {}
        self._wake = asyncio.Event()
        self._in_flight = 0
        self._failing_in_flight = 0
        self._swept_at = 0.0
        self._is_closing = False

    def start(self) -> None:
        """Send from now on, in the background."""
        self._background.start("listen", self._listener.run)
        self._background.start("look", self._look_loop)

    async def close(self) -> None:
        """Begin nothing more, let what is out end for a few seconds, and leave the rest to others."""
        self._is_closing = True
        await self._background.stop()
        serving = set(self._serving.values())
        if serving:
            _, late = await asyncio.wait(serving, timeout=_CLOSE_S)
            for task in late:
                task.cancel()
            await asyncio.gather(*late, return_exceptions=True)
        await self._courier.close()

    def _heard(self, channel: str, ids: frozenset[UUID] | None) -> None:
        del channel, ids
        self._wake.set()

    async def _look_loop(self) -> None:
        while True:
            self._wake.clear()
            wait_s = await self._db.persist(self._look, what="looking for deliveries")
            await asyncio.sleep(_PAUSE_S)
            try:
                async with asyncio.timeout(wait_s):
                    await self._wake.wait()
            except TimeoutError:
                continue

    async def _look(self) -> float:
        """Begin to serve what is due; seconds until the next look."""
        wait_s = random.uniform(0.8, 1.2) * _LOOK_S  # noqa: S311 - jitter
        now = time.monotonic()
        async with self._db.connection() as conn:
            if now - self._swept_at > _LOOK_S:
                await webhooks.sweep(conn)
                self._swept_at = now
            found = await webhooks.due(conn, within_s=_LOOK_S)
        resting: list[tuple[Due, float]] = []
        random.shuffle(found)
        for due in found:
            key = (due.workspace_id, due.endpoint_id)
            address = self._address(due.workspace_id, due.url)
            if due.wait_s > 0:
                wait_s = min(wait_s, due.wait_s)
            elif key in self._serving:
                continue
            elif address.is_failing and (address.in_flight or address.rests_until > now):
                rest_s = max(address.rests_until - now, _FIRST_REST_S)
                resting.append((due, rest_s))
                wait_s = min(wait_s, rest_s)
            elif self._room(address) > 0:
                task = asyncio.create_task(self._serve(due, address))
                self._serving[key] = task
                task.add_done_callback(lambda ended, key=key: self._served(key, ended))
        if resting:
            # Out of the way of the others, of which a look takes the first thousand.
            async with self._db.connection() as conn:
                await webhooks.postpone(conn, resting)
        self._forget()
        return wait_s

    def _address(self, workspace_id: UUID, url: str) -> _Address:
        return self._addresses.setdefault((workspace_id, url.partition("?")[0]), _Address())

    def _forget(self) -> None:
        """Drop what is known of addresses that work and rest."""
        if len(self._addresses) > _MOST:
            self._addresses = {
                key: known
                for key, known in self._addresses.items()
                if known.in_flight or known.failures
            }

    def _served(self, key: tuple[UUID, UUID], task: asyncio.Task[None]) -> None:
        self._serving.pop(key, None)
        self._wake.set()  # what waited for a slot is looked at now
        if not task.cancelled() and (error := task.exception()) is not None:
            # A mistake of ours; the lease brings its deliveries back.
            log.error("delivery.broken", endpoint=key[1], reason=type(error).__name__)

    def _room(self, address: _Address) -> int:
        """How many more may be out to an address now."""
        free = _MOST - self._in_flight
        if self._is_closing or free <= 0:
            return 0
        if address.is_failing:
            rests = address.in_flight > 0 or address.rests_until > time.monotonic()
            return 0 if rests or self._failing_in_flight >= _MOST // 2 else 1
        return min(free, self._settings.delivery_concurrency - address.in_flight)

    # One endpoint ---------------------------------------------------------------------------------

    async def _serve(self, due: Due, address: _Address) -> None:
        """Send to an endpoint until nothing of it is due or may be sent now, or its turn is over."""
        out: set[asyncio.Task[Tried]] = set()
        tried: list[Tried] = []
        until = time.monotonic() + _TURN_S
        try:
            while True:
                room = max(self._room(address), 0) if time.monotonic() < until else 0
                if tried or room:
                    posts = await self._db.persist(
                        lambda tried=tuple(tried), room=room: self._exchange(due, tried, room),
                        what="deliveries",
                    )
                    tried.clear()
                    out |= {self._begin(post, address) for post in posts}
                if not out:
                    return
                done, out = await asyncio.wait(out, return_when=asyncio.FIRST_COMPLETED)
                tried += [task.result() for task in done]
        finally:
            for task in out:
                task.cancel()

    async def _exchange(self, due: Due, tried: Sequence[Tried], room: int) -> list[_Post]:
        """Record what came of tries and claim new ones, in one transaction; what to send."""
        gone = next((each for each in tried if each.status_code == HTTPStatus.GONE), None)
        ids = {"workspace_id": due.workspace_id, "endpoint_id": due.endpoint_id}
        async with self._db.transaction() as conn:
            held = await (webhooks.hold if tried else webhooks.take)(conn, **ids)
            if held is None:
                return []
            if tried:
                await webhooks.settle(conn, held=held, tried=tried)
            if gone is not None and held.disabled_at is None:
                await webhooks.disable(conn, held=held, reason="the receiver answered 410 Gone")
                log.warning("endpoint.disabled", endpoint=held.endpoint_id, status=410)
            claimed: list[Claimed] = []
            if room and held.disabled_at is None and gone is None:
                lease_s = self._settings.delivery_timeout_s + _GRACE_S
                claimed = await webhooks.claim(conn, held=held, most=room, lease_s=lease_s)
            await webhooks.rest(conn, held=held)
        if not claimed:
            return []
        async with self._db.connection() as conn:
            return await self._posts(conn, held, claimed)

    async def _posts(
        self, conn: Connection, endpoint: Endpoint, claimed: Sequence[Claimed]
    ) -> list[_Post]:
        """What to send, made of the rows as they are now."""
        try:
            known = webhooks.open_(self._keyring, endpoint)
        except SecretError as error:
            log.warning("secret.unreadable", endpoint=endpoint.endpoint_id, reason=str(error))
            return [_Post(delivery=each, message=_SEALED) for each in claimed]
        secrets = [known.secret]
        until = endpoint.old_secret_until
        if known.old_secret is not None and until is not None and until > await batches.clock(conn):
            secrets.append(known.old_secret)
        posts: list[_Post] = []
        for batch_id in dict.fromkeys(each.batch_id for each in claimed):
            some = [each for each in claimed if each.batch_id == batch_id]
            batch = await batches.get(
                conn,
                workspace_id=endpoint.workspace_id,
                environment_id=endpoint.environment_id,
                batch_id=batch_id,
            )
            told: dict[int, Item] = {}
            seqs = sorted({each.seq for each in some if each.seq is not None})
            if batch is not None and seqs:
                found = await items.numbered(conn, batch=batch, seqs=seqs)
                told = {item.seq: item for item in found}
            for each in some:
                body = _body(endpoint, batch, each, told)
                posts.append(
                    _Post(
                        delivery=each,
                        message=_FORGOTTEN
                        if body is None
                        else Message(
                            url=endpoint.url,
                            message_id=each.message_id,
                            body=body,
                            secrets=secrets,
                            headers=known.headers,
                        ),
                    )
                )
        return posts

    def _begin(self, post: _Post, address: _Address) -> asyncio.Task[Tried]:
        failing = address.is_failing
        address.in_flight += 1
        self._in_flight += 1
        self._failing_in_flight += failing

        def ended(_: asyncio.Task[Tried]) -> None:
            address.in_flight -= 1
            self._in_flight -= 1
            self._failing_in_flight -= failing

        task = asyncio.create_task(self._try(post, address))
        task.add_done_callback(ended)
        return task

    async def _try(self, post: _Post, address: _Address) -> Tried:
        delivery = post.delivery
        started_at = datetime.now(UTC)  # noqa: TID251 - a fact about this host, not a deadline
        if isinstance(post.message, Receipt):
            receipt = post.message
        else:
            receipt = await self._courier.post(post.message)
            address.note(receipt, self._settings.delivery_rest_s)
        tried = self._outcome(delivery, receipt, started_at)
        facts = {
            "batch": delivery.batch_id,
            "number": delivery.event_no,
            "attempt": delivery.attempt,
            "code": receipt.error_code or receipt.status_code,
        }
        if tried.status == "dead":
            log.warning("delivery.given_up", **facts)
        else:
            log.debug("delivery.tried", status=tried.status, **facts)
        return tried

    def _outcome(self, delivery: Claimed, receipt: Receipt, started_at: datetime) -> Tried:
        """What a try makes of its delivery: delivered, to be tried again, or dead."""
        status: webhooks.Status = "delivered"
        reason: str | None = None
        wait_s = 0.0
        if receipt.error_code is not None:
            waits = self._settings.delivery_waits
            if receipt.status_code == HTTPStatus.GONE:
                status, reason = "dead", "the receiver answered 410 Gone"
            elif receipt is _FORGOTTEN:
                status, reason = "dead", receipt.error_message
            elif delivery.failures < len(waits):
                status = "pending"
                wait_s = waits[delivery.failures] * random.uniform(1.0, 1.1)  # noqa: S311 - jitter
                wait_s = max(wait_s, receipt.retry_after_s or 0.0)
            elif receipt is _SEALED:
                status, reason = "dead", receipt.error_message
            else:
                status, reason = "dead", f"it failed {delivery.failures + 1} times"
        return Tried(
            delivery=delivery,
            status=status,
            reason=reason,
            wait_s=wait_s,
            started_at=started_at,
            latency_ms=receipt.latency_ms,
            status_code=receipt.status_code,
            error_code=receipt.error_code,
            error_message=receipt.error_message,
        )


def _body(
    endpoint: Endpoint, batch: Batch | None, delivery: Claimed, told: dict[int, Item]
) -> bytes | None:
    """The body of a delivery; None when what it tells of is gone.

    A webhook may tell of a batch that was refused, and so never was.
    """
    if endpoint.batch_id is None:
        return wire_webhooks.webhook_body(batch, delivery)
    if batch is None:
        return None
    if delivery.seq is None:
        return wire_webhooks.callback_body(batch, delivery, None)
    item = told.get(delivery.seq)
    return None if item is None else wire_webhooks.callback_body(batch, delivery, item)
