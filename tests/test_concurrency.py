"""What holds when several sessions are at work at once. Real ones, and their waiting is looked up."""

import asyncio
import random
from collections import Counter, defaultdict
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from datetime import date
from typing import Any
from uuid import UUID

import psycopg
import pytest

from app import batches, queue
from app.batches import Batch
from app.capacity import Amount
from app.db import Connection, Database
from app.ids import uuid7
from app.queue import Claim, Item, Outcome
from tests.conftest import cloned
from tests.scene import Scene, until_blocked


@pytest.fixture(scope="module")
async def world(cluster: str, template: str) -> AsyncIterator[Database]:
    """One database for this file, whose sessions know the functions; a tenant for every test."""
    with cloned(cluster, template) as url:
        async with Database(url, size=6) as db:
            yield db


@pytest.fixture
async def scene(world: Database) -> AsyncIterator[Scene]:
    scene = await Scene.make(world, resources=3)
    yield scene
    await scene.check_books()


@asynccontextmanager
async def two_sessions(scene: Scene) -> AsyncGenerator[tuple[Connection, Connection]]:
    async with scene.session() as one, scene.session() as two:
        yield one, two


async def within(work: "asyncio.Task[Any]", seconds: float = 10) -> Any:  # noqa: ANN401
    return await asyncio.wait_for(work, seconds)


# The mutex -----------------------------------------------------------------------------------------


async def test_a_second_claim_on_a_resource_is_told_busy_at_once(scene: Scene) -> None:
    await scene.submit(10)
    async with two_sessions(scene) as (one, two):
        await scene.claim(3, conn=one)
        beside = await within(asyncio.create_task(scene.claim(3, conn=two)))
        assert (beside.busy, beside.items) == (True, [])
        assert beside.wait_s == pytest.approx(0, abs=0.01)
        await two.commit()
        await one.commit()
    assert [i.seq for i in (await scene.claim()).items] == [3, 4, 5, 6, 7, 8, 9]


async def test_a_claim_on_another_resource_of_the_connection_is_busy_too(scene: Scene) -> None:
    """They share the connection's limits, so they share its mutex."""
    await scene.submit(2, resource=0)
    await scene.submit(2, resource=1)
    async with two_sessions(scene) as (one, two):
        await scene.claim(conn=one)
        beside = await within(asyncio.create_task(scene.claim(conn=two, resource=1)))
        assert beside.busy
        await two.commit()
        await one.rollback()
        assert len((await scene.claim(conn=two, resource=1)).items) == 2
        await two.commit()


async def test_claims_of_different_tenants_do_not_meet(scene: Scene) -> None:
    other = await Scene.make(scene.db)
    await scene.submit(2)
    await other.submit(2)
    async with two_sessions(scene) as (one, two):
        assert len((await scene.claim(conn=one)).items) == 2
        assert len((await within(asyncio.create_task(other.claim(conn=two)))).items) == 2
        await one.commit()
        await two.commit()


async def test_a_claim_sees_what_the_holder_before_it_reserved(scene: Scene) -> None:
    await scene.limit(requests=10)
    await scene.submit(20)
    async with two_sessions(scene) as (one, two):
        assert len((await scene.claim(6, conn=one)).items) == 6
        assert (await scene.claim(20, conn=two)).busy
        await two.commit()
        await one.commit()
        assert len((await scene.claim(20, conn=two)).items) == 4
        await two.commit()


async def test_a_claim_whose_statement_began_before_anothers_commit_sees_it(scene: Scene) -> None:
    """Were the claim one statement, it would look with the snapshot of its beginning."""
    await scene.limit(requests=10)
    await scene.submit(20)
    async with two_sessions(scene) as (one, two):
        await one.execute("select pg_advisory_xact_lock(4711)")
        late = asyncio.create_task(
            two.execute(
                "with pause as materialized (select pg_advisory_xact_lock(4711))"
                " select seq from pause cross join lateral"
                " claim(%s, %s, %s, 20, true, '1 s', '60 s', 60, 0) where seq is not null",
                (scene.workspace_id, scene.resource_id, scene.worker_id),
            )
        )
        assert await until_blocked(scene, two, late)
        assert len((await scene.claim(6, conn=one)).items) == 6
        await one.commit()
        taken = await (await within(late)).fetchall()
        assert len(taken) == 4
        await two.commit()


