-- expire: what a batch's deadline has overtaken. Nothing of a flow is claimed after its deadline (claim looks at
-- the clock itself); this lets the rows, results and events follow, some thousand items at a time, each with the
-- clear code EXPIRED. Calls in flight are let finish and their answers kept; what comes back to the queue from
-- them expires in the next round.
--
-- Lock order: items (SKIP LOCKED, in key order) → flows → batch → ready.
create or replace function expire(
    p_workspace_id uuid, p_batch_day date, p_batch_id uuid, p_resource_id uuid, p_most int
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
    v_floor int;
    v_changed settled_item[];
begin
    select f.floor into v_floor
    from flows f
    where f.workspace_id = p_workspace_id
        and f.batch_id = p_batch_id
        and f.resource_id = p_resource_id
        and f.is_open
        and not f.is_cancelled
        and f.expires_at <= v_now;
    if not found then
        return 0;
    end if;
    -- Unstarted items from the floor on, which rises with them, and what had returned: see cancel_chunk.
    with again as materialized (
        select i.* from items i
        where i.workspace_id = p_workspace_id
            and i.batch_day = p_batch_day
            and i.batch_id = p_batch_id
            and i.resource_id = p_resource_id
            and i.status = 'pending'
            and i.attempt > 0
        order by i.seq
        limit p_most
        for no key update skip locked
    ),
    first as materialized (
        select i.* from items i
        where i.workspace_id = p_workspace_id
            and i.batch_day = p_batch_day
            and i.batch_id = p_batch_id
            and i.resource_id = p_resource_id
            and i.status = 'pending'
            and i.attempt = 0
            and i.seq >= v_floor
        order by i.seq
        limit p_most
        for no key update skip locked
    ),
    held as (
        select a.* from again a
        union all
        select f.* from first f
    )
    select array_agg(row(null::int, h.workspace_id, h.batch_day, h.batch_id, h.resource_id, h.seq, h.attempt,
        h.status, 'failed', 'expired', null::timestamptz, h.failures, h.crashes, null::uuid)::settled_item
        order by h.seq)
    into v_changed
    from held h;
    if v_changed is null then
        return 0;
    end if;
    perform items_change(p_workspace_id, v_changed, v_now);
    insert into item_results (
        workspace_id, batch_day, batch_id, seq, attempt, ended_at, error_code, error_message
    )
    select p_workspace_id, c.batch_day, c.batch_id, c.seq, c.attempt, v_now, 'EXPIRED',
        'the batch''s deadline passed before this item was answered'
    from unnest(v_changed) c
    on conflict do nothing;
    perform flows_change(p_workspace_id, v_changed, null, v_now, null);
    -- A cancel that was committed since our look has closed the flow: it is undone, and the cancel stands.
    perform 1 from flows f
    where f.workspace_id = p_workspace_id
        and f.batch_id = p_batch_id
        and f.resource_id = p_resource_id
        and (f.is_cancelled or coalesce(f.expires_at, 'infinity') > v_now);
    if found then
        raise exception 'batch % was cancelled or prolonged meanwhile', p_batch_id using errcode = 'SLCLO';
    end if;
    update flows f
    -- Past what was ended here, but not past what somebody else had locked.
    set floor = greatest(f.floor, coalesce(
        (
            select i.seq from items i
            where i.workspace_id = p_workspace_id
                and i.batch_day = p_batch_day
                and i.batch_id = p_batch_id
                and i.resource_id = p_resource_id
                and i.status = 'pending'
                and i.attempt = 0
                and i.seq >= v_floor
            order by i.seq
            limit 1
        ),
        (select max(c.seq) + 1 from unnest(v_changed) c where c.attempt = 0)
    ))
    where f.workspace_id = p_workspace_id and f.batch_id = p_batch_id and f.resource_id = p_resource_id;
    return cardinality(v_changed);
end
$$;
comment on function expire(uuid, date, uuid, uuid, int) is
    'Let items of a batch whose deadline has passed end as failed, EXPIRED; how many.';
