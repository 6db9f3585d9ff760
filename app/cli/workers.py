"""``sluice worker``: one worker process, or a parent that keeps several running.

The children's lives hang on a pipe: the parent holds its writing end, so when the parent goes, by
SIGKILL too, each child reads the end of the file and stops as on SIGTERM. They are in sessions of
their own: a terminal's Ctrl-C reaches the parent only, which passes it on once.
"""

import asyncio
import os
import random
import signal
import sys
from asyncio.subprocess import Process

import click

from app import settings
from app.cli.processes import log_for_service, on_signals, run_async
from app.cli.store import Store, open_store
from app.log import Log
from app.maintenance import Maintenance
from app.sender import Sender
from app.supervision import Supervisor
from app.worker import Worker

log = Log("workers")

#: A child that lived so long is no crash loop.
_STEADY_S = 60.0
_MOST_PAUSE_S = 30.0


@click.command()
@click.option(
    "--processes",
    type=click.IntRange(1, 256),
    default=1,
    show_default=True,
    help="Worker processes; one uses one core.",
)
@click.option(
    "--concurrency",
    type=click.IntRange(min=1),
    help="Most calls in flight per process.  [default: 1000]",
)
@click.option("--lifeline", type=int, hidden=True, help="The pipe on which a child's life hangs.")
def worker(processes: int, concurrency: int | None, lifeline: int | None) -> None:
    """Claim items, call the providers, record what comes back.

    It also sends the callbacks and webhooks that are due.
    SIGTERM and Ctrl-C finish the calls in flight (SLUICE_DRAIN_S) and end; a second one abandons
    them. Any number of workers on any machines share the same database.
    """
    known = settings.load({"concurrency": concurrency})
    log_for_service(known)
    with open_store(known, migrating=False) as store:
        if processes == 1:
            run_async(_work(store, lifeline))
        else:
            run_async(_keep(processes, concurrency))


async def _work(store: Store, lifeline: int | None) -> None:
    async with store.database("sluice-worker") as db:
        working = Worker(store.settings, db, keyring=store.keyring, listen_url=store.direct_url)
        keeping = Supervisor("worker")
        duty = Maintenance(store.settings, db, holder_id=working.worker_id, give_way=store.give_way)
        keeping.start("maintenance", duty.run)
        sender = Sender(store.settings, db, keyring=store.keyring, listen_url=store.direct_url)
        sender.start()
        loop = asyncio.get_running_loop()

        def parent_is_gone() -> None:
            assert lifeline is not None
            loop.remove_reader(lifeline)
            log.warning("worker.orphaned", worker=working.worker_id)
            working.stop.set()

        if lifeline is not None:
            loop.add_reader(lifeline, parent_is_gone)
        with on_signals(lambda _: working.stop.set(), working.force.set):
            try:
                await working.run()
            finally:
                await sender.close()
                await keeping.stop()


async def _keep(processes: int, concurrency: int | None) -> None:
    reading, writing = os.pipe()
    parent = _Parent(reading, concurrency)
    with on_signals(parent.stop, parent.force):
        try:
            async with asyncio.TaskGroup() as children:
                for number in range(processes):
                    children.create_task(parent.keep(number))
        finally:
            os.close(reading)
            os.close(writing)


class _Parent:
    """Starts children, starts them again when they crash, and passes signals on."""

    def __init__(self, lifeline: int, concurrency: int | None) -> None:
        self._lifeline = lifeline
        self._command = [sys.executable, "-m", "app.cli", "worker", "--lifeline", str(lifeline)]
        if concurrency is not None:
            self._command += ["--concurrency", str(concurrency)]
        self._children: set[Process] = set()
        self._stopping = asyncio.Event()
        self._number = signal.SIGTERM

    def stop(self, number: signal.Signals) -> None:
        self._number = number
        self._stopping.set()
        self._pass_on()

    def force(self) -> None:
        self._pass_on()

    def _pass_on(self) -> None:
        for child in self._children:
            if child.returncode is None:
                child.send_signal(self._number)

    async def keep(self, number: int) -> None:
        """Have one child running until told to stop."""
        clock = asyncio.get_running_loop().time
        crashes = 0
        while not self._stopping.is_set():
            begun = clock()
            code = await self._run_child()
            if self._stopping.is_set():
                return
            crashes = 0 if clock() - begun > _STEADY_S else crashes + 1
            most_s = min(_MOST_PAUSE_S, 0.5 * 2**crashes)
            pause_s = random.uniform(most_s / 2, most_s)  # noqa: S311 - jitter
            log.error("worker.crashed", child=number, exit_code=code, pause_s=round(pause_s, 1))
            try:
                async with asyncio.timeout(pause_s):
                    await self._stopping.wait()
            except TimeoutError:
                continue

    async def _run_child(self) -> int | str:
        """Start a child and wait for its end; its exit code, or why it could not be started."""
        try:
            child = await asyncio.create_subprocess_exec(
                *self._command, pass_fds=(self._lifeline,), start_new_session=True
            )
        except OSError as error:
            return str(error.strerror)
        self._children.add(child)
        if self._stopping.is_set():  # while it was being started
            child.send_signal(self._number)
        code = await child.wait()
        self._children.discard(child)
        return code
