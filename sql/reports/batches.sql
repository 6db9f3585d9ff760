-- One row per batch: how far it is, what it used, what it cost, when it will be done.
create or replace view report.batches with (security_barrier) as
select w.workspace_id,
    w.name as workspace_name,
    e.environment_id,
    e.name as environment_name,
    b.batch_id,
    b.batch_day,
    b.name as batch_name,
    b.type::text as batch_type,
    b.endpoint,
    b.status::text as status,
    f.is_paused,
    b.pause_reason,
    b.priority,
    b.weight,
    b.metadata,
    b.created_by_api_key_id as api_key_id,
    k.name as api_key_name,
    b.created_at,
    b.started_at,
    b.completed_at,
    b.cancelled_at,
    b.expires_at,
    round(extract(epoch from coalesce(b.started_at, b.completed_at, clock()) - b.created_at), 3) as waiting_s,
    round(extract(epoch from coalesce(b.completed_at, clock()) - b.started_at), 3) as running_s,
    b.total_items as items,
    f.pending as pending_items,
    f.running as running_items,
    f.completed as completed_items,
    f.failed as failed_items,
    f.cancelled as cancelled_items,
    f.retries,
    b.estimated_input_tokens,
    f.input_tokens,
    f.output_tokens,
    case when f.currencies = 1 then f.cost_nano / 1e9 end as cost,
    case when f.currencies = 1 then f.currency end as currency,
    b.max_tokens,
    b.max_cost_nano / 1e9 as max_cost,
    case when b.started_at is not null then round((f.completed + f.failed) * 60 / nullif(extract(epoch from coalesce(b.completed_at, clock()) - b.started_at), 0), 1) end as items_per_minute,
    case when b.status = 'running' and b.completed_at is null and not f.is_paused and f.completed + f.failed > 0
        then clock() + (clock() - b.started_at) * ((f.pending + f.running)::double precision / (f.completed + f.failed)) end as eta_at,
    b.texts_erased_at
from report_tenants w
join batches b on b.workspace_id = w.workspace_id
join environments e on e.workspace_id = b.workspace_id and e.environment_id = b.environment_id
left join api_keys k on k.workspace_id = b.workspace_id and k.api_key_id = b.created_by_api_key_id
cross join lateral (
    select sum(f.pending)::int as pending, sum(f.running)::int as running, sum(f.completed)::int as completed,
        sum(f.failed)::int as failed, sum(f.cancelled)::int as cancelled, sum(f.retries)::int as retries,
        sum(f.input_tokens)::bigint as input_tokens, sum(f.output_tokens)::bigint as output_tokens,
        sum(f.cost_nano) as cost_nano, max(f.currency) as currency, count(distinct f.currency) as currencies,
        coalesce(bool_and(f.is_paused), false) as is_paused
    from flows f
    where f.workspace_id = b.workspace_id and f.batch_id = b.batch_id
) f;

comment on view report.batches is
    'Batches: state, counts, tokens, cost, times, rate and expected end. One row each, from counters: cheap at any size.';
comment on column report.batches.workspace_id is 'The tenant.';
comment on column report.batches.workspace_name is 'The tenants name.';
comment on column report.batches.environment_id is 'The environment.';
comment on column report.batches.environment_name is 'The environments name.';
comment on column report.batches.batch_id is 'The batch.';
comment on column report.batches.batch_day is 'UTC day of its creation: with it a condition on items or attempts reads only that day.';
comment on column report.batches.batch_name is 'Its name, if its creator gave it one.';
comment on column report.batches.batch_type is 'sync, async or callback.';
comment on column report.batches.endpoint is 'Path of the providers API that its items call.';
comment on column report.batches.status is 'pending, running, completed, failed or cancelled.';
comment on column report.batches.is_paused is 'Whether nothing of it is begun for now.';
comment on column report.batches.pause_reason is 'max-tokens or max-cost, when that paused it.';
comment on column report.batches.priority is 'Higher goes first; -100 to 100.';
comment on column report.batches.weight is 'Its share among batches of the same priority.';
comment on column report.batches.metadata is 'Its creators own facts.';
comment on column report.batches.api_key_id is 'The key that created it; null: the command line or a user.';
comment on column report.batches.api_key_name is 'The keys name.';
comment on column report.batches.created_at is 'When it was accepted.';
comment on column report.batches.started_at is 'When its first item was claimed.';
comment on column report.batches.completed_at is 'When its last item ended.';
comment on column report.batches.cancelled_at is 'When it was cancelled.';
comment on column report.batches.expires_at is 'Its deadline.';
comment on column report.batches.waiting_s is 'From its acceptance to its first claim, or until now.';
comment on column report.batches.running_s is 'From its first claim to its end, or until now; null: not begun.';
comment on column report.batches.items is 'Items it was created with.';
comment on column report.batches.pending_items is 'Items that wait.';
comment on column report.batches.running_items is 'Items with a call in flight.';
comment on column report.batches.completed_items is 'Items answered.';
comment on column report.batches.failed_items is 'Items that ended without an answer.';
comment on column report.batches.cancelled_items is 'Items cancelled.';
comment on column report.batches.retries is 'How often items went back to the queue.';
comment on column report.batches.estimated_input_tokens is 'Input tokens as estimated at creation.';
comment on column report.batches.input_tokens is 'Input tokens of answered items, as the provider counted.';
comment on column report.batches.output_tokens is 'Output tokens of answered items, as the provider counted.';
comment on column report.batches.cost is 'What all its calls cost, also those that changed nothing any more; null: no price was known, or in several currencies.';
comment on column report.batches.currency is 'Currency of the cost.';
comment on column report.batches.max_tokens is 'It pauses when so many tokens are used.';
comment on column report.batches.max_cost is 'It pauses when so much is spent.';
comment on column report.batches.items_per_minute is 'Items ended per minute since it began.';
comment on column report.batches.eta_at is 'When it will be done at its own rate so far; null: ended, paused, or nothing has ended yet.';
comment on column report.batches.texts_erased_at is 'When its prompts and answers were erased; infinity: that is going on.';
