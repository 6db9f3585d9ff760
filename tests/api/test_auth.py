"""Every door has a lock: no key, a stranger's key, another environment's key, a confined key."""

from collections.abc import Iterator
from uuid import UUID

import httpx
from litestar.routes import HTTPRoute

from app import resources, tenants
from app.ids import item_id, uuid7
from app.tenants import Environment
from tests.api.conftest import Service

OPEN = {"/healthz", "/healthcheck", "/readyz"}


def doors(service: Service) -> Iterator[tuple[str, str]]:
    """Every method and path template of the app but health and documentation."""
    for route in service.app.routes:
        if route.path in OPEN or route.path.startswith("/docs"):
            continue
        assert isinstance(route, HTTPRoute)
        for method in sorted(route.methods - {"OPTIONS"}):
            yield method, route.path


def filled(path: str, **ids: object) -> str:
    for name, value in ids.items():
        path = path.replace(f"{{{name}:str}}", str(value))
    assert "{" not in path
    return path


async def key_for(service: Service, environment: Environment, *resources: str) -> str:
    async with service.db.transaction() as conn:
        _, value = await tenants.create_api_key(
            conn,
            workspace_id=environment.workspace_id,
            environment_id=environment.environment_id,
            name="other",
            resources=resources or ("*",),
        )
    return value


async def stranger(service: Service) -> tuple[Environment, str]:
    async with service.db.transaction() as conn:
        other = await tenants.create_workspace(conn, name="other", environment="test")
    return other, await key_for(service, other)


async def ids_of(service: Service) -> dict[str, object]:
    """Ids of things that do exist in the tenant."""
    batch = await service.create()
    return {
        "workspaceId": service.environment.workspace_id,
        "environmentId": service.environment.environment_id,
        "batchId": batch["batchId"],
        "itemId": batch["items"][0]["itemId"],
        "connectionId": service.connection_id,
        "resourceId": service.resource_id,
        "apiKeyId": service.key_id,
    }


async def test_there_are_doors_to_try(service: Service) -> None:
    found = list(doors(service))
    assert len(found) == len(set(found)) == 28


async def test_no_route_opens_without_a_key_or_with_an_unknown_one(service: Service) -> None:
    ids = await ids_of(service)
    async with httpx.AsyncClient(base_url=service.url, trust_env=False) as http:
        for method, path in doors(service):
            tried: list[dict[str, str]] = [
                {},
                {"authorization": "Bearer slk_unknown"},
                {"authorization": f"Basic {service.key}"},
                {"authorization": "Bearer"},
                {"x-api-key": "", "authorization": f"Bearer {service.key}"},
            ]
            for headers in tried:
                answer = await http.request(method, filled(path, **ids), headers=headers)
                assert answer.status_code == 401, (method, path, headers)
                assert answer.json()["errorCode"] == "401"
                assert answer.headers["www-authenticate"] == "Bearer"


async def test_no_route_opens_with_a_foreign_tenants_key(service: Service) -> None:
    """Neither under the owner's path, nor under the stranger's own path with the owner's ids."""
    ids = await ids_of(service)
    other, key = await stranger(service)
    own = ids | {"workspaceId": other.workspace_id, "environmentId": other.environment_id}
    async with httpx.AsyncClient(
        base_url=service.url, headers={"x-api-key": key}, trust_env=False
    ) as http:
        for method, path in doors(service):
            if "{workspaceId" not in path:
                continue
            answer = await http.request(method, filled(path, **ids), json={})
            assert (answer.status_code, answer.json()["errorCode"]) == (403, "NOT_AUTHORIZED")
            unknown = ids | {"workspaceId": uuid7(), "batchId": uuid7(), "itemId": uuid7()}
            same = await http.request(method, filled(path, **unknown), json={})
            assert same.json() == answer.json(), "a refusal tells whether something exists"
            if any(name in path for name in ("batchId", "connectionId", "resourceId", "apiKeyId")):
                answer = await http.request(method, filled(path, **own), json={})
                assert answer.status_code == 404, (method, path)


async def test_a_key_opens_one_environment_only(service: Service) -> None:
    ids = await ids_of(service)
    async with service.db.transaction() as conn:
        await conn.execute(
            "insert into environments (workspace_id, environment_id, name) values (%s, %s, 'prod')",
            (service.environment.workspace_id, prod := uuid7()),
        )
    for method, path in doors(service):
        if "{workspaceId" in path:
            answer = await service.http.request(
                method, filled(path, **ids | {"environmentId": prod})
            )
            assert (answer.status_code, answer.json()["errorCode"]) == (403, "NOT_AUTHORIZED")


async def test_ids_that_are_no_uuids_are_a_bad_request(service: Service) -> None:
    ids = await ids_of(service)
    for method, path in doors(service):
        for name in ids:
            if f"{{{name}:" not in path:
                continue
            answer = await service.http.request(method, filled(path, **ids | {name: "no-uuid"}))
            assert (answer.status_code, answer.json()["errorCode"]) == (400, "400"), (method, path)


async def test_x_api_key_wins_over_bearer(service: Service) -> None:
    ok = await service.http.get("/v1/whoami", headers={"x-api-key": service.key})
    assert ok.json()["apiKeyId"] == str(service.key_id)
    assert ok.json()["environmentId"] == str(service.environment.environment_id)
    no = await service.http.get("/v1/whoami", headers={"x-api-key": "slk_other"})
    assert no.status_code == 401
    lower = await service.http.get("/v1/whoami", headers={"authorization": f"bearer {service.key}"})
    assert lower.status_code == 200


