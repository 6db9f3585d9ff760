"""Limits over HTTP: set, enforced, where they stand, what is waited for, and how long it takes."""

from collections.abc import Mapping
from typing import Any
from uuid import UUID

import pytest

from app import api_keys, capacity, queue, tenants
from app.capacity import Amount
from app.ids import uuid7
from app.settings import Settings
from tests.api.conftest import Json, Service


async def limit(service: Service, scope_id: UUID, *amounts: Amount) -> None:
    async with service.db.transaction() as conn:
        await capacity.set_limits(
            conn,
            workspace_id=service.environment.workspace_id,
            scope_id=scope_id,
            amounts=amounts,
        )


async def do(service: Service, statement: str, *params: object) -> None:
    async with service.db.connection() as conn:
        await conn.execute(statement.encode(), params)


async def value(service: Service, query: str, *params: object) -> Any:  # noqa: ANN401 - whatever it is
    async with service.db.connection() as conn:
        row = await (await conn.execute(query.encode(), params)).fetchone()
    assert row is not None
    return row[0]


async def usage(service: Service, path: str) -> dict[str, list[Json]]:
    """The limits that are shown, by the kind of their scope."""
    told = await service.get(f"{path}/capacity-usage")
    found: dict[str, list[Json]] = {}
    for scope in told["scopes"]:
        found.setdefault(scope["scope"]["kind"], []).extend(
            entry | {"scope": scope["scope"]} for entry in scope["limits"]
        )
    return found


async def with_worker(service: Service) -> None:
    async with service.db.transaction() as conn:
        await queue.register_worker(
            conn, worker_id=service.worker_id, host="h", machine="m", pid=1, version="0"
        )


async def resource_model_scope(service: Service) -> UUID:
    return await value(
        service,
        "select model_scope_id from resources where resource_id = %s",
        service.resource_id,
    )


ENTRY: Json = {
    "period": "minute",
    "requests": 5,
    "tokens": None,
    "inputTokens": 400,
    "outputTokens": 0,
    "window": "calendar",
    "dimension": None,
    "dimensionField": None,
    "enabled": True,
}


async def test_a_batchs_limits_are_shown_as_given_and_enforced(service: Service) -> None:
    batch = await service.create(*"abcd", capacity=[ENTRY | {"period": "MINUTE", "requests": 3}])
    assert batch["capacity"] == [ENTRY | {"requests": 3}]
    assert len(await service.claim()) == 3
    other = await service.create(*"ef")
    assert len(await service.claim()) == 2
    read = await service.get(f"{service.batches}/{other['batchId']}")
    assert (read["capacity"], read["running"]) == (None, 2)


async def test_a_batch_can_only_tighten(service: Service) -> None:
    await limit(service, service.resource_id, Amount(period="minute", requests=2))
    await service.create(*"abcd", capacity=[{"period": "minute", "requests": 3}])
    assert len(await service.claim()) == 2


async def test_a_disabled_limit_of_a_batch_counts_for_nothing(service: Service) -> None:
    entry = {"period": "minute", "requests": 1, "enabled": False}
    batch = await service.create(*"abc", capacity=[entry, {"period": "day", "requests": 0}])
    assert [c["enabled"] for c in batch["capacity"]] == [False, True]
    assert len(await service.claim()) == 3


async def test_a_keys_limits_count_for_its_batches_only(service: Service) -> None:
    made = await service.http.post(
        f"/v1/api-key/{service.tenant}",
        json={
            "name": "k",
            "resources": ["*"],
            "capacity": [{"period": "hour", "requests": 1}],
        },
    )
    headers = {"x-api-key": made.json()["apiKeyValue"]}
    body = {"type": "ASYNC", "items": [service.item()] * 2}
    answer = await service.http.post(service.batches, json=body, headers=headers)
    assert answer.status_code == 201
    assert len(await service.claim()) == 1
    await service.create(*"ab")
    assert len(await service.claim()) == 2
    path = f"/v1/api-key/{service.tenant}/{made.json()['apiKeyId']}"
    [found] = (await usage(service, path))["api-key"]
    assert (found["requests"]["reserved"], found["requests"]["remaining"]) == (1, 0)
    own = await service.http.get(f"{path}/capacity-usage", headers=headers)
    assert own.status_code == 200


