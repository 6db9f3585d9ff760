"""The command line against a database of the test's own and a simulated provider in a thread."""

import asyncio
import csv
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Coroutine, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import psycopg
import pytest
from click.testing import CliRunner, Result

from app import migrate
from app.cli import main
from app.secrets import Keyring
from app.simulator import Behaviour, Simulator

PATIENCE_S = 30.0

Done = TypeVar("Done")


def until(
    holds: Callable[[], bool],
    *,
    what: str,
    by: subprocess.Popen[str] | None = None,
    seconds: float = PATIENCE_S,
) -> None:
    """Look again and again until something holds; fails after ``seconds``, or when ``by`` ended.

    The failure shows what ``by`` said, and where it was.
    """
    deadline = time.monotonic() + seconds
    while not holds():
        if by is not None and by.poll() is not None:
            pytest.fail(f"exit code {by.returncode} before {what}: {by.communicate()}")
        if time.monotonic() > deadline:
            said: object = "nobody"
            if by is not None:
                by.send_signal(signal.SIGABRT)  # faulthandler tells where it is
                said = by.communicate(timeout=10)
            pytest.fail(f"waited {seconds:.0f} s in vain until {what}: {said}")
        threading.Event().wait(0.02)


class Provider:
    """A simulated provider on a loop of its own."""

    def __init__(self, behaviour: Behaviour) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()
        self._simulator = Simulator(behaviour)
        self.url = self._do(self._simulator.start()) + "/v1"

    def _do(self, coroutine: Coroutine[Any, Any, Done]) -> Done:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(10)

    def report(self) -> dict[str, Any]:
        async def read() -> dict[str, Any]:
            return self._simulator.report()

        return self._do(read())

    def change(self, **changes: object) -> None:
        async def change() -> None:
            self._simulator.change(changes)

        self._do(change())

    def drop_calls(self) -> None:
        """Cut every connection, so that nobody waits for what takes long."""
        self._do(self._simulator.stop())

    def stop(self) -> None:
        self._do(self._simulator.stop())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


@pytest.fixture
def provider() -> Iterator[Provider]:
    made = Provider(Behaviour(port=0, latency_ms=20, seed=1))
    yield made
    made.stop()


@dataclass(frozen=True)
class Cli:
    """The command line in one folder, with one database; ``env`` is all that it is told."""

    folder: Path
    env: dict[str, str]
    started: list[subprocess.Popen[str]] = field(default_factory=list[subprocess.Popen[str]])

    def run(self, *arguments: str, env: dict[str, str] | None = None) -> Result:
        """Within this process, which is faster by the second that Python takes to import all."""
        ours = [k for k in os.environ if k.startswith("SLUICE_")] + ["OPENAI_API_KEY"]
        cleared: dict[str, str | None] = dict.fromkeys(ours)
        runner = CliRunner(env=cleared | self.env | (env or {}))
        here = Path.cwd()
        os.chdir(self.folder)
        try:
            return runner.invoke(main, arguments)
        finally:
            os.chdir(here)

    def start(self, *arguments: str, command: tuple[str, ...] = ()) -> subprocess.Popen[str]:
        """As a process of its own."""
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("SLUICE_", "OPENAI_"))}
        process = subprocess.Popen(
            [*command, sys.executable, "-m", "app.cli", *arguments],
            cwd=self.folder,
            env=kept | {"PYTHONFAULTHANDLER": "1"} | self.env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.started.append(process)
        return process

    def write(self, name: str, text: str) -> Path:
        file = self.folder / name
        file.write_text(text, encoding="utf-8", newline="")
        return file

    def questions(self, texts: list[str], name: str = "q.csv") -> None:
        with (self.folder / name).open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["id", "text"])
            writer.writerows([str(n), text] for n, text in enumerate(texts, start=1))

    def rows(self, name: str = "out.csv") -> list[dict[str, str]]:
        with (self.folder / name).open(encoding="utf-8", newline="") as file:
            return list(csv.DictReader(file))

    def lines(self, name: str) -> list[dict[str, Any]]:
        text = (self.folder / name).read_text(encoding="utf-8")
        return [json.loads(line) for line in text.splitlines()]


def say_migrated(database: str) -> str:
    """Let a clone of the template say which revision it is at."""
    with psycopg.connect(database, autocommit=True) as conn:
        conn.execute("create table if not exists alembic_version (version_num text primary key)")
        conn.execute(
            "insert into alembic_version values (%s) on conflict do nothing", (migrate.head(),)
        )
    return database


@contextmanager
def cli_on(database: str, folder: Path) -> Generator[Cli]:
    """The command line; what it leaves running is killed."""
    made = Cli(
        folder=folder,
        env={
            "SLUICE_HOME": str(folder / "home"),
            "SLUICE_DATABASE_URL": database,
            "SLUICE_SECRET_KEY": Keyring.generate(),
            "SLUICE_BACKOFF_BASE_S": "0.05",
            "SLUICE_PROVIDER_ALLOW_NETWORKS": "127.0.0.0/8",
        },
    )
    try:
        yield made
    finally:
        for process in made.started:
            if process.poll() is None:
                process.kill()
            process.communicate()


@pytest.fixture
def migrated(database: str) -> str:
    """A database of the test's own that says which revision it is at."""
    return say_migrated(database)


@pytest.fixture
def cli(migrated: str, tmp_path: Path) -> Iterator[Cli]:
    with cli_on(migrated, tmp_path) as made:
        yield made


@pytest.fixture(autouse=True)
def _logging_stays_as_it_is() -> Iterator[None]:
    """Commands run within this process configure the log of the whole of it."""
    logger = logging.getLogger("sluice")
    before = logger.handlers[:], logger.level, logger.propagate
    yield
    logger.handlers[:], logger.level, logger.propagate = before[0], before[1], before[2]
