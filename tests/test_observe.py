"""What replies teach, and that it holds for every worker and resource of a model (observe.sql).

After every test that uses ``scene`` the books are recounted. ``claim`` paces nothing here unless it is
told to (``burst_s``), so that the number of items it takes is what the limits leave.
"""

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from datetime import timedelta
from typing import Any, Literal
from uuid import UUID

import psycopg
import pytest
from msgspec.structs import replace

from app.capacity import Amount
from app.db import Connection, Database
from app.ids import uuid7
from app.queue import Claim, Item, Observation, Outcome
from app.rate_limits import rate_limits
from tests.conftest import cloned
from tests.scene import Scene, until_blocked

Kind = Literal["requests", "tokens", "input_tokens", "output_tokens"]
Period = Literal["minute", "hour", "day", "month"]


@pytest.fixture(scope="module")
async def world(cluster: str, template: str) -> AsyncIterator[Database]:
    """One database for this file, whose sessions know the functions; a tenant for every test."""
    with cloned(cluster, template) as url:
        async with Database(url, size=6) as db:
            yield db


@pytest.fixture
async def scene(world: Database) -> AsyncIterator[Scene]:
    """Resources 0 and 1 name one model, resource 2 another; all are on one connection."""
    scene = await Scene.make(world, models=["small", "small", "large"])
    yield scene
    await scene.check_books()


def says(
    scene: Scene,
    limit: int,
    *,
    kind: Kind = "requests",
    used: int | None = None,
    period: Period = "minute",
    resource: int = 0,
) -> Observation:
    """What a reply states of one limit."""
    return Observation(
        resource_id=scene.resource_ids[resource], kind=kind, period=period, limit=limit, used=used
    )


def told(scene: Scene, headers: Mapping[str, str], *, host: str = "h") -> list[Observation]:
    """What a worker understands of a reply's headers."""
    return [
        Observation(
            resource_id=scene.resource_id,
            kind=stated.kind,
            period=stated.period,
            limit=stated.limit,
            used=stated.used,
        )
        for stated in rate_limits(headers, host=host)
    ]


async def take(scene: Scene, want: int = 1000, *, resource: int = 0) -> list[Item]:
    return (await scene.claim(want, resource=resource)).items


async def refuse(
    scene: Scene,
    items: Sequence[Item],
    code: str = "rate_limited",
    *,
    wait_s: float | None = None,
    observed: Sequence[Observation] = (),
    rest_most_s: float = 60.0,
) -> None:
    await scene.settle(
        items,
        Outcome.throttled,
        error_code=code,
        wait_s=wait_s,
        observed=observed,
        rest_most_s=rest_most_s,
    )


async def learned(scene: Scene, column: str, *, resource: int = 0) -> Any:  # noqa: ANN401 - whatever it is
    """What is known about the model of a resource."""
    return await scene.value(
        f"select {column} from scope_states where scope_id = %s",  # noqa: S608 - a test's own words
        await scene.model_scope_id(resource),
    )


async def learn(scene: Scene, changes: str, *params: object) -> None:
    """Let the model of resource 0 have been found to be like this."""
    await scene.do(
        f"update scope_states set {changes} where scope_id = %s",  # noqa: S608 - a test's own words
        *params,
        await scene.model_scope_id(),
    )


async def later(scene: Scene, seconds: int) -> None:
    """Let so many seconds pass, also for what limits remember."""
    await scene.pass_time(seconds)
    await scene.do(
        "update limits set observed_at = observed_at - w, updated_at = updated_at - w"
        " from (select make_interval(secs => %s)) as passed (w) where workspace_id = %s",
        seconds,
        scene.workspace_id,
    )


def older(items: Sequence[Item], seconds: int) -> list[Item]:
    """Items as their worker holds them, after ``later``."""
    return [replace(i, claimed_at=i.claimed_at - timedelta(seconds=seconds)) for i in items]


#: Begun long ago: what it bears in a minute can be told.
GROWN = "begun_at = now() - interval '10 minutes', is_fresh = false"

#: The same, refused a while ago, and now allowed to rise.
RISING = (
    f"{GROWN}, ceiling = 60, is_window = true, throttled_at = now() - interval '1 minute',"
    " raise_at = now() - interval '1 second'"
)

#: Begun and refused just now.
YOUNG = (
    "begun_at = now() - interval '20 seconds', is_fresh = false, ceiling = 60, is_window = false,"
    " raise_share = 1, throttled_at = now() - interval '10 seconds', raise_at = now() - interval '1 second'"
)


async def outside(scene: Scene, resource: int = 0) -> tuple[int, int, int]:
    """Requests, input and output tokens that the provider counted beyond ours."""
    rows = await scene.rows(
        "select sum(outside_requests)::int, sum(outside_input_tokens)::int,"
        " sum(outside_output_tokens)::int from ledger join limits using (workspace_id, limit_id)"
        " where scope_id = %s",
        await scene.model_scope_id(resource),
    )
    return (rows[0][0] or 0, rows[0][1] or 0, rows[0][2] or 0)


async def observed_limit(scene: Scene, resource: int = 0, period: Period = "minute") -> UUID:
    return await scene.value(
        "select limit_id from limits where scope_id = %s and source = 'observed' and period::text = %s",
        await scene.model_scope_id(resource),
        period,
    )


async def ended(conn: Connection, work: "asyncio.Task[Any]") -> None:
    """Wait for what a session does and commit it."""
    await work
    await conn.commit()


async def rest_s(scene: Scene) -> float:
    """How long the last refusal rests the model, from the moment it was recorded."""
    return float(await learned(scene, "extract(epoch from blocked_until - throttled_at)"))


def resting(claim: Claim) -> bool:
    return claim.items == [] and claim.reason == "cooldown"


# Stated limits -----------------------------------------------------------------------------------