async def test_prompts_too_large_for_batch_or_key_are_refused_by_name(service: Service) -> None:
    body = {
        "type": "ASYNC",
        "items": [service.item("x"), service.item("word " * 200)],
        "capacity": [{"period": "day", "inputTokens": 100}],
    }
    answer = await service.http.post(service.batches, json=body)
    assert answer.status_code == 400
    [problem] = answer.json()["details"]["errors"]
    assert problem["path"] == "items[1].request"
    assert "the limit of 100 tokens of the batch" in problem["message"]
    await limit(service, service.key_id, Amount(period="day", tokens=90))
    answer = await service.http.post(service.batches, json=body | {"capacity": None})
    [problem] = answer.json()["details"]["errors"]
    assert "the limit of 90 tokens of the api key" in problem["message"]
    assert await service.added() == (0, 0)


async def test_dimensions_count_every_value_apart(service: Service) -> None:
    made = await service.http.post(
        f"/v1/ai-resource/{service.tenant}",
        json={
            "name": "by team",
            "model": {"model": "m", "connectionId": str(service.connection_id)},
            "concurrency": 7,
            "capacity": [
                {
                    "period": "Minute",
                    "requests": 1,
                    "dimension": "METADATA",
                    "dimensionField": "team",
                },
                {"period": "day", "requests": 2, "dimension": "Source-IP"},
            ],
        },
    )
    resource = made.json()
    assert resource["concurrency"] == 7
    shown = [(c["dimension"], c["dimensionField"]) for c in resource["capacity"]]
    assert shown == [("metadata", "team"), ("source-ip", None)]
    service.resource_id = UUID(resource["resourceId"])
    red = await service.create("a", "b", metadata={"team": "red"})
    assert len(await service.claim()) == 1
    await service.create("a", "b", metadata={"team": "blue"})
    assert len(await service.claim()) == 1
    # Both came from one address, which has had its two.
    await service.create("a", metadata={"team": "green"})
    assert not await service.claim()
    told = (await usage(service, f"{service.batches}/{red['batchId']}"))["value"]
    by = {(v["scope"]["dimension"], v["scope"]["dimensionValue"]): v for v in told}
    assert by["metadata", "red"]["requests"]["remaining"] == 0
    assert by["metadata", "red"]["scope"]["dimensionField"] == "team"
    assert by["source-ip", "127.0.0.1"]["requests"]["reserved"] == 2
    assert all(v["scope"]["id"] is None for v in told)
    async with service.db.transaction() as conn:
        _, confined = await api_keys.create(
            conn,
            workspace_id=service.environment.workspace_id,
            environment_id=service.environment.environment_id,
            name="confined",
            resources=[str(service.resource_id)],
        )
    path = f"/v1/ai-resource/{service.tenant}/{service.resource_id}/capacity-usage"
    seen = await service.http.get(path, headers={"x-api-key": confined})
    assert seen.json() == {"scopes": []}, "a confined key sees others' addresses"
    everyone = (await usage(service, f"/v1/ai-resource/{service.tenant}/{service.resource_id}"))[
        "value"
    ]
    assert {v["scope"]["dimensionValue"] for v in everyone} == {
        "red", "blue", "green", "127.0.0.1",
    }  # fmt: skip


# Where limits stand -------------------------------------------------------------------------------


async def test_usage_equals_a_count_by_hand(service: Service) -> None:
    await limit(
        service,
        service.resource_id,
        Amount(period="minute", requests=10, tokens=10_000),
        Amount(period="day", output_tokens=5_000),
    )
    await limit(service, service.connection_id, Amount(period="lifetime", requests=100))
    batch = await service.create(*"abc", capacity=[{"period": "hour", "requests": 50}])
    first, second = await service.claim(2)
    await service.settle([first])  # 7 tokens in, 3 out
    reserved = second.input_tokens + second.output_tokens
    path = f"{service.batches}/{batch['batchId']}"
    told = await usage(service, path)
    assert set(told) == {"connection", "resource", "batch"}
    minute, day = sorted(told["resource"], key=lambda u: u["period"], reverse=True)
    assert (minute["period"], minute["window"], minute["source"]) == ("minute", "sliding", "given")
    assert minute["requests"] == {
        "limit": 10,
        "used": 1,
        "reserved": 1,
        "remaining": 8,
        "releasedNext": 2,
    }
    assert minute["tokens"] == {
        "limit": 10_000,
        "used": 10,
        "reserved": reserved,
        "remaining": 10_000 - 10 - reserved,
        "releasedNext": 10 + reserved,
    }
    assert minute["inputTokens"] is None
    # A slot of half a second, a minute, and the guard after that.
    frees = await value(
        service,
        "select to_char((date_bin('0.25 s', %s, 'epoch') + interval '61 s') at time zone 'UTC',"
        """ 'YYYY-MM-DD"T"HH24:MI:SS.MS"Z"')""",
        first.claimed_at,
    )
    assert minute["nextReleaseAt"] == frees
    assert (day["period"], day["window"]) == ("day", "calendar")
    assert day["outputTokens"]["used"] == 3
    assert day["outputTokens"]["reserved"] == second.output_tokens
    assert day["nextReleaseAt"].endswith("T00:00:00.000Z")
    [lifetime] = told["connection"]
    assert (lifetime["requests"]["used"], lifetime["nextReleaseAt"]) == (1, None)
    assert lifetime["scope"] == {
        "kind": "connection",
        "id": str(service.connection_id),
        "name": "fake",
        "dimension": None,
        "dimensionField": None,
        "dimensionValue": None,
    }
    [own] = told["batch"]
    assert (own["period"], own["requests"]["remaining"]) == ("hour", 48)
    resource = await usage(service, f"/v1/ai-resource/{service.tenant}/{service.resource_id}")
    assert resource == {"connection": told["connection"], "resource": told["resource"]}
    connection = await usage(service, f"/v1/ai-connection/{service.tenant}/{service.connection_id}")
    assert connection == {"connection": told["connection"]}


