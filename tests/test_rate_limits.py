"""What providers say about their limits, one row per provider, and whatever else a header may hold."""

import email.utils
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.rate_limits import (
    MOST_RESET_S,
    MOST_RETRY_AFTER_S,
    RateLimit,
    duration_s,
    rate_limits,
    retry_after_s,
)

DATE = "Sun, 06 Nov 2044 08:49:37 GMT"
LATER = "Sun, 06 Nov 2044 08:50:07 GMT"
EPOCH_S = 2_362_034_977  # DATE

Row = tuple[str, str, int, int | None, float | None]

# Limits -------------------------------------------------------------------------------------------


def read(headers: dict[str, str], host: str = "api.example.com") -> list[Row]:
    return [
        (found.kind, found.period, found.limit, found.remaining, found.reset_s)
        for found in rate_limits(headers, host=host)
    ]


def stated(before: str, after: str, limit: str, remaining: str, reset: str) -> dict[str, str]:
    """One limit with its companions: ``before`` and ``after`` are what is around the field's name."""
    return {
        f"{before}limit{after}": limit,
        f"{before}remaining{after}": remaining,
        f"{before}reset{after}": reset,
    }


PROVIDERS: dict[str, tuple[str, dict[str, str], list[Row]]] = {
    "openai": (
        "api.openai.com",
        stated("x-ratelimit-", "-requests", "5000", "4999", "12ms")
        | stated("x-ratelimit-", "-tokens", "160000", "149984", "6m0s")
        | {"x-ratelimit-limit-tokens_usage_based": "160000", "x-request-id": "req_1"},
        [("requests", "minute", 5000, 4999, 0.012), ("tokens", "minute", 160_000, 149_984, 360.0)],
    ),
    "openai, a small account": (
        "api.openai.com",
        stated("x-ratelimit-", "-requests", "200", "199", "7m12s"),
        [("requests", "day", 200, 199, 432.0)],
    ),
    "azure": (
        "x.openai.azure.com",
        stated("x-ratelimit-", "-requests", "2500", "2499", "24")
        | stated("x-ratelimit-", "-tokens", "250000", "249993", "1")
        | {"x-ratelimit-renewalperiod-requests": "60", "x-ratelimit-renewalperiod-tokens": "60"},
        [("requests", "minute", 2500, 2499, 24.0), ("tokens", "minute", 250_000, 249_993, 1.0)],
    ),
    "azure, requests per ten seconds": (
        "x.openai.azure.com",
        {
            "x-ratelimit-limit-requests": "50",
            "x-ratelimit-remaining-requests": "45",
            "x-ratelimit-renewalperiod-requests": "10",
        },
        [("requests", "minute", 300, None, None)],
    ),
    "azure, no limits": (
        "x.openai.azure.com",
        {"x-ratelimit-remaining-requests": "19", "x-ratelimit-remaining-tokens": "19913"},
        [],
    ),
    "groq": (
        "api.groq.com",
        stated("x-ratelimit-", "-requests", "14400", "14370", "59.56s")
        | stated("x-ratelimit-", "-tokens", "18000", "17997", "7.66s"),
        [("requests", "day", 14_400, 14_370, 59.56), ("tokens", "minute", 18_000, 17_997, 7.66)],
    ),
    "mistral": (
        "api.mistral.ai",
        {
            "x-ratelimit-limit-tokens-minute": "5000000",
            "x-ratelimit-remaining-tokens-minute": "4999911",
            "x-ratelimit-limit-tokens-5-minute": "9",
            "x-ratelimit-limit-tokens-month": "10000000000",
            "x-ratelimit-tokens-query-cost": "52",
            "x-ratelimit-limit-req-minute": "720",
            "x-ratelimit-remaining-req-minute": "717",
        },
        [
            ("tokens", "minute", 5_000_000, 4_999_911, None),
            ("tokens", "month", 10_000_000_000, None, None),
            ("requests", "minute", 720, 717, None),
        ],
    ),
    "mistral, a model that the account does not have": (
        "api.mistral.ai",
        {"x-ratelimit-limit-req-minute": "0"},
        [],
    ),
    "cerebras": (
        "api.cerebras.ai",
        stated("x-ratelimit-", "-requests-day", "14400", "14399", "33011.382867097855")
        | stated("x-ratelimit-", "-tokens-minute", "60000", "59000", "11.382867097854614"),
        [
            ("requests", "day", 14_400, 14_399, 33_011.382867097855),
            ("tokens", "minute", 60_000, 59_000, 11.382867097854614),
        ],
    ),
    "sambanova": (
        "api.sambanova.ai",
        stated("x-ratelimit-", "-requests", "60", "42", "30")
        | stated("x-ratelimit-", "-requests-day", "12000", "9000", "80000"),
        [("requests", "minute", 60, 42, 30.0), ("requests", "day", 12_000, 9_000, 80_000.0)],
    ),
    "fireworks": (
        "api.fireworks.ai",
        stated("x-ratelimit-", "-requests", "600", "599", "")
        | {
            "x-ratelimit-limit-tokens-prompt": "3600000",
            "x-ratelimit-remaining-tokens-prompt": "3599000",
            "x-ratelimit-limit-tokens-cache-adjusted-prompt": "900000",
            "x-ratelimit-limit-tokens-generated": "36000",
            "x-ratelimit-over-limit": "no",
        },
        [
            ("requests", "minute", 600, 599, None),
            ("input_tokens", "minute", 3_600_000, 3_599_000, None),
            ("output_tokens", "minute", 36_000, None, None),
        ],
    ),
    "together": (
        "api.together.xyz",
        stated("x-ratelimit-", "", "10", "9", "1")
        | stated("x-tokenlimit-", "", "3000", "2900", "1"),
        [("requests", "minute", 600, None, None), ("tokens", "minute", 180_000, None, None)],
    ),
    "anthropic": (
        "api.anthropic.com",
        {"date": DATE}
        | stated("anthropic-ratelimit-requests-", "", "50", "49", "2044-11-06T08:49:38Z")
        | stated("anthropic-ratelimit-input-tokens-", "", "40000", "9000", "2044-11-06T08:50:07Z")
        | stated("anthropic-ratelimit-output-tokens-", "", "8000", "0", "2044-11-06T09:49:37+01:00")
        | stated("anthropic-ratelimit-tokens-", "", "48000", "9000", "2044-11-06T08:49:07Z")
        | {"anthropic-ratelimit-unified-status": "allowed"},
        [
            ("requests", "minute", 50, 49, 1.0),
            ("input_tokens", "minute", 40_000, 9_000, 30.0),
            ("output_tokens", "minute", 8_000, 0, 0.0),
            ("tokens", "minute", 48_000, 9_000, 0.0),
        ],
    ),
    "baidu": (
        "qianfan.baidubce.com",
        stated("x-ratelimit-", "-input-tokens", "300000", "299000", "3")
        | stated("x-ratelimit-", "-output-tokens", "30000", "29000", "3"),
        [
            ("input_tokens", "minute", 300_000, 299_000, 3.0),
            ("output_tokens", "minute", 30_000, 29_000, 3.0),
        ],
    ),
    "openrouter: of what, and per what?": (
        "openrouter.ai",
        stated("x-ratelimit-", "", "20", "0", "2362034979000"),
        [],
    ),
    "kong": (
        "gateway",
        {"x-ratelimit-limit-minute": "100", "x-ratelimit-remaining-minute": "7"}
        | stated("ratelimit-", "", "100", "7", "20"),
        [("requests", "minute", 100, 7, None)],
    ),
    "the IETF draft": (
        "gateway",
        stated("ratelimit-", "", "100, 100;w=60", "7", "20"),
        [("requests", "minute", 100, 7, 20.0)],
    ),
    "the IETF draft, several windows": (
        "gateway",
        stated("ratelimit-", "", "10, 10;w=1, 100;w=60", "7", "20"),
        [],
    ),
    "nothing": ("host", {"content-type": "application/json", "x-request-id": "r"}, []),
}


