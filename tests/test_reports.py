"""The reporting views, row by row, on a small history that was checked by hand."""

import asyncio
import importlib
import json
import os
import sys
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from app import reports
from app.batches import Batch
from app.db import Connection
from app.errors import UsageError
from app.ids import uuid7
from app.queue import Outcome
from tests.scene import Scene
from tests.test_prices import price, put, submit_bound

#: The calls of the history, moved to times around the end of a UTC day: item, attempt, claimed, ended, latency.
MOVED = [
    (0, 1, "2026-03-01 23:59:10Z", "2026-03-01 23:59:30Z", 1000),
    (1, 1, "2026-03-01 23:59:50Z", "2026-03-01 23:59:59.999Z", None),
    (1, 2, "2026-03-01 23:59:59.999Z", "2026-03-02 00:00:00Z", 2000),
    (2, 1, "2026-03-02 00:00:10Z", "2026-03-02 00:00:59.999Z", None),
    (2, 2, "2026-03-02 00:00:59.999Z", "2026-03-02 00:01:00Z", 3000),
]


async def roll_up(scene: Scene) -> None:
    """What maintenance does until nothing is due."""
    while True:
        async with scene.db.transaction() as conn:
            if not await reports.roll_up(conn):
                return


async def history(scene: Scene) -> Batch:
    """Four items: answered, retried, refused and then answered, cancelled before it began."""
    await put(scene, price())
    batch = await scene.submit(4)
    first = (await scene.claim(3)).items
    await scene.settle(first[:1], used=(10, 20))
    await scene.settle(first[1:2], Outcome.unreachable, used=None, wait_s=0, error_code="timeout")
    await scene.settle(first[2:], Outcome.throttled, used=None, wait_s=0)
    await scene.calm()
    again = (await scene.claim(2)).items
    assert [(item.seq, item.attempt) for item in again] == [(1, 2), (2, 2)]
    await scene.settle(again, used=(1000, 1))
    await scene.cancel(batch)
    await scene.mark(batch)
    await roll_up(scene)
    for seq, attempt, claimed, end, latency in MOVED:
        await scene.do(
            "insert into rollup_due select batch_day, date_trunc('minute', at, 'UTC') from attempts,"
            " unnest(array[ended_at, %s::timestamptz]) at where seq = %s and attempt = %s",
            end,
            seq,
            attempt,
        )
        await scene.do(
            "update attempts set claimed_at = %s, started_at = claimed_at, ended_at = %s, latency_ms = %s"
            " where seq = %s and attempt = %s",
            claimed,
            end,
            latency,
            seq,
            attempt,
        )
    await scene.do(
        "update batches set name = 'tickets', created_at = '2026-03-01 23:59:00Z',"
        " started_at = '2026-03-01 23:59:10Z', cancelled_at = '2026-03-02 00:01:40Z',"
        " completed_at = '2026-03-02 00:01:40Z'"
    )
    await scene.do("update items set ended_at = '2026-03-02 00:01:40Z' where seq = 3")
    await roll_up(scene)
    return batch


async def seen(scene: Scene, columns: str, rest: str) -> list[tuple[Any, ...]]:
    """Rows as an analyst far from Greenwich sees them."""
    async with scene.db.transaction() as conn:
        await conn.execute("set local timezone = 'Pacific/Auckland'")
        query = f"select {columns} from report.{rest}".encode()  # noqa: S608 - a test's own words
        return await (await conn.execute(query)).fetchall()


def at(text: str) -> datetime:
    return datetime.fromisoformat(f"2026-03-{text}Z")