async def test_other_tenants_are_not_counted(service: Service) -> None:
    """The same ids under another tenant's key open nothing; see test_auth for every route."""
    async with service.db.transaction() as conn:
        other = await tenants.create_workspace(conn, name="other", environment="test")
        _, key = await api_keys.create(
            conn,
            workspace_id=other.workspace_id,
            environment_id=other.environment_id,
            name="k",
        )
    batch = await service.create()
    place = f"{other.workspace_id}/{other.environment_id}"
    for path in (
        f"/v1/completion-batch/{place}/{batch['batchId']}/capacity-usage",
        f"/v1/ai-resource/{place}/{service.resource_id}/capacity-usage",
        f"/v1/ai-connection/{place}/{service.connection_id}/capacity-usage",
        f"/v1/api-key/{place}/{service.key_id}/capacity-usage",
    ):
        answer = await service.http.get(path, headers={"x-api-key": key})
        assert answer.status_code == 404, path
        assert answer.json()["errorCode"].endswith("_NOT_FOUND")


async def test_what_a_provider_stated_is_shown_for_a_week(service: Service) -> None:
    path = f"/v1/ai-connection/{service.tenant}/{service.connection_id}"
    assert (await service.get(path))["discoveredCapacity"] is None
    scope_id = await resource_model_scope(service)
    await do(
        service,
        "update limits set requests = 500, tokens = 9000, observed_at = now() where scope_id = %s",
        scope_id,
    )
    await do(
        service,
        "update scope_states set ceiling = 120.7, concurrency = 8.2, blocked_reason = 'overloaded',"
        " blocked_until = now() + interval '1 hour' where scope_id = %s",
        scope_id,
    )
    for place in (path, f"/v1/ai-resource/{service.tenant}/{service.resource_id}"):
        told = await service.get(place)
        model = told["discoveredCapacity"]["models"]["gpt-test"]
        [entry] = model["capacity"]
        assert (entry["period"], entry["requests"], entry["tokens"]) == ("minute", 500, 9000)
        assert model["updatedAt"].endswith("Z")
        learned = told["learned"]["models"]["gpt-test"]
        assert (learned["ceiling"], learned["concurrency"]) == (120, 8)
        assert (learned["blockedReason"], learned["blockedUntil"] is None) == ("overloaded", False)
    await do(
        service,
        "update limits set observed_at = now() - interval '8 days' where scope_id = %s",
        scope_id,
    )
    assert (await service.get(path))["discoveredCapacity"] is None


# What is waited for -------------------------------------------------------------------------------


async def outlook(service: Service, batch: Mapping[str, Any]) -> Json:
    told = await service.get(f"{service.batches}/{batch['batchId']}", includesItems="false")
    return {"waitingFor": told["waitingFor"], "eta": told["eta"]}


