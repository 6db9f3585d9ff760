"""Keys at the door: which of them open, and what a confined one may touch. See test_tenant_walk."""

from uuid import UUID

from app import api_keys, tenants
from app.ids import item_id, uuid7
from app.tenants import Environment
from tests.api.conftest import Service


async def key_for(service: Service, environment: Environment, *resources: str) -> str:
    async with service.db.transaction() as conn:
        _, value = await api_keys.create(
            conn,
            workspace_id=environment.workspace_id,
            environment_id=environment.environment_id,
            name="other",
            resources=resources or ("*",),
        )
    return value


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
        return await tenants.create_resource(
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
