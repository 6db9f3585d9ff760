"""Creating batches: the documented clients, what is refused and how, and that nothing is half done."""

import asyncio
import json
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest

from app.intake import NewItem
from app.settings import Settings
from tests.api.conftest import Json, Service
from tests.examples import ASYNC_EXAMPLE, CALLBACK_EXAMPLE, SYNC_EXAMPLE, directed


async def run_example(service: Service, example: str) -> tuple[int, list[str], str]:
    """Run a documented client while a worker works; its exit code, output and errors."""
    example = directed(
        example,
        url=service.url,
        workspace_id=str(service.environment.workspace_id),
        environment_id=str(service.environment.environment_id),
        key=service.key,
        resource_id=str(service.resource_id),
    )
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        example,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    running = asyncio.create_task(process.communicate())
    while not running.done():
        await service.work()
        await asyncio.wait({running}, timeout=0.05)
    out, err = await running
    return process.returncode or 0, out.decode().splitlines(), err.decode()


async def test_the_documented_sync_client_runs_unchanged(service: Service) -> None:
    code, printed, errors = await run_example(service, SYNC_EXAMPLE)
    assert (code, errors) == (0, "")
    assert [line.split(":")[0] for line in printed] == ["Item completed"] * 2 + ["Batch completed!"]


async def test_the_documented_async_client_runs_unchanged(service: Service) -> None:
    code, printed, errors = await run_example(service, ASYNC_EXAMPLE)
    assert (code, errors) == (0, "")
    assert printed[-1] == "Progress: 100.0%"


async def test_the_documented_callback_client_runs_unchanged(service: Service) -> None:
    code, printed, errors = await run_example(service, CALLBACK_EXAMPLE)
    assert (code, errors) == (0, "")
    assert [line.split(":")[0] for line in printed] == ["Batch created"]
    assert await service.added() == (1, 1)


async def refused(service: Service, body: object, status: int = 400, **headers: str) -> Json:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    answer = await service.http.post(
        service.batches,
        content=content,
        headers={"content-type": "application/json", **headers},
    )
    assert answer.status_code == status, answer.text
    told = answer.json()
    assert set(told) == {"errorMessage", "errorCode", "details"}
    assert await service.added() == (0, 0)
    return told


def paths(told: Json) -> list[str]:
    return [e["path"] for e in told["details"]["errors"]]


async def test_a_created_batch_has_every_documented_field(service: Service) -> None:
    answer = await service.http.post(
        service.batches,
        json={
            "type": "async",
            "name": "n",
            "metadata": {"a": [1]},
            "priority": 7,
            "capacity": [],
            "unknown": 1,
            "items": [service.item("one", customId="c-1", extra=True), service.item("two")],
        },
    )
    assert answer.status_code == 201
    batch = answer.json()
    assert answer.headers["location"] == f"{service.batches}/{batch['batchId']}"
    assert answer.headers["x-request-id"]
    assert batch["type"] == "ASYNC"
    assert batch["status"] == "PENDING"
    assert (batch["name"], batch["metadata"], batch["priority"]) == ("n", {"a": [1]}, 7)
    assert (batch["totalItems"], batch["pending"], batch["completedPercentage"]) == (2, 2, 0)
    assert batch["createdByApiKeyId"] == str(service.key_id)
    assert batch["itemsNextCursor"] is None
    assert batch["timestamp"] == batch["createdAt"]
    assert len(batch["createdAt"]) == 24
    assert batch["createdAt"].endswith("Z")
    assert not {
        "running", "completed", "failed", "cancelled", "totalEstimatedPromptTokens",
        "totalPromptTokens", "totalOutputTokens", "totalCompletionTokens", "errorMessage",
        "updatedAt", "startedAt", "completedAt", "createdByUserId", "callbackOptions",
    } - batch.keys()  # fmt: skip
    first = batch["items"][0]
    assert (first["index"], first["customId"], first["status"]) == (0, "c-1", "PENDING")
    assert first["request"] == {"messages": [{"role": "user", "content": "one"}]}
    assert first["response"] is None
    assert not {
        "workspaceId", "environmentId", "batchId", "itemId", "resourceId", "estimatedPromptTokens",
        "promptTokens", "totalTokens", "completionTokens", "outputTokens", "errorMessage",
        "errorCode", "retryCount", "attempts", "createdAt", "startedAt", "completedAt",
    } - first.keys()  # fmt: skip


MINIMAL: Json = {"messages": [{"role": "user"}]}