async def test_a_stated_limit_binds_like_a_given_one(scene: Scene) -> None:
    await scene.submit(20)
    await scene.settle(await take(scene, 1), observed=[says(scene, 5)])
    claim = await scene.claim()
    assert len(claim.items) == 4
    assert (claim.reason, claim.waits_for) == ("capacity", await observed_limit(scene))
    assert claim.wait_s == pytest.approx(61, abs=1)
    await later(scene, 62)
    assert len(await take(scene)) == 5


@pytest.mark.parametrize(("given", "stated", "fit"), [(7, 5, 5), (5, 7, 5), (5, 5, 5)])
async def test_of_a_given_and_a_stated_limit_the_tighter_binds(
    scene: Scene, given: int, stated: int, fit: int
) -> None:
    await scene.limit(requests=given)
    await scene.submit(20)
    await scene.settle(await take(scene, 1), observed=[says(scene, stated)])
    assert len(await take(scene)) == fit - 1


@pytest.mark.parametrize(
    ("kind", "limit"), [("tokens", 90), ("input_tokens", 35), ("output_tokens", 70)]
)
async def test_stated_limits_of_tokens_bind(scene: Scene, kind: Kind, limit: int) -> None:
    """Three items of 10 and 20 tokens fit each of them."""
    batch = await scene.submit(10)
    await scene.size(batch, [(10, 20)] * 10)
    await scene.settle(await take(scene, 1), observed=[says(scene, limit, kind=kind)])
    claim = await scene.claim()
    assert (len(claim.items), claim.reason) == (2, "capacity")


async def test_a_stated_limit_is_of_the_model_on_the_connection(scene: Scene) -> None:
    other_connection = await scene.add_connection(model="small")
    for resource in range(4):
        await scene.submit(10, resource=resource)
    await scene.settle(await take(scene, 1), observed=[says(scene, 5)])
    assert len(await take(scene, resource=1)) == 4
    assert len(await take(scene, resource=0)) == 0
    assert len(await take(scene, resource=2)) == 10
    assert len(await take(scene, resource=other_connection)) == 10


async def test_a_new_resource_of_a_known_model_is_bound_at_once(scene: Scene) -> None:
    await scene.submit(1)
    await scene.settle(await take(scene), observed=[says(scene, 5)])
    resource = await scene.add_resource(model="small")
    await scene.submit(10, resource=resource)
    assert len(await take(scene, resource=resource)) == 4


async def test_a_stated_limit_binds_for_a_week_from_when_it_was_last_stated(scene: Scene) -> None:
    await scene.submit(40)
    items = await take(scene, 2)
    await scene.settle(items[:1], observed=[says(scene, 5)])
    week = 7 * 24 * 3600
    await later(scene, week - 100)
    assert len(await take(scene)) == 5
    await later(scene, 200)
    assert len(await take(scene, 10)) == 10
    await scene.settle(older(items[1:], week + 100), observed=[says(scene, 12)])
    assert len(await take(scene)) == 2


async def test_a_limit_that_is_stated_again_binds_for_another_week(scene: Scene) -> None:
    await scene.submit(40)
    week = 7 * 24 * 3600
    for passed in (0, week - 100, week - 100):
        await later(scene, passed)
        await scene.settle(await take(scene, 1), observed=[says(scene, 5)])
    assert len(await take(scene)) == 4


async def test_a_changed_statement_counts_from_the_next_claim(scene: Scene) -> None:
    await scene.submit(40)
    items = await take(scene, 3)
    await scene.settle(items[:1], observed=[says(scene, 5)])
    assert len(await take(scene)) == 2
    await scene.settle(items[1:2], observed=[says(scene, 8)])
    assert len(await take(scene)) == 3
    await scene.settle(items[2:], observed=[says(scene, 6)])
    assert len(await take(scene)) == 0
    await later(scene, 62)
    assert len(await take(scene)) == 6


async def test_a_statement_of_one_kind_leaves_those_of_others_in_force(scene: Scene) -> None:
    await scene.submit(40)
    first, second = await take(scene, 2)
    await scene.settle([first], observed=[says(scene, 5), says(scene, 10**6, kind="tokens")])
    await scene.settle([second], observed=[says(scene, 10**5, kind="tokens")])
    assert await scene.rows(
        "select requests, tokens from limits where limit_id = %s", await observed_limit(scene)
    ) == [(5, 10**5)]
    assert len(await take(scene)) == 3


async def test_a_changed_statement_ends_what_refusals_have_taught(scene: Scene) -> None:
    await scene.submit(40)
    first, second, third, *rest = await take(scene, 10)
    await scene.settle([first], observed=[says(scene, 1000)])
    await refuse(scene, rest)
    assert await learned(scene, "ceiling") is not None
    await scene.settle([second], observed=[says(scene, 1000)])
    assert await learned(scene, "ceiling") is not None
    await scene.settle([third], observed=[says(scene, 500)])
    assert await learned(scene, "ceiling") is None


async def test_a_statement_that_says_less_changes_nothing(scene: Scene) -> None:
    """A reply that speaks of requests only, after the minute in which they are not noted again."""
    await scene.submit(40)
    first, second, *rest = await take(scene, 10)
    said = says(scene, 1000)
    await scene.settle([first], observed=[said, says(scene, 10**6, kind="tokens")])
    await refuse(scene, rest)
    await later(scene, 70)
    await scene.settle(older([second], 70), observed=[said])
    assert await learned(scene, "ceiling") is not None


async def test_a_limit_of_requests_per_day_binds(scene: Scene) -> None:
    """As Cerebras states it; the minute's is stated beside it."""
    headers = {
        "x-ratelimit-limit-requests-day": "5",
        "x-ratelimit-remaining-requests-day": "4",
        "x-ratelimit-reset-requests-day": "33011",
        "x-ratelimit-limit-tokens-minute": "60000",
        "x-ratelimit-remaining-tokens-minute": "59970",
        "x-ratelimit-reset-tokens-minute": "11",
    }
    await scene.submit(20)
    await scene.settle(await take(scene, 1), observed=told(scene, headers))
    assert await scene.rows(
        "select period::text, sliding, requests, tokens from limits"
        " where workspace_id = %s and scope_id = %s order by limits.period",
        scene.workspace_id,
        await scene.model_scope_id(),
    ) == [("minute", True, None, 60000), ("day", True, 5, None)]
    # What was claimed before the limit was known is not in its account, but in what the provider says.
    assert await outside(scene) == (1, 0, 0)
    claim = await scene.claim()
    assert (len(claim.items), claim.reason) == (4, "capacity")
    assert claim.waits_for == await observed_limit(scene, period="day")
    assert claim.wait_s == pytest.approx(24 * 3600, abs=15 * 60)
    await later(scene, 62)
    assert await take(scene) == []
    # Back to where its slots begin, for the recount.
    await later(scene, -62)


