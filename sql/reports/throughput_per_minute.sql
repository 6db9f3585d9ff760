-- Calls, tokens and cost by minute and resource, from the rollup.
create or replace view report.throughput_per_minute with (security_barrier) as
select w.workspace_id,
    w.name as workspace_name,
    e.environment_id,
    e.name as environment_name,
    m.resource_id,
    r.name as resource_name,
    r.model,
    c.connection_id,
    c.name as connection_name,
    m.minute_at,
    m.calls,
    m.answered,
    m.rejected,
    m.throttled,
    m.unreachable,
    m.lost,
    m.retries,
    m.input_tokens,
    m.cached_tokens,
    m.output_tokens,
    m.input_tokens + m.output_tokens as tokens,
    case when m.currencies = 1 then m.cost_nano / 1e9 end as cost,
    case when m.currencies = 1 then m.currency end as currency
from report_tenants w
cross join lateral (
    select m.workspace_id, m.resource_id, m.minute_at, sum(m.calls)::bigint as calls,
        coalesce(sum(m.calls) filter (where m.outcome = 'answered'), 0)::bigint as answered,
        coalesce(sum(m.calls) filter (where m.outcome = 'rejected'), 0)::bigint as rejected,
        coalesce(sum(m.calls) filter (where m.outcome = 'throttled'), 0)::bigint as throttled,
        coalesce(sum(m.calls) filter (where m.outcome = 'unreachable'), 0)::bigint as unreachable,
        coalesce(sum(m.calls) filter (where m.outcome = 'lost'), 0)::bigint as lost,
        sum(m.retries)::bigint as retries, sum(m.input_tokens)::bigint as input_tokens,
        sum(m.cached_tokens)::bigint as cached_tokens, sum(m.output_tokens)::bigint as output_tokens,
        sum(m.cost_nano) as cost_nano, max(nullif(m.currency, '')) as currency,
        count(distinct nullif(m.currency, '')) as currencies
    from rollup_minutes m
    where m.workspace_id = w.workspace_id
    group by m.workspace_id, m.minute_at, m.resource_id
) m
left join resources r on r.workspace_id = m.workspace_id and r.resource_id = m.resource_id
left join environments e on e.workspace_id = r.workspace_id and e.environment_id = r.environment_id
left join connections c on c.workspace_id = r.workspace_id and c.connection_id = r.connection_id;

comment on view report.throughput_per_minute is
    'Throughput per minute and resource. At most a minute or two behind (report.rollup_state); kept for SLUICE_RETENTION_MINUTES_DAYS.';
comment on column report.throughput_per_minute.workspace_id is 'The tenant.';
comment on column report.throughput_per_minute.workspace_name is 'The tenants name.';
comment on column report.throughput_per_minute.environment_id is 'The environment.';
comment on column report.throughput_per_minute.environment_name is 'The environments name.';
comment on column report.throughput_per_minute.resource_id is 'The resource called.';
comment on column report.throughput_per_minute.resource_name is 'The resources name; null: it was removed.';
comment on column report.throughput_per_minute.model is 'The model that the resource names.';
comment on column report.throughput_per_minute.connection_id is 'The account at the provider.';
comment on column report.throughput_per_minute.connection_name is 'The accounts name.';
comment on column report.throughput_per_minute.minute_at is 'When the minute began.';
comment on column report.throughput_per_minute.calls is 'Provider calls that ended.';
comment on column report.throughput_per_minute.answered is 'Those answered.';
comment on column report.throughput_per_minute.rejected is 'Those refused for what they asked.';
comment on column report.throughput_per_minute.throttled is 'Those refused for their number (429).';
comment on column report.throughput_per_minute.unreachable is 'Those that failed otherwise and may be retried.';
comment on column report.throughput_per_minute.lost is 'Those whose worker vanished.';
comment on column report.throughput_per_minute.retries is 'Those that were not their items first.';
comment on column report.throughput_per_minute.input_tokens is 'Input tokens of answers.';
comment on column report.throughput_per_minute.cached_tokens is 'Those of them that the provider had cached.';
comment on column report.throughput_per_minute.output_tokens is 'Output tokens of answers.';
comment on column report.throughput_per_minute.tokens is 'Both together.';
comment on column report.throughput_per_minute.cost is 'What they cost; null: no price was known, or in several currencies.';
comment on column report.throughput_per_minute.currency is 'Currency of the cost.';
