"""Measure everything: ``python -m bench``, ``--quick`` to see that it works; or one: ``python -m bench churn``.

A benchmark is a module of this package whose docstring begins with its question and states its
method, and whose ``main()`` reads ``sys.argv`` (``--quick``: a smaller run) and prints the result. Those in
`PARTS` have a ``measure`` besides and make up the table; the others are run by name. Each part is a process
of its own with a time bound, one after the other, on one embedded server. The peers, and what draws, are
installed into ``.bench-venv`` first.

Written to ``bench-results``: ``results.json``, ``table.md`` and the plots. With ``--docs`` table and plots are
also put into ``docs``.
"""

import argparse
import importlib
import importlib.util
import json
import os
import pkgutil
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

from app import embedded
from bench import _figures
from bench._figures import Part

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "bench-results"
ENVIRONMENT = ROOT / ".bench-venv"
#: What the peers' environment has. asyncpg is the faster driver of pgqueuer.
PACKAGES = ("pgqueuer", "asyncpg", "procrastinate", "awa-pg", "pgmq", "matplotlib")
#: In the order of the table. One that is not there (yet) is passed over.
PARTS = (
    "engine",
    "efficiency",
    "ingest",
    "over_http",
    "workers",
    "wakeup",
    "sse",
    "backlog",
    "flows",
    "churn",
    "reads",
    "memory",
)
_BEGIN, _END = "<!-- table: begin -->\n", "<!-- table: end -->\n"


def present() -> list[str]:
    """The benchmarks there are, by name."""
    return sorted(
        module.name
        for module in pkgutil.iter_modules([str(Path(__file__).parent)])
        if not module.name.startswith("_")
    )


def question(name: str) -> str:
    """The first line of a benchmark's docstring, read without importing what it measures."""
    spec = importlib.util.find_spec(f"bench.{name}")
    assert spec is not None
    assert spec.origin is not None
    first = Path(spec.origin).read_text(encoding="utf-8").partition("\n")[0]
    return first.strip('"')


# The peers' environment ---------------------------------------------------------------------------


def peers_python() -> Path | None:
    """The interpreter that has the peers, installed if need be; None where that is impossible."""
    python = ENVIRONMENT / "bin" / "python"
    ready = ENVIRONMENT / ".ready"
    if ready.exists() and ready.read_text() == "\n".join(PACKAGES):
        return python
    print(f"installing {', '.join(PACKAGES)} into {ENVIRONMENT.name}", flush=True)
    venv.create(ENVIRONMENT, with_pip=True, clear=True)
    install = [python, "-m", "pip", "install", "-q", "--disable-pip-version-check", *PACKAGES]
    if subprocess.run(install, check=False, stderr=subprocess.DEVNULL).returncode:
        print("they cannot be installed: no peers, no plots", flush=True)
        return None
    ready.write_text("\n".join(PACKAGES))
    return python


# Everything ---------------------------------------------------------------------------------------


class _Arguments(argparse.Namespace):
    quick: bool
    only: list[str]
    peers: bool
    docs: bool


def _arguments(parts: list[str]) -> _Arguments:
    parser = argparse.ArgumentParser(prog="python -m bench", description="Measure everything.")
    parser.add_argument("all", nargs="?", choices=["all"], help="is meant without it, too")
    parser.add_argument("--quick", action="store_true", help="small sizes, to see that it works")
    parser.add_argument("--only", nargs="+", choices=parts, default=parts, metavar="PART")
    parser.add_argument("--no-peers", dest="peers", action="store_false", help="install nothing")
    parser.add_argument("--docs", action="store_true", help="put table and plots into docs")
    parser.add_argument("--list", action="store_true", help="list the benchmarks")
    return parser.parse_args(namespace=_Arguments())