async def test_two_resources_of_a_model_in_one_settlement_state_one_limit(scene: Scene) -> None:
    await scene.submit(10)
    await scene.submit(10, resource=1)
    items = await take(scene, 1) + await take(scene, 1, resource=1)
    await scene.settle(
        items,
        observed=[says(scene, 50, used=20), says(scene, 50, used=22, resource=1)],
    )
    assert await outside(scene) == (20, 0, 0)


async def test_an_unknown_resource_states_nothing(scene: Scene) -> None:
    await scene.submit(3)
    stranger = Observation(resource_id=uuid7(), kind="requests", period="minute", limit=1, used=1)
    await scene.settle(await take(scene, 1), observed=[stranger])
    assert len(await take(scene)) == 2


# What others use ---------------------------------------------------------------------------------


async def test_what_the_provider_counts_beyond_ours_takes_its_place(scene: Scene) -> None:
    await scene.submit(100)
    await scene.settle(await take(scene, 4), observed=[says(scene, 50, used=24)])
    assert await outside(scene) == (20, 0, 0)
    assert len(await take(scene)) == 50 - 24


async def test_the_same_count_again_adds_nothing(scene: Scene) -> None:
    await scene.submit(100)
    for item in await take(scene, 4):
        await scene.settle([item], observed=[says(scene, 50, used=24)])
    assert await outside(scene) == (20, 0, 0)


async def test_a_lower_count_takes_nothing_back_and_a_higher_adds_the_difference(
    scene: Scene,
) -> None:
    """What the provider has not seen yet may still arrive."""
    await scene.submit(100)
    for item, used in zip(await take(scene, 4), (24, 3, 30, 29), strict=True):
        await scene.settle([item], observed=[says(scene, 50, used=used)])
    assert await outside(scene) == (26, 0, 0)


async def test_what_is_ours_is_not_counted_twice(scene: Scene) -> None:
    await scene.submit(100)
    for _ in range(3):
        items = await take(scene, 5)
        used = await scene.value(
            "select sum(requests)::int from ledger where limit_id = %s", await observed_limit(scene)
        )
        await scene.settle(items, observed=[says(scene, 50, used=used)])
    assert await outside(scene) == (0, 0, 0)
    assert len(await take(scene)) == 35


async def test_what_others_used_ages_out_with_its_minute(scene: Scene) -> None:
    await scene.submit(100)
    await scene.settle(await take(scene, 1), observed=[says(scene, 50, used=50)])
    claim = await scene.claim()
    assert (claim.items, claim.reason) == ([], "capacity")
    assert claim.wait_s == pytest.approx(61, abs=1)
    await later(scene, 62)
    assert len(await take(scene)) == 50


async def test_each_kind_is_compared_with_its_own_count(scene: Scene) -> None:
    await scene.submit(100)
    await scene.settle(
        await take(scene, 1),
        used=(10, 20),
        observed=[
            says(scene, 50, used=1),
            says(scene, 1000, kind="input_tokens", used=310),
            says(scene, 5000, kind="output_tokens", used=1024),
        ],
    )
    # Before this settlement 1,024 tokens of output were reserved; 310 of input were not all ours.
    requests, input_tokens, output_tokens = await outside(scene)
    assert (requests, output_tokens) == (0, 0)
    assert 280 <= input_tokens <= 300


async def test_tokens_of_no_kind_are_compared_with_both(scene: Scene) -> None:
    batch = await scene.submit(100)
    await scene.size(batch, [(10, 20)])
    await scene.settle(
        await take(scene, 1), used=(10, 20), observed=[says(scene, 10**4, kind="tokens", used=130)]
    )
    assert await outside(scene) == (0, 100, 0)


async def test_a_bucket_that_is_soon_full_again_is_used_by_nobody(scene: Scene) -> None:
    """It holds ten calls of 600 a minute: 590 are missing, but a second brings all of them back."""
    await scene.submit(20)
    headers = {
        "x-ratelimit-limit-requests": "600",
        "x-ratelimit-remaining-requests": "9",
        "x-ratelimit-reset-requests": "100ms",
    }
    await scene.settle(await take(scene, 1), observed=told(scene, headers))
    assert await outside(scene) == (0, 0, 0)


async def test_what_others_use_is_not_paced(scene: Scene) -> None:
    """It counts for the limit; of the pace only our own calls do."""
    await scene.submit(100)
    await scene.settle(await take(scene, 1), observed=[says(scene, 600, used=300)])
    await later(scene, 1)
    assert len((await scene.claim(burst_s=6)).items) == 60


async def test_a_settlement_repeated_later_does_not_count_others_anew(scene: Scene) -> None:
    """Its acknowledgement was lost: what was used a minute ago is not used now."""
    await scene.submit(100)
    items = await take(scene, 1)
    said = [says(scene, 50, used=41)]
    await scene.settle(items, observed=said)
    await later(scene, 62)
    await scene.settle(older(items, 62), observed=said)
    assert len(await take(scene)) == 50


