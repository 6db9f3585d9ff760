"""The worker against a real provider (the simulator on loopback) and a real database."""

import asyncio
import json
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import psycopg
import pytest

from app.batches import Batch
from app.db import CONNECTION_ERRORS
from app.doorbell import ABORTS, WORK, Ringer
from app.maintenance import Maintenance
from app.provider import Call, Outcome, Provider
from app.provider import _body as provider_body  # pyright: ignore[reportPrivateUsage] - what is sent
from app.settings import Settings
from app.simulator import Behaviour, Simulator
from app.worker import Worker
from tests.scene import Scene

FAST: dict[str, Any] = {
    "heartbeat_s": 0.2,
    "dead_after_s": 1.0,
    "backoff_base_s": 0.05,
    "backoff_cap_s": 0.2,
    "drain_s": 5.0,
    "provider_allow_networks": "127.0.0.0/8",
}


@asynccontextmanager
async def simulator(**behaviour: Any) -> AsyncGenerator[tuple[Simulator, str]]:  # noqa: ANN401
    behaviour = {"latency_ms": 20, "port": 0, "seed": 1} | behaviour
    server = Simulator(Behaviour(**behaviour))
    url = await server.start()
    try:
        yield server, url
    finally:
        await server.stop()


@asynccontextmanager
async def working(scene: Scene, url: str, **settings: Any) -> AsyncGenerator[Worker]:  # noqa: ANN401
    """A worker and maintenance at work; stopped in good order at the end."""
    chosen = Settings.model_validate(FAST | {"concurrency": 50, "database_url": url} | settings)
    worker = Worker(chosen, scene.db, keyring=scene.keyring, listen_url=url)
    tasks = [
        asyncio.create_task(worker.run()),
        asyncio.create_task(Maintenance(chosen, scene.db, holder_id=worker.worker_id).run()),
    ]
    try:
        yield worker
        worker.stop.set()
        await asyncio.wait_for(tasks[0], 20)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def until(
    check: Callable[[], Awaitable[bool]], *, within_s: float = 30, every_s: float = 0.05
) -> None:
    """Poll with a deadline."""
    deadline = time.monotonic() + within_s
    while not await check():
        assert time.monotonic() < deadline, "it did not happen in time"
        await asyncio.sleep(every_s)


async def ended(scene: Scene, batch: Batch, *, within_s: float = 30) -> Batch:
    async def is_finished() -> bool:
        try:
            return (await scene.batch(batch.batch_id)).is_finished
        except CONNECTION_ERRORS:
            return False

    await until(is_finished, within_s=within_s)
    return await scene.batch(batch.batch_id)


def bodies(count: int) -> list[bytes]:
    return [
        b'{"messages":[{"role":"user","content":"question %d"}],"max_tokens":30}' % n
        for n in range(count)
    ]


async def test_every_item_is_answered_once_and_the_books_balance(database: str) -> None:
    async with (
        simulator() as (provider, url),
        Scene.open(database, base_url=url, tpm=10**9) as scene,
    ):
        batch = await scene.submit(bodies(200))
        async with working(scene, database):
            batch = await ended(scene, batch)
        assert (batch.status, batch.completed, batch.retries) == ("completed", 200, 0)
        assert provider.report()["answered"] == 200
        assert provider.report()["called_twice"] == 0
        assert await scene.value("select count(*) from attempts where outcome = 'answered'") == 200
        used = await scene.value(
            "select sum(g.input_tokens + g.output_tokens) from ledger g"
            " join limits using (workspace_id, limit_id) where source = 'given'"
        )
        assert used == batch.input_tokens + batch.output_tokens
        await scene.check_books()


async def test_failures_are_retried_with_backoff_until_they_succeed(database: str) -> None:
    faults = {"error_rate": 0.2, "cut_rate": 0.1, "garbage_rate": 0.1}
    async with simulator(**faults) as (provider, url), Scene.open(database, base_url=url) as scene:
        batch = await scene.submit(bodies(60), max_attempts=50)
        async with working(scene, database):
            batch = await ended(scene, batch)
        assert (batch.status, batch.completed) == ("completed", 60)
        assert batch.retries > 0
        assert provider.report()["answered_twice"] == 0
        attempts = await scene.value("select count(*) from attempts")
        assert attempts == 60 + batch.retries
        await scene.check_books()