async def test_disabled_and_expired_keys_look_unknown(service: Service) -> None:
    unknown = await service.http.get("/v1/whoami", headers={"x-api-key": "slk_other"})
    for change in ("enabled = false", "expires_at = now() - interval '1 second'"):
        key = await key_for(service, service.environment)
        async with service.db.connection() as conn:
            await conn.execute(
                f"update api_keys set {change} where name = 'other' and workspace_id = %s".encode(),  # noqa: S608 - ours
                (service.environment.workspace_id,),
            )
        answer = await service.http.get("/v1/whoami", headers={"x-api-key": key})
        assert (answer.status_code, answer.json()) == (401, unknown.json())


async def test_the_use_of_a_key_is_noted(service: Service) -> None:
    await service.get("/v1/whoami")
    async with service.db.connection() as conn:
        cursor = await conn.execute(
            "select last_used_at is not null from api_keys where api_key_id = %s",
            (service.key_id,),
        )
        assert await cursor.fetchone() == (True,)


async def second_resource(service: Service) -> UUID:
    async with service.db.transaction() as conn:
        return await resources.create(
            conn,
            workspace_id=service.environment.workspace_id,
            environment_id=service.environment.environment_id,
            connection_id=service.connection_id,
            name="second",
            model="m",
        )


async def test_a_confined_key_uses_its_resources_only(service: Service) -> None:
    second = await second_resource(service)
    confined = {"x-api-key": await key_for(service, service.environment, str(service.resource_id))}
    foreign = await service.http.post(
        service.batches,
        json={
            "type": "ASYNC",
            "items": [service.item(), *[service.item() | {"resourceId": str(second)}] * 3],
        },
    )
    batch_id = foreign.json()["batchId"]
    mine = await service.create()

    body = {"type": "ASYNC", "items": [service.item() | {"resourceId": str(second)}] * 2}
    made = await service.http.post(service.batches, json=body, headers=confined)
    assert made.status_code == 403
    assert made.json()["errorCode"] == "API_KEY_RESOURCE_NOT_AUTHORIZED"
    assert made.json()["details"] == {"resourceIds": [str(second)]}
    assert made.json()["errorMessage"].count(str(second)) == 1
    guessed = await service.http.post(f"{service.batches}/estimate", json=body, headers=confined)
    assert (guessed.status_code, guessed.json()) == (403, made.json())

    item = item_id(UUID(batch_id), 0)
    for method, path in [
        ("GET", f"{service.batches}/{batch_id}"),
        ("GET", f"{service.batches}/{batch_id}/items"),
        ("GET", f"{service.batches}/{batch_id}/events"),
        ("GET", f"{service.batches}/{batch_id}/{item}"),
        ("POST", f"{service.batches}/{batch_id}/cancel"),
        ("POST", f"{service.batches}/{batch_id}/pause"),
        ("POST", f"{service.batches}/{batch_id}/resume"),
        ("PATCH", f"{service.batches}/{batch_id}"),
        ("GET", f"{service.batches}/{batch_id}/capacity-usage"),
        ("GET", f"/v1/ai-resource/{service.tenant}/{second}/capacity-usage"),
        ("GET", f"/v1/ai-resource/{service.tenant}/{second}"),
    ]:
        answer = await service.http.request(method, path, headers=confined)
        assert answer.status_code == 403, path
        assert answer.json()["errorCode"] == "API_KEY_RESOURCE_NOT_AUTHORIZED"
    listed = await service.http.get(service.batches, headers=confined)
    assert [b["batchId"] for b in listed.json()["data"]] == [mine["batchId"]]
    assert (await service.get(f"{service.batches}/{batch_id}"))["status"] == "PENDING"


async def test_a_confined_key_cannot_widen_its_reach(service: Service) -> None:
    confined = {"x-api-key": await key_for(service, service.environment, str(service.resource_id))}
    bodies = {
        "ai-connection": {"name": "n", "provider": "openai"},
        "ai-resource": {
            "name": "n",
            "model": {"model": "m", "connectionId": str(service.connection_id)},
        },
        "api-key": {"name": "n", "resources": ["*"]},
    }
    for path, body in bodies.items():
        made = await service.http.post(f"/v1/{path}/{service.tenant}", json=body, headers=confined)
        assert (made.status_code, made.json()["errorCode"]) == (403, "NOT_AUTHORIZED")
    for path in (
        f"ai-connection/{service.tenant}/{service.connection_id}",
        f"ai-connection/{service.tenant}/{service.connection_id}/capacity-usage",
        f"api-key/{service.tenant}/{service.key_id}",
        f"api-key/{service.tenant}/{service.key_id}/capacity-usage",
    ):
        assert (await service.http.get(f"/v1/{path}", headers=confined)).status_code == 403
    me = (await service.http.get("/v1/whoami", headers=confined)).json()["apiKeyId"]
    for path, body in (
        (f"ai-connection/{service.tenant}/{service.connection_id}", {"concurrency": 9}),
        (f"ai-resource/{service.tenant}/{service.resource_id}", {"capacity": None}),
        (f"api-key/{service.tenant}/{service.key_id}", {"enabled": False}),
        (f"api-key/{service.tenant}/{me}", {"resources": ["*"]}),
        (f"api-key/{service.tenant}/{uuid7()}", {"resources": ["*"]}),
    ):
        for method in ("PATCH", "PUT"):
            told = await service.http.request(method, f"/v1/{path}", json=body, headers=confined)
            assert (told.status_code, told.json()["errorCode"]) == (403, "NOT_AUTHORIZED")
    assert (await service.get(f"/v1/api-key/{service.tenant}/{me}"))["resources"] != ["*"]
    assert (await service.get(f"/v1/api-key/{service.tenant}/{service.key_id}"))["enabled"]
