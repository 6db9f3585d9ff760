-- cancel: two steps, so that a million items are cancelled in a millisecond.
--
-- Step one (cancel) closes the flows. From its commit on nothing of the batch is claimed, every count says
-- cancelled, and every read shows its pending items as cancelled, whatever their rows still say. Calls in
-- flight are let finish: they are paid for, and their answers are kept.
-- Step two (cancel_chunk) lets the rows and the events follow, some thousand at a time.
--
-- Lock order: flows → batch → ready; in step two items → flows → batch.
create or replace function cancel(p_workspace_id uuid, p_batch_id uuid) returns work_status
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
    if not found or v_status in ('completed', 'failed', 'cancelled') then
        return v_status;
    end if;
    update flows f
    set is_cancelled = true,
        cancelled = f.cancelled + f.pending,
        unmarked = f.pending,
        pending = 0,
        unstarted = 0
    where f.workspace_id = p_workspace_id and f.batch_id = p_batch_id;
    update batches b
    set status = 'cancelled', cancelled_at = v_now
    where b.workspace_id = p_workspace_id and b.batch_id = p_batch_id;
    perform batch_finish(p_workspace_id, v_day, p_batch_id, v_now);
    return 'cancelled';
end
$$;
comment on function cancel(uuid, uuid) is
    'Cancel a batch; returns its status: null if there is none, else cancelled or how it had ended.';

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
    v_seqs int[];
begin
    -- One flow per call: a second one would be locked after the batch, out of order.
    select f.resource_id, f.floor into v_resource_id, v_floor
    from flows f
    where f.workspace_id = p_workspace_id
        and f.batch_id = p_batch_id
        and f.is_cancelled
        and f.unmarked > 0
    order by f.resource_id
    limit 1;
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
