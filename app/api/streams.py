"""Server-sent events: a batch's history as it is written, resumable from any number.

One hub per process. A ring of the doorbell, or a look every second and a half in case a ring was
lost, wakes those who follow a batch; each then reads the events after the last one it sent. First
connect, resume and lost ring are the same code path. Followers that stand at the same number share
one reading and its encoded frames.

Reading is pulled: a follower reads on only when what it read was taken by its connection, so a slow
reader holds one chunk of frames (about a megabyte) and simply reads later.
"""

import asyncio
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from typing import Any, Final
from uuid import UUID

from app import batches, events
from app.api import wire, wire_batches
from app.batches import Batch, Item, Status
from app.db import Connection, Database
from app.events import Event, Kind
from app.log import Log

log = Log("streams")

PING: Final = b": ping\n\n"
DONE: Final = b"data: [DONE]\n\n"
ERROR: Final = b"data: [ERROR]\n\n"

#: What clients written against the reference know; ``strict`` sends nothing else.
DOCUMENTED: Final[frozenset[Kind]] = frozenset(
    {
        "batch-created",
        "item-running",
        "item-completed",
        "item-failed",
        "batch-completed",
        "batch-failed",
    }
)

_STATUS: Final[dict[Kind, Status]] = {
    "item-running": "running",
    "item-completed": "completed",
    "item-failed": "failed",
    "item-retrying": "pending",
    "item-cancelled": "cancelled",
}

_LOOK_S: Final = 1.5
_CHUNK_BYTES: Final = 1024 * 1024
_MOST_EVENTS: Final = 200  # per chunk
_MOST_ROWS: Final = 20  # of events per reading; each may tell of hundreds of items
_FIRST_BYTES: Final = 32 * 1024  # assumed of a frame until some were seen

#: Items and bytes at most in one answer that shows a batch with its items.
MOST_ITEMS: Final = 1000
_MOST_BYTES: Final = 16 * 1024 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """How a follower wants it. ``slim``: without texts. ``strict``: documented events only."""

    slim: bool = False
    strict: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """Frames after a number. ``after``: the number to read on from; ``ended``: nothing follows."""

    frames: bytes
    after: int
    ended: bool


class GoneError(Exception):
    """The batch no longer exists: its retention is over."""


@dataclass(slots=True, kw_only=True)
class _Followed:
    workspace_id: UUID
    environment_id: UUID
    batch_id: UUID
    followers: int = 0
    frame_bytes: float = _FIRST_BYTES
    rung: asyncio.Event = field(default_factory=asyncio.Event)
    reading: dict[tuple[int, View], asyncio.Task[Chunk]] = field(
        default_factory=dict[tuple[int, View], asyncio.Task[Chunk]]
    )


