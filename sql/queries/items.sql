-- Items with their texts: read one, read a page, stream all. An item of a cancelled flow reads as cancelled from the
-- cancel's commit on, also while its row still says pending.
--
-- The texts are fetched by lateral probes with a limit, which the planner cannot turn into a join on part of
-- the key. It does so with a new partition, of which it has no statistics: 200 items of a batch of 300 took
-- 5 seconds, because every item read every result of the batch.

-- name: items_page
-- Items (of the resource that was asked, also where an alternate answers) of a batch from a number on, in order, optionally only those of one status. startedAt of an item that
-- ended is that of the attempt which decided it.
with found as materialized (
    select i.workspace_id, i.batch_id, i.seq, i.resource_id, s.status, i.attempt, i.failures, i.input_tokens,
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
        and i.seq >= %(from_seq)s
        and (%(status)s::text is null or s.status = %(status)s)
    order by i.seq
    limit %(most)s
)
select i.workspace_id, i.batch_id, i.seq, coalesce((
        select r.owner_id from resources r
        where r.workspace_id = i.workspace_id and r.resource_id = i.resource_id
    ), i.resource_id) as resource_id, i.status, i.attempt, i.failures,
    i.input_tokens as estimated_input_tokens, i.visible_at, coalesce(i.claimed_at, a.claimed_at) as claimed_at,
    i.ended_at, i.created_at, q.custom_id, q.request, r.response, r.headers, r.status_code, r.input_tokens,
    r.output_tokens, r.model, r.error_code, r.error_message
from found i
join lateral (
    select q.custom_id, q.body::text as request
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
    select a.claimed_at
    from attempts a
    where a.workspace_id = i.workspace_id
        and a.batch_day = %(batch_day)s
        and a.batch_id = i.batch_id
        and a.seq = i.seq
        and a.attempt = r.attempt
    limit 1
) a on true
order by i.seq;

-- name: items_some
-- Given items of a batch, in order: what an events frame needs.
with found as materialized (
    select i.workspace_id, i.batch_id, i.seq, i.resource_id, s.status, i.attempt, i.failures, i.input_tokens,
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
select i.workspace_id, i.batch_id, i.seq, coalesce((
        select r.owner_id from resources r
        where r.workspace_id = i.workspace_id and r.resource_id = i.resource_id
    ), i.resource_id) as resource_id, i.status, i.attempt, i.failures,
    i.input_tokens as estimated_input_tokens, i.visible_at, coalesce(i.claimed_at, a.claimed_at) as claimed_at,
    i.ended_at, i.created_at, q.custom_id, q.request, r.response, r.headers, r.status_code, r.input_tokens,
    r.output_tokens, r.model, r.error_code, r.error_message
from found i
join lateral (
    select q.custom_id, q.body::text as request
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
    select a.claimed_at
    from attempts a
    where a.workspace_id = i.workspace_id
        and a.batch_day = %(batch_day)s
        and a.batch_id = i.batch_id
        and a.seq = i.seq
        and a.attempt = r.attempt
    limit 1
) a on true
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
-- Put failed items of a batch back, with fresh failures and crashes; how many. See sql/functions/redrive.sql.
select redrive(%(workspace_id)s, %(batch_id)s, %(most)s) as redriven;
