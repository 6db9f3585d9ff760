"""Dockerfile and compose.yaml name only what exists: commands, flags, settings.

Docker itself is not needed: what rots is names.
"""

import json
import re
import shlex
import tomllib
from pathlib import Path
from typing import Any, cast

import click
import pytest
import yaml

from app.cli import main
from app.settings import PREFIX, Settings

ROOT = Path(__file__).resolve().parent.parent
SETTINGS = {PREFIX + name.upper() for name in Settings.model_fields}
Service = dict[str, Any]


def compose() -> dict[str, Service]:
    parsed = yaml.safe_load((ROOT / "compose.yaml").read_text(encoding="utf-8"))
    return cast("dict[str, Service]", parsed["services"])


def our_services() -> dict[str, Service]:
    return {name: service for name, service in compose().items() if service["image"] == "sluice"}


def instructions(name: str) -> list[str]:
    """What follows an instruction in the Dockerfile's last stage, continuation lines joined."""
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8").replace("\\\n", " ")
    last_stage = text.rpartition("\nFROM ")[2]
    return re.findall(rf"^{name}\s+(.+)$", last_stage, re.MULTILINE)


def assert_command(arguments: list[str]) -> None:
    """The arguments parse as a command of ours, flags included; nothing runs."""
    assert isinstance(main, click.Group)
    name, *rest = arguments
    with click.Context(main) as context:
        command = main.get_command(context, name)
        assert command is not None, f"there is no command {name}"
        with command.make_context(name, rest, parent=context):
            pass


def test_image_starts_a_real_command() -> None:
    (entrypoint,) = instructions("ENTRYPOINT")
    (command,) = instructions("CMD")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    (program,) = json.loads(entrypoint)
    assert program in project["scripts"]
    assert_command(json.loads(command))


def test_image_does_not_run_as_root() -> None:
    user = instructions("USER")[-1]
    assert user not in {"root", "0"}
    assert any(re.search(rf"useradd .*\b{user}$", line) for line in instructions("RUN"))


def test_image_checks_its_health() -> None:
    (check,) = instructions("HEALTHCHECK")
    assert " CMD [" in check


def test_image_sets_only_settings_that_exist() -> None:
    given = re.findall(rf"\b({PREFIX}\w+)=", " ".join(instructions("ENV")))
    assert given
    assert set(given) <= SETTINGS


def test_image_installs_the_pinned_versions() -> None:
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    installs = re.findall(r"pip install ([^\\\n]+)", text)
    assert installs
    assert all("-c constraints.txt" in i or "--no-deps" in i for i in installs)


@pytest.mark.parametrize("name", our_services())
def test_service_starts_a_real_command(name: str) -> None:
    command: str | list[str] = our_services()[name]["command"]
    assert_command(shlex.split(command) if isinstance(command, str) else command)


def test_every_role_has_a_service() -> None:
    commands = {service["command"][0] for service in our_services().values()}
    assert commands == {"migrate", "serve", "worker"}


@pytest.mark.parametrize("name", our_services())
def test_service_sets_only_settings_that_exist(name: str) -> None:
    environment: dict[str, str] = our_services()[name]["environment"]
    assert {key for key in environment if key.startswith(PREFIX)} <= SETTINGS
    assert {f"{PREFIX}DATABASE_URL", f"{PREFIX}SECRET_KEY"} <= environment.keys()


@pytest.mark.parametrize("name", compose())
def test_service_holds_no_secret_of_its_own(name: str) -> None:
    environment: dict[str, str] = compose()[name]["environment"]
    secret = [v for k, v in environment.items() if re.search(r"PASSWORD|SECRET|_URL", k)]
    assert secret
    assert all(re.search(r"\$\{\w+:\?", value) for value in secret)


@pytest.mark.parametrize("name", compose())
def test_service_that_stays_is_watched(name: str) -> None:
    service = compose()[name]
    # The API has the image's own check.
    inherited = service.get("command", [""])[0] == "serve"
    ends = service["restart"] == "no"
    watched = inherited or "test" in service.get("healthcheck", {})
    assert ends or watched


@pytest.mark.parametrize("name", our_services())
def test_service_waits_for_what_it_needs(name: str) -> None:
    waits: dict[str, dict[str, str]] = our_services()[name]["depends_on"]
    expected = (
        {"postgres": "service_healthy"}
        if name == "migrate"
        else {"migrate": "service_completed_successfully"}
    )
    assert {other: wait["condition"] for other, wait in waits.items()} == expected


def test_nothing_is_published_beyond_this_machine() -> None:
    published = [str(p) for service in compose().values() for p in service.get("ports", [])]
    assert published == ["127.0.0.1:8080:8080"]


def test_worker_check_asks_for_columns_that_exist() -> None:
    statement = compose()["worker"]["healthcheck"]["test"][-1]
    schema = (ROOT / "sql" / "schema.sql").read_text(encoding="utf-8")
    table = schema[schema.index("create table workers (") :].partition(";")[0]
    for column in ("host", "stopped_at", "heartbeat_at"):
        assert column in statement
        assert re.search(rf"^    {column} ", table, re.MULTILINE)
