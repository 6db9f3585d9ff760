-- Batches and their flows: create, read, list.

-- name: batch_insert
-- Store a batch; its items are already there, in the same transaction.
insert into batches (
    workspace_id, batch_id, environment_id, batch_day, type, endpoint, name, metadata, capacity,
    callback_options, priority, weight, expires_at, source_ip, max_tokens, max_cost_nano, currency, total_items,
    estimated_input_tokens, idempotency_key, request_hash, created_by_api_key_id, created_by_user_id, timeout_ms, max_attempts, created_at
)
values (
    %(workspace_id)s, %(batch_id)s, %(environment_id)s, %(batch_day)s, %(type)s, %(endpoint)s, %(name)s,
    %(metadata)s, %(capacity)s, %(callback_options)s, %(priority)s, %(weight)s, %(expires_at)s, %(source_ip)s,
    %(max_tokens)s, %(max_cost_nano)s, %(currency)s, %(total_items)s, %(estimated_input_tokens)s,
    %(idempotency_key)s, %(request_hash)s, %(created_by_api_key_id)s,
    %(created_by_user_id)s, %(timeout_ms)s, %(max_attempts)s, clock()
);

-- name: flows_insert
-- Store a batch's flows. A new flow enters at the virtual time of the flow served next. One without items is for
-- what may fall back to its model.
insert into flows (
    workspace_id, batch_id, resource_id, batch_day, priority, weight, expires_at, scope_ids, virtual_time,
    total, unstarted, pending, request_bytes, is_open
)
select %(workspace_id)s, %(batch_id)s, g.resource_id, %(batch_day)s, %(priority)s, %(weight)s, %(expires_at)s,
    %(scope_ids)s, flow_entry(%(workspace_id)s, g.resource_id, %(priority)s::smallint), g.items, g.items, g.items,
    g.request_bytes, g.items > 0
from unnest(%(resource_ids)s::uuid[], %(items)s::int[], %(request_bytes)s::bigint[]) as g (resource_id, items, request_bytes)
order by g.resource_id;

-- name: ready_now
-- Make known that resources have work. Last in its transaction: claims wait for these rows. Locks them in order.
insert into ready as r (workspace_id, resource_id, next_at)
select %(workspace_id)s, g.resource_id, clock_timestamp()
from unnest(%(resource_ids)s::uuid[]) as g (resource_id)
order by g.resource_id
on conflict (workspace_id, resource_id) do update
set next_at = excluded.next_at, reason = null, waits_for = null
where r.next_at > excluded.next_at;

-- name: event_append
-- Append an event of the batch itself; its number.
select event_append(
    %(workspace_id)s, %(batch_day)s, %(batch_id)s, %(kind)s::event_kind, null, clock()
) as no;

-- name: batch_get
-- One batch and the sum of its flows.
select b.workspace_id, b.environment_id, b.batch_id, b.batch_day, b.type::text as type,
    b.status::text as status, b.endpoint, b.name, b.metadata, b.capacity, b.callback_options, b.priority,
    b.weight, b.expires_at, b.expired_at, b.total_items, b.estimated_input_tokens, b.idempotency_key,
    b.request_hash, b.created_by_api_key_id, b.created_by_user_id, b.created_at, b.started_at, b.cancelled_at,
    b.completed_at, b.timeout_ms, b.max_attempts, f.pending, f.running, f.completed, f.failed,
    f.cancelled, f.retries, f.input_tokens, f.output_tokens, f.is_paused,
    f.cost_nano, coalesce(b.currency, f.currency) as currency, b.max_tokens, b.max_cost_nano, b.pause_reason,
    b.texts_erased_at is not null as texts_are_erased
from batches b
cross join lateral (
    select sum(f.pending)::int as pending, sum(f.running)::int as running,
        sum(f.completed)::int as completed, sum(f.failed)::int as failed,
        sum(f.cancelled)::int as cancelled, sum(f.retries)::int as retries,
        sum(f.input_tokens)::bigint as input_tokens, sum(f.output_tokens)::bigint as output_tokens,
        bool_and(f.is_paused) as is_paused, sum(f.cost_nano)::bigint as cost_nano,
        case when count(distinct f.currency) = 1 then max(f.currency) end as currency
    from flows f
    where f.workspace_id = b.workspace_id and f.batch_id = b.batch_id
) f
where b.workspace_id = %(workspace_id)s
    and b.environment_id = %(environment_id)s
    and b.batch_id = %(batch_id)s;

