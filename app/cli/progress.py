"""Live progress: a bar on a terminal, plain lines elsewhere. Written to standard error."""

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import click
from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

#: Rates are of the last so many seconds: a whole minute, because limits come in minutes.
_WINDOW_S = 60.0
_LINE_EVERY_S = 5.0
#: Shorter waits are not worth a word.
_WAIT_WORTH_TELLING_S = 1.0
_FULL = 0.95


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """How far a run is. ``limit_share``: of the tightest limit, over its last period; None: no limit.

    ``wait_s``: how long nothing can be started; None when nothing waits. ``waits_for``: what for, as
    a server says it.
    """

    total: int
    answered: int
    failed: int
    cancelled: int
    in_flight: int
    input_tokens: int
    output_tokens: int
    limit_share: float | None = None
    limit_kind: str | None = None
    wait_s: float | None = None
    waits_for: str | None = None

    @property
    def ended(self) -> int:
        """Rows that need nothing more."""
        return self.answered + self.failed + self.cancelled


class Progress:
    """Shows snapshots as they come; ``with`` it. Between them the terminal is left alone."""

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._console = Console(stderr=True)
        self._clock = clock
        self._live: Live | None = None
        self._seen: deque[tuple[float, int]] = deque()
        self._begun = clock()
        self._told_at = clock()
        self._last: Snapshot | None = None
        self._told: Snapshot | None = None

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._live = Live(console=self._console, refresh_per_second=8, transient=False)
            self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        del kind, error, trace
        if self._live is not None:
            self._live.stop()
        elif self._last is not None and self._last != self._told:
            self._tell(self._last)

    def show(self, snapshot: Snapshot) -> None:
        """Show the present state; cheap, call it as often as there is news."""
        now = self._clock()
        self._seen.append((now, snapshot.ended))
        while self._seen[0][0] < now - _WINDOW_S:
            self._seen.popleft()
        self._last = snapshot
        if self._live is not None:
            self._live.update(self._drawn(snapshot))
        elif now - self._told_at >= _LINE_EVERY_S:
            self._tell(snapshot)

    def say(self, sentence: str) -> None:
        """A sentence for the person, above the bar."""
        if self._live is not None:
            self._live.console.print(Text(sentence))
        else:
            click.echo(sentence, err=True)

    @property
    def seconds(self) -> float:
        """How long this has been going on."""
        return self._clock() - self._begun

    def _tell(self, snapshot: Snapshot) -> None:
        self._told_at = self._clock()
        self._told = snapshot
        facts = [f"{snapshot.ended:,} of {snapshot.total:,} done", *self._facts(snapshot)]
        click.echo(", ".join([*facts, *self._outlook(snapshot)]), err=True)

    def _drawn(self, snapshot: Snapshot) -> Group:
        bar = Table.grid(padding=(0, 1))
        share = snapshot.ended / max(snapshot.total, 1)
        bar.add_row(
            ProgressBar(total=max(snapshot.total, 1), completed=snapshot.ended, width=40),
            f"{snapshot.ended:,}/{snapshot.total:,}",
            f"{share:.0%}",
        )
        lines = [" · ".join(self._facts(snapshot)), " · ".join(self._outlook(snapshot))]
        return Group(bar, *(Text(line, style="dim") for line in lines if line))

    def _facts(self, snapshot: Snapshot) -> list[str]:
        facts = [f"{snapshot.failed:,} failed"] if snapshot.failed else []
        if snapshot.cancelled:
            facts.append(f"{snapshot.cancelled:,} cancelled")
        facts.append(f"{snapshot.in_flight:,} in flight")
        facts.append(f"{self._rate():.1f}/s")
        facts.append(f"{snapshot.input_tokens:,} tokens in, {snapshot.output_tokens:,} out")
        return facts

    def _outlook(self, snapshot: Snapshot) -> list[str]:
        told: list[str] = []
        left = snapshot.total - snapshot.ended
        share = snapshot.limit_share
        if share is not None:
            told.append(f"{share:.0%} of the limit of {snapshot.limit_kind} in use")
        if left and snapshot.wait_s is not None and snapshot.wait_s >= _WAIT_WORTH_TELLING_S:
            limited = share is not None and share >= _FULL
            reason = "waiting for the rate limit" if limited else "waiting to try again"
            told.append(f"{reason}, next in {snapshot.wait_s:.0f} s")
        if left and snapshot.waits_for is not None:
            told.append(f"waiting for {snapshot.waits_for}")
        rate = self._rate()
        if left and rate > 0:
            told.append(f"about {duration(max(left / rate, snapshot.wait_s or 0.0))} left")
        return told

    def _rate(self) -> float:
        if not self._seen:
            return 0.0
        (first_at, first), (last_at, last) = self._seen[0], self._seen[-1]
        # Of what was begun within the window, from the start: a first burst is not the rate.
        seconds = max(last_at - first_at, 1.0)
        return max(last - first, 0) / seconds


def duration(seconds: float) -> str:
    """``7 s``, ``3:04`` or ``2:03:04``."""
    whole = round(seconds)
    minutes, rest = divmod(whole, 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}:{minutes:02}:{rest:02}"
    return f"{minutes}:{rest:02}" if minutes else f"{rest} s"
