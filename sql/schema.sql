-- The tables of Sluice, as they are now, in reading order. Migrations are the deltas; a test proves
-- that both agree. sql/README.md explains the words, the units and what is a public contract.
--
-- Three rules shape everything here:
--   * every tenant table's key begins with workspace_id, so that the tenant can become a shard;
--   * items are narrow and mutable, their texts lie in immutable tables beside them;
--   * the rows of a batch are partitioned by batch_day, the UTC day in the batch's UUIDv7.

-- Types ------------------------------------------------------------------------------------------

create type work_status as enum ('pending', 'running', 'completed', 'failed', 'cancelled');
comment on type work_status is 'State of an item, and of a batch. The last three are terminal.';

create type ended_reason as enum
    ('answered', 'rejected', 'exhausted', 'crashed', 'expired', 'impossible', 'cancelled');
comment on type ended_reason is 'Why an item ended.';

create type attempt_outcome as enum
    ('answered', 'rejected', 'throttled', 'unreachable', 'lost', 'unsent', 'impossible');
comment on type attempt_outcome is
    'How one provider call ended. lost: its worker vanished, the call may have been made. unsent: '
    'known never to have left the worker. impossible: larger than a limit, never sent.';

create type batch_type as enum ('sync', 'async', 'callback');
comment on type batch_type is 'How the creator follows a batch: by stream, by polling, by callback.';

create type limit_period as enum ('minute', 'hour', 'day', 'week', 'month', 'lifetime');
comment on type limit_period is
    'What a limit counts over. Unless the limit says otherwise minute and hour slide, and day, week and '
    'month are those of the UTC calendar; lifetime never resets.';

create type scope_kind as enum ('connection', 'model', 'resource', 'api_key', 'batch', 'value');
comment on type scope_kind is
    'What a limit may be set on. model: a model on a connection, which several resources may name; value: '
    'one value of a limit''s dimension, such as one client''s address.';

create type limit_source as enum ('given', 'observed');
comment on type limit_source is 'Who set a limit: people, or what a provider says and does.';

create type wait_reason as enum ('capacity', 'pace', 'concurrency', 'cooldown', 'retry');
comment on type wait_reason is
    'What a resource''s next item waits for: room in a limit, an even pace below it, a call to end, the end '
    'of a rest that the provider asked for, or its own next try.';

create type member_role as enum ('owner', 'member', 'read-only');
comment on type member_role is 'What a user may do in a workspace: everything, everything but to admit others, or look.';

create type event_kind as enum (
    'batch-created', 'batch-running', 'batch-completed', 'batch-failed', 'batch-cancelled',
    'item-running', 'item-completed', 'item-failed', 'item-retrying', 'item-cancelled', 'batch-paused'
);
comment on type event_kind is 'What happened; the same word is the action of an SSE frame.';

create type happening as (batch_day date, batch_id uuid, kind event_kind, seqs int[]);
comment on type happening is 'Scratch of events_append(): what to tell of a batch. Never stored.';

create type delivery_status as enum ('pending', 'delivered', 'dead');
comment on type delivery_status is
    'State of a delivery. dead: given up, until somebody asks for it to be delivered again.';

create type submission_status as enum ('validating', 'accepted', 'failed', 'cancelled');
comment on type submission_status is 'What became of a batch that is to be made from a file.';

create type result_kind as enum ('output', 'error');
comment on type result_kind is 'Which file of a batch: the answers, or what ended without one.';

create type claim_flow as (
    batch_id uuid, batch_day date, priority smallint, weight double precision, virtual_time double precision,
    entry double precision, started int, floor int, flows int, mean_output_tokens double precision, scope_ids uuid[], limit_ids uuid[]
);
comment on type claim_flow is 'Scratch of claim(): a flow that is eligible. Never stored.';

create type claim_candidate as (
    flow int, seq int, attempt int, input_tokens int, max_output_tokens int, suspect boolean, is_lower boolean,
    tag double precision
);
comment on type claim_candidate is 'Scratch of claim(): an item in line. Never stored.';

create type claim_pick as (
    flow int, seq int, attempt int, input_tokens int, output_tokens int, expected_output_tokens int,
    impossible boolean, cost_nano bigint
);
comment on type claim_pick is 'Scratch of claim(): an item admitted. Never stored.';

create type taken_item as (
    workspace_id uuid, batch_day date, batch_id uuid, seq int, attempt int, failures int, max_attempts int,
    flow int, input_tokens int, output_tokens int, expected_output_tokens int, impossible boolean,
    timeout_ms int
);
comment on type taken_item is 'Scratch of claim(): one item it took. Never stored.';

create type claim_share as (
    flow int, batch_day date, batch_id uuid, items int, started int, requests int, input_tokens bigint,
    output_tokens bigint, expected_output_tokens bigint, cost_nano bigint, tokens double precision, floor int,
    seqs int[]
);
comment on type claim_share is 'Scratch of claim(): what it took of one flow, together. Never stored.';

create type budget as (
    limit_id uuid, scope_id uuid, most_requests bigint, most_tokens bigint, most_input_tokens bigint,
    most_output_tokens bigint, requests double precision, tokens double precision,
    input_tokens double precision, output_tokens double precision, paced_requests double precision,
    paced_tokens double precision, paced_input_tokens double precision,
    paced_output_tokens double precision, rate_requests double precision, rate_tokens double precision,
    rate_input_tokens double precision, rate_output_tokens double precision, most_cost_nano bigint,
    cost_nano double precision
);
comment on type budget is
    'Scratch of claim(): a limit, what of it is left, and what of that the even pace allows at once, with '
    'what comes back per second. Null: no bound. Never stored.';

create type settled_item as (
    ord int, workspace_id uuid, batch_day date, batch_id uuid, resource_id uuid, seq int, attempt int,
    was work_status, becomes work_status, reason ended_reason, visible_at timestamptz,
    failures int, crashes int, moves_to uuid
);
comment on type settled_item is
    'Scratch of settle(), reclaim() and expire(): one transition; moves_to: the resource that is asked next, '
    'if another one. Never stored.';

-- Tenants ----------------------------------------------------------------------------------------

create table users (
    user_id uuid not null,
    issuer text not null,
    subject text not null,
    name text,
    first_name text,
    last_name text,
    username text,
    email text,
    email_verified boolean not null default false,
    picture_url text,
    created_at timestamptz not null default now(),
    updated_at timestamptz not null default now(),
    last_seen_at timestamptz not null default now(),
    constraint users_pkey primary key (user_id),
    constraint users_subject_unique unique (issuer, subject)
);
comment on table users is
    'A person, as the issuer of identities describes them; made when they are first seen. Belongs to no tenant.';
comment on column users.user_id is 'UUIDv7, minted by the application.';
comment on column users.issuer is 'Who vouches for them: iss of their tokens.';
comment on column users.subject is 'Their id there: sub of their tokens. Names and addresses may change, this does not.';
comment on column users.name is 'For people, as the newest token says; so are the following.';
comment on column users.first_name is 'For people.';
comment on column users.last_name is 'For people.';
comment on column users.username is 'For people.';
comment on column users.email is 'For people; never used to decide who they are.';
comment on column users.email_verified is 'Whether the issuer says that it verified the address.';
comment on column users.picture_url is 'For people.';
comment on column users.created_at is 'When they were first seen.';
comment on column users.updated_at is 'When what the issuer says of them last changed.';
comment on column users.last_seen_at is 'When they last came, to the minute.';

create table workspaces (
    workspace_id uuid not null,
    name text not null,
    description text,
    created_at timestamptz not null default now(),
    updated_at timestamptz not null default now(),
    deleted_at timestamptz,
    quota_items bigint,
    quota_batches bigint,
    quota_bytes bigint,
    keep_days int,
    keep_texts_days int,
    constraint workspaces_pkey primary key (workspace_id),
    constraint workspaces_quotas_not_negative check (least(quota_items, quota_batches, quota_bytes) >= 0),
    constraint workspaces_keep_days_positive check (keep_days > 0),
    constraint workspaces_keep_texts_days_positive check (keep_texts_days > 0)
);
comment on table workspaces is 'A tenant. No statement but an operator''s ever crosses one.';
comment on column workspaces.workspace_id is 'UUIDv7, minted by the application.';
comment on column workspaces.name is 'For people.';
comment on column workspaces.description is 'For people.';
comment on column workspaces.created_at is 'When the row was made.';
comment on column workspaces.quota_items is
    'Most items that have not ended; 0: any number, null: what SLUICE_QUOTA_ITEMS says.';
