-- claim: take items for work. The heart of Sluice.
--
-- What it does. One worker asks for at most p_want items of one resource. The function decides what the
-- rate limits still allow, takes the items whose turn it is, writes lease and reservation, and returns
-- them with their requests. It commits as one transaction, so a limit can be neither overshot by two
-- workers nor leaked by a crash: no item is out without its reservation, and none reserved but not out.
--
-- Lock, then look. The mutexes are the limit_scopes rows of connection, model and resource, and of the batches,
-- api keys and dimension values whose own limits take part. They are locked by statements of their own: every
-- statement of a VOLATILE function takes a fresh snapshot (READ COMMITTED), so what is read after the lock
-- contains all that the previous holder committed. Locking and reading in one statement would read the snapshot
-- of its start, miss the previous holder's reservations and overshoot. Never call this above READ COMMITTED, nor
-- with synchronous_commit off: a crash would forget grants that went out. Whoever finds a resource's mutex taken
-- goes to its next resource, and leaves out a flow whose own mutex is taken (SKIP LOCKED).
--
-- Lock order (the same for all verbs): scope mutexes → items → ledger slots → flows → batches → resource_states →
-- scope_states → ready, within each in primary-key order. Items are taken SKIP LOCKED, so a claim never waits for one.
--
-- Order (start-time fair queueing by tokens). A flow's virtual time is the tokens it took divided by its
-- weight. An item's tag is that plus the tokens before and including it within its flow. The smallest tags
-- of the highest priority go first, so a batch of ten beside one of a hundred thousand is answered at once; the
-- first sixteen items of a flow count half.
-- Admission stops at the first item that does not fit the shared limits: nothing overtakes it, so a big item is
-- never starved by small ones. An item that does not fit a limit of its own batch, key or value sets only its
-- flow aside, until that limit has room (flows.waits_until). Lower priorities collect a twentieth of the tokens
-- that the highest takes (resource_states.lower_credit) and go first while that lasts. Towards its deadline a
-- batch's weight grows with the square of how little time is left, up to a hundredfold.
--
-- What is reserved. Input as estimated; output as nine of ten recent answers of the resource had, never more than
-- the request's own bound, and without experience that bound or 1,024. Both are clamped to the limits.
--
-- The floor. First attempts are scanned by number from the flow's floor, so that a claim never walks the
-- dead index entries which earlier claims left (they cannot be vacuumed while anybody holds a snapshot).
-- The floor only rises, and only past rows that this claim took; a locked or unfit row stops it. Everything
-- that came back is found by the index items_again.
--
-- Cancellation. A cancel locks flows only. If one is committed between our ranking and our locking of the
-- flow, the whole claim is undone by SLCLO and simply asked for again: nothing is claimed after a cancel's
-- commit.
--
-- The last row returned has no seq: it reports. What items have in common is there, once for each flow (flows:
-- [{flow, batch_day, batch_id, endpoint, limit_ids}]), and claimed_at. next_at says when it is worth asking again (null:
-- nothing waits; in the past: at once), busy that another worker held a mutex, isolated that a suspect of many
-- crashes is due: it was taken, and nothing else, if the worker has nothing else to do (p_alone), and
-- otherwise waits until a worker has. is_limited: any limit or pace bounds what was taken, so that a call must
-- leave soon after its claim.
create or replace function claim(
    p_workspace_id uuid,
    p_resource_id uuid,
    p_worker_id uuid,
    p_want int,
    p_alone boolean,
    p_guard interval,
    p_grace interval,
    p_burst_s double precision,
    p_slow_start int
)
returns table (
    flow int, seq int, attempt int, failures int, max_attempts int, input_tokens int, output_tokens int,
    expected_output_tokens int, impossible boolean, timeout_ms int, body text, report json
)
language plpgsql volatile
-- The tables grow from empty to millions while a cached plan lives, and their statistics lag behind: these
-- make every access to them one index probe per row, and save planning (2 ms per statement). Without them a plan
-- made for a small table read 2.8 million rows to update 500. Sets in memory are therefore combined by grouping,
-- not by joins, which would be nested loops. And a set carries its workspace_id where it is joined with a table:
-- with the parameter in its place, that alone is an index condition, and the table may become the outer side. The
-- other verbs do the same; tests/test_plans.py counts what is read.
set enable_seqscan = off
set enable_bitmapscan = off
set enable_hashjoin = off
set enable_mergejoin = off
set enable_material = off
set plan_cache_mode = force_generic_plan
as $$
#variable_conflict use_column
declare
    infinite constant double precision := 'infinity';
    v_resource record;
    v_now timestamptz := clock_timestamp();
    v_shared uuid[];
    v_locked uuid[];
    v_state record;
    v_blocked_until timestamptz;
    v_blocked_by uuid;
    v_busy boolean := false;
    v_isolated boolean := false;
    v_is_limited boolean := false;
    v_probing boolean := false;
    v_credit double precision;
    v_output_high int;
    v_output_mean double precision;
    v_want int := p_want;
    v_room int;
    v_burst_s double precision;
    v_own_burst_s double precision := greatest(p_burst_s, 3);
    v_flows claim_flow[];
    v_own_scopes uuid[];
    v_budgets budget[];
    v_own budget[];
    v_line claim_candidate[];
    v_lifted int[] := '{}';
    v_order int[];
    -- Of the shared limits together: what is left, what the pace leaves and would at most, what may ever fit.
    v_requests double precision := infinite;
    v_tokens double precision := infinite;
    v_input_tokens double precision := infinite;
    v_output_tokens double precision := infinite;
    v_paced_requests double precision := infinite;
    v_paced_tokens double precision := infinite;
    v_paced_input_tokens double precision := infinite;
    v_paced_output_tokens double precision := infinite;
    v_burst_tokens double precision := infinite;
    v_burst_input_tokens double precision := infinite;
    v_burst_output_tokens double precision := infinite;
    v_most_tokens double precision := infinite;
    v_most_input_tokens double precision := infinite;
    v_most_output_tokens double precision := infinite;
    v_common uuid[] := '{}';
    v_set_aside boolean[];
    v_input_nano numeric;
    v_output_nano numeric;
    v_cost bigint := 0;
    v_waiting claim_pick[] := '{}';
    v_picks claim_pick[] := '{}';
    v_done boolean[];
    v_lifted_tokens double precision := 0;
    v_upper_tokens double precision := 0;
    v_b budget;
    v_c claim_candidate;
    v_at int;
    v_n int;
    v_impossible boolean;
    v_output int;
    v_expected int;
    v_head claim_pick;
    v_taken taken_item[];
    v_shares claim_share[];
    v_flow record;
    v_batch_ids uuid[];
    v_begun uuid[];
    v_wait record;
    v_next timestamptz;
    v_reason wait_reason;
    v_waits_for uuid;
    v_endpoints jsonb := '{}';