async def test_a_claim_looks_at_the_ledger_after_it_has_the_mutex(world: Database) -> None:
    """It is stopped where it takes the mutex; meanwhile six requests are used and committed."""
    scene = await Scene.make(world)
    await scene.limit(requests=10)
    await scene.submit(20)
    async with two_sessions(scene) as (one, two):
        await one.execute("lock table limit_scopes in access exclusive mode")
        late = asyncio.create_task(scene.claim(20, conn=two))
        assert await until_blocked(scene, two, late)
        await one.execute(
            "insert into ledger select workspace_id, limit_id, slot_of(period, sliding, clock_timestamp()),"
            " 6, 0, 0 from limits where workspace_id = %s",
            (scene.workspace_id,),
        )
        await one.commit()
        assert len((await within(late)).items) == 4


# A cancel beside a claim ---------------------------------------------------------------------------


async def test_a_claim_crossed_by_a_cancel_is_undone(scene: Scene) -> None:
    await scene.limit(requests=100)
    batch = await scene.submit(5)
    other = await scene.submit(5)
    async with two_sessions(scene) as (cancelling, claiming):
        await scene.cancel(batch, conn=cancelling)
        claim = asyncio.create_task(scene.claim(conn=claiming))
        assert await until_blocked(scene, claiming, claim)
        await cancelling.commit()
        with pytest.raises(psycopg.Error) as refusal:
            await within(claim)
        assert refusal.value.sqlstate == "SLCLO"
        await claiming.rollback()
    assert (
        await scene.value("select count(*) from ledger where workspace_id = %s", scene.workspace_id)
        == 0
    )
    again = await scene.claim()
    assert {i.batch_id for i in again.items} == {other.batch_id}


async def test_a_claim_before_a_cancel_keeps_what_it_took(scene: Scene) -> None:
    batch = await scene.submit(5)
    async with two_sessions(scene) as (claiming, cancelling):
        taken = (await scene.claim(2, conn=claiming)).items
        cancel = asyncio.create_task(scene.cancel(batch, conn=cancelling))
        assert await until_blocked(scene, cancelling, cancel)
        await claiming.commit()
        assert await within(cancel) == "cancelled"
        await cancelling.commit()
    state = await scene.batch(batch.batch_id)
    assert (state.running, state.cancelled) == (2, 3)
    await scene.settle(taken)


async def test_a_redrive_crossed_by_a_cancel_takes_nothing(scene: Scene) -> None:
    batch = await scene.submit(3)
    await scene.settle((await scene.claim(1)).items, Outcome.rejected)
    async with two_sessions(scene) as (cancelling, redriving):
        await scene.cancel(batch, conn=cancelling)
        redrive = asyncio.create_task(scene.redrive(batch, conn=redriving))
        assert await until_blocked(scene, redriving, redrive)
        await cancelling.commit()
        assert await within(redrive) == 0
        await redriving.commit()
    assert [i.status for i in await scene.items(batch)] == ["failed", "cancelled", "cancelled"]


# Locked items --------------------------------------------------------------------------------------


async def test_settle_passes_over_locked_items_and_says_so(scene: Scene) -> None:
    await scene.limit(requests=10)
    batch = await scene.submit(3)
    items = (await scene.claim()).items
    async with two_sessions(scene) as (one, two):
        await one.execute(
            "select 1 from items where batch_id = %s and seq = 1 for no key update",
            (batch.batch_id,),
        )
        settled = await within(asyncio.create_task(scene.settle(items, conn=two)))
        await two.commit()
        assert {s.ord: (s.settled, s.becomes) for s in settled} == {
            1: (True, "completed"),
            2: (False, None),
            3: (True, "completed"),
        }
        assert (
            await scene.value("select count(*) from attempts where batch_id = %s", batch.batch_id)
            == 2
        )
        await one.rollback()
    assert [s.becomes for s in await scene.settle(items)] == [None, "completed", None]