async def test_an_item_fails_after_its_last_attempt_and_keeps_its_history(database: str) -> None:
    async with simulator(error_rate=1.0) as (_, url), Scene.open(database, base_url=url) as scene:
        batch = await scene.submit(bodies(3), max_attempts=2)
        async with working(scene, database):
            batch = await ended(scene, batch)
        assert (batch.status, batch.failed) == ("failed", 3)
        assert await scene.rows(
            "select outcome::text, status_code, count(*) from attempts group by 1, 2"
        ) == [("unreachable", 500, 6)]
        reasons = await scene.rows("select distinct ended_reason::text from items")
        assert reasons == [("exhausted",)]
        await scene.check_books()


async def test_a_provider_that_says_429_is_left_alone_until_it_said(database: str) -> None:
    """Its limit is below ours: calls are refused, nothing is burned or lost, the rest wait."""
    async with (
        simulator(rpm=40, algorithm="bucket", bucket_seconds=15) as (provider, url),
        Scene.open(database, base_url=url) as scene,
    ):
        batch = await scene.submit(bodies(12), max_attempts=1)
        async with working(scene, database):
            batch = await ended(scene, batch)
        assert (batch.status, batch.completed, batch.failed) == ("completed", 12, 0)
        assert provider.report()["refused"] != 0
        assert await scene.value("select max(failures) from items") == 0
        blocked = await scene.value("select max(blocked_reason) from scope_states")
        assert blocked == "rate_limited"
        await scene.check_books()


async def test_a_refused_connection_counts_as_a_failure_and_is_refunded(database: str) -> None:
    async with Scene.open(database, base_url="http://127.0.0.1:9/v1", rpm=100) as scene:
        batch = await scene.submit(bodies(2), max_attempts=2)
        async with working(scene, database):
            batch = await ended(scene, batch)
        assert batch.failed == 2
        assert await scene.value("select coalesce(sum(requests), 0) from ledger") == 0
        await scene.check_books()


async def test_an_idle_worker_hears_of_new_work(database: str) -> None:
    """Well within the five seconds after which it would have looked by itself."""
    async with (
        simulator() as (_, url),
        Scene.open(database, base_url=url) as scene,
        working(scene, database) as worker,
    ):
        ringer = Ringer(scene.db)
        await until(lambda: _hears(scene))
        for _ in range(3):
            batch = await scene.submit(1)
            begun = time.monotonic()
            ringer.ring(WORK, scene.resource_ids)
            await ringer.flush()
            await ended(scene, batch, within_s=2)
            assert time.monotonic() - begun < 2
        assert worker.in_flight == 0


async def test_stopping_finishes_the_calls_in_flight(database: str) -> None:
    async with (
        simulator(latency_ms=400) as (provider, url),
        Scene.open(database, base_url=url) as scene,
    ):
        await scene.submit(bodies(100))
        async with working(scene, database, concurrency=20) as worker:
            await until(lambda: _equals(worker, 20))
        assert await scene.value("select count(*) from items where status = 'running'") == 0
        assert await scene.value("select count(*) from items where attempt > 1") == 0
        report = provider.report()
        assert report["answered"] == await scene.value(
            "select count(*) from items where status = 'completed'"
        )
        stopped = await scene.value(
            "select stopped_at is not null from workers where worker_id = %s", worker.worker_id
        )
        assert stopped
        await scene.check_books()


async def test_a_forced_stop_burns_nothing_and_says_what_may_have_been_paid(database: str) -> None:
    async with simulator(hang_rate=1.0) as (_, url), Scene.open(database, base_url=url) as scene:
        batch = await scene.submit(bodies(5))
        async with working(scene, database) as worker:
            await until(lambda: _equals(worker, 5))
            worker.force.set()
        again = await scene.batch(batch.batch_id)
        assert (again.pending, again.running) == (5, 0)
        assert await scene.rows("select distinct failures, crashes from items") == [(0, 0)]
        assert await scene.rows(
            "select outcome::text, error_code, count(*) from attempts group by 1, 2"
        ) == [("lost", "aborted", 5)]
        await scene.check_books()


