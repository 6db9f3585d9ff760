"""Fallback models: an item that one model cannot answer is asked of the next, and the books stay right."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from uuid import UUID

import psycopg
import pytest

from app import connections, queue, resources
from app.batches import Batch
from app.capacity import Amount
from app.queue import Item, Outcome
from app.resources import FALLBACK_ON, Choices, ModelAt
from tests.scene import Scene, until_blocked
from tests.test_worker import bodies, ended, simulator, working


@pytest.fixture
async def scene(database: str) -> AsyncIterator[Scene]:
    """A resource with two fallbacks, each on a connection of its own: numbers 0, 1 and 2."""
    async with Scene.open(database) as made:
        await give_fallbacks(made, 2)
        yield made


async def give_fallbacks(scene: Scene, number: int, **on: object) -> None:
    """``on``: conditions other than the usual ones."""
    models: list[ModelAt] = []
    async with scene.db.transaction() as conn:
        for n in range(1, number + 1):
            found = await connections.named(
                conn,
                workspace_id=scene.workspace_id,
                environment_id=scene.environment_id,
                name=f"spare{n}",
            )
            connection_id = found.connection_id if found else await spare(scene, conn, n)
            models.append(ModelAt(model=f"model-{n}", connection_id=connection_id))
    async with scene.db.transaction() as conn:
        held = await held_resource(scene, conn)
        await resources.lock(
            conn,
            workspace_id=scene.workspace_id,
            resource_id=scene.resource_id,
            connection_ids=[m.connection_id for m in models],
        )
        await resources.change(
            conn,
            held=held,
            to=held,
            choices=Choices(fallbacks=models, fallback_on={**FALLBACK_ON, **on}),
        )
        changed = await held_resource(scene, conn)
    del scene.resource_ids[1:]
    scene.resource_ids += changed.fallback_ids


async def spare(scene: Scene, conn: psycopg.AsyncConnection, number: int) -> UUID:
    return await connections.create(
        conn,
        keyring=scene.keyring,
        workspace_id=scene.workspace_id,
        environment_id=scene.environment_id,
        name=f"spare{number}",
        provider="openai-compatible",
        base_url="http://127.0.0.1:9/v1",
        secret=None,
        timeout_ms=30_000,
        amounts=[Amount(period="minute", requests=1000)],
    )


async def held_resource(scene: Scene, conn: psycopg.AsyncConnection) -> resources.Resource:
    found = await resources.get(
        conn,
        workspace_id=scene.workspace_id,
        environment_id=scene.environment_id,
        resource_id=scene.resource_id,
    )
    assert found is not None
    return found


async def refuse(scene: Scene, items: Sequence[Item], status: int) -> None:
    """Final refusals with a provider's status."""
    async with scene.db.transaction() as conn:
        settlements = [
            queue.Settlement(
                batch_day=item.batch_day,
                batch_id=item.batch_id,
                resource_id=item.resource_id,
                connection_id=scene.connection_id,
                seq=item.seq,
                attempt=item.attempt,
                outcome=Outcome.rejected,
                claimed_at=item.claimed_at,
                limit_ids=item.limit_ids,
                reserved_input_tokens=item.input_tokens,
                reserved_output_tokens=item.output_tokens,
                expected_output_tokens=item.expected_output_tokens,
                refund=False,
                status_code=status,
                error_code="as_the_test_wishes",
            )
            for item in items
        ]
        await queue.settle(
            conn,
            workspace_id=scene.workspace_id,
            worker_id=scene.worker_id,
            settlements=settlements,
            bodies=[None] * len(items),
        )


async def totals(scene: Scene, batch: Batch) -> list[int]:
    """Items per model, in the order of the models."""
    rows = await scene.rows(
        "select resource_id, total from flows where batch_id = %s", batch.batch_id
    )
    found = dict(rows)
    return [found.get(each, 0) for each in scene.resource_ids]


