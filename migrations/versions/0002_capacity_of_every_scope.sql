-- Capacity of every scope: input and output tokens apart, calendar or sliding, observed limits, dimensions, models,
-- calls at once, deadlines, and what claims wait for.

-- Functions whose arguments change; the new ones are applied after this revision.
drop function if exists claim(uuid, uuid, uuid, int, boolean, interval, interval, double precision);
drop function if exists settle(uuid, uuid, json, text[]);
drop function if exists flows_change(uuid, settled_item[], timestamptz, jsonb);
drop function if exists ready_change(uuid, settled_item[], uuid[], timestamptz);
drop function if exists work_due(uuid, uuid, timestamptz);
drop function if exists flow_entry(uuid, uuid);
drop function if exists capacity_frees(uuid, uuid[], bigint, bigint, timestamptz, interval);
drop function if exists pace(uuid, uuid[], timestamptz, double precision);
drop function if exists slot_of(limit_period, timestamptz);
drop function if exists slot_frees_at(limit_period, timestamptz, interval);

-- Types ------------------------------------------------------------------------------------------

alter type scope_kind rename to scope_kind_before;
create type scope_kind as enum ('connection', 'model', 'resource', 'api_key', 'batch', 'value');
alter table limit_scopes alter column kind type scope_kind using kind::text::scope_kind;
drop type scope_kind_before;
create type limit_source as enum ('given', 'observed');
create type wait_reason as enum ('capacity', 'pace', 'concurrency', 'cooldown', 'retry');
create type happening as (batch_day date, batch_id uuid, kind event_kind, seqs int[]);
create type claim_flow as (
    batch_id uuid, batch_day date, priority smallint, weight double precision, virtual_time double precision,
    entry double precision, started int, floor int, flows int, mean_output_tokens double precision, scope_ids uuid[], limit_ids uuid[]
);
create type claim_candidate as (
    flow int, seq int, attempt int, input_tokens int, max_output_tokens int, suspect boolean, is_lower boolean,
    tag double precision
);
create type claim_pick as (
    flow int, seq int, attempt int, input_tokens int, output_tokens int, expected_output_tokens int,
    impossible boolean
);
drop type taken_item;
create type taken_item as (
    workspace_id uuid, batch_day date, batch_id uuid, seq int, attempt int, failures int, max_attempts int,
    flow int, input_tokens int, output_tokens int, expected_output_tokens int, impossible boolean
);
create type budget as (
    limit_id uuid, scope_id uuid, most_requests bigint, most_tokens bigint, most_input_tokens bigint,
    most_output_tokens bigint, requests double precision, tokens double precision,
    input_tokens double precision, output_tokens double precision, paced_requests double precision,
    paced_tokens double precision, paced_input_tokens double precision,
    paced_output_tokens double precision, rate_requests double precision, rate_tokens double precision,
    rate_input_tokens double precision, rate_output_tokens double precision
);
alter type given_outcome add attribute expected_output_tokens int;

-- Providers --------------------------------------------------------------------------------------

alter table connections
    add column concurrency int,
    add constraint connections_concurrency_positive check (concurrency > 0);
alter table resources
    add column concurrency int,
    add column model_scope_id uuid,
    add constraint resources_concurrency_positive check (concurrency > 0);
create index resources_by_connection on resources (workspace_id, connection_id);

-- Capacity ---------------------------------------------------------------------------------------

create table scope_states (
    workspace_id uuid not null,
    scope_id uuid not null,
    blocked_until timestamptz not null default '-infinity',
    blocked_reason text,
    begun_at timestamptz,
    throttled_at timestamptz not null default '-infinity',
    refusals int not null default 0,
    probed_at timestamptz not null default '-infinity',
    ceiling double precision,
    is_window boolean not null default false,
    raise_at timestamptz,
    raise_share double precision not null default 0.5,
    burst_share double precision not null default 1,
    is_fresh boolean not null default true,
    answered bigint not null default 0,
    concurrency double precision,
    slowed_at timestamptz not null default '-infinity',
    constraint scope_states_pkey primary key (workspace_id, scope_id),
    constraint scope_states_ceiling_positive check (ceiling > 0),
    constraint scope_states_concurrency_positive check (concurrency > 0)
) with (fillfactor = 50, autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 200);

