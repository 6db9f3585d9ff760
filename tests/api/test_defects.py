"""What is known to be broken in the reference works here: its defects B1 to B22, one test each.

The numbers are those of the contract's list. Each test gives the input that goes wrong there. Most
of them are proved more deeply elsewhere: B7, B15 to B19 in test_capacity and test_queue, B8 and
its like in test_streams, B9 in test_reference (50,000 items, real processes), B10 to B14 in
test_worker, test_concurrency and test_lifecycle. That a callback is sent for what B2, B9 and
B10 did to it is proved with the callbacks.
"""

from typing import Any
from uuid import UUID

from app import queue
from app.ids import uuid7
from app.queue import Item, Lapsed, Outcome
from tests.api.conftest import Json, Service


async def limit(service: Service, kind: str = "ai-resource", **amounts: int) -> None:
    """A limit per minute on the resource, or on its connection."""
    of = service.resource_id if kind == "ai-resource" else service.connection_id
    answer = await service.http.patch(
        f"/v1/{kind}/{service.tenant}/{of}", json={"capacity": [{"period": "minute"} | amounts]}
    )
    assert answer.status_code == 200, answer.text


async def create(service: Service, *items: Json, **more: Any) -> Json:  # noqa: ANN401 - JSON
    answer = await service.http.post(
        service.batches, json={"type": "ASYNC", "items": list(items), **more}
    )
    assert answer.status_code == 201, answer.text
    return answer.json()


async def read(service: Service, batch: Json) -> Json:
    return await service.get(f"{service.batches}/{batch['batchId']}")


async def vanish(service: Service, items: list[Item]) -> None:
    """Their worker is gone, each time with nothing else in its hands."""
    async with service.db.transaction() as conn:
        await queue.reclaim(
            conn,
            items=[
                Lapsed(
                    workspace_id=item.workspace_id,
                    batch_day=item.batch_day,
                    batch_id=item.batch_id,
                    seq=item.seq,
                    attempt=item.attempt,
                    alone=True,
                )
                for item in items
            ],
            max_crashes=3,
            wait_s=0,
        )


async def test_b1_items_that_name_a_resource_by_its_id_run(service: Service) -> None:
    batch = await create(service, service.item())
    await service.work()
    assert (await read(service, batch))["status"] == "COMPLETED"


async def test_b2_a_batch_can_be_read_and_its_percentage_is_right(service: Service) -> None:
    batch = await service.create("a", "b", "c")
    await service.settle(await service.claim(1))
    assert (await read(service, batch))["completedPercentage"] == 33.33
    await service.fail(await service.claim(1))
    assert (await read(service, batch))["completedPercentage"] == 66.67


async def test_b3_api_keys_open_the_batch_routes(service: Service) -> None:
    batch = await service.create()
    path = f"{service.url}{service.batches}/{batch['batchId']}"
    for headers in ({"authorization": f"Bearer {service.key}"}, {"x-api-key": service.key}):
        answer = await service.http.get(path, headers=headers)
        assert answer.status_code == 200


async def test_b4_the_documented_capacity_holds_and_lets_the_batch_go_on(service: Service) -> None:
    capacity = [{"period": "MINUTE", "requests": 1, "tokens": 50000, "enabled": True}]
    batch = await service.create("a", "b", capacity=capacity)
    assert batch["capacity"][0]["period"] == "minute"
    assert len(await service.claim()) == 1
    assert await service.claim() == []
    assert (await read(service, batch))["waitingFor"]["reason"] == "CAPACITY"


async def test_b5_names_of_the_providers_fields_stay_as_they_are(service: Service) -> None:
    request: Json = {
        "messages": [
            {"role": "user", "content": "x"},
            {"role": "assistant", "tool_calls": [{"id": "call_1", "type": "function"}]},
        ],
        "max_tokens": 5,
        "response_format": {"type": "json_schema", "json_schema": {"my_schema": {"a_b": 1}}},
    }
    batch = await create(service, service.item() | {"request": request})
    (item,) = await service.claim()
    assert '"max_tokens":5' in item.body.replace(" ", "")
    await service.settle([item], body='{"choices":[{"message":{"tool_calls":[{"id":"a_b"}]}}]}')
    shown = (await read(service, batch))["items"][0]
    assert shown["request"] == request
    assert shown["response"]["data"]["choices"][0]["message"]["tool_calls"] == [{"id": "a_b"}]


