"""Server-sent events: a batch's history as it is written, resumable from any number.

One hub per process. A ring of the doorbell, or a look every second and a half in case a ring was
lost, wakes a batch; whoever waits for news of it is then handed the events after the last one that
it was sent. First connect, resume and lost ring are the same code path: reading the table from a
number on.

A thousand listeners cost one reading. Those who stand at the same number share it and its encoded
frames; each is woken once and written to once. After a wake the batch rests for as
long as serving it kept the processor busy: many rings in a row become one wake, and half of the
processor is left for other requests however many listen.

Reading is pulled: a follower asks for more only when what it got was taken by its connection, so a
slow reader holds one chunk of frames and simply reads later. There is no queue that could grow.
"""

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final
from uuid import UUID

from app import batches, events, items
from app.api import pages, wire, wire_batches, wire_streams
from app.batches import Batch, Status
from app.db import CONNECTION_ERRORS, Connection, Database
from app.errors import DatabaseUnavailableError, NotFoundError, RequestError
from app.events import Event, Kind
from app.items import Brief, Item
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
_RECHECK_S: Final = 10.0
_PROGRESS_S: Final = 1.0
_CHUNK_BYTES: Final = 256 * 1024
_MOST_EVENTS: Final = 500  # per chunk
_MOST_ROWS: Final = 50  # of events per reading; each may tell of hundreds of items
_MOST_READINGS: Final = 4  # at once, so that streams never take the whole pool
_FIRST_BYTES: Final = {
    False: 32 * 1024.0,
    True: 512.0,
}  # of a frame, slim or not, until one was seen


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """How a follower wants it. ``slim``: ids, states and counts only. ``strict``: documented events
    only."""

    slim: bool = False
    strict: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """Frames after a number.

    ``progress``: one more, for those who had none lately. ``after``: the number to read on from. ``more``: there was more to read. ``ended``: nothing
    follows. ``turn``: the batch's count of wakes when it was read; later ones may bring more.
    """

    frames: bytes
    progress: bytes
    after: int
    more: bool
    ended: bool
    turn: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """Who follows, and whether it still may.

    ``check`` raises RequestError once a new request of the same caller would be refused; followers
    with an equal ``who`` are asked about together.
    """

    who: Hashable
    check: Callable[[], Awaitable[None]]


class GoneError(Exception):
    """The batch no longer exists: its retention is over."""


#: What ends a wait: frames, a failure, or (None) nothing but to look around and show a sign of life.
News = Chunk | BaseException | None
_Place = tuple[int, View]


class _Follower:
    """One stream. ``waits``: its future, while it waits for news; ``since``: from when on."""

    __slots__ = ("refused", "since", "waits")

    def __init__(self) -> None:
        self.waits: asyncio.Future[News] | None = None
        self.since = 0.0
        self.refused: RequestError | None = None

    def wake(self, news: News) -> None:
        """End its wait."""
        if self.waits is not None and not self.waits.done():
            self.waits.set_result(news)


@dataclass(slots=True, kw_only=True)
class _Followed:
    """A batch that is followed. ``turn`` counts its wakes; ``waiting``: who waits, and where."""

    workspace_id: UUID
    environment_id: UUID
    batch_id: UUID
    followers: set[_Follower] = field(default_factory=set[_Follower])
    standings: dict[Hashable, tuple[Standing, set[_Follower]]] = field(
        default_factory=dict[Hashable, tuple[Standing, set[_Follower]]]
    )
    waiting: dict[_Place, set[_Follower]] = field(default_factory=dict[_Place, set[_Follower]])
    reading: dict[_Place, asyncio.Task[Chunk]] = field(
        default_factory=dict[_Place, asyncio.Task[Chunk]]
    )
    turn: int = 0
    serving: asyncio.Task[None] | None = None
    frame_bytes: dict[bool, float] = field(default_factory=_FIRST_BYTES.copy)