-- Each model on a connection gets a scope, and what was learned about its resources goes over to it.
update resources r
set model_scope_id = m.scope_id
from (
    select workspace_id, connection_id, model, gen_random_uuid() as scope_id
    from resources
    group by workspace_id, connection_id, model
) m
where r.workspace_id = m.workspace_id and r.connection_id = m.connection_id and r.model = m.model;
alter table resources alter column model_scope_id set not null;
insert into limit_scopes (workspace_id, scope_id, kind)
select distinct workspace_id, model_scope_id, 'model'::scope_kind from resources;
insert into scope_states (workspace_id, scope_id)
select workspace_id, connection_id from connections;
insert into scope_states (workspace_id, scope_id, blocked_until, blocked_reason, begun_at, is_fresh)
select r.workspace_id, r.model_scope_id, max(s.blocked_until),
    (array_agg(s.blocked_reason order by s.blocked_until desc))[1], now(), false
from resources r
join resource_states s on s.workspace_id = r.workspace_id and s.resource_id = r.resource_id
group by r.workspace_id, r.model_scope_id;
alter table resource_states
    drop column blocked_until,
    drop column blocked_reason,
    add column recent_outputs int[] not null default '{}',
    add column output_high int,
    add column output_mean double precision,
    add column lower_credit double precision not null default 0;

alter table limits
    add column input_tokens bigint,
    add column output_tokens bigint,
    add column sliding boolean,
    add column source limit_source not null default 'given',
    add column observed_at timestamptz,
    add column dimension text,
    add column parent_id uuid;
update limits set sliding = period in ('minute', 'hour');
alter table limits
    alter column sliding set not null,
    drop constraint limits_limit_something,
    add constraint limits_parent_fkey foreign key (workspace_id, parent_id) references limits
        on delete cascade,
    add constraint limits_limit_something check (
        source = 'observed' or coalesce(requests, tokens, input_tokens, output_tokens) is not null
    ),
    add constraint limits_input_tokens_positive check (input_tokens > 0),
    add constraint limits_output_tokens_positive check (output_tokens > 0),
    add constraint limits_lifetime_never_slides check (not (sliding and period = 'lifetime'));
insert into limits (workspace_id, limit_id, scope_id, period, sliding, source)
select workspace_id, gen_random_uuid(), scope_id, 'minute', true, 'observed'
from limit_scopes
where kind = 'model';
create unique index limits_observed_unique on limits (workspace_id, scope_id, period)
    where source = 'observed';
create index limits_by_parent on limits (workspace_id, parent_id) where parent_id is not null;

alter table ledger
    add column expected_output_tokens bigint not null default 0,
    add column refused bigint not null default 0,
    add column outside_requests bigint not null default 0,
    add column outside_input_tokens bigint not null default 0,
    add column outside_output_tokens bigint not null default 0;
update ledger set expected_output_tokens = output_tokens where output_tokens > 0;

-- Batches ----------------------------------------------------------------------------------------

alter table batches
    add column weight real not null default 1,
    add column expires_at timestamptz,
    add column expired_at timestamptz,
    add column source_ip text;
alter table flows
    add column scope_ids uuid[] not null default '{}',
    add column created_at timestamptz not null default now(),
    add column expires_at timestamptz,
    add column waits_until timestamptz not null default '-infinity',
    add column waits_for uuid;
update flows f
set scope_ids = array_remove(array[b.batch_id, b.created_by_api_key_id], null), created_at = b.created_at
from batches b
where b.workspace_id = f.workspace_id and b.batch_id = f.batch_id;
create index flows_waiting on flows (workspace_id, waits_for) where is_open and waits_for is not null;
create index flows_expiring on flows (expires_at) where is_open and expires_at is not null;
alter table ready add column reason wait_reason, add column waits_for uuid;
update ready set next_at = now() where next_at < 'infinity';

