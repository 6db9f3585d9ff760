-- Usage and audit, straight from the attempts. Every statement is bounded by time (a BRIN index finds the blocks)
-- and runs under a time limit. A call belongs to the moment when it ended. What was never sent is no call.

-- name: usage_cells
-- Aggregates of calls per stretch of time, per values of the dimensions asked for, per metric. Metrics, dimensions
-- and operators are words compared with those written here; no text of a caller's becomes SQL.
with calls as materialized (
    select case when %(granularity)s::text is null then %(start)s::timestamptz
            else usage_time(a.ended_at, %(granularity)s::text, %(zone)s::text) end as time,
        a.outcome, a.charged_input_tokens, a.charged_output_tokens, a.cached_tokens, a.reasoning_tokens, a.latency_ms,
        extract(epoch from a.ended_at - a.claimed_at) * 1000 as request_ms,
        extract(epoch from a.started_at - a.claimed_at) * 1000 as gate_ms,
        d.dims
    from attempts a
    join batches b on b.workspace_id = a.workspace_id and b.batch_id = a.batch_id
    left join connections k on k.workspace_id = a.workspace_id and k.connection_id = a.connection_id
    left join lateral (
        select q.vmx
        from item_requests q
        where %(reads_requests)s::boolean
            and q.workspace_id = a.workspace_id
            and q.batch_day = a.batch_day
            and q.batch_id = a.batch_id
            and q.seq = a.seq
        limit 1
    ) q on true
    cross join lateral (
        select coalesce(jsonb_object_agg(w.dim, case w.dim
            when 'workspaceId' then a.workspace_id::text
            when 'environmentId' then b.environment_id::text
            when 'connectionId' then a.connection_id::text
            when 'resourceId' then a.resource_id::text
            when 'batchId' then a.batch_id::text
            when 'apiKeyId' then b.created_by_api_key_id::text
            when 'provider' then k.provider
            when 'model' then a.model
            when 'requestId' then a.provider_request_id
            when 'messageId' then item_id(a.batch_id, a.seq)::text
            when 'failureReason' then a.error_code
            when 'statusCode' then a.status_code::text
            when 'correlationId' then coalesce(q.vmx ->> 'correlationId', a.batch_id::text)
            when 'sourceIp' then b.source_ip
            when 'userId' then null
            else coalesce(q.vmx -> 'metadata' ->> substr(w.dim, 10), b.metadata ->> substr(w.dim, 10))
        end), '{}') as dims
        from unnest(%(dims)s::text[] || %(filter_dims)s::text[]) as w (dim)
    ) d
    where a.workspace_id = %(workspace_id)s
        and b.environment_id = %(environment_id)s
        and a.ended_at >= %(start)s::timestamptz
        and a.ended_at < %(until)s::timestamptz
        and a.batch_day <= (%(until)s::timestamptz at time zone 'UTC')::date
        and a.outcome not in ('unsent', 'impossible')
        and (%(allowed)s::uuid[] is null or a.resource_id = any (%(allowed)s::uuid[]))
),
kept as (
    select c.*, (
            select coalesce(jsonb_object_agg(w.dim, c.dims -> w.dim), '{}') from unnest(%(dims)s::text[]) as w (dim)
        ) as key
    from calls c
    where not exists (
        select from jsonb_to_recordset(%(filters)s::jsonb) as f (dim text, operator text, wanted text[])
        where usage_fits(c.dims ->> f.dim, f.operator, f.wanted) is not true
    )
)
select c.time, c.key, m.metric, sum(m.value)::double precision as sum, avg(m.value)::double precision as avg,
    min(m.value)::double precision as min, max(m.value)::double precision as max,
    percentile_cont(0.9) within group (order by m.value::double precision)
        filter (where %(percentiles)s::boolean) as p90,
    percentile_cont(0.95) within group (order by m.value::double precision)
        filter (where %(percentiles)s::boolean) as p95,
    percentile_cont(0.99) within group (order by m.value::double precision)
        filter (where %(percentiles)s::boolean) as p99
