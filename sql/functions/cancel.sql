-- cancel: two steps, so that a million items are cancelled in a millisecond.
--
-- Step one (cancel) closes the flows. From its commit on nothing of the batch is claimed, every count says
-- cancelled, and every read shows its pending items as cancelled, whatever their rows still say. Calls in
-- flight are let finish, since they are paid for, and their answers are kept; or (p_abort) they are to be cut.
-- Step two (cancel_chunk) lets the rows and the events follow, some thousand at a time, first those of calls to be
-- cut: their items end as cancelled at once, each call is noted as lost, and workers let go of it when they hear
-- of it. What such a call still brings is recorded as its attempt and changes nothing else; what it reserved stays
-- in the ledger, since the call was made.
--
-- A cancel that is under way may be repeated, and made one that cuts.
--
-- Lock order: flows → batch → ready; in step two items → flows → batch → ready.
create or replace function cancel(p_workspace_id uuid, p_batch_id uuid, p_abort boolean) returns work_status
language plpgsql volatile
as $$
declare
    v_now timestamptz := clock_timestamp();
    v_status work_status;
    v_day date;
begin
    perform 1 from flows f
    where f.workspace_id = p_workspace_id and f.batch_id = p_batch_id
    order by f.resource_id
    for no key update;
    select b.status, b.batch_day into v_status, v_day
    from batches b
    where b.workspace_id = p_workspace_id and b.batch_id = p_batch_id
    for no key update;
    if v_status = 'cancelled' and p_abort then
        update flows f
        set is_aborted = true
        where f.workspace_id = p_workspace_id and f.batch_id = p_batch_id and f.is_open;
    end if;
    if v_status is null or v_status in ('completed', 'failed', 'cancelled') then
        return v_status;
    end if;
    update flows f
    set is_cancelled = true,
        is_aborted = p_abort,
        cancelled = f.cancelled + f.pending,
        unmarked = f.pending,
        pending = 0,
        unstarted = 0
    where f.workspace_id = p_workspace_id and f.batch_id = p_batch_id and f.is_open;
    update batches b
    set status = 'cancelled', cancelled_at = v_now
    where b.workspace_id = p_workspace_id and b.batch_id = p_batch_id;
    perform batch_finish(p_workspace_id, v_day, p_batch_id, v_now);
    return 'cancelled';
end
$$;
comment on function cancel(uuid, uuid, boolean) is
    'Cancel a batch, and cut its calls if so wanted; returns its status: null if there is none, else cancelled or how it had ended.';

-- Mark up to p_most items of a cancelled batch; returns how many. Zero: all are marked, or the rest is locked.
create or replace function cancel_chunk(
    p_workspace_id uuid, p_batch_day date, p_batch_id uuid, p_most int
)
returns int
language plpgsql volatile
set enable_seqscan = off
set enable_bitmapscan = off
set enable_hashjoin = off
set enable_mergejoin = off
set enable_material = off
set plan_cache_mode = force_generic_plan
as $$
declare
    v_now timestamptz := clock_timestamp();
    v_resource_id uuid;
    v_floor int;
    v_running int;
    v_cut int;
    v_seqs int[];
    v_changed settled_item[];
