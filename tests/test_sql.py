"""Every named statement, checked against the real schema without running it."""

import ast
import importlib
import inspect
import pkgutil
import re
from pathlib import Path

import psycopg
import pytest

import app
from app import db
from app.db import NoRow, Query

ROOT = Path(__file__).resolve().parent.parent


def queries() -> list[Query[object]]:
    found: dict[tuple[str, str], Query[object]] = {}
    for module in pkgutil.walk_packages(app.__path__, "app."):
        if module.name.endswith("__main__"):
            continue
        for value in vars(importlib.import_module(module.name)).values():
            if isinstance(value, Query):
                found[value.file, value.name] = value
    return [found[key] for key in sorted(found)]


QUERIES = queries()


def as_prepared(sql: bytes) -> tuple[bytes, list[str]]:
    """The statement as psycopg would send it, and its parameters in order."""
    names: list[str] = []
    out = b""
    rest = sql.replace(b"%%", b"\0")
    while b"%(" in rest:
        before, _, after = rest.partition(b"%(")
        name, _, rest = after.partition(b")")
        rest = rest[1:]  # the s or b
        if name.decode() not in names:
            names.append(name.decode())
        out += before + b"$%d" % (names.index(name.decode()) + 1)
    return (out + rest).replace(b"\0", b"%"), names


@pytest.mark.parametrize("query", QUERIES, ids=lambda q: f"{q.file}.{q.name}")
def test_statement_plans_and_fits_its_row(query: Query[object], shared_database: str) -> None:
    """It plans; its columns are its dataclass's fields; every parameter has a type."""
    text, names = as_prepared(query.sql)
    with psycopg.connect(shared_database) as conn:
        pgconn = conn.pgconn
        result = pgconn.prepare(b"checked", text)
        assert not result.error_message, result.error_message.decode()
        described = pgconn.describe_prepared(b"checked")
        assert described.nparams == len(names)
        for number, name in enumerate(names):
            oid = described.param_type(number)
            assert oid not in {0, 705}, f"parameter {name} has no type; add a cast"
        columns = [(described.fname(n) or b"").decode() for n in range(described.nfields)]
    if query.row is not NoRow:
        assert sorted(columns) == sorted(inspect.signature(query.row).parameters)


def test_every_statement_is_used_and_every_use_exists() -> None:
    files = sorted((ROOT / "sql" / "queries").glob("*.sql"))
    written = {(file.stem, name) for file in files for name in db.statements(file.stem)}
    assert {(q.file, q.name) for q in QUERIES} == written


def test_every_statement_says_what_it_does() -> None:
    """The header is followed by a sentence, as the reader of the file expects."""
    for file in sorted((ROOT / "sql" / "queries").glob("*.sql")):
        for name, text in db.statements(file.stem).items():
            assert text.startswith(b"-- "), f"{file.name}: {name} has no comment"


def test_statements_are_never_assembled() -> None:
    """No SQL text is built from strings outside psycopg.sql: it cannot be read, pasted or checked."""
    verbs = ("select ", "insert ", "update ", "delete ")
    for file in sorted((ROOT / "app").rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.JoinedStr):
                first = node.values[0] if node.values else None
                text = first.value if isinstance(first, ast.Constant) else ""
                assert not str(text).lower().startswith(verbs), f"{file.name}:{node.lineno}"


#: Statements that look across tenants, and for whom. None of them is a handler's but the first two.
ACROSS_TENANTS = {
    "the door: finds the tenant": {"api_keys.api_key_by_hash"},
    "a user's own list": {"workspaces.workspaces_of"},
    "the operator's command line": {"workspaces.workspaces_all", "tenants.environment_named"},
    "rotation of secrets": {
        "rotation.connection_secrets_of_other_keys",
        "rotation.endpoint_secrets_of_other_keys",
        "rotation.secrets_by_key",
        "rotation.secrets_stored",
    },
    "doctor": {
        "doctor.counters_off",
        "doctor.ledger_off",
        "doctor.ready_behind",
        "doctor.workers_seen",
    },
    "validators of files": {"submissions.submission_lease"},
    "the operator's command line, for readers of reports": {"reports.report_grant_delete"},
    "maintenance: budgets, readers, retention, rollups": {
        "batches.batches_exhausted",
        "reports.report_readers",
        "retention.callbacks_forget",
        "retention.facts_overdue",
        "retention.partitions_old",
        "retention.rollup_hours_prune",
        "retention.rollup_latency_hours_prune",
        "retention.rollup_latency_minutes_prune",
        "retention.rollup_minutes_prune",
        "retention.texts_erasing",
        "retention.texts_overdue",
    },
    "workers and maintenance": {
        "queue.batches_aborted",
        "files.files_prune",
        "queue.batches_unmarked",
        "queue.flows_expired",
        "queue.items_below_floor",
        "queue.items_held_by",
        "queue.items_lapsed",
        "queue.ledger_prune",
        "queue.ready_due",
        "queue.ready_recompute",
        "queue.workers_forget",
        "results.result_files_forget",
    },
    "the sender": {
        "webhooks.endpoints_due",
        "webhooks.endpoints_postpone",
        "webhooks.endpoints_sweep",
    },
}


def test_every_statement_on_a_tenants_table_names_the_tenant(shared_database: str) -> None:
    with psycopg.connect(shared_database) as conn:
        rows = conn.execute(
            "select c.relname from pg_class c join pg_attribute a on a.attrelid = c.oid"
            " where c.relnamespace = 'public'::regnamespace and c.relkind in ('r', 'p')"
            " and a.attname = 'workspace_id'"
        ).fetchall()
    tables = {name for (name,) in rows}
    found: set[str] = set()
    for query in QUERIES:
        text = re.sub(r"--[^\n]*", "", query.sql.decode())
        used = set(re.findall(r"\b(?:from|join|into|update)\s+(\w+)", text)) & tables
        if used and "%(workspace_id)s" not in text:
            found.add(f"{query.file}.{query.name}")
    assert found == set[str]().union(*ACROSS_TENANTS.values())
