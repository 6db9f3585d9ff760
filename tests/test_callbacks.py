"""Callbacks: every event reaches its receiver at least once, signed, and the batch's end last."""

import asyncio
import base64
import os
import signal
import sys
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from uuid import UUID

import psycopg
import pytest

from app.db import Database
from app.secrets import Keyring
from app.sender import Sender
from app.settings import Settings
from tests.api.conftest import Json, Service, server_on, service_on
from tests.receivers import Receiver, Reply, Request, receiving

LOOPBACK = "127.0.0.0/8"
KEY = Keyring.generate()
SETTINGS = Settings(
    port=0,
    provider_allow_networks=LOOPBACK,
    callback_allow_networks=LOOPBACK,
    delivery_timeout_s=0.5,
    delivery_schedule_s=",".join(["0.05"] * 20),
    delivery_rest_s=0.2,
)


@pytest.fixture
async def service(db: Database) -> AsyncIterator[Service]:
    async with server_on(db, SETTINGS, key=KEY) as server, service_on(server) as made:
        yield made


@asynccontextmanager
async def sending(service: Service, **changed: object) -> AsyncGenerator[Sender]:
    settings = SETTINGS.model_copy(update=changed)
    sender = Sender(settings, service.db, keyring=service.keyring, listen_url=service.db.url)
    sender.start()
    try:
        yield sender
    finally:
        await sender.close()


async def until(true: Callable[[], Awaitable[bool] | bool]) -> None:
    async with asyncio.timeout(30):
        while True:
            held = true()
            if held is True or (not isinstance(held, bool) and await held):
                return
            await asyncio.sleep(0.02)


async def create(service: Service, url: str, *texts: str, **options: object) -> Json:
    return await service.create(*texts, type="CALLBACK", callbackOptions={"url": url, **options})


async def statuses(service: Service, batch: Json) -> Counter[str]:
    page = await service.get(f"{service.batches}/{batch['batchId']}/deliveries", limit="1000")
    return Counter(d["status"] for d in page["data"])


async def delivered(service: Service, batch: Json, count: int) -> None:
    async def all_are() -> bool:
        return await statuses(service, batch) == {"DELIVERED": count}

    await until(all_are)


def ends(receiver: Receiver) -> list[str]:
    return [r.told["event"] for r in receiver.taken]


async def run(service: Service, sql: str, *parameters: object) -> None:
    async with service.db.connection() as conn:
        await conn.execute(sql.encode(), parameters)


# What is sent -------------------------------------------------------------------------------------


async def test_a_callback_is_told_of_every_item_and_of_the_end_last(service: Service) -> None:
    async with receiving() as receiver, sending(service):
        batch = await create(service, receiver.url, "a", "b", "c", headers={"X-API-Key": "k-1"})
        secret = batch["callbackOptions"]["secret"]
        assert secret.startswith("whsec_")
        items = await service.claim()
        await service.settle(items[:2])
        await service.fail(items[2:])
        await delivered(service, batch, 4)
    assert ends(receiver) == ["ITEM_UPDATE"] * 3 + ["BATCH_UPDATE"]
    for request in receiver.got:
        request.verify(secret)
        assert request.headers["x-api-key"] == "k-1"
        assert request.headers["content-type"] == "application/json"
        assert "." not in request.id
    assert len({r.id for r in receiver.got}) == 4
    told = [r.told["payload"] for r in receiver.got]
    # What is sent is what the GET routes show.
    for payload in told[:3]:
        assert payload == await service.get(
            f"{service.batches}/{batch['batchId']}/{payload['itemId']}"
        )
    assert sorted(p["status"] for p in told[:3]) == ["COMPLETED", "COMPLETED", "FAILED"]
    assert told[3]["status"] == "FAILED"
    shown = await service.get(
        f"{service.batches}/{batch['batchId']}", includesItems="false", includesUsers="false"
    )
    assert told[3] == {k: v for k, v in shown.items() if k not in ("waitingFor", "eta")}
    assert "k-1" not in receiver.got[3].body.decode()
    assert secret not in receiver.got[3].body.decode()
    assert shown["callbackOptions"] == {
        "url": receiver.url,
        "headers": {"X-API-Key": "********"},
        "events": ["item_update", "batch_update"],
        "secret": "********",
    }


