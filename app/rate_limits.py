"""What a provider says about its limits: how much it allows, and when to come back.

Headers are the only source, their names are in lower case, and nobody agrees on them:

OpenAI, Azure, vLLM…  ``x-ratelimit-limit-requests``, ``-tokens``, ``-input-tokens``, ``-output-tokens``
Groq                  the same names, but requests are per day
Fireworks             ``x-ratelimit-limit-tokens-prompt``, ``-tokens-generated``
Mistral, Cerebras     ``x-ratelimit-limit-req-minute``, ``-requests-day``, ``-tokens-month``
Anthropic             ``anthropic-ratelimit-input-tokens-limit``; resets are times (RFC 3339)
Together              ``x-ratelimit-limit``, ``x-tokenlimit-limit``: per second
gateways              ``x-ratelimit-limit-minute``; ``ratelimit-limit: 100;w=60`` (IETF draft)

Each has companions with ``remaining`` and ``reset`` in place of ``limit``. Azure says the seconds of
the window as ``x-ratelimit-renewalperiod-requests``. Other names, such as a ``x-ratelimit-limit`` that
does not say of what and per what, are passed over: half a statement is worse than none.

Nothing here raises, whatever the headers hold.
"""

import functools
import math
import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from email.utils import mktime_tz, parsedate_tz
from typing import Literal

MOST_RETRY_AFTER_S = 86_400.0
MOST_RESET_S = 32 * 86_400.0
"""No limit we know is for longer than a month; a longer reset is a misunderstanding."""

MOST_VALUE_CHARS = 100