comment on column workspaces.quota_batches is
    'Most batches that have not ended; 0: any number, null: what SLUICE_QUOTA_BATCHES says.';
comment on column workspaces.quota_bytes is
    'Most bytes of their requests; 0: any number, null: what SLUICE_QUOTA_BYTES says.';
comment on column workspaces.updated_at is 'When a person last changed it.';
comment on column workspaces.deleted_at is 'Nobody enters it from then on; its history stays.';
comment on column workspaces.keep_days is
    'Its items, attempts and events are kept so many days; null: as SLUICE_RETENTION_DAYS says.';
comment on column workspaces.keep_texts_days is
    'Its prompts and answers are kept so many days; null: as SLUICE_RETENTION_TEXTS_DAYS says.';

create table workspace_members (
    workspace_id uuid not null references workspaces,
    user_id uuid not null references users,
    role member_role not null,
    added_at timestamptz not null default now(),
    added_by uuid,
    constraint workspace_members_pkey primary key (workspace_id, user_id)
);
create index workspace_members_by_user on workspace_members (user_id);
comment on table workspace_members is 'Which users may enter a workspace, and what they may do there.';
comment on column workspace_members.workspace_id is 'The tenant.';
comment on column workspace_members.user_id is 'The user.';
comment on column workspace_members.role is 'What they may do.';
comment on column workspace_members.added_at is 'When they were admitted.';
comment on column workspace_members.added_by is 'The user who admitted them; null: the operator.';

create table environments (
    workspace_id uuid not null references workspaces,
    environment_id uuid not null,
    name text not null,
    description text,
    created_at timestamptz not null default now(),
    updated_at timestamptz not null default now(),
    deleted_at timestamptz,
    constraint environments_pkey primary key (workspace_id, environment_id)
);
create unique index environments_name_unique on environments (workspace_id, name) where deleted_at is null;
comment on table environments is 'A stage of a workspace, such as test or production.';
comment on column environments.workspace_id is 'The tenant.';
comment on column environments.environment_id is 'UUIDv7, minted by the application.';
comment on column environments.name is 'For people; unique in its workspace while it lasts.';
comment on column environments.description is 'For people.';
comment on column environments.created_at is 'When the row was made.';
comment on column environments.updated_at is 'When a person last changed it.';
comment on column environments.deleted_at is 'Nobody enters it from then on; its history stays.';

create table api_keys (
    workspace_id uuid not null,
    api_key_id uuid not null,
    environment_id uuid not null,
    name text not null,
    description text,
    hash bytea not null,
    masked_key text not null,
    enabled boolean not null default true,
    resources text[] not null default '{*}',
    labels text[] not null default '{}',
    enforce_capacity boolean not null default true,
    capacity jsonb not null default '[]',
    expires_at timestamptz,
    last_used_at timestamptz,
    permissions text[] not null default '{*}',
    previous_hash bytea,
    previous_until timestamptz,
    rotated_at timestamptz,
    deleted_at timestamptz,
    created_by uuid,
    updated_by uuid,
    created_at timestamptz not null default now(),
    updated_at timestamptz not null default now(),
    constraint api_keys_pkey primary key (workspace_id, api_key_id),
    constraint api_keys_environment_fkey foreign key (workspace_id, environment_id)
        references environments,
    constraint api_keys_hash_is_sha256 check (length(hash) = 32),
    constraint api_keys_previous_has_an_end check ((previous_hash is null) = (previous_until is null)),
    constraint api_keys_deleted_opens_nothing check (deleted_at is null or not enabled)
);
create index api_keys_by_hash on api_keys (hash);
create index api_keys_by_previous_hash on api_keys (previous_hash) where previous_hash is not null;
comment on table api_keys is 'How a program enters. The key itself is shown once and never stored.';
comment on column api_keys.workspace_id is 'The tenant.';
comment on column api_keys.api_key_id is 'UUIDv7, minted by the application.';
comment on column api_keys.environment_id is 'The only environment the key opens.';
comment on column api_keys.name is 'For people.';
comment on column api_keys.description is 'For people.';
comment on column api_keys.hash is 'SHA-256 of the key; 256 random bits need no salt.';
comment on column api_keys.masked_key is 'Enough of the key to recognise it.';
comment on column api_keys.enabled is 'A disabled key is refused like an unknown one.';
comment on column api_keys.resources is 'Resource ids that the key may use; * is every one.';
comment on column api_keys.labels is 'For people.';
comment on column api_keys.enforce_capacity is 'Whether the key''s own capacity counts.';
comment on column api_keys.capacity is 'Limits as the wire gave them.';
comment on column api_keys.expires_at is 'Refused from then on; null never.';
comment on column api_keys.last_used_at is 'When it last opened a door, to the minute.';
comment on column api_keys.permissions is
    'Actions that the key may perform, as patterns in which * stands for any text: completion-batch:get, *:list.';
comment on column api_keys.previous_hash is 'The hash before its rotation, which opens until previous_until.';
comment on column api_keys.previous_until is 'End of the overlap of its rotation.';
comment on column api_keys.rotated_at is 'When it was last given a new value.';
comment on column api_keys.deleted_at is 'It is shown no more from then on; batches still name their creator.';
comment on column api_keys.created_by is 'The user or the key that made it; null: the operator.';
comment on column api_keys.updated_by is 'The user or the key that last changed it; null: nobody did.';
comment on column api_keys.created_at is 'When the row was made.';
comment on column api_keys.updated_at is 'When a person last changed it.';

-- Providers --------------------------------------------------------------------------------------

create table connections (
    workspace_id uuid not null,
    connection_id uuid not null,
    environment_id uuid not null,
    name text not null,
    description text,
    provider text not null,
    base_url text not null,
    secret_key_id text,
    secret bytea,
    headers jsonb not null default '{}',
    allowed_models text[],
    capacity jsonb not null default '[]',
    timeout_ms int not null default 300000,
    concurrency int,
    created_at timestamptz not null default now(),
    updated_at timestamptz not null default now(),
    created_by uuid,
    updated_by uuid,
    constraint connections_pkey primary key (workspace_id, connection_id),
    constraint connections_environment_fkey foreign key (workspace_id, environment_id)
        references environments,
    constraint connections_name_unique unique (workspace_id, environment_id, name),
    constraint connections_timeout_positive check (timeout_ms > 0),
    constraint connections_concurrency_positive check (concurrency > 0),
    constraint connections_secret_names_its_key check ((secret is null) = (secret_key_id is null))
);
comment on table connections is 'An account at a provider: where it is, how to enter, its capacity.';
comment on column connections.workspace_id is 'The tenant.';
comment on column connections.connection_id is 'UUIDv7, minted by the application.';
comment on column connections.environment_id is 'The environment it belongs to.';
comment on column connections.name is 'For people; unique in its environment.';
comment on column connections.description is 'For people.';
comment on column connections.provider is 'Which preset it was made from, such as openai.';
comment on column connections.base_url is 'Where the provider''s API is.';
comment on column connections.secret_key_id is 'Which key of SLUICE_SECRET_KEY sealed the secret.';
comment on column connections.secret is 'The provider''s API key, AES-256-GCM, bound to this row.';
comment on column connections.headers is 'Headers that every call carries.';
comment on column connections.allowed_models is 'Models that resources may name; null is any.';
comment on column connections.capacity is 'Limits as the wire gave them; limits has the enabled ones.';
comment on column connections.timeout_ms is 'Longest time that one call may take, in milliseconds.';
comment on column connections.concurrency is 'Most calls at once, over all its resources; null is any number.';
comment on column connections.created_at is 'When the row was made.';
comment on column connections.updated_at is 'When a person last changed it.';
comment on column connections.created_by is 'The user or key that made it; null: the command line.';
comment on column connections.updated_by is 'The user or key that last changed it; null: nobody, or the command line.';

