"""Usage, audit and error rates: the numbers of a small known history, and what is refused."""

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from app.ids import uuid7
from app.queue import Outcome
from app.settings import Settings
from tests.api.conftest import Json, Service


@pytest.fixture
async def history(service: Service) -> Json:
    """Four items: two answered, one refused, one answered at the second try."""
    own = {"messages": [{"role": "user", "content": "x"}], "vmx": {"correlationId": "order-7"}}
    items = [service.item(), service.item() | {"request": own}, service.item(), service.item()]
    body = {"type": "ASYNC", "items": items, "metadata": {"team": "search", "n": 1}}
    batch = (await service.http.post(service.batches, json=body)).json()
    first, second, third, fourth = await service.claim()
    await service.settle([first, second])
    await service.fail([third])
    await service.settle([fourth], Outcome.unreachable, error="server_error")
    await service.work()
    return batch


def around(**more: Any) -> Json:  # noqa: ANN401 - JSON
    """A question about the last hour."""
    now = datetime.now(UTC)
    when = {
        "start": (now - timedelta(minutes=59)).isoformat(),
        "end": (now + timedelta(minutes=1)).isoformat(),
    }
    fields = more.pop("fields", {})
    return {
        "agg": {"requestCount": "sum"},
        "filter": {"dateRange": when, "fields": fields},
        **more,
    }


async def ask(service: Service, status: int = 200, **more: Any) -> Any:  # noqa: ANN401 - JSON
    answer = await service.http.post(f"/v1/request-usage/{service.tenant}", json=around(**more))
    assert answer.status_code == status, answer.text
    return answer.json()


async def test_metrics_are_those_of_the_calls(service: Service, history: Json) -> None:
    del history
    agg = {
        "requestCount": "sum", "successCount": "sum", "errorCount": "sum", "promptTokens": "sum",
        "outputTokens": "max", "completionTokens": "sum", "totalTokens": "avg",
        "providerDuration": "p95", "requestDuration": "min", "cachedTokens": "sum",
    }  # fmt: skip
    (row,) = await ask(service, agg=agg)
    assert row["time"].endswith("Z")
    assert (row["requestCount"], row["successCount"], row["errorCount"]) == (5, 3, 2)
    assert (row["promptTokens"], row["outputTokens"], row["completionTokens"]) == (21, 3, 9)
    assert (row["totalTokens"], row["providerDuration"], row["cachedTokens"]) == (6, 5, 0)
    assert row["requestDuration"] >= 0


async def test_dimensions_split_and_name(service: Service, history: Json) -> None:
    rows = await ask(
        service,
        dimensions=["resourceId", "failureReason", "metadata.team"],
        orderBy={"requestCount": "desc", "failureReason": "asc"},
    )
    assert [(r["failureReason"], r["requestCount"], r["metadata.team"]) for r in rows] == [
        (None, 3, "search"),
        ("bad_request", 1, "search"),
        ("server_error", 1, "search"),
    ]
    assert rows[0]["resourceId"] == {
        "value": str(service.resource_id), "label": "small", "displayName": "small",
    }  # fmt: skip
    rows = await ask(service, dimensions=["correlationId"], orderBy=[{"field": "requestCount"}])
    assert [(r["correlationId"], r["requestCount"]) for r in rows] == [
        ("order-7", 1),
        (history["batchId"], 4),
    ]
    rows = await ask(
        service, dimensions=["apiKeyId", "connectionId", "statusCode", "userId"], limit=1
    )
    assert len(rows) == 1
    assert rows[0]["apiKeyId"]["label"] == "all"
    assert rows[0]["statusCode"] in (200, 400)
    assert rows[0]["userId"] is None


FITS: list[tuple[Json, int]] = [
    ({"statusCode": {"operator": "eq", "value": 200}}, 3),
    ({"statusCode": {"operator": "neq", "value": "200"}}, 2),
    ({"statusCode": {"operator": "gte", "value": 400}}, 2),
    ({"statusCode": {"operator": "lt", "value": 400}}, 3),
    ({"failureReason": {"operator": "in", "value": ["bad_request", "x"]}}, 1),
    ({"failureReason": {"operator": "nin", "value": ["bad_request"]}}, 4),
    ({"failureReason": {"operator": "is_not", "value": None}}, 2),
    ({"failureReason": {"operator": "eq", "value": None}}, 3),
    ({"metadata.team": {"operator": "eq", "value": "search"}}, 5),
    ({"metadata.team": {"operator": "eq", "value": "' or 1=1 --"}}, 0),
    ({"correlationId": {"operator": "eq", "value": "order-7"}}, 1),
    (
        {
            "model": {"operator": "eq", "value": "gpt-test"},
            "statusCode": {"operator": "gt", "value": 100},
        },
        3,
    ),
]


