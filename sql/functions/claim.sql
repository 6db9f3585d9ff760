-- claim: take items for work. The heart of Sluice.
--
-- What it does. One worker asks for at most p_want items of one resource. The function decides what the
-- rate limits still allow, takes the items whose turn it is, writes lease and reservation, and returns
-- them with their requests. It commits as one transaction, so a limit can be neither overshot by two
-- workers nor leaked by a crash: no item is out without its reservation, and none reserved but not out.
--
-- Lock, then look. The mutexes are the limit_scopes rows of connection and resource. They are locked by
-- a statement of their own: every statement of a VOLATILE function takes a fresh snapshot (READ
-- COMMITTED), so what is read after the lock contains all that the previous holder committed. Locking and
-- reading in one statement would read the snapshot of its start, miss the previous holder's reservations
-- and overshoot. Never call this above READ COMMITTED, nor with synchronous_commit off: a crash would
-- forget grants that went out. Whoever finds a mutex taken goes to its next resource (SKIP LOCKED).
--
-- Lock order (the same for all verbs): scope mutexes → items → ledger slots → flows → batches → ready,
-- within each in primary-key order. Items are taken SKIP LOCKED, so a claim never waits for one.
--
-- Order (start-time fair queueing by tokens). A flow's virtual time is the tokens it took divided by its
-- weight. An item's tag is that plus the tokens before and including it within its flow. The smallest tags
-- of the highest priority go first, so a batch of ten beside one of a hundred thousand is answered at once.
-- Cumulated requests and tokens are cut at the first item that does not fit: nothing overtakes it, so a
-- big item is never starved by small ones.
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
-- The last row returned has no seq: it reports. next_at says when it is worth asking again (null: nothing
-- waits; in the past: at once), busy that another worker held the mutex, isolated that a suspect of many
-- crashes is due: it was taken, and nothing else, if the worker has nothing else to do (p_alone), and
-- otherwise waits until a worker has.
create or replace function claim(
    p_workspace_id uuid,
    p_resource_id uuid,
    p_worker_id uuid,
    p_want int,
    p_alone boolean,
    p_guard interval,
    p_grace interval,
    p_burst_s double precision
)
returns table (
    batch_day date, batch_id uuid, seq int, attempt int, failures int, max_attempts int,
    input_tokens int, output_tokens int, impossible boolean, endpoint text, body text,
    claimed_at timestamptz, limit_ids uuid[], busy boolean, isolated boolean, next_at timestamptz,
    waits_for uuid, config_at timestamptz
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
    v_resource record;
    v_now timestamptz;
    v_blocked_until timestamptz;
    v_limit_ids uuid[];
    v_requests_left bigint;
    v_paced bigint;
    v_tokens_left bigint;
    v_tokens_cap bigint;
    v_flows int;
    v_isolated boolean := false;
    v_taken taken_item[];
    v_picked record;
    v_flow record;
    v_batch record;
    v_next timestamptz;
    v_waits_for uuid;
    v_head_tokens bigint;
    v_endpoints jsonb := '{}';
    v_endpoint text;
begin
    -- 1. The mutexes, and nothing but the mutexes.
    select r.connection_id, coalesce(r.timeout_ms, c.timeout_ms) as timeout_ms,
        greatest(r.updated_at, c.updated_at) as config_at
    into v_resource
    from resources r
    join connections c on c.workspace_id = r.workspace_id and c.connection_id = r.connection_id
    where r.workspace_id = p_workspace_id and r.resource_id = p_resource_id;
    if not found then
        return;
    end if;
    perform 1
    from limit_scopes s
    where s.workspace_id = p_workspace_id and s.scope_id in (v_resource.connection_id, p_resource_id)
    order by s.scope_id
    for no key update skip locked;
    get diagnostics v_flows = row_count;
    if v_flows < 2 then
        return query select null::date, null::uuid, null::int, null::int, null::int, null::int,
            null::int, null::int, null::boolean, null::text, null::text, clock_timestamp(),
            null::uuid[], true, false, clock_timestamp(), null::uuid, v_resource.config_at;
        return;
    end if;

    -- 2. The clock, read after the lock; slots never go backwards.
    select greatest(clock_timestamp(), max(newest.slot_at)) into v_now
    from limits l
    cross join lateral (
        select g.slot_at from ledger g
        where g.workspace_id = l.workspace_id and g.limit_id = l.limit_id
        order by g.slot_at desc
        limit 1
    ) newest
    where l.workspace_id = p_workspace_id
        and l.scope_id in (v_resource.connection_id, p_resource_id);
    v_now := coalesce(v_now, clock_timestamp());

    -- 3. What the limits leave.
    select array_agg(l.limit_id order by l.limit_id),
        min(l.requests - used.requests),
        min(l.tokens - used.tokens),
        min(l.tokens)
    into v_limit_ids, v_requests_left, v_tokens_left, v_tokens_cap
    from limits l
    cross join lateral (
        select coalesce(sum(g.requests), 0)::bigint as requests,
            coalesce(sum(g.input_tokens + g.output_tokens), 0)::bigint as tokens
        from ledger g
        where g.workspace_id = l.workspace_id
            and g.limit_id = l.limit_id
            and g.slot_at > slot_of(l.period, v_now) - case l.period
                when 'minute' then interval '61 seconds' + p_guard
                when 'hour' then interval '3660 seconds' + p_guard
                else interval '1 microsecond'
            end
            and slot_frees_at(l.period, g.slot_at, p_guard) > v_now
    ) used
    where l.workspace_id = p_workspace_id
        and l.scope_id in (v_resource.connection_id, p_resource_id);
    v_limit_ids := coalesce(v_limit_ids, '{}');
    select floor(min(e.allowance))::bigint into v_paced
    from pace(p_workspace_id, v_limit_ids, v_now, p_burst_s) e;
    v_requests_left := least(v_requests_left, v_paced);

    select s.blocked_until into v_blocked_until
    from resource_states s
    where s.workspace_id = p_workspace_id and s.resource_id = p_resource_id;

    if v_blocked_until > v_now then
        v_next := v_blocked_until;
        v_waits_for := p_resource_id;
    else
        -- 4. Whose turn it is. A flow that waits only for later retries takes no place in the ranking.
        with ranked as materialized (
            select f.batch_id, f.batch_day, f.priority, f.weight, f.virtual_time, f.floor,
                count(*) over () as flows
            from flows f
            where f.workspace_id = p_workspace_id
                and f.resource_id = p_resource_id
                and f.is_open
                and not f.is_paused
                and not f.is_cancelled
                and f.pending > 0
                and (
                    f.unstarted > 0
                    or exists (
                        select from items i
                        where i.workspace_id = f.workspace_id
                            and i.batch_day = f.batch_day
                            and i.batch_id = f.batch_id
                            and i.resource_id = f.resource_id
                            and i.status = 'pending'
                            and i.attempt > 0
                            and i.visible_at <= v_now
                    )
                )
            order by f.priority desc, f.virtual_time, f.batch_id
            limit 64
        ),
        candidates as materialized (
            select p_workspace_id as workspace_id, r.batch_id, r.batch_day, r.priority, r.weight,
                r.virtual_time, r.floor, c.seq, c.attempt, c.failures, c.max_attempts, c.place, c.suspect,
                c.input_tokens > coalesce(v_tokens_cap, c.input_tokens) as impossible,
                c.input_tokens,
                least(
                    coalesce(c.max_output_tokens, 1024),
                    greatest(coalesce(v_tokens_cap, 2147483647) - c.input_tokens, 0)
                )::int as output_tokens
            from ranked r
            cross join lateral (
                (
                    select i.seq, i.attempt, i.failures, i.max_attempts, i.input_tokens,
                        i.max_output_tokens, i.crashes >= 6 as suspect,
                        row_number() over (order by i.visible_at, i.seq) - 1000000 as place
                    from items i
                    where i.workspace_id = p_workspace_id
                        and i.batch_day = r.batch_day
                        and i.batch_id = r.batch_id
                        and i.resource_id = p_resource_id
                        and i.status = 'pending'
                        and i.attempt > 0
                        and i.visible_at <= v_now
                    order by i.visible_at, i.seq
                    -- Enough that few flows fill the worker, bounded when there are many.
                    limit greatest(16, 4 * p_want / r.flows + 1)
                )
                union all
                (
                    select i.seq, i.attempt, i.failures, i.max_attempts, i.input_tokens,
                        i.max_output_tokens, false, i.seq::bigint
                    from items i
                    where i.workspace_id = p_workspace_id
                        and i.batch_day = r.batch_day
                        and i.batch_id = r.batch_id
                        and i.resource_id = p_resource_id
                        and i.status = 'pending'
                        and i.attempt = 0
                        and i.seq >= r.floor
                    order by i.seq
                    limit least(p_want, greatest(16, 4 * p_want / r.flows + 1))
                )
            ) c
        ),
        -- An item that was in flight at many crashes runs alone, so that the next one convicts it.
        eligible as (
            select c.*,
                case when impossible then 0 else 1 end as cost_requests,
                case when impossible then 0 else input_tokens + output_tokens end as cost_tokens
            from candidates c
            where not suspect
                or (p_alone and not exists (
                    select from candidates o
                    where o.suspect and (o.place, o.batch_id) < (c.place, c.batch_id)
                ))
        ),
        tagged as (
            select e.*,
                virtual_time + sum(greatest(cost_tokens, 1))
                    over (partition by batch_id order by place) / weight as tag
            from eligible e
        ),
        summed as (
            select t.*,
                row_number() over line as rank,
                sum(cost_requests) over line as requests,
                sum(cost_tokens) over line as tokens
            from tagged t
            window line as (
                order by (suspect and p_alone) desc, priority desc, tag, batch_id, place
                rows unbounded preceding
            )
        ),
        fitting as (
            select s.*
            from summed s
            where rank <= case when p_alone and exists (select from eligible where suspect)
                    then 1 else p_want end
                and requests <= coalesce(v_requests_left, requests)
                and tokens <= coalesce(v_tokens_left, tokens)
        ),
        -- 5. Take them. Whoever is locked (by a cancel's marking) is left for later.
        held as (
            select i.workspace_id, i.batch_day, i.batch_id, i.seq, p.impossible, p.input_tokens,
                p.output_tokens, p.rank
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
                visible_at = v_now + make_interval(secs => v_resource.timeout_ms / 1000.0) + p_grace,
                attempt = i.attempt + 1,
                worker_id = p_worker_id,
                claimed_at = v_now,
                reserved_limits = case when h.impossible then '{}' else v_limit_ids end,
                reserved_input_tokens = case when h.impossible then 0 else h.input_tokens end,
                reserved_output_tokens = case when h.impossible then 0 else h.output_tokens end
            from held h
            where i.workspace_id = h.workspace_id
                and i.batch_day = h.batch_day
                and i.batch_id = h.batch_id
                and i.seq = h.seq
            returning i.batch_day, i.batch_id, i.seq, i.attempt, i.failures, i.max_attempts,
                i.reserved_input_tokens, i.reserved_output_tokens, h.impossible, h.rank
        ),
        -- A first-attempt candidate that was not taken stops its flow's floor.
        floors as (
            select batch_id, coalesce(min(seq) filter (where not taken), max(seq) + 1) as floor
            from (
                select batch_id, seq, bool_or(taken) as taken
                from (
                    select batch_id, seq, false as taken from candidates where attempt = 0
                    union all
                    select batch_id, seq, true from updated where attempt = 1
                ) both_sets
                group by batch_id, seq
            ) firsts
            group by batch_id
        )
        select
            (select array_agg(row(p_workspace_id, batch_day, batch_id, seq, attempt, failures, max_attempts,
                p_resource_id, reserved_input_tokens, reserved_output_tokens, impossible)::taken_item
                order by rank) from updated) as taken,
            (select jsonb_object_agg(batch_id, floor) from floors) as floors,
            exists (select from candidates where suspect) as suspects,
            -- The first that did not fit; what is left because the worker is full is not waiting.
            (select s.cost_tokens from summed s
                where s.rank <= p_want and s.rank > (select count(*) from fitting)
                order by s.rank limit 1) as head_tokens
        into v_picked;
        v_taken := v_picked.taken;
        v_isolated := v_picked.suspects;
        -- Beside a suspect that was taken others are not waiting for capacity; the suspect itself may be.
        if v_taken is null or not (v_picked.suspects and p_alone) then
            v_head_tokens := v_picked.head_tokens;
        end if;

        if v_taken is not null then
            -- 6. The ledger: one row per limit, the slot of now.
            insert into ledger as g (workspace_id, limit_id, slot_at, requests, input_tokens, output_tokens)
            select p_workspace_id, l.limit_id, slot_of(l.period, v_now), sums.requests, sums.input_tokens,
                sums.output_tokens
            from limits l
            cross join (
                select count(*) as requests, sum(t.input_tokens) as input_tokens,
                    sum(t.output_tokens) as output_tokens
                from unnest(v_taken) t
                where not t.impossible
            ) sums
            where l.workspace_id = p_workspace_id
                and l.limit_id = any (v_limit_ids)
                and sums.requests > 0
            order by l.limit_id
            on conflict on constraint ledger_pkey do update
            set requests = g.requests + excluded.requests,
                input_tokens = g.input_tokens + excluded.input_tokens,
                output_tokens = g.output_tokens + excluded.output_tokens;

            -- 7. Flows, then batches, in key order; each flow's items are one event row.
            for v_flow in
                select t.batch_id, t.batch_day, count(*)::int as items,
                    count(*) filter (where t.attempt = 1)::int as started,
                    sum(greatest(t.input_tokens + t.output_tokens, 1)) as tokens,
                    array_agg(t.seq order by t.seq) as seqs
                from unnest(v_taken) t
                group by t.batch_id, t.batch_day
                order by t.batch_id
            loop
                update flows f
                set pending = f.pending - v_flow.items,
                    unstarted = f.unstarted - v_flow.started,
                    running = f.running + v_flow.items,
                    virtual_time = f.virtual_time + v_flow.tokens / f.weight,
                    floor = greatest(f.floor, (v_picked.floors ->> v_flow.batch_id::text)::int)
                where f.workspace_id = p_workspace_id
                    and f.batch_id = v_flow.batch_id
                    and f.resource_id = p_resource_id
                    and not f.is_cancelled
                    and not f.is_paused;
                if not found then
                    raise exception 'flow of batch % was closed during the claim', v_flow.batch_id
                        using errcode = 'SLCLO';
                end if;
            end loop;
            for v_batch in
                select t.batch_id, t.batch_day, array_agg(t.seq order by t.seq) as seqs
                from unnest(v_taken) t
                group by t.batch_id, t.batch_day
                order by t.batch_id
            loop
                update batches b
                set status = 'running', started_at = v_now
                where b.workspace_id = p_workspace_id
                    and b.batch_id = v_batch.batch_id
                    and b.status = 'pending';
                if found then
                    perform event_append(p_workspace_id, v_batch.batch_day, v_batch.batch_id,
                        'batch-running', null, v_now);
                end if;
                select b.endpoint into v_endpoint
                from batches b
                where b.workspace_id = p_workspace_id and b.batch_id = v_batch.batch_id;
                v_endpoints := v_endpoints || jsonb_build_object(v_batch.batch_id, v_endpoint);
                perform event_append(p_workspace_id, v_batch.batch_day, v_batch.batch_id, 'item-running',
                    v_batch.seqs, v_now);
            end loop;
        end if;
    end if;

    -- 8. When it is worth coming back. The ready row is locked first; ledger and flows are looked at after:
    -- whoever adds work or gives back capacity does so before it locks the ready row (it locks it even when
    -- it finds nothing to change there), so either we see what it did or it sets next_at after us.
    if v_next is not null or v_head_tokens is not null or cardinality(coalesce(v_taken, '{}')) < p_want then
        perform 1 from ready r
        where r.workspace_id = p_workspace_id and r.resource_id = p_resource_id
        for no key update;
        if v_next is null and v_head_tokens is not null then
            select w.next_at, w.limit_id into v_next, v_waits_for
            from capacity_frees(p_workspace_id, v_limit_ids, 1, v_head_tokens, v_now, p_guard) w;
            -- At the pace, half a burst later: soon enough to lose nothing, and several at once.
            v_next := greatest(v_next, (
                select max(v_now + make_interval(
                    secs => greatest(greatest(e.burst / 2, 1) - e.allowance, 0) / e.rate))
                from pace(p_workspace_id, v_limit_ids, v_now, p_burst_s) e
            ));
        end if;
        if v_next is null then
            v_next := work_due(p_workspace_id, p_resource_id, v_now);
        end if;
        update ready r
        set next_at = coalesce(v_next, 'infinity')
        where r.workspace_id = p_workspace_id
            and r.resource_id = p_resource_id
            and r.next_at is distinct from coalesce(v_next, 'infinity');
    else
        v_next := v_now;
    end if;

    return query
    select t.batch_day, t.batch_id, t.seq, t.attempt, t.failures, t.max_attempts, t.input_tokens,
        t.output_tokens, t.impossible,
        v_endpoints ->> t.batch_id::text, q.body::text, v_now, v_limit_ids, false, false,
        null::timestamptz, null::uuid, v_resource.config_at
    from unnest(v_taken) t
    join item_requests q on q.workspace_id = t.workspace_id
        and q.batch_day = t.batch_day
        and q.batch_id = t.batch_id
        and q.seq = t.seq;
    return query select null::date, null::uuid, null::int, null::int, null::int, null::int, null::int,
        null::int, null::boolean, null::text, null::text, v_now, v_limit_ids, false, v_isolated,
        nullif(v_next, 'infinity'), v_waits_for, v_resource.config_at;
end
$$;
comment on function claim(uuid, uuid, uuid, int, boolean, interval, interval, double precision) is
    'Take items of one resource for work, within its limits. See sql/functions/claim.sql.';
