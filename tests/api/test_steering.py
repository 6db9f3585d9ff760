"""Weight, deadline, pause, and changes of a batch while it runs."""

import asyncio
from datetime import UTC, datetime, timedelta
from typing import Any

import psycopg
import pytest

from app import queue
from app.doorbell import WORK
from tests.api.conftest import Json, Service


async def patch(service: Service, batch: Json, status: int = 200, **change: Any) -> Json:  # noqa: ANN401 - JSON
    answer = await service.http.patch(f"{service.batches}/{batch['batchId']}", json=change)
    assert answer.status_code == status, answer.text
    return answer.json()


async def post(service: Service, batch: Json, verb: str, status: int = 200) -> Json:
    answer = await service.http.post(f"{service.batches}/{batch['batchId']}/{verb}")
    assert answer.status_code == status, answer.text
    return answer.json()


def moment(text: str) -> datetime:
    return datetime.fromisoformat(text)


async def expire(service: Service) -> int:
    """What maintenance does every second."""
    ended = 0
    async with service.db.connection() as conn:
        flows = await queue.expired(conn)
    for flow in flows:
        if flow.workspace_id != service.environment.workspace_id:
            continue
        async with service.db.transaction() as conn:
            ended += await queue.expire(conn, flow=flow)
    return ended


async def pass_deadline(service: Service, batch: Json) -> None:
    """Let its deadline be a second ago."""
    async with service.db.connection() as conn:
        for table in ("flows", "batches"):
            await conn.execute(
                f"update {table} set expires_at = now() - interval '1 s' where batch_id = %s".encode(),  # noqa: S608 - ours
                (batch["batchId"],),
            )


async def test_weight_and_deadline_are_kept(service: Service) -> None:
    batch = await service.create(weight=2.5, completionWindow="30m")
    assert batch["weight"] == 2.5
    left = moment(batch["expiresAt"]) - moment(batch["createdAt"])
    assert abs(left - timedelta(minutes=30)) < timedelta(seconds=5)
    at = "2099-01-31T12:00:00+02:00"
    batch = await service.create(expiresAt=at)
    assert (batch["expiresAt"], batch["weight"]) == ("2099-01-31T10:00:00.000Z", 1)
    batch = await service.create(weight=None, expiresAt=None, completionWindow=None, capacity=None)
    assert (batch["expiresAt"], batch["expiredAt"], batch["capacity"]) == (None, None, None)


WRONG: list[tuple[Json, str]] = [
    ({"weight": 0.05}, "weight"),
    ({"weight": 101}, "weight"),
    ({"weight": "heavy"}, "weight"),
    ({"weight": True}, "weight"),
    ({"completionWindow": "59s"}, "completionWindow"),
    ({"completionWindow": "91d"}, "completionWindow"),
    ({"completionWindow": "soon"}, "completionWindow"),
    ({"completionWindow": "999999999d"}, "completionWindow"),
    ({"completionWindow": 3600}, "completionWindow"),
    ({"expiresAt": "2099-01-01T00:00:00"}, "expiresAt"),
    ({"expiresAt": "tomorrow"}, "expiresAt"),
    ({"expiresAt": 4070908800}, "expiresAt"),
    ({"expiresAt": "2001-01-01T00:00:00Z"}, "expiresAt"),
    ({"expiresAt": "9999-12-31T23:59:59-10:00"}, "expiresAt"),
    ({"expiresAt": "2099-01-01T00:00:00Z", "completionWindow": "1h"}, "expiresAt"),
    ({"capacity": [{"period": "fortnight", "requests": 1}]}, "capacity[0].period"),
    ({"capacity": {"period": "day"}}, "capacity"),
    ({"priority": 101}, "priority"),
]


async def test_what_cannot_steer_a_batch_is_refused(service: Service) -> None:
    running = await service.create()
    for change, path in WRONG:
        body = {"type": "ASYNC", "items": [service.item()]} | change
        made = await service.http.post(service.batches, json=body)
        changed = await service.http.patch(f"{service.batches}/{running['batchId']}", json=change)
        for answer in (made, changed):
            assert answer.status_code == 400, (change, answer.text)
            assert answer.json()["errorCode"] == "GENERIC_VALIDATION"
            assert [e["path"] for e in answer.json()["details"]["errors"]] == [path]
    assert await service.added() == (1, 1)