async def test_what_is_refused_for_good_is_asked_of_the_next(scene: Scene) -> None:
    batch = await scene.submit(10)
    assert await totals(scene, batch) == [10, 0, 0]
    taken = (await scene.claim(4)).items
    await refuse(scene, taken, 401)
    await scene.check_books()
    assert await totals(scene, batch) == [6, 4, 0]
    assert await scene.due_in(1) <= 0
    moved = (await scene.claim(resource=1)).items
    assert [item.seq for item in moved] == [item.seq for item in taken]
    await refuse(scene, moved[:2], 404)
    await scene.settle(moved[2:])
    last = (await scene.claim(resource=2)).items
    await refuse(scene, last[:1], 403)  # there is no further model: it fails
    await scene.settle(last[1:])
    await scene.settle((await scene.claim(10)).items)
    await scene.check_books()
    ended = await scene.batch(batch.batch_id)
    assert (ended.status, ended.completed, ended.failed, ended.total_items) == ("failed", 9, 1, 10)
    kinds = [event.kind for event in await scene.events(batch)]
    assert kinds.count("item-retrying") == 4 + 2
    attempts = await scene.rows(
        "select resource_id from attempts where batch_id = %s and seq = %s order by attempt",
        batch.batch_id,
        last[0].seq,
    )
    assert [a for (a,) in attempts] == scene.resource_ids
    # What people asked of is what they see.
    assert {i.resource_id for i in await scene.items(batch)} == {scene.resource_id}


@pytest.mark.parametrize("status", [400, 413, 422])
async def test_the_callers_own_mistake_is_not_passed_on(scene: Scene, status: int) -> None:
    batch = await scene.submit(2)
    await refuse(scene, (await scene.claim()).items, status)
    assert await totals(scene, batch) == [2, 0, 0]
    assert (await scene.batch(batch.batch_id)).failed == 2
    await scene.check_books()


async def test_failures_are_tried_again_before_the_next_model_is(scene: Scene) -> None:
    batch = await scene.submit(1, max_attempts=2)
    await scene.settle((await scene.claim()).items, Outcome.unreachable, wait_s=0)
    assert await totals(scene, batch) == [1, 0, 0]
    await scene.settle((await scene.claim()).items, Outcome.unreachable, wait_s=60)
    assert await totals(scene, batch) == [0, 1, 0]
    (item,) = (await scene.claim(resource=1)).items  # at once: the wait was the other model's
    assert (item.failures, item.attempt) == (0, 3)
    await scene.settle([item])
    await scene.check_books()
    assert (await scene.batch(batch.batch_id)).status == "completed"


async def test_a_long_rest_moves_what_was_refused_if_it_is_wished(scene: Scene) -> None:
    batch = await scene.submit(1)
    await scene.settle((await scene.claim()).items, Outcome.throttled, wait_s=3600)
    assert await totals(scene, batch) == [1, 0, 0]
    await give_fallbacks(scene, 2, throttledMs=60_000)
    await scene.calm()
    again = await scene.submit(1)
    for wait_s, expected in ((30, [1, 0, 0]), (90, [0, 1, 0])):
        await scene.do("update items set visible_at = now() where batch_id = %s", again.batch_id)
        await scene.do("update ready set next_at = now()")
        items = [i for i in (await scene.claim()).items if i.batch_id == again.batch_id]
        await scene.settle(items, Outcome.throttled, wait_s=wait_s)
        assert await totals(scene, again) == expected
        await scene.calm()
    await scene.check_books()


async def test_fallbacks_that_are_off_or_came_later_are_not_taken(scene: Scene) -> None:
    batch = await scene.submit(1)
    await give_fallbacks(scene, 3)
    for expected in ([0, 1, 0, 0], [0, 0, 1, 0]):
        items = [i for n in range(3) for i in (await scene.claim(resource=n)).items]
        await refuse(scene, items, 401)
        assert await totals(scene, batch) == expected
    await refuse(scene, (await scene.claim(resource=2)).items, 401)
    assert (await scene.batch(batch.batch_id)).failed == 1  # the third it did not know
    await scene.do("update resources set use_fallback = false where owner_id is null")
    off = await scene.submit(1)
    await refuse(scene, (await scene.claim()).items, 401)
    assert (await scene.batch(off.batch_id)).failed == 1
    await scene.check_books()


async def test_a_late_answer_of_a_model_that_was_left_counts_where_the_item_is(
    scene: Scene,
) -> None:
    batch = await scene.submit(1)
    (first,) = (await scene.claim()).items
    await scene.reclaim([first])
    await refuse(scene, (await scene.claim()).items, 401)
    (third,) = (await scene.claim(resource=1)).items
    await scene.settle([first], used=(7, 9))
    await scene.check_books()
    ended = await scene.batch(batch.batch_id)
    assert (ended.status, ended.input_tokens, ended.output_tokens) == ("completed", 7, 9)
    await scene.settle([third])
    await scene.check_books()