begin
    -- 1. The mutexes, and nothing but the mutexes.
    select r.connection_id, r.model_scope_id, coalesce(r.timeout_ms, c.timeout_ms) as timeout_ms,
        c.concurrency as connection_concurrency, r.concurrency,
        greatest(r.updated_at, c.updated_at) as config_at
    into v_resource
    from resources r
    join connections c on c.workspace_id = r.workspace_id and c.connection_id = r.connection_id
    where r.workspace_id = p_workspace_id and r.resource_id = p_resource_id;
    if not found then
        return;
    end if;
    v_shared := array[v_resource.connection_id, v_resource.model_scope_id, p_resource_id];
    perform 1
    from limit_scopes s
    where s.workspace_id = p_workspace_id and s.scope_id = any (v_shared)
    order by s.scope_id
    for no key update skip locked;
    get diagnostics v_n = row_count;
    if v_n < 3 then
        report := json_build_object('claimed_at', clock_timestamp(), 'flows', '[]'::json, 'is_limited', false,
            'busy', true, 'isolated', false, 'next_at', clock_timestamp(), 'config_at', v_resource.config_at);
        return next;
        return;
    end if;
    select s.* into v_state
    from scope_states s
    where s.workspace_id = p_workspace_id and s.scope_id = v_resource.model_scope_id;
    select s.blocked_until, s.scope_id into v_blocked_until, v_blocked_by
    from scope_states s
    where s.workspace_id = p_workspace_id
        and s.scope_id in (v_resource.model_scope_id, v_resource.connection_id)
    order by s.blocked_until desc
    limit 1;
    select s.lower_credit, s.output_high, s.output_mean into v_credit, v_output_high, v_output_mean
    from resource_states s
    where s.workspace_id = p_workspace_id and s.resource_id = p_resource_id;

    -- 2. Whose turn it is: the first 64 flows, and the first eight of lower priorities. One that waits only for
    -- later retries, or for a limit of its own, takes no place.
    -- Of all flows only what orders them is read (10,000 of a resource take some ms); of those taken everything.
    with waited as materialized (
        -- What waited for a limit of its own has saved up nothing.
        select w.priority, flow_entry(p_workspace_id, p_resource_id, w.priority) as entry
        from (
            select distinct f.priority
            from flows f
            where f.workspace_id = p_workspace_id
                and f.resource_id = p_resource_id
                and f.is_open
                and f.waits_for is not null
                and f.waits_until <= v_now
        ) w
    ),
    due as materialized (
        select f.ctid as version, f.batch_id, f.priority,
            case when f.waits_for is null then f.virtual_time else greatest(f.virtual_time, (
                select w.entry from waited w where w.priority = f.priority
            )) end as virtual_time
        from flows f
        where f.workspace_id = p_workspace_id
            and f.resource_id = p_resource_id
            and f.is_open
            and not f.is_paused
            and not f.is_cancelled
            and f.pending > 0
            and f.waits_until <= v_now
            and coalesce(f.expires_at, 'infinity') > v_now
            and (
                f.unstarted > 0
                -- Not exists: that may be hashed, and then reads every item of all tenants that is to be tried again.
                or (
                    select true
                    from items i
                    where i.workspace_id = f.workspace_id
                        and i.batch_day = f.batch_day
                        and i.batch_id = f.batch_id
                        and i.resource_id = f.resource_id
                        and i.status = 'pending'
                        and i.attempt > 0
                        and i.visible_at <= v_now
                    limit 1
                )
            )
    ),
    ranked as (
        (select d.* from due d order by d.priority desc, d.virtual_time, d.batch_id limit 64)
        union
        (
            select d.* from due d
            where d.priority < (select max(priority) from due)
            order by d.virtual_time, d.batch_id
            limit 8
        )
    )
    select array_agg(
        row(f.batch_id, f.batch_day, f.priority, f.weight * urgency(f.created_at, f.expires_at, v_now),
            r.virtual_time, case when f.waits_for is not null then r.virtual_time end, f.total - f.unstarted,
            f.floor, r.flows,
            case when f.completed >= 20 then f.output_tokens::double precision / f.completed
                else v_output_mean end,
            f.scope_ids, null)::claim_flow
        order by r.priority desc, r.virtual_time, r.batch_id)
    into v_flows
    from (
        select ranked.*, count(*) over (partition by ranked.priority)::int as flows from ranked
    ) r
    -- The same snapshot sees the same version: no second walk through those that a held snapshot keeps.
    join flows f on f.ctid = r.version
    where v_blocked_until <= v_now;

    -- 3. The mutexes of the flows' own limits; what another claim holds is left out of this round.
    if v_flows is not null then
        select array_agg(distinct l.scope_id) into v_own_scopes
        from unnest(v_flows) f
        cross join unnest(f.scope_ids) as o (scope_id)
        join limits l on l.workspace_id = p_workspace_id
            and l.scope_id = o.scope_id
            and l.dimension is null;
    end if;
    if v_own_scopes is not null then
        select coalesce(array_agg(h.scope_id), '{}') into v_locked
        from (
            select s.scope_id from limit_scopes s
            where s.workspace_id = p_workspace_id and s.scope_id = any (v_own_scopes)
            order by s.scope_id
            for no key update skip locked
        ) h;
        if cardinality(v_locked) < cardinality(v_own_scopes) then
            v_busy := true;
            select array_agg(f order by f.priority desc, f.virtual_time, f.batch_id) into v_flows
            from unnest(v_flows) f
            where not exists (
                select from unnest(f.scope_ids) as o (scope_id)
                where o.scope_id = any (v_own_scopes) and o.scope_id <> all (v_locked)
            );
        end if;
        v_shared := v_shared || v_locked;
    end if;

    -- 4. The clock, read after the locks; slots never go backwards.
    select greatest(clock_timestamp(), max(newest.slot_at)) into v_now
    from limits l
    cross join lateral (
        select g.slot_at from ledger g
        where g.workspace_id = l.workspace_id and g.limit_id = l.limit_id
        order by g.slot_at desc
        limit 1
    ) newest
    where l.workspace_id = p_workspace_id and l.scope_id = any (v_shared);
    v_now := coalesce(v_now, clock_timestamp());

    -- 5. What the limits leave: the shared ones together, those of flows one by one.
    if v_flows is not null then
        -- Nobody but us polices those of flows, so their pace may be rougher.
        v_burst_s := p_burst_s * v_state.burst_share;
        select array_agg(b) into v_budgets
        from (
            select * from budgets(p_workspace_id, v_shared[:3], v_now, p_guard, v_burst_s,
                v_state.throttled_at)
            union all
            select * from budgets(p_workspace_id, v_shared[4:], v_now, p_guard, v_own_burst_s,
                v_state.throttled_at)
        ) b;
        foreach v_b in array coalesce(v_budgets, '{}') loop
            v_is_limited := v_is_limited or coalesce(
                v_b.requests, v_b.tokens, v_b.input_tokens, v_b.output_tokens, v_b.paced_requests) is not null;
            if v_b.scope_id in (v_resource.connection_id, v_resource.model_scope_id, p_resource_id) then
                v_common := v_common || v_b.limit_id;
                v_requests := least(v_requests, v_b.requests);
                v_tokens := least(v_tokens, v_b.tokens);
                v_input_tokens := least(v_input_tokens, v_b.input_tokens);
                v_output_tokens := least(v_output_tokens, v_b.output_tokens);
                v_paced_requests := least(v_paced_requests, v_b.paced_requests);
                v_paced_tokens := least(v_paced_tokens, v_b.paced_tokens);
                v_paced_input_tokens := least(v_paced_input_tokens, v_b.paced_input_tokens);
                v_paced_output_tokens := least(v_paced_output_tokens, v_b.paced_output_tokens);
                v_burst_tokens := least(v_burst_tokens, v_b.rate_tokens * v_burst_s);
                v_burst_input_tokens := least(v_burst_input_tokens, v_b.rate_input_tokens * v_burst_s);
                v_burst_output_tokens := least(v_burst_output_tokens, v_b.rate_output_tokens * v_burst_s);
                v_most_tokens := least(v_most_tokens, v_b.most_tokens);
                v_most_input_tokens := least(v_most_input_tokens, v_b.most_input_tokens);
                v_most_output_tokens := least(v_most_output_tokens, v_b.most_output_tokens);
            else
                v_own := v_own || v_b;
            end if;
        end loop;
        select array_agg(row(f.batch_id, f.batch_day, f.priority, f.weight, f.virtual_time, f.entry, f.started, f.floor, f.flows,
            f.mean_output_tokens, f.scope_ids, v_common || array(
                select o.limit_id from unnest(v_own) o where o.scope_id = any (f.scope_ids)
            ))::claim_flow order by f.ordinality)
        into v_flows
        from unnest(v_flows) with ordinality f;
        if exists (select from unnest(v_own) o where o.most_cost_nano is not null) then
            select p.input_nano, p.output_nano into v_input_nano, v_output_nano
            from resources r
            cross join lateral price_at(r.workspace_id, r.model, r.model, v_now) p
            where r.workspace_id = p_workspace_id and r.resource_id = p_resource_id;
        end if;

        -- How many more calls may be out at once. A fresh model whose rate nobody knows begins with a few and
        -- gets one more for every answer, so that their number doubles with each round.
        if v_state.concurrency is null and v_state.is_fresh and p_slow_start > 0
            and v_paced_requests = infinite and v_requests = infinite
        then
            v_state.concurrency := p_slow_start + v_state.answered;
        end if;
        if least(v_resource.connection_concurrency, v_resource.concurrency, v_state.concurrency)
            is not null
        then
            select c.room, c.scope_id into v_room, v_waits_for
            from calls_room(p_workspace_id, p_resource_id, v_state.concurrency) c;
            v_want := greatest(least(v_want, v_room), 0);
            if v_want <= 0 then
                v_reason := 'concurrency';
            end if;
        end if;
        -- After a refusal one call is sent ahead: when it has been borne for a second, the others follow.
        if v_state.refusals > 0 then
            if v_state.probed_at <= v_state.throttled_at then
                v_probing := true;
                v_want := least(v_want, 1);
            elsif v_now < v_state.probed_at + interval '1 second' then
                v_blocked_until := v_state.probed_at + interval '1 second';
                v_flows := null;
            end if;
        end if;
    end if;

    if v_blocked_until > v_now then
        v_reason := 'cooldown';
        v_waits_for := v_blocked_by;
    elsif v_flows is not null and v_want > 0 then
        -- 6. The line: each flow's first items, by priority and tag.
        with candidates as (
            select f.ordinality::int as flow, f.priority, f.weight, f.virtual_time, f.started, f.batch_id, c.*,
                greatest(c.input_tokens + least(
                    coalesce(c.max_output_tokens, v_output_high, 1024), v_output_high), 1) as cost
            from unnest(v_flows) with ordinality f
            cross join lateral (
                (
                    select i.seq, i.attempt, i.input_tokens, i.max_output_tokens,
                        i.crashes >= 6 as suspect,
                        row_number() over (order by i.visible_at, i.seq) - 1000000 as place
                    from items i
                    where i.workspace_id = p_workspace_id
                        and i.batch_day = f.batch_day
                        and i.batch_id = f.batch_id
                        and i.resource_id = p_resource_id
                        and i.status = 'pending'
                        and i.attempt > 0
                        and i.visible_at <= v_now
                    order by i.visible_at, i.seq
                    -- Enough that few flows fill the worker, bounded when there are many of their priority.
                    -- What a heavy one could not take now it takes next: its virtual time lags behind.
                    limit greatest(16, 2 * v_want / f.flows + 1)
                )
                union all
                (
                    select i.seq, i.attempt, i.input_tokens, i.max_output_tokens, false, i.seq::bigint
                    from items i
                    where i.workspace_id = p_workspace_id
                        and i.batch_day = f.batch_day
                        and i.batch_id = f.batch_id
                        and i.resource_id = p_resource_id
                        and i.status = 'pending'
                        and i.attempt = 0
                        and i.seq >= f.floor
                    order by i.seq
                    limit least(v_want, greatest(16, 2 * v_want / f.flows + 1))
                )
            ) c
        ),
        tagged as (
            select c.*, c.priority < max(c.priority) over () as is_lower,
                c.virtual_time + sum(c.cost * first_share(c.started + c.number))
                    over (partition by c.flow order by c.place) / c.weight as tag
            from (
                select d.*, row_number() over (partition by d.flow order by d.place) as number
                from candidates d
            ) c
        )
        select array_agg(
            row(t.flow, t.seq, t.attempt, t.input_tokens, t.max_output_tokens, t.suspect, t.is_lower, t.tag)
                ::claim_candidate
            order by (t.suspect and p_alone) desc, t.priority desc, t.tag, t.batch_id, t.place)
        into v_line
        from tagged t;
        v_line := coalesce(v_line, '{}');
        v_waits_for := null;
        if v_credit > 0 then
            select coalesce(array_agg(l.ordinality order by l.tag, l.ordinality), '{}') into v_lifted
            from unnest(v_line) with ordinality l
            where l.is_lower;
        end if;
        v_order := v_lifted || array(select generate_series(1, cardinality(v_line)));
        v_done := array_fill(false, array[greatest(cardinality(v_line), 1)]);
        v_set_aside := array_fill(false, array[cardinality(v_flows)]);

        -- 7. Who fits, in that order.
        <<line>>
        for v_n in 1 .. cardinality(v_order) loop
            exit when cardinality(v_picks) >= v_want;
            v_at := v_order[v_n];
            continue when v_done[v_at];
            v_c := v_line[v_at];
            continue when v_set_aside[v_c.flow];
            -- Once the lower ones' credit is used up they have their turn after the others.
            continue when v_n <= cardinality(v_lifted) and v_credit <= v_lifted_tokens;
            if v_c.suspect then
                v_isolated := true;
                continue when not p_alone;
            end if;
            v_impossible := v_c.input_tokens > least(v_most_tokens, v_most_input_tokens);
            v_output := least(coalesce(v_c.max_output_tokens, v_output_high, 1024), v_output_high,
                v_most_output_tokens, greatest(v_most_tokens - v_c.input_tokens, 0));
            if v_own is not null then
                foreach v_b in array v_own loop
                    if v_b.limit_id = any ((v_flows[v_c.flow]).limit_ids) then
                        v_impossible := v_impossible or coalesce(
                            v_c.input_tokens > least(v_b.most_tokens, v_b.most_input_tokens), false);
                        v_output := greatest(least(v_output, v_b.most_output_tokens,
                            v_b.most_tokens - v_c.input_tokens), 0);
                    end if;
                end loop;
            end if;
            if v_impossible then
                v_picks := v_picks || row(v_c.flow, v_c.seq, v_c.attempt, 0, 0, 0, true, 0)::claim_pick;
                v_done[v_at] := true;
                continue;
            end if;
            v_expected := least(v_output, coalesce((v_flows[v_c.flow]).mean_output_tokens, v_output));
            if v_input_nano is not null then
                v_cost := v_c.input_tokens * v_input_nano + v_output * v_output_nano;
            end if;
            v_head := row(v_c.flow, v_c.seq, v_c.attempt, v_c.input_tokens, v_output, v_expected, false, v_cost);
            if v_requests < 1
                or v_tokens < v_c.input_tokens + v_output
                or v_input_tokens < v_c.input_tokens
                or v_output_tokens < v_output
            then
                v_reason := 'capacity';
                exit;
            elsif v_paced_requests < 1
                or v_paced_tokens < pace_room(v_c.input_tokens + v_expected, v_burst_tokens)
                or v_paced_input_tokens < pace_room(v_c.input_tokens, v_burst_input_tokens)
                or v_paced_output_tokens < pace_room(v_expected, v_burst_output_tokens)
            then
                v_reason := 'pace';
                exit;
            end if;
            if v_own is not null then
                foreach v_b in array v_own loop
                    if v_b.limit_id = any ((v_flows[v_c.flow]).limit_ids) and (
                        v_b.requests < 1
                        or v_b.tokens < v_c.input_tokens + v_output
                        or v_b.input_tokens < v_c.input_tokens
                        or v_b.output_tokens < v_output
                        or v_b.cost_nano < v_cost
                        or v_b.paced_requests < 1
                        or v_b.paced_tokens
                            < pace_room(v_c.input_tokens + v_expected, v_b.rate_tokens * v_own_burst_s)
                        or v_b.paced_input_tokens
                            < pace_room(v_c.input_tokens, v_b.rate_input_tokens * v_own_burst_s)
                        or v_b.paced_output_tokens
                            < pace_room(v_expected, v_b.rate_output_tokens * v_own_burst_s)
                    ) then
                        v_set_aside[v_c.flow] := true;
                        v_waiting := v_waiting || v_head;
                        continue line;
                    end if;
                end loop;
                for v_o in 1 .. cardinality(v_own) loop
                    v_b := v_own[v_o];
                    if v_b.limit_id = any ((v_flows[v_c.flow]).limit_ids) then
                        v_b.requests := v_b.requests - 1;
                        v_b.tokens := v_b.tokens - v_c.input_tokens - v_output;
                        v_b.input_tokens := v_b.input_tokens - v_c.input_tokens;
                        v_b.output_tokens := v_b.output_tokens - v_output;
                        v_b.cost_nano := v_b.cost_nano - v_cost;
                        v_b.paced_requests := v_b.paced_requests - 1;
                        v_b.paced_tokens := v_b.paced_tokens - v_c.input_tokens - v_expected;
                        v_b.paced_input_tokens := v_b.paced_input_tokens - v_c.input_tokens;
                        v_b.paced_output_tokens := v_b.paced_output_tokens - v_expected;
                        v_own[v_o] := v_b;
                    end if;
                end loop;
            end if;
            v_requests := v_requests - 1;
            v_tokens := v_tokens - v_c.input_tokens - v_output;
            v_input_tokens := v_input_tokens - v_c.input_tokens;
            v_output_tokens := v_output_tokens - v_output;
            v_paced_requests := v_paced_requests - 1;
            v_paced_tokens := v_paced_tokens - v_c.input_tokens - v_expected;
            v_paced_input_tokens := v_paced_input_tokens - v_c.input_tokens;
            v_paced_output_tokens := v_paced_output_tokens - v_expected;
            if v_n <= cardinality(v_lifted) then
                v_lifted_tokens := v_lifted_tokens + v_c.input_tokens + v_output;
            elsif not v_c.is_lower then
                v_upper_tokens := v_upper_tokens + v_c.input_tokens + v_output;
            end if;
            v_picks := v_picks || v_head;
            v_done[v_at] := true;
            -- An item that was in flight at many crashes runs alone, so that the next one convicts it.
            exit when v_c.suspect;
        end loop;
        if v_reason is null and v_want < p_want and cardinality(v_picks) >= v_want then
            v_reason := case when v_probing then 'cooldown' else 'concurrency' end;
        end if;

        -- 8. Take them. Whoever is locked (by a cancel's marking) is left for later.
        with fitting as materialized (
            select p_workspace_id as workspace_id, (v_flows[p.flow]).batch_day as batch_day,
                (v_flows[p.flow]).batch_id as batch_id, p.*
            from unnest(v_picks) with ordinality p
        ),
        held as (
            select i.workspace_id, i.batch_day, i.batch_id, i.seq, p.flow, p.impossible, p.input_tokens,
                p.output_tokens, p.expected_output_tokens, p.cost_nano, p.ordinality as rank
            from fitting p
            join items i on i.workspace_id = p.workspace_id
                and i.batch_day = p.batch_day
                and i.batch_id = p.batch_id
                and i.seq = p.seq
            where i.status = 'pending' and i.attempt = p.attempt
            order by i.batch_day, i.batch_id, i.seq
            for no key update of i skip locked
        ),
        updated as (
            update items i
            set status = 'running',
                visible_at = v_now
                    + make_interval(secs => coalesce(i.timeout_ms, v_resource.timeout_ms) / 1000.0) + p_grace,
                attempt = i.attempt + 1,
                worker_id = p_worker_id,
                claimed_at = v_now,
                reserved_limits = case when h.impossible then '{}' else (v_flows[h.flow]).limit_ids end,
                reserved_input_tokens = h.input_tokens,
                reserved_output_tokens = h.output_tokens,
                expected_output_tokens = h.expected_output_tokens,
                reserved_cost_nano = case when v_input_nano is not null then h.cost_nano end
            from held h
            where i.workspace_id = h.workspace_id
                and i.batch_day = h.batch_day
                and i.batch_id = h.batch_id
                and i.seq = h.seq
            returning i.batch_day, i.batch_id, i.seq, i.attempt, i.failures, i.max_attempts,
                h.flow, h.input_tokens, h.output_tokens, h.expected_output_tokens, h.impossible, h.rank,
                i.timeout_ms, h.cost_nano
        ),
        shared as (
            select u.flow, count(*)::int as items, count(*) filter (where u.attempt = 1)::int as started,
                count(*) filter (where not u.impossible)::int as requests, sum(u.input_tokens) as input_tokens,
                sum(u.output_tokens) as output_tokens, sum(u.expected_output_tokens) as expected_output_tokens,
                sum(u.cost_nano) as cost_nano,
                sum(greatest(u.input_tokens + u.output_tokens, 1) * first_share((v_flows[u.flow]).started + u.number))
                    as tokens,
                array_agg(u.seq order by u.seq) as seqs
            from (
                select *, row_number() over (partition by flow order by rank) as number from updated
            ) u
            group by u.flow
        ),
        -- A first-attempt candidate that was not taken stops its flow's floor.
        floors as (
            select flow, coalesce(min(seq) filter (where not taken), max(seq) + 1) as floor
            from (
                select flow, seq, bool_or(taken) as taken
                from (
                    select l.flow, l.seq, false as taken from unnest(v_line) l where l.attempt = 0
                    union all
                    select flow, seq, true from updated where attempt = 1
                ) both_sets
                group by flow, seq
            ) firsts
            group by flow
        )
        select
            (select array_agg(row(p_workspace_id, batch_day, batch_id, seq, attempt, failures, max_attempts,
                flow, input_tokens, output_tokens, expected_output_tokens, impossible, timeout_ms)::taken_item
                order by rank) from updated),
            (
                select array_agg(row(s.flow, (v_flows[s.flow]).batch_day, (v_flows[s.flow]).batch_id, s.items, s.started,
                    s.requests, s.input_tokens, s.output_tokens, s.expected_output_tokens, s.cost_nano, s.tokens,
                    s.floor, s.seqs)::claim_share order by (v_flows[s.flow]).batch_id)
                from (
                    select s.*, (select f.floor from floors f where f.flow = s.flow) as floor from shared s
                ) s
            )
        into v_taken, v_shares;

        -- 9. The ledger: one row per limit, the slot of now. Before a flow is set aside all slots that its limits
        -- count are locked, together with the others in one order: a settlement beside us gives back before we
        -- look when there will be room (step 10), or finds the flow waiting after our commit.
        if cardinality(v_waiting) > 0 then
            perform 1
            from limits l
            join ledger g on g.workspace_id = l.workspace_id
                and g.limit_id = l.limit_id
                and g.slot_at >= least(slot_of(l.period, l.sliding, v_now),
                    case when l.scope_id <> all (v_shared[:3])
                        then counts_after(l.period, l.sliding, v_now, p_guard) end)
            where l.workspace_id = p_workspace_id and l.scope_id = any (v_shared)
            order by g.limit_id, g.slot_at
            for no key update of g;
        end if;
        insert into ledger as g (
            workspace_id, limit_id, slot_at, requests, input_tokens, output_tokens, expected_output_tokens,
            cost_nano
        )
        select l.workspace_id, l.limit_id, slot_of(l.period, l.sliding, v_now), s.requests, s.input_tokens,
            s.output_tokens, s.expected_output_tokens, s.cost_nano
        from (
            select p_workspace_id as workspace_id, o.limit_id, sum(t.requests) as requests,
                sum(t.input_tokens) as input_tokens, sum(t.output_tokens) as output_tokens,
                sum(t.expected_output_tokens) as expected_output_tokens, sum(t.cost_nano) as cost_nano
            from unnest(v_shares) t
            cross join lateral unnest((v_flows[t.flow]).limit_ids) as o (limit_id)
            where t.requests > 0
            group by o.limit_id
        ) s
        join limits l on l.workspace_id = s.workspace_id and l.limit_id = s.limit_id
        order by l.limit_id
        on conflict on constraint ledger_pkey do update
        set requests = g.requests + excluded.requests,
            input_tokens = g.input_tokens + excluded.input_tokens,
            output_tokens = g.output_tokens + excluded.output_tokens,
            expected_output_tokens = g.expected_output_tokens + excluded.expected_output_tokens,
            cost_nano = g.cost_nano + excluded.cost_nano;

        -- 10. Flows, then batches, locked in key order and then changed all at once: a claim may take from 64 flows.
        -- Each flow's items are one event row.
        select array_agg((v_flows[n]).batch_id) into v_batch_ids
        from (
            select t.flow from unnest(v_shares) t union select h.flow from unnest(v_waiting) h
        ) touched (n);
        perform 1 from flows f
        where f.workspace_id = p_workspace_id
            and f.batch_id = any (v_batch_ids)
            and f.resource_id = p_resource_id
        order by f.batch_id
        for no key update;
        update flows f
        set pending = f.pending - t.items,
            unstarted = f.unstarted - t.started,
            running = f.running + t.items,
            virtual_time = greatest(f.virtual_time, (v_flows[t.flow]).entry) + t.tokens / (v_flows[t.flow]).weight,
            waits_until = '-infinity',
            waits_for = null,
            floor = greatest(f.floor, t.floor)
        from (select p_workspace_id as workspace_id, p_resource_id as resource_id, s.* from unnest(v_shares) s) t
        where f.workspace_id = t.workspace_id
            and f.batch_id = t.batch_id
            and f.resource_id = t.resource_id
            and not f.is_cancelled
            and not f.is_paused;
        get diagnostics v_n = row_count;
        if v_n < coalesce(cardinality(v_shares), 0) then
            raise exception 'the flow of a batch was closed during the claim' using errcode = 'SLCLO';
        end if;
        for v_flow in
            select (v_flows[h.flow]).batch_id as batch_id, (v_flows[h.flow]).scope_ids as scope_ids, h.*
            from unnest(v_waiting) h
            order by (v_flows[h.flow]).batch_id
        loop
            select * into v_wait
            from capacity_waits(p_workspace_id, v_flow.scope_ids, v_flow.input_tokens,
                v_flow.output_tokens, v_flow.expected_output_tokens, v_now, p_guard, v_own_burst_s,
                v_state.throttled_at, v_flow.cost_nano);
            update flows f
            set waits_until = v_wait.next_at, waits_for = v_wait.limit_id
            where f.workspace_id = p_workspace_id
                and f.batch_id = v_flow.batch_id
                and f.resource_id = p_resource_id;
        end loop;
        select array_agg(t.batch_id) into v_batch_ids from unnest(v_shares) t;
        perform 1 from batches b
        where b.workspace_id = p_workspace_id and b.batch_id = any (v_batch_ids)
        order by b.batch_id
        for no key update;
        with begun as (
            update batches b
            set status = 'running', started_at = v_now
            where b.workspace_id = p_workspace_id and b.batch_id = any (v_batch_ids) and b.status = 'pending'
            returning b.batch_id
        )
        select array_agg(batch_id) into v_begun from begun;
        select jsonb_object_agg(b.batch_id, b.endpoint) into v_endpoints
        from batches b
        where b.workspace_id = p_workspace_id and b.batch_id = any (v_batch_ids);
        perform events_append(p_workspace_id, array(
            select row(t.batch_day, t.batch_id, k.kind, k.seqs)::happening
            from unnest(v_shares) t
            cross join lateral (
                values (1, 'batch-running'::event_kind, null::int[]), (2, 'item-running', t.seqs)
            ) k (place, kind, seqs)
            where k.place = 2 or t.batch_id = any (v_begun)
            order by t.batch_id, k.place
        ), v_now);

        -- 11. What this claim changes for the next ones.
        if v_lifted_tokens > 0 or v_upper_tokens > 0 and exists (
            select from unnest(v_line) l where l.is_lower
        ) then
            update resource_states s
            set lower_credit = least(s.lower_credit + 0.05 * v_upper_tokens - v_lifted_tokens, 1000000)
            where s.workspace_id = p_workspace_id and s.resource_id = p_resource_id;
        end if;
        if v_taken is not null and (v_probing or v_state.begun_at is null) then
            update scope_states s
            set begun_at = coalesce(s.begun_at, v_now),
                probed_at = case when v_probing then v_now else s.probed_at end
            where s.workspace_id = p_workspace_id and s.scope_id = v_resource.model_scope_id;
        end if;
    end if;

    -- 12. When it is worth coming back. The ready row is locked first; ledger and flows are looked at after:
    -- whoever adds work or gives back capacity does so before it locks the ready row (it locks it even when
    -- it finds nothing to change there), so either we see what it did or it sets next_at after us.
    if v_reason is not null or cardinality(coalesce(v_taken, '{}')) < p_want then
        perform 1 from ready r
        where r.workspace_id = p_workspace_id and r.resource_id = p_resource_id
        for no key update;
        case v_reason
            when 'cooldown' then
                v_next := greatest(v_blocked_until, v_now + interval '1 second' * v_probing::int);
            when 'concurrency' then
                -- A call that ends wakes the resource (ready_change); a minute is only the net below that.
                select case when c.room > 0 then v_now else v_now + interval '60 seconds' end, c.scope_id
                into v_next, v_waits_for
                from calls_room(p_workspace_id, p_resource_id, v_state.concurrency) c;
            when 'capacity', 'pace' then
                select w.next_at, w.limit_id into v_next, v_waits_for
                from capacity_waits(p_workspace_id,
                    array[v_resource.connection_id, v_resource.model_scope_id, p_resource_id],
                    v_head.input_tokens, v_head.output_tokens, v_head.expected_output_tokens, v_now, p_guard,
                    v_burst_s, v_state.throttled_at) w;
            else
                select w.due_at, w.waits_for into v_next, v_waits_for
                from work_due(p_workspace_id, p_resource_id, v_now) w;
                v_reason := case
                    when v_next <= v_now then null
                    when v_waits_for is not null then 'capacity'
                    when v_next is not null then 'retry'
                end;
        end case;
        update ready r
        set next_at = coalesce(v_next, 'infinity'), reason = v_reason, waits_for = v_waits_for
        where r.workspace_id = p_workspace_id
            and r.resource_id = p_resource_id
            and (r.next_at, r.reason, r.waits_for)
                is distinct from (coalesce(v_next, 'infinity'), v_reason, v_waits_for);
    else
        v_next := v_now;
    end if;

    return query
    select t.flow, t.seq, t.attempt, t.failures, t.max_attempts, t.input_tokens, t.output_tokens,
        t.expected_output_tokens, t.impossible, t.timeout_ms, q.body::text, null::json
    from unnest(v_taken) t
    join item_requests q on q.workspace_id = t.workspace_id
        and q.batch_day = t.batch_day
        and q.batch_id = t.batch_id
        and q.seq = t.seq;
    -- What "return next" returns are the columns as they stand: none of them was set.
    report := json_build_object(
        'claimed_at', v_now,
        'flows', (
            select coalesce(json_agg(json_build_object('flow', t.flow, 'batch_day', t.batch_day, 'batch_id', t.batch_id,
                'endpoint', v_endpoints ->> t.batch_id::text, 'limit_ids', (v_flows[t.flow]).limit_ids)), '[]')
            from unnest(v_shares) t
        ),
        'is_limited', v_is_limited, 'busy', v_busy, 'isolated', v_isolated, 'next_at', nullif(v_next, 'infinity'),
        'reason', v_reason, 'waits_for', v_waits_for, 'config_at', v_resource.config_at);
    return next;
end
$$;
comment on function claim(
    uuid, uuid, uuid, int, boolean, interval, interval, double precision, int
) is 'Take items of one resource for work, within its limits. See sql/functions/claim.sql.';

-- By how much a deadline raises a batch's weight: the square of its whole time by the time left, at most 100.
create or replace function urgency(
    created_at timestamptz, expires_at timestamptz, now timestamptz
)
returns double precision
language sql immutable parallel safe
as $$
    select case when expires_at is null then 1 else least(100, greatest(1, (
        extract(epoch from expires_at - created_at)
        / greatest(extract(epoch from expires_at - now), 0.001)) ^ 2)) end
$$;
comment on function urgency(timestamptz, timestamptz, timestamptz) is
    'By how much a deadline raises a batch''s weight.';

-- The first sixteen items of a flow count half, so that a small batch is done sooner beside a large one, and still
-- nobody is starved by many small ones.
create or replace function first_share(number bigint) returns double precision
language sql immutable parallel safe
as $$ select case when number <= 16 then 0.5 else 1 end $$;
comment on function first_share(bigint) is 'By how much the n-th item of a flow counts for its turn.';

-- How many more calls of a resource may be out at once, by the bounds of its connection, its resource and what its
-- model was seen to bear (p_learned), and the scope of the tightest. No row: there is no bound.
create or replace function calls_room(
    p_workspace_id uuid, p_resource_id uuid, p_learned double precision
)
returns table (room int, scope_id uuid)
language sql stable
as $$
    select x.room, x.scope_id
    from resources r
    join connections c on c.workspace_id = r.workspace_id and c.connection_id = r.connection_id
    cross join lateral (
        select coalesce(sum(f.running), 0) as connection,
            coalesce(sum(f.running) filter (where o.model_scope_id = r.model_scope_id), 0) as model,
            coalesce(sum(f.running) filter (where o.resource_id = r.resource_id), 0) as resource
        from resources o
        join flows f on f.workspace_id = o.workspace_id and f.resource_id = o.resource_id and f.is_open
        where o.workspace_id = r.workspace_id and o.connection_id = r.connection_id
    ) running
    cross join lateral (
        values ((c.concurrency - running.connection)::int, c.connection_id),
            ((floor(p_learned) - running.model)::int, r.model_scope_id),
            ((r.concurrency - running.resource)::int, r.resource_id)
    ) x (room, scope_id)
    where r.workspace_id = p_workspace_id and r.resource_id = p_resource_id and x.room is not null
    order by x.room, x.scope_id
    limit 1
$$;
comment on function calls_room(uuid, uuid, double precision) is
    'How many more calls of a resource may be out at once.';

-- When an item of this size may be claimed as far as the limits of scopes and their pace go, and the limit that is
-- last to allow it: now, if nothing stands against it. Infinity: never. At the pace half a burst later than the
-- first moment: soon enough to lose nothing, and several at once.
create or replace function capacity_waits(
    p_workspace_id uuid, p_scope_ids uuid[], p_input_tokens bigint, p_output_tokens bigint,
    p_expected_output_tokens bigint, p_now timestamptz, p_guard interval, p_burst_s double precision,
    p_paced_since timestamptz, p_cost_nano bigint default 0
)
returns table (next_at timestamptz, limit_id uuid)
language sql stable
as $$
    select w.next_at, w.limit_id
    from (
        select f.next_at, f.limit_id
        from capacity_frees(p_workspace_id, p_scope_ids, 1, p_input_tokens, p_output_tokens, p_now,
            p_guard) f
        union all
        -- Money is bounded for a batch's lifetime only: it comes back when calls in flight cost less than
        -- reserved, which wakes the flow.
        select 'infinity', b.limit_id
        from budgets(p_workspace_id, p_scope_ids, p_now, p_guard, p_burst_s, p_paced_since) b
        where b.cost_nano < p_cost_nano
        union all
        select p_now + make_interval(secs => max(
                (greatest(k.needed, k.most / 2) - k.paced) / k.rate)), b.limit_id
        from budgets(p_workspace_id, p_scope_ids, p_now, p_guard, p_burst_s, p_paced_since) b
        cross join lateral (
            values
                (b.paced_requests, b.rate_requests, 1, greatest(b.rate_requests * p_burst_s, 1)),
                (b.paced_tokens, b.rate_tokens,
                    pace_room(p_input_tokens + p_expected_output_tokens, b.rate_tokens * p_burst_s),
                    b.rate_tokens * p_burst_s),
                (b.paced_input_tokens, b.rate_input_tokens,
                    pace_room(p_input_tokens, b.rate_input_tokens * p_burst_s), b.rate_input_tokens * p_burst_s),
                (b.paced_output_tokens, b.rate_output_tokens,
                    pace_room(p_expected_output_tokens, b.rate_output_tokens * p_burst_s),
                    b.rate_output_tokens * p_burst_s)
        ) k (paced, rate, needed, most)
        where k.paced < k.needed
        group by b.limit_id
        union all
        select p_now, null
    ) w
    order by w.next_at desc
    limit 1
$$;
comment on function capacity_waits(
    uuid, uuid[], bigint, bigint, bigint, timestamptz, interval, double precision, timestamptz, bigint
) is 'When an item may be claimed as far as limits and pace go, and the limit it waits for.';
