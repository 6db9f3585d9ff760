-- What binds whom, what of it is used, and what competes for it: for people who look, not for the claim.

-- name: batch_scopes
-- The scopes whose limits bind a batch: of its resources, and its own.
select distinct s.scope_id
from flows f
join resources r on r.workspace_id = f.workspace_id and r.resource_id = f.resource_id
cross join lateral unnest(array[r.connection_id, r.model_scope_id, r.resource_id] || f.scope_ids) as s (scope_id)
where f.workspace_id = %(workspace_id)s and f.batch_id = %(batch_id)s;

-- name: resource_scopes
-- The scopes whose limits bind every item of a resource, and the values that its open batches are counted by.
select r.connection_id as scope_id
from resources r
where r.workspace_id = %(workspace_id)s and r.resource_id = %(resource_id)s
union
select r.model_scope_id
from resources r
where r.workspace_id = %(workspace_id)s and r.resource_id = %(resource_id)s
union
select r.resource_id
from resources r
where r.workspace_id = %(workspace_id)s and r.resource_id = %(resource_id)s
union
select s.scope_id
from flows f
cross join lateral unnest(f.scope_ids) as o (scope_id)
join limit_scopes s on s.workspace_id = f.workspace_id and s.scope_id = o.scope_id and s.kind = 'value'
where f.workspace_id = %(workspace_id)s and f.resource_id = %(resource_id)s and f.is_open;

-- name: connection_scopes
-- A connection's own scope, those of its models, and the values of its own limits' dimensions in open batches.
select %(connection_id)s::uuid as scope_id
union
select r.model_scope_id
from resources r
where r.workspace_id = %(workspace_id)s and r.connection_id = %(connection_id)s
union
select v.scope_id
from limits l
join limits v on v.workspace_id = l.workspace_id and v.parent_id = l.limit_id
where l.workspace_id = %(workspace_id)s
    and l.scope_id = %(connection_id)s
    and l.dimension is not null
    and exists (
        select from resources r
        join flows f on f.workspace_id = r.workspace_id and f.resource_id = r.resource_id and f.is_open
        where r.workspace_id = l.workspace_id
            and r.connection_id = l.scope_id
            and f.scope_ids @> array[v.scope_id]
    );

-- name: api_key_scopes
-- A key's own scope, and the values of its own limits' dimensions in open batches.
select %(api_key_id)s::uuid as scope_id
union
select v.scope_id
from limits l
join limits v on v.workspace_id = l.workspace_id and v.parent_id = l.limit_id
where l.workspace_id = %(workspace_id)s
    and l.scope_id = %(api_key_id)s
    and l.dimension is not null
    and exists (
        select from flows f
        where f.workspace_id = l.workspace_id and f.is_open and f.scope_ids @> array[v.scope_id]
    );

-- name: scopes_named
-- What scopes are, for people. Of a dimension's value: the dimension, and the value as a batch has it; it is
-- looked for in one batch if that is given, else in the open ones.
select s.scope_id, s.kind::text as kind, p.dimension,
    coalesce(c.name, r.name, k.name, b.name, m.model) as name,
    case when p.dimension = 'source-ip' then o.source_ip
        else o.metadata ->> substr(p.dimension, length('metadata:') + 1) end as value
from limit_scopes s
left join connections c on c.workspace_id = s.workspace_id and c.connection_id = s.scope_id
left join resources r on r.workspace_id = s.workspace_id and r.resource_id = s.scope_id
left join api_keys k on k.workspace_id = s.workspace_id and k.api_key_id = s.scope_id
left join batches b on b.workspace_id = s.workspace_id and b.batch_id = s.scope_id
left join lateral (
    select e.model from resources e
    where s.kind = 'model' and e.workspace_id = s.workspace_id and e.model_scope_id = s.scope_id
    limit 1
) m on true
left join lateral (
    select a.dimension
    from limits l
    join limits a on a.workspace_id = l.workspace_id and a.limit_id = l.parent_id
    where s.kind = 'value' and l.workspace_id = s.workspace_id and l.scope_id = s.scope_id
    limit 1
) p on true
left join lateral (
    (
        select a.source_ip, a.metadata
        from batches a
        where s.kind = 'value'
            and a.workspace_id = s.workspace_id
            and a.batch_id = %(batch_id)s::uuid
    )
    union all
    (
        select a.source_ip, a.metadata
        from flows f
        join batches a on a.workspace_id = f.workspace_id and a.batch_id = f.batch_id
        where s.kind = 'value'
            and %(batch_id)s::uuid is null
            and f.workspace_id = s.workspace_id
            and f.is_open
            and f.scope_ids @> array[s.scope_id]
    )
    limit 1
) o on true
where s.workspace_id = %(workspace_id)s and s.scope_id = any (%(scope_ids)s::uuid[])
order by s.kind, s.scope_id;

