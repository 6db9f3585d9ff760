"""What each verb of the queue means. Two sessions at once are in test_concurrency.py.

After every test that uses ``scene`` the books are recounted: counters, ledger, events.
"""

from collections import Counter
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import pytest

from app import queue
from app.db import Database
from app.ids import uuid7
from app.queue import Item, Lapsed, Outcome
from tests.conftest import cloned
from tests.scene import Scene

LONG_AGO = datetime(2020, 1, 1, tzinfo=UTC)


@pytest.fixture(scope="module")
async def world(cluster: str, template: str) -> AsyncIterator[Database]:
    """One database for this file, whose sessions know the functions; a tenant for every test."""
    with cloned(cluster, template) as url:
        async with Database(url, size=6) as db:
            yield db


@pytest.fixture
async def scene(world: Database) -> AsyncIterator[Scene]:
    scene = await Scene.make(world)
    yield scene
    await scene.check_books()


def seqs(items: list[Item]) -> list[int]:
    return [item.seq for item in items]


async def row(scene: Scene, item: Item) -> dict[str, Any]:
    """An item's row."""
    return await scene.value(
        "select to_jsonb(i) from items i where batch_id = %s and seq = %s", item.batch_id, item.seq
    )


async def attempts(scene: Scene, item: Item) -> list[tuple[int, str, int, int, int]]:
    """An item's attempts: number, outcome, and what they were charged."""
    return await scene.rows(
        "select attempt, outcome::text, charged_requests, charged_input_tokens,"
        " charged_output_tokens from attempts where batch_id = %s and seq = %s order by attempt",
        item.batch_id,
        item.seq,
    )


async def used(scene: Scene) -> dict[UUID, tuple[int, int, int]]:
    """Requests, input and output tokens in the ledger, by scope."""
    return {
        scope: (requests, input_tokens, output_tokens)
        for scope, requests, input_tokens, output_tokens in await scene.rows(
            "select scope_id, sum(g.requests)::int, sum(g.input_tokens)::int, sum(g.output_tokens)::int"
            " from ledger g join limits l using (workspace_id, limit_id)"
            " where workspace_id = %s and source = 'given' group by 1",
            scene.workspace_id,
        )
    }


# Claim -------------------------------------------------------------------------------------------


async def test_claim_takes_items_in_input_order_and_no_more_than_wanted(scene: Scene) -> None:
    await scene.submit(10)
    assert seqs((await scene.claim(4)).items) == [0, 1, 2, 3]
    assert seqs((await scene.claim(100)).items) == [4, 5, 6, 7, 8, 9]
    assert (await scene.claim(100)).items == []


async def test_claim_gives_a_lease_a_number_and_a_reservation(scene: Scene) -> None:
    await scene.limit(requests=100)
    await scene.limit(requests=50, scope_id=scene.connection_id)
    batch = await scene.submit(3)
    await scene.size(batch, [(11, 7), (12, 8)])
    claim = await scene.claim(2)
    for item, sizes in zip(claim.items, [(11, 7), (12, 8)], strict=True):
        state = await row(scene, item)
        assert (state["status"], state["attempt"], item.attempt) == ("running", 1, 1)
        assert state["worker_id"] == str(scene.worker_id)
        # The connection's timeout of 30 s and the grace of 60 s.
        lease = datetime.fromisoformat(state["visible_at"]) - item.claimed_at
        assert lease == timedelta(seconds=90)
        assert (state["reserved_input_tokens"], state["reserved_output_tokens"]) == sizes
        assert {str(i) for i in item.limit_ids} == set(state["reserved_limits"])
        # Of the resource, of the connection, and the account of its model.
        assert len(item.limit_ids) == 3
    assert await used(scene) == {
        scene.resource_id: (2, 23, 15),
        scene.connection_id: (2, 23, 15),
    }
    progress = await scene.batch(batch.batch_id)
    assert (progress.status, progress.pending, progress.running) == ("running", 1, 2)
    assert progress.started_at is not None


async def test_an_item_without_a_bound_reserves_1024_tokens_of_output(scene: Scene) -> None:
    await scene.submit(1)
    assert [i.output_tokens for i in (await scene.claim()).items] == [1024]


async def test_a_limit_gives_exactly_its_requests_and_says_when_the_next_are_free(
    scene: Scene,
) -> None:
    await scene.limit(requests=3)
    await scene.submit(10)
    claim = await scene.claim()
    assert len(claim.items) == 3
    again = await scene.claim()
    assert again.items == []
    assert again.wait_s is not None
    # 60 s after the end of the half second that they were claimed in, and the guard of 1 s.
    assert 61 - 0.5 < again.wait_s <= 61.5
    assert await scene.due_in() == pytest.approx(again.wait_s, abs=0.5)


async def test_capacity_returns_a_period_and_a_guard_later(scene: Scene) -> None:
    await scene.limit(requests=3)
    await scene.submit(10)
    await scene.claim()
    await scene.age(60)
    assert (await scene.claim()).items == []
    await scene.age(2)
    assert len((await scene.claim()).items) == 3


async def test_the_guard_is_the_callers(scene: Scene) -> None:
    await scene.limit(requests=1)
    await scene.submit(3)
    await scene.claim()
    await scene.age(65)
    assert len((await scene.claim(guard_s=10)).items) == 0
    assert len((await scene.claim(guard_s=1)).items) == 1


async def test_a_head_item_that_does_not_fit_is_not_overtaken_by_smaller_ones(
    scene: Scene,
) -> None:
    await scene.limit(tokens=1000)
    batch = await scene.submit(3)
    await scene.size(batch, [(400, 100), (500, 100), (10, 10)])
    claim = await scene.claim()
    assert seqs(claim.items) == [0]
    assert claim.wait_s is not None
    assert claim.wait_s > 60
    assert (await scene.claim()).items == []
    await scene.age(62)
    assert seqs((await scene.claim()).items) == [1, 2]


