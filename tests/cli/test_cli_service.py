"""Services and their processes: up, worker, simulate, and the commands that talk to a server."""

import json
import os
import re
import signal
import socket
import stat
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict

from app.secrets import Keyring
from tests.cli.conftest import Cli, Provider, cli_on, say_migrated, until
from tests.conftest import cloned


def first_line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        pytest.fail(f"exit code {process.wait()}: {process.communicate()[1]}")
    return line


def end(process: subprocess.Popen[str], number: signal.Signals = signal.SIGTERM) -> str:
    """Signal it and wait; what it said on standard error."""
    process.send_signal(number)
    _, complaints = process.communicate(timeout=30)
    return complaints


@dataclass(frozen=True)
class Up:
    """A service in one process, shared by the tests of this file; each asks it for other things."""

    cli: Cli
    told: dict[str, Any]

    @property
    def at(self) -> list[str]:
        return ["--server", self.told["url"], "--key", self.told["key"]]


@pytest.fixture(scope="module")
def up(cluster: str, template: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Up]:
    with (
        cloned(cluster, template) as database,
        cli_on(say_migrated(database), tmp_path_factory.mktemp("up")) as cli,
    ):
        process = cli.start("up", "--json", "--port", "0")
        yield Up(cli, json.loads(first_line(process)))
        complaints = end(process)
        assert process.returncode == 0, complaints
        assert "Traceback" not in complaints


def whoami(told: dict[str, Any]) -> dict[str, Any]:
    headers = {"authorization": f"Bearer {told['key']}"}
    answer: dict[str, Any] = httpx.get(f"{told['url']}/v1/whoami", headers=headers).json()
    return answer


def test_up_tells_how_to_enter_when_it_is_ready(up: Up) -> None:
    assert sorted(up.told) == ["environmentId", "key", "url", "workspaceId"]
    known = whoami(up.told)
    assert known["workspaceId"] == up.told["workspaceId"]
    assert known["environmentId"] == up.told["environmentId"]


def test_embedded_up_shows_its_key_again(cli: Cli) -> None:
    """In a home of its own: the database, the secret key and the bootstrap key."""
    del cli.env["SLUICE_DATABASE_URL"], cli.env["SLUICE_SECRET_KEY"]
    seen: list[dict[str, Any]] = []
    for _ in range(2):
        process = cli.start("up", "--json", "--port", "0")
        told = json.loads(first_line(process))
        assert whoami(told)["workspaceId"] == told["workspaceId"]
        seen.append({k: v for k, v in told.items() if k != "url"})
        end(process)
        assert process.returncode == 0
    assert seen[0] == seen[1]
    for name in ("bootstrap-key", "secret-key"):
        mode = stat.S_IMODE((cli.folder / "home" / name).stat().st_mode)
        assert mode == 0o600
    checked = cli.run("doctor")
    assert checked.exit_code == 0, checked.output


def test_key_of_a_given_database_is_shown_once(up: Up) -> None:
    assert up.told["key"]
    process = up.cli.start("serve", "--port", "0")
    told = ""
    while "API guide" not in told:
        told += first_line(process)
    end(process)
    assert process.returncode == 0
    assert "use the one you were given" in told
    assert up.told["workspaceId"] in told


def test_port_in_use_is_one_sentence(cli: Cli) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        ended = cli.run("serve", "--port", str(port))
        simulated = cli.run("simulate", "--port", str(port))
    assert ended.exit_code == 1
    assert f"Port {port} on 127.0.0.1 is in use" in ended.stderr
    assert simulated.exit_code == 2
    assert f"cannot listen on 127.0.0.1:{port}" in simulated.stderr
    assert "Traceback" not in ended.output + simulated.output


def test_server_answers_a_file_and_its_batches_can_be_seen(
    cli: Cli, up: Up, provider: Provider
) -> None:
    cli.questions(["one", "two ", "two"])
    command = ["run", "q.csv", "--prompt", "Say {text}", "--base-url", provider.url]
    command += ["--model", "m", "--rpm", "600", "--output", "out.csv", *up.at]
    ended = cli.run(*command)
    assert ended.exit_code == 0, ended.output
    assert [row["text"] for row in cli.rows()] == ["one", "two ", "two"]
    assert all(row["answer"].startswith("[simulated]") for row in cli.rows())
    assert cli.run(*command).exit_code == 0
    assert provider.report()["received"] == 3
    batch = re.search(r"Batch (\S+)", ended.stderr)
    assert batch is not None
    listed = cli.run("batches", "list", *up.at).stdout
    assert listed.count("completed") == 1
    assert batch[1] in listed
    assert "answered    3" in cli.run("batches", "show", batch[1], *up.at).stdout
    assert cli.run("batches", "watch", batch[1], *up.at).exit_code == 0
    refused = cli.run("batches", "cancel", batch[1], *up.at)
    assert refused.exit_code == 1
    assert "already ended" in refused.stderr