async def test_filters_keep_what_fits(service: Service, history: Json) -> None:
    del history
    for fields, calls in FITS:
        (row,) = await ask(service, fields=fields)
        assert row["requestCount"] == calls, fields


async def test_gaps_are_filled_with_zeros_in_any_time_zone(service: Service, history: Json) -> None:
    del history
    rows = await ask(service, granularity="minute")
    assert len(rows) in (60, 61)
    assert sum(row["requestCount"] for row in rows) == 5
    assert [row["time"] for row in rows] == sorted(row["time"] for row in rows)
    for granularity, most in (
        ("second_5", 721),
        ("hour", 2),
        ("day", 2),
        ("month", 2),
        ("year", 2),
    ):
        rows = await ask(service, granularity=granularity, timeZone="Asia/Kolkata")
        assert 1 <= len(rows) <= most
        assert sum(row["requestCount"] for row in rows) == 5, granularity


async def test_a_day_follows_its_zones_clock(service: Service) -> None:
    """Also the one of 25 hours, at the end of summer time."""
    when = {"start": "2025-10-24T22:00:00Z", "end": "2025-10-27T23:00:00Z"}
    body = {
        "agg": {"requestCount": "sum"},
        "granularity": "day",
        "timeZone": "Europe/Berlin",
        "filter": {"dateRange": when},
    }
    answer = await service.http.post(f"/v1/completion-usage/{service.tenant}", json=body)
    assert [row["time"] for row in answer.json()] == [
        "2025-10-24T22:00:00.000Z",
        "2025-10-25T22:00:00.000Z",
        "2025-10-26T23:00:00.000Z",
    ]


WRONG: list[tuple[Json, str]] = [
    ({"agg": {}}, "agg"),
    ({"agg": {"drop table": "sum"}}, "agg.drop table"),
    ({"agg": {"requestCount": "median"}}, "agg.requestCount"),
    ({"dimensions": ["pg_sleep(9)"]}, "dimensions[0]"),
    ({"dimensions": ["metadata."]}, "dimensions[0]"),
    ({"dimensions": ["model"] * 9}, "dimensions"),
    ({"granularity": "fortnight"}, "granularity"),
    ({"granularity": "day", "timeZone": "Mars/Olympus"}, "timeZone"),
    ({"limit": 0}, "limit"),
    ({"orderBy": {"secret": "asc"}}, "orderBy"),
    ({"fields": {"password": {"operator": "eq", "value": "x"}}}, "filter.fields.password"),
    ({"fields": {"model": {"operator": "like", "value": "x"}}}, "filter.fields.model.operator"),
    ({"fields": {"model": {"operator": "in", "value": "x"}}}, "filter.fields.model.value"),
    ({"fields": {"model": {"operator": "eq", "value": ["x"]}}}, "filter.fields.model.value"),
    ({"fields": {"model": {"operator": "gt", "value": "x"}}}, "filter.fields.model.value"),
    ({"fields": {"model": {"operator": "eq", "value": "a\0"}}}, "filter.fields.model.value"),
    ({"fields": {"model": {"operator": "lt", "value": None}}}, "filter.fields.model.value"),
]


async def test_what_cannot_be_asked_is_refused_with_its_place(service: Service) -> None:
    for more, path in WRONG:
        told = await ask(service, 400, **more)
        assert told["details"]["errors"][0]["path"] == path, more
    for start, end in (
        ("2026-01-02T00:00:00Z", "2026-01-01T00:00:00Z"),
        ("2024-01-01T00:00:00Z", "2026-01-01T00:00:00Z"),
    ):
        body = around() | {"filter": {"dateRange": {"start": start, "end": end}}}
        answer = await service.http.post(f"/v1/request-usage/{service.tenant}", json=body)
        assert answer.status_code == 400
        assert answer.json()["details"]["errors"][0]["path"] == "filter.dateRange.end"


