"""What the simulator counts, in bounded memory, for its report."""

from collections import Counter, deque
from typing import Literal

WINDOW_S = 60.0
MOST_BODIES = 2_000_000
"""Bodies that are told apart for ``called_twice`` and ``answered_twice``: about 300 MB of digests."""

MOST_SECONDS = 7 * 86_400

RefusedBy = Literal["requests", "tokens", "input_tokens", "output_tokens", "in_flight", "random"]
REFUSED_BY: tuple[RefusedBy, ...] = (
    "requests",
    "tokens",
    "input_tokens",
    "output_tokens",
    "in_flight",
    "random",
)


class Peak:
    """The most that ever was within any 60 s."""

    def __init__(self) -> None:
        self.peak = 0
        self._sum = 0
        self._recent: deque[tuple[float, int]] = deque()

    def add(self, amount: int, now: float) -> None:
        while self._recent and self._recent[0][0] + WINDOW_S <= now:
            self._sum -= self._recent.popleft()[1]
        self._recent.append((now, amount))
        self._sum += amount
        self.peak = max(self.peak, self._sum)


class Bodies:
    """How often each body was called and answered, in one byte each, up to `MOST_BODIES`."""

    def __init__(self) -> None:
        self._seen: dict[bytes, int] = {}
        self.called_twice = 0
        self.answered_twice = 0
        self.untracked = 0

    def calls(self, digest: bytes) -> int:
        """Return how often a body was called, 15 for more."""
        return self._seen.get(digest, 0) & 15

    def called(self, digest: bytes) -> None:
        seen = self._seen.get(digest)
        if seen is not None:
            calls, answers = seen & 15, seen >> 4
            self.called_twice += calls == 1
            self._seen[digest] = min(calls + 1, 15) | answers << 4
        elif len(self._seen) < MOST_BODIES:
            self._seen[digest] = 1
        else:
            self.untracked += 1

    def answered(self, digest: bytes) -> None:
        seen = self._seen.get(digest)
        if seen is not None:
            calls, answers = seen & 15, seen >> 4
            self.answered_twice += answers == 1
            self._seen[digest] = calls | min(answers + 1, 15) << 4


class PerSecond:
    """What happened in each second since the start: lists of one length, for a week at most."""

    def __init__(self, *, started: float) -> None:
        self._started = started
        self.accepted: list[int] = []
        self.accepted_tokens: list[int] = []
        self.refused: list[int] = []

    def accept(self, *, tokens: int, now: float) -> None:
        if (second := self._second(now)) is not None:
            self.accepted[second] += 1
            self.accepted_tokens[second] += tokens

    def refuse(self, *, now: float) -> None:
        if (second := self._second(now)) is not None:
            self.refused[second] += 1

    def _second(self, now: float) -> int | None:
        """Make room for a second and return its place; None: the lists are full."""
        second = int(now - self._started)
        if second >= MOST_SECONDS:
            return None
        missing = second + 1 - len(self.accepted)
        for counts in (self.accepted, self.accepted_tokens, self.refused):
            counts.extend([0] * missing)
        return second


class Statistics:
    """Everything since ``now``. Whoever serves the calls counts what needs no arithmetic."""

    def __init__(self, *, now: float) -> None:
        self.started = now
        self.received = 0
        self.invalid = 0
        self.unauthorized = 0
        self.accepted = 0
        self.accepted_input_tokens = 0
        self.accepted_output_tokens = 0
        self.refused = 0
        self.refused_by: Counter[RefusedBy] = Counter()
        self.answered = 0
        self.abandoned = 0
        self.faults: Counter[str] = Counter()
        self.input_tokens = 0
        self.output_tokens = 0
        self.peak_in_flight = 0
        self.per_second = PerSecond(started=now)
        self.bodies = Bodies()
        self.arrived_calls, self.arrived_tokens = Peak(), Peak()
        self.accepted_calls, self.accepted_tokens = Peak(), Peak()

    def accept(self, digest: bytes, *, input_tokens: int, output_tokens: int, now: float) -> None:
        """Count a call that is past the limits, with the tokens it was charged."""
        self.accepted += 1
        self.accepted_input_tokens += input_tokens
        self.accepted_output_tokens += output_tokens
        self.bodies.called(digest)
        self.accepted_calls.add(1, now)
        self.accepted_tokens.add(input_tokens + output_tokens, now)
        self.per_second.accept(tokens=input_tokens + output_tokens, now=now)

    def refuse(self, by: RefusedBy, *, now: float) -> None:
        """Count a call that a limit refused."""
        self.refused += 1
        self.refused_by[by] += 1
        self.per_second.refuse(now=now)