async def test_reclaim_passes_over_locked_items(scene: Scene) -> None:
    batch = await scene.submit(2)
    items = (await scene.claim()).items
    async with two_sessions(scene) as (one, two):
        await one.execute(
            "select 1 from items where batch_id = %s and seq = 1 for no key update",
            (batch.batch_id,),
        )
        assert await within(asyncio.create_task(scene.reclaim(items, conn=two))) == 1
        await two.commit()
        # A closed connection's locks end when the server notices; a rollback's at once.
        await one.rollback()
    assert await scene.reclaim(items) == 1


@pytest.mark.parametrize("answer_first", [True, False])
async def test_of_an_answer_and_a_reclaim_both_are_recorded_once(
    scene: Scene, *, answer_first: bool
) -> None:
    await scene.limit(requests=10)
    batch = await scene.submit(1)
    items = (await scene.claim()).items
    async with two_sessions(scene) as (one, two):
        if answer_first:
            await scene.settle(items, conn=one)
            assert await scene.reclaim(items, conn=two) == 0
        else:
            assert await scene.reclaim(items, conn=one) == 1
            [skipped] = await scene.settle(items, conn=two)
            assert not skipped.settled
        await one.commit()
        await two.commit()
    await scene.settle(items)
    assert (await scene.batch(batch.batch_id)).status == "completed"
    assert await scene.rows(
        "select attempt, outcome::text from attempts where batch_id = %s", batch.batch_id
    ) == [(1, "answered")]


# Looks that must not be lost -----------------------------------------------------------------------
#
# A claim that found nothing is about to write that nothing waits. Whoever adds work meanwhile finds the
# ready row as it was before, due already; it must wait for the claim all the same, or its work would
# lie unseen until the safety net of the minute. All but the new batch were lost once.

Adds = Callable[[Scene, Batch, list[Item], Connection], Awaitable[Any]]


ADDS: dict[str, Adds] = {
    "retry": lambda s, _, held, conn: s.settle(held, Outcome.unreachable, conn=conn),
    "release": lambda s, _, held, conn: s.settle(held, Outcome.unsent, conn=conn),
    "reclaim": lambda s, _, held, conn: s.reclaim(held, conn=conn),
    "redrive": lambda s, batch, _, conn: s.redrive(batch, conn=conn),
}


@pytest.mark.parametrize("adds", ADDS)
async def test_a_claim_that_finds_nothing_does_not_hide_what_is_added(
    scene: Scene, adds: str
) -> None:
    batch = await scene.submit(2)
    held = (await scene.claim()).items
    await scene.settle(held[:1], Outcome.rejected)
    await scene.do("update ready set next_at = now() where workspace_id = %s", scene.workspace_id)
    async with two_sessions(scene) as (claiming, adding):
        assert (await scene.claim(conn=claiming)).wait_s is None
        work = asyncio.ensure_future(ADDS[adds](scene, batch, held[1:], adding))
        assert isinstance(work, asyncio.Task)
        assert await until_blocked(scene, adding, work)
        await claiming.commit()
        await within(work)
        await adding.commit()
    assert await scene.due_in() <= 0
    assert len((await scene.claim()).items) == 1


async def test_a_claim_that_finds_nothing_does_not_hide_a_new_batch(scene: Scene) -> None:
    await scene.submit(1)
    await scene.claim()
    await scene.do("update ready set next_at = now() where workspace_id = %s", scene.workspace_id)
    async with scene.session() as claiming:
        assert (await scene.claim(conn=claiming)).wait_s is None
        create = asyncio.create_task(scene.submit(1))
        await _until_somebody_waits_for(scene, claiming)
        await claiming.commit()
        await within(create)
    assert await scene.due_in() <= 0


