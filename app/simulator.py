"""A language model provider that keeps its limits and can misbehave: ``sluice simulate``.

It speaks OpenAI's HTTP, answers after a while with text that says it is simulated, refuses what is
over its limits as real providers do, and counts what a client did to it. Nothing here knows Sluice:
it is what benchmarks and tests are measured against.

**Limits.** Calls and tokens are counted when a call *arrives*; a refused one costs nothing. Tokens
are the prompt's plus the output's (``charge="actual"``) or plus ``max_tokens`` (``"max"``), all
charged on arrival. How they are counted stands in `app.simulator_limits`.

**Tokens** of a prompt are a quarter of the characters of its JSON, plus 3: near what tokenizers
say for English, and cheap. Output tokens are drawn from a log-normal distribution and cut at
``max_tokens``, ``max_completion_tokens`` or ``max_output_tokens``.

**Chance** depends on the seed, the body and how often that body came: with a seed a run repeats
exactly in whatever order calls arrive, and a call that failed can succeed when repeated.

**Faults** come after the limit, so they cost capacity: a 500, a random 429, an answer that never
comes, a connection cut within the body, a 200 that is not JSON, a body of one byte per 200 ms.

Routes: the five ``POST /v1/…`` endpoints of OpenAI that a batch may name, Anthropic's
``POST /v1/messages`` (its key in ``x-api-key``, its form of errors), ``GET /v1/models``,
``GET /healthz``, ``GET /report``, ``POST /reset`` (report and limits begin again), ``POST /behaviour``
(a JSON object of `Behaviour` fields to change while running; the limits keep what they counted).
"""

import asyncio
import base64
import contextlib
import hashlib
import hmac
import math
import statistics
import struct
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from http import HTTPStatus
from typing import Literal, assert_never, cast

import httptools
import msgspec

from app.errors import UsageError
from app.simulator_limits import Clock, Limiter, Limits, Refusal, duration
from app.simulator_report import REFUSED_BY, Statistics

TRICKLE_S = 0.2
MOST_BODY_BYTES = 64 * 1024 * 1024
ECHOED_CHARS = 160
CHARS_PER_TOKEN = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Behaviour(Limits):
    """How the simulator behaves, its limits included.

    Rates of faults are shares of accepted calls, 0 to 1, together at most 1.
    """

    host: str = "127.0.0.1"
    port: int = 8090
    """0: any free port."""
    charge: Literal["actual", "max"] = "actual"
    latency_ms: float = 400.0
    """The median; ``latency_sigma`` is the spread of its logarithm. 0: answer at once."""
    latency_sigma: float = 0.4
    output_tokens: float = 60.0
    """The median; ``output_sigma`` is the spread of its logarithm."""
    output_sigma: float = 0.6
    send_headers: bool = True
    """False: say nothing about limits, not even ``Retry-After``."""
    error_rate: float = 0.0
    throttle_rate: float = 0.0
    hang_rate: float = 0.0
    cut_rate: float = 0.0
    garbage_rate: float = 0.0
    trickle_rate: float = 0.0
    hang_s: float = 3600.0
    require_key: str | None = None
    seed: int | None = None
    """None: faults, latency and length differ from run to run."""

    def __post_init__(self) -> None:
        Limits.__post_init__(self)  # super() does not find its class where there are slots
        rates = [rate for _, rate in self.faults()]
        if any(not 0 <= rate <= 1 for rate in rates) or sum(rates) > 1 + 1e-9:
            raise ValueError("the rates of faults must be 0 to 1 each and together")
        for name in ("latency_ms", "latency_sigma", "output_sigma", "hang_s"):
            if not 0 <= cast("float", getattr(self, name)) < math.inf:
                raise ValueError(f"{name} must not be negative")
        if self.output_tokens < 1:
            raise ValueError("output_tokens must be at least 1")

    def faults(self) -> tuple[tuple["Fault", float], ...]:
        """List what can go wrong with its rate."""
        return (
            ("error", self.error_rate),
            ("throttle", self.throttle_rate),
            ("hang", self.hang_rate),
            ("cut", self.cut_rate),
            ("garbage", self.garbage_rate),
            ("trickle", self.trickle_rate),
        )