async def test_a_wait_for_tokens_ends_when_enough_slots_have_aged(scene: Scene) -> None:
    await scene.limit(tokens=1000)
    batch = await scene.submit(3)
    await scene.size(batch, [(200, 100), (400, 100), (300, 100)])
    assert seqs((await scene.claim(1)).items) == [0]
    await scene.age(40)
    claim = await scene.claim(3)
    assert seqs(claim.items) == [1]
    # Used 300 + 500; the head wants 400: the older 300 suffice.
    assert claim.wait_s == pytest.approx(21.25, abs=1)
    await scene.size(batch, [(200, 100), (400, 100), (900, 100)])
    # Now it wants all 1,000: both must have aged.
    assert (await scene.claim(3)).wait_s == pytest.approx(61.25, abs=1)


async def test_the_strictest_limit_decides_and_the_last_to_free(scene: Scene) -> None:
    await scene.limit(requests=5, tokens=1000)
    await scene.limit(requests=2, scope_id=scene.connection_id)
    batch = await scene.submit(5)
    await scene.size(batch, [(100, 100)] * 5)
    assert len((await scene.claim()).items) == 2
    await scene.age(62)
    assert len((await scene.claim()).items) == 2


async def test_resources_share_their_connections_limit(world: Database) -> None:
    scene = await Scene.make(world, resources=2, connection_rpm=5)
    await scene.submit(4, resource=0)
    await scene.submit(4, resource=1)
    assert len((await scene.claim(resource=0)).items) == 4
    assert len((await scene.claim(resource=1)).items) == 1
    assert {scope: use[0] for scope, use in (await used(scene)).items()} == {scene.connection_id: 5}


async def test_a_calendar_limit_frees_at_midnight_utc(scene: Scene) -> None:
    await scene.do(
        "insert into limits (workspace_id, limit_id, scope_id, period, sliding, requests)"
        " values (%s, %s, %s, 'day', false, 2)",
        scene.workspace_id,
        uuid7(),
        scene.resource_id,
    )
    await scene.submit(3)
    assert len((await scene.claim()).items) == 2
    wait_s = (await scene.claim()).wait_s
    midnight = await scene.value(
        "select extract(epoch from date_trunc('day', now(), 'UTC') + interval '1 day' - now())"
    )
    assert wait_s == pytest.approx(float(midnight), abs=2)


async def test_a_lifetime_limit_never_frees(scene: Scene) -> None:
    await scene.do(
        "insert into limits (workspace_id, limit_id, scope_id, period, sliding, requests)"
        " values (%s, %s, %s, 'lifetime', false, 2)",
        scene.workspace_id,
        uuid7(),
        scene.resource_id,
    )
    await scene.submit(3)
    assert len((await scene.claim()).items) == 2
    assert (await scene.claim()).wait_s is None
    assert await scene.due_in() == float("inf")


async def test_the_output_of_an_item_is_clamped_to_what_the_limit_leaves(scene: Scene) -> None:
    await scene.limit(tokens=500)
    batch = await scene.submit(1)
    await scene.size(batch, [(100, 100_000)])
    assert [(i.input_tokens, i.output_tokens) for i in (await scene.claim()).items] == [(100, 400)]


async def test_a_prompt_beyond_a_limit_lowered_later_is_impossible_and_costs_nothing(
    scene: Scene,
) -> None:
    await scene.limit(tokens=500)
    batch = await scene.submit(2)
    await scene.size(batch, [(400, 10), (100, 10)])
    await scene.limit(tokens=300)
    claim = await scene.claim()
    assert [(i.seq, i.impossible, i.limit_ids == ()) for i in claim.items] == [
        (0, True, True),
        (1, False, False),
    ]
    assert (await used(scene))[scene.resource_id] == (1, 100, 10)
    [settled] = await scene.settle(claim.items[:1], Outcome.impossible)
    assert settled.becomes == "failed"
    assert await attempts(scene, claim.items[0]) == []
    assert (await row(scene, claim.items[0]))["ended_reason"] == "impossible"
    await scene.settle(claim.items[1:])
    assert (await scene.batch(batch.batch_id)).status == "failed"


async def test_a_claim_of_an_unknown_resource_is_empty(scene: Scene) -> None:
    scene.resource_ids.append(uuid7())
    claim = await scene.claim(resource=1)
    assert (claim.items, claim.wait_s, claim.config_at) == ([], None, None)


# Whose turn it is ----------------------------------------------------------------------------------


async def test_a_small_batch_beside_a_huge_one_is_served_at_once(scene: Scene) -> None:
    huge = await scene.submit(5000)
    for _ in range(3):
        await scene.claim(200)
    small = await scene.submit(10)
    claim = await scene.claim(40)
    taken = Counter(item.batch_id for item in claim.items)
    assert taken == {small.batch_id: 10, huge.batch_id: 30}


async def test_equal_batches_share_equally_and_weights_count(scene: Scene) -> None:
    one, two, heavy = [await scene.submit(300) for _ in range(3)]
    await scene.do("update flows set weight = 3 where batch_id = %s", heavy.batch_id)
    taken = Counter[UUID]()
    for _ in range(10):
        taken += Counter(item.batch_id for item in (await scene.claim(25)).items)
    # The first sixteen of each count half: eight items less of the others, in the proportion of weights.
    assert taken[one.batch_id] == pytest.approx(53, abs=2)
    assert taken[two.batch_id] == pytest.approx(53, abs=2)
    assert taken[heavy.batch_id] == pytest.approx(144, abs=4)


async def test_fairness_counts_tokens_not_items(scene: Scene) -> None:
    long, short = await scene.submit(300), await scene.submit(300)
    await scene.size(long, [(900, 100)] * 300)
    await scene.size(short, [(90, 10)] * 300)
    await scene.claim(200)  # the first items count half
    taken = Counter(item.batch_id for item in (await scene.claim(55)).items)
    assert taken == {long.batch_id: 5, short.batch_id: 50}


async def test_a_settlement_corrects_the_share_by_what_was_used(scene: Scene) -> None:
    modest, greedy = await scene.submit(100), await scene.submit(100)
    await scene.size(modest, [(500, 500)] * 100)
    await scene.size(greedy, [(500, 500)] * 100)
    await scene.claim(32)  # the first items count half
    claim = await scene.claim(20)
    await scene.settle([i for i in claim.items if i.batch_id == modest.batch_id], used=(50, 50))
    await scene.settle([i for i in claim.items if i.batch_id == greedy.batch_id], used=(500, 500))
    # The modest one used 1,000 of its 10,000: nine items are owed to it.
    taken = Counter(item.batch_id for item in (await scene.claim(9)).items)
    assert taken == {modest.batch_id: 9}


