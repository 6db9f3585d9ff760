"""What limits, concurrency, weights, priorities and deadlines allow a claim, and when it may come back.

Time passes by making what was claimed older (``Scene.age``). After every test the books are recounted.
"""

import asyncio
import random
from collections import Counter
from collections.abc import AsyncIterator, Mapping
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any, Literal
from uuid import UUID

import psycopg
import pytest

from app import queue
from app.batches import Batch
from app.capacity import Amount, Period
from app.db import Connection, Database
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
    """Two resources of one model on one connection."""
    scene = await Scene.make(world, resources=2)
    yield scene
    await scene.check_books()


def per_minute(
    requests: int | None = None, *, tokens: int | None = None, dimension: str | None = None
) -> Amount:
    return Amount(period="minute", requests=requests, tokens=tokens, dimension=dimension)


def counted(claim: Claim) -> Counter[UUID]:
    """How many items of each batch."""
    return Counter(item.batch_id for item in claim.items)


def tokens_of(items: list[Item], batch: Batch) -> int:
    return sum(i.input_tokens + i.output_tokens for i in items if i.batch_id == batch.batch_id)


async def only_limit(scene: Scene) -> UUID:
    """The one limit that people gave, or its one value."""
    [(limit_id,)] = await scene.rows(
        "select limit_id from limits where workspace_id = %s and source = 'given' and dimension is null",
        scene.workspace_id,
    )
    return limit_id


async def next_at(scene: Scene, resource: int = 0) -> datetime | None:
    """When the resource is to be looked at, to the microsecond; None: never."""
    return await scene.value(
        "select nullif(next_at, 'infinity') from ready where resource_id = %s",
        scene.resource_ids[resource],
    )


async def within(work: "asyncio.Future[Any]", seconds: float = 10) -> Any:  # noqa: ANN401
    return await asyncio.wait_for(work, seconds)


async def must_wait(scene: Scene, conn: Connection, work: "asyncio.Future[Any]") -> None:
    """It waits for another session; else it fails as it failed."""
    assert isinstance(work, asyncio.Task)
    if not await until_blocked(scene, conn, work):
        await work
        pytest.fail("it did not wait")


async def look_now(scene: Scene) -> None:
    """As if every resource's next look were due."""
    await scene.do(
        "update ready set next_at = clock_timestamp() where workspace_id = %s", scene.workspace_id
    )


# Slots ---------------------------------------------------------------------------------------------

FRAMES: list[tuple[Period, bool]] = [
    *((period, True) for period in ("minute", "hour", "day", "week", "month")),
    *((period, False) for period in ("minute", "hour", "day", "week", "month", "lifetime")),
]
FRAME_IDS = [f"{'sliding' if sliding else 'calendar'}-{period}" for period, sliding in FRAMES]

LENGTHS: dict[Period, timedelta] = {
    "minute": timedelta(minutes=1),
    "hour": timedelta(hours=1),
    "day": timedelta(days=1),
    "week": timedelta(weeks=1),
    "month": timedelta(days=30),
}
GUARD = timedelta(seconds=1)