async def test_cut_database_connections_lose_nothing(database: str) -> None:
    """Every connection to the database is cut again and again, in the middle of whatever it does."""
    async with (
        simulator(latency_ms=60) as (provider, url),
        Scene.open(database, base_url=url, rpm=100_000) as scene,
    ):
        batch = await scene.submit(bodies(400))
        # Nobody takes it for dead while its heartbeats are cut: it has to mend everything itself.
        async with working(scene, database, concurrency=10, dead_after_s=60):
            for share in range(1, 9):
                await until(lambda s=share: _answered(provider, 40 * s))
                await _cut_all_connections(database)
            # Far less than a lease: what a lost answer of a claim took is found and given back.
            batch = await ended(scene, batch, within_s=20)
        assert (batch.status, batch.completed) == ("completed", 400)
        assert provider.report()["answered_twice"] == 0
        await scene.check_books()


async def test_items_of_a_vanished_worker_are_reclaimed_by_another(database: str) -> None:
    async with simulator() as (_, url), Scene.open(database, base_url=url) as scene:
        batch = await scene.submit(bodies(10))
        taken = await scene.claim(4)  # a worker that is never heard of again
        assert len(taken.items) == 4
        async with working(scene, database):
            batch = await ended(scene, batch)
        assert (batch.status, batch.completed) == ("completed", 10)
        assert await scene.value("select count(*) from attempts where outcome = 'lost'") == 4
        assert await scene.value("select max(crashes) from items") == 1
        await scene.check_books()


async def test_a_limit_is_never_exceeded_and_waits_exactly(database: str) -> None:
    async with (
        simulator(rpm=30) as (provider, url),
        Scene.open(database, base_url=url, rpm=30) as scene,
    ):
        batch = await scene.submit(bodies(60))
        begun = time.monotonic()
        async with working(scene, database, burst_s=60):

            async def all_of_the_minute() -> bool:
                return (await scene.batch(batch.batch_id)).completed == 30

            async def the_rest_waits() -> bool:
                return await scene.value("select reason::text from ready") == "capacity"

            await until(all_of_the_minute)
            await until(the_rest_waits, within_s=5)
            wait = await scene.value(
                "select extract(epoch from next_at - clock_timestamp()) from ready"
            )
            assert 60 - (time.monotonic() - begun) < float(wait) < 62
        assert provider.report()["received"] == 30
        assert provider.report()["refused"] == 0
        await scene.check_books()


async def test_a_limit_is_spent_evenly(database: str) -> None:
    """A provider that refuses more than one second's share of its limit at once refuses nothing."""
    async with (
        simulator(rpm=1200, algorithm="bucket", bucket_seconds=1) as (provider, url),
        Scene.open(database, base_url=url, rpm=1200) as scene,
    ):
        batch = await scene.submit(bodies(90))  # before the worker's first look: nobody rings
        begun = time.monotonic()
        async with working(scene, database):
            batch = await ended(scene, batch)
            took_s = time.monotonic() - begun
        assert batch.completed == 90
        assert provider.report()["refused"] == 0
        # Twenty per second, and no slower than that by more than a busy machine explains.
        assert 3.9 < took_s < 15
        await scene.check_books()


async def test_two_workers_learn_a_limit_from_headers_and_keep_it(database: str) -> None:
    """A provider that nobody gave limits for, and that bears only a second's share at once."""
    async with (
        simulator(rpm=1200, algorithm="bucket", bucket_seconds=1.5) as (provider, url),
        Scene.open(database, base_url=url) as scene,
    ):
        batch = await scene.submit(bodies(90))
        begun = time.monotonic()
        async with working(scene, database), working(scene, database):
            batch = await ended(scene, batch)
            took_s = time.monotonic() - begun
        assert batch.completed == 90
        report = provider.report()
        assert int(str(report["refused"])) <= 3
        assert report["called_twice"] == 0
        assert await _observed_limits(scene) == [("minute", 1200, None, None, None)]
        # What fits the bucket at once, and twenty per second from then on.
        assert took_s > (90 - 30) / 20 - 0.5
        assert await scene.value("select max(failures) from items") == 0
        # Nobody else used anything.
        assert await scene.value("select sum(outside_requests) from ledger") <= 3
        await scene.check_books()