async def test_every_view_on_a_small_history(database: str) -> None:
    async with Scene.open(database) as scene:
        batch = await history(scene)

        assert await seen(
            scene,
            "workspace_name, environment_name, batch_name, batch_type, status, waiting_s, running_s, items,"
            " pending_items, running_items, completed_items, failed_items, cancelled_items, retries,"
            " input_tokens, output_tokens, cost, currency, items_per_minute, eta_at",
            "batches",
        ) == [
            (
                *("w", "e", "tickets", "async", "cancelled", Decimal("10.000"), Decimal("150.000")),
                *(4, 0, 0, 3, 0, 1, 2, 2010, 22, Decimal("0.0003147"), "USD", Decimal("1.2"), None),
            )
        ]

        assert await seen(
            scene,
            "item_index, resource_name, model, status, ended_reason, attempts, failures, latency_ms,"
            " input_tokens, output_tokens, error_code",
            "items order by item_index",
        ) == [
            (0, "r0", "gpt-4o-mini", "completed", "answered", 1, 0, 1000, 10, 20, None),
            (1, "r0", "gpt-4o-mini", "completed", "answered", 2, 1, 2000, 1000, 1, None),
            (2, "r0", "gpt-4o-mini", "completed", "answered", 2, 0, 3000, 1000, 1, None),
            (3, "r0", "gpt-4o-mini", "cancelled", "cancelled", 0, 0, None, None, None, None),
        ]

        assert await seen(
            scene,
            "item_index, attempt, outcome, error_code, ended_at, queue_wait_ms, latency_ms, input_tokens,"
            " output_tokens, cost",
            "attempts order by 1, 2",
        ) == [
            (0, 1, "answered", None, at("01 23:59:30"), 10_000, 1000, 10, 20, Decimal("0.0000135")),
            (1, 1, "unreachable", "timeout", at("01 23:59:59.999"), 50_000, None, 0, 0, 0),
            (1, 2, "answered", None, at("02 00:00:00"), None, 2000, 1000, 1, Decimal("0.0001506")),
            (2, 1, "throttled", "rate_limited", at("02 00:00:59.999"), 70_000, None, 0, 0, 0),
            (2, 2, "answered", None, at("02 00:01:00"), None, 3000, 1000, 1, Decimal("0.0001506")),
        ]

        assert await seen(
            scene,
            "minute_at, resource_name, connection_name, calls, answered, throttled, unreachable, lost,"
            " retries, tokens, cost, currency",
            "throughput_per_minute order by minute_at",
        ) == [
            (at("01 23:59:00"), "r0", "c", 2, 1, 0, 1, 0, 0, 30, Decimal("0.0000135"), "USD"),
            (at("02 00:00:00"), "r0", "c", 2, 1, 1, 0, 0, 1, 1001, Decimal("0.0001506"), "USD"),
            (at("02 00:01:00"), "r0", "c", 1, 1, 0, 0, 0, 1, 1001, Decimal("0.0001506"), "USD"),
        ]
        assert await seen(
            scene, "hour_at, calls, answered, tokens, cost", "throughput_per_hour order by hour_at"
        ) == [
            (at("01 23:00:00"), 2, 1, 30, Decimal("0.0000135")),
            (at("02 00:00:00"), 3, 2, 2002, Decimal("0.0003012")),
        ]
        # The day is of the UTC calendar, wherever the reader is.
        assert await seen(
            scene,
            "day_on, calls, answered, input_tokens, output_tokens, cost",
            "cost_per_day order by 1",
        ) == [
            (date(2026, 3, 1), 2, 1, 10, 20, Decimal("0.0000135")),
            (date(2026, 3, 2), 3, 2, 2000, 2, Decimal("0.0003012")),
        ]
        # The upper bounds of buckets, each a tenth longer than the one before.
        assert await seen(
            scene,
            "hour_at, answered, latency_p50_ms, latency_p99_ms, first_answers, queue_wait_p50_ms",
            "latency_per_hour order by hour_at",
        ) == [
            (at("01 23:00:00"), 1, 1051, 1051, 1, 10_354),
            (at("02 00:00:00"), 2, 2048, 3299, None, None),
        ]
        assert await seen(
            scene, "hour_at, outcome, error_code, calls", "failures_per_hour order by 1, 2"
        ) == [
            (at("01 23:00:00"), "unreachable", "timeout", 1),
            (at("02 00:00:00"), "throttled", "rate_limited", 1),
        ]
        assert await seen(
            scene, "error_code, outcome, calls, open_items, sample_message", "failures order by 1"
        ) == [
            ("rate_limited", "throttled", 1, 0, "as the test wishes"),
            ("timeout", "unreachable", 1, 0, "as the test wishes"),
        ]
        assert await seen(scene, "*", "dead_letters") == []
        assert await seen(scene, "*", "queue") == []
        assert await seen(
            scene, "model, is_own, input_per_million, output_per_million, currency", "prices"
        ) == [("gpt-4o-mini", False, Decimal("0.15"), Decimal("0.6"), "USD")]
        assert await seen(scene, "due_minutes, newest_at", "rollup_state") == [
            (0, at("02 00:01:00"))
        ]
        texts = await seen(
            scene, "item_index, request::text, response::text", "item_texts order by 1"
        )
        assert texts[0][1].startswith('{"messages"')
        assert [row[2] is None for row in texts] == [False, False, False, True]
        assert await seen(scene, "host, state, in_flight_calls", "workers") == [
            ("elsewhere", "running", 0)
        ]
        health = await seen(
            scene, "table_name, partitions", "table_health where table_name = 'attempts'"
        )
        assert health[0][1] >= 3
        assert batch.batch_id == (await seen(scene, "batch_id", "batches"))[0][0]


