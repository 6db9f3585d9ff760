"""A database of an earlier revision, with work of every kind in it, is brought to the present one."""

from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from typing import Any

import psycopg
import pytest
from msgspec.structs import replace
from psycopg import sql

from app import connections, migrate, queue
from app.db import Database, folder
from app.ids import created_on, uuid7
from app.queue import Outcome
from app.secrets import Keyring
from tests.conftest import at, cloned
from tests.scene import Scene
from tests.test_schema import fingerprint

# Revision 0001 ------------------------------------------------------------------------------------

#: Its functions whose arguments have changed since; what they did does not matter here.
FUNCTIONS_OF_0001 = """
    create function claim(uuid, uuid, uuid, int, boolean, interval, interval, double precision)
        returns int language sql as 'select 1';
    create function settle(uuid, uuid, json, text[]) returns int language sql as 'select 1';
    create function flows_change(uuid, settled_item[], timestamptz, jsonb) returns void
        language sql as 'select';
    create function ready_change(uuid, settled_item[], uuid[], timestamptz) returns void
        language sql as 'select';
    create function work_due(uuid, uuid, timestamptz) returns timestamptz language sql as 'select $3';
    create function capacity_frees(uuid, uuid[], bigint, bigint, timestamptz, interval)
        returns timestamptz language sql as 'select $5';
    create function pace(uuid, uuid[], timestamptz, double precision) returns int language sql as 'select 1';
    create function slot_of(limit_period, timestamptz) returns timestamptz language sql as 'select $2';
    create function slot_frees_at(limit_period, timestamptz, interval) returns timestamptz
        language sql as 'select $2';
"""

#: Two claims of a moment ago, in one slot of an hour and two of a minute.
CLAIMED = """
    create temporary table moment as
    select h.at as hour_slot, h.at + interval '10.1 seconds' as one, h.at + interval '10 seconds' as one_slot,
        h.at + interval '10.7 seconds' as two, h.at + interval '10.5 seconds' as two_slot,
        date_trunc('day', h.at, 'UTC') as day_slot
    from (select date_bin('30 seconds', now() - interval '30 seconds', 'epoch') as at) h
"""

#: A tenant with two accounts at providers and three models; resources one and two name the same.
TENANT = """
    insert into workspaces (workspace_id, name) values (%(workspace)s, 'w');
    insert into environments (workspace_id, environment_id, name)
    values (%(workspace)s, %(environment)s, 'e');
    insert into api_keys (workspace_id, api_key_id, environment_id, name, hash, masked_key)
    values (%(workspace)s, %(key)s, %(environment)s, 'k', sha256('k'), 'sl-…');
    insert into connections (workspace_id, connection_id, environment_id, name, provider, base_url)
    values (%(workspace)s, %(openai)s, %(environment)s, 'openai', 'openai', 'https://api.openai.com/v1'),
        (%(workspace)s, %(groq)s, %(environment)s, 'groq', 'groq', 'https://api.groq.com/openai/v1');
    insert into resources (workspace_id, resource_id, environment_id, connection_id, name, model)
    values (%(workspace)s, %(one)s, %(environment)s, %(openai)s, 'one', 'gpt-4o-mini'),
        (%(workspace)s, %(two)s, %(environment)s, %(openai)s, 'two', 'gpt-4o-mini'),
        (%(workspace)s, %(three)s, %(environment)s, %(openai)s, 'three', 'gpt-4o'),
        (%(workspace)s, %(four)s, %(environment)s, %(groq)s, 'four', 'gpt-4o-mini');
    insert into resource_states (workspace_id, resource_id, blocked_until, blocked_reason)
    values (%(workspace)s, %(one)s, now() + interval '20 seconds', 'overloaded'),
        (%(workspace)s, %(two)s, now() - interval '1 hour', 'rate_limited'),
        (%(workspace)s, %(three)s, '-infinity', null),
        (%(workspace)s, %(four)s, '-infinity', null);
    insert into limit_scopes (workspace_id, scope_id, kind)
    values (%(workspace)s, %(openai)s, 'connection'), (%(workspace)s, %(groq)s, 'connection'),
        (%(workspace)s, %(one)s, 'resource'), (%(workspace)s, %(two)s, 'resource'),
        (%(workspace)s, %(three)s, 'resource'), (%(workspace)s, %(four)s, 'resource'),
        (%(workspace)s, %(key)s, 'api_key');
    insert into limits (workspace_id, limit_id, scope_id, period, requests, tokens)
    values (%(workspace)s, %(per_minute)s, %(one)s, 'minute', 100, 100000),
        (%(workspace)s, %(per_hour)s, %(openai)s, 'hour', null, 1000000),
        (%(workspace)s, %(per_day)s, %(openai)s, 'day', 10000, null),
        (%(workspace)s, %(ever)s, %(three)s, 'lifetime', null, 1000000000),
        (%(workspace)s, %(of_key)s, %(key)s, 'minute', 1000, null);
    insert into workers (worker_id, host, machine, pid, version)
    values (%(worker)s, 'elsewhere', 'elsewhere', 1, '0');
"""

