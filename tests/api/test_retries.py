"""Trying items of a batch again: which ones, in which states, with which events and counters."""

import asyncio
from typing import Any

from app.queue import Outcome
from tests.api.conftest import Json, Service


async def failed_batch(service: Service) -> Json:
    """Six items: one answered, two refused, one too long, two that the provider never answered."""
    items = [service.item(f"{n}", customId=f"c-{n}", maxAttempts=1) for n in range(6)]
    made = await service.http.post(service.batches, json={"type": "ASYNC", "items": items})
    taken = await service.claim()
    await service.settle(taken[:1])
    await service.fail(taken[1:3])
    await service.settle(taken[3:4], Outcome.rejected, error="context_length")
    await service.settle(taken[4:], Outcome.unreachable, error="server_error")
    batch = await service.get(f"{service.batches}/{made.json()['batchId']}")
    assert (batch["status"], batch["failed"], batch["completed"]) == ("FAILED", 5, 1)
    return batch


async def retry(
    service: Service,
    batch: Json,
    status: int = 200,
    **body: Any,  # noqa: ANN401 - JSON
) -> Json:
    answer = await service.http.post(f"{service.batches}/{batch['batchId']}/retry", json=body)
    assert answer.status_code == status, answer.text
    return answer.json()


async def indexes(service: Service, batch: Json, status: str = "PENDING") -> list[int]:
    page = await service.get(f"{service.batches}/{batch['batchId']}/items", status=status)
    return [item["index"] for item in page["data"]]


async def test_all_that_failed_is_tried_again_and_the_batch_goes_on(service: Service) -> None:
    batch = await failed_batch(service)
    answer = await service.http.post(f"{service.batches}/{batch['batchId']}/retry")
    told = answer.json()
    assert told["retried"] == 5
    again = told["batch"]
    assert (again["status"], again["pending"], again["failed"]) == ("RUNNING", 5, 0)
    assert (again["completed"], again["completedPercentage"]) == (1, 16.67)
    assert (again["completedAt"], again["errorMessage"]) == (None, None)
    await service.work()
    done = await service.get(f"{service.batches}/{batch['batchId']}")
    assert (done["status"], done["completed"]) == ("COMPLETED", 6)
    assert [item["attempts"] for item in done["items"]] == [1, 2, 2, 2, 2, 2]
    async with service.follow(batch) as stream:
        told_of = [action for _, action, _ in await stream.rest()]
    ends = [a for a in told_of if a in ("batch-running", "batch-failed", "batch-completed")]
    assert ends == ["batch-running", "batch-failed", "batch-running", "batch-completed"]
    assert told_of.count("item-retrying") == 5


async def test_chosen_items_are_tried_again_by_id_name_or_number(service: Service) -> None:
    batch = await failed_batch(service)
    told = await retry(
        service,
        batch,
        itemIds=[batch["items"][1]["itemId"]],
        customIds=["c-3"],
        indexes=[4, 0],  # 0 was answered: it stays
    )
    assert told["retried"] == 3
    assert await indexes(service, batch) == [1, 3, 4]
    assert (await retry(service, batch, indexes=[1, 3]))["retried"] == 0


async def test_items_are_tried_again_by_their_error(service: Service) -> None:
    batch = await failed_batch(service)
    assert (await retry(service, batch, errorCodes=["server_error"]))["retried"] == 2
    assert await indexes(service, batch) == [4, 5]
    told = await retry(service, batch, errorCodes=["bad_request", "nothing"], indexes=[2, 3])
    assert told["retried"] == 1
    assert await indexes(service, batch) == [2, 4, 5]


async def test_what_fails_again_meanwhile_is_not_tried_for_ever(service: Service) -> None:
    batch = await failed_batch(service)
    answer = asyncio.create_task(retry(service, batch))
    await asyncio.wait_for(answer, 20)
    await service.fail(await service.claim())
    state = await service.get(f"{service.batches}/{batch['batchId']}")
    assert (state["status"], state["failed"]) == ("FAILED", 5)


WRONG: list[Json] = [
    {"statuses": []},
    {"statuses": ["COMPLETED"]},
    {"indexes": ["1"]},
    {"itemIds": ["x"]},
    {"errorCodes": "a"},
    {"completionWindow": "1y"},
]


async def test_a_retry_names_what_it_does_not_know(service: Service) -> None:
    batch = await failed_batch(service)
    other = await service.create("x")
    told = await retry(
        service,
        batch,
        400,
        itemIds=[other["items"][0]["itemId"]],
        customIds=["c-1", "none"],
        indexes=[6],
    )
    assert [e["path"] for e in told["details"]["errors"]] == [
        "itemIds[0]",
        "indexes[0]",
        "customIds[1]",
    ]
    for wrong in WRONG:
        assert (await retry(service, batch, 400, **wrong))["errorCode"] == "GENERIC_VALIDATION"
    assert await indexes(service, batch, "FAILED") == [1, 2, 3, 4, 5]


async def test_a_cancelled_batch_goes_on_only_when_that_is_asked_for(service: Service) -> None:
    batch = await service.create("a", "b", "c")
    taken = await service.claim(2)
    await service.fail(taken[:1])
    path = f"{service.batches}/{batch['batchId']}"
    await service.http.post(f"{path}/cancel")
    assert (await retry(service, batch, 409))["errorCode"] == "BATCH_CANCELLED"
    told = await retry(service, batch, 409, statuses=["FAILED", "CANCELLED"])
    assert told["errorCode"] == "BATCH_NOT_ENDED"
    await service.settle(taken[1:])
    told = await retry(service, batch, statuses=["failed", "cancelled"])
    assert (told["retried"], told["batch"]["status"]) == (2, "RUNNING")
    assert (told["batch"]["pending"], told["batch"]["cancelled"]) == (2, 0)
    await service.work()
    done = await service.get(path)
    assert (done["status"], done["completed"], done["cancelled"]) == ("COMPLETED", 3, 0)


async def test_what_of_a_cancelled_batch_is_not_tried_again_stays_cancelled(
    service: Service,
) -> None:
    batch = await service.create("a", "b", "c")
    path = f"{service.batches}/{batch['batchId']}"
    await service.http.post(f"{path}/cancel")
    told = await retry(service, batch, statuses=["CANCELLED"], indexes=[1])
    assert (told["retried"], told["batch"]["cancelled"]) == (1, 2)
    await service.work()
    done = await service.get(path)
    assert (done["status"], done["completed"], done["cancelled"]) == ("CANCELLED", 1, 2)
    assert [item["status"] for item in done["items"]] == ["CANCELLED", "COMPLETED", "CANCELLED"]


async def test_after_the_deadline_a_retry_brings_a_new_one(service: Service) -> None:
    batch = await service.create("a", completionWindow="1h")
    await service.fail(await service.claim())
    async with service.db.connection() as conn:
        for table in (b"update batches", b"update flows"):
            await conn.execute(
                table + b" set expires_at = clock_timestamp() - interval '1 s' where batch_id = %s",
                (batch["batchId"],),
            )
    assert (await retry(service, batch, 409))["errorCode"] == "DEADLINE_PASSED"
    told = await retry(service, batch, statuses=["EXPIRED"], completionWindow="2h")
    assert told["retried"] == 0
    told = await retry(service, batch, expiresAt=None)
    assert (told["retried"], told["batch"]["expiresAt"]) == (1, None)
    assert len(await service.claim()) == 1
