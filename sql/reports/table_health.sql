-- The tables themselves: rows, dead rows, bytes, partitions. Only operators see them.
create or replace view report.table_health with (security_barrier) as
select p.relname::text as table_name,
    count(*) filter (where t.relispartition) as partitions,
    sum(pg_stat_get_live_tuples(t.oid))::bigint as live_rows,
    sum(pg_stat_get_dead_tuples(t.oid))::bigint as dead_rows,
    sum(pg_total_relation_size(t.oid))::bigint as total_bytes,
    sum(pg_indexes_size(t.oid))::bigint as index_bytes,
    max(greatest(pg_stat_get_last_vacuum_time(t.oid), pg_stat_get_last_autovacuum_time(t.oid))) as vacuumed_at,
    (select oldest_snapshot_s()) as oldest_snapshot_s
from report_operators o
cross join pg_class p
join lateral (
    select p.oid, false as relispartition where p.relkind = 'r'
    union all
    select c.oid, true from pg_inherits h join pg_class c on c.oid = h.inhrelid where h.inhparent = p.oid
) t on true
where p.relnamespace = 'public'::regnamespace and p.relkind in ('r', 'p') and not p.relispartition
group by p.relname;

comment on view report.table_health is
    'Tables: size, dead rows, partitions, and how long the oldest snapshot has kept dead rows alive. Only for logins that see all workspaces.';
comment on column report.table_health.table_name is 'The table, its partitions together.';
comment on column report.table_health.partitions is 'How many partitions it has.';
comment on column report.table_health.live_rows is 'Rows, as Postgres estimates.';
comment on column report.table_health.dead_rows is 'Dead rows that await vacuum.';
comment on column report.table_health.total_bytes is 'Bytes with indexes and texts.';
comment on column report.table_health.index_bytes is 'Bytes of indexes.';
comment on column report.table_health.vacuumed_at is 'When any of it was last vacuumed.';
comment on column report.table_health.oldest_snapshot_s is 'Age of the oldest transaction that keeps dead rows, of those that Sluice may see.';