def test_failed_items_are_tried_again_and_results_downloaded(
    cli: Cli, up: Up, provider: Provider
) -> None:
    provider.change(error_rate=1.0)
    cli.questions(["first", "second"], "failing.csv")
    command = ["run", "failing.csv", "--prompt", "{text}", "--base-url", provider.url]
    command += ["--model", "again", "--max-attempts", "1", "--output", "o.csv", *up.at]
    ended = cli.run(*command)
    assert ended.exit_code == 1, ended.output
    found = re.search(r"Batch (\S+)", ended.stderr)
    assert found is not None
    batch = found[1]
    assert batch in cli.run("batches", "list", "--status", "failed", *up.at).stdout
    assert batch in cli.run("batches", "list", "--name", "failing", *up.at).stdout
    listed = cli.run("batches", "list", "--metadata", "file=none", *up.at)
    assert "no such batches" in listed.stdout
    provider.change(error_rate=0.0)
    nothing = cli.run("batches", "retry", batch, "--error", "rejected", *up.at)
    assert "nothing to try again" in nothing.stdout
    again = cli.run("batches", "retry", batch, "--index", "1", *up.at)
    assert "1 item is tried again" in again.stdout
    assert cli.run("batches", "watch", batch, *up.at).exit_code == 1
    told = cli.run("batches", "results", batch, *up.at)
    assert told.exit_code == 0, told.output
    lines = [json.loads(line) for line in told.stdout.splitlines()]
    assert [line["status"] for line in lines] == ["FAILED", "COMPLETED"]
    options = ["--format", "csv", "--status", "completed", "--output", "r.csv"]
    assert cli.run("batches", "results", batch, *options, *up.at).exit_code == 0
    rows = cli.rows("r.csv")
    assert [(row["index"], row["answer"][:11]) for row in rows] == [("1", "[simulated]")]
    refused = cli.run("batches", "retry", batch, "--index", "7", *up.at)
    assert refused.exit_code == 1
    assert "indexes[0]: is no item of this batch" in refused.stderr


def test_results_of_a_running_batch_say_where_to_go_on(
    cli: Cli, up: Up, provider: Provider
) -> None:
    provider.change(latency_ms=60_000.0)
    cli.questions(["one"])
    command = ["run", "q.csv", "--prompt", "wait {text}", "--base-url", provider.url]
    process = cli.start(*command, "--model", "m", *up.at)
    until(lambda: provider.report()["in_flight"] == 1, what="it is asked", by=process)
    found = re.search(r"sluice batches cancel (\S+)", end(process, signal.SIGINT))
    assert found is not None
    told = cli.run("batches", "results", found[1], *up.at)
    assert (told.exit_code, told.stdout) == (0, "")
    assert "Go on later with --after -1" in told.stderr
    cut = cli.run("batches", "cancel", found[1], "--abort", *up.at)
    assert "cancelled   1" in cut.stdout
    until(lambda: provider.report()["in_flight"] == 0, what="the call is cut")


def test_detaching_leaves_the_server_at_work(cli: Cli, up: Up, provider: Provider) -> None:
    provider.change(latency_ms=60_000.0)
    cli.questions(["one"])
    command = ["run", "q.csv", "--prompt", "{text}", "--base-url", provider.url, "--model", "m"]
    process = cli.start(*command, *up.at)
    until(lambda: provider.report()["in_flight"] == 1, what="it is asked", by=process)
    complaints = end(process, signal.SIGINT)
    assert process.returncode == 130
    found = re.search(r"sluice batches cancel (\S+)", complaints)
    assert found is not None
    assert "sluice batches watch" in complaints
    cancelled = cli.run("batches", "cancel", found[1], *up.at)
    assert "state       cancelled" in cancelled.stdout
    provider.drop_calls()


