"""Which HTTP client makes the most provider calls per CPU second?

Method
------
A provider answers after hundreds of milliseconds, so a worker keeps about a thousand calls in
flight and the client's CPU per call, not its latency, decides how many calls one process can make.

* Server: raw asyncio in a process of its own, keep-alive, answers every POST with the same 449-byte
  chat completion ``--latency-ms`` after the request is complete. Its CPU is shown beside each
  client; where it comes near 100 % the row measures the server, not the client.
* Client: one process per client and round, so that nothing is shared and threads of Rust runtimes
  are counted (``getrusage`` of the process). ``--in-flight`` tasks draw from one counter until
  ``--calls`` calls are made. Each call posts 600 bytes of JSON with an ``Authorization`` header,
  has a total deadline of 60 s, reads the body with a bound of 32 MiB and looks at two headers: what
  `app.provider` needs of every call. Before the clock starts each task makes one call, so
  connections are open.
* Rounds are interleaved (a, b, c, a, b, c) and the median of each column is printed. ``p99`` is
  the 99th percentile of one call's time; the server's latency is the least it can be.
* ``floor`` is no client: a protocol that writes prepared bytes and waits for a known length. It
  shows what asyncio, the kernel and this loop of tasks cost without any HTTP.
* httpx is measured at 200 in flight: its pool is searched linearly, at 1,000 it does not finish in
  reasonable time.
* Event loop: uvloop on both sides unless ``--loop asyncio``, which changes the client side only.

Run it on an idle machine with at least two cores:

    python -m bench.http_clients --calls 20000 --in-flight 1000 --latency-ms 200 --json out.json
"""

import argparse
import asyncio
import contextlib
import functools
import json
import os
import platform
import resource
import socket
import statistics
import subprocess
import sys
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path
from typing import cast

import aiohttp
import foghttp
import httpx
import pyqwest
import pyreqwest.client
import uvloop

DEADLINE_S = 60.0
MOST_BYTES = 32 * 1024 * 1024
HTTPX_IN_FLIGHT = 200
ROUND_LIMIT_S = 300.0

REQUEST = json.dumps(
    {
        "model": "sluice-bench",
        "messages": [
            {"role": "system", "content": "You are a careful assistant."},
            {"role": "user", "content": "word " * 90},
        ],
        "max_tokens": 64,
    }
).encode()
ANSWER = json.dumps(
    {
        "id": "chatcmpl-bench",
        "object": "chat.completion",
        "created": 1_700_000_000,
        "model": "sluice-bench",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "word " * 30},
                "finish_reason": "stop",
            }
        ],
        "usage": {"prompt_tokens": 100, "completion_tokens": 30, "total_tokens": 130},
    }
).encode()
HEADERS = {"authorization": "Bearer bench", "content-type": "application/json"}