async def test_two_workers_never_exceed_a_minute_that_headers_state(database: str) -> None:
    async with (
        simulator(rpm=40) as (provider, url),
        Scene.open(database, base_url=url) as scene,
    ):
        batch = await scene.submit(bodies(60))
        async with (
            working(scene, database, burst_s=60),
            working(scene, database, burst_s=60),
        ):

            async def all_of_the_minute() -> bool:
                return (await scene.batch(batch.batch_id)).completed == 40

            async def the_rest_waits() -> bool:
                waits = await scene.rows(
                    "select reason::text, extract(epoch from next_at - clock_timestamp()) from ready"
                )
                return [(reason, 55 < wait_s < 62) for reason, wait_s in waits] == [
                    ("capacity", True)
                ]

            await until(all_of_the_minute)
            await until(the_rest_waits, within_s=5)
        report = provider.report()
        assert (report["accepted"], report["refused"]) == (40, 0)
        await scene.check_books()


async def test_limits_of_a_provider_in_anthropics_style_are_learned(database: str) -> None:
    limits = {"rpm": 6000, "input_tpm": 600_000, "output_tpm": 60_000}
    async with (
        simulator(**limits, header_style="anthropic") as (provider, url),
        Scene.open(database, base_url=url) as scene,
    ):
        batch = await scene.submit(bodies(60))
        async with working(scene, database), working(scene, database):
            batch = await ended(scene, batch)
        assert batch.completed == 60
        assert provider.report()["refused"] == 0
        assert await _observed_limits(scene) == [("minute", 6000, None, 600_000, 60_000)]
        await scene.check_books()


async def test_two_workers_find_out_how_many_calls_at_once_are_borne(database: str) -> None:
    """It says only that there are too many, and not when to come back."""
    async with (
        simulator(max_in_flight=8, latency_ms=200) as (provider, url),
        Scene.open(database, base_url=url) as scene,
    ):
        batch = await scene.submit(bodies(80))
        async with working(scene, database), working(scene, database):
            batch = await ended(scene, batch)
        assert (batch.completed, batch.failed) == (80, 0)
        # Answered calls count as out until they are recorded, which takes long on a busy machine: the bound
        # lies somewhat above the provider's, but below the sixteen that it began with.
        concurrency = await scene.value("select max(concurrency) from scope_states")
        assert 3 < concurrency < 16
        # The first sixteen came at once; after that one too many is how the bound is found.
        report = provider.report()
        assert int(str(report["refused"])) < 30
        assert await scene.value("select max(failures) from items") == 0
        await scene.check_books()


async def test_both_workers_wait_as_long_as_they_are_told(database: str) -> None:
    """Nobody calls before the time that Retry-After names; then one call goes ahead, and soon."""
    arrivals: list[float] = []
    async with (
        # Five at once; the next fits three seconds later, and headers say nothing of the limit.
        simulator(
            rpm=20, algorithm="bucket", bucket_seconds=15, latency_ms=1000, latency_sigma=0
        ) as (provider, url),
        Scene.open(database, base_url=url) as scene,
    ):
        handle = provider.handle

        def note(connection: Any, method: str, path: str, body: bytes) -> None:  # noqa: ANN401
            arrivals.append(time.monotonic())
            handle(connection, method, path, body)

        provider.handle = note  # as its connections find it
        provider.limit_headers = dict[str, str]
        await scene.submit(bodies(30))
        async with working(scene, database, burst_s=60), working(scene, database, burst_s=60):
            await until(lambda: _refused(provider, 1))
            await until(lambda: _has_refused_all(scene, provider))
            burst = len(arrivals)

            async def called_again() -> bool:
                return len(arrivals) > burst

            await until(called_again, within_s=8, every_s=0.01)
            await asyncio.sleep(0.3)  # whoever does not wait for its answer has come by then
        pause = arrivals[burst] - arrivals[burst - 1]
        # Told in whole milliseconds, of a bucket that has been filling; a tenth of jitter and a look more. A
        # second rest would double it.
        assert 2.8 < pause < 2 * 2.8
        # The others follow a second after the claim of that one. By their times, because this loop, which is also
        # the provider's, may stall.
        assert all(later - arrivals[burst] > 0.5 for later in arrivals[burst + 1 :])
        await scene.check_books()


