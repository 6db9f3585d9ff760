"""Connections, resources and keys: what is stored, what is shown, what is refused."""

from app import capacity, connections
from tests.api.conftest import Json, Service


async def post(service: Service, kind: str, body: Json, status: int = 201) -> Json:
    answer = await service.http.post(f"/v1/{kind}/{service.tenant}", json=body)
    assert answer.status_code == status, answer.text
    return answer.json()


def paths(told: Json) -> list[str]:
    return [e["path"] for e in told["details"]["errors"]]


CAPACITY = [
    {"period": "MINUTE", "requests": 10, "tokens": 0},
    {"period": "day", "requests": None, "tokens": 5000, "enabled": False},
    {"period": "Hour", "tokens": 100, "enabled": True},
    {"period": "week"},
]


async def test_a_connection_keeps_its_secrets(service: Service) -> None:
    made = await post(
        service,
        "ai-connection",
        {
            "name": "vllm",
            "provider": "openai-compatible",
            "config": {"apiKey": "sk-very-secret", "baseUrl": "http://x/"},
            "baseUrl": "http://127.0.0.1:8000/v1/",
            "headers": {"X-Org": "org-secret"},
            "timeoutMs": 5000,
            "concurrency": 3,
            "capacity": CAPACITY,
            "allowedModels": ["a", "b"],
        },
    )
    assert made["baseUrl"] == "http://127.0.0.1:8000/v1"
    assert made["config"] == {"baseUrl": "http://127.0.0.1:8000/v1", "apiKey": "********"}
    assert made["headers"] == {"X-Org": "********"}
    assert made["concurrency"] == 3
    assert [c["period"] for c in made["capacity"]] == ["minute", "day", "hour", "week"]
    assert [c["enabled"] for c in made["capacity"]] == [True, False, True, True]
    read = await service.http.get(f"/v1/ai-connection/{service.tenant}/{made['connectionId']}")
    assert read.json() == made
    assert "secret" not in read.text
    async with service.db.connection() as conn:
        stored = await connections.named(
            conn,
            workspace_id=service.environment.workspace_id,
            environment_id=service.environment.environment_id,
            name="vllm",
        )
        assert stored is not None
        assert connections.open_secret(service.keyring, stored) == "sk-very-secret"
        assert stored.headers == {"X-Org": "org-secret"}
        limits = await capacity.used(
            conn,
            workspace_id=stored.workspace_id,
            scope_ids=[stored.connection_id],
            guard_s=1,
        )
    assert {(n.period, n.requests, n.tokens) for n in limits} == {
        ("minute", 10, None),
        ("hour", None, 100),
    }


async def test_a_preset_knows_its_address(service: Service) -> None:
    made = await post(service, "ai-connection", {"name": "o", "provider": "groq", "apiKey": "k"})
    assert made["baseUrl"] == "https://api.groq.com/openai/v1"
    assert made["timeoutMs"] == service.settings.default_timeout_ms


WRONG_CONNECTIONS: list[tuple[Json, str]] = [
    ({"name": None}, "name"),
    ({"name": ""}, "name"),
    ({"name": "a\0"}, "name"),
    ({"baseUrl": "ftp://x"}, "baseUrl"),
    ({"baseUrl": "http://user:pw@x"}, "baseUrl"),
    ({"baseUrl": None}, "baseUrl"),
    ({"baseUrl": None, "provider": "unheard-of"}, "provider"),
    ({"timeoutMs": 5}, "timeoutMs"),
    ({"timeoutMs": "5000"}, "timeoutMs"),
    ({"headers": {"a b": "c"}}, "headers"),
    ({"headers": {"a": "c\r\nd: e"}}, "headers"),
    ({"capacity": [{"period": "minutes"}]}, "capacity[0].period"),
    ({"capacity": [{"requests": 1}]}, "capacity[0].period"),
    ({"capacity": [{"period": "day", "requests": -1}]}, "capacity[0].requests"),
    ({"capacity": [{"period": "day", "tokens": 1.5}]}, "capacity[0].tokens"),
    ({"capacity": [{"period": "day", "enabled": "yes"}]}, "capacity[0].enabled"),
    ({"capacity": [{"period": "day", "inputTokens": -1}]}, "capacity[0].inputTokens"),
    ({"capacity": [{"period": "day", "outputTokens": "9"}]}, "capacity[0].outputTokens"),
    ({"capacity": [{"period": "day", "window": "rolling"}]}, "capacity[0].window"),
    ({"capacity": [{"period": "lifetime", "window": "sliding"}]}, "capacity[0].window"),
    ({"capacity": [{"period": "day", "dimension": "colour"}]}, "capacity[0].dimension"),
    ({"capacity": [{"period": "day", "dimension": "metadata"}]}, "capacity[0].dimension"),
    ({"capacity": [{"period": "day", "dimensionField": "team"}]}, "capacity[0].dimension"),
    (
        {
            "capacity": [
                {"period": "day", "dimension": "metadata", "dimensionField": ""},
            ]
        },
        "capacity[0].dimensionField",
    ),
    ({"concurrency": 0}, "concurrency"),
    ({"concurrency": 2.5}, "concurrency"),
]


async def test_what_a_connection_cannot_be(service: Service) -> None:
    body = {"name": "n", "provider": "openai-compatible", "baseUrl": "http://x/v1"}
    for change, path in WRONG_CONNECTIONS:
        told = await post(service, "ai-connection", body | change, 400)
        assert (told["errorCode"], paths(told)) == ("GENERIC_VALIDATION", [path])