@pytest.mark.parametrize(
    "known",
    [
        False,
        True,
    ],
)
async def test_two_settlements_at_once_enter_what_others_use_once(
    scene: Scene,
    known: bool,  # noqa: FBT001 - a case
) -> None:
    """Two workers, two sessions; the limit is new to the database, or it was known already."""
    await scene.submit(10)
    if known:
        await scene.settle(await take(scene, 1), observed=[says(scene, 100, used=1)])
    used = 60
    ours = 2 + known
    one, two = await take(scene, 2)
    async with scene.session() as first, scene.session() as second:
        await scene.settle([one], conn=first, observed=[says(scene, 100, used=used)])
        crossing = asyncio.create_task(
            scene.settle(
                [two], conn=second, worker_id=uuid7(), observed=[says(scene, 100, used=used)]
            )
        )
        await until_blocked(scene, second, crossing)
        await first.commit()
        await asyncio.wait_for(crossing, 10)
        await second.commit()
    assert await outside(scene) == (used - ours, 0, 0)


async def test_two_settlements_that_state_limits_in_opposite_order_pass(scene: Scene) -> None:
    """Of two models: one has the first of them and waits for the second; the other wants the first."""
    await scene.submit(10)
    await scene.submit(10, resource=2)
    small, large = await take(scene, 3), await take(scene, 3, resource=2)
    said = [says(scene, 100, used=50), says(scene, 200, used=70, resource=2)]
    await scene.settle([small.pop(), large.pop()], observed=said)
    said = [says(scene, 90, used=60), says(scene, 190, used=80, resource=2)]
    scopes = sorted([await scene.model_scope_id(0), await scene.model_scope_id(2)])
    async with scene.session() as blocker, scene.session() as first, scene.session() as second:
        await blocker.execute(
            "select from limits where workspace_id = %s and scope_id = %s for no key update",
            (scene.workspace_id, scopes[1]),
        )
        one = asyncio.create_task(scene.settle([small[0], large[0]], conn=first, observed=said))
        assert await until_blocked(scene, first, one)
        other = asyncio.create_task(
            scene.settle([large[1], small[1]], conn=second, observed=said[::-1])
        )
        assert await until_blocked(scene, second, other)
        await blocker.commit()
        assert [s.settled for s in await asyncio.wait_for(one, 10)] == [True, True]
        await first.commit()
        await asyncio.wait_for(other, 10)
        await second.commit()


async def test_a_settlement_that_enters_what_others_use_does_not_deadlock_with_a_claim(
    scene: Scene,
) -> None:
    """A claim takes slots in the order of their limits; a settlement makes the model's new one first.

    Here that is the slot of a limit per day which the provider states, and the connection has one, too.
    """
    await scene.set_limits(
        scene.connection_id,
        Amount(period="minute", requests=1000),
        Amount(period="day", requests=1000),
    )
    # The accounts in the order of their making: those of the connection come before its models'.
    minute, day = UUID(int=1), UUID(int=2)
    for period, limit_id in (("day", day), ("minute", minute)):
        await scene.do(
            "update limits set limit_id = %s where scope_id = %s and period::text = %s",
            limit_id,
            scene.connection_id,
            period,
        )
    await scene.submit(10)
    items = await take(scene, 2)
    # Known, but nothing is in its account yet.
    await scene.settle(items[:1], observed=[says(scene, 1000, period="day")])
    await later(scene, 2)
    said = [says(scene, 1000, period="day", used=50)]
    async with scene.session() as blocker, scene.session() as first, scene.session() as second:
        # The past slots of the minute, which the settlement needs and the claim does not.
        await blocker.execute(
            "select from ledger where workspace_id = %s and limit_id = %s for update",
            (scene.workspace_id, minute),
        )
        settling = asyncio.create_task(scene.settle(older(items[1:], 2), conn=first, observed=said))
        assert await until_blocked(scene, first, settling)
        claiming = asyncio.create_task(scene.claim(1, conn=second))
        await until_blocked(scene, second, claiming)
        await blocker.commit()
        try:
            await asyncio.wait_for(
                asyncio.gather(ended(first, settling), ended(second, claiming)), 10
            )
        except psycopg.errors.DeadlockDetected:
            settling.cancel()
            claiming.cancel()
            await asyncio.gather(settling, claiming, return_exceptions=True)
            raise


# Rests -------------------------------------------------------------------------------------------


async def test_a_refusal_rests_the_model_for_all_workers_and_resources(scene: Scene) -> None:
    for resource in range(3):
        await scene.submit(10, resource=resource)
    items = await take(scene, 2)
    await refuse(scene, items, wait_s=30)
    for resource in (0, 1):
        claim = await scene.claim(resource=resource, worker_id=uuid7())
        assert resting(claim)
        assert claim.waits_for == await scene.model_scope_id()
        assert claim.wait_s == pytest.approx(30, abs=1)
        assert await scene.due_in(resource) == pytest.approx(30, abs=1)
    assert len(await take(scene, resource=2)) == 10
    # Nothing of it is the items' fault.
    assert (
        await scene.rows(
            "select status::text, failures, crashes,"
            " abs(extract(epoch from visible_at - clock_timestamp()) - 30) < 1 from items"
            " where resource_id = %s and attempt > 0",
            scene.resource_id,
        )
        == [("pending", 0, 0, True)] * 2
    )
    await later(scene, 31)
    assert [item.attempt for item in await take(scene)] == [2]


async def test_another_connection_with_the_same_model_goes_on(scene: Scene) -> None:
    await scene.submit(2)
    other = await scene.add_connection(model="small")
    await scene.submit(2, resource=other)
    await refuse(scene, await take(scene, 1), wait_s=30)
    assert len(await take(scene, resource=other)) == 2


async def test_a_shorter_wait_never_shortens_a_longer_one(scene: Scene) -> None:
    await scene.submit(10)
    one, two, three = await take(scene, 3)
    await refuse(scene, [one], wait_s=30)
    await refuse(scene, [two], wait_s=5)
    assert await scene.value(
        "select round(extract(epoch from max(blocked_until) - clock_timestamp())) from scope_states"
        " where workspace_id = %s",
        scene.workspace_id,
    ) == pytest.approx(30, abs=1)
    await refuse(scene, [three], wait_s=50)
    assert (await scene.claim()).wait_s == pytest.approx(50, abs=1)