async def _until_somebody_waits_for(scene: Scene, conn: Connection) -> None:
    async with asyncio.timeout(10):
        while not await scene.value(  # noqa: ASYNC110 - the event is in another process
            "select count(*) from pg_stat_activity where wait_event_type = 'Lock'"
            " and %s = any (pg_blocking_pids(pid))",
            conn.info.backend_pid,
        ):
            await asyncio.sleep(0.002)


async def test_a_claim_without_capacity_does_not_hide_a_refund(scene: Scene) -> None:
    await scene.limit(requests=1)
    await scene.submit(2)
    held = (await scene.claim()).items
    await scene.do("update ready set next_at = now() where workspace_id = %s", scene.workspace_id)
    async with two_sessions(scene) as (claiming, refunding):
        claim = await scene.claim(conn=claiming)
        assert claim.wait_s is not None
        assert claim.wait_s > 50
        settle = asyncio.create_task(scene.settle(held, Outcome.unsent, conn=refunding))
        assert await until_blocked(scene, refunding, settle)
        await claiming.commit()
        await within(settle)
        await refunding.commit()
    assert await scene.due_in() <= 0


async def test_a_claim_that_waits_for_a_refund_sees_it(scene: Scene) -> None:
    """The other order: the refund has the ready row, the claim computes its wait after it."""
    await scene.limit(requests=1)
    await scene.submit(2)
    held = (await scene.claim()).items
    await scene.do("update ready set next_at = now() where workspace_id = %s", scene.workspace_id)
    async with two_sessions(scene) as (refunding, claiming):
        await scene.settle(held, Outcome.unsent, conn=refunding)
        claim = asyncio.create_task(scene.claim(conn=claiming))
        assert await until_blocked(scene, claiming, claim)
        await refunding.commit()
        found: Claim = await within(claim)
        await claiming.commit()
    assert (found.items, found.wait_s) == ([], 0)
    assert await scene.due_in() <= 0


# Lock order ----------------------------------------------------------------------------------------


async def test_two_settlements_wake_resources_in_one_order(scene: Scene) -> None:
    """Retries' and refunds' ready rows were once locked in two rounds, and so crosswise.

    One settlement gives back capacity on the first resource and a retry to the second; the other
    the reverse. The first is stopped between its two rounds, at the row of a third resource that
    the provider throttles.
    """
    one, two, three = sorted(range(3), key=lambda n: scene.resource_ids[n])
    for resource in (one, two):
        await scene.limit(requests=3, resource=resource)
    held = dict[tuple[int, str], Item]()
    for use in ("retry", "refund", "waits"):
        for resource in (one, two):
            await scene.submit(1, resource=resource)
            if use != "waits":
                [held[resource, use]] = (await scene.claim(resource=resource)).items
    await scene.submit(1, resource=three)
    [throttled] = (await scene.claim(resource=three)).items
    await scene.do(
        "update ready set next_at = now() + interval '1 hour' where workspace_id = %s",
        scene.workspace_id,
    )

    async def settle(conn: Connection, items: list[tuple[Item, Outcome]]) -> None:
        async with conn.cursor():
            await queue.settle(
                conn,
                workspace_id=scene.workspace_id,
                worker_id=scene.worker_id,
                settlements=[
                    queue.Settlement(
                        batch_day=item.batch_day,
                        batch_id=item.batch_id,
                        resource_id=item.resource_id,
                        connection_id=scene.connection_id,
                        seq=item.seq,
                        attempt=item.attempt,
                        outcome=outcome,
                        claimed_at=item.claimed_at,
                        limit_ids=item.limit_ids,
                        reserved_input_tokens=item.input_tokens,
                        reserved_output_tokens=item.output_tokens,
                        expected_output_tokens=item.expected_output_tokens,
                        refund=outcome == Outcome.answered,
                        wait_s=0,
                        error_code=outcome.value,
                    )
                    for item, outcome in items
                ],
                bodies=["{}"] * len(items),
            )
        await conn.commit()

    async with scene.session() as blocker, two_sessions(scene) as (first, second):
        await blocker.execute(
            "select 1 from scope_states where workspace_id = %s for no key update",
            (scene.workspace_id,),
        )
        stopped = asyncio.create_task(
            settle(
                first,
                [
                    (throttled, Outcome.throttled),
                    (held[two, "retry"], Outcome.unreachable),
                    (held[one, "refund"], Outcome.answered),
                ],
            )
        )
        assert await until_blocked(scene, first, stopped)
        crossing = asyncio.create_task(
            settle(
                second,
                [
                    (held[one, "retry"], Outcome.unreachable),
                    (held[two, "refund"], Outcome.answered),
                ],
            )
        )
        await until_blocked(scene, second, crossing)
        await blocker.commit()
        await within(asyncio.gather(stopped, crossing))  # pyright: ignore[reportArgumentType]


