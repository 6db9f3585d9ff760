-- OpenAI's Files and Batches: stored files, batches made from them, and where the lines of their virtual
-- output files are.

create type submission_status as enum ('validating', 'accepted', 'failed', 'cancelled');
comment on type submission_status is 'What became of a batch that is to be made from a file.';

create type result_kind as enum ('output', 'error');
comment on type result_kind is 'Which file of a batch: the answers, or what ended without one.';

alter table flows
    add column cached_tokens bigint not null default 0,
    add column reasoning_tokens bigint not null default 0;
comment on column flows.cached_tokens is 'Those of its input tokens that the provider had cached.';
comment on column flows.reasoning_tokens is 'Those of its output tokens that were reasoning.';

alter table batches add column redrives int not null default 0;
comment on column batches.redrives is 'How often failed items were put back; its error file begins anew each time.';

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