-- name: limits_usage
-- Each limit that binds scopes: what of it counts, what of that calls in flight have only reserved (if asked for:
-- it reads the index of all running items), what stops counting next, and when a period of the calendar ends. Of a
-- model's account also what was claimed lately: for at most a minute, and no longer than claimable work has
-- been there that no limit and no rest held up.
with clocked as materialized (
    select clock_timestamp() as now, make_interval(secs => %(guard_s)s::double precision) as guard
),
bound as materialized (
    select l.*, counts_after(l.period, l.sliding, c.now, c.guard) as counts_after
    from clocked c
    cross join lateral limits_in_force(%(workspace_id)s, %(scope_ids)s::uuid[], c.now) l
),
reserved as materialized (
    select o.limit_id, count(*) as requests, sum(i.reserved_input_tokens) as input_tokens,
        sum(i.reserved_output_tokens) as output_tokens
    from items i
    cross join lateral unnest(i.reserved_limits) as o (limit_id)
    join bound b on b.limit_id = o.limit_id
    where %(with_reserved)s::boolean
        and i.status = 'running'
        and i.workspace_id = %(workspace_id)s
        and slot_of(b.period, b.sliding, i.claimed_at) > b.counts_after
    group by o.limit_id
)
select l.limit_id, l.scope_id, l.period::text as period, l.sliding, l.source::text as source, l.requests,
    l.tokens, l.input_tokens, l.output_tokens, l.paced_requests, u.requests as used_requests,
    u.input_tokens as used_input_tokens, u.output_tokens as used_output_tokens,
    coalesce(r.requests, 0)::bigint as reserved_requests,
    coalesce(r.input_tokens, 0)::bigint as reserved_input_tokens,
    coalesce(r.output_tokens, 0)::bigint as reserved_output_tokens,
    nullif(slot_frees_at(l.period, l.sliding, o.slot_at, c.guard), 'infinity') as release_at,
    coalesce(o.requests, 0)::bigint as release_requests,
    coalesce(o.input_tokens, 0)::bigint as release_input_tokens,
    coalesce(o.output_tokens, 0)::bigint as release_output_tokens,
    case when not l.sliding and l.period <> 'lifetime'
        then slot_frees_at(l.period, false, slot_of(l.period, false, c.now), c.guard) end as resets_at,
    w.seconds as recent_s, coalesce(w.requests, 0)::bigint as recent_requests, c.now