async def test_a_body_that_is_no_json_or_too_large_is_refused(service: Service) -> None:
    path = f"/v1/ai-connection/{service.tenant}"
    answer = await service.http.post(path, content=b"{")
    assert (answer.status_code, set(answer.json())) == (
        400,
        {"errorMessage", "errorCode", "details"},
    )
    answer = await service.http.post(path, content=b" " * 1_100_000)
    assert answer.status_code == 413
    answer = await service.http.post(path, content=b"")
    assert answer.status_code == 400


async def test_a_resource_names_a_model_on_a_connection(service: Service) -> None:
    key = await post(service, "api-key", {"name": "k", "resources": [str(service.resource_id)]})
    body: Json = {
        "name": "second",
        "description": "d",
        "model": {
            "provider": "openai-compatible",
            "model": "m-1",
            "connectionId": str(service.connection_id),
        },
        "useFallback": False,
        "fallbackModels": [],
        "routing": None,
        "defaultArgs": {"temperature": 0},
        "capacity": [{"period": "minute", "requests": 5}],
        "enforceCapacity": True,
        "assignApiKeys": [key["apiKeyId"]],
    }
    made = await post(service, "ai-resource", body)
    assert made["model"] == body["model"]
    assert (made["defaultArgs"], made["enforceCapacity"]) == ({"temperature": 0}, True)
    assert await service.get(f"/v1/ai-resource/{service.tenant}/{made['resourceId']}") == made
    again = await service.get(f"/v1/api-key/{service.tenant}/{key['apiKeyId']}")
    assert again["resources"] == [str(service.resource_id), made["resourceId"]]
    told = await post(service, "ai-resource", body, 400)
    assert told["errorCode"] == "AI_RESOURCE_ALREADY_EXISTS"


async def test_what_a_resource_cannot_be(service: Service) -> None:
    unknown = "00000000-0000-4000-8000-000000000000"
    model = {"model": "m", "connectionId": str(service.connection_id)}
    body: Json = {"name": "n", "model": model}
    wrong: list[tuple[Json, str]] = [
        ({"useFallback": "yes"}, "useFallback"),
        ({"fallbackModels": [{"model": "m"}]}, "fallbackModels[0].connectionId"),
        ({"fallbackModels": [model]}, "fallbackModels[0]"),
        ({"fallbackOn": {"statusCodes": [200]}}, "fallbackOn.statusCodes[0]"),
        ({"routing": {"conditions": [{}]}}, "routing.conditions[0].if"),
        ({"model": {"model": "m"}}, "model.connectionId"),
        ({"model": model | {"provider": "openai"}}, "model.provider"),
        ({"defaultArgs": {"a": "\0"}}, "defaultArgs"),
    ]
    for change, path in wrong:
        told = await post(service, "ai-resource", body | change, 400)
        assert path in paths(told)
    missing = body | {"model": {"model": "m", "connectionId": unknown}}
    assert (await post(service, "ai-resource", missing, 404))[
        "errorCode"
    ] == "AI_CONNECTION_NOT_FOUND"
    told = await post(service, "ai-resource", body | {"assignApiKeys": [unknown]}, 404)
    assert told["errorCode"] == "API_KEY_NOT_FOUND"
    await post(service, "ai-resource", body)  # nothing of the refused ones was kept


async def test_models_a_connection_does_not_allow_are_refused(service: Service) -> None:
    made = await post(
        service,
        "ai-connection",
        {"name": "c", "baseUrl": "http://x/v1", "allowedModels": ["good"]},
    )
    model = {"model": "bad", "connectionId": made["connectionId"]}
    told = await post(service, "ai-resource", {"name": "n", "model": model}, 400)
    assert paths(told) == ["model.model"]
    taken = await post(service, "ai-connection", {"name": "c", "baseUrl": "http://x/v1"}, 400)
    assert taken["errorCode"] == "AI_CONNECTION_ALREADY_EXISTS"


async def test_a_keys_value_is_shown_once(service: Service) -> None:
    made = await post(
        service,
        "api-key",
        {
            "name": "k",
            "enabled": True,
            "resources": [str(service.resource_id)],
            "labels": ["a"],
            "enforceCapacity": True,
            "capacity": [{"period": "DAY", "tokens": 7}],
            "expiresAt": "2999-01-01T00:00:00Z",
        },
    )
    value = made.pop("apiKeyValue")
    assert value.startswith("slk_")
    assert await service.get(f"/v1/api-key/{service.tenant}/{made['apiKeyId']}") == made
    me = await service.http.get("/v1/whoami", headers={"x-api-key": value})
    assert me.json()["resources"] == [str(service.resource_id)]
    for change, path in (
        ({"resources": ["all"]}, "resources"),
        ({"resources": None}, "resources"),
        ({"expiresAt": "2999-01-01T00:00:00"}, "expiresAt"),
    ):
        told = await post(service, "api-key", {"name": "k", "resources": ["*"]} | change, 400)
        assert path in paths(told)[0]
    unknown = {"name": "k", "resources": ["00000000-0000-4000-8000-000000000000"]}
    assert (await post(service, "api-key", unknown, 404))["errorCode"] == "AI_RESOURCE_NOT_FOUND"
