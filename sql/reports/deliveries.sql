-- One row per event and endpoint: what other programs were told, or are still to be told. Never what was sent.
create or replace view report.deliveries with (security_barrier) as
select w.workspace_id,
    w.name as workspace_name,
    e.environment_id,
    e.name as environment_name,
    d.batch_id,
    coalesce(b.name, s.name) as batch_name,
    d.batch_day,
    d.event_no,
    case when d.seq is not null then item_id(d.batch_id, d.seq) end as item_id,
    d.seq as item_index,
    d.endpoint_id,
    case when d.endpoint_id = d.batch_id then 'callback' else 'webhook' end as endpoint_kind,
    n.name as endpoint_name,
    substring(n.url from '^[^/]*//[^/?#]*') as endpoint_origin,
    n.disabled_at as endpoint_disabled_at,
    d.kind::text as event_kind,
    d.topic as event_type,
    d.status::text as status,
    d.reason,
    d.attempt as tries,
    d.failures,
    t.status_code as last_status_code,
    t.error_code as last_error_code,
    t.latency_ms as last_latency_ms,
    round(extract(epoch from coalesce(d.ended_at, clock()) - d.created_at), 3) as lag_s,
    d.created_at,
    t.started_at as last_tried_at,
    case when d.status = 'pending' then d.visible_at end as next_try_at,
    d.ended_at
from report_tenants w
join deliveries d on d.workspace_id = w.workspace_id
left join endpoints n on n.workspace_id = d.workspace_id and n.endpoint_id = d.endpoint_id
left join batches b on b.workspace_id = d.workspace_id and b.batch_id = d.batch_id
left join submissions s on s.workspace_id = d.workspace_id and s.batch_id = d.batch_id
left join environments e on e.workspace_id = d.workspace_id
    and e.environment_id = coalesce(b.environment_id, s.environment_id, n.environment_id)
left join lateral (
    select a.status_code, a.error_code, a.latency_ms, a.started_at
    from delivery_attempts a
    where a.workspace_id = d.workspace_id
        and a.batch_day = d.batch_day
        and a.batch_id = d.batch_id
        and a.event_no = d.event_no
        and a.endpoint_id = d.endpoint_id
    order by a.attempt desc
    limit 1
) t on true;

comment on view report.deliveries is
    'Deliveries: one row per event and the callback or webhook that it is told to. Never what was sent, nor secrets.';
comment on column report.deliveries.workspace_id is 'The tenant.';
comment on column report.deliveries.workspace_name is 'The tenant''s name.';
comment on column report.deliveries.environment_id is 'The environment.';
comment on column report.deliveries.environment_name is 'The environment''s name.';
comment on column report.deliveries.batch_id is 'The batch; one whose file was refused is in no other view.';
comment on column report.deliveries.batch_name is 'The batch''s name.';
comment on column report.deliveries.batch_day is 'UTC day of the batch''s creation; a condition on it reads only that day.';
comment on column report.deliveries.event_no is 'The event''s number in its batch; 0: the batch never came to be.';
comment on column report.deliveries.item_id is 'The item it is about; null: the batch.';
comment on column report.deliveries.item_index is 'The item''s place in the batch, from 0; null: the batch.';
comment on column report.deliveries.endpoint_id is 'Where it goes; of a callback the batch''s id.';
comment on column report.deliveries.endpoint_kind is 'callback: of the batch. webhook: of the environment.';
comment on column report.deliveries.endpoint_name is 'The webhook''s name; null: a callback, or it was deleted.';
comment on column report.deliveries.endpoint_origin is
    'Scheme, host and port of its URL, whose path may hold a token; null: it was deleted.';
comment on column report.deliveries.endpoint_disabled_at is 'Since when nothing is sent to it; null: it is.';
comment on column report.deliveries.event_kind is 'What happened.';
comment on column report.deliveries.event_type is 'The same as the endpoint subscribes to it.';
comment on column report.deliveries.status is 'pending, delivered, or dead: given up.';
comment on column report.deliveries.reason is 'Why it was given up.';
comment on column report.deliveries.tries is 'How often sending it was begun.';
comment on column report.deliveries.failures is 'Failed tries since it was made, or was asked for again.';
comment on column report.deliveries.last_status_code is
    'The receiver''s HTTP status at the last try whose end is known; null: no reply, or no try.';
comment on column report.deliveries.last_error_code is 'Class of that try''s failure; null: it was taken, or no try.';
comment on column report.deliveries.last_latency_ms is 'From that try''s begin to its end.';
comment on column report.deliveries.lag_s is 'From the event to its delivery; until given up, or until now, if it was not delivered.';
comment on column report.deliveries.created_at is 'When the event was recorded.';
comment on column report.deliveries.last_tried_at is 'When the last try whose end is known began.';
comment on column report.deliveries.next_try_at is
    'When it is tried next; during a try, when that is given up for lost; null: it has ended.';
comment on column report.deliveries.ended_at is 'When it was delivered or given up.';
