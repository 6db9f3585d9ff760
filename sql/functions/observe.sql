-- observe: what replies teach about a provider. Three sources, all kept per model on a connection, so that every
-- worker and every resource of that model shares them:
--
-- observe_limits   what replies state of limits: stored as observed limits, which bind like given ones; and what
--                  the provider counts beyond our own calls, which takes its place in the ledger
-- observe_outputs  how long a resource's answers are: what claims reserve and what the pace expects
-- observe_calls    what was refused and what was borne: rests, the ceiling of the rate, the calls at once
--
-- The ceiling. When calls are refused for their number, what was accepted in the minute before is the best
-- measure of an unknown limit: exact for a window that slides, and right for a bucket once the rate is steady. So
-- the ceiling falls to that, and to nine tenths of itself if it had fallen within ten seconds; calls claimed before
-- the fall belong to the same refusal, and when the single call sent ahead is refused (claim) that only says that
-- the minute is still full. After 25 to 35 s it is raised by half, to see whether the limit has risen, and again
-- every five seconds, each time only if the last minute used 70 % of it: more than the ceiling before. A model that was begun less than a minute ago has no such measure yet: its ceiling follows the last
-- seconds, only sets the pace, and doubles every two seconds. But if the single call sent ahead after the rest is refused as well, the minute is
-- full, and what was accepted is its measure. A limit that people or the provider changed since ends the guess.
--
-- Calls at once (additive increase, multiplicative decrease: Chiu and Jain, 1989). When a provider says that it is
-- overloaded, the bound becomes seven tenths of the calls that were out, once per cohort, and grows by one with
-- every round of answers that uses half of it.

-- What replies stated: [{resource_id, kind, period, limit, used}].
-- Only those of p_resource_ids count. Stores the limits; differences are those between the provider's count and ours for
-- ledger_adjust: only upwards, since what the provider has not seen yet may still arrive. raised: limits that changed.
create or replace function observe_limits(
    p_workspace_id uuid, p_observed json, p_resource_ids uuid[], p_now timestamptz,
    out differences jsonb, out raised uuid[]
)
language plpgsql volatile
as $$
#variable_conflict use_column
declare
    v_stated record;
    v_used record;
    v_changed record;
begin
    for v_stated in
        select r.model_scope_id as scope_id, o.period,
            max(o.most) filter (where o.kind = 'requests') as requests,
            max(o.most) filter (where o.kind = 'tokens') as tokens,
            max(o.most) filter (where o.kind = 'input_tokens') as input_tokens,
            max(o.most) filter (where o.kind = 'output_tokens') as output_tokens,
            max(o.used) filter (where o.kind = 'requests') as used_requests,
            max(o.used) filter (where o.kind = 'tokens') as used_tokens,
            max(o.used) filter (where o.kind = 'input_tokens') as used_input_tokens,
            max(o.used) filter (where o.kind = 'output_tokens') as used_output_tokens
        from (
            select s.resource_id, s.kind, s.period, s.limit as most, s.used
            from json_to_recordset(p_observed) as s (
                resource_id uuid, kind text, period limit_period, "limit" bigint, used bigint
            )
        ) o
        join resources r on r.workspace_id = p_workspace_id and r.resource_id = o.resource_id
        where o.resource_id = any (p_resource_ids)
        group by r.model_scope_id, o.period
        order by r.model_scope_id, o.period
    loop
        insert into limits as l (
            workspace_id, limit_id, scope_id, period, sliding, source, requests, tokens, input_tokens,
            output_tokens, observed_at
        )
        select p_workspace_id, md5(v_stated.scope_id::text || v_stated.period)::uuid, v_stated.scope_id,
            v_stated.period, true, 'observed', v_stated.requests, v_stated.tokens, v_stated.input_tokens,
            v_stated.output_tokens, p_now
        where not exists (
            select from limits k
            where k.workspace_id = p_workspace_id
                and k.scope_id = v_stated.scope_id
                and k.period = v_stated.period
                and k.source = 'observed'
        )
        on conflict do nothing;
        update limits l
        set requests = coalesce(v_stated.requests, l.requests),
            tokens = coalesce(v_stated.tokens, l.tokens),
            input_tokens = coalesce(v_stated.input_tokens, l.input_tokens),
            output_tokens = coalesce(v_stated.output_tokens, l.output_tokens),
            updated_at = case when v_stated.requests <> coalesce(l.requests, 0)
                    or v_stated.tokens <> coalesce(l.tokens, 0)
                    or v_stated.input_tokens <> coalesce(l.input_tokens, 0)
                    or v_stated.output_tokens <> coalesce(l.output_tokens, 0)
                then p_now else l.updated_at end,
            observed_at = p_now
        where l.workspace_id = p_workspace_id
            and l.scope_id = v_stated.scope_id
            and l.period = v_stated.period
            and l.source = 'observed'
            and (
                coalesce(l.observed_at, '-infinity') < p_now - interval '1 minute'
                or v_stated.requests <> coalesce(l.requests, 0)
                or v_stated.tokens <> coalesce(l.tokens, 0)
                or v_stated.input_tokens <> coalesce(l.input_tokens, 0)
                or v_stated.output_tokens <> coalesce(l.output_tokens, 0)
            )
        returning l.limit_id, l.updated_at = p_now as is_new into v_changed;
        if v_changed.is_new then
            raised := raised || v_changed.limit_id;
        end if;
        select * into v_used
        from observed_use(p_workspace_id, v_stated.scope_id, v_stated.period, p_now);
        if v_stated.used_requests > v_used.requests
            or v_stated.used_tokens > v_used.input_tokens + v_used.output_tokens
            or v_stated.used_input_tokens > v_used.input_tokens
            or v_stated.used_output_tokens > v_used.output_tokens
        then
            -- Another settlement may be entering the same: lock, then look again.
            perform 1 from limits l
            where l.workspace_id = p_workspace_id and l.limit_id = v_used.limit_id
            for no key update;
            differences := coalesce(differences, '[]') || (
                select jsonb_build_object(
                    'limit_id', v_used.limit_id, 'claimed_at', p_now,
                    'outside_requests', greatest(v_stated.used_requests - u.requests, 0),
                    'outside_input_tokens', greatest(
                        v_stated.used_tokens - u.input_tokens - u.output_tokens,
                        v_stated.used_input_tokens - u.input_tokens, 0),
                    'outside_output_tokens', greatest(v_stated.used_output_tokens - u.output_tokens, 0))
                from observed_use(p_workspace_id, v_stated.scope_id, v_stated.period, p_now) u
            );
        end if;
    end loop;
