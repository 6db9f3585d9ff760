-- Workspaces, environments, api keys, and the limits of scopes.

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
where workspace_id = %(workspace_id)s and environment_id = %(environment_id)s and deleted_at is null;

-- name: environment_named
-- The environment of the command line: by the names of workspace and environment.
select e.workspace_id, e.environment_id, e.name
from environments e
join workspaces w on w.workspace_id = e.workspace_id
where w.name = %(workspace)s and e.name = %(environment)s and e.deleted_at is null
order by w.created_at
limit 1;

-- name: setup_lock
-- One process at a time makes what the command line makes by itself; held to the end of the transaction.
select pg_advisory_xact_lock(hashtext('sluice.setup'))::text as locked;

-- name: scope_state_insert
-- What will be learned about a connection, or a model on it.
insert into scope_states (workspace_id, scope_id) values (%(workspace_id)s, %(scope_id)s)
on conflict do nothing;

-- name: scope_insert
-- The mutex of something that may have limits.
insert into limit_scopes (workspace_id, scope_id, kind)
values (%(workspace_id)s, %(scope_id)s, %(kind)s::scope_kind)
on conflict do nothing;

-- name: scopes_lock
-- The mutexes of a scope and of the values of its dimensions, in key order: claims that set flows aside for these
-- limits have committed when this returns, and are found by flows_wake.
select 1 as locked
from limit_scopes s
where s.workspace_id = %(workspace_id)s
    and (
        s.scope_id = %(scope_id)s
        or s.scope_id in (
            select v.scope_id
            from limits l
            join limits v on v.workspace_id = l.workspace_id and v.parent_id = l.limit_id
            where l.workspace_id = %(workspace_id)s and l.scope_id = %(scope_id)s
        )
    )
order by s.scope_id
for no key update;

-- name: limit_insert
-- A limit on a scope.
insert into limits (
    workspace_id, limit_id, scope_id, period, sliding, dimension, requests, tokens, input_tokens, output_tokens,
    cost_nano
)
values (
    %(workspace_id)s, %(limit_id)s, %(scope_id)s, %(period)s::limit_period, %(sliding)s, %(dimension)s,
    %(requests)s, %(tokens)s, %(input_tokens)s, %(output_tokens)s, %(cost_nano)s
);

-- name: limit_observed_insert
-- The account of all that is asked of a model, without a bound until the provider shows one.
insert into limits (workspace_id, limit_id, scope_id, period, sliding, source)
values (%(workspace_id)s, %(limit_id)s, %(scope_id)s, 'minute', true, 'observed');

-- name: limits_of
-- The limits that people gave scopes.
select limit_id, scope_id, period::text as period, sliding, dimension, requests, tokens, input_tokens,
    output_tokens, cost_nano
from limits
where workspace_id = %(workspace_id)s
    and scope_id = any (%(scope_ids)s::uuid[])
    and source = 'given'
    and parent_id is null
order by scope_id, limit_id;

-- name: limit_change
-- Change a limit's amounts, and those of the values of its dimension; the accounts in the ledger stay.
update limits
set requests = %(requests)s, tokens = %(tokens)s, input_tokens = %(input_tokens)s,
    output_tokens = %(output_tokens)s, cost_nano = %(cost_nano)s, updated_at = clock_timestamp()
where workspace_id = %(workspace_id)s and %(limit_id)s::uuid in (limit_id, parent_id);

-- name: limit_delete
-- Remove a limit.
delete from limits where workspace_id = %(workspace_id)s and limit_id = %(limit_id)s;

-- name: scope_batches
-- Batches with open flows to which a scope's limits apply: for limits with a dimension.
select distinct f.batch_id
from flows f
join resources r on r.workspace_id = f.workspace_id and r.resource_id = f.resource_id
where f.workspace_id = %(workspace_id)s
    and f.is_open
    and (%(scope_id)s = any (f.scope_ids) or %(scope_id)s in (r.resource_id, r.connection_id))
order by f.batch_id;

-- name: flows_attach_dimensions
-- Give a batch's flows the scopes that count its values of dimensions.
select flows_attach_dimensions(%(workspace_id)s, %(batch_id)s)::text as attached;

-- name: flows_wake
-- What waits for a limit of its own looks again: limits of this scope were changed. Locks in key order.
with waiting as (
    select f.workspace_id, f.batch_id, f.resource_id
    from flows f
    where f.workspace_id = %(workspace_id)s
        and f.is_open
        and f.waits_for is not null
        and (
            %(scope_id)s = any (f.scope_ids)
            or exists (
                select from resources r
                where r.workspace_id = f.workspace_id
                    and r.resource_id = f.resource_id
                    and %(scope_id)s in (r.resource_id, r.connection_id)
            )
        )
    order by f.batch_id, f.resource_id
    for no key update
)
update flows f
set waits_until = '-infinity', waits_for = null,
    virtual_time = greatest(f.virtual_time, flow_entry(f.workspace_id, f.resource_id, f.priority))
from waiting w
where f.workspace_id = w.workspace_id and f.batch_id = w.batch_id and f.resource_id = w.resource_id;

-- name: ready_wake
-- What waits for capacity looks again: this scope's limits or concurrency were changed. Locks in key order.
with waiting as (
    select r.workspace_id, r.resource_id
    from ready r
    join resources o on o.workspace_id = r.workspace_id and o.resource_id = r.resource_id
    where r.workspace_id = %(workspace_id)s
        and (
            %(scope_id)s in (o.resource_id, o.connection_id, o.model_scope_id)
            or exists (
                select from flows f
                where f.workspace_id = r.workspace_id
                    and f.resource_id = r.resource_id
                    and f.is_open
                    and %(scope_id)s = any (f.scope_ids)
            )
        )
        and (r.next_at < 'infinity' or r.reason is not null)
    order by r.resource_id
    for no key update of r
)
update ready r
set next_at = least(r.next_at, clock_timestamp()), reason = null, waits_for = null
from waiting w
where r.workspace_id = w.workspace_id and r.resource_id = w.resource_id
returning r.resource_id;

-- name: limits_used
-- Each limit that binds scopes and what of it counts at present.
select l.limit_id, l.scope_id, l.period::text as period, l.sliding, l.source::text as source, l.requests, l.tokens,
    l.input_tokens, l.output_tokens, used.requests as used_requests, used.input_tokens as used_input_tokens,
    used.output_tokens as used_output_tokens
from limits_in_force(%(workspace_id)s, %(scope_ids)s::uuid[], clock_timestamp()) l
cross join lateral (
    select coalesce(sum(g.requests + g.outside_requests), 0)::bigint as requests,
        coalesce(sum(g.input_tokens + g.outside_input_tokens), 0)::bigint as input_tokens,
        coalesce(sum(g.output_tokens + g.outside_output_tokens), 0)::bigint as output_tokens
    from ledger g
    where g.workspace_id = %(workspace_id)s
        and g.limit_id = l.limit_id
        and g.slot_at > counts_after(
            l.period, l.sliding, clock_timestamp(), make_interval(secs => %(guard_s)s)
        )
) used
order by l.scope_id, l.limit_id;

