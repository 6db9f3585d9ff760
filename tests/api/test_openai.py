"""OpenAI's Batches through the unmodified SDK: the whole round, states, mistakes, extensions."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any
from uuid import UUID

import openai
import pytest
from openai import AsyncOpenAI, DefaultAsyncHttpxClient, DefaultHttpxClient, OpenAI
from openai.types import Batch

from app import api_keys, connections, submissions
from app.ids import uuid7
from app.queue import Outcome
from tests.api.conftest import Json, Service

CHAT = "/v1/chat/completions"


def line(number: int | str, *, url: str = CHAT, model: str = "small", **body: object) -> Json:
    asked: Json = {"messages": [{"role": "user", "content": f"Question {number}?"}]}
    return {
        "custom_id": f"q-{number}",
        "method": "POST",
        "url": url,
        "body": {"model": model, **(body or asked)},
    }


def jsonl(lines: Sequence[object]) -> bytes:
    return b"".join(
        (each if isinstance(each, bytes) else json.dumps(each).encode()) + b"\n" for each in lines
    )


def parsed(text: str) -> list[Json]:
    return [json.loads(each) for each in text.splitlines()]


@pytest.fixture
async def client(service: Service) -> AsyncIterator[AsyncOpenAI]:
    async with (
        DefaultAsyncHttpxClient(trust_env=False) as http,
        AsyncOpenAI(base_url=f"{service.url}/v1", api_key=service.key, http_client=http) as made,
    ):
        yield made


async def upload(client: AsyncOpenAI, lines: Sequence[object]) -> str:
    file = await client.files.create(file=("in.jsonl", jsonl(lines)), purpose="batch")
    return file.id


async def submit(client: AsyncOpenAI, lines: Sequence[object], **more: Any) -> Batch:  # noqa: ANN401 - passes through
    return await client.batches.create(
        input_file_id=await upload(client, lines),
        endpoint=more.pop("endpoint", CHAT),
        completion_window=more.pop("completion_window", "24h"),
        **more,
    )


async def settled(
    client: AsyncOpenAI, batch_id: str, is_so: Callable[[Batch], bool] | None = None
) -> Batch:
    """The batch once its file was looked at, or once something is so."""
    async with asyncio.timeout(20):
        while True:
            batch = await client.batches.retrieve(batch_id)
            if is_so(batch) if is_so is not None else batch.status != "validating":
                return batch
            await asyncio.sleep(0.02)


async def text_of(client: AsyncOpenAI, file_id: str | None) -> str:
    assert file_id is not None
    return (await client.files.content(file_id)).text


async def test_the_whole_round(service: Service, client: AsyncOpenAI) -> None:
    """Upload, create, poll, read, list, delete: as in OpenAI's guide, with another base_url."""
    lines = [line(n) for n in range(5)]
    created = await submit(client, lines, metadata={"team": "search"})
    assert created.id.startswith("batch_")
    assert created.object == "batch"
    assert created.status == "validating"
    assert created.output_file_id is None
    assert created.error_file_id is None
    assert created.request_counts is not None
    assert created.request_counts.total == 0
    running = await settled(client, created.id)
    assert running.status == "in_progress"
    assert running.in_progress_at is not None
    assert running.expires_at == created.created_at + 86_400
    assert running.model == "small"
    assert running.metadata == {"team": "search"}
    assert running.output_file_id is None  # nothing was answered yet
    await service.work()
    done = await settled(client, created.id, lambda b: b.status == "completed")
    assert done.request_counts is not None
    assert (done.request_counts.total, done.request_counts.completed) == (5, 5)
    assert done.request_counts.failed == 0
    assert done.completed_at is not None
    assert done.usage is not None
    assert done.usage.input_tokens == 35
    assert done.usage.total_tokens == 50
    assert done.usage.input_tokens_details.cached_tokens == 0
    assert done.error_file_id is None
    assert done.errors is None
    answers = parsed(await text_of(client, done.output_file_id))
    assert {a["custom_id"] for a in answers} == {f"q-{n}" for n in range(5)}
    first = answers[0]
    assert first["id"].startswith("batch_req_")
    assert first["error"] is None
    assert first["response"]["status_code"] == 200
    assert first["response"]["request_id"] == "req_1"
    assert first["response"]["body"]["choices"][0]["message"]["content"] == "ok"
    assert done.output_file_id is not None
    output = await client.files.retrieve(done.output_file_id)
    assert output.purpose == "batch_output"
    assert output.bytes == len((await text_of(client, done.output_file_id)).encode())
    listed = [file.id async for file in client.files.list()]
    assert set(listed) == {done.input_file_id, done.output_file_id}
    assert (await client.files.delete(done.output_file_id)).deleted
    with pytest.raises(openai.NotFoundError):
        await client.files.content(done.output_file_id)