end
$$;
comment on function observe_limits(uuid, json, uuid[], timestamptz) is
    'Store what replies stated of limits; what the provider counts beyond our ledger.';

-- What a model's observed limit of a period counts at present, by our ledger.
create or replace function observed_use(
    p_workspace_id uuid, p_scope_id uuid, p_period limit_period, p_now timestamptz
)
returns table (limit_id uuid, requests bigint, input_tokens bigint, output_tokens bigint)
language sql stable
as $$
    select l.limit_id, coalesce(sum(g.requests + g.outside_requests), 0)::bigint,
        coalesce(sum(g.input_tokens + g.outside_input_tokens), 0)::bigint,
        coalesce(sum(g.output_tokens + g.outside_output_tokens), 0)::bigint
    from limits l
    left join ledger g on g.workspace_id = l.workspace_id
        and g.limit_id = l.limit_id
        and g.slot_at > counts_after(l.period, l.sliding, p_now, interval '0')
    where l.workspace_id = p_workspace_id
        and l.scope_id = p_scope_id
        and l.period = p_period
        and l.source = 'observed'
    group by l.limit_id
$$;
comment on function observed_use(uuid, uuid, limit_period, timestamptz) is
    'What an observed limit counts at present.';

-- Keep a sample of the latest hundred outputs of each resource, and what follows from it once there are twenty.
-- At most eight of one settlement, and of small settlements only some: the newest are no better than the others.
-- p_replies: see settle.
create or replace function observe_outputs(p_workspace_id uuid, p_replies jsonb) returns void
language plpgsql volatile
as $$
declare
    v_seen record;
    v_recent int[];
begin
    for v_seen in
        select r.resource_id, r.outputs
        from jsonb_to_recordset(p_replies) as r (resource_id uuid, outputs int[])
        where r.outputs is not null
        order by r.resource_id
    loop
        select s.recent_outputs into v_recent
        from resource_states s
        where s.workspace_id = p_workspace_id and s.resource_id = v_seen.resource_id;
        continue when cardinality(v_recent) >= 100
            and cardinality(v_seen.outputs) < 8
            and random() * 8 > cardinality(v_seen.outputs);
        update resource_states s
        set recent_outputs = n.recent_outputs,
            output_high = case when n.seen >= 20 then n.high end,
            output_mean = case when n.seen >= 20 then n.mean end
        from (
            select array_agg(o.tokens order by o.ordinality) as recent_outputs, count(*) as seen,
                percentile_disc(0.9) within group (order by o.tokens) as high,
                avg(o.tokens)::double precision as mean
            from unnest(v_seen.outputs || v_recent[:100 - cardinality(v_seen.outputs)])
                with ordinality as o (tokens)
        ) n
        where s.workspace_id = p_workspace_id and s.resource_id = v_seen.resource_id;
    end loop;
