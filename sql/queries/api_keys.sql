-- API keys: how programs enter.

-- name: api_key_any
-- Whether an environment has a usable key.
select exists (
    select from api_keys
    where workspace_id = %(workspace_id)s
        and environment_id = %(environment_id)s
        and enabled
        and (expires_at is null or expires_at > clock())
) as found;

-- name: api_key_insert
-- A new key; only its hash is kept.
insert into api_keys (
    workspace_id, api_key_id, environment_id, name, description, hash, masked_key, enabled, resources, permissions,
    labels, enforce_capacity, capacity, expires_at, created_by
)
values (
    %(workspace_id)s, %(api_key_id)s, %(environment_id)s, %(name)s, %(description)s, %(hash)s, %(masked_key)s,
    %(enabled)s, %(resources)s, %(permissions)s, %(labels)s, %(enforce_capacity)s, %(capacity)s, %(expires_at)s,
    %(created_by)s
);

-- name: api_key_by_hash
-- The usable key with this hash, or with it before a rotation whose overlap lasts. The one statement that finds the
-- tenant instead of being given it.
select k.workspace_id, k.api_key_id, k.environment_id, k.name, k.resources, k.permissions, k.masked_key
from api_keys k
join environments e on e.workspace_id = k.workspace_id and e.environment_id = k.environment_id
where (k.hash = %(hash)s or (k.previous_hash = %(hash)s and k.previous_until > clock()))
    and k.enabled
    and (k.expires_at is null or k.expires_at > clock())
    and e.deleted_at is null;

-- name: api_key_get
-- One key as people see it; deleted ones only where their batches are shown.
select workspace_id, api_key_id, environment_id, name, description, masked_key, enabled, resources, permissions,
    labels, enforce_capacity, capacity, expires_at, last_used_at, previous_until, rotated_at, created_by, updated_by,
    created_at, updated_at
from api_keys
where workspace_id = %(workspace_id)s
    and environment_id = %(environment_id)s
    and api_key_id = %(api_key_id)s
    and (deleted_at is null or %(with_deleted)s);

-- name: api_keys_page
-- The keys of an environment, newest first, below a given id.
select workspace_id, api_key_id, environment_id, name, description, masked_key, enabled, resources, permissions,
    labels, enforce_capacity, capacity, expires_at, last_used_at, previous_until, rotated_at, created_by, updated_by,
    created_at, updated_at
from api_keys
where workspace_id = %(workspace_id)s
    and environment_id = %(environment_id)s
    and deleted_at is null
    and (%(before)s::uuid is null or api_key_id < %(before)s::uuid)
order by api_key_id desc
limit %(most)s;

-- name: api_key_lock
-- One change of a key at a time; its limits' mutex is held already.
select 1 as locked
from api_keys
where workspace_id = %(workspace_id)s and api_key_id = %(api_key_id)s
for no key update;

-- name: api_key_change
-- What people may change of a key, as it is from now on.
update api_keys
set name = %(name)s, description = %(description)s, enabled = %(enabled)s, resources = %(resources)s,
    permissions = %(permissions)s, labels = %(labels)s, enforce_capacity = %(enforce_capacity)s,
    capacity = %(capacity)s, expires_at = %(expires_at)s, updated_by = %(updated_by)s, updated_at = clock_timestamp()
where workspace_id = %(workspace_id)s and api_key_id = %(api_key_id)s;

-- name: api_key_rotate
-- Give a key a new value. The one that it had opens for the overlap; one that had an overlap before opens no more.
update api_keys
set previous_hash = case when %(overlap_s)s::int > 0 then hash end,
    previous_until = case when %(overlap_s)s::int > 0 then clock_timestamp() + make_interval(secs => %(overlap_s)s::int) end,
    hash = %(hash)s, masked_key = %(masked_key)s, rotated_at = clock_timestamp(), updated_by = %(updated_by)s,
    updated_at = clock_timestamp()
where workspace_id = %(workspace_id)s and api_key_id = %(api_key_id)s;

-- name: api_key_delete
-- Let a key open nothing any more and show it no more. Batches that it made go on and keep their creator.
update api_keys
set deleted_at = clock_timestamp(), enabled = false, previous_hash = null, previous_until = null,
    updated_by = %(updated_by)s, updated_at = clock_timestamp()
where workspace_id = %(workspace_id)s
    and environment_id = %(environment_id)s
    and api_key_id = %(api_key_id)s
    and deleted_at is null;

-- name: api_key_used
-- Note that a key was used, at most once a minute.
update api_keys
set last_used_at = clock()
where workspace_id = %(workspace_id)s
    and api_key_id = %(api_key_id)s
    and (last_used_at is null or last_used_at < clock() - interval '1 minute');