async def test_higher_priority_goes_first(scene: Scene) -> None:
    low = await scene.submit(5, priority=-1)
    high = await scene.submit(5, priority=100)
    claim = await scene.claim(7)
    assert [i.batch_id for i in claim.items] == [high.batch_id] * 5 + [low.batch_id] * 2


async def test_flows_that_wait_for_later_retries_take_no_place(scene: Scene) -> None:
    """The ranking looks at 64 flows: 70 that cannot be served must not hide one that can."""
    for _ in range(70):
        await scene.submit(1, priority=10)
    taken = [*(await scene.claim()).items, *(await scene.claim()).items]
    assert len(taken) == 70
    await scene.settle(taken, Outcome.unreachable, wait_s=3600)
    late = await scene.submit(1)
    assert [i.batch_id for i in (await scene.claim()).items] == [late.batch_id]


async def test_a_flow_that_waits_for_a_retry_does_not_let_newcomers_in_early(scene: Scene) -> None:
    """A new flow enters at the virtual time of the flow served next.

    A flow that waits for a later retry is not served next: its old, low virtual time once gave
    every new batch the whole resource until it had caught up with the others.
    """
    waiting = await scene.submit(1)
    await scene.settle((await scene.claim()).items, Outcome.unreachable, wait_s=3600)
    old = await scene.submit(400)
    await scene.claim(200)
    new = await scene.submit(400)
    taken = Counter(item.batch_id for item in (await scene.claim(100)).items)
    assert waiting.batch_id not in taken
    # The first sixteen of the new one count half.
    assert taken[old.batch_id] == pytest.approx(46, abs=2)
    assert taken[new.batch_id] == pytest.approx(54, abs=2)


async def test_a_flow_all_in_flight_keeps_its_claim_to_a_share(scene: Scene) -> None:
    """With everything of the old batch in flight, a new one once entered at virtual time zero."""
    old = await scene.submit(200)
    claim = await scene.claim(200)
    new = await scene.submit(400)
    await scene.settle(claim.items[:100], Outcome.unreachable, wait_s=0)
    taken = Counter(item.batch_id for item in (await scene.claim(100)).items)
    # One or the other may be a refund ahead, but none waits for 200 items of the other.
    assert taken[old.batch_id] >= 40
    assert taken[new.batch_id] >= 40


# Settle --------------------------------------------------------------------------------------------

ODD = (
    '{"b":1, "a":{"x":"nul \\u0000 and \\ud800 alone, ü €😀\\t\\\\"},"n":123456789012345678901234567890.10,'
    '"e":1E400,"dup":1,"dup":2}'
)


async def test_an_answer_is_kept_to_the_letter(scene: Scene) -> None:
    batch = await scene.submit(1)
    await scene.settle((await scene.claim()).items, body=ODD)
    [item] = await scene.items(batch)
    assert (item.response, item.status, item.status_code) == (ODD, "completed", 200)


async def test_an_answer_ends_item_attempt_ledger_counters_and_batch(scene: Scene) -> None:
    await scene.limit(requests=10)
    batch = await scene.submit(2)
    await scene.size(batch, [(100, 50), (100, 50)])
    less, more = (await scene.claim()).items
    slots = await scene.rows(
        "select slot_at from ledger where workspace_id = %s", scene.workspace_id
    )
    [settled] = await scene.settle([less], used=(90, 10))
    assert (settled.settled, settled.becomes, settled.batch_id) == (
        True,
        "completed",
        batch.batch_id,
    )
    assert (await used(scene))[scene.resource_id] == (2, 190, 60)
    await scene.settle([more], used=(110, 500))
    assert (await used(scene))[scene.resource_id] == (2, 200, 510)
    # In the slot of the claim, not of the settlement.
    assert slots == await scene.rows(
        "select slot_at from ledger where workspace_id = %s", scene.workspace_id
    )
    assert await attempts(scene, less) == [(1, "answered", 1, 90, 10)]
    state = await row(scene, less)
    assert (state["status"], state["ended_reason"], state["worker_id"]) == (
        "completed",
        "answered",
        None,
    )
    done = await scene.batch(batch.batch_id)
    assert (done.status, done.completed, done.running) == ("completed", 2, 0)
    assert (done.input_tokens, done.output_tokens) == (200, 510)
    assert done.is_finished
    assert [(e.no, e.kind, e.seq) for e in await scene.events(batch)] == [
        (1, "batch-created", None),
        (2, "batch-running", None),
        (3, "item-running", 0),
        (4, "item-running", 1),
        (5, "item-completed", 0),
        (6, "item-completed", 1),
        (7, "batch-completed", None),
    ]


async def test_settlement_above_the_reservation_holds_back_the_next_claim(scene: Scene) -> None:
    await scene.limit(tokens=1000)
    batch = await scene.submit(3)
    await scene.size(batch, [(100, 100)] * 3)
    await scene.settle((await scene.claim(1)).items, used=(100, 850))
    assert (await scene.claim()).items == []


async def test_a_rejection_fails_the_item_and_the_batch(scene: Scene) -> None:
    batch = await scene.submit(2)
    one, two = (await scene.claim()).items
    [settled] = await scene.settle([one], Outcome.rejected)
    assert settled.becomes == "failed"
    assert (await row(scene, one))["ended_reason"] == "rejected"
    assert (await scene.batch(batch.batch_id)).status == "running"
    await scene.settle([two])
    done = await scene.batch(batch.batch_id)
    assert (done.status, done.completed, done.failed) == ("failed", 1, 1)
    assert [e.kind for e in await scene.events(batch)][-3:] == [
        "item-failed",
        "item-completed",
        "batch-failed",
    ]
    assert [(i.error_code, i.response is None) for i in await scene.items(batch)] == [
        ("rejected", True),
        (None, False),
    ]


