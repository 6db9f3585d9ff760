-- Batches that are to be made from files, and batches as OpenAI's routes show them, however they were made.

-- name: submission_insert
-- A batch that is to be made from a file: somebody validates it now.
insert into submissions (
    workspace_id, batch_id, environment_id, input_file_id, endpoint, completion_window, name, metadata, priority,
    weight, max_tokens, max_cost_nano, output_expires_s, source_ip, idempotency_key, request_hash,
    created_by_api_key_id, expires_at
)
values (
    %(workspace_id)s, %(batch_id)s, %(environment_id)s, %(input_file_id)s, %(endpoint)s, %(completion_window)s,
    %(name)s, %(metadata)s, %(priority)s, %(weight)s, %(max_tokens)s, %(max_cost_nano)s, %(output_expires_s)s,
    %(source_ip)s, %(idempotency_key)s, %(request_hash)s, %(created_by_api_key_id)s, now() + %(window)s
);

-- name: submission_by_idempotency_key
-- What a key already created.
select batch_id, request_hash
from submissions
where workspace_id = %(workspace_id)s
    and environment_id = %(environment_id)s
    and idempotency_key = %(idempotency_key)s;

-- name: submission_lease
-- Take one that nobody validates, the oldest first, whoever's it is. A new lease is a new fencing number.
update submissions s
set lease_id = %(lease_id)s, leased_until = clock_timestamp() + make_interval(secs => %(lease_s)s),
    tries = s.tries + 1
from (
    select workspace_id, batch_id
    from submissions
    where status = 'validating' and (leased_until is null or leased_until <= clock_timestamp())
    order by batch_id
    limit 1
    for update skip locked
) due
where s.workspace_id = due.workspace_id and s.batch_id = due.batch_id
returning s.workspace_id, s.batch_id, s.environment_id, s.input_file_id, s.endpoint, s.name, s.metadata, s.priority,
    s.weight, s.max_tokens, s.max_cost_nano, s.source_ip, s.created_by_api_key_id, s.created_at, s.expires_at,
    s.tries::int as tries;

-- name: submission_renew
-- Keep a lease; 0 when it was lost, or the submission was cancelled.
update submissions
set leased_until = clock_timestamp() + make_interval(secs => %(lease_s)s)
where workspace_id = %(workspace_id)s
    and batch_id = %(batch_id)s
    and lease_id = %(lease_id)s
    and status = 'validating';

-- name: submission_release
-- Give a lease back, so that another may validate at once.
update submissions
set leased_until = null, tries = tries - 1
where workspace_id = %(workspace_id)s
    and batch_id = %(batch_id)s
    and lease_id = %(lease_id)s
    and status = 'validating';

-- name: submission_decide
-- Accept it, or say what is wrong; 0 when the lease was lost or it was cancelled meanwhile.
update submissions
set status = %(status)s::submission_status, decided_at = clock_timestamp(), errors = %(errors)s,
    model = %(model)s, lease_id = null, leased_until = null
where workspace_id = %(workspace_id)s
    and batch_id = %(batch_id)s
    and lease_id = %(lease_id)s
    and status = 'validating';

-- name: submission_cancel
-- Cancel it while it is validated; 0 when it is not any more.
update submissions
set status = 'cancelled', decided_at = clock_timestamp()
where workspace_id = %(workspace_id)s and batch_id = %(batch_id)s and status = 'validating';

-- name: submission_tell
-- Tell the webhooks of its environment that it was refused or cancelled, and never becomes a batch.
select webhooks_append(
    s.workspace_id, s.environment_id, %(batch_day)s::date, s.batch_id, ('batch-' || s.status)::event_kind, 0,
    'batch.' || s.status, clock()
)
from submissions s
where s.workspace_id = %(workspace_id)s and s.batch_id = %(batch_id)s and s.status in ('failed', 'cancelled');

