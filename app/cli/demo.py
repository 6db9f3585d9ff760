"""``sluice demo``: a few hundred tickets, a simulated provider, an embedded Postgres, visible work."""

import sys
from os.path import relpath
from pathlib import Path
from shutil import which
from textwrap import shorten
from typing import Final

import click

from app import settings
from app.cli.answers import Tally, usable_output
from app.cli.local import Ended, Job, run_locally
from app.cli.processes import log_for_person, run_async
from app.cli.store import Store, open_store
from app.db import folder
from app.errors import SluiceError
from app.inputs import Input, open_input
from app.simulator import Behaviour, Simulator

# Twenty-four calls at a time of two thirds of a second: three hundred tickets take about ten
# seconds, and the bar moves all the while. A rate limit would be used up in one burst, and then
# nothing would be seen for the rest of its minute.
_CONCURRENCY: Final = 24
_LATENCY_MS: Final = 650
_RPM: Final = 6000

_PROMPT: Final = "Reply to {customer}, who uses {product}, in two friendly sentences: {text}"
_SYSTEM: Final = "You answer support tickets."


@click.command()
@click.option("--limit", type=click.IntRange(min=1), help="Only the first so many tickets.")
@click.option(
    "--output",
    "-o",
    type=click.Path(path_type=Path),
    default=Path("tickets.answers.csv"),
    show_default=True,
    help="Where the answers go.",
)
def demo(limit: int | None, output: Path) -> None:
    """Answer some three hundred support tickets with a simulated provider. Costs nothing."""
    known = settings.load({"concurrency": _CONCURRENCY}).for_own_machine()
    log_for_person(known)
    tickets = folder("docs") / "examples" / "tickets.csv"
    if not tickets.is_file():
        raise SluiceError(
            "The tickets of the demo are in the repository only (docs/examples/tickets.csv). Start"
            " `sluice simulate` in another terminal, and try a file of your own: sluice run FILE"
            " --base-url http://127.0.0.1:8090/v1 --model simulated --prompt '…'"
        )
    given = open_input(
        tickets, prompt=_PROMPT, system=_SYSTEM, format="csv", params={}, endpoint=None
    )
    target = usable_output(output, given)
    with open_store(known, migrating=True) as store:
        ended = run_async(_demo(store, given, target, limit))
    if ended.tally is not None:
        _show(ended.tally, output)
    raise SystemExit(ended.exit_code)


async def _demo(store: Store, given: Input, output: Path, limit: int | None) -> Ended:
    simulator = Simulator(Behaviour(port=0, rpm=_RPM, latency_ms=_LATENCY_MS))
    url = await simulator.start()
    try:
        click.echo(f"A simulated provider answers at {url}/v1. Postgres is {_place(store)}.")
        job = Job(
            input=given,
            output=output,
            model="simulated",
            base_url=f"{url}/v1",
            key=None,
            rpm=_RPM,
            limit=limit,
            fresh=True,
            samples=3,
        )
        return await run_locally(store, job)
    finally:
        await simulator.stop()


def _place(store: Store) -> str:
    if store.server is None:
        return "the one of SLUICE_DATABASE_URL"
    return f"embedded, under {store.settings.home}"


def _show(tally: Tally, output: Path) -> None:
    click.echo()
    for row, answer in tally.samples:
        ticket = row.columns[-1] if row.columns else ""
        click.echo(f"  ticket  {shorten(ticket, 100, placeholder=' …')}")
        click.echo(f"  answer  {shorten(answer, 100, placeholder=' …')}\n")
    # From a checkout the program lies in .venv, where the shell does not look.
    sluice = "sluice" if which("sluice") else relpath(sys.argv[0])
    click.echo(
        f"All answers are in {output}. What to try next:\n\n"
        "  your own questions (the key is read from OPENAI_API_KEY):\n"
        f"    {sluice} run FILE.csv --model MODEL --rpm 500 --prompt 'Answer: {{column}}'\n"
        "  the API; its guide is at http://127.0.0.1:8080/docs:\n"
        f"    {sluice} up\n"
        "  a provider to try limits and failures against:\n"
        f"    {sluice} simulate --rpm 1000\n"
        "  everything the main job can do:\n"
        f"    {sluice} run --help"
    )