create table resources (
    workspace_id uuid not null,
    resource_id uuid not null,
    environment_id uuid not null,
    connection_id uuid not null,
    name text not null,
    description text,
    model text not null,
    default_args jsonb not null default '{}',
    capacity jsonb not null default '[]',
    enforce_capacity boolean not null default true,
    timeout_ms int,
    concurrency int,
    model_scope_id uuid not null,
    created_at timestamptz not null default now(),
    updated_at timestamptz not null default now(),
    owner_id uuid,
    use_fallback boolean not null default true,
    fallback_ids uuid[] not null default '{}',
    fallback_on jsonb not null default '{}',
    secondary_ids uuid[] not null default '{}',
    routing jsonb,
    created_by uuid,
    updated_by uuid,
    constraint resources_pkey primary key (workspace_id, resource_id),
    constraint resources_environment_fkey foreign key (workspace_id, environment_id)
        references environments,
    constraint resources_connection_fkey foreign key (workspace_id, connection_id)
        references connections,
    constraint resources_owner_fkey foreign key (workspace_id, owner_id) references resources
        on delete cascade,
    constraint resources_timeout_positive check (timeout_ms > 0),
    constraint resources_concurrency_positive check (concurrency > 0),
    constraint resources_alternates_have_none check (
        owner_id is null or (fallback_ids = '{}' and secondary_ids = '{}' and routing is null)
    )
);
create unique index resources_name_unique on resources (workspace_id, environment_id, name)
    where owner_id is null;
create unique index resources_alternate_unique on resources (workspace_id, owner_id, connection_id, model)
    where owner_id is not null;
create index resources_by_connection on resources (workspace_id, connection_id);
comment on table resources is
    'A named model on a connection. Items name a resource. A resource''s other models (fallbacks, secondary '
    'models, targets of its routing rules) are rows too, its alternates, so that each is claimed, limited and '
    'counted like any other; nobody names those.';
comment on column resources.workspace_id is 'The tenant.';
comment on column resources.resource_id is 'UUIDv7, minted by the application.';
comment on column resources.environment_id is 'The environment it belongs to.';
comment on column resources.connection_id is 'The account that answers.';
comment on column resources.name is 'For people and programs; unique in its environment.';
comment on column resources.description is 'For people.';
comment on column resources.model is 'The model''s name at the provider.';
comment on column resources.default_args is 'Request fields used where a request has none.';
comment on column resources.capacity is 'Limits as the wire gave them; limits has those in force.';
comment on column resources.enforce_capacity is 'Whether the resource''s own capacity counts.';
comment on column resources.timeout_ms is 'Longest time of one call, in milliseconds; null: the connection''s.';
comment on column resources.concurrency is 'Most calls at once; null is any number.';
comment on column resources.model_scope_id is
    'The scope of its model on its connection: resources that name the same model share what is learned.';
comment on column resources.created_at is 'When the row was made.';
comment on column resources.updated_at is 'When a person last changed it.';
comment on column resources.owner_id is 'The resource whose alternate this is; null: people made it.';
comment on column resources.use_fallback is 'Whether its fallbacks are taken.';
comment on column resources.fallback_ids is 'The alternates to ask where this one cannot answer, in order.';
comment on column resources.fallback_on is 'After which outcomes, as the wire gave it; see fallback_of().';
comment on column resources.secondary_ids is 'The alternates that a request may choose by their position.';
comment on column resources.routing is 'Rules that choose an alternate, or refuse, as items are created.';
comment on column resources.created_by is 'The user or key that made it; null: the command line.';
comment on column resources.updated_by is 'The user or key that last changed it; null: nobody, or the command line.';

create table resource_states (
    workspace_id uuid not null,
    resource_id uuid not null,
    recent_outputs int[] not null default '{}',
    output_high int,
    output_mean double precision,
    lower_credit double precision not null default 0,
    constraint resource_states_pkey primary key (workspace_id, resource_id)
) with (fillfactor = 50, autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 200);
comment on table resource_states is
    'What is learned about a resource while it runs; apart from resources, which people change.';
comment on column resource_states.workspace_id is 'The tenant.';
comment on column resource_states.resource_id is 'The resource.';
comment on column resource_states.recent_outputs is
    'Output tokens of a sample of the latest answers, newest first: where the next two come from.';
comment on column resource_states.output_high is
    'Nine of ten recent answers were no longer, in tokens: what a claim reserves. Null: too few were seen.';
comment on column resource_states.output_mean is 'The mean of the same answers: what the pace counts with.';
comment on column resource_states.lower_credit is
    'Tokens that flows of lower priorities may take before the others, their twentieth of what those took.';

-- Capacity ---------------------------------------------------------------------------------------

create table limit_scopes (
    workspace_id uuid not null,
    scope_id uuid not null,
    kind scope_kind not null,
    constraint limit_scopes_pkey primary key (workspace_id, scope_id)
);
comment on table limit_scopes is
    'The mutex of a connection, model, resource, key, batch or value of a dimension. Locked by claims, never '
    'updated: a lock on a row that nobody updates makes no row versions.';
comment on column limit_scopes.workspace_id is 'The tenant.';
comment on column limit_scopes.scope_id is 'Id of the connection, resource, key or batch; of others one of its own.';
comment on column limit_scopes.kind is 'What the id names.';

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

create table limits (
    workspace_id uuid not null,
    limit_id uuid not null,
    scope_id uuid not null,
    period limit_period not null,
    requests bigint,
    tokens bigint,
    created_at timestamptz not null default now(),
    updated_at timestamptz not null default now(),
    input_tokens bigint,
    output_tokens bigint,
    sliding boolean not null,
    source limit_source not null default 'given',
    observed_at timestamptz,
    dimension text,
    parent_id uuid,
    cost_nano bigint,
    constraint limits_pkey primary key (workspace_id, limit_id),
    constraint limits_scope_fkey foreign key (workspace_id, scope_id) references limit_scopes
        on delete cascade,
    constraint limits_parent_fkey foreign key (workspace_id, parent_id) references limits
        on delete cascade,
    constraint limits_limit_something check (
        source = 'observed' or coalesce(requests, tokens, input_tokens, output_tokens, cost_nano) is not null
    ),
    constraint limits_requests_positive check (requests > 0),
    constraint limits_tokens_positive check (tokens > 0),
    constraint limits_input_tokens_positive check (input_tokens > 0),
    constraint limits_output_tokens_positive check (output_tokens > 0),
    constraint limits_cost_positive check (cost_nano > 0),
    constraint limits_cost_is_of_a_lifetime check (cost_nano is null or period = 'lifetime'),
    constraint limits_lifetime_never_slides check (not (sliding and period = 'lifetime'))
);
create index limits_by_scope on limits (workspace_id, scope_id);
create unique index limits_observed_unique on limits (workspace_id, scope_id, period)
    where source = 'observed';
create index limits_by_parent on limits (workspace_id, parent_id) where parent_id is not null;
comment on table limits is
    'So many requests and tokens per period, on a scope. All must pass. A model has one observed limit per '
    'minute from the start, at first without any bound: the account of all that was asked of it.';
comment on column limits.workspace_id is 'The tenant.';
comment on column limits.limit_id is 'UUIDv7; the ledger''s account. Kept when the amounts change.';
comment on column limits.scope_id is 'What it is set on.';
comment on column limits.period is 'What it counts over; never changed.';
comment on column limits.requests is 'Most requests per period; null is any number.';
comment on column limits.tokens is 'Most input and output tokens per period; null is any number.';
comment on column limits.created_at is 'When the row was made.';
comment on column limits.updated_at is 'When the amounts were last changed.';
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
comment on column limits.cost_nano is 'Most money per period, in billionths of the currency; null is any amount.';