async def test_deliveries_say_whom_we_told_how_late(database: str) -> None:
    """A batch's end, refused and then taken, and a file refused as a whole, which still waits."""
    async with Scene.open(database) as scene:
        hook, refused = uuid7(), uuid7()
        await scene.do(
            "insert into endpoints (workspace_id, endpoint_id, environment_id, name, url, event_types,"
            " secret_key_id, secret, secret_hint) values (%s, %s, %s, 'ends',"
            " 'https://example.com:8443/hook/s3cret?token=s3cret',"
            " '{batch.completed,batch.failed}', 'k', 's3cret', 's3cret')",
            *(scene.workspace_id, hook, scene.environment_id),
        )
        batch = await scene.submit(1)
        await scene.settle((await scene.claim()).items)
        await scene.do("update batches set name = 'tickets'")
        await scene.do(
            "update deliveries set status = 'delivered', attempt = 3, failures = 1,"
            " created_at = '2026-03-01 12:00:00Z', ended_at = '2026-03-01 12:00:07.5Z'"
        )
        # The second try's process vanished.
        for attempt, started, latency, status, error in (
            (1, "2026-03-01 12:00:01Z", 20, 503, "bad_status"),
            (3, "2026-03-01 12:00:07Z", 500, 204, None),
        ):
            await scene.do(
                "insert into delivery_attempts select workspace_id, batch_day, batch_id, event_no, endpoint_id,"
                " %s, %s, %s, %s, %s, 's3cret' from deliveries",
                *(attempt, started, latency, status, error),
            )
        await scene.do(
            "insert into submissions (workspace_id, batch_id, environment_id, input_file_id, endpoint,"
            " completion_window, name, created_by_api_key_id, expires_at, status, decided_at)"
            " values (%s, %s, %s, %s, '/v1/chat/completions', '24h', 'mistaken', %s, now(), 'failed', now())",
            *(scene.workspace_id, refused, scene.environment_id, uuid7(), uuid7()),
        )
        await scene.do(
            "select webhooks_append(%s, %s, %s, %s, 'batch-failed', 0, 'batch.failed', '2026-03-02 12:00:00Z')",
            *(scene.workspace_id, scene.environment_id, batch.batch_day, refused),
        )
        assert await seen(
            scene,
            "workspace_name, environment_name, batch_id, batch_name, item_index, endpoint_id, endpoint_kind,"
            " endpoint_name, endpoint_origin, event_kind, event_type, status, tries, failures,"
            " last_status_code, last_error_code, last_latency_ms, last_tried_at, next_try_at, ended_at",
            "deliveries order by created_at",
        ) == [
            (
                *("w", "e", batch.batch_id, "tickets", None, hook, "webhook", "ends"),
                *("https://example.com:8443", "batch-completed", "batch.completed"),
                *(
                    "delivered",
                    3,
                    1,
                    204,
                    None,
                    500,
                    at("01 12:00:07"),
                    None,
                    at("01 12:00:07.500"),
                ),
            ),
            (
                *("w", "e", refused, "mistaken", None, hook, "webhook", "ends"),
                *("https://example.com:8443", "batch-failed", "batch.failed"),
                *("pending", 0, 0, None, None, None, None, at("02 12:00:00"), None),
            ),
        ]
        assert await seen(scene, "lag_s", "deliveries where status = 'delivered'") == [
            (Decimal("7.500"),)
        ]
        # Neither secrets nor what was sent: the URL's path may hold a token.
        assert "s3cret" not in str(await seen(scene, "d::text", "deliveries d"))


