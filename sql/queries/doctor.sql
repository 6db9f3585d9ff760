-- What `sluice doctor` looks at. All of it only reads; the recounts read whole tables and may take a while.

-- name: server_facts
-- Settings of the server that the queue relies on, and how many connections it has left.
select current_setting('server_version_num')::int as version,
    current_setting('server_version') as version_name,
    current_setting('synchronous_commit') as synchronous_commit,
    current_setting('fsync') = 'on' as fsync,
    current_setting('autovacuum') = 'on' as autovacuum,
    current_setting('default_transaction_isolation') as isolation,
    current_setting('max_connections')::int as max_connections,
    (select count(*)::int from pg_stat_activity where backend_type = 'client backend') as connections;

-- name: oldest_transactions
-- The oldest transaction that does nothing, and the oldest snapshot: while one is held, nothing is cleaned up.
select coalesce(extract(epoch from max(clock_timestamp() - a.xact_start)
        filter (where a.state like 'idle in transaction%%')), 0)::float8 as idle_s,
    coalesce(extract(epoch from max(clock_timestamp() - a.xact_start)
        filter (where a.backend_xmin is not null)), 0)::float8 as snapshot_s
from pg_stat_activity a
where a.pid <> pg_backend_pid() and a.datname = current_database();

-- name: partitions_missing
-- Partitions of today and tomorrow that do not exist.
select p.parent || '_' || to_char(d.day, 'YYYYMMDD') as name
from unnest(array[
    'items', 'item_requests', 'item_results', 'attempts', 'events', 'deliveries', 'delivery_attempts'
]) as p (parent)
cross join generate_series(
    (clock_timestamp() at time zone 'UTC')::date::timestamp,
    (clock_timestamp() at time zone 'UTC')::date + interval '1 day',
    interval '1 day'
) as d (day)
where to_regclass(p.parent || '_' || to_char(d.day, 'YYYYMMDD')) is null
order by name;

-- name: workers_seen
-- Workers that live, workers that fell silent, and whether work has been waiting for one for a minute.
select count(*) filter (where w.heartbeat_at > clock_timestamp() - make_interval(secs => %(dead_after_s)s))::int
        as alive,
    count(*) filter (where w.heartbeat_at <= clock_timestamp() - make_interval(secs => %(dead_after_s)s))::int
        as silent,
    exists (
        select from ready r
        join flows f on f.workspace_id = r.workspace_id and f.resource_id = r.resource_id
        where r.next_at < clock_timestamp() - interval '1 minute'
            and f.is_open
            and not f.is_paused
            and f.pending > 0
    ) as work_waits
from workers w
where w.stopped_at is null and w.died_at is null;

-- name: ready_behind
-- Resources with claimable work that nobody will look at soon. Maintenance repairs them, and there should be none.
select count(*)::int as resources
from ready r
where r.next_at > clock_timestamp() + interval '30 seconds'
    and exists (
        select from flows f
        where f.workspace_id = r.workspace_id
            and f.resource_id = r.resource_id
            and f.is_open
            and not f.is_paused
            and not f.is_cancelled
            and f.pending > 0
    )
    and r.reason is null
    and exists (
        select from work_due(r.workspace_id, r.resource_id, clock_timestamp()) w
        where w.due_at <= clock_timestamp()
    );

-- name: counters_off
-- Flows whose counters differ from a count of their items.
with counted as (
    select i.workspace_id, i.batch_id, i.resource_id, count(*) as total,
        count(*) filter (where i.status = 'pending') as pending,
        count(*) filter (where i.status = 'pending' and i.attempt = 0) as unstarted,
        count(*) filter (where i.status = 'running') as running,
        count(*) filter (where i.status = 'completed') as completed,
        count(*) filter (where i.status = 'failed') as failed,
        count(*) filter (where i.status = 'cancelled') as cancelled
    from items i
    group by i.workspace_id, i.batch_id, i.resource_id
)
select f.workspace_id, f.batch_id, f.resource_id
from flows f
join counted c on c.workspace_id = f.workspace_id
    and c.batch_id = f.batch_id
    and c.resource_id = f.resource_id
where (f.total, f.running, f.completed, f.failed) <> (c.total, c.running, c.completed, c.failed)
    or (f.pending, f.unstarted, f.cancelled, f.unmarked) <> (
        case when f.is_cancelled then 0 else c.pending end,
        case when f.is_cancelled then 0 else c.unstarted end,
        case when f.is_cancelled then c.cancelled + c.pending else c.cancelled end,
        case when f.is_cancelled then c.pending else 0 end
    )
order by f.workspace_id, f.batch_id, f.resource_id;

-- name: ledger_off
-- Slots of the ledger that differ from the recount of design §9: what stays charged of the attempts that ended,
-- and the reservations of the calls in flight, in the slot of their claim. Only as far back as slots are kept.
with charges as (
    select a.workspace_id, unnest(a.reserved_limits) as limit_id, a.claimed_at, a.charged_requests as requests,
        a.charged_input_tokens as input_tokens, a.charged_output_tokens as output_tokens,
        case when a.outcome = 'lost' then a.expected_output_tokens else a.charged_output_tokens end
            as expected_output_tokens,
        (a.outcome = 'throttled')::int as refused
    from attempts a
    union all
    select i.workspace_id, unnest(i.reserved_limits), i.claimed_at, 1, i.reserved_input_tokens,
        i.reserved_output_tokens, i.expected_output_tokens, 0
    from items i
    where i.status = 'running'
),
recount as (
    select c.workspace_id, c.limit_id, slot_of(l.period, l.sliding, c.claimed_at) as slot_at,
        array[sum(c.requests), sum(c.input_tokens), sum(c.output_tokens), sum(c.expected_output_tokens),
            sum(c.refused)]::bigint[] as amounts
    from charges c
    join limits l on l.workspace_id = c.workspace_id and l.limit_id = c.limit_id
    group by c.workspace_id, c.limit_id, slot_of(l.period, l.sliding, c.claimed_at)
),
held as (
    select g.workspace_id, g.limit_id, g.slot_at,
        array[g.requests, g.input_tokens, g.output_tokens, g.expected_output_tokens, g.refused] as amounts
    from ledger g
    join limits l on l.workspace_id = g.workspace_id and l.limit_id = g.limit_id
),
compared as (
    select workspace_id, limit_id, slot_at, coalesce(h.amounts, '{0,0,0,0,0}') as amounts,
        coalesce(r.amounts, '{0,0,0,0,0}') as true_amounts
    from held h
    full join recount r using (workspace_id, limit_id, slot_at)
)
select c.workspace_id, c.limit_id, c.slot_at, c.amounts[1] as requests, c.true_amounts[1] as true_requests,
    c.amounts[2] + c.amounts[3] as tokens, c.true_amounts[2] + c.true_amounts[3] as true_tokens
from compared c
join limits l on l.workspace_id = c.workspace_id and l.limit_id = c.limit_id
where c.amounts <> c.true_amounts
    and c.slot_at > least(
        counts_after(l.period, l.sliding, clock_timestamp(), interval '0'),
        clock_timestamp() - make_interval(hours => %(keep_hours)s) + interval '1 hour'
    )
order by c.workspace_id, c.limit_id, c.slot_at;
