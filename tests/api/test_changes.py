"""Changes of connections, resources and keys: each field, at the next claim, by those who may."""

import asyncio
from collections.abc import Sequence
from typing import Any
from uuid import UUID

import psycopg
import pytest

from app import api_keys, queue, tenants
from app.doorbell import WORK
from app.ids import uuid7
from app.queue import Claim
from tests.api.conftest import Json, Service

KINDS = ("ai-connection", "ai-resource", "api-key")


def address(service: Service, kind: str, of: object = None) -> str:
    own = {
        "ai-connection": service.connection_id,
        "ai-resource": service.resource_id,
        "api-key": service.key_id,
    }
    return f"/v1/{kind}/{service.tenant}/{of or own[kind]}"


async def change(
    service: Service,
    kind: str,
    status: int = 200,
    of: object = None,
    **body: Any,  # noqa: ANN401 - JSON
) -> Json:
    """The answer to a change, which is also what is read afterwards."""
    answer = await service.http.patch(address(service, kind, of), json=body)
    assert answer.status_code == status, answer.text
    told: Json = answer.json()
    if status == 200:
        assert await service.get(address(service, kind, of)) == told
    return told


async def key_with(service: Service, **more: object) -> tuple[UUID, dict[str, str]]:
    """Another key, and the header that shows it."""
    body = {"name": "other", "resources": ["*"], **more}
    made = await service.http.post(f"/v1/api-key/{service.tenant}", json=body)
    assert made.status_code == 201, made.text
    return UUID(made.json()["apiKeyId"]), {"x-api-key": made.json()["apiKeyValue"]}


async def look(service: Service, resource_id: UUID | None = None) -> Claim:
    """A claim of nothing much: what it reports."""
    async with service.db.transaction() as conn:
        return await queue.claim(
            conn,
            workspace_id=service.environment.workspace_id,
            resource_id=resource_id or service.resource_id,
            worker_id=service.worker_id,
            want=1,
            alone=True,
            guard_s=1.0,
            burst_s=60,
            slow_start=0,
            grace_s=60.0,
        )


async def is_due(service: Service, resource_id: UUID | None = None) -> bool:
    """Whether workers would look at a resource now."""
    async with service.db.connection() as conn:
        cursor = await conn.execute(
            "select next_at <= clock_timestamp() from ready where resource_id = %s",
            (resource_id or service.resource_id,),
        )
        row = await cursor.fetchone()
    assert row is not None
    return row[0]


async def sibling(service: Service) -> UUID:
    """Another resource on the same connection."""
    async with service.db.transaction() as conn:
        return await tenants.create_resource(
            conn,
            workspace_id=service.environment.workspace_id,
            environment_id=service.environment.environment_id,
            connection_id=service.connection_id,
            name="sibling",
            model="other",
        )


def shown(capacity: Sequence[Json]) -> list[tuple[Any, ...]]:
    return [(c["period"], c["requests"], c["tokens"], c["enabled"]) for c in capacity]


PER_MINUTE = {"period": "minute", "requests": 2}


# What is said and what stays ------------------------------------------------------------------------

FIELDS: list[tuple[str, str, object, object]] = [
    ("ai-connection", "description", "an account", None),
    ("ai-connection", "concurrency", 7, None),
    ("ai-connection", "timeoutMs", 4321, 300_000),
    ("ai-connection", "allowedModels", ["gpt-test"], None),
    ("ai-resource", "description", "a model", None),
    ("ai-resource", "concurrency", 3, None),
    ("ai-resource", "timeoutMs", 1234, None),
    ("ai-resource", "defaultArgs", {"temperature": 0}, {}),
    ("ai-resource", "enforceCapacity", False, True),
    ("api-key", "description", "a key", None),
    ("api-key", "labels", ["a", "b"], []),
    ("api-key", "expiresAt", "2999-01-01T00:00:00.000Z", None),
]


@pytest.mark.parametrize(("kind", "field", "value", "usual"), FIELDS)
async def test_a_field_is_changed_and_nothing_else(
    service: Service, kind: str, field: str, value: object, usual: object
) -> None:
    """Null is as if it had never been said; PUT is the same, as in the reference."""
    before = await service.get(address(service, kind))
    body: Json = {field: value}
    told = await change(service, kind, **body)
    assert {k for k in told if told[k] != before[k]} - {"lastUsedAt", "updatedBy"} == {
        field,
        "updatedAt",
    }
    assert told[field] == value
    again = await service.http.put(address(service, kind), json={field: None})
    assert again.status_code == 200, again.text
    assert again.json()[field] == usual


