"""Hostile URLs: refused where they are given, and again where they are connected to."""

import asyncio
import socket
import ssl
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from ipaddress import ip_address
from typing import Any

import pytest

from app import http1, signatures
from app.addresses import LOOPBACK, Guard, is_public, literal, networks, target
from app.courier import Courier, Message, Receipt, problems_of_headers
from app.provider import Call, Endpoint, Provider, Rejected
from app.settings import Settings

CLOSED = Guard(allowed=(), setting="SLUICE_CALLBACK_ALLOW_NETWORKS", needs_tls=True)
LOCAL = Guard(allowed=LOOPBACK, setting="SLUICE_CALLBACK_ALLOW_NETWORKS", needs_tls=True)
PROVIDERS = Guard(allowed=(), setting="SLUICE_PROVIDER_ALLOW_NETWORKS")

PRIVATE = [
    "https://127.0.0.1/",
    "https://127.1/",
    "https://2130706433/",
    "https://0x7f000001/",
    "https://0x7f.1/",
    "https://017700000001/",
    "https://0177.0.0.1/",
    "https://0/",
    "https://0.0.0.0:8080/",
    "https://localhost/",
    "https://LOCALHOST./",
    "https://db.localhost/",
    "https://10.0.0.5/",
    "https://172.16.0.1/",
    "https://172.31.255.255/",
    "https://192.168.1.1/",
    "https://100.64.0.1/",
    "https://100.100.100.200/latest/meta-data",
    "https://169.254.169.254/latest/meta-data/",
    "https://0xa9fea9fe/",
    "https://2852039166/",
    "https://198.18.0.1/",
    "https://224.0.0.1/",
    "https://240.0.0.1/",
    "https://255.255.255.255/",
    "https://①②⑦.⓪.⓪.①/",
    "https://127。0。0。1/",
    "https://[::1]/",
    "https://[::]/",
    "https://[0:0:0:0:0:0:0:1]:8443/",
    "https://[::ffff:127.0.0.1]/",
    "https://[::ffff:7f00:1]/",
    "https://[::ffff:a9fe:a9fe]/",
    "https://[::ffff:0:10.0.0.1]/",
    "https://[::127.0.0.1]/",
    "https://[2002:7f00:1::]/",
    "https://[2002:a9fe:a9fe::1]/",
    "https://[64:ff9b::10.0.0.1]/",
    "https://[64:ff9b::a9fe:a9fe]/",
    "https://[64:ff9b:1::1]/",
    "https://[2001:0:7f00:1::]/",
    "https://[2001:db8::1]/",
    "https://[fe80::1]/",
    "https://[fe80::1%25eth0]/",
    "https://[fec0::1]/",
    "https://[fc00::1]/",
    "https://[fd00:ec2::254]/",
    "https://[ff02::1]/",
    "https://[100::1]/",
]


@pytest.mark.parametrize("url", PRIVATE)
def test_an_address_that_is_not_public_is_refused_in_every_spelling(url: str) -> None:
    told = CLOSED.problem(url)
    assert told is not None
    assert "not public" in told
    assert "SLUICE_CALLBACK_ALLOW_NETWORKS" in told
    assert PROVIDERS.problem(url) is not None


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("http://hooks.example.com/x", "https://"),
        ("http://93.184.216.34/", "https://"),
        ("ftp://example.com/", "begin with"),
        ("file:///etc/passwd", "begin with"),
        ("gopher://example.com:70/_x", "begin with"),
        ("//example.com/", "begin with"),
        ("example.com/hook", "begin with"),
        ("", "begin with"),
        ("https://", "host"),
        ("https:///path", "host"),
        ("https://user@example.com/", "user"),
        ("https://user:secret@example.com/", "user"),
        ("https://example.com@10.0.0.1/", "user"),
        ("https://example.com\\@10.0.0.1/", "backslashes"),
        ("https://example.com/\r\nX-Evil: 1", "control"),
        ("https://exa\tmple.com/", "control"),
        (" https://example.com/", "spaces"),
        ("https://example.com/ x", "spaces"),
        ("https://example.com:99999/", "not a URL"),
        ("https://[::1/", "not a URL"),
        ("https://1.2.3.4.5/", "host"),
        ("https://256.256.256.256/", "host"),
        ("https://exam ple.com/", "spaces"),
        ("https://-/", "host"),
        ("https://a..b/", "host"),
        ("https://example.com/#frag", "fragment"),
        ("https://example.com/" + "x" * 3000, "2,048"),
    ],
)
def test_what_is_no_sane_url_is_refused(url: str, why: str) -> None:
    told = CLOSED.problem(url)
    assert told is not None
    assert why in told


