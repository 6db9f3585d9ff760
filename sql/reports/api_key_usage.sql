-- What each key asked for, by the UTC day of its batches.
create or replace view report.api_key_usage with (security_barrier) as
select w.workspace_id,
    w.name as workspace_name,
    e.environment_id,
    e.name as environment_name,
    k.api_key_id,
    k.name as api_key_name,
    k.enabled as is_enabled,
    k.last_used_at,
    m.day_on,
    m.batches,
    m.items,
    m.completed as completed_items,
    m.failed as failed_items,
    m.input_tokens,
    m.output_tokens,
    case when m.currencies = 1 then m.cost_nano / 1e9 end as cost,
    case when m.currencies = 1 then m.currency end as currency
from report_tenants w
join api_keys k on k.workspace_id = w.workspace_id
join environments e on e.workspace_id = k.workspace_id and e.environment_id = k.environment_id
left join (
    select b.workspace_id, b.created_by_api_key_id, (b.created_at at time zone 'UTC')::date as day_on,
        count(distinct b.batch_id) as batches, sum(f.total)::bigint as items, sum(f.completed)::bigint as completed,
        sum(f.failed)::bigint as failed, sum(f.input_tokens)::bigint as input_tokens,
        sum(f.output_tokens)::bigint as output_tokens, sum(f.cost_nano) as cost_nano, max(f.currency) as currency,
        count(distinct f.currency) as currencies
    from batches b
    join flows f on f.workspace_id = b.workspace_id and f.batch_id = b.batch_id
    group by b.workspace_id, b.created_by_api_key_id, (b.created_at at time zone 'UTC')::date
) m on m.workspace_id = k.workspace_id and m.created_by_api_key_id = k.api_key_id;

comment on view report.api_key_usage is
    'API keys: batches, items, tokens and cost per UTC day of the batches'' creation, from counters.';
comment on column report.api_key_usage.workspace_id is 'The tenant.';
comment on column report.api_key_usage.workspace_name is 'The tenants name.';
comment on column report.api_key_usage.environment_id is 'The environment.';
comment on column report.api_key_usage.environment_name is 'The environments name.';
comment on column report.api_key_usage.api_key_id is 'The key.';
comment on column report.api_key_usage.api_key_name is 'The keys name.';
comment on column report.api_key_usage.is_enabled is 'Whether it opens anything.';
comment on column report.api_key_usage.last_used_at is 'When it last did, to the minute.';
comment on column report.api_key_usage.day_on is 'The day of the UTC calendar; null: it created no batch.';
comment on column report.api_key_usage.batches is 'Batches created.';
comment on column report.api_key_usage.items is 'Items of them.';
comment on column report.api_key_usage.completed_items is 'Items answered.';
comment on column report.api_key_usage.failed_items is 'Items that ended without an answer.';
comment on column report.api_key_usage.input_tokens is 'Input tokens of answered items.';
comment on column report.api_key_usage.output_tokens is 'Output tokens of answered items.';
comment on column report.api_key_usage.cost is 'What all their calls cost; null: no price was known, or in several currencies.';
comment on column report.api_key_usage.currency is 'Currency of the cost.';