begin
    -- One flow per call: a second one would be locked after the batch, out of order.
    select f.resource_id, f.floor, case when f.is_aborted then f.running else 0 end
    into v_resource_id, v_floor, v_running
    from flows f
    where f.workspace_id = p_workspace_id
        and f.batch_id = p_batch_id
        and f.is_cancelled
        and (f.unmarked > 0 or f.is_aborted and f.running > 0)
    order by f.is_aborted and f.running > 0 desc, f.resource_id
    limit 1;
    if v_running > 0 then
        -- Found by the small index of all that runs; then locked by number.
        select array_agg(r.seq) into v_seqs
        from (
            select i.seq
            from items i
            where i.workspace_id = p_workspace_id
                and i.batch_day = p_batch_day
                and i.batch_id = p_batch_id
                and i.resource_id = v_resource_id
                and i.status = 'running'
            order by i.visible_at
            limit p_most
        ) r;
        with held as materialized (
            select i.*
            from items i
            where i.workspace_id = p_workspace_id
                and i.batch_day = p_batch_day
                and i.batch_id = p_batch_id
                and i.seq = any (v_seqs)
                and i.status = 'running'
            order by i.seq
            for no key update skip locked
        ),
        noted as (
            insert into attempts (
                workspace_id, batch_day, batch_id, seq, attempt, outcome, resource_id, worker_id,
                claimed_at, ended_at, error_code, error_message, reserved_limits, reserved_input_tokens,
                reserved_output_tokens, charged_requests, charged_input_tokens, charged_output_tokens,
                expected_output_tokens
            )
            select workspace_id, batch_day, batch_id, seq, attempt, 'lost', resource_id, worker_id,
                claimed_at, v_now, 'aborted', 'its batch was cancelled during the call',
                reserved_limits, reserved_input_tokens, reserved_output_tokens, 1,
                reserved_input_tokens, reserved_output_tokens, expected_output_tokens
            from held
            on conflict do nothing
        )
        select array_agg(row(null::int, h.workspace_id, h.batch_day, h.batch_id, h.resource_id, h.seq,
            h.attempt, h.status, 'cancelled', 'cancelled', null::timestamptz, h.failures, h.crashes)::settled_item
            order by h.seq)
        into v_changed
        from held h;
        v_seqs := array(select c.seq from unnest(v_changed) c order by c.seq);
        v_cut := cardinality(v_seqs);
        if v_cut = 0 then
            return 0;
        end if;
        perform items_change(p_workspace_id, v_changed, v_now);
        update flows f
        set running = f.running - v_cut,
            cancelled = f.cancelled + v_cut,
            is_open = f.running > v_cut or f.unmarked > 0
        where f.workspace_id = p_workspace_id
            and f.batch_id = p_batch_id
            and f.resource_id = v_resource_id;
        perform event_append(
            p_workspace_id, p_batch_day, p_batch_id, 'item-cancelled', v_seqs, v_now);
        perform batch_finish(p_workspace_id, p_batch_day, p_batch_id, v_now);
        perform ready_change(p_workspace_id, v_changed, null, null, v_now);
        return v_cut;
    end if;
    -- Unstarted items from the floor on, which rises with them, so that no chunk walks what the last one marked;
    -- then what had returned; last, by number, what either passed by because it was locked.
    select array_agg(d.seq order by d.seq) into v_seqs
    from (
        select i.seq
        from items i
        where i.workspace_id = p_workspace_id
            and i.batch_day = p_batch_day
            and i.batch_id = p_batch_id
            and i.resource_id = v_resource_id
            and i.status = 'pending'
            and i.attempt = 0
            and i.seq >= v_floor
        order by i.seq
        limit p_most
        for no key update skip locked
    ) d;
    if v_seqs is not null then
        v_floor := v_seqs[cardinality(v_seqs)] + 1;
    else
        select array_agg(d.seq order by d.seq) into v_seqs
        from (
            select i.seq
            from items i
            where i.workspace_id = p_workspace_id
                and i.batch_day = p_batch_day
                and i.batch_id = p_batch_id
                and i.resource_id = v_resource_id
                and i.status = 'pending'
                and (i.attempt > 0 or i.seq < v_floor)
            order by i.seq
            limit p_most
            for no key update skip locked
        ) d;
    end if;
    if v_seqs is null then
        return 0;
    end if;
    update items i
    set status = 'cancelled', ended_reason = 'cancelled', ended_at = v_now
    where i.workspace_id = p_workspace_id
        and i.batch_day = p_batch_day
        and i.batch_id = p_batch_id
        and i.seq = any (v_seqs);
    update flows f
    set unmarked = f.unmarked - cardinality(v_seqs),
        floor = greatest(f.floor, v_floor),
        is_open = f.running > 0 or f.unmarked > cardinality(v_seqs)
    where f.workspace_id = p_workspace_id
        and f.batch_id = p_batch_id
        and f.resource_id = v_resource_id;
    perform event_append(
        p_workspace_id, p_batch_day, p_batch_id, 'item-cancelled', v_seqs, v_now);
    perform batch_finish(p_workspace_id, p_batch_day, p_batch_id, v_now);
    return cardinality(v_seqs);
end
$$;
comment on function cancel_chunk(uuid, date, uuid, int) is
    'Let the rows and events of a cancelled batch follow its cancel.';
