"""Streams of events: order, resume, views, terminators, and what happens when things go away."""

import asyncio
import json
import resource
from typing import Any

import httpx
import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict

from app.api import streams
from app.events import Event
from app.ids import created_on, uuid7
from app.settings import Settings
from tests.api.conftest import Service, until


async def test_a_sync_stream_tells_everything_in_order(service: Service) -> None:
    body = {"type": "SYNC", "items": [service.item("a"), service.item("b")]}
    async with service.http.stream("POST", service.batches, json=body) as answer:
        assert answer.status_code == 200
        assert answer.headers["content-type"].startswith("text/event-stream")
        assert answer.headers["cache-control"] == "no-cache, no-transform"
        assert answer.headers["x-accel-buffering"] == "no"
        assert answer.headers["connection"] == "keep-alive"
        stream = service.reader(answer)
        created = await stream.event()
        assert created is not None
        number, action, batch = created
        assert (number, action, batch["type"]) == (1, "batch-created", "SYNC")
        assert [i["status"] for i in batch["items"]] == ["PENDING"] * 2
        assert batch["completedPercentage"] == 0
        one, two = await service.claim()
        await service.settle([two])
        await service.fail([one])
        told = await stream.rest()
    assert [(n, a) for n, a, _ in told] == [
        (2, "batch-running"),
        (3, "item-running"),
        (4, "item-running"),
        (5, "item-completed"),
        (6, "item-failed"),
        (7, "batch-failed"),
    ]
    # Every payload shows the state that its event is about, also when told later.
    states = {a: p["status"] for _, a, p in told}
    assert states["item-running"] == "RUNNING"
    running, failed = told[1][2], told[4][2]
    assert (running["response"], running["completedAt"], running["errorCode"]) == (None, None, None)
    assert (failed["status"], failed["response"]) == ("FAILED", None)
    assert failed["errorMessage"] == "the provider said no"
    assert told[3][2]["response"]["data"]["id"] == "chatcmpl-1"
    last = told[-1][2]
    assert (last["status"], last["completed"], last["failed"], last["pending"]) == (
        "FAILED",
        1,
        1,
        0,
    )
    assert last["completedPercentage"] == 100
    assert last["completedAt"]
    assert last["totalOutputTokens"] == 3


async def test_it_resumes_after_any_number(service: Service) -> None:
    batch = await service.create("a", "b")
    await service.work()
    async with service.follow(batch) as stream:
        whole = await stream.rest()
    assert [n for n, _, _ in whole] == list(range(1, len(whole) + 1))
    for number, _, _ in whole:
        for headers, after in (
            ({"last-event-id": str(number)}, None),
            ({}, str(number)),
            ({"last-event-id": str(number)}, "0"),
        ):
            params = {} if after is None else {"after": after}
            async with service.follow(batch, headers=headers, **params) as stream:
                assert await stream.rest() == whole[number:]


async def test_a_position_that_is_no_number_is_refused(service: Service) -> None:
    batch = await service.create()
    path = f"{service.batches}/{batch['batchId']}/events"
    for given in ("x", "-1", "1.5", "99999999999999999999", "1 2", "٣"):
        by_query = await service.http.get(path, params={"after": given})
        by_header = await service.http.get(path, headers=[(b"last-event-id", given.encode())])
        assert (by_query.status_code, by_header.status_code) == (400, 400)
        assert by_header.json()["details"]["errors"][0]["path"] == "Last-Event-ID"


async def test_slim_tells_without_texts(service: Service) -> None:
    batch = await service.create("a")
    await service.work()
    async with service.follow(batch, slim="true") as stream:
        told = await stream.rest()
    assert len(told) == 5
    for _, action, payload in told:
        assert not {"items", "request", "response"} & payload.keys(), action
    assert told[3][2]["outputTokens"] == 3
    answer = await service.http.get(f"{service.batches}/{batch['batchId']}/events?slim=maybe")
    assert answer.status_code == 400


async def test_strict_tells_documented_actions_only(service: Service) -> None:
    batch = await service.create("a", "b")
    taken = await service.claim()
    await service.retry(taken[:1])
    await service.settle(taken[1:])
    await service.work()
    async with service.follow(batch) as stream:
        everything = [a for _, a, _ in await stream.rest()]
    assert {"batch-running", "item-retrying"} < set(everything)
    async with service.follow(batch, strict="true") as stream:
        told = await stream.rest()
    assert [a for _, a, _ in told] == [a for a in everything if a in streams.DOCUMENTED]
    other = await service.create("a")
    await service.http.post(f"{service.batches}/{other['batchId']}/cancel")
    async with service.follow(other, strict="true") as stream:
        assert [a for _, a, _ in await stream.rest()] == ["batch-created"]


