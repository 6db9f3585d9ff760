-- A number for reports that only the owner may know: readers do not see the sessions of others.
create or replace function oldest_snapshot_s() returns numeric
language sql stable security definer
set search_path = pg_catalog
as $$
    select round(extract(epoch from max(clock_timestamp() - a.xact_start)), 3)
    from pg_stat_activity a
    where a.datname = current_database() and a.backend_xmin is not null and a.pid <> pg_backend_pid()
$$;
comment on function oldest_snapshot_s() is 'Age of the oldest transaction that keeps dead rows alive.';