@pytest.mark.parametrize(
    "url",
    [
        "https://hooks.example.com/x?a=b",
        "https://HOOKS.Example.com:8443/",
        "https://bücher.example/",
        "https://93.184.216.34/",
        "https://[2606:4700:4700::1111]/",
        "https://[64:ff9b::8.8.8.8]/",
        "https://your-app.com/batch-callback",
        "https://my_service.example.com./x",
    ],
)
def test_what_is_public_passes(url: str) -> None:
    assert CLOSED.problem(url) is None


def test_an_allowed_network_opens_itself_and_nothing_else() -> None:
    guard = Guard(allowed=networks("10.1.0.0/16, ::1/128"), setting="X", needs_tls=True)
    assert guard.problem("http://10.1.2.3:8080/") is None
    assert guard.problem("http://[::ffff:10.1.2.3]/") is None
    assert guard.problem("http://[::1]/") is None
    assert guard.problem("http://10.2.0.1/") is not None
    assert guard.problem("http://127.0.0.1/") is not None
    # A name may be one of the network's; the connection will tell.
    assert guard.problem("http://inside.example/") is None
    assert guard.refusal("93.184.216.34", is_secure=False) == "must begin with https://"
    assert guard.refusal("93.184.216.34", is_secure=True) is None
    assert guard.refusal("not an address", is_secure=True) is not None


def test_a_setting_takes_networks_only() -> None:
    assert networks("") == ()
    with pytest.raises(ValueError, match="is no network"):
        networks("10.0.0.1/8")
    with pytest.raises(ValueError, match="is no network"):
        networks("localhost")
    settings = Settings(callback_allow_networks="127.0.0.0/8,::1/128")
    assert settings.callback_guard.problem("http://127.0.0.1/") is None
    assert settings.provider_guard.problem("http://127.0.0.1/") is not None
    assert settings.for_own_machine().provider_guard.problem("http://127.0.0.1/") is None


def test_the_registries_of_special_addresses_are_not_public() -> None:
    for text in ("8.8.8.8", "1.1.1.1", "2a00:1450:4001::1", "2002:0808:0808::1"):
        assert is_public(ip_address(text)), text
    for text in ("192.0.2.1", "203.0.113.9", "3fff::1", "2001::1", "4000::1", "::"):
        assert not is_public(ip_address(text)), text
    assert literal("example.com") is None


def test_a_target_is_what_is_connected_to() -> None:
    found = target("https://Bücher.Example:8443/a b".replace(" ", "%20") + "?q=ü")
    assert (found.host, found.port, found.is_secure) == ("xn--bcher-kva.example", 8443, True)
    assert found.path == "/a%20b?q=%C3%BC"
    assert found.authority == "xn--bcher-kva.example:8443"
    assert target("http://[::1]:80").authority == "[::1]"


@pytest.mark.parametrize(
    "name",
    [
        *("Host", "content-length", "Transfer-Encoding", "connection", "webhook-id", "TE"),
        *("Webhook-Signature", "proxy-authorization", "Content-Type", "user-agent"),
        *("bad name", "x:y", ""),
    ],
)
def test_headers_of_ours_and_of_the_next_hop_cannot_be_set(name: str) -> None:
    assert problems_of_headers({name: "x"})


