-- Prompts and answers, for those who may read them (role sluice_report_text).
create or replace view report.item_texts with (security_barrier) as
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
    case when f.is_cancelled and i.status = 'pending' then 'cancelled' else i.status::text end as status,
    q.body as request,
    s.body as response,
    q.erased_at as texts_erased_at
from report_tenants w
join report_text_readers t on true
join items i on i.workspace_id = w.workspace_id
join batches b on b.workspace_id = i.workspace_id and b.batch_id = i.batch_id
join environments e on e.workspace_id = b.workspace_id and e.environment_id = b.environment_id
join flows f on f.workspace_id = i.workspace_id and f.batch_id = i.batch_id and f.resource_id = i.resource_id
join item_requests q on q.workspace_id = i.workspace_id
    and q.batch_day = i.batch_day
    and q.batch_id = i.batch_id
    and q.seq = i.seq
left join item_results s on s.workspace_id = i.workspace_id
    and s.batch_day = i.batch_day
    and s.batch_id = i.batch_id
    and s.seq = i.seq;

comment on view report.item_texts is
    'Prompt and answer of every item, to the letter. Needs a grant of its own: sluice report grant USER --texts.';
comment on column report.item_texts.workspace_id is 'The tenant.';
comment on column report.item_texts.workspace_name is 'The tenants name.';
comment on column report.item_texts.environment_id is 'The environment.';
comment on column report.item_texts.environment_name is 'The environments name.';
comment on column report.item_texts.batch_id is 'The batch.';
comment on column report.item_texts.batch_name is 'The batchs name.';
comment on column report.item_texts.item_id is 'The item, as the API shows it.';
comment on column report.item_texts.item_index is 'Its place in the batch, from 0.';
comment on column report.item_texts.custom_id is 'Its creators own name for it.';
comment on column report.item_texts.batch_day is 'UTC day of the batchs creation.';
comment on column report.item_texts.status is 'pending, running, completed, failed or cancelled.';
comment on column report.item_texts.request is 'The request to the letter, JSON; JSON null: erased.';
comment on column report.item_texts.response is 'The providers reply to the letter, JSON; JSON null: erased.';
comment on column report.item_texts.texts_erased_at is 'When both were erased.';
