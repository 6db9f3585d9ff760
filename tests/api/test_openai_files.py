"""OpenAI's Files through the unmodified SDK: uploads, ranges, output files that grow, what is lost."""

import asyncio
import json
import os
import random
import signal
import sys
from collections.abc import AsyncIterator
from uuid import UUID

import openai
import pytest
from openai import AsyncOpenAI, DefaultAsyncHttpxClient

from app import files
from app.files import CHUNK
from app.settings import Settings
from tests.api.conftest import Service, service_on
from tests.api.test_openai import jsonl, line, settled, submit

SMALL = Settings(port=0, max_batch_file_bytes=2048, max_file_bytes=3 * CHUNK)


@pytest.fixture
async def client(service: Service) -> AsyncIterator[AsyncOpenAI]:
    async with (
        DefaultAsyncHttpxClient(trust_env=False) as http,
        AsyncOpenAI(base_url=f"{service.url}/v1", api_key=service.key, http_client=http) as made,
    ):
        yield made


def filler(size: int) -> bytes:
    return random.Random(1).randbytes(size)  # noqa: S311 - no secrets


async def chunks_of(service: Service) -> int:
    async with service.db.connection() as conn:
        cursor = await conn.execute(
            "select count(*) from file_chunks where workspace_id = %s",
            (service.environment.workspace_id,),
        )
        row = await cursor.fetchone()
    assert row is not None
    return row[0]


async def test_a_file_comes_back_as_it_went(service: Service, client: AsyncOpenAI) -> None:
    data = filler(3 * CHUNK + 17)
    made = await client.files.create(
        file=("Größe.bin", data),
        purpose="user_data",
        expires_after={"anchor": "created_at", "seconds": 3600},
    )
    assert made.id.startswith("file-")
    assert made.bytes == len(data)
    assert made.filename == "Größe.bin"
    assert made.purpose == "user_data"
    assert made.status == "processed"
    assert made.expires_at == made.created_at + 3600
    assert (await client.files.content(made.id)).content == data
    assert await chunks_of(service) == 4
    async with client.files.with_streaming_response.content(made.id) as streamed:
        assert b"".join([piece async for piece in streamed.iter_bytes()]) == data
    assert (await client.files.retrieve(made.id)) == made
    assert (await client.files.delete(made.id)).deleted
    assert await chunks_of(service) == 0
    with pytest.raises(openai.NotFoundError):
        await client.files.delete(made.id)


async def test_files_for_batches_expire_after_thirty_days(client: AsyncOpenAI) -> None:
    made = await client.files.create(file=("in.jsonl", jsonl([line(1)])), purpose="batch")
    assert made.expires_at == made.created_at + 30 * 86_400
    kept = await client.files.create(file=("a.txt", b"a"), purpose="user_data")
    assert kept.expires_at is None


@pytest.mark.parametrize(
    ("asked", "begin", "end"),
    [
        ("bytes=0-0", 0, 1),
        ("bytes=10-", 10, None),
        ("bytes=-5", -5, None),
        (f"bytes={CHUNK - 3}-{CHUNK + 3}", CHUNK - 3, CHUNK + 4),
        (f"bytes=0-{10**17}", 0, None),
    ],
)
async def test_a_range_of_a_stored_file(
    service: Service, client: AsyncOpenAI, asked: str, begin: int, end: int | None
) -> None:
    data = filler(CHUNK + 100)
    made = await client.files.create(file=("a.bin", data), purpose="user_data")
    answer = await service.http.get(f"/v1/files/{made.id}/content", headers={"Range": asked})
    assert answer.status_code == 206
    assert answer.content == data[begin:end]
    first = begin % len(data)
    last = first + len(answer.content) - 1
    assert answer.headers["content-range"] == f"bytes {first}-{last}/{len(data)}"


@pytest.mark.parametrize(
    ("asked", "status"),
    [("bytes=4-", 416), ("bytes=-0", 416), ("bytes=2-1", 200), ("bytes=0-1,3-3", 200), ("x", 200)],
)
async def test_a_range_that_cannot_be_served(
    service: Service, client: AsyncOpenAI, asked: str, status: int
) -> None:
    made = await client.files.create(file=("a.txt", b"abcd"), purpose="user_data")
    answer = await service.http.get(f"/v1/files/{made.id}/content", headers={"Range": asked})
    assert answer.status_code == status
    if status == 416:
        assert answer.headers["content-range"] == "bytes */4"
        assert answer.json()["error"]["code"] == "range_not_satisfiable"
    else:
        assert answer.content == b"abcd"