def test_headers_cannot_smuggle_lines_or_be_huge() -> None:
    assert problems_of_headers({"x-a": "1\r\nx-b: 2"})
    assert problems_of_headers({"x-a": "\0"})
    assert problems_of_headers({"x-a": "ü"})
    assert problems_of_headers({"x-a": "1", "X-A": "2"})
    assert problems_of_headers({"x-a": "v" * 5000})
    assert problems_of_headers({f"x-{n}": "v" for n in range(60)})
    assert problems_of_headers({f"x-{n}": "v" * 4000 for n in range(5)})
    assert not problems_of_headers({"X-API-Key": "your-secret-key", "Authorization": "Bearer x"})


# Connections --------------------------------------------------------------------------------------

Answering = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@asynccontextmanager
async def sink(answer: Answering, host: str = "127.0.0.1") -> AsyncGenerator[str]:
    """A receiver on loopback that answers in its own way; its address."""
    tasks: set[asyncio.Task[Any]] = set()

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        tasks.add(task)
        try:
            while await reader.readuntil(b"\r\n\r\n"):
                await answer(reader, writer)
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        finally:
            writer.transport.abort()

    server = await asyncio.start_server(connected, host, 0, limit=1024 * 1024)
    port = server.sockets[0].getsockname()[1]
    try:
        yield f"http://{host}:{port}/hook"
    finally:
        server.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def post(url: str, guard: Guard = LOCAL, timeout_s: float = 5.0) -> Receipt:
    courier = Courier(guard=guard, timeout_s=timeout_s, most=10)
    try:
        return await courier.post(
            Message(url=url, message_id="evt_1", body=b"{}", secrets=[signatures.mint_secret()])
        )
    finally:
        await courier.close()


