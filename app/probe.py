"""One real call to a provider, to see whether a connection works, and what is wrong if it does not.

It is made at once, beside the queue, and counted by no limit of ours: where the provider's replies tell
what is left, workers learn of it as of any use from outside.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

import msgspec

from app.addresses import Guard
from app.connections import Route
from app.presets import key_header_of, protocol_of
from app.provider import Answered, Call, Endpoint, Provider, Rejected, Throttled, Unreachable

_QUESTION: Final = b'{"messages":[{"role":"user","content":"Reply with the word OK."}]}'
_MOST_RESPONSE_BYTES: Final = 1024 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """What the call found. ``remedy``: what to do about it, None where nothing is wrong."""

    ok: bool
    code: str
    message: str
    remedy: str | None
    status_code: int | None
    latency_ms: int
    request_id: str | None
    input_tokens: int | None = None
    output_tokens: int | None = None


_ADDRESS: Final = "Check the connection's baseUrl."
_KEY: Final = "Enter the provider's key again (config.apiKey), and check what it may do."
_LATER: Final = "The connection works; try again later, or raise the limit at the provider."

_REMEDIES: Final[Mapping[str, str]] = MappingProxyType(
    {
        "dns": f"No such host is known. {_ADDRESS}",
        "connect": f"Nothing answers at that address and port. {_ADDRESS} Is a firewall between?",
        "tls": "The server's certificate or protocol is refused; check that https is right there.",
        "timeout": "The provider is slow or unreachable; raise timeoutMs, or check the address.",
        "cut": "The server closed the connection; a proxy may stand between, or it is restarting.",
        "garbage": f"What answers there is not the provider's API. {_ADDRESS} It often ends in /v1.",
        "redirect": f"{_ADDRESS} Give the address that it redirects to.",
        "bad_url": _ADDRESS,
        "address_not_allowed": f"{_ADDRESS} Whether networks of your own may be called, the operator"
        " says (SLUICE_PROVIDER_ALLOW_NETWORKS).",
        "bad_header": "Enter the key and the headers again, without line breaks or odd characters.",
        "unauthorized": _KEY,
        "forbidden": _KEY,
        "payment_required": "Pay the provider, or add credit to the account.",
        "insufficient_quota": "Pay the provider, or add credit to the account.",
        "not_found": "Check the model's name, and whether baseUrl is complete (it often ends in /v1).",
        "rate_limited": _LATER,
        "overloaded": _LATER,
        "concurrency_limited": _LATER,
        "server_error": "The provider has trouble; try again later.",
        "bad_request": "Check the model's name and the resource's defaultArgs.",
        "unprocessable": "Check the model's name and the resource's defaultArgs.",
        "not_a_completion": f"What answers there is something else. {_ADDRESS}",
    }
)


async def probe(route: Route, *, secret: str | None, timeout_s: float, guard: Guard) -> Finding:
    """Ask a resource's model, or whatever ``route`` names, one short question. Never raises."""
    async with Provider(
        max_connections=1, max_response_bytes=_MOST_RESPONSE_BYTES, guard=guard
    ) as provider:
        outcome = await provider.call(
            Call(
                base_url=route.base_url,
                endpoint=Endpoint.chat_completions,
                model=route.model,
                body=_QUESTION,
                timeout_s=min(timeout_s, route.timeout_ms / 1000),
                api_key=secret,
                headers=route.headers,
                default_args=msgspec.json.encode(route.default_args)
                if route.default_args
                else None,
                protocol=protocol_of(route.provider),
                key_header=key_header_of(route.provider),
            )
        )
    match outcome:
        case Answered():
            return _answered(outcome)
        case Rejected() | Throttled() | Unreachable():
            return Finding(
                ok=False,
                code=outcome.code,
                message=outcome.message,
                remedy=_REMEDIES.get(outcome.code, "See what the provider says."),
                status_code=outcome.status_code,
                latency_ms=outcome.latency_ms,
                request_id=outcome.request_id,
            )


class _Choices(msgspec.Struct):
    choices: list[msgspec.Raw]


def _answered(outcome: Answered) -> Finding:
    try:
        is_completion = bool(msgspec.json.decode(outcome.body, type=_Choices).choices)
    except msgspec.DecodeError:
        is_completion = False
    usage = outcome.usage
    return Finding(
        ok=is_completion,
        code="ok" if is_completion else "not_a_completion",
        message="The model answered."
        if is_completion
        else "The server answered with JSON, but with no chat completion.",
        remedy=None if is_completion else _REMEDIES["not_a_completion"],
        status_code=outcome.status_code,
        latency_ms=outcome.latency_ms,
        request_id=outcome.request_id,
        input_tokens=usage.input_tokens if usage else None,
        output_tokens=usage.output_tokens if usage else None,
    )
