-- The verbs of the queue as the worker and maintenance call them. The verbs themselves are functions, each with
-- its essay: sql/functions/claim.sql, settle.sql, reclaim.sql, cancel.sql.

-- name: ready_due
-- Resources that may have claimable work, and when. The one hot statement that spans tenants; locks nothing.
select workspace_id, resource_id, next_at, clock_timestamp() as now
from ready
where next_at < 'infinity'
order by next_at
limit %(most)s;

-- name: item_claim
-- Take items of one resource within its limits. The last row has no seq: it reports, and tells of the flows.
select flow, seq, attempt, failures, max_attempts, input_tokens, output_tokens, expected_output_tokens, impossible,
    timeout_ms, body, report::text as report
from claim(
    %(workspace_id)s, %(resource_id)s, %(worker_id)s, %(want)s, %(alone)s,
    make_interval(secs => %(guard_s)s), make_interval(secs => %(grace_s)s), %(burst_s)s::double precision,
    %(slow_start)s
);

-- name: items_held_by
-- What a worker holds. Reads the small index of running items; locks nothing.
select workspace_id, resource_id, batch_day, batch_id, seq, attempt, failures, max_attempts,
    reserved_input_tokens as input_tokens, reserved_output_tokens as output_tokens, claimed_at,
    expected_output_tokens, reserved_limits as limit_ids
from items
where status = 'running' and worker_id = %(worker_id)s;

-- name: item_settle
-- Record outcomes: the calls of each claim as JSON and, by position, the provider's bodies.
select unsettled, becomes, wakes
from settle(
    %(workspace_id)s, %(worker_id)s, %(outcomes)s::json, %(bodies)b::text[], %(observed)s::json,
    %(rest_s)s::double precision, %(rest_most_s)s::double precision
);

-- name: items_lapsed
-- Running items whose worker is dead or whose lease has passed, for reclaim. Silence counts only since the
-- latest of the worker's heartbeat, the server's start and the asker's own reconnection (quiet_since), so that
-- an outage of the database reclaims nothing. Locks nothing.
with awake as (
    select clock_timestamp() - make_interval(secs => %(dead_after_s)s) as since,
        greatest(pg_postmaster_start_time(), %(quiet_since)s) as heard_from
),
held as (
    select i.workspace_id, i.batch_day, i.batch_id, i.seq, i.attempt, i.visible_at, i.worker_id,
        count(*) over (partition by i.worker_id) as held_by_worker
    from items i
    where i.status = 'running'
)
select h.workspace_id, h.batch_day, h.batch_id, h.seq, h.attempt,
    h.held_by_worker = 1 and w.stopped_at is null as alone
from held h
cross join awake a
left join workers w on w.worker_id = h.worker_id
where w.worker_id is null
    or w.stopped_at is not null
    or w.died_at is not null
    or greatest(w.heartbeat_at, a.heard_from) < a.since
    or (h.visible_at < clock_timestamp() and a.heard_from < a.since)
order by h.workspace_id, h.batch_id, h.seq
limit %(most)s;

-- name: items_reclaim
-- Bring items of one batch back; how many.
select reclaim(
    %(workspace_id)s, %(batch_day)s, %(batch_id)s, %(seqs)s, %(attempts)s, %(alone)s, %(max_crashes)s,
    make_interval(secs => %(wait_s)s)
) as reclaimed;

-- name: batch_cancel
-- Close a batch's flows; its status afterwards, null when there is no such batch.
select cancel(%(workspace_id)s, %(batch_id)s, %(abort)s) as status;

-- name: batch_cancel_chunk
-- Mark some rows of a cancelled batch; how many.
select cancel_chunk(%(workspace_id)s, %(batch_day)s, %(batch_id)s, %(most)s) as marked;

-- name: batches_aborted
-- Which of these batches have calls that are to be cut. Spans tenants: a worker asks for all it holds.
select distinct batch_id
from flows
where (workspace_id, batch_id) in (
    select * from unnest(%(workspace_ids)s::uuid[], %(batch_ids)s::uuid[])
)
    and is_aborted;

-- name: flows_expired
-- Flows whose deadline has passed while items still wait. Reads the index of deadlines; locks nothing.
select workspace_id, batch_day, batch_id, resource_id
from flows
where is_open and expires_at <= clock_timestamp() and not is_cancelled and pending > 0
order by expires_at
limit %(most)s;