Fault = Literal["error", "throttle", "hang", "cut", "garbage", "trickle"]


# Requests and answers -----------------------------------------------------------------------------

_NO_RAW = msgspec.Raw(b"null")


class _Asked(msgspec.Struct):
    """What the simulator understands of a request; everything else is accepted and ignored."""

    model: str
    messages: msgspec.Raw = _NO_RAW
    input: msgspec.Raw = _NO_RAW
    prompt: msgspec.Raw = _NO_RAW
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    max_output_tokens: int | None = None
    dimensions: int | None = None
    encoding_format: str | None = None
    stream: bool | None = None


class _Message(msgspec.Struct):
    role: str = ""
    content: msgspec.Raw = _NO_RAW


class _Part(msgspec.Struct):
    text: str = ""


_ROUTES = {
    "/v1/chat/completions": "messages",
    "/v1/responses": "input",
    "/v1/embeddings": "input",
    "/v1/completions": "prompt",
    "/v1/moderations": "input",
    "/v1/messages": "messages",
}
_MESSAGES = "/v1/messages"
_WORDS = (
    "A sluice lets through as much as the river below can take, no more and no less, and keeps the "
    "rest behind its gate until there is room for it. "
) * 64
_NORMAL = statistics.NormalDist()
_MOST_OUTPUT_TOKENS = 16_384


@dataclass(frozen=True, slots=True, kw_only=True)
class _Work:
    """One accepted call on its way to an answer."""

    route: str
    asked: _Asked
    digest: bytes
    chance: tuple[float, float, float, float]
    input_tokens: int
    output_tokens: int
    is_cut_short: bool


def _chance(seed: int, digest: bytes, nth: int) -> tuple[float, float, float, float]:
    """Draw four numbers above 0 and below 1."""
    drawn = hashlib.blake2b(digest, digest_size=32, key=struct.pack(">QI", seed % 2**64, nth))
    first, second, third, fourth = struct.unpack(">4Q", drawn.digest())
    scale = 2.0**64 + 2
    return ((first + 1) / scale, (second + 1) / scale, (third + 1) / scale, (fourth + 1) / scale)


def _log_normal(median: float, sigma: float, chance: float) -> float:
    near = min(max(chance, 1e-12), 1 - 1e-12)
    return median * math.exp(sigma * _NORMAL.inv_cdf(near))


def _text_of(raw: msgspec.Raw) -> str:
    """Read the text of a string, of content parts, or of the last message of the user."""
    try:
        return msgspec.json.decode(raw, type=str)
    except msgspec.DecodeError:
        pass
    with contextlib.suppress(msgspec.DecodeError, RecursionError):
        messages = msgspec.json.decode(raw, type=list[_Message])
        for message in reversed(messages):
            if message.role == "user":
                return _text_of(message.content)
    with contextlib.suppress(msgspec.DecodeError, RecursionError):
        return " ".join(part.text for part in msgspec.json.decode(raw, type=list[_Part]))
    with contextlib.suppress(msgspec.DecodeError, RecursionError):
        return " ".join(msgspec.json.decode(raw, type=list[str]))
    return ""


def _text(work: _Work) -> str:
    """Say that it is simulated, repeat the question and fill up to the length that was drawn."""
    asked = getattr(work.asked, _ROUTES[work.route])
    echoed = " ".join(_text_of(asked).split())[:ECHOED_CHARS]
    room = max(0, work.output_tokens * CHARS_PER_TOKEN - len(echoed) - 30)
    begin = work.digest[0] % 143
    return f"[simulated] You said: {echoed}. {_WORDS[begin : begin + room]}".rstrip()