async def test_of_several_waits_in_one_settlement_the_longest_counts(scene: Scene) -> None:
    await scene.submit(10)
    one, two = await take(scene, 2)
    async with scene.db.transaction() as conn:
        await scene.settle([one], Outcome.throttled, wait_s=20, conn=conn)
        await scene.settle([two], Outcome.throttled, wait_s=10, conn=conn)
    assert (await scene.claim()).wait_s == pytest.approx(20, abs=1)


async def test_without_a_time_rests_double_up_to_the_most_until_an_answer(scene: Scene) -> None:
    await scene.submit(10)
    for expected in (1, 2, 3, 3, 3):
        await refuse(scene, await take(scene, 1), rest_most_s=3)
        # With up to a tenth of jitter.
        assert expected <= await rest_s(scene) <= 1.1 * expected
        await later(scene, 70)
    await scene.settle(await take(scene))
    assert await learned(scene, "refusals") == 0
    await refuse(scene, await take(scene, 1), rest_most_s=3)
    assert 1 <= await rest_s(scene) <= 1.1


async def test_refusals_of_calls_from_before_belong_to_the_same_cohort(scene: Scene) -> None:
    """They came back later, but were let out by the same mistake."""
    await learn(scene, GROWN)
    await scene.submit(40)
    early, late = await take(scene, 10), await take(scene, 10)
    await refuse(scene, early[5:])
    before = await scene.rows(
        "select blocked_until, throttled_at, refusals, burst_share, raise_at from scope_states"
        " where scope_id = %s",
        await scene.model_scope_id(),
    )
    assert await learned(scene, "ceiling") == 15
    await refuse(scene, late[5:])
    assert (
        await scene.rows(
            "select blocked_until, throttled_at, refusals, burst_share, raise_at from scope_states"
            " where scope_id = %s",
            await scene.model_scope_id(),
        )
        == before
    )
    # They had been taken for accepted; nothing else is lowered.
    assert await learned(scene, "ceiling") == 10


async def test_late_refusals_below_a_known_limit_do_not_lower_it_again(scene: Scene) -> None:
    await learn(scene, GROWN)
    await scene.limit(requests=100)
    await scene.submit(60)
    early, late = await take(scene, 20), await take(scene, 20)
    await refuse(scene, early, wait_s=1)
    ceiling = await learned(scene, "ceiling")
    assert ceiling == pytest.approx(98)
    for item in late:
        await refuse(scene, [item], wait_s=1)
    assert await learned(scene, "ceiling") == ceiling
    assert await learned(scene, "refusals") == 1
    assert await learned(scene, "burst_share") == 0.5


async def test_an_answer_of_a_call_from_before_does_not_end_a_refusal(scene: Scene) -> None:
    await scene.submit(10)
    one, two = await take(scene, 2)
    await refuse(scene, [one])
    await scene.settle([two])
    assert await learned(scene, "refusals") == 1


# The call sent ahead -----------------------------------------------------------------------------


async def test_after_a_rest_one_call_is_let_out_until_it_is_answered(scene: Scene) -> None:
    await scene.submit(10)
    await scene.submit(10, resource=1)
    await refuse(scene, await take(scene, 1))
    await later(scene, 2)
    claim = await scene.claim()
    assert (len(claim.items), claim.reason) == (1, "cooldown")
    for resource in (0, 1):
        again = await scene.claim(resource=resource, worker_id=uuid7())
        assert resting(again)
        assert again.wait_s is not None
        assert again.wait_s <= 1
    await scene.settle(claim.items)
    assert len(await take(scene)) == 9
    assert len(await take(scene, resource=1)) == 10


async def test_after_a_second_the_call_sent_ahead_has_been_borne(scene: Scene) -> None:
    await scene.submit(10)
    await refuse(scene, await take(scene, 1))
    await later(scene, 2)
    assert len(await take(scene)) == 1
    await later(scene, 1)
    assert len(await take(scene)) == 9


async def test_an_answer_to_the_call_sent_ahead_wakes_the_rest_at_once(scene: Scene) -> None:
    """Else a worker would learn of it only at the end of the second."""
    await scene.submit(10)
    await refuse(scene, await take(scene, 1))
    await later(scene, 2)
    ahead = await take(scene)
    settled = await scene.settle(ahead)
    assert settled[0].wakes
    assert await scene.due_in() <= 0


async def test_the_next_refusal_sends_one_ahead_again(scene: Scene) -> None:
    await scene.submit(20)
    await refuse(scene, await take(scene, 5))
    for _ in range(3):
        await later(scene, 70)
        ahead = await take(scene)
        assert len(ahead) == 1
        await refuse(scene, ahead)
    assert await learned(scene, "refusals") == 4


async def test_a_refused_call_sent_ahead_does_not_lower_the_ceiling_below_what_was_accepted(
    scene: Scene,
) -> None:
    """It says that the minute is full, so what was accepted is the measure of one."""
    await scene.submit(40)
    items = await take(scene, 20)
    await refuse(scene, items[12:])
    assert await learned(scene, "ceiling") >= 12
    await later(scene, 2)
    ahead = await take(scene)
    assert len(ahead) == 1
    await refuse(scene, ahead)
    assert await learned(scene, "refusals") == 2
    assert await learned(scene, "ceiling") == 12
    await scene.settle(older(items[:12], 2))
    await later(scene, 62)
    await scene.settle(await take(scene))
    await learn(scene, "burst_share = 1")
    assert len(await take(scene)) == 12 - 1


# Accounts without money --------------------------------------------------------------------------


async def test_an_account_without_money_rests_the_whole_connection(scene: Scene) -> None:
    other = await scene.add_connection(model="small")
    for resource in range(4):
        await scene.submit(3, resource=resource)
    await refuse(scene, await take(scene, 1), "insufficient_quota")
    for resource in range(3):
        claim = await scene.claim(resource=resource)
        assert resting(claim)
        assert claim.wait_s == pytest.approx(60, abs=1)
    assert len(await take(scene, resource=other)) == 3
    # It says nothing about the rate.
    assert await learned(scene, "ceiling") is None
    await later(scene, 61)
    assert len(await take(scene, resource=2)) == 3


