-- Who may enter: users and their roles in workspaces, what keys may do, rotation of keys, and deletion that keeps history.

create type member_role as enum ('owner', 'member', 'read-only');
comment on type member_role is 'What a user may do in a workspace: everything, everything but to admit others, or look.';

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

alter table workspaces
    add column updated_at timestamptz not null default now(),
    add column deleted_at timestamptz;
comment on column workspaces.updated_at is 'When a person last changed it.';
comment on column workspaces.deleted_at is 'Nobody enters it from then on; its history stays.';

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

alter table environments
    add column updated_at timestamptz not null default now(),
    add column deleted_at timestamptz,
    drop constraint environments_name_unique;
create unique index environments_name_unique on environments (workspace_id, name) where deleted_at is null;
comment on column environments.name is 'For people; unique in its workspace while it lasts.';
comment on column environments.updated_at is 'When a person last changed it.';
comment on column environments.deleted_at is 'Nobody enters it from then on; its history stays.';

-- Keys that exist may do what they could do: everything.
alter table api_keys
    add column permissions text[] not null default '{*}',
    add column previous_hash bytea,
    add column previous_until timestamptz,
    add column rotated_at timestamptz,
    add column deleted_at timestamptz,
    add column created_by uuid,
    add column updated_by uuid,
    add constraint api_keys_previous_has_an_end check ((previous_hash is null) = (previous_until is null)),
    add constraint api_keys_deleted_opens_nothing check (deleted_at is null or not enabled);
create index api_keys_by_previous_hash on api_keys (previous_hash) where previous_hash is not null;
comment on column api_keys.permissions is
    'Actions that the key may perform, as patterns in which * stands for any text: completion-batch:get, *:list.';
comment on column api_keys.previous_hash is 'The hash before its rotation, which opens until previous_until.';
comment on column api_keys.previous_until is 'End of the overlap of its rotation.';
comment on column api_keys.rotated_at is 'When it was last given a new value.';
comment on column api_keys.deleted_at is 'It is shown no more from then on; batches still name their creator.';
comment on column api_keys.created_by is 'The user or the key that made it; null: the operator.';
comment on column api_keys.updated_by is 'The user or the key that last changed it; null: nobody did.';

alter table batches add column created_by_user_id uuid;
comment on column batches.created_by_api_key_id is 'The key that created it; null: a user, or the command line.';
comment on column batches.created_by_user_id is 'The user who created it; null: a key, or the command line.';
