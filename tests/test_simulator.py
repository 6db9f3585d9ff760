"""The simulator: its limits are exact, its faults are real, its report tells the truth."""

import asyncio
import base64
import json
import struct
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from typing import cast

import httpx
import pytest

from app import simulator as simulator_module
from app import simulator_report
from app.errors import UsageError
from app.rate_limits import rate_limits
from app.simulator import Behaviour, Simulator, simulate
from app.simulator_limits import Limiter, Refusal

PATHS = [
    "/v1/chat/completions",
    "/v1/responses",
    "/v1/embeddings",
    "/v1/completions",
    "/v1/moderations",
]


class Clock:
    """Time that moves only when told to."""

    def __init__(self, now: float = 600.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


class Client:
    """A client of one simulator, with what tests ask of it."""

    def __init__(self, simulator: Simulator, http: httpx.AsyncClient) -> None:
        self.simulator = simulator
        self.http = http

    async def chat(
        self, content: object = "hi", path: str = PATHS[0], **more: object
    ) -> httpx.Response:
        body = {"model": "m", "messages": [{"role": "user", "content": content}], **more}
        return await self.http.post(path, json=body)

    def report(self) -> dict[str, object]:
        return self.simulator.report()

    def count(self, name: str) -> int:
        return cast("int", self.report()[name])

    def refused_by(self) -> dict[str, int]:
        """Count refusals by kind, without those that never happened."""
        counts = cast("dict[str, int]", self.report()["refused_by"])
        return {kind: count for kind, count in counts.items() if count}


@asynccontextmanager
async def simulating(behaviour: Behaviour, *, clock: Clock | None = None) -> AsyncGenerator[Client]:
    simulator = Simulator(behaviour, clock=clock) if clock else Simulator(behaviour)
    url = await simulator.start()
    async with httpx.AsyncClient(base_url=url, trust_env=False, timeout=20) as http:
        yield Client(simulator, http)
    await simulator.stop()


def behaving(**changes: object) -> Behaviour:
    quick: dict[str, object] = {"port": 0, "latency_ms": 0, "seed": 1}
    return Behaviour(**{**quick, **changes})  # pyright: ignore[reportArgumentType]


# The limits ---------------------------------------------------------------------------------------


def admitted(limiter: Limiter, clock: Clock, times: Sequence[float], *, tokens: int = 0) -> int:
    count = 0
    for now in times:
        clock.now = now
        count += limiter.admit(input_tokens=tokens) is None
    return count


def test_sliding_admits_exactly_the_limit_in_any_minute() -> None:
    clock = Clock()
    limiter = Limiter(behaving(rpm=3), clock=clock)
    assert admitted(limiter, clock, [600, 610, 620]) == 3
    assert limiter.admit() == Refusal(kind="requests", limit=3, wait_s=40.0)
    assert admitted(limiter, clock, [659.999]) == 0
    assert admitted(limiter, clock, [660, 660]) == 1
    assert admitted(limiter, clock, [669.9, 670, 679.9, 680, 719.9, 720]) == 3


def test_sliding_counts_tokens_and_says_when_they_fit() -> None:
    clock = Clock()
    limiter = Limiter(behaving(tpm=100), clock=clock)
    assert admitted(limiter, clock, [600, 605], tokens=40) == 2
    assert limiter.admit(input_tokens=20) is None
    assert limiter.admit(input_tokens=1) == Refusal(kind="tokens", limit=100, wait_s=55.0)
    assert limiter.admit(input_tokens=50) == Refusal(kind="tokens", limit=100, wait_s=60.0)
    clock.now = 660
    assert limiter.admit(input_tokens=40) is None


def test_fixed_admits_the_limit_in_each_minute_of_the_clock() -> None:
    clock = Clock()
    limiter = Limiter(behaving(rpm=3, algorithm="fixed"), clock=clock)
    assert admitted(limiter, clock, [658, 659, 659.5]) == 3
    assert limiter.admit() == Refusal(kind="requests", limit=3, wait_s=0.5)
    assert admitted(limiter, clock, [660, 660, 660, 660, 719.9]) == 3
    assert admitted(limiter, clock, [720]) == 1


def test_bucket_admits_its_burst_and_then_the_rate() -> None:
    clock = Clock()
    limiter = Limiter(behaving(rpm=60, algorithm="bucket", bucket_seconds=5), clock=clock)
    assert admitted(limiter, clock, [600] * 6) == 5
    assert limiter.admit() == Refusal(kind="requests", limit=60, wait_s=1.0)
    assert admitted(limiter, clock, [600.999, 601, 601, 602, 602.5, 603]) == 3
    assert admitted(limiter, clock, [700] * 6) == 5


def test_bucket_at_its_exact_rate_never_refuses() -> None:
    clock = Clock()
    limiter = Limiter(behaving(rpm=420, algorithm="bucket", bucket_seconds=0.1), clock=clock)
    assert admitted(limiter, clock, [600 + n / 7 for n in range(5000)]) == 5000


def test_a_bucket_of_a_second_spreads_calls_and_tokens_alike() -> None:
    clock = Clock()
    second = {"algorithm": "bucket", "bucket_seconds": 1}
    calls = Limiter(behaving(rpm=120, **second), clock=clock)
    assert admitted(calls, clock, [600, 600, 600, 600.5, 600.5, 603, 603, 603]) == 5
    tokens = Limiter(behaving(tpm=6000, **second), clock=clock)
    assert admitted(tokens, clock, [700, 700, 700, 700.5, 700.5, 703, 703, 703], tokens=50) == 5


def test_a_call_larger_than_the_bucket_leaves_it_in_debt() -> None:
    """A bucket of 64 that gets 64 a second, so that floats are exact."""
    clock = Clock()
    behaviour = behaving(tpm=3840, algorithm="bucket", bucket_seconds=1)
    limiter = Limiter(behaviour, clock=clock)
    assert limiter.admit(input_tokens=1) is None
    # A full bucket is enough, and not less.
    refused = limiter.admit(input_tokens=320)
    assert refused == Refusal(kind="tokens", limit=3840, wait_s=1 / 64)
    clock.now += 1 / 64
    assert limiter.admit(input_tokens=320) is None
    headers = limiter.headers()
    assert headers["x-ratelimit-remaining-tokens"] == "0"
    assert headers["x-ratelimit-reset-tokens"] == "5s"
    refused = limiter.admit(input_tokens=1)
    assert refused == Refusal(kind="tokens", limit=3840, wait_s=4 + 1 / 64)
    assert admitted(limiter, clock, [604, 605, 605 + 1 / 64], tokens=100) == 1
    never = Limiter(behaviour, clock=clock).admit(input_tokens=3841)
    assert never == Refusal(kind="tokens", limit=3840, wait_s=60.0)


def test_a_bucket_in_debt_admits_no_more_than_its_rate() -> None:
    clock = Clock()
    limiter = Limiter(behaving(tpm=6000, algorithm="bucket", bucket_seconds=1), clock=clock)
    times = [600 + n / 10 for n in range(6000)]
    assert admitted(limiter, clock, times, tokens=2000) * 2000 <= 6000 * 10 + 100 + 2000


@pytest.mark.parametrize("algorithm", ["sliding", "fixed", "bucket"])
def test_input_and_output_tokens_are_limited_each(algorithm: str) -> None:
    clock = Clock()
    behaviour = behaving(input_tpm=100, output_tpm=10, algorithm=algorithm)
    limiter = Limiter(behaviour, clock=clock)
    assert limiter.admit(input_tokens=60, output_tokens=5) is None
    for tokens, kind in (((40, 6), "output_tokens"), ((41, 5), "input_tokens")):
        refused = limiter.admit(input_tokens=tokens[0], output_tokens=tokens[1])
        assert refused is not None
        assert refused.kind == kind
    assert limiter.admit(input_tokens=40, output_tokens=5) is None
    headers = limiter.headers()
    assert headers["x-ratelimit-limit-input-tokens"] == "100"
    assert headers["x-ratelimit-remaining-output-tokens"] == "0"


@pytest.mark.parametrize("algorithm", ["sliding", "fixed", "bucket"])
def test_a_day_slides_whatever_the_algorithm(algorithm: str) -> None:
    clock = Clock()
    limiter = Limiter(behaving(rpd=2, algorithm=algorithm), clock=clock)
    assert admitted(limiter, clock, [600, 4200]) == 2
    assert limiter.admit() == Refusal(kind="requests", period="day", limit=2, wait_s=82_800.0)
    assert admitted(limiter, clock, [86_999.9, 87_000, 87_000, 90_599, 90_600]) == 2


@pytest.mark.parametrize(
    ("algorithm", "halved_at", "doubled"),
    # Of 10 a minute 8 came at 600. Halved, 3 too many are counted; doubled, 12 more fit.
    [("sliding", 660.0, 12), ("fixed", 660.0, 12), ("bucket", 648.0, 12)],
)
def test_a_limit_that_changes_keeps_what_was_counted(
    algorithm: str, halved_at: float, doubled: int
) -> None:
    clock = Clock()

    def used() -> Limiter:
        limiter = Limiter(behaving(rpm=10, algorithm=algorithm), clock=clock)
        assert admitted(limiter, clock, [600] * 8) == 8
        return limiter

    limiter = used()
    limiter.change(behaving(rpm=5, algorithm=algorithm))
    refused = limiter.admit()
    assert refused is not None
    assert refused.wait_s == pytest.approx(halved_at - 600)
    assert limiter.headers()["x-ratelimit-remaining-requests"] == "0"
    assert admitted(limiter, clock, [halved_at - 0.1, halved_at + 0.1]) == 1
    limiter = used()
    limiter.change(behaving(rpm=20, algorithm=algorithm))
    assert admitted(limiter, clock, [600] * 30) == doubled


def test_a_bucket_refills_at_the_rate_of_its_time() -> None:
    clock = Clock()
    limiter = Limiter(behaving(rpm=60, algorithm="bucket"), clock=clock)
    assert admitted(limiter, clock, [600] * 60) == 60
    clock.now = 610
    limiter.change(behaving(rpm=600, algorithm="bucket"))
    assert limiter.headers()["x-ratelimit-remaining-requests"] == "550"


def test_another_limit_or_algorithm_counts_from_now() -> None:
    clock = Clock()
    limiter = Limiter(behaving(rpm=2, rpd=3), clock=clock)
    assert admitted(limiter, clock, [600, 600, 600]) == 2
    limiter.change(behaving(rpm=2, rpd=3, bucket_seconds=5))  # of no consequence here
    assert limiter.admit() is not None
    limiter.change(behaving(rpm=2, rpd=3, algorithm="fixed"))
    assert admitted(limiter, clock, [600, 600]) == 1
    limiter.change(behaving(tpm=5))
    assert limiter.admit(input_tokens=5) is None


@pytest.mark.parametrize("algorithm", ["sliding", "fixed", "bucket"])
def test_a_refused_arrival_costs_neither_limit(algorithm: str) -> None:
    clock = Clock()
    limiter = Limiter(behaving(rpm=2, tpm=100, algorithm=algorithm), clock=clock)
    for _ in range(50):
        refused = limiter.admit(input_tokens=101)
        assert refused is not None
        assert refused.kind == "tokens"
        assert 0 < refused.wait_s <= 60
    assert limiter.admit(input_tokens=100) is None
    assert limiter.admit() is None
    assert limiter.admit() is not None


def test_headers_say_what_is_left_as_openai_does() -> None:
    clock = Clock()
    limiter = Limiter(behaving(rpm=3, tpm=1000), clock=clock)
    assert limiter.headers()["x-ratelimit-reset-requests"] == "0ms"
    limiter.admit(input_tokens=400)
    clock.now += 0.5
    assert limiter.headers() == {
        "x-ratelimit-limit-requests": "3",
        "x-ratelimit-remaining-requests": "2",
        "x-ratelimit-reset-requests": "59.5s",
        "x-ratelimit-limit-tokens": "1000",
        "x-ratelimit-remaining-tokens": "600",
        "x-ratelimit-reset-tokens": "59.5s",
    }
    fixed = Limiter(behaving(rpm=3, algorithm="fixed"), clock=clock)
    fixed.admit()
    assert fixed.headers()["x-ratelimit-reset-requests"] == "59.5s"


@pytest.mark.parametrize(
    ("style", "expected"),
    [
        (
            "openai",
            [
                ("requests", "minute", 10, 9, 60.0),
                ("requests", "day", 1000, 999, 86_400.0),
                ("tokens", "minute", 500, 450, 60.0),
                ("input_tokens", "minute", 400, 360, 60.0),
                ("output_tokens", "minute", 100, 90, 60.0),
            ],
        ),
        (
            "anthropic",
            [
                ("requests", "minute", 10, 9, 61.0),
                ("tokens", "minute", 500, 450, 61.0),
                ("input_tokens", "minute", 400, 360, 61.0),
                ("output_tokens", "minute", 100, 90, 61.0),
            ],
        ),
        (
            "groq",
            [
                ("requests", "day", 1000, 999, 86_400.0),
                ("tokens", "minute", 500, 450, 60.0),
                ("input_tokens", "minute", 400, 360, 60.0),
                ("output_tokens", "minute", 100, 90, 60.0),
            ],
        ),
    ],
)
def test_headers_are_understood_in_every_style(style: str, expected: list[object]) -> None:
    """Anthropic's times are whole seconds, never too early: 60.5 s are told as 61."""
    behaviour = behaving(
        rpm=10, rpd=1000, tpm=500, input_tpm=400, output_tpm=100, header_style=style
    )
    limiter = Limiter(behaviour, clock=Clock(), wall=lambda: 784_111_777.5)
    limiter.admit(input_tokens=40, output_tokens=10)
    headers = {"date": "Sun, 06 Nov 1994 08:49:37 GMT", **limiter.headers()}
    assert [
        (limit.kind, limit.period, limit.limit, limit.remaining, limit.reset_s)
        for limit in rate_limits(headers, host="127.0.0.1")
    ] == expected


async def test_over_the_limit_is_429_as_openai_writes_it() -> None:
    clock = Clock()
    async with simulating(behaving(rpm=2), clock=clock) as client:
        assert [(await client.chat()).status_code for _ in range(2)] == [200, 200]
        clock.now += 10.25
        refused = await client.chat()
        assert refused.status_code == 429
        assert refused.json()["error"]["code"] == "rate_limit_exceeded"
        assert refused.json()["error"]["type"] == "requests"
        assert refused.headers["retry-after"] == "50"
        assert refused.headers["retry-after-ms"] == "49750"
        assert refused.headers["x-ratelimit-remaining-requests"] == "0"
        clock.now += 49.75
        assert (await client.chat()).status_code == 200


async def test_too_many_calls_at_once_are_refused_at_once_and_free() -> None:
    async with simulating(behaving(hang_rate=1, max_in_flight=1, rpm=2)) as client:
        hanging = asyncio.create_task(client.chat("a"))
        async with asyncio.timeout(20):
            while client.count("in_flight") == 0:
                await client.http.get("/healthz")
        for _ in range(5):
            refused = await client.chat("b")
            assert refused.status_code == 429
            assert refused.json()["error"]["code"] == "concurrency_limit_exceeded"
            assert "retry-after" not in refused.headers
            assert refused.headers["x-ratelimit-remaining-requests"] == "1"
        hanging.cancel()
        await asyncio.wait([hanging])
        async with asyncio.timeout(20):
            while client.count("in_flight"):
                await client.http.get("/healthz")
        client.simulator.change({"hang_rate": 0})
        assert (await client.chat("b")).status_code == 200
        assert client.refused_by() == {"in_flight": 5}
        assert (client.count("refused"), client.count("peak_in_flight")) == (5, 1)


async def test_the_simulator_can_keep_silent_about_its_limits() -> None:
    async with simulating(behaving(rpm=1, send_headers=False)) as client:
        for status in (200, 429):
            response = await client.chat()
            assert response.status_code == status
            assert not [name for name in response.headers if "ratelimit" in name or "retry" in name]


@pytest.mark.parametrize(("charge", "charged"), [("actual", 20), ("max", 512)])
async def test_tokens_are_charged_on_arrival(charge: str, charged: int) -> None:
    behaviour = behaving(charge=charge, output_tokens=20, output_sigma=0, tpm=100_000)
    async with simulating(behaviour) as client:
        response = await client.chat(max_tokens=512)
        usage = response.json()["usage"]
        assert usage["completion_tokens"] == 20
        assert client.count("peak_tokens_60s") == usage["prompt_tokens"] + charged
        left = int(response.headers["x-ratelimit-remaining-tokens"])
        assert left == 100_000 - usage["prompt_tokens"] - charged


# Answers ------------------------------------------------------------------------------------------


def request_for(path: str) -> dict[str, object]:
    match path:
        case "/v1/chat/completions":
            return {"messages": [{"role": "user", "content": "the question"}]}
        case "/v1/completions":
            return {"prompt": "the question"}
        case _:
            return {"input": ["the question", "another"]}


@pytest.mark.parametrize("path", PATHS)
async def test_every_answer_says_that_it_is_simulated(path: str) -> None:
    async with simulating(behaving()) as client:
        response = await client.http.post(path, json={"model": "m", **request_for(path)})
        assert response.status_code == 200
        assert response.headers["x-sluice-simulated"] == "true"
        assert response.headers["x-request-id"].startswith("req_")
        body = response.json()
        assert (body["model"], body["system_fingerprint"]) == ("m", "sluice-simulator")
        match path:
            case "/v1/chat/completions":
                text = body["choices"][0]["message"]["content"]
            case "/v1/completions":
                text = body["choices"][0]["text"]
            case "/v1/responses":
                text = body["output"][0]["content"][0]["text"]
            case _:
                assert len(body.get("data") or body["results"]) == 2
                return
        assert text.startswith("[simulated] ")
        assert "the question" in text


async def test_the_last_message_of_the_user_is_echoed() -> None:
    parts = [{"type": "text", "text": "look"}, {"type": "image_url", "image_url": {"url": "x"}}]
    messages: list[dict[str, object]] = [
        {"role": "user", "content": "first"},
        {"role": "user", "content": parts},
        {"role": "assistant", "content": None, "tool_calls": []},
    ]
    async with simulating(behaving()) as client:
        response = await client.http.post(PATHS[0], json={"model": "m", "messages": messages})
        text = response.json()["choices"][0]["message"]["content"]
        assert text.startswith("[simulated] You said: look")


async def test_answers_repeat_with_the_seed_whatever_the_order() -> None:
    async def answers(order: Sequence[int], seed: int | None) -> dict[int, object]:
        behaviour = behaving(seed=seed, error_rate=0.3)
        async with simulating(behaviour) as client:
            found: dict[int, object] = {}
            for n in order:
                response = await client.chat(f"question {n}")
                found[n] = (response.status_code, response.json().get("usage"))
            return found

    forth = await answers(range(30), 7)
    assert await answers(range(29, -1, -1), 7) == forth
    assert await answers(range(30), 8) != forth
    assert await answers(range(30), None) != forth


@pytest.mark.parametrize(
    ("path", "limit"),
    [
        (PATHS[0], "max_tokens"),
        (PATHS[0], "max_completion_tokens"),
        (PATHS[1], "max_output_tokens"),
        (PATHS[3], "max_tokens"),
    ],
)
async def test_output_is_bounded_by_what_was_asked(path: str, limit: str) -> None:
    async with simulating(behaving(output_tokens=500)) as client:
        body = {"model": "m", **request_for(path), limit: 3}
        answer = (await client.http.post(path, json=body)).json()
        usage = answer["usage"]
        assert usage.get("completion_tokens", usage.get("output_tokens")) == 3
        assert answer.get("status", "length") in {"length", "incomplete"}


async def test_embeddings_have_the_asked_form() -> None:
    async with simulating(behaving()) as client:
        body = {"model": "m", "input": "x", "dimensions": 5}
        plain = (await client.http.post(PATHS[2], json=body)).json()["data"][0]["embedding"]
        assert sum(part * part for part in plain) == pytest.approx(1)
        body = {**body, "encoding_format": "base64"}
        coded = (await client.http.post(PATHS[2], json=body)).json()["data"][0]["embedding"]
        assert len(struct.unpack("<5f", base64.b64decode(coded))) == len(plain) == 5


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"[]",
        b"{",
        b'{"model":"m"}',
        b'{"messages":[]}',
        b'{"model":"m","messages":7}',
        b'{"model":"m","messages":[],"max_tokens":"x"}',
        b'{"model":"m","messages":[],"stream":true}',
    ],
)
async def test_what_is_no_request_is_400_and_free(body: bytes) -> None:
    async with simulating(behaving(rpm=1)) as client:
        response = await client.http.post(PATHS[0], content=body)
        assert response.status_code == 400
        assert response.json()["error"]["type"] == "invalid_request_error"
        assert (client.count("invalid"), client.count("accepted")) == (1, 0)
        assert (await client.chat()).status_code == 200