def _answer(work: _Work) -> dict[str, object]:
    """Make the body of a successful answer."""
    name = work.digest.hex()[:24]
    common: dict[str, object] = {
        "model": work.asked.model,
        "system_fingerprint": "sluice-simulator",
    }
    created = int(time.time())
    usage = {
        "prompt_tokens": work.input_tokens,
        "completion_tokens": work.output_tokens,
        "total_tokens": work.input_tokens + work.output_tokens,
    }
    finish = "length" if work.is_cut_short else "stop"
    match work.route:
        case "/v1/chat/completions":
            message = {"role": "assistant", "content": _text(work), "refusal": None}
            choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": finish}
            answer = {"id": f"chatcmpl-{name}", "object": "chat.completion", "created": created}
            return answer | common | {"choices": [choice], "usage": usage}
        case "/v1/completions":
            choice = {"index": 0, "text": _text(work), "logprobs": None, "finish_reason": finish}
            answer = {"id": f"cmpl-{name}", "object": "text_completion", "created": created}
            return answer | common | {"choices": [choice], "usage": usage}
        case "/v1/messages":
            return _message(work, name)
        case "/v1/responses":
            return _response(work, name, created) | common
        case "/v1/embeddings":
            vectors = [
                {"object": "embedding", "index": index, "embedding": vector}
                for index, vector in enumerate(_vectors(work))
            ]
            total = {"prompt_tokens": work.input_tokens, "total_tokens": work.input_tokens}
            return {"object": "list", "data": vectors, "usage": total} | common
        case _:
            empty: dict[str, object] = {}
            nothing = {"flagged": False, "categories": empty, "category_scores": empty}
            results = [nothing for _ in range(_inputs(work.asked.input))]
            return {"id": f"modr-{name}", "results": results} | common


def _message(work: _Work, name: str) -> dict[str, object]:
    """Make a Message as Anthropic's are."""
    return {
        "id": f"msg_{name}",
        "type": "message",
        "role": "assistant",
        "model": work.asked.model,
        "content": [{"type": "text", "text": _text(work)}],
        "stop_reason": "max_tokens" if work.is_cut_short else "end_turn",
        "stop_sequence": None,
        "usage": {
            "input_tokens": work.input_tokens,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": 0,
            "output_tokens": work.output_tokens,
        },
    }


def _response(work: _Work, name: str, created: int) -> dict[str, object]:
    annotations: list[object] = []
    content = {"type": "output_text", "text": _text(work), "annotations": annotations}
    message = {
        "id": f"msg_{name}",
        "type": "message",
        "status": "completed",
        "role": "assistant",
        "content": [content],
    }
    reason = {"reason": "max_output_tokens"} if work.is_cut_short else None
    return {
        "id": f"resp_{name}",
        "object": "response",
        "created_at": created,
        "status": "incomplete" if work.is_cut_short else "completed",
        "error": None,
        "incomplete_details": reason,
        "output": [message],
        "usage": {
            "input_tokens": work.input_tokens,
            "input_tokens_details": {"cached_tokens": 0},
            "output_tokens": work.output_tokens,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": work.input_tokens + work.output_tokens,
        },
    }


def _inputs(raw: msgspec.Raw) -> int:
    """Count the texts of an input: a list of strings or of token lists has many, all else one."""
    with contextlib.suppress(msgspec.DecodeError, RecursionError):
        given = msgspec.json.decode(raw, type=list[str | list[int]])
        return max(1, len(given))
    return 1


def _vectors(work: _Work) -> list[list[float] | str]:
    """Make unit vectors out of the body's digest."""
    size = min(max(work.asked.dimensions or 8, 1), 4096)
    vectors: list[list[float] | str] = []
    for index in range(_inputs(work.asked.input)):
        drawn = hashlib.shake_128(work.digest + index.to_bytes(4, "big")).digest(size * 2)
        raw = [part - 32_767.5 for part in struct.unpack(f">{size}H", drawn)]
        length = math.sqrt(sum(part * part for part in raw))
        vector = [part / length for part in raw]
        if work.asked.encoding_format == "base64":
            vectors.append(base64.b64encode(struct.pack(f"<{size}f", *vector)).decode())
        else:
            vectors.append(vector)
    return vectors


_KINDS_OF_ANTHROPIC = {
    400: "invalid_request_error",
    401: "authentication_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    500: "api_error",
}


def _error_of_anthropic(status: int, message: str) -> dict[str, object]:
    """Make an error body of Anthropic's shape."""
    kind = _KINDS_OF_ANTHROPIC.get(status, "api_error")
    return {"type": "error", "error": {"type": kind, "message": message}}