async def test_secrets_are_sealed_and_shown_once_only(service: Service) -> None:
    key = "whsec_" + base64.b64encode(b"k" * 32).decode()
    given = await create(service, "https://example.com/x", secret=key, headers={"a": "v-secret"})
    assert given["callbackOptions"]["secret"] == "********"
    body = {
        "type": "CALLBACK",
        "callbackOptions": {"url": "https://example.com/x"},
        "items": [service.item()],
    }
    headers = {"idempotency-key": "once"}
    first = await service.http.post(service.batches, json=body, headers=headers)
    again = await service.http.post(service.batches, json=body, headers=headers)
    # A repetition is the same answer: the first may never have arrived.
    secret = first.json()["callbackOptions"]["secret"]
    assert secret.startswith("whsec_")
    assert again.json()["callbackOptions"]["secret"] == secret
    listed = (await service.http.get(service.batches)).text
    assert secret not in listed
    async with service.db.connection() as conn:
        stored = await conn.execute(
            "select (select string_agg(to_jsonb(b)::text, '') from batches b) || "
            "(select string_agg(to_jsonb(e)::text, '') from endpoints e)"
        )
        row = await stored.fetchone()
    assert row is not None
    for hidden in (key, secret, "v-secret"):
        assert hidden not in row[0]
        assert hidden.encode().hex() not in row[0]


async def test_only_what_was_subscribed_to_is_told(service: Service) -> None:
    async with receiving() as receiver, sending(service):
        ends_only = await create(service, f"{receiver.url}/1", "a", "b", events=["batch_update"])
        items_only = await create(service, f"{receiver.url}/2", "a", events=["ITEM_UPDATE"])
        running = await create(service, f"{receiver.url}/3", "a", events=["all", "item_running"])
        await service.create("no callback")
        await service.work()
        await delivered(service, ends_only, 1)
        await delivered(service, items_only, 1)
        await delivered(service, running, 3)
    assert [r.told["event"] for r in receiver.got if r.path.endswith("/1")] == ["BATCH_UPDATE"]
    assert [r.told["event"] for r in receiver.got if r.path.endswith("/2")] == ["ITEM_UPDATE"]
    third = [r.told["payload"]["status"] for r in receiver.got if r.path.endswith("/3")]
    assert sorted(third) == ["COMPLETED", "COMPLETED", "RUNNING"]
    async with service.db.connection() as conn:
        row = await (await conn.execute("select count(*) from deliveries")).fetchone()
    assert row == (5,)


async def test_a_cancelled_batch_tells_of_its_items_and_then_of_itself(service: Service) -> None:
    async with receiving() as receiver, sending(service):
        batch = await create(service, receiver.url, *"abcde")
        claimed = await service.claim(1)
        await service.http.post(f"{service.batches}/{batch['batchId']}/cancel")
        await service.settle(claimed)
        await delivered(service, batch, 6)
    told = [(r.told["event"], r.told["payload"]["status"]) for r in receiver.taken]
    assert Counter(told[:5]) == {("ITEM_UPDATE", "CANCELLED"): 4, ("ITEM_UPDATE", "COMPLETED"): 1}
    assert told[5] == ("BATCH_UPDATE", "CANCELLED")


