"""Resources over HTTP: lists, changes, fallbacks and rules, and where the items of a batch go."""

from typing import Any
from uuid import uuid4

from app import connections, resources
from tests.api.conftest import Json, Service


def base(service: Service, *more: object) -> str:
    return "/".join(["/v1/ai-resource", service.tenant, *(str(each) for each in more)])


async def connection(service: Service, name: str, **body: Any) -> str:  # noqa: ANN401 - JSON
    answer = await service.http.post(
        f"/v1/ai-connection/{service.tenant}",
        json={"name": name, "baseUrl": "http://127.0.0.1:9/v1"} | body,
    )
    assert answer.status_code == 201, answer.text
    return answer.json()["connectionId"]


async def changed(service: Service, status: int = 200, **body: Any) -> Json:  # noqa: ANN401 - JSON
    answer = await service.http.patch(base(service, service.resource_id), json=body)
    assert answer.status_code == status, answer.text
    return answer.json()


def at(connection_id: str, model: str = "spare") -> Json:
    return {"provider": "openai-compatible", "model": model, "connectionId": connection_id}


async def placed(service: Service, batch: Json) -> dict[str, int]:
    """Items by the model that they wait for."""
    async with service.db.connection() as conn:
        cursor = await conn.execute(
            "select r.model, f.total from flows f join resources r using (workspace_id, resource_id)"
            " where f.batch_id = %s and f.total > 0",
            (batch["batchId"],),
        )
        return dict(await cursor.fetchall())


async def test_lists_are_filtered_and_confined(service: Service) -> None:
    other = await connection(service, "other")
    ids = [str(service.resource_id)]
    for n in range(3):
        body = {"name": f"r{n}", "model": at(other), "fallbackModels": [at(other, "b")]}
        answer = await service.http.post(base(service), json=body)
        ids.append(answer.json()["resourceId"])
    page = await service.get(base(service), limit="3")
    rest = await service.get(base(service), cursor=page["nextCursor"])
    assert [each["resourceId"] for each in page["data"] + rest["data"]] == ids
    found = await service.get(base(service), connectionId=other)
    assert [each["resourceId"] for each in found["data"]] == ids[1:]
    (named,) = (await service.get(base(service), name="r1"))["data"]
    assert named == await service.get(base(service, ids[2]))
    made = await service.http.post(
        f"/v1/api-key/{service.tenant}", json={"name": "k", "resources": [ids[3]]}
    )
    headers = {"x-api-key": made.json()["apiKeyValue"]}
    seen = (await service.http.get(base(service), headers=headers)).json()["data"]
    assert [each["resourceId"] for each in seen] == [ids[3]]
    assert (await service.http.delete(base(service, ids[3]), headers=headers)).status_code == 403


async def test_name_model_and_keys_change(service: Service) -> None:
    other = await connection(service, "other")
    key = await service.http.post(
        f"/v1/api-key/{service.tenant}", json={"name": "k", "resources": []}
    )
    told = await changed(
        service, name="new", model=at(other, "big"), assignApiKeys=[key.json()["apiKeyId"]]
    )
    assert (told["name"], told["model"]) == ("new", at(other, "big"))
    read = await service.get(f"/v1/api-key/{service.tenant}/{key.json()['apiKeyId']}")
    assert read["resources"] == [str(service.resource_id)]
    async with service.db.connection() as conn:
        route = await connections.route(
            conn,
            workspace_id=service.environment.workspace_id,
            resource_id=service.resource_id,
        )
    assert route is not None
    assert (str(route.connection_id), route.model) == (other, "big")
    batch = await service.create("a")
    assert await placed(service, batch) == {"big": 1}
    answer = await service.http.post(base(service), json={"name": "new", "model": at(other)})
    assert answer.json()["errorCode"] == "AI_RESOURCE_ALREADY_EXISTS"
    assert (await changed(service, 404, model=at(str(uuid4()))))["errorCode"] == (
        "AI_CONNECTION_NOT_FOUND"
    )


async def test_alternates_are_kept_shown_and_sent_back(service: Service) -> None:
    other = await connection(service, "other", allowedModels=["spare", "large"])
    rule = {
        "description": "long ones",
        "if": [{"expression": "tokens.input", "comparator": "GT", "value": 1000}],
        "then": at(other, "large"),
    }
    told = await changed(
        service,
        fallbackModels=[at(other), at(str(service.connection_id), "b")],
        fallbackOn={"exhausted": False, "statusCodes": [503]},
        secondaryModels=[at(other, "large")],
        routing={"conditions": [rule]},
    )
    assert told["fallbackModels"] == [at(other), at(str(service.connection_id), "b")]
    assert told["fallbackOn"] == {
        "exhausted": False,
        "statusCodes": [503],
        "errorCodes": ["bad_url", "redirect", "MODEL_NOT_ALLOWED"],
        "throttledMs": None,
    }
    assert (told["secondaryModels"], told["useFallback"]) == ([at(other, "large")], True)
    assert told["routing"]["conditions"] == [rule]
    again = await changed(service, **told)
    assert again | {"updatedAt": None} == told | {"updatedAt": None}
    listed = await service.get(base(service))
    assert [each["name"] for each in listed["data"]] == ["small"]  # alternates are nobody's
    async with service.db.connection() as conn:
        alternates = await resources.alternates(
            conn,
            workspace_id=service.environment.workspace_id,
            owner_ids=[service.resource_id],
        )
    assert len(alternates) == 3
    body: Json = {"type": "ASYNC"}
    for alternate in alternates:
        body["items"] = [service.item("a") | {"resourceId": str(alternate.resource_id)}]
        assert (await service.http.post(service.batches, json=body)).status_code == 404
        assert (await service.http.get(base(service, alternate.resource_id))).status_code == 404
    cleared = await changed(service, fallbackModels=None, routing=None, useFallback=False)
    assert (cleared["fallbackModels"], cleared["routing"], cleared["useFallback"]) == (
        [],
        None,
        False,
    )
    for wrong, path in (
        ({"fallbackModels": [at(other, "x")]}, "fallbackModels[0].model"),
        ({"fallbackModels": [at(other), at(other)]}, "fallbackModels[1]"),
        ({"fallbackModels": [at(str(service.connection_id), "gpt-test")]}, "fallbackModels[0]"),
        ({"secondaryModels": [at(other) | {"provider": "groq"}]}, "secondaryModels[0].provider"),
        ({"routing": {"conditions": [rule | {"then": at(other, "x")}]}}, "routing.model"),
        ({"fallbackOn": {"throttledMs": -1}}, "fallbackOn.throttledMs"),
    ):
        told = await changed(service, 400, **wrong)
        assert [e["path"] for e in told["details"]["errors"]] == [path]


