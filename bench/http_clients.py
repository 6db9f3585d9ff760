"""Which HTTP client makes the most provider calls per second of CPU?

Method
------
A provider answers after hundreds of milliseconds, so a worker keeps about a thousand calls in
flight, and the client's CPU per call decides how many calls one process can make.

* Server: raw asyncio on uvloop in a process of its own, keep-alive, answers every POST with the
  same small chat completion ``--latency-ms`` after the request is complete. Its CPU is shown beside
  each client: where it comes near 100 % of a core, the row measures the server and not the client.
  With 1,000 in flight and 200 ms, 5,000 calls/s is the ceiling for everybody.
* Client: one process per client and round, so that nothing is shared and the threads of Rust
  runtimes are counted (``getrusage`` of the process). ``--in-flight`` tasks draw from one counter
  until ``--calls`` calls are made. Each posts about 600 bytes of JSON with an ``Authorization``
  header under a deadline of 60 s, reads a body bounded to 32 MiB and looks at two headers. Before
  the clock starts every connection is opened and used twice.
* ``sluice`` is `app.provider.Provider` as workers use it: on top of what the others do it puts the
  model into the body, checks the answer's JSON, reads usage and makes an outcome.
* ``floor`` is no client: a protocol that writes prepared bytes and waits for a known length. It
  shows what asyncio, the kernel and this loop of tasks cost without any HTTP.
* httpx is measured with 200 in flight and a tenth of the calls: its pool is searched linearly, and
  with 1,000 it does not end in reasonable time.
* Rounds are interleaved (a, b, c, a, b, c); the table has the median of each column, the JSON has
  every round. ``p99`` is one call's time, of which the server's latency is the least it can be.
* A client that is not installed is left out.

Run it on an otherwise idle machine with at least two cores:

    python -m bench.http_clients --calls 20000 --in-flight 1000 --latency-ms 200 --json out.json
"""

import argparse
import asyncio
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
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import asdict, dataclass, fields
from datetime import timedelta
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import ClassVar, cast
from urllib.parse import urlsplit

import uvloop

from app.provider import Answered, Call, Endpoint, Provider

DEADLINE_S = 60.0
MOST_BYTES = 32 * 1024 * 1024
HTTPX_IN_FLIGHT = 200
MOST_HTTPX_CALLS = 2_000
WARM_UPS = 2
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

    due: ClassVar[deque[tuple[float, asyncio.Transport]]] = deque()
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
        self.transport = cast("asyncio.Transport", transport)

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
    print(server.sockets[0].getsockname()[1], flush=True)
    await loop.run_in_executor(None, sys.stdin.read)


def server_cpu_s(port: int) -> float:
    """Read the CPU seconds which the server has used."""
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        connection.sendall(b"GET /cpu HTTP/1.1\r\nhost: bench\r\n\r\n")
        return float(connection.recv(4096).split(b"\r\n\r\n", 1)[1])


# The clients --------------------------------------------------------------------------------------


@asynccontextmanager
async def with_aiohttp(url: str, in_flight: int) -> AsyncGenerator[Post]:
    import aiohttp  # noqa: PLC0415 - each process loads only the client it measures

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
async def with_pyreqwest(url: str, in_flight: int) -> AsyncGenerator[Post]:
    from pyreqwest.client import ClientBuilder  # noqa: PLC0415

    builder = ClientBuilder().no_proxy().follow_redirects(enable=False)
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
async def with_httpx(url: str, in_flight: int) -> AsyncGenerator[Post]:
    import httpx  # noqa: PLC0415

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


@asynccontextmanager
async def with_sluice(url: str, in_flight: int) -> AsyncGenerator[Post]:
    call = Call(
        base_url=url,
        endpoint=Endpoint.chat_completions,
        model="sluice-bench",
        body=REQUEST,
        timeout_s=DEADLINE_S,
        api_key="bench",
    )
    async with Provider(max_connections=in_flight, max_response_bytes=MOST_BYTES) as provider:

        async def post() -> int:
            outcome = await provider.call(call)
            assert isinstance(outcome, Answered), outcome
            assert outcome.headers["x-request-id"]
            assert outcome.headers["x-ratelimit-remaining-requests"]
            return len(outcome.body)

        yield post


class Floor(asyncio.Protocol):
    """Knows how many bytes an answer has and wakes its caller when they are there."""

    def __init__(self) -> None:
        self.missing = 0
        self.waiter: asyncio.Future[None] | None = None
        self.transport: asyncio.Transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        self.missing -= len(data)
        if self.missing == 0 and self.waiter is not None and not self.waiter.done():
            self.waiter.set_result(None)


@asynccontextmanager
async def with_floor(url: str, in_flight: int) -> AsyncGenerator[Post]:
    del in_flight
    loop = asyncio.get_running_loop()
    port = urlsplit(url).port or 80
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


Client = Callable[[str, int], AbstractAsyncContextManager[Post]]

CLIENTS: dict[str, Client] = {
    "floor": with_floor,
    "sluice": with_sluice,
    "pyreqwest": with_pyreqwest,
    "aiohttp": with_aiohttp,
    "httpx": with_httpx,
}


async def measure(client: str, *, port: int, calls: int, in_flight: int) -> Measured:
    """Make ``calls`` calls with one client in this process."""
    base = f"http://127.0.0.1:{port}"
    url = base if client == "sluice" else f"{base}/v1/chat/completions"
    async with CLIENTS[client](url, in_flight) as post:
        times: list[float] = []
        for _ in range(WARM_UPS):
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """What every client has to do."""

    calls: int
    in_flight: int
    latency_ms: float
    rounds: int


