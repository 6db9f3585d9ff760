"""Who may read reports: a login bound to one workspace attacks the views and learns nothing of the other."""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from urllib.parse import urlsplit, urlunsplit
from uuid import uuid4

import psycopg
import pytest

from app import reports
from app.db import Connection
from app.errors import SluiceError, UsageError
from app.maintenance import Maintenance
from app.reports import Allowance
from app.settings import Settings
from tests.scene import Scene
from tests.test_prices import price, put
from tests.test_reports import roll_up

SECRET = "the other's secret"


@dataclass
class Reader:
    """A login that was granted something, connected."""

    conn: Connection
    name: str

    async def rows(self, query: str) -> list[tuple[object, ...]]:
        return await (await self.conn.execute(query.encode())).fetchall()

    async def refusal(self, query: str) -> str:
        """The error that a statement ends with."""
        with pytest.raises(psycopg.Error) as error:
            await self.rows(query)
        return str(error.value)


@asynccontextmanager
async def reading(scene: Scene, allowed: Allowance) -> AsyncGenerator[Reader]:
    name = f"ana_{uuid4().hex[:12]}"
    async with scene.db.transaction() as conn:
        password = await reports.grant(conn, user=name, allowed=allowed)
    assert password is not None
    parts = urlsplit(scene.db.url)
    place = parts.netloc.rpartition("@")[2]
    url = urlunsplit(parts._replace(netloc=f"{name}:{password}@{place}"))
    try:
        async with await psycopg.AsyncConnection.connect(url, autocommit=True) as conn:
            yield Reader(conn=conn, name=name)
    finally:
        async with scene.db.transaction() as conn:
            assert await reports.revoke(conn, user=name)
            await conn.execute(f"drop role {name}".encode())


@asynccontextmanager
async def two_workspaces(database: str) -> AsyncGenerator[tuple[Scene, Scene]]:
    """Ours, and another with a secret in every text that it can put somewhere."""
    async with Scene.open(database) as ours:
        other = await Scene.make(ours.db)
        for scene in (ours, other):
            await put(scene, price(), own=scene is other)
            batch = await scene.submit(2, resource=0)
            await scene.settle((await scene.claim()).items)
            await scene.do("update batches set name = 'ours' where batch_id = %s", batch.batch_id)
        hidden = other.workspace_id
        for change in (
            "update workspaces set name = %s where workspace_id = %s",
            "update environments set name = %s where workspace_id = %s",
            "update resources set name = %s where workspace_id = %s",
            "update connections set name = %s where workspace_id = %s",
            "update batches set name = %s where workspace_id = %s",
            "update item_requests set custom_id = %s where workspace_id = %s",
            "update attempts set error_message = %s where workspace_id = %s",
            "update prices set model = %s where workspace_id = %s",
        ):
            await other.do(change, SECRET, hidden)
        await roll_up(ours)
        yield ours, other


async def views(scene: Scene) -> list[str]:
    rows = await scene.rows(
        "select viewname::text from pg_views where schemaname = 'report' order by 1"
    )
    return [str(row[0]) for row in rows]


async def test_a_bound_login_sees_its_workspace_in_every_view_and_nothing_else(
    database: str,
) -> None:
    async with two_workspaces(database) as (ours, other):
        allowed = Allowance(workspace_id=ours.workspace_id, with_texts=True)
        async with reading(ours, allowed) as reader:
            for view in await views(ours):
                found = await reader.rows(f"select v::text from report.{view} v")  # noqa: S608 - a test's own words
                text = str(found)
                assert SECRET not in text, view
                assert str(other.workspace_id) not in text, view
                if view in ("workers", "table_health", "rollup_state"):
                    assert found == [], view
            assert len(await reader.rows("select 1 from report.batches")) == 1
            assert len(await reader.rows("select 1 from report.item_texts")) == 2


ATTACKS = [
    # A leaky function or operator that is cheaper than the filter and says what it sees.
    "select * from report.batches where 1 / (case when batch_name = 'the other''s secret' then 0 else 1 end) = 1",
    "select * from report.batches where (batch_name || 'x')::int = 1",
    "select * from report.items where custom_id::int = 1",
    "select * from report.attempts where error_message::uuid is not null",
    "select * from report.batches where batch_name ~ repeat('(', 3)",
    # Whoever sees a role's rows is decided by the login, not by SET ROLE.
    "set role sluice_report; select string_agg(workspace_name, ',') from report.batches",
    "set session authorization default; select string_agg(workspace_name, ',') from report.batches",
    # Other objects under the names that views use.
    "set search_path = pg_temp, public, report; select string_agg(workspace_name, ',') from report.batches",
    "set app.now = '2020-01-01'; select string_agg(workspace_name, ',') from report.batches",
    # What Postgres knows of the tables.
    "select * from pg_stats where schemaname = 'public'",
    "select most_common_vals::text from pg_stats",
    "select * from pg_statistic",
    "select query from pg_stat_activity",
    "select * from public.batches",
    "select * from public.report_tenants",
    "select * from public.report_grants",
    "select name from workspaces",
    "table item_requests",
    "copy batches to stdout",
    "select * from public.prices",
    # Functions that read tables, as their owner would call them.
    "select * from price_at(null, 'x', 'x', now())",
    "select * from limits_in_force(null, null, now())",
    "select event_append(null, current_date, null, 'batch-created', null, now())",
    "select rollup_some(1)",
    "select query_to_xml('select * from public.batches', true, true, '')",
    "select table_to_xml('public.workspaces', true, true, '')",
    "select database_to_xml(true, true, '')",
    "explain (analyze, verbose) select * from report.batches where batch_name = 'x'",
    "select pg_get_viewdef('report.batches')",
    "select * from pg_prepared_statements",
]