REFUSED: list[tuple[object, str]] = [
    (None, "callbackOptions"),
    ({}, "callbackOptions.url"),
    ({"url": 7}, "callbackOptions.url"),
    ({"url": "not a url"}, "callbackOptions.url"),
    ({"url": "https://user:pw@example.com/"}, "callbackOptions.url"),
    ({"url": "https://169.254.169.254/latest"}, "callbackOptions.url"),
    ({"url": "https://[::ffff:10.0.0.1]/"}, "callbackOptions.url"),
    ({"url": "http://93.184.216.34/"}, "callbackOptions.url"),
    ({"url": "https://example.com", "headers": {"Host": "x"}}, "callbackOptions.headers"),
    ({"url": "https://example.com", "headers": {"a": "b\r\nc: d"}}, "callbackOptions.headers"),
    ({"url": "https://example.com", "headers": {"webhook-id": "x"}}, "callbackOptions.headers"),
    ({"url": "https://example.com", "headers": ["x"]}, "callbackOptions.headers"),
    ({"url": "https://example.com", "headers": {"a": 1}}, "callbackOptions.headers.a"),
    ({"url": "https://example.com", "events": []}, "callbackOptions.events"),
    ({"url": "https://example.com", "events": "all"}, "callbackOptions.events"),
    ({"url": "https://example.com", "events": ["item_done"]}, "callbackOptions.events"),
    ({"url": "https://example.com", "secret": "short"}, "callbackOptions.secret"),
    ({"url": "https://example.com", "secret": "whsec_%%%"}, "callbackOptions.secret"),
    ("https://example.com", "callbackOptions"),
]


@pytest.mark.parametrize(("options", "path"), REFUSED, ids=str)
async def test_callback_options_are_checked_before_anything_is_kept(
    options: object, path: str, service: Service
) -> None:
    body = {"type": "CALLBACK", "callbackOptions": options, "items": [service.item()]}
    for route in (service.batches, f"{service.batches}/estimate"):
        answer = await service.http.post(route, json=body)
        assert answer.status_code == 400, answer.text
        assert answer.json()["details"]["errors"][0]["path"] == path
    assert await service.added() == (0, 0)


async def test_other_types_ignore_callback_options(service: Service) -> None:
    batch = await service.create("a", callbackOptions={"url": "http://10.0.0.1"})
    assert batch["callbackOptions"] is None


# Receivers that misbehave -------------------------------------------------------------------------


async def test_a_receiver_that_fails_hangs_throttles_and_goes_away_gets_everything(
    service: Service,
) -> None:
    """The acceptance test of the outbox: at least once each, none lost, the batch's end last."""
    tries = Counter[str]()

    async def misbehave(request: Request) -> Reply:
        tries[request.id] += 1
        number = int(request.id.rpartition("_")[2])
        if tries[request.id] > 1 + number % 3:
            return 200, {}
        match number % 5:
            case 0:
                return 500, {}
            case 1:
                return None
            case 2:
                return 429, {"retry-after": "0.1"}
            case 3:
                return 302, {"location": "http://127.0.0.1:1/"}
            case _:
                return 503, {"retry-after-ms": "50"}

    async with receiving(misbehave) as receiver, sending(service):
        batch = await create(service, receiver.url, *(str(n) for n in range(24)))
        secret = batch["callbackOptions"]["secret"]
        await service.settle(await service.claim(12))
        await until(lambda: len(receiver.taken) >= 4)
        await receiver.close()  # away for a while
        await service.settle(await service.claim(12))
        await asyncio.sleep(0.5)
        assert "DELIVERED" in await statuses(service, batch)
        await receiver.open()
        await delivered(service, batch, 25)
    taken = receiver.taken
    for request in receiver.got:
        request.verify(secret)
    items = {r.told["payload"]["index"] for r in taken if r.told["event"] == "ITEM_UPDATE"}
    assert items == set(range(24))
    assert ends(receiver).count("BATCH_UPDATE") == 1
    assert ends(receiver)[-1] == "BATCH_UPDATE"
    first = min(i for i, r in enumerate(receiver.got) if r.told["event"] == "BATCH_UPDATE")
    assert all(r.told["event"] == "BATCH_UPDATE" for r in receiver.got[first:])
    # Each id is one event, whatever the number of tries.
    assert len({(r.id, r.told["payload"].get("itemId")) for r in receiver.got}) == 25