async def test_due_work_waits_for_a_worker_if_none_lives(lone_service: Service) -> None:
    service = lone_service
    batch = await service.create()
    told = await outlook(service, batch)
    assert (told["waitingFor"]["reason"], told["waitingFor"]["until"]) == ("WORKER", None)
    assert told["eta"] is None
    resource = await service.get(f"/v1/ai-resource/{service.tenant}/{service.resource_id}")
    assert resource["waitingFor"]["reason"] == "WORKER"
    await with_worker(service)
    assert (await outlook(service, batch))["waitingFor"] is None
    await do(service, "update workers set heartbeat_at = now() - interval '1 hour'")
    assert (await outlook(service, batch))["waitingFor"]["reason"] == "WORKER"
    listed = await service.get(service.batches)
    assert "waitingFor" not in listed["data"][0]
    await service.work()
    assert await outlook(service, batch) == {"waitingFor": None, "eta": None}


async def test_a_full_limit_is_named_with_its_end(lone_service: Service) -> None:
    service = lone_service
    await with_worker(service)
    await limit(service, service.connection_id, Amount(period="minute", requests=2))
    batch = await service.create(*"abcd")
    assert len(await service.claim()) == 2
    other = await service.create(*"efghijkl", priority=3)
    await do(service, "update ready set next_at = '-infinity'")
    assert not await service.claim()
    told = (await outlook(service, batch))["waitingFor"]
    assert told["reason"] == "CAPACITY"
    assert told["limit"]["scope"]["name"] == "fake"
    expected = ("minute", "sliding", "given", "requests", 2)
    found = told["limit"]
    assert (
        found["period"], found["window"], found["source"], found["kind"], found["amount"],
    ) == expected  # fmt: skip
    usages = await usage(service, f"{service.batches}/{batch['batchId']}")
    assert told["until"] == usages["connection"][0]["nextReleaseAt"]
    assert told["itemsAhead"] == 8
    assert (await outlook(service, other))["waitingFor"]["itemsAhead"] == 0
    resource = await service.get(f"/v1/ai-resource/{service.tenant}/{service.resource_id}")
    assert resource["waitingFor"]["limit"] == told["limit"]


async def test_a_limit_of_its_own_holds_up_only_the_batch(lone_service: Service) -> None:
    service = lone_service
    await with_worker(service)
    batch = await service.create(*"abc", capacity=[{"period": "hour", "requests": 1}])
    other = await service.create(*"de")
    assert len(await service.claim()) == 3
    told = (await outlook(service, batch))["waitingFor"]
    assert (told["reason"], told["limit"]["scope"]["kind"]) == ("CAPACITY", "batch")
    assert told["limit"]["scope"]["id"] == batch["batchId"]
    assert (await outlook(service, other))["waitingFor"] is None
    path = f"/v1/ai-resource/{service.tenant}/{service.resource_id}"
    resource = (await service.get(path))["waitingFor"]
    assert (resource["reason"], resource["limit"]) == ("CAPACITY", told["limit"])
    async with service.db.transaction() as conn:
        _, confined = await api_keys.create(
            conn,
            workspace_id=service.environment.workspace_id,
            environment_id=service.environment.environment_id,
            name="confined",
            resources=[str(service.resource_id)],
        )
    seen = await service.http.get(path, headers={"x-api-key": confined})
    assert seen.json()["waitingFor"]["limit"] is None


@pytest.mark.parametrize("where", ["batch", "resource"])
async def test_a_lifetime_is_waited_for_without_an_end(lone_service: Service, where: str) -> None:
    service = lone_service
    await with_worker(service)
    entry = {"period": "lifetime", "requests": 1}
    if where == "resource":
        await limit(service, service.resource_id, Amount(period="lifetime", requests=1))
    batch = await service.create(*"ab", capacity=[entry] if where == "batch" else None)
    assert len(await service.claim()) == 1
    assert not await service.claim()
    told = await outlook(service, batch)
    assert (told["waitingFor"]["reason"], told["waitingFor"]["until"]) == ("CAPACITY", None)
    assert told["waitingFor"]["limit"]["period"] == "lifetime"
    assert told["eta"] is None
    resource = await service.get(f"/v1/ai-resource/{service.tenant}/{service.resource_id}")
    assert resource["waitingFor"]["reason"] == "CAPACITY"


async def test_concurrency_and_rests_are_named(lone_service: Service) -> None:
    service = lone_service
    await with_worker(service)
    await do(service, "update connections set concurrency = 1")
    batch = await service.create(*"abc")
    assert len(await service.claim()) == 1
    told = (await outlook(service, batch))["waitingFor"]
    assert (told["reason"], told["until"], told["limit"]) == ("CONCURRENCY", None, None)
    assert told["scope"]["kind"] == "connection"
    await do(service, "update connections set concurrency = null")
    await do(
        service,
        "update scope_states set blocked_until = now() + interval '1 hour' where scope_id = %s",
        await resource_model_scope(service),
    )
    assert not await service.claim()
    told = (await outlook(service, batch))["waitingFor"]
    assert (told["reason"], told["scope"]["kind"]) == ("COOLDOWN", "model")
    assert (told["scope"]["name"], told["scope"]["id"]) == ("gpt-test", None)
    assert told["until"] is not None


