-- transitions: what follows when items change their states, shared by settle, reclaim, expire and cancel: the items'
-- rows (items_change), the ledger (ledger_adjust), counters, events and ends of batches (flows_change), and what
-- that gives workers to do (ready_change). Lock order: items → ledger slots → flows → batches → ready.

-- Write the new state of items whose rows the caller has locked.
create or replace function items_change(
    p_workspace_id uuid, p_changed settled_item[], p_now timestamptz
)
returns void
language sql volatile
as $$
    update items i
    set status = c.becomes,
        ended_reason = c.reason,
        ended_at = case when c.becomes = 'pending' then null else p_now end,
        resource_id = coalesce(c.moves_to, i.resource_id),
        visible_at = coalesce(c.visible_at, i.visible_at),
        failures = c.failures,
        crashes = c.crashes,
        worker_id = null,
        claimed_at = null,
        reserved_limits = null,
        reserved_input_tokens = null,
        reserved_output_tokens = null,
        expected_output_tokens = null,
        reserved_cost_nano = null
    from unnest(p_changed) c
    where i.workspace_id = c.workspace_id
        and i.batch_day = c.batch_day
        and i.batch_id = c.batch_id
        and i.seq = c.seq
$$;
comment on function items_change(uuid, settled_item[], timestamptz) is
    'Write the new state of locked items.';

-- Add differences to ledger slots, one after the other in key order, because settlings and claims share slots. A slot
-- that is not there was forgotten long ago; but what the provider counts beyond ours may need a new one.
create or replace function ledger_adjust(p_workspace_id uuid, p_differences jsonb) returns void
language plpgsql volatile
as $$
begin
    if p_differences is null then
        return;
    end if;
    insert into ledger as g (
        workspace_id, limit_id, slot_at, requests, input_tokens, output_tokens, expected_output_tokens,
        refused, outside_requests, outside_input_tokens, outside_output_tokens, cost_nano
    )
    select p_workspace_id, d.limit_id, d.slot_at, d.requests, d.input_tokens, d.output_tokens,
        d.expected_output_tokens, d.refused, d.outside_requests, d.outside_input_tokens,
        d.outside_output_tokens, d.cost_nano
    from (
        select l.workspace_id, l.limit_id, slot_of(l.period, l.sliding, d.claimed_at) as slot_at,
            coalesce(sum(d.requests), 0) as requests, coalesce(sum(d.input_tokens), 0) as input_tokens,
            coalesce(sum(d.output_tokens), 0) as output_tokens,
            coalesce(sum(d.expected_output_tokens), 0) as expected_output_tokens,
            coalesce(sum(d.refused), 0) as refused, coalesce(sum(d.cost_nano), 0) as cost_nano,
            coalesce(sum(d.outside_requests), 0) as outside_requests,
            coalesce(sum(d.outside_input_tokens), 0) as outside_input_tokens,
            coalesce(sum(d.outside_output_tokens), 0) as outside_output_tokens,
            bool_or(d.outside_requests is not null) as is_outside
        from jsonb_to_recordset(p_differences) as d (
            limit_id uuid, claimed_at timestamptz, requests bigint, input_tokens bigint,
            output_tokens bigint, expected_output_tokens bigint, refused bigint, outside_requests bigint,
            outside_input_tokens bigint, outside_output_tokens bigint, cost_nano bigint
        )
        join limits l on l.workspace_id = p_workspace_id and l.limit_id = d.limit_id
        group by l.workspace_id, l.limit_id, slot_of(l.period, l.sliding, d.claimed_at)
    ) d
    -- Not exists: beside an or it may be hashed, and then reads every slot of the workspace.
    where d.is_outside or (
        select true
        from ledger h
        where h.workspace_id = d.workspace_id and h.limit_id = d.limit_id and h.slot_at = d.slot_at
        limit 1
    )
    order by d.limit_id, d.slot_at
    on conflict on constraint ledger_pkey do update
    set requests = g.requests + excluded.requests,
        input_tokens = g.input_tokens + excluded.input_tokens,
        output_tokens = g.output_tokens + excluded.output_tokens,
        expected_output_tokens = g.expected_output_tokens + excluded.expected_output_tokens,
        refused = g.refused + excluded.refused,
        cost_nano = g.cost_nano + excluded.cost_nano,
        outside_requests = g.outside_requests + excluded.outside_requests,
        outside_input_tokens = g.outside_input_tokens + excluded.outside_input_tokens,
        outside_output_tokens = g.outside_output_tokens + excluded.outside_output_tokens;
