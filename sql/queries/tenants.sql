-- Workspaces, environments, connections, resources, api keys, and their limits.

-- name: workspace_insert
-- A new tenant.
insert into workspaces (workspace_id, name, description)
values (%(workspace_id)s, %(name)s, %(description)s);

-- name: environment_insert
-- A new stage of a tenant.
insert into environments (workspace_id, environment_id, name, description)
values (%(workspace_id)s, %(environment_id)s, %(name)s, %(description)s);

-- name: environment_get
-- One environment.
select workspace_id, environment_id, name
from environments
where workspace_id = %(workspace_id)s and environment_id = %(environment_id)s;

-- name: environment_named
-- The environment of the command line: by the names of workspace and environment.
select e.workspace_id, e.environment_id, e.name
from environments e
join workspaces w on w.workspace_id = e.workspace_id
where w.name = %(workspace)s and e.name = %(environment)s
order by w.created_at
limit 1;

-- name: setup_lock
-- One process at a time makes what the command line makes by itself; held to the end of the transaction.
select pg_advisory_xact_lock(hashtext('sluice.setup'))::text as locked;

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
    workspace_id, api_key_id, environment_id, name, description, hash, masked_key, enabled, resources, labels,
    enforce_capacity, capacity, expires_at
)
values (
    %(workspace_id)s, %(api_key_id)s, %(environment_id)s, %(name)s, %(description)s, %(hash)s, %(masked_key)s,
    %(enabled)s, %(resources)s, %(labels)s, %(enforce_capacity)s, %(capacity)s, %(expires_at)s
);

-- name: api_key_by_hash
-- The usable key with this hash. The one statement that finds the tenant instead of being given it.
select workspace_id, api_key_id, environment_id, name, resources, masked_key
from api_keys
where hash = %(hash)s and enabled and (expires_at is null or expires_at > clock());

-- name: api_key_get
-- One key as people see it.
select workspace_id, api_key_id, environment_id, name, description, masked_key, enabled, resources, labels,
    enforce_capacity, capacity, expires_at, last_used_at, created_at, updated_at
from api_keys
where workspace_id = %(workspace_id)s
    and environment_id = %(environment_id)s
    and api_key_id = %(api_key_id)s;

-- name: api_key_used
-- Note that a key was used, at most once a minute.
update api_keys
set last_used_at = clock()
where workspace_id = %(workspace_id)s
    and api_key_id = %(api_key_id)s
    and (last_used_at is null or last_used_at < clock() - interval '1 minute');

-- name: api_key_allow
-- Add a resource to keys of the environment; the keys that now have it.
update api_keys
set resources = case when resources && array['*', %(resource)s::text] then resources
        else resources || %(resource)s::text end,
    updated_at = clock()
where workspace_id = %(workspace_id)s
    and environment_id = %(environment_id)s
    and api_key_id = any (%(api_key_ids)s::uuid[])
returning api_key_id;

-- name: connection_insert
-- A new account at a provider.
insert into connections (
    workspace_id, connection_id, environment_id, name, description, provider, base_url, secret_key_id, secret,
    headers, allowed_models, capacity, timeout_ms
)
values (
    %(workspace_id)s, %(connection_id)s, %(environment_id)s, %(name)s, %(description)s, %(provider)s,
    %(base_url)s, %(secret_key_id)s, %(secret)s, %(headers)s, %(allowed_models)s, %(capacity)s, %(timeout_ms)s
);

-- name: connection_get
-- One connection by id.
select workspace_id, connection_id, environment_id, name, description, provider, base_url, secret_key_id,
    secret, headers, allowed_models, capacity, timeout_ms, created_at, updated_at
from connections
where workspace_id = %(workspace_id)s
    and environment_id = %(environment_id)s
    and connection_id = %(connection_id)s;

-- name: connection_named
-- One connection by name.
select workspace_id, connection_id, environment_id, name, description, provider, base_url, secret_key_id,
    secret, headers, allowed_models, capacity, timeout_ms, created_at, updated_at
from connections
where workspace_id = %(workspace_id)s and environment_id = %(environment_id)s and name = %(name)s;

-- name: connection_set_secret
-- Replace a connection's secret.
update connections
set secret_key_id = %(secret_key_id)s, secret = %(secret)s, updated_at = clock_timestamp()
where workspace_id = %(workspace_id)s and connection_id = %(connection_id)s;

-- name: resource_insert
-- A new model on a connection.
insert into resources (
    workspace_id, resource_id, environment_id, connection_id, name, description, model, default_args, capacity,
    enforce_capacity, timeout_ms
)
values (
    %(workspace_id)s, %(resource_id)s, %(environment_id)s, %(connection_id)s, %(name)s, %(description)s,
    %(model)s, %(default_args)s, %(capacity)s, %(enforce_capacity)s, %(timeout_ms)s
);