-- name: batches_page
-- Batches of an environment that fit all filters, newest first, below a given id.
select b.workspace_id, b.environment_id, b.batch_id, b.batch_day, b.type::text as type,
    b.status::text as status, b.endpoint, b.name, b.metadata, b.capacity, b.callback_options, b.priority,
    b.weight, b.expires_at, b.expired_at, b.total_items, b.estimated_input_tokens, b.idempotency_key,
    b.request_hash, b.created_by_api_key_id, b.created_by_user_id, b.created_at, b.started_at, b.cancelled_at,
    b.completed_at, b.timeout_ms, b.max_attempts, f.pending, f.running, f.completed, f.failed,
    f.cancelled, f.retries, f.input_tokens, f.output_tokens, f.is_paused,
    f.cost_nano, coalesce(b.currency, f.currency) as currency, b.max_tokens, b.max_cost_nano, b.pause_reason,
    b.texts_erased_at is not null as texts_are_erased
from batches b
cross join lateral (
    select sum(f.pending)::int as pending, sum(f.running)::int as running,
        sum(f.completed)::int as completed, sum(f.failed)::int as failed,
        sum(f.cancelled)::int as cancelled, sum(f.retries)::int as retries,
        sum(f.input_tokens)::bigint as input_tokens, sum(f.output_tokens)::bigint as output_tokens,
        bool_and(f.is_paused) as is_paused, sum(f.cost_nano)::bigint as cost_nano,
        case when count(distinct f.currency) = 1 then max(f.currency) end as currency
    from flows f
    where f.workspace_id = b.workspace_id and f.batch_id = b.batch_id
) f
where b.workspace_id = %(workspace_id)s
    and b.environment_id = %(environment_id)s
    and (%(before)s::uuid is null or b.batch_id < %(before)s::uuid)
    and (%(statuses)s::work_status[] is null or b.status = any (%(statuses)s::work_status[]))
    and (%(types)s::batch_type[] is null or b.type = any (%(types)s::batch_type[]))
    and (%(name)s::text is null or position(lower(%(name)s::text) in lower(b.name)) > 0)
    and (%(created_from)s::timestamptz is null or b.created_at >= %(created_from)s::timestamptz)
    and (%(created_before)s::timestamptz is null or b.created_at < %(created_before)s::timestamptz)
    and (%(api_key_id)s::uuid is null or b.created_by_api_key_id = %(api_key_id)s::uuid)
    and not exists (
        select from jsonb_each_text(%(metadata)s::jsonb) w
        where b.metadata ->> w.key is distinct from w.value
    )
    and (%(resource_id)s::uuid is null or exists (
        select from flows u
        where u.workspace_id = b.workspace_id
            and u.batch_id = b.batch_id
            and u.resource_id = %(resource_id)s::uuid
    ))
order by b.batch_id desc
limit %(most)s;

-- name: batch_by_idempotency_key
-- The batch that a key already created; old: so long ago that the key may be used anew.
select batch_id, request_hash, created_at < clock() - make_interval(hours => %(hours)s) as is_old
from batches
where workspace_id = %(workspace_id)s
    and environment_id = %(environment_id)s
    and idempotency_key = %(idempotency_key)s;

-- name: idempotency_key_free
-- Let a key be used anew: the batch it made goes on without it.
update batches
set idempotency_key = null
where workspace_id = %(workspace_id)s and batch_id = %(batch_id)s;

-- name: idempotency_lock
-- Make a concurrent creation with the same key wait for this transaction.
select pg_advisory_xact_lock(
    hashtextextended(%(workspace_id)s::text || %(environment_id)s::text || %(idempotency_key)s, 0)
)::text as locked;

-- name: batch_resources
-- The resources that a batch uses.
select resource_id from flows
where workspace_id = %(workspace_id)s and batch_id = %(batch_id)s;

-- name: flows_pause
-- Let claims pass a batch by. Locks its flows in order; a claim that took from one meanwhile starts anew.
with held as (
    select f.workspace_id, f.batch_id, f.resource_id
    from flows f
    where f.workspace_id = %(workspace_id)s and f.batch_id = %(batch_id)s and not f.is_paused
    order by f.resource_id
    for no key update
)
update flows f
set is_paused = true
from held h
where f.workspace_id = h.workspace_id and f.batch_id = h.batch_id and f.resource_id = h.resource_id;

-- name: flows_resume
-- The opposite: a flow enters again at the virtual time of the flow served next, so that it has saved up nothing.
with held as (
    select f.workspace_id, f.batch_id, f.resource_id
    from flows f
    where f.workspace_id = %(workspace_id)s and f.batch_id = %(batch_id)s and f.is_paused
    order by f.resource_id
    for no key update
)
update flows f
set is_paused = false,
    virtual_time = greatest(f.virtual_time, flow_entry(f.workspace_id, f.resource_id, f.priority))
