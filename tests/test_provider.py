"""The provider against real sockets: what is sent, and one test per line of the outcome table."""

import asyncio
import dataclasses
import gzip
import ipaddress
import json
import ssl
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from app import http1
from app import provider as provider_module
from app.provider import (
    Answered,
    Call,
    Endpoint,
    Outcome,
    Provider,
    Rejected,
    Throttled,
    Unreachable,
    Usage,
    usage,
)

KEY = "sk-very-secret-0123456789"
CHAT = (
    b'{"id":"x","model":"m-2","choices":[],"usage":{"prompt_tokens":7,"completion_tokens":5,'
    b'"prompt_tokens_details":{"cached_tokens":3},"completion_tokens_details":{"reasoning_tokens":2}}}'
)
DEADLINE_S = 20.0


class Server:
    """A loopback server that answers every request with what the test says."""

    def __init__(self) -> None:
        self.url = ""
        self.heads: list[str] = []
        self.bodies: list[bytes] = []
        self.connections = 0
        self.open = 0
        self.changed = asyncio.Condition()

    @property
    def headers(self) -> dict[str, str]:
        """The last request's headers."""
        lines = self.heads[-1].split("\r\n")[1:]
        return {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait until connections or requests are as expected."""
        async with asyncio.timeout(DEADLINE_S), self.changed:
            await self.changed.wait_for(condition)

    async def _notify(self) -> None:
        async with self.changed:
            self.changed.notify_all()

    async def serve(
        self,
        answer: bytes | Callable[[asyncio.StreamWriter], Awaitable[None]],
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> None:
        self.connections += 1
        self.open += 1
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").strip()
                self.heads.append(head)
                self.bodies.append(await reader.readexactly(int(self.headers["content-length"])))
                await self._notify()
                if isinstance(answer, bytes):
                    writer.write(answer)
                else:
                    await self._unless_gone(answer(writer), reader)
                    if writer.is_closing() or reader.at_eof() or reader.exception():
                        return
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            self.open -= 1
            writer.close()
            await self._notify()

    @staticmethod
    async def _unless_gone(work: Awaitable[None], reader: asyncio.StreamReader) -> None:
        """Answer until done or until the client closes: it sends nothing while it waits."""
        written, gone = asyncio.ensure_future(work), asyncio.ensure_future(reader.read(1))
        try:
            await asyncio.wait({written, gone}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            written.cancel()
            gone.cancel()
            await asyncio.gather(written, gone, return_exceptions=True)


@asynccontextmanager
async def serving(
    answer: bytes | Callable[[asyncio.StreamWriter], Awaitable[None]],
    *,
    tls: ssl.SSLContext | None = None,
) -> AsyncGenerator[Server]:
    server = Server()
    tasks: set[asyncio.Task[None]] = set()

    def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.ensure_future(server.serve(answer, reader, writer))
        tasks.add(task)
        task.add_done_callback(tasks.discard)

    listening = await asyncio.start_server(accept, "127.0.0.1", 0, ssl=tls)
    port = listening.sockets[0].getsockname()[1]
    server.url = f"{'https' if tls else 'http'}://127.0.0.1:{port}"
    try:
        yield server
    finally:
        listening.close()
        for task in list(tasks):
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def response(status: int, body: bytes, **headers: str) -> bytes:
    told = "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in headers.items())
    head = f"HTTP/1.1 {status} Whatever\r\ncontent-length: {len(body)}\r\n{told}\r\n"
    return head.encode() + body


def call_to(url: str, **changes: object) -> Call:
    call = Call(
        base_url=url,
        endpoint=Endpoint.chat_completions,
        model="m-1",
        body=b'{"messages":[]}',
        timeout_s=DEADLINE_S,
        api_key=KEY,
    )
    return dataclasses.replace(call, **changes)


async def outcome_of(answer: bytes, **changes: object) -> Outcome:
    async with serving(answer) as server, Provider(max_response_bytes=1000) as provider:
        return await provider.call(call_to(server.url, **changes))


def error(message: str, code: str | None = None, kind: str = "some_error") -> bytes:
    return json.dumps({"error": {"message": message, "type": kind, "code": code}}).encode()


# What is sent -------------------------------------------------------------------------------------


async def sent_body(body: bytes, **changes: object) -> bytes:
    async with serving(response(200, CHAT)) as server, Provider() as provider:
        outcome = await provider.call(call_to(server.url, body=body, **changes))
        assert isinstance(outcome, Answered), outcome
        return server.bodies[0]


async def test_everything_but_model_and_stream_is_sent_byte_for_byte() -> None:
    body = (
        rb'{"max_tokens":5,"model":"other", "stream":true,"stream_options":{"include_usage":true},'
        rb'"tool_calls": [ {"b":1.50 ,"a":"\u0000 \u00e9 \\ud800"} ],"seed":12345678901234567890123}'
    )
    assert await sent_body(body) == (
        rb'{"max_tokens":5,"model":"m-1",'
        rb'"tool_calls":[ {"b":1.50 ,"a":"\u0000 \u00e9 \\ud800"} ],"seed":12345678901234567890123}'
    )


@pytest.mark.parametrize(
    "value",
    [rb'"\ud800"', rb'["\udfff\u0000",{"x":1e999}]', b'{ "deep":"\\ud83d" }', b"1" * 5000],
)
async def test_lone_surrogates_and_long_numbers_pass_untouched(value: bytes) -> None:
    sent = await sent_body(rb'{ "messages" : %b , "s":"\ud800", "stream" : false }' % value)
    assert sent == rb'{"messages":%b,"s":"\ud800","model":"m-1"}' % value


async def test_a_key_that_is_a_lone_surrogate_is_sent_as_an_escape() -> None:
    assert await sent_body(rb'{"\ud800":1}') == rb'{"\ud800":1,"model":"m-1"}'


async def test_default_args_count_where_the_body_has_none() -> None:
    sent = await sent_body(b'{"top_p":1}', default_args=b'{"top_p":2,"user":"u","stream":true}')
    assert json.loads(sent) == {"top_p": 1, "user": "u", "model": "m-1"}


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"[]",
        b'"x"',
        b"{",
        b'{"a":1,}',
        b'{"a"}',
        b'{"a":1 "b":2}',
        b'{"a":NaN}',
        b'{"a":"\xff"}',
        b'{"a":1}{}',
        rb'{"s":"\ud800",}',
        rb'{"s":"\ud800"} x',
        rb'{"s":"\ud800","n":NaN}',
        rb'{,"s":"\ud800"}',
        b'{"a":' + b"[" * 100_000,
    ],
)
async def test_a_body_that_is_no_json_object_is_rejected_unsent(body: bytes) -> None:
    async with serving(response(200, CHAT)) as server, Provider() as provider:
        outcome = await provider.call(call_to(server.url, body=body))
        assert isinstance(outcome, Rejected)
        assert (outcome.code, outcome.status_code) == ("bad_request_body", None)
        assert server.connections == 0


async def test_headers_carry_key_and_idempotency_key_but_cannot_reframe_the_message() -> None:
    async with serving(response(200, CHAT)) as server, Provider() as provider:
        headers = {
            "X-Team": "é",
            "Content-Length": "3",
            "Transfer-Encoding": "chunked",
            "Host": "elsewhere",
            "User-Agent": "mine",
        }
        await provider.call(call_to(server.url, headers=headers, idempotency_key="item-1"))
        sent = server.headers
    assert sent["authorization"] == f"Bearer {KEY}"
    assert sent["idempotency-key"] == "item-1"
    assert (sent["x-team"], sent["user-agent"]) == ("é", "mine")
    assert sent["content-length"] == str(len(server.bodies[0]))
    assert sent["host"] == server.url.removeprefix("http://")
    assert "transfer-encoding" not in sent


async def test_a_header_of_the_caller_replaces_the_key() -> None:
    async with serving(response(200, CHAT)) as server, Provider() as provider:
        await provider.call(call_to(server.url, headers={"Authorization": "Basic abc"}))
        await provider.call(call_to(server.url, api_key=None))
    assert "authorization: Basic abc" in server.heads[0]
    assert "authorization" not in server.headers


@pytest.mark.parametrize(
    "changes",
    [
        {"api_key": "sk-with\nnewline"},
        {"api_key": "sk-\N{EN DASH}dash"},
        {"headers": {"x-a": "1\r\nx-b: 2"}},
        {"headers": {"x a": "1"}},
        {"idempotency_key": "a\x00b"},
    ],
)
async def test_what_http_cannot_carry_is_rejected_unsent(changes: dict[str, object]) -> None:
    outcome = await outcome_of(response(200, CHAT), **changes)
    assert isinstance(outcome, Rejected)
    assert outcome.code == "bad_header"
    assert "sk-" not in outcome.message


@pytest.mark.parametrize(
    ("base", "path"),
    [
        ("", "/v1/chat/completions"),
        ("/", "/v1/chat/completions"),
        ("/v1", "/v1/chat/completions"),
        ("/v1/", "/v1/chat/completions"),
        ("/openai/v1/", "/openai/v1/chat/completions"),
        ("/v1beta/openai", "/v1beta/openai/chat/completions"),
        ("/api/v3", "/api/v3/chat/completions"),
        ("/gateway", "/gateway/v1/chat/completions"),
        ("/a b/ü/v1?api-version=1 2", "/a%20b/%C3%BC/v1/chat/completions?api-version=1%202"),
    ],
)
async def test_a_base_url_may_end_in_a_version_or_not(base: str, path: str) -> None:
    async with serving(response(200, CHAT)) as server, Provider() as provider:
        await provider.call(call_to(server.url + base))
    assert server.heads[0].startswith(f"POST {path} HTTP/1.1\r\n")


@pytest.mark.parametrize(
    "url",
    [
        "",
        "localhost:80",
        "ftp://host",
        "http://",
        "http://a b",
        "http://[::1",
        "http://h:99999",
        f"https://user:{KEY}@host",
    ],
)
async def test_a_base_url_that_is_none_is_rejected(url: str) -> None:
    async with Provider() as provider:
        outcome = await provider.call(call_to(url))
    assert isinstance(outcome, Rejected)
    assert outcome.code == "bad_url"
    assert KEY not in repr(outcome)


# Answered -----------------------------------------------------------------------------------------


async def test_an_answer_is_kept_verbatim_with_usage_model_and_request_id() -> None:
    answer = response(
        200, CHAT, X_Request_Id="req_1", X_RateLimit_Remaining_Tokens="9", Set_Cookie="c"
    )
    outcome = await outcome_of(answer)
    assert isinstance(outcome, Answered)
    assert outcome.body == CHAT
    assert outcome.usage == Usage(
        input_tokens=7, output_tokens=5, cached_tokens=3, reasoning_tokens=2
    )
    assert (outcome.model, outcome.request_id) == ("m-2", "req_1")
    assert outcome.headers == {"x-request-id": "req_1", "x-ratelimit-remaining-tokens": "9"}
    assert outcome.latency_ms >= 0


@pytest.mark.parametrize(
    "body",
    [rb'{"model":"m","text":"\ud800 \u0000"}', b'{"error":null}', b'{"model":7,"usage":"much"}'],
)
async def test_odd_but_valid_answers_are_answers(body: bytes) -> None:
    outcome = await outcome_of(response(200, body))
    assert isinstance(outcome, Answered)
    assert outcome.body == body
    assert outcome.usage is None


async def test_an_answer_may_be_chunked_follow_an_interim_response_or_end_with_its_connection() -> (
    None
):
    async def until_closed(writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.0 200 OK\r\n\r\n" + CHAT)
        writer.close()

    half = len(CHAT) // 2
    chunked = (
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n%x\r\n%b\r\n%x\r\n%b\r\n0\r\n\r\n"
    )
    chunks = chunked % (half, CHAT[:half], len(CHAT) - half, CHAT[half:])
    early = b"HTTP/1.1 103 Early Hints\r\nx-request-id: wrong\r\n\r\n" + response(200, CHAT)
    for answer in (chunks, early, until_closed):
        async with serving(answer) as server, Provider() as provider:
            outcome = await provider.call(call_to(server.url))
            assert isinstance(outcome, Answered), outcome
            assert (outcome.body, outcome.request_id) == (CHAT, None)


async def test_compression_that_was_not_asked_for_is_undone_within_the_bound() -> None:
    outcome = await outcome_of(response(200, gzip.compress(CHAT), Content_Encoding="gzip"))
    assert isinstance(outcome, Answered)
    assert outcome.body == CHAT
    bomb = gzip.compress(b"{" + b" " * 100_000 + b"}")
    outcome = await outcome_of(response(200, bomb, Content_Encoding="gzip"))
    assert isinstance(outcome, Rejected)
    assert outcome.code == "response_too_large"


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (b'{"prompt_tokens":4,"total_tokens":4}', Usage(input_tokens=4, output_tokens=0)),
        (
            (
                b'{"input_tokens":4,"output_tokens":2,"input_tokens_details":{"cached_tokens":1},'
                b'"output_tokens_details":{"reasoning_tokens":2}}'
            ),
            Usage(input_tokens=4, output_tokens=2, cached_tokens=1, reasoning_tokens=2),
        ),
        (
            b'{"prompt_tokens":4,"completion_tokens":2,"prompt_tokens_details":null,"cost":0.1}',
            Usage(input_tokens=4, output_tokens=2),
        ),
        (b"null", None),
        (b"{}", None),
        (b'{"prompt_tokens":-1}', None),
        (b'{"prompt_tokens":"4"}', None),
        (b'{"prompt_tokens":99999999999}', None),
        (b"[]", None),
        (b"{", None),
    ],
)
def test_usage_is_read_or_none(given: bytes, expected: Usage | None) -> None:
    assert usage(given) == expected


# Rejected -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "code"),
    [
        (400, "bad_request"),
        (401, "unauthorized"),
        (402, "payment_required"),
        (403, "forbidden"),
        (404, "not_found"),
        (405, "not_found"),
        (413, "request_too_large"),
        (415, "bad_request"),
        (418, "rejected"),
        (422, "unprocessable"),
        (501, "rejected"),
        (505, "rejected"),
    ],
)
async def test_refusals_are_final_and_quote_the_provider(status: int, code: str) -> None:
    body = error(f"no, {KEY}, never\u0000 " + "x" * 600)
    outcome = await outcome_of(response(status, body, request_id="r"))
    assert isinstance(outcome, Rejected)
    assert (outcome.status_code, outcome.code, outcome.request_id) == (status, code, "r")
    ours, _, quoted = outcome.message.partition(" It says: ")
    assert ours.endswith(".")
    assert quoted.startswith("no, [key], never")
    assert "\x00" not in quoted
    assert len(quoted) <= 500
    assert outcome.body == body.replace(KEY.encode(), b"[key]")


async def test_a_refused_key_is_said_to_be_refused() -> None:
    outcome = await outcome_of(response(401, b"nothing"))
    assert isinstance(outcome, Rejected)
    assert outcome.message == "The provider refused the key."
    assert outcome.body is None


@pytest.mark.parametrize(
    "body", [b'{"error":"because"}', b'{"message":"because"}', b'{"detail":"because"}']
)
async def test_other_shapes_of_errors_are_understood(body: bytes) -> None:
    outcome = await outcome_of(response(400, body))
    assert isinstance(outcome, Rejected)
    assert outcome.message == "The provider refused the request. It says: because"


@pytest.mark.parametrize("status", [301, 302, 307, 308])
async def test_redirects_are_not_followed(status: int) -> None:
    async with serving(response(status, b"", Location="/v1/elsewhere")) as server:
        async with Provider() as provider:
            outcome = await provider.call(call_to(server.url))
        assert isinstance(outcome, Rejected)
        assert outcome.code == "redirect"
        assert len(server.heads) == 1


async def test_an_answer_over_the_bound_is_rejected_because_it_was_paid() -> None:
    declared = b"HTTP/1.1 200 OK\r\nx-request-id: r\r\ncontent-length: 1001\r\n\r\n"
    undeclared = (
        b"HTTP/1.1 200 OK\r\nx-request-id: r\r\ntransfer-encoding: chunked\r\n\r\n"
        + b"1f4\r\n%b\r\n" % (b" " * 500) * 3
    )
    for answer in (declared, undeclared):
        outcome = await outcome_of(answer)
        assert isinstance(outcome, Rejected)
        assert (outcome.code, outcome.status_code) == ("response_too_large", 200)
        assert outcome.request_id == "r"
    assert isinstance(await outcome_of(response(200, b"{%998b}" % b"")), Answered)


async def test_an_error_over_the_bound_is_judged_by_its_status() -> None:
    outcome = await outcome_of(response(500, b"x" * 1001))
    assert isinstance(outcome, Unreachable)
    assert (outcome.code, outcome.status_code) == ("server_error", 500)


# Throttled ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "body", "headers", "code", "wait_s"),
    [
        (429, error("slow"), {}, "rate_limited", None),
        (429, b"slow", {"Retry_After": "7"}, "rate_limited", 7.0),
        (429, error("pay", "insufficient_quota"), {}, "insufficient_quota", 60.0),
        (429, error("pay", None, "insufficient_quota"), {}, "insufficient_quota", 60.0),
        (
            429,
            error("pay", "insufficient_quota"),
            {"retry_after": "5"},
            "insufficient_quota",
            5.0,
        ),
        (429, error("slow", "concurrency_limit_exceeded"), {}, "concurrency_limited", None),
        (429, error("slow", None, "too_many_parallel_requests"), {}, "concurrency_limited", None),
        (429, error("Too many concurrent requests"), {}, "concurrency_limited", None),
        (429, b'{"message":"max parallel requests: 5"}', {}, "concurrency_limited", None),
        (429, b'{"error":"Concurrency is 5"}', {"Retry_After": "2"}, "concurrency_limited", 2.0),
        (429, error("concurrent", "insufficient_quota"), {}, "insufficient_quota", 60.0),
        (
            429,
            error("Too many concurrent requests"),
            {"x_ratelimit_remaining_tokens": "9", "x_ratelimit_reset_tokens": "50s"},
            "concurrency_limited",
            None,
        ),
        (503, error("Too many concurrent requests"), {"Retry_After": "3"}, "overloaded", 3.0),
        (529, error("busy"), {}, "overloaded", None),
        (503, error("busy"), {"Retry_After": "3"}, "overloaded", 3.0),
        (503, error("busy", None, "overloaded_error"), {}, "overloaded", None),
    ],
)
async def test_throttling_says_when_to_come_back(
    status: int, body: bytes, headers: dict[str, str], code: str, wait_s: float | None
) -> None:
    outcome = await outcome_of(response(status, body, **headers))
    assert isinstance(outcome, Throttled)
    assert (outcome.status_code, outcome.code) == (status, code)
    assert outcome.retry_after_s == wait_s


@pytest.mark.parametrize("status", [200, 400, 429, 500])
async def test_every_complete_reply_says_what_it_states_of_limits(status: int) -> None:
    headers = {"x_ratelimit_limit_requests": "500", "x_ratelimit_remaining_requests": "499"}
    outcome = await outcome_of(response(status, CHAT, **headers))
    [limit] = outcome.rate_limits
    assert (limit.kind, limit.period, limit.limit) == ("requests", "minute", 500)
    assert (limit.remaining, limit.reset_s) == (499, None)


# Unreachable --------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [408, 409, 425, 500, 502, 503, 504, 507, 520, 524, 527])
async def test_server_errors_are_worth_a_retry(status: int) -> None:
    headers = {} if status == 503 else {"retry_after": "4"}
    outcome = await outcome_of(response(status, error("sorry"), x_request_id="r", **headers))
    assert isinstance(outcome, Unreachable)
    assert (outcome.code, outcome.status_code) == ("server_error", status)
    assert outcome.sent
    assert outcome.request_id == "r"
    assert outcome.retry_after_s == (None if status == 503 else 4.0)


@pytest.mark.parametrize(
    "answer",
    [
        response(200, b"<html>"),
        response(200, b""),
        response(200, CHAT[:-1]),
        response(200, b"[]"),
        response(200, b'{"a":"\xff"}'),
        response(200, error("oops")),
        response(200, b'{"error":"oops"}'),
        response(200, CHAT, Content_Encoding="br"),
        response(200, CHAT, Content_Encoding="gzip"),
        response(204, b""),
        b"HTTP/1.1 101 Switching Protocols\r\nupgrade: x\r\nconnection: upgrade\r\n\r\nhello",
        b"SSH-2.0-OpenSSH_9\r\n",
        b"HTTP/1.1 200 OK\r\ncontent-length: nine\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nx: " + b"x" * 600_000,
    ],
)
async def test_what_is_no_answer_is_garbage(answer: bytes) -> None:
    outcome = await outcome_of(answer)
    assert isinstance(outcome, Unreachable)
    assert outcome.code == "garbage"
    assert outcome.sent


@pytest.mark.parametrize(
    ("written", "status"),
    [
        (b"", None),
        (b"HTTP/1.1 200 OK\r\ncontent-le", None),
        (b'HTTP/1.1 200 OK\r\nx-request-id: r\r\ncontent-length: 100\r\n\r\n{"a"', 200),
        (b'HTTP/1.1 200 OK\r\nx-request-id: r\r\ntransfer-encoding: chunked\r\n\r\n4\r\n{"a"', 200),
    ],
)
@pytest.mark.parametrize("how", ["close", "abort"])
async def test_a_cut_connection_may_have_cost_something(
    written: bytes, status: int | None, how: str
) -> None:
    async def answer(writer: asyncio.StreamWriter) -> None:
        writer.write(written)
        if how == "abort":
            writer.transport.abort()
        writer.close()

    async with serving(answer) as server, Provider() as provider:
        outcome = await provider.call(call_to(server.url))
    assert isinstance(outcome, Unreachable)
    assert (outcome.code, outcome.sent) == ("cut", True)
    if how == "close":
        assert outcome.status_code == status
        assert outcome.request_id == ("r" if status else None)


async def test_a_refused_connection_was_not_sent() -> None:
    async with serving(b"") as server:
        url = server.url
    async with Provider() as provider:
        outcome = await provider.call(call_to(url))
    assert isinstance(outcome, Unreachable)
    assert (outcome.code, outcome.sent) == ("connect", False)


async def test_a_call_that_is_late_is_not_sent_and_its_connection_serves_the_next() -> None:
    async with serving(response(200, CHAT)) as server, Provider() as provider:
        late = await provider.call(call_to(server.url, send_by=time.monotonic() - 0.001))
        assert isinstance(late, Unreachable)
        assert (late.code, late.sent, server.bodies) == ("late", False, [])
        in_time = await provider.call(call_to(server.url, send_by=time.monotonic() + 60))
        assert isinstance(in_time, Answered)
        assert (len(server.bodies), server.connections) == (1, 1)


async def test_an_unknown_host_was_not_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    async def fail(host: str, port: int) -> list[str]:
        raise http1.socket.gaierror(-2, f"{host}:{port}")

    monkeypatch.setattr(http1, "_resolve", fail)
    async with Provider() as provider:
        outcome = await provider.call(call_to("http://nowhere.invalid"))
    assert isinstance(outcome, Unreachable)
    assert (outcome.code, outcome.sent) == ("dns", False)


async def test_the_second_address_of_a_name_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    async def two(host: str, port: int) -> list[str]:
        assert (host, port) == ("twice.invalid", int(server.url.rpartition(":")[2]))
        return ["::1", "127.0.0.1"]

    monkeypatch.setattr(http1, "_resolve", two)
    async with serving(response(200, CHAT)) as server, Provider() as provider:
        url = server.url.replace("127.0.0.1", "twice.invalid")
        assert isinstance(await provider.call(call_to(url)), Answered)


def certificate_for(address: str, folder: Path) -> Path:
    """Write a certificate that vouches for itself, with its key, into one file."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "sluice test")])
    alternative = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address(address))])
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(datetime(2020, 1, 1, tzinfo=UTC))
        .not_valid_after(datetime(2120, 1, 1, tzinfo=UTC))
        .add_extension(alternative, critical=False)
        .sign(key, hashes.SHA256())
    )
    private = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    path = folder / "certificate.pem"
    path.write_bytes(certificate.public_bytes(serialization.Encoding.PEM) + private)
    return path


