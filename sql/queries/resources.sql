-- Resources: named models on connections, and their alternates (fallbacks, secondary models, targets of rules).

-- name: resource_insert
-- A new model on a connection.
insert into resources (
    workspace_id, resource_id, environment_id, connection_id, name, description, model, default_args, capacity,
    enforce_capacity, timeout_ms, concurrency, model_scope_id, owner_id, created_by
)
values (
    %(workspace_id)s, %(resource_id)s, %(environment_id)s, %(connection_id)s, %(name)s, %(description)s,
    %(model)s, %(default_args)s, %(capacity)s, %(enforce_capacity)s, %(timeout_ms)s, %(concurrency)s,
    %(model_scope_id)s, %(owner_id)s, %(created_by)s
);

-- name: resource_state_insert
-- What will be learned about a resource.
insert into resource_states (workspace_id, resource_id) values (%(workspace_id)s, %(resource_id)s);

-- name: resource_get
-- One resource by id, with its connection's provider and the smallest token limit that its items must fit.
select r.workspace_id, r.resource_id, r.environment_id, r.connection_id, r.name, r.description, r.model,
    r.default_args, r.capacity, r.enforce_capacity, r.timeout_ms, r.concurrency, r.created_at, r.updated_at,
    r.owner_id, r.use_fallback, r.fallback_ids, r.fallback_on, r.secondary_ids, r.routing, r.created_by, r.updated_by,
    c.provider, (
        select least(min(l.tokens), min(l.input_tokens))
        from limits_in_force(
            r.workspace_id, array[r.resource_id, r.connection_id, r.model_scope_id], clock()
        ) l
    ) as most_tokens
from resources r
join connections c on c.workspace_id = r.workspace_id and c.connection_id = r.connection_id
where r.workspace_id = %(workspace_id)s
    and r.environment_id = %(environment_id)s
    and r.resource_id = %(resource_id)s
    and r.owner_id is null;

-- name: resource_named
-- The same by name.
select r.workspace_id, r.resource_id, r.environment_id, r.connection_id, r.name, r.description, r.model,
    r.default_args, r.capacity, r.enforce_capacity, r.timeout_ms, r.concurrency, r.created_at, r.updated_at,
    r.owner_id, r.use_fallback, r.fallback_ids, r.fallback_on, r.secondary_ids, r.routing, r.created_by, r.updated_by,
    c.provider, (
        select least(min(l.tokens), min(l.input_tokens))
        from limits_in_force(
            r.workspace_id, array[r.resource_id, r.connection_id, r.model_scope_id], clock()
        ) l
    ) as most_tokens
from resources r
join connections c on c.workspace_id = r.workspace_id and c.connection_id = r.connection_id
where r.workspace_id = %(workspace_id)s
    and r.environment_id = %(environment_id)s
    and r.name = %(name)s
    and r.owner_id is null;

-- name: resources_page
-- Resources of an environment, oldest first, those after a given id; optionally of one connection, of a name, or
-- among some ids.
select r.workspace_id, r.resource_id, r.environment_id, r.connection_id, r.name, r.description, r.model,
    r.default_args, r.capacity, r.enforce_capacity, r.timeout_ms, r.concurrency, r.created_at, r.updated_at,
    r.owner_id, r.use_fallback, r.fallback_ids, r.fallback_on, r.secondary_ids, r.routing, r.created_by, r.updated_by,
    c.provider, null::bigint as most_tokens
from resources r
join connections c on c.workspace_id = r.workspace_id and c.connection_id = r.connection_id
where r.workspace_id = %(workspace_id)s
    and r.environment_id = %(environment_id)s
    and r.owner_id is null
    and (%(after)s::uuid is null or r.resource_id > %(after)s::uuid)
    and (%(connection_id)s::uuid is null or r.connection_id = %(connection_id)s::uuid)
    and (%(name)s::text is null or r.name = %(name)s::text)
    and (%(among)s::uuid[] is null or r.resource_id = any (%(among)s::uuid[]))
order by r.resource_id
limit %(most)s;