async def test_b6_an_item_is_found_by_its_id(service: Service) -> None:
    batch = await service.create("a")
    item = batch["items"][0]
    found = await service.get(f"{service.batches}/{batch['batchId']}/{item['itemId']}")
    assert found["itemId"] == item["itemId"]


async def test_b7_the_last_slot_admits_one_item_and_not_the_whole_queue(service: Service) -> None:
    await limit(service, requests=3)
    await service.create(*(["x"] * 20))
    assert len(await service.claim(2)) == 2
    assert len(await service.claim()) == 1
    assert await service.claim() == []


async def test_b8_no_event_of_a_fast_batch_is_lost(service: Service) -> None:
    batch = await service.create(*(["x"] * 300))
    await service.work()
    async with service.follow(batch, slim="true") as stream:
        told = await stream.rest()
    actions = [action for _, action, _ in told]
    assert actions.count("item-running") == actions.count("item-completed") == 300
    assert actions[-1] == "batch-completed"
    assert [number for number, _, _ in told] == list(range(1, len(told) + 1))


async def test_b9_a_cancel_cancels(service: Service) -> None:
    batch = await service.create("a", "b", "c")
    taken = await service.claim(1)
    path = f"{service.batches}/{batch['batchId']}/cancel"
    cancelled = (await service.http.post(path, json={"running": "abort"})).json()
    assert (cancelled["status"], cancelled["cancelled"]) == ("CANCELLED", 3)
    assert await service.claim() == []
    await service.settle(taken)
    assert (await read(service, batch))["status"] == "CANCELLED"
    assert (await service.http.post(path)).status_code == 409
    unknown = await service.http.post(f"{service.batches}/{uuid7()}/cancel")
    assert unknown.status_code == 404
    async with service.follow(batch) as stream:
        assert (await stream.rest())[-1][1] == "batch-cancelled"


async def test_b10_a_failure_that_will_be_retried_looks_like_no_end(service: Service) -> None:
    batch = await service.create("a")
    await service.retry(await service.claim())
    state = await read(service, batch)
    item = state["items"][0]
    assert (state["status"], state["failed"], item["status"]) == ("RUNNING", 0, "PENDING")
    assert (item["completedAt"], item["errorMessage"]) == (None, None)


async def test_b11_retries_are_counted_and_bounded(service: Service) -> None:
    batch = await service.create("a", maxAttempts=3)
    for expected in (1, 2, 3):
        await service.retry(await service.claim())
        item = (await read(service, batch))["items"][0]
        assert (item["retryCount"], item["attempts"]) == (expected, expected)
    assert item["status"] == "FAILED"
    assert item["errorDetails"]["retryable"]
    assert await service.claim() == []


async def test_b12_what_crashes_its_worker_each_time_ends(service: Service) -> None:
    batch = await service.create("a")
    for _ in range(3):
        await vanish(service, await service.claim())
    state = await read(service, batch)
    assert (state["status"], state["items"][0]["errorCode"]) == ("FAILED", "CRASHED")


async def test_b13_a_crash_between_claim_and_answer_loses_no_item(service: Service) -> None:
    batch = await service.create("a", "b")
    await vanish(service, await service.claim())
    await service.work()
    state = await read(service, batch)
    assert (state["status"], state["completed"]) == ("COMPLETED", 2)


async def test_b14_two_answers_of_one_item_count_once(service: Service) -> None:
    batch = await service.create("a", "b")
    first = await service.claim(1)
    await vanish(service, first)
    second = await service.claim(1)
    assert (second[0].seq, second[0].attempt) == (0, 2)
    await service.settle(first)  # it lived after all
    await service.settle(second)
    state = await read(service, batch)
    assert (state["completed"], state["pending"], state["running"]) == (1, 1, 0)
    assert state["totalOutputTokens"] == 3
    assert state["status"] == "RUNNING"


async def test_b15_a_batchs_items_run_under_its_own_limits(service: Service) -> None:
    lifetime = [{"period": "lifetime", "requests": 1}]
    bound = await service.create(*(["a"] * 5), capacity=lifetime)
    free = await service.create(*(["b"] * 5))
    taken = await service.claim()
    counts = {b["batchId"]: 0 for b in (bound, free)}
    for item in taken:
        counts[str(item.batch_id)] += 1
        assert ('"b"' in item.body) == (str(item.batch_id) == free["batchId"])
    assert counts == {bound["batchId"]: 1, free["batchId"]: 5}