-- name: flow_expire
-- End some items of a flow whose deadline has passed; how many.
select expire(%(workspace_id)s, %(batch_day)s, %(batch_id)s, %(resource_id)s, %(most)s) as expired;

-- name: batches_unmarked
-- Cancelled batches whose rows do not say so yet, or whose calls are to be cut. Reads the index of open flows; locks nothing.
select distinct workspace_id, batch_day, batch_id
from flows
where is_open and is_cancelled and (unmarked > 0 or is_aborted)
order by workspace_id, batch_id
limit %(most)s;

-- name: ready_recompute
-- The safety net of ready: set it to now where claimable work waits and nobody will look (infinity; a finite time
-- is a wait for capacity). Locks ready rows of few resources in key order; one that a claim is at work on is passed over.
with behind as (
    select r.workspace_id, r.resource_id
    from ready r
    where r.next_at = 'infinity'
        and r.reason is null
        and exists (
            select from flows f
            where f.workspace_id = r.workspace_id
                and f.resource_id = r.resource_id
                and f.is_open
                and not f.is_paused
                and not f.is_cancelled
                and f.pending > 0
        )
        and exists (
            select from work_due(r.workspace_id, r.resource_id, clock_timestamp()) w
            where w.due_at <= clock_timestamp()
        )
    order by r.workspace_id, r.resource_id
    for no key update of r skip locked
)
update ready r
set next_at = clock_timestamp()
from behind b
where r.workspace_id = b.workspace_id and r.resource_id = b.resource_id;

-- name: items_below_floor
-- First-attempt items that a floor has passed: there must never be one. Reported as a bug.
select f.workspace_id, f.batch_id, f.resource_id, count(*) as items
from flows f
join items i on i.workspace_id = f.workspace_id
    and i.batch_day = f.batch_day
    and i.batch_id = f.batch_id
    and i.resource_id = f.resource_id
    and i.status = 'pending'
    and i.attempt = 0
    and i.seq < f.floor
where f.is_open and not f.is_cancelled
group by f.workspace_id, f.batch_id, f.resource_id;

-- name: worker_register
-- A worker process begins.
insert into workers (worker_id, host, machine, pid, version)
values (%(worker_id)s, %(host)s, %(machine)s, %(pid)s, %(version)s);

-- name: worker_heartbeat
-- It lives.
update workers
set heartbeat_at = clock_timestamp(), in_flight = %(in_flight)s
where worker_id = %(worker_id)s;

-- name: worker_stop
-- It says goodbye: what it still holds may be reclaimed at once.
update workers
set stopped_at = clock_timestamp(), in_flight = 0
where worker_id = %(worker_id)s;

-- name: workers_of_machine
-- Workers of one process namespace that have not said goodbye: whose processes can be looked for there.
select worker_id, pid
from workers
where machine = %(machine)s and stopped_at is null and died_at is null;

-- name: worker_died
-- Its process is gone from its host: no need to wait for the silence to grow.
update workers
set died_at = clock_timestamp()
where worker_id = %(worker_id)s;

-- name: workers_forget
-- Drop the rows of workers that have been gone for a week and hold nothing.
delete from workers w
where w.heartbeat_at < clock_timestamp() - interval '7 days'
    and not exists (select from items i where i.status = 'running' and i.worker_id = w.worker_id);

-- name: lease_take
-- Take or keep a duty; a row comes back for who has it. That of a worker known to be gone is free at once.
insert into leases as l (name, holder_id, until)
values (%(name)s, %(holder_id)s, clock_timestamp() + make_interval(secs => %(for_s)s))
on conflict (name) do update
set holder_id = excluded.holder_id, until = excluded.until
where l.holder_id = excluded.holder_id
    or l.until < clock_timestamp()
    or exists (
        select from workers w
        where w.worker_id = l.holder_id and (w.died_at is not null or w.stopped_at is not null)
    )
returning l.holder_id;

-- name: lease_release
-- Give a duty back.
delete from leases where name = %(name)s and holder_id = %(holder_id)s;

-- name: ledger_prune
-- Forget ledger slots that no limit looks at any more and that analysts have had their time for.
delete from ledger g
where g.slot_at < clock_timestamp() - make_interval(hours => %(keep_hours)s)
    and not exists (
        select from limits l
        where l.workspace_id = g.workspace_id
            and l.limit_id = g.limit_id
            and g.slot_at > counts_after(l.period, l.sliding, clock_timestamp(), interval '1 hour')
    );

-- name: partitions_ensure
-- Make the partitions of a day.
select partitions_ensure(%(day)s) as made;