@pytest.mark.parametrize("kind", KINDS)
async def test_limits_are_kept_as_given_and_removed(service: Service, kind: str) -> None:
    entries = [{"period": "DAY", "tokens": 9}, PER_MINUTE | {"enabled": False}]
    told = await change(service, kind, capacity=entries)
    assert shown(told["capacity"]) == [("day", None, 9, True), ("minute", 2, None, False)]
    assert (await change(service, kind, description="d"))["capacity"] == told["capacity"]
    assert (await change(service, kind, capacity=None))["capacity"] == []


async def test_headers_are_changed_and_stay_masked(service: Service) -> None:
    told = await change(service, "ai-connection", headers={"X-Org": "secret-org", "X-Old": "1"})
    assert told["headers"] == {"X-Org": "********", "X-Old": "********"}
    assert told["config"]["apiKey"] == "********"
    # What a client read it may send back: masked values stay as they are.
    told = await change(service, "ai-connection", headers={"X-Org": "********", "X-New": "2"})
    async with service.db.connection() as conn:
        stored = await tenants.connection(
            conn,
            workspace_id=service.environment.workspace_id,
            environment_id=service.environment.environment_id,
            connection_id=service.connection_id,
        )
    assert stored is not None
    assert stored.headers == {"X-Org": "secret-org", "X-New": "2"}
    assert tenants.open_secret(service.keyring, stored) == "sk-secret"
    told = await change(service, "ai-connection", 400, headers={"X-Never": "********"})
    assert told["details"]["errors"][0]["path"] == "headers"


@pytest.mark.parametrize("kind", KINDS)
async def test_what_was_read_may_be_sent_back(service: Service, kind: str) -> None:
    before = await service.get(address(service, kind))
    sent: Json = before | {"description": "new"}
    told = await change(service, kind, **sent)
    for body in (told, before):
        for field in ("updatedAt", "lastUsedAt", "description"):
            body.pop(field, None)
    assert told == before


FIXED: list[tuple[str, Json, str]] = [
    ("ai-connection", {"name": "b"}, "name"),
    ("ai-connection", {"provider": "openai"}, "provider"),
    ("ai-connection", {"baseUrl": "http://elsewhere/v1"}, "baseUrl"),
    ("ai-connection", {"apiKey": "sk-new"}, "apiKey"),
    ("ai-connection", {"config": {"apiKey": "sk-new"}}, "config"),
    ("ai-connection", {"config": {"baseUrl": "http://elsewhere/v1"}}, "config"),
    ("ai-resource", {"name": "b"}, "name"),
    ("ai-resource", {"name": "********"}, "name"),
    ("ai-resource", {"model": {"model": "b"}}, "model"),
    ("ai-resource", {"model": {"connectionId": str(uuid7())}}, "model"),
    ("ai-resource", {"useFallback": True}, "useFallback"),
    ("ai-resource", {"fallbackModels": [{}]}, "fallbackModels"),
    ("ai-resource", {"assignApiKeys": [str(uuid7())]}, "assignApiKeys"),
]

WRONG: list[tuple[str, Json, str]] = [
    ("ai-connection", {"concurrency": 0}, "concurrency"),
    ("ai-connection", {"timeoutMs": 5}, "timeoutMs"),
    ("ai-connection", {"headers": {"a b": "c"}}, "headers"),
    ("ai-connection", {"headers": {"a": "c\r\nd: e"}}, "headers"),
    ("ai-connection", {"allowedModels": "m"}, "allowedModels"),
    ("ai-connection", {"description": "a\0"}, "description"),
    ("ai-connection", {"capacity": [{"period": "minutes"}]}, "capacity[0].period"),
    ("ai-connection", {"capacity": {"period": "day"}}, "capacity"),
    ("ai-resource", {"concurrency": 2.5}, "concurrency"),
    ("ai-resource", {"timeoutMs": "5000"}, "timeoutMs"),
    ("ai-resource", {"enforceCapacity": "no"}, "enforceCapacity"),
    ("ai-resource", {"defaultArgs": []}, "defaultArgs"),
    ("ai-resource", {"capacity": [{"requests": 1}]}, "capacity[0].period"),
    ("api-key", {"enabled": None}, "enabled"),
    ("api-key", {"enabled": 1}, "enabled"),
    ("api-key", {"enforceCapacity": None}, "enforceCapacity"),
    ("api-key", {"expiresAt": "2999-01-01T00:00:00"}, "expiresAt"),
    ("api-key", {"expiresAt": "9999-12-31T23:59:59-10:00"}, "expiresAt"),
    ("api-key", {"resources": None}, "resources"),
    ("api-key", {"resources": ["all"]}, "resources"),
    ("api-key", {"labels": "a"}, "labels"),
    ("api-key", {"capacity": [{"period": "day", "requests": -1}]}, "capacity[0].requests"),
]


