"""The app, and the server around it."""

import asyncio
import contextlib
import errno
import socket
import sys
from collections.abc import AsyncGenerator, Callable, Generator

import uvicorn
from litestar import Litestar, Router
from litestar.di import Provide
from litestar.plugins.pydantic import PydanticPlugin

from app import tokens
from app.api import (
    auth,
    batches,
    connections,
    deliveries,
    errors,
    health,
    keys,
    openai_batches,
    openai_files,
    openai_wire,
    outlet,
    resources,
    usage,
    webhook_endpoints,
    workspaces,
)
from app.api.context import Context
from app.api.documentation import documentation
from app.api.streams import Hub
from app.db import Database
from app.doorbell import EVENTS, Listener, Ringer
from app.errors import SluiceError
from app.log import Log
from app.oidc import Issuer
from app.secrets import Keyring
from app.settings import Settings
from app.supervision import Supervisor
from app.validator import Validator

log = Log("api")

_GRACE_S = 10
_BACKLOG = 2048


def create_app(settings: Settings, db: Database, *, keyring: Keyring, listen_url: str) -> Litestar:
    """The API on a pool that is open. ``listen_url`` reaches Postgres past any pooler."""
    hub = Hub(db, keepalive_s=settings.sse_keepalive_s, recheck_s=settings.sse_recheck_s)
    ringer = Ringer(db)
    context = Context(
        settings=settings,
        db=db,
        keyring=keyring,
        listen_url=listen_url,
        ringer=ringer,
        hub=hub,
        validator=Validator(settings, db, ringer=ringer),
        issuer=_issuer(settings),
        keys=auth.keys(db),
        batches=auth.batches_by_id(db),
    )

    def given() -> Context:
        return context

    @contextlib.asynccontextmanager
    async def running(app: Litestar) -> AsyncGenerator[None]:
        app.state.context = context
        listener = Listener(listen_url, [EVENTS], hub.heard, db=db)
        supervisor = Supervisor("api")
        supervisor.start("ringer", context.ringer.run)
        supervisor.start("listener", listener.run)
        supervisor.start("look", hub.look)
        supervisor.start("ping", hub.ping)
        supervisor.start("recheck", hub.recheck)
        supervisor.start("validator", context.validator.run)
        try:
            yield
        finally:
            hub.close()
            for chore in list(context.chores):
                chore.cancel()
            await asyncio.gather(*context.chores, return_exceptions=True)
            await supervisor.stop()
            await context.ringer.flush()
            if context.issuer is not None:
                await context.issuer.close()

    base = settings.base_path.strip("/")
    prefix = f"/{base}" if base else ""
    app = Litestar(
        route_handlers=[
            Router(
                prefix or "/",
                route_handlers=[
                    batches.router,
                    deliveries.router,
                    connections.router,
                    resources.router,
                    openai_files.router,
                    openai_batches.router,
                    keys.router,
                    workspaces.router,
                    webhook_endpoints.router,
                    usage.router,
                ],
            ),
            health.router,
        ],
        lifespan=[running],
        dependencies={"context": Provide(given, sync_to_thread=False)},
        exception_handlers={**openai_wire.handlers(prefix)},
        before_send=[errors.stamp],
        plugins=[PydanticPlugin(prefer_alias=True)],
        openapi_config=documentation(prefix),
        logging_config=None,
        debug=False,
    )
    auth.require_declared(app)
    return app


def _issuer(settings: Settings) -> Issuer | None:
    if settings.oidc_issuer is None or settings.oidc_audience is None:
        return None
    return Issuer(
        settings.oidc_issuer,
        audience=settings.oidc_audience,
        leeway_s=settings.oidc_leeway_s,
        timeout_s=settings.oidc_timeout_s,
        keys_s=settings.oidc_keys_s,
    )


async def serve(
    settings: Settings,
    db: Database,
    *,
    keyring: Keyring,
    listen_url: str,
    stop: asyncio.Event,
    ready: Callable[[str], None] | None = None,
) -> None:
    """Serve the API until ``stop`` is set; ``ready`` is told its address once it answers.

    Requests in flight are let finish for ten seconds, streams end where they are. Signals are the
    caller's. Raises SluiceError when it cannot listen or cannot start.
    """
    app = create_app(settings, db, keyring=keyring, listen_url=listen_url)
    tokens.load()
    # Threads that take batches in keep the interpreter for as long as this whenever the event loop
    # wants it; by default 5 ms, several times in every request.
    sys.setswitchinterval(0.001)
    listening = _bind(settings.host, settings.port, stall_s=settings.stall_s)
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    url = f"http://{host}:{listening.getsockname()[1]}"
    server = _Server(
        uvicorn.Config(
            app,
            http=outlet.Protocol,
            lifespan="on",
            ws="none",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            backlog=_BACKLOG,
            timeout_graceful_shutdown=_GRACE_S,
        ),
        started=lambda: ready(url) if ready is not None else None,
    )

    async def stopped() -> None:
        await stop.wait()
        hub: Hub = app.state.context.hub
        hub.close()
        server.should_exit = True

    stopping = asyncio.create_task(stopped())
    try:
        await server.serve(sockets=[listening])
    except SystemExit:
        raise SluiceError("The API could not start; the log says why.") from None
    finally:
        stopping.cancel()
        listening.close()


class _Server(uvicorn.Server):
    """uvicorn without signal handlers of its own: the process around it has them."""

    def __init__(self, config: uvicorn.Config, *, started: Callable[[], None]) -> None:
        super().__init__(config)
        self._on_start = started

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._on_start()

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        yield


def _bind(host: str, port: int, *, stall_s: float) -> socket.socket:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listening = socket.socket(family, kind, protocol)
    except OSError as error:
        raise SluiceError(
            f"{host} is not an address of this machine ({error.strerror}); "
            "choose another with --host or SLUICE_HOST."
        ) from None
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        # Inherited by every connection: one whose client takes nothing for so long, dead or stalled,
        # is closed by the kernel. Only Linux can; elsewhere TCP's own patience applies.
        if hasattr(socket, "TCP_USER_TIMEOUT"):
            listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, round(stall_s * 1000))
        listening.bind(address)
        # Now, not when the server starts: two processes may bind, only one may listen.
        listening.listen(_BACKLOG)
    except OSError as error:
        listening.close()
        if error.errno == errno.EADDRINUSE:
            raise SluiceError(
                f"Port {port} on {host} is in use; choose another with --port or SLUICE_PORT."
            ) from None
        raise SluiceError(
            f"Cannot listen on port {port} of {host} ({error.strerror}); "
            "choose others with --host and --port."
        ) from None
    listening.settimeout(0)
    return listening
