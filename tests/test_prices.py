"""What calls cost, and what a batch may spend."""

from decimal import Decimal

import pytest

from app import batches, prices
from app.errors import InputError, ValidationError
from app.prices import Price
from app.queue import Outcome
from tests.scene import Scene


def price(model: str = "gpt-4o-mini", **changes: object) -> Price:
    known: dict[str, object] = {
        "model": model,
        "input_per_million": Decimal("0.15"),
        "cached_per_million": Decimal("0.075"),
        "output_per_million": Decimal("0.6"),
        "currency": "USD",
    }
    return Price(**known | changes)  # pyright: ignore[reportArgumentType] - a test's own words


async def put(scene: Scene, *those: Price, own: bool = False) -> None:
    async with scene.db.transaction() as conn:
        await prices.put(conn, those, workspace_id=scene.workspace_id if own else None)
    # It counts for calls claimed from then on.
    await scene.do("update prices set valid_from = valid_from - interval '1 hour'")


async def costs(scene: Scene) -> list[tuple[object, ...]]:
    return await scene.rows(
        "select seq, attempt, outcome::text, cost_nano, currency from attempts order by 1, 2"
    )


async def test_every_attempt_has_its_cost_and_the_batch_their_sum(database: str) -> None:
    async with Scene.open(database) as scene:
        await put(scene, price())
        batch = await scene.submit(3)
        first = (await scene.claim()).items
        await scene.settle(first[:1], used=(10, 20))
        await scene.settle(first[1:2], Outcome.unreachable, used=None, wait_s=0)
        await scene.settle(first[2:], Outcome.throttled, used=None, wait_s=0)
        await scene.calm()
        await scene.settle((await scene.claim()).items, used=(1000, 1))
        assert await costs(scene) == [
            (0, 1, "answered", 13_500, "USD"),
            (1, 1, "unreachable", 0, "USD"),
            (1, 2, "answered", 150_600, "USD"),
            (2, 1, "throttled", 0, "USD"),
            (2, 2, "answered", 150_600, "USD"),
        ]
        done = await scene.batch(batch.batch_id)
        assert (done.cost_nano, done.currency) == (314_700, "USD")
        await scene.check_books()


async def test_without_a_price_nothing_is_said_of_the_cost(database: str) -> None:
    async with Scene.open(database) as scene:
        await put(scene, price("other-model"))
        batch = await scene.submit(1)
        await scene.settle((await scene.claim()).items)
        assert await costs(scene) == [(0, 1, "answered", None, None)]
        assert (await scene.batch(batch.batch_id)).currency is None


async def test_the_most_specific_price_counts_and_a_workspace_may_have_its_own(
    database: str,
) -> None:
    async with Scene.open(database) as scene:
        free = {"cached_per_million": None, "output_per_million": Decimal(0)}
        await put(
            scene,
            price("*", input_per_million=Decimal(9), **free),
            price("gpt-4o*", input_per_million=Decimal(5), **free),
            price("gpt-4o-mini*", input_per_million=Decimal(1), **free),
        )
        await scene.submit(1)
        await scene.settle((await scene.claim()).items, used=(10, 20))
        await put(scene, price("*", input_per_million=Decimal(7), **free), own=True)
        await scene.submit(1)
        await scene.settle((await scene.claim()).items, used=(10, 20))
        found = await scene.rows("select cost_nano from attempts order by ended_at")
        assert found == [(10_000,), (70_000,)]


async def test_a_later_price_changes_no_history(database: str) -> None:
    async with Scene.open(database) as scene:
        await put(scene, price())
        await scene.submit(2)
        items = (await scene.claim()).items
        await scene.settle(items[:1], used=(10, 20))
        await put(scene, price(output_per_million=Decimal(6)))
        # Claimed before: at the price of its claim... which the test has just moved into the past.
        await scene.settle(items[1:], used=(10, 20))
        assert [row[3] for row in await costs(scene)] == [13_500, 121_500]


