"""The command line: ``sluice``. One module per command or small family of them.

    run          the main job: answer the rows of a file          run, local, remote, answers, progress
    up, serve    the API, with everything else or by itself       up
    worker       the calls, in one process or several             workers
    batches      look at and end batches of a server              batches, client, flags
    keys         the API keys of a server                         keys, client, flags
    workspaces   tenants, in the database itself                  workspaces
    report       print the reporting views, let people read them   report
    prices, keep what models cost, how long things are kept      prices
    demo         three hundred tickets and a simulated provider   demo
    simulate     that provider by itself                          simulate
    connections, resources   a server's accounts and models       connections, client
    migrate, secrets, doctor, explain, db                         upkeep
    (all)        the database and keys that the settings name     store
    (all)        event loop and signals                           processes

A command is imported when it is called, so that ``sluice --help`` does not wait for a web framework.
What a person can act on (SluiceError) ends in one sentence on standard error, never in a traceback;
exit code 2 means that nothing was started.
"""

import importlib
import signal
import sys
from collections.abc import Mapping
from types import FrameType, MappingProxyType
from typing import Final, NoReturn, cast

import click

from app import __version__
from app.errors import SluiceError, UsageError

#: Exit code after Ctrl-C, as shells report it.
INTERRUPTED: Final = 130
TERMINATED: Final = 143

_MODULES: Final[Mapping[str, str]] = MappingProxyType(
    {
        "run": "run",
        "demo": "demo",
        "up": "up",
        "serve": "up",
        "worker": "workers",
        "batches": "batches",
        "keys": "keys",
        "workspaces": "workspaces",
        "connections": "connections",
        "resources": "connections",
        "report": "report",
        "prices": "prices",
        "keep": "prices",
        "migrate": "upkeep",
        "secrets": "upkeep",
        "doctor": "upkeep",
        "simulate": "simulate",
        "db": "upkeep",
        "explain": "upkeep",
    }
)


class _Commands(click.Group):
    """Commands in the order in which a newcomer meets them, each imported when needed."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        del ctx
        return list(_MODULES)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        del ctx
        module = _MODULES.get(cmd_name)
        if module is None:
            return None
        found: object = getattr(importlib.import_module(f"app.cli.{module}"), cmd_name)
        return cast("click.Command", found)

    def invoke(self, ctx: click.Context) -> object:
        """Run the command; an expected error becomes its sentence and its exit code."""
        # Before an event loop takes over: SIGTERM unwinds like Ctrl-C, so that locks are released.
        before = signal.signal(signal.SIGTERM, _terminate)
        try:
            return super().invoke(ctx)
        except SluiceError as error:
            click.echo(f"sluice: {error}", err=True)
            ctx.exit(2 if isinstance(error, UsageError) else 1)
        except KeyboardInterrupt:
            ctx.exit(INTERRUPTED)
        finally:
            signal.signal(signal.SIGTERM, before)


def _terminate(number: int, frame: FrameType | None) -> NoReturn:
    del number, frame
    sys.exit(TERMINATED)


@click.group(
    cls=_Commands,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="Settings come from SLUICE_* variables; without SLUICE_DATABASE_URL an embedded Postgres"
    " is used, whose data lie in SLUICE_HOME. `sluice COMMAND --help` tells more.",
)
@click.version_option(__version__, prog_name="sluice")
def main() -> None:
    """Answer many questions with a language model, through PostgreSQL, at the rate limit.

    Start with `sluice demo`, then `sluice run FILE`.
    """
