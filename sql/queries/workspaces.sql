-- Users, the workspaces they are members of, and their environments.

-- name: user_known
-- A user who was seen within the minute and of whom a token says nothing new; what it does not say stays as it is.
select user_id, issuer, subject, name, first_name, last_name, username, email, email_verified, picture_url, created_at,
    updated_at
from users
where issuer = %(issuer)s
    and subject = %(subject)s
    and last_seen_at > clock() - interval '1 minute'
    and (name, first_name, last_name, username, email, email_verified, picture_url) is not distinct from (
        coalesce(%(name)s, name), coalesce(%(first_name)s, first_name), coalesce(%(last_name)s, last_name),
        coalesce(%(username)s, username), coalesce(%(email)s, email), coalesce(%(email_verified)s, email_verified),
        coalesce(%(picture_url)s, picture_url)
    );

-- name: user_seen
-- A user at first sight, or after a while, or with something new said of them.
insert into users as u (
    user_id, issuer, subject, name, first_name, last_name, username, email, email_verified, picture_url, created_at,
    updated_at, last_seen_at
)
values (
    %(user_id)s, %(issuer)s, %(subject)s, %(name)s, %(first_name)s, %(last_name)s, %(username)s, %(email)s,
    coalesce(%(email_verified)s, false), %(picture_url)s, clock(), clock(), clock()
)
on conflict (issuer, subject) do update
set name = coalesce(%(name)s, u.name), first_name = coalesce(%(first_name)s, u.first_name),
    last_name = coalesce(%(last_name)s, u.last_name), username = coalesce(%(username)s, u.username),
    email = coalesce(%(email)s, u.email), email_verified = coalesce(%(email_verified)s, u.email_verified),
    picture_url = coalesce(%(picture_url)s, u.picture_url), last_seen_at = clock(),
    updated_at = case when (u.name, u.first_name, u.last_name, u.username, u.email, u.email_verified, u.picture_url)
        is not distinct from (
            coalesce(%(name)s, u.name), coalesce(%(first_name)s, u.first_name), coalesce(%(last_name)s, u.last_name),
            coalesce(%(username)s, u.username), coalesce(%(email)s, u.email),
            coalesce(%(email_verified)s, u.email_verified), coalesce(%(picture_url)s, u.picture_url)
        ) then u.updated_at else clock() end
returning user_id, issuer, subject, name, first_name, last_name, username, email, email_verified, picture_url,
    created_at, updated_at;

-- name: user_of_workspace
-- A user who is, or was, something to a workspace: a member, or the creator of the batch that names them.
select user_id, issuer, subject, name, first_name, last_name, username, email, email_verified, picture_url, created_at,
    updated_at
from users u
where u.user_id = %(user_id)s
    and (
        exists (
            select from workspace_members m
            where m.workspace_id = %(workspace_id)s and m.user_id = u.user_id
        )
        or exists (
            select from batches b
            where b.workspace_id = %(workspace_id)s
                and b.batch_id = %(batch_id)s
                and b.created_by_user_id = u.user_id
        )
    );

-- name: users_near
-- Those with whom a user shares a workspace, themselves among them; or the members of one workspace of theirs.
select u.user_id, u.issuer, u.subject, u.name, u.first_name, u.last_name, u.username, u.email, u.email_verified,
    u.picture_url, u.created_at, u.updated_at
from users u
where (u.user_id = %(user_id)s and %(workspace_id)s::uuid is null)
    or exists (
        select from workspace_members mine
        join workspaces w on w.workspace_id = mine.workspace_id and w.deleted_at is null
        join workspace_members theirs on theirs.workspace_id = mine.workspace_id and theirs.user_id = u.user_id
        where mine.user_id = %(user_id)s
            and (%(workspace_id)s::uuid is null or mine.workspace_id = %(workspace_id)s::uuid)
    )
order by u.user_id
limit %(most)s;

-- name: users_known
-- Which of these users exist.
select user_id from users where user_id = any (%(user_ids)s::uuid[]);

-- name: membership
-- What a user may do in a workspace, and whether it has an environment; no row: not a member, or it was deleted.
select m.role::text as role, exists (
        select from environments e
        where e.workspace_id = m.workspace_id
            and e.environment_id = %(environment_id)s::uuid
            and e.deleted_at is null
    ) as has_environment
from workspace_members m
join workspaces w on w.workspace_id = m.workspace_id
where m.workspace_id = %(workspace_id)s and m.user_id = %(user_id)s and w.deleted_at is null;