def _error(message: str, *, kind: str, code: str | None) -> dict[str, object]:
    """Make an error body of OpenAI's shape."""
    return {"error": {"message": message, "type": kind, "param": None, "code": code}}


# The server ---------------------------------------------------------------------------------------


@dataclass(slots=True, kw_only=True)
class Witnessed:
    """An accepted call as the provider saw it. ``digest`` tells its body from others."""

    digest: bytes
    input_tokens: int
    output_tokens: int
    fault: Fault | None
    is_answered: bool = False


class Simulator:
    """A running simulator: ``start`` it, send it calls, read its ``report``, ``stop`` it.

    ``witness`` gets every accepted call but hanging ones by its ``x-request-id``, without any bound: for tests
    that compare call by call.
    """

    def __init__(
        self,
        behaviour: Behaviour,
        *,
        clock: Clock = time.monotonic,
        witness: dict[str, Witnessed] | None = None,
    ) -> None:
        self.behaviour = behaviour
        self.witness = witness
        self.in_flight = 0
        self.statistics = Statistics(now=clock())
        self._clock = clock
        self._limiter = Limiter(behaviour, clock=clock)
        self._seed = time.time_ns() if behaviour.seed is None else behaviour.seed
        self._connections: set[_Connection] = set()
        self._server: asyncio.Server | None = None

    async def start(self) -> str:
        """Listen and return the base URL, which has no ``/v1``."""
        loop = asyncio.get_running_loop()
        try:
            self._server = await loop.create_server(
                lambda: _Connection(self, self._connections),
                self.behaviour.host,
                self.behaviour.port,
                backlog=4096,
            )
        except OSError as error:
            where = f"{self.behaviour.host}:{self.behaviour.port}"
            raise UsageError(f"The simulator cannot listen on {where}: {error.strerror}.") from None
        port = cast("int", self._server.sockets[0].getsockname()[1])
        host = f"[{self.behaviour.host}]" if ":" in self.behaviour.host else self.behaviour.host
        return f"http://{host}:{port}"

    async def stop(self) -> None:
        """Stop listening and drop every connection."""
        if self._server is not None:
            self._server.close()
            for connection in list(self._connections):
                connection.drop()
            await self._server.wait_closed()
            self._server = None

    def reset(self) -> None:
        """Begin report and limits again; calls in flight go on."""
        self.statistics = Statistics(now=self._clock())
        self._limiter = Limiter(self.behaviour, clock=self._clock)

    def change(self, changes: dict[str, object]) -> None:
        """Change some fields of the behaviour; the limits keep what they counted (`Limiter.change`).

        Raises UsageError for an unknown field or a wrong value, and then nothing changed.
        """
        fixed = {"host", "port", "seed"} & changes.keys()
        unknown = changes.keys() - asdict(self.behaviour).keys()
        if fixed or unknown:
            raise UsageError(f"These cannot be changed: {', '.join(sorted(fixed | unknown))}.")
        try:
            changed = msgspec.convert(asdict(self.behaviour) | changes, Behaviour)
        except msgspec.ValidationError as error:
            raise UsageError(f"This is no behaviour: {error}.") from None
        self._limiter.change(changed)
        self.behaviour = changed

    def report(self) -> dict[str, object]:
        """Tell what clients did since the start or the last reset.

        received              calls of the five endpoints, whatever became of them
        invalid, unauthorized refused with 400 or 401 before any limit
        refused               429 because a limit was reached
        refused_by            by which; ``random`` are those of ``throttle_rate``, which were
                              accepted and so are not among ``refused``
        accepted              past the limits; each then is in flight, answered, abandoned by the
                              client, or met one of ``faults``
        accepted_…_tokens     what those were charged; ``input_tokens`` and ``output_tokens`` are
                              of answers that were sent
        called_twice, answered_twice  bodies that were accepted, or answered, more than once
        peak_…_60s            the most that was accepted in any 60 s
        over_limit            by how many calls arrivals, refused ones included, at most exceeded
                              ``rpm`` in any 60 s; ``over_limit_tokens`` likewise
        …_per_second          from ``seconds`` 0 on, all of one length
        """
        counted, behaviour = self.statistics, self.behaviour
        calls, tokens = counted.arrived_calls.peak, counted.arrived_tokens.peak
        return {
            "simulated": True,
            "received": counted.received,
            "invalid": counted.invalid,
            "unauthorized": counted.unauthorized,
            "refused": counted.refused,
            "refused_by": {kind: counted.refused_by[kind] for kind in REFUSED_BY},
            "accepted": counted.accepted,
            "answered": counted.answered,
            "abandoned": counted.abandoned,
            "faults": {name: counted.faults[name] for name, _ in behaviour.faults()},
            "called_twice": counted.bodies.called_twice,
            "answered_twice": counted.bodies.answered_twice,
            "bodies_untracked": counted.bodies.untracked,
            "accepted_input_tokens": counted.accepted_input_tokens,
            "accepted_output_tokens": counted.accepted_output_tokens,
            "input_tokens": counted.input_tokens,
            "output_tokens": counted.output_tokens,
            "peak_calls_60s": counted.accepted_calls.peak,
            "peak_tokens_60s": counted.accepted_tokens.peak,
            "over_limit": 0 if behaviour.rpm is None else max(0, calls - behaviour.rpm),
            "over_limit_tokens": 0 if behaviour.tpm is None else max(0, tokens - behaviour.tpm),
            "in_flight": self.in_flight,
            "peak_in_flight": counted.peak_in_flight,
            "seconds": round(self._clock() - counted.started, 3),
            "accepted_per_second": list(counted.per_second.accepted),
            "accepted_tokens_per_second": list(counted.per_second.accepted_tokens),
            "refused_per_second": list(counted.per_second.refused),
        }

    def handle(self, connection: "_Connection", method: str, path: str, body: bytes) -> None:
        """Answer one request, now or later."""
        if method == "POST" and path in _ROUTES:
            self._call(connection, path, body)
            return
        match method, path:
            case "GET", "/healthz":
                connection.send(200, {"status": "ok", "simulated": True})
            case "GET", "/report":
                connection.send(200, self.report())
            case "GET", "/v1/models":
                model = {"id": "simulated", "object": "model", "created": 0, "owned_by": "sluice"}
                connection.send(200, {"object": "list", "data": [model]})
            case "POST", "/reset":
                self.reset()
                connection.send(200, {"reset": True})
            case "POST", "/behaviour":
                try:
                    self.change(msgspec.json.decode(body, type=dict[str, object]))
                    shown: dict[str, object] = asdict(self.behaviour)
                    connection.send(200, shown | {"require_key": None})
                except (UsageError, msgspec.DecodeError) as error:
                    connection.send_error(400, str(error), kind="invalid_request_error")
            case _:
                text = f"The simulator does not know {method} {path[:100]}."
                connection.send_error(404, text, kind="invalid_request_error")

    def _call(self, connection: "_Connection", route: str, body: bytes) -> None:
        counted, behaviour, now = self.statistics, self.behaviour, self._clock()
        counted.received += 1
        if behaviour.require_key is not None:
            is_message = route == _MESSAGES
            expected = behaviour.require_key if is_message else f"Bearer {behaviour.require_key}"
            given = connection.api_key if is_message else connection.authorization
            if not hmac.compare_digest(given, expected.encode()):
                counted.unauthorized += 1
                text = "Incorrect API key provided."
                connection.send_error(
                    401, text, kind="invalid_request_error", code="invalid_api_key"
                )
                return
        asked, wrong = _asked(route, body)
        if asked is None:
            counted.invalid += 1
            connection.send_error(400, wrong, kind="invalid_request_error")
            return
        work, output_tokens = self._work(route, asked, body)
        input_tokens = work.input_tokens
        counted.arrived_calls.add(1, now)
        counted.arrived_tokens.add(input_tokens + output_tokens, now)
        if behaviour.max_in_flight is not None and self.in_flight >= behaviour.max_in_flight:
            counted.refuse("in_flight", now=now)
            text = f"Too many concurrent requests: Limit {behaviour.max_in_flight}. [simulated]"
            # Without Retry-After: nobody knows when one of the others ends.
            connection.send_error(429, text, kind="requests", code="concurrency_limit_exceeded")
            return
        refusal = self._limiter.admit(input_tokens=input_tokens, output_tokens=output_tokens)
        if refusal is not None:
            counted.refuse(refusal.kind, now=now)
            self._refuse(connection, refusal)
            return
        counted.accept(work.digest, input_tokens=input_tokens, output_tokens=output_tokens, now=now)
        self.in_flight += 1
        counted.peak_in_flight = max(counted.peak_in_flight, self.in_flight)
        connection.begin(work, self._fault(work.chance[0]))

    def _work(self, route: str, asked: _Asked, body: bytes) -> tuple[_Work, int]:
        """Draw how the call will go; return it with the output tokens to charge."""
        behaviour = self.behaviour
        digest = hashlib.sha256(body).digest()[:16]
        chance = _chance(self._seed, digest, self.statistics.bodies.calls(digest))
        size = len(bytes(getattr(asked, _ROUTES[route])))
        input_tokens = math.ceil(size / CHARS_PER_TOKEN) + 3
        if route in {"/v1/embeddings", "/v1/moderations"}:
            wanted = most = 0
        else:
            limits = (asked.max_completion_tokens, asked.max_tokens, asked.max_output_tokens)
            most = next((limit for limit in limits if limit is not None), _MOST_OUTPUT_TOKENS)
            wanted = round(_log_normal(behaviour.output_tokens, behaviour.output_sigma, chance[2]))
        output_tokens = min(max(wanted, 1), most) if most else 0
        work = _Work(
            route=route,
            asked=asked,
            digest=digest,
            chance=chance,
            input_tokens=input_tokens,
            output_tokens=output_tokens,
            is_cut_short=wanted > most,
        )
        reserved = most if most != _MOST_OUTPUT_TOKENS else output_tokens
        return work, reserved if behaviour.charge == "max" else output_tokens

    def _fault(self, chance: float) -> Fault | None:
        for fault, rate in self.behaviour.faults():
            if chance < rate:
                self.statistics.faults[fault] += 1
                self.statistics.refused_by["random"] += fault == "throttle"
                return fault
            chance -= rate
        return None

    def _refuse(self, connection: "_Connection", refusal: Refusal) -> None:
        what = refusal.kind.replace("_", " ")
        per = "min" if refusal.period == "minute" else "day"
        text = (
            f"Rate limit reached on {what} per {per}: Limit {refusal.limit}. "
            f"Please try again in {duration(refusal.wait_s)}. [simulated]"
        )
        connection.send_error(
            429, text, kind=refusal.kind, code="rate_limit_exceeded", retry_s=refusal.wait_s
        )

    def limit_headers(self) -> dict[str, str]:
        """Say what is left of the limits, unless the behaviour keeps silent."""
        return self._limiter.headers() if self.behaviour.send_headers else {}

    def latency_s(self, chance: float) -> float:
        """Draw how long an answer takes."""
        behaviour = self.behaviour
        return _log_normal(behaviour.latency_ms, behaviour.latency_sigma, chance) / 1000


