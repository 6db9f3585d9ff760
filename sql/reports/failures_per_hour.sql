-- Calls that were not answered, by hour, resource and class, from the rollup.
create or replace view report.failures_per_hour with (security_barrier) as
select w.workspace_id,
    w.name as workspace_name,
    e.environment_id,
    e.name as environment_name,
    m.resource_id,
    r.name as resource_name,
    r.model,
    c.connection_id,
    c.name as connection_name,
    m.hour_at,
    m.outcome::text as outcome,
    m.error_code,
    sum(m.calls)::bigint as calls
from report_tenants w
join rollup_hours m on m.workspace_id = w.workspace_id and m.outcome <> 'answered'
left join resources r on r.workspace_id = m.workspace_id and r.resource_id = m.resource_id
left join environments e on e.workspace_id = r.workspace_id and e.environment_id = r.environment_id
left join connections c on c.workspace_id = r.workspace_id and c.connection_id = r.connection_id
group by w.workspace_id, w.name, e.environment_id, e.name, m.resource_id, r.name, r.model, c.connection_id, c.name,
    m.hour_at, m.outcome, m.error_code;

comment on view report.failures_per_hour is
    'Failed calls per hour, resource and class: outlives attempts.';
comment on column report.failures_per_hour.workspace_id is 'The tenant.';
comment on column report.failures_per_hour.workspace_name is 'The tenants name.';
comment on column report.failures_per_hour.environment_id is 'The environment.';
comment on column report.failures_per_hour.environment_name is 'The environments name.';
comment on column report.failures_per_hour.resource_id is 'The resource called.';
comment on column report.failures_per_hour.resource_name is 'The resources name; null: it was removed.';
comment on column report.failures_per_hour.model is 'The model that the resource names.';
comment on column report.failures_per_hour.connection_id is 'The account at the provider.';
comment on column report.failures_per_hour.connection_name is 'The accounts name.';
comment on column report.failures_per_hour.hour_at is 'When the hour began.';
comment on column report.failures_per_hour.outcome is 'rejected, throttled, unreachable, lost or unsent.';
comment on column report.failures_per_hour.error_code is 'Class of the failure.';
comment on column report.failures_per_hour.calls is 'How many calls.';