async def test_a_timestamp_is_that_of_the_try_and_the_id_that_of_the_event(
    service: Service,
) -> None:
    async def at_the_third(_: Request) -> Reply:
        return (200 if len(receiver.got) >= 2 else 500), {}

    async with receiving(at_the_third) as receiver, sending(service, delivery_schedule_s="1.1,1.1"):
        batch = await create(service, receiver.url, events=["batch_update"])
        await service.work()
        await delivered(service, batch, 1)
    assert len({r.id for r in receiver.got}) == 1
    assert len({r.headers["webhook-timestamp"] for r in receiver.got}) == 3
    assert len({r.body for r in receiver.got}) == 1
    page = await service.get(f"{service.batches}/{batch['batchId']}/deliveries")
    tries = page["data"][0]["attempts"]
    assert [(t["attempt"], t["statusCode"], t["errorCode"]) for t in tries] == [
        (1, 500, "refused"),
        (2, 500, "refused"),
        (3, 200, None),
    ]
    assert tries[0]["errorMessage"] == "The receiver answered 500."
    assert all(t["latencyMs"] >= 0 and t["startedAt"].endswith("Z") for t in tries)


async def test_what_fails_too_often_is_dead_and_then_the_end_is_told(service: Service) -> None:
    async def not_item_one(request: Request) -> Reply:
        return (400 if request.told["payload"].get("index") == 1 else 200), {}

    async with (
        receiving(not_item_one) as receiver,
        sending(service, delivery_schedule_s="0.05,0.05"),
    ):
        batch = await create(service, receiver.url, "a", "b", "c")
        await service.work()
        await until(lambda: ends(receiver)[-1:] == ["BATCH_UPDATE"])

        async def settled() -> bool:
            return await statuses(service, batch) == {"DELIVERED": 3, "DEAD": 1}

        await until(settled)
        path = f"{service.batches}/{batch['batchId']}/deliveries"
        dead = (await service.get(path, status="dead"))["data"]
        assert [d["index"] for d in dead] == [1]
        assert dead[0]["reason"] == "it failed 3 times"
        assert dead[0]["nextAttemptAt"] is None
        assert len(dead[0]["attempts"]) == 3
        # Somebody mends the receiver and asks for it again: the same id.
        receiver.behave = None
        told = await service.http.post(f"{path}/redeliver")
        assert told.json() == {"redelivered": 1}
        await delivered(service, batch, 4)
        assert receiver.got[-1].id == dead[0]["webhookId"]


async def test_retry_after_is_honoured(service: Service) -> None:
    async def busy(_: Request) -> Reply:
        return 429, {"retry-after": "100"}

    async with receiving(busy) as receiver, sending(service):
        batch = await create(service, receiver.url, events=["batch_update"])
        await service.work()
        await until(lambda: len(receiver.got) == 1)
        path = f"{service.batches}/{batch['batchId']}/deliveries"

        async def tried() -> bool:
            return bool((await service.get(path))["data"][0]["attempts"])

        await until(tried)
        async with service.db.connection() as conn:
            row = await (
                await conn.execute("select extract(epoch from visible_at - now()) from deliveries")
            ).fetchone()
    assert row is not None
    assert 90 < row[0] <= 100


async def test_gone_means_gone_until_somebody_says_otherwise(service: Service) -> None:
    async def gone(_: Request) -> Reply:
        return 410, {}

    async with receiving(gone) as receiver, sending(service, delivery_concurrency=1):
        batch = await create(service, receiver.url, "a", "b", "c")
        await service.settle(await service.claim(2))

        async def all_dead() -> bool:
            return await statuses(service, batch) == {"DEAD": 2}

        await until(all_dead)
        assert len(receiver.got) == 1
        await service.work()  # what happens now is on record, but not sent
        assert await statuses(service, batch) == {"DEAD": 4}
        path = f"{service.batches}/{batch['batchId']}/deliveries"
        page = (await service.get(path))["data"]
        assert {d["reason"] for d in page} == {"the receiver answered 410 Gone"}
        receiver.behave = None
        told = await service.http.post(f"{path}/redeliver")
        assert told.json() == {"redelivered": 4}
        await delivered(service, batch, 4)
    assert ends(receiver)[-1] == "BATCH_UPDATE"