async def test_the_sync_client_does_the_same(service: Service) -> None:
    def round_trip() -> tuple[str, str]:
        with (
            DefaultHttpxClient(trust_env=False) as http,
            OpenAI(base_url=f"{service.url}/v1", api_key=service.key, http_client=http) as client,
        ):
            file = client.files.create(file=("in.jsonl", jsonl([line(1)])), purpose="batch")
            batch = client.batches.create(
                input_file_id=file.id, endpoint=CHAT, completion_window="24h"
            )
            seen = [b.id for b in client.batches.list(limit=1)]
            assert seen == [batch.id]
            assert client.files.wait_for_processing(file.id).status == "processed"
            cancelled = client.batches.cancel(batch.id)
            assert cancelled.status in ("cancelling", "cancelled")
            assert client.files.content(file.id).read() == jsonl([line(1)])
            assert client.files.delete(file.id).deleted
            with pytest.raises(openai.NotFoundError):
                client.files.retrieve(file.id)
            return batch.id, file.id

    await asyncio.to_thread(round_trip)


async def test_batches_are_listed_newest_first_with_automatic_paging(
    service: Service, client: AsyncOpenAI
) -> None:
    file = await upload(client, [line(1)])
    made = [
        (await client.batches.create(input_file_id=file, endpoint=CHAT, completion_window="24h")).id
        for _ in range(5)
    ]
    other = await service.create("made on the other route")
    made.append("batch_" + UUID(other["batchId"]).hex)
    assert [b.id async for b in client.batches.list(limit=2)] == made[::-1]
    page = await client.batches.list(limit=2, after=made[3])
    assert [b.id for b in page.data] == [made[2], made[1]]
    assert page.has_more


async def test_one_batch_is_visible_through_both_apis(
    service: Service, client: AsyncOpenAI
) -> None:
    batch = await settled(client, (await submit(client, [line(1), line(2)])).id)
    shown = await service.get(f"{service.batches}/{UUID(batch.id.removeprefix('batch_'))}")
    assert shown["totalItems"] == 2
    assert shown["items"][0]["customId"] == "q-1"
    made = await service.create("one", "two")
    await service.work()
    name = "batch_" + UUID(made["batchId"]).hex
    seen = await client.batches.retrieve(name)
    assert seen.status == "completed"
    assert seen.completion_window == "none"
    output = parsed(await text_of(client, seen.output_file_id))
    item_ids = {
        i["itemId"] for i in (await service.get(f"{service.batches}/{made['batchId']}"))["items"]
    }
    assert {each["custom_id"] for each in output} == item_ids
    asked = parsed(await text_of(client, seen.input_file_id))
    assert [each["body"]["messages"][0]["content"] for each in asked] == ["one", "two"]
    input_file = await client.files.retrieve(seen.input_file_id)
    assert input_file.bytes == len((await text_of(client, seen.input_file_id)).encode())