def start(*arguments: str) -> "subprocess.Popen[str]":
    """Run this module in a process of its own."""
    command = [sys.executable, "-m", "bench.http_clients", *arguments]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def measure_in_child(client: str, workload: Workload, *, port: int) -> Measured:
    """Measure one client in a process of its own, with the server's CPU beside it."""
    calls, in_flight = workload.calls, workload.in_flight
    if client == "httpx":
        calls, in_flight = min(calls, MOST_HTTPX_CALLS), min(in_flight, HTTPX_IN_FLIGHT)
    before = server_cpu_s(port)
    arguments = ["--port", str(port), "--calls", str(calls), "--in-flight", str(in_flight)]
    with start("--measure", client, *arguments) as child:
        try:
            written, _ = child.communicate(timeout=ROUND_LIMIT_S)
        except subprocess.TimeoutExpired:
            child.kill()
            sys.exit(f"{client} did not finish within {ROUND_LIMIT_S:g} s.")
    if child.returncode:
        sys.exit(f"{client} failed.")
    row = cast("dict[str, object]", json.loads(written))
    measured = Measured(**row)  # pyright: ignore[reportArgumentType] - asdict of one
    # The server also worked for the calls before the clock started; take its share.
    share = calls / (calls + WARM_UPS * in_flight)
    used = (server_cpu_s(port) - before) * share
    row["server_cpu_percent"] = used / (calls / measured.calls_per_s) * 100
    return Measured(**row)  # pyright: ignore[reportArgumentType]


def compare(clients: list[str], workload: Workload) -> list[Measured]:
    """Measure each client in each round against one server."""
    with start("--serve", "--latency-ms", str(workload.latency_ms)) as server:
        assert server.stdout is not None
        port = int(server.stdout.readline())
        try:
            return [
                measure_in_child(client, workload, port=port)
                for _ in range(workload.rounds)
                for client in clients
            ]
        finally:
            server.kill()


def median(rows: list[Measured]) -> dict[str, float]:
    """Take the median of each number over the rounds."""
    return {
        field.name: statistics.median(cast("float", getattr(row, field.name)) for row in rows)
        for field in fields(Measured)
        if field.name != "client"
    }


def table(rows: list[Measured]) -> str:
    """Show one line per client."""
    lines = [
        "client      in flight   calls/s   CPU µs/call   p50 ms   p99 ms   MiB   server CPU",
        "---------   ---------   -------   -----------   ------   ------   ---   ----------",
    ]
    for client in dict.fromkeys(row.client for row in rows):
        m = median([row for row in rows if row.client == client])
        lines.append(
            f"{client:<9}   {m['in_flight']:>9,.0f}   {m['calls_per_s']:>7,.0f}   "
            f"{m['cpu_us_per_call']:>11,.0f}   {m['p50_ms']:>6,.0f}   {m['p99_ms']:>6,.0f}   "
            f"{m['max_rss_mib']:>3,.0f}   {m['server_cpu_percent']:>8,.0f} %"
        )
    return "\n".join(lines)


def surroundings() -> dict[str, object]:
    """Name what the numbers depend on."""
    packages = ["aiohttp", "httptools", "httpx", "pyreqwest", "uvloop"]
    return {
        "python": platform.python_version(),
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "load_average": os.getloadavg()[0],
        "packages": {name: version(name) for name in packages if find_spec(name)},
    }


def run(clients: list[str], workload: Workload, *, json_path: Path | None = None) -> None:
    """Compare, print the table and write every round as JSON."""
    around = surroundings()
    rows = compare(clients, workload)
    print(table(rows))
    if json_path is not None:
        result = {
            "workload": asdict(workload),
            "surroundings": around,
            "rounds": [asdict(row) for row in rows],
        }
        json_path.write_text(json.dumps(result, indent=2) + "\n")


def installed() -> list[str]:
    """List the clients that can be measured here."""
    return [name for name in CLIENTS if name in {"floor", "sluice"} or find_spec(name)]


def main(*, quick: bool = False) -> None:
    """Run with the defaults, or with a twentieth of the calls."""
    calls, in_flight, rounds = (1_000, 100, 1) if quick else (20_000, 1_000, 3)
    workload = Workload(calls=calls, in_flight=in_flight, latency_ms=200, rounds=rounds)
    run([name for name in installed() if not quick or name != "httpx"], workload)


class Arguments(argparse.Namespace):
    """The command line with its types."""

    calls: int
    in_flight: int
    latency_ms: float
    rounds: int
    clients: list[str]
    json: Path | None
    port: int
    measure: str | None
    serve: bool


def command_line() -> None:
    """Read the command line; ``--serve`` and ``--measure`` are how the processes start each other."""
    parser = argparse.ArgumentParser(prog="python -m bench.http_clients")
    parser.add_argument("--calls", type=int, default=20_000)
    parser.add_argument("--in-flight", type=int, default=1_000)
    parser.add_argument("--latency-ms", type=float, default=200)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--clients", nargs="+", default=installed(), choices=list(CLIENTS))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--port", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args(namespace=Arguments())
    if not given.serve and given.measure is None:
        workload = Workload(
            calls=given.calls,
            in_flight=given.in_flight,
            latency_ms=given.latency_ms,
            rounds=given.rounds,
        )
        run(given.clients, workload, json_path=given.json)
        return
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as loop:
        if given.measure is None:
            loop.run(serve(given.latency_ms))
        else:
            row = loop.run(
                measure(
                    given.measure, port=given.port, calls=given.calls, in_flight=given.in_flight
                )
            )
            print(json.dumps(asdict(row)))


if __name__ == "__main__":
    command_line()
