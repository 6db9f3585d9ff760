"""The fluid estimate, on cases that can be worked out by hand."""

import math
from uuid import UUID

import pytest

from app.capacity import Kind, Period
from app.forecast import Bound, Finish, Work, ahead, finish
from app.ids import uuid7

MODEL, RESOURCE, BATCH, OTHER = uuid7(), uuid7(), uuid7(), uuid7()


def work(
    items: float,
    *,
    each: tuple[float, float] = (10, 20),
    scopes: tuple[UUID, ...] = (MODEL, RESOURCE),
    priority: int = 0,
    weight: float = 1,
    blocked_s: float = 0,
) -> Work:
    return Work(
        items=items,
        input_tokens=items * each[0],
        output_tokens=items * each[1],
        scope_ids=frozenset(scopes),
        priority=priority,
        weight=weight,
        blocked_s=blocked_s,
    )


def bound(
    most: float,
    *,
    period: Period = "minute",
    kind: Kind = "requests",
    used: float = 0,
    scope: UUID = RESOURCE,
    sliding: bool = True,
    resets_in_s: float = 0,
) -> Bound:
    return Bound(
        scope_id=scope,
        period=period,
        kind=kind,
        most=most,
        used=used,
        is_sliding=sliding,
        is_paced=period == "minute",
        resets_in_s=resets_in_s,
    )


def seconds(found: Finish | None) -> float:
    assert found is not None
    return found.seconds


def test_a_limit_per_minute_is_spent_evenly() -> None:
    assert seconds(finish([work(300)], [], [bound(60)], {})) == 300
    tokens = bound(600, kind="tokens")
    assert seconds(finish([work(300)], [], [bound(60), tokens], {})) == 900
    assert seconds(finish([work(300)], [], [bound(600, kind="input_tokens")], {})) == 300
    assert seconds(finish([work(300)], [], [bound(600, kind="output_tokens")], {})) == 600


def test_the_limit_that_decides_is_named() -> None:
    slow = bound(10, scope=MODEL)
    found = finish([work(100)], [], [bound(60), slow], {})
    assert found == Finish(seconds=600, bound=slow)


@pytest.mark.parametrize(
    ("amount", "expected"),
    [
        (40, 0),  # there is room for 40
        (70, 1800),  # half of the 60 used have come back
        (100, 3600),
        (140, 3600),  # the 40 begun at once come back after an hour
        (170, 5400),
        (250, 2 * 3600 + 600),  # of the third hundred 50: 40 are free, 10 of 60 are waited for
    ],
)
def test_another_sliding_limit_gives_back_what_was_used(amount: float, expected: float) -> None:
    assert bound(100, period="hour", used=60).clears_in(amount) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("amount", "expected"), [(40, 0), (41, 500), (140, 500), (141, 500 + 86_400)]
)
def test_a_calendars_limit_starts_anew(amount: float, expected: float) -> None:
    day = bound(100, period="day", used=60, sliding=False, resets_in_s=500)
    assert day.clears_in(amount) == expected


def test_a_lifetime_ends() -> None:
    assert bound(100, period="lifetime", used=60).clears_in(40) == 0
    assert bound(100, period="lifetime", used=60).clears_in(41) == math.inf
    # An overdrawn limit has nothing left, not less than nothing.
    assert bound(100, period="day", used=160, sliding=False, resets_in_s=9).clears_in(100) == 9


def test_equals_share_by_weight_until_one_is_done() -> None:
    # Of 100 others 30 fit beside 30 of mine; then I am done.
    assert ahead([work(30)], [work(100)], "requests") == 30
    assert ahead([work(30)], [work(10)], "requests") == 10
    assert ahead([work(30, weight=3)], [work(100)], "requests") == 10
    assert ahead([work(30)], [work(100, weight=2)], "requests") == 60
    assert seconds(finish([work(30)], [work(100)], [bound(60)], {})) == 60


def test_higher_priorities_go_first_and_lower_ones_do_not_count() -> None:
    assert ahead([work(30)], [work(100, priority=1), work(500, priority=-1)], "requests") == 100
    assert ahead([work(30, priority=2)], [work(100, priority=1)], "requests") == 0


def test_only_those_that_share_a_limit_stand_in_its_line() -> None:
    mine = work(60, scopes=(MODEL, RESOURCE, BATCH))
    others = [work(60, scopes=(MODEL, OTHER)), work(60, scopes=(OTHER,))]
    assert seconds(finish([mine], others, [bound(60)], {})) == 60
    assert seconds(finish([mine], others, [bound(60, scope=MODEL)], {})) == 120
    assert seconds(finish([mine], others, [bound(60), bound(30, scope=BATCH)], {})) == 120


def test_two_flows_of_a_batch_add_up_where_they_share() -> None:
    mine = [work(60, scopes=(MODEL, RESOURCE)), work(60, scopes=(MODEL, OTHER))]
    limits = [bound(60), bound(30, scope=OTHER)]
    assert seconds(finish(mine, [], limits, {})) == 120
    assert seconds(finish(mine, [], [*limits, bound(20, scope=MODEL)], {})) == 360


def test_the_measured_speed_is_believed_where_it_is_slower() -> None:
    assert finish([work(60)], [], [bound(60)], {MODEL: 0.5}) == Finish(seconds=120, bound=None)
    assert seconds(finish([work(60)], [], [bound(60)], {MODEL: 5})) == 60
    assert seconds(finish([work(60)], [work(60)], [], {MODEL: 1})) == 120


def test_nothing_tells_where_no_limit_and_no_speed_is_known() -> None:
    assert finish([work(60)], [], [], {}) is None
    # Room in a limit for a day says nothing about the speed; the lack of it does.
    assert finish([work(60)], [], [bound(100, period="day")], {}) is None
    assert seconds(finish([work(60)], [], [bound(50, period="day")], {})) > 0
    assert finish([work(1), work(1, scopes=(OTHER,))], [], [bound(60)], {}) is None


def test_a_rest_comes_before_all() -> None:
    assert seconds(finish([work(60, blocked_s=30)], [], [bound(60)], {})) == 90