#: Four batches: at work, cancelled with rows that do not say so yet, done, and not begun.
BATCHES = """
    insert into batches (workspace_id, batch_id, environment_id, batch_day, type, status, total_items,
        estimated_input_tokens, created_by_api_key_id, created_at, started_at, cancelled_at, completed_at)
    values
        (%(workspace)s, %(working)s, %(environment)s, %(day)s, 'async', 'running', 10, 100, %(key)s,
            now() - interval '5 minutes', now() - interval '1 minute', null, null),
        (%(workspace)s, %(cancelled)s, %(environment)s, %(day)s, 'async', 'cancelled', 3, 30, null,
            now() - interval '5 minutes', now() - interval '1 minute', now() - interval '5 seconds', null),
        (%(workspace)s, %(done)s, %(environment)s, %(day)s, 'async', 'completed', 1, 10, null,
            now() - interval '5 minutes', now() - interval '1 minute', null, now()),
        (%(workspace)s, %(waiting)s, %(environment)s, %(day)s, 'async', 'pending', 2, 20, null,
            now() - interval '1 minute', null, null, null);
    insert into flows (workspace_id, batch_id, resource_id, batch_day, is_open, is_cancelled, virtual_time,
        floor, total, unstarted, pending, running, completed, failed, cancelled, unmarked, retries,
        input_tokens, output_tokens)
    values
        (%(workspace)s, %(working)s, %(one)s, %(day)s, true, false, 500, 6, 8, 2, 4, 2, 1, 1, 0, 0, 4, 12, 34),
        (%(workspace)s, %(working)s, %(three)s, %(day)s, true, false, 46, 9, 2, 1, 1, 0, 1, 0, 0, 0, 0, 12, 34),
        (%(workspace)s, %(cancelled)s, %(two)s, %(day)s, true, true, 110, 0, 3, 0, 0, 1, 0, 0, 2, 1, 0, 0, 0),
        (%(workspace)s, %(done)s, %(four)s, %(day)s, false, false, 46, 1, 1, 0, 0, 0, 1, 0, 0, 0, 0, 12, 34),
        (%(workspace)s, %(waiting)s, %(two)s, %(day)s, true, false, 110, 0, 2, 2, 2, 0, 0, 0, 0, 0, 0, 0, 0);
    insert into ready (workspace_id, resource_id, next_at)
    values (%(workspace)s, %(one)s, now() + interval '20 seconds'), (%(workspace)s, %(two)s, now()),
        (%(workspace)s, %(three)s, now() + interval '1 hour'), (%(workspace)s, %(four)s, 'infinity');
"""

