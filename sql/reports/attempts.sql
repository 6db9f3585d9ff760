-- Every provider call.
create or replace view report.attempts with (security_barrier) as
select w.workspace_id,
    w.name as workspace_name,
    e.environment_id,
    e.name as environment_name,
    a.batch_id,
    b.name as batch_name,
    a.batch_day,
    item_id(a.batch_id, a.seq) as item_id,
    a.seq as item_index,
    a.attempt,
    a.resource_id,
    r.name as resource_name,
    r.model,
    a.connection_id,
    c.name as connection_name,
    b.created_by_api_key_id as api_key_id,
    a.outcome::text as outcome,
    a.status_code,
    a.error_code,
    a.error_message,
    a.claimed_at,
    a.started_at,
    a.ended_at,
    a.corrected_at,
    case when a.attempt = 1 then round(extract(epoch from a.claimed_at - b.created_at) * 1000)::bigint end as queue_wait_ms,
    a.latency_ms,
    case when a.outcome = 'answered' then a.charged_input_tokens else 0 end as input_tokens,
    case when a.outcome = 'answered' then coalesce(a.cached_tokens, 0) else 0 end as cached_tokens,
    case when a.outcome = 'answered' then a.charged_output_tokens else 0 end as output_tokens,
    a.reasoning_tokens,
    a.reserved_input_tokens,
    a.reserved_output_tokens,
    a.cost_nano / 1e9 as cost,
    a.currency,
    a.model as answered_model,
    a.provider_request_id,
    a.worker_id
from report_tenants w
join attempts a on a.workspace_id = w.workspace_id
join batches b on b.workspace_id = a.workspace_id and b.batch_id = a.batch_id
join environments e on e.workspace_id = b.workspace_id and e.environment_id = b.environment_id
left join resources r on r.workspace_id = a.workspace_id and r.resource_id = a.resource_id
left join connections c on c.workspace_id = a.workspace_id and c.connection_id = a.connection_id;

comment on view report.attempts is
    'Attempts: one row per provider call. Partitioned by the batch''s day: a condition on batch_day reads only that.';
comment on column report.attempts.workspace_id is 'The tenant.';
comment on column report.attempts.workspace_name is 'The tenants name.';
comment on column report.attempts.environment_id is 'The environment.';
comment on column report.attempts.environment_name is 'The environments name.';
comment on column report.attempts.batch_id is 'The batch.';
comment on column report.attempts.batch_name is 'The batchs name.';
comment on column report.attempts.batch_day is 'UTC day of the batchs creation.';
comment on column report.attempts.item_id is 'The item, as the API shows it.';
comment on column report.attempts.item_index is 'The items place in the batch, from 0.';
comment on column report.attempts.attempt is 'Number of the items claim, from 1. Calls that were never sent have no row.';
comment on column report.attempts.resource_id is 'The resource called.';
comment on column report.attempts.resource_name is 'The resources name; null: it was removed.';
comment on column report.attempts.model is 'The model that the resource names.';
comment on column report.attempts.connection_id is 'The account called; null: lost.';
comment on column report.attempts.connection_name is 'The accounts name.';
comment on column report.attempts.api_key_id is 'The key that created the batch.';
comment on column report.attempts.outcome is 'answered, rejected, throttled, unreachable, lost or unsent.';
comment on column report.attempts.status_code is 'The providers HTTP status.';
comment on column report.attempts.error_code is 'Class of the failure; null: answered.';
comment on column report.attempts.error_message is 'The same for people.';
comment on column report.attempts.claimed_at is 'When it was claimed.';
comment on column report.attempts.started_at is 'When it was sent.';
comment on column report.attempts.ended_at is 'When it ended, or was given up for lost.';
comment on column report.attempts.corrected_at is 'When a lost call reported after all.';
comment on column report.attempts.queue_wait_ms is 'From the batchs acceptance to the claim; of first attempts.';
comment on column report.attempts.latency_ms is 'From sending to the end of the reply.';
comment on column report.attempts.input_tokens is 'Input tokens of an answer, as the provider counted.';
comment on column report.attempts.cached_tokens is 'Those of them that the provider had cached.';
comment on column report.attempts.output_tokens is 'Output tokens of an answer, as the provider counted.';
comment on column report.attempts.reasoning_tokens is 'Those of them that were reasoning.';
comment on column report.attempts.reserved_input_tokens is 'Input tokens that its claim reserved.';
comment on column report.attempts.reserved_output_tokens is 'Output tokens that its claim reserved.';
comment on column report.attempts.cost is 'What it cost by the price of its claims time; null: no price was known, or it is lost.';
comment on column report.attempts.currency is 'Currency of the cost.';
comment on column report.attempts.answered_model is 'The model that answered, as the provider named it.';
comment on column report.attempts.provider_request_id is 'The providers own id of the call.';
comment on column report.attempts.worker_id is 'The worker that called.';