class Stage:
    """A tenant in which every verb has something to do on the same rows."""

    def __init__(self, scene: Scene) -> None:
        self.scene = scene
        self.held: list[Item] = []
        self.lost: list[Item] = []

    async def set(self) -> None:
        scene = self.scene
        await scene.limit(requests=1000)
        self.batch = await scene.submit(40, resources=[0, 1])
        self.closed = await scene.submit(10)
        self.cut = await scene.submit(10)
        self.gone = await scene.submit(3)
        await scene.cancel(self.gone)
        while await scene.mark(self.gone):
            pass
        mine = (await scene.claim(18)).items
        cut = [i for i in mine if i.batch_id == self.cut.batch_id]
        closed = [i for i in mine if i.batch_id == self.closed.batch_id]
        mine = [i for i in mine if i.batch_id == self.batch.batch_id]
        assert len(closed) >= 3
        assert len(mine) >= 4
        assert len(cut) >= 4
        await scene.settle([mine.pop()], Outcome.rejected)
        await scene.cancel(self.closed)
        await scene.cancel(self.cut, abort=True)
        self.lost = [mine.pop()]
        self.held = [*mine, *closed, *cut]

    async def claim(self, conn: Connection) -> None:
        self.held += (await self.scene.claim(5, conn=conn)).items

    async def settle(self, conn: Connection) -> None:
        answered, retried = self.held[::2], self.held[1::2]
        # The second settlement of a pair is of nothing new: each item was given away.
        self.held = []
        settled = await self.scene.settle(answered, conn=conn)
        self.held += [answered[s.ord - 1] for s in settled if not s.settled]
        settled = await self.scene.settle(retried, Outcome.throttled, conn=conn, wait_s=0)
        self.held += [retried[s.ord - 1] for s in settled if not s.settled]

    async def reclaim(self, conn: Connection) -> None:
        await self.scene.reclaim(self.lost, conn=conn)

    async def cancel(self, conn: Connection) -> None:
        await self.scene.cancel(self.batch, conn=conn)

    async def cancel_chunk(self, conn: Connection) -> None:
        await self.scene.mark(self.closed, conn=conn, most=3)

    async def abort_chunk(self, conn: Connection) -> None:
        await self.scene.mark(self.cut, conn=conn, most=3)

    async def redrive(self, conn: Connection) -> None:
        await self.scene.redrive(self.batch, conn=conn)

    async def revive(self, conn: Connection) -> None:
        await self.scene.redrive(self.gone, conn=conn, statuses=["cancelled"])


VERBS = (
    "claim", "settle", "reclaim", "cancel", "cancel_chunk", "abort_chunk", "redrive", "revive",
)  # fmt: skip


@pytest.mark.parametrize("held_open", VERBS)
async def test_every_pair_of_verbs_passes_or_waits(world: Database, held_open: str) -> None:
    """One verb is done but not committed; the other, meanwhile, ends or waits, and then ends."""
    scene = await Scene.make(world, resources=2)
    async with two_sessions(scene) as (one, two):
        for beside in VERBS:
            try:
                await _pair(await Scene.make(world, resources=2), one, two, held_open, beside)
            except BaseException as error:
                error.add_note(f"{held_open} was held open, {beside} came beside it")
                raise