end
$$;
comment on function ledger_adjust(uuid, jsonb) is 'Add differences to ledger slots, locked in order.';

-- Move the counters of flows, write the events, end the batches.
-- p_usage: per flow the tokens of answered items, what its calls cost, and drift, what settling corrected virtual
-- time by.
-- p_freed: limits that have room again; flows that waited for one are looked at again. Returns the resources of
-- all flows that do not wait any more.
--
-- A flow that was cancelled meanwhile turns every return to pending into cancelled; the rows say pending
-- until cancel_chunk has marked them (unmarked counts those).
create or replace function flows_change(
    p_workspace_id uuid, p_changed settled_item[], p_freed uuid[], p_now timestamptz, p_usage jsonb
)
returns uuid[]
language plpgsql volatile
as $$
declare
    v_batch_ids uuid[];
    v_batch record;
    v_released uuid[];
begin
    if exists (
        select from flows f
        where f.workspace_id = p_workspace_id and f.is_open and f.waits_for = any (p_freed)
    ) then
        -- All rows in one order, those changed below included. Found by their indexes: with an or in place of the
        -- union every flow of the workspace was read.
        perform 1
        from (
            select f.workspace_id, f.batch_id, f.resource_id
            from flows f
            where f.workspace_id = p_workspace_id and f.is_open and f.waits_for = any (p_freed)
            union
            select p_workspace_id, c.batch_id, c.resource_id from unnest(p_changed) c
            union
            select p_workspace_id, c.batch_id, c.moves_to from unnest(p_changed) c
            union
            select p_workspace_id, s.batch_id, s.resource_id
            from jsonb_to_recordset(p_usage) as s (batch_id uuid, resource_id uuid)
        ) c
        join flows f on f.workspace_id = c.workspace_id
            and f.batch_id = c.batch_id
            and f.resource_id = c.resource_id
        order by f.batch_id, f.resource_id
        for no key update of f;
        with released as (
            update flows f
            set waits_until = '-infinity', waits_for = null,
                virtual_time = greatest(f.virtual_time,
                    flow_entry(f.workspace_id, f.resource_id, f.priority))
            where f.workspace_id = p_workspace_id and f.is_open and f.waits_for = any (p_freed)
            returning f.resource_id
        )
        select array_agg(resource_id) into v_released from released;
    end if;
    -- Rows are locked in key order by statements of their own and then changed all at once: a settling may touch
    -- hundreds of flows.
    perform 1
    from (
        select p_workspace_id as workspace_id, o.batch_id, o.resource_id from unnest(p_changed) o
        union
        select p_workspace_id, o.batch_id, o.moves_to from unnest(p_changed) o
        union
        select p_workspace_id, s.batch_id, s.resource_id
        from jsonb_to_recordset(p_usage) as s (batch_id uuid, resource_id uuid)
    ) c
    join flows f on f.workspace_id = c.workspace_id
        and f.batch_id = c.batch_id
        and f.resource_id = c.resource_id
    order by f.batch_id, f.resource_id
    for no key update of f;
    with changed as materialized (
        -- Summed up before it is joined: a nested loop would look for every item among all flows.
        select p_workspace_id as workspace_id, c.*, coalesce(u.input_tokens, 0) as input_tokens,
            coalesce(u.output_tokens, 0) as output_tokens, coalesce(u.cached_tokens, 0) as cached_tokens,
            coalesce(u.reasoning_tokens, 0) as reasoning_tokens, coalesce(u.drift, 0) as drift,
            coalesce(u.cost_nano, 0) as cost_nano, u.currency
        from (
            select batch_id, resource_id, min(batch_day) as batch_day,
                count(*) filter (where was = 'running')::int as left_running,
                count(*) filter (where was = 'pending')::int as left_pending,
                count(*) filter (where was = 'pending' and attempt = 0)::int as left_unstarted,
                -- What comes from another model waits here as what returns does.
                count(*) filter (where becomes = 'pending')::int as to_pending,
                count(*) filter (where becomes = 'completed')::int as to_completed,
                count(*) filter (where becomes = 'failed')::int as to_failed,
                count(*) filter (where was is null and becomes is not null)::int as come,
                count(*) filter (where was is not null and becomes is null)::int as gone
            from (
                select n.batch_id, n.resource_id, n.batch_day, n.was, n.attempt,
                    case when n.moves_to is null then n.becomes end as becomes
                from unnest(p_changed) n
                union all
                select n.batch_id, n.moves_to, n.batch_day, null, null, n.becomes
                from unnest(p_changed) n
                where n.moves_to is not null
                union all
                -- What cost something and changed no item is an element without states.
                select s.batch_id, s.resource_id, null, null, null, null
                from jsonb_to_recordset(p_usage) as s (batch_id uuid, resource_id uuid, cost_nano bigint)
                where s.cost_nano is not null
            ) either
            group by batch_id, resource_id
        ) c
        left join jsonb_to_recordset(p_usage) as u (
            batch_id uuid, resource_id uuid, input_tokens bigint, output_tokens bigint,
            cached_tokens bigint, reasoning_tokens bigint, drift double precision, cost_nano bigint, currency text
        ) on u.batch_id = c.batch_id and u.resource_id = c.resource_id
    ),
    waited as materialized (
        select f.resource_id
        from changed c
        join flows f on f.workspace_id = c.workspace_id
            and f.batch_id = c.batch_id
            and f.resource_id = c.resource_id
        where f.waits_for is not null
    ),
    updated as (
        update flows f
        set running = f.running - c.left_running,
            unstarted = f.unstarted - case when f.is_cancelled then 0 else c.left_unstarted end,
            pending = f.pending + case when f.is_cancelled then 0 else c.to_pending - c.left_pending end,
            cancelled = f.cancelled + case when f.is_cancelled then c.to_pending - c.left_pending else 0 end,
            unmarked = f.unmarked + case when f.is_cancelled then c.to_pending - c.left_pending else 0 end,
            completed = f.completed + c.to_completed,
            failed = f.failed + c.to_failed,
            total = f.total + c.come - c.gone,
            retries = f.retries + c.to_pending - c.come + c.gone,
            input_tokens = f.input_tokens + c.input_tokens,
            output_tokens = f.output_tokens + c.output_tokens,
            cached_tokens = f.cached_tokens + c.cached_tokens,
            reasoning_tokens = f.reasoning_tokens + c.reasoning_tokens,
            cost_nano = f.cost_nano + c.cost_nano,
            currency = coalesce(c.currency, f.currency),
            virtual_time = greatest(
                -- What waited for nothing but its own calls re-enters at the virtual time of the others.
                -- So does what waited for a limit of its own.
                case when f.pending = 0 and c.to_pending > 0 and not f.is_cancelled or f.waits_for is not null
                    then greatest(f.virtual_time, flow_entry(f.workspace_id, f.resource_id, f.priority))
                    else f.virtual_time end
                + c.drift / (f.weight * urgency(f.created_at, f.expires_at, p_now))
                    * first_share((f.total - f.unstarted)::bigint), 0),
            -- A limit of its own may have room now.
            waits_until = '-infinity',
            waits_for = null,
            is_open = f.running - c.left_running + f.pending + f.unmarked + c.to_pending - c.left_pending > 0
        from changed c
        where f.workspace_id = c.workspace_id and f.batch_id = c.batch_id and f.resource_id = c.resource_id
    )
    select v_released || array_agg(resource_id) into v_released from waited;

    select array_agg(distinct c.batch_id) into v_batch_ids from unnest(p_changed) c;
    perform 1
    from batches b
    where b.workspace_id = p_workspace_id and b.batch_id = any (v_batch_ids)
    order by b.batch_id
    for no key update;
    -- Before the end of any is told: what is told depends on it.
    update batches b
    set expired_at = p_now
    where b.workspace_id = p_workspace_id
        and b.batch_id in (select c.batch_id from unnest(p_changed) c where c.reason = 'expired')
        and b.expired_at is null;
    perform events_append(p_workspace_id, array(
        select row(h.batch_day, h.batch_id, h.kind, h.seqs)::happening
        from (
            select c.batch_day, c.batch_id, c.kind, array_agg(c.seq order by c.seq) as seqs
            from (
                select o.*, case o.becomes when 'completed' then 'item-completed' when 'failed' then 'item-failed'
                    when 'pending' then 'item-retrying' end::event_kind as kind
                from unnest(p_changed) o
            ) c
            where c.kind is not null
            group by c.batch_day, c.batch_id, c.kind
        ) h
        where h.kind <> 'item-retrying' or not exists (
            select from batches b
            where b.workspace_id = p_workspace_id and b.batch_id = h.batch_id and b.status = 'cancelled'
        )
        order by h.batch_id, h.kind
    ), p_now);
    -- Under the same locks the last of several settlings sees what the others committed.
    for v_batch in
        select b.batch_id, b.batch_day
        from batches b
        where b.workspace_id = p_workspace_id
            and b.batch_id = any (v_batch_ids)
            and not exists (
                select from flows f
                where f.workspace_id = b.workspace_id and f.batch_id = b.batch_id and f.is_open
            )
        order by b.batch_id
    loop
        perform batch_finish(p_workspace_id, v_batch.batch_day, v_batch.batch_id, p_now);
    end loop;
    return v_released;