def test_a_batch_is_steered_and_says_what_it_waits_for(cli: Cli, up: Up) -> None:
    place = f"{up.told['workspaceId']}/{up.told['environmentId']}"
    with httpx.Client(
        base_url=f"{up.told['url']}/v1", headers={"x-api-key": up.told["key"]}, trust_env=False
    ) as http:
        connection = http.post(
            f"/ai-connection/{place}", json={"name": "none", "baseUrl": "http://127.0.0.1:9/v1"}
        ).json()
        model = {"model": "m", "connectionId": connection["connectionId"]}
        http.post(f"/ai-resource/{place}", json={"name": "none", "model": model})
        item = {"resource": "none", "request": {"messages": [{"role": "user", "content": "a"}]}}
        batch_id = http.post(
            f"/completion-batch/{place}",
            json={
                "type": "ASYNC",
                "name": "slow",
                "items": [item] * 3,
                "capacity": [{"period": "lifetime", "requests": 1}],
            },
        ).json()["batchId"]

    def told(verb: str, *more: str) -> str:
        ended = cli.run("batches", verb, batch_id, *more, *up.at)
        assert ended.exit_code == 0, ended.stderr
        return ended.stdout

    limit = "the limit of 1 requests per lifetime of batch 'slow'"
    until(lambda: limit in told("show"), what="it waits for its limit")
    assert "waits for   its resumption; it is paused" in told("pause")
    steered = told("set", "--priority", "5", "--weight", "2.5", "--expires", "24h")
    assert "priority    5\n" in steered
    assert "weight      2.5\n" in steered
    assert "deadline    2" in steered
    assert "deadline" not in told("set", "--expires", "never")
    assert "2099-01-01T00:00:00.000Z" in told("set", "--expires", "2099-01-01T00:00:00Z")
    assert "its resumption" not in told("resume")
    nothing = cli.run("batches", "set", batch_id, *up.at)
    assert (nothing.exit_code, "Nothing to change" in nothing.stderr) == (2, True)
    wrong = cli.run("batches", "set", batch_id, "--expires", "soon", *up.at)
    assert wrong.exit_code == 1
    assert "such as 30m, 24h or 7d" in wrong.stderr
    told("cancel")
    ended = cli.run("batches", "pause", batch_id, *up.at)
    assert ended.exit_code == 1
    assert "has already ended: CANCELLED" in ended.stderr


def test_keys_are_made_rotated_disabled_and_deleted(cli: Cli, up: Up) -> None:
    command = ["keys", "create", "reader", "--permission", "*:get", "--permission", "*:list"]
    made = cli.run(*command, "--expires", "2999-01-01T00:00:00Z", *up.at)
    assert made.exit_code == 0, made.output
    value = made.stdout.strip()
    key_id = re.search(r"API key (\S+)", made.stderr)
    assert key_id is not None
    assert whoami({"url": up.told["url"], "key": value})["permissions"] == ["*:get", "*:list"]
    refused = cli.run("keys", "delete", key_id[1], "--server", up.told["url"], "--key", value)
    assert refused.exit_code == 1
    assert "You are not authorized to perform 'api-key:delete'" in refused.stderr
    rotated = cli.run("keys", "rotate", key_id[1], "--overlap", "60", *up.at)
    assert rotated.stdout.strip() not in ("", value)
    for each in (value, rotated.stdout.strip()):
        assert whoami({"url": up.told["url"], "key": each})["apiKeyId"] == key_id[1]
    assert "disabled" in cli.run("keys", "disable", key_id[1], *up.at).stdout
    listed = cli.run("keys", "list", *up.at).stdout
    assert re.search(rf"{key_id[1]} .* disabled .* \*:get,\*:list +reader", listed)
    assert value not in listed
    assert cli.run("keys", "delete", key_id[1], *up.at).exit_code == 0
    assert key_id[1] not in cli.run("keys", "list", *up.at).stdout
    gone = cli.run("keys", "delete", key_id[1], *up.at)
    assert (gone.exit_code, "not found" in gone.stderr) == (1, True)