async def test_a_change_must_change_something(service: Service) -> None:
    batch = await service.create()
    path = f"{service.batches}/{batch['batchId']}"
    for content in (b"", b"{", b"[]", b"null", b"{}", b'{"colour": 1}', b"\xff"):
        answer = await service.http.patch(path, content=content)
        assert answer.status_code == 400, content
        assert [e["path"] for e in answer.json()["details"]["errors"]] == ["body"]
    told = await patch(service, batch, 400, isPaused="yes")
    assert told["details"]["errors"][0]["path"] == "isPaused"


async def test_a_repeat_is_answered_after_its_deadline(service: Service) -> None:
    """The deadline of a request that was taken long ago is not judged again."""
    at = (datetime.now(UTC) + timedelta(hours=1)).isoformat()
    batch = await service.create(idempotencyKey="once", expiresAt=at)
    await pass_deadline(service, batch)
    again = await service.create(idempotencyKey="once", expiresAt=at)
    assert again["batchId"] == batch["batchId"]


async def test_a_priority_counts_at_the_next_claim(service: Service) -> None:
    first = await service.create(*"ab")
    second = await service.create(*"cd")
    told = await patch(service, second, priority=5)
    assert (told["priority"], told["weight"]) == (5, 1)
    claimed = await service.claim(2)
    assert {str(item.batch_id) for item in claimed} == {second["batchId"]}
    await patch(service, first, priority=-100)
    assert {str(i.batch_id) for i in await service.claim(2)} == {first["batchId"]}


async def test_a_raised_batch_does_not_live_on_savings(service: Service) -> None:
    """It enters its new company as a newcomer: what it did not get below counts for nothing."""
    raised = await service.create(*["x"] * 50)
    others = await service.create(*["y"] * 50, priority=1)
    assert {str(i.batch_id) for i in await service.claim(20)} == {others["batchId"]}
    await patch(service, raised, priority=1)
    claimed = [str(item.batch_id) for item in await service.claim(20)]
    # Its first sixteen count half, and all twenty would be savings.
    assert 8 <= claimed.count(raised["batchId"]) <= 15


async def test_a_weight_counts_at_the_next_claim(service: Service) -> None:
    heavy = await service.create(*["x"] * 100)
    await service.create(*["y"] * 100)
    await patch(service, heavy, weight=3)
    await service.claim(80)  # the first sixteen of each count half
    claimed = [str(item.batch_id) for item in await service.claim(40)]
    assert 29 <= claimed.count(heavy["batchId"]) <= 31


async def test_limits_come_change_and_go_while_it_runs(service: Service) -> None:
    batch = await service.create(*["x"] * 10)
    told = await patch(service, batch, capacity=[{"period": "minute", "requests": 2}])
    assert told["capacity"][0]["requests"] == 2
    assert len(await service.claim()) == 2
    assert not await service.claim()
    told = await patch(service, batch, capacity=[{"period": "minute", "requests": 5}])
    assert len(await service.claim()) == 3  # what was used stays used
    assert not await service.claim()
    told = await patch(service, batch, capacity=None)
    assert told["capacity"] is None
    assert len(await service.claim()) == 5


async def test_a_paused_batch_is_passed_by(service: Service) -> None:
    batch = await service.create(*"ab")
    other = await service.create("c")
    told = await post(service, batch, "pause")
    assert (told["isPaused"], told["waitingFor"]["reason"]) == (True, "PAUSED")
    assert (await post(service, batch, "pause"))["isPaused"]  # again: nothing more happens
    assert {str(i.batch_id) for i in await service.claim()} == {other["batchId"]}
    assert not await service.claim()
    assert (await post(service, batch, "resume"))["isPaused"] is False
    assert len(await service.claim()) == 2
    third = await service.create("d")
    assert (await patch(service, third, isPaused=True, priority=3))["isPaused"]
    assert not await service.claim()
    told = await patch(service, third, isPaused=False, weight=2)
    assert (told["isPaused"], told["priority"], told["weight"]) == (False, 3, 2)
    assert len(await service.claim()) == 1


