-- Limits and the ledger: slots, what is left, what the even pace allows, when there is room again.
--
-- The small functions here are made to be inlined: not inlined, each call costs as much as a statement (five
-- microseconds). So none is STRICT, which case and least are not either, and none claims to be less volatile than what it
-- calls: adding an interval to a timestamptz is STABLE. tests/test_plans.py looks.

-- How long a sliding period is. Hours, not days and months: those would depend on a time zone.
create or replace function period_length(period limit_period) returns interval
language sql immutable parallel safe
as $$
    select case period
        when 'minute' then interval '60 seconds'
        when 'hour' then interval '3600 seconds'
        when 'day' then interval '24 hours'
        when 'week' then interval '168 hours'
        when 'month' then interval '720 hours'
    end
$$;
comment on function period_length(limit_period) is 'Length of a sliding period; null: lifetime.';

-- How long the ledger slots of a sliding period are: a quarter of a second of a minute, a 120th of longer ones.
create or replace function slot_length(period limit_period) returns interval
language sql immutable parallel safe
as $$ select period_length(period) / case when period = 'minute' then 240 else 120 end $$;
comment on function slot_length(limit_period) is 'Length of the ledger slots of a sliding period.';

-- When the ledger slot began that a claim at this time falls into; of the UTC calendar it is the whole period.
create or replace function slot_of(period limit_period, sliding boolean, at timestamptz)
returns timestamptz
language sql immutable parallel safe
as $$
    select case
        when period = 'lifetime' then 'epoch'::timestamptz
        when sliding then date_bin(slot_length(period), at, 'epoch')
        when period = 'month' then date_trunc('month', at at time zone 'UTC') at time zone 'UTC'
        -- From a Monday on, because weeks begin so.
        else date_bin(period_length(period), at, timestamptz '1970-01-05 00:00:00Z')
    end
$$;
comment on function slot_of(limit_period, boolean, timestamptz) is 'Beginning of the ledger slot of a time.';

-- When what was claimed in a slot stops counting. Sliding: a period and the guard after the slot's end; the
-- guard is there because a provider counts arrivals, not claims.
create or replace function slot_frees_at(
    period limit_period, sliding boolean, slot_at timestamptz, guard interval
)
returns timestamptz
language sql stable parallel safe
as $$
    select case
        when period = 'lifetime' then 'infinity'::timestamptz
        when sliding then slot_at + slot_length(period) + period_length(period) + guard
        when period = 'month'
            then (slot_at at time zone 'UTC' + interval '1 month') at time zone 'UTC'
        else slot_at + period_length(period)
    end
$$;
comment on function slot_frees_at(limit_period, boolean, timestamptz, interval) is
    'When the usage in a ledger slot stops counting against its limit.';

-- The same seen from now: slots that began after this count.
create or replace function counts_after(
    period limit_period, sliding boolean, now timestamptz, guard interval
)
returns timestamptz
language sql stable parallel safe
as $$
    select case
        when sliding then now - period_length(period) - slot_length(period) - guard
        else slot_of(period, false, now) - interval '1 microsecond'
    end
$$;
comment on function counts_after(limit_period, boolean, timestamptz, interval) is
    'Ledger slots that began after this count against the limit.';

