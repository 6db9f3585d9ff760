"""``sluice run FILE``: its options, and the choice between doing it here and asking a server."""

import json
from pathlib import Path
from typing import Literal, NoReturn
from urllib.parse import urlsplit

import click

from app import settings
from app.cli import client
from app.cli.answers import default_output, usable_output
from app.cli.local import OPENAI, Job, run_locally
from app.cli.processes import log_for_person, run_async
from app.cli.remote import Errand, run_remotely
from app.cli.store import open_store
from app.errors import InputError, UsageError
from app.inputs import Format, Input, open_input
from app.intake import parse_body

_EPILOG = """\b
FILE is CSV with a header (then --prompt says what to ask), JSON lines that are each the body of a
request, or OpenAI's batch input format.

\b
sluice run questions.csv --base-url https://api.openai.com/v1 --model gpt-5-mini \\
    --rpm 500 --tpm 200000 --prompt 'Answer in one sentence: {text}' --output answers.csv

\b
Ctrl-C stops cleanly, and the same command goes on where it was: a run is known by file, prompts,
model, base URL and parameters. No answered row is ever paid for twice, failed ones are tried again.
Exit code: 0 all rows answered, 1 some failed, 2 wrong usage (nothing was sent), 130 interrupted.
"""


class _Params(click.ParamType[tuple[str, object]]):
    """``name=value``, the value JSON or else text."""

    name = "NAME=VALUE"

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, object]:
        name, equals, text = str(value).partition("=")
        if not equals or not name:
            self.fail(f"'{value}' is not name=value, as in --param temperature=0", param, ctx)
        if name in ("model", "stream"):
            self.fail(f"'{name}' cannot be set with --param", param, ctx)
        try:
            parsed: object = json.loads(text, parse_constant=_no_constant)
        except (ValueError, RecursionError):
            parsed = text
        return name, parsed


def _no_constant(name: str) -> NoReturn:
    raise ValueError(name)


@click.command(epilog=_EPILOG)
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--prompt", help="What to ask of each CSV row; {column} is its value, {{ a brace.")
@click.option("--system", help="Instructions sent with each CSV row, as they are.")
@click.option("--base-url", help=f"The provider's OpenAI-compatible API.  [default: {OPENAI}]")
@click.option("--model", help="The model; by default the one that the requests name.")
@click.option(
    "--api-key", "-k", help="The provider's key; better given as OPENAI_API_KEY in the environment."
)
@click.option("--rpm", type=click.IntRange(min=1), help="Most requests per minute.")
@click.option("--tpm", type=click.IntRange(min=1), help="Most tokens (in and out) per minute.")
@click.option(
    "--output",
    "-o",
    type=click.Path(path_type=Path),
    help="Where the answers go.  [default: FILE's name + .answers, in the current directory]",
)
@click.option("--limit", type=click.IntRange(min=1), help="Only the first so many rows.")
@click.option("--fresh", is_flag=True, help="Begin anew: forget what was answered before.")
@click.option(
    "--param",
    "params",
    type=_Params(),
    multiple=True,
    help="A field of every request, such as temperature=0; repeat it for more.",
)
@click.option("--endpoint", help="Such as /v1/embeddings; by default what the file suggests.")
@click.option(
    "--format",
    "format_",
    type=click.Choice(["auto", "csv", "jsonl", "openai"]),
    default="auto",
    show_default=True,
    help="How FILE is to be read.",
)
@click.option(
    "--max-attempts", type=click.IntRange(1, 100), help="Failures before a row fails.  [default: 5]"
)
@click.option(
    "--timeout", type=click.FloatRange(0.1, 86_400), help="Seconds for one call.  [default: 300]"
)
@click.option(
    "--concurrency", type=click.IntRange(min=1), help="Most calls in flight.  [default: 1000]"
)
@click.option("--server", help="Let this Sluice server do it, such as http://127.0.0.1:8080.")
@click.option("--key", help="The server's API key.  [default: that of `sluice up` here]")
@click.option("--resource", help="With --server: the name of a resource there, for --model.")
def run(  # noqa: PLR0917 - click passes by name
    file: Path,
    prompt: str | None,
    system: str | None,
    base_url: str | None,
    model: str | None,
    api_key: str | None,
    rpm: int | None,
    tpm: int | None,
    output: Path | None,
    limit: int | None,
    fresh: bool,  # noqa: FBT001 - click passes by name
    params: tuple[tuple[str, object], ...],
    endpoint: str | None,
    format_: Format | Literal["auto"],
    max_attempts: int | None,
    timeout: float | None,
    concurrency: int | None,
    server: str | None,
    key: str | None,
    resource: str | None,
) -> None:
    """Answer every row of FILE with a language model, at the rate limit, and write the answers."""
    known = settings.load(
        {"concurrency": concurrency, "max_attempts": max_attempts}
    ).for_own_machine()
    log_for_person(known)
    given = open_input(
        file, prompt=prompt, system=system, format=format_, params=dict(params), endpoint=endpoint
    )
    target = usable_output(output or default_output(given), given)
    if server is not None:
        for flag, value in (("--timeout", timeout), ("--concurrency", concurrency)):
            if value is not None:
                raise UsageError(f"{flag} is for runs without --server: the server decides it.")
        errand = Errand(
            input=given,
            output=target,
            resource=resource,
            base_url=base_url,
            model=model,
            provider_key=api_key or settings.provider_key(),
            rpm=rpm,
            tpm=tpm,
            limit=limit,
            fresh=fresh,
            max_attempts=max_attempts,
        )
        raise SystemExit(run_remotely(client.Server.of(known, server, key), errand))
    for flag, value in (("--key", key), ("--resource", resource)):
        if value is not None:
            raise UsageError(f"{flag} goes with --server; the provider's key is --api-key.")
    job = Job(
        input=given,
        output=target,
        model=model or _model_of(given),
        base_url=usable_url(base_url or OPENAI, "--base-url"),
        key=api_key or settings.provider_key(),
        rpm=rpm,
        tpm=tpm,
        limit=limit,
        fresh=fresh,
        timeout_s=timeout,
    )
    with open_store(known, migrating=True) as store:
        raise SystemExit(run_async(run_locally(store, job)).exit_code)


def usable_url(url: str, flag: str) -> str:
    """The URL without its last slash. Raises UsageError for what is none."""
    try:
        parts = urlsplit(url.strip())
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        usable = False
    if usable and "@" in urlsplit(url).netloc:
        raise UsageError(f"{flag} must not hold a password; give the provider's key as --api-key.")
    if not usable:
        raise UsageError(f"{flag} '{url}' is not a URL; write it like http://127.0.0.1:8000/v1")
    return url.strip().rstrip("/")


def _model_of(given: Input) -> str:
    """The one model that all requests of the file name."""
    flag = "say which model with --model"
    if given.format == "csv":
        raise UsageError(f"{given.path} is CSV, so {flag}.")
    named: str | None = None
    for row in given.rows():
        place = f"{given.path} line {row.line}"
        model = parse_body(row.body, most_bytes=len(row.body)).get("model")
        if not isinstance(model, str) or not model:
            raise InputError(f"{place} names no model; {flag}")
        if named is not None and model != named:
            raise InputError(f"{place} names another model than the lines before; {flag} for all")
        named = model
    assert named is not None, "open_input found a row"
    return named
