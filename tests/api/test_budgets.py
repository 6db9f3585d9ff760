"""What a batch may spend, and erasing its texts, over HTTP."""

from decimal import Decimal

from app import batches, prices
from app.prices import Price
from app.queue import Outcome
from tests.api.conftest import Json, Service


async def import_price(service: Service) -> None:
    async with service.db.transaction() as conn:
        cheap = Price(
            model="*",
            input_per_million=Decimal(1),
            cached_per_million=None,
            output_per_million=Decimal(2),
            currency="EUR",
        )
        await prices.put(conn, [cheap], workspace_id=service.environment.workspace_id)


async def pause_exhausted(service: Service) -> None:
    """What maintenance does every second."""
    async with service.db.transaction() as conn:
        for batch in await batches.exhausted(conn):
            await batches.pause_exhausted(conn, batch=batch)


async def show(service: Service, batch: Json) -> Json:
    return await service.get(f"{service.batches}/{batch['batchId']}")


async def test_a_batch_with_max_tokens_pauses_and_goes_on_when_it_is_raised(
    service: Service,
) -> None:
    batch = await service.create("one", "two", "three", maxTokens=1_040)
    assert (batch["maxTokens"], batch["maxCost"], batch["pauseReason"]) == (1_040, None, None)
    taken = await service.claim()
    assert len(taken) == 1  # each reserves 1,024 output tokens
    await service.settle(taken)
    assert await service.claim() == []
    await pause_exhausted(service)
    shown = await show(service, batch)
    assert shown["isPaused"]
    assert shown["pauseReason"]["code"] == "MAX_TOKENS_REACHED"
    assert "1,040" in shown["pauseReason"]["message"]
    assert shown["waitingFor"]["reason"] == "PAUSED"
    path = f"{service.batches}/{batch['batchId']}"
    answer = await service.http.patch(path, json={"maxTokens": 100_000})
    assert answer.status_code == 200, answer.text
    assert (answer.json()["isPaused"], answer.json()["pauseReason"]) == (False, None)
    await service.settle(await service.claim())
    assert (await show(service, batch))["status"] == "COMPLETED"


async def test_max_cost_needs_a_price_and_is_in_its_currency(service: Service) -> None:
    body = {"type": "ASYNC", "maxCost": 0.5, "items": [service.item()]}
    refused = await service.http.post(service.batches, json=body)
    assert refused.status_code == 400
    assert "sluice prices import" in refused.text
    await import_price(service)
    batch = await service.create("one", maxCost=0.5)
    assert (batch["maxCost"], batch["currency"], batch["totalCost"]) == (0.5, "EUR", 0)
    await service.settle(await service.claim())
    shown = await show(service, batch)
    spent = shown["totalPromptTokens"] * 1e-6 + shown["totalOutputTokens"] * 2e-6
    assert abs(shown["totalCost"] - spent) < 1e-9
    for wrong in (0, -1, "much", True):
        answer = await service.http.post(service.batches, json=body | {"maxCost": wrong})
        assert answer.status_code == 400, wrong


async def test_texts_are_erased_once_a_batch_has_ended(service: Service) -> None:
    batch = await service.create("a secret", "another")
    path = f"{service.batches}/{batch['batchId']}"
    early = await service.http.delete(f"{path}/texts")
    assert (early.status_code, early.json()["errorCode"]) == (409, "BATCH_NOT_ENDED")
    items = (await service.get(f"{path}/items"))["data"]
    waiting = await service.http.delete(f"{path}/{items[0]['itemId']}/texts")
    assert (waiting.status_code, waiting.json()["errorCode"]) == (409, "ITEM_NOT_ENDED")
    taken = await service.claim()
    await service.settle(taken[:1])
    one = await service.http.delete(f"{path}/{items[0]['itemId']}/texts")
    assert one.status_code == 200, one.text
    assert one.json()["request"] is None
    assert one.json()["response"]["data"] is None
    assert one.json()["completionTokens"] > 0
    await service.settle(taken[1:], Outcome.rejected, error="invalid_request")
    erased = await service.http.delete(f"{path}/texts")
    assert (erased.status_code, erased.json()["textsErased"]) == (200, True)
    after = await service.get(f"{path}/items")
    assert [item["request"] for item in after["data"]] == [None, None]
    assert "secret" not in str(after)
    assert (await service.http.delete(f"{path}/texts")).status_code == 200