@pytest.mark.parametrize("kind", KINDS)
async def test_what_cannot_be_changed_so_is_refused(service: Service, kind: str) -> None:
    before = await service.get(address(service, kind))
    for of, body, path in FIXED + WRONG:
        if of == kind:
            told = await change(service, kind, 400, **({"description": "not kept"} | body))
            assert told["errorCode"] == "GENERIC_VALIDATION", body
            assert [e["path"] for e in told["details"]["errors"]] == [path], body
    after = await service.get(address(service, kind))
    assert after | {"lastUsedAt": None} == before | {"lastUsedAt": None}


@pytest.mark.parametrize("kind", KINDS)
async def test_a_change_must_change_something(service: Service, kind: str) -> None:
    for content in (b"", b"{", b"[]", b"null", b"{}", b'{"colour": 1}', b"\xff"):
        for method in ("PATCH", "PUT"):
            answer = await service.http.request(method, address(service, kind), content=content)
            assert answer.status_code == 400, content
            assert [e["path"] for e in answer.json()["details"]["errors"]] == ["body"]
    answer = await service.http.patch(address(service, kind), json={"colour": 1})
    assert "send some of" in answer.json()["errorMessage"]
    assert "capacity" in answer.json()["errorMessage"]
    answer = await service.http.patch(address(service, kind), content=b" " * 1_100_000)
    assert answer.status_code == 413


@pytest.mark.parametrize("kind", KINDS)
async def test_unknown_ids_are_not_found(service: Service, kind: str) -> None:
    told = await change(service, kind, 404, uuid7(), description="d")
    assert told["errorCode"].endswith("_NOT_FOUND")


@pytest.mark.parametrize("kind", KINDS)
async def test_a_stranger_changes_nothing(service: Service, kind: str) -> None:
    """Neither under the owner's path, nor under its own, nor from another environment."""
    before = await service.get(address(service, kind))
    async with service.db.transaction() as conn:
        other = await tenants.create_workspace(conn, name="other", environment="test")
        prod = uuid7()
        await conn.execute(
            "insert into environments (workspace_id, environment_id, name) values (%s, %s, 'prod')",
            (service.environment.workspace_id, prod),
        )
        keys = {
            (w, e): (await api_keys.create(conn, workspace_id=w, environment_id=e, name="theirs"))[
                1
            ]
            for w, e in (
                (other.workspace_id, other.environment_id),
                (service.environment.workspace_id, prod),
            )
        }
    body = {"description": "mine", "capacity": [PER_MINUTE]}
    own = address(service, kind).rsplit("/", 1)[1]
    for (workspace_id, environment_id), key in keys.items():
        for path, status in (
            (address(service, kind), 403),
            (f"/v1/{kind}/{workspace_id}/{environment_id}/{own}", 404),
        ):
            answer = await service.http.patch(path, json=body, headers={"x-api-key": key})
            assert answer.status_code == status, answer.text
    after = await service.get(address(service, kind))
    assert after | {"lastUsedAt": None} == before | {"lastUsedAt": None}


# At the next claim ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
async def test_limits_come_change_and_go_while_batches_run(service: Service, kind: str) -> None:
    await service.create(*["x"] * 10)
    await change(service, kind, capacity=[PER_MINUTE])
    assert len(await service.claim()) == 2
    assert not await service.claim()
    assert not await is_due(service)
    await change(service, kind, capacity=[PER_MINUTE | {"requests": 5}])
    assert await is_due(service)
    assert len(await service.claim()) == 3  # what was used stays used
    assert not await service.claim()
    await change(service, kind, capacity=[PER_MINUTE | {"enabled": False}])
    assert await is_due(service)
    assert len(await service.claim(2)) == 2
    await change(service, kind, capacity=[{"period": "day", "requests": 1}])
    assert len(await service.claim()) == 1  # a new account, which begins empty
    await change(service, kind, capacity=None)
    assert await is_due(service)
    assert len(await service.claim()) == 2