async def test_resources_can_be_named(service: Service) -> None:
    body: Json = {"type": "ASYNC", "items": [{"resource": "small", "request": MINIMAL}]}
    answer = await service.http.post(service.batches, json=body)
    assert answer.status_code == 201
    assert answer.json()["items"][0]["resourceId"] == str(service.resource_id)


async def test_problems_of_items_are_named_by_their_paths(service: Service) -> None:
    good = service.item()
    items: list[object] = [
        good,
        {"request": MINIMAL},
        {"resourceId": "x", "request": {}},
        {"resourceId": str(service.resource_id)},
        good | {"customId": 4},
        good | {"customId": "\0"},
        good | {"maxAttempts": 101},
        good | {"resource": "small"},
        "text",
    ]
    told = await refused(service, {"type": "ASYNC", "items": items})
    assert told["errorCode"] == "GENERIC_VALIDATION"
    assert paths(told) == [
        "items[1].resourceId",
        "items[2].resourceId",
        "items[3].request",
        "items[4].customId",
        "items[5].customId",
        "items[6].maxAttempts",
        "items[7].resource",
        "items[8]",
    ]


async def test_requests_must_be_objects_with_something_in_them(service: Service) -> None:
    empty: list[object] = [{}, [], "x", None, 5]
    items = [service.item() | {"request": r} for r in empty]
    told = await refused(service, {"type": "ASYNC", "items": [service.item(), *items]})
    assert paths(told) == [f"items[{n}].request" for n in range(1, 6)]


async def test_problems_of_the_head_are_named_by_their_paths(service: Service) -> None:
    told = await refused(
        service,
        {
            "type": "LATER",
            "priority": 101,
            "maxAttempts": 0,
            "name": "x" * 201,
            "metadata": [],
            "idempotencyKey": "",
            "capacity": [{"period": "MINUTES", "requests": 1}],
            "items": [],
        },
    )
    assert sorted(paths(told)) == [
        "capacity[0].period", "idempotencyKey", "items", "maxAttempts", "metadata", "name", "priority", "type",
    ]  # fmt: skip
    assert paths(await refused(service, {})) == ["type", "items"]
    assert paths(await refused(service, {"type": "ASYNC", "items": {}})) == ["items"]
    assert paths(await refused(service, {"type": "ASYNC", "items": None})) == ["items"]
    head = {"type": "ASYNC", "items": [service.item()]}
    assert paths(await refused(service, head | {"metadata": {"a": "\0"}})) == ["metadata"]
    assert paths(await refused(service, head | {"metadata": {"\ud800": 1}})) == ["metadata"]
    assert paths(await refused(service, head | {"priority": "1"})) == ["priority"]


NO_JSON = [
    b"",
    b"null",
    b"[]",
    b'{"type":"ASYNC","items":[',
    b'{"type":"ASYNC","items":[]} trailing',
    b'{"type":"ASYNC","type":"SYNC","items":[]}',
    b'{"type":"ASYNC","items":[{"request":{"a":"\xff"}}]}',
    b'{"type":"ASYNC","items":' + b"[" * 100_000,
]


async def test_what_is_not_json_is_refused_with_a_place(service: Service) -> None:
    for body in NO_JSON:
        told = await refused(service, body)
        assert paths(told) == ["body"]
        assert "at byte" in told["errorMessage"]


async def test_an_item_that_is_not_json_is_refused(service: Service) -> None:
    for request in ('{"a":NaN}', '{"a":01}', '{"a":1,}', '{"a"]', '{"a":"\\q"}', "{'a':1}"):
        item = f'{{"resourceId":"{service.resource_id}","request":{request}}}'
        told = await refused(service, b'{"type":"ASYNC","items":[%s]}' % item.encode())
        assert paths(told) in (["items[0]"], ["body"])


async def test_at_most_a_hundred_problems_are_told(service: Service) -> None:
    told = await refused(service, {"type": "ASYNC", "items": [1] * 5000})
    assert len(told["details"]["errors"]) == 100


async def test_unknown_resources_are_all_named_once(service: Service) -> None:
    other = "00000000-0000-4000-8000-000000000000"
    items = [service.item(), {"resourceId": other, "request": MINIMAL}] * 2
    items += [{"resource": name, "request": MINIMAL} for name in ("large", "a\0")]
    told = await refused(service, {"type": "ASYNC", "items": items}, 404)
    assert told["errorCode"] == "AI_RESOURCE_NOT_FOUND"
    assert told["details"]["resources"] == [other, "large", "a\0"]


