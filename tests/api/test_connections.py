"""Connections over HTTP: lists, changes of every field, deletion, test calls, and secrets that stay secret."""

import asyncio
import base64
import os
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from app import connections, resources, rotation, webhooks
from app.presets import PROVIDERS
from app.secrets import Keyring
from app.simulator import Behaviour, Simulator
from tests.api.conftest import Json, Service

CANARY = "sk-canary-0123456789-abcdefghij"


def base(service: Service, *more: object) -> str:
    return "/".join(["/v1/ai-connection", service.tenant, *(str(each) for each in more)])


async def made(service: Service, kind: str = "ai-connection", **body: Any) -> Json:  # noqa: ANN401 - JSON
    usual: Json = {"baseUrl": "http://127.0.0.1:9/v1"} if kind == "ai-connection" else {}
    answer = await service.http.post(f"/v1/{kind}/{service.tenant}", json=usual | body)
    assert answer.status_code == 201, answer.text
    return answer.json()


async def model_on(service: Service, connection: Json, **more: Any) -> Json:  # noqa: ANN401 - JSON
    model = {"model": "m", "connectionId": connection["connectionId"]}
    return await made(service, "ai-resource", **{"name": "r", "model": model} | more)


async def test_lists_are_paged_and_filtered(service: Service) -> None:
    ids = [str(service.connection_id)]
    ids += [(await made(service, name=f"c{n}"))["connectionId"] for n in range(4)]
    seen: list[str] = []
    cursor: str | None = None
    while True:
        params = {"limit": "2"} | ({"cursor": cursor} if cursor else {})
        page = await service.get(base(service), **params)
        seen += [each["connectionId"] for each in page["data"]]
        cursor = page["nextCursor"]
        if cursor is None:
            break
    assert seen == ids
    (named,) = (await service.get(base(service), name="c2"))["data"]
    assert named == await service.get(base(service, ids[3]))
    for params in ({"limit": "0"}, {"limit": "x"}, {"cursor": "x"}):
        answer = await service.http.get(base(service), params=params)
        assert answer.status_code == 400


async def test_providers_describe_their_forms(service: Service) -> None:
    found = (await service.get("/v1/ai-provider"))["data"]
    assert [each["id"] for each in found] == list(PROVIDERS)
    anthropic = next(each for each in found if each["id"] == "anthropic")
    form = anthropic["config"]["connection"]
    assert form["properties"]["apiKey"]["format"] == "secret"
    assert (form["required"], anthropic["protocol"]) == (["apiKey"], "anthropic")
    azure = next(each for each in found if each["id"] == "azure-openai")
    assert azure["config"]["connection"]["required"] == ["apiKey", "baseUrl"]


async def test_a_provider_that_needs_a_key_is_given_one(service: Service) -> None:
    answer = await service.http.post(base(service), json={"name": "a", "provider": "anthropic"})
    assert (answer.status_code, answer.json()["errorCode"]) == (400, "AI_CONNECTION_CONFIG_INVALID")
    answer = await service.http.post(
        base(service), json={"name": "a", "provider": "openai", "apiKey": "********"}
    )
    assert answer.json()["details"]["errors"][0]["path"] == "apiKey"
    await made(service, name="mock", provider="anthropic")  # elsewhere, perhaps nobody asks


async def secret_of(service: Service, connection: Json) -> str | None:
    async with service.db.connection() as conn:
        found = await connections.named(
            conn,
            workspace_id=service.environment.workspace_id,
            environment_id=service.environment.environment_id,
            name=connection["name"],
        )
    assert found is not None
    return connections.open_secret(service.keyring, found)


async def test_name_address_and_secret_change(service: Service) -> None:
    own = await made(service, name="c", apiKey="sk-old")
    path = base(service, own["connectionId"])
    told = (
        await service.http.put(path, json={"name": "d", "config": {"baseUrl": "http://x/v2"}})
    ).json()
    assert (told["name"], told["baseUrl"], told["config"]["apiKey"]) == (
        "d",
        "http://x/v2",
        "********",
    )
    assert told["updatedBy"] == str(service.key_id) == told["createdBy"]
    assert await secret_of(service, told) == "sk-old"
    # What was read is changed in one place and sent back: the difference is what is meant.
    config = told["config"] | {"baseUrl": "http://z/v1"}
    for change, expected in (
        ({"baseUrl": "http://y/v1"}, "http://y/v1"),
        ({"config": config}, "http://z/v1"),
    ):
        told = (await service.http.patch(path, json=told | change)).json()
        assert told["baseUrl"] == expected
        assert await secret_of(service, told) == "sk-old"
    for body, expected in (
        ({"config": {"apiKey": "********"}}, "sk-old"),
        ({"apiKey": "sk-new"}, "sk-new"),
        ({"config": {"apiKey": "sk-newer"}}, "sk-newer"),
        ({"apiKey": None}, None),
    ):
        told = (await service.http.patch(path, json=body)).json()
        assert await secret_of(service, told) == expected
    assert told["config"] == {"baseUrl": told["baseUrl"]}
    answer = await service.http.patch(path, json={"name": "fake"})
    assert answer.json()["errorCode"] == "AI_CONNECTION_ALREADY_EXISTS"