class Hub:
    """Wakes followers and reads for them."""

    def __init__(self, db: Database, *, keepalive_s: float = 15.0, look_s: float = _LOOK_S) -> None:
        self._db = db
        self._keepalive_s = keepalive_s
        self._look_s = look_s
        self._followed: dict[UUID, _Followed] = {}
        self._closing = False

    @property
    def followers(self) -> int:
        """How many streams are open."""
        return sum(f.followers for f in self._followed.values())

    def heard(self, _: str, ids: frozenset[UUID] | None) -> None:
        """A ring: these batches (None: any) have news."""
        for batch_id in list(self._followed if ids is None else ids & self._followed.keys()):
            followed = self._followed[batch_id]
            rung, followed.rung = followed.rung, asyncio.Event()
            rung.set()

    async def look(self) -> None:
        """Wake everyone now and then, for ever: a lost ring delays, never strands."""
        while True:
            await asyncio.sleep(self._look_s)
            self.heard("", None)

    def close(self) -> None:
        """End every stream where it stands; clients resume elsewhere by their last event's id."""
        self._closing = True
        self.heard("", None)
        for followed in self._followed.values():
            for task in followed.reading.values():
                task.cancel()

    async def follow(self, batch: Batch, *, after: int, view: View) -> AsyncGenerator[bytes]:
        """The frames of a batch's events after a number, until its last one and ``[DONE]``.

        While the database is away it keeps pinging and goes on afterwards.
        """
        followed = self._join(batch)
        pulse = _Pulse(self._keepalive_s)
        try:
            while not self._closing:
                rung = followed.rung  # taken before reading, so that no ring falls between
                reading = self._reading(followed, after, view)
                while not await pulse.ends(reading):
                    yield PING
                if reading.cancelled():
                    return
                if (error := reading.exception()) is not None:
                    yield _last_words(batch.batch_id, error)
                    return
                chunk = reading.result()
                if chunk.frames:
                    yield chunk.frames
                    pulse.restart()
                if chunk.ended:
                    yield DONE
                    return
                if chunk.after == after:
                    resting = asyncio.create_task(rung.wait())
                    try:
                        while not await pulse.ends(resting):
                            yield PING
                    finally:
                        resting.cancel()
                after = chunk.after
        finally:
            self._leave(followed)

    def _join(self, batch: Batch) -> _Followed:
        followed = self._followed.get(batch.batch_id)
        if followed is None:
            followed = self._followed[batch.batch_id] = _Followed(
                workspace_id=batch.workspace_id,
                environment_id=batch.environment_id,
                batch_id=batch.batch_id,
            )
        followed.followers += 1
        return followed

    def _leave(self, followed: _Followed) -> None:
        followed.followers -= 1
        if not followed.followers:
            self._followed.pop(followed.batch_id, None)
            for task in followed.reading.values():
                task.cancel()

    def _reading(self, followed: _Followed, after: int, view: View) -> asyncio.Task[Chunk]:
        """The reading at a number, shared by all who stand there."""
        key = (after, view)
        task = followed.reading.get(key)
        if task is None:
            task = asyncio.create_task(
                self._db.persist(lambda: self._read(followed, after, view), what="stream")
            )
            followed.reading[key] = task

            def done(finished: asyncio.Task[Chunk]) -> None:
                followed.reading.pop(key, None)
                if not finished.cancelled():
                    finished.exception()  # seen, even if every follower has left

            task.add_done_callback(done)
        return task

    async def _read(self, followed: _Followed, after: int, view: View) -> Chunk:
        async with self._db.connection() as conn:
            batch = await _fresh(conn, followed)
            news = await _after(conn, batch, after)
            if not news:
                # Nothing new was there when the batch had already ended: nothing will come.
                return Chunk(frames=b"", after=after, ended=batch.is_finished)
            most = int(_CHUNK_BYTES / followed.frame_bytes)
            some = news[: min(max(most, 1), _MOST_EVENTS)]
            told = [e for e in some if not view.strict or e.kind in DOCUMENTED]
            items: dict[int, Item] = {}
            seqs = sorted({e.seq for e in told if e.seq is not None})
            if seqs:
                found = await batches.items_numbered(conn, batch=batch, seqs=seqs)
                items = {item.seq: item for item in found}
            if any(e.seq is None for e in told):
                batch = await _fresh(conn, followed)  # no older than the events that show it
            frames: list[bytes] = []
            for event in told:
                payload = await _payload(conn, batch, event, items, view)
                if payload is not None:
                    frames.append(frame(event, payload))
        if seqs and frames:
            followed.frame_bytes = max(sum(map(len, frames)) / len(frames), 256.0)
        return Chunk(frames=b"".join(frames), after=some[-1].no, ended=False)


class _Pulse:
    """When a silent stream must show that it lives."""

    def __init__(self, every_s: float) -> None:
        self._clock = asyncio.get_running_loop().time
        self._every_s = every_s
        self.restart()

    def restart(self) -> None:
        self._due_at = self._clock() + self._every_s

    async def ends(self, task: asyncio.Task[Any]) -> bool:
        """Wait for the task's end; False when a ping is due first. Leaves the task alone."""
        await asyncio.wait({task}, timeout=max(0.0, self._due_at - self._clock()))
        if not task.done():
            self.restart()
        return task.done()