@pytest.mark.parametrize("kind", ["ai-resource", "api-key"])
async def test_limits_that_are_not_enforced_are_kept_for_later(service: Service, kind: str) -> None:
    await service.create(*["x"] * 10)
    await change(service, kind, capacity=[PER_MINUTE])
    assert len(await service.claim()) == 2
    assert not await service.claim()
    told = await change(service, kind, enforceCapacity=False)
    assert (told["enforceCapacity"], shown(told["capacity"])) == (
        False,
        [("minute", 2, None, True)],
    )
    assert await is_due(service)
    assert len(await service.claim(3)) == 3
    await change(service, kind, capacity=[PER_MINUTE | {"requests": 1}])  # kept, for nothing yet
    assert len(await service.claim(2)) == 2
    await change(service, kind, enforceCapacity=True)
    assert len(await service.claim()) == 1
    assert not await service.claim()


@pytest.mark.parametrize("kind", ["ai-connection", "ai-resource"])
async def test_concurrency_comes_changes_and_goes(service: Service, kind: str) -> None:
    await service.create(*["x"] * 10)
    await change(service, kind, concurrency=2)
    assert len(await service.claim()) == 2
    assert not await service.claim()
    assert not await is_due(service)
    await change(service, kind, concurrency=5)
    assert await is_due(service)
    assert len(await service.claim()) == 3
    assert not await service.claim()
    await change(service, kind, concurrency=1)  # calls in flight are let finish
    assert not await service.claim()
    await change(service, kind, concurrency=None)
    assert await is_due(service)
    assert len(await service.claim()) == 5


async def test_a_connections_change_counts_for_all_its_resources(service: Service) -> None:
    other = await sibling(service)
    await change(service, "ai-connection", capacity=[PER_MINUTE])
    body = {"type": "ASYNC", "items": [service.item(), service.item() | {"resourceId": str(other)}]}
    for _ in range(2):
        made = await service.http.post(service.batches, json=body)
        assert made.status_code == 201
    assert len(await service.claim()) == 2
    assert not (await look(service, other)).items
    assert not await is_due(service, other)
    await change(service, "ai-connection", concurrency=3)  # not what they wait for, but they look
    assert await is_due(service, other)
    assert not (await look(service, other)).items
    await change(service, "ai-connection", capacity=[PER_MINUTE | {"requests": 3}])
    assert await is_due(service, other)
    assert len((await look(service, other)).items) == 1


async def test_a_new_dimension_counts_for_batches_that_run(service: Service) -> None:
    entry = PER_MINUTE | {"requests": 1, "dimension": "metadata", "dimensionField": "team"}
    await service.create(*"abc", metadata={"team": "a"})
    await service.create(*"def", metadata={"team": "b"})
    await change(service, "ai-connection", capacity=[entry])
    assert len(await service.claim()) == 2
    assert not await service.claim()
    await change(service, "ai-connection", capacity=[entry | {"requests": 2}])
    assert len(await service.claim()) == 2
    await change(service, "ai-connection", capacity=[])
    assert len(await service.claim()) == 2


async def test_a_keys_limits_bind_its_own_batches_only(service: Service) -> None:
    key_id, headers = await key_with(service)
    body = {"type": "ASYNC", "items": [service.item()] * 4}
    made = await service.http.post(service.batches, json=body, headers=headers)
    assert made.status_code == 201
    await change(service, "api-key", of=key_id, capacity=[PER_MINUTE | {"requests": 1}])
    await service.create(*"ab")
    assert len(await service.claim()) == 3
    await change(service, "api-key", of=key_id, capacity=None)
    assert len(await service.claim()) == 3


@pytest.mark.parametrize("kind", ["ai-connection", "ai-resource"])
async def test_workers_read_the_route_anew(service: Service, kind: str) -> None:
    """A claim tells when the configuration was changed last; workers compare that with theirs."""
    await service.create(*"ab")
    before = await look(service)
    await change(service, kind, timeoutMs=2345)
    after = await look(service)
    async with service.db.connection() as conn:
        route = await tenants.route(
            conn,
            workspace_id=service.environment.workspace_id,
            resource_id=service.resource_id,
        )
    assert route is not None
    assert before.config_at is not None
    assert after.config_at is not None
    assert before.config_at < after.config_at == route.config_at
    assert route.timeout_ms == 2345