end
$$;
comment on function flows_change(uuid, settled_item[], uuid[], timestamptz, jsonb) is
    'Counters, events and ends that follow from items'' transitions.';

-- Make known when resources have work again, and at once where what they wait for is there again: a limit with
-- room (p_freed), a flow that waits no more
-- (p_released), or a call less in flight. Every row is locked before it is looked at: a claim beside us may be about
-- to say that nothing waits, having seen neither our items nor our refund. That may be a claim of any resource which
-- shares a connection with ours. The last locks of a transaction, all in one order. Returns whom it woke.
create or replace function ready_change(
    p_workspace_id uuid, p_changed settled_item[], p_freed uuid[], p_released uuid[], p_now timestamptz
)
returns uuid[]
language plpgsql volatile
as $$
declare
    v_due record;
    v_woken uuid[];
begin
    for v_due in
        select d.resource_id, min(d.due_at) as due_at
        from (
            select o.resource_id,
                case when o.resource_id = c.resource_id then c.due_at end as due_at
            from (
                select n.resource_id, min(n.due_at) as due_at
                from (
                    select c.resource_id, case when c.becomes = 'pending' and c.moves_to is null
                        then c.visible_at end as due_at
                    from unnest(p_changed) c
                    union all
                    select c.moves_to, c.visible_at from unnest(p_changed) c where c.moves_to is not null
                ) n
                group by n.resource_id
            ) c
            join resources r on r.workspace_id = p_workspace_id and r.resource_id = c.resource_id
            join resources o on o.workspace_id = r.workspace_id and o.connection_id = r.connection_id
            union all
            select r, p_now from unnest(p_released) r
        ) d
        group by d.resource_id
        order by d.resource_id
    loop
        perform 1 from ready r
        where r.workspace_id = p_workspace_id and r.resource_id = v_due.resource_id
        for no key update;
        update ready r
        set next_at = least(v_due.due_at, case when wakes then p_now end), reason = null, waits_for = null
        from (
            select o.resource_id,
                o.waits_for = any (p_freed)
                or o.reason = 'concurrency'
                -- The call sent ahead after a refusal was answered.
                or o.reason = 'cooldown' and not exists (
                    select from resources c
                    join scope_states t on t.workspace_id = c.workspace_id
                        and t.scope_id in (c.model_scope_id, c.connection_id)
                    where c.workspace_id = o.workspace_id
                        and c.resource_id = o.resource_id
                        and (t.blocked_until > p_now or t.refusals > 0)
                ) as wakes
            from ready o
            where o.workspace_id = p_workspace_id and o.resource_id = v_due.resource_id
        ) w
        where r.workspace_id = p_workspace_id
            and r.resource_id = w.resource_id
            and r.next_at > least(v_due.due_at, case when wakes then p_now end);
        if found then
            v_woken := v_woken || v_due.resource_id;
        end if;
    end loop;
    return v_woken;