#: Items in every state.
ITEMS = """
    insert into items (workspace_id, batch_day, batch_id, resource_id, seq, attempt, status, ended_reason,
        ended_at, claimed_at, visible_at, worker_id, reserved_limits, reserved_input_tokens,
        reserved_output_tokens, failures, crashes, input_tokens)
    select %(workspace)s, %(day)s, i.batch_id, i.resource_id, i.seq, i.attempt, i.status::work_status,
        i.reason::ended_reason, case when i.reason is not null then now() end,
        case when i.status = 'running' then case when i.attempt = 1 then m.one else m.two end end,
        case when i.status = 'running' then now() + interval '5 minutes' else now() + i.later end,
        case when i.status = 'running' then %(worker)s::uuid end, i.limits,
        case when i.status = 'running' then 10 end, case when i.status = 'running' then 100 end,
        i.failures, i.crashes, 10
    from moment m
    cross join (values
        (%(working)s::uuid, %(one)s::uuid, 0, 1, 'completed', 'answered', interval '0', null::uuid[], 0, 0),
        (%(working)s, %(one)s, 1, 1, 'running', null, '0', %(of_one)s, 0, 0),
        (%(working)s, %(one)s, 2, 1, 'pending', null, '20 seconds', null, 0, 0), -- was throttled
        (%(working)s, %(one)s, 3, 1, 'pending', null, '0', null, 0, 1), -- its worker was lost
        (%(working)s, %(one)s, 4, 2, 'failed', 'rejected', '0', null, 1, 0),
        (%(working)s, %(one)s, 5, 2, 'running', null, '0', %(of_one)s, 0, 0), -- was throttled
        (%(working)s, %(one)s, 6, 0, 'pending', null, '0', null, 0, 0),
        (%(working)s, %(one)s, 7, 0, 'pending', null, '0', null, 0, 0),
        (%(working)s, %(three)s, 8, 1, 'completed', 'answered', '0', null, 0, 0),
        (%(working)s, %(three)s, 9, 0, 'pending', null, '0', null, 0, 0),
        (%(cancelled)s, %(two)s, 0, 0, 'cancelled', 'cancelled', '0', null, 0, 0),
        (%(cancelled)s, %(two)s, 1, 0, 'pending', null, '0', null, 0, 0), -- cancelled, but not marked
        (%(cancelled)s, %(two)s, 2, 1, 'running', null, '0', %(of_two)s, 0, 0),
        (%(done)s, %(four)s, 0, 1, 'completed', 'answered', '0', null, 0, 0),
        (%(waiting)s, %(two)s, 0, 0, 'pending', null, '0', null, 0, 0),
        (%(waiting)s, %(two)s, 1, 0, 'pending', null, '0', null, 0, 0)
    ) i (batch_id, resource_id, seq, attempt, status, reason, later, limits, failures, crashes);
    insert into item_requests (workspace_id, batch_day, batch_id, seq, custom_id, body)
    select workspace_id, batch_day, batch_id, seq, 'c' || seq,
        '{"messages": [{"role": "user", "content": "Where is my card?"}]}'
    from items;
    insert into item_results (workspace_id, batch_day, batch_id, seq, attempt, ended_at, status_code,
        input_tokens, output_tokens, error_code, body)
    select workspace_id, batch_day, batch_id, seq, attempt, ended_at,
        case status when 'completed' then 200 else 400 end,
        case status when 'completed' then 12 end, case status when 'completed' then 34 end,
        case status when 'failed' then 'bad_request' end, '{"id": "x"}'
    from items
    where status in ('completed', 'failed');
"""