def run_part(name: str, home: Path, *, quick: bool, python: Path | None) -> Part:
    """A part in a process of its own; what it could not measure is a note."""
    limit_s = cast("float", getattr(importlib.import_module(f"bench.{name}"), "LIMIT_S", 180.0))
    result = home / f"{name}.json"
    command: list[str | Path] = [sys.executable, "-m", "bench", name, "--home", home]
    command += ["--json", result, *(["--quick"] if quick else [])]
    command += ["--peers", python] if python is not None else []
    # A group of its own, so that an end ends its workers and servers too.
    process = subprocess.Popen(command, start_new_session=True)
    try:
        status = process.wait(limit_s)
    except subprocess.TimeoutExpired:
        status = None
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    if status == 0:
        return _figures.read(result)
    return Part(notes=["did not end in time" if status is None else f"failed with {status}"])


def surroundings(server: embedded.Embedded) -> dict[str, Any]:
    """What the figures depend on."""
    return {
        "python": platform.python_version(),
        "postgres": server.version,
        "machine": platform.machine(),
        "system": f"{platform.system()} {platform.release()}",
        "cores": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
        "load_average": os.getloadavg(),
    }


def run_all(given: _Arguments) -> bool:
    """Measure, print, write; whether every part ended."""
    begun = time.monotonic()
    python = peers_python() if given.peers else None
    shutil.rmtree(RESULTS, ignore_errors=True)  # plots of another run would look like this one's
    RESULTS.mkdir()
    measured: dict[str, Part] = {}
    with tempfile.TemporaryDirectory(prefix="sluice-bench-") as folder:
        home = Path(folder)
        server = embedded.acquire(home)
        try:
            around = surroundings(server)
            for name in given.only:
                print(f"\n{name}: {question(name)}", flush=True)
                measured[name] = run_part(name, home, quick=given.quick, python=python)
        finally:
            server.release()
    figures = [figure for part in measured.values() for figure in part.figures]
    minutes = (time.monotonic() - begun) / 60
    print(f"\n{_figures.table(figures)}\n\n{minutes:.1f} minutes")
    results = {
        "surroundings": around,
        "quick": given.quick,
        "minutes": round(minutes, 1),
        "parts": {name: asdict(part) for name, part in measured.items()},
    }
    (RESULTS / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    (RESULTS / "table.md").write_text(_figures.markdown(figures) + "\n", encoding="utf-8")
    if python is not None:
        plots = Path(__file__).with_name("_plots.py")
        subprocess.run([python, plots, RESULTS / "results.json", RESULTS], check=True)
    print(f"written to {RESULTS.name}: {', '.join(sorted(p.name for p in RESULTS.iterdir()))}")
    if given.docs:
        publish()
    failed = [
        f"{n}: {note}" for n, part in measured.items() if not part.figures for note in part.notes
    ]
    for line in failed:
        print(line)
    return not failed


def publish() -> None:
    """Put table and plots into docs."""
    for plot in RESULTS.glob("*.svg"):
        shutil.copy(plot, ROOT / "docs" / plot.name)
    page = ROOT / "docs" / "benchmarks.md"
    text = page.read_text(encoding="utf-8")
    before, _, rest = text.partition(_BEGIN)
    _, _, after = rest.partition(_END)
    table = (RESULTS / "table.md").read_text(encoding="utf-8")
    plots = "\n".join(f"![{plot.stem}]({plot.name})" for plot in sorted(RESULTS.glob("*.svg")))
    page.write_text(f"{before}{_BEGIN}{table}\n{plots}\n{_END}{after}", encoding="utf-8")


def main() -> None:
    """Run the benchmark that the arguments name with its own arguments, all of them, or list them."""
    there = present()
    if "--list" in sys.argv[1:2]:
        for name in there:
            print(f"  {'*' if name in PARTS else ' '} {name:<14} {question(name)}")
        print("  * is a part of all")
        return
    name = sys.argv[1] if len(sys.argv) > 1 else "all"
    if name == "all" or name.startswith("-"):
        ended = run_all(_arguments([part for part in PARTS if part in there]))
        sys.exit(0 if ended else 1)
    if name not in there:
        sys.exit(f"There is no benchmark {name!r}. There are: {', '.join(there)}.")
    sys.argv = [f"bench.{name}", *sys.argv[2:]]
    cast("Callable[[], None]", importlib.import_module(f"bench.{name}").main)()


if __name__ == "__main__":
    main()