async def test_files_are_listed_with_automatic_paging(
    service: Service, client: AsyncOpenAI
) -> None:
    made = [
        (await client.files.create(file=(f"{n}.txt", b"x"), purpose="user_data")).id
        for n in range(3)
    ]
    batch = await settled(client, (await submit(client, [line(1), line(2)])).id)
    taken = await service.claim()
    await service.settle(taken[:1])
    await service.fail(taken[1:])
    done = await client.batches.retrieve(batch.id)
    assert done.error_file_id is not None
    assert done.output_file_id is not None
    results = sorted([done.error_file_id, done.output_file_id])
    everything = [*made, done.input_file_id, *results]
    assert [f.id async for f in client.files.list(limit=2, order="asc")] == everything
    assert [f.id async for f in client.files.list(limit=4)] == everything[::-1]
    assert [f.id async for f in client.files.list(purpose="user_data")] == made[::-1]
    assert [f.id async for f in client.files.list(purpose="batch_output")] == results[::-1]
    page = await client.files.list(after=made[0], limit=1, order="asc")
    assert [f.id for f in page.data] == [made[1]]
    assert page.has_more


async def test_the_parts_of_an_upload_may_come_in_any_order(service: Service) -> None:
    answer = await service.http.post(
        "/v1/files", files=[("file", ("a.txt", b"abc")), ("purpose", (None, b"vision"))]
    )
    assert answer.status_code == 200, answer.text
    assert answer.json()["purpose"] == "vision"


@pytest.mark.parametrize(
    ("parts", "param"),
    [
        ([("file", ("a", b"abc"))], "purpose"),
        ([("purpose", (None, b"batch"))], "file"),
        ([("purpose", (None, b"batch_output")), ("file", ("a", b"abc"))], "purpose"),
        ([("purpose", (None, b"batch")), ("file", ("a", b""))], "file"),
        ([("purpose", (None, b"x" * 2000)), ("file", ("a", b"abc"))], "file"),
        ([("file", ("a", b"abc")), ("file", ("b", b"abc"))], "file"),
        (
            [
                ("purpose", (None, b"batch")),
                ("expires_after[anchor]", (None, b"created_at")),
                ("expires_after[seconds]", (None, b"60")),
                ("file", ("a", b"abc")),
            ],
            "expires_after[seconds]",
        ),
    ],
    ids=["no purpose", "no file", "not ours", "empty", "long", "two files", "short expiry"],
)
async def test_an_upload_that_is_not_right_leaves_nothing(
    service: Service, parts: list[tuple[str, tuple[str | None, bytes]]], param: str
) -> None:
    answer = await service.http.post("/v1/files", files=parts)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param
    assert await chunks_of(service) == 0


async def test_a_body_that_is_no_upload_is_refused(service: Service) -> None:
    answer = await service.http.post("/v1/files", json={"purpose": "batch"})
    assert answer.status_code == 400
    answer = await service.http.post(
        "/v1/files", content=b"--x\r\n", headers={"content-type": "multipart/form-data; boundary=x"}
    )
    assert answer.status_code == 400
    assert "multipart" in answer.json()["error"]["message"]


@pytest.mark.parametrize("settings", [SMALL], ids=["small"])
async def test_a_file_that_is_too_large_is_refused_and_leaves_nothing(
    lone_service: Service,
) -> None:
    for purpose, size in (("batch", 2049), ("user_data", 3 * CHUNK + 1)):
        answer = await lone_service.http.post(
            "/v1/files",
            files=[("purpose", (None, purpose.encode())), ("file", ("a", b"x" * size))],
        )
        assert answer.status_code == 413
        assert "SLUICE_MAX_" in answer.json()["error"]["message"]
    assert await chunks_of(lone_service) == 0


async def test_an_upload_that_breaks_off_leaves_nothing(service: Service) -> None:
    host, port = service.url.removeprefix("http://").split(":")
    _, writer = await asyncio.open_connection(host, int(port))
    head = (
        "POST /v1/files HTTP/1.1\r\nhost: x\r\n"
        f"authorization: Bearer {service.key}\r\ncontent-length: {10 * CHUNK}\r\n"
        "content-type: multipart/form-data; boundary=x\r\n\r\n"
        '--x\r\ncontent-disposition: form-data; name="file"; filename="a"\r\n\r\n'
    )
    writer.write(head.encode() + b"x" * (2 * CHUNK))
    await writer.drain()
    async with asyncio.timeout(20):
        while not await chunks_of(service):  # noqa: ASYNC110 - what is awaited tells nobody
            await asyncio.sleep(0.02)
        writer.close()
        while await chunks_of(service):  # noqa: ASYNC110 - what is awaited tells nobody
            await asyncio.sleep(0.02)
    async with service.db.connection() as conn:
        cursor = await conn.execute(
            "select from files where workspace_id = %s", (service.environment.workspace_id,)
        )
    assert cursor.rowcount == 0