async def test_models_that_resources_name_cannot_be_disallowed(service: Service) -> None:
    own = await made(service, name="c", allowedModels=["m", "n"])
    resource = await model_on(service, own)
    path = base(service, own["connectionId"])
    answer = await service.http.patch(path, json={"allowedModels": ["n"]})
    assert (answer.status_code, answer.json()["details"]) == (
        409,
        {"resources": [resource["resourceId"]]},
    )
    assert (await service.http.patch(path, json={"allowedModels": ["m"]})).status_code == 200
    address = f"/v1/ai-resource/{service.tenant}/{resource['resourceId']}"
    model = {"model": "n", "connectionId": own["connectionId"]}
    answer = await service.http.patch(address, json={"model": model})
    assert answer.json()["details"]["errors"][0]["path"] == "model.model"


async def test_a_connection_in_use_is_not_deleted_by_accident(service: Service) -> None:
    batch = await service.create("a", "b")
    path = base(service, service.connection_id)
    answer = await service.http.delete(path)
    assert (answer.status_code, answer.json()["errorCode"]) == (409, "AI_RESOURCE_IN_USE")
    assert answer.json()["details"]["batches"] == [batch["batchId"]]
    other = await made(service, name="other")
    fallback = [{"model": "m", "connectionId": str(service.connection_id)}]
    rule = {
        "if": [{"expression": "tokens.input", "comparator": "GT", "value": 1}],
        "then": fallback[0] | {"model": "n"},
    }
    guest = await model_on(service, other, fallbackModels=fallback, routing={"conditions": [rule]})
    answer = await service.http.delete(path)
    assert answer.json()["errorCode"] == "AI_CONNECTION_IN_USE"
    assert answer.json()["details"]["resources"] == [guest["resourceId"]]
    assert (await service.http.delete(path, params={"force": "true"})).status_code == 204
    for gone in (path, f"/v1/ai-resource/{service.tenant}/{service.resource_id}"):
        assert (await service.http.get(gone)).status_code == 404
    left = await service.get(f"/v1/ai-resource/{service.tenant}/{guest['resourceId']}")
    assert (left["fallbackModels"], left["routing"]["conditions"]) == ([], [])
    ended = await service.get(f"{service.batches}/{batch['batchId']}")
    assert (ended["status"], ended["cancelled"]) == ("CANCELLED", 2)
    async with service.db.connection() as conn:
        for table in ("resource_states", "ready"):
            cursor = await conn.execute(
                f"select count(*) from {table} where resource_id = %s".encode(),  # noqa: S608 - constants
                (service.resource_id,),
            )
            assert await cursor.fetchone() == (0,)


async def test_what_was_answered_outlives_its_resource(service: Service) -> None:
    answer = await service.http.post(
        f"/v1/api-key/{service.tenant}",
        json={"name": "k", "resources": [str(service.resource_id)]},
    )
    key, headers = answer.json(), {"x-api-key": answer.json()["apiKeyValue"]}
    body = {"type": "ASYNC", "items": [service.item("a")]}
    made_by_it = (await service.http.post(service.batches, json=body, headers=headers)).json()
    by_another = await service.create("b")
    await service.work()
    assert (await service.http.delete(base(service, service.connection_id))).status_code == 204
    stripped = await service.get(f"/v1/api-key/{service.tenant}/{key['apiKeyId']}")
    assert stripped["resources"] == []
    for given in (None, headers):
        path = f"{service.batches}/{made_by_it['batchId']}"
        told = await service.http.get(path, headers=given)
        assert told.json()["items"][0]["response"]["data"]["id"] == "chatcmpl-1"
        assert told.json()["items"][0]["resourceId"] == str(service.resource_id)
    path = f"{service.batches}/{by_another['batchId']}"
    assert (await service.http.get(path, headers=headers)).status_code == 403
    listed = (await service.http.get(service.batches, headers=headers)).json()["data"]
    assert [each["batchId"] for each in listed] == [made_by_it["batchId"]]