async def test_what_moves_in_a_cancelled_batch_is_cancelled_with_it(scene: Scene) -> None:
    batch = await scene.submit(3)
    taken = (await scene.claim(2)).items
    await scene.cancel(batch)
    await refuse(scene, taken, 401)
    await scene.check_books()
    while await scene.mark(batch):
        pass
    await scene.check_books()
    ended = await scene.batch(batch.batch_id)
    assert (ended.status, ended.cancelled, ended.is_finished) == ("cancelled", 3, True)


async def test_a_paused_batch_moves_and_stays_paused(scene: Scene) -> None:
    batch = await scene.submit(1)
    taken = (await scene.claim()).items
    await scene.do("update flows set is_paused = true where batch_id = %s", batch.batch_id)
    await refuse(scene, taken, 401)
    assert await totals(scene, batch) == [0, 1, 0]
    assert (await scene.claim(resource=1)).items == []


async def test_settling_moves_and_cancels_do_not_deadlock(scene: Scene) -> None:
    """Two settlements that move items both ways of the order of flows, and a cancel between."""
    batch = await scene.submit(4)
    one, two, *rest = (await scene.claim()).items
    await refuse(scene, [two], 401)
    (moved,) = (await scene.claim(resource=1)).items
    async with scene.session() as first, scene.session() as second:
        await scene.settle([one], conn=first)
        cancelling = asyncio.create_task(scene.cancel(batch, conn=second))
        assert await until_blocked(scene, second, cancelling)
        refusing = asyncio.create_task(refuse(scene, [moved], 401))
        await asyncio.sleep(0.05)
        await first.commit()
        assert await cancelling == "cancelled"
        await second.commit()
        await refusing
    await scene.settle(rest)
    while await scene.mark(batch):
        pass
    await scene.check_books()
    assert (await scene.batch(batch.batch_id)).is_finished


async def test_a_fallback_is_bound_by_its_own_connection(scene: Scene) -> None:
    """Its limits, not those of the connection that could not answer."""
    await scene.submit(2)
    await refuse(scene, (await scene.claim()).items, 401)
    spare_id = await scene.value(
        "select connection_id from resources where resource_id = %s", scene.resource_ids[1]
    )
    await scene.limit(requests=1, scope_id=spare_id)
    assert len((await scene.claim(resource=1)).items) == 1
    await scene.check_books()


async def test_workers_ask_the_next_model_and_the_books_balance(database: str) -> None:
    """A key that the first provider refuses, a second that fails for good, a third with Anthropic's words."""
    async with (
        simulator(require_key="sk-other") as (_, refusing),
        simulator(error_rate=1.0) as (_, failing),
        simulator() as (provider, answering),
        Scene.open(database, base_url=refusing) as scene,
    ):
        await give_fallbacks(scene, 2)
        for name, kind, url in (
            ("spare1", "openai-compatible", failing),
            ("spare2", "anthropic", answering),
        ):
            await scene.do(
                "update connections set provider = %s, base_url = %s where name = %s",
                kind,
                url,
                name,
            )
        batch = await scene.submit(bodies(20), max_attempts=2)
        async with working(scene, database):
            batch = await ended(scene, batch)
        assert (batch.status, batch.completed, batch.total_items) == ("completed", 20, 20)
        assert await totals(scene, batch) == [0, 0, 20]
        assert provider.report()["answered"] == 20
        rows = await scene.rows(
            "select r.model, a.outcome::text, count(*) from attempts a"
            " join resources r using (workspace_id, resource_id) group by 1, 2 order by 1, 2"
        )
        assert rows == [
            ("gpt-4o-mini", "rejected", 20),
            ("model-1", "unreachable", 40),
            ("model-2", "answered", 20),
        ]
        await scene.check_books()


async def test_a_model_that_is_no_longer_allowed_is_not_called(database: str) -> None:
    async with simulator() as (provider, url), Scene.open(database, base_url=url) as scene:
        await scene.do("update connections set allowed_models = '{other}'")
        batch = await scene.submit(2)
        async with working(scene, database):
            batch = await ended(scene, batch)
        assert (batch.status, provider.report()["received"]) == ("failed", 0)
        assert {item.error_code for item in await scene.items(batch)} == {"MODEL_NOT_ALLOWED"}
        await scene.check_books()
