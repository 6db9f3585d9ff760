-- Small functions that several statements share.

-- The present, which tests may set: select set_config('app.now', '2026-01-01Z', true).
-- STABLE on purpose: it is inlined and stays an index condition. Claim and settle read
-- clock_timestamp() instead, once, after their locks.
create or replace function clock() returns timestamptz
language sql stable
as $$ select coalesce(nullif(current_setting('app.now', true), '')::timestamptz, now()) $$;
comment on function clock() is 'The present; tests may set it.';

-- An item's id: the low 32 bits of the batch's id XOR (seq + 1). The same as app/ids.py.
create or replace function item_id(batch_id uuid, seq int) returns uuid
language sql immutable strict parallel safe
as $$
    select (
        left(batch_id::text, 28)
        || lpad(to_hex(('x' || right(batch_id::text, 8))::bit(32)::int # (seq + 1)), 8, '0')
    )::uuid
$$;
comment on function item_id(uuid, int) is 'The id of an item, as the API shows it.';

-- Partitions of one day for all tables of a batch's rows, which are all that are partitioned. Attaching a ready-made table takes only a
-- SHARE UPDATE EXCLUSIVE lock on the parent; CREATE TABLE … PARTITION OF would stop all traffic.
create or replace function partitions_ensure(day date) returns boolean
language plpgsql
as $$
declare
    parent text;
    child text;
    made boolean := false;
begin
    for parent in
        select c.relname
        from pg_partitioned_table p
        join pg_class c on c.oid = p.partrelid
        where c.relnamespace = 'public'::regnamespace
        order by c.relname
    loop
        child := parent || '_' || to_char(day, 'YYYYMMDD');
        if to_regclass(child) is null then
            -- One maker at a time, and only when there is something to make. Not asked by to_regclass: who waited here would
            -- be told what it was told before.
            perform pg_advisory_xact_lock(hashtext('sluice.partitions'));
            if not exists (
                select from pg_class c
                where c.relname = child and c.relnamespace = 'public'::regnamespace
            ) then
                execute format(
                    'create table %I (like %I including all excluding comments)', child, parent);
                execute format(
                    'alter table %I set (autovacuum_vacuum_scale_factor = 0.02, '
                    'autovacuum_vacuum_threshold = 5000, autovacuum_analyze_scale_factor = 0.05, '
                    'autovacuum_analyze_threshold = 2000)', child);
                execute format(
                    'alter table %I attach partition %I for values from (%L) to (%L)',
                    parent, child, day, day + 1);
                made := true;
            end if;
        end if;
    end loop;
    return made;
end
$$;
comment on function partitions_ensure(date) is 'Make the partitions of a day; true when it made any.';