async def test_maintenance_deletes_what_expired_or_was_broken_off(service: Service) -> None:
    async with service.db.transaction() as conn:
        where = {
            "workspace_id": service.environment.workspace_id,
            "environment_id": service.environment.environment_id,
        }
        kept = await files.begin(conn, **where)
        await files.append(conn, workspace_id=where["workspace_id"], file_id=kept, no=0, data=b"a")
        expired, left = await files.begin(conn, **where), await files.begin(conn, **where)
        for file_id, expires_s in ((kept, 60.0), (expired, -1.0)):
            await files.finish(
                conn,
                workspace_id=where["workspace_id"],
                file_id=file_id,
                purpose="batch",
                filename="a",
                size=1,
                expires_s=expires_s,
            )
        assert await files.get(conn, **where, file_id=expired) is None
        await conn.execute(
            "update files set begun_at = now() - interval '25 hours' where file_id = %s", (left,)
        )
        await files.prune(conn)
        cursor = await conn.execute(
            "select file_id from files where workspace_id = %s", (where["workspace_id"],)
        )
        assert await cursor.fetchall() == [(kept,)]


async def test_another_tenant_sees_nothing(service: Service, client: AsyncOpenAI) -> None:
    batch = await settled(client, (await submit(client, [line(1)])).id)
    await service.work()
    batch = await client.batches.retrieve(batch.id)
    async with (
        service_on(service) as other,
        DefaultAsyncHttpxClient(trust_env=False) as http,
        AsyncOpenAI(base_url=f"{service.url}/v1", api_key=other.key, http_client=http) as stranger,
    ):
        for file_id in (batch.input_file_id, batch.output_file_id):
            assert file_id is not None
            for call in (stranger.files.retrieve, stranger.files.content, stranger.files.delete):
                with pytest.raises(openai.NotFoundError):
                    await call(file_id)
        for verb in (stranger.batches.retrieve, stranger.batches.cancel):
            with pytest.raises(openai.NotFoundError):
                await verb(batch.id)
        with pytest.raises(openai.NotFoundError):
            await stranger.batches.create(
                input_file_id=batch.input_file_id,
                endpoint="/v1/chat/completions",
                completion_window="24h",
            )
        assert [f.id async for f in stranger.files.list()] == []
        assert [b.id async for b in stranger.batches.list()] == []


async def test_an_output_file_is_followed_while_its_batch_runs(
    service: Service, client: AsyncOpenAI
) -> None:
    """In pieces of any size, from the last byte on, beside four takers; bytes never change."""
    count = 60
    batch = await settled(client, (await submit(client, [line(n) for n in range(count)])).id)
    chance = random.Random(3)  # noqa: S311 - no secrets
    got = bytearray()
    is_complete = False

    async def work() -> None:
        while taken := await service.claim(want=chance.randint(1, 9)):
            for item in taken:
                body = json.dumps({"text": "é" * chance.randint(1, 20_000)}, ensure_ascii=False)
                if item.seq % 10 == 0:
                    await service.fail([item])
                else:
                    await service.settle([item], body=body)
                await asyncio.sleep(0)

    async def follow() -> None:
        nonlocal is_complete
        begun = await settled(client, batch.id, lambda b: b.output_file_id is not None)
        file_id = begun.output_file_id
        while not is_complete:
            to = chance.choice(["", str(len(got) + chance.randint(0, 40_000))])
            answer = await service.http.get(
                f"/v1/files/{file_id}/content", headers={"Range": f"bytes={len(got)}-{to}"}
            )
            if answer.status_code == 206:
                got.extend(answer.content)
            else:
                assert answer.status_code == 416
                await asyncio.sleep(0.01)
            is_complete = answer.headers["x-sluice-complete"] == "true" and int(
                answer.headers["x-sluice-next-offset"]
            ) == len(got)

    async with asyncio.timeout(60):
        await asyncio.gather(work(), follow())
    done = await client.batches.retrieve(batch.id)
    assert done.status == "completed"
    assert done.output_file_id is not None
    whole = await client.files.content(done.output_file_id)
    assert whole.content == bytes(got)
    assert len(whole.content.splitlines()) == count - count // 10
    answer = await service.http.get(
        f"/v1/files/{done.output_file_id}/content", params={"order": "input"}
    )
    by_input = answer.content.splitlines()
    assert sorted(by_input) == sorted(whole.content.splitlines())
    ids = [json.loads(each)["custom_id"] for each in by_input]
    assert ids == [f"q-{n}" for n in range(count) if n % 10]
    last = len(got) - 1
    answer = await service.http.get(
        f"/v1/files/{done.output_file_id}/content", headers={"Range": f"bytes={last}-"}
    )
    assert answer.content == b"\n"
    assert answer.headers["content-range"] == f"bytes {last}-{last}/{len(got)}"


