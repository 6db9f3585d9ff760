"""What a batch of OpenAI's routes may spend, and what an estimate says that it will."""

from decimal import Decimal
from typing import Any

import openai
import pytest
from openai import AsyncOpenAI
from openai.types import Batch

from app import batches, prices
from app.prices import Price
from tests.api.conftest import Json, Service
from tests.api.test_openai import CHAT, client, line, settled, submit, upload

__all__ = ["client"]  # a fixture


@pytest.fixture
async def priced(service: Service) -> Service:
    """A service whose models cost 1 EUR per million input tokens and 2 per million output tokens."""
    async with service.db.transaction() as conn:
        every = Price(
            model="*",
            input_per_million=Decimal(1),
            cached_per_million=None,
            output_per_million=Decimal(2),
            currency="EUR",
        )
        await prices.put(conn, [every], workspace_id=service.environment.workspace_id)
    return service


async def pause_exhausted(service: Service) -> None:
    """What maintenance does every second."""
    async with service.db.transaction() as conn:
        for batch in await batches.exhausted(conn):
            await batches.pause_exhausted(conn, batch=batch)


def told(batch: Batch) -> Json:
    """What Sluice adds to a batch."""
    return batch.model_extra or {}


async def change(client: AsyncOpenAI, batch: Batch, **to: object) -> Batch:
    return await client.post(f"/batches/{batch.id}", body=to, cast_to=Batch)


async def test_a_batch_with_max_cost_pauses_with_the_reason_and_goes_on_when_it_is_raised(
    priced: Service, client: AsyncOpenAI
) -> None:
    lines = [line(n) for n in range(3)]
    made = await submit(client, lines, extra_body={"max_cost": 0.0025, "max_tokens": 1_000_000})
    assert (told(made)["max_cost"], told(made)["max_tokens"]) == (0.0025, 1_000_000)
    begun = await settled(client, made.id)
    assert begun.status == "in_progress"
    assert (told(begun)["cost"], told(begun)["currency"]) == (0, "EUR")
    assert told(begun)["pause_reason"] is None
    taken = await priced.claim()
    assert len(taken) == 1  # each reserves 1,024 output tokens
    assert await priced.claim() == []
    await priced.settle(taken)
    spent = told(await client.batches.retrieve(made.id))["cost"]
    assert spent > 0
    await change(client, made, max_cost=spent + 0.001)  # less than the next one reserves
    assert await priced.claim() == []
    await pause_exhausted(priced)
    paused = await client.batches.retrieve(made.id)
    assert paused.status == "in_progress"
    assert told(paused)["is_paused"]
    assert told(paused)["pause_reason"]["code"] == "max_cost_reached"
    assert f"POST /v1/batches/{made.id}" in told(paused)["pause_reason"]["message"]
    raised = await change(client, made, max_cost=1)
    assert (told(raised)["is_paused"], told(raised)["pause_reason"]) == (False, None)
    assert told(raised)["max_tokens"] == 1_000_000  # absent: as it was
    await priced.settle(await priced.claim())
    done = await settled(client, made.id, lambda b: b.status == "completed")
    assert done.usage is not None
    expected = done.usage.input_tokens * 1e-6 + done.usage.output_tokens * 2e-6
    assert abs(told(done)["cost"] - expected) < 1e-9


async def test_a_model_without_a_price_makes_a_batch_with_max_cost_fail(
    service: Service, client: AsyncOpenAI
) -> None:
    made = await submit(client, [line(1)], extra_body={"max_cost": 5})
    failed = await settled(client, made.id)
    assert failed.status == "failed"
    assert failed.errors is not None
    assert failed.errors.data is not None
    (mistake,) = failed.errors.data
    assert (mistake.code, mistake.param, mistake.line) == ("price_not_known", "max_cost", None)
    assert "sluice prices import" in (mistake.message or "")
    assert (told(failed)["max_cost"], told(failed)["cost"], told(failed)["currency"]) == (
        5,
        None,
        None,
    )
    assert await service.added() == (0, 0)
    running = await submit(client, [line(1)], extra_body={"max_tokens": 10_000})
    await settled(client, running.id)
    with pytest.raises(openai.BadRequestError) as refused:
        await change(client, running, max_cost=5)
    assert refused.value.param == "max_cost"
    assert told(await client.batches.retrieve(running.id))["max_tokens"] == 10_000
    free = await change(client, running, max_tokens=None, priority=7, completion_window="2d")
    assert (told(free)["max_tokens"], told(free)["priority"]) == (None, 7)
    assert free.expires_at is not None
    assert running.expires_at is not None
    assert free.expires_at >= running.expires_at + 86_400


@pytest.mark.parametrize(
    "wrong", [{"max_cost": 0}, {"max_cost": "5"}, {"max_cost": True}, {"max_tokens": 0.5}]
)
async def test_what_is_no_bound_is_refused(
    service: Service, client: AsyncOpenAI, wrong: Json
) -> None:
    file = await upload(client, [line(1)])
    with pytest.raises(openai.BadRequestError) as refused:
        await client.batches.create(
            input_file_id=file, endpoint=CHAT, completion_window="24h", extra_body=wrong
        )
    assert [refused.value.param] == list(wrong)
    made = await submit(client, [line(1)])
    await settled(client, made.id)
    for body in (wrong, {}, {"unknown": 1}):
        with pytest.raises(openai.BadRequestError):
            await change(client, made, **body)
    assert await service.added() == (1, 1)


async def test_an_estimate_says_what_a_batch_would_cost(
    service: Service, priced: Service, client: AsyncOpenAI
) -> None:
    asked: Json = {"messages": [{"role": "user", "content": "Why?"}], "max_tokens": 100}
    file = await upload(client, [line(n, **asked) for n in range(10)])
    body = {"input_file_id": file, "endpoint": CHAT}
    estimate = await client.post("/batches/estimate", body=body, cast_to=dict[str, Any])
    assert estimate["output_tokens"] == 1000
    amount = estimate["input_tokens"] * 1e-6 + 1000 * 2e-6
    assert estimate["cost"] == {"amount": pytest.approx(amount), "currency": "EUR"}
    assert estimate["unpriced_models"] == []
    items = [{"resourceId": str(priced.resource_id), "request": asked}] * 10
    other = await priced.http.post(
        f"{priced.batches}/estimate", json={"type": "ASYNC", "items": items}
    )
    assert other.json()["cost"] == estimate["cost"]
    assert await service.added() == (0, 0)


async def test_an_estimate_names_the_models_that_have_no_price(
    service: Service, client: AsyncOpenAI
) -> None:
    file = await upload(client, [line(1)])
    body = {"input_file_id": file, "endpoint": CHAT}
    estimate = await client.post("/batches/estimate", body=body, cast_to=dict[str, Any])
    assert (estimate["cost"], estimate["unpriced_models"]) == (None, ["gpt-test"])
    other = await service.http.post(
        f"{service.batches}/estimate", json={"type": "ASYNC", "items": [service.item()]}
    )
    assert (other.json()["cost"], other.json()["unpricedModels"]) == (None, ["gpt-test"])