alter table items add column expected_output_tokens int;
update items set expected_output_tokens = reserved_output_tokens where status = 'running';
alter table attempts add column expected_output_tokens int not null default 0;
update attempts set expected_output_tokens = reserved_output_tokens where outcome = 'lost';
update ledger g
set refused = t.refused
from (
    select a.workspace_id, l.limit_id, slot.at, count(*) as refused
    from attempts a
    cross join unnest(a.reserved_limits) as r (limit_id)
    join limits l on l.workspace_id = a.workspace_id and l.limit_id = r.limit_id
    cross join lateral (
        select case
            when l.period = 'lifetime' then 'epoch'::timestamptz
            when l.sliding then date_bin(case l.period
                when 'minute' then interval '0.5 seconds' else interval '30 seconds' end,
                a.claimed_at, 'epoch')
            else date_trunc(l.period::text, a.claimed_at, 'UTC')
        end as at
    ) slot
    where a.outcome = 'throttled'
    group by a.workspace_id, l.limit_id, slot.at
) t
where g.workspace_id = t.workspace_id and g.limit_id = t.limit_id and g.slot_at = t.at;

-- Comments ---------------------------------------------------------------------------------------

comment on type limit_period is
    'What a limit counts over. Unless the limit says otherwise minute and hour slide, and day, week and '
    'month are those of the UTC calendar; lifetime never resets.';
comment on type scope_kind is
    'What a limit may be set on. model: a model on a connection, which several resources may name; value: '
    'one value of a limit''s dimension, such as one client''s address.';
comment on type limit_source is 'Who set a limit: people, or what a provider says and does.';
comment on type wait_reason is
    'What a resource''s next item waits for: room in a limit, an even pace below it, a call to end, the end '
    'of a rest that the provider asked for, or its own next try.';
comment on type claim_flow is 'Scratch of claim(): a flow that is eligible. Never stored.';
comment on type claim_candidate is 'Scratch of claim(): an item in line. Never stored.';
comment on type claim_pick is 'Scratch of claim(): an item admitted. Never stored.';
comment on type budget is
    'Scratch of claim(): a limit, what of it is left, and what of that the even pace allows at once, with '
    'what comes back per second. Null: no bound. Never stored.';
comment on column connections.concurrency is 'Most calls at once, over all its resources; null is any number.';
comment on column resources.concurrency is 'Most calls at once; null is any number.';
comment on column resources.model_scope_id is
    'The scope of its model on its connection: resources that name the same model share what is learned.';
comment on column resource_states.recent_outputs is
    'Output tokens of a sample of the latest answers, newest first: where the next two come from.';
comment on column resource_states.output_high is
    'Nine of ten recent answers were no longer, in tokens: what a claim reserves. Null: too few were seen.';
comment on column resource_states.output_mean is 'The mean of the same answers: what the pace counts with.';
comment on column resource_states.lower_credit is
    'Tokens that flows of lower priorities may take before the others, their twentieth of what those took.';
comment on table limit_scopes is
    'The mutex of a connection, model, resource, key, batch or value of a dimension. Locked by claims, never '
    'updated: a lock on a row that nobody updates makes no row versions.';
comment on column limit_scopes.scope_id is 'Id of the connection, resource, key or batch; of others one of its own.';
comment on table scope_states is
    'What replies have taught about a connection, or a model on it, shared by all workers: rests that the '
    'provider asked for, the rate it bears, the calls at once it bears. See sql/functions/observe.sql.';
comment on column scope_states.workspace_id is 'The tenant.';
comment on column scope_states.scope_id is 'The scope of the connection or the model.';
comment on column scope_states.blocked_until is 'Nothing is claimed before: the provider asked to wait.';
comment on column scope_states.blocked_reason is 'The provider''s error code of that wait.';
comment on column scope_states.begun_at is 'When the first call was claimed.';
comment on column scope_states.throttled_at is
    'When the rate was last lowered: refusals of calls claimed before belong to the same cohort.';