Post = Callable[[], Awaitable[int]]
"""Makes one call and returns the number of body bytes it read."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """One client in one round."""

    client: str
    in_flight: int
    calls: int
    calls_per_s: float
    cpu_us_per_call: float
    p50_ms: float
    p99_ms: float
    max_rss_mib: float
    server_cpu_percent: float = 0.0


# The server ---------------------------------------------------------------------------------------


class Server(asyncio.Protocol):
    """Answers each request after a fixed time; one timer serves all connections."""

    due: deque[tuple[float, asyncio.Transport]] = deque()
    timer: asyncio.TimerHandle | None = None
    latency_s = 0.2

    RESPONSE = (
        b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\nx-request-id: req_bench\r\n"
        b"x-ratelimit-remaining-requests: 1\r\ncontent-length: %d\r\n\r\n%b" % (len(ANSWER), ANSWER)
    )

    def __init__(self) -> None:
        self.received = bytearray()
        self.transport: asyncio.Transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        transport = cast("asyncio.Transport", transport)
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.received += data
        end = self.received.find(b"\r\n\r\n")
        if end < 0:
            return
        head = bytes(self.received[:end]).lower()
        if head.startswith(b"get /cpu"):
            body = str(time.process_time()).encode()
            self.transport.write(
                b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % len(body) + body
            )
            self.received.clear()
            return
        length = int(head.split(b"content-length:", 1)[1].split(b"\r\n", 1)[0])
        if len(self.received) >= end + 4 + length:
            del self.received[: end + 4 + length]
            self.answer_later()

    def answer_later(self) -> None:
        loop = asyncio.get_running_loop()
        Server.due.append((loop.time() + Server.latency_s, self.transport))
        if Server.timer is None:
            Server.timer = loop.call_later(Server.latency_s, Server.answer_due)

    @staticmethod
    def answer_due() -> None:
        loop = asyncio.get_running_loop()
        now = loop.time()
        while Server.due and Server.due[0][0] <= now:
            _, transport = Server.due.popleft()
            if not transport.is_closing():
                transport.write(Server.RESPONSE)
        Server.timer = (
            loop.call_later(max(0.001, Server.due[0][0] - now), Server.answer_due)
            if Server.due
            else None
        )


async def serve(latency_ms: float) -> None:
    """Serve until stdin closes, which is when the parent is gone; print the port first."""
    Server.latency_s = latency_ms / 1000
    loop = asyncio.get_running_loop()
    server = await loop.create_server(Server, "127.0.0.1", 0, backlog=4096)
    print(server.sockets[0].getsockname()[1], flush=True)  # noqa: T201
    await loop.run_in_executor(None, sys.stdin.read)


def server_cpu_s(port: int) -> float:
    """Read the CPU seconds which the server has used."""
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        connection.sendall(b"GET /cpu HTTP/1.1\r\nhost: bench\r\n\r\n")
        return float(connection.recv(4096).split(b"\r\n\r\n", 1)[1])


# The clients --------------------------------------------------------------------------------------


@asynccontextmanager
async def with_aiohttp(url: str, in_flight: int) -> AsyncIterator[Post]:
    connector = aiohttp.TCPConnector(limit=in_flight)
    timeout = aiohttp.ClientTimeout(total=DEADLINE_S)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:

        async def post() -> int:
            async with session.post(
                url, data=REQUEST, headers=HEADERS, allow_redirects=False
            ) as response:
                size = 0
                async for chunk in response.content.iter_any():
                    size += len(chunk)
                    assert size <= MOST_BYTES
                assert response.headers["x-request-id"]
                assert response.headers["x-ratelimit-remaining-requests"]
                return size

        yield post


@asynccontextmanager
async def with_pyreqwest(url: str, in_flight: int) -> AsyncIterator[Post]:
    builder = pyreqwest.client.ClientBuilder().no_proxy().follow_redirects(enable=False)
    deadline = timedelta(seconds=DEADLINE_S)
    async with builder.max_connections(in_flight).build() as client:

        async def post() -> int:
            request = client.post(url).headers(HEADERS).timeout(deadline).body_bytes(REQUEST)
            async with request.build_streamed() as response:
                assert response.get_header("x-request-id")
                assert response.get_header("x-ratelimit-remaining-requests")
                assert int(response.get_header("content-length") or MOST_BYTES) < MOST_BYTES
                return len((await response.bytes()).to_bytes())

        yield post


@asynccontextmanager
async def with_pyqwest(url: str, in_flight: int) -> AsyncIterator[Post]:
    async with pyqwest.HTTPTransport(
        follow_redirects=False, enable_otel=False, pool_max_idle_per_host=in_flight
    ) as transport:
        client = pyqwest.Client(transport)

        async def post() -> int:
            async with (
                asyncio.timeout(DEADLINE_S),
                client.stream("POST", url, HEADERS, REQUEST) as response,
            ):
                size = 0
                async for chunk in response.content:
                    size += len(chunk)
                    assert size <= MOST_BYTES
                assert response.headers["x-request-id"]
                assert response.headers["x-ratelimit-remaining-requests"]
                return size

        yield post


@asynccontextmanager
async def with_foghttp(url: str, in_flight: int) -> AsyncIterator[Post]:
    async with foghttp.AsyncClient(
        limits=foghttp.Limits(
            max_active_requests=in_flight,
            max_idle_connections_per_host=in_flight,
            max_response_body_size=MOST_BYTES,
        ),
        timeouts=foghttp.Timeouts(read=60, pool=60, total=DEADLINE_S),
    ) as client:

        async def post() -> int:
            response = await client.post(url, content=REQUEST, headers=HEADERS)
            assert response.headers["x-request-id"]
            assert response.headers["x-ratelimit-remaining-requests"]
            return len(response.content)

        yield post


@asynccontextmanager
async def with_httpx(url: str, in_flight: int) -> AsyncIterator[Post]:
    limits = httpx.Limits(max_connections=in_flight, max_keepalive_connections=in_flight)
    async with httpx.AsyncClient(limits=limits, trust_env=False, timeout=DEADLINE_S) as client:

        async def post() -> int:
            async with (
                asyncio.timeout(DEADLINE_S),
                client.stream("POST", url, content=REQUEST, headers=HEADERS) as response,
            ):
                size = 0
                async for chunk in response.aiter_bytes():
                    size += len(chunk)
                    assert size <= MOST_BYTES
                assert response.headers["x-request-id"]
                assert response.headers["x-ratelimit-remaining-requests"]
                return size

        yield post


class Floor(asyncio.Protocol):
    """Knows how many bytes an answer has and wakes its caller when they are there."""

    def __init__(self) -> None:
        self.missing = 0
        self.waiter: asyncio.Future[None] | None = None
        self.transport: asyncio.Transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        transport = cast("asyncio.Transport", transport)
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.missing -= len(data)
        if self.missing == 0 and self.waiter is not None and not self.waiter.done():
            self.waiter.set_result(None)


@asynccontextmanager
async def with_floor(url: str, in_flight: int) -> AsyncIterator[Post]:
    del in_flight
    loop = asyncio.get_running_loop()
    port = int(url.split(":")[2].split("/")[0])
    idle: list[Floor] = []
    request = b"POST / HTTP/1.1\r\nhost: bench\r\ncontent-length: %d\r\n\r\n%b" % (
        len(REQUEST),
        REQUEST,
    )

    async def post() -> int:
        if idle:
            connection = idle.pop()
        else:
            _, connection = await loop.create_connection(Floor, "127.0.0.1", port)
        connection.missing = len(Server.RESPONSE)
        connection.waiter = loop.create_future()
        connection.transport.write(request)
        async with asyncio.timeout(DEADLINE_S):
            await connection.waiter
        idle.append(connection)
        return len(ANSWER)

    yield post
    for connection in idle:
        connection.transport.close()


CLIENTS = {
    "floor": with_floor,
    "pyreqwest": with_pyreqwest,
    "pyqwest": with_pyqwest,
    "foghttp": with_foghttp,
    "aiohttp": with_aiohttp,
    "httpx": with_httpx,
}


async def measure(client: str, *, port: int, calls: int, in_flight: int) -> Measured:
    """Make ``calls`` calls with one client in this process."""
    async with CLIENTS[client](f"http://127.0.0.1:{port}/v1/chat/completions", in_flight) as post:
        times: list[float] = []
        for _ in range(2):
            await asyncio.gather(*(post() for _ in range(in_flight)))
        numbers = iter(range(calls))

        async def work() -> None:
            for _ in numbers:
                begun = time.perf_counter()
                size = await post()
                times.append(time.perf_counter() - begun)
                assert size == len(ANSWER)

        cpu_before = process_cpu_s()
        begun = time.perf_counter()
        await asyncio.gather(*(work() for _ in range(in_flight)))
        elapsed = time.perf_counter() - begun
        cpu = process_cpu_s() - cpu_before
    centiles = statistics.quantiles(times, n=100)
    return Measured(
        client=client,
        in_flight=in_flight,
        calls=calls,
        calls_per_s=calls / elapsed,
        cpu_us_per_call=cpu / calls * 1e6,
        p50_ms=centiles[49] * 1000,
        p99_ms=centiles[98] * 1000,
        max_rss_mib=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    )


def process_cpu_s() -> float:
    """CPU seconds of this process with all its threads."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