async def test_an_unreachable_provider_costs_a_failure_until_they_are_exhausted(
    scene: Scene,
) -> None:
    batch = await scene.submit(1, max_attempts=3)
    for failures in (1, 2):
        [item] = (await scene.claim()).items
        [settled] = await scene.settle([item], Outcome.unreachable, wait_s=7)
        assert settled.becomes == "pending"
        state = await row(scene, item)
        assert (state["status"], state["failures"]) == ("pending", failures)
        assert await scene.value(
            "select visible_at - clock_timestamp() between '6 s' and '7 s' from items"
            " where batch_id = %s",
            batch.batch_id,
        )
        assert (await scene.claim()).items == []
        await scene.do("update items set visible_at = now() where batch_id = %s", batch.batch_id)
    [item] = (await scene.claim()).items
    assert (item.attempt, item.failures) == (3, 2)
    [settled] = await scene.settle([item], Outcome.unreachable, wait_s=7)
    assert settled.becomes == "failed"
    assert (await row(scene, item))["ended_reason"] == "exhausted"
    assert [a[:2] for a in await attempts(scene, item)] == [(n, "unreachable") for n in (1, 2, 3)]
    assert (await scene.batch(batch.batch_id)).retries == 2


async def test_a_throttle_rests_the_resource_for_all_and_burns_nothing(scene: Scene) -> None:
    await scene.submit(1)
    [item] = (await scene.claim()).items
    await scene.submit(5)
    await scene.settle([item], Outcome.throttled, wait_s=30)
    state = await row(scene, item)
    assert (state["status"], state["failures"], state["crashes"]) == ("pending", 0, 0)
    claim = await scene.claim(worker_id=uuid7())
    assert claim.items == []
    assert claim.wait_s == pytest.approx(30, abs=1)
    assert await scene.due_in() == pytest.approx(30, abs=1)
    # The provider counted the call, but it used no tokens.
    assert await attempts(scene, item) == [(1, "throttled", 1, 0, 0)]


def _reserved(item: Item) -> tuple[int, int]:
    return item.input_tokens, item.output_tokens


async def test_a_shorter_throttle_does_not_shorten_a_longer_one(scene: Scene) -> None:
    await scene.submit(2)
    one, two = (await scene.claim()).items
    await scene.settle([one], Outcome.throttled, wait_s=100)
    await scene.settle([two], Outcome.throttled, wait_s=1)
    assert (await scene.claim()).wait_s == pytest.approx(100, abs=1)


async def test_a_throttle_without_a_time_is_recorded(scene: Scene) -> None:
    await scene.submit(1)
    [settled] = await scene.settle((await scene.claim()).items, Outcome.throttled, wait_s=None)
    assert settled.becomes == "pending"
    claim = await scene.claim()
    assert (claim.items, claim.reason) == ([], "cooldown")
    # A second and up to a tenth; a slow machine has spent some of it.
    assert claim.wait_s is not None
    assert 0.5 < claim.wait_s <= 1.1


async def test_an_unsent_item_is_refunded_and_burns_nothing(scene: Scene) -> None:
    await scene.limit(requests=1)
    await scene.submit(1)
    [item] = (await scene.claim()).items
    [settled] = await scene.settle([item], Outcome.unsent)
    assert settled.becomes == "pending"
    assert (await used(scene))[scene.resource_id] == (0, 0, 0)
    assert await attempts(scene, item) == []
    state = await row(scene, item)
    assert (state["failures"], state["crashes"], state["attempt"]) == (0, 0, 1)
    [again] = (await scene.claim()).items
    assert again.attempt == 2


async def test_a_call_known_not_to_have_been_sent_fails_but_is_refunded(scene: Scene) -> None:
    await scene.limit(requests=1)
    await scene.submit(1)
    [item] = (await scene.claim()).items
    await scene.settle([item], Outcome.unreachable, refund=True)
    assert (await used(scene))[scene.resource_id] == (0, 0, 0)
    assert await attempts(scene, item) == [(1, "unreachable", 0, 0, 0)]
    assert (await row(scene, item))["failures"] == 1


async def test_a_late_answer_completes_a_waiting_item_and_settles_the_difference(
    scene: Scene,
) -> None:
    await scene.limit(requests=10)
    batch = await scene.submit(1)
    await scene.size(batch, [(100, 50)])
    [item] = (await scene.claim()).items
    assert await scene.reclaim([item]) == 1
    assert (await used(scene))[scene.resource_id] == (1, 100, 50)
    assert await attempts(scene, item) == [(1, "lost", 1, 100, 50)]
    [settled] = await scene.settle([item], used=(90, 5))
    assert settled.becomes == "completed"
    assert (await used(scene))[scene.resource_id] == (1, 90, 5)
    assert await attempts(scene, item) == [(1, "answered", 1, 90, 5)]
    assert (await scene.batch(batch.batch_id)).status == "completed"


async def test_a_late_answer_ends_an_item_that_is_tried_again(scene: Scene) -> None:
    """The newer call has no item any more to account for it; its attempt says lost until it reports.

    Once it had no row at all: a worker that then vanished left a reservation that nothing explained.
    """
    await scene.limit(requests=10)
    batch = await scene.submit(1)
    await scene.size(batch, [(100, 50)])
    [first] = (await scene.claim()).items
    await scene.reclaim([first])
    [second] = (await scene.claim()).items
    [settled] = await scene.settle([first], used=(90, 5))
    assert settled.becomes == "completed"
    await scene.check_books()
    assert (await used(scene))[scene.resource_id] == (2, 190, 55)
    assert [a[:2] for a in await attempts(scene, first)] == [(1, "answered"), (2, "lost")]
    # The second answer is recorded as an attempt only.
    [settled] = await scene.settle([second], used=(80, 1), body='{"another":1}')
    assert (settled.settled, settled.becomes) == (True, None)
    assert await attempts(scene, first) == [(1, "answered", 1, 90, 5), (2, "answered", 1, 80, 1)]
    assert (await used(scene))[scene.resource_id] == (2, 170, 6)
    [item] = await scene.items(batch)
    assert item.response != '{"another":1}'
    assert item.input_tokens == 90