async def _pair(
    scene: Scene, one: Connection, two: Connection, held_open: str, beside: str
) -> None:
    stage = Stage(scene)
    await stage.set()

    async def second() -> None:
        try:
            await getattr(stage, beside)(two)
            await two.commit()
        except psycopg.Error as error:
            # The one refusal that there is: a claim crossed by a cancel.
            if (error.sqlstate, beside, held_open) != ("SLCLO", "claim", "cancel"):
                raise
            await two.rollback()

    await getattr(stage, held_open)(one)
    work = asyncio.create_task(second())
    await until_blocked(scene, two, work)
    await one.commit()
    await within(work)
    await scene.check_books()
    # And the story has an end.
    await scene.settle([*stage.held, *stage.lost])
    await scene.calm()
    for resource in (0, 1):
        while items := (await scene.claim(resource=resource)).items:
            await scene.settle(items)
    for batch in (stage.batch, stage.closed, stage.cut, stage.gone):
        while await scene.mark(batch):
            pass
        assert (await scene.batch(batch.batch_id)).is_finished
    assert (
        await scene.value(
            "select count(*) from items where workspace_id = %s and status = 'running'",
            scene.workspace_id,
        )
        == 0
    )
    await scene.check_books()


# Everything at once --------------------------------------------------------------------------------


class Crowd:
    """Sessions that do as they like for a number of rounds, and what they saw."""

    def __init__(self, scene: Scene, *, seed: int) -> None:
        self.scene = scene
        self.random = random.Random(seed)  # noqa: S311 - a game
        self.claimed: dict[tuple[UUID, int, int], Item] = {}
        self.crossed = 0
        self.batches: list[Batch] = []
        self.in_flight: list[Item] = []

    @asynccontextmanager
    async def session(self) -> AsyncGenerator[Connection]:
        conn = await psycopg.AsyncConnection.connect(self.scene.db.url, autocommit=True)
        async with conn:
            yield conn

    async def claimer(self, rounds: int, outcomes: list[Outcome]) -> None:
        async with self.session() as conn:
            while rounds > 0:
                resource = self.random.randrange(len(self.scene.resource_ids))
                try:
                    async with conn.transaction():
                        claim = await self.scene.claim(
                            self.random.randint(1, 30), conn=conn, resource=resource
                        )
                except psycopg.Error as error:
                    if error.sqlstate != "SLCLO":
                        raise
                    self.crossed += 1
                    continue
                rounds -= not claim.busy
                for item in claim.items:
                    key = (item.batch_id, item.seq, item.attempt)
                    assert key not in self.claimed, "the same attempt was given away twice"
                    self.claimed[key] = item
                self.in_flight += claim.items
                await self.settle_some(conn, outcomes)

    async def settle_some(self, conn: Connection, outcomes: list[Outcome]) -> None:
        self.random.shuffle(self.in_flight)
        few = self.random.randint(0, 30)
        some, self.in_flight = self.in_flight[:few], self.in_flight[few:]
        by_outcome = defaultdict[Outcome, list[Item]](list)
        for item in some:
            by_outcome[self.random.choice(outcomes)].append(item)
        for outcome, items in by_outcome.items():
            async with conn.transaction():
                settled = await self.scene.settle(items, outcome, conn=conn, wait_s=0)
            self.in_flight += [items[s.ord - 1] for s in settled if not s.settled]

    async def reclaimer(self, rounds: int) -> None:
        async with self.session() as conn:
            for _ in range(rounds):
                # What is in flight stays there: its late answer comes after the reclaim.
                by_batch = defaultdict[UUID, list[Item]](list)
                for item in self.in_flight[:20]:
                    by_batch[item.batch_id].append(item)
                for items in by_batch.values():
                    async with conn.transaction():
                        await self.scene.reclaim(items, conn=conn)
                await asyncio.sleep(0)

    async def canceller(self, rounds: int) -> None:
        async with self.session() as conn:
            for number in range(rounds):
                batch = self.random.choice(self.batches)
                async with conn.transaction():
                    if number % 8 == 0:
                        await self.scene.cancel(batch, conn=conn)
                    elif number % 2:
                        await self.scene.mark(batch, conn=conn, most=7)
                    else:
                        await self.scene.redrive(batch, conn=conn, most=7)

    async def submitter(self, rounds: int) -> None:
        for _ in range(rounds):
            self.batches.append(
                await self.scene.submit(
                    self.random.randint(1, 40),
                    resources=self.random.choice([[0], [1], [0, 1], [1, 0, 1]]),
                    max_attempts=2,
                )
            )