async def test_a_late_answer_is_paid_once(database: str) -> None:
    """A lost call that reports after all costs what it cost, also when another had answered meanwhile."""
    async with Scene.open(database) as scene:
        await put(scene, price())
        batch = await scene.submit(1)
        lost = (await scene.claim()).items
        await scene.reclaim(lost)
        await scene.settle((await scene.claim()).items, used=(10, 20))
        assert (await scene.batch(batch.batch_id)).cost_nano == 13_500
        await scene.settle(lost, used=(10, 20))
        await scene.settle(lost, used=(10, 20))
        assert (await scene.batch(batch.batch_id)).cost_nano == 27_000
        assert (
            await scene.value("select count(*) from attempts where corrected_at is not null") == 1
        )
        await scene.check_books()


# What a batch may spend ---------------------------------------------------------------------------


async def submit_bound(scene: Scene, items: int, **bounds: object) -> batches.Batch:
    """A batch with a budget, each item of 100 input and at most 100 output tokens."""
    batch = await scene.submit(items)
    await scene.size(batch, [(100, 100)] * items)
    await bind(scene, batch, **bounds)
    return batch


async def bind(scene: Scene, batch: batches.Batch, **bounds: object) -> None:
    """What PATCH does."""
    async with scene.db.transaction() as conn:
        held = await batches.hold(conn, workspace_id=scene.workspace_id, batch_id=batch.batch_id)
        max_tokens = bounds.get("max_tokens")
        max_cost_nano = bounds.get("max_cost_nano")
        assert max_tokens is None or isinstance(max_tokens, int)
        assert max_cost_nano is None or isinstance(max_cost_nano, int)
        to = batches.Steering(
            priority=held.priority,
            weight=held.weight,
            expires_at=held.expires_at,
            capacity=held.capacity,
            max_tokens=max_tokens,
            max_cost_nano=max_cost_nano,
            currency=None if max_cost_nano is None else "USD",
            pause_reason=held.pause_reason,
        )
        await batches.steer(
            conn,
            workspace_id=scene.workspace_id,
            batch_id=batch.batch_id,
            to=to,
            amounts=batches.budget(max_tokens, max_cost_nano),
        )
        await batches.resume(conn, workspace_id=scene.workspace_id, batch_id=batch.batch_id)


async def exhaust(scene: Scene) -> int:
    """What maintenance does every second; how many batches it paused."""
    async with scene.db.transaction() as conn:
        found = await batches.exhausted(conn)
        return sum([await batches.pause_exhausted(conn, batch=batch) for batch in found])


@pytest.mark.parametrize(
    ("bounds", "raised", "reason"),
    [
        # 100 input tokens at 150 and 100 output tokens at 600 billionths: 75,000 each.
        ({"max_cost_nano": 4 * 75_000 + 10}, {"max_cost_nano": 10 * 75_000}, "max-cost"),
        ({"max_tokens": 4 * 200 + 10}, {"max_tokens": 10 * 200}, "max-tokens"),
    ],
)
async def test_a_batch_pauses_when_it_has_spent_what_it_may(
    database: str, bounds: dict[str, int], raised: dict[str, int], reason: str
) -> None:
    async with Scene.open(database) as scene:
        await put(scene, price())
        batch = await submit_bound(scene, 6, **bounds)
        items = (await scene.claim()).items
        assert len(items) == 4  # as many as fit
        assert (await scene.claim()).items == []
        assert await exhaust(scene) == 0  # calls are out: something may come back
        await scene.settle(items, used=(100, 100))
        assert (await scene.claim()).items == []
        assert await exhaust(scene) == 1
        assert await exhaust(scene) == 0
        paused = await scene.batch(batch.batch_id)
        assert (paused.is_paused, paused.pause_reason, paused.status) == (True, reason, "running")
        kinds = await scene.rows("select kind::text from events order by last_no desc limit 1")
        assert kinds == [("batch-paused",)]
        await bind(scene, batch, **raised)
        assert (await scene.batch(batch.batch_id)).pause_reason is None
        rest = (await scene.claim()).items
        assert len(rest) == 2
        await scene.settle(rest, used=(100, 100))
        assert (await scene.batch(batch.batch_id)).status == "completed"
        await scene.check_books()