async def test_an_unsent_newer_call_is_refunded_though_a_late_answer_ended_its_item(
    scene: Scene,
) -> None:
    await scene.limit(requests=10)
    await scene.submit(1)
    [first] = (await scene.claim()).items
    await scene.reclaim([first])
    [second] = (await scene.claim()).items
    await scene.settle([first], used=(1, 1))
    await scene.settle([second], Outcome.unsent)
    assert (await used(scene))[scene.resource_id] == (1, 1, 1)
    assert [a[:3] for a in await attempts(scene, first)] == [(1, "answered", 1), (2, "unsent", 0)]


async def test_two_attempts_of_an_item_in_one_settlement_count_once(scene: Scene) -> None:
    """A worker whose lease lapsed may hold two attempts of an item and flush both together.

    Each once moved the counters: of two items in flight both seemed to have completed.
    """
    batch = await scene.submit(2)
    first, _ = (await scene.claim()).items
    await scene.reclaim([first])
    [second] = (await scene.claim()).items
    assert (second.seq, second.attempt) == (first.seq, 2)
    settled = await scene.settle([first, second])
    assert sorted(str(s.becomes) for s in settled) == ["None", "completed"]
    state = await scene.batch(batch.batch_id)
    assert (state.completed, state.running, state.status) == (1, 1, "running")


async def test_an_answer_outweighs_a_failure_of_the_same_item_in_one_settlement(
    scene: Scene,
) -> None:
    batch = await scene.submit(1)
    [first] = (await scene.claim()).items
    await scene.reclaim([first])
    [second] = (await scene.claim()).items
    async with scene.db.transaction() as conn:
        settled = await queue.settle(
            conn,
            workspace_id=scene.workspace_id,
            worker_id=scene.worker_id,
            settlements=[
                _settlement(scene, second, Outcome.unreachable),
                _settlement(scene, first, Outcome.answered),
            ],
            bodies=[None, "{}"],
        )
    assert [s.becomes for s in settled] == [None, "completed"]
    assert (await scene.batch(batch.batch_id)).status == "completed"
    assert [a[:2] for a in await attempts(scene, first)] == [(1, "answered"), (2, "unreachable")]


def _settlement(scene: Scene, item: Item, outcome: Outcome) -> queue.Settlement:
    return queue.Settlement(
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
        refund=False,
    )


@pytest.mark.parametrize("outcome", [Outcome.rejected, Outcome.unreachable, Outcome.throttled])
async def test_a_late_failure_changes_nothing_but_its_attempt(
    scene: Scene, outcome: Outcome
) -> None:
    batch = await scene.submit(1, max_attempts=1)
    [first] = (await scene.claim()).items
    await scene.reclaim([first])
    [second] = (await scene.claim()).items
    before, flow = await row(scene, second), await scene.batch(batch.batch_id)
    history = await scene.events(batch)
    [settled] = await scene.settle([first], outcome, wait_s=60)
    assert (settled.settled, settled.becomes) == (True, None)
    assert await row(scene, second) == before
    assert await scene.batch(batch.batch_id) == flow
    assert await scene.events(batch) == history
    assert [a[:2] for a in await attempts(scene, first)] == [(1, outcome.value)]
    assert (
        await scene.value(
            "select blocked_until from scope_states where workspace_id = %s and"
            " blocked_until > '-infinity'::timestamptz union all select null limit 1",
            scene.workspace_id,
        )
        is None
    )


@pytest.mark.parametrize("outcome", [o for o in Outcome if o != Outcome.impossible])
async def test_repeating_a_settlement_changes_nothing(scene: Scene, outcome: Outcome) -> None:
    """A flush whose acknowledgement was lost is sent again."""
    await scene.limit(requests=100)
    batch = await scene.submit(2)
    claim = await scene.claim(1)

    async def everything() -> list[list[tuple[Any, ...]]]:
        return [
            await scene.rows(
                f"select t::text from {table} t where workspace_id = %s order by 1",  # noqa: S608
                scene.workspace_id,
            )
            for table in (
                "items", "item_results", "attempts", "events", "ledger", "flows", "batches",
                "resource_states", "scope_states",
            )
        ]  # fmt: skip

    await scene.settle(claim.items, outcome, wait_s=5)
    once = await everything()
    [again] = await scene.settle(claim.items, outcome, wait_s=5)
    assert (again.settled, again.becomes) == (True, None)
    assert await everything() == once
    assert (await scene.batch(batch.batch_id)).pending >= 1


# Reclaim -------------------------------------------------------------------------------------------


async def test_a_reclaimed_item_waits_again_and_its_reservation_stays(scene: Scene) -> None:
    await scene.limit(requests=2)
    batch = await scene.submit(3)
    [one, two] = (await scene.claim()).items
    assert await scene.reclaim([one]) == 1
    state = await row(scene, one)
    assert (state["status"], state["crashes"], state["failures"]) == ("pending", 1, 0)
    assert await attempts(scene, one) == [(1, "lost", 1, *_reserved(one))]
    assert (await used(scene))[scene.resource_id][0] == 2
    assert (await scene.claim()).items == []
    assert ("item-retrying", one.seq) in [(e.kind, e.seq) for e in await scene.events(batch)]
    # Of several reclaimers one wins; and the number must be the one that was seen.
    assert await scene.reclaim([one]) == 0
    await scene.age(62)
    again = (await scene.claim(1)).items
    assert [(i.seq, i.attempt) for i in again] == [(one.seq, 2)]
    assert await scene.reclaim([one]) == 0
    assert await scene.reclaim([two]) == 1


async def test_an_item_that_crashed_alone_three_times_fails(scene: Scene) -> None:
    batch = await scene.submit(1)
    items = list[Item]()
    for _ in range(3):
        items = (await scene.claim()).items
        assert await scene.reclaim(items, alone=True) == 1
    [item] = items
    [read] = await scene.items(batch)
    assert (read.status, read.error_code) == ("failed", "CRASHED")
    assert (await row(scene, item))["ended_reason"] == "crashed"
    assert (await scene.batch(batch.batch_id)).status == "failed"
    assert [a[:2] for a in await attempts(scene, item)] == [(n, "lost") for n in (1, 2, 3)]


async def test_crashes_together_convict_nobody(scene: Scene) -> None:
    await scene.submit(2)
    for _ in range(5):
        assert await scene.reclaim((await scene.claim()).items) == 2
    assert len((await scene.claim()).items) == 2


