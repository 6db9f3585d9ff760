"""Settings: every ``SLUICE_*`` variable, its default and what it is for.

The only place that reads the environment. The table in README.md is made from this class by
``describe()``, and a test compares them.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Self
from urllib.parse import urlsplit

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    field_validator,
    model_validator,
)
from pydantic import ValidationError as PydanticError

from app.addresses import LOOPBACK, Guard, networks
from app.errors import SettingsError

PREFIX = "SLUICE_"


def default_home() -> Path:
    """Where the embedded database and the generated key live."""
    return Path("/var/lib/sluice") if os.geteuid() == 0 else Path.home() / ".sluice"


def _networks(value: str) -> str:
    return ",".join(map(str, networks(value)))


def _schedule(value: str) -> str:
    try:
        waits = [float(part) for part in value.split(",")]
    except ValueError:
        waits = []
    if not waits or not all(0 <= wait <= _MOST_WAIT_S for wait in waits):
        raise ValueError("write seconds, comma separated, such as 5,300,1800; one per repetition")
    return value


Networks = Annotated[str, AfterValidator(_networks)]
_MOST_WAIT_S = 30 * 86_400.0


class Settings(BaseModel):
    """All settings, validated. Field ``x_y`` is read from ``SLUICE_X_Y``."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    database_url: str | None = Field(
        default=None, description="PostgreSQL 15 or newer; absent: an embedded server"
    )
    database_direct_url: str | None = Field(
        default=None,
        description="the same database past a transaction pooler, for LISTEN and migrations",
    )
    home: Path = Field(
        default_factory=default_home, description="folder of the embedded server and its key"
    )
    secret_key: str | None = Field(
        default=None,
        repr=False,
        description="key(s) that seal secrets, `id:base64,…`; embedded: generated once",
    )
    embedded_postgres: int | None = Field(
        default=None, description="version of a new embedded server: 16 or 18"
    )
    host: str = Field(default="127.0.0.1", description="address the API listens on")
    port: int = Field(default=8080, ge=0, le=65535, description="port the API listens on")
    base_path: str = Field(default="", description="prefix of every route, such as /api")
    log_level: str = Field(default="info", description="debug, info, warning or error")
    pool_size: int = Field(default=10, ge=2, description="database connections per process")

    concurrency: int = Field(default=1000, ge=1, description="calls in flight per worker process")
    max_attempts: int = Field(default=5, ge=1, le=100, description="failures before an item fails")
    max_crashes: int = Field(
        default=3, ge=1, description="crashes alone in its worker before an item fails"
    )
    backoff_base_s: float = Field(default=1.0, gt=0, description="first retry waits up to this")
    backoff_cap_s: float = Field(default=60.0, gt=0, description="no retry waits longer than this")
    guard_s: float = Field(
        default=0.75, ge=0, description="a call not sent this soon after its claim is given back"
    )
    burst_s: float = Field(
        default=0.3,
        gt=0,
        le=60,
        description="seconds of a limit's even rate that may go at once; 60: no pacing",
    )
    slow_start: int = Field(
        default=16,
        ge=0,
        description="calls at once to begin with where no limit is known, doubling; 0: no such care",
    )
    lease_grace_s: float = Field(
        default=60.0, gt=0, description="a lease is the call's timeout plus this"
    )
    flush_items: int = Field(default=500, ge=1, description="outcomes per commit at most")
    flush_ms: int = Field(default=20, ge=0, description="longest time an outcome waits for others")
    heartbeat_s: float = Field(default=5.0, gt=0, description="how often a worker shows it lives")
    dead_after_s: float = Field(default=20.0, gt=0, description="silence after which it is dead")
    drain_s: float = Field(default=30.0, ge=0, description="time to finish calls on SIGTERM")
    max_unwritten: int = Field(
        default=5000, ge=1, description="outcomes kept while the database is away"
    )

    oidc_issuer: str | None = Field(
        default=None, description="whose tokens let users in (OIDC), `https://…`; absent: keys only"
    )
    oidc_audience: str | None = Field(
        default=None, description="what these tokens must be for: their `aud`"
    )
    oidc_leeway_s: int = Field(
        default=30, ge=0, le=600, description="by how much the issuer's clock may differ from ours"
    )
    oidc_timeout_s: float = Field(
        default=5.0, gt=0, le=60, description="longest wait for the issuer's keys"
    )
    oidc_keys_s: float = Field(
        default=3600.0, ge=1, description="how long the issuer's keys are used before a new look"
    )
    users_create_workspaces: bool = Field(
        default=True, description="whether any user may make a workspace, or the operator only"
    )

    max_body_bytes: int = Field(
        default=100 * 1024 * 1024, ge=1024, description="largest request body"
    )
    max_items: int = Field(default=1_000_000, ge=1, description="most items of one batch")
    max_item_bytes: int = Field(
        default=8 * 1024 * 1024, ge=256, description="largest request of one item"
    )
    quota_items: int = Field(
        default=10_000_000, ge=0, description="most unfinished items of a workspace; 0: any number"
    )
    quota_batches: int = Field(
        default=100_000, ge=0, description="most unfinished batches of a workspace; 0: any number"
    )
    quota_bytes: int = Field(
        default=20 * 1024**3,
        ge=0,
        description="most bytes of their requests; 0: any number",
    )
    max_file_bytes: int = Field(
        default=512 * 1024 * 1024, ge=1024, description="largest file of /v1/files"
    )
    max_batch_file_bytes: int = Field(
        default=200 * 1024 * 1024, ge=1024, description="largest file that a batch is made from"
    )
    batch_file_days: float = Field(
        default=30.0, gt=0, description="files for batches are deleted after this"
    )
    validation_lease_s: float = Field(
        default=15.0,
        gt=0,
        description="silence after which another process validates a batch's file",
    )
    max_response_bytes: int = Field(
        default=32 * 1024 * 1024, ge=1024, description="largest answer of a provider"
    )
    idempotency_hours: int = Field(
        default=24, ge=1, description="how long an Idempotency-Key means the batch it made"
    )
    default_timeout_ms: int = Field(
        default=300_000, ge=100, description="one provider call, where nothing else is said"
    )
    probe_timeout_s: float = Field(
        default=20.0, gt=0, le=600, description="longest test call of a connection or resource"
    )
    ledger_keep_hours: int = Field(default=48, ge=2, description="how long ledger slots are kept")
    usage_days: int = Field(
        default=366, ge=1, description="longest time that one question about usage may span"
    )
    usage_timeout_s: float = Field(
        default=30.0, gt=0, description="longest time that Postgres may think about one"
    )
    retention_days: int | None = Field(
        default=None,
        ge=1,
        description="items, attempts and events are kept so long; absent: for ever",
    )
    retention_texts_days: int | None = Field(
        default=None, ge=1, description="prompts and answers are kept so long; absent: as the items"
    )
    retention_attempts_days: int | None = Field(
        default=None, ge=1, description="attempts, if shorter; absent: as the items"
    )
    retention_events_days: int | None = Field(
        default=None, ge=1, description="events, if shorter; absent: as the items"
    )
    retention_minutes_days: int | None = Field(
        default=400, ge=1, description="rollups by the minute are kept so long"
    )
    retention_hours_days: int | None = Field(
        default=None, ge=1, description="rollups by the hour are kept so long; absent: for ever"
    )
    sse_keepalive_s: float = Field(default=15.0, gt=0, description="comment on a silent stream")
    sse_recheck_s: float = Field(
        default=10.0, gt=0, description="how often a stream's caller is asked about again"
    )
    stall_s: float = Field(
        default=60.0, ge=1, description="a client that takes nothing for so long is cut off"
    )

    provider_allow_networks: Networks = Field(
        default="",
        description="networks beyond the public ones that a baseUrl may lead to, as CIDRs",
    )
    callback_allow_networks: Networks = Field(
        default="",
        description="the same for callbacks and webhooks, which may then also be plain http",
    )
    delivery_concurrency: int = Field(
        default=10, ge=1, description="deliveries at once to one address, per process"
    )
    delivery_timeout_s: float = Field(default=15.0, gt=0, description="one delivery's answer")
    delivery_schedule_s: Annotated[str, AfterValidator(_schedule)] = Field(
        default="5,300,1800,7200,18000,36000,50400,72000,86400",
        description="waits between the tries of a delivery, each with up to a tenth of jitter",
    )
    delivery_rest_s: float = Field(
        default=30.0,
        gt=0,
        description="longest rest of an address that keeps failing, between single tries",
    )

    @model_validator(mode="after")
    def _issuer_and_audience(self) -> Self:
        if (self.oidc_issuer is None) != (self.oidc_audience is None):
            raise ValueError("SLUICE_OIDC_ISSUER and SLUICE_OIDC_AUDIENCE go together")
        return self

    @field_validator("oidc_issuer")
    @classmethod
    def _issuer_is_safe(cls, value: str | None) -> str | None:
        if value is None:
            return None
        parts = urlsplit(value)
        # In the clear only on this machine: whoever can change the keys on their way is anybody.
        here = parts.hostname in ("localhost", "127.0.0.1", "::1")
        if not parts.hostname or not (parts.scheme == "https" or (parts.scheme == "http" and here)):
            raise ValueError("must be an https address")
        if parts.query or parts.fragment or parts.username is not None:
            raise ValueError("must be an address without user, query and fragment")
        return value

    @property
    def provider_guard(self) -> Guard:
        """Whom providers' addresses may lead to."""
        return Guard(
            allowed=networks(self.provider_allow_networks),
            setting=f"{PREFIX}PROVIDER_ALLOW_NETWORKS",
        )

    @property
    def callback_guard(self) -> Guard:
        """Whom callbacks and webhooks may lead to."""
        return Guard(
            allowed=networks(self.callback_allow_networks),
            setting=f"{PREFIX}CALLBACK_ALLOW_NETWORKS",
            needs_tls=True,
        )

    @property
    def delivery_waits(self) -> tuple[float, ...]:
        """Seconds between the tries of a delivery; it is given up after the last."""
        return tuple(float(part) for part in self.delivery_schedule_s.split(","))

    def for_own_machine(self) -> "Settings":
        """The same where a person runs all of it: providers on this machine may be called too."""
        allowed = (*networks(self.provider_allow_networks), *LOOPBACK)
        return self.model_copy(update={"provider_allow_networks": ",".join(map(str, allowed))})

    @property
    def direct_url(self) -> str | None:
        """Where LISTEN and migrations connect."""
        return self.database_direct_url or self.database_url