async def test_anothers_limit_is_not_what_a_retry_waits_for(lone_service: Service) -> None:
    service = lone_service
    await with_worker(service)
    await service.create(*"ab", capacity=[{"period": "minute", "requests": 1}])
    batch = await service.create("c")
    claimed = await service.claim()
    mine = [item for item in claimed if str(item.batch_id) == batch["batchId"]]
    await service.settle(mine, queue.Outcome.unreachable, error="server_error")
    await do(
        service,
        "update items set visible_at = now() + interval '1 hour' where batch_id = %s",
        batch["batchId"],
    )
    await do(service, "update ready set next_at = '-infinity'")
    assert not await service.claim()
    told = (await outlook(service, batch))["waitingFor"]
    assert (told["reason"], told["limit"], told["until"]) == ("RETRY", None, None)


async def test_retries_and_pauses_are_named(lone_service: Service) -> None:
    service = lone_service
    await with_worker(service)
    batch = await service.create()
    await service.settle(await service.claim(), queue.Outcome.unreachable, error="server_error")
    await do(
        service,
        "update items set visible_at = now() + interval '1 hour' where batch_id = %s",
        batch["batchId"],
    )
    assert not await service.claim()
    assert (await outlook(service, batch))["waitingFor"]["reason"] == "RETRY"
    await service.http.post(f"{service.batches}/{batch['batchId']}/pause")
    told = await outlook(service, batch)
    assert (told["waitingFor"]["reason"], told["eta"]) == ("PAUSED", None)


# How long it takes --------------------------------------------------------------------------------


async def test_an_eta_follows_from_limits_and_from_what_is_ahead(lone_service: Service) -> None:
    service = lone_service
    await with_worker(service)
    batch = await service.create(*["x"] * 30)
    assert (await outlook(service, batch))["eta"] is None  # no limit, nothing measured
    await limit(service, service.resource_id, Amount(period="minute", requests=60))
    eta = (await outlook(service, batch))["eta"]
    assert (eta["secondsLeft"], eta["requestsPerMinute"]) == (30, 60)
    assert eta["limit"]["scope"]["id"] == str(service.resource_id)
    assert eta["at"].endswith("Z")
    await service.create(*["y"] * 100, weight=2)  # beside it: 60 of them
    await service.create(*["z"] * 10, priority=1)  # before it
    await service.create(*["z"] * 500, priority=-1)  # after it
    eta = (await outlook(service, batch))["eta"]
    assert (eta["secondsLeft"], eta["requestsPerMinute"]) == (100, 18)


async def test_the_measured_speed_counts_where_it_is_slower(lone_service: Service) -> None:
    service = lone_service
    await with_worker(service)
    await limit(service, service.resource_id, Amount(period="minute", requests=60))
    batch = await service.create(*["x"] * 32)
    await service.settle(await service.claim(2))
    await do(service, "update flows set created_at = created_at - interval '40 s'")
    # Two in forty seconds: thirty take 600 s, however much the limit would allow.
    eta = (await outlook(service, batch))["eta"]
    assert eta["secondsLeft"] == pytest.approx(600, rel=0.1)
    assert eta["limit"] is None


# A dry run ----------------------------------------------------------------------------------------


async def estimate(service: Service, status: int = 200, **body: object) -> Json:
    answer = await service.http.post(
        f"{service.batches}/estimate", json={"type": "ASYNC", "items": [service.item()]} | body
    )
    assert answer.status_code == status, answer.text
    return answer.json()


async def test_an_estimate_says_how_long_and_leaves_nothing(service: Service) -> None:
    await limit(service, service.resource_id, Amount(period="minute", requests=60, tokens=60_000))
    item = service.item()
    item["request"]["max_tokens"] = 500
    told = await estimate(service, items=[item] * 90)
    real = await service.create(priority=-5)
    each = real["totalEstimatedPromptTokens"]
    assert (told["items"], told["impossibleCount"]) == (90, 0)
    assert told["estimatedPromptTokens"] == 90 * each
    assert told["expectedOutputTokens"] == 90 * 500
    assert told["totalTokens"] == 90 * (each + 500)
    assert told["eta"]["secondsLeft"] == 90
    assert (told["isFeasible"], told["infeasibleReason"]) == (True, None)
    assert (told["limit"]["kind"], told["limit"]["amount"]) == ("requests", 60)
    assert await service.added() == (1, 1)  # the real one
    assert not await value(
        service,
        "select count(*) from limit_scopes where workspace_id = %s and kind = 'batch'",
        service.environment.workspace_id,
    )