async def test_a_bound_login_attacks_in_vain(database: str) -> None:
    """Whatever comes back, rows, notices or an error, holds nothing of the other workspace."""
    async with two_workspaces(database) as (ours, other):
        await ours.do("analyze")
        allowed = Allowance(workspace_id=ours.workspace_id, with_texts=True)
        async with reading(ours, allowed) as reader:
            hidden = [SECRET, str(other.workspace_id), str(other.environment_id)]
            for attack in ATTACKS:
                told = await _told(reader.conn, attack)
                # The attack itself may be shown again.
                told = told.replace("the other''s secret", "")
                assert not [each for each in hidden if each in told], attack


async def _told(conn: Connection, attack: str) -> str:
    """All that a login hears of a statement."""
    heard: list[str] = []

    def hear(notice: psycopg.errors.Diagnostic) -> None:
        heard.append(str(notice.message_primary))

    conn.add_notice_handler(hear)
    try:
        async with conn.cursor() as cursor:
            await cursor.execute(attack.encode())
            while cursor.nextset():
                pass
            if cursor.description:
                heard.append(str(await cursor.fetchall()))
    except psycopg.Error as error:
        heard += [str(error), str(error.diag.message_detail), str(error.diag.context)]
    conn.remove_notice_handler(hear)
    await conn.execute("reset all")
    await conn.execute("reset role")
    return "\n".join(heard)


async def test_a_reader_cannot_write(database: str) -> None:
    async with Scene.open(database) as scene, reading(scene, Allowance()) as reader:
        for statement in (
            "create table mine (x int)",
            "create temp table mine (x int)",
            "update report.batches set priority = 1",
            "delete from report.items",
            "insert into report.prices (model) values ('x')",
        ):
            said = await reader.refusal(statement)
            assert (
                "read-only transaction" in said or "permission denied" in said or "cannot" in said
            )
        await reader.conn.execute("set default_transaction_read_only = off")
        for statement in (
            "update batches set priority = 1",
            "delete from report_grants",
            "create table public.mine (x int)",
            "create schema mine",
            "grant sluice_report_text to current_user",
            "select partitions_ensure('2020-01-01')",
            "update report.batches set priority = 1",
        ):
            said = await reader.refusal(statement)
            assert "denied" in said or "must be" in said or "cannot" in said, said


async def test_a_login_has_its_limits_and_texts_need_a_grant(database: str) -> None:
    few = Allowance(timeout_s=7, idle_s=8, connections=2)
    async with two_workspaces(database) as (scene, _), reading(scene, few) as reader:
        assert await reader.rows("show statement_timeout") == [("7s",)]
        assert await reader.rows("show idle_session_timeout") == [("8s",)]
        assert await reader.rows("show default_transaction_read_only") == [("on",)]
        limit = await scene.value(
            "select rolconnlimit from pg_roles where rolname = %s", reader.name
        )
        assert limit == 2
        assert len(await reader.rows("select 1 from report.batches")) == 2
        assert "permission denied" in await reader.refusal("select * from report.item_texts")
        # A grant of the group alone, past the command, shows nothing: it must be written down too.
        await scene.do(f"grant sluice_report_text to {reader.name}")
        assert await reader.rows("select * from report.item_texts") == []
        async with scene.db.transaction() as conn:
            await reports.grant(conn, user=reader.name, allowed=Allowance(with_texts=True))
        assert len(await reader.rows("select * from report.item_texts")) == 4


async def test_maintenance_lets_readers_give_way_and_nobody_else(database: str) -> None:
    async with Scene.open(database) as scene, reading(scene, Allowance()) as reader:
        given: asyncio.Queue[Sequence[int]] = asyncio.Queue()
        duty = Maintenance(
            Settings(database_url=database),
            scene.db,
            holder_id=uuid4(),
            give_way=given.put_nowait,
        )
        running = asyncio.create_task(duty.run())
        try:
            assert await asyncio.wait_for(given.get(), 20) == [reader.conn.info.backend_pid]
        finally:
            running.cancel()
            await asyncio.wait({running})


async def test_who_sees_everything_anyway_or_nothing_that_exists_is_refused(database: str) -> None:
    async with Scene.open(database) as scene:
        owner = await scene.value("select current_user")
        for user, error, said in (
            (owner, SluiceError, "sees everything anyway"),
            ("sluice_report", UsageError, "the group itself"),
        ):
            with pytest.raises(error, match=said):
                async with scene.db.transaction() as conn:
                    await reports.grant(conn, user=user, allowed=Allowance())
        with pytest.raises(UsageError, match="There is no workspace"):
            async with scene.db.transaction() as conn:
                await reports.grant(
                    conn, user="ana_nowhere", allowed=Allowance(workspace_id=uuid4())
                )
