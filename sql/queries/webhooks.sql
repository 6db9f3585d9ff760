-- Endpoints and the deliveries to them. See sql/functions/deliveries.sql: the endpoint's row is the mutex.

-- name: endpoint_insert
-- Store an endpoint.
insert into endpoints (
    workspace_id, endpoint_id, environment_id, batch_id, batch_day, name, url, event_types, secret_key_id,
    secret, secret_hint, created_at, updated_at
)
values (
    %(workspace_id)s, %(endpoint_id)s, %(environment_id)s, %(batch_id)s, %(batch_day)s, %(name)s, %(url)s,
    %(event_types)s, %(secret_key_id)s, %(secret)s, %(secret_hint)s, clock(), clock()
);

-- name: endpoint_get
-- One endpoint.
select workspace_id, endpoint_id, environment_id, batch_id, batch_day, name, url, event_types, secret_key_id,
    secret, secret_hint, old_secret_until, disabled_at, disabled_reason, created_at, updated_at
from endpoints
where workspace_id = %(workspace_id)s
    and environment_id = %(environment_id)s
    and endpoint_id = %(endpoint_id)s;

-- name: endpoints_page
-- Standing endpoints of an environment, newest first.
select workspace_id, endpoint_id, environment_id, batch_id, batch_day, name, url, event_types, secret_key_id,
    secret, secret_hint, old_secret_until, disabled_at, disabled_reason, created_at, updated_at
from endpoints
where workspace_id = %(workspace_id)s
    and environment_id = %(environment_id)s
    and batch_id is null
    and (%(before)s::uuid is null or endpoint_id < %(before)s::uuid)
order by endpoint_id desc
limit %(most)s;

-- name: endpoint_hold
-- Wait for an endpoint's row and keep it until the commit.
select workspace_id, endpoint_id, environment_id, batch_id, batch_day, name, url, event_types, secret_key_id,
    secret, secret_hint, old_secret_until, disabled_at, disabled_reason, created_at, updated_at
from endpoints
where workspace_id = %(workspace_id)s and endpoint_id = %(endpoint_id)s
for no key update;

-- name: endpoint_take
-- The same, if nobody has it; no row otherwise.
select workspace_id, endpoint_id, environment_id, batch_id, batch_day, name, url, event_types, secret_key_id,
    secret, secret_hint, old_secret_until, disabled_at, disabled_reason, created_at, updated_at
from endpoints
where workspace_id = %(workspace_id)s and endpoint_id = %(endpoint_id)s
for no key update skip locked;

-- name: endpoint_change
-- Change a standing endpoint that is held; it is enabled from then on.
update endpoints
set name = %(name)s, url = %(url)s, event_types = %(event_types)s, disabled_at = null, disabled_reason = null,
    updated_at = clock()
where workspace_id = %(workspace_id)s and endpoint_id = %(endpoint_id)s;

-- name: endpoint_reseal
-- Put another secret in place of that of an endpoint that is held.
update endpoints
set secret_key_id = %(secret_key_id)s, secret = %(secret)s, secret_hint = %(secret_hint)s,
    old_secret_until = clock() + make_interval(secs => %(overlap_s)s), updated_at = clock()
where workspace_id = %(workspace_id)s and endpoint_id = %(endpoint_id)s;

-- name: endpoint_disable
-- Send nothing more to an endpoint that is held.
update endpoints
set disabled_at = clock(), disabled_reason = %(reason)s, next_at = 'infinity'
where workspace_id = %(workspace_id)s and endpoint_id = %(endpoint_id)s and disabled_at is null;

-- name: endpoint_enable
-- Send to an endpoint that is held again.
update endpoints
set disabled_at = null, disabled_reason = null
where workspace_id = %(workspace_id)s and endpoint_id = %(endpoint_id)s and disabled_at is not null;

-- name: endpoint_delete
-- Forget an endpoint that is held; what was sent to it stays on record.
delete from endpoints
where workspace_id = %(workspace_id)s and endpoint_id = %(endpoint_id)s;