async def test_a_failure_in_the_middle_keeps_nothing(service: Service) -> None:
    items = [service.item(f"text {n}") for n in range(4500)]
    items[4400]["request"] = {}
    told = await refused(service, {"type": "ASYNC", "items": items})
    assert paths(told) == ["items[4400].request"]


async def test_sync_problems_are_told_before_the_stream(service: Service) -> None:
    told = await refused(service, {"type": "SYNC", "items": []})
    assert told["errorCode"] == "GENERIC_VALIDATION"


# Texts that break others --------------------------------------------------------------------------


BREAKING = [
    '"<|endoftext|>"',
    r'"\u0000 and \\ and \t"',
    r'"half \ud83d a pair"',
    r'"\ud83d\ude00 escaped, 😀 not"',
    '"line\u2028breaks\u2029and\u0085more"',
    '[ {"type" : "text",\n "text":"pretty"} ,\r\n\t1e999, -0, 12345678901234567890.10 ]',
    '"' + "long " * 210_000 + '"',
]


async def test_texts_come_back_to_the_letter(service: Service) -> None:
    for content in BREAKING:
        request = f'{{"z":1,"messages":[{{"role":"user","content":{content}}}],"a":1}}'
        answer = f'{{"choices": [{{"message":{{"content":{content}}}}}]}}'
        item = f'{{"resourceId":"{service.resource_id}","request": {request} }}'
        created = await service.http.post(
            service.batches, content=f'{{"items":[{item}],"type":"ASYNC"}}'.encode()
        )
        assert created.status_code == 201, created.text[:500]
        assert f'"request":{request},' in created.text
        batch_id = json.loads(created.text)["batchId"]
        await service.settle(await service.claim(), body=answer)
        read = await service.http.get(f"{service.batches}/{batch_id}")
        assert f'"request":{request},"response":{{"data":{answer},"headers":' in read.text
        async with service.follow({"batchId": batch_id}) as stream:
            told = await stream.rest()
        assert [action for _, action, _ in told][-2:] == ["item-completed", "batch-completed"]
        assert told[-2][2]["response"]["data"] == json.loads(answer)
        assert told[0][2]["items"][0]["request"] == json.loads(request)


# Sizes --------------------------------------------------------------------------------------------


class TestSmallLimits:
    @pytest.fixture
    def settings(self) -> Settings:
        return Settings(port=0, max_body_bytes=100_000, max_items=50, max_item_bytes=1000)

    async def test_an_announced_body_that_is_too_large_is_not_read(
        self, lone_service: Service
    ) -> None:
        told = await refused(lone_service, b" " * 100_001, 413)
        assert told["errorCode"] == "REQUEST_TOO_LARGE"
        assert "SLUICE_MAX_BODY_BYTES" in told["errorMessage"]

    async def test_a_body_that_grows_too_large_is_refused_while_it_comes(
        self, lone_service: Service
    ) -> None:
        async def endless() -> AsyncIterator[bytes]:
            while True:
                yield b" " * 10_000

        try:
            answer = await lone_service.http.post(lone_service.batches, content=endless())
        except (httpx.WriteError, httpx.ReadError):  # cut off before the answer was read
            return
        assert answer.status_code == 413

    async def test_too_many_items_and_too_large_ones_are_refused(
        self, lone_service: Service
    ) -> None:
        told = await refused(lone_service, {"type": "ASYNC", "items": [lone_service.item()] * 51})
        assert "SLUICE_MAX_ITEMS" in told["errorMessage"]
        told = await refused(
            lone_service,
            {"type": "ASYNC", "items": [lone_service.item(), lone_service.item("x" * 1000)]},
        )
        assert paths(told) == ["items[1].request"]
        told = await refused(
            lone_service, {"type": "ASYNC", "items": [lone_service.item("x" * 80_000)]}
        )
        assert paths(told) == ["items[0]"]
        assert "SLUICE_MAX_ITEM_BYTES" in told["errorMessage"]
        told = await refused(
            lone_service, {"items": [lone_service.item()], "type": "ASYNC", "name": "x" * 300}
        )
        assert paths(told) == ["name"]


async def test_a_large_body_is_spooled_to_disk_and_kept_whole(service: Service) -> None:
    items = [service.item(f"{n} " + "word " * 500) for n in range(1500)]
    batch = (
        await service.http.post(service.batches, json={"type": "ASYNC", "items": items})
    ).json()
    assert batch["totalItems"] == 1500
    page = await service.get(f"{service.batches}/{batch['batchId']}/items", cursor="1499")
    assert page["data"][0]["request"] == items[-1]["request"]
    assert page["nextCursor"] is None


