"""The limits that the simulator keeps: meters that count, and a limiter that admits or refuses.

Three algorithms, each exact:

sliding   at most ``rpm`` in any 60 s, however one looks
fixed     at most ``rpm`` in each minute of the clock, so up to twice as many around its turn
bucket    refills evenly and holds ``bucket_seconds`` of the rate, so a burst of that is allowed

A bucket gives credit, as those of real providers do: a call that is larger than the bucket, but not
than the limit, is admitted when the bucket is full and leaves it in debt. Without that a limit of
60,000 tokens a minute with a bucket of a second would never admit a call of 2,000 tokens.

What counts per day slides over 24 h, whatever the algorithm.
"""

import math
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Literal, Protocol, assert_never

MINUTE_S = 60.0
DAY_S = 86_400.0

Clock = Callable[[], float]
Kind = Literal["requests", "tokens", "input_tokens", "output_tokens"]
Period = Literal["minute", "day"]
HeaderStyle = Literal["openai", "anthropic", "groq"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What is limited, how it is counted, and how it is told. None: any number."""

    rpm: int | None = None
    rpd: int | None = None
    """Requests in any 24 h."""
    tpm: int | None = None
    input_tpm: int | None = None
    output_tpm: int | None = None
    max_in_flight: int | None = None
    """More calls at once are refused as soon as they come and count towards no other limit."""
    algorithm: Literal["sliding", "fixed", "bucket"] = "sliding"
    bucket_seconds: float = 60.0
    header_style: HeaderStyle = "openai"
    """Whose names the headers have: OpenAI's ``x-ratelimit-limit-requests``, with ``-day`` for
    ``rpd``; Anthropic's, whose resets are times and which know no ``rpd``; or Groq's, which have
    OpenAI's names, tell ``rpd`` as the limit of requests, and keep silent about ``rpm``."""

    def __post_init__(self) -> None:
        named = {
            "rpm": self.rpm,
            "rpd": self.rpd,
            "tpm": self.tpm,
            "input_tpm": self.input_tpm,
            "output_tpm": self.output_tpm,
            "max_in_flight": self.max_in_flight,
        }
        for name, limit in named.items():
            if limit is not None and limit < 1:
                raise ValueError(f"{name} must be at least 1")
        if self.bucket_seconds <= 0:
            raise ValueError("bucket_seconds must be above 0")

    def of_rate(self) -> dict[tuple[Kind, Period], int]:
        """List the limits of a rate, by what they count and for how long."""
        given: dict[tuple[Kind, Period], int | None] = {
            ("requests", "minute"): self.rpm,
            ("requests", "day"): self.rpd,
            ("tokens", "minute"): self.tpm,
            ("input_tokens", "minute"): self.input_tpm,
            ("output_tokens", "minute"): self.output_tpm,
        }
        return {key: limit for key, limit in given.items() if limit is not None}


# Meters -------------------------------------------------------------------------------------------


class Meter(Protocol):
    """Counts one thing, calls or tokens, against one limit."""

    limit: int
    """What fits into a window. It may be changed: what was counted still counts."""

    def remaining(self, now: float) -> int:
        """How much fits now."""
        ...

    def wait_s(self, amount: int, now: float) -> float:
        """How long until ``amount`` fits; 0 if it fits now. What never fits waits a window."""
        ...

    def reset_s(self, now: float) -> float:
        """How long until the whole limit is free again, if nothing comes."""
        ...

    def add(self, amount: int, now: float) -> None:
        """Count ``amount``, which must fit."""
        ...


class SlidingMeter:
    """At most ``limit`` in any window: what came at second 0 counts until just before second 60."""

    def __init__(self, limit: int, *, window_s: float = MINUTE_S) -> None:
        self.limit = limit
        self._window_s = window_s
        self._used = 0
        self._arrivals: deque[tuple[float, int]] = deque()

    def _forget(self, now: float) -> None:
        while self._arrivals and self._arrivals[0][0] + self._window_s <= now:
            self._used -= self._arrivals.popleft()[1]

    def remaining(self, now: float) -> int:
        self._forget(now)
        return max(0, self.limit - self._used)

    def wait_s(self, amount: int, now: float) -> float:
        self._forget(now)
        missing = amount - (self.limit - self._used)  # more than was used, after a smaller limit
        if missing <= 0:
            return 0.0
        for arrived, freed in self._arrivals:
            missing -= freed
            if missing <= 0:
                return arrived + self._window_s - now
        return self._window_s

    def reset_s(self, now: float) -> float:
        self._forget(now)
        return self._arrivals[-1][0] + self._window_s - now if self._arrivals else 0.0

    def add(self, amount: int, now: float) -> None:
        self._used += amount
        self._arrivals.append((now, amount))


class FixedMeter:
    """At most ``limit`` in each 60 s of the clock."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._used = 0
        self._minute = -1

    def remaining(self, now: float) -> int:
        minute = math.floor(now / MINUTE_S)
        if minute != self._minute:
            self._minute, self._used = minute, 0
        return max(0, self.limit - self._used)

    def wait_s(self, amount: int, now: float) -> float:
        return 0.0 if amount <= self.remaining(now) else (self._minute + 1) * MINUTE_S - now

    def reset_s(self, now: float) -> float:
        self.remaining(now)  # turns the minute
        return (self._minute + 1) * MINUTE_S - now if self._used else 0.0

    def add(self, amount: int, now: float) -> None:
        self.remaining(now)  # turns the minute
        self._used += amount


class BucketMeter:
    """A token bucket: full at first, refilled evenly, holding ``seconds`` of the rate."""

    def __init__(self, limit: int, *, seconds: float) -> None:
        self.limit = limit
        self._seconds = seconds
        self._missing = 0.0
        """From full; more than the bucket holds where it is in debt."""
        self._at: float | None = None

    @property
    def _capacity(self) -> float:
        return max(1.0, self.limit * self._seconds / MINUTE_S)

    @property
    def _per_s(self) -> float:
        return self.limit / MINUTE_S

    def _level(self, now: float) -> float:
        if self._at is not None:
            self._missing = max(0.0, self._missing - (now - self._at) * self._per_s)
        self._at = now
        return self._capacity - self._missing

    def remaining(self, now: float) -> int:
        # A hair of rounding must not refuse a call.
        return max(0, math.floor(self._level(now) + 1e-9))

    def wait_s(self, amount: int, now: float) -> float:
        level, needed = self._level(now), min(amount, self._capacity)
        if amount > max(self.limit, self._capacity):
            return MINUTE_S
        return 0.0 if needed <= level + 1e-9 else (needed - level) / self._per_s

    def reset_s(self, now: float) -> float:
        self._level(now)
        return self._missing / self._per_s

    def add(self, amount: int, now: float) -> None:
        self._level(now)
        self._missing += amount


# Admission ----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusal:
    """Which limit an arrival exceeds, and when it would fit."""

    kind: Kind
    period: Period = "minute"
    limit: int
    wait_s: float


class Limiter:
    """Admits or refuses arrivals; every limit must have room, else none is charged."""

    def __init__(
        self, limits: Limits, *, clock: Clock = time.monotonic, wall: Clock = time.time
    ) -> None:
        self._limits = limits
        self._clock = clock
        self._wall = wall
        self._meters: dict[tuple[Kind, Period], Meter] = {
            (kind, period): _meter(limits, limit, period)
            for (kind, period), limit in limits.of_rate().items()
        }

    def change(self, limits: Limits) -> None:
        """Keep other limits from now on; what was counted so far still counts.

        A limit that is new counts from now, and all of a minute do where the algorithm changes.
        """
        now = self._clock()
        is_alike = _algorithm(limits) == _algorithm(self._limits)
        self._limits = limits
        known, self._meters = self._meters, {}
        for (kind, period), limit in limits.of_rate().items():
            meter = known.get((kind, period)) if is_alike or period == "day" else None
            if meter is None:
                meter = _meter(limits, limit, period)
            else:
                meter.remaining(now)  # until now a bucket was refilled at the old rate
                meter.limit = limit
            self._meters[kind, period] = meter

    def admit(self, *, input_tokens: int = 0, output_tokens: int = 0) -> Refusal | None:
        """Count one call with its tokens, or say why not."""
        now = self._clock()
        amounts: dict[Kind, int] = {
            "requests": 1,
            "tokens": input_tokens + output_tokens,
            "input_tokens": input_tokens,
            "output_tokens": output_tokens,
        }
        refusals = [
            Refusal(kind=kind, period=period, limit=meter.limit, wait_s=wait)
            for (kind, period), meter in self._meters.items()
            if (wait := meter.wait_s(amounts[kind], now)) > 0
        ]
        if refusals:
            return max(refusals, key=lambda refusal: refusal.wait_s)
        for (kind, _), meter in self._meters.items():
            meter.add(amounts[kind], now)
        return None

    def headers(self) -> dict[str, str]:
        """Say what is left, in the style of the provider that is simulated."""
        now = self._clock()
        told: dict[str, str] = {}
        for (kind, period), meter in self._meters.items():
            names = _names(self._limits.header_style, kind, period)
            if names is None:
                continue
            limit, remaining, reset = names
            reset_s = meter.reset_s(now)
            told[limit] = str(meter.limit)
            told[remaining] = str(meter.remaining(now))
            if self._limits.header_style == "anthropic":
                told[reset] = _time(self._wall() + reset_s)
            else:
                told[reset] = duration(reset_s)
        return told


def _algorithm(limits: Limits) -> tuple[str, float]:
    return limits.algorithm, limits.bucket_seconds if limits.algorithm == "bucket" else 0.0


def _meter(limits: Limits, limit: int, period: Period) -> Meter:
    if period == "day":
        return SlidingMeter(limit, window_s=DAY_S)
    match limits.algorithm:
        case "sliding":
            return SlidingMeter(limit)
        case "fixed":
            return FixedMeter(limit)
        case "bucket":
            return BucketMeter(limit, seconds=limits.bucket_seconds)
        case _:
            assert_never(limits.algorithm)


def _names(style: HeaderStyle, kind: Kind, period: Period) -> tuple[str, str, str] | None:
    """Name the headers of a limit, what remains of it, and its reset; None: it is not told."""
    what = kind.replace("_", "-")
    match style, period:
        case "anthropic", "minute":
            before = f"anthropic-ratelimit-{what}-"
            return f"{before}limit", f"{before}remaining", f"{before}reset"
        case "anthropic", "day":
            return None
        case "groq", "minute" if kind == "requests":
            return None
        case "openai", "day":
            what += "-day"
        case _:
            pass
    return f"x-ratelimit-limit-{what}", f"x-ratelimit-remaining-{what}", f"x-ratelimit-reset-{what}"


def duration(seconds: float) -> str:
    """Write a duration as OpenAI does: ``20ms``, ``1.5s``, ``6m0s``, ``23h59m0s``."""
    milliseconds = math.ceil(seconds * 1000)
    if milliseconds < 1000:  # noqa: PLR2004 - of a second
        return f"{milliseconds}ms"
    minutes, rest = divmod(milliseconds, 60_000)
    hours, minutes = divmod(minutes, 60)
    told = f"{hours}h" if hours else ""
    return told + (f"{minutes}m" if hours or minutes else "") + f"{rest / 1000:g}s"


def _time(epoch_s: float) -> str:
    """Write a time as Anthropic does (RFC 3339, whole seconds), never too early."""
    return datetime.fromtimestamp(math.ceil(epoch_s), UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
