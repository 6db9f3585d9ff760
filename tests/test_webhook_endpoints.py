"""Webhooks of an environment, managed with the unmodified OpenAI SDK and verified by it."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from uuid import UUID

import openai
import pytest
from openai import AsyncOpenAI, OpenAI
from openai.types import Batch
from openai.types.webhooks import (
    BatchCompletedWebhookEvent,
    BatchFailedWebhookEvent,
    WebhookEndpointWithSecret,
)
from standardwebhooks.webhooks import WebhookVerificationError

from app import submissions, workspaces
from app.db import Database
from app.doorbell import EVENTS
from app.ids import uuid7
from tests.api.conftest import Service, server_on, service_on
from tests.receivers import Json, Receiver, Reply, Request, receiving
from tests.test_callbacks import KEY, SETTINGS, run, sending, until

ALL = ["batch.completed", "batch.failed", "batch.expired", "batch.cancelled"]


@pytest.fixture
async def service(db: Database) -> AsyncIterator[Service]:
    async with server_on(db, SETTINGS, key=KEY) as server, service_on(server) as made:
        yield made


@pytest.fixture
async def client(service: Service) -> AsyncIterator[AsyncOpenAI]:
    async with AsyncOpenAI(
        base_url=f"{service.url}/v1", api_key=service.key, max_retries=0
    ) as made:
        yield made


async def test_endpoints_are_managed_by_the_sdk(client: AsyncOpenAI) -> None:
    types = await client.webhooks.event_types.list()
    assert types.data == ALL
    made = await client.webhooks.create(
        name="ends", url="https://example.com/hook", event_types=["batch.completed"]
    )
    assert made.object == "webhook_endpoint"
    assert made.signing_secret.startswith("whsec_")
    assert made.signing_secret_hint == f"whsec_…{made.signing_secret[-4:]}"
    read = await client.webhooks.retrieve(made.id)
    assert (read.name, read.url, read.event_types) == (
        "ends",
        "https://example.com/hook",
        ["batch.completed"],
    )
    assert read.updated_at == made.created_at
    assert made.signing_secret not in read.model_dump_json()
    changed = await client.webhooks.update(
        made.id, event_types=["batch.failed", "batch.expired"], name="other"
    )
    assert (changed.name, changed.url) == ("other", "https://example.com/hook")
    assert changed.event_types == ["batch.failed", "batch.expired"]
    rotated = await client.webhooks.rotate_secret(made.id)
    assert rotated.signing_secret != made.signing_secret
    gone = await client.webhooks.delete(made.id)
    assert (gone.id, gone.deleted, gone.object) == (made.id, True, "webhook_endpoint.deleted")
    with pytest.raises(openai.NotFoundError):
        await client.webhooks.retrieve(made.id)
    with pytest.raises(openai.NotFoundError):
        await client.webhooks.delete(made.id)


async def test_endpoints_are_listed_newest_first_over_pages(
    service: Service, client: AsyncOpenAI
) -> None:
    made = [
        await client.webhooks.create(
            name=f"n{n}", url="https://example.com/", event_types=["batch.completed"]
        )
        for n in range(5)
    ]
    page = await client.webhooks.list(limit=2)
    assert (len(page.data), page.has_more) == (2, True)
    listed = [each.id async for each in client.webhooks.list(limit=2)]
    assert listed == [each.id for each in reversed(made)]
    # Callbacks of batches are no webhooks.
    batch = await service.create(
        type="CALLBACK", callbackOptions={"url": "https://example.com/callback"}
    )
    assert [each.id async for each in client.webhooks.list()] == listed
    with pytest.raises(openai.NotFoundError):
        await client.webhooks.retrieve(f"whe_{UUID(batch['batchId']).hex}")
    with pytest.raises(openai.BadRequestError):
        await client.webhooks.list(limit=1000)


@pytest.mark.parametrize(
    "url",
    [
        "http://example.com\n/",
        "ftp://example.com/",
        "https://10.0.0.1/",
        "https://[::ffff:169.254.169.254]/",
        "https://me@example.com/",
    ],
)
async def test_a_hostile_url_is_refused(url: str, client: AsyncOpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        await client.webhooks.create(name="x", url=url, event_types=["batch.completed"])
    assert (refused.value.param, refused.value.type) == ("url", "invalid_request_error")
    made = await client.webhooks.create(
        name="x", url="https://example.com/", event_types=["batch.completed"]
    )
    with pytest.raises(openai.BadRequestError):
        await client.webhooks.update(made.id, url=url)


async def test_unknown_types_and_empty_names_are_refused(client: AsyncOpenAI) -> None:
    wrongs: list[Json] = [
        {"event_types": ["response.completed"]},
        {"event_types": []},
        {"name": ""},
        {"url": 7},
    ]
    for wrong in wrongs:
        given: Json = {"name": "x", "url": "https://example.com/", "event_types": ["batch.failed"]}
        with pytest.raises(openai.BadRequestError):
            await client.webhooks.create(**(given | wrong))


async def test_another_environment_sees_and_touches_nothing(
    service: Service, client: AsyncOpenAI
) -> None:
    made = await client.webhooks.create(
        name="mine", url="https://example.com/", event_types=["batch.completed"]
    )
    async with service_on(service) as other:
        foreign = AsyncOpenAI(base_url=f"{other.url}/v1", api_key=other.key, max_retries=0)
        async with foreign:
            assert (await foreign.webhooks.list()).data == []
            with pytest.raises(openai.AuthenticationError):
                await foreign.with_options(api_key="slk_wrong").webhooks.list()
            for attempt in (
                foreign.webhooks.retrieve(made.id),
                foreign.webhooks.update(made.id, name="theirs"),
                foreign.webhooks.rotate_secret(made.id),
                foreign.webhooks.test(made.id, event_type="batch.completed"),
                foreign.webhooks.delete(made.id),
            ):
                with pytest.raises(openai.NotFoundError):
                    await attempt
    assert (await client.webhooks.retrieve(made.id)).name == "mine"


async def hook(client: AsyncOpenAI, url: str) -> WebhookEndpointWithSecret:
    """A webhook that is told of everything."""
    return await client.webhooks.create(
        name="all",
        url=url,
        event_types=["batch.completed", "batch.failed", "batch.expired", "batch.cancelled"],
    )


async def told(receiver: Receiver, count: int) -> list[Request]:
    await until(lambda: len(receiver.taken) >= count)
    return receiver.taken


async def test_every_batch_of_the_environment_tells_of_its_end(
    service: Service, client: AsyncOpenAI
) -> None:
    async with receiving() as receiver, sending(service):
        endpoint = await hook(client, receiver.url)
        secret = endpoint.signing_secret
        completed = await service.create("a", "b", metadata={"team": "search"}, name="nightly")
        items = await service.claim()
        await service.settle(items[:1])
        await service.fail(items[1:])
        cancelled = await service.create("c")
        await service.http.post(f"{service.batches}/{cancelled['batchId']}/cancel")
        got = await told(receiver, 2)
        bodies: dict[str, Json] = {}
        events: dict[str, object] = {}
        for request in got:
            request.verify(secret)  # standardwebhooks
            event = client.webhooks.unwrap(request.body, request.headers, secret=secret)
            assert event.id == request.headers["webhook-id"]
            bodies[event.type] = request.told
            events[event.type] = event
        first, body = events["batch.completed"], bodies["batch.completed"]
        assert isinstance(first, BatchCompletedWebhookEvent)
        assert first.data.id == f"batch_{UUID(completed['batchId']).hex}"
        assert first.object == "event"
        assert body["timestamp"].endswith("Z")
        assert body["data"]["status"] == "FAILED"  # as the completion-batch routes say
        assert body["data"]["metadata"] == {"team": "search"}
        assert body["data"]["name"] == "nightly"
        assert body["data"]["request_counts"] == {
            "total": 2,
            "completed": 1,
            "failed": 1,
            "cancelled": 0,
        }
        assert bodies["batch.cancelled"]["data"]["batch_id"] == cancelled["batchId"]
        with OpenAI(api_key="x", webhook_secret=secret) as sync:
            assert sync.webhooks.unwrap(got[0].body, got[0].headers).type in ALL
        with pytest.raises(openai.InvalidWebhookSignatureError):
            client.webhooks.unwrap(got[0].body + b" ", got[0].headers, secret=secret)
        page = await service.get(f"{service.batches}/{completed['batchId']}/deliveries")
        assert [d["endpointId"] for d in page["data"]] == [
            str(UUID(endpoint.id.removeprefix("whe_")))
        ]


async def test_an_expired_batch_says_so(service: Service, client: AsyncOpenAI) -> None:
    async with receiving() as receiver, sending(service):
        await hook(client, receiver.url)
        batch = await service.create("a", "b", completionWindow="1h")
        await run(service, "update flows set expires_at = now()")
        async with service.db.transaction() as conn:
            await conn.execute(
                "select expire(workspace_id, batch_day, batch_id, resource_id, 100) from flows "
                "where batch_id = %s",
                (batch["batchId"],),
            )
        service.context.ringer.ring(EVENTS, [service.key_id])
        (request,) = await told(receiver, 1)
    assert request.told["type"] == "batch.expired"
    assert request.told["data"]["request_counts"]["failed"] == 2


async def validated(client: AsyncOpenAI, text: bytes) -> Batch:
    """A batch that is to be made of a file of that text."""
    file = await client.files.create(file=("in.jsonl", text), purpose="batch")
    return await client.batches.create(
        input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h"
    )


async def test_a_file_that_is_refused_is_told_of(service: Service, client: AsyncOpenAI) -> None:
    """It has no row of batches, only an id; who did not ask for failures is told nothing."""
    async with receiving() as receiver, receiving() as other, sending(service):
        made = await client.webhooks.create(
            name="x", url=receiver.url, event_types=["batch.failed"]
        )
        await client.webhooks.create(name="y", url=other.url, event_types=["batch.completed"])
        batch = await validated(client, b"no json\n")
        (request,) = await told(receiver, 1)
        request.verify(made.signing_secret)
        event = client.webhooks.unwrap(request.body, request.headers, secret=made.signing_secret)
        assert isinstance(event, BatchFailedWebhookEvent)
        assert event.data.id == batch.id
        assert event.id == f"evt_{batch.id.removeprefix('batch_')}_0"
        assert (await client.batches.retrieve(batch.id)).status == "failed"
        await service.create("a")
        await service.work()
        assert [r.told["type"] for r in await told(other, 1)] == ["batch.completed"]
        assert len(receiver.got) == 1


async def test_a_batch_cancelled_while_it_is_validated_is_told_of_once(
    service: Service, client: AsyncOpenAI
) -> None:
    """Not even when its validator comes to its end afterwards."""
    service.context.validator._at_once = 0  # pyright: ignore[reportPrivateUsage] - nobody validates
    async with receiving() as receiver, sending(service):
        await hook(client, receiver.url)
        batch = await validated(client, b"no json\n")
        lease_id = uuid7()
        async with service.db.connection() as conn:
            held = await submissions.lease(conn, lease_id=lease_id, lease_s=60)
        assert held is not None
        for _ in range(2):
            assert (await client.batches.cancel(batch.id)).status == "cancelled"
        await service.context.validator._validate(held, lease_id)  # pyright: ignore[reportPrivateUsage]
        (request,) = await told(receiver, 1)
        assert request.told["type"] == "batch.cancelled"
        assert request.told["data"] == {"id": batch.id}
        async with service.db.connection() as conn:
            rows = await (await conn.execute("select event_no, topic from deliveries")).fetchall()
        assert rows == [(0, "batch.cancelled")]


async def test_a_rotated_secret_overlaps_for_a_day(service: Service, client: AsyncOpenAI) -> None:
    async with receiving() as receiver, sending(service):
        made = await client.webhooks.create(
            name="x", url=receiver.url, event_types=["batch.completed"]
        )
        new = await client.webhooks.rotate_secret(made.id, keep_old_secret_active_for_24_hours=True)
        await service.create("a")
        await service.work()
        (both,) = await told(receiver, 1)
        both.verify(made.signing_secret)
        both.verify(new.signing_secret)
        assert client.webhooks.unwrap(both.body, both.headers, secret=made.signing_secret)
        newest = await client.webhooks.rotate_secret(made.id)
        await service.create("b")
        await service.work()
        _, last = await told(receiver, 2)
        last.verify(newest.signing_secret)
        with pytest.raises(WebhookVerificationError):
            last.verify(new.signing_secret)


async def test_a_sample_is_sent_at_once(client: AsyncOpenAI) -> None:
    async def teapot(_: Request) -> Reply:
        return 418, {}

    async with receiving(teapot) as receiver:
        made = await hook(client, receiver.url)
        tried = await client.webhooks.test(made.id, event_type="batch.expired")
        assert (tried.status_code, tried.success, tried.event_type) == (418, True, "batch.expired")
        assert (tried.object, tried.webhook_endpoint_id) == ("webhook_endpoint.test", made.id)
        (sample,) = receiver.got
        sample.verify(made.signing_secret)
        event = client.webhooks.unwrap(sample.body, sample.headers, secret=made.signing_secret)
        assert event.type == "batch.expired"
    with pytest.raises(openai.BadRequestError, match="cannot be connected to") as refused:
        await client.webhooks.test(made.id, event_type="batch.expired")
    assert refused.value.code == "webhook_test_failed"


async def test_a_gone_endpoint_is_disabled_until_it_is_changed(
    service: Service, client: AsyncOpenAI
) -> None:
    async def gone(_: Request) -> Reply:
        return 410, {}

    async with receiving(gone) as receiver, sending(service):
        made = await hook(client, receiver.url)
        await service.create("a")
        await service.work()

        async def disabled() -> bool:
            shown = await service.get(f"/v1/webhook_endpoints/{made.id}")
            return shown["disabled_reason"] == "the receiver answered 410 Gone"

        await until(disabled)
        receiver.behave = None
        missed = await service.create("b")
        await service.work()
        await client.webhooks.update(made.id, name="mended")
        await service.create("c")
        await service.work()
        await told(receiver, 1)
        page = await service.get(f"{service.batches}/{missed['batchId']}/deliveries")
        assert [d["status"] for d in page["data"]] == ["DEAD"]
        again = await service.http.post(
            f"{service.batches}/{missed['batchId']}/deliveries/redeliver"
        )
        assert again.json() == {"redelivered": 1}
        await told(receiver, 2)


async def test_a_deleted_endpoint_is_told_nothing_more(
    service: Service, client: AsyncOpenAI
) -> None:
    made = await hook(client, "https://example.com/")
    batch = await service.create("a")
    await service.work()
    await client.webhooks.delete(made.id)
    path = f"{service.batches}/{batch['batchId']}/deliveries"
    (dead,) = (await service.get(path))["data"]
    assert (dead["status"], dead["reason"], dead["url"]) == (
        "DEAD",
        "its endpoint was deleted",
        None,
    )
    answer = await service.http.post(f"{path}/{dead['deliveryId']}/redeliver")
    assert (answer.status_code, answer.json()["errorCode"]) == (409, "ENDPOINT_NOT_FOUND")
    assert (await service.http.post(f"{path}/redeliver")).json() == {"redelivered": 0}


async def break_secret(service: Service, endpoint_id: UUID) -> None:
    """As if the key that sealed it were lost."""
    await run(
        service,
        "update endpoints set secret_key_id = 'lost' where endpoint_id = %s",
        endpoint_id,
    )


async def test_what_cannot_be_signed_is_given_up_in_the_end_with_a_reason(
    service: Service, client: AsyncOpenAI
) -> None:
    async with receiving() as receiver, sending(service, delivery_schedule_s="0.05,0.05"):
        made = await hook(client, receiver.url)
        await break_secret(service, UUID(made.id.removeprefix("whe_")))
        batch = await service.create("a")
        await service.work()
        path = f"{service.batches}/{batch['batchId']}/deliveries"

        async def given_up() -> bool:
            return [d["status"] for d in (await service.get(path))["data"]] == ["DEAD"]

        await until(given_up)
        (dead,) = (await service.get(path))["data"]
        assert dead["reason"].startswith("the endpoint's secret cannot be opened")
        assert [t["errorCode"] for t in dead["attempts"]] == ["secret_unreadable"] * 3
        assert receiver.got == []
        with pytest.raises(openai.BadRequestError, match="rotate_secret"):
            await client.webhooks.test(made.id, event_type="batch.completed")
        # The way out: a new secret, and what was given up is told after all.
        new = await client.webhooks.rotate_secret(made.id, keep_old_secret_active_for_24_hours=True)
        assert (await service.http.post(f"{path}/redeliver")).json() == {"redelivered": 1}
        (request,) = await told(receiver, 1)
        request.verify(new.signing_secret)


async def test_a_missing_key_that_comes_back_loses_nothing(
    service: Service, client: AsyncOpenAI
) -> None:
    async with receiving() as receiver, sending(service):
        made = await hook(client, receiver.url)
        endpoint_id = UUID(made.id.removeprefix("whe_"))
        await break_secret(service, endpoint_id)
        batch = await service.create("a")
        await service.work()
        path = f"{service.batches}/{batch['batchId']}/deliveries"

        async def was_tried() -> bool:
            (delivery,) = (await service.get(path))["data"]
            return len(delivery["attempts"]) > 0

        await until(was_tried)
        await run(
            service,
            "update endpoints set secret_key_id = %s where endpoint_id = %s",
            service.keyring.key_id,
            endpoint_id,
        )
        (request,) = await told(receiver, 1)
        request.verify(made.signing_secret)


async def test_endpoints_do_not_keep_an_environment_from_being_deleted(
    service: Service, client: AsyncOpenAI
) -> None:
    """What happened before is told all the same; nothing new can happen there."""
    place = {
        "workspace_id": service.environment.workspace_id,
        "environment_id": service.environment.environment_id,
    }
    async with receiving() as receiver:
        await hook(client, receiver.url)
        await service.create("a")
        await service.work()
        async with service.db.transaction() as conn:
            await workspaces.delete_environment(conn, **place)
            # One that is being made at this moment waits, and then there is no place for it.
            late = asyncio.create_task(hook(client, receiver.url))
            await until(lambda: waits(service))
        with pytest.raises(openai.NotFoundError, match="Environment"):
            await late
        with pytest.raises(openai.AuthenticationError):
            await client.webhooks.list()
        async with sending(service):
            await told(receiver, 1)
        async with service.db.transaction() as conn:
            await workspaces.delete(conn, workspace_id=service.environment.workspace_id)


async def waits(service: Service) -> bool:
    """Whether some session waits for a lock."""
    async with service.db.connection() as conn:
        cursor = await conn.execute(
            "select count(*) from pg_stat_activity"
            " where datname = current_database() and wait_event_type = 'Lock'"
        )
        row = await cursor.fetchone()
    return row != (0,)


async def test_an_endpoint_that_was_locked_is_found_by_the_sweep(
    service: Service, client: AsyncOpenAI
) -> None:
    """Settling never waits for a standing endpoint; what it could not wake is looked for."""
    async with receiving() as receiver:
        await hook(client, receiver.url)
        await service.create("a")
        async with service.db.transaction() as conn:
            await conn.execute("select from endpoints for no key update")
            await service.work()
        async with service.db.connection() as conn:
            row = await (
                await conn.execute("select next_at = 'infinity' from endpoints")
            ).fetchone()
        assert row == (True,)
        async with sending(service):
            await told(receiver, 1)


async def test_batches_without_anyone_to_tell_write_no_deliveries(service: Service) -> None:
    await service.create("a", "b")
    await service.work()
    async with service.db.connection() as conn:
        rows = await (await conn.execute("select kind::text from events")).fetchall()
        row = await (await conn.execute("select count(*) from deliveries")).fetchone()
    assert Counter(kind for (kind,) in rows)["batch-completed"] == 1
    assert row == (0,)
