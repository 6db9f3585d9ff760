"""``sluice simulate``: a provider that enforces limits and can misbehave, to try things against."""

from typing import Literal

import click

from app import simulator
from app.errors import UsageError
from app.simulator import Behaviour, Simulator
from app.simulator_limits import HeaderStyle

_DEFAULT = Behaviour()
_RATE = click.FloatRange(0, 1)


@click.command()
@click.option("--host", default=_DEFAULT.host, show_default=True, help="Address to listen on.")
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    default=_DEFAULT.port,
    show_default=True,
    help="Port to listen on; 0: any free one.",
)
@click.option(
    "--rpm", type=click.IntRange(min=1), help="Requests per minute; by default any number."
)
@click.option("--rpd", type=click.IntRange(min=1), help="Requests in any 24 hours.")
@click.option("--tpm", type=click.IntRange(min=1), help="Tokens per minute; by default any number.")
@click.option("--input-tpm", type=click.IntRange(min=1), help="Input tokens per minute.")
@click.option("--output-tpm", type=click.IntRange(min=1), help="Output tokens per minute.")
@click.option("--max-in-flight", type=click.IntRange(min=1), help="Calls at once.")
@click.option(
    "--algorithm",
    type=click.Choice(["sliding", "fixed", "bucket"]),
    default=_DEFAULT.algorithm,
    show_default=True,
    help="How a minute is counted.",
)
@click.option(
    "--bucket-seconds",
    type=click.FloatRange(min=0, min_open=True),
    default=_DEFAULT.bucket_seconds,
    show_default=True,
    help="How many seconds of the rate a bucket holds.",
)
@click.option(
    "--header-style",
    type=click.Choice(["openai", "anthropic", "groq"]),
    default=_DEFAULT.header_style,
    show_default=True,
    help="Whose headers tell of the limits.",
)
@click.option(
    "--latency-ms",
    type=click.FloatRange(min=0),
    default=_DEFAULT.latency_ms,
    show_default=True,
    help="Median time of an answer.",
)
@click.option(
    "--output-tokens",
    type=click.FloatRange(min=1),
    default=_DEFAULT.output_tokens,
    show_default=True,
    help="Median length of an answer.",
)
@click.option("--error-rate", type=_RATE, default=0.0, help="Share of calls that end in a 500.")
@click.option("--throttle-rate", type=_RATE, default=0.0, help="… in a 429 without a reason.")
@click.option("--hang-rate", type=_RATE, default=0.0, help="… in no answer at all.")
@click.option("--cut-rate", type=_RATE, default=0.0, help="… in a connection cut half way.")
@click.option("--garbage-rate", type=_RATE, default=0.0, help="… in a 200 that is not JSON.")
@click.option("--trickle-rate", type=_RATE, default=0.0, help="… in an answer of a byte at a time.")
@click.option("--seed", type=int, help="Makes faults and lengths the same in every run.")
@click.option("--require-key", help="Refuse calls without this key.")
def simulate(  # noqa: PLR0917 - click passes by name
    host: str,
    port: int,
    rpm: int | None,
    rpd: int | None,
    tpm: int | None,
    input_tpm: int | None,
    output_tpm: int | None,
    max_in_flight: int | None,
    algorithm: Literal["sliding", "fixed", "bucket"],
    bucket_seconds: float,
    header_style: HeaderStyle,
    latency_ms: float,
    output_tokens: float,
    error_rate: float,
    throttle_rate: float,
    hang_rate: float,
    cut_rate: float,
    garbage_rate: float,
    trickle_rate: float,
    seed: int | None,
    require_key: str | None,
) -> None:
    """Simulate an OpenAI-compatible provider until Ctrl-C.

    GET /report tells what clients did to it; its answers always say that they are simulated.
    """
    try:
        behaviour = Behaviour(
            host=host,
            port=port,
            rpm=rpm,
            rpd=rpd,
            tpm=tpm,
            input_tpm=input_tpm,
            output_tpm=output_tpm,
            max_in_flight=max_in_flight,
            algorithm=algorithm,
            bucket_seconds=bucket_seconds,
            header_style=header_style,
            latency_ms=latency_ms,
            output_tokens=output_tokens,
            error_rate=error_rate,
            throttle_rate=throttle_rate,
            hang_rate=hang_rate,
            cut_rate=cut_rate,
            garbage_rate=garbage_rate,
            trickle_rate=trickle_rate,
            seed=seed,
            require_key=require_key,
        )
    except ValueError as error:
        raise UsageError(f"{error}.") from None
    simulator.serve(behaviour, on_ready=_greet)


def _greet(_: Simulator, url: str) -> None:
    click.echo(f"Simulating a provider at {url}/v1 (report: {url}/report). Ctrl-C ends it.")