-- The limits of scopes as they bind now. What a provider stated binds for a week; a model's observed limit per
-- minute is bounded by what refusals have taught (scope_states.ceiling), at first perhaps only in its pace
-- (scope_states.is_window). A limit with a dimension does not bind itself,
-- its children do.
create or replace function limits_in_force(p_workspace_id uuid, p_scope_ids uuid[], p_now timestamptz)
returns table (
    limit_id uuid, scope_id uuid, period limit_period, sliding boolean, source limit_source,
    requests bigint, tokens bigint, input_tokens bigint, output_tokens bigint, paced_requests bigint,
    cost_nano bigint
)
language sql stable
as $$
    select l.limit_id, l.scope_id, l.period, l.sliding, l.source,
        least(case when fresh.yes then l.requests end, case when learned.is_window then learned.ceiling end),
        case when fresh.yes then l.tokens end,
        case when fresh.yes then l.input_tokens end,
        case when fresh.yes then l.output_tokens end,
        least(case when fresh.yes then l.requests end, learned.ceiling),
        l.cost_nano
    from limits l
    cross join lateral (
        select l.source = 'given' or l.observed_at > p_now - interval '7 days' as yes
    ) fresh
    left join lateral (
        select floor(s.ceiling)::bigint as ceiling, s.is_window
        from scope_states s
        where l.source = 'observed'
            and l.period = 'minute'
            and s.workspace_id = l.workspace_id
            and s.scope_id = l.scope_id
    ) learned on true
    where l.workspace_id = p_workspace_id
        and l.scope_id = any (p_scope_ids)
        and l.dimension is null
$$;
comment on function limits_in_force(uuid, uuid[], timestamptz) is 'The limits of scopes as they bind now.';

-- What each limit of some scopes leaves, and what of that its pace allows.
--
-- The pace. A limit per minute is not spent in one burst, because providers police shorter windows and slopes:
-- for every slot, what was claimed since its start may exceed the even rate by at most p_burst_s seconds of it
-- (but at least one request). Those are the conditions of a token bucket; slots make it laxer by at most their
-- quarter second, so that 0.3 stays below a bucket of one second. Sixty seconds or more: no pace. Tokens are paced by
-- what is expected, not by what is reserved: reservations are far above the true usage until it is known (pace_room
-- says how close to the burst that may go). What others used at the provider counts for the limit, not for our pace;
-- nor does what went out before the last refusal (p_paced_since): then the provider's own account was empty, not in debt.
create or replace function budgets(
    p_workspace_id uuid, p_scope_ids uuid[], p_now timestamptz, p_guard interval,
    p_burst_s double precision, p_paced_since timestamptz
)
returns setof budget
language sql stable
as $$
    select row(
        l.limit_id, l.scope_id, l.requests, l.tokens, l.input_tokens, l.output_tokens,
        l.requests - coalesce(u.requests, 0),
        l.tokens - coalesce(u.input_tokens + u.output_tokens, 0),
        l.input_tokens - coalesce(u.input_tokens, 0),
        l.output_tokens - coalesce(u.output_tokens, 0),
        case when r.requests is not null
            then greatest(r.requests * p_burst_s, 1) + least(u.paced_requests, 0) end,
        r.tokens * p_burst_s + least(u.paced_tokens, 0),
        r.input_tokens * p_burst_s + least(u.paced_input_tokens, 0),
        r.output_tokens * p_burst_s + least(u.paced_output_tokens, 0),
        r.requests, r.tokens, r.input_tokens, r.output_tokens, l.cost_nano,
        l.cost_nano - coalesce(u.cost_nano, 0)
    )::budget
    from limits_in_force(p_workspace_id, p_scope_ids, p_now) l
    -- Per second; null where nothing is paced.
    cross join lateral (
        select l.paced_requests / p.seconds as requests, l.tokens / p.seconds as tokens,
            l.input_tokens / p.seconds as input_tokens, l.output_tokens / p.seconds as output_tokens
        from (
            select case when l.period = 'minute' and p_burst_s < 60 then 60::double precision end as seconds
        ) p
    ) r
    left join lateral (
        select sum(s.requests + s.outside_requests) as requests,
            sum(s.input_tokens + s.outside_input_tokens) as input_tokens,
            sum(s.output_tokens + s.outside_output_tokens) as output_tokens,
            sum(s.cost_nano) as cost_nano,
            min(r.requests * s.age - s.requests_since) filter (where s.is_paced) as paced_requests,
            min(r.tokens * s.age - s.input_since - s.output_since) filter (where s.is_paced)
                as paced_tokens,
            min(r.input_tokens * s.age - s.input_since) filter (where s.is_paced) as paced_input_tokens,
            min(r.output_tokens * s.age - s.output_since) filter (where s.is_paced)
                as paced_output_tokens
        from (
            select g.*, extract(epoch from p_now - g.slot_at)::double precision as age,
                g.slot_at > p_paced_since as is_paced,
                sum(g.requests) over later as requests_since,
                sum(g.input_tokens) over later as input_since,
                sum(g.expected_output_tokens) over later as output_since
            from ledger g
            where g.workspace_id = p_workspace_id
                and g.limit_id = l.limit_id
                and g.slot_at > counts_after(l.period, l.sliding, p_now, p_guard)
                and coalesce(l.paced_requests, l.tokens, l.input_tokens, l.output_tokens, l.cost_nano)
                    is not null
            window later as (order by g.slot_at desc)
        ) s
    ) u on true
