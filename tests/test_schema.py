"""schema.sql is the truth: the migrations lead to it, and everything in it is explained."""

import psycopg
import pytest

from app import migrate
from tests.conftest import cloned

FINGERPRINTS = {
    "columns": """
        select c.relname, a.attname, format_type(a.atttypid, a.atttypmod), a.attnotnull,
            pg_get_expr(d.adbin, d.adrelid)
        from pg_attribute a
        join pg_class c on c.oid = a.attrelid
        left join pg_attrdef d on d.adrelid = a.attrelid and d.adnum = a.attnum
        where c.relnamespace = any ('{public,report}'::regnamespace[]) and a.attnum > 0 and not a.attisdropped
            and c.relkind in ('r', 'p', 'v', 'c') and not c.relispartition
    """,
    "constraints": """
        select conrelid::regclass::text, conname, pg_get_constraintdef(oid)
        from pg_constraint
        where connamespace = 'public'::regnamespace
            and not (select relispartition from pg_class where oid = conrelid)
    """,
    "indexes": """
        select i.tablename, i.indexname, i.indexdef from pg_indexes i
        join pg_class c on c.oid = (quote_ident(i.schemaname) || '.' || quote_ident(i.tablename))::regclass
        where i.schemaname = 'public' and not c.relispartition
    """,
    "options": """
        select relname, reloptions::text from pg_class
        where relnamespace = 'public'::regnamespace and relkind in ('r', 'p') and not relispartition
    """,
    "views": """
        select schemaname, viewname, definition,
            (select c.reloptions::text from pg_class c
                where c.oid = (quote_ident(schemaname) || '.' || quote_ident(viewname))::regclass)
        from pg_views where schemaname in ('public', 'report')
    """,
    "functions": """
        select proname, pg_get_functiondef(oid), obj_description(oid) from pg_proc
        where pronamespace = 'public'::regnamespace
    """,
    "types": """
        select t.typname, e.enumlabel, e.enumsortorder from pg_type t
        join pg_enum e on e.enumtypid = t.oid where t.typnamespace = 'public'::regnamespace
    """,
    "comments": """
        select c.relname, a.attname, d.description from pg_description d
        join pg_class c on c.oid = d.objoid and d.classoid = 'pg_class'::regclass
        left join pg_attribute a on a.attrelid = c.oid and a.attnum = d.objsubid and a.attnum > 0
        where c.relnamespace = any ('{public,report}'::regnamespace[]) and not c.relispartition
    """,
}


def fingerprint(url: str) -> dict[str, set[tuple[object, ...]]]:
    """The catalog without what may differ: order of columns, partitions, alembic's own table."""
    with psycopg.connect(url) as conn:
        return {
            name: {
                row
                for row in conn.execute(query.encode()).fetchall()
                if row[0] != "alembic_version"
            }
            for name, query in FINGERPRINTS.items()
        }


def test_migrations_lead_to_schema_sql(cluster: str, shared_database: str) -> None:
    with cloned(cluster, "template0") as empty:
        assert migrate.migrate(empty)
        assert migrate.migrate(empty) == []
        migrated, written = fingerprint(empty), fingerprint(shared_database)
    for kind, rows in written.items():
        assert migrated[kind] == rows, f"{kind} differ"


def test_everything_is_explained(shared_database: str) -> None:
    """Comments are data: the data dictionary of psql's \\d+ has no gaps."""
    with psycopg.connect(shared_database) as conn:
        silent = conn.execute(
            """
            select c.relname || coalesce('.' || a.attname, '')
            from pg_class c
            left join pg_attribute a on a.attrelid = c.oid and a.attnum > 0 and not a.attisdropped
            where c.relnamespace = any ('{public,report}'::regnamespace[])
                and c.relkind in ('r', 'p', 'v')
                and not c.relispartition
                and (col_description(c.oid, a.attnum) is null or obj_description(c.oid) is null)
            union all
            select proname from pg_proc
            where pronamespace = 'public'::regnamespace and obj_description(oid) is null
            union all
            select typname from pg_type
            where typnamespace = 'public'::regnamespace and typtype = 'e'
                and obj_description(oid) is null
            """
        ).fetchall()
    assert silent == []


@pytest.mark.parametrize(
    ("table", "change", "rule"),
    [
        ("items", "status = 'running'", "items_running_has_a_lease"),
        ("items", "status = 'failed'", "items_end_has_a_reason"),
        ("items", "attempt = -1", "items_attempt_not_negative"),
        ("flows", "pending = pending + 1", "flows_counts_add_up"),
        ("flows", "running = -1, pending = pending + 1", "flows_counts_not_negative"),
        ("flows", "weight = 0", "flows_weight_in_range"),
        ("flows", "is_open = false", "flows_open_while_unfinished"),
        ("batches", "status = 'completed'", "batches_end_has_a_time"),
        ("batches", "status = 'cancelled'", "batches_cancel_has_a_time"),
        ("batches", "priority = 101", "batches_priority_in_range"),
    ],
)
async def test_the_tables_refuse_illegal_states(
    database: str, table: str, change: str, rule: str
) -> None:
    from tests.scene import Scene  # noqa: PLC0415 - needs the domain, the rest of this file does not

    async with Scene.open(database) as scene:
        await scene.submit(2)
        with pytest.raises(psycopg.errors.CheckViolation) as refusal:
            async with scene.db.transaction() as conn:
                await conn.execute(f"update {table} set {change}".encode())  # noqa: S608 - a test's own words
        assert rule in str(refusal.value)