-- name: resource_set_timeout
-- Change how long one call may take; null: as long as the connection says.
update resources
set timeout_ms = %(timeout_ms)s, updated_at = clock_timestamp()
where workspace_id = %(workspace_id)s
    and resource_id = %(resource_id)s
    and timeout_ms is distinct from %(timeout_ms)s;

-- name: resource_state_insert
-- What will be learned about a resource.
insert into resource_states (workspace_id, resource_id) values (%(workspace_id)s, %(resource_id)s);

-- name: resource_get
-- One resource by id, with its connection's name and the smallest token limit that its items must fit.
select r.workspace_id, r.resource_id, r.environment_id, r.connection_id, r.name, r.description, r.model,
    r.default_args, r.capacity, r.enforce_capacity, r.timeout_ms, r.created_at, r.updated_at,
    c.provider, (
        select min(l.tokens) from limits l
        where l.workspace_id = r.workspace_id and l.scope_id in (r.resource_id, r.connection_id)
    ) as most_tokens
from resources r
join connections c on c.workspace_id = r.workspace_id and c.connection_id = r.connection_id
where r.workspace_id = %(workspace_id)s
    and r.environment_id = %(environment_id)s
    and r.resource_id = %(resource_id)s;

-- name: resource_named
-- The same by name.
select r.workspace_id, r.resource_id, r.environment_id, r.connection_id, r.name, r.description, r.model,
    r.default_args, r.capacity, r.enforce_capacity, r.timeout_ms, r.created_at, r.updated_at,
    c.provider, (
        select min(l.tokens) from limits l
        where l.workspace_id = r.workspace_id and l.scope_id in (r.resource_id, r.connection_id)
    ) as most_tokens
from resources r
join connections c on c.workspace_id = r.workspace_id and c.connection_id = r.connection_id
where r.workspace_id = %(workspace_id)s and r.environment_id = %(environment_id)s and r.name = %(name)s;

-- name: resource_route
-- Where a resource's calls go and how: what a worker needs to call.
select r.resource_id, r.connection_id, r.model, r.default_args, c.base_url, c.secret_key_id, c.secret, c.headers,
    coalesce(r.timeout_ms, c.timeout_ms) as timeout_ms, greatest(r.updated_at, c.updated_at) as config_at
from resources r
join connections c on c.workspace_id = r.workspace_id and c.connection_id = r.connection_id
where r.workspace_id = %(workspace_id)s and r.resource_id = %(resource_id)s;

-- name: scope_insert
-- The mutex of something that may have limits.
insert into limit_scopes (workspace_id, scope_id, kind)
values (%(workspace_id)s, %(scope_id)s, %(kind)s::scope_kind);

-- name: limit_insert
-- A limit on a scope.
insert into limits (workspace_id, limit_id, scope_id, period, requests, tokens)
values (
    %(workspace_id)s, %(limit_id)s, %(scope_id)s, %(period)s::limit_period, %(requests)s, %(tokens)s
);

-- name: limits_of
-- The limits of scopes.
select limit_id, scope_id, period::text as period, requests, tokens
from limits
where workspace_id = %(workspace_id)s and scope_id = any (%(scope_ids)s::uuid[])
order by scope_id, limit_id;

-- name: limit_change
-- Change a limit's amounts; its account in the ledger stays.
update limits
set requests = %(requests)s, tokens = %(tokens)s, updated_at = clock_timestamp()
where workspace_id = %(workspace_id)s and limit_id = %(limit_id)s;

-- name: limit_delete
-- Remove a limit.
delete from limits where workspace_id = %(workspace_id)s and limit_id = %(limit_id)s;

-- name: ready_wake
-- What waits for capacity looks again: the limits of this connection or resource were changed. Locks in key order.
with waiting as (
    select r.workspace_id, r.resource_id
    from ready r
    join resources o on o.workspace_id = r.workspace_id and o.resource_id = r.resource_id
    where r.workspace_id = %(workspace_id)s
        and (o.resource_id = %(scope_id)s or o.connection_id = %(scope_id)s)
        and r.next_at < 'infinity'
    order by r.resource_id
    for no key update of r
)
update ready r
set next_at = least(r.next_at, clock_timestamp())
from waiting w
where r.workspace_id = w.workspace_id and r.resource_id = w.resource_id;

-- name: limits_used
-- Each limit of some scopes and what of it counts at present.
select l.limit_id, l.scope_id, l.period::text as period, l.requests, l.tokens, used.requests as used_requests,
    used.tokens as used_tokens
from limits l
cross join lateral (
    select coalesce(sum(g.requests), 0)::bigint as requests,
        coalesce(sum(g.input_tokens + g.output_tokens), 0)::bigint as tokens
    from ledger g
    where g.workspace_id = l.workspace_id
        and g.limit_id = l.limit_id
        and slot_frees_at(l.period, g.slot_at, make_interval(secs => %(guard_s)s)) > clock_timestamp()
) used
where l.workspace_id = %(workspace_id)s and l.scope_id = any (%(scope_ids)s::uuid[])
order by l.scope_id, l.limit_id;