async def test_a_hanging_receiver_delays_nobody_and_is_probed_by_one(service: Service) -> None:
    async def hang(_: Request) -> Reply:
        return None

    async with receiving(hang) as bad, receiving() as good, sending(service):
        stuck = await create(service, bad.url, *(str(n) for n in range(40)))
        fine = await create(service, good.url, *(str(n) for n in range(40)))
        await service.work()
        await delivered(service, fine, 41)
        assert bad.most_at_once <= SETTINGS.delivery_concurrency
        await until(lambda: len(bad.got) >= SETTINGS.delivery_concurrency + 2)
        bad.most_at_once = 0
        seen = len(bad.got)
        await until(lambda: len(bad.got) >= seen + 3)
        assert bad.most_at_once == 1
        # What waits behind the probes has spent nothing.
        async with service.db.connection() as conn:
            row = await (
                await conn.execute(
                    "select count(*) from deliveries where batch_id = %s and attempt = 0",
                    (stuck["batchId"],),
                )
            ).fetchone()
        assert row is not None
        assert row[0] >= 20
        bad.behave = None
        await delivered(service, stuck, 41)
    assert ends(bad)[-1] == "BATCH_UPDATE"


# Several senders, and their deaths ----------------------------------------------------------------

PROCESS = """
import asyncio, sys
from app.db import Database
from app.secrets import Keyring
from app.secrets import Keyring
from app.sender import Sender
from app.settings import load

async def main():
    settings = load()
    async with Database(settings.database_url, size=4) as db:
        sender = Sender(settings, db, keyring=Keyring(settings.secret_key), listen_url=db.url)
        sender.start()
        await asyncio.Event().wait()

asyncio.run(main())
"""


async def test_a_sender_killed_between_send_and_record_is_made_up_for(service: Service) -> None:
    arrived = asyncio.Event()

    async def first_hangs(_: Request) -> Reply:
        arrived.set()
        return None

    async with receiving(first_hangs) as receiver:
        batch = await create(service, receiver.url, "a", "b", "c")
        secret = batch["callbackOptions"]["secret"]
        await service.work()
        # A process of its own claims and sends, and is killed before it can record.
        settings = {
            "SLUICE_DATABASE_URL": service.db.url,
            "SLUICE_SECRET_KEY": KEY,
            "SLUICE_CALLBACK_ALLOW_NETWORKS": LOOPBACK,
        }
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-c", PROCESS, env=os.environ | settings
        )
        async with asyncio.timeout(30):
            await arrived.wait()
        await until(lambda: len(receiver.got) >= 3)
        process.send_signal(signal.SIGKILL)
        await process.wait()
        sent = [r.id for r in receiver.got]
        receiver.behave = None
        # Its leases pass.
        await run(service, "update deliveries set visible_at = now() where status = 'pending'")
        await run(service, "update endpoints set next_at = now()")
        async with sending(service):
            await delivered(service, batch, 4)
    for request in receiver.got:
        request.verify(secret)
    assert set(sent) < {r.id for r in receiver.taken}
    assert ends(receiver) == ["ITEM_UPDATE"] * 3 + ["BATCH_UPDATE"]
    page = await service.get(f"{service.batches}/{batch['batchId']}/deliveries")
    # The try whose end nobody knows is the number that is missing.
    assert [t["attempt"] for t in page["data"][0]["attempts"]] == [2]


async def test_two_senders_share_and_send_everything_once(service: Service) -> None:
    async with receiving() as receiver, sending(service), sending(service):
        made = [await create(service, f"{receiver.url}/{n}", *"abcdefghij") for n in range(4)]
        await service.work()
        for batch in made:
            await delivered(service, batch, 11)
    assert len(receiver.got) == len({(r.path, r.id) for r in receiver.got}) == 44
    assert all(len({r.id for r in receiver.got if r.path == f"/hook/{n}"}) == 11 for n in range(4))


