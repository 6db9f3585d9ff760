-- One row per item, its latest state. Never the prompt: that is report.item_texts.
create or replace view report.items with (security_barrier) as
select w.workspace_id,
    w.name as workspace_name,
    e.environment_id,
    e.name as environment_name,
    b.batch_id,
    b.name as batch_name,
    item_id(i.batch_id, i.seq) as item_id,
    i.seq as item_index,
    q.custom_id,
    i.batch_day,
    i.resource_id,
    r.name as resource_name,
    r.model,
    c.connection_id,
    c.name as connection_name,
    case when f.is_cancelled and i.status = 'pending' then 'cancelled' else i.status::text end as status,
    case when f.is_cancelled and i.status = 'pending' then 'cancelled' else i.ended_reason::text end as ended_reason,
    i.attempt as attempts,
    i.failures,
    i.crashes,
    b.created_at,
    coalesce(i.claimed_at, a.claimed_at) as claimed_at,
    coalesce(i.ended_at, case when f.is_cancelled and i.status = 'pending' then b.cancelled_at end) as ended_at,
    case when i.status = 'pending' and not f.is_cancelled and i.attempt > 0 then i.visible_at end as next_attempt_at,
    round(extract(epoch from i.ended_at - b.created_at), 3) as total_s,
    a.latency_ms,
    i.input_tokens as estimated_input_tokens,
    s.input_tokens,
    s.output_tokens,
    s.model as answered_model,
    s.status_code,
    s.error_code,
    s.error_message,
    q.erased_at as texts_erased_at
from report_tenants w
join items i on i.workspace_id = w.workspace_id
join batches b on b.workspace_id = i.workspace_id and b.batch_id = i.batch_id
join environments e on e.workspace_id = b.workspace_id and e.environment_id = b.environment_id
join flows f on f.workspace_id = i.workspace_id and f.batch_id = i.batch_id and f.resource_id = i.resource_id
left join resources r on r.workspace_id = i.workspace_id and r.resource_id = i.resource_id
left join connections c on c.workspace_id = r.workspace_id and c.connection_id = r.connection_id
left join item_requests q on q.workspace_id = i.workspace_id
    and q.batch_day = i.batch_day
    and q.batch_id = i.batch_id
    and q.seq = i.seq
left join item_results s on s.workspace_id = i.workspace_id
    and s.batch_day = i.batch_day
    and s.batch_id = i.batch_id
    and s.seq = i.seq
left join attempts a on a.workspace_id = s.workspace_id
    and a.batch_day = s.batch_day
    and a.batch_id = s.batch_id
    and a.seq = s.seq
    and a.attempt = s.attempt;

comment on view report.items is
    'Items: latest state, attempts, times, tokens and error. Never the prompt or the answer.';
comment on column report.items.workspace_id is 'The tenant.';
comment on column report.items.workspace_name is 'The tenants name.';
comment on column report.items.environment_id is 'The environment.';
comment on column report.items.environment_name is 'The environments name.';
comment on column report.items.batch_id is 'The batch.';
comment on column report.items.batch_name is 'The batchs name.';
comment on column report.items.item_id is 'The item, as the API shows it.';
comment on column report.items.item_index is 'Its place in the batch, from 0.';
comment on column report.items.custom_id is 'Its creators own name for it.';
comment on column report.items.batch_day is 'UTC day of the batchs creation; a condition on it reads only that day.';
comment on column report.items.resource_id is 'The resource that answers it.';
comment on column report.items.resource_name is 'The resources name; null: it was removed.';
comment on column report.items.model is 'The model that the resource names.';
comment on column report.items.connection_id is 'The account at the provider.';
comment on column report.items.connection_name is 'The accounts name.';
comment on column report.items.status is 'pending, running, completed, failed or cancelled.';
comment on column report.items.ended_reason is 'answered, rejected, exhausted, crashed, expired, impossible or cancelled; null: not ended.';
comment on column report.items.attempts is 'How often it was claimed.';
comment on column report.items.failures is 'Calls that ended in a providers failure.';
comment on column report.items.crashes is 'Calls whose worker vanished.';
comment on column report.items.created_at is 'When it was accepted.';
comment on column report.items.claimed_at is 'When the call that decided it, or is in flight, was claimed.';
comment on column report.items.ended_at is 'When it ended.';
comment on column report.items.next_attempt_at is 'When it may be tried again.';
comment on column report.items.total_s is 'From its acceptance to its end.';
comment on column report.items.latency_ms is 'Time of the call that decided it, as the worker measured.';
comment on column report.items.estimated_input_tokens is 'Input tokens as estimated at creation.';
comment on column report.items.input_tokens is 'Input tokens as the provider counted.';
comment on column report.items.output_tokens is 'Output tokens as the provider counted.';
comment on column report.items.answered_model is 'The model that answered, as the provider named it.';
comment on column report.items.status_code is 'The providers HTTP status.';
comment on column report.items.error_code is 'Class of the failure; null: none.';
comment on column report.items.error_message is 'The same for people.';
comment on column report.items.texts_erased_at is 'When its prompt and answer were erased.';