async def test_an_account_without_money_rests_for_as_long_as_is_said(scene: Scene) -> None:
    await scene.submit(3)
    one, two = await take(scene, 2)
    await refuse(scene, [one], "insufficient_quota", wait_s=300)
    await refuse(scene, [two], "insufficient_quota", wait_s=10)
    assert (await scene.claim()).wait_s == pytest.approx(300, abs=1)


# Calls at once -----------------------------------------------------------------------------------


@pytest.mark.parametrize("code", ["concurrency_limited", "overloaded"])
async def test_too_many_calls_at_once_become_seven_tenths_once_per_cohort(
    scene: Scene, code: str
) -> None:
    await scene.submit(40)
    items = await take(scene, 20)
    await refuse(scene, items[:1], code)
    assert await learned(scene, "concurrency") == pytest.approx(14)
    await refuse(scene, items[1:6], code)
    assert await learned(scene, "concurrency") == pytest.approx(14)
    # Nobody said anything about the rate.
    assert await learned(scene, "ceiling") is None
    assert await learned(scene, "burst_share") == 1
    # Only an overload asks for a rest.
    rest = await rest_s(scene)
    assert rest < 0.5 if code == "concurrency_limited" else 1 <= rest <= 1.1
    await later(scene, 2)
    claim = await scene.claim()
    assert claim.items == []
    assert (claim.reason, claim.waits_for) == ("concurrency", await scene.model_scope_id())


async def test_a_second_cohort_lowers_the_calls_at_once_again(scene: Scene) -> None:
    await scene.submit(60)
    items = await take(scene, 20)
    await refuse(scene, items, "concurrency_limited")
    assert await learned(scene, "concurrency") == pytest.approx(14)
    await scene.settle(await take(scene))
    items = await take(scene)
    assert len(items) == 14
    await refuse(scene, items[:4], "concurrency_limited")
    assert await learned(scene, "concurrency") == pytest.approx(0.7 * 14, abs=0.2)
    await scene.settle(items[4:])


async def test_the_calls_at_once_never_fall_below_one(scene: Scene) -> None:
    await scene.submit(10)
    await refuse(scene, await take(scene, 1), "overloaded")
    assert await learned(scene, "concurrency") == 1
    await later(scene, 2)
    assert len(await take(scene)) == 1


async def test_the_calls_at_once_bound_all_resources_of_the_model(scene: Scene) -> None:
    for resource in range(3):
        await scene.submit(10, resource=resource)
    await learn(scene, "concurrency = 6")
    assert len(await take(scene, 4)) == 4
    assert len(await take(scene, resource=1)) == 2
    assert len(await take(scene, resource=2)) == 10


async def test_outcomes_of_other_models_do_not_count_as_calls_at_once(scene: Scene) -> None:
    """They came back in the same settlement, from another model on the connection."""
    await scene.submit(10)
    await scene.submit(50, resource=2)
    small, large = await take(scene), await take(scene, resource=2)
    await refuse(scene, [small[0], *large], "overloaded")
    assert await learned(scene, "concurrency", resource=2) == pytest.approx(0.7 * 50)
    assert await learned(scene, "concurrency") == pytest.approx(0.7 * 10)


async def test_calls_at_once_grow_by_one_with_each_round_that_uses_half(scene: Scene) -> None:
    await scene.submit(60)
    await learn(scene, "concurrency = 8")
    items = await take(scene)
    assert len(items) == 8
    await scene.settle(items)
    assert await learned(scene, "concurrency") == pytest.approx(9)
    items = await take(scene)
    assert len(items) == 9
    # One by one, as long as half of it is out or just was.
    for item in items:
        await scene.settle([item])
    assert await learned(scene, "concurrency") == pytest.approx(9 + 5 / 9, abs=0.15)


async def test_calls_at_once_that_are_not_used_do_not_grow(scene: Scene) -> None:
    await scene.submit(60)
    await learn(scene, "concurrency = 8")
    for _ in range(5):
        await scene.settle(await take(scene, 3))
    assert await learned(scene, "concurrency") == 8


# The ceiling of the rate -------------------------------------------------------------------------


async def test_the_ceiling_falls_to_what_was_accepted_in_the_minute(scene: Scene) -> None:
    await scene.submit(200)
    await scene.settle(await take(scene, 1))
    await later(scene, 100)
    await scene.settle(await take(scene, 30))
    await later(scene, 30)
    accepted, refused = await take(scene, 25), await take(scene, 15)
    await refuse(scene, refused)
    assert await learned(scene, "ceiling") == 30 + 25
    await scene.settle(accepted)
    await later(scene, 2)
    # It binds the minute, refused calls included: providers count those as well.
    claim = await scene.claim()
    assert (claim.items, claim.reason) == ([], "capacity")
    await later(scene, 30)
    await scene.settle(await take(scene))
    assert len(await take(scene)) == 55 - 25 - 15 - 1


async def test_the_ceiling_is_of_the_model(scene: Scene) -> None:
    await learn(scene, RISING)
    for resource in range(3):
        await scene.submit(100, resource=resource)
    assert len(await take(scene)) == 60
    assert len(await take(scene, resource=1)) == 0
    assert len(await take(scene, resource=2)) == 100


async def test_a_second_fall_within_ten_seconds_is_to_nine_tenths(scene: Scene) -> None:
    await scene.submit(200)
    await learn(scene, f"{RISING}, concurrency = null")
    await scene.settle(await take(scene, 60))
    await learn(scene, "throttled_at = now() - interval '5 seconds'")
    await later(scene, 30)
    await learn(scene, "throttled_at = now() - interval '5 seconds', ceiling = 100")
    items = await take(scene, 40)
    assert len(items) == 40
    await refuse(scene, items[:1])
    assert await learned(scene, "ceiling") == pytest.approx(90)


