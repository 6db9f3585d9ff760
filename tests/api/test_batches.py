"""Reading, listing and cancelling batches and items."""

import asyncio
from typing import Any

import pytest

from app import batches, queue
from app.ids import item_id, uuid7
from app.queue import Outcome
from tests.api.conftest import Json, Service


async def settled_batch(service: Service) -> Json:
    """Four items: answered, failed, to be tried again, waiting."""
    batch = await service.create("a", "b", "c", "d")
    first, second, third = await service.claim(3)
    await service.settle([first])
    await service.fail([second])
    await service.retry([third])
    return await service.get(f"{service.batches}/{batch['batchId']}")


async def test_a_poll_shows_progress_and_items_in_order(service: Service) -> None:
    batch = await settled_batch(service)
    assert batch["status"] == "RUNNING"
    assert (batch["completed"], batch["failed"], batch["pending"], batch["running"]) == (1, 1, 2, 0)
    assert batch["completedPercentage"] == 50
    assert batch["totalPromptTokens"] == 7
    assert batch["totalOutputTokens"] == batch["totalCompletionTokens"] == 3
    assert batch["startedAt"]
    answered, failed, again, waiting = batch["items"]
    assert answered["response"]["data"] == {
        "id": "chatcmpl-1",
        "choices": [{"message": {"content": "ok"}}],
    }
    assert answered["response"]["headers"]["x-request-id"] == "req_1"
    assert answered["status"] == "COMPLETED"
    assert answered["outputTokens"] == answered["completionTokens"] == 3
    assert (answered["promptTokens"], answered["totalTokens"]) == (7, 10)
    assert answered["completedAt"]
    assert answered["startedAt"]
    assert (failed["status"], failed["errorCode"]) == ("FAILED", "bad_request")
    assert failed["errorMessage"] == "the provider said no"
    assert failed["errorDetails"] == {
        "statusCode": 400, "type": None, "code": None, "param": None, "retryable": False,
    }  # fmt: skip
    assert failed["response"] is None
    assert (again["status"], again["attempts"], again["retryCount"]) == ("PENDING", 1, 1)
    assert again["nextAttemptAt"]
    assert again["completedAt"] is None
    assert (waiting["status"], waiting["attempts"], waiting["nextAttemptAt"]) == (
        "PENDING",
        0,
        None,
    )


async def test_the_creator_is_shown_unless_unwanted(service: Service) -> None:
    batch = await service.create()
    path = f"{service.batches}/{batch['batchId']}"
    full = await service.get(path)
    assert full["createdByUser"] is None
    assert full["createdByApiKey"]["apiKeyId"] == str(service.key_id)
    assert service.key not in str(full)
    bare = await service.get(path, includesUsers="false", includesItems="False")
    assert not {"createdByUser", "createdByApiKey", "items", "itemsNextCursor"} & bare.keys()


GARBAGE = [
    ("includesItems=yes", "includesItems"),
    ("includesUsers=", "includesUsers"),
    ("includesItems=1", "includesItems"),
    ("itemsLimit=0", "itemsLimit"),
    ("itemsLimit=1001", "itemsLimit"),
    ("itemsLimit=ten", "itemsLimit"),
    ("itemsCursor=-1", "itemsCursor"),
    ("itemsCursor=99999999999999999999", "itemsCursor"),
    ("itemsStatus=DONE", "itemsStatus"),
]


async def test_garbage_in_the_query_is_refused(service: Service) -> None:
    batch = await service.create()
    for query, path in GARBAGE:
        answer = await service.http.get(f"{service.batches}/{batch['batchId']}?{query}")
        assert answer.status_code == 400
        assert answer.json()["details"]["errors"][0]["path"] == path


async def test_what_does_not_exist_is_not_found(service: Service) -> None:
    batch = await service.create()
    batch_id = uuid7()
    for method, tail in (("GET", ""), ("GET", "/items"), ("GET", "/events"), ("POST", "/cancel")):
        answer = await service.http.request(method, f"{service.batches}/{batch_id}{tail}")
        assert (answer.status_code, answer.json()) == (
            404,
            {
                "errorMessage": f"Completion Batch {batch_id} not found",
                "errorCode": "COMPLETION_BATCH_NOT_FOUND",
                "details": {},
            },
        )
    for unknown in (uuid7(), item_id(batches.UUID(batch["batchId"]), 1)):
        answer = await service.http.get(f"{service.batches}/{batch['batchId']}/{unknown}")
        assert answer.status_code == 404
        assert answer.json()["errorCode"] == "COMPLETION_BATCH_ITEM_NOT_FOUND"