async def test_rules_send_items_to_their_models(service: Service) -> None:
    other = await connection(service, "other")

    def rule(expression: str, comparator: str, value: object, then: Json | None) -> Json:
        found: Json = {
            "if": [{"expression": expression, "comparator": comparator, "value": value}],
            "action": "BLOCK" if then is None else "CALL_MODEL",
        }
        return found if then is None else found | {"then": then}

    content = "request.lastMessage.content"
    await changed(
        service,
        routing={
            "conditions": [
                rule(content, "CONTAINS", "forbidden", None),
                rule("metadata.tier", "EQUAL", "gold", at(other, "gold")),
                rule(content, "STARTS_WITH", "long", at(other, "large")),
                rule("errorRate(10)", "GT", 50, at(other, "rescue")),
                rule("capacityUsage(minute)", "GTE", 50, at(other, "relief")),
            ]
        },
        secondaryModels=[at(other, "second")],
        capacity=[{"period": "minute", "requests": 2}],
    )
    batch = await service.create("short", "long one", "long two")
    assert await placed(service, batch) == {"gpt-test": 1, "large": 2}
    items = await service.get(f"{service.batches}/{batch['batchId']}/items")
    assert {each["resourceId"] for each in items["data"]} == {str(service.resource_id)}
    assert await placed(service, await service.create("a", metadata={"tier": "gold"})) == {
        "gold": 1
    }
    answer = await service.http.post(
        service.batches,
        json={"type": "ASYNC", "items": [service.item("fine"), service.item("forbidden")]},
    )
    (problem,) = answer.json()["details"]["errors"]
    assert (answer.status_code, problem["path"]) == (400, "items[1].request")
    assert "blocked_by_routing_condition" in problem["message"]
    chosen = service.item("long")
    for index, expected in ((0, {"second": 1}), (1, None)):
        chosen["request"]["vmx"] = {"secondaryModelIndex": index}
        answer = await service.http.post(service.batches, json={"type": "ASYNC", "items": [chosen]})
        assert answer.status_code == (400 if expected is None else 201)
        if expected is not None:
            assert await placed(service, answer.json()) == expected
    # A call of two is on its way: half of the limit is used.
    assert len(await service.claim(1)) == 1
    assert await placed(service, await service.create("a")) == {"relief": 1}
    estimate = await service.http.post(
        f"{service.batches}/estimate", json={"type": "ASYNC", "items": [service.item("long")]}
    )
    assert estimate.status_code == 200, estimate.text


async def test_errors_send_items_elsewhere(service: Service) -> None:
    other = await connection(service, "other")
    rescue = {
        "if": [{"expression": "errorRate(10)", "comparator": "GT", "value": 50}],
        "then": at(other, "rescue"),
    }
    await changed(service, routing={"conditions": [rescue]})
    await service.create("a", "b", "c")
    one, *rest = await service.claim()
    await service.settle([one])
    assert await placed(service, await service.create("a")) == {"gpt-test": 1}
    await service.fail(rest)
    assert await placed(service, await service.create("a")) == {"rescue": 1}


async def test_a_confined_key_uses_and_sees_what_its_resource_falls_back_to(
    service: Service,
) -> None:
    other = await connection(service, "other")
    await changed(service, fallbackModels=[at(other)])
    made = await service.http.post(
        f"/v1/api-key/{service.tenant}",
        json={"name": "k", "resources": [str(service.resource_id)]},
    )
    headers = {"x-api-key": made.json()["apiKeyValue"]}
    body = {"type": "ASYNC", "items": [service.item("a")]}
    batch = (await service.http.post(service.batches, json=body, headers=headers)).json()
    path = f"{service.batches}/{batch['batchId']}"
    assert (await service.http.get(path, headers=headers)).status_code == 200
    listed = await service.http.get(service.batches, headers=headers)
    assert len(listed.json()["data"]) == 1


async def test_a_resource_is_deleted_with_its_alternates(service: Service) -> None:
    other = await connection(service, "other")
    await changed(service, fallbackModels=[at(other)])
    assert (await service.http.delete(base(service, service.resource_id))).status_code == 204
    async with service.db.connection() as conn:
        cursor = await conn.execute(
            "select (select count(*) from resources where workspace_id = w), (select count(*) from"
            " limit_scopes where workspace_id = w and kind in ('resource', 'model'))"
            " from (select %s::uuid) as tenant (w)",
            (service.environment.workspace_id,),
        )
        assert await cursor.fetchone() == (0, 0)
