"""Draw the plots of a run: ``python _plots.py results.json FOLDER``. Runs in the peers' environment."""

# pyright: reportMissingImports=false, reportUnknownVariableType=false, reportUnknownMemberType=false
# pyright: reportUnknownArgumentType=false, reportUnknownParameterType=false, reportMissingParameterType=false

import json
import re
import sys
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("svg")
from matplotlib import pyplot as plt

#: Text stays text, and the same figures give the same file.
mpl.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": "sluice", "font.size": 9}
_OURS, _PEER, _LIMIT = "#2563eb", "#9ca3af", "#e5e7eb"


def _save(folder: Path, name: str) -> None:
    plt.tight_layout()
    plt.savefig(folder / f"benchmark-{name}.svg", metadata={"Date": None})
    plt.close()


def engine(folder: Path, figure: dict[str, Any]) -> None:
    """Bars: ours, the peers, the limits."""
    bars = [("Sluice", figure["ours"], _OURS)]
    bars += [(name, rate, _PEER) for name, rate in figure["peers"].items()]
    bars += [(name, rate, _LIMIT) for name, rate in figure["limits"].items()]
    bars.sort(key=lambda bar: bar[1])
    plt.figure(figsize=(7, 0.4 * len(bars) + 1))
    drawn = plt.barh([b[0] for b in bars], [b[1] for b in bars], color=[b[2] for b in bars])
    plt.bar_label(drawn, fmt="{:,.0f}", padding=3)
    plt.xlabel("items per second, claimed to recorded")
    plt.margins(x=0.12)
    _save(folder, "engine")


def curve(folder: Path, title: str, lines: dict[str, list[tuple[float, float]]]) -> None:
    """Lines; axes are named by the title: ``part: y by x``."""
    what, _, axes = title.partition(": ")
    y, _, x = axes.partition(" by ")
    plt.figure(figsize=(7, 3))
    for name, points in lines.items():
        if points:
            marker = "o" if len(points) < 10 else None
            plt.plot(*zip(*points, strict=True), label=name, marker=marker)
    xs = [point[0] for points in lines.values() for point in points]
    if xs and min(xs) > 0 and max(xs) / min(xs) >= 50 and len(xs) < 20:
        plt.xscale("log")
    plt.ylim(bottom=0)
    plt.xlabel(x)
    plt.ylabel(y)
    if len(lines) > 1:
        plt.legend()
    _save(folder, re.sub(r"[^a-z0-9]+", "-", f"{what} by {x}".lower()))


def main() -> None:
    """Everything that the results have."""
    results = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    folder = Path(sys.argv[2])
    for part in results["parts"].values():
        for figure in part["figures"]:
            if figure["what"].startswith("engine alone") and figure["unit"] == "items/s":
                engine(folder, figure)
        for title, lines in part["curves"].items():
            curve(folder, title, lines)


main()