-- name: members
-- The members of a workspace in the order of their admission, with what is known of them.
select m.workspace_id, m.user_id, m.role::text as role, m.added_at, m.added_by, u.name, u.email
from workspace_members m
join users u on u.user_id = m.user_id
where m.workspace_id = %(workspace_id)s
order by m.added_at, m.user_id;

-- name: member_add
-- Admit a user; one who is a member already keeps the role.
insert into workspace_members (workspace_id, user_id, role, added_at, added_by)
values (%(workspace_id)s, %(user_id)s, %(role)s::member_role, clock(), %(added_by)s)
on conflict do nothing;

-- name: member_set_role
-- Change what a member may do.
update workspace_members
set role = %(role)s::member_role
where workspace_id = %(workspace_id)s and user_id = %(user_id)s;

-- name: member_remove
-- Let a user enter a workspace no more.
delete from workspace_members where workspace_id = %(workspace_id)s and user_id = %(user_id)s;

-- name: owners
-- How many owners a workspace has. Its row is locked, so that two changes cannot each leave the other's owner.
select count(*)::int as count from workspace_members where workspace_id = %(workspace_id)s and role = 'owner';

-- name: workspace_lock
-- One change of a workspace or its members at a time.
select 1 as locked
from workspaces
where workspace_id = %(workspace_id)s and deleted_at is null
for no key update;

-- name: workspaces_of
-- The workspaces that a user may enter, oldest first.
select w.workspace_id, w.name, w.description, w.created_at, w.updated_at, m.role::text as role
from workspace_members m
join workspaces w on w.workspace_id = m.workspace_id
where m.user_id = %(user_id)s and w.deleted_at is null
order by w.workspace_id;

-- name: workspace_get
-- One workspace.
select workspace_id, name, description, created_at, updated_at, null::text as role
from workspaces
where workspace_id = %(workspace_id)s and deleted_at is null;

-- name: workspaces_all
-- Every workspace with its environments and usable keys, for the operator.
select w.workspace_id, w.name as workspace, e.environment_id, e.name as environment, (
        select count(*)::int from api_keys k
        where k.workspace_id = w.workspace_id
            and k.environment_id = e.environment_id
            and k.enabled
            and (k.expires_at is null or k.expires_at > clock())
    ) as api_keys, (
        select count(*)::int from workspace_members m where m.workspace_id = w.workspace_id
    ) as members
from workspaces w
left join environments e on e.workspace_id = w.workspace_id and e.deleted_at is null
where w.deleted_at is null
order by w.workspace_id, e.environment_id;

-- name: workspace_change
-- Rename a workspace.
update workspaces
set name = %(name)s, description = %(description)s, updated_at = clock()
where workspace_id = %(workspace_id)s;

-- name: workspace_delete
-- Let nobody enter a workspace any more; its history stays.
update workspaces
set deleted_at = clock(), updated_at = clock()
where workspace_id = %(workspace_id)s;

-- name: environments
-- The environments of a workspace, oldest first.
select workspace_id, environment_id, name, description, created_at, updated_at
from environments
where workspace_id = %(workspace_id)s and deleted_at is null
order by environment_id;

-- name: environment_full
-- One environment as people see it.
select workspace_id, environment_id, name, description, created_at, updated_at
from environments
where workspace_id = %(workspace_id)s and environment_id = %(environment_id)s and deleted_at is null;

-- name: environments_lock
-- Environments of a workspace, or one of them, against batches that are being made there. Locks in key order.
select environment_id
from environments
where workspace_id = %(workspace_id)s
    and (%(environment_id)s::uuid is null or environment_id = %(environment_id)s::uuid)
    and deleted_at is null
order by environment_id
for update;

-- name: environment_hold
-- Keep an environment from being deleted until the commit.
select 1 as locked
from environments
where workspace_id = %(workspace_id)s and environment_id = %(environment_id)s and deleted_at is null
for key share;

-- name: unfinished_batches
-- How many batches of some environments are not finished.
select count(*)::int as count
from batches
where workspace_id = %(workspace_id)s
    and environment_id = any (%(environment_ids)s::uuid[])
    and status in ('pending', 'running');

-- name: environment_change
-- Rename an environment.
update environments
set name = %(name)s, description = %(description)s, updated_at = clock()
where workspace_id = %(workspace_id)s and environment_id = %(environment_id)s;

-- name: environments_delete
-- Let nobody enter environments any more, keys included; their history stays. They are locked.
update environments
set deleted_at = clock(), updated_at = clock()
where workspace_id = %(workspace_id)s and environment_id = any (%(environment_ids)s::uuid[]);