# The parent ---------------------------------------------------------------------------------------


def measure_in_child(client: str, *, port: int, args: argparse.Namespace) -> Measured:
    """Measure one client in a process of its own, with the server's CPU beside it."""
    in_flight = min(args.in_flight, HTTPX_IN_FLIGHT) if client == "httpx" else args.in_flight
    calls = min(args.calls, 2_000) if client == "httpx" else args.calls
    before, begun = server_cpu_s(port), time.perf_counter()
    child = subprocess.run(  # noqa: S603
        [sys.executable, "-m", "bench.http_clients", "--child", client, "--port", str(port)]
        + ["--calls", str(calls), "--in-flight", str(in_flight), "--loop", args.loop],
        check=True,
        capture_output=True,
        timeout=ROUND_LIMIT_S,
    )
    row = json.loads(child.stdout)
    del begun
    row["server_cpu_percent"] = (
        (server_cpu_s(port) - before) / ((calls + 2 * in_flight) / row["calls_per_s"]) * 100
    )
    return Measured(**row)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--calls", type=int, default=20_000)
    parser.add_argument("--in-flight", type=int, default=1_000)
    parser.add_argument("--latency-ms", type=float, default=200)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--loop", default="uvloop")
    parser.add_argument("--only", nargs="*", default=list(CLIENTS))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child")
    parser.add_argument("--port", type=int)
    args = parser.parse_args()
    runner = functools.partial(
        asyncio.Runner, loop_factory=uvloop.new_event_loop if args.loop == "uvloop" else None
    )
    if args.child == "server":
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as loop:
            loop.run(serve(args.latency_ms))
        return
    if args.child:
        with runner() as loop:
            row = loop.run(
                measure(args.child, port=args.port, calls=args.calls, in_flight=args.in_flight)
            )
        print(json.dumps(asdict(row)))
        return
    with subprocess.Popen(
        [sys.executable, "-m", "bench.http_clients", "--child", "server"]
        + ["--latency-ms", str(args.latency_ms)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as server:
        port = int(server.stdout.readline())
        for _ in range(args.rounds):
            for c in args.only:
                print(
                    {
                        k: round(v, 1) if isinstance(v, float) else v
                        for k, v in asdict(measure_in_child(c, port=port, args=args)).items()
                    },
                    flush=True,
                )
        server.stdin.close()


if __name__ == "__main__":
    main()