async def test_a_batch_and_a_deletion_do_not_pass_each_other(service: Service) -> None:
    """While a batch is being written its resource cannot go, and what comes after finds it gone."""
    workspace_id = service.environment.workspace_id
    async with service.db.transaction() as conn:
        await resources.pin(conn, workspace_id=workspace_id, resource_ids=[service.resource_id])
        path = f"/v1/ai-resource/{service.tenant}/{service.resource_id}"
        deleting = asyncio.create_task(service.http.delete(path))
        async with asyncio.timeout(10):
            while not await waits(service):  # noqa: ASYNC110 - the server tells nobody
                await asyncio.sleep(0.01)
    assert (await deleting).status_code == 204
    body = {"type": "ASYNC", "items": [service.item("a")]}
    assert (await service.http.post(service.batches, json=body)).status_code == 404


async def waits(service: Service) -> bool:
    async with service.db.connection() as conn:
        cursor = await conn.execute(
            "select count(*) from pg_stat_activity where datname = current_database()"
            " and wait_event_type = 'Lock'"
        )
        row = await cursor.fetchone()
    assert row is not None
    return row[0] > 0


# Test calls ---------------------------------------------------------------------------------------


@asynccontextmanager
async def simulated(**behaviour: Any) -> AsyncGenerator[str]:  # noqa: ANN401 - fields of it
    simulator = Simulator(Behaviour(port=0, latency_ms=0, **behaviour))
    try:
        yield f"{await simulator.start()}/v1"
    finally:
        await simulator.stop()


async def tried(service: Service, connection: Json, **body: object) -> Json:
    path = base(service, connection["connectionId"], "test")
    answer = await service.http.post(path, json={"model": "m"} | body)
    assert answer.status_code == 200, answer.text
    return answer.json()


async def test_a_test_call_says_that_it_works(service: Service) -> None:
    async with simulated(require_key="sk-right", max_in_flight=1) as url:
        for provider in ("openai", "anthropic"):
            own = await made(
                service, name=provider, provider=provider, baseUrl=url, apiKey="sk-right"
            )
            found = await tried(service, own)
            assert (found["ok"], found["code"], found["remedy"]) == (True, "ok", None)
            assert found["outputTokens"] > 0
            resource = await model_on(service, own, name=provider)
            path = f"/v1/ai-resource/{service.tenant}/{resource['resourceId']}/test"
            assert (await service.http.post(path)).json()["ok"] is True


async def answering(status: str, body: str, headers: str = "") -> asyncio.Server:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(
            f"HTTP/1.1 {status}\r\ncontent-length: {len(body)}\r\n{headers}\r\n{body}".encode()
        )
        await writer.drain()
        writer.close()

    return await asyncio.start_server(serve, "127.0.0.1", 0)


FOUND: list[tuple[str, str, str, str]] = [
    ("401 Unauthorized", '{"error":{"message":"bad key %s"}}', "unauthorized", "key"),
    ("403 Forbidden", "{}", "forbidden", "key"),
    ("404 Not Found", '{"error":{"message":"no such model"}}', "not_found", "model"),
    ("429 Too Many Requests", "{}", "rate_limited", "limit"),
    ("500 Oops", "{}", "server_error", "later"),
    ("529 Overloaded", "{}", "overloaded", "later"),
    ("301 Moved", "", "redirect", "redirects"),
    ("200 OK", "<html>", "garbage", "/v1"),
    ("200 OK", '{"status":"ok"}', "not_a_completion", "baseUrl"),
]


async def test_a_test_call_says_what_is_wrong(service: Service) -> None:
    for number, (status, body, code, word) in enumerate(FOUND):
        server = await answering(status, body.replace("%s", CANARY))
        async with server:
            port = server.sockets[0].getsockname()[1]
            own = await made(
                service, name=f"c{number}", baseUrl=f"http://127.0.0.1:{port}", apiKey=CANARY
            )
            found = await tried(service, own)
        assert (found["ok"], found["code"]) == (False, code), found
        assert word in found["remedy"]
        assert CANARY not in str(found)
    refused = await made(service, name="refused", baseUrl="http://127.0.0.1:1/v1")
    assert (await tried(service, refused))["code"] == "connect"
    unknown = await made(service, name="unknown", baseUrl="http://nowhere.invalid/v1")
    assert (await tried(service, unknown))["code"] == "dns"
    tls = await made(service, name="tls", baseUrl="https://127.0.0.1:1/v1")
    assert (await tried(service, tls))["code"] in {"tls", "connect"}
    answer = await service.http.post(base(service, refused["connectionId"], "test"))
    assert answer.json()["details"]["errors"][0]["path"] == "model"