#: Calls with every outcome, and what the claims and settlements of that revision left in the ledger.
CALLS = """
    insert into attempts (workspace_id, batch_day, batch_id, seq, attempt, outcome, resource_id,
        connection_id, worker_id, claimed_at, ended_at, error_code, reserved_limits, reserved_input_tokens,
        reserved_output_tokens, charged_requests, charged_input_tokens, charged_output_tokens)
    select %(workspace)s, %(day)s, a.batch_id, a.seq, a.attempt, a.outcome::attempt_outcome, a.resource_id,
        case when a.outcome <> 'lost' then %(openai)s::uuid end, %(worker)s,
        case when a.late then m.two else m.one end, now(), nullif(a.outcome, 'answered'), a.limits, 10, 100,
        a.requests, a.input_tokens, a.output_tokens
    from moment m
    cross join (values
        (%(working)s::uuid, %(one)s::uuid, 0, 1, 'answered', false, %(of_one)s::uuid[], 1, 12, 34),
        (%(working)s, %(one)s, 2, 1, 'throttled', false, %(of_one)s, 1, 10, 100),
        (%(working)s, %(one)s, 3, 1, 'lost', false, %(of_one)s, 1, 10, 100),
        (%(working)s, %(one)s, 4, 1, 'unreachable', false, %(of_one)s, 0, 0, 0), -- known to be unsent
        (%(working)s, %(one)s, 4, 2, 'rejected', true, %(of_one)s, 1, 10, 100),
        (%(working)s, %(one)s, 5, 1, 'throttled', false, %(of_one)s, 1, 10, 100),
        (%(working)s, %(three)s, 8, 1, 'answered', true, %(of_three)s, 1, 12, 34),
        (%(done)s, %(four)s, 0, 1, 'answered', false, '{}', 1, 12, 34)
    ) a (batch_id, resource_id, seq, attempt, outcome, late, limits, requests, input_tokens, output_tokens);
    insert into ledger (workspace_id, limit_id, slot_at, requests, input_tokens, output_tokens)
    select %(workspace)s, g.limit_id, g.slot_at, g.requests, g.input_tokens, g.output_tokens
    from moment m
    cross join lateral (values
        (%(per_minute)s::uuid, m.one_slot, 5, 52, 434),
        (%(per_minute)s, m.two_slot, 2, 20, 200),
        (%(per_hour)s, m.hour_slot, 9, 94, 768),
        (%(per_day)s, m.day_slot, 9, 94, 768),
        (%(ever)s, 'epoch', 1, 12, 34)
    ) g (limit_id, slot_at, requests, input_tokens, output_tokens);
"""

EVENTS = """
    insert into events (workspace_id, batch_day, batch_id, first_no, last_no, kind, at, seqs)
    select %(workspace)s, %(day)s, e.batch_id, e.first_no,
        e.first_no + coalesce(cardinality(e.seqs), 1) - 1, e.kind::event_kind, now(), e.seqs
    from (values
        (%(working)s::uuid, 1, 'batch-created', null::int[]),
        (%(working)s, 2, 'batch-running', null),
        (%(working)s, 3, 'item-running', '{0,1,2,3,4,5}'),
        (%(working)s, 9, 'item-completed', '{0}'),
        (%(working)s, 10, 'item-retrying', '{2,3,4,5}'),
        (%(working)s, 14, 'item-running', '{4,5,8}'),
        (%(working)s, 17, 'item-failed', '{4}'),
        (%(working)s, 18, 'item-completed', '{8}'),
        (%(cancelled)s, 1, 'batch-created', null),
        (%(cancelled)s, 2, 'batch-running', null),
        (%(cancelled)s, 3, 'item-running', '{2}'),
        (%(cancelled)s, 4, 'batch-cancelled', null),
        (%(cancelled)s, 5, 'item-cancelled', '{0}'),
        (%(done)s, 1, 'batch-created', null),
        (%(done)s, 2, 'batch-running', null),
        (%(done)s, 3, 'item-running', '{0}'),
        (%(done)s, 4, 'item-completed', '{0}'),
        (%(done)s, 5, 'batch-completed', null),
        (%(waiting)s, 1, 'batch-created', null)
    ) e (batch_id, first_no, kind, seqs);
"""

IDS = (
    "workspace environment key openai groq one two three four per_minute per_hour per_day ever of_key"
    " worker working cancelled done waiting"
)

Rows = dict[str, set[str]]


@dataclass(frozen=True, kw_only=True)
class Relic:
    """A database of revision 0001 that was migrated; what was in it before, and its ids."""

    name: str
    ids: dict[str, Any]
    before: Rows
    applied: list[str]