from kept c
cross join lateral (
    values ('requestCount', 1::numeric),
        ('successCount', (c.outcome = 'answered')::int),
        ('errorCount', (c.outcome <> 'answered')::int),
        ('promptTokens', case when c.outcome = 'answered' then c.charged_input_tokens else 0 end),
        ('outputTokens', case when c.outcome = 'answered' then c.charged_output_tokens else 0 end),
        ('totalTokens',
            case when c.outcome = 'answered' then c.charged_input_tokens + c.charged_output_tokens else 0 end),
        ('cachedTokens', coalesce(c.cached_tokens, 0)),
        ('reasoningTokens', coalesce(c.reasoning_tokens, 0)),
        ('tokensPerSecond', case when c.outcome = 'answered' then c.charged_output_tokens * 1000.0 / nullif(c.latency_ms, 0) end),
        ('requestDuration', c.request_ms),
        ('providerDuration', c.latency_ms),
        ('gateDuration', c.gate_ms)
) as m (metric, value)
where m.metric = any (%(metrics)s::text[])
group by c.time, c.key, m.metric
order by c.time, c.key, m.metric
limit %(most)s;

-- name: usage_times
-- The stretches of time of a range. Those of a day and longer follow the zone's own calendar.
select case when %(step)s::text = any ('{day,week,month,year}') then g.local_at at time zone %(zone)s::text
        else g.at end as time
from (
    select null::timestamptz as at, s as local_at
    from generate_series(
        date_trunc(
            -- Looked at for shorter ones too, of which it does not know all.
            case when %(step)s::text like 'second%%' then 'second' else %(step)s::text end,
            %(start)s::timestamptz at time zone %(zone)s::text
        ),
        (%(until)s::timestamptz - interval '1 microsecond') at time zone %(zone)s::text,
        %(every)s::interval
    ) s
    where %(step)s::text = any ('{day,week,month,year}')
    union all
    select s, null
    from generate_series(
        usage_time(%(start)s::timestamptz, %(step)s::text, %(zone)s::text),
        %(until)s::timestamptz - interval '1 microsecond',
        %(every)s::interval
    ) s
    where %(step)s::text <> all ('{day,week,month,year}')
) g
order by 1;

-- name: usage_zone
-- Whether Postgres knows a time zone of this name.
select exists (select from pg_timezone_names where name = %(zone)s::text) as known;

-- name: usage_names
-- What the ids of a result are called.
select n.id, n.name
from (
    select resource_id as id, name from resources where workspace_id = %(workspace_id)s
    union all
    select connection_id, name from connections where workspace_id = %(workspace_id)s
    union all
    select api_key_id, name from api_keys where workspace_id = %(workspace_id)s
    union all
    select environment_id, name from environments where workspace_id = %(workspace_id)s
    union all
    select workspace_id, name from workspaces where workspace_id = %(workspace_id)s
    union all
    select batch_id, name from batches
    where workspace_id = %(workspace_id)s and batch_id = any (%(ids)s::uuid[]) and name is not null
) n
where n.id = any (%(ids)s::uuid[]);

-- name: usage_limit_time
-- Let this transaction's statements run for so long at most.
select set_config('statement_timeout', %(timeout_ms)s::text, true) as until;

-- name: audit_count
-- How many calls fit.
select count(*) as total
from attempts a
join batches b on b.workspace_id = a.workspace_id and b.batch_id = a.batch_id
where a.workspace_id = %(workspace_id)s
    and b.environment_id = %(environment_id)s
    and a.ended_at >= %(start)s::timestamptz
    and a.ended_at < %(until)s::timestamptz
    and a.batch_day <= (%(until)s::timestamptz at time zone 'UTC')::date
    and a.outcome not in ('unsent', 'impossible')
    and (%(allowed)s::uuid[] is null or a.resource_id = any (%(allowed)s::uuid[]))
    and (%(connection_id)s::uuid is null or a.connection_id = %(connection_id)s::uuid)
    and (%(resource_id)s::uuid is null or a.resource_id = %(resource_id)s::uuid)
    and (%(batch_id)s::uuid is null or a.batch_id = %(batch_id)s::uuid)
    and (%(model)s::text is null or a.model = %(model)s::text)
    and (%(status_code)s::int is null or a.status_code = %(status_code)s::int);