def test_the_operator_makes_tenants_with_keys_and_owners(cli: Cli, up: Up) -> None:
    """In the database of the service, which serves them at once."""
    env = up.cli.env | {
        "SLUICE_OIDC_ISSUER": "https://id.example",
        "SLUICE_OIDC_AUDIENCE": "sluice",
    }
    made = cli.run("workspaces", "create", "acme", "--owner", "alice", env=env)
    assert made.exit_code == 0, made.output
    told = dict(line.rsplit(maxsplit=1) for line in made.stdout.splitlines())
    me = whoami({"url": up.told["url"], "key": told["API key"]})
    assert (me["workspaceId"], me["environmentId"]) == (told["workspace"], told["environment"])
    listed = cli.run("workspaces", "list", env=env).stdout
    assert re.search(rf"{told['workspace']}  {told['environment']} +1 +1  acme / default", listed)
    another = cli.run("workspaces", "key", told["workspace"], told["environment"], env=env)
    assert whoami({"url": up.told["url"], "key": another.stdout.strip()})["name"] == "operator"
    wrong = cli.run("workspaces", "key", told["workspace"], told["workspace"], env=env)
    assert (wrong.exit_code, "not found" in wrong.stderr) == (1, True)
    for role in ("read-only", "owner"):
        admitted = cli.run("workspaces", "admit", told["workspace"], "bob", "--role", role, env=env)
        assert admitted.stdout.endswith(f"{role}\n"), admitted.output
    assert re.search(r" 2  acme / default", cli.run("workspaces", "list", env=env).stdout)
    without = cli.run("workspaces", "create", "w", "--owner", "alice", env=up.cli.env)
    assert (without.exit_code, "SLUICE_OIDC_ISSUER" in without.stderr) == (2, True)


def test_connections_and_resources_are_made_tried_and_deleted(
    cli: Cli, up: Up, provider: Provider
) -> None:
    def said(*command: str, exit_code: int = 0, env: dict[str, str] | None = None) -> str:
        result = cli.run(*command, *up.at, env=env)
        assert result.exit_code == exit_code, result.output
        return result.output.strip()

    env = {"OPENAI_API_KEY": "sk-nobody-sees-this"}
    own = said("connections", "create", "spare", "--base-url", provider.url, "--rpm", "5", env=env)
    assert f"{own}  spare" in said("connections", "list")
    shown = said("connections", "get", own)
    assert json.loads(shown)["config"]["apiKey"] == "********"
    model = said(
        *("resources", "create", "chat", "--connection", "spare", "--model", "m"),
        *("--fallback", "spare=n"),
    )
    assert "m  (+1 fallbacks)" in said("resources", "list")
    assert json.loads(said("resources", "get", model))["fallbackModels"][0]["model"] == "n"
    assert "The model answered." in said("resources", "test", model)
    assert "The model answered." in said("connections", "test", own)
    provider.change(error_rate=1.0)
    told = said("connections", "test", own, "--model", "x", exit_code=1)
    assert "try again later" in told
    missing = cli.run("resources", "create", "r", "--connection", "no", "--model", "m", *up.at)
    assert (missing.exit_code, "There is no connection 'no'" in missing.output) == (2, True)
    said("resources", "delete", model)
    said("connections", "delete", own, "--force")
    assert own not in said("connections", "list")


def test_secrets_are_sealed_anew(cli: Cli, migrated: str) -> None:
    """With a new key before the old one; then the old one may go."""
    old = cli.env["SLUICE_SECRET_KEY"]
    new = "new:" + "A" * 43
    keyring = Keyring(old)
    with psycopg.connect(migrated) as conn:
        conn.execute("insert into workspaces values (gen_random_uuid(), 'w')")
        conn.execute(
            "insert into environments select workspace_id, gen_random_uuid(), 'e' from workspaces"
        )
        row = conn.execute(
            "insert into connections (workspace_id, environment_id, connection_id, name, provider,"
            " base_url) select workspace_id, environment_id, gen_random_uuid(), 'c', 'openai',"
            " 'http://x' from environments returning connection_id"
        ).fetchone()
        assert row is not None
        sealed = keyring.seal("sk-old", context=str(row[0]))
        conn.execute(
            "update connections set secret = %s, secret_key_id = %s",
            (sealed.ciphertext, sealed.key_id),
        )
    both = {"SLUICE_SECRET_KEY": f"{new},{old}"}
    assert "sluice secrets rotate" in cli.run("doctor", env=both).output
    first = cli.run("secrets", "rotate", env=both)
    assert (first.exit_code, "Sealed 1 secrets" in first.output) == (0, True), first.output
    assert "Sealed 0 secrets" in cli.run("secrets", "rotate", env=both).output
    assert "All 1 secrets open" in cli.run("doctor", env={"SLUICE_SECRET_KEY": new}).output
    lost = cli.run("secrets", "rotate", env={"SLUICE_SECRET_KEY": f"other:{'B' * 43}"})
    assert (lost.exit_code, "connection 'c'" in lost.output) == (1, True), lost.output