async def test_a_change_rings_for_a_look(service: Service) -> None:
    """The resource is due at once, whatever it waited for."""
    batch = await service.create(*"ab", capacity=[{"period": "day", "requests": 1}])
    assert len(await service.claim()) == 1
    due = "select next_at <= clock_timestamp() from ready where resource_id = %s"
    async with service.db.connection() as conn:
        assert await (await conn.execute(due, (service.resource_id,))).fetchone() == (False,)
        await patch(service, batch, capacity=None)
        assert await (await conn.execute(due, (service.resource_id,))).fetchone() == (True,)


async def test_workers_are_rung_for_after_a_change(lone_service: Service) -> None:
    service = lone_service
    batch = await service.create()
    async with await psycopg.AsyncConnection.connect(service.db.url, autocommit=True) as conn:
        await service.context.ringer.flush()
        await conn.execute(f"listen {WORK}".encode())
        changes: list[Json] = [{"weight": 2}, {"capacity": []}, {"isPaused": False}]
        for change in changes:
            await patch(service, batch, **change)
            rung = [n.payload async for n in conn.notifies(timeout=10, stop_after=1)]
            assert rung == [str(service.resource_id)]


async def test_changes_at_once_are_all_kept(service: Service) -> None:
    """Also beside claims: none is lost, none fails, no lock is waited for in a circle."""
    batch = await service.create(*["x"] * 60)

    async def work() -> set[str | None]:
        crossed: set[str | None] = set()
        for _ in range(10):
            try:
                await service.claim(2)
            except psycopg.Error as error:
                crossed.add(error.sqlstate)
        return crossed

    changes = [
        patch(service, batch, priority=7),
        patch(service, batch, weight=3),
        patch(service, batch, completionWindow="1h"),
        patch(service, batch, capacity=[{"period": "minute", "requests": 30}]),
        post(service, batch, "pause"),
        post(service, batch, "resume"),
    ]
    working = [asyncio.create_task(work()) for _ in range(2)]
    await asyncio.gather(*changes)
    assert set[str | None]().union(*await asyncio.gather(*working)) <= queue.CROSSED
    await post(service, batch, "resume")
    told = await service.get(f"{service.batches}/{batch['batchId']}", includesItems="false")
    assert (told["priority"], told["weight"], told["isPaused"]) == (7, 3, False)
    assert told["expiresAt"]
    assert told["capacity"][0]["requests"] == 30


@pytest.mark.parametrize("end", ["completed", "cancelled"])
async def test_what_has_ended_is_not_steered(service: Service, end: str) -> None:
    batch = await service.create()
    if end == "completed":
        await service.work()
    else:
        await post(service, batch, "cancel")
    for told in (
        await patch(service, batch, 409, priority=1),
        await post(service, batch, "pause", 409),
        await post(service, batch, "resume", 409),
    ):
        assert told["errorCode"] == "BATCH_ALREADY_ENDED"
        assert told["details"] == {"status": end.upper()}


async def test_a_deadline_ends_what_was_not_begun(service: Service) -> None:
    batch = await service.create(*"abc", completionWindow="1m")
    [begun] = await service.claim(1)
    await pass_deadline(service, batch)
    assert not await service.claim()
    assert await expire(service) == 2
    await service.settle([begun])  # a call in flight is let finish
    told = await service.get(f"{service.batches}/{batch['batchId']}")
    assert (told["status"], told["completed"], told["failed"]) == ("FAILED", 1, 2)
    assert told["expiredAt"]
    assert "deadline" in told["errorMessage"]
    assert [i["errorCode"] for i in told["items"]] == [None, "EXPIRED", "EXPIRED"]
    assert [i["status"] for i in told["items"]] == ["COMPLETED", "FAILED", "FAILED"]


async def test_a_deadline_can_be_moved_and_removed(service: Service) -> None:
    batch = await service.create(*"ab", completionWindow="1h")
    await pass_deadline(service, batch)
    assert not await service.claim()
    told = await patch(service, batch, completionWindow="2h")
    assert moment(told["expiresAt"]) > moment(batch["expiresAt"])
    assert len(await service.claim(1)) == 1
    told = await patch(service, batch, expiresAt=None)
    assert told["expiresAt"] is None
    assert await expire(service) == 0
    assert len(await service.claim()) == 1
