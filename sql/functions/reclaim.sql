-- reclaim: bring back the items of one batch whose worker vanished or whose lease passed.
--
-- The caller has found candidates (items_lapsed) and passes the number and attempt that it saw; under the row
-- lock both must still hold, so of several reclaimers, or of a reclaim and a late answer, one wins. The call may
-- have been made: the attempt's row says lost and its reservation stays in the ledger, where it ages out with
-- its window.
--
-- A worker that dies takes all its calls along, so a crash convicts an item only when it was alone in its
-- worker (p_alone): three such end it. A suspect of many shared crashes is claimed alone (see claim), so a
-- poison item convicts itself and its neighbours do not fail with it.
--
-- Lock order: items (SKIP LOCKED, in key order) → flows → batch → ready. The ledger is not touched.
create or replace function reclaim(
    p_workspace_id uuid, p_batch_day date, p_batch_id uuid, p_seqs int[], p_attempts int[],
    p_alone boolean[], p_max_crashes int, p_wait interval
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
    v_changed settled_item[];
begin
    with given as materialized (
        select p_workspace_id as workspace_id, p_batch_day as batch_day, p_batch_id as batch_id, g.*
        from unnest(p_seqs, p_attempts, p_alone) as g (seq, attempt, alone)
    ),
    held as materialized (
        select i.*, g.alone
        from items i
        join given g on g.workspace_id = i.workspace_id
            and g.batch_day = i.batch_day
            and g.batch_id = i.batch_id
            and g.seq = i.seq
            and g.attempt = i.attempt
        where i.status = 'running'
        order by i.seq
        for no key update of i skip locked
    ),
    noted as (
        insert into attempts (
            workspace_id, batch_day, batch_id, seq, attempt, outcome, resource_id, worker_id,
            claimed_at, ended_at, error_code, error_message, reserved_limits, reserved_input_tokens,
            reserved_output_tokens, charged_requests, charged_input_tokens, charged_output_tokens,
            expected_output_tokens, reserved_cost_nano
        )
        select workspace_id, batch_day, batch_id, seq, attempt, 'lost', resource_id, worker_id,
            claimed_at, v_now, 'lost', 'the worker vanished; the call may have been made',
            reserved_limits, reserved_input_tokens, reserved_output_tokens, 1,
            reserved_input_tokens, reserved_output_tokens, expected_output_tokens, reserved_cost_nano
        from held
        on conflict do nothing
    ),
    due as (
        insert into rollup_due (batch_day, minute_at)
        select p_batch_day, date_trunc('minute', v_now, 'UTC') from held limit 1
    ),
    counted as (
        update items i
        set crashes_alone = i.crashes_alone + 1
        from held h
        where h.alone
            and i.workspace_id = h.workspace_id
            and i.batch_day = h.batch_day
            and i.batch_id = h.batch_id
            and i.seq = h.seq
    )
    select array_agg(row(null::int, h.workspace_id, h.batch_day, h.batch_id, h.resource_id, h.seq, h.attempt, h.status,
        case when h.crashes_alone + h.alone::int >= p_max_crashes then 'failed' else 'pending' end,
        case when h.crashes_alone + h.alone::int >= p_max_crashes then 'crashed' end,
        case when h.crashes_alone + h.alone::int < p_max_crashes then v_now + p_wait end,
        h.failures, h.crashes + 1, null::uuid)::settled_item order by h.seq)
    into v_changed
    from held h;
    if v_changed is null then
        return 0;
    end if;
    perform items_change(p_workspace_id, v_changed, v_now);
    insert into item_results (
        workspace_id, batch_day, batch_id, seq, attempt, ended_at, error_code, error_message
    )
    select p_workspace_id, c.batch_day, c.batch_id, c.seq, c.attempt, v_now, 'CRASHED',
        'the worker vanished each time this item ran; see its attempts'
    from unnest(v_changed) c
    where c.becomes = 'failed'
    on conflict do nothing;
    perform flows_change(p_workspace_id, v_changed, null, v_now, null);
    perform ready_change(p_workspace_id, v_changed, null, null, v_now);
    return cardinality(v_changed);
end
$$;
comment on function reclaim(uuid, date, uuid, int[], int[], boolean[], int, interval) is
    'Bring back items of vanished workers. See sql/functions/reclaim.sql.';