async def test_a_limit_below_what_waits_ends_it(service: Service) -> None:
    """A prompt that can never be sent any more is not waited for."""
    await service.create("word " * 200)
    await change(service, "ai-resource", capacity=[{"period": "day", "inputTokens": 50}])
    [item] = await service.claim()
    assert item.impossible


# Keys -----------------------------------------------------------------------------------------------


async def test_a_key_is_turned_off_and_on_at_once(service: Service) -> None:
    key_id, headers = await key_with(service)

    async def opens() -> int:
        return (await service.http.get("/v1/whoami", headers=headers)).status_code

    assert await opens() == 200
    ways: list[tuple[Json, Json]] = [
        ({"enabled": False}, {"enabled": True}),
        ({"expiresAt": "2001-01-01T00:00:00Z"}, {"expiresAt": None}),
    ]
    for off, on in ways:
        await change(service, "api-key", of=key_id, **off)
        assert await opens() == 401
        told = await change(service, "api-key", of=key_id, **on)
        assert await opens() == 200
        assert "apiKeyValue" not in told


async def test_a_keys_reach_is_changed(service: Service) -> None:
    other = await sibling(service)
    key_id, headers = await key_with(service, resources=[str(service.resource_id)])
    body = {"type": "ASYNC", "items": [service.item() | {"resourceId": str(other)}]}

    async def create() -> int:
        made = await service.http.post(service.batches, json=body, headers=headers)
        return made.status_code

    assert await create() == 403
    told = await change(service, "api-key", of=key_id, resources=[str(other)])
    assert told["resources"] == [str(other)]
    assert await create() == 201
    for unknown in (uuid7(), service.connection_id):
        told = await change(
            service, "api-key", 404, of=key_id, resources=["*", str(unknown)], enabled=False
        )
        assert told["errorCode"] == "AI_RESOURCE_NOT_FOUND"
    assert await create() == 201
    await change(service, "api-key", of=key_id, resources=[])
    assert await create() == 403


# Beside others --------------------------------------------------------------------------------------


async def test_workers_are_rung_for_after_a_change(lone_service: Service) -> None:
    service = lone_service
    await service.create(*"ab")
    async with await psycopg.AsyncConnection.connect(service.db.url, autocommit=True) as conn:
        await service.context.ringer.flush()
        await conn.execute(f"listen {WORK}".encode())
        changes: list[tuple[str, Json]] = [
            ("ai-connection", {"capacity": [PER_MINUTE]}),
            ("ai-connection", {"concurrency": 5}),
            ("ai-resource", {"concurrency": 5}),
            ("ai-resource", {"enforceCapacity": False}),
            ("api-key", {"capacity": None}),
        ]
        for kind, body in changes:
            await change(service, kind, **body)
            rung = [n.payload async for n in conn.notifies(timeout=10, stop_after=1)]
            assert rung == [str(service.resource_id)]


async def test_changes_at_once_are_all_kept(service: Service) -> None:
    """Also beside claims: none is lost, none fails, no lock is waited for in a circle."""
    await service.create(*["x"] * 60)

    async def work() -> set[str | None]:
        crossed: set[str | None] = set()
        for _ in range(10):
            try:
                await service.claim(2)
            except psycopg.Error as error:
                crossed.add(error.sqlstate)
        return crossed

    bodies: list[tuple[str, Json]] = [
        ("ai-connection", {"capacity": [{"period": "hour", "requests": 30}]}),
        ("ai-connection", {"concurrency": 40}),
        ("ai-connection", {"timeoutMs": 2000}),
        ("ai-resource", {"capacity": [{"period": "hour", "requests": 31}]}),
        ("ai-resource", {"concurrency": 41}),
        ("api-key", {"capacity": [{"period": "hour", "requests": 32}]}),
        ("api-key", {"labels": ["l"]}),
    ]
    working = [asyncio.create_task(work()) for _ in range(2)]
    answers = await asyncio.gather(
        *(service.http.patch(address(service, kind), json=body) for kind, body in bodies)
    )
    assert [a.status_code for a in answers] == [200] * len(bodies)
    assert set[str | None]().union(*await asyncio.gather(*working)) <= queue.CROSSED
    told = {kind: await service.get(address(service, kind)) for kind in KINDS}
    for kind, body in bodies:
        for field, value in body.items():
            found = told[kind][field]
            assert (shown(found)[0][1] if field == "capacity" else found) == (
                value[0]["requests"] if field == "capacity" else value
            )