async def test_an_estimate_knows_what_is_ahead_and_how_long_answers_are(service: Service) -> None:
    await limit(service, service.resource_id, Amount(period="minute", requests=60))
    await service.create(*["x"] * 20, priority=1)
    await service.create(*["x"] * 20)
    await do(
        service,
        "update resource_states set output_mean = 50.5 where resource_id = %s",
        service.resource_id,
    )
    told = await estimate(service, items=[service.item()] * 10)
    assert told["itemsAhead"] == 30
    assert told["eta"]["secondsLeft"] == 40
    assert told["expectedOutputTokens"] == 505


async def test_an_estimate_counts_limits_that_it_would_bring_along(service: Service) -> None:
    told = await estimate(
        service,
        items=[service.item()] * 30,
        capacity=[{"period": "minute", "requests": 10}],
        completionWindow="2m",
    )
    assert told["eta"]["secondsLeft"] == 180
    assert told["limit"]["scope"]["kind"] == "batch"
    assert told["isFeasible"] is False
    assert "60 s after the deadline" in told["infeasibleReason"]
    assert told["expiresAt"]
    told = await estimate(
        service,
        items=[service.item()] * 3,
        capacity=[{"period": "lifetime", "requests": 2}],
    )
    assert (told["isFeasible"], told["eta"]) == (False, None)
    assert "lifetime" in told["infeasibleReason"]
    told = await estimate(service)
    assert (told["isFeasible"], told["eta"], told["limit"]) == (None, None, None)


async def test_an_estimate_counts_the_values_of_dimensions(service: Service) -> None:
    await limit(
        service,
        service.resource_id,
        Amount(period="minute", requests=10, dimension="metadata:team"),
    )
    red = {"team": "red"}
    told = await estimate(service, items=[service.item()] * 20, metadata=red)
    assert told["eta"]["secondsLeft"] == 120
    assert told["limit"]["scope"]["dimensionValue"] == "red"
    await service.create(*["x"] * 5, metadata=red)
    await service.create(*["x"] * 5, metadata={"team": "blue"})
    told = await estimate(service, items=[service.item()] * 20, metadata=red)
    assert told["eta"]["secondsLeft"] == 150


async def test_impossible_items_are_named_and_the_others_counted(service: Service) -> None:
    await limit(service, service.resource_id, Amount(period="minute", tokens=100))
    big = service.item("word " * 300)
    told = await estimate(service, items=[service.item(), big, service.item(), big])
    assert (told["items"], told["impossibleCount"]) == (4, 2)
    assert [i["index"] for i in told["impossibleItems"]] == [1, 3]
    assert "the limit of 100 tokens of resource 'small'" in told["impossibleItems"][0]["reason"]
    assert told["isFeasible"] is False
    assert "2 of its items" in told["infeasibleReason"]
    told = await estimate(service, items=[big])
    assert (told["impossibleCount"], told["totalTokens"], told["eta"]) == (1, 0, None)


async def test_an_estimate_refuses_what_a_creation_refuses(service: Service) -> None:
    assert (await estimate(service, 400, items=[]))["errorCode"] == "GENERIC_VALIDATION"
    unknown = [service.item() | {"resourceId": str(uuid7())}]
    assert (await estimate(service, 404, items=unknown))["errorCode"] == "AI_RESOURCE_NOT_FOUND"
    told = await estimate(service, 400, expiresAt="2001-01-01T00:00:00Z")
    assert told["details"]["errors"][0]["path"] == "expiresAt"
    told = await estimate(service, 400, type="CALLBACK")
    assert told["details"]["errors"][0]["path"] == "type"


class TestSmall:
    """A server that takes little."""

    @pytest.fixture
    def settings(self) -> Settings:
        return Settings(port=0, max_body_bytes=2000)

    async def test_an_estimate_is_as_large_as_a_batch_may_be(self, lone_service: Service) -> None:
        told = await estimate(lone_service, 413, items=[lone_service.item("x" * 3000)])
        assert told["errorCode"] == "REQUEST_TOO_LARGE"