async def test_what_calls_did_not_use_comes_back(database: str) -> None:
    async with Scene.open(database) as scene:
        await put(scene, price())
        batch = await submit_bound(scene, 6, max_cost_nano=2 * 75_000)
        items = (await scene.claim()).items
        assert len(items) == 2
        assert (await scene.claim()).items == []
        await scene.settle(items[:1], used=(10, 0))
        await scene.settle(items[1:], Outcome.unsent, used=None)
        assert await exhaust(scene) == 0
        assert len((await scene.claim()).items) == 1
        assert (await scene.batch(batch.batch_id)).cost_nano == 1_500
        await scene.check_books()


async def test_a_lost_call_keeps_its_reservation_until_it_reports(database: str) -> None:
    async with Scene.open(database) as scene:
        await put(scene, price())
        await submit_bound(scene, 2, max_cost_nano=75_000)
        lost = (await scene.claim()).items
        await scene.reclaim(lost)
        assert (await scene.claim()).items == []
        await scene.check_books()
        await scene.settle(lost, used=(10, 20))
        await scene.check_books()
        used = await scene.value(
            "select g.cost_nano from ledger g join limits l using (workspace_id, limit_id)"
            " where l.period = 'lifetime'"
        )
        assert used == 13_500


async def test_a_budget_that_comes_late_counts_what_was_used_before(database: str) -> None:
    async with Scene.open(database) as scene:
        await put(scene, price())
        batch = await scene.submit(4)
        await scene.size(batch, [(100, 100)] * 4)
        await scene.settle((await scene.claim(2)).items, used=(100, 100))
        await bind(scene, batch, max_cost_nano=3 * 75_000)
        assert len((await scene.claim()).items) == 1


async def test_one_that_fits_nothing_pauses_at_once(database: str) -> None:
    async with Scene.open(database) as scene:
        await put(scene, price())
        batch = await submit_bound(scene, 2, max_cost_nano=10)
        assert (await scene.claim()).items == []
        assert await exhaust(scene) == 1
        assert (await scene.batch(batch.batch_id)).pause_reason == "max-cost"


async def test_what_cannot_be_priced_cannot_be_bounded(database: str) -> None:
    async with Scene.open(database) as scene:
        async with scene.db.connection() as conn:
            with pytest.raises(ValidationError, match="price of gpt-4o-mini"):
                await prices.currency_of(
                    conn, workspace_id=scene.workspace_id, resource_ids=[scene.resource_id]
                )
        await put(scene, price(currency="EUR"))
        async with scene.db.connection() as conn:
            assert (
                await prices.currency_of(
                    conn, workspace_id=scene.workspace_id, resource_ids=[scene.resource_id]
                )
                == "EUR"
            )


# Files --------------------------------------------------------------------------------------------


def test_a_file_of_prices_is_csv_or_json() -> None:
    expected = [price(), price("gpt-4o", cached_per_million=None, output_per_million=Decimal(10))]
    assert expected == prices.parse(
        "model,input,cached,output,currency\ngpt-4o-mini,0.15,0.075,0.6,usd\ngpt-4o,0.15,,10,USD\n"
    )
    assert expected == prices.parse(
        '[{"model": "gpt-4o-mini", "input": 0.15, "cached": 0.075, "output": 0.6},'
        ' {"model": "gpt-4o", "inputPerMillion": "0.15", "output": 10}]'
    )


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("model,input\na,1\n", "Line 2 has no output"),
        ("model,input,output\na,-1,2\n", "input '-1' is no price"),
        ("model,input,output\na,nan,2\n", "input 'nan' is no price"),
        ("model,input,output,color\na,1,2,red\n", "'color', which is no field"),
        ("model,input,output,currency\na,1,2,dollars\n", "'DOLLARS' is no currency"),
        ("model,input,output,valid_from\na,1,2,tomorrow\n", "'tomorrow' is no date"),
        ("[1]", "Price 1 is not an object"),
        ("[{", "not valid JSON"),
    ],
)
def test_a_wrong_file_says_where_and_what(text: str, said: str) -> None:
    with pytest.raises(InputError, match=said):
        prices.parse(text)