-- name: endpoint_rest
-- Note from when on an endpoint that is held has something to claim.
select endpoint_rest(%(workspace_id)s, %(endpoint_id)s) as next_at;

-- name: endpoints_due
-- Endpoints of all tenants that have something to claim, and those that will within some seconds.
select workspace_id, endpoint_id, url, greatest(extract(epoch from next_at - clock()), 0)::float8 as wait_s
from endpoints
where next_at <= clock() + make_interval(secs => %(within_s)s)
order by next_at
limit %(most)s;

-- name: endpoints_postpone
-- Look at endpoints again only after some seconds: nothing can be sent to them before. Skips what is locked.
with free as (
    select e.workspace_id, e.endpoint_id, g.wait_s
    from unnest(%(workspace_ids)s::uuid[], %(endpoint_ids)s::uuid[], %(waits_s)s::float8[])
        as g (workspace_id, endpoint_id, wait_s)
    join endpoints e on e.workspace_id = g.workspace_id and e.endpoint_id = g.endpoint_id
    order by e.workspace_id, e.endpoint_id
    for no key update of e skip locked
)
update endpoints e
set next_at = clock() + make_interval(secs => free.wait_s)
from free
where e.workspace_id = free.workspace_id and e.endpoint_id = free.endpoint_id;

-- name: endpoints_sweep
-- Find standing endpoints that were locked when a delivery to them was written; see deliveries_append.
with late as (
    select e.workspace_id, e.endpoint_id
    from endpoints e
    where e.batch_id is null
        and e.disabled_at is null
        and e.next_at > clock() + interval '1 second'
        and exists (
            select from deliveries d
            where d.workspace_id = e.workspace_id
                and d.endpoint_id = e.endpoint_id
                and d.status = 'pending'
                and d.visible_at <= clock()
        )
    order by e.workspace_id, e.endpoint_id
    for no key update of e skip locked
)
update endpoints e
set next_at = clock()
from late
where e.workspace_id = late.workspace_id and e.endpoint_id = late.endpoint_id;

-- name: deliveries_claim
-- Take due deliveries of an endpoint that is held, oldest first, for the length of a lease. A batch's end waits
-- for what its items have to tell.
with due as (
    select d.batch_day, d.batch_id, d.event_no
    from deliveries d
    where d.workspace_id = %(workspace_id)s
        and d.endpoint_id = %(endpoint_id)s
        and d.status = 'pending'
        and d.visible_at <= clock()
        and (
            d.seq is not null
            or not %(is_callback)s
            or not delivery_waits(d.workspace_id, d.endpoint_id, d.batch_day, d.event_no)
        )
    order by d.visible_at, d.event_no
    limit %(most)s
)
update deliveries d
set attempt = d.attempt + 1, visible_at = clock() + make_interval(secs => %(lease_s)s)
from due
where d.workspace_id = %(workspace_id)s
    and d.batch_day = due.batch_day
    and d.batch_id = due.batch_id
    and d.event_no = due.event_no
    and d.endpoint_id = %(endpoint_id)s
returning d.batch_day, d.batch_id, d.event_no, d.seq, d.kind::text as kind, d.topic,
    d.attempt, d.failures, d.created_at;

