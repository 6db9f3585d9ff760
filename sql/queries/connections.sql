-- Connections: accounts at providers, where the calls of resources go, and their secrets.

-- name: connection_insert
-- A new account at a provider.
insert into connections (
    workspace_id, connection_id, environment_id, name, description, provider, base_url, secret_key_id, secret,
    headers, allowed_models, capacity, timeout_ms, concurrency, created_by
)
values (
    %(workspace_id)s, %(connection_id)s, %(environment_id)s, %(name)s, %(description)s, %(provider)s,
    %(base_url)s, %(secret_key_id)s, %(secret)s, %(headers)s, %(allowed_models)s, %(capacity)s, %(timeout_ms)s,
    %(concurrency)s, %(created_by)s
);

-- name: connection_get
-- One connection by id.
select workspace_id, connection_id, environment_id, name, description, provider, base_url, secret_key_id,
    secret, headers, allowed_models, capacity, timeout_ms, concurrency, created_at, updated_at, created_by, updated_by
from connections
where workspace_id = %(workspace_id)s
    and environment_id = %(environment_id)s
    and connection_id = %(connection_id)s;

-- name: connection_named
-- One connection by name.
select workspace_id, connection_id, environment_id, name, description, provider, base_url, secret_key_id,
    secret, headers, allowed_models, capacity, timeout_ms, concurrency, created_at, updated_at, created_by, updated_by
from connections
where workspace_id = %(workspace_id)s and environment_id = %(environment_id)s and name = %(name)s;

-- name: connections_page
-- Connections of an environment, oldest first, those after a given id.
select workspace_id, connection_id, environment_id, name, description, provider, base_url, secret_key_id,
    secret, headers, allowed_models, capacity, timeout_ms, concurrency, created_at, updated_at, created_by, updated_by
from connections
where workspace_id = %(workspace_id)s
    and environment_id = %(environment_id)s
    and (%(after)s::uuid is null or connection_id > %(after)s::uuid)
    and (%(name)s::text is null or name = %(name)s::text)
order by connection_id
limit %(most)s;

-- name: connection_set_secret
-- Replace a connection's secret.
update connections
set secret_key_id = %(secret_key_id)s, secret = %(secret)s, updated_at = clock_timestamp()
where workspace_id = %(workspace_id)s and connection_id = %(connection_id)s;

-- name: connection_change
-- What people may change of a connection, as it is from now on; workers read their routes anew for updated_at.
update connections
set name = %(name)s, description = %(description)s, provider = %(provider)s, base_url = %(base_url)s,
    headers = %(headers)s, allowed_models = %(allowed_models)s, capacity = %(capacity)s, timeout_ms = %(timeout_ms)s,
    concurrency = %(concurrency)s, updated_at = clock_timestamp(), updated_by = %(updated_by)s
where workspace_id = %(workspace_id)s and connection_id = %(connection_id)s;

-- name: connections_lock
-- Connections in key order: one resource at a time is made on each, so that those of one model find each other; and
-- one change of it at a time, with its limits' mutex held already.
select connection_id
from connections
where workspace_id = %(workspace_id)s and connection_id = any (%(connection_ids)s::uuid[])
order by connection_id
for no key update;

-- name: connection_delete
-- Remove an account. Its resources are gone already.
delete from connections where workspace_id = %(workspace_id)s and connection_id = %(connection_id)s;

-- name: connection_models
-- The models that resources name on a connection, those of alternates included, and whose they are.
select r.model, coalesce(o.resource_id, r.resource_id) as resource_id, coalesce(o.name, r.name) as name,
    r.owner_id is not null as is_alternate
from resources r
left join resources o on o.workspace_id = r.workspace_id and o.resource_id = r.owner_id
where r.workspace_id = %(workspace_id)s and r.connection_id = %(connection_id)s
order by r.resource_id;

-- name: model_scope
-- The scope of a model that resources of a connection name already.
select model_scope_id
from resources
where workspace_id = %(workspace_id)s and connection_id = %(connection_id)s and model = %(model)s
limit 1;

-- name: resource_route
-- Where a resource's calls go and how: what a worker needs to call. An alternate asks as its owner would.
select r.resource_id, r.connection_id, r.model, coalesce(o.default_args, r.default_args) as default_args, c.provider,
    c.base_url, c.secret_key_id, c.secret, c.headers, c.allowed_models,
    coalesce(r.timeout_ms, o.timeout_ms, c.timeout_ms) as timeout_ms, greatest(r.updated_at, c.updated_at) as config_at
from resources r
join connections c on c.workspace_id = r.workspace_id and c.connection_id = r.connection_id
left join resources o on o.workspace_id = r.workspace_id and o.resource_id = r.owner_id
where r.workspace_id = %(workspace_id)s and r.resource_id = %(resource_id)s;