async def test_a_crowd_deadlocks_never_and_its_books_are_exact(database: str) -> None:
    async with Scene.open(database, resources=2, pool=3) as scene:
        crowd = Crowd(scene, seed=7)
        await crowd.submitter(4)
        outcomes = [*[Outcome.answered] * 4, Outcome.unreachable, Outcome.rejected, Outcome.unsent]
        async with asyncio.TaskGroup() as group:
            for _ in range(5):
                group.create_task(crowd.claimer(40, outcomes))
            group.create_task(crowd.reclaimer(40))
            group.create_task(crowd.reclaimer(40))
            group.create_task(crowd.canceller(60))
            group.create_task(crowd.canceller(60))
            group.create_task(crowd.submitter(15))
        await scene.check_books()
        assert len(crowd.claimed) > 200
        # The end: all is marked, settled and finished.
        async with scene.db.connection() as conn:
            while crowd.in_flight:
                await crowd.settle_some(conn, [Outcome.answered])
        for resource in (0, 1):
            while items := (await scene.claim(resource=resource)).items:
                await scene.settle(items)
        for batch in crowd.batches:
            while await scene.mark(batch):
                pass
            assert (await scene.batch(batch.batch_id)).is_finished
        await scene.check_books()
        assert await _deadlocks(scene) == 0


async def _deadlocks(scene: Scene) -> int:
    """Of the whole run: sessions report what they counted when they end, and these have ended."""
    await scene.rows("select pg_stat_force_next_flush()")
    return await scene.value(
        "select deadlocks from pg_stat_database where datname = current_database()"
    )


async def test_a_crowd_never_takes_more_than_the_limits(database: str) -> None:
    """Two resources of 150, one connection of 200 a minute, six workers: 200 exactly are claimed."""
    async with Scene.open(database, resources=2, rpm=150, connection_rpm=200, pool=3) as scene:
        crowd = Crowd(scene, seed=11)
        for resource in (0, 1):
            for _ in range(3):
                crowd.batches.append(await scene.submit(150, resource=resource))
        async with asyncio.TaskGroup() as group:
            for _ in range(6):
                group.create_task(crowd.claimer(25, [Outcome.answered, Outcome.unreachable]))
            group.create_task(crowd.reclaimer(15))
        assert len(crowd.claimed) == 200
        by_resource = Counter(item.resource_id for item in crowd.claimed.values())
        assert max(by_resource.values()) <= 150
        assert await scene.value("select count(*) from attempts") <= 200
        # Late answers and failures change tokens, never how many were claimed.
        assert await scene.rows(
            "select l.requests, sum(g.requests)::int from limits l join ledger g"
            " using (workspace_id, limit_id) where l.scope_id = %s group by 1",
            scene.connection_id,
        ) == [(200, 200)]
        await scene.check_books()
        # A minute later there is room again, once more for so many and no more.
        await scene.age(62)
        crowd.in_flight.clear()
        async with asyncio.TaskGroup() as group:
            for _ in range(4):
                group.create_task(crowd.claimer(20, [Outcome.answered]))
        assert len(crowd.claimed) == 400
        await scene.check_books()