from bound l
cross join clocked c
cross join lateral (
    select coalesce(sum(g.requests + g.outside_requests), 0)::bigint as requests,
        coalesce(sum(g.input_tokens + g.outside_input_tokens), 0)::bigint as input_tokens,
        coalesce(sum(g.output_tokens + g.outside_output_tokens), 0)::bigint as output_tokens
    from ledger g
    where g.workspace_id = %(workspace_id)s and g.limit_id = l.limit_id and g.slot_at > l.counts_after
) u
left join lateral (
    select g.slot_at, g.requests + g.outside_requests as requests,
        g.input_tokens + g.outside_input_tokens as input_tokens,
        g.output_tokens + g.outside_output_tokens as output_tokens
    from ledger g
    where g.workspace_id = %(workspace_id)s
        and g.limit_id = l.limit_id
        and g.slot_at > l.counts_after
        and g.requests + g.outside_requests + g.input_tokens + g.outside_input_tokens
            + g.output_tokens + g.outside_output_tokens > 0
    order by g.slot_at
    limit 1
) o on true
left join reserved r on r.limit_id = l.limit_id
left join lateral (
    select b.seconds, (
        select sum(g.requests)
        from ledger g
        where g.workspace_id = %(workspace_id)s
            and g.limit_id = l.limit_id
            and g.slot_at > c.now - make_interval(secs => b.seconds)
    ) as requests
    from (
        select extract(epoch from least(interval '60 s', c.now - min(f.created_at)))::double precision as seconds
        from resources e
        join flows f on f.workspace_id = e.workspace_id and f.resource_id = e.resource_id
        left join ready y on y.workspace_id = e.workspace_id and y.resource_id = e.resource_id
        where l.source = 'observed'
            and l.period = 'minute'
            and e.workspace_id = %(workspace_id)s
            and e.model_scope_id = l.scope_id
            and f.is_open
            and not f.is_paused
            and not f.is_cancelled
            and f.pending > 0
            and f.waits_until <= c.now
            and (y.next_at <= c.now or coalesce(y.reason not in ('capacity', 'cooldown', 'retry'), true))
        having count(*) > 0
    ) b
) w on true
order by l.scope_id, l.limit_id;

-- name: flows_competing
-- Open flows that share a scope with those given: what waits of each, and how large its items are by what is
-- known: its own answers, those of its resource, what its first items allow.
select f.batch_id, f.resource_id, f.priority, f.weight::double precision as weight, f.pending,
    array[r.connection_id, r.model_scope_id, r.resource_id] || f.scope_ids as scope_ids,
    case when f.completed > 0 then f.input_tokens::double precision / f.completed
        else b.estimated_input_tokens::double precision / b.total_items end as mean_input_tokens,
    coalesce(
        case when f.completed >= 20 then f.output_tokens::double precision / f.completed end,
        s.output_mean,
        case when f.completed > 0 then f.output_tokens::double precision / f.completed end,
        (
            select avg(coalesce(i.max_output_tokens, 1024))::double precision
            from (
                select i.max_output_tokens
                from items i
                where i.workspace_id = f.workspace_id
                    and i.batch_day = f.batch_day
                    and i.batch_id = f.batch_id
                    and i.resource_id = f.resource_id
                    and i.status = 'pending'
                    and i.attempt = 0
                    and i.seq >= f.floor
                order by i.seq
                limit 20
            ) i
        ),
        1024
    ) as mean_output_tokens,
    greatest(extract(epoch from k.blocked_until - clock_timestamp()), 0)::double precision as blocked_s
from flows f
join resources r on r.workspace_id = f.workspace_id and r.resource_id = f.resource_id
join batches b on b.workspace_id = f.workspace_id and b.batch_id = f.batch_id
left join resource_states s on s.workspace_id = f.workspace_id and s.resource_id = f.resource_id
left join lateral (
    select max(e.blocked_until) as blocked_until
    from scope_states e
    where e.workspace_id = r.workspace_id
        and e.scope_id in (r.connection_id, r.model_scope_id)
        and e.blocked_until > clock_timestamp()
) k on true
where f.workspace_id = %(workspace_id)s
    and f.is_open
    and not f.is_paused
    and not f.is_cancelled
    and f.pending > 0
    and coalesce(f.expires_at, 'infinity') > clock_timestamp()
    and (array[r.connection_id, r.model_scope_id, r.resource_id] || f.scope_ids) && %(scope_ids)s::uuid[];

-- name: resources_learned
-- Where items of resources would be counted, how long their answers are, and how long they rest.
select r.resource_id, array[r.connection_id, r.model_scope_id, r.resource_id] as scope_ids, s.output_mean,
    greatest(extract(epoch from k.blocked_until - clock_timestamp()), 0)::double precision as blocked_s