end
$$;
comment on function ready_change(uuid, settled_item[], uuid[], uuid[], timestamptz) is
    'Make known when resources have work or capacity again.';

-- The virtual time at which a flow of a resource (re-)enters: that of the one served next of its priority, or else
-- of the one served last; of any priority if there is none of its own. A flow that waits for later retries or for a
-- limit of its own is neither.
create or replace function flow_entry(p_workspace_id uuid, p_resource_id uuid, p_priority smallint)
returns double precision
language sql stable
as $$
    select coalesce(
        min(f.virtual_time) filter (where is_next and f.priority = p_priority),
        max(f.virtual_time) filter (where f.priority = p_priority),
        min(f.virtual_time) filter (where is_next),
        max(f.virtual_time),
        0
    )
    from flows f
    cross join lateral (
        select f.waits_for is null and (
            f.unstarted > 0
            -- Not exists: see the same in claim.
            or f.pending > 0 and coalesce((
                select true
                from items i
                where i.workspace_id = f.workspace_id
                    and i.batch_day = f.batch_day
                    and i.batch_id = f.batch_id
                    and i.resource_id = f.resource_id
                    and i.status = 'pending'
                    and i.attempt > 0
                    and i.visible_at <= clock_timestamp()
                limit 1
            ), false)
        ) as is_next
    ) n
    where f.workspace_id = p_workspace_id
        and f.resource_id = p_resource_id
        and f.is_open
        and not f.is_paused
        and not f.is_cancelled