async def test_the_ceiling_rises_faster_and_faster_while_it_is_used(scene: Scene) -> None:
    await learn(scene, RISING)
    await scene.submit(400)
    ceiling, before = 60.0, 0.0
    for _ in range(3):
        share = await learned(scene, "raise_share")
        assert share >= before
        # All that fits is used; the next rise comes five seconds later.
        items = await take(scene)
        await scene.settle(items[2:])
        ceiling *= 1 + share
        assert await learned(scene, "ceiling") == pytest.approx(ceiling)
        await scene.settle(items[:2])
        assert await learned(scene, "ceiling") == pytest.approx(ceiling)
        await later(scene, 6)
        before = share


async def test_a_ceiling_that_is_not_used_does_not_rise(scene: Scene) -> None:
    await learn(scene, RISING)
    await scene.submit(100)
    await scene.settle(await take(scene, 20))
    await later(scene, 10)
    await scene.settle(await take(scene, 20))
    assert await learned(scene, "ceiling") == 60


async def test_refused_calls_are_no_use_of_the_ceiling(scene: Scene) -> None:
    await learn(scene, RISING)
    await scene.submit(100)
    items = await take(scene)
    assert len(items) == 60
    await refuse(scene, items[10:], wait_s=0)
    await learn(scene, f"{RISING}, refusals = 0")
    await scene.settle(items[:10])
    assert await learned(scene, "ceiling") == 60


async def test_after_a_refusal_the_ceiling_stays_for_a_while(scene: Scene) -> None:
    await scene.submit(100)
    await learn(scene, RISING)
    items = await take(scene, 58)
    await refuse(scene, items[:1])
    ceiling = await learned(scene, "ceiling")
    wait = float(await learned(scene, "extract(epoch from raise_at - throttled_at)"))
    assert 20 <= wait <= 40
    await scene.settle(items[1:])
    await later(scene, 10)
    assert await learned(scene, "ceiling") == ceiling


async def test_a_ceiling_ends_when_it_reaches_a_known_limit(scene: Scene) -> None:
    await scene.limit(requests=62)
    # A limit that people changed since would end it at once.
    await scene.do("update limits set updated_at = now() - interval '1 hour'")
    await learn(scene, RISING)
    await scene.submit(300)
    one, *items = await take(scene)
    assert len(items) == 59
    await learn(scene, "raise_at = now() + interval '1 minute'")
    await scene.settle([one])
    assert await learned(scene, "ceiling") == 60
    await learn(scene, "raise_at = now()")
    await scene.settle(items)
    assert await learned(scene, "ceiling") is None
    assert len(await take(scene)) == 2


async def test_a_limit_that_people_change_ends_the_ceiling(scene: Scene) -> None:
    await learn(scene, RISING)
    await scene.submit(300)
    await scene.limit(requests=100)
    await scene.settle(await take(scene, 1))
    assert await learned(scene, "ceiling") is None


async def test_the_burst_halves_below_the_limit_and_recovers(scene: Scene) -> None:
    await scene.limit(requests=600)
    await scene.do("update limits set updated_at = now() - interval '1 hour'")
    await scene.submit(400)
    await learn(scene, GROWN)
    shares: list[float] = []
    for _ in range(4):
        # A call sent ahead after a refusal would say nothing of bursts.
        await learn(scene, "refusals = 0")
        await refuse(scene, await take(scene, 1), wait_s=0)
        shares.append(await learned(scene, "burst_share"))
        await later(scene, 2)
    assert shares == [0.5, 0.25, 0.125, 0.125]
    await learn(scene, "ceiling = null, refusals = 0, burst_share = 0.5")
    # Half of the six seconds' rate of 600 a minute.
    items = (await scene.claim(burst_s=6)).items
    assert len(items) == pytest.approx(30, abs=1)
    await later(scene, 40)
    await scene.settle(older(items, 40))
    assert await learned(scene, "burst_share") == pytest.approx(0.625)
    for _ in range(4):
        await later(scene, 6)
        await scene.settle(await take(scene, 1))
    assert await learned(scene, "burst_share") == 1


async def test_a_refusal_near_the_limit_leaves_the_burst(scene: Scene) -> None:
    await scene.limit(requests=20)
    await scene.submit(40)
    items = await take(scene)
    assert len(items) == 20
    await refuse(scene, items[:1])
    assert await learned(scene, "burst_share") == 1


async def test_a_young_model_is_paced_by_its_ceiling_but_not_bound(scene: Scene) -> None:
    """Nobody can tell yet what its minute will bear."""
    await scene.submit(300)
    await learn(scene, YOUNG)
    # One a second, as its ceiling says; all the rest where nothing is paced.
    assert len((await scene.claim(burst_s=0.3)).items) == 1
    paced = await scene.claim(burst_s=0.3)
    assert (paced.items, paced.reason) == ([], "pace")
    assert len(await take(scene, 200)) == 200


async def test_a_model_is_young_for_a_minute(scene: Scene) -> None:
    await scene.submit(20)
    await refuse(scene, await take(scene, 2))
    assert await learned(scene, "is_window") is False
    await later(scene, 61)
    await scene.settle(await take(scene, 1))
    await refuse(scene, await take(scene, 1))
    assert await learned(scene, "is_window") is True


async def test_a_young_models_ceiling_doubles_every_two_seconds(scene: Scene) -> None:
    await scene.submit(300)
    await learn(scene, YOUNG)
    ceiling = 60.0
    for _ in range(3):
        await scene.settle(await take(scene, 20))
        ceiling *= 2
        assert await learned(scene, "ceiling") == ceiling
        await scene.settle(await take(scene, 1))
        assert await learned(scene, "ceiling") == ceiling
        await later(scene, 3)


# Late and again ----------------------------------------------------------------------------------

STATE = (
    "select to_jsonb(s), to_jsonb(r) from scope_states s"
    " join resources o on o.workspace_id = s.workspace_id and o.model_scope_id = s.scope_id"
    " join resource_states r on r.workspace_id = o.workspace_id and r.resource_id = o.resource_id"
    " where o.resource_id = %s"
)