async def test_percentiles_are_at_most_a_tenth_too_high(database: str) -> None:
    async with Scene.open(database) as scene:
        await scene.submit(100)
        await scene.settle((await scene.claim()).items)
        await scene.do(
            "update attempts set latency_ms = (seq + 1) * 10, ended_at = '2026-03-01 12:00:00Z',"
            " claimed_at = (select created_at from batches) + (seq + 1) * interval '1 second'"
        )
        await scene.do(
            "insert into rollup_due select batch_day, '2026-03-01 12:00:00Z' from attempts limit 1"
        )
        await roll_up(scene)
        found = await seen(
            scene,
            "answered, latency_p50_ms, latency_p90_ms, latency_p95_ms, latency_p99_ms, queue_wait_p50_ms",
            "latency_per_hour where hour_at = '2026-03-01 12:00Z'",
        )
        answered, *percentiles = found[0]
        assert answered == 100
        for true, shown in zip([500, 900, 950, 990, 50_000], percentiles, strict=True):
            assert true <= shown <= true * 1.1


async def test_the_queue_capacity_keys_and_dead_letters(database: str) -> None:
    async with Scene.open(database, rpm=100) as scene:
        key = await scene.api_key()
        await scene.submit(5, api_key_id=key, priority=3)
        items = (await scene.claim(2)).items
        await scene.settle(items[:1], Outcome.rejected, used=None, error_code="invalid_request")
        await roll_up(scene)
        assert await seen(
            scene,
            "resource_name, priority, open_batches, pending_items, unstarted_items, running_items,"
            " oldest_age_s >= 0",
            "queue",
        ) == [("r0", 3, 1, 3, 3, 1, True)]
        assert await seen(
            scene,
            "error_code, outcome, calls, open_items, last_seen_at is not null",
            "failures",
        ) == [("invalid_request", "rejected", 1, 1, True)]
        assert await seen(
            scene, "item_index, ended_reason, error_code, resource_name", "dead_letters"
        ) == [(0, "rejected", "invalid_request", "r0")]
        assert await seen(
            scene,
            "scope_kind, scope_name, sum(used_requests), max(limit_requests), sum(reserved_requests)",
            "capacity_per_minute where source = 'given' group by 1, 2",
        ) == [("resource", "r0", 2, 100, 1)]
        assert await seen(
            scene, "api_key_name, batches, items, failed_items, day_on", "api_key_usage"
        ) == [("k", 1, 5, 1, datetime.now(UTC).date())]


async def test_what_a_batch_may_cost_is_a_limit_like_others(database: str) -> None:
    async with Scene.open(database) as scene:
        await put(scene, price())
        await submit_bound(scene, 6, max_cost_nano=150_000)
        query = "capacity_per_minute where limit_cost is not null"
        money = "scope_kind, period, used_cost, limit_cost, cost_share"
        items = (await scene.claim()).items
        bound = Decimal("0.00015")
        assert await seen(scene, money, query) == [("batch", "lifetime", bound, bound, 1)]
        await scene.settle(items, used=(10, 20))
        used = Decimal("0.000027")
        assert await seen(scene, money, query) == [
            ("batch", "lifetime", used, bound, Decimal("0.1800"))
        ]
        # A limit of another kind says nothing of money.
        others = "capacity_per_minute where limit_cost is null"
        assert set(await seen(scene, "used_cost, cost_share", others)) == {(None, None)}