@pytest.mark.parametrize("provider", PROVIDERS)
def test_limits_are_read_as_providers_state_them(provider: str) -> None:
    host, headers, expected = PROVIDERS[provider]
    assert read(headers, host) == expected


@pytest.mark.parametrize(
    ("reset", "remaining", "period"),
    [
        ("0s", "500", "minute"),
        ("1m0s", "400", "minute"),
        ("1m5s", "400", "minute"),
        ("1m6s", "400", "hour"),
        ("1h1m0s", "400", "hour"),
        ("1h1m1s", "400", "day"),
        ("23h0m0s", "400", "day"),
        ("8m38.4s", "497", "day"),  # three of 500 that come back one by one, each after 172.8 s
        ("tomorrow", "400", "minute"),
    ],
)
def test_a_reset_shows_that_requests_are_not_per_minute(
    reset: str, remaining: str, period: str
) -> None:
    [found] = rate_limits(stated("x-ratelimit-", "-requests", "500", remaining, reset), host="")
    assert (found.kind, found.period, found.limit) == ("requests", period, 500)


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        (stated("x-ratelimit-", "-tokens", "100.0", "7.9", "1"), ("minute", 100, 7, 1.0)),
        (stated("x-ratelimit-", "-tokens", "100", "900", "-1"), ("minute", 100, 100, 0.0)),
        (stated("x-ratelimit-", "-tokens", "100", "-9", "nan"), ("minute", 100, None, None)),
        (stated("x-ratelimit-", "-tokens", "100", "9,9", "1" * 5000), ("minute", 100, None, None)),
        (stated("x-ratelimit-", "-tokens", "100", "", "99999999"), ("minute", 100, None, None)),
        (stated("x-ratelimit-", "-tokens", "100", "7", "0001-01-01T00:00:00+14:00"), None),
        (stated("x-ratelimit-", "-tokens-second", "5", "1", "1"), ("minute", 300, None, None)),
    ],
)
def test_odd_values_are_bounded_or_left_out(
    headers: dict[str, str], expected: tuple[str, int, int | None, float | None] | None
) -> None:
    found = read(headers)
    assert found == [("tokens", *(expected or ("minute", 100, 7, 0.0)))]