def fill(conn: psycopg.Connection) -> dict[str, Any]:
    """Bring an empty database to revision 0001 with work in it; the ids in it by name."""
    ids: dict[str, Any] = {name: uuid7() for name in IDS.split()}
    ids["day"] = created_on(ids["working"])
    ids["of_one"] = [ids["per_minute"], ids["per_hour"], ids["per_day"]]
    ids["of_two"] = [ids["per_hour"], ids["per_day"]]
    ids["of_three"] = [ids["per_hour"], ids["per_day"], ids["ever"]]
    for text in (
        (folder("migrations") / "versions" / "0001_initial.sql").read_bytes(),
        (folder("sql") / "functions" / "clock.sql").read_bytes(),
        FUNCTIONS_OF_0001.encode(),
        b"create table alembic_version (version_num varchar(32) not null primary key)",
        b"insert into alembic_version values ('0001')",
        CLAIMED.encode(),
    ):
        conn.execute(text)
    conn.execute("select partitions_ensure(%(day)s)", ids)
    cursor = psycopg.ClientCursor(conn)  # of several statements at once, each with its values
    for part in (TENANT, BATCHES, ITEMS, CALLS, EVENTS):
        cursor.execute(part.encode(), ids)
    return ids


def contents(conn: psycopg.Connection, columns: dict[str, list[str]]) -> Rows:
    """All rows of these columns of tables."""
    return {
        table: {
            row[0]
            for row in conn.execute(
                sql.SQL("select row({})::text from {}").format(
                    sql.SQL(", ").join(map(sql.Identifier, names)), sql.Identifier(table)
                )
            )
        }
        for table, names in columns.items()
    }


def columns(conn: psycopg.Connection) -> dict[str, list[str]]:
    """The columns of all tables."""
    rows = conn.execute(
        "select table_name::text, array_agg(column_name::text order by column_name)"
        " from information_schema.columns join pg_class on oid = table_name::regclass"
        " where table_schema = 'public' and relkind in ('r', 'p') and not relispartition"
        " and table_name <> 'alembic_version' group by 1"
    )
    return {table: names for table, names in rows}  # noqa: C416 - rows are tuples of any length


#: What a revision changes in rows that were there: the next look, and what belongs to the model now.
CHANGED = {"ready": {"next_at"}, "resource_states": {"blocked_until", "blocked_reason"}}


@pytest.fixture(scope="module")
def relic(cluster: str) -> Iterator[Relic]:
    with cloned(cluster, "template0") as url:
        with psycopg.connect(url) as conn:
            ids = fill(conn)
            kept = {
                table: [name for name in names if name not in CHANGED.get(table, ())]
                for table, names in columns(conn).items()
            }
            before = contents(conn, kept)
        applied = migrate.migrate(url)
        with psycopg.connect(url) as conn:
            after = contents(conn, kept)
        name = url.split("?")[0].rpartition("/")[2]
        added = {
            table: after[table] - rows for table, rows in before.items() if not rows <= after[table]
        }
        assert added == {}
        yield Relic(name=name, ids=ids, before=before, applied=applied)


@pytest.fixture
async def scene(cluster: str, relic: Relic) -> AsyncIterator[Scene]:
    """The migrated database, a copy for each test, as the tests of the queue see one."""
    ids = relic.ids
    with cloned(cluster, relic.name) as url:
        async with Database(url, size=4) as db:
            yield Scene(
                db=db,
                keyring=Keyring(Keyring.generate()),
                workspace_id=ids["workspace"],
                environment_id=ids["environment"],
                connection_id=ids["openai"],
                resource_ids=[ids["one"], ids["two"], ids["three"], ids["four"]],
                worker_id=ids["worker"],
            )


# What is there -----------------------------------------------------------------------------------


def test_a_database_of_an_earlier_revision_gets_the_present_schema(
    cluster: str, relic: Relic, shared_database: str
) -> None:
    """Nothing of the old functions is left beside the new ones: a call would find two."""
    assert relic.applied[0] == "0002"
    migrated, written = fingerprint(at(cluster, relic.name)), fingerprint(shared_database)
    for kind, rows in written.items():
        assert migrated[kind] == rows, f"{kind} differ"
    assert migrate.migrate(at(cluster, relic.name)) == []