async def _suspect(scene: Scene) -> Item:
    """An item that was in flight at six crashes."""
    await scene.submit(1)
    for _ in range(5):
        await scene.reclaim((await scene.claim()).items)
    [item] = (await scene.claim()).items
    await scene.reclaim([item])
    return item


async def test_a_suspect_of_six_crashes_is_claimed_alone(scene: Scene) -> None:
    suspect = await _suspect(scene)
    other = await scene.submit(3)
    busy = await scene.claim(alone=False)
    assert busy.isolated
    assert {i.batch_id for i in busy.items} == {other.batch_id}
    await scene.settle(busy.items, Outcome.unsent)
    idle = await scene.claim(alone=True)
    assert idle.isolated
    assert [i.batch_id for i in idle.items] == [suspect.batch_id]


async def test_a_suspect_that_must_wait_for_capacity_says_so(scene: Scene) -> None:
    """Otherwise an idle worker would ask for it again and again, as fast as it can."""
    await _suspect(scene)
    await scene.limit(requests=1)
    await scene.submit(1, priority=1)
    waiting = (await scene.claim(alone=False)).items
    assert len(waiting) == 1
    claim = await scene.claim(alone=True)
    assert claim.items == []
    assert claim.wait_s is not None
    assert claim.wait_s > 50


async def test_an_isolated_suspect_is_put_back_in_line_by_an_answer(scene: Scene) -> None:
    item = await _suspect(scene)
    [again] = (await scene.claim(alone=True)).items
    await scene.settle([again])
    assert (await row(scene, item))["status"] == "completed"


# Lapsed --------------------------------------------------------------------------------------------


async def lapsed(
    scene: Scene, *, quiet_since: datetime = LONG_AGO, dead_after_s: float = 0
) -> list[Lapsed]:
    async with scene.db.connection() as conn:
        found = await queue.lapsed(conn, quiet_since=quiet_since, dead_after_s=dead_after_s)
    return [item for item in found if item.workspace_id == scene.workspace_id]


async def _beat(scene: Scene, when: str) -> None:
    """Say when the worker was last heard; with dead_after_s=0 the future means alive."""
    await scene.do(
        "update workers set heartbeat_at = now() + %s::interval where worker_id = %s",
        when,
        scene.worker_id,
    )


async def test_items_of_a_silent_worker_lapse(scene: Scene) -> None:
    await scene.submit(2)
    await scene.claim()
    await _beat(scene, "1 hour")
    assert await lapsed(scene) == []
    await _beat(scene, "-1 hour")
    assert [(i.seq, i.attempt, i.alone) for i in await lapsed(scene)] == [
        (0, 1, False),
        (1, 1, False),
    ]


async def test_a_lone_item_of_a_silent_worker_was_alone(scene: Scene) -> None:
    await scene.submit(1)
    await scene.claim()
    await _beat(scene, "-1 hour")
    assert [i.alone for i in await lapsed(scene)] == [True]


@pytest.mark.parametrize("column", ["stopped_at", "died_at"])
async def test_items_of_a_worker_known_to_be_gone_lapse_at_once(scene: Scene, column: str) -> None:
    await scene.submit(1)
    await scene.claim()
    await _beat(scene, "1 hour")
    await scene.do(
        f"update workers set {column} = now() where worker_id = %s",  # noqa: S608 - our own word
        scene.worker_id,
    )
    # Also right after a start: there is no silence to wait for.
    soon = datetime(2100, 1, 1, tzinfo=UTC)
    # Whoever said goodbye did not crash.
    assert [i.alone for i in await lapsed(scene, quiet_since=soon)] == [column == "died_at"]


async def test_items_of_an_unknown_worker_lapse(scene: Scene) -> None:
    await scene.submit(1)
    await scene.claim(worker_id=uuid7())
    assert len(await lapsed(scene, quiet_since=datetime(2100, 1, 1, tzinfo=UTC))) == 1


async def test_a_lapsed_lease_is_reclaimed_though_its_worker_lives(scene: Scene) -> None:
    await scene.submit(2)
    await scene.claim()
    await _beat(scene, "1 hour")
    await scene.do(
        "update items set visible_at = now() - interval '1 s' where workspace_id = %s and seq = 1",
        scene.workspace_id,
    )
    assert [i.seq for i in await lapsed(scene)] == [1]


async def test_nothing_lapses_by_silence_that_the_asker_did_not_hear(scene: Scene) -> None:
    """After an outage all heartbeats are old: silence counts from the asker's reconnection on."""
    await scene.submit(1)
    await scene.claim()
    await _beat(scene, "-1 day")
    await scene.do(
        "update items set visible_at = now() - interval '1 day' where workspace_id = %s",
        scene.workspace_id,
    )
    now = await scene.value("select clock_timestamp()")
    assert await lapsed(scene, quiet_since=now, dead_after_s=20) == []
    assert len(await lapsed(scene, quiet_since=now, dead_after_s=0)) == 1


async def test_nothing_lapses_by_silence_right_after_the_servers_start(scene: Scene) -> None:
    await scene.submit(1)
    await scene.claim()
    await _beat(scene, "-1 day")
    up_s = await scene.value("select extract(epoch from now() - pg_postmaster_start_time())::float")
    assert await lapsed(scene, dead_after_s=up_s + 60) == []
    assert len(await lapsed(scene, dead_after_s=up_s - 0.5)) == 1


# Cancel --------------------------------------------------------------------------------------------


async def test_after_a_cancel_nothing_is_claimed_and_every_read_says_so(scene: Scene) -> None:
    batch = await scene.submit(5)
    await scene.claim(2)
    assert await scene.cancel(batch) == "cancelled"
    assert (await scene.claim()).items == []
    state = await scene.batch(batch.batch_id)
    assert (state.status, state.pending, state.running, state.cancelled) == ("cancelled", 0, 2, 3)
    assert [i.status for i in await scene.items(batch)] == ["running"] * 2 + ["cancelled"] * 3
    async with scene.db.connection() as conn:
        assert batch.batch_id in [b.batch_id for b in await queue.unmarked(conn)]