class Hub:
    """Wakes followers and reads for them."""

    def __init__(
        self,
        db: Database,
        *,
        keepalive_s: float = 15.0,
        look_s: float = _LOOK_S,
        recheck_s: float = _RECHECK_S,
    ) -> None:
        self._db = db
        self._keepalive_s = keepalive_s
        self._look_s = look_s
        self._recheck_s = recheck_s
        self._followed: dict[UUID, _Followed] = {}
        self._readings = asyncio.Semaphore(_MOST_READINGS)
        self._closing = False

    @property
    def followers(self) -> int:
        """How many streams are open."""
        return sum(len(f.followers) for f in self._followed.values())

    # Waking ---------------------------------------------------------------------------------------

    def heard(self, _: str, ids: frozenset[UUID] | None) -> None:
        """A ring: these batches (None: any) have news."""
        for batch_id in list(self._followed if ids is None else ids & self._followed.keys()):
            followed = self._followed[batch_id]
            followed.turn += 1
            self._serve(followed)

    async def look(self) -> None:
        """Wake everyone now and then, for ever: a lost ring delays, never strands."""
        while True:
            await asyncio.sleep(self._look_s)
            self.heard("", None)

    async def ping(self) -> None:
        """Let silent streams show that they live, for ever."""
        clock = asyncio.get_running_loop().time
        while True:
            await asyncio.sleep(self._keepalive_s / 4)
            silent_since = clock() - self._keepalive_s * 3 / 4
            for followed in list(self._followed.values()):
                for follower in followed.followers:
                    if follower.since <= silent_since:
                        follower.wake(None)

    async def recheck(self) -> None:
        """End the streams of those who may no longer follow, for ever."""
        while True:
            await asyncio.sleep(self._recheck_s)
            for followed in list(self._followed.values()):
                for standing, members in list(followed.standings.values()):
                    try:
                        await standing.check()
                    except NotFoundError:
                        continue  # the next reading says so
                    except RequestError as error:
                        for follower in members:
                            follower.refused = error
                            follower.wake(None)
                    except (*CONNECTION_ERRORS, DatabaseUnavailableError):
                        continue  # nobody is let in meanwhile either; asked again next time

    def close(self) -> None:
        """End every stream where it stands; clients resume elsewhere by their last event's id."""
        self._closing = True
        for followed in self._followed.values():
            for task in (*followed.reading.values(), followed.serving):
                if task is not None:
                    task.cancel()
            for follower in followed.followers:
                follower.wake(None)

    # Following ------------------------------------------------------------------------------------

    async def follow(
        self, batch: Batch, *, after: int, view: View, standing: Standing | None = None
    ) -> AsyncGenerator[bytes]:
        """The frames of a batch's events after a number, until its last one and ``[DONE]``.

        While the database is away it keeps pinging and goes on afterwards.
        """
        follower = _Follower()
        followed = self._join(batch, follower, standing)
        seen: int | None = None
        progress_due = 0.0
        try:
            while not self._closing:
                chunk = await self._next(followed, follower, (after, view), seen)
                if isinstance(chunk, BaseException):
                    yield _last_words(batch.batch_id, chunk)
                    return
                if follower.refused is not None:
                    yield error_frame(str(follower.refused), follower.refused.code) + ERROR
                    return
                if chunk is None:
                    if not self._closing:
                        yield PING
                    continue
                if chunk.progress and follower.since >= progress_due:
                    progress_due = follower.since + _PROGRESS_S
                    yield chunk.frames + chunk.progress
                elif chunk.frames:
                    yield chunk.frames
                if chunk.ended:
                    yield DONE
                    return
                after, seen = chunk.after, None if chunk.more else chunk.turn
        finally:
            self._leave(followed, follower)

    def _join(self, batch: Batch, follower: _Follower, standing: Standing | None) -> _Followed:
        followed = self._followed.get(batch.batch_id)
        if followed is None:
            followed = self._followed[batch.batch_id] = _Followed(
                workspace_id=batch.workspace_id,
                environment_id=batch.environment_id,
                batch_id=batch.batch_id,
            )
        followed.followers.add(follower)
        if standing is not None:
            followed.standings.setdefault(standing.who, (standing, set()))[1].add(follower)
        return followed

    def _leave(self, followed: _Followed, follower: _Follower) -> None:
        followed.followers.discard(follower)
        for who, (_, members) in list(followed.standings.items()):
            members.discard(follower)
            if not members:
                del followed.standings[who]
        if not followed.followers:
            self._followed.pop(followed.batch_id, None)
            for task in (*followed.reading.values(), followed.serving):
                if task is not None:
                    task.cancel()

    async def _next(
        self, followed: _Followed, follower: _Follower, place: _Place, seen: int | None
    ) -> News:
        """What comes after a place.

        ``seen``: the turn at which all there was had been read; None: some was left, or all of it.
        """
        loop = asyncio.get_running_loop()
        waits = follower.waits = loop.create_future()
        follower.since = loop.time()
        there = followed.waiting.setdefault(place, set())
        there.add(follower)
        if seen is None:
            self._read_for(followed, place)
        elif seen != followed.turn:
            self._serve(followed)  # a ring fell between that reading and now
        try:
            return await waits
        finally:
            follower.waits = None
            there.discard(follower)
            if not there and followed.waiting.get(place) is there:
                del followed.waiting[place]

    # Serving --------------------------------------------------------------------------------------

    def _serve(self, followed: _Followed) -> None:
        """Read for all who wait for a batch's news; soon, if that was done a moment ago."""
        if not self._closing and (followed.serving is None or followed.serving.done()):
            followed.serving = asyncio.create_task(self._serve_turns(followed))

    async def _serve_turns(self, followed: _Followed) -> None:
        served = -1
        while served != followed.turn:
            served = followed.turn
            begun = time.thread_time()
            tasks = [self._read_for(followed, place) for place in list(followed.waiting)]
            if tasks:
                await asyncio.wait(tasks)
            # Who was woken is written to before the loop comes back here.
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            await asyncio.sleep(time.thread_time() - begun)

    def _read_for(self, followed: _Followed, place: _Place) -> asyncio.Task[Chunk]:
        """The reading at a place, shared by all who stand there; wakes them with what it brings."""
        task = followed.reading.get(place)
        if task is not None:
            return task

        async def read() -> Chunk:
            async with self._readings:
                return await self._read(followed, *place)

        task = asyncio.create_task(self._db.persist(read, what="stream"))
        followed.reading[place] = task

        def deliver(finished: asyncio.Task[Chunk]) -> None:
            followed.reading.pop(place, None)
            if finished.cancelled():
                return
            error = finished.exception()
            if error is None:
                chunk = finished.result()
                if not chunk.frames and chunk.after == place[0] and not chunk.ended:
                    # No news. Whoever came while it was being read is told at the next turn.
                    if chunk.turn != followed.turn:
                        self._serve(followed)
                    return
            for follower in followed.waiting.get(place, ()):
                follower.wake(finished.result() if error is None else error)

        task.add_done_callback(deliver)
        return task

    async def _read(self, followed: _Followed, after: int, view: View) -> Chunk:
        turn = followed.turn  # taken before reading, so that no ring falls between
        async with self._db.connection() as conn:
            batch = await _fresh(conn, followed)
            news = await _after(conn, batch, after)
            most = int(_CHUNK_BYTES / followed.frame_bytes[view.slim])
            some = news[: min(max(most, 1), _MOST_EVENTS)]
            # A row has at least one event: fewer events than rows asked for were all there are.
            more = len(some) < len(news) or len(news) >= _MOST_ROWS or batch.is_finished
            told = [e for e in some if not view.strict or e.kind in DOCUMENTED]
            shown = batch
            if told:
                shown = await _fresh(conn, followed)  # no older than the events that show it
            frames = await _frames(conn, shown, told, view)
        of_items = [len(f) for f, e in zip(frames, told, strict=True) if e.seq is not None]
        if of_items:
            # Never far below the largest that was seen lately.
            followed.frame_bytes[view.slim] = max(
                *of_items, followed.frame_bytes[view.slim] / 2, 256
            )
        shows_progress = of_items and not more and not view.strict and not shown.is_finished
        return Chunk(
            frames=b"".join(frames),
            progress=_progress(shown, view) if shows_progress else b"",
            after=some[-1].no if some else after,
            more=more,
            # Nothing new was there when the batch had already ended: nothing will come.
            ended=not news and batch.is_finished,
            turn=turn,
        )


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