-- name: submitted_ids
-- Batches of an environment, newest first, below a given id: those made or to be made, of allowed resources only.
select b.batch_id
from (
    (
        select b.batch_id
        from batches b
        where b.workspace_id = %(workspace_id)s
            and b.environment_id = %(environment_id)s
            and (%(after)s::uuid is null or b.batch_id < %(after)s::uuid)
            and (%(resource_ids)s::uuid[] is null or not exists (
                select from flows f
                where f.workspace_id = b.workspace_id
                    and f.batch_id = b.batch_id
                    and f.resource_id <> all (%(resource_ids)s::uuid[])
            ))
        order by b.batch_id desc
        limit %(most)s
    )
    union all
    (
        select s.batch_id
        from submissions s
        where s.workspace_id = %(workspace_id)s
            and s.environment_id = %(environment_id)s
            and s.status <> 'accepted'
            and (%(after)s::uuid is null or s.batch_id < %(after)s::uuid)
            and (%(resource_ids)s::uuid[] is null or s.created_by_api_key_id = %(api_key_id)s)
        order by s.batch_id desc
        limit %(most)s
    )
) b
order by b.batch_id desc
limit %(most)s;

-- name: submitted_some
-- Batches as OpenAI's routes show them, newest first: a submission, a batch, or both.
select g.batch_id, coalesce(s.status::text, 'accepted') as submission, b.status::text as status,
    coalesce(b.endpoint, s.endpoint) as endpoint, s.input_file_id, s.completion_window, s.model, s.errors,
    coalesce(b.name, s.name) as name, coalesce(b.metadata, s.metadata) as metadata,
    coalesce(b.priority, s.priority)::int as priority, coalesce(b.weight, s.weight)::double precision as weight,
    coalesce(s.created_at, b.created_at) as created_at, coalesce(b.expires_at, s.expires_at) as expires_at,
    s.decided_at, s.created_by_api_key_id, b.created_at as begun_at, b.expired_at, b.cancelled_at, b.completed_at,
    coalesce(b.redrives, 0) as redrives, coalesce(b.total_items, 0) as total_items, f.pending, f.running,
    f.completed, f.failed, f.cancelled, f.unmarked, f.input_tokens, f.output_tokens, f.cached_tokens,
    f.reasoning_tokens, f.is_paused,
    case when b.batch_id is null then s.max_tokens else b.max_tokens end as max_tokens,
    case when b.batch_id is null then s.max_cost_nano else b.max_cost_nano end as max_cost_nano,
    f.cost_nano, coalesce(b.currency, f.currency) as currency, b.pause_reason, f.resource_ids, clock() as now
from unnest(%(batch_ids)s::uuid[]) as g (batch_id)
left join submissions s on s.workspace_id = %(workspace_id)s
    and s.environment_id = %(environment_id)s
    and s.batch_id = g.batch_id
left join batches b on b.workspace_id = %(workspace_id)s
    and b.environment_id = %(environment_id)s
    and b.batch_id = g.batch_id
cross join lateral (
    select coalesce(sum(f.pending), 0)::int as pending, coalesce(sum(f.running), 0)::int as running,
        coalesce(sum(f.completed), 0)::int as completed, coalesce(sum(f.failed), 0)::int as failed,
        coalesce(sum(f.cancelled), 0)::int as cancelled, coalesce(sum(f.unmarked), 0)::int as unmarked,
        coalesce(sum(f.input_tokens), 0)::bigint as input_tokens,
        coalesce(sum(f.output_tokens), 0)::bigint as output_tokens,
        coalesce(sum(f.cached_tokens), 0)::bigint as cached_tokens,
        coalesce(sum(f.reasoning_tokens), 0)::bigint as reasoning_tokens,
        coalesce(bool_and(f.is_paused), false) as is_paused,
        coalesce(sum(f.cost_nano), 0)::bigint as cost_nano,
        case when count(distinct f.currency) = 1 then max(f.currency) end as currency,
        coalesce(array_agg(f.resource_id), '{}') as resource_ids
    from flows f
    where f.workspace_id = b.workspace_id and f.batch_id = b.batch_id
) f
where s.batch_id is not null or b.batch_id is not null
order by g.batch_id desc;