-- name: deliveries_settle
-- Record what came of tries at an endpoint that is held. A try whose lease passed and was begun anew elsewhere
-- changes nothing but the record of tries.
with given as (
    select *
    from unnest(
        %(batch_day)s::date[], %(batch_id)s::uuid[], %(event_no)s::bigint[], %(attempt)s::int[],
        %(status)s::text[], %(reason)s::text[], %(wait_s)s::float8[], %(failed)s::int[],
        %(started_at)s::timestamptz[], %(latency_ms)s::int[], %(status_code)s::int[], %(error_code)s::text[],
        %(error_message)s::text[]
    ) as g (
        batch_day, batch_id, event_no, attempt, status, reason, wait_s, failed, started_at, latency_ms,
        status_code, error_code, error_message
    )
),
changed as (
    update deliveries d
    set status = g.status::delivery_status, reason = g.reason, failures = d.failures + g.failed,
        visible_at = clock() + make_interval(secs => g.wait_s),
        ended_at = case when g.status <> 'pending' then clock() end
    from given g
    where d.workspace_id = %(workspace_id)s
        and d.batch_day = g.batch_day
        and d.batch_id = g.batch_id
        and d.event_no = g.event_no
        and d.endpoint_id = %(endpoint_id)s
        and d.attempt = g.attempt
        and d.status = 'pending'
)
insert into delivery_attempts (
    workspace_id, batch_day, batch_id, event_no, endpoint_id, attempt, started_at, latency_ms, status_code,
    error_code, error_message
)
select %(workspace_id)s, g.batch_day, g.batch_id, g.event_no, %(endpoint_id)s, g.attempt, g.started_at,
    g.latency_ms, g.status_code, g.error_code, g.error_message
from given g
on conflict do nothing;

-- name: deliveries_bury
-- Give up every pending delivery to an endpoint that is held.
update deliveries
set status = 'dead', reason = %(reason)s, ended_at = clock()
where workspace_id = %(workspace_id)s and endpoint_id = %(endpoint_id)s and status = 'pending';

-- name: deliveries_page
-- Deliveries of a batch in the order of its events, with their tries.
with found as materialized (
    select d.workspace_id, d.batch_day, d.batch_id, d.event_no, d.endpoint_id, d.seq, d.kind, d.status, d.reason,
        d.attempt, d.visible_at, d.created_at, d.ended_at
    from deliveries d
    where d.workspace_id = %(workspace_id)s
        and d.batch_day = %(batch_day)s
        and d.batch_id = %(batch_id)s
        and (d.event_no, d.endpoint_id) > (%(after_no)s::bigint, %(after_endpoint_id)s::uuid)
        and (%(status)s::text is null or d.status = %(status)s::text::delivery_status)
    order by d.event_no, d.endpoint_id
    limit %(most)s
)
select d.batch_id, d.event_no, d.endpoint_id, d.seq, d.kind::text as kind, d.status::text as status, d.reason,
    d.attempt, d.visible_at, d.created_at, d.ended_at, e.url, coalesce(t.tries, '[]') as tries
from found d
left join endpoints e on e.workspace_id = d.workspace_id and e.endpoint_id = d.endpoint_id
left join lateral (
    select jsonb_agg(jsonb_build_object(
        'attempt', a.attempt, 'started_at', a.started_at, 'latency_ms', a.latency_ms,
        'status_code', a.status_code, 'error_code', a.error_code, 'error_message', a.error_message
    ) order by a.attempt) as tries
    from delivery_attempts a
    where a.workspace_id = d.workspace_id
        and a.batch_day = d.batch_day
        and a.batch_id = d.batch_id
        and a.event_no = d.event_no
        and a.endpoint_id = d.endpoint_id
) t on true
order by d.event_no, d.endpoint_id;

-- name: deliveries_redeliver
-- Let deliveries of a batch to an endpoint that is held be tried again now, with a fresh schedule: one, whatever
-- became of it, or (event_no null) all that were given up.
update deliveries
set status = 'pending', reason = null, ended_at = null, failures = 0, visible_at = clock()
where workspace_id = %(workspace_id)s
    and batch_day = %(batch_day)s
    and batch_id = %(batch_id)s
    and endpoint_id = %(endpoint_id)s
    and (event_no = %(event_no)s::bigint or %(event_no)s::bigint is null and status = 'dead');

-- name: endpoints_of_dead
-- The endpoints to which deliveries of a batch were given up, in the order of their locks.
select distinct endpoint_id
from deliveries
where workspace_id = %(workspace_id)s
    and batch_day = %(batch_day)s
    and batch_id = %(batch_id)s
    and status = 'dead'
order by endpoint_id;