-- name: resource_alternates
-- The alternates of resources.
select r.workspace_id, r.resource_id, r.environment_id, r.connection_id, r.name, r.description, r.model,
    r.default_args, r.capacity, r.enforce_capacity, r.timeout_ms, r.concurrency, r.created_at, r.updated_at,
    r.owner_id, r.use_fallback, r.fallback_ids, r.fallback_on, r.secondary_ids, r.routing, r.created_by, r.updated_by,
    c.provider, (
        select least(min(l.tokens), min(l.input_tokens))
        from limits_in_force(
            r.workspace_id, array[r.resource_id, r.connection_id, r.model_scope_id], clock()
        ) l
    ) as most_tokens
from resources r
join connections c on c.workspace_id = r.workspace_id and c.connection_id = r.connection_id
where r.workspace_id = %(workspace_id)s and r.owner_id = any (%(owner_ids)s::uuid[])
order by r.resource_id;

-- name: resources_lock
-- Resources in key order: one change of each at a time; the mutexes of their limits are held already.
select resource_id
from resources
where workspace_id = %(workspace_id)s and resource_id = any (%(resource_ids)s::uuid[])
order by resource_id
for no key update;

-- name: resources_hold
-- The same for their deletion, for which also nobody may hold on to them.
select resource_id
from resources
where workspace_id = %(workspace_id)s and resource_id = any (%(resource_ids)s::uuid[])
order by resource_id
for update;

-- name: resources_pin
-- Keep resources from being deleted until the commit; those that there are. Weaker than any change of them.
select resource_id
from resources
where workspace_id = %(workspace_id)s and resource_id = any (%(resource_ids)s::uuid[])
order by resource_id
for key share;

-- name: resource_change
-- What people may change of a resource, as it is from now on; workers read its route anew for updated_at, and those of
-- its alternates, which ask as it does.
update resources
set name = %(name)s, description = %(description)s, connection_id = %(connection_id)s, model = %(model)s,
    model_scope_id = %(model_scope_id)s, default_args = %(default_args)s, capacity = %(capacity)s,
    enforce_capacity = %(enforce_capacity)s, timeout_ms = %(timeout_ms)s, concurrency = %(concurrency)s,
    use_fallback = %(use_fallback)s, fallback_ids = %(fallback_ids)s, fallback_on = %(fallback_on)s,
    secondary_ids = %(secondary_ids)s, routing = %(routing)s, updated_at = clock_timestamp(),
    updated_by = %(updated_by)s
where workspace_id = %(workspace_id)s and resource_id = %(resource_id)s;

-- name: alternates_touch
-- Let workers read the routes of a resource's alternates anew.
update resources
set updated_at = clock_timestamp()
where workspace_id = %(workspace_id)s and owner_id = %(owner_id)s;

-- name: resource_set_timeout
-- Change how long one call may take; null: as long as the connection says.
update resources
set timeout_ms = %(timeout_ms)s, updated_at = clock_timestamp()
where workspace_id = %(workspace_id)s
    and resource_id = %(resource_id)s
    and timeout_ms is distinct from %(timeout_ms)s;

-- name: resource_family
-- Resources and their alternates, with what binds them: what their deletion takes along.
select r.resource_id, r.connection_id, r.model_scope_id
from resources r
where r.workspace_id = %(workspace_id)s
    and (r.resource_id = any (%(resource_ids)s::uuid[]) or r.owner_id = any (%(resource_ids)s::uuid[]))
order by r.resource_id;

-- name: resources_on
-- Resources whose own model is on a connection.
select resource_id, name
from resources
where workspace_id = %(workspace_id)s and connection_id = %(connection_id)s and owner_id is null
order by resource_id;

-- name: alternates_on
-- Alternates on a connection, of resources that are elsewhere.
select a.resource_id, a.owner_id, o.name as owner_name
from resources a
join resources o on o.workspace_id = a.workspace_id and o.resource_id = a.owner_id
where a.workspace_id = %(workspace_id)s
    and a.connection_id = %(connection_id)s
    and o.connection_id <> a.connection_id
