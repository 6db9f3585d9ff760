"""The flags of commands that talk to a server."""

from collections.abc import Callable

import click

from app import settings
from app.cli.client import Server
from app.cli.processes import log_for_person


def with_server(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command ``--server`` and ``--key``."""
    command = click.option("--key", help="The server's API key.  [default: that of `sluice up`]")(
        command
    )
    return click.option("--server", help="The server.  [default: http://127.0.0.1:8080]")(command)


def server_of(url: str | None, key: str | None) -> Server:
    """The server that these flags name."""
    known = settings.load()
    log_for_person(known)
    return Server.of(known, url, key)