async def test_b16_while_one_worker_claims_no_other_does(service: Service) -> None:
    await limit(service, requests=5)
    await service.create(*(["x"] * 10))
    async with service.db.transaction() as conn:
        taken = await queue.claim(
            conn,
            workspace_id=service.environment.workspace_id,
            resource_id=service.resource_id,
            worker_id=uuid7(),
            want=4,
            alone=True,
            guard_s=0.75,
            burst_s=60,
            slow_start=0,
            grace_s=60.0,
        )
        assert len(taken.items) == 4
        assert await service.claim() == []
    assert len(await service.claim()) == 1


async def test_b17_the_newest_of_many_batches_is_served_too(service: Service) -> None:
    made = [await service.create(*(["x"] * 50)) for _ in range(15)]
    taken = await service.claim(60)
    assert {str(item.batch_id) for item in taken} == {batch["batchId"] for batch in made}


async def test_b18_what_never_fits_is_refused_and_parks_nothing(service: Service) -> None:
    await limit(service, tokens=100)
    body = {"type": "ASYNC", "items": [service.item("word " * 500), service.item()]}
    answer = await service.http.post(service.batches, json=body)
    assert answer.status_code == 400
    assert [e["path"] for e in answer.json()["details"]["errors"]] == ["items[0].request"]
    await limit(service, tokens=10_000)
    large = await service.create("word " * 500)
    await limit(service, tokens=100)
    small = await service.create("x")
    taken = await service.claim()
    assert [(str(i.batch_id), i.impossible) for i in taken if i.impossible] == [
        (large["batchId"], True)
    ]
    assert [str(i.batch_id) for i in taken if not i.impossible] == [small["batchId"]]


async def test_b19_a_connections_limit_is_shared_by_its_resources(service: Service) -> None:
    await limit(service, "ai-connection", requests=3)
    model = {"model": "other", "connectionId": str(service.connection_id)}
    made = await service.http.post(
        f"/v1/ai-resource/{service.tenant}", json={"name": "other", "model": model}
    )
    other = UUID(made.json()["resourceId"])
    await service.create("a", "b")
    item = service.item() | {"resourceId": str(other)}
    await create(service, item, item, item)
    assert len(await service.claim()) == 2
    service.resource_id = other
    assert len(await service.claim()) == 1


async def test_b20_counters_items_and_events_say_the_same(service: Service) -> None:
    batch = await service.create(*(["x"] * 6))
    while items := await service.claim(2):
        await service.settle(items[:1])
        await service.fail(items[1:])
        state = await read(service, batch)
        for status in ("PENDING", "RUNNING", "COMPLETED", "FAILED"):
            shown = [item for item in state["items"] if item["status"] == status]
            assert len(shown) == state[status.lower()]
    async with service.follow(batch) as stream:
        *_, (_, action, payload) = await stream.rest()
    done = await read(service, batch)
    counters = ("status", "completed", "failed", "pending", "totalOutputTokens", "completedAt")
    assert action == "batch-failed"
    assert {name: payload[name] for name in counters} == {name: done[name] for name in counters}


async def test_b21_what_a_request_says_to_the_service_is_heeded(service: Service) -> None:
    own = service.item()["request"] | {"vmx": {"correlationId": "mine", "timeoutMs": 1234}}
    batch = await create(service, service.item() | {"request": own}, service.item())
    first, second = batch["items"]
    assert (first["correlationId"], first["request"]["vmx"]) == ("mine", own["vmx"])
    assert second["correlationId"] == batch["batchId"]
    assert [item.timeout_ms for item in await service.claim()] == [1234, None]


async def test_b22_items_come_in_order_with_their_creators_names(service: Service) -> None:
    batch = await create(service, *(service.item(customId=f"doc-{n}") for n in range(12)))
    taken = await service.claim()
    await service.settle(taken[::-2], Outcome.answered)
    await service.settle(taken[::2], Outcome.answered)
    shown = (await read(service, batch))["items"]
    assert [(item["index"], item["customId"]) for item in shown] == [
        (n, f"doc-{n}") for n in range(12)
    ]