async def test_every_row_is_there(relic: Relic, scene: Scene) -> None:
    """That they are the same is seen where the database is made; here that they are no more."""
    grown = {"limit_scopes", "limits", "scope_states"}
    for table, rows in relic.before.items():
        count = await scene.value(f"select count(*) from {table}")  # noqa: S608 - a name of the catalog
        assert table in grown or count == len(rows), table


async def test_each_model_on_a_connection_has_a_scope(scene: Scene) -> None:
    one, two, three, four = [await scene.model_scope_id(number) for number in range(4)]
    assert one == two
    assert len({one, three, four}) == 3
    assert await scene.rows(
        "select s.scope_id, l.source::text, l.period::text, l.sliding, l.requests, l.tokens"
        " from limit_scopes s join limits l using (workspace_id, scope_id)"
        " where s.kind = 'model' order by array_position(%s::uuid[], s.scope_id)",
        [one, three, four],
    ) == [(scope, "observed", "minute", True, None, None) for scope in (one, three, four)]
    known = await scene.rows("select scope_id from scope_states")
    assert {scope for (scope,) in known} == {
        *(one, three, four),
        *[row[0] for row in await scene.rows("select connection_id from connections")],
    }
    assert len(known) == 5


async def test_a_rest_goes_over_to_the_model(scene: Scene) -> None:
    """Of its resources' the longest; and models that have been at work start no more slowly."""
    for resource, is_resting in ((0, True), (1, True), (2, False), (3, False)):
        assert await scene.rows(
            "select blocked_until > now(), is_fresh, begun_at is not null, refusals, ceiling"
            " from scope_states where scope_id = %s",
            await scene.model_scope_id(resource),
        ) == [(is_resting, False, True, 0, None)]
    claim = await scene.claim(resource=1)
    assert (claim.items, claim.reason) == ([], "cooldown")


async def test_the_reason_of_a_rest_is_that_of_the_longest(scene: Scene) -> None:
    assert (
        await scene.value("select blocked_reason from scope_states where blocked_until > now()")
        == "overloaded"
    )


async def test_limits_slide_as_they_did(scene: Scene) -> None:
    assert await scene.rows(
        "select period::text, sliding from limits where source = 'given' order by limits.period, requests"
    ) == [
        ("minute", True),
        ("minute", True),
        ("hour", True),
        ("day", False),
        ("lifetime", False),
    ]


async def test_flows_know_their_scopes_and_their_age(relic: Relic, scene: Scene) -> None:
    assert {
        (batch, frozenset(scopes), is_as_old)
        for batch, scopes, is_as_old in await scene.rows(
            "select f.batch_id, f.scope_ids, f.created_at = b.created_at from flows f"
            " join batches b using (workspace_id, batch_id)"
        )
    } == {
        (relic.ids["working"], frozenset({relic.ids["working"], relic.ids["key"]}), True),
        *[
            (relic.ids[name], frozenset({relic.ids[name]}), True)
            for name in ("cancelled", "done", "waiting")
        ],
    }


async def test_the_recount_of_the_ledger_is_exact(relic: Relic, scene: Scene) -> None:
    await scene.check_books()
    assert sorted(
        await scene.rows(
            "select limit_id, requests, output_tokens, expected_output_tokens, refused from ledger"
        )
    ) == sorted(
        [
            (relic.ids["per_minute"], 5, 434, 434, 2),
            (relic.ids["per_minute"], 2, 200, 200, 0),
            (relic.ids["per_hour"], 9, 768, 768, 2),
            (relic.ids["per_day"], 9, 768, 768, 2),
            (relic.ids["ever"], 1, 34, 34, 0),
        ]
    )


# And goes on -------------------------------------------------------------------------------------


