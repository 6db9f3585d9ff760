"""Server-sent events: a batch's history as it is written, resumable from any number.

One hub per process. A ring of the doorbell, or a look every second and a half in case a ring was
lost, wakes a batch; whoever waits for news of it is then written the events after the last one that
it was sent. First connect, resume and lost ring are the same code path: reading the table from a
number on.

A thousand listeners cost one reading. Those who stand at the same number share it and its encoded
frames, also who comes to stand there soon after (slim). The hub writes them to each one's
connection in one go, a few followers at a time so that other requests come in between; no
task wakes for it. Then the batch rests for as long as the writing kept the processor busy: many
rings in a row become one, and half of the processor is left however many listen.

A follower whose connection takes no more is not written to until its own task has seen it drain. It
holds one chunk of frames meanwhile and simply reads later: there is no queue that could grow.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from itertools import islice
from typing import Final
from uuid import UUID

from app import batches, events, items
from app.api import pages, wire, wire_batches, wire_streams
from app.api.outlet import Outlet
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
_AT_A_TIME: Final = 100  # followers written to before others have a turn: about a millisecond
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


_Place = tuple[int, View]


class _Follower:
    """One stream.

    ``place``: where it stands. ``roused``: what its task waits for while the hub writes. ``words``:
    what it is told last, once that is known. ``since``: when it was last written to.
    """

    __slots__ = ("outlet", "place", "progress_due", "roused", "since", "words")

    def __init__(self, outlet: Outlet, place: _Place) -> None:
        self.outlet = outlet
        self.place = place
        self.roused: asyncio.Future[None] | None = None
        self.words: bytes | None = None
        self.since = 0.0
        self.progress_due = 0.0

    def rouse(self) -> None:
        """Let its task go on: the outlet is full, or there are last words."""
        if self.roused is not None and not self.roused.done():
            self.roused.set_result(None)

    def end(self, words: bytes) -> None:
        """Tell it this and nothing more."""
        if self.words is None:
            self.words = words
            self.rouse()


@dataclass(slots=True, kw_only=True)
class _Followed:
    """A batch that is followed.

    ``turn`` counts its wakes. ``waiting``: who waits, and where. ``kept``: what was read since the
    last look, for who comes to the same place. ``busy_s``: processor time that writing took since
    it last rested.
    """

    workspace_id: UUID
    environment_id: UUID
    batch_id: UUID
    batch_day: date
    followers: set[_Follower] = field(default_factory=set[_Follower])
    standings: dict[Hashable, tuple[Standing, set[_Follower]]] = field(
        default_factory=dict[Hashable, tuple[Standing, set[_Follower]]]
    )
    waiting: dict[_Place, set[_Follower]] = field(default_factory=dict[_Place, set[_Follower]])
    reading: dict[_Place, asyncio.Task[None]] = field(
        default_factory=dict[_Place, asyncio.Task[None]]
    )
    kept: dict[_Place, Chunk] = field(default_factory=dict[_Place, Chunk])
    turn: int = 0
    serving: asyncio.Task[None] | None = None
    busy_s: float = 0.0
    frame_bytes: dict[bool, float] = field(default_factory=_FIRST_BYTES.copy)

    def stand(self, follower: _Follower, place: _Place) -> None:
        """Let a follower wait at a place, and at no other."""
        self.step_off(follower)
        follower.place = place
        self.waiting.setdefault(place, set()).add(follower)

    def step_off(self, follower: _Follower) -> None:
        """Let a follower wait nowhere."""
        there = self.waiting.get(follower.place)
        if there is not None:
            there.discard(follower)
            if not there:
                del self.waiting[follower.place]

    def keep(self, place: _Place, chunk: Chunk) -> None:
        """Keep what was read at a place; of all that, no more than one chunk may have.

        Slim views only: they have no texts, which somebody may erase meanwhile.
        """
        if place[1].slim:
            self.kept[place] = chunk
            while sum(len(c.frames) for c in self.kept.values()) > _CHUNK_BYTES:
                del self.kept[next(iter(self.kept))]

    def known(self, place: _Place) -> Chunk | None:
        """What a reading at a place would bring: the end of the history until the next ring, what is
        before it until the next look."""
        chunk = self.kept.get(place)
        return chunk if chunk is not None and (chunk.more or chunk.turn == self.turn) else None


class Hub:
    """Wakes followers, reads for them and writes to them."""

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
            if ids is None:
                followed.kept.clear()
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
            for followed in list(self._followed.values()):
                for n, follower in enumerate(list(followed.followers)):
                    if n % _AT_A_TIME == _AT_A_TIME - 1:
                        await asyncio.sleep(0)
                    now = clock()
                    is_silent = now - follower.since >= self._keepalive_s * 3 / 4
                    # Only between frames that the connection has taken, and never after last words.
                    if is_silent and follower.words is None and not follower.outlet.is_full:
                        follower.outlet.write(PING)
                        follower.since = now

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
                            follower.end(error_frame(str(error), error.code) + ERROR)
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
                follower.end(b"")

    # Following ------------------------------------------------------------------------------------

    async def follow(
        self,
        batch: Batch,
        outlet: Outlet,
        *,
        after: int,
        view: View,
        standing: Standing | None = None,
    ) -> bytes:
        """Write the frames of a batch's events after a number, and return what is to be said last.

        That is ``[DONE]`` after the batch's last event, or why the stream cannot go on. While the
        database is away it keeps pinging and goes on afterwards.
        """
        follower = _Follower(outlet, (after, view))
        followed = self._join(batch, follower, standing)
        loop = asyncio.get_running_loop()
        follower.since = loop.time()
        try:
            while follower.words is None and not self._closing:
                follower.roused = loop.create_future()
                followed.stand(follower, follower.place)
                self._read_for(followed, follower.place)
                await follower.roused
                followed.step_off(follower)
                await outlet.drain()
            return follower.words or b""
        finally:
            self._leave(followed, follower)

    def _join(self, batch: Batch, follower: _Follower, standing: Standing | None) -> _Followed:
        followed = self._followed.get(batch.batch_id)
        if followed is None:
            followed = self._followed[batch.batch_id] = _Followed(
                workspace_id=batch.workspace_id,
                environment_id=batch.environment_id,
                batch_id=batch.batch_id,
                batch_day=batch.batch_day,
            )
        followed.followers.add(follower)
        if standing is not None:
            followed.standings.setdefault(standing.who, (standing, set()))[1].add(follower)
        return followed

    def _leave(self, followed: _Followed, follower: _Follower) -> None:
        followed.step_off(follower)
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

    # Serving --------------------------------------------------------------------------------------

    def _serve(self, followed: _Followed) -> None:
        """Read for all who wait for a batch's news; soon, if that was done a moment ago."""
        if not self._closing and (followed.serving is None or followed.serving.done()):
            followed.serving = asyncio.create_task(self._serve_turns(followed))

    async def _serve_turns(self, followed: _Followed) -> None:
        served = -1
        while served != followed.turn:
            served = followed.turn
            tasks = [self._read_for(followed, place) for place in list(followed.waiting)]
            if tasks:
                await asyncio.wait(tasks)
            rest_s, followed.busy_s = followed.busy_s, 0.0
            await asyncio.sleep(rest_s)

    def _read_for(self, followed: _Followed, place: _Place) -> asyncio.Task[None]:
        """Read at a place and write to all who stand there; under way at most once at a time."""
        task = followed.reading.get(place)
        if task is None:
            task = asyncio.create_task(self._tell(followed, place))
            followed.reading[place] = task
        return task

    async def _tell(self, followed: _Followed, place: _Place) -> None:
        async def read() -> Chunk:
            async with self._readings:
                return await self._read(followed, *place)

        try:
            chunk = followed.known(place)
            if chunk is None:
                chunk = await self._db.persist(read, what="stream")
                followed.keep(place, chunk)
            await self._hand_on(followed, place, chunk)
        except Exception as error:  # noqa: BLE001 - it must not leave them waiting
            words = _last_words(followed.batch_id, error)
            for follower in followed.waiting.get(place, ()):
                follower.end(words)
            return
        finally:
            # At once after the last look at who stands there: who comes later needs another reading.
            del followed.reading[place]
        beyond = (chunk.after, place[1])
        if chunk.more and beyond in followed.waiting:
            self._read_for(followed, beyond)
        elif chunk.turn != followed.turn:
            self._serve(followed)  # a ring fell between that reading and now

    async def _hand_on(self, followed: _Followed, place: _Place, chunk: Chunk) -> None:
        """Write a chunk to all who stand at a place, also to who comes meanwhile; they stand beyond
        it then. No news leave them where they are."""
        beyond = (chunk.after, place[1])
        if beyond == place and not chunk.ended:
            return
        now = asyncio.get_running_loop().time()
        with_progress = chunk.frames + chunk.progress
        while there := followed.waiting.get(place):
            begun = time.thread_time()
            for follower in list(islice(there, _AT_A_TIME)):
                if follower.words is not None:
                    followed.step_off(follower)
                    continue
                if chunk.progress and now >= follower.progress_due:
                    follower.progress_due = now + _PROGRESS_S
                    follower.outlet.write(with_progress)
                elif chunk.frames:
                    follower.outlet.write(chunk.frames)
                follower.since = now
                if chunk.ended:
                    followed.step_off(follower)
                    follower.end(DONE)
                    continue
                followed.stand(follower, beyond)
                if follower.outlet.is_full:
                    followed.step_off(follower)
                    follower.rouse()
            followed.busy_s += time.thread_time() - begun
            await asyncio.sleep(0)

    async def _read(self, followed: _Followed, after: int, view: View) -> Chunk:
        turn = followed.turn  # taken before reading, so that no ring falls between
        async with self._db.connection() as conn:
            news = await _after(conn, followed, after)
            batch = await _fresh(conn, followed)  # no older than the events that show it
            if not news and batch.is_finished:
                news = await _after(conn, followed, after)  # its end may have come in between
            most = int(_CHUNK_BYTES / followed.frame_bytes[view.slim])
            some = news[: min(max(most, 1), _MOST_EVENTS)]
            # A row has at least one event: fewer events than rows asked for were all there are.
            more = len(some) < len(news) or len(news) >= _MOST_ROWS or batch.is_finished
            told = [e for e in some if not view.strict or e.kind in DOCUMENTED]
            frames = await _frames(conn, batch, told, view)
        of_items = [len(f) for f, e in zip(frames, told, strict=True) if e.seq is not None]
        if of_items:
            # Never far below the largest that was seen lately.
            followed.frame_bytes[view.slim] = max(
                *of_items, followed.frame_bytes[view.slim] / 2, 256
            )
        shows_progress = of_items and not more and not view.strict and not batch.is_finished
        return Chunk(
            frames=b"".join(frames),
            progress=_progress(batch, view) if shows_progress else b"",
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


async def _after(conn: Connection, followed: _Followed, number: int) -> list[Event]:
    return await events.after(
        conn,
        workspace_id=followed.workspace_id,
        batch_day=followed.batch_day,
        batch_id=followed.batch_id,
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
