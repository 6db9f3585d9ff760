-- What waits now: depth and oldest age by resource and priority.
create or replace view report.queue with (security_barrier) as
select w.workspace_id,
    w.name as workspace_name,
    e.environment_id,
    e.name as environment_name,
    m.resource_id,
    r.name as resource_name,
    r.model,
    c.connection_id,
    c.name as connection_name,
    m.priority,
    m.batches as open_batches,
    m.pending as pending_items,
    m.unstarted as unstarted_items,
    m.running as running_items,
    m.paused as paused_items,
    m.oldest_at,
    round(extract(epoch from clock() - m.oldest_at), 3) as oldest_age_s,
    case when y.next_at > clock() and y.next_at < 'infinity' then y.next_at end as next_look_at,
    y.reason::text as waits_for
from report_tenants w
cross join lateral (
    select f.workspace_id, f.resource_id, f.priority, count(*) as batches, sum(f.pending)::bigint as pending,
        sum(f.unstarted)::bigint as unstarted, sum(f.running)::bigint as running,
        coalesce(sum(f.pending) filter (where f.is_paused), 0)::bigint as paused,
        min(f.created_at) filter (where f.pending > 0) as oldest_at
    from flows f
    where f.workspace_id = w.workspace_id and f.is_open and not f.is_cancelled
    group by f.workspace_id, f.resource_id, f.priority
) m
left join ready y on y.workspace_id = m.workspace_id and y.resource_id = m.resource_id
left join resources r on r.workspace_id = m.workspace_id and r.resource_id = m.resource_id
left join environments e on e.workspace_id = r.workspace_id and e.environment_id = r.environment_id
left join connections c on c.workspace_id = r.workspace_id and c.connection_id = r.connection_id;

comment on view report.queue is
    'The queue now, by resource and priority: from counters, cheap at any depth.';
comment on column report.queue.workspace_id is 'The tenant.';
comment on column report.queue.workspace_name is 'The tenants name.';
comment on column report.queue.environment_id is 'The environment.';
comment on column report.queue.environment_name is 'The environments name.';
comment on column report.queue.resource_id is 'The resource called.';
comment on column report.queue.resource_name is 'The resources name; null: it was removed.';
comment on column report.queue.model is 'The model that the resource names.';
comment on column report.queue.connection_id is 'The account at the provider.';
comment on column report.queue.connection_name is 'The accounts name.';
comment on column report.queue.priority is 'The batches priority.';
comment on column report.queue.open_batches is 'Batches with work that is not done.';
comment on column report.queue.pending_items is 'Items that wait.';
comment on column report.queue.unstarted_items is 'Those of them that were never tried.';
comment on column report.queue.running_items is 'Items with a call in flight.';
comment on column report.queue.paused_items is 'Those of the waiting that are paused.';
comment on column report.queue.oldest_at is 'Acceptance of the oldest batch with items that wait.';
comment on column report.queue.oldest_age_s is 'The same as an age.';
comment on column report.queue.next_look_at is 'When the next item may be claimed; null: at once, or nothing can be.';
comment on column report.queue.waits_for is 'What the next item waits for: capacity, pace, concurrency, cooldown or retry.';
