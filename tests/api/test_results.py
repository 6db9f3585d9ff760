"""Results as files: complete, in order, also while the batch runs, in bounded memory."""

import csv
import gzip
import io
import json
import tracemalloc

from app.intake import MOST_ITEMS
from tests.api.conftest import Json, Service


def lines(text: str) -> list[Json]:
    return [json.loads(line) for line in text.splitlines()]


async def test_results_are_the_items_as_lines(service: Service) -> None:
    batch = await service.create("a", "b", "c")
    taken = await service.claim()
    await service.settle(taken[:2], body='{"choices": [\n{"message": {"content": "=1+1"}}]}')
    await service.fail(taken[2:])
    path = f"{service.batches}/{batch['batchId']}"
    answer = await service.http.get(f"{path}/results")
    assert answer.headers["content-type"] == "application/jsonl"
    assert answer.headers["x-sluice-complete"] == "true"
    assert "x-sluice-next" not in answer.headers
    told = lines(answer.text)
    items = (await service.get(f"{path}/items"))["data"]
    assert told == [{k: v for k, v in item.items() if k != "request"} for item in items]
    full = await service.http.get(f"{path}/results", params={"includesRequests": "true"})
    assert lines(full.text) == items
    failed = await service.http.get(f"{path}/results", params={"status": "FAILED"})
    assert [line["index"] for line in lines(failed.text)] == [2]
    bare = await service.http.get(f"{path}/results", params={"responseFormat": "openai"})
    assert lines(bare.text)[0]["response"] == {"choices": [{"message": {"content": "=1+1"}}]}


async def test_results_as_csv_hold_every_text_to_the_letter(service: Service) -> None:
    content = '=HYPERLINK("x"),\n"quoted"\r and, more'
    batch = await service.create("a", "b")
    reply = json.dumps({"choices": [{"message": {"content": content}}]})
    taken = await service.claim()
    await service.settle(taken[:1], body=reply)
    await service.fail(taken[1:])
    path = f"{service.batches}/{batch['batchId']}/results"
    answer = await service.http.get(path, params={"format": "csv"})
    assert answer.headers["content-type"] == "text/csv; header=present; charset=utf-8"
    assert answer.headers["content-disposition"].endswith('.csv"')
    rows = list(csv.DictReader(io.StringIO(answer.text, newline="")))
    assert [row["status"] for row in rows] == ["COMPLETED", "FAILED"]
    assert (rows[0]["answer"], rows[0]["response"]) == (content, reply)
    assert (rows[0]["promptTokens"], rows[0]["outputTokens"]) == ("7", "3")
    assert (rows[1]["errorCode"], rows[1]["statusCode"]) == ("bad_request", "400")
    escaped = await service.http.get(path, params={"format": "CSV", "escapeFormulas": "true"})
    rows = list(csv.DictReader(io.StringIO(escaped.text, newline="")))
    assert rows[0]["answer"] == f"'{content}"


async def test_results_of_a_running_batch_say_where_to_go_on(service: Service) -> None:
    batch = await service.create(*(["x"] * 6))
    taken = await service.claim(4)
    await service.settle([taken[0], taken[1], taken[3]])
    path = f"{service.batches}/{batch['batchId']}/results"
    first = await service.http.get(path)
    assert [line["index"] for line in lines(first.text)] == [0, 1, 3]
    assert first.headers["x-sluice-complete"] == "false"
    after = first.headers["x-sluice-next"]
    assert after == "1"
    await service.settle([taken[2]])
    await service.work()
    rest = await service.http.get(path, params={"after": after})
    assert [line["index"] for line in lines(rest.text)] == [2, 3, 4, 5]
    assert rest.headers["x-sluice-complete"] == "true"
    fresh = await service.create("y")
    nothing = await service.http.get(f"{service.batches}/{fresh['batchId']}/results")
    assert (nothing.text, nothing.headers["x-sluice-next"]) == ("", "-1")
    again = await service.http.get(path, params={"after": "-1"})
    assert len(lines(again.text)) == 6


async def test_results_are_compressed_for_those_who_take_it(service: Service) -> None:
    batch = await service.create("a", "b")
    await service.work()
    path = f"{service.batches}/{batch['batchId']}/results"
    for offer, coded in (("gzip", True), ("br, *", True), ("identity", False), ("gzip;q=0", False)):
        headers = {"accept-encoding": offer}
        async with service.http.stream("GET", path, headers=headers) as answer:
            raw = b"".join([piece async for piece in answer.aiter_raw()])
        assert (answer.headers.get("content-encoding") == "gzip") is coded
        assert answer.headers["vary"] == "accept-encoding"
        text = gzip.decompress(raw) if coded else raw
        assert len(lines(text.decode())) == 2


async def test_garbage_is_refused_before_anything_is_sent(service: Service) -> None:
    batch = await service.create()
    path = f"{service.batches}/{batch['batchId']}/results"
    for garbage in (
        "format=xml", "status=DONE", "after=-2", "after=x", f"after={MOST_ITEMS + 1}",
        "includesRequests=1", "escapeFormulas=yes", "responseFormat=raw", "errorCode=",
    ):  # fmt: skip
        answer = await service.http.get(f"{path}?{garbage}")
        assert answer.status_code == 400, garbage
        assert answer.json()["details"]["errors"][0]["path"] == garbage.split("=")[0]


async def test_results_are_never_held_together(service: Service) -> None:
    """Forty megabytes of answers pass through in pages of two; what tests before left adds some."""
    batch = await service.create(*(["x"] * 40))
    reply = json.dumps({"choices": [{"message": {"content": "y" * 1_000_000}}]})
    while items := await service.claim(4):
        await service.settle(items, body=reply)
    path = f"{service.batches}/{batch['batchId']}/results"
    tracemalloc.start()
    size = 0
    async with service.http.stream("GET", path, headers={"accept-encoding": "identity"}) as answer:
        async for piece in answer.aiter_raw():
            size += len(piece)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert size > 40_000_000
    assert peak < 20_000_000