async def test_a_file_with_mistakes_names_each_line_and_runs_nothing(
    service: Service, client: AsyncOpenAI
) -> None:
    """The broken character lies across the border of two stored pieces."""
    lines: list[object] = [line(n) for n in range(1, 7)]
    lines.append(b'{"custom_id": "q-7", not json')
    lines += [line(3), line(9, url="/v1/embeddings")]
    lines += [{k: v for k, v in line(10).items() if k != "body"}]
    lines += [line(11, messages=[], stream=True), line(12, model="unheard-of"), {"method": "POST"}]
    lines += [{**line(14), "method": "GET"}, line(15, prompt="no messages"), b"[]"]
    before = jsonl(lines)
    padding = json.dumps(line(17, messages=[{"role": "user", "content": "x"}])).encode()
    broken = json.dumps(line(18, messages=[{"role": "user", "content": "@"}])).encode()
    at = broken.index(b"@")
    # The first byte of a two-byte character ends the piece, and what follows is not its second.
    spaces = 1024 * 1024 - len(before) - len(padding) - 1 - at - 1
    lines += [padding + b" " * spaces, broken.replace(b"@", b"\xc3(")]
    assert jsonl(lines)[1024 * 1024 - 1 : 1024 * 1024 + 1] == b"\xc3("
    batch = await settled(client, (await submit(client, lines)).id)
    assert batch.status == "failed"
    assert batch.failed_at is not None
    assert batch.errors is not None
    assert batch.errors.data is not None
    found = {e.line: (e.code, e.param) for e in batch.errors.data}
    assert found == {
        7: ("invalid_json_line", None),
        8: ("duplicate_custom_id", "custom_id"),
        9: ("invalid_url", "url"),
        10: ("missing_required_parameter", "body"),
        11: ("invalid_request", "body.stream"),
        12: ("model_not_found", "body.model"),
        13: ("missing_required_parameter", "custom_id"),
        14: ("invalid_method", "method"),
        15: ("missing_required_parameter", "body.messages"),
        16: ("invalid_json_line", None),
        18: ("invalid_json_line", None),
    }
    assert all(e.message for e in batch.errors.data)
    assert await service.added() == (0, 0)
    assert await service.claim() == []


async def test_a_file_without_requests_fails(client: AsyncOpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="empty"):
        await client.files.create(file=("in.jsonl", b""), purpose="batch")
    file = await client.files.create(file=("in.jsonl", b"\n \n"), purpose="batch")
    batch = await client.batches.create(
        input_file_id=file.id, endpoint=CHAT, completion_window="24h"
    )
    batch = await settled(client, batch.id)
    assert batch.errors is not None
    assert batch.errors.data is not None
    assert [e.code for e in batch.errors.data] == ["empty_file"]


async def test_a_multi_byte_character_across_pieces_is_whole(
    service: Service, client: AsyncOpenAI
) -> None:
    text = "ä" * 700_000
    body = json.dumps(
        line(1, messages=[{"role": "user", "content": text}]), ensure_ascii=False
    ).encode()
    file = await client.files.create(file=("in.jsonl", b"\xef\xbb\xbf" + body), purpose="batch")
    batch = await client.batches.create(
        input_file_id=file.id, endpoint=CHAT, completion_window="24h"
    )
    batch = await settled(client, batch.id)
    assert batch.status == "in_progress"
    (item,) = await service.claim()
    assert json.loads(item.body)["messages"][0]["content"] == text


async def test_a_batch_in_which_every_line_fails_is_completed_with_an_error_file_only(
    service: Service, client: AsyncOpenAI
) -> None:
    batch = await settled(client, (await submit(client, [line(n) for n in range(3)])).id)
    await service.fail(await service.claim())
    done = await settled(client, batch.id, lambda b: b.status == "completed")
    assert done.output_file_id is None
    assert done.request_counts is not None
    assert done.request_counts.failed == 3
    errors = parsed(await text_of(client, done.error_file_id))
    assert {e["custom_id"] for e in errors} == {"q-0", "q-1", "q-2"}
    assert errors[0]["response"]["status_code"] == 400
    assert errors[0]["response"]["body"]["error"]["code"] == "bad_request"
    assert errors[0]["error"] is None


async def test_cancelled_lines_are_in_the_error_file(service: Service, client: AsyncOpenAI) -> None:
    batch = await settled(client, (await submit(client, [line(n) for n in range(4)])).id)
    taken = await service.claim(want=2)
    await service.settle(taken[:1])
    cancelling = await client.batches.cancel(batch.id)
    assert cancelling.status == "cancelling"
    assert cancelling.cancelling_at is not None
    await service.settle(taken[1:])
    done = await settled(client, batch.id, lambda b: b.status == "cancelled")
    assert done.cancelled_at is not None
    assert len(parsed(await text_of(client, done.output_file_id))) == 2
    errors = parsed(await text_of(client, done.error_file_id))
    assert [e["error"]["code"] for e in errors] == ["batch_cancelled"] * 2
    assert all(e["response"] is None for e in errors)
    assert (await client.batches.cancel(batch.id)).status == "cancelled"