order by a.resource_id;

-- name: alternates_drop
-- Take alternates out of the lists of their owners. The owners' rows are locked already.
update resources o
set fallback_ids = array(
        select i.id from unnest(o.fallback_ids) with ordinality as i (id, position)
        where i.id <> all (%(alternate_ids)s::uuid[])
        order by i.position
    ),
    secondary_ids = array(
        select i.id from unnest(o.secondary_ids) with ordinality as i (id, position)
        where i.id <> all (%(alternate_ids)s::uuid[])
        order by i.position
    ),
    updated_at = clock_timestamp()
where o.workspace_id = %(workspace_id)s and o.resource_id = any (%(owner_ids)s::uuid[]);

-- name: routings
-- The rules of those of some resources that have any.
select resource_id, routing
from resources
where workspace_id = %(workspace_id)s
    and resource_id = any (%(resource_ids)s::uuid[])
    and routing is not null
order by resource_id;

-- name: resource_set_routing
-- Replace the rules of a resource.
update resources
set routing = %(routing)s, updated_at = clock_timestamp()
where workspace_id = %(workspace_id)s and resource_id = %(resource_id)s;

-- name: open_batches
-- Batches of which something is still to be done by some resources.
select distinct f.batch_id
from flows f
where f.workspace_id = %(workspace_id)s and f.resource_id = any (%(resource_ids)s::uuid[]) and f.is_open
order by f.batch_id;

-- name: scopes_close
-- Lock the mutexes of scopes in key order, for their deletion: no claim holds them any more, none will begin.
select scope_id
from limit_scopes
where workspace_id = %(workspace_id)s and scope_id = any (%(scope_ids)s::uuid[])
order by scope_id
for update;

-- name: resources_delete
-- Remove resources with their alternates; what was asked of them stays with its batches.
delete from resources
where workspace_id = %(workspace_id)s and resource_id = any (%(resource_ids)s::uuid[]);

-- name: resource_states_delete
-- Forget what was learned about resources that are gone.
delete from resource_states
where workspace_id = %(workspace_id)s and resource_id = any (%(resource_ids)s::uuid[]);

-- name: ready_delete
-- No worker looks for work of resources that are gone.
delete from ready
where workspace_id = %(workspace_id)s and resource_id = any (%(resource_ids)s::uuid[]);

-- name: scopes_delete
-- Remove scopes that nothing names any more, with their limits and those of the values of their dimensions.
with gone as (
    select s.workspace_id, s.scope_id
    from limit_scopes s
    where s.workspace_id = %(workspace_id)s
        and s.scope_id = any (%(scope_ids)s::uuid[])
        and not exists (
            select from resources r
            where r.workspace_id = s.workspace_id and s.scope_id in (r.resource_id, r.model_scope_id)
        )
        and not exists (
            select from connections c where c.workspace_id = s.workspace_id and c.connection_id = s.scope_id
        )
),
forgotten as (
    delete from scope_states t
    using gone g
    where t.workspace_id = g.workspace_id and t.scope_id = g.scope_id
)
delete from limit_scopes s
using gone g
where s.workspace_id = g.workspace_id
    and (
        s.scope_id = g.scope_id
        or s.kind = 'value' and s.scope_id in (
            select v.scope_id
            from limits l
            join limits v on v.workspace_id = l.workspace_id and v.parent_id = l.limit_id
            where l.workspace_id = g.workspace_id and l.scope_id = g.scope_id
        )
    );

-- name: error_rate
-- How many calls of a resource's own model ended within some minutes, and how many of them failed. What the provider
-- put off, and what was never sent, is neither.
select count(*)::int as calls, (count(*) filter (where a.outcome <> 'answered'))::int as failed
from attempts a
where a.workspace_id = %(workspace_id)s
    and a.resource_id = %(resource_id)s
    and a.ended_at > clock() - make_interval(mins => %(minutes)s)
    and a.outcome in ('answered', 'rejected', 'unreachable');
