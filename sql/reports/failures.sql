-- Failures by class: how often, since when, an example, and what of it is still open (the dead letters).
create or replace view report.failures with (security_barrier) as
select w.workspace_id,
    w.name as workspace_name,
    e.environment_id,
    e.name as environment_name,
    m.resource_id,
    r.name as resource_name,
    r.model,
    c.connection_id,
    c.name as connection_name,
    m.error_code,
    m.outcome,
    m.status_code,
    m.calls,
    m.open_items,
    m.first_seen_at,
    m.last_seen_at,
    m.sample_message
from report_tenants w
cross join lateral (
    select s.workspace_id, s.resource_id, s.error_code, max(s.outcome) as outcome,
        (array_agg(s.status_code order by s.last_seen_at desc))[1] as status_code, sum(s.calls)::bigint as calls,
        sum(s.open_items)::bigint as open_items, min(s.first_seen_at) as first_seen_at,
        max(s.last_seen_at) as last_seen_at,
        (array_agg(s.sample_message order by s.last_seen_at desc))[1] as sample_message
    from (
        select a.workspace_id, a.resource_id, a.error_code, a.outcome::text as outcome,
            max(a.status_code) as status_code, count(*) as calls, 0 as open_items, min(a.ended_at) as first_seen_at,
            max(a.ended_at) as last_seen_at, max(a.error_message) as sample_message
        from attempts a
        where a.workspace_id = w.workspace_id and a.outcome <> 'answered'
        group by a.workspace_id, a.resource_id, a.error_code, a.outcome
        union all
        select i.workspace_id, i.resource_id, t.error_code, null, max(t.status_code), 0, count(*),
            min(i.ended_at), max(i.ended_at), max(t.error_message)
        from items i
        join item_results t on t.workspace_id = i.workspace_id
            and t.batch_day = i.batch_day
            and t.batch_id = i.batch_id
            and t.seq = i.seq
        where i.workspace_id = w.workspace_id and i.status = 'failed'
        group by i.workspace_id, i.resource_id, t.error_code
    ) s
    group by s.workspace_id, s.resource_id, s.error_code
) m
left join resources r on r.workspace_id = m.workspace_id and r.resource_id = m.resource_id
left join environments e on e.workspace_id = r.workspace_id and e.environment_id = r.environment_id
left join connections c on c.workspace_id = r.workspace_id and c.connection_id = r.connection_id;

comment on view report.failures is
    'Failures by resource and class, of calls and of items. open_items are the dead letters: failed, and not put back.';
comment on column report.failures.workspace_id is 'The tenant.';
comment on column report.failures.workspace_name is 'The tenants name.';
comment on column report.failures.environment_id is 'The environment.';
comment on column report.failures.environment_name is 'The environments name.';
comment on column report.failures.resource_id is 'The resource called.';
comment on column report.failures.resource_name is 'The resources name; null: it was removed.';
comment on column report.failures.model is 'The model that the resource names.';
comment on column report.failures.connection_id is 'The account at the provider.';
comment on column report.failures.connection_name is 'The accounts name.';
comment on column report.failures.error_code is 'Class of the failure.';
comment on column report.failures.outcome is 'How calls of this class ended; null: items of it had no call.';
comment on column report.failures.status_code is 'The providers HTTP status, of the latest.';
comment on column report.failures.calls is 'Calls that ended so.';
comment on column report.failures.open_items is 'Items that ended so and were not put back.';
comment on column report.failures.first_seen_at is 'When it was first seen.';
comment on column report.failures.last_seen_at is 'When it was last seen.';
comment on column report.failures.sample_message is 'What it says for people, of the latest.';