async def test_an_item_is_found_by_its_id(service: Service) -> None:
    batch = await settled_batch(service)
    for item in batch["items"]:
        assert await service.get(f"{service.batches}/{batch['batchId']}/{item['itemId']}") == item


async def pages(service: Service, path: str, **params: str) -> list[list[Any]]:
    """Every page's data, by following the cursors."""
    found: list[list[Any]] = []
    cursor: str | None = None
    while True:
        more = params | ({"cursor": cursor} if cursor is not None else {})
        page = await service.get(path, **more)
        assert set(page) == {"data", "nextCursor"}
        found.append(page["data"])
        cursor = page["nextCursor"]
        if cursor is None:
            return found


async def test_items_come_in_pages(service: Service) -> None:
    batch = await service.create(*(f"{n}" for n in range(25)))
    path = f"{service.batches}/{batch['batchId']}/items"
    found = await pages(service, path, limit="10")
    assert [len(page) for page in found] == [10, 10, 5]
    assert [item["index"] for page in found for item in page] == list(range(25))
    assert [len(page) for page in await pages(service, path, limit="25")] == [25]
    await service.settle(await service.claim(3))
    done = await pages(service, path, status="completed", limit="2")
    assert [item["index"] for page in done for item in page] == [0, 1, 2]
    assert sum(len(page) for page in await pages(service, path, status="PENDING")) == 22


async def test_a_batch_shows_its_first_thousand_items_and_a_cursor(service: Service) -> None:
    created = await service.create(*(["x"] * 1001))
    assert (len(created["items"]), created["itemsNextCursor"]) == (1000, "1000")
    path = f"{service.batches}/{created['batchId']}"
    rest = await service.get(path, itemsCursor="1000")
    assert [item["index"] for item in rest["items"]] == [1000]
    assert rest["itemsNextCursor"] is None
    some = await service.get(path, itemsLimit="2", itemsStatus="pending")
    assert (len(some["items"]), some["itemsNextCursor"]) == (2, "2")