async def test_a_late_correction_is_counted_where_it_belongs(database: str) -> None:
    """Rolled up, corrected, rolled up again, and once more for nothing."""
    async with Scene.open(database) as scene:
        await put(scene, price())
        await scene.submit(1)
        lost = (await scene.claim()).items
        await scene.reclaim(lost)
        await scene.do("update attempts set ended_at = '2026-03-01 12:00:30Z'")
        await scene.do("insert into rollup_due select batch_day, '2026-03-01 12:00Z' from attempts")
        await roll_up(scene)
        outcomes = "outcome::text, calls, input_tokens, cost_nano"
        query = f"select {outcomes} from rollup_minutes order by 1"  # noqa: S608 - constants
        assert await scene.rows(query) == [("lost", 1, 0, 0)]
        await scene.settle(lost, used=(10, 20))
        await roll_up(scene)
        assert await scene.rows(query) == [("answered", 1, 10, 13_500)]
        hours = f"select {outcomes} from rollup_hours order by 1"  # noqa: S608 - constants
        assert await scene.rows(hours) == [("answered", 1, 10, 13_500)]
        await scene.do("insert into rollup_due select batch_day, minute_at from rollup_minutes")
        await roll_up(scene)
        assert await scene.rows(query) == [("answered", 1, 10, 13_500)]


async def test_what_is_not_committed_yet_is_counted_once_it_is(database: str) -> None:
    """A settlement that is still open while its minute is rolled up is not missed."""
    async with Scene.open(database) as scene, scene.session() as slow:
        other = await scene.add_connection()
        await scene.submit(1)
        await scene.submit(1, resource=other)
        await scene.settle((await scene.claim()).items, conn=slow)
        await scene.settle((await scene.claim(resource=other)).items)
        await roll_up(scene)
        total = "select sum(calls)::int from rollup_minutes"
        assert await scene.value(total) == 1
        await slow.commit()
        await roll_up(scene)
        assert await scene.value(total) == 2


# Getting data out ---------------------------------------------------------------------------------


async def report(database: str, *arguments: str, succeeds: bool = True) -> bytes:
    """What ``sluice report`` prints, on standard output or, refused, on standard error."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "app.cli", "report", *arguments),
        env=os.environ | {"SLUICE_DATABASE_URL": database},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    out, err = await process.communicate()
    assert (process.returncode == 0) == succeeds, err.decode()
    return out if succeeds else err


async def test_any_view_is_printed_with_filters_in_every_format(
    database: str, tmp_path: Path
) -> None:
    async with Scene.open(database) as scene:
        await history(scene)
        shown = (await report(database, "items", "--where", "status=cancelled")).decode()
        assert shown.splitlines()[0].split()[:3] == [
            "workspace_name",
            "environment_name",
            "batch_id",
        ]
        assert len(shown.splitlines()) == 2
        rows = json.loads(
            await report(
                database, "attempts", "--format", "json", "--since", "999w", "--limit", "2"
            )
        )
        assert [row["ended_at"] for row in rows] == [
            "2026-03-02T00:01:00.000Z",
            "2026-03-02T00:00:59.999Z",
        ]
        assert (
            json.loads(await report(database, "attempts", "--since", "1h", "--format", "json"))
            == []
        )
        file = tmp_path / "attempts.parquet"
        await report(database, "attempts", "--format", "parquet", "--output", str(file))
        table: Any = importlib.import_module("pyarrow.parquet").read_table(file)
        assert table.num_rows == 5
        assert sum(table["cost"].to_pylist()) == pytest.approx(0.0003147)
        assert str(table.schema.field("ended_at").type) == "timestamp[us, tz=UTC]"
        refusal = (await report(database, "nothing", succeeds=False)).decode()
        assert "There is no view 'nothing'" in refusal


@pytest.mark.parametrize(
    ("view", "wish", "said"),
    [
        ("items", {"where": {"colour": "red"}}, "no column 'colour'"),
        ("items", {"where": {"item_index": "red"}}, "invalid input syntax"),
        ("queue", {"since": timedelta(hours=1)}, "shows the present"),
    ],
)
async def test_a_filter_that_makes_no_sense_is_refused(
    conn: Connection, view: str, wish: dict[str, Any], said: str
) -> None:
    known = await reports.views(conn)
    with pytest.raises(UsageError, match=said):
        async for _ in reports.rows(conn, view=known[view], **wish):
            pass