$$;
comment on function budgets(uuid, uuid[], timestamptz, interval, double precision, timestamptz) is
    'What the limits of scopes leave, and what their even pace allows at once.';

-- How many tokens the pace must have left for an item of this size to go. Twice its size, because nobody knows yet
-- what the calls in flight will use; but at most three quarters of the burst: an item larger than that is a debt, and
-- the next one waits until it is paid.
create or replace function pace_room(p_tokens double precision, p_burst double precision)
returns double precision
language sql immutable parallel safe
as $$ select least(2 * p_tokens, 0.75 * p_burst) $$;
comment on function pace_room(double precision, double precision) is
    'Tokens that the pace must have left for an item of this size to go.';

-- When so much would fit all of the given limits at once, the limit that is the last to allow it, and of what.
-- No row when it fits now; infinity when it never will.
create or replace function capacity_frees(
    p_workspace_id uuid, p_scope_ids uuid[], p_requests bigint, p_input_tokens bigint,
    p_output_tokens bigint, p_now timestamptz, p_guard interval
)
returns table (next_at timestamptz, limit_id uuid, kind text)
language sql stable
as $$
    with wanted as (
        select l.limit_id, l.period, l.sliding, k.kind, k.most, least(k.need, k.most) as need
        from limits_in_force(p_workspace_id, p_scope_ids, p_now) l
        cross join lateral (
            values ('requests', l.requests, p_requests),
                ('tokens', l.tokens, p_input_tokens + p_output_tokens),
                ('input_tokens', l.input_tokens, p_input_tokens),
                ('output_tokens', l.output_tokens, p_output_tokens)
        ) k (kind, most, need)
        where k.most is not null
    ),
    slots as (
        select w.limit_id, w.kind, w.most, w.need,
            slot_frees_at(w.period, w.sliding, g.slot_at, p_guard) as frees_at,
            -- What is still used once this slot has stopped counting: that of the later ones.
            sum(a.amount) over (partition by w.limit_id, w.kind order by g.slot_at desc) - a.amount as later,
            sum(a.amount) over (partition by w.limit_id, w.kind) as used
        from wanted w
        join ledger g on g.workspace_id = p_workspace_id
            and g.limit_id = w.limit_id
            and g.slot_at > counts_after(w.period, w.sliding, p_now, p_guard)
        cross join lateral (
            select case w.kind
                when 'requests' then g.requests + g.outside_requests
                when 'tokens' then g.input_tokens + g.outside_input_tokens
                    + g.output_tokens + g.outside_output_tokens
                when 'input_tokens' then g.input_tokens + g.outside_input_tokens
                else g.output_tokens + g.outside_output_tokens
            end as amount
        ) a
    )
    select min(s.frees_at) as next_at, s.limit_id, s.kind
    from slots s
    where s.used + s.need > s.most and s.later + s.need <= s.most
    group by s.limit_id, s.kind
    order by next_at desc, limit_id
    limit 1
