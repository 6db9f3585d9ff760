-- Items with their texts: read one, read a page, stream all. An item of a cancelled flow reads as cancelled from the
-- cancel's commit on, also while its row still says pending.
--
-- The texts are fetched by lateral probes with a limit, which the planner cannot turn into a join on part of
-- the key. It does so with a new partition, of which it has no statistics: 200 items of a batch of 300 took
-- 5 seconds, because every item read every result of the batch.

-- name: items_seqs
-- Numbers of a batch's items from one on, upwards, optionally only those of some states or errors.
select i.seq
from items i
cross join lateral (
    select f.is_cancelled
    from flows f
    where f.workspace_id = i.workspace_id
        and f.batch_id = i.batch_id
        and f.resource_id = i.resource_id
    limit 1
) f
where i.workspace_id = %(workspace_id)s
    and i.batch_day = %(batch_day)s
    and i.batch_id = %(batch_id)s
    and i.seq >= %(start)s
    and (
        %(statuses)s::text[] is null
        or case when f.is_cancelled and i.status = 'pending' then 'cancelled' else i.status::text end
            = any (%(statuses)s::text[])
    )
    and (
        %(codes)s::text[] is null
        or i.status = 'failed' and exists (
            select from item_results r
            where r.workspace_id = i.workspace_id
                and r.batch_day = i.batch_day
                and r.batch_id = i.batch_id
                and r.seq = i.seq
                and r.error_code = any (%(codes)s::text[])
        )
    )
order by i.seq
limit %(most)s;

-- name: items_seqs_back
-- The same downwards from below a number.
select i.seq
from items i
cross join lateral (
    select f.is_cancelled
    from flows f
    where f.workspace_id = i.workspace_id
        and f.batch_id = i.batch_id
        and f.resource_id = i.resource_id
    limit 1
) f
where i.workspace_id = %(workspace_id)s
    and i.batch_day = %(batch_day)s
    and i.batch_id = %(batch_id)s
    and i.seq < %(start)s
    and (
        %(statuses)s::text[] is null
        or case when f.is_cancelled and i.status = 'pending' then 'cancelled' else i.status::text end
            = any (%(statuses)s::text[])
    )
    and (
        %(codes)s::text[] is null
        or i.status = 'failed' and exists (
            select from item_results r
            where r.workspace_id = i.workspace_id
                and r.batch_day = i.batch_day
                and r.batch_id = i.batch_id
                and r.seq = i.seq
                and r.error_code = any (%(codes)s::text[])
        )
    )
order by i.seq desc
limit %(most)s;

-- name: items_named
-- Numbers of the items that bear one of these names of their creator's.
select q.custom_id, q.seq
from item_requests q
where q.workspace_id = %(workspace_id)s
    and q.batch_day = %(batch_day)s
    and q.batch_id = %(batch_id)s
    and q.custom_id = any (%(custom_ids)s::text[])
order by q.seq;

-- name: item_first_open
-- The lowest number, from one on, of an item that has not ended.
select i.seq
from items i
cross join lateral (
    select f.is_cancelled
    from flows f
    where f.workspace_id = i.workspace_id
        and f.batch_id = i.batch_id
        and f.resource_id = i.resource_id
    limit 1
) f
where i.workspace_id = %(workspace_id)s
    and i.batch_day = %(batch_day)s
    and i.batch_id = %(batch_id)s
    and i.seq >= %(start)s
    and (i.status = 'running' or i.status = 'pending' and not f.is_cancelled)
order by i.seq
limit 1;

-- name: item_attempts
-- Every call of an item with its resource and account, oldest first; last the one that is out.
select c.attempt, c.outcome, c.resource_id, r.name as resource, c.connection_id, k.provider, c.model, c.worker_id,
    c.claimed_at, c.started_at, c.ended_at, c.latency_ms, c.status_code, c.request_id, c.error_code,
    c.error_message, c.input_tokens, c.output_tokens, c.cached_tokens, c.reasoning_tokens
from (
    select a.workspace_id, a.attempt, a.outcome::text as outcome, a.resource_id, a.connection_id, a.model,
        a.worker_id, a.claimed_at, a.started_at, a.ended_at, a.latency_ms, a.status_code,
        a.provider_request_id as request_id, a.error_code, a.error_message,
        a.charged_input_tokens as input_tokens, a.charged_output_tokens as output_tokens, a.cached_tokens,
        a.reasoning_tokens
    from attempts a
    where a.workspace_id = %(workspace_id)s
        and a.batch_day = %(batch_day)s
        and a.batch_id = %(batch_id)s
        and a.seq = %(seq)s
    union all
    select i.workspace_id, i.attempt, 'running', i.resource_id, null, null, i.worker_id, i.claimed_at, null, null,
        null, null, null, null, null, 0, 0, null, null
    from items i
    where i.workspace_id = %(workspace_id)s
        and i.batch_day = %(batch_day)s
        and i.batch_id = %(batch_id)s
        and i.seq = %(seq)s
        and i.status = 'running'
) c
left join resources r on r.workspace_id = c.workspace_id and r.resource_id = c.resource_id
left join connections k on k.workspace_id = c.workspace_id and k.connection_id = c.connection_id
order by c.attempt;