$$;
comment on function flow_entry(uuid, uuid, smallint) is 'Virtual time at which a flow of a resource enters.';

-- End a batch when all of its flows have ended. The caller holds the flows it changed; the batch's row
-- lock makes the last of several settlings see what the others committed.
create or replace function batch_finish(
    p_workspace_id uuid, p_batch_day date, p_batch_id uuid, p_now timestamptz
)
returns work_status
language plpgsql volatile
as $$
declare
    v_status work_status;
    v_open boolean;
    v_failed bigint;
    v_cancelled bigint;
begin
    select b.status into v_status
    from batches b
    where b.workspace_id = p_workspace_id and b.batch_id = p_batch_id and b.completed_at is null
    for no key update;
    if not found then
        return null;
    end if;
    select bool_or(f.is_open), sum(f.failed), sum(f.cancelled) into v_open, v_failed, v_cancelled
    from flows f
    where f.workspace_id = p_workspace_id and f.batch_id = p_batch_id;
    if v_open then
        return null;
    end if;
    if v_status <> 'cancelled' then
        -- Some of a cancelled batch's items were tried again, the others stay as they are.
        v_status := case
            when v_failed > 0 then 'failed'
            when v_cancelled > 0 then 'cancelled'
            else 'completed'
        end;
    end if;
    update batches b
    set status = v_status, completed_at = p_now,
        cancelled_at = case when v_status = 'cancelled' then coalesce(b.cancelled_at, p_now) end
    where b.workspace_id = p_workspace_id and b.batch_id = p_batch_id;
    perform event_append(
        p_workspace_id, p_batch_day, p_batch_id, ('batch-' || v_status)::event_kind, null, p_now);
    return v_status;
end
$$;
comment on function batch_finish(uuid, date, uuid, timestamptz) is
    'End a batch whose flows have all ended.';