async def test_a_running_batch_s_file_says_where_to_go_on(
    service: Service, client: AsyncOpenAI
) -> None:
    batch = await settled(client, (await submit(client, [line(1), line(2)])).id)
    taken = await service.claim()
    await service.settle(taken[:1])
    file_id = (await client.batches.retrieve(batch.id)).output_file_id
    assert file_id is not None
    whole = await client.files.content(file_id)
    assert whole.response.headers["x-sluice-complete"] == "false"
    size = len(whole.content)
    assert whole.response.headers["x-sluice-next-offset"] == str(size)
    path = f"/v1/files/{file_id}/content"
    answer = await service.http.get(path, headers={"Range": f"bytes={size}-"})
    assert answer.status_code == 416
    assert answer.headers["x-sluice-complete"] == "false"
    answer = await service.http.get(path, headers={"Range": "bytes=1-"})
    assert answer.headers["content-range"] == f"bytes 1-{size - 1}/*"
    answer = await service.http.get(path, params={"order": "input"})
    assert answer.status_code == 400
    await service.settle(taken[1:])
    answer = await service.http.get(path, headers={"Range": f"bytes={size}-"})
    assert answer.headers["x-sluice-complete"] == "true"
    assert json.loads(answer.content)["custom_id"] == "q-2"


async def test_output_files_expire_from_their_first_line_on(
    service: Service, client: AsyncOpenAI
) -> None:
    expiry = {"anchor": "created_at", "seconds": 3600}
    batch = await submit(client, [line(1)], output_expires_after=expiry)
    batch = await settled(client, batch.id)
    await service.work()
    output = (await client.batches.retrieve(batch.id)).output_file_id
    assert output is not None
    file = await client.files.retrieve(output)
    assert file.expires_at == file.created_at + 3600
    async with service.db.connection() as conn:
        await conn.execute(
            "update result_files set begun_at = begun_at - interval '1 hour' where batch_id = %s",
            (UUID(batch.id.removeprefix("batch_")),),
        )
    with pytest.raises(openai.NotFoundError):
        await client.files.retrieve(output)


async def test_a_file_that_is_deleted_during_validation_fails_its_batch(
    service: Service, client: AsyncOpenAI
) -> None:
    service.context.validator._at_once = 0  # pyright: ignore[reportPrivateUsage] - nobody validates
    try:
        batch = await submit(client, [line(1)])
        await client.files.delete(batch.input_file_id)
    finally:
        service.context.validator._at_once = 3  # pyright: ignore[reportPrivateUsage]
    batch = await settled(client, batch.id)
    assert batch.errors is not None
    assert batch.errors.data is not None
    assert [e.code for e in batch.errors.data] == ["file_not_found"]


VALIDATOR = """
import asyncio, sys
from app import settings
from app.db import Database
from app.doorbell import Ringer
from app.validator import Validator

async def main():
    async with Database(sys.argv[1], size=4) as db:
        await Validator(settings.load(), db, ringer=Ringer(db)).run()

asyncio.run(main())
"""


async def test_a_killed_process_leaves_its_validation_to_another(
    lone_service: Service, database: str
) -> None:
    """SIGKILL in the middle: its transaction is undone, and the next process begins anew."""
    service = lone_service
    service.context.validator._at_once = 0  # pyright: ignore[reportPrivateUsage] - the other one does it
    variables = {**os.environ, "SLUICE_VALIDATION_LEASE_S": "1"}
    async with service.db.transaction() as holding:
        # Its COPY waits for this, half way through.
        await holding.execute("lock table item_requests in share mode")
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-c", VALIDATOR, database), env=variables
        )
        try:
            async with (
                DefaultAsyncHttpxClient(trust_env=False) as http,
                AsyncOpenAI(
                    base_url=f"{service.url}/v1", api_key=service.key, http_client=http
                ) as client,
            ):
                batch = await submit(client, [line(n) for n in range(10)])
                async with asyncio.timeout(60):
                    while not await _waits(service):  # noqa: ASYNC110 - tells nobody
                        await asyncio.sleep(0.05)
                process.send_signal(signal.SIGKILL)
                await process.wait()
                assert (await client.batches.retrieve(batch.id)).status == "validating"
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
    service.context.validator._at_once = 3  # pyright: ignore[reportPrivateUsage]
    service.context.validator.kick()
    async with (
        DefaultAsyncHttpxClient(trust_env=False) as http,
        AsyncOpenAI(base_url=f"{service.url}/v1", api_key=service.key, http_client=http) as client,
    ):
        batch = await settled(client, batch.id)
    assert batch.status == "in_progress"
    assert await service.stored() == (1, 10)


async def _waits(service: Service) -> bool:
    """Whether somebody copies items and waits for the lock."""
    async with service.db.connection() as conn:
        cursor = await conn.execute(
            "select from pg_locks l join pg_stat_activity a on a.pid = l.pid "
            "where not l.granted and a.query ilike 'copy item_requests%'"
        )
    return cursor.rowcount > 0