@pytest.mark.parametrize(
    "code", ["rate_limited", "overloaded", "concurrency_limited", "insufficient_quota"]
)
async def test_a_late_refusal_teaches_nothing(scene: Scene, code: str) -> None:
    await scene.submit(5)
    items = await take(scene)
    await scene.reclaim(items)
    before = await scene.rows(STATE, scene.resource_id)
    await refuse(scene, items, code, wait_s=30)
    assert await scene.rows(STATE, scene.resource_id) == before
    assert len(await take(scene)) == 5


@pytest.mark.parametrize("outcome", [Outcome.answered, Outcome.throttled])
async def test_a_repeated_settlement_teaches_nothing(scene: Scene, outcome: Outcome) -> None:
    await scene.submit(30)
    items = await take(scene)
    await scene.settle(items, outcome)
    before = await scene.rows(STATE, scene.resource_id)
    await scene.settle(items, outcome)
    assert await scene.rows(STATE, scene.resource_id) == before


async def test_an_answer_after_another_one_teaches_nothing(scene: Scene) -> None:
    await scene.submit(1)
    (first,) = await take(scene)
    await scene.reclaim([first])
    await scene.settle(await take(scene))
    before = await scene.rows(STATE, scene.resource_id)
    await scene.settle([first], used=(10, 999))
    assert await scene.rows(STATE, scene.resource_id) == before


# Slow start --------------------------------------------------------------------------------------


async def test_a_fresh_model_of_no_known_limit_starts_slowly_and_doubles(scene: Scene) -> None:
    await scene.submit(100)
    await scene.submit(100, resource=1)
    for out in (2, 4, 8, 16):
        claim = await scene.claim(slow_start=2)
        assert (len(claim.items), claim.reason) == (out, "concurrency")
        # The other resource of the model has no start of its own.
        assert (await scene.claim(resource=1, slow_start=2)).items == []
        await scene.settle(claim.items)
    assert len((await scene.claim(slow_start=0)).items) == 70


async def test_a_known_limit_makes_a_slow_start_needless(scene: Scene) -> None:
    await scene.submit(100)
    items = (await scene.claim(slow_start=2)).items
    await scene.settle(items, observed=[says(scene, 50)])
    assert len((await scene.claim(slow_start=2)).items) == 48


async def test_a_slow_start_ends_at_the_first_refusal(scene: Scene) -> None:
    await scene.submit(100)
    await refuse(scene, (await scene.claim(slow_start=8)).items[:1])
    assert await learned(scene, "is_fresh") is False
    await later(scene, 2)
    await scene.settle((await scene.claim(slow_start=8)).items)
    await learn(scene, "ceiling = null")
    assert len((await scene.claim(slow_start=8)).items) > 80


async def test_a_slow_start_ends_after_5000_answers(scene: Scene) -> None:
    await scene.submit(10)
    await learn(scene, "answered = 4998")
    one, two = await take(scene, 2)
    await scene.settle([one])
    assert await learned(scene, "is_fresh") is True
    await scene.settle([two])
    assert await learned(scene, "is_fresh") is False


# Outputs -----------------------------------------------------------------------------------------


async def outputs(scene: Scene, resource: int = 0) -> list[int]:
    return await scene.value(
        "select recent_outputs from resource_states where resource_id = %s",
        scene.resource_ids[resource],
    )


async def answer(scene: Scene, tokens: Sequence[int]) -> None:
    """Answers of these lengths, one settlement each."""
    for item, output in zip(await take(scene, len(tokens)), tokens, strict=True):
        await scene.settle([item], used=(10, output))


async def test_outputs_are_learned_from_twenty_answers_on(scene: Scene) -> None:
    await scene.submit(30)
    await answer(scene, range(1, 20))
    assert await outputs(scene) == list(range(19, 0, -1))
    (item,) = await take(scene, 1)
    assert (item.output_tokens, item.expected_output_tokens) == (1024, 1024)
    await scene.settle([item], used=(10, 20))
    # Nine of ten were no longer than 18; the mean is that of the flow itself by now.
    assert await scene.rows(
        "select output_high, output_mean from resource_states where resource_id = %s",
        scene.resource_id,
    ) == [(18, 10.5)]
    (item,) = await take(scene, 1)
    assert (item.output_tokens, item.expected_output_tokens) == (18, 10)


async def test_what_was_learned_reserves_no_more_than_the_request_allows(scene: Scene) -> None:
    batch = await scene.submit(30)
    await answer(scene, [50] * 20)
    await scene.size(batch, [(10, 7)] * 30)
    (item,) = await take(scene, 1)
    assert (item.output_tokens, item.expected_output_tokens) == (7, 7)


async def test_outputs_are_of_the_resource(scene: Scene) -> None:
    """Resources of one model may ask for different things."""
    await scene.submit(30)
    await scene.submit(30, resource=1)
    await answer(scene, [50] * 20)
    assert await outputs(scene, 1) == []
    assert [i.output_tokens for i in await take(scene, 1, resource=1)] == [1024]


async def test_at_most_eight_outputs_of_a_settlement_are_kept_the_newest_first(
    scene: Scene,
) -> None:
    await scene.submit(30)
    await scene.settle(await take(scene, 12), outputs=range(1, 13))
    await scene.settle(await take(scene, 3), outputs=[21, 22, 23])
    assert await outputs(scene) == [23, 22, 21, 12, 11, 10, 9, 8, 7, 6, 5]


async def test_at_most_a_hundred_outputs_are_kept(scene: Scene) -> None:
    await scene.submit(120)
    for first in range(0, 112, 8):
        await scene.settle(await take(scene, 8), outputs=range(first, first + 8))
    assert await outputs(scene) == list(range(111, 11, -1))


async def test_answers_without_a_count_and_refusals_teach_no_lengths(scene: Scene) -> None:
    await scene.submit(30)
    items = await take(scene)
    await scene.settle(items[:10], used=None)
    await scene.settle(items[10:20], Outcome.throttled, wait_s=0)
    await scene.settle(items[20:], Outcome.rejected)
    assert await outputs(scene) == []