async def test_a_client_that_leaves_while_sending_is_no_error_of_ours(
    service: Service, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG", "sluice.api")
    at = httpx.URL(service.url)
    _, writer = await asyncio.open_connection(at.host, at.port)
    head = f"POST {service.batches} HTTP/1.1\r\nHost: x\r\nx-api-key: {service.key}\r\n"
    writer.write(f"{head}content-length: 100\r\n\r\n{{".encode())
    await writer.drain()
    await service.get("/v1/whoami")  # by now the server waits for the rest
    writer.close()
    async with asyncio.timeout(10):
        while "status=400" not in caplog.text:  # noqa: ASYNC110 - a log tells nobody
            await asyncio.sleep(0.01)
    assert not [r for r in caplog.records if r.levelname in ("WARNING", "ERROR")]
    assert await service.added() == (0, 0)


async def test_a_full_disk_is_told_and_keeps_nothing(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "app.api.ingest._temporary",
        lambda: Path("/dev/full").open("r+b", buffering=0),  # noqa: SIM115 - ingest closes it
    )
    told = await refused(service, b" " * 3_000_000, 507)
    assert told["errorCode"] == "STORAGE_FULL"


# Idempotency --------------------------------------------------------------------------------------


async def test_the_same_request_twice_is_one_batch(service: Service) -> None:
    body = {"type": "ASYNC", "items": [service.item()]}
    first, again = [
        await service.http.post(service.batches, json=body, headers={"idempotency-key": "k1"})
        for _ in range(2)
    ]
    assert (first.status_code, again.status_code) == (201, 201)
    assert first.json() == again.json()
    assert "idempotent-replayed" not in first.headers
    assert again.headers["idempotent-replayed"] == "true"
    assert await service.added() == (1, 1)


async def test_the_same_key_for_another_request_is_a_conflict(service: Service) -> None:
    await service.create("a", idempotencyKey="k")
    body = {"type": "ASYNC", "items": [service.item("b")], "idempotencyKey": "k"}
    answer = await service.http.post(service.batches, json=body)
    assert answer.status_code == 409
    assert answer.headers["x-should-retry"] == "false"
    assert answer.json()["errorCode"] == "IDEMPOTENCY_MISMATCH"


async def test_two_different_keys_in_one_request_are_refused(service: Service) -> None:
    body = {"type": "ASYNC", "items": [service.item()], "idempotencyKey": "a"}
    told = await refused(service, body, 400, **{"idempotency-key": "b"})
    assert paths(told) == ["Idempotency-Key"]


async def test_concurrent_duplicates_make_one_batch(service: Service) -> None:
    body = {"type": "ASYNC", "items": [service.item(f"{n}") for n in range(300)]}
    answers = await asyncio.gather(
        *(
            service.http.post(service.batches, json=body, headers={"idempotency-key": "once"})
            for _ in range(5)
        )
    )
    assert {a.status_code for a in answers} == {201}
    assert len({a.json()["batchId"] for a in answers}) == 1
    assert sorted("idempotent-replayed" in a.headers for a in answers) == [False] + [True] * 4
    assert await service.added() == (1, 300)


async def test_a_repeated_sync_request_gets_the_originals_stream(service: Service) -> None:
    body = {"type": "SYNC", "items": [service.item()], "idempotencyKey": "s"}
    told: list[str] = []
    for _ in range(2):
        async with service.http.stream("POST", service.batches, json=body) as answer:
            assert answer.status_code == 200
            assert answer.headers["content-type"].startswith("text/event-stream")
            async for line in answer.aiter_lines():
                if '"batch-created"' in line:
                    await service.work()
                if line.startswith("id: ") or "[DONE]" in line:
                    told.append(line)
    assert told == ["id: 1", "id: 2", "id: 3", "id: 4", "id: 5", "data: [DONE]"] * 2
    assert await service.added() == (1, 1)


# The database is away -----------------------------------------------------------------------------


async def test_a_failing_ingest_rolls_everything_back(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def broken(_: object, items: list[NewItem]) -> None:
        raise RuntimeError(f"a secret about {len(items)} items")

    monkeypatch.setattr("app.intake.Ingest.add", broken)
    told = await refused(service, {"type": "ASYNC", "items": [service.item()]}, 500)
    assert told["errorCode"] == "INTERNAL_SERVER_ERROR"
    assert "secret" not in json.dumps(told)
    assert "request id" in told["errorMessage"]


# What a request says to us ------------------------------------------------------------------------


async def test_a_request_is_checked_as_far_as_any_provider_would(service: Service) -> None:
    good: Json = {"messages": [{"role": "user", "content": "x"}]}
    wrong: list[tuple[Json, str]] = [
        ({"model": "m"}, "request"),
        ({"messages": []}, "request.messages"),
        ({"messages": "hello"}, "request.messages"),
        ({"messages": [{"content": "x"}]}, "request.messages[0]"),
        ({"messages": [{"role": 1}]}, "request.messages[0].role"),
        (good | {"vmx": {"timeoutMs": 99}}, "request.vmx.timeoutMs"),
        (good | {"vmx": {"timeoutMs": 600_001}}, "request.vmx.timeoutMs"),
        (good | {"vmx": {"correlationId": ""}}, "request.vmx.correlationId"),
        (good | {"vmx": {"correlationId": "a\0"}}, "request.vmx"),
        (good | {"vmx": {"metadata": {"a": 1}}}, "request.vmx.metadata[...]"),
        (good | {"vmx": {"providerArgs": []}}, "request.vmx.providerArgs"),
        (good | {"vmx": {"secondaryModelIndex": -1}}, "request.vmx.secondaryModelIndex"),
        (good | {"vmx": {"resourceConfigOverrides": {"x": 1}}}, "request.vmx.resourceConfigOverrides"),
    ]  # fmt: skip
    items = [service.item() | {"request": request} for request, _ in wrong]
    told = await refused(service, {"type": "ASYNC", "items": items, "timeoutMs": 99})
    assert paths(told) == [
        "timeoutMs",
        *(f"items[{n}].{path}" for n, (_, path) in enumerate(wrong)),
    ]
    assert await service.added() == (0, 0)


async def test_time_limits_of_batch_and_item_reach_the_claim(service: Service) -> None:
    own: Json = {"messages": [{"role": "user", "content": "x"}], "vmx": {"timeoutMs": 600_000}}
    batch = await service.create("a", timeoutMs=2000, maxAttempts=2)
    assert (batch["timeoutMs"], batch["maxAttempts"]) == (2000, 2)
    body = {"type": "ASYNC", "timeoutMs": 2000, "items": [service.item() | {"request": own}]}
    assert (await service.http.post(service.batches, json=body)).status_code == 201
    await service.create("no limit of its own")
    assert [item.timeout_ms for item in await service.claim()] == [2000, 600_000, None]
    async with service.db.connection() as conn:
        cursor = await conn.execute(
            "select extract(epoch from visible_at - claimed_at)::int from items"
            " where workspace_id = %s and status = 'running' order by batch_id",
            (service.environment.workspace_id,),
        )
        assert [row[0] for row in await cursor.fetchall()] == [62, 660, 61]


async def test_an_item_says_what_it_is_asked_for_by(service: Service) -> None:
    own: Json = {
        "messages": [{"role": "user", "content": "x"}],
        "vmx": {"correlationId": "order-7", "metadata": {"team": "a"}},
    }
    items = [service.item(), service.item() | {"request": own}]
    made = await service.http.post(service.batches, json={"type": "ASYNC", "items": items})
    first, second = made.json()["items"]
    assert first["correlationId"] == made.json()["batchId"]
    assert (second["correlationId"], second["request"]) == ("order-7", own)
    await service.work()
    item = await service.get(f"{service.batches}/{second['batchId']}/{second['itemId']}")
    assert item["response"]["headers"] == {
        "x-request-id": "req_1",
        "x-vmx-correlation-id": "order-7",
        "x-vmx-model": "gpt-test",
        "x-vmx-provider": "openai-compatible",
        "x-vmx-connection-id": str(service.connection_id),
    }
    assert (item["provider"], item["connectionId"]) == (
        "openai-compatible",
        str(service.connection_id),
    )


async def test_an_idempotency_key_may_be_used_anew_after_a_day(service: Service) -> None:
    first = await service.create("a", idempotencyKey="daily")
    assert (await service.create("a", idempotencyKey="daily"))["batchId"] == first["batchId"]
    async with service.db.connection() as conn:
        await conn.execute(
            "update batches set created_at = created_at - interval '25 hours' where batch_id = %s",
            (first["batchId"],),
        )
    second = await service.create("b", idempotencyKey="daily")
    assert second["batchId"] != first["batchId"]
    old = await service.get(f"{service.batches}/{first['batchId']}")
    assert (old["idempotencyKey"], second["idempotencyKey"]) == (None, "daily")
