-- Retention: how long texts, facts and rollups are kept, and erasure on request. Maintenance does it in small steps.

-- name: texts_request_erasure
-- Note that a finished batch's texts are to go; maintenance goes on where a process ends.
update batches
set texts_erased_at = 'infinity'
where workspace_id = %(workspace_id)s
    and batch_id = %(batch_id)s
    and completed_at is not null
    and texts_erased_at is null;

-- name: texts_overdue
-- Note the same of batches whose workspace keeps texts no longer. Locks their rows in key order.
with overdue as (
    select b.workspace_id, b.batch_id
    from batches b
    join workspaces w on w.workspace_id = b.workspace_id
    where b.texts_erased_at is null
        and b.completed_at is not null
        and b.batch_day < (clock() at time zone 'UTC')::date - coalesce(w.keep_texts_days, %(days)s::int)
    order by b.workspace_id, b.batch_id
    limit %(most)s
    for no key update of b skip locked
)
update batches b
set texts_erased_at = 'infinity'
from overdue o
where b.workspace_id = o.workspace_id and b.batch_id = o.batch_id;

-- name: texts_erasing
-- Batches whose erasure goes on. Reads their small index; locks nothing.
select workspace_id, batch_day, batch_id
from batches
where texts_erased_at = 'infinity'
order by batch_day, workspace_id, batch_id
limit %(most)s;

-- name: texts_erase
-- Erase prompts and answers of ended items, some at a time; how many.
select texts_erase(%(workspace_id)s, %(batch_day)s, %(batch_id)s, %(seqs)s::int[], %(most)s) as erased;

-- name: texts_erased
-- Nothing is left of a batch's texts; unless items were put back meanwhile, whose texts go when they have ended.
update batches
set texts_erased_at = clock_timestamp()
where workspace_id = %(workspace_id)s
    and batch_id = %(batch_id)s
    and texts_erased_at = 'infinity'
    and completed_at is not null;

-- name: facts_overdue
-- Finished batches whose workspace keeps their rows shorter than their partitions stay. Locks nothing. Old ones are
-- found first, and then looked at one by one (offset 0): no table of rows is read as a whole.
with old as materialized (
    select b.workspace_id, b.batch_day, b.batch_id
    from workspaces w
    join batches b on b.workspace_id = w.workspace_id
    where w.keep_days is not null
        and b.completed_at is not null
        and b.batch_day < (clock() at time zone 'UTC')::date - w.keep_days
)
select o.workspace_id, o.batch_day, o.batch_id
from old o
where exists (
        select from items i
        where i.workspace_id = o.workspace_id and i.batch_day = o.batch_day and i.batch_id = o.batch_id
        offset 0
    )
    or exists (
        select from deliveries d
        where d.workspace_id = o.workspace_id
            and d.batch_day = o.batch_day
            and d.batch_id = o.batch_id
            and d.status <> 'pending'
        offset 0
    )
order by o.batch_day, o.workspace_id, o.batch_id
limit %(most)s;

-- name: facts_forget
-- Delete the rows of a batch, some items at a time; how many items. Batch and counters stay.
select facts_forget(%(workspace_id)s, %(batch_day)s, %(batch_id)s, %(most)s) as forgotten;

-- name: deliveries_forget
-- Delete deliveries of a batch that have ended, with their tries, some at a time; how many. What is pending is told
-- first. Needs no mutex: nothing but a redelivery changes what has ended, and of the two the later finds nothing.
with ended as materialized (
    select d.event_no, d.endpoint_id
    from deliveries d
    where d.workspace_id = %(workspace_id)s
        and d.batch_day = %(batch_day)s
        and d.batch_id = %(batch_id)s
        and d.status <> 'pending'
    order by d.event_no, d.endpoint_id
    limit %(most)s
    for update skip locked
),
tries as (
    delete from delivery_attempts a
    using ended e
    where a.workspace_id = %(workspace_id)s
        and a.batch_day = %(batch_day)s
        and a.batch_id = %(batch_id)s
        and a.event_no = e.event_no
        and a.endpoint_id = e.endpoint_id
),
gone as (
    delete from deliveries d
    using ended e
    where d.workspace_id = %(workspace_id)s
        and d.batch_day = %(batch_day)s
        and d.batch_id = %(batch_id)s
        and d.event_no = e.event_no
        and d.endpoint_id = e.endpoint_id
    returning 1
)
select count(*)::int as forgotten from gone;

