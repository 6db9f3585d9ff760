"""What a part of the benchmark brings back: figures, curves and notes; and how they are shown.

A part is a module with a ``measure``; it runs in a process of its own, alone or as one of all
(`bench.__main__`), and hands its `Part` over as JSON.
"""

import argparse
import asyncio
import json
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """One line of the table. ``target`` in words; ``met`` None: there is none to meet.

    ``peers`` and ``limits``: the same work by other programs, and by less than a queue.
    """

    what: str
    unit: str
    ours: float | None
    target: str = ""
    met: bool | None = None
    peers: dict[str, float] = field(default_factory=dict[str, float])
    limits: dict[str, float] = field(default_factory=dict[str, float])
    note: str = ""


@dataclass(slots=True, kw_only=True)
class Part:
    """All that one part measured. ``curves``: per plot, per line, its points."""

    figures: list[Figure] = field(default_factory=list[Figure])
    curves: dict[str, dict[str, list[tuple[float, float]]]] = field(
        default_factory=dict[str, dict[str, list[tuple[float, float]]]]
    )
    notes: list[str] = field(default_factory=list[str])


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """Where a part keeps its files, and whether it only shows that it works.

    ``peers``: the interpreter of the environment that has the peers; None: leave them out.
    """

    home: Path
    quick: bool
    peers: Path | None

    def size(self, full: int, quick: int) -> int:
        """The one or the other."""
        return quick if self.quick else full


Measure = Callable[[Run], Awaitable[Part]]


def centile(values: Sequence[float], number: int) -> float:
    """The p-``number`` of some values; of a single one itself."""
    if len(values) < 2:
        return values[0]
    return statistics.quantiles(values, n=100, method="inclusive")[number - 1]


def short(value: float | None) -> str:
    """A number with as many digits as it is worth."""
    if value is None:
        return "-"
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}"


_HEAD = ("what", "ours", "target", "met", "peers", "limits")


def rows(figures: Sequence[Figure]) -> list[tuple[str, ...]]:
    """The cells of the table."""
    return [
        (
            f"{figure.what}, {figure.unit}" if figure.unit else figure.what,
            short(figure.ours),
            figure.target,
            {True: "yes", False: "NO", None: ""}[figure.met],
            "; ".join(f"{name} {short(value)}" for name, value in figure.peers.items()),
            "; ".join(f"{name} {short(value)}" for name, value in figure.limits.items()),
        )
        for figure in figures
    ]


def table(figures: Sequence[Figure]) -> str:
    """For a terminal."""
    cells = [_HEAD, *rows(figures)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(_HEAD))]
    lines = ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) for row in cells]
    return "\n".join(line.rstrip() for line in lines)


def markdown(figures: Sequence[Figure]) -> str:
    """The same for docs/benchmarks.md."""
    lines = [
        "| what | ours | target | met | peers | physical limits |",
        "|---|---|---|---|---|---|",
    ]
    lines += ["| " + " | ".join(row) + " |" for row in rows(figures)]
    return "\n".join(lines)


def read(path: Path) -> Part:
    """A part as `write` left it."""
    raw = json.loads(path.read_text(encoding="utf-8"))
    return Part(
        figures=[Figure(**figure) for figure in raw["figures"]],
        curves=raw["curves"],
        notes=raw["notes"],
    )


def write(part: Part, path: Path) -> None:
    """Keep a part as JSON."""
    path.write_text(json.dumps(asdict(part), indent=1) + "\n", encoding="utf-8")


class _Arguments(argparse.Namespace):
    quick: bool
    json: Path | None
    home: Path | None
    peers: Path | None


def run(name: str, measure: Measure) -> None:
    """The command line of a part: measure, print, and write what ``--json`` asks for."""
    parser = argparse.ArgumentParser(prog=f"python -m bench {name}")
    parser.add_argument("--quick", action="store_true", help="a smaller run, to see that it works")
    parser.add_argument("--json", type=Path, help="write the figures there")
    parser.add_argument("--home", type=Path, help="folder of an embedded server to share")
    parser.add_argument("--peers", type=Path, help="interpreter of the peers' environment")
    given = parser.parse_args(namespace=_Arguments())
    begun = time.monotonic()
    home = tempfile.TemporaryDirectory() if given.home is None else nullcontext(str(given.home))
    with home as folder:
        part = asyncio.run(
            _awaited(measure, Run(home=Path(folder), quick=given.quick, peers=given.peers))
        )
    part.notes.append(f"took {time.monotonic() - begun:.0f} s")
    print(table(part.figures))
    for note in [*(f.note for f in part.figures if f.note), *part.notes]:
        print(f"  {note}")
    if given.json is not None:
        write(part, given.json)


async def _awaited(measure: Measure, given: Run) -> Part:
    return await measure(given)