create table ledger (
    workspace_id uuid not null,
    limit_id uuid not null,
    slot_at timestamptz not null,
    requests bigint not null,
    input_tokens bigint not null,
    output_tokens bigint not null,
    expected_output_tokens bigint not null default 0,
    refused bigint not null default 0,
    outside_requests bigint not null default 0,
    outside_input_tokens bigint not null default 0,
    outside_output_tokens bigint not null default 0,
    cost_nano bigint not null default 0,
    constraint ledger_pkey primary key (workspace_id, limit_id, slot_at)
) with (fillfactor = 50, autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 500);
comment on table ledger is
    'What of each limit is used, in slots: a quarter second of a minute, a 120th of other sliding periods, a '
    'whole calendar period. '
    'Claims add reservations, settling replaces them by true usage in the slot of the claim. No '
    'check on totals: a paid answer may exceed its reservation and must be recorded.';
comment on column ledger.workspace_id is 'The tenant.';
comment on column ledger.limit_id is 'The limit that this is used of.';
comment on column ledger.slot_at is 'When the slot began.';
comment on column ledger.requests is 'Calls claimed in the slot, less those known to be unsent.';
comment on column ledger.input_tokens is 'Input tokens: true where known, else reserved.';
comment on column ledger.output_tokens is 'Output tokens: true where known, else reserved.';
comment on column ledger.expected_output_tokens is
    'Output tokens: true where known, else what is expected on average; the pace counts with these.';
comment on column ledger.refused is 'Those of the calls that the provider refused for their number.';
comment on column ledger.outside_requests is
    'Calls that the provider counts beyond ours, by its own counters: of other programs, for example.';
comment on column ledger.outside_input_tokens is 'Tokens that the provider counts beyond ours; of both kinds if it does not tell them apart.';
comment on column ledger.outside_output_tokens is 'Output tokens that the provider counts beyond ours.';
comment on column ledger.cost_nano is
    'Money in billionths: true where known, else reserved. Counted where a limit of the item bounds it.';

-- Batches ----------------------------------------------------------------------------------------

create table batches (
    workspace_id uuid not null,
    batch_id uuid not null,
    environment_id uuid not null,
    batch_day date not null,
    type batch_type not null,
    status work_status not null default 'pending',
    endpoint text not null default '/v1/chat/completions',
    name text,
    metadata jsonb not null default '{}',
    capacity jsonb not null default '[]',
    callback_options jsonb,
    priority smallint not null default 0,
    total_items int not null,
    estimated_input_tokens bigint not null,
    idempotency_key text,
    request_hash bytea,
    created_by_api_key_id uuid,
    created_at timestamptz not null default now(),
    started_at timestamptz,
    cancelled_at timestamptz,
    completed_at timestamptz,
    weight real not null default 1,
    expires_at timestamptz,
    expired_at timestamptz,
    source_ip text,
    redrives int not null default 0,
    created_by_user_id uuid,
    timeout_ms int,
    max_attempts smallint,
    max_tokens bigint,
    max_cost_nano bigint,
    currency text,
    pause_reason text,
    texts_erased_at timestamptz,
    constraint batches_pkey primary key (workspace_id, batch_id),
    constraint batches_environment_fkey foreign key (workspace_id, environment_id)
        references environments,
    constraint batches_has_items check (total_items > 0),
    constraint batches_priority_in_range check (priority between -100 and 100),
    constraint batches_end_has_a_time check
        ((status in ('completed', 'failed')) <= (completed_at is not null)),
    constraint batches_cancel_has_a_time check ((status = 'cancelled') = (cancelled_at is not null)),
    constraint batches_max_cost_has_a_currency check ((max_cost_nano is null) = (currency is null)),
    constraint batches_pause_reason_known check (pause_reason in ('max-tokens', 'max-cost')),
    constraint batches_running_has_started check (status <> 'running' or started_at is not null),
    constraint batches_timeout_positive check (timeout_ms > 0),
    constraint batches_max_attempts_positive check (max_attempts > 0)
);
create unique index batches_idempotency_key_unique
    on batches (workspace_id, environment_id, idempotency_key) where idempotency_key is not null;
create index batches_newest on batches (workspace_id, environment_id, batch_id desc);
create index batches_erasing on batches (batch_day) where texts_erased_at = 'infinity';
comment on table batches is
    'What was submitted together. Changed only when its state changes: progress is in flows.';
comment on column batches.workspace_id is 'The tenant.';
comment on column batches.batch_id is 'UUIDv7, minted by the application.';
comment on column batches.environment_id is 'The environment it belongs to.';
comment on column batches.batch_day is 'UTC day in the id; the partition of all its rows.';
comment on column batches.type is 'How the creator follows it.';
comment on column batches.status is
    'running from its first claim; cancelled from the cancel on, though calls may still be out.';
comment on column batches.endpoint is 'Path of the provider''s API that its items call.';
comment on column batches.name is 'For people.';
comment on column batches.metadata is 'The creator''s own facts.';
comment on column batches.capacity is 'Limits of this batch as the wire gave them.';
comment on column batches.callback_options is 'Where callbacks go, without secrets; endpoints has them.';
comment on column batches.priority is 'Higher goes first; -100 to 100.';
comment on column batches.total_items is 'How many items it was created with.';
comment on column batches.estimated_input_tokens is 'Sum of the items'' estimates at creation.';
comment on column batches.idempotency_key is 'A second creation with the same key returns this batch.';
comment on column batches.request_hash is 'SHA-256 of the creating request, to tell a true repeat.';
comment on column batches.created_by_api_key_id is 'The key that created it; null: a user, or the command line.';
comment on column batches.created_by_user_id is 'The user who created it; null: a key, or the command line.';
comment on column batches.created_at is 'When it was accepted.';
comment on column batches.started_at is 'When its first item was claimed.';
comment on column batches.cancelled_at is 'When it was cancelled.';
comment on column batches.completed_at is 'When its last item ended.';
comment on column batches.weight is 'Its share among batches of the same priority.';
comment on column batches.expires_at is 'No item is begun from then on; null: no deadline.';
comment on column batches.expired_at is 'When items were first given up because of that; null: never.';
comment on column batches.source_ip is 'Address of the client that created it, for limits per address.';
comment on column batches.redrives is 'How often failed items were put back; its error file begins anew each time.';
comment on column batches.timeout_ms is
    'Longest time of one call as its creator wanted it, in milliseconds; null: that of the resource.';
comment on column batches.max_attempts is 'Failures before an item fails, as its creator wanted it; null: the usual.';
comment on column batches.max_tokens is 'It pauses when its calls have used so many tokens; null: any number.';
comment on column batches.max_cost_nano is
    'It pauses when its calls have cost so many billionths of the currency; null: any amount.';
comment on column batches.currency is 'The currency of max_cost_nano.';
comment on column batches.pause_reason is 'Which of both paused it; null: none, though people may have.';
comment on column batches.texts_erased_at is
    'When its prompts and answers were erased; infinity: that has been asked for and is going on.';

create table flows (
    workspace_id uuid not null,
    batch_id uuid not null,
    resource_id uuid not null,
    batch_day date not null,
    is_open boolean not null default true,
    is_paused boolean not null default false,
    is_cancelled boolean not null default false,
    priority smallint not null default 0,
    weight real not null default 1,
    virtual_time double precision not null,
    floor int not null default 0,
    total int not null,
    unstarted int not null,
    pending int not null,
    running int not null default 0,
    completed int not null default 0,
    failed int not null default 0,
    cancelled int not null default 0,
    unmarked int not null default 0,
    retries int not null default 0,
    input_tokens bigint not null default 0,
    output_tokens bigint not null default 0,
    scope_ids uuid[] not null default '{}',
    created_at timestamptz not null default now(),
    expires_at timestamptz,
    waits_until timestamptz not null default '-infinity',
    waits_for uuid,
    request_bytes bigint not null default 0,
    cached_tokens bigint not null default 0,
    reasoning_tokens bigint not null default 0,
    is_aborted boolean not null default false,
    cost_nano bigint not null default 0,
    currency text,
    constraint flows_pkey primary key (workspace_id, batch_id, resource_id),
    constraint flows_counts_add_up check (pending + running + completed + failed + cancelled = total),
    constraint flows_counts_not_negative check (
        least(unstarted, pending, running, completed, failed, cancelled, unmarked) >= 0
    ),
    constraint flows_unstarted_are_pending check (unstarted <= pending),
    constraint flows_weight_in_range check (weight between 0.1 and 100),
    constraint flows_cancelled_have_no_pending check (not is_cancelled or pending = 0),
    constraint flows_aborted_are_cancelled check (is_cancelled or not is_aborted),
    constraint flows_open_while_unfinished check (is_open = (pending + running + unmarked > 0))
) with (fillfactor = 50, autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 200);
create index flows_open on flows (workspace_id, resource_id) where is_open;
create index flows_waiting on flows (workspace_id, waits_for) where is_open and waits_for is not null;
create index flows_expiring on flows (expires_at) where is_open and expires_at is not null;
comment on table flows is
    'The share of one batch that goes to one resource: what the scheduler ranks, and the counters '
    'of progress. Reading a batch''s progress is reading its few flows, never counting items.';