-- name: callbacks_forget
-- Delete the endpoints of finished batches, with their secrets, when nothing that they could tell is kept any more:
-- neither items, which could be tried again, nor deliveries. Skips those that a sender holds. Finds as facts_overdue.
with old as materialized (
    select e.workspace_id, e.endpoint_id, e.batch_day, e.batch_id
    from endpoints e
    join workspaces w on w.workspace_id = e.workspace_id
    join batches b on b.workspace_id = e.workspace_id and b.batch_id = e.batch_id
    where e.batch_day < (clock() at time zone 'UTC')::date - coalesce(w.keep_days, %(days)s::int)
        and b.completed_at is not null
),
over as (
    select e.workspace_id, e.endpoint_id
    from old o
    join endpoints e on e.workspace_id = o.workspace_id and e.endpoint_id = o.endpoint_id
    where not exists (
            select from items i
            where i.workspace_id = o.workspace_id and i.batch_day = o.batch_day and i.batch_id = o.batch_id
            offset 0
        )
        and not exists (
            select from deliveries d
            where d.workspace_id = o.workspace_id and d.batch_day = o.batch_day and d.batch_id = o.batch_id
            offset 0
        )
    order by e.workspace_id, e.endpoint_id
    limit %(most)s
    for update of e skip locked
)
delete from endpoints e
using over o
where e.workspace_id = o.workspace_id and e.endpoint_id = o.endpoint_id;

-- name: partitions_old
-- Partitions that every workspace has ceased to keep and no unfinished batch needs. is_pending: a detach of it was
-- interrupted. Events and attempts may go earlier than items and texts. Locks nothing.
with child as (
    select p.relname::text as parent, c.relname::text as partition, h.inhdetachpending as is_pending,
        to_date(right(c.relname, 8), 'YYYYMMDD') as day
    from pg_inherits h
    join pg_class c on c.oid = h.inhrelid
    join pg_class p on p.oid = h.inhparent
    where p.relnamespace = 'public'::regnamespace
        and p.relkind = 'p'
        and p.relname in (
            'items', 'item_requests', 'item_results', 'attempts', 'events', 'deliveries', 'delivery_attempts'
        )
        and c.relname ~ '_[0-9]{8}$'
),
longest as (
    select greatest(%(days)s::int, (select max(w.keep_days) from workspaces w)) as days
)
select c.parent, c.partition, c.is_pending
from child c
cross join longest l
where c.day < (clock() at time zone 'UTC')::date - case c.parent
        when 'events' then least(l.days, %(events_days)s::int)
        when 'attempts' then least(l.days, %(attempts_days)s::int)
        else l.days
    end
    and not exists (select from batches b where b.batch_day = c.day and b.completed_at is null)
    and not exists (select from rollup_due d where d.batch_day = c.day)
order by c.day, c.parent <> 'items', c.parent;

-- name: rollup_minutes_prune
-- Forget minutes, some at a time.
delete from rollup_minutes
where ctid = any (array(
    select m.ctid from rollup_minutes m where m.minute_at < clock() - make_interval(days => %(days)s) limit %(most)s
));

-- name: rollup_latency_minutes_prune
-- The same of their durations.
delete from rollup_latency_minutes
where ctid = any (array(
    select m.ctid
    from rollup_latency_minutes m
    where m.minute_at < clock() - make_interval(days => %(days)s)
    limit %(most)s
));

-- name: rollup_hours_prune
-- Forget hours, some at a time.
delete from rollup_hours
where ctid = any (array(
    select m.ctid from rollup_hours m where m.hour_at < clock() - make_interval(days => %(days)s) limit %(most)s
));

-- name: rollup_latency_hours_prune
-- The same of their durations.
delete from rollup_latency_hours
where ctid = any (array(
    select m.ctid
    from rollup_latency_hours m
    where m.hour_at < clock() - make_interval(days => %(days)s)
    limit %(most)s
));

-- name: workspace_keep
-- Set how long a workspace's rows and texts are kept; null: as the settings say.
update workspaces
set keep_days = %(keep_days)s, keep_texts_days = %(keep_texts_days)s
where workspace_id = %(workspace_id)s;