async def test_a_test_call_ends_in_time(service: Service) -> None:
    async with simulated(hang_rate=1.0) as url:
        own = await made(service, name="slow", baseUrl=url, timeoutMs=200)
        assert (await tried(service, own))["code"] == "timeout"


# Secrets ------------------------------------------------------------------------------------------


async def test_a_secret_is_nowhere_to_be_seen(
    service: Service, caplog: pytest.LogCaptureFixture
) -> None:
    """A canary in the key and in a header: not in any answer, error or line of the log."""
    caplog.set_level("DEBUG")
    seen: list[str] = []
    header = f"{CANARY}-header"
    own = await made(
        service, name="c", apiKey=CANARY, headers={"X-Secret": header}, provider="openai"
    )
    seen.append(str(own))
    path = base(service, own["connectionId"])
    resource = await model_on(service, own)
    for method, where, body in (
        ("GET", path, None),
        ("GET", base(service), None),
        ("GET", f"/v1/ai-resource/{service.tenant}", None),
        ("PATCH", path, {"config": {"apiKey": CANARY}, "timeoutMs": 1}),
        ("PATCH", path, {"apiKey": CANARY, "baseUrl": "ftp://x"}),
        ("PATCH", path, {"apiKey": CANARY, "description": "d"}),
        ("PATCH", path, {"headers": {"X-Secret": f"{CANARY}\n"}}),
        ("POST", base(service), {"name": "c", "apiKey": CANARY, "baseUrl": "http://x"}),
        ("POST", base(service), {"name": "d", "apiKey": CANARY, "provider": "nowhere"}),
        ("POST", base(service), {"name": 1, "config": CANARY}),
        ("POST", f"{path}/test", {"model": "m"}),
        ("GET", f"{path}/capacity-usage", None),
        ("DELETE", path, None),
    ):
        seen.append((await service.http.request(method, where, json=body)).text)
    assert resource["resourceId"] in seen[3]
    assert CANARY not in "\n".join(seen)
    assert CANARY not in caplog.text


async def test_rotation_seals_every_secret_anew(lone_service: Service) -> None:
    service = lone_service
    rows = [await made(service, name=f"c{n}", apiKey=f"sk-{n}") for n in range(5)]
    hook = {"name": "h", "url": "https://example.com/h", "event_types": ["batch.completed"]}
    hooked = await service.http.post(f"{service.url}/v1/webhook_endpoints", json=hook)
    assert hooked.status_code == 200, hooked.text
    old = service.keyring
    key = base64.urlsafe_b64encode(os.urandom(32)).decode()
    # As a setting with the new key first would: it opens what the old one sealed.
    both = Keyring(f"new:{key}")
    both._ciphers |= old._ciphers  # pyright: ignore[reportPrivateUsage] - the setting is not kept
    async with service.db.transaction() as conn:
        await conn.execute(
            "update connections set secret_key_id = 'lost' where name = 'c4' and workspace_id = %s",
            (service.environment.workspace_id,),
        )
    resealed = await _resealed(service, both)
    assert resealed.resealed >= 5
    assert any("'c4'" in each for each in resealed.unreadable)
    async with service.db.connection() as conn:
        for row in rows[:4]:
            found = await connections.named(
                conn,
                workspace_id=service.environment.workspace_id,
                environment_id=service.environment.environment_id,
                name=row["name"],
            )
            assert found is not None
            assert found.secret_key_id == "new"
            only_new = Keyring(f"new:{key}")
            assert connections.open_secret(only_new, found) == f"sk-{row['name'][1:]}"
        endpoints = await webhooks.page(
            conn,
            workspace_id=service.environment.workspace_id,
            environment_id=service.environment.environment_id,
            before=None,
            most=1,
        )
        secret = webhooks.open_(Keyring(f"new:{key}"), endpoints[0]).secret
        assert secret == hooked.json()["signing_secret"]
        uses = {use.secret_key_id for use in await rotation.key_uses(conn)}
    assert uses == {"new", "lost"}
    assert (await _resealed(service, both)).resealed == 0


async def _resealed(service: Service, keyring: Keyring) -> rotation.Resealed:
    """All steps of a rotation, each in a transaction of its own."""
    resealed, unreadable = 0, list[str]()
    step: rotation.Step | None = rotation.Step()
    while step is not None:
        async with service.db.transaction() as conn:
            done, step = await rotation.reseal(conn, keyring=keyring, step=step, most=2)
        resealed += done.resealed
        unreadable += done.unreadable
    return rotation.Resealed(resealed=resealed, unreadable=unreadable)