from resources r
left join resource_states s on s.workspace_id = r.workspace_id and s.resource_id = r.resource_id
left join lateral (
    select max(e.blocked_until) as blocked_until
    from scope_states e
    where e.workspace_id = r.workspace_id
        and e.scope_id in (r.connection_id, r.model_scope_id)
        and e.blocked_until > clock_timestamp()
) k on true
where r.workspace_id = %(workspace_id)s and r.resource_id = any (%(resource_ids)s::uuid[]);

-- name: batch_waits
-- What each flow of a batch with items in line waits for, as the scheduler left it, and whether any worker lives.
select f.resource_id, f.is_paused, y.reason::text as reason, y.waits_for,
    nullif(y.next_at, 'infinity') as next_at,
    f.waits_until > clock_timestamp() as is_set_aside,
    case when f.waits_until > clock_timestamp() then nullif(f.waits_until, 'infinity') end as own_until,
    f.waits_for as own_waits_for, null::uuid as waits_in, clock_timestamp() as now, w.alive as has_worker
from flows f
left join ready y on y.workspace_id = f.workspace_id and y.resource_id = f.resource_id
cross join lateral (
    select exists (
        select from workers w
        where w.stopped_at is null
            and w.died_at is null
            and w.heartbeat_at > clock_timestamp() - make_interval(secs => %(dead_after_s)s::double precision)
    ) as alive
) w
where f.workspace_id = %(workspace_id)s
    and f.batch_id = %(batch_id)s
    and f.is_open
    and not f.is_cancelled
    and f.pending > 0
    and coalesce(f.expires_at, 'infinity') > clock_timestamp()
order by f.resource_id;

-- name: resource_waits
-- The same of a resource: of all its flows with items in line. waits_in: the scope of the limit that is waited for.
select y.resource_id, f.is_paused, y.reason::text as reason, y.waits_for, nullif(y.next_at, 'infinity') as next_at,
    false as is_set_aside, null::timestamptz as own_until, null::uuid as own_waits_for, l.scope_id as waits_in,
    clock_timestamp() as now, w.alive as has_worker
from ready y
left join limits l on l.workspace_id = y.workspace_id and l.limit_id = y.waits_for
join lateral (
    select bool_and(f.is_paused) as is_paused
    from flows f
    where f.workspace_id = y.workspace_id
        and f.resource_id = y.resource_id
        and f.is_open
        and not f.is_cancelled
        and f.pending > 0
        and coalesce(f.expires_at, 'infinity') > clock_timestamp()
) f on f.is_paused is not null
cross join lateral (
    select exists (
        select from workers w
        where w.stopped_at is null
            and w.died_at is null
            and w.heartbeat_at > clock_timestamp() - make_interval(secs => %(dead_after_s)s::double precision)
    ) as alive
) w
where y.workspace_id = %(workspace_id)s and y.resource_id = %(resource_id)s;

-- name: models_learned
-- What replies have taught of a connection's models (of one resource's, if it is given), one row per limit that a
-- provider stated within the week, or one without; and, without a model, of the connection itself.
select e.model, floor(s.ceiling)::bigint as ceiling, floor(s.concurrency)::int as concurrency,
    case when s.blocked_until > clock_timestamp() then s.blocked_until end as blocked_until,
    case when s.blocked_until > clock_timestamp() then s.blocked_reason end as blocked_reason,
    l.period::text as period, l.requests, l.tokens, l.input_tokens, l.output_tokens, l.observed_at
from (
    select null::text as model, %(connection_id)s::uuid as scope_id
    union
    select r.model, r.model_scope_id
    from resources r
    where r.workspace_id = %(workspace_id)s
        and r.connection_id = %(connection_id)s
        and r.resource_id = coalesce(%(resource_id)s::uuid, r.resource_id)
) e
join scope_states s on s.workspace_id = %(workspace_id)s and s.scope_id = e.scope_id
left join limits l on l.workspace_id = s.workspace_id
    and l.scope_id = s.scope_id
    and l.source = 'observed'
    and l.observed_at > clock_timestamp() - interval '7 days'
    and coalesce(l.requests, l.tokens, l.input_tokens, l.output_tokens) is not null
order by e.model nulls first, l.period;