comment on column flows.workspace_id is 'The tenant.';
comment on column flows.batch_id is 'The batch.';
comment on column flows.resource_id is 'The resource.';
comment on column flows.batch_day is 'The batch''s day.';
comment on column flows.is_open is 'Whether anything of it is still to be done.';
comment on column flows.is_paused is 'Whether claims pass it by for now.';
comment on column flows.is_cancelled is 'Cancelled: nothing is claimed, whatever its item rows say.';
comment on column flows.priority is 'The batch''s priority.';
comment on column flows.weight is 'Its share among flows of the same priority.';
comment on column flows.virtual_time is 'Tokens taken divided by weight (start-time fair queueing).';
comment on column flows.floor is 'No item below this number is pending and unstarted.';
comment on column flows.total is 'Items.';
comment on column flows.unstarted is 'Pending items that were never claimed.';
comment on column flows.pending is 'Items waiting, unstarted or to be tried again.';
comment on column flows.running is 'Items with a call in flight.';
comment on column flows.completed is 'Items answered.';
comment on column flows.failed is 'Items that ended without an answer.';
comment on column flows.cancelled is 'Items cancelled.';
comment on column flows.unmarked is 'Cancelled items whose rows still say pending.';
comment on column flows.retries is
    'Returns to the queue: failures, throttles, lost workers, and calls released unsent.';
comment on column flows.input_tokens is 'Input tokens of answered items, as the provider counted.';
comment on column flows.output_tokens is 'Output tokens of answered items, as the provider counted.';
comment on column flows.scope_ids is
    'The scopes of its own whose limits it must fit besides those of its resource: the batch, the api key, '
    'values of dimensions.';
comment on column flows.created_at is 'When it was made.';
comment on column flows.expires_at is 'The batch''s deadline; urgency rises towards it.';
comment on column flows.waits_until is 'Claims pass it by until then: a limit of its own is used up.';
comment on column flows.waits_for is 'That limit; null: it waits for none.';
comment on column flows.request_bytes is 'Size of its requests as they were submitted.';
comment on column flows.cached_tokens is 'Those of its input tokens that the provider had cached.';
comment on column flows.reasoning_tokens is 'Those of its output tokens that were reasoning.';
comment on column flows.is_aborted is 'Cancelled with all its calls: workers cut those in flight.';
comment on column flows.cost_nano is 'What its attempts cost, in billionths of the currency.';
comment on column flows.currency is 'The currency of the latest price that was applied; null: none was.';

create table ready (
    workspace_id uuid not null,
    resource_id uuid not null,
    next_at timestamptz not null,
    reason wait_reason,
    waits_for uuid,
    constraint ready_pkey primary key (workspace_id, resource_id)
) with (fillfactor = 50, autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 200);
comment on table ready is
    'Where due work may be, and from when: the one thing that workers look at across tenants.';
comment on column ready.workspace_id is 'The tenant.';
comment on column ready.resource_id is 'The resource.';
comment on column ready.next_at is 'Looking earlier is in vain; infinity: nothing waits.';
comment on column ready.reason is 'What the next item waits for; null: for a worker, or nothing waits.';
comment on column ready.waits_for is 'The limit, or the scope, that it waits for.';

-- Items: the rows of a batch, partitioned by its day ---------------------------------------------

create table items (
    workspace_id uuid not null,
    batch_day date not null,
    batch_id uuid not null,
    resource_id uuid not null,
    visible_at timestamptz not null default now(),
    claimed_at timestamptz,
    ended_at timestamptz,
    seq int not null,
    attempt int not null default 0,
    input_tokens int not null,
    max_output_tokens int,
    reserved_input_tokens int,
    reserved_output_tokens int,
    status work_status not null default 'pending',
    ended_reason ended_reason,
    failures smallint not null default 0,
    crashes smallint not null default 0,
    crashes_alone smallint not null default 0,
    max_attempts smallint not null default 5,
    worker_id uuid,
    reserved_limits uuid[],
    expected_output_tokens int,
    timeout_ms int,
    reserved_cost_nano bigint,
    constraint items_pkey primary key (workspace_id, batch_day, batch_id, seq),
    constraint items_timeout_positive check (timeout_ms > 0),
    constraint items_attempt_not_negative check (attempt >= 0 and failures >= 0 and crashes >= 0),
    constraint items_seq_not_negative check (seq >= 0),
    constraint items_running_has_a_lease check (
        (status = 'running')
        = (worker_id is not null and claimed_at is not null and reserved_limits is not null)
    ),
    constraint items_end_has_a_reason check (
        (status in ('completed', 'failed', 'cancelled'))
        = (ended_reason is not null and ended_at is not null)
    ),
    constraint items_answered_is_completed check (
        (status = 'completed') = (ended_reason is not distinct from 'answered')
    ),
    constraint items_worked_on_has_an_attempt check (
        attempt > 0 or status in ('pending', 'cancelled', 'failed')
    )
) partition by range (batch_day);
create index items_first on items (workspace_id, batch_id, resource_id, seq)
    where status = 'pending' and attempt = 0;
create index items_again on items (workspace_id, batch_id, resource_id, visible_at, seq)
    where status = 'pending' and attempt > 0;
create index items_running on items (visible_at) where status = 'running';
-- The dead letters. Only what fails gets an entry; with item_results_failed it counts them by class on its own.
create index items_failed on items (workspace_id, resource_id, ended_at) include (batch_day, batch_id, seq)
    where status = 'failed';
comment on table items is
    'One request of a batch: its state only. Narrow, because it is updated two or three times. Its id '
    'is item_id(batch_id, seq).';
comment on column items.workspace_id is 'The tenant.';
comment on column items.batch_day is 'The batch''s day.';
comment on column items.batch_id is 'The batch.';
comment on column items.resource_id is 'The resource that answers it.';
comment on column items.visible_at is
    'Delay, backoff and visibility timeout in one: a pending item may be claimed from then on, a '
    'running one is given up for lost.';
comment on column items.claimed_at is 'The claim''s clock; the ledger slots it reserved follow from it.';
comment on column items.ended_at is 'When it came to its terminal state.';
comment on column items.seq is 'Number in the batch, from 0, in the order of submission.';
comment on column items.attempt is 'The fencing number: +1 at every claim, never reused or lowered.';
comment on column items.input_tokens is 'Estimate of the prompt''s tokens.';
comment on column items.max_output_tokens is 'The request''s own bound of the answer; null: none.';
comment on column items.reserved_input_tokens is 'What the claim took from each of reserved_limits.';
comment on column items.reserved_output_tokens is 'What the claim took from each of reserved_limits.';
comment on column items.status is 'Its state.';
comment on column items.ended_reason is 'Why it ended.';
comment on column items.failures is 'Attempts that ended in a provider''s failure.';
comment on column items.crashes is 'Attempts whose worker vanished.';
comment on column items.crashes_alone is 'Crashes in which it was all that its worker was doing.';
comment on column items.max_attempts is 'It fails for good with this many failures.';
comment on column items.worker_id is 'Who holds the lease.';
comment on column items.reserved_limits is 'The limits that the claim reserved from.';
comment on column items.expected_output_tokens is 'What the claim added to the pace of each of them.';
comment on column items.timeout_ms is 'Longest time of one call, in milliseconds; null: that of the resource.';
comment on column items.reserved_cost_nano is
    'What the claim took from limits of cost, in billionths; null: none bounds it.';

