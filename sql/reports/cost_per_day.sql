-- What was spent by UTC day and resource, from the rollup.
create or replace view report.cost_per_day with (security_barrier) as
select w.workspace_id,
    w.name as workspace_name,
    e.environment_id,
    e.name as environment_name,
    m.resource_id,
    r.name as resource_name,
    r.model,
    c.connection_id,
    c.name as connection_name,
    (m.hour_at at time zone 'UTC')::date as day_on,
    sum(m.calls)::bigint as calls,
    coalesce(sum(m.calls) filter (where m.outcome = 'answered'), 0)::bigint as answered,
    sum(m.input_tokens)::bigint as input_tokens,
    sum(m.cached_tokens)::bigint as cached_tokens,
    sum(m.output_tokens)::bigint as output_tokens,
    case when m.currency <> '' then sum(m.cost_nano) / 1e9 end as cost,
    nullif(m.currency, '') as currency
from report_tenants w
join rollup_hours m on m.workspace_id = w.workspace_id
left join resources r on r.workspace_id = m.workspace_id and r.resource_id = m.resource_id
left join environments e on e.workspace_id = r.workspace_id and e.environment_id = r.environment_id
left join connections c on c.workspace_id = r.workspace_id and c.connection_id = r.connection_id
group by w.workspace_id, w.name, e.environment_id, e.name, m.resource_id, r.name, r.model, c.connection_id, c.name,
    (m.hour_at at time zone 'UTC')::date, m.currency;

comment on view report.cost_per_day is
    'Calls, tokens and cost per UTC day, resource and currency: outlives attempts.';
comment on column report.cost_per_day.workspace_id is 'The tenant.';
comment on column report.cost_per_day.workspace_name is 'The tenants name.';
comment on column report.cost_per_day.environment_id is 'The environment.';
comment on column report.cost_per_day.environment_name is 'The environments name.';
comment on column report.cost_per_day.resource_id is 'The resource called.';
comment on column report.cost_per_day.resource_name is 'The resources name; null: it was removed.';
comment on column report.cost_per_day.model is 'The model that the resource names.';
comment on column report.cost_per_day.connection_id is 'The account at the provider.';
comment on column report.cost_per_day.connection_name is 'The accounts name.';
comment on column report.cost_per_day.day_on is 'The day of the UTC calendar.';
comment on column report.cost_per_day.calls is 'Provider calls that ended.';
comment on column report.cost_per_day.answered is 'Those answered.';
comment on column report.cost_per_day.input_tokens is 'Input tokens of answers.';
comment on column report.cost_per_day.cached_tokens is 'Those of them that the provider had cached.';
comment on column report.cost_per_day.output_tokens is 'Output tokens of answers.';
comment on column report.cost_per_day.cost is 'What they cost; null: no price was known.';
comment on column report.cost_per_day.currency is 'Currency of the cost; null: no price was known, or lost calls.';
