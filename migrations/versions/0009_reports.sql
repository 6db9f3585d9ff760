-- Reports: prices and cost, what batches may spend, rollups, who may read, how long things are kept.

-- Functions whose results change; the new ones are applied after this revision.
drop function if exists limits_in_force(uuid, uuid[], timestamptz);
drop function if exists capacity_waits(
    uuid, uuid[], bigint, bigint, bigint, timestamptz, interval, double precision, timestamptz);

-- Types ------------------------------------------------------------------------------------------

alter type event_kind add value 'batch-paused';
alter type claim_pick add attribute cost_nano bigint;
alter type taken_item add attribute cost_nano bigint;
alter type budget add attribute most_cost_nano bigint, add attribute cost_nano double precision;

-- Tables -----------------------------------------------------------------------------------------

alter table workspaces
    add column keep_days int,
    add column keep_texts_days int,
    add constraint workspaces_keep_days_positive check (keep_days > 0),
    add constraint workspaces_keep_texts_days_positive check (keep_texts_days > 0);
alter table limits
    add column cost_nano bigint,
    drop constraint limits_limit_something,
    add constraint limits_limit_something check (
        source = 'observed' or coalesce(requests, tokens, input_tokens, output_tokens, cost_nano) is not null
    ),
    add constraint limits_cost_positive check (cost_nano > 0),
    add constraint limits_cost_is_of_a_lifetime check (cost_nano is null or period = 'lifetime');
alter table ledger add column cost_nano bigint not null default 0;
alter table batches
    add column max_tokens bigint,
    add column max_cost_nano bigint,
    add column currency text,
    add column pause_reason text,
    add column texts_erased_at timestamptz,
    add constraint batches_max_cost_has_a_currency check ((max_cost_nano is null) = (currency is null)),
    add constraint batches_pause_reason_known check (pause_reason in ('max-tokens', 'max-cost'));
create index batches_erasing on batches (batch_day) where texts_erased_at = 'infinity';
alter table flows
    add column cost_nano bigint not null default 0,
    add column currency text;
alter table items add column reserved_cost_nano bigint;
alter table item_requests add column erased_at timestamptz;
alter table attempts
    add column cost_nano bigint,
    add column currency text,
    add column reserved_cost_nano bigint,
    add column corrected_at timestamptz;
create index attempts_failed on attempts (workspace_id, resource_id, ended_at) where outcome <> 'answered';
create index items_failed on items (workspace_id, resource_id, ended_at) where status = 'failed';

-- Money and reports -------------------------------------------------------------------------------