async def test_an_expired_batch_keeps_its_finished_lines(
    service: Service, client: AsyncOpenAI
) -> None:
    batch = await settled(client, (await submit(client, [line(n) for n in range(3)])).id)
    batch_id = UUID(batch.id.removeprefix("batch_"))
    await service.settle(await service.claim(want=1))
    async with service.db.transaction() as conn:
        for statement in (
            b"update flows set expires_at = clock_timestamp() where batch_id = %s",
            b"update batches set expires_at = clock_timestamp() where batch_id = %s",
        ):
            await conn.execute(statement, (batch_id,))
    assert (await client.batches.retrieve(batch.id)).status == "finalizing"
    await service.expire()
    done = await settled(client, batch.id, lambda b: b.status == "expired")
    assert done.expired_at is not None
    assert len(parsed(await text_of(client, done.output_file_id))) == 1
    errors = parsed(await text_of(client, done.error_file_id))
    assert [e["error"]["code"] for e in errors] == ["batch_expired"] * 2
    retried = client.post(f"/batches/{batch.id}/retry", cast_to=Batch)
    with pytest.raises(openai.ConflictError, match="completion_window"):
        await retried
    again = await client.post(
        f"/batches/{batch.id}/retry", cast_to=Batch, body={"completion_window": "1h"}
    )
    assert again.status == "in_progress"
    await service.work()
    done = await settled(client, batch.id, lambda b: b.status == "completed")
    assert len(parsed(await text_of(client, done.output_file_id))) == 3


@pytest.mark.parametrize(
    ("endpoint", "body", "reply"),
    [
        ("/v1/responses", {"input": "hello"}, {"id": "resp_1"}),
        ("/v1/embeddings", {"input": ["a", "b"]}, {"data": []}),
        ("/v1/completions", {"prompt": "a"}, {"choices": []}),
        ("/v1/moderations", {"input": "a"}, {"results": []}),
    ],
)
async def test_other_endpoints(
    service: Service,
    client: AsyncOpenAI,
    endpoint: str,
    body: Json,
    reply: Json,
) -> None:
    batch = await submit(client, [line(1, url=endpoint, **body)], endpoint=endpoint)
    assert (await settled(client, batch.id)).endpoint == endpoint
    (item,) = await service.claim()
    assert item.endpoint == endpoint
    if endpoint in ("/v1/embeddings", "/v1/moderations"):
        assert item.output_tokens == 0
    await service.settle([item], body=json.dumps(reply))
    done = await settled(client, batch.id, lambda b: b.status == "completed")
    assert done.usage is not None
    assert (done.usage.input_tokens, done.usage.output_tokens) == (7, 3)
    (answered,) = parsed(await text_of(client, done.output_file_id))
    assert answered["response"]["body"] == reply


async def test_a_model_is_a_resource_by_name_by_model_or_by_what_a_connection_allows(
    service: Service, client: AsyncOpenAI
) -> None:
    async with service.db.transaction() as conn:
        await connections.create(
            conn,
            keyring=service.keyring,
            workspace_id=service.environment.workspace_id,
            environment_id=service.environment.environment_id,
            name="allows",
            provider="openai-compatible",
            base_url="http://127.0.0.1:9/v1",
            secret=None,
            timeout_ms=1000,
            allowed_models=["gpt-made"],
        )
    lines = [line(1, model="small"), line(2, model="gpt-test"), line(3, model="gpt-made")]
    batch = await settled(client, (await submit(client, lines)).id)
    assert batch.errors is None
    assert batch.model is None  # several
    assert [i.seq for i in await service.claim()] == [0, 1]
    again = await settled(client, (await submit(client, lines[2:])).id)
    assert again.model == "gpt-made"
    async with service.db.connection() as conn:
        cursor = await conn.execute(
            "select count(*) from resources where workspace_id = %s and name = 'gpt-made'",
            (service.environment.workspace_id,),
        )
        assert await cursor.fetchone() == (1,)