async def test_a_reply_that_cannot_be_stored_does_not_hold_up_the_others(
    database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One outcome with text that Postgres refuses (NUL) between good ones."""
    from app import worker as module  # noqa: PLC0415 - patched below

    record = module.Worker._recorded  # pyright: ignore[reportPrivateUsage] - where a reply enters

    def spoiled(self: Worker, item: Any, route: Any, outcome: Any) -> Any:  # noqa: ANN401
        settlement, body = record(self, item, route, outcome)
        if item.seq == 3:
            settlement.model = "a\0b"
        return settlement, body

    monkeypatch.setattr(module.Worker, "_recorded", spoiled)
    async with simulator() as (_, url), Scene.open(database, base_url=url) as scene:
        batch = await scene.submit(bodies(8))
        async with working(scene, database):
            batch = await ended(scene, batch)
        assert (batch.completed, batch.failed) == (7, 1)
        assert await scene.rows(
            "select seq, error_code from item_results where error_code is not null"
        ) == [(3, "unstorable")]
        await scene.check_books()


async def _observed_limits(scene: Scene) -> list[tuple[Any, ...]]:
    return await scene.rows(
        "select period::text, requests, tokens, input_tokens, output_tokens from limits"
        " where source = 'observed'"
    )


async def _refused(provider: Simulator, calls: int) -> bool:
    return int(str(provider.report()["refused"])) >= calls


async def _has_refused_all(scene: Scene, provider: Simulator) -> bool:
    """Whether every refusal has been recorded, and nothing is out."""
    recorded, running = (
        await scene.rows(
            "select (select count(*) from attempts where outcome = 'throttled'),"
            " (select count(*) from items where status = 'running')"
        )
    )[0]
    return recorded == provider.report()["refused"] and running == 0


async def _answered(provider: Simulator, calls: int) -> bool:
    return int(str(provider.report()["answered"])) >= calls


async def _cut_all_connections(url: str) -> None:
    async with await psycopg.AsyncConnection.connect(url, autocommit=True) as knife:
        await knife.execute(
            "select pg_terminate_backend(pid) from pg_stat_activity "
            "where datname = current_database() and pid <> pg_backend_pid()"
        )


async def _hears(scene: Scene) -> bool:
    return await scene.value(
        "select exists (select from pg_stat_activity where datname = current_database() "
        "and application_name = 'sluice-listen' and state = 'idle' and query ilike 'listen%%')"
    )


async def _equals(worker: Worker, calls: int) -> bool:
    return worker.in_flight == calls


@pytest.mark.parametrize("rung", [True, False])
async def test_calls_of_an_aborted_batch_are_cut_and_only_noted(
    database: str, *, rung: bool
) -> None:
    """Told by a ring, or, when that was lost, found at the next heartbeat."""
    async with (
        simulator(latency_ms=60_000, latency_sigma=0) as (provider, url),
        Scene.open(database, base_url=url) as scene,
        working(scene, database) as worker,
    ):
        batch, other = await scene.submit(bodies(5)), await scene.submit(bodies(1))

        async def are_out() -> bool:
            return provider.report()["accepted"] == 6

        await until(are_out)
        await scene.cancel(batch, abort=True)
        assert await scene.mark(batch) == 5
        if rung:
            ringer = Ringer(scene.db)
            ringer.ring(ABORTS, {batch.batch_id})
            await ringer.flush()

        async def are_cut() -> bool:
            return worker.in_flight == 1 and provider.report()["abandoned"] == 5

        await until(are_cut)
        state = await scene.batch(batch.batch_id)
        assert (state.status, state.cancelled, state.running) == ("cancelled", 5, 0)
        assert await scene.rows(
            "select outcome::text, error_code, count(*) from attempts group by 1, 2"
        ) == [("lost", "aborted", 5)]
        await scene.check_books()
        await scene.cancel(other, abort=True)
        await scene.mark(other)


async def test_what_a_request_says_to_us_is_heeded_and_not_sent_on(database: str) -> None:
    seen: list[Call] = []
    call = Provider.call

    async def watched(self: Provider, given: Call) -> Outcome:
        seen.append(given)
        return await call(self, given)

    own = (
        b'{"messages":[{"role":"user","content":"x"}],"max_tokens":9,"vmx":{"timeoutMs":5000,'
        b'"providerArgs":{"max_tokens":30,"user":"u"}}}'
    )
    async with simulator() as (_, url), Scene.open(database, base_url=url) as scene:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Provider, "call", watched)
            batch = await scene.submit([own])
            await scene.do("update items set timeout_ms = 5000")
            async with working(scene, database):
                assert (await ended(scene, batch)).status == "completed"
    assert [c.timeout_s for c in seen] == [5]
    sent = json.loads(provider_body(seen[0]))
    assert "vmx" not in sent
    assert (sent["max_tokens"], sent["user"]) == (30, "u")
