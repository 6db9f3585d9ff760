"""``sluice simulate``: a provider that enforces limits and can misbehave, to try things against."""

from typing import Literal

import click

from app import simulator
from app.errors import UsageError
from app.simulator import Behaviour, Simulator

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
@click.option("--tpm", type=click.IntRange(min=1), help="Tokens per minute; by default any number.")
@click.option(
    "--algorithm",
    type=click.Choice(["sliding", "fixed", "bucket"]),
    default=_DEFAULT.algorithm,
    show_default=True,
    help="How a minute is counted.",
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
    tpm: int | None,
    algorithm: Literal["sliding", "fixed", "bucket"],
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
            tpm=tpm,
            algorithm=algorithm,
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