create table item_requests (
    workspace_id uuid not null,
    batch_day date not null,
    batch_id uuid not null,
    seq int not null,
    custom_id text,
    body json not null,
    vmx jsonb,
    erased_at timestamptz,
    constraint item_requests_pkey primary key (workspace_id, batch_day, batch_id, seq)
) partition by range (batch_day);
comment on table item_requests is 'What is asked. Never changed but by its erasure.';
comment on column item_requests.workspace_id is 'The tenant.';
comment on column item_requests.batch_day is 'The batch''s day.';
comment on column item_requests.batch_id is 'The batch.';
comment on column item_requests.seq is 'The item.';
comment on column item_requests.custom_id is 'The creator''s own name for it.';
comment on column item_requests.body is
    'The request to the letter. json, not jsonb: key order, numbers and escapes stay as they came.';
comment on column item_requests.vmx is
    'The body''s member of that name, which is for Sluice and not sent on; null: it has none.';
comment on column item_requests.erased_at is 'When it and its answer were erased: both say null since.';

create table item_results (
    workspace_id uuid not null,
    batch_day date not null,
    batch_id uuid not null,
    seq int not null,
    attempt int not null,
    ended_at timestamptz not null,
    status_code smallint,
    input_tokens int,
    output_tokens int,
    model text,
    error_code text,
    error_message text,
    headers jsonb,
    body json,
    constraint item_results_pkey primary key (workspace_id, batch_day, batch_id, seq),
    constraint item_results_answer_or_error check (error_code is not null or body is not null)
) partition by range (batch_day);
create index item_results_failed on item_results (workspace_id, batch_id, seq)
    include (batch_day, error_code, status_code)
    where error_code is not null;
comment on table item_results is
    'What came back for an item that was answered or failed. Never changed but by its erasure.';
comment on column item_results.workspace_id is 'The tenant.';
comment on column item_results.batch_day is 'The batch''s day.';
comment on column item_results.batch_id is 'The batch.';
comment on column item_results.seq is 'The item.';
comment on column item_results.attempt is 'The attempt that decided it.';
comment on column item_results.ended_at is 'When it was recorded.';
comment on column item_results.status_code is 'The provider''s HTTP status; null: there was no reply.';
comment on column item_results.input_tokens is 'Input tokens as the provider counted.';
comment on column item_results.output_tokens is 'Output tokens as the provider counted.';
comment on column item_results.model is 'The model that answered, as the provider named it.';
comment on column item_results.error_code is 'Why there is no answer; null: there is one.';
comment on column item_results.error_message is 'The same for people.';
comment on column item_results.headers is 'The provider''s x- headers.';
comment on column item_results.body is 'The provider''s reply to the letter.';

create table attempts (
    workspace_id uuid not null,
    batch_day date not null,
    batch_id uuid not null,
    seq int not null,
    attempt int not null,
    outcome attempt_outcome not null,
    resource_id uuid not null,
    connection_id uuid,
    worker_id uuid not null,
    claimed_at timestamptz not null,
    started_at timestamptz,
    ended_at timestamptz not null,
    latency_ms int,
    status_code smallint,
    error_code text,
    error_message text,
    model text,
    provider_request_id text,
    reserved_limits uuid[] not null,
    reserved_input_tokens int not null,
    reserved_output_tokens int not null,
    charged_requests smallint not null,
    charged_input_tokens int not null,
    charged_output_tokens int not null,
    cached_tokens int,
    reasoning_tokens int,
    expected_output_tokens int not null default 0,
    cost_nano bigint,
    currency text,
    reserved_cost_nano bigint,
    corrected_at timestamptz,
    constraint attempts_pkey primary key (workspace_id, batch_day, batch_id, seq, attempt),
    constraint attempts_attempt_positive check (attempt > 0)
) partition by range (batch_day);
create index attempts_by_time on attempts using brin (ended_at) with (pages_per_range = 32);
create index attempts_failed on attempts (workspace_id, resource_id, ended_at) where outcome <> 'answered';
comment on table attempts is
    'One row per provider call, written when it ended; plus one correction when a lost one reports '
    'after all. With the running items it accounts for every number in the ledger.';
comment on column attempts.workspace_id is 'The tenant.';
comment on column attempts.batch_day is 'The batch''s day.';
comment on column attempts.batch_id is 'The batch.';
comment on column attempts.seq is 'The item.';
comment on column attempts.attempt is 'The item''s fencing number of this call.';
comment on column attempts.outcome is 'How it ended.';
comment on column attempts.resource_id is 'The resource called.';
comment on column attempts.connection_id is 'The account called; null for a lost call.';
comment on column attempts.worker_id is 'Who called.';
comment on column attempts.claimed_at is 'When it was claimed; names the ledger slots reserved.';
comment on column attempts.started_at is 'When the call was sent.';
comment on column attempts.ended_at is 'When it ended, or was given up for lost.';
comment on column attempts.latency_ms is 'From sending to the end of the reply, in milliseconds.';
comment on column attempts.status_code is 'The provider''s HTTP status; null: there was no reply.';
comment on column attempts.error_code is 'Class of the failure; null: answered.';
comment on column attempts.error_message is 'The same for people.';
comment on column attempts.model is 'The model that answered, as the provider named it.';
comment on column attempts.provider_request_id is 'The provider''s own id of the call, for its support.';
comment on column attempts.reserved_limits is 'The limits that its claim reserved from.';
comment on column attempts.reserved_input_tokens is 'Input tokens reserved from each.';
comment on column attempts.reserved_output_tokens is 'Output tokens reserved from each.';
comment on column attempts.charged_requests is 'Requests that stay in the ledger: 1, or 0 if unsent.';
comment on column attempts.charged_input_tokens is 'Input tokens that stay: true ones, else reserved.';
comment on column attempts.charged_output_tokens is 'Output tokens that stay: true ones, else reserved.';
comment on column attempts.cached_tokens is 'Input tokens that the provider had cached.';
comment on column attempts.reasoning_tokens is 'Output tokens that were reasoning.';
comment on column attempts.expected_output_tokens is 'Output tokens that its claim expected on average.';
comment on column attempts.cost_nano is
    'What it cost by the price of its claim''s time, in billionths; null: no price was known, or it is lost.';
comment on column attempts.currency is 'The currency of that price.';
comment on column attempts.reserved_cost_nano is 'What its claim took from limits of cost; null: none bounds it.';
comment on column attempts.corrected_at is 'When a lost call reported after all; null: it was not lost.';

create table events (
    workspace_id uuid not null,
    batch_day date not null,
    batch_id uuid not null,
    last_no bigint not null,
    first_no bigint not null,
    kind event_kind not null,
    at timestamptz not null,
    seqs int[],
    constraint events_pkey primary key (workspace_id, batch_day, batch_id, last_no),
    constraint events_numbers_match_items check (
        last_no - first_no + 1 = coalesce(array_length(seqs, 1), 1)
    )
) partition by range (batch_day);
comment on table events is
    'What happened to a batch, numbered from 1 without gaps. A row tells the same thing of several '
    'items: the event of seqs[k] has the number first_no + k - 1. Numbers are taken under the batch''s '
    'row lock, so a reader who has seen n is never shown a smaller one later.';
comment on column events.workspace_id is 'The tenant.';
comment on column events.batch_day is 'The batch''s day.';
comment on column events.batch_id is 'The batch.';
comment on column events.last_no is 'Number of the row''s last event.';
comment on column events.first_no is 'Number of the row''s first event.';
comment on column events.kind is 'What happened.';
comment on column events.at is 'When it was recorded.';
comment on column events.seqs is 'The items it happened to; null: the batch itself.';