def _asked(route: str, body: bytes) -> tuple[_Asked | None, str]:
    """Read a request; None and a sentence where OpenAI would answer 400."""
    try:
        asked = msgspec.json.decode(body, type=_Asked)
    except (msgspec.DecodeError, RecursionError) as error:
        return None, f"The body is not a request: {error}."
    needed = _ROUTES[route]
    if bytes(getattr(asked, needed))[:1] not in {b"[", b'"', b"{"}:
        return None, f"Missing required parameter: '{needed}'."
    if route == _MESSAGES and asked.max_tokens is None:
        return None, "max_tokens: Field required"
    if asked.stream:
        return None, "The simulator does not stream."
    return asked, ""


class _Connection(asyncio.Protocol):
    """One client connection: HTTP/1.1 with keep-alive, one request at a time."""

    def __init__(self, simulator: Simulator, all_open: "set[_Connection]") -> None:
        self._simulator = simulator
        self._all_open = all_open
        self._parser = httptools.HttpRequestParser(self)
        self._transport: asyncio.Transport | None = None
        self._work: _Work | None = None
        self._witnessed: Witnessed | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._is_busy = False
        self._speaks_anthropic = False
        self._forget_request()

    def _forget_request(self) -> None:
        self._url = b""
        self._body: list[bytes] = []
        self._size = 0
        self._expects_continue = False
        self.authorization = b""
        self.api_key = b""

    def drop(self) -> None:
        """Close at once."""
        if self._transport is not None:
            self._transport.abort()

    # asyncio calls these.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        self._all_open.add(self)

    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade):
            self.drop()

    def connection_lost(self, exc: Exception | None) -> None:
        del exc
        self._all_open.discard(self)
        if self._work is not None:
            self._simulator.statistics.abandoned += 1
            self._end()

    # httptools calls these.

    def on_url(self, url: bytes) -> None:
        self._url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        match name.lower():
            case b"authorization":
                self.authorization = value
            case b"x-api-key":
                self.api_key = value
            case b"expect":
                self._expects_continue = value.lower() == b"100-continue"
            case _:
                pass

    def on_headers_complete(self) -> None:
        if self._expects_continue and self._transport is not None:
            self._transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    def on_body(self, body: bytes) -> None:
        self._size += len(body)
        if self._size <= MOST_BODY_BYTES:
            self._body.append(body)

    def on_message_complete(self) -> None:
        if self._is_busy:  # pipelining, which no client of a model does
            self.drop()
            return
        self._is_busy = True
        method = self._parser.get_method().decode("latin-1")
        path = self._url.partition(b"?")[0].decode("latin-1")
        body = b"".join(self._body)
        self._speaks_anthropic = path == _MESSAGES
        if self._size > MOST_BODY_BYTES:
            self.send_error(413, "The body is too large.", kind="invalid_request_error")
        else:
            self._simulator.handle(self, method, path, body)
        self._forget_request()

    # Answering.

    def send(
        self, status: int, body: dict[str, object], headers: dict[str, str] | None = None
    ) -> None:
        """Send a JSON answer at once and be ready for the next request."""
        if self._transport is not None:
            self._transport.write(self._framed(status, msgspec.json.encode(body), headers or {}))
        self._is_busy = False

    def send_error(
        self,
        status: int,
        message: str,
        *,
        kind: str,
        code: str | None = None,
        retry_s: float | None = None,
    ) -> None:
        """Send an error in the shape of its API at once, with the limits where there are any."""
        headers = self._simulator.limit_headers()
        if retry_s is not None and self._simulator.behaviour.send_headers:
            headers["retry-after"] = str(math.ceil(retry_s))
            headers["retry-after-ms"] = str(math.ceil(retry_s * 1000))
        self.send(status, self._told(status, message, kind=kind, code=code), headers)

    def _told(self, status: int, message: str, *, kind: str, code: str | None) -> dict[str, object]:
        if self._speaks_anthropic:
            return _error_of_anthropic(status, message)
        return _error(message, kind=kind, code=code)

    def _framed(self, status: int, body: bytes, headers: dict[str, str]) -> bytes:
        phrase = HTTPStatus(status).phrase
        told = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        head = (
            f"HTTP/1.1 {status} {phrase}\r\ncontent-type: application/json\r\n"
            f"content-length: {len(body)}\r\nx-sluice-simulated: true\r\n{told}\r\n"
        )
        return head.encode("latin-1") + body

    def begin(self, work: _Work, fault: Fault | None) -> None:
        """Work on an accepted call: its answer, or its fault, comes after its latency."""
        self._work = work
        loop, simulator = asyncio.get_running_loop(), self._simulator
        if fault == "hang":
            self._timer = loop.call_later(simulator.behaviour.hang_s, self.drop)
            return
        # The limits' state belongs to the arrival; real providers send it as of then, too.
        headers = simulator.limit_headers()
        request_id = f"req_{work.digest.hex()[:20]}{simulator.statistics.accepted:08x}"
        headers["x-request-id"] = request_id
        if simulator.witness is not None:
            self._witnessed = simulator.witness[request_id] = Witnessed(
                digest=work.digest,
                input_tokens=work.input_tokens,
                output_tokens=work.output_tokens,
                fault=fault,
            )
        wait = simulator.latency_s(work.chance[1])
        if wait > 0:
            self._timer = loop.call_later(wait, self._answer, work, fault, headers)
        else:
            self._answer(work, fault, headers)

    def _answer(self, work: _Work, fault: Fault | None, headers: dict[str, str]) -> None:
        match fault:
            case "error":
                text = "The server had an error while processing your request. [simulated]"
                self._finish_with_error(500, text, kind="server_error", headers=headers)
            case "throttle":
                text = "Rate limit reached for no reason. [simulated]"
                if self._simulator.behaviour.send_headers:
                    headers["retry-after"] = "1"
                self._finish_with_error(429, text, kind="requests", headers=headers)
            case "garbage":
                whole = msgspec.json.encode(_answer(work))
                is_html = work.chance[3] < 0.5  # noqa: PLR2004 - half of them
                body = b"<html>[simulated] gateway</html>" if is_html else whole[: len(whole) // 2]
                self._finish(self._framed(200, body, headers))
            case "cut":
                whole = msgspec.json.encode(_answer(work))
                framed = self._framed(200, whole, headers)
                self._finish(framed[: len(framed) - len(whole) // 2])
                if self._transport is not None:
                    self._transport.close()
            case "trickle":
                body = msgspec.json.encode(_answer(work))
                framed = self._framed(200, body, headers)
                self._trickle(work, framed, len(framed) - len(body))
            case None:
                self._finish(self._framed(200, msgspec.json.encode(_answer(work)), headers))
                self._count_answer(work)
            case "hang":
                raise AssertionError("a hanging call is never answered")
            case _:
                assert_never(fault)

    def _count_answer(self, work: _Work) -> None:
        counted = self._simulator.statistics
        counted.answered += 1
        counted.input_tokens += work.input_tokens
        counted.output_tokens += work.output_tokens
        counted.bodies.answered(work.digest)
        if self._witnessed is not None:
            self._witnessed.is_answered = True

    def _finish_with_error(
        self, status: int, message: str, *, kind: str, headers: dict[str, str]
    ) -> None:
        code = "rate_limit_exceeded" if status == HTTPStatus.TOO_MANY_REQUESTS else None
        body = msgspec.json.encode(self._told(status, message, kind=kind, code=code))
        self._finish(self._framed(status, body, headers))

    def _finish(self, framed: bytes) -> None:
        if self._transport is not None:
            self._transport.write(framed)
        self._end()

    def _trickle(self, work: _Work, rest: bytes, size: int) -> None:
        """Send the next ``size`` bytes, then one byte at a time."""
        if self._transport is None:
            return
        self._transport.write(rest[:size])
        if rest[size:]:
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(TRICKLE_S, self._trickle, work, rest[size:], 1)
        else:
            self._end()
            self._count_answer(work)

    def _end(self) -> None:
        """The call is over: nothing is in flight and the next request may come."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._work = None
        self._is_busy = False
        self._simulator.in_flight -= 1


async def simulate(
    behaviour: Behaviour, *, on_ready: Callable[[Simulator, str], None] | None = None
) -> None:
    """Run a simulator until cancelled; ``on_ready`` gets it with its base URL once it listens."""
    simulator = Simulator(behaviour)
    url = await simulator.start()
    try:
        if on_ready is not None:
            on_ready(simulator, url)
        await asyncio.Event().wait()
    finally:
        await simulator.stop()


def serve(
    behaviour: Behaviour, *, on_ready: Callable[[Simulator, str], None] | None = None
) -> None:
    """Run a simulator in this process until Ctrl-C, on uvloop where there is one."""
    try:
        from uvloop import new_event_loop  # noqa: PLC0415 - not made for Windows
    except ImportError:
        new_event_loop = None
    with (
        contextlib.suppress(KeyboardInterrupt),
        asyncio.Runner(loop_factory=new_event_loop) as runner,
    ):
        runner.run(simulate(behaviour, on_ready=on_ready))