def saying(head: bytes, body: bytes = b"") -> Answering:
    async def answer(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 " + head + b"\r\ncontent-length: %d\r\n\r\n" % len(body) + body)
        await writer.drain()

    return answer


async def test_a_name_that_resolves_differently_the_second_time_gains_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What is connected to is the very address that was checked, whatever a resolver says later."""
    answers = [["93.184.216.34"], ["127.0.0.1"]]
    asked: list[str] = []
    connected: list[str] = []

    async def resolve(host: str, _: int) -> list[str]:
        asked.append(host)
        return answers.pop(0)

    async def connect(_: object, __: object, host: str, ___: int, **more: object) -> None:
        connected.append(f"{host} for {more['server_hostname']}")
        raise OSError(0, "no network in tests")

    monkeypatch.setattr(http1, "_resolve", resolve)
    monkeypatch.setattr(http1, "NAME_S", -1.0)
    loop = asyncio.get_running_loop()
    monkeypatch.setattr(type(loop), "create_connection", connect)
    courier = Courier(guard=CLOSED, timeout_s=5, most=10)
    message = Message(
        url="https://rebind.example/",
        message_id="evt_1",
        body=b"{}",
        secrets=[signatures.mint_secret()],
    )
    first = await courier.post(message)
    second = await courier.post(message)
    await courier.close()
    assert asked == ["rebind.example"] * 2
    assert connected == ["93.184.216.34 for rebind.example"]
    assert (first.error_code, second.error_code) == ("connect", "address_not_allowed")


async def test_of_several_addresses_only_the_fit_ones_are_tried(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def resolve(_: str, __: int) -> list[str]:
        return ["10.0.0.1", "127.0.0.1"]

    monkeypatch.setattr(http1, "_resolve", resolve)
    async with sink(saying(b"200 OK")) as url:
        name = url.replace("127.0.0.1", "mixed.example")
        assert (await post(name)).status_code == 200


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "0x7f.1", "[::ffff:127.0.0.1]"])
async def test_a_closed_guard_lets_nothing_connect(host: str) -> None:
    seen = asyncio.Event()

    async def answer(_: asyncio.StreamReader, __: asyncio.StreamWriter) -> None:
        seen.set()

    async with sink(answer) as url:
        receipt = await post(url.replace("127.0.0.1", host), CLOSED)
    assert receipt.error_code == "address_not_allowed"
    assert "not public" in (receipt.error_message or "")
    assert not seen.is_set()


async def test_a_redirect_to_a_private_address_is_a_failure_and_not_followed() -> None:
    called = asyncio.Event()

    async def inner(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        called.set()
        writer.close()

    async with sink(inner) as secret:
        head = f"302 Found\r\nlocation: {secret}".encode()
        async with sink(saying(head)) as url:
            receipt = await post(url)
    assert (receipt.status_code, receipt.error_code) == (302, "redirect")
    assert not called.is_set()


async def test_a_huge_answer_is_cut_and_an_endless_one_ends_in_time() -> None:
    async def endless(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n")
        while True:
            writer.write(b"10000\r\n" + b"x" * 0x10000 + b"\r\n")
            await writer.drain()

    async def dripping(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n")
        while True:
            writer.write(b"1\r\nx\r\n")
            await writer.drain()
            await asyncio.sleep(0.01)

    async def headers(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\n")
        while True:
            writer.write(b"x-a: " + b"v" * 10_000 + b"\r\n")
            await writer.drain()

    begun = time.monotonic()
    async with sink(endless) as url:
        receipt = await post(url)  # it was taken: the status said so
        assert (receipt.status_code, receipt.error_code) == (200, None)
    async with sink(dripping) as url:
        assert (await post(url, timeout_s=0.3)).error_code == "timeout"
    async with sink(headers) as url:
        assert (await post(url)).error_code == "garbage"
    assert time.monotonic() - begun < 4


async def test_a_compressed_answer_is_never_unpacked() -> None:
    async with sink(saying(b"500 Oops\r\ncontent-encoding: gzip", b"\x1f\x8b not gzip")) as url:
        receipt = await post(url)
    assert (receipt.status_code, receipt.error_code) == (500, "refused")
    assert receipt.error_message == "The receiver answered 500."


async def test_an_idle_connection_that_was_closed_is_no_failure() -> None:
    async def once(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 204 No Content\r\n\r\n")
        await writer.drain()
        writer.close()

    async with sink(once) as url:
        courier = Courier(guard=LOCAL, timeout_s=5, most=10)
        for number in range(5):
            message = Message(
                url=url,
                message_id=f"evt_{number}",
                body=b"{}",
                secrets=[signatures.mint_secret()],
            )
            assert (await courier.post(message)).status_code == 204
        await courier.close()


async def test_proxies_of_the_environment_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9/")
    async with sink(saying(b"200 OK")) as url:
        assert (await post(url)).status_code == 200


async def test_tls_is_verified_against_the_name() -> None:
    """The address is what was checked, the certificate what the name asks for."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        port = listening.getsockname()[1]
        context = http1.Connections(most=1)._context()  # pyright: ignore[reportPrivateUsage]
        assert context.verify_mode is ssl.CERT_REQUIRED
        assert context.check_hostname
        receipt = await post(f"https://127.0.0.1:{port}/", timeout_s=0.2)
        assert receipt.error_code == "timeout"  # nobody speaks TLS there


async def test_a_provider_at_a_private_address_is_refused_in_words() -> None:
    reached = asyncio.Event()

    async def answer(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        reached.set()
        writer.close()

    async with sink(answer) as url, Provider(guard=PROVIDERS) as provider:
        outcome = await provider.call(
            Call(
                base_url=url.removesuffix("/hook"),
                endpoint=Endpoint.chat_completions,
                model="m",
                body=b'{"messages":[]}',
                timeout_s=5,
            )
        )
    assert isinstance(outcome, Rejected)
    assert outcome.code == "address_not_allowed"
    assert "SLUICE_PROVIDER_ALLOW_NETWORKS" in outcome.message
    assert not reached.is_set()