-- Deliveries: what is told to other programs ------------------------------------------------------

create table endpoints (
    workspace_id uuid not null,
    endpoint_id uuid not null,
    environment_id uuid not null,
    batch_id uuid,
    batch_day date,
    name text,
    url text not null,
    event_types text[] not null,
    secret_key_id text not null,
    secret bytea not null,
    secret_hint text not null,
    old_secret_until timestamptz,
    disabled_at timestamptz,
    disabled_reason text,
    next_at timestamptz not null default 'infinity',
    created_at timestamptz not null default now(),
    updated_at timestamptz not null default now(),
    constraint endpoints_pkey primary key (workspace_id, endpoint_id),
    constraint endpoints_environment_fkey foreign key (workspace_id, environment_id)
        references environments on delete cascade,
    constraint endpoints_batch_fkey foreign key (workspace_id, batch_id) references batches
        on delete cascade,
    constraint endpoints_of_a_batch_has_its_id check
        (batch_id is null or batch_id = endpoint_id and batch_day is not null),
    constraint endpoints_disabled_has_a_reason check ((disabled_at is null) = (disabled_reason is null))
) with (fillfactor = 50, autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 200);
create index endpoints_due on endpoints (next_at) where next_at < 'infinity';
create index endpoints_standing on endpoints (workspace_id, environment_id, endpoint_id desc)
    where batch_id is null;
comment on table endpoints is
    'Where deliveries go: the callback of one batch, or a webhook of an environment. Its row is the mutex of its '
    'deliveries. See sql/functions/deliveries.sql.';
comment on column endpoints.workspace_id is 'The tenant.';
comment on column endpoints.endpoint_id is 'UUIDv7, minted by the application; of a callback that of its batch.';
comment on column endpoints.environment_id is 'The environment it belongs to.';
comment on column endpoints.batch_id is 'The batch whose callback it is; null: a webhook of the environment.';
comment on column endpoints.batch_day is 'That batch''s day.';
comment on column endpoints.name is 'For people.';
comment on column endpoints.url is 'Where to post; checked again at every connection.';
comment on column endpoints.event_types is
    'What it is told of: item_update, item_running, batch_update of its batch; batch.completed, batch.failed, '
    'batch.expired, batch.cancelled of its environment.';
comment on column endpoints.secret_key_id is 'Which key of SLUICE_SECRET_KEY sealed the secret.';
comment on column endpoints.secret is
    'JSON of signing secrets and header values, AES-256-GCM, bound to this row.';
comment on column endpoints.secret_hint is 'Enough of the signing secret to recognise it.';
comment on column endpoints.old_secret_until is 'The secret before this one signs too until then.';
comment on column endpoints.disabled_at is 'Since when nothing is sent to it; null: it is.';
comment on column endpoints.disabled_reason is 'Why.';
comment on column endpoints.next_at is 'Looking earlier is in vain; infinity: nothing waits.';
comment on column endpoints.created_at is 'When the row was made.';
comment on column endpoints.updated_at is 'When a person last changed it.';

create table deliveries (
    workspace_id uuid not null,
    batch_day date not null,
    batch_id uuid not null,
    event_no bigint not null,
    endpoint_id uuid not null,
    seq int,
    kind event_kind not null,
    topic text not null,
    status delivery_status not null default 'pending',
    reason text,
    attempt int not null default 0,
    failures int not null default 0,
    visible_at timestamptz not null,
    created_at timestamptz not null,
    ended_at timestamptz,
    constraint deliveries_pkey primary key (workspace_id, batch_day, batch_id, event_no, endpoint_id),
    constraint deliveries_attempt_not_negative check (attempt >= 0 and failures >= 0),
    constraint deliveries_end_has_a_time check ((status = 'pending') = (ended_at is null)),
    constraint deliveries_dead_has_a_reason check ((status = 'dead') = (reason is not null))
) partition by range (batch_day);
create index deliveries_open on deliveries (workspace_id, endpoint_id, visible_at, event_no)
    where status = 'pending';
create index deliveries_open_batches on deliveries (workspace_id, endpoint_id, visible_at)
    where status = 'pending' and seq is null;
comment on table deliveries is
    'One event on its way to one endpoint: an outbox, written with the event. What is sent is made of the rows '
    'when it is sent.';
comment on column deliveries.workspace_id is 'The tenant.';
comment on column deliveries.batch_day is 'The batch''s day.';
comment on column deliveries.batch_id is 'The batch.';
comment on column deliveries.event_no is 'The event''s number in its batch.';
comment on column deliveries.endpoint_id is 'Where it goes.';
comment on column deliveries.seq is 'The item it is about; null: the batch.';
comment on column deliveries.kind is 'What happened.';
comment on column deliveries.topic is 'The same as the endpoint names it in its event_types.';
comment on column deliveries.status is 'Its state.';
comment on column deliveries.reason is 'Why it was given up.';
comment on column deliveries.attempt is 'The fencing number: +1 at every try, never reused or lowered.';
comment on column deliveries.failures is 'Failed tries since it was made, or was asked for again.';
comment on column deliveries.visible_at is 'It may be tried from then on; during a try, when that is given up for lost.';
comment on column deliveries.created_at is 'When the event was recorded.';
comment on column deliveries.ended_at is 'When it was delivered or given up.';

create table delivery_attempts (
    workspace_id uuid not null,
    batch_day date not null,
    batch_id uuid not null,
    event_no bigint not null,
    endpoint_id uuid not null,
    attempt int not null,
    started_at timestamptz not null,
    latency_ms int not null,
    status_code smallint,
    error_code text,
    error_message text,
    constraint delivery_attempts_pkey
        primary key (workspace_id, batch_day, batch_id, event_no, endpoint_id, attempt)
) partition by range (batch_day);
comment on table delivery_attempts is
    'One row per try whose end is known. A number that is missing here: its process vanished during the try.';
comment on column delivery_attempts.workspace_id is 'The tenant.';
comment on column delivery_attempts.batch_day is 'The batch''s day.';
comment on column delivery_attempts.batch_id is 'The batch.';
comment on column delivery_attempts.event_no is 'The event''s number in its batch.';
comment on column delivery_attempts.endpoint_id is 'Where it went.';
comment on column delivery_attempts.attempt is 'The delivery''s fencing number of this try.';
comment on column delivery_attempts.started_at is 'When it began.';
comment on column delivery_attempts.latency_ms is 'From its begin to its end, in milliseconds.';
comment on column delivery_attempts.status_code is 'The receiver''s HTTP status; null: there was no reply.';
comment on column delivery_attempts.error_code is 'Class of the failure; null: it was delivered.';
comment on column delivery_attempts.error_message is 'The same for people.';

-- Files and the batches made from them ------------------------------------------------------------

create table files (
    workspace_id uuid not null,
    file_id uuid not null,
    environment_id uuid not null,
    purpose text not null default '',
    filename text not null default '',
    bytes bigint,
    begun_at timestamptz not null default now(),
    uploaded_at timestamptz,
    expires_at timestamptz,
    constraint files_pkey primary key (workspace_id, file_id),
    constraint files_environment_fkey foreign key (workspace_id, environment_id)
        references environments,
    constraint files_uploaded_have_a_size check ((uploaded_at is null) = (bytes is null))
);
create index files_newest on files (workspace_id, environment_id, file_id desc);
create index files_expiring on files (expires_at) where expires_at is not null;
create index files_unfinished on files (begun_at) where uploaded_at is null;
comment on table files is 'What was uploaded. The contents are in file_chunks, which are written while it arrives.';
comment on column files.workspace_id is 'The tenant.';
comment on column files.file_id is 'UUIDv7, minted by the application; shown as file- and its hex digits.';
comment on column files.environment_id is 'The environment it belongs to.';
comment on column files.purpose is 'What for, in OpenAI''s words; batch: the input of a batch.';
comment on column files.filename is 'Its name at the client.';
comment on column files.bytes is 'Its size, once it is complete.';
comment on column files.begun_at is 'When its upload began.';
comment on column files.uploaded_at is 'When it was complete; null: it is still arriving, or was given up.';
comment on column files.expires_at is 'It is deleted from then on; null: never.';