async def _frames(conn: Connection, batch: Batch, told: Sequence[Event], view: View) -> list[bytes]:
    """A frame of each event; empty where its item's texts are gone (retention)."""
    seqs = sorted({e.seq for e in told if e.seq is not None})
    told_of: Mapping[int, Item] | Mapping[int, Brief] = {}
    if seqs and view.slim:
        told_of = {i.seq: i for i in await items.briefly(conn, batch=batch, seqs=seqs)}
    elif seqs:
        told_of = {i.seq: i for i in await items.numbered(conn, batch=batch, seqs=seqs)}
    frames: list[bytes] = []
    for event in told:
        if event.seq is None:
            frames.append(frame(event, await _batch_payload(conn, batch, event.kind, view)))
            continue
        status = _STATUS[event.kind]
        match told_of.get(event.seq):
            case Item() as item:
                body = wire_batches.item_body(batch, item, status=status)
            case Brief() as item:
                body = wire_streams.slim_item(batch, item, status=status)
            case None:
                frames.append(b"")
                continue
        frames.append(frame(event, wire.encode(body)))
    return frames


async def _batch_payload(conn: Connection, batch: Batch, kind: Kind, view: View) -> bytes:
    if view.slim:
        return wire.encode(wire_streams.slim_batch(batch))
    if kind == "batch-created":
        page = await pages.read(conn, batch)
        return wire.encode(
            wire_batches.batch_body(batch, items=page.items, items_next_cursor=page.cursor)
        )
    return wire.encode(wire_batches.batch_body(batch))