def _last_words(batch_id: UUID, error: BaseException) -> bytes:
    if isinstance(error, GoneError):
        frame = error_frame("This batch no longer exists.", "COMPLETION_BATCH_NOT_FOUND")
    else:
        log.error("stream.failed", batch=batch_id, error=type(error).__name__)
        frame = error_frame(
            "Something went wrong on our side; follow the batch again from its last id.",
            "INTERNAL_SERVER_ERROR",
        )
    return frame + ERROR


async def _fresh(conn: Connection, followed: _Followed) -> Batch:
    batch = await batches.get(
        conn,
        workspace_id=followed.workspace_id,
        environment_id=followed.environment_id,
        batch_id=followed.batch_id,
    )
    if batch is None:
        raise GoneError
    return batch


async def _after(conn: Connection, batch: Batch, number: int) -> list[Event]:
    return await events.after(
        conn,
        workspace_id=batch.workspace_id,
        batch_day=batch.batch_day,
        batch_id=batch.batch_id,
        number=number,
        most_rows=_MOST_ROWS,
    )


async def _payload(
    conn: Connection, batch: Batch, event: Event, items: dict[int, Item], view: View
) -> bytes | None:
    """The event's payload; None when its item's texts are gone (retention)."""
    if event.seq is not None:
        item = items.get(event.seq)
        if item is None:
            return None
        return wire.encode(
            wire_batches.item_body(batch, item, status=_STATUS[event.kind], slim=view.slim)
        )
    if event.kind == "batch-created" and not view.slim:
        page, cursor = await first_items(conn, batch)
        return wire.encode(wire_batches.batch_body(batch, items=page, items_next_cursor=cursor))
    return wire.encode(wire_batches.batch_body(batch))


async def first_items(
    conn: Connection,
    batch: Batch,
    *,
    from_seq: int = 0,
    status: Status | None = None,
    most: int = MOST_ITEMS,
) -> tuple[list[wire_batches.ItemBody], str | None]:
    """Items from a number on and the cursor after them (None: that was all).

    Fewer than ``most`` when they are large: reading stops at sixteen megabytes of text.
    """
    page: list[wire_batches.ItemBody] = []
    size = 0
    want = 10  # enough to see how large they are
    while True:
        want = min(want, most - len(page))
        rows = await batches.items(conn, batch=batch, from_seq=from_seq, status=status, most=want)
        page += [wire_batches.item_body(batch, row) for row in rows]
        size += sum(len(row.request) + len(row.response or "") for row in rows)
        if rows:
            from_seq = rows[-1].seq + 1
        if len(rows) < want or from_seq >= batch.total_items:
            return page, None
        if len(page) >= most or size >= _MOST_BYTES:
            return page, str(from_seq)
        want = max(1, (_MOST_BYTES - size) * len(page) // max(size, 1))


def frame(event: Event, payload: bytes) -> bytes:
    """One event on the stream.

    Stored JSON may contain line breaks between its tokens, which would break the frame: they become
    spaces. U+2028, U+2029 and U+0085, which some clients take for line breaks, can only stand
    inside strings: they become escapes.
    """
    if b"\n" in payload or b"\r" in payload:
        payload = payload.replace(b"\n", b" ").replace(b"\r", b" ")
    for raw, escaped in _LINE_BREAKS:
        if raw in payload:
            payload = payload.replace(raw, escaped)
    return b'id: %d\ndata: {"action":"%s","payload":%s}\n\n' % (
        event.no,
        event.kind.encode(),
        payload,
    )


_LINE_BREAKS: Final = (
    ("\u2028".encode(), b"\\u2028"),
    ("\u2029".encode(), b"\\u2029"),
    ("\u0085".encode(), b"\\u0085"),
)


def error_frame(message: str, code: str) -> bytes:
    """What precedes ``[ERROR]``."""
    return b"data: %s\n\n" % wire.encode({"error": {"message": message, "code": code}})