async def test_the_audit_tells_every_call(service: Service, history: Json) -> None:
    path = f"/v1/request-audit/{service.tenant}"
    page = await service.get(path, pageSize="2")
    assert (page["total"], page["pageIndex"], page["pageSize"], len(page["data"])) == (5, 0, 2, 2)
    found = [*page["data"]]
    for index in ("1", "2"):
        found += (await service.get(path, pageSize="2", pageIndex=index))["data"]
    assert len(found) == 5
    assert [c["timestamp"] for c in found] == sorted((c["timestamp"] for c in found), reverse=True)
    last = found[0]
    assert last["itemId"] == history["items"][3]["itemId"]
    assert (last["attempt"], last["outcome"], last["statusCode"]) == (2, "ANSWERED", 200)
    assert last["responseData"]["id"] == "chatcmpl-1"
    assert last["requestPayload"] == history["items"][3]["request"]
    assert last["metadata"] == {"team": "search", "n": 1}
    assert (last["totalTokens"], last["type"]) == (10, "COMPLETION_BATCH")
    by_order = [c for c in found if c["correlationId"] == "order-7"]
    assert len(by_order) == 1

    async def total(**params: str) -> int:
        return (await service.get(f"/v1/completion-audit/{service.tenant}", **params))["total"]

    assert await total(statusCode="200") == 3
    assert await total(statusCode="any", model="gpt-test") == 3
    assert await total(resourceId=str(uuid7())) == 0
    assert await total(batchId=history["batchId"], connectionId=str(service.connection_id)) == 5
    assert await total(endDate="2026-01-01T00:00:00Z") == 0
    for garbage in (
        "pageSize=101", "pageIndex=-1", "resourceId=x", "statusCode=abc", "type=x",
        "startDate=yesterday", "startDate=2020-01-01T00:00:00Z",
    ):  # fmt: skip
        assert (await service.http.get(f"{path}?{garbage}")).status_code == 400, garbage


async def test_fields_of_metadata_and_their_values(service: Service, history: Json) -> None:
    del history
    await service.create(metadata={"team": "ads"})
    path = f"/v1/request-audit/{service.tenant}"
    assert await service.get(f"{path}/metadata-keys") == ["n", "team"]
    assert await service.get(f"{path}/metadata-values/team") == ["ads", "search"]
    assert await service.get(f"{path}/metadata-values/none") == []


async def test_the_error_rate_of_a_resource(service: Service, history: Json) -> None:
    del history
    path = f"/v1/completion-metric/{service.tenant}/{service.resource_id}/error-rate"
    assert await service.get(path) == {
        "errorRate": 40, "totalSuccess": 3, "totalFailed": 2, "totalRequests": 5,
    }  # fmt: skip
    assert (await service.get(path, statusCode="429"))["errorRate"] == 0
    assert (await service.get(path, model="none"))["totalRequests"] == 0
    assert (await service.get(path, window="5", statusCode="any"))["totalFailed"] == 2
    for garbage in ("window=0", "window=x", "statusCode=1", "aiConnectionId=x"):
        assert (await service.http.get(f"{path}?{garbage}")).status_code == 400
    unknown = f"/v1/completion-metric/{service.tenant}/{uuid7()}/error-rate"
    assert (await service.http.get(unknown)).status_code == 404


async def test_a_confined_key_sees_only_its_resources(service: Service, history: Json) -> None:
    del history
    body = {"name": "confined", "resources": [str(uuid7())]}
    made = await service.http.post(f"/v1/api-key/{service.tenant}", json=body)
    if made.status_code != 201:
        # A key must name resources that exist: one of another connection's.
        model = {"model": "m", "connectionId": str(service.connection_id)}
        other = await service.http.post(
            f"/v1/ai-resource/{service.tenant}", json={"name": "other", "model": model}
        )
        body["resources"] = [other.json()["resourceId"]]
        made = await service.http.post(f"/v1/api-key/{service.tenant}", json=body)
    headers = {"authorization": f"Bearer {made.json()['apiKeyValue']}"}
    path = f"/v1/request-usage/{service.tenant}"
    answer = await service.http.post(path, json=around(), headers=headers)
    assert answer.json()[0]["requestCount"] == 0
    audit = f"/v1/request-audit/{service.tenant}"
    assert (await service.http.get(audit, headers=headers)).json()["total"] == 0
    keys = await service.http.get(f"{audit}/metadata-keys", headers=headers)
    assert keys.json() == []
    rate = f"/v1/completion-metric/{service.tenant}/{service.resource_id}/error-rate"
    assert (await service.http.get(rate, headers=headers)).status_code == 403


class TestSlow:
    @pytest.fixture
    def settings(self) -> Settings:
        return Settings(port=0, usage_timeout_s=0.001)

    async def test_a_question_that_takes_too_long_is_told_so(self, lone_service: Service) -> None:
        service = lone_service
        await service.create(*(["x"] * 200))
        await service.work()
        answer = await service.http.post(
            f"/v1/request-usage/{service.tenant}",
            json=around(agg={"requestDuration": "p99"}, dimensions=["messageId"]),
        )
        assert (answer.status_code, answer.json()["errorCode"]) == (400, "QUERY_TOO_SLOW")