def _progress(batch: Batch, view: View) -> bytes:
    """Where the batch stands. No event: it has no number, and nobody is told it twice."""
    payload = wire_streams.slim_batch(batch) if view.slim else wire_batches.batch_body(batch)
    return b'data: {"action":"batch-progress","payload":%s}\n\n' % _one_line(wire.encode(payload))


def frame(event: Event, payload: bytes) -> bytes:
    """One event on the stream.

    Stored JSON may contain line breaks between its tokens, which would break the frame: they become
    spaces. U+2028, U+2029 and U+0085, which some clients take for line breaks, can only stand
    inside strings: they become escapes.
    """
    return b'id: %d\ndata: {"action":"%s","payload":%s}\n\n' % (
        event.no,
        event.kind.encode(),
        _one_line(payload),
    )


def _one_line(payload: bytes) -> bytes:
    if b"\n" in payload or b"\r" in payload:
        payload = payload.replace(b"\n", b" ").replace(b"\r", b" ")
    for raw, escaped in _LINE_BREAKS:
        if raw in payload:
            payload = payload.replace(raw, escaped)
    return payload


_LINE_BREAKS: Final = (
    ("\u2028".encode(), b"\\u2028"),
    ("\u2029".encode(), b"\\u2029"),
    ("\u0085".encode(), b"\\u0085"),
)


def error_frame(message: str, code: str) -> bytes:
    """What precedes ``[ERROR]``."""
    return b"data: %s\n\n" % wire.encode({"error": {"message": message, "code": code}})