async def test_a_confined_key_uses_only_its_resources(service: Service) -> None:
    async with service.db.transaction() as conn:
        _, value = await api_keys.create(
            conn,
            workspace_id=service.environment.workspace_id,
            environment_id=service.environment.environment_id,
            name="confined",
            resources=[str(uuid7())],
        )
    other = await service.create("not for this key")
    async with (
        DefaultAsyncHttpxClient(trust_env=False) as http,
        AsyncOpenAI(base_url=f"{service.url}/v1", api_key=value, http_client=http) as client,
    ):
        batch = await settled(client, (await submit(client, [line(1)])).id)
        assert batch.errors is not None
        assert batch.errors.data is not None
        assert [e.code for e in batch.errors.data] == ["model_not_allowed"]
        with pytest.raises(openai.PermissionDeniedError):
            await client.batches.retrieve("batch_" + UUID(other["batchId"]).hex)
        assert [b.id async for b in client.batches.list()] == [batch.id]


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"completion_window": "soon"}, "completion_window"),
        ({"endpoint": "/v1/images/generations"}, "endpoint"),
        ({"metadata": {str(n): "x" for n in range(17)}}, "metadata"),
        ({"metadata": {"a": "x" * 513}}, "metadata"),
        ({"metadata": {"a" * 65: "x"}}, "metadata"),
        ({"output_expires_after": {"anchor": "created_at", "seconds": 1}}, None),
        ({"extra_body": {"priority": 101}}, "priority"),
    ],
    ids=str,
)
async def test_what_cannot_be_made_is_refused_at_once(
    client: AsyncOpenAI, change: Json, param: str | None
) -> None:
    with pytest.raises(openai.BadRequestError) as refusal:
        await submit(client, [line(1)], **change)
    assert refusal.value.request_id
    assert refusal.value.type == "invalid_request_error"
    assert refusal.value.code == "invalid_value"
    if param is not None:
        assert refusal.value.param == param


async def test_errors_have_openai_s_shape_and_classes(
    service: Service, client: AsyncOpenAI
) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        await client.batches.retrieve("batch_nothing")
    assert missing.value.param == "id"
    with pytest.raises(openai.NotFoundError) as missing:
        await client.batches.create(input_file_id="file-0", endpoint=CHAT, completion_window="24h")
    assert missing.value.param == "input_file_id"
    with pytest.raises(openai.AuthenticationError) as unknown:
        await client.with_options(api_key="slk_wrong").batches.list()
    assert unknown.value.code == "invalid_api_key"
    for path, status in (("/v1/batches/batch_x/nothing", 404), ("/v1/files/file-x/content", 405)):
        answer = await service.http.post(path)
        assert answer.status_code == status
        assert answer.json()["error"]["type"] == "invalid_request_error"
    answer = await service.http.post("/v1/batches", json={"endpoint": CHAT})
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == "missing_required_parameter"
    assert answer.headers["x-request-id"]
    batch = await settled(client, (await submit(client, [line(1)])).id)
    await service.work()
    with pytest.raises(openai.ConflictError) as ended:
        await client.batches.cancel(batch.id)
    assert ended.value.response.headers["x-should-retry"] == "false"


async def test_a_repeat_with_the_same_key_makes_one_batch(client: AsyncOpenAI) -> None:
    file = await upload(client, [line(1)])

    async def create(**more: Any) -> Batch:  # noqa: ANN401 - passes through
        return await client.batches.create(
            input_file_id=file,
            endpoint=CHAT,
            completion_window="24h",
            extra_headers={"Idempotency-Key": "k"},
            **more,
        )

    first, second = await asyncio.gather(create(), create())
    assert first.id == second.id
    with pytest.raises(openai.ConflictError):
        await create(metadata={"other": "body"})


async def test_extensions_leave_the_sdk_unharmed(service: Service, client: AsyncOpenAI) -> None:
    batch = await submit(
        client,
        [line(n) for n in range(3)],
        completion_window="30m",
        extra_body={"priority": 5, "weight": 2.5, "name": "nightly"},
    )
    assert batch.expires_at == batch.created_at + 1800
    batch = await settled(client, batch.id)
    assert batch.model_extra is not None
    assert batch.model_extra["priority"] == 5
    assert batch.model_extra["weight"] == 2.5
    assert batch.model_extra["name"] == "nightly"
    paused = await client.post(f"/batches/{batch.id}/pause", cast_to=Batch)
    assert paused.model_extra is not None
    assert paused.model_extra["is_paused"]
    assert await service.claim() == []
    await client.post(f"/batches/{batch.id}/resume", cast_to=Batch)
    taken = await service.claim()
    await service.settle(taken[:2])
    await service.fail(taken[2:])
    done = await settled(client, batch.id, lambda b: b.status == "completed")
    answer = await service.http.get(f"/v1/batches/{batch.id}/results", params={"limit": "2"})
    page = answer.json()
    assert [each["custom_id"] for each in page["data"]] == ["q-0", "q-1"]
    assert page["has_more"]
    assert not page["complete"]
    answer = await service.http.get(
        f"/v1/batches/{batch.id}/results", params={"after": page["next_cursor"]}
    )
    assert [each["custom_id"] for each in answer.json()["data"]] == ["q-2"]
    assert answer.json()["complete"]
    old = done.error_file_id
    assert len(parsed(await text_of(client, old))) == 1
    again = await client.post(f"/batches/{batch.id}/retry", cast_to=Batch)
    assert again.status == "in_progress"
    assert again.error_file_id is None
    await service.work()
    done = await settled(client, batch.id, lambda b: b.status == "completed")
    assert len(parsed(await text_of(client, done.output_file_id))) == 3
    assert done.error_file_id is None
    with pytest.raises(openai.NotFoundError):
        await text_of(client, old)


