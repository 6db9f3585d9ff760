-- Use of every limit, minute by minute, from the ledger (kept for SLUICE_LEDGER_KEEP_HOURS).
create or replace view report.capacity_per_minute with (security_barrier) as
select w.workspace_id,
    w.name as workspace_name,
    m.limit_id,
    s.kind::text as scope_kind,
    l.scope_id,
    coalesce(c.name, r.name, k.name, b.name) as scope_name,
    l.period::text as period,
    l.source::text as source,
    m.minute_at,
    m.requests as used_requests,
    m.input_tokens as used_input_tokens,
    m.output_tokens as used_output_tokens,
    coalesce(v.requests, 0) as reserved_requests,
    coalesce(v.tokens, 0) as reserved_tokens,
    m.outside_requests,
    m.refused as refused_requests,
    l.requests as limit_requests,
    l.tokens as limit_tokens,
    l.input_tokens as limit_input_tokens,
    l.output_tokens as limit_output_tokens,
    round(m.requests::numeric / l.requests, 4) as requests_share,
    round((m.input_tokens + m.output_tokens)::numeric / l.tokens, 4) as tokens_share,
    m.at_limit_s,
    m.cost_nano / 1e9 as used_cost,
    l.cost_nano / 1e9 as limit_cost,
    round(m.cost_nano::numeric / l.cost_nano, 4) as cost_share
from report_tenants w
join limits l on l.workspace_id = w.workspace_id
join limit_scopes s on s.workspace_id = l.workspace_id and s.scope_id = l.scope_id
left join connections c on c.workspace_id = l.workspace_id and c.connection_id = l.scope_id
left join resources r on r.workspace_id = l.workspace_id
    and (r.resource_id = l.scope_id or r.model_scope_id = l.scope_id)
    and r.resource_id = (
        select o.resource_id from resources o
        where o.workspace_id = l.workspace_id and l.scope_id in (o.resource_id, o.model_scope_id)
        order by o.resource_id
        limit 1
    )
left join api_keys k on k.workspace_id = l.workspace_id and k.api_key_id = l.scope_id
left join batches b on b.workspace_id = l.workspace_id and b.batch_id = l.scope_id
cross join lateral (
    select g.limit_id, date_trunc('minute', g.slot_at, 'UTC') as minute_at, sum(g.requests)::bigint as requests,
        sum(g.input_tokens)::bigint as input_tokens, sum(g.output_tokens)::bigint as output_tokens,
        case when l.cost_nano is not null then sum(g.cost_nano) end as cost_nano,
        sum(g.outside_requests)::bigint as outside_requests, sum(g.refused)::bigint as refused,
        case when l.period = 'minute' and l.sliding then count(*) filter (where g.share >= 0.97) * 0.25 end as at_limit_s
    from (
        select g.*, greatest(
                sum(g.requests) over past / l.requests,
                sum(g.input_tokens + g.output_tokens) over past / l.tokens,
                sum(g.input_tokens) over past / l.input_tokens,
                sum(g.output_tokens) over past / l.output_tokens) as share
        from ledger g
        where g.workspace_id = l.workspace_id and g.limit_id = l.limit_id
        window past as (order by g.slot_at range between interval '60 seconds' preceding and current row)
    ) g
    group by g.limit_id, date_trunc('minute', g.slot_at, 'UTC')
) m
left join (
    select i.workspace_id, x.limit_id, date_trunc('minute', i.claimed_at, 'UTC') as minute_at, count(*) as requests,
        sum(i.reserved_input_tokens + i.reserved_output_tokens)::bigint as tokens
    from items i
    cross join unnest(i.reserved_limits) as x (limit_id)
    where i.status = 'running'
    group by i.workspace_id, x.limit_id, date_trunc('minute', i.claimed_at, 'UTC')
) v on v.workspace_id = l.workspace_id and v.limit_id = l.limit_id and v.minute_at = m.minute_at;

comment on view report.capacity_per_minute is
    'Capacity: what of each limit was claimed in each minute. Of limits longer than an hour the slot is the whole calendar period.';
comment on column report.capacity_per_minute.workspace_id is 'The tenant.';
comment on column report.capacity_per_minute.workspace_name is 'The tenants name.';
comment on column report.capacity_per_minute.limit_id is 'The limit.';
comment on column report.capacity_per_minute.scope_kind is 'connection, model, resource, api_key, batch or value.';
comment on column report.capacity_per_minute.scope_id is 'What the limit is set on.';
comment on column report.capacity_per_minute.scope_name is 'Its name, if it has one.';
comment on column report.capacity_per_minute.period is 'minute, hour, day, week, month or lifetime.';
comment on column report.capacity_per_minute.source is 'given by people, or observed at the provider.';
comment on column report.capacity_per_minute.minute_at is 'When the minute, or the slot, began.';
comment on column report.capacity_per_minute.used_requests is 'Calls claimed.';
comment on column report.capacity_per_minute.used_input_tokens is 'Input tokens: true where known, else reserved.';
comment on column report.capacity_per_minute.used_output_tokens is 'Output tokens: true where known, else reserved.';
comment on column report.capacity_per_minute.reserved_requests is 'Those of the calls that are still out.';
comment on column report.capacity_per_minute.reserved_tokens is 'What those have reserved of the tokens.';
comment on column report.capacity_per_minute.outside_requests is 'Calls that the provider counted beyond ours.';
comment on column report.capacity_per_minute.refused_requests is 'Calls that the provider refused for their number.';
comment on column report.capacity_per_minute.limit_requests is 'The limit of requests per period.';
comment on column report.capacity_per_minute.limit_tokens is 'The limit of tokens per period.';
comment on column report.capacity_per_minute.limit_input_tokens is 'The limit of input tokens per period.';
comment on column report.capacity_per_minute.limit_output_tokens is 'The limit of output tokens per period.';
comment on column report.capacity_per_minute.requests_share is 'Share of the limit of requests.';
comment on column report.capacity_per_minute.tokens_share is 'Share of the limit of tokens.';
comment on column report.capacity_per_minute.at_limit_s is 'Seconds in which the last sixty had used 97 % of a limit per minute or more: it held work up. Null: another period.';
comment on column report.capacity_per_minute.used_cost is
    'Money claimed, of a limit of money, in the currency of its batch; what a call may cost until it is settled.';
comment on column report.capacity_per_minute.limit_cost is 'The limit of money: what the batch may cost.';
comment on column report.capacity_per_minute.cost_share is 'Share of it, of 1.';