async def test_tls_is_verified(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pem = certificate_for("127.0.0.1", tmp_path)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pem)
    async with serving(response(200, CHAT), tls=context) as server:
        async with Provider() as provider:
            outcome = await provider.call(call_to(server.url))
            assert isinstance(outcome, Unreachable)
            assert (outcome.code, outcome.sent) == ("tls", False)
        monkeypatch.setenv("SSL_CERT_FILE", str(pem))
        async with Provider() as provider:
            for _ in range(2):
                assert isinstance(await provider.call(call_to(server.url)), Answered)


async def test_plain_http_where_tls_is_expected_was_not_sent() -> None:
    async def plain(writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")

    async with plain_text_server(plain) as url, Provider() as provider:
        outcome = await provider.call(call_to(url.replace("http://", "https://")))
    assert isinstance(outcome, Unreachable)
    assert (outcome.code, outcome.sent) == ("tls", False)


@asynccontextmanager
async def plain_text_server(
    answer: Callable[[asyncio.StreamWriter], Awaitable[None]],
) -> AsyncGenerator[str]:
    """Answer whatever comes, without waiting for a request."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1)
        await answer(writer)
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"


async def never(writer: asyncio.StreamWriter) -> None:
    del writer
    await asyncio.Event().wait()


async def test_no_answer_within_the_deadline_was_sent() -> None:
    async with serving(never) as server, Provider() as provider:
        outcome = await provider.call(call_to(server.url, timeout_s=0.1))
        assert isinstance(outcome, Unreachable)
        assert (outcome.code, outcome.sent, outcome.status_code) == ("timeout", True, None)
        assert 90 <= outcome.latency_ms < 5000
        await server.until(lambda: server.open == 0)


async def test_the_deadline_bounds_a_body_that_trickles() -> None:
    async def trickle(writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nx-request-id: r\r\ncontent-length: 1000\r\n\r\n")
        for _ in range(1000):
            writer.write(b" ")
            await writer.drain()
            await asyncio.sleep(0.01)

    async with serving(trickle) as server, Provider() as provider:
        outcome = await provider.call(call_to(server.url, timeout_s=0.2))
    assert isinstance(outcome, Unreachable)
    assert (outcome.code, outcome.status_code, outcome.request_id) == ("timeout", 200, "r")
    assert outcome.latency_ms < 5000


async def test_a_call_that_never_got_a_connection_was_not_sent() -> None:
    async with serving(never) as server, Provider(max_connections=1) as provider:
        first = asyncio.create_task(provider.call(call_to(server.url)))
        await server.until(lambda: len(server.heads) == 1)
        outcome = await provider.call(call_to(server.url, timeout_s=0.05))
        assert isinstance(outcome, Unreachable)
        assert (outcome.code, outcome.sent) == ("timeout", False)
        first.cancel()
        await asyncio.wait([first])


# Connections --------------------------------------------------------------------------------------


async def test_connections_are_kept_alive() -> None:
    async with serving(response(200, CHAT)) as server, Provider() as provider:
        for _ in range(10):
            assert isinstance(await provider.call(call_to(server.url)), Answered)
        assert server.connections == 1


@pytest.mark.parametrize(
    "answer",
    [
        response(200, CHAT, Connection="close"),
        response(200, CHAT) + response(200, b'{"stolen":true}'),
        response(200, CHAT) + b"rubbish",
        response(500, b"x" * 2000)[:-1],
    ],
)
async def test_a_connection_that_cannot_be_trusted_is_not_used_again(answer: bytes) -> None:
    async with serving(answer) as server, Provider(max_response_bytes=1000) as provider:
        for _ in range(3):
            outcome = await provider.call(call_to(server.url))
            assert not (isinstance(outcome, Answered) and outcome.body != CHAT)
        assert server.connections == 3


async def test_an_old_idle_connection_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http1, "IDLE_S", 0.0)
    async with serving(response(200, CHAT)) as server, Provider() as provider:
        for _ in range(2):
            assert isinstance(await provider.call(call_to(server.url)), Answered)
        assert server.connections == 2


async def test_300_calls_at_once_use_at_most_the_allowed_connections() -> None:
    async with serving(response(200, CHAT)) as server, Provider(max_connections=50) as provider:
        outcomes = await asyncio.gather(*(provider.call(call_to(server.url)) for _ in range(300)))
        assert all(isinstance(outcome, Answered) for outcome in outcomes)
        assert len(server.heads) == 300
        assert server.connections <= 50


async def test_idle_connections_of_one_host_make_room_for_another() -> None:
    async with (
        serving(response(200, CHAT)) as one,
        serving(response(200, CHAT)) as other,
        Provider(max_connections=1) as provider,
    ):
        assert isinstance(await provider.call(call_to(one.url)), Answered)
        assert isinstance(await provider.call(call_to(other.url)), Answered)
        await one.until(lambda: one.open == 0)
        assert other.open == 1


async def test_cancelling_a_call_closes_its_connection_and_frees_its_place() -> None:
    async with serving(never) as server, Provider(max_connections=2) as provider:
        calls = [asyncio.create_task(provider.call(call_to(server.url))) for _ in range(2)]
        await server.until(lambda: len(server.heads) == 2)
        for call in calls:
            call.cancel()
        results = await asyncio.gather(*calls, return_exceptions=True)
        assert all(isinstance(result, asyncio.CancelledError) for result in results)
        await server.until(lambda: server.open == 0)
        async with serving(response(200, CHAT)) as healthy:
            assert isinstance(await provider.call(call_to(healthy.url)), Answered)


async def test_closing_ends_calls_in_flight_and_refuses_new_ones() -> None:
    async with serving(never) as server:
        provider = Provider()
        call = asyncio.create_task(provider.call(call_to(server.url)))
        await server.until(lambda: len(server.heads) == 1)
        await provider.close()
        ended = await call
        assert isinstance(ended, Unreachable)
        assert (ended.code, ended.sent) == ("closed", True)
        late = await provider.call(call_to(server.url))
        assert isinstance(late, Unreachable)
        assert (late.code, late.sent) == ("closed", False)
        assert len(server.heads) == 1


async def test_a_mistake_of_ours_is_an_outcome_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise LookupError(KEY)

    monkeypatch.setattr(provider_module, "_classify", broken)
    outcome = await outcome_of(response(200, CHAT))
    assert isinstance(outcome, Unreachable)
    assert outcome.code == "internal"
    assert KEY not in repr(outcome)


@pytest.mark.parametrize("status", [200, 400, 401, 429, 500])
async def test_no_secret_is_shown(status: int) -> None:
    secret = "azure-secret-42"
    body = error(f"{KEY} {secret}")
    echo = {"x_echo": f"{KEY} {secret}"}
    call = call_to("http://host", headers={"api-key": secret})
    assert KEY not in repr(call)
    assert secret not in repr(call)
    outcome = await outcome_of(response(status, body, **echo), headers={"api-key": secret})
    shown = repr(outcome) + repr(dataclasses.asdict(outcome))
    assert KEY not in shown
    assert secret not in shown