def load(overrides: Mapping[str, object] | None = None) -> Settings:
    """Settings from the environment; ``overrides`` (flags that are not None) win.

    Raises SettingsError naming the variable, what is wrong with it, and unknown SLUICE_ names.
    """
    known = {PREFIX + name.upper(): name for name in Settings.model_fields}
    given: dict[str, object] = {}
    for variable, value in os.environ.items():
        if variable in known and value != "":
            given[known[variable]] = value
        elif variable.startswith(PREFIX) and variable not in known and "_TEST_" not in variable:
            close = ", ".join(sorted(known))
            raise SettingsError(f"{variable} is not a setting of Sluice. It knows: {close}.")
    given |= {k: v for k, v in (overrides or {}).items() if v is not None}
    try:
        return Settings.model_validate(given)
    except PydanticError as error:
        first = error.errors()[0]
        said = first["msg"].removeprefix("Value error, ")
        if not first["loc"]:  # of several together
            raise SettingsError(f"{said}.") from None
        raise SettingsError(
            f"{PREFIX}{first['loc'][0]}".upper() + f" cannot be used: {said}."
        ) from None


def provider_key() -> str | None:
    """``OPENAI_API_KEY``, under which most programs look for a provider's key; None when unset."""
    return os.environ.get("OPENAI_API_KEY") or None


def describe() -> str:
    """The settings as a Markdown table, for README.md."""
    rows = ["| setting | default | what for |", "|---|---|---|"]
    for name, field in Settings.model_fields.items():
        default = "`~/.sluice`, as root `/var/lib/sluice`" if name == "home" else field.default
        shown = "-" if default in (None, "") else default if name == "home" else f"`{default}`"
        rows.append(f"| `{PREFIX}{name.upper()}` | {shown} | {field.description} |")
    return "\n".join(rows)