async def test_events_and_deliveries_are_one_transaction(service: Service) -> None:
    batch = await create(service, "https://example.com/x", "a")
    items = await service.claim()
    async with service.db.connection() as conn, conn.transaction(force_rollback=True):
        await conn.execute(
            "select event_append(%s, %s, %s, 'item-completed', '{0}', now())",
            (service.environment.workspace_id, items[0].batch_day, items[0].batch_id),
        )
        row = await (await conn.execute("select count(*) from deliveries")).fetchone()
        assert row == (1,)
    assert await statuses(service, batch) == {}
    await service.settle(items)
    assert await statuses(service, batch) == {"PENDING": 2}


async def test_an_event_beside_a_claim_is_never_forgotten(service: Service) -> None:
    """A sender that finds nothing says so (next_at) under the lock that a new delivery waits for."""
    batch = await create(service, "https://example.com/x", "a", "b")
    workspace, endpoint = service.environment.workspace_id, UUID(batch["batchId"])
    items = await service.claim()
    async with await psycopg.AsyncConnection.connect(service.db.url) as sender:
        await sender.execute(
            "select from endpoints where endpoint_id = %s for no key update", (endpoint,)
        )
        settling = asyncio.create_task(service.settle(items[:1]))
        _, waits = await asyncio.wait({settling}, timeout=0.3)
        assert waits
        await sender.execute("select endpoint_rest(%s, %s)", (workspace, endpoint))
        await sender.commit()
        await settling
    async with service.db.connection() as conn:
        row = await (
            await conn.execute("select next_at <= clock_timestamp() from endpoints")
        ).fetchone()
    assert row == (True,)


# The log of deliveries ----------------------------------------------------------------------------


async def test_deliveries_are_listed_in_pages_and_belong_to_their_tenant(
    service: Service,
) -> None:
    batch = await create(service, "https://example.com/x", *"abcdefg")
    await service.work()
    path = f"{service.batches}/{batch['batchId']}/deliveries"
    whole = (await service.get(path))["data"]
    assert [d["index"] for d in whole] == [*range(7), None]
    assert whole[0]["action"] == "item-completed"
    assert whole[0]["url"] == "https://example.com/x"
    assert whole[0]["status"] == "PENDING"
    paged: list[Json] = []
    cursor: str | None = None
    while True:
        more = {} if cursor is None else {"cursor": cursor}
        page = await service.get(path, limit="3", **more)
        paged += page["data"]
        cursor = page["nextCursor"]
        if cursor is None:
            break
    assert paged == whole
    for params in ({"status": "lost"}, {"cursor": "x"}, {"cursor": "dlv_x_1"}, {"limit": "0"}):
        answer = await service.http.get(path, params=params)
        assert answer.status_code == 400, params
    one = f"{path}/{whole[0]['deliveryId']}/redeliver"
    assert (await service.http.post(one)).json() == {"redelivered": 1}
    for wrong in ("dlv_x_1", "nothing", whole[0]["deliveryId"] + "99"):
        answer = await service.http.post(f"{path}/{wrong}/redeliver")
        assert (answer.status_code, answer.json()["errorCode"]) == (404, "DELIVERY_NOT_FOUND")
    async with service_on(service) as other:
        foreign = f"/v1/completion-batch/{other.tenant}/{batch['batchId']}/deliveries"
        assert (await other.http.get(foreign)).status_code == 404
        assert (await other.http.post(f"{foreign}/redeliver")).status_code == 404
        assert (await other.http.get(path)).status_code == 403
        # Nor by a delivery's id below a batch of one's own.
        mine = await create(other, "https://example.com/y", "a")
        await other.work()
        crossed = (
            f"/v1/completion-batch/{other.tenant}/{mine['batchId']}/deliveries/"
            f"{whole[0]['deliveryId']}/redeliver"
        )
        assert (await other.http.post(crossed)).status_code in (404, 409)
