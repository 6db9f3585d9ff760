-- Deliveries: callbacks of batches and webhooks of environments.

create type delivery_status as enum ('pending', 'delivered', 'dead');
comment on type delivery_status is
    'State of a delivery. dead: given up, until somebody asks for it to be delivered again.';

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

comment on column batches.callback_options is 'Where callbacks go, without secrets; endpoints has them.';

-- The days that exist already: a batch of one of them may tell of itself after this revision.
do $$
declare
    v_parent text;
    v_day date;
begin
    for v_day in
        select to_date(right(c.relname, 8), 'YYYYMMDD')
        from pg_inherits i
        join pg_class c on c.oid = i.inhrelid
        where i.inhparent = 'events'::regclass
    loop
        foreach v_parent in array array['deliveries', 'delivery_attempts'] loop
            execute format(
                'create table %I partition of %I for values from (%L) to (%L) with ('
                'autovacuum_vacuum_scale_factor = 0.02, autovacuum_vacuum_threshold = 5000, '
                'autovacuum_analyze_scale_factor = 0.05, autovacuum_analyze_threshold = 2000)',
                v_parent || '_' || to_char(v_day, 'YYYYMMDD'), v_parent, v_day, v_day + 1);
        end loop;
    end loop;
end
$$;
