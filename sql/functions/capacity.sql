-- Ledger slots, when a limit has room again, and when a resource has work again.

-- When the ledger slot began that a claim at this time falls into.
create or replace function slot_of(period limit_period, at timestamptz) returns timestamptz
language sql immutable strict parallel safe
as $$
    select case period
        when 'minute' then date_bin('500 milliseconds', at, 'epoch')
        when 'hour' then date_bin('30 seconds', at, 'epoch')
        when 'lifetime' then 'epoch'::timestamptz
        else date_trunc(period::text, at, 'UTC')
    end
$$;
comment on function slot_of(limit_period, timestamptz) is 'Beginning of the ledger slot of a time.';

-- When what was claimed in a slot stops counting. Sliding periods: a period and the guard after the
-- slot's end; the guard is there because a provider counts arrivals, not claims.
create or replace function slot_frees_at(period limit_period, slot_at timestamptz, guard interval)
returns timestamptz
language sql immutable parallel safe
as $$
    select case period
        when 'minute' then slot_at + interval '60.5 seconds' + guard
        when 'hour' then slot_at + interval '3630 seconds' + guard
        when 'day' then slot_at + interval '24 hours'
        when 'week' then slot_at + interval '168 hours'
        when 'month' then (slot_at at time zone 'UTC' + interval '1 month') at time zone 'UTC'
        else 'infinity'::timestamptz
    end
$$;
comment on function slot_frees_at(limit_period, timestamptz, interval) is
    'When the usage in a ledger slot stops counting against its limit.';

-- When so many requests and tokens would fit all of the given limits at once, and the limit that is
-- the last to allow it. Null when they fit now; infinity when they never will.
create or replace function capacity_frees(
    p_workspace_id uuid, p_limit_ids uuid[], p_requests bigint, p_tokens bigint, p_now timestamptz,
    p_guard interval
)
returns table (next_at timestamptz, limit_id uuid)
language sql stable
as $$
    with slots as (
        select l.limit_id, l.requests as most_requests, l.tokens as most_tokens,
            g.slot_at, slot_frees_at(l.period, g.slot_at, p_guard) as frees_at,
            -- What is still used once this slot has stopped counting: that of the later ones.
            sum(g.requests) over later - g.requests as requests,
            sum(g.input_tokens + g.output_tokens) over later
                - g.input_tokens - g.output_tokens as tokens,
            sum(g.requests) over (partition by l.limit_id) as all_requests,
            sum(g.input_tokens + g.output_tokens) over (partition by l.limit_id) as all_tokens
        from limits l
        join ledger g on g.workspace_id = l.workspace_id and g.limit_id = l.limit_id
        where l.workspace_id = p_workspace_id
            and l.limit_id = any (p_limit_ids)
            and g.slot_at > slot_of(l.period, p_now) - case l.period
                when 'minute' then interval '61 seconds' + p_guard
                when 'hour' then interval '3660 seconds' + p_guard
                else interval '1 microsecond'
            end
            and slot_frees_at(l.period, g.slot_at, p_guard) > p_now
        window later as (partition by l.limit_id order by g.slot_at desc)
    ),
    waits as (
        select s.limit_id, min(s.frees_at) as frees_at
        from slots s
        where (
                s.all_requests + p_requests > s.most_requests
                or s.all_tokens + least(p_tokens, s.most_tokens) > s.most_tokens
            )
            and coalesce(s.requests + p_requests <= s.most_requests, true)
            and coalesce(s.tokens + least(p_tokens, s.most_tokens) <= s.most_tokens, true)
        group by s.limit_id
    )
    select w.frees_at, w.limit_id from waits w order by w.frees_at desc, w.limit_id limit 1
$$;
comment on function capacity_frees(uuid, uuid[], bigint, bigint, timestamptz, interval) is
    'When so much fits all of these limits, and the limit that is last to allow it.';

-- The pace of request limits per minute: how many requests each allows at once, and so many per second from then on.
-- A limit of N per minute is not spent in one burst, because providers police shorter windows and slopes: for every
-- slot, what was claimed since its start may exceed the even rate by at most p_burst_s seconds of it (but at least
-- one request). Those are the conditions of a token bucket; slots make it laxer by at most their half second, so
-- that 0.3 stays below a bucket of one second. Sixty seconds or more: no pace. Tokens are not paced, because
-- reservations far above the true usage would hold them up.
create or replace function pace(
    p_workspace_id uuid, p_limit_ids uuid[], p_now timestamptz, p_burst_s double precision
)
returns table (allowance double precision, rate double precision, burst double precision)
language sql stable
as $$
    select least(r.burst, min(
            r.burst + r.rate * extract(epoch from p_now - s.slot_at)::double precision - s.requests)),
        r.rate, r.burst
    from limits l
    cross join lateral (
        select l.requests / 60.0::double precision as rate,
            greatest(l.requests / 60.0::double precision * p_burst_s, 1) as burst
    ) r
    left join lateral (
        select g.slot_at, sum(g.requests) over (order by g.slot_at desc)::double precision as requests
        from ledger g
        where g.workspace_id = l.workspace_id
            and g.limit_id = l.limit_id
            and g.slot_at > p_now - interval '61 seconds'
    ) s on true
    where l.workspace_id = p_workspace_id
        and l.limit_id = any (p_limit_ids)
        and l.period = 'minute'
        and l.requests is not null
        and p_burst_s < 60
    group by l.limit_id, r.rate, r.burst
$$;
comment on function pace(uuid, uuid[], timestamptz, double precision) is
    'What the even pace of request limits allows at once, and per second.';

-- When a resource has an item that could be claimed, limits apart; null: nothing waits.
create or replace function work_due(p_workspace_id uuid, p_resource_id uuid, p_now timestamptz)
returns timestamptz
language sql stable
as $$
    select min(case when f.unstarted > 0 then p_now else again.visible_at end)
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
    where f.workspace_id = p_workspace_id
        and f.resource_id = p_resource_id
        and f.is_open
        and not f.is_paused
        and not f.is_cancelled
        and f.pending > 0
$$;
comment on function work_due(uuid, uuid, timestamptz) is 'When a resource next has a claimable item.';