-- name: audit_page
-- Calls that fit, the latest first, with what was asked and, of the call that decided its item, what came back.
with found as materialized (
    select a.*, b.environment_id, b.created_by_api_key_id, b.metadata, b.source_ip
    from attempts a
    join batches b on b.workspace_id = a.workspace_id and b.batch_id = a.batch_id
    where a.workspace_id = %(workspace_id)s
        and b.environment_id = %(environment_id)s
        and a.ended_at >= %(start)s::timestamptz
        and a.ended_at < %(until)s::timestamptz
        and a.batch_day <= (%(until)s::timestamptz at time zone 'UTC')::date
        and a.outcome not in ('unsent', 'impossible')
        and (%(allowed)s::uuid[] is null or a.resource_id = any (%(allowed)s::uuid[]))
        and (%(connection_id)s::uuid is null or a.connection_id = %(connection_id)s::uuid)
        and (%(resource_id)s::uuid is null or a.resource_id = %(resource_id)s::uuid)
        and (%(batch_id)s::uuid is null or a.batch_id = %(batch_id)s::uuid)
        and (%(model)s::text is null or a.model = %(model)s::text)
        and (%(status_code)s::int is null or a.status_code = %(status_code)s::int)
    order by a.ended_at desc, a.batch_id desc, a.seq desc, a.attempt desc
    offset %(skipped)s
    limit %(most)s
)
select f.environment_id, f.batch_id, f.seq, f.attempt, f.outcome::text as outcome, f.resource_id, f.connection_id,
    k.provider, f.model, f.created_by_api_key_id as api_key_id, f.source_ip, f.metadata, f.claimed_at, f.started_at,
    f.ended_at, f.latency_ms, f.status_code, f.provider_request_id as request_id, f.error_code, f.error_message,
    case when f.outcome = 'answered' then f.charged_input_tokens else 0 end as input_tokens,
    case when f.outcome = 'answered' then f.charged_output_tokens else 0 end as output_tokens, q.vmx, q.request,
    r.response, r.headers
from found f
left join connections k on k.workspace_id = f.workspace_id and k.connection_id = f.connection_id
left join lateral (
    select q.vmx, q.body::text as request
    from item_requests q
    where q.workspace_id = f.workspace_id
        and q.batch_day = f.batch_day
        and q.batch_id = f.batch_id
        and q.seq = f.seq
    limit 1
) q on true
left join lateral (
    select r.body::text as response, r.headers
    from item_results r
    where r.workspace_id = f.workspace_id
        and r.batch_day = f.batch_day
        and r.batch_id = f.batch_id
        and r.seq = f.seq
        and r.attempt = f.attempt
    limit 1
) r on true
order by f.ended_at desc, f.batch_id desc, f.seq desc, f.attempt desc;

-- name: metadata_keys
-- The fields of metadata that batches of a time have.
select distinct m.key
from batches b
cross join lateral jsonb_object_keys(b.metadata) as m (key)
where b.workspace_id = %(workspace_id)s
    and b.environment_id = %(environment_id)s
    and b.created_at >= %(start)s::timestamptz
    and b.created_at < %(until)s::timestamptz
    and (%(allowed)s::uuid[] is null or not exists (
        select from flows f
        where f.workspace_id = b.workspace_id
            and f.batch_id = b.batch_id
            and f.resource_id <> all (%(allowed)s::uuid[])
    ))
order by m.key
limit 1000;

-- name: metadata_values
-- The values that one field of it has there.
select distinct b.metadata ->> %(key)s::text as value
from batches b
where b.workspace_id = %(workspace_id)s
    and b.environment_id = %(environment_id)s
    and b.created_at >= %(start)s::timestamptz
    and b.created_at < %(until)s::timestamptz
    and b.metadata ->> %(key)s::text is not null
    and (%(allowed)s::uuid[] is null or not exists (
        select from flows f
        where f.workspace_id = b.workspace_id
            and f.batch_id = b.batch_id
            and f.resource_id <> all (%(allowed)s::uuid[])
    ))
order by 1
limit 1000;

-- name: error_rate
-- Calls of a resource in the last minutes, and those that failed (with a certain status, if asked).
select count(*) as requests,
    count(*) filter (where a.outcome = 'answered') as succeeded,
    count(*) filter (
        where a.outcome <> 'answered' and (%(status_code)s::int is null or a.status_code = %(status_code)s::int)
    ) as failed
from attempts a
join batches b on b.workspace_id = a.workspace_id and b.batch_id = a.batch_id
where a.workspace_id = %(workspace_id)s
    and b.environment_id = %(environment_id)s
    and a.resource_id = %(resource_id)s
    and a.ended_at >= clock() - make_interval(mins => %(minutes)s)
    and a.outcome not in ('unsent', 'impossible')
    and (%(connection_id)s::uuid is null or a.connection_id = %(connection_id)s::uuid)
    and (%(model)s::text is null or a.model = %(model)s::text);