end
$$;
comment on function observe_outputs(uuid, jsonb) is 'Learn how long a resource''s answers are.';

-- Refusals and answers. p_rest_s, p_rest_most_s: see settle.
create or replace function observe_calls(
    p_workspace_id uuid, p_replies jsonb, p_now timestamptz, p_rest_s double precision,
    p_rest_most_s double precision
)
returns void
language plpgsql volatile
as $$
declare
    v_seen record;
    s scope_states;
    v_known record;
    v_base double precision;
    v_accepted double precision;
    v_window interval;
    v_running bigint;
    v_is_young boolean;
    v_rest interval;
begin
    for v_seen in
        select r.model_scope_id as scope_id, r.connection_id, array_agg(distinct r.resource_id) as resource_ids,
            sum(g.answered)::int as answered, max(g.answered_at) as answered_at, max(g.refused_at) as refused_at,
            max(g.overloaded_at) as overloaded_at, bool_or(g.is_overloaded) as is_overloaded,
            bool_or(g.is_throttled) as is_throttled, sum(g.calls) as settled, max(g.wait_s) as wait_s,
            max(g.code) as code
        from (
            select p_workspace_id as workspace_id, o.*
            from jsonb_to_recordset(p_replies) as o (
                resource_id uuid, calls int, answered int, answered_at timestamptz, refused_at timestamptz,
                overloaded_at timestamptz, is_overloaded boolean, is_throttled boolean, wait_s double precision,
                code text
            )
            where o.calls > 0
        ) g
        join resources r on r.workspace_id = g.workspace_id and r.resource_id = g.resource_id
        group by r.model_scope_id, r.connection_id
        order by r.model_scope_id
    loop
        select * into s
        from scope_states t
        where t.workspace_id = p_workspace_id and t.scope_id = v_seen.scope_id;
        continue when not (v_seen.is_throttled or s.is_fresh or s.refusals > 0 or s.ceiling is not null
            or s.concurrency is not null or s.burst_share < 1);
        select * into s
        from scope_states t
        where t.workspace_id = p_workspace_id and t.scope_id = v_seen.scope_id
        for no key update;
        v_is_young := coalesce(s.begun_at, p_now) > p_now - interval '60 seconds';

        -- Limits per minute that people or the provider stated, and when they last changed.
        select min(l.requests)::double precision as requests, max(l.updated_at) as changed_at,
            count(*) > 0 and v_seen.wait_s is not null as is_told
        into v_known
        from limits l
        where l.workspace_id = p_workspace_id
            and l.scope_id = any (v_seen.resource_ids || v_seen.scope_id || v_seen.connection_id)
            and l.period = 'minute'
            and l.dimension is null
            and coalesce(l.requests, l.tokens, l.input_tokens, l.output_tokens) is not null
            and (l.source = 'given' or l.observed_at > p_now - interval '7 days');
        if v_known.changed_at > s.throttled_at then
            s.ceiling := null;
        end if;

        if v_seen.refused_at is not null then
            v_base := least(s.ceiling, v_known.requests);
            v_accepted := greatest(3,
                accepted_since(p_workspace_id, v_seen.scope_id, p_now - interval '60 seconds'),
                case when v_is_young and s.refusals = 0 then
                    11 * accepted_since(p_workspace_id, v_seen.scope_id, p_now - interval '5 seconds') end);
            if v_seen.refused_at > s.throttled_at then
                -- Who states a limit and when to come back is believed, as long as it holds.
                s.ceiling := least(
                    case when not v_known.is_told then v_accepted end,
                    case when v_base is not null then greatest(3, v_base * case
                        when s.refusals > 0 then 1
                        when s.throttled_at > p_now - interval '10 seconds' then 0.9
                        else 0.98 end) end);
                if s.refusals = 0 and v_accepted < 0.9 * v_base then
                    -- Below the limit it was the burst, not the sum.
                    s.burst_share := greatest(s.burst_share / 2, 0.125);
                end if;
                s.is_window := not v_known.is_told and (not v_is_young or s.refusals > 0);
                s.raise_share := case when s.is_window then 0.5 else 1 end;
                s.raise_at := p_now + case when not s.is_window then interval '2 seconds'
                    else make_interval(secs => 25 + 10 * random()) end;
            elsif s.is_window and not v_known.is_told then
                s.ceiling := greatest(least(s.ceiling, v_accepted), 3);
            end if;
        end if;
        if v_seen.overloaded_at > s.slowed_at then
            select sum(f.running) into v_running
            from resources r
            join flows f on f.workspace_id = r.workspace_id and f.resource_id = r.resource_id and f.is_open
            where r.workspace_id = p_workspace_id
                and r.connection_id = v_seen.connection_id
                and r.model_scope_id = v_seen.scope_id;
            s.concurrency := greatest(
                0.7 * least(s.concurrency, coalesce(v_running, 0) + v_seen.settled), 1);
            s.slowed_at := p_now;
        end if;
        if v_seen.is_throttled then
            s.is_fresh := false;
            -- A rest that the provider named counts; else only the first refusal of a cohort makes one.
            v_rest := make_interval(secs => coalesce(v_seen.wait_s, case
                when greatest(v_seen.refused_at, case when v_seen.is_overloaded then v_seen.overloaded_at end)
                    > s.throttled_at
                -- Of a full minute something comes free all the time; the ledger holds back the rest.
                then least(p_rest_s * 2 ^ least(s.refusals, case when s.is_window then 2 else 20 end),
                    p_rest_most_s) * (1 + 0.1 * random())
            end, 0));
            s.blocked_until := greatest(s.blocked_until, p_now + v_rest);
            s.blocked_reason := v_seen.code;
            if greatest(v_seen.refused_at, v_seen.overloaded_at) > s.throttled_at then
                s.throttled_at := p_now;
                s.refusals := s.refusals + 1;
            end if;
        elsif v_seen.answered_at > s.throttled_at then
            s.refusals := 0;
            if s.is_fresh then
                s.answered := s.answered + v_seen.answered;
                s.is_fresh := s.answered < 5000;
            end if;
            if s.concurrency is not null then
                select sum(f.running) into v_running
                from resources r
                join flows f on f.workspace_id = r.workspace_id
                    and f.resource_id = r.resource_id
                    and f.is_open
                where r.workspace_id = p_workspace_id
                    and r.connection_id = v_seen.connection_id
                    and r.model_scope_id = v_seen.scope_id;
                if coalesce(v_running, 0) + v_seen.answered >= s.concurrency / 2 then
                    s.concurrency := s.concurrency + v_seen.answered / s.concurrency;
                end if;
            end if;
            if (s.ceiling is not null or s.burst_share < 1) and p_now >= s.raise_at then
                v_window := make_interval(secs => case when s.is_window then 60
                    else greatest(5, 120 / coalesce(s.ceiling, 120)) end);
                if s.ceiling is null or accepted_since(p_workspace_id, v_seen.scope_id, p_now - v_window)
                    >= 0.7 * s.ceiling * extract(epoch from v_window) / 60
                then
                    s.ceiling := s.ceiling * (1 + s.raise_share);
                    s.burst_share := least(s.burst_share * 1.25, 1);
                    s.raise_at := p_now + case when not s.is_window then interval '2 seconds'
                        else interval '5 seconds' end;
                    if s.ceiling >= v_known.requests then
                        s.ceiling := null;
                    end if;
                end if;
            end if;
        end if;
        update scope_states t
        set blocked_until = s.blocked_until, blocked_reason = s.blocked_reason,
            throttled_at = s.throttled_at, refusals = s.refusals, ceiling = s.ceiling,
            is_window = s.is_window,
            raise_at = s.raise_at, raise_share = s.raise_share, burst_share = s.burst_share,
            is_fresh = s.is_fresh, answered = s.answered, concurrency = s.concurrency,
            slowed_at = s.slowed_at
        where t.workspace_id = p_workspace_id and t.scope_id = v_seen.scope_id;
    end loop;
    -- An account without money answers for none of its models.
    update scope_states t
    set blocked_until = greatest(t.blocked_until, p_now + make_interval(secs => b.wait_s)),
        blocked_reason = 'insufficient_quota'
    from (
        select p_workspace_id as workspace_id, g.connection_id, max(g.out_of_money_s) as wait_s
        from jsonb_to_recordset(p_replies) as g (connection_id uuid, out_of_money_s double precision)
        where g.out_of_money_s is not null
        group by g.connection_id
    ) b
    where t.workspace_id = b.workspace_id and t.scope_id = b.connection_id;
end
$$;
comment on function observe_calls(
    uuid, jsonb, timestamptz, double precision, double precision
) is 'Learn from refusals and answers what a model on a connection bears.';

-- Calls of a model that were claimed since a time and not refused for their number.
create or replace function accepted_since(
    p_workspace_id uuid, p_scope_id uuid, p_since timestamptz
)
returns double precision
language sql stable
as $$
    select coalesce(sum(g.requests - g.refused), 0)::double precision
    from limits l
    join ledger g on g.workspace_id = l.workspace_id and g.limit_id = l.limit_id and g.slot_at > p_since
    where l.workspace_id = p_workspace_id
        and l.scope_id = p_scope_id
        and l.source = 'observed'
        and l.period = 'minute'
$$;
comment on function accepted_since(uuid, uuid, timestamptz) is
    'Calls of a model claimed since a time and not refused.';
