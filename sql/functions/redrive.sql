-- redrive: put items that ended without an answer back in line, with fresh counts of failures and crashes.
--
-- Which ones: of p_statuses (failed, cancelled), and if given only these numbers (p_seqs) and only with one of these
-- error codes (p_codes); at most p_most. p_before: nothing that ended later, so that a caller who goes on until
-- nothing is left does not put back what fails again meanwhile.
--
-- The failed result gives way to the next one; the attempts stay as history, and numbers go on counting. An ended
-- batch becomes running again; its events go on. A cancelled batch is left alone unless cancelled items are asked for
-- and all its rows and calls have ended: then it is no longer cancelled, and what is not put back stays as it is.
--
-- Lock order: items → flows → batch → ready.
create or replace function redrive(
    p_workspace_id uuid, p_batch_id uuid, p_statuses work_status[], p_seqs int[], p_codes text[],
    p_before timestamptz, p_most int
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
    v_day date;
    v_seqs int[];
    v_status work_status;
begin
    select b.batch_day into v_day
    from batches b
    where b.workspace_id = p_workspace_id
        and b.batch_id = p_batch_id
        and (b.status <> 'cancelled' or 'cancelled' = any (p_statuses) and b.completed_at is not null);
    if not found then
        return 0;
    end if;
    -- All locks first, in order; a cancel that came before us is then seen.
    if p_seqs is null then
        with due as materialized (
            select i.seq
            from items i
            where i.workspace_id = p_workspace_id
                and i.batch_day = v_day
                and i.batch_id = p_batch_id
                and i.status = any (p_statuses)
                and i.status in ('failed', 'cancelled')
                and i.ended_at <= p_before
                -- What was erased cannot be asked again.
                and not exists (
                    select from item_requests q
                    where q.workspace_id = i.workspace_id
                        and q.batch_day = i.batch_day
                        and q.batch_id = i.batch_id
                        and q.seq = i.seq
                        and q.erased_at is not null
                )
                and (p_codes is null or exists (
                    select from item_results r
                    where r.workspace_id = i.workspace_id
                        and r.batch_day = i.batch_day
                        and r.batch_id = i.batch_id
                        and r.seq = i.seq
                        and r.error_code = any (p_codes)
                ))
            order by i.seq
            limit p_most
            for no key update of i skip locked
        )
        select array_agg(d.seq order by d.seq) into v_seqs from due d;
    else
        with wanted as materialized (
            select distinct p_workspace_id as workspace_id, v_day as batch_day, p_batch_id as batch_id, s.seq
            from unnest(p_seqs) as s (seq)
        ),
        due as materialized (
            select i.seq
            from wanted w
            join items i on i.workspace_id = w.workspace_id
                and i.batch_day = w.batch_day
                and i.batch_id = w.batch_id
                and i.seq = w.seq
            where i.status = any (p_statuses)
                and i.status in ('failed', 'cancelled')
                and i.ended_at <= p_before
                -- What was erased cannot be asked again.
                and not exists (
                    select from item_requests q
                    where q.workspace_id = i.workspace_id
                        and q.batch_day = i.batch_day
                        and q.batch_id = i.batch_id
                        and q.seq = i.seq
                        and q.erased_at is not null
                )
                and (p_codes is null or exists (
                    select from item_results r
                    where r.workspace_id = i.workspace_id
                        and r.batch_day = i.batch_day
                        and r.batch_id = i.batch_id
                        and r.seq = i.seq
                        and r.error_code = any (p_codes)
                ))
            order by i.seq
            limit p_most
            for no key update of i skip locked
        )
        select array_agg(d.seq order by d.seq) into v_seqs from due d;
    end if;
    if v_seqs is null then
        return 0;
    end if;
    perform 1 from flows f
    where f.workspace_id = p_workspace_id and f.batch_id = p_batch_id
    order by f.resource_id
    for no key update;
    select b.status into v_status
    from batches b
    where b.workspace_id = p_workspace_id
        and b.batch_id = p_batch_id
        and (b.status <> 'cancelled' or 'cancelled' = any (p_statuses) and b.completed_at is not null)
    for no key update;
    if not found then
        return 0;
    end if;

    delete from item_results r
    where r.workspace_id = p_workspace_id
        and r.batch_day = v_day
        and r.batch_id = p_batch_id
        and r.seq = any (v_seqs);
    -- Of the same rows as the update below, while they still say what they were.
    update flows f
    set failed = f.failed - coalesce(back.failed, 0),
        cancelled = f.cancelled - coalesce(back.cancelled, 0),
        pending = f.pending + coalesce(back.failed + back.cancelled, 0),
        is_open = f.is_open or coalesce(back.failed + back.cancelled, 0) > 0,
        is_cancelled = f.is_cancelled and v_status <> 'cancelled',
        is_aborted = f.is_aborted and v_status <> 'cancelled',
        virtual_time = greatest(f.virtual_time, flow_entry(p_workspace_id, f.resource_id, f.priority))
    from flows o
    left join lateral (
        select count(*) filter (where i.status = 'failed')::int as failed,
            count(*) filter (where i.status = 'cancelled')::int as cancelled
        from items i
        where i.workspace_id = o.workspace_id
            and i.batch_day = o.batch_day
            and i.batch_id = o.batch_id
            and i.seq = any (v_seqs)
            and i.resource_id = o.resource_id
    ) back on true
    where o.workspace_id = p_workspace_id
        and o.batch_id = p_batch_id
        and f.workspace_id = o.workspace_id
        and f.batch_id = o.batch_id
        and f.resource_id = o.resource_id
        and (back.failed + back.cancelled > 0 or v_status = 'cancelled');
    update items i
    set status = 'pending', ended_reason = null, ended_at = null, failures = 0, crashes = 0,
        crashes_alone = 0, visible_at = v_now,
        -- An expired or cancelled item was perhaps never begun; below the floor only begun ones are found.
        attempt = greatest(i.attempt, 1)
    where i.workspace_id = p_workspace_id
        and i.batch_day = v_day
        and i.batch_id = p_batch_id
        and i.seq = any (v_seqs);
    update batches b
    set status = 'running', completed_at = null, cancelled_at = null,
        started_at = coalesce(b.started_at, v_now)
    where b.workspace_id = p_workspace_id
        and b.batch_id = p_batch_id
        and b.status in ('completed', 'failed', 'cancelled');
    if found then
        perform event_append(p_workspace_id, v_day, p_batch_id, 'batch-running', null, v_now);
    end if;
    -- Its error file has other lines from now on: it is measured anew, and has another id.
    update batches b
    set redrives = b.redrives + 1, expired_at = null
    where b.workspace_id = p_workspace_id and b.batch_id = p_batch_id;
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
comment on function redrive(uuid, uuid, work_status[], int[], text[], timestamptz, int) is
    'Put items of a batch that ended without an answer back in line; how many.';
