"""The documents name what exists: settings, commands, routes, log events. Nothing here can rot."""

import ast
import re
from pathlib import Path

import click
import pytest

from app import settings
from app.cli import main

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
MODULES = sorted((ROOT / "app").rglob("*.py"))


def commands(group: click.Group, prefix: str = "sluice") -> list[tuple[str, click.Command]]:
    ctx = click.Context(group)
    found: list[tuple[str, click.Command]] = []
    for name in group.list_commands(ctx):
        command = group.get_command(ctx, name)
        assert command is not None
        if isinstance(command, click.Group):
            found += commands(command, f"{prefix} {name}")
        else:
            found.append((f"{prefix} {name}", command))
    return found


def test_readme_has_the_settings_as_they_are() -> None:
    assert settings.describe() in README, "put the output of app.settings.describe() into README.md"


@pytest.mark.parametrize(("name", "command"), commands(main), ids=str)
def test_readme_names_every_command_with_its_own_words(name: str, command: click.Command) -> None:
    said = f"| `{name}` | {command.get_short_help_str(200)} |"
    assert said in README


def test_readme_lists_every_event_of_the_log() -> None:
    logged: set[str] = set()
    for file in MODULES:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Attribute)
                and node.func.attr in {"debug", "info", "warning", "error"}
                and node.args
            ):
                names = (
                    str(c.value) for c in ast.walk(node.args[0]) if isinstance(c, ast.Constant)
                )
                logged |= {
                    name.split(" ")[0]
                    for name in names
                    if re.fullmatch(r"[a-z_]+\.[a-z_]+", name.split(" ")[0])
                }
    listed = set(re.findall(r"^\| `([a-z_]+\.[a-z_]+)` \|", README, re.MULTILINE))
    assert logged - listed == set(), "add to the table in README.md"
    assert listed - logged == set(), "no longer logged"


def test_only_settings_reads_the_environment() -> None:
    """Apart from what names the files of other programs, each with its reason beside it."""
    for file in MODULES:
        text = file.read_text(encoding="utf-8")
        for number, line in enumerate(text.splitlines(), start=1):
            if "os.environ" in line and file.name != "settings.py":
                assert "noqa: TID251" in line, f"{file.name}:{number}"


def test_nothing_of_this_machine_is_in_the_tree() -> None:
    """No lock files with addresses, no machine's paths: the tree installs anywhere."""
    for name in ("constraints.txt", "pyproject.toml", "Makefile", "Dockerfile", "compose.yaml"):
        text = (ROOT / name).read_text(encoding="utf-8")
        assert "://pypi" not in text
        assert "file://" not in text
        assert not re.search(r"/(home|root|work)/\w", text)