async def test_the_rows_and_events_follow_a_cancel_in_chunks(scene: Scene) -> None:
    batch = await scene.submit(5)
    await scene.cancel(batch)
    assert [await scene.mark(batch, most=2) for _ in range(4)] == [2, 2, 1, 0]
    history = [(e.kind, e.seq) for e in await scene.events(batch)]
    assert history == [
        ("batch-created", None),
        *(("item-cancelled", seq) for seq in range(5)),
        ("batch-cancelled", None),
    ]
    assert await scene.value(
        "select bool_and(status = 'cancelled' and ended_reason = 'cancelled') from items"
        " where batch_id = %s",
        batch.batch_id,
    )
    assert (await scene.batch(batch.batch_id)).is_finished


async def test_a_call_in_flight_is_let_finish_and_its_answer_kept(scene: Scene) -> None:
    batch = await scene.submit(2)
    [item] = (await scene.claim(1)).items
    await scene.cancel(batch)
    await scene.mark(batch)
    assert not (await scene.batch(batch.batch_id)).is_finished
    [settled] = await scene.settle([item])
    assert settled.becomes == "completed"
    assert [i.status for i in await scene.items(batch)] == ["completed", "cancelled"]
    state = await scene.batch(batch.batch_id)
    assert (state.status, state.completed, state.cancelled) == ("cancelled", 1, 1)
    assert state.is_finished
    assert (await scene.events(batch))[-1].kind == "batch-cancelled"


@pytest.mark.parametrize("outcome", [Outcome.unreachable, Outcome.throttled, Outcome.unsent])
async def test_what_would_be_retried_after_a_cancel_is_cancelled(
    scene: Scene, outcome: Outcome
) -> None:
    batch = await scene.submit(2)
    claim = await scene.claim(2)
    await scene.cancel(batch)
    await scene.settle(claim.items[:1], outcome)
    await scene.reclaim(claim.items[1:])
    assert [i.status for i in await scene.items(batch)] == ["cancelled"] * 2
    assert (await scene.claim()).items == []
    assert await scene.mark(batch) == 2
    assert "item-retrying" not in [e.kind for e in await scene.events(batch)]
    assert [e.kind for e in await scene.events(batch)][-3:] == [
        "item-cancelled",
        "item-cancelled",
        "batch-cancelled",
    ]


async def test_a_late_answer_does_not_undo_a_cancel(scene: Scene) -> None:
    await scene.limit(requests=9)
    batch = await scene.submit(1)
    [item] = (await scene.claim()).items
    await scene.reclaim([item])
    await scene.cancel(batch)
    [settled] = await scene.settle([item], used=(1, 1))
    assert settled.becomes is None
    assert [i.status for i in await scene.items(batch)] == ["cancelled"]
    assert (await used(scene))[scene.resource_id] == (1, 1, 1)
    await scene.mark(batch)
    assert (await row(scene, item))["status"] == "cancelled"


async def test_cancel_is_idempotent_and_respects_how_a_batch_ended(scene: Scene) -> None:
    batch = await scene.submit(1)
    assert [await scene.cancel(batch), await scene.cancel(batch)] == ["cancelled"] * 2
    done = await scene.submit(1)
    await scene.settle((await scene.claim()).items)
    assert await scene.cancel(done) == "completed"
    async with scene.db.transaction() as conn:
        assert (await queue.cancel(conn, workspace_id=scene.workspace_id, batch_id=uuid7())) is None


async def test_cancel_reaches_every_resource_of_a_batch(world: Database) -> None:
    scene = await Scene.make(world, resources=2)
    batch = await scene.submit(6, resources=[0, 1])
    await scene.claim(1, resource=1)
    await scene.cancel(batch)
    assert (await scene.claim(resource=0)).items == []
    assert (await scene.claim(resource=1)).items == []
    # One resource after the other, whichever is first.
    marked = [await scene.mark(batch) for _ in range(3)]
    assert (sorted(marked[:2]), marked[2]) == ([2, 3], 0)
    await scene.check_books()


# Redrive -------------------------------------------------------------------------------------------


async def test_redrive_puts_failed_items_back_with_fresh_counts(scene: Scene) -> None:
    batch = await scene.submit(3, max_attempts=1)
    one, two, three = (await scene.claim()).items
    await scene.settle([one, two], Outcome.unreachable)
    await scene.settle([three])
    assert (await scene.batch(batch.batch_id)).status == "failed"
    assert await scene.redrive(batch) == 2
    state = await scene.batch(batch.batch_id)
    assert (state.status, state.pending, state.failed, state.completed) == ("running", 2, 0, 1)
    assert not state.is_finished
    assert [(i.failures, i.error_code) for i in await scene.items(batch)][:2] == [(0, None)] * 2
    again = await scene.claim()
    assert [(i.seq, i.attempt) for i in again.items] == [(0, 2), (1, 2)]
    await scene.settle(again.items)
    done = await scene.batch(batch.batch_id)
    assert (done.status, done.completed) == ("completed", 3)
    assert [e.kind for e in await scene.events(batch) if e.seq is None] == [
        "batch-created",
        "batch-running",
        "batch-failed",
        "batch-running",
        "batch-completed",
    ]
    assert await scene.redrive(batch) == 0


async def test_redrive_leaves_cancelled_batches_alone(scene: Scene) -> None:
    batch = await scene.submit(2)
    claim = await scene.claim(1)
    await scene.settle(claim.items, Outcome.rejected)
    await scene.cancel(batch)
    assert await scene.redrive(batch) == 0


async def test_redrive_takes_a_bounded_number(scene: Scene) -> None:
    batch = await scene.submit(5)
    await scene.settle((await scene.claim()).items, Outcome.rejected)
    assert [await scene.redrive(batch, most=2) for _ in range(4)] == [2, 2, 1, 0]


# When to look again --------------------------------------------------------------------------------


async def test_when_nothing_waits_no_look_is_due(scene: Scene) -> None:
    await scene.submit(2)
    assert await scene.due_in() <= 0
    claim = await scene.claim(10)
    assert claim.wait_s is None
    assert await scene.due_in() == float("inf")


async def test_a_full_worker_leaves_the_rest_due_at_once(scene: Scene) -> None:
    await scene.submit(3)
    claim = await scene.claim(2)
    assert claim.wait_s == 0
    assert await scene.due_in() <= 0