@pytest.mark.parametrize(
    "limit",
    ["", " ", "0", "-5", "5,000", "1e3", "1" * 16, "1" * 5000, "nan", "٣", "many", "5;w=60;"],
)
def test_a_limit_that_is_no_number_is_none(limit: str) -> None:
    assert read(stated("x-ratelimit-", "-requests", limit, "1", "1")) == []


def test_the_tightest_of_equal_limits_counts() -> None:
    headers = {"x-ratelimit-limit-requests": "500", "x-ratelimit-limit-requests-minute": "300"}
    assert read(headers) == [("requests", "minute", 300, None, None)]


@pytest.mark.parametrize(
    ("reset", "reset_s"),
    [(str(EPOCH_S + 20), 20.0), (str((EPOCH_S + 20) * 1000), 20.0), (str(EPOCH_S - 5), 0.0)],
)
def test_a_reset_may_be_a_time_since_1970(reset: str, reset_s: float) -> None:
    headers = {"date": DATE, **stated("x-ratelimit-", "-tokens", "100", "0", reset)}
    assert read(headers) == [("tokens", "minute", 100, 0, reset_s)]
    assert retry_after_s(headers, throttled=True) == reset_s
    assert retry_after_s({"date": DATE, "retry-after": reset}, throttled=False) == reset_s


NAMES = st.sampled_from(
    [
        *sorted({name for _, headers, _ in PROVIDERS.values() for name in headers}),
        "retry-after",
        "retry-after-ms",
        "x-ratelimit-limit-requests-second",
    ]
)
VALUES = st.one_of(
    st.text(max_size=30),
    st.integers().map(str),
    st.floats().map(str),
    st.datetimes(timezones=st.timezones() | st.none()).map(str),
    st.from_regex(r"([0-9]+(d|h|m|s|ms)){1,4}", fullmatch=True),
    st.from_regex(r"[0-9]{1,20}(, ?[0-9]{1,9};w=[0-9]{1,12}){1,2}", fullmatch=True),
    st.sampled_from([DATE, "1e999", "-0", "Infinity", "2044-11-06T08:49:38Z", "0;w=0", "9" * 400]),
)


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(
    headers=st.dictionaries(NAMES, VALUES, max_size=12),
    host=st.sampled_from(["", "api.groq.com", "api.together.ai"]),
)
def test_whatever_the_headers_hold_nothing_is_raised(headers: dict[str, str], host: str) -> None:
    limits: tuple[RateLimit, ...] = rate_limits(headers, host=host)
    assert len({(limit.kind, limit.period) for limit in limits}) == len(limits)
    for limit in limits:
        assert limit.limit > 0
        assert limit.remaining is None or 0 <= limit.remaining <= limit.limit
        assert limit.reset_s is None or 0 <= limit.reset_s <= MOST_RESET_S
    for throttled in (True, False):
        wait = retry_after_s(headers, throttled=throttled)
        assert wait is None or 0 <= wait <= MOST_RETRY_AFTER_S