$$;
comment on function capacity_frees(uuid, uuid[], bigint, bigint, bigint, timestamptz, interval) is
    'When so much fits all limits of these scopes, and the limit that is last to allow it.';

-- When a resource has an item that could be claimed, its shared limits apart, and the limit of its own that the
-- flow in question waits for. No row: nothing waits.
create or replace function work_due(p_workspace_id uuid, p_resource_id uuid, p_now timestamptz)
returns table (due_at timestamptz, waits_for uuid)
language sql stable
as $$
    select d.due_at, case when f.waits_until > p_now then f.waits_for end
    from flows f
    left join lateral (
        select i.visible_at
        from items i
        where f.unstarted = 0
            and i.workspace_id = f.workspace_id
            and i.batch_day = f.batch_day
            and i.batch_id = f.batch_id
            and i.resource_id = f.resource_id
            and i.status = 'pending'
            and i.attempt > 0
        order by i.visible_at, i.seq
        limit 1
    ) again on true
    cross join lateral (
        select greatest(f.waits_until, case when f.unstarted > 0 then p_now else again.visible_at end)
            as due_at
    ) d
    where f.workspace_id = p_workspace_id
        and f.resource_id = p_resource_id
        and f.is_open
        and not f.is_paused
        and not f.is_cancelled
        and f.pending > 0
        and coalesce(f.expires_at, 'infinity') > p_now
    order by d.due_at
    limit 1
$$;
comment on function work_due(uuid, uuid, timestamptz) is 'When a resource next has a claimable item.';

-- Attach to a batch's open flows the scopes that count values of dimensions: for every limit with a dimension that
-- applies to a flow, the scope of the batch's value, made where it is missing, with a copy of the limit. A batch
-- without a value is counted with all others that have none.
create or replace function flows_attach_dimensions(p_workspace_id uuid, p_batch_id uuid) returns void
language plpgsql volatile
as $$
declare
    v_limit record;
    v_scope_id uuid;
begin
    for v_limit in
        select f.resource_id, l.*, coalesce(case
                when l.dimension = 'source-ip' then b.source_ip
                else b.metadata ->> substr(l.dimension, length('metadata:') + 1)
            end, '') as value
        from flows f
        join batches b on b.workspace_id = f.workspace_id and b.batch_id = f.batch_id
        join resources r on r.workspace_id = f.workspace_id and r.resource_id = f.resource_id
        join limits l on l.workspace_id = f.workspace_id
            and l.scope_id = any (array[r.connection_id, r.resource_id] || f.scope_ids)
            and l.dimension is not null
        where f.workspace_id = p_workspace_id
            and f.batch_id = p_batch_id
            and b.completed_at is null
        order by f.resource_id, l.limit_id
    loop
        v_scope_id := md5(v_limit.limit_id::text || ' ' || v_limit.value)::uuid;
        insert into limit_scopes (workspace_id, scope_id, kind)
        values (p_workspace_id, v_scope_id, 'value')
        on conflict do nothing;
        -- The account's id follows from its scope's, so that two creators make one.
        insert into limits (workspace_id, limit_id, scope_id, period, sliding, requests, tokens,
            input_tokens, output_tokens, parent_id)
        values (p_workspace_id, md5(v_scope_id::text)::uuid, v_scope_id, v_limit.period, v_limit.sliding,
            v_limit.requests, v_limit.tokens, v_limit.input_tokens, v_limit.output_tokens,
            v_limit.limit_id)
        on conflict do nothing;
        update flows f
        set scope_ids = f.scope_ids || v_scope_id
        where f.workspace_id = p_workspace_id
            and f.batch_id = p_batch_id
            and f.resource_id = v_limit.resource_id
            and not f.scope_ids @> array[v_scope_id];
    end loop;
end
$$;
comment on function flows_attach_dimensions(uuid, uuid) is
    'Give a batch''s flows the scopes that count its values of dimensions.';