async def test_after_a_retry_the_error_file_is_another_one(
    service: Service, client: AsyncOpenAI
) -> None:
    batch = await settled(client, (await submit(client, [line(1), line(2)])).id)
    await service.fail(await service.claim())
    first = await settled(client, batch.id, lambda b: b.status == "completed")
    assert len(parsed(await text_of(client, first.error_file_id))) == 2
    await client.post(f"/batches/{batch.id}/retry", cast_to=Batch)
    taken = await service.claim()
    await service.settle(taken[:1])
    await service.fail(taken[1:])
    second = await settled(client, batch.id, lambda b: b.status == "completed")
    assert second.error_file_id != first.error_file_id
    assert len(parsed(await text_of(client, second.error_file_id))) == 1


async def test_an_estimate_says_what_a_batch_would_ask_for(
    service: Service, client: AsyncOpenAI
) -> None:
    file = await upload(client, [line(1), line(2), line(3, model="unheard-of")])
    answer = await service.http.post(
        "/v1/batches/estimate", json={"input_file_id": file, "endpoint": CHAT}
    )
    assert answer.status_code == 200, answer.text
    told = answer.json()
    assert told["requests"] == 2
    assert told["input_tokens"] > 0
    assert told["is_feasible"] is False
    assert [e["line"] for e in told["errors"]["data"]] == [3]
    assert await service.added() == (0, 0)


async def test_a_batch_is_cancelled_while_it_is_validated(
    service: Service, client: AsyncOpenAI
) -> None:
    """Whoever validates it then decides nothing: its transaction is undone."""
    service.context.validator._at_once = 0  # pyright: ignore[reportPrivateUsage] - nobody validates
    try:
        batch = await submit(client, [line(1)])
        lease_id = uuid7()
        async with service.db.connection() as conn:
            held = await submissions.lease(conn, lease_id=lease_id, lease_s=60)
        assert held is not None
        cancelled = await client.batches.cancel(batch.id)
        assert cancelled.status == "cancelled"
        assert cancelled.cancelled_at is not None
        async with service.db.connection() as conn:
            assert not await submissions.renew(conn, held=held, lease_id=lease_id, lease_s=60)
        await service.context.validator._validate(held, lease_id)  # pyright: ignore[reportPrivateUsage]
    finally:
        service.context.validator._at_once = 3  # pyright: ignore[reportPrivateUsage]
    assert (await client.batches.retrieve(batch.id)).status == "cancelled"
    assert await service.added() == (0, 0)


async def test_results_of_outcomes_without_a_reply(service: Service, client: AsyncOpenAI) -> None:
    """What no provider answered has no response, and says why."""
    batch = await settled(client, (await submit(client, [line(1), line(2)])).id)
    first, second = await service.claim()
    await service.settle([first], Outcome.impossible, error="CAPACITY_IMPOSSIBLE")
    await service.settle([second], body='{"text":\n "two lines",\r\n"a": 1}')
    done = await settled(client, batch.id, lambda b: b.status == "completed")
    (error,) = parsed(await text_of(client, done.error_file_id))
    assert error["response"]["body"]["error"]["code"] == "CAPACITY_IMPOSSIBLE"
    (answer,) = parsed(await text_of(client, done.output_file_id))
    assert answer["response"]["body"] == {"text": "two lines", "a": 1}