# When to come back --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ({}, None),
        ({"retry-after": "2"}, 2.0),
        ({"retry-after": "0.5"}, 0.5),
        ({"retry-after": "-5"}, 0.0),
        ({"retry-after": "99999999"}, 86_400.0),
        ({"retry-after": "nan"}, None),
        ({"retry-after": "soon"}, None),
        ({"retry-after": "2", "retry-after-ms": "1500"}, 1.5),
        ({"retry-after": LATER, "date": DATE}, 30.0),
        ({"retry-after": DATE, "date": LATER}, 0.0),
        ({"x-ratelimit-reset-requests": "1.5s", "x-ratelimit-reset-tokens": "6m0s"}, 360.0),
        (
            {
                "x-ratelimit-reset-requests": "1.5s",
                "x-ratelimit-remaining-requests": "0",
                "x-ratelimit-reset-tokens": "6m0s",
                "x-ratelimit-remaining-tokens": "100",
            },
            1.5,
        ),
        (
            {
                "x-ratelimit-reset-requests": "1.5s",
                "x-ratelimit-remaining-requests": "0",
                "x-ratelimit-reset-tokens": "200ms",
                "x-ratelimit-remaining-tokens": "0",
            },
            1.5,
        ),
        ({"retry-after": "1", "x-ratelimit-reset-requests": "6m0s"}, 1.0),
        ({"retry-after": "2044-11-06T08:50:07Z", "date": DATE}, 30.0),
        ({"retry-after-ms": "nan", "retry-after": "2"}, 2.0),
        (
            {
                "date": DATE,
                "anthropic-ratelimit-requests-reset": "2044-11-06T08:49:38Z",
                "anthropic-ratelimit-requests-remaining": "49",
                "anthropic-ratelimit-output-tokens-reset": "2044-11-06T08:50:07Z",
                "anthropic-ratelimit-output-tokens-remaining": "0",
            },
            30.0,
        ),
        # Something is left of each: the request fits, so it was a token limit, and not the day's.
        (
            {
                "x-ratelimit-reset-requests-day": "33011.4",
                "x-ratelimit-remaining-requests-day": "997455",
                "x-ratelimit-reset-tokens-minute": "11.4",
                "x-ratelimit-remaining-tokens-minute": "12",
                "x-ratelimit-reset-tokens-day": "33011.4",
                "x-ratelimit-remaining-tokens-day": "900000",
            },
            11.4,
        ),
        ({"x-ratelimit-reset-requests": "9s", "x-ratelimit-remaining-requests": "1"}, None),
    ],
)
def test_retry_after_forms(headers: dict[str, str], expected: float | None) -> None:
    assert retry_after_s(headers, throttled=True) == expected


def test_a_retry_after_date_without_a_date_header_counts_from_now() -> None:
    then = email.utils.formatdate(time.time() + 100, usegmt=True)
    found = retry_after_s({"retry-after": then}, throttled=False)
    assert found is not None
    assert 90 < found <= 100


def test_resets_count_only_when_throttled() -> None:
    assert retry_after_s({"x-ratelimit-reset-requests": "6m0s"}, throttled=False) is None


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("6m0s", 360.0),
        ("1.5s", 1.5),
        ("200ms", 0.2),
        ("2m59.56s", 179.56),
        ("1h2m3s", 3723.0),
        ("1d", 86_400.0),
        ("12", 12.0),
        ("0s", 0.0),
        ("", None),
        (None, None),
        ("tomorrow", None),
        ("1x", None),
    ],
)
def test_durations_of_openai(text: str | None, expected: float | None) -> None:
    assert duration_s(text) == (expected if expected is None else pytest.approx(expected))