async def test_a_key_can_be_required() -> None:
    async with simulating(behaving(require_key="k")) as client:
        assert (await client.chat()).status_code == 401
        client.http.headers["authorization"] = "Bearer wrong"
        assert (await client.chat()).json()["error"]["code"] == "invalid_api_key"
        client.http.headers["authorization"] = "Bearer k"
        assert (await client.chat()).status_code == 200
        assert client.count("unauthorized") == 2


# Faults -------------------------------------------------------------------------------------------


async def test_injected_errors_have_openais_shape() -> None:
    async with simulating(behaving(error_rate=1)) as client:
        response = await client.chat()
        assert response.status_code == 500
        assert response.json()["error"]["type"] == "server_error"
        assert cast("dict[str, int]", client.report()["faults"])["error"] == 1


async def test_random_throttling_says_when_to_come_back() -> None:
    async with simulating(behaving(throttle_rate=1)) as client:
        response = await client.chat()
        assert (response.status_code, response.headers["retry-after"]) == (429, "1")
        assert (client.count("accepted"), client.count("refused")) == (1, 0)


async def test_garbage_is_no_json() -> None:
    async with simulating(behaving(garbage_rate=1)) as client:
        texts: list[str] = []
        for n in range(20):
            response = await client.chat(n)
            assert response.status_code == 200
            with pytest.raises(json.JSONDecodeError):
                response.json()
            texts.append(response.text)
        assert {text[0] for text in texts} == {"<", "{"}