async def test_a_retry_sets_the_next_look(scene: Scene) -> None:
    await scene.submit(1)
    claim = await scene.claim()
    await scene.settle(claim.items, Outcome.unreachable, wait_s=40)
    assert await scene.due_in() == pytest.approx(40, abs=1)
    assert (await scene.claim()).wait_s == pytest.approx(40, abs=1)


async def test_a_sooner_retry_comes_first_and_a_later_one_does_not_delay(scene: Scene) -> None:
    await scene.submit(2)
    one, two = (await scene.claim()).items
    await scene.settle([one], Outcome.unreachable, wait_s=20)
    await scene.settle([two], Outcome.unreachable, wait_s=40)
    assert await scene.due_in() == pytest.approx(20, abs=1)


async def test_a_new_batch_is_due_at_once(scene: Scene) -> None:
    await scene.submit(1)
    claim = await scene.claim()
    await scene.settle(claim.items, Outcome.unreachable, wait_s=40)
    await scene.submit(1)
    assert await scene.due_in() <= 0


async def test_capacity_given_back_is_due_at_once(scene: Scene) -> None:
    await scene.limit(requests=1)
    await scene.submit(2)
    claim = await scene.claim()
    assert await scene.due_in() > 50
    await scene.settle(claim.items, Outcome.unsent)
    assert await scene.due_in() <= 0


async def test_a_resource_without_waiting_work_is_not_woken_by_a_refund(scene: Scene) -> None:
    await scene.limit(requests=9)
    await scene.submit(1)
    await scene.settle((await scene.claim()).items, used=(1, 1))
    assert await scene.due_in() == float("inf")


# The floor -----------------------------------------------------------------------------------------


async def floor(scene: Scene, batch_id: UUID) -> int:
    return await scene.value("select floor from flows where batch_id = %s", batch_id)


async def below_floor(scene: Scene) -> list[queue.BelowFloor]:
    async with scene.db.connection() as conn:
        found = await queue.below_floor(conn)
    return [bug for bug in found if bug.workspace_id == scene.workspace_id]


async def test_the_floor_rises_with_the_claims_and_never_falls(scene: Scene) -> None:
    batch = await scene.submit(10)
    assert await floor(scene, batch.batch_id) == 0
    claim = await scene.claim(4)
    assert await floor(scene, batch.batch_id) == 4
    await scene.settle(claim.items[:2], Outcome.unreachable)
    assert await floor(scene, batch.batch_id) == 4
    # Those that came back are found behind the floor, and first.
    assert seqs((await scene.claim(3)).items) == [0, 1, 4]
    assert await floor(scene, batch.batch_id) == 5
    assert await below_floor(scene) == []


async def test_a_locked_row_stops_the_floor(scene: Scene) -> None:
    batch = await scene.submit(6)
    async with scene.db.transaction() as other:
        await other.execute(
            "select 1 from items where batch_id = %s and seq = 2 for no key update",
            (batch.batch_id,),
        )
        assert seqs((await scene.claim(5)).items) == [0, 1, 3, 4]
        assert await floor(scene, batch.batch_id) == 2
        assert await below_floor(scene) == []
    assert seqs((await scene.claim(5)).items) == [2, 5]
    assert await floor(scene, batch.batch_id) == 6


async def test_an_item_below_the_floor_is_reported(scene: Scene) -> None:
    batch = await scene.submit(6)
    await scene.do("update flows set floor = 2 where batch_id = %s", batch.batch_id)
    assert [bug.items for bug in await below_floor(scene)] == [2]


async def test_a_lost_look_is_found_again(scene: Scene) -> None:
    await scene.submit(1)
    await scene.do(
        "update ready set next_at = 'infinity' where workspace_id = %s", scene.workspace_id
    )
    async with scene.db.connection() as conn:
        assert await queue.recompute_ready(conn) >= 1
    assert await scene.due_in() <= 0


# Workers and duties --------------------------------------------------------------------------------


async def test_a_worker_finds_what_it_holds(scene: Scene) -> None:
    await scene.limit(requests=5)
    await scene.submit(3)
    claim = await scene.claim(2)
    await scene.claim(1, worker_id=uuid7())
    async with scene.db.connection() as conn:
        held = await queue.held_by(conn, worker_id=scene.worker_id)

    def facts(item: Item) -> tuple[object, ...]:
        return (item.seq, item.attempt, item.claimed_at, item.input_tokens, item.limit_ids)

    assert sorted(map(facts, held)) == sorted(map(facts, claim.items))
    # Enough to give it back.
    await scene.settle(held, Outcome.unsent)
    assert (await used(scene))[scene.resource_id][0] == 1


async def test_a_duty_has_one_holder_until_it_is_left_or_lapses(scene: Scene) -> None:
    one, two, name = uuid7(), uuid7(), str(uuid7())
    async with scene.db.connection() as conn:
        assert await queue.take_duty(conn, name=name, holder_id=one, for_s=60)
        assert not await queue.take_duty(conn, name=name, holder_id=two, for_s=60)
        assert await queue.take_duty(conn, name=name, holder_id=one, for_s=0)
        assert await queue.take_duty(conn, name=name, holder_id=two, for_s=60)
        await queue.release_duty(conn, name=name, holder_id=one)
        assert not await queue.take_duty(conn, name=name, holder_id=one, for_s=60)
        await queue.release_duty(conn, name=name, holder_id=two)
        assert await queue.take_duty(conn, name=name, holder_id=one, for_s=60)


async def test_a_request_limit_allows_a_burst_and_then_its_even_rate(scene: Scene) -> None:
    """One per second: three at once, then nothing more until time has passed; no time, no more."""
    await scene.limit(requests=60)
    await scene.submit(40)
    first = await scene.claim(burst_s=3)
    assert len(first.items) == 3
    at_once = await scene.claim(burst_s=3)  # what a slot of half a second and the test itself add
    assert len(at_once.items) <= 1
    assert at_once.wait_s is not None
    assert 0 < at_once.wait_s <= 3
    await scene.age(seconds=10)
    assert len((await scene.claim(burst_s=3)).items) == 3