async def test_work_goes_on_to_its_end(relic: Relic, scene: Scene) -> None:
    ids = relic.ids
    # What was out at the time comes back.
    async with scene.db.connection() as conn:
        held = await queue.held_by(conn, worker_id=scene.worker_id)
    assert [(item.seq, item.attempt, item.expected_output_tokens) for item in held] == [
        (1, 1, 100),
        (5, 2, 100),
        (2, 1, 100),
    ]
    settled = await scene.settle(held, used=(11, 22))
    assert [s.becomes for s in settled] == ["completed"] * 3
    await scene.check_books()
    # So does a call that was given up for lost.
    lost = replace(held[0], seq=3)
    assert [s.becomes for s in await scene.settle([lost], used=(11, 22))] == ["completed"]
    await scene.check_books()
    # The rest of the model ends, and no call is sent ahead: nothing was refused since.
    await scene.pass_time(21)
    for resource, expected in ((0, [2, 6, 7]), (1, [0, 1]), (2, [9])):
        claim = await scene.claim(resource=resource)
        assert sorted(item.seq for item in claim.items) == expected
        model = await scene.value(
            "select limit_id from limits where scope_id = %s", await scene.model_scope_id(resource)
        )
        assert all(model in item.limit_ids for item in claim.items)
        await scene.check_books()
        await scene.settle(claim.items)
        await scene.check_books()
    cancelled = await scene.batch(ids["cancelled"])
    assert await scene.mark(cancelled) == 1
    await scene.check_books()
    assert {
        (name, (batch := await scene.batch(ids[name])).status, batch.completed_at is not None)
        for name in ("working", "cancelled", "done", "waiting")
    } == {
        ("working", "failed", True),
        ("cancelled", "cancelled", True),
        ("done", "completed", True),
        ("waiting", "completed", True),
    }


async def test_a_call_that_was_lost_and_never_sent_is_refunded(relic: Relic, scene: Scene) -> None:
    async with scene.db.connection() as conn:
        held = await queue.held_by(conn, worker_id=scene.worker_id)
    await scene.settle([replace(held[0], seq=3)], Outcome.unsent)
    assert await scene.rows(
        "select requests, output_tokens, expected_output_tokens from ledger where limit_id = %s"
        " order by slot_at",
        relic.ids["per_minute"],
    ) == [(4, 334, 334), (2, 200, 200)]
    await scene.check_books()


async def test_what_is_out_can_be_reclaimed(relic: Relic, scene: Scene) -> None:
    async with scene.db.connection() as conn:
        held = await queue.held_by(conn, worker_id=scene.worker_id)
    mine = [item for item in held if item.batch_id == relic.ids["working"]]
    assert await scene.reclaim(mine) == 2
    await scene.check_books()


async def test_a_failed_item_can_be_redriven(relic: Relic, scene: Scene) -> None:
    assert await scene.redrive(await scene.batch(relic.ids["working"])) == 1
    await scene.check_books()


async def test_old_usage_still_counts(relic: Relic, scene: Scene) -> None:
    """Of the hundred a minute seven are used."""
    await scene.calm()
    for _ in range(2):
        await scene.submit(80)
    claim = await scene.claim()
    assert len(claim.items) == 100 - 7
    assert claim.waits_for == relic.ids["per_minute"]


async def test_a_limit_of_a_key_that_was_not_kept_is_kept_now(relic: Relic, scene: Scene) -> None:
    await scene.calm()
    await scene.pass_time(21)
    claim = await scene.claim()
    assert len(claim.items) == 4
    assert all(relic.ids["of_key"] in item.limit_ids for item in claim.items)


async def test_a_new_resource_shares_the_scope_of_its_model(scene: Scene) -> None:
    number = await scene.add_resource(model="gpt-4o")
    assert await scene.model_scope_id(number) == await scene.model_scope_id(2)
    number = await scene.add_resource(model="gpt-5")
    assert await scene.model_scope_id(number) not in {
        await scene.model_scope_id(resource) for resource in range(4)
    }


async def test_a_resource_of_before_can_be_found_and_called(scene: Scene) -> None:
    async with scene.db.connection() as conn:
        route = await connections.route(
            conn, workspace_id=scene.workspace_id, resource_id=scene.resource_id
        )
    assert route is not None
    assert (route.model, route.base_url) == ("gpt-4o-mini", "https://api.openai.com/v1")
