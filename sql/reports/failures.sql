-- Failures by class: how often, since when, an example, and what of it is still open (the dead letters).
--
-- Calls are counted by the rollup of hours, so that a million failed calls cost no more than a few; the first and
-- the latest are looked up in the hours that it names, by the index of failed calls. When retention has
-- taken those calls away, the hour itself is what is left of them.
-- Dead letters are counted one by one, from two indexes of what failed (items_failed, item_results_failed). Results are
-- probed by key, because a join of partitioned tables is planned as if every probe looked into all days, and would
-- rather read every answer there is.
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
    select s.resource_id, s.error_code, max(s.outcome) as outcome,
        (array_agg(s.status_code order by s.last_seen_at desc))[1] as status_code, sum(s.calls)::bigint as calls,
        sum(s.open_items)::bigint as open_items, min(s.first_seen_at) as first_seen_at,
        max(s.last_seen_at) as last_seen_at,
        (array_agg(s.sample_message order by s.last_seen_at desc))[1] as sample_message
    from (
        select h.resource_id, nullif(h.error_code, '') as error_code, h.outcome::text as outcome, z.status_code,
            h.calls, 0 as open_items, coalesce(a.ended_at, h.first_at) as first_seen_at,
            coalesce(z.ended_at, h.last_at) as last_seen_at, z.error_message as sample_message
        from (
            select o.resource_id, o.error_code, o.outcome, sum(o.calls) as calls, min(o.hour_at) as first_at,
                max(o.hour_at) as last_at
            from rollup_hours o
            where o.workspace_id = w.workspace_id and o.outcome <> 'answered'
            group by o.resource_id, o.error_code, o.outcome
        ) h
        left join lateral (
            select a.ended_at
            from attempts a
            where a.workspace_id = w.workspace_id
                and a.resource_id = h.resource_id
                and a.outcome <> 'answered'
                and a.outcome = h.outcome
                and coalesce(a.error_code, '') = h.error_code
                and a.ended_at >= h.first_at
                and a.ended_at < h.first_at + interval '1 hour'
            order by a.ended_at
            limit 1
        ) a on true
        left join lateral (
            select z.ended_at, z.status_code, z.error_message
            from attempts z
            where z.workspace_id = w.workspace_id
                and z.resource_id = h.resource_id
                and z.outcome <> 'answered'
                and z.outcome = h.outcome
                and coalesce(z.error_code, '') = h.error_code
                and z.ended_at >= h.last_at
                and z.ended_at < h.last_at + interval '1 hour'
            order by z.ended_at desc
            limit 1
        ) z on true
        union all
        select d.resource_id, d.error_code, null, d.status_code, 0, d.open_items, d.first_at, d.last_at, x.error_message
        from (
            select i.resource_id, t.error_code, max(t.status_code) as status_code, count(*) as open_items,
                min(i.ended_at) as first_at, max(i.ended_at) as last_at
            from items i
            cross join lateral (
                select t.error_code, t.status_code
                from item_results t
                where t.workspace_id = i.workspace_id
                    and t.batch_day = i.batch_day
                    and t.batch_id = i.batch_id
                    and t.seq = i.seq
                    and t.error_code is not null
                limit 1
            ) t
            where i.workspace_id = w.workspace_id and i.status = 'failed'
            group by i.resource_id, t.error_code
        ) d
        left join lateral (
            select t.error_message
            from items i
            join item_results t on t.workspace_id = i.workspace_id
                and t.batch_day = i.batch_day
                and t.batch_id = i.batch_id
                and t.seq = i.seq
            where i.workspace_id = w.workspace_id
                and i.resource_id = d.resource_id
                and i.status = 'failed'
                and i.ended_at = d.last_at
                and t.error_code = d.error_code
            limit 1
        ) x on true
    ) s
    group by s.resource_id, s.error_code
) m
left join resources r on r.workspace_id = w.workspace_id and r.resource_id = m.resource_id
left join environments e on e.workspace_id = r.workspace_id and e.environment_id = r.environment_id
left join connections c on c.workspace_id = r.workspace_id and c.connection_id = r.connection_id;

comment on view report.failures is
    'Failures by resource and class, of calls as of the rollup (report.rollup_state) and of items as of now. open_items are the dead letters: failed, and not put back.';
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
comment on column report.failures.first_seen_at is 'When it was first seen; the hour, if that call is not kept any more.';
comment on column report.failures.last_seen_at is 'When it was last seen; likewise.';
comment on column report.failures.sample_message is 'What it says for people, of the latest.';