async def test_a_cut_comes_in_the_middle_of_the_body() -> None:
    async with simulating(behaving(cut_rate=1)) as client:
        with pytest.raises(httpx.RemoteProtocolError, match="complete message body"):
            await client.chat()
        assert client.count("answered") == 0
        assert client.count("in_flight") == 0


async def test_a_hanging_call_is_in_flight_until_its_client_leaves() -> None:
    async with simulating(behaving(hang_rate=1)) as client:
        with pytest.raises(httpx.ReadTimeout):
            await client.http.post(
                PATHS[0], json={"model": "m", "messages": []}, timeout=httpx.Timeout(5, read=0.05)
            )
        assert client.count("peak_in_flight") == 1
        async with asyncio.timeout(20):
            while client.count("abandoned") == 0:
                await client.http.get("/healthz")
        assert client.count("in_flight") == 0


async def test_a_hanging_call_is_dropped_in_the_end() -> None:
    async with simulating(behaving(hang_rate=1, hang_s=0.01)) as client:
        with pytest.raises(httpx.RemoteProtocolError):
            await client.chat()


async def test_a_trickle_arrives_byte_by_byte(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(simulator_module, "TRICKLE_S", 0.0)
    async with simulating(behaving(trickle_rate=1)) as client:
        body: dict[str, object] = {"model": "m", "messages": []}
        async with client.http.stream("POST", PATHS[0], json=body) as response:
            chunks = [chunk async for chunk in response.aiter_raw()]
        assert json.loads(b"".join(chunks))["object"] == "chat.completion"
        assert len(chunks) > 10
        assert client.count("answered") == 1


async def test_faults_come_in_their_share() -> None:
    rates = {"error_rate": 0.25, "throttle_rate": 0.25, "garbage_rate": 0.25}
    async with simulating(behaving(**rates)) as client:
        for n in range(400):
            await client.chat(n)
        faults = cast("dict[str, int]", client.report()["faults"])
        assert all(60 < faults[name] < 140 for name in ("error", "throttle", "garbage"))
        assert client.count("answered") == 400 - sum(faults.values())


# The report ---------------------------------------------------------------------------------------


async def test_the_report_counts_calls_and_peaks() -> None:
    clock = Clock()
    async with simulating(behaving(rpm=3), clock=clock) as client:
        for now in (600, 600.5, 602, 603, 604, 655, 661, 662):
            clock.now = now
            await client.chat(now)
        clock.now = 670
        report = (await client.http.get("/report")).json()
    assert report["received"] == 8
    assert report["accepted"] == report["answered"] == 5
    assert report["refused"] == 3
    assert report["peak_calls_60s"] == 3
    assert report["over_limit"] == 3
    assert report["seconds"] == 70
    seconds = report["accepted_per_second"]
    assert {n: count for n, count in enumerate(seconds) if count} == {0: 2, 2: 1, 61: 1, 62: 1}
    assert report["called_twice"] == report["answered_twice"] == 0
    assert report["input_tokens"] > 0
    assert report["output_tokens"] > 0


async def test_the_report_has_every_second() -> None:
    clock = Clock()
    behaviour = behaving(rpm=2, output_tokens=20, output_sigma=0)
    async with simulating(behaviour, clock=clock) as client:
        for now in (600, 600.5, 602, 603.9, 664):
            clock.now = now
            await client.chat(now)
        report = (await client.http.get("/report")).json()
    calls, refused = report["accepted_per_second"], report["refused_per_second"]
    tokens = report["accepted_tokens_per_second"]
    assert len(calls) == len(refused) == len(tokens) == 65
    assert {n: count for n, count in enumerate(calls) if count} == {0: 2, 64: 1}
    assert {n: count for n, count in enumerate(refused) if count} == {2: 1, 3: 1}
    assert [n for n, count in enumerate(tokens) if count] == [0, 64]
    charged = report["accepted_input_tokens"] + report["accepted_output_tokens"]
    assert (report["accepted_output_tokens"], sum(tokens)) == (60, charged)


async def test_seconds_are_kept_in_bounded_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(simulator_report, "MOST_SECONDS", 2)
    clock = Clock()
    async with simulating(behaving(rpm=1), clock=clock) as client:
        for now in (601, 602, 700, 701):
            clock.now = now
            await client.chat(now)
        report = client.report()
    assert (report["accepted_per_second"], report["refused_per_second"]) == ([0, 1], [0, 0])
    assert (report["accepted"], report["refused"]) == (2, 2)


@pytest.mark.parametrize(
    ("changes", "kind", "refused"),
    [
        ({"rpm": 1}, "requests", 1),
        ({"rpd": 1}, "requests", 1),
        ({"tpm": 50}, "tokens", 1),
        ({"input_tpm": 20}, "input_tokens", 1),
        ({"output_tpm": 25}, "output_tokens", 1),
        ({"throttle_rate": 1}, "random", 0),
    ],
)
async def test_refusals_are_counted_by_what_refused(
    changes: dict[str, object], kind: str, refused: int
) -> None:
    behaviour = behaving(output_tokens=20, output_sigma=0, **changes)
    async with simulating(behaviour) as client:
        await client.chat()
        if refused:
            text = (await client.chat()).json()["error"]["message"]
            per = "day" if "rpd" in changes else "min"
            assert text.startswith(f"Rate limit reached on {kind.replace('_', ' ')} per {per}: ")
        assert client.refused_by() == {kind: 1}
        assert client.count("refused") == refused


async def test_bodies_that_come_again_are_counted_once_each() -> None:
    async with simulating(behaving()) as client:
        for n, times in ((1, 1), (2, 2), (3, 20)):
            for _ in range(times):
                await client.chat(n)
        assert client.count("called_twice") == 2
        assert client.count("answered_twice") == 2


async def test_a_refused_or_failed_call_may_come_again() -> None:
    clock = Clock()
    async with simulating(behaving(rpm=1), clock=clock) as client:
        for now in (600, 601, 661, 662):
            clock.now = now
            await client.chat("a" if now == 600 else "b")
        assert (client.count("called_twice"), client.count("answered_twice")) == (0, 0)
        client.simulator.change({"rpm": None, "error_rate": 1})
        await client.chat("c")
        client.simulator.change({"error_rate": 0})
        await client.chat("c")
        assert (client.count("called_twice"), client.count("answered_twice")) == (1, 0)


async def test_bodies_are_tracked_in_bounded_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(simulator_report, "MOST_BODIES", 2)
    async with simulating(behaving()) as client:
        for n in (1, 2, 3, 3, 1):
            await client.chat(n)
        assert (client.count("called_twice"), client.count("bodies_untracked")) == (1, 2)


async def test_reset_begins_again() -> None:
    async with simulating(behaving(rpm=1)) as client:
        assert [(await client.chat()).status_code for _ in range(2)] == [200, 429]
        assert (await client.http.post("/reset")).status_code == 200
        assert client.count("received") == 0
        assert (await client.chat()).status_code == 200


async def test_the_behaviour_changes_while_running() -> None:
    async with simulating(behaving(require_key="k", rpm=10)) as client:
        client.http.headers["authorization"] = "Bearer k"
        await client.chat()
        shown = (await client.http.post("/behaviour", json={"error_rate": 1, "rpm": 2})).json()
        assert (shown["error_rate"], shown["rpm"], shown["require_key"]) == (1, 2, None)
        # The call before the change still counts.
        assert [(await client.chat()).status_code for _ in range(2)] == [500, 429]


@pytest.mark.parametrize(
    "changes",
    [
        b"[]",
        b"{",
        b'{"port":1}',
        b'{"seed":1}',
        b'{"speed":1}',
        b'{"rpm":"many"}',
        b'{"rpm":0}',
        b'{"error_rate":0.6,"hang_rate":0.6}',
        b'{"latency_ms":-1}',
        b'{"bucket_seconds":0}',
        b'{"max_in_flight":0}',
        b'{"header_style":"mine"}',
    ],
)
async def test_a_wrong_behaviour_changes_nothing(changes: bytes) -> None:
    async with simulating(behaving(rpm=1)) as client:
        before = client.simulator.behaviour
        assert (await client.http.post("/behaviour", content=changes)).status_code == 400
        assert client.simulator.behaviour == before


async def test_other_routes() -> None:
    async with simulating(behaving()) as client:
        assert (await client.http.get("/healthz")).json()["status"] == "ok"
        assert (await client.http.get("/v1/models")).json()["object"] == "list"
        assert (await client.http.get("/nowhere")).status_code == 404
        assert (await client.http.get(PATHS[0])).status_code == 404


# The server ---------------------------------------------------------------------------------------


async def test_500_calls_can_be_in_flight_together() -> None:
    async with simulating(behaving(hang_rate=1)) as client:
        body = b'{"model":"m","messages":[]}'
        request = b"POST /v1/chat/completions HTTP/1.1\r\ncontent-length: %d\r\n\r\n%b"
        writers: list[asyncio.StreamWriter] = []
        for _ in range(500):
            _, writer = await asyncio.open_connection("127.0.0.1", client.http.base_url.port)
            writer.write(request % (len(body), body))
            writers.append(writer)
        async with asyncio.timeout(20):
            while client.count("in_flight") < 500:
                await client.http.get("/healthz")
        for writer in writers:
            writer.close()
        async with asyncio.timeout(20):
            while client.count("in_flight"):
                await client.http.get("/healthz")
        assert (client.count("peak_in_flight"), client.count("abandoned")) == (500, 500)


async def test_a_second_request_before_the_first_answer_is_cut_off() -> None:
    async with simulating(behaving(hang_rate=1)) as client:
        reader, writer = await asyncio.open_connection("127.0.0.1", client.http.base_url.port)
        body = b'{"model":"m","messages":[]}'
        once = b"POST /v1/chat/completions HTTP/1.1\r\ncontent-length: %d\r\n\r\n%b"
        writer.write(once % (len(body), body) * 2)
        try:
            assert await reader.read() == b""
        except ConnectionResetError:
            pass
        finally:
            writer.close()


async def test_a_taken_port_is_a_sentence() -> None:
    async with simulating(behaving()) as client:
        port = client.http.base_url.port
        with pytest.raises(UsageError, match=f"cannot listen on 127.0.0.1:{port}"):
            await Simulator(behaving(port=port)).start()


async def test_simulate_runs_until_cancelled() -> None:
    ready: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    task = asyncio.create_task(simulate(behaving(), on_ready=lambda _, url: ready.set_result(url)))
    url = await asyncio.wait_for(ready, 20)
    async with httpx.AsyncClient(trust_env=False) as http:
        assert (await http.get(f"{url}/healthz")).status_code == 200
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    async with httpx.AsyncClient(trust_env=False) as http:
        with pytest.raises(httpx.ConnectError):
            await http.get(f"{url}/healthz")