async def test_a_crowd_stays_within_a_limit_of_tokens(database: str) -> None:
    async with Scene.open(database, pool=3) as scene:
        crowd = Crowd(scene, seed=13)
        for _ in range(3):
            batch = await scene.submit(60)
            await scene.size(batch, [(crowd.random.randint(1, 90), 10) for _ in range(60)])
            crowd.batches.append(batch)
        await scene.limit(tokens=3000)
        async with asyncio.TaskGroup() as group:
            for _ in range(5):
                group.create_task(crowd.claimer(15, [Outcome.unreachable]))
        claimed = sum(i.input_tokens + i.output_tokens for i in crowd.claimed.values())
        # As many as fit: what is left is smaller than the largest item.
        assert 2900 < claimed <= 3000
        await scene.check_books()


async def test_event_numbers_of_a_crowd_have_no_gaps_and_never_come_late(database: str) -> None:
    """A reader that has seen n is never shown a smaller number later."""
    async with Scene.open(database, pool=4) as scene:
        batch = await scene.submit(200)
        crowd = Crowd(scene, seed=17)
        crowd.batches.append(batch)
        seen: list[int] = []
        done = asyncio.Event()

        async def read() -> None:
            while not done.is_set() or len(seen) < await _last_no(scene):
                rows = await scene.rows(
                    "select first_no, last_no from events where last_no > %s order by last_no",
                    seen[-1] if seen else 0,
                )
                for first, last in rows:
                    seen.extend(range(first, last + 1))

        async def work() -> None:
            async with asyncio.TaskGroup() as group:
                for _ in range(4):
                    group.create_task(crowd.claimer(25, [Outcome.answered, Outcome.unreachable]))
                group.create_task(crowd.reclaimer(20))
            done.set()

        async with asyncio.TaskGroup() as group:
            group.create_task(read())
            group.create_task(work())
        assert seen == list(range(1, len(seen) + 1))
        assert len(seen) > 400


async def _last_no(scene: Scene) -> int:
    return await scene.value("select max(last_no)::int from events")


async def test_a_worker_id_is_no_password(scene: Scene) -> None:
    """Whoever brings an answer to a lease that another holds: the attempt's number decides."""
    await scene.submit(1)
    items = (await scene.claim()).items
    assert [s.becomes for s in await scene.settle(items, worker_id=uuid7())] == ["completed"]


# Steering beside a claim ----------------------------------------------------------------------------


async def test_a_claim_leaves_out_a_batch_whose_limits_are_being_changed(scene: Scene) -> None:
    """Whoever changes limits has their mutex before any row of the batch: neither waits in a circle."""
    batch = await scene.submit(3)
    to = batches.Steering(
        priority=5,
        weight=1,
        expires_at=None,
        capacity=[],
        max_tokens=None,
        max_cost_nano=None,
        currency=None,
        pause_reason=None,
    )
    amounts = [Amount(period="minute", requests=2)]

    async def change(conn: Connection) -> None:
        await batches.steer(
            conn, workspace_id=scene.workspace_id, batch_id=batch.batch_id, to=to, amounts=amounts
        )

    async with two_sessions(scene) as (steering, claiming):
        await batches.hold(steering, workspace_id=scene.workspace_id, batch_id=batch.batch_id)
        await change(steering)
        await steering.commit()
        await batches.hold(steering, workspace_id=scene.workspace_id, batch_id=batch.batch_id)
        claim = await within(asyncio.create_task(scene.claim(conn=claiming)))
        assert (claim.items, claim.busy) == ([], True)
        await claiming.commit()
        amounts = [Amount(period="minute", requests=1)]
        await change(steering)
        await steering.commit()
    assert len((await scene.claim()).items) == 1


async def test_two_who_make_the_partitions_of_a_day_at_once_do_not_fail(scene: Scene) -> None:
    """The second one has looked before the first one committed, and must not trust what it saw."""
    day = date(2031, 5, 6)
    async with two_sessions(scene) as (one, two):
        assert await queue.ensure_partitions(one, day=day)
        waiting = asyncio.create_task(queue.ensure_partitions(two, day=day))
        assert await until_blocked(scene, two, waiting)
        await one.commit()
        assert not await within(waiting)
