-- Percentiles of time in the queue and at the provider, apart, by hour and resource, from the rollup.
create or replace view report.latency_per_hour with (security_barrier) as
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
    l.total as answered,
    l.p50 as latency_p50_ms,
    l.p90 as latency_p90_ms,
    l.p95 as latency_p95_ms,
    l.p99 as latency_p99_ms,
    q.p50 as queue_wait_p50_ms,
    q.p90 as queue_wait_p90_ms,
    q.p95 as queue_wait_p95_ms,
    q.p99 as queue_wait_p99_ms,
    q.total as first_answers
from report_tenants w
join rollup_latency_hours m on m.workspace_id = w.workspace_id
left join resources r on r.workspace_id = m.workspace_id and r.resource_id = m.resource_id
left join environments e on e.workspace_id = r.workspace_id and e.environment_id = r.environment_id
left join connections c on c.workspace_id = r.workspace_id and c.connection_id = r.connection_id
cross join lateral (
    select max(b.total)::bigint as total, round(power(1.1, min(b.bucket) filter (where b.so_far >= 0.5 * b.total)))::bigint as p50,
        round(power(1.1, min(b.bucket) filter (where b.so_far >= 0.9 * b.total)))::bigint as p90,
        round(power(1.1, min(b.bucket) filter (where b.so_far >= 0.95 * b.total)))::bigint as p95,
        round(power(1.1, min(b.bucket) filter (where b.so_far >= 0.99 * b.total)))::bigint as p99
    from (
        select x.key::int as bucket, sum(x.value::bigint) over (order by x.key::int) as so_far,
            sum(x.value::bigint) over () as total
        from jsonb_each_text(m.latency_buckets) x
    ) b
) l
cross join lateral (
    select max(b.total)::bigint as total, round(power(1.1, min(b.bucket) filter (where b.so_far >= 0.5 * b.total)))::bigint as p50,
        round(power(1.1, min(b.bucket) filter (where b.so_far >= 0.9 * b.total)))::bigint as p90,
        round(power(1.1, min(b.bucket) filter (where b.so_far >= 0.95 * b.total)))::bigint as p95,
        round(power(1.1, min(b.bucket) filter (where b.so_far >= 0.99 * b.total)))::bigint as p99
    from (
        select x.key::int as bucket, sum(x.value::bigint) over (order by x.key::int) as so_far,
            sum(x.value::bigint) over () as total
        from jsonb_each_text(m.wait_buckets) x
    ) b
) q;

comment on view report.latency_per_hour is
    'Latency percentiles per hour and resource, of answered calls: the provider''s time, and the time in the queue of first attempts. Outlives attempts.';
comment on column report.latency_per_hour.workspace_id is 'The tenant.';
comment on column report.latency_per_hour.workspace_name is 'The tenants name.';
comment on column report.latency_per_hour.environment_id is 'The environment.';
comment on column report.latency_per_hour.environment_name is 'The environments name.';
comment on column report.latency_per_hour.resource_id is 'The resource called.';
comment on column report.latency_per_hour.resource_name is 'The resources name; null: it was removed.';
comment on column report.latency_per_hour.model is 'The model that the resource names.';
comment on column report.latency_per_hour.connection_id is 'The account at the provider.';
comment on column report.latency_per_hour.connection_name is 'The accounts name.';
comment on column report.latency_per_hour.hour_at is 'When the hour began.';
comment on column report.latency_per_hour.answered is 'Answers with a measured time.';
comment on column report.latency_per_hour.latency_p50_ms is '50 of 100 answers had at most the providers time; at most a tenth too high.';
comment on column report.latency_per_hour.latency_p90_ms is '90 of 100 answers had at most the providers time; at most a tenth too high.';
comment on column report.latency_per_hour.latency_p95_ms is '95 of 100 answers had at most the providers time; at most a tenth too high.';
comment on column report.latency_per_hour.latency_p99_ms is '99 of 100 answers had at most the providers time; at most a tenth too high.';
comment on column report.latency_per_hour.queue_wait_p50_ms is '50 of 100 answers had at most the time in the queue; at most a tenth too high.';
comment on column report.latency_per_hour.queue_wait_p90_ms is '90 of 100 answers had at most the time in the queue; at most a tenth too high.';
comment on column report.latency_per_hour.queue_wait_p95_ms is '95 of 100 answers had at most the time in the queue; at most a tenth too high.';
comment on column report.latency_per_hour.queue_wait_p99_ms is '99 of 100 answers had at most the time in the queue; at most a tenth too high.';
comment on column report.latency_per_hour.first_answers is 'Answers to first attempts.';