async def test_a_page_of_large_items_ends_early(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("app.api.pages.MOST_BYTES", 20_000)
    batch = await service.create(*(["x" * 1500] * 40))
    assert batch["itemsNextCursor"] == str(len(batch["items"]))
    found = await pages(service, f"{service.batches}/{batch['batchId']}/items")
    assert [len(page) for page in found] == [13, 13, 13, 1]
    assert [item["index"] for page in found for item in page] == list(range(40))


async def test_batches_are_listed_newest_first(service: Service) -> None:
    ids = [(await service.create())["batchId"] for _ in range(5)]
    found = await pages(service, service.batches, limit="2")
    assert [len(page) for page in found] == [2, 2, 1]
    assert [b["batchId"] for page in found for b in page] == ids[::-1]
    assert "items" not in found[0][0]
    await service.work()
    await service.create()
    done = await pages(service, service.batches, status="COMPLETED")
    assert sum(len(page) for page in done) == 5
    for query in ("status=DONE", "limit=0", "cursor=x"):
        assert (await service.http.get(f"{service.batches}?{query}")).status_code == 400


# Cancel -------------------------------------------------------------------------------------------


async def chores(service: Service) -> None:
    while service.context.chores:
        await asyncio.wait(set(service.context.chores))


async def test_cancel_closes_at_once_and_marks_every_item(service: Service) -> None:
    batch = await service.create("a", "b", "c")
    path = f"{service.batches}/{batch['batchId']}"
    answer = await service.http.post(f"{path}/cancel")
    assert answer.status_code == 200
    cancelled = answer.json()
    assert (cancelled["status"], cancelled["cancelled"], cancelled["pending"]) == (
        "CANCELLED",
        3,
        0,
    )
    assert cancelled["completedPercentage"] == 100
    assert cancelled["errorMessage"] == "Batch cancelled by user"
    assert await service.claim() == []
    await chores(service)
    read = await service.get(path)
    assert {i["status"] for i in read["items"]} == {"CANCELLED"}
    assert read["completedAt"]
    async with service.follow(batch) as stream:
        actions = [action for _, action, _ in await stream.rest()]
    assert actions == ["batch-created", *["item-cancelled"] * 3, "batch-cancelled"]


async def test_a_call_in_flight_when_cancelled_is_let_finish(service: Service) -> None:
    batch = await service.create("a", "b")
    taken = await service.claim(1)
    path = f"{service.batches}/{batch['batchId']}"
    cancelled = (await service.http.post(f"{path}/cancel")).json()
    assert (cancelled["status"], cancelled["running"], cancelled["cancelled"]) == (
        "CANCELLED",
        1,
        1,
    )
    await chores(service)
    await service.settle(taken)
    read = await service.get(path)
    assert (read["status"], read["completed"], read["cancelled"]) == ("CANCELLED", 1, 1)
    assert [i["status"] for i in read["items"]] == ["COMPLETED", "CANCELLED"]


async def test_a_cancel_under_way_may_be_repeated_and_an_ended_batch_is_refused(
    service: Service,
) -> None:
    batch = await service.create("a", "b")
    taken = await service.claim(1)
    path = f"{service.batches}/{batch['batchId']}/cancel"
    for _ in range(2):
        answer = await service.http.post(path)
        assert (answer.status_code, answer.json()["status"]) == (200, "CANCELLED")
        await chores(service)
    await service.settle(taken)
    again = await service.http.post(path)
    assert (again.status_code, again.json()["errorCode"]) == (409, "BATCH_ALREADY_ENDED")
    assert again.json()["details"] == {"status": "CANCELLED"}


async def test_a_batch_that_ended_cannot_be_cancelled(service: Service) -> None:
    batch = await service.create()
    await service.work()
    answer = await service.http.post(f"{service.batches}/{batch['batchId']}/cancel")
    assert answer.status_code == 409
    assert answer.json()["errorCode"] == "BATCH_ALREADY_ENDED"
    assert answer.headers["x-should-retry"] == "false"


async def test_marking_a_large_cancelled_batch_takes_several_steps(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = await service.create(*(["x"] * 10))
    steps: list[int] = []
    chunk = queue.cancel_chunk

    async def small(conn: Any, **given: Any) -> int:  # noqa: ANN401 - passes through
        steps.append(await chunk(conn, **given, most=4))
        return steps[-1]

    monkeypatch.setattr("app.queue.cancel_chunk", small)
    await service.http.post(f"{service.batches}/{batch['batchId']}/cancel")
    await chores(service)
    assert steps == [4, 4, 2, 0]


async def test_a_cancel_may_cut_the_calls_in_flight(service: Service) -> None:
    batch = await service.create("a", "b", "c")
    taken = await service.claim(2)
    path = f"{service.batches}/{batch['batchId']}"
    for garbage in ({"params": {"running": "stop"}}, {"json": {"running": 1}}, {"content": b"[]"}):
        assert (await service.http.post(f"{path}/cancel", **garbage)).status_code == 400  # pyright: ignore[reportArgumentType]
    answer = await service.http.post(f"{path}/cancel", json={"running": "abort"})
    cancelled = answer.json()
    assert (cancelled["status"], cancelled["running"], cancelled["cancelled"]) == (
        "CANCELLED", 0, 3,
    )  # fmt: skip
    await chores(service)
    await service.settle(taken)  # the worker had not heard of it
    read = await service.get(path)
    assert (read["completed"], read["cancelled"], read["totalOutputTokens"]) == (0, 3, 0)
    assert {i["status"] for i in read["items"]} == {"CANCELLED"}
    assert read["items"][0]["response"] is None
    calls = await service.get(f"{path}/{read['items'][0]['itemId']}/attempts")
    assert [(c["outcome"], c["outputTokens"]) for c in calls["data"]] == [("ANSWERED", 3)]
    async with service.follow(batch) as stream:
        actions = [action for _, action, _ in await stream.rest()]
    assert sorted(actions[2:]) == [
        "batch-cancelled",
        *["item-cancelled"] * 3,
        *["item-running"] * 2,
    ]
    assert actions[-1] == "batch-cancelled"


async def test_a_cancel_that_lets_calls_finish_may_become_one_that_cuts(service: Service) -> None:
    batch = await service.create("a", "b")
    await service.claim(1)
    path = f"{service.batches}/{batch['batchId']}/cancel"
    assert (await service.http.post(path, params={"running": "finish"})).json()["running"] == 1
    assert (await service.http.post(path, params={"running": "ABORT"})).json()["running"] == 0
    await chores(service)
    read = await service.get(path.removesuffix("/cancel"))
    assert (read["cancelled"], read["completedAt"] is not None) == (2, True)


# Filters ------------------------------------------------------------------------------------------


async def test_batches_are_found_by_what_they_are(service: Service) -> None:
    first = await service.create(name="Nightly Run", metadata={"team": "search", "n": 1})
    second = await service.create(name="other", metadata={"team": "ads"})
    await service.work()
    third = await service.create()

    async def found(**params: Any) -> list[int]:  # noqa: ANN401 - whatever the query takes
        answer = await service.http.get(service.batches, params=params)
        assert answer.status_code == 200, answer.text
        names = {b["batchId"]: n for n, b in enumerate((first, second, third))}
        return [names[batch["batchId"]] for batch in answer.json()["data"]]

    assert await found() == [2, 1, 0]
    assert await found(status="completed") == [1, 0]
    assert await found(status="COMPLETED,PENDING") == [2, 1, 0]
    assert await found(type="async") == [2, 1, 0]
    assert await found(type="SYNC,CALLBACK") == []
    assert await found(name="nightly") == [0]
    assert await found(name="%") == []
    assert await found(metadata="team=search") == [0]
    assert await found(metadata=["team=search", "n=1"]) == [0]
    assert await found(metadata=["team=search", "n=2"]) == []
    assert await found(createdAfter=second["createdAt"]) == [2, 1]
    assert await found(createdBefore=second["createdAt"]) == [0]
    assert await found(resource="small") == [2, 1, 0]
    assert await found(resource=str(service.resource_id)) == [2, 1, 0]
    assert await found(resource=str(uuid7())) == []
    assert await found(apiKeyId=str(service.key_id)) == [2, 1, 0]
    assert await found(apiKeyId=str(uuid7())) == []
    for garbage in (
        "type=LATER", "status=", "name=", "createdAfter=now", "createdBefore=2030-01-01",
        "resource=large", "apiKeyId=x", "metadata=team", "metadata==x",
    ):  # fmt: skip
        answer = await service.http.get(f"{service.batches}?{garbage}")
        name = garbage.split("=")[0]
        assert answer.status_code == 400, garbage
        assert answer.json()["details"]["errors"][0]["path"] == name


async def test_items_are_listed_backwards_and_by_error(service: Service) -> None:
    batch = await service.create(*(["x"] * 7))
    await service.fail(await service.claim(2))
    await service.settle(await service.claim(1), Outcome.rejected, error="context_length")
    path = f"{service.batches}/{batch['batchId']}/items"
    back = await pages(service, path, order="desc", limit="3")
    assert [[item["index"] for item in page] for page in back] == [[6, 5, 4], [3, 2, 1], [0]]
    failed = await pages(service, path, errorCode="bad_request", order="desc")
    assert [item["index"] for item in failed[0]] == [1, 0]
    both = await pages(service, path, errorCode="bad_request,context_length", limit="2")
    assert [item["index"] for page in both for item in page] == [0, 1, 2]
    some = await pages(service, path, status="FAILED,PENDING", limit="4")
    assert [item["index"] for page in some for item in page] == list(range(7))
    for garbage in ("order=up", "errorCode=", "status=x", "responseFormat=xml"):
        assert (await service.http.get(f"{path}?{garbage}")).status_code == 400


async def test_a_response_may_be_shown_as_the_provider_gave_it(service: Service) -> None:
    batch = await service.create("a")
    await service.work()
    bare = {"id": "chatcmpl-1", "choices": [{"message": {"content": "ok"}}]}
    path = f"{service.batches}/{batch['batchId']}"
    item_path = f"{path}/{batch['items'][0]['itemId']}"
    assert (await service.get(item_path, responseFormat="openai"))["response"] == bare
    assert (await service.get(path, responseFormat="openai"))["items"][0]["response"] == bare
    page = await service.get(f"{path}/items", responseFormat="openai")
    assert page["data"][0]["response"] == bare


async def test_every_call_of_an_item_is_shown(service: Service) -> None:
    batch = await service.create("a")
    path = f"{service.batches}/{batch['batchId']}/{batch['items'][0]['itemId']}"
    assert (await service.get(f"{path}/attempts"))["data"] == []
    await service.retry(await service.claim())
    taken = await service.claim()
    running = (await service.get(f"{path}/attempts"))["data"]
    assert [c["outcome"] for c in running] == ["UNREACHABLE", "RUNNING"]
    await service.settle(taken)
    calls = (await service.get(f"{path}/attempts"))["data"]
    assert [(c["attempt"], c["outcome"], c["errorCode"]) for c in calls] == [
        (1, "UNREACHABLE", "server_error"),
        (2, "ANSWERED", None),
    ]
    last = calls[-1]
    assert (last["resource"], last["model"], last["durationMs"]) == ("small", "gpt-test", 5)
    assert (last["promptTokens"], last["outputTokens"]) == (7, 3)
    assert last["claimedAt"] <= last["completedAt"]
    item = await service.get(path, includesAttempts="true")
    assert (item["calls"], item["attempts"], item["retryCount"]) == (calls, 2, 1)
    assert "calls" not in await service.get(path)
