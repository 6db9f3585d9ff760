-- redrive: put failed items of an ended batch back in line, with fresh counts of failures and crashes.
--
-- The failed result gives way to the next one; the attempts stay as history, and numbers go on counting.
-- Lock order: items → flows → batch → ready. An ended batch becomes running again; its events go on.
create or replace function redrive(p_workspace_id uuid, p_batch_id uuid, p_most int) returns int
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
    v_day date;
    v_seqs int[];
begin
    select b.batch_day into v_day
    from batches b
    where b.workspace_id = p_workspace_id and b.batch_id = p_batch_id and b.status <> 'cancelled';
    if not found then
        return 0;
    end if;
    -- All locks first, in order; a cancel that came before us is then seen.
    with due as materialized (
        select i.seq
        from items i
        where i.workspace_id = p_workspace_id
            and i.batch_day = v_day
            and i.batch_id = p_batch_id
            and i.status = 'failed'
        order by i.seq
        limit p_most
        for no key update skip locked
    )
    select array_agg(d.seq order by d.seq) into v_seqs from due d;
    if v_seqs is null then
        return 0;
    end if;
    perform 1 from flows f
    where f.workspace_id = p_workspace_id and f.batch_id = p_batch_id
    order by f.resource_id
    for no key update;
    perform 1 from batches b
    where b.workspace_id = p_workspace_id and b.batch_id = p_batch_id and b.status <> 'cancelled'
    for no key update;
    if not found then
        return 0;
    end if;

    delete from item_results r
    where r.workspace_id = p_workspace_id
        and r.batch_day = v_day
        and r.batch_id = p_batch_id
        and r.seq = any (v_seqs);
    update items i
    set status = 'pending', ended_reason = null, ended_at = null, failures = 0, crashes = 0,
        crashes_alone = 0, visible_at = v_now,
        -- An expired item was perhaps never begun; below the floor only begun ones are found.
        attempt = greatest(i.attempt, 1)
    where i.workspace_id = p_workspace_id
        and i.batch_day = v_day
        and i.batch_id = p_batch_id
        and i.seq = any (v_seqs);
    update flows f
    set failed = f.failed - back.items,
        pending = f.pending + back.items,
        is_open = true,
        virtual_time = greatest(f.virtual_time, flow_entry(p_workspace_id, f.resource_id, f.priority))
    from (
        select i.resource_id, count(*)::int as items
        from items i
        where i.workspace_id = p_workspace_id
            and i.batch_day = v_day
            and i.batch_id = p_batch_id
            and i.seq = any (v_seqs)
        group by i.resource_id
    ) back
    where f.workspace_id = p_workspace_id
        and f.batch_id = p_batch_id
        and f.resource_id = back.resource_id;
    update batches b
    set status = case when b.status in ('completed', 'failed') then 'running' else b.status end,
        completed_at = null, expired_at = null, started_at = coalesce(b.started_at, v_now),
        redrives = b.redrives + 1
    where b.workspace_id = p_workspace_id and b.batch_id = p_batch_id;
    -- Its error file has other lines from now on: it is measured anew, and has another id.
    delete from result_files r
    where r.workspace_id = p_workspace_id and r.batch_id = p_batch_id and r.kind = 'error';
    perform event_append(p_workspace_id, v_day, p_batch_id, 'item-retrying', v_seqs, v_now);
    -- Locked before they are looked at, in order; see ready_change.
    perform 1 from ready r
    where r.workspace_id = p_workspace_id
        and r.resource_id in (
            select f.resource_id from flows f
            where f.workspace_id = p_workspace_id and f.batch_id = p_batch_id and f.pending > 0
        )
    order by r.resource_id
    for no key update;
    update ready r
    set next_at = v_now
    where r.workspace_id = p_workspace_id
        and r.resource_id in (
            select f.resource_id from flows f
            where f.workspace_id = p_workspace_id and f.batch_id = p_batch_id and f.pending > 0
        )
        and r.next_at > v_now;
    return cardinality(v_seqs);
end
$$;
comment on function redrive(uuid, uuid, int) is 'Put failed items of a batch back in line; how many.';