async def test_a_retry_shows_the_item_as_pending(service: Service) -> None:
    batch = await service.create("a")
    await service.retry(await service.claim())
    await service.work()
    async with service.follow(batch) as stream:
        told = {a: p for _, a, p in await stream.rest()}
    assert told["item-retrying"]["status"] == "PENDING"
    assert told["item-completed"]["retryCount"] == 1


async def test_many_followers_see_the_same_and_leave_nothing_behind(service: Service) -> None:
    batch = await service.create(*(["x"] * 300))
    seen: list[list[int]] = []

    async def follow(after: int) -> None:
        async with service.follow(batch, after=str(after)) as stream:
            seen.append([n for n, _, _ in await stream.rest()])

    followers = [asyncio.create_task(follow(n % 3)) for n in range(9)]
    await until(lambda: service.hub.followers == 9)
    await service.work()
    await asyncio.gather(*followers)
    last = 1 + 1 + 300 + 300 + 1
    assert sorted(seen) == sorted(list(range(n % 3 + 1, last + 1)) for n in range(9))
    await until(lambda: service.hub.followers == 0)


async def test_followers_at_one_number_share_one_reading(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = await service.create("a")
    readings: list[int] = []
    read = streams.Hub._read  # pyright: ignore[reportPrivateUsage] - counted below

    async def counted(
        hub: streams.Hub,
        followed: Any,  # noqa: ANN401 - passes through
        after: int,
        view: streams.View,
    ) -> streams.Chunk:
        readings.append(after)
        return await read(hub, followed, after, view)

    monkeypatch.setattr(streams.Hub, "_read", counted)

    async def follow() -> int:
        async with service.follow(batch) as stream:
            return len(await stream.rest())

    async with service.db.transaction() as conn:
        await conn.execute("lock table events in access exclusive mode")
        followers = [asyncio.create_task(follow()) for _ in range(5)]
        await until(lambda: service.hub.followers == 5)
        service.hub.heard("", None)
        assert readings == [0]
    await service.work()
    assert await asyncio.gather(*followers) == [5] * 5


async def test_an_event_is_read_and_encoded_once_however_many_listen(
    service: Service, monkeypatch: pytest.MonkeyPatch, statements: list[str]
) -> None:
    batch = await service.create(*(["a"] * 5))
    encoded: list[int] = []
    frame = streams.frame

    def counted(event: Event, payload: bytes) -> bytes:
        encoded.append(event.no)
        return frame(event, payload)

    monkeypatch.setattr(streams, "frame", counted)

    async def follow() -> list[int]:
        async with service.follow(batch, after="1", slim="true") as stream:
            return [n for n, _, _ in await stream.rest()]

    followers = [asyncio.create_task(follow()) for _ in range(90)]
    await until(lambda: service.hub.followers == 90)
    followed = service.hub._followed[streams.UUID(batch["batchId"])]  # pyright: ignore[reportPrivateUsage] - counted below
    await until(lambda: not followed.reading)
    statements.clear()
    turns = followed.turn
    while items := await service.claim(1):
        await service.settle(items)
    numbers = list(range(2, 14))
    assert await asyncio.gather(*followers) == [numbers] * 90
    assert encoded == numbers
    # One reading of each ring or look, and two of the end; each asks for events, batch and items.
    turns = followed.turn - turns
    assert statements.count("items_brief") <= turns
    assert statements.count("batch_get") <= turns + 2
    assert statements.count("events_after") <= turns + 3


@pytest.mark.parametrize("slim", [True, False])
async def test_who_comes_soon_after_is_told_what_was_read_for_others(
    service: Service, statements: list[str], *, slim: bool
) -> None:
    """Until the next ring or look, and slim only: what may hold texts is read anew for everybody."""
    batch = await service.create("a")
    wanted = "true" if slim else "false"
    async with service.follow(batch, slim=wanted) as first:
        await first.event()
        followed = service.hub._followed[streams.UUID(batch["batchId"])]  # pyright: ignore[reportPrivateUsage] - counted below
        await until(lambda: not followed.reading)
        statements.clear()
        turns = followed.turn
        for _ in range(20):
            async with service.follow(batch, slim=wanted) as another:
                event = await another.event()
            assert event is not None
            assert event[0] == 1
        readings = statements.count("events_after")
        turns = followed.turn - turns
    assert readings >= 20 if not slim else readings <= 3 * turns
    await service.work()


async def test_a_client_that_leaves_is_noticed_at_once(service: Service) -> None:
    batch = await service.create()
    async with service.follow(batch) as stream:
        await stream.event()
        assert service.hub.followers == 1
    await until(lambda: service.hub.followers == 0)
    assert not service.hub._followed  # pyright: ignore[reportPrivateUsage] - the leak looked for


async def test_a_ring_wakes_sooner_than_the_safety_look(lone_service: Service) -> None:
    lone_service.hub._look_s = 3600  # pyright: ignore[reportPrivateUsage] - not in this test
    batch = await lone_service.create()
    async with lone_service.follow(batch) as stream:
        await stream.event()
        await lone_service.work()
        async with asyncio.timeout(5):
            assert len(await stream.rest()) == 4


async def test_a_lost_ring_delays_only(service: Service) -> None:
    service.silent = True
    batch = await service.create()
    async with service.follow(batch) as stream:
        await stream.event()
        await service.work()
        assert len(await stream.rest()) == 4


class TestPing:
    @pytest.fixture
    def settings(self) -> Settings:
        return Settings(port=0, sse_keepalive_s=0.05)

    async def test_a_silent_stream_shows_that_it_lives(self, lone_service: Service) -> None:
        batch = await lone_service.create()
        async with lone_service.follow(batch, after="1") as stream:
            assert [await stream.block() for _ in range(3)] == [": ping"] * 3

    async def test_a_stream_outlives_the_database(
        self, lone_service: Service, cluster: str
    ) -> None:
        """While the database refuses everybody it pings; afterwards it goes on where it was."""
        batch = await lone_service.create()
        name = str(conninfo_to_dict(lone_service.db.url)["dbname"])
        async with lone_service.follow(batch) as stream:
            await stream.event()
            with psycopg.connect(cluster, autocommit=True) as conn:
                conn.execute(f"alter database {name} allow_connections false".encode())
                conn.execute(
                    "select pg_terminate_backend(pid) from pg_stat_activity where datname = %s",
                    (name,),
                )
                for _ in range(40):
                    assert await stream.block() == ": ping"
                conn.execute(f"alter database {name} allow_connections true".encode())
            await lone_service.work()
            assert len(await stream.rest()) == 4


async def test_a_batch_that_vanishes_ends_its_stream_with_an_error(service: Service) -> None:
    batch = await service.create()
    async with service.follow(batch) as stream:
        await stream.event()
        async with service.db.connection() as conn:
            await conn.execute(
                "delete from batches where batch_id = %s", (streams.UUID(batch["batchId"]),)
            )
        blocks = [await stream.block(), await stream.block(), await stream.block()]
    assert json.loads((blocks[0] or "").removeprefix("data: ")) == {
        "error": {"message": "This batch no longer exists.", "code": "COMPLETION_BATCH_NOT_FOUND"}
    }
    assert blocks[1:] == ["data: [ERROR]", None]


async def test_a_bug_ends_a_stream_without_telling_its_text(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = await service.create()

    async def broken(*_: object) -> None:
        raise RuntimeError("secret")

    monkeypatch.setattr("app.api.streams._after", broken)
    async with service.follow(batch) as stream:
        blocks = [await stream.block(), await stream.block(), await stream.block()]
    assert "INTERNAL_SERVER_ERROR" in (blocks[0] or "")
    assert "secret" not in (blocks[0] or "")
    assert blocks[1:] == ["data: [ERROR]", None]


async def test_failed_items_put_back_go_on_after_the_end(service: Service) -> None:
    """A redriven batch has a last event in the middle of its history."""
    batch = await service.create("a")
    await service.fail(await service.claim())
    async with service.db.transaction() as conn:
        await streams.batches.redrive(
            conn,
            workspace_id=service.environment.workspace_id,
            batch_id=streams.UUID(batch["batchId"]),
        )
    async with service.follow(batch) as stream:
        told: list[str] = []
        while "item-retrying" not in told:
            event = await stream.event()
            assert event is not None
            told.append(event[1])
        assert "batch-failed" in told
        await service.work()
        assert (await stream.rest())[-1][1] == "batch-completed"


def test_frames_never_break_a_line() -> None:
    event = Event(no=3, kind="batch-created", at=created_at(), seq=None)
    payload = '{\r\n "a":\n"\u2028\u2029\u0085é😀"}'.encode()
    told = streams.frame(event, payload).decode()
    assert told == (
        'id: 3\ndata: {"action":"batch-created","payload":{   "a": "\\u2028\\u2029\\u0085é😀"}}\n\n'
    )
    assert len(told.splitlines()) == 3


def created_at() -> streams.batches.datetime:
    day = created_on(uuid7())
    return streams.batches.datetime(day.year, day.month, day.day, tzinfo=streams.wire.UTC)


async def test_streams_end_when_the_server_stops(lone_service: Service) -> None:
    batch = await lone_service.create()
    async with lone_service.follow(batch) as stream:
        await stream.event()
        lone_service.hub.close()
        with pytest.raises(AssertionError, match="without a terminator"):
            await stream.event()


async def test_slim_payloads_are_small(service: Service) -> None:
    """Ids, states and counts; also the first event, however many items there are."""
    batch = await service.create(*(["a long prompt " * 100] * 50))
    await service.work()
    async with service.follow(batch, slim="true") as stream:
        told = await stream.rest()
    assert max(len(json.dumps(p)) for _, _, p in told) < 500
    assert told[0][2]["totalItems"] == 50


async def test_progress_is_told_without_a_number(service: Service) -> None:
    batch = await service.create("a", "b", "c")
    path = f"{service.batches}/{batch['batchId']}/events"
    async with service.http.stream("GET", path) as answer:
        stream = service.reader(answer)
        await stream.event()
        await service.claim(1)
        blocks = [await stream.block() for _ in range(3)]
    assert [b.split("\n")[0] for b in blocks[:2] if b] == ["id: 2", "id: 3"]
    told = json.loads((blocks[2] or "").removeprefix("data: "))
    assert told["action"] == "batch-progress"
    assert (told["payload"]["running"], told["payload"]["pending"]) == (1, 2)


async def test_the_first_event_carries_the_first_thousand_items(service: Service) -> None:
    batch = await service.create(*(["x"] * 1001))
    async with service.follow(batch) as stream:
        told = await stream.event()
    assert told is not None
    assert len(told[2]["items"]) == 1000
    assert told[2]["itemsNextCursor"] == "1000"


async def test_a_client_that_leaves_a_sync_batch_does_not_stop_it(service: Service) -> None:
    body = {"type": "SYNC", "items": [service.item("a")]}
    async with service.http.stream("POST", service.batches, json=body) as answer:
        created = await service.reader(answer).event()
    assert created is not None
    await service.work()
    batch = await service.get(f"{service.batches}/{created[2]['batchId']}")
    assert batch["status"] == "COMPLETED"
    async with service.follow(batch, after="1") as stream:
        assert (await stream.rest())[-1][1] == "batch-completed"


class TestStanding:
    @pytest.fixture
    def settings(self) -> Settings:
        return Settings(port=0, sse_recheck_s=0.1)

    @pytest.mark.parametrize(
        ("change", "code"),
        [
            (b"enabled = false", "401"),
            (b"expires_at = now()", "401"),
            (b"resources = array[gen_random_uuid()::text]", "API_KEY_RESOURCE_NOT_AUTHORIZED"),
        ],
    )
    async def test_a_stream_ends_when_its_key_no_longer_opens_the_batch(
        self, lone_service: Service, change: bytes, code: str
    ) -> None:
        batch = await lone_service.create()
        async with lone_service.follow(batch) as stream:
            await stream.event()
            async with lone_service.db.connection() as conn:
                await conn.execute(b"update api_keys set " + change)
            blocks = [await stream.block() for _ in range(3)]
        assert json.loads((blocks[0] or "").removeprefix("data: "))["error"]["code"] == code
        assert blocks[1:] == ["data: [ERROR]", None]


async def test_a_slow_reader_holds_up_nobody_and_reads_on_later(service: Service) -> None:
    """It has a chunk of frames and the socket's buffers; what it has not read yet stays in the table."""
    batch = await service.create(*(["a"] * 600))
    path = f"{service.batches}/{batch['batchId']}/events"
    at = httpx.URL(service.url)
    reader, writer = await asyncio.open_connection(at.host, at.port, limit=64 * 1024)
    try:
        writer.write(f"GET {path} HTTP/1.1\r\nhost: x\r\nx-api-key: {service.key}\r\n\r\n".encode())
        await until(lambda: service.hub.followers == 1)
        body = json.dumps({"text": "x" * 100_000})
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        while items := await service.claim(20):
            await service.settle(items, body=body)
        async with service.follow(batch, slim="true") as stream:
            assert (await stream.rest())[-1][1] == "batch-completed"
        assert service.hub.followers == 1
        # Kilobytes; the stream has sixty megabytes, and what wrote it is this process too.
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 40 * 1024
        read = 0
        text = b""
        while b"data: [DONE]" not in text[-200:]:
            text = text[-200:] + await reader.read(1 << 20)
            read += len(text)
        assert read > 60_000_000
    finally:
        writer.close()


async def test_other_requests_go_on_beside_many_streams(service: Service) -> None:
    batch = await service.create()
    limits = httpx.Limits(max_connections=200)
    async with httpx.AsyncClient(
        base_url=service.url, headers=service.http.headers, limits=limits, trust_env=False
    ) as http:

        async def follow() -> int:
            path = f"{service.batches}/{batch['batchId']}/events"
            async with http.stream("GET", path) as answer:
                return sum([1 async for line in answer.aiter_lines() if line.startswith("id")])

        followers = [asyncio.create_task(follow()) for _ in range(100)]
        await until(lambda: service.hub.followers == 100)
        assert (await service.get(f"{service.batches}/{batch['batchId']}"))["status"] == "PENDING"
        await service.work()
        assert await asyncio.gather(*followers) == [5] * 100