create table prices (
    price_id uuid not null,
    workspace_id uuid references workspaces on delete cascade,
    model text not null,
    model_like text not null generated always as (
        replace(replace(replace(replace(model, '\', '\\'), '%', '\%'), '_', '\_'), '*', '%')
    ) stored,
    input_per_million numeric not null,
    cached_per_million numeric,
    output_per_million numeric not null,
    currency text not null,
    valid_from timestamptz not null,
    created_at timestamptz not null default now(),
    constraint prices_pkey primary key (price_id),
    constraint prices_unique unique nulls not distinct (workspace_id, model, valid_from),
    constraint prices_model_not_empty check (model <> ''),
    constraint prices_not_negative check (least(input_per_million, cached_per_million, output_per_million) >= 0),
    constraint prices_currency_is_iso check (currency ~ '^[A-Z]{3}$')
);
comment on table prices is
    'What models cost, for every workspace or for one. What an attempt cost was computed when it was settled: '
    'a price that comes later changes no history.';
comment on column prices.price_id is 'UUIDv7, minted by the application.';
comment on column prices.workspace_id is 'Whose price it is; null: everyone''s who has none of its own.';
comment on column prices.model is 'The model''s name; * stands for any characters. The most specific one counts.';
comment on column prices.model_like is 'The same as a pattern of LIKE.';
comment on column prices.input_per_million is 'Price of a million input tokens, in the currency.';
comment on column prices.cached_per_million is 'The same of those that the provider had cached; null: as the others.';
comment on column prices.output_per_million is 'Price of a million output tokens, in the currency.';
comment on column prices.currency is 'ISO 4217, such as USD.';
comment on column prices.valid_from is 'It counts for calls claimed from then on, until a later one does.';
comment on column prices.created_at is 'When the row was made.';

create table report_grants (
    role_name name not null,
    workspace_id uuid references workspaces on delete cascade,
    with_texts boolean not null,
    created_at timestamptz not null default now(),
    constraint report_grants_pkey primary key (role_name)
);
comment on table report_grants is
    'Whose rows a login may see in the views of schema report. A login without a row sees none.';
comment on column report_grants.role_name is 'The login, as session_user says it.';
comment on column report_grants.workspace_id is 'The only workspace it sees; null: all.';
comment on column report_grants.with_texts is 'Whether it may read prompts and answers.';
comment on column report_grants.created_at is 'When the row was made.';

create table rollup_due (
    batch_day date not null,
    minute_at timestamptz not null
);
comment on table rollup_due is
    'Minutes whose attempts have changed since they were rolled up: written by whoever writes attempts, in the '
    'same transaction, so that no late correction is missed. Without a key: nobody waits for anybody.';
comment on column rollup_due.batch_day is 'The partition of the attempts.';
comment on column rollup_due.minute_at is 'The minute in which they ended.';

create table rollup_minutes (
    workspace_id uuid not null,
    minute_at timestamptz not null,
    batch_day date not null,
    resource_id uuid not null,
    outcome attempt_outcome not null,
    error_code text not null,
    currency text not null,
    calls bigint not null,
    retries bigint not null,
    input_tokens bigint not null,
    cached_tokens bigint not null,
    output_tokens bigint not null,
    cost_nano bigint not null,
    constraint rollup_minutes_pkey primary key (
        workspace_id, minute_at, batch_day, resource_id, outcome, error_code, currency)
);
create index rollup_minutes_due on rollup_minutes (batch_day, minute_at);
comment on table rollup_minutes is 'Attempts that ended in a minute, counted: outlives them.';
comment on column rollup_minutes.workspace_id is 'The tenant.';
comment on column rollup_minutes.minute_at is 'When the minute began.';
comment on column rollup_minutes.batch_day is 'The partition of the attempts: what is counted anew when they change.';
comment on column rollup_minutes.resource_id is 'The resource called.';
comment on column rollup_minutes.outcome is 'How the calls ended.';
comment on column rollup_minutes.error_code is 'Class of the failure; empty: answered.';
comment on column rollup_minutes.currency is 'Currency of the cost; empty: no price was known.';
comment on column rollup_minutes.calls is 'How many calls.';
comment on column rollup_minutes.retries is 'Those of them that were not their item''s first.';
comment on column rollup_minutes.input_tokens is 'Input tokens of answers, as the provider counted.';
comment on column rollup_minutes.cached_tokens is 'Those of them that the provider had cached.';
comment on column rollup_minutes.output_tokens is 'Output tokens of answers, as the provider counted.';
comment on column rollup_minutes.cost_nano is 'What they cost, in billionths of the currency.';

create table rollup_hours (
    workspace_id uuid not null,
    hour_at timestamptz not null,
    resource_id uuid not null,
    outcome attempt_outcome not null,
    error_code text not null,
    currency text not null,
    calls bigint not null,
    retries bigint not null,
    input_tokens bigint not null,
    cached_tokens bigint not null,
    output_tokens bigint not null,
    cost_nano bigint not null,
    constraint rollup_hours_pkey primary key (
        workspace_id, hour_at, resource_id, outcome, error_code, currency)
);
create index rollup_hours_due on rollup_hours (hour_at);
comment on table rollup_hours is 'The same by the hour: outlives the minutes.';
comment on column rollup_hours.workspace_id is 'The tenant.';
comment on column rollup_hours.hour_at is 'When the hour began.';
comment on column rollup_hours.resource_id is 'The resource called.';
comment on column rollup_hours.outcome is 'How the calls ended.';
comment on column rollup_hours.error_code is 'Class of the failure; empty: answered.';
comment on column rollup_hours.currency is 'Currency of the cost; empty: no price was known.';
comment on column rollup_hours.calls is 'How many calls.';
comment on column rollup_hours.retries is 'Those of them that were not their item''s first.';
comment on column rollup_hours.input_tokens is 'Input tokens of answers, as the provider counted.';
comment on column rollup_hours.cached_tokens is 'Those of them that the provider had cached.';
comment on column rollup_hours.output_tokens is 'Output tokens of answers, as the provider counted.';
comment on column rollup_hours.cost_nano is 'What they cost, in billionths of the currency.';

create table rollup_latency_minutes (
    workspace_id uuid not null,
    minute_at timestamptz not null,
    batch_day date not null,
    resource_id uuid not null,
    latency_buckets jsonb not null,
    wait_buckets jsonb not null,
    constraint rollup_latency_minutes_pkey primary key (workspace_id, minute_at, batch_day, resource_id)
);
create index rollup_latency_minutes_due on rollup_latency_minutes (batch_day, minute_at);
comment on table rollup_latency_minutes is
    'How long answers of a minute took, as counts by duration_bucket().';
comment on column rollup_latency_minutes.workspace_id is 'The tenant.';
comment on column rollup_latency_minutes.minute_at is 'When the minute began.';
comment on column rollup_latency_minutes.batch_day is 'The partition of the attempts.';
comment on column rollup_latency_minutes.resource_id is 'The resource called.';
comment on column rollup_latency_minutes.latency_buckets is 'Answers by the provider''s time.';
comment on column rollup_latency_minutes.wait_buckets is
    'Answers to first attempts by the time from the batch''s acceptance to the claim.';

create table rollup_latency_hours (
    workspace_id uuid not null,
    hour_at timestamptz not null,
    resource_id uuid not null,
    latency_buckets jsonb not null,
    wait_buckets jsonb not null,
    constraint rollup_latency_hours_pkey primary key (workspace_id, hour_at, resource_id)
);
create index rollup_latency_hours_due on rollup_latency_hours (hour_at);
comment on table rollup_latency_hours is 'The same by the hour: outlives the minutes.';
comment on column rollup_latency_hours.workspace_id is 'The tenant.';
comment on column rollup_latency_hours.hour_at is 'When the hour began.';
comment on column rollup_latency_hours.resource_id is 'The resource called.';
comment on column rollup_latency_hours.latency_buckets is 'Answers by the provider''s time.';
comment on column rollup_latency_hours.wait_buckets is
    'Answers to first attempts by the time from the batch''s acceptance to the claim.';

-- What is there already is rolled up by maintenance, a few minutes at a time.
insert into rollup_due (batch_day, minute_at)
select distinct batch_day, date_trunc('minute', ended_at, 'UTC') from attempts;

-- Comments ---------------------------------------------------------------------------------------

comment on table item_requests is 'What is asked. Never changed but by its erasure.';
comment on table item_results is
    'What came back for an item that was answered or failed. Never changed but by its erasure.';
comment on column workspaces.keep_days is
    'Its items, attempts and events are kept so many days; null: as SLUICE_RETENTION_DAYS says.';
comment on column workspaces.keep_texts_days is
    'Its prompts and answers are kept so many days; null: as SLUICE_RETENTION_TEXTS_DAYS says.';
comment on column limits.cost_nano is 'Most money per period, in billionths of the currency; null is any amount.';
comment on column ledger.cost_nano is
    'Money in billionths: true where known, else reserved. Counted where a limit of the item bounds it.';
comment on column batches.max_tokens is 'It pauses when its calls have used so many tokens; null: any number.';
comment on column batches.max_cost_nano is
    'It pauses when its calls have cost so many billionths of the currency; null: any amount.';
comment on column batches.currency is 'The currency of max_cost_nano.';
comment on column batches.pause_reason is 'Which of both paused it; null: none, though people may have.';
comment on column batches.texts_erased_at is
    'When its prompts and answers were erased; infinity: that has been asked for and is going on.';
comment on column flows.cost_nano is 'What its attempts cost, in billionths of the currency.';
comment on column flows.currency is 'The currency of the latest price that was applied; null: none was.';
comment on column items.reserved_cost_nano is
    'What the claim took from limits of cost, in billionths; null: none bounds it.';
comment on column item_requests.erased_at is 'When it and its answer were erased: both say null since.';
comment on column attempts.cost_nano is
    'What it cost by the price of its claim''s time, in billionths; null: no price was known, or it is lost.';
comment on column attempts.currency is 'The currency of that price.';
comment on column attempts.reserved_cost_nano is 'What its claim took from limits of cost; null: none bounds it.';
comment on column attempts.corrected_at is 'When a lost call reported after all; null: it was not lost.';
