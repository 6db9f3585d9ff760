-- Items that ended without an answer and were not put back, one row each. Their request and result are probed by
-- key (see failures.sql).
create or replace view report.dead_letters with (security_barrier) as
select w.workspace_id,
    w.name as workspace_name,
    e.environment_id,
    e.name as environment_name,
    b.batch_id,
    b.name as batch_name,
    item_id(i.batch_id, i.seq) as item_id,
    i.seq as item_index,
    q.custom_id,
    i.resource_id,
    r.name as resource_name,
    i.ended_at,
    i.ended_reason::text as ended_reason,
    i.attempt as attempts,
    s.status_code,
    s.error_code,
    s.error_message
from report_tenants w
join items i on i.workspace_id = w.workspace_id and i.status = 'failed'
join batches b on b.workspace_id = i.workspace_id and b.batch_id = i.batch_id
join environments e on e.workspace_id = b.workspace_id and e.environment_id = b.environment_id
left join resources r on r.workspace_id = i.workspace_id and r.resource_id = i.resource_id
left join lateral (
    select q.custom_id
    from item_requests q
    where q.workspace_id = i.workspace_id
        and q.batch_day = i.batch_day
        and q.batch_id = i.batch_id
        and q.seq = i.seq
    limit 1
) q on true
left join lateral (
    select s.status_code, s.error_code, s.error_message
    from item_results s
    where s.workspace_id = i.workspace_id
        and s.batch_day = i.batch_day
        and s.batch_id = i.batch_id
        and s.seq = i.seq
    limit 1
) s on true;

comment on view report.dead_letters is
    'Dead letters: every item that failed for good, with its reason. Put them back with a retry of their batch.';
comment on column report.dead_letters.workspace_id is 'The tenant.';
comment on column report.dead_letters.workspace_name is 'The tenants name.';
comment on column report.dead_letters.environment_id is 'The environment.';
comment on column report.dead_letters.environment_name is 'The environments name.';
comment on column report.dead_letters.batch_id is 'The batch.';
comment on column report.dead_letters.batch_name is 'The batchs name.';
comment on column report.dead_letters.item_id is 'The item, as the API shows it.';
comment on column report.dead_letters.item_index is 'Its place in the batch, from 0.';
comment on column report.dead_letters.custom_id is 'Its creators own name for it.';
comment on column report.dead_letters.resource_id is 'The resource that was to answer it.';
comment on column report.dead_letters.resource_name is 'The resources name; null: it was removed.';
comment on column report.dead_letters.ended_at is 'When it failed.';
comment on column report.dead_letters.ended_reason is 'rejected, exhausted, crashed, expired or impossible.';
comment on column report.dead_letters.attempts is 'How often it was claimed.';
comment on column report.dead_letters.status_code is 'The providers HTTP status.';
comment on column report.dead_letters.error_code is 'Class of the failure.';
comment on column report.dead_letters.error_message is 'The same for people.';