comment on column scope_states.refusals is 'Cohorts of refused calls since the last answer.';
comment on column scope_states.probed_at is 'When a single call was let out after a refusal.';
comment on column scope_states.ceiling is
    'Requests per minute that the provider bears, as far as refusals have shown; null: none has.';
comment on column scope_states.is_window is
    'Whether the ceiling is the measure of a whole minute, or only of the pace.';
comment on column scope_states.raise_at is 'When the ceiling may next be raised.';
comment on column scope_states.raise_share is 'By which share of itself it is raised then.';
comment on column scope_states.burst_share is 'Share of SLUICE_BURST_S in use; halved when calls below a limit are refused.';
comment on column scope_states.is_fresh is 'Still in its slow start: it has borne all so far.';
comment on column scope_states.answered is 'Calls answered during the slow start.';
comment on column scope_states.concurrency is 'Calls at once that the provider bears, once it was overloaded; null: any number.';
comment on column scope_states.slowed_at is 'When concurrency was last lowered.';
comment on table limits is
    'So many requests and tokens per period, on a scope. All must pass. A model has one observed limit per '
    'minute from the start, at first without any bound: the account of all that was asked of it.';
comment on column limits.input_tokens is 'Most input tokens per period; null is any number.';
comment on column limits.output_tokens is 'Most output tokens per period; null is any number.';
comment on column limits.sliding is
    'Whether it counts the last period up to now, or the present one of the UTC calendar; never changed.';
comment on column limits.source is 'Who set it.';
comment on column limits.observed_at is 'When a reply last stated it; it binds for a week from then.';
comment on column limits.dimension is
    'source-ip, or metadata:FIELD: it is counted apart for every value, by the limits whose parent it is, '
    'and not itself. Null: no.';
comment on column limits.parent_id is 'The limit with a dimension of which this counts one value.';
comment on table ledger is
    'What of each limit is used, in slots: a quarter second of a minute, a 120th of other sliding periods, a '
    'whole calendar period. '
    'Claims add reservations, settling replaces them by true usage in the slot of the claim. No '
    'check on totals: a paid answer may exceed its reservation and must be recorded.';
comment on column ledger.expected_output_tokens is
    'Output tokens: true where known, else what is expected on average; the pace counts with these.';
comment on column ledger.refused is 'Those of the calls that the provider refused for their number.';
comment on column ledger.outside_requests is
    'Calls that the provider counts beyond ours, by its own counters: of other programs, for example.';
comment on column ledger.outside_input_tokens is 'Tokens that the provider counts beyond ours; of both kinds if it does not tell them apart.';
comment on column ledger.outside_output_tokens is 'Output tokens that the provider counts beyond ours.';
comment on column batches.weight is 'Its share among batches of the same priority.';
comment on column batches.expires_at is 'No item is begun from then on; null: no deadline.';
comment on column batches.expired_at is 'When items were first given up because of that; null: never.';
comment on column batches.source_ip is 'Address of the client that created it, for limits per address.';
comment on column flows.scope_ids is
    'The scopes of its own whose limits it must fit besides those of its resource: the batch, the api key, '
    'values of dimensions.';
comment on column flows.created_at is 'When it was made.';
comment on column flows.expires_at is 'The batch''s deadline; urgency rises towards it.';
comment on column flows.waits_until is 'Claims pass it by until then: a limit of its own is used up.';
comment on column flows.waits_for is 'That limit; null: it waits for none.';
comment on column ready.reason is 'What the next item waits for; null: for a worker, or nothing waits.';
comment on column ready.waits_for is 'The limit, or the scope, that it waits for.';
comment on column items.expected_output_tokens is 'What the claim added to the pace of each of them.';
comment on column attempts.expected_output_tokens is 'Output tokens that its claim expected on average.';