-- name: items_some
-- Given items of a batch, in order, with their texts: what a page or a frame of events needs. startedAt of an item
-- that ended is that of the attempt which decided it.
with found as materialized (
    select i.workspace_id, i.batch_id, i.seq, i.resource_id, s.status, i.ended_reason, i.attempt, i.failures,
        i.max_attempts, i.input_tokens,
        i.visible_at, i.claimed_at, coalesce(i.ended_at, b.cancelled_at) as ended_at, b.created_at
    from batches b
    join items i on i.workspace_id = b.workspace_id and i.batch_id = b.batch_id
    cross join lateral (
        select f.is_cancelled
        from flows f
        where f.workspace_id = i.workspace_id
            and f.batch_id = i.batch_id
            and f.resource_id = i.resource_id
        limit 1
    ) f
    cross join lateral (
        select case when f.is_cancelled and i.status = 'pending' then 'cancelled' else i.status::text end
            as status
    ) s
    where b.workspace_id = %(workspace_id)s
        and b.batch_id = %(batch_id)s
        and i.batch_day = %(batch_day)s
        and i.seq = any (%(seqs)s::int[])
)
select i.workspace_id, i.batch_id, i.seq, i.resource_id, i.status, i.ended_reason::text as ended_reason, i.attempt,
    i.failures, i.max_attempts, i.input_tokens as estimated_input_tokens, i.visible_at,
    coalesce(i.claimed_at, a.claimed_at) as claimed_at, i.ended_at, i.created_at, q.custom_id, q.vmx, q.request,
    r.response, r.headers, r.status_code, r.input_tokens, r.output_tokens, r.model, a.connection_id, k.provider,
    a.provider_request_id as request_id, r.error_code, r.error_message
from found i
join lateral (
    select q.custom_id, q.vmx, q.body::text as request
    from item_requests q
    where q.workspace_id = i.workspace_id
        and q.batch_day = %(batch_day)s
        and q.batch_id = i.batch_id
        and q.seq = i.seq
    limit 1
) q on true
left join lateral (
    select r.attempt, r.body::text as response, r.headers, r.status_code, r.input_tokens, r.output_tokens,
        r.model, r.error_code, r.error_message
    from item_results r
    where r.workspace_id = i.workspace_id
        and r.batch_day = %(batch_day)s
        and r.batch_id = i.batch_id
        and r.seq = i.seq
    limit 1
) r on true
left join lateral (
    select a.claimed_at, a.connection_id, a.provider_request_id
    from attempts a
    where a.workspace_id = i.workspace_id
        and a.batch_day = %(batch_day)s
        and a.batch_id = i.batch_id
        and a.seq = i.seq
        and a.attempt = r.attempt
    limit 1
) a on true
left join lateral (
    select k.provider
    from connections k
    where k.workspace_id = i.workspace_id and k.connection_id = a.connection_id
    limit 1
) k on true
order by i.seq;

-- name: items_brief
-- Given items of a batch without their texts, in order: what a slim stream shows.
select i.seq, i.resource_id, i.failures, q.custom_id, r.input_tokens, r.output_tokens, r.error_code
from items i
join lateral (
    select q.custom_id
    from item_requests q
    where q.workspace_id = i.workspace_id
        and q.batch_day = %(batch_day)s
        and q.batch_id = i.batch_id
        and q.seq = i.seq
    limit 1
) q on true
left join lateral (
    select r.input_tokens, r.output_tokens, r.error_code
    from item_results r
    where r.workspace_id = i.workspace_id
        and r.batch_day = %(batch_day)s
        and r.batch_id = i.batch_id
        and r.seq = i.seq
    limit 1
) r on true
where i.workspace_id = %(workspace_id)s
    and i.batch_id = %(batch_id)s
    and i.batch_day = %(batch_day)s
    and i.seq = any (%(seqs)s::int[])
order by i.seq;

-- name: results_stream
-- State and answer of every item in input order, without the requests: for writing output files.
select i.seq, i.status::text as status, r.status_code, r.response, r.error_code, r.error_message, q.custom_id,
    r.request_id
from items i
join lateral (
    select q.custom_id
    from item_requests q
    where q.workspace_id = i.workspace_id
        and q.batch_day = %(batch_day)s
        and q.batch_id = i.batch_id
        and q.seq = i.seq
    limit 1
) q on true
left join lateral (
    select r.status_code, r.body::text as response, r.error_code, r.error_message,
        a.provider_request_id as request_id
    from item_results r
    left join attempts a on a.workspace_id = r.workspace_id
        and a.batch_day = r.batch_day
        and a.batch_id = r.batch_id
        and a.seq = r.seq
        and a.attempt = r.attempt
    where r.workspace_id = i.workspace_id
        and r.batch_day = %(batch_day)s
        and r.batch_id = i.batch_id
        and r.seq = i.seq
    limit 1
) r on true
where i.workspace_id = %(workspace_id)s and i.batch_day = %(batch_day)s and i.batch_id = %(batch_id)s
order by i.seq;

-- name: items_redrive
-- Put failed or cancelled items of a batch back, with fresh failures and crashes; how many. See
-- sql/functions/redrive.sql.
select redrive(
    %(workspace_id)s, %(batch_id)s, %(statuses)s::work_status[], %(seqs)s::int[], %(codes)s::text[],
    coalesce(%(before)s::timestamptz, clock_timestamp()), %(most)s
) as redriven;