create table file_chunks (
    workspace_id uuid not null,
    file_id uuid not null,
    no int not null,
    data bytea not null,
    constraint file_chunks_pkey primary key (workspace_id, file_id, no),
    constraint file_chunks_file_fkey foreign key (workspace_id, file_id) references files
        on delete cascade
);
-- Not compressed: any range of a chunk can be read by itself, and an upload costs no time to compress.
alter table file_chunks alter column data set storage external;
comment on table file_chunks is 'The contents of files, in pieces of one size.';
comment on column file_chunks.workspace_id is 'The tenant.';
comment on column file_chunks.file_id is 'The file.';
comment on column file_chunks.no is 'Number of the piece, from 0.';
comment on column file_chunks.data is 'A mebibyte of it; the last one may be shorter.';

create table submissions (
    workspace_id uuid not null,
    batch_id uuid not null,
    environment_id uuid not null,
    status submission_status not null default 'validating',
    input_file_id uuid not null,
    endpoint text not null,
    completion_window text not null,
    name text,
    metadata jsonb not null default '{}',
    priority smallint not null default 0,
    weight real not null default 1,
    max_tokens bigint,
    max_cost_nano bigint,
    output_expires_s int,
    model text,
    errors jsonb not null default '[]',
    source_ip text,
    idempotency_key text,
    request_hash bytea,
    created_by_api_key_id uuid not null,
    created_at timestamptz not null default now(),
    expires_at timestamptz not null,
    decided_at timestamptz,
    tries smallint not null default 0,
    lease_id uuid,
    leased_until timestamptz,
    constraint submissions_pkey primary key (workspace_id, batch_id),
    constraint submissions_environment_fkey foreign key (workspace_id, environment_id)
        references environments,
    constraint submissions_decided_has_a_time check ((status = 'validating') = (decided_at is null))
);
create unique index submissions_idempotency_key_unique
    on submissions (workspace_id, environment_id, idempotency_key) where idempotency_key is not null;
create index submissions_newest on submissions (workspace_id, environment_id, batch_id desc);
create index submissions_validating on submissions (batch_id) where status = 'validating';
comment on table submissions is
    'A batch that is to be made from a file. The batch itself comes into being, whole, when every line of the '
    'file has been found valid; so nothing of a file with a mistake ever runs.';
comment on column submissions.workspace_id is 'The tenant.';
comment on column submissions.batch_id is 'The batch that it becomes: UUIDv7, minted by the application.';
comment on column submissions.environment_id is 'The environment it belongs to.';
comment on column submissions.status is 'Whether it became a batch.';
comment on column submissions.input_file_id is 'The file. It may be deleted once the batch is accepted.';
comment on column submissions.endpoint is 'Path of the provider''s API that every line must name.';
comment on column submissions.completion_window is 'The time it has, as the wire gave it.';
comment on column submissions.name is 'For people.';
comment on column submissions.metadata is 'The creator''s own facts.';
comment on column submissions.priority is 'The priority that the batch begins with.';
comment on column submissions.weight is 'The weight that the batch begins with.';
comment on column submissions.max_tokens is 'What batches.max_tokens becomes; null: any number.';
comment on column submissions.max_cost_nano is
    'What batches.max_cost_nano becomes; null: any amount. Its currency is known once its models are.';
comment on column submissions.output_expires_s is
    'Its output and error files are shown for so many seconds from their first line on; null: as long as the batch.';
comment on column submissions.model is 'The model that every line names; null: several, or not known yet.';
comment on column submissions.errors is 'What is wrong with which line: the first hundred.';
comment on column submissions.source_ip is 'Address of the client, for limits per address.';
comment on column submissions.idempotency_key is 'A second creation with the same key returns this one.';
comment on column submissions.request_hash is 'SHA-256 of the creating request, to tell a true repeat.';
comment on column submissions.created_by_api_key_id is 'The key that created it, which must be able to use every model.';
comment on column submissions.created_at is 'When it was taken in.';
comment on column submissions.expires_at is 'No item is begun from then on.';
comment on column submissions.decided_at is 'When it was accepted, found invalid or cancelled.';
comment on column submissions.tries is 'How often somebody began to validate it.';
comment on column submissions.lease_id is 'Who validates it: the fencing number of that try.';
comment on column submissions.leased_until is 'From then on another may validate it.';

create table result_files (
    workspace_id uuid not null,
    batch_id uuid not null,
    kind result_kind not null,
    bytes bigint not null default 0,
    indexed_no bigint not null default 0,
    begun_at timestamptz,
    deleted_at timestamptz,
    constraint result_files_pkey primary key (workspace_id, batch_id, kind)
);
comment on table result_files is
    'How far the lines of a batch''s output or error file have been measured. The lines themselves are items and '
    'their results, in the order of the batch''s events. Made when somebody first looks at the file.';
comment on column result_files.workspace_id is 'The tenant.';
comment on column result_files.batch_id is 'The batch.';
comment on column result_files.kind is 'Which of its files.';
comment on column result_files.bytes is 'Size of all lines up to indexed_no.';
comment on column result_files.indexed_no is 'Number of the last event that was looked at.';
comment on column result_files.begun_at is 'When its first line came to be; null: there is none.';
comment on column result_files.deleted_at is 'From then on the file is not shown any more.';

create table result_parts (
    workspace_id uuid not null,
    batch_id uuid not null,
    kind result_kind not null,
    begin bigint not null,
    bytes bigint not null,
    first_no bigint not null,
    last_no bigint not null,
    constraint result_parts_pkey primary key (workspace_id, batch_id, kind, begin),
    constraint result_parts_file_fkey foreign key (workspace_id, batch_id, kind) references result_files
        on delete cascade,
    constraint result_parts_not_empty check (bytes > 0 and first_no <= last_no)
);
comment on table result_parts is
    'Where in an output or error file the lines of which events are, so that any range is found at once. A part '
    'has whole lines, some hundred kilobytes of them.';
comment on column result_parts.workspace_id is 'The tenant.';
comment on column result_parts.batch_id is 'The batch.';
comment on column result_parts.kind is 'Which of its files.';
comment on column result_parts.begin is 'Offset of its first byte.';
comment on column result_parts.bytes is 'Its size.';
comment on column result_parts.first_no is 'Number of the event of its first line.';
comment on column result_parts.last_no is 'Number of the event of its last line.';

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

-- Processes --------------------------------------------------------------------------------------

create table workers (
    worker_id uuid not null,
    host text not null,
    machine text not null,
    pid int not null,
    version text not null,
    started_at timestamptz not null default now(),
    heartbeat_at timestamptz not null default now(),
    stopped_at timestamptz,
    died_at timestamptz,
    in_flight int not null default 0,
    constraint workers_pkey primary key (worker_id)
) with (fillfactor = 50);
comment on table workers is 'Worker processes and when they were last seen.';
comment on column workers.worker_id is 'UUIDv7 of one life of a process.';
comment on column workers.host is 'Where it runs, for people.';
comment on column workers.machine is 'Boot and process namespace in which its process id means something.';
comment on column workers.pid is 'Its process id there.';
comment on column workers.version is 'Its version of Sluice.';
comment on column workers.started_at is 'When it began.';
comment on column workers.heartbeat_at is 'When it was last heard of.';
comment on column workers.stopped_at is 'When it said goodbye; null: running or dead.';
comment on column workers.died_at is 'When its own host found its process gone.';
comment on column workers.in_flight is 'Calls it had out at its last heartbeat.';

create table leases (
    name text not null,
    holder_id uuid not null,
    until timestamptz not null,
    constraint leases_pkey primary key (name)
);
comment on table leases is
    'Duties that one process does for all, such as maintenance. A row, not an advisory lock, so that '
    'it works behind a transaction pooler.';
comment on column leases.name is 'The duty.';
comment on column leases.holder_id is 'Who has it.';
comment on column leases.until is 'Anyone may take it from then on.';