Kind = Literal["requests", "tokens", "input_tokens", "output_tokens"]
Period = Literal["minute", "hour", "day", "month"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RateLimit:
    """A limit as a provider states it in a reply."""

    kind: Kind
    period: Period
    limit: int
    """Above 0."""
    remaining: int | None
    """0 to ``limit``; None where it does not say, or says it of a shorter time than ``period``."""
    reset_s: float | None
    """Until the whole limit is free again, 0 or more; None likewise."""

    @property
    def used(self) -> int | None:
        """How much of the limit is in use, if nothing else follows from when all is free again.

        A bucket that holds less than a whole period of its limit says that little remains when it is
        full; but full it is, and says so by its reset.
        """
        if self.remaining is None:
            return None
        missing = self.limit - self.remaining
        if self.reset_s is None:
            return missing
        return min(missing, math.ceil(self.limit * self.reset_s / _WINDOWS_S[self.period]))


def rate_limits(headers: Mapping[str, str], *, host: str) -> tuple[RateLimit, ...]:
    """Read the limits that a reply states, at most one of a kind and period: the tightest.

    ``host`` is the provider's, in lower case: Groq and Together mean their own by common names. Limits
    per second are given per minute. A limit of requests that does not say its period is per minute,
    unless its reset shows that it cannot be.
    """
    found: dict[tuple[Kind, Period], RateLimit] = {}
    for name in headers:
        # The hot path: most headers end here.
        if "limit" in name and (stated := _stated(name, host)) is not None:
            limit = _rate_limit(headers, stated)
            if limit is not None:
                known = found.get((limit.kind, limit.period))
                if known is None or limit.limit < known.limit:
                    found[limit.kind, limit.period] = limit
    return tuple(found.values())


def retry_after_s(headers: Mapping[str, str], *, throttled: bool) -> float | None:
    """Read when a provider wants to be asked again; None where it does not say. Names in lower case.

    ``retry-after-ms``, then ``retry-after`` in seconds or as a date. A throttled response without
    either: the latest reset of a limit of which nothing remains. Where none is spent, the latest reset
    that says nothing of what remains; or else the soonest of a token limit, for one of those was too
    small for this call, while one request fits wherever any remains.

    Dates are seen from the response's own ``date``, so that clocks need not agree.
    """
    now = headers.get("date")
    found = _number(headers.get("retry-after-ms"))
    found = _wait_s(headers.get("retry-after"), now) if found is None else found / 1000
    if found is None and throttled:
        resets = list(_resets(headers))
        spent = [reset for _, remaining, reset in resets if remaining == 0]
        unsaid = [reset for _, remaining, reset in resets if remaining is None]
        of_tokens = [reset for kind, _, reset in resets if kind != "requests"]
        found = max(spent or unsaid, default=min(of_tokens, default=None))
    return None if found is None else min(max(found, 0.0), MOST_RETRY_AFTER_S)


# Names ----------------------------------------------------------------------------------------------

_KINDS: dict[str, Kind] = {
    "requests": "requests",
    "req": "requests",
    "tokens": "tokens",
    "input-tokens": "input_tokens",
    "prompt-tokens": "input_tokens",
    "tokens-prompt": "input_tokens",
    "output-tokens": "output_tokens",
    "completion-tokens": "output_tokens",
    "tokens-generated": "output_tokens",
}
_KIND = "|".join(sorted(_KINDS, key=len, reverse=True))
_FIELD = "limit|remaining|reset"
_NAME = re.compile(
    rf"(?P<before>x-ratelimit-)(?P<field>{_FIELD})"
    rf"(?P<after>(?:-(?P<kind>{_KIND}))?(?:-(?P<period>second|minute|hour|day|month))?)"
)
_NAME_OF_ANTHROPIC = re.compile(
    rf"(?P<before>anthropic-ratelimit-(?P<kind>{_KIND})-)(?P<field>{_FIELD})(?P<after>)"
)
_NAME_OF_DRAFT = re.compile(rf"(?P<before>ratelimit-)(?P<field>{_FIELD})(?P<after>)")
_NAME_OF_TOGETHER = re.compile(rf"(?P<before>x-tokenlimit-)(?P<field>{_FIELD})(?P<after>)")

_WINDOWS_S = {"second": 1, "minute": 60, "hour": 3_600, "day": 86_400, "month": 30 * 86_400}
_PERIODS: dict[int, Period] = {
    60: "minute",
    3_600: "hour",
    86_400: "day",
    30 * 86_400: "month",
}
_MINUTE_S, _HOUR_S, _DAY_S = 60, 3_600, 86_400
_MOST_MINUTE_S, _MOST_HOUR_S = 65, 3_660
"""A reset may be a little longer than its window: a bucket in debt, a rounded second."""


@dataclass(frozen=True, slots=True)
class _Stated:
    """What the name of a limit's header says, and the names of its companions."""

    kind: Kind
    window_s: int | None
    """None: the name does not say."""
    needs_window: bool
    """Whether the limit means nothing unless its value says the window."""
    limit: str
    remaining: str
    reset: str
    renewal: str


def _match(name: str) -> tuple[re.Match[str], Kind] | None:
    for pattern in (_NAME, _NAME_OF_ANTHROPIC, _NAME_OF_DRAFT, _NAME_OF_TOGETHER):
        if (found := pattern.fullmatch(name)) is not None:
            kind = "tokens" if pattern is _NAME_OF_TOGETHER else "requests"
            return found, _KINDS.get(found.groupdict().get("kind") or "", kind)
    return None


@functools.lru_cache(maxsize=1024)
def _stated(name: str, host: str) -> _Stated | None:
    """Understand the name of a limit; None: it is none. Cached, for every reply has the same ones."""
    match = _match(name)
    if match is None or match[0]["field"] != "limit":
        return None
    found, kind = match
    before, after = found["before"], found["after"]
    window_s = _WINDOWS_S.get(found.groupdict().get("period") or "")
    says_kind = bool(found.groupdict().get("kind"))
    is_common = before.startswith("x-") and not says_kind
    if window_s is None and is_common and host.endswith(("together.ai", "together.xyz")):
        window_s = _WINDOWS_S["second"]
    if window_s is None and host.endswith("groq.com") and kind == "requests" and says_kind:
        window_s = _DAY_S
    return _Stated(
        kind=kind,
        window_s=window_s,
        needs_window=window_s is None and not says_kind,
        limit=name,
        remaining=f"{before}remaining{after}",
        reset=f"{before}reset{after}",
        renewal=f"{before}renewalperiod{after}",
    )


def _resets(headers: Mapping[str, str]) -> Iterator[tuple[Kind, int | None, float]]:
    """List kind, what remains, and the seconds until all is free, also where no limit is stated."""
    for name in headers:
        if "reset" not in name:
            continue
        match = _match(name)
        if match is not None and match[0]["field"] == "reset":
            found, kind = match
            wait = _wait_s(headers[name], headers.get("date"))
            if wait is not None:
                remaining = headers.get(f"{found['before']}remaining{found['after']}")
                yield kind, _count(remaining), wait


# Values ---------------------------------------------------------------------------------------------


def _rate_limit(headers: Mapping[str, str], stated: _Stated) -> RateLimit | None:
    text, window_s = headers[stated.limit], stated.window_s
    limit = _count(text)
    if ";" in text:
        limit, window_s = _quota(text)
    elif stated.needs_window:
        return None
    if not limit:
        return None  # of 0 it is a model that the account does not have
    remaining = _count(headers.get(stated.remaining))
    reset_s = _wait_s(headers.get(stated.reset), headers.get("date"))
    if reset_s is not None:
        reset_s = max(reset_s, 0.0) if reset_s <= MOST_RESET_S else None
    if window_s is None and (renewal := headers.get(stated.renewal)) is not None:
        window_s = _count(renewal)
    if window_s is None:
        window_s = _MINUTE_S
        if stated.kind == "requests":
            window_s = _window_s(limit, remaining=remaining, reset_s=reset_s)
    if 0 < window_s < _MINUTE_S and _MINUTE_S % window_s == 0:
        # What remains of a second, and when the next one comes, says nothing of the minute.
        limit, remaining, reset_s = limit * (_MINUTE_S // window_s), None, None
        window_s = _MINUTE_S
    period = _PERIODS.get(window_s)
    if period is None:
        return None
    return RateLimit(
        kind=stated.kind,
        period=period,
        limit=limit,
        remaining=None if remaining is None else min(remaining, limit),
        reset_s=reset_s,
    )


def _window_s(limit: int, *, remaining: int | None, reset_s: float | None) -> int:
    """Guess the window of a limit of requests from its reset: a minute is free after a minute.

    A day's limit that refills evenly, as OpenAI's does for small accounts (200 a day, 199 remain, all
    free in 7m12s), shows by that arithmetic. Below a minute it is not tried: a minute's window that
    has just begun can look the same, and to take a minute's limit for a day's stops the work, while
    the reverse only earns a 429.
    """
    if reset_s is None or reset_s <= _MOST_MINUTE_S:
        return _MINUTE_S
    if reset_s > _MOST_HOUR_S:
        return _DAY_S
    used = 0 if remaining is None else limit - remaining
    one_s = _DAY_S / limit
    refills_in_a_day = used > 0 and (used - 1) * one_s - 1 <= reset_s <= used * one_s + 1
    return _DAY_S if refills_in_a_day else _HOUR_S


_COUNT = re.compile(r"([0-9]{1,15})(?:\.[0-9]*)?")
_QUOTA = re.compile(r" *([0-9]{1,15}) *; *w *= *([0-9]{1,9}) *")


def _count(text: str | None) -> int | None:
    if text and len(text) <= 15 and text.isascii() and text.isdigit():  # noqa: PLR2004 - as `_COUNT`
        return int(text)  # twice as fast, and what nearly all are
    found = _COUNT.fullmatch(text) if text and len(text) <= MOST_VALUE_CHARS else None
    return int(found[1]) if found else None


def _quota(text: str) -> tuple[int | None, int | None]:
    """Read ``100;w=60`` or ``100, 100;w=60``; nothing where several windows are stated."""
    parts = text[:MOST_VALUE_CHARS].split(",")
    quotas = {(int(q[1]), int(q[2])) for part in parts if (q := _QUOTA.fullmatch(part))}
    plain = {count for part in parts if (count := _count(part.strip())) is not None}
    if len(quotas) != 1 or len(plain) + 1 != len(parts):
        return None, None
    (limit, window_s), *_ = quotas
    return (limit, window_s) if plain <= {limit} else (None, None)


_DURATION = re.compile(
    r"(?:(\d+)d)?(?:(\d+)h)?(?:(\d+)m(?!s))?(?:(\d+(?:\.\d+)?)s)?(?:(\d+(?:\.\d+)?)ms)?"
)
_DURATION_UNITS_S = (86_400.0, 3_600.0, 60.0, 1.0, 0.001)
_EPOCH_S, _EPOCH_MS = 1e9, 1e11
"""Numbers from here on are times, in seconds (since 2001) or milliseconds (since 1973)."""


@functools.lru_cache(maxsize=4096)  # the same few milliseconds come again and again
def duration_s(text: str | None) -> float | None:
    """Read ``6m0s``, ``2m59.56s``, ``1h2m3s``, ``200ms`` or plain seconds."""
    if not text or len(text) > MOST_VALUE_CHARS:
        return None
    found = _DURATION.fullmatch(text.strip())
    if found is None or not any(found.groups()):
        return _number(text)
    return sum(
        float(part) * unit
        for part, unit in zip(found.groups(), _DURATION_UNITS_S, strict=True)
        if part
    )


def _number(text: str | None) -> float | None:
    try:
        value = float(text or "")
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _wait_s(text: str | None, now: str | None) -> float | None:
    """Read a duration, or a time as the seconds until then; negative where it has passed."""
    found = duration_s(text)
    if found is not None:
        if found < _EPOCH_S:
            return found
        return (found if found < _EPOCH_MS else found / 1000) - _now(now)
    then = _time(text)
    return None if then is None else then - _now(now)


def _now(date: str | None) -> float:
    found = _time(date)
    return time.time() if found is None else found


def _time(text: str | None) -> float | None:
    """Read a time of RFC 3339 or of HTTP."""
    if not text or len(text) > MOST_VALUE_CHARS:
        return None
    try:
        then = datetime.fromisoformat(text)
        return then.timestamp() if then.tzinfo else None
    except (ValueError, OverflowError):
        pass
    try:
        parsed = parsedate_tz(text)
        return None if parsed is None else float(mktime_tz(parsed))
    except (ValueError, OverflowError, IndexError, TypeError):
        return None
