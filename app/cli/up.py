"""``sluice up`` (everything in one process) and ``sluice serve`` (the API by itself)."""

import asyncio
import json
import signal
from collections.abc import Callable

import click

from app import settings
from app.api.application import serve as serve_api
from app.cli.processes import log_for_service, on_signals, run_async, spare_what_stays
from app.cli.store import Access, Store, bootstrap, open_store
from app.maintenance import Maintenance
from app.sender import Sender
from app.settings import Settings
from app.supervision import Supervisor
from app.worker import Worker

_HOST = click.option("--host", help="Address to listen on.  [default: 127.0.0.1]")
_PORT = click.option(
    "--port", type=click.IntRange(0, 65535), help="Port to listen on; 0: any.  [default: 8080]"
)


@click.command()
@_HOST
@_PORT
@click.option(
    "--json",
    "as_json",
    is_flag=True,
    help="Begin the output with one line of JSON: url, key, workspaceId, environmentId.",
)
def up(host: str | None, port: int | None, as_json: bool) -> None:  # noqa: FBT001 - click passes by name
    """Run everything in one process: API, worker, and an embedded Postgres.

    Prints the address, and the first key with its workspace and environment. Ctrl-C stops it:
    calls in flight are finished first, a second Ctrl-C abandons them. Nothing is lost either way.
    """
    known = settings.load({"host": host, "port": port}).for_own_machine()
    log_for_service(known)
    with open_store(known, migrating=True) as store:
        run_async(_up(store, _json if as_json else _greeting))


@click.command()
@_HOST
@_PORT
def serve(host: str | None, port: int | None) -> None:
    """Run the API. On a database that has no key yet it prints a first one, once."""
    known: Settings = settings.load({"host": host, "port": port})
    log_for_service(known)
    with open_store(known, migrating=False) as store:
        run_async(_serve(store))


_Greet = Callable[[str, Access], None]


async def _up(store: Store, greet: _Greet) -> None:
    async with store.database("sluice-up") as db:
        access = await bootstrap(db, store)
        worker = Worker(store.settings, db, keyring=store.keyring, listen_url=store.direct_url)
        stop = asyncio.Event()

        def finish(_: signal.Signals) -> None:
            stop.set()
            worker.stop.set()

        def ready(url: str) -> None:
            spare_what_stays()
            greet(url, access)

        with on_signals(finish, worker.force.set):
            serving = asyncio.create_task(
                serve_api(
                    store.settings,
                    db,
                    keyring=store.keyring,
                    listen_url=store.direct_url,
                    stop=stop,
                    ready=ready,
                )
            )
            working = asyncio.create_task(worker.run())
            keeping = Supervisor("up")
            duty = Maintenance(
                store.settings, db, holder_id=worker.worker_id, give_way=store.give_way
            )
            keeping.start("maintenance", duty.run)
            sender = Sender(store.settings, db, keyring=store.keyring, listen_url=store.direct_url)
            sender.start()
            try:
                await asyncio.wait({serving, working}, return_when=asyncio.FIRST_COMPLETED)
            finally:
                # One ended: by a signal, or because it could not begin. Neither is left alone.
                stop.set()
                worker.stop.set()
                await asyncio.wait({serving, working})
                await sender.close()
                await keeping.stop()
        for task in (serving, working):
            task.result()


async def _serve(store: Store) -> None:
    async with store.database("sluice-serve") as db:
        access = await bootstrap(db, store)
        stop = asyncio.Event()

        def ready(url: str) -> None:
            spare_what_stays()
            _greeting(url, access)

        with on_signals(lambda _: stop.set(), stop.set):
            await serve_api(
                store.settings,
                db,
                keyring=store.keyring,
                listen_url=store.direct_url,
                stop=stop,
                ready=ready,
            )


def _json(url: str, access: Access) -> None:
    facts = {
        "url": url,
        "key": access.key,
        "workspaceId": str(access.workspace_id),
        "environmentId": str(access.environment_id),
    }
    click.echo(json.dumps(facts))


def _greeting(url: str, access: Access) -> None:
    key = access.key or "use the one you were given; it is stored hashed and cannot be shown again"
    click.echo(
        f"Sluice is ready.\n"
        f"  URL          {url}\n"
        f"  API key      {key}\n"
        f"  workspace    {access.workspace_id}\n"
        f"  environment  {access.environment_id}\n"
        f"  API guide    {url}/docs"
    )
