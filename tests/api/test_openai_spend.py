"""What a batch of OpenAI's routes may spend, and what an estimate says that it will."""

from collections.abc import AsyncIterator
from decimal import Decimal

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
async def priced(service: Service) -> AsyncIterator[Service]:
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
    yield service


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