def test_wrong_key_and_silent_server_are_told(cli: Cli, up: Up) -> None:
    wrong = cli.run("batches", "list", "--server", up.told["url"], "--key", "slk_wrong")
    assert wrong.exit_code == 1
    assert "does not know this key" in wrong.stderr
    silent = cli.run("batches", "list", "--server", "http://127.0.0.1:9", "--key", "slk_x")
    assert silent.exit_code == 1
    assert "does not answer" in silent.stderr
    assert cli.run("batches", "list").exit_code == 2


# Worker processes -----------------------------------------------------------------------------------


class Workers:
    """What the database knows of workers."""

    def __init__(self, url: str) -> None:
        self._url = url

    def pids(self) -> set[int]:
        with psycopg.connect(self._url) as conn:
            found = conn.execute("select pid from workers where stopped_at is null").fetchall()
        return {row[0] for row in found}

    def stopped(self) -> int:
        with psycopg.connect(self._url) as conn:
            row = conn.execute("select count(*) from workers where stopped_at is not null")
            return int((row.fetchone() or [0])[0])


def test_worker_processes_stop_together(cli: Cli, migrated: str) -> None:
    workers = Workers(migrated)
    parent = cli.start("worker", "--processes", "2")
    until(lambda: len(workers.pids()) == 2, what="two workers live", by=parent)
    assert parent.pid not in workers.pids()
    complaints = end(parent)
    assert parent.returncode == 0, complaints
    assert workers.stopped() == 2


def test_crashed_worker_process_is_replaced_and_none_outlives_its_parent(
    cli: Cli, migrated: str
) -> None:
    workers = Workers(migrated)
    parent = cli.start("worker", "--processes", "2")
    until(lambda: len(workers.pids()) == 2, what="two workers live", by=parent)
    killed = min(workers.pids())
    os.kill(killed, signal.SIGKILL)
    until(lambda: len(workers.pids() - {killed}) == 2, what="it is replaced", by=parent)
    parent.kill()
    until(lambda: workers.pids() <= {killed}, what="the children stop")
    until(lambda: workers.stopped() == 2, what="the children have said goodbye")


def test_worker_refuses_a_database_that_was_not_migrated(cli: Cli, database: str) -> None:
    with psycopg.connect(database, autocommit=True) as conn:
        conn.execute("drop table if exists alembic_version")
    ended = cli.run("worker")
    assert ended.exit_code == 1
    assert "Run: sluice migrate" in ended.stderr


# The rest -------------------------------------------------------------------------------------------


def test_simulator_says_where_it_is(cli: Cli) -> None:
    process = cli.start("simulate", "--port", "0", "--rpm", "5", "--require-key", "k")
    found = re.search(r"http://\S+/v1", first_line(process))
    assert found is not None
    refused = httpx.post(f"{found[0]}/chat/completions", json={"model": "m", "messages": []})
    assert refused.status_code == 401
    end(process, signal.SIGINT)
    assert process.returncode == 0


def test_demo_shows_answers_and_works_again(cli: Cli) -> None:
    for _ in range(2):
        ended = cli.run("demo", "--limit", "12")
        assert ended.exit_code == 0, ended.output
        assert "Answered 12 of 12 rows" in ended.stdout
        assert ended.stdout.count("  answer  [simulated]") == 3
        assert "What to try next" in ended.stdout
    assert len(cli.rows("tickets.answers.csv")) == 12


def test_explain_shows_a_plan(cli: Cli) -> None:
    assert "batches_idempotency_key_unique" in cli.run("explain", "run_batches").stdout
    unknown = cli.run("explain", "nothing")
    assert unknown.exit_code == 2
    assert "There is no statement 'nothing'" in unknown.stderr


def test_throw_away_database_is_there_and_then_gone(cli: Cli) -> None:
    process = cli.start("db")
    url = first_line(process).strip()
    with psycopg.connect(url) as conn:
        assert conn.execute("select count(*) from batches").fetchone() == (0,)
    place = Path(str(conninfo_to_dict(url)["host"]))
    assert place.exists()
    end(process, signal.SIGINT)
    assert not place.exists()


def test_every_command_has_help(cli: Cli) -> None:
    told = cli.run("--help").stdout
    names = re.findall(r"^  ([a-z]+)  ", told.partition("Commands:")[2], re.MULTILINE)
    assert {"run", "up", "serve", "worker", "migrate", "simulate", "doctor"} <= set(names)
    for name in names:
        ended = cli.run(name, "--help")
        assert ended.exit_code == 0
        assert ended.stdout.startswith("Usage: ")