from held h
where f.workspace_id = h.workspace_id and f.batch_id = h.batch_id and f.resource_id = h.resource_id;

-- name: batch_unpause
-- Forget why a batch was paused. Its row is locked after its flows: see flows_resume.
update batches
set pause_reason = null
where workspace_id = %(workspace_id)s and batch_id = %(batch_id)s and pause_reason is not null;

-- name: batch_budget_seed
-- Enter into a new limit of a batch's lifetime what was used before. The caller holds its mutex.
select batch_budget_seed(%(workspace_id)s, %(batch_id)s)::text as seeded;

-- name: batches_exhausted
-- Batches that may have spent what they may. Reads the small index of waiting flows; locks nothing.
select distinct f.workspace_id, f.batch_id
from flows f
where f.is_open and f.waits_for is not null and f.waits_until = 'infinity' and not f.is_paused and f.running = 0
order by f.workspace_id, f.batch_id
limit 1000;

-- name: batch_pause_exhausted
-- Pause such a batch once nothing of it is out; whether it did.
select batch_pause_exhausted(%(workspace_id)s, %(batch_id)s) as paused;

-- name: flows_lock
-- Lock a batch's flows in order, as whoever changes a batch does first.
select f.resource_id
from flows f
where f.workspace_id = %(workspace_id)s and f.batch_id = %(batch_id)s
order by f.resource_id
for no key update;

-- name: batch_lock
-- Lock a batch's row, after its flows, and see what steers it.
select status::text as status, priority, weight::double precision as weight, expires_at, capacity, max_tokens,
    max_cost_nano, currency, pause_reason
from batches
where workspace_id = %(workspace_id)s and batch_id = %(batch_id)s
for no key update;

-- name: now
-- The present.
select clock_timestamp() as now;

-- name: batch_change
-- Change what steers a running batch. Its row is locked after its flows: see flows_steer.
update batches
set priority = %(priority)s, weight = %(weight)s, expires_at = %(expires_at)s, capacity = %(capacity)s,
    max_tokens = %(max_tokens)s, max_cost_nano = %(max_cost_nano)s, currency = %(currency)s
where workspace_id = %(workspace_id)s and batch_id = %(batch_id)s;

-- name: flows_steer
-- The same for its flows, locked in order; effective at the next claim. A flow whose priority changes enters its
-- new company at the virtual time of the one that is served next there: neither in debt nor with savings.
with held as (
    select f.workspace_id, f.batch_id, f.resource_id
    from flows f
    where f.workspace_id = %(workspace_id)s and f.batch_id = %(batch_id)s
    order by f.resource_id
    for no key update
)
update flows f
set priority = %(priority)s, weight = %(weight)s, expires_at = %(expires_at)s,
    virtual_time = case when f.priority = %(priority)s then f.virtual_time else coalesce((
        select min(o.virtual_time)
        from flows o
        where o.workspace_id = f.workspace_id
            and o.resource_id = f.resource_id
            and o.is_open
            and not o.is_paused
            and not o.is_cancelled
            and o.pending > 0
            and o.priority = %(priority)s
            and o.batch_id <> f.batch_id
    ), f.virtual_time) end
from held h
where f.workspace_id = h.workspace_id and f.batch_id = h.batch_id and f.resource_id = h.resource_id;

-- name: batches_resources
-- The resources that the items of each of some batches asked, by the names they had: of an alternate its owner. One that
-- was deleted is in nobody's allowlist any more; it is left out for the key that created the batch.
select f.batch_id, array_agg(distinct coalesce(r.owner_id, f.resource_id)) as resource_ids
from flows f
join batches b on b.workspace_id = f.workspace_id and b.batch_id = f.batch_id
left join resources r on r.workspace_id = f.workspace_id and r.resource_id = f.resource_id
where f.workspace_id = %(workspace_id)s
    and f.batch_id = any (%(batch_ids)s::uuid[])
    and not (r.resource_id is null and b.created_by_api_key_id is not distinct from %(reader_id)s::uuid)
group by f.batch_id;

-- name: run_batches
-- The batches of one run of the command line, generation by generation, in the order of their rows.
select batch_id, batch_day, status::text as status, total_items, (metadata ->> 'generation')::int as generation,
    (metadata ->> 'firstRow')::int as first_row
from batches
where workspace_id = %(workspace_id)s
    and environment_id = %(environment_id)s
    and idempotency_key like %(run)s || ':%%'
order by generation, first_row;