def frees_at(period: Period, claimed_at: datetime, *, sliding: bool) -> datetime | None:
    """When a claim stops counting, by the calendar of this language; None: never."""
    at = claimed_at.astimezone(UTC)
    if period == "lifetime":
        return None
    if sliding:
        length = LENGTHS[period]
        slot = length / (240 if period == "minute" else 120)
        epoch = datetime(1970, 1, 1, tzinfo=UTC)
        return epoch + ((at - epoch) // slot + 1) * slot + length + GUARD
    day = at.replace(hour=0, minute=0, second=0, microsecond=0)
    month = day.replace(day=1)
    return {
        "minute": at.replace(second=0, microsecond=0) + timedelta(minutes=1),
        "hour": at.replace(minute=0, second=0, microsecond=0) + timedelta(hours=1),
        "day": day + timedelta(days=1),
        "week": day + timedelta(days=7 - day.weekday()),
        "month": (month + timedelta(days=32)).replace(day=1),
    }[period]


MOMENTS = (
    "2026-02-28 23:59:59.999999Z",
    "2026-03-01 00:00:00Z",
    "2026-03-29 01:30:00Z",  # Berlin's clocks go forward
    "2026-10-25 01:00:00Z",  # and back
    "2028-02-29 12:00:00Z",
    "2026-12-31 23:30:00Z",
    "2027-01-03 23:59:59Z",  # Sunday of ISO week 53
    "2027-01-04 00:00:00Z",
)


@pytest.mark.parametrize(("period", "sliding"), FRAMES, ids=FRAME_IDS)
@pytest.mark.parametrize("zone", ["UTC", "Europe/Berlin", "Pacific/Auckland"])
async def test_a_slot_counts_exactly_until_it_frees_in_every_time_zone(
    conn: Connection, *, period: Period, sliding: bool, zone: str
) -> None:
    await conn.execute("select set_config('TimeZone', %s, true)", (zone,))
    frame = (period, sliding)
    for at in MOMENTS:
        cursor = await conn.execute(
            "select nullif(f, 'infinity'), s > counts_after(%s, %s, f - interval '1 us', '1 s'),"
            " s > counts_after(%s, %s, f, '1 s')"
            " from slot_of(%s, %s, %s) s, slot_frees_at(%s, %s, s, '1 s') f",
            (*frame, *frame, *frame, at, *frame),
        )
        row = await cursor.fetchone()
        assert row is not None
        expected = frees_at(period, datetime.fromisoformat(at), sliding=sliding)
        assert (row[0] and row[0].astimezone(UTC)) == expected
        if expected is not None:
            assert row[1:] == (True, False)


# Every limit ---------------------------------------------------------------------------------------

#: Of these tokens of input and output is every item of the matrix.
SIZE = (30, 20)
KINDS: dict[str, Amount] = {
    "requests": per_minute(3),
    "tokens": per_minute(tokens=3 * 50 + 49),
    "input": Amount(period="minute", input_tokens=3 * 30 + 29),
    "output": Amount(period="minute", output_tokens=3 * 20 + 19),
}
SCOPES = ("connection", "model", "resource", "api_key", "batch", "value")


async def submit_below(scene: Scene, scope: str, amount: Amount, items: int) -> Batch:
    """A batch that this limit binds, set on such a scope."""
    options: dict[str, Any] = {}
    match scope:
        case "connection":
            await scene.set_limits(scene.connection_id, amount)
        case "model":
            await scene.set_limits(await scene.model_scope_id(), amount)
        case "resource":
            await scene.set_limits(scene.resource_id, amount)
        case "api_key":
            options["api_key_id"] = await scene.api_key(amount)
        case "batch":
            options["amounts"] = [amount]
        case _:
            await scene.set_limits(scene.resource_id, replace(amount, dimension="metadata:team"))
            options["metadata"] = {"team": "a"}
    batch = await scene.submit(items, **options)
    await scene.size(batch, [SIZE] * items)
    return batch


@pytest.mark.parametrize(("period", "sliding"), FRAMES, ids=FRAME_IDS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scope", SCOPES)
async def test_a_limit_admits_exactly_its_amount_and_says_when_the_oldest_slot_frees(
    scene: Scene, *, scope: str, kind: str, period: Period, sliding: bool
) -> None:
    amount = replace(KINDS[kind], period=period, sliding=sliding)
    await submit_below(scene, scope, amount, 8)
    if not sliding:
        await calendar_limit_binds(scene, period)
        return
    quarter = int(LENGTHS[period].total_seconds()) // 4
    [oldest] = (await scene.claim(1)).items
    await scene.age(quarter)
    claim = await scene.claim()
    assert len(claim.items) == 2
    assert (claim.reason, claim.waits_for) == ("capacity", await only_limit(scene))
    assert claim.wait_s is not None
    due = await next_at(scene)
    assert due == frees_at(period, oldest.claimed_at - timedelta(seconds=quarter), sliding=True)
    assert due is not None
    assert (due - claim.items[0].claimed_at).total_seconds() == pytest.approx(claim.wait_s)
    # In whole slots, or what is older would fall into others than it did.
    step = max(int(LENGTHS[period].total_seconds()) // 120, 1)
    await scene.age(int((claim.wait_s - 0.5) // step) * step)
    early = await scene.claim()
    assert (early.items, early.reason) == ([], "capacity")
    await scene.age(2 * step)
    assert len((await scene.claim()).items) == 1


async def calendar_limit_binds(scene: Scene, period: Period) -> None:
    # In one claim: between two of them a period could begin.
    claim = await scene.claim()
    assert len(claim.items) == 3
    assert (claim.reason, claim.waits_for) == ("capacity", await only_limit(scene))
    claimed_at = claim.items[0].claimed_at.astimezone(UTC)
    due = frees_at(period, claimed_at, sliding=False)
    assert await next_at(scene) == due
    if due is None:
        assert claim.wait_s is None
        await scene.age(10 * 366 * 86_400)
        assert (await scene.claim()).items == []
        return
    assert claim.wait_s is not None
    assert claim.wait_s == pytest.approx((due - claimed_at).total_seconds())
    # Before this period began; and the calendar, unlike what was claimed, does not move.
    begun = (
        due - LENGTHS[period]
        if period != "month"
        else claimed_at.replace(day=1, hour=0, minute=0, second=0, microsecond=0)
    )
    await scene.age(int((claimed_at - begun).total_seconds()) + 1)
    await scene.do(
        "update flows set waits_until = least(waits_until, clock_timestamp()) where workspace_id = %s",
        scene.workspace_id,
    )
    assert len((await scene.claim()).items) == 3


# Several limits ------------------------------------------------------------------------------------


async def test_all_limits_must_pass_and_the_tightest_binds(scene: Scene) -> None:
    """Nine scopes and kinds at once: whichever is made the tightest, so many are admitted."""
    scopes = {"connection": scene.connection_id, "resource": scene.resource_id}
    scopes["api_key"] = key = await scene.api_key(per_minute(50))
    for scope, scope_id in scopes.items():
        for kind in ("requests", "tokens"):
            for other in scopes.values():
                wide = Amount(period="hour", requests=50, tokens=5000)
                tight = Amount(
                    period="hour",
                    requests=4 if kind == "requests" else 50,
                    tokens=4 * 50 + 49 if kind == "tokens" else 5000,
                )
                await scene.set_limits(other, tight if other == scope_id else wide)
            batch = await scene.submit(6, api_key_id=key, amounts=[per_minute(6)])
            await scene.size(batch, [SIZE] * 6)
            claim = await scene.claim()
            assert len(claim.items) == 4, (scope, kind)
            [limit] = [u.limit_id for u in await scene.used(scope_id)]
            assert (claim.reason, claim.waits_for) == ("capacity", limit)
            await scene.settle(claim.items, Outcome.unsent)
            await scene.cancel(batch)
            await scene.mark(batch)


async def test_of_several_limits_the_last_to_free_is_waited_for(scene: Scene) -> None:
    await scene.set_limits(
        scene.resource_id, per_minute(2), Amount(period="hour", requests=2, sliding=True)
    )
    await scene.submit(3)
    claim = await scene.claim()
    assert len(claim.items) == 2
    [hour] = [u.limit_id for u in await scene.used(scene.resource_id) if u.period == "hour"]
    assert claim.waits_for == hour
    assert await next_at(scene) == frees_at("hour", claim.items[0].claimed_at, sliding=True)


@pytest.mark.parametrize(("own", "admitted"), [(3, 3), (5, 5), (9, 5)])
async def test_a_batch_limit_tightens_its_resources_and_never_widens_it(
    scene: Scene, own: int, admitted: int
) -> None:
    await scene.set_limits(scene.resource_id, per_minute(5))
    await scene.submit(20, amounts=[per_minute(own)])
    assert len((await scene.claim()).items) == admitted


async def test_an_item_is_clamped_to_the_limits_of_its_own(scene: Scene) -> None:
    batch = await scene.submit(2, amounts=[Amount(period="day", tokens=500, output_tokens=300)])
    await scene.size(batch, [(100, 1000), (300, 1000)])
    assert [(i.input_tokens, i.output_tokens) for i in (await scene.claim(1)).items] == [(100, 300)]


async def test_an_item_larger_than_a_limit_of_its_own_is_impossible(scene: Scene) -> None:
    batch = await scene.submit(2, amounts=[Amount(period="day", input_tokens=300)])
    await scene.size(batch, [(301, 10), (300, 10)])
    claim = await scene.claim()
    assert [(i.seq, i.impossible) for i in claim.items] == [(0, True), (1, False)]
    await scene.settle(claim.items[:1], Outcome.impossible)


# Limits that are shared ----------------------------------------------------------------------------


async def test_two_resources_on_one_connection_share_its_limit_exactly(scene: Scene) -> None:
    await scene.set_limits(scene.connection_id, per_minute(7))
    for resource in (0, 1):
        await scene.submit(10, resource=resource)
    taken = [len((await scene.claim(n, resource=r)).items) for n, r in ((2, 0), (3, 1), (9, 0))]
    assert taken == [2, 3, 2]
    assert (await scene.claim(resource=1)).items == []


async def test_two_sessions_share_a_connections_limit_exactly(scene: Scene) -> None:
    await scene.set_limits(scene.connection_id, per_minute(7))
    for resource in (0, 1):
        await scene.submit(10, resource=resource)
    async with scene.session() as one, scene.session() as two:
        assert len((await scene.claim(5, conn=one, resource=0)).items) == 5
        beside = await within(asyncio.create_task(scene.claim(conn=two, resource=1)))
        assert (beside.busy, beside.items) == (True, [])
        await two.commit()
        await one.commit()
        assert len((await scene.claim(conn=two, resource=1)).items) == 2
        await two.commit()


async def test_many_sessions_of_many_resources_take_a_shared_limit_exactly_once(
    world: Database,
) -> None:
    """A key on two connections: nobody but the key's own mutex stands between their claims."""
    scene = await Scene.make(world, resources=2)
    await scene.add_connection()
    key = await scene.api_key(per_minute(40))
    for resource in (0, 1, 2):
        await scene.submit(40, resource=resource, api_key_id=key)

    async def claimer(number: int) -> int:
        taken = 0
        while True:
            claim = await scene.claim(3, resource=number % 3)
            taken += len(claim.items)
            if not claim.busy and not claim.items:
                return taken

    assert sum(await asyncio.gather(*(claimer(n) for n in range(6)))) == 40
    await scene.check_books()


async def test_a_key_in_use_by_another_claim_is_left_out_and_others_are_served(
    scene: Scene,
) -> None:
    elsewhere = await scene.add_connection()
    key = await scene.api_key(per_minute(5))
    await scene.submit(5, api_key_id=key)
    await scene.submit(5, api_key_id=key, resource=elsewhere)
    free = await scene.submit(5, resource=elsewhere)
    async with scene.session() as one, scene.session() as two:
        assert len((await scene.claim(3, conn=one)).items) == 3
        beside = await within(asyncio.create_task(scene.claim(conn=two, resource=elsewhere)))
        assert (counted(beside), beside.busy) == ({free.batch_id: 5}, True)
        # The key's batch is still there to be taken.
        assert beside.wait_s == pytest.approx(0, abs=0.05)
        await two.commit()
        await one.commit()
    assert len((await scene.claim(resource=elsewhere)).items) == 2


async def test_a_keys_limit_is_shared_by_its_batches_on_different_resources(scene: Scene) -> None:
    key, other = await scene.api_key(per_minute(5)), await scene.api_key(per_minute(5))
    for resource in (0, 1, 1):
        await scene.submit(3, resource=resource, api_key_id=key)
    apart = await scene.submit(9, resource=1, api_key_id=other)
    assert len((await scene.claim(resource=0)).items) == 3
    taken = counted(await scene.claim(resource=1))
    assert taken.pop(apart.batch_id) == 5
    assert sum(taken.values()) == 2


async def test_a_batch_limit_is_shared_by_its_flows(scene: Scene) -> None:
    elsewhere = await scene.add_connection()
    await scene.submit(12, resources=[0, 1, elsewhere], amounts=[per_minute(6)])
    taken = [len((await scene.claim(resource=r)).items) for r in (0, 1, elsewhere)]
    assert taken == [4, 2, 0]


# Flows set aside -----------------------------------------------------------------------------------


async def test_a_batch_that_used_up_its_limit_delays_nobody(scene: Scene) -> None:
    await scene.set_limits(scene.resource_id, per_minute(20))
    limited = await scene.submit(50, priority=5, amounts=[per_minute(2)])
    free = await scene.submit(50)
    claim = await scene.claim(20)
    assert counted(claim) == {limited.batch_id: 2, free.batch_id: 18}


@pytest.mark.parametrize("priority", [0, 5])
async def test_a_hundred_batches_of_one_exhausted_key_delay_nobody(
    scene: Scene, priority: int
) -> None:
    """The ranking looks at 64 flows; all of the key's are ranked before the other's."""
    key = await scene.api_key(per_minute(1))
    for _ in range(100):
        await scene.submit(1, api_key_id=key, priority=priority)
    assert len((await scene.claim(1)).items) == 1
    late = await scene.submit(3)
    await scene.do("update flows set virtual_time = 1000 where batch_id = %s", late.batch_id)
    taken = Counter[UUID]()
    for looks in (1, 2):
        claim = await scene.claim()
        taken += counted(claim)
        if taken:
            break
        # Those beyond the first 64 are looked at without waiting.
        assert (looks, claim.wait_s) == (1, 0)
    assert taken == {late.batch_id: 3}
    after = await scene.claim()
    assert (after.items, after.reason) == ([], "capacity")
    assert after.waits_for == await only_limit(scene)


async def test_set_aside_batches_go_on_by_themselves_when_their_limit_frees(scene: Scene) -> None:
    key = await scene.api_key(per_minute(2))
    for _ in range(5):
        await scene.submit(1, api_key_id=key)
    assert len((await scene.claim()).items) == 2
    claim = await scene.claim()
    assert (claim.items, claim.reason) == ([], "capacity")
    assert claim.wait_s is not None
    await scene.age(int(claim.wait_s) - 1)
    assert (await scene.claim()).items == []
    await scene.age(2)
    assert len((await scene.claim()).items) == 2


@pytest.mark.parametrize("period", ["minute", "lifetime"])
async def test_set_aside_batches_go_on_at_a_refund(scene: Scene, period: Period) -> None:
    key = await scene.api_key(Amount(period=period, requests=2))
    first = await scene.submit(2, api_key_id=key)
    held = (await scene.claim()).items
    second = await scene.submit(2, api_key_id=key)
    elsewhere = await scene.submit(2, api_key_id=key, resource=1)
    for resource in (0, 1):
        assert (await scene.claim(resource=resource)).items == []
    settled = await scene.settle(held[:1], Outcome.unsent)
    assert [s.wakes for s in settled] == [True]
    for resource in (0, 1):
        assert await scene.due_in(resource) <= 0
    claim = await scene.claim(resource=1)
    assert counted(claim) == {elsewhere.batch_id: 1}
    # And so does what had come back itself.
    await scene.settle(claim.items, Outcome.unsent)
    await scene.cancel(second)
    await scene.mark(second)
    assert counted(await scene.claim()) == {first.batch_id: 1}


@pytest.mark.parametrize("scope", ["api_key", "batch", "value"])
async def test_set_aside_batches_go_on_when_their_limit_is_raised(scene: Scene, scope: str) -> None:
    amount = Amount(period="lifetime", requests=2)
    batch = await submit_below(scene, scope, amount, 9)
    assert len((await scene.claim()).items) == 2
    assert (await scene.claim()).items == []
    assert await scene.due_in() == float("inf")
    scope_id = {
        "api_key": batch.created_by_api_key_id,
        "batch": batch.batch_id,
        "value": scene.resource_id,
    }[scope]
    assert scope_id is not None
    dimension = "metadata:team" if scope == "value" else None
    rung = await scene.set_limits(scope_id, replace(amount, requests=5, dimension=dimension))
    assert scene.resource_id in rung
    assert await scene.due_in() <= 0
    assert len((await scene.claim()).items) == 3
    await scene.set_limits(scope_id)
    assert await scene.due_in() <= 0
    assert len((await scene.claim()).items) == 4


async def test_a_limit_raised_for_one_key_wakes_none_of_another(scene: Scene) -> None:
    keys = [await scene.api_key(per_minute(1)) for _ in range(2)]
    one, _other = [await scene.submit(3, api_key_id=key) for key in keys]
    assert len((await scene.claim()).items) == 2
    await scene.set_limits(keys[0], per_minute(2))
    assert counted(await scene.claim()) == {one.batch_id: 1}


@pytest.mark.parametrize("scope", ["connection", "model", "resource"])
async def test_a_raised_limit_of_a_resource_counts_at_once(scene: Scene, scope: str) -> None:
    await submit_below(scene, scope, Amount(period="lifetime", requests=2), 9)
    assert len((await scene.claim()).items) == 2
    scope_id = {
        "connection": scene.connection_id,
        "model": await scene.model_scope_id(),
        "resource": scene.resource_id,
    }[scope]
    assert scene.resource_id in await scene.set_limits(
        scope_id, Amount(period="lifetime", requests=3)
    )
    assert await scene.due_in() <= 0
    assert len((await scene.claim()).items) == 1


async def test_a_lowered_limit_counts_at_the_next_claim(scene: Scene) -> None:
    await scene.set_limits(scene.resource_id, per_minute(10))
    await scene.submit(20)
    assert len((await scene.claim(4)).items) == 4
    await scene.set_limits(scene.resource_id, per_minute(5))
    assert len((await scene.claim()).items) == 1
    await scene.set_limits(scene.resource_id, per_minute(3))
    await scene.age(62)
    assert len((await scene.claim()).items) == 3


# A wake-up beside the claim that sets a flow aside ------------------------------------------------------
#
# The claim has found a key's limit used up and is about to say until when its batch waits. Whoever gives
# back or adds room meanwhile sees no batch that waits yet.

Order = Literal["claim first", "wake-up first"]


async def wake_beside(
    scene: Scene, order: Order, key: UUID, held: list[Item], *, wakes: str, resource: int
) -> None:
    async def wake(conn: Connection) -> None:
        if wakes == "raise":
            await scene.set_limits(key, Amount(period="lifetime", requests=2), conn=conn)
        else:
            await scene.settle(held, Outcome.unsent, conn=conn)

    async with scene.session() as claiming, scene.session() as waking:
        if order == "claim first":
            assert (await scene.claim(conn=claiming, resource=resource)).items == []
            work = asyncio.create_task(wake(waking))
            await until_blocked(scene, waking, work)
            await claiming.commit()
            await within(work)
            await waking.commit()
        else:
            await wake(waking)
            claim = asyncio.create_task(scene.claim(conn=claiming, resource=resource))
            await until_blocked(scene, claiming, claim)
            await waking.commit()
            await within(claim)
            await claiming.commit()


@pytest.mark.parametrize("wakes", ["refund", "raise"])
@pytest.mark.parametrize("order", ["claim first", "wake-up first"])
@pytest.mark.parametrize("place", ["same resource", "sibling", "another connection"])
async def test_a_wake_up_beside_the_claim_that_sets_a_batch_aside_is_not_lost(
    scene: Scene, place: str, order: Order, wakes: str
) -> None:
    elsewhere = await scene.add_connection()
    resource = {"same resource": 0, "sibling": 1, "another connection": elsewhere}[place]
    key = await scene.api_key(Amount(period="lifetime", requests=1))
    await scene.submit(1, api_key_id=key)
    held = (await scene.claim()).items
    waiting = await scene.submit(1, api_key_id=key, resource=resource)
    await wake_beside(scene, order, key, held, wakes=wakes, resource=resource)
    assert await scene.due_in(resource) <= 0
    assert waiting.batch_id in counted(await scene.claim(1, resource=resource)) or (
        # In line behind the one that came back.
        place == "same resource"
        and wakes == "refund"
        and await scene.value(
            "select waits_until <= clock_timestamp() or waits_for is null from flows where batch_id = %s",
            waiting.batch_id,
        )
    )


@pytest.mark.parametrize("order", ["claim first", "wake-up first"])
async def test_a_refund_beside_the_claim_that_sets_the_same_batch_aside_is_not_lost(
    scene: Scene, order: Order
) -> None:
    batch = await scene.submit(2, amounts=[Amount(period="lifetime", requests=1)])
    held = (await scene.claim()).items
    await scene.do(
        "update flows set waits_until = '-infinity', waits_for = null where batch_id = %s",
        batch.batch_id,
    )
    await look_now(scene)
    await wake_beside(scene, order, batch.batch_id, held, wakes="refund", resource=0)
    assert await scene.due_in() <= 0
    assert len((await scene.claim()).items) == 1


# Dimensions ----------------------------------------------------------------------------------------


async def test_every_value_of_a_dimension_counts_apart(scene: Scene) -> None:
    await scene.set_limits(scene.resource_id, per_minute(3, dimension="metadata:team"))
    red, blue = [await scene.submit(9, metadata={"team": t}) for t in ("red", "blue")]
    again = await scene.submit(9, metadata={"team": "red"})
    taken = counted(await scene.claim())
    assert taken[blue.batch_id] == 3
    assert taken[red.batch_id] + taken[again.batch_id] == 3
    assert (await scene.claim()).items == []


async def test_batches_without_a_value_are_counted_together(scene: Scene) -> None:
    await scene.set_limits(scene.resource_id, per_minute(3, dimension="metadata:team"))
    for metadata in ({}, {"other": "red"}, {"team": None}):
        await scene.submit(2, metadata=metadata)
    with_one = await scene.submit(2, metadata={"team": "red"})
    taken = counted(await scene.claim())
    assert taken.pop(with_one.batch_id) == 2
    assert sum(taken.values()) == 3


async def test_addresses_of_clients_count_apart(scene: Scene) -> None:
    await scene.set_limits(scene.connection_id, per_minute(3, dimension="source-ip"))
    one = await scene.submit(9, source_ip="10.0.0.1")
    await scene.submit(9, source_ip="10.0.0.1", resource=1)
    two = await scene.submit(9, source_ip="10.0.0.2")
    assert counted(await scene.claim()) == {one.batch_id: 3, two.batch_id: 3}
    # The connection's limit is that of both its resources.
    assert (await scene.claim(resource=1)).items == []


async def test_a_keys_dimension_counts_its_own_batches_only(scene: Scene) -> None:
    keys = [await scene.api_key(per_minute(2, dimension="metadata:team")) for _ in range(2)]
    for key in keys:
        for team in ("red", "blue"):
            await scene.submit(9, api_key_id=key, metadata={"team": team})
    free = await scene.submit(3, metadata={"team": "red"})
    taken = counted(await scene.claim())
    assert taken.pop(free.batch_id) == 3
    assert list(taken.values()) == [2, 2, 2, 2]


async def test_changing_a_dimensions_limit_changes_that_of_every_value(scene: Scene) -> None:
    await scene.set_limits(scene.resource_id, per_minute(2, dimension="metadata:team"))
    red, blue = [await scene.submit(9, metadata={"team": t}) for t in ("red", "blue")]
    assert counted(await scene.claim()) == {red.batch_id: 2, blue.batch_id: 2}
    await scene.set_limits(scene.resource_id, per_minute(5, dimension="metadata:team"))
    assert counted(await scene.claim()) == {red.batch_id: 3, blue.batch_id: 3}
    await scene.set_limits(scene.resource_id)
    assert counted(await scene.claim()) == {red.batch_id: 4, blue.batch_id: 4}


async def test_a_dimension_limited_later_binds_batches_that_are_there(scene: Scene) -> None:
    red = await scene.submit(9, metadata={"team": "red"})
    assert len((await scene.claim(4)).items) == 4
    await scene.set_limits(scene.resource_id, per_minute(2, dimension="metadata:team"))
    assert counted(await scene.claim()) == {red.batch_id: 2}


# Calls at once -------------------------------------------------------------------------------------


async def bound_calls(
    scene: Scene, *, connection: int | None = None, resource: int | None = None
) -> None:
    await scene.do(
        "update connections set concurrency = %s where connection_id = %s",
        connection,
        scene.connection_id,
    )
    await scene.do(
        "update resources set concurrency = %s where resource_id = %s", resource, scene.resource_id
    )


async def test_never_more_calls_are_out_than_a_resource_or_its_connection_bear(
    scene: Scene,
) -> None:
    await bound_calls(scene, connection=5, resource=3)
    for resource in (0, 1):
        await scene.submit(10, resource=resource)
    first = await scene.claim()
    assert (len(first.items), first.reason, first.waits_for) == (
        3,
        "concurrency",
        scene.resource_id,
    )
    second = await scene.claim(resource=1)
    assert (len(second.items), second.reason, second.waits_for) == (
        2,
        "concurrency",
        scene.connection_id,
    )
    assert (await scene.claim()).items == []
    assert (await scene.claim(resource=1)).items == []


async def test_a_settled_call_makes_room_and_wakes_all_resources_of_the_connection(
    scene: Scene,
) -> None:
    await bound_calls(scene, connection=2)
    for resource in (0, 1):
        await scene.submit(10, resource=resource)
    held = (await scene.claim()).items
    assert (await scene.claim(resource=1)).reason == "concurrency"
    for resource in (0, 1):
        assert await scene.due_in(resource) > 50
    settled = await scene.settle(held[:1])
    assert [s.wakes for s in settled] == [True]
    for resource in (0, 1):
        assert await scene.due_in(resource) <= 0
    assert len((await scene.claim(resource=1)).items) == 1
    assert (await scene.claim()).items == []


async def test_a_reclaimed_call_makes_room_and_wakes(scene: Scene) -> None:
    await bound_calls(scene, connection=2)
    for resource in (0, 1):
        await scene.submit(2, resource=resource)
    held = (await scene.claim()).items
    assert (await scene.claim(resource=1)).items == []
    await scene.reclaim(held)
    for resource in (0, 1):
        assert await scene.due_in(resource) <= 0
    assert len((await scene.claim(resource=1)).items) == 2


async def test_two_sessions_never_have_more_calls_out_than_a_connection_bears(
    scene: Scene,
) -> None:
    await bound_calls(scene, connection=3)
    for resource in (0, 1):
        await scene.submit(10, resource=resource)
    async with scene.session() as one, scene.session() as two:
        held = (await scene.claim(2, conn=one)).items
        beside = await within(asyncio.create_task(scene.claim(conn=two, resource=1)))
        assert (beside.busy, beside.items) == (True, [])
        await two.commit()
        await one.commit()
        more = (await scene.claim(conn=two, resource=1)).items
        assert (len(held), len(more)) == (2, 1)
        await two.commit()


async def test_a_crowd_never_has_more_calls_out_than_allowed(world: Database) -> None:
    scene = await Scene.make(world, resources=2)
    await bound_calls(scene, connection=7, resource=4)
    batches = [await scene.submit(60, resources=[0, 1]) for _ in range(2)]
    seen = list[tuple[int, int]]()

    async def worker(seed: int) -> None:
        chance = random.Random(seed)  # noqa: S311 - a game
        while not (await scene.batch(batches[0].batch_id)).is_finished:
            claim = await scene.claim(chance.randint(1, 9), resource=chance.randrange(2))
            [(out, first)] = await scene.rows(
                "select count(*)::int, count(*) filter (where resource_id = %s)::int from items"
                " where workspace_id = %s and status = 'running'",
                scene.resource_id,
                scene.workspace_id,
            )
            seen.append((out, first))
            await scene.settle(claim.items, wait_s=0)

    async with asyncio.TaskGroup() as group:
        for seed in range(4):
            group.create_task(worker(seed))
    assert max(out for out, _ in seen) == 7
    assert max(first for _, first in seen) == 4
    await scene.check_books()


@pytest.mark.parametrize("order", ["claim first", "settlement first"])
async def test_a_settlement_beside_a_claim_without_room_is_not_lost(
    scene: Scene, order: str
) -> None:
    await bound_calls(scene, connection=1)
    for resource in (0, 1):
        await scene.submit(2, resource=resource)
    held = (await scene.claim()).items
    await look_now(scene)
    async with scene.session() as claiming, scene.session() as settling:
        if order == "claim first":
            assert (await scene.claim(conn=claiming, resource=1)).items == []
            settle = asyncio.create_task(scene.settle(held, conn=settling))
            await must_wait(scene, settling, settle)
            await claiming.commit()
            await within(settle)
            await settling.commit()
        else:
            await scene.settle(held, conn=settling)
            claim = asyncio.create_task(scene.claim(conn=claiming, resource=1))
            await must_wait(scene, claiming, claim)
            await settling.commit()
            await within(claim)
            await claiming.commit()
    assert await scene.due_in(1) <= 0
    assert len((await scene.claim(resource=1)).items) == 1


# Reservations --------------------------------------------------------------------------------------


async def teach(scene: Scene, outputs: Mapping[int, int]) -> None:
    """Answers of so many output tokens, so many of each, at most eight at a time."""
    for tokens, times in outputs.items():
        for first in range(0, times, 8):
            await scene.submit(min(8, times - first))
            await scene.settle((await scene.claim()).items, used=(10, tokens))


async def test_without_experience_the_bound_of_the_request_or_1024_is_reserved(
    scene: Scene,
) -> None:
    batch = await scene.submit(2)
    await scene.do(
        "update items set max_output_tokens = case when seq = 1 then 77 end where batch_id = %s",
        batch.batch_id,
    )
    assert [i.output_tokens for i in (await scene.claim()).items] == [1024, 77]


async def test_after_twenty_answers_what_nine_of_ten_had_is_reserved(scene: Scene) -> None:
    await teach(scene, {10: 17, 400: 2})
    batch = await scene.submit(1)
    assert [i.output_tokens for i in (await scene.claim()).items] == [1024]
    await scene.settle(await held(scene), used=(10, 10))
    # Twenty: eighteen of 10 and two of 400.
    await scene.submit(1)
    [item] = (await scene.claim()).items
    assert (item.output_tokens, item.expected_output_tokens) == (10, 10)
    await scene.settle([item], used=(10, 400))
    # Twenty-one, of which three: the nineteenth is one of them.
    batch = await scene.submit(2)
    await scene.do(
        "update items set max_output_tokens = case when seq = 1 then 77 end where batch_id = %s",
        batch.batch_id,
    )
    first, bounded = (await scene.claim()).items
    assert (first.output_tokens, bounded.output_tokens) == (400, 77)
    mean = (18 * 10 + 3 * 400) / 21
    assert (first.expected_output_tokens, bounded.expected_output_tokens) == (
        pytest.approx(mean, abs=1),
        pytest.approx(mean, abs=1),
    )


async def held(scene: Scene) -> list[Item]:
    async with scene.db.connection() as conn:
        return await queue.held_by(conn, worker_id=scene.worker_id)


async def test_reservations_fill_the_window_and_expectations_drive_the_pace(scene: Scene) -> None:
    await teach(scene, {10: 18, 410: 7})
    mean = (18 * 10 + 7 * 410) / 25
    await scene.set_limits(scene.resource_id, per_minute(tokens=6000))
    batch = await scene.submit(50)
    await scene.size(batch, [(10, 4000)] * 50)
    # The pace: 100 tokens a second, 30 at once. An item of 132 is a debt of 102 beyond that.
    claim = await scene.claim(burst_s=0.3)
    [item] = claim.items
    assert (item.output_tokens, item.expected_output_tokens) == (410, pytest.approx(mean, abs=0.5))
    assert (claim.reason, claim.waits_for) == ("pace", await only_limit(scene))
    slot_at = slot(item.claimed_at)
    expected = 10 + item.expected_output_tokens
    assert await next_at(scene) == pytest.approx(
        slot_at + timedelta(seconds=expected / 100 - 0.075), abs=timedelta(milliseconds=1)
    )
    # The window: by reservations of 420.
    assert len((await scene.claim(burst_s=60)).items) == 6000 // 420 - 1


def slot(at: datetime) -> datetime:
    """When the quarter second began."""
    return at.replace(microsecond=at.microsecond // 250_000 * 250_000)


@pytest.mark.parametrize("scope", ["resource", "batch"])
@pytest.mark.parametrize("size", [100, 130, 2000])
async def test_the_pace_of_tokens_admits_a_burst_and_one_item_and_then_its_rate(
    scene: Scene, size: int, scope: str
) -> None:
    """60,000 a minute are 1,000 a second; 0.3 s of it at once, of a batch's own limit 3 s."""
    burst = 300 if scope == "resource" else 3000
    batch = await submit_below(scene, scope, per_minute(tokens=60_000), 40)
    await scene.size(batch, [(size - 20, 20)] * 40)
    claim = await scene.claim(burst_s=0.3)
    taken = len(claim.items) * size
    left = float(burst)
    while left >= min(2 * size, 0.75 * burst):
        left -= size
    assert taken == burst - left
    if size != 2000:
        return
    assert claim.waits_for == await only_limit(scene)
    assert await next_at(scene) == pytest.approx(
        slot(claim.items[0].claimed_at) + timedelta(seconds=taken / 1000 - burst / 4000),
        abs=timedelta(milliseconds=1),
    )
    for second in range(1, 31):
        await scene.age(1)
        taken += len((await scene.claim(burst_s=0.3)).items) * size
        # A slot is a quarter second long, and the test itself takes some time.
        assert 1000 * second - size <= taken <= 1000 * (second + 1) + burst + size


async def test_the_pace_of_requests_spreads_a_limit_of_a_key(scene: Scene) -> None:
    key = await scene.api_key(per_minute(600))
    slow = await scene.submit(50, api_key_id=key)
    free = await scene.submit(50)
    # Ten a second, three seconds of it at once; whoever has no limit is not held up.
    assert counted(await scene.claim(burst_s=0.3)) == {slow.batch_id: 30, free.batch_id: 50}
    claim = await scene.claim(burst_s=0.3)
    assert claim.wait_s is not None
    assert claim.wait_s < 2


# What is charged -----------------------------------------------------------------------------------


@pytest.mark.parametrize("scope", SCOPES)
async def test_a_refused_call_is_charged_its_request_and_no_tokens(
    scene: Scene, scope: str
) -> None:
    await submit_below(scene, scope, Amount(period="hour", requests=4, tokens=500), 3)
    held = (await scene.claim()).items
    await scene.settle(held[:1], Outcome.throttled, wait_s=0)
    await scene.settle(held[1:2], used=(11, 7))
    [use] = [u for u in await scene.used(*await scopes_of(scene, held[0])) if u.source == "given"]
    assert (use.used_requests, use.used_input_tokens, use.used_output_tokens) == (3, 41, 27)
    await scene.check_books()
    await scene.reclaim(held[2:])
    await scene.check_books()
    await scene.settle(held[2:], Outcome.throttled, wait_s=0)
    [use] = [u for u in await scene.used(*await scopes_of(scene, held[0])) if u.source == "given"]
    assert (use.used_requests, use.used_input_tokens, use.used_output_tokens) == (3, 11, 7)


async def scopes_of(scene: Scene, item: Item) -> list[UUID]:
    return await scene.scope_ids(await scene.batch(item.batch_id))


# Shares --------------------------------------------------------------------------------------------


async def test_weights_of_one_and_three_share_tokens_one_to_three(scene: Scene) -> None:
    chance = random.Random(1)  # noqa: S311 - a game
    light, heavy = [await scene.submit(900, weight=w) for w in (1, 3)]
    for batch in (light, heavy):
        await scene.size(
            batch, [(chance.randint(1, 200), chance.randint(1, 200)) for _ in range(900)]
        )
    taken = list[Item]()
    for _ in range(250):
        taken += (await scene.claim(chance.randint(1, 5))).items
    ratio = tokens_of(taken, heavy) / tokens_of(taken, light)
    assert ratio == pytest.approx(3, rel=0.05)


async def test_lower_priorities_get_a_twentieth_and_all_when_the_higher_is_done(
    scene: Scene,
) -> None:
    chance = random.Random(2)  # noqa: S311 - a game
    high, low = await scene.submit(400, priority=5), await scene.submit(400)
    for batch in (high, low):
        await scene.size(
            batch, [(chance.randint(1, 100), chance.randint(1, 100)) for _ in range(400)]
        )
    taken = list[Item]()
    while sum(i.batch_id == high.batch_id for i in taken) < 395:
        taken += (await scene.claim(4)).items
        most_of_one_claim = 4 * 200
        assert tokens_of(taken, low) == pytest.approx(
            0.05 * tokens_of(taken, high), abs=200 + 0.05 * most_of_one_claim
        )
    assert {i.batch_id for i in (await scene.claim(100)).items[-80:]} == {low.batch_id}
    assert set(counted(await scene.claim(50))) == {low.batch_id}


async def test_no_credit_builds_up_while_nothing_lower_waits(scene: Scene) -> None:
    high = await scene.submit(500, priority=5)
    await scene.size(high, [SIZE] * 500)
    for _ in range(8):
        await scene.claim(50)
    low = await scene.submit(50)
    await scene.size(low, [SIZE] * 50)
    taken = Counter[UUID]()
    for _ in range(10):
        taken += counted(await scene.claim(4))
    assert taken[low.batch_id] <= 3
    assert taken[high.batch_id] >= 37


async def test_a_big_item_is_not_starved_by_small_ones(scene: Scene) -> None:
    await scene.set_limits(scene.resource_id, per_minute(tokens=1000))
    small = await scene.submit(100)
    await scene.size(small, [(50, 50)] * 100)
    assert len((await scene.claim()).items) == 10
    big = await scene.submit(1)
    await scene.size(big, [(500, 450)])
    small_before = 0
    for _ in range(20):
        await scene.age(10)
        taken = counted(await scene.claim())
        if taken[big.batch_id]:
            break
        small_before += taken[small.batch_id]
    else:
        pytest.fail("the big item was starved")
    # By its tokens it comes after nine or ten of the small batch.
    assert small_before <= 10


async def test_an_old_batch_is_not_starved_by_a_stream_of_new_ones(scene: Scene) -> None:
    old = await scene.submit(30)
    taken = 0
    for rounds in range(60):
        await scene.submit(3)
        taken += counted(await scene.claim(4))[old.batch_id]
        if taken == 30:
            break
        # Never far from one item in a round, its share beside one or two new batches at a time.
        assert taken >= rounds / 4
    assert taken == 30


# Deadlines -----------------------------------------------------------------------------------------


async def life(scene: Scene, batch: Batch, *, gone: float, left: float) -> None:
    """A batch so many seconds old, with so many to its deadline."""
    await scene.set_deadline(batch, left)
    await scene.do(
        "update flows set created_at = clock_timestamp() - make_interval(secs => %s) where batch_id = %s",
        gone,
        batch.batch_id,
    )


@pytest.mark.parametrize(("gone", "left", "times"), [(0, 1000, 1), (500, 500, 4), (9_990, 10, 100)])
async def test_urgency_raises_the_share_with_the_square_of_the_time_left(
    scene: Scene, gone: float, left: float, times: int
) -> None:
    usual, urgent = await scene.submit(300), await scene.submit(300)
    for batch in (usual, urgent):
        await scene.size(batch, [SIZE] * 300)
    await life(scene, urgent, gone=gone, left=left)
    taken = counted(await scene.claim(202))
    # The first sixteen of both count half.
    assert taken[urgent.batch_id] == pytest.approx(202 * times / (times + 1), abs=6)


async def test_what_an_urgent_batch_returns_is_credited_as_it_was_charged(scene: Scene) -> None:
    """Its share was raised, so its items cost it less; unsent ones must not earn it more."""
    usual, urgent = await scene.submit(300), await scene.submit(300)
    for batch in (usual, urgent):
        await scene.size(batch, [SIZE] * 300)
    await scene.claim(200)
    before = await scene.value(
        "select virtual_time from flows where batch_id = %s", urgent.batch_id
    )
    await life(scene, urgent, gone=500, left=500)
    items = [i for i in (await scene.claim(50)).items if i.batch_id == urgent.batch_id]
    assert len(items) >= 35
    await scene.settle(items, Outcome.unsent)
    after = await scene.value("select virtual_time from flows where batch_id = %s", urgent.batch_id)
    assert after == pytest.approx(before, rel=0.05)


async def test_nothing_is_claimed_after_the_deadline(scene: Scene) -> None:
    batch = await scene.submit(3, expires_in=3600)
    assert len((await scene.claim(1)).items) == 1
    await scene.set_deadline(batch, -1)
    other = await scene.submit(1)
    assert counted(await scene.claim()) == {other.batch_id: 1}
    assert (await scene.claim()).wait_s is None


async def test_an_expired_batch_ends_its_items_and_keeps_the_answers_in_flight(
    scene: Scene,
) -> None:
    batch = await scene.submit(6, expires_in=3600)
    await scene.settle((await scene.claim(1)).items)
    held = (await scene.claim(2)).items
    assert await scene.expire(batch) == 0
    await scene.set_deadline(batch, -1)
    async with scene.db.connection() as conn:
        assert batch.batch_id in {f.batch_id for f in await queue.expired(conn)}
    assert await scene.expire(batch) == 3
    state = await scene.batch(batch.batch_id)
    assert (state.completed, state.running, state.failed, state.pending) == (1, 2, 3, 0)
    assert state.expired_at is not None
    assert not state.is_finished
    items = await scene.items(batch)
    assert [i.status for i in items] == ["completed", *["running"] * 2, *["failed"] * 3]
    assert {(i.error_code, i.attempt) for i in items[3:]} == {("EXPIRED", 0)}
    assert await scene.rows(
        "select distinct ended_reason::text from items where batch_id = %s and status = 'failed'",
        batch.batch_id,
    ) == [("expired",)]
    await scene.check_books()
    # One call is answered and kept; the other failed, and would be tried again.
    await scene.settle(held[:1])
    await scene.settle(held[1:], Outcome.unreachable, wait_s=0)
    assert (await scene.claim()).items == []
    assert await scene.expire(batch) == 1
    assert await scene.expire(batch) == 0
    state = await scene.batch(batch.batch_id)
    assert (state.status, state.is_finished) == ("failed", True)
    assert (state.completed, state.failed) == (2, 4)
    assert [(e.kind, e.seq) for e in await scene.events(batch)][-4:] == [
        ("item-completed", 1),
        ("item-retrying", 2),
        ("item-failed", 2),
        ("batch-failed", None),
    ]


async def test_expiring_works_in_parts_and_on_every_resource(scene: Scene) -> None:
    batch = await scene.submit(10, resources=[0, 1], expires_in=3600)
    await scene.settle((await scene.claim(2)).items, Outcome.unreachable, wait_s=3600)
    await scene.set_deadline(batch, -1)
    ended = 0
    for resource in (0, 1):
        while some := await scene.expire(batch, resource=resource, most=1):
            ended += some
            await scene.check_books()
    assert ended == 10
    state = await scene.batch(batch.batch_id)
    assert (state.status, state.failed, state.is_finished) == ("failed", 10, True)
    async with scene.db.connection() as conn:
        assert batch.batch_id not in {f.batch_id for f in await queue.expired(conn)}


async def test_expired_items_can_be_redriven_after_a_new_deadline(scene: Scene) -> None:
    """Also those that were never begun, which below the floor nobody looks for."""
    batch = await scene.submit(4, expires_in=3600)
    await scene.settle((await scene.claim(1)).items, Outcome.unreachable, wait_s=0)
    await scene.set_deadline(batch, -1)
    assert await scene.expire(batch) == 4
    await scene.set_deadline(batch, 3600)
    assert (await scene.claim()).items == []
    assert await scene.redrive(batch) == 4
    assert await scene.due_in() <= 0
    claim = await scene.claim()
    assert sorted(i.seq for i in claim.items) == [0, 1, 2, 3]
    await scene.check_books()
    await scene.settle(claim.items)
    state = await scene.batch(batch.batch_id)
    assert (state.status, state.completed, state.failed) == ("completed", 4, 0)


async def test_expired_items_redriven_without_a_new_deadline_expire_again(scene: Scene) -> None:
    batch = await scene.submit(2, expires_in=-1)
    assert await scene.expire(batch) == 2
    assert await scene.redrive(batch) == 2
    assert (await scene.claim()).items == []
    assert await scene.expire(batch) == 2
    assert (await scene.batch(batch.batch_id)).is_finished


@pytest.mark.parametrize(
    "ends",
    [
        "commit",
        "rollback",
    ],
)
async def test_expiring_beside_a_claim_leaves_nothing_behind(scene: Scene, ends: str) -> None:
    """The claim was in time and holds the first items. Those that it gives up must expire later."""
    batch = await scene.submit(5, expires_in=2)
    async with scene.session() as claiming, scene.session() as expiring:
        taken = (await scene.claim(2, conn=claiming)).items
        assert len(taken) == 2
        await until_overdue(scene, batch)
        expire = asyncio.create_task(scene.expire(batch, conn=expiring))
        await must_wait(scene, expiring, expire)
        await (claiming.commit() if ends == "commit" else claiming.rollback())
        await within(expire)
        await expiring.commit()
    while await scene.expire(batch):
        pass
    if ends == "commit":
        await scene.settle(taken)
    state = await scene.batch(batch.batch_id)
    assert state.is_finished
    assert state.failed == (3 if ends == "commit" else 5)


async def until_overdue(scene: Scene, batch: Batch) -> None:
    async with asyncio.timeout(10):
        while not await scene.value(  # noqa: ASYNC110 - the event is the database's clock
            "select expires_at <= clock_timestamp() from flows where batch_id = %s", batch.batch_id
        ):
            await asyncio.sleep(0.01)


async def test_items_locked_while_others_expire_follow_later(scene: Scene) -> None:
    batch = await scene.submit(5, expires_in=-1)
    async with scene.session() as holder:
        await holder.execute(
            "select 1 from items where batch_id = %s and seq in (0, 2) for no key update",
            (batch.batch_id,),
        )
        assert await scene.expire(batch) == 3
        await holder.rollback()
    assert await scene.expire(batch) == 2
    assert (await scene.batch(batch.batch_id)).is_finished


@pytest.mark.parametrize("first", ["cancel", "expire"])
async def test_of_a_cancel_and_an_expiry_one_wins(scene: Scene, first: str) -> None:
    batch = await scene.submit(4, expires_in=-1)
    async with scene.session() as one, scene.session() as two:
        if first == "cancel":
            await scene.cancel(batch, conn=one)
            expire = asyncio.create_task(scene.expire(batch, conn=two))
            await must_wait(scene, two, expire)
            await one.commit()
            with pytest.raises(psycopg.Error) as crossed:
                await within(expire)
            assert crossed.value.sqlstate == "SLCLO"
            await two.rollback()
        else:
            assert await scene.expire(batch, conn=one) == 4
            cancel = asyncio.create_task(scene.cancel(batch, conn=two))
            await must_wait(scene, two, cancel)
            await one.commit()
            assert await within(cancel) == "failed"
            await two.commit()
    await scene.mark(batch)
    state = await scene.batch(batch.batch_id)
    assert state.is_finished
    assert (state.cancelled, state.failed) == ((4, 0) if first == "cancel" else (0, 4))


@pytest.mark.parametrize("answer", [Outcome.answered, Outcome.unreachable])
@pytest.mark.parametrize("first", ["settle", "expire"])
async def test_expiring_beside_a_settlement_loses_nothing(
    scene: Scene, first: str, answer: Outcome
) -> None:
    batch = await scene.submit(3, expires_in=3600)
    held = (await scene.claim(1)).items
    await scene.set_deadline(batch, -1)
    async with scene.session() as one, scene.session() as two:

        def settle(conn: Connection) -> "asyncio.Future[Any]":
            return asyncio.ensure_future(scene.settle(held, answer, conn=conn, wait_s=0))

        def expire(conn: Connection) -> "asyncio.Future[Any]":
            return asyncio.ensure_future(scene.expire(batch, conn=conn))

        before, after = (settle, expire) if first == "settle" else (expire, settle)
        await before(one)
        waiting = after(two)
        await must_wait(scene, two, waiting)
        await one.commit()
        await within(waiting)
        await two.commit()
    while await scene.expire(batch):
        pass
    state = await scene.batch(batch.batch_id)
    assert state.is_finished
    answered = answer is Outcome.answered
    assert (state.completed, state.failed) == ((1, 2) if answered else (0, 3))


@pytest.mark.parametrize(
    "deadline",
    [
        pytest.param(3600, id="later"),
        pytest.param(None, id="none"),
    ],
)
async def test_a_deadline_moved_beside_an_expiry_stands(
    scene: Scene, deadline: float | None
) -> None:
    batch = await scene.submit(4, expires_in=-1)
    async with scene.session() as prolonging, scene.session() as expiring:
        await scene.set_deadline(batch, deadline, conn=prolonging)
        expire = asyncio.create_task(scene.expire(batch, conn=expiring))
        await must_wait(scene, expiring, expire)
        await prolonging.commit()
        with pytest.raises(psycopg.Error) as crossed:
            await within(expire)
        assert crossed.value.sqlstate == "SLCLO"
        await expiring.rollback()
    assert await scene.due_in() <= 0
    assert len((await scene.claim()).items) == 4


async def test_a_deadline_prolonged_after_an_expiry_has_begun_waits_for_it(scene: Scene) -> None:
    batch = await scene.submit(4, expires_in=-1)
    async with scene.session() as expiring, scene.session() as prolonging:
        assert await scene.expire(batch, conn=expiring, most=2) == 2
        prolong = asyncio.create_task(scene.set_deadline(batch, 3600, conn=prolonging))
        await must_wait(scene, prolonging, prolong)
        await expiring.commit()
        await within(prolong)
        await prolonging.commit()
    assert sorted(i.seq for i in (await scene.claim()).items) == [2, 3]


# The slow start ------------------------------------------------------------------------------------


async def test_a_model_without_a_known_limit_begins_with_a_few_calls_and_doubles(
    scene: Scene,
) -> None:
    for resource in (0, 1):
        await scene.submit(100, resource=resource)
    for calls in (4, 8, 16, 32):
        # The resources are of one model.
        claim = await scene.claim(calls - 1, slow_start=4)
        beside = await scene.claim(resource=1, slow_start=4)
        assert (len(claim.items), len(beside.items)) == (calls - 1, 1)
        assert (beside.reason, beside.waits_for) == ("concurrency", await scene.model_scope_id())
        settled = await scene.settle(claim.items)
        assert settled[0].wakes
        await scene.settle(beside.items)


@pytest.mark.parametrize("scope", ["connection", "model", "resource"])
async def test_there_is_no_slow_start_where_a_limit_is_known(scene: Scene, scope: str) -> None:
    await submit_below(scene, scope, per_minute(50), 60)
    assert len((await scene.claim(slow_start=4)).items) == 50


async def test_another_model_has_a_slow_start_of_its_own(scene: Scene) -> None:
    other = await scene.add_resource(model="another")
    for resource in (0, other):
        await scene.submit(20, resource=resource)
    assert len((await scene.claim(slow_start=4)).items) == 4
    assert len((await scene.claim(slow_start=4, resource=other)).items) == 4
    assert (await scene.claim(slow_start=4, resource=1)).items == []
